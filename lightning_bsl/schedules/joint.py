"""Batch size and learning rate together.

The bound behind the warnings is that of Umeda & Iiduka 2025 (arXiv 2409.08770); the optimal growth is that of the same
authors in arXiv 2508.05297.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import NamedTuple

from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.functions import Constant, Exponential, Function, Schedule
from lightning_bsl.schedules.progress import VERY_LONG, Progress
from lightning_bsl.schedules.scaling import LinearScaling, ScalingRule, SqrtScaling

LARGEST = 3.4028234663852886e38  # a learning rate: the largest float32, which optimizers convert it to


class BatchLR(NamedTuple):
    """Batch size and learning rate of one optimizer step.

    Args:
        batch_size: Examples of the step, over all processes and micro-batches.
        lr: Learning rate; ``None`` if the module sets it.

    Example:
        >>> JointSchedule(128, 0.1)(Progress())
        BatchLR(batch_size=128, lr=0.1)
    """

    batch_size: int
    lr: float | None


def sfo_exponent(delta: float, gamma: float) -> float:
    """The exponent p in SFO ~ eps^-p, where SFO counts the samples until the gradient norm is eps.

    It is derived here from the bound of arXiv 2409.08770. It is smallest, 4, at gamma = sqrt(delta), there with a logarithmic
    factor; this is the optimal growth of arXiv 2508.05297.

    Args:
        delta: Growth of the batch size per stage, above 1. A stage is a fixed number of steps.
        gamma: Growth of the learning rate per stage, above 1.

    Returns:
        The exponent; ``inf`` for ``gamma >= delta``, where the noise does not vanish.

    Raises:
        ValueError: ``delta`` or ``gamma`` not above 1.

    Example:
        >>> sfo_exponent(2, 1.2) > sfo_exponent(2, 1.3) > sfo_exponent(4, 2)
        True
    """
    if not (delta > 1 and gamma > 1):
        raise ValueError(f"`delta={delta}`, `gamma={gamma}`: growth needs factors above 1; write numbers above 1")
    if gamma >= delta:
        return math.inf
    return 2 * math.log(delta) / min(math.log(gamma), math.log(delta / gamma))


@dataclass(frozen=True)
class JointSchedule:
    """A batch size and a learning rate for every moment of a run.

    Args:
        batch_size: An ``int``, a schedule, or a function ``progress -> float``; rounded up to whole examples.
        lr: A ``float``, a schedule, a function ``progress -> float``, a scaling rule (a function of the batch size), or
            ``None`` to leave the learning rate to the module.
        largest: The largest batch size of a schedule whose batch sizes are measured while training. Such a schedule has no
            plan before the run.
        multiple: The batch size is rounded up to a multiple of it.

    Raises:
        TypeError: An argument of another type.
        ValueError: When called: a batch size below 1, or a learning rate that is not above 0 and finite. A rate of 0 is
            allowed in the first or the last step of a shape that goes from or to 0.

    Example:
        >>> schedule = JointSchedule(Exponential(8, factor=2, every=30), Exponential(0.1, factor=1.25, every=30))
        >>> schedule(Progress(epoch=30))
        BatchLR(batch_size=16, lr=0.125)
    """

    batch_size: int | Function
    lr: float | ScalingRule | Function | None = None
    largest: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        for name, kinds in (
            ("batch_size", "an int, a schedule or a function of progress"),
            ("lr", "a float, a schedule, a function of progress, a scaling rule or None"),
        ):
            value = getattr(self, name)
            if name == "lr" and value is None:
                continue
            if isinstance(value, bool) or not (callable(value) or isinstance(value, Real)):
                raise TypeError(f"`{name}={value!r}` must be {kinds}")
            if not callable(value):
                object.__setattr__(self, name, Constant(value))
        if isinstance(self.batch_size, ScalingRule):
            raise TypeError(
                f"`batch_size={self.batch_size}` is a rule for learning rates; write a schedule of progress, or an int"
            )
        check_whole("multiple", self.multiple)

    @classmethod
    def of(cls, batch_size: int | Function | JointSchedule, lr: float | ScalingRule | Function | None = None) -> JointSchedule:
        """The joint schedule of two schedules; a joint schedule is returned as it is.

        Args:
            batch_size: As above, or a joint schedule.
            lr: As above; ``None`` beside a joint schedule.

        Raises:
            TypeError: A joint schedule and an ``lr``.
        """
        if not isinstance(batch_size, JointSchedule):
            return cls(batch_size, lr)
        if lr is not None:
            raise TypeError(f"`batch_size` is a JointSchedule, which brings the learning rate: leave out `lr={lr!r}`")
        return batch_size

    def __call__(self, progress: Progress) -> BatchLR:
        """Batch size and learning rate at ``progress``."""
        batch_size = self.batch_size_at(progress)
        return BatchLR(batch_size, self.lr_at(progress, batch_size))

    def batch_size_at(self, progress: Progress) -> int:
        """The batch size at ``progress``, rounded up to whole examples and to a multiple of ``multiple``."""
        value = self.batch_size(progress)  # type: ignore[operator]  # __post_init__ made it callable
        if not (math.isfinite(value) and value >= 1 - 1e-9):
            raise ValueError(
                f"the batch size is {value} at {_when(progress)}, but a step needs at least 1 example and a finite number of "
                f"them: change {self.batch_size}, or bound it with `minimum=1` and `maximum=...`"
            )
        # a rounding error in the last bit must not add an example
        size = int(value) if isinstance(value, Integral) else math.ceil(value * (1 - 1e-12))
        return -(-size // self.multiple) * self.multiple

    def lr_at(self, progress: Progress, batch_size: int) -> float | None:
        """The learning rate at ``progress`` for a step of ``batch_size`` examples."""
        if self.lr is None:
            return None
        value = self.lr(batch_size) if isinstance(self.lr, ScalingRule) else self.lr(progress)  # type: ignore[operator]
        if value == 0 and isinstance(self.lr, Schedule) and self.lr.means_zero(progress, batch_size):
            return 0.0
        if not 0 < value < LARGEST:
            raise ValueError(
                f"the learning rate is {value} at {_when(progress)}, but it must be finite and above 0, and at most "
                f"{LARGEST:.2g}, the largest float32: change {self.lr}, or bound it with `minimum=...` and `maximum=...`"
            )
        return float(value)

    def warn_of(self) -> str | None:
        """A warning if the learning rate grows too fast for the batch size (gamma^2 >= delta), else ``None``."""
        growth = self.growth()
        if growth is None:
            return None
        delta, gamma = growth
        what = f"the batch grows by delta = {delta:.6g} and the learning rate by gamma = {gamma:.6g} a stage"
        remedy = f"Write gamma below sqrt(delta) = {math.sqrt(delta):.6g}"
        if math.isclose(gamma**2, delta, rel_tol=1e-9):
            return (
                f"{what}: gamma^2 = delta, the limit of the condition gamma^2 < delta of Umeda & Iiduka (arXiv 2409.08770). To "
                f"reach a gradient norm eps takes samples ~ eps^-4 times a logarithm; no other growth has a smaller exponent. "
                f"{remedy} to meet the condition."
            )
        if gamma**2 > delta:
            exponent = sfo_exponent(delta, gamma)
            cost = f"takes samples ~ eps^-{exponent:.3g}," if math.isfinite(exponent) else "may never be reached,"
            return (
                f"{what}: gamma^2 = {gamma**2:.6g} is above delta, so the gradient noise grows faster than the batch averages "
                f"it out (Umeda & Iiduka, arXiv 2409.08770, ask for gamma^2 < delta). A gradient norm eps then {cost} "
                f"against eps^-4 at best. {remedy}."
            )
        return None

    def growth(self) -> tuple[float, float] | None:
        """Delta and gamma per stage of the batch size, if both grow geometrically, else ``None``."""
        batch, lr = self.batch_size, self.lr
        if not (isinstance(batch, Exponential) and batch.factor > 1):
            return None
        if isinstance(lr, LinearScaling):
            return batch.factor, batch.factor
        if isinstance(lr, SqrtScaling):
            return batch.factor, math.sqrt(batch.factor)
        if isinstance(lr, Exponential) and lr.factor > 1:
            comparable = lr.unit == batch.unit and isinstance(lr.every, int) == isinstance(batch.every, int)
            return (batch.factor, lr.factor ** (batch.every / lr.every)) if comparable else None
        return None

    def batch_steps_to_change(self, progress: Progress, batch_size: int) -> float:
        """The number of steps from ``progress`` in which the batch size cannot change; ``inf`` for the rest of the epoch."""
        return _steps_to_change(self.batch_size, progress, batch_size)

    def lr_steps_to_change(self, progress: Progress, batch_size: int) -> tuple[float, bool]:
        """The number of steps from ``progress``, all of one batch size, that belong to one stage of the learning rate.

        Returns:
            The number of steps (``inf`` for the rest of the epoch), and whether the learning rate changes at every step. A
            rate that changes at every step does not end a stage.
        """
        if isinstance(self.lr, ScalingRule):
            return math.inf, False
        steps = _steps_to_change(self.lr, progress, batch_size)
        every_step = steps <= 1 and _steps_to_change(self.lr, progress.advance(batch_size), batch_size) <= 1
        return (math.inf if every_step else steps), every_step


def _steps_to_change(function: object, progress: Progress, batch_size: int) -> float:
    if function is None:
        return math.inf
    if not isinstance(function, Schedule) or not function.names_changes:
        return 1  # a plain function may change at any step
    change = function.next_change(progress)
    if change is None or function.unit == "epoch":
        return math.inf
    left = change - progress.count(function.unit)
    if function.unit == "step":
        return left
    return -(-left // (batch_size * progress.horizon.grain(function.unit)))


def _when(progress: Progress) -> str:
    return f"epoch={progress.epoch}, step={progress.step}, samples={progress.samples}"


def first_batch_size(batch_size: int | Function | JointSchedule) -> int:
    """The batch size at the start of a run, to which constants that follow the batch size refer.

    Args:
        batch_size: That of ``BatchLRScheduler``.

    Raises:
        TypeError: It is no batch size.

    Example:
        >>> first_batch_size(Exponential(8, factor=2, every=30))
        8
    """
    if batch_size is None:
        raise TypeError("the first batch size is not known: write a number in the place of `base_batch_size`")
    # at the start the length of the run does not matter, but fractions of it ask for one
    return JointSchedule.of(batch_size).batch_size_at(Progress(horizon=replace(VERY_LONG, tokens_per_sample=1)))
