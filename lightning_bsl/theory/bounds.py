"""The convergence bound of Umeda & Iiduka 2025 (arXiv 2409.08770), for any plan.

For learning rates eta_t <= eta_max < 2/L the paper bounds the smallest squared norm of the full gradient:
min_{t<T} E||grad f(theta_t)||^2 <= C1 B_T + C2 V_T, with a bias term B_T and a variance term V_T.
"""

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
    Linear,
    Plan,
    Polynomial,
    PolynomialDecay,
    Schedule,
)
from lightning_bsl.schedules.plan import Stretch


@dataclass(frozen=True)
class BoundConstants:
    """The constants of a problem that the bound needs.

    Args:
        smoothness: L, the smoothness constant of the mean training loss: the largest eigenvalue of its Hessian.
        gradient_variance: sigma^2, the variance of the gradient of a single example: the trace of its covariance.
        loss_gap: f(theta_0) - f*, the difference between the initial and the lowest loss.

    Raises:
        ValueError: A constant that is not finite; ``smoothness`` not above 0; another constant below 0.

    Example:
        >>> BoundConstants(smoothness=1, gradient_variance=4, loss_gap=2).factors(max_lr=1)
        (4.0, 4.0)
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
        """Whether the bound holds for learning rates up to ``max_lr``: 0 < eta_max < 2/L."""
        return 0 < max_lr < 2 / self.smoothness

    def factors(self, max_lr: float) -> tuple[float, float]:
        """C1 and C2, the factors of B_T and V_T.

        C1 = 2 (f(theta_0) - f*) / (2 - L eta_max) and C2 = L sigma^2 / (2 - L eta_max).

        Args:
            max_lr: eta_max, the largest learning rate.

        Raises:
            ValueError: ``max_lr`` is not above 0 and below 2/L.
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
    """Sums over consecutive optimizer steps t. They give B_T and V_T, the terms of the bound (arXiv 2409.08770).

    Two of them can be added: the sum is over the steps of both.

    Args:
        steps: T, the number of steps.
        samples: Number of examples of all steps.
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
        """The bound C1 B_T + C2 V_T on min_{t<T} E||grad f(theta_t)||^2 (arXiv 2409.08770).

        The paper proves it for steps from the start of training, over examples that are drawn independently.

        Args:
            constants: The constants of the problem.

        Raises:
            ValueError: A learning rate of 2/L or more.
        """
        bias_factor, variance_factor = constants.factors(self.max_lr)
        return bias_factor * self.bias + variance_factor * self.variance

    def __add__(self, after: BoundTerms) -> BoundTerms:
        return BoundTerms(
            self.steps + after.steps,
            self.samples + after.samples,
            self.lr_sum + after.lr_sum,
            self.noise_sum + after.noise_sum,
            max(self.max_lr, after.max_lr),
        )


def bound_terms(plan: Plan) -> list[BoundTerms]:
    """The sums of each stage of a plan, over the steps of this stage alone.

    ``itertools.accumulate`` turns them into sums from the start of the plan. They are exact up to rounding: the short last
    batch of an epoch counts the examples that it holds. A learning rate that changes at every step is summed by quadrature,
    so a long plan takes milliseconds.

    Args:
        plan: The plan.

    Returns:
        One entry per stage.

    Raises:
        ValueError: The plan leaves the learning rates to the module (``lr=None``).

    Example:
        >>> from lightning_bsl.schedules import Exponential, JointSchedule, plan
        >>> growing = JointSchedule(Exponential(8, factor=2, every=10), Exponential(0.1, factor=1.2, every=10))
        >>> *_, whole = itertools.accumulate(bound_terms(plan(growing, 1000, epochs=30)))
        >>> whole.steps, round(whole.bias, 6), round(whole.variance, 6)
        (2200, 0.004054, 0.009589)
    """
    return [_sums(plan, stretches) for stretches in plan.stretches]


def bound_curve(plan: Plan, points: int = 200) -> list[BoundTerms]:
    """The sums from the start of a plan to about ``points`` moments of it.

    Args:
        plan: The plan.
        points: Number of moments; there may be a few more, or fewer in a short plan. Each is the end of an epoch or a stage.

    Returns:
        One entry per moment, in their order.

    Raises:
        ValueError: The plan leaves the learning rates to the module (``lr=None``).

    Example:
        >>> from lightning_bsl.schedules import JointSchedule, plan
        >>> [terms.samples for terms in bound_curve(plan(JointSchedule(8, 0.1), 1000, epochs=4), points=2)]
        [2000, 4000]
    """
    size = max(1, -(-sum(map(len, plan.stretches)) // points))
    parts = (stretches[i : i + size] for stretches in plan.stretches for i in range(0, len(stretches), size))
    return list(itertools.accumulate(_sums(plan, part) for part in parts))


def gradient_norm_bounds(plan: Plan, constants: BoundConstants) -> list[tuple[float, float]]:
    """The bound on the full gradient norm along a plan.

    It is the square root of the bound on min_{t<T} E||grad f(theta_t)||^2 of arXiv 2409.08770.

    Args:
        plan: The plan.
        constants: The constants of the problem.

    Returns:
        Pairs of samples and norm. They end where a learning rate is 2/L or more; there are none if the plan has no learning
        rates.

    Example:
        >>> from lightning_bsl.schedules import JointSchedule, plan
        >>> problem = BoundConstants(smoothness=1, gradient_variance=1, loss_gap=1)
        >>> samples, norm = gradient_norm_bounds(plan(JointSchedule(8, 0.1), 1000, epochs=4), problem)[-1]
        >>> samples, round(norm, 3)
        (4000, 0.166)
    """
    if plan.stages[0].lr is None:
        return []
    curve = (terms for terms in bound_curve(plan) if constants.allows(terms.max_lr))
    return [(terms.samples, terms.bound(constants) ** 0.5) for terms in curve]


def stalls(terms: Sequence[BoundTerms], share: float = 0.25) -> list[bool]:
    """Whether B_T stalls in each stage: the stage takes samples, but adds very little to sum_t eta_t.

    This happens if stages are counted in epochs. As the batch grows, a stage has fewer steps and adds less to the sum, unless
    the learning rate grows as fast as the batch. Then B_T does not fall as gamma^-M with the number of stages M (derived
    here).

    Args:
        terms: The sums of each stage alone, as [`bound_terms`][lightning_bsl.theory.bound_terms] returns them.
        share: A stage stalls if its fraction of sum_t eta_t so far is below ``share`` times its fraction of the samples so far.

    Returns:
        One value per stage.

    Example:
        >>> from lightning_bsl.schedules import Exponential, JointSchedule, plan
        >>> growing = JointSchedule(Exponential(8, factor=2, every=10), 0.1)
        >>> stalls(bound_terms(plan(growing, 1000, epochs=50)))
        [False, False, False, False, True]
    """
    return [
        stage.lr_sum / total.lr_sum < share * stage.samples / total.samples
        for stage, total in zip(terms, itertools.accumulate(terms))
    ]


class AsymptoticRates(NamedTuple):
    """How fast the terms of the bound vanish.

    Args:
        case: The case of Umeda & Iiduka (arXiv 2409.08770), ``"i"`` to ``"iv"``.
        bias: The rate of B_T, such as ``"O(1/T)"``.
        variance: The rate of V_T.

    Example:
        >>> AsymptoticRates(case="i", bias="O(1/T)", variance="does not vanish").bias
        'O(1/T)'
    """

    case: str
    bias: str
    variance: str


def asymptotic_rates(schedule: JointSchedule) -> AsymptoticRates | None:
    """The rates of Umeda & Iiduka (arXiv 2409.08770) for a schedule whose stages are counted in *steps*.

    T counts steps and M counts stages; delta and gamma are the growth of batch size and learning rate per stage. The rates do
    not take into account that a batch size with a ``maximum`` ends as a constant one. For gamma^2 >= delta, and for batch sizes
    that grow linearly or slower, the rates are derived here.

    Args:
        schedule: Batch size and learning rate.

    Returns:
        The rates; ``None`` for a schedule that the paper does not treat.

    Example:
        >>> from lightning_bsl.schedules import Cosine, Exponential, JointSchedule
        >>> asymptotic_rates(JointSchedule(128, Cosine(0.1)))
        AsymptoticRates(case='i', bias='O(1/T)', variance='does not vanish')
        >>> asymptotic_rates(JointSchedule(Exponential(8, factor=2), Exponential(0.1, factor=1.2)))
        AsymptoticRates(case='iii', bias='O(gamma^-M)', variance='O(gamma^-M)')
    """
    batch, lr = schedule.batch_size, schedule.lr
    power = batch.power if isinstance(batch, Polynomial) and batch.slope > 0 else 0.0
    grows = (isinstance(batch, Exponential) and batch.factor > 1) or power > 0
    if not (grows or isinstance(batch, Constant)):
        return None
    if isinstance(lr, Schedule) and lr.after_warmup is not lr:
        after = asymptotic_rates(JointSchedule(batch, lr.after_warmup))
        return after._replace(case="iv") if grows and after and after.case == "ii" else None
    if growth := schedule.growth():
        delta, gamma = growth
        if math.isclose(gamma**2, delta, rel_tol=1e-9):
            return AsymptoticRates("iii", "O(gamma^-M)", "O(M gamma^-M)")
        fast = "O(gamma^-M)" if gamma**2 < delta else "O((gamma/delta)^M)" if gamma < delta else "does not vanish"
        return AsymptoticRates("iii", "O(gamma^-M)", fast)
    if isinstance(lr, Diminishing):
        if grows:
            return AsymptoticRates("ii", "O(1/sqrt T)", "O(1/sqrt T)")
        return AsymptoticRates("i", "O(1/sqrt T)", "O(log T / sqrt T)")
    if isinstance(lr, (Constant, Cosine, Linear, PolynomialDecay)) and not lr.rises:
        if 0 < power <= 1:  # sum_t 1 / b_t diverges
            return AsymptoticRates("ii", "O(1/T)", "O(log T / T)" if power == 1 else f"O(T^-{power:g})")
        return AsymptoticRates("ii", "O(1/T)", "O(1/T)") if grows else AsymptoticRates("i", "O(1/T)", "does not vanish")
    return None


def _sums(plan: Plan, stretches: Sequence[Stretch]) -> BoundTerms:
    """The sums over stretches of one stage."""
    lr = plan.schedule.lr
    # quadrature needs a smooth rate; a plain function may have any shape
    smooth = isinstance(lr, Schedule) and lr.names_changes
    joined = _joined(stretches) if smooth and isinstance(lr, Schedule) and lr.unit == "step" else stretches
    sums = []
    for stretch in joined:
        rate = _rate(plan, stretch)
        if not stretch.every_step:
            total = _direct(rate, [0]) * (stretch.steps, stretch.steps, 1)
        else:
            total = _quadrature(rate, stretch.steps) if smooth else _direct(rate, range(stretch.steps))
        sums.append(total / (1, stretch.batch_size, 1))
    noise = [noise for _, noise, _ in sums]
    for stretch in stretches:
        if missing := stretch.steps * stretch.batch_size - stretch.examples:  # a short last step of an epoch
            noise.append(
                _rate(plan, stretch)(stretch.steps - 1) ** 2 * (1 / (stretch.batch_size - missing) - 1 / stretch.batch_size)
            )
    return BoundTerms(
        steps=sum(stretch.steps for stretch in stretches),
        samples=sum(stretch.examples for stretch in stretches),
        lr_sum=math.fsum(lr for lr, _, _ in sums),
        noise_sum=math.fsum(noise),
        max_lr=float(max(most for _, _, most in sums)),
    )


def _joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Join the stretches of one stage; right for a rate that counts steps, since the ends of epochs do not matter to it."""
    return [replace(stretches[0], steps=sum(stretch.steps for stretch in stretches))]


