"""Schedules made of other schedules, one after another."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args

from lightning_bsl.schedules.checks import check_length, check_number, is_length
from lightning_bsl.schedules.functions import (
    Constant,
    Cosine,
    Function,
    Linear,
    Schedule,
    _Shape,
    whole,
)
from lightning_bsl.schedules.progress import Progress, Unit
from lightning_bsl.schedules.scaling import ScalingRule

WarmupShape = Literal["linear", "exponential"]
DecayShape = Literal["linear", "sqrt", "cosine"]


def _function(value: Any) -> Any:
    """A number as a constant schedule; all else as it is."""
    return Constant(cast(float, value)) if isinstance(value, Real) and not isinstance(value, bool) else value


def _check_shape(shape: str, shapes: object) -> None:
    if shape not in get_args(shapes):
        raise ValueError(f"unknown `shape={shape!r}`; write {' or '.join(map(repr, get_args(shapes)))}")


def _check_boundaries(at: ListOf[int | float]) -> None:
    """Raise ``ValueError`` unless these are lengths, and integers and fractions each increase."""
    integers = [boundary for boundary in at if isinstance(boundary, Integral)]
    fractions = [boundary for boundary in at if not isinstance(boundary, Integral)]
    increase = all(before < after for kind in (integers, fractions) for before, after in pairwise(kind))
    if not (increase and all(map(is_length, at))):
        raise ValueError(
            f"`at={tuple(at)}` must increase, from 1 on: write whole numbers in increasing order, or fractions of the run "
            "between 0 and 1"
        )


@dataclass(frozen=True)
class Join(Schedule):
    """Base class of schedules that are made of parts. The clock of each part starts at its boundary.

    A part sees a run that begins at its boundary and ends at the next one, so a fraction of the run is a fraction of the part.
    The last part ends with the run.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every != 1:
            raise ValueError(
                f"{type(self).__name__} has no `every` (got {self.every}): leave it out; `at` says where a part ends"
            )

    @cached_property
    def _parts(self) -> ListOf[Function]:
        """The parts in their order."""
        return self._make_parts()

    @abstractmethod
    def _make_parts(self) -> ListOf[Function]:
        """Return the parts in their order."""

    @abstractmethod
    def boundaries(self, progress: Progress) -> list[int]:
        """Return the readings of the clock at which the second part starts, the third, and so on."""

    def part(self, progress: Progress) -> tuple[Function, Progress]:
        """Return the part at ``progress``, and its clock."""
        boundaries = self.boundaries(progress)
        count = progress.count(self.unit)
        index = sum(count >= boundary for boundary in boundaries)
        start = boundaries[index - 1] if index else 0
        until = boundaries[index] if index < len(boundaries) else None
        return self._parts[index], progress.since(start, self.unit, until)

    def value(self, progress: Progress) -> float:
        """Return the value of the part at ``progress``."""
        part, clock = self.part(progress)
        return part(clock)

    def next_change(self, progress: Progress) -> int | None:
        """Return the next change of the part, or the start of the next part."""
        count = progress.count(self.unit)
        part, clock = self.part(progress)
        change = part.next_change(clock) if isinstance(part, Schedule) else clock.count(self.unit) + 1
        changes = [] if change is None else [change + count - clock.count(self.unit)]
        return min(changes + [boundary for boundary in self.boundaries(progress) if boundary > count], default=None)

    @property
    def names_changes(self) -> bool:
        """Whether ``next_change`` names every change: not if one of the parts is a plain function."""
        return all(isinstance(part, Schedule) and part.names_changes for part in self._parts)

    @property
    def after_warmup(self) -> Function:
        """The last part, if all parts before it rise; else the schedule itself."""
        *before, last = self._parts
        return last if before and self._rising() == len(before) else self

    def warmup_end(self, progress: Progress) -> int:
        """Return the reading at which the parts at the start that rise end, or the warm-up of the first part; else 0."""
        first, rising = self._parts[0], self._rising()
        if rising:
            return self.boundaries(progress)[rising - 1]
        until = next(iter(self.boundaries(progress)), None)
        return first.warmup_end(progress.since(0, self.unit, until)) if isinstance(first, Schedule) else 0

    def means_zero(self, progress: Progress, batch_size: int) -> bool:
        """Return whether the part means a value of 0 at ``progress``."""
        part, clock = self.part(progress)
        return isinstance(part, Schedule) and part.means_zero(clock, batch_size)

    def _rising(self) -> int:
        """The number of parts at the start that rise; the last part does not count."""
        rises = [isinstance(part, Schedule) and part.rises for part in self._parts[:-1]]
        return next((index for index, rising in enumerate(rises) if not rising), len(rises))

    def _check_part(self, part: object, name: str) -> None:
        """Raise an error unless ``part`` can follow the clock of this schedule."""
        if not callable(part) or isinstance(part, (ScalingRule, type)):
            raise TypeError(
                f"`{name}={part!r}` is no schedule: write a schedule of progress, a number or a function of progress"
            )
        if isinstance(part, Schedule) and not isinstance(part, Constant) and part.unit != self.unit:
            raise ValueError(
                f"{type(self).__name__} counts in unit {self.unit!r}, but its part {type(part).__name__} counts in "
                f"{part.unit!r}. The clock of a part starts at its boundary, and that moment is not known in another unit. "
                f"Write `unit={part.unit!r}` for {type(self).__name__} (with its lengths in that unit), or "
                f"`unit={self.unit!r}` for {type(part).__name__}"
            )

    def _whole(self, lengths: ListOf[int | float], progress: Progress) -> list[int]:
        """The boundaries in whole units."""
        counts = [whole(length, lambda: progress.horizon.total(self.unit)) for length in lengths]
        if any(after <= before for before, after in pairwise(counts)):
            raise ValueError(
                f"`at={tuple(lengths)}` are {', '.join(map(str, counts))} in a run of {progress.horizon.length(self.unit)} "
                f"(unit {self.unit!r}), but they must increase: write other boundaries, or a finer `unit`"
            )
        return counts


