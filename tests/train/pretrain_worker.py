"""One of N processes of the test of pretraining: python pretrain_worker.py RANK WORLD RENDEZVOUS OUT IMAGES CASE...

Each case is trained for three steps in float64, one after another; what it ends with goes to OUT.RANK.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from iir_dist import artifact
from iir_dist.data.cache import Photos
from iir_dist.data.parts import deal, numbers, photo_counts
from iir_dist.errors import StorageError
from iir_dist.models.encoder import create
from iir_dist.storage import open_folder
from iir_dist.train import checkpoints
from iir_dist.train.backprop import Outcome
from iir_dist.train.loop import Run, train
from iir_dist.train.neighbours import Neighbours
from iir_dist.train.pretrain import open_photos
from iir_dist.train.pretrain_config import PretrainConfig
from iir_dist.train.pretrain_task import PretrainTask

SMALL: dict[str, dict[str, Any]] = {
    "simclr": {"dim": 8},
    "moco_v2": {"dim": 8, "queue": 24, "momentum": 0.9},
    "moco_v3": {"dim": 8, "hidden": 16},
    "byol": {"dim": 8, "hidden": 16},
    "simsiam": {"dim": 16, "bottleneck": 8},
    "swav": {
        "dim": 8, "prototypes": 6, "local_views": 2, "queue": 16, "queue_start": 1, "freeze_prototypes": 1, "epsilon": 0.1
    },
    "barlow_twins": {"dim": 16},
    "vicreg": {"dim": 16},
    "dino": {"hidden": 16, "bottleneck": 8, "prototypes": 6, "local_views": 2, "freeze_last": 1, "momentum": 0.9},
    "insclr": {"candidates": 6, "nearest": 3, "bank_start": 1, "bank_negatives": 5, "margin": -0.2},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "": {"chunk": 2},
    "recompute": {"chunk": 2, "recompute": True},
    "global": {"chunk": None, "norm": "global"},
    "direct": {"chunk": 4},
    "once": {"chunk": 4, "recompute": True},
    "parts": {"chunk": 2, "parts": 2},
}
STEPS = 3


def config_of(case: str, **changes: Any) -> PretrainConfig:
    """`method` or `method/variant`."""
    name, _, variant = case.partition("/")
    return PretrainConfig.model_validate(
        {
            "encoder": {"backbone": "timm:test_resnet", "weights": "random", "size": 48},
            "method": {"name": name, **SMALL[name]},
            "crop": 32,
            "local_crop": 32,
            "batch": 8,
            "steps": STEPS,
            "optim": {"optimizer": "sgd", "lr": 0.01},
            "checkpoint_every": STEPS,
            **VARIANTS[variant],
            **changes,
        }
    )


def neighbours(n: int, dim: int, k: int = 6, seed: int = 0) -> Neighbours:
    """Of n vectors of some instances, four or so of each."""
    rng = np.random.default_rng(seed)
    instances = rng.normal(size=(max(1, n // 4), dim))
    x = instances[rng.integers(len(instances), size=n)] + rng.uniform(0.3, 1.2, (n, 1)) * rng.normal(size=(n, dim))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    scores = x @ x.T
    np.fill_diagonal(scores, -2)
    return Neighbours(np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32), x)


def double(task: PretrainTask) -> PretrainTask:
    """Everything in float64, the method's memories as they are."""
    task.learner.double()
    return task


def trained(images: str, case: str, out: Path) -> dict[str, Tensor]:
    """Losses, weights, buffers and what the method remembers after the steps."""
    config = config_of(case)
    sources = [artifact.require(images, "ingest")]
    counts = photo_counts(sources)
    photos = open_photos(sources, config, counts)
    encoder = create(config.encoder)
    table = neighbours(len(photos), encoder.spec.dim) if config.method.name == "insclr" else None
    task = double(PretrainTask(photos, encoder, config, neighbours=table))
    losses: list[float] = []
    step = task.step

    def logged(number: int, scale: float) -> Outcome:
        outcome = step(number, scale)
        losses.append(outcome.loss)
        return outcome

    task.step = logged  # type: ignore[method-assign]
    run = Run(config.steps, config.optim, config.checkpoint_every, config.seed)
    train(task, run, open_folder(out))
    found = {f"model/{name}": value for name, value in task.model.state_dict().items()}
    if task.state is not None:
        found |= {f"state/{name}": value for name, value in _flat(task.state.state_dict()).items()}
    assert checkpoints.latest(open_folder(out)) == STEPS
    dealt = deal(counts, config.parts)
    here = [sum(_is_here(photos, n) for n in numbers(counts, shards).tolist()) for shards in dealt]
    return {**found, "losses": torch.tensor(losses, dtype=torch.float64), "opened": torch.tensor(here)}


def _is_here(photos: Photos, number: int) -> bool:
    try:
        return len(photos[number].data) > 0
    except StorageError:
        return False


def _flat(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = torch.as_tensor(value)
    return found


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    out = Path(sys.argv[4])
    found = {
        f"{case}//{name}": value
        for case in sys.argv[6:]
        for name, value in trained(sys.argv[5], case, out.with_name(f"{out.name}-{case.replace('/', '-')}")).items()
    }
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
