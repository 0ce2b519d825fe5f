"""Where an index is searched: in this process, or by Ray actors that own some shards each where one machine is not enough.

An actor whose process is killed is started again by Ray, opens its shards and answers the call that was under way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iir_dist import artifact, session
from iir_dist.artifact import Manifest
from iir_dist.errors import IirError
from iir_dist.index.engine import Index, Live, Lost, Shards, opened
from iir_dist.index.merge import Lists, gather
from iir_dist.index.shard import Bits, Visit, shards_of
from iir_dist.storage import Folder
from iir_dist.vectors import F32, I64

RESTARTS = 3
"""How often an actor is started again, and a call to it made again."""


class Actors:
    """The backend of an index whose shards are searched by actors."""

    def __init__(self, folder: Folder, manifest: Manifest, workers: int) -> None:
        self._ray = session.connect()
        infos = shards_of(folder, manifest)
        groups = [infos[i::workers] for i in range(min(workers, len(infos)))]
        threads = max(1, min(session.cluster_cpus() // max(1, len(groups)), session.largest_node_cpus()))
        self.threads = threads + 1  # one more waits at the actor while answers are merged here
        # No CPUs of its own: a search would wait forever on a cluster that is busy to its last one.
        actor = self._ray.remote(num_cpus=0, max_concurrency=threads, max_restarts=RESTARTS, max_task_retries=RESTARTS)(
            Shards
        )
        self._counts = {info.number: info.count for info in infos}
        dim = int(manifest.info["dim"])
        self.actors = {
            frozenset(info.number for info in group): actor.options(
                scheduling_strategy=session.on_worker(number)
            ).remote(folder, group, dim, manifest.files, threads)
            for number, group in enumerate(groups)
        }
        self._sent: tuple[Bits, Any] | None = None
        self._lock = threading.Lock()

    def open(self, numbers: Iterable[int], vectors: bool) -> None:
        """Have the owners verify and open shards."""
        self._call("open", {owned: (sorted(mine), vectors) for owned, mine in self._owners(numbers).items()})

    def scan(self, visit: Visit, k: int, live: Live, allowed: Bits, alone: bool) -> Lists:
        """The best k by code of all live shards."""
        bits = None if all(count == self._counts[n] for n, count in live.items()) else self._reference(allowed)
        shares = {owned: {n: live[n] for n in mine} for owned, mine in self._owners(live).items()}

        def ask(queries: slice | I64, depths: Mapping[frozenset[int], int]) -> list[Lists]:
            sent = self._ray.put(visit.of(queries))
            return self._call("scan", {owned: (sent, m, shares[owned], bits, alone) for owned, m in depths.items()})

        return gather(ask, {owned: sum(share.values()) for owned, share in shares.items()}, k)

    def rescore(self, xq: F32, rows: I64, numbers: Iterable[int]) -> F32:
        """Exact scores of the candidates."""
        queries, candidates = self._ray.put(xq), self._ray.put(rows)
        arguments = {owned: (queries, candidates, mine) for owned, mine in self._owners(numbers).items()}
        return np.asarray(np.maximum.reduce(self._call("rescore", arguments)))

    def close(self) -> None:
        """Stop the actors."""
        for actor in self.actors.values():
            self._ray.kill(actor)

    def _reference(self, allowed: Bits) -> Any:
        """The set of allowed rows in Ray's object store; put there once for all calls of a search."""
        with self._lock:
            if self._sent is None or self._sent[0] is not allowed:
                self._sent = (allowed, self._ray.put(allowed))
            return self._sent[1]

    def _owners(self, numbers: Iterable[int]) -> dict[frozenset[int], frozenset[int]]:
        """What the actors that own some of the shards own, and which of these it is."""
        wanted = frozenset(numbers)
        return {owned: wanted & owned for owned in self.actors if wanted & owned}

    def _call(self, method: str, arguments: Mapping[frozenset[int], tuple[Any, ...]]) -> list[Any]:
        """Call the actors that own these shards, all at the same time."""
        refs = {owned: getattr(self.actors[owned], method).remote(*given) for owned, given in arguments.items()}
        answers = []
        for owned, ref in refs.items():
            try:
                answers.append(session.result_of(ref))
            except self._ray.exceptions.RayActorError as error:
                shards = ", ".join(str(n) for n in sorted(owned))
                reason = str(error).strip().splitlines()[0]
                raise Lost(
                    owned,
                    IirError(
                        f"the actor that searched the shards {shards} died and was started again {RESTARTS} times in "
                        f"vain ({reason}); see the memory of its node, or use fewer or more --set workers="
                    ),
                ) from error
        return answers


def searching_actors(wanted: int | None = None) -> int:
    """How many actors search, 0 where this process does: as wanted, else one a node of a cluster of several."""
    if wanted is not None:
        return wanted
    nodes = session.num_nodes()
    return nodes if nodes > 1 else 0


def open_on_actors(uri: str | Path, actors: int, *, verify: bool = False, allow_partial: bool = False) -> Index:
    """Open an index for search by actors, at most one a shard; otherwise as `engine.open_index`."""
    folder, manifest = artifact.require(uri, "index")
    return opened_on(folder, manifest, actors, verify=verify, allow_partial=allow_partial)


def opened_on(
    folder: Folder, manifest: Manifest, actors: int, *, verify: bool = False, allow_partial: bool = False
) -> Index:
    """An index of this manifest, searched by so many actors; in this process where there are none."""
    if not actors:
        return opened(folder, manifest, verify=verify, allow_partial=allow_partial)
    backend = Actors(folder, manifest, actors)
    return Index(folder, manifest, backend, verify=verify, allow_partial=allow_partial)
