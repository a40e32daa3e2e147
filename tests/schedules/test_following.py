"""Rules for constants that follow the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lightning_bsl.schedules import DecayTimescale, HalfLife
from lightning_bsl.schedules.following import FollowingRule


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 4096])
def test_the_half_life_stays_in_samples(beta: float, batch_size: int) -> None:
    power = HalfLife(base_batch_size=64)(beta, batch_size)
    assert 0 < power < 1
    samples = [size * math.log(0.5) / math.log(decay) for size, decay in ((64, beta), (batch_size, power))]
    assert samples[0] == pytest.approx(samples[1], rel=1e-6)


def test_a_power_never_becomes_0() -> None:
    assert 0 < HalfLife(base_batch_size=1)(0.9, 10**6) < 1e-300
    assert HalfLife(base_batch_size=1)(0.0, 8) == 0


@pytest.mark.parametrize("lr_power", [0, 0.3, 0.5, 1])
def test_the_timescale_stays(lr_power: float) -> None:
    rule, size = DecayTimescale(base_batch_size=32, lr_power=lr_power), 200
    lr = 0.01 * (size / 32) ** lr_power
    assert size / (lr * rule(0.1, size)) == pytest.approx(32 / (0.01 * 0.1))


def test_seesaw_has_the_timescale_of_the_plain_decay() -> None:
    cut, rule = 2.0, DecayTimescale(base_batch_size=32)
    for cuts in range(5):
        plain = 32 / (0.1 * cut**-cuts * 0.01)
        size, lr = 32 * cut**cuts, 0.1 * cut ** (-cuts / 2)
        assert size / (lr * rule(0.01, int(size))) == pytest.approx(plain)


@pytest.mark.parametrize("rule", [HalfLife(8), DecayTimescale(8)])
def test_at_the_base_nothing_changes(rule: FollowingRule) -> None:
    assert rule(0.3, 8) == 0.3
    assert rule((0.3, 0.9), 8) == (0.3, 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HalfLife(0), r"HalfLife\(base_batch_size=0\): write a finite number above 0"),
        (lambda: HalfLife(math.nan), "write a finite number above 0"),
        (lambda: HalfLife(math.inf), "write a finite number above 0"),
        (lambda: HalfLife(True), "write a finite number above 0"),
        (lambda: HalfLife("8"), "write a finite number above 0"),  # type: ignore[arg-type]
        (lambda: DecayTimescale(-8), r"DecayTimescale\(base_batch_size=-8\)"),
        (lambda: DecayTimescale(8, lr_power=1.5), r"DecayTimescale\(lr_power=1.5\): write a number from 0"),
        (lambda: DecayTimescale(8, lr_power=math.nan), r"lr_power=nan"),
        (lambda: HalfLife(8)(1.0, 16), "1.0 is no decay of one"),
        (lambda: HalfLife(8)((0.9, -0.1), 16), "-0.1 is no decay of one"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
