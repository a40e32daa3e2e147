"""The indices of the examples of each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lightning_bsl.schedules import JointSchedule, Progress
from lightning_bsl.schedules.functions import Function
from lightning_bsl.schedules.plan import runs, size_at


def epoch_generator(seed: int, epoch: int, stream: int = 0) -> torch.Generator:
    """A random generator that depends on (seed, epoch, stream) alone.

    Args:
        seed: The run's seed.
        epoch: The epoch.
        stream: One number for each use, so that two uses in an epoch are independent.
    """
    # mixed rather than added: seed 0 in epoch 1 must not be seed 1 in epoch 0
    state = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def share_of(examples: int, rank: int, world_size: int) -> slice:
    """The part of a step's examples that process ``rank`` of ``world_size`` takes; shares differ by at most one example."""
    return slice(rank * examples // world_size, (rank + 1) * examples // world_size)


@lru_cache(maxsize=256)  # asked at every step, nearly always for the same size
def micro_batches(examples: int, rank: int, world_size: int, max_device_batch_size: int | None) -> tuple[slice, ...]:
    """The parts of a step's examples that process ``rank`` puts through the model one after another.

    Every process has the same number of them, so that they can step together; a process with a smaller share may have an
    empty one.

    Args:
        examples: Examples of the step.
        rank: Index of the process.
        world_size: Number of processes.
        max_device_batch_size: Most examples of a micro-batch; ``None`` for no bound.
    """
    share = share_of(examples, rank, world_size)
    largest = -(-examples // world_size)
    count = -(-largest // (max_device_batch_size or largest))
    cuts = [share.start + i * (share.stop - share.start) // count for i in range(count + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(cuts))


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
        consumed: Returns how many of that epoch's examples are consumed already, where a run was resumed inside it.
        seed: Seed of the permutations.
        shuffle: Whether to permute at all.
        rank: Index of this process, which gets its share of each step.
        world_size: Number of processes.
        max_device_batch_size: Most examples of a micro-batch; a step has as many micro-batches as that takes.
        as_tensors: Whether to yield tensors instead of lists, for a data set whose ``__getitems__`` takes them.
        samples_per_epoch: Only that many examples, drawn anew each epoch without replacement (P4 trains Tiny-ImageNet on
            10,000 an epoch); all of them by default.

    Raises:
        ValueError: ``samples_per_epoch`` is not between 1 and ``num_examples``; when iterated, a batch size below 1 or above
            the examples of an epoch.

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
        consumed: Callable[[], int] = int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        max_device_batch_size: int | None = None,
        as_tensors: bool = False,
        samples_per_epoch: int | None = None,
    ) -> None:
        if samples_per_epoch is not None and not 1 <= samples_per_epoch <= num_examples:
            raise ValueError(
                f"`samples_per_epoch={samples_per_epoch}` must lie between 1 and the {num_examples} examples of the data set"
            )
        # neither `sampler` nor `batch_size` nor `drop_last` are attributes: Lightning rebuilds batch samplers that have them
        self.num_examples = num_examples
        self.schedule = JointSchedule(batch_size)
        self.clock = clock
        self.consumed = consumed
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.max_device_batch_size = max_device_batch_size
        self.as_tensors = as_tensors
        self.samples_per_epoch = samples_per_epoch or num_examples
        self.handed_out = 0  # examples of the epoch's steps that were asked for: workers ask ahead of what is trained

    def __len__(self) -> int:
        """Batches of the epoch: its steps, or their micro-batches."""
        return self.batches_in(self.samples_per_epoch)

    def batches_in(self, examples: int) -> int:
        """Batches that the epoch's steps over its first ``examples`` examples take."""
        count = 0
        for run in runs(self.schedule, self.clock(), self.samples_per_epoch):
            full, rest = divmod(min(run.examples, examples), run.batch_size)
            examples -= full * run.batch_size + rest
            count += full * len(self._micro_batches(run.batch_size)) + (len(self._micro_batches(rest)) if rest else 0)
        return count

    def _micro_batches(self, examples: int) -> tuple[slice, ...]:
        return micro_batches(examples, self.rank, self.world_size, self.max_device_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """The indices of this process, step by step."""
        self.handed_out = self.consumed()
        return self._steps(self.clock(), self.handed_out)  # the clock is read now, not when a worker asks for the first batch

    def _steps(self, progress: Progress, consumed: int) -> Iterator[list[int]]:
        order: Any = self._order(progress.epoch) if self.as_tensors else self.permutation(progress.epoch)
        position, batch_size = 0, None
        while position < len(order):
            batch_size = size_at(self.schedule, progress, len(order), batch_size)
            step = order[position : position + batch_size]
            position += len(step)
            progress = progress.advance(len(step))
            if position <= consumed:
                continue
            self.handed_out = position
            for part in self._micro_batches(len(step)):
                # a process without a share must step with the others all the same: it repeats an example, at weight 0
                yield step[part] if part.stop > part.start else step[:1]

    def permutation(self, epoch: int) -> list[int]:
        """The order of the examples in ``epoch``."""
        return self._order(epoch).tolist()

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.samples_per_epoch)
        return torch.randperm(self.num_examples, generator=epoch_generator(self.seed, epoch))[: self.samples_per_epoch]
