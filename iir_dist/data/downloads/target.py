"""One file to obtain: where from, under which name, and whether it lies there as its record says."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from iir_dist.data.downloads.watch import Watch
from iir_dist.errors import CorruptError, InputError
from iir_dist.storage import LocalFolder

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**20
SCHEMES = ("http", "https")
ALGORITHMS = {"sha256": 64, "md5": 32}


@dataclass(frozen=True, slots=True)
class Item:
    """One file to fetch: address, `sha256:HEX` or `md5:HEX` where known, size in bytes where known (for progress)."""

    url: str
    checksum: str | None = None
    size: int | None = None


def file_name(url: str) -> str:
    """The local name of the file at an address: the end of its path, without anything that could leave the folder.

    >>> file_name("https://host/data/set%201.tar.gz?x=1"), file_name("https://host/a/..%2F..%2Fetc%2Fpasswd")
    ('set_1.tar.gz', '_.._etc_passwd')
    """
    end = unquote(urlsplit(url).path.rpartition("/")[2])
    name = re.sub(r"[^\w.+-]+", "_", end)
    # Room for `.part.json` and temporary names below the 255 bytes that file systems allow; the ending matters most.
    name = name.encode()[-200:].decode(errors="ignore").lstrip(".-")
    if not name:
        raise InputError(f"{redacted(url)} names no file; expected the address of one file, like https://host/set.tar")
    return name


@dataclass(frozen=True, slots=True)
class Target:
    """A file to obtain. `url` is what is requested, `shown` what messages and records say: it holds no secret.

    `query` is the SHA-256 of the address's query (empty without one): it tells addresses apart, and a query may hold
    a signature that must not be stored.
    """

    url: str
    shown: str
    query: str
    authorization: str = field(repr=False)
    path: Path
    algorithm: str
    expected: str
    size: int | None

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def forget_part(self) -> None:
        """Delete what is there of an unfinished download."""
        self.part.unlink(missing_ok=True)
        self.part.with_name(self.part.name + ".json").unlink(missing_ok=True)

    @property
    def by_hand(self) -> str:
        return f"get the file elsewhere and place it at {self.path}, then run the same command again"


def target_of(item: Item, folder: Path) -> Target:
    """Take an item's address and checksum apart. Raises `InputError` where they are none."""
    scheme = item.url.partition(":")[0].lower()
    if scheme not in SCHEMES:
        raise InputError(f"{redacted(item.url)!r} cannot be downloaded; expected http:// or https://")
    try:
        parts = urlsplit(item.url)
        host = parts.netloc.rpartition("@")[2].encode("idna").decode()
        port = parts.port  # raises where it is no number
    except ValueError:
        raise InputError(f"{redacted(item.url)!r} is not an address; expected http(s)://host/path/file") from None
    if not parts.hostname or port == 0:
        raise InputError(f"{redacted(item.url)!r} names no host; expected http(s)://host/path/file")
    safe = "/%:@!$&'()*+,;=~"
    path, query = quote(parts.path, safe), quote(parts.query, safe + "?")
    authorization = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    algorithm, expected = _checksum(item.checksum)
    return Target(
        url=urlunsplit((scheme, host, path, query, "")),
        shown=urlunsplit((scheme, host, path, "", "")),
        query=hashlib.sha256(query.encode()).hexdigest() if query else "",
        authorization=authorization,
        path=folder.expanduser().absolute() / file_name(item.url),
        algorithm=algorithm,
        expected=expected,
        size=item.size,
    )


def redacted(url: str) -> str:
    """An address that could not be read, for a message: nothing before an @, no query."""
    start, slashes, rest = url.partition("//")
    rest = re.split(r"[?#]", rest.rpartition("@")[2])[0]
    return start.rpartition("@")[2] + slashes + rest


