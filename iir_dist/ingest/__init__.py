"""Raw photos to `images/`: Parquet shards of original bytes, with a ledger of everything that was refused.

plan (pure): number the members and cut them into shards. check and write (Ray): read, decode, hash, commit. stage:
the loop around them, ledgers, and what was rejected tried again.
"""

from iir_dist.ingest.check import SCHEMA
from iir_dist.ingest.plan import IngestConfig
from iir_dist.ingest.retry import TRANSIENT
from iir_dist.ingest.stage import run

__all__ = ["SCHEMA", "TRANSIENT", "IngestConfig", "run"]
