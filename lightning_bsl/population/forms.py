"""The two forms in which a population takes a step, and the choice between them by the time that they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

Form = Literal["stacked", "loop"]
FORMS: tuple[Form, ...] = ("loop", "stacked")

_SECONDS = 0.1  # of one measurement of the loop, if two replicas take no longer
_REPEATS = 3  # the first measurement of a form also sets up something


class FormChoice:
    """Chooses the form of a population's steps: the one that takes less time.

    The stacked form gains from many replicas, and the loop does not. So one choice is kept for all passes of a batch size,
    until the number of replicas leaves what it says something about by a factor of two.

    Args:
        on_choice: Called with the number of replicas, the faster form, and how many times as long the other one takes.

    Example:
        >>> choice = FormChoice(print)
        >>> choice.of(10, lambda form, replicas: 0.001 * replicas if form == "loop" else 0.005)
        10 stacked 2.0
        'stacked'
        >>> choice.known(9), choice.known(5), choice.known(1)
        ('stacked', None, 'loop')
    """

    def __init__(self, on_choice: Callable[[int, Form, float], Any] = lambda replicas, form, ratio: None) -> None:
        self._loop_up_to, self._stacked_from = 1, math.inf  # replicas; a single one gains nothing from a stack
        self._on_choice = on_choice

    def known(self, replicas: int) -> Form | None:
        """The form for so many replicas, if former measurements tell.

        Args:
            replicas: Number of replicas.
        """
        if replicas <= self._loop_up_to:
            return "loop"
        if replicas >= self._stacked_from:
            return "stacked"
        if self._loop_up_to > 1 and replicas < 2 * self._loop_up_to:
            return "loop"
        return "stacked" if 2 * replicas > self._stacked_from else None

    def of(self, replicas: int, seconds: Callable[[Form, int], float]) -> Form:
        """The form for so many replicas, measured if it is not known.

        Args:
            replicas: Number of replicas.
            seconds: Computes a form's gradients of the first n replicas, and returns the time that this takes.
        """
        if (known := self.known(replicas)) is not None:
            return known
        one = min(seconds("loop", 1) for _ in range(2))
        number = max(2, min(replicas, int(_SECONDS / one)))
        if number * one > _SECONDS:  # so long that it shows at once, whatever it sets up
            times = {"loop": one, "stacked": seconds("stacked", number) / number}
        else:
            rounds = [{form: seconds(form, number) / number for form in FORMS} for _ in range(_REPEATS)]
            times = {form: min(times[form] for times in rounds) for form in FORMS}
        best: Form = "loop" if times["loop"] <= times["stacked"] else "stacked"
        if best == "loop":
            self._loop_up_to = replicas
        else:
            self._stacked_from = replicas
        self._on_choice(replicas, best, max(times.values()) / times[best])
        return best
