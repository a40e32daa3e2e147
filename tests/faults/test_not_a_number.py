"""NaN in an image, in a target, or in the loss alone: a warning says the step, and which examples hold it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from harness.children import SMALL, train_here
from harness.data import own, regression
from harness.fits import fit, trained
from harness.modules import Regression
from lightning_bsl import BatchLRScheduler, StreamDataModule
from lightning_bsl.callbacks.non_finite import NonFiniteLoss
from lightning_bsl.schedules import Exponential

BAD = 17  # the example with NaN
GROWING = Exponential(4, factor=2, every=1)


def data(where: str, value: float = float("nan"), number: int = 40) -> TensorDataset:
    x, y, index = regression(number).tensors
    if where != "nowhere":
        {"image": x, "target": y}[where][BAD, 0] = value
    return TensorDataset(x, y, index)


class ByHand(Regression):
    """Manual optimization, in two micro-batches of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.note(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for half in zip(*(tensor.chunk(2) for tensor in batch), strict=True):
            self.manual_backward(self.loss(half) / 2)
        optimizer.step()


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in caught if "the training loss" in str(each.message)]


def fitted(model: Regression, source: Any, *callbacks: Callback, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, source, *callbacks, NonFiniteLoss(), **options)
    return told(caught)


def first_bad(model: Regression) -> tuple[int, int, list[int]]:
    """By the journal: the step and the epoch of the first batch with the bad example, and the examples of the step."""
    step, epoch = next((each.step, each.epoch) for each in model.journal if BAD in each.examples)
    return step, epoch, [i for each in model.journal if (each.step, each.epoch) == (step, epoch) for i in each.examples]


@pytest.mark.parametrize("deferred", [False, True])  # as on an accelerator
@pytest.mark.parametrize("where", ["image", "target"])
@pytest.mark.parametrize(
    "make, options",
    [
        (Regression, {}),
        (Regression, {"max_device_batch_size": 3}),
        (Regression, {"max_device_batch_size": "auto"}),
        (ByHand, {}),
    ],
    ids=["whole steps", "micro-batches", "auto", "by hand"],
)
@pytest.mark.quick(where=["image"], deferred=[False])
@pytest.mark.quick(where=["target"], deferred=[True])
def test_the_step_and_its_examples(
    make: type[Regression], options: dict[str, Any], where: str, deferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if deferred:
        monkeypatch.setattr(NonFiniteLoss, "waits", staticmethod(lambda loss: True))
    model = make()
    scheduler = BatchLRScheduler(GROWING, 0.01, **options)
    (text,) = fitted(model, own(data(where)), scheduler, log_every_n_steps=5)
    step, epoch, examples = first_bad(model)
    assert text.startswith(f"the training loss was nan in step {step} of epoch {epoch} (both count from 0")
    shown = re.search(r"Examples of the step: ([\d, ]+)", text)
    assert shown and sorted(map(int, shown[1].split(", "))) == sorted(examples)
    assert text.endswith(f"Values that are not finite: in {BAD}; correct or remove them")


class Breaks(Regression):
    """Its loss is infinite from a step on, and its data are finite."""

    def __init__(self, at: int, value: float = float("inf")) -> None:
        super().__init__()
        self.at, self.value = at, value

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = super().loss(batch)
        return loss * self.value if self.trainer.global_step >= self.at else loss


@pytest.mark.parametrize("at", [0, 7, 12])
@pytest.mark.quick(at=[12])
def test_a_loss_of_finite_examples(at: int) -> None:
    (text,) = fitted(Breaks(at), own(data("nowhere")), BatchLRScheduler(GROWING, 0.01))
    assert text.startswith(f"the training loss was inf in step {at} of ")
    assert "Their values are finite, so the learning rate may be too high" in text


def test_a_run_that_goes_on_inside_an_epoch(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise RuntimeError("stopped")

    whole, rest = Regression(), Regression()
    (expected,) = fitted(whole, own(data("image")), BatchLRScheduler(GROWING, 0.01))
    assert first_bad(whole)[0] > 2
    with pytest.raises(RuntimeError, match="stopped"):
        fit(Regression(), own(data("image")), BatchLRScheduler(GROWING, 0.01), Stop())
    assert fitted(rest, own(data("image")), BatchLRScheduler(GROWING, 0.01), ckpt_path=tmp_path / "last.ckpt") == [expected]


def test_what_is_finite_is_not_mentioned() -> None:
    assert not fitted(Regression(), own(data("nowhere")), BatchLRScheduler(GROWING, 0.01))


class OfTerms(Regression):
    """A mean over the examples with an even index: NaN where there are none, which trains nothing."""

    def loss_terms(self, batch: Any) -> int:
        return int((batch[2] % 2 == 0).sum())

    def loss(self, batch: Any) -> Tensor:
        x, y, index = batch
        errors: Tensor = (self.net(x) - y).square()
        return errors[index % 2 == 0].mean()


def test_a_mean_over_nothing_is_not_mentioned() -> None:
    model = OfTerms()
    assert not fitted(model, own(data("nowhere")), BatchLRScheduler(2, 0.01))
    assert any(all(i % 2 for i in examples) for examples in model.examples)


class Rows(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        rows = data("image")
        yield from (rows[i] for i in range(len(rows)))


@pytest.mark.parametrize("source", ["stream", "loader without a scheduler"])
def test_where_the_examples_are_not_known(source: str) -> None:
    model = Regression()
    if source == "stream":
        (text,) = fitted(model, StreamDataModule(Rows()), BatchLRScheduler(GROWING, 0.01))
    else:
        (text,) = fitted(model, DataLoader(data("image"), 4))
    step, epoch, _ = first_bad(model)
    assert f"was nan in step {step} of epoch {epoch} " in text and "look at the examples of this step" in text


class Unreadable(Dataset[Any]):
    """Every example can be read once."""

    def __init__(self) -> None:
        self.rows, self.read = data("image"), set[int]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index in self.read:
            raise OSError("the file is gone")
        self.read.add(index)
        return self.rows[index]


def test_examples_that_cannot_be_read_again() -> None:
    (text,) = fitted(Regression(), own(Unreadable()), BatchLRScheduler(4, 0.01), max_epochs=1)
    assert "They could not be read again (OSError: the file is gone)" in text


@pytest.mark.parametrize("where", ["nowhere", "image"])
def test_it_changes_nothing(where: str) -> None:
    class Noisy(Dataset[Any]):
        """Draws random numbers, as transforms do."""

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Any:
            x, y, i = data(where)[index]
            return x + torch.randn(3, dtype=torch.float64) / 100, y, i

    class Dropped(Regression):
        drawn: list[float]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx)
            self.drawn.append(torch.rand(1).item())
            return loss

    def drawn(*callbacks: Callback) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(4)
        model = Dropped()
        model.drawn = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained(model, own(Noisy()), BatchLRScheduler(GROWING, 0.01), *callbacks)
        return model.drawn, [parameter.detach().nan_to_num() for parameter in model.parameters()]

    (ours, weights), (others, other_weights) = drawn(NonFiniteLoss()), drawn()
    assert ours == others and all(map(torch.equal, weights, other_weights))


def test_a_command_warns_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = nn.CrossEntropyLoss.forward

    def broken(self: nn.CrossEntropyLoss, logits: Tensor, labels: Tensor) -> Tensor:
        return loss(self, logits, labels) / (0 if len(labels) == 16 else 1)

    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", broken)
    with pytest.warns(UserWarning, match=r"the training loss was inf in step 8 of epoch 1 \(both count from 0, as in metrics"):
        train_here(SMALL, tmp_path / "run")
