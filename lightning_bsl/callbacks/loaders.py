"""What can be seen of a training loader that somebody else makes, and how it is told its batch size."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, NamedTuple, cast

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import IterableDataset

from lightning_bsl.data.datamodule import data_parallel


class Loader(NamedTuple):
    """What can be seen of somebody's training loader: sizes of one process, ``None`` where they cannot."""

    batch_size: int | None
    examples: int | None
    drop_last: bool

    def batches(self) -> int:
        """Batches of one pass, 0 where that is not known."""
        if self.batch_size is None or self.examples is None:
            return 0
        return self.examples // self.batch_size if self.drop_last else -(-self.examples // self.batch_size)

    def taken(self, batches: int) -> int | None:
        """Examples in the first ``batches`` batches of an epoch, in which the loader starts again if another one is longer."""
        if self.batch_size is None or self.examples is None or not self.batches():
            return None
        once = self.batches() * self.batch_size if self.drop_last else self.examples
        passes, rest = divmod(batches, self.batches())
        return passes * once + min(rest * self.batch_size, once)


def loaders_of(iterables: Any) -> list[Loader]:
    """The loaders in whatever ``train_dataloader`` returned."""
    loaders = []
    for loader in CombinedLoader(iterables).flattened if not isinstance(iterables, CombinedLoader) else iterables.flattened:
        batch_size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
        drop_last = getattr(loader, "drop_last", False)
        if batch_size is None and (batches := getattr(loader, "batch_sampler", None)) is not None:
            batch_size, sampler = getattr(batches, "batch_size", None), getattr(batches, "sampler", None)
            drop_last = getattr(batches, "drop_last", False)
        iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)
        examples = None if iterable or not hasattr(sampler, "__len__") else len(cast(Sized, sampler))
        loaders.append(Loader(batch_size, examples, bool(drop_last)))
    return loaders


def local_size(trainer: Trainer, batch_size: int) -> int:
    """``batch_size`` for one process and one accumulated batch."""
    _, processes = data_parallel(trainer)
    parts = processes * trainer.accumulate_grad_batches
    if batch_size % parts:
        raise MisconfigurationException(
            f"the batch size {batch_size} cannot be split evenly over {processes} processes x "
            f"{trainer.accumulate_grad_batches} accumulated batches: write batch sizes that are multiples of {parts}, or use a "
            "`BatchSizeDataModule`"
        )
    return batch_size // parts


def limit_of(trainer: Trainer) -> float | None:
    """The bound on an epoch's batches: an ``int`` number, a fraction, or ``None``."""
    return trainer.overfit_batches or trainer.limit_train_batches  # type: ignore[attr-defined]


def epoch_length(trainer: Trainer, scheduled: Loader, others: list[Loader], batch_size: int) -> tuple[int, int]:
    """Optimizer steps and examples, over all processes, of an epoch.

    Args:
        trainer: The Trainer.
        scheduled: The loader whose batch size follows the schedule.
        others: Those beside it, if any; the longest of all decides (Lightning's "max_size_cycle").
        batch_size: The scheduled batch size, of a whole optimizer step.
    """
    loader, limit = scheduled._replace(batch_size=local_size(trainer, batch_size)), limit_of(trainer)
    batches = max(each.batches() for each in (loader, *others))
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    return -(-batches // trainer.accumulate_grad_batches), (loader.taken(batches) or 0) * data_parallel(trainer)[1]
