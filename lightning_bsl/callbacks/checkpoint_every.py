"""A callback that saves checkpoints at multiples of a number of samples, tokens, steps or epochs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bsl.callbacks.marks import Marks
from lightning_bsl.schedules.progress import Unit

_OTHERS = ("every_n_train_steps", "train_time_interval", "every_n_epochs", "save_on_train_epoch_end")


class CheckpointEvery(ModelCheckpoint):
    """Saves a checkpoint whenever the clock of a ``BatchLRScheduler`` crosses a multiple of ``n``.

    ``ModelCheckpoint(every_n_train_steps=...)`` counts optimizer steps, which take ever more examples while the batch size
    grows. Here the checkpoint is saved after the first optimizer step at which the clock reaches or passes a multiple of ``n``;
    a step that passes several multiples saves once. Nothing else saves, but ``save_on_exception``: not the end of an epoch, and
    not the end of the run, unless it falls on a multiple. A run that resumes from any of them is the same bit for bit.

    All checkpoints are kept, so that branches, averages and evaluations can start from each. ``save_top_k=1`` keeps the latest
    only, and ``save_top_k=0, save_last=True`` only ``last.ckpt``. To keep the best by a metric of the validation, put a
    ``ModelCheckpoint(monitor=...)`` beside ``ValidateEvery``.

    Args:
        n: Distance of the checkpoints, in ``unit``.
        unit: What the clock counts: ``"samples"``, ``"tokens"`` (if the DataModule has ``tokens_per_sample``), ``"step"``
            (optimizer steps), or ``"epoch"``.
        dirpath: As for ``ModelCheckpoint``.
        filename: As for ``ModelCheckpoint``. Besides logged values it may have ``{epoch}`` (the number of the current epoch,
            from 0), and the readings of the clock: ``{step}``, ``{samples}`` and ``{tokens}``.
        save_top_k: -1 to keep all, 1 to keep the latest, 0 for none but ``save_last``.
        **arguments: Further arguments of ``ModelCheckpoint``, but those that also say when to save, or which is the best.

    Raises:
        ValueError: ``n`` is not a whole number of 1 or more, or the unit is not known.
        MisconfigurationException: Another argument that says when to save, or ``monitor``. At the start of a fit: there is no
            ``BatchLRScheduler``.

    Example:
        >>> from lightning_bsl import BatchLRScheduler
        >>> callbacks = [BatchLRScheduler(batch_size=8), CheckpointEvery(10_000, save_last=True)]
    """

    def __init__(
        self,
        n: int,
        unit: Unit = "samples",
        dirpath: str | Path | None = None,
        filename: str | None = None,
        save_top_k: int = -1,
        **arguments: Any,
    ) -> None:
        self.marks = Marks(n, unit)
        for name in _OTHERS:
            if (value := arguments.pop(name, None)) is not None:
                raise MisconfigurationException(
                    f"CheckpointEvery({n}) and `{name}={value!r}` would both decide when to save: leave it out, or add a "
                    "ModelCheckpoint for it"
                )
        if arguments.get("monitor") is not None:
            raise MisconfigurationException(
                f"CheckpointEvery({n}) saves before the validation of its step, so `monitor={arguments['monitor']!r}` would "
                "compare values of earlier weights: leave it out, and add `ModelCheckpoint(monitor=...)` for the best"
            )
        if filename is None:
            filename = "{epoch}-{step}-" + ("{tokens}" if unit == "tokens" else "{samples}")
        # at each step for which `on_train_batch_end` below asks
        super().__init__(dirpath, filename, save_top_k=save_top_k, every_n_train_steps=1, **arguments)

    @property
    def state_key(self) -> str:
        """Another one for each distance, so that there may be several."""
        return f"{super().state_key}[{self.marks.n} {self.marks.unit}]"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the clock of the run."""
        self.marks.begin(trainer, type(self).__name__)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if the step crossed a multiple. Checkpoint callbacks come last, so the clock counts the step already."""
        if self.marks.crossed(trainer):
            with warnings.catch_warnings():  # that the weights are those after the step, as they should be
                warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.marks.see()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing: some versions of Lightning would write ``last.ckpt`` here."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing."""

    def format_checkpoint_name(self, metrics: dict[str, Tensor], *arguments: Any, **named: Any) -> str:
        """The name of a checkpoint, with the readings of the clock.

        Args:
            metrics: The logged values.
            *arguments: As for ``ModelCheckpoint``; they differ between versions of Lightning.
            **named: The same.
        """
        clock = self.marks.progress
        readings = {"step": clock.step, "samples": clock.samples}
        if clock.horizon.tokens_per_sample is not None:
            readings["tokens"] = clock.count("tokens")
        # logged values of the same names are those of the last row that was logged
        metrics = metrics | {name: torch.tensor(value) for name, value in readings.items()}
        return super().format_checkpoint_name(metrics, *arguments, **named)
