"""Growth that a measurement decides on, inside an epoch, while workers have been asked for batches ahead."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from harness import fits
from harness.data import own, regression
from harness.files import FASHION_MNIST, flat
from harness.modules import Regression, equal
from lightning_bsl import BatchLRScheduler
from lightning_bsl.callbacks import (
    AdaptiveBatchLRScheduler,
    GradientNoiseScale,
    GradientNormTrigger,
    NoiseTarget,
    PlateauTrigger,
)
from lightning_bsl.datasets import FashionMNIST
from lightning_bsl.models import Classifier, cnn5
from lightning_bsl.runs import read_metrics
from lightning_bsl.schedules import LinearScaling, SurgeScaling
from lightning_bsl.theory.noise_scale import NoiseScale

N = 61
DATA = regression(N)


def at_steps(*steps: int) -> Any:
    """A trigger that advances at these checks."""
    return lambda trainer, scheduler: scheduler.progress.step in steps


def fit(scheduler: BatchLRScheduler, *callbacks: Callback, workers: int = 0, **arguments: Any) -> Regression:
    model = Regression(nn.Dropout(0.2))
    torch.manual_seed(4)
    fits.fit(model, own(DATA, DATA, num_workers=workers), scheduler, *callbacks, **arguments)
    return model


def adaptive(trigger: Any, **arguments: Any) -> AdaptiveBatchLRScheduler:
    return AdaptiveBatchLRScheduler(
        **{"batch_size": 4, "lr": 0.01, "trigger": trigger, "maximum": 30, "check_every": 1} | arguments
    )


@pytest.mark.quick(workers=[0], cap=[None], steps=[(3,), (15, 16)])
@pytest.mark.quick(workers=[0], cap=[5, "auto"], steps=[(2, 16, 40)])
@pytest.mark.quick(workers=[2], cap=[5], steps=[(1, 5, 9)])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cap", [None, 5, "auto"])
@pytest.mark.parametrize("steps", [(3,), (1, 5, 9), (15, 16), (2, 16, 40)])
def test_grows_inside_the_epoch(steps: tuple[int, ...], cap: Any, workers: int, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    scheduler = adaptive(at_steps(*steps), max_device_batch_size=cap)
    model = fit(scheduler, workers=workers, logger=logger, log_every_n_steps=1)
    for epoch in range(3):  # each example once an epoch, across every change
        assert sorted(flat(batch.examples for batch in model.journal if batch.epoch == epoch)) == list(range(N))
    starts = [segment.start for segment in scheduler.segments]
    clock, batches = 0, iter(model.journal)
    for _ in range(3):  # step by step: the size and the rate of the segment that its first example lies in
        left = N
        while left:
            segment = scheduler.segments[sum(start <= clock for start in starts) - 1]
            size, taken = min(segment.batch_size, left), 0
            while taken < size:
                batch = next(batches)
                taken += len(batch.examples)
                assert batch.lr == segment.lr
            assert taken == size
            left, clock = left - size, clock + size
    assert next(batches, None) is None
    assert scheduler.progress.samples == clock == 3 * N
    assert len(model.validated) == 3  # at the end of each epoch, though it has become shorter
    for stage, segment in enumerate(scheduler.segments):
        assert segment.batch_size == min(4 * 2**stage, 30)
        assert segment.lr == pytest.approx(0.01 * math.sqrt(2) ** stage)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "stage" in row]
    assert [row["stage"] for row in rows] == list(range(1, len(rows) + 1))
    assert [(row["batch_size"], row["lr"]) for row in rows] == [pytest.approx(each[1:]) for each in scheduler.segments[1:]]
    assert rows[0]["step"] == steps[0] - 1
    if not workers:
        assert rows[0]["samples"] == starts[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_is_the_open_loop_run_of_its_own_decisions(workers: int) -> None:
    scheduler = adaptive(at_steps(3, 9, 20))
    model = fit(scheduler, workers=workers)
    again = fit(BatchLRScheduler(scheduler.schedule.batch_size, scheduler.schedule.lr), workers=workers)
    assert model.journal == again.journal
    assert equal(model, again)


TRIGGERS = {
    "norm": lambda: GradientNormTrigger(start=1.5, batch_size=20),
    "plateau": lambda: PlateauTrigger("val/loss", patience=2, min_delta=9),
}


@pytest.mark.quick(every=[13], workers=[0], cap=[5], trigger=["plateau"])
@pytest.mark.quick(every=[13], workers=[2], cap=[None], trigger=["norm"])
@pytest.mark.parametrize("every", [5, 13])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cap", [None, 5])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_resumes_bit_for_bit(trigger: str, cap: int | None, workers: int, every: int, tmp_path: Path) -> None:
    def scheduler() -> AdaptiveBatchLRScheduler:
        return adaptive(TRIGGERS[trigger](), check_every=3, max_device_batch_size=cap)

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    arguments: Any = {"workers": workers, "val_check_interval": 0.5, "enable_checkpointing": True}
    first = scheduler()
    whole = fit(first, saver, **arguments)
    assert len(first.segments) > 2
    last = max(int(path.stem[5:]) for path in tmp_path.glob("*.ckpt"))
    for step in range(2, last, every):
        if trigger == "plateau" and step in whole.validated:
            continue  # Lightning leaves out the validation that was due just after the checkpoint
        again = scheduler()
        resumed = fit(again, ckpt_path=tmp_path / f"step={step}.ckpt", **arguments)
        assert again.segments == first.segments, step
        assert resumed.journal == [batch for batch in whole.journal if batch.step >= step]
        assert equal(resumed, whole), step


def test_the_progress_bar_and_is_last_batch_follow() -> None:
    class Watching(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            last.append(trainer.is_last_batch)
            totals.append(bar.train_progress_bar.total)

    last: list[bool] = []
    totals: list[int] = []
    bar = TQDMProgressBar()
    fit(adaptive(at_steps(3)), bar, Watching(), enable_progress_bar=True, max_epochs=2)
    batches = 3 + math.ceil((N - 12) / 8)
    assert totals[2:batches] == [batches] * (batches - 2)
    assert [i for i, each in enumerate(last) if each] == [batches - 1, batches - 1 + math.ceil(N / 8)]


def test_the_threshold_follows_its_rule(tmp_path: Path) -> None:
    for rule, ratio in (("batch", math.sqrt(1 / 2)), ("growth", 2 ** (-1 / 4))):
        trigger = GradientNormTrigger(start=2.0, rule=rule)  # type: ignore[arg-type]
        scheduler = adaptive(trigger, check_every=2, maximum=16)
        logger = CSVLogger(tmp_path / rule, name="", version="")
        fit(scheduler, logger=logger, max_epochs=6)
        rows = read_metrics(tmp_path / rule / "metrics.csv")
        stage, steps = 0, []
        for row in rows:
            if "threshold" in row:
                assert row["threshold"] == pytest.approx(2.0 * ratio**stage)
                if stage < 2 and row["full_gradient_norm"] <= row["threshold"]:
                    stage += 1
                    steps.append(row["step"])
        assert stage == scheduler.stage > 0
        assert [row["step"] for row in rows if "stage" in row] == steps


def test_scaling_rules() -> None:
    scheduler = adaptive(at_steps(3, 9), lr=LinearScaling(0.01, base_batch_size=4))
    model = fit(scheduler)
    assert set(model.rates) == {0.01, 0.02, 0.04}
    scheduler = adaptive(at_steps(3, 9), lr=None)
    assert set(fit(scheduler).rates) == {0.05}
    scheduler = adaptive(at_steps(3, 9), max_lr=0.012)
    assert set(fit(scheduler).rates) == {0.01, 0.012}


def test_capped_and_begun_anew() -> None:
    scheduler = adaptive(lambda *_: True, delta=1.5)
    model = fit(scheduler)
    assert [segment.batch_size for segment in scheduler.segments] == [4, 6, 9, 14, 21, 30]
    again = fit(scheduler)
    assert again.journal == model.journal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": 1.0}, "delta=1.0"),
        ({"gamma": 0.9}, "gamma=0.9"),
        ({"batch_size": 64, "maximum": 32}, "batch_size=64.*maximum=32"),
        ({"check_every": 0}, "check_every=0"),
        ({"lr": 0.2, "max_lr": 0.1}, "lr=0.2.*max_lr=0.1"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveBatchLRScheduler(**{"lr": 0.1} | arguments)


def test_refusals() -> None:
    for make, message in (
        (lambda: GradientNormTrigger(start=0), "start=0"),
        (lambda: GradientNormTrigger(rule="paper"), "rule='paper'"),  # type: ignore[arg-type]
        (lambda: PlateauTrigger("loss", patience=0), "patience=0"),
        (lambda: PlateauTrigger("loss", mode="least"), "mode='least'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="an epoch has only 61 examples"):
        fit(adaptive(at_steps(1), maximum=64))
    with pytest.raises(MisconfigurationException, match="limit_train_batches"):
        fit(adaptive(at_steps(1)), limit_train_batches=0.5)
    with pytest.raises(ValueError, match="monitor='val/los'` is not logged"):
        fit(adaptive(PlateauTrigger("val/los")))
    with pytest.raises(MisconfigurationException, match="BatchSizeDataModule"):
        fits.fit(Regression(), [], adaptive(at_steps(1)))


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_on_fashion_mnist(tmp_path: Path) -> None:
    scheduler = AdaptiveBatchLRScheduler(
        8, 0.05, GradientNormTrigger(start=3.0, subset=1000), gamma=1.4, maximum=256, check_every=40
    )
    logger = CSVLogger(tmp_path, name="", version="")
    torch.manual_seed(0)
    data = FashionMNIST(FASHION_MNIST, samples_per_epoch=4000)
    fits.fit(Classifier(cnn5(width=4), 10), data, scheduler, max_epochs=2, logger=logger, limit_val_batches=0)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert scheduler.stage >= 2
    advances = [row for row in rows if "stage" in row]
    assert [row["stage"] for row in advances] == list(range(1, scheduler.stage + 1))
    assert all((row["step"] + 1) % 40 == 0 and row["samples"] % 4000 for row in advances)  # at a check, inside an epoch
    for row, segment in zip(advances, scheduler.segments[1:], strict=True):
        assert (row["samples"], row["batch_size"], row["lr"]) == pytest.approx(segment)
    checks = [row for row in rows if "threshold" in row]
    for check in checks:
        stage = sum(row["step"] < check["step"] for row in advances)
        assert check["threshold"] == pytest.approx(3.0 * math.sqrt(8 / scheduler.segments[stage].batch_size))
        assert (check["full_gradient_norm"] <= check["threshold"]) == any(row["step"] == check["step"] for row in advances)


def test_the_surge_law_of_the_measured_noise_scale() -> None:
    class Known(GradientNoiseScale):
        measured = property(lambda self: self.known)  # type: ignore[assignment]
        known: NoiseScale | None = None

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            step = trainer.global_step
            value = 10.0 * (1 + step // 8)
            interval = (value / 1.5, value * 1.5) if step < 16 else (1.0, math.inf)
            self.known = NoiseScale(1.0, value, *interval) if step >= 4 else None

    rule = SurgeScaling(0.1, noise_batch_size=32)
    scheduler = adaptive(NoiseTarget(), lr=rule, check_every=4)
    model = fit(scheduler, Known(probe_every=None))
    assert model.rates[:8] == pytest.approx([rule(4)] * 8)  # nothing measured yet at the first check
    assert [segment.batch_size for segment in scheduler.segments] == [4, 8, 16]
    for segment, noise in zip(scheduler.segments[1:], (10.0, 20.0)):  # at steps 8 and 12
        assert segment.lr == pytest.approx(SurgeScaling(0.1, noise)(segment.batch_size))
    assert set(model.rates) == {segment.lr for segment in scheduler.segments}  # the last one that was known well enough
