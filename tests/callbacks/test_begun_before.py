"""Loaders that were made, or runs that were begun, before the callback could know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from harness.data import Stranger, own, regression
from harness.files import flat, logged
from harness.fits import KeptOnException, fit, quiet, trained
from harness.modules import Regression, equal
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, FullGradientNorm
from lightning_bsl.callbacks.reloaded_data import CountingLoader
from lightning_bsl.schedules import Exponential

DATA = regression(24)


class Asks(Regression):
    """Asks Lightning for the number of steps before there is anything else."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            assert self.trainer.estimated_stepping_batches > 0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


class Streams(Stranger):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=self.hparams.batch_size)


def growing() -> BatchLRScheduler:
    return BatchLRScheduler(Exponential(3, 2, maximum=12), Exponential(0.05, 0.9, every=2, unit="step"))


def adaptive() -> BatchLRScheduler:
    return AdaptiveBatchLRScheduler(3, 0.05, lambda trainer, scheduler: True, maximum=12, check_every=4)


CASES: dict[str, Any] = {
    "map-style": (lambda: DataLoader(DATA, shuffle=True), growing, [3, 8, 11]),
    "ours": (lambda: own(DATA), growing, [3, 8, 11]),
    "adaptive": (lambda: DataLoader(DATA, shuffle=True), adaptive, [3, 6]),
    "stream": (lambda: Streams(DATA), growing, [8, 12]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_module_that_asks_for_its_length_resumes(name: str, tmp_path: Path) -> None:
    data, scheduler, steps = CASES[name]

    def go(seed: int, path: Path | None = None) -> Regression:
        torch.manual_seed(seed)
        saver = ModelCheckpoint(tmp_path / str(seed), "{step}", every_n_train_steps=1, save_top_k=-1)
        options: dict[str, Any] = {"enable_checkpointing": True, "ckpt_path": path, "max_epochs": 3}
        if name == "stream":
            options["max_epochs"] = 4
        bound = {"max_steps": 30} if name == "stream" else {}  # else Lightning has no number of steps
        return trained(Asks(), data(), scheduler(), saver, **options, **bound)

    whole = go(1)
    for step in steps:
        resumed = go(2, tmp_path / "1" / f"step={step}.ckpt")
        assert resumed.journal == whole.journal[step:]
        assert equal(resumed, whole)
        assert resumed.announced == whole.announced[len(whole.announced) - len(resumed.announced) :]


class Fails(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            raise KeyError("stop")


def test_a_trainer_that_fits_again_after_an_exception_begins_the_epoch_anew() -> None:
    scheduler = BatchLRScheduler(6)
    trainer = Trainer(**quiet(max_epochs=3, callbacks=[scheduler, Fails(6)]))
    model = Regression()
    data = own(DATA, DATA)
    with pytest.raises(KeyError):
        trainer.fit(model, data)
    model.journal.clear()
    trainer.fit(model, data)
    epochs = [flat(batch.examples for batch in model.journal if batch.epoch == epoch) for epoch in (1, 2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 2
    assert model.validated == [4, 6 + 4, 6 + 8]
    assert scheduler.progress.epoch == 3


def test_rows_stand_where_they_stood(tmp_path: Path) -> None:
    class SaveAll(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{len(pl_module.journal)}.ckpt")

    def go(folder: str, *callbacks: Callback, path: Path | None = None) -> dict[int, float]:
        logger = CSVLogger(tmp_path, name="", version=folder)
        scheduler = BatchLRScheduler(6, max_device_batch_size=2)
        fit(Regression(), own(DATA), scheduler, *callbacks, logger=logger, log_every_n_steps=1, ckpt_path=path)
        return logged(tmp_path / folder, "samples")

    whole = go("whole", SaveAll())
    for pieces in (1, 2, 3, 4, 11, 12, 13):
        rows = go(f"from {pieces}", path=tmp_path / f"{pieces}.ckpt")
        assert rows == {step: samples for step, samples in whole.items() if step >= pieces // 3}, pieces


def test_rows_after_an_exception(tmp_path: Path) -> None:
    class Stops(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 5:
                raise KeyError("data")
            return super().training_step(batch, batch_idx)

    scheduler = BatchLRScheduler(6)
    with pytest.raises(KeyError):
        fit(Stops(), own(DATA), scheduler, KeptOnException(tmp_path, "failed"), enable_checkpointing=True)
    logger = CSVLogger(tmp_path, name="", version="resumed")
    fit(Regression(), own(DATA), BatchLRScheduler(6), logger=logger, log_every_n_steps=1, ckpt_path=tmp_path / "failed.ckpt")
    assert set(logged(tmp_path / "resumed", "samples")) == set(range(5, 12))


# --- streams beside and behind


class Pairs(Regression):
    def batch(self, batch: Any) -> Any:
        return batch["a"] if isinstance(batch, dict) else batch


def test_a_stream_beside_must_not_end_the_epoch() -> None:
    loaders = {"a": DataLoader(DATA), "b": DataLoader(Stream(), batch_size=2)}
    with pytest.raises(MisconfigurationException, match=r'without a length.*CombinedLoader\(\.\.\., "min_size"\)'):
        fit(Pairs(), loaders, BatchLRScheduler(4, loader="a"))


@pytest.mark.parametrize("resumable", [True, False])
def test_lightning_says_that_a_stream_beside_begins_anew(resumable: bool, tmp_path: Path) -> None:
    def go(path: Path | None = None) -> None:
        beside = DataLoader(DATA, batch_size=2) if resumable else DataLoader(Stream(), batch_size=2)
        loaders = CombinedLoader({"a": DataLoader(DATA), "b": beside}, "min_size")
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(Pairs(), loaders, BatchLRScheduler(4, loader="a"), saver, enable_checkpointing=True, max_epochs=1, ckpt_path=path)

    go()
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        go(tmp_path / "step=3.ckpt")
    assert any("not resumable" in str(warning.message) for warning in caught) is not resumable


def test_a_loader_that_counts_is_a_loader() -> None:
    import copy

    loader = DataLoader(DATA, batch_size=5)
    counting = CountingLoader(loader)
    assert copy.copy(counting).batch_size == 5
    counting.worker_init_fn = print
    assert counting._counted.worker_init_fn is print
    assert loader.worker_init_fn is None
    assert [len(batch[0]) for batch in counting] == list(counting.counts) == [5, 5, 5, 5, 4]


def test_the_full_gradient_beside_a_batch_sampler_that_follows() -> None:
    class Batches:
        def __init__(self, size: int) -> None:
            self.batch_size, self.sampler = size, range(24)

        def __len__(self) -> int:
            return -(-24 // self.batch_size)

        def __iter__(self) -> Any:
            return (list(range(i, min(i + self.batch_size, 24))) for i in range(0, 24, self.batch_size))

    class Follows(Stranger):
        def train_dataloader(self) -> Any:
            return DataLoader(DATA, batch_sampler=Batches(self.hparams.batch_size))

    norms = []
    for data in (Follows(DATA), own(DATA)):
        trainer = fit(Regression(), data, BatchLRScheduler(24), FullGradientNorm(), max_epochs=1)
        norms.append(trainer.callback_metrics["full_gradient_norm"].item())
    assert norms[0] == pytest.approx(norms[1])


@pytest.mark.parametrize("overfit_batches", [0, 2])
def test_an_error_of_the_users_own_leaves_no_class_changed(overfit_batches: int) -> None:
    class Breaks(Stranger):
        def train_dataloader(self) -> Any:
            raise FileNotFoundError("no data")

    with pytest.raises(FileNotFoundError, match="no data"):
        fit(Regression(), Breaks(DATA), BatchLRScheduler(4), overfit_batches=overfit_batches)
    assert not [name for name in vars(DataLoader) if name.startswith("__old")]
