"""Figures of a grid of batch sizes and learning rates, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bsl.population.analysis import Surge
from lightning_bsl.report.figures import figure_with_axes
from lightning_bsl.report.overlays import Figure, color_of
from lightning_bsl.theory import CriticalBatchFit, TradeoffFit, critical_batch_size_at_loss, lr_curve

_SIZE = (4.4, 3.7)  # small, so that the letters are large enough on a phone
_SCORES = {"drop": "drop of the loss", "steps": "steps to the target"}
_SHARES = {"drop": "mean drop / best of the batch size", "steps": "fewest of the batch size / mean steps"}
_BOUND = {"lowest": "v", "highest": "^"}


def plot_surge(surge: Surge, folder: Path) -> list[Figure]:
    """Draw how good the rates are, the trade-off of steps and examples, and the best rates.

    Args:
        surge: Of the target.
        folder: Where to write.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    wanted = (
        (surge.by, _plot_scores, f"mean {_SCORES[surge.by]} against batch size and rate"),
        ("rates", _plot_rates, "best rate against batch size"),
        ("tradeoff", _plot_steps, "steps against examples"),
    )
    figures = []
    for name, plot, title in wanted:
        figure, axes = figure_with_axes(1, 1, _SIZE)
        plot(surge, figure, axes)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
        file = folder / f"{name}-{surge.target:g}.png"
        figure.savefig(file, dpi=190)
        figures.append(Figure(file, name, "batch_size", f"{title}, loss {surge.target:g}"))
    return figures


def plot_noise(surges: Sequence[Surge], law: CriticalBatchFit | str, folder: Path) -> Figure | None:
    """Draw B_noise against the loss; nothing where fewer than two targets have one.

    Args:
        surges: Of the targets.
        law: Of B_noise.
        folder: Where to write.
    """
    known = [(each.target, each.tradeoff.noise_batch_size) for each in surges if isinstance(each.tradeoff, TradeoffFit)]
    if len(known) < 2:
        return None
    figure, axes = figure_with_axes(1, 1, _SIZE)
    losses, values = np.array([loss for loss, _ in known]), np.array([each.value for _, each in known])
    # an end that the data leave open is cut
    ends = np.array(
        [
            [each.value - max(each.low, each.value / 10) for _, each in known],
            [min(each.high, each.value * 10) - each.value for _, each in known],
        ]
    )
    axes.errorbar(losses, values, ends, fmt="o", color=color_of(0), capsize=3, label="B_noise by the steps")
    if not isinstance(law, str):
        x = np.linspace(losses.min(), losses.max(), 100)
        curve = critical_batch_size_at_loss(x, law.coefficient.value, law.alpha.value)
        axes.plot(x, curve, color=color_of(1), label="power law")
    axes.invert_xaxis()  # as training goes
    _log(axes.yaxis)
    _label(axes, "loss", "B_noise")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(folder / "noise.png", dpi=190)
    return Figure(folder / "noise.png", "noise", "loss", "B_noise against the loss")


def _plot_scores(surge: Surge, figure: Any, axes: Any) -> None:
    """Each column as a share of its best: they differ far more between batch sizes than between rates."""
    from matplotlib.patches import Rectangle

    with np.errstate(invalid="ignore"):
        most = np.fmax.reduce(surge.scores, axis=1)[:, None]
        shares = np.where(most > 0, surge.scores / most, math.nan).T
    said: set[str] = set()
    mesh = axes.pcolormesh(np.ma.masked_invalid(shares), cmap="viridis", vmin=0, vmax=1)
    for row, column in np.argwhere((surge.tried & np.isnan(surge.scores)).T):
        label = None if "few" in said else "too few seeds"
        axes.add_patch(
            Rectangle((column, row), 1, 1, facecolor="#eeeeee", edgecolor="#888888", hatch="////", lw=0, label=label)
        )
        said.add("few")
    figure.colorbar(mesh, ax=axes, label=_SHARES[surge.by], extend="min" if surge.by == "drop" else "neither")
    place = {lr: i + 0.5 for i, lr in enumerate(surge.lrs.tolist())}
    for column, best in enumerate(surge.best):
        if math.isnan(best.lr):
            continue
        if not math.isnan(best.low):
            axes.plot([column + 0.5] * 2, [place[best.low], place[best.high]], color="white", linewidth=2.5)
            axes.plot([column + 0.5] * 2, [place[best.low], place[best.high]], color="#d55e00", linewidth=1.2)
        label = "best rate is a bound" if best.edge else "best rate, 95% interval"
        axes.plot(
            column + 0.5,
            place[best.lr],
            marker=_BOUND.get(best.edge, "o"),
            color="#d55e00" if not best.edge else "white",
            markeredgecolor="white" if not best.edge else "#d55e00",
            markersize=5,
            linestyle="none",
            label=None if label in said else label,
        )
        said.add(label)
    _name(axes.xaxis, [str(best.batch_size) for best in surge.best])
    _name(axes.yaxis, [f"{lr:.3g}" for lr in surge.lrs])
    _label(axes, "batch size", "learning rate", grid=False)


