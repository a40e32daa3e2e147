"""Figures of a plan, of a run and of groups of runs, as PNG files. They need matplotlib, the ``report`` extra."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_bsl.report.markup import Figure
from lightning_bsl.runs.compare import band
from lightning_bsl.runs.find import METRICS, Group
from lightning_bsl.runs.logs import AXES
from lightning_bsl.runs.metrics import Row, curve, validated
from lightning_bsl.schedules import Plan
from lightning_bsl.theory import BoundConstants, bound_curve

_BATCH, _RATE, _TRAIN, _VAL = "#1f6fb4", "#d1601f", "#7a7a7a", "#2a8f4f"
# of groups: Okabe and Ito's, and three of Tol's
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d", "#882255", "#999933", "#44aa99")
_DASHES = ("solid", "dashdot", "dotted", (0, (8, 2)))
_STEPS = {"batch_size": "batch size", "lr": "learning rate"}  # drawn as steps, which a mean would smear


def plot_plan(plan: Plan, path: str | Path, constants: BoundConstants | None = None) -> None:
    """Draw a plan: batch size and learning rate, and what the bound of Umeda & Iiduka 2025, arXiv 2409.08770, says of them.

    Args:
        plan: The plan.
        path: The PNG file to write.
        constants: Of the problem; with them the bound is drawn too.
    """
    knows_rates, trace = plan.stages[0].lr is not None, _trace(plan)
    figure, axes = figure_with_axes(1 + knows_rates, 3 if constants else 2, (11, 7.5 if knows_rates else 4))
    top = axes[0] if knows_rates else axes
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
    figure, (top, bottom) = figure_with_axes(2, 3 if constants else 2, (14 if constants else 11, 7.5))
    for name, plan in plans.items():
        trace = _trace(plan)
        (line,) = top[0].plot(trace.samples, trace.batch_size, label=name)
        top[1].plot(trace.samples, trace.lr)
        _plot_terms(bottom, plan, [line.get_color()] * 3, constants)
    _powers_of_two(top[0])
    top[0].legend()
    for axis, name in zip(top, _STEPS.values()):
        label(axis, "samples", name)
    for axis in top[2:]:
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
    batch, rate, loss, quality, *more = axes.flat
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
    for axis, name in zip((batch, rate, loss, quality), (*_STEPS.values(), "loss", metric)):
        label(axis, "samples", name.replace("val/", "validation "))
    for axis, name in zip(more, measured):
        axis.plot(*curve(rows, name), color=_TRAIN, marker=".")
        label(axis, "samples", name.replace("_", " "))
        axis.set_yscale("log")
        if name == "full_gradient_norm" and any("threshold" in row for row in rows):
            axis.step(*curve(rows, "threshold"), where="pre", color=_BATCH, label="threshold")
            axis.legend()
        if name == "full_gradient_norm" and bound:
            axis.plot(*zip(*bound), color=_RATE, linestyle="dashed", label="bound on the least so far (arXiv 2409.08770)")
            axis.legend()
    for axis in more[len(measured) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)


def plot_groups(groups: Sequence[Group], folder: Path) -> list[Figure]:
    """Draw each metric against each axis, and batch size and learning rate against samples, as PNG files.

    A line is the mean over a group's runs, its band goes from the least to the largest; a thin dashed line is a run that has
    not ended.
    """
    figures = []
    for metric, axis in [(metric, axis) for axis in AXES for metric in METRICS] + [(metric, "samples") for metric in _STEPS]:
        if any(len(run.curve(metric, axis)[0]) for group in groups for run in group.runs):
            file, name = folder / f"{metric.replace('/', '_')}-{axis}.png", (METRICS | _STEPS)[metric]
            columns = 2 if max(len(group.name) for group in groups) <= 20 else 1
            # small, so that the letters are large enough on a phone, which shows it 350 px wide
            figure, axes = figure_with_axes(1, 1, (4.4, 3.0 + 0.19 * math.ceil(len(groups) / columns)))
            values = [value for i, group in enumerate(groups) for value in _plot_group(axes, group, metric, axis, i)]
            _scale(axes, metric, min(values), max(values))
            axes.set_xlim(left=0)
            label(axes, AXES[axis], name)
            save_small(figure, file, columns, fontsize=9)
            figures.append(Figure(file, metric, axis, f"{name} against {AXES[axis]}"))
    return figures


def color_of(index: int) -> str:
    """The colour of the group of that index."""
    return _COLORS[index % len(_COLORS)]


def figure_with_axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure of ``rows`` by ``columns`` axes, without pyplot: no window, no global state."""
    try:
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'lightning_bsl[report]'") from error
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_small(figure: Any, file: Path, columns: int = 2, fontsize: int = 8) -> None:
    """Write a small figure, with a legend above its axes if something in them has a name."""
    if figure.axes[0].get_legend_handles_labels()[0]:
        legend = figure.legend(loc="outside upper center", ncols=columns, fontsize=fontsize, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name with dollars is no formula
    figure.savefig(file, dpi=190)


def label(axis: Any, x: str, y: str, color: str = "black", grid: bool = True) -> None:
    """Name both axes."""
    axis.set_xlabel(x)
    axis.set_ylabel(y, color=color)
    if grid:
        axis.grid(alpha=0.25)


def log_ticks(axis: Any, subs: Sequence[float] = ()) -> None:
    """A logarithmic axis, with plain numbers at ``subs`` times the powers of 10; by default as many as there is room for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=subs or ((1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7))))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def count_ticks(axes: Any) -> None:
    """A few plain numbers on the x-axis, which counts something."""
    axes.locator_params(axis="x", nbins=6)
    if axes.get_xlim()[1] >= 1e4:
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _powers_of_two(axis: Any) -> None:
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")


def _plot_terms(axes: Any, plan: Plan, colors: Sequence[str], constants: BoundConstants | None) -> None:
    """B_T, V_T and, with constants, the bound against samples."""
    terms = bound_curve(plan)
    lines = {
        "B_T (bias)": [(at.samples, at.bias) for at in terms],
        "V_T (variance)": [(at.samples, at.variance) for at in terms],
    }
    if constants:
        valid = [(at.samples, at.bound(constants)) for at in terms if constants.allows(at.max_lr)]
        lines["bound on min ||grad f||^2 (arXiv 2409.08770)"] = valid
    for axis, color, (name, points) in zip(axes, colors, lines.items()):
        axis.semilogy(*zip(*points) if points else ((), ()), color=color)
        label(axis, "samples", name)


def _trace(plan: Plan) -> Any:
    """Along a plan: both ends of every stage, and the curve in between."""
    points = []
    step, samples = 0, 0
    for stage, stretches in zip(plan.stages, plan.stretches):
        ends = list(itertools.accumulate(stretch.steps for stretch in stretches))
        for share in (0.0, 1.0) if stage.lr == stage.last_lr else [i / 100 for i in range(101)]:
            at = min(int(share * stage.steps), stage.steps - 1)
            stretch = stretches[index := bisect.bisect_right(ends, at)]
            behind = at - (ends[index] - stretch.steps)
            clock = stretch.start.advance(stretch.examples_of(behind), behind)
            x = stage.first_epoch + share * stage.epochs, step + share * stage.steps, samples + share * stage.samples
            points.append((*x, stage.batch_size, plan.schedule.lr_at(clock, stage.batch_size)))
        step, samples = step + stage.steps, samples + stage.samples
    return pd.DataFrame(points, columns=["epochs", "steps", "samples", "batch_size", "lr"])


def _plot_group(axes: Any, group: Group, metric: str, axis: str, index: int) -> list[float]:
    """Draw a group; returns the least and the largest value of each of its curves."""
    style: dict[str, Any] = {"color": color_of(index), "linestyle": _DASHES[index // len(_COLORS) % len(_DASHES)]}
    curves = [(run.ended, run.curve(metric, axis)) for run in group.runs]
    ended, running = ([curve for over, curve in curves if over is wanted and len(curve[0])] for wanted in (True, False))
    if ended and metric not in _STEPS:
        mean = band(ended)
        axes.plot(mean.index, mean["mean"], marker="." if len(mean) <= 40 else None, label=group.name, **style)
        if len(ended) > 1:
            axes.fill_between(mean.index, mean["min"], mean["max"], color=style["color"], alpha=0.18, linewidth=0)
    for i, (x, y) in enumerate(ended if metric in _STEPS else []):
        axes.step([0, *x], [y[0], *y], where="pre", label=None if i else group.name, **style)
    style |= {"linestyle": "dashed", "linewidth": 0.9, "drawstyle": "steps-pre" if metric in _STEPS else "default"}
    for i, (x, y) in enumerate(running):
        name = None if i or ended else f"{group.name} (unfinished)"
        axes.plot(x, y, marker="." if len(x) == 1 else None, label=name, **style)
    return [end for _, y in (*ended, *running) for end in (y.min(), y.max())]


def _scale(axes: Any, metric: str, lowest: float, highest: float) -> None:
    if metric == "batch_size":
        _powers_of_two(axes)
    elif metric == "lr":
        axes.set_ylim(bottom=0)
    elif metric != "val/accuracy" and lowest > 0 and highest > 3 * lowest:
        log_ticks(axes.yaxis, (1, 2, 5) if highest < 300 * lowest else (1,))
    count_ticks(axes)
