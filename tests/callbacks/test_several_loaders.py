"""Several training loaders: which one is scheduled, and what each mode of combining them yields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from harness.fits import fit
from harness.modules import equal
from lightning_bsl import BatchLRScheduler
from lightning_bsl.schedules import Exponential, Milestones, Progress
from lightning_bsl.schedules.functions import Function


def rows(number: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(number)).unsqueeze(1))


class Data(LightningDataModule):
    """``a`` follows the batch size, ``b`` does not."""

    def __init__(self, a: int, b: int, mode: Any = None, *, b_size: int = 2, batch_size: int = 1, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters("batch_size")
        self.a, self.b, self.mode, self.b_size, self.options = a, b, mode, b_size, options

    def train_dataloader(self) -> Any:
        loaders = {
            "a": DataLoader(rows(self.a), batch_size=self.hparams.batch_size, **self.options),
            "b": DataLoader(rows(self.b), batch_size=self.b_size, **self.options),
        }
        return loaders if self.mode is None else CombinedLoader(loaders, self.mode)


class Both(LightningModule):
    """Notes what it sees of each loader."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        nn.init.ones_(self.net.weight)
        self.seen: list[tuple[list[float] | None, list[float] | None]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = {name: None if part is None else part[0] for name, part in batch.items()}
        self.seen.append(tuple(None if x is None else x.flatten().tolist() for x in parts.values()))
        return sum(self.net(x / 10).square().mean() for x in parts.values() if x is not None)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def sizes(self) -> list[int]:
        """Of the batches of ``a``."""
        return [0 if a is None else len(a) for a, _ in self.seen]


def go(data: Data, sizes: Any, *callbacks: Any, name: Any = None, **options: Any) -> tuple[Both, BatchLRScheduler]:
    scheduler = BatchLRScheduler(sizes, 0.1, loader=name)
    fit(model := Both(), data, scheduler, *callbacks, **{"max_epochs": 1} | options)
    return model, scheduler


def grow(progress: Progress) -> int:
    """1 in the first epoch, then 2."""
    return 1 + (progress.epoch > 0)


CASES = [
    # rows of a, rows of b, mode, sizes, epochs, sizes of the batches of a
    (1, 4, "max_size", 1, 1, [1, 0]),
    (2, 4, "min_size", grow, 2, [1, 1, 2]),
    (2, 4, "max_size_cycle", grow, 2, [1, 1, 2, 2]),
    (5, 4, "max_size", grow, 2, [1] * 5 + [2, 2, 1]),
    (5, 20, "max_size", 2, 1, [2, 2, 1] + [0] * 7),
    (5, 20, "max_size_cycle", 2, 1, [2, 2, 1] * 3 + [2]),
    (5, 3, "max_size_cycle", 2, 1, [2, 2, 1]),
    (5, 20, None, Exponential(1, 2, every=3, unit="step", maximum=5), 1, [1, 1, 1, 2, 2, 2, 1, 4, 1, 5]),
    (7, 4, "min_size", 3, 2, [3, 3] * 2),
]


@pytest.mark.parametrize(("a", "b", "mode", "sizes", "epochs", "expected"), CASES)
def test_each_mode_is_planned_and_counted(
    a: int, b: int, mode: Any, sizes: int | Function, epochs: int, expected: list[int]
) -> None:
    model, scheduler = go(Data(a, b, mode), sizes, max_epochs=epochs)
    assert model.sizes == expected
    assert scheduler.plan is not None
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(expected), sum(expected))
    assert (scheduler.progress.step, scheduler.progress.samples) == (len(expected), sum(expected))


@pytest.mark.parametrize("limit", [4, 0.5])
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_a_limit_counts_what_they_yield(mode: str, limit: float) -> None:
    model, scheduler = go(Data(12, 10, mode), 2, max_epochs=2, limit_train_batches=limit)
    assert scheduler.plan is not None
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(model.seen), sum(model.sizes))
    assert scheduler.progress.samples == sum(model.sizes)


