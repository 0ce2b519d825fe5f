"""Whitening, by PCA or learnt from matching pairs (Lw), stored in the encoder as its last, linear step; or PCA of the
regions of R-MAC, stored in the pooling.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from iir_dist import artifact
from iir_dist.artifact import InputRef, Manifest
from iir_dist.config import StageConfig
from iir_dist.data.collection import database_rows
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.errors import ConfigError, InputError, MismatchError
from iir_dist.storage import Folder
from iir_dist.vectors import F32, I64, normalize

if TYPE_CHECKING:
    from iir_dist.models.encoder import EncoderSpec

F64 = npt.NDArray[np.float64]

JITTER = 1e-10
"""First addition to the diagonal of a covariance that is not positive definite, relative to its mean variance."""


class WhitenConfig(StageConfig):
    """`[whiten]`."""

    method: Literal["pca", "lw", "regions"] = "pca"
    """lw learns from matching pairs, so it needs labels (--images); regions is PCA of R-MAC's regions, and takes images."""
    dim: int = Field(256, ge=1)
    """Dimensions kept: those of largest variance, or (lw) of most variance against that of matching pairs."""
    power: float = Field(0.25, ge=0, le=0.5)
    """Of pca and regions. Each direction is divided by variance^power: 0.5 whitens fully, 0.25 half-way (less noise from few
    images)."""
    shrinkage: float = Field(0.7, ge=0, le=1)
    """Of lw. How far the covariance of matching pairs is drawn to a multiple of the identity; 0 trusts the pairs alone."""
    sample: int = Field(2000, ge=1)
    """Of regions. Images that are drawn to learn on, at most; each gives some 15 to 30 regions a scale."""
    seed: int = 0
    """Of regions. Of the draw."""
    allow_benchmark: bool = False
    """Learn on a set that has queries; whoever evaluates on it must allow that too."""
    execution: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        used = {"pca": {"power"}, "lw": {"shrinkage"}, "regions": {"power", "sample", "seed"}}[self.method]
        for key in ("power", "shrinkage", "sample", "seed"):
            if key not in used and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} does nothing with method = {self.method!r}; leave it out")
        return self


@dataclass(frozen=True, slots=True)
class Whitening:
    """y = normalize((x - mean) @ matrix.T): mean (D,), matrix (dim, D), both float64."""

    mean: F64
    matrix: F64

    def apply(self, x: F32) -> F32:
        """(n, D) to (n, dim), unit norm."""
        return normalize((x - self.mean) @ self.matrix.T)


# ------------------------------------------------------------------------------------------------ moments to a matrix


def pca(mean: F64, covariance: F64, dim: int, power: float) -> Whitening:
    """PCA whitening from moments.

    Rows of the matrix are eigenvectors of the covariance by descending variance, each divided by variance^power
    (Jegou and Chum, ECCV 2012; power 0.5 there, 0.25 in Revaud et al., arXiv:1906.07589). The sign of each is fixed,
    largest component positive, so that two machines learn the same encoder.
    """
    variance, vectors = np.linalg.eigh(covariance)
    order = np.argsort(variance)[::-1][:dim]
    scale = np.maximum(variance[order], variance.max() * 1e-9) ** -power
    return Whitening(mean, _signed(vectors[:, order].T) * scale[:, None])


def lw(mean: F64, covariance: F64, differences: F64, dim: int, shrinkage: float) -> Whitening:
    """Learnt whitening: the differences of matching pairs are whitened, then directions sorted by what is left to tell.

    With S the covariance of the differences, P1 = inverse of its Cholesky factor and V the eigenvectors of
    P1 covariance P1^T by descending variance, the matrix is V^T P1 (Mikolajczyk and Matas, ICCV 2007; Radenovic et al.,
    arXiv:1711.02512, and the code of that paper). Not theirs is the shrinkage, S <- (1 - a) S + a (tr S / D) I (after
    Ledoit and Wolf, 2004): 1,629 images in 19 classes leave S no rank in the 1,280 dimensions of a trunk, and its
    inverse would amplify exactly those directions in which no pair happened to differ. With a = 1 it is PCA, power 0.

    Args:
        mean: (D,), of the vectors.
        covariance: (D, D), of the vectors.
        differences: (D, D), of the differences of matching pairs.
        dim: rows kept.
        shrinkage: a, in [0, 1].
    """
    size = len(differences)
    shrunk = (1 - shrinkage) * differences + shrinkage * np.trace(differences) / size * np.eye(size)
    first = np.linalg.inv(cholesky(shrunk))
    variance, vectors = np.linalg.eigh(first @ covariance @ first.T)
    order = np.argsort(variance)[::-1][:dim]
    return Whitening(mean, _signed(vectors[:, order].T @ first))


