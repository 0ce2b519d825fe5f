"""The cross-batch memory: order, wrap-around, resume, and the same on any number of workers."""

from __future__ import annotations

import io
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from iir_dist.errors import MismatchError
from iir_dist.train import collectives
from iir_dist.train.memory import CrossBatchMemory

SIZES = (5, 7, 3, 12, 1, 20)
"""Of the batches of `filled`: the fourth wraps a memory of 11 around, the last two are 1 and more than it holds."""


def batch(step: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(step)
    z = F.normalize(torch.randn(SIZES[step], 4, generator=rng), dim=1)
    return z, torch.randint(-1, 3, (SIZES[step],), generator=rng)


def add_shares(memory: CrossBatchMemory, step: int) -> None:
    """As a training does it: each worker embeds its share, all gather."""
    z, labels = batch(step)
    start, stop = collectives.share_of(len(z), collectives.rank(), collectives.world_size())
    memory.add(step, collectives.gather(z[start:stop])[0], collectives.gather(labels[start:stop])[0])


def test_it_holds_the_last_ones_oldest_first() -> None:
    memory = CrossBatchMemory(size=11, dim=4, start_step=1)
    for step in range(len(SIZES)):
        # The reference: a list that is cut.
        parts = [batch(s) for s in range(1, step)]
        z, labels = memory.contents(step)
        if not parts:
            assert z is None
            assert labels is None
            assert len(memory) == 0
        else:
            assert z is not None
            assert labels is not None
            assert torch.equal(z, torch.cat([part[0] for part in parts])[-11:])
            assert torch.equal(labels, torch.cat([part[1] for part in parts])[-11:])
            assert len(memory) == len(z)
        memory.add(step, *batch(step))
    z, _ = memory.contents(len(SIZES))
    assert z is not None
    assert torch.equal(z, batch(5)[0][-11:])
    assert memory.contents(0) == (None, None)  # not before the start, also where it is filled


def test_what_it_gives_is_its_own_float32_and_has_no_graph() -> None:
    memory = CrossBatchMemory(size=4, dim=4)
    z, labels = torch.eye(4, dtype=torch.float64, requires_grad=True), torch.arange(4)
    memory.add(0, z * 1, labels)
    for _ in range(2):
        given, names = memory.contents(1)
        assert given is not None
        assert names is not None
        assert given.dtype == torch.float32
        assert not given.requires_grad
        assert torch.equal(given, torch.eye(4))
        given.zero_()
        names.zero_()


@pytest.mark.parametrize("cut", [0, 2, 4])
def test_a_resumed_memory_is_the_same(cut: int) -> None:
    whole, before = CrossBatchMemory(11, 4), CrossBatchMemory(11, 4)
    for step in range(len(SIZES)):
        whole.add(step, *batch(step))
    for step in range(cut):
        before.add(step, *batch(step))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    before.add(0, *batch(0))  # what happens after the checkpoint does not count
    file.seek(0)
    after = CrossBatchMemory(11, 4)
    after.load_state_dict(torch.load(file, weights_only=True))
    for step in range(cut, len(SIZES)):
        after.add(step, *batch(step))
    for name, value in whole.state_dict().items():
        other = after.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


def test_another_memory_is_refused() -> None:
    with pytest.raises(MismatchError, match="has a memory of 11 x 4, this run one of 12 x 4"):
        CrossBatchMemory(12, 4).load_state_dict(CrossBatchMemory(11, 4).state_dict())


def test_two_workers_hold_what_one_does(tmp_path: Path) -> None:
    alone = CrossBatchMemory(11, 4)
    for step in range(len(SIZES)):
        add_shares(alone, step)
    subprocess.run([sys.executable, __file__, str(tmp_path / "meet"), str(tmp_path / "out")], check=True, timeout=120)
    for rank in range(2):
        state = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        for name, value in alone.state_dict().items():
            assert torch.equal(value, state[name]) if isinstance(value, Tensor) else value == state[name], name


def work(meet: str, out: str, rank: int) -> None:
    """One of two workers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    memory = CrossBatchMemory(11, 4)
    for step in range(len(SIZES)):
        add_shares(memory, step)
    torch.save(memory.state_dict(), f"{out}.{rank}")
    dist.destroy_process_group()


def main() -> None:
    """Two workers, forked, so that torch is loaded once."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(*sys.argv[1:], rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
