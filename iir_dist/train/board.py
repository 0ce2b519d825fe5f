"""A training's numbers for TensorBoard: written to a local file, published beside each checkpoint.

The usual writer queues events for a thread; on a store that stumbles the thread would end and its queue block the
training, and flushing it does not wait for the queue. Here each event is in the file when `write` returns.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from iir_dist.storage import Folder


class Board:
    """Writes the lines of a run from `step` on; what an earlier run wrote from there on is hidden."""

    def __init__(self, folder: Folder, step: int) -> None:
        self._folder = folder
        self._scratch = tempfile.TemporaryDirectory(prefix="iir-board-")
        self._writer = EventsWriter(str(Path(self._scratch.name) / "events"), f".{step}")
        self._writer.write_event(Event(wall_time=time.time(), step=step, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()
        self._scratch.cleanup()

    def write(self, line: dict[str, Any]) -> None:
        """The numbers of one step, as in the log."""
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.write_event(Event(wall_time=time.time(), step=line["step"], summary=scalar(name, value)))

    def publish(self) -> None:
        """Let TensorBoard see what was written."""
        self._writer.flush()
        for path in Path(self._scratch.name).iterdir():
            with self._folder.publish(path.name) as file:
                shutil.copyfile(path, file.path)
