"""SFO complexity against numerical search and against a plan's own sums."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lightning_bsl.schedules import Exponential, JointSchedule, plan
from lightning_bsl.theory import (
    BoundConstants,
    BoundTerms,
    bound_terms,
    critical_batch_size,
    growth_to_reach,
    optimal_gamma,
    sfo_exponent,
    sfo_to_reach,
    steps_to_reach,
)

PROBLEM = BoundConstants(smoothness=2, gradient_variance=30, loss_gap=3)
# a learning rate may grow for hundreds of stages before it comes near 2/L
FLAT = BoundConstants(smoothness=1e-150, gradient_variance=1e150, loss_gap=1)


@given(st.floats(1e-3, 0.5), st.floats(1, 1e4), st.floats(1e-3, 0.9))
@settings(deadline=None)
def test_the_bound_is_eps_after_the_steps(eps: float, batch_size: float, lr: float) -> None:
    least = critical_batch_size(eps, lr, PROBLEM) / 2  # C2 eta / eps^2
    if batch_size <= least:
        with pytest.raises(ValueError, match="never brings the bound to eps"):
            steps_to_reach(eps, batch_size, lr, PROBLEM)
        batch_size += 1.001 * least
    steps = steps_to_reach(eps, batch_size, lr, PROBLEM)
    after = BoundTerms(steps, steps * batch_size, steps * lr, steps * lr**2 / batch_size, lr)
    assert after.bound(PROBLEM) == pytest.approx(eps**2, rel=1e-9)
    assert sfo_to_reach(eps, batch_size, lr, PROBLEM) == pytest.approx(after.samples)


def test_the_remedies_of_an_unreachable_eps_work() -> None:
    with pytest.raises(ValueError) as error:
        steps_to_reach(0.01, 8, 0.1, PROBLEM)
    batch_size, lr = (float(number) for number in re.findall(r"(?:above|below) ([\d.e+-]+[\d])", str(error.value)))
    for remedy in ({"batch_size": 1.001 * batch_size, "lr": 0.1}, {"batch_size": 8, "lr": 0.999 * lr}):
        assert steps_to_reach(0.01, constants=PROBLEM, **remedy) > 0
    for half in ({"batch_size": 0.999 * batch_size, "lr": 0.1}, {"batch_size": 8, "lr": 1.001 * lr}):
        with pytest.raises(ValueError, match="never brings"):
            steps_to_reach(0.01, constants=PROBLEM, **half)


@pytest.mark.parametrize("eps", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_the_critical_batch_size_takes_the_fewest_samples(eps: float, lr: float) -> None:
    critical = critical_batch_size(eps, lr, PROBLEM)
    found = minimize_scalar(
        lambda log: math.log(sfo_to_reach(eps, math.exp(log), lr, PROBLEM)),
        bounds=(math.log(critical / 1.9), math.log(critical * 50)), method="bounded", options={"xatol": 1e-9},
    )  # fmt: skip
    assert math.exp(found.x) == pytest.approx(critical, rel=1e-4)
    bias, variance = PROBLEM.factors(lr)
    assert sfo_to_reach(eps, critical, lr, PROBLEM) == pytest.approx(4 * bias * variance / eps**4)


@pytest.mark.parametrize("delta", [1.5, 2, 3, 4])
def test_the_fewest_samples_are_at_the_optimal_gamma(delta: float) -> None:
    best = optimal_gamma(delta)
    found = minimize_scalar(
        lambda gamma: math.log(growth_to_reach(1e-30, 8, 0.1, delta, gamma, 100, FLAT).samples),
        bounds=(1 + 0.3 * (best - 1), 1 + 1.7 * (best - 1)), method="bounded", options={"xatol": 1e-7},
    )  # fmt: skip
    assert found.x == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("delta, gamma", [(2, 1.2), (2, 1.6), (3, 1.5), (3, 2)])
def test_the_exponent_is_that_of_the_samples(delta: float, gamma: float) -> None:
    few, many = (growth_to_reach(eps, 8, 0.1, delta, gamma, 100, FLAT).samples for eps in (1e-12, 1e-15))
    assert math.log(many / few) / math.log(1e3) == pytest.approx(sfo_exponent(delta, gamma), rel=0.01)
    assert sfo_exponent(delta, gamma) > 4 == pytest.approx(sfo_exponent(delta, math.sqrt(delta)))


def test_numbers_that_make_no_sense() -> None:
    for batch_size in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
            steps_to_reach(0.1, batch_size, 0.1, PROBLEM)
    with pytest.raises(ValueError, match="delta=-1"):
        optimal_gamma(-1)


def test_an_exponent_beyond_all_samples() -> None:
    assert sfo_exponent(2, 2) == sfo_exponent(2, 3) == math.inf
    for arguments in ((1, 1.2), (2, 1)):
        with pytest.raises(ValueError, match="factors above 1"):
            sfo_exponent(*arguments)


@pytest.mark.parametrize("unit, every", [("step", 200), ("epoch", 2)])
def test_growth_reaches_eps_where_a_plan_of_it_does(unit: str, every: int) -> None:
    problem, examples = BoundConstants(smoothness=0.5, gradient_variance=4, loss_gap=0.2), 4096
    schedule = JointSchedule(Exponential(8, 2, every=every, unit=unit), Exponential(0.1, 1.3, every=every, unit=unit))
    horizon = {"steps": 8 * every} if unit == "step" else {"epochs": 8 * every}
    ends = list(itertools.accumulate(bound_terms(plan(schedule, examples, **horizon))))
    checked = 0
    for end in ends:
        if end.bound(problem) > min(each.bound(problem) for each in ends[: ends.index(end) + 1]):
            break  # eta_max of the bound grows with the learning rate, and in the end the bound grows too
        eps = math.sqrt(end.bound(problem)) * (1 + 1e-9)
        found = growth_to_reach(eps, 8, 0.1, 2, 1.3, every, problem, unit=unit, num_examples=examples)
        assert found.steps == pytest.approx(end.steps, rel=1e-2)  # the bound may be flat there
        assert found.samples == pytest.approx(end.samples, rel=1e-2)
        checked += 1
    assert checked >= 4


def test_a_stall_is_noted() -> None:
    problem = BoundConstants(smoothness=0.001, gradient_variance=0.01, loss_gap=1)
    arguments = {"batch_size": 8, "lr": 0.1, "delta": 2, "gamma": 1.2, "every": 1, "constants": problem, "num_examples": 2048}
    early = growth_to_reach(0.25, unit="epoch", **arguments)
    assert early.note is None
    late = growth_to_reach(0.127, unit="epoch", **arguments)
    assert late.note is not None
    assert "B_T stalls from stage 5 on" in late.note
    assert "length in steps" in late.note
    assert growth_to_reach(0.127, unit="step", **arguments | {"every": 256}).note is None


@pytest.mark.parametrize("change, message", [
    ({"gamma": 1.3, "eps": 1e-3}, "the learning rate of stage 9, 1.06, is not below 2/L = 1"),
    ({"gamma": 0.5}, "the sum of the learning rates is finite, or the noise does not vanish"),
    ({"gamma": 1.3, "eps": 1e-3, "unit": "epoch", "num_examples": 100}, "B_T stalls until the batch is the whole training set"),
    ({"eps": 0}, "`eps=0` must be finite and above 0"),
    ({"delta": 0.5}, "`delta=0.5` must be 1 or more"),
    ({"gamma": -1}, "`gamma=-1` must be above 0"),
    ({"every": 0}, "`every=0` must be 1 or more"),
    ({"unit": "samples"}, "unknown unit 'samples'; write 'step' or 'epoch'"),
    ({"unit": "epoch"}, "need `num_examples`: write the number of training examples"),
    ({"delta": 1, "gamma": 1, "eps": 0.01}, "it takes more stages"),
    ({"num_examples": 0}, "`num_examples=0` must be 1 or more"),
    ({"lr": 1.5}, "below 2/L = 1, but the largest is 1.5"),
])  # fmt: skip
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments = {"eps": 0.1, "batch_size": 8, "lr": 0.1, "delta": 2, "gamma": 1.2, "every": 10, "constants": PROBLEM}
    with pytest.raises(ValueError, match=re.escape(message)):
        growth_to_reach(**arguments | change)
