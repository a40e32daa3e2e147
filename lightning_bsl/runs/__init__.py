"""Runs as they lie on disk: their folders, their metrics, and groups of them compared."""

from lightning_bsl.runs.compare import Target, compare, default_baseline, logged_metrics, parse_target
from lightning_bsl.runs.find import Found, Group, Run, find_runs, group_runs
from lightning_bsl.runs.metrics import read_metrics

__all__ = [
    "Found",
    "Group",
    "Run",
    "Target",
    "compare",
    "default_baseline",
    "find_runs",
    "group_runs",
    "logged_metrics",
    "parse_target",
    "read_metrics",
]
