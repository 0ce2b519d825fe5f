"""Fine-tune an encoder on labelled images/ with an AP loss, a worker a GPU.

The same options as `iir finetune`. `iir submit finetune ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/finetune.py s3://BUCKET/images --init s3://BUCKET/encoder --out s3://BUCKET/tuned
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["finetune", *sys.argv[1:]])
