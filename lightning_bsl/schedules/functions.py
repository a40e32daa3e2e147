"""Families of schedules: a schedule is a pure function of progress. Schedules made of others are in ``joins``.

The same families serve batch sizes (a plan rounds them up) and learning rates. A plain function ``progress -> float`` works
wherever a schedule does. The families are those of Umeda & Iiduka 2025, *Increasing Both Batch Size and Learning Rate
Accelerates SGD* (arXiv 2409.08770).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import ClassVar

from lightning_bsl.schedules.checks import check_length, check_number
from lightning_bsl.schedules.progress import Progress, Unit, check_unit

Function = Callable[[Progress], float]


def whole(length: int | float, total: Callable[[], int]) -> int:
    """Return a length in whole units.

    Args:
        length: An ``int`` is returned as it is. A ``float`` below 1 is that fraction of the run, rounded up.
        total: Returns the length of the run.
    """
    if isinstance(length, Integral):
        return int(length)
    # rounded up, so that the run has no more stages than asked for; 1e-9 is for rounding errors: 0.1 * 300 is 30, not 31
    return max(1, math.ceil(length * total() - 1e-9))


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Base class of all schedules. A subclass defines one pure method, ``value``.

    All schedules take the arguments below, as keywords.

    Args:
        unit: The clock that the schedule reads: ``"epoch"``, ``"step"`` (optimizer steps), ``"samples"`` (examples consumed)
            or ``"tokens"`` (samples times the tokens of one sample; the data must have ``tokens_per_sample``).
        every: Length of one stage, in ``unit``: an ``int``, or a ``float`` below 1 for that fraction of the run (0.1 of 300
            epochs is 30 epochs).
        minimum: The value is never below this.
        maximum: The value is never above this.

    Raises:
        ValueError: An unknown ``unit``, an ``every`` that is not a length, ``minimum > maximum``, or a value that is no number.

    Example:
        >>> class Sawtooth(Schedule):
        ...     def value(self, progress):
        ...         return 8.0 if self.stage(progress) % 2 else 16.0
        >>> [Sawtooth(every=10)(Progress(epoch=epoch)) for epoch in (0, 10, 20)]
        [16.0, 8.0, 16.0]
    """

    unit: Unit = "epoch"
    every: int | float = 1
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        for argument in fields(self):
            value = getattr(self, argument.name)
            if argument.type == "float" or (argument.type == "float | None" and value is not None):
                check_number(f"{type(self).__name__}({argument.name}", value)
        check_unit(self.unit)
        check_length("every", self.every)
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"`minimum={self.minimum}` is above `maximum={self.maximum}`; swap them or drop one")

    def __call__(self, progress: Progress) -> float:
        """Return the value at ``progress``, between ``minimum`` and ``maximum``."""
        value = self.value(progress)
        if self.minimum is not None:
            value = max(value, self.minimum)
        return value if self.maximum is None else min(value, self.maximum)

    @abstractmethod
    def value(self, progress: Progress) -> float:
        """Return the value at ``progress``, before ``minimum`` and ``maximum`` are applied."""

    def stage(self, progress: Progress) -> int:
        """Return the index m = 0, 1, ... of the schedule's stage at ``progress``."""
        return progress.count(self.unit) // self._every(progress)

    def next_change(self, progress: Progress) -> int | None:
        """Return the next reading of the schedule's clock at which the value may change; ``None`` for never."""
        return (self.stage(progress) + 1) * self._every(progress)

    @property
    def ends_at_examples(self) -> bool:
        """Whether the value is never above the number of examples of the run, so that it cannot count anything else."""
        return False

    @property
    def names_changes(self) -> bool:
        """Whether ``next_change`` names every change. A plain function inside the schedule may change at any step."""
        return True

    @property
    def rises(self) -> bool:
        """Whether it can serve as a warm-up: its value rises from its first reading to its last."""
        return False

    @property
    def after_warmup(self) -> Function:
        """The schedule that follows the warm-up; the schedule itself if it has none."""
        return self

    def warmup_end(self, progress: Progress) -> int:
        """Return the reading of the clock at which the warm-up ends; 0 without one."""
        return 0

    def means_zero(self, progress: Progress, batch_size: int) -> bool:
        """Return whether a value of 0 is meant at ``progress``: in the first or the last step of a shape from or to 0.

        Args:
            progress: The clock before the step.
            batch_size: Examples of the step.
        """
        return False

    def _every(self, progress: Progress) -> int:
        return whole(self.every, lambda: progress.horizon.total(self.unit))


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value throughout.

    Args:
        start: The value.

    Example:
        >>> Constant(128)(Progress(epoch=7))
        128
    """

    start: float

    def value(self, progress: Progress) -> float:
        """Return ``start``."""
        return self.start

    def next_change(self, progress: Progress) -> int | None:
        """Return ``None``: the value never changes."""
        return None


@dataclass(frozen=True)
class Exponential(Schedule):
    """``start * factor**m``, where m is the stage.

    This is the growth b_0 delta^m of the batch size and eta_0 gamma^m of the learning rate of case (iii) of Umeda & Iiduka
    (arXiv 2409.08770). The same authors use it in arXiv 2508.05297 and 2508.05302.

    Args:
        start: The value of stage 0.
        factor: Growth per stage: delta for a batch size, gamma for a learning rate. Below 1 the value decays.

    Raises:
        ValueError: A ``factor`` that is not positive and finite.

    Example:
        >>> batch_size = Exponential(8, factor=2, every=30, maximum=4096)
        >>> [batch_size(Progress(epoch=epoch)) for epoch in (0, 29, 30, 299)]
        [8, 8, 16, 4096]
    """

    start: float
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ValueError(
                f"`factor={self.factor}` is not a growth factor: write a number above 0 (above 1 to grow, below 1 to decay)"
            )

    @property
    def rises(self) -> bool:
        """Whether ``factor`` is above 1."""
        return self.factor > 1

    def value(self, progress: Progress) -> float:
        """Return ``start * factor**m``."""
        try:
            return self.start * self.factor ** self.stage(progress)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Polynomial(Schedule):
    """``(start + slope * m)**power``, where m is the stage: the polynomial batch growth of arXiv 2409.08770.

    Args:
        start: b_0 of the paper; the value of stage 0 is ``start**power``.
        slope: a of the paper, the growth of the base per stage.
        power: c of the paper; 1 is linear growth.

    Raises:
        ValueError: When called: the base ``start + slope * m`` is not above 0.

    Example:
        >>> [Polynomial(8, slope=4, every=10)(Progress(epoch=epoch)) for epoch in (0, 10, 20)]
        [8.0, 12.0, 16.0]
    """

    start: float
    slope: float
    power: float = 1

    def value(self, progress: Progress) -> float:
        """Return ``(start + slope * m)**power``."""
        base = self.start + self.slope * self.stage(progress)
        if base <= 0:
            raise ValueError(
                f"Polynomial(start={self.start}, slope={self.slope}) shrinks to {base} at stage {self.stage(progress)}; "
                "raise `start` or `slope`, or shorten the run"
            )
        return float(base**self.power)


@dataclass(frozen=True)
class Diminishing(Schedule):
    """``start / sqrt(t + 1)``: the diminishing learning rate of arXiv 2409.08770. By default t counts optimizer steps.

    Args:
        start: The value at t = 0.

    Example:
        >>> Diminishing(0.1)(Progress(step=3))
        0.05
    """

    start: float
    unit: Unit = field(default="step", kw_only=True)

    def value(self, progress: Progress) -> float:
        """Return ``start / sqrt(t + 1)``."""
        return self.start / math.sqrt(self.stage(progress) + 1)


@dataclass(frozen=True)
class _Shape(Schedule):
    """A shape from ``start`` to ``end`` over a length, or over the whole run."""

    start: float
    end: float
    _length: ClassVar[str] = "total"  # the argument that gives the length

    def __post_init__(self) -> None:
        super().__post_init__()
        if (length := getattr(self, self._length)) is not None:
            check_length(self._length, length, optional=True)

    def fraction(self, progress: Progress) -> float:
        """Return the fraction of the shape that is done, 0 to 1."""
        length = self.length(progress)
        return min(1.0, self.stage(progress) * self._every(progress) / length) if length else 1.0

    def length(self, progress: Progress) -> int:
        """Return the length of the shape in ``unit``."""
        length: int | float | None = getattr(self, self._length)
        return progress.horizon.total(self.unit) if length is None else whole(length, lambda: progress.horizon.total(self.unit))

    @property
    def rises(self) -> bool:
        """Whether ``end`` is above ``start``."""
        return self.end > self.start

    def means_zero(self, progress: Progress, batch_size: int) -> bool:
        """Return whether it starts from 0 with this step, or ends at 0 with this step of the run."""
        count, end = progress.count(self.unit), progress.horizon.length(self.unit)
        if count == 0:
            return self.start == 0
        step = 1 if self.unit in ("epoch", "step") else batch_size * progress.horizon.grain(self.unit)
        return self.end == 0 and end is not None and count + step >= end and count - step < self.length(progress)


@dataclass(frozen=True)
class Linear(_Shape):
    """``start + (end - start) * t / over``: a straight line, up or down, and ``end`` after it.

    Args:
        start: The value at the start. 0 is allowed for a learning rate that rises.
        end: The value at the end. 0 is allowed for a learning rate that falls, if the run ends there.
        over: Length in ``unit``: an ``int``, or a ``float`` below 1 for that fraction of the run; by default the whole run.

    Raises:
        ValueError: An ``over`` that is not a length. When called: no ``over``, and the length of the run in ``unit`` is not
            known.

    Example:
        >>> lr = Linear(0.0, 0.1, over=100, unit="step")
        >>> [lr(Progress(step=step)) for step in (0, 50, 100, 200)]
        [0.0, 0.05, 0.1, 0.1]
    """

    over: int | float | None = None
    _length: ClassVar[str] = "over"

    def value(self, progress: Progress) -> float:
        """Return the value on the line."""
        fraction = self.fraction(progress)
        return self.start * (1 - fraction) + self.end * fraction


@dataclass(frozen=True)
class Cosine(_Shape):
    """``end + (start - end) / 2 * (1 + cos(pi m / M))``: cosine annealing. By default m counts epochs (arXiv 2409.08770).

    With ``unit="samples"`` it ends with the last example of the run, however the batch size changes.

    Args:
        start: eta_max, the value at the start.
        end: eta_min, the value at the end.
        total: M, the length of the decay in ``unit``: an ``int``, or a ``float`` below 1 for that fraction of the run; by
            default the length of the run.

    Raises:
        ValueError: A ``total`` that is not a length. When called: no ``total``, and the length of the run in ``unit`` is not
            known.

    Example:
        >>> Cosine(0.1, total=10)(Progress(epoch=5))
        0.05
    """

    end: float = 0.0
    total: int | float | None = None

    def value(self, progress: Progress) -> float:
        """Return the annealed value."""
        return self.end + (self.start - self.end) / 2 * (1 + math.cos(math.pi * self.fraction(progress)))


@dataclass(frozen=True)
class PolynomialDecay(_Shape):
    """``(start - end) * (1 - t/T)**power + end``: polynomial decay (arXiv 2409.08770). By default t counts optimizer steps.

    Args:
        start: eta_max, the value at the start.
        end: eta_min, the value at the end.
        total: T, the length of the decay in ``unit``, as for `Cosine`; by default the length of the run.
        power: p of the paper; 1 is linear decay.

    Raises:
        ValueError: A ``total`` that is not a length. When called: no ``total``, and the length of the run in ``unit`` is not
            known.

    Example:
        >>> PolynomialDecay(0.1, total=100)(Progress(step=75))
        0.025
    """

    end: float = 0.0
    total: int | float | None = None
    power: float = 1
    unit: Unit = field(default="step", kw_only=True)

    def value(self, progress: Progress) -> float:
        """Return the decayed value."""
        return float((self.start - self.end) * (1 - self.fraction(progress)) ** self.power + self.end)
