"""Sweeps: through Hydra's launchers, after an interruption, and those of the presets under conf/experiment."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import pytest
from hydra.utils import instantiate

from harness.commands import Run, kill, run_killed, run_python
from harness.configs import choices, compose_config
from harness.files import ROOT
from lightning_bsl import AdaptiveBatchLRScheduler
from lightning_bsl.app.compose import make_plan, make_trainer
from lightning_bsl.models import NoisyQuadratic
from lightning_bsl.schedules import Plan

TINY = ("data=quadratic", "data.num_examples=256", "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
        "trainer.log_every_n_steps=2")  # fmt: skip
SWEEPS = [experiment for experiment in choices("experiment") if experiment != "surge_law"]


@pytest.mark.slow
def test_runs_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    run_python(ROOT / "scripts" / "train.py", "-m", *TINY, "seed=0,1", *launcher, folder=tmp_path)
    runs = [tmp_path / "sweep" / number for number in ("0", "1")]
    assert all((run / "finished.json").exists() for run in runs)
    first, second = [(run / "metrics.csv").read_text() for run in runs]
    assert first != second


def test_jobs_of_a_cluster_compose() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    cfg = compose_config(*TINY, "hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=1")
    assert "submitit" in cfg.hydra.launcher._target_
    assert cfg.hydra.launcher.gpus_per_node == 1


@pytest.mark.slow  # `test_stopped.py` has a run that goes on
def test_an_interrupted_sweep_goes_on(run: Run, tmp_path: Path) -> None:
    sweep, whole = tmp_path / "sweep", tmp_path / "whole"
    overrides = ("-m", "data=quadratic", "data.num_examples=256", "seed=0,1,2", "scheduler=increasing",
                 "scheduler.batch_size.start=32", "trainer.max_epochs=4", "trainer.enable_progress_bar=false",
                 "trainer.log_every_n_steps=7", "~callbacks.training_time")  # fmt: skip

    def prepare() -> None:
        def on_train_epoch_start(model: NoisyQuadratic) -> None:
            if model.current_epoch == 2 and model.trainer.default_root_dir == str(sweep / "1"):
                kill()

        NoisyQuadratic.on_train_epoch_start = on_train_epoch_start  # type: ignore[method-assign]

    run_killed("train.py", *overrides, f"hydra.sweep.dir={sweep}", prepare=prepare, folder=tmp_path)
    assert (sweep / "1" / "checkpoints" / "last.ckpt").exists()
    assert not (sweep / "1" / "finished.json").exists()
    assert not (sweep / "2").exists()
    first = sweep / "0" / "metrics.csv"
    before = first.stat().st_mtime_ns, first.read_bytes()
    plan = (sweep / "1" / "plan.csv").read_bytes()

    printed = run("train.py", *overrides, folder=sweep).out
    assert f"{sweep / '0'}: finished before, not trained again" in printed
    assert printed.count("finished before") == 1
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    run("train.py", *overrides, folder=whole)
    for number in ("0", "1", "2"):
        assert (sweep / number / "metrics.csv").read_bytes() == (whole / number / "metrics.csv").read_bytes(), number
        ends = [json.loads((folder / number / "finished.json").read_text()) for folder in (sweep, whole)]
        assert ends[0] == ends[1] and ends[0]["value"] is not None
        assert not (sweep / number / "metrics.before.csv").exists()
    assert (sweep / "1" / "plan.csv").read_bytes() == plan
    assert run("train.py", *overrides, folder=sweep).out.count("finished before") == 3


def test_the_folder_of_another_run_is_refused(run: Run, tmp_path: Path) -> None:
    run("train.py", *TINY, folder=tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    printed = run("train.py", *TINY, "model.condition=20", folder=tmp_path, fails=True).both
    assert "holds another run (condition: 10, condition: 20)" in printed
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert "finished before" in run("train.py", *TINY, folder=tmp_path).out


def test_what_is_not_training_may_change(run: Run, tmp_path: Path) -> None:
    run("train.py", *TINY, folder=tmp_path)
    assert "finished before" in run("train.py", *TINY, "data.num_workers=1", "logger=none", folder=tmp_path).out


def test_a_smoke_test_finishes_nothing(run: Run, tmp_path: Path) -> None:
    run("train.py", *TINY, folder=tmp_path)
    (tmp_path / "finished.json").unlink()  # as if interrupted
    before = (tmp_path / "metrics.csv").read_bytes()
    run("train.py", *TINY, "+trainer.fast_dev_run=true", folder=tmp_path)
    assert not (tmp_path / "finished.json").exists()
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_resumed_by_hand_in_its_own_folder(run: Run, tmp_path: Path) -> None:
    options = (*TINY, "~callbacks.training_time", "trainer.max_epochs=4")
    run("train.py", *options, folder=tmp_path / "whole")
    run("train.py", *options, "+callbacks.model_checkpoint.save_top_k=-1", folder=tmp_path / "cut")
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").glob("epoch=1-*.ckpt")
    run("train.py", *options, f"ckpt_path='{checkpoint}'", folder=tmp_path / "cut")
    assert (tmp_path / "cut" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_a_callback_that_is_not_chosen_is_none(run: Run, tmp_path: Path) -> None:
    cfg = compose_config("experiment=four_cases", "scale=small", "callbacks=none", f"hydra.runtime.output_dir={tmp_path}")
    names = [type(callback).__name__ for callback in make_trainer(cfg, instantiate(cfg.scheduler)).callbacks]
    assert "FullGradientNorm" not in names


@pytest.mark.quick(scale=["small"], experiment=SWEEPS[::2])
@pytest.mark.quick(scale=["medium"], experiment=["four_cases_tuned", "lr_growth"])
@pytest.mark.parametrize("scale", ["full", "medium", "small"])
@pytest.mark.parametrize("experiment", SWEEPS)
def test_the_runs_of_an_experiment(experiment: str, scale: str) -> None:
    chosen = (f"experiment={experiment}", f"scale={scale}")
    whole = compose_config(*chosen).hydra
    assert (whole.mode.name, whole.sweep.dir) == ("MULTIRUN", f"runs/{experiment}_{scale}")
    params = {name: str(values).split(",") for name, values in whole.sweeper.params.items()}
    assert params.pop("seed") == ["0", "1", "2"]
    assert params
    ends = [(values[0], values[-1]) for values in params.values()]
    for values in zip(*ends) if scale != "full" else itertools.product(*ends):
        given = [f"{name}={value}" for name, value in zip(params, values)]
        cfg = compose_config(*chosen, *given)
        for name, value in zip(params, values):
            if name in cfg.hydra.runtime.choices:
                assert cfg.hydra.runtime.choices[name] == value
        scheduler, datamodule = instantiate(cfg.scheduler), instantiate(cfg.data)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(gamma|at its maximum).*")  # what theory speaks against is compared too
            plan = make_plan(cfg, scheduler, datamodule)
        if isinstance(scheduler, AdaptiveBatchLRScheduler):
            assert plan is None
            continue
        assert plan is not None, given
        assert plan.steps == cfg.trainer.max_steps or plan.epochs == cfg.trainer.max_epochs, given


def planned(*overrides: str) -> Plan:
    """The plan of one run of an experiment."""
    cfg = compose_config(*overrides)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(gamma|at its maximum).*")
        plan = make_plan(cfg, instantiate(cfg.scheduler), instantiate(cfg.data))
    assert plan is not None
    return plan


def rows(plan: Plan) -> list[tuple[int, int, int]]:
    """Batch size, steps and samples of each stretch of one batch size."""
    groups = itertools.groupby(plan.stages, lambda stage: stage.batch_size)
    stages = [(batch_size, list(group)) for batch_size, group in groups]
    return [(size, sum(stage.steps for stage in group), sum(stage.samples for stage in group)) for size, group in stages]


@pytest.mark.parametrize("scheduler", ["increasing_decaying", "increasing_both", "increasing_warmup"])
def test_batches_grow_late_at_medium_scale(scheduler: str) -> None:
    chosen = ("experiment=four_cases_tuned", f"scheduler={scheduler}")
    assert rows(planned(*chosen)) == [(8, 4000, 32_000), (32, 1000, 32_000), (128, 250, 32_000), (512, 65, 32_000)]
    epochs = [13, 5]  # steps of an epoch of 6,400 examples at 512, and epochs
    assert epochs[0] * epochs[1] == 65 and epochs[0] >= 10
    in_steps = rows(planned("experiment=four_cases_in_steps", f"scheduler={scheduler}"))
    assert [size for size, _, _ in in_steps] == [8, 32, 128, 512]
    assert [steps for _, steps, _ in in_steps[:3]] == [196] * 3
    assert in_steps[3][1] == pytest.approx(196, abs=5)
    assert sum(samples for *_, samples in in_steps) == 128_000


@pytest.mark.parametrize("overrides", [
    ("experiment=four_cases_tuned",), ("experiment=four_cases", "scale=small"), ("experiment=samples_to_accuracy",)
])  # fmt: skip
def test_the_rate_of_the_control_falls_as_the_batch_grows(overrides: tuple[str, ...]) -> None:
    growing = planned(*overrides, "scheduler=increasing", "optimizer.lr=0.1")
    falling = planned(*overrides, "scheduler=step_decay", "optimizer.lr=0.1")
    assert len(growing.stages) == len(falling.stages) > 1
    for grown, fallen in zip(growing.stages, falling.stages):
        assert grown.samples == fallen.samples
        assert (grown.lr or 0) / grown.batch_size * growing.stages[0].batch_size == pytest.approx(fallen.lr)


def test_the_batch_grows_when_the_authors_does() -> None:
    chosen = ("experiment=samples_to_accuracy", "scale=medium")
    assert rows(planned(*chosen, "scheduler=increasing")) == [(128, 500, 64_000), (512, 130, 64_000)]
    assert rows(planned(*chosen, "scheduler=step_decay")) == rows(planned(*chosen, "scheduler=constant"))


def test_late_growth_takes_equal_tokens() -> None:
    switches = str(compose_config("experiment=late_growth").hydra.sweeper.params["scheduler.batch_size.at"]).split(",")
    switches = [switches[0], switches[2], switches[-1]]
    plans = [
        planned("experiment=late_growth", f"scheduler.batch_size.at={at}", "data.samples_per_epoch=1440") for at in switches
    ]
    assert {plan.samples for plan in plans} == {8 * 1440}
    small = [rows(plan)[0][2] for plan in plans]
    assert small == sorted(small)
    assert (small[0], rows(plans[-1])[1][1]) == (8, 1)  # the first step, and all but the last


@pytest.mark.parametrize("experiment", ["four_cases_tuned", "four_cases_in_steps"])
def test_every_scheduler_has_its_tuned_rate(experiment: str) -> None:
    whole = compose_config(f"experiment={experiment}")
    for scheduler in str(whole.hydra.sweeper.params.scheduler).split(","):
        assert compose_config(f"experiment={experiment}", f"scheduler={scheduler}").optimizer.lr == whole.rates[scheduler]
    assert compose_config(f"experiment={experiment}", "optimizer.lr=0.3").optimizer.lr == 0.3
