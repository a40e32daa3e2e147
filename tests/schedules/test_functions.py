import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bsl.schedules import (
    Constant,
    Cosine,
    Diminishing,
    Exponential,
    Horizon,
    Linear,
    LinearScaling,
    Milestones,
    Polynomial,
    PolynomialDecay,
    Progress,
    Schedule,
    Sequence,
    SqrtScaling,
    Warmup,
    WarmupStableDecay,
)

UNITS = ("epoch", "step", "samples")
RUN = Horizon(300, 300, 300)


def at(unit: str, count: int, horizon: Horizon = RUN) -> Progress:
    """A clock that reads ``count`` in ``unit`` and nonsense elsewhere: no schedule may look there."""
    return Progress(10**6, 10**6, 10**6, horizon)._replace(**{unit: count})


def values(schedule: Schedule, counts: tuple[int, ...]) -> list[float]:
    return [schedule(at(schedule.unit, count)) for count in counts]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("family", "arguments", "counts", "expected"),
    [
        (Constant, {"start": 128}, (0, 299), [128, 128]),
        (Exponential, {"start": 8, "factor": 2, "every": 30}, (0, 29, 30, 59, 60, 299), [8, 8, 16, 16, 32, 4096]),
        (Exponential, {"start": 8, "factor": 2, "every": 0.1}, (0, 29, 30, 59, 60, 299), [8, 8, 16, 16, 32, 4096]),
        (Exponential, {"start": 8, "factor": 2, "every": 30, "maximum": 20}, (29, 30, 60, 90), [8, 16, 20, 20]),
        (Exponential, {"start": 1.0, "factor": 0.5, "every": 1, "minimum": 0.2}, (0, 1, 2, 3), [1.0, 0.5, 0.25, 0.2]),
        (Exponential, {"start": 2.0, "factor": 10, "minimum": 3, "maximum": 30}, (0, 1, 2), [3, 20.0, 30]),
        (Polynomial, {"start": 8, "slope": 4, "every": 10}, (0, 9, 10, 20), [8, 8, 12, 16]),
        (Polynomial, {"start": 2, "slope": 1, "power": 2, "every": 5}, (0, 4, 5, 10), [4, 4, 9, 16]),
        (Diminishing, {"start": 1.0}, (0, 3, 8, 99), [1.0, 1 / 2, 1 / 3, 1 / 10]),
        (Diminishing, {"start": 1.0, "every": 10}, (9, 10, 30), [1.0, 1 / math.sqrt(2), 1 / 2]),
        (Cosine, {"start": 1.0}, (0, 100, 150, 200, 300, 400), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),  # the run: 300
        (Cosine, {"start": 3.0, "end": 1.0, "total": 6}, (0, 2, 3, 4, 6, 7), [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]),
        (Cosine, {"start": 1.0, "total": 6, "every": 2}, (0, 1, 2, 3, 4), [1.0, 1.0, 0.75, 0.75, 0.25]),
        (Cosine, {"start": 1.0, "total": 6, "minimum": 0.3}, (2, 4, 6), [0.75, 0.3, 0.3]),
        (PolynomialDecay, {"start": 1.0}, (0, 75, 150, 300, 301), [1.0, 0.75, 0.5, 0.0, 0.0]),
        (PolynomialDecay, {"start": 3.0, "end": 1.0, "total": 4}, (0, 1, 2, 4), [3.0, 2.5, 2.0, 1.0]),
        (PolynomialDecay, {"start": 1.0, "total": 4, "power": 2}, (0, 1, 2, 4, 5), [1.0, 0.5625, 0.25, 0.0, 0.0]),
        (Milestones, {"values": [1, 2, 4], "at": [30, 60]}, (0, 29, 30, 59, 60, 299), [1, 1, 2, 2, 4, 4]),
        (Milestones, {"values": [7], "at": []}, (0, 299), [7, 7]),
        (Milestones, {"values": [1, 2, 4], "at": [0.1, 0.2]}, (0, 29, 30, 59, 60, 299), [1, 1, 2, 2, 4, 4]),
        (Milestones, {"values": [1, 2, 4], "at": [0.1, 60]}, (29, 30, 59, 60), [1, 2, 2, 4]),
        (Cosine, {"start": 1.0, "total": 0.5}, (0, 75, 150, 299), [1.0, 0.5, 0.0, 0.0]),
        (PolynomialDecay, {"start": 1.0, "total": 0.1}, (0, 15, 30), [1.0, 0.5, 0.0]),
        (Linear, {"start": 0.0, "end": 1.0, "over": 10}, (0, 1, 5, 10, 299), [0.0, 0.1, 0.5, 1.0, 1.0]),
        (Linear, {"start": 3.0, "end": 1.0, "over": 0.1}, (0, 15, 30, 31), [3.0, 2.0, 1.0, 1.0]),
        (Linear, {"start": 0.0, "end": 3.0}, (0, 100, 300), [0.0, 1.0, 3.0]),
        (Linear, {"start": 0.0, "end": 1.0, "over": 10, "every": 5}, (0, 4, 5, 9, 10), [0.0, 0.0, 0.5, 0.5, 1.0]),
        (WarmupStableDecay, {"peak": 2.0}, (0, 3, 6, 239, 240, 270, 300), [0.0, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0]),
        (
            WarmupStableDecay,
            {"peak": 2.0, "warmup": 10, "decay": 100, "end": 1.0, "shape": "sqrt"},
            (0, 5, 10, 200, 225, 300),
            [0.0, 1.0, 2.0, 2.0, 1.5, 1.0],
        ),
        (
            WarmupStableDecay,
            {"peak": 2.0, "warmup": 0, "decay": 0.5, "shape": "cosine"},
            (0, 150, 200, 225, 250, 300),
            [2.0, 2.0, 1.5, 1.0, 0.5, 0.0],
        ),
        (WarmupStableDecay, {"peak": 2.0, "warmup": 100, "decay": 200}, (0, 50, 100, 200), [0.0, 1.0, 2.0, 1.0]),
        (WarmupStableDecay, {"peak": 2.0, "warmup": 0.5, "decay": 0}, (0, 75, 150, 299, 300), [0.0, 1.0, 2.0, 2.0, 2.0]),
        (
            Warmup,
            {"start": 0.0, "then": Constant(2.0), "over": 30, "shape": "linear"},
            (0, 1, 15, 29, 30),
            [0, 2 / 30, 1, 58 / 30, 2],
        ),
        (
            Warmup,
            {"start": 1.0, "then": 2.0, "over": 30, "every": 10, "shape": "linear"},
            (9, 10, 20, 30),
            [1, 4 / 3, 5 / 3, 2],
        ),
        (Sequence, {"parts": [1.0, 3, 2.0], "at": [30, 0.2]}, (0, 29, 30, 59, 60), [1, 1, 3, 3, 2]),
    ],
)
def test_values_at_the_boundaries(
    family: type[Schedule], arguments: dict[str, Any], counts: tuple[int, ...], expected: list[float], unit: str
) -> None:
    assert values(family(unit=unit, **arguments), counts) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_papers_clocks_are_the_defaults() -> None:
    assert [Exponential(1, 2).unit, Cosine(1).unit, Milestones([1], []).unit] == ["epoch"] * 3
    assert [Diminishing(1).unit, PolynomialDecay(1).unit] == ["step"] * 2
    assert WarmupStableDecay(1).unit == "samples"  # a budget of data


