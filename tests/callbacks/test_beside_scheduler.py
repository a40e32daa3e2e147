"""Modules that have a learning-rate scheduler of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from harness.cases import GROWING
from harness.data import own, regression
from harness.fits import KeptOnException, fit, quiet
from harness.loops import whole_steps
from harness.modules import Regression, equal
from lightning_bsl import BatchLRScheduler
from lightning_bsl.runs import read_metrics
from lightning_bsl.schedules import Exponential, LinearScaling, NoiseScaling, Progress, SqrtScaling, SurgeScaling
from lightning_bsl.schedules.scaling import ScalingRule

N = 61
DATA = regression(N)
SCHEDULERS: dict[str, tuple[str, Callable[[Optimizer], Any]]] = {
    "StepLR": ("epoch", lambda optimizer: lr_scheduler.StepLR(optimizer, 1, gamma=0.5)),
    "ExponentialLR": ("step", lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.97)),
    "LambdaLR": ("step", lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))),
    "CosineAnnealingLR": ("step", lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20)),
    "OneCycleLR": ("step", lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)),
    "ReduceLROnPlateau": ("epoch", lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)),
}


class Scheduled(Regression):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.left: list[float] = []  # the rate between steps

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        interval, make = SCHEDULERS[self.name]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make(optimizer), "interval": interval, "monitor": "rises"},
        }

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.left.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("rises", float(self.trainer.current_epoch), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def by_hand(name: str, rule: ScalingRule) -> tuple[nn.Module, list[float]]:
    """A plain loop that multiplies the rate for the step alone; its weights, and the rates of its steps."""
    model = Scheduled(name)
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    every_step = configured["lr_scheduler"]["interval"] == "step"
    rates: list[float] = []
    for epoch, steps in enumerate(whole_steps(GROWING, N, 3)):
        for number, indices in enumerate(steps, len(rates)):
            size = int(GROWING(Progress(epoch, number)))
            optimizer.zero_grad()
            model.loss(DATA[indices]).backward()
            base = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = base * rule.factor(size)
            rates.append(base * rule.factor(size))
            optimizer.step()
            optimizer.param_groups[0]["lr"] = base
            if every_step:
                scheduler.step()
        if not every_step:
            scheduler.step(*([float(epoch)] if name == "ReduceLROnPlateau" else []))
    return model.net, rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scaling_rule_multiplies_for_the_step_alone(name: str, tmp_path: Path) -> None:
    rule = SqrtScaling(1, base_batch_size=7)
    scheduler = BatchLRScheduler(GROWING, rule)
    model = Scheduled(name)
    fit(model, own(DATA), scheduler, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    reference, rates = by_hand(name, rule)
    assert equal(model.net, reference)
    # the log says what the steps were taken with; between them the rate is the module's own
    logged = [row["lr"] for row in read_metrics(tmp_path / "metrics.csv") if "lr" in row and "loss" not in row]
    assert logged == pytest.approx(rates)
    assert max(model.left) <= 0.1 < max(rates) or name != "OneCycleLR"


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        (LinearScaling(0.3, base_batch_size=16), 2),
        (SqrtScaling(0.3, base_batch_size=8), 2),
        (NoiseScaling(0.3, noise_batch_size=32, alpha=1.0), 0.5),
        (SurgeScaling(0.3, noise_batch_size=32), 1),
    ],
)
def test_factor(rule: ScalingRule, factor: float) -> None:
    assert rule.factor(32) == pytest.approx(factor)


def test_a_rule_without_a_rate_of_its_own() -> None:
    class Rule(ScalingRule):
        def __call__(self, batch_size: int) -> float:
            return 0.1

    with pytest.raises(TypeError, match="Rule cannot multiply the module's learning rates, since it has no fields"):
        fit(Scheduled("StepLR"), own(DATA), BatchLRScheduler(GROWING, Rule()))


def test_the_rate_is_given_back_when_a_step_fails(tmp_path: Path) -> None:
    class Failing(Scheduled):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step == 6:
                raise KeyError("data")
            return super().training_step(batch, batch_idx)

    rule, saver = SqrtScaling(1, base_batch_size=7), KeptOnException(tmp_path, "failed")
    with pytest.raises(KeyError):
        fit(Failing("ExponentialLR"), own(DATA), BatchLRScheduler(GROWING, rule), saver, enable_checkpointing=True)
    resumed = Scheduled("ExponentialLR")
    fit(resumed, own(DATA), BatchLRScheduler(GROWING, rule), ckpt_path=tmp_path / "failed.ckpt")
    assert equal(resumed.net, by_hand("ExponentialLR", rule)[0])


def test_the_monitor_shows_the_modules_own_rate(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(GROWING, LinearScaling(1, base_batch_size=7))
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = LearningRateMonitor("step")
    fit(Scheduled("StepLR"), own(DATA), monitor, scheduler, logger=logger, log_every_n_steps=1)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "lr-SGD" in row]
    assert {row["lr-SGD"] for row in rows} == {0.05, 0.025, 0.0125}


MADE: dict[str, Callable[[Any, Any], Optimizer]] = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, foreach=False),
}


class WithTensor(Regression):
    """Its rates are tensors, as those of compiled and captured steps are; or not, to compare with."""

    def __init__(self, name: str, tensors: bool, scheduler: bool) -> None:
        super().__init__()
        self.name, self.tensors, self.scheduler = name, tensors, scheduler
        self.given: list[Any] = []
        self.same: list[bool] = []  # in each step

    def configure_optimizers(self) -> Any:
        layers = [list(layer.parameters()) for layer in (self.net[0], self.net[-1])]
        self.given = [torch.tensor(lr, dtype=torch.float64) if self.tensors else lr for lr in (0.05, 0.0125)]
        groups = [{"params": layer, "lr": lr} for layer, lr in zip(layers, self.given)]
        optimizer = MADE[self.name](groups, 0.05)
        optimizer.register_step_post_hook(
            lambda *_: self.same.append(all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, self.given)))
        )
        return [optimizer], [lr_scheduler.StepLR(optimizer, 1, gamma=0.5)] if self.scheduler else []


@pytest.mark.parametrize("scheduler", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_rates_that_are_tensors_stay_the_same_tensors(name: str, scheduler: bool) -> None:
    lr = SqrtScaling(1, base_batch_size=7) if scheduler else Exponential(0.05, 0.9, every=2, unit="step")
    models = [WithTensor(name, tensors, scheduler) for tensors in (True, False)]
    for model in models:
        fit(model, own(DATA), BatchLRScheduler(GROWING, lr))
    tensors, floats = models
    groups = tensors.trainer.optimizers[0].param_groups
    assert tensors.same and all(tensors.same)
    assert all(group["lr"] is lr for group, lr in zip(groups, tensors.given, strict=True))
    assert [float(group["lr"]) for group in groups] == [group["lr"] for group in floats.trainer.optimizers[0].param_groups]
    assert equal(tensors, floats)


class Adds(Callback):
    """Adds a param group with 0.1 of the first one's rate, as Lightning's BaseFinetuning does."""

    def __init__(self, epoch: int, step: int | None = None) -> None:
        self.epoch, self.step = epoch, step

    def add(self, trainer: Trainer, pl_module: Regression) -> None:
        optimizer = trainer.optimizers[0]
        if len(optimizer.param_groups) == 1:
            lr = optimizer.param_groups[0]["lr"]
            optimizer.add_param_group({"params": list(pl_module.net[-1].parameters()), "lr": 0.1 * lr})

    def on_fit_start(self, trainer: Trainer, pl_module: Regression) -> None:
        if trainer.ckpt_path:  # the optimizer's state that is restored next has both
            self.add(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Regression) -> None:
        if self.step is None and trainer.current_epoch == self.epoch:
            self.add(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Regression, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.add(trainer, pl_module)


class Unfreezing(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = lambda parameters: torch.optim.SGD(parameters[:2], lr=0.3)


@pytest.mark.parametrize("first", [False, True])
def test_a_param_group_that_is_added(first: bool, tmp_path: Path) -> None:
    def go(**arguments: Any) -> Unfreezing:
        callbacks = [BatchLRScheduler(31, Exponential(1.0, 0.5, every=1)), Adds(epoch=1)]
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit(model := Unfreezing(), own(DATA), *callbacks[:: -1 if first else 1], saver, enable_checkpointing=True, **arguments)
        return model

    whole = go()
    assert [batch.lrs for batch in whole.journal] == [(1.0,)] * 2 + [(0.5, 0.05)] * 2 + [(0.25, pytest.approx(0.025))] * 2
    for step in (3, 4, 5):
        resumed = go(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.journal == whole.journal[step:]
        assert equal(resumed, whole)


def test_a_param_group_that_is_added_inside_an_epoch() -> None:
    scheduler = BatchLRScheduler(10, Exponential(1.0, 0.5, every=2, unit="step"))
    fit(model := Unfreezing(), own(DATA), scheduler, Adds(epoch=0, step=3), max_epochs=1)
    rates = [0.5 ** (step // 2) for step in range(7)]
    assert [batch.lrs for batch in model.journal] == [
        (lr,) if step < 3 else (lr, pytest.approx(0.1 * lr)) for step, lr in enumerate(rates)
    ]


def test_a_param_group_that_is_added_to_the_first_of_two_optimizers() -> None:
    class Manual(Unfreezing):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Parameter(torch.ones(1))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss + self.other.square().sum())
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return super().configure_optimizers(), torch.optim.SGD([self.other], lr=0.6)

    scheduler = BatchLRScheduler(31, Exponential(1.0, 0.5, every=1))
    fit(model := Manual(), own(DATA), Adds(epoch=1), scheduler)
    assert [batch.lrs for batch in model.journal[::2]] == [
        pytest.approx((1.0, 2.0)), pytest.approx((0.5, 0.05, 1.0)), pytest.approx((0.25, 0.025, 0.5))
    ]  # fmt: skip


class OneCycle(Regression):
    """Asks how many steps there will be."""

    def __init__(self, scheduler: BatchLRScheduler) -> None:
        super().__init__()
        self.asked, self.batch_size = scheduler, 1
        self.steps, self.last_rate = 0, 0.0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        self.steps = self.asked.estimated_steps(self.trainer)
        one_cycle = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.last_rate = optimizer.param_groups[0]["lr"]

    def train_dataloader(self) -> Any:
        return DataLoader(DATA, batch_size=self.batch_size, shuffle=True)


@pytest.mark.parametrize("bounds", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 17}])
@pytest.mark.parametrize("exact", [True, False])
def test_estimated_steps(exact: bool, bounds: dict[str, int], tmp_path: Path) -> None:
    schedule = Exponential(4, factor=2, every=1)

    def go(path: Path | None = None) -> tuple[OneCycle, Trainer]:
        scheduler = BatchLRScheduler(schedule)
        model, data = OneCycle(scheduler), own(DATA) if exact else None
        options = {"enable_checkpointing": True, "default_root_dir": tmp_path, **bounds}
        return model, fit(model, data, scheduler, ckpt_path=path, **options)

    model, trainer = go()
    assert model.steps == trainer.global_step == min(16 + 8 + 4 + 2, bounds.get("max_steps", 99))
    assert model.last_rate == pytest.approx(0.1 / 25 / 1e4)  # OneCycleLR's own end
    if "max_steps" not in bounds:
        (path,) = tmp_path.glob("**/*.ckpt")
        assert go(path)[0].steps == model.steps


def test_estimated_steps_of_what_is_not_known() -> None:
    scheduler = BatchLRScheduler(GROWING)
    with pytest.raises(RuntimeError, match="from `configure_optimizers` on"):
        scheduler.estimated_steps(Trainer(**quiet(callbacks=[scheduler])))
    with pytest.raises(ValueError, match="give the Trainer `max_epochs`"):
        fit(OneCycle(scheduler), own(DATA), scheduler, max_epochs=-1)
