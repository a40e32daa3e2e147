"""What Lightning keeps to itself and we read: these tests name each attribute, and fail when a release moves one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics import MeanMetric

from harness import fits
from harness.data import own
from harness.modules import Recorder
from lightning_bsl.callbacks import loop
from lightning_bsl.callbacks.loop import ended_epoch, logged_metrics, remake_training_data, walk_steps

DATA = TensorDataset(torch.arange(10.0).unsqueeze(1))


class Model(Recorder):
    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), lambda parameters: torch.optim.SGD(parameters, lr=0.01))

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss


def fit(model: Model, folder: Path, data: Any, *callbacks: Callback) -> Trainer:
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return fits.fit(model, data, *callbacks, checkpoint, max_epochs=2, enable_checkpointing=True)


class Remakes(Callback):
    """Trains on what it is given, in batches of five."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.undo = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def remake(ask: Callable[[], Any]) -> Any:
            self.given.append(ask())
            return DataLoader(DATA, batch_size=5)

        remake_training_data(trainer, remake, self.undo)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.undo.close()


class WithLoader(Model):
    def train_dataloader(self) -> Any:
        return DataLoader(DATA)


@pytest.mark.parametrize("source", ["datamodule", "module", "argument", "dict"])
def test_the_training_loader_is_replaced_wherever_it_comes_from(source: str, tmp_path: Path) -> None:
    data = {"datamodule": own(DATA), "module": None, "argument": DataLoader(DATA), "dict": {"a": DataLoader(DATA)}}[source]
    model, remakes = WithLoader(), Remakes()
    fit(model, tmp_path, data, remakes)
    assert model.announced == [2, 2]
    (given,) = remakes.given
    assert isinstance(given, dict if source == "dict" else DataLoader)
    assert "dataloader" not in vars(model.trainer.fit_loop._data_source)


class CountsNone(Callback):
    """Notes each batch before Lightning counts it."""

    def __init__(self) -> None:
        self.passed: list[int] = []
        self.counts: list[tuple[int, ...]] = []
        self.undo = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def hook(batch_idx: int) -> bool:
            self.passed.append(batch_idx)
            return batch_idx != 1

        loop.before_batch_counts(trainer, hook, self.undo)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        total = trainer.fit_loop.epoch_loop.batch_progress.total
        self.counts.append((total.ready, total.started, total.processed, total.completed))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.undo.close()


def test_a_batch_that_is_none_is_counted_as_any_other(tmp_path: Path) -> None:
    data = DataLoader(DATA, batch_size=4, collate_fn=lambda rows: None if rows[0][0] == 4 else default_collate(rows))
    counts = CountsNone()
    fit(Model(), tmp_path, data, counts)
    assert counts.passed == [0, 1, 2] * 2
    assert counts.counts == [(i, i, i, i - 1) for i in range(1, 7)]


