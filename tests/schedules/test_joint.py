import math
from fractions import Fraction
from typing import Any

import pytest

from lightning_bsl.schedules import (
    BatchLR,
    Constant,
    Cosine,
    Exponential,
    Horizon,
    JointSchedule,
    LinearScaling,
    NoiseScaling,
    Polynomial,
    Progress,
    SqrtScaling,
    Warmup,
)


@pytest.mark.parametrize(("value", "batch_size"), [(1, 1), (8, 8), (8.0, 8), (8.5, 9), (8.0001, 9), (8.999, 9), (1.01, 2)])
def test_batch_sizes_are_rounded_up(value: float, batch_size: int) -> None:
    assert JointSchedule(lambda progress: value)(Progress()) == BatchLR(batch_size, None)


@pytest.mark.parametrize(("factor", "stages"), [("1.1", 80), ("1.2", 40), ("1.5", 20), ("2", 17), ("3", 11), ("1.25", 25)])
def test_batch_sizes_are_not_rounded_up_for_the_last_bit_of_a_float(factor: str, stages: int) -> None:
    schedule = JointSchedule(Exponential(10, factor=float(factor)))
    for m in range(stages):
        exact = 10 * Fraction(factor) ** m  # 10 * 1.1 is 11.000000000000002 in floats
        assert schedule(Progress(epoch=m)).batch_size == math.ceil(exact)


def test_thirds_and_roots_come_back_to_whole_numbers() -> None:
    assert JointSchedule(Exponential(8, factor=1 / 3))(Progress(epoch=0)).batch_size == 8
    assert JointSchedule(Exponential(81, factor=1 / 3))(Progress(epoch=4)).batch_size == 1
    assert JointSchedule(Exponential(8, factor=2 ** (1 / 3)))(Progress(epoch=9)).batch_size == 64
    assert JointSchedule(Polynomial(4, slope=1, power=1.5))(Progress(epoch=5)).batch_size == 27


def test_numbers_functions_and_rules() -> None:
    progress = Progress(epoch=2, step=5, samples=70)
    assert JointSchedule(16, 0.1)(progress) == (16, 0.1)
    assert JointSchedule(16, 1)(progress) == (16, 1.0)
    assert JointSchedule(lambda p: p.samples, lambda p: 1 / p.step)(progress) == (70, 0.2)
    assert JointSchedule(Exponential(8, 2), Exponential(0.1, 1.5))(progress) == (32, pytest.approx(0.225))
    # a rule reads the batch size that is trained with, after rounding
    assert JointSchedule(lambda p: 7.2, LinearScaling(1.0, 8))(progress) == (8, 1.0)


@pytest.mark.parametrize("value", [0, 0.99, -4, math.nan, math.inf, -math.inf])
def test_bad_batch_sizes(value: float) -> None:
    schedule = JointSchedule(lambda progress: value)
    with pytest.raises(ValueError, match=rf"batch size is {value} at epoch=3, step=4, samples=5.*`minimum=1` and `maximum"):
        schedule(Progress(3, 4, 5, Horizon(300)))


@pytest.mark.parametrize("value", [0, 0.0, -0.1, math.nan, math.inf])
def test_bad_learning_rates(value: float) -> None:
    schedule = JointSchedule(8, lambda progress: value)
    with pytest.raises(ValueError, match=rf"learning rate is {value} at epoch=3, step=4, samples=5.*`minimum=...`"):
        schedule(Progress(3, 4, 5))


def test_a_growth_that_overflows_is_a_bad_batch_size() -> None:
    with pytest.raises(ValueError, match=r"batch size is inf at epoch=2000.*`maximum=...`"):
        JointSchedule(Exponential(8, factor=2.0))(Progress(epoch=2000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("8",), r"`batch_size='8'` must be an int, a schedule"),
        ((True,), r"`batch_size=True` must be an int"),
        ((None,), r"`batch_size=None` must be an int"),
        ((8, "0.1"), r"`lr='0.1'` must be a float.*a scaling rule or None"),
        ((8, False), r"`lr=False` must be a float"),
        ((SqrtScaling(0.1, 8),), r"rule for learning rates; write a schedule of progress"),
    ],
)
def test_bad_types(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=f"(?s){message}"):
        JointSchedule(*arguments)


# --- warnings: reference.md, section 2 ----------------------------------------------------------------------------------


def doubling(lr: Any, every: int | float = 30, unit: str = "epoch") -> str | None:
    return JointSchedule(Exponential(8, factor=2, every=every, unit=unit), lr).warn_of()


@pytest.mark.parametrize("gamma", [1.5, 1.6, 1.9, 1.99])
def test_the_rate_grows_too_fast(gamma: float) -> None:
    exponent = 2 * math.log(2) / (math.log(2) - math.log(gamma))  # section 2, gamma^2 > delta
    assert exponent > 4
    message = doubling(Exponential(0.1, factor=gamma, every=30))
    assert message is not None
    for part in ("delta = 2", f"gamma = {gamma}", f"eps^-{exponent:.3g},", "eps^-4", "sqrt(delta) = 1.41421"):
        assert part in message


@pytest.mark.parametrize(
    "lr", [Exponential(0.1, factor=2, every=30), Exponential(0.1, factor=3, every=30), LinearScaling(0.1, 8)]
)
def test_the_rate_grows_as_fast_as_the_batch(lr: Any) -> None:
    message = doubling(lr)
    assert message is not None and "may never" in message and "sqrt(delta) = 1.41421" in message


@pytest.mark.parametrize("lr", [Exponential(0.1, factor=math.sqrt(2), every=30), SqrtScaling(0.1, 8)])
def test_the_limit_is_the_best_exponent_but_not_below_the_bound(lr: Any) -> None:
    message = doubling(lr)
    assert message is not None and "gamma^2 = delta" in message and "eps^-4 times a logarithm" in message


@pytest.mark.parametrize(
    "lr",
    [
        None,
        0.1,
        Cosine(0.1),
        Exponential(0.1, factor=1.4, every=30),  # 1.96 < 2
        Exponential(0.1, factor=0.5, every=30),
        Exponential(0.1, factor=1.9, every=60),  # sqrt(1.9) a stage of the batch
        NoiseScaling(0.1, 128),
        Warmup(0.1, then=Constant(0.2), over=30, every=3),  # case (iv): steep, but it ends
        lambda progress: 0.1 * 9**progress.epoch,  # nobody can know
    ],
)
def test_no_warning_below(lr: Any) -> None:
    assert doubling(lr) is None


def test_growth_is_compared_over_the_same_time() -> None:
    message = doubling(Exponential(0.1, factor=1.3, every=10))
    assert message is not None and f"gamma = {1.3**3:.6g} a stage" in message
    assert doubling(Exponential(0.1, factor=1.15, every=0.05), every=0.1) is None
    message = doubling(Exponential(0.1, factor=1.15, every=0.025), every=0.1)
    assert message is not None and f"gamma = {1.15**4:.6g} a stage" in message


def test_growth_over_lengths_that_cannot_be_compared() -> None:
    assert doubling(Exponential(0.1, factor=1.5, every=10**5, unit="step")) is None
    assert doubling(Exponential(0.1, factor=1.5, every=0.9), every=1) is None


def test_no_warning_where_the_batch_does_not_grow() -> None:
    fast = Exponential(0.1, factor=3)
    assert JointSchedule(8, fast).warn_of() is None
    assert JointSchedule(Exponential(64, factor=0.5), fast).warn_of() is None
