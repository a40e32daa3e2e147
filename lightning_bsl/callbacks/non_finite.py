"""A callback that says at which step, and with which examples, the training loss was first NaN or infinite."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_bsl.callbacks.batch_lr import scheduler_of
from lightning_bsl.callbacks.loop import writes_step
from lightning_bsl.data.sampler import GlobalBatchSampler

_KEPT = 1000  # losses, on an accelerator
_READ = 4096  # examples that are read again
_SHOWN = 10  # indices in the message


class _Batch(NamedTuple):
    """What is known of the batch of a step.

    Args:
        epoch: Its epoch.
        samples: Samples of the run before it, if they are counted.
        indices: Its examples in the training set; empty where they are not known.
        dataset: The training set.
    """

    epoch: int
    samples: int | None = None
    indices: tuple[int, ...] = ()
    dataset: Any = None


class NonFiniteLoss(Callback):
    """Warns, once in a fit, of the first training loss that is NaN or infinite.

    The warning says the step and the epoch. Where a `BatchLRScheduler` has replaced the sampler of the training loader, it also
    says the examples of the step, as indices in the training set. They are then read again, to say which of them hold values
    that are not finite. The run goes on: that a learning rate is too high may be what a search wants to know.

    On a CPU each loss is looked at when its step ends. On an accelerator that would wait for the device. There the losses are
    looked at in the steps whose values the loggers write (``log_every_n_steps``), and at the end of each epoch and of the fit.
    Each process looks at its own losses. With manual optimization these are those that ``manual_backward`` gets.

    The loss of a batch without [loss terms](../guides/micro-batches.md#losses-that-are-a-mean-over-something-else) does not
    count.

    Example:
        >>> trainer = Trainer(max_epochs=9, callbacks=[NonFiniteLoss()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []  # steps and losses that were not looked at
        self._before: dict[int, tuple[int, int | None]] = {}  # for each of these steps: its epoch, and the samples before it
        self._told = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._losses, self._before, self._told = [], {}, False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss."""
        scheduler = scheduler_of(trainer)
        micro_batch = scheduler.micro_batch if scheduler is not None else None
        if self._told or (micro_batch is not None and not micro_batch.weight):
            return
        step = trainer.global_step
        before: tuple[int, int | None] = (trainer.current_epoch, None)
        if scheduler is not None:
            step, before = scheduler.progress.step, (scheduler.progress.epoch, scheduler.progress.samples)
        self._before[step] = before
        loss = loss.detach().reshape(1)
        self._losses.append((step, loss.clone() if self.waits(loss) else loss))  # compiled code may write there again

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the losses, where that is cheap and the step is complete."""
        if not self._losses:
            return
        scheduler = scheduler_of(trainer)
        complete = scheduler is None or scheduler.micro_batch is None
        at_once = not self.waits(self._losses[-1][1]) or trainer.is_last_batch or len(self._losses) >= _KEPT
        if complete and (at_once or writes_step(trainer)):
            self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is left."""
        self._look(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Look at what is left: the error may follow from such a loss."""
        with suppress(RuntimeError):  # of a device that has failed
            self._look(trainer)

    @staticmethod
    def waits(loss: Tensor) -> bool:
        """Whether to look at a loss waits for a device."""
        return loss.device.type != "cpu"

    def _look(self, trainer: Trainer) -> None:
        losses, before = self._losses, self._before
        self._losses, self._before = [], {}
        if not losses:
            return
        values = torch.cat([loss for _, loss in losses]).tolist()
        for (step, _), value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                self._told = True
                stop = min((other for other in before if other > step), default=None)
                batch = _batch(trainer, *before[step], None if stop is None else before[stop][1])
                warnings.warn(_message(trainer, step, value, batch), stacklevel=2)
                return


def _batch(trainer: Trainer, epoch: int, start: int | None, stop: int | None) -> _Batch:
    """The batch of a step, from the samples before it and before the next one."""
    scheduler = scheduler_of(trainer)
    if scheduler is None or start is None:
        return _Batch(epoch)
    loader, stop = scheduler.training_loader, scheduler.progress.samples if stop is None else stop
    sampler = getattr(loader, "batch_sampler", None)
    # later passes of an epoch, and whole batches that other processes train, have other positions
    if not isinstance(sampler, GlobalBatchSampler) or sampler.cycle:
        return _Batch(epoch, start)
    if type(sampler) is not GlobalBatchSampler and sampler.cut.world_size > 1:
        return _Batch(epoch, start)
    epoch_start = sampler.clock()
    if epoch_start.epoch != epoch:
        return _Batch(epoch, start)
    indices = sampler.order(epoch)[start - epoch_start.samples : stop - epoch_start.samples]
    return _Batch(epoch, start, tuple(map(int, indices)), loader.dataset)


def _message(trainer: Trainer, step: int, value: float, batch: _Batch) -> str:
    where = f"step {step} of epoch {batch.epoch} (both count from 0, as in metrics.csv)"
    if batch.samples is not None:
        where += f", after {batch.samples:,} samples"
    process = f" of process {trainer.global_rank}" if trainer.world_size > 1 else ""
    text = f"the training loss{process} was {value} in {where}"
    advice = "the learning rate may be too high, or the loss divides by 0 or takes the logarithm of 0"
    if not batch.indices:
        return f"{text}: look at the examples of this step; if they are finite, {advice}"
    text += f". Examples of the step: {_listed(batch.indices)}"
    try:
        wrong = [index for index in batch.indices[:_READ] if not _is_finite(batch.dataset, index)]
    except Exception as error:  # of the user's data set
        return f"{text}. They could not be read again ({type(error).__name__}: {error}); if they are finite, {advice}"
    if wrong:
        return f"{text}. Values that are not finite: in {_listed(wrong)}; correct or remove them"
    return f"{text}. Their values are finite, so {advice}"


def _is_finite(dataset: Any, index: int) -> bool:
    """Whether an example holds no NaN and nothing infinite."""
    finite = []

    def look(value: Any) -> None:
        finite.append(bool(torch.as_tensor(value).isfinite().all()))

    with isolate_rng():  # transforms may draw
        apply_to_collection(dataset[index], (Tensor, np.ndarray, float), look)
    return all(finite)


def _listed(indices: Any) -> str:
    more = len(indices) - _SHOWN
    return ", ".join(map(str, indices[:_SHOWN])) + (f" and {more:,} more" if more > 0 else "")
