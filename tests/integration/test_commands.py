"""The commands as a stranger has them: from the wheel, in an empty folder, without the clone.

One after another in one process by default, as to import torch and Lightning takes longer than they do; each in a process of
its own in the slow tier.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from harness.files import ROOT, csv_rows
from harness.runs import write_run
from harness.wheel import install_wheel
from lightning_bsl.app.commands import COMMANDS as NAMES

pytestmark = pytest.mark.xdist_group("wheel")
Check = Callable[[str], None]
DRIVER = """
import runpy, sys

for line in sys.stdin:
    sys.argv = line.rstrip("\\n").split("\\t")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    print("END OF", sys.argv[0])
"""
QUADRATIC = ["data=quadratic", "data.num_examples=256", "trainer.max_epochs=2", "trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands."""
    return install_wheel(tmp_path_factory.mktemp("wheel"))


def execute(*command: object, folder: Path, stdin: str = "") -> str:
    """Run a command; returns what it prints. It must succeed, and may not see the clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert str(ROOT / "lightning_bsl") not in done.stdout + done.stderr
    return done.stdout


def train(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        metrics, stages = csv_rows(folder / "metrics.csv"), csv_rows(folder / "plan.csv")
        assert max(float(row["val/accuracy"]) for row in metrics if row["val/accuracy"]) >= 0.95
        assert len({row["batch_size"] for row in metrics}) >= 4  # grown at least three times
        assert list(stages[0])[:7] == ["stage", "first_epoch", "epochs", "steps", "samples", "batch_size", "lr"]
        assert (folder / "curves.png").stat().st_size > 10_000
        assert (folder / ".hydra" / "config.yaml").exists()
        assert (folder / "checkpoints" / "last.ckpt").exists()
        assert "val acc" in printed and "512" in printed

    every_epoch = ["+callbacks.model_checkpoint.save_top_k=-1", "+callbacks.model_checkpoint.filename='{epoch}'"]
    return ["bsl-train", *every_epoch, f"hydra.run.dir={folder}"], check


def narrow(folder: Path) -> tuple[list[str], Check]:
    """``train`` with a fifth of the network's width, which is as accurate in half the time."""
    command, check = train(folder)
    return [*command, "+model.net.width=8"], check


