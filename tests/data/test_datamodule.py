from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from harness.files import flat
from harness.fits import trained
from harness.modules import Recorder
from lightning_bsl import BatchLRScheduler, BatchSizeDataModule


class Words(Dataset[str]):
    """A stranger's set: strings, which the default collation would not make a tensor of."""

    def __init__(self, size: int) -> None:
        self.words = [chr(97 + i % 26) * (1 + i % 3) for i in range(size)]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> tuple[int, str]:
        return index, self.words[index]


def collate(examples: list[tuple[int, str]]) -> dict[str, Any]:
    indices, words = zip(*examples)
    return {"length": torch.tensor([[float(len(word))] for word in words]), "index": torch.tensor(indices)}


class Lengths(Recorder):
    """Also notes what it is validated with."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))
        self.seen_in_validation: list[int] = []

    @property
    def epochs(self) -> list[list[list[int]]]:
        """The batches of each epoch."""
        return [[batch.examples for batch in self.journal if batch.epoch == epoch] for epoch in range(len(self.announced))]

    def batch(self, batch: dict[str, Tensor]) -> list[Tensor]:
        return list(batch.values())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["length"]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen_in_validation += batch["index"].tolist()


def fit(datamodule: BatchSizeDataModule, *callbacks: Any, epochs: int = 3) -> Lengths:
    return trained(Lengths(), datamodule, *callbacks, max_epochs=epochs)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_strangers_sets_without_the_callback(workers: int) -> None:
    datamodule = BatchSizeDataModule(
        Words(23), Words(7), batch_size=5, eval_batch_size=4, collate_fn=collate, num_workers=workers, seed=3
    )
    model = fit(datamodule)
    orders = [flat(epoch) for epoch in model.epochs]
    assert [[len(batch) for batch in epoch] for epoch in model.epochs] == [[5, 5, 5, 5, 3]] * 3
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert model.seen_in_validation == list(range(7)) * 3
    # the same seed gives the same order again, another seed another one
    again = fit(BatchSizeDataModule(Words(23), batch_size=5, collate_fn=collate, seed=3))
    other = fit(BatchSizeDataModule(Words(23), batch_size=5, collate_fn=collate, seed=4))
    assert again.epochs == model.epochs != other.epochs


def test_with_the_callback() -> None:
    datamodule = BatchSizeDataModule(Words(23), batch_size=5, collate_fn=collate)
    model = fit(datamodule, BatchLRScheduler(lambda progress: 2 + progress.step))
    assert [[len(batch) for batch in epoch] for epoch in model.epochs] == [[2, 3, 4, 5, 6, 3], [8, 9, 6], [11, 12]]
    assert all(sorted(flat(epoch)) == list(range(23)) for epoch in model.epochs)


def test_a_fit_without_the_callback_after_one_with_it() -> None:
    datamodule = BatchSizeDataModule(Words(23), batch_size=5, collate_fn=collate)
    fit(datamodule, BatchLRScheduler(7))
    model = fit(datamodule)
    assert [[len(batch) for batch in epoch] for epoch in model.epochs] == [[5, 5, 5, 5, 3]] * 3
    assert len({tuple(flat(epoch)) for epoch in model.epochs}) == 3


def test_sets_made_in_setup() -> None:
    class Late(BatchSizeDataModule):
        def setup(self, stage: str) -> None:
            self.train_set = Words(6)

    model = fit(Late(batch_size=4, collate_fn=collate, shuffle=False), epochs=1)
    assert model.epochs == [[[0, 1, 2, 3], [4, 5]]]


def test_the_train_loader_is_the_same_object_every_time() -> None:
    datamodule = BatchSizeDataModule(Words(10))
    assert datamodule.train_dataloader() is datamodule.train_dataloader()


def test_evaluation_loaders() -> None:
    datamodule = BatchSizeDataModule(Words(10), Words(5), Words(3), eval_batch_size=2, collate_fn=collate)
    for loader, size in ((datamodule.val_dataloader(), 5), (datamodule.test_dataloader(), 3)):
        assert isinstance(loader, DataLoader)
        assert [index for batch in loader for index in batch["index"].tolist()] == list(range(size))
    assert BatchSizeDataModule(Words(10)).val_dataloader() == []


def test_making_an_iterator_leaves_the_global_generator_alone() -> None:
    datamodule = BatchSizeDataModule(Words(10), batch_size=4, collate_fn=collate)
    before = torch.get_rng_state()
    list(datamodule.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class LongStream(Stream):
    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize("stream", [Stream, LongStream])
def test_a_stream_cannot_be_planned(stream: type[Stream]) -> None:
    with pytest.raises(TypeError, match=rf"{stream.__name__} has no length.*wrap a map-style data set"):
        BatchSizeDataModule(stream()).train_dataloader()


def test_no_training_set() -> None:
    with pytest.raises(ValueError, match="no training set; give `train`, or set `train_set` in `setup`"):
        BatchSizeDataModule().train_dataloader()


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size"])
@pytest.mark.parametrize("value", [0, -8])
def test_sizes_below_one(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"`{name}={value}` must be 1 or more"):
        BatchSizeDataModule(Words(10), **{name: value})


@pytest.mark.parametrize("samples", [0, -1, 11])
def test_samples_per_epoch_out_of_range(samples: int) -> None:
    message = rf"`samples_per_epoch={samples}` must "
    with pytest.raises(ValueError, match=message):
        BatchSizeDataModule(Words(10), batch_size=4, samples_per_epoch=samples).train_dataloader()
    with pytest.raises(ValueError, match=message):
        fit(BatchSizeDataModule(Words(10), batch_size=4, samples_per_epoch=samples), BatchLRScheduler(4))


def test_samples_per_epoch() -> None:
    model = fit(BatchSizeDataModule(Words(23), collate_fn=collate, samples_per_epoch=10), BatchLRScheduler(4))
    assert [[len(batch) for batch in epoch] for epoch in model.epochs] == [[4, 4, 2]] * 3
    assert len({frozenset(flat(epoch)) for epoch in model.epochs}) == 3


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_workers_may_be_started_in_another_way(workers: int) -> None:
    dataset = TensorDataset(torch.arange(5))
    loader = BatchSizeDataModule(
        dataset, batch_size=2, shuffle=False, num_workers=workers, multiprocessing_context="forkserver"
    ).train_dataloader()
    assert [batch[0].tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
    loader._iterator = None  # ends its workers at once; the collector would take seconds for each
