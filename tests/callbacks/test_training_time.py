"""The wall clock beside the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from harness import fits
from harness.clock import Clock, Ticks
from harness.data import own, regression
from harness.fits import quiet
from harness.modules import Recorder, Stateful
from lightning_bsl import BatchLRScheduler, FullGradientNorm, GradientNoiseScale, TrainingTime
from lightning_bsl.datasets import QuadraticNoise
from lightning_bsl.models import NoisyQuadratic
from lightning_bsl.runs import read_metrics


class Stop(Callback):
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


def fit(folder: Path, epochs: int, clock: Clock, *callbacks: Callback, ckpt_path: Path | None = None) -> Trainer:
    """Epochs of four steps, of 7 seconds each."""
    if not any(isinstance(callback, TrainingTime) for callback in callbacks):
        callbacks = (TrainingTime(), *callbacks)
    return fits.fit(
        NoisyQuadratic(), QuadraticNoise(num_examples=64), BatchLRScheduler(16, 0.1), *callbacks, Ticks(clock, epoch=7),
        max_epochs=epochs, log_every_n_steps=2, logger=CSVLogger(str(folder), name="", version=""), ckpt_path=ckpt_path,
    )  # fmt: skip


def seconds(folder: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["seconds"]) for row in read_metrics(folder / "metrics.csv")]


def test_seconds_are_in_every_row(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, 2, clock)
    assert seconds(tmp_path) == [(1, 7), (3, 7), (3, 7), (5, 14), (7, 14), (7, 14)]


def test_a_resumed_run_goes_on_counting(tmp_path: Path, clock: Clock) -> None:
    trainer = fit(tmp_path / "first", 2, clock)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    clock.now += 100  # is not training
    fit(tmp_path / "then", 3, clock, ckpt_path=tmp_path / "last.ckpt")
    assert [after for _, after in seconds(tmp_path / "then")] == [21, 21, 21]


def test_one_callback_in_several_fits(tmp_path: Path, clock: Clock) -> None:
    time = TrainingTime()
    fit(tmp_path / "first", 3, clock, time)
    assert time.seconds == 21
    fit(tmp_path / "again", 1, clock, time)
    assert seconds(tmp_path / "again")[-1][1] == time.seconds == 7
    clock.now += 100
    assert time.seconds == 7  # stands still between fits


def test_an_interrupted_fit_stops_the_clock(tmp_path: Path, clock: Clock) -> None:
    time = TrainingTime()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, 3, clock, time, Stop())
    clock.now += 100
    assert time.seconds == 14  # two whole epochs


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_what_processes_reduce_is_a_number(unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all our callbacks: Lightning reduces a tensor on the device on which it lies, and NCCL knows no CPU."""
    reduced: dict[str, list[Any]] = {}
    log = Recorder.log

    def spy(module: Recorder, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        if options.get("sync_dist"):
            reduced.setdefault(name, []).append(value)
        log(module, name, value, *arguments, **options)

    monkeypatch.setattr(Recorder, "log", spy)
    callbacks = [
        TrainingTime(),
        GradientNoiseScale(every=1, probe_every=1),
        FullGradientNorm(unit=unit),
        BatchLRScheduler(8, 0.1),
    ]
    logger = CSVLogger(tmp_path, name="", version="")
    fits.fit(Stateful(), own(regression(30, 6, torch.float32)), *callbacks, logger=logger, log_every_n_steps=2)
    assert {"seconds", "gradient_variance"} <= reduced.keys()
    for name, values in reduced.items():
        assert {type(value) for value in values} <= {int, float}, name


def test_a_checkpoint_that_is_only_validated_is_not_ours(tmp_path: Path) -> None:
    time = TrainingTime()
    time.setup(Trainer(**quiet()), NoisyQuadratic(), "validate")
    time.load_state_dict({"seconds": 100.0})
    assert time.seconds == 0
