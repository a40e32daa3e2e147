"""A loader that cannot be re-made, and is told its batch size between epochs."""

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
from lightning_bsl.schedules.plan import Measure, Run


class ReloadedData:
    """A loader that cannot be re-made but follows ``batch_size``, which is set between epochs: a stream, or one with a batch
    sampler of its own.

    Args:
        trainer: The Trainer.
        module: The LightningModule; it or the DataModule has the attribute or hyperparameter ``batch_size``.
        ask: Asks for the user's loaders.
        index: Which of them follows ``batch_size``.
        clock: The run's clock.
        schedule: Batch size and learning rate.
        asks: What the user asked of the Trainer.
        undo: Puts ``batch_size`` back when it is closed.

    Raises:
        MisconfigurationException: The loader does not follow ``batch_size``.
    """

    grows_inside = exact = False
    lengths: Lengths | None = None
    measure: Measure | None = None

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
        self.cut = Cut(accumulate=asks.accumulate)  # of what one process gets
        self._consumed = 0  # of the step under way
        undo.callback(lightning_setattr, module, "batch_size", lightning_getattr(module, "batch_size"))
        self.loaders = self._make(ask)

    def epoch(self, trainer: Trainer) -> Epoch | None:
        """The length of an epoch, if the loader has one."""
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
            return None  # the batch sampler does something else than to cut its sampler's examples
        return Epoch(number * processes, epoch_length=length)

    def sizes_at(self) -> Progress:
        """The epoch's start."""
        return self.clock.epoch_start

    def step_examples(self, batch_size: int) -> int:
        """Of this process alone: Lightning averages over the others."""
        return self._local(batch_size) * self.cut.accumulate

    def parts(self, examples: int, batch_size: int) -> Parts:
        """By their number."""
        return Parts()

    def most_batches(self, batch_size: int) -> int:
        """Their number."""
        return len(self.cut(batch_size, batch_size))

    def batches(self, run: Run, start: int) -> int:
        """As cut."""
        return self.cut.batches(run)

    def sizes(self, run: Run, start: int) -> Iterator[tuple[int, list[int]]]:
        """As cut."""
        return self.cut.sizes(run)

    def count(self) -> int | None:
        """What was counted when the batch was put together."""
        number = self.loaders.flattened[self.index].counts.popleft()
        self._consumed += number
        # several processes must weigh their gradients alike
        return number if data_parallel(self._trainer)[1] == 1 else None

    def consumed(self, splitter: StepSplitter) -> int:
        """What was counted, on all processes."""
        if not splitter.ends(self._trainer.is_last_batch):
            return 0
        consumed, self._consumed = self._consumed, 0
        return consumed * data_parallel(self._trainer)[1]

    def splits(self, plan: Plan) -> bool:
        """Whether any step of a plan has several micro-batches."""
        return any(len(self.cut(stage.batch_size, stage.batch_size)) > 1 for stage in plan.stages)

    def is_stale(self) -> bool:
        """Whether the batch size is another than was set."""
        return self._set != self.schedule.batch_size_at(self.clock.loader_start)

    def batches_done(self) -> int | None:
        """Lightning's own count stands."""
        return None

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """The user's loaders once more, for the batch size of the epoch that begins."""
        self.close()
        return self._make(ask)

    def _make(self, ask: Ask) -> CombinedLoader:
        self.asked_at, self._consumed = self.clock.loader_start.epoch, 0
        self._set = self.schedule.batch_size_at(self.clock.loader_start)
        size = self._local(self._set)
        lightning_setattr(self._module, "batch_size", size)
        given = as_combined(ask())
        flat = [*given.flattened]
        if size_of(flat[self.index]) != size:
            raise MisconfigurationException(
                f"BatchLRScheduler set `batch_size={size}` but the training loader has "
                f"batch_size={size_of(flat[self.index])}: make it anew in `train_dataloader`, from `self.batch_size` or "
                "`self.hparams.batch_size`"
            )
        if not isinstance(flat[self.index].dataset, IterableDataset):
            flat[self.index] = with_distributed_sampler(self._trainer, flat[self.index])
        flat[self.index] = CountingLoader(flat[self.index])
        given.flattened = flat
        self.loaders = given
        return given

    def drawn(self) -> object:
        """Nothing is known of it."""

    def check(self, plan: Plan | None) -> None:
        """Make a loader of another size and throw it away: does it follow ``batch_size``, or does it only look so?"""
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
                "make it anew in `train_dataloader`, from `self.batch_size` or `self.hparams.batch_size`"
            )

    @property
    def handed_out(self) -> int:
        """What is trained."""
        return self.clock.behind

    def follow(self, schedule: JointSchedule) -> None:
        """Refuse: the batch size changes between epochs alone."""
        raise MisconfigurationException(f"growth inside an epoch needs a training loader that can be re-made: {REMEDY}")

    def close(self) -> None:
        """End the workers."""
        for loader in self.loaders.flattened:
            end_workers(loader)

    def _local(self, batch_size: int) -> int:
        """``batch_size`` for one process and one accumulated batch."""
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
    """A loader that notes how many examples each of its batches was put together from.

    Args:
        loader: Any DataLoader that puts batches together; it stays as it is.

    Attributes:
        original: The loader.
        counts: Of the batches that were fetched, in their order, until somebody takes them out.
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
        """As of the loader."""
        return len(self._counted)

    def __getattr__(self, name: str) -> Any:
        """Whatever the loader has."""
        if name in self._OWN:  # while a copy is made
            raise AttributeError(name)
        return getattr(self._counted, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning gives loaders a function that seeds their workers, and takes their iterators away."""
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._counted, name, value)
