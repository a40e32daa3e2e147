"""The critical batch size at a point of a run, from branches that train on with larger batches.

The idea is that of Merrill et al. 2025, *Critical Batch Size Revisited* (arXiv 2505.23971): branches of a checkpoint train the
same number of samples with the batch size k B. The critical batch size is the largest k B whose smoothed loss comes back to
that of the branch with k = 1, within a tolerance and inside a window of samples. (Part of this is recalled, not checked.) Our
choice: paired seeds, the comparison at the end of the window, the mean over the last part of the window as smoothing, the
interpolation between the factors, and the interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.theory.surge import LEVEL, Estimate


@dataclass(frozen=True)
class CriticalBatch:
    """A critical batch size, by [`critical_batch_by_branches`][lightning_bsl.theory.critical_batch_by_branches].

    Attributes:
        base: B, the batch size of the branches with factor 1, in examples.
        value: B*, in examples: where the difference of the losses crosses the tolerance; the largest batch size of the branches
            if none of them crosses it.
        low: Lower end of the confidence interval; at most the largest batch size of the branches.
        high: Upper end of the confidence interval; ``math.inf`` if no branch is worse than the tolerance beyond doubt.
        passed: The largest batch size of the branches that passes, with all smaller ones.
        safe: The largest batch size of the branches that passes beyond doubt, with all smaller ones: the upper end of the
            interval of its difference is within the tolerance.
        at_least: Whether all branches pass, so that B* is ``value`` or more.
        differences: By factor, the mean difference of the loss from that with factor 1, in units of the loss. It is infinite
            where a branch diverged.
    """

    base: int
    value: float
    low: float
    high: float
    passed: int
    safe: int
    at_least: bool
    differences: Mapping[int, Estimate]


def critical_batch_by_branches(
    batch_size: int,
    samples: ArrayLike,
    losses: Mapping[int, ArrayLike],
    tolerance: float = 0.01,
    smoothing: float = 0.25,
) -> CriticalBatch:
    """Estimate the critical batch size from the losses of branches (Merrill et al. 2025, arXiv 2505.23971).

    A factor passes if its loss is at most ``tolerance`` above that of factor 1, at the end of the window and on average over
    the seeds. B* is the point where the difference first crosses the tolerance, interpolated linearly in the logarithm of the
    factor. Branches of one seed train on the same examples in the same order, so the differences are taken seed by seed: what
    the seeds have in common cancels. The interval has the factors that a t-test (95%) cannot tell from B*: it goes from where
    the upper ends of the differences' t-intervals cross the tolerance to where their lower ends do.

    Args:
        batch_size: B, the batch size of factor 1, in examples.
        samples: Where the losses were measured, in samples of the window [points], in increasing order.
        losses: For each factor the losses [seeds, points], in the same order of seeds. A factor with a loss that is not finite
            at the end of the window has diverged, and does not pass.
        tolerance: In units of the loss.
        smoothing: The losses are averaged over this share of the window, at its end; 0 takes the last point alone.

    Raises:
        ValueError: There is no factor 1 or no other, fewer than two seeds, arrays that do not fit together, a branch of factor
            1 that diverged, or an argument out of range.

    Example:
        >>> base = [[2.0, 1.5], [2.1, 1.6]]
        >>> worse = [[2.2, 1.52], [2.3, 1.62]]
        >>> estimate = critical_batch_by_branches(8, [100, 200], {1: base, 2: base, 4: worse}, tolerance=0.01)
        >>> estimate.passed, round(estimate.value, 1), estimate.at_least
        (16, 22.6, False)
    """
    check_tolerance(tolerance, smoothing)
    factors = check_factors(list(losses))
    check_whole("batch_size", batch_size)
    points = np.asarray(samples, dtype=np.float64)
    if points.ndim != 1 or not points.size or not (np.diff(points) > 0).all() or points[-1] <= 0:
        raise ValueError("`samples` must be one row of increasing numbers, the last of them above 0")
    ends = points > (1 - smoothing) * points[-1]
    ends[-1] = True
    curves = {factor: np.asarray(losses[factor], dtype=np.float64) for factor in factors}
    shape = curves[1].shape
    if len(shape) != 2 or shape[0] < 2 or shape[1] != points.size:
        raise ValueError(
            f"the losses of factor 1 have the shape {shape}: give [seeds, points], with 2 seeds or more and the {points.size} "
            "points of `samples`"
        )
    for factor, curve in curves.items():
        if curve.shape != shape:
            raise ValueError(f"the losses of factor {factor} have the shape {curve.shape}, those of factor 1 {shape}")
    reached = {factor: curve[:, ends].mean(axis=1) for factor, curve in curves.items()}
    if not np.isfinite(reached[1]).all():
        raise ValueError("a branch of factor 1 diverged, so there is nothing to compare with: the run itself is not stable")
    differences = {factor: _mean(reached[factor] - reached[1]) for factor in factors}
    crossings = []  # of the differences, of the upper and of the lower ends of their intervals
    for end in ("value", "high", "low"):
        passes, crossing = _crossing(factors, [getattr(differences[factor], end) for factor in factors], tolerance)
        crossings.append((passes * batch_size, crossing * batch_size))
    (passed, value), (safe, low), (largest, high) = crossings
    most = factors[-1] * batch_size
    high = math.inf if largest == most else high
    return CriticalBatch(batch_size, value, low, high, passed, safe, passed == most, differences)


def check_factors(factors: Sequence[int]) -> list[int]:
    """Check and sort the factors of branches.

    Args:
        factors: By which the batch size is multiplied.

    Raises:
        ValueError: They are not whole numbers above 0, one occurs twice, 1 is not among them, or it is the only one.
    """
    if any(isinstance(factor, bool) or not isinstance(factor, int) or factor < 1 for factor in factors):
        raise ValueError(f"`factors={list(factors)}` must be whole numbers from 1 on, such as [1, 2, 4, 8]")
    if 1 not in factors or len(factors) < 2 or len(set(factors)) < len(factors):
        raise ValueError(
            f"`factors={list(factors)}` must have 1, with which the others are compared, and at least one other, each once: "
            "write [1, 2, 4, 8]"
        )
    return sorted(factors)


def check_tolerance(tolerance: float, smoothing: float) -> None:
    """Check how losses are compared.

    Args:
        tolerance: In units of the loss.
        smoothing: The share of the window over which losses are averaged.

    Raises:
        ValueError: One of them is out of range.
    """
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"`tolerance={tolerance}` must be above 0: how much a loss may lie above another, such as 0.01")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"`smoothing={smoothing}` must lie between 0 and 1: a share of the window, such as 0.25")


def growth_by_branches(batch_sizes: Sequence[int]) -> list[int]:
    """The largest growth that never exceeds what was safe, then or later (our choice).

    A schedule that only grows keeps at a checkpoint at most what is safe at all later ones.

    Args:
        batch_sizes: The safe batch size of each checkpoint, in the order of the run.

    Example:
        >>> growth_by_branches([8, 32, 16, 64])
        [8, 16, 16, 64]
    """
    return [int(size) for size in np.minimum.accumulate(batch_sizes[::-1])[::-1]]


def _mean(differences: NDArray[np.float64]) -> Estimate:
    """The mean of paired differences, with its t-interval."""
    from scipy import stats  # imported here, so that the callbacks load without scipy

    finite = np.isfinite(differences)
    if not finite.all():
        return Estimate(math.inf, math.inf, -math.inf if finite.any() else math.inf, math.inf)
    value, error = differences.mean(), differences.std(ddof=1) / math.sqrt(differences.size)
    half = stats.t.ppf((1 + LEVEL) / 2, differences.size - 1) * error
    return Estimate(float(value), float(error), float(value - half), float(value + half))


def _crossing(factors: Sequence[int], values: Sequence[float], tolerance: float) -> tuple[int, float]:
    """The last factor up to which all values are within the tolerance, and where they cross it; both the last if nowhere."""
    for i, value in enumerate(values):
        if value > tolerance:  # never the first, whose difference is 0
            before = values[i - 1]
            share = 1.0 if before == -math.inf else (tolerance - before) / (value - before)  # 0 at an infinite value
            return factors[i - 1], factors[i - 1] * (factors[i] / factors[i - 1]) ** share
    return factors[-1], float(factors[-1])