def cholesky(s: F64) -> F64:
    """The lower factor L (D, D) of s + alpha I = L L^T with the smallest alpha of 0, 1e-10, 1e-9, … that allows one.

    alpha is in units of the mean variance. A factor with a pivot that rounding alone decides is not accepted, because
    then it would depend on the machine whether there is one.

    Raises:
        InputError: all variances are zero.
    """
    size = len(s)
    scale = np.trace(s) / size
    if not scale > 0:
        raise InputError("matching pairs do not differ at all; expected different images of each thing")
    identity: F64 = np.eye(size)
    for alpha in (0.0, *(JITTER * 10.0**k for k in range(11))):
        try:
            factor: F64 = np.linalg.cholesky(s + alpha * scale * identity)
        except np.linalg.LinAlgError:
            continue
        if np.diagonal(factor).min() ** 2 > size * np.finfo(np.float64).eps * scale:
            return factor
    raise InputError("this is no covariance, it has negative variances; run iir verify on the embeddings")


def _signed(rows: F64) -> F64:
    """Each row with the sign that makes its largest component positive."""
    signs: F64 = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)])
    return rows * signs[:, None]


# ------------------------------------------------------------------------------------------------ vectors to moments


def moments(source: Embeddings) -> tuple[int, F64, F64]:
    """Count, mean (D,) and covariance (D, D) of all database and training rows, one shard in memory at a time."""
    count = 0
    total: F64 = np.zeros(source.dim)
    products: F64 = np.zeros((source.dim, source.dim))
    for block in source.blocks():
        rows = database_rows(block)
        assert rows.vectors is not None
        x = rows.vectors.astype(np.float64)
        count += len(x)
        total += x.sum(axis=0)
        products += x.T @ x
    mean = total / max(count, 1)
    return count, mean, products / max(count, 1) - np.outer(mean, mean)


def pair_moments(source: Embeddings, classes: I64) -> tuple[F64, dict[str, int]]:
    """Covariance (D, D) of the differences of all matching pairs, without enumerating them, and what was counted.

    Over the ordered pairs (p, q) of a class of n members with mean m, the sum of (q - p)(q - p)^T is
    2 n sum (x - m)(x - m)^T. Every class counts the same, whatever its size: a pair weighs 1 / (n (n - 1)), so the result
    is twice the mean of the (unbiased) covariances within classes. Were all pairs equal, a class of 1,000 photos would
    count 10,000 times one of 10, and the covariance of a large collection would be that of its few most photographed
    things. At a high shrinkage this retrieves unseen classes a little better than equal images (weight 1 / n) do.

    Images without label and those alone in their class have no pair; they are counted (`unlabelled`, `alone`), and count
    in `moments`. One shard in memory at a time, and a float64 sum of D components for each class.

    Args:
        classes: (number of ids,) class of each image by its id, -1 without label.
    """
    num_classes = int(classes.max(initial=-1)) + 1
    sizes = np.zeros(num_classes, np.int64)
    unlabelled = 0
    for block in source.blocks(vectors=False):
        codes = classes[database_rows(block).ids]
        unlabelled += int((codes < 0).sum())
        sizes += np.bincount(codes[codes >= 0], minlength=num_classes)
    paired = sizes > 1
    if not paired.any():
        raise InputError(
            f"{source.folder.uri} has no two images of one label ({unlabelled} without label); whiten.method = 'lw' learns "
            "from matching pairs: ingest with labels, or --set method=pca"
        )
    weights: F64 = np.where(paired, 2 / (np.maximum(sizes - 1, 1) * paired.sum()), 0.0)
    sums: F64 = np.zeros((num_classes, source.dim))
    products: F64 = np.zeros((source.dim, source.dim))
    for block in source.blocks():
        rows = database_rows(block)
        codes = classes[rows.ids]
        used = (codes >= 0) & paired[codes]
        assert rows.vectors is not None
        x = rows.vectors[used].astype(np.float64)
        products += x.T @ (weights[codes[used], None] * x)
        np.add.at(sums, codes[used], x)
    sums, n = sums[paired], sizes[paired]
    differences = products - sums.T @ ((weights[paired] / n)[:, None] * sums)
    counts = {
        "classes": len(n), "pairs": int((n * (n - 1)).sum()) // 2, "alone": int((sizes == 1).sum()),
        "unlabelled": unlabelled,
    }  # fmt: skip
    return differences, counts


