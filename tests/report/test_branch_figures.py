"""Critical batch sizes by branches, in tables and figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from harness.runs import write_run
from lightning_bsl.report import write_report
from lightning_bsl.report.branches import branch_table
from lightning_bsl.runs import default_baseline, find_runs, group_runs
from lightning_bsl.runs.branches import CRITICAL, read_branches, read_critical_batches, write_branches, write_critical_batches
from lightning_bsl.theory import critical_batch_by_branches

COLUMNS = ("epoch", "step", "samples", "seconds", "batch_size", "lr", "full_gradient_norm", "val/loss", "gradient_noise_scale",
           "gradient_noise_scale_low", "gradient_noise_scale_high")  # fmt: skip
CRITICAL_BATCHES = pd.DataFrame({
    "checkpoint": ["b", "a"], "samples": [300, 100], "batch_size": [10, 10], "lr": [0.1, 0.1], "critical": [80.0, 24.0],
    "low": [40.0, 18.0], "high": [math.inf, 33.0], "at_least": [True, False], "passed": [80, 20], "safe": [40, 10],
})  # fmt: skip


def draw_only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The other figures are empty files, which saves most of the time."""
    draw = Figure.savefig

    def savefig(figure: Figure, path: Path, **options: Any) -> None:
        if path.stem in names:
            draw(figure, path, **options)
        else:
            path.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)


def run_with_noise(folder: Path, columns: tuple[str, ...] = COLUMNS) -> Path:
    write_run(folder, ["scheduler=constant"], columns=columns)
    if "gradient_noise_scale" in columns:
        table = pd.read_csv(folder / "metrics.csv")
        noise = [5.0, math.nan, 20.0, 40.0]
        ends = {"": 1.0, "_low": 0.5, "_high": math.inf}
        table = table.assign(
            **{f"gradient_noise_scale{end}": [value * factor for value in noise] for end, factor in ends.items()}
        )
        table.to_csv(folder / "metrics.csv", index=False, na_rep="nan")
    return folder


@pytest.mark.parametrize("columns", [COLUMNS, *(pytest.param(COLUMNS[:number], marks=pytest.mark.slow) for number in (8, 9))])
def test_the_report_draws_them_beside_the_noise_scale(
    columns: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_only(monkeypatch, "critical_batches")
    first = run_with_noise(tmp_path / "0", columns)
    write_run(tmp_path / "1", ["scheduler=increasing"])
    write_critical_batches(first, CRITICAL_BATCHES)
    found = find_runs([tmp_path])
    groups = group_runs(found.runs)
    files = write_report(found, groups, default_baseline(groups), tmp_path / "report")
    (figure,) = [file for file in files if file.stem == "critical_batches"]
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    assert "critical batch size and noise scale against samples" in files[0].read_text()


def test_a_report_without_branches_has_no_such_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_only(monkeypatch)
    (write_run(tmp_path / "0") / CRITICAL).write_text("samples\n")  # cut short
    assert read_critical_batches(tmp_path / "0") is None
    found = find_runs([tmp_path])
    groups = group_runs(found.runs)
    files = write_report(found, groups, groups[0], tmp_path / "report")
    assert all(file.stem != "critical_batches" for file in files)


def test_the_files_keep_every_number(tmp_path: Path) -> None:
    assert read_branches(tmp_path).empty and read_critical_batches(tmp_path) is None
    row = {"checkpoint": "epoch=0,step=1.ckpt", "start": 64, "batch_size": 4, "lr": 0.1 + 0.2, "factor": 1, "seed": 0}
    table = pd.DataFrame([row | {"samples": i, "loss": loss} for i, loss in enumerate((1 / 3, math.nan, math.inf))])
    write_branches(tmp_path, table)
    pd.testing.assert_frame_equal(read_branches(tmp_path), table, check_exact=True)
    write_critical_batches(tmp_path, CRITICAL_BATCHES)
    kept = read_critical_batches(tmp_path)
    assert kept["samples"].tolist() == [100, 300]  # in the order of the run
    assert kept["high"].tolist() == [33, math.inf] and kept["at_least"].tolist() == [False, True]


def test_the_table_says_what_is_a_bound_and_what_diverged() -> None:
    base = [[1.0], [1.1]]
    worse, nan = [[1.2], [1.34]], [[math.nan], [1.0]]
    estimates = [critical_batch_by_branches(8, [64], {1: base, 2: other}) for other in (base, worse, nan)]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(branch_table([(100 * i, estimate) for i, estimate in enumerate(estimates)]))
    lines = [line for line in console.export_text().splitlines() if "│" in line]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert rows[0] == ["0", "8", "+0.0000 ± 0.0000", "≥ 16 [16; inf]"]
    assert rows[1][2].startswith("+0.2200 ± 0.25") and rows[1][3].startswith("8.")
    assert rows[2] == ["200", "8", "diverged", "8 [8; inf]"]
