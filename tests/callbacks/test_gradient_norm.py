"""The full gradient norm against autograd over the whole set at once, and the run beside a run without it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from harness import fits
from harness.data import StrangerWithAttribute, own, regression
from harness.fits import out_of_memory
from harness.modules import Stateful
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, GradientNormTrigger
from lightning_bsl.callbacks import FullGradientNorm, GradientNoiseScale
from lightning_bsl.datasets import CIFAR10, ImageTensors
from lightning_bsl.models import Classifier
from lightning_bsl.runs import read_metrics
from lightning_bsl.schedules import Milestones

N = 131
DATA = regression(N, features=6, dtype=torch.float32)
X, Y, _ = DATA.tensors


def reference(model: Any, examples: Any = slice(None)) -> tuple[float, float]:
    twin = copy.deepcopy(model.net).double().eval()
    twin.zero_grad()
    loss = nn.functional.mse_loss(twin(X[examples].double()), Y[examples].double())
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in twin.parameters() if p.requires_grad]).norm()
    return norm.item(), loss.item()


def fit(*callbacks: Any, model: Stateful | None = None, datamodule: Any = None, **arguments: Any) -> Stateful:
    """With a batch size that grows inside an epoch."""
    model = model or Stateful()
    torch.manual_seed(5)
    np.random.seed(5)
    scheduler = BatchLRScheduler(Milestones([8, 16, 40], at=[9, 150], unit="samples"), 0.01)
    fits.fit(model, datamodule or own(DATA), scheduler, *callbacks, **arguments)
    return model


class References(ModelCheckpoint):
    """Notes the reference where FullGradientNorm measures."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[float, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.values.append(reference(pl_module))


@pytest.mark.parametrize("batch_size", [7, 64, N, 1000])
def test_equals_autograd_over_the_whole_set(batch_size: int, tmp_path: Path) -> None:
    expected = References()
    logger = CSVLogger(tmp_path, name="", version="")
    fit(FullGradientNorm(batch_size=batch_size), expected, logger=logger, enable_checkpointing=True)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "full_gradient_norm" in row]
    assert [row["samples"] for row in rows] == [N, 2 * N, 3 * N]
    for row, (norm, loss) in zip(rows, expected.values, strict=True):
        assert row["full_gradient_norm"] == pytest.approx(norm, rel=1e-5)
        assert row["full_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.quick(workers=[0], measure=[{"every": 2, "unit": "step"}])
@pytest.mark.quick(workers=[2], measure=[{"subset": 50, "batch_size": 20}])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("measure", [{}, {"every": 2, "unit": "step"}, {"subset": 50, "batch_size": 20}])
def test_training_does_not_notice(measure: Any, workers: int, tmp_path: Path) -> None:
    def go(name: str, *callbacks: Any, path: Path | None = None) -> tuple[Stateful, dict[str, Any], list[dict[str, float]]]:
        logger = CSVLogger(tmp_path, name="", version=name)
        every = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        model = fit(
            *callbacks,
            every,
            datamodule=own(DATA, num_workers=workers),
            enable_checkpointing=True,
            logger=logger,
            log_every_n_steps=1,
            ckpt_path=path,
        )
        state = {"weights": model.state_dict(), "optimizer": model.trainer.optimizers[0].state_dict(), "rng": torch.rand(4)}
        return model, state, read_metrics(tmp_path / name / "metrics.csv")

    def both() -> tuple[Any, ...]:
        return FullGradientNorm(**measure), GradientNoiseScale(probe_every=3)

    model, state, rows = go("without")
    measured, measured_state, measured_rows = go("with", *both())
    resumed, resumed_state, _ = go("resumed", *both(), path=tmp_path / "with" / "step=13.ckpt")
    for other in (measured_state, resumed_state):
        torch.testing.assert_close(other, state, rtol=0, atol=0)
    assert measured.journal == model.journal
    assert resumed.journal == model.journal[13:]
    assert measured.steps == model.steps
    noise = {f"gradient_{name}" for name in ("noise_scale", "noise_scale_low", "noise_scale_high", "sq_norm", "variance")}
    ours = {"full_gradient_norm", "full_loss"} | noise
    kept = [{k: v for k, v in row.items() if k not in ours} for row in measured_rows]
    assert [row for row in kept if row.keys() - {"epoch", "step"}] == rows
    assert all(each.training for each in measured.modules())


def test_after_every_third_step(tmp_path: Path) -> None:
    class Noting(FullGradientNorm):
        def measure(self, trainer: Trainer, pl_module: Any) -> Any:
            values = super().measure(trainer, pl_module)
            expected.append((trainer.global_step, *reference(pl_module)))
            return values

    expected: list[tuple[float, ...]] = []
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Noting(every=3, unit="step"), logger=logger, log_every_n_steps=1000, max_epochs=1)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "full_gradient_norm" in row]
    assert [row["step"] + 1 for row in rows] == [step for step, *_ in expected] == list(range(3, len(rows) * 3 + 1, 3))
    for row, (_, norm, loss) in zip(rows, expected, strict=True):
        assert (row["full_gradient_norm"], row["full_loss"]) == pytest.approx((norm, loss), rel=1e-5)


