"""The study: a table of trainings, each measured in the same way.

The same options as `iir study`. `iir submit study ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/study.py --config jobs/configs/study_cpu.toml --data s3://BUCKET/photos --out s3://BUCKET/study
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["study", *sys.argv[1:]])
