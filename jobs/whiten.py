"""Learn whitening on a training set and store it in the encoder.

The same options as `iir whiten`. `iir submit whiten ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/whiten.py s3://BUCKET/embeddings --encoder s3://BUCKET/encoder --out s3://BUCKET/white
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["whiten", *sys.argv[1:]])
