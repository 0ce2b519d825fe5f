"""One HTML page about finished evaluations and distractor benchmarks.

The same options as `iir report`. `iir submit report ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/report.py s3://BUCKET/metrics --images s3://BUCKET/images --out s3://BUCKET/report
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["report", *sys.argv[1:]])
