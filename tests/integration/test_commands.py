"""The commands, outside of the tests' own process: one after another by default, each in a process of its own in the slow tier.

To import torch and Lightning takes longer than they do. `train.py` runs alone in test_scripts.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.commands import run_python
from harness.files import ROOT
from harness.runs import sweep

Check = Callable[[str], None]
DRIVER = """
import runpy, sys

for line in sys.stdin:
    sys.argv = line.rstrip("\\n").split("\\t")
    runpy.run_path(sys.argv[0], run_name="__main__")
    print("END OF", sys.argv[0])
"""


def plan(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        assert "180" in printed and "plan.csv, plan.png" in printed
        assert (folder / "plan.png").stat().st_size > 10_000

    return ["plan.py", "trainer.max_epochs=3", f"hydra.run.dir={folder}"], check


def search(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        assert printed.splitlines()[-1].startswith(f"python {ROOT / 'scripts' / 'train.py'} data=quadratic")
        assert (folder / "study.db").exists()

    options = ["data=quadratic", "data.num_examples=256", "trainer.max_epochs=2", "trainer.enable_progress_bar=false"]
    return ["search.py", *options, "search.trials=1", f"hydra.run.dir={folder}"], check


def surge_grid(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        assert "replicas.csv: " in printed and "surge_report.py" in printed

    options = ["grid.batch_sizes=[8]", "grid.lrs=[0.02]", "grid.seeds=1", "grid.targets=[2.0]", "grid.max_examples=800"]
    return ["surge_grid.py", "+model.net.width=4", "grid.probe=40", *options, f"hydra.run.dir={folder}"], check


def report(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        assert "runs: 6, groups: 2" in printed
        assert (folder / "out" / "report.html").exists()

    return ["report.py", str(sweep(folder / "runs")), "--out", str(folder / "out")], check


def surge_report(folder: Path) -> tuple[list[str], Check]:
    lines = ["seed,batch_size,lr,target,status,steps,examples,loss,extra_steps,loss_drop"]
    for size, fewest in ((4, 300), (8, 200), (16, 150)):
        for lr, more in ((0.01, 20), (0.02, 0), (0.04, 40)):
            for seed in range(3):
                steps = fewest + more + seed
                lines.append(f"{seed},{size},{lr},0.5,reached,{steps},{steps * size},0.49,10,{0.1 - more / 1000 + seed / 1e4}")
    (folder / "replicas.csv").write_text("\n".join(lines) + "\n")

    def check(printed: str) -> None:
        assert "B_noise" in printed
        assert (folder / "report" / "surge.html").exists()

    return ["surge_report.py", str(folder)], check


COMMANDS = [plan, search, surge_grid, report, surge_report]


def test_there_are_no_others() -> None:
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == {f"{command.__name__}.py" for command in COMMANDS} | {"train.py", "benchmark.py"}


def test_one_after_another(tmp_path: Path) -> None:
    lines, checks = [], []
    for command in COMMANDS:
        folder = tmp_path / command.__name__
        folder.mkdir()
        (script, *arguments), check = command(folder)
        lines.append("\t".join([str(ROOT / "scripts" / script), *arguments]))
        checks.append(check)
    printed = run_python("-c", DRIVER, folder=tmp_path, stdin="\n".join(lines))
    for line, check in zip(lines, checks, strict=True):
        of_this, _, printed = printed.partition(f"END OF {line.split(chr(9))[0]}{os.linesep}")
        check(of_this)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_alone(command: Callable[[Path], tuple[list[str], Check]], tmp_path: Path) -> None:
    (script, *arguments), check = command(tmp_path)
    check(run_python(ROOT / "scripts" / script, *arguments, folder=tmp_path))
