"""Training photos against test photos: by name and bytes before anything is trained, by their vectors when there are some.

A name that is shared ends the study's trainings; photos that look alike are reported for a reader to judge, because two
photos of one landmark by two people are alike, too, and so are two towers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from iir_dist import artifact, overlap
from iir_dist.artifact import Manifest
from iir_dist.config import StageConfig
from iir_dist.data.collection import check_same_space
from iir_dist.data.embeddings import open_embeddings

FILE = "overlap.json"
SHOWN = 100
"""Pairs that are kept, the most similar first."""


class OverlapConfig(StageConfig):
    """By name and bytes."""

    allow: bool = False
    """Go on, and say what is shared."""
    execution: ClassVar[frozenset[str]] = frozenset()


class NearConfig(StageConfig):
    """By vectors."""

    similarity: float = Field(0.95, gt=0, le=1)
    """Least cosine of a pair that is reported."""
    execution: ClassVar[frozenset[str]] = frozenset()


def check(images: Sequence[str], tests: Sequence[str], out: str, config: OverlapConfig) -> Manifest:
    """Landmarks by name, photos by name, photos by their bytes (`iir_dist.overlap`).

    Raises:
        InputError: they share something, and that is not allowed.
    """
    refs = {
        role: artifact.combine(artifact.reference(*artifact.require(uri, "ingest")) for uri in uris)
        for role, uris in (("images", images), ("tests", tests))
    }
    with artifact.begin(out, "overlap", config, refs) as work:
        if work.finished is None:
            found = overlap.check(images, tests, allow=config.allow)
            return _publish(work, found, {"shared": sum(found[w]["images"] for w in ("landmarks", "names", "files"))})
        return work.finished


def search(train: str, test: str, out: str, config: NearConfig) -> Manifest:
    """Pairs of a training photo and its nearest test photo, where they are at least `config.similarity` alike.

    Raises:
        MismatchError: the vectors are of two networks.
    """
    ours, theirs = open_embeddings(train), open_embeddings(test)
    check_same_space((ours, theirs))
    with artifact.begin(out, "near", config, {"train": ours.ref, "test": theirs.ref}) as work:
        if work.finished:
            return work.finished
        known = [block for block in theirs.blocks() if block.vectors is not None]
        names = [str(name) for block in known for name in block.names]
        xb = np.concatenate([block.vectors for block in known if block.vectors is not None])
        pairs: list[tuple[float, str, str]] = []
        count = 0
        for block in ours.blocks():
            assert block.vectors is not None
            for start in range(0, len(block.vectors), 1024):
                scores = block.vectors[start : start + 1024] @ xb.T
                best = scores.argmax(axis=1)
                for row in np.flatnonzero(scores.max(axis=1) >= config.similarity).tolist():
                    pairs.append((float(scores[row, best[row]]), str(block.names[start + row]), names[best[row]]))
            count += len(block.vectors)
        pairs.sort(reverse=True)
        return _publish(work, {"pairs": pairs[:SHOWN], "looked_at": count}, {"near": len(pairs), "photos": count})


def _publish(work: artifact.Work, found: Any, counts: dict[str, int]) -> Manifest:
    with work.folder.publish(FILE) as file:
        file.path.write_text(json.dumps(found, indent=1))
    return work.publish(counts, {FILE: artifact.entry_of(file)})
