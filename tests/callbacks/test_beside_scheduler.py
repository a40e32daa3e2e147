"""Modules that have a learning-rate scheduler of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from lightning_bsl import BatchLRScheduler
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.report import read_metrics
from lightning_bsl.schedules import Exponential, LinearScaling, NoiseScaling, Progress, SqrtScaling, SurgeScaling
from lightning_bsl.schedules.scaling import ScalingRule
from tests.callbacks.test_micro_batches import GROWING, N, Regression, examples, fit, own
from tests.helpers import quiet

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
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        interval, make = SCHEDULERS[self.name]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make(optimizer), "interval": interval, "monitor": "rises"},
        }

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.log("rises", float(self.trainer.current_epoch), on_step=False, on_epoch=True)
        return super().training_step(batch)


def by_hand(name: str, rule: ScalingRule) -> tuple[nn.Module, list[float]]:
    """A plain loop that multiplies the rate for the step alone; its weights, and the rates of its steps."""
    data, model = examples(), Scheduled(name)
    configured = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    every_step = configured["lr_scheduler"]["interval"] == "step"
    sampler, clock, rates = GlobalBatchSampler(N, GROWING, seed=1), Progress(), []
    for epoch in range(3):
        order = sampler.permutation(epoch)
        while order:
            size = int(GROWING(clock))
            x, y, _ = data[order[:size]]
            order, clock = order[size:], clock.advance(len(order[:size]))
            optimizer.zero_grad()
            nn.functional.mse_loss(model.net(x), y).backward()
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
    logger = CSVLogger(tmp_path, name="", version="")
    fit(scheduler, model, callbacks=[scheduler], logger=logger, log_every_n_steps=1)
    reference, rates = by_hand(name, rule)
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), reference.parameters(), strict=True))
    # the log says what the steps were taken with; between them the rate is the module's own
    logged = [row["lr"] for row in read_metrics(tmp_path / "metrics.csv") if "lr" in row and "loss" not in row]
    assert logged == pytest.approx(rates)
    assert max(model.rates) <= 0.1 < max(rates) or name != "OneCycleLR"


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

    scheduler = BatchLRScheduler(GROWING, Rule())
    with pytest.raises(TypeError, match="Rule needs its learning rate as first field"):
        fit(scheduler, Scheduled("StepLR"), callbacks=[scheduler])


def test_the_rate_is_given_back_when_a_step_fails(tmp_path: Path) -> None:
    class Failing(Scheduled):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            if self.trainer.global_step == 6:
                raise KeyError("data")
            return super().training_step(batch)

    class Kept(OnExceptionCheckpoint):
        def teardown(self, *_: Any, **__: Any) -> None:
            """Would remove the checkpoint."""

    scheduler = BatchLRScheduler(GROWING, SqrtScaling(1, base_batch_size=7))
    with pytest.raises(KeyError):
        fit(scheduler, Failing("ExponentialLR"), callbacks=[scheduler, Kept(tmp_path, "failed")], enable_checkpointing=True)
    scheduler, resumed = BatchLRScheduler(GROWING, SqrtScaling(1, base_batch_size=7)), Scheduled("ExponentialLR")
    fit(scheduler, resumed, callbacks=[scheduler], ckpt_path=tmp_path / "failed.ckpt")
    reference, _ = by_hand("ExponentialLR", SqrtScaling(1, base_batch_size=7))
    assert all(torch.equal(a, b) for a, b in zip(resumed.net.parameters(), reference.parameters(), strict=True))


def test_the_monitor_shows_the_modules_own_rate(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(GROWING, LinearScaling(1, base_batch_size=7))
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = LearningRateMonitor("step")
    fit(scheduler, Scheduled("StepLR"), callbacks=[monitor, scheduler], logger=logger, log_every_n_steps=1)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "lr-SGD" in row]
    assert {row["lr-SGD"] for row in rows} == {0.05, 0.025, 0.0125}


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
        return DataLoader(examples(), batch_size=self.batch_size, shuffle=True)


@pytest.mark.parametrize("bounds", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 17}])
@pytest.mark.parametrize("exact", [True, False])
def test_estimated_steps(exact: bool, bounds: dict[str, int], tmp_path: Path) -> None:
    schedule = Exponential(4, factor=2, every=1)

    def go(path: Path | None = None) -> tuple[OneCycle, Trainer]:
        scheduler = BatchLRScheduler(schedule)
        trainer = Trainer(**quiet(**bounds, callbacks=[scheduler], enable_checkpointing=True, default_root_dir=tmp_path))
        model = OneCycle(scheduler)
        trainer.fit(model, datamodule=own() if exact else None, ckpt_path=path)
        return model, trainer

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
        fit(scheduler, OneCycle(scheduler), callbacks=[scheduler], max_epochs=-1)
