"""SFO complexity: the samples that the bound of P1 asks for to reach a gradient norm (P2, arXiv 2508.05297).

SFO (stochastic first-order oracle) complexity is the number of single-example gradients, the sum of the batch sizes.
"""

from __future__ import annotations

import math
import sys
from typing import Literal, NamedTuple, cast

from lightning_bsl.schedules.joint import sfo_exponent
from lightning_bsl.theory.bounds import BoundConstants, BoundTerms, stalls

__all__ = [
    "Reached",
    "critical_batch_size",
    "growth_to_reach",
    "optimal_gamma",
    "sfo_exponent",
    "sfo_to_reach",
    "steps_to_reach",
]


def steps_to_reach(eps: float, batch_size: float, lr: float, constants: BoundConstants) -> float:
    """T(b) = C1 b / (eta (eps^2 b - C2 eta)): steps at constant batch size and learning rate until the bound is eps^2 (P2).

    Args:
        eps: Gradient norm to reach, min_t E||grad f(theta_t)||^2 <= eps^2.
        batch_size: b.
        lr: eta.
        constants: Of the problem.

    Returns:
        The number of steps, not rounded.

    Raises:
        ValueError: ``eps`` is out of reach of this batch size (eps^2 b <= C2 eta), or ``lr`` is not below 2/L.

    Example:
        >>> problem = BoundConstants(smoothness=1, gradient_variance=1, loss_gap=1)
        >>> round(steps_to_reach(eps=0.1, batch_size=64, lr=0.1, constants=problem))
        1147
    """
    _check_eps(eps)
    if not batch_size > 0:
        raise ValueError(f"`batch_size={batch_size}` must be above 0")
    bias, variance = constants.factors(lr)
    room = eps**2 * batch_size - variance * lr
    if room <= 0:
        noise, least = math.sqrt(variance * lr / batch_size), variance * lr / eps**2
        raise ValueError(
            f"a constant batch size of {batch_size:g} with learning rate {lr:g} never brings the bound to eps = {eps:g}: its "
            f"noise alone is {noise:.4g} (eps^2 b <= C2 eta of P2). Write a batch size above {least:.6g}, "
            f"a learning rate below {_lr_below(eps, batch_size, constants):.6g}, or let the batch size grow"
        )
    return bias * batch_size / (lr * room)


def sfo_to_reach(eps: float, batch_size: float, lr: float, constants: BoundConstants) -> float:
    """SFO(b) = b T(b), the samples of [`steps_to_reach`][]: convex in b (P2).

    Args:
        eps: Gradient norm to reach.
        batch_size: b.
        lr: eta.
        constants: Of the problem.

    Raises:
        ValueError: As of [`steps_to_reach`][].
    """
    return batch_size * steps_to_reach(eps, batch_size, lr, constants)


def critical_batch_size(eps: float, lr: float, constants: BoundConstants) -> float:
    """b* = 2 C2 eta / eps^2, the constant batch size with the fewest samples to eps: 4 C1 C2 / eps^4 (P2).

    Args:
        eps: Gradient norm to reach.
        lr: eta.
        constants: Of the problem.

    Raises:
        ValueError: ``lr`` is not below 2/L.

    Example:
        >>> round(critical_batch_size(0.1, 0.1, BoundConstants(smoothness=1, gradient_variance=1, loss_gap=1)), 2)
        10.53
    """
    _check_eps(eps)
    _, variance = constants.factors(lr)
    return 2 * variance * lr / eps**2


def optimal_gamma(delta: float) -> float:
    """sqrt(delta), the growth of the learning rate per stage with the smallest [`sfo_exponent`][] (P2).

    Args:
        delta: Growth of the batch size per stage, 1 or more.

    Raises:
        ValueError: A smaller one.
    """
    if not delta >= 1:
        raise ValueError(f"`delta={delta}` must be 1 or more")
    return math.sqrt(delta)


class Reached(NamedTuple):
    """When the bound reaches eps^2.

    Args:
        stages: Stages begun.
        steps: Optimizer steps, not rounded.
        samples: SFO, not rounded.
        note: What to know about it, or ``None``.
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
) -> Reached:
    """Steps and samples until the bound of P1 is eps^2, where batch size and learning rate grow stage by stage.

    Stage m has batch size b_0 delta^m (not rounded; at most ``num_examples``) and learning rate eta_0 gamma^m. eta_max of the
    bound is the largest rate so far.

    Args:
        eps: Gradient norm to reach.
        batch_size: b_0.
        lr: eta_0.
        delta: Growth of the batch size per stage, 1 or more.
        gamma: Growth of the learning rate per stage.
        every: Length of a stage, in ``unit``.
        constants: Of the problem.
        unit: ``"step"`` or ``"epoch"``; a stage of E epochs has E ceil(n/b) steps.
        num_examples: n; needed for stages of epochs.

    Raises:
        ValueError: ``eps`` is out of reach: the learning rates reach 2/L first, or sum to a finite number, or the noise
            does not vanish. Or an argument out of its range.

    Example:
        >>> problem = BoundConstants(smoothness=1, gradient_variance=1, loss_gap=1)
        >>> reached = growth_to_reach(0.1, 8, 0.1, delta=2, gamma=1.4, every=100, constants=problem)
        >>> reached.stages, round(reached.steps), round(reached.samples)
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
        raise ValueError("stages of epochs need `num_examples`, the examples of one")
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"`num_examples={num_examples}` must be 1 or more")
    terms: list[BoundTerms] = []
    total, lowest = BoundTerms(0, 0, 0.0, 0.0, 0.0), math.inf
    why = "too little of it is gone after any number of stages"
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
            return Reached(stage + 1, total.steps + steps, total.samples + steps * size, note)
        terms.append(_terms(length, size, rate))
        before, total = total.lr_sum, total + terms[-1]
        lowest = min(lowest, total.bound(constants))
        if rate < 1e-17 * before:
            break
    else:
        why = "it takes more stages"
    raise ValueError(
        f"the bound does not fall to eps = {eps:g}, only to {math.sqrt(lowest):.4g} in {len(terms)} stages: {why}. Write a "
        f"larger eps, a smaller first learning rate, or another growth; gamma just below sqrt(delta) = "
        f"{math.sqrt(delta):.6g} takes the fewest samples{_STALLED if unit == 'epoch' else ''}"
    )


_MOST_STAGES = 10_000


def _terms(steps: float, batch_size: float, lr: float) -> BoundTerms:
    return BoundTerms(steps, steps * batch_size, steps * lr, steps * lr**2 / batch_size, lr)


_STALLED = (
    ". A stage that is a number of epochs long has ever fewer steps while the batch grows, so B_T stalls until the batch is "
    "the whole training set: give the stages a length in steps"
)


def _note_of(terms: list[BoundTerms]) -> str | None:
    if not any(stalls(terms)):
        return None
    return f"B_T stalls from stage {stalls(terms).index(True)} on" + _STALLED


def _check_eps(eps: float) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"`eps={eps}` must be finite and above 0: it is a gradient norm")


def _lr_below(eps: float, batch_size: float, constants: BoundConstants) -> float:
    """The learning rate at which the noise alone makes the bound eps^2: L sigma^2 eta / (b (2 - L eta)) = eps^2."""
    target = eps**2 * batch_size
    return 2 * target / (constants.smoothness * (constants.gradient_variance + target))
