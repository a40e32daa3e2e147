"""What a person looks at of branches: the critical batch sizes as a table, and beside the noise scale as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table

from lightning_bsl.report.figures import color_of, count_ticks, figure_with_axes, label, log_ticks, save_small
from lightning_bsl.report.markup import Figure, number
from lightning_bsl.runs.find import Run
from lightning_bsl.theory import LEVEL, CriticalBatch, Estimate

_NOISE = "gradient_noise_scale"


def branch_table(estimates: Sequence[tuple[int, CriticalBatch]]) -> Table:
    """A row for each checkpoint: by factor how much the loss lies above that of factor 1, and the critical batch size.

    Args:
        estimates: The samples of the run before each checkpoint, and what its branches say; all with the same factors.
    """
    factors = [factor for factor in estimates[0][1].differences if factor > 1]
    names = ["samples", "batch", *(f"x {factor}" for factor in factors), "B*"]
    table = Table(*(Column(name, justify="right", no_wrap=True) for name in names))
    for samples, estimate in estimates:
        cells = [_difference(estimate.differences[factor]) for factor in factors]
        table.add_row(f"{samples:,}", f"{estimate.base:,}", *cells, _critical(estimate))
    table.caption = f"by factor: how far the loss lies above that of the batch itself; {LEVEL:.0%} intervals"
    return table


def plot_critical_batches(runs: Sequence[tuple[str, Run, Any]], file: Path) -> Figure:
    """Draw critical batch sizes by branches, the measured noise scale and the batch size against samples, as a PNG file.

    A triangle is a critical batch size that is as large as drawn or larger. An interval without an upper end is cut.

    Args:
        runs: What they are called, the runs, and their critical batch sizes as of `read_critical_batches`.
        file: The file to write.
    """
    figure, axes = figure_with_axes(1, 1, (4.4, 3.4))
    several, top = len(runs) > 1, 2 * max(table["critical"].max() for *_, table in runs)
    for i, (name, run, table) in enumerate(runs):
        color, of = color_of(i), f", {name}" if several else ""
        x, y = run.curve(_NOISE)
        positive = y > 0
        if positive.any():
            noise = color if several else color_of(1)
            axes.plot(x[positive], y[positive], color=noise, linewidth=1, label=f"noise scale N{of}")
            band = [_end(run, f"{_NOISE}_{end}", x[positive], 2 * max(top, y.max())) for end in ("low", "high")]
            if band[0] is not None and band[1] is not None:
                axes.fill_between(x[positive], *band, color=noise, alpha=0.18, linewidth=0)
        sizes = run.curve("batch_size")
        axes.step(*sizes, where="pre", color=color, linewidth=1, linestyle="dotted", label=f"batch size{of}")
        for at_least, marker, what in ((False, "o", "critical batch size B*"), (True, "^", "B* or more")):
            some = table[table["at_least"] == at_least]
            if len(some):
                ends = [some["critical"] - some["low"], some["high"].clip(upper=top) - some["critical"]]
                style = {"color": color, "fmt": marker, "capsize": 3, "markersize": 5}
                axes.errorbar(some["samples"], some["critical"], np.maximum(ends, 0), label=f"{what}{of}", **style)
    axes.set_xlim(left=0)
    count_ticks(axes)
    log_ticks(axes.yaxis)
    label(axes, "samples", "examples")
    save_small(figure, file, columns=1 if several else 2)
    return Figure(file, "critical_batch", "samples", "critical batch size and noise scale against samples")


def _end(run: Run, metric: str, x: Any, most: float) -> Any:
    """An end of the interval of the noise scale, cut at 1 and ``most``; ``None`` where it is not logged."""
    rows = run.series(metric).dropna(subset=["value"])
    return np.interp(x, rows["samples"], rows["value"].clip(1, most)) if len(rows) else None


def _difference(of: Estimate) -> str:
    return f"{of.value:+.4f} ± {of.high - of.value:.4f}" if np.isfinite(of.value) else "diverged"


def _critical(estimate: CriticalBatch) -> str:
    ends = "; ".join(number(float(f"{end:.3g}")) for end in (estimate.low, estimate.high))
    more = "≥ " if estimate.at_least else ""
    return f"{more}{number(float(f'{estimate.value:.3g}'))} [{ends}]"
