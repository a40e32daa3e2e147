"""Grow the batch size and the learning rate together while a PyTorch Lightning model trains."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveBatchLRScheduler": "lightning_bsl.callbacks",
    "BatchLRScheduler": "lightning_bsl.callbacks",
    "BatchSizeDataModule": "lightning_bsl.data",
    "FullGradientNorm": "lightning_bsl.callbacks",
    "GradientNoiseScale": "lightning_bsl.callbacks",
    "GradientNormTrigger": "lightning_bsl.callbacks",
    "NoiseScaleTrigger": "lightning_bsl.callbacks",
    "PlateauTrigger": "lightning_bsl.callbacks",
    "TrainingTime": "lightning_bsl.callbacks",
}
__all__ = [
    "AdaptiveBatchLRScheduler",
    "BatchLRScheduler",
    "BatchSizeDataModule",
    "FullGradientNorm",
    "GradientNoiseScale",
    "GradientNormTrigger",
    "NoiseScaleTrigger",
    "PlateauTrigger",
    "TrainingTime",
]


def __getattr__(name: str) -> Any:
    # imported on first use, so that `lightning_bsl.schedules` loads neither torch nor Lightning
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
