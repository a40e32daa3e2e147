"""Figures, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_bsl.runs.metrics import Row, curve, epoch_ends, validated
from lightning_bsl.schedules import Plan, Progress
from lightning_bsl.theory import BoundConstants, BoundTerms, bound_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BATCH, _RATE, _TRAIN, _VAL = "#1f6fb4", "#d1601f", "#7a7a7a", "#2a8f4f"


def plot_plan(plan: Plan, path: str | Path, constants: BoundConstants | None = None) -> None:
    """Draw a plan: batch size and learning rate, and what the bound of P1 says of them.

    Args:
        plan: The plan.
        path: The PNG file to write.
        constants: Of the problem; with them the bound is drawn too.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    knows_rates = plan.stages[0].lr is not None
    figure, axes = figure_with_axes(2 if knows_rates else 1, 3 if constants else 2, (11, 7.5 if knows_rates else 4))
    top = axes[0] if knows_rates else axes
    trace = _trace(plan)
    for axis, xs, label in ((top[0], trace.epochs, "epochs"), (top[1], trace.steps, "optimizer steps")):
        axis.plot(xs, trace.batch_sizes, color=_BATCH)
        _label(axis, label, "batch size", _BATCH)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        if knows_rates:
            twin = axis.twinx()
            twin.plot(xs, trace.rates, color=_RATE)
            _label(twin, label, "learning rate", _RATE)
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

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    figure, axes = figure_with_axes(2, 3 if constants else 2, (14 if constants else 11, 7.5))
    for name, plan in plans.items():
        trace = _trace(plan)
        (line,) = axes[0][0].plot(trace.samples, trace.batch_sizes, label=name)
        axes[0][1].plot(trace.samples, trace.rates)
        _plot_terms(axes[1], plan, [line.get_color()] * 3, constants)
    axes[0][0].set_yscale("log", base=2)
    axes[0][0].yaxis.set_major_formatter("{x:g}")
    axes[0][0].legend()
    for axis, label in zip(axes[0], ("batch size", "learning rate")):
        _label(axis, "samples", label, "black")
    for axis in axes[0][2:]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)


def _plot_terms(axes: Sequence[Axes], plan: Plan, colors: Sequence[str], constants: BoundConstants | None) -> None:
    """B_T, V_T and, with constants, the bound against samples."""
    terms = bound_curve(plan)
    lines: list[tuple[str, list[BoundTerms], Callable[[BoundTerms], float]]] = [
        ("B_T (bias)", terms, lambda each: each.bias),
        ("V_T (variance)", terms, lambda each: each.variance),
    ]
    if constants:
        valid = [each for each in terms if constants.allows(each.max_lr)]
        lines.append(("bound on min ||grad f||^2 (P1)", valid, lambda each: each.bound(constants)))
    for axis, color, (label, some, value) in zip(axes, colors, lines):
        axis.semilogy([each.samples for each in some], [value(each) for each in some], color=color)
        _label(axis, "samples", label, "black")


def plot_run(rows: list[Row], path: str | Path, bound: Sequence[tuple[float, float]] = ()) -> None:
    """Draw a run: batch size, learning rate, losses, accuracy or perplexity, and measurements, against the samples it consumed.

    Args:
        rows: The run's metrics.
        path: The PNG file to write.
        bound: The bound on the full gradient norm, as (samples, norm) pairs, drawn beside what was measured.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    measured = {"full_gradient_norm": "full gradient norm", "gradient_noise_scale": "gradient noise scale"}
    measured = {name: label for name, label in measured.items() if any(name in row for row in rows)}
    figure, axes = figure_with_axes(3 if measured else 2, 2, (11, 10.5 if measured else 7))
    (batch, rate), (loss, quality), *more = axes
    metric = validated(rows)
    ends = epoch_ends(rows)
    steps = [row for row in rows if "stage" not in row]  # the row of an advance says what comes next
    batch.step(*curve(steps, "batch_size"), where="pre", color=_BATCH)
    batch.set_yscale("log", base=2)
    batch.yaxis.set_major_formatter("{x:g}")
    rate.step(*curve(steps, "lr"), where="pre", color=_RATE)
    rate.set_ylim(bottom=0)
    loss.plot(*curve(ends, "train/loss"), color=_TRAIN, marker=".", label="training")
    loss.plot(*curve(rows, "val/loss"), color=_VAL, marker=".", label="validation")
    loss.set_yscale("log")
    loss.legend()
    quality.plot(*curve(rows, metric), color=_VAL, marker=".")
    if metric == "val/perplexity":
        quality.set_yscale("log")
    named = ((batch, "batch size"), (rate, "learning rate"), (loss, "loss"), (quality, metric.replace("val/", "validation ")))
    for axis, name in named:
        _label(axis, "samples", name, "black")
    for axis, (name, label) in zip(more[0] if more else (), measured.items()):
        axis.plot(*curve(rows, name), color=_TRAIN, marker=".")
        _label(axis, "samples", label, "black")
        axis.set_yscale("log")
        if name == "full_gradient_norm" and any("threshold" in row for row in rows):
            axis.step(*curve(rows, "threshold"), where="pre", color=_BATCH, label="threshold")
            axis.legend()
        if name == "full_gradient_norm" and bound:
            axis.plot(*zip(*bound), color=_RATE, linestyle="dashed", label="bound on the least so far (P1)")
            axis.legend()
    if len(measured) == 1:
        more[0][1].set_visible(False)
    figure.savefig(path, dpi=120)


def figure_with_axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure of ``rows`` by ``columns`` axes, without pyplot.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'lightning_bsl[report]'") from error
    figure = Figure(figsize=size, layout="constrained")  # without pyplot: no window, no global state
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


class _Trace(NamedTuple):
    """Along a plan: both ends of every stage, and the curve in between."""

    epochs: list[float]
    steps: list[float]
    samples: list[float]
    batch_sizes: list[int]
    rates: list[float | None]


def _trace(plan: Plan) -> _Trace:
    trace = _Trace([], [], [], [], [])
    step, samples = 0, 0
    for stage in plan.stages:
        points = {0.0, 1.0} if stage.lr == stage.last_lr else {i / 100 for i in range(101)}
        for share in sorted(points):
            at = min(int(share * stage.steps), stage.steps - 1)
            epoch = stage.first_epoch + stage.epochs * at / stage.steps
            clock = Progress(int(epoch + 1e-6), step + at, samples + at * stage.batch_size, plan.horizon)
            trace.epochs.append(stage.first_epoch + share * stage.epochs)
            trace.steps.append(step + share * stage.steps)
            trace.samples.append(samples + share * stage.samples)
            trace.batch_sizes.append(stage.batch_size)
            trace.rates.append(plan.schedule.lr_at(clock, stage.batch_size))
        step, samples = step + stage.steps, samples + stage.samples
    return trace


def _label(axis: Axes, x: str, y: str, color: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y, color=color)
    axis.grid(alpha=0.25)
