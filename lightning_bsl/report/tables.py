"""Tables for the terminal."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from lightning_bsl.runs.metrics import Row, curve, validated
from lightning_bsl.schedules import Plan, Stage
from lightning_bsl.theory import BoundConstants, BoundTerms, asymptotic_rates, bound_terms, stalls

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


def theory_table(plan: Plan, constants: BoundConstants | None = None) -> Table:
    """What the bound of P1 says of a plan, from its start to the end of each stage: B_T, V_T and, with constants, the bound.

    The last column marks stages in which the rate grew too fast for the batch (gamma^2 >= delta), the rate is not below 2/L,
    or B_T stalls.

    Args:
        plan: The plan; its learning rates must not be left to the module.
        constants: Of the problem.
    """
    table = _table("stage", "batch", "rate", "rate / batch", "B_T", "V_T", *(["bound"] if constants else []), "")
    stages = _rows(plan)
    terms = iter(bound_terms(plan))
    summed = [_sum(next(terms) for _ in range(number)) for number in _sizes(plan, stages)]
    marks = _marks(stages, summed, constants)
    for stage, total, mark in zip(stages, itertools.accumulate(summed), marks):
        index, *_, batch, rate = _cells(stage)
        ratio = f"{(stage.lr or 0) / stage.batch_size:.3g}"
        bound = [_bound(total, constants)] if constants else []
        table.add_row(index, batch, rate, ratio, f"{total.bias:.3e}", f"{total.variance:.3e}", *bound, mark)
    if rates := asymptotic_rates(plan.schedule):
        table.caption = f"P1 ({rates.case}), stages of equal steps: B_T {rates.bias}, V_T {rates.variance}"
    return table


def compare_table(plans: Mapping[str, Plan], constants: BoundConstants | None = None) -> Table:
    """Several plans over the same samples, a row for each.

    Args:
        plans: By name.
        constants: Of the problem.

    Raises:
        ValueError: The plans differ in their samples.
    """
    if len({plan.samples for plan in plans.values()}) > 1:
        taken = ", ".join(f"{name} {plan.samples:,}" for name, plan in plans.items())
        raise ValueError(f"plans are compared at equal samples, but these take {taken}; bound them in epochs, not in steps")
    table = _table(
        "scheduler", "case", "steps", "last batch", "peak rate", "B_T", "V_T", *(["bound"] if constants else []), "stalled"
    )
    for name, plan in plans.items():
        terms = bound_terms(plan)
        total, rates = _sum(terms), asymptotic_rates(plan.schedule)
        stalled = stalls(terms)
        table.add_row(
            name,
            f"({rates.case})" if rates else "",
            f"{plan.steps:,}",
            f"{plan.stages[-1].batch_size:,}",
            f"{total.max_lr:.4g}",
            f"{total.bias:.3e}",
            f"{total.variance:.3e}",
            *([_bound(total, constants)] if constants else []),
            f"{sum(stalled)} of {len(stalled)}",
        )
    samples = next(iter(plans.values())).samples
    table.caption = f"{samples:,} samples each; case of P1; stalled: stages that add next to nothing to 1 / B_T"
    return table


def run_table(plan: Plan, rows: list[Row]) -> Table:
    """A row for each stage of a plan that a run has finished, with the training loss and what was validated at its end.

    Args:
        plan: The run's plan.
        rows: The run's metrics.
    """
    metric = validated(rows)
    heading = {"val/accuracy": "val acc", "val/perplexity": "val ppl"}[metric]
    table = _table("stage", "epochs", "steps", "samples", "batch", "rate", "train loss", heading)
    start, end = 0, 0
    reached = max((row["samples"] for row in rows if "samples" in row), default=0)
    for stage in _rows(plan):
        start, end = end, end + stage.samples
        if start >= reached:
            break
        cells = _cells(stage)
        for name in ("train/loss", metric):
            values = [y for x, y in zip(*curve(rows, name)) if start < x <= end]
            cells.append(f"{values[-1]:.4f}" if values else "")
        table.add_row(*cells)
    return table


def bound_line(rows: list[Row], bounds: list[tuple[float, float]]) -> str | None:
    """The least full gradient norm that a run measured, beside its bound; ``None`` where either is missing.

    Args:
        rows: The run's metrics.
        bounds: As of [`gradient_norm_bounds`][lightning_bsl.theory.gradient_norm_bounds].
    """
    samples, norms = curve(rows, "full_gradient_norm")
    passed = [norm for at, norm in bounds if samples and at <= samples[-1]]
    if not passed:
        return None
    return f"min ||grad f||^2: {min(norms) ** 2:.3e} measured, at most {min(passed) ** 2:.3e} in expectation (P1)"


def _sum(terms: Iterable[BoundTerms]) -> BoundTerms:
    *_, total = itertools.accumulate(terms)
    return total


def _sizes(plan: Plan, rows: list[Stage]) -> list[int]:
    """How many stages of a plan each row is made of."""
    ends = list(itertools.accumulate(stage.steps for stage in plan.stages))
    found = [0, *(ends.index(end) + 1 for end in itertools.accumulate(row.steps for row in rows))]
    return [after - before for before, after in itertools.pairwise(found)]


def _bound(total: BoundTerms, constants: BoundConstants) -> str:
    return f"{total.bound(constants):.3e}" if constants.allows(total.max_lr) else "rate >= 2/L"


def _marks(stages: list[Stage], terms: list[BoundTerms], constants: BoundConstants | None) -> list[str]:
    found: list[list[str]] = [["B_T stalls"] if stalled else [] for stalled in stalls(terms)]
    for (before, after), marks in zip(itertools.pairwise(stages), found[1:]):
        delta, gamma = after.batch_size / before.batch_size, (after.lr or 0) / (before.last_lr or 1)
        if delta > 1 and gamma > 1 and gamma**2 >= delta * (1 - 1e-9):
            marks.append("gamma^2 >= delta")
    for each, marks in zip(terms, found):
        if constants and not constants.allows(each.max_lr):
            marks.append("rate >= 2/L")
    return [", ".join(marks) for marks in found]


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
