"""Scaling rules: the learning rate as a function of the batch size."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

from lightning_bsl.schedules.checks import check_above_0


@dataclass(frozen=True)
class ScalingRule(ABC):
    """Base class of scaling rules: a learning rate for every batch size.

    A subclass is a frozen dataclass whose first field is a learning rate.

    Raises:
        ValueError: An argument that is not above 0 and finite.

    Example:
        >>> @dataclass(frozen=True)
        ... class CubeRootScaling(ScalingRule):
        ...     base_lr: float
        ...     base_batch_size: float
        ...
        ...     def __call__(self, batch_size):
        ...         return self.base_lr * (batch_size / self.base_batch_size) ** (1 / 3)
        >>> round(CubeRootScaling(0.1, base_batch_size=8)(64), 6)
        0.2
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            check_above_0(f"{type(self).__name__}({field.name}", getattr(self, field.name))

    @abstractmethod
    def __call__(self, batch_size: int) -> float:
        """The learning rate for ``batch_size`` examples a step."""

    def factor(self, batch_size: int) -> float:
        """The learning rate for ``batch_size``, divided by the rule's first field.

        Beside a scheduler of the LightningModule, this number multiplies the learning rates that the scheduler sets.

        Raises:
            TypeError: The rule has no fields.
        """
        first, *_ = fields(self) or [None]
        if first is None:
            raise TypeError(
                f"{type(self).__name__} cannot multiply the module's learning rates, since it has no fields: write its own "
                "learning rate as its first field"
            )
        return self(batch_size) / float(getattr(self, first.name))


@dataclass(frozen=True)
class LinearScaling(ScalingRule):
    """``base_lr * B / base_batch_size`` (Goyal et al., arXiv 1706.02677).

    Args:
        base_lr: Learning rate at ``base_batch_size``.
        base_batch_size: A batch size, in examples.

    Example:
        >>> LinearScaling(0.1, base_batch_size=128)(256)
        0.2
    """

    base_lr: float
    base_batch_size: float

    def __call__(self, batch_size: int) -> float:
        """The learning rate for ``batch_size`` examples a step."""
        return self.base_lr * batch_size / self.base_batch_size


@dataclass(frozen=True)
class SqrtScaling(ScalingRule):
    """``base_lr * sqrt(B / base_batch_size)``.

    This is the optimal growth gamma = sqrt(delta) of Umeda & Iiduka 2025 (arXiv 2508.05297).

    Args:
        base_lr: Learning rate at ``base_batch_size``.
        base_batch_size: A batch size, in examples.

    Example:
        >>> SqrtScaling(0.1, base_batch_size=128)(512)
        0.2
    """

    base_lr: float
    base_batch_size: float

    def __call__(self, batch_size: int) -> float:
        """The learning rate for ``batch_size`` examples a step."""
        return self.base_lr * math.sqrt(batch_size / self.base_batch_size)


@dataclass(frozen=True)
class NoiseScaling(ScalingRule):
    """``peak_lr / (1 + B_noise / B)**alpha`` (McCandlish et al. 2018, arXiv 1812.06162).

    Args:
        peak_lr: eta_max, the limit for very large batches.
        noise_batch_size: B_noise, in examples.
        alpha: 1 for SGD; 0.5 is the usual guess for Adam.

    Example:
        >>> NoiseScaling(0.4, noise_batch_size=1000)(1000)
        0.2
    """

    peak_lr: float
    noise_batch_size: float
    alpha: float = 1.0

    def __call__(self, batch_size: int) -> float:
        """The learning rate for ``batch_size`` examples a step."""
        return float(self.peak_lr / (1 + self.noise_batch_size / batch_size) ** self.alpha)


@dataclass(frozen=True)
class SurgeScaling(ScalingRule):
    """``2 * peak_lr / (sqrt(B_noise / B) + sqrt(B / B_noise))``: the surge law (Li et al. 2024, arXiv 2405.14578).

    It holds for Adam and other optimizers that follow the sign of the gradient.

    Args:
        peak_lr: eta_max, the optimal learning rate at its peak.
        noise_batch_size: B_noise, the batch size of the peak, in examples. Above it the optimal learning rate falls.

    Example:
        >>> rule = SurgeScaling(0.001, noise_batch_size=400)
        >>> rule(400), rule(100), rule(1600)
        (0.001, 0.0008, 0.0008)
    """

    peak_lr: float
    noise_batch_size: float

    def __call__(self, batch_size: int) -> float:
        """The learning rate for ``batch_size`` examples a step."""
        ratio = math.sqrt(batch_size / self.noise_batch_size)
        return 2 * self.peak_lr / (1 / ratio + ratio)
