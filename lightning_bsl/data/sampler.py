"""The indices of the examples of each optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler, SequentialSampler

from lightning_bsl.data.lengths import Lengths, Values, count_by_length, micro_batches_by_length
from lightning_bsl.schedules import JointSchedule, Progress
from lightning_bsl.schedules.functions import Function
from lightning_bsl.schedules.plan import Measure, Run, runs, size_at


def epoch_generator(seed: int, epoch: int, stream: int = 0, cycle: int = 0) -> torch.Generator:
    """A random generator that depends on (seed, epoch, stream, cycle) alone.

    Args:
        seed: The run's seed.
        epoch: The epoch.
        stream: One number for each use, so that two uses in an epoch are independent.
        cycle: Which pass of the epoch, where it has several.
    """
    # mixed rather than added: seed 0 in epoch 1 must not be seed 1 in epoch 0
    entropy = [seed, epoch, stream, *([cycle] if cycle else [])]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def share_of(examples: int, rank: int, world_size: int) -> slice:
    """The part of a step's examples that process ``rank`` of ``world_size`` takes; shares differ by at most one example."""
    return slice(rank * examples // world_size, (rank + 1) * examples // world_size)


@lru_cache(maxsize=256)  # asked at every step, nearly always for the same size
def micro_batches(
    examples: int, rank: int, world_size: int, max_device_batch_size: int | None, even: bool = True
) -> tuple[slice, ...]:
    """The parts of a step's examples that process ``rank`` puts through the model one after another.

    Every process has the same number of them, so that they can step together; a process with a smaller share may have an
    empty one.

    Args:
        examples: Examples of the step.
        rank: Index of the process.
        world_size: Number of processes.
        max_device_batch_size: Most examples of a micro-batch; ``None`` for no bound.
        even: Whether the parts differ by at most one example; else all but the last have the largest size.
    """
    share = share_of(examples, rank, world_size)
    largest = -(-examples // world_size)
    size = max_device_batch_size or largest
    count = -(-largest // size)
    if even:
        cuts = [share.start + i * (share.stop - share.start) // count for i in range(count + 1)]
    else:
        cuts = [min(share.start + i * size, share.stop) for i in range(count + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(cuts))


def part_size(part: Any) -> int:
    """Examples of a part of a step: a slice of it, or positions in it."""
    return part.stop - part.start if isinstance(part, slice) else len(part)


@dataclass(frozen=True)
class Cut:
    """How a step is cut over the processes that share it, and into micro-batches.

    Args:
        rank: Index of this process among those that share a step.
        world_size: Their number.
        max_device_batch_size: Most examples of a micro-batch; ``None`` for no bound.
        accumulate: As Lightning's ``accumulate_grad_batches``: into so many micro-batches, each of an equal part of the
            scheduled batch size.
        by_length: Whether a step is dealt and cut by the lengths of its examples, where they are known.

    Example:
        >>> [part.stop - part.start for part in Cut(max_device_batch_size=4)(10, batch_size=10)]
        [3, 3, 4]
    """

    rank: int = 0
    world_size: int = 1
    max_device_batch_size: int | None = None
    accumulate: int = 1
    by_length: bool = False

    def __call__(self, examples: int, batch_size: int) -> tuple[slice, ...]:
        """This process's micro-batches of a step, by their number.

        Args:
            examples: Examples of the step.
            batch_size: What the schedule says; the last step of an epoch may have fewer examples.
        """
        if self.accumulate > 1:
            size = -(-batch_size // (self.world_size * self.accumulate))
            return micro_batches(examples, self.rank, self.world_size, size, even=False)
        return micro_batches(examples, self.rank, self.world_size, self.max_device_batch_size)

    def sizes(self, run: Run) -> Iterator[tuple[int, list[int]]]:
        """Of each kind of step in a run of a plan: its examples, and those of this process's micro-batches."""
        for examples, _ in run.kinds():
            yield examples, [part.stop - part.start for part in self(examples, run.batch_size)]

    def batches(self, run: Run) -> int:
        """This process's micro-batches in a run of a plan."""
        count = sum(number * len(self(examples, run.batch_size)) for examples, number in run.kinds())
        return count if run.examples > (run.steps - 1) * run.batch_size or run.sizes else count + 1


class Order(Protocol):
    """The order of the examples in each epoch."""

    def length(self, epoch: int) -> int:
        """Examples of one pass in ``epoch``."""
        ...

    def __call__(self, epoch: int, cycle: int = 0) -> Sequence[Any] | Tensor:
        """The indices of pass ``cycle`` of ``epoch``; an epoch has several passes only beside a longer loader."""
        ...


class Permutation:
    """A permutation of the data set that depends on (seed, epoch) alone.

    Args:
        num_examples: Examples of the data set; a function where it may change between epochs.
        seed: Seed of the permutations.
        shuffle: Whether to permute at all.
        samples_per_epoch: Only the first so many of each permutation; all of them by default.

    Raises:
        ValueError: ``samples_per_epoch`` is not between 1 and ``num_examples``.
    """

    def __init__(
        self,
        num_examples: int | Callable[[], int],
        seed: int = 0,
        shuffle: bool = True,
        samples_per_epoch: int | None = None,
    ) -> None:
        self._number = num_examples
        if samples_per_epoch is not None and not 1 <= samples_per_epoch <= self.num_examples:
            raise ValueError(
                f"`samples_per_epoch={samples_per_epoch}` must lie between 1 and the {self.num_examples} examples of the data "
                "set"
            )
        self.seed, self.shuffle, self.samples_per_epoch = seed, shuffle, samples_per_epoch

    @property
    def num_examples(self) -> int:
        """Examples of the data set."""
        return self._number() if callable(self._number) else self._number

    def length(self, epoch: int) -> int:
        """Examples of one pass."""
        return self.samples_per_epoch or self.num_examples

    def __call__(self, epoch: int, cycle: int = 0) -> Tensor:
        """The indices, int64."""
        if not self.shuffle:
            return torch.arange(self.length(epoch))
        generator = epoch_generator(self.seed, epoch, cycle=cycle)
        return torch.randperm(self.num_examples, generator=generator)[: self.samples_per_epoch]


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields the indices of each optimizer step, the batch size following a schedule.

    A step is one list of indices, or, beyond ``max_device_batch_size``, a list for each of its micro-batches.

    Every epoch is a permutation of the data set that depends on (seed, epoch) alone, cut into steps by the schedule; each
    example comes exactly once, in the last, short step of the epoch if need be. A schedule is a pure function of the
    clock, so ``len()`` is exact also where the batch size changes inside the epoch.

    Args:
        num_examples: Examples of the data set.
        batch_size: The global batch size of a step: an ``int``, a schedule, or a function of progress.
        clock: Returns the progress at the start of the epoch that is iterated next.
        consumed: Returns how many of that epoch's examples are consumed already, where a run was resumed inside it;
            ``None`` for somebody who looks through the whole epoch, beside training.
        seed: Seed of the permutations.
        shuffle: Whether to permute at all.
        rank: Index of this process, which gets its share of each step.
        world_size: Number of processes.
        max_device_batch_size: Most examples of a micro-batch; a step has as many micro-batches as that takes.
        as_tensors: Whether to yield tensors instead of lists, for a data set whose ``__getitems__`` takes them.
        samples_per_epoch: Only that many examples, drawn anew each epoch without replacement (Li et al., arXiv 2405.14578,
            train Tiny-ImageNet on 10,000 an epoch); all of them by default.
        drop_last: Whether to leave out a last step that would be short.
        lengths: The lengths of the examples, by which a step is then dealt to the processes and cut into micro-batches.

    Raises:
        ValueError: ``samples_per_epoch`` is not between 1 and ``num_examples``; when iterated, a batch size below 1 or above
            the examples of an epoch, or lengths that cannot be.

    Example:
        >>> sampler = GlobalBatchSampler(10, lambda progress: 2 + 2 * (progress.step > 0), shuffle=False)
        >>> list(sampler)
        [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: Function | int,
        clock: Callable[[], Progress] = Progress,
        consumed: Callable[[], int | None] = int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        max_device_batch_size: int | None = None,
        as_tensors: bool = False,
        samples_per_epoch: int | None = None,
        drop_last: bool = False,
        lengths: Lengths | None = None,
    ) -> None:
        self.order: Order = Permutation(num_examples, seed, shuffle, samples_per_epoch)
        self.schedule = JointSchedule(batch_size)
        self.clock = clock
        self.consumed = consumed
        self.cut = Cut(rank, world_size, max_device_batch_size, by_length=lengths is not None)
        self.lengths = lengths
        self.in_tokens = False  # whether the batch size is in tokens: lengths, summed; not with further passes
        self.as_tensors = as_tensors
        self.drops_last = drop_last  # not `drop_last`, `batch_size` or `sampler`: Lightning rebuilds batch samplers with those
        self.cycles = False  # whether an epoch may have further passes, beside a longer loader
        self.exhausted = False  # whether the pass that was begun last was handed out
        self.pass_start = 0  # examples of the epoch before the pass that was begun last
        self.cycle = 0  # the index of that pass in its epoch
        self.handed_out = 0  # examples of the epoch's steps that were asked for: workers ask ahead of what is trained
        self._ordered: tuple[tuple[int, int], Values] | None = None  # the lengths of a pass, and which pass it is
        self._sums: Values | None = None  # their running sums
        self._counted: dict[tuple[int, ...], int] = {}  # micro-batches of its steps

    @classmethod
    def of(
        cls,
        order: Order,
        batch_size: Function | int,
        clock: Callable[[], Progress],
        consumed: Callable[[], int | None],
        cut: Cut,
        *,
        drop_last: bool = False,
        as_tensors: bool = False,
        cycles: bool = False,
        lengths: Lengths | None = None,
    ) -> GlobalBatchSampler:
        """A sampler over any order.

        Args:
            order: The order of the examples.
            batch_size: The global batch size, as of the class.
            clock: As of the class.
            consumed: As of the class.
            cut: How a step is cut.
            drop_last: As of the class.
            as_tensors: As of the class.
            cycles: Whether an epoch may have further passes, beside a longer loader.
            lengths: The lengths of the examples; the cut says whether it goes by them.
        """
        sampler = cls(1, batch_size, clock, consumed, as_tensors=as_tensors, drop_last=drop_last)
        sampler.order, sampler.cut, sampler.cycles, sampler.lengths = order, cut, cycles, lengths
        return sampler

    @property
    def num_examples(self) -> int:
        """Examples of one pass in the epoch at hand."""
        return self.order.length(self.clock().epoch)

    def __len__(self) -> int:
        """Batches of one pass: its steps, or their micro-batches."""
        return self._batches(self._runs(self.clock()), self.num_examples)

    def batches_in(self, examples: int) -> int:
        """Batches that the epoch's steps over its first ``examples`` examples take."""
        return sum(self._batches(found, taken, cycle) for cycle, (found, taken) in enumerate(self._passes(examples)))

    def steps_in(self, examples: int) -> int:
        """Steps over the epoch's first ``examples`` examples."""
        count = 0
        for found, taken in self._passes(examples):
            for run in found:
                count += run.steps_over(min(run.examples, taken))
                taken -= min(run.examples, taken)
        return count

    def _passes(self, examples: int) -> Iterator[tuple[list[Run], int]]:
        """The runs of each pass over the epoch's first ``examples`` examples, and how many of those lie ahead of it."""
        progress, first = self.clock(), True
        while examples > 0 and (self.cycles or first):
            found, first = self._runs(progress), False
            yield found, examples
            taken = sum(run.examples for run in found)
            examples -= taken
            progress = progress.advance(taken, sum(run.steps for run in found))

    def _runs(self, progress: Progress) -> list[Run]:
        return runs(self.schedule, progress, self.num_examples, drop_last=self.drops_last, measure=self.measure)

    def _batches(self, found: list[Run], examples: int, cycle: int = 0) -> int:
        """Batches of the steps over the first ``examples`` examples of a pass."""
        count = start = 0
        for run in found:
            taken = min(run.examples, examples - start)
            if taken <= 0:
                break
            count += self.count_batches(run if taken == run.examples else run.over(taken), start, cycle)
            start += taken
        return count

    @property
    def cuts_by_length(self) -> bool:
        """Whether a step is dealt and cut by the lengths of its examples."""
        return self.lengths is not None and self.cut.by_length

    def count_batches(self, run: Run, start: int, cycle: int = 0) -> int:
        """Batches of the steps of a run.

        Args:
            run: The run.
            start: Examples of the pass before it.
            cycle: Which pass of its epoch.
        """
        if self.lengths is None or not self.cuts_by_length or self.lengths.max_device_tokens is None:
            # the number of examples alone decides
            return sum(number * self._count(size, run.batch_size) for size, number in run.kinds())
        lengths = self._lengths_of(run.start.epoch, cycle)
        key = (start, run.examples, run.batch_size, run.steps)
        if key not in self._counted:
            self._counted[key] = 0
            for size, number in run.kinds():
                steps = lengths[start : start + number * size].reshape(number, size)
                self._counted[key] += int(count_by_length(steps, self.cut.world_size, *self._bounds).sum())
                start += number * size
        return self._counted[key]

    def _count(self, examples: int, batch_size: int) -> int:
        if self.cuts_by_length:
            return int(count_by_length(np.ones((1, examples)), self.cut.world_size, *self._bounds)[0])
        return len(self.cut(examples, batch_size))

    @property
    def measure(self) -> Measure | None:
        """What batch sizes count, where these are not examples."""
        return Measure("tokens", self._tokens_in, self._take) if self.in_tokens else None

    def _tokens_in(self, epoch: int) -> float:
        return float(self._lengths_of(epoch, 0).sum())

    def _take(self, epoch: int, start: int, tokens: int) -> int:
        lengths = self._lengths_of(epoch, 0)
        if self._sums is None:
            self._sums = np.cumsum(lengths)
        before = self._sums[start - 1] if start else 0.0
        stop = int(np.searchsorted(self._sums, before + tokens)) + 1
        if stop <= len(lengths):
            return stop - start
        return 0 if self.drops_last else len(lengths) - start

    @property
    def _bounds(self) -> tuple[float | None, int | None]:
        return (self.lengths.max_device_tokens if self.lengths else None), self.cut.max_device_batch_size

    def _lengths_of(self, epoch: int, cycle: int) -> Values:
        """The lengths of the examples in the order of a pass."""
        assert self.lengths is not None
        if self._ordered is None or self._ordered[0] != (epoch, cycle):
            self._ordered = (epoch, cycle), self.lengths.values[np.asarray(self.order(epoch, cycle))]
            self._sums = None
            self._counted.clear()
        return self._ordered[1]

    def most_batches(self, examples: int) -> int:
        """Most batches that a step may have, whatever the lengths of its examples.

        Args:
            examples: Examples of the step.
        """
        if self.lengths is None or not self.cuts_by_length:
            return len(self.cut(examples, examples))
        tokens, most = self._bounds
        together = most or examples
        if tokens is not None:
            together = max(1, min(together, int(tokens // self.lengths.values.max())))
        return -(-examples // (together * self.cut.world_size))

    def step_lengths(self, epoch: int, start: int, examples: int, cycle: int = 0) -> Values:
        """The lengths of a step's examples, over all processes.

        Args:
            epoch: The epoch.
            start: Examples of the pass before the step.
            examples: Examples of the step.
            cycle: Which pass of the epoch.
        """
        return self._lengths_of(epoch, cycle)[start : start + examples]

    def parts(self, epoch: int, start: int, examples: int, batch_size: int, cycle: int = 0) -> list[Any]:
        """This process's micro-batches of a step: of each the positions of its examples in the step.

        Args:
            epoch: The epoch.
            start: Examples of the pass before the step.
            examples: Examples of the step.
            batch_size: What the schedule says.
            cycle: Which pass of the epoch.

        Returns:
            Slices; or ascending positions where the cut goes by length and does not leave the step whole. Equally many for
            each process; some may be empty.
        """
        if not self.cuts_by_length:
            return list(self.cut(examples, batch_size))
        tokens, most = self._bounds
        if tokens is None and self.cut.world_size == 1 and examples <= (most or examples):
            return [slice(0, examples)]  # whatever the lengths are
        lengths = self.step_lengths(epoch, start, examples, cycle)
        return micro_batches_by_length(lengths, self.cut.world_size, tokens, most)[self.cut.rank]

    def __iter__(self) -> Iterator[list[int]]:
        """The indices of this process, step by step, to the end of the pass."""
        # the clock is read now, not when a worker asks for the first batch
        progress, consumed, start, cycle = self.clock(), self.consumed(), 0, 0
        if consumed is None:
            return self._steps(progress, 0, 0, 0, counts=False)
        while self.cycles and consumed > start:
            found = self._runs(progress)
            taken = sum(run.examples for run in found)
            if consumed < start + taken:
                break
            start, cycle = start + taken, cycle + 1
            progress = progress.advance(taken, sum(run.steps for run in found))
        self.pass_start, self.cycle, self.handed_out, self.exhausted = start, cycle, consumed, False
        return self._steps(progress, cycle, start, consumed)

    def _steps(self, progress: Progress, cycle: int, start: int, consumed: int, counts: bool = True) -> Iterator[list[int]]:
        order: Any = self.order(progress.epoch, cycle)
        if not self.as_tensors:
            order = order.tolist() if isinstance(order, Tensor) else order
        elif not isinstance(order, Tensor):
            order = torch.tensor(order)
        position, batch_size, schedule, settled, measure = 0, 0, self.schedule, 0.0, self.measure
        while position < len(order):
            if settled < 1 or schedule is not self.schedule:  # else it is sure to stay
                schedule = self.schedule
                if measure is None:
                    batch_size = size_at(schedule, progress, len(order), batch_size or None)
                else:
                    total = measure.total(progress.epoch)
                    batch_size = size_at(schedule, progress, total, batch_size or None, measure.unit)
                settled = schedule.batch_steps_to_change(progress, batch_size)
            settled -= 1
            size = batch_size if measure is None else measure.take(progress.epoch, position, batch_size)
            step = order[position : position + size]
            if not size or (self.drops_last and len(step) < size):
                break
            position += len(step)
            progress = progress.advance(len(step))
            if start + position <= consumed:
                continue
            if counts:
                self.handed_out = start + position
            for part in self.parts(progress.epoch, position - len(step), len(step), batch_size, cycle):
                # a process without a share must step with the others all the same: it repeats an example, at weight 0
                if isinstance(part, slice):
                    yield step[part] if part.stop > part.start else step[:1]
                elif not len(part):
                    shortest = int(self.step_lengths(progress.epoch, position - len(step), len(step), cycle).argmin())
                    yield step[shortest : shortest + 1]
                else:
                    yield step[torch.from_numpy(part)] if self.as_tensors else [step[i] for i in part.tolist()]
        if counts:
            self.exhausted = True

    def permutation(self, epoch: int) -> list[int]:
        """The order of the examples in ``epoch``."""
        order = self.order(epoch)
        return order.tolist() if isinstance(order, Tensor) else list(order)


class ShareSampler(SequentialSampler, DistributedSampler[Any]):
    """Stands in a loader's ``sampler`` where its batch sampler decides: Lightning then puts no sampler of its own in.

    Args:
        data_source: The data set.
    """

    def __init__(self, data_source: Any) -> None:
        SequentialSampler.__init__(self, data_source)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the batch sampler reads the clock."""


def remade(loader: DataLoader[Any], batch_sampler: GlobalBatchSampler, generator: torch.Generator) -> DataLoader[Any]:
    """A loader as ``loader``, of its class and with all it has, but with ``batch_sampler`` in it; ``loader`` stays as it is.

    Args:
        loader: A loader over a map-style data set.
        batch_sampler: Yields the indices of its batches.
        generator: For the seeds of workers, if the loader has none: making an iterator must not draw from the global one.
    """
    # a copy rather than a call of the constructor: a subclass may take other arguments than DataLoader
    other = copy.copy(loader)
    given = {"generator": loader.generator or generator, "batch_size": None, "drop_last": False, "_iterator": None}
    vars(other).update(batch_sampler=batch_sampler, sampler=ShareSampler(loader.dataset), **given)
    return other
