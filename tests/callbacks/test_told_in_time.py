"""What the plan knows is said before the first step, and so is what cannot follow it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, TensorDataset

from harness.data import Stranger, own, regression
from harness.files import flat
from harness.fits import fit, trained
from harness.loops import train_by_hand
from harness.modules import Recorder, Regression, assert_close, equal
from harness.tiers import diagonal
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.schedules import Exponential, JointSchedule, Milestones, Progress, plan

DATA = regression(61)


# --- BatchNorm and batches of one example


def rows(number: int) -> TensorDataset:
    return TensorDataset(torch.randn(number, 3, 4, 4), torch.arange(number))


class Normed(Recorder):
    """Normalises what an example gives: one value of each channel, or several."""

    def __init__(self, several: bool = False) -> None:
        several_values = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 1))
        super().__init__(several_values if several else nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 1)))

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("number", "sizes", "cap", "epoch"),
    [
        (3, 2, None, 0),
        (9, Milestones([3, 4], at=[1]), None, 1),
        (10, Milestones([5, 3], at=[2]), None, 2),
        (5, 5, 2, 0),  # micro-batches of 1, 2 and 2
        (6, 1, None, 0),
    ],
)
def test_a_batch_of_one_example_is_refused_before_the_first_step(number: int, sizes: Any, cap: Any, epoch: int) -> None:
    model = Normed()
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(MisconfigurationException, match=rf"in epoch {epoch} .*BatchNorm needs two.*drop_last=True"):
        fit(model, own(rows(number)), BatchLRScheduler(sizes, max_device_batch_size=cap))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batch_norm_that_has_two_values() -> None:
    model = trained(Normed(several=True), own(rows(3)), BatchLRScheduler(2))
    assert model.sizes == [2, 1] * 3
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert trained(Normed(), own(rows(3), drop_last=True), BatchLRScheduler(2)).sizes == [2] * 3
    assert trained(Normed(), own(rows(4)), BatchLRScheduler(2)).sizes == [2, 2] * 3
    evaluated = Normed()
    evaluated.on_train_batch_start = lambda *_: evaluated.net.eval() and None  # type: ignore[method-assign]
    assert trained(evaluated, own(rows(3)), BatchLRScheduler(2)).sizes == [2, 1] * 3


# --- drop_last


@pytest.mark.parametrize("sizes, cap", diagonal([7, Milestones([7, 12, 5], at=[3, 9], unit="step")], [None, 4]))
def test_drop_last(sizes: Any, cap: Any, tmp_path: Path) -> None:
    def go(path: Path | None = None) -> tuple[Regression, BatchLRScheduler]:
        saver = ModelCheckpoint(tmp_path / str(path is None), "{step}", every_n_train_steps=1, save_top_k=-1)
        scheduler = BatchLRScheduler(sizes, max_device_batch_size=cap)
        fit(model := Regression(), own(DATA, drop_last=True), scheduler, saver, ckpt_path=path, enable_checkpointing=True)
        return model, scheduler

    model, scheduler = go()
    steps: list[list[int]] = []
    clock = Progress()
    for epoch in range(3):
        order = GlobalBatchSampler(61, 1, seed=1).permutation(epoch)
        while len(order) >= (size := JointSchedule(sizes).batch_size_at(clock)):
            steps.append(order[:size])
            order, clock = order[size:], clock.advance(size)
        clock = clock.next_epoch()
    assert flat(model.examples) == flat(steps)
    train_by_hand(by_hand := Regression(), DATA, steps)
    assert_close(model, by_hand)
    assert scheduler.plan is not None
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(steps), len(flat(steps)))
    assert (scheduler.progress.step, scheduler.progress.samples) == (len(steps), len(flat(steps)))
    alone = plan(JointSchedule(sizes), 61, epochs=3, drop_last=True)
    assert (alone.steps, alone.samples, alone.horizon.samples) == (len(steps), len(flat(steps)), len(flat(steps)))
    for step in (3, 8, len(steps) - 2):
        resumed, clock_of_resumed = go(tmp_path / "True" / f"step={step}.ckpt")
        assert equal(resumed, model)
        assert clock_of_resumed.progress == scheduler.progress


def test_drop_last_without_the_callback() -> None:
    loader = own(DATA, batch_size=8, drop_last=True).train_dataloader()
    assert [len(batch[0]) for batch in loader] == [8] * len(loader) == [8] * 7


# --- loaders that cannot be re-made


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


class Buckets(Sampler[list[int]]):
    """A batch sampler of somebody's own; it follows if it is told."""

    def __init__(self, batch_size: int | None = None) -> None:
        if batch_size is not None:
            self.batch_size, self.drop_last, self.sampler = batch_size, False, range(61)
        self.size = batch_size or 4

    def __len__(self) -> int:
        return -(-61 // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, min(start + self.size, 61))) for start in range(0, 61, self.size))


class Prefetching(DataLoader[Any]):
    """Has behaviour of its own."""

    def __iter__(self) -> Any:
        return super().__iter__()


class Longer(DataLoader[Any]):
    def __len__(self) -> int:
        return 99


class Batches:
    """Any iterable of batches."""

    def __iter__(self) -> Any:
        return iter([DATA[:4], DATA[4:8]])


class Slots(Stranger):
    """Makes whatever loader it is told to."""

    def __init__(self, make: Any) -> None:
        super().__init__(DATA)
        self.make = make

    def train_dataloader(self) -> Any:
        return self.make(self.hparams.batch_size)


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(Stream(), batch_size=4), r"reads a stream \(Stream\)"),
        (DataLoader(DATA, batch_sampler=Buckets()), r"batch sampler of its own \(Buckets\)"),
        (DataLoader(DATA, batch_sampler=[[0, 1], [2]]), r"batch sampler of its own \(list\)"),
        (DataLoader([[torch.ones(2, 3)]] * 3, batch_size=None), "`batch_size=None`"),
        (DataLoader(DATA, batch_size=None, sampler=BatchSampler(RandomSampler(DATA), 4, False)), "`batch_size=None`"),
        (Prefetching(DATA, batch_size=4), "is a Prefetching, which overrides `__iter__`"),
        (Longer(DATA, batch_size=4), "is a Longer, which overrides"),
        (Batches(), "is not a DataLoader but a Batches"),
    ],
)
def test_what_cannot_be_remade_says_so(loader: Any, reason: str) -> None:
    model = Regression()
    with pytest.raises(MisconfigurationException, match=rf"{reason}.*with `shuffle` or a `sampler`.*BatchSizeDataModule"):
        fit(model, loader, BatchLRScheduler(4))
    assert model.journal == []
    # Lightning has replaced them while it asked for the loader
    assert not [name for name in vars(DataLoader) if name.startswith("__old")]


