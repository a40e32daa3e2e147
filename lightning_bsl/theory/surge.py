"""The surge law: the optimal learning rate of Adam-style optimizers for each batch size, and its fits from a grid search.

The law is that of Li et al. 2024, *Surge Phenomenon in Optimal Learning Rate and Batch Size Scaling* (arXiv 2405.14578). The
law for SGD is that of McCandlish et al. 2018, *An Empirical Model of Large-Batch Training* (arXiv 1812.06162).

Symbols: B is the batch size in examples; S the optimizer steps and E = S B the examples until a target loss is reached; mu_i
and sigma_i are mean and standard deviation of gradient coordinate i over single examples; H is the Hessian of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_bsl.schedules import LinearScaling, NoiseScaling, ScalingRule, SqrtScaling, SurgeScaling

FloatArray = NDArray[np.float64]

LEVEL = 0.95  # of confidence intervals
_WIDE = 20.0  # B_noise is searched from exp(-20) times the smallest batch size to exp(20) times the largest
_GRID = 50  # points of a first grid of log B_noise: the sum of squares may have more than one minimum


# ---------------------------------------------------------------------------------------------- exact and small-batch forms


def _moments(mu: ArrayLike, sigma: ArrayLike) -> tuple[FloatArray, FloatArray]:
    mean, deviation = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mean.ndim != 1 or mean.shape != deviation.shape or mean.size == 0:
        raise ValueError(
            f"mu has shape {mean.shape}, sigma {deviation.shape}: give two vectors [d], with one value for each coordinate"
        )
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation >= 0).all()):
        raise ValueError(
            "mu must be finite, and sigma finite and not below 0: sigma is a standard deviation; leave out coordinates "
            "with other values"
        )
    return mean, deviation


def _matrix(hessian: ArrayLike, size: int) -> FloatArray:
    matrix = np.asarray(hessian, dtype=np.float64)
    if matrix.shape != (size, size):
        raise ValueError(f"hessian has shape {matrix.shape}: write a [{size}, {size}] matrix, since mu has {size} coordinates")
    if not np.isfinite(matrix).all():
        raise ValueError("hessian has values that are not finite: compute it again in float64")
    return matrix


def expected_sign(mu: ArrayLike, sigma: ArrayLike, batch_size: ArrayLike) -> FloatArray:
    """Mean sign of each coordinate of a batch gradient: E_i(B) = erf(sqrt(B/2) mu_i / sigma_i).

    This is Theorem 2 of Li et al. (arXiv 2405.14578). It assumes that coordinate i of a batch gradient is normal with mean mu_i
    and variance sigma_i^2 / B. Without noise (sigma_i = 0) the result is sign(mu_i).

    Args:
        mu: Means [d].
        sigma: Standard deviations of a single example [d].
        batch_size: B, any shape [...]; ``math.inf`` gives the limit of large batches.

    Returns:
        Array [..., d].

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, a negative sigma, a batch size that is not above 0.

    Example:
        >>> expected_sign([0.1, -0.1, 0.0], [1.0, 1.0, 1.0], [100, math.inf]).round(3).tolist()
        [[0.683, -0.683, 0.0], [1.0, -1.0, 0.0]]
    """
    from scipy import special  # imported here, so that the callbacks load without scipy

    mean, deviation = _moments(mu, sigma)
    batch = np.asarray(batch_size, dtype=np.float64)
    if not (batch > 0).all():
        raise ValueError(f"batch_size={batch}: write numbers above 0 (math.inf for the limit of large batches)")
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.sqrt(batch / 2)[..., None] * (mean / deviation)
    # a mean of 0 has mean sign 0 at every B, also where z would be inf * 0
    return np.asarray(special.erf(np.where(mean == 0, 0.0, z)), dtype=np.float64)


def _gain_and_curvature(
    mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike, batch_size: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Means of s.mu and s'Hs, where s are the signs of a batch gradient."""
    signs = expected_sign(mu, sigma, batch_size)
    mean, deviation = _moments(mu, sigma)
    matrix = _matrix(hessian, mean.size)
    diagonal = np.diag(matrix)
    moves = ((mean != 0) | (deviation > 0)).astype(np.float64)  # E s_i^2: 0 where the gradient is always 0, else 1
    curvature = moves @ diagonal + ((signs @ matrix) * signs).sum(-1) - signs**2 @ diagonal
    if not (curvature > 0).all():
        raise ValueError(
            f"the mean curvature along the update is {np.min(curvature):g}: the quadratic model has no best learning rate. "
            "Use a positive definite hessian (a Gauss-Newton or Fisher matrix, or add damping to its diagonal)"
        )
    return signs @ mean, curvature


