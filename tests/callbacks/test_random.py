"""A resumed run draws the random numbers that the uninterrupted one drew."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from harness.cases import GROWING
from harness.data import own, regression
from harness.fits import KeptOnException, fit
from harness.modules import Regression
from lightning_bsl import BatchLRScheduler
from lightning_bsl.schedules import Exponential

DATA = regression(61)


class Noisy(Regression):
    """Draws from every generator there is; validates with a loader that would draw, too."""

    def __init__(self, fails_at: int = -1, norm: bool = True) -> None:
        super().__init__(*([nn.BatchNorm1d(4, dtype=torch.float64)] if norm else []), nn.Dropout(0.4))
        self.fails_at = fails_at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) * random.uniform(0.5, 1.5) * np.random.uniform(0.5, 1.5)
        if self.trainer.global_step == self.fails_at:
            raise KeyError("data")
        return loss


def go(model: Noisy, cap: Any, *callbacks: Any, path: Path | None = None, seed: int = 0) -> Noisy:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    scheduler = BatchLRScheduler(GROWING, Exponential(0.05, 0.9, every=3, unit="step"), max_device_batch_size=cap)
    options = {"max_epochs": 4, "enable_checkpointing": bool(callbacks), "val_check_interval": 0.5}
    fit(model, own(DATA, DATA, eval_batch_size=20), scheduler, *callbacks, ckpt_path=path, **options)
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.quick(every=[8], cap=[4, "auto"])
@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("cap", [None, 4, "auto"])
def test_from_every_checkpoint(cap: Any, every: int, tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, filename="step-{step}", every_n_train_steps=1, save_top_k=-1)
    validations = ModelCheckpoint(tmp_path, filename="validation-{step}", monitor="val/loss", save_top_k=-1)
    epochs = ModelCheckpoint(tmp_path, filename="epoch-{step}", save_on_train_epoch_end=True, save_top_k=-1)
    whole = go(Noisy(), cap, steps, validations, epochs)
    paths = sorted(tmp_path.glob("*.ckpt"))
    last = max(torch.load(path)["global_step"] for path in paths)
    assert len(paths) > last + 8  # every step, two validations and the end of each epoch
    for path in paths[::every]:
        resumed = go(Noisy(), cap, path=path, seed=99)
        if f"={last}." not in path.name:
            assert resumed.journal
        assert_equal(resumed, whole)


@pytest.mark.quick(fails_at=[0, 5])
@pytest.mark.parametrize("fails_at", [0, 1, 5, 11])
def test_from_an_exception_inside_a_step(fails_at: int, tmp_path: Path) -> None:
    whole = go(Noisy(), 4)
    with pytest.raises(KeyError):
        go(Noisy(fails_at=fails_at), 4, KeptOnException(tmp_path, "failed"))
    assert_equal(go(Noisy(), 4, path=tmp_path / "failed.ckpt", seed=99), whole)


@pytest.mark.quick(fails_at=[1, 5])
@pytest.mark.parametrize("fails_at", [0, 1, 5, 11])
def test_from_an_exception_inside_a_step_of_one_piece(fails_at: int, tmp_path: Path) -> None:
    """Without BatchNorm and NumPy: to keep the state of those at every step would take too long."""

    class Dropout(Noisy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = Regression.training_step(self, batch, batch_idx)
            if self.trainer.global_step == self.fails_at:
                raise KeyError("data")
            return loss

    whole = go(Dropout(norm=False), None)
    with pytest.raises(KeyError):
        go(Dropout(fails_at, norm=False), None, KeptOnException(tmp_path, "failed"))
    assert_equal(go(Dropout(norm=False), None, path=tmp_path / "failed.ckpt", seed=99), whole)
