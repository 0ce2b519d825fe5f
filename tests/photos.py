"""Small photos, archives of them, and the rows that became of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from iir_dist import artifact


def jpeg(seed: int = 0, size: tuple[int, int] = (48, 32)) -> bytes:
    """Noise of that width and height, another for each seed."""
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8), "RGB").save(out, "JPEG")
    return out.getvalue()


def tar_of(files: dict[str, bytes]) -> bytes:
    """An uncompressed tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def image_rows(uri: Path | str) -> pa.Table:
    """All rows of an images artifact."""
    folder, manifest = artifact.require(uri, "ingest")
    tables = []
    for shard in manifest.shards():
        with folder.local(shard) as path:
            tables.append(pq.read_table(path))
    return pa.concat_tables(tables)
