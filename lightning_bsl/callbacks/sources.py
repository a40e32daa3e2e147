"""Where the next step's examples come from, and what Lightning's training loaders are told of the plan."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_bsl.callbacks.clock import RunClock
from lightning_bsl.callbacks.loop import end_workers, with_distributed_sampler
from lightning_bsl.callbacks.micro_batches import StepSplitter
from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.data.orders import SamplerOrder, order_of
from lightning_bsl.data.sampler import Cut, GlobalBatchSampler, remade
from lightning_bsl.schedules import JointSchedule, Plan, Progress
from lightning_bsl.schedules.functions import Function
from lightning_bsl.schedules.plan import Beside, EpochLength

Ask = Callable[[], Any]


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


class DataSource(Protocol):
    """The training loaders of a fit, and what is known of them.

    Attributes:
        loaders: What Lightning trains on.
        index: Which of them follows the schedule.
        cut: How its steps are cut.
        asked_at: The epoch in which the user's loaders were asked for last.
        grows_inside: Whether the batch size can change inside an epoch.
    """

    loaders: CombinedLoader
    index: int
    cut: Cut
    asked_at: int
    grows_inside: bool

    def epoch(self, trainer: Trainer) -> Epoch | None:
        """What the plan must know of an epoch; ``None`` where its length is not known."""
        ...

    def sizes_at(self) -> Progress:
        """The progress at which the next step's batch size is asked."""
        ...

    def step_examples(self, batch_size: int) -> int:
        """Examples of the step that begins now, over all processes."""
        ...

    def count(self) -> int | None:
        """Examples of the batch under way, where it is not cut by us."""
        ...

    def consumed(self, splitter: StepSplitter) -> int:
        """Examples of the step that is complete, over all processes."""
        ...

    def shape(self) -> object:
        """What Lightning has to be told when it changes from one epoch to the next."""
        ...

    def batches_done(self) -> int | None:
        """Batches of the epoch that are trained; ``None`` where Lightning's own count is to stand."""
        ...

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """The loaders for another epoch.

        Args:
            ask: Asks for the user's loaders.
            due: Whether the user wants to be asked for them again.
        """
        ...

    @property
    def handed_out(self) -> int:
        """Examples of the epoch before the first one that was not handed out to a worker yet."""
        ...

    def follow(self, schedule: JointSchedule) -> None:
        """Follow another schedule from the first example on that was not handed out yet."""
        ...

    def drawn(self) -> object:
        """The order of the epoch at hand, where a sampler of the user draws it."""
        ...

    def check(self, plan: Plan | None) -> None:
        """Refuse loaders that will not follow the plan."""
        ...

    def close(self) -> None:
        """End what the loaders hold: their workers."""
        ...


# --- which loader, and whether it can be re-made


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