@pytest.mark.quick(shuffle=[True], drop_last=[False])
@pytest.mark.quick(shuffle=[False], drop_last=[True], mode=[None, "max_size"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("a", "b", "mode"), [(5, 20, "max_size"), (5, 20, "max_size_cycle"), (9, 4, None), (9, 4, "min_size")])
def test_both_loaders_resume(a: int, b: int, mode: Any, shuffle: bool, drop_last: bool, tmp_path: Path) -> None:
    def run(path: Path | None = None) -> Both:
        saver = ModelCheckpoint(tmp_path / str(path is None), filename="{step}", every_n_train_steps=1, save_top_k=-1)
        data = Data(a, b, mode, b_size=3, shuffle=shuffle, drop_last=drop_last)
        return go(data, grow, saver, max_epochs=2, ckpt_path=path, enable_checkpointing=True)[0]

    whole = run()
    for step in range(1, len(whole.seen), 3):
        resumed = run(tmp_path / "True" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:]
        assert equal(resumed, whole)


class Fixed(Data):
    """No loader follows anything."""

    def train_dataloader(self) -> Any:
        return {"a": DataLoader(rows(self.a), batch_size=2), "b": DataLoader(rows(self.b), batch_size=2)}


class Follow(Data):
    """Both loaders follow the batch size."""

    def train_dataloader(self) -> Any:
        return {name: DataLoader(rows(6), batch_size=self.hparams.batch_size) for name in "ab"}


def test_which_loader_is_scheduled_is_not_guessed() -> None:
    for data, followers in ((Fixed(6, 6), 0), (Follow(6, 6), 2)):
        with pytest.raises(MisconfigurationException, match=rf"2 training loaders, and {followers} of them.*loader=\.\.\."):
            go(data, 3)
    model, _ = go(Fixed(6, 6), 3, name="b")
    assert [[len(part or ()) for part in batch] for batch in model.seen] == [[2, 3], [2, 3], [2, 3]]
    with pytest.raises(MisconfigurationException, match=r"`loader='c'` is none.*\['a', 'b'\]"):
        go(Fixed(6, 6), 3, name="c")
    with pytest.raises(MisconfigurationException, match=r"`loader=5` is none.*\[0, 1\]"):
        fit(Both(), [DataLoader(rows(4)), DataLoader(rows(4))], BatchLRScheduler(2, loader=5))


def test_asking_once_is_enough() -> None:
    asked = []

    class Counts(Data):
        def train_dataloader(self) -> Any:
            asked.append(self.hparams.batch_size)
            torch.rand(3)
            return super().train_dataloader()

    after = []
    for name in (None, "a"):
        torch.manual_seed(0)
        data = Counts(6, 6, batch_size=3)
        go(data, grow, max_epochs=4, name=name)
        after.append(torch.rand(1))
        assert data.hparams.batch_size == 3
    assert asked == [3, 4, 3]  # Lightning's own, and once to see which one follows
    assert torch.equal(*after)  # to look draws no random numbers


def test_micro_batches_beside_another_loader() -> None:
    scheduler = BatchLRScheduler(4, 0.1, max_device_batch_size=2, loader="a")
    fit(model := Both(), Data(8, 4), scheduler, max_epochs=1)
    assert model.sizes == [2] * 4
    assert scheduler.progress.step == 2
    scheduler = BatchLRScheduler(4, 0.1, max_device_batch_size=2, loader="a")
    fit(model := Both(), Data(8, 6), scheduler, max_epochs=2)  # longer than the steps, not than the micro-batches
    assert model.sizes == [2] * 8
    assert scheduler.plan is not None
    assert scheduler.progress.step == scheduler.plan.steps == 4
    scheduler = BatchLRScheduler(4, 0.1, max_device_batch_size=4, loader="a")
    fit(model := Both(), Data(8, 6), scheduler, max_epochs=1)  # a bound that no step reaches
    assert model.sizes == [4, 4, 4]
    scheduler = BatchLRScheduler(4, 0.1, max_device_batch_size=2, loader="a")
    with pytest.raises(MisconfigurationException, match=r"in epoch 0 another loader, of 5 batches"):
        fit(Both(), Data(8, 10), scheduler, max_epochs=1)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.ones(1)


def test_a_stream_beside_the_scheduled_loader() -> None:
    class WithStream(Data):
        def train_dataloader(self) -> Any:
            stream = DataLoader(Endless(), batch_size=3, collate_fn=lambda rows: [torch.stack(rows)])
            loaders = {"a": DataLoader(rows(self.a), batch_size=7), "b": stream}
            return CombinedLoader(loaders, "min_size")

    model, scheduler = go(WithStream(7, 0), Milestones([2, 3], at=[2], unit="step"), name="a", max_epochs=2)
    assert model.sizes == [2, 2, 3, 3, 3, 1]
    assert scheduler.progress.samples == 14
