"""The search for a growing schedule, run as a user runs it."""

from __future__ import annotations

import builtins
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from harness.commands import Run, run_script
from harness.configs import compose_config
from harness.files import ROOT
from lightning_bsl.models import NoisyQuadratic

optuna = pytest.importorskip("optuna")

TINY = ("data=quadratic", "data.num_examples=256", "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
        "~callbacks.training_time", "trainer.log_every_n_steps=2")  # fmt: skip


def trials(folder: Path) -> list[tuple[int, str, dict[str, Any], float | None]]:
    study = optuna.load_study(study_name="growth", storage=f"sqlite:///{folder}/study.db")
    return [(trial.number, trial.state.name, trial.params, trial.value) for trial in study.get_trials()]


def metrics(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.glob("*/metrics.csv"))}


def interrupt(monkeypatch: pytest.MonkeyPatch, when: Callable[[NoisyQuadratic], bool]) -> None:
    def stop(model: NoisyQuadratic) -> None:
        if when(model):
            raise RuntimeError("interrupted")

    monkeypatch.setattr(NoisyQuadratic, "on_train_epoch_start", stop)


@pytest.mark.slow
def test_goes_on_with_more_trials(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    run("search.py", *TINY, "search.trials=2", folder=folder)
    two, files = trials(folder), metrics(folder)
    assert [(number, state) for number, state, *_ in two] == [(number, "COMPLETE") for number in range(2)]
    assert list(files) == ["trial_000", "trial_001"]

    printed = run("search.py", *TINY, "search.trials=4", folder=folder).out
    four = trials(folder)
    assert four[:2] == two
    assert len({str(params) for *_, params, _ in four}) == len(four) == 4  # a seeded sampler might begin anew
    assert files.items() <= metrics(folder).items()
    assert "trial_001:" not in printed and "trial_002:" in printed

    *_, command = printed.strip().splitlines()
    best = min(four, key=lambda trial: trial[3])
    assert command.startswith(f"python {ROOT / 'scripts' / 'train.py'} data=quadratic data.num_examples=256")
    repeated = compose_config(*shlex.split(command)[2:])
    scheduler = repeated.scheduler
    assert scheduler.batch_size.start == best[2]["b_0"]
    assert scheduler.batch_size.factor == pytest.approx(best[2]["delta"], rel=1e-3)
    assert scheduler.lr.factor == pytest.approx(best[2]["delta"] ** best[2]["exponent"], rel=1e-3)
    assert scheduler.lr.start == pytest.approx(best[2]["eta_0"], rel=1e-3)
    assert scheduler.lr.every == scheduler.batch_size.every == pytest.approx(best[2]["every"], rel=1e-3)
    was = OmegaConf.load(folder / f"trial_{best[0]:03d}" / ".hydra" / "run.yaml")
    assert OmegaConf.to_container(was.scheduler) == OmegaConf.to_container(scheduler)


@pytest.mark.slow
def test_resumes_an_interrupted_trial(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("search.py", *TINY, "search.trials=3", folder=whole)
    with monkeypatch.context() as patch:
        interrupt(patch, lambda model: model.current_epoch == 1 and "trial_001" in str(model.trainer.default_root_dir))
        assert "interrupted" in run("search.py", *TINY, "search.trials=3", folder=cut, fails=True).err
    assert [state for _, state, *_ in trials(cut)] == ["COMPLETE", "RUNNING"]
    assert (cut / "trial_001" / "checkpoints" / "last.ckpt").exists()
    first = metrics(cut)["trial_000"]

    with monkeypatch.context() as patch:
        interrupt(patch, lambda model: model.current_epoch == 0 and "trial_001" in str(model.trainer.default_root_dir))
        run("search.py", *TINY, "search.trials=3", folder=cut)  # no first epoch again
    assert metrics(cut)["trial_000"] == first
    assert trials(cut) == trials(whole)
    assert [content for _, content in metrics(cut).values()] == [content for _, content in metrics(whole).values()]


@pytest.mark.slow
def test_takes_nothing_for_granted_of_an_unfinished_choice(run: Run, tmp_path: Path) -> None:
    run("search.py", *TINY, "search.trials=1", folder=tmp_path)
    study = optuna.load_study(study_name="growth", storage=f"sqlite:///{tmp_path}/study.db")
    study.ask().suggest_float("delta", 1.5, 4.0, log=True)  # interrupted before it had the others
    run("search.py", *TINY, "search.trials=2", folder=tmp_path)
    assert [state for _, state, *_ in trials(tmp_path)] == ["COMPLETE", "FAIL", "COMPLETE"]


@pytest.mark.slow
def test_leaves_out_what_is_refused(run: Run, tmp_path: Path) -> None:
    overrides = ("search.trials=5", "search.b_0=[16,512]", "dataset.max_batch_size=4096")
    printed = run("search.py", *TINY, *overrides, folder=tmp_path).out
    refused = [number for number, state, params, _ in trials(tmp_path) if params["b_0"] == 512]
    assert 0 < len(refused) < 5
    assert [state for _, state, *_ in trials(tmp_path)] == ["PRUNED" if n in refused else "COMPLETE" for n in range(5)]
    assert f"trial_{refused[0]:03d} does not count: " in printed
    *_, command = printed.strip().splitlines()
    assert "scheduler.batch_size.start=16 " in command


@pytest.mark.parametrize("overrides, message", [
    (("search.b_0=[512]", "dataset.max_batch_size=4096"), "no trial counts, of 2; the last, trial_001: "),
    pytest.param(("search.eta_0=[1e30,1e35]",), "train/loss", marks=pytest.mark.slow),
    pytest.param(("logger=none", "dataset.metric=val/nothing"), "no val/nothing was logged", marks=pytest.mark.slow),
    (("trainer=ddp_cpu",), "trainer.devices=1"),
    pytest.param(("scheduler=constant",), "scheduler.batch_size.factor", marks=pytest.mark.slow),
])  # fmt: skip
def test_says_why_it_finds_nothing(overrides: tuple[str, ...], message: str, run: Run, tmp_path: Path) -> None:
    assert message in run("search.py", *TINY, *overrides, "search.trials=2", folder=tmp_path, fails=True).both


def test_refuses_the_folder_of_another_search(run: Run, tmp_path: Path) -> None:
    run("search.py", *TINY, "search.trials=1", folder=tmp_path)
    printed = run("search.py", *TINY, "search.trials=2", "data.num_examples=512", folder=tmp_path, fails=True).both
    assert "num_examples: 256" in printed and "num_examples: 512" in printed


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    given = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "optuna":
            raise ModuleNotFoundError(f"No module named {name!r}", name="optuna")
        return given(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "lightning_bsl.app.search", raising=False)
    assert (
        run_script("search.py", *TINY, monkeypatch=monkeypatch) == "bsl-search needs Optuna: pip install 'lightning_bsl[sweep]'"
    )
