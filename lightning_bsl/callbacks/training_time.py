"""A callback that logs the training time."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_bsl.callbacks.loop import writes_step


class TrainingTime(Callback):
    """Logs ``seconds``: the training time of the run so far, including validation and measurements.

    It is logged every ``log_every_n_steps`` steps, after a validation, and at the end of an epoch. It is saved in checkpoints:
    a resumed run goes on from the time at which its checkpoint was saved.

    Example:
        >>> trainer = Trainer(max_epochs=9, callbacks=[TrainingTime()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._before = 0.0  # time of earlier fits of this run
        self._started: float | None = None
        self._fitting = True  # False in validation and test, where the time in a checkpoint does not count

    @property
    def seconds(self) -> float:
        """The training time so far, in seconds."""
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin at 0, unless the run goes on."""
        self._fitting = stage == "fit"
        if self._fitting and trainer.global_step == 0:
            self._before = 0.0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the time."""
        if self._fitting:
            self._before = state_dict["seconds"]

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        return {"seconds": self.seconds}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the time at the steps that the Trainer's loggers write."""
        if writes_step(trainer):
            self._log(pl_module, on_step=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the time together with the validation metrics."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._log(pl_module, on_step=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the time together with the epoch's metrics."""
        self._log(pl_module, on_step=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._before, self._started = self.seconds, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the clock: after an exception Lightning does not call ``on_train_end``."""
        self.on_train_end(trainer, pl_module)

    def _log(self, pl_module: LightningModule, on_step: bool) -> None:
        # the maximum over the processes, but only at the end of an epoch: the processes must not wait for it at each step
        # a plain number, which Lightning puts on the module's device: NCCL cannot reduce a CPU tensor
        pl_module.log(
            "seconds", self.seconds, on_step=on_step, on_epoch=not on_step, reduce_fx="max", batch_size=1, sync_dist=not on_step
        )
