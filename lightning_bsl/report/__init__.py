"""Reads plans and finished runs: tables and figures."""

from lightning_bsl.report.figures import plot_comparison, plot_plan, plot_run
from lightning_bsl.report.run import read_metrics
from lightning_bsl.report.tables import bound_line, bounds_along, compare_table, console, plan_table, run_table, theory_table

__all__ = [
    "bound_line",
    "bounds_along",
    "compare_table",
    "console",
    "plan_table",
    "plot_comparison",
    "plot_plan",
    "plot_run",
    "read_metrics",
    "run_table",
    "theory_table",
]
