"""The noise scale and the batch sizes that follow from it, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from lightning_bsl.theory.noise_scale import (
    NoiseEstimate,
    NoiseScale,
    adascale_gain,
    cabs_batch_size,
    dive_batch_statistic,
    jackknife,
    noise_interval,
    norm_test_batch_size,
)


def gradients(examples: int = 400, dimension: int = 7, seed: int = 0) -> NDArray[np.float64]:
    """Of single examples at fixed weights: a linear model with Gaussian data and noise, and the squared error."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(examples, dimension))
    residual = x @ random.normal(size=dimension) + random.normal(size=examples)
    return x * residual[:, None]


def moments(values: NDArray[np.float64]) -> tuple[float, float]:
    """``|G|^2``, and ``tr(Sigma)`` over the examples."""
    mean = values.mean(axis=0)
    return float(mean @ mean), float((values - mean).var(axis=0).sum())


def test_three_rules_agree_on_a_linear_gaussian_model() -> None:
    """Norm test, "grow to the noise scale" and DiveBatch are all B = c N."""
    values = gradients()
    sq_norm, variance = moments(values)
    noise, total = variance / sq_norm, values.sum(axis=0)
    assert dive_batch_statistic((values**2).sum(), total @ total, len(values)) - 1 == pytest.approx(noise, rel=1e-9)
    for theta in (0.3, 1.0, 2.0):
        size = norm_test_batch_size(noise, theta)
        assert size * theta**2 == pytest.approx(noise, rel=1e-9)
        assert variance / size == pytest.approx(theta**2 * sq_norm, rel=1e-9)  # the noise of a batch is theta times its mean


def test_the_noise_scale_of_a_linear_gaussian_model() -> None:
    """The jackknife's mean has the closed form d + 1 + d sigma^2 / |w|^2 as its expectation; here over many sets of pieces."""
    dimension, w_sq = 3, 2.0
    random = np.random.default_rng(1)
    weights = np.full(dimension, math.sqrt(w_sq / dimension))
    found = []
    for _ in range(3000):
        x = random.normal(size=(12, 4, dimension))
        pieces = (x * (x @ weights + random.normal(size=(12, 4)))[..., None]).mean(axis=1)
        estimates = jackknife([4] * 12, [4] * 12, (pieces**2).sum(axis=1), pieces @ (4 * pieces.sum(axis=0)))
        found.append(np.mean(estimates, axis=0))
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / math.sqrt(len(found))
    variance = (dimension + 1) * w_sq + dimension
    assert np.all(np.abs(mean - (w_sq, variance)) < 3 * error)
    assert np.all(error < 0.03 * np.array([w_sq, variance]))


def test_pseudo_values_are_those_of_the_pieces_left_out() -> None:
    random = np.random.default_rng(2)
    sizes, weights = np.array([3.0, 5.0, 2.0, 4.0]), np.array([4.0, 4.0, 1.0, 2.0])
    pieces = random.normal(size=(4, 6)) + 0.5
    inputs = (pieces**2).sum(axis=1), pieces @ (weights @ pieces)

    def whole(kept: list[int]) -> NDArray[np.float64]:
        w = weights[kept] / weights[kept].sum()
        step = w @ pieces[kept]
        variance = w @ ((pieces[kept] - step) ** 2).sum(axis=1) / (w / sizes[kept] - w**2 / sizes[kept]).sum()
        return np.array([step @ step - variance * (w**2 / sizes[kept]).sum(), variance])

    for population, term in ((math.inf, 0.0), (100.0, 0.01)):
        values = jackknife(sizes, weights, *inputs, population=population)
        for k, value in enumerate(values):
            expected = 4 * whole([0, 1, 2, 3]) - 3 * whole([i for i in range(4) if i != k])
            assert value == pytest.approx((expected[0] + term * expected[1], expected[1]), rel=1e-9)
    with pytest.raises(ValueError, match="3 pieces or more, and there are 2"):
        jackknife([1, 1], [1, 1], [1, 1], [1, 1])


