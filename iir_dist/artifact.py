"""What every stage writes: a folder whose `manifest.json`, written last, says that it is complete.

A stage is a list of numbered shards. Each is committed on its own: data under its final name, then a done-marker
in `_work/`. When all are there the markers are gathered into the manifest and `_work/` is removed. A run that was
killed at any moment is continued by the same command; only unfinished shards are done again.

    with begin(out, "embed", config, inputs) as work:
        if work.finished:                      # same config and inputs: nothing to do
            return work.finished
        for shard in range(n):
            if shard not in work.done():
                ...                            # write files with folder.publish, then commit(folder, shard, …)
        return work.publish(counts=…)
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from iir_dist.config import StageConfig, fingerprint
from iir_dist.errors import ArtifactError, BusyError, CorruptError, InputError, MismatchError, NotFoundError
from iir_dist.lock import lock
from iir_dist.provenance import git_commit, versions
from iir_dist.storage import Folder, Publication, open_folder, sha256_of
from iir_dist.telemetry import count

SCHEMA_VERSION = 1
ENCODERS = ("encoder", "pretrain", "finetune", "whiten")
"""Stages that write an encoder."""
EMBEDDINGS = ("embed", "distractors")
"""Stages that write vectors."""
MANIFEST = "manifest.json"
WORK = "_work/"
_SHARD = re.compile(r"[a-z]+-\d{5,}\.[a-z0-9]+")
"""Names that `shard_name` gives."""
LOGS = (".jsonl", ".pt", "rejected.parquet", "operating_points.json")
"""Files that tell how a run went (logs, optimizer state, what was refused, what was measured); they do not count towards
the fingerprint."""


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 (hex) of one file."""

    model_config = ConfigDict(frozen=True)
    size: int
    sha256: str


class InputRef(BaseModel):
    """An input of a stage: where it was, its fingerprint, and whether a manifest vouches for it."""

    model_config = ConfigDict(frozen=True)
    uri: str
    fingerprint: str
    verified: bool = True


class Marker(BaseModel):
    """The done-marker of one shard (a number), or of one step that comes once (a word)."""

    model_config = ConfigDict(frozen=True)
    shard: int | str
    files: dict[str, FileEntry]
    counts: dict[str, int] = {}
    info: dict[str, Any] = {}


class Manifest(BaseModel):
    """What a finished artifact is, what it was made from, and every file in it."""

    model_config = ConfigDict(frozen=True)
    schema_version: int = SCHEMA_VERSION
    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, InputRef]
    counts: dict[str, int]
    info: dict[str, Any] = {}
    files: dict[str, FileEntry]
    versions: dict[str, str] = {}
    git_commit: str | None = None
    created: str = ""

    def shards(self, prefix: str = "shard-") -> list[str]:
        """Names of the data shards, in order."""
        return sorted(name for name in self.files if name.startswith(prefix))


def shard_name(number: int, suffix: str = ".parquet", prefix: str = "shard") -> str:
    """`shard-00003.parquet` for number 3."""
    return f"{prefix}-{number:05d}{suffix}"


def read_manifest(folder: Folder) -> Manifest | None:
    """The manifest, or None where the folder has none. Raises `CorruptError` if it cannot be read."""
    try:
        data = folder.read(MANIFEST)
    except NotFoundError:
        return None
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise CorruptError(f"{folder.address(MANIFEST)} is not a manifest of this program: {error}") from error


def require(uri: str | Path, *stages: str) -> tuple[Folder, Manifest]:
    """A finished artifact of one of the named stages.

    Raises:
        InputError: nothing is there, it is unfinished, or it comes from another stage.
    """
    folder = open_folder(uri)
    manifest = read_manifest(folder)
    if manifest is None:
        if any(True for _ in folder.list(WORK)):
            raise InputError(f"{folder.uri} is unfinished; run the command that writes it again, it will go on")
        raise InputError(f"{folder.uri} has no {MANIFEST}; expected the output of {' or '.join(stages)}")
    if manifest.stage not in stages:
        raise InputError(f"{folder.uri} was written by {manifest.stage!r}; expected {' or '.join(stages)}")
    if manifest.schema_version != SCHEMA_VERSION:
        raise InputError(
            f"{folder.uri} has schema version {manifest.schema_version}, this program reads {SCHEMA_VERSION}; "
            "write it again with this version"
        )
    return folder, manifest


