"""Families of schedules: a schedule is a pure function of progress.

The same families serve batch sizes (which the plan rounds up) and learning rates. A plain function ``progress -> float``
may stand wherever a family does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightning_bsl.schedules.progress import Progress, Unit, check_unit

Function = Callable[[Progress], float]


def whole(length: int | float, total: Callable[[], int]) -> int:
    """A length in whole units: an ``int`` as it is, a ``float`` below 1 as that fraction of the run, rounded up."""
    if isinstance(length, int):
        return length
    # a fraction is rounded up so that the run never has more stages than asked for; 0.1 * 300 is 30, not 31
    return max(1, math.ceil(length * total() - 1e-9))


def check_length(name: str, length: int | float) -> None:
    """Raise ``ValueError`` unless ``length`` is an ``int`` >= 1 or a ``float`` in (0, 1)."""
    if isinstance(length, bool) or not (length >= 1 if isinstance(length, int) else 0 < length < 1):
        raise ValueError(
            f"`{name}={length!r}` is not a length: write an int of 1 or more (that many units), or a float between 0 and 1 "
            "(that fraction of the run)"
        )


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Base class: a schedule has one pure method, [`value`][], of its own stage index.

    Args:
        unit: The clock it reads: ``"epoch"``, ``"step"`` (optimizer steps), ``"samples"`` (examples consumed) or
            ``"tokens"`` (samples times the tokens of one, where the data say how many those are).
        every: How long one stage of the schedule lasts, in ``unit``: an ``int``, or a ``float`` below 1 for that fraction
            of the run (0.1 of 300 epochs is 30 epochs).
        minimum: The value is never below this.
        maximum: The value is never above this.

    Raises:
        ValueError: An unknown ``unit``, an ``every`` that is not a length, or ``minimum > maximum``.
    """

    unit: Unit = "epoch"
    every: int | float = 1
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        check_unit(self.unit)
        check_length("every", self.every)
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"`minimum={self.minimum}` is above `maximum={self.maximum}`; swap them or drop one")

    def __call__(self, progress: Progress) -> float:
        """The value at ``progress``, within ``minimum`` and ``maximum``."""
        value = self.value(progress)
        if self.minimum is not None:
            value = max(value, self.minimum)
        return value if self.maximum is None else min(value, self.maximum)

    @abstractmethod
    def value(self, progress: Progress) -> float:
        """The value at ``progress``, before ``minimum`` and ``maximum``."""

    def stage(self, progress: Progress) -> int:
        """The index m = 0, 1, ... of the schedule's stage at ``progress``."""
        return progress.count(self.unit) // self._every(progress)

    def next_change(self, progress: Progress) -> int | None:
        """The reading of the schedule's clock at which the value may next change, ``None`` for never."""
        return (self.stage(progress) + 1) * self._every(progress)

    def _every(self, progress: Progress) -> int:
        return whole(self.every, lambda: progress.horizon.total(self.unit))


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value throughout.

    Example:
        >>> Constant(128)(Progress(epoch=7))
        128
    """

    start: float

    def value(self, progress: Progress) -> float:
        """``start``."""
        return self.start

    def next_change(self, progress: Progress) -> int | None:
        """Never."""
        return None


@dataclass(frozen=True)
class Exponential(Schedule):
    """``start * factor**m``: the growth of P1 (iii), P2 and P3 (b_0 delta^m and eta_0 gamma^m).

    Args:
        start: The value of stage 0.
        factor: The growth per stage (delta for a batch size, gamma for a learning rate); below 1 it decays.

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
        """``start * factor**m``."""
        try:
            return self.start * self.factor ** self.stage(progress)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Polynomial(Schedule):
    """``(start + slope * m)**power``: the polynomial batch growth of P1 (``power=1`` is linear).

    Args:
        start: b_0 of the formula; the value of stage 0 is ``start**power``.
        slope: a of the formula, the growth of the base per stage.
        power: c of the formula.

    Example:
        >>> [Polynomial(8, slope=4, every=10)(Progress(epoch=epoch)) for epoch in (0, 10, 20)]
        [8.0, 12.0, 16.0]
    """

    start: float
    slope: float
    power: float = 1

    def value(self, progress: Progress) -> float:
        """``(start + slope * m)**power``."""
        base = self.start + self.slope * self.stage(progress)
        if base <= 0:
            raise ValueError(
                f"Polynomial(start={self.start}, slope={self.slope}) shrinks to {base} at stage {self.stage(progress)}; "
                "raise `start` or `slope`, or shorten the run"
            )
        return float(base**self.power)


@dataclass(frozen=True)
class Diminishing(Schedule):
    """``start / sqrt(t + 1)``: the diminishing learning rate of P1; t counts optimizer steps by default.

    Example:
        >>> Diminishing(0.1)(Progress(step=3))
        0.05
    """

    start: float
    unit: Unit = field(default="step", kw_only=True)

    def value(self, progress: Progress) -> float:
        """``start / sqrt(t + 1)``."""
        return self.start / math.sqrt(self.stage(progress) + 1)


