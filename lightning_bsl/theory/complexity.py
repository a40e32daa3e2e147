"""SFO complexity: the number of samples until the bound on the gradient norm is low enough.

SFO (stochastic first-order oracle) complexity counts gradients of single examples: it is the sum of the batch sizes. The bound
is that of Umeda & Iiduka 2025, *Increasing Both Batch Size and Learning Rate Accelerates SGD* (arXiv 2409.08770). The formulas
are those of the same authors in *Optimal Growth Schedules for Batch Size and Learning Rate in SGD that Reduce SFO Complexity*
(arXiv 2508.05297).
"""

from __future__ import annotations

import math
import sys
from typing import Literal, NamedTuple, cast

from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.joint import sfo_exponent
from lightning_bsl.theory.bounds import BoundConstants, BoundTerms, stalls

__all__ = [
    "GrowthCost",
    "critical_batch_size",
    "growth_to_reach",
    "optimal_gamma",
    "sfo_exponent",
    "sfo_to_reach",
    "steps_to_reach",
]


def steps_to_reach(eps: float, batch_size: float, lr: float, constants: BoundConstants) -> float:
    """Steps until the bound is eps^2, at constant batch size and learning rate: T(b) = C1 b / (eta (eps^2 b - C2 eta)).

    The formula is from arXiv 2508.05297.

    Args:
        eps: Gradient norm to reach: min_t E||grad f(theta_t)||^2 <= eps^2.
        batch_size: b, in examples.
        lr: eta.
        constants: The constants of the problem.

    Returns:
        The number of steps, not rounded.

    Raises:
        ValueError: This batch size never reaches ``eps`` (eps^2 b <= C2 eta); ``lr`` is not below 2/L; ``eps`` or
            ``batch_size`` is not above 0.

    Example:
        >>> problem = BoundConstants(smoothness=1, gradient_variance=1, loss_gap=1)
        >>> round(steps_to_reach(eps=0.1, batch_size=64, lr=0.1, constants=problem))
        1147
    """
    _check_eps(eps)
    if not batch_size > 0:
        raise ValueError(f"`batch_size={batch_size}` must be above 0: write a number of examples")
    bias, variance = constants.factors(lr)
    room = eps**2 * batch_size - variance * lr
    if room <= 0:
        noise, least = math.sqrt(variance * lr / batch_size), variance * lr / eps**2
        raise ValueError(
            f"a constant batch size of {batch_size:g} with learning rate {lr:g} never brings the bound to eps = {eps:g}: the "
            f"noise alone is {noise:.4g} (eps^2 b <= C2 eta, arXiv 2508.05297). Write a batch size above {least:.6g} or a "
            f"learning rate below {_lr_below(eps, batch_size, constants):.6g}, or let the batch size grow"
        )
    return bias * batch_size / (lr * room)


def sfo_to_reach(eps: float, batch_size: float, lr: float, constants: BoundConstants) -> float:
    """Samples until the bound is eps^2, at constant batch size and learning rate: SFO(b) = b T(b), convex in b.

    T(b) is [`steps_to_reach`][lightning_bsl.theory.steps_to_reach]; the formula is from arXiv 2508.05297.

    Args:
        eps: Gradient norm to reach.
        batch_size: b, in examples.
        lr: eta.
        constants: The constants of the problem.

    Returns:
        The number of samples, not rounded.

    Raises:
        ValueError: The same as for ``steps_to_reach``.

    Example:
        >>> problem = BoundConstants(smoothness=1, gradient_variance=1, loss_gap=1)
        >>> round(sfo_to_reach(eps=0.1, batch_size=64, lr=0.1, constants=problem))
        73405
    """
    return batch_size * steps_to_reach(eps, batch_size, lr, constants)


def critical_batch_size(eps: float, lr: float, constants: BoundConstants) -> float:
    """The constant batch size that reaches eps with the fewest samples: b* = 2 C2 eta / eps^2 (arXiv 2508.05297).

    It takes 4 C1 C2 / eps^4 samples.

    Args:
        eps: Gradient norm to reach.
        lr: eta.
        constants: The constants of the problem.

    Returns:
        b*, in examples, not rounded.

    Raises:
        ValueError: ``lr`` is not below 2/L, or ``eps`` is not above 0.

    Example:
        >>> round(critical_batch_size(0.1, 0.1, BoundConstants(smoothness=1, gradient_variance=1, loss_gap=1)), 2)
        10.53
    """
    _check_eps(eps)
    _, variance = constants.factors(lr)
    return 2 * variance * lr / eps**2


def optimal_gamma(delta: float) -> float:
    """The best growth of the learning rate per stage: gamma = sqrt(delta) (arXiv 2508.05297).

    It has the smallest [`sfo_exponent`][lightning_bsl.theory.sfo_exponent].

    Args:
        delta: Growth of the batch size per stage, 1 or more.

    Raises:
        ValueError: ``delta`` below 1.

    Example:
        >>> optimal_gamma(4)
        2.0
    """
    if not delta >= 1:
        raise ValueError(f"`delta={delta}` must be 1 or more: write the growth of the batch size per stage")
    return math.sqrt(delta)


class GrowthCost(NamedTuple):
    """What it takes until the bound is eps^2.

    Args:
        stages: Number of stages, the last one not complete.
        steps: Optimizer steps, not rounded.
        samples: Samples (SFO), not rounded.
        note: A warning about the schedule, or ``None``.

    Example:
        >>> GrowthCost(stages=7, steps=682.2, samples=92302.0).note is None
        True
    """

    stages: int
    steps: float
    samples: float
    note: str | None = None