@pytest.mark.parametrize(
    ("fraction", "total", "length"), [(0.1, 300, 30), (0.1, 301, 31), (0.07, 100, 7), (0.001, 10, 1), (1 / 3, 9, 3)]
)
def test_a_fraction_of_the_run_is_rounded_up_but_not_for_float_noise(fraction: float, total: int, length: int) -> None:
    schedule = Exponential(1, factor=2, every=fraction, unit="step")
    clock = Progress(horizon=Horizon(step=total))
    assert [schedule(clock._replace(step=step)) for step in (length - 1, length)] == [1, 2]


# --- warm-up ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("peak", [0.2, 0.5, 1.0])
def test_warmup_is_the_authors(unit: str, peak: float) -> None:
    over, every = 30, 3
    lr = Warmup(0.1, then=Constant(peak), over=over, every=every, unit=unit)
    gamma = (peak / 0.1) ** (every / (over - every))
    assert lr.factor(at(unit, 0)) == pytest.approx(gamma, rel=1e-12)
    expected = [0.1 * gamma ** (count // every) if count < over else peak for count in range(60)]
    assert values(lr, tuple(range(60))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "then",
    [
        Cosine(0.8, end=0.1),
        Exponential(0.8, factor=0.5, every=45),
        Exponential(0.8, factor=0.5, every=0.1),  # a tenth of the 270 that are left: 27
        PolynomialDecay(0.8, unit="epoch"),
        Constant(0.8, unit="samples"),
    ],
)
def test_warmup_hands_over_without_a_jump(then: Schedule) -> None:
    lr = Warmup(0.1, then=then, over=30, every=3)
    before, after = values(lr, (29, 30))
    assert before == pytest.approx(0.8, rel=1e-12)
    assert after == 0.8
    # from there on it is `then` over a run that is 30 shorter
    rest = replace(RUN, epoch=270)
    for count in (30, 31, 57, 75, 165, 299):
        assert lr(at("epoch", count)) == then(at("epoch", count - 30)._replace(horizon=rest))


def test_warmup_over_a_fraction_and_before_a_plain_function() -> None:
    lr = Warmup(1.0, then=lambda progress: 16.0 - progress.epoch, over=0.1, every=6)
    assert values(lr, (0, 5, 6, 29, 30, 31)) == pytest.approx([1, 1, 2, 16, 16, 15])


# --- tokens: samples times the tokens of one -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(7, unit="samples"),
        Exponential(8, factor=2, every=30, unit="samples"),
        Exponential(8, factor=2, every=0.1, unit="samples"),
        Polynomial(8, slope=4, every=10, unit="samples"),
        Cosine(1.0, unit="samples"),
        Cosine(1.0, total=60, unit="samples", every=2),
        PolynomialDecay(1.0, total=150, unit="samples"),
        Milestones([1, 2, 4], at=[30, 60], unit="samples"),
        Milestones([1, 2, 4], at=[0.1, 0.2], unit="samples"),
        Linear(0.0, 1.0, over=30, unit="samples"),
        WarmupStableDecay(1.0, warmup=30, decay=60),
        Sequence([Linear(0.0, 1.0, over=15, unit="samples"), 1.0, Cosine(1.0, unit="samples")], at=[30, 60], unit="samples"),
        Warmup(0.1, then=Cosine(0.8, unit="samples"), over=30, every=3, unit="samples"),
    ],
)
def test_lengths_in_tokens_are_those_in_samples_times_the_tokens_of_one(schedule: Schedule) -> None:
    def in_tokens(each: Any) -> Any:
        def scaled(length: Any) -> Any:
            return 512 * length if isinstance(length, int) else length

        names = ("every", "over", "total", "warmup", "decay")
        changed = {name: scaled(getattr(each, name)) for name in names if hasattr(each, name)}
        if hasattr(each, "at"):
            changed |= {"at": [scaled(boundary) for boundary in each.at], "every": 1}
        if isinstance(each, Sequence):
            changed["parts"] = [in_tokens(part) for part in each.parts]
        if isinstance(each, WarmupStableDecay):
            changed["every"] = 1
        if hasattr(each, "then"):
            changed["then"] = in_tokens(each.then)
        return replace(each, unit="tokens", **changed)

    run = Horizon(samples=300, tokens_per_sample=512)
    for samples in range(300):
        clock = Progress(samples=samples, horizon=run)
        assert in_tokens(schedule)(clock) == pytest.approx(schedule(clock), rel=1e-12)


