"""Score rankings by the protocol of their ground truth.

The same options as `iir evaluate`. `iir submit evaluate ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/evaluate.py s3://BUCKET/rankings --groundtruth s3://BUCKET/images --out s3://BUCKET/metrics
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["evaluate", *sys.argv[1:]])
