"""Figures of groups of runs, one line for each group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_bsl.report.figures import figure_with_axes
from lightning_bsl.runs.find import AXES, METRICS, Group

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d", "#882255", "#999933", "#44aa99")
# Okabe and Ito's, and three of Tol's
_DASHES = ("solid", "dashdot", "dotted", (0, (8, 2)))
_POINTS = 200


class Figure(NamedTuple):
    """A figure that was drawn.

    Args:
        file: The PNG file.
        metric: What it shows.
        axis: Against what.
        title: What it shows, in words.
    """

    file: Path
    metric: str
    axis: str
    title: str


class Band(NamedTuple):
    """Runs on a common grid: their mean, least and largest value."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def band(curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], points: int = _POINTS) -> Band:
    """The mean and the range of some curves, over the stretch that all of them cover, interpolated in between.

    Args:
        curves: Each as x, which grows, and y.
        points: Of the grid, where the curves are not at the same x.

    Example:
        >>> one, other = (np.array([0.0, 2.0]), np.array([1.0, 3.0])), (np.array([0.0, 1.0, 2.0]), np.array([1.0, 4.0, 5.0]))
        >>> band([one, other], points=3).mean.tolist()
        [1.0, 3.0, 4.0]
    """
    first = curves[0][0]
    if all(len(x) == len(first) and (x == first).all() for x, _ in curves):
        grid = first
    else:
        grid = np.linspace(
            max(x[0] for x, _ in curves), max(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)), points
        )
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    return Band(grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def plot_groups(groups: Sequence[Group], folder: str | Path) -> list[Figure]:
    """Draw each metric against each axis, and batch size and learning rate against samples, as PNG files.

    A line is the mean over a group's runs, its band goes from the least to the largest; a thin dashed line is a run that has
    not ended.

    Args:
        groups: The groups.
        folder: Where to write.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    figures = []
    wanted = [(metric, axis) for axis in AXES for metric in METRICS] + [("batch_size", "samples"), ("lr", "samples")]
    labels = METRICS | {"batch_size": "batch size", "lr": "learning rate"}
    for metric, axis in wanted:
        if any(len(run.curve(metric, axis)[0]) for group in groups for run in group.runs):
            file = Path(folder) / f"{metric.replace('/', '_')}-{axis}.png"
            _plot(groups, metric, axis, labels[metric], file)
            figures.append(Figure(file, metric, axis, f"{labels[metric]} against {AXES[axis]}"))
    return figures


def color_of(index: int) -> str:
    """The colour of the group of that index."""
    return _COLORS[index % len(_COLORS)]


def _plot(groups: Sequence[Group], metric: str, axis: str, label: str, file: Path) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    columns = 2 if max(len(group.name) for group in groups) <= 20 else 1
    # small, so that the letters are large enough on a phone, which shows it 350 px wide
    figure, axes = figure_with_axes(1, 1, (4.4, 3.0 + 0.19 * math.ceil(len(groups) / columns)))
    lowest, highest = math.inf, -math.inf
    for index, group in enumerate(groups):
        color, dashes = color_of(index), _DASHES[index // len(_COLORS) % len(_DASHES)]
        ended = [curve for run in group.counted if run.ended and len((curve := run.curve(metric, axis))[0])]
        running = [curve for run in group.unfinished if len((curve := run.curve(metric, axis))[0])]
        for _, y in (*ended, *running):
            lowest, highest = min(lowest, y.min()), max(highest, y.max())
        name: str | None = group.name if ended else f"{group.name} (unfinished)"
        if metric in ("batch_size", "lr"):
            for x, y in ended:  # steps, which a mean would smear
                axes.step([0, *x], [y[0], *y], where="pre", color=color, linestyle=dashes, label=name)
                name = None
        elif ended:
            mean = band(ended)
            marker = "." if len(mean.x) <= 40 else None
            axes.plot(mean.x, mean.mean, color=color, linestyle=dashes, marker=marker, label=name)
            if len(ended) > 1:
                axes.fill_between(mean.x, mean.low, mean.high, color=color, alpha=0.18, linewidth=0)
        for x, y in running:
            marker = "." if len(x) == 1 else None
            where = "steps-pre" if metric in ("batch_size", "lr") else "default"
            (line,) = axes.plot(x, y, color=color, linestyle="dashed", linewidth=0.9, marker=marker, drawstyle=where)
            if not ended and name is not None:
                line.set_label(name)
            name = None
    if metric == "batch_size":
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    elif metric == "lr":
        axes.set_ylim(bottom=0)
    elif metric != "val/accuracy" and lowest > 0 and highest > 3 * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 300 * lowest else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.locator_params(axis="x", nbins=6)
    if axes.get_xlim()[1] >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=columns, fontsize=9, frameon=False)
    figure.savefig(file, dpi=190)