@dataclass(frozen=True)
class Sequence(Join):
    """Several schedules, one after another. The clock of each starts at its boundary, as in ``optax.join_schedules``.

    Args:
        parts: The schedules, one more than there are boundaries: schedules in the same ``unit``, numbers, or functions of
            progress. For each part the run is the part: a fraction is a fraction of the part, and a part without a length of
            its own ends at the next boundary.
        at: The boundaries in ``unit``, in increasing order: an ``int`` counts units, a ``float`` below 1 is that fraction of
            the run. ``parts[i + 1]`` holds from ``at[i]`` on.

    Raises:
        TypeError: A part that is no schedule.
        ValueError: A wrong number of parts, boundaries that do not increase, or a part that reads another clock. When called:
            fractions that are not different in whole units.

    Example:
        >>> from lightning_bsl.schedules import Horizon
        >>> rise, fall = Linear(0.0, 0.1, unit="step"), Cosine(0.1, unit="step")
        >>> lr = Sequence([rise, 0.1, fall], at=[10, 90], unit="step")
        >>> run = Horizon(step=100)
        >>> [round(lr(Progress(step=step, horizon=run)), 3) for step in (0, 5, 10, 90, 95)]
        [0.0, 0.05, 0.1, 0.1, 0.05]
    """

    parts: ListOf[float | Function]
    at: ListOf[int | float]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "at", tuple(self.at))
        # tuples, so that a schedule made from lists can be hashed too
        object.__setattr__(self, "parts", tuple(map(_function, self.parts)))
        for index, part in enumerate(self.parts):
            self._check_part(part, f"parts[{index}]")
        _check_boundaries(self.at)
        if len(self.parts) != len(self.at) + 1:
            raise ValueError(
                f"{len(self.at)} boundaries need {len(self.at) + 1} parts, but there are {len(self.parts)}, for "
                f"`at={self.at}`: write one part more than there are boundaries"
            )

    def _make_parts(self) -> ListOf[Function]:
        return self.parts  # type: ignore[return-value]  # __post_init__ made them callable

    def boundaries(self, progress: Progress) -> list[int]:
        """Return the boundaries in whole units."""
        return self._whole(self.at, progress)


