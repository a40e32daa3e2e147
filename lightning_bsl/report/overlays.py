"""Figures of groups of runs, one line for each group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_bsl.report.figures import figure_with_axes, label
from lightning_bsl.report.markup import Figure
from lightning_bsl.runs.compare import band
from lightning_bsl.runs.find import METRICS, Group
from lightning_bsl.runs.logs import AXES

# Okabe and Ito's, and three of Tol's
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d", "#882255", "#999933", "#44aa99")
_DASHES = ("solid", "dashdot", "dotted", (0, (8, 2)))
_STEPS = {"batch_size": "batch size", "lr": "learning rate"}  # drawn as steps, which a mean would smear


def plot_groups(groups: Sequence[Group], folder: Path) -> list[Figure]:
    """Draw each metric against each axis, and batch size and learning rate against samples, as PNG files.

    A line is the mean over a group's runs, its band goes from the least to the largest; a thin dashed line is a run that has
    not ended.
    """
    figures = []
    for metric, axis in [(metric, axis) for axis in AXES for metric in METRICS] + [(metric, "samples") for metric in _STEPS]:
        if any(len(run.curve(metric, axis)[0]) for group in groups for run in group.runs):
            file, name = folder / f"{metric.replace('/', '_')}-{axis}.png", (METRICS | _STEPS)[metric]
            _plot(groups, metric, axis, name, file)
            figures.append(Figure(file, metric, axis, f"{name} against {AXES[axis]}"))
    return figures


def color_of(index: int) -> str:
    """The colour of the group of that index."""
    return _COLORS[index % len(_COLORS)]


def _plot(groups: Sequence[Group], metric: str, axis: str, name: str, file: Path) -> None:
    columns = 2 if max(len(group.name) for group in groups) <= 20 else 1
    # small, so that the letters are large enough on a phone, which shows it 350 px wide
    figure, axes = figure_with_axes(1, 1, (4.4, 3.0 + 0.19 * math.ceil(len(groups) / columns)))
    values = [value for index, group in enumerate(groups) for value in _plot_group(axes, group, metric, axis, index)]
    _scale(axes, metric, min(values), max(values))
    axes.set_xlim(left=0)
    label(axes, AXES[axis], name)
    figure.legend(loc="outside upper center", ncols=columns, fontsize=9, frameon=False)
    figure.savefig(file, dpi=190)


def _plot_group(axes: Any, group: Group, metric: str, axis: str, index: int) -> list[float]:
    """Draw a group; returns the least and the largest value of each of its curves."""
    color, dashes = color_of(index), _DASHES[index // len(_COLORS) % len(_DASHES)]
    curves = [(run.ended, run.curve(metric, axis)) for run in group.runs]
    ended, running = ([curve for over, curve in curves if over is wanted and len(curve[0])] for wanted in (True, False))
    if ended and metric not in _STEPS:
        mean = band(ended)
        marker = "." if len(mean) <= 40 else None
        axes.plot(mean.index, mean["mean"], color=color, linestyle=dashes, marker=marker, label=group.name)
        if len(ended) > 1:
            axes.fill_between(mean.index, mean["min"], mean["max"], color=color, alpha=0.18, linewidth=0)
    for i, (x, y) in enumerate(ended if metric in _STEPS else []):
        named = group.name if i == 0 else None
        axes.step([0, *x], [y[0], *y], where="pre", color=color, linestyle=dashes, label=named)
    for i, (x, y) in enumerate(running):
        axes.plot(
            x,
            y,
            color=color,
            linestyle="dashed",
            linewidth=0.9,
            marker="." if len(x) == 1 else None,
            drawstyle="steps-pre" if metric in _STEPS else "default",
            label=f"{group.name} (unfinished)" if i == 0 and not ended else None,
        )
    return [end for _, y in (*ended, *running) for end in (y.min(), y.max())]


def _scale(axes: Any, metric: str, lowest: float, highest: float) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

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