def test_a_warmup_that_ends_inside_a_sequence() -> None:
    """It is over with the first whole sequence, and what follows ends where the run does."""
    run = Horizon(samples=20, tokens_per_sample=100)
    lr = Warmup(1.0, then=Cosine(2.0, unit="tokens"), over=950, every=475, unit="tokens")
    found = [lr(Progress(samples=samples, horizon=run)) for samples in (0, 4, 5, 9, 10, 15, 20)]
    assert found == pytest.approx([1, 1, 2, 2, 2, 1, 0])
    changes = [lr.next_change(Progress(samples=samples, horizon=run)) for samples in (0, 9, 10, 11)]
    assert changes == [475, 950, 1001, 1101]


def test_tokens_where_the_examples_have_none() -> None:
    with pytest.raises(ValueError, match=r"counts in tokens.*`tokens_per_sample`.*`unit='samples'`"):
        Exponential(8, factor=2, every=512, unit="tokens")(Progress(horizon=RUN))


# --- errors: each names the value and says what to write -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (Constant, {"start": 1, "unit": "epochs"}, r"'epochs'.*write one of 'epoch', 'step', 'samples'"),
        (Exponential, {"start": 1, "factor": 2, "every": 0}, r"`every=0`.*write an int of 1 or more"),
        (Exponential, {"start": 1, "factor": 2, "every": -3}, r"`every=-3`.*write an int of 1 or more"),
        (Exponential, {"start": 1, "factor": 2, "every": True}, r"`every=True`.*write an int of 1 or more"),
        (Exponential, {"start": 1, "factor": 2, "every": 0.0}, r"`every=0.0`.*float between 0 and 1"),
        (Exponential, {"start": 1, "factor": 2, "every": 1.5}, r"`every=1.5`.*float between 0 and 1"),
        (Exponential, {"start": 1, "factor": 2, "every": math.nan}, r"`every=nan`.*float between 0 and 1"),
        (Exponential, {"start": 1, "factor": 0}, r"`factor=0`.*write a number above 0"),
        (Exponential, {"start": 1, "factor": -2}, r"`factor=-2`.*write a number above 0"),
        (Exponential, {"start": 1, "factor": math.nan}, r"`factor=nan`.*write a number above 0"),
        (Exponential, {"start": 1, "factor": math.inf}, r"`factor=inf`.*write a number above 0"),
        (Constant, {"start": 1, "minimum": 3, "maximum": 2}, r"`minimum=3` is above `maximum=2`; swap"),
        (Cosine, {"start": 1, "total": 0}, r"`total=0`.*write an int of 1 or more, or leave it out"),
        (PolynomialDecay, {"start": 1, "total": -1}, r"`total=-1`.*write an int of 1 or more, or leave it out"),
        (Milestones, {"values": [1, 2], "at": [3, 4]}, r"2 milestones need 3 values.*has 2"),
        (Milestones, {"values": [1, 2, 3], "at": [4, 4]}, r"`at=\(4, 4\)` must increase"),
        (Milestones, {"values": [1, 2], "at": [0]}, r"`at=\(0,\)` must increase, from 1"),
        (Milestones, {"values": [1, 2], "at": [3], "every": 2}, r"no `every` \(got 2\).*`at`"),
        (Warmup, {"start": 1, "then": Constant(2), "over": 0}, r"`over=0`.*write an int of 1 or more"),
        (Warmup, {"start": 1, "then": Constant(2), "over": True}, r"`over=True`.*write an int of 1 or more"),
        (Warmup, {"start": 0, "then": Constant(2), "over": 3}, r"start from 0; write a `start` above 0"),
        (Warmup, {"start": -1, "then": Constant(2), "over": 3}, r"start from -1; write a `start` above 0"),
        (Warmup, {"start": 0, "then": Constant(2), "over": 3}, r"`start=0` with `shape='linear'`"),
        (Warmup, {"start": -1, "then": Constant(2), "over": 3, "shape": "linear"}, r"linear warm-up cannot start from -1"),
        (Warmup, {"start": 1, "then": Constant(2), "over": 3, "shape": "cosine"}, r"'cosine'.*write 'linear' or 'exponential'"),
        (Cosine, {"start": 1, "total": 1.5}, r"`total=1.5`.*float between 0 and 1"),
        (Linear, {"start": 0, "end": 1, "over": 0}, r"`over=0`.*write an int of 1 or more, or leave it out"),
        (Linear, {"start": 0, "end": 1, "over": 2.0}, r"`over=2.0`.*float between 0 and 1"),
        (Milestones, {"values": [1, 2], "at": [1.5]}, r"`at=\(1.5,\)`.*whole numbers.*fractions of the run between 0 and 1"),
        (Milestones, {"values": [1, 2, 3], "at": [0.2, 0.1]}, r"`at=\(0.2, 0.1\)` must increase"),
        (Milestones, {"values": [1, 2], "at": [True]}, r"`at=\(True,\)` must increase, from 1 on"),
        (Milestones, {"values": [1, 2], "at": [1e6]}, r"`at=\(1000000.0,\)`.*whole numbers"),
        (Sequence, {"parts": [1, 2], "at": [3, 4]}, r"2 boundaries need 3 parts, but there are 2"),
        (Sequence, {"parts": [1, 2], "at": [0.0]}, r"`at=\(0.0,\)` must increase"),
        (
            Sequence,
            {"parts": [1, Cosine(1, unit="step")], "at": [3]},
            r"Sequence counts in unit 'epoch'.*Cosine counts in 'step'",
        ),
        (Sequence, {"parts": [1, 2], "at": [3], "every": 2}, r"Sequence has no `every` \(got 2\)"),
        (WarmupStableDecay, {"peak": 1, "warmup": 1.5}, r"`warmup=1.5`.*float between 0 and 1"),
        (WarmupStableDecay, {"peak": 1, "decay": -1}, r"`decay=-1`.*write an int of 1 or more"),
        (WarmupStableDecay, {"peak": 1, "decay": False}, r"`decay=False`"),
        (WarmupStableDecay, {"peak": 1, "end": 2}, r"`peak=1` must be above `end=2`"),
        (WarmupStableDecay, {"peak": 1, "end": -0.1}, r"`end` must be 0 or more"),
        (WarmupStableDecay, {"peak": 1, "shape": "exponential"}, r"'exponential'.*write 'linear' or 'sqrt' or 'cosine'"),
        (Warmup, {"start": 1, "then": Diminishing(2), "over": 3}, r"'epoch'.*'step'.*Write `unit='step'`.*Diminishing"),
    ],
)
def test_bad_arguments(family: type[Schedule], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        family(**arguments)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        (Exponential, {"start": 1, "factor": 2, "every": 0.1}),
        (Cosine, {"start": 1}),
        (PolynomialDecay, {"start": 1}),
        (Warmup, {"start": 1, "then": Constant(2), "over": 0.5}),
        (Milestones, {"values": [1, 2], "at": [0.5]}),
        (Sequence, {"parts": [1, 2], "at": [0.5]}),
        (Linear, {"start": 1, "end": 2, "over": 0.5}),
        (WarmupStableDecay, {"peak": 1}),
    ],
)
def test_a_fraction_of_a_run_without_an_end(family: type[Schedule], arguments: dict[str, Any], unit: str) -> None:
    schedule = family(unit=unit, **arguments)
    unknown = replace(RUN, **{unit: None})  # the other two lengths do not help
    for asked in (schedule, Warmup(1, then=schedule, over=3, unit=unit)):
        with pytest.raises(ValueError, match=rf"(?s)length in unit '{unit}'.*`total=...`.*`max_epochs`"):
            asked(at(unit, 4, unknown))