_REMEDY = (
    "give a `torch.utils.data.DataLoader` over a data set with `__len__` and `__getitem__`, with `shuffle` or a `sampler` but no "
    "`batch_sampler`, or wrap the data set in a `lightning_bsl.BatchSizeDataModule(train=...)`"
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
        raise MisconfigurationException(f"there is no training loader: {_REMEDY}")
    if name is not None:
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
        followers = [i for i, pair in enumerate(zip(loaders, others)) if len({_size_of(loader) for loader in pair}) > 1]
    if len(followers) != 1:
        raise MisconfigurationException(
            f"there are {len(loaders)} training loaders, and {len(followers)} of them follow `batch_size`: write which one "
            "follows the schedule, its key or its index, as `BatchLRScheduler(..., loader=...)`"
        )
    return followers[0]


def _size_of(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None)
    return getattr(getattr(loader, "batch_sampler", None), "batch_size", None) if size is None else size


def limit_of(trainer: Trainer) -> float:
    """The bound on an epoch's batches: an ``int`` number, or a fraction."""
    limit = trainer.overfit_batches or trainer.limit_train_batches  # type: ignore[attr-defined]
    return 1.0 if limit is None else cast(float, limit)


# --- loaders that are re-made


class PlannedData:
    """Map-style loaders, re-made with a sampler that follows the plan: ours or anybody's.

    The batch size may change at any step. The loaders beside the scheduled one are re-made too, with their own batch size, so that they can be resumed.

    Args:
        trainer: The Trainer.
        given: The user's loaders; they stay as they are.
        index: Which of them follows the schedule.
        clock: The run's clock.
        splitter: Knows what of the step under way is trained.
        batch_size: The schedule.
        seed: Seed of the order of the examples.
        asks: What the user asked of the Trainer.
    """

    grows_inside = True

    def __init__(
        self,
        trainer: Trainer,
        given: CombinedLoader,
        index: int,
        clock: RunClock,
        splitter: StepSplitter,
        batch_size: Function,
        seed: int,
        asks: Asks,
    ) -> None:
        rank, world_size = data_parallel(trainer)
        self.index, self.clock, self.seed = index, clock, seed
        self.cut = Cut(rank, world_size, splitter.limit, asks.accumulate)
        self._splitter, self._overfit = splitter, bool(trainer.overfit_batches)  # type: ignore[attr-defined]
        self.asked_at = clock.epoch_start.epoch
        # the epoch in which a run that was not interrupted would have asked for these loaders
        made_at = self.asked_at - self.asked_at % asks.every if asks.every else 0
        self.loaders, self.sampler, self.others = self._remade(given, batch_size, made_at)

    def _remade(
        self, given: CombinedLoader, batch_size: Any, made_at: int
    ) -> tuple[CombinedLoader, GlobalBatchSampler, list[GlobalBatchSampler]]:
        flat, others = [*given.flattened], []
        cycles = len(flat) > 1 and given._mode == "max_size_cycle"
        make = partial(self._sampler_of, made_at=made_at, cycles=cycles)
        scheduled = make(flat[self.index], batch_size, lambda: self.clock.behind, self.cut)
        processes = self.cut.world_size
        for i, loader in enumerate(flat):
            size = _size_of(loader)
            if i == self.index:
                sampler = scheduled
            elif obstacle(loader) is None and size is not None:
                # beside the scheduled one: its own batch size, of one process
                sampler = make(loader, size * processes, int, Cut(self.cut.rank, processes))
                sampler.consumed = partial(self._done_beside, sampler)
                if not sampler.drops_last:
                    sampler.schedule = JointSchedule(min(size * processes, sampler.num_examples))
                others.append(sampler)
            else:
                continue
            flat[i] = remade(loader, sampler, torch.Generator().manual_seed(self.seed))
        given.flattened = flat
        return given, scheduled, others

    def _sampler_of(
        self,
        loader: DataLoader[Any],
        batch_size: Any,
        consumed: Callable[[], int],
        cut: Cut,
        *,
        made_at: int,
        cycles: bool,
    ) -> GlobalBatchSampler:
        theirs, clock = cast(Any, loader.batch_sampler), self.clock
        return GlobalBatchSampler.of(
            order_of(loader, self.seed, self._overfit, made_at),
            batch_size,
            lambda: clock.loader_start,
            consumed,
            cut,
            drop_last=theirs.drops_last if isinstance(theirs, GlobalBatchSampler) else theirs.drop_last,
            as_tensors=getattr(loader.dataset, "takes_tensors", False),
            cycles=cycles,
        )

    def epoch(self, trainer: Trainer) -> Epoch | None:
        """Everything is known, unless a loader beside has no end."""
        flat = self.loaders.flattened
        try:
            lengths = tuple(len(loader) for i, loader in enumerate(flat) if i != self.index)
        except TypeError:
            return None
        limit = limit_of(trainer)
        if isinstance(limit, int):
            limit = -(-limit // self.cut.accumulate)
        return Epoch(self.sampler.num_examples, limit, self.sampler.drops_last, Beside(lengths, self.loaders._mode))

    def sizes_at(self) -> Progress:
        """Now: the batch size changes inside an epoch."""
        return self.clock.progress

    def step_examples(self, batch_size: int) -> int:
        """The batch size, or what is left of the pass; nothing where the loader has ended and a longer one has not."""
        order, epoch = self.sampler.order, self.clock.epoch_start.epoch
        left = order.length(epoch) - (self.clock.behind - self.sampler.pass_start)
        if left >= batch_size:
            return batch_size
        return 0 if self.sampler.drops_last else max(0, left)

    def count(self) -> None:
        """As cut."""

    def consumed(self, splitter: StepSplitter) -> int:
        """All of the step."""
        return splitter.examples

    def shape(self) -> object:
        """The batches of an epoch."""
        return tuple(len(sampler) for sampler in (self.sampler, *self.others))

    def batches_done(self) -> int:
        """Micro-batches of whole steps, and of the step under way."""
        behind, steps = self.clock.behind, self.clock.progress.step - self.clock.epoch_start.step
        idle = steps - self.sampler.steps_in(behind)  # steps on other loaders alone
        return self.sampler.batches_in(behind) + max(0, idle) + (self._splitter.part if self._splitter.under_way else 0)

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """The same ones, so that workers live on, unless new ones are due."""
        if not due:
            return self.loaders
        given, before = as_combined(ask()), self.sampler.num_examples
        reason = obstacle(given.flattened[self.index])
        if reason is not None:
            raise MisconfigurationException(f"the training loader of epoch {self.clock.epoch_start.epoch} {reason}: {_REMEDY}")
        self.close()
        self.asked_at = self.clock.loader_start.epoch
        self.loaders, self.sampler, self.others = self._remade(given, self.sampler.schedule.batch_size, self.asked_at)
        if self.sampler.num_examples != before:
            rank_zero_warn(
                f"the training loader of epoch {self.asked_at} has {self.sampler.num_examples} examples, and the one before had "
                f"{before}. The run was planned with {before} in each epoch: schedules over a fraction of it, and "
                "`estimated_steps`, do not know of others"
            )
        return self.loaders

    @property
    def handed_out(self) -> int:
        """As of the sampler."""
        return self.sampler.handed_out

    def follow(self, schedule: JointSchedule) -> None:
        """The sampler reads the schedule at each step that it hands out."""
        self.sampler.schedule = JointSchedule(schedule.batch_size)

    def drawn(self) -> object:
        """What was asked of samplers."""
        orders = [sampler.order for sampler in (self.sampler, *self.others)]
        return [order(self.clock.loader_start.epoch) for order in orders if isinstance(order, SamplerOrder)]

    def check(self, plan: Plan | None) -> None:
        """Their sampler is the plan's."""

    def close(self) -> None:
        """End the workers."""
        for loader in self.loaders.flattened:
            end_workers(loader)

    def _done_beside(self, sampler: GlobalBatchSampler) -> int:
        """Examples that are trained of a loader beside, in all its passes of the epoch."""
        batches, once = self.batches_done(), len(sampler)
        size = sampler.schedule.batch_size_at(self.clock.loader_start)
        passes, rest = divmod(batches, once) if sampler.cycles else (0, min(batches, once))
        whole = once * size if sampler.drops_last else sampler.num_examples
        return passes * whole + min(rest * size, whole)


# --- loaders that are made anew between epochs


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

    grows_inside = False

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
        undo.callback(lightning_setattr, module, "batch_size", lightning_getattr(module, "batch_size"))
        self.loaders = self.again(ask, due=True)

    def epoch(self, trainer: Trainer) -> Epoch | None:
        """The length of an epoch, if the loader has one."""
        loader = self.loaders.flattened[self.index]
        sampler = getattr(loader.batch_sampler, "sampler", None)
        if isinstance(loader.dataset, IterableDataset) or not hasattr(sampler, "__len__"):
            return None
        number, drops, limit = len(sampler), bool(loader.batch_sampler.drop_last), limit_of(trainer)
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

    def count(self) -> int | None:
        """What was counted when the batch was put together."""
        return self.loaders.flattened[self.index].counts.popleft()

    def consumed(self, splitter: StepSplitter) -> int:
        """What was counted, on all processes."""
        return splitter.consumed * data_parallel(self._trainer)[1]

    def shape(self) -> object:
        """The batch size."""
        return self.schedule.batch_size_at(self.clock.loader_start)

    def batches_done(self) -> int | None:
        """Lightning's own count stands."""
        return None

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """The user's loaders once more, for the batch size of the epoch that begins."""
        self.asked_at = self.clock.loader_start.epoch
        size = self._local(self.schedule.batch_size_at(self.clock.loader_start))
        lightning_setattr(self._module, "batch_size", size)
        given = as_combined(ask())
        flat = [*given.flattened]
        if _size_of(flat[self.index]) != size:
            raise MisconfigurationException(
                f"BatchLRScheduler set `batch_size={size}` but the training loader has batch_size={_size_of(flat[self.index])}: "
                "make it anew in `train_dataloader`, from `self.batch_size` or `self.hparams.batch_size`"
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
        with isolate_rng():
            actual = _size_of(as_combined(self._ask()).flattened[self.index])
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
        raise MisconfigurationException(f"growth inside an epoch needs a training loader that can be re-made: {_REMEDY}")

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
    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Any]) -> _Counted:
        return _Counted(self.collate(examples), len(examples))


class CountingLoader:
    """A loader that notes how many examples each of its batches was put together from.

    Args:
        loader: Any DataLoader that puts batches together; it stays as it is.

    Attributes:
        counts: Of the batches that were fetched, in their order, until somebody takes them out.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = copy.copy(loader)
        vars(self._loader).update(collate_fn=_CountingCollate(loader.collate_fn), _iterator=None)
        self.counts: deque[int] = deque()

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        self.counts.clear()
        for counted in self._loader:
            self.counts.append(counted.examples)
            yield counted.batch

    def __len__(self) -> int:
        """As of the loader."""
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        """Whatever the loader has."""
        return getattr(self._loader, name)


# --- from what the user gave to a source


def source_of(
    trainer: Trainer,
    module: LightningModule,
    ask: Ask,
    *,
    clock: RunClock,
    splitter: StepSplitter,
    schedule: JointSchedule,
    name: Any,
    seed: int,
    asks: Asks,
    undo: ExitStack,
) -> DataSource:
    """The source of what Lightning is to train on.

    Args:
        trainer: The Trainer.
        module: The LightningModule.
        ask: Asks for the user's training loaders.
        clock: The run's clock.
        splitter: Cuts the steps.
        schedule: Batch size and learning rate.
        name: Key or index of the loader that follows the schedule, where there are several.
        seed: Seed of the order of the examples.
        asks: What the user asked of the Trainer.
        undo: Closed at the end of the fit.

    Raises:
        MisconfigurationException: The loader cannot follow the schedule; the message says why, and what to do.
    """
    given = as_combined(ask())
    index = scheduled_index(trainer, module, given, ask, name)
    loader = given.flattened[index]
    reason = obstacle(loader)
    if reason is None:
        return PlannedData(trainer, given, index, clock, splitter, cast(Function, schedule.batch_size), seed, asks)
    follows = isinstance(_size_of(loader), int) and lightning_hasattr(module, "batch_size")
    if not follows or type(loader).__iter__ is not DataLoader.__iter__ or len(given.flattened) > 1:
        raise MisconfigurationException(
            f"the training loader {reason}, so BatchLRScheduler cannot put its own sampler in: {_REMEDY}"
        )
    if splitter.limit is not None or type(splitter) is not StepSplitter:
        raise MisconfigurationException(
            f"the training loader {reason}, so nobody knows how to cut its steps for `max_device_batch_size`: {_REMEDY}"
        )
    return ReloadedData(trainer, module, ask, index, clock, schedule, asks, undo)


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
    if isinstance(batches, GlobalBatchSampler):
        size, number, cut = batches.schedule.batch_size_at(Progress()), batches.order.length(0), batches.cut
    else:
        size, number, cut = batches.batch_size, len(batches.sampler), Cut()

    def count(batch_idx: int) -> int:
        part = cut(max(0, min(size, number - batch_idx * size)) or size, size)[0]
        return part.stop - part.start

    return count