def test_a_subset_stays_the_same_one() -> None:
    class Chosen(FullGradientNorm):
        def measure(self, trainer: Trainer, pl_module: Any) -> Any:
            values = super().measure(trainer, pl_module)
            assert self.measurer.loader is not None
            examples = torch.tensor([index for batch in self.measurer.loader.batch_sampler for index in batch])
            chosen.append(examples.tolist())
            assert values == pytest.approx(reference(pl_module, examples), rel=1e-5)
            return values

    chosen: list[list[int]] = []
    fit(Chosen(subset=40, batch_size=13))
    fit(Chosen(subset=40, batch_size=64))
    assert len(chosen) == 6
    assert all(each == chosen[0] for each in chosen)
    assert len(set(chosen[0])) == 40 and chosen[0] != list(range(40))


def test_a_batch_that_does_not_fit_is_halved() -> None:
    class Limited(Stateful):
        def loss(self, batch: list[Tensor]) -> Tensor:
            if len(batch[0]) > 20 and not self.training:
                sizes.append(len(batch[0]))
                raise out_of_memory()
            return super().loss(batch)

    sizes: list[int] = []
    model, callback, expected = Limited(), FullGradientNorm(), References()
    fit(callback, expected, model=model, enable_checkpointing=True)
    assert sizes == [131, 66, 33]  # and not again
    values = model.trainer.callback_metrics
    assert values["full_gradient_norm"].item() == pytest.approx(expected.values[-1][0], rel=1e-5)


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        def __init__(self, value: Tensor) -> None:
            self.value = value

        def cpu(self) -> Tensor:
            return self.value

        def double(self) -> Tensor:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    norms = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda tensors: [OnDevice(norm) for norm in norms(tensors)])
    expected = References()
    model = fit(FullGradientNorm(batch_size=50), expected, enable_checkpointing=True)
    found = model.trainer.callback_metrics["full_gradient_norm"].item()
    assert found == pytest.approx(expected.values[-1][0], rel=1e-5)


def test_images_are_not_augmented() -> None:
    class Images(CIFAR10):
        def prepare_data(self) -> None:
            """No files."""

        def setup(self, stage: str | None = None) -> None:
            generator = torch.Generator().manual_seed(0)
            images = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8, generator=generator)
            self.train_set = self.val_set = ImageTensors(images, torch.arange(30) % 10)

    found = []
    for augment in (True, False):
        torch.manual_seed(3)
        still = partial(torch.optim.SGD, lr=0.0)
        model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), 10, optimizer=still)
        images = Images(augment=augment, batch_size=10)
        trainer = fits.fit(model, images, FullGradientNorm(batch_size=7), max_epochs=1)
        found.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    augmented, plain = found
    assert augmented["full_gradient_norm"] == plain["full_gradient_norm"]
    assert augmented["full_loss"] == pytest.approx(plain["train/loss"], rel=1e-5)
    assert augmented["train/loss"] != plain["train/loss"]


class OfNames(StrangerWithAttribute):
    """Its loaders have names."""

    def train_dataloader(self) -> Any:
        return {"a": super().train_dataloader()}


class OfDict(Stateful):
    def note(self, batch: Any, batch_idx: int) -> None:
        super().note(batch["a"], batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a"], batch_idx)

    def full_loss(self, batch: Any) -> Tensor:
        return self.loss(batch)


def test_somebody_elses_data_and_a_module_that_says_how() -> None:
    model = OfDict()
    theirs = OfNames(DATA, batch_size=8, shuffle=True, drop_last=True)
    fit(FullGradientNorm(batch_size=50), model=model, datamodule=theirs, max_epochs=1)
    values = model.trainer.callback_metrics
    norm, loss = reference(model)
    assert values["full_gradient_norm"].item() == pytest.approx(norm, rel=1e-5)
    assert values["full_loss"].item() == pytest.approx(loss, rel=1e-5)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    fit(FullGradientNorm(batch_size=10), enable_progress_bar=True, max_epochs=1)
    assert "full gradient" in "".join(capsys.readouterr())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


def test_refusals() -> None:
    for arguments, message in (({"every": 0}, "every=0"), ({"subset": 0}, "subset=0"), ({"batch_size": -1}, "batch_size=-1")):
        with pytest.raises(ValueError, match=message):
            FullGradientNorm(**arguments)
    with pytest.raises(ValueError, match="unknown unit 'samples'"):
        FullGradientNorm(unit="samples")
    with pytest.raises(ValueError, match=r"subset=132.*131 training examples"):
        fit(FullGradientNorm(subset=132))
    manual = Stateful()
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="full_loss"):
        fit(FullGradientNorm(), model=manual)
    with pytest.raises(MisconfigurationException, match="a data set that has a length"):
        fits.fit(Stateful(), DataLoader(Stream(), batch_size=4), FullGradientNorm(), max_epochs=1)


