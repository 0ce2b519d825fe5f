"""PCA whitening, learnt on a training set and stored in the encoder as its last, linear step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.config import StageConfig
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.errors import InputError, MismatchError
from iir_dist.vectors import F32, normalize

F64 = npt.NDArray[np.float64]


class WhitenConfig(StageConfig):
    """`[whiten]`."""

    dim: int = Field(256, ge=1)
    """Dimensions kept, the ones of largest variance."""
    power: float = Field(0.25, ge=0, le=0.5)
    """Each direction is divided by variance^power: 0.5 whitens fully, 0.25 half-way (less noise from few images)."""
    execution: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Whitening:
    """y = normalize((x - mean) @ matrix.T): mean (D,), matrix (dim, D), both float64."""

    mean: F64
    matrix: F64

    def apply(self, x: F32) -> F32:
        """(n, D) to (n, dim), unit norm."""
        return normalize((x - self.mean) @ self.matrix.T)


def pca(mean: F64, covariance: F64, dim: int, power: float) -> Whitening:
    """PCA whitening from moments.

    Rows of the matrix are eigenvectors of the covariance by descending variance, each divided by variance^power
    (Jegou and Chum, ECCV 2012; power 0.5 there, 0.25 in Revaud et al., arXiv:1906.07589). The sign of each is fixed,
    largest component positive, so that two machines learn the same encoder.
    """
    variance, vectors = np.linalg.eigh(covariance)
    order = np.argsort(variance)[::-1][:dim]
    rows = vectors[:, order].T
    signs = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)])
    scale = np.maximum(variance[order], variance.max() * 1e-9) ** -power
    return Whitening(mean, rows * (signs * scale)[:, None])


def moments(source: Embeddings) -> tuple[int, F64, F64]:
    """Count, mean (D,) and covariance (D, D) of all database and training rows, one shard in memory at a time."""
    count = 0
    total: F64 = np.zeros(source.dim)
    products: F64 = np.zeros((source.dim, source.dim))
    for block in source.blocks():
        assert block.vectors is not None
        x = block.vectors if block.splits is None else block.vectors[block.splits != "query"]
        x = x.astype(np.float64)
        count += len(x)
        total += x.sum(axis=0)
        products += x.T @ x
    mean = total / max(count, 1)
    return count, mean, products / max(count, 1) - np.outer(mean, mean)


def run(embeddings: str, encoder_uri: str, out: str, config: WhitenConfig, *, force: bool = False) -> Manifest:
    """Learn whitening on `embeddings` and write the encoder with it.

    Raises:
        MismatchError: the vectors are not the encoder's.
        InputError: there are too few of them.
    """
    import torch

    from iir_dist.models import encoder as models

    source = open_embeddings(embeddings)
    folder, manifest = artifact.require(encoder_uri, *artifact.ENCODERS)
    if source.encoder != manifest.fingerprint:
        raise MismatchError(
            f"{embeddings} was made by encoder {str(source.encoder)[:12]}, {encoder_uri} is {manifest.fingerprint[:12]}; "
            "embed the training set with this encoder"
        )
    refs = {"embeddings": source.ref, "encoder": artifact.reference(folder, manifest)}
    with artifact.begin(out, "whiten", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        base = models.load(folder, manifest)
        if base.spec.whitening is not None:
            raise MismatchError(f"{encoder_uri} is whitened already; give the encoder that it was learnt for")
        count, mean, covariance = moments(source)
        if config.dim > min(source.dim, count - 1):
            raise InputError(
                f"whiten.dim = {config.dim} needs more than {config.dim} vectors of at least that dimension; "
                f"{embeddings} has {count} of dimension {source.dim}: --set dim={max(1, min(source.dim, count - 1))} or less"
            )
        learnt = pca(mean, covariance, config.dim, config.power)
        whitening = models.WhiteningSpec(
            dim=config.dim, power=config.power, learnt_on=source.ref.fingerprint, base=manifest.fingerprint
        )
        spec = base.spec.model_copy(update={"whitening": whitening, "dim": config.dim})
        whitened = models.Encoder(spec, base.trunk)
        whitened.pool, whitened.projection = base.pool, base.projection
        whitened.whiten_mean.copy_(torch.from_numpy(learnt.mean))
        whitened.whiten_matrix.copy_(torch.from_numpy(learnt.matrix))
        counts: dict[str, Any] = {"vectors": count}
        return work.publish(counts, models.save(whitened, work.folder), models.info_of(whitened))
