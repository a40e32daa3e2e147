"""Habits of other people's projects: each trains as it would, or says why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from harness.data import regression
from harness.files import flat
from harness.fits import KeptOnException, fit, trained
from harness.modules import Regression, equal
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler
from lightning_bsl.schedules import Exponential, Milestones

DATA, VALIDATION = regression(61), regression(9)
SIZES, RATES = Milestones([6, 10, 16], at=[4, 12], unit="step"), Exponential(0.05, 0.9, every=3, unit="step")


# --- samplers


class Told(Sampler[int]):
    """Is told between epochs where to begin, as curricula and hard examples are."""

    begin = 0

    def __len__(self) -> int:
        return 61

    def __iter__(self) -> Iterator[int]:
        return iter([(self.begin + i) % 61 for i in range(61)])


class Tells(Callback):
    def __init__(self, sampler: Told, hook: str) -> None:
        self.sampler = sampler
        setattr(self, hook, self.tell)

    def tell(self, *_: Any) -> None:
        self.sampler.begin += 1


@pytest.mark.quick(workers=[0])
@pytest.mark.quick(hook=["on_validation_epoch_end"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_epoch_start", "on_validation_epoch_end"])
def test_a_sampler_is_asked_when_it_has_been_told(hook: str, workers: int) -> None:
    firsts = []
    for scheduled in (False, True):
        loader = DataLoader(DATA, batch_size=16, sampler=(sampler := Told()), num_workers=workers)
        callbacks = [BatchLRScheduler(16)] if scheduled else []
        fit(model := Regression(), [loader, DataLoader(VALIDATION)][0], *callbacks, Tells(sampler, hook))
        firsts.append([next(batch.examples[0] for batch in model.journal if batch.epoch == epoch) for epoch in range(3)])
    assert firsts[0] == firsts[1]


OTHERS: dict[str, tuple[Any, int]] = {
    "sequential": (lambda: SequentialSampler(range(40)), 40),
    "random": (lambda: RandomSampler(range(40)), 40),
    "distributed": (lambda: DistributedSampler(range(40), num_replicas=1, rank=0), 40),  # type: ignore[arg-type]
    "a half": (lambda: DistributedSampler(DATA, num_replicas=2, rank=0), 31),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_sampler_over_something_else(name: str) -> None:
    make, number = OTHERS[name]
    model = trained(Regression(), DataLoader(DATA, batch_size=6, sampler=make()), BatchLRScheduler(SIZES), max_epochs=1)
    assert len({*flat(model.examples)}) == len(flat(model.examples)) == number


class Lies(Sampler[int]):
    def __len__(self) -> int:
        return 50

    def __iter__(self) -> Iterator[int]:
        return iter(range(40))


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield from range(61)


@pytest.mark.parametrize(("sampler", "message"), [(Lies, "`__len__` of 50, but gave 40"), (Endless, "seems to have no end")])
def test_a_sampler_that_cannot_be_planned(sampler: Any, message: str) -> None:
    model = Regression()
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, DataLoader(DATA, batch_size=6, sampler=sampler()), BatchLRScheduler(6), limit_train_batches=3)
    assert model.journal == []


class Shrinks(Dataset[Any]):
    length = 50

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if index >= self.length:
            raise IndexError(index)
        return DATA[index]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_data_set_that_shrinks_is_trained_and_said(shuffle: bool) -> None:
    class Less(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            data.length = 40

    data = Shrinks()
    with pytest.warns(UserWarning, match="epoch 1 has 40 training examples, but the run was planned with 50"):
        model = trained(Regression(), DataLoader(data, shuffle=shuffle), Less(), BatchLRScheduler(10))
    assert model.sizes == [10] * (5 + 4 + 4)


# --- whoever looks through the training data while it is trained


@pytest.mark.parametrize("grows", [False, True])
def test_the_training_loader_is_whole_for_whoever_iterates_it(grows: bool) -> None:
    class Probes(Regression):
        seen: tuple[int, ...] = ()

        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.seen += (len({int(i) for batch in self.trainer.train_dataloader for i in batch[2]}),)

    class Both(Probes):
        def train_dataloader(self) -> Any:
            return DataLoader(DATA, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(VALIDATION)

    def scheduler() -> BatchLRScheduler:
        if not grows:
            return BatchLRScheduler(SIZES, RATES)
        return AdaptiveBatchLRScheduler(6, 0.05, lambda *_: True, maximum=12, check_every=4)

    class Plain(Regression):
        train_dataloader, val_dataloader = Both.train_dataloader, Both.val_dataloader

    models = [model for model in (Both(), Plain()) if fit(model, None, scheduler(), val_check_interval=0.5, max_epochs=2)]
    assert models[0].seen == (61,) * len(models[0].validated)
    assert models[0].journal == models[1].journal
    assert equal(*models)


# --- resume, with a validation loader as people write it


class Drops(Regression):
    """Dropout, and a validation loader that has no generator of its own."""

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__(nn.Dropout(0.3))
        self.fails_at = fails_at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.fails_at:
            raise KeyError("data")
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader(DATA, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(VALIDATION, batch_size=4)


def go(model: Drops, *callbacks: Callback, path: Path | None = None, cap: Any = None, **options: Any) -> Drops:
    torch.manual_seed(7)
    options = {"enable_checkpointing": bool(callbacks), "ckpt_path": path} | options
    return trained(model, None, BatchLRScheduler(SIZES, RATES, cap), *callbacks, **options)


@pytest.mark.quick(cap=[4], fails_at=[0, 8, 14])
@pytest.mark.quick(cap=[None], fails_at=[1])
@pytest.mark.parametrize("cap", [None, 4])
@pytest.mark.parametrize("fails_at", [0, 1, 8, 9, 14])
def test_from_an_exception_in_any_step_of_an_epoch(fails_at: int, cap: Any, tmp_path: Path) -> None:
    whole = go(Drops(), cap=cap)
    with pytest.raises(KeyError):
        go(Drops(fails_at), KeptOnException(tmp_path, "failed"), cap=cap)
    assert equal(go(Drops(), path=tmp_path / "failed.ckpt", cap=cap), whole)


@pytest.mark.parametrize("cap", [None, 4])
def test_from_a_step_after_which_a_validation_is_due(cap: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = go(Drops(), saver, cap=cap, val_check_interval=0.3)
    # 8 and 14 are the last steps of epochs, after which Lightning skips the validation when it resumes
    for step in (3, 8, 13, 14) if cap else (1, 5, 8, 14, 17):
        assert equal(go(Drops(), path=tmp_path / f"step={step}.ckpt", cap=cap, val_check_interval=0.3), whole), step


def test_validations_counted_over_all_epochs_stay_where_they_were(tmp_path: Path) -> None:
    class SaveAll(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{len(pl_module.journal):02}.ckpt")

    options: dict[str, Any] = {"cap": 4, "val_check_interval": 5, "check_val_every_n_epoch": None}
    whole = go(Drops(), SaveAll(), **options)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == len(whole.validated)
    for number, path in list(enumerate(paths, 1))[::2]:
        resumed = go(Drops(), path=path, **options)
        assert equal(resumed, whole), path
        (state,) = (s for k, s in torch.load(path)["callbacks"].items() if k.startswith("BatchLRScheduler"))
        # a step that was under way is taken again, and the validation inside it with it
        assert resumed.validated == whole.validated[number - state["inside_step"] :], path


# --- arguments of the Trainer, and ways to write a step


class Fetches(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Regression().net
        self.sizes: list[int] = []

    def training_step(self, dataloader_iter: Any) -> Tensor:
        (x, y, _), *_ = next(dataloader_iter)
        self.sizes.append(len(x))
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05)


def test_a_module_that_fetches_its_batches() -> None:
    scheduler = BatchLRScheduler(SIZES, RATES)
    model = trained(Fetches(), DataLoader(DATA), scheduler, max_epochs=1)
    assert model.sizes == [6] * 4 + [10] * 3 + [7]
    assert scheduler.progress.samples == 61
    for options in ({"max_device_batch_size": 4}, {}):
        trainer = {} if options else {"accumulate_grad_batches": 2}
        model = Fetches()
        with pytest.raises(MisconfigurationException, match=r"training_step\(dataloader_iter\)"):
            fit(model, DataLoader(DATA), BatchLRScheduler(SIZES, RATES, **options), max_epochs=1, **trainer)
        assert model.sizes == []


@pytest.mark.skipif(Version(lightning.__version__) < Version("2.6"), reason="Lightning 2.6 takes a time between validations")
@pytest.mark.parametrize("grows", [False, True])
def test_a_time_between_validations(grows: bool) -> None:
    adaptive = AdaptiveBatchLRScheduler(6, 0.05, lambda *_: True, maximum=12, check_every=4)
    scheduler = adaptive if grows else BatchLRScheduler(SIZES, RATES)
    model = trained(Drops(), None, scheduler, val_check_interval="00:01:00:00", max_epochs=1)
    assert sum(model.sizes) == 61


@pytest.mark.parametrize("runs", [True, 3])
def test_a_smoke_test_in_micro_batches(runs: Any) -> None:
    model = trained(Drops(), None, BatchLRScheduler(SIZES, RATES, max_device_batch_size=4), fast_dev_run=runs)
    assert model.sizes == [3] * int(runs)
