"""Data sets of images."""

from lightning_bsl.datasets.image.augment import crop_flip_rotate, epoch_randoms
from lightning_bsl.datasets.image.cifar import CIFAR10, CIFAR100
from lightning_bsl.datasets.image.datamodule import ImageDataModule, ImageTensors, RawBatch, Split, identity
from lightning_bsl.datasets.image.fashion_mnist import FashionMNIST
from lightning_bsl.datasets.image.tiny_imagenet import TinyImageNet

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "FashionMNIST",
    "ImageDataModule",
    "ImageTensors",
    "RawBatch",
    "Split",
    "TinyImageNet",
    "crop_flip_rotate",
    "epoch_randoms",
    "identity",
]
