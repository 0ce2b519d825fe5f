"""One of N processes of the gradient test: python worker.py RANK WORLD RENDEZVOUS OUT. See test_backprop.py."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from iir_dist.losses.average_precision import QuantizedAP
from iir_dist.losses.contrastive import NTXent
from iir_dist.losses.pairwise import loss_and_gradient
from iir_dist.train import collectives
from iir_dist.train.backprop import three_stage

SIZE, CHUNK = 13, 3


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, a batch of 13 in 4 classes, float64; the same in every process."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.BatchNorm1d(9), nn.Linear(9, 5)).double().eval()
    return net, torch.randn(SIZE, 6, dtype=torch.float64), torch.arange(SIZE) % 4


def gradients(loss: str) -> dict[str, Tensor]:
    """Gradient of the global loss, summed over workers."""
    net, x, labels = problem()
    start, stop = collectives.share_of(SIZE, collectives.rank(), collectives.world_size())
    kind = QuantizedAP(num_bins=20) if loss == "ap" else NTXent(0.3)

    objective = partial(loss_and_gradient, kind)

    def embed(chunk: Tensor) -> Tensor:
        return F.normalize(net(chunk), dim=1)

    outcome = three_stage(embed, lambda: x[start:stop].split(CHUNK), labels[start:stop], objective, 5)
    collectives.sum_gradients(net.parameters())
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {**found, "loss": torch.tensor(outcome.loss, dtype=torch.float64)}


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    found = {f"{loss}/{name}": value for loss in ("ap", "ntxent") for name, value in gradients(loss).items()}
    rows, begin = collectives.gather(torch.full((rank, 2), float(rank)))  # worker r has r rows, worker 0 none
    torch.save({**found, "rows": rows, "begin": torch.tensor(begin)}, f"{sys.argv[4]}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