def growth_to_reach(
    eps: float,
    batch_size: float,
    lr: float,
    delta: float,
    gamma: float,
    every: int,
    constants: BoundConstants,
    *,
    unit: Literal["step", "epoch"] = "step",
    num_examples: int | None = None,
) -> GrowthCost:
    """Steps and samples until the bound is eps^2, if batch size and learning rate grow stage by stage.

    The bound is that of Umeda & Iiduka 2025 (arXiv 2409.08770). Stage m has batch size b_0 delta^m (not rounded; at most
    ``num_examples``) and learning rate eta_0 gamma^m. eta_max of the bound is the largest learning rate so far.

    Args:
        eps: Gradient norm to reach.
        batch_size: b_0, in examples.
        lr: eta_0.
        delta: Growth of the batch size per stage, 1 or more.
        gamma: Growth of the learning rate per stage.
        every: Length of a stage, in ``unit``.
        constants: The constants of the problem.
        unit: ``"step"`` or ``"epoch"``; a stage of E epochs has E ceil(n/b) steps.
        num_examples: n, the training examples; needed for stages of epochs.

    Returns:
        The number of stages, steps and samples.

    Raises:
        ValueError: An argument out of its range. Or the schedule never reaches ``eps``: the learning rates reach 2/L first, or
            their sum is finite, or the noise does not vanish.

    Example:
        >>> problem = BoundConstants(smoothness=1, gradient_variance=1, loss_gap=1)
        >>> cost = growth_to_reach(0.1, 8, 0.1, delta=2, gamma=1.4, every=100, constants=problem)
        >>> cost.stages, round(cost.steps), round(cost.samples)
        (7, 682, 92302)
    """
    _check_eps(eps)
    for name, value, least in (("batch_size", batch_size, 1), ("delta", delta, 1), ("every", every, 1)):
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"`{name}={value}` must be {least} or more")
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(f"`gamma={gamma}` must be above 0")
    if unit not in ("step", "epoch"):
        raise ValueError(f"unknown unit {unit!r}; write 'step' or 'epoch'")
    if num_examples is None and unit == "epoch":
        raise ValueError("stages in epochs need `num_examples`: write the number of training examples")
    check_whole("num_examples", num_examples, or_none=True)
    terms: list[BoundTerms] = []
    total, lowest = BoundTerms(0, 0, 0.0, 0.0, 0.0), math.inf
    why = "the sum of the learning rates is finite, or the noise does not vanish"
    for stage in range(_MOST_STAGES):
        try:
            size, rate = min(batch_size * delta**stage, num_examples or sys.float_info.max), lr * gamma**stage
        except OverflowError:
            break
        if stage and rate >= 2 / constants.smoothness:
            why = f"the learning rate of stage {stage}, {rate:.4g}, is not below 2/L = {2 / constants.smoothness:.4g}"
            break
        length: float = every * (1 if unit == "step" else math.ceil(cast(int, num_examples) / size))
        bias, variance = constants.factors(max(rate, total.max_lr))
        # the smallest k with C1 + C2 (noise_sum + k eta^2 / b) <= eps^2 (lr_sum + k eta)
        behind = bias + variance * total.noise_sum - eps**2 * total.lr_sum
        gain = eps**2 * rate - variance * rate**2 / size
        if behind <= length * gain:
            steps = behind / gain if behind > 0 else 0.0
            terms.append(_terms(steps, size, rate))
            note = _note_of(terms) if unit == "epoch" else None
            return GrowthCost(stage + 1, total.steps + steps, total.samples + steps * size, note)
        terms.append(_terms(length, size, rate))
        before, total = total.lr_sum, total + terms[-1]
        lowest = min(lowest, total.bound(constants))
        if rate < 1e-17 * before:
            break
    else:
        why = "it takes more stages"
    raise ValueError(
        f"the bound does not fall to eps = {eps:g}, only to {math.sqrt(lowest):.4g} in {len(terms)} stages: {why}. Write a "
        f"larger eps, a smaller first learning rate, or another growth; a gamma just below sqrt(delta) = "
        f"{math.sqrt(delta):.6g} takes the fewest samples{_STALLED if unit == 'epoch' else ''}"
    )


_MOST_STAGES = 10_000


def _terms(steps: float, batch_size: float, lr: float) -> BoundTerms:
    return BoundTerms(steps, steps * batch_size, steps * lr, steps * lr**2 / batch_size, lr)


_STALLED = (
    ". If stages are counted in epochs, later stages have fewer steps because the batch grows. So B_T stalls until the batch "
    "is the whole training set: give the stages a length in steps"
)


def _note_of(terms: list[BoundTerms]) -> str | None:
    if not any(stalls(terms)):
        return None
    return f"B_T stalls from stage {stalls(terms).index(True)} on" + _STALLED


def _check_eps(eps: float) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"`eps={eps}` must be finite and above 0: write a gradient norm")


def _lr_below(eps: float, batch_size: float, constants: BoundConstants) -> float:
    """The learning rate at which the noise alone makes the bound eps^2: L sigma^2 eta / (b (2 - L eta)) = eps^2."""
    target = eps**2 * batch_size
    return 2 * target / (constants.smoothness * (constants.gradient_variance + target))
