"""A clock that stands still until a test moves it."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback


class Clock:
    """Takes the place of the module ``time`` in the modules that are given to it.

    Args:
        patch: Undoes it at the end of the test.
        modules: The names of the modules.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *modules: str) -> None:
        self.now = 1000.0
        for module in modules:
            patch.setattr(f"{module}.time", self)

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return self.now


class Ticks(Callback):
    """Moves a clock by so many seconds at the start of each epoch and of each batch."""

    def __init__(self, clock: Clock, epoch: float = 0.0, batch: float = 0.0) -> None:
        self.clock, self.epoch, self.batch = clock, epoch, batch

    def on_train_epoch_start(self, *_: Any) -> None:
        self.clock.now += self.epoch

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.now += self.batch
