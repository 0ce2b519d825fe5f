"""Rankings and ground truth to `metrics.json`: the numbers, and the whole protocol that they hold under.

rankings: the lists, ours and foreign. score: ranks and figures of each query. lineage: what rankings were made from.
protocol: every choice that a figure depends on, and those that are not the published ones. stage: the artifact.
"""

from iir_dist.evaluate.config import EvaluateConfig
from iir_dist.evaluate.lineage import EVALUATED_SET, ancestors, whitening_set
from iir_dist.evaluate.rankings import Rankings, read_rankings
from iir_dist.evaluate.score import numbers_of, score
from iir_dist.evaluate.stage import run

__all__ = [
    "EVALUATED_SET", "EvaluateConfig", "Rankings", "ancestors", "numbers_of", "read_rankings", "run", "score", "whitening_set",
]  # fmt: skip
