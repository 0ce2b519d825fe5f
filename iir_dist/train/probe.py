"""The retrieval probe: a set of photos that is searched now and then while a network is pretrained without labels.

A classification probe would measure something else. The set is any images artifact with ground truth (its first level is
scored: `iir ingest --groundtruth`) or with labels (every photo is searched for among all). It should not be the benchmark
that is reported later, unless nothing is chosen by it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from iir_dist import artifact, metrics
from iir_dist.artifact import Manifest
from iir_dist.data import groundtruth
from iir_dist.data.images import U8, decode, prepare
from iir_dist.errors import ImageError, InputError
from iir_dist.losses.pairwise import UNLABELLED, batch_average_precision
from iir_dist.models.encoder import Encoder
from iir_dist.storage import Folder
from iir_dist.train import collectives
from iir_dist.train.collapse import Health
from iir_dist.train.views import to_device

CHUNK = 32
"""Photos in one forward pass."""


class _Truth(NamedTuple):
    """One query: the rows of its photo, its positives and what is ignored."""

    row: int
    positive: np.ndarray
    ignored: np.ndarray


class Probe:
    """Photos of one images artifact, decoded once; each worker keeps the pixels of its share in memory.

    Args:
        source: the artifact.
        size, resize: as the encoder prepares photos.
        neighbours: k of the kNN classifier.

    Raises:
        InputError: it has neither ground truth nor two classes with several photos.
    """

    def __init__(self, source: tuple[Folder, Manifest], encoder: Encoder, neighbours: int = 20) -> None:
        folder, manifest = source
        self.neighbours = neighbours
        names: list[str] = []
        labels: list[str | None] = []
        splits: list[str] = []
        self.pixels: list[tuple[int, U8]] = []
        world, rank = collectives.world_size(), collectives.rank()
        for shard in manifest.shards():
            with artifact.verified(folder, shard, manifest.files[shard]) as path, pq.ParquetFile(path) as parquet:
                for group in range(parquet.num_row_groups):
                    columns = ["name", "label", "split", "box", "bytes"]
                    for row in parquet.read_row_group(group, columns).to_pylist():
                        if len(names) % world == rank:
                            self.pixels.append((len(names), _pixels(row, encoder)))
                        names.append(row["name"])
                        labels.append(row["label"])
                        splits.append(row["split"])
        self.database = torch.tensor([split != "query" for split in splits])
        classes = {label: i for i, label in enumerate(sorted({x for x in labels if x is not None}))}
        self.labels = torch.tensor([UNLABELLED if x is None else classes[x] for x in labels])
        self.queries: list[_Truth] = []
        if groundtruth.FILE in manifest.files:
            self.queries = _queries(folder.address(groundtruth.FILE), names, splits)
        elif len(torch.unique(self.labels[self.labels != UNLABELLED])) < 2:
            raise InputError(
                f"the probe {folder.uri} has neither ground truth nor labels of two classes; expected photos ingested with "
                "--groundtruth, or from folders named by class"
            )

    @torch.no_grad()
    def measure(self, encoder: Encoder, device: torch.device) -> tuple[dict[str, float], Health]:
        """mAP (and `knn` accuracy where there are labels), and how evenly the vectors use their space."""
        training = encoder.training
        encoder.eval()
        order = sorted(range(len(self.pixels)), key=lambda i: self.pixels[i][1].shape)
        z, rows = [torch.zeros(0, encoder.spec.dim, device=device)], list[int]()
        start = 0
        while start < len(order):
            shape = self.pixels[order[start]][1].shape
            chunk = [self.pixels[i] for i in order[start : start + CHUNK] if self.pixels[i][1].shape == shape]
            start += len(chunk)
            x = torch.from_numpy(np.stack([image for _, image in chunk])).permute(0, 3, 1, 2)
            z.append(encoder.describe(to_device(x, device)))
            rows += [row for row, _ in chunk]
        encoder.train(training)
        gathered, _ = collectives.gather(torch.cat(z))
        numbers, _ = collectives.gather(torch.tensor(rows, dtype=torch.int64))
        vectors = gathered[numbers.to(device).argsort()].cpu()
        database = vectors[self.database]
        health = Health.of(database, None if self.queries else self.labels[self.database])
        return self._retrieval(vectors), health

    def _retrieval(self, z: Tensor) -> dict[str, float]:
        if not self.queries:
            labels = self.labels[self.database]
            return {
                "map": batch_average_precision(z[self.database], labels),
                "knn": knn_accuracy(z[self.database], labels, self.neighbours),
            }
        rows = self.database.nonzero().flatten().numpy()
        found = []
        for query in self.queries:
            ranked = rows[(z[self.database] @ z[query.row]).argsort(descending=True, stable=True).numpy()]
            ranks = metrics.positive_ranks(ranked, query.positive, query.ignored)
            found.append(metrics.average_precision(ranks, len(query.positive)))
        return {"map": float(np.mean(found))}


def _pixels(row: dict[str, object], encoder: Encoder) -> U8:
    data, box = row["bytes"], row["box"]
    assert isinstance(data, bytes)
    try:
        return prepare(decode(data), encoder.spec.size, encoder.spec.resize, box)  # type: ignore[arg-type]
    except ImageError as error:
        raise InputError(f"photo {row['name']!r} of the probe cannot be decoded: {error}") from None


def _queries(uri: str, names: list[str], splits: list[str]) -> list[_Truth]:
    """The queries of the first level that have a positive."""
    truth = groundtruth.read(uri)
    good, junk = next(iter(truth.levels().values()))
    database = {name: row for row, (name, split) in enumerate(zip(names, splits, strict=True)) if split != "query"}
    asked = {
        name: row for row, (name, split) in enumerate(zip(names, splits, strict=True)) if split == "query"
    } or database
    there = groundtruth.match(sorted(truth.images()), database)

    def rows(labels: tuple[str, ...], query: groundtruth.Query) -> np.ndarray:
        found = (there.get(name) for label in labels for name in query.labels[label])
        return np.unique(np.array([database[name] for name in found if name in database], np.int64))

    queries = []
    for query, own in zip(truth.queries, groundtruth.match_queries(truth.queries, asked), strict=True):
        positive, ignored = rows(good, query), rows(junk, query)
        positive = np.setdiff1d(positive, ignored)
        if own is not None and len(positive):
            queries.append(_Truth(asked[own], positive, ignored))
    if not queries:
        raise InputError(f"no query of {uri} is among the probe's photos, or none has a positive there")
    return queries


def knn_accuracy(z: Tensor, labels: Tensor, k: int, temperature: float = 0.07, rows: int = 1024) -> float:
    """Share of the photos whose k nearest others, each with weight exp(cos / t), vote for their class.

    The weighted vote of Wu et al. (arXiv:1805.01978, section 3.4), leave-one-out. z: (n, D) unit vectors; labels: (n,), -1
    takes no part.
    """
    known = labels != UNLABELLED
    z, labels = z[known], labels[known]
    k = min(k, len(z) - 1)
    right = 0
    for start in range(0, len(z), rows):
        scores = z[start : start + rows] @ z.T
        scores.diagonal(start).fill_(-torch.inf)
        value, nearest = scores.topk(k, dim=1)
        votes = torch.zeros(len(scores), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[nearest], (value / temperature).exp())
        right += int((votes.argmax(dim=1) == labels[start : start + rows]).sum())
    return right / len(z)
