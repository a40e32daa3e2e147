"""CIFAR-10 and CIFAR-100, from their pickles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from lightning_bsl.datasets.files import broken, listing
from lightning_bsl.datasets.image.datamodule import ImageDataModule, Split, check_labels


class CIFAR10(ImageDataModule):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32, 10 classes.

    ``root`` is the folder that holds ``cifar-10-batches-py``, as for torchvision's class, or that folder itself. A file with
    as many images as published must have the published checksum; files with fewer images are read too. Nothing but arrays,
    numbers and text is unpickled, so no code in a file is run.

    Raises:
        FileNotFoundError: When loading: a file is missing.
        ValueError: When loading: a file cannot be read, or is not of this data set.

    Example:
        >>> CIFAR10(batch_size=128).augment
        True
    """

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    num_classes = 10
    in_channels = 3
    image_size = 32
    train_size = 50_000
    augment_by_default = True

    _source: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10  # names and checksums of the files
    _labels: ClassVar[str] = "labels"

    def locate(self) -> Path:
        """Return the folder that holds torchvision's folder."""
        name = self._source.base_folder
        root = self.root.parent if self.root.name == name else self.root
        names = [entry[0] for entry in (*self._source.train_list, *self._source.test_list)]
        missing = [f"{name}/{file}" for file in names if not (root / name / file).is_file()]
        if missing:
            raise self._missing(", ".join(missing), root / name if (root / name).is_dir() else root)
        return root

    def fetch(self) -> None:
        """Download with torchvision."""
        self._source(self.root, download=True)

    def count(self) -> int:
        """Return the number of training images in the pickles."""
        return sum(len(labels) for _, labels in self._batches("train"))

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read the pickles of a split."""
        images, labels = zip(*self._batches(split))
        return torch.cat(images).view(-1, self.in_channels, self.image_size, self.image_size), torch.cat(labels)

    def _batches(self, split: Split) -> list[tuple[Tensor, Tensor]]:
        """Images ``[n, 3072]`` and labels ``[n]`` of each file."""
        folder = self.locate() / self._source.base_folder
        entries = self._source.train_list if split == "train" else self._source.test_list
        published = (self.train_size if split == "train" else 10_000) // len(entries)
        return [self._batch(folder / name, md5, published) for name, md5 in entries]

    def _batch(self, path: Path, md5: str, published: int) -> tuple[Tensor, Tensor]:
        batch = _unpickled(path)
        missing = [key for key in ("data", self._labels) if not isinstance(batch, dict) or key not in batch]
        other = f"bring the file of {type(self).__name__}"
        if missing:
            there = listing(map(str, batch)) if isinstance(batch, dict) else f"is of type {type(batch).__name__}"
            raise broken(path, f"has no {' and no '.join(map(repr, missing))}, but {there}", other)
        pixels, size = batch["data"], self.in_channels * self.image_size**2
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != size:
            form = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise broken(path, f"has images of another form: {form}, not uint8 [n, {size}]", other)
        try:
            labels = torch.from_numpy(np.asarray(batch[self._labels])).flatten()
        except (TypeError, ValueError):  # of several lengths, or no numbers
            labels = torch.zeros(0)
        if labels.is_floating_point() or labels.is_complex() or not len(pixels) or len(labels) != len(pixels):
            raise broken(path, f"has {len(pixels):,} images and {len(labels):,} labels that are whole numbers", other)
        labels = labels.long()
        check_labels(labels, self.num_classes, path)
        if len(pixels) == published and not check_integrity(str(path), md5):
            raise broken(path, f"has {published:,} images as published, but not the published checksum: it is damaged")
        return torch.from_numpy(np.ascontiguousarray(pixels)), labels


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32, 100 classes.

    ``root`` is the folder that holds ``cifar-100-python``, as for torchvision's class, or that folder itself. Mean and
    deviation are those of Umeda & Iiduka 2025 (arXiv 2409.08770). Else as [`CIFAR10`][lightning_bsl.datasets.CIFAR10].

    Example:
        >>> CIFAR100(batch_size=128).num_classes
        100
    """

    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    num_classes = 100

    _source = datasets.CIFAR100
    _labels = "fine_labels"


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, numbers and text. A pickle may otherwise call any function."""

    _allowed: ClassVar[set[str]] = {"numpy.ndarray", "numpy.dtype", "_codecs.encode", "builtins.bytes", "__builtin__.bytes"} | {
        f"numpy.{core}.{name}"
        for core in ("core", "_core")  # before NumPy 2, and since
        for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle refers to, if it is of an array."""
        if f"{module}.{name}" not in self._allowed:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which data do not need: do not trust this file")
        return super().find_class(module, name)


def _unpickled(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except Exception as error:  # of bytes that are no pickle, or of half a one, come errors of a dozen kinds
        raise broken(path, error) from error
