"""What training needs of the other workers; with one worker, or outside a process group, all of it is local.

No collective here carries a gradient. Losses are computed on the gathered embeddings by every worker, each takes the
rows of the gradient that are its own and pushes them through its network, and the parameters' gradients are summed:
that sum is the gradient of the global loss, so nothing is scaled by the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of workers."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this worker, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share_of(n: int, worker: int, workers: int) -> tuple[int, int]:
    """Items [start, stop) of n that a worker takes: contiguous, sizes differing by one at most.

    >>> [share_of(5, r, 2) for r in range(2)]
    [(0, 2), (2, 5)]
    """
    return n * worker // workers, n * (worker + 1) // workers


def gather(x: Tensor) -> tuple[Tensor, int]:
    """Rows of all workers in rank order, and where this worker's begin; lengths may differ. No gradient flows."""
    x = x.detach().contiguous()
    workers = world_size()
    if workers == 1:
        return x, 0
    home = x.device
    if dist.get_backend() == "nccl":  # which has no other memory
        x = x.cuda()
    lengths = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(workers)]
    dist.all_gather(lengths, torch.tensor([len(x)], dtype=torch.int64, device=x.device))
    sizes = [int(n) for n in lengths]
    padded = torch.zeros((max(sizes), *x.shape[1:]), dtype=x.dtype, device=x.device)
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(workers)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)]).to(home), sum(sizes[: rank()])


def first(value: float) -> float:
    """Worker 0's value, on every worker: what decides about going on must be one number."""
    own = torch.tensor([value], dtype=torch.float64)
    return float(gather(own)[0][0])


@torch.no_grad()
def copy_from_first(module: nn.Module) -> None:
    """Give every worker worker 0's weights and buffers: computed on another kind of machine, they may differ in a bit."""
    if world_size() > 1:
        for value in module.state_dict().values():
            sent = value.contiguous()
            dist.broadcast(sent, 0)
            value.copy_(sent)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the workers; one message for each dtype.

    A parameter that no worker has a gradient of, because it is out of the graph, stays without one: decay would move it.
    """
    if world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    own = torch.tensor([[p.grad is not None for p in trained]], dtype=torch.int64)
    anywhere = gather(own)[0].any(dim=0).tolist()
    trained = [p for p, present in zip(trained, anywhere, strict=True) if present]
    for dtype in sorted({p.dtype for p in trained}, key=str):
        group = [p for p in trained if p.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
        dist.all_reduce(flat)
        for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            p.grad = part.reshape(p.shape).clone()


def barrier() -> None:
    """Wait for all workers."""
    if world_size() > 1:
        dist.barrier()
