"""Image data sets held in memory as bytes; whole batches are augmented and normalised on the model's device."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import pickle
import shutil
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import download_and_extract_archive

from lightning_bsl.data.datamodule import BatchSizeDataModule, to_precision
from lightning_bsl.data.sampler import epoch_generator

Split = Literal["train", "val"]
RawBatch = tuple[Tensor, Tensor, Tensor]
_Files = dict[Split, list[tuple[str, int]]]  # path inside the folder, label

_CHUNK = 256  # images augmented at once on a CPU, so that the intermediate results stay in its caches


class ImageTensors(Dataset[RawBatch]):
    """Images and labels in memory; one gather makes a whole batch.

    Args:
        images: uint8 ``[n, C, H, W]``.
        labels: int64 ``[n]``.

    Raises:
        ValueError: If dtypes or shapes are others.

    Example:
        >>> data = ImageTensors(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5))
        >>> images, labels, indices = data.__getitems__([3, 1])
        >>> images.shape, labels.tolist(), indices.tolist()
        (torch.Size([2, 1, 8, 8]), [3, 1], [3, 1])
    """

    takes_tensors: ClassVar[bool] = True  # of indices: a list of them costs more than the gather

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; give torch.uint8 [n, C, H, W]")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels are {labels.dtype} {list(labels.shape)}; give torch.int64 [{len(images)}], one label an image"
            )
        self.images = images.contiguous()
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> RawBatch:
        """Return image ``[C, H, W]``, label ``[]`` and index ``[]``."""
        return self.images[index], self.labels[index], torch.tensor(index)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> RawBatch:
        """Return images ``[B, C, H, W]``, labels ``[B]`` and indices ``[B]``."""
        rows = torch.as_tensor(indices)
        return self.images.index_select(0, rows), self.labels.index_select(0, rows), rows


def identity(batch: RawBatch) -> RawBatch:
    """Collate nothing: ``ImageTensors`` returns whole batches."""
    return batch


def epoch_randoms(n: int, seed: int, epoch: int) -> Tensor:
    """Draw the uniform random numbers of every example's augmentation, whichever batch or process it ends up in.

    Args:
        n: Number of examples.
        seed: Seed of the run.
        epoch: Epoch.

    Returns:
        float32 ``[n, 4]`` in ``[0, 1)``, a function of the arguments alone.

    Example:
        >>> bool((epoch_randoms(3, 0, 1) == epoch_randoms(3, 0, 1)).all())
        True
    """
    return torch.rand(n, 4, generator=epoch_generator(seed, epoch, stream=1))  # stream 0 is the sampler's permutation


def crop_flip_rotate(images: Tensor, randoms: Tensor, padding: int = 4, degrees: float = 15.0) -> Tensor:
    """Crop, flip and rotate every image by random numbers of its own: the augmentation of P1, in one resampling.

    Equal to torchvision's ``RandomCrop(size, padding)``, ``RandomHorizontalFlip()`` and ``RandomRotation(degrees)`` one
    after the other (nearest neighbour, zeros outside), but for pixels on a rounding tie. Own code because library
    transforms either work image by image or draw from a global generator in the order of the batches.

    Args:
        images: uint8 or float ``[B, C, H, W]``.
        randoms: ``[B, 4]`` uniform in ``[0, 1)``: left and top of the crop, flip, angle.
        padding: Pixels of zero padding on each side before the crop.
        degrees: Largest angle, either way.

    Returns:
        float32 ``[B, C, H, W]``, values as in ``images``.

    Example:
        >>> image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
        >>> crop_flip_rotate(image, torch.tensor([[0.5, 0.7, 0.9, 0.5]]), padding=1)[0, 0].int().tolist()
        [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [0, 0, 0, 0]]
    """
    _, _, height, width = images.shape
    shift = (randoms[:, :2] * (2 * padding + 1)).floor() - padding
    dx, dy = shift[:, :1], shift[:, 1:]
    flip = torch.where(randoms[:, 2:3] < 0.5, -1.0, 1.0)
    angle = (2 * randoms[:, 3:] - 1) * math.radians(degrees)
    cos, sin = angle.cos(), angle.sin()

    # What the crop cuts off must not be rotated back in. What it adds is zero, as is all that lies outside the image.
    columns, rows = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    kept_columns = (columns >= dx) & (columns < dx + width)
    kept_rows = (rows >= dy) & (rows < dy + height)
    cropped = (images * (kept_rows[:, None, :, None] & kept_columns[:, None, None, :])).float()

    # Pixel (x, y), from the centre, takes its value from shift(flip(rotation(x, y))); grid_sample wants [-1, 1].
    x, y = columns - (width - 1) / 2, rows - (height - 1) / 2
    to_x, to_y = 2 / width, 2 / height
    grid_x = ((flip * cos * x + dx) * to_x)[:, None, :] - (flip * sin * y * to_x)[:, :, None]
    grid_y = (sin * x * to_y)[:, None, :] + ((cos * y + dy) * to_y)[:, :, None]
    grid = torch.stack((grid_x, grid_y), dim=-1)
    return F.grid_sample(cropped, grid, mode="nearest", align_corners=False)


class ImageDataModule(BatchSizeDataModule):
    """Base of the image data sets: bytes in memory, floats on the model's device.

    ``on_after_batch_transfer`` normalises each batch; while training, and with ``augment``, it augments it first, with
    random numbers that depend on the seed, the epoch and the example's index alone: however the examples are cut into
    batches, processes and workers, and wherever the run is resumed, they are augmented alike.

    A subclass gives the class constants and ``locate``, ``fetch`` and ``read``. Validation and test are both the
    official test split, as in the papers.

    Args:
        root: Folder of the data set, ``data`` by default.
        download: Whether to download what is missing.
        augment: Whether to augment training images; the class decides by default. May be switched at any time.
        **options: As of ``BatchSizeDataModule``.

    Example:
        >>> from lightning_bsl.datasets import Digits
        >>> data = Digits(batch_size=64)
        >>> data.setup("fit")
        >>> data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)[0].dtype
        torch.float32
    """

    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    num_classes: ClassVar[int]
    in_channels: ClassVar[int]
    image_size: ClassVar[int]
    train_size: ClassVar[int]
    augment_by_default: ClassVar[bool] = False
    padding: ClassVar[int] = 4

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        download: bool = False,
        augment: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(collate_fn=identity, **options)
        self.root = Path("data" if root is None else root).expanduser()
        self.download = download
        self.augment = self.augment_by_default if augment is None else augment
        std = torch.tensor(self.std).view(-1, 1, 1)
        self._scale = 1 / (255 * std)
        self._shift = -torch.tensor(self.mean).view(-1, 1, 1) / std
        self._randoms: tuple[int, Tensor] | None = None  # of an epoch

    @abstractmethod
    def locate(self) -> Path:
        """Return the folder that holds the data.

        Raises:
            FileNotFoundError: If they are not there.
        """

    @abstractmethod
    def fetch(self) -> None:
        """Download the data into ``root``."""

    @abstractmethod
    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return images, uint8 ``[n, C, H, W]``, and labels, int64 ``[n]``."""

    @property
    def num_train_examples(self) -> int:
        """Number of training examples, known before they are loaded."""
        return self.train_size if self.train_set is None else super().num_train_examples

    def prepare_data(self) -> None:
        """Find the data, or download them where asked to.

        Raises:
            FileNotFoundError: If they are missing.
        """
        try:
            self.locate()
        except FileNotFoundError:
            if not self.download:
                raise
            self.fetch()
            self.locate()

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs, once."""
        super().setup(stage)  # type: ignore[arg-type]
        if stage in ("fit", None) and self.train_set is None:
            self.train_set = self._load("train")
        if self.val_set is None:
            self.val_set = self.test_set = self._load("val")

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Turn bytes ``[B, C, H, W]``, labels and indices into normalised images, in the Trainer's precision, and labels."""
        images, labels, indices = batch
        if self.augment and self.trainer is not None and self.trainer.training:
            randoms = self._epoch_randoms(self.trainer.current_epoch, images.device)[indices]
            images = self._augmented(images, randoms)
        else:
            images = self._normalise_(images.float())
        return to_precision(self, images), labels

    def _load(self, split: Split) -> ImageTensors:
        images, labels = self.read(split)
        expected = (self.in_channels, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"{type(self).__name__}: the {split} images are {list(images.shape[1:])}, not {list(expected)}: "
                f"is {self.root} the folder of another data set?"
            )
        return ImageTensors(images, labels)

    def _epoch_randoms(self, epoch: int, device: torch.device) -> Tensor:
        if self._randoms is None or self._randoms[0] != epoch or self._randoms[1].device != device:
            # Drawn on the CPU on every device: they must not depend on it.
            self._randoms = epoch, epoch_randoms(self.num_train_examples, self.seed, epoch).to(device)
        return self._randoms[1]

    def _normalise_(self, images: Tensor) -> Tensor:
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return images.mul_(self._scale).add_(self._shift)  # in place: several times as fast as addcmul on a CPU

    def _augmented(self, images: Tensor, randoms: Tensor) -> Tensor:
        if images.device.type != "cpu" or len(images) <= _CHUNK:
            return self._normalise_(crop_flip_rotate(images, randoms, self.padding))
        out = torch.empty(images.shape, dtype=torch.float32)
        for start in range(0, len(images), _CHUNK):
            rows = slice(start, start + _CHUNK)
            out[rows] = self._normalise_(crop_flip_rotate(images[rows], randoms[rows], self.padding))
        return out

    def _missing(self, wanted: str, folder: Path) -> FileNotFoundError:
        return FileNotFoundError(
            f"{type(self).__name__}: {wanted} not found in {folder.absolute()}; give the folder that holds them "
            "(root=DIR, on the command line data.root=DIR), or have them downloaded (download=True, data.download=true)"
        )


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 + 10,000 grey images of 28x28, 10 classes.

    ``root`` is any folder with the four idx files, gzipped or not (as published, as in Debian's package
    ``dataset-fashion-mnist``), or the folder given to torchvision's class.

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
        for folder in (self.root, self.root / "FashionMNIST" / "raw", self.root / "raw"):
            if all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in names):
                return folder
        raise self._missing(", ".join(names) + " (or .gz)", self.root)

    def fetch(self) -> None:
        """Download with torchvision."""
        datasets.FashionMNIST(self.root, download=True)

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read the idx files of a split."""
        images, labels = (self.locate() / f"{self._prefixes[split]}-{suffix}" for suffix in self._suffixes)
        with _gunzipped(images) as path:
            pixels = read_image_file(path)
        with _gunzipped(labels) as path:
            return pixels.unsqueeze(1), read_label_file(path)


class CIFAR10(ImageDataModule):
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32, 10 classes.

    ``root`` is the folder that holds ``cifar-10-batches-py``, as for torchvision's class, or that folder itself.

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

    _source: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10

    def locate(self) -> Path:
        """Return the folder that holds torchvision's folder."""
        name = self._source.base_folder
        files = [entry[0] for entry in (*self._source.train_list, *self._source.test_list)]
        root = self.root.parent if self.root.name == name else self.root
        if all((root / name / file).is_file() for file in files):
            return root
        raise self._missing(", ".join(f"{name}/{file}" for file in files), root)

    def fetch(self) -> None:
        """Download with torchvision."""
        self._source(self.root, download=True)

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read the pickles of a split with torchvision, which verifies their checksums."""
        source = self._source(self.locate(), train=split == "train")
        return torch.from_numpy(source.data).permute(0, 3, 1, 2), torch.tensor(source.targets)


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32, 100 classes; mean and deviation as in P1.

    ``root`` is the folder that holds ``cifar-100-python``, as for torchvision's class, or that folder itself.

    Example:
        >>> CIFAR100(batch_size=128).num_classes
        100
    """

    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    num_classes = 100

    _source = datasets.CIFAR100


