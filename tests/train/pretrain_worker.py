"""One of N processes of the test of pretraining: python pretrain_worker.py RANK WORLD RENDEZVOUS OUT IMAGES CASE...

Each case is trained for three steps in float64, one after another; what it ends with goes to OUT.RANK.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from iir_dist import artifact
from iir_dist.data.cache import Photos
from iir_dist.models.encoder import create
from iir_dist.storage import open_folder
from iir_dist.train import checkpoints
from iir_dist.train.backprop import Outcome
from iir_dist.train.loop import Run, train
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
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "": {"chunk": 2},
    "recompute": {"chunk": 2, "recompute": True},
    "global": {"chunk": None, "norm": "global"},
    "direct": {"chunk": 8},
    "once": {"chunk": 8, "recompute": True},
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


def double(task: PretrainTask) -> PretrainTask:
    """Everything in float64, the method's memories as they are."""
    task.learner.double()
    return task


def trained(images: str, case: str, out: Path) -> dict[str, Tensor]:
    """Losses, weights, buffers and what the method remembers after the steps."""
    config = config_of(case)
    photos = Photos([artifact.require(images, "ingest")])
    task = double(PretrainTask(photos, create(config.encoder), config))
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
    return {**found, "losses": torch.tensor(losses, dtype=torch.float64)}


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