@pytest.mark.parametrize("fails", [False, True])
def test_its_workers_end_with_the_fit(fails: bool) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if fails:
                raise RuntimeError("stop")

    before = set(active_children())
    norm, trigger = FullGradientNorm(), GradientNormTrigger(start=1e-9)
    scheduler = AdaptiveBatchLRScheduler(16, 0.01, trigger=trigger, maximum=64, check_every=2)
    with pytest.raises(RuntimeError, match="stop") if fails else nullcontext():
        fits.fit(Stateful(), own(DATA, num_workers=1), scheduler, norm, Stop(), max_epochs=1)
    assert norm.measurer.loader is None and trigger.measurement.loader is None
    assert fails or set(active_children()) == before  # Lightning leaves the training loader's to the collector


# --- it measures what is trained on


class Linear(Stateful):
    """The gradient of the mean loss is the mean of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(self.rows(batch)).mean()

    def rows(self, batch: Any) -> Tensor:
        while not isinstance(batch, Tensor):
            batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        return batch

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.0)


class Twice(Sampler[int]):
    """Gives rows twice, counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self) -> Any:
        self.asked += 1
        return iter([0, 2, 0, 2, 2])


ROWS = TensorDataset(torch.tensor([[1.0], [100.0], [5.0]]))
SAMPLERS: dict[str, tuple[Any, float]] = {
    "all": (lambda: {"shuffle": True}, 106 / 3),
    "subset": (lambda: {"sampler": SubsetRandomSampler([0])}, 1.0),
    "repeated": (lambda: {"sampler": Twice()}, 3.0),
    "weighted": (lambda: {"sampler": WeightedRandomSampler([1.0, 0.0, 1.0], 50)}, 3.0),
    "batches": (lambda: {"batch_sampler": BatchSampler(SubsetRandomSampler([0, 1]), 2, False)}, 50.5),
    "own batches": (lambda: {"batch_sampler": [[0, 2], [2, 0]]}, 3.0),
}


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_says_what_is_trained_on(name: str, scheduled: bool) -> None:
    if scheduled and name == "own batches":
        pytest.skip("it cannot follow a schedule")
    make, expected = SAMPLERS[name]
    options = make()
    loader = DataLoader(ROWS, **({"batch_size": 1} if "batch_sampler" not in options else {}) | options)
    callbacks: list[Callback] = [BatchLRScheduler(1)] if scheduled else []
    trainer = fits.fit(Linear(), loader, *callbacks, FullGradientNorm(batch_size=2), max_epochs=2)
    assert trainer.callback_metrics["full_gradient_norm"].item() == pytest.approx(expected)
    if name == "repeated":
        assert options["sampler"].asked == 2  # once for each epoch that was trained


@pytest.mark.parametrize("wrap", [lambda loader: {"a": loader}, lambda loader: [loader], lambda loader: (loader,)])
def test_a_loader_in_a_collection(wrap: Any) -> None:
    trainer = fits.fit(Linear(), wrap(DataLoader(ROWS)), FullGradientNorm(), max_epochs=1)
    assert trainer.callback_metrics["full_gradient_norm"].item() == pytest.approx(106 / 3)


class Batches:
    """Any iterable of batches."""

    def __iter__(self) -> Any:
        return iter([torch.ones(2, 1)])


def test_what_cannot_be_measured_is_refused_before_the_first_step() -> None:
    model = Linear()
    two = {"a": DataLoader(ROWS), "b": DataLoader(ROWS)}
    for data, message in (
        (two, r"2 training loaders.*full_loss\(batch\)"),
        (DataLoader([torch.ones(2, 1)] * 2, batch_size=None), "`batch_size` is not None"),
        ({"a": {"b": DataLoader(ROWS)}}, "collection inside a collection.*full_loss"),
        (Batches(), "needs a training DataLoader"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            fits.fit(model, data, FullGradientNorm(), max_epochs=1)
    assert model.steps == 0


class Says(Linear):
    def full_loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).mean()


@pytest.mark.parametrize(("scheduler", "expected"), [(None, 106 / 3), ("b", 7.0)])
def test_a_module_that_says_how_is_given_the_scheduled_loader(scheduler: str | None, expected: float) -> None:
    two = {"a": DataLoader(ROWS), "b": DataLoader(TensorDataset(torch.tensor([[6.0], [8.0]])))}
    callbacks = [] if scheduler is None else [BatchLRScheduler(2, loader=scheduler)]
    trainer = fits.fit(Says(), two, *callbacks, FullGradientNorm(), max_epochs=1)
    assert trainer.callback_metrics["full_gradient_norm"].item() == pytest.approx(expected)
