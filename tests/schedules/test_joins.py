"""Schedules made of others, and a rate of 0 where a shape starts or ends."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
from lightning_bsl.theory import asymptotic_rates

RUN = Horizon(step=100)


def over_steps(schedule: Schedule, steps: int = 100) -> list[float]:
    return [schedule(Progress(step=step, horizon=Horizon(step=steps))) for step in range(steps)]


def test_each_parts_clock_starts_at_its_boundary_and_its_run_ends_at_the_next() -> None:
    parts = [Linear(0.0, 1.0, unit="step"), Exponential(1.0, factor=0.5, every=0.5, unit="step"), Cosine(0.5, unit="step")]
    lengths, found = (10, 40, 50), over_steps(Sequence(parts, at=[10, 50], unit="step"))
    expected = [value for part, length in zip(parts, lengths) for value in over_steps(part, length)]
    assert found == expected


def test_a_part_with_a_length_of_its_own_keeps_it() -> None:
    lr = Sequence([Linear(0.0, 1.0, over=5, unit="step"), Cosine(1.0, total=20, unit="step")], at=[10], unit="step")
    found = over_steps(lr)
    assert found[4:10] == pytest.approx([0.8, 1, 1, 1, 1, 1])
    assert found[10:31] == over_steps(Cosine(1.0, total=20, unit="step"), 21)


def test_joins_inside_joins_and_plain_functions() -> None:
    inner = Sequence([1.0, lambda progress: 2.0 + progress.step], at=[0.5], unit="step")
    found = over_steps(Sequence([inner, 5.0], at=[20], unit="step"))
    assert found == [1.0] * 10 + [2.0 + step for step in range(10)] + [5.0] * 80
    # a plain function may change at any step
    assert not Sequence([inner, 5.0], at=[20], unit="step").names_changes
    (stage,) = plan(JointSchedule(8, Sequence([inner, 5.0], at=[20], unit="step")), 800, steps=100).stages
    assert (stage.lr, stage.last_lr, stage.steps) == (1.0, 5.0, 100)


@pytest.mark.parametrize(
    ("join", "same"),
    [
        (Sequence([1, 2, 4], at=[30, 60], unit="step"), Milestones([1, 2, 4], at=[30, 60], unit="step")),
        (
            Sequence([Linear(0.0, 2.0, unit="step"), Cosine(2.0, unit="step")], at=[20], unit="step"),
            Warmup(0.0, then=Cosine(2.0, unit="step"), over=20, shape="linear", unit="step"),
        ),
        (
            Sequence([Linear(0.0, 2.0, unit="step"), 2.0, Linear(2.0, 0.0, unit="step")], at=[0.1, 0.7], unit="step"),
            WarmupStableDecay(2.0, warmup=0.1, decay=0.3, unit="step"),
        ),
    ],
)
def test_milestones_warmup_and_warmup_stable_decay_are_joins(join: Schedule, same: Schedule) -> None:
    assert over_steps(join) == pytest.approx(over_steps(same), rel=1e-12, abs=1e-12)
    for step in range(100):
        progress = Progress(step=step, horizon=RUN)
        assert join.next_change(progress) == same.next_change(progress)


def test_a_linear_warmup_and_a_cosine_are_those_of_torch() -> None:
    """``LinearLR`` and ``CosineAnnealingLR``, joined by ``SequentialLR``."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[20])
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    lr = Sequence([Linear(0.01, 0.1, unit="step"), Cosine(0.1, unit="step")], at=[20], unit="step")
    assert over_steps(lr) == pytest.approx(expected, rel=1e-9)


def in_units(schedule: Schedule, length: int) -> list[float]:
    return [schedule(Progress()._replace(samples=count, horizon=Horizon(samples=length))) for count in range(length)]


