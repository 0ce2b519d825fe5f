"""Order the first of each list anew: qe, dba, diffusion or superglobal.

The same options as `iir rerank`. `iir submit rerank ...` packs and submits; by hand, from the root of the project:

    ray job submit --working-dir . -- \\
        python jobs/rerank.py superglobal s3://BUCKET/rankings --database s3://BUCKET/index --queries s3://BUCKET/queries --out s3://BUCKET/reranked
"""

import sys

from iir_dist.cli import main
from iir_dist.credentials import adopt

if __name__ == "__main__":
    adopt()
    main(["rerank", *sys.argv[1:]])
