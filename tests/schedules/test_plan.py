import csv
import math
import subprocess
import sys
import warnings
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from lightning_bsl.schedules import (
    Constant,
    Cosine,
    Diminishing,
    Exponential,
    Horizon,
    JointSchedule,
    LinearScaling,
    Milestones,
    Polynomial,
    PolynomialDecay,
    Progress,
    Schedule,
    SqrtScaling,
    Warmup,
    plan,
)

N = 50_000


@pytest.mark.parametrize(
    ("start", "every", "epochs", "steps", "samples"),
    [
        (128, 25, 26, 9_971, 1_301_376),
        (8, 20, 41, 189_063, 2_050_016),
        (8, 20, 50, 203_130, 2_500_160),
        (128, 50, 58, 21_118, 2_903_808),
        (128, 50, 101, 29_448, 5_061_376),
        (128, 10**6, 50, 19_550, 2_502_400),  # the fixed batch of the same table
    ],
)
def test_numbers_of_the_papers(start: int, every: int, epochs: int, steps: int, samples: int) -> None:
    whole = plan(JointSchedule(Exponential(start, factor=2, every=every)), N, epochs=epochs)
    assert whole.steps == steps
    # the authors count an epoch's last, short batch at full size; the plan counts the examples it holds
    assert sum(stage.steps * stage.batch_size for stage in whole.stages) == samples
    assert whole.samples == epochs * N


def test_scheduler_iii() -> None:
    whole = plan(JointSchedule(Exponential(8, 2, every=30), Exponential(0.1, 1.292, every=30)), N, epochs=300)
    assert [stage.batch_size for stage in whole.stages] == [8 * 2**m for m in range(10)]
    assert [stage.lr for stage in whole.stages] == pytest.approx([0.1 * 1.292**m for m in range(10)])
    assert whole.stages[-1].lr == pytest.approx(1.0, rel=0.01)
    assert [stage.steps for stage in whole.stages] == [30 * math.ceil(N / (8 * 2**m)) for m in range(10)]
    assert [stage.first_epoch for stage in whole.stages] == [30 * m for m in range(10)]
    assert [stage.epochs for stage in whole.stages] == [30] * 10
    # reference.md section 1: the exact B_T of this schedule after 5 and 10 stages
    for stages, bias in ((5, 2.1269e-5), (10, 1.9099e-5)):
        assert 1 / sum(s.lr * s.steps for s in whole.stages[:stages]) == pytest.approx(bias, rel=1e-3)


def test_a_rate_that_changes_at_every_step_is_one_stage() -> None:
    whole = plan(JointSchedule(Exponential(10, 2, every=2), Diminishing(1.0)), 100, epochs=4)
    assert [(s.batch_size, s.steps, s.lr, s.last_lr) for s in whole.stages] == [
        (10, 20, 1.0, pytest.approx(1 / math.sqrt(20))),
        (20, 10, pytest.approx(1 / math.sqrt(21)), pytest.approx(1 / math.sqrt(30))),
    ]


def test_growth_inside_an_epoch() -> None:
    whole = plan(JointSchedule(Milestones([3, 5], at=[2], unit="step"), 0.1), 20, epochs=1)
    assert [(s.batch_size, s.steps, s.samples, s.first_epoch, s.epochs) for s in whole.stages] == [
        (3, 2, 6, 0, 0.3),
        (5, 3, 14, 0.3, 0.7),
    ]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"epochs": 3}, Horizon(3, 9, 30)),
        ({"steps": 4}, Horizon(2, 4, 14)),  # 4 4 2 | 4
        ({"samples": 13}, Horizon(2, 4, 13)),  # ends with the step that reaches it
        ({"epochs": 3, "steps": 4}, Horizon(3, 4, 14)),
        ({"epochs": 1, "steps": 40}, Horizon(1, 40, 10)),
    ],
)
def test_horizons(bounds: dict[str, int], expected: Horizon) -> None:
    whole = plan(JointSchedule(4), 10, **bounds)
    assert whole.horizon == expected


def test_the_horizon_does_not_suffer_from_rounding() -> None:
    # six stages of a sixth of an epoch each are one epoch, also when 1/6 is written with six digits
    whole = plan(JointSchedule(1, Milestones([1, 2, 3, 4, 5, 6], at=[1, 2, 3, 4, 5], unit="step")), 6, steps=6)
    assert whole.horizon == Horizon(1, 6, 6) and whole.epochs == 1
    batches = Milestones([8, 7, 8, 7, 8, 7], at=[7, 14, 21, 28, 35], unit="step")
    whole = plan(JointSchedule(batches), 7 * 3 * 15, steps=42)
    assert whole.horizon == Horizon(1, 42, 315) and whole.epochs == 1


