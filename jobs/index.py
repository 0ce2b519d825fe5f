"""Build or change a sharded IVF-PQ index: a shard is filled by a task of its own.

The same options as `iir index`. `iir submit index ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/index.py s3://BUCKET/embeddings --out s3://BUCKET/index
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["index", *sys.argv[1:]])
