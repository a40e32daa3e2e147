"""Figures of a plan and of a run, as PNG files. They need matplotlib, the ``report`` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_bsl.runs.metrics import Row, curve, validated
from lightning_bsl.schedules import Plan, Progress
from lightning_bsl.theory import BoundConstants, bound_curve

_BATCH, _RATE, _TRAIN, _VAL = "#1f6fb4", "#d1601f", "#7a7a7a", "#2a8f4f"


def plot_plan(plan: Plan, path: str | Path, constants: BoundConstants | None = None) -> None:
    """Draw a plan: batch size and learning rate, and what the bound of Umeda & Iiduka 2025, arXiv 2409.08770, says of them.

    Args:
        plan: The plan.
        path: The PNG file to write.
        constants: Of the problem; with them the bound is drawn too.
    """
    knows_rates = plan.stages[0].lr is not None
    figure, axes = figure_with_axes(2 if knows_rates else 1, 3 if constants else 2, (11, 7.5 if knows_rates else 4))
    top = axes[0] if knows_rates else axes
    trace = _trace(plan)
    for axis, xs, unit in ((top[0], trace.epochs, "epochs"), (top[1], trace.steps, "optimizer steps")):
        axis.plot(xs, trace.batch_size, color=_BATCH)
        label(axis, unit, "batch size", _BATCH)
        _powers_of_two(axis)
        if knows_rates:
            twin = axis.twinx()
            twin.plot(xs, trace.lr, color=_RATE)
            label(twin, unit, "learning rate", _RATE)
            twin.set_ylim(bottom=0)
    if knows_rates:
        _plot_terms(axes[1], plan, (_BATCH, _RATE, _VAL), constants)
    for axis in top[2:]:
        axis.set_visible(False)
    figure.suptitle(f"{plan.epochs:g} epochs, {plan.steps:,} steps, {plan.samples:,} samples")
    figure.savefig(path, dpi=120)


def plot_comparison(plans: Mapping[str, Plan], path: str | Path, constants: BoundConstants | None = None) -> None:
    """Draw several plans over the same samples: batch size, learning rate, B_T and V_T, and with constants the bound.

    Args:
        plans: By name.
        path: The PNG file to write.
        constants: Of the problem.
    """
    figure, axes = figure_with_axes(2, 3 if constants else 2, (14 if constants else 11, 7.5))
    for name, plan in plans.items():
        trace = _trace(plan)
        (line,) = axes[0][0].plot(trace.samples, trace.batch_size, label=name)
        axes[0][1].plot(trace.samples, trace.lr)
        _plot_terms(axes[1], plan, [line.get_color()] * 3, constants)
    _powers_of_two(axes[0][0])
    axes[0][0].legend()
    for axis, name in zip(axes[0], ("batch size", "learning rate")):
        label(axis, "samples", name)
    for axis in axes[0][2:]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)


def plot_run(rows: list[Row], path: str | Path, bound: Sequence[tuple[float, float]] = ()) -> None:
    """Draw a run: batch size, learning rate, losses, accuracy or perplexity, and measurements, against the samples it consumed.

    Args:
        rows: The run's metrics.
        path: The PNG file to write.
        bound: The bound on the full gradient norm, as (samples, norm) pairs, drawn beside what was measured.
    """
    measured = [name for name in ("full_gradient_norm", "gradient_noise_scale") if any(name in row for row in rows)]
    figure, axes = figure_with_axes(3 if measured else 2, 2, (11, 10.5 if measured else 7))
    (batch, rate), (loss, quality), *more = axes
    metric = validated(rows)
    steps = [row for row in rows if "stage" not in row]  # the row of an advance says what comes next
    ends = list({row["epoch"]: row for row in rows if "train/loss" in row}.values())  # the last row of each epoch
    batch.step(*curve(steps, "batch_size"), where="pre", color=_BATCH)
    _powers_of_two(batch)
    rate.step(*curve(steps, "lr"), where="pre", color=_RATE)
    rate.set_ylim(bottom=0)
    loss.plot(*curve(ends, "train/loss"), color=_TRAIN, marker=".", label="training")
    loss.plot(*curve(rows, "val/loss"), color=_VAL, marker=".", label="validation")
    loss.set_yscale("log")
    loss.legend()
    quality.plot(*curve(rows, metric), color=_VAL, marker=".")
    if metric == "val/perplexity":
        quality.set_yscale("log")
    for axis, name in zip((batch, rate, loss, quality), ("batch size", "learning rate", "loss", metric)):
        label(axis, "samples", name.replace("val/", "validation "))
    for axis, name in zip(more[0] if more else (), measured):
        axis.plot(*curve(rows, name), color=_TRAIN, marker=".")
        label(axis, "samples", name.replace("_", " "))
        axis.set_yscale("log")
        if name == "full_gradient_norm" and any("threshold" in row for row in rows):
            axis.step(*curve(rows, "threshold"), where="pre", color=_BATCH, label="threshold")
            axis.legend()
        if name == "full_gradient_norm" and bound:
            axis.plot(*zip(*bound), color=_RATE, linestyle="dashed", label="bound on the least so far (arXiv 2409.08770)")
            axis.legend()
    if len(measured) == 1:
        more[0][1].set_visible(False)
    figure.savefig(path, dpi=120)


def figure_with_axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure of ``rows`` by ``columns`` axes, without pyplot: no window, no global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'lightning_bsl[report]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def label(axis: Any, x: str, y: str, color: str = "black", grid: bool = True) -> None:
    """Name both axes."""
    axis.set_xlabel(x)
    axis.set_ylabel(y, color=color)
    if grid:
        axis.grid(alpha=0.25)


def _powers_of_two(axis: Any) -> None:
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")


def _plot_terms(axes: Any, plan: Plan, colors: Sequence[str], constants: BoundConstants | None) -> None:
    """B_T, V_T and, with constants, the bound against samples."""
    terms = bound_curve(plan)
    lines = [
        ("B_T (bias)", [(at.samples, at.bias) for at in terms]),
        ("V_T (variance)", [(at.samples, at.variance) for at in terms]),
    ]
    if constants:
        valid = [(at.samples, at.bound(constants)) for at in terms if constants.allows(at.max_lr)]
        lines.append(("bound on min ||grad f||^2 (arXiv 2409.08770)", valid))
    for axis, color, (name, points) in zip(axes, colors, lines):
        axis.semilogy(*zip(*points) if points else ((), ()), color=color)
        label(axis, "samples", name)


def _trace(plan: Plan) -> Any:
    """Along a plan: both ends of every stage, and the curve in between."""
    points = []
    step, samples = 0, 0
    for stage in plan.stages:
        for share in (0.0, 1.0) if stage.lr == stage.last_lr else [i / 100 for i in range(101)]:
            at = min(int(share * stage.steps), stage.steps - 1)
            epoch = int(stage.first_epoch + stage.epochs * at / stage.steps + 1e-6)
            clock = Progress(epoch, step + at, samples + at * stage.batch_size, plan.horizon)
            x = stage.first_epoch + share * stage.epochs, step + share * stage.steps, samples + share * stage.samples
            points.append((*x, stage.batch_size, plan.schedule.lr_at(clock, stage.batch_size)))
        step, samples = step + stage.steps, samples + stage.samples
    return pd.DataFrame(points, columns=["epochs", "steps", "samples", "batch_size", "lr"])
