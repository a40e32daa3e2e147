"""The handwritten digits that scikit-learn carries with it: a data set without files, for tests and first steps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_bsl.datasets.image.datamodule import ImageDataModule, Split


class Digits(ImageDataModule):
    """The test set of UCI's optical digits: 1,440 + 357 grey images of 8x8, 10 classes, split stratified and fixed.

    Example:
        >>> data = Digits(batch_size=64)
        >>> data.setup("fit")
        >>> len(data.train_set), len(data.val_set)
        (1440, 357)
    """

    mean = (0.3053,)
    std = (0.3759,)
    num_classes = 10
    in_channels = 1
    image_size = 8
    train_size = 1440
    padding = 1

    def locate(self) -> Path:
        """Return ``root``, which is not used."""
        return self.root

    def fetch(self) -> None:
        """Do nothing: the data come with scikit-learn."""

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return a split, its values 0..16 spread over 0..255."""
        # Imported here: a second that the users of other data sets need not wait.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=357, stratify=digits.target, random_state=0)
        images, labels = parts[0::2] if split == "train" else parts[1::2]
        pixels = (torch.from_numpy(images) * (255 / 16)).round().to(torch.uint8)
        return pixels.unsqueeze(1), torch.from_numpy(labels).long()
