"""Grow the batch size and the learning rate together while a PyTorch Lightning model trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bsl.callbacks import (
        CABS,
        AdaptiveBatchLRScheduler,
        BatchEMA,
        BatchLRScheduler,
        CheckpointEvery,
        FullGradientNorm,
        GradientNoiseScale,
        GradientNormTrigger,
        NoiseTarget,
        NormTest,
        PlateauTrigger,
        TrainingTime,
        ValidateEvery,
    )
    from lightning_bsl.data import BatchSizeDataModule, StreamDataModule

__version__ = "0.1.0"

__all__ = [
    "CABS",
    "AdaptiveBatchLRScheduler",
    "BatchEMA",
    "BatchLRScheduler",
    "BatchSizeDataModule",
    "CheckpointEvery",
    "FullGradientNorm",
    "GradientNoiseScale",
    "GradientNormTrigger",
    "NoiseTarget",
    "NormTest",
    "PlateauTrigger",
    "StreamDataModule",
    "TrainingTime",
    "ValidateEvery",
]


def __getattr__(name: str) -> Any:
    # imported on first use, so that `lightning_bsl.schedules` loads neither torch nor Lightning
    if name in __all__:
        home = "lightning_bsl.data" if name.endswith("DataModule") else "lightning_bsl.callbacks"
        return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
