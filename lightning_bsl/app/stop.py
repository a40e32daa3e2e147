"""A run that is told to stop saves a checkpoint first."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_bsl.callbacks import BatchLRScheduler
from lightning_bsl.report import console


class CheckpointWhenStopped(Checkpoint):
    """Saves a checkpoint after SIGTERM, as schedulers of clusters send it, and after Ctrl-C, and ends the run.

    The run ends with the step under way, after the callbacks have seen it. If that is the last of an epoch, it ends with the
    first one of the next epoch. Several processes end after the same step. A second Ctrl-C, or one after SIGTERM, ends the run
    at once.

    Args:
        scheduler: The scheduler of the run.
        path: The checkpoint.
    """

    def __init__(self, scheduler: BatchLRScheduler, path: Path) -> None:
        self.scheduler, self.path = scheduler, path
        self._signal = 0  # the one that came
        self._saved = False
        self._undo = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals from Lightning, which ends at any batch and saves nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._undo.callback(signal.signal, number, signal.signal(number, self._note))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, where a signal came and the step is whole."""
        # from the last step of an epoch Lightning goes on without the validation at its end
        if self.scheduler.micro_batch is not None or self._saved or trainer.is_last_batch:
            return
        stops = bool(self._signal)
        if trainer.world_size > 1:
            stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
        if not stops:
            return
        trainer.save_checkpoint(self.path)
        self._saved = True
        if trainer.is_global_zero:
            console().print(f"{self.path}: saved; the same command goes on from here", soft_wrap=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop, now that Lightning has logged the step."""
        self._stop_if_saved()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation, which the resumed run makes."""
        self._stop_if_saved()

    def _stop_if_saved(self) -> None:
        if self._saved:
            raise KeyboardInterrupt if self._signal == signal.SIGINT else SystemExit(128 + signal.SIGTERM)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals their meaning back."""
        self._undo.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals their meaning back."""
        self._undo.close()

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._signal:
            raise KeyboardInterrupt
        self._signal = number
        if number == signal.SIGINT:
            console().print("\nCtrl-C: stopping after this step; press it again to stop at once and save nothing")
