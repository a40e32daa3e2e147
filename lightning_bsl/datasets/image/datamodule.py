"""Base of the image data sets: bytes in memory, augmented and normalised in whole batches on the model's device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_bsl.data.datamodule import BatchSizeDataModule, to_precision
from lightning_bsl.datasets.files import listing, permitted, shown
from lightning_bsl.datasets.image.augment import crop_flip_rotate, epoch_randoms

Split = Literal["train", "val"]
RawBatch = tuple[Tensor, Tensor, Tensor]

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


class ImageDataModule(BatchSizeDataModule):
    """Base of the image data sets: bytes in memory, floats on the model's device.

    ``on_after_batch_transfer`` normalises each batch; while training, and with ``augment``, it augments it first, with
    random numbers that depend on the seed, the epoch and the example's index alone: however the examples are cut into
    batches, processes and workers, and wherever the run is resumed, they are augmented alike.

    A subclass gives the class constants and ``locate``, ``fetch`` and ``read``; and ``count`` where the files may hold
    another number of images than ``train_size``. Validation and test are both the official test split, as in the papers.

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

    def count(self) -> int:
        """Return the number of training images in the files, without decoding them."""
        return self.train_size

    @property
    @permitted()
    def num_train_examples(self) -> int:
        """Number of training examples: in the files where they are there, else in the data set as published."""
        if self.train_set is not None:
            return super().num_train_examples
        try:
            self.locate()
        except FileNotFoundError:
            return self.train_size
        return self.count()

    @permitted()
    def prepare_data(self) -> None:
        """Find the data, or download them where asked to.

        Raises:
            FileNotFoundError: If they are missing.
            ConnectionError: If they cannot be downloaded.
        """
        try:
            self.locate()
        except FileNotFoundError:
            if not self.download:
                raise
            try:
                self.fetch()
            except (OSError, RuntimeError) as error:  # torchvision's is a RuntimeError
                reason = " ".join(str(error).split())
                raise ConnectionError(
                    f"{type(self).__name__} could not be downloaded to {shown(self.root.absolute())} ({reason}); try again, or "
                    "download it by hand and give its folder (root=DIR, on the command line data.root=DIR)"
                ) from error
            self.locate()

    @permitted()
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
        """The error to raise where files are missing; it says what is there instead."""
        there = "there is no such folder"
        if folder.is_dir():
            there = f"the folder holds {listing(sorted(path.name for path in folder.iterdir())) or 'nothing'}"
        elif folder.exists():
            there = "that is no folder"
        return FileNotFoundError(
            f"{type(self).__name__}: {wanted} not found in {shown(folder.absolute())}: {there}; give the folder that holds "
            "them (root=DIR, on the command line data.root=DIR), or have them downloaded (download=True, data.download=true)"
        )


def check_labels(labels: Tensor, num_classes: int, path: Path) -> None:
    """Refuse labels that are no class.

    Args:
        labels: Integers ``[n]``.
        num_classes: Number of classes.
        path: The file of the labels, for the message.

    Raises:
        ValueError: A label is below 0, or ``num_classes`` or more.
    """
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        record = int(wrong[0])
        raise ValueError(
            f"{shown(path)}: label {record} (counted from 0) is {int(labels[record])}, but the classes are 0 to "
            f"{num_classes - 1}; bring the labels of this data set, or correct them"
        )