def _plot_rates(surge: Surge, figure: Any, axes: Any) -> None:
    known = [best for best in surge.best if not math.isnan(best.lr)]
    for edge, marker, label in (("", "o", "best rate"), ("lowest", "v", "at most"), ("highest", "^", "at least")):
        if some := [best for best in known if best.edge == edge]:
            values = np.array([(best.batch_size, best.lr, best.low, best.high) for best in some]).T
            ends = np.nan_to_num([values[1] - values[2], values[3] - values[1]])
            face = color_of(0) if not edge else "white"
            axes.errorbar(*values[:2], ends, fmt=marker, color=color_of(0), mfc=face, markersize=5, capsize=2, label=label)
    _label(axes, "batch size", "learning rate")
    if not known:
        return
    x = np.geomspace(known[0].batch_size / 1.1, known[-1].batch_size * 1.1, 200)
    for i, each in enumerate(surge.curves if not isinstance(surge.curves, str) else []):
        axes.plot(x, lr_curve(each.rule, x), color=color_of(i + 1), label=f"{each.name}, B_noise by steps")
    if not isinstance(surge.free, str):
        free = next(each for each in surge.free if each.name == "surge")
        axes.plot(x, lr_curve(free.rule, x), color=color_of(1), linestyle="dotted", label="surge, any B_noise")
    if isinstance(surge.tradeoff, TradeoffFit):
        noise = surge.tradeoff.noise_batch_size
        low, high = max(noise.low, x[0]), min(noise.high, x[-1])
        if low < high:
            axes.axvspan(low, high, color="#999999", alpha=0.2, linewidth=0, label="B_noise")
    axes.set_xlim(x[0], x[-1])
    _log(axes.xaxis)
    _log(axes.yaxis)


def _plot_steps(surge: Surge, figure: Any, axes: Any) -> None:
    known = [best for best in surge.best if not math.isnan(best.lr)]
    for measured, label in ((True, "measured"), (False, "rate is a bound")):
        if some := [best for best in known if best.measured == measured]:
            face = color_of(0) if measured else "white"
            points = np.array([(1 / best.examples, 1 / best.steps) for best in some]).T
            axes.plot(*points, "o", color=color_of(0), mfc=face, markersize=5, label=label)
    for best in (known[0], known[-1]) if known else ():
        at = (1 / best.examples, 1 / best.steps)
        axes.annotate(f"B = {best.batch_size}", at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    x = np.linspace(0, max((1 / best.examples for best in known), default=1) * 1.15, 1000)
    for i, (fit, label) in enumerate(((surge.tradeoff, "fit of log S"), (surge.line, "the paper's line"))):
        if isinstance(fit, TradeoffFit):
            y = 1 / fit.min_steps.value - fit.noise_batch_size.value * x
            axes.plot(x[y >= 0], y[y >= 0], color=color_of(i + 1), linestyle=("solid", "dashed")[i], label=label)
    axes.set_xlim(0, x[-1])
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(style="sci", scilimits=(-2, 3))
    axes.locator_params(nbins=6)
    _label(axes, "1 / examples", "1 / steps")


def _log(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = sorted(getattr(axis.axes, f"get_{axis.axis_name}lim")())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _name(axis: Any, names: Sequence[str]) -> None:
    """Name as many of the columns or rows of a heat map as have room."""
    axis.set_tick_params(labelsize=8)
    step = math.ceil(len(names) / 10)
    axis.set_ticks([i + 0.5 for i in range(0, len(names), step)], names[::step])


def _label(axes: Any, x: str, y: str, grid: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if grid:
        axes.grid(alpha=0.25)
