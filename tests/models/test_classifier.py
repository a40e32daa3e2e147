"""The classifier, driven by Lightning's Trainer."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from harness.files import csv_rows
from harness.fits import quiet
from lightning_bsl.models import Classifier, cnn5


@pytest.fixture
def loader() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(22, 1, 8, 8, generator=generator)
    labels = torch.randint(3, (22,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=4)  # the last batch is short: 5 x 4 + 2


def make(**options: object) -> Classifier:
    torch.manual_seed(0)
    return Classifier(cnn5(1, 3, 8, width=4), num_classes=3, **options)  # type: ignore[arg-type]


def trainer(folder: Path, log_every_n_steps: int = 1, **options: object) -> Trainer:
    return Trainer(**quiet(logger=CSVLogger(folder, name="", version=""), log_every_n_steps=log_every_n_steps, **options))


def rows(folder: Path) -> list[dict[str, str]]:
    return csv_rows(folder / "metrics.csv")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_logged_values(tmp_path: Path, loader: DataLoader[tuple[Tensor, ...]]) -> None:
    """``train/loss`` in the rows of the steps and, weighted by examples, in the row of the epoch."""
    model = make()
    seen: list[tuple[float, int, int]] = []
    step = model.training_step

    def spy(batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            logits = model(batch[0])
        loss = step(batch, batch_idx)
        seen.append((loss.item(), int((logits.argmax(1) == batch[1]).sum()), len(batch[1])))
        return loss

    model.training_step = spy  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=2).fit(model, loader, loader)

    found = rows(tmp_path)
    steps = [float(row["train/loss"]) for row in found if row["train/loss"] and not row["train/accuracy"]]
    epochs = [(float(row["train/loss"]), float(row["train/accuracy"])) for row in found if row["train/accuracy"]]
    assert steps == pytest.approx([loss for loss, _, _ in seen], rel=1e-6)
    for epoch, (loss, accuracy) in enumerate(epochs):
        of_epoch = seen[6 * epoch : 6 * epoch + 6]
        assert loss == pytest.approx(sum(value * n for value, _, n in of_epoch) / 22, rel=1e-6)
        assert accuracy == pytest.approx(sum(hits for _, hits, _ in of_epoch) / 22, rel=1e-6)
    assert len(epochs) == 2

    images, labels = loader.dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = model(images)
    last = [row for row in found if row["val/loss"]][-1]
    assert float(last["val/loss"]) == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert float(last["val/accuracy"]) == pytest.approx((logits.argmax(1) == labels).float().mean().item())

    tested = trainer(tmp_path / "test").test(model, loader, verbose=False)[0]
    assert tested["test/loss"] == pytest.approx(float(last["val/loss"]), rel=1e-5)
    assert tested["test/accuracy"] == pytest.approx(float(last["val/accuracy"]))


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (4, 1), (1, 2), (2, 2)])
def test_logs_no_more_than_is_written(
    every: int, accumulate: int, tmp_path: Path, loader: DataLoader[tuple[Tensor, ...]]
) -> None:
    losses: list[float] = []
    logged: list[str] = []

    class Spy(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

        def log(self, name: str, *args: Any, **options: Any) -> None:
            logged.append(name)
            super().log(name, *args, **options)

    model = Spy(cnn5(1, 3, 8, width=4), num_classes=3)
    trainer(tmp_path, every, max_epochs=2, accumulate_grad_batches=accumulate).fit(model, loader)
    steps = losses[accumulate - 1 :: accumulate]  # the last micro-batch of each
    written = [float(row["train/loss"]) for row in rows(tmp_path) if row["train/loss"] and not row["train/accuracy"]]
    assert written == pytest.approx(steps[every - 1 :: every], rel=1e-6)
    assert logged.count("train/loss") == accumulate * len(written) + 2  # and once an epoch


def test_logs_the_step_on_which_the_run_is_stopped(tmp_path: Path, loader: DataLoader[tuple[Tensor, ...]]) -> None:
    losses: list[float] = []

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())
            trainer.should_stop = trainer.global_step == 5

    trainer(tmp_path, 4, max_epochs=2, callbacks=[Stop()]).fit(make(), loader)
    written = [float(row["train/loss"]) for row in rows(tmp_path) if row["train/loss"] and not row["train/accuracy"]]
    assert written == pytest.approx([losses[3], losses[4]], rel=1e-6)


def test_optimizer() -> None:
    default = make().configure_optimizers()
    assert isinstance(default, torch.optim.SGD)
    assert (default.param_groups[0]["lr"], default.param_groups[0]["momentum"]) == (0.1, 0)
    adam = make(optimizer=partial(torch.optim.Adam, lr=0.01)).configure_optimizers()
    assert isinstance(adam, torch.optim.Adam)
    assert adam.param_groups[0]["lr"] == 0.01


def test_loss(loader: DataLoader[tuple[Tensor, ...]], tmp_path: Path) -> None:
    model = make(loss=nn.CrossEntropyLoss(label_smoothing=0.5))
    images, labels = loader.dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.5)
    result = trainer(tmp_path).validate(model, loader, verbose=False)[0]
    assert result["val/loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_compile_is_in_place_and_for_all_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options))
    model = make(compile=True)
    keys = list(model.state_dict())
    for _ in range(2):
        model.configure_model()  # Lightning calls it in every fit, validate and test
    assert calls == [{"dynamic": True}]
    assert list(model.state_dict()) == keys


def test_compiled_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make(compile=True), torch.randn(6, 1, 8, 8)
    expected = model(images)
    called: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        return lambda *arguments: called.append(1) or graph.forward(*arguments)

    # the default backend needs a C++ compiler
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model.configure_model()
    assert torch.allclose(model(images), expected)
    assert called == [1]
    assert not any("_orig_mod" in key for key in model.state_dict())
    assert torch.allclose(copy.deepcopy(model)(images), expected)


def test_channels_last() -> None:
    model, images = make(channels_last=True), torch.randn(6, 1, 8, 8)
    expected = model(images)
    model.configure_model()
    weight = model.net[3].weight  # type: ignore[index]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(model(images), expected, atol=1e-6)
