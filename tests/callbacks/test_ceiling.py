"""Running out of memory halves the micro-batch and changes nothing else."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchmetrics import MeanMetric

from harness.cases import GROWING
from harness.data import own, regression
from harness.files import flat
from harness.fits import fit, out_of_memory
from harness.loops import train_by_hand, whole_steps
from harness.modules import Regression, assert_close, equal
from lightning_bsl import BatchLRScheduler
from lightning_bsl.callbacks.micro_batches import cut, is_out_of_memory
from lightning_bsl.schedules import Milestones

DATA = regression(61)
STEPS = Milestones([5, 20, 35], at=[3, 8], unit="step")  # 20 runs out of memory, then 10; 5 fits


class Limited(Regression):
    """Runs out of memory above ``limit`` examples, at one place or another."""

    def __init__(self, limit: int, place: str = "forward", error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__(nn.BatchNorm1d(4, dtype=torch.float64), nn.Dropout(0.3))
        self.limit, self.place, self.error = limit, place, error
        self.mean_input = MeanMetric()
        self.parts, self.failures = 0, []
        self.outputs: list[Any] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        self.parts += 1
        self.mean_input.update(batch[0].float())
        loss = super().training_step(batch, batch_idx)
        self.log(f"of {len(batch[0])}", loss, on_step=False, on_epoch=True)  # a name that a failed attempt would leave behind
        if len(batch[0]) > self.limit:
            self.failures.append(len(batch[0]))
            if self.place == "forward":
                self.run_out()
            loss.register_hook(lambda gradient: self.run_out())
        return {"loss": loss, "examples": torch.tensor(len(batch[0]))}

    def run_out(self) -> None:
        raise self.error("CUDA out of memory. Tried to allocate 20.00 GiB")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)


def go(
    model: Regression, cap: Any, *callbacks: Any, known: int | None = None, **arguments: Any
) -> tuple[Trainer, BatchLRScheduler]:
    torch.manual_seed(7)
    scheduler = BatchLRScheduler(STEPS, 0.05, max_device_batch_size=cap)
    if cap == "auto":
        scheduler._splitter.size = known
    return fit(model, own(DATA), scheduler, *callbacks, **arguments), scheduler


@pytest.mark.quick(place=["forward"], error=[torch.OutOfMemoryError])
@pytest.mark.quick(place=["backward"], error=[RuntimeError])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_nothing_of_the_run_changes(place: str, error: type[Exception]) -> None:
    fixed, known, found = Limited(5), Limited(5), Limited(5, place, error)
    go(fixed, 5)
    trainer, _ = go(known, "auto", known=5)
    draws = torch.rand(3)
    other, scheduler = go(found, "auto")
    assert found.failures == [20, 10]
    assert torch.equal(torch.rand(3), draws)
    for (name, value), (_, expected) in zip(found.state_dict().items(), known.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name  # BatchNorm's statistics too
        torch.testing.assert_close(value, fixed.state_dict()[name], rtol=1e-12, atol=1e-13)
    assert found.parts == known.parts
    assert torch.equal(found.mean_input.compute(), known.mean_input.compute())
    assert other.callback_metrics.keys() == trainer.callback_metrics.keys()
    for name, value in trainer.callback_metrics.items():
        assert other.callback_metrics[name].item() == pytest.approx(value.item(), rel=1e-6), name
    assert scheduler.plan is not None
    assert other.global_step == scheduler.progress.step == scheduler.plan.steps  # a batch of the loader is a step
    assert scheduler.max_device_batch_size == "auto"
    assert scheduler.state_dict()["micro_batch_size"] == 5


@pytest.mark.parametrize("clip", [None, 0.1])
def test_equals_a_plain_loop(clip: float | None) -> None:
    class Shrinking(Regression):
        """Has ever less memory."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if len(batch[0]) > 32 // (self.trainer.global_step + 2):
                raise out_of_memory()
            return super().training_step(batch, batch_idx)

    model, reference = Shrinking(), Regression()
    with pytest.warns(UserWarning, match="out of memory with micro-batches"):
        fit(model, own(DATA), BatchLRScheduler(GROWING, None, "auto"), gradient_clip_val=clip)
    train_by_hand(reference, DATA, flat(whole_steps(GROWING, len(DATA), 3)), clip)
    assert_close(model, reference)
    assert model.sizes[0] == 7 and 1 < model.sizes[-1] < 3


def test_a_step_that_fits_is_left_in_one_piece() -> None:
    model, whole = Regression(), Regression()
    fit(model, own(DATA), BatchLRScheduler(GROWING, None, "auto"))
    fit(whole, own(DATA), BatchLRScheduler(GROWING))
    assert model.journal == whole.journal
    assert equal(model, whole)


@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_outputs_are_of_the_whole_step() -> None:
    found = Limited(5)
    fit(found, own(DATA), BatchLRScheduler(20, max_device_batch_size="auto"), max_epochs=1, limit_train_batches=1)
    (output,) = found.outputs
    assert output["examples"] == 5
    assert output["loss"].shape == ()


@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_bfloat16() -> None:
    known, found = Limited(5), Limited(5)
    go(known, "auto", known=5, precision="bf16-mixed")
    go(found, "auto", precision="bf16-mixed")
    assert equal(found, known)


@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_resume_knows_what_was_found(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Limited(5)
    go(whole, "auto", every, enable_checkpointing=True)
    for step in (3, 4):
        resumed = Limited(5)
        go(resumed, "auto", ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.failures == ([20, 10] if step < 4 else [])
        assert equal(resumed, whole)


@pytest.mark.parametrize("message, known", [
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
    ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
    ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", False),
])  # fmt: skip
def test_libraries_name_a_lack_of_memory_in_their_own_words(message: str, known: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) == known


def test_what_is_no_lack_of_memory_is_raised() -> None:
    class Wrong(Limited):
        def run_out(self) -> None:
            raise RuntimeError("a shape that does not fit")

    with pytest.raises(RuntimeError, match="a shape that does not fit"):
        go(Wrong(5), "auto")


@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_not_even_one_example() -> None:
    class Never(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise out_of_memory()

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        go(Never(), "auto")


class Graphs(LightningModule):
    """Takes batches that nobody but its author can cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1, dtype=torch.float64)

    def training_step(self, batch: Tensor) -> Tensor:
        if batch.shape[1] > 4:
            raise out_of_memory()
        return self.layer(batch.T).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_batch_that_cannot_be_split() -> None:
    datamodule = own(DATA, collate_fn=lambda items: default_collate(items)[0].T)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(MisconfigurationException, match=r"tensor of shape \(3, 8\) where 8 examples"),
    ):
        fit(Graphs(), datamodule, BatchLRScheduler(8, max_device_batch_size="auto"), max_epochs=1)


def test_cut() -> None:
    Pair = namedtuple("Pair", "x y")
    x = torch.arange(6)
    batch = {"pair": Pair(x, [x, {"z": x.reshape(6, 1)}]), "names": list("abcdef"), "scalar": torch.tensor(3), "what": "text"}
    part = cut(batch, 2, 3, 6)
    assert part["pair"].x.tolist() == part["pair"].y[0].tolist() == part["pair"].y[1]["z"].flatten().tolist() == [2, 3, 4]
    assert (part["names"], part["scalar"], part["what"]) == (["c", "d", "e"], torch.tensor(3), "text")
    assert cut([x], 6, 0, 6)[0].tolist() == [0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="max_device_batch_size='automatic'"):
        BatchLRScheduler(8, max_device_batch_size="automatic")  # type: ignore[arg-type]
    manual = Regression()
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        go(manual, "auto")
