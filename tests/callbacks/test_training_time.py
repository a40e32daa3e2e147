"""The wall clock beside the metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_bsl import BatchLRScheduler, TrainingTime
from lightning_bsl.data import QuadraticNoise
from lightning_bsl.models import NoisyQuadratic
from lightning_bsl.report import read_metrics


class Slow(Callback):
    def on_train_epoch_start(self, *_: Any) -> None:
        time.sleep(0.1)


class Stop(Callback):
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


def fit(
    folder: Path, epochs: int, *callbacks: Callback, ckpt_path: str | None = None, clock: TrainingTime | None = None
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, log_every_n_steps=2, enable_progress_bar=False, enable_model_summary=False,
        logger=CSVLogger(str(folder), name="", version=""),
        callbacks=[BatchLRScheduler(16, 0.1), clock or TrainingTime(), Slow(), *callbacks],
    )  # fmt: skip
    trainer.fit(NoisyQuadratic(), QuadraticNoise(num_examples=64), ckpt_path=ckpt_path)
    return trainer


def seconds(folder: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["seconds"]) for row in read_metrics(folder / "metrics.csv")]


def test_seconds_are_in_every_row(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    rows = seconds(tmp_path)
    assert [step for step, _ in rows] == [1, 3, 3, 5, 7, 7]
    times = [time for _, time in rows]
    assert times == sorted(times)
    assert times[0] >= 0.1
    assert 0.2 <= times[-1] < 30


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    trainer = fit(tmp_path / "first", 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    time.sleep(0.3)  # is not training
    fit(tmp_path / "then", 3, ckpt_path=str(tmp_path / "last.ckpt"))
    before, after = seconds(tmp_path / "first")[-1][1], seconds(tmp_path / "then")[0][1]
    assert before + 0.1 <= after < before + 0.4


def test_one_callback_in_several_fits(tmp_path: Path) -> None:
    clock = TrainingTime()
    fit(tmp_path / "first", 3, clock=clock)
    fit(tmp_path / "again", 1, clock=clock)
    assert seconds(tmp_path / "again")[-1][1] < 0.3 <= clock.seconds + 0.2
    before = clock.seconds
    time.sleep(0.01)
    assert clock.seconds == before  # stands still between fits


def test_an_interrupted_fit_stops_the_clock(tmp_path: Path) -> None:
    clock = TrainingTime()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, 3, Stop(), clock=clock)
    before = clock.seconds
    time.sleep(0.01)
    assert clock.seconds == before > 0.2


def test_a_checkpoint_that_is_only_validated_is_not_ours(tmp_path: Path) -> None:
    clock = TrainingTime()
    clock.setup(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), NoisyQuadratic(), "validate")
    clock.load_state_dict({"seconds": 100.0})
    assert clock.seconds == 0
