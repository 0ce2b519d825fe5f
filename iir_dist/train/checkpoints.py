"""Checkpoints of a training: written beside the computing, numbered by step, a few kept, the best one apart."""

from __future__ import annotations

import io
import re
import threading
from typing import Any

import torch
from torch import Tensor

from iir_dist.errors import NotFoundError
from iir_dist.storage import Folder
from iir_dist.train import collectives

FOLDER, BEST, LOG = "checkpoints/", "checkpoints/best.pt", "training.jsonl"
_NUMBERED = re.compile(r"checkpoints/(\d{8})\.pt")


def name_of(step: int) -> str:
    """File of the checkpoint after `step` steps."""
    return f"{FOLDER}{step:08d}.pt"


def steps_of(folder: Folder) -> list[int]:
    """Steps of the checkpoints in the folder, rising."""
    found = (_NUMBERED.fullmatch(entry.name) for entry in folder.list(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def latest(folder: Folder) -> int:
    """Step of the newest checkpoint as worker 0 sees it, told to all: a listing may differ between machines. 0 if none."""
    steps = steps_of(folder) if collectives.rank() == 0 else []
    own = torch.tensor([steps[-1] if steps else 0][: 1 if collectives.rank() == 0 else 0], dtype=torch.int64)
    return int(collectives.gather(own)[0][0])


def read(folder: Folder, name: str) -> dict[str, Any]:
    """A checkpoint's content. Raises `NotFoundError`."""
    state: dict[str, Any] = torch.load(io.BytesIO(folder.read(name)), map_location="cpu", weights_only=True)
    return state


def weights(folder: Folder, step: int) -> dict[str, Tensor]:
    """The model after `step` steps: its moving average where there is one."""
    state = read(folder, name_of(step))
    found: dict[str, Tensor] = state["average"] or state["model"]
    return found


def final_weights(folder: Folder) -> dict[str, Tensor]:
    """What a training ends with: the model that validated best, where it validated, else the last."""
    try:
        best: dict[str, Tensor] = read(folder, BEST)["model"]
    except NotFoundError:
        return weights(folder, steps_of(folder)[-1])
    return best


class Writer:
    """Writes checkpoints and log in a thread, one at a time; the storage below retries. Used by worker 0 alone.

    Args:
        keep: newest checkpoints that stay.
    """

    def __init__(self, folder: Folder, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: dict[str, Any], log: bytes, best: dict[str, Any] | None) -> None:
        """Copy the state to host memory and return; an error of the write before is raised here.

        Args:
            best: what to write to the best checkpoint first, if the step is the best so far.
        """
        self.wait()
        state, best = _copied(state), _copied(best)
        self._thread = threading.Thread(target=self._write, args=(step, state, log, best), name="iir-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was saved is there."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, state: dict[str, Any], log: bytes, best: dict[str, Any] | None) -> None:
        # The numbered checkpoint last: a crash before it repeats its steps, which overwrite the rest with the same.
        try:
            self.folder.write(LOG, log)
            if best is not None:
                self._publish(BEST, best)
            self._publish(name_of(step), state)
            for old in steps_of(self.folder)[: -self.keep]:
                self.folder.delete(name_of(old))
        except BaseException as error:  # raised where the training next saves or ends
            self._error = error

    def _publish(self, name: str, state: dict[str, Any]) -> None:
        with self.folder.publish(name) as file:
            torch.save(state, file.path)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
