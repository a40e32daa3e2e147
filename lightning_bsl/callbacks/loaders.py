"""Inspection of the user's training loaders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_bsl.data.sampler import Cut, GlobalBatchSampler
from lightning_bsl.schedules import Progress
from lightning_bsl.schedules.plan import Beside, EpochLength

Ask = Callable[[], Any]  # returns the user's training loaders


class Epoch(NamedTuple):
    """The facts about an epoch that a plan needs; see [`plan`][lightning_bsl.schedules.plan]."""

    num_examples: int
    limit_train_batches: float = 1.0
    drop_last: bool = False
    beside: Beside = Beside()
    epoch_length: EpochLength | None = None


class Asks(NamedTuple):
    """The user's settings of the Trainer, which a fit changes for a while.

    Args:
        accumulate: The user's ``accumulate_grad_batches``.
        every: The user's ``reload_dataloaders_every_n_epochs``.
    """

    accumulate: int = 1
    every: int = 0


def as_combined(loaders: Any) -> CombinedLoader:
    """Combine loaders in any collection, as Lightning does."""
    return copy.copy(loaders) if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")


def obstacle(loader: Any) -> str | None:
    """The reason why a loader cannot get a sampler that follows the plan; ``None`` if it can."""
    if not isinstance(loader, DataLoader):
        return f"is not a DataLoader but a {type(loader).__name__}"
    if type(loader).__iter__ is not DataLoader.__iter__ or type(loader).__len__ is not DataLoader.__len__:
        return f"is a {type(loader).__name__}, which overrides `__iter__` or `__len__`"
    if isinstance(loader.dataset, IterableDataset):
        return f"reads a stream ({type(loader.dataset).__name__}), whose examples have no index"
    batches = loader.batch_sampler
    if batches is None:
        return "has `batch_size=None`: its data set returns whole batches"
    if type(batches) is not BatchSampler and not isinstance(batches, GlobalBatchSampler):
        return f"has a batch sampler of its own ({type(batches).__name__})"
    return None


def draws_batches(loader: Any) -> bool:
    """Whether a loader takes lists of indices from a batch sampler, so that a copy can take the same lists from another."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


REMEDY = (
    "give a `torch.utils.data.DataLoader` over a data set with `__len__` and `__getitem__`, with `shuffle` or a `sampler` but "
    "no `batch_sampler`, or wrap the data set in a `lightning_bsl.BatchSizeDataModule(train=...)`. If its batches must stay as "
    "they are, write `BatchLRScheduler(..., whole_batches=True)`: a step then takes as many of them as the batch size says"
)


def scheduled_index(trainer: Trainer, module: LightningModule, combined: CombinedLoader, ask: Ask, name: Any) -> int:
    """The index of the training loader that follows the schedule: the named one, or the one that follows ``batch_size``.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        combined: The loaders.
        ask: Makes the loaders again.
        name: Key or index of the loader; ``None`` to find the one that follows ``batch_size``.

    Raises:
        MisconfigurationException: There is no such loader, or it is not clear which one it is.
    """
    loaders = combined.flattened
    if not loaders:
        raise MisconfigurationException(f"there is no training loader: {REMEDY}")
    if name is not None:
        if isinstance(name, int) and isinstance(combined.iterables, dict) and 0 <= name < len(loaders):
            return name
        try:
            (index,) = (i for i, loader in enumerate(loaders) if loader is combined.iterables[name])
        except (LookupError, TypeError, ValueError):
            names = list(combined.iterables) if isinstance(combined.iterables, dict) else list(range(len(loaders)))
            raise MisconfigurationException(
                f"`loader={name!r}` is none of the training loaders; write one of {names}"
            ) from None
        return index
    if len(loaders) == 1:
        return 0
    followers = []
    if lightning_hasattr(module, "batch_size") and isinstance(size := lightning_getattr(module, "batch_size"), int):
        try:
            lightning_setattr(module, "batch_size", size + 1)
            with isolate_rng():
                others = as_combined(ask()).flattened
        finally:
            lightning_setattr(module, "batch_size", size)
        followers = [i for i, pair in enumerate(zip(loaders, others)) if len({size_of(loader) for loader in pair}) > 1]
    if len(followers) != 1:
        raise MisconfigurationException(
            f"there are {len(loaders)} training loaders, and {len(followers)} of them follow `batch_size`: write the key or "
            "the index of the one that follows the schedule, as `BatchLRScheduler(..., loader=...)`"
        )
    return followers[0]


def size_of(loader: Any) -> int | None:
    """The batch size of a loader or its batch sampler; ``None`` if neither has one."""
    size = getattr(loader, "batch_size", None)
    return getattr(getattr(loader, "batch_sampler", None), "batch_size", None) if size is None else size


def limit_of(trainer: Trainer) -> float:
    """The limit on the batches of an epoch: an ``int`` number, or a fraction."""
    limit = trainer.overfit_batches or trainer.limit_train_batches  # type: ignore[attr-defined]
    return 1.0 if limit is None else cast(float, limit)


def batch_counts(trainer: Trainer) -> Callable[[int], int]:
    """Find out the number of examples of each batch on this process, in a fit without BatchLRScheduler.

    Args:
        trainer: The Trainer, from ``on_train_start`` on.

    Returns:
        A function from a batch's index in its epoch to its number of examples.

    Raises:
        MisconfigurationException: The number does not follow from the loader.
    """
    loaders = as_combined(trainer.train_dataloader).flattened
    batches = getattr(loaders[0], "batch_sampler", None) if len(loaders) == 1 else None
    if isinstance(batches, Sequence):
        return lambda batch_idx: len(batches[batch_idx % len(batches)])
    reason = obstacle(loaders[0]) if len(loaders) == 1 else f"is one of {len(loaders)}"
    if reason is not None:
        raise MisconfigurationException(
            f"the number of examples of a batch is not known: the training loader {reason}. Add BatchLRScheduler to the "
            "callbacks, or give a `torch.utils.data.DataLoader` over a data set with `__len__` and `__getitem__`, with "
            "`batch_size` and without a `batch_sampler`; or leave the measurement out"
        )
    assert batches is not None
    if isinstance(batches, GlobalBatchSampler):
        size, number, cut = batches.schedule.batch_size_at(Progress()), batches.order.length(0), batches.cut
    else:
        size, number, cut = batches.batch_size, len(batches.sampler), Cut()

    def count(batch_idx: int) -> int:
        part = cut(max(0, min(size, number - batch_idx * size)) or size, size)[0]
        return int(part.stop - part.start)

    return count
