from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from harness.files import flat
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.schedules import Cosine, Exponential, Horizon, Milestones, Polynomial, Progress, Warmup

SCHEDULES = [
    Exponential(2, 2, every=3, unit="step", maximum=14),
    Exponential(3, 1.7, every=11, unit="samples", maximum=14),
    Exponential(12, 0.5, every=2, unit="step", minimum=1),
    Polynomial(1, slope=2, every=7, unit="samples", maximum=14),
    Cosine(13, end=1, total=60, unit="samples"),
    Milestones([1, 14, 2], at=[5, 8], unit="step"),
    Milestones([3, 7], at=[1]),
    Warmup(2, then=lambda progress: 3 + progress.step % 5, over=1),
    lambda progress: 1 + (7 * progress.step + progress.samples) % 13,
    5,
]


@settings(deadline=None)
@given(
    st.sampled_from(SCHEDULES), st.integers(14, 60), st.integers(0, 3), st.integers(0, 30), st.integers(0, 90), st.booleans()
)
def test_each_example_once_in_steps_of_the_scheduled_size(
    schedule: Callable[[Progress], float] | int, n: int, epoch: int, step: int, samples: int, shuffle: bool
) -> None:
    start = Progress(epoch, step, samples, Horizon(10, 1000, 1000))
    sampler = GlobalBatchSampler(n, schedule, lambda: start, shuffle=shuffle)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    assert [index for batch in batches for index in batch] == sampler.permutation(epoch)
    assert sorted(sampler.permutation(epoch)) == list(range(n))
    for count, batch in enumerate(batches):
        clock = Progress(epoch, step + count, samples + sum(map(len, batches[:count])), start.horizon)
        wanted = sampler.schedule(clock).batch_size
        assert len(batch) == wanted or (batch is batches[-1] and len(batch) < wanted)


def test_the_permutation_depends_on_seed_and_epoch_alone() -> None:
    orders = {(s, e): GlobalBatchSampler(50, 4, seed=s).permutation(e) for s in range(4) for e in range(4)}
    assert len(set(map(tuple, orders.values()))) == len(orders)  # seed 0 in epoch 1 is not seed 1 in epoch 0
    torch.manual_seed(9)
    before = torch.get_rng_state()
    for (seed, epoch), order in orders.items():
        other = GlobalBatchSampler(
            50, Exponential(1, 2, unit="step"), lambda: Progress(7, 8, 9), seed=seed, rank=1, world_size=2
        )
        assert other.permutation(epoch) == order
    assert torch.equal(torch.get_rng_state(), before)


def test_without_shuffling_the_order_is_the_data_sets() -> None:
    assert list(GlobalBatchSampler(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_samples_per_epoch() -> None:
    clock = [Progress()]
    sampler = GlobalBatchSampler(100, 8, lambda: clock[0], samples_per_epoch=30)
    seen = []
    for epoch in range(20):
        clock[0] = Progress(epoch)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [8, 8, 8, 6]
        seen.append({index for batch in batches for index in batch})
        assert len(sampler) == 4 and len(seen[-1]) == 30
    assert len(set(map(frozenset, seen))) == 20
    assert set.union(*seen) == set(range(100))  # drawn from the whole set, not from its first 30


@pytest.mark.parametrize("samples", [0, -1, 101])
def test_samples_per_epoch_out_of_range(samples: int) -> None:
    with pytest.raises(ValueError, match=rf"`samples_per_epoch={samples}` must lie between 1 and the 100"):
        GlobalBatchSampler(100, 8, samples_per_epoch=samples)


@settings(deadline=None)
@given(st.sampled_from(SCHEDULES), st.integers(14, 60), st.integers(1, 3), st.integers(0, 5))
def test_the_shares_of_all_processes_are_the_global_batches(
    schedule: Callable[[Progress], float] | int, n: int, world_size: int, epoch: int
) -> None:
    start = Progress(epoch, horizon=Horizon(10, 1000, 1000))
    whole = list(GlobalBatchSampler(n, schedule, lambda: start))
    assume(all(len(batch) >= world_size for batch in whole))
    ranks = [GlobalBatchSampler(n, schedule, lambda: start, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(sampler) for sampler in ranks} == {len(whole)}
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert [index for share in shares for index in share] == batch
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_step_smaller_than_the_number_of_processes() -> None:
    # 9 examples in steps of 4 leave a last step of one: two processes have no share of it, and must step all the same
    ranks = [list(GlobalBatchSampler(9, 4, shuffle=False, rank=rank, world_size=3)) for rank in range(3)]
    assert [steps[2] for steps in ranks] == [[8], [8], [8]]  # two of them only repeat it; the callback weighs them with 0
    assert [flat(steps[i] for steps in ranks) for i in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


class Indices(Dataset[int]):
    def __len__(self) -> int:
        return 41

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_workers_get_the_same_batches(schedule: Callable[[Progress], float]) -> None:
    clock = [Progress()]
    epochs = {}
    for workers in (0, 2):
        sampler = GlobalBatchSampler(41, schedule, lambda: clock[0])
        loader = DataLoader(Indices(), batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
        epochs[workers] = []
        for start in (Progress(), Progress(1, 5, 41), Progress(2, 9, 82)):
            clock[0] = start
            batches = iter(loader)
            clock[0] = Progress(99, 99, 99)  # what happens to the clock during the epoch does not matter
            epochs[workers].append([batch.tolist() for batch in batches])
        clock[0] = Progress()
        assert epochs[workers][0] == list(sampler)
    assert epochs[0] == epochs[2]


def test_iter_reads_the_clock_at_once() -> None:
    clock = [Progress(epoch=3)]
    sampler = GlobalBatchSampler(20, lambda progress: 2 + progress.epoch, lambda: clock[0])
    batches = iter(sampler)
    clock[0] = Progress(epoch=4)
    found = list(batches)
    assert [len(batch) for batch in found] == [5, 5, 5, 5]
    assert flat(found) == sampler.permutation(3)


def test_errors_of_the_schedule() -> None:
    for schedule, message in (
        (lambda progress: 20 * progress.step + 1, r"batch size is 21 at epoch=0, step=1.*only 20 examples.*`maximum` of 20"),
        (lambda progress: 3 - progress.step, r"batch size is 0 at epoch=0, step=3"),
    ):
        sampler = GlobalBatchSampler(20, schedule)
        for ask in (list, len):
            with pytest.raises(ValueError, match=message):
                ask(sampler)
