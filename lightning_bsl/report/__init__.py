"""Reads plans, finished runs and grids: tables, figures, and the pages that compare runs and find best rates."""

from lightning_bsl.report.compare import Target, default_baseline, logged_metrics, parse_target
from lightning_bsl.report.figures import plot_comparison, plot_plan, plot_run
from lightning_bsl.report.page import write_report
from lightning_bsl.report.run import read_metrics
from lightning_bsl.report.runs import Found, Group, Run, find_runs, group_runs
from lightning_bsl.report.surge import Surge, analyse_surge
from lightning_bsl.report.surge_page import write_surge_report
from lightning_bsl.report.surge_text import surge_commands, surge_summary, surge_table, train_overrides
from lightning_bsl.report.tables import bound_line, bounds_along, compare_table, console, plan_table, run_table, theory_table

__all__ = [
    "Found",
    "Group",
    "Run",
    "Surge",
    "Target",
    "analyse_surge",
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
    "surge_commands",
    "surge_summary",
    "surge_table",
    "theory_table",
    "train_overrides",
    "write_report",
    "write_surge_report",
]
