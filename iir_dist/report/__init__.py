"""Finished evaluations and distractor benchmarks to one self-contained HTML file. It reads; no stage knows of it.

stage: the artifact. evaluations: tables and curves. strips, photos: the lists of each query. published: figures of others.
distractors: the curve among distractors. page: templates and figures.
"""

from iir_dist.report.evaluations import Evaluation, table_rows
from iir_dist.report.stage import ReportConfig, labels_of, run

__all__ = ["Evaluation", "ReportConfig", "labels_of", "run", "table_rows"]
