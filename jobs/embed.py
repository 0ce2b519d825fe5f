"""Embed images/, or whiten finished embeddings/: decoders on CPUs, networks on GPUs, of all nodes.

The same options as `iir embed`. `iir submit embed ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/embed.py s3://BUCKET/images --encoder s3://BUCKET/encoder --out s3://BUCKET/embeddings
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["embed", *sys.argv[1:]])
