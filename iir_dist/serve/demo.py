"""Something to serve: python -m iir_dist.serve.demo --out serve-demo [--photos wonders11.tar --groundtruth gnd.pkl]

Photos to an index by the stages behind `iir`, with the ImageNet classifier as encoder; and some photos to search with, as
files, that are not in the index. Run again, it returns at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact

QUERIES = 24


def run(out: Path, photos: str | None = None, groundtruth: str | None = None) -> None:
    """Write `images/`, `encoder/`, `embeddings/`, `index/` and `queries/` below `out`.

    Args:
        photos: a source of `iir ingest`; the procedural world where none is given.
        groundtruth: says which photos are queries, and no part of the index.
    """
    from iir_dist import embed, ingest
    from iir_dist.demo import world_data
    from iir_dist.index import build
    from iir_dist.index.plan import IndexConfig
    from iir_dist.models.encoder import EncoderConfig
    from iir_dist.models.encoder import run as make_encoder

    out.mkdir(parents=True, exist_ok=True)
    if photos is None:
        world = world_data(out)
        photos, groundtruth = world.benchmark, world.groundtruth
    images, encoder, embeddings, index = (str(out / name) for name in ("images", "encoder", "embeddings", "index"))
    ingest.run([photos], images, ingest.IngestConfig(shard_mb=8), groundtruth_uri=groundtruth)
    make_encoder(encoder, EncoderConfig(backbone="efficientnet_lite0", size=224))
    embed.run(images, encoder, embeddings, embed.EmbedConfig())
    build.run([embeddings], index, IndexConfig())
    _write_queries(images, out / "queries")


def _write_queries(images: str, out: Path) -> None:
    """Some queries as files, spread over all."""
    folder, manifest = artifact.require(images, "ingest")
    found: list[tuple[str, bytes]] = []
    for shard in manifest.shards():
        with folder.open(shard) as file:
            table = pq.read_table(file, columns=["name", "split", "bytes"])
        table = table.filter(pc.equal(table["split"], "query"))
        found += zip(table["name"].to_pylist(), table["bytes"].to_pylist(), strict=True)
    out.mkdir(exist_ok=True)
    for name, data in found[:: max(1, len(found) // QUERIES)]:
        (out / f"{Path(name).name}.jpg").write_bytes(data)


def main() -> None:
    """As a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos")
    parser.add_argument("--groundtruth")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("iir_dist").setLevel(logging.INFO)
    run(arguments.out, arguments.photos, arguments.groundtruth)


if __name__ == "__main__":
    main()
