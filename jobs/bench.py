"""Benchmarks of retrieval: mAP and cost of search among up to a million distractors.

The same options as `iir bench`. `iir submit bench ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/bench.py distractors s3://BUCKET/embeddings --groundtruth s3://BUCKET/images --out s3://BUCKET/bench
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["bench", *sys.argv[1:]])
