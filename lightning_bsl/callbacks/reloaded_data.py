"""A loader that cannot be re-made, so its batch size changes only between epochs."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_setattr
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset

from lightning_bsl.callbacks.clock import RunClock
from lightning_bsl.callbacks.loaders import REMEDY, Ask, Asks, Epoch, as_combined, limit_of, size_of
from lightning_bsl.callbacks.loop import end_workers, with_distributed_sampler
from lightning_bsl.callbacks.micro_batches import Parts, StepSplitter
from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.data.lengths import Lengths
from lightning_bsl.data.sampler import Cut
from lightning_bsl.schedules import JointSchedule, Plan, Progress
from lightning_bsl.schedules.plan import Measure, Stretch


class ReloadedData:
    """A loader that cannot be re-made: it reads a stream, or has a batch sampler of its own.

    It must follow the attribute ``batch_size``, which is set between epochs.

    Args:
        trainer: The Trainer.
        module: The LightningModule; it or the DataModule has the attribute or hyperparameter ``batch_size``.
        ask: Makes the user's loaders.
        index: Index of the loader that follows ``batch_size``.
        clock: The clock of the run.
        schedule: Batch size and learning rate.
        asks: The user's settings of the Trainer.
        undo: Restores ``batch_size`` when it is closed.

    Raises:
        MisconfigurationException: The loader does not follow ``batch_size``.
    """

    grows_inside = exact = False
    lengths: Lengths | None = None
    measure: Measure | None = None
    whole_batches: int | None = None

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        ask: Ask,
        index: int,
        clock: RunClock,
        schedule: JointSchedule,
        asks: Asks,
        undo: ExitStack,
    ) -> None:
        self.index, self.clock, self.schedule, self.asked_at = index, clock, schedule, clock.epoch_start.epoch
        self._trainer, self._module, self._ask = trainer, module, ask
        self.cut = Cut(accumulate=asks.accumulate)  # divides the examples of one process
        self._consumed = 0  # examples of the current step
        undo.callback(lightning_setattr, module, "batch_size", lightning_getattr(module, "batch_size"))
        self.loaders = self._make(ask)

    def epoch(self, trainer: Trainer) -> Epoch | None:
        """The length of an epoch, if it follows from the loader."""
        loader = self.loaders.flattened[self.index]
        sampler = getattr(loader.batch_sampler, "sampler", None)
        if isinstance(loader.dataset, IterableDataset) or not hasattr(sampler, "__len__"):
            return None
        number, drops, limit = (
            len(cast(Sized, sampler)),
            bool(getattr(loader.batch_sampler, "drop_last", False)),
            limit_of(trainer),
        )
        processes = data_parallel(trainer)[1]

        def length(batch_size: int) -> tuple[int, int]:
            size = self._local(batch_size)
            batches = number // size if drops else -(-number // size)
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            return -(-batches // self.cut.accumulate), min(batches * size, number) * processes

        seen = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
        if length(self.schedule.batch_size_at(self.clock.epoch_start))[0] != -(-seen // self.cut.accumulate):
            return None  # the batch sampler does more than divide its sampler's examples into batches
        return Epoch(number * processes, epoch_length=length)

    def sizes_at(self) -> Progress:
        """The epoch's start."""
        return self.clock.epoch_start

    def step_examples(self, batch_size: int) -> int:
        """The examples of this process alone: Lightning averages over the processes."""
        return self._local(batch_size) * self.cut.accumulate

    def parts(self, examples: int, batch_size: int) -> Parts:
        """Micro-batches follow from the number of examples."""
        return Parts()

    def most_batches(self, batch_size: int) -> int:
        """The number of accumulated batches."""
        return len(self.cut(batch_size, batch_size))

    def batches(self, stretch: Stretch, start: int) -> int:
        """The number of micro-batches."""
        return self.cut.batches(stretch)

    def sizes(self, stretch: Stretch, start: int) -> Iterator[tuple[int, list[int]]]:
        """The sizes of the micro-batches."""
        return self.cut.sizes(stretch)

    def count(self) -> int | None:
        """The number of examples that was counted when the batch was collated."""
        number = self.loaders.flattened[self.index].counts.popleft()
        self._consumed += number
        # several processes must use the same weights for their gradients
        return number if data_parallel(self._trainer)[1] == 1 else None

    def consumed(self, splitter: StepSplitter) -> int:
        """The counted examples, times the number of processes."""
        if not splitter.ends(self._trainer.is_last_batch):
            return 0
        consumed, self._consumed = self._consumed, 0
        return consumed * data_parallel(self._trainer)[1]

    def splits(self, plan: Plan) -> bool:
        """Whether a step of the plan has several micro-batches."""
        return any(len(self.cut(stage.batch_size, stage.batch_size)) > 1 for stage in plan.stages)

    def is_stale(self) -> bool:
        """Whether the scheduled batch size has changed since it was set."""
        return self._set != self.schedule.batch_size_at(self.clock.loader_start)

    def batches_done(self) -> int | None:
        """Return ``None``: keep Lightning's own count."""
        return None

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """Make the user's loaders again, for the batch size of the epoch that begins."""
        self.close()
        return self._make(ask)

    def _make(self, ask: Ask) -> CombinedLoader:
        self.asked_at, self._consumed = self.clock.loader_start.epoch, 0
        self._set = self.schedule.batch_size_at(self.clock.loader_start)
        size = self._local(self._set)
        lightning_setattr(self._module, "batch_size", size)
        combined = as_combined(ask())
        flat = [*combined.flattened]
        if size_of(flat[self.index]) != size:
            raise MisconfigurationException(
                f"BatchLRScheduler set `batch_size={size}` but the training loader has "
                f"batch_size={size_of(flat[self.index])}: let `train_dataloader` make a new loader, with `self.batch_size` or "
                "`self.hparams.batch_size`"
            )
        if not isinstance(flat[self.index].dataset, IterableDataset):
            flat[self.index] = with_distributed_sampler(self._trainer, flat[self.index])
        flat[self.index] = CountingLoader(flat[self.index])
        combined.flattened = flat
        self.loaders = combined
        return combined

    def drawn(self) -> object:
        """Return ``None``: the order is not known."""

    def check(self, plan: Plan | None) -> None:
        """Check that the loader follows ``batch_size``: make one for another size of the plan, and throw it away."""
        size = self.schedule.batch_size_at(self.clock.epoch_start)
        other = next((stage.batch_size for stage in plan.stages if stage.batch_size != size), None) if plan else None
        if other is None:
            return
        before, local = lightning_getattr(self._module, "batch_size"), self._local(other)
        lightning_setattr(self._module, "batch_size", local)
        try:
            with isolate_rng():
                actual = size_of(as_combined(self._ask()).flattened[self.index])
        finally:
            lightning_setattr(self._module, "batch_size", before)
        if actual != local:
            raise MisconfigurationException(
                f"BatchLRScheduler will set `batch_size={local}`, but then the training loader still has batch_size={actual}: "
                "let `train_dataloader` make a new loader, with `self.batch_size` or `self.hparams.batch_size`"
            )

    @property
    def handed_out(self) -> int:
        """The trained examples of the epoch."""
        return self.clock.behind

    def follow(self, schedule: JointSchedule) -> None:
        """Refuse: the batch size changes only between epochs."""
        raise MisconfigurationException(f"growth inside an epoch needs a training loader that can be re-made: {REMEDY}")

    def positions(self, trainer: Trainer) -> None:
        """Return ``None``: there is no stream, or it has no position."""

    def close(self) -> None:
        """End the workers."""
        for loader in self.loaders.flattened:
            end_workers(loader)

    def _local(self, batch_size: int) -> int:
        """The part of ``batch_size`` for one process and one accumulated batch."""
        processes = data_parallel(self._trainer)[1]
        parts = processes * self.cut.accumulate
        if batch_size % parts:
            raise MisconfigurationException(
                f"the batch size {batch_size} cannot be split evenly over {processes} processes x {self.cut.accumulate} "
                f"accumulated batches: write batch sizes that are multiples of {parts}, or use a `BatchSizeDataModule`"
            )
        return batch_size // parts


class _Counted(NamedTuple):
    batch: Any
    examples: int


class _CountingCollate:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: Any) -> _Counted:
        return _Counted(self.collate(examples), len(examples))


class CountingLoader:
    """A loader that records the number of examples of each of its batches.

    Args:
        loader: Any DataLoader that collates batches; it stays as it is.

    Attributes:
        original: The loader.
        counts: Numbers of examples of the fetched batches, in their order; ``ReloadedData.count`` removes them.
    """

    _OWN = ("original", "counts", "_counted")

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.original = loader
        self.counts: deque[int] = deque()
        self._counted = copy.copy(loader)
        vars(self._counted).update(collate_fn=_CountingCollate(loader.collate_fn), _iterator=None)

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        self.counts.clear()
        for counted in self._counted:
            self.counts.append(counted.examples)
            yield counted.batch

    def __len__(self) -> int:
        """The length of the loader."""
        return len(self._counted)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the loader."""
        if name in self._OWN:  # not set yet while a copy is made
            raise AttributeError(name)
        return getattr(self._counted, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set attributes on the counting copy: Lightning sets a function that seeds workers, and removes iterators."""
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._counted, name, value)
