"""Which images a step sees: pure functions of (seed, step), so that any number of workers, and a resumed run, agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from iir_dist.errors import InputError

I64 = npt.NDArray[np.int64]


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


@dataclass(frozen=True, slots=True)
class ClassSampler:
    """P classes by K images: every query of a batch has K - 1 positives in it."""

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
        groups: dict[str, list[int]] = {}
        for number, label in enumerate(labels):
            if label is not None:
                groups.setdefault(label, []).append(number)
        usable = [tuple(g) for _, g in sorted(groups.items()) if len(g) > 1]
        if len(usable) < 2:
            raise InputError(
                f"{len(usable)} classes have two or more images; fine-tuning needs at least two: labels are folder names "
                "(class/file.jpg)"
            )
        return cls(tuple(usable), min(num_classes, len(usable)), per_class, seed)

    def batch(self, step: int) -> I64:
        """Image numbers of one step, class by class; a class with fewer than K images gives all it has."""
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.choice(len(self.members), self.num_classes, replace=False)
        parts = [rng.choice(self.members[c], min(self.per_class, len(self.members[c])), replace=False) for c in chosen]
        return np.concatenate(parts).astype(np.int64)
