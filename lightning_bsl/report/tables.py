"""Tables for the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from lightning_bsl.report.run import Row, curve
from lightning_bsl.schedules import Plan, Stage

_MOST_ROWS = 30


def console() -> Console:
    """The terminal, or, in a file or a pipe, lines wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 120)


def plan_table(plan: Plan) -> Table:
    """A row for each stage of a plan, and their sum.

    Where there are many stages (a rate that falls every epoch), those of one batch size share a row.
    """
    table = _table("stage", "from epoch", "epochs", "steps", "samples", "batch", "rate")
    for stage in _rows(plan):
        table.add_row(*_cells(stage, f"{stage.first_epoch:g}"))
    table.add_section()
    table.add_row("all", "", f"{plan.epochs:g}", f"{plan.steps:,}", f"{plan.samples:,}", "", "")
    return table


def run_table(plan: Plan, rows: list[Row]) -> Table:
    """A row for each stage of a plan that a run has finished, with the training loss and validation accuracy at its end.

    Args:
        plan: The run's plan.
        rows: The run's metrics.
    """
    table = _table("stage", "epochs", "steps", "samples", "batch", "rate", "train loss", "val acc")
    start, end = 0, 0
    reached = max((row["samples"] for row in rows if "samples" in row), default=0)
    for stage in _rows(plan):
        start, end = end, end + stage.samples
        if start >= reached:
            break
        cells = _cells(stage)
        for name in ("train/loss", "val/accuracy"):
            values = [y for x, y in zip(*curve(rows, name)) if start < x <= end]
            cells.append(f"{values[-1]:.4f}" if values else "")
        table.add_row(*cells)
    return table


def _rows(plan: Plan) -> list[Stage]:
    if len(plan.stages) <= _MOST_ROWS:
        return list(plan.stages)
    rows: list[Stage] = []
    for stage in plan.stages:
        if rows and rows[-1].batch_size == stage.batch_size:
            rows[-1] = rows[-1].join(stage)
        else:
            rows.append(replace(stage, stage=len(rows)))
    return rows


def _cells(stage: Stage, *first: str) -> list[str]:
    rate = "" if stage.lr is None or stage.last_lr is None else f"{stage.lr:.4g}"
    if rate and stage.last_lr != stage.lr:
        rate += f" .. {stage.last_lr:.4g}"
    return [
        str(stage.stage), *first, f"{stage.epochs:g}", f"{stage.steps:,}", f"{stage.samples:,}", f"{stage.batch_size:,}", rate
    ]  # fmt: skip


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
