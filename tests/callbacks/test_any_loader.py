"""Loaders as people write them, unchanged, follow the plan step by step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from harness.data import regression
from harness.files import flat
from harness.fits import fit
from harness.modules import Regression, assert_close, equal
from harness.processes import Pair
from lightning_bsl import BatchLRScheduler
from lightning_bsl.schedules import Exponential, Milestones, Progress

N = 61
DATA, VALIDATION = regression(N), regression(9)
SIZES = Milestones([6, 10, 16], at=[4, 12], unit="step")  # in the middle of an epoch
RATES = Exponential(0.05, 0.9, every=3, unit="step")
VALIDATED_IN = 4


class Model(Regression):
    """Trains on a batch, and on what comes beside it in a dict of loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.beside: list[list[int]] = []
        self.validation_sizes: list[int] = []
        self.draws: list[float] = []

    def batch(self, batch: Any) -> list[Tensor]:
        tensors: list[Tensor] = batch["a"] if isinstance(batch, dict) else batch
        return tensors

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        return loss + self.net(batch["b"][0]).mean() if isinstance(batch, dict) else loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, dict):
            self.beside.append(batch["b"][-1].tolist())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_sizes.append(len(batch[0]))

    def val_dataloader(self) -> Any:
        return DataLoader(VALIDATION, batch_size=VALIDATED_IN)


class Data(LightningDataModule):
    """Validates in batches of four."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def train_dataloader(self) -> Any:
        return DataLoader(DATA, **{"batch_size": 16, "shuffle": True} | self.options)

    def val_dataloader(self) -> Any:
        return DataLoader(VALIDATION, batch_size=VALIDATED_IN)


class Template(Data):
    """As the most used template of Lightning and Hydra has it."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size_per_device = batch_size

    def setup(self, stage: str | None = None) -> None:
        assert self.trainer is not None
        self.batch_size_per_device = self.hparams.batch_size // self.trainer.world_size

    def train_dataloader(self) -> Any:
        return DataLoader(DATA, batch_size=self.batch_size_per_device, shuffle=True)


class Own(Model):
    """A LightningModule with a training loader of its own."""

    def train_dataloader(self) -> Any:
        return DataLoader(DATA, batch_size=16, shuffle=True)


class Renamed(DataLoader[Any]):
    """A subclass whose constructor takes other arguments, and which puts batches together in its own way."""

    def __init__(self, name: str, rows: Dataset[Any], size: int) -> None:
        self.name = name
        super().__init__(rows, batch_size=size, shuffle=True, collate_fn=self.together)

    def together(self, rows: Any) -> Any:
        return default_collate(rows)


class Counting(Sampler[int]):
    """Every epoch another order: from ``set_epoch``, from a generator of its own, and from how often it was asked."""

    def __init__(self, number: int) -> None:
        self.number, self.epoch, self.asked = number, 0, 0
        self.generator = torch.Generator().manual_seed(3)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        order = torch.randperm(self.number, generator=self.generator).roll(self.epoch + 5 * self.asked)
        return iter(order.tolist())