def optimal_lr(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike, batch_size: ArrayLike) -> FloatArray:
    """Learning rate with the largest expected drop of a quadratic loss under updates -eta sign(G).

    By Theorem 2 of Li et al. (arXiv 2405.14578), for gradient coordinates with independent noise, it is
    eta_opt(B) = sum_i E_i mu_i / [sum_i (1 - E_i^2) H_ii + sum_ij E_i E_j H_ij], with E_i of
    [`expected_sign`][lightning_bsl.theory.expected_sign]. The limit of large batches is
    sum_i |mu_i| / sum_ij sign(mu_i) sign(mu_j) H_ij, if no mu_i is 0.

    Args:
        mu: Means of the gradient [d].
        sigma: Standard deviations of the gradient of a single example [d]; where it is 0, the sign is certain.
        hessian: H [d, d].
        batch_size: B, a number or an array; ``math.inf`` gives the limit of large batches.

    Returns:
        Learning rates in the shape of ``batch_size``.

    Raises:
        ValueError: The errors of ``expected_sign``; a hessian that is not [d, d]; a mean curvature along the update that is not
            above 0.

    Example:
        >>> hessian = [[2.0, 1.0], [1.0, 2.0]]
        >>> optimal_lr([0.1, 0.2], [1.0, 1.0], hessian, [1, 100, math.inf]).round(4).tolist()
        [0.0099, 0.0489, 0.05]
    """
    gain, curvature = _gain_and_curvature(mu, sigma, hessian, batch_size)
    return gain / curvature


def optimal_loss_drop(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike, batch_size: ArrayLike) -> FloatArray:
    """Expected drop of the loss in one step at the optimal learning rate: eta_opt sum_i E_i mu_i / 2.

    This is Theorem 2 of Li et al. (arXiv 2405.14578).

    Args:
        mu: Means of the gradient [d].
        sigma: Standard deviations of the gradient of a single example [d].
        hessian: H [d, d].
        batch_size: B, a number or an array.

    Returns:
        Drops in units of the loss, in the shape of ``batch_size``.

    Raises:
        ValueError: The errors of [`optimal_lr`][lightning_bsl.theory.optimal_lr].

    Example:
        >>> optimal_loss_drop([0.1, 0.2], [1.0, 1.0], [[2.0, 1.0], [1.0, 2.0]], [1, 100]).round(5).tolist()
        [0.0002, 0.00633]
    """
    gain, curvature = _gain_and_curvature(mu, sigma, hessian, batch_size)
    return gain**2 / curvature / 2


def _small_batch_sums(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike) -> tuple[float, float, float]:
    """The sums of the small-batch form: of mu_i^2/sigma_i; of H_ii; and of r_i r_j H_ij over i != j, with r = mu/sigma."""
    mean, deviation = _moments(mu, sigma)
    matrix = _matrix(hessian, mean.size)
    if (deviation[mean != 0] == 0).any():
        raise ValueError("sigma is 0 where mu is not: the small-batch form does not hold there. Use optimal_lr, which is exact")
    noisy = deviation > 0
    mean, deviation, matrix = mean[noisy], deviation[noisy], matrix[np.ix_(noisy, noisy)]
    ratio, diagonal = mean / deviation, np.diag(matrix)
    trace, cross = float(diagonal.sum()), float(ratio @ matrix @ ratio - ratio**2 @ diagonal)
    if not (trace > 0 and cross > 0):
        raise ValueError(
            f"the trace of the hessian is {trace:g} and its off-diagonal sum, weighted by mu/sigma, {cross:g}: both must be "
            "above 0, else the small-batch form has no peak and no B_noise. Use optimal_lr, which is exact"
        )
    return float(ratio @ mean), trace, cross


