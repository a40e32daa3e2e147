"""Families of schedules: a schedule is a pure function of progress.

The same families serve batch sizes (a plan rounds them up) and learning rates. A plain function ``progress -> float`` works
wherever a schedule does. The families are those of Umeda & Iiduka 2025, *Increasing Both Batch Size and Learning Rate
Accelerates SGD* (arXiv 2409.08770).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real

from lightning_bsl.schedules.progress import Progress, Unit, check_unit

Function = Callable[[Progress], float]


def whole(length: int | float, total: Callable[[], int]) -> int:
    """Return a length in whole units.

    Args:
        length: An ``int`` is returned as it is. A ``float`` below 1 is that fraction of the run, rounded up.
        total: Returns the length of the run.
    """
    if isinstance(length, int):
        return length
    # rounded up, so that the run has no more stages than asked for; 1e-9 is for rounding errors: 0.1 * 300 is 30, not 31
    return max(1, math.ceil(length * total() - 1e-9))


def check_length(name: str, length: int | float) -> None:
    """Raise ``ValueError`` unless ``length`` is an ``int`` >= 1 or a ``float`` in (0, 1)."""
    if isinstance(length, bool) or not (length >= 1 if isinstance(length, int) else 0 < length < 1):
        raise ValueError(
            f"`{name}={length!r}` is not a length: write an int of 1 or more (that many units), or a float between 0 and 1 "
            "(that fraction of the run)"
        )


def check_number(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"`{name}={value!r})` is not a number: write an int or a float")


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
class _Decay(Schedule):
    """A decay from ``start`` to ``end`` over ``total`` units, or over the whole run if ``total`` is ``None``."""

    start: float
    end: float = 0.0
    total: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total is not None and self.total < 1:
            raise ValueError(
                f"`total={self.total}` is not a length: write an int of 1 or more, or leave it out to decay over the whole run"
            )

    def fraction(self, progress: Progress) -> float:
        """Return the fraction of the decay that is done, 0 to 1."""
        total = self.total or progress.horizon.total(self.unit)
        return min(1.0, self.stage(progress) * self._every(progress) / total)


@dataclass(frozen=True)
class Cosine(_Decay):
    """``end + (start - end) / 2 * (1 + cos(pi m / M))``: cosine annealing. By default m counts epochs (arXiv 2409.08770).

    With ``unit="samples"`` it ends with the last example of the run, however the batch size changes.

    Args:
        start: eta_max, the value at the start.
        end: eta_min, the value at the end.
        total: M, the length of the decay in ``unit``; by default the length of the run.

    Raises:
        ValueError: A ``total`` below 1. When called: no ``total``, and the length of the run in ``unit`` is not known.

    Example:
        >>> Cosine(0.1, total=10)(Progress(epoch=5))
        0.05
    """

    def value(self, progress: Progress) -> float:
        """Return the annealed value."""
        return self.end + (self.start - self.end) / 2 * (1 + math.cos(math.pi * self.fraction(progress)))


@dataclass(frozen=True)
class PolynomialDecay(_Decay):
    """``(start - end) * (1 - t/T)**power + end``: polynomial decay (arXiv 2409.08770). By default t counts optimizer steps.

    Args:
        start: eta_max, the value at the start.
        end: eta_min, the value at the end.
        total: T, the length of the decay in ``unit``; by default the length of the run.
        power: p of the paper; 1 is linear decay.

    Raises:
        ValueError: A ``total`` below 1. When called: no ``total``, and the length of the run in ``unit`` is not known.

    Example:
        >>> PolynomialDecay(0.1, total=100)(Progress(step=75))
        0.025
    """

    power: float = 1
    unit: Unit = field(default="step", kw_only=True)

    def value(self, progress: Progress) -> float:
        """Return the decayed value."""
        return float((self.start - self.end) * (1 - self.fraction(progress)) ** self.power + self.end)


@dataclass(frozen=True)
class Milestones(Schedule):
    """A list of values, and the milestones at which the value changes.

    Args:
        values: The values, one more than there are milestones.
        at: The milestones in ``unit``, in increasing order; ``values[i + 1]`` holds from ``at[i]`` on.

    Raises:
        ValueError: Milestones that do not increase, or a wrong number of values.

    Example:
        >>> batch_size = Milestones([128, 256, 512], at=[30, 60])
        >>> [batch_size(Progress(epoch=epoch)) for epoch in (0, 29, 30, 60)]
        [128, 128, 256, 512]
    """

    values: Sequence[float]
    at: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("values", "at"):  # tuples, so that a schedule made from lists can be hashed too
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for value in self.values:
            check_number("Milestones(values", value)
        if len(self.values) != len(self.at) + 1:
            raise ValueError(
                f"{len(self.at)} milestones need {len(self.at) + 1} values, but `values={self.values}` has "
                f"{len(self.values)}, for `at={self.at}`: write one value more than there are milestones"
            )
        if any(b <= a for a, b in zip((0, *self.at), self.at)):
            raise ValueError(f"`at={self.at}` must increase, from 1 or more: write whole numbers in increasing order")
        if self.every != 1:
            raise ValueError(f"Milestones have no `every` (got {self.every}): leave it out, and write the milestones in `at`")

    def value(self, progress: Progress) -> float:
        """Return the value between the milestones before and after ``progress``."""
        count = progress.count(self.unit)
        return self.values[sum(count >= milestone for milestone in self.at)]

    def next_change(self, progress: Progress) -> int | None:
        """Return the next milestone."""
        return next((milestone for milestone in self.at if milestone > progress.count(self.unit)), None)


@dataclass(frozen=True)
class Warmup(Schedule):
    """A geometric warm-up to the first value of another schedule, then that schedule: case (iv) of arXiv 2409.08770.

    With w = ``over`` and i = ``every`` the warm-up has w/i stages. The value of stage m is ``start * gamma**m`` with
    ``gamma = (then(0) / start)**(i / (w - i))``, as the authors set it. So the last stage has the first value of ``then``.

    Args:
        start: The value of stage 0.
        then: The schedule after the warm-up. Its clock starts at 0 when the warm-up ends, and a fraction of the run is a
            fraction of the rest. So it must read the same clock as the warm-up, or be constant.
        over: Length of the warm-up in ``unit``: an ``int``, or a ``float`` below 1 for that fraction of the run.

    Raises:
        ValueError: ``then`` reads another clock; ``over`` is not a length; ``start`` is not above 0. When called: the run is
            not longer than the warm-up, or the first value of ``then`` is not above 0.

    Example:
        >>> lr = Warmup(0.1, then=Constant(0.2), over=30, every=3)
        >>> [round(lr(Progress(epoch=epoch)), 3) for epoch in (0, 3, 27, 30)]
        [0.1, 0.108, 0.2, 0.2]
    """

    start: float
    then: Function
    over: int | float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length("over", self.over)
        if isinstance(self.then, Schedule) and not isinstance(self.then, Constant) and self.then.unit != self.unit:
            raise ValueError(
                f"the warm-up counts in unit {self.unit!r}, but the schedule after it counts in {self.then.unit!r}. Its clock "
                f"starts when the warm-up ends, and that moment is not known in another unit. Write `unit={self.then.unit!r}` "
                f"for the warm-up (with `over` and `every` in that unit), or `unit={self.unit!r}` for "
                f"{type(self.then).__name__}"
            )
        if not self.start > 0:
            raise ValueError(f"a geometric warm-up cannot start from {self.start}; write a `start` above 0")

    def value(self, progress: Progress) -> float:
        """Return ``start * gamma**m`` during the warm-up, and the value of ``then`` after it."""
        over, every = self._over(progress), self._every(progress)
        count = progress.count(self.unit)
        if count >= over:
            return self.then(progress.since(over, self.unit))
        factor = self.factor(progress)
        return self.start * factor ** (count // every)

    def factor(self, progress: Progress) -> float:
        """Return gamma, the growth per stage of the warm-up."""
        over, every = self._over(progress), self._every(progress)
        # the first value of `then`: its clock in `unit` reads 0, whatever the other clocks read
        peak = self.then(Progress(horizon=progress.since(over, self.unit).horizon))
        if not peak > 0:
            raise ValueError(
                f"a geometric warm-up cannot reach {peak}, the first value of {self.then}: write a first value above 0"
            )
        last = -(-over // every) - 1
        return float((peak / self.start) ** (1 / last)) if last else 1.0

    def next_change(self, progress: Progress) -> int | None:
        """Return the start of the next stage of the warm-up, and after the warm-up the next change of ``then``."""
        over = self._over(progress)
        if progress.count(self.unit) < over:
            return min(over, super().next_change(progress) or over)
        if not isinstance(self.then, Schedule):
            return progress.count(self.unit) + 1
        after = progress.since(over, self.unit)
        change = self.then.next_change(after)
        return None if change is None else progress.count(self.unit) - after.count(self.unit) + change

    def _over(self, progress: Progress) -> int:
        over = whole(self.over, lambda: progress.horizon.total(self.unit))
        length = progress.horizon.length(self.unit)
        if length is not None and length - over < progress.horizon.grain(self.unit):
            raise ValueError(
                f"the warm-up takes {over} {self.unit.rstrip('s')}s but the run has only {length}; "
                f"write a shorter `over`, or train for longer than {over}"
            )
        return over
