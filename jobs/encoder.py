"""Write an off-the-shelf encoder.

The same options as `iir encoder`. `iir submit encoder ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/encoder.py --out s3://BUCKET/encoder --set size=224
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["encoder", *sys.argv[1:]])
