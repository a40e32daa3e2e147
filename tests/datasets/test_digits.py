"""The embedded digits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_bsl.datasets import Digits, ImageTensors


@pytest.fixture(scope="module")
def digits() -> tuple[ImageTensors, ImageTensors]:
    datamodule = Digits(batch_size=32)
    datamodule.prepare_data()
    datamodule.setup("fit")
    assert isinstance(datamodule.train_set, ImageTensors)
    assert isinstance(datamodule.val_set, ImageTensors)
    return datamodule.train_set, datamodule.val_set


def test_split(digits: tuple[ImageTensors, ImageTensors]) -> None:
    train, val = digits
    assert (len(train), len(val)) == (1440, 357)
    share = train.labels.bincount() / (train.labels.bincount() + val.labels.bincount())
    assert torch.allclose(share, torch.full((10,), 1440 / 1797), atol=0.005)  # stratified
    again = Digits(batch_size=8, seed=7)
    again.setup()
    assert torch.equal(again.train_set.images, train.images)  # type: ignore[union-attr]


def test_values(digits: tuple[ImageTensors, ImageTensors]) -> None:
    """Together the two parts are scikit-learn's set, 0..16 spread over 0..255."""
    found = torch.cat([part.images for part in digits])
    assert found.shape == (1797, 1, 8, 8)
    levels = (found.float() * 16 / 255).round()
    expected = torch.from_numpy(load_digits().images).float()
    assert torch.equal(levels.view(1797, -1).sum(1).sort().values, expected.view(1797, -1).sum(1).sort().values)
    assert found.max() == 255


def test_normalised(digits: tuple[ImageTensors, ImageTensors]) -> None:
    datamodule = Digits(batch_size=1440)
    trainer: Any = SimpleNamespace(training=True, current_epoch=0)
    datamodule.trainer = trainer
    images, _ = datamodule.on_after_batch_transfer(digits[0].__getitems__(range(1440)), 0)
    assert (images.mean().item(), images.std().item()) == pytest.approx((0, 1), abs=2e-3)


def test_known_without_loading() -> None:
    datamodule = Digits(batch_size=32)
    assert datamodule.num_train_examples == 1440
    assert not datamodule.augment
    assert datamodule.train_set is None
