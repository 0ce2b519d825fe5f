"""The sharded IVF-PQ index: plan, build, shards, search."""
