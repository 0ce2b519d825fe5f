"""Self-supervised pretraining on images/, a worker a GPU.

The same options as `iir pretrain`. `iir submit pretrain ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/pretrain.py s3://BUCKET/images --config jobs/configs/moco_v2_resnet50.toml --out s3://BUCKET/pretrained
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["pretrain", *sys.argv[1:]])
