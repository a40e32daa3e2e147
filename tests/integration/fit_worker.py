"""One fit of a case, in this process or as one of several that read cases from their standard input."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_bsl import BatchLRScheduler, BatchSizeDataModule, schedules
from lightning_bsl.schedules import Schedule
from tests.helpers import quiet

SEED = 7
TIMEOUT = 60  # seconds for one fit


@dataclass(frozen=True)
class Case:
    """A fit; its ``repr`` is how it travels to another process."""

    examples: int
    batch_size: Schedule
    lr: Schedule
    epochs: int
    optimizer: str
    clip: float | None
    dtype: str
    cap: int | None = None
    workers: int = 0


def data_set(case: Case) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(case.examples, 3, generator=generator, dtype=torch.float64).to(getattr(torch, case.dtype))
    return TensorDataset(x, x.sum(dim=1, keepdim=True).sin(), torch.arange(case.examples))


class Regression(LightningModule):
    """A small, smooth model that writes down what each of its steps is taken with."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.case = case
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(getattr(torch, case.dtype))
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.seen: list[tuple[int, int, float, list[int]]] = []  # of each micro-batch: step, epoch, rate, examples
        self.weights: list[list[float]] = []  # of each micro-batch: what its examples count in the gradient
        self.validated: list[int] = []  # the steps before each validation

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y).square().mean(dim=1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y, index = batch
        rate = self.optimizers().param_groups[0]["lr"]
        self.seen.append((self.trainer.global_step, self.trainer.current_epoch, rate, index.tolist()))
        losses = self.losses(x, y)
        losses.register_hook(lambda gradient: self.weights.append(gradient.tolist()))
        return losses.mean()

    def validation_step(self, batch: list[Tensor]) -> None:
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.case.optimizer == "Adam":
            return torch.optim.Adam(self.net.parameters(), lr=0.01)
        return torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)


def fit(
    case: Case, processes: int = 1, folder: str | None = None, every: int = 1, checkpoint: str | None = None
) -> dict[str, Any]:
    """Train, saving into ``folder`` after ``every`` steps and at the end of each epoch, and say what happened."""
    model, scheduler = Regression(case), BatchLRScheduler(case.batch_size, case.lr, case.cap)
    save_all = {"dirpath": folder, "save_top_k": -1, "auto_insert_metric_name": False}
    savers = [
        ModelCheckpoint(filename="{step}-inside", every_n_train_steps=every, **save_all),
        ModelCheckpoint(filename="{step}-after", every_n_epochs=1, save_on_train_epoch_end=True, **save_all),
    ]
    trainer = Trainer(
        **quiet(
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            use_distributed_sampler=False,
            max_epochs=case.epochs,
            gradient_clip_val=case.clip,
            callbacks=[scheduler, *(savers if folder else [])],
            enable_checkpointing=folder is not None,
        )
    )
    data = data_set(case)
    datamodule = BatchSizeDataModule(data, data, num_workers=case.workers, seed=SEED)
    trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
    return {
        "seen": [[*seen, weights] for seen, weights in zip(model.seen, model.weights, strict=True)],
        "parameters": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist(),
        "validated": model.validated,
        "samples": scheduler.progress.samples,
        "steps": [scheduler.progress.step, trainer.global_step],
        "epochs": [scheduler.progress.epoch, trainer.current_epoch],
    }


def main() -> None:
    # processes with gloo must not be forked: now and then a worker of a loader would hang
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["torch"])
    # what anybody prints is for the log; only the answers go out
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        case = eval(request.pop("case"), vars(schedules) | {"Case": Case})
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        print(json.dumps(fit(case, **request)), file=answers, flush=True)
        faulthandler.cancel_dump_traceback_later()
