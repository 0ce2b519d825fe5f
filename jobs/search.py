"""Rank an index, or embeddings/ exactly, for every query; the shards lie on all nodes.

The same options as `iir search`. `iir submit search ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/search.py s3://BUCKET/index --queries s3://BUCKET/queries --out s3://BUCKET/rankings
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["search", *sys.argv[1:]])