class Reloaded(Data):
    """Every epoch another loader."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.trainer.current_epoch)).tolist()
        return DataLoader(DATA, batch_size=16, sampler=order)


class Two(Data):
    """A loader beside the other, shuffled and longer in the last epoch."""

    def __init__(self, mode: str | None = None) -> None:
        super().__init__()
        self.mode = mode

    def train_dataloader(self) -> Any:
        loaders = {"a": super().train_dataloader(), "b": DataLoader(regression(33), batch_size=5, shuffle=True)}
        return loaders if self.mode is None else CombinedLoader(loaders, self.mode)


class Case(NamedTuple):
    """A stranger: his model, his data, what he writes into the Trainer; whether each row comes once an epoch."""

    model: Callable[[], Model] = Model
    data: Callable[[], Any] = Data
    trainer: dict[str, Any] = {}  # noqa: RUF012
    scheduler: dict[str, Any] = {}  # noqa: RUF012
    once: bool = True
    taken: int = N  # rows of an epoch


CASES = {
    "template": Case(data=Template),
    "given to fit": Case(data=lambda: DataLoader(DATA, batch_size=7, shuffle=True)),
    "workers": Case(data=lambda: Data(num_workers=2, persistent_workers=True)),
    "module": Case(model=Own, data=lambda: None),
    "weighted": Case(
        data=lambda: Data(shuffle=False, sampler=WeightedRandomSampler(torch.arange(1.0, N + 1).tolist(), N)), once=False
    ),
    "dict": Case(data=Two, scheduler={"loader": "a"}, once=False),
    "subclass": Case(data=lambda: Renamed("mine", DATA, 16)),
    "drop_last": Case(data=lambda: Data(drop_last=True), once=False),
    "reloaded": Case(data=Reloaded, trainer={"reload_dataloaders_every_n_epochs": 1}),
    "set_epoch": Case(data=lambda: Data(shuffle=False, sampler=Counting(N))),
    "subset": Case(data=lambda: Data(shuffle=False, sampler=SubsetRandomSampler(range(40))), taken=40),
    "replacement": Case(data=lambda: Data(shuffle=False, sampler=RandomSampler(DATA, replacement=True)), once=False),
    "min_size": Case(data=lambda: Two("min_size"), scheduler={"loader": "a"}, once=False),
    "max_size_cycle in a list": Case(data=lambda: [DataLoader(DATA, batch_size=9, shuffle=True)], scheduler={"loader": 0}),
    "random rows": Case(data=lambda: Data(collate_fn=noisy)),
    "accumulated": Case(trainer={"accumulate_grad_batches": 2}),
}


def noisy(rows: Any) -> Any:
    """Draws from the global generator, as random crops do."""
    x, y, index = default_collate(rows)
    return [x + torch.randn(x.shape, dtype=x.dtype) / 10, y, index]


class InList(Model):
    def batch(self, batch: Any) -> list[Tensor]:
        tensors: list[Tensor] = batch[0]
        return tensors


def train(
    name: str, path: Path | None = None, folder: Path | None = None, **options: Any
) -> tuple[Model, BatchLRScheduler, Any]:
    """A fit of three epochs, with nothing left from any fit before."""
    case = CASES[name]
    torch.manual_seed(7)
    model, data = (InList() if "list" in name else case.model()), case.data()
    scheduler = BatchLRScheduler(SIZES, RATES, **case.scheduler)
    callbacks: list[Callback] = [scheduler]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1))
    options = {"enable_checkpointing": folder is not None, "ckpt_path": path} | case.trainer | options
    fit(model, data, *callbacks, **options)
    return model, scheduler, data


def sizes_by_hand(taken: int, drops: bool, most: int = 10**9) -> list[int]:
    """The schedule asked step by step, over three epochs."""
    clock, sizes = Progress(), []
    for _ in range(3):
        left, steps = taken, 0
        while left and steps < most:
            size = min(int(SIZES(clock)), left)
            if drops and size < SIZES(clock):
                break
            sizes.append(size)
            clock, left, steps = clock.advance(size), left - size, steps + 1
        clock = clock.next_epoch()
    return sizes


@pytest.mark.parametrize("name", CASES)
def test_follows_the_plan(name: str) -> None:
    case = CASES[name]
    model, scheduler, _ = train(name)
    steps: dict[int, list[int]] = {}
    for batch in model.journal:
        steps.setdefault(batch.step, []).extend(batch.examples)
    sizes = [len(rows) for rows in steps.values()]
    if name != "dict":  # which has seven batches of the other loader in an epoch: there are further passes
        assert sizes == sizes_by_hand(case.taken, drops=name == "drop_last", most=7 if name == "min_size" else 10**9)
    assert scheduler.plan is not None
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(sizes), sum(sizes))
    assert list(dict.fromkeys(stage.batch_size for stage in scheduler.plan.stages)) == [6, 10, 16]
    assert (scheduler.progress.step, scheduler.progress.samples) == (len(sizes), sum(sizes))
    assert model.rates == pytest.approx([0.05 * 0.9 ** (batch.step // 3) for batch in model.journal])
    if case.once:
        for epoch in range(3):
            rows = flat(batch.examples for batch in model.journal if batch.epoch == epoch)
            assert sorted(rows) == list(range(case.taken))
        assert model.journal[0].examples != list(range(6))
    assert model.validation_sizes == [4, 4, 1] * 3
    assert len(model.validated) == 3


@pytest.mark.parametrize("name", [name for name in CASES if name != "random rows"])
def test_equals_a_plain_loop(name: str) -> None:
    model, _, _ = train(name)
    by_hand = Model()
    optimizer = by_hand.configure_optimizers()
    rows: dict[int, list[int]] = {}
    for batch in model.journal:
        rows.setdefault(batch.step, []).extend(batch.examples)
    rates = {batch.step: batch.lr for batch in model.journal}
    beside = regression(33)
    for step, (number, examples) in enumerate(rows.items()):
        optimizer.param_groups[0]["lr"] = rates[number]
        optimizer.zero_grad()
        batch = DATA[examples]
        by_hand.loss({"a": batch, "b": beside[model.beside[step]]} if model.beside else batch).backward()
        optimizer.step()
    assert_close(model, by_hand)


@pytest.mark.quick(name=["template", "workers", "weighted", "set_epoch", "replacement", "accumulated", "random rows"])
@pytest.mark.parametrize("name", CASES)
def test_resumes_inside_an_epoch_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, clock, _ = train(name, folder=tmp_path)
    last = whole.journal[-1].step
    for step in sorted({2, 5, 12, last - 1, last}):
        torch.rand(3)  # another state of the generators
        model, scheduler, _ = train(name, path=tmp_path / f"step={step}.ckpt")
        assert model.journal == [batch for batch in whole.journal if batch.step >= step], step
        assert model.beside == whole.beside[len(whole.beside) - len(model.beside) :]
        assert scheduler.progress == clock.progress
        assert equal(model, whole), step


def share(name: str, **options: Any) -> dict[str, Any]:
    """A fit in one of several processes."""
    model, scheduler, _ = train(name, **options)
    return {
        "rows": [(batch.step, batch.examples) for batch in model.journal],
        "weights": torch.cat([each.detach().flatten() for each in model.parameters()]).tolist(),
        "samples": scheduler.progress.samples,
        "beside": model.beside,
        "validation": sum(model.validation_sizes),
    }


TOGETHER = ["template", "given to fit", "module", "weighted", "subclass", "drop_last", "reloaded", "set_epoch"]


@pytest.mark.quick(name=["template", "given to fit", "weighted", "set_epoch"])
@pytest.mark.parametrize("name", [*TOGETHER, "workers", "subset", "replacement", "accumulated"])
def test_two_processes_train_as_one(name: str, pair: Pair) -> None:
    one = share(name)
    two = pair(share, name, devices=2, strategy="ddp")
    alone: dict[int, list[int]] = {}
    for step, rows in one["rows"]:
        alone.setdefault(step, []).extend(rows)
    for step, rows in alone.items():
        parts = [part for process in two for number, part in process["rows"] if number == step]
        # a process without a share keeps the other company with the step's first example, which does not count
        together = [row for number, part in enumerate(parts) for row in part if not number or part != rows[:1]]
        assert together == rows or (len(rows) == 1 and {*flat(parts)} == {*rows})
    for process in two:
        assert process["samples"] == one["samples"]
        assert process["weights"] == pytest.approx(one["weights"], rel=1e-12, abs=1e-13)
    assert two[0]["weights"] == two[1]["weights"]


@pytest.mark.slow
def test_two_processes_share_the_loaders_of_a_dict(pair: Pair) -> None:
    # the batch size of the other loader is that of a process, as Lightning has it
    two = pair(share, "dict", devices=2, strategy="ddp")
    assert two[0]["weights"] == two[1]["weights"]
    first = [flat(part for step, part in process["rows"] if step < 8) for process in two]
    assert sorted(flat(first)) == list(range(N))
    beside = [flat(process["beside"][:4]) for process in two]  # 33 rows in shares of five
    assert sorted(flat(beside)) == list(range(33))


def left_by(*callbacks: Callback) -> tuple[Any, ...]:
    """What a fit leaves behind, names of attributes and values."""
    sampler, generator = Counting(N), torch.Generator().manual_seed(9)
    bare, module = DataLoader(DATA, batch_size=7, sampler=sampler, generator=generator), Template()
    before, found = dict(vars(bare)), []
    for given in (bare, module):
        trainer = fit(model := Model(), given, *callbacks, reload_dataloaders_every_n_epochs=2)
        loop = trainer.fit_loop
        owners = (model, trainer, loop, loop._data_source, loop.epoch_loop, loop.epoch_loop.automatic_optimization)
        found.append([sorted(vars(owner)) for owner in (given, *owners)])
        found.append([trainer.reload_dataloaders_every_n_epochs, trainer.accumulate_grad_batches])
        found.append([len(hooks) for hooks in (model._forward_pre_hooks, trainer.optimizers[0]._optimizer_step_pre_hooks)])
    assert dict(vars(bare)) == before
    assert [len(batch[0]) for batch in bare] == [7] * 8 + [5]
    return found, module.hparams, module.batch_size_per_device, generator.initial_seed(), len(warnings.filters)


def test_a_fit_leaves_what_lightning_alone_leaves() -> None:
    assert left_by(BatchLRScheduler(SIZES, RATES)) == left_by()


class Fails(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            raise KeyError("stop")


def test_nothing_is_left_after_an_exception() -> None:
    data = DataLoader(DATA, batch_size=7, shuffle=True, num_workers=1, persistent_workers=True)
    before, children, filters = dict(vars(data)), {*active_children()}, [*warnings.filters]
    model = Model()
    with pytest.raises(KeyError):
        fit(model, data, BatchLRScheduler(SIZES, RATES), Fails(), accumulate_grad_batches=2)
    assert dict(vars(data)) == before
    assert {*active_children()} == children  # the workers have ended
    assert warnings.filters == filters
    loop = model.trainer.fit_loop
    for owner in (loop._data_source, loop.epoch_loop, loop.epoch_loop.automatic_optimization):
        assert not [name for name, value in vars(owner).items() if callable(value) and name in dir(type(owner))]
    assert model.trainer.accumulate_grad_batches == 2
