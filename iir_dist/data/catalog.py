"""The known benchmarks and training sets: where they are published, what they hold, what to know before using them.

What the publishers do not say is None here, and never guessed; a size that only others report is an approximate one,
and a checksum that only others report is not used, because a wrong one would keep everybody from the right file.
Nothing is redistributed: `resolve` downloads from the publishers, and `instructions` says where to place each file for
who has it from elsewhere.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from iir_dist.data import downloads
from iir_dist.data.downloads import Item, file_name
from iir_dist.data.groundtruth import Protocol
from iir_dist.data.sources import hidden, is_unsafe
from iir_dist.errors import CorruptError, GroundTruthError, InputError
from iir_dist.storage import sha256_of
from iir_dist.storage.local import local_errors

Split = Literal["db", "train", "distractor"]
Fetch = Callable[[Sequence[Item], Path], list[Path]]

MAX_TEXTS, MAX_TEXTS_BYTES = 10_000, 64 * 2**20
"""Bounds of a ground truth of text files, unpacked; the published ones have 220 files of some kilobytes."""
LISTED_FILES = 12
"""Instructions name so many archives one by one."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One published file. `size` in bytes; `checksum` as for `downloads.fetch`; None where not published.

    `checksum_url` is the address of a small text file that begins with the archive's MD5.
    """

    url: str
    size: int | None = None
    checksum: str | None = None
    checksum_url: str | None = None


@dataclass(frozen=True, slots=True)
class Truth:
    """A published ground truth: a pickle, or a tgz of text files, and the protocol that it is for."""

    url: str
    protocol: Protocol
    size: int | None = None
    checksum: str | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """One benchmark or training set.

    Args:
        name: as the command line takes it.
        title: in words.
        page: the publishers' page.
        split: what its rows become.
        place: the folder below the downloads folder; sets with the same photos share one.
        archives: the photos; empty where none are published.
        groundtruth: None for sets to train on or distract with.
        lists: published files that say which photos belong to the set, and their classes.
        images: image files in the archives, the corrupt ones included; None where not known.
        listed: how many of them `lists` names, where that is fewer.
        approximate_bytes: size of all archives where no exact one is published.
        corrupt: names of files that are known to be no photos; no annotation mentions them.
        licence: in a few words; `notes` have the rest.
        notes: sentences for who uses it.
        any_ending: the names of its photos have no ending.
        folder_labels: the folders in its archives are classes.
        classes: the first of `lists` has a class for each photo of the set, in a form that `iir ingest --labels` reads.
    """

    name: str
    title: str
    page: str
    split: Split
    place: str
    archives: tuple[Archive, ...]
    groundtruth: Truth | None
    lists: tuple[Archive, ...]
    images: int | None
    listed: int | None
    approximate_bytes: int | None
    corrupt: tuple[str, ...]
    licence: str
    notes: tuple[str, ...]
    any_ending: bool = False
    folder_labels: bool = True
    classes: bool = False


@dataclass(frozen=True, slots=True)
class Resolved:
    """Local paths of one set. `groundtruth` is a pickle or a folder of text files, as `groundtruth.read` takes it."""

    archives: list[Path]
    groundtruth: Path | None
    lists: list[Path]


# ------------------------------------------------------------------------------------------------ the sets

VGG = "https://www.robots.ox.ac.uk/~vgg/data"
CTU = "https://cmp.felk.cvut.cz"
DISTRACTORS = "http://ptak.felk.cvut.cz/revisitop/revisitop1m"  # no https is published for this host
GLD = "https://s3.amazonaws.com/google-landmark"

OXFORD_ARCHIVES = (Archive(f"{VGG}/oxbuildings/oxbuild_images-v1.tgz"),)
OXFORD_BYTES = 1_938_238_004  # a Content-Length that others have seen
PARIS_ARCHIVES = tuple(Archive(f"{VGG}/parisbuildings/paris_{part}-v1.tgz") for part in (1, 2))
PARIS_BYTES = 2_200_000_000

# https://www.robots.ox.ac.uk/~vgg/data/parisbuildings/corrupt.txt, as quoted in several public repositories.
PARIS_CORRUPT = (
    "paris_louvre_000136", "paris_louvre_000146", "paris_moulinrouge_000422", "paris_museedorsay_001059",
    "paris_notredame_000188", "paris_pantheon_000284", "paris_pantheon_000960", "paris_pantheon_000974",
    "paris_pompidou_000195", "paris_pompidou_000196", "paris_pompidou_000201", "paris_pompidou_000467",
    "paris_pompidou_000640", "paris_sacrecoeur_000299", "paris_sacrecoeur_000330", "paris_sacrecoeur_000353",
    "paris_triomphe_000662", "paris_triomphe_000833", "paris_triomphe_000863", "paris_triomphe_000867",
)  # fmt: skip

BLURRED = (
    "The photos are those that were released again with faces blurred; the ones without are no longer distributed. "
    "The publishers of the revisited annotation use them since June 2022 and report a negligible loss of accuracy: "
    "figures from before are comparable with yours, not equal to them."
)
OXFORD_FILES = (
    "The photos lie in the archive without a folder. Its page speaks of 5,062 images, the revisited annotation names "
    "5,063."
)
PARIS_FILES = (
    "The photos lie as paris/LANDMARK/paris_LANDMARK_NUMBER.jpg in two archives, 6,412 files, of which 20 are corrupt "
    "by the publishers' own list (corrupt.txt on their page; reported to hold a web page in place of a photo). No "
    "annotation mentions these: they are rejected at ingest, and 6,392 photos remain."
)
VGG_TERMS = "Flickr's terms of use; VGG's terms"

_OXFORD5K = Dataset(
    name="oxford5k", title="Oxford Buildings, original annotation", page=f"{VGG}/oxbuildings/", split="db",
    place="oxford5k", archives=OXFORD_ARCHIVES,
    groundtruth=Truth(f"{VGG}/oxbuildings/gt_files_170407.tgz", "original"),
    lists=(), images=5_063, listed=None, approximate_bytes=OXFORD_BYTES, corrupt=(), licence=VGG_TERMS,
    notes=(
        "55 queries, 5 for each of 11 landmarks. The annotation writes a query's image with the prefix oxc1_, which "
        "is removed when it is read.",
        OXFORD_FILES, BLURRED,
    ),
)  # fmt: skip

_PARIS6K = Dataset(
    name="paris6k", title="Paris Buildings, original annotation", page=f"{VGG}/parisbuildings/", split="db",
    place="paris6k", archives=PARIS_ARCHIVES,
    groundtruth=Truth(f"{VGG}/parisbuildings/paris_120310.tgz", "original"),
    lists=(), images=6_412, listed=None, approximate_bytes=PARIS_BYTES, corrupt=PARIS_CORRUPT, licence=VGG_TERMS,
    notes=("55 queries, 5 for each of 11 landmarks.", PARIS_FILES, BLURRED),
)  # fmt: skip

_ROXFORD5K = Dataset(
    name="roxford5k", title="Oxford Buildings, revisited annotation", page=f"{CTU}/revisitop/", split="db",
    place="oxford5k", archives=OXFORD_ARCHIVES,
    groundtruth=Truth(f"{CTU}/revisitop/data/datasets/roxford5k/gnd_roxford5k.pkl", "revisited"),
    lists=(), images=5_063, listed=None, approximate_bytes=OXFORD_BYTES, corrupt=(), licence=VGG_TERMS,
    notes=(
        "70 queries, which are not in the database of 4,993 photos; 68 of them have an Easy positive.",
        OXFORD_FILES, BLURRED,
    ),
)  # fmt: skip

_RPARIS6K = Dataset(
    name="rparis6k", title="Paris Buildings, revisited annotation", page=f"{CTU}/revisitop/", split="db",
    place="paris6k", archives=PARIS_ARCHIVES,
    groundtruth=Truth(f"{CTU}/revisitop/data/datasets/rparis6k/gnd_rparis6k.pkl", "revisited"),
    lists=(), images=6_412, listed=None, approximate_bytes=PARIS_BYTES, corrupt=PARIS_CORRUPT, licence=VGG_TERMS,
    notes=("70 queries, which are not in the database of 6,322 photos.", PARIS_FILES, BLURRED),
)  # fmt: skip

_REVISITOP1M = Dataset(
    name="revisitop1m", title="Distractors of the revisited benchmarks (R1M)", page=f"{CTU}/revisitop/",
    split="distractor", place="revisitop1m",
    archives=tuple(Archive(f"{DISTRACTORS}/jpg/revisitop1m.{number}.tar.gz") for number in range(1, 101)),
    groundtruth=None, lists=(Archive(f"{DISTRACTORS}/revisitop1m.txt"),),
    images=1_001_001, listed=None, approximate_bytes=400_000_000_000, corrupt=(), licence="not stated",
    notes=(
        "Photos from Flickr (YFCC100M), about 1024 x 768 px, in up to 4,096 folders named by three hexadecimal digits, "
        "which are no classes. All of them are negatives of every query of the revisited benchmarks.",
    ),
    folder_labels=False,
)  # fmt: skip

_SFM120K = Dataset(
    name="retrieval-sfm-120k", title="retrieval-SfM-120k, landmarks by 3D reconstruction",
    page=f"{CTU}/cnnimageretrieval/", split="train", place="retrieval-sfm-120k",
    archives=(Archive(f"{CTU}/cnnimageretrieval/data/train/ims/ims.tar.gz"),),
    groundtruth=None, lists=(Archive(f"{CTU}/cnnimageretrieval/data/train/dbs/retrieval-SfM-120k.pkl"),),
    images=None, listed=98_045, approximate_bytes=50_000_000_000, corrupt=(), licence="not stated",
    notes=(
        "The pickle has `train` (91,642 photos) and `val` (6,403), each with `cids` (names) and `cluster` (class of "
        "each). The photo of a cid lies at its last, second last and third last pair of characters, as ab/cd/ef/CID, "
        "and its name has no ending. The archive is reported to have more than 50 GB.",
        "It is reported to share no landmark with Oxford and Paris.",
    ),
    any_ending=True, folder_labels=False, classes=True,
)  # fmt: skip

_LANDMARKS_CLEAN = Dataset(
    name="landmarks-clean", title="Landmarks, cleaned (NC-clean, for Deep Image Retrieval)",
    page="http://download.europe.naverlabs.com/Computer-Vision-CodeandModels/", split="train", place="landmarks-clean",
    archives=(), groundtruth=None, lists=(), images=None, listed=None, approximate_bytes=None, corrupt=(),
    licence="photos are their owners'",
    notes=(
        "Published as lists of addresses alone (annotation_clean_train.txt, annotation_clean_val.txt: an address and a "
        "class a line), because the authors do not own the photos; many addresses are dead. How many can be had varies, "
        "and a figure from a part is not the figure of the set.",
        "It is reported to share no landmark with Oxford and Paris.",
    ),
)  # fmt: skip

_GLDV2_CLEAN = Dataset(
    name="gldv2-clean", title="Google Landmarks v2, cleaned training set",
    page="https://github.com/cvdfoundation/google-landmark", split="train", place="gldv2",
    archives=tuple(
        Archive(f"{GLD}/train/images_{number:03d}.tar", checksum_url=f"{GLD}/md5sum/train/md5.images_{number:03d}.txt")
        for number in range(500)
    ),
    groundtruth=None, lists=(Archive(f"{GLD}/metadata/train_clean.csv"),),
    images=4_132_914, listed=1_580_470, approximate_bytes=500_000_000_000, corrupt=(),
    licence="photos CC BY, annotation CC BY 4.0",
    notes=(
        "The archives are the whole training set; train_clean.csv names the 1,580,470 photos of 81,313 landmarks that "
        "are the clean one, as `landmark_id,images`. The photo of an id lies at a/b/c/ID.jpg, by the id's first three "
        "characters; these folders are no classes.",
        "It holds landmarks of 36 of the 70 queries of ROxford and of 38 of the 70 of RParis (arXiv 2404.01524): "
        "figures on these benchmarks after training with it are inflated, say so beside them.",
        "Licences are per photo, in train_attribution.csv beside the list.",
    ),
    folder_labels=False, classes=True,
)  # fmt: skip

DATASETS = {
    dataset.name: dataset
    for dataset in (
        _OXFORD5K, _PARIS6K, _ROXFORD5K, _RPARIS6K, _REVISITOP1M, _SFM120K, _LANDMARKS_CLEAN, _GLDV2_CLEAN,
    )
}  # fmt: skip


def get(name: str) -> Dataset:
    """The set of that name. Raises `InputError`, which lists the known ones."""
    try:
        return DATASETS[name.lower()]
    except KeyError:
        raise InputError(f"no data set is called {name!r}; known are {', '.join(DATASETS)}") from None


# ------------------------------------------------------------------------------------------------ for people


def table() -> list[dict[str, str]]:
    """One row a set, in words: name, images, size, split, protocol, checksum, licence."""
    return [_row(dataset) for dataset in DATASETS.values()]


def _row(dataset: Dataset) -> dict[str, str]:
    count = dataset.listed or dataset.images
    known = [bool(archive.checksum or archive.checksum_url) for archive in dataset.archives]
    return {
        "name": dataset.name,
        "images": "not known" if count is None else f"{count:,}",
        "size": _size(dataset),
        "split": dataset.split,
        "protocol": dataset.groundtruth.protocol if dataset.groundtruth else "-",
        "checksum": "-" if not known else "published" if all(known) else "not published",
        "licence": dataset.licence,
    }


def _size(dataset: Dataset) -> str:
    if not dataset.archives:
        return "no archive"
    sizes = [archive.size for archive in dataset.archives if archive.size is not None]
    if len(sizes) == len(dataset.archives):
        return f"{sum(sizes) / 1e9:,.1f} GB"
    return "not known" if dataset.approximate_bytes is None else f"about {dataset.approximate_bytes / 1e9:,.3g} GB"


def format_table() -> str:
    """`table()` with aligned columns, for a terminal."""
    rows = table()
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def instructions(dataset: Dataset, folder: Path) -> str:
    """Where each file of a set goes, for who downloads it by hand; `folder` as for `resolve`."""
    place = folder / dataset.place
    if not dataset.archives:
        return f"{dataset.title}: {_without_archives(dataset)}."
    lines = [f"{dataset.title} ({dataset.page}): place these files, then run the same command again."]
    if dataset.groundtruth:
        lines.append(_line(dataset.groundtruth.url, place))
    lines += [_line(file.url, place) for file in dataset.lists]
    urls = [archive.url for archive in dataset.archives]
    if len(urls) > LISTED_FILES:
        lines += [_line(urls[0], place), f"  … and so on, {len(urls)} files, to", _line(urls[-1], place)]
    else:
        lines += [_line(url, place) for url in urls]
    return "\n".join(lines)


def _line(url: str, place: Path) -> str:
    return f"  {url}\n    to {place / file_name(url)}"


def _without_archives(dataset: Dataset) -> str:
    return (
        f"{dataset.name} is not published as photos, only as lists of their addresses ({dataset.page}); get the photos, "
        f"lay them out as CLASS/FILE in a folder, and ingest that folder with --split {dataset.split}"
    )


# ------------------------------------------------------------------------------------------------ to local paths


def resolve(dataset: Dataset, folder: Path, fetch: Fetch = downloads.fetch_all) -> Resolved:
    """Download what is missing of a set, verify it, and unpack its ground truth where that is text files.

    Args:
        folder: usually `downloads.downloads_folder()`; files lie in `place` below it.

    Raises:
        InputError: no photos are published.
        GroundTruthError: the ground truth is damaged or not what it should be.
        CorruptError, NotFoundError, StorageError: as `downloads.fetch_all`.
    """
    if not dataset.archives:
        raise InputError(_without_archives(dataset))
    place = folder / dataset.place
    truth = dataset.groundtruth
    # The small files first: an address that is gone shows before hours of downloading.
    small = [Item(truth.url, truth.checksum, truth.size)] if truth else []
    small += [Item(file.url, file.checksum, file.size) for file in dataset.lists]
    checksums = _published_checksums(dataset, place, fetch)
    photos = [Item(a.url, a.checksum or checksums.get(a.url), a.size) for a in dataset.archives]
    paths = fetch(small + photos, place)
    lists, archives = paths[bool(truth) : len(small)], paths[len(small) :]
    return Resolved(archives, _ground_truth(paths[0]) if truth else None, lists)


def _published_checksums(dataset: Dataset, place: Path, fetch: Fetch) -> dict[str, str]:
    """Checksums that lie in files of their own, by the address of what they are of.

    None is fetched for an archive that is there already: it was checked when it came, or was placed by hand where
    there may be no network.
    """
    wanted = [
        (archive.url, archive.checksum_url)
        for archive in dataset.archives
        if archive.checksum_url
        and ((place / file_name(archive.checksum_url)).exists() or not (place / file_name(archive.url)).exists())
    ]
    paths = fetch([Item(address) for _, address in wanted], place) if wanted else []
    return {url: _read_checksum(path) for (url, _), path in zip(wanted, paths, strict=True)}


def _read_checksum(path: Path) -> str:
    with local_errors(str(path)):
        text = path.read_bytes()[:4096].decode(errors="replace")
    match = re.match(r"\s*([0-9a-fA-F]{32})\b", text)
    if match is None:
        raise CorruptError(
            f"{path} begins with {text[:40]!r}, expected an MD5; delete it and run the same command again"
        )
    return f"md5:{match[1].lower()}"


def _ground_truth(path: Path) -> Path:
    """What `groundtruth.read` takes: the file itself, or the folder that its texts are unpacked to."""
    return _unpack_texts(path) if path.name.lower().endswith((".tgz", ".tar.gz", ".tar")) else path


def _unpack_texts(archive: Path) -> Path:
    """Unpack the text files of a tar beside it, once; the folder's name holds the archive's hash."""
    with local_errors(str(archive)):
        stem = re.sub(r"\.(tgz|tar\.gz|tar)$", "", archive.name, flags=re.IGNORECASE)
        folder = archive.with_name(f"{stem}.{sha256_of(archive)[:12]}")
        if folder.is_dir():
            return folder
        scratch = Path(tempfile.mkdtemp(prefix=f".{stem}.", dir=archive.parent))
        try:
            for name, data in _texts(archive):
                (scratch / name).write_bytes(data)
            scratch.chmod(0o755)
            try:
                os.rename(scratch, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same files
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return folder


def _texts(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name without folder, and content, of every regular `*.txt` file in a tar.

    Raises:
        GroundTruthError: it is damaged, too large, climbs out of its folder, repeats a name, or holds no query.
    """
    again = "delete it and run the same command again, or replace it with the right file"
    seen: set[str] = set()
    total = 0
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                name = member.name.rpartition("/")[2]
                if is_unsafe(member.name):
                    raise GroundTruthError(f"{archive} holds {member.name!r}, which climbs out of its folder; {again}")
                if not member.isreg() or not name.endswith(".txt") or hidden(member.name):
                    continue
                total += member.size
                if name in seen:
                    raise GroundTruthError(
                        f"{archive} holds two files {name!r}, which one counts is not known; {again}"
                    )
                if len(seen) == MAX_TEXTS or total > MAX_TEXTS_BYTES:
                    raise GroundTruthError(
                        f"{archive} is no ground truth: it holds more than {MAX_TEXTS} text files or {MAX_TEXTS_BYTES} "
                        f"bytes; {again}"
                    )
                seen.add(name)
                content = opened.extractfile(member)
                yield name, content.read() if content else b""
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).partition(":\n")[0] or type(error).__name__  # else a line for each kind of compression
        raise GroundTruthError(f"{archive} is damaged ({reason}); {again}") from error
    if not any(name.endswith("_query.txt") for name in seen):
        raise GroundTruthError(f"{archive} holds no *_query.txt; {again}")