def reference(folder: Folder, manifest: Manifest) -> InputRef:
    """How a later stage records this artifact as its input."""
    return InputRef(uri=folder.uri, fingerprint=manifest.fingerprint)


def verify(uri: str | Path) -> Manifest:
    """Recompute size and SHA-256 of every file.

    Raises:
        CorruptError: naming each file that is missing or differs.
    """
    folder = open_folder(uri)
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder.uri} has no {MANIFEST}; there is nothing to verify against")
    bad = []
    for name, entry in sorted(manifest.files.items()):
        try:
            check_file(folder, name, entry)
        except CorruptError as error:
            bad.append(str(error))
    if bad:
        raise CorruptError("; ".join(bad) + "; write the artifact again with --force")
    if content_fingerprint(manifest.stage, manifest.files) != manifest.fingerprint:
        raise CorruptError(f"{folder.address(MANIFEST)} was edited: its fingerprint does not follow from its files")
    return manifest


@contextlib.contextmanager
def verified(folder: Folder, name: str, entry: FileEntry) -> Iterator[Path]:
    """A local path to a file with the size and SHA-256 of its manifest; a remote one is downloaded once.

    Raises:
        CorruptError: it is missing or differs.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(folder.local(name))
        except NotFoundError:
            raise CorruptError(f"{folder.address(name)} is missing") from None
        size = path.stat().st_size
        if size != entry.size:
            raise CorruptError(f"{folder.address(name)} has {size} bytes, its manifest says {entry.size}")
        if sha256_of(path) != entry.sha256:
            raise CorruptError(f"{folder.address(name)} has other content than its manifest says (SHA-256 differs)")
        yield path


def check_file(folder: Folder, name: str, entry: FileEntry) -> None:
    """Raise `CorruptError` unless the file has the size and SHA-256 of its manifest."""
    with verified(folder, name, entry):
        pass


def content_fingerprint(stage: str, files: Mapping[str, FileEntry]) -> str:
    """Fingerprint of an artifact: what its files hold, whoever made them and wherever they lie."""
    content = {name: entry.sha256 for name, entry in files.items() if not name.endswith(LOGS)}
    return fingerprint({"stage": stage, "files": content})


def entry_of(publication: Publication) -> FileEntry:
    """The manifest entry of a file that was just published."""
    return FileEntry(size=publication.size, sha256=publication.sha256)


def commit(
    folder: Folder,
    shard: int | str,
    files: Mapping[str, FileEntry],
    counts: Mapping[str, int] | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Mark a shard (or step) as done; its files are already under their final names. Safe to call twice, from any process."""
    marker = Marker(shard=shard, files=dict(files), counts=dict(counts or {}), info=dict(info or {}))
    name = f"{shard:05d}" if isinstance(shard, int) else shard
    folder.write(f"{WORK}done/{name}.json", marker.model_dump_json().encode())


# ------------------------------------------------------------------------------------------------ one run of a stage