@pytest.mark.parametrize("length", [100, 1000])
@pytest.mark.parametrize(
    ("family", "arguments", "lengths"),
    [
        (Milestones, {"values": [8, 16, 32]}, {"at": [0.03, 0.1]}),
        (Sequence, {"parts": [8, 16, 32]}, {"at": [0.25, 0.5]}),
        (Linear, {"start": 0, "end": 1}, {"over": 0.2}),
        (Cosine, {"start": 1}, {"total": 0.5}),
        (PolynomialDecay, {"start": 1}, {"total": 0.7}),
        (Warmup, {"start": 0.1, "then": 1.0}, {"over": 0.1, "every": 0.05}),
        (WarmupStableDecay, {"peak": 1}, {"warmup": 0.02, "decay": 0.3}),
        (Exponential, {"start": 8, "factor": 2}, {"every": 0.1}),
    ],
)
def test_fractions_are_the_integers_they_stand_for(family: Any, arguments: Any, lengths: Any, length: int) -> None:
    def whole(value: Any) -> Any:
        return [whole(item) for item in value] if isinstance(value, list) else round(value * length)

    by_fractions = family(**arguments, **lengths, unit="samples")
    by_integers = family(**arguments, **{name: whole(value) for name, value in lengths.items()}, unit="samples")
    assert in_units(by_fractions, length) == in_units(by_integers, length)
    if arguments.get("values"):
        plans = [plan(JointSchedule(schedule), length // 2, epochs=2) for schedule in (by_fractions, by_integers)]
        assert plans[0].stages == plans[1].stages
        assert [stage.batch_size for stage in plans[0].stages] == [8, 16, 32]


def test_fractions_that_are_one_in_whole_units_are_refused() -> None:
    """Else the value between them would never be used, and nobody would know."""
    batch_size = Milestones([8, 16, 32], at=[0.03, 0.1])
    with pytest.raises(ValueError, match=r"`at=\(0.03, 0.1\)` are 1, 1 in a run of 10 \(unit 'epoch'\).*finer `unit`"):
        batch_size(Progress(horizon=Horizon(epoch=10)))
    with pytest.raises(ValueError, match=r"`at=\(0.5, 3\)` are 5, 3"):
        Sequence([1, 2, 3], at=[0.5, 3])(Progress(horizon=Horizon(epoch=10)))


def test_numbers_of_numpy() -> None:
    parts, at = np.array([8, 16, 32]), np.array([0.25, 0.5], dtype=np.float32)
    joined, same = Sequence([*parts], at=at, unit="step"), Milestones([8, 16, 32], at=[0.25, 0.5], unit="step")
    values = [schedule(Progress(step=step, horizon=Horizon(step=80))) for schedule in (joined, same) for step in range(80)]
    assert values[:80] == values[80:]
    assert JointSchedule(np.int64(8), np.float32(0.5))(Progress()) == (8, 0.5)
    grown, by_int = (plan(seesaw(Linear(0.1, 0.01, unit="samples"), size), 640, epochs=1) for size in (np.int64(8), 8))
    assert grown.stages == by_int.stages


@pytest.mark.parametrize("part", ["cosine", None, SqrtScaling(0.1, 8), Cosine])
def test_what_is_no_part(part: Any) -> None:
    with pytest.raises(TypeError, match=r"`parts\[1\]=.*is no schedule: write a schedule of progress"):
        Sequence([1, part], at=[3])
    with pytest.raises(TypeError, match=r"`then=.*is no schedule"):
        Warmup(0.1, then=part, over=3)


def test_warmup_and_decay_longer_than_the_run() -> None:
    with pytest.raises(ValueError, match=r"warm-up of 60 and the decay of 50 are longer than the run of 100"):
        WarmupStableDecay(1.0, warmup=60, decay=0.5)(Progress(horizon=Horizon(samples=100)))


# --- joins at random -----------------------------------------------------------------------------------------------------


@given(st.data())
def test_next_change_of_random_joins_by_brute_force(data: st.DataObject) -> None:
    """Of parts that change in every unit or never, it is the very next reading with another value, or a boundary."""
    length = 30
    boundaries = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    slopes = data.draw(st.lists(st.booleans(), min_size=len(boundaries) + 1, max_size=len(boundaries) + 1))
    parts = [Linear(i, i + 0.5, unit="step") if slope else Constant(i) for i, slope in enumerate(slopes)]
    schedule = Sequence(parts, at=boundaries, unit="step")
    seen = over_steps(schedule, length)
    for step in range(length - 1):
        brute = next((later for later in range(step + 1, length) if seen[later] != seen[step]), None)
        change = schedule.next_change(Progress(step=step, horizon=Horizon(step=length)))
        if change is None or change >= length:
            assert brute is None
        else:
            assert change == brute


# --- what the theory makes of them ----------------------------------------------------------------------------------------


def test_what_follows_a_warmup_decides_about_the_asymptotics() -> None:
    growing = Exponential(8, factor=2)
    geometric = asymptotic_rates(JointSchedule(growing, Warmup(0.1, then=Cosine(0.5), over=30)))
    linear = asymptotic_rates(JointSchedule(growing, Sequence([Linear(0.0, 0.5), Cosine(0.5)], at=[30])))
    assert geometric is not None and geometric.case == "iv"
    assert linear == geometric
    assert asymptotic_rates(JointSchedule(growing, Sequence([0.5, Cosine(0.5)], at=[30]))) is None  # no warm-up


# --- a rate of 0 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lr",
    [
        Linear(0.0, 0.1, over=10, unit="step"),
        Linear(0.0, 0.1, over=10, unit="samples"),
        Warmup(0.0, then=0.1, over=10, shape="linear", unit="step"),
        WarmupStableDecay(0.1),
        WarmupStableDecay(0.1, unit="step"),
        Sequence([Linear(0.0, 0.1, unit="step"), 0.1], at=[10], unit="step"),
    ],
)
def test_a_shape_may_start_from_0(lr: Schedule) -> None:
    run = plan(JointSchedule(10, lr), 1000, epochs=1)
    assert run.stages[0].lr == 0
    assert run.stages[0].last_lr is not None and run.stages[0].last_lr > 0


def test_a_shape_may_end_at_0_with_the_last_step() -> None:
    lr = Linear(0.1, 0.0, over=99, unit="step")
    assert plan(JointSchedule(10, lr), 1000, epochs=1).stages[-1].last_lr == 0
    with pytest.raises(ValueError, match=r"learning rate is 0.* at epoch=0, step=99"):  # not before the end
        plan(JointSchedule(10, lr), 1000, epochs=2)


def test_a_whole_epoch_at_a_rate_of_0_brings_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"the first 100 steps have a learning rate of 0.*unit='step'"):
        plan(JointSchedule(10, Linear(0.0, 0.1, over=2)), 1000, epochs=3)
    with pytest.warns(UserWarning, match=r"the last 100 steps have a learning rate of 0"):
        plan(JointSchedule(10, Linear(0.1, 0.0, over=2)), 1000, epochs=3)


