"""The page of a grid of batch sizes and learning rates, and the same numbers as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lightning_bsl.population.analysis import Surge
from lightning_bsl.report.markup import (
    NONE,
    Cell,
    Table,
    csv_values,
    estimate_cell,
    image_html,
    number,
    page_html,
    table_html,
)
from lightning_bsl.report.overlays import Figure
from lightning_bsl.report.surge_figures import plot_noise, plot_surge
from lightning_bsl.report.surge_text import (
    noise_against_loss,
    noise_finding,
    surge_commands,
    surge_findings,
    unfinished,
)
from lightning_bsl.schedules import NoiseScaling, ScalingRule, SurgeScaling
from lightning_bsl.theory import LEVEL, Estimate, TradeoffFit

_EDGES = {"lowest": "\u2264&nbsp;", "highest": "\u2265&nbsp;"}


def write_surge_report(surges: Sequence[Surge], folder: str | Path, overrides: Sequence[str] = ()) -> list[Path]:
    """Write ``surge.html``, ``surge.csv``, ``surge_fits.csv`` and the figures as PNG files.

    Args:
        surges: Of the targets.
        folder: Where to write; made if it is not there.
        overrides: What else the command of the settings takes, as of `train_overrides`.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = [plot_surge(each, folder) for each in surges]
    against = plot_noise(surges, noise_against_loss(surges), folder)
    parts = [_part(each, of) for each, of in zip(surges, figures)]
    if said := noise_finding(surges):
        parts.append(f"<h2>B_noise and the loss</h2>\n{_said(said)}{_shown([against] if against else [])}")
    parts.append(_settings(surges, overrides))
    replicas = sum(sum(best.counts.values()) for best in surges[0].best)
    page = page_html(f"Best rates of {replicas:,} replicas", map(escape, unfinished(surges)), "".join(parts))
    (folder / "surge.html").write_text(page, encoding="utf-8")
    _write(folder / "surge.csv", _SIZES, _size_lines(surges))
    _write(folder / "surge_fits.csv", _FITS, _fit_lines(surges))
    drawn = [*(figure for of in figures for figure in of), *([against] if against else [])]
    return [*(folder / name for name in ("surge.html", "surge.csv", "surge_fits.csv")), *(figure.file for figure in drawn)]


# --- the page


def _part(surge: Surge, figures: Sequence[Figure]) -> str:
    tables = [_sizes_table(surge), _fits_table(surge), _curves_table(surge)]
    return f"<h2>Loss {number(surge.target)}</h2>\n{_said(surge_findings(surge))}{_shown(figures)}" + "".join(
        table_html(table) for table in tables if table.rows
    )


def _said(sentences: Iterable[str]) -> str:
    return "".join(f"<p>{escape(each)}</p>\n" for each in sentences)


def _shown(figures: Iterable[Figure]) -> str:
    return f'<div class="figures">{"".join(image_html(each.file, each.title) for each in figures)}</div>\n'


def _settings(surges: Sequence[Surge], overrides: Sequence[str]) -> str:
    commands = surge_commands(surges, overrides)
    if not commands:
        return "<h2>Settings</h2>\n<p>None: neither steps nor rates give a B_noise and a peak.</p>\n"
    listed = "".join(f"<p>{escape(said)}: <code>{escape(command)}</code></p>\n" for said, command in commands)
    return f"<h2>Settings</h2>\n{listed}"


_BEST = {
    "drop": "the largest mean drop of the loss over the {} steps after the target",
    "steps": "the fewest mean steps to the target; drops are over the {} steps after it",
}


def _sizes_table(surge: Surge) -> Table:
    rows = []
    for best in surge.best:
        rate = estimate_cell(best.lr, best.low, best.high, _EDGES.get(best.edge, ""))
        rows.append([
            Cell(str(best.batch_size), best.batch_size),
            rate if not math.isnan(best.lr) else Cell(NONE, math.nan),
            *(Cell(number(value), value) for value in (best.drop, best.steps, best.examples)),
            Cell(f"{best.reached} of {best.seeds}", best.reached / best.seeds if best.seeds else -1),
            *(Cell(f"{best.counts[status]:,}", best.counts[status]) for status in ("reached", "not_reached", "diverged")),
        ])  # fmt: skip
    note = (
        f"The best rate has {_BEST[surge.by].format(surge.extra_steps)}, of the "
        f"rates at which half of the seeds or more reached it; &le; and &ge; mark a bound. In brackets its {LEVEL:.0%} "
        "interval over resamples of the seeds, no finer than the grid of rates. Drop, steps S, examples E = S B and seeds are "
        "those at the best rate; the last three columns count the replicas of all rates. In the heat map a cell is a share of "
        "the best of its batch size; hatched: fewer than half of the seeds reached it, or fewer are there than at other rates."
    )
    head = ["batch size", "best rate", "drop", "S", "E", "seeds", "reached", "not reached", "diverged"]
    return Table(f"Batch sizes, loss {number(surge.target)}", head, rows, note)


