"""Our groups in applications of others, and configurations of others in our commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harness.commands import Run, run_script
from harness.configs import CONF, choices
from harness.files import ROOT, csv_rows
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler
from lightning_bsl.app.commands import COMMANDS, command, overview

OURS = {"hydra": {"searchpath": ["pkg://lightning_bsl.conf"]}}


def foreign(folder: Path, config: dict[str, Any], *overrides: str) -> DictConfig:
    """What an application with such a ``config.yaml`` composes."""
    (folder / "config.yaml").write_text(yaml.safe_dump(OURS | config))
    with initialize_config_dir(str(folder), version_base=None):
        return compose("config", list(overrides))


@pytest.mark.parametrize("scheduler", choices("scheduler"))
def test_every_scheduler_stands_in_an_application_without_any_of_our_nodes(scheduler: str, tmp_path: Path) -> None:
    made = instantiate(foreign(tmp_path, {"epochs": 3}, f"+scheduler={scheduler}").scheduler)
    assert isinstance(made, BatchLRScheduler | AdaptiveBatchLRScheduler)


@pytest.mark.parametrize("config, lr", [
    ({}, 0.1),
    ({"optimizer": {"lr": 0.004, "name": "adam"}}, 0.004),
    ({"model": {"optimizer": {"lr": 0.003}}}, 0.003),
    ({"optimizer": {"lr": 0.004}, "model": {"optimizer": {"lr": 0.003}}}, 0.004),
    ({"optimizer": "adam", "model": "resnet", "dataset": "cifar"}, 0.1),
    ({"model": {"optimizer": "sgd"}, "optimizer": None}, 0.1),
])  # fmt: skip
def test_the_first_rate_is_that_of_the_application(config: dict[str, Any], lr: float, tmp_path: Path) -> None:
    cfg = foreign(tmp_path, config, "+scheduler=increasing_both")
    assert (instantiate(cfg.scheduler.lr).start, instantiate(cfg.scheduler.batch_size).maximum) == (lr, 512)
    chosen = foreign(
        tmp_path, config, "+scheduler=increasing_both", "schedule_defaults.lr=0.02", "schedule_defaults.max_batch_size=64"
    )
    assert (chosen.scheduler.lr.start, chosen.scheduler.batch_size.maximum) == (0.02, 64)


def test_the_scheduler_among_the_callbacks_of_a_template(tmp_path: Path) -> None:
    config = {"callbacks": {"stop": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss"}}}
    place = "scheduler@callbacks.batch_lr"
    cfg = foreign(tmp_path, config, f"+{place}=increasing_warmup", "scheduler/lr@callbacks.batch_lr.lr=cosine")
    _, scheduler = (instantiate(callback) for callback in cfg.callbacks.values())
    assert isinstance(scheduler, BatchLRScheduler)
    assert type(scheduler.schedule.lr).__name__ == "Cosine"
    scaled = foreign(tmp_path, config, f"+{place}=increasing", "scheduler/lr@callbacks.batch_lr.lr=sqrt_scaling")
    assert instantiate(scaled.callbacks.batch_lr).schedule.lr.base_batch_size == 8


@pytest.mark.parametrize("callback", [choice for choice in choices("callbacks") if choice != "none"])
def test_callbacks_stand_beside_those_of_others(callback: str, tmp_path: Path) -> None:
    nodes = {
        "dataset": {"metric": "val/loss", "metric_mode": "min"},
        "output_dir": str(tmp_path),
        "scheduler": {"batch_size": 8},
    }
    cfg = foreign(
        tmp_path, nodes | {"callbacks": {"theirs": {"_target_": "lightning.pytorch.Callback"}}}, f"+callbacks={callback}"
    )
    assert set(cfg.callbacks) == {"theirs", callback}
    assert all(map(instantiate, cfg.callbacks.values()))


def test_resolvers_of_others_stay() -> None:
    OmegaConf.register_new_resolver("mul", lambda x, y: "theirs", replace=True)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", ["scheduler=increasing_warmup", "output_dir=."])
        assert instantiate(cfg.scheduler.lr).then.start == 0.5
        assert OmegaConf.create({"a": "${mul:1,2}"}).a == "theirs"
    finally:
        OmegaConf.clear_resolver("mul")


def test_a_configuration_directory_of_the_user(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for group in ("data", "scheduler"):
        (mine / group).mkdir(parents=True)
    data = {"defaults": ["quadratic"], "data": {"num_examples": 128}}  # ours, with another number
    (mine / "data" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(data))
    (mine / "scheduler" / "mine.yaml").write_text(
        yaml.safe_dump({"_target_": "lightning_bsl.BatchLRScheduler", "batch_size": 16, "lr": 0.1})
    )
    options = (
        f"--config-dir={mine}",
        "data=mine",
        "scheduler=mine",
        "trainer.max_epochs=2",
        "trainer.enable_progress_bar=false",
    )
    for script in ("plan.py", "train.py"):
        run(script, *options, folder=tmp_path / script)
        (stage,) = csv_rows(tmp_path / script / "plan.csv")
        assert (stage["batch_size"], stage["samples"]) == ("16", "256")


def test_grids_are_not_for_training(run: Run, tmp_path: Path) -> None:
    assert "Could not override 'surge'" in run("train.py", "surge=cnn5", folder=tmp_path, fails=True).both
    assert "surge_grid.py trains it" in run("train.py", "+surge=cnn5", folder=tmp_path, fails=True).both
    assert "Could not override 'scale'" in run("train.py", "scale=small", folder=tmp_path, fails=True).both
    assert not (tmp_path / "metrics.csv").exists()


def test_messages_name_the_command_as_it_was_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    for called, expected in (
        ("/usr/bin/bsl-plan", "bsl-train"),
        ("scripts/plan.py", "python scripts/train.py"),
        (str(ROOT / "scripts" / "plan.py"), f"python {ROOT}/scripts/train.py"),
        ("elsewhere/plan.py", "bsl-train"),  # a program of the user
        ("-c", "bsl-train"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        assert command("bsl-train") == expected
    with pytest.raises(ValueError, match=r"no command 'bsl-tarin'; there are bsl-train, bsl-plan"):
        command("bsl-tarin")
    assert all(name in overview() for name in COMMANDS)


@pytest.mark.parametrize("script", ["report.py", "surge_report.py"])
def test_usage_names_the_command(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(script, monkeypatch=monkeypatch) == 2
    assert f"usage: {script}" in capsys.readouterr().err
