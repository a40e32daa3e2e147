"""Micro-batches by length: examples of similar length are padded together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


class Lengths:
    """The lengths of the training examples, and the largest number of padded tokens of a micro-batch.

    Args:
        read: Returns the length of each example, 1 or more: a sequence, an array or a tensor. It is called once, when the
            lengths are first needed.
        number: Number of training examples.
        max_device_tokens: Largest number of padded tokens of a micro-batch (length of its longest example x number of its
            examples); ``None`` for no limit.

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
            TypeError: The lengths are not numbers.
            ValueError: The number of lengths is not the number of examples, a length is below 1 or not finite, or an example is
                longer than ``max_device_tokens``.
        """
        lengths = self._read()
        try:
            values = np.asarray(lengths, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.empty((0, 0))
        if values.ndim != 1:
            raise TypeError(
                f"`lengths` of type {type(lengths).__name__} must be one number for each training example, or a function of an "
                "example that returns one number"
            )
        if len(values) != self._number:
            raise ValueError(
                f"there are {len(values)} `lengths` for {self._number} training examples; give one number for each example, "
                "in the order of the data set"
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
                f"`max_device_tokens={self.max_device_tokens}`, and a single example cannot be split; write "
                f"{values[longest]:.10g} or more, or shorten the example"
            )
        return values

    @property
    def digest(self) -> str:
        """A hash of the lengths, to compare the processes."""
        return hashlib.sha256(self.values.tobytes()).hexdigest()


def _ends(lengths: list[float], bound: float, most: int) -> list[int]:
    """The ends of the groups if every group takes as many examples as it may. No other grouping has fewer groups.

    Args:
        lengths: Lengths in descending order.
        bound: Largest number of padded tokens of a group.
        most: Largest number of examples of a group.
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
    """Divide the examples of a step among the processes, in micro-batches of examples of similar length.

    The examples are sorted by length and cut into as few groups as the limits allow, or into one group for each process if
    there are no limits. The number of groups is then raised to a multiple of the number of processes. For this number, the
    largest padded cost (length of the longest example x number of examples) is made as small as possible. Groups of similar
    cost go through the model at the same time.

    Args:
        lengths: Lengths of the examples in the order of the step, ``[examples]``.
        processes: Number of processes that share the step.
        max_device_tokens: Largest number of padded tokens of a micro-batch; ``None`` for no limit.
        max_device_batch_size: Largest number of examples of a micro-batch; ``None`` for no limit.

    Returns:
        For each process its micro-batches, the same number for all. A micro-batch is the positions of its examples in the step,
        in ascending order. If there are too few examples, some micro-batches are empty.

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
        # the order alternates, so that the most expensive group is not always that of the same process
        for share, group in zip(shares, together if number % 2 == 0 else together[::-1]):
            share.append(group)
    return shares


def _even(ordered: list[float], processes: int, tokens: float | None, most: int | None) -> list[tuple[int, int]]:
    """Groups of equal cost, as far as possible: (start, end) in ``ordered``, the most expensive first.

    Their number is a multiple of ``processes``, unless there are too few examples.
    """
    number = len(ordered)
    high, most = ordered[0] * number if tokens is None else tokens, most or number
    ends = _ends(ordered, high, most)
    count = -(-len(ends) // processes) * processes
    low = ordered[0]
    if len(fewest := _ends(ordered, low, most)) <= count:
        ends, high = fewest, low
    for _ in range(16 if low < high else 0):  # bisect to the smallest bound with this number of groups, to one part in 2**16
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
    """The number of micro-batches per process that ``micro_batches_by_length`` makes, for several steps.

    Args:
        lengths: Lengths of the examples of steps of equal size, ``[steps, examples]``.
        processes: The same as for ``micro_batches_by_length``.
        max_device_tokens: The same as for ``micro_batches_by_length``.
        max_device_batch_size: The same as for ``micro_batches_by_length``.

    Returns:
        The number for each step, ``[steps]``.

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
