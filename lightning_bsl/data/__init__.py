"""DataModules whose batch size may change while training runs."""

from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.data.digits import Digits
from lightning_bsl.data.image import CIFAR10, CIFAR100, FashionMNIST, ImageDataModule, ImageTensors, TinyImageNet
from lightning_bsl.data.problems import LogisticData, QuadraticNoise, logistic_constants
from lightning_bsl.data.sampler import GlobalBatchSampler

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "BatchSizeDataModule",
    "Digits",
    "FashionMNIST",
    "GlobalBatchSampler",
    "ImageDataModule",
    "ImageTensors",
    "LogisticData",
    "QuadraticNoise",
    "TinyImageNet",
    "logistic_constants",
]