def _rate(plan: Plan, stretch: Stretch) -> Callable[[int], float]:
    """The learning rate of a stretch's ``step``-th step."""

    def rate(step: int) -> float:
        value = plan.schedule.lr_at(stretch.start.advance(step * stretch.batch_size, step), stretch.batch_size)
        if value is None:
            raise ValueError(
                "the plan leaves the learning rates to the module (`lr=None`), so they cannot be summed; give the schedule `lr`"
            )
        return value

    return rate


Sums = NDArray[np.float64]  # sum of the rates, sum of their squares, maximum


def _direct(rate: Callable[[int], float], steps: Iterable[int]) -> Sums:
    rates = [rate(step) for step in steps]
    return np.array([math.fsum(rates), math.fsum(value * value for value in rates), max(rates)])


def _quadrature(rate: Callable[[int], float], length: int) -> Sums:
    """The sums over steps 0 .. length - 1 of a rate that is smooth except at a few kinks.

    A block of steps is halved until its sum equals that of its halves.
    """

    def block(start: int, size: int) -> Sums:
        if size < _SMALLEST:
            return _direct(rate, range(start, start + size))
        nodes, weights = _nodes(size)
        rates = np.array([rate(start + node) for node in nodes])
        return np.array([weights @ rates, weights @ rates**2, rates.max()])

    def joined(left: Sums, right: Sums) -> Sums:
        return np.array([*(left + right)[:2], max(left[2], right[2])])

    def refined(start: int, size: int, whole: Sums) -> Sums:
        if size < _SMALLEST:
            return whole
        half = size // 2
        left, right = block(start, half), block(start + half, size - half)
        halves = joined(left, right)
        if np.allclose(halves, whole, rtol=1e-13, atol=0):
            return halves
        return joined(refined(start, half, left), refined(start + half, size - half, right))

    return refined(0, length, block(0, length))


_SMALLEST, _POINTS = 96, 16


@lru_cache
def _nodes(size: int) -> tuple[list[int], NDArray[np.float64]]:
    """Nodes among 0 .. size - 1, both ends included, and weights that sum polynomials up to degree 15 exactly.

    The weights follow from Gram's polynomials, which are orthonormal over these integers: all but the constant one sum to 0.
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
