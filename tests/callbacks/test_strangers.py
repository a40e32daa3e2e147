"""Loaders, modules and habits of other people."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from harness.data import Stranger, own
from harness.fits import fit, trained
from harness.modules import Recorder
from lightning_bsl import BatchLRScheduler
from lightning_bsl.schedules import Cosine, Exponential, Milestones

N = 70
X = torch.linspace(-1, 1, N).unsqueeze(1)
DATA = TensorDataset(X, X, torch.arange(N))
GROWING = Exponential(16, factor=2, every=1, maximum=64)


class Module(Recorder):
    """Linear."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing is logged."""


class Data(Stranger):
    """Without validation."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__(DATA, batch_size=batch_size, shuffle=True)


@pytest.mark.parametrize("drop_last", [False, True])
def test_torchs_own_batch_sampler_is_planned(drop_last: bool) -> None:
    class Follows(Data):
        def train_dataloader(self) -> Any:
            return DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), self.hparams.batch_size, drop_last))

    scheduler = BatchLRScheduler(GROWING)
    model = trained(Module(), Follows(), scheduler)
    assert scheduler.plan is not None
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(model.sizes), sum(model.sizes))
    assert scheduler.progress.samples == sum(model.sizes)


@pytest.mark.parametrize(
    "sampler, examples", [(RandomSampler(DATA, replacement=True, num_samples=140), 140), (SubsetRandomSampler(range(64)), 64)]
)
def test_the_sampler_says_how_long_an_epoch_is(sampler: Any, examples: int) -> None:
    class Sampled(Data):
        def train_dataloader(self) -> Any:
            return DataLoader(DATA, batch_size=self.hparams.batch_size, sampler=sampler)

    scheduler = BatchLRScheduler(GROWING, Cosine(0.1, unit="step"))
    model = trained(Module(), Sampled(), scheduler)
    assert scheduler.plan is not None
    assert scheduler.plan.steps == len(model.sizes)
    assert scheduler.progress.samples == scheduler.plan.samples == 3 * examples


@pytest.mark.parametrize("caches", ["in setup", "in train_dataloader"])
def test_a_cached_loader_stays_as_it_is(caches: str) -> None:
    class Cached(Data):
        loader: Any = None

        def setup(self, stage: str) -> None:
            self.loader = DataLoader(DATA, batch_size=16) if caches == "in setup" else None

        def train_dataloader(self) -> Any:
            self.loader = self.loader or DataLoader(DATA, batch_size=self.hparams.batch_size)
            return self.loader

    model = trained(Module(), datamodule := Cached(), BatchLRScheduler(GROWING))
    assert model.sizes == [16] * 4 + [6] + [32, 32, 6] + [64, 6]
    assert [len(batch[0]) for batch in datamodule.loader] == [16] * 4 + [6]


def test_looking_ahead_draws_no_random_numbers() -> None:
    class Draws(Data):
        def train_dataloader(self) -> Any:
            torch.rand(1)
            return super().train_dataloader()

    orders = []
    for schedule in (GROWING, 16):  # a constant size gives no reason to look ahead
        torch.manual_seed(0)
        orders.append(trained(Module(), Draws(), BatchLRScheduler(schedule), max_epochs=1).examples)
    assert orders[0] == orders[1]


def test_a_dict_of_loaders() -> None:
    class Two(Data):
        def train_dataloader(self) -> Any:
            return {"a": super().train_dataloader(), "b": DataLoader(TensorDataset(torch.rand(9, 1)), batch_size=3)}

    class Takes(Module):
        def batch(self, batch: Any) -> list[Tensor]:
            tensors: list[Tensor] = batch["a"]
            return tensors

    scheduler = BatchLRScheduler(GROWING, Cosine(0.1, unit="step"))
    model = trained(Takes(), Two(), scheduler)
    # three batches of "b" have Lightning begin "a" again in the last epoch
    assert model.sizes == [16] * 4 + [6] + [32, 32, 6] + [64, 6, 64]
    assert scheduler.plan is not None
    assert scheduler.progress.samples == scheduler.plan.samples == 3 * N + 64
    assert scheduler.plan.steps == len(model.sizes)
    model = Takes()
    with pytest.raises(ValueError, match=r"learning rate is -0\.1"):
        fit(model, Two(), BatchLRScheduler(GROWING, Milestones([0.1, -0.1], at=[1])))
    assert model.sizes == []


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


def test_a_stream_is_checked_as_far_as_can_be_seen() -> None:
    class Streams(Data):
        def train_dataloader(self) -> Any:
            return DataLoader(Stream(), batch_size=self.hparams.batch_size)

    model = trained(Module(), Streams(), scheduler := BatchLRScheduler(GROWING))
    assert model.sizes == [16] * 4 + [6] + [32, 32, 6] + [64, 6]
    assert scheduler.progress.samples == 3 * N
    with pytest.raises(ValueError, match=r"learning rate is -0\.1"):
        fit(model := Module(), Streams(), BatchLRScheduler(GROWING, Milestones([0.1, -0.1], at=[1])))
    assert model.sizes == []


@dataclass
class Wrapped:
    """A batch that Lightning cannot look into."""

    x: Any


@pytest.mark.parametrize("wrap", [Wrapped, lambda tensors: [tensor.unsqueeze(0) for tensor in tensors]])
def test_samples_do_not_depend_on_what_a_batch_looks_like(wrap: Any) -> None:
    class Strange(Data):
        def train_dataloader(self) -> Any:
            return DataLoader(DATA, self.hparams.batch_size, collate_fn=lambda rows: wrap(default_collate(rows)))

    class Takes(Module):
        def batch(self, batch: Any) -> list[Tensor]:
            return batch.x if isinstance(batch, Wrapped) else [tensor.squeeze(0) for tensor in batch]

    scheduler = BatchLRScheduler(GROWING)
    fit(Takes(), Strange(), scheduler)
    assert scheduler.progress.samples == 3 * N


def test_the_batch_size_is_given_back() -> None:
    for fails in (False, True):
        datamodule = Data(batch_size=7)

        class Fails(Module):
            def on_train_epoch_end(self) -> None:
                if self.current_epoch == 1:
                    raise KeyError

        if fails:
            with pytest.raises(KeyError):
                fit(Fails(), datamodule, BatchLRScheduler(GROWING))
        else:
            fit(Module(), datamodule, BatchLRScheduler(GROWING))
        assert datamodule.hparams.batch_size == 7


def test_a_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    fit(Module(), Data(), ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match="load_from_checkpoint"):
        fit(Module(), Data(), BatchLRScheduler(GROWING), ckpt_path=tmp_path / "last.ckpt", max_epochs=5)


@pytest.mark.parametrize("every, jumps", [(1, False), (0.3, True)])
def test_a_longer_run_warns_of_a_jump(every: float, jumps: bool, tmp_path: Path) -> None:
    def scheduler() -> BatchLRScheduler:
        return BatchLRScheduler(Exponential(8, factor=2, every=every, maximum=64))

    fit(Module(), Data(), scheduler(), ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Module(), Data(), scheduler(), ckpt_path=tmp_path / "last.ckpt", max_epochs=10)
    assert any("jumps from 64 to 16" in str(warning.message) for warning in caught) is jumps


@pytest.mark.parametrize("datamodule", [Data, lambda: own(DATA, DATA)])
def test_an_int_val_check_interval_must_fit_the_last_stage(datamodule: Any) -> None:
    datamodule = datamodule()
    datamodule.val_dataloader = lambda: DataLoader(DATA, batch_size=10)
    model = Module()
    with pytest.raises(MisconfigurationException, match=r"val_check_interval=5.* only 2"):
        fit(model, datamodule, BatchLRScheduler(GROWING), val_check_interval=5)
    assert model.sizes == []
    fit(model, datamodule, BatchLRScheduler(GROWING), val_check_interval=2)
    fit(model, datamodule, BatchLRScheduler(GROWING), val_check_interval=5, check_val_every_n_epoch=None)


def test_stochastic_weight_averaging() -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.05)
    with pytest.raises(MisconfigurationException, match="lr=None"):
        fit(Module(), Data(), BatchLRScheduler(GROWING, 0.1), averaging)
    fit(Module(), Data(), BatchLRScheduler(GROWING), averaging)


def test_overfit_batches_are_the_same_in_every_epoch() -> None:
    scheduler = BatchLRScheduler(8)
    model = trained(Module(), own(DATA), scheduler, overfit_batches=2)
    assert model.examples == model.examples[:2] * 3
    assert scheduler.plan is not None
    assert scheduler.plan.steps == len(model.sizes) == 6


def test_no_optimizer() -> None:
    class Without(Module):
        def configure_optimizers(self) -> None:
            return None

    assert trained(Without(), Data(), BatchLRScheduler(GROWING)).sizes[-2:] == [64, 6]
