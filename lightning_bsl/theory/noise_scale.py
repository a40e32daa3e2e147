"""Estimators of the gradient noise scale from norms of gradients, and the batch sizes that follow from it.

The source is McCandlish et al. 2018, *An Empirical Model of Large-Batch Training* (arXiv 1812.06162). G is the mean gradient
over the training examples, S = tr(Sigma) the trace of the covariance of the gradients of single examples, N = S / |G|^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_bsl.theory.surge import LEVEL


class NoiseEstimate(NamedTuple):
    """One measurement. Each of its values may be below 0 by chance.

    Args:
        sq_norm: Estimate of ``|G|^2``, where G is the mean gradient over the examples.
        variance: Estimate of ``tr(Sigma)``, where Sigma is the covariance of the gradients of single examples.
    """

    sq_norm: float
    variance: float


class NoiseScale(NamedTuple):
    """The noise scale of several measurements, with an interval.

    Args:
        sq_norm: Estimate of ``|G|^2``.
        variance: Estimate of ``tr(Sigma)``.
        low: Lower end of the interval of the noise scale, 0 or more.
        high: Upper end; ``inf`` if ``|G|^2`` cannot be told from 0.
        sq_norm_error: Half the width of the interval of ``sq_norm``.
        variance_error: Half the width of the interval of ``variance``.

    Example:
        >>> noise = NoiseScale(sq_norm=0.5, variance=16.0, low=24.0, high=48.0)
        >>> noise.value, noise.within(1.5), noise.within(1.3)
        (32.0, True, False)
    """

    sq_norm: float
    variance: float
    low: float = 0.0
    high: float = math.inf
    sq_norm_error: float = math.inf
    variance_error: float = math.inf

    @property
    def value(self) -> float:
        """The ratio ``variance / sq_norm``. It is never NaN or infinite.

        While ``sq_norm`` is not above 0 there is no ratio. The value is then the least that is likely: ``variance`` over
        ``sq_norm_error``, the largest ``|G|^2`` that the interval allows for an estimate of 0.
        """
        sq_norm = self.sq_norm if self.sq_norm > 0 else self.sq_norm_error
        ratio = max(self.variance, 0.0) / sq_norm if sq_norm > 0 else math.inf
        return ratio if self.low <= ratio < math.inf else self.low

    def within(self, factor: float) -> bool:
        """Whether the interval is narrow: its ends differ by at most ``factor`` squared."""
        return self.low > 0 and self.high <= factor**2 * self.low


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


def jackknife(
    sizes: Sequence[float],
    weights: Sequence[float],
    sq_norms: Sequence[float],
    products: Sequence[float],
    population: float = math.inf,
) -> list[NoiseEstimate]:
    """The jackknife's pseudo-values of a measurement from pieces at the same weights, one for each piece.

    Their mean is the estimate of all pieces, corrected for its bias; their spread says how far to trust it.

    Args:
        sizes: Size n of each piece, in examples or terms.
        weights: Weight w of each piece.
        sq_norms: ``|g|^2`` of each piece's mean gradient g.
        products: ``g . T`` of each piece, where ``T = sum w g``.
        population: Size of the training set, if the pieces were drawn from it without replacement: two of its examples are
            then never the same, so the estimate of ``|G|^2`` lacks ``tr(Sigma) / population``.

    Raises:
        ValueError: There are fewer than 3 pieces.

    Example:
        >>> gradients = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
        >>> values = jackknife([1] * 4, [1] * 4, (gradients**2).sum(axis=1), gradients @ gradients.sum(axis=0))
        >>> np.mean(values, axis=0).round(9).tolist()  # the mean product of two gradients, and the variance
        [1.666666667, 1.333333333]
    """
    n, w, sq, dot = (np.asarray(values, dtype=np.float64) for values in (sizes, weights, sq_norms, products))
    count = len(n)
    if count < 3:
        raise ValueError(f"a jackknife needs 3 pieces or more, and there are {count}")
    whole = float(w @ dot)  # |T|^2
    everything = np.array(_estimate(n, w, sq, whole))
    values = []
    for k in range(count):
        kept = np.arange(count) != k
        without = whole - 2 * w[k] * dot[k] + w[k] ** 2 * sq[k]
        rest = np.array(_estimate(n[kept], w[kept], sq[kept], float(without)))
        sq_norm, variance = (count * everything - (count - 1) * rest).tolist()
        values.append(NoiseEstimate(sq_norm + variance / population, variance))
    return values


def _estimate(n: NDArray[np.float64], w: NDArray[np.float64], sq: NDArray[np.float64], total: float) -> NoiseEstimate:
    return Pieces(len(n), *map(float, (w.sum(), w @ sq, (w / n).sum(), (w**2 / n).sum()))).estimate(total)


def noise_interval(measurements: Sequence[NoiseEstimate], level: float = LEVEL) -> NoiseScale:
    """The noise scale of several measurements, with the interval of Fieller's theorem for a ratio of two means.

    The interval holds each ratio r for which ``variance - r sq_norm`` does not differ from 0, by Student's t. It has no upper
    end while ``|G|^2`` does not differ from 0.

    Args:
        measurements: Independent measurements, or the pseudo-values of [`jackknife`][lightning_bsl.theory.jackknife].
        level: Level of the interval.

    Raises:
        ValueError: There are no measurements.

    Example:
        >>> noise = noise_interval([NoiseEstimate(1.0, 9.0), NoiseEstimate(1.2, 11.0), NoiseEstimate(0.8, 10.0)])
        >>> round(noise.value, 9), noise.low < 10 < noise.high
        (10.0, True)
    """
    if not measurements:
        raise ValueError("there are no measurements of the noise scale: give at least one")
    values = np.asarray(measurements, dtype=np.float64)
    count = len(values)
    sq_norm, variance = values.mean(axis=0).tolist()
    if count < 2:
        return NoiseScale(sq_norm, variance)
    from scipy import special  # imported here, so that the callbacks load without scipy

    t_squared = float(special.stdtrit(count - 1, (1 + level) / 2)) ** 2
    qq, qv, vv = (np.cov(values, rowvar=False)[[0, 0, 1], [0, 1, 1]] * (t_squared / count)).tolist()
    # r is in the interval if a r^2 - 2 b r + c <= 0
    a, b, c = sq_norm**2 - qq, sq_norm * variance - qv, variance**2 - vv
    root = math.sqrt(max(b**2 - a * c, 0.0))
    low = c / (b + root) if c > 0 and b + root > 0 else 0.0
    high = max((b + root) / a, 0.0) if a > 0 and sq_norm > 0 else math.inf
    return NoiseScale(sq_norm, variance, low, high, math.sqrt(qq), math.sqrt(vv))


# --- batch sizes


def norm_test_batch_size(noise_scale: float, theta: float) -> float:
    """The batch size at which the norm test holds: ``N / theta^2`` (arXiv 2402.11215).

    The test asks that the noise of a batch is small against its mean: ``E|g_B - G|^2 = tr(Sigma)/B <= theta^2 |G|^2``.

    Args:
        noise_scale: N.
        theta: The tolerance.

    Example:
        >>> norm_test_batch_size(32.0, theta=0.5)
        128.0
    """
    return noise_scale / theta**2


def cabs_batch_size(lr: float, variance: float, loss: float) -> float:
    """The batch size of CABS: ``eta tr(Sigma) / F`` (Balles, Romero & Hennig, arXiv 1612.05086).

    Derived here: for a loss F of curvature L with minimum 0, a step of plain SGD lowers the loss by
    ``(eta - L eta^2 / 2)|G|^2 - L eta^2 tr(Sigma) / (2 B)`` in the mean. At ``eta = 1/L`` this gain per example is largest at
    ``B = 2 tr(Sigma) / |G|^2``. With ``|G|^2 = 2 L F``, as for a quadratic whose curvature is L in every direction, this is
    ``eta tr(Sigma) / F``.

    Args:
        lr: Learning rate eta.
        variance: ``tr(Sigma)``.
        loss: F.

    Example:
        >>> cabs_batch_size(lr=0.1, variance=80.0, loss=0.5)
        16.0
    """
    return lr * variance / loss


def dive_batch_statistic(sum_sq_norms: float, sq_norm_of_sum: float, examples: int) -> float:
    """``n sum|g_i|^2 / |sum g_i|^2``, which DiveBatch multiplies by a factor to get its batch size (arXiv 2509.16173).

    Derived here: if all n gradients are taken at the same weights, it is ``1 + N``, where N has the covariance over the n
    examples, ``tr(Sigma) = sum|g_i|^2 / n - |G|^2``.

    Args:
        sum_sq_norms: ``sum|g_i|^2`` over the gradients of single examples.
        sq_norm_of_sum: ``|sum g_i|^2``.
        examples: Their number n.

    Example:
        >>> dive_batch_statistic(sum_sq_norms=6.0, sq_norm_of_sum=4.0, examples=2)  # of the gradients 1 + sqrt(2), 1 - sqrt(2)
        3.0
    """
    return examples * sum_sq_norms / sq_norm_of_sum


def adascale_gain(noise_scale: float, base_batch_size: float, batch_size: float) -> float:
    """AdaScale's gain: how many steps of the base batch size one step of ``batch_size`` is worth (arXiv 2007.05105).

    It is ``(1 + N / b_0) / (1 + N / B)``. AdaScale multiplies the learning rate of ``b_0`` by it.

    Args:
        noise_scale: N.
        base_batch_size: ``b_0``.
        batch_size: B.

    Example:
        >>> [round(adascale_gain(2.0, 1, size), 9) for size in (2, 4, 10)]
        [1.5, 2.0, 2.5]
    """
    return (1 + noise_scale / base_batch_size) / (1 + noise_scale / batch_size)