@pytest.mark.parametrize("over", [300, 301])
def test_a_warmup_as_long_as_the_run(over: int) -> None:
    lr = Warmup(0.1, then=Constant(0.2), over=over)
    with pytest.raises(ValueError, match=rf"takes {over} epochs.*only 300; write a shorter `over`, or train for longer"):
        lr(at("epoch", 0))
    assert lr(at("epoch", 0, Horizon())) == 0.1  # a run without a known end is long enough


def test_a_warmup_towards_a_value_that_cannot_be_reached_geometrically() -> None:
    with pytest.raises(ValueError, match=r"-0\.2"):
        Warmup(0.1, then=Constant(-0.2), over=30)(at("epoch", 3))


def test_a_polynomial_that_shrinks_away() -> None:
    with pytest.raises(ValueError, match=r"shrinks to -2 at stage 5; raise `start` or `slope`"):
        Polynomial(8, slope=-2)(at("epoch", 5))


# --- next_change -----------------------------------------------------------------------------------------------------------

LENGTH = 40
length = st.one_of(st.integers(1, 15), st.sampled_from([0.05, 0.1, 0.25, 1 / 3, 0.5]))
size = st.floats(0.1, 64)
common = {"every": length, "minimum": st.none() | st.floats(0.05, 2), "maximum": st.none() | st.floats(2, 32)}


