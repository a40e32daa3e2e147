"""The surge law (P4, arXiv 2405.14578): the optimal learning rate of sign-style optimizers, and its fits from a grid search.

Symbols: B batch size in examples; S optimizer steps and E = S B examples to reach a target loss; mu_i and sigma_i mean and
standard deviation over single examples of gradient coordinate i; H the Hessian of the loss.
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
_GRID = 50  # on a grid of log B_noise first: the sum of squares may have more than one minimum


# ---------------------------------------------------------------------------------------------- exact and small-batch forms


def _moments(mu: ArrayLike, sigma: ArrayLike) -> tuple[FloatArray, FloatArray]:
    mean, deviation = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mean.ndim != 1 or mean.shape != deviation.shape or mean.size == 0:
        raise ValueError(f"mu has shape {mean.shape}, sigma {deviation.shape}: give two vectors [d], one value a coordinate")
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation >= 0).all()):
        raise ValueError("mu must be finite, and sigma finite and not below 0: sigma is a standard deviation")
    return mean, deviation


def _matrix(hessian: ArrayLike, size: int) -> FloatArray:
    matrix = np.asarray(hessian, dtype=np.float64)
    if matrix.shape != (size, size):
        raise ValueError(f"hessian has shape {matrix.shape}: write a [{size}, {size}] matrix, as mu has {size} coordinates")
    if not np.isfinite(matrix).all():
        raise ValueError("hessian has values that are not finite: compute it again in float64")
    return matrix


def expected_sign(mu: ArrayLike, sigma: ArrayLike, batch_size: ArrayLike) -> FloatArray:
    """Mean sign of each coordinate of a batch gradient: E_i(B) = erf(sqrt(B/2) mu_i / sigma_i) (P4, Theorem 2).

    A batch gradient is taken as normal with mean mu_i and variance sigma_i^2 / B. Without noise (sigma_i = 0) it is sign(mu_i).

    Args:
        mu: Means [d].
        sigma: Standard deviations of a single example [d].
        batch_size: B, any shape; ``math.inf`` gives the limit.

    Returns:
        Array of batch_size's shape with d values behind: [..., d].

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, a negative sigma, a batch size that is not above 0.
    """
    from scipy import special  # here, for whoever wants only the callback

    mean, deviation = _moments(mu, sigma)
    batch = np.asarray(batch_size, dtype=np.float64)
    if not (batch > 0).all():
        raise ValueError(f"batch_size={batch}: write numbers above 0 (math.inf for the limit of large batches)")
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.sqrt(batch / 2)[..., None] * (mean / deviation)
    return np.asarray(
        special.erf(np.where(mean == 0, 0.0, z)), dtype=np.float64
    )  # a mean of 0 has no sign at any B: no 0 * inf


def _gain_and_curvature(
    mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike, batch_size: ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Means of s.mu and s'Hs for the signs s of a batch gradient."""
    signs = expected_sign(mu, sigma, batch_size)
    mean, deviation = _moments(mu, sigma)
    matrix = _matrix(hessian, mean.size)
    diagonal = np.diag(matrix)
    moves = ((mean != 0) | (deviation > 0)).astype(np.float64)  # E s_i^2: a gradient of exactly 0 has sign 0
    curvature = moves @ diagonal + ((signs @ matrix) * signs).sum(-1) - signs**2 @ diagonal
    if not (curvature > 0).all():
        raise ValueError(
            f"the mean curvature along the update is {np.min(curvature):g}: the quadratic model has no best learning rate. "
            "Use a positive definite hessian (a Gauss-Newton or Fisher matrix, or add damping to its diagonal)"
        )
    return signs @ mean, curvature


def optimal_lr(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike, batch_size: ArrayLike) -> FloatArray:
    """Learning rate of the largest expected drop of a quadratic loss under updates -eta sign(G) (P4, Theorem 2).

    eta_opt(B) = sum_i E_i mu_i / [sum_i (1 - E_i^2) H_ii + sum_ij E_i E_j H_ij], for gradient coordinates with independent
    noise. ``math.inf`` gives the limit sum_i |mu_i| / sum_ij sign(mu_i) sign(mu_j) H_ij (if no mu_i is 0).

    Args:
        mu: Means of the gradient [d].
        sigma: Standard deviations of a single example's gradient [d]; 0 makes the sign of that coordinate certain.
        hessian: H [d, d].
        batch_size: B, a number or an array.

    Returns:
        Learning rates in the shape of batch_size.

    Raises:
        ValueError: As `expected_sign`; a hessian that is not [d, d]; a mean curvature along the update that is not above 0.

    Example:
        >>> hessian = [[2.0, 1.0], [1.0, 2.0]]
        >>> optimal_lr([0.1, 0.2], [1.0, 1.0], hessian, [1, 100, math.inf]).round(4).tolist()
        [0.0099, 0.0489, 0.05]
    """
    gain, curvature = _gain_and_curvature(mu, sigma, hessian, batch_size)
    return gain / curvature


