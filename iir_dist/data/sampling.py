"""Which images a step sees: pure functions of (seed, step), so that any number of workers, and a resumed run, agree.

A batch is that of all workers; each takes its share of it (`train.collectives.share_of`). No batch holds an image
twice: its two views would be the same pixels, and each the other's perfect match.

    EpochSampler      every image once in an epoch, labels not used; of a set that is cut into parts, each its share
    ClassSampler      P classes x K images, drawn anew at each step
    BalancedSampler   a fixed number of images, every class as often as any other, every image of a class in its turn
    RandomSampler     any images, in epochs; what has no positive in its batch is passed over by the loss
    TupleSampler      queries, each with a positive and its hard negatives, from a table of mined tuples
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from iir_dist.data import parts
from iir_dist.errors import InputError
from iir_dist.storage import split_uri

I64 = npt.NDArray[np.int64]


class Sampler(Protocol):
    """What a training draws its batches from."""

    @property
    def batch_size(self) -> int:
        """Images of a global batch; the most, where batches differ."""
        ...

    def batch(self, step: int) -> I64:
        """Numbers of the images of one step, each once; a function of the seed and the step alone."""
        ...


def epoch_batch(num_images: int, batch: int, step: int, seed: int) -> I64:
    """The global batch of one step when every epoch is a fresh permutation; the last, partial batch is dropped.

    >>> sorted(np.concatenate([epoch_batch(6, 2, s, seed=0) for s in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    steps = num_images // batch
    if steps == 0:
        raise InputError(f"a batch of {batch} needs at least as many images; there are {num_images}")
    epoch, position = divmod(step, steps)
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    return order[position * batch : (position + 1) * batch]


class EpochSampler:
    """Every image once in an epoch, whatever its label; the set may be cut into parts, of which a node holds only some.

    Part p fills the positions [pB/P, (p+1)B/P) of each batch of B (`parts.slots`), in an order of its images that is drawn
    anew for every epoch from (seed, epoch, p). With one part that is `epoch_batch`.

    How random it is. Two images meet in a batch of an epoch with probability (B-1)/(N-1) where one permutation runs over
    all N; here with (B-P)/(N-P) if they are of one part, with B/N if not: for B = 256 and P = 8 2.7% less and 0.4% more.
    Chunks, over which batch norm takes its statistics, are of one part each (`train.chunks`).

    What is left out. An epoch ends when a part has too few for another batch. With P parts whose sizes differ by at most
    the largest shard's L images (`parts.deal`), fewer than (P-1)L + B images do not come; which, changes with the epoch.
    Where B is no multiple of P, the parts that give one more end earlier: up to P/B of the set more.

    Why not a buffer. The order within a part is a permutation of its images and not one of its shards with a buffer behind
    it, because a part's copies lie memory-mapped on the node's own disk. One process reads images of 100 kB from there in
    random order about 0.6 times as fast as in the order of the file, some 3,000 a second; to decode one takes ten times as
    long as that. So a buffer would gain little, let neighbours meet again and again, and have to be refilled on a resume.
    """

    def __init__(self, members: Sequence[I64], batch: int, seed: int) -> None:
        self.members, self.batch_size, self._seed = tuple(members), batch, seed
        self._slots = parts.slots(batch, len(self.members))
        sizes = [len(own) for own in self.members]
        if batch < len(sizes) or any(
            size < stop - start for size, (start, stop) in zip(sizes, self._slots, strict=True)
        ):
            of = f"; the {len(sizes)} parts of the set have {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""
            raise InputError(f"a batch of {batch} needs at least as many images; there are {sum(sizes)}{of}")
        self.steps = min(size // (stop - start) for size, (start, stop) in zip(sizes, self._slots, strict=True))
        """Of an epoch."""
        # Loaders plan ahead: at the turn of an epoch both are asked for.
        self._order = lru_cache(maxsize=2 * len(sizes))(self._drawn)

    @classmethod
    def of(cls, counts: Sequence[int], num_parts: int, batch: int, seed: int) -> EpochSampler:
        """For a set of shards with so many images each.

        Raises:
            InputError: there are fewer shards than parts, or a part has fewer images than its share of a batch.
        """
        return cls([parts.numbers(counts, own) for own in parts.deal(counts, num_parts)], batch, seed)

    @property
    def left_out(self) -> int:
        """Images that do not come in an epoch."""
        return sum(map(len, self.members)) - self.steps * self.batch_size

    def epoch(self, step: int) -> int:
        """Which epoch a step is of."""
        return step // self.steps

    def batch(self, step: int) -> I64:
        """Image numbers of one step, part by part."""
        epoch, position = divmod(step, self.steps)
        shares = [(part, stop - start) for part, (start, stop) in enumerate(self._slots)]
        return np.concatenate(
            [self._order(epoch, part)[position * share : (position + 1) * share] for part, share in shares]
        )

    def _drawn(self, epoch: int, part: int) -> I64:
        return np.random.default_rng([self._seed, epoch, part]).permutation(self.members[part])


def classes_of(labels: Sequence[str | None]) -> dict[str, tuple[int, ...]]:
    """The image numbers of each class, classes in order of their names; images without a label are in none.

    Raises:
        InputError: there are fewer than two classes of two or more images.

    >>> classes_of(["b", "a", None, "b", "a", "c"])
    {'a': (1, 4), 'b': (0, 3), 'c': (5,)}
    """
    groups: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        if label is not None:
            groups.setdefault(label, []).append(number)
    several = sum(len(group) > 1 for group in groups.values())
    if several < 2:
        raise InputError(
            f"{several} classes have two or more images; fine-tuning needs at least two: labels are folder names "
            "(class/file.jpg)"
        )
    return {label: tuple(group) for label, group in sorted(groups.items())}


@dataclass(frozen=True, slots=True)
class ClassSampler:
    """P classes by K images: every query of a batch has K - 1 positives in it.

    Classes and their images are drawn anew at each step. A class with fewer than K images gives all that it has, and
    where there are fewer than P classes each batch has all of them; so batches may be smaller than P x K.
    """

    members: tuple[tuple[int, ...], ...]
    num_classes: int
    per_class: int
    seed: int

    @classmethod
    def of(cls, labels: Sequence[str | None], num_classes: int, per_class: int, seed: int) -> ClassSampler:
        """From the label of each image (None: not used). Classes of one image are left out.

        Raises:
            InputError: there are fewer than two classes of two or more images.
        """
        usable = tuple(group for group in classes_of(labels).values() if len(group) > 1)
        return cls(usable, min(num_classes, len(usable)), per_class, seed)

    @property
    def batch_size(self) -> int:
        """P x K."""
        return self.num_classes * self.per_class

    def batch(self, step: int) -> I64:
        """Image numbers of one step, class by class."""
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.choice(len(self.members), self.num_classes, replace=False)
        parts = [rng.choice(self.members[c], min(self.per_class, len(self.members[c])), replace=False) for c in chosen]
        return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True, slots=True)
class BalancedSampler:
    """A fixed number of images, every class as often as any other, however many images it has.

    Classes come in rounds, each a fresh permutation of them; at its turn a class gives its next K images. A class
    gives all its images, in an order drawn for each of its epochs, before one comes again.
    """

    members: tuple[tuple[int, ...], ...]
    batch_size: int
    per_class: int
    seed: int

    @classmethod
    def of(cls, labels: Sequence[str | None], batch: int, per_class: int, seed: int) -> BalancedSampler:
        """From the label of each image (None: not used). Classes of fewer than `per_class` images are left out.

        Args:
            batch: images, a multiple of `per_class`.
            per_class: K, images that a class gives in its turn; 2 or more, so that each has a positive.

        Raises:
            InputError: fewer than two classes are left, or a class is too small to fill its part of a batch.
        """
        if per_class < 2 or batch < per_class or batch % per_class:
            raise InputError(
                f"a batch of {batch} images with {per_class} of each class; expected 2 or more of a class, and a batch "
                "that is a multiple of that"
            )
        classes = {label: group for label, group in classes_of(labels).items() if len(group) >= per_class}
        if len(classes) < 2:
            raise InputError(
                f"{len(classes)} classes have {per_class} or more images; expected two, or ask for fewer of a class"
            )
        sampler = cls(tuple(classes.values()), batch, per_class, seed)
        label, smallest = min(classes.items(), key=lambda item: len(item[1]))
        if len(smallest) < sampler.most:
            raise InputError(
                f"a batch of {batch} images of {len(classes)} classes takes up to {sampler.most} of one class, and "
                f"{label!r} has {len(smallest)}; ask for a smaller batch"
            )
        return sampler

    @property
    def most(self) -> int:
        """Images of one class that a batch can hold: those of all rounds that it touches."""
        turns, rounds = self.batch_size // self.per_class, len(self.members)
        return self.per_class * math.ceil((turns + rounds - math.gcd(turns, rounds)) / rounds)

    def batch(self, step: int) -> I64:
        """Image numbers of one step, turn by turn."""
        turns, found = self.batch_size // self.per_class, []
        rounds = cache(lambda number: np.random.default_rng([self.seed, number]).permutation(len(self.members)))
        order_of = cache(self._order)
        for turn in range(step * turns, (step + 1) * turns):
            number, position = divmod(turn, len(self.members))
            chosen = int(rounds(number)[position])
            members = self.members[chosen]
            for use in range(number * self.per_class, (number + 1) * self.per_class):
                epoch, place = divmod(use, len(members))
                found.append(members[order_of(chosen, epoch)[place]])
        return np.array(found, np.int64)

    def _order(self, chosen: int, epoch: int) -> I64:
        """Order of a class's images in one epoch. The last of an epoch do not begin the next, lest a batch had them twice."""
        n, most = len(self.members[chosen]), self.most
        if n < 3 * most:  # too few to be kept apart: one order for all epochs
            return np.random.default_rng([self.seed, 1, chosen]).permutation(n)
        order = np.random.default_rng([self.seed, 1, chosen, epoch]).permutation(n)
        if epoch == 0:
            return order
        last = np.random.default_rng([self.seed, 1, chosen, epoch - 1]).permutation(n)[n - most :]
        head, tail = order[: n - most], order[n - most :]
        late = np.isin(head, last)
        # The tail stays as drawn, so that the next epoch need not know this one's past.
        return np.concatenate([head[~late], head[late], tail])


@dataclass(frozen=True, slots=True)
class RandomSampler:
    """Any labelled images, every one once in an epoch: the sampling of Revaud et al. (arXiv:1906.07589, section 4.1).

    A query may have no positive in its batch; the loss passes it over. How many have one follows from the size of the
    batch against the number of classes.
    """

    numbers: I64
    batch_size: int
    seed: int

    @classmethod
    def of(cls, labels: Sequence[str | None], batch: int, seed: int) -> RandomSampler:
        """From the label of each image (None: not used).

        Raises:
            InputError: there are fewer images than a batch has, or fewer than two classes of two or more images.
        """
        numbers = np.sort(np.concatenate([np.array(group, np.int64) for group in classes_of(labels).values()]))
        epoch_batch(len(numbers), batch, 0, seed)
        return cls(numbers, batch, seed)

    def batch(self, step: int) -> I64:
        """Image numbers of one step."""
        return self.numbers[epoch_batch(len(self.numbers), self.batch_size, step, self.seed)]


@dataclass(frozen=True, slots=True)
class TupleSampler:
    """Several mined tuples a batch: a query, a positive, its hard negatives, the next query, and so on.

    Every tuple comes once in an epoch. An image that an earlier tuple of the batch has already is left out, so that
    batches may be a little smaller than `batch_size`; labels say what is a positive of what, not the tuples.
    """

    images: I64
    tuples: int
    seed: int
    first_step: int

    @classmethod
    def of(cls, images: I64, tuples: int, seed: int, first_step: int = 0) -> TupleSampler:
        """From mined tuples.

        Args:
            images: (n, 2 + negatives) image numbers: query, positive, negatives.
            tuples: of a batch.
            first_step: at which these tuples come into use; its batch begins an epoch.

        Raises:
            InputError: there are fewer tuples than a batch has.
        """
        if len(images) < tuples:
            raise InputError(f"{len(images)} tuples were mined, and a batch takes {tuples}; mine with more queries")
        return cls(images, tuples, seed, first_step)

    @classmethod
    def read(cls, uri: str, tuples: int, seed: int, first_step: int = 0) -> TupleSampler:
        """From the table at `uri`, a Parquet file of `query`, `positive` and `negatives` (lists of one length)."""
        folder, name = split_uri(uri)
        with folder.open(name) as file:
            table = pq.read_table(file, columns=["query", "positive", "negatives"])
        negatives = table["negatives"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        columns = [table[name].to_numpy()[:, None] for name in ("query", "positive")]
        return cls.of(np.concatenate([*columns, negatives], axis=1).astype(np.int64), tuples, seed, first_step)

    @property
    def batch_size(self) -> int:
        """Images of a batch if its tuples share none."""
        return self.tuples * int(self.images.shape[1])

    def batch(self, step: int) -> I64:
        """Image numbers of one step, tuple by tuple."""
        chosen = epoch_batch(len(self.images), self.tuples, step - self.first_step, self.seed)
        images = self.images[chosen].ravel()
        _, first = np.unique(images, return_index=True)
        return images[np.sort(first)]
