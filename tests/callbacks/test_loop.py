"""What Lightning keeps to itself and we read: these tests name each attribute, and fail when a release moves one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from harness import fits
from harness.data import own
from harness.modules import Recorder
from lightning_bsl.callbacks import loop
from lightning_bsl.callbacks.loop import ended_epoch, loads_own_data, logged_metrics, walk_steps, walk_steps_no_more

DATA = TensorDataset(torch.arange(10.0).unsqueeze(1))


class Model(Recorder):
    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), lambda parameters: torch.optim.SGD(parameters, lr=0.01))
        self.loads_own_data: bool | None = None

    def setup(self, stage: str) -> None:
        self.loads_own_data = loads_own_data(self.trainer)

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss


def fit(model: Model, folder: Path, data: Any, *callbacks: Callback) -> Trainer:
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return fits.fit(model, data, *callbacks, checkpoint, max_epochs=2, enable_checkpointing=True)


@pytest.mark.parametrize("ours", [True, False])
def test_loads_own_data(ours: bool, tmp_path: Path) -> None:
    model = Model()
    fit(model, tmp_path, own(DATA, batch_size=4) if ours else DataLoader(DATA))
    assert model.loads_own_data is ours


def test_ended_epoch(tmp_path: Path) -> None:
    fit(Model(), tmp_path, DataLoader(DATA, batch_size=4))  # three steps an epoch
    checkpoints = {step: torch.load(tmp_path / f"step={step}.ckpt") for step in range(1, 7)}
    assert [step for step, checkpoint in checkpoints.items() if ended_epoch(checkpoint, -1)] == [3, 6]


@pytest.mark.parametrize(
    "path",
    [
        "fit_loop._data_source.is_module",
        "fit_loop.setup_data",
        "fit_loop.epoch_loop.automatic_optimization.run",
        "fit_loop.epoch_loop.automatic_optimization._make_closure",
        "fit_loop.epoch_loop.automatic_optimization._optimizer_step",
        "_accelerator_connector.use_distributed_sampler",
    ],
)
def test_the_attributes_of_a_trainer(path: str) -> None:
    found: Any = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for name in path.split("."):
        found = getattr(found, name)


def test_attributes_of_others() -> None:
    assert callable(loop._block_parallel_sync_behavior)
    assert {"_update_count", "_computed"} <= vars(MeanMetric()).keys()
    assert "require_forward_param_sync" in DistributedDataParallel.__init__.__code__.co_names


def test_what_a_checkpoint_counts(tmp_path: Path) -> None:
    fit(Model(), tmp_path, DataLoader(DATA, batch_size=4))
    progress = torch.load(tmp_path / "step=2.ckpt")["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"] == {"ready": 2, "started": 2, "processed": 2, "completed": 1}  # saved in on_train_batch_end
    assert progress["total"] == progress["current"]
    assert progress["is_last_batch"] is False


class Walks(Callback):
    """Takes every step through ``walk_steps``, in one part or two."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.logged: list[str] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def walk(batch: Any, train: loop.Train) -> torch.Tensor | None:
            if self.parts == 1:
                loss = train(batch, True, True)
            else:
                train([batch[0][:1]], True, False)  # thrown away: the next one, as the first, clears the gradients
                loss = train(batch, True, True)
            self.logged = list(logged_metrics(trainer))
            return loss

        walk_steps(trainer, walk)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self.losses.append(arguments[1]["loss"].item())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        walk_steps_no_more(trainer)


@pytest.mark.parametrize("parts", [1, 2])
def test_walk_steps(parts: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, walks = Model(), Walks(parts)
    walked = Model()
    walked.load_state_dict(plain.state_dict())
    stock = fit(plain, tmp_path / "plain", DataLoader(DATA, batch_size=4))
    trainer = fit(walked, tmp_path / "walked", DataLoader(DATA, batch_size=4), walks)
    assert torch.equal(walked.net.weight, plain.net.weight)
    assert trainer.global_step == stock.global_step == 6
    assert walks.logged == ["training_step.loss"]
    if parts == 1:
        assert torch.equal(trainer.callback_metrics["loss"], stock.callback_metrics["loss"])
    assert len(walks.losses) == 6
    assert "run" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