def optimal_loss_drop(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike, batch_size: ArrayLike) -> FloatArray:
    """Expected drop of the loss in one step with `optimal_lr`: eta_opt sum_i E_i mu_i / 2 (P4, Theorem 2).

    Arguments, shapes and errors are those of `optimal_lr`; the result is in units of the loss.
    """
    gain, curvature = _gain_and_curvature(mu, sigma, hessian, batch_size)
    return gain**2 / curvature / 2


def _small_batch_sums(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike) -> tuple[float, float, float]:
    """The three sums of the small-batch form: mu_i^2/sigma_i; H_ii; and r_i r_j H_ij over i != j, r = mu/sigma."""
    mean, deviation = _moments(mu, sigma)
    matrix = _matrix(hessian, mean.size)
    if (deviation[mean != 0] == 0).any():
        raise ValueError("sigma is 0 where mu is not: no batch is small there. Use optimal_lr, which needs no small-batch form")
    noisy = deviation > 0
    mean, deviation, matrix = mean[noisy], deviation[noisy], matrix[np.ix_(noisy, noisy)]
    ratio, diagonal = mean / deviation, np.diag(matrix)
    trace, cross = float(diagonal.sum()), float(ratio @ matrix @ ratio - ratio**2 @ diagonal)
    if not (trace > 0 and cross > 0):
        raise ValueError(
            f"the trace of the hessian is {trace:g} and its off-diagonal sum, weighted by mu/sigma, {cross:g}: both must be "
            "above 0, else the small-batch form has no peak and no B_noise. Use optimal_lr, which does not need one"
        )
    return float(ratio @ mean), trace, cross


def noise_batch_size(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike) -> float:
    """B_noise of the small-batch form, in examples: pi sum_i H_ii / (2 sum_{i != j} mu_i mu_j H_ij / (sigma_i sigma_j)) (P4).

    The form holds while B is small against pi sigma_i^2 / (2 mu_i^2). Together with `peak_lr` it makes the surge curve.

    Args:
        mu: Means of the gradient [d].
        sigma: Standard deviations of a single example's gradient [d].
        hessian: H [d, d].

    Raises:
        ValueError: Shapes or values as in `optimal_lr`; sigma_i = 0 where mu_i is not 0; a trace or an off-diagonal sum that
            is not above 0 (without positive off-diagonal terms the optimal learning rate has no peak).

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
    """eta_max of the small-batch form: sqrt(B_noise / (2 pi)) sum_i (mu_i^2 / sigma_i) / sum_i H_ii (P4).

    Arguments and errors are those of `noise_batch_size`.
    """
    gain, trace, cross = _small_batch_sums(mu, sigma, hessian)
    return gain / math.sqrt(4 * trace * cross)


def peak_loss_drop(mu: ArrayLike, sigma: ArrayLike, hessian: ArrayLike) -> float:
    """dL_max of the small-batch form: B_noise (sum_i mu_i^2 / sigma_i)^2 / (pi sum_i H_ii) (derived here from Theorem 2).

    Arguments and errors are those of `noise_batch_size`.
    """
    gain, _, cross = _small_batch_sums(mu, sigma, hessian)
    return gain**2 / (2 * cross)


# ------------------------------------------------------------------------------------------------------------------- curves


def lr_curve(rule: ScalingRule, batch_size: ArrayLike) -> FloatArray:
    """The learning rates of a scaling rule for an array of batch sizes, in its shape.

    Example:
        >>> lr_curve(SurgeScaling(0.001, noise_batch_size=400), [100, 400, 1600]).tolist()
        [0.0008, 0.001, 0.0008]
    """
    return np.asarray(np.vectorize(rule, otypes=[np.float64])(np.asarray(batch_size, dtype=np.float64)))


def loss_drop(batch_size: ArrayLike, peak_loss_drop: float, noise_batch_size: float) -> FloatArray:
    """dL_opt(B) = dL_max / (1 + B_noise / B): the drop of one step at the optimal learning rate (M18; P4), B of any shape."""
    return lr_curve(NoiseScaling(peak_loss_drop, noise_batch_size), batch_size)  # the same formula as alpha = 1


def critical_batch_size_at_loss(loss: ArrayLike, coefficient: float, alpha: float) -> FloatArray:
    """B_crit(L) = B_* / L^(1 / alpha_B) (Kaplan et al., arXiv 2001.08361, eq. 1.4).

    Args:
        loss: L above 0, a number or an array.
        coefficient: B_*, the value at a loss of 1, in the unit of the result. The paper's language models: 2e8 tokens.
        alpha: alpha_B; the paper's language models: 0.21.

    Returns:
        B_crit in the shape of loss.

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
    """A fitted value.

    Attributes:
        value: The estimate.
        standard_error: In the unit of the value, to first order.
        low: Lower end of the confidence interval; 0 where the data set none.
        high: Upper end; ``math.inf`` where the data set none.
    """

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class TradeoffFit:
    """What `fit_noise_batch_size` returns.

    Attributes:
        noise_batch_size: B_noise, in examples.
        min_steps: S_min, the steps that no batch size goes below.
        min_examples: E_min = B_noise S_min.
        degrees: Degrees of freedom of the standard errors: points - 2.
    """

    noise_batch_size: Estimate
    min_steps: Estimate
    min_examples: Estimate
    degrees: int