@pytest.mark.parametrize("limit", [1, True])
def test_one_batch_an_epoch_is_not_the_whole_epoch(limit: int) -> None:
    # 1 == 1.0, but to Lightning one is a number of batches and the other all of them
    whole = plan(JointSchedule(4, Cosine(1.0, unit="samples")), 10, epochs=3, limit_batches=limit)
    assert (whole.steps, whole.samples, whole.horizon.samples) == (3, 12, 12)


def test_nothing_is_asked_beyond_the_end() -> None:
    decay = Cosine(0.1, unit="step")  # 0 where the run ends
    growth = Exponential(5, factor=2)  # 40 > 20 in epoch 3
    assert plan(JointSchedule(growth, decay), 20, epochs=3).steps == 4 + 2 + 1
    assert plan(JointSchedule(growth, decay), 20, steps=7).epochs == 3
    assert plan(JointSchedule(growth, decay), 20, samples=60).epochs == 3


# --- brute force ---------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    epoch: int
    share: float  # of the epoch
    examples: int
    batch_size: int
    lr: float | None


def walk(schedule: JointSchedule, n: int, end: Horizon, horizon: Horizon, limit: float) -> list[Step]:
    """The definition: one step after another, asking the schedule before each."""
    steps: list[Step] = []
    clock = Progress(horizon=horizon)

    def ended() -> bool:
        return any(
            bound is not None and count >= bound
            for bound, count in ((end.epoch, clock.epoch), (end.step, clock.step), (end.samples, clock.samples))
        )

    while not ended():
        epoch, left = [], n
        while left:
            batch_size, lr = schedule(clock)
            assume(batch_size <= n)
            examples = min(left, batch_size)
            epoch.append((clock, Step(clock.epoch, 0.0, examples, batch_size, lr)))
            clock, left = clock.advance(examples), left - examples
        kept = epoch[: int(len(epoch) * limit) if isinstance(limit, float) else limit]
        assume(kept)
        for before, step in kept:
            clock = before
            if ended():
                return steps
            examples = min(step.examples, (end.samples or 10**9) - clock.samples)  # a horizon in examples cuts the last step
            steps.append(step._replace(examples=examples, share=examples / sum(s.examples for _, s in kept)))
            clock = before.advance(examples)
        clock = clock.next_epoch()
    return steps


def build(*kinds: Any) -> st.SearchStrategy[Any]:
    return st.one_of(*kinds)


units = st.sampled_from(["epoch", "step", "samples", "tokens"])
TOKENS = 3  # of an example
every = st.integers(1, 12) | st.integers(13, 90)
small = st.floats(1, 12)
counts = st.lists(st.integers(1, 60), min_size=1, max_size=4, unique=True).map(sorted)


def milestones(value: st.SearchStrategy[float]) -> st.SearchStrategy[Schedule]:
    return st.tuples(counts, st.lists(value, min_size=5, max_size=5), units).map(
        lambda drawn: Milestones(drawn[1][: len(drawn[0]) + 1], drawn[0], unit=drawn[2])
    )


def warmups(then: st.SearchStrategy[Schedule], start: st.SearchStrategy[float]) -> st.SearchStrategy[Schedule]:
    return st.tuples(then, start, st.integers(1, 9), every).map(
        lambda drawn: Warmup(drawn[1], then=drawn[0], over=drawn[2], every=drawn[3], unit=drawn[0].unit)
    )


