"""Figures, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bsl.report.run import Row, curve, epoch_ends
from lightning_bsl.schedules import JointSchedule, Plan, Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BATCH, _RATE, _TRAIN, _VAL = "#1f6fb4", "#d1601f", "#7a7a7a", "#2a8f4f"


def plot_plan(plan: Plan, schedule: JointSchedule, path: str | Path) -> None:
    """Draw batch size and learning rate of a plan against epochs and against steps.

    Args:
        plan: The plan.
        schedule: What was planned.
        path: The PNG file to write.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    figure, axes = _figure(1, 2, (11, 4))
    epochs, steps, batch_sizes, rates = _trace(plan, schedule)
    for axis, xs, label in ((axes[0], epochs, "epochs"), (axes[1], steps, "optimizer steps")):
        axis.plot(xs, batch_sizes, color=_BATCH)
        _label(axis, label, "batch size", _BATCH)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        if None not in rates:
            twin = axis.twinx()
            twin.plot(xs, rates, color=_RATE)
            _label(twin, label, "learning rate", _RATE)
            twin.set_ylim(bottom=0)
    figure.suptitle(f"{plan.epochs:g} epochs, {plan.steps:,} steps, {plan.samples:,} samples")
    figure.savefig(path, dpi=120)


def plot_run(rows: list[Row], path: str | Path) -> None:
    """Draw a run: batch size, learning rate, losses, accuracy, and what was measured, against the samples it consumed.

    Args:
        rows: The run's metrics.
        path: The PNG file to write.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    measured = {"full_gradient_norm": "full gradient norm", "gradient_noise_scale": "gradient noise scale"}
    measured = {name: label for name, label in measured.items() if any(name in row for row in rows)}
    figure, axes = _figure(3 if measured else 2, 2, (11, 10.5 if measured else 7))
    (batch, rate), (loss, accuracy), *more = axes
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
    accuracy.plot(*curve(rows, "val/accuracy"), color=_VAL, marker=".")
    for axis, name in ((batch, "batch size"), (rate, "learning rate"), (loss, "loss"), (accuracy, "validation accuracy")):
        _label(axis, "samples", name, "black")
    for axis, (name, label) in zip(more[0] if more else (), measured.items()):
        axis.plot(*curve(rows, name), color=_TRAIN, marker=".")
        _label(axis, "samples", label, "black")
        axis.set_yscale("log")
        if name == "full_gradient_norm" and any("threshold" in row for row in rows):
            axis.step(*curve(rows, "threshold"), where="pre", color=_BATCH, label="threshold")
            axis.legend()
    if len(measured) == 1:
        more[0][1].set_visible(False)
    figure.savefig(path, dpi=120)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'lightning_bsl[report]'") from error
    figure = Figure(figsize=size, layout="constrained")  # without pyplot: no window, no global state
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _trace(plan: Plan, schedule: JointSchedule) -> tuple[list[float], list[float], list[int], list[float | None]]:
    """Epochs, steps, batch size and learning rate along the plan: both ends of every stage, and the curve in between."""
    epochs: list[float] = []
    steps: list[float] = []
    batch_sizes: list[int] = []
    rates: list[float | None] = []
    step, samples = 0, 0
    for stage in plan.stages:
        points = {0.0, 1.0} if stage.lr == stage.last_lr else {i / 100 for i in range(101)}
        for share in sorted(points):
            at = min(int(share * stage.steps), stage.steps - 1)
            epoch = stage.first_epoch + stage.epochs * at / stage.steps
            clock = Progress(int(epoch + 1e-6), step + at, samples + at * stage.batch_size, plan.horizon)
            epochs.append(stage.first_epoch + share * stage.epochs)
            steps.append(step + share * stage.steps)
            batch_sizes.append(stage.batch_size)
            rates.append(schedule.lr_at(clock, stage.batch_size))
        step, samples = step + stage.steps, samples + stage.samples
    return epochs, steps, batch_sizes, rates


def _label(axis: Axes, x: str, y: str, color: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y, color=color)
    axis.grid(alpha=0.25)
