"""A run may be resumed from any checkpoint, also from one that a resumed run has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bsl import BatchLRScheduler, BatchSizeDataModule
from lightning_bsl.schedules import Diminishing, Progress
from tests.helpers import quiet

N = 18


def examples() -> TensorDataset:
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, x.prod(dim=1, keepdim=True), torch.arange(N))


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.trained: list[Any] = []
        self.validated: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.trained.append((self.global_step, self.current_epoch, batch_idx, batch[2].tolist(), lr, loss.item()))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated.append(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Stranger(LightningDataModule):
    def __init__(self, batch_size: int = 1) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(), self.batch_size, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(), N, generator=torch.Generator())


class SaveAll(Checkpoint):
    """Saves wherever ModelCheckpoint may; inside an epoch only where the loader can go on."""

    def __init__(self, folder: Path, inside: bool) -> None:
        self.folder, self.inside = folder, inside

    def save(self, trainer: Trainer, where: str) -> None:
        if self.inside or trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step} {where}.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "epoch")


def grow(progress: Progress) -> float:
    return 4 + progress.epoch + progress.samples // 30  # inside an epoch too


def shrink(progress: Progress) -> float:
    return max(12 - 3 * progress.epoch, 3)  # asked also where the run is over


def counts(path: Path) -> str:
    """All that Lightning and the callback resume by."""
    checkpoint = torch.load(path, weights_only=True)
    loop, callback = checkpoint["loops"]["fit_loop"], checkpoint["callbacks"]["BatchLRScheduler"]
    kept = loop["epoch_progress"], loop["epoch_loop.batch_progress"], callback["epoch_start"], callback["progress"]
    return f"{path.stem} {kept}"


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("batch_size", [grow, shrink])
@pytest.mark.parametrize("arguments", [{}, {"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}, {"max_steps": 9}])
def test_resumes_from_whatever_a_resumed_run_saves(
    arguments: dict[str, Any], batch_size: Any, own: bool, tmp_path: Path
) -> None:
    def fit(folder: Path, path: Path | None = None) -> Net:
        seed_everything(1, verbose=False)
        model = Net()
        callbacks = [BatchLRScheduler(batch_size, Diminishing(0.01)), SaveAll(folder, inside=own)]
        trainer = Trainer(**quiet(max_epochs=4, callbacks=callbacks, enable_checkpointing=True, **arguments))
        datamodule = BatchSizeDataModule(examples(), examples()) if own else Stranger()
        trainer.fit(model, datamodule=datamodule, ckpt_path=path)
        return model

    whole = fit(tmp_path / "0")
    seen: set[str] = set()
    left = sorted((tmp_path / "0").iterdir())
    while left:
        path = left.pop()
        if counts(path) in seen:
            continue
        seen.add(counts(path))
        folder = tmp_path / str(len(seen))
        resumed = fit(folder, path)
        step = int(path.stem.split()[0])
        assert resumed.trained == whole.trained[step:], path
        assert [at for at in resumed.validated if at > step] == [at for at in whole.validated if at > step], path
        assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
        left += sorted(folder.iterdir()) if folder.exists() else []
