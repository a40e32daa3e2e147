"""Image data sets: reading the real formats, and the augmentation against torchvision's."""

import gzip
import math
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from harness.configs import compose_config
from harness.files import FASHION_MNIST, csv_rows
from lightning_bsl import BatchLRScheduler
from lightning_bsl.app.compose import make_plan
from lightning_bsl.datasets import CIFAR10, CIFAR100, FashionMNIST, ImageDataModule, ImageTensors, TinyImageNet
from lightning_bsl.datasets.image import crop_flip_rotate, epoch_randoms


def random_images(n: int, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def in_training(datamodule: ImageDataModule, epoch: int = 0, training: bool = True) -> ImageDataModule:
    stub: Any = SimpleNamespace(training=training, current_epoch=epoch, distributed_sampler_kwargs=None, overfit_batches=0)
    datamodule.trainer = stub
    return datamodule


class Random(ImageDataModule):
    """A data set of 40 random colour images."""

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    num_classes, in_channels, image_size, train_size = 5, 3, 32, 40
    augment_by_default = True

    def locate(self) -> Path:
        return self.root

    def fetch(self) -> None: ...

    def read(self, split: str) -> tuple[Tensor, Tensor]:
        n = 40 if split == "train" else 12
        return random_images(n, seed=n), torch.arange(n) % 5


class TestImageTensors:
    def test_batch(self) -> None:
        images, labels = random_images(10), torch.arange(10) * 2
        data = ImageTensors(images, labels)
        batch, found, indices = data.__getitems__([7, 0, 7])
        assert torch.equal(batch, images[[7, 0, 7]])
        assert found.tolist() == [14, 0, 14]
        assert indices.tolist() == [7, 0, 7]
        assert len(data) == 10

    def test_single(self) -> None:
        images = random_images(3)
        image, label, index = ImageTensors(images, torch.arange(3))[2]
        assert torch.equal(image, images[2])
        assert (label.item(), index.item()) == (2, 2)

    def test_wrong_types(self) -> None:
        with pytest.raises(ValueError, match=r"images are torch\.float32"):
            ImageTensors(torch.zeros(2, 1, 8, 8), torch.arange(2))
        with pytest.raises(ValueError, match=r"give torch.int64 \[2\]"):
            ImageTensors(random_images(2), torch.arange(3))


class TestAugmentation:
    """RandomCrop(size, 4), RandomHorizontalFlip, RandomRotation(15), image by image by torchvision."""

    @staticmethod
    def expected(image: Tensor, left: int, top: int, flip: bool, angle: float, padding: int) -> Tensor:
        _, height, width = image.shape
        image = TF.crop(TF.pad(image, [padding] * 4), top, left, height, width)
        image = TF.horizontal_flip(image) if flip else image
        rotated: Tensor = TF.rotate(image, angle, InterpolationMode.NEAREST, fill=0)
        return rotated

    @pytest.mark.parametrize(("channels", "size", "padding"), [(3, 32, 4), (1, 28, 4), (1, 8, 1), (3, 64, 4), (3, 33, 4)])
    def test_equals_torchvision(self, channels: int, size: int, padding: int) -> None:
        n = 300
        images, randoms = random_images(n, channels, size), epoch_randoms(n, seed=1, epoch=2)
        found = crop_flip_rotate(images, randoms, padding)
        assert found.dtype == torch.float32
        expected = torch.stack(
            [
                self.expected(
                    image,
                    left=int(numbers[0] * (2 * padding + 1)),
                    top=int(numbers[1] * (2 * padding + 1)),
                    flip=bool(numbers[2] < 0.5),
                    angle=float((2 * numbers[3] - 1) * 15),
                    padding=padding,
                )
                for image, numbers in zip(images, randoms, strict=True)
            ]
        )
        # Pixels whose source lies halfway between two may go either way: a few in a million.
        assert int((found != expected).any(1).sum()) <= max(1, n * size * size * 2e-5)

    @given(
        left=st.integers(0, 8),
        top=st.integers(0, 8),
        flip=st.booleans(),
        angle=st.sampled_from([-15.0, -7.3, 0, 3.1, 15]),
    )
    @settings(max_examples=60, deadline=None)
    def test_corners_of_the_parameters(self, left: int, top: int, flip: bool, angle: float) -> None:
        image = random_images(1)
        randoms = torch.tensor([[(left + 0.5) / 9, (top + 0.5) / 9, 0.2 if flip else 0.7, angle / 30 + 0.5]])
        different = crop_flip_rotate(image, randoms)[0] != self.expected(image[0], left, top, flip, angle, padding=4)
        assert int(different.any(0).sum()) <= 1

    def test_every_shift_is_drawn_alike(self) -> None:
        """A single bright pixel, followed through crops without flip and rotation, ends up in 81 places."""
        n = 9000
        image = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
        image[..., 16, 16] = 1
        randoms = epoch_randoms(n, 0, 0)
        randoms[:, 2], randoms[:, 3] = 0.9, 0.5
        counts = crop_flip_rotate(image.expand(n, -1, -1, -1), randoms).sum((0, 1))
        assert counts.sum() == counts[12:21, 12:21].sum() == n
        assert counts[12:21, 12:21].min() > 0.6 * n / 81
        assert counts.max() < 1.5 * n / 81


class TestRandomNumbers:
    def test_pure_function(self) -> None:
        state = torch.get_rng_state()
        first = epoch_randoms(50, seed=3, epoch=4)
        torch.rand(7)
        assert torch.equal(first, epoch_randoms(50, seed=3, epoch=4))
        torch.set_rng_state(state)
        epoch_randoms(50, seed=3, epoch=4)
        assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone

    def test_seeds_and_epochs_are_independent(self) -> None:
        tables = [epoch_randoms(2000, seed, epoch).flatten() for seed in range(3) for epoch in range(3)]
        correlations = torch.corrcoef(torch.stack(tables)) - torch.eye(9)
        assert correlations.abs().max() < 5 / math.sqrt(8000)

    def test_range(self) -> None:
        randoms = epoch_randoms(10_000, 0, 0)
        assert randoms.shape == (10_000, 4)
        assert randoms.min() >= 0
        assert randoms.max() < 1


class TestImageDataModule:
    @staticmethod
    def epoch(batch_size: int, epoch: int = 3, num_workers: int = 0, **options: Any) -> Tensor:
        """Return the training images of an epoch in the order of the data set."""
        datamodule = in_training(Random(batch_size=batch_size, num_workers=num_workers, seed=5, **options), epoch)
        datamodule.setup("fit")
        images, rows, loader = [], [], datamodule.train_dataloader()
        for batch in loader:
            images.append(datamodule.on_after_batch_transfer(batch, 0)[0])
            rows.append(batch[2])
        loader._iterator = None  # ends its workers at once; the collector would take seconds for each
        return torch.cat(images)[torch.cat(rows).argsort()]

    @pytest.mark.parametrize("batch_size", [1, 3, 16])
    def test_augmentation_does_not_depend_on_the_cut(self, batch_size: int) -> None:
        assert torch.equal(self.epoch(batch_size), self.epoch(40))

    def test_augmentation_does_not_depend_on_workers(self) -> None:
        assert torch.equal(self.epoch(7, num_workers=2), self.epoch(40))

    def test_augmentation_changes_with_the_epoch(self) -> None:
        assert not torch.equal(self.epoch(40, epoch=3), self.epoch(40, epoch=4))

    def test_large_batches_are_cut_invisibly(self) -> None:
        datamodule = in_training(Random(batch_size=32))
        images, randoms = random_images(600), epoch_randoms(600, 0, 0)
        expected = torch.cat([datamodule._augmented(images[i : i + 1], randoms[i : i + 1]) for i in range(600)])
        assert torch.equal(datamodule._augmented(images, randoms), expected)

    def test_normalisation(self) -> None:
        datamodule = in_training(Random(batch_size=8, augment=False))
        datamodule.setup("fit")
        batch = next(iter(datamodule.train_dataloader()))
        images, labels = datamodule.on_after_batch_transfer(batch, 0)
        expected = TF.normalize(TF.to_dtype(batch[0], torch.float32, scale=True), list(Random.mean), list(Random.std))
        assert images.dtype == torch.float32
        assert torch.allclose(images, expected, atol=1e-6)
        assert torch.equal(labels, batch[1])

    def test_augmented_batches_are_normalised_after_the_zeros_are_filled_in(self) -> None:
        datamodule = in_training(Random(batch_size=40))
        datamodule.setup("fit")
        lowest = self.epoch(40).amin(dim=(0, 2, 3))
        assert torch.allclose(lowest, -torch.tensor(Random.mean) / torch.tensor(Random.std))

    def test_no_augmentation_outside_training(self) -> None:
        datamodule = in_training(Random(batch_size=40), training=False)
        datamodule.setup("fit")
        batch = next(iter(datamodule.val_dataloader()))
        plain = in_training(Random(batch_size=40, augment=False))
        assert torch.equal(datamodule.on_after_batch_transfer(batch, 0)[0], plain.on_after_batch_transfer(batch, 0)[0])

    def test_setup_loads_once(self) -> None:
        datamodule = Random(batch_size=8)
        assert datamodule.num_train_examples == 40  # before any loading
        datamodule.setup("validate")
        assert datamodule.train_set is None
        datamodule.setup("fit")
        train, val = datamodule.train_set, datamodule.val_set
        datamodule.setup("fit")
        datamodule.setup("test")
        assert datamodule.train_set is train
        assert datamodule.val_set is val
        assert datamodule.test_set is val

    def test_images_of_another_data_set(self) -> None:
        class Other(Random):
            image_size = 28

        with pytest.raises(ValueError, match=r"the train images are \[3, 32, 32\], not \[3, 28, 28\]"):
            Other(batch_size=8).setup("fit")


@pytest.mark.parametrize(
    ("kind", "n"), [(FashionMNIST, 60_000), (CIFAR10, 50_000), (CIFAR100, 50_000), (TinyImageNet, 100_000)]
)
def test_known_without_loading(kind: type[ImageDataModule], n: int, tmp_path: Path) -> None:
    datamodule = kind(tmp_path, batch_size=16)
    assert datamodule.num_train_examples == n
    assert datamodule.augment == (kind is not FashionMNIST)
    with pytest.raises(FileNotFoundError) as error:
        datamodule.prepare_data()
    assert str(tmp_path) in str(error.value)
    assert "data.root=DIR" in str(error.value)
    assert "data.download=true" in str(error.value)


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def fetch(self: FashionMNIST) -> None:
        calls.append(self.root)
        write_idx(self.root, packed=False)

    monkeypatch.setattr(FashionMNIST, "fetch", fetch)
    for _ in range(2):
        FashionMNIST(tmp_path, download=True, batch_size=16).prepare_data()
    assert calls == [tmp_path]  # only what is missing


@pytest.mark.parametrize("kind", [FashionMNIST, CIFAR10, CIFAR100, TinyImageNet])
def test_download_without_a_network(kind: type[ImageDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(
        ConnectionError, match=rf"{kind.__name__} could not be downloaded to {tmp_path} .*; try again, or download"
    ):
        kind(tmp_path, download=True).prepare_data()


def write_idx(folder: Path, packed: bool, train: int = 20) -> dict[str, tuple[Tensor, Tensor]]:
    """Write Fashion-MNIST's four files, with few images."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for prefix, n in (("train", train), ("t10k", 6)):
        images, labels = random_images(n, 1, 28, seed=n), torch.arange(n) % 10
        splits[prefix] = images, labels
        for name, values in (("images-idx3", images[:, 0]), ("labels-idx1", labels.byte())):
            data = struct.pack(f">{values.ndim + 1}I", 2048 + values.ndim, *values.shape) + values.numpy().tobytes()
            path = folder / f"{prefix}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return splits


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inside", [".", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path: Path, packed: bool, inside: str) -> None:
    splits = write_idx(tmp_path / inside, packed)
    datamodule = FashionMNIST(tmp_path, batch_size=16)
    assert datamodule.num_train_examples == 20  # before they are loaded
    datamodule.prepare_data()
    datamodule.setup("fit")
    for split, data in (("train", datamodule.train_set), ("t10k", datamodule.val_set)):
        assert isinstance(data, ImageTensors)
        assert torch.equal(data.images, splits[split][0])
        assert torch.equal(data.labels, splits[split][1])
    assert datamodule.num_train_examples == 20


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_real_fashion_mnist() -> None:
    datamodule = FashionMNIST(FASHION_MNIST, batch_size=1000)
    datamodule.setup("fit")
    train, val = datamodule.train_set, datamodule.val_set
    assert isinstance(train, ImageTensors)
    assert isinstance(val, ImageTensors)
    assert train.labels.bincount().tolist() == 10 * [6000]
    assert val.labels.bincount().tolist() == 10 * [1000]
    pixels = train.images.float() / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((0.2860, 0.3530), abs=1e-4)


@pytest.mark.parametrize(("kind", "key"), [(CIFAR10, "labels"), (CIFAR100, "fine_labels")])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar(kind: type[CIFAR10], key: str, inside: bool, tmp_path: Path) -> None:
    source = kind._source
    folder = tmp_path / source.base_folder
    folder.mkdir()
    images, labels = [], []
    for number, (name, _) in enumerate((*source.train_list, *source.test_list)):
        images.append(random_images(4, seed=number))
        labels.append([(number + row) % 10 for row in range(4)])
        entry = {"data": images[-1].reshape(4, 3072).numpy(), key: labels[-1]}
        (folder / name).write_bytes(pickle.dumps(entry))
    datamodule = kind(folder if inside else tmp_path, batch_size=4)
    assert datamodule.num_train_examples == 4 * len(source.train_list)  # before they are loaded
    datamodule.prepare_data()
    datamodule.setup("fit")
    train, val = datamodule.train_set, datamodule.val_set
    assert isinstance(train, ImageTensors)
    assert isinstance(val, ImageTensors)
    assert torch.equal(train.images, torch.cat(images[:-1]))
    assert torch.equal(val.images, images[-1])
    assert train.labels.tolist() == [label for part in labels[:-1] for label in part]
    assert val.labels.tolist() == labels[-1]


def test_a_file_of_the_published_size_must_be_the_published_one(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, n in (("train", 4), ("test", 10_000)):
        entry = {"data": np.zeros((n, 3072), np.uint8), "fine_labels": [0] * n}
        (folder / name).write_bytes(pickle.dumps(entry))
    with pytest.raises(
        ValueError, match=r"test has 10,000 images as published, but not the published checksum.*; remove it and"
    ):
        CIFAR100(tmp_path, batch_size=4).setup("fit")


def test_the_plan_counts_the_images_that_are_there(tmp_path: Path) -> None:
    """`bsl-plan` opens no more than the header."""
    write_idx(tmp_path, packed=True, train=400)
    cfg = compose_config("data=fashion_mnist")
    for root, number in ((tmp_path, 400), (tmp_path / "nowhere", 60_000)):
        cfg.data.root = str(root)
        plan = make_plan(cfg, BatchLRScheduler(batch_size=40), instantiate(cfg.data))
        assert plan is not None
        assert plan.samples == cfg.trainer.max_epochs * number
        plan.to_csv(tmp_path / "plan.csv")
        assert float(csv_rows(tmp_path / "plan.csv")[-1]["samples"]) == pytest.approx(plan.samples, abs=40)


class TestTinyImageNet:
    WNIDS = ("n02", "n01", "n03")  # classes are numbered in the order of their names

    @classmethod
    def write(cls, folder: Path, val: str) -> None:
        """Write a small copy: every image is of one colour, which tells class and split."""
        lines = []
        for label, wnid in enumerate(sorted(cls.WNIDS)):
            for row in range(3):
                cls.jpeg(folder / "train" / wnid / "images" / f"{wnid}_{row}.JPEG", 20 * label + 100, grey=row == 0)
            for row in range(2):
                name = f"val_{2 * label + row}.JPEG"
                inside = {"published": "images", "sorted": wnid, "sorted deeper": f"{wnid}/images"}[val]
                cls.jpeg(folder / "val" / inside / name, 20 * label + 10)
                lines.append(f"{name}\t{wnid}\t0\t0\t62\t62")
        (folder / "wnids.txt").write_text("\n".join(cls.WNIDS))
        if val != "sorted":  # who sorts the images may leave this file behind
            (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")

    @staticmethod
    def jpeg(path: Path, value: int, grey: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (64, 64) if grey else (64, 64, 3)
        Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(path, "JPEG", quality=95)

    @staticmethod
    def load(root: Path) -> tuple[ImageTensors, ImageTensors]:
        datamodule = TinyImageNet(root, batch_size=4)
        datamodule.prepare_data()
        datamodule.setup("fit")
        assert isinstance(datamodule.train_set, ImageTensors)
        assert isinstance(datamodule.val_set, ImageTensors)
        return datamodule.train_set, datamodule.val_set

    @pytest.mark.parametrize("val", ["published", "sorted", "sorted deeper"])
    @pytest.mark.parametrize("parent", [False, True])
    def test_layouts(self, tmp_path: Path, val: str, parent: bool) -> None:
        folder = tmp_path / "tiny-imagenet-200"
        self.write(folder, val)
        for _ in range(2):  # decoded, then from the cache
            train, test = self.load(tmp_path if parent else folder)
            assert train.images.shape == (9, 3, 64, 64)
            assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
            assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
            for data, base in ((train, 100), (test, 10)):
                expected = (base + 20 * data.labels).view(-1, 1, 1, 1)
                assert (data.images.long() - expected).abs().max() <= 1
        assert sorted(path.name for path in folder.iterdir()) == ["decoded.pt", "train", "val", "wnids.txt"]

    def test_cache_is_used_and_renewed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write(tmp_path, "published")
        self.load(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("lightning_bsl.datasets.image.tiny_imagenet._decode", lambda *args: pytest.fail("decoded again"))
            self.load(tmp_path)
        self.jpeg(tmp_path / "train" / "n03" / "images" / "n03_9.JPEG", 1)
        assert len(self.load(tmp_path)[0]) == 10
        cache = tmp_path / "decoded.pt"
        whole = cache.read_bytes()
        for contents in (b"not a cache", b"", whole[:100], whole[: len(whole) // 2], whole[:-1]):
            cache.write_bytes(contents)
            assert len(self.load(tmp_path)[0]) == 10
            assert cache.stat().st_size == len(whole)

    def test_an_image_that_was_replaced_is_decoded_anew(self, tmp_path: Path) -> None:
        self.write(tmp_path, "published")
        before = self.load(tmp_path)[0].images[0].clone()
        self.jpeg(tmp_path / "train" / "n01" / "images" / "n01_0.JPEG", 7)
        assert not torch.equal(self.load(tmp_path)[0].images[0], before)

    def test_two_hundred_folders_need_no_list(self, tmp_path: Path) -> None:
        for number in range(200):
            for split in ("train", "val"):
                self.jpeg(tmp_path / split / f"n{number:03}" / "a.JPEG", number)
        assert self.load(tmp_path)[0].labels.tolist() == list(range(200))

    def test_folder_not_writable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**options: Any) -> None:
            raise PermissionError("read-only")

        self.write(tmp_path, "published")
        monkeypatch.setattr("tempfile.mkstemp", refuse)
        with pytest.warns(UserWarning, match="not writable"):
            assert len(self.load(tmp_path)[0]) == 9
        assert not (tmp_path / "decoded.pt").exists()

    def test_failure_leaves_nothing_behind(self, tmp_path: Path) -> None:
        self.write(tmp_path, "published")
        Image.new("RGB", (32, 64)).save(tmp_path / "train" / "n01" / "images" / "odd.JPEG")
        with pytest.raises(ValueError, match=r"odd.JPEG is 32x64, not 64x64"):
            self.load(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val", "wnids.txt"]

    def test_no_images(self, tmp_path: Path) -> None:
        (tmp_path / "train").mkdir()
        (tmp_path / "val").mkdir()
        (tmp_path / "wnids.txt").write_text("n01")
        with pytest.raises(FileNotFoundError, match=r"train has no folder for n01"):
            self.load(tmp_path)
