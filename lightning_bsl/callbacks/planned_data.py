"""Map-style loaders, re-made so that they follow the plan."""

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
from lightning_bsl.schedules import JointSchedule, Plan, Progress
from lightning_bsl.schedules.functions import Function
from lightning_bsl.schedules.plan import Beside, Run


class PlannedData:
    """Map-style loaders, re-made with a sampler that follows the plan: ours or anybody's.

    The batch size may change at any step. The loaders beside the scheduled one are re-made too, with their own batch size, so
    that they can be resumed.

    Args:
        trainer: The Trainer.
        given: The user's loaders; they stay as they are.
        index: Which of them follows the schedule.
        clock: The run's clock.
        splitter: Knows what of the step under way is trained.
        batch_size: The schedule.
        seed: Seed of the order of the examples.
        asks: What the user asked of the Trainer.
        in_tokens: Whether batch sizes are in tokens.

    Raises:
        MisconfigurationException: ``max_device_tokens`` where steps cannot be cut by it, or batch sizes in tokens where they
            cannot be planned.
        ValueError: Lengths that cannot be.
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
        in_tokens: bool = False,
    ) -> None:
        rank, world_size = data_parallel(trainer)
        self.index, self.clock, self.seed = index, clock, seed
        self.cut = Cut(rank, world_size, splitter.limit, asks.accumulate)
        self._splitter, self._overfit = splitter, bool(trainer.overfit_batches)  # type: ignore[attr-defined]
        self._datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._in_tokens = in_tokens
        self.asked_at = clock.epoch_start.epoch
        # the epoch in which a run that was not interrupted would have asked for these loaders
        made_at = self.asked_at - self.asked_at % asks.every if asks.every else 0
        self.loaders, self.sampler, self.others = self._remade(given, batch_size, made_at)
        self._planned, self._said = self.sampler.num_examples, -1
        self._batches: list[int] = []  # of each loader, when Lightning asked for them last
        self.exact = len(self.others) + 1 == len(given.flattened)

    def _remade(
        self, given: CombinedLoader, batch_size: Any, made_at: int
    ) -> tuple[CombinedLoader, GlobalBatchSampler, list[GlobalBatchSampler]]:
        flat, others = [*given.flattened], []
        cycles = len(flat) > 1 and given._mode == "max_size_cycle"
        make = partial(self._sampler_of, made_at=made_at, cycles=cycles)
        scheduled = make(flat[self.index], batch_size, self._done, self.cut)
        scheduled.lengths = self.lengths = lengths_of(self._datamodule, flat[self.index])
        by_length = cuts_by_length(self.lengths, scheduled.order, self.cut, isinstance(self._splitter, MemoryCeiling))
        scheduled.cut = self.cut = replace(self.cut, by_length=by_length)
        if self._in_tokens:
            check_tokens(self.lengths, scheduled.order, self.cut, len(flat))
            scheduled.in_tokens = True
        self.measure = scheduled.measure
        processes = self.cut.world_size
        for i, loader in enumerate(flat):
            size = size_of(loader)
            if i == self.index:
                sampler = scheduled
            elif obstacle(loader) is None and size is not None:
                # beside the scheduled one: its own batch size, of one process
                sampler = make(loader, size * processes, int, Cut(self.cut.rank, processes))
                sampler.consumed = partial(self._done_beside, sampler)
                if not sampler.drops_last:
                    sampler.schedule = JointSchedule(min(size * processes, sampler.num_examples))
                elif sampler.num_examples < size * processes:
                    continue  # it has no batch at all
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
        consumed: Callable[[], int | None],
        cut: Cut,
        *,
        made_at: int,
        cycles: bool,
    ) -> GlobalBatchSampler:
        theirs, clock = cast(Any, loader.batch_sampler), self.clock
        return GlobalBatchSampler.of(
            order_of(loader, self.seed, self._overfit, made_at, self.cut.world_size),
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
        known = [sized_len(loader) for i, loader in enumerate(flat) if i != self.index]
        lengths = tuple(10**9 if length is None else length for length in known)
        if None in known and self.loaders._mode != "min_size":
            raise MisconfigurationException(
                "a loader without a length beside the scheduled one has an epoch without an end: write "
                '`CombinedLoader(..., "min_size")`, so that the scheduled loader ends it'
            )
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
        start = self.clock.behind - self.sampler.pass_start
        left = order.length(epoch) - start
        if self.measure is not None:
            return self.measure.take(epoch, start, batch_size) if left > 0 else 0
        if left >= batch_size:
            return batch_size
        return 0 if self.sampler.drops_last else max(0, left)

    def parts(self, examples: int, batch_size: int) -> Parts:
        """As of the sampler, which gives the examples."""
        sampler, clock = self.sampler, self.clock
        by_tokens = isinstance(self._splitter, MemoryCeiling) and isinstance(sampler.order, Permutation)
        if sampler.lengths is None or not examples or not (sampler.cuts_by_length or by_tokens):
            return Parts()
        epoch, start = clock.epoch_start.epoch, clock.behind - sampler.pass_start
        if by_tokens:
            lengths, processes = sampler.step_lengths(epoch, start, examples, sampler.cycle), self.cut.world_size
            shares = (lengths[share_of(examples, rank, processes)] for rank in range(processes))
            # a process without a share repeats the first example
            return Parts(longest=tuple(float((share if len(share) else lengths[:1]).max()) for share in shares))
        parts = sampler.parts(epoch, start, examples, batch_size, sampler.cycle)
        stops = [*accumulate(map(part_size, parts))]
        return Parts(tuple(map(slice, [0, *stops], stops)))

    def most_batches(self, batch_size: int) -> int:
        """As of the sampler."""
        return self.sampler.most_batches(batch_size)

    def batches(self, run: Run, start: int) -> int:
        """As cut by the sampler."""
        if not self.sampler.cuts_by_length:
            return self.cut.batches(run)
        if self.most_batches(run.batch_size) == 1:
            return run.steps
        return self.sampler.count_batches(run, start)

    def sizes(self, run: Run, start: int) -> Iterator[tuple[int, list[int]]]:
        """As cut by the sampler: of every step where lengths decide."""
        if not self.sampler.cuts_by_length:
            yield from self.cut.sizes(run)
            return
        for examples, number in run.kinds():
            for _ in range(number):
                parts = self.sampler.parts(run.start.epoch, start, examples, run.batch_size)
                yield examples, [part_size(part) for part in parts]
                start += examples

    def count(self) -> None:
        """As cut."""

    def consumed(self, splitter: StepSplitter) -> int:
        """All of the step."""
        return splitter.examples

    def splits(self, plan: Plan) -> bool:
        """Whether any step of a plan has several micro-batches; beside other loaders, whether one may have."""
        if all(self.most_batches(stage.batch_size) == 1 for stage in plan.stages):
            return False
        if not self.sampler.cuts_by_length or len(self.loaders.flattened) > 1:
            return True
        return any(self.batches(run, start) > run.steps for run, start in plan.runs_of_epochs())

    def is_stale(self) -> bool:
        """Whether the batches of an epoch are others than when Lightning asked for the loaders."""
        batches, self._batches = self._batches, self._lengths()
        self._say_if_unplanned()
        return batches != self._batches

    def _lengths(self) -> list[int]:
        return [len(sampler) for sampler in (self.sampler, *self.others)]

    def _say_if_unplanned(self) -> None:
        epoch, number = self.clock.loader_start.epoch, self.sampler.num_examples
        if number != self._planned and epoch != self._said:
            self._said = epoch
            rank_zero_warn(
                f"epoch {epoch} has {number} training examples, but the run was planned with {self._planned} in each epoch: "
                "schedules over a fraction of the run, and `estimated_steps`, count with those"
            )

    def batches_done(self) -> int:
        """Micro-batches of whole steps, and of the step under way."""
        behind, steps = self.clock.behind, self.clock.progress.step - self.clock.epoch_start.step
        idle = steps - self.sampler.steps_in(behind)  # steps on other loaders alone
        return self.sampler.batches_in(behind) + max(0, idle) + (self._splitter.part if self._splitter.under_way else 0)

    def again(self, ask: Ask, due: bool) -> CombinedLoader:
        """The same ones, so that workers live on, unless new ones are due."""
        if due:
            given = as_combined(ask())
            if len(given.flattened) != len(self.loaders.flattened):
                raise MisconfigurationException(
                    f"there are {len(given.flattened)} training loaders now, and there were {len(self.loaders.flattened)}: "
                    "give the same ones in every epoch"
                )
            reason = obstacle(given.flattened[self.index])
            if reason is not None:
                raise MisconfigurationException(
                    f"the training loader of epoch {self.clock.loader_start.epoch} {reason}: {REMEDY}"
                )
            self.close()
            self.asked_at = self.clock.loader_start.epoch
            self.loaders, self.sampler, self.others = self._remade(given, self.sampler.schedule.batch_size, self.asked_at)
        self._batches = self._lengths()
        self._say_if_unplanned()
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
        """Their sampler is the plan's; note how long an epoch is."""
        self._batches = self._lengths()

    def close(self) -> None:
        """End the workers."""
        for loader in self.loaders.flattened:
            end_workers(loader)

    def _trains(self, sampler: GlobalBatchSampler) -> bool:
        """Whether it is training that begins to iterate, and not somebody who looks through the data while it goes on."""
        clock = self.clock
        return clock.progress.step in (clock.begun_at, clock.loader_start.step) or (sampler.cycles and sampler.exhausted)

    def _done(self) -> int | None:
        """Examples of the epoch that are trained."""
        return self.clock.behind if self._trains(self.sampler) else None

    def _done_beside(self, sampler: GlobalBatchSampler) -> int | None:
        """Examples that are trained of a loader beside, in all its passes of the epoch."""
        if not self._trains(sampler):
            return None
        batches, once = self.batches_done(), len(sampler)
        size = sampler.schedule.batch_size_at(self.clock.loader_start)
        passes, rest = divmod(batches, once) if sampler.cycles else (0, min(batches, once))
        whole = once * size if sampler.drops_last else sampler.num_examples
        return passes * whole + min(rest * size, whole)
