"""Batches without anything to train: gradients, counts and resume stay right, in every callback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from harness.data import Stranger
from harness.fits import fit
from harness.modules import equal
from harness.processes import Pair, RemoteError
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, FullGradientNorm, GradientNoiseScale, TrainingTime
from lightning_bsl.schedules import Exponential, Milestones

ROWS = torch.arange(12.0).unsqueeze(1)
DATA = TensorDataset(ROWS)


class Slope(LightningModule):
    """The gradient of an example is its value. Notes the gradient of each step.

    Args:
        without_loss: A batch that begins with such a row has no loss.
        skips: A batch that begins with such a row ends the epoch.
        drop: Whether to draw random numbers.
        scheduled: Whether there is a learning-rate scheduler that halves the rate at each step.
    """

    def __init__(
        self, without_loss: tuple[float, ...] = (), skips: tuple[float, ...] = (), drop: bool = False, scheduled: bool = False
    ) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.net.weight)
        self.without_loss, self.skips, self.drop, self.scheduled = without_loss, skips, drop, scheduled
        self.gradients: list[float] = []
        self.rates: list[float] = []
        self.batches: list[list[float]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch[0][0].item() in self.skips and self.current_epoch == 0 else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        (x,) = batch
        if self.training:
            self.batches.append(x.flatten().tolist())
        if x[0].item() in self.without_loss:
            return None
        loss = self.net(x).mean()
        return loss * (1 + torch.rand(()) / 10) if self.drop else loss

    def full_loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).mean()

    def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure=closure)
        gradient = self.net.weight.grad
        if gradient is not None:
            self.gradients.append(gradient.item())
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(unreadable: tuple[int, ...] = (), **options: Any) -> DataLoader[Any]:
    """Leaves out the rows that it cannot read: a batch that has no others is ``None``."""

    def collate(rows: list[Any]) -> Any:
        readable = [row for row in rows if int(row[0]) not in unreadable]
        return default_collate(readable) if readable else None

    return DataLoader(DATA, **{"batch_size": 4, "collate_fn": collate} | options)


def go(
    unreadable: tuple[int, ...], cap: Any, model: Slope | None = None, *callbacks: Callback, **options: Any
) -> tuple[Slope, BatchLRScheduler]:
    scheduler = BatchLRScheduler(4, max_device_batch_size=cap)
    fit(model := model or Slope(), loader(unreadable), scheduler, *callbacks, **{"max_epochs": 1} | options)
    return model, scheduler


# Rows 0 to 11 in steps of four: their means are 1.5, 5.5, 9.5
UNREADABLE = [
    ((4, 5), 2, [1.5, 6.5, 9.5]),
    ((6, 7), 2, [1.5, 4.5, 9.5]),
    ((0, 1, 2, 3), None, [5.5, 9.5]),
    ((4, 5, 6, 7), None, [1.5, 9.5]),
    ((8, 9, 10, 11), None, [1.5, 5.5]),
    ((0, 1, 2, 3), 2, [5.5, 9.5]),
    ((8, 9, 10, 11), 2, [1.5, 5.5]),
    ((0,), 1, [2.0, 5.5, 9.5]),
    ((0, 1, 2, 3, 7), 1, [5.0, 9.5]),
    ((3, 4, 6, 11), 1, [1.0, 6.0, 9.0]),
    ((0, 3, 4, 5, 6, 7, 8, 9, 10), 1, [1.5, 11.0]),
    ((*range(12),), 1, []),
    ((*range(12),), None, []),
]


@pytest.mark.parametrize(("unreadable", "cap", "gradients"), UNREADABLE)
def test_batches_that_are_none(unreadable: tuple[int, ...], cap: int | None, gradients: list[float]) -> None:
    model, scheduler = go(unreadable, cap)
    assert model.gradients == pytest.approx(gradients)
    assert (scheduler.progress.step, scheduler.progress.samples) == (3, 12)
    assert model.net.weight.item() == pytest.approx(-0.5 * sum(gradients))
    assert model.trainer.global_step == len(gradients)


@pytest.mark.parametrize(
    ("without_loss", "cap", "gradients"),
    [
        ((4,), 2, [1.5, 6.5, 9.5]),
        ((6,), 2, [1.5, 4.5, 9.5]),
        ((0,), None, [5.5, 9.5]),
        ((0, 2), 2, [5.5, 9.5]),
        ((0, 5, 11), 1, [2.0, 17 / 3, 9.0]),
        ((4, 5, 6, 7), 1, [1.5, 9.5]),
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_losses_that_are_none(scaled: bool, without_loss: tuple[float, ...], cap: int | None, gradients: list[float]) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0)) if scaled else None
    model, scheduler = go((), cap, Slope(without_loss), plugins=plugin)
    if not scaled:
        assert [gradient for gradient in model.gradients if gradient] == pytest.approx(gradients)
    assert model.net.weight.item() == pytest.approx(-0.5 * sum(gradients))
    assert (scheduler.progress.step, scheduler.progress.samples) == (3, 12)


def test_losses_that_are_none_where_memory_ran_out() -> None:
    class Small(Slope):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            if len(batch[0]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="out of memory"):
        model, _ = go((), "auto", Small((0, 6)))
    assert model.gradients == pytest.approx([2.5, 4.5, 9.5])


def test_a_gradient_is_corrected_before_it_is_clipped() -> None:
    model, _ = go((6, 7), 2, gradient_clip_val=4.0)
    assert model.net.weight.item() == pytest.approx(-0.5 * (1.5 + 4.0 + 4.0))


def test_a_scheduler_of_the_module_steps_with_the_steps() -> None:
    model, _ = go((6, 7), 2, Slope(scheduled=True))
    assert model.rates == [0.5, 0.25, 0.125]
    assert model.net.weight.item() == pytest.approx(-0.5 * 1.5 - 0.25 * 4.5 - 0.125 * 9.5)


@pytest.mark.parametrize(("skips", "cap"), [((4.0,), None), ((4.0,), 2), ((6.0,), 2), ((0.0,), 2), ((10.0,), 2), ((8.0,), 1)])
def test_the_rest_of_an_epoch_is_skipped(skips: tuple[float, ...], cap: int | None) -> None:
    model, scheduler = go((), cap, Slope(skips=skips), max_epochs=2)
    steps = int(skips[0]) // 4
    assert model.gradients == pytest.approx([*[1.5, 5.5, 9.5][:steps], 1.5, 5.5, 9.5])
    assert (scheduler.progress.step, scheduler.progress.samples) == (steps + 3, 4 * steps + 12)


@pytest.mark.quick(skips=[(6.0,)], unreadable=[(6, 7)])
@pytest.mark.quick(skips=[()], unreadable=[(8, 9, 10, 11)])
@pytest.mark.quick(skips=[(4.0,)], unreadable=[()])
@pytest.mark.parametrize("skips", [(), (6.0,), (4.0,)])
@pytest.mark.parametrize(("unreadable", "cap"), [((4, 5), 2), ((6, 7), 2), ((8, 9, 10, 11), 2), ((4, 5, 6, 7), None), ((), 2)])
def test_resumes_bit_for_bit(unreadable: tuple[int, ...], cap: int | None, skips: tuple[float, ...], tmp_path: Path) -> None:
    class SaveAll(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{len(model.batches):02} batch.ckpt")

        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{len(model.batches):02} epoch.ckpt")

    model = Slope(skips=skips, drop=True)
    torch.manual_seed(3)
    whole, clock = go(unreadable, cap, model, SaveAll(), max_epochs=3)
    for path in sorted(tmp_path.iterdir()):
        torch.manual_seed(99)
        resumed, scheduler = go(unreadable, cap, Slope(skips=skips, drop=True), max_epochs=3, ckpt_path=path)
        assert equal(resumed, whole), path
        assert scheduler.progress == clock.progress, path
        assert resumed.batches == whole.batches[len(whole.batches) - len(resumed.batches) :]


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


class Streams(Stranger):
    def __init__(self, unreadable: tuple[int, ...]) -> None:
        super().__init__(DATA, batch_size=2)
        self.unreadable = unreadable

    def train_dataloader(self) -> Any:
        collate = loader(self.unreadable).collate_fn
        return DataLoader(Rows(), batch_size=self.hparams.batch_size, collate_fn=collate)


@pytest.mark.parametrize(
    ("unreadable", "batch_size", "gradients"),
    [
        ((4, 5), 4, [1.5, 6.5, 9.5]),
        ((6, 7), 4, [1.5, 4.5, 9.5]),
        ((), 10, [4.5, 10.5]),  # the last window has a batch of two
        ((0, 1), 4, [2.5, 5.5, 9.5]),
        ((10, 11), 4, [1.5, 5.5, 8.5]),
    ],
)
def test_a_stream_in_windows(unreadable: tuple[int, ...], batch_size: int, gradients: list[float]) -> None:
    scheduler = BatchLRScheduler(batch_size)
    fit(model := Slope(), Streams(unreadable), scheduler, max_epochs=1, accumulate_grad_batches=2)
    assert model.gradients == pytest.approx(gradients)
    assert (scheduler.progress.step, scheduler.progress.samples) == (len(gradients), 12)


class Noting(GradientNoiseScale):
    def __init__(self) -> None:
        super().__init__(every=1, probe_every=None)
        self.found: list[tuple[float, float]] = []

    def _record(self, values: Any) -> None:
        self.found.append(values)


@pytest.mark.parametrize("first", [True, False])
def test_the_noise_scale_of_the_pieces_that_were_trained(first: bool) -> None:
    scheduler, noise = BatchLRScheduler(6, max_device_batch_size=2), Noting()
    callbacks: list[Callback] = [scheduler, noise]
    fit(Slope(), loader((2, 3)), *callbacks[:: 1 if first else -1], max_epochs=1)
    # pieces with means 0.5 and 4.5, then 6.5, 8.5, 10.5: (mean of squares - square of the mean) / (1/2 - 1/n)
    for (sq_norm, variance), means in zip(noise.found, ([0.5, 4.5], [6.5, 8.5, 10.5]), strict=True):
        mean = sum(means) / len(means)
        spread = sum(each**2 for each in means) / len(means) - mean**2
        expected = spread / (1 / 2 - 1 / (2 * len(means)))
        assert (sq_norm, variance) == pytest.approx((mean**2 - expected / (2 * len(means)), expected))


def test_the_noise_scale_without_a_scheduler_leaves_out_such_a_step() -> None:
    noise = Noting()
    fit(Slope(), loader((4, 5), batch_size=2), noise, max_epochs=1, accumulate_grad_batches=2)
    assert len(noise.found) == 2


def test_every_callback_beside_it() -> None:
    scheduler = AdaptiveBatchLRScheduler(4, 0.5, lambda trainer, scheduler: True, maximum=8, check_every=1)
    measurements: list[Callback] = [FullGradientNorm(every=1, unit="step"), GradientNoiseScale(every=1), TrainingTime()]
    model = Slope(without_loss=(8.0,))
    collate = loader((0, 1, 2, 3)).collate_fn
    fit(model, DataLoader(DATA, batch_size=2, collate_fn=collate), scheduler, *measurements, max_epochs=2)
    assert scheduler.progress.samples == 24
    assert scheduler.segments[-1].batch_size == 8


def one_of_two_has_nothing(told: Path) -> None:
    """The one that has nothing ends, as a process does whose error nobody catches."""

    class Data(Stranger):
        def train_dataloader(self) -> Any:
            assert self.trainer is not None
            return loader((2, 3) if self.trainer.global_rank else ())

    try:
        fit(Slope(), Data(DATA), BatchLRScheduler(4), max_epochs=1, devices=2, strategy="ddp")
    except RuntimeError as error:
        if os.environ["RANK"] == "1":
            told.write_text(str(error))
            os._exit(1)
        raise


@pytest.mark.slow  # it ends the two processes, which others then start again
def test_a_process_alone_cannot_skip_a_batch(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(RemoteError):
        pair(one_of_two_has_nothing, tmp_path / "told")
    assert "a batch that is None, but with several processes" in (tmp_path / "told").read_text()


def test_rates_and_sizes_stay_with_their_steps(tmp_path: Path) -> None:
    sizes, rates = Milestones([2, 4], at=[2], unit="step"), Exponential(0.5, 0.5, every=1, unit="step")
    scheduler = BatchLRScheduler(sizes, rates, max_device_batch_size=2)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    model = Slope()
    fit(model, loader((2, 3)), scheduler, saver, TrainingTime(),
        enable_checkpointing=True, max_epochs=1)  # fmt: skip
    assert model.gradients == pytest.approx([0.5, 5.5, 9.5])  # the second step had nothing
    assert model.rates == [0.5, 0.125, 0.0625]
