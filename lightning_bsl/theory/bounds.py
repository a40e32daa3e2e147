"""The convergence bound of P1 (arXiv 2409.08770), for any plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_bsl.schedules import (
    Constant,
    Cosine,
    Diminishing,
    Exponential,
    JointSchedule,
    Plan,
    Polynomial,
    PolynomialDecay,
    Schedule,
    Warmup,
)
from lightning_bsl.schedules.plan import Run


@dataclass(frozen=True)
class BoundConstants:
    """What the bound must know of a problem.

    Args:
        smoothness: L, the smoothness constant of the mean training loss: the largest eigenvalue of its Hessian.
        gradient_variance: sigma^2, the variance of a single example's gradient: the trace of its covariance.
        loss_gap: f(theta_0) - f*, how far the loss can fall.

    Raises:
        ValueError: A constant that is not finite, ``smoothness <= 0``, or another below 0.
    """

    smoothness: float
    gradient_variance: float
    loss_gap: float

    def __post_init__(self) -> None:
        for name in ("smoothness", "gradient_variance", "loss_gap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name != "smoothness"))):
                raise ValueError(
                    f"`{name}={value}`: write a finite number {'above 0' if name == 'smoothness' else 'of 0 or more'}"
                )

    def allows(self, max_lr: float) -> bool:
        """Whether the bound holds for learning rates up to ``max_lr``: eta_max < 2/L."""
        return 0 < max_lr < 2 / self.smoothness

    def factors(self, max_lr: float) -> tuple[float, float]:
        """C1 = 2 (f(theta_0) - f*) / (2 - L eta_max) and C2 = L sigma^2 / (2 - L eta_max), the factors of B_T and V_T.

        Args:
            max_lr: eta_max, the largest learning rate.

        Raises:
            ValueError: ``max_lr >= 2 / L``.
        """
        if not self.allows(max_lr):
            raise ValueError(
                f"the bound holds for learning rates above 0 and below 2/L = {2 / self.smoothness:.6g}, but the largest is "
                f"{max_lr:.6g}; lower it, or give it a `maximum`"
            )
        rest = 2 - self.smoothness * max_lr
        return 2 * self.loss_gap / rest, self.smoothness * self.gradient_variance / rest


@dataclass(frozen=True)
class BoundTerms:
    """Sums over consecutive optimizer steps, from which the terms of the bound follow.

    Args:
        steps: Number of steps T.
        samples: Examples of all of them.
        lr_sum: sum_t eta_t.
        noise_sum: sum_t eta_t^2 / b_t.
        max_lr: The largest eta_t.

    Example:
        >>> half = BoundTerms(steps=10, samples=80, lr_sum=1.0, noise_sum=0.0125, max_lr=0.1)
        >>> whole = half + half
        >>> whole.bias, whole.variance
        (0.5, 0.0125)
    """

    steps: float
    samples: float
    lr_sum: float
    noise_sum: float
    max_lr: float

    @property
    def bias(self) -> float:
        """B_T = 1 / sum_t eta_t."""
        return 1 / self.lr_sum

    @property
    def variance(self) -> float:
        """V_T = (sum_t eta_t^2 / b_t) / (sum_t eta_t)."""
        return self.noise_sum / self.lr_sum

    def bound(self, constants: BoundConstants) -> float:
        """The bound on min_{t<T} E||grad f(theta_t)||^2 (P1): C1 B_T + C2 V_T.

        It is proven for steps from the start of training, over examples drawn independently of each other.

        Raises:
            ValueError: A learning rate of 2/L or more.
        """
        bias, variance = constants.factors(self.max_lr)
        return bias * self.bias + variance * self.variance

    def __add__(self, after: BoundTerms) -> BoundTerms:
        return BoundTerms(
            self.steps + after.steps,
            self.samples + after.samples,
            self.lr_sum + after.lr_sum,
            self.noise_sum + after.noise_sum,
            max(self.max_lr, after.max_lr),
        )


def bound_terms(plan: Plan) -> list[BoundTerms]:
    """The sums of each stage of a plan, by itself; ``itertools.accumulate`` gives those from the start.

    They are exact: the short last batch of an epoch counts as what it holds. A rate that changes at every step is summed by a
    quadrature that is exact to rounding, not step by step, so that a long plan takes milliseconds.

    Args:
        plan: The plan.

    Raises:
        ValueError: The plan leaves the learning rates to the module.

    Example:
        >>> from lightning_bsl.schedules import Exponential, JointSchedule, plan
        >>> growing = JointSchedule(Exponential(8, factor=2, every=10), Exponential(0.1, factor=1.2, every=10))
        >>> *_, whole = itertools.accumulate(bound_terms(plan(growing, 1000, epochs=30)))
        >>> whole.steps, round(whole.bias, 6), round(whole.variance, 6)
        (2200, 0.004054, 0.009589)
    """
    return [_sums(plan, runs) for runs in plan.runs]


def bound_curve(plan: Plan, points: int = 200) -> list[BoundTerms]:
    """The sums from the start of a plan to ``points`` of its moments, or a few more.

    Args:
        plan: The plan.
        points: How many; only the ends of epochs and of stages are to be had.

    Raises:
        ValueError: The plan leaves the learning rates to the module.
    """
    size = max(1, -(-sum(map(len, plan.runs)) // points))
    parts = (runs[i : i + size] for runs in plan.runs for i in range(0, len(runs), size))
    return list(itertools.accumulate(_sums(plan, part) for part in parts))


def gradient_norm_bounds(plan: Plan, constants: BoundConstants) -> list[tuple[float, float]]:
    """The bound on the full gradient norm along a plan, as (samples, norm) pairs; none where the rates are not below 2/L.

    Args:
        plan: The plan.
        constants: Of the problem.
    """
    if plan.stages[0].lr is None:
        return []
    return [(at.samples, at.bound(constants) ** 0.5) for at in bound_curve(plan) if constants.allows(at.max_lr)]


def stalls(terms: Sequence[BoundTerms], share: float = 0.25) -> list[bool]:
    """Whether B_T stalls in each stage: it takes samples, but its learning rates add next to nothing to sum_t eta_t.

    Where stages are a number of epochs long, their steps shrink as the batch grows, and so does what each adds to the sum,
    unless the learning rate grows as fast as the batch: then B_T does not fall as gamma^-M, whatever the number of stages M
    (derived here).

    Args:
        terms: The sums of each stage, by itself.
        share: A stage stalls if its share of all rates so far is below ``share`` times its share of all samples so far.
    """
    return [
        stage.lr_sum / total.lr_sum < share * stage.samples / total.samples
        for stage, total in zip(terms, itertools.accumulate(terms))
    ]


class Rates(NamedTuple):
    """How fast the terms of the bound vanish.

    Args:
        case: The case of P1, ``"i"`` to ``"iv"``.
        bias: That of B_T.
        variance: That of V_T.
    """

    case: str
    bias: str
    variance: str


def asymptotic_rates(schedule: JointSchedule) -> Rates | None:
    """P1's rate for a schedule whose stages are a number of *steps* long; ``None`` for one that the paper does not treat.

    T counts steps and M stages, delta and gamma are the growth of batch size and learning rate per stage. A batch size at its
    ``maximum`` is constant again. For gamma^2 >= delta, and for batches that grow linearly or slower, the rate is derived here.

    Args:
        schedule: Batch size and learning rate.

    Example:
        >>> from lightning_bsl.schedules import Cosine, Exponential, JointSchedule
        >>> asymptotic_rates(JointSchedule(128, Cosine(0.1)))
        Rates(case='i', bias='O(1/T)', variance='does not vanish')
        >>> asymptotic_rates(JointSchedule(Exponential(8, factor=2), Exponential(0.1, factor=1.2)))
        Rates(case='iii', bias='O(gamma^-M)', variance='O(gamma^-M)')
    """
    batch, lr = schedule.batch_size, schedule.lr
    power = batch.power if isinstance(batch, Polynomial) and batch.slope > 0 else 0.0
    grows = (isinstance(batch, Exponential) and batch.factor > 1) or power > 0
    if not (grows or isinstance(batch, Constant)):
        return None
    if isinstance(lr, Warmup):
        after = asymptotic_rates(JointSchedule(batch, lr.then))
        return Rates("iv", after.bias, after.variance) if grows and after and after.case == "ii" else None
    if growth := schedule.growth():
        delta, gamma = growth
        if math.isclose(gamma**2, delta, rel_tol=1e-9):
            return Rates("iii", "O(gamma^-M)", "O(M gamma^-M)")
        fast = "O(gamma^-M)" if gamma**2 < delta else "O((gamma/delta)^M)" if gamma < delta else "does not vanish"
        return Rates("iii", "O(gamma^-M)", fast)
    if isinstance(lr, Diminishing):
        return Rates("ii", "O(1/sqrt T)", "O(1/sqrt T)") if grows else Rates("i", "O(1/sqrt T)", "O(log T / sqrt T)")
    if isinstance(lr, (Constant, Cosine, PolynomialDecay)):
        if 0 < power <= 1:  # sum_t 1 / b_t diverges
            return Rates("ii", "O(1/T)", "O(log T / T)" if power == 1 else f"O(T^-{power:g})")
        return Rates("ii", "O(1/T)", "O(1/T)") if grows else Rates("i", "O(1/T)", "does not vanish")
    return None


def _sums(plan: Plan, runs: Sequence[Run]) -> BoundTerms:
    """The sums over runs of one stage."""
    lr = plan.schedule.lr
    # nobody knows the shape of a plain function
    smooth = isinstance(lr, Schedule) and not (isinstance(lr, Warmup) and not isinstance(lr.then, Schedule))
    joined = _joined(runs) if smooth and isinstance(lr, Schedule) and lr.unit == "step" else runs
    sums = []
    for run in joined:
        rate = _rate(plan, run)
        if not run.every_step:
            total = _direct(rate, [0]) * (run.steps, run.steps, 1)
        else:
            total = _quadrature(rate, run.steps) if smooth else _direct(rate, range(run.steps))
        sums.append(total / (1, run.batch_size, 1))
    noise = [noise for _, noise, _ in sums]
    for run in runs:
        if missing := run.steps * run.batch_size - run.examples:  # the last step of an epoch holds fewer examples
            noise.append(_rate(plan, run)(run.steps - 1) ** 2 * (1 / (run.batch_size - missing) - 1 / run.batch_size))
    return BoundTerms(
        steps=sum(run.steps for run in runs),
        samples=sum(run.examples for run in runs),
        lr_sum=math.fsum(lr for lr, _, _ in sums),
        noise_sum=math.fsum(noise),
        max_lr=float(max(most for _, _, most in sums)),
    )


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Runs of one stage as one, where they read a clock that no end of an epoch disturbs."""
    return [replace(runs[0], steps=sum(run.steps for run in runs))]


