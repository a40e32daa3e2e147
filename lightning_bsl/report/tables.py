"""Tables for the terminal: plans, what the bound of Umeda & Iiduka 2025, arXiv 2409.08770, says of them, and runs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Literal

from rich.console import Console
from rich.table import Column, Table

from lightning_bsl.runs.metrics import Row, curve, validated
from lightning_bsl.schedules import Plan, Stage, to_megatron
from lightning_bsl.schedules.plan import ConstantsAt
from lightning_bsl.theory import BoundConstants, BoundTerms, asymptotic_rates, bound_terms, stalls

_MOST_ROWS = 30


def console() -> Console:
    """The terminal, or, in a file or a pipe, lines wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 120)


def plan_table(plan: Plan, constants_at: ConstantsAt = lambda batch_size: {}) -> Table:
    """A row for each stage of a plan, and their sum.

    Where there are many stages (a rate that falls every epoch), those of one batch size share a row.

    Args:
        plan: The plan.
        constants_at: For further columns: returns the optimizer's constants for a batch size, by name.
    """
    names = constants_at(plan.stages[0].batch_size)
    table = _table("stage", "from epoch", "epochs", "steps", "samples", "batch", "rate", *names)
    for stage, _ in _rows(plan):
        number, *cells = _cells(stage)
        constants = (f"{value:.6g}" for value in constants_at(stage.batch_size).values())
        table.add_row(number, f"{stage.first_epoch:g}", *cells, *constants)
    table.add_section()
    table.add_row("all", "", f"{plan.epochs:g}", f"{plan.steps:,}", f"{plan.samples:,}", "", "")
    return table


def megatron_line(plan: Plan) -> str | None:
    """The batch sizes in the words of Megatron-LM; ``None`` for a constant batch, or where they count tokens."""
    if len({stage.batch_size for stage in plan.stages}) == 1 or plan.stretches[0][0].sizes is not None:
        return None
    unit: Literal["tokens", "samples"] = "samples" if plan.horizon.tokens_per_sample is None else "tokens"
    return f'in {unit}, for Megatron-LM: --step-batch-size-schedule "{to_megatron(plan, unit)}"'


def theory_table(plan: Plan, constants: BoundConstants | None = None) -> Table:
    """What the bound says of a plan, from its start to the end of each stage: B_T, V_T and, with constants, the bound.

    The last column marks stages in which the rate grew too fast for the batch (gamma^2 >= delta), the rate is not below 2/L,
    or B_T stalls.

    Args:
        plan: The plan; its learning rates must not be left to the module.
        constants: Of the problem.
    """
    table = _table("stage", "batch", "rate", "rate / batch", "B_T", "V_T", *["bound"] * bool(constants), "")
    stages, terms = [stage for stage, _ in _rows(plan)], bound_terms(plan)
    sums = [reduce(add, terms[part]) for _, part in _rows(plan)]
    rows = zip([None, *stages], stages, sums, itertools.accumulate(sums), stalls(sums))
    for before, stage, own, total, stalled in rows:
        number, *_, batch, rate = _cells(stage)
        marks = {
            "B_T stalls": stalled,
            "gamma^2 >= delta": before is not None and _too_fast(before, stage),
            "rate >= 2/L": constants is not None and not constants.allows(own.max_lr),
        }
        mark = ", ".join(name for name, holds in marks.items() if holds)
        table.add_row(number, batch, rate, f"{(stage.lr or 0) / stage.batch_size:.3g}", *_terms(total, constants), mark)
    if rates := asymptotic_rates(plan.schedule):
        table.caption = f"arXiv 2409.08770 ({rates.case}), stages of equal steps: B_T {rates.bias}, V_T {rates.variance}"
    return table


def compare_table(plans: Mapping[str, Plan], constants: BoundConstants | None = None) -> Table:
    """Several plans over the same samples, a row for each.

    Args:
        plans: By name.
        constants: Of the problem.

    Raises:
        ValueError: The plans differ in their samples.
    """
    if len(samples := {plan.samples for plan in plans.values()}) > 1:
        taken = ", ".join(f"{name} {plan.samples:,}" for name, plan in plans.items())
        raise ValueError(f"plans are compared at equal samples, but these take {taken}; bound them in epochs, not in steps")
    columns = (
        "scheduler",
        "case",
        "steps",
        "last batch",
        "peak rate",
        "saved",
        "B_T",
        "V_T",
        *["bound"] * bool(constants),
        "stalled",
    )
    table = _table(*columns)
    first, steps = next((name, plan.steps) for name, plan in plans.items())
    for name, plan in plans.items():
        terms, rates = bound_terms(plan), asymptotic_rates(plan.schedule)
        total, stalled = reduce(add, terms), stalls(terms)
        sizes = f"{plan.steps:,}", f"{plan.stages[-1].batch_size:,}", f"{total.max_lr:.4g}", f"{1 - plan.steps / steps:.1%}"
        case = f"({rates.case})" if rates else ""
        table.add_row(name, case, *sizes, *_terms(total, constants), f"{sum(stalled)} of {len(stalled)}")
    stalled_means = "stalled: stages that add next to nothing to 1 / B_T"
    saved = f"saved: of the steps of {first}"
    table.caption = f"{max(samples):,} samples each; case of arXiv 2409.08770; {saved}; {stalled_means}"
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
    start, reached = 0, max((row["samples"] for row in rows if "samples" in row), default=0)
    for stage, _ in _rows(plan):
        if start >= reached:
            break
        end = start + stage.samples
        ends = [[y for x, y in zip(*curve(rows, name)) if start < x <= end][-1:] for name in ("train/loss", metric)]
        table.add_row(*_cells(stage), *("".join(f"{value:.4f}" for value in values) for values in ends))
        start = end
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
    most = f"at most {min(passed) ** 2:.3e} in expectation (arXiv 2409.08770)"
    return f"min ||grad f||^2: {min(norms) ** 2:.3e} measured, {most}"


def _rows(plan: Plan) -> list[tuple[Stage, slice]]:
    """The stages, those of one batch size joined where they are many, and which of the plan's stages each is made of."""
    many, rows, start = len(plan.stages) > _MOST_ROWS, list[tuple[Stage, slice]](), 0
    for _, group in itertools.groupby(plan.stages, lambda stage: stage.batch_size if many else stage.stage):
        part = list(group)
        rows.append((replace(reduce(Stage.join, part), stage=len(rows)), slice(start, start + len(part))))
        start += len(part)
    return rows


def _too_fast(before: Stage, after: Stage) -> bool:
    delta, gamma = after.batch_size / before.batch_size, (after.lr or 0) / (before.last_lr or 1)
    return delta > 1 and gamma > 1 and gamma**2 >= delta * (1 - 1e-9)


def _terms(total: BoundTerms, constants: BoundConstants | None) -> list[str]:
    terms = [f"{total.bias:.3e}", f"{total.variance:.3e}"]
    if constants:
        terms.append(f"{total.bound(constants):.3e}" if constants.allows(total.max_lr) else "rate >= 2/L")
    return terms


def _cells(stage: Stage) -> list[str]:
    rate = "" if stage.lr is None or stage.last_lr is None else f"{stage.lr:.4g}"
    if rate and stage.last_lr != stage.lr:
        rate += f" .. {stage.last_lr:.4g}"
    return [f"{stage.stage}", f"{stage.epochs:g}", f"{stage.steps:,}", f"{stage.samples:,}", f"{stage.batch_size:,}", rate]


def _table(*columns: str) -> Table:
    return Table(*(Column(name, justify="right", no_wrap=True) for name in columns))
