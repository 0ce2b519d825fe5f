"""One candidate image of a source, and the rules for its name and label."""

from __future__ import annotations

import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from iir_dist.data.images import EXTENSIONS


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a source that may be an image.

    `source` is the address of the folder, archive or list, `key` the place in it; `size` in bytes (-1: not known);
    `offset` where the bytes lie in an archive (-1: not in one), `coding` how they are packed there (empty: plainly);
    `version` changes with the content of what is read. `problem` is a reason for the ledger where the listing already
    shows that it cannot be used. `name`, `label` and `split` are set where the source gives them.
    """

    source: str
    key: str
    size: int
    offset: int = -1
    coding: str = ""
    version: str = ""
    problem: str = ""
    name: str | None = None
    label: str | None = None
    split: str | None = None


class Source(ABC):
    """A folder, an archive or a list at one address."""

    sequential = False
    """Whether members can only be read one after the other, in the order of `members`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @abstractmethod
    def members(self) -> Iterator[Member]:
        """Every file, in the order in which it is read fastest."""

    @abstractmethod
    def version(self) -> str:
        """Changes with the content, without reading it all; empty where the members' versions say it."""

    @abstractmethod
    def read(self, member: Member) -> bytes:
        """The bytes of a member. Raises `ImageError` where this member alone cannot be read."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Let go of open files."""


def is_unsafe(key: str) -> bool:
    """Whether a path inside an archive would climb out of the folder that it is unpacked to.

    >>> is_unsafe("a/../../etc/x.jpg"), is_unsafe("/x.jpg"), is_unsafe("a/b..c.jpg")
    (True, True, False)
    """
    parts = key.replace("\\", "/").split("/")
    return key.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":") or "\0" in key


def hidden(key: str) -> bool:
    """Files that systems leave about: dot files, resource forks of macOS archives."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in key.split("/"))


def is_image(key: str) -> bool:
    """Whether a file counts as an image of the source (by its ending; decoding shows whether it is one)."""
    return posixpath.splitext(key)[1].lower() in EXTENSIONS and not hidden(key)


def clean(key: str) -> str:
    """A key as a path for names: without `./` and doubled slashes, and with text in place of bytes that are none.

    >>> clean("./jpg//a.jpg")
    'jpg/a.jpg'
    """
    text = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return posixpath.normpath(text).lstrip("/")


def shared_folder(folders: Sequence[str]) -> str:
    """The deepest folder that all of them lie in, with its slash; empty where there is none.

    >>> shared_folder(["jpg/rome", "jpg/pisa"]), shared_folder(["rome", "pisa"])
    ('jpg/', '')
    """
    shared = os.path.commonpath(folders) if folders and all(folders) else ""
    return shared + "/" if shared else ""


def image_names(keys: Sequence[str]) -> list[str]:
    """Path below the deepest folder that all keys share, without extension.

    >>> image_names(["jpg/taj_mahal_000060.jpg", "jpg/taj_mahal_000061.jpg"]), image_names(["pisa/1.jpg", "rome/1.jpg"])
    (['taj_mahal_000060', 'taj_mahal_000061'], ['pisa/1', 'rome/1'])
    """
    paths = [clean(key) for key in keys]
    cut = len(shared_folder([posixpath.dirname(path) for path in paths]))
    return [posixpath.splitext(path[cut:])[0] for path in paths]
