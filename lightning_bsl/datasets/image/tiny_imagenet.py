"""Tiny ImageNet, from its folders of JPEGs."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive

from lightning_bsl.datasets.files import broken, files_below, listing, shown, subfolders
from lightning_bsl.datasets.image.datamodule import ImageDataModule, Split

_Files = dict[Split, list[tuple[str, int]]]  # path inside the folder, label
_KINDS = (".jpeg", ".jpg", ".png")


class TinyImageNet(ImageDataModule):
    """Tiny ImageNet (Stanford CS231n): 100,000 + 10,000 colour images of 64x64, 200 classes; validation split as test.

    ``root`` is the folder ``tiny-imagenet-200``, or its parent. The classes are those of ``wnids.txt``; without it there
    must be 200 folders in ``train``. They are numbered in the order of their names. The validation images may lie as
    published (in ``val/images``, labels in ``val/val_annotations.txt``) or in a folder for each class. The decoded images,
    1.4 GB, are kept in one file beside the JPEGs, which processes map into memory and share.

    Raises:
        FileNotFoundError: When loading: a folder or a file is missing.
        ValueError: When loading: a file cannot be read, a class has no image, or a folder is no class.

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
        raise self._missing("the folders train and val of tiny-imagenet-200", folder if folder.is_dir() else self.root)

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
                torch.save({"fingerprint": _fingerprint(folder, files)} | decoded, file)
            os.replace(temporary, folder / self.cache_name)
        except BaseException:
            os.unlink(temporary)
            raise

    def count(self) -> int:
        """Return the number of training images in the folders."""
        return len(self._files(self.locate())["train"])

    def read(self, split: Split) -> tuple[Tensor, Tensor]:
        """Read a split from the cache, or decode it."""
        folder = self.locate()
        files = self._files(folder)
        cached = self._cached(folder, files)
        return _decode(folder, files[split], self.image_size) if cached is None else cached[split]

    def _files(self, folder: Path) -> _Files:
        """List the images, relative to the folder, and their labels."""
        labels = {name: label for label, name in enumerate(self._classes(folder))}
        published = _images(folder / "val" / "images")
        val = self._annotated(folder, published, labels) if published else _by_class(folder, "val", labels)
        return {"train": _by_class(folder, "train", labels), "val": sorted(val)}

    def _classes(self, folder: Path) -> list[str]:
        """The names of the classes, sorted."""
        names = [path.name for path in subfolders(folder / "train")]
        listed = folder / "wnids.txt"
        if not listed.is_file():
            if len(names) != self.num_classes:
                raise ValueError(
                    f"{shown(folder / 'train')} has {len(names)} folders ({listing(names)}), not one for each of the "
                    f"{self.num_classes} classes; unpack the data set again, or name the classes in {shown(listed)}, one a line"
                )
            return names
        classes = sorted({line.strip() for line in _lines(listed)} - {""})
        if not 0 < len(classes) <= self.num_classes:
            raise broken(listed, f"names {len(classes)} classes, not 1 to {self.num_classes}", "unpack the data set again")
        if strangers := sorted({*names} - {*classes}):
            raise ValueError(
                f"{shown(folder / 'train')} has folders that are no class of wnids.txt: {listing(strangers)}; move them out of "
                "the data set, or add them to wnids.txt"
            )
        if missing := sorted({*classes} - {*names}):
            raise FileNotFoundError(
                f"{shown(folder / 'train')} has no folder for {listing(missing)}, which wnids.txt names; unpack the data set "
                "again, or leave them out of wnids.txt"
            )
        return classes

    @staticmethod
    def _annotated(folder: Path, images: Sequence[Path], labels: dict[str, int]) -> list[tuple[str, int]]:
        """The validation images as published: all in one folder, their labels in a file."""
        path = folder / "val" / "val_annotations.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"{shown(path)}, with the labels of the images in val/images, is not there; unpack the data set again, or sort "
                "the images into a folder for each class"
            )
        there = {image.name: image for image in images}
        if twice := sorted({image.name for image in images if there[image.name] != image}):
            raise ValueError(
                f"{shown(folder / 'val' / 'images')} has more than one image by the name {listing(twice)}; remove the others"
            )
        files: dict[str, tuple[str, int]] = {}
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            name, *rest = line.split("\t")
            problem = None
            if not rest or rest[0].strip() not in labels:
                problem = (
                    "names no class of the data set behind its first tab" if rest else "has no tab behind the name of an image"
                )
            elif name in files:
                problem = f"names the image {name} a second time"
            elif name not in there:
                problem = f"names the image {name}, which is not in {shown(folder / 'val' / 'images')}"
            if problem:
                raise broken(
                    path, f"{problem} in line {number}: {line[:80]!r}", "unpack the data set again, or correct the line"
                )
            files[name] = there[name].relative_to(folder).as_posix(), labels[rest[0].strip()]
        if without := sorted({*there} - {*files}):
            raise broken(path, f"has no line for the image {listing(without)}", "unpack the data set again, or add the lines")
        return list(files.values())

    def _cached(self, folder: Path, files: _Files) -> dict[Split, tuple[Tensor, Tensor]] | None:
        if (folder / self.cache_name).is_dir():
            raise ValueError(f"{shown(folder / self.cache_name)} is a folder, where the decoded images go: move it away")
        if not (folder / self.cache_name).is_file():  # a pipe would be waited for
            return None
        try:
            cached: Any = torch.load(folder / self.cache_name, mmap=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            return None  # none yet, cut short, or not one of ours
        return cached if isinstance(cached, dict) and cached.get("fingerprint") == _fingerprint(folder, files) else None


def _images(folder: Path) -> list[Path]:
    """The images below a folder, if there is one."""
    if not folder.is_dir():
        return []
    return [path for path in files_below(folder, is_data=_is_image) if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _KINDS


def _by_class(folder: Path, split: Split, labels: dict[str, int]) -> list[tuple[str, int]]:
    """The images of a split in folders of their classes."""
    if strangers := sorted({path.name for path in subfolders(folder / split)} - {*labels, "images"}):
        raise ValueError(
            f"{shown(folder / split)} has folders that are no class: {listing(strangers)}; move them out of the data set"
        )
    files: list[tuple[str, int]] = []
    for name, label in labels.items():
        images = _images(folder / split / name)
        if not images:
            raise FileNotFoundError(
                f"{shown(folder / split / name)} has no images ({', '.join(_KINDS)}); unpack the data set again, or take the "
                "class out of the data set: its folder, and its line in wnids.txt"
            )
        files += [(path.relative_to(folder).as_posix(), label) for path in images]
    return sorted(files)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise broken(path, error) from error


def _fingerprint(folder: Path, files: _Files) -> str:
    """Changes with the names, the labels, the sizes and the times of the images."""
    stats = {split: [os.stat(f"{folder}/{name}") for name, _ in files[split]] for split in files}
    key = files, {split: [(stat.st_size, stat.st_mtime_ns) for stat in stats[split]] for split in stats}
    return hashlib.sha256(repr(key).encode()).hexdigest()


def _decode(folder: Path, files: list[tuple[str, int]], size: int) -> tuple[Tensor, Tensor]:
    """Decode images, some of which are grey, to uint8 ``[n, 3, size, size]``."""
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def decode(row: int) -> None:
        path = folder / files[row][0]
        try:
            with Image.open(path, formats=("JPEG", "PNG")) as image:  # others call programs, as of PostScript
                width, height = image.size
                if (width, height) == (size, size):
                    images[row] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise broken(path, error) from error
        if (width, height) != (size, size):
            raise broken(path, f"is {width}x{height}, not {size}x{size}: not of this data set", "move it out of the data set")

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for _ in pool.map(decode, range(len(files))):
            pass
    return images, torch.tensor([label for _, label in files])
