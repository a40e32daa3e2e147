"""Beside Lightning's own callbacks and the Trainer's bounds: everything counts as it should while the batch size grows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from harness.clock import Clock, Ticks
from harness.data import Stranger
from harness.files import flat, logged
from harness.fits import fit, quiet, trained
from harness.modules import Recorder, equal
from lightning_bsl import BatchLRScheduler, BatchSizeDataModule
from lightning_bsl.schedules import Cosine, Exponential, Milestones, Progress

N = 70
DATA = TensorDataset(torch.linspace(-1, 1, N).unsqueeze(1), torch.arange(N))
GROWING = Exponential(16, factor=2, every=1, maximum=64)
EPOCHS = [[16, 16, 16, 16, 6], [32, 32, 6], [64, 6], [64, 6]]  # the sizes of the batches of GROWING
STEPWISE = Exponential(0.01, factor=0.9, every=2, unit="step")


class Module(Recorder):
    """Its validation loss is ever worse."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))
        with torch.no_grad():
            self.net.weight.fill_(2.0), self.net.bias.fill_(0.5)
        self.losses = iter(range(1000))

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """What is logged, is logged at the end."""

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/size", float(len(batch[0])), reduce_fx="max")

    def on_validation_epoch_end(self) -> None:
        before = len(self.validated)
        super().on_validation_epoch_end()
        if len(self.validated) > before:
            self.log("val/loss", float(next(self.losses)))


def strangers() -> Stranger:
    return Stranger(DATA, DATA, batch_size=7)


def own(**arguments: Any) -> BatchSizeDataModule:
    return BatchSizeDataModule(DATA, DATA, DATA, eval_batch_size=7, **arguments)


both = pytest.mark.parametrize("datamodule", [own, strangers])


def train(datamodule: Any, *callbacks: Callback, **arguments: Any) -> Module:
    """Four epochs, unless told."""
    return trained(Module(), datamodule, *callbacks, **{"max_epochs": 4} | arguments)


