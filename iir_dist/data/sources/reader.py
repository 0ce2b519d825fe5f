"""Reading many members in order, several requests ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from iir_dist.data.sources import open_source
from iir_dist.data.sources.archives import ArchiveSource
from iir_dist.data.sources.member import Member, Source
from iir_dist.errors import ImageError

THREADS = 16
"""Requests under way; an object store answers one in tens of milliseconds, whatever its size."""
AHEAD_BYTES = 64 * 2**20
JOIN_BYTES = 4 * 2**20
"""Neighbours in an archive are read by one request of up to so many bytes."""
GAP_BYTES = 64 * 2**10
UNKNOWN_BYTES = 2**18
"""Stands for a size that is not known."""

Answer = list[bytes | ImageError]


@dataclass(frozen=True, slots=True)
class Request:
    """Members that are read at once."""

    members: tuple[Member, ...]
    size: int


class Reader:
    """Reads members of any source. A sequential one stays open, so that the next call goes on where the last ended."""

    def __init__(self) -> None:
        self._sources: dict[str, Source] = {}
        self._open: Source | None = None

    def close(self) -> None:
        """Let go of what is open."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()

    def source(self, uri: str) -> Source:
        """The source at an address; nothing is opened before it is read."""
        if uri not in self._sources:
            self._sources[uri] = open_source(uri)
        return self._sources[uri]

    def read(self, members: Sequence[Member]) -> Iterator[tuple[Member, bytes | ImageError]]:
        """Every member with its bytes, or with why it has none, in order; about `AHEAD_BYTES` are held at most.

        Raises:
            StorageError: the store is gone or refuses, which says nothing of the members.
        """
        requests = deque(self.requests(members))
        waiting: deque[tuple[Request, Future[Answer] | None]] = deque()
        held = 0
        with ThreadPoolExecutor(THREADS, thread_name_prefix="iir-read") as pool:
            try:
                while requests or waiting:
                    while requests and len(waiting) < 4 * THREADS and (held < AHEAD_BYTES or not waiting):
                        request = requests.popleft()
                        later = self.source(request.members[0].source).sequential
                        waiting.append((request, None if later else pool.submit(self._answer, request)))
                        held += request.size
                    request, future = waiting.popleft()
                    answer = self._answer(request) if future is None else future.result()
                    held -= request.size
                    yield from zip(request.members, answer, strict=True)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def requests(self, members: Sequence[Member]) -> Iterator[Request]:
        """Members by request: neighbours in an archive together, any other alone."""
        joined: list[Member] = []
        end = size = 0
        for member in members:
            source = self.source(member.source)
            near = (
                joined and isinstance(source, ArchiveSource) and not source.sequential
                and member.source == joined[-1].source and 0 <= member.offset - end <= GAP_BYTES
                and member.offset + source.span(member) - joined[0].offset <= JOIN_BYTES
            )  # fmt: skip
            if joined and not near:
                yield Request(tuple(joined), size)
                joined, size = [], 0
            joined.append(member)
            size += member.size if member.size >= 0 else UNKNOWN_BYTES
            if isinstance(source, ArchiveSource):
                end = member.offset + min(source.span(member), member.size)
        if joined:
            yield Request(tuple(joined), size)

    def _answer(self, request: Request) -> Answer:
        source = self._sources[request.members[0].source]
        if source.sequential and source is not self._open:
            if self._open is not None:
                self._open.close()
            self._open = source
        if len(request.members) == 1 or not isinstance(source, ArchiveSource):
            return [_read(source, member) for member in request.members]
        first, last = request.members[0], request.members[-1]
        length = max(m.offset + source.span(m) for m in request.members) - first.offset
        try:
            data = source.read_span(first.offset, length, last.version)
        except ImageError as error:
            return [error] * len(request.members)
        view = memoryview(data)
        answer: Answer = []
        for member in request.members:
            start = member.offset - first.offset
            try:
                answer.append(source.unpack(member, bytes(view[start : start + source.span(member)])))
            except ImageError as error:
                answer.append(error)
        return answer


def _read(source: Source, member: Member) -> bytes | ImageError:
    try:
        return source.read(member)
    except ImageError as error:
        return error