def plan(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        assert "180" in printed and "plan.csv, plan.png" in printed
        assert (folder / "plan.png").stat().st_size > 10_000

    return ["bsl-plan", "trainer.max_epochs=3", f"hydra.run.dir={folder}"], check


def multirun(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        assert {path.parent.name for path in folder.glob("sweep/*/metrics.csv")} == {"0", "1"}

    schedulers = "scheduler=constant,increasing"
    return [
        "bsl-train",
        "-m",
        *QUADRATIC,
        schedulers,
        "trainer.log_every_n_steps=2",
        f"hydra.sweep.dir={folder / 'sweep'}",
    ], check


def report(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        assert "runs: 2, groups: 2" in printed
        assert (folder / "out" / "report.html").exists()

    return ["bsl-report", str(folder.parent / "multirun" / "sweep"), "--out", str(folder / "out")], check


def search(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        assert printed.splitlines()[-1].startswith("bsl-train data=quadratic")
        assert (folder / "study.db").exists()

    return ["bsl-search", *QUADRATIC, "search.trials=1", f"hydra.run.dir={folder}"], check


def surge_grid(folder: Path) -> tuple[list[str], Check]:
    def check(printed: str) -> None:
        assert "replicas.csv: " in printed and f"now: bsl-surge-report {folder}" in printed

    options = ["grid.batch_sizes=[8]", "grid.lrs=[0.02]", "grid.seeds=1", "grid.targets=[2.0]", "grid.max_examples=800"]
    return ["bsl-surge-grid", "+model.net.width=4", "grid.probe=40", *options, f"hydra.run.dir={folder}"], check


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

    return ["bsl-surge-report", str(folder)], check


def branch(folder: Path) -> tuple[list[str], Check]:
    """From a checkpoint of ``train``."""
    checkpoint = folder.parent / "train" / "checkpoints" / "epoch=5.ckpt"
    options = ["factors=[1,2]", "window=1024", "seeds=2", "points=2", "probe=64"]

    def check(printed: str) -> None:
        assert "64" in printed
        assert {row["factor"] for row in csv_rows(folder / "branches.csv")} == {"1", "2"}

    return ["bsl-branch", f"ckpt={checkpoint}", *options, f"output_dir={folder}"], check


def application(folder: Path) -> tuple[list[str], Check]:
    """A Hydra application of somebody else, with its own model and data."""
    for file in ("main.py", "config.yaml"):
        (folder / file).write_text((ROOT / "examples" / "hydra_app" / file).read_text())

    def check(printed: str) -> None:
        assert "batch sizes: [8, 16, 32, 64, 128, 256, 512, 512, 512, 512] first rate: 0.02" in printed

    return [f"{folder}/main.py", "+scheduler=increasing_both", "schedule_defaults.lr=0.02", f"hydra.run.dir={folder}"], check


COMMANDS = [train, plan, multirun, report, branch, search, surge_grid, surge_report, application]


def test_every_command_is_tried(tmp_path: Path) -> None:
    tried = {name for command in COMMANDS if (name := command(tmp_path)[0][0]).startswith("bsl-")}
    assert tried == set(NAMES)
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"benchmark", "gpu_check"}
    assert {f"bsl-{script.replace('_', '-')}" for script in scripts} == tried
    assert {point.name for point in entry_points(group="console_scripts") if point.value.startswith("lightning_bsl.")} == tried


@pytest.mark.parametrize("commands", [
    pytest.param([narrow, plan, multirun, report, application], marks=pytest.mark.slow),
    pytest.param([train, branch, search, surge_grid, surge_report], marks=pytest.mark.slow),
])  # fmt: skip
def test_one_after_another(commands: list[Callable[[Path], tuple[list[str], Check]]], installed: Path, tmp_path: Path) -> None:
    lines, checks = [], []
    for command in commands:
        folder = tmp_path / command.__name__
        folder.mkdir()
        (name, *arguments), check = command(folder)
        lines.append("\t".join([str(installed / name), *arguments]))
        checks.append(check)
    printed = execute(installed / "python", "-c", DRIVER, folder=tmp_path, stdin="\n".join(lines))
    for line, check in zip(lines, checks, strict=True):
        of_this, _, printed = printed.partition(f"END OF {line.split(chr(9))[0]}{os.linesep}")
        check(of_this)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_alone(command: Callable[[Path], tuple[list[str], Check]], installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / command.__name__
    folder.mkdir()
    if command is report:
        for number, scheduler in enumerate(("constant", "increasing")):
            write_run(tmp_path / "multirun" / "sweep" / str(number), [f"scheduler={scheduler}"])
    if command is branch:
        (tmp_path / "train").mkdir()
        (name, *arguments), _ = train(tmp_path / "train")
        execute(installed / "python", installed / name, *arguments, folder=tmp_path)
    (name, *arguments), check = command(folder)
    check(execute(installed / "python", installed / name, *arguments, folder=tmp_path))


def test_the_list_of_commands(installed: Path, tmp_path: Path) -> None:
    printed = execute(installed / "python", "-m", "lightning_bsl", folder=tmp_path)
    assert all(f"  {name} " in printed for name in NAMES)


def test_the_wheel_says_that_it_is_typed(installed: Path) -> None:
    assert len([*installed.parent.rglob("site-packages/lightning_bsl/py.typed")]) == 1


@pytest.mark.slow
def test_a_type_checker_sees_our_types(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from lightning_bsl import BatchLRScheduler\nfrom lightning_bsl.schedules import Exponential\n\n"
        "scheduler = BatchLRScheduler(Exponential(8, factor=2, every=2), lr=0.1)\nreveal_type(scheduler.plan)\n"
        "BatchLRScheduler(8, rate=0.1)\n"
    )
    # what is not ours takes most of the time
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-lightning.*,torch.*,torchmetrics.*,numpy.*]\nfollow_imports = skip\n")
    done = subprocess.run([installed / "python", "-m", "mypy", "user.py"], cwd=tmp_path, capture_output=True, text=True)
    assert 'Revealed type is "lightning_bsl.schedules.plan.Plan | None"' in done.stdout, done.stdout + done.stderr
    assert 'Unexpected keyword argument "rate" for "BatchLRScheduler"' in done.stdout
    assert "Found 1 error" in done.stdout