def test_an_adaptive_scheduler_needs_more() -> None:
    stream = Slots(lambda size: DataLoader(Stream(), batch_size=size))
    scheduler = AdaptiveBatchLRScheduler(4, 0.1, lambda *_: True, maximum=8)
    with pytest.raises(MisconfigurationException, match=r"reads a stream.*BatchSizeDataModule"):
        fit(Regression(), stream, scheduler)


@pytest.mark.parametrize(
    "make", [lambda size: DataLoader(Stream(), batch_size=size), lambda size: DataLoader(DATA, batch_sampler=Buckets(size))]
)
def test_one_that_follows_changes_between_epochs(make: Any) -> None:
    scheduler = BatchLRScheduler(Milestones([8, 16, 32], at=[1, 2]))
    model = trained(Regression(), data := Slots(make), scheduler)
    assert model.sizes == [8] * 7 + [5] + [16] * 3 + [13] + [32, 29]
    assert (scheduler.progress.step, scheduler.progress.samples) == (14, 3 * 61)
    assert data.hparams.batch_size == 16
    with pytest.raises(MisconfigurationException, match="its steps cannot be split"):
        fit(Regression(), Slots(make), BatchLRScheduler(4, max_device_batch_size=2))
    with pytest.raises(MisconfigurationException, match=r"the batch size 15 cannot be split evenly.*multiples of 2"):
        fit(Regression(), Slots(make), BatchLRScheduler(15), accumulate_grad_batches=2)


@pytest.mark.parametrize("caches", ["now", "later"])
def test_one_that_does_not_follow_is_refused(caches: str) -> None:
    kept: list[Any] = []

    def make(size: int) -> Any:
        if caches == "now":
            return DataLoader(DATA, batch_sampler=Buckets(10))
        kept.append(kept[0] if kept else DataLoader(DATA, batch_sampler=Buckets(size)))
        return kept[-1]

    model = Regression()
    with pytest.raises(MisconfigurationException, match=r"(but the training loader has|still has) batch_size=1[06]"):
        fit(model, Slots(make), BatchLRScheduler(Milestones([16, 32], at=[1])))
    assert model.journal == []


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from DATA


