"""Grow the batch size and the learning rate together while a PyTorch Lightning model trains."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BatchLRScheduler": "lightning_bsl.callbacks",
    "BatchSizeDataModule": "lightning_bsl.data",
}
__all__ = ["BatchLRScheduler", "BatchSizeDataModule"]


def __getattr__(name: str) -> Any:
    # imported on first use, so that `lightning_bsl.schedules` loads neither torch nor Lightning
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
