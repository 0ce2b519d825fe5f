"""`images/` to `embeddings/`: unit vectors, one output shard for each input shard.

memory (pure): what a run will hold. decode and forward: what the workers do. pipeline: Ray Data between them. output:
shards and ledger. project: whitening of finished vectors. stage: what is to be done, and closing the books.
"""

from iir_dist.embed.config import EmbedConfig
from iir_dist.embed.stage import run

__all__ = ["EmbedConfig", "run"]