def test_steps_and_rows() -> None:
    class Notes(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            noted.append((loop.steps_taken(trainer), loop.logged_at(trainer), loop.writes_step(trainer)))
            assert loop.writes_step(trainer) == trainer._logger_connector.should_update_logs

    noted: list[tuple[int, int, bool]] = []
    data = DataLoader(DATA, batch_size=2)
    fits.fit(Model(), data, Notes(), max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=2)
    assert noted == [(0, 0, False), (1, 0, False), (1, 1, True), (2, 1, True), (3, 2, False)]


def test_a_step_that_lightning_does_not_take() -> None:
    class Takes(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 1:
                pl_module.net.weight.grad = torch.ones(1, 1)
                before = pl_module.net.weight.item()
                loop.take_step(trainer, 0, counted=False)
                assert pl_module.net.weight.item() == pytest.approx(before - 0.01)
                loop.take_step(trainer, 0, counted=True)
                assert pl_module.net.weight.item() == pytest.approx(before - 0.02)
                assert trainer.global_step == 2

    trainer = fits.fit(Model(), DataLoader(DATA, batch_size=5), Takes(), max_epochs=1)
    assert trainer.global_step == 3


def test_ended_epoch(tmp_path: Path) -> None:
    fit(Model(), tmp_path, DataLoader(DATA, batch_size=4))  # three steps an epoch
    checkpoints = {step: torch.load(tmp_path / f"step={step}.ckpt") for step in range(1, 7)}
    assert [step for step, checkpoint in checkpoints.items() if ended_epoch(checkpoint, -1)] == [3, 6]


@pytest.mark.parametrize(
    "path",
    [
        "fit_loop._data_source.dataloader",
        "fit_loop.setup_data",
        "fit_loop._combined_loader",
        "fit_loop._data_fetcher",
        "fit_loop.epoch_loop.batch_progress.current.completed",
        "fit_loop.epoch_loop._on_before_fetch",
        "fit_loop.epoch_loop.reset",
        "fit_loop.epoch_loop.update_lr_schedulers",
        "fit_loop.epoch_loop._should_accumulate",
        "fit_loop.epoch_loop._batches_that_stepped",
        "fit_loop.epoch_loop._should_check_val_fx",
        "fit_loop.epoch_loop.val_loop._restart_stage",
        "strategy._lightning_optimizers",
        "_logger_connector.should_update_logs",
        "_data_connector._prepare_dataloader",
        "fit_loop.epoch_loop.automatic_optimization.run",
        "fit_loop.epoch_loop.automatic_optimization._make_closure",
        "fit_loop.epoch_loop.automatic_optimization._optimizer_step",
    ],
)
def test_the_attributes_of_a_trainer(path: str) -> None:
    found: Any = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for name in path.split("."):
        found = getattr(found, name)


def test_attributes_of_others() -> None:
    assert callable(loop._block_parallel_sync_behavior)
    assert callable(loop._shutdown_workers_and_reset_iterator)
    assert CombinedLoader({}, "min_size")._mode == "min_size"
    # what a re-made loader replaces
    replaced = {"batch_sampler", "sampler", "batch_size", "drop_last", "generator", "_iterator"}
    assert replaced <= vars(DataLoader(DATA)).keys()
    assert {"_update_count", "_computed"} <= vars(MeanMetric()).keys()
    assert "require_forward_param_sync" in DistributedDataParallel.__init__.__code__.co_names
    assert [loop.checks_epoch_ends(EarlyStopping("loss", check_on_train_epoch_end=ends)) for ends in (True, False, None)] == [
        True,
        False,
        False,
    ]


class Validates(Callback):
    """Validates after the batches of ``at``, and first if the run is resumed."""

    def __init__(self, *at: int) -> None:
        self.at = at
        self.undo = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        loop.validate_when(trainer, lambda: trainer.global_step in self.at, self.undo)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:
            loop.validate_before_training(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.undo.close()


def test_when_lightning_validates(tmp_path: Path) -> None:
    class Validated(Model):
        def val_dataloader(self) -> Any:
            return DataLoader(DATA)

    fit(model := Validated(), tmp_path, DataLoader(DATA, batch_size=4), Validates(1, 2, 5))
    assert model.validated == [1, 2, 5]
    for step in (2, 5):  # saved after the step, and before its validation
        resumed = Validated()
        path = tmp_path / f"step={step}.ckpt"
        trainer = fits.fit(resumed, DataLoader(DATA, batch_size=4), Validates(1, 2, 5), max_epochs=2, ckpt_path=path)
        assert resumed.validated == [at for at in (1, 2, 5) if at >= step]
        assert trainer.global_step == 6
        assert "_should_check_val_fx" not in vars(trainer.fit_loop.epoch_loop)


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
        self.undo = ExitStack()
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

        walk_steps(trainer, walk, self.undo)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self.losses.append(arguments[1]["loss"].item())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.undo.close()


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
