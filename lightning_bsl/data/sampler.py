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
from lightning_bsl.schedules.plan import Measure, Stretch, size_at, stretches_of_epoch


def epoch_generator(seed: int, epoch: int, stream: int = 0, cycle: int = 0) -> torch.Generator:
    """A random generator that depends only on (seed, epoch, stream, cycle).

    Args:
        seed: Seed of the run.
        epoch: The epoch.
        stream: A number for each use, so that two uses in an epoch are independent.
        cycle: Index of the pass, if the epoch has several.
    """
    # mixed, not added: seed 0 in epoch 1 must differ from seed 1 in epoch 0
    entropy = [seed, epoch, stream, *([cycle] if cycle else [])]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def share_of(examples: int, rank: int, world_size: int) -> slice:
    """The part of a step's examples that process ``rank`` of ``world_size`` trains. Shares differ by at most one example."""
    return slice(rank * examples // world_size, (rank + 1) * examples // world_size)


@lru_cache(maxsize=256)  # called at every step, nearly always with the same size
def micro_batches(
    examples: int, rank: int, world_size: int, max_device_batch_size: int | None, even: bool = True
) -> tuple[slice, ...]:
    """The micro-batches of a step on process ``rank``, as slices of the step's examples.

    Every process has the same number of micro-batches, so that all step together. A process with a smaller share may have an
    empty micro-batch.

    Args:
        examples: Examples of the step.
        rank: Index of the process.
        world_size: Number of processes.
        max_device_batch_size: Largest number of examples of a micro-batch; ``None`` for no limit.
        even: Whether the micro-batches differ by at most one example; else all but the last have the largest size.
    """
    share = share_of(examples, rank, world_size)
    largest = -(-examples // world_size)
    size = max_device_batch_size or largest
    count = -(-largest // size)
    if even:
        return even_parts(share.start, share.stop, count)
    cuts = [min(share.start + i * size, share.stop) for i in range(count + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(cuts))


def even_parts(start: int, stop: int, number: int) -> tuple[slice, ...]:
    """Divide the examples from ``start`` to ``stop`` into parts that differ by at most one; some may be empty.

    Args:
        start: The first example.
        stop: The first example after them.
        number: Number of parts.
    """
    return tuple(slice(*pair) for pair in pairwise(start + i * (stop - start) // number for i in range(number + 1)))


def part_size(part: Any) -> int:
    """The number of examples of a part of a step: a slice of the step, or positions in it."""
    return part.stop - part.start if isinstance(part, slice) else len(part)


@dataclass(frozen=True)
class Cut:
    """How a step is divided among the processes, and into micro-batches.

    Args:
        rank: Index of this process among those that share a step.
        world_size: Number of processes that share a step.
        max_device_batch_size: Largest number of examples of a micro-batch; ``None`` for no limit.
        accumulate: As Lightning's ``accumulate_grad_batches``: the number of micro-batches, each of an equal part of the
            scheduled batch size.
        by_length: Whether a step is divided by the lengths of its examples, if they are known.

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
        """This process's micro-batches of a step, as slices of the step's examples.

        Args:
            examples: Examples of the step.
            batch_size: The scheduled batch size; the last step of an epoch may have fewer examples.
        """
        if self.accumulate > 1:
            size = -(-batch_size // (self.world_size * self.accumulate))
            return micro_batches(examples, self.rank, self.world_size, size, even=False)
        return micro_batches(examples, self.rank, self.world_size, self.max_device_batch_size)

    def sizes(self, stretch: Stretch) -> Iterator[tuple[int, list[int]]]:
        """For each kind of step in a stretch of a plan: its examples, and the examples of this process's micro-batches."""
        for examples, _ in stretch.kinds():
            yield examples, [part.stop - part.start for part in self(examples, stretch.batch_size)]

    def batches(self, stretch: Stretch) -> int:
        """The number of this process's micro-batches in a stretch of a plan."""
        count = sum(number * len(self(examples, stretch.batch_size)) for examples, number in stretch.kinds())
        return count if stretch.examples > (stretch.steps - 1) * stretch.batch_size or stretch.sizes else count + 1


class Order(Protocol):
    """The order of the examples in each epoch."""

    def length(self, epoch: int) -> int:
        """Examples of one pass in ``epoch``."""
        ...

    def __call__(self, epoch: int, cycle: int = 0) -> Sequence[Any] | Tensor:
        """The indices of pass ``cycle`` of ``epoch``. An epoch has several passes only if another loader is longer."""
        ...


class Permutation:
    """A permutation of the data set that depends only on (seed, epoch).

    Args:
        num_examples: Examples of the data set; a function if it may change between epochs.
        seed: Seed of the permutations.
        shuffle: Whether to permute the examples.
        samples_per_epoch: Number of examples of an epoch: the first ones of each permutation; by default all.

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
                "set: write a number in this range, or leave it out"
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
    """A batch sampler whose batch size follows a schedule, inside an epoch too.

    It yields one list of indices per optimizer step. If the step is larger than ``max_device_batch_size``, it yields one list
    per micro-batch.

    Every epoch is a permutation of the data set that depends only on (seed, epoch). The schedule divides it into steps, and
    every example comes exactly once; the last step may be short. A schedule is a pure function of the clock, so ``len()`` is
    exact even if the batch size changes inside the epoch.

    Args:
        num_examples: Examples of the data set.
        batch_size: The global batch size of a step: an ``int``, a schedule, a function of progress, or a joint schedule.
        clock: Returns the progress at the start of the epoch that is iterated next.
        consumed: Returns the number of examples of this epoch that are trained already, after a resume inside the epoch.
            ``None`` for an iteration over the whole epoch that is not for training.
        seed: Seed of the permutations.
        shuffle: Whether to permute the examples.
        rank: Index of this process, which gets its share of each step.
        world_size: Number of processes.
        max_device_batch_size: Largest number of examples of a micro-batch; ``None`` for no limit.
        as_tensors: Whether to yield tensors instead of lists, for a data set whose ``__getitems__`` takes tensors.
        samples_per_epoch: Number of examples of an epoch, drawn anew in each epoch without replacement; by default all. (Li et
            al. 2024, arXiv 2405.14578, train on 10,000 images of Tiny-ImageNet per epoch.)
        drop_last: Whether to leave out a short last step.
        lengths: Lengths of the examples. A step is then divided by length among the processes and into micro-batches.

    Raises:
        ValueError: ``samples_per_epoch`` is not between 1 and ``num_examples``. When iterated: a batch size below 1 or above
            the examples of an epoch, or lengths that are not valid.

    Example:
        >>> sampler = GlobalBatchSampler(10, lambda progress: 2 + 2 * (progress.step > 0), shuffle=False)
        >>> list(sampler)
        [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: Function | int | JointSchedule,
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
        self.schedule = JointSchedule.of(batch_size)
        self.clock = clock
        self.consumed = consumed
        self.cut = Cut(rank, world_size, max_device_batch_size, by_length=lengths is not None)
        self.lengths = lengths
        self.in_tokens = False  # whether the batch size is a sum of lengths; not with several passes in an epoch
        self.as_tensors = as_tensors
        # Lightning rebuilds batch samplers that have attributes `drop_last`, `batch_size` and `sampler`: do not use these names
        self.drops_last = drop_last
        self.cycles = False  # whether an epoch may have several passes, since another loader is longer
        self.exhausted = False  # whether the last pass was yielded to its end
        self.pass_start = 0  # examples of the epoch before the last pass
        self.cycle = 0  # index of the last pass in its epoch
        self.run_end: int | None = None  # examples of the run, where it ends inside an epoch; not with several passes
        self.handed_out = 0  # examples of the epoch that were yielded; workers fetch more than is trained
        self._ordered: tuple[tuple[int, int], Values] | None = None  # (epoch, cycle) of a pass, and its lengths in their order
        self._sums: Values | None = None  # cumulative sums of these lengths
        self._counted: dict[tuple[int, ...], int] = {}  # number of micro-batches of stretches of this pass

    @classmethod
    def of(
        cls,
        order: Order,
        batch_size: Function | int | JointSchedule,
        clock: Callable[[], Progress],
        consumed: Callable[[], int | None],
        cut: Cut,
        *,
        drop_last: bool = False,
        as_tensors: bool = False,
        cycles: bool = False,
        lengths: Lengths | None = None,
    ) -> GlobalBatchSampler:
        """Make a sampler over any order.

        Args:
            order: The order of the examples.
            batch_size: The same as for the class.
            clock: The same as for the class.
            consumed: The same as for the class.
            cut: How a step is divided.
            drop_last: The same as for the class.
            as_tensors: The same as for the class.
            cycles: Whether an epoch may have several passes, since another loader is longer.
            lengths: Lengths of the examples; used to divide a step if ``cut.by_length``.
        """
        sampler = cls(1, batch_size, clock, consumed, as_tensors=as_tensors, drop_last=drop_last)
        sampler.order, sampler.cut, sampler.cycles, sampler.lengths = order, cut, cycles, lengths
        return sampler

    @property
    def num_examples(self) -> int:
        """Examples of one pass in the current epoch."""
        return self.order.length(self.clock().epoch)

    def __len__(self) -> int:
        """Number of batches of one pass: its steps, or their micro-batches."""
        progress = self.clock()
        return self._batches(self._stretches(progress), self.length(progress))

    def length(self, progress: Progress) -> int:
        """Examples of the pass that begins at ``progress``: those of the order, or fewer at the end of the run."""
        number = self.order.length(progress.epoch)
        return number if self.run_end is None else max(0, min(number, self.run_end - progress.samples))

    def batches_in(self, examples: int) -> int:
        """Number of batches of the steps that take the first ``examples`` examples of the epoch."""
        passes = enumerate(self._passes(examples))
        return sum(self._batches(stretches, taken, cycle) for cycle, (stretches, taken) in passes)

    def steps_in(self, examples: int) -> int:
        """Number of steps that take the first ``examples`` examples of the epoch."""
        count = 0
        for stretches, taken in self._passes(examples):
            for stretch in stretches:
                count += stretch.steps_over(min(stretch.examples, taken))
                taken -= min(stretch.examples, taken)
        return count

    def _passes(self, examples: int) -> Iterator[tuple[list[Stretch], int]]:
        """For each pass over the first ``examples`` examples of the epoch: its stretches, and how many examples are left."""
        progress, first = self.clock(), True
        while examples > 0 and (self.cycles or first):
            stretches, first = self._stretches(progress), False
            yield stretches, examples
            taken = sum(stretch.examples for stretch in stretches)
            examples -= taken
            progress = progress.advance(taken, sum(stretch.steps for stretch in stretches))

    def _stretches(self, progress: Progress) -> list[Stretch]:
        return stretches_of_epoch(self.schedule, progress, self.num_examples, drop_last=self.drops_last, measure=self.measure)

    def _batches(self, stretches: list[Stretch], examples: int, cycle: int = 0) -> int:
        """Number of batches of the steps that take the first ``examples`` examples of a pass."""
        count = start = 0
        for stretch in stretches:
            taken = min(stretch.examples, examples - start)
            if taken <= 0:
                break
            count += self.count_batches(stretch if taken == stretch.examples else stretch.over(taken), start, cycle)
            start += taken
        return count

    @property
    def divides_itself(self) -> bool:
        """Whether the micro-batches of a step do not follow from the number of its examples."""
        return self.lengths is not None and self.cut.by_length

    def count_batches(self, stretch: Stretch, start: int, cycle: int = 0) -> int:
        """Number of batches of the steps of a stretch.

        Args:
            stretch: The stretch.
            start: Examples of the pass before the stretch.
            cycle: Index of the pass in its epoch.
        """
        if self.lengths is None or not self.divides_itself or self.lengths.max_device_tokens is None:
            # the number of micro-batches follows from the number of examples
            return sum(number * self._count(size, stretch.batch_size) for size, number in stretch.kinds())
        lengths = self._lengths_of(stretch.start.epoch, cycle)
        key = (start, stretch.examples, stretch.batch_size, stretch.steps)
        if key not in self._counted:
            self._counted[key] = 0
            for size, number in stretch.kinds():
                steps = lengths[start : start + number * size].reshape(number, size)
                self._counted[key] += int(count_by_length(steps, self.cut.world_size, *self._bounds).sum())
                start += number * size
        return self._counted[key]

    def _count(self, examples: int, batch_size: int) -> int:
        if self.divides_itself:
            return int(count_by_length(np.ones((1, examples)), self.cut.world_size, *self._bounds)[0])
        return len(self.cut(examples, batch_size))

    @property
    def measure(self) -> Measure | None:
        """How many examples a step takes, if it is not as many as the batch size says."""
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
        """The largest number of batches that a step can have, for any lengths of its examples.

        Args:
            examples: Examples of the step.
        """
        if self.lengths is None or not self.divides_itself:
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
            cycle: Index of the pass in its epoch.
        """
        return self._lengths_of(epoch, cycle)[start : start + examples]

    def parts(self, epoch: int, start: int, examples: int, batch_size: int, cycle: int = 0) -> list[Any]:
        """This process's micro-batches of a step, as positions in the step.

        Args:
            epoch: The epoch.
            start: Examples of the pass before the step.
            examples: Examples of the step.
            batch_size: The scheduled batch size.
            cycle: Index of the pass in its epoch.

        Returns:
            Slices; or arrays of ascending positions if the step is divided by length. The number is the same for every process;
            some may be empty.
        """
        if not self.divides_itself:
            return list(self.cut(examples, batch_size))
        tokens, most = self._bounds
        if tokens is None and self.cut.world_size == 1 and examples <= (most or examples):
            return [slice(0, examples)]  # one micro-batch, for any lengths
        lengths = self.step_lengths(epoch, start, examples, cycle)
        return micro_batches_by_length(lengths, self.cut.world_size, tokens, most)[self.cut.rank]

    def spare(self, epoch: int, start: int) -> int:
        """Number of a step's first examples that a process with an empty part repeats.

        Args:
            epoch: The epoch.
            start: Examples of the pass before the step.
        """
        return 1

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of this process, step by step, to the end of the pass."""
        # read the clock now, not when a worker fetches the first batch
        progress, consumed, start, cycle = self.clock(), self.consumed(), 0, 0
        if consumed is None:
            return self._steps(progress, 0, 0, 0, counts=False)
        while self.cycles and consumed > start:
            stretches = self._stretches(progress)
            taken = sum(stretch.examples for stretch in stretches)
            if consumed < start + taken:
                break
            start, cycle = start + taken, cycle + 1
            progress = progress.advance(taken, sum(stretch.steps for stretch in stretches))
        self.pass_start, self.cycle, self.handed_out, self.exhausted = start, cycle, consumed, False
        return self._steps(progress, cycle, start, consumed)

    def _steps(self, progress: Progress, cycle: int, start: int, consumed: int, counts: bool = True) -> Iterator[list[int]]:
        order: Any = self.order(progress.epoch, cycle)
        if not self.as_tensors:
            order = order.tolist() if isinstance(order, Tensor) else order
        elif not isinstance(order, Tensor):
            order = torch.tensor(order)
        position, batch_size, schedule, settled, measure = 0, 0, self.schedule, 0.0, self.measure
        end = self.length(progress)
        while position < end:
            if settled < 1 or schedule is not self.schedule:  # else the batch size cannot have changed
                schedule = self.schedule
                if measure is None:
                    batch_size = size_at(schedule, progress, len(order), batch_size or None)
                else:
                    total = measure.total(progress.epoch)
                    batch_size = size_at(schedule, progress, total, batch_size or None, measure.unit)
                settled = schedule.batch_steps_to_change(progress, batch_size)
            settled -= 1
            size = batch_size if measure is None else measure.take(progress.epoch, position, batch_size)
            step = order[position : min(position + size, end)]
            if not size or (self.drops_last and position + size > len(order)):
                break
            position += len(step)
            progress = progress.advance(len(step))
            if start + position <= consumed:
                continue
            if counts:
                self.handed_out = start + position
            for part in self.parts(progress.epoch, position - len(step), len(step), batch_size, cycle):
                # a process with an empty part must step with the others: it repeats examples, with weight 0
                if isinstance(part, slice):
                    yield step[part] if part.stop > part.start else step[: self.spare(progress.epoch, position - len(step))]
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
    """A placeholder for the attribute ``sampler`` of a loader with a ``GlobalBatchSampler``.

    It is a ``DistributedSampler`` by type, so Lightning does not replace it. It is never iterated.

    Args:
        data_source: The data set.
    """

    def __init__(self, data_source: Any) -> None:
        SequentialSampler.__init__(self, data_source)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the batch sampler reads the clock."""


def remade(loader: DataLoader[Any], batch_sampler: GlobalBatchSampler, generator: torch.Generator) -> DataLoader[Any]:
    """Copy a loader, with ``batch_sampler`` in place of its own. The original stays as it is.

    Args:
        loader: A loader over a map-style data set.
        batch_sampler: Yields the indices of the batches.
        generator: Seeds the workers if the loader has no generator, since an iterator must not draw from the global one.
    """
    # a copy, not a call of the constructor: a subclass may take other arguments than DataLoader
    other = copy.copy(loader)
    attributes = {"generator": loader.generator or generator, "batch_size": None, "drop_last": False, "_iterator": None}
    vars(other).update(batch_sampler=batch_sampler, sampler=ShareSampler(loader.dataset), **attributes)
    return other
