"""The parts of the scheduler, each without a Trainer."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_bsl.callbacks.adaptive import StageController
from lightning_bsl.callbacks.clock import RunClock, StepSetting
from lightning_bsl.callbacks.micro_batches import StepSplitter, halved_to_fit
from lightning_bsl.callbacks.rates import OwnRates, ScaledRates
from lightning_bsl.data.sampler import Cut
from lightning_bsl.schedules import BatchLR, Exponential, Horizon, JointSchedule, Milestones, Progress, SqrtScaling

# --- clock


def test_the_clock_of_a_run() -> None:
    clock = RunClock()
    clock.begin(Horizon(epoch=2), Horizon(2, 5, 20))
    clock.advance(6, 1)
    assert (clock.progress[:3], clock.behind, clock.finished) == ((0, 1, 6), 6, False)
    clock.next_epoch()
    assert (clock.epoch_start[:3], clock.loader_start[:3], clock.behind) == ((1, 1, 6), (1, 1, 6), 0)
    clock.advance(14, 4)
    clock.next_epoch()
    assert clock.finished
    assert clock.loader_start[:3] == (1, 1, 6)  # there is no epoch that the loader could serve
    clock.begin(Horizon(epoch=3), Horizon(3))
    assert clock.loader_start == clock.epoch_start == clock.progress
    clock.reset()
    assert clock.progress[:3] == (0, 0, 0)


@pytest.mark.parametrize(("ended", "epoch"), [(False, 1), (True, 2)])
def test_the_clock_is_restored(ended: bool, epoch: int) -> None:
    clock, other = RunClock(), RunClock()
    for each in (clock, other):
        each.begin(Horizon(epoch=9), Horizon(9))
    clock.next_epoch()
    clock.advance(3, 1)
    other.load_state_dict(clock.state_dict(), epoch_ended=ended)
    assert (other.progress.epoch, other.progress.samples, other.behind) == (epoch, 3, 0 if ended else 3)
    again = RunClock()
    again.begin(Horizon(epoch=9), Horizon(9))
    again.load_state_dict(other.state_dict(), epoch_ended=ended)  # nothing is left to end
    assert again.progress == other.progress


def test_a_setting_is_looked_up_where_it_may_change() -> None:
    schedule = JointSchedule(Milestones([4, 8], at=[3], unit="step"), Exponential(0.1, 0.5, every=2, unit="step"))
    setting, asked, found = StepSetting(), 0, []
    for step in range(6):
        if step >= setting.settled_until:
            asked += 1
            progress = Progress(step=step, samples=10 * step)
            setting.look_up(schedule, progress, progress)
        found.append(setting.value)
    assert found == [schedule(Progress(step=step)) for step in range(6)]
    assert asked == 4


def test_a_size_that_is_asked_at_the_start_of_an_epoch() -> None:
    schedule = JointSchedule(Milestones([4, 8], at=[3], unit="step"))
    setting = StepSetting()
    setting.look_up(schedule, Progress(step=5), Progress(step=2))
    assert setting.value.batch_size == 4


# --- micro-batches


def gradient_of(
    splitter: StepSplitter, examples: list[float], with_loss: Any, given: Any = lambda part: True
) -> tuple[float, int]:
    """The gradient of a step by the splitter's weights, and Lightning's windows: its steps; an example is its gradient."""
    splitter.begin(len(examples), len(examples))
    total, parts = 0.0, 0
    while splitter.under_way:
        piece = splitter.pieces[splitter.part]
        splitter.begin_piece()
        if with_loss(splitter.part) and splitter.micro_batch:
            splitter.note_backward()
            part = examples[piece]
            total += splitter.weight * sum(part) / len(part)
        parts += 1
        factor = splitter.correction
        splitter.end_piece()
    return total * factor, parts


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=30), st.integers(1, 9), st.sets(st.integers(0, 29)))
def test_the_gradient_is_the_mean_over_what_was_trained(values: list[int], limit: int, without: set[int]) -> None:
    splitter = StepSplitter(limit)
    splitter.begin_fit(Cut(max_device_batch_size=limit))
    gradient, _ = gradient_of(splitter, list(map(float, values)), lambda part: part not in without)
    pieces = Cut(max_device_batch_size=limit)(len(values), len(values))
    kept = [value for part, piece in enumerate(pieces) if part not in without for value in values[piece]]
    assert gradient == pytest.approx(sum(kept) / len(kept) if kept else 0.0)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9))
def test_the_shares_of_several_processes_make_the_mean(examples: int, world_size: int, limit: int) -> None:
    values = [float(i * i) for i in range(examples)]
    found = []
    for rank in range(world_size):
        splitter = StepSplitter(limit)
        splitter.begin_fit(Cut(rank, world_size, limit))
        found.append(gradient_of(splitter, values, lambda part: True))
    assert sum(gradient for gradient, _ in found) / world_size == pytest.approx(sum(values) / examples)
    assert len({parts for _, parts in found}) == 1


@pytest.mark.parametrize(("pieces", "first"), itertools.product(range(1, 6), range(7)))
def test_lightning_steps_at_the_last_micro_batch_alone(pieces: int, first: int) -> None:
    splitter = StepSplitter(1)
    splitter.begin_fit(Cut(max_device_batch_size=1))
    splitter.begin(pieces, pieces)
    for part in range(pieces):
        splitter.begin_piece()
        accumulate = splitter.windows(first + part)
        steps, clears = (first + part + 1) % accumulate == 0, (first + part) % accumulate == 0
        assert steps == (part == pieces - 1)
        assert not clears or pieces == 1 or first + part == 0
        splitter.end_piece()


def test_windows_that_are_counted() -> None:
    splitter = StepSplitter()
    splitter.begin_fit(Cut(accumulate=3))
    splitter.begin(6, 6)
    weights = []
    for count in (2, 1):
        splitter.begin_piece(count)
        splitter.note_backward()
        weights.append(splitter.weight * splitter.correction)
        complete = splitter.end_piece(ended=count == 1)
    assert complete and weights[-1] == pytest.approx(1 / 3)


def test_a_gradient_is_corrected_once() -> None:
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    splitter = StepSplitter(1)
    splitter.begin_fit(Cut(max_device_batch_size=1))
    splitter.begin(3, 3)
    splitter.begin_piece()
    splitter.note_backward()
    optimizer = SGD([weight], lr=0.1)
    for _ in range(2):
        splitter.correct(optimizer)
    assert weight.grad.item() == 3


def test_halving() -> None:
    def attempt(size: int) -> str:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return "done"

    tried: list[int] = []
    undone: list[int] = []
    assert halved_to_fit(13, attempt, lambda: undone.append(1)) == (2, "done")
    assert (tried, len(undone)) == ([13, 7, 4, 2], 3)
    with pytest.raises(ValueError, match="else"):
        halved_to_fit(4, lambda size: (_ for _ in ()).throw(ValueError("something else")))
    with pytest.raises(torch.OutOfMemoryError):
        halved_to_fit(4, lambda size: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")))


# --- rates


def optimizers() -> list[Optimizer]:
    weights = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    first = SGD([{"params": weights[0], "lr": 0.2}, {"params": weights[1], "lr": 0.1}])
    return [first, SGD([weights[2]], lr=0.4)]


def rates(found: list[Optimizer]) -> list[float]:
    return [float(group["lr"]) for optimizer in found for group in optimizer.param_groups]


def test_own_rates() -> None:
    found = optimizers()
    own = OwnRates(found)
    own.apply(BatchLR(4, 1.0))
    assert (rates(found), own.rate) == ([1.0, 0.5, 2.0], 1.0)
    found[0].add_param_group({"params": nn.Parameter(torch.ones(1)), "lr": 0.1})
    own.apply(BatchLR(4, 0.5))
    assert rates(found) == pytest.approx([0.5, 0.25, 0.05, 1.0])
    own.apply(BatchLR(4, None))
    assert own.rate == 0.5
    found[0].param_groups[0]["lr"] = 0.0
    with pytest.raises(MisconfigurationException, match=r"lr=0\.0"):
        OwnRates(found)


def test_scaled_rates() -> None:
    found, undo = optimizers(), ExitStack()
    scaled = ScaledRates(found, SqrtScaling(1, base_batch_size=4), undo)
    scaled.apply(BatchLR(16, None))
    scaled.note()
    assert scaled.rate == pytest.approx(0.4)
    during: list[list[float]] = []
    found[0].register_step_pre_hook(lambda *_: during.append(rates(found)))
    found[0].step()
    assert during == [[0.4, 0.2, 0.4]]
    assert rates(found) == [0.2, 0.1, 0.4]
    found[0].register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found[0].step()
    undo.close()
    assert rates(found) == [0.2, 0.1, 0.4]
    during.clear()
    with pytest.raises(ZeroDivisionError):
        found[0].step()
    assert during == [[0.2, 0.1, 0.4]]


# --- measured stages


def test_stages_that_are_decided_on() -> None:
    controller = StageController(8, 1.0, delta=2, gamma=1.5, maximum=20)
    for start in (40, 90, 200):
        controller.extend(controller.proposal(advances=True), start)
    assert [segment.batch_size for segment in controller.segments] == [8, 16, 20, 20]
    assert [segment.lr for segment in controller.segments] == [1.0, 1.5, 2.25, 2.25]
    schedule = controller.schedule()
    assert schedule.largest == 20
    found = [schedule(Progress(samples=samples)) for samples in (0, 39, 40, 89, 90, 500)]
    assert [each.batch_size for each in found] == [8, 8, 16, 16, 20, 20]
    other = StageController(8, 1.0, delta=2, gamma=1.5, maximum=20)
    other.load_state_dict(controller.state_dict())
    assert (other.segments, other.stage) == (controller.segments, 2)
    controller.begin(measures=False)
    assert (controller.segments, controller.stage) == ([(0, 8, 1.0)], 0)