batch_families = build(
    st.builds(Constant, st.integers(1, 12)),
    st.builds(Exponential, small, st.floats(1.0, 2.0), every=every, unit=units, maximum=st.just(14)),
    st.builds(Exponential, small, st.floats(0.5, 1.0), every=every, unit=units, minimum=st.just(1)),
    st.builds(Polynomial, small, st.floats(0, 3), st.floats(0.5, 1.2), every=every, unit=units, maximum=st.just(14)),
    st.builds(Cosine, small, end=small, total=st.integers(1, 90), every=every, unit=units),
    milestones(small),
)
batch_sizes = build(
    st.integers(1, 12),
    batch_families,
    warmups(batch_families, small),
    # plain functions, which may change at any step and read any clock
    st.integers(1, 5).map(lambda k: lambda progress: 1 + (progress.step // k + progress.epoch) % 4),
    st.integers(1, 5).map(lambda k: lambda progress: 1 + (progress.samples // k) % 9),
    st.integers(1, 5).map(lambda k: Warmup(2, then=lambda p: 2 + (p.step // k) % 3, over=1, unit="epoch")),
)
rate = st.floats(0.1, 1)
rate_families = build(
    st.builds(Exponential, rate, st.floats(0.8, 1.3), every=every, unit=units),
    st.builds(Diminishing, rate, every=every, unit=units),
    st.builds(Cosine, rate, end=st.just(0.01), every=every, unit=units),  # over the run
    st.builds(PolynomialDecay, rate, end=st.just(0.01), unit=units, every=st.floats(0.05, 0.9)),
)
rates = build(
    st.none(),
    rate,
    rate_families,
    milestones(rate),
    warmups(st.builds(Constant, rate, unit=units), rate),
    st.builds(LinearScaling, rate, st.just(8)),
    st.builds(SqrtScaling, rate, st.just(8)),
    st.just(lambda progress: 1 / (1 + progress.step % 3)),
)
bounds = build(
    st.fixed_dictionaries({"epochs": st.integers(1, 6)}),
    st.fixed_dictionaries({"steps": st.integers(1, 40)}),
    st.fixed_dictionaries({"samples": st.integers(1, 150)}),
    st.fixed_dictionaries({"epochs": st.integers(1, 6), "steps": st.integers(1, 40)}),
)
limits = build(st.just(1.0), st.just(1.0), st.integers(1, 8), st.sampled_from([0.3, 0.5, 0.9]))


@pytest.mark.filterwarnings("ignore:the batch grows|from epoch:UserWarning")
@settings(max_examples=400, deadline=None)
@given(batch_sizes, rates, st.integers(14, 45), bounds, limits)
def test_a_plan_is_what_a_walk_step_by_step_finds(
    batch_size: Any, lr: Any, n: int, bound: dict[str, int], limit: float
) -> None:
    def assume_longer(run: Horizon, warmup: Any) -> None:
        if isinstance(warmup, Warmup) and (length := run.length(warmup.unit)) is not None:
            assume(warmup.over <= length - (TOKENS if warmup.unit == "tokens" else 1))

    end = Horizon(bound.get("epochs"), bound.get("steps"), bound.get("samples"), TOKENS)
    assume_longer(end, batch_size)  # its length is checked against whatever is known
    lengths = walk(JointSchedule(batch_size), n, end, end, limit)
    ran = Horizon(lengths[-1].epoch + 1, len(lengths), sum(step.examples for step in lengths))
    horizon = Horizon(end.epoch or ran.epoch, end.step or ran.step, end.samples or ran.samples, TOKENS)
    assume_longer(horizon, lr)
    assume_longer(horizon, batch_size)
    steps = walk(JointSchedule(batch_size, lr), n, end, horizon, limit)

    whole = plan(JointSchedule(batch_size, lr), n, **bound, tokens_per_sample=TOKENS, limit_batches=limit)

    assert whole.horizon == horizon
    assert (whole.steps, whole.samples) == (len(steps), sum(step.examples for step in steps))
    assert whole.epochs == pytest.approx(sum(step.share for step in steps), abs=1e-4)
    # the same batches, in the same order
    found = [
        (size, sum(s.steps for s in stages), sum(s.samples for s in stages))
        for size, group in groupby(whole.stages, key=lambda stage: stage.batch_size)
        for stages in [list(group)]
    ]
    assert found == [
        (size, len(taken), sum(step.examples for step in taken))
        for size, group in groupby(steps, key=lambda step: step.batch_size)
        for taken in [list(group)]
    ]
    # every stage says where it begins, and at which rates it begins and ends
    position = 0
    for index, stage in enumerate(whole.stages):
        taken = steps[position : position + stage.steps]
        shares = sum(step.share for step in steps[:position] if step.epoch == taken[0].epoch)
        assert stage.stage == index
        assert stage.first_epoch == pytest.approx(taken[0].epoch + shares, abs=1e-5)
        assert stage.epochs == pytest.approx(sum(step.share for step in taken), abs=1e-5)
        assert (stage.lr, stage.last_lr) == (taken[0].lr, taken[-1].lr)
        if stage.lr == stage.last_lr and not callable(lr) | isinstance(lr, Milestones):
            assert {step.lr for step in taken} == {stage.lr}
        position += stage.steps


@settings(max_examples=100, deadline=None)
@given(batch_families, rate_families, st.integers(14, 45), st.integers(1, 150), st.integers(1, 6), st.integers(1, 40))
def test_of_two_bounds_the_first_counts(
    batch_size: Schedule, lr: Schedule, n: int, samples: int, epochs: int, steps: int
) -> None:
    make = partial(plan, JointSchedule(batch_size, lr), n, tokens_per_sample=TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            alone = make(samples=samples)
        except ValueError:  # a warm-up longer than the run
            reject()
        both = make(samples=samples, epochs=epochs)
        first = alone if samples <= epochs * n else make(epochs=epochs)
        assert (both.stages, both.horizon, both.samples) == (first.stages, first.horizon, min(samples, epochs * n))
        both, by_steps = make(samples=samples, steps=steps), make(steps=steps)
        first = alone if alone.steps <= steps and alone.samples <= by_steps.samples else by_steps
        assert (both.stages, both.horizon) == (first.stages, first.horizon)


# --- output, warnings, errors ----------------------------------------------------------------------------------------------


def test_to_csv(tmp_path: Path) -> None:
    whole = plan(JointSchedule(Exponential(8, 2, every=2), Exponential(0.1, 1.4, every=2)), 100, epochs=5)
    whole.to_csv(tmp_path / "plan.csv")
    with open(tmp_path / "plan.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:7] == ["stage", "first_epoch", "epochs", "steps", "samples", "batch_size", "lr"]
    assert [[float(cell) for cell in row[:7]] for row in rows[1:]] == [
        [s.stage, s.first_epoch, s.epochs, s.steps, s.samples, s.batch_size, s.lr] for s in whole.stages
    ]


def test_growing_too_fast_warns_once_a_plan() -> None:
    with pytest.warns(UserWarning, match="gamma = 1.9") as caught:
        plan(JointSchedule(Exponential(8, 2), Exponential(0.1, 1.9)), 100, epochs=3)
    assert len(caught) == 1


def test_a_rate_that_outgrows_the_largest_batch_warns() -> None:
    batch_size = Exponential(8, 2, maximum=32)
    with pytest.warns(UserWarning, match=r"from epoch 3 on the batch size is at its maximum 32.*`maximum=0.196`"):
        plan(JointSchedule(batch_size, Exponential(0.1, 1.4)), 100, epochs=5)


@pytest.mark.filterwarnings("error")
def test_no_warning_without_cause() -> None:
    batch_size = Exponential(8, 2, maximum=32)
    plan(JointSchedule(batch_size, Exponential(0.1, 1.4)), 100, epochs=3)
    plan(JointSchedule(batch_size, Exponential(0.1, 1.4, maximum=0.196)), 100, epochs=9)
    plan(JointSchedule(batch_size, 0.1), 100, epochs=9)


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (JointSchedule(8), {}, "a plan needs a horizon: write `epochs`, `steps` or `samples`"),
        (JointSchedule(8), {"epochs": 0}, "`epochs=0` must be 1 or more"),
        (JointSchedule(8), {"epochs": 0.5}, "`epochs=0.5` must be 1 or more, as a whole number"),
        (JointSchedule(8), {"samples": 20.5}, "`samples=20.5` must be 1 or more, as a whole number"),
        (JointSchedule(8), {"steps": True}, "`steps=True` must be 1 or more, as a whole number"),
        (JointSchedule(8), {"steps": -1}, "`steps=-1` must be 1 or more"),
        (JointSchedule(101), {"epochs": 1}, "batch size is 101 at epoch=0.*only 100 examples.*`maximum` of 100"),
        (JointSchedule(Exponential(30, 2)), {"epochs": 4}, "batch size is 120 at epoch=2.*`maximum` of 100"),
        (JointSchedule(lambda p: 8 - 4 * p.epoch), {"epochs": 3}, "batch size is 0 at epoch=2.*`minimum=1`"),
        (JointSchedule(8, lambda p: 0.2 - 0.1 * p.epoch), {"epochs": 3}, r"learning rate is 0.0 at epoch=2"),
        (JointSchedule(8, Warmup(0.1, Constant(1), over=5)), {"epochs": 5}, "takes 5 epochs but the run has only 5"),
        (JointSchedule(Exponential(8, 2, every=0.5)), {"steps": 50}, "length in unit 'epoch', which is not known"),
        (JointSchedule(Exponential(8, 2, every=9, unit="tokens")), {"epochs": 1}, "`tokens_per_sample`.*`unit='samples'`"),
        (JointSchedule(8), {"epochs": 1, "tokens_per_sample": 0}, "`tokens_per_sample=0` must be 1 or more"),
        (JointSchedule(10), {"epochs": 1, "limit_batches": 0.05}, "`limit_batches=0.05` leaves no step of epoch 0"),
    ],
)
def test_errors(schedule: JointSchedule, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(schedule, 100, **arguments)


def test_no_examples() -> None:
    with pytest.raises(ValueError, match="`num_examples=0` must be 1 or more"):
        plan(JointSchedule(8), 0, epochs=1)


def test_schedules_import_neither_torch_nor_lightning_nor_numpy() -> None:
    code = (
        "import sys, lightning_bsl.schedules\n"
        "print(*{'torch', 'lightning', 'pytorch_lightning', 'numpy', 'omegaconf'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_schedule_need_not_hold_beyond_the_last_step() -> None:
    # the run ends inside its epoch; ten steps later the batch size would be 0
    shrinking = JointSchedule(lambda progress: 50 - progress.step)
    assert plan(shrinking, 10_000, steps=40).samples == sum(50 - step for step in range(40))
    with pytest.raises(ValueError, match="batch size is 0"):
        plan(shrinking, 10_000, steps=60)
