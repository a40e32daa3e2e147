"""The batches of a population: one batch for each seed, in the seed's own order of the examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Sampler

from lightning_bsl.data import BatchSizeDataModule
from lightning_bsl.data.datamodule import to_precision
from lightning_bsl.data.sampler import GlobalBatchSampler, epoch_generator
from lightning_bsl.schedules import Progress


class PopulationSampler(Sampler[list[int]]):
    """A batch sampler for S seeds: it yields the S * B indices of one step of all seeds.

    The order of each seed is that of a ``GlobalBatchSampler`` with this seed, epoch after epoch, without end.

    Args:
        num_examples: Examples of the data set.
        seeds: The S seeds of the orders.
        batch_size: B, examples of a step.
        samples_per_epoch: The same as for ``GlobalBatchSampler``.
        shuffle: The same as for ``GlobalBatchSampler``.
        start: Number of steps that are done already.

    Example:
        >>> step = next(iter(PopulationSampler(10, seeds=[0, 1], batch_size=3)))
        >>> len(step), len(set(step[:3])), step[3:] == next(iter(GlobalBatchSampler(10, 3, seed=1)))
        (6, 3, True)
    """

    def __init__(
        self,
        num_examples: int,
        seeds: Sequence[int],
        batch_size: int,
        *,
        samples_per_epoch: int | None = None,
        shuffle: bool = True,
        start: int = 0,
    ) -> None:
        self._arguments = (num_examples, batch_size)
        self._options: dict[str, Any] = {"samples_per_epoch": samples_per_epoch, "shuffle": shuffle}
        self.seeds = list(seeds)
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices, step by step."""
        examples, batch_size = self._options["samples_per_epoch"] or self._arguments[0], self._arguments[1]
        first, skipped = divmod(self.start, -(-examples // batch_size))
        for epoch in count(first):
            orders = [self._epoch(seed, epoch, skipped * batch_size if epoch == first else 0) for seed in self.seeds]
            for steps in zip(*orders, strict=True):
                yield [index for step in steps for index in step]

    def _epoch(self, seed: int, epoch: int, consumed: int) -> Iterator[list[int]]:
        clock, done = lambda: Progress(epoch=epoch), lambda: consumed
        return iter(GlobalBatchSampler(*self._arguments, clock, done, seed=seed, **self._options))


class PopulationData(LightningDataModule):
    """The training set of another DataModule, in batches ``[S, B, ...]`` for S seeds.

    Args:
        datamodule: Has the training set, and prepares batches for the model (``collate_fn``, ``on_after_batch_transfer``). It
            is set up here if it is not yet.
        seeds: Seeds of the orders: those of the population's replicas.
        batch_size: B, examples of a step.
        probe: Number of examples of the probe. On the probe losses are compared with their targets; all replicas have the same.

    Raises:
        ValueError: A batch or a probe larger than the examples of an epoch; a DataModule that augments images, since the
            replicas would not get their own random numbers.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> inner = BatchSizeDataModule(TensorDataset(torch.arange(100.0)))
        >>> data = PopulationData(inner, seeds=[0, 1, 2], batch_size=4, probe=10)
        >>> [list(tensor.shape) for tensor in data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)]
        [[3, 4]]
    """

    def __init__(self, datamodule: BatchSizeDataModule, seeds: Sequence[int], batch_size: int, probe: int = 100) -> None:
        super().__init__()
        if datamodule.train_set is None:
            datamodule.prepare_data()
            datamodule.setup("fit")
        most = datamodule.num_epoch_examples
        for name, value in (("batch_size", batch_size), ("probe", probe)):
            if not 1 <= value <= most:
                raise ValueError(f"`{name}={value}` must lie between 1 and the {most} examples of an epoch")
        if getattr(datamodule, "augment", False):
            raise ValueError(
                "`augment=True`: the replicas of a population train without augmentation: write `augment=False` "
                "(`data.augment=false` on the command line)"
            )
        self._inner = datamodule
        self.seeds = list(seeds)
        self.batch_size = batch_size
        self.probe_size = probe
        self.start = 0  # steps done before; a resumed population sets it

    def train_dataloader(self) -> DataLoader[Any]:
        """The training loader: each batch is one step of all seeds, without end."""
        inner = self._inner
        sampler = PopulationSampler(
            inner.num_train_examples,
            self.seeds,
            self.batch_size,
            samples_per_epoch=inner.samples_per_epoch,
            shuffle=inner.shuffle,
            start=self.start,
        )
        return DataLoader(inner.train_set, batch_sampler=sampler, collate_fn=inner.collate_fn, pin_memory=inner.pin_memory)  # type: ignore[arg-type]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn a batch of S * B examples into tensors ``[S, B, ...]``, as the model takes them."""
        batch = to_precision(self, self._inner.on_after_batch_transfer(batch, dataloader_idx))
        return tree_map(lambda leaf: leaf.unflatten(0, (len(self.seeds), -1)) if isinstance(leaf, Tensor) else leaf, batch)

    def probe(self) -> Any:
        """A batch of the examples of the probe, on the CPU."""
        inner = self._inner
        chosen = torch.randperm(inner.num_train_examples, generator=epoch_generator(0, 0, stream=2))[: self.probe_size]
        loader = DataLoader(inner.train_set, batch_sampler=[chosen.tolist()], collate_fn=inner.collate_fn)  # type: ignore[arg-type]
        return to_precision(self, inner.on_after_batch_transfer(next(iter(loader)), 0))
