"""DataModules whose batch size may change while training runs."""

from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.data.digits import Digits
from lightning_bsl.data.image import CIFAR10, CIFAR100, FashionMNIST, ImageDataModule, ImageTensors, TinyImageNet
from lightning_bsl.data.problems import LogisticData, QuadraticNoise, logistic_constants
from lightning_bsl.data.sampler import GlobalBatchSampler
from lightning_bsl.data.text import ELI5Category, PydocTopics, TextDataModule, TextFolder, TokenBlocks, TokenDocuments

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "BatchSizeDataModule",
    "Digits",
    "ELI5Category",
    "FashionMNIST",
    "GlobalBatchSampler",
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