def read_classes(images: Folder, manifest: Manifest) -> I64:
    """Class of each image by its id, numbered in order of first appearance; -1 without label."""
    numbers: dict[str, int] = {}
    ids, codes = [], []
    for shard in manifest.shards():
        with artifact.verified(images, shard, manifest.files[shard]) as path:
            table = pq.read_table(path, columns=["id", "label"])
        ids.append(table.column("id").to_numpy())
        labels = table.column("label").to_pylist()
        codes += [numbers.setdefault(label, len(numbers)) if label else -1 for label in labels]
    rows = np.concatenate(ids)
    classes = np.full(int(rows.max(initial=-1)) + 1, -1, np.int64)
    classes[rows] = codes
    return classes


# ------------------------------------------------------------------------------------------------ the stage


def run(
    inputs: str,
    encoder_uri: str,
    out: str,
    config: WhitenConfig,
    *,
    images_uri: str | None = None,
    force: bool = False,
) -> Manifest:
    """Learn whitening on `inputs` and write the encoder with it.

    Args:
        inputs: embeddings; with method regions, an images artifact.
        images_uri: with method lw, the images artifact that the embeddings were made of; it has the labels.

    Raises:
        ConfigError: lw without images, or images without lw; regions for an encoder without R-MAC.
        MismatchError: the vectors are not the encoder's, the images not theirs, the set has queries, or the encoder is
            whitened already.
        InputError: there are too few of them.
    """
    if config.method == "regions":
        if images_uri is not None:
            raise ConfigError(f"--images {images_uri}: the regions' whitening uses no labels; give IMAGES alone")
        return _of_regions(inputs, encoder_uri, out, config, force)
    import torch

    from iir_dist.models import encoder as models

    source = open_embeddings(inputs)
    folder, manifest = artifact.require(encoder_uri, *artifact.ENCODERS)
    if source.encoder != manifest.fingerprint or source.manifest is None:
        raise MismatchError(
            f"{inputs} was made by encoder {str(source.encoder)[:12]}, {encoder_uri} is {manifest.fingerprint[:12]}; "
            "embed the training set with this encoder"
        )
    learnt_images = source.manifest.inputs.get("images")
    images = _images_of(source, learnt_images, config, images_uri)
    refs = {"embeddings": source.ref, "encoder": artifact.reference(folder, manifest)}
    if images is not None:
        refs["images"] = artifact.reference(*images)
    splits = _splits(source, config)
    with artifact.begin(out, "whiten", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        base = models.load(folder, manifest)
        if base.spec.whitening is not None:
            raise MismatchError(f"{encoder_uri} is whitened already; give the encoder that it was learnt for")
        count, mean, covariance = moments(source)
        counts: dict[str, int] = {"vectors": count}
        if images is None:
            learnt = pca(mean, covariance, config.dim, config.power)
        else:
            differences, pairs = pair_moments(source, read_classes(*images))
            counts |= pairs
            learnt = lw(mean, covariance, differences, config.dim, config.shrinkage)
        whitening = models.WhiteningSpec(
            method=config.method, dim=config.dim, power=config.power if config.method == "pca" else None,
            shrinkage=config.shrinkage if config.method == "lw" else None, learnt_on=source.ref.fingerprint,
            images=learnt_images.fingerprint if learnt_images else None, splits=splits, base=manifest.fingerprint,
        )  # fmt: skip
        spec = base.spec.model_copy(update={"whitening": whitening, "dim": config.dim})
        whitened = models.Encoder(spec, base.trunk)
        whitened.pool, whitened.projection = base.pool, base.projection
        whitened.whiten_mean.copy_(torch.from_numpy(learnt.mean))
        whitened.whiten_matrix.copy_(torch.from_numpy(learnt.matrix))
        return work.publish(counts, models.save(whitened, work.folder), models.info_of(whitened))


def _of_regions(images_uri: str, encoder_uri: str, out: str, config: WhitenConfig, force: bool) -> Manifest:
    """The encoder with its R-MAC whitening each region, learnt on a sample of images."""
    import torch

    from iir_dist import whiten_regions
    from iir_dist.models import encoder as models
    from iir_dist.models.pooling import RMAC

    try:
        images, images_manifest = artifact.require(images_uri, "ingest")
    except InputError as error:
        raise InputError(f"{error}; whiten.method = 'regions' learns on images/, the others on embeddings/") from error
    folder, manifest = artifact.require(encoder_uri, *artifact.ENCODERS)
    _check_regions(encoder_uri, models.read_spec(folder), config)
    drawn, splits, queries = whiten_regions.draw(images, images_manifest, config.sample, config.seed)
    _refuse_benchmark(images.uri, queries, config)
    refs = {"images": artifact.reference(images, images_manifest), "encoder": artifact.reference(folder, manifest)}
    with artifact.begin(out, "whiten", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        base = models.load(folder, manifest)
        found = whiten_regions.moments(base, images, images_manifest, drawn)
        if config.dim >= found.count:
            raise InputError(
                f"whiten.dim = {config.dim} needs more than {config.dim} regions; {found.images} images of {images.uri} gave "
                f"{found.count}: --force --set dim={max(1, found.count - 1)} or less, or more images"
            )
        learnt = pca(found.mean, found.covariance, config.dim, config.power)
        whitening = models.WhiteningSpec(
            method="regions", dim=config.dim, power=config.power, learnt_on=images_manifest.fingerprint,
            images=images_manifest.fingerprint, splits=splits, base=manifest.fingerprint,
        )  # fmt: skip
        spec = base.spec.model_copy(update={"region_whitening": whitening, "dim": config.dim})
        whitened = models.Encoder(spec, base.trunk)
        pool = cast(RMAC, whitened.pool)
        pool.region_mean.copy_(torch.from_numpy(learnt.mean))
        pool.region_matrix.copy_(torch.from_numpy(learnt.matrix))
        counts = {"images": found.images, "rejected": found.rejected, "regions": found.count}
        return work.publish(counts, models.save(whitened, work.folder), models.info_of(whitened))


def _check_regions(encoder_uri: str, spec: EncoderSpec, config: WhitenConfig) -> None:
    """Raise unless the encoder's R-MAC can be whitened."""
    if spec.pooling != "rmac":
        raise ConfigError(
            f"whiten.method = 'regions' whitens the regions of R-MAC, and {encoder_uri} pools by {spec.pooling!r}; expected an "
            "encoder with pooling='rmac' (iir encoder --set pooling=rmac)"
        )
    for what, there in {
        "whitened regions": spec.region_whitening, "a whitening": spec.whitening, "a projection": spec.projection
    }.items():  # fmt: skip
        if there is not None:
            raise MismatchError(
                f"{encoder_uri} has {what} already, learnt for the vectors that it gives now; whiten the regions of the encoder "
                "that it was made from, then learn the rest again"
            )
    if config.dim > spec.dim:
        raise InputError(
            f"whiten.dim = {config.dim}: the regions of {encoder_uri} have {spec.dim} dimensions; --set dim={spec.dim} or less"
        )


def _images_of(
    source: Embeddings, made_of: InputRef | None, config: WhitenConfig, images_uri: str | None
) -> tuple[Folder, Manifest] | None:
    """The images artifact to take labels from; None for pca."""
    if config.method == "pca":
        if images_uri is not None:
            raise ConfigError(f"--images {images_uri}: PCA uses no labels; drop it, or --set method=lw")
        return None
    if images_uri is None:
        where = made_of.uri if made_of else "IMAGES"
        raise ConfigError(f"whiten.method = 'lw' learns from labels; give the images of the vectors: --images {where}")
    images, manifest = artifact.require(images_uri, "ingest")
    if made_of is None or made_of.fingerprint != manifest.fingerprint:
        raise MismatchError(
            f"{source.folder.uri} was made of images {made_of.fingerprint[:12] if made_of else 'unknown'}, {images_uri} is "
            f"{manifest.fingerprint[:12]}; give the images that were embedded"
        )
    return images, manifest


def _splits(source: Embeddings, config: WhitenConfig) -> dict[str, int]:
    """Rows of each split that are learnt on.

    Raises:
        MismatchError: there are queries, so this is a benchmark.
        InputError: there are too few rows.
    """
    splits: Counter[str] = Counter()
    for block in source.blocks(vectors=False):
        assert block.splits is not None  # the columns of our own embeddings
        splits.update(map(str, block.splits.tolist()))
    _refuse_benchmark(source.folder.uri, splits.pop("query", 0), config)
    count = splits.total()
    if config.dim > min(source.dim, count - 1):
        raise InputError(
            f"whiten.dim = {config.dim} needs more than {config.dim} vectors of at least that dimension; "
            f"{source.folder.uri} has {count} of dimension {source.dim}: --set dim={max(1, min(source.dim, count - 1))} or less"
        )
    return dict(sorted(splits.items()))


def _refuse_benchmark(uri: str, queries: int, config: WhitenConfig) -> None:
    """Raise where there are queries, unless that is allowed."""
    if queries and not config.allow_benchmark:
        raise MismatchError(
            f"{uri} has {queries} queries, so it is a set to evaluate on, and whitening learnt on it would flatter the result; "
            "give a training set, or --set allow_benchmark=true"
        )
