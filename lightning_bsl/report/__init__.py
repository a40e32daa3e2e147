"""What a person looks at: tables, figures, and the pages that compare runs and find best rates. Nothing is computed here."""

from lightning_bsl.report.figures import plot_comparison, plot_plan, plot_run
from lightning_bsl.report.page import write_report
from lightning_bsl.report.surge_page import surge_commands, surge_summary, surge_table, write_surge_report
from lightning_bsl.report.tables import bound_line, compare_table, console, megatron_line, plan_table, run_table, theory_table

__all__ = [
    "bound_line",
    "compare_table",
    "console",
    "megatron_line",
    "plan_table",
    "plot_comparison",
    "plot_plan",
    "plot_run",
    "run_table",
    "surge_commands",
    "surge_summary",
    "surge_table",
    "theory_table",
    "write_report",
    "write_surge_report",
]