def _fits_table(surge: Surge) -> Table:
    rows = []
    for name, fit in (("log S", surge.tradeoff), ("the paper's line", surge.line)):
        if isinstance(fit, TradeoffFit):
            resampled = surge.resampled if fit is surge.tradeoff else (math.nan,) * 3
            ends = f"[{number(resampled[0])}; {number(resampled[1])}]" if not math.isnan(resampled[0]) else NONE
            estimates = [estimate_cell(*_ends(each)) for each in (fit.noise_batch_size, fit.min_steps, fit.min_examples)]
            rows.append([Cell(name), *estimates, Cell(ends)])
    note = (
        "S = S_min (1 + B_noise / B), fitted to log S, and as the line 1/S = 1/S_min &minus; B_noise / E of arXiv 2405.14578, "
        f"whose B_noise comes out too low. In brackets {LEVEL:.0%} intervals: from how far the batch sizes lie from the curve, "
        "and in the last column of B_noise over resamples of the seeds."
    )
    return Table(f"Steps, loss {number(surge.target)}", ["fit", "B_noise", "S_min", "E_min", "B_noise, seeds"], rows, note)


def _curves_table(surge: Surge) -> Table:
    ours = {each.name: each for each in surge.curves} if not isinstance(surge.curves, str) else {}
    free = {each.name: each for each in surge.free} if not isinstance(surge.free, str) else {}
    least = min((each.aicc for each in free.values()), default=math.nan)
    none = Cell(NONE, math.nan)
    rows = []
    for name in free or ours:
        cells = [Cell(name), none, none, none, none, none, none]
        if name in ours:
            cells[1:3] = [estimate_cell(*_ends(ours[name].peak)), _r2(ours[name].r2)]
        if name in free:
            peak, noise = _parameters(free[name].rule)
            ahead = free[name].aicc - least
            cells[3:] = [Cell(number(peak), peak), Cell(number(noise), noise), _r2(free[name].r2), Cell(f"{ahead:.1f}", ahead)]
        rows.append(cells)
    note = (
        "Peak and R&sup2; of log(rate) with the B_noise of the steps, as arXiv 2405.14578 has it; beside them the same curves "
        "fitted to the rates alone, and linear and square-root scaling. A difference of AICc below 2 decides nothing. "
        "Bounds are left out. A B_noise far from the batch sizes makes a curve constant, or linear, or of the square root."
    )
    head = ["curve", "peak rate", "R\u00b2", "free peak rate", "free B_noise", "free R\u00b2", "AICc \u2212 least"]
    return Table(f"Curves, loss {number(surge.target)}", head, rows, note)


def _r2(value: float) -> Cell:
    return Cell(NONE if math.isnan(value) else f"{value:.2f}", value)


def _ends(of: Estimate) -> tuple[float, float, float]:
    return of.value, of.low, of.high


def _parameters(rule: ScalingRule) -> tuple[float, float]:
    """Peak and B_noise of a curve; linear and square-root scaling have neither."""
    return (rule.peak_lr, rule.noise_batch_size) if isinstance(rule, SurgeScaling | NoiseScaling) else (math.nan, math.nan)


# --- the same as CSV

_SIZES = [
    "target", "batch_size", "lr", "low", "high", "edge", "loss_drop", "steps", "examples", "seeds", "seeds_reached",
    "replicas_reached", "replicas_not_reached", "replicas_diverged", "fitted",
]  # fmt: skip
_FITS = ["target", "what", "fit", "value", "low", "high", "r2", "aicc"]


def _size_lines(surges: Sequence[Surge]) -> list[list[object]]:
    return [
        [
            surge.target,
            best.batch_size,
            *best[1:8],
            best.seeds,
            best.reached,
            *(best.counts[status] for status in ("reached", "not_reached", "diverged")),
            int(best.measured),
        ]
        for surge in surges
        for best in surge.best
    ]


def _fit_lines(surges: Sequence[Surge]) -> list[list[object]]:
    """A line for each number that is fitted, with its interval."""
    nan, lines = math.nan, list[list[object]]()
    for surge in surges:
        for name, fit in (("log", surge.tradeoff), ("line", surge.line)):
            for what in ("noise_batch_size", "min_steps", "min_examples") if isinstance(fit, TradeoffFit) else ():
                lines.append([surge.target, what, name, *_ends(getattr(fit, what)), nan, nan])
        if isinstance(surge.tradeoff, TradeoffFit):
            noise = surge.tradeoff.noise_batch_size.value
            lines.append([surge.target, "noise_batch_size", "log, seeds resampled", noise, *surge.resampled[:2], nan, nan])
        for curve in surge.curves if not isinstance(surge.curves, str) else ():
            lines.append([surge.target, "peak_lr", curve.name, *_ends(curve.peak), curve.r2, nan])
        for free in surge.free if not isinstance(surge.free, str) else ():
            for what, value in zip(("peak_lr", "noise_batch_size"), _parameters(free.rule)):
                lines.append([surge.target, what, f"{free.name}, free", value, nan, nan, free.r2, free.aicc])
        verdict = surge.verdict
        lines.append([surge.target, "slope_above_noise", verdict.word, verdict.slope, verdict.low, verdict.high, nan, nan])
    law = noise_against_loss(surges)
    if not isinstance(law, str):
        lines += [["", f"critical_{name}", "log", *_ends(each), nan, nan] for name, each in law._asdict().items()]
    return lines


def _write(path: Path, head: Sequence[str], lines: Iterable[list[object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(map(csv_values, lines))