# --- LearningRateMonitor -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rate_monitor(datamodule: Any, first: bool, interval: Any, tmp_path: Path) -> None:
    callbacks = [LearningRateMonitor(interval), BatchLRScheduler(GROWING, STEPWISE)]
    logger = CSVLogger(tmp_path, name="", version="")
    model = train(datamodule(), *callbacks[:: 1 if first else -1], logger=logger, log_every_n_steps=1)
    rates = [0.01 * 0.9 ** (step // 2) for step in range(len(flat(EPOCHS)))]
    assert model.rates == pytest.approx(rates)
    steps = range(len(rates)) if interval == "step" else [0, *accumulate(map(len, EPOCHS[:-1]))]
    assert logged(tmp_path, "lr-SGD") == pytest.approx({step: rates[step] for step in steps})


# --- ModelCheckpoint ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick(datamodule=[own])
@pytest.mark.quick(saved=[[5, 8], [8, 12]])
@both
@pytest.mark.parametrize(
    ("arguments", "saved"),
    [
        ({"monitor": "val/loss", "mode": "min", "save_top_k": 2}, [5, 8]),
        ({"monitor": "val/loss", "mode": "max", "save_top_k": 1, "save_on_train_epoch_end": True}, [12]),
        ({"monitor": "samples", "mode": "max", "save_top_k": 2}, [10, 12]),
        ({"save_top_k": -1, "every_n_train_steps": 5}, [5, 10]),
        ({"save_top_k": -1, "every_n_epochs": 2}, [8, 12]),
        ({"save_top_k": -1, "every_n_epochs": 1, "save_on_train_epoch_end": True}, [5, 8, 10, 12]),
        ({"save_top_k": -1, "train_time_interval": timedelta(microseconds=1)}, list(range(1, 13))),
    ],
)
def test_checkpoints(datamodule: Any, arguments: dict[str, Any], saved: list[int], tmp_path: Path) -> None:
    def callbacks(folder: str) -> tuple[BatchLRScheduler, ModelCheckpoint]:
        return BatchLRScheduler(GROWING, STEPWISE), ModelCheckpoint(tmp_path / folder, "{step}", **arguments)

    whole = train(datamodule(), *callbacks("whole"), enable_checkpointing=True)
    paths = {int(path.stem.partition("=")[2]): path for path in (tmp_path / "whole").glob("step=*.ckpt")}
    assert sorted(paths) == saved
    ends = [*accumulate(map(len, EPOCHS))]
    for step, path in paths.items():
        if datamodule is strangers and step not in ends:
            continue  # Lightning cannot resume a loader inside an epoch
        resumed = train(datamodule(), *callbacks("resumed"), enable_checkpointing=True, ckpt_path=path)
        assert resumed.examples == whole.examples[step:]
        assert resumed.rates == whole.rates[step:]
        assert resumed.validated == [end for end in ends if end > step]
        assert equal(resumed, whole)


# --- what stops a run --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_early_stopping_at_the_end_of_an_epoch(datamodule: Any, on_train_epoch_end: bool, tmp_path: Path) -> None:
    stopping = EarlyStopping("val/loss", patience=2, check_on_train_epoch_end=on_train_epoch_end)
    checkpoint = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=on_train_epoch_end)
    scheduler = BatchLRScheduler(GROWING, STEPWISE)
    model = train(datamodule(), scheduler, stopping, checkpoint, enable_checkpointing=True, max_epochs=9)
    assert stopping.stopped_epoch == 2
    assert model.sizes == flat(EPOCHS[:3])
    assert scheduler.progress._replace(horizon=Progress().horizon) == Progress(epoch=3, step=10, samples=3 * N)
    whole = train(datamodule(), BatchLRScheduler(GROWING, STEPWISE), max_epochs=9)
    resumed = train(datamodule(), BatchLRScheduler(GROWING, STEPWISE), max_epochs=9, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.examples == whole.examples[10:]
    assert resumed.rates == whole.rates[10:]


@both
def test_early_stopping_inside_an_epoch(datamodule: Any, tmp_path: Path) -> None:
    # the loss is looked at after the steps 2, 4, 6, 7, 8: the third is no better than the first, in the second epoch
    scheduler, stopping = BatchLRScheduler(GROWING, STEPWISE), EarlyStopping("val/loss", patience=2)
    logger = CSVLogger(tmp_path, name="", version="")
    arguments = {"max_epochs": 4, "val_check_interval": 0.5, "logger": logger, "log_every_n_steps": 100}
    trainer = Trainer(**quiet(callbacks=[scheduler, stopping], **arguments))
    trainer.fit(model := Module(), datamodule=datamodule())
    assert model.validated == [2, 4, 6]
    assert model.sizes == [*EPOCHS[0], 32]
    assert (scheduler.progress.step, scheduler.progress.samples) == (6, N + 32)
    assert logged(tmp_path, "samples")[5] == N + 32
    assert logged(tmp_path, "batch_size")[5] == 32
    # Lightning ends the epoch there and then, and resumes with the next
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    scheduler = BatchLRScheduler(GROWING, STEPWISE)
    resumed = train(datamodule(), scheduler, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.sizes == flat(EPOCHS[2:])
    assert resumed.rates == pytest.approx([0.01 * 0.9 ** (step // 2) for step in range(6, 10)])
    assert (scheduler.progress.epoch, scheduler.progress.samples) == (4, N + 32 + 2 * N)


@pytest.mark.quick(seconds=[85])
@both
@pytest.mark.parametrize("as_argument", [True, False])
@pytest.mark.parametrize("seconds", [85, 40, 130])
def test_max_time(datamodule: Any, as_argument: bool, seconds: int, clock: Clock) -> None:
    scheduler, duration = BatchLRScheduler(GROWING, STEPWISE), timedelta(seconds=seconds)
    bounds: Any = {"max_time": duration} if as_argument else {"max_epochs": -1}
    callbacks = [scheduler] if as_argument else [Timer(duration), scheduler]
    trainer = fit(model := Module(), datamodule(), Ticks(clock, batch=10), *callbacks, **bounds)
    sizes = [*flat(EPOCHS), *EPOCHS[-1] * 10]
    assert model.sizes == sizes[: ceil(seconds / 10)]
    assert (scheduler.progress.step, scheduler.progress.samples) == (len(model.sizes), sum(model.sizes))
    assert model.rates == pytest.approx([0.01 * 0.9 ** (step // 2) for step in range(len(model.rates))])
    assert trainer.reload_dataloaders_every_n_epochs == 0


@both
@pytest.mark.parametrize(
    ("schedule", "unit"),
    [
        ((Exponential(16, 2, every=0.5), 0.1), "epoch"),
        ((GROWING, Cosine(0.1)), "epoch"),
        ((GROWING, Cosine(0.1, unit="samples")), "samples"),
    ],
)
def test_no_fraction_of_a_run_bounded_by_time_alone(datamodule: Any, schedule: Any, unit: str) -> None:
    trainer = Trainer(**quiet(max_time={"seconds": 5}, callbacks=[BatchLRScheduler(*schedule)]))
    with pytest.raises(ValueError, match=rf"length in unit '{unit}', which is not known here.*`max_epochs`"):
        trainer.fit(model := Module(), datamodule=datamodule())
    assert trainer.max_epochs == -1
    assert model.examples == []


@both
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (5, [32, 32, 6, 64, 6]),  # the end of an epoch
        (3, [32, 32, 6, 64, 6]),  # inside one, which Lightning takes for ended all the same
        (6, [64, 6, 64, 6, 64]),
    ],
)
def test_max_steps_alone(datamodule: Any, first: int, then: list[int], tmp_path: Path) -> None:
    sizes: list[int] = []
    for steps in (first, first + 5):
        scheduler = BatchLRScheduler(GROWING, STEPWISE)
        trainer = Trainer(**quiet(max_epochs=-1, max_steps=steps, callbacks=[scheduler]))
        trainer.fit(model := Module(), datamodule=datamodule(), ckpt_path=tmp_path / "last.ckpt" if sizes else None)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        sizes += model.sizes
        assert (scheduler.progress.step, scheduler.progress.samples) == (steps, sum(sizes))
        assert model.rates == pytest.approx([0.01 * 0.9 ** (step // 2) for step in range(steps)][-len(model.rates) :])
    assert sizes == flat(EPOCHS)[:first] + then


# --- one after another -------------------------------------------------------------------------------------------------------


def test_one_trainer_fits_on_with_another_datamodule() -> None:
    scheduler = BatchLRScheduler(GROWING, STEPWISE)
    trainer = Trainer(**quiet(max_epochs=1, callbacks=[scheduler]))
    model, theirs, ours = Module(), strangers(), own()
    for epoch, datamodule in enumerate([ours, theirs, ours, theirs]):
        trainer.fit_loop.max_epochs = epoch + 1
        trainer.fit(model, datamodule=datamodule)
        assert model.sizes == flat(EPOCHS[: epoch + 1])
        assert (scheduler.progress.epoch, scheduler.progress.samples) == (epoch + 1, (epoch + 1) * N)
        assert theirs.hparams.batch_size == 7
        assert len(next(iter(ours.train_dataloader()))[0]) == 32  # its own `batch_size` again
    assert model.rates == pytest.approx([0.01 * 0.9 ** (step // 2) for step in range(len(model.rates))])


@both
def test_a_finished_trainer_fits_no_further(datamodule: Any) -> None:
    scheduler = BatchLRScheduler(GROWING, STEPWISE)
    trainer, data = Trainer(**quiet(max_epochs=2, callbacks=[scheduler])), datamodule()
    for _ in range(2):
        trainer.fit(model := Module(), datamodule=data)
    assert model.examples == []
    assert scheduler.progress.samples == 2 * N


def test_one_scheduler_in_all_kinds_of_fits() -> None:
    scheduler = BatchLRScheduler(GROWING, STEPWISE, max_device_batch_size=None)
    for datamodule in (own(), strangers(), own(num_workers=1), strangers()):
        model = train(datamodule, scheduler)
        assert model.sizes == flat(EPOCHS)
        assert scheduler.progress._replace(horizon=Progress().horizon) == Progress(epoch=4, step=12, samples=4 * N)


@both
def test_validation_and_test_before_and_after(datamodule: Any, tmp_path: Path) -> None:
    scheduler, data, model = BatchLRScheduler(GROWING, STEPWISE), datamodule(), Module()
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = Trainer(**quiet(max_epochs=2, callbacks=[scheduler, checkpoint], enable_checkpointing=True))

    def evaluate(**arguments: Any) -> None:
        trainer.validate(model, datamodule=data, verbose=False, **arguments)
        (found,) = trainer.test(model, datamodule=data, verbose=False, **arguments)
        assert found == {"test/size": 7}

    evaluate()
    without = Trainer(**quiet(max_epochs=1))
    without.fit(Module(), datamodule=datamodule())
    without.save_checkpoint(tmp_path / "without.ckpt")
    for epochs in (2, 4):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, datamodule=data)
        assert model.sizes == flat(EPOCHS[:epochs])
        clock = scheduler.progress
        evaluate()
        for name in ("epoch=0.ckpt", "without.ckpt"):
            evaluate(ckpt_path=tmp_path / name)
        assert scheduler.progress == clock
    assert model.rates == pytest.approx([0.01 * 0.9 ** (step // 2) for step in range(12)])
    assert model.validated == [5, 8, 10, 12]


# --- when validation runs ----------------------------------------------------------------------------------------------------


@pytest.mark.quick(datamodule=[own])
@pytest.mark.quick(steps=[[2, 4, 7, 10, 12], [7, 12]])
@both
@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, [5, 8, 10, 12]),
        ({"val_check_interval": 1.0}, [5, 8, 10, 12]),
        ({"val_check_interval": 0.5}, [2, 4, 6, 7, 8, 9, 10, 11, 12]),  # of 5 batches every second, of 3 or 2 each
        ({"val_check_interval": 0.4}, [2, 4, 6, 7, 8, 9, 10, 11, 12]),
        ({"val_check_interval": 0.01}, list(range(1, 13))),
        ({"val_check_interval": 2}, [2, 4, 7, 10, 12]),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 10]),
        ({"val_check_interval": 7, "check_val_every_n_epoch": None}, [7]),
        ({"check_val_every_n_epoch": 2}, [8, 12]),
        ({"check_val_every_n_epoch": 3, "val_check_interval": 0.5}, [9, 10]),
        ({"check_val_every_n_epoch": 2, "val_check_interval": 2}, [7, 12]),
    ],
)
def test_validation_runs_when_it_should(datamodule: Any, arguments: dict[str, Any], steps: list[int]) -> None:
    model = train(datamodule(), BatchLRScheduler(GROWING, STEPWISE), **arguments)
    assert model.validated == steps
    assert model.sizes == flat(EPOCHS)


@pytest.mark.parametrize(
    ("interval", "steps"), [(1.0, [6, 9, 11, 13]), (0.5, [3, 6, 7, 8, 9, 10, 11, 12, 13]), (2, [2, 4, 6, 8, 11, 13])]
)
def test_validation_where_the_batch_grows_inside_an_epoch(interval: float, steps: list[int]) -> None:
    # 10 10 10 10 | 20 10; 30 30 10; 60 10; 60 10
    schedule = Milestones([10, 20, 30, 60], at=[4, 6, 9], unit="step")
    model = train(own(), BatchLRScheduler(schedule), val_check_interval=interval)
    assert model.sizes == [10, 10, 10, 10, 20, 10, 30, 30, 10, 60, 10, 60, 10]
    assert model.validated == steps


# --- how much of an epoch ----------------------------------------------------------------------------------------------------


@pytest.mark.quick(datamodule=[own])
@pytest.mark.quick(sizes=[[16, 32, 64, 64]])
@both
@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"limit_train_batches": 2}, [16, 16, 32, 32, 64, 6, 64, 6]),
        ({"limit_train_batches": 1}, [16, 32, 64, 64]),
        ({"limit_train_batches": 0.5}, [16, 16, 32, 64, 64]),
        ({"limit_train_batches": 0.7}, [16, 16, 16, 32, 32, 64, 64]),
        ({"overfit_batches": 2}, [16, 16, 32, 32, 64, 6, 64, 6]),
        ({"overfit_batches": 0.5}, [16, 16, 32, 64, 64]),
    ],
)
def test_parts_of_an_epoch(datamodule: Any, arguments: dict[str, Any], sizes: list[int]) -> None:
    scheduler = BatchLRScheduler(GROWING, Cosine(0.1, end=0.01, unit="step"))
    model = train(datamodule(), scheduler, **arguments)
    assert model.sizes == sizes
    assert scheduler.plan is not None
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(sizes), sum(sizes))
    assert (scheduler.progress.step, scheduler.progress.samples) == (len(sizes), sum(sizes))
    if "overfit_batches" in arguments:
        for batch in model.examples:
            assert batch == [*range(batch[0], batch[0] + len(batch))]  # in order, the same in every epoch


@both
@pytest.mark.parametrize("runs", [True, 2])
def test_fast_dev_run_validates(datamodule: Any, runs: int) -> None:
    scheduler = BatchLRScheduler(GROWING, Cosine(0.1))
    model = train(datamodule(), scheduler, fast_dev_run=runs)
    assert model.sizes == [16] * int(runs)
    assert model.validated == [int(runs)]


# --- progress bars -----------------------------------------------------------------------------------------------------------


class Rich(RichProgressBar):
    def total(self) -> float:
        assert self.progress is not None and self.train_progress_bar_id is not None
        (task,) = (task for task in self.progress.tasks if task.id == self.train_progress_bar_id)
        assert task.total is not None
        return task.total


class TQDM(TQDMProgressBar):
    def total(self) -> float:
        return self.train_progress_bar.total


needs_fixed_rich = pytest.mark.skipif(
    not RequirementCache("lightning>=2.5.3"), reason="its bar fails with a recent Rich, whatever is trained"
)


@both
@pytest.mark.parametrize("kind", [pytest.param(Rich, marks=needs_fixed_rich), TQDM])
def test_progress_bars(datamodule: Any, kind: Callable[[], Any]) -> None:
    totals: list[list[float]] = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            totals.append([])

        def on_train_batch_end(self, *_: Any) -> None:
            totals[-1].append(bar.total())

    bar = kind()
    train(datamodule(), BatchLRScheduler(GROWING, STEPWISE), bar, Watch(), enable_progress_bar=True)
    assert totals == [[len(epoch)] * len(epoch) for epoch in EPOCHS]


# --- gradient clipping -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping(datamodule: Any, algorithm: str) -> None:
    model = train(datamodule(), BatchLRScheduler(GROWING, STEPWISE), gradient_clip_val=0.3, gradient_clip_algorithm=algorithm)
    reference = Module()
    optimizer = reference.configure_optimizers()
    clipped = 0
    for step, batch in enumerate(model.examples):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.9 ** (step // 2)
        optimizer.zero_grad()
        reference.net(DATA.tensors[0][batch]).square().mean().backward()
        if algorithm == "norm":
            clipped += nn.utils.clip_grad_norm_(reference.parameters(), 0.3).item() > 0.3
        else:
            clipped += any(bool((parameter.grad.abs() > 0.3).any()) for parameter in reference.parameters())
            nn.utils.clip_grad_value_(reference.parameters(), 0.3)
        optimizer.step()
    assert clipped > len(model.examples) / 2
    assert model.sizes == flat(EPOCHS)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
