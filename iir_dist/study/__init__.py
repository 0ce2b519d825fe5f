"""The study: networks that were made in different ways, searched under one protocol, and what may be said of the differences.

config: what a study is, and which are refused. plan: its stages as a graph, pure. estimate: what they cost, and what must be
downloaded. execute: the stages, in order. classify, subset, reading, near: stages that only studies have. verdict: from
average precisions to a sentence. result, page: the tables, and the page that shows them. stage: all of it.
"""

from iir_dist.study.config import StudyConfig, checked, read_config

__all__ = ["StudyConfig", "checked", "read_config"]
