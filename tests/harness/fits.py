"""Fits that print nothing and leave nothing behind."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint


def quiet(**arguments: Any) -> dict[str, Any]:
    """Arguments of a Trainer that leaves no files and prints nothing, unless told."""
    silent = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    return dict.fromkeys(silent, False) | {"accelerator": "cpu", "num_sanity_val_steps": 0} | arguments


def fit(model: LightningModule, data: Any, *callbacks: Callback, ckpt_path: Any = None, **arguments: Any) -> Trainer:
    """Fit with a quiet Trainer on the CPU.

    Args:
        model: What is trained.
        data: A DataModule, loaders, or ``None`` where the model has loaders of its own.
        callbacks: Of the Trainer.
        ckpt_path: Where to resume from.
        arguments: Further arguments of the Trainer; three epochs if they say nothing of the length.
    """
    if not arguments.keys() & {"max_epochs", "max_steps", "max_time"}:
        arguments["max_epochs"] = 3
    trainer = Trainer(**quiet(callbacks=list(callbacks), **arguments))
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


M = TypeVar("M", bound=LightningModule)


def trained(model: M, data: Any, *callbacks: Callback, **arguments: Any) -> M:
    """Fit as `fit` does, and return the model."""
    fit(model, data, *callbacks, **arguments)
    return model


class KeptOnException(OnExceptionCheckpoint):
    """Saves a checkpoint when a fit fails, and keeps it when the fit is torn down."""

    def teardown(self, *_: Any, **__: Any) -> None:
        """Lightning would remove the checkpoint."""


def out_of_memory() -> torch.OutOfMemoryError:
    """The error of a GPU that is full."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
