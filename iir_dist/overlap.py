"""Whether what a network is trained on is what it is tested on: landmarks, names, bytes.

A figure on a benchmark whose landmarks were trained on is too good, and by how much nobody can tell: Google Landmarks v2
holds landmarks of half of the queries of ROxford and RParis, and without them methods even change their order
(arXiv:2404.01524). What counts as shared:

* a landmark, if the name of a training class is that of a query or of a positive, without the number at its end
  (`eiffel` and `eiffel_000012`). Names are compared without case, accents, separators and small words; a word of kind
  (tower, college) may be there in one and not in the other, and so may the word that all query images begin with (`paris`).
  Not so two words of kind: Trinity College is not Trinity Church. Classes that are numbers have no name.
* a photo, if its name tells something and is the same: `burj_khalifa_000012`, or a long identifier, not `IMG_0012`.
* a photo, if its bytes are the same (SHA-256). Ground truths that come without their images have none.

Other photos of a landmark under another name are not found by any of the three.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iir_dist import artifact
from iir_dist.artifact import Manifest, read_manifest
from iir_dist.data import groundtruth
from iir_dist.data.groundtruth import FILE, LEVELS, GroundTruth
from iir_dist.data.groundtruth_tables import ENDINGS
from iir_dist.data.images import EXTENSIONS
from iir_dist.errors import InputError
from iir_dist.storage import Folder, open_folder

log = logging.getLogger(__name__)

SMALL = frozenset(("the", "of", "de", "la", "le", "les", "du", "des", "di", "da", "and", "an", "at", "in"))
"""Words that a name has or has not."""
KINDS = frozenset((
    "tower", "church", "cathedral", "basilica", "chapel", "abbey", "temple", "mosque", "palace", "castle", "fort", "museum",
    "college", "university", "library", "bridge", "gate", "square", "building", "hall", "monument", "memorial", "statue",
))  # fmt: skip
"""Words that say what a landmark is, and are often left out."""
NOISE = frozenset((
    "jpg", "jpeg", "png", "image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic", "dsc", "dscn",
    "dscf", "dcim", "p", "train", "training", "test", "val", "db", "database", "query", "queries", "gallery", "index", "data",
    "dataset", "general", "class", "classes", "label", "landmark", "landmarks", "unlabelled", "distractor", "distractors",
))  # fmt: skip
"""Words that name no landmark."""
GOOGLE = re.compile(r"gldv2|google[-_ ]?landmark|train_clean\.csv", re.IGNORECASE)
"""Where photos or labels of Google Landmarks come from."""
GOOGLE_NOTE = (
    "the training images are from Google Landmarks, whose version 2 holds landmarks of 36 of the 70 queries of ROxford and "
    "of 38 of the 70 of RParis (arXiv:2404.01524): figures on these sets are inflated, say so beside them"
)
EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Shared:
    """What training and test have in common in one of the three ways.

    Args:
        count: training images concerned.
        pairs: the first (of the training set, of the test set); of landmarks all, by name.
    """

    count: int
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """What `compare` found; `notes` are what else a reader of figures has to know, `tests` what was compared with."""

    landmarks: Shared
    names: Shared
    files: Shared
    notes: tuple[str, ...]
    tests: tuple[str, ...]

    @property
    def found(self) -> bool:
        """Whether there is any."""
        return bool(self.landmarks.count or self.names.count or self.files.count)

    def __str__(self) -> str:
        parts = []
        if self.landmarks.count:
            many = len(self.landmarks.pairs)
            parts.append(
                f"{many} {_plural('class', many)} with {self.landmarks.count} images named like landmarks of the test "
                f"({_listed(self.landmarks)})"
            )
        if self.names.count:
            parts.append(f"{self.names.count} images named like one of the test ({_listed(self.names)})")
        if self.files.count:
            parts.append(f"{self.files.count} images with the very bytes of one of the test ({_listed(self.files)})")
        return "training and test share " + "; ".join(parts or ["nothing"])

    def info(self) -> dict[str, Any]:
        """For a manifest: counts, examples and notes."""
        ways = {"landmarks": self.landmarks, "names": self.names, "files": self.files}
        found = {
            way: {"images": shared.count, "examples": [list(pair) for pair in shared.pairs[:EXAMPLES]]}
            for way, shared in ways.items()
        }
        return {**found, "classes": len(self.landmarks.pairs), "notes": list(self.notes), "tests": list(self.tests)}


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}es"


def _listed(shared: Shared) -> str:
    pairs = [f"{train!r} and {test!r}" for train, test in shared.pairs[:EXAMPLES]]
    return ", ".join(pairs) + (", …" if max(len(shared.pairs), shared.count) > EXAMPLES == len(pairs) else "")


def check(train: Sequence[str], test: Sequence[str], *, allow: bool = False) -> dict[str, Any]:
    """Refuse to train on what is tested; what to record in the manifest (`Overlap.info`).

    Notes, and an overlap that is allowed, are logged as warnings.

    Args:
        train, test: as for `compare`.
        allow: go on nevertheless.

    Raises:
        InputError: they share something, and `allow` is not set.
    """
    overlap = compare(train, test)
    for note in overlap.notes:
        log.warning("overlap: %s", note)
    if overlap.found and not allow:
        raise InputError(
            f"{overlap}; figures on this test would be too good. Leave these classes and images out of the training set, "
            "or --set allow_overlap=true, which is recorded in the manifest"
        )
    if overlap.found:
        log.warning("overlap: %s; allowed: figures on this test are too good, say so beside them", overlap)
    return overlap.info()


def compare(train: Sequence[str], test: Sequence[str]) -> Overlap:
    """What training images and test sets share.

    Args:
        train: images artifacts; their queries are not trained on and do not count.
        test: images artifacts, with a ground truth or not, and files or folders of ground truth. May be none: then only
            what is known of the training set is noted.

    Raises:
        InputError: one is neither.
        GroundTruthError: a ground truth cannot be read.
    """
    sources = [artifact.require(uri, "ingest") for uri in train]
    tested = _Test()
    for uri in test:
        tested.add(uri)
    counts: dict[str, int] = {}
    names, files = _Found(tested.names), _Found(tested.files)
    for table in (table for source in sources for table in _tables(*source)) if test else ():
        table = table.filter(pc.fill_null(pc.not_equal(table["split"], "query"), False))
        for entry in pc.value_counts(table["label"].drop_null()).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        shown = table["name"].to_pylist()
        files.look(table["sha256"].to_pylist(), shown)
        names.look((_last(name).casefold() for name in shown), shown)
    hits = [(label, found) for label in sorted(counts) if (found := tested.landmark(label)) is not None]
    landmarks = Shared(sum(counts[label] for label, _ in hits), tuple(hits))
    return Overlap(landmarks, names.shared(), files.shared(), tuple(_notes(sources, counts)), tuple(test))


def _notes(sources: Sequence[tuple[Folder, Manifest]], classes: dict[str, int]) -> Iterator[str]:
    if any(GOOGLE.search(ref.uri) for _, manifest in sources for ref in manifest.inputs.values()):
        yield GOOGLE_NOTE
    nameless = [label for label in classes if not any(_keys(part)[0] for part in label.split("/"))]
    if nameless:
        yield (
            f"{len(nameless)} of {len(classes)} training classes have no name that says anything, such as {nameless[0]!r}: "
            "whether they are landmarks of the test is not known"
        )


class _Found:
    """Gathers training images whose key is one of the test's."""

    def __init__(self, known: dict[str, str]) -> None:
        self.known, self.count = known, 0
        self.pairs: list[tuple[str, str]] = []

    def look(self, keys: Iterable[str], names: Iterable[str]) -> None:
        for key, name in zip(keys, names, strict=True):
            if key in self.known:
                self.count += 1
                if len(self.pairs) < EXAMPLES:
                    self.pairs.append((name, self.known[key]))

    def shared(self) -> Shared:
        return Shared(self.count, tuple(self.pairs))