def noise_batch_size(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike) -> float:
    """B_noise, the batch size of the peak of the surge curve (Li et al., arXiv 2405.14578, small-batch form).

    B_noise = pi sum_i H_ii / (2 sum_{i != j} mu_i mu_j H_ij / (sigma_i sigma_j)). The form holds for B much smaller than
    pi sigma_i^2 / (2 mu_i^2). B_noise and [`peak_lr`][lightning_bsl.theory.peak_lr] give the whole surge curve.

    Args:
        mu: Means of the gradient [d].
        sigma: Standard deviations of the gradient of a single example [d].
        hessian: H [d, d].

    Returns:
        B_noise, in examples.

    Raises:
        ValueError: Shapes or values that [`optimal_lr`][lightning_bsl.theory.optimal_lr] refuses; sigma_i = 0 where mu_i is not
            0; a trace or an off-diagonal sum that is not above 0 (the optimal learning rate then has no peak).

    Example:
        >>> mu, sigma, hessian = [0.1, 0.1], [2.0, 2.0], [[1.0, 0.5], [0.5, 1.0]]
        >>> rule = SurgeScaling(peak_lr(mu, sigma, hessian), noise_batch_size(mu, sigma, hessian))
        >>> round(rule.noise_batch_size), round(rule.peak_lr, 4)
        (1257, 0.0707)
        >>> round(rule(4), 3), round(float(optimal_lr(mu, sigma, hessian, 4)), 3)
        (0.008, 0.008)
    """
    _, trace, cross = _small_batch_sums(mu, sigma, hessian)
    return math.pi * trace / (2 * cross)


def peak_lr(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike) -> float:
    """eta_max, the learning rate at the peak of the surge curve (Li et al., arXiv 2405.14578, small-batch form).

    eta_max = sqrt(B_noise / (2 pi)) sum_i (mu_i^2 / sigma_i) / sum_i H_ii.

    Args:
        mu: Means of the gradient [d].
        sigma: Standard deviations of the gradient of a single example [d].
        hessian: H [d, d].

    Returns:
        The learning rate.

    Raises:
        ValueError: The errors of [`noise_batch_size`][lightning_bsl.theory.noise_batch_size].

    Example:
        >>> round(peak_lr([0.1, 0.1], [2.0, 2.0], [[1.0, 0.5], [0.5, 1.0]]), 4)
        0.0707
    """
    gain, trace, cross = _small_batch_sums(mu, sigma, hessian)
    return gain / math.sqrt(4 * trace * cross)


def peak_loss_drop(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike) -> float:
    """dL_max, the limit of the drop of the loss in one step for large B, in the small-batch form.

    dL_max = B_noise (sum_i mu_i^2 / sigma_i)^2 / (pi sum_i H_ii), derived here from Theorem 2 of Li et al. (arXiv 2405.14578).

    Args:
        mu: Means of the gradient [d].
        sigma: Standard deviations of the gradient of a single example [d].
        hessian: H [d, d].

    Returns:
        The drop, in units of the loss.

    Raises:
        ValueError: The errors of [`noise_batch_size`][lightning_bsl.theory.noise_batch_size].

    Example:
        >>> round(peak_loss_drop([0.1, 0.1], [2.0, 2.0], [[1.0, 0.5], [0.5, 1.0]]), 4)
        0.02
    """
    gain, _, cross = _small_batch_sums(mu, sigma, hessian)
    return gain**2 / (2 * cross)


# ------------------------------------------------------------------------------------------------------------------- curves


def lr_curve(rule: ScalingRule, batch_size: ArrayLike) -> FloatArray:
    """The learning rates of a scaling rule for an array of batch sizes.

    Args:
        rule: The scaling rule.
        batch_size: B, a number or an array.

    Returns:
        Learning rates in the shape of ``batch_size``.

    Example:
        >>> lr_curve(SurgeScaling(0.001, noise_batch_size=400), [100, 400, 1600]).tolist()
        [0.0008, 0.001, 0.0008]
    """
    return np.asarray(np.vectorize(rule, otypes=[np.float64])(np.asarray(batch_size, dtype=np.float64)))


def loss_drop(batch_size: ArrayLike, peak_loss_drop: float, noise_batch_size: float) -> FloatArray:
    """Drop of the loss in one step at the optimal learning rate: dL_opt(B) = dL_max / (1 + B_noise / B).

    The formula is that of McCandlish et al. (arXiv 1812.06162) for SGD, and of Li et al. (arXiv 2405.14578) for Adam.

    Args:
        batch_size: B, a number or an array.
        peak_loss_drop: dL_max, the limit for large batches, in units of the loss.
        noise_batch_size: B_noise, in examples.

    Returns:
        Drops in the shape of ``batch_size``.

    Raises:
        ValueError: ``peak_loss_drop`` or ``noise_batch_size`` is not finite and above 0.

    Example:
        >>> loss_drop([100, 400], peak_loss_drop=0.5, noise_batch_size=400).tolist()
        [0.1, 0.25]
    """
    return lr_curve(NoiseScaling(peak_loss_drop, noise_batch_size), batch_size)  # the formula of the rate with alpha = 1