class TinyImageNet(ImageDataModule):
    """Tiny ImageNet (Stanford CS231n): 100,000 + 10,000 colour images of 64x64, 200 classes; validation split as test.

    ``root`` is the folder ``tiny-imagenet-200``, or its parent. The validation images may lie as published (in
    ``val/images``, labels in ``val/val_annotations.txt``) or in a folder for each class. The decoded images, 1.4 GB,
    are kept in one file beside the JPEGs, which processes map into memory and share.

    Example:
        >>> TinyImageNet(batch_size=128).image_size
        64
    """

    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)
    num_classes = 200
    in_channels = 3
    image_size = 64
    train_size = 100_000
    augment_by_default = True

    cache_name: ClassVar[str] = "decoded.pt"

    def locate(self) -> Path:
        """Return the folder ``tiny-imagenet-200``."""
        for folder in (self.root, self.root / "tiny-imagenet-200"):
            if (folder / "train").is_dir() and (folder / "val").is_dir():
                return folder
        raise self._missing("the folders train and val of tiny-imagenet-200", self.root)

    def fetch(self) -> None:
        """Download from Stanford; torchvision has no class for it."""
        download_and_extract_archive(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip", str(self.root), md5="90528d7ca1a48142e341f4ef8d21d0de"
        )

    def prepare_data(self) -> None:
        """Find or download the data, and decode them into the cache unless it is there."""
        super().prepare_data()
        folder = self.locate()
        files = self._files(folder)
        if self._cached(folder, files) is not None:
            return
        try:
            handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        except OSError as error:
            warnings.warn(
                f"{folder} is not writable ({error}): every run and every process decodes the JPEGs again", stacklevel=2
            )
            return
        try:
            with os.fdopen(handle, "wb") as file:
                decoded: dict[str, Any] = {split: _decode(folder, files[split], self.image_size) for split in files}
                torch.save({"fingerprint": _fingerprint(files)} | decoded, file)
            os.replace(temporary, folder / self.cache_name)
        except BaseException:
            os.unlink(temporary)
            raise

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read a split from the cache, or decode it."""
        folder = self.locate()
        files = self._files(folder)
        cached = self._cached(folder, files)
        return _decode(folder, files[split], self.image_size) if cached is None else cached[split]

    def _files(self, folder: Path) -> _Files:
        """List the images, relative to the folder, and their labels: the sorted class names, counted."""
        names = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
        labels = {name: label for label, name in enumerate(names)}
        annotations = folder / "val" / "val_annotations.txt"
        lines = annotations.read_text().splitlines() if annotations.is_file() else []
        published = [line.split("\t")[:2] for line in lines]
        if published and (folder / "val" / "images" / published[0][0]).exists():
            val = [(f"val/images/{file}", labels[name]) for file, name in published]
        else:
            val = self._by_class(folder, "val", labels)
        files: _Files = {"train": self._by_class(folder, "train", labels), "val": sorted(val)}
        for split, found in files.items():
            if not found:
                raise self._missing(f"the JPEG images of {split}", folder / split)
        return files

    @staticmethod
    def _by_class(folder: Path, split: Split, labels: dict[str, int]) -> list[tuple[str, int]]:
        paths = ((path, label) for name, label in labels.items() for path in (folder / split / name).rglob("*.JPEG"))
        return sorted((path.relative_to(folder).as_posix(), label) for path, label in paths)

    def _cached(self, folder: Path, files: _Files) -> dict[Split, tuple[Tensor, Tensor]] | None:
        try:
            cached: dict[Any, Any] = torch.load(folder / self.cache_name, mmap=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None  # none yet, or not one of ours
        return cached if cached.get("fingerprint") == _fingerprint(files) else None


@contextmanager
def _gunzipped(path: Path) -> Iterator[str]:
    """Yield the path of the plain file, a temporary one where only ``path``.gz exists."""
    if path.is_file():
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = os.path.join(folder, path.name)
        with gzip.open(f"{path}.gz", "rb") as source, open(plain, "wb") as target:
            shutil.copyfileobj(source, target)
        yield plain


def _fingerprint(files: _Files) -> str:
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _decode(folder: Path, files: list[tuple[str, int]], size: int) -> tuple[Tensor, Tensor]:
    """Decode JPEGs, some of which are grey, to uint8 ``[n, 3, size, size]``."""
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def decode(row: int) -> None:
        path = folder / files[row][0]
        with Image.open(path) as image:
            if image.size != (size, size):
                raise ValueError(f"{path} is {image.width}x{image.height}, not {size}x{size}: not of this data set")
            images[row] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for _ in pool.map(decode, range(len(files))):
            pass
    return images, torch.tensor([label for _, label in files])
