"""The order in which a loader reads its examples, as a function of the epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning_bsl.data.sampler import GlobalBatchSampler, Order, Permutation


def order_of(loader: DataLoader[Any], seed: int, overfit: bool = False, asked_at: int = 0, world_size: int = 1) -> Order:
    """The order in which a loader would read its examples. A run can resume inside an epoch of this order.

    Args:
        loader: A loader that can be re-made.
        seed: Seed of the permutations, and of the random numbers that a sampler draws.
        overfit: Whether the run overfits a few batches, which must be the same in every epoch.
        asked_at: The epoch in which the loader was made.
        world_size: Number of processes that share each step.
    """
    batches = cast(Any, loader.batch_sampler)
    if isinstance(batches, GlobalBatchSampler):
        return batches.order
    sampler, dataset = batches.sampler, cast(Any, loader.dataset)

    def number() -> int:
        return len(dataset)

    if overfit:
        return Permutation(number, shuffle=False)
    kind, source = type(sampler), getattr(sampler, "dataset", getattr(sampler, "data_source", None))
    if hasattr(dataset, "__len__") and source is not None and len(source) == number():
        if kind is SequentialSampler:
            return Permutation(number, shuffle=False)
        # a DistributedSampler has one part of the data per process; here one permutation serves all, and is shared later
        if kind is DistributedSampler and sampler.num_replicas == world_size:
            return Permutation(number, seed, sampler.shuffle)
        if kind is RandomSampler and not sampler.replacement and sampler.num_samples == number():
            generator = sampler.generator
            return Permutation(number, seed if generator is None else generator.initial_seed())
    return SamplerOrder(sampler, seed, asked_at, 100 * number() + 10**5 if hasattr(dataset, "__len__") else 10**7)


class SamplerOrder:
    """The order of a sampler that the user gave.

    The sampler is iterated once per epoch, or once per pass if another loader is longer, with a seed that depends on the epoch.
    It is iterated as late as a loader would do it, so changes that hooks make to it between epochs have an effect. A resumed
    run iterates it for the past epochs too, since it may count its iterations. A sampler whose order depends on the training
    itself must save its own state; it resumes exactly only from the end of an epoch.

    Args:
        sampler: Any iterable of indices. If it has a method ``set_epoch``, this is called.
        seed: Seed of every generator that it may draw from: the global ones, and its own.
        first: The first epoch for which it is iterated.
        most: Largest number of indices of an epoch; with more, the sampler is refused as endless.
    """

    def __init__(self, sampler: Any, seed: int, first: int = 0, most: int = 10**7) -> None:
        self.sampler, self.seed, self.most = sampler, seed, most
        self._next = first
        self._epoch = -1
        self._passes: list[list[Any]] = []  # of the current epoch

    def length(self, epoch: int) -> int:
        """Examples of one pass in ``epoch``: the sampler's ``__len__``. Without one, the sampler is iterated."""
        if epoch == self._epoch or not hasattr(self.sampler, "__len__"):
            return len(self(epoch))
        self._tell(epoch)
        return len(self.sampler)

    def __call__(self, epoch: int, cycle: int = 0) -> list[Any]:
        """The indices of a pass.

        Raises:
            MisconfigurationException: A pass of an epoch is longer or shorter than its first.
        """
        if epoch != self._epoch:
            for missed in range(self._next, epoch):
                self._ask(missed, 0)
            self._epoch, self._passes, self._next = epoch, [], epoch + 1
        while len(self._passes) <= cycle:
            length = None if self._passes else self._announced()
            self._passes.append(self._ask(epoch, len(self._passes)))
            if length not in (None, len(self._passes[0])):
                raise MisconfigurationException(
                    f"the sampler {type(self.sampler).__name__} has a `__len__` of {length}, but gave {len(self._passes[0])} "
                    f"examples in epoch {epoch}: correct its `__len__`, or leave it out"
                )
            if len(self._passes[-1]) != len(self._passes[0]):
                raise MisconfigurationException(
                    f"the sampler {type(self.sampler).__name__} gave {len(self._passes[0])} examples, and then "
                    f"{len(self._passes[-1])} in another pass of epoch {epoch}: give the same number in every pass of an epoch"
                )
        return self._passes[cycle]

    def _take(self) -> tuple[list[Any], int]:
        """What the sampler gives, and the number of examples; it ends with more than ``most``."""
        indices = list(islice(self.sampler, self.most + 1))
        return indices, len(indices)

    def _announced(self) -> int | None:
        return len(self.sampler) if hasattr(self.sampler, "__len__") else None

    def _ask(self, epoch: int, cycle: int) -> list[Any]:
        self._tell(epoch)
        with isolate_rng(), _seeded(self.sampler, [self.seed, epoch, 3, cycle]):
            indices, number = self._take()
        if number > self.most:
            raise MisconfigurationException(
                f"the sampler {type(self.sampler).__name__} gave more than {self.most} examples in epoch {epoch} and seems to "
                "have no end: let its `__iter__` stop at the end of an epoch"
            )
        return indices

    def _tell(self, epoch: int) -> None:
        # a batch sampler may be told the epoch through the sampler inside it, as Lightning does
        samplers: list[Any] = [self.sampler, getattr(self.sampler, "sampler", None)]
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


@contextmanager
def _seeded(sampler: Any, entropy: list[int]) -> Iterator[None]:
    """Seed the global generators, and those of a sampler until the context ends."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    with ExitStack() as undo:
        for generator in _generators(sampler):
            if isinstance(generator, torch.Generator):
                undo.callback(generator.set_state, generator.get_state())
                generator.manual_seed(seed ^ (generator.initial_seed() % 2**63))
            elif isinstance(generator, np.random.Generator):
                bits = generator.bit_generator
                undo.callback(setattr, bits, "state", bits.state)
                bits.state = type(bits)(seed).state
            elif isinstance(generator, np.random.RandomState):
                undo.callback(generator.set_state, generator.get_state())
                generator.seed(seed % 2**32)
            else:
                undo.callback(generator.setstate, generator.getstate())
                generator.seed(seed)
        yield


def _generators(sampler: Any) -> Iterator[Any]:
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    for value in getattr(sampler, "__dict__", {}).values():
        if isinstance(value, kinds):
            yield value
        elif isinstance(value, Sampler):
            yield from _generators(value)