def critical_batch_size_at_loss(loss: ArrayLike, coefficient: float, alpha: float) -> FloatArray:
    """The critical batch size at a loss L: B_crit(L) = B_* / L^(1 / alpha_B) (Kaplan et al., arXiv 2001.08361, eq. 1.4).

    Args:
        loss: L above 0, a number or an array.
        coefficient: B_*, the value at a loss of 1, in the unit of the result; 2e8 tokens for the paper's language models.
        alpha: alpha_B; 0.21 for the paper's language models.

    Returns:
        B_crit in the shape of ``loss``.

    Raises:
        ValueError: A value that is not finite and above 0.

    Example:
        >>> round(float(critical_batch_size_at_loss(3.0, coefficient=2e8, alpha=0.21)))
        1069114
    """
    values = np.asarray(loss, dtype=np.float64)
    for name, value in {"loss": values, "coefficient": np.asarray(coefficient), "alpha": np.asarray(alpha)}.items():
        if not (np.isfinite(value).all() and (value > 0).all()):
            raise ValueError(f"{name}={value}: write finite numbers above 0")
    return np.asarray(coefficient / values ** (1 / alpha))


# --------------------------------------------------------------------------------------------------------------------- fits


class Estimate(NamedTuple):
    """A fitted value with its confidence interval.

    Attributes:
        value: The estimate.
        standard_error: Standard error in the unit of the value, to first order.
        low: Lower end of the confidence interval; 0 if the data give none.
        high: Upper end of the confidence interval; ``math.inf`` if the data give none.

    Example:
        >>> Estimate(412.0, 20.0, 350.0, 480.0).high
        480.0
    """

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class TradeoffFit:
    """The trade-off between steps and examples, fitted by [`fit_noise_batch_size`][lightning_bsl.theory.fit_noise_batch_size].

    Attributes:
        noise_batch_size: B_noise, in examples.
        min_steps: S_min, the limit of the steps for large batches.
        min_examples: E_min = B_noise S_min, the limit of the examples for small batches.
        degrees: Degrees of freedom of the standard errors: the number of points - 2.

    Example:
        >>> estimate = Estimate(400.0, 20.0, 360.0, 440.0)
        >>> TradeoffFit(estimate, estimate, estimate, degrees=6).noise_batch_size.value
        400.0
    """

    noise_batch_size: Estimate
    min_steps: Estimate
    min_examples: Estimate
    degrees: int


class CriticalBatchFit(NamedTuple):
    """The power law of ``critical_batch_size_at_loss``, fitted by ``fit_critical_batch_size``.

    Attributes:
        coefficient: B_*, the critical batch size at a loss of 1.
        alpha: alpha_B, the exponent.

    Example:
        >>> CriticalBatchFit(Estimate(2e8, 1e7, 1.8e8, 2.2e8), Estimate(0.21, 0.01, 0.19, 0.23)).alpha.value
        0.21
    """

    coefficient: Estimate
    alpha: Estimate


class CurveFit(NamedTuple):
    """One curve, fitted by [`compare_curves`][lightning_bsl.theory.compare_curves].

    Attributes:
        name: "surge", "alpha=1", "alpha=0.5", "linear" or "sqrt".
        rule: The fitted curve.
        parameters: Number of free parameters of the curve, without the variance of the noise.
        r2: R^2 of log(lr); below 0 if a constant fits better, NaN if all learning rates are equal.
        aicc: Akaike's criterion with the correction for small samples. Only its differences between curves have a meaning.

    Example:
        >>> CurveFit("sqrt", SqrtScaling(0.1, 128), parameters=1, r2=0.98, aicc=-40.0).rule(512)
        0.2
    """

    name: str
    rule: ScalingRule
    parameters: int
    r2: float
    aicc: float


def _columns(least: int, **columns: ArrayLike) -> list[FloatArray]:
    arrays = [np.asarray(values, dtype=np.float64) for values in columns.values()]
    for name, array in zip(columns, arrays):
        if array.ndim != 1:
            raise ValueError(f"{name} has shape {array.shape}: write a flat list of numbers")
        bad = array[~(np.isfinite(array) & (array > 0))]
        if bad.size:
            raise ValueError(f"{name} contains {bad[0]}: every value must be finite and above 0; leave out failed runs")
    if len({array.size for array in arrays}) > 1:
        sizes = " and ".join(f"{array.size} {name}" for name, array in zip(columns, arrays))
        raise ValueError(f"{sizes}: give one of each for every measurement")
    if arrays[0].size < least:
        raise ValueError(f"{arrays[0].size} points: at least {least} are needed; measure more batch sizes")
    return arrays


