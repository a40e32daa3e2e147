"""Reads plans and finished runs: tables and figures."""

from lightning_bsl.report.figures import plot_plan, plot_run
from lightning_bsl.report.run import read_metrics
from lightning_bsl.report.tables import console, plan_table, run_table

__all__ = ["console", "plan_table", "plot_plan", "plot_run", "read_metrics", "run_table"]
