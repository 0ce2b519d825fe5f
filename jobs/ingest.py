"""Pack raw photos into images/: listing on the driver, checking and writing on all nodes.

The same options as `iir ingest`. `iir submit ingest ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/ingest.py s3://BUCKET/photos --out s3://BUCKET/images
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["ingest", *sys.argv[1:]])
