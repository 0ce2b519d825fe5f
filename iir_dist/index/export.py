"""All shards of an index as one plain faiss file."""

from __future__ import annotations

import numpy as np

from iir_dist import artifact
from iir_dist.errors import ConfigError
from iir_dist.index.rows import read_tombstones
from iir_dist.index.shard import TEMPLATE, read_faiss, shards_of, write_faiss
from iir_dist.storage import LocalFolder, split_uri


def export(out: str, target: str) -> int:
    """Merge the shards into one file that faiss reads, without deleted rows; the number of its vectors.

    Its ids are database rows, its nprobe is the index's, and it scores by code: the float16 vectors are not part of it.
    It is put together in memory.

    Raises:
        ConfigError: `target` is not on local disk, or lies in the index.
        CorruptError: a file is missing or not the one that was written.
    """
    import faiss

    where, name = split_uri(target)
    if not isinstance(where, LocalFolder):
        raise ConfigError(f"--export {target}: expected a local file; copy it to the store afterwards")
    folder, manifest = artifact.require(out, "index")
    if where.uri == folder.uri:
        raise ConfigError(f"--export {target}: expected a file outside of the index, whose own files it might replace")
    tombstones = read_tombstones(folder, manifest)
    merged = read_faiss(folder, TEMPLATE, manifest.files[TEMPLATE])[0]
    for info in shards_of(folder, manifest):
        shard = read_faiss(folder, info.files[0], manifest.files[info.files[0]])[0]
        dead = tombstones[slice(*np.searchsorted(tombstones, [info.start, info.stop]))]
        if len(dead):
            shard.remove_ids(dead)
        merged.merge_from(shard, 0)
    faiss.extract_index_ivf(merged).nprobe = int(manifest.info["nprobe"])
    with where.publish(name) as file:
        write_faiss(merged, file.path)
    return int(merged.ntotal)
