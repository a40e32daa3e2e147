"""A step split into micro-batches trains as the step in one piece."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_bsl import BatchLRScheduler, BatchSizeDataModule
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.data.sampler import micro_batches
from lightning_bsl.schedules import Exponential, Milestones
from tests.helpers import flat, quiet

N = 61  # a prime: no batch size divides it
GROWING = Milestones([7, 12, 31], at=[4, 9], unit="step")
SHRINKING = Milestones([31, 13, 5], at=[70, 120], unit="samples")


class Regression(LightningModule):
    """A curved loss in float64, momentum, two layers."""

    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.net = nn.Sequential(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 1)).double()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.seen: list[list[int]] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y, index = batch
        self.seen.append(index.tolist())
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


def examples() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.prod(dim=1, keepdim=True), torch.arange(N))


def own(**arguments: Any) -> BatchSizeDataModule:
    return BatchSizeDataModule(examples(), seed=1, **arguments)


def fit(scheduler: BatchLRScheduler, model: Regression | None = None, **arguments: Any) -> Regression:
    model = model or Regression()
    path = arguments.pop("ckpt_path", None)
    datamodule = arguments.pop("datamodule", None) or own()
    Trainer(**quiet(**{"max_epochs": 3, **arguments})).fit(model, datamodule=datamodule, ckpt_path=path)
    return model


def train_by_hand(batch_size: Any, epochs: int, clip: float | None = None) -> tuple[nn.Module, list[float]]:
    """A plain PyTorch loop over the whole steps, and each epoch's mean loss over its examples."""
    data, model = examples(), Regression()
    optimizer = model.configure_optimizers()
    sampler = GlobalBatchSampler(N, batch_size, seed=1)
    clock, means = sampler.clock(), []
    for _ in range(epochs):
        order, losses = sampler.permutation(clock.epoch), 0.0
        while order:
            size = min(int(batch_size(clock)), len(order))
            x, y, _ = data[order[:size]]
            order = order[size:]
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model.net(x), y)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.net.parameters(), clip)
            optimizer.step()
            losses += loss.item() * size
            clock = clock.advance(size)
        means.append(losses / N)
        clock = clock.next_epoch()
    return model.net, means


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("schedule", [GROWING, SHRINKING])
@pytest.mark.parametrize("cap", [1, 2, 5, 6, 30, 31, 100])
def test_equals_a_plain_loop(cap: int, schedule: Milestones, clip: float | None) -> None:
    scheduler = BatchLRScheduler(schedule, max_device_batch_size=cap)
    model = fit(scheduler, callbacks=[scheduler], gradient_clip_val=clip)
    reference, _ = train_by_hand(schedule, 3, clip)
    assert_close(model.net, reference)
    assert max(map(len, model.seen)) <= cap
    assert sorted(flat(model.seen)) == sorted([*range(N)] * 3)
    assert scheduler.progress.samples == 3 * N
    assert scheduler.plan is not None
    assert scheduler.progress.step == scheduler.plan.steps


def test_means_over_an_epoch_weigh_every_example_alike() -> None:
    scheduler = BatchLRScheduler(GROWING, max_device_batch_size=4)
    trainer = Trainer(**quiet(max_epochs=1, callbacks=[scheduler]))
    trainer.fit(Regression(), datamodule=own())
    _, (mean,) = train_by_hand(GROWING, 1)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(mean, rel=1e-6)


