"""Off-the-shelf encoders on wonders11, whitening learnt on train19: python benchmarks/offtheshelf.py --data DIR --out DIR

backbone x pooling x size x scales x whitening, each by the commands that a user would give. What is done is kept in --out:
the same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from iir_dist import embed, evaluate, ingest, whiten
from iir_dist.index import search
from iir_dist.models import encoder

MULTI = (1.0, 0.7071, 0.5)
ROWS: list[dict[str, object]] = [
    {"size": 224, "resize": "squash"},
    {"size": 320},
    {"size": 480},
    {"size": 480, "scales": MULTI},
    {"size": 320, "pooling": "spoc"},
    {"size": 320, "pooling": "mac"},
    {"size": 320, "pooling": "rmac"},
    {"size": 320, "p": 4.6},
    {"size": 320, "regional_gem": True},
    {"size": 320, "backbone": "efficientnet_lite1"},
    {"size": 320, "backbone": "efficientnet_lite2"},
    {"size": 320, "backbone": "resnet18", "weights": "random"},
]
WHITENINGS: dict[str, dict[str, object]] = {
    "PCA 256": {"dim": 256},
    "PCA 512": {"dim": 512},
    "Lw 256": {"method": "lw", "dim": 256},
    "Lw 512": {"method": "lw", "dim": 512},
}


def score(database: Path, truth: Path, out: Path) -> float:
    """mAP of exact search."""
    search.run([str(database)], [str(database)], str(out / "rankings"), search.SearchConfig())
    manifest = evaluate.run(str(out / "rankings"), str(truth), str(out / "metrics"), evaluate.EvaluateConfig())
    (level,) = manifest.info["metrics"].values()
    return float(level["map"])


def row(settings: dict[str, object], images: dict[str, Path], out: Path) -> dict[str, float]:
    """mAP without and with each whitening."""
    network = out / "encoder"
    encoder.run(str(network), encoder.EncoderConfig.model_validate({"resize": "long", **settings}))
    for name, source in images.items():
        embed.run(str(source), str(network), str(out / name), embed.EmbedConfig())
    found = {"none": score(out / "wonders11", images["wonders11"], out)}
    for title, config in WHITENINGS.items():
        white = out / title.replace(" ", "-")
        whiten.run(
            str(out / "train19"), str(network), str(white / "encoder"), whiten.WhitenConfig.model_validate(config),
            images_uri=str(images["train19"]) if config.get("method") == "lw" else None,
        )  # fmt: skip
        embed.run(str(out / "wonders11"), str(white / "encoder"), str(white / "wonders11"), embed.EmbedConfig())
        found[title] = score(white / "wonders11", images["wonders11"], white)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    images = {name: arguments.out / "images" / name for name in ("wonders11", "train19")}
    truth = str(arguments.data / "groundtruth" / "wonders11" / "gnd_wonders11.pkl")
    small = {"shard_mb": 16}
    ingest.run(
        [str(arguments.data / "wonders11.tar")], str(images["wonders11"]), ingest.IngestConfig.model_validate(small),
        groundtruth_uri=truth,
    )  # fmt: skip
    train = ingest.IngestConfig.model_validate({**small, "split": "train"})
    ingest.run([str(arguments.data / "train19.tar")], str(images["train19"]), train)
    print(f"| encoder | none | {' | '.join(WHITENINGS)} |\n|---|{'---:|' * (1 + len(WHITENINGS))}")
    for settings in ROWS:
        title = json.dumps(settings, sort_keys=True)
        folder = arguments.out / "".join(c if c.isalnum() else "-" for c in title).strip("-")
        found = row(settings, images, folder)
        print(f"| `{title}` | {' | '.join(f'{value:.4f}' for value in found.values())} |", flush=True)


if __name__ == "__main__":
    main()