@st.composite
def families(draw: st.DrawFn, unit: str | None = None) -> Schedule:
    unit = unit or draw(st.sampled_from(UNITS))
    cuts = sorted(draw(st.sets(st.integers(1, 50), max_size=5)))
    total = st.none() | st.integers(1, 60)
    few = {"unit": st.just(unit)} | common
    one_of = st.one_of(
        st.builds(Constant, size, **few),
        st.builds(Exponential, size, st.floats(0.5, 2), **few),
        st.builds(Polynomial, st.floats(1, 9), st.floats(0, 3), st.floats(0, 2), **few),
        st.builds(Diminishing, size, **few),
        st.builds(Cosine, size, end=size, total=total, **few),
        st.builds(PolynomialDecay, size, end=size, total=total, power=st.floats(0.5, 3), **few),
        st.lists(size, min_size=len(cuts) + 1, max_size=len(cuts) + 1).map(lambda v: Milestones(v, cuts, unit=unit)),
        st.builds(Linear, size, size, over=st.none() | length, **few),
        st.builds(
            WarmupStableDecay,
            peak=st.floats(1, 9),
            warmup=st.integers(0, 15) | st.just(0.2),
            decay=st.integers(0, 15) | st.just(0.3),
            shape=st.sampled_from(["linear", "sqrt", "cosine"]),
            unit=st.just(unit),
        ),
    )
    schedule = draw(one_of)
    if draw(st.booleans()):
        boundaries = sorted(draw(st.sets(st.integers(1, LENGTH - 1), min_size=1, max_size=3)))
        fractions = draw(st.booleans())
        at = [boundary / LENGTH for boundary in boundaries] if fractions else boundaries
        parts = [schedule, *(draw(one_of | size) for _ in at)]
        # a part may be shorter than the ramps of this one
        parts = [Linear(0, 1, unit=unit) if isinstance(part, WarmupStableDecay) else part for part in parts]
        schedule = Sequence(parts, at=at, unit=unit)
    if draw(st.booleans()):
        over = draw(st.integers(1, LENGTH - 1) | st.sampled_from([0.1, 0.3, 0.5]))
        if not isinstance(schedule, (Sequence, WarmupStableDecay)):  # they may be longer than the rest, or start from 0
            shape = draw(st.sampled_from(["linear", "exponential"]))
            schedule = Warmup(draw(size), then=schedule, over=over, shape=shape, every=draw(length), unit=unit)
    return schedule


