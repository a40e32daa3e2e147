"""Data sets of images and text, and problems whose constants are known, as DataModules whose batch size may change."""

from lightning_bsl.datasets.digits import Digits
from lightning_bsl.datasets.image import CIFAR10, CIFAR100, FashionMNIST, ImageDataModule, ImageTensors, TinyImageNet
from lightning_bsl.datasets.problems import LogisticData, QuadraticNoise, logistic_constants
from lightning_bsl.datasets.text import ELI5Category, PydocTopics, TextDataModule, TextFolder, TokenBlocks, TokenDocuments

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Digits",
    "ELI5Category",
    "FashionMNIST",
    "ImageDataModule",
    "ImageTensors",
    "LogisticData",
    "PydocTopics",
    "QuadraticNoise",
    "TextDataModule",
    "TextFolder",
    "TinyImageNet",
    "TokenBlocks",
    "TokenDocuments",
    "logistic_constants",
]
