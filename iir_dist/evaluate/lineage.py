"""What rankings were made from: the whitening and its training set, the crop of the queries, the distractors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from iir_dist import artifact
from iir_dist.artifact import InputRef, Manifest, read_manifest
from iir_dist.data import groundtruth_tables
from iir_dist.errors import CorruptError, StorageError
from iir_dist.storage import open_folder

EVALUATED_SET = "the evaluated set"
EVALUATED_DISTRACTORS = "distractors of the evaluated database"
NOT_KNOWN = "not known whether these are evaluated"


def whitening_set(manifest: Manifest | None, truth_images: str | None) -> str:
    """What the whitening of the rankings was learnt on, that of R-MAC's regions included, for the protocol.

    The spec of the encoder names the embeddings and the images that it was learnt on by their fingerprints; these are
    looked for among all that the rankings were made from. Images that are only distractors may be among them, because
    no query asks for one; that is said.

    Args:
        manifest: of the rankings, None where they are somebody else's.
        truth_images: fingerprint of the images artifact that holds the ground truth, where it comes from one.
    """
    encoder = manifest.info.get("encoder") if manifest else None
    if manifest is None or encoder is None:
        return "unknown"
    learnt = [w for w in (encoder.get("region_whitening"), encoder["whitening"]) if w is not None]
    if not learnt:
        return "none, the vectors are not whitened"
    evaluated, missing = ancestors(manifest)
    here = [w for w in learnt if {w["learnt_on"], w.get("images")} & (evaluated | {truth_images} - {None})]
    if here:
        only_distractors = all(set(w.get("splits") or {}) == {"distractor"} for w in here)
        return EVALUATED_DISTRACTORS if only_distractors else EVALUATED_SET
    name = " and ".join(map(_learnt_on, learnt))
    if missing:
        return f"{name}; {NOT_KNOWN}, because {', '.join(missing)} cannot be read"
    return f"{name}; none of them is evaluated"


def _learnt_on(whitening: Mapping[str, Any]) -> str:
    splits = whitening.get("splits") or {}
    rows = ", ".join(f"{count} of split {split}" for split, count in splits.items()) or "an unknown number"
    regions = "regions of " if whitening.get("method") == "regions" else ""
    return f"{regions}{rows}, images {str(whitening.get('images'))[:12]}"


def ancestors(manifest: Manifest) -> tuple[set[str], list[str]]:
    """Fingerprints of the indexes, embeddings and images that rankings were made from, and the inputs that are gone.

    Encoders are not followed: what an encoder was trained on is not searched in.
    """
    found: set[str] = set()
    missing: list[str] = []
    todo = [manifest]
    while todo:
        inputs = todo.pop().inputs
        for role in ("database", "queries", "embeddings", "images"):
            if role not in inputs:
                continue
            found.add(inputs[role].fingerprint)
            if role != "images":
                parents = _manifests_of(inputs[role])
                todo += parents
                if not parents:
                    missing.append(inputs[role].uri)
    return found, missing


def _manifests_of(ref: InputRef) -> list[Manifest]:
    """The manifests of the folders that an input stands for; none if one is gone or has other content now."""
    for uris in ([ref.uri], ref.uri.split(" ")):
        try:
            manifests = [m for m in (read_manifest(open_folder(uri)) for uri in uris) if m is not None]
        except (StorageError, CorruptError):
            continue
        refs = [InputRef(uri=uri, fingerprint=m.fingerprint) for uri, m in zip(uris, manifests, strict=False)]
        if len(refs) == len(uris) and artifact.combine(refs).fingerprint == ref.fingerprint:
            return manifests
    return []


def images_at(truth_uri: str) -> str | None:
    """Fingerprint of the images artifact that a ground truth was read from, None where it comes from elsewhere."""
    if truth_uri.endswith((".json", ".pkl", ".pickle", *groundtruth_tables.ENDINGS)):
        return None
    manifest = read_manifest(open_folder(truth_uri))
    return manifest.fingerprint if manifest else None


# ------------------------------------------------------------------------------------------------ queries and database


@dataclass(frozen=True, slots=True)
class Origin:
    """One embeddings folder and the images that it was made of; None where it was made of none."""

    embeddings: Manifest
    images: Manifest | None

    @property
    def database_rows(self) -> int:
        """Rows that are searched."""
        queries = self.images.counts.get("queries", 0) if self.images else 0
        return self.embeddings.counts["out"] - queries

    @property
    def distractors(self) -> int:
        """Those of them that were put there to be in the way."""
        if self.embeddings.stage == "distractors":
            return self.database_rows
        return self.database_rows if self.images and self.images.info.get("split") == "distractor" else 0

    @property
    def synthetic(self) -> int:
        """Those of them that are no photo's."""
        return self.embeddings.counts.get("synthetic", 0)


def origins(ref: InputRef) -> list[Origin] | None:
    """The embeddings behind an input of a search; None where one of them cannot be read any more."""
    found: list[Origin] = []
    manifests = _manifests_of(ref)
    if not manifests:
        return None
    for manifest in manifests:
        if manifest.stage == "index":
            behind = origins(manifest.inputs["embeddings"])
            if behind is None:
                return None
            found += behind
        elif manifest.stage == "distractors":
            found.append(Origin(manifest, None))
        else:
            images = next(_images_of(manifest), None)
            if images is None:
                return None
            found.append(Origin(manifest, images))
    return found


def _images_of(manifest: Manifest) -> Iterator[Manifest]:
    for role in ("images", "embeddings"):
        if role in manifest.inputs:
            for parent in _manifests_of(manifest.inputs[role]):
                if role == "images":
                    yield parent
                else:
                    yield from _images_of(parent)


@dataclass(frozen=True, slots=True)
class Database:
    """How many of the images that were searched are distractors, and how many of these are synthetic vectors."""

    distractors: int
    synthetic: int


def database(manifest: Manifest | None) -> Database | None:
    """Of rankings; None where that is not known: others' rankings, inputs that are gone, a search in a part of the rows."""
    if manifest is None or "only" in manifest.inputs or _searched(manifest).get("splits"):
        return None
    found = origins(manifest.inputs["database"])
    if found is None or sum(o.database_rows for o in found) != manifest.info.get("database_rows"):
        return None
    return Database(sum(o.distractors for o in found), sum(o.synthetic for o in found))


def _searched(manifest: Manifest) -> Mapping[str, Any]:
    """The config of the search, also where it was re-ranked."""
    searched: Mapping[str, Any] = manifest.info.get("search") or manifest.config
    return searched


def query_crop(manifest: Manifest | None, truth_fingerprint: str) -> bool | None:
    """Whether the queries were cut to the boxes of this ground truth; None where that is not known."""
    found = origins(manifest.inputs["queries"]) if manifest else None
    if found is None:
        return None
    truths = [o.images.inputs.get("groundtruth") if o.images else None for o in found]
    return any(t is not None and t.fingerprint == truth_fingerprint for t in truths)
