"""Estimators of the gradient noise scale from norms of gradients.

The source is McCandlish et al. 2018, *An Empirical Model of Large-Batch Training* (arXiv 1812.06162).
"""

from __future__ import annotations

from typing import NamedTuple


class NoiseEstimate(NamedTuple):
    """Estimates from one step. Each of them may be below 0 by chance.

    Args:
        sq_norm: Estimate of ``|G|^2``, where G is the mean gradient over the examples.
        variance: Estimate of ``tr(Sigma)``, where Sigma is the covariance of the gradients of single examples.
    """

    sq_norm: float
    variance: float


def estimate_noise(small_sq_norm: float, small_size: float, big_sq_norm: float, big_size: float) -> NoiseEstimate:
    """Unbiased estimates from the gradients of two batch sizes (McCandlish et al., appendix A.1).

    Args:
        small_sq_norm: Squared norm of the gradient over ``small_size`` examples, or the mean of several such squared norms.
        small_size: The smaller number of examples.
        big_sq_norm: Squared norm of the gradient over ``big_size`` examples.
        big_size: The larger number of examples.

    Example:
        >>> estimate_noise(small_sq_norm=5 + 12 / 4, small_size=4, big_sq_norm=5 + 12 / 8, big_size=8)
        NoiseEstimate(sq_norm=5.0, variance=12.0)
    """
    variance = (small_sq_norm - big_sq_norm) / (1 / small_size - 1 / big_size)
    return NoiseEstimate(big_sq_norm - variance / big_size, variance)


class Pieces(NamedTuple):
    """Sums over the pieces (micro-batches) of a step. The sums of several processes can be added.

    A piece of n examples with mean gradient g has a weight w in the step's gradient: ``G_step = sum w g``. Since
    ``E|g|^2 = |G|^2 + tr(Sigma)/n``, the weighted means of ``|g|^2`` and of ``1/n`` act as the squared norm and the inverse
    size of one small batch, even if the pieces differ in size. The difference of the first mean from ``|G_step|^2`` is a mean
    of squares: ``sum w |g - G_step|^2``.

    Args:
        number: Number of pieces.
        weight: Sum of w.
        sq_norm: Sum of ``w |g|^2``.
        small: Sum of ``w / n``.
        big: Sum of ``w^2 / n``.
    """

    number: float = 0.0
    weight: float = 0.0
    sq_norm: float = 0.0
    small: float = 0.0
    big: float = 0.0

    def plus(self, size: float, weight: float, sq_norm: float) -> Pieces:
        """Add a piece.

        Args:
            size: Its size n, in examples or terms.
            weight: Its weight w in the step's gradient.
            sq_norm: The squared norm ``|g|^2`` of its mean gradient.
        """
        piece = (1, weight, weight * sq_norm, weight / size, weight**2 / size)
        return Pieces(*(a + b for a, b in zip(self, piece)))

    def estimate(self, step_sq_norm: float) -> NoiseEstimate:
        """Estimate from two or more pieces and the squared norm of the step's gradient.

        Args:
            step_sq_norm: ``|G_step|^2``.
        """
        small_size, big_size = self.weight / self.small, self.weight**2 / self.big
        # the weights do not sum to 1 if Lightning ends an epoch inside an accumulated step
        return estimate_noise(self.sq_norm / self.weight, small_size, step_sq_norm / self.weight**2, big_size)


class MovingAverage:
    """An exponential moving average with the bias correction of Adam (Kingma & Ba, arXiv 1412.6980, section 3).

    Args:
        smoothing: Weight of the past, between 0 and 1.

    Example:
        >>> average = MovingAverage(0.75)
        >>> average.add(3.0)
        >>> average.value
        3.0
    """

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing
        self.total = self.weight = 0.0

    def add(self, value: float) -> None:
        """Add a value."""
        self.total = self.smoothing * self.total + (1 - self.smoothing) * value
        self.weight = self.smoothing * self.weight + (1 - self.smoothing)

    @property
    def value(self) -> float | None:
        """The average; ``None`` before the first value."""
        return self.total / self.weight if self.weight else None
