"""Reads plans and finished runs: tables, figures, and the page that compares runs."""

from lightning_bsl.report.compare import Target, default_baseline, logged_metrics, parse_target
from lightning_bsl.report.figures import plot_comparison, plot_plan, plot_run
from lightning_bsl.report.page import write_report
from lightning_bsl.report.run import read_metrics
from lightning_bsl.report.runs import Found, Group, Run, find_runs, group_runs
from lightning_bsl.report.tables import bound_line, bounds_along, compare_table, console, plan_table, run_table, theory_table

__all__ = [
    "Found",
    "Group",
    "Run",
    "Target",
    "bound_line",
    "bounds_along",
    "compare_table",
    "console",
    "default_baseline",
    "find_runs",
    "group_runs",
    "logged_metrics",
    "parse_target",
    "plan_table",
    "plot_comparison",
    "plot_plan",
    "plot_run",
    "read_metrics",
    "run_table",
    "theory_table",
    "write_report",
]
