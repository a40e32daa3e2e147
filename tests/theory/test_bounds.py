"""B_T and V_T against sums over every step, asymptotic rates against fitted slopes."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lightning_bsl.schedules import (
    Constant,
    Cosine,
    Diminishing,
    Exponential,
    JointSchedule,
    LinearScaling,
    Milestones,
    Plan,
    Polynomial,
    PolynomialDecay,
    Progress,
    Schedule,
    SqrtScaling,
    SurgeScaling,
    Warmup,
    plan,
)
from lightning_bsl.theory import BoundConstants, BoundTerms, asymptotic_rates, bound_curve, bound_terms, stalls

pytestmark = pytest.mark.filterwarnings("ignore:.*(gamma|at its maximum)")


def whole(planned: Plan) -> BoundTerms:
    *_, total = itertools.accumulate(bound_terms(planned))
    return total


def by_hand(schedule: JointSchedule, num_examples: int, epochs: int, steps: int | None = None) -> tuple[float, float, float]:
    """B_T, V_T and the largest rate of a walk step by step, which shares the schedule's values with the library only."""
    horizon = plan(schedule, num_examples, epochs=epochs, steps=steps).horizon
    clock, rates, noise = Progress(horizon=horizon), [], []
    while clock.epoch < epochs and (steps is None or clock.step < steps):
        left = num_examples
        while left and (steps is None or clock.step < steps):
            size, rate = schedule(clock)
            held = min(size, left)
            rates.append(rate)
            noise.append(rate**2 / held)
            left -= held
            clock = clock.advance(held)
        clock = clock.next_epoch()
    return 1 / math.fsum(rates), math.fsum(noise) / math.fsum(rates), max(rates)


UNITS = st.sampled_from(["epoch", "step", "samples"])
RATE = st.floats(1e-3, 1.0)


@st.composite
def rates(draw: st.DrawFn) -> object:
    """Any learning rate that the library knows."""
    unit, start = draw(UNITS), draw(RATE)
    every = draw(st.integers(1, {"epoch": 2, "step": 40, "samples": 900}[unit]))
    kind = draw(
        st.sampled_from(
            ["constant", "exponential", "diminishing", "cosine", "polynomial", "warmup", "milestones", "rule", "function"]
        )
    )
    if kind == "constant":
        return start
    if kind == "exponential":
        return Exponential(start, factor=draw(st.floats(0.7, 1.4)), every=every, unit=unit, maximum=3.0, minimum=1e-5)
    if kind == "diminishing":
        return Diminishing(start, every=draw(st.sampled_from([1, 1, every])), unit=unit)
    if kind == "cosine":
        return Cosine(start, end=start / 50, unit=unit, every=draw(st.sampled_from([1, 1, every])))
    if kind == "polynomial":
        power = draw(st.sampled_from([0.5, 1, 2, 3.3]))
        return PolynomialDecay(start, end=1e-4, power=power, unit=unit, minimum=draw(st.sampled_from([None, start / 3])))
    if kind == "warmup":
        then = draw(st.sampled_from([Constant(start), Cosine(start, end=1e-4, unit=unit), lambda progress: start]))
        return Warmup(start / 7, then=then, over=0.4, every=1, unit=unit)
    if kind == "milestones":
        return Milestones([start, start / 2, start * 1.5], at=[every, 2 * every], unit=unit)
    if kind == "rule":
        return draw(st.sampled_from([LinearScaling(start, 32), SqrtScaling(start, 32), SurgeScaling(start, 100)]))
    return lambda progress: start * (1 + progress.step % 7)


@st.composite
def batch_sizes(draw: st.DrawFn) -> object:
    kind, unit = draw(st.sampled_from(["int", "exponential", "polynomial"])), draw(UNITS)
    every = draw(st.integers({"epoch": 1, "step": 5, "samples": 100}[unit], {"epoch": 2, "step": 200, "samples": 3000}[unit]))
    if kind == "int":
        return draw(st.integers(1, 300))
    if kind == "exponential":
        return Exponential(draw(st.integers(1, 30)), factor=draw(st.floats(1.1, 3)), every=every, unit=unit, maximum=300)
    return Polynomial(draw(st.integers(1, 30)), slope=draw(st.floats(0.5, 20)), every=every, unit=unit, maximum=300)


