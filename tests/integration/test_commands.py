"""Each command, once, in a process of its own; `train.py` and `surge_grid.py` so run in other files too."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.commands import run_python
from harness.files import ROOT
from harness.runs import sweep

SCRIPTS = ROOT / "scripts"


def test_plan(tmp_path: Path) -> None:
    printed = run_python(SCRIPTS / "plan.py", "trainer.max_epochs=3", f"hydra.run.dir={tmp_path}", folder=tmp_path)
    assert "180" in printed and "plan.csv, plan.png" in printed
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_report(tmp_path: Path) -> None:
    printed = run_python(SCRIPTS / "report.py", sweep(tmp_path / "runs"), "--out", tmp_path / "out", folder=tmp_path)
    assert "runs: 6, groups: 2" in printed
    assert (tmp_path / "out" / "report.html").exists()


def test_surge_report(tmp_path: Path) -> None:
    lines = ["seed,batch_size,lr,target,status,steps,examples,loss,extra_steps,loss_drop"]
    for size, fewest in ((4, 300), (8, 200), (16, 150)):
        for lr, more in ((0.01, 20), (0.02, 0), (0.04, 40)):
            for seed in range(3):
                steps = fewest + more + seed
                lines.append(f"{seed},{size},{lr},0.5,reached,{steps},{steps * size},0.49,10,{0.1 - more / 1000 + seed / 1e4}")
    (tmp_path / "replicas.csv").write_text("\n".join(lines) + "\n")
    printed = run_python(SCRIPTS / "surge_report.py", tmp_path, folder=tmp_path)
    assert "B_noise" in printed
    assert list((tmp_path / "report").glob("*.html"))


@pytest.mark.slow  # killed and resumed it is run by default, in tests/population
def test_surge_grid(tmp_path: Path) -> None:
    overrides = ("+model.net.width=4", "grid.batch_sizes=[8]", "grid.lrs=[0.02]", "grid.seeds=1", "grid.targets=[2.0]",
                 "grid.max_examples=800", "grid.probe=40")  # fmt: skip
    printed = run_python(SCRIPTS / "surge_grid.py", *overrides, f"hydra.run.dir={tmp_path}", folder=tmp_path)
    assert "replicas.csv: " in printed