class CriticalBatchFit(NamedTuple):
    """The power law of `critical_batch_size_at_loss`: B_* and alpha_B."""

    coefficient: Estimate
    alpha: Estimate


class CurveFit(NamedTuple):
    """One curve of `compare_curves`.

    Attributes:
        name: "surge", "alpha=1", "alpha=0.5", "linear" or "sqrt".
        rule: The fitted curve.
        parameters: Free parameters of the curve, without the noise's variance.
        r2: R^2 of log(lr); below 0 if a constant fits better, nan if all learning rates are equal.
        aicc: Akaike's criterion with the small-sample correction; only differences between curves mean something.
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
            raise ValueError(f"{name} contains {bad[0]}: every value must be finite and above 0; leave out runs that failed")
    if len({array.size for array in arrays}) > 1:
        sizes = " and ".join(f"{array.size} {name}" for name, array in zip(columns, arrays))
        raise ValueError(f"{sizes}: give one of each a measurement")
    if arrays[0].size < least:
        raise ValueError(f"{arrays[0].size} points: at least {least} are needed; measure more batch sizes")
    return arrays


def _differ(name: str, values: FloatArray) -> None:
    if np.ptp(np.log(values)) < 1e-9:  # E / S of equal batch sizes may differ in its last digits
        raise ValueError(f"every {name} is {values[0]:g}: measure at several, a factor of 10 or more apart")


def _quantile(confidence: float, degrees: float) -> float:
    from scipy import stats  # here, for whoever wants only the callback

    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: write a number between 0 and 1, such as 0.95")
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def _log_estimate(log_value: float, log_error: float, quantile: float) -> Estimate:
    value, factor = math.exp(log_value), math.exp(min(quantile * log_error, 700.0))  # exp(710) overflows
    return Estimate(value, value * log_error, value / factor, value * factor)


def _minimum(function: Callable[[float], float], low: float, high: float) -> tuple[float, int]:
    """The minimiser on an interval, and the grid point nearest to it: 0 and _GRID - 1 are the ends."""
    from scipy import optimize  # here, for whoever wants only the callback

    grid = np.linspace(low, high, _GRID)
    best = int(np.argmin([function(u) for u in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    return float(optimize.minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x), best


_NO_TRADEOFF = (
    "larger batches do not need fewer steps ({}). Either noise hides the trade-off, or every batch size is above B_noise, or "
    "the learning rate was not tuned for each batch size: add smaller batch sizes, average more rounds, tune each"
)
_NO_MINIMUM = (
    "larger batches do not need more examples ({}): no S_min shows. Either noise hides it, or every batch size is below "
    "B_noise, or the learning rate was not tuned for the small ones: add larger batch sizes, average more rounds, tune each"
)


def _fit_line(steps: FloatArray, examples: FloatArray, quantile: float) -> TradeoffFit:
    from scipy import stats  # here, for whoever wants only the callback

    if np.ptp(examples) == 0:
        raise ValueError(_NO_MINIMUM.format(f"all need {examples[0]:g}, so eq. 22 has no slope"))
    line = stats.linregress(1 / examples, 1 / steps)
    if not line.slope < 0:  # S and E fall or rise together: which of the two should have moved the other way?
        fall = stats.linregress(np.log(examples / steps), np.log(steps)).slope  # 0: no fewer steps; -1: no more examples
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
    from scipy import optimize  # here, for whoever wants only the callback

    x, y, degrees = np.log(batch), np.log(steps), steps.size - 2
    ends = float(x.min()) - _WIDE, float(x.max()) + _WIDE

    def residual(u: float) -> FloatArray:  # u = log B_noise; the mean over the points is the best log S_min for it
        return np.asarray(y - np.logaddexp(0.0, u - x))

    def squares(u: float) -> float:
        return float(residual(u).var()) * y.size

    u, place = _minimum(squares, *ends)
    if place == 0:
        raise ValueError(_NO_TRADEOFF.format("log S does not fall with B: the slope of eq. 22 would not be below 0"))
    if place == _GRID - 1:
        raise ValueError(_NO_MINIMUM.format("E does not grow with B: the slope of eq. 22 would not be below 0"))

    least = squares(u)
    limit = least * (1 + quantile**2 / degrees)  # the profile likelihood's region: residuals at most this far from the best
    low = optimize.brentq(lambda v: squares(v) - limit, ends[0], u) if squares(ends[0]) > limit else -math.inf
    high = optimize.brentq(lambda v: squares(v) - limit, u, ends[1]) if squares(ends[1]) > limit else math.inf

    def extreme(weight: float, sign: float) -> float:
        """The lowest (sign -1) or highest (1) value of log S_min + weight u in that region."""

        def value(v: float) -> float:
            half = math.sqrt(max(limit - squares(v), 0.0) / y.size)
            return float(residual(v).mean()) + weight * v + sign * half

        return value(_minimum(lambda v: -sign * value(v), max(low, ends[0]), min(high, ends[1]))[0])

    slope = 1 / (1 + np.exp(x - u))  # derivative of log S by u; by log S_min it is 1
    mean, width = float(slope.mean()), max(float(slope.var()) * y.size, 1e-60)  # 0 after rounding if u is far from all points
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
    """B_noise, S_min and E_min from the steps and examples to a target loss at several batch sizes (P4, Section 3.2, eq. 22).

    Both methods fit the same relation, 1/S = -B_noise (1/E) + 1/S_min, that is S = S_min (1 + B_noise / B) with B = E / S:

    * ``"log"``: least squares of log S against B, which is known exactly. It assumes normal errors of log S, independent and of
      equal variance (equal relative noise of S). Intervals are of the profile likelihood, with t quantiles; an end that the
      data do not determine is 0 or ``math.inf``. Several rounds at one batch size may be given as several points.
    * ``"line"``: the paper's ordinary least squares of 1/S against 1/E. As E = S B, the noise of S moves a point along both
      axes and the line is biased. Measured with a noise of 10%: 12 batch sizes from B_noise/16 to 16 B_noise give a B_noise
      3% too low and intervals that hold; from B_noise/16 to B_noise it is 24% too low, and 85% of the 95% intervals cover
      the truth. More points do not help: 100 on the wider grid give 5% too low, and 69% cover.

    Args:
        steps: S, optimizer steps to the target, one a measurement [n].
        examples: E, examples to the target [n].
        method: ``"log"`` or ``"line"``.
        confidence: Of the intervals.

    Raises:
        ValueError: Fewer than three points, unequal lengths, values that are not finite and above 0, one batch size only; a
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
    """eta_max from the best learning rate of each batch size (P4, Section 3.2, eqs. 23 and 24).

    The mean over the measurements of eta_opt(B) (sqrt(B_noise/B) + sqrt(B/B_noise)) / 2 for Adam, or of
    eta_opt(B) (1 + B_noise/B)^alpha if alpha is given. Its standard error comes from their spread, so independent errors of
    mean 0 are covered whether their relative size is equal at all batch sizes or not (a grid of learning rates with one step
    width has larger relative errors where eta_opt is small). The interval is of t quantiles on the log scale.

    Unless the batch sizes lie evenly around B_noise, the error of B_noise matters: with 12 of them above B_noise and a noise of
    10%, an interval that takes the fitted B_noise as exact covers 73% instead of 95%.

    Args:
        batch_size: B [n].
        lr: eta_opt(B), the best learning rate found for each [n].
        noise_batch_size: B_noise. A number is taken as exact: the interval is conditional on it. A `TradeoffFit` adds its
            standard error of B_noise (delta method, Welch-Satterthwaite degrees of freedom), as independent of lr's noise. That
            is of first order: where the fit leaves B_noise nearly open (all batch sizes below B_noise/8), 91% instead of 95%.
        alpha: None for the surge law; 1 for SGD, 0.5 the usual guess for Adam in the law of M18.
        confidence: Of the interval.

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
        slope = float(np.mean(peaks(1.0001) - peaks(1 / 1.0001))) / (2 * math.log(1.0001))  # of the mean, by log B_noise
        extra = (slope * fit.noise_batch_size.standard_error / noise) ** 2
        if extra > 0:
            degrees = (variance + extra) ** 2 / (variance**2 / degrees + extra**2 / fit.degrees)
        variance += extra
    return _log_estimate(math.log(mean), math.sqrt(variance) / mean, _quantile(confidence, degrees))


def compare_curves(batch_size: ArrayLike, lr: ArrayLike) -> list[CurveFit]:
    """The surge curve, M18's with alpha = 1 and 0.5, linear and square-root scaling, fitted to (B, eta_opt), best first.

    Each is fitted by least squares of log(lr): errors of equal relative size. The first three have two free parameters
    (eta_max and B_noise, which P4 takes from the steps instead), the other two have one. They are ranked by
    AICc = n log(RSS/n) + 2 k + 2 k (k + 1) / (n - k - 1), k the free parameters plus one for the noise's variance: with the
    dozen points of a grid search the plain AIC favours the curves with more parameters. A difference below 2 decides nothing.

    Args:
        batch_size: B [n].
        lr: eta_opt(B), the best learning rate found for each [n].

    Raises:
        ValueError: Fewer than five points (AICc needs them), unequal lengths, values that are not finite and above 0, one
            batch size only.

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
        # rounding alone leaves about 1e-16 a point: below 1e-14 two curves count as equally good
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
    """B_* and alpha_B of `critical_batch_size_at_loss` from (L, B_crit) pairs: the line of log B_crit against log L.

    The losses are taken as exact and the errors of log B_crit as normal, independent and of equal variance. B_* is the value at
    L = 1: its interval is wide if the losses are far from 1. The upper end of alpha_B is ``math.inf`` if the data allow
    a B_crit that does not depend on the loss.

    Args:
        loss: L [n].
        batch_size: B_crit at that loss [n].
        confidence: Of the intervals.

    Raises:
        ValueError: Fewer than three points, unequal lengths, values that are not finite and above 0, one loss only; a B_crit
            that does not grow as the loss falls.

    Example:
        >>> loss = [4.0, 3.0, 2.0]
        >>> fit = fit_critical_batch_size(loss, critical_batch_size_at_loss(loss, coefficient=2e8, alpha=0.21))
        >>> round(fit.coefficient.value), round(fit.alpha.value, 6)
        (200000000, 0.21)
    """
    from scipy import stats  # here, for whoever wants only the callback

    losses, batch = _columns(3, loss=loss, batch_size=batch_size)
    _differ("loss", losses)
    line = stats.linregress(np.log(losses), np.log(batch))
    if not line.slope < 0:
        raise ValueError(
            f"B_crit does not grow as the loss falls (slope {line.slope:g} of the logarithms): the power law does not describe "
            "these points. Measure losses further apart, or check which column is which"
        )
    quantile = _quantile(confidence, losses.size - 2)
    slope, error = -float(line.slope), float(line.stderr)
    half = quantile * error
    return CriticalBatchFit(
        _log_estimate(float(line.intercept), float(line.intercept_stderr), quantile),
        Estimate(1 / slope, error / slope**2, 1 / (slope + half), 1 / (slope - half) if slope > half else math.inf),
    )
