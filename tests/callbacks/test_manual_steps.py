"""A step of the plan is a batch that stepped, however often an optimizer was called in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from harness.data import own, regression
from harness.files import csv_rows
from harness.fits import fit
from harness.modules import Regression
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, FullGradientNorm, TrainingTime
from lightning_bsl.schedules import Cosine, Exponential

DATA = regression(24)


class Two(Regression):
    """Two optimizers, stepped by hand.

    Args:
        calls: How often each is stepped in a batch.
    """

    def __init__(self, calls: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.calls = calls
        self.other = nn.Parameter(torch.ones(1))
        self.given: list[tuple[float, float]] = []
        self.estimated = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        self.given.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in optimizers))
        for optimizer, calls in zip(optimizers, self.calls):
            for _ in range(calls):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch) + self.other.square().sum())
                optimizer.step()

    def full_loss(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        scheduler = next(each for each in self.trainer.callbacks if isinstance(each, BatchLRScheduler))
        if not scheduler.schedule.largest:
            self.estimated = scheduler.estimated_steps(self.trainer)
        return super().configure_optimizers(), torch.optim.SGD([self.other], lr=0.1)


class One(Regression):
    """One optimizer, stepped at every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        self.manual_backward(loss)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("model", [Two, One])
@pytest.mark.parametrize("lr", [0.1, Cosine(0.1, unit="step")])
def test_a_bound_in_calls_of_optimizers_is_refused(lr: Any, model: Any) -> None:
    made = model()
    with pytest.raises(MisconfigurationException, match=r"max_steps=2.*calls of `optimizer.step`.*`max_epochs`.*`max_time`"):
        fit(made, own(DATA), BatchLRScheduler(1, lr), max_steps=2)
    assert made.journal == []


@pytest.mark.parametrize("calls", [(1, 1), (1, 3), (0, 2)])
def test_schedules_reach_their_end(calls: tuple[int, int]) -> None:
    scheduler = BatchLRScheduler(Exponential(4, 2, every=4, unit="step"), Cosine(0.1, unit="step"))
    fit(model := Two(calls), own(DATA), scheduler, max_epochs=2)
    assert model.sizes == [4] * 4 + [8] * 4
    assert scheduler.plan is not None
    assert scheduler.plan.steps == scheduler.progress.step == model.estimated == len(model.given) == 8
    cosine = Cosine(0.1, unit="step", total=8)
    rates = [cosine(scheduler.progress._replace(step=step)) for step in range(8)]
    assert [first for first, _ in model.given] == pytest.approx(rates)
    assert [second for _, second in model.given] == pytest.approx([2 * rate for rate in rates])


@pytest.mark.parametrize("calls", [(1, 1), (2, 3)])
def test_everything_is_written_at_the_batch_that_stepped(calls: tuple[int, int], tmp_path: Path) -> None:
    scheduler = AdaptiveBatchLRScheduler(4, 0.1, lambda trainer, scheduler: True, maximum=8, check_every=2)
    callbacks: list[Callback] = [FullGradientNorm(every=2, unit="step"), TrainingTime(), LearningRateMonitor("step")]
    logger = CSVLogger(tmp_path, name="", version="")
    fit(model := Two(calls), own(DATA), scheduler, *callbacks, logger=logger, log_every_n_steps=3, max_epochs=2)
    assert model.sizes == [4, 4, 8, 8, 8, 8, 8]
    rows = csv_rows(tmp_path / "metrics.csv")
    at = {name: [int(row["step"]) for row in rows if row.get(name)] for name in rows[0]}
    assert at["stage"] == [1]
    assert at["full_gradient_norm"] == [1, 3, 5]  # after the second, the fourth and the sixth batch
    assert {2, 5} <= {*at["samples"]} <= {1, 2, 3, 5, 6}  # every third, and with each growth and epoch
    assert {*at["seconds"]} == {2, 5, 3, 6}