class _Test:
    """What the test sets hold, each as key -> a name to show."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.full: dict[str, str] = {}
        """Names of landmarks."""
        self.short: dict[str, str] = {}
        """The same without words of kind."""
        self.prefixes: set[str] = set()

    def add(self, uri: str) -> None:
        truth, folder = None, None
        if not uri.endswith((".pkl", ".pickle", ".json", *ENDINGS)):
            folder = open_folder(uri)
            manifest = read_manifest(folder)
            if manifest is None:
                folder = None  # of text files
            else:
                artifact.require(uri, "ingest")
        if folder is None or folder.exists(FILE):
            truth = groundtruth.read(uri)
            self._add_truth(truth)
        if folder is not None:
            assert manifest is not None
            for table in _tables(folder, manifest):
                self._add_rows(table, truth is None)

    def _add_truth(self, truth: GroundTruth) -> None:
        self._add_photos(sorted(truth.images()))
        images = [_words(_last(query.image)) for query in truth.queries]
        first, second = (
            {words[at] for words in images if len(words) > at and not words[at].isdigit()} for at in (0, 1)
        )
        if len(first) == 1 and len(second) > 1:  # with one second word, or numbers, the first is the landmark
            self.prefixes |= first
        positive = {label for right, _ in LEVELS[truth.protocol].values() for label in right}
        shown = [name for query in truth.queries for name in (query.name, query.image)]
        shown += [n for query in truth.queries for label in sorted(positive) for n in query.labels.get(label, ())]
        for name in dict.fromkeys(shown):
            self._add_landmark(_last(name), name)

    def _add_rows(self, table: pa.Table, by_name: bool) -> None:
        names = table["name"].to_pylist()
        self._add_photos(names)
        for digest, name in zip(table["sha256"].to_pylist(), names, strict=True):
            self.files.setdefault(digest, name)
        table = table.filter(pc.fill_null(pc.not_equal(table["split"], "distractor"), False))
        for name, label in zip(table["name"].to_pylist(), table["label"].to_pylist(), strict=True):
            for part in (label or "").split("/"):
                self._add_landmark(part, name, numbered=False)
            if by_name:
                self._add_landmark(_last(name), name)

    def _add_photos(self, names: Iterable[str]) -> None:
        for name in names:
            key = _photo(name)
            if key is not None:
                self.names.setdefault(key, name)

    def _add_landmark(self, text: str, name: str, numbered: bool = True) -> None:
        """`numbered`: the numbers at its end are not, or not all, the landmark's."""
        words = _words(text)
        if len(words) > 1 and words[0] in self.prefixes:
            words = words[1:]
        lengths = {len(words)}
        if numbered and words and words[-1].isdigit():
            end = len(words)
            while end and words[end - 1].isdigit():
                end -= 1
            lengths = set(range(end, len(words)))
        for length in lengths:
            full, short = _keys_of(words[:length], frozenset())
            if full:
                self.full.setdefault(full, name)
            if short:
                self.short.setdefault(short, name)

    def landmark(self, label: str) -> str | None:
        """A test name with the landmark of a training class, None where there is none."""
        for part in label.split("/"):
            full, short = _keys_of(_words(part), frozenset(self.prefixes))
            found = self.full.get(full) or self.short.get(full) or self.full.get(short)
            if found is not None:
                return found
        return None


