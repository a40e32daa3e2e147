"""An exponential average of the weights that follows the batch size."""

from __future__ import annotations

from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_bsl.callbacks.batch_lr import BatchLRScheduler, scheduler_of
from lightning_bsl.schedules import HalfLife

# Lightning 2.6.0 brought it
_Average: Any = getattr(lightning_callbacks, "EMAWeightAveraging", Callback)


class BatchEMA(_Average):
    """Lightning's ``EMAWeightAveraging`` with ``decay ** (B / base_batch_size)`` (arXiv 2307.13813).

    So the half-life of the average stays, counted in samples, while the batch size B grows. B is the batch size of the step
    just taken, as the schedule says it; a short last step of an epoch counts as a whole one, as it does for the learning rate.
    The rest is as in Lightning: validation and the end of the fit use the average, and the first update copies the weights. It
    needs Lightning 2.6.0 or later, and a ``BatchLRScheduler`` among the callbacks.

    Args:
        base_batch_size: The batch size for which ``decay`` was chosen, in examples (in tokens, where batch sizes count tokens).
        decay: Decay of the average for each update, in [0, 1).
        device: As for ``EMAWeightAveraging``.
        use_buffers: As for ``EMAWeightAveraging``.
        update_every_n_steps: As for ``EMAWeightAveraging``. With n steps, ``decay`` is for an update of n steps.
        update_starting_at_step: As for ``EMAWeightAveraging``.
        update_starting_at_epoch: As for ``EMAWeightAveraging``.

    Raises:
        ValueError: ``base_batch_size`` is not above 0 and finite, or ``decay`` is not in [0, 1).
        MisconfigurationException: Lightning is older than 2.6.0. At the start of a fit: there is no ``BatchLRScheduler``.

    Example:
        >>> average = BatchEMA(base_batch_size=8, decay=0.99)  # among the callbacks, beside a BatchLRScheduler
    """

    def __init__(
        self,
        base_batch_size: float,
        decay: float = 0.999,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        if _Average is Callback:
            raise MisconfigurationException(
                "BatchEMA is Lightning's EMAWeightAveraging, which came with Lightning 2.6.0: install `lightning>=2.6`"
            )
        if isinstance(decay, bool) or not 0 <= decay < 1:
            raise ValueError(f"`decay={decay}` must be 0 or more and below 1, as the decay of an average of weights")
        self.rule, self.decay = HalfLife(base_batch_size), decay
        self._batch_size = 1
        # not through `EMAWeightAveraging.__init__`, which makes an average with a fixed decay
        super(_Average, self).__init__(device=device, use_buffers=use_buffers, avg_fn=self._average)
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a scheduler, and make the average."""
        if stage == "fit":
            self._scheduler(trainer)
        super().setup(trainer, pl_module, stage)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the batch size: after the step the scheduler may already have that of the next one."""
        self._batch_size = self._scheduler(trainer).batch_size_of_step

    def state_dict(self) -> dict[str, Any]:
        """The state of ``EMAWeightAveraging``, and the batch size of the last step."""
        return {**super().state_dict(), "batch_size": self._batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self._batch_size = state_dict["batch_size"]
        super().load_state_dict(state_dict)

    def _average(self, average: Tensor, weights: Tensor, updates: Tensor | int) -> Tensor:
        decay = self.rule(self.decay, self._batch_size)
        averaged: Tensor = get_ema_avg_fn(decay)(average, weights, updates)
        return averaged

    def _scheduler(self, trainer: Trainer) -> BatchLRScheduler:
        if (scheduler := scheduler_of(trainer)) is not None:
            return scheduler
        raise MisconfigurationException(
            "BatchEMA follows the batch size of a BatchLRScheduler, but there is none among the callbacks: add one, or use "
            "Lightning's EMAWeightAveraging"
        )
