"""The choice between the forms of a step, with times that are made up."""

from __future__ import annotations

import pytest

from lightning_bsl.population.forms import Form, FormChoice


class Times:
    """Of a loop, and of a stack that takes a time of its own and one for each replica."""

    def __init__(self, start: float, each: float, loop: float = 1e-3) -> None:
        self.start, self.each, self.loop = start, each, loop
        self.calls: list[tuple[Form, int]] = []

    def __call__(self, form: Form, replicas: int) -> float:
        first = 0.05 if form not in dict(self.calls) else 0.0  # sets up something
        self.calls.append((form, replicas))
        return first + (self.loop * replicas if form == "loop" else self.start + self.each * replicas)


@pytest.mark.parametrize("start, form, ratio", [(0.03, "loop", 1.25), (0.00, "stacked", 2.0)])
def test_the_faster_form_is_kept_and_told(start: float, form: Form, ratio: float) -> None:
    told: list[tuple[int, Form, float]] = []
    choice, times = FormChoice(lambda *each: told.append(each)), Times(start, 0.0005)
    assert [choice.of(40, times) for _ in range(3)] == [form] * 3
    assert told == [(40, form, pytest.approx(ratio))]
    assert times.calls == [("loop", 1)] * 2 + [("loop", 40), ("stacked", 40)] * 3  # once


def test_long_steps_are_measured_in_part_and_once() -> None:
    times = Times(0.0, 2.0, loop=1.0)
    assert FormChoice().of(100, times) == "loop"
    assert times.calls == [("loop", 1), ("loop", 1), ("stacked", 2)]
    times = Times(0.0, 2.0, loop=0.01)
    FormChoice().of(100, times)
    assert {number for _, number in times.calls} <= {1, 9, 10}


def test_a_choice_holds_for_similar_numbers() -> None:
    choice, times = FormChoice(), Times(0.02, 0.0)  # equal for 20 replicas
    choice.of(40, times)
    assert [choice.known(number) for number in (400, 40, 21, 20)] == ["stacked"] * 3 + [None]  # a smaller stack gains less
    choice.of(20, times)
    assert [choice.known(number) for number in (40, 39, 20, 3)] == ["stacked"] + ["loop"] * 3


def test_a_loop_may_lose_against_a_larger_stack() -> None:
    choice, times = FormChoice(), Times(0.02, 0.0)
    assert choice.of(11, times) == "loop"
    assert choice.known(21) == "loop" and choice.known(22) is None
    assert choice.of(22, times) == "stacked"
    assert choice.known(11) == "loop"


def test_a_single_replica_is_no_stack() -> None:
    assert FormChoice().known(1) == "loop"
