"""The words of Megatron-LM's ``--step-batch-size-schedule``."""

import pytest

from lightning_bsl.schedules import (
    Cosine,
    Exponential,
    Horizon,
    JointSchedule,
    Milestones,
    Progress,
    from_megatron,
    plan,
    to_megatron,
)


@pytest.mark.parametrize(
    ("schedule", "values", "at"),
    [
        ("0:768 250B:1536 500B:3072 750B:6144", (768, 1536, 3072, 6144), (250 * 10**9, 500 * 10**9, 750 * 10**9)),
        ("0:768, 61035156250:1536", (768, 1536), (61_035_156_250,)),
        ("  0:8 1.5k:16,2M:1K  ", (8, 16, 1000), (1500, 2_000_000)),
        ("500:3 0:1 20:2", (1, 2, 3), (20, 500)),  # sorted, as Megatron-LM does
        ("0:768", (768,), ()),
        ("0:1 1.234567T:2", (1, 2), (1_234_567_000_000,)),
    ],
)
def test_reading(schedule: str, values: tuple[int, ...], at: tuple[int, ...]) -> None:
    assert from_megatron(schedule) == Milestones(values, at=at, unit="tokens")


def test_thresholds_in_tokens_are_those_in_samples_times_the_length_of_a_sequence() -> None:
    horizon = Horizon(tokens_per_sample=4096)
    in_tokens, in_samples = from_megatron("0:8 4096000:16"), from_megatron("0:8 1K:16", unit="samples")
    for samples in (0, 999, 1000, 1001):
        assert (
            in_tokens(Progress(samples=samples, horizon=horizon))
            == in_samples(Progress(samples=samples))
            == 8 + 8 * (samples >= 1000)
        )


@pytest.mark.parametrize(
    "schedule",
    ["", "250B:768", "0:768 250B", "0:768 250X:1536", "0:768 :1536", "0:0", "0:7.5", "0:8 1.5:16", "0:-8", "0:8 -5:16", "0:nan",
     "0:8 inf:16", "0:8:16", "0:8 250B:1536 250B:3072", "0:8 250 B:1536"],
)  # fmt: skip
def test_what_is_no_schedule(schedule: str) -> None:
    with pytest.raises(ValueError, match=r"must begin with threshold 0|is no THRESHOLD:BATCH_SIZE|has a threshold twice"):
        from_megatron(schedule)


def test_a_plan_written_and_read_is_the_same_plan() -> None:
    growing = JointSchedule(Exponential(8, factor=2, every=1), Cosine(0.1, unit="step"))
    before = plan(growing, 1000, epochs=5, tokens_per_sample=512)
    for unit in ("samples", "tokens"):
        batch_size = from_megatron(to_megatron(before, unit), unit)
        after = plan(JointSchedule(batch_size, Cosine(0.1, unit="step")), 1000, epochs=5, tokens_per_sample=512)
        assert [(stage.batch_size, stage.steps, stage.samples) for stage in after.stages] == [
            (stage.batch_size, stage.steps, stage.samples) for stage in before.stages
        ]
    assert to_megatron(before) == "0:8 1K:16 2K:32 3K:64 4K:128"
    assert to_megatron(before, "tokens") == "0:8 512K:16 1024K:32 1536K:64 2048K:128"


def test_a_threshold_is_where_the_plan_changes() -> None:
    """A step is not cut at a milestone: the batch size changes with the next step."""
    assert to_megatron(plan(JointSchedule(Milestones([8, 16], at=[21], unit="samples")), 100, epochs=1)) == "0:8 24:16"


def test_stages_that_differ_in_the_rate_only_are_one() -> None:
    assert to_megatron(plan(JointSchedule(8, Exponential(0.1, factor=0.5)), 100, epochs=4)) == "0:8"


def test_other_words() -> None:
    doubled = plan(JointSchedule(Milestones([8, 16], at=[1])), 64, epochs=2)
    for unit in ("epoch", "steps"):
        with pytest.raises(ValueError, match=f"unknown unit '{unit}'; the thresholds of Megatron-LM count"):
            to_megatron(doubled, unit)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"unknown unit '{unit}'"):
            from_megatron("0:8", unit)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`schedule=8` is no schedule of Megatron-LM: write a string"):
        from_megatron(8)  # type: ignore[arg-type]


def test_tokens_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="tokens_per_sample"):
        to_megatron(plan(JointSchedule(8), 100, epochs=1), "tokens")
