"""Small data sets whose examples know their index, and DataModules as people write them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_bsl import BatchSizeDataModule


def regression(number: int, features: int = 3, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Random features, a smooth function of them with noise, and the index of each example."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(number, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(number, 1, generator=generator, dtype=torch.float64) / 3
    y = x.sum(dim=1, keepdim=True).sin() + noise
    return TensorDataset(x.to(dtype), y.to(dtype), torch.arange(number))


def own(train: Dataset[Any], *others: Dataset[Any] | None, **arguments: Any) -> BatchSizeDataModule:
    """Our DataModule, which follows a schedule step by step."""
    return BatchSizeDataModule(train, *others, **{"seed": 1} | arguments)


class Stranger(LightningDataModule):
    """A DataModule that knows nothing of schedules, and keeps its batch size where most people do: in ``hparams``.

    Args:
        train: The training set.
        val: The validation set, if any.
        batch_size: Of training, and of validation where ``eval_batch_size`` is ``None``.
        eval_batch_size: Of validation and test.
        options: Further arguments of the training loader, such as ``shuffle``.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any] | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("batch_size")
        self.train, self.val, self.eval_batch_size, self.options = train, val, eval_batch_size, options

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=self.hparams.batch_size, **self.options)

    def val_dataloader(self) -> Any:
        if self.val is None:
            return []
        # an iterator would draw from the global generator
        generator = self.options.get("generator")
        return DataLoader(self.val, batch_size=self.eval_batch_size or self.hparams.batch_size, generator=generator)

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


class StrangerWithAttribute(Stranger):
    """Keeps its batch size in an attribute."""

    def __init__(self, *arguments: Any, batch_size: int = 16, **options: Any) -> None:
        super().__init__(*arguments, batch_size=batch_size, **options)
        self.batch_size = batch_size
        del self.hparams["batch_size"]

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=self.batch_size, **self.options)
