"""The critical batch size by branches, against curves whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lightning_bsl.theory import CriticalBatch, critical_batch_by_branches
from lightning_bsl.theory.branches import growth_by_branches

SAMPLES = np.arange(1, 9) * 100
FACTORS = (1, 2, 4, 8)


def curves(difference: Any, seeds: int = 4, noise: float = 0.0, seed: int = 0) -> dict[int, Any]:
    """A falling loss that differs much between seeds; factor k lies ``difference(k)`` above factor 1, but for noise."""
    draw = np.random.default_rng(seed)
    base = 3 * np.exp(-SAMPLES / 300) + draw.normal(0, 10, (seeds, 1))
    return {k: base + difference(k) + (draw.normal(0, noise, (seeds, 1)) if noise and k > 1 else 0) for k in FACTORS}


def test_the_crossing_is_found_in_the_logarithm_of_the_factor() -> None:
    estimate = critical_batch_by_branches(8, SAMPLES, curves(lambda k: 0.004 * math.log2(k)), tolerance=0.01)
    assert estimate.value == pytest.approx(8 * 2**2.5)
    assert (estimate.base, estimate.passed, estimate.safe, estimate.at_least) == (8, 32, 32, False)
    assert estimate.low == pytest.approx(estimate.value) and estimate.high == pytest.approx(estimate.value)  # without noise
    assert [round(estimate.differences[k].value, 9) for k in FACTORS] == [0, 0.004, 0.008, 0.012]


@pytest.mark.parametrize("difference, noise, expected", [
    (lambda k: 0.0, 0.0, (64, 64, math.inf, 64, 64, True)),
    (lambda k: -1.0 * (k > 1), 0.0, (64, 64, math.inf, 64, 64, True)),  # better than factor 1
    (lambda k: 1e9 * (k > 1), 0.0, (8, 8, 8, 8, 8, False)),  # below 16, and as far below as can be
    (lambda k: 1.0 * (k == 2), 0.0, (8.06, 8.06, 8.06, 8, 8, False)),  # 4 and 8 come back, but 2 does not
])  # fmt: skip
def test_what_lies_beyond_the_factors(difference: Any, noise: float, expected: tuple[float, ...]) -> None:
    estimate = critical_batch_by_branches(8, SAMPLES, curves(difference, noise=noise), tolerance=0.01)
    found = (estimate.value, estimate.low, estimate.high, estimate.passed, estimate.safe, estimate.at_least)
    assert found == pytest.approx(expected, rel=1e-3)


def test_only_what_seeds_do_not_share_is_noise() -> None:
    losses = curves(lambda k: 0.001 * (k - 1), noise=0.002)
    estimate = critical_batch_by_branches(8, SAMPLES, losses, tolerance=0.01)
    last = {k: losses[k][:, -2:].mean(axis=1) - losses[1][:, -2:].mean(axis=1) for k in FACTORS}
    for k in FACTORS[1:]:
        half = 3.182446305 * last[k].std(ddof=1) / 2  # Student's t with 3 degrees of freedom
        expected = (last[k].mean(), last[k].std(ddof=1) / 2, last[k].mean() - half, last[k].mean() + half)
        assert estimate.differences[k] == pytest.approx(expected, rel=1e-6)
    shifted = {k: curve + np.linspace(0, 50, 4)[:, None] for k, curve in losses.items()}
    assert critical_batch_by_branches(8, SAMPLES, shifted, tolerance=0.01).value == pytest.approx(estimate.value)
    # another order of the seeds of one factor pairs what does not belong together
    unpaired = critical_batch_by_branches(8, SAMPLES, losses | {2: losses[2][::-1]}, tolerance=0.01)
    assert unpaired.differences[2].standard_error > 100 * estimate.differences[2].standard_error


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    truth, held = 8 * 2**1.5, 0
    for seed in range(400):
        losses = curves(lambda k: 0.01 * math.log2(k), noise=0.006, seed=seed)
        estimate = critical_batch_by_branches(8, SAMPLES, losses, tolerance=0.015, smoothing=0)
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.safe <= estimate.low * (1 + 1e-12)
        held += estimate.low <= truth <= estimate.high
    assert 0.92 <= held / 400 <= 0.995


def test_the_noisy_quadratic_has_its_closed_form() -> None:
    h, lr, variance, steps, seeds = np.array([1.0, 0.5, 0.25]), 0.2, 0.3, 64, 20_000
    theta, draw = np.full(3, 0.1), np.random.default_rng(2)

    def expected(k: int) -> float:
        """The mean loss at the end: a step contracts theta by 1 - k lr h, and adds (k lr)^2 / k times the variance."""
        shrink, added = (1 - k * lr * h) ** 2, (k * lr) ** 2 * variance / 3 / k
        left = shrink ** (steps // k)
        return float((h * (theta**2 * left + added * (1 - left) / (1 - shrink))).sum() / 2)

    def trained(k: int) -> Any:
        states = np.tile(theta, (seeds, 1))
        for _ in range(steps // k):
            states = states - k * lr * (h * states - draw.normal(0, math.sqrt(variance / 3 / k), states.shape))
        return (h * states**2).sum(axis=1, keepdims=True) / 2

    differences = [expected(k) - expected(1) for k in FACTORS]
    tolerance = (differences[2] + differences[3]) / 3
    truth = 4 * 4 * 2 ** ((tolerance - differences[2]) / (differences[3] - differences[2]))
    assert differences == sorted(differences) and 16 < truth < 32
    estimate = critical_batch_by_branches(4, [4 * steps], {k: trained(k) for k in FACTORS}, tolerance)
    for k, difference in zip(FACTORS, differences):
        assert abs(estimate.differences[k].value - difference) <= 4 * estimate.differences[k].standard_error
    assert estimate.low <= truth <= estimate.high < 1.1 * estimate.low


def test_a_branch_that_diverged_does_not_pass() -> None:
    losses = curves(lambda k: 0.0)
    losses[4] = losses[4].copy()
    losses[4][:, -1] = [math.nan, math.inf, math.nan, math.inf]
    estimate = critical_batch_by_branches(8, SAMPLES, losses)
    assert (estimate.value, estimate.low, estimate.high, estimate.passed) == (16, 16, 16, 16)
    losses[4][1:, -1] = 0.0
    losses[4][1:] = losses[1][1:]
    some = critical_batch_by_branches(8, SAMPLES, losses)  # one of four: it may have been chance
    assert (some.value, some.low, some.high, some.safe) == (16, 16, math.inf, 16)
    earlier = curves(lambda k: 0.0)
    earlier[8] = earlier[8].copy()
    earlier[8][0, 0] = math.nan  # before the last part of the window
    assert critical_batch_by_branches(8, SAMPLES, earlier).at_least


@pytest.mark.parametrize("changes, message", [
    ({"tolerance": 0.0}, "`tolerance=0.0` must be above 0"),
    ({"tolerance": math.nan}, "`tolerance=nan` must be above 0"),
    ({"smoothing": 1.5}, "`smoothing=1.5` must lie between 0 and 1"),
    ({"batch_size": 0}, "`batch_size=0` must be 1 or more"),
    ({"samples": [100, 100]}, "increasing numbers"),
    ({"losses": {1: [[1.0]] * 2, 2: [[1.0]] * 2}}, "the 8 points of `samples`"),
    ({"losses": {1: [[1.0] * 8], 2: [[1.0] * 8]}}, "2 seeds or more"),
    ({"losses": {1: [[1.0] * 8] * 3, 2: [[1.0] * 8] * 2}}, r"factor 2 have the shape \(2, 8\)"),
    ({"losses": {1: [[math.nan] * 8] * 2, 2: [[1.0] * 8] * 2}}, "factor 1 diverged"),
    ({"losses": {2: [[1.0] * 8] * 2, 4: [[1.0] * 8] * 2}}, r"`factors=\[2, 4\]` must have 1"),
    ({"losses": {1: [[1.0] * 8] * 2}}, r"`factors=\[1\]` must have 1"),
    ({"losses": {0: [[1.0] * 8] * 2, 1: [[1.0] * 8] * 2}}, "whole numbers from 1 on"),
    ({"losses": {1: [[1.0] * 8] * 2, 1.5: [[1.0] * 8] * 2}}, "whole numbers from 1 on"),
])  # fmt: skip
def test_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"batch_size": 8, "samples": SAMPLES, "losses": curves(lambda k: 0.0)} | changes
    with pytest.raises(ValueError, match=message):
        critical_batch_by_branches(**arguments)


def test_growth_never_exceeds_what_is_safe_then_or_later() -> None:
    draw = np.random.default_rng(0)
    for _ in range(100):
        safe = (2 ** draw.integers(3, 8, draw.integers(1, 7))).tolist()
        growth = growth_by_branches(safe)
        assert growth == sorted(growth)
        assert all(size <= later for i, size in enumerate(growth) for later in safe[i:])
        assert all(size in safe for size in growth)


def test_is_public() -> None:
    assert CriticalBatch.__module__ == critical_batch_by_branches.__module__ == "lightning_bsl.theory.branches"