def test_the_interval_is_the_set_of_ratios_that_a_t_test_allows() -> None:
    random = np.random.default_rng(3)
    for sq_norm in (1.0, 0.2, 0.02, -0.1):
        values = np.column_stack([random.normal(sq_norm, 0.3, 20), random.normal(10, 2, 20)])
        noise = noise_interval([NoiseEstimate(*value) for value in values])

        def allows(ratio: float, values: NDArray[np.float64] = values) -> bool:
            return bool(stats.ttest_1samp(values[:, 1] - ratio * values[:, 0], 0).pvalue >= 0.05)

        assert allows(noise.low * 1.001) and not allows(noise.low * 0.999)
        if math.isfinite(noise.high):
            assert allows(noise.high * 0.999) and not allows(noise.high * 1.001)
        else:
            assert allows(1e9) and stats.ttest_1samp(values[:, 0], 0, alternative="greater").pvalue > 0.025
        assert noise.low <= noise.value <= noise.high and math.isfinite(noise.value)


def test_there_is_always_a_number() -> None:
    unknown = noise_interval([NoiseEstimate(2.0, 8.0)])
    assert (unknown.value, unknown.low, unknown.high) == (4.0, 0.0, math.inf)
    assert not unknown.within(1e9)
    nothing = noise_interval([NoiseEstimate(0.0, 0.0)] * 5)
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, math.inf)
    negative = noise_interval([NoiseEstimate(-1.0, 8.0), NoiseEstimate(-1.2, 9.0), NoiseEstimate(-0.8, 10.0)])
    assert negative.high == math.inf and 0 < negative.value < math.inf  # |G|^2 is below 0 for certain, by chance
    certain = noise_interval([NoiseEstimate(2.0, 8.0)] * 3)
    assert (certain.low, certain.value, certain.high) == (4.0, 4.0, 4.0)
    with pytest.raises(ValueError, match="no measurements"):
        noise_interval([])
    assert NoiseScale(5e-324, 1e300).value == 0.0  # a ratio that overflows is no number


def test_cabs_has_the_largest_gain_per_example() -> None:
    """Of a step with eta = 1/L on f = L |theta|^2 / 2, whose expected gain is exact."""
    smoothness, sq_distance, variance = 4.0, 3.0, 50.0
    lr, loss, sq_norm = 1 / smoothness, smoothness * sq_distance / 2, smoothness**2 * sq_distance

    def loss_per_example(size: float) -> float:
        gain = (lr - smoothness * lr**2 / 2) * sq_norm - smoothness * lr**2 * variance / (2 * size)
        return -gain / size

    best = optimize.minimize_scalar(loss_per_example, bounds=(0.1, 100), method="bounded", options={"xatol": 1e-9}).x
    assert cabs_batch_size(lr, variance, loss) == pytest.approx(best, rel=1e-5)
    # the expected gain, from the definition
    random = np.random.default_rng(4)
    theta = np.sqrt(np.full(3, sq_distance / 3))
    noise = random.normal(size=(200_000, 3)) * math.sqrt(variance / 3 / best)
    losses = smoothness / 2 * ((theta - lr * (smoothness * theta + noise)) ** 2).sum(axis=1)
    assert loss - losses.mean() == pytest.approx(-loss_per_example(best) * best, abs=4 * losses.std() / math.sqrt(200_000))


def test_the_gain_of_adascale() -> None:
    assert [adascale_gain(2.0, 1, size) for size in (2, 4, 10)] == pytest.approx([1.5, 2.0, 2.5])
    values = gradients(seed=5)
    sq_norm, variance = moments(values)
    for base, size in ((1, 8), (8, 64)):
        gain = (variance / base + sq_norm) / (variance / size + sq_norm)  # of the squared norms that steps have in the mean
        assert adascale_gain(variance / sq_norm, base, size) == pytest.approx(gain, rel=1e-12)
