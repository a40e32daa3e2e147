"""Schedules: pure functions of progress, and the plan that follows from them. Standard library only."""

from lightning_bsl.schedules.functions import (
    Constant,
    Cosine,
    Diminishing,
    Exponential,
    Milestones,
    Polynomial,
    PolynomialDecay,
    Schedule,
    Warmup,
)
from lightning_bsl.schedules.joint import BatchLR, JointSchedule
from lightning_bsl.schedules.plan import Plan, Stage, plan
from lightning_bsl.schedules.progress import Horizon, Progress
from lightning_bsl.schedules.scaling import LinearScaling, NoiseScaling, ScalingRule, SqrtScaling, SurgeScaling

__all__ = [
    "BatchLR",
    "Constant",
    "Cosine",
    "Diminishing",
    "Exponential",
    "Horizon",
    "JointSchedule",
    "LinearScaling",
    "Milestones",
    "NoiseScaling",
    "Plan",
    "Polynomial",
    "PolynomialDecay",
    "Progress",
    "ScalingRule",
    "Schedule",
    "SqrtScaling",
    "Stage",
    "SurgeScaling",
    "Warmup",
    "plan",
]