@dataclass(frozen=True)
class _Decay(Schedule):
    """A decay from ``start`` to ``end`` over ``total`` units (the whole run if ``None``)."""

    start: float
    end: float = 0.0
    total: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total is not None and self.total < 1:
            raise ValueError(f"`total={self.total}` is not a length: write an int of 1 or more, or leave it out (the run)")

    def fraction(self, progress: Progress) -> float:
        """The share of the decay that lies behind, 0 to 1."""
        total = self.total or progress.horizon.total(self.unit)
        return min(1.0, self.stage(progress) * self._every(progress) / total)


@dataclass(frozen=True)
class Cosine(_Decay):
    """``end + (start - end) / 2 * (1 + cos(pi m / M))``: cosine annealing; m counts epochs by default, as in P1.

    With ``unit="samples"`` it follows the budget of examples, so it ends where it should however the batch size changes.

    Args:
        start: eta_max.
        end: eta_min.
        total: M; the run's length in ``unit`` by default.

    Example:
        >>> Cosine(0.1, total=10)(Progress(epoch=5))
        0.05
    """

    def value(self, progress: Progress) -> float:
        """The annealed value."""
        return self.end + (self.start - self.end) / 2 * (1 + math.cos(math.pi * self.fraction(progress)))


@dataclass(frozen=True)
class PolynomialDecay(_Decay):
    """``(start - end) * (1 - t/T)**power + end``: the polynomial decay of P1; t counts optimizer steps by default.

    Args:
        start: eta_max.
        end: eta_min.
        total: T; the run's length in ``unit`` by default.
        power: p; 1 is the "linear" decay.

    Example:
        >>> PolynomialDecay(0.1, total=100)(Progress(step=75))
        0.025
    """

    power: float = 1
    unit: Unit = field(default="step", kw_only=True)

    def value(self, progress: Progress) -> float:
        """The decayed value."""
        return float((self.start - self.end) * (1 - self.fraction(progress)) ** self.power + self.end)


@dataclass(frozen=True)
class Milestones(Schedule):
    """Given values between given milestones.

    Args:
        values: The values, one more than there are milestones.
        at: The milestones in ``unit``, increasing; ``values[i + 1]`` holds from ``at[i]`` on.

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
        for name in ("values", "at"):  # a frozen, hashable schedule, also from lists in a config
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.values) != len(self.at) + 1:
            raise ValueError(
                f"{len(self.at)} milestones cut a run in {len(self.at) + 1} stretches, but there are {len(self.values)} "
                f"values; `values={self.values}`, `at={self.at}`"
            )
        if any(b <= a for a, b in zip((0, *self.at), self.at)):
            raise ValueError(f"`at={self.at}` must increase, from 1 or more")
        if self.every != 1:
            raise ValueError(f"Milestones have no `every` (got {self.every}); the milestones `at` say when")

    def value(self, progress: Progress) -> float:
        """The value of the stretch in which ``progress`` lies."""
        count = progress.count(self.unit)
        return self.values[sum(count >= milestone for milestone in self.at)]

    def next_change(self, progress: Progress) -> int | None:
        """The next milestone."""
        return next((milestone for milestone in self.at if milestone > progress.count(self.unit)), None)


@dataclass(frozen=True)
class Warmup(Schedule):
    """Geometric warm-up to the first value of another schedule, then that schedule: P1 (iv).

    With w = ``over`` and i = ``every`` the warm-up has w/i stages, ``start * gamma**m`` with
    ``gamma = (then(0) / start)**(i / (w - i))``, as the authors set it: its last stage has the value from which ``then`` goes
    on.

    Args:
        start: The value of stage 0.
        then: The schedule after the warm-up. Its clock starts, and its share of the run is counted, when the warm-up ends,
            so it must read the same clock (or be constant).
        over: The warm-up's length in ``unit``: an ``int``, or a ``float`` below 1 for that fraction of the run.

    Raises:
        ValueError: ``then`` reads another clock, ``over`` is no length, or (when evaluated) is not below the run's length.

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
                f"the warm-up counts in unit {self.unit!r} but what follows it in {self.then.unit!r}: its clock starts when "
                f"the warm-up ends, which is not known in another unit. Write `unit={self.then.unit!r}` for the warm-up "
                f"(with `over` and `every` in that unit), or `unit={self.unit!r}` for {type(self.then).__name__}"
            )
        if not self.start > 0:
            raise ValueError(f"a geometric warm-up cannot start from {self.start}; write a `start` above 0")

    def value(self, progress: Progress) -> float:
        """``start * gamma**m`` during the warm-up, then ``then``."""
        over, every = self._over(progress), self._every(progress)
        count = progress.count(self.unit)
        if count >= over:
            return self.then(progress.since(over, self.unit))
        factor = self.factor(progress)
        return self.start * factor ** (count // every)

    def factor(self, progress: Progress) -> float:
        """gamma, the growth per stage of the warm-up."""
        over, every = self._over(progress), self._every(progress)
        # what `then` says at the warm-up's end: its clock in `unit` at 0, whatever the others read
        peak = self.then(Progress(horizon=progress.since(over, self.unit).horizon))
        if not peak > 0:
            raise ValueError(f"a geometric warm-up cannot reach {peak}, the first value of {self.then}; raise it above 0")
        last = -(-over // every) - 1
        return float((peak / self.start) ** (1 / last)) if last else 1.0

    def next_change(self, progress: Progress) -> int | None:
        """The next stage of the warm-up, then the next change of ``then``."""
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