def _checksum(text: str | None) -> tuple[str, str]:
    if text is None:
        return "", ""
    algorithm, _, expected = text.lower().partition(":")
    if not re.fullmatch(r"[0-9a-f]+", expected) or ALGORITHMS.get(algorithm) != len(expected):
        raise InputError(f"checksum {text!r} is not one; expected sha256: with 64, or md5: with 32, hexadecimal digits")
    return algorithm, expected


def refuse_shared_names(targets: Iterable[Target]) -> None:
    """Raise `InputError` where two addresses of one call would lie under one name."""
    taken: dict[str, Target] = {}
    for target in targets:
        other = taken.setdefault(target.path.name, target)
        if (other.url, other.expected) != (target.url, target.expected):
            raise InputError(
                f"{other.shown} and {target.shown} have the same file name {target.path.name!r}; "
                "fetch them into different folders"
            )
    for name in taken:
        for ending in (".json", ".part", ".part.json"):
            if name + ending in taken:
                raise InputError(
                    f"{name + ending!r} is where the state of {name!r} is kept; fetch them into different folders"
                )


def recorded(target: Target) -> bool:
    """Whether the file lies there as its record says; nothing is read."""
    record = read_json(target.path)
    try:
        stat = target.path.stat()
    except FileNotFoundError:
        return False
    if (record.get("size"), record.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns):
        return False
    if target.algorithm:
        return record.get(target.algorithm) == target.expected
    return (record.get("url"), record.get("query")) == (target.shown, target.query)


def present(target: Target, watch: Watch) -> bool:
    """Whether the file is there; one that has no matching record is read, verified and recorded."""
    if recorded(target):
        return True
    if not target.path.exists():
        return False
    record = read_json(target.path)
    found = {name: value.hexdigest() for name, value in hash_file(target, target.path, watch).items()}
    kind = target.algorithm or "sha256"
    expected = target.expected or record.get(kind, found[kind])
    if found[kind] != expected:
        otherwise = (
            "replace it with the right file"
            if target.algorithm
            else f"delete {target.path.name}.json beside it to take it as it lies there"
        )
        raise CorruptError(
            f"{target.path} is not {target.shown}: {kind} {found[kind]}, expected {expected}; delete it and run the "
            f"same command again, or {otherwise}"
        )
    if not target.algorithm and record and (record.get("url"), record.get("query")) != (target.shown, target.query):
        raise InputError(
            f"{target.path} was downloaded from {record.get('url')}, and {target.shown} ends with the same name; "
            "move it away, or fetch into another folder"
        )
    if not target.path.stat().st_size:
        raise InputError(f"{target.path} is empty; replace it with the file of {target.shown}, or delete it")
    if not record:
        log.info("%s is taken as it lies there%s", target.path, "" if target.algorithm else "; no checksum is known")
    write_record(target, found, record.get("etag"), record.get("last_modified"))
    target.forget_part()  # of a download that somebody was tired of
    return True


def write_record(target: Target, digests: dict[str, str], etag: str | None, modified: str | None) -> None:
    """Record a file that is complete and verified."""
    stat = target.path.stat()
    write_json(
        target.path,
        {
            "url": target.shown, "query": target.query, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            **digests, "etag": etag, "last_modified": modified,
        },
    )  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The record beside a file; empty where there is none that can be read."""
    try:
        value = json.loads(path.with_name(path.name + ".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Put a record beside a file."""
    LocalFolder(path.parent).write(path.name + ".json", json.dumps(value, indent=1).encode())


def hash_file(target: Target, path: Path, watch: Watch) -> dict[str, Any]:
    """Digests of a file on disk: SHA-256, and MD5 where that is the checksum."""
    digests = new_digests(target)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            watch.check()
            for digest in digests.values():
                digest.update(chunk)
    return digests


def new_digests(target: Target) -> dict[str, Any]:
    """Empty digests: SHA-256, and MD5 where that is the checksum."""
    names = {"sha256", target.algorithm or "sha256"}
    return {name: hashlib.new(name, usedforsecurity=False) for name in sorted(names)}
