"""Stages that measurements decide on while a model trains, as a schedule like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_bsl.schedules.functions import Constant, Milestones
from lightning_bsl.schedules.joint import JointSchedule
from lightning_bsl.schedules.scaling import ScalingRule


class Segment(NamedTuple):
    """A stretch of the run with constant batch size and learning rate.

    Args:
        start: Samples at its start.
        batch_size: Examples of a step.
        lr: Learning rate, ``None`` if left to the module.
    """

    start: int
    batch_size: int
    lr: float | None


def measured_stages(segments: Sequence[Segment], largest: int, rule: ScalingRule | None = None) -> JointSchedule:
    """The stages that were decided on so far, the last one without an end.

    Args:
        segments: One after another, the first from sample 0 on.
        largest: The largest batch size that may be decided on.
        rule: Gives the learning rates, where they are not those of the segments.

    Example:
        >>> from lightning_bsl.schedules import Progress
        >>> schedule = measured_stages([Segment(0, 8, 0.1), Segment(80, 16, 0.14)], largest=64)
        >>> [schedule(Progress(samples=samples)) for samples in (72, 80)]
        [BatchLR(batch_size=8, lr=0.1), BatchLR(batch_size=16, lr=0.14)]
    """
    at = [segment.start for segment in segments[1:]]

    def follow(values: list[Any]) -> Milestones | Constant:
        return Milestones(values, at=at, unit="samples") if at else Constant(values[0])

    rates = [segment.lr for segment in segments]
    lr = None if rates[0] is None else follow(rates)
    return JointSchedule(follow([segment.batch_size for segment in segments]), rule or lr, largest)