def test_workers_deliver_the_same_micro_batches() -> None:
    seen = []
    for workers in (0, 2):
        scheduler = BatchLRScheduler(GROWING, max_device_batch_size=5)
        model = fit(scheduler, callbacks=[scheduler], datamodule=own(num_workers=workers))
        seen.append((model.seen, [parameter.tolist() for parameter in model.parameters()]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("caps", [(4, 4), (4, None), (None, 4), (5, 2)])
@pytest.mark.parametrize("schedule", [GROWING, SHRINKING])
def test_resumes_after_every_step_with_any_cap(
    schedule: Milestones, caps: tuple[int | None, int | None], tmp_path: Path
) -> None:
    def go(cap: int | None, folder: str, path: Path | None = None) -> tuple[Regression, BatchLRScheduler]:
        scheduler = BatchLRScheduler(schedule, Exponential(0.05, 0.9, every=3, unit="step"), max_device_batch_size=cap)
        every_step = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        callbacks = [scheduler, every_step]
        return fit(scheduler, callbacks=callbacks, enable_checkpointing=True, ckpt_path=path), scheduler

    first, clock = go(caps[0], "first")
    whole, _ = go(caps[1], "whole")
    for step in range(1, clock.progress.step):
        resumed, resumed_clock = go(caps[1], f"from {step}", tmp_path / "first" / f"step={step}.ckpt")
        assert_close(resumed.net, whole.net)
        assert resumed_clock.progress == clock.progress
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
        if caps[0] == caps[1]:
            assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert first.seen != whole.seen or caps[0] == caps[1]


class Interrupted(Exception):
    pass


def test_resumes_from_inside_a_step(tmp_path: Path) -> None:
    class Fails(Regression):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            if len(self.seen) == 11:  # the third of the fourth step's four micro-batches
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
                raise Interrupted
            return super().training_step(batch)

    scheduler = BatchLRScheduler(GROWING, max_device_batch_size=2)
    with pytest.raises(Interrupted):
        fit(scheduler, Fails(), callbacks=[scheduler])
    assert scheduler.progress.step == 2
    scheduler = BatchLRScheduler(GROWING, max_device_batch_size=2)
    resumed = fit(scheduler, callbacks=[scheduler], ckpt_path=tmp_path / "inside.ckpt")
    reference, _ = train_by_hand(GROWING, 3)
    assert_close(resumed.net, reference)
    assert scheduler.progress.samples == 3 * N


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 60))
def test_micro_batches_partition_a_step(examples: int, world_size: int, cap: int) -> None:
    parts = [micro_batches(examples, rank, world_size, cap) for rank in range(world_size)]
    assert flat(range(examples)[part] for process in parts for part in process) == list(range(examples))
    assert len({len(process) for process in parts}) == 1  # they step together
    sizes = [part.stop - part.start for process in parts for part in process]
    assert max(sizes) <= cap
    assert max(sizes) - min(sizes) <= 1 or min(sizes) == 0
    largest = math.ceil(examples / world_size)
    assert len(parts[0]) == math.ceil(largest / cap)  # no more than it takes


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 10), st.data())
def test_the_sampler_counts_its_batches(cap: int, world_size: int, epoch: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, N), min_size=3, max_size=3))
    schedule = Milestones(sizes, at=[2, 5], unit="step")
    clock = GlobalBatchSampler(N, 1).clock()._replace(epoch=epoch, step=epoch)
    for rank in range(world_size):
        sampler = GlobalBatchSampler(N, schedule, lambda: clock, rank=rank, world_size=world_size, max_device_batch_size=cap)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        size = int(schedule(clock))
        sampler.consumed = size.__int__
        assert batches[sampler.batches_in(size) :] == list(sampler)


def test_batch_norm_gets_one_warning(recwarn: pytest.WarningsRecorder) -> None:
    for cap, expected in ((31, 0), (30, 1)):
        scheduler = BatchLRScheduler(GROWING, max_device_batch_size=cap)
        recwarn.clear()
        fit(scheduler, Regression(nn.BatchNorm1d(4, dtype=torch.float64)), callbacks=[scheduler], max_epochs=2)
        assert sum("BatchNorm" in str(warning.message) for warning in recwarn.list) == expected


def test_refusals() -> None:
    with pytest.raises(ValueError, match="max_device_batch_size=0"):
        BatchLRScheduler(8, max_device_batch_size=0)
    scheduler = BatchLRScheduler(GROWING, max_device_batch_size=4)
    with pytest.raises(MisconfigurationException, match="samples_per_epoch"):
        fit(scheduler, callbacks=[copy.deepcopy(scheduler)], limit_train_batches=0.5)
    with pytest.raises(MisconfigurationException, match="samples_per_epoch"):
        fit(scheduler, callbacks=[copy.deepcopy(scheduler)], limit_train_batches=3)
    manual = Regression()
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(scheduler, manual, callbacks=[copy.deepcopy(scheduler)])
