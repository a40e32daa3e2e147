from itertools import islice

import pytest
import torch
from torch.utils.data import TensorDataset

from harness.files import flat
from lightning_bsl.data import BatchSizeDataModule
from lightning_bsl.data.sampler import GlobalBatchSampler
from lightning_bsl.datasets import Digits
from lightning_bsl.population import PopulationData, PopulationSampler
from lightning_bsl.schedules import Progress


@pytest.mark.parametrize("start", [0, 3, 4, 11])
@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"samples_per_epoch": 7}])
def test_every_seed_has_the_order_it_has_alone(start: int, options: dict[str, int]) -> None:
    seeds, steps = [3, 0], 12  # several epochs of 4 or 3 steps, the last of each short
    alone = [
        flat(GlobalBatchSampler(10, 3, lambda epoch=epoch: Progress(epoch=epoch), seed=seed, **options) for epoch in range(9))
        for seed in seeds
    ]
    found = list(islice(PopulationSampler(10, seeds, 3, start=start, **options), steps))
    assert found == [flat(order[step] for order in alone) for step in range(start, start + steps)]


def test_a_row_is_the_batch_that_the_seed_has_alone() -> None:
    data, alone = PopulationData(Digits(), seeds=[5, 6], batch_size=3), Digits(batch_size=3, seed=6)
    alone.setup("fit")
    for batch, other in islice(zip(data.train_dataloader(), alone.train_dataloader()), 3):
        (images, labels), (theirs, their_labels) = (
            data.on_after_batch_transfer(batch, 0),
            alone.on_after_batch_transfer(other, 0),
        )
        assert (images.shape, labels.shape) == ((2, 3, 1, 8, 8), (2, 3))
        assert torch.equal(images[1], theirs) and torch.equal(labels[1], their_labels)


def test_the_probe_is_always_the_same() -> None:
    probes = [PopulationData(Digits(seed=seed), seeds, 4, probe=20).probe() for seed, seeds in ((0, [0]), (1, [7, 8]))]
    assert torch.equal(probes[0][0], probes[1][0]) and torch.equal(probes[0][1], probes[1][1])
    assert probes[0][0].shape == (20, 1, 8, 8)


def test_any_data_set_will_do() -> None:
    inner = BatchSizeDataModule(TensorDataset(torch.arange(10.0), torch.arange(10)))
    data = PopulationData(inner, seeds=[0, 1, 2], batch_size=5, probe=4)
    x, y = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert (x.shape, y.shape, data.probe()[0].shape) == ((3, 5), (3, 5), (4,))


@pytest.mark.parametrize("arguments, message", [
    ({"batch_size": 1441}, "`batch_size=1441` must lie between 1 and the 1440"),
    ({"batch_size": 0}, "`batch_size=0`"),
    ({"batch_size": 4, "probe": 2000}, "`probe=2000`"),
])  # fmt: skip
def test_refusals(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PopulationData(Digits(), [0], **arguments)


def test_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.augment=false"):
        PopulationData(Digits(augment=True), [0], 4)
