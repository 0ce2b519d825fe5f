"""A set of the catalog as a SOURCE: its files fetched, its ground truth, split and classes set."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from iir_dist.data import catalog
from iir_dist.data.catalog import Dataset
from iir_dist.data.downloads import downloads_folder
from iir_dist.errors import InputError, NotFoundError
from iir_dist.ingest.plan import IngestConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """What to ingest, and how."""

    sources: tuple[str | tuple[str, ...], ...]
    config: IngestConfig
    groundtruth: str | None
    labels: str | None
    dataset: Dataset | None = None


def expand(
    sources: Sequence[str], config: IngestConfig, groundtruth: str | None = None, labels: str | None = None
) -> Request:
    """Where the one source is the name of a known set, its files in place of the name; else as given.

    What the caller sets comes before what the catalog says.

    Raises:
        InputError: a known set among other sources, or one that cannot be downloaded.
    """
    names = [s for s in sources if s.lower() in catalog.DATASETS and not os.path.exists(s)]
    if not names:
        return Request(tuple(sources), config, groundtruth, labels)
    if len(sources) > 1:
        raise InputError(f"{names[0]!r} is a known set and comes with its own split and ground truth; ingest it alone")
    dataset = catalog.get(names[0])
    for note in dataset.notes:
        log.info("%s: %s", dataset.name, note)
    folder = downloads_folder()
    try:
        resolved = catalog.resolve(dataset, folder)
    except NotFoundError as error:
        raise InputError(f"{error}\n{catalog.instructions(dataset, folder)}") from None
    settings = {
        "split": dataset.split, "any_ending": dataset.any_ending, "folder_labels": dataset.folder_labels,
        "only_labelled": dataset.classes,
    }  # fmt: skip
    settings = {key: value for key, value in settings.items() if key not in config.model_fields_set}
    truth = str(resolved.groundtruth) if resolved.groundtruth else None
    classes = str(resolved.lists[0]) if dataset.classes else None
    return Request(
        (tuple(map(str, resolved.archives)),), config.model_copy(update=settings), groundtruth or truth, labels or classes,
        dataset,
    )  # fmt: skip


def check_count(dataset: Dataset, images: int) -> None:
    """Refuse a set of which a part is missing. Publishers miscount by a few; an archive is more than a hundredth.

    Raises:
        InputError: fewer images than were published.
    """
    expected = dataset.listed or dataset.images
    if expected is None:
        return
    if images < 0.99 * expected:
        raise InputError(
            f"{dataset.name}: its files hold {images} images, {expected} were published; an archive is not whole: "
            f"delete it from {downloads_folder() / dataset.place} and run the same command again"
        )
    if images != expected:
        log.warning("%s: its files hold %d images, %d were published", dataset.name, images, expected)
