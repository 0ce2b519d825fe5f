"""`iir`: parse, call one stage, print what it gave; errors of ours become one sentence and exit code 1.

Nothing heavy is imported here: each command imports its stage when it runs, so that `iir --help` is quick.
"""

from iir_dist.cli import cluster, serve, sizing, stages, study, tools
from iir_dist.cli.skin import main

__all__ = ["cluster", "main", "serve", "sizing", "stages", "study", "tools"]