def _tables(folder: Folder, manifest: Manifest) -> Iterator[pa.Table]:
    for shard in manifest.shards():
        with folder.open(shard) as file:
            yield pq.read_table(file, columns=["name", "label", "split", "sha256"])


# ------------------------------------------------------------------------------------------------ names


def _last(name: str) -> str:
    """The last component of an image's name, without its ending."""
    last = name.rpartition("/")[2]
    stem, dot, ending = last.rpartition(".")
    return stem if dot and f".{ending.lower()}" in EXTENSIONS else last


def _words(text: str) -> list[str]:
    """Words and numbers of a text, without case and accents.

    >>> _words("Musée_d'Orsay 0012")
    ['musee', 'd', 'orsay', '0012']
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.findall(r"[^\W\d_]+|\d+", plain.casefold())


def _keys(text: str) -> tuple[str, str]:
    return _keys_of(_words(text), frozenset())


def _keys_of(words: Sequence[str], prefixes: frozenset[str]) -> tuple[str, str]:
    """The name of a landmark as one word, whole and without words of kind; empty where there is none.

    >>> _keys_of(["the", "eiffel", "tower"], frozenset())
    ('eiffeltower', 'eiffel')
    """
    kept = [word for word in words if word not in SMALL | NOISE]
    short = [word for word in kept if word not in KINDS | prefixes]
    full, rest = _name(kept), _name(short)
    return full, rest if len(rest) > 3 else ""


def _name(words: Sequence[str]) -> str:
    joined = "".join(words)
    return joined if sum(map(str.isalpha, joined)) > 2 else ""


def _photo(name: str) -> str | None:
    """What two photos of the same name share; None where the name is one that many photos have.

    >>> _photo("jpg/Eiffel_000012.jpg"), _photo("DSC_0012"), _photo("a/6e158a47eb2ca3f6")
    ('eiffel_000012', None, '6e158a47eb2ca3f6')
    """
    last = _last(name).casefold()
    telling = "".join(word.lstrip("0") if word.isdigit() else word for word in _words(last) if word not in NOISE)
    return last if len(telling) > 7 or sum(map(str.isalpha, telling)) > 3 else None