def _differ(name: str, values: FloatArray) -> None:
    if np.ptp(np.log(values)) < 1e-9:  # E / S of equal batch sizes may differ by rounding
        raise ValueError(f"every {name} is {values[0]:g}: measure at several values, over a factor of 10 or more")


def _quantile(confidence: float, degrees: float) -> float:
    from scipy import stats  # imported here, so that the callbacks load without scipy

    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: write a number between 0 and 1, such as 0.95")
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def _log_estimate(log_value: float, log_error: float, quantile: float) -> Estimate:
    value, factor = math.exp(log_value), math.exp(min(quantile * log_error, 700.0))  # exp(710) overflows
    return Estimate(value, value * log_error, value / factor, value * factor)


def _minimum(function: Callable[[float], float], low: float, high: float) -> tuple[float, int]:
    """The minimiser on an interval, and the index of the nearest grid point: 0 and _GRID - 1 are the ends."""
    from scipy import optimize  # imported here, so that the callbacks load without scipy

    grid = np.linspace(low, high, _GRID)
    best = int(np.argmin([function(u) for u in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    return float(optimize.minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x), best


_NO_TRADEOFF = (
    "larger batches do not need fewer steps ({}). Either noise hides the trade-off, or every batch size is above B_noise, or "
    "the learning rate was not tuned for each batch size: add smaller batch sizes, average more rounds, tune every learning "
    "rate"
)
_NO_MINIMUM = (
    "larger batches do not need more examples ({}): no S_min shows. Either noise hides it, or every batch size is below "
    "B_noise, or the learning rate was not tuned for the small batch sizes: add larger batch sizes, average more rounds, tune "
    "every learning rate"
)


def _fit_line(steps: FloatArray, examples: FloatArray, quantile: float) -> TradeoffFit:
    from scipy import stats  # imported here, so that the callbacks load without scipy

    if np.ptp(examples) == 0:
        raise ValueError(_NO_MINIMUM.format(f"all need {examples[0]:g}, so eq. 22 has no slope"))
    line = stats.linregress(1 / examples, 1 / steps)
    if not line.slope < 0:  # S and E fall or rise together: find out which of the two has the wrong sign
        # the slope of log S against log B is 0 if the steps do not fall, and -1 if the examples do not grow
        fall = stats.linregress(np.log(examples / steps), np.log(steps)).slope
        reason = _NO_TRADEOFF if fall > -0.5 else _NO_MINIMUM
        raise ValueError(reason.format(f"the slope of eq. 22 is {line.slope:g}, not below 0"))
    noise, noise_error = math.log(-line.slope), line.stderr / -line.slope
    least, least_error = -math.log(line.intercept), line.intercept_stderr / line.intercept
    # E_min = -slope / intercept, and the covariance of slope and intercept is -mean(1/E) var(slope)
    covariance = -float(np.mean(1 / examples)) * line.stderr**2 / (line.slope * line.intercept)
    product_error = math.sqrt(max(noise_error**2 + least_error**2 - 2 * covariance, 0.0))
    return TradeoffFit(
        _log_estimate(noise, noise_error, quantile),
        _log_estimate(least, least_error, quantile),
        _log_estimate(noise + least, product_error, quantile),
        steps.size - 2,
    )


def _fit_log(steps: FloatArray, batch: FloatArray, quantile: float) -> TradeoffFit:
    from scipy import optimize  # imported here, so that the callbacks load without scipy

    x, y, degrees = np.log(batch), np.log(steps), steps.size - 2
    ends = float(x.min()) - _WIDE, float(x.max()) + _WIDE

    def residual(u: float) -> FloatArray:  # u = log B_noise; the mean over the points is the best log S_min for this u
        return np.asarray(y - np.logaddexp(0.0, u - x))

    def squares(u: float) -> float:
        return float(residual(u).var()) * y.size

    u, place = _minimum(squares, *ends)
    if place == 0:
        raise ValueError(_NO_TRADEOFF.format("log S does not fall with B: the slope of eq. 22 would not be below 0"))
    if place == _GRID - 1:
        raise ValueError(_NO_MINIMUM.format("E does not grow with B: the slope of eq. 22 would not be below 0"))

    least = squares(u)
    limit = least * (1 + quantile**2 / degrees)  # region of the profile likelihood: sums of squares up to this limit
    low = optimize.brentq(lambda v: squares(v) - limit, ends[0], u) if squares(ends[0]) > limit else -math.inf
    high = optimize.brentq(lambda v: squares(v) - limit, u, ends[1]) if squares(ends[1]) > limit else math.inf

    def extreme(weight: float, sign: float) -> float:
        """The lowest (sign -1) or highest (sign 1) value of log S_min + weight u in this region."""

        def value(v: float) -> float:
            half = math.sqrt(max(limit - squares(v), 0.0) / y.size)
            return float(residual(v).mean()) + weight * v + sign * half

        return value(_minimum(lambda v: -sign * value(v), max(low, ends[0]), min(high, ends[1]))[0])

    slope = 1 / (1 + np.exp(x - u))  # derivative of log S by u; the derivative by log S_min is 1
    mean, width = float(slope.mean()), max(float(slope.var()) * y.size, 1e-60)  # may round to 0 if u is far from all points
    variance = least / degrees

    def estimate(log_value: float, weight: float, log_low: float, log_high: float) -> Estimate:
        value = math.exp(log_value)
        return Estimate(value, value * math.sqrt(variance * weight), math.exp(log_low), math.exp(log_high))

    s_log = float(residual(u).mean())
    s_low = extreme(0.0, -1.0) if high < math.inf else -math.inf  # S_min -> 0 as B_noise -> infinity
    e_low = extreme(1.0, -1.0) if low > -math.inf else -math.inf  # E_min -> 0 as B_noise -> 0
    return TradeoffFit(
        estimate(u, 1 / width, low, high),
        estimate(s_log, 1 / y.size + mean**2 / width, s_low, extreme(0.0, 1.0)),
        estimate(s_log + u, 1 / y.size + (1 - mean) ** 2 / width, e_low, extreme(1.0, 1.0)),
        degrees,
    )


def fit_noise_batch_size(
    steps: ArrayLike, examples: ArrayLike, *, method: Literal["log", "line"] = "log", confidence: float = 0.95
) -> TradeoffFit:
    """Fit B_noise, S_min and E_min to the steps and examples until a target loss is reached, at several batch sizes.

    The source is Li et al. (arXiv 2405.14578), Section 3.2, eq. 22. Both methods fit the same relation,
    1/S = -B_noise (1/E) + 1/S_min. With B = E / S this is S = S_min (1 + B_noise / B).

    * ``"log"``: least squares of log S against B, which has no error. It assumes independent normal errors of log S with equal
      variance (equal relative noise of S). The intervals are those of the profile likelihood, with t quantiles; an end that the
      data do not determine is 0 or ``math.inf``. Several rounds at one batch size can be given as several points.
    * ``"line"``: ordinary least squares of 1/S against 1/E, as in the paper. Since E = S B, the noise of S moves a point along
      both axes, so the line is biased. With a noise of 10%, 12 batch sizes from B_noise/16 to 16 B_noise gave a B_noise that
      was 3% too low, and correct intervals. From B_noise/16 to B_noise it was 24% too low, and 85% of the 95% intervals
      covered the truth. More points do not help: 100 on the wider grid gave 5% too low, and 69% covered the truth.

    Args:
        steps: S, optimizer steps until the target, one value per measurement [n].
        examples: E, examples until the target [n].
        method: ``"log"`` or ``"line"``.
        confidence: Level of the confidence intervals, between 0 and 1.

    Returns:
        The three fitted values with their intervals.

    Raises:
        ValueError: Fewer than three points, unequal lengths, values that are not finite and above 0, only one batch size; a
            slope of eq. 22 that is not below 0: larger batches do not need fewer steps, or do not need more examples.

    Example:
        >>> batch_size = np.array([32, 128, 512, 2048])
        >>> steps = 100 * (1 + 400 / batch_size)
        >>> fit = fit_noise_batch_size(steps, steps * batch_size)
        >>> round(fit.noise_batch_size.value, 3), round(fit.min_steps.value, 3), round(fit.min_examples.value, 1)
        (400.0, 100.0, 40000.0)
    """
    s, e = _columns(3, steps=steps, examples=examples)
    _differ("batch size (examples / steps)", e / s)
    quantile = _quantile(confidence, s.size - 2)
    if method == "line":
        return _fit_line(s, e, quantile)
    if method == "log":
        return _fit_log(s, e / s, quantile)
    raise ValueError(f'method={method!r}: write "log" or "line"')


def _rule(alpha: float | None, peak: float, noise: float) -> ScalingRule:
    return SurgeScaling(peak, noise) if alpha is None else NoiseScaling(peak, noise, alpha)


def fit_peak_lr(
    batch_size: ArrayLike,
    lr: ArrayLike,
    noise_batch_size: float | TradeoffFit,
    *,
    alpha: float | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Fit eta_max to the best learning rate of each batch size.

    The source is Li et al. (arXiv 2405.14578), Section 3.2, eqs. 23 and 24. eta_max is the mean over the measurements of
    eta_opt(B) (sqrt(B_noise/B) + sqrt(B/B_noise)) / 2 for Adam, or of eta_opt(B) (1 + B_noise/B)^alpha if ``alpha`` is given.

    The standard error comes from the spread of the measurements. So it holds for independent errors of mean 0, even if their
    relative size depends on the batch size (a grid of learning rates with a constant step has larger relative errors where
    eta_opt is small). The interval uses t quantiles on the log scale. The error of B_noise matters unless the batch sizes lie
    evenly around B_noise: with 12 batch sizes above B_noise and a noise of 10%, an interval that takes the fitted B_noise as
    exact covered the truth in 73% instead of 95% of cases.

    Args:
        batch_size: B [n].
        lr: eta_opt(B), the best learning rate of each batch size [n].
        noise_batch_size: B_noise. A number is taken as exact. A [`TradeoffFit`][lightning_bsl.theory.TradeoffFit] adds its
            standard error of B_noise (delta method, Welch-Satterthwaite degrees of freedom), as independent of the noise of
            ``lr``. This is a first-order estimate: if the fit hardly determines B_noise (all batch sizes below B_noise/8), the
            interval covered the truth in 91% instead of 95% of cases.
        alpha: ``None`` for the surge law; a number for the law of McCandlish et al. (arXiv 1812.06162): 1 for SGD, 0.5 is the
            usual guess for Adam.
        confidence: Level of the confidence interval, between 0 and 1.

    Returns:
        eta_max with its interval.

    Raises:
        ValueError: Fewer than three points, unequal lengths, values that are not finite and above 0.

    Example:
        >>> batch_size = [64, 256, 1024]
        >>> lr = lr_curve(SurgeScaling(0.001, noise_batch_size=400), batch_size)
        >>> round(fit_peak_lr(batch_size, lr, 400).value, 9)
        0.001
    """
    batch, rates = _columns(3, batch_size=batch_size, lr=lr)
    fit = noise_batch_size if isinstance(noise_batch_size, TradeoffFit) else None
    noise = noise_batch_size.noise_batch_size.value if isinstance(noise_batch_size, TradeoffFit) else noise_batch_size

    def peaks(factor: float) -> FloatArray:
        return rates / lr_curve(_rule(alpha, 1.0, factor * noise), batch)

    values = peaks(1.0)
    mean, variance, degrees = float(values.mean()), float(values.var(ddof=1)) / values.size, values.size - 1.0
    if fit is not None:
        # derivative of the mean by log B_noise
        slope = float(np.mean(peaks(1.0001) - peaks(1 / 1.0001))) / (2 * math.log(1.0001))
        extra = (slope * fit.noise_batch_size.standard_error / noise) ** 2
        if extra > 0:
            degrees = (variance + extra) ** 2 / (variance**2 / degrees + extra**2 / fit.degrees)
        variance += extra
    return _log_estimate(math.log(mean), math.sqrt(variance) / mean, _quantile(confidence, degrees))


def compare_curves(batch_size: ArrayLike, lr: ArrayLike) -> list[CurveFit]:
    """Fit five curves to the best learning rates of several batch sizes, and sort them from best to worst.

    The curves are the surge law of Li et al. (arXiv 2405.14578), the law of McCandlish et al. (arXiv 1812.06162) with alpha = 1
    and 0.5, linear scaling and square-root scaling. Each is fitted by least squares of log(lr), which assumes errors of equal
    relative size. The first three have two free parameters, eta_max and B_noise (Li et al. take B_noise from the steps
    instead); the other two have one.

    The order is by AICc = n log(RSS/n) + 2 k + 2 k (k + 1) / (n - k - 1), where k counts the free parameters and the variance
    of the noise. With the dozen points of a grid search, the plain AIC favours curves with more parameters. A difference below
    2 does not decide between two curves.

    Args:
        batch_size: B [n].
        lr: eta_opt(B), the best learning rate of each batch size [n].

    Returns:
        The fitted curves, the best first.

    Raises:
        ValueError: Fewer than five points (AICc needs them), unequal lengths, values that are not finite and above 0, only one
            batch size.

    Example:
        >>> batch_size = [25, 50, 100, 200, 400, 800, 1600]
        >>> best = compare_curves(batch_size, lr_curve(SurgeScaling(0.001, noise_batch_size=200), batch_size))[0]
        >>> best.name, round(best.rule(200), 6)
        ('surge', 0.001)
    """
    batch, rates = _columns(5, batch_size=batch_size, lr=lr)
    _differ("batch_size", batch)
    y, n = np.log(rates), rates.size
    centre = math.exp(float(np.log(batch).mean()))
    ends = math.log(batch.min()) - _WIDE, math.log(batch.max()) + _WIDE
    total = float(y.var()) * n

    def fitted(name: str, parameters: int, make: Callable[[float], ScalingRule]) -> CurveFit:
        residual = y - np.log(lr_curve(make(1.0), batch))
        # rounding errors are about 1e-16 per point: two curves with residuals below 1e-14 are equally good
        squares = max(float(residual.var()), 1e-28) * n
        k = parameters + 1
        aicc = n * math.log(squares / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
        r2 = 1 - squares / total if np.ptp(y) > 0 else math.nan
        return CurveFit(name, make(math.exp(float(residual.mean()))), parameters, r2, aicc)

    def peaked(name: str, alpha: float | None) -> CurveFit:
        def spread(u: float) -> float:
            return float((y - np.log(lr_curve(_rule(alpha, 1.0, math.exp(u)), batch))).var())

        noise = math.exp(_minimum(spread, *ends)[0])
        return fitted(name, 2, lambda peak: _rule(alpha, peak, noise))

    curves = [
        peaked("surge", None),
        peaked("alpha=1", 1.0),
        peaked("alpha=0.5", 0.5),
        fitted("linear", 1, lambda base: LinearScaling(base, base_batch_size=centre)),
        fitted("sqrt", 1, lambda base: SqrtScaling(base, base_batch_size=centre)),
    ]
    return sorted(curves, key=lambda curve: curve.aicc)


def fit_critical_batch_size(loss: ArrayLike, batch_size: ArrayLike, *, confidence: float = 0.95) -> CriticalBatchFit:
    """Fit the power law of Kaplan et al. (arXiv 2001.08361, eq. 1.4) to critical batch sizes at several losses.

    B_* and alpha_B of [`critical_batch_size_at_loss`][lightning_bsl.theory.critical_batch_size_at_loss] come from the line of
    log B_crit against log L. The fit takes the losses as exact, and the errors of log B_crit as independent and normal with
    equal variance. B_* is the value at L = 1, so its interval is wide if the losses are far from 1. The upper end of alpha_B is
    ``math.inf`` if the data allow a B_crit that does not depend on the loss.

    Args:
        loss: L [n].
        batch_size: B_crit at each loss [n].
        confidence: Level of the confidence intervals, between 0 and 1.

    Returns:
        B_* and alpha_B with their intervals.

    Raises:
        ValueError: Fewer than three points, unequal lengths, values that are not finite and above 0, only one loss; a B_crit
            that does not grow as the loss falls.

    Example:
        >>> loss = [4.0, 3.0, 2.0]
        >>> fit = fit_critical_batch_size(loss, critical_batch_size_at_loss(loss, coefficient=2e8, alpha=0.21))
        >>> round(fit.coefficient.value), round(fit.alpha.value, 6)
        (200000000, 0.21)
    """
    from scipy import stats  # imported here, so that the callbacks load without scipy

    losses, batch = _columns(3, loss=loss, batch_size=batch_size)
    _differ("loss", losses)
    line = stats.linregress(np.log(losses), np.log(batch))
    if not line.slope < 0:
        raise ValueError(
            f"B_crit does not grow as the loss falls (slope {line.slope:g} of the logarithms): the power law does not fit "
            "these points. Measure at losses further apart, or check that the two columns are not swapped"
        )
    quantile = _quantile(confidence, losses.size - 2)
    slope, error = -float(line.slope), float(line.stderr)
    half = quantile * error
    return CriticalBatchFit(
        _log_estimate(float(line.intercept), float(line.intercept_stderr), quantile),
        Estimate(1 / slope, error / slope**2, 1 / (slope + half), 1 / (slope - half) if slope > half else math.inf),
    )
