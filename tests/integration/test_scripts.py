"""The command lines, run as a user runs them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig

from harness.commands import Run, run_python
from harness.configs import compose_config
from harness.files import FASHION_MNIST, ROOT
from harness.files import csv_rows as read
from harness.processes import Pair
from lightning_bsl.app.compose import make_plan
from lightning_bsl.app.train import train
from lightning_bsl.report.figures import figure_with_axes
from lightning_bsl.schedules import Progress

NARROW = ("+model.net.width=4", "trainer.enable_progress_bar=false")


def replay(overrides: tuple[str, ...], num_examples: int) -> list[tuple[int, float, int]]:
    """Batch size, rate and samples (with it) of every optimizer step, each asked of the schedule by itself."""
    cfg = compose_config(*overrides)
    scheduler = instantiate(cfg.scheduler)
    plan = make_plan(cfg, scheduler, instantiate(cfg.data))
    assert plan is not None
    limit = cfg.trainer.limit_train_batches or 1.0
    steps: list[tuple[int, float, int]] = []
    clock = Progress(horizon=plan.horizon)
    while not plan.horizon.ends_before(clock):
        epoch, ahead = [], clock
        while left := num_examples - (ahead.samples - clock.samples):
            epoch.append(scheduler.schedule(ahead))
            ahead = ahead.advance(min(epoch[-1].batch_size, left))
        end = clock.samples + num_examples
        for batch_size, lr in epoch[: limit if isinstance(limit, int) else int(len(epoch) * limit)]:
            clock = clock.advance(min(batch_size, end - clock.samples))
            steps.append((batch_size, lr, clock.samples))
            if plan.horizon.ends_before(clock):
                return steps
        clock = clock.next_epoch()
    return steps


def check_as_planned(plan: Path, run: Path, overrides: tuple[str, ...], num_examples: int = 1440) -> None:
    """Every row of a run's metrics has exactly the batch size, the rate and the samples that the schedule says."""
    assert (run / "plan.csv").read_text() == (plan / "plan.csv").read_text()
    assert (plan / "plan.png").exists()
    steps, stages, rows = replay(overrides, num_examples), read(plan / "plan.csv"), read(run / "metrics.csv")
    assert len(steps) == sum(int(stage["steps"]) for stage in stages)
    assert {int(row["step"]) for row in rows} >= {*range(6, len(steps), 7), len(steps) - 1}
    for row in rows:
        assert tuple(float(row[name]) for name in ("batch_size", "lr", "samples")) == steps[int(row["step"])], row


