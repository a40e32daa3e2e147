"""What can be seen of the training loaders that a user gives."""

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

Ask = Callable[[], Any]  # asks for the user's training loaders


class Epoch(NamedTuple):
    """What the plan must know of an epoch; see [`plan`][lightning_bsl.schedules.plan]."""

    num_examples: int
    limit_train_batches: float = 1.0
    drop_last: bool = False
    beside: Beside = Beside()
    epoch_length: EpochLength | None = None


class Asks(NamedTuple):
    """What the user asked of the Trainer, which changes while it fits.

    Args:
        accumulate: His ``accumulate_grad_batches``.
        every: His ``reload_dataloaders_every_n_epochs``.
    """

    accumulate: int = 1
    every: int = 0


def as_combined(given: Any) -> CombinedLoader:
    """Loaders in any collection, as Lightning combines them."""
    return copy.copy(given) if isinstance(given, CombinedLoader) else CombinedLoader(given, "max_size_cycle")


def obstacle(loader: Any) -> str | None:
    """Why a sampler of ours cannot be put into a loader; ``None`` where it can."""
    if not isinstance(loader, DataLoader):
        return f"is no DataLoader but of type {type(loader).__name__}"
    if type(loader).__iter__ is not DataLoader.__iter__ or type(loader).__len__ is not DataLoader.__len__:
        return f"is a {type(loader).__name__}, which overrides `__iter__` or `__len__`"
    if isinstance(loader.dataset, IterableDataset):
        return f"reads a stream ({type(loader.dataset).__name__}), whose examples have no index"
    batches = loader.batch_sampler
    if batches is None:
        return "has `batch_size=None`: its data set decides what a batch is"
    if type(batches) is not BatchSampler and not isinstance(batches, GlobalBatchSampler):
        return f"has a batch sampler of its own ({type(batches).__name__})"
    return None


REMEDY = (
    "give a `torch.utils.data.DataLoader` over a data set with `__len__` and `__getitem__`, with `shuffle` or a `sampler` but "
    "no `batch_sampler`, or wrap the data set in a `lightning_bsl.BatchSizeDataModule(train=...)`"
)


def scheduled_index(trainer: Trainer, module: LightningModule, given: CombinedLoader, ask: Ask, name: Any) -> int:
    """Which of several training loaders follows the schedule: the one that was named, or that follows ``batch_size``.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        given: The loaders.
        ask: Asks for them again.
        name: The key or the index of the one that was named.

    Raises:
        MisconfigurationException: There is none, or it is not known which.
    """
    loaders = given.flattened
    if not loaders:
        raise MisconfigurationException(f"there is no training loader: {REMEDY}")
    if name is not None:
        if isinstance(name, int) and isinstance(given.iterables, dict) and 0 <= name < len(loaders):
            return name
        try:
            (index,) = (i for i, loader in enumerate(loaders) if loader is given.iterables[name])
        except (LookupError, TypeError, ValueError):
            names = list(given.iterables) if isinstance(given.iterables, dict) else list(range(len(loaders)))
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
            f"there are {len(loaders)} training loaders, and {len(followers)} of them follow `batch_size`: write which one "
            "follows the schedule, its key or its index, as `BatchLRScheduler(..., loader=...)`"
        )
    return followers[0]


def size_of(loader: Any) -> int | None:
    """A loader's batch size, or its batch sampler's; ``None`` where neither has one."""
    size = getattr(loader, "batch_size", None)
    return getattr(getattr(loader, "batch_sampler", None), "batch_size", None) if size is None else size


def limit_of(trainer: Trainer) -> float:
    """The bound on an epoch's batches: an ``int`` number, or a fraction."""
    limit = trainer.overfit_batches or trainer.limit_train_batches  # type: ignore[attr-defined]
    return 1.0 if limit is None else cast(float, limit)


def batch_counts(trainer: Trainer) -> Callable[[int], int]:
    """How many examples each batch of a fit without BatchLRScheduler has, on this process: asked of the loader.

    Args:
        trainer: The Trainer, from ``on_train_start`` on.

    Returns:
        From a batch's index in its epoch to its examples.

    Raises:
        MisconfigurationException: Nobody knows.
    """
    loaders = as_combined(trainer.train_dataloader).flattened
    batches = getattr(loaders[0], "batch_sampler", None) if len(loaders) == 1 else None
    if isinstance(batches, Sequence):
        return lambda batch_idx: len(batches[batch_idx % len(batches)])
    reason = obstacle(loaders[0]) if len(loaders) == 1 else f"is one of {len(loaders)}"
    if reason is not None:
        raise MisconfigurationException(
            f"nobody knows how many examples a batch has: the training loader {reason}. Use BatchLRScheduler beside this "
            "measurement, or a `torch.utils.data.DataLoader` over a data set with `__len__` and `__getitem__`, with "
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