@dataclass(frozen=True)
class Milestones(Join):
    """A list of values, and the milestones at which the value changes.

    Args:
        values: The values, one more than there are milestones.
        at: The milestones in ``unit``, in increasing order: an ``int`` counts units, a ``float`` below 1 is that fraction of
            the run. ``values[i + 1]`` holds from ``at[i]`` on.

    Raises:
        ValueError: Milestones that do not increase, or a wrong number of values. When called: fractions that are not different
            in whole units.

    Example:
        >>> batch_size = Milestones([128, 256, 512], at=[30, 60])
        >>> [batch_size(Progress(epoch=epoch)) for epoch in (0, 29, 30, 60)]
        [128, 128, 256, 512]
    """

    values: ListOf[float]
    at: ListOf[int | float]

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
        _check_boundaries(self.at)

    def _make_parts(self) -> ListOf[Function]:
        return [Constant(value) for value in self.values]

    def boundaries(self, progress: Progress) -> list[int]:
        """Return the milestones in whole units."""
        return self._whole(self.at, progress)


@dataclass(frozen=True)
class Warmup(Join):
    """A warm-up to the first value of another schedule, then that schedule: case (iv) of arXiv 2409.08770.

    With w = ``over`` and i = ``every`` the warm-up has w/i stages.

    * ``shape="exponential"``: the value of stage m is ``start * gamma**m`` with ``gamma = (then(0) / start)**(i / (w - i))``,
      as the authors set it. So the last stage has the first value of ``then``.
    * ``shape="linear"``: the value of stage m is ``start + (then(0) - start) * m * i / w``. It would reach the first value of
      ``then`` when ``then`` starts.

    Args:
        start: The value of stage 0. A linear warm-up may start from 0.
        then: The schedule after the warm-up. Its clock starts at 0 when the warm-up ends, and a fraction of the run is a
            fraction of the rest. So it must read the same clock as the warm-up, or be constant.
        over: Length of the warm-up in ``unit``: an ``int``, or a ``float`` below 1 for that fraction of the run.
        shape: ``"exponential"`` or ``"linear"``.

    Raises:
        TypeError: ``then`` is no schedule.
        ValueError: ``then`` reads another clock; ``over`` is not a length; an unknown ``shape``; ``start`` is below 0, or is 0
            for an exponential warm-up. When called: the run is not longer than the warm-up, or the first value of ``then`` is
            not above 0.

    Example:
        >>> lr = Warmup(0.1, then=Constant(0.2), over=30, every=3)
        >>> [round(lr(Progress(epoch=epoch)), 3) for epoch in (0, 3, 27, 30)]
        [0.1, 0.108, 0.2, 0.2]
    """

    start: float
    then: Function
    over: int | float
    shape: WarmupShape = "exponential"

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)  # a warm-up has stages
        check_length("over", self.over)
        _check_shape(self.shape, WarmupShape)
        object.__setattr__(self, "then", _function(self.then))
        self._check_part(self.then, "then")
        if not (self.start > 0 or (self.start == 0 and self.shape == "linear")):
            raise ValueError(
                f"{'an exponential' if self.shape == 'exponential' else 'a linear'} warm-up cannot start from {self.start}; "
                "write a `start` above 0, or `start=0` with `shape='linear'`"
            )

    def value(self, progress: Progress) -> float:
        """Return the value of the stage during the warm-up, and the value of ``then`` after it."""
        over, every = self._over(progress), self._every(progress)
        count = progress.count(self.unit)
        if count >= over:
            return self.then(progress.since(over, self.unit))
        if self.shape == "exponential":
            return self.start * self.factor(progress) ** (count // every)
        fraction = count // every * every / over
        return self.start * (1 - fraction) + self._peak(progress) * fraction

    def factor(self, progress: Progress) -> float:
        """Return gamma, the growth per stage of an exponential warm-up."""
        last = -(-self._over(progress) // self._every(progress)) - 1
        return float((self._peak(progress) / self.start) ** (1 / last)) if last else 1.0

    def next_change(self, progress: Progress) -> int | None:
        """Return the start of the next stage of the warm-up, and after the warm-up the next change of ``then``."""
        over = self._over(progress)
        if progress.count(self.unit) < over:
            return min(over, Schedule.next_change(self, progress) or over)
        return super().next_change(progress)

    def means_zero(self, progress: Progress, batch_size: int) -> bool:
        """Return whether the first step is meant to have a value of 0, or ``then`` means it."""
        if progress.count(self.unit) < self._over(progress):
            return self.start == 0 and progress.count(self.unit) == 0
        return super().means_zero(progress, batch_size)

    def boundaries(self, progress: Progress) -> list[int]:
        """Return the end of the warm-up."""
        return [self._over(progress)]

    def _make_parts(self) -> ListOf[Function]:
        return [Linear(0, 1), self.then]  # the first one only says that the value rises: `value` computes the warm-up

    def _peak(self, progress: Progress) -> float:
        """The first value of ``then``: its clock in ``unit`` reads 0, whatever the other clocks read."""
        peak = self.then(Progress(horizon=progress.since(self._over(progress), self.unit).horizon))
        if not peak > 0:
            raise ValueError(f"a warm-up cannot reach {peak}, the first value of {self.then}: write a first value above 0")
        return peak

    def _over(self, progress: Progress) -> int:
        over = whole(self.over, lambda: progress.horizon.total(self.unit))
        length = progress.horizon.length(self.unit)
        if length is not None and length - over < progress.horizon.grain(self.unit):
            raise ValueError(
                f"the warm-up takes {over} {self.unit.rstrip('s')}s but the run has only {length}; "
                f"write a shorter `over`, or train for longer than {over}"
            )
        return over


@dataclass(frozen=True)
class _SqrtDecay(_Shape):
    """``end + (start - end) * (1 - sqrt(t / T))`` over the whole run."""

    end: float = 0.0
    total: int | float | None = None

    def value(self, progress: Progress) -> float:
        """Return the decayed value."""
        return self.end + (self.start - self.end) * (1 - math.sqrt(self.fraction(progress)))


@dataclass(frozen=True)
class WarmupStableDecay(Join):
    """A linear warm-up from 0 to ``peak``, then ``peak``, then a decay to ``end`` that ends with the run.

    With f the fraction of the decay that is done, the value is

    * ``shape="linear"``: ``end + (peak - end) * (1 - f)``
    * ``shape="sqrt"``: ``end + (peak - end) * (1 - sqrt(f))``
    * ``shape="cosine"``: ``end + (peak - end) / 2 * (1 + cos(pi f))``

    The rate is 0 in the first step, where the warm-up starts.

    Args:
        peak: The value between warm-up and decay.
        warmup: Length of the warm-up in ``unit``: an ``int``, or a ``float`` below 1 for that fraction of the run; 0 for none.
        decay: Length of the decay, likewise.
        end: The value at the end of the run.
        shape: Shape of the decay.

    Raises:
        ValueError: ``warmup`` or ``decay`` is neither 0 nor a length; an unknown ``shape``; ``peak`` not above ``end`` or
            ``end`` below 0. When called: warm-up and decay together are longer than the run, or its length in ``unit`` is not
            known.

    Example:
        >>> from lightning_bsl.schedules import Horizon
        >>> lr = WarmupStableDecay(0.1, warmup=0.1, decay=0.2)
        >>> run = Horizon(samples=1000)
        >>> [round(lr(Progress(samples=samples, horizon=run)), 3) for samples in (0, 50, 100, 800, 900)]
        [0.0, 0.05, 0.1, 0.1, 0.05]
    """

    peak: float
    warmup: int | float = 0.02
    decay: int | float = 0.2
    end: float = 0.0
    shape: DecayShape = "linear"
    unit: Unit = field(default="samples", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup", "decay"):
            if (length := getattr(self, name)) != 0 or isinstance(length, bool):
                check_length(name, length)
        _check_shape(self.shape, DecayShape)
        if not self.peak > self.end >= 0:
            raise ValueError(f"`peak={self.peak}` must be above `end={self.end}`, and `end` must be 0 or more")

    def boundaries(self, progress: Progress) -> list[int]:
        """Return the end of the warm-up, and the start of the decay."""
        run = progress.horizon.total(self.unit)
        warmup, decay = (whole(length, lambda: run) if length else 0 for length in (self.warmup, self.decay))
        if warmup + decay > run:
            raise ValueError(
                f"the warm-up of {warmup} and the decay of {decay} are longer than the run of {run} (unit {self.unit!r}): "
                "write a shorter `warmup` or `decay`, or train for longer"
            )
        return [warmup, run - decay]

    def _make_parts(self) -> ListOf[Function]:
        shape = {"linear": Linear, "sqrt": _SqrtDecay, "cosine": Cosine}[self.shape]
        rise = Linear(0.0, self.peak, unit=self.unit) if self.warmup else Constant(self.peak)
        fall = shape(self.peak, self.end, unit=self.unit) if self.decay else Constant(self.peak)
        return [rise, Constant(self.peak), fall]
