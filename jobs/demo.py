"""The whole chain, raw photos to a report.

The same options as `iir demo`. `iir submit demo ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/demo.py --out s3://BUCKET/demo
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["demo", *sys.argv[1:]])
