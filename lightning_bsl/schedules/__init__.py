"""Schedules: pure functions of progress, and the plan that follows from them. Standard library only."""

from lightning_bsl.schedules.following import DecayTimescale, FollowingRule, HalfLife
from lightning_bsl.schedules.functions import (
    Constant,
    Cosine,
    Diminishing,
    Exponential,
    Linear,
    Polynomial,
    PolynomialDecay,
    Schedule,
)
from lightning_bsl.schedules.joins import Milestones, Sequence, Warmup, WarmupStableDecay
from lightning_bsl.schedules.joint import BatchLR, JointSchedule, first_batch_size
from lightning_bsl.schedules.megatron import from_megatron, to_megatron
from lightning_bsl.schedules.plan import Plan, Stage, plan
from lightning_bsl.schedules.progress import Horizon, Progress
from lightning_bsl.schedules.scaling import LinearScaling, NoiseScaling, ScalingRule, SqrtScaling, SurgeScaling
from lightning_bsl.schedules.seesaw import seesaw

__all__ = [
    "BatchLR",
    "Constant",
    "Cosine",
    "DecayTimescale",
    "Diminishing",
    "Exponential",
    "FollowingRule",
    "HalfLife",
    "Horizon",
    "JointSchedule",
    "Linear",
    "LinearScaling",
    "Milestones",
    "NoiseScaling",
    "Plan",
    "Polynomial",
    "PolynomialDecay",
    "Progress",
    "ScalingRule",
    "Schedule",
    "Sequence",
    "SqrtScaling",
    "Stage",
    "SurgeScaling",
    "Warmup",
    "WarmupStableDecay",
    "first_batch_size",
    "from_megatron",
    "plan",
    "seesaw",
    "to_megatron",
]
