"""Figures of a grid of batch sizes and learning rates, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bsl.population.analysis import Surge
from lightning_bsl.report.figures import color_of, figure_with_axes, label, log_ticks, save_small
from lightning_bsl.report.markup import Figure
from lightning_bsl.theory import CriticalBatchFit, critical_batch_size_at_loss, lr_curve

_SIZE = (4.4, 3.7)  # small, so that the letters are large enough on a phone
_SCORES = {"drop": "drop of the loss", "steps": "steps to the target"}
_SHARES = {"drop": "mean drop / best of the batch size", "steps": "fewest of the batch size / mean steps"}
_MARKS = {"": "o", "lowest": "v", "highest": "^"}  # of a best rate, by the edge it lies at


def plot_surge(surge: Surge, folder: Path) -> list[Figure]:
    """Draw how good the rates are, the trade-off of steps and examples, and the best rates."""
    figures, known = [], surge.best[surge.best["lr"].notna()]
    for name, plot, title in (
        (surge.by, _plot_scores, f"mean {_SCORES[surge.by]} against batch size and rate"),
        ("rates", _plot_rates, "best rate against batch size"),
        ("tradeoff", _plot_steps, "steps against examples"),
    ):
        figure, axes = figure_with_axes(1, 1, _SIZE)
        plot(surge, known, axes)
        save_small(figure, file := folder / f"{name}-{surge.target:g}.png")
        figures.append(Figure(file, name, "batch_size", f"{title}, loss {surge.target:g}"))
    return figures


def plot_noise(surges: Sequence[Surge], law: CriticalBatchFit | str, folder: Path) -> list[Figure]:
    """Draw B_noise against the loss, and its power law; nothing where fewer than two targets have one."""
    known = [(surge.target, surge.tradeoff.noise_batch_size) for surge in surges if surge.tradeoff]
    if len(known) < 2:
        return []
    figure, axes = figure_with_axes(1, 1, _SIZE)
    losses, (values, _, low, high) = [loss for loss, _ in known], np.array([noise for _, noise in known]).T
    # an end that the data leave open is cut
    ends = [values - np.maximum(low, values / 10), np.minimum(high, values * 10) - values]
    axes.errorbar(losses, values, ends, fmt="o", color=color_of(0), capsize=3, label="B_noise by the steps")
    if not isinstance(law, str):
        x = np.linspace(min(losses), max(losses), 100)
        y = critical_batch_size_at_loss(x, law.coefficient.value, law.alpha.value)
        axes.plot(x, y, color=color_of(1), label="power law")
    axes.invert_xaxis()  # as training goes
    log_ticks(axes.yaxis)
    label(axes, "loss", "B_noise")
    save_small(figure, file := folder / "noise.png")
    return [Figure(file, "noise", "loss", "B_noise against the loss")]


def _plot_scores(surge: Surge, known: Any, axes: Any) -> None:
    """Each column as a share of its best: they differ far more between batch sizes than between rates."""
    with np.errstate(invalid="ignore"):
        most = np.fmax.reduce(surge.scores, axis=1)[:, None]
        shares = np.where(most > 0, surge.scores / most, math.nan).T
    mesh = axes.pcolormesh(np.ma.masked_invalid(shares), cmap="viridis", vmin=0, vmax=1)
    for row, column in np.argwhere((surge.tried & np.isnan(surge.scores)).T):
        corners = [column, column + 1, column + 1, column], [row, row, row + 1, row + 1]
        axes.fill(*corners, facecolor="#eeeeee", edgecolor="#888888", hatch="////", lw=0, label=_once(axes, "too few seeds"))
    axes.figure.colorbar(mesh, ax=axes, label=_SHARES[surge.by], extend="min" if surge.by == "drop" else "neither")
    place = {lr: i + 0.5 for i, lr in enumerate(surge.lrs.tolist())}
    for best in known.itertuples():
        column = best.Index
        for color, width in (("white", 2.5), ("#d55e00", 1.2)) if not math.isnan(best.low) else ():
            axes.plot([column + 0.5] * 2, [place[best.low], place[best.high]], color=color, linewidth=width)
        face, edge = ("white", "#d55e00") if best.edge else ("#d55e00", "white")
        style = {"color": face, "markeredgecolor": edge, "markersize": 5, "linestyle": "none", "marker": _MARKS[best.edge]}
        name = _once(axes, "best rate is a bound" if best.edge else "best rate, 95% interval")
        axes.plot(column + 0.5, place[best.lr], label=name, **style)
    _name(axes.xaxis, surge.best["batch_size"].astype(str).tolist())
    _name(axes.yaxis, [f"{lr:.3g}" for lr in surge.lrs])
    label(axes, "batch size", "learning rate", grid=False)


def _plot_rates(surge: Surge, known: Any, axes: Any) -> None:
    for edge, name in (("", "best rate"), ("lowest", "at most"), ("highest", "at least")):
        some = known[known["edge"] == edge]
        if len(some):
            ends = np.nan_to_num([some["lr"] - some["low"], some["high"] - some["lr"]])
            style = {"color": color_of(0), "mfc": "white" if edge else color_of(0), "markersize": 5, "capsize": 2}
            axes.errorbar(some["batch_size"], some["lr"], ends, fmt=_MARKS[edge], label=name, **style)
    label(axes, "batch size", "learning rate")
    if known.empty:
        return
    x = np.geomspace(known["batch_size"].min() / 1.1, known["batch_size"].max() * 1.1, 200)
    for i, curve in enumerate(surge.curves):
        axes.plot(x, lr_curve(curve.rule, x), color=color_of(i + 1), label=f"{curve.name}, B_noise by steps")
    if surge.free_surge:
        axes.plot(x, lr_curve(surge.free_surge, x), color=color_of(1), linestyle="dotted", label="surge, any B_noise")
    if surge.tradeoff:
        noise = surge.tradeoff.noise_batch_size
        low, high = max(noise.low, x[0]), min(noise.high, x[-1])
        if low < high:
            axes.axvspan(low, high, color="#999999", alpha=0.2, linewidth=0, label="B_noise")
    axes.set_xlim(x[0], x[-1])
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)


def _plot_steps(surge: Surge, known: Any, axes: Any) -> None:
    for fitted, name in ((1, "measured"), (0, "rate is a bound")):
        some = known[known["fitted"] == fitted]
        if len(some):
            face = color_of(0) if fitted else "white"
            axes.plot(1 / some["examples"], 1 / some["steps"], "o", color=color_of(0), mfc=face, markersize=5, label=name)
    for best in known.iloc[[0, -1]].itertuples() if len(known) else ():
        at = (1 / best.examples, 1 / best.steps)
        axes.annotate(f"B = {best.batch_size}", at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    x = np.linspace(0, 1.15 / known["examples"].min() if len(known) else 1.15, 1000)
    for i, (fit, name) in enumerate(((surge.tradeoff, "fit of log S"), (surge.line, "the paper's line"))):
        if fit:
            y = 1 / fit.min_steps.value - fit.noise_batch_size.value * x
            axes.plot(x[y >= 0], y[y >= 0], color=color_of(i + 1), linestyle=("solid", "dashed")[i], label=name)
    axes.set_xlim(0, x[-1])
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(style="sci", scilimits=(-2, 3))
    axes.locator_params(nbins=6)
    label(axes, "1 / examples", "1 / steps")


def _once(axes: Any, name: str) -> str | None:
    """A name for the legend, unless it has it."""
    return None if name in axes.get_legend_handles_labels()[1] else name


def _name(axis: Any, names: Sequence[str]) -> None:
    """Name as many of the columns or rows of a heat map as have room."""
    axis.set_tick_params(labelsize=8)
    step = math.ceil(len(names) / 10)
    axis.set_ticks([i + 0.5 for i in range(0, len(names), step)], names[::step])
