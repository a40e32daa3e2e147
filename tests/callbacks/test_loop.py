"""What Lightning keeps to itself and we read: these tests name each attribute, and fail when a release moves one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bsl import BatchSizeDataModule
from lightning_bsl.callbacks.loop import ended_epoch, loads_own_data

DATA = TensorDataset(torch.arange(10.0).unsqueeze(1))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.loads_own_data: bool | None = None

    def setup(self, stage: str) -> None:
        self.loads_own_data = loads_own_data(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(model: Model, folder: Path, **data: Any) -> None:
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    Trainer(
        max_epochs=2, callbacks=[checkpoint], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, **data)  # fmt: skip


@pytest.mark.parametrize("own", [True, False])
def test_loads_own_data(own: bool, tmp_path: Path) -> None:
    model = Model()
    data = {"datamodule": BatchSizeDataModule(DATA, batch_size=4)} if own else {"train_dataloaders": DataLoader(DATA)}
    fit(model, tmp_path, **data)
    assert model.loads_own_data is own


def test_ended_epoch(tmp_path: Path) -> None:
    fit(Model(), tmp_path, train_dataloaders=DataLoader(DATA, batch_size=4))  # three steps an epoch
    checkpoints = {step: torch.load(tmp_path / f"step={step}.ckpt") for step in range(1, 7)}
    assert [step for step, checkpoint in checkpoints.items() if ended_epoch(checkpoint)] == [3, 6]
