"""Seesaw: a decay of the rate becomes growth of the batch."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lightning_bsl.datasets import QuadraticNoise
from lightning_bsl.models import NoisyQuadratic
from lightning_bsl.schedules import (
    Constant,
    Cosine,
    Exponential,
    Horizon,
    JointSchedule,
    Linear,
    Milestones,
    PolynomialDecay,
    Progress,
    Schedule,
    Sequence,
    SqrtScaling,
    Warmup,
    WarmupStableDecay,
    plan,
    seesaw,
)

LENGTH = 10_000
RUN = Horizon(samples=LENGTH)


@dataclass(frozen=True)
class QuarterCosine(Schedule):
    """``start * cos(pi/2 t/T)``."""

    start: float

    def value(self, progress: Progress) -> float:
        return self.start * math.cos(math.pi / 2 * progress.count(self.unit) / progress.horizon.total(self.unit))


def at(samples: int, horizon: Horizon = RUN) -> Progress:
    return Progress(samples=samples, horizon=horizon)


# --- the steps that it saves at equal samples -----------------------------------------------------------------------------


def saved(decay: Schedule, cut: float, samples: int) -> float:
    runs = [plan(seesaw(decay, 1024, cut, exponent), samples, epochs=1) for exponent in (0.5, 1)]
    assert runs[0].samples == runs[1].samples == samples
    return 100 * (1 - runs[0].steps / runs[1].steps)


@pytest.mark.parametrize(
    ("decay", "cut", "percent"),
    [
        (QuarterCosine(0.1, unit="samples"), 2, 22.0),
        (QuarterCosine(0.1, unit="samples"), math.sqrt(2), 28.2),
        (QuarterCosine(0.1, unit="samples"), 1.1, 33.8),
        (QuarterCosine(0.1, unit="samples"), 1.005, 100 * (1 - 2 / math.pi)),  # the limit
        (Cosine(0.1, unit="samples"), 2, 37.8),
        (Cosine(0.1, unit="samples"), math.sqrt(2), 43.3),
        (Cosine(0.1, unit="samples"), 1.1, 47.9),
    ],
)
def test_the_steps_saved_on_a_cosine(decay: Schedule, cut: float, percent: float) -> None:
    assert saved(decay, cut, 10**8) == pytest.approx(percent, abs=0.1 if cut > 1.01 else 0.2)


# --- the family -----------------------------------------------------------------------------------------------------------

DECAYS = [
    Cosine(0.1, unit="samples"),
    QuarterCosine(0.1, unit="samples"),
    Linear(0.1, 0.0, unit="samples"),
    Linear(0.1, 0.01, over=0.5, unit="samples"),
    PolynomialDecay(0.1, power=2, unit="samples"),
    Exponential(0.1, factor=0.5, every=0.1, unit="samples"),
    Milestones([0.1, 0.05, 0.0125], at=[0.5, 0.75], unit="samples"),
    WarmupStableDecay(0.1, warmup=0.1, decay=0.5, shape="sqrt"),
    Warmup(0.01, then=Cosine(0.1, unit="samples"), over=0.1, unit="samples"),
    Sequence([Linear(0.0, 0.1, unit="samples"), Cosine(0.1, unit="samples")], at=[0.1], unit="samples"),
    Sequence([WarmupStableDecay(0.1, warmup=0.2, end=0.05), Linear(0.05, 0.0, unit="samples")], at=[0.5], unit="samples"),
]


@pytest.mark.quick(cut=[1.3, 4])
@pytest.mark.parametrize("decay", DECAYS, ids=lambda decay: type(decay).__name__)
@pytest.mark.parametrize(
    ("cut", "exponent", "coupling"),
    [(2, 0.5, "sqrt"), (1.3, 0.5, "sqrt"), (2, 0.75, "sqrt"), (4, 0.5, "linear"), (2, 0.0, "linear")],
)
def test_rate_and_batch_size_after_m_cuts(decay: Schedule, cut: float, exponent: float, coupling: Any) -> None:
    schedule, power = seesaw(decay, 64, cut, exponent, coupling=coupling), 0.5 if coupling == "sqrt" else 1
    start = decay.warmup_end(at(0))
    sizes = []
    for samples in range(0, LENGTH - 20, 37):
        value = decay(at(samples))
        if samples < start:
            assert schedule.batch_size_at(at(samples)) == 64
            assert schedule.lr(at(samples)) == value  # type: ignore[operator, misc]
            continue
        cuts = math.floor(math.log(0.1 / value) / math.log(cut) + 1e-9)
        size, lr = schedule(at(samples))
        family = math.floor(64 * cut ** ((1 - exponent) / power * cuts) + 0.5)
        assert size == min(family, LENGTH)
        assert lr == pytest.approx(0.1 * cut ** (-exponent * cuts), rel=1e-12)
        # what decides about the noise is that of the decay by cuts, up to the rounding of the batch size
        assert lr / family**power == pytest.approx(0.1 * cut**-cuts / 64**power, rel=0.5 / 64)
        sizes.append(size)
    assert sizes == sorted(sizes) and sizes[-1] > 64


@pytest.mark.quick(maximum=[32])
@pytest.mark.parametrize("decay", DECAYS, ids=lambda decay: type(decay).__name__)
@pytest.mark.parametrize("maximum", [None, 32])
def test_next_change_by_brute_force(decay: Schedule, maximum: int | None) -> None:
    schedule, end = seesaw(decay, 8, maximum=maximum), 200
    for function in (schedule.batch_size, schedule.lr):
        assert isinstance(function, Schedule)
        seen = [function(at(samples, Horizon(samples=end))) for samples in range(end)]
        for samples in range(end):
            change = function.next_change(at(samples, Horizon(samples=end)))
            until = end if change is None else change
            assert until > samples
            assert set(seen[samples:until]) == {seen[samples]}
            if function is schedule.batch_size and until < end:
                assert seen[until] != seen[samples]


def test_beyond_the_maximum_the_rest_is_the_plain_decay() -> None:
    decay = Cosine(0.1, unit="samples")
    schedule = seesaw(decay, 8, maximum=32)
    reached = next(samples for samples in range(LENGTH) if schedule.batch_size_at(at(samples)) == 32)
    assert decay(at(reached)) == pytest.approx(0.025, rel=1e-3)  # two cuts
    for samples in range(reached, LENGTH, 97):
        assert schedule(at(samples)) == (32, pytest.approx(2 * decay(at(samples)), rel=1e-12))
    # without a jump where the decay takes over
    assert schedule(at(reached)).lr == pytest.approx(0.1 / 2, rel=1e-3)


def test_a_maximum_between_two_cuts() -> None:
    schedule = seesaw(Cosine(0.1, unit="samples"), 8, maximum=20)
    assert {schedule.batch_size_at(at(samples)) for samples in range(0, LENGTH, 10)} == {8, 16, 20}
    last = schedule(at(LENGTH - 1))
    assert last.lr == pytest.approx(math.sqrt(20 / 8) * Cosine(0.1, unit="samples")(at(LENGTH - 1)), rel=1e-12)


def test_exponent_1_is_the_decay_itself() -> None:
    decay = Cosine(0.1, unit="samples")
    schedule = seesaw(decay, 8, exponent=1)
    assert all(schedule(at(samples)) == (8, decay(at(samples))) for samples in range(0, LENGTH, 50))


def test_the_end_of_a_cosine_does_not_ask_for_more_than_the_run() -> None:
    """Its last samples have a rate near 0; the last step takes what is left."""
    run = plan(seesaw(Cosine(0.1, unit="samples"), 8), LENGTH, epochs=1)
    assert run.samples == LENGTH
    assert run.stages[-1].steps == 1


def test_tokens_are_samples_times_the_tokens_of_one() -> None:
    in_samples = seesaw(WarmupStableDecay(0.1, warmup=0.1, decay=0.5), 8, maximum=64)
    in_tokens = seesaw(WarmupStableDecay(0.1, warmup=0.1, decay=0.5, unit="tokens"), 8, maximum=64)
    plans = [plan(schedule, LENGTH, epochs=1, tokens_per_sample=512) for schedule in (in_samples, in_tokens)]
    assert plans[0].stages == plans[1].stages
    assert [stage.batch_size for stage in plans[0].stages][-1] == 64


def test_over_several_epochs_the_plan_is_that_of_one() -> None:
    one, four = (plan(seesaw(Cosine(0.1, unit="samples"), 8), 40_000 // epochs, epochs=epochs) for epochs in (1, 4))
    assert abs(one.steps - four.steps) <= 3  # an epoch may end with a short step
    assert {stage.batch_size for stage in one.stages} == {stage.batch_size for stage in four.stages}


def test_a_plain_function_of_samples() -> None:
    function = seesaw(lambda progress: 0.1 * (1 - progress.samples / LENGTH), 8)
    linear = seesaw(Linear(0.1, 0.0, unit="samples"), 8)
    for samples in range(0, LENGTH, 100):
        assert function(at(samples)).batch_size == linear(at(samples)).batch_size
    assert plan(function, LENGTH, epochs=1).steps == plan(linear, LENGTH, epochs=1).steps


# --- what cannot be right -------------------------------------------------------------------------------------------------

COSINE = Cosine(0.1, unit="samples")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": Cosine(0.1)}, ValueError, r"unit 'epoch'.*write `unit='samples'` or `unit='tokens'` for Cosine"),
        ({"lr": Cosine(0.1, unit="step")}, ValueError, r"unit 'step', but a batch that grows changes the number of steps"),
        ({"lr": 0.1}, ValueError, r"`lr=0.1` is no decay: write a schedule that decreases"),
        ({"lr": Constant(0.1)}, ValueError, r"is no decay"),
        ({"lr": SqrtScaling(0.1, 8)}, TypeError, r"is no decay"),
        ({"lr": None}, TypeError, r"`lr=None` is no decay"),
        ({"lr": JointSchedule(8, COSINE)}, TypeError, r"is no decay"),
        ({"cut": 1}, ValueError, r"`cut=1` must be a finite number above 1"),
        ({"cut": math.inf}, ValueError, r"`cut=inf` must be a finite number above 1"),
        ({"cut": math.nan}, ValueError, r"`cut=nan`"),
        ({"cut": "2"}, ValueError, r"seesaw\(cut='2'\)` is not a number"),
        ({"exponent": None}, ValueError, r"seesaw\(exponent=None\)` is not a number"),
        ({"exponent": 0.4}, ValueError, r"`exponent=0.4`: .*training is unstable.*write a number from 0.5 to 1"),
        ({"exponent": -0.1, "coupling": "linear"}, ValueError, r"`exponent=-0.1`: .*write a number from 0 to 1"),
        ({"exponent": 1.1}, ValueError, r"`exponent=1.1`: the batch would shrink"),
        ({"exponent": math.nan}, ValueError, r"`exponent=nan`"),
        ({"batch_size": 0}, ValueError, r"`batch_size=0` must be 1 or more, as a whole number"),
        ({"batch_size": 8.5}, ValueError, r"`batch_size=8.5`"),
        ({"batch_size": True}, ValueError, r"`batch_size=True`"),
        ({"maximum": 4}, ValueError, r"`maximum=4` is below `batch_size=8`"),
        ({"maximum": 64.0}, ValueError, r"`maximum=64.0` must be 1 or more, as a whole number"),
        ({"coupling": "none"}, ValueError, r"'none'.*write 'sqrt' or 'linear'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        seesaw(**({"lr": COSINE, "batch_size": 8} | arguments))


@pytest.mark.parametrize(
    "rising",
    [
        Exponential(0.1, factor=1.5, every=0.1, unit="samples"),
        Milestones([0.1, 0.01, 0.05], at=[0.5, 0.75], unit="samples"),  # falls, then rises
        Sequence([Cosine(0.1, unit="samples"), Cosine(0.1, unit="samples")], at=[0.5], unit="samples"),  # restarts
        lambda progress: 0.1 + progress.samples,
    ],
)
def test_what_rises_is_refused_before_training(rising: Any) -> None:
    with pytest.raises(ValueError, match=r"the decay of `seesaw` rises from .* to .*: write a schedule that decreases"):
        seesaw(rising, 8)(at(0))


# --- equal loss while noise dominates -------------------------------------------------------------------------------------

DECAY = Milestones([1.0, 0.5, 0.25, 0.125], at=[0.25, 0.5, 0.75], unit="samples")  # where the cuts are exact
REPLICAS, DIMENSION = 160, 40


def scaled(rate: float) -> Milestones:
    return Milestones([rate * value for value in DECAY.values], at=DECAY.at, unit="samples")


def last_losses(schedule: JointSchedule, noise: float, loss_gap: float, normalised: bool, seed: int) -> np.ndarray:
    """The loss of each replica after two epochs over `QuadraticNoise`, by numpy."""
    data = QuadraticNoise(num_examples=4096, dimension=DIMENSION, gradient_variance=noise).train_set
    xi = data.tensors[0].double().numpy()  # type: ignore[union-attr]
    model = NoisyQuadratic(dimension=DIMENSION, loss_gap=loss_gap)
    eigenvalues, start = (tensor.detach().double().numpy() for tensor in (model.eigenvalues, model.theta))
    draw, theta = np.random.default_rng(seed), np.tile(start, (REPLICAS, 1))
    for stretch, behind in plan(schedule, len(xi), epochs=2).stretches_of_epochs():
        if behind == 0:
            order = np.argsort(draw.random((REPLICAS, len(xi))), axis=1)
        for step in range(stretch.steps):
            first = behind + step * stretch.batch_size
            rows = order[:, first : min(first + stretch.batch_size, behind + stretch.examples)]
            gradient = eigenvalues * theta - xi[rows].mean(axis=1)
            lr = schedule.lr_at(stretch.start.advance(step * stretch.batch_size, step), stretch.batch_size)
            theta -= lr * (gradient / np.linalg.norm(gradient, axis=1, keepdims=True) if normalised else gradient)
    return (eigenvalues * theta**2).sum(axis=1) / 2


def difference(decay: Milestones, arguments: dict[str, Any], **problem: Any) -> float:
    """Seesaw against its decay: the difference of the expected losses, in standard errors."""
    plain = last_losses(seesaw(decay, 8, exponent=1), seed=0, **problem)
    growing = last_losses(seesaw(decay, 8, **arguments), seed=1, **problem)
    error = math.sqrt((plain.var(ddof=1) + growing.var(ddof=1)) / REPLICAS)
    return float((growing.mean() - plain.mean()) / error)


@pytest.mark.parametrize(
    ("arguments", "normalised", "rate"),
    [
        ({"exponent": 0, "coupling": "linear"}, False, 0.05),
        pytest.param({"exponent": 0.5, "coupling": "linear", "cut": 4}, False, 0.05, marks=pytest.mark.slow),
        ({}, True, 0.02),
        pytest.param({"exponent": 0.75, "cut": 4}, True, 0.02, marks=pytest.mark.slow),
    ],
)
def test_the_expected_loss_is_that_of_the_decay_while_noise_dominates(
    arguments: dict[str, Any], normalised: bool, rate: float
) -> None:
    decay = scaled(rate)
    if arguments.get("cut") == 4:  # the cuts of this decay
        decay = Milestones([rate, rate / 4], at=[0.5], unit="samples")
    assert abs(difference(decay, arguments, noise=1.0, loss_gap=0.02, normalised=normalised)) < 3


def test_above_the_critical_batch_size_it_is_not() -> None:
    """Without noise the norm of the gradient does not fall with the batch size, so fewer steps go less far."""
    assert difference(scaled(0.02), {}, noise=0.01, loss_gap=20.0, normalised=True) > 3
