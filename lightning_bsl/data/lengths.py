"""Micro-batches by length: which examples of a step are padded together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


class Lengths:
    """The length of each example of a training set, and the bound on what a process puts through the model at once.

    Args:
        read: Returns a length for each example, 1 or more: a sequence, an array or a tensor. Called once, when they are needed.
        number: Examples of the training set.
        max_device_tokens: Most padded tokens of a micro-batch: its longest example x its examples; ``None`` for no bound.

    Example:
        >>> Lengths(lambda: [3, 1, 7], number=3, max_device_tokens=8).values
        array([3., 1., 7.])
    """

    def __init__(self, read: Callable[[], Any], number: int, max_device_tokens: float | None = None) -> None:
        self._read, self._number, self.max_device_tokens = read, number, max_device_tokens

    @cached_property
    def values(self) -> Values:
        """The lengths, ``[examples]``.

        Raises:
            TypeError: They are no numbers.
            ValueError: There are more or fewer than examples, one is below 1 or not finite, or an example is longer than
                ``max_device_tokens``.
        """
        given = self._read()
        try:
            values = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.empty((0, 0))
        if values.ndim != 1:
            raise TypeError("`lengths` must be one number for each training example, or a function of an example")
        if len(values) != self._number:
            raise ValueError(
                f"there are {len(values)} `lengths` for {self._number} training examples; give one number for each example, in "
                "the order of the data set"
            )
        wrong = np.flatnonzero(~((values >= 1) & np.isfinite(values)))
        if len(wrong):
            raise ValueError(
                f"the length of training example {wrong[0]} is {values[wrong[0]]:g}, but lengths must be finite and 1 or more; "
                "correct `lengths`, or leave that example out of the data set"
            )
        longest = int(values.argmax()) if len(values) else 0
        if self.max_device_tokens is not None and len(values) and values[longest] > self.max_device_tokens:
            raise ValueError(
                f"training example {longest} has a length of {values[longest]:.10g}, above "
                f"`max_device_tokens={self.max_device_tokens}`, and a single example cannot be cut; raise it to "
                f"{values[longest]:.10g} or more, or shorten the example"
            )
        return values

    @property
    def digest(self) -> str:
        """Equal for equal lengths."""
        return hashlib.sha256(self.values.tobytes()).hexdigest()


def _ends(lengths: list[float], bound: float, most: int) -> list[int]:
    """Where each group ends if each takes as many as it may: no other groups of this order are fewer.

    Args:
        lengths: From the longest to the shortest.
        bound: Most padded tokens of a group.
        most: Most examples of a group.
    """
    ends, stop, number = [], 0, len(lengths)
    while stop < number:
        stop = min(number, stop + max(1, min(most, int(bound // lengths[stop]))))
        ends.append(stop)
    return ends


def micro_batches_by_length(
    lengths: Values | Sequence[float],
    processes: int = 1,
    max_device_tokens: float | None = None,
    max_device_batch_size: int | None = None,
) -> list[list[npt.NDArray[np.int64]]]:
    """Deal a step's examples to the processes, and cut the shares into micro-batches of similar lengths.

    Sorted by length, the examples are cut into as few groups as the bounds allow, or into one for each process where there
    are no bounds. Their number is then made a multiple of the number of processes, and the largest padded cost (longest
    example x examples) as small as that number allows. Groups of similar cost go through the model in the same round.

    Args:
        lengths: Of the step's examples, in their order, ``[examples]``.
        processes: Processes that share the step.
        max_device_tokens: Most padded tokens of a micro-batch; ``None`` for no bound.
        max_device_batch_size: Most examples of a micro-batch; ``None`` for no bound.

    Returns:
        For each process its micro-batches, equally many: the positions of their examples in the step, ascending. Where there
        are too few examples, some are empty.

    Example:
        >>> shares = micro_batches_by_length([2, 9, 2, 8, 3, 2], processes=2, max_device_tokens=10)
        >>> [[part.tolist() for part in parts] for parts in shares]
        [[[1], [5]], [[0, 2, 4], [3]]]
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    if not len(lengths):
        return [[np.empty(0, np.int64)] for _ in range(processes)]
    ranks = np.argsort(-lengths, kind="stable")
    ordered: list[float] = lengths[ranks].tolist()
    groups = [ranks[start:stop] for start, stop in _even(ordered, processes, max_device_tokens, max_device_batch_size)]
    groups = [np.sort(group) for group in groups]
    rounds = -(-len(groups) // processes)
    groups += [np.empty(0, np.int64)] * (rounds * processes - len(groups))
    shares: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(processes)]
    for number in range(rounds):
        together = groups[number * processes : (number + 1) * processes]
        # there and back, so that no process always has the costliest
        for share, group in zip(shares, together if number % 2 == 0 else together[::-1]):
            share.append(group)
    return shares


def _even(ordered: list[float], processes: int, tokens: float | None, most: int | None) -> list[tuple[int, int]]:
    """The groups, the costliest first, each as a start and an end in ``ordered``: at most a multiple of ``processes``."""
    number = len(ordered)
    high, most = ordered[0] * number if tokens is None else tokens, most or number
    ends = _ends(ordered, high, most)
    count = -(-len(ends) // processes) * processes
    low = ordered[0]
    if len(fewest := _ends(ordered, low, most)) <= count:
        ends, high = fewest, low
    for _ in range(16 if low < high else 0):  # to the smallest bound with as many groups, but for one part in 2**16
        middle = (low + high) / 2
        if len(fewer := _ends(ordered, middle, most)) <= count:
            ends, high = fewer, middle
        else:
            low = middle
    groups = list(zip([0, *ends], ends))
    while len(groups) < min(count, number):
        costliest = max(
            (group for group in groups if group[1] - group[0] > 1), key=lambda group: ordered[group[0]] * (group[1] - group[0])
        )
        start, stop = costliest
        cuts = range(start + 1, stop)
        cut = min(cuts, key=lambda cut: max(ordered[start] * (cut - start), ordered[cut] * (stop - cut)))
        groups.remove(costliest)
        groups += [(start, cut), (cut, stop)]
    return sorted(groups, key=lambda group: (-ordered[group[0]] * (group[1] - group[0]), group))


def count_by_length(
    lengths: Values, processes: int = 1, max_device_tokens: float | None = None, max_device_batch_size: int | None = None
) -> npt.NDArray[np.int64]:
    """How many micro-batches each process has in each of several steps, as `micro_batches_by_length` makes them.

    Args:
        lengths: Of the examples of steps of one size, ``[steps, examples]``.
        processes: As of `micro_batches_by_length`.
        max_device_tokens: As of `micro_batches_by_length`.
        max_device_batch_size: As of `micro_batches_by_length`.

    Returns:
        Their number in each step, ``[steps]``.

    Example:
        >>> count_by_length(np.array([[2.0, 9, 2, 8, 3, 2], [3, 3, 3, 3, 3, 3]]), max_device_tokens=10)
        array([4, 2])
    """
    steps, examples = lengths.shape
    most = max_device_batch_size or examples
    if max_device_tokens is None:
        groups = -(-examples // most)
        return np.full(steps, max(1, -(-groups // processes)))
    ordered = -np.sort(-lengths, axis=1)
    stops, counts = np.zeros(steps, np.int64), np.zeros(steps, np.int64)
    while len(open_steps := np.flatnonzero(stops < examples)):
        first = ordered[open_steps, stops[open_steps]]
        stops[open_steps] += np.clip(max_device_tokens // first, 1, most).astype(np.int64)
        counts[open_steps] += 1
    return np.maximum(1, -(-counts // processes))
