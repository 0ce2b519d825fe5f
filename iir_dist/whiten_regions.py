"""The regions of R-MAC over a sample of images: their mean and covariance, of which `whiten` makes each region's whitening.

All is done in this process, without Ray: a few thousand images give enough regions, in minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.data.images import MAX_MEGAPIXELS, Resize, decode, prepare
from iir_dist.errors import ImageError, InputError
from iir_dist.models.encoder import Encoder
from iir_dist.models.pooling import RMAC
from iir_dist.progress import Progress
from iir_dist.session import cpu_count
from iir_dist.storage import Folder
from iir_dist.vectors import I64

F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]

BATCH_PIXELS = 410_000
"""In one forward pass."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of the regions' unit vectors: their number, mean (C,), covariance (C, C); of `images`, `rejected` not decoded."""

    count: int
    mean: F64
    covariance: F64
    images: int
    rejected: int


def draw(images: Folder, manifest: Manifest, sample: int, seed: int) -> tuple[dict[str, I64], dict[str, int], int]:
    """At most `sample` images at random, never queries.

    Returns:
        Rows by shard, ascending; number of the drawn images by split; number of queries in the whole set.
    """
    shards = manifest.shards()
    splits = []
    for shard in shards:
        with images.open(shard) as file:
            splits.append(pq.read_table(file, columns=["split"]).column("split").to_numpy(zero_copy_only=False))
    of = np.concatenate([np.full(len(s), number) for number, s in enumerate(splits)])
    row = np.concatenate([np.arange(len(s)) for s in splits])
    names = np.concatenate(splits)
    chosen = np.flatnonzero(names != "query")
    queries = len(names) - len(chosen)
    if len(chosen) > sample:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, sample, replace=False))
    rows = {shards[n]: row[chosen[of[chosen] == n]] for n in np.unique(of[chosen])}
    return rows, dict(sorted(Counter(map(str, names[chosen])).items())), queries


def photos(path: Path, rows: I64, size: int, resize: Resize) -> Iterator[U8 | None]:
    """The chosen rows (ascending) of one images shard, (height, width, 3) each; None for one that cannot be decoded."""
    wanted = set(rows.tolist())
    with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as parquet:
        start = 0
        for group in range(parquet.num_row_groups):  # one of them in memory at a time
            stop = start + parquet.metadata.row_group(group).num_rows
            here = sorted(wanted.intersection(range(start, stop)))
            if here:
                table = parquet.read_row_group(group, ["bytes"], use_threads=False)
                for data in table.take([n - start for n in here]).column("bytes"):
                    try:
                        yield prepare(decode(data.as_py(), MAX_MEGAPIXELS * 2), size, resize)
                    except ImageError:
                        yield None
            start = stop


def stacks(images: Iterable[U8], pixels: int = BATCH_PIXELS) -> Iterator[U8]:
    """(n, height, width, 3): images of one shape, up to a budget of pixels."""
    buckets: dict[tuple[int, ...], list[U8]] = {}
    for image in images:
        bucket = buckets.setdefault(image.shape, [])
        bucket.append(image)
        if (len(bucket) + 1) * image.shape[0] * image.shape[1] > pixels:
            yield np.stack(buckets.pop(image.shape))
    for bucket in buckets.values():
        yield np.stack(bucket)


def moments(encoder: Encoder, images: Folder, manifest: Manifest, rows: Mapping[str, I64]) -> Moments:
    """Mean and covariance, in float64, of all that the encoder's R-MAC sums for the chosen rows.

    A hook before the pooling sees it: the maxima of every region of every scale, and of the mirror image where the encoder
    takes that.

    Args:
        encoder: with R-MAC, not whitened.
        rows: of each shard.

    Raises:
        CorruptError: a shard is not what the manifest says.
        InputError: the network gives values that are not finite.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = encoder.to(device).to(memory_format=torch.channels_last)
    pool = cast(RMAC, encoder.pool)
    channels = encoder.spec.dim
    count = rejected = 0
    total = torch.zeros(channels, dtype=torch.float64, device=device)
    products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def look(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        nonlocal count
        x = pool.maxima(arguments[0]).flatten(0, 1).double()
        count += len(x)
        total.add_(x.sum(dim=0))
        products.addmm_(x.T, x)

    def decoded() -> Iterator[U8]:
        nonlocal rejected
        for shard, chosen in rows.items():
            with artifact.verified(images, shard, manifest.files[shard]) as path:
                for photo in photos(path, chosen, encoder.spec.size, encoder.spec.resize):
                    if photo is None:
                        rejected += 1
                    else:
                        yield photo

    size = sum(map(len, rows.values()))
    threads = torch.get_num_threads()
    torch.set_num_threads(cpu_count())
    hook = pool.register_forward_pre_hook(look)
    try:
        with Progress("whiten", size, "images") as progress, torch.inference_mode():
            for stack in stacks(decoded()):
                x = torch.from_numpy(stack).to(device).permute(0, 3, 1, 2)
                network(x.float().div(255))
                progress.advance(len(stack))
    finally:
        hook.remove()
        torch.set_num_threads(threads)
    if not torch.isfinite(products).all():
        raise InputError("the network gives values that are not finite (NaN or overflow); check its weights")
    mean = (total / max(count, 1)).cpu().numpy()
    covariance = products.cpu().numpy() / max(count, 1) - np.outer(mean, mean)
    encoder.cpu()
    return Moments(count, mean, covariance, size - rejected, rejected)