def _rate(plan: Plan, run: Run) -> Callable[[int], float]:
    """The learning rate of a run's ``step``-th step."""

    def rate(step: int) -> float:
        value = plan.schedule.lr_at(run.start.advance(step * run.batch_size, step), run.batch_size)
        if value is None:
            raise ValueError(
                "the plan leaves the learning rates to the module (`lr=None`), so they cannot be summed; give `lr`"
            )
        return value

    return rate


Sums = NDArray[np.float64]  # of the rates, of their squares; their maximum


def _direct(rate: Callable[[int], float], steps: Iterable[int]) -> Sums:
    rates = [rate(step) for step in steps]
    return np.array([math.fsum(rates), math.fsum(value * value for value in rates), max(rates)])


def _quadrature(rate: Callable[[int], float], length: int) -> Sums:
    """The sums over steps 0 .. length - 1 of a rate that is smooth but for a few kinks.

    A stretch whose sum by quadrature is not that of its halves is halved.
    """

    def block(start: int, size: int) -> Sums:
        if size < _SMALLEST:
            return _direct(rate, range(start, start + size))
        nodes, weights = _nodes(size)
        rates = np.array([rate(start + node) for node in nodes])
        return np.array([weights @ rates, weights @ rates**2, rates.max()])

    def together(left: Sums, right: Sums) -> Sums:
        return np.array([*(left + right)[:2], max(left[2], right[2])])

    def refined(start: int, size: int, whole: Sums) -> Sums:
        if size < _SMALLEST:
            return whole
        half = size // 2
        left, right = block(start, half), block(start + half, size - half)
        halves = together(left, right)
        if np.allclose(halves, whole, rtol=1e-13, atol=0):
            return halves
        return together(refined(start, half, left), refined(start + half, size - half, right))

    return refined(0, length, block(0, length))


_SMALLEST, _POINTS = 96, 16


@lru_cache
def _nodes(size: int) -> tuple[list[int], NDArray[np.float64]]:
    """Nodes among 0 .. size - 1, both ends included, and weights with which polynomials up to degree 15 are summed exactly.

    The polynomials orthonormal over these integers (Gram's) sum to 0, but for the constant one.
    """
    centre = (size - 1) / 2
    nodes = np.rint(centre * (1 - np.cos(np.pi * np.arange(_POINTS) / (_POINTS - 1))))
    before, now = np.zeros(_POINTS), np.full(_POINTS, size**-0.5)
    values, beta = [now], 0.0
    for k in range(1, _POINTS):
        above = k * math.sqrt((size**2 - k**2) / (4 * (4 * k**2 - 1)))
        before, now, beta = now, ((nodes - centre) * now - beta * before) / above, above
        values.append(now)
    sums = np.zeros(_POINTS)
    sums[0] = math.sqrt(size)
    return nodes.astype(int).tolist(), np.linalg.solve(np.array(values), sums)
