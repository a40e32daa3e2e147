"""A schedule of stages that were decided by measurements while the model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_bsl.schedules.functions import Constant
from lightning_bsl.schedules.joins import Milestones
from lightning_bsl.schedules.joint import JointSchedule
from lightning_bsl.schedules.scaling import ScalingRule


class Segment(NamedTuple):
    """A part of the run with constant batch size and learning rate.

    Args:
        start: Samples consumed before it.
        batch_size: Examples of a step.
        lr: Learning rate; ``None`` if the module sets it.
    """

    start: int
    batch_size: int
    lr: float | None


def measured_stages(segments: Sequence[Segment], largest: int, rule: ScalingRule | None = None) -> JointSchedule:
    """A schedule of the stages so far. The last stage has no end.

    Args:
        segments: The stages in their order; the first starts at sample 0.
        largest: The largest batch size that the run may grow to.
        rule: Gives the learning rates in place of those of the segments.

    Example:
        >>> from lightning_bsl.schedules import Progress
        >>> schedule = measured_stages([Segment(0, 8, 0.1), Segment(80, 16, 0.14)], largest=64)
        >>> [schedule(Progress(samples=samples)) for samples in (72, 80)]
        [BatchLR(batch_size=8, lr=0.1), BatchLR(batch_size=16, lr=0.14)]
    """
    milestones = [segment.start for segment in segments[1:]]

    def schedule(values: list[Any]) -> Milestones | Constant:
        return Milestones(values, at=milestones, unit="samples") if milestones else Constant(values[0])

    rates = [segment.lr for segment in segments]
    lr = None if rates[0] is None else schedule(rates)
    return JointSchedule(schedule([segment.batch_size for segment in segments]), rule or lr, largest)
