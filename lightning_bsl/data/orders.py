"""The order in which a loader takes its examples, as a function of the epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning_bsl.data.sampler import GlobalBatchSampler, Order, Permutation


def order_of(loader: DataLoader[Any], seed: int, overfit: bool = False, asked_at: int = 0) -> Order:
    """The order in which a loader would take its examples, resumable.

    Args:
        loader: A loader that can be re-made.
        seed: Seed of permutations, and of what a sampler draws.
        overfit: Whether a few batches are to be overfitted, which must be the same in every epoch.
        asked_at: The epoch in which the loader was made.
    """
    batches = cast(Any, loader.batch_sampler)
    if isinstance(batches, GlobalBatchSampler):
        return batches.order
    sampler, number = batches.sampler, len(cast(Sized, loader.dataset)) if hasattr(loader.dataset, "__len__") else 0
    if type(sampler) is SequentialSampler or overfit:
        return Permutation(number, shuffle=False)
    # one for each process is one for all: ours gives every process its share
    if type(sampler) is DistributedSampler:
        return Permutation(number, seed, sampler.shuffle)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == number:
        own = sampler.generator
        return Permutation(number, seed if own is None else own.initial_seed())
    return SamplerOrder(sampler, seed, asked_at)


class SamplerOrder:
    """The order of a sampler that the user gave: asked once an epoch (once a pass beside a longer loader), under our seed.

    A sampler may count how often it was asked. A resumed run asks it for the epochs before, too.

    Args:
        sampler: Any iterable of indices. If it has ``set_epoch``, that is called.
        seed: Seeds every generator that it may draw from: the global ones, and those that it holds.
        first: The first epoch that it is asked for.
    """

    def __init__(self, sampler: Any, seed: int, first: int = 0) -> None:
        self.sampler, self.seed = sampler, seed
        self._next = first
        self._epoch = -1
        self._passes: list[list[Any]] = []  # of the epoch at hand
        self.first: list[Any] = []  # what it gave first

    def length(self, epoch: int) -> int:
        """Examples of one pass in ``epoch``."""
        return len(self(epoch))

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
            self._passes.append(self._ask(epoch, len(self._passes)))
            if len(self._passes[-1]) != len(self._passes[0]):
                raise MisconfigurationException(
                    f"the sampler {type(self.sampler).__name__} gave {len(self._passes[0])} examples, and then "
                    f"{len(self._passes[-1])} in the same epoch: give as many in each pass of an epoch"
                )
        return self._passes[cycle]

    def _ask(self, epoch: int, cycle: int) -> list[Any]:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        with isolate_rng(), _seeded(self.sampler, [self.seed, epoch, 3, cycle]):
            indices = list(self.sampler)
        self.first = self.first or indices
        return indices


@contextmanager
def _seeded(sampler: Any, entropy: list[int]) -> Iterator[None]:
    """Seed the global generators, and for a while those that a sampler holds."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    with ExitStack() as undo:
        for own in _generators(sampler):
            if isinstance(own, torch.Generator):
                undo.callback(own.set_state, own.get_state())
                own.manual_seed(seed ^ (own.initial_seed() % 2**63))
            elif isinstance(own, np.random.Generator):
                bits = own.bit_generator
                undo.callback(setattr, bits, "state", bits.state)
                bits.state = type(bits)(seed).state
            elif isinstance(own, np.random.RandomState):
                undo.callback(own.set_state, own.get_state())
                own.seed(seed % 2**32)
            else:
                undo.callback(own.setstate, own.getstate())
                own.seed(seed)
        yield


def _generators(sampler: Any) -> Iterator[Any]:
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    for value in getattr(sampler, "__dict__", {}).values():
        if isinstance(value, kinds):
            yield value
        elif isinstance(value, Sampler):
            yield from _generators(value)
