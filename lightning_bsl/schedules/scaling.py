"""Scaling rules: the learning rate as a function of the batch size."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ScalingRule(ABC):
    """Base class: a learning rate for every batch size.

    Raises:
        ValueError: An argument that is not above 0 and finite.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{type(self).__name__}({field.name}={value}): write a finite number above 0")

    @abstractmethod
    def __call__(self, batch_size: int) -> float:
        """The learning rate for ``batch_size`` examples a step."""

    def factor(self, batch_size: int) -> float:
        """The learning rate for ``batch_size`` over the rule's own, its first argument: what multiplies a module's rates."""
        first, *_ = fields(self) or [None]
        if first is None:
            raise TypeError(f"{type(self).__name__} needs its learning rate as first field, to multiply a module's own rates")
        return self(batch_size) / float(getattr(self, first.name))


@dataclass(frozen=True)
class LinearScaling(ScalingRule):
    """``base_lr * B / base_batch_size`` (Goyal et al., arXiv 1706.02677).

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
    """``base_lr * sqrt(B / base_batch_size)``: the optimal growth gamma = sqrt(delta) of P2.

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
    """``peak_lr / (1 + B_noise / B)**alpha`` (M18).

    Args:
        peak_lr: eta_max, which very large batches approach.
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
    """``2 * peak_lr / (sqrt(B_noise / B) + sqrt(B / B_noise))``: the surge law for Adam-style optimizers (P4).

    Args:
        peak_lr: eta_max, the optimal learning rate at its peak.
        noise_batch_size: B_noise, the batch size of the peak; beyond it the optimal learning rate falls.

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
