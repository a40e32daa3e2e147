"""Steps of whole batches, as the batch sampler of a loader makes them."""

from __future__ import annotations

import bisect
from itertools import accumulate, chain, pairwise
from typing import Any, cast

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_bsl.data.orders import SamplerOrder
from lightning_bsl.data.sampler import GlobalBatchSampler
from lightning_bsl.schedules.plan import Measure, Stretch


class BatchOrder(SamplerOrder):
    """The order of the batches that a batch sampler gives.

    Args:
        batches: Any iterable of batches, each a list of indices.
        seed: Seed of every generator that it may draw from.
        first: The first epoch for which it is iterated.
        largest: Largest number of examples of a batch; with more, the batch is refused.
        fixed: Whether every epoch has the batches of epoch 0.
        most: Largest number of examples of an epoch; with more, the sampler is refused as endless.
    """

    def __init__(
        self, batches: Any, seed: int, first: int = 0, largest: int = 10**9, fixed: bool = False, most: int = 10**7
    ) -> None:
        super().__init__(batches, seed, first, most)
        self.largest, self.fixed = largest, fixed
        self._ends: list[int] = []  # of the batches of the current epoch
        self._indices: list[Any] = []

    def length(self, epoch: int) -> int:
        """Examples of one pass in ``epoch``."""
        return self.ends(epoch)[-1]

    def ends(self, epoch: int) -> list[int]:
        """For each batch of ``epoch`` the number of examples up to its end."""
        self(epoch)
        return self._ends

    def __call__(self, epoch: int, cycle: int = 0) -> list[Any]:
        """The indices of a pass, batch after batch.

        Raises:
            MisconfigurationException: There is no batch, or a batch with more than ``largest`` examples.
        """
        epoch = 0 if self.fixed else epoch
        if epoch != self._epoch:
            batches = super().__call__(epoch)
            sizes = [len(batch) for batch in batches]
            if not any(sizes):
                raise MisconfigurationException(f"the batch sampler {self._name} gave no examples in epoch {epoch}")
            if max(sizes) > self.largest:
                raise MisconfigurationException(
                    f"the batch sampler {self._name} gave a batch of {max(sizes)} examples in epoch {epoch}, but its batches "
                    f"count as {self.largest} examples: write `whole_batches={max(sizes)}`, or the size of its largest batch"
                )
            self._ends, self._indices = list(accumulate(size for size in sizes if size)), list(chain.from_iterable(batches))
        return self._indices

    def _take(self) -> tuple[list[Any], int]:
        """Copies of the batches, since a sampler may fill the same list again and again; and the number of examples."""
        batches: list[Any] = []
        number = 0
        for batch in self.sampler:
            batches.append(list(batch))
            number += len(batches[-1])
            if number > self.most:
                break
        return batches, number

    def _announced(self) -> None:
        """Ignore ``__len__``: that of a batch sampler is often an estimate, or fails, and nothing counts with it."""

    @property
    def _name(self) -> str:
        return type(self.sampler).__name__


class WholeBatchSampler(GlobalBatchSampler):
    """A batch sampler whose steps are whole batches of another batch sampler, in their order.

    A step of batch size B takes ``k = B / (m W)`` batches on each of W processes, where m is the largest size of a batch. Each
    batch is a micro-batch. A step has fewer than B examples if some of its batches have fewer than m.
    """

    @staticmethod
    def batches_of(loader: DataLoader[Any], seed: int, largest: int, first: int = 0, fixed: bool = False) -> BatchOrder:
        """The order of the batches of a loader.

        Args:
            loader: A loader with a batch sampler.
            seed: Seed of the random numbers that the batch sampler draws.
            largest: Largest number of examples of a batch, m.
            first: The first epoch for which it is iterated.
            fixed: Whether every epoch has the batches of the first.
        """
        batches, dataset = loader.batch_sampler, cast(Any, loader.dataset)
        if isinstance(batches, WholeBatchSampler):
            return batches.batches
        most = 100 * len(dataset) + 10**5 if hasattr(dataset, "__len__") else 10**7
        return BatchOrder(batches, seed, first, largest, fixed, most)

    @property
    def batches(self) -> BatchOrder:
        """The order of the batches."""
        return cast(BatchOrder, self.order)

    @property
    def together(self) -> int:
        """Examples of a batch on every process, m W."""
        return self.batches.largest * self.cut.world_size

    @property
    def divides_itself(self) -> bool:
        """Return ``True``: each batch is a micro-batch."""
        return True

    @property
    def measure(self) -> Measure:
        """How many examples the batches of a step have."""
        return Measure("examples", self._capacity, self._take)

    def measure_like(self, epoch: int) -> Measure:
        """The measure of a plan: every epoch has batches of the same sizes, since those of later epochs are not drawn yet.

        Args:
            epoch: The epoch that the others are like.
        """
        capacity = self._capacity(epoch)
        return Measure("examples", lambda _: capacity, lambda _, start, size: self._take(epoch, start, size))

    def _capacity(self, epoch: int) -> float:
        """The largest batch size of a step: that of all batches, if all had m examples."""
        return -(-len(self.batches.ends(epoch)) // self.cut.world_size) * self.together

    def _take(self, epoch: int, start: int, batch_size: int) -> int:
        ends = self.batches.ends(epoch)
        last = _at(ends, start) + self.most_batches(batch_size) * self.cut.world_size - 1
        return ends[min(last, len(ends) - 1)] - start

    def most_batches(self, examples: int) -> int:
        """The number of batches of a step on each process."""
        return -(-examples // self.together)

    def count_batches(self, stretch: Stretch, start: int, cycle: int = 0) -> int:
        """Number of this process's batches in the steps of a stretch."""
        count, ends = 0, self.batches.ends(stretch.start.epoch)
        for size, number in stretch.kinds():
            for _ in range(number):
                count += -(-len(_within(ends, start, start + size)) // self.cut.world_size)
                start += size
        return count

    def spare(self, epoch: int, start: int) -> int:
        """The examples of the step's first batch."""
        ends = self.batches.ends(epoch)
        return ends[_at(ends, start)] - start

    def parts(self, epoch: int, start: int, examples: int, batch_size: int, cycle: int = 0) -> list[Any]:
        """This process's batches of a step, as slices of the step; the last batch of a run may be cut.

        Every process has the same number of them. The last ones may be empty.
        """
        ends, stop = self.batches.ends(epoch), start + examples
        stops = [0, *(min(ends[i], stop) - start for i in _within(ends, start, stop))]
        parts = [slice(*pair) for pair in pairwise(stops)]
        processes = self.cut.world_size
        parts += [slice(examples, examples)] * (-len(parts) % processes)
        return parts[self.cut.rank :: processes]


def _at(ends: list[int], start: int) -> int:
    """Index of the batch that begins after the first ``start`` examples."""
    return bisect.bisect_right(ends, start)


def _within(ends: list[int], start: int, stop: int) -> range:
    """Indices of the batches that hold the examples from ``start`` to ``stop``."""
    return range(_at(ends, start), bisect.bisect_left(ends, stop) + 1)
