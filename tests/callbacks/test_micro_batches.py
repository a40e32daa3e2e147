"""A step split into micro-batches trains as the step in one piece."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from harness.cases import GROWING, SHRINKING
from harness.data import own, regression
from harness.files import flat
from harness.fits import fit
from harness.loops import train_by_hand, whole_steps
from harness.modules import Regression, assert_close, equal
from lightning_bsl import BatchLRScheduler
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.data.sampler import micro_batches
from lightning_bsl.schedules import Exponential, Milestones

N = 61  # a prime: no batch size divides it
DATA = regression(N)


def reference(schedule: Milestones, clip: float | None = None) -> Regression:
    model = Regression()
    train_by_hand(model, DATA, flat(whole_steps(schedule, N, 3)), clip)
    return model


@pytest.mark.quick(cap=[1, 5, 30], clip=[0.1])
@pytest.mark.quick(cap=[100], clip=[None])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("schedule", [GROWING, SHRINKING])
@pytest.mark.parametrize("cap", [1, 2, 5, 6, 30, 31, 100])
def test_equals_a_plain_loop(cap: int, schedule: Milestones, clip: float | None) -> None:
    scheduler = BatchLRScheduler(schedule, max_device_batch_size=cap)
    fit(model := Regression(), own(DATA), scheduler, gradient_clip_val=clip)
    assert_close(model, reference(schedule, clip))
    assert max(model.sizes) <= cap
    assert sorted(flat(model.examples)) == sorted([*range(N)] * 3)
    assert scheduler.progress.samples == 3 * N
    assert scheduler.plan is not None
    assert scheduler.progress.step == scheduler.plan.steps


def test_means_over_an_epoch_weigh_every_example_alike() -> None:
    trainer = fit(Regression(), own(DATA), BatchLRScheduler(GROWING, max_device_batch_size=4), max_epochs=1)
    (steps,) = whole_steps(GROWING, N, 1)
    mean = sum(len(step) * loss for step, loss in zip(steps, train_by_hand(Regression(), DATA, steps))) / N
    assert trainer.callback_metrics["loss"].item() == pytest.approx(mean, rel=1e-6)


def test_workers_deliver_the_same_micro_batches() -> None:
    models = [Regression(), Regression()]
    for model, workers in zip(models, (0, 2)):
        fit(model, own(DATA, num_workers=workers), BatchLRScheduler(GROWING, max_device_batch_size=5))
    assert models[0].journal == models[1].journal
    assert equal(*models)


@pytest.mark.quick(every=[6], schedule=[GROWING], caps=[(4, 4), (None, 4)])
@pytest.mark.quick(every=[6], schedule=[SHRINKING], caps=[(4, None)])
@pytest.mark.parametrize("every", [1, 6])
@pytest.mark.parametrize("caps", [(4, 4), (4, None), (None, 4), (5, 2)])
@pytest.mark.parametrize("schedule", [GROWING, SHRINKING])
def test_resumes_after_every_step_with_any_cap(
    schedule: Milestones, caps: tuple[int | None, int | None], every: int, tmp_path: Path
) -> None:
    def go(cap: int | None, folder: str, path: Path | None = None) -> tuple[Regression, BatchLRScheduler]:
        scheduler = BatchLRScheduler(schedule, Exponential(0.05, 0.9, every=3, unit="step"), max_device_batch_size=cap)
        every_step = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        fit(model := Regression(), own(DATA), scheduler, every_step, enable_checkpointing=True, ckpt_path=path)
        return model, scheduler

    first, clock = go(caps[0], "first")
    whole, _ = go(caps[1], "whole")
    for step in range(1, clock.progress.step, every):
        resumed, resumed_clock = go(caps[1], f"from {step}", tmp_path / "first" / f"step={step}.ckpt")
        assert_close(resumed, whole)
        assert resumed_clock.progress == clock.progress
        assert resumed.journal == [trained for trained in whole.journal if trained.step >= step]
        assert caps[0] != caps[1] or equal(resumed, whole)
    assert first.examples != whole.examples or caps[0] == caps[1]


class Interrupted(Exception):
    pass


def test_resumes_from_inside_a_step(tmp_path: Path) -> None:
    class Fails(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if len(self.journal) == 11:  # the third of the fourth step's four micro-batches
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
                raise Interrupted
            return super().training_step(batch, batch_idx)

    scheduler = BatchLRScheduler(GROWING, max_device_batch_size=2)
    with pytest.raises(Interrupted):
        fit(Fails(), own(DATA), scheduler)
    assert scheduler.progress.step == 2
    scheduler = BatchLRScheduler(GROWING, max_device_batch_size=2)
    fit(resumed := Regression(), own(DATA), scheduler, ckpt_path=tmp_path / "inside.ckpt")
    assert_close(resumed, reference(GROWING))
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
        recwarn.clear()
        model = Regression(nn.BatchNorm1d(4, dtype=torch.float64))
        fit(model, own(DATA), BatchLRScheduler(GROWING, max_device_batch_size=cap), max_epochs=2)
        assert sum("BatchNorm" in str(warning.message) for warning in recwarn.list) == expected


def test_refusals() -> None:
    with pytest.raises(ValueError, match="max_device_batch_size=0"):
        BatchLRScheduler(8, max_device_batch_size=0)
    scheduler = BatchLRScheduler(GROWING, max_device_batch_size=4)
    with pytest.raises(MisconfigurationException, match="samples_per_epoch"):
        fit(Regression(), own(DATA), copy.deepcopy(scheduler), limit_train_batches=0.5)
    with pytest.raises(MisconfigurationException, match="samples_per_epoch"):
        fit(Regression(), own(DATA), copy.deepcopy(scheduler), limit_train_batches=3)
    manual = Regression()
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(manual, own(DATA), copy.deepcopy(scheduler))
