"""What a grid of batch sizes and learning rates says of the surge law: the page, the same numbers as CSV, and the settings."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table

from lightning_bsl.population.analysis import ABOVE, DECIDES, Fitted, Surge, fitted_numbers, noise_against_loss
from lightning_bsl.report.markup import interval, number, render
from lightning_bsl.report.surge_figures import plot_noise, plot_surge


def write_surge_report(
    surges: Sequence[Surge], folder: str | Path, overrides: Sequence[str] = (), train: str = "bsl-train"
) -> list[Path]:
    """Write ``surge.html``, ``surge.csv``, ``surge_fits.csv`` and the figures as PNG files.

    Args:
        surges: Of the targets.
        folder: Where to write; made if it is not there.
        overrides: What else the command of the settings takes: the data and model of the grid.
        train: How the user calls the command that trains.

    Returns:
        The files.

    Raises:
        ModuleNotFoundError: matplotlib, the ``report`` extra, is not installed.
    """
    folder, numbers, law = Path(folder), fitted_numbers(surges), noise_against_loss(surges)
    folder.mkdir(parents=True, exist_ok=True)
    figures, noise_figures = [plot_surge(surge, folder) for surge in surges], plot_noise(surges, law, folder)
    index = {(fitted.target, fitted.what, fitted.fit): fitted for fitted in numbers}
    page = render(
        "surge.html",
        surges=surges,
        unfinished=unfinished(surges),
        findings=[surge_findings(surge) for surge in surges],
        figures=figures,
        at=lambda surge, what, fit: index.get((surge.target, what, fit)),
        decides=DECIDES,
        noise_finding=noise_finding(surges),
        noise_figures=noise_figures,
        commands=surge_commands(surges, overrides, train),
    )
    files = [folder / name for name in ("surge.html", "surge.csv", "surge_fits.csv")]
    files[0].write_text(page, encoding="utf-8")
    best = pd.concat({surge.target: surge.best for surge in surges}, names=["target"])
    best.reset_index("target").to_csv(files[1], index=False)
    pd.DataFrame(numbers, columns=list(Fitted._fields)).to_csv(files[2], index=False)
    return [*files, *(figure.file for drawn in (*figures, noise_figures) for figure in drawn)]


def surge_table(surges: Sequence[Surge]) -> Table:
    """A row for each target, for the terminal."""
    table = Table("loss", "batch sizes", "reached", "B_noise", "S_min", "peak rate", "R² of surge", "beyond B_noise")
    for surge in surges:
        fit, curves = surge.tradeoff, surge.curves
        table.add_row(
            number(surge.target),
            f"{surge.best['fitted'].sum()} of {len(surge.best)}",
            f"{surge.counts['reached'] / sum(surge.counts.values()):.0%}",
            *((interval(fit.noise_batch_size), number(fit.min_steps.value)) if fit else ("", "")),
            *((interval(curves[0].peak), f"{curves[0].r2:.2f}") if curves else ("", "")),
            surge.verdict.word,
        )
    return table


def surge_summary(surges: Sequence[Surge]) -> list[str]:
    """All that is said of a grid, target by target, in sentences."""
    return [*unfinished(surges), *(sentence for surge in surges for sentence in surge_findings(surge)), *noise_finding(surges)]


def unfinished(surges: Sequence[Surge]) -> list[str]:
    """What the grid lacks of being whole."""
    lacking = {size: counts for surge in surges for size, counts in surge.lacking.items()}
    listed = "; ".join(f"B = {size}: {here:,} of {whole:,}" for size, (here, whole) in sorted(lacking.items()))
    return [
        f"The grid is not whole. Replicas there, of as many as all seeds and rates make: {listed}. Rates with fewer seeds than "
        "others of the same batch size are left out."
    ][: len(lacking)]


def surge_findings(surge: Surge) -> list[str]:
    """What a grid says for a target, a sentence or two each."""
    free = surge.free
    best = surge.best.assign(edge=surge.best["edge"].where(surge.best["lr"].notna(), "none"))
    text = render(
        "surge_findings.txt",
        surge=surge,
        sizes={edge: best["batch_size"][best["edge"] == edge].tolist() for edge in ("none", "lowest", "highest")},
        near=[fit.name for fit in free[1:] if fit.aicc - free[0].aicc < DECIDES],
        behind=next((fit.aicc for fit in free if fit.name == "surge"), 0) - (free[0].aicc if free else 0) >= DECIDES,
        decides=DECIDES,
        least=ABOVE,
        noise=surge.tradeoff.noise_batch_size.value if surge.tradeoff else math.nan,
    )
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def noise_finding(surges: Sequence[Surge]) -> list[str]:
    """How B_noise changes with the loss, where there are several targets."""
    known = [(surge.target, surge.tradeoff.noise_batch_size) for surge in surges if surge.tradeoff]
    if len(known) < 2:
        return []
    values = ", ".join(f"{number(noise.value)} at a loss of {number(loss)}" for loss, noise in known)
    law = noise_against_loss(surges)
    if isinstance(law, str):
        return [f"B_noise is {values}. No power law of the loss: {law}."]
    return [
        f"B_noise is {values}. As a power of the loss: B_* = {interval(law.coefficient)}, alpha_B = {interval(law.alpha)}. All "
        "targets are of the same runs, so the points are not independent and the intervals too narrow."
    ]


def surge_commands(surges: Sequence[Surge], overrides: Sequence[str] = (), train: str = "bsl-train") -> list[tuple[str, str]]:
    """What each command is, and the command; the one to take last: that of the lowest loss, where a run is the longest.

    Args:
        surges: Of the targets.
        overrides: What else the command takes: the data and model of the grid.
        train: How the user calls the command that trains.
    """
    commands = []
    for surge in sorted(surges, key=lambda surge: -surge.target):
        if settings := surge.settings:
            peak, noise = (f"{float(f'{value:.3g}'):g}" for value in settings[:2])
            rule = [f"optimizer.lr={peak}", "scheduler=surge", f"scheduler.lr.noise_batch_size={noise}"]
            source = "" if settings.from_steps else ", by the rates alone"
            command = f"{train} {shlex.join([*overrides, 'optimizer=adam', *rule])}"
            commands.append((f"settings at a loss of {number(surge.target)}{source}", command))
    return commands