@given(batch_sizes(), rates(), st.integers(300, 3000), st.integers(3, 5), st.sampled_from([None, 7, 400]))
@settings(max_examples=150, deadline=None)
def test_equals_the_sums_over_every_step(
    batch_size: object, lr: object, num_examples: int, epochs: int, steps: int | None
) -> None:
    schedule = JointSchedule(batch_size, lr)
    if steps is not None and isinstance(lr, Warmup):
        steps = None  # a warm-up of steps needs a run that is longer
    total = whole(plan(schedule, num_examples, epochs=epochs, steps=steps))
    bias, variance, largest = by_hand(schedule, num_examples, epochs, steps)
    assert total.bias == pytest.approx(bias, rel=1e-12)
    assert total.variance == pytest.approx(variance, rel=1e-12)
    assert total.max_lr == pytest.approx(largest, rel=1e-12)


STEPS_OF_CIFAR = np.arange(300 * 391)  # 300 epochs of 50,000 in batches of 128, the last of each 80
LONG: dict[str, tuple[Schedule, NDArray[np.float64]]] = {
    "diminishing": (Diminishing(0.1), 0.1 / np.sqrt(STEPS_OF_CIFAR + 1)),
    "cosine": (Cosine(0.1), 0.05 * (1 + np.cos(np.pi * (STEPS_OF_CIFAR // 391) / 300))),
    "cosine by steps": (Cosine(0.1, unit="step"), 0.05 * (1 + np.cos(np.pi * STEPS_OF_CIFAR / (300 * 391)))),
    "cosine by samples": (
        Cosine(0.1, unit="samples"),
        0.05 * (1 + np.cos(np.pi * (STEPS_OF_CIFAR // 391 * 50_000 + STEPS_OF_CIFAR % 391 * 128) / 15_000_000)),
    ),
    "square root": (PolynomialDecay(0.1, power=0.5), 0.1 * np.sqrt(1 - STEPS_OF_CIFAR / (300 * 391))),
    "clipped": (PolynomialDecay(0.1, power=2, minimum=0.03), np.maximum(0.1 * (1 - STEPS_OF_CIFAR / (300 * 391)) ** 2, 0.03)),
}


@pytest.mark.parametrize("name", LONG)
def test_long_plans_are_not_walked_step_by_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lr, rates = LONG[name]
    planned = plan(JointSchedule(128, lr), 50_000, epochs=300)
    calls, ask = 0, JointSchedule.lr_at

    def counted(self: JointSchedule, progress: Progress, batch_size: int) -> float | None:
        nonlocal calls
        calls += 1
        return ask(self, progress, batch_size)

    monkeypatch.setattr(JointSchedule, "lr_at", counted)
    total = whole(planned)
    assert calls < 25_000
    held = np.where(STEPS_OF_CIFAR % 391 == 390, 80, 128)
    assert total.steps == len(rates)
    assert total.bias == pytest.approx(1 / math.fsum(rates), rel=1e-12)
    assert total.variance == pytest.approx(math.fsum(rates**2 / held) / math.fsum(rates), rel=1e-12)
    assert total.max_lr == pytest.approx(rates.max())


def test_a_kink_is_found() -> None:
    lr = Warmup(0.1, Cosine(0.5, unit="step", minimum=0.02), over=30_011, every=1, unit="step")
    total = whole(plan(JointSchedule(128, lr), 50_000, epochs=300))
    up, down = np.arange(30_011), np.arange(300 * 391 - 30_011)
    rates = np.concatenate([
        0.1 * 5 ** (up / 30_010), np.maximum(0.25 * (1 + np.cos(np.pi * down / len(down))), 0.02)
    ])  # fmt: skip
    assert total.bias == pytest.approx(1 / math.fsum(rates), rel=1e-11)  # gamma's own rounding, 30,010 times over
    assert total.max_lr == pytest.approx(0.5)


@pytest.mark.parametrize("stages, bias", [(5, 2.1269e-5), (10, 1.9099e-5), (15, 1.8813e-5)])
def test_the_trap_of_stages_in_epochs(stages: int, bias: float) -> None:
    schedule = JointSchedule(Exponential(8, factor=2, every=30, maximum=50_000), Exponential(0.1, factor=1.292, every=30))
    planned = plan(schedule, 50_000, epochs=30 * stages)
    assert whole(planned).bias == pytest.approx(bias, rel=5e-5)
    assert stalls(bound_terms(planned)) == [stage >= 6 for stage in range(stages)]


def test_nothing_stalls_at_a_constant_rate_and_batch() -> None:
    assert not any(stalls(bound_terms(plan(JointSchedule(8, Milestones([0.1, 0.1001], at=[5])), 100, epochs=10))))


def slope(term: str, schedule: Callable[[int], JointSchedule], lengths: list[int], log_x: bool) -> float:
    """The exponent with which a term falls with the length of the run (``log_x``), or by which with every stage."""
    totals = [whole(plan(schedule(length), 10**30, steps=length)) for length in lengths]
    x = [math.log(length) for length in lengths] if log_x else [length / 100 for length in lengths]
    return float(np.polyfit(x, [math.log(getattr(total, term)) for total in totals], 1)[0])


STEPS = [10**5, 3 * 10**5, 10**6, 3 * 10**6]
DECAYS = {
    "constant": lambda steps: Constant(0.1),
    "cosine": lambda steps: Cosine(0.1, unit="step"),
    "polynomial": lambda steps: PolynomialDecay(0.1, power=2),
}


@pytest.mark.parametrize("decay", DECAYS)
def test_rates_of_cases_i_and_ii(decay: str) -> None:
    def fixed(steps: int) -> JointSchedule:
        return JointSchedule(8, DECAYS[decay](steps))

    def growing(steps: int) -> JointSchedule:
        return JointSchedule(Exponential(8, factor=2, every=1000, unit="step", maximum=1e25), DECAYS[decay](steps))

    assert slope("bias", fixed, STEPS, True) == pytest.approx(-1, rel=0.05)
    assert slope("variance", fixed, STEPS, True) == pytest.approx(0, abs=0.01)
    assert slope("bias", growing, STEPS, True) == pytest.approx(-1, rel=0.05)
    assert slope("variance", growing, STEPS, True) == pytest.approx(-1, rel=0.05)
    assert asymptotic_rates(fixed(1)) == ("i", "O(1/T)", "does not vanish")
    assert asymptotic_rates(growing(1)) == ("ii", "O(1/T)", "O(1/T)")


def test_rates_of_the_diminishing_rate() -> None:
    fixed, growing = (
        JointSchedule(8, Diminishing(0.1)),
        JointSchedule(Exponential(8, factor=2, every=1000, unit="step", maximum=1e25), Diminishing(0.1)),
    )
    assert slope("bias", lambda _: fixed, STEPS, True) == pytest.approx(-0.5, rel=0.05)
    assert slope("bias", lambda _: growing, STEPS, True) == pytest.approx(-0.5, rel=0.05)
    assert slope("variance", lambda _: growing, STEPS, True) == pytest.approx(-0.5, rel=0.05)
    per_log = [whole(plan(fixed, 10**30, steps=steps)).variance / math.log(steps) for steps in STEPS]
    assert np.polyfit(np.log(STEPS), np.log(per_log), 1)[0] == pytest.approx(-0.5, rel=0.05)
    assert asymptotic_rates(fixed) == ("i", "O(1/sqrt T)", "O(log T / sqrt T)")
    assert asymptotic_rates(growing) == ("ii", "O(1/sqrt T)", "O(1/sqrt T)")


@pytest.mark.parametrize("delta, gamma, variance", [
    (2, 1.2, 1.2), (2, 1.3, 1.3), (3, 1.5, 1.5), (4, 1.9, 1.9), (2, 1.6, 2 / 1.6), (3, 2, 3 / 2)
])  # fmt: skip
def test_rates_of_case_iii_with_stages_of_steps(delta: float, gamma: float, variance: float) -> None:
    schedule = JointSchedule(
        Exponential(8, factor=delta, every=100, unit="step"), Exponential(1e-3, factor=gamma, every=100, unit="step")
    )
    lengths = [100 * stages for stages in range(20, 41, 5)]
    assert slope("bias", lambda _: schedule, lengths, False) == pytest.approx(-math.log(gamma), rel=0.05)
    assert slope("variance", lambda _: schedule, lengths, False) == pytest.approx(-math.log(variance), rel=0.05)
    written = "O(gamma^-M)" if gamma**2 < delta else "O((gamma/delta)^M)"
    assert asymptotic_rates(schedule) == ("iii", "O(gamma^-M)", written)


def test_rates_of_case_iv() -> None:
    batch = Exponential(8, factor=2, every=1000, unit="step", maximum=1e25)
    schedule = JointSchedule(batch, Warmup(0.01, then=Constant(0.1), over=3000, every=300, unit="step"))
    assert slope("bias", lambda _: schedule, STEPS, True) == pytest.approx(-1, rel=0.05)
    assert slope("variance", lambda _: schedule, STEPS, True) == pytest.approx(-1, rel=0.05)
    assert asymptotic_rates(schedule) == ("iv", "O(1/T)", "O(1/T)")


@pytest.mark.parametrize("schedule, rates", [
    (JointSchedule(Exponential(8, factor=2), SqrtScaling(0.1, 8)), ("iii", "O(gamma^-M)", "O(M gamma^-M)")),
    (JointSchedule(Exponential(8, factor=2), LinearScaling(0.1, 8)), ("iii", "O(gamma^-M)", "does not vanish")),
    (JointSchedule(8, Exponential(0.1, factor=1.1)), None),
    (JointSchedule(8, Warmup(0.1, Constant(0.5), over=3)), None),
    (JointSchedule(Milestones([8, 16], at=[3]), 0.1), None),
    (JointSchedule(Polynomial(8, slope=2), 0.1), ("ii", "O(1/T)", "O(log T / T)")),
    (JointSchedule(Polynomial(8, slope=2, power=2), 0.1), ("ii", "O(1/T)", "O(1/T)")),
    (JointSchedule(Polynomial(8, slope=2, power=0.5), 0.1), ("ii", "O(1/T)", "O(T^-0.5)")),
    (JointSchedule(Polynomial(8, slope=2, power=0.5), Diminishing(0.1)), ("ii", "O(1/sqrt T)", "O(1/sqrt T)")),
    (JointSchedule(8), None),
])  # fmt: skip
def test_rates_of_other_schedules(schedule: JointSchedule, rates: tuple[str, str, str] | None) -> None:
    assert asymptotic_rates(schedule) == rates


def test_the_curve_ends_where_the_plan_does_and_passes_its_stages() -> None:
    planned = plan(JointSchedule(Exponential(8, factor=2, every=3), Cosine(0.1, unit="step")), 1001, epochs=9)
    curve = bound_curve(planned)
    assert len(curve) == 9
    ends = list(itertools.accumulate(bound_terms(planned)))
    for at in ends:
        match = next(each for each in curve if each.samples == at.samples)
        assert match.bias == pytest.approx(at.bias, rel=1e-12)
        assert match.variance == pytest.approx(at.variance, rel=1e-12)
    assert 3 <= len(bound_curve(planned, points=3)) <= 6


def test_the_bound_on_gradient_descent_without_noise() -> None:
    """f = x^2 / 2 by gradient descent, eta = 1: nothing is left after a step, and the bound is 2 gap B_T / (2 - 1)."""
    problem = BoundConstants(smoothness=1, gradient_variance=0, loss_gap=0.5)
    one = whole(plan(JointSchedule(10, 1.0), 10, epochs=1))
    assert one.bound(problem) == pytest.approx(1.0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="leaves the learning rates to the module"):
        bound_terms(plan(JointSchedule(8), 100, epochs=1))
    problem = BoundConstants(smoothness=4, gradient_variance=1, loss_gap=1)
    with pytest.raises(ValueError, match=r"below 2/L = 0.5, but the largest is 0.6; lower it"):
        whole(plan(JointSchedule(8, Milestones([0.1, 0.6], at=[1])), 100, epochs=2)).bound(problem)
    for arguments, message in (
        ((0, 1, 1), "smoothness=0"),
        ((1, -1, 1), "gradient_variance=-1"),
        ((1, 1, math.inf), "loss_gap=inf"),
    ):
        with pytest.raises(ValueError, match=message):
            BoundConstants(*arguments)


def test_theory_imports_neither_torch_nor_lightning() -> None:
    code = "import sys, lightning_bsl.theory\nprint(*{'torch', 'lightning', 'hydra', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
