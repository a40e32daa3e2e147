"""The only file that reads what Lightning keeps to itself: attributes of its loops, and the loops' part of a checkpoint."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def loads_own_data(trainer: Trainer) -> bool:
    """Whether the training loader comes from a LightningModule or DataModule, not from an argument of ``fit``."""
    return bool(trainer.fit_loop._data_source.is_module())


def injects_sampler(trainer: Trainer) -> bool:
    """Whether Lightning puts a sampler of its own into the loaders of a run of several processes."""
    return trainer.world_size > 1 and bool(trainer._accelerator_connector.use_distributed_sampler)


def ended_epoch(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved in ``on_train_batch_end`` of an epoch's last batch.

    Lightning resumes it with the next epoch, without the ``on_train_epoch_end`` that is still due.
    """
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return bool(batches["is_last_batch"] and batches["total"]["completed"] < batches["total"]["processed"])


def set_batches_done(checkpoint: dict[str, Any], batches: int) -> None:
    """Have Lightning resume an epoch after ``batches`` of its batches.

    The checkpoint counts the micro-batches of the run that saved it, and those of a step that was not finished.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    # in `on_train_batch_end` the batch just done is not counted as completed yet; Lightning makes up for it on resume
    in_batch_end = total["ready"] == total["processed"] == total["completed"] + 1
    shift = batches - in_batch_end - current["completed"]
    for name in current:
        current[name] += shift
