"""What pretraining and fine-tuning share: where they compute, and writing the encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iir_dist import artifact
from iir_dist.artifact import FileEntry, Manifest
from iir_dist.models.encoder import Encoder, EncoderConfig, info_of, save
from iir_dist.storage import Folder, sha256_of
from iir_dist.train import checkpoints


def device() -> torch.device:
    """This worker's GPU if it has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_weights(encoder: Encoder, weights: dict[str, Tensor], name: str = "encoder") -> None:
    """Fill the encoder from the state of a trained model that holds it under that name."""
    prefix = f"{name}."
    encoder.load_state_dict({n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)})


def encoder_after(work: Folder, step: int, home: Folder, start: Callable[[], Encoder]) -> str:
    """An encoder artifact below a round's folder `home`: `start`, with the weights after `step` steps of the training in `work`."""
    folder = home.child("encoder")
    with artifact.begin(folder.uri, "encoder", EncoderConfig(), {}) as job:
        if not job.finished:
            encoder = start()
            if step > 0:
                load_weights(encoder, checkpoints.weights(work, step))
            job.publish({}, save(encoder, job.folder), info_of(encoder))
    return folder.uri


def publish(
    work: artifact.Work, encoder: Encoder, counts: dict[str, int], info: dict[str, Any] | None = None
) -> Manifest:
    """Write the trained encoder beside its log and the checkpoints that were kept, and the manifest."""
    files = save(encoder, work.folder)
    artifact.sweep(work.folder)  # what a worker that was killed has left half written
    kept = [entry.name for entry in work.folder.list(checkpoints.FOLDER)]
    for name in (checkpoints.LOG, *kept):
        with work.folder.local(name) as path:
            files[name] = FileEntry(size=path.stat().st_size, sha256=sha256_of(path))
    return work.publish(counts, files, {**info_of(encoder), **(info or {})})
