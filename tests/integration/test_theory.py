"""Theory and training in one run: `scripts/train.py` on problems whose constants are known."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from harness.commands import Run
from harness.files import csv_rows

CASES = ("constant_decaying", "increasing_decaying", "increasing_both", "increasing_warmup")


@pytest.mark.parametrize("seeds", [pytest.param(20, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 1])
def test_every_run_stays_below_its_bound(seeds: int, run: Run, tmp_path: Path) -> None:
    printed = run(
        "train.py", "-m", "data=quadratic", f"scheduler={','.join(CASES)}", f"seed=range({seeds})", "data.num_examples=1024",
        "callbacks=full_gradient_norm", "trainer.max_epochs=10", "trainer.enable_progress_bar=false", folder=tmp_path / "runs",
    ).out  # fmt: skip
    lines = re.findall(r"min \|\|grad f\|\|\^2: (\S+) measured, at most (\S+) in expectation", printed)
    assert len(lines) == len(CASES) * seeds
    for measured, bound in lines:
        assert 0 < float(measured) < float(bound)
    norms = [rows(folder / "metrics.csv", "full_gradient_norm") for folder in sorted((tmp_path / "runs").glob("[0-9]*"))]
    assert len(norms) == len(lines)
    assert sorted(f"{min(norm for _, norm in each) ** 2:.3e}" for each in norms) == sorted(measured for measured, _ in lines)


def rows(path: Path, name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in csv_rows(path) if row.get(name)]


@pytest.mark.slow
def test_case_iii_falls_by_gamma_a_stage_while_noise_dominates(run: Run, tmp_path: Path) -> None:
    """The noise floor of a stage is eta sigma^2 / b, so it falls by delta / gamma: by gamma at gamma = sqrt(delta)."""
    every, stages = 120, 6
    run(
        "train.py", "-m", "data=quadratic", "scheduler=optimal_growth", "seed=0,1", "data.dimension=40",
        f"data.num_examples={every * 8 * 2**stages}", "model.smoothness=0.4", "model.condition=1", "model.loss_gap=0.002",
        f"scheduler.batch_size.every={every}", "scheduler.batch_size.unit=step", f"scheduler.lr.every={every}",
        "scheduler.lr.unit=step", f"trainer.max_steps={every * stages}", "trainer.max_epochs=-1",
        "callbacks=full_gradient_norm", "callbacks.full_gradient_norm.unit=step", "callbacks.full_gradient_norm.every=10",
        "callbacks.full_gradient_norm.batch_size=200000", "trainer.enable_progress_bar=false", folder=tmp_path / "runs",
    )  # fmt: skip
    squares: dict[int, list[float]] = {stage: [] for stage in range(stages)}
    for seed in ("0", "1"):
        for step, norm in rows(tmp_path / "runs" / seed / "metrics.csv", "full_gradient_norm"):
            if step % every >= every // 2:  # the first half of a stage still remembers the one before
                squares[step // every].append(norm**2)
    slope = np.polyfit(range(stages), [math.log(np.mean(values)) for values in squares.values()], 1)[0]
    assert slope == pytest.approx(-math.log(1.4), rel=0.15)