@pytest.mark.parametrize(
    ("make", "bounds", "sizes", "warns"),
    [
        (Stream, {"max_epochs": 1}, Exponential(4, 2), True),
        (Endless, {"max_steps": 5}, Exponential(4, 2, every=2, unit="step"), True),
        (Stream, {"max_epochs": 2, "limit_train_batches": 3}, Exponential(4, 2), False),
        (Stream, {"max_epochs": 1}, 4, False),
        (None, {"max_epochs": 1}, Exponential(4, 2), True),
        (None, {"max_steps": 5}, Exponential(4, 2, every=2, unit="step"), True),
        (None, {"max_epochs": 2}, Exponential(4, 2), False),
    ],
)
def test_growth_that_will_not_come_is_said(make: Any, bounds: dict[str, Any], sizes: Any, warns: bool) -> None:
    def loader(size: int) -> Any:
        return DataLoader(DATA, batch_sampler=Buckets(size)) if make is None else DataLoader(make(), batch_size=size)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Regression(), Slots(loader), BatchLRScheduler(sizes), **bounds)
    assert any("changes only between epochs" in str(warning.message) for warning in caught) is warns


# --- what changes under way


class Grows(LightningDataModule):
    """Has more examples in each epoch."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return DataLoader(regression(20 + 10 * self.trainer.current_epoch), batch_size=4)


def test_a_data_set_that_grows_is_trained_and_said() -> None:
    scheduler = BatchLRScheduler(10)
    with pytest.warns(UserWarning, match="epoch 1 has 30 training examples, .* planned with 20"):
        model = trained(Regression(), Grows(), scheduler, reload_dataloaders_every_n_epochs=1)
    assert model.sizes == [10] * (2 + 3 + 4)
    assert scheduler.progress.samples == 90
    assert model.announced == [2, 3, 4]


class Lengthens(Sampler[int]):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(20 + 10 * self.epoch))


def test_a_sampler_that_gives_more_is_trained_and_said() -> None:
    scheduler = BatchLRScheduler(10)
    with pytest.warns(UserWarning, match="epoch 1 has 30 training examples, .* planned with 20"):
        model = trained(Regression(), DataLoader(DATA, sampler=Lengthens()), scheduler)
    assert model.sizes == [10] * (2 + 3 + 4)
    assert model.announced == [2, 3, 4]
    assert scheduler.progress.samples == 90


def test_loaders_are_reloaded_when_the_user_says() -> None:
    asked: list[int] = []

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            assert self.trainer is not None
            asked.append(self.trainer.current_epoch)
            return DataLoader(DATA, batch_size=4, shuffle=True)

    trained(Regression(), Data(), BatchLRScheduler(Exponential(4, 2)), max_epochs=4, reload_dataloaders_every_n_epochs=3)
    assert asked == [0, 3]  # the batch grows every epoch, and Lightning is asked to look at its loader anew each time
    asked.clear()
    trained(Regression(), Data(), BatchLRScheduler(Exponential(4, 2)), max_epochs=4)
    assert asked == [0]


# --- checkpoints of another version


def test_a_checkpoint_of_the_version_before_is_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(Regression(), own(DATA), BatchLRScheduler(4), saver, enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt")
    for name in ("version", "seed"):
        del checkpoint["callbacks"]["BatchLRScheduler"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    model = Regression()
    with pytest.raises(
        MisconfigurationException, match=r"another version .*\(format 1; this one reads 5\).*load_from_checkpoint"
    ):
        fit(model, own(DATA), BatchLRScheduler(4), ckpt_path=tmp_path / "old.ckpt", max_epochs=5)
    assert model.journal == []


def test_a_run_keeps_the_order_of_its_seed(tmp_path: Path) -> None:
    def go(seed: int, path: Path | None = None) -> Regression:
        torch.manual_seed(seed)
        saver = ModelCheckpoint(tmp_path / str(seed), "{step}", every_n_train_steps=1, save_top_k=-1)
        options: dict[str, Any] = {"enable_checkpointing": True, "ckpt_path": path}
        return trained(Regression(), DataLoader(DATA, shuffle=True), BatchLRScheduler(9), saver, **options)

    one, other = go(1), go(2)
    assert one.examples != other.examples
    assert go(3, tmp_path / "1" / "step=4.ckpt").examples == one.examples[4:]


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError])
def test_an_error_of_a_schedule_is_told_as_it_is(error: type[Exception]) -> None:
    def batch_size(progress: Progress) -> float:
        raise error("the size of the user")

    # Lightning would take a TypeError for a loader that cannot be iterated
    kind = MisconfigurationException if error is TypeError else error
    with pytest.raises(kind, match=f"{'TypeError: ' if error is TypeError else ''}.*the size of the user"):
        fit(Regression(), DataLoader(regression(16)), BatchLRScheduler(batch_size))
    fit(Regression(), DataLoader(regression(16)), BatchLRScheduler(8))  # DataLoader is as it was
