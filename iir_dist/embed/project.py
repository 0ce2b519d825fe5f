"""Whitening alone: finished vectors of the same network, through the encoder's last, linear step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from iir_dist import artifact
from iir_dist.artifact import Manifest
from iir_dist.data.embeddings import Embeddings, open_embeddings
from iir_dist.embed.config import EmbedConfig
from iir_dist.embed.output import finish, write_shard
from iir_dist.errors import MismatchError
from iir_dist.storage import Folder


def project(
    inputs: str, encoder_folder: Folder, encoder: Manifest, out: str, config: EmbedConfig, force: bool
) -> Manifest:
    """Whiten finished embeddings: the network need not run again, because whitening is its last, linear step."""
    source = open_embeddings(inputs)
    whitening = encoder.info["encoder"]["whitening"]
    if whitening is None or whitening["base"] != source.encoder:
        raise MismatchError(
            f"{inputs} holds vectors of encoder {str(source.encoder)[:12]}; {encoder_folder.uri} whitens those of "
            f"{str(whitening and whitening['base'])[:12]}: give the images, or the encoder that was whitened"
        )
    refs = {"embeddings": source.ref, "encoder": artifact.reference(encoder_folder, encoder)}
    with artifact.begin(out, "embed", config, refs, force=force) as work:
        if work.finished:
            return work.finished
        done = work.done()
        network = _whitener(encoder_folder, encoder)
        for number, shard in enumerate(source.shards):
            if number not in done:
                write_shard(work.folder, _whitened(source, shard, number, network), config.dtype)
        return finish(work, encoder, len(source.shards))


def _whitener(folder: Folder, manifest: Manifest) -> Any:
    from iir_dist.models import encoder

    return encoder.load(folder, manifest)


def _whitened(source: Embeddings, shard: str, number: int, network: Any) -> pa.Table:
    import torch

    block = source.read(shard)
    assert block.vectors is not None
    with torch.inference_mode():
        x = network.whiten(torch.from_numpy(block.vectors)).numpy()
    n = len(block.ids)
    return pa.table(
        {
            "shard": np.full(n, number), "total": np.full(n, n), "row": np.arange(n), "id": block.ids,
            "name": block.names, "split": block.splits,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1]),
            "error": pa.nulls(n, pa.string()),
        }
    )  # fmt: skip
