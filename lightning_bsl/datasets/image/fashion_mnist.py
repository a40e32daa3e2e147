"""Fashion-MNIST, from its idx files."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import IO, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from lightning_bsl.datasets.files import broken, opened
from lightning_bsl.datasets.image.datamodule import ImageDataModule, Split, check_labels


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 + 10,000 grey images of 28x28, 10 classes.

    ``root`` is any folder with the four idx files, gzipped or not (as published, as in Debian's package
    ``dataset-fashion-mnist``), or the folder given to torchvision's class. Files with fewer images are read too.

    Raises:
        FileNotFoundError: When loading: a file is missing.
        ValueError: When loading: a file cannot be read, or is not of this data set.

    Example:
        >>> FashionMNIST(batch_size=64).num_train_examples
        60000
    """

    mean = (0.2860,)
    std = (0.3530,)
    num_classes = 10
    in_channels = 1
    image_size = 28
    train_size = 60_000

    _prefixes: ClassVar[dict[Split, str]] = {"train": "train", "val": "t10k"}
    _suffixes: ClassVar[tuple[str, str]] = ("images-idx3-ubyte", "labels-idx1-ubyte")

    def locate(self) -> Path:
        """Return the folder that holds the four idx files."""
        names = [f"{prefix}-{suffix}" for prefix in self._prefixes.values() for suffix in self._suffixes]
        folders = (self.root, self.root / "FashionMNIST" / "raw", self.root / "raw")
        missing = {folder: [name for name in names if not _packed_or_not(folder / name).is_file()] for folder in folders}
        folder = min(folders, key=lambda folder: len(missing[folder]))  # the first of those that lack least
        if missing[folder]:
            raise self._missing(", ".join(missing[folder]) + " (or .gz)", folder)
        return folder

    def fetch(self) -> None:
        """Download with torchvision."""
        datasets.FashionMNIST(self.root, download=True)

    def count(self) -> int:
        """Return the number of training images that the header of their file says."""
        images, _ = self._paths("train")
        with opened(images) as file:
            return _read_header(file, images, 3)[0]

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read the idx files of a split."""
        paths = self._paths(split)
        pixels, labels = (torch.from_numpy(_read_idx(path, dimensions)) for path, dimensions in zip(paths, (3, 1)))
        if tuple(pixels.shape[1:]) != (self.image_size, self.image_size):
            raise broken(
                paths[0],
                f"has images of {pixels.shape[1]}x{pixels.shape[2]}, not {self.image_size}x{self.image_size}",
                "bring the file of Fashion-MNIST",
            )
        if not len(pixels) or len(pixels) != len(labels):
            raise broken(
                paths[0],
                f"has {len(pixels):,} images and {paths[1].name} has {len(labels):,} labels",
                "bring both from one copy of the data set",
            )
        labels = labels.long()
        check_labels(labels, self.num_classes, paths[1])
        return pixels.unsqueeze(1), labels

    def _paths(self, split: Split) -> tuple[Path, Path]:
        """The files of the images and of the labels."""
        folder = self.locate()
        images, labels = (_packed_or_not(folder / f"{self._prefixes[split]}-{suffix}") for suffix in self._suffixes)
        return images, labels


_MOST, _MOST_WIDE = 10_000_000, 1000  # records, and their height and width: a header that says more is damaged


def _packed_or_not(path: Path) -> Path:
    """The file, or the gzipped one where there is no other."""
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _read_header(file: IO[bytes], path: Path, dimensions: int) -> tuple[int, ...]:
    """Read the lengths of the dimensions: big-endian integers, after two zeros, the type (8: a byte) and their number."""
    header = file.read(4 * (dimensions + 1))
    if header[:4] != bytes((0, 0, 8, dimensions)):
        contents = {bytes((0, 0, 8, 1)): "labels", bytes((0, 0, 8, 3)): "images"}.get(header[:4], "other data")
        wanted = "images" if dimensions == 3 else "labels"
        raise broken(path, f"is no idx file of {wanted}, but holds {contents}", f"bring the file of {wanted}")
    if len(header) < 4 * (dimensions + 1):
        raise broken(path, "is cut short within its header")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if shape[0] > _MOST or max(shape[1:], default=0) > _MOST_WIDE:
        lengths = " x ".join(f"{length:,}" for length in shape)
        raise broken(path, f"says in its header that it has {lengths} values, which no such file has")
    return shape


def _read_idx(path: Path, dimensions: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with opened(path) as file:
        shape = _read_header(file, path, dimensions)
        expected, contents = math.prod(shape), bytearray()  # writable, as torch wants it
        while len(contents) <= expected and (part := file.read(1 << 20)):  # never what a false header or file asks for
            contents += part
        more = len(contents) > expected and bool(file.read(1))
    if len(contents) != expected:
        whole = "" if more else f": {len(contents) // (math.prod(shape[1:]) or 1):,} whole records of {shape[0]:,}"
        found = f"{len(contents):,}{' or more' * more}"
        raise broken(path, f"has {found} bytes of data where its header says {expected:,}{whole}")
    return np.frombuffer(contents, np.uint8).reshape(shape)