@pytest.mark.parametrize(
    "lr",
    [
        Constant(0.0),
        Milestones([0.0, 0.1], at=[1], unit="step"),  # no shape that starts from 0
        Warmup(0.0, then=0.1, over=10, every=2, shape="linear", unit="step"),  # two steps for nothing
        Linear(0.0, 0.1, over=10, every=5, unit="step"),
        Cosine(0.1, total=50, unit="step"),
        lambda progress: 0.0,
    ],
)
def test_a_rate_of_0_elsewhere_is_refused(lr: Any) -> None:
    with pytest.raises(ValueError, match=r"the learning rate is 0.*must be finite and above 0"):
        plan(JointSchedule(10, lr), 1000, epochs=1)


# --- the plan is right for each of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["step", "samples", "epoch"])
def test_the_sums_of_the_bound_over_a_join_are_those_over_its_steps(unit: Any) -> None:
    from lightning_bsl.theory import bound_terms

    lr = WarmupStableDecay(0.1, warmup=0.1, decay=0.4, end=0.01, shape="sqrt", unit=unit)
    run = plan(JointSchedule(Milestones([10, 20], at=[0.5], unit="samples"), lr), 1000, epochs=20)
    rates, sizes = [], []
    for stretch, _ in run.stretches_of_epochs():
        for step in range(stretch.steps):
            rates.append(lr(stretch.start.advance(step * stretch.batch_size, step)))
            sizes.append(stretch.batch_size)
    terms = bound_terms(run)
    assert sizes[0] == 10 and sizes[-1] == 20 and all(a <= b for a, b in pairwise(sizes))
    assert sum(term.lr_sum for term in terms) == pytest.approx(math.fsum(rates), rel=1e-9)
    assert sum(term.noise_sum for term in terms) == pytest.approx(
        math.fsum(rate**2 / size for rate, size in zip(rates, sizes)), rel=1e-9
    )
