import math

import pytest

from lightning_bsl.schedules import LinearScaling, NoiseScaling, ScalingRule, SqrtScaling, SurgeScaling


@pytest.mark.parametrize("batch_size", [1, 7, 64, 128, 1000, 8192])
def test_closed_forms(batch_size: int) -> None:
    b = batch_size
    assert LinearScaling(0.1, 128)(b) == pytest.approx(0.1 * b / 128)
    assert SqrtScaling(0.1, 128)(b) == pytest.approx(0.1 * (b / 128) ** 0.5)
    assert NoiseScaling(0.4, 1000, alpha=0.5)(b) == pytest.approx(0.4 / (1 + 1000 / b) ** 0.5)
    assert SurgeScaling(0.1, 300)(b) == pytest.approx(0.1 / (((300 / b) ** 0.5 + (b / 300) ** 0.5) / 2))


def test_numbers_of_the_reference() -> None:
    surge = SurgeScaling(0.001, noise_batch_size=400)
    assert [surge(b) for b in (400, 100, 1600)] == pytest.approx([0.001, 0.0008, 0.0008])
    assert surge(1) == pytest.approx(2 * 0.001 * math.sqrt(1 / 400), rel=0.003)  # B << B_noise: square-root scaling
    assert max(range(1, 2000), key=surge) == 400
    assert NoiseScaling(0.4, noise_batch_size=1000)(1000) == pytest.approx(0.2)  # half the peak at B_noise, for SGD
    assert NoiseScaling(0.4, noise_batch_size=1000)(10**9) == pytest.approx(0.4, rel=1e-5)


@pytest.mark.parametrize("rule", [LinearScaling, SqrtScaling, NoiseScaling, SurgeScaling])
@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_arguments_must_be_positive_and_finite(rule: type[ScalingRule], bad: float) -> None:
    for arguments in ((bad, 128), (0.1, bad)):
        with pytest.raises(ValueError, match=rf"{rule.__name__}\(\w+={bad}\): write a finite number above 0"):
            rule(*arguments)


def test_alpha_must_be_positive_and_finite() -> None:
    with pytest.raises(ValueError, match=r"NoiseScaling\(alpha=0\): write a finite number above 0"):
        NoiseScaling(0.1, 128, alpha=0)
