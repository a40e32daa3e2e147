"""A run may be resumed from any checkpoint, also from one that a resumed run has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from harness import fits
from harness.data import StrangerWithAttribute, own, regression
from harness.modules import Recorder, equal
from lightning_bsl import BatchLRScheduler
from lightning_bsl.schedules import Diminishing, Progress

N = 18
DATA = regression(N, dtype=torch.float32)


class Net(Recorder):
    """Dropout and Adam."""

    def __init__(self) -> None:
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        super().__init__(net, lambda parameters: torch.optim.Adam(parameters, lr=0.01))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


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


ARGUMENTS: list[dict[str, Any]] = [{}, {"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}, {"max_steps": 9}]


@pytest.mark.quick(most=[6], batch_size=[grow], ours=[True], arguments=ARGUMENTS[1:3])
@pytest.mark.quick(most=[6], batch_size=[shrink], ours=[False], arguments=[{}])
@pytest.mark.quick(most=[6], batch_size=[shrink], ours=[True], arguments=[{"max_steps": 9}])
@pytest.mark.parametrize("most", [6, 1000])
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("batch_size", [grow, shrink])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_resumes_from_whatever_a_resumed_run_saves(
    arguments: dict[str, Any], batch_size: Any, ours: bool, most: int, tmp_path: Path
) -> None:
    def fit(folder: Path, path: Path | None = None) -> Net:
        seed_everything(1, verbose=False)
        scheduler, saver = BatchLRScheduler(batch_size, Diminishing(0.01)), SaveAll(folder, inside=ours)
        theirs = StrangerWithAttribute(DATA, DATA, batch_size=1, eval_batch_size=N, generator=torch.Generator())
        datamodule = own(DATA, DATA) if ours else theirs
        options = {"max_epochs": 4, "enable_checkpointing": True, **arguments}
        fits.fit(model := Net(), datamodule, scheduler, saver, ckpt_path=path, **options)
        return model

    whole = fit(tmp_path / "0")
    seen: set[str] = set()
    left = sorted((tmp_path / "0").iterdir())
    while left and len(seen) < most:
        path = left.pop(len(left) // 2)
        if counts(path) in seen:
            continue
        seen.add(counts(path))
        folder = tmp_path / str(len(seen))
        resumed = fit(folder, path)
        step = int(path.stem.split()[0])
        assert resumed.journal == whole.journal[step:], path
        assert resumed.losses == whole.losses[step:], path
        assert [at for at in resumed.validated if at > step] == [at for at in whole.validated if at > step], path
        assert equal(resumed, whole)
        left += sorted(folder.iterdir()) if folder.exists() else []
