"""Which examples of a step are padded together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from harness.data import own, regression
from harness.files import flat
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.data.lengths import Lengths, count_by_length, micro_batches_by_length
from lightning_bsl.data.sampler import micro_batches
from lightning_bsl.schedules import Progress

STEPS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
FLOATS = st.lists(st.floats(1, 40), min_size=1, max_size=30)
BOUNDS = st.none() | st.integers(40, 400)
CAPS = st.none() | st.integers(1, 20)


def costs(lengths: list[float], parts: list[Any]) -> list[float]:
    return [max((lengths[i] for i in part), default=0) * len(part) for part in parts]


@given(STEPS | FLOATS, st.integers(1, 5), BOUNDS, CAPS)
def test_each_example_once_within_the_bounds_and_as_many_parts_everywhere(
    lengths: list[float], processes: int, tokens: int | None, cap: int | None
) -> None:
    shares = micro_batches_by_length(lengths, processes, tokens, cap)
    parts = flat(shares)
    assert sorted(flat(part.tolist() for part in parts)) == list(range(len(lengths)))
    assert len(shares) == processes and len({len(share) for share in shares}) == 1
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert max(costs(lengths, parts)) <= (tokens or np.inf) * (1 + 1e-12)
    assert max(map(len, parts)) <= (cap or len(lengths))
    # the groups are neighbours in length
    kept = sorted((part for part in parts if len(part)), key=lambda part: max(lengths[i] for i in part))
    for shorter, longer in pairwise(kept):
        assert max(lengths[i] for i in shorter) <= max(lengths[i] for i in longer)
    again = micro_batches_by_length(np.array(lengths), processes, tokens, cap)
    assert [part.tolist() for part in flat(again)] == [part.tolist() for part in parts]


@given(STEPS, st.integers(1, 5), st.integers(40, 400))
def test_never_more_parts_than_by_number(lengths: list[float], processes: int, tokens: int) -> None:
    """By number the longest of all decides how many examples there may be."""
    by_number = micro_batches(len(lengths), 0, processes, tokens // 40)
    assert len(micro_batches_by_length(lengths, processes, tokens)[0]) <= len(by_number)


@given(STEPS, BOUNDS)
def test_as_few_as_can_be(lengths: list[int], tokens: int | None) -> None:
    """Against all groups of neighbours, the fewest found from the shortest on."""
    ordered, fewest = sorted(lengths), [0]
    for stop in range(1, len(lengths) + 1):
        fits = [k for k in range(stop) if tokens is None or ordered[stop - 1] * (stop - k) <= tokens]
        fewest.append(1 + min(fewest[k] for k in fits))
    assert len(micro_batches_by_length(lengths, 1, tokens)[0]) == fewest[-1]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), BOUNDS, CAPS, st.integers(0, 99))
def test_the_count_is_that_of_the_cut(
    examples: int, steps: int, processes: int, tokens: int | None, cap: int | None, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 41, (steps, examples)).astype(float)
    counts = count_by_length(lengths, processes, tokens, cap)
    assert counts.tolist() == [len(micro_batches_by_length(step, processes, tokens, cap)[0]) for step in lengths]


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("tokens", [None, 4096])
def test_the_processes_have_as_much_to_do(processes: int, tokens: int | None) -> None:
    lengths = np.random.default_rng(1).lognormal(4, 0.7, 256).clip(1, 512).round().tolist()
    shares = micro_batches_by_length(lengths, processes, tokens)
    work = [costs(lengths, share) for share in shares]
    for together in zip(*work, strict=True):
        assert max(together) < 1.25 * min(together)
    assert max(map(sum, work)) < 1.1 * min(map(sum, work))
    assert sum(map(sum, work)) < 0.75 * max(lengths) * len(lengths)  # less padding than in one piece
    assert tokens is not None or all(len(share) == 1 for share in shares)


def test_the_smallest_steps() -> None:
    assert [part.tolist() for part in flat(micro_batches_by_length([5], 3))] == [[0], [], []]
    assert [part.tolist() for part in flat(micro_batches_by_length([], 2))] == [[], []]
    assert [part.tolist() for part in flat(micro_batches_by_length([3, 3, 3], 1, 3))] == [[0], [1], [2]]


# --- the sampler

LENGTHS = np.random.default_rng(3).integers(1, 21, 61)
SCHEDULES: list[Callable[[Progress], float]] = [
    lambda progress: 4 + 3 * progress.step,
    lambda progress: max(2, 20 - progress.step),
    lambda progress: 50,
]


def sampler(schedule: Any, clock: Progress = Progress(), done: int = 0, **options: Any) -> GlobalBatchSampler:  # noqa: B008
    lengths = Lengths(lambda: LENGTHS, len(LENGTHS), options.pop("tokens", 40))
    return GlobalBatchSampler(len(LENGTHS), schedule, lambda: clock, lambda: done, seed=1, lengths=lengths, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"samples_per_epoch": 50}, {"max_device_batch_size": 3}])
def test_steps_keep_their_examples(schedule: Any, options: dict[str, Any]) -> None:
    whole = GlobalBatchSampler(len(LENGTHS), schedule, seed=1, **options | {"max_device_batch_size": None})
    steps = list(whole)
    for world_size in (1, 2, 3):
        ranks = [sampler(schedule, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        batches = [list(rank) for rank in ranks]
        assert {len(rank) for rank in ranks} == {len(batches[0])}
        start, seen = 0, 0
        for step in steps:
            seen += len(step)
            stop = ranks[0].batches_in(seen)
            assert [rank.batches_in(seen) for rank in ranks] == [stop] * world_size
            parts = [batch for rank in batches for batch in rank[start:stop]]
            assert set(flat(parts)) == set(step)
            repeated = sum(map(len, parts)) - len(step)  # by a process without a share
            assert repeated <= sum(len(part) == 1 for part in parts)
            assert all(LENGTHS[part].max() * len(part) <= 40 for part in parts)
            start = stop
            # resumed after this step
            assert list(sampler(schedule, done=seen, rank=0, world_size=world_size, **options)) == batches[0][stop:]
        assert start == len(batches[0])


def test_tensors_of_indices() -> None:
    plain, tensors = sampler(SCHEDULES[0]), sampler(SCHEDULES[0], as_tensors=True)
    assert [batch.tolist() for batch in tensors] == list(plain)  # type: ignore[attr-defined]


def test_lengths_alone_leave_a_step_whole() -> None:
    def read() -> Any:
        raise AssertionError("nobody needs them")

    lengths = Lengths(read, 61)
    assert list(GlobalBatchSampler(61, 7, lengths=lengths)) == list(GlobalBatchSampler(61, 7))


def test_a_process_without_a_share_repeats_the_shortest() -> None:
    lengths = Lengths(lambda: [9.0, 2.0, 5.0], 3)
    batches = [list(GlobalBatchSampler(3, 3, shuffle=False, rank=r, world_size=4, lengths=lengths)) for r in range(4)]
    assert batches == [[[0]], [[2]], [[1]], [[1]]]


# --- the DataModule


def known(**options: Any) -> Any:
    lengths = own(regression(4), **options).known_lengths()
    return None if lengths is None else lengths.values.tolist()


def test_where_lengths_come_from() -> None:
    calls: list[int] = []

    def length(example: Any) -> int:
        calls.append(int(example[-1]))
        return calls[-1] + 1

    for lengths in ([1, 2, 3, 4], np.arange(1, 5), torch.arange(1, 5), torch.arange(1.0, 5)):
        assert known(lengths=lengths) == [1, 2, 3, 4]
    datamodule = own(regression(4), lengths=length)
    assert [datamodule.known_lengths().values.tolist() for _ in range(2)] == [[1, 2, 3, 4]] * 2  # type: ignore[union-attr]
    assert calls == [0, 1, 2, 3]
    assert known() is None

    class Documents(Dataset[Any]):
        lengths = np.array([5, 6])

        def __len__(self) -> int:
            return 2

    assert own(Documents()).known_lengths().values.tolist() == [5, 6]  # type: ignore[union-attr]
    assert own(Documents(), lengths=[1, 1]).known_lengths().values.tolist() == [1, 1]  # type: ignore[union-attr]
    Documents.lengths = np.array([5, 6, 7])  # of something else
    assert own(Documents()).known_lengths() is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": [1, 2, 3]}, ValueError, "3 `lengths` for 4 training examples"),
        ({"lengths": [1, 2, 0, 4]}, ValueError, "training example 2 is 0"),
        ({"lengths": [1, 2, 3, float("nan")]}, ValueError, "training example 3 is nan"),
        ({"lengths": [[1], [2], [3], [4]]}, TypeError, "one number for each training example"),
        ({"lengths": ["a", "b", "c", "d"]}, TypeError, "one number for each training example"),
        ({"max_device_tokens": 8}, ValueError, "`max_device_tokens=8` needs the lengths"),
        ({"max_device_tokens": 0}, ValueError, "`max_device_tokens=0` must be 1 or more"),
        ({"lengths": [1, 9, 3, 4], "max_device_tokens": 8}, ValueError, "training example 1 has a length of 9"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        known(**options)
