"""Every error that a user can cause, as one tree.

    IirError
    ├── ConfigError          a key or value of the configuration is wrong
    ├── InputError           what a stage was pointed at cannot be used
    │   ├── GroundTruthError     the ground truth is unreadable or does not fit the images
    │   └── ImageError           one image cannot be used; carries the reason for the ledger
    ├── ArtifactError        an artifact cannot be used as it is
    │   ├── MismatchError        it was made with another config, encoder or input
    │   ├── CorruptError         its files are not those that its manifest lists
    │   └── BusyError            another process is writing it
    ├── StorageError         the file system or object store refused
    │   ├── NotFoundError        there is nothing at that address
    │   ├── ChangedError         what is there is not what was listed
    │   └── UnreachableError     no answer for as long as patience lasted; the same command goes on later
    └── TrainingError        a training stopped itself (loss not finite, worker lost for good)

A message carries the value, what was expected and the remedy. All of them survive pickling, because
Ray carries them from the worker to the driver.
"""

from __future__ import annotations

from typing import Any


class IirError(Exception):
    """Root of the tree; the command line prints it as one sentence and exits with 1."""


class ConfigError(IirError):
    """A key or value of the configuration is wrong."""


class InputError(IirError):
    """What a stage was pointed at cannot be used."""


class GroundTruthError(InputError):
    """The ground truth is unreadable or does not fit the images."""


class ImageError(InputError):
    """One image cannot be used.

    Args:
        reason: a word of `iir_dist.data.images.REASONS`, for the ledger.
        detail: what was found, in words.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail)


class ArtifactError(IirError):
    """An artifact cannot be used as it is."""


class MismatchError(ArtifactError):
    """It was made with another config, encoder or input."""


class CorruptError(ArtifactError):
    """Its files are not those that its manifest lists."""


class BusyError(ArtifactError):
    """Another process is writing it."""


class StorageError(IirError):
    """The file system or object store refused."""


class NotFoundError(StorageError):
    """There is nothing at that address."""


class ChangedError(StorageError):
    """What is there is not what was listed."""


class UnreachableError(StorageError):
    """No answer for as long as patience lasted."""


class TrainingError(IirError):
    """A training stopped itself."""