@given(families())
def test_the_value_never_changes_before_next_change(schedule: Schedule) -> None:
    seen = [schedule(at(schedule.unit, count, Horizon(LENGTH, LENGTH, LENGTH))) for count in range(LENGTH)]
    for count in range(LENGTH):
        change = schedule.next_change(at(schedule.unit, count, Horizon(LENGTH, LENGTH, LENGTH)))
        assert change is None or change > count
        assert set(seen[count:change]) == {seen[count]}


@pytest.mark.parametrize(
    ("schedule", "count", "change"),
    [
        (Constant(1), 5, None),
        (Exponential(1, 2, every=30), 29, 30),  # and no sooner than it has to: a plan would fall apart in single steps
        (Exponential(1, 2, every=30), 30, 60),
        (Milestones([1, 2], [30]), 0, 30),
        (Milestones([1, 2], [30]), 30, None),
        (Warmup(1, then=Constant(2), over=30, every=7), 28, 30),
        (Warmup(1, then=Constant(2), over=30, every=7), 30, None),
        (Warmup(1, then=Exponential(2, 2, every=50), over=30), 31, 80),
    ],
)
def test_next_change_is_tight(schedule: Schedule, count: int, change: int | None) -> None:
    assert schedule.next_change(at("epoch", count)) == change


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Constant(None), r"`Constant\(start=None\)` is not a number: write an int or a float"),  # type: ignore[arg-type]
    (lambda: Exponential("0.1", factor=2), r"`Exponential\(start='0\.1'\)` is not a number"),  # type: ignore[arg-type]
    (lambda: Exponential(8, factor=None), r"`Exponential\(factor=None\)`"),  # type: ignore[arg-type]
    (lambda: Exponential(8, factor=2, maximum="4096"), r"`Exponential\(maximum='4096'\)`"),  # type: ignore[arg-type]
    (lambda: Cosine(True), r"`Cosine\(start=True\)`"),
    (lambda: Milestones([1, None], [30]), r"`Milestones\(values=None\)`"),  # type: ignore[list-item]
    (lambda: SqrtScaling(None, 8), r"SqrtScaling\(base_lr=None\): write a finite number above 0"),  # type: ignore[arg-type]
    (lambda: LinearScaling("0.1", 8), r"LinearScaling\(base_lr='0\.1'\)"),  # type: ignore[arg-type]
])  # fmt: skip
def test_what_is_no_number_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    assert Exponential(np.float32(8), factor=np.float64(2))(at("epoch", 1)) == 16
