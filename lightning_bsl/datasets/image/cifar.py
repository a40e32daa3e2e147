"""CIFAR-10 and CIFAR-100, from their pickles."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar, Literal

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
        is_whole = labels.dtype != torch.bool and not labels.is_floating_point()
        if not is_whole or not len(pixels) or len(labels) != len(pixels):
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


class _DType:
    """The type of an array in a pickle, as long as it is one of numbers."""

    def __init__(self, name: str, *_: object) -> None:
        self.name: str = name
        self.order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def array(self, raw: Any, shape: Any, order: Literal["F", "C"]) -> np.ndarray[Any, Any]:
        """An array of this type; ``raw`` holds it as bytes, or as the text that bytes of Python 2 are read as."""
        dtype = np.dtype(str(self.name))
        if dtype.kind not in "biufSU":
            raise pickle.UnpicklingError(f"it has an array of {dtype}, not of numbers or text")
        data = raw.encode("latin-1") if isinstance(raw, str) else raw
        values = np.frombuffer(data, dtype.newbyteorder("=" if self.order == "|" else self.order))
        array: np.ndarray[Any, Any] = values.astype(dtype).reshape(shape, order=order)
        return array


class _Array:
    """An array in a pickle, which is empty until its contents come."""

    values: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, by_columns, raw = state
        # of objects of Python, such as the names of files, it has a list
        self.values = raw if isinstance(raw, list) else dtype.array(raw, shape, "F" if by_columns else "C")


class _ArraysOnly(pickle._Unpickler):
    """Unpickles arrays, numbers and text. A pickle may otherwise call any function.

    Nothing of NumPy is called as the file says: an array whose type is of objects would be made of addresses in memory. The
    unpickler is that of Python's library which is written in Python: the one in C takes as much memory as the file says.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for what a pickle refers to, if it is of an array."""
        function = name if module in ("numpy.core.multiarray", "numpy._core.multiarray") else f"{module}.{name}"
        match function:
            case "numpy.dtype":
                return _DType
            case "numpy.ndarray":
                return _Array  # only an argument of the next
            case "_reconstruct":
                return lambda *_: _Array()
            case "scalar":
                return lambda dtype, raw: dtype.array(raw, (), "C").item()
            case "numpy.core.numeric._frombuffer" | "numpy._core.numeric._frombuffer":
                return lambda raw, dtype, shape, order: dtype.array(raw, shape, order)
            case "_codecs.encode":
                return lambda text, _: text.encode("latin-1")
            case "builtins.bytes" | "__builtin__.bytes":
                return lambda: b""  # Python 3 writes empty ones so
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}, which data do not need: do not trust this file")


def _unpickled(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            batch = _ArraysOnly(io.BytesIO(file.read()), encoding="latin1").load()
    except (OSError, pickle.UnpicklingError) as error:
        raise broken(path, error) from error
    except Exception as error:  # of bytes that are no pickle, or of half a one, come errors of a dozen kinds
        raise broken(path, "cannot be read (it is no pickle of arrays, or is cut short)") from error
    entries = batch if isinstance(batch, dict) else {None: batch}
    entries = {key: value.values if isinstance(value, _Array) else value for key, value in entries.items()}
    return entries if isinstance(batch, dict) else entries[None]
