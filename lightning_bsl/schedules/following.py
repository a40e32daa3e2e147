"""Rules for the constants of an optimizer that follow the batch size: its betas, its weight decay."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

from lightning_bsl.schedules.checks import check_above_0

Value = TypeVar("Value", float, tuple[float, ...])
FollowingFunction = Callable[[float, int], float]


@dataclass(frozen=True)
class FollowingRule(ABC):
    """Base class of rules for constants that follow the batch size.

    A rule maps the value of a constant at ``base_batch_size`` to its value at another batch size. A plain function
    ``(value, batch_size) -> value`` does the same.

    Args:
        base_batch_size: The batch size for which the constant was chosen, in examples (in tokens, where batch sizes count
            tokens).

    Raises:
        ValueError: ``base_batch_size`` is not above 0 and finite.

    Example:
        >>> @dataclass(frozen=True)
        ... class InverseSqrt(FollowingRule):  # for the eps of Adam, as in arXiv 2205.10287
        ...     def value(self, value, growth):
        ...         return value / growth**0.5
        >>> InverseSqrt(base_batch_size=8)(1e-8, 32)
        5e-09
    """

    base_batch_size: float

    def __post_init__(self) -> None:
        check_above_0(f"{type(self).__name__}(base_batch_size", self.base_batch_size)

    def __call__(self, value: Value, batch_size: int) -> Value:
        """The value of a constant for ``batch_size``; of each element of a tuple.

        Args:
            value: The constant at ``base_batch_size``.
            batch_size: Batch size of one optimizer step.
        """
        growth = batch_size / self.base_batch_size
        if isinstance(value, tuple):
            return tuple(self.value(element, growth) for element in value)
        return self.value(value, growth)

    @abstractmethod
    def value(self, value: float, growth: float) -> float:
        """The value for ``growth`` times the base batch size."""


@dataclass(frozen=True)
class HalfLife(FollowingRule):
    """``beta ** (B / base_batch_size)``: the half-life of a running average stays, counted in samples.

    A running average with decay beta halves the weight of a gradient in ``log(1/2) / log(beta)`` steps. With this rule it takes
    the same number of samples at every batch size (arXiv 2507.07101, for the second beta of Adam). The power stays between 0
    and 1 for every batch size.

    Args:
        base_batch_size: The batch size for which beta was chosen, in examples.

    Raises:
        ValueError: ``base_batch_size`` is not above 0 and finite. When called: a beta outside [0, 1).

    Example:
        >>> HalfLife(base_batch_size=8)(0.5, 24)
        0.125
        >>> HalfLife(base_batch_size=8)((0.9, 0.5), 16)
        (0.81, 0.25)
    """

    def value(self, value: float, growth: float) -> float:
        """The power; a power that is too small for a float is the smallest normal float."""
        if not 0 <= value < 1:
            raise ValueError(
                f"HalfLife keeps the half-life of a running average, but {value} is no decay of one: a decay is 0 or more, and "
                "below 1. Give the constant another rule"
            )
        return max(float(value**growth), sys.float_info.min) if value else 0.0


@dataclass(frozen=True)
class DecayTimescale(FollowingRule):
    """``weight_decay * (B / base_batch_size) ** (1 - lr_power)``: the timescale of a decoupled weight decay stays.

    AdamW multiplies the weights by ``1 - lr * weight_decay`` in each step. So it averages its updates over
    ``tau = B / (lr * weight_decay * D)`` epochs of D examples (arXiv 2405.13698, 2505.13738). With k = B / base_batch_size,
    let the learning rate be ``k ** lr_power`` times the rate ``lr`` of the same run at the base batch size b. Then tau is at
    each moment that of this run: ``k b / (k ** lr_power lr * k ** (1 - lr_power) weight_decay * D) = b / (lr weight_decay D)``.

    Where a plain decay divides the rate by c, Seesaw (arXiv 2510.14717) multiplies the batch size by c and divides the rate by
    sqrt(c). So its rate is sqrt(k) times that of the plain decay, and ``lr_power=0.5`` gives it the tau of the plain decay.

    Args:
        base_batch_size: The batch size for which the weight decay was chosen, in examples.
        lr_power: How the learning rate follows the batch size: 0.5 as its square root (usual for Adam), 0 not at all, 1
            linearly (the weight decay then stays).

    Raises:
        ValueError: ``base_batch_size`` is not above 0 and finite, or ``lr_power`` is not between 0 and 1.

    Example:
        >>> rule = DecayTimescale(base_batch_size=8)
        >>> rule(0.01, 32), DecayTimescale(base_batch_size=8, lr_power=0)(0.01, 32)
        (0.02, 0.04)
    """

    lr_power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        power = self.lr_power
        if isinstance(power, bool) or not isinstance(power, Real) or not 0 <= float(power) <= 1:
            raise ValueError(
                f"DecayTimescale(lr_power={power!r}): write a number from 0 (the learning rate does not follow the batch size) "
                "to 1 (it grows in proportion to it)"
            )

    def value(self, value: float, growth: float) -> float:
        """The weight decay for ``growth`` times the base batch size."""
        return float(value * growth ** (1 - self.lr_power))