class Work:
    """One run of a stage over its output folder; made by `begin`."""

    def __init__(self, folder: Folder, stage: str, config: StageConfig, inputs: Mapping[str, InputRef]) -> None:
        self.folder = folder
        self.stage = stage
        self.config = config
        self.inputs = dict(inputs)
        self.finished: Manifest | None = None
        self.started = time.monotonic()

    @property
    def plan(self) -> dict[str, Any]:
        """What decides the output; two runs with the same plan write the same artifact."""
        return {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "config": self.config.resolved(),
            "inputs": {name: ref.fingerprint for name, ref in self.inputs.items()},
        }

    def done(self) -> dict[int, Marker]:
        """The numbered shards that are committed so far."""
        return {m.shard: m for m in self._markers() if isinstance(m.shard, int)}

    def step(self, name: str) -> Marker | None:
        """The marker of a step that comes once, or None where it is not done."""
        return next((m for m in self._markers() if m.shard == name), None)

    def _markers(self) -> list[Marker]:
        names = [e.name for e in self.folder.list(f"{WORK}done/")]
        return [Marker.model_validate_json(self.folder.read(name)) for name in names]

    def publish(
        self,
        counts: Mapping[str, int],
        files: Mapping[str, FileEntry] | None = None,
        info: Mapping[str, Any] | None = None,
        shards: int | None = None,
    ) -> Manifest:
        """Write the manifest, `draft` of the same arguments: the artifact is complete from here on."""
        manifest = self.draft(counts, files, info, shards)
        sweep(self.folder)  # of a worker that was killed and replaced
        if not self.folder.create(MANIFEST, manifest.model_dump_json(indent=2).encode()):
            raise BusyError(
                f"{self.folder.uri} was finished by another process meanwhile; this run's result is dropped"
            )
        self.folder.delete_all(WORK)
        self._tell(manifest.counts, manifest.files.values())
        return manifest

    def _tell(self, counts: Mapping[str, int], files: Iterable[FileEntry]) -> None:
        """Count what this run wrote and refused."""
        count("iir_bytes_total", sum(entry.size for entry in files), self.stage)
        count("iir_errors_total", counts.get("rejected", 0), self.stage, kind="rejected")

    def draft(
        self,
        counts: Mapping[str, int],
        files: Mapping[str, FileEntry] | None = None,
        info: Mapping[str, Any] | None = None,
        shards: int | None = None,
    ) -> Manifest:
        """The manifest that `publish` would write now.

        Args:
            counts: rows in, out and rejected by reason.
            files: files that belong to no shard.
            info: anything else that readers need.
            shards: how many shards there must be; fewer raises instead of looking complete.
        """
        missing = sorted(set(range(shards or 0)) - set(self.done()))
        if missing:
            raise ArtifactError(f"{self.folder.uri}: {len(missing)} of {shards} shards are missing, first {missing[0]}")
        entries = {name: entry for marker in self._markers() for name, entry in marker.files.items()}
        entries.update(files or {})
        return Manifest(
            stage=self.stage,
            fingerprint=content_fingerprint(self.stage, entries),
            config=self.config.model_dump(mode="json"),
            inputs=self.inputs,
            counts=dict(counts),
            info={**(info or {}), "seconds": round(time.monotonic() - self.started, 3)},
            files=dict(sorted(entries.items())),
            versions=versions(),
            git_commit=git_commit(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def amend(
        self,
        old: Manifest,
        counts: Mapping[str, int],
        files: Mapping[str, FileEntry],
        info: Mapping[str, Any],
        inputs: Mapping[str, InputRef] | None = None,
        removed: Iterable[str] = (),
    ) -> Manifest:
        """Replace the manifest of a finished artifact by one with the shards of this run added, and other counts.

        Args:
            inputs: what all of it is made from now, where that is not what it was.
            removed: files that are no part of it any more. They stay where they are, for those who read by the old
                manifest; `info["superseded"]` has to name them, so that they go with the artifact.

        Raises:
            BusyError: the manifest is not `old` any more.
        """
        added = {name: entry for marker in self._markers() for name, entry in marker.files.items()}
        entries = {**old.files, **added, **files}
        for name in removed:
            del entries[name]
        changes: dict[str, Any] = {
            "fingerprint": content_fingerprint(self.stage, entries),
            "inputs": dict(inputs or old.inputs),
            "counts": dict(counts),
            "info": {**old.info, **info},
            "files": dict(sorted(entries.items())),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        manifest = old.model_copy(update=changes)
        there = read_manifest(self.folder)
        if there is None or there.fingerprint != old.fingerprint:  # we lost the lease of an object store
            raise BusyError(f"{self.folder.uri} was changed by another process meanwhile; run the same command again")
        self.folder.write(MANIFEST, manifest.model_dump_json(indent=2).encode())
        self.folder.delete_all(WORK)
        rejected = manifest.counts.get("rejected", 0) - old.counts.get("rejected", 0)
        self._tell({"rejected": rejected}, [*added.values(), *files.values()])
        return manifest


@contextlib.contextmanager
def begin(
    out: str | Path, stage: str, config: StageConfig, inputs: Mapping[str, InputRef], *, force: bool = False
) -> Iterator[Work]:
    """Take hold of an output folder for one run.

    Inside the block `work.finished` is the manifest if there is nothing to do; else the run continues what an
    interrupted one with the same plan has committed.

    Raises:
        MismatchError: the folder holds work of another config or input; the message says which key differs.
        BusyError: another process is writing there.
        InputError: the folder holds files that no stage wrote.
    """
    folder = open_folder(out)
    work = Work(folder, stage, config, inputs)
    if not force and _is_finished(work):
        yield work
        return
    with lock(folder):
        if force:
            _discard(folder)
        elif _is_finished(work):  # by the process that held the lock before us
            yield work
            return
        _resume_or_start(work)
        yield work


def _is_finished(work: Work) -> bool:
    manifest = read_manifest(work.folder)
    if manifest is not None:
        there = {
            "schema_version": manifest.schema_version,
            "stage": manifest.stage,
            "config": {k: v for k, v in manifest.config.items() if k not in work.config.execution},
            "inputs": {name: ref.fingerprint for name, ref in manifest.inputs.items()},
        }
        _refuse_other_plan(work, there, "holds a finished artifact")
        work.finished = manifest
    return manifest is not None


def _resume_or_start(work: Work) -> None:
    try:
        plan = json.loads(work.folder.read(f"{WORK}plan.json"))
    except NotFoundError:
        others = [e.name for e in work.folder.list() if not e.name.startswith((".", WORK))]
        if others:
            raise InputError(
                f"{work.folder.uri} is not empty ({others[0]!r} and {len(others) - 1} more files) and no stage wrote "
                "it; give an empty or new --out"
            ) from None
        work.folder.write(f"{WORK}plan.json", json.dumps(work.plan).encode())
        return
    _refuse_other_plan(work, plan, "holds unfinished work")
    sweep(work.folder)


def sweep(folder: Folder) -> None:
    """Delete what processes that were killed while writing have left."""
    for entry in list(folder.list()):
        if entry.name.rpartition("/")[2].startswith(".") and entry.name.endswith(".tmp"):
            folder.delete(entry.name)


def _refuse_other_plan(work: Work, plan: Mapping[str, Any], what: str) -> None:
    found = differences(plan, work.plan)
    if found:
        raise MismatchError(
            f"{work.folder.uri} {what} of another run: {'; '.join(found)}; give another --out, or --force to replace it"
        )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Each place where two nested dicts differ, as `embed.size: 224 there, 320 now`.

    >>> differences({"config": {"size": 224}}, {"config": {"size": 320}})
    ['config.size: 224 there, 320 now']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    if old == new:
        return []
    short = [v[:12] if isinstance(v, str) and len(v) == 64 else v for v in (old, new)]
    return [f"{path}: {short[0]!r} there, {short[1]!r} now"]


def _discard(folder: Folder) -> None:
    """Remove an artifact: manifest first, so that it never looks complete, then only the files that are ours."""
    manifest = read_manifest(folder)
    names = {*manifest.files, *manifest.info.get("superseded", ())} if manifest else set()
    if manifest or folder.exists(f"{WORK}plan.json"):
        # A process that was killed may have left a shard without a marker, a training its log and checkpoints.
        ours = (entry.name for entry in folder.list())
        names |= {name for name in ours if _SHARD.fullmatch(name) or name.endswith(LOGS)}
    for entry in list(folder.list(f"{WORK}done/")):
        names |= set(Marker.model_validate_json(folder.read(entry.name)).files)
    folder.delete(MANIFEST)
    for name in sorted(names):
        folder.delete(name)
    folder.delete_all(WORK)


def combine(refs: Iterable[InputRef]) -> InputRef:
    """Several inputs in one role (`--queries A B`), order kept."""
    refs = list(refs)
    if len(refs) == 1:
        return refs[0]
    return InputRef(
        uri=" ".join(r.uri for r in refs),
        fingerprint=fingerprint([r.fingerprint for r in refs]),
        verified=all(r.verified for r in refs),
    )
