"""Growth of the batch size from a decay of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from lightning_bsl.schedules.checks import check_number, check_whole
from lightning_bsl.schedules.functions import Constant, Function, Schedule
from lightning_bsl.schedules.joint import JointSchedule
from lightning_bsl.schedules.progress import Progress, Unit
from lightning_bsl.schedules.scaling import ScalingRule

Coupling = Literal["sqrt", "linear"]
_POINTS = 512  # at which a decay is checked


def seesaw(
    lr: Function,
    batch_size: int,
    cut: float = 2.0,
    exponent: float = 0.5,
    maximum: int | None = None,
    coupling: Coupling = "sqrt",
) -> JointSchedule:
    """Replace a decay of the learning rate by a smaller decay and a growing batch: fewer steps for the same samples.

    Let c be the cut and a the exponent. Wherever the decay ``lr`` has fallen to ``peak / c**m``, the learning rate is
    ``peak * c**(-a m)`` and the batch size ``batch_size * c**(2 (1 - a) m)``, rounded to whole examples. With a = 1/2 this is
    Seesaw (Meterez et al. 2025, arXiv 2510.14717): each cut of the rate by c becomes a cut by sqrt(c) and a batch c times as
    large. ``exponent=1`` is the decay itself, with a constant batch. Values between them are a family derived here: for an
    optimizer that normalises its gradient, such as Adam, the rate over the square root of the batch size decides about the
    gradient noise, and this ratio is the same for every a. Below a = 1/2 the rate times sqrt(B) would grow, which is unstable
    according to the paper.

    With ``coupling="linear"``, for SGD without normalisation, the rate over the batch size decides, so the batch size is
    ``batch_size * c**((1 - a) m)``. Then ``exponent=0`` is a constant rate and a batch that grows by c (Smith et al. 2018,
    arXiv 1711.00489).

    A warm-up in front of the decay is kept, with the first batch size. All of this holds as long as gradient noise dominates,
    that is below the critical batch size: give it as ``maximum`` if you know it. From there on the batch size stays at the
    maximum, and the rest is the plain decay: ``lr`` times sqrt(maximum / batch_size), or times their ratio if the coupling is
    linear. At a finite ``cut`` the rate lies above the decay between two cuts. Where ``lr`` falls in steps, as `Milestones` do,
    write their factor as ``cut``.

    Args:
        lr: The decay: any schedule that decreases after its warm-up, in ``unit="samples"`` or ``"tokens"``. A function
            ``progress -> float`` must depend on samples only.
        batch_size: The first batch size, in examples.
        cut: c, the factor by which the decay falls from one stage to the next.
        exponent: a, from 1/2 (from 0 with ``coupling="linear"``) to 1.
        maximum: Largest batch size, in examples; ``None`` for no limit. A decay to 0 asks for very large batches at its end,
            so give a maximum where an epoch is short.
        coupling: ``"sqrt"`` for Adam and other optimizers that normalise the gradient, ``"linear"`` for SGD.

    Returns:
        A joint schedule, for ``BatchLRScheduler(seesaw(...))`` or [`plan`][lightning_bsl.schedules.plan].

    Raises:
        TypeError: ``lr`` is no schedule of progress.
        ValueError: ``lr`` reads epochs or steps, or never changes; ``cut``, ``exponent``, ``batch_size`` or ``maximum`` out of
            range. When called: ``lr`` rises after its warm-up.

    Example:
        >>> from lightning_bsl.schedules import PolynomialDecay, plan
        >>> decay = PolynomialDecay(0.001, unit="samples")
        >>> growing = plan(seesaw(decay, batch_size=8, maximum=32), num_examples=8000, epochs=1)
        >>> [stage.batch_size for stage in growing.stages]
        [8, 16, 32]
        >>> growing.steps / plan(seesaw(decay, batch_size=8, exponent=1), num_examples=8000, epochs=1).steps
        0.688
    """
    if not callable(lr) or isinstance(lr, (ScalingRule, JointSchedule, Constant)):
        kind = ValueError if isinstance(lr, (int, float, Constant)) else TypeError
        raise kind(f"`lr={lr!r}` is no decay: write a schedule that decreases, such as Cosine(0.001, unit='samples')")
    if isinstance(lr, Schedule) and lr.unit not in ("samples", "tokens"):
        raise ValueError(
            f"the decay counts in unit {lr.unit!r}, but a batch that grows changes the number of steps, and epochs are too "
            f"coarse: write `unit='samples'` or `unit='tokens'` for {type(lr).__name__}"
        )
    if coupling not in get_args(Coupling):
        raise ValueError(f"unknown `coupling={coupling!r}`; write {' or '.join(map(repr, get_args(Coupling)))}")
    check_number("seesaw(cut", cut)
    check_number("seesaw(exponent", exponent)
    if not (cut > 1 and math.isfinite(cut)):
        raise ValueError(f"`cut={cut}` must be a finite number above 1: the decay falls by this factor from stage to stage")
    least = 0.5 if coupling == "sqrt" else 0.0
    if not least <= exponent <= 1:
        reason = (
            "the rate would fall less than the batch allows, and training is unstable"
            if exponent < least
            else ("the batch would shrink")
        )
        raise ValueError(
            f"`exponent={exponent}`: {reason} (arXiv 2510.14717); with `coupling={coupling!r}` write a number from {least:g} "
            "to 1"
        )
    for name, size in (("batch_size", batch_size), ("maximum", maximum)):
        check_whole(name, size, or_none=True)
    if maximum is not None and maximum < batch_size:
        raise ValueError(f"`maximum={maximum}` is below `batch_size={batch_size}`: write a larger maximum")
    if exponent == 1:
        return JointSchedule(batch_size, lr)
    unit: Unit = lr.unit if isinstance(lr, Schedule) else "samples"
    power = 0.5 if coupling == "sqrt" else 1.0
    family = (lr, batch_size, cut, exponent, maximum or math.inf, power)
    return JointSchedule(_BatchSize(*family, unit=unit), _LR(*family, unit=unit))


@dataclass(frozen=True)
class _Seesaw(Schedule):
    """What the two schedules of `seesaw` share: how often the decay was cut, and when it is cut next."""

    decay: Function
    first: int
    cut: float
    exponent: float
    largest: float
    power: float

    @property
    def ends_at_examples(self) -> bool:
        """Whether there is no maximum."""
        return math.isinf(self.largest)

    @property
    def names_changes(self) -> bool:
        """Whether the decay names its changes."""
        return isinstance(self.decay, Schedule) and self.decay.names_changes

    def warmup_end(self, progress: Progress) -> int:
        """Return the end of the warm-up of the decay."""
        return self.decay.warmup_end(progress) if isinstance(self.decay, Schedule) else 0

    def means_zero(self, progress: Progress, batch_size: int) -> bool:
        """Return whether the decay means a value of 0 at ``progress``."""
        return isinstance(self.decay, Schedule) and self.decay.means_zero(progress, batch_size)

    def peak(self, progress: Progress) -> float:
        """Return the rate at the start of the decay."""
        return self.decay(self._at(progress, self.warmup_end(progress)))

    def cuts(self, progress: Progress) -> float:
        """Return m, the number of cuts so far; ``inf`` where the decay has reached 0."""
        self._check(progress)
        if progress.count(self.unit) < self.warmup_end(progress):
            return 0
        peak, value = self.peak(progress), self.decay(progress)
        if value > peak * (1 + 1e-9):
            raise ValueError(self._not_a_decay(peak, value))
        # 1e-9 is for rounding errors: a decay by steps reaches peak / cut exactly
        return math.floor(math.log(peak / value, self.cut) + 1e-9) if value > 0 else math.inf

    def batch_size(self, cuts: float) -> float:
        """Return the batch size after so many cuts."""
        growth = (1 - self.exponent) / self.power * cuts
        if growth * math.log2(self.cut) > 60:  # the power itself could overflow
            return self.largest
        # the nearest integer: always rounded up, small batches would grow faster than the cuts
        return min(math.floor(self.first * float(self.cut**growth) + 0.5), self.largest)

    def next_cut(self, progress: Progress) -> int | None:
        """Return the reading at which the decay is cut next; ``None`` if it is not before the end of the run."""
        grain, cuts = progress.horizon.grain(self.unit), self.cuts(progress)
        first, end = progress.count(self.unit) // grain, progress.horizon.samples

        def reached(samples: int) -> bool:
            return self.cuts(progress._replace(samples=samples)) > cuts

        return None if (samples := _first(reached, first + 1, end)) is None else samples * grain

    def _check(self, progress: Progress) -> None:
        """Raise ``ValueError`` if the decay rises; once for each length of the run."""
        if getattr(self, "_checked", None) == progress.horizon or (end := progress.horizon.length(self.unit)) is None:
            return
        object.__setattr__(self, "_checked", progress.horizon)
        start = self.warmup_end(progress)
        readings = [start + (end - 1 - start) * point // _POINTS for point in range(_POINTS + 1)]
        for before, after in pairwise(self.decay(self._at(progress, reading)) for reading in readings):
            if after > before * (1 + 1e-9):
                raise ValueError(self._not_a_decay(before, after))

    def _at(self, progress: Progress, reading: int) -> Progress:
        return progress._replace(samples=-(-reading // progress.horizon.grain(self.unit)))

    def _not_a_decay(self, before: float, after: float) -> str:
        return (
            f"the decay of `seesaw` rises from {before:.6g} to {after:.6g} after its warm-up: write a schedule that decreases, "
            f"in place of {self.decay}"
        )


@dataclass(frozen=True)
class _BatchSize(_Seesaw):
    """The batch size of `seesaw`."""

    def value(self, progress: Progress) -> float:
        """Return the batch size; without a maximum not above the run, as a decay to 0 asks for any size at its end."""
        return min(self.batch_size(self.cuts(progress)), self._most(progress))

    def next_change(self, progress: Progress) -> int | None:
        """Return the reading of the next cut; ``None`` at the largest batch size."""
        return None if self.value(progress) >= self._most(progress) else self.next_cut(progress)

    def _most(self, progress: Progress) -> float:
        """The maximum, or else the examples of the run."""
        return (progress.horizon.samples or math.inf) if self.ends_at_examples else self.largest


@dataclass(frozen=True)
class _LR(_Seesaw):
    """The learning rate of `seesaw`."""

    def value(self, progress: Progress) -> float:
        """Return the learning rate."""
        if self._follows(progress):
            # 1 during the warm-up
            scale = 1.0 if progress.count(self.unit) < self.warmup_end(progress) else (self.largest / self.first) ** self.power
            return self.decay(progress) * scale
        return float(self.peak(progress) * self.cut ** (-self.exponent * self.cuts(progress)))

    def next_change(self, progress: Progress) -> int | None:
        """Return the next change of the decay where it is followed, else the reading of the next cut."""
        if self._follows(progress) and isinstance(self.decay, Schedule):
            return self.decay.next_change(progress)
        return self.next_cut(progress)

    def _follows(self, progress: Progress) -> bool:
        """Whether the rate follows the decay: during the warm-up and at the largest batch size."""
        warms_up = progress.count(self.unit) < self.warmup_end(progress)
        return warms_up or self.batch_size(self.cuts(progress)) >= self.largest


def _first(reached: Callable[[int], bool], start: int, end: int | None) -> int | None:
    """The first integer from ``start`` on, and before ``end``, at which a condition holds that then holds for good."""
    step = 1
    while not reached(last := start + step - 1 if end is None else min(start + step - 1, end - 1)):
        if step > 2**60 or (end is not None and last >= end - 1):
            return None
        step *= 2
    low = max(start, start + step // 2 - 1)
    while low < last:
        middle = (low + last) // 2
        low, last = (low, middle) if reached(middle) else (middle + 1, last)
    return low