@pytest.mark.parametrize("overrides", [
    pytest.param(("scheduler=increasing_both", "trainer.max_epochs=4"), marks=pytest.mark.slow),
    pytest.param(("scheduler=increasing_decaying", "scheduler/lr=diminishing", "trainer.max_epochs=3"), marks=pytest.mark.slow),
    pytest.param(("scheduler=increasing_decaying", "scheduler/lr=polynomial", "scheduler/batch_size=polynomial",
                  "trainer.max_epochs=4"), marks=pytest.mark.slow),
    ("scheduler.batch_size.unit=samples", "scheduler.batch_size.every=1000", "scheduler.lr.unit=step",
     "trainer.max_epochs=-1", "trainer.max_steps=200"),
    ("trainer.limit_train_batches=0.3", "trainer.max_epochs=5"),
])  # fmt: skip
def test_metrics_are_as_planned(overrides: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    overrides = (*overrides, *NARROW, "data.samples_per_epoch=400", "dataset.max_batch_size=256")
    run("plan.py", *overrides, folder=tmp_path / "plan")
    run("train.py", *overrides, "trainer.log_every_n_steps=7", folder=tmp_path / "run")
    check_as_planned(tmp_path / "plan", tmp_path / "run", overrides, 400)


FASHION = ("data=fashion_mnist", f"data.root={FASHION_MNIST}", "scheduler=increasing_both")
needs_fashion_mnist = pytest.mark.skipif(not FASHION_MNIST.exists(), reason="Debian's dataset-fashion-mnist is not installed")


@needs_fashion_mnist
@pytest.mark.parametrize(
    "images, overrides",
    [
        pytest.param(10_000, (*NARROW, "scheduler.batch_size.start=64", "trainer.max_epochs=2"), id="part"),
        pytest.param(60_000, (*NARROW, "scheduler.batch_size.start=128", "trainer.max_epochs=2"), id="narrow",
                     marks=pytest.mark.slow),
        pytest.param(60_000, ("trainer.max_epochs=6",), id="whole", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_real_fashion_mnist(images: int, overrides: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    overrides = (*overrides, f"data.samples_per_epoch={images}")
    run("plan.py", "data=fashion_mnist", "model=cnn5", *overrides, folder=tmp_path / "plan")  # without the data
    run("train.py", *FASHION, "model=cnn5", *overrides, "trainer.log_every_n_steps=7",
        "trainer.enable_progress_bar=false", folder=tmp_path / "run")  # fmt: skip
    check_as_planned(tmp_path / "plan", tmp_path / "run", (*FASHION, *overrides), images)
    accuracies = [float(row["val/accuracy"]) for row in read(tmp_path / "run" / "metrics.csv") if row["val/accuracy"]]
    assert max(accuracies) > (0.9 if "whole" in str(tmp_path) else 0.5)


PYDOC = ("data=pydoc", "model=gpt_tiny", "scheduler=increasing_both", "trainer.enable_progress_bar=false")


def unigram_perplexity(cfg: DictConfig) -> float:
    """Of the validation tokens, by how often each comes in the training tokens (plus one, so that none is impossible)."""
    datamodule = instantiate(cfg.data)
    datamodule.setup("fit")
    counts = np.bincount(datamodule.train_set.tokens, minlength=cfg.data.vocab_size) + 1
    predicted = datamodule.val_set.blocks[:, 1:]
    return float(np.exp(-np.log(counts / counts.sum())[predicted].mean()))


@pytest.mark.slow
def test_language_model_grows_by_tokens_inside_the_first_epoch(run: Run, tmp_path: Path) -> None:
    overrides = (*PYDOC, "data.samples_per_epoch=1000", "trainer.max_epochs=1", "optimizer.lr=0.003",
                 "scheduler.batch_size.unit=tokens", "scheduler.batch_size.every=16384",
                 "scheduler.lr.unit=tokens", "scheduler.lr.every=16384")  # fmt: skip
    run("plan.py", *overrides, folder=tmp_path / "plan")
    printed = run("train.py", *overrides, "trainer.log_every_n_steps=7", folder=tmp_path / "run")
    assert "val ppl" in printed.out
    check_as_planned(tmp_path / "plan", tmp_path / "run", overrides, 1000)
    rows = read(tmp_path / "run" / "metrics.csv")
    for row in rows:
        assert float(row["tokens"]) == 64 * float(row["samples"])
        # a step is taken with the size that the tokens before it ask for; the last one of the epoch holds fewer
        before = float(row["tokens"]) - 64 * (float(row["batch_size"]) if float(row["samples"]) < 1000 else 1)
        assert float(row["batch_size"]) == 8 * 2 ** (before // 16384)
    assert {row["epoch"] for row in rows} == {"0"}
    assert {float(row["batch_size"]) for row in rows} == {8, 16, 32, 64}  # doubled three times
    (perplexity,) = (float(row["val/perplexity"]) for row in rows if row["val/perplexity"])
    assert perplexity < unigram_perplexity(compose_config(*overrides))


@pytest.mark.slow
def test_first_command_of_the_language_models(run: Run, tmp_path: Path) -> None:
    run("train.py", *PYDOC, folder=tmp_path / "run")
    perplexities = [float(row["val/perplexity"]) for row in read(tmp_path / "run" / "metrics.csv") if row["val/perplexity"]]
    assert perplexities[-1] < unigram_perplexity(compose_config(*PYDOC)) / 2


@pytest.mark.parametrize("metric, overrides", [
    pytest.param(
        "val/perplexity", ("data=pydoc", "data.samples_per_epoch=64", "callbacks=early_stopping"), marks=pytest.mark.slow
    ),
    ("val/accuracy", (NARROW[0], "data.samples_per_epoch=160")),
])  # fmt: skip
def test_returns_what_a_sweeper_judges_by(metric: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    cfg = compose_config(*overrides, "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
                         f"hydra.runtime.output_dir={tmp_path}")  # fmt: skip
    returned = runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"].__wrapped__(cfg)
    assert returned == pytest.approx([float(row[metric]) for row in read(tmp_path / "metrics.csv") if row[metric]][-1])


def train_with(*overrides: str) -> None:
    train(compose_config(*overrides))


@pytest.mark.parametrize("launched_by", ["us", pytest.param("Lightning", marks=pytest.mark.slow)])
def test_two_processes(launched_by: str, pair: Pair, tmp_path: Path) -> None:
    overrides = [*NARROW, "trainer=ddp_cpu", "trainer.max_epochs=3", "data.samples_per_epoch=144"]
    if launched_by == "us":
        pair(train_with, *overrides, f"output_dir={tmp_path / 'run'}")
    else:
        run_python(ROOT / "scripts" / "train.py", f"hydra.run.dir={tmp_path / 'run'}", *overrides, folder=tmp_path)
    rows, stages = read(tmp_path / "run" / "metrics.csv"), read(tmp_path / "run" / "plan.csv")
    assert [int(stage["steps"]) for stage in stages] == [18, 9, 5]  # the global batch, not one for each process
    assert int(rows[-1]["step"]) == 18 + 9 + 5 - 1
    assert float(rows[-1]["samples"]) == 3 * 144


@pytest.mark.slow
def test_sweep_of_the_four_cases(run: Run, tmp_path: Path) -> None:
    run("train.py", "-m", "scheduler=constant_decaying,increasing_decaying,increasing_both,increasing_warmup",
        "trainer.max_epochs=2", "data.samples_per_epoch=160", *NARROW, folder=tmp_path / "sweep")  # fmt: skip
    runs = sorted(path.parent for path in (tmp_path / "sweep").glob("*/metrics.csv"))
    assert len(runs) == 4
    assert all((folder / "curves.png").exists() for folder in runs)


def test_resumes_from_a_checkpoint(run: Run, tmp_path: Path) -> None:
    common = ("scheduler.batch_size.every=1", "scheduler.lr.every=1", "data.samples_per_epoch=160", *NARROW)
    run("train.py", *common, "trainer.max_epochs=4", folder=tmp_path / "whole")
    run("train.py", *common, "trainer.max_epochs=2", folder=tmp_path / "first")
    run(
        "train.py",
        *common,
        "trainer.max_epochs=4",
        f"ckpt_path={tmp_path}/first/checkpoints/last.ckpt",
        folder=tmp_path / "then",
    )
    whole, then = read(tmp_path / "whole" / "metrics.csv"), read(tmp_path / "then" / "metrics.csv")
    columns = ("epoch", "step", "samples", "batch_size", "lr", "train/loss", "val/loss", "val/accuracy")
    expected = [[row[name] for name in columns] for row in whole if int(row["epoch"]) >= 2]
    assert [[row[name] for name in columns] for row in then if int(row["epoch"]) >= 2] == expected


@pytest.mark.parametrize("overrides, messages", [
    (("scheduler=adaptative",), ("adaptative", "increasing_both")),
    pytest.param(("trainer.max_epoch=3",), ("max_epoch",), marks=pytest.mark.slow),
    (("scheduler.batch_size.unit=epochs",), ("'epochs'", "epoch, step", "samples")),
    pytest.param(("scheduler.batch_size.every=0",), ("every=0",), marks=pytest.mark.slow),
    pytest.param(("scheduler.batch_size.factor=0.5",), ("batch size is 0.5", "minimum=1"), marks=pytest.mark.slow),
    pytest.param(("scheduler.batch_size.factor=-2",), ("factor=-2",), marks=pytest.mark.slow),
    (("scheduler.batch_size.maximum=4096", "trainer.max_epochs=30"), ("1440", "maximum")),
    pytest.param(("scheduler/lr=constant", "optimizer.lr=0"), ("lr=0.0", "give it a learning rate above 0"),
                 marks=pytest.mark.slow),
    pytest.param(("scheduler.lr.start=-0.1",), ("-0.1",), marks=pytest.mark.slow),
    pytest.param(("scheduler.lr.start=.nan",), ("nan",), marks=pytest.mark.slow),
    pytest.param(("scheduler=increasing_warmup", "trainer.max_epochs=1"), ("warm-up", "longer"), marks=pytest.mark.slow),
    pytest.param(("trainer.max_epochs=-1",), ("max_epochs", "every"), marks=pytest.mark.slow),
    (("data=pydoc", "model=gpt_tiny", "model.net.n_positions=32"), ("64 tokens", "`block_size=32`", "`n_positions=64`")),
    pytest.param(("data=pydoc", "model=gpt_tiny", "model.net.vocab_size=999"), ("2048 tokens", "999", "`vocab_size=2048`"),
                 marks=pytest.mark.slow),
    pytest.param(("data=pydoc", "model=gpt_tiny", "data.block_size=20000"), ("do not fill one block of 20000",),
                 marks=pytest.mark.slow),
    pytest.param(("data=text", "model=gpt_tiny", "data.root=nowhere"), ("nowhere is not there", "data.root=DIR"),
                 marks=pytest.mark.slow),
    (("ckpt_path=nowhere/last.ckpt",), ("ckpt_path=nowhere/last.ckpt", "no such checkpoint")),
    (("optimizer.lr=${nowhere}",), ("Interpolation key 'nowhere' not found",)),
    (("data=eli5", "model=gpt_tiny", "data.root=nowhere"), ("nowhere/eli5_category", "data.download=true")),
    pytest.param(("scheduler.batch_size.unit=tokens", "scheduler.batch_size.every=99"),
                 ("counts in tokens", "unit='samples'"), marks=pytest.mark.slow),
    pytest.param(("data=cifar10", "data.root=nowhere"), ("nowhere", "data.root", "data.download=true"),
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_bad_input_is_refused_before_training(
    overrides: tuple[str, ...], messages: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    printed = run("train.py", *overrides, folder=tmp_path / "run", fails=True).both
    for message in messages:
        assert message in printed, printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "metrics.csv").exists()


def files_listed(printed: str) -> list[str]:
    return printed.strip().splitlines()[-1].partition(": ")[2].split(", ")


@pytest.mark.parametrize("overrides, files", [
    ((), [".hydra", "plan.csv", "metrics.csv", "curves.png", "checkpoints", "finished.json"]),
    # a configuration whose values refer to others is the same at the end of the run
    (("logger=none", "optimizer.lr=${oc.decode:'0.05'}"), [".hydra", "plan.csv", "checkpoints", "finished.json"]),
    (("~logger", "~callbacks", "+trainer.fast_dev_run=true"), [".hydra"]),
])  # fmt: skip
def test_lists_the_files_that_there_are(overrides: tuple[str, ...], files: list[str], run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = (*overrides, "trainer.max_epochs=1", "data.samples_per_epoch=160", *NARROW)
    printed = run("train.py", *overrides, folder=folder).out
    written = {path.name for path in folder.iterdir()} - {"train.log"}
    assert files_listed(printed) == [file for file in files if file in written] + sorted(written - set(files))
    # newer Lightnings save last.ckpt in a fast_dev_run too
    assert set(files) <= written and written - set(files) <= {"checkpoints"}
    assert ("val acc" in printed) == ("metrics.csv" in files)


@pytest.mark.parametrize("script", ["plan.py", "train.py"])
def test_without_matplotlib_there_is_no_figure(script: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("train.plot_run", "plan.plot_plan"):
        monkeypatch.setattr(f"lightning_bsl.app.{name}", lambda *_: figure_with_axes(1, 1, (1, 1)))
    printed = run(script, *NARROW, "trainer.max_epochs=1", "data.samples_per_epoch=160", folder=tmp_path).out
    assert "png: figures need matplotlib: pip install 'lightning_bsl[report]'" in printed
    assert not list(tmp_path.glob("*.png")) and ".png" not in printed.splitlines()[-1]


def test_warns_once_of_the_plan(run: Run, tmp_path: Path) -> None:
    overrides = ("scheduler.lr.factor=1.5", "trainer.max_epochs=2", "data.samples_per_epoch=160", *NARROW)
    with pytest.warns(UserWarning, match="gamma") as caught:
        run("train.py", *overrides, folder=tmp_path / "run")
    assert sum("gamma" in str(warning.message) for warning in caught) == 1


def test_plan_says_what_theory_says(run: Run, tmp_path: Path) -> None:
    overrides = ("data=quadratic", "scheduler.lr.factor=1.9", "trainer.max_epochs=20")
    printed = run("plan.py", *overrides, folder=tmp_path / "out").both
    for said in ("B_T", "V_T", "bound", "gamma^2 >= delta", "rate >= 2/L", "arXiv 2409.08770 (iii)"):
        assert said in printed, said
    without = run("plan.py", "data=cifar100", "trainer.max_epochs=300", folder=tmp_path / "other").both
    assert "B_T stalls" in without
    assert "bound" not in without


def test_plans_side_by_side(run: Run, tmp_path: Path) -> None:
    names = ["constant_decaying", "increasing_both", "surge"]
    given = ["trainer.max_epochs=30", "data=cifar100", "optimizer.lr=0.2", "scheduler=constant"]
    printed = run("plan.py", *given, f"--compare={','.join(names)}", folder=tmp_path / "out").out
    for name, steps, peak in zip(names, ("11,730", "37,476", "37,476"), ("0.2", "1.001", "0.2")):
        (line,) = [line for line in printed.splitlines() if f" {name} " in line]
        assert steps in line
        assert peak in line
    assert "1,500,000 samples each" in printed
    assert (tmp_path / "out" / "plans.png").exists()


@pytest.mark.parametrize("arguments, message", [
    pytest.param(("--compare=increasing_both,nonsense",), "nonsense", marks=pytest.mark.slow),
    (("--compare=",), "--compare needs schedulers"),
    (("--compare=adaptive",), "a scheduler that measures before it decides"),
    (("--compare=constant,increasing_both", "trainer.max_steps=50"), "equal samples"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path) -> None:
    assert message in run("plan.py", *arguments, folder=tmp_path / "out", fails=True).both
