"""The search over Ray actors that own some shards each: what `engine.Index` has behind it where one machine is not enough.

An actor whose process is killed is started again by Ray, opens its shards and answers the call that was under way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from iir_dist import artifact, session
from iir_dist.artifact import Manifest
from iir_dist.errors import IirError
from iir_dist.index.engine import Index, Live, Lost, Shards
from iir_dist.index.shard import Bits, shards_of
from iir_dist.storage import Folder
from iir_dist.vectors import F32, I64, merge_top_k

RESTARTS = 3
"""How often an actor is started again, and a call to it made again."""


class Actors:
    """The backend of an index whose shards are searched by actors."""

    most_queries = 1024  # a call costs milliseconds

    def __init__(self, folder: Folder, manifest: Manifest, workers: int) -> None:
        self._ray = session.connect()
        infos = shards_of(folder, manifest)
        groups = [infos[i::workers] for i in range(min(workers, len(infos)))]
        threads = max(1, session.cluster_cpus() // max(1, len(groups)))
        self.threads = threads + 1  # one more waits at the actor while answers are merged here
        # No CPUs of its own: a search would wait forever on a cluster that is busy to its last one.
        actor = self._ray.remote(
            num_cpus=0, scheduling_strategy="SPREAD", max_concurrency=threads, max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )(Shards)  # fmt: skip
        dim = int(manifest.info["dim"])
        self.actors = {
            frozenset(info.number for info in group): actor.remote(folder, group, dim, manifest.files, threads)
            for group in groups
        }
        self._sent: tuple[Bits, Any] | None = None
        self._lock = threading.Lock()

    def open(self, numbers: Iterable[int], vectors: bool) -> None:
        """Have the owners verify and open shards."""
        self._ask(numbers, "open", lambda mine: (sorted(mine), vectors))

    def scan(
        self, xt: F32, lists: I64, coarse: F32, k: int, live: Live, allowed: Bits | None, alone: bool
    ) -> tuple[F32, I64]:
        """The best k by code of all live shards."""
        queries = [self._ray.put(a) for a in (xt, lists, coarse)]
        bits = self._reference(allowed) if any(live.values()) else None
        parts = self._ask(live, "scan", lambda mine: (*queries, k, {n: live[n] for n in mine}, bits, alone))
        return merge_top_k(parts, k, larger_is_better=True)

    def rescore(self, xq: F32, rows: I64, live: Live) -> F32:
        """Exact scores of the candidates."""
        queries, candidates = self._ray.put(xq), self._ray.put(rows)
        parts = self._ask(live, "rescore", lambda mine: (queries, candidates, {n: live[n] for n in mine}))
        best: F32 = parts[0]
        for part in parts[1:]:
            best = np.maximum(best, part)
        return best

    def close(self) -> None:
        """Stop the actors."""
        for actor in self.actors.values():
            self._ray.kill(actor)

    def _reference(self, allowed: Bits | None) -> Any:
        """The set of allowed rows in Ray's object store; put there once for all calls of a search."""
        if allowed is None:
            return None
        with self._lock:
            if self._sent is None or self._sent[0] is not allowed:
                self._sent = (allowed, self._ray.put(allowed))
            return self._sent[1]

    def _ask(self, numbers: Iterable[int], method: str, arguments: Any) -> list[Any]:
        """Call every actor that owns one of the shards; `arguments` makes its arguments of those that it owns."""
        wanted = set(numbers)
        calls = [
            (wanted & owned, getattr(actor, method).remote(*arguments(wanted & owned)))
            for owned, actor in self.actors.items()
            if wanted & owned
        ]
        answers = []
        for mine, ref in calls:
            try:
                answers.append(session.result_of(ref))
            except self._ray.exceptions.RayActorError as error:
                shards = ", ".join(str(n) for n in sorted(mine))
                reason = str(error).strip().splitlines()[0]
                raise Lost(
                    mine,
                    IirError(
                        f"the actor that searched the shards {shards} died and was started again {RESTARTS} times in "
                        f"vain ({reason}); see the memory of its node, or use fewer or more --set workers="
                    ),
                ) from error
        return answers


def open_on_actors(uri: str | Path, workers: int, *, verify: bool = False, allow_partial: bool = False) -> Index:
    """Open an index for search by actors, at most one a shard; otherwise as `engine.open_index`."""
    folder, manifest = artifact.require(uri, "index")
    return opened_on_actors(folder, manifest, workers, verify=verify, allow_partial=allow_partial)


def opened_on_actors(
    folder: Folder, manifest: Manifest, workers: int, *, verify: bool = False, allow_partial: bool = False
) -> Index:
    """As `open_on_actors`, of this manifest."""
    backend = Actors(folder, manifest, workers)
    return Index(folder, manifest, backend, verify=verify, allow_partial=allow_partial)
