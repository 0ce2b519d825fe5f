"""What processes that were killed have left below a folder, and that no run will take up any more."""

from __future__ import annotations

import contextlib
from pathlib import Path

from iir_dist.artifact import MANIFEST, WORK
from iir_dist.errors import BusyError
from iir_dist.lock import LEASE, lock
from iir_dist.storage import Folder, open_folder


def collect(uri: str | Path, *, remove: bool) -> tuple[list[str], list[str]]:
    """Find, and remove, `_work/` of finished artifacts and files that were not written to their end.

    Unfinished artifacts keep theirs: the same command goes on with it. A change of a finished one (`iir index --add`)
    that was interrupted begins anew.

    Returns:
        Addresses of the files, and of the artifacts that were passed over because a process is writing them.
    """
    root = open_folder(uri)
    folders: dict[str, list[str]] = {}
    for entry in root.list():
        below = _folder_of(entry.name)
        folders.setdefault(below, []).append(entry.name.removeprefix(f"{below}/" if below else ""))
    found, busy = [], []
    for below, inside in sorted(folders.items()):
        is_artifact = MANIFEST in inside or any(name.startswith(WORK) for name in inside)
        if not (is_artifact and any(_is_left_over(name, finished=MANIFEST in inside) for name in inside)):
            continue
        folder = root.child(below) if below else root
        try:
            with lock(folder) if remove else contextlib.nullcontext():
                # Again, now that nobody writes: --force may have begun it anew since it was listed.
                finished = folder.exists(MANIFEST)
                left = [name for name in inside if _is_left_over(name, finished=finished)]
                found += [folder.address(name) for name in left]
                if remove:
                    _delete(folder, left)
        except BusyError:
            busy.append(folder.uri)
    return found, busy


def _folder_of(name: str) -> str:
    """The artifact that a file belongs to: what is before `_work/`, else its folder."""
    before, work, _ = f"/{name}".partition(f"/{WORK}")
    return (before if work else before.rpartition("/")[0]).strip("/")


def _is_left_over(name: str, *, finished: bool) -> bool:
    last = name.rpartition("/")[2]
    half_written = last.startswith(".") and last.endswith(".tmp")
    return name != LEASE and (half_written or (finished and name.startswith(WORK)))


def _delete(folder: Folder, names: list[str]) -> None:
    for name in names:
        folder.delete(name)
