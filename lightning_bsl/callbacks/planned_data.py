"""Map-style loaders, copied with samplers that follow the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_bsl.callbacks.by_length import check_tokens, cuts_by_length, lengths_of
from lightning_bsl.callbacks.clock import RunClock
from lightning_bsl.callbacks.loaders import REMEDY, Ask, Asks, Epoch, as_combined, limit_of, obstacle, size_of
from lightning_bsl.callbacks.loop import end_workers
from lightning_bsl.callbacks.micro_batches import MemoryCeiling, Parts, StepSplitter
from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.data.orders import SamplerOrder, order_of
from lightning_bsl.data.sampler import Cut, GlobalBatchSampler, Permutation, part_size, remade, share_of
from lightning_bsl.data.whole_batches import WholeBatchSampler
from lightning_bsl.schedules import JointSchedule, Plan, Progress
from lightning_bsl.schedules.plan import Beside, Stretch


class PlannedData:
    """The user's map-style loaders, copied with samplers that follow the plan.

    The batch size may change at any step. The other loaders are copied too, with their own batch sizes, so that they can
    resume.

    Args:
        trainer: The Trainer.
        combined: The user's loaders; they stay as they are.
        index: Index of the loader that follows the schedule.
        clock: The clock of the run.
        splitter: Knows how much of the current step is trained.
        schedule: Batch size and learning rate.
        seed: Seed of the order of the examples.
        asks: The user's settings of the Trainer.
        in_tokens: Whether batch sizes count tokens.
        whole_batches: Examples of a batch of the loader, if steps are made of its whole batches.

    Raises:
        MisconfigurationException: ``max_device_tokens`` or batch sizes in tokens, with a loader that does not allow them.
        ValueError: Lengths that are not valid.
    """

    grows_inside = True

    def __init__(
        self,
        trainer: Trainer,
        combined: CombinedLoader,
        index: int,
        clock: RunClock,
        splitter: StepSplitter,
        schedule: JointSchedule,
        seed: int,
        asks: Asks,
        in_tokens: bool = False,
        whole_batches: int | None = None,
    ) -> None:
        rank, world_size = data_parallel(trainer)
        self.index, self.clock, self.seed = index, clock, seed
        self.cut = Cut(rank, world_size, splitter.limit, asks.accumulate)
        self._splitter, self._overfit = splitter, bool(trainer.overfit_batches)  # type: ignore[attr-defined]
        self._datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._in_tokens, self.whole_batches = in_tokens, whole_batches
        self.asked_at = clock.epoch_start.epoch
        # the epoch in which an uninterrupted run would have made these loaders
        made_at = self.asked_at - self.asked_at % asks.every if asks.every else 0
        self.loaders, self.sampler, self.others = self._remade(combined, schedule, made_at)
        self._planned, self._warned = self._number(), -1
        self._batches: list[int] = []  # number of batches of each loader, when Lightning last asked for the loaders
        self.exact = len(self.others) + 1 == len(combined.flattened)

    def _remade(
        self, combined: CombinedLoader, schedule: JointSchedule, made_at: int
    ) -> tuple[CombinedLoader, GlobalBatchSampler, list[GlobalBatchSampler]]:
        flat, others = [*combined.flattened], []
        cycles = len(flat) > 1 and combined._mode == "max_size_cycle"
        make = partial(self._sampler_of, made_at=made_at, cycles=cycles)
        scheduled = make(flat[self.index], schedule, self._done, self.cut)
        scheduled.lengths = self.lengths = lengths_of(self._datamodule, flat[self.index])
        by_length = cuts_by_length(self.lengths, scheduled.order, self.cut, isinstance(self._splitter, MemoryCeiling))
        scheduled.cut = self.cut = replace(self.cut, by_length=by_length)
        if self._in_tokens:
            check_tokens(self.lengths, scheduled.order, self.cut, len(flat))
            scheduled.in_tokens = True
        # the batches of later epochs are not drawn yet
        now = self._drawn_epoch = self.clock.epoch_start.epoch
        self.measure = scheduled.measure_like(now) if isinstance(scheduled, WholeBatchSampler) else scheduled.measure
        if len(flat) == 1:  # another loader may end the epoch
            scheduled.run_end = self.clock.end.samples
        processes = self.cut.world_size
        for i, loader in enumerate(flat):
            size = size_of(loader)
            if i == self.index:
                sampler = scheduled
            elif obstacle(loader) is None and size is not None:
                # another loader: it keeps its own batch size per process
                sampler = make(loader, size * processes, int, Cut(self.cut.rank, processes))
                sampler.consumed = partial(self._done_beside, sampler)
                if not sampler.drops_last:
                    sampler.schedule = JointSchedule(min(size * processes, sampler.num_examples))
                elif sampler.num_examples < size * processes:
                    continue  # it has no batches
                others.append(sampler)
            else:
                continue
            flat[i] = remade(loader, sampler, torch.Generator().manual_seed(self.seed))
        combined.flattened = flat
        return combined, scheduled, others

    def _sampler_of(
        self,
        loader: DataLoader[Any],
        batch_size: Any,
        consumed: Callable[[], int | None],
        cut: Cut,
        *,
        made_at: int,
        cycles: bool,
    ) -> GlobalBatchSampler:
        batches, clock = cast(Any, loader.batch_sampler), self.clock
        if self.whole_batches is not None:
            batch_order = WholeBatchSampler.batches_of(loader, self.seed, self.whole_batches, made_at, self._overfit)
            return WholeBatchSampler.of(batch_order, batch_size, lambda: clock.loader_start, consumed, cut)
        return GlobalBatchSampler.of(
            order_of(loader, self.seed, self._overfit, made_at, self.cut.world_size),
            batch_size,
            lambda: clock.loader_start,
            consumed,
            cut,
            drop_last=batches.drops_last if isinstance(batches, GlobalBatchSampler) else batches.drop_last,
            as_tensors=getattr(loader.dataset, "takes_tensors", False),
            cycles=cycles,
        )

    def epoch(self, trainer: Trainer) -> Epoch | None:
        """The facts that a plan needs. They are all known, unless another loader has no end."""
        flat = self.loaders.flattened
        sizes = [sized_len(loader) for i, loader in enumerate(flat) if i != self.index]
        lengths = tuple(10**9 if size is None else size for size in sizes)
        if None in sizes and self.loaders._mode != "min_size":
            raise MisconfigurationException(
                "one of the training loaders is without a length, so an epoch has no end: write "
                '`CombinedLoader(..., "min_size")`, so that the scheduled loader ends it'
            )
        limit = limit_of(trainer)
        if isinstance(limit, int):
            limit = -(-limit // self.cut.accumulate)
        return Epoch(self.sampler.num_examples, limit, self.sampler.drops_last, Beside(lengths, self.loaders._mode))

    def sizes_at(self) -> Progress:
        """The current progress: the batch size can change inside an epoch."""
        return self.clock.progress

    def step_examples(self, batch_size: int) -> int:
        """The examples of the next step: fewer at the end of a pass or run, 0 if only a longer loader still has batches."""
        clock, sampler = self.clock, self.sampler
        epoch, start = clock.epoch_start.epoch, clock.behind - sampler.pass_start
        left = sampler.order.length(epoch) - start
        if (measure := sampler.measure) is not None:
            size = measure.take(epoch, start, batch_size) if left > 0 else 0
        elif left >= batch_size:
            size = batch_size
        else:
            size = 0 if sampler.drops_last else max(0, left)
        return size if sampler.run_end is None else min(size, sampler.run_end - clock.progress.samples)

    def parts(self, examples: int, batch_size: int) -> Parts:
        """The micro-batches as the sampler makes them, or the longest lengths for ``MemoryCeiling``."""
        sampler, clock = self.sampler, self.clock
        by_tokens = isinstance(self._splitter, MemoryCeiling) and isinstance(sampler.order, Permutation)
        if not examples or not (sampler.divides_itself or (by_tokens and sampler.lengths is not None)):
            return Parts()
        epoch, start = clock.epoch_start.epoch, clock.behind - sampler.pass_start
        if by_tokens:
            lengths, processes = sampler.step_lengths(epoch, start, examples, sampler.cycle), self.cut.world_size
            shares = (lengths[share_of(examples, rank, processes)] for rank in range(processes))
            # a process with an empty share repeats the first example
            return Parts(longest=tuple(float((share if len(share) else lengths[:1]).max()) for share in shares))
        parts = sampler.parts(epoch, start, examples, batch_size, sampler.cycle)
        stops = [*accumulate(map(part_size, parts))]
        return Parts(tuple(map(slice, [0, *stops], stops)))

    def most_batches(self, batch_size: int) -> int:
        """The most micro-batches of a step, by the sampler."""
        return self.sampler.most_batches(batch_size)

    def batches(self, stretch: Stretch, start: int) -> int:
        """The number of micro-batches that the sampler makes."""
        if not self.sampler.divides_itself:
            return self.cut.batches(stretch)
        stretch = self._drawn(stretch)
        if self.most_batches(stretch.batch_size) == 1:
            return stretch.steps
        return self.sampler.count_batches(stretch, start)

    def sizes(self, stretch: Stretch, start: int) -> Iterator[tuple[int, list[int]]]:
        """The sizes of the micro-batches that the sampler makes; for every single step if it divides by length."""
        if not self.sampler.divides_itself:
            yield from self.cut.sizes(stretch)
            return
        stretch = self._drawn(stretch)
        for examples, number in stretch.kinds():
            for _ in range(number):
                parts = self.sampler.parts(stretch.start.epoch, start, examples, stretch.batch_size)
                yield examples, [part_size(part) or self.sampler.spare(stretch.start.epoch, start) for part in parts]
                start += examples

    def _drawn(self, stretch: Stretch) -> Stretch:
        """A stretch of a plan, in the epoch whose batches it was planned with."""
        if self.whole_batches is None:
            return stretch
        return replace(stretch, start=stretch.start._replace(epoch=self._drawn_epoch))

    def count(self) -> None:
        """Return ``None``: the batches have the planned number of examples."""

    def consumed(self, splitter: StepSplitter) -> int:
        """The examples of the step."""
        return splitter.examples

    def splits(self, plan: Plan) -> bool:
        """Whether a step of the plan has several micro-batches (with other loaders: whether one may have)."""
        if all(self.most_batches(stage.batch_size) == 1 for stage in plan.stages):
            return False
        if not self.sampler.divides_itself or len(self.loaders.flattened) > 1:
            return True
        return any(self.batches(stretch, start) > stretch.steps for stretch, start in plan.stretches_of_epochs())

    def is_stale(self) -> bool:
        """Whether the numbers of batches have changed since Lightning asked for the loaders."""
        batches, self._batches = self._batches, self._lengths()
        self._warn_if_unplanned()
        return batches != self._batches

    def _lengths(self) -> list[int]:
        return [len(sampler) for sampler in (self.sampler, *self.others)]

    def _warn_if_unplanned(self) -> None:
        epoch, number = self.clock.loader_start.epoch, self._number()
        if number != self._planned and epoch != self._warned:
            self._warned = epoch
            what = "training examples" if self.whole_batches is None else "batches"
            rank_zero_warn(
                f"epoch {epoch} has {number} {what}, but the run was planned with {self._planned} in each epoch. "
                f"Schedules over a fraction of the run, and `estimated_steps`, still count with {self._planned}: write the "
                "lengths of schedules as ints if this is not what you want"
            )

    def _number(self) -> int:
        """Examples of the epoch; or its batches, if they stay whole."""
        sampler = self.sampler
        if isinstance(sampler, WholeBatchSampler):
            return len(sampler.batches.ends(self.clock.loader_start.epoch))
        return sampler.num_examples

    def batches_done(self) -> int:
        """The number of trained micro-batches of the epoch, including those of the current step."""
        behind, steps = self.clock.behind, self.clock.progress.step - self.clock.epoch_start.step
        idle = steps - self.sampler.steps_in(behind)  # steps that trained only on other loaders
        return self.sampler.batches_in(behind) + max(0, idle) + (self._splitter.part if self._splitter.under_way else 0)

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """The same loaders, so that their workers live on; or new ones, if they are due."""
        if due:
            combined = as_combined(ask())
            if len(combined.flattened) != len(self.loaders.flattened):
                raise MisconfigurationException(
                    f"there are {len(combined.flattened)} training loaders now, but there were {len(self.loaders.flattened)} "
                    "before: give the same number in every epoch"
                )
            reason = None if self.whole_batches else obstacle(combined.flattened[self.index])
            if reason is not None:
                raise MisconfigurationException(
                    f"the training loader of epoch {self.clock.loader_start.epoch} {reason}: {REMEDY}"
                )
            self.close()
            self.asked_at = self.clock.loader_start.epoch
            self.loaders, self.sampler, self.others = self._remade(combined, self.sampler.schedule, self.asked_at)
        self._batches = self._lengths()
        self._warn_if_unplanned()
        return self.loaders

    @property
    def handed_out(self) -> int:
        """Examples of the epoch that the sampler has yielded."""
        return self.sampler.handed_out

    def follow(self, schedule: JointSchedule) -> None:
        """Give the sampler another schedule. It reads the schedule at each step that it yields."""
        self.sampler.schedule = schedule

    def drawn(self) -> object:
        """The orders that the user's samplers gave in this epoch."""
        orders = [sampler.order for sampler in (self.sampler, *self.others)]
        return [order(self.clock.loader_start.epoch) for order in orders if isinstance(order, SamplerOrder)]

    def check(self, plan: Plan | None) -> None:
        """Remember the numbers of batches; the samplers follow the plan, so there is nothing to check."""
        self._batches = self._lengths()

    def positions(self, trainer: Trainer) -> None:
        """Return ``None``: there is no stream, or it has no position."""

    def close(self) -> None:
        """End the workers."""
        for loader in self.loaders.flattened:
            end_workers(loader)

    def _trains(self, sampler: GlobalBatchSampler) -> bool:
        """Whether a new iteration is for training, not for other code that iterates over the loader during training."""
        clock = self.clock
        return clock.progress.step in (clock.begun_at, clock.loader_start.step) or (sampler.cycles and sampler.exhausted)

    def _done(self) -> int | None:
        """Examples of the epoch that are trained; ``None`` if the iteration is not for training."""
        return self.clock.behind if self._trains(self.sampler) else None

    def _done_beside(self, sampler: GlobalBatchSampler) -> int | None:
        """Trained examples of another loader, in all its passes of the epoch; ``None`` if it is not iterated for training."""
        if not self._trains(sampler):
            return None
        batches, once = self.batches_done(), len(sampler)
        size = sampler.schedule.batch_size_at(self.clock.loader_start)
        passes, rest = divmod(batches, once) if sampler.cycles else (0, min(batches, once))
        whole = once * size if sampler.drops_last else sampler.num_examples
        return passes * whole + min(rest * size, whole)
