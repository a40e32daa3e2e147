"""The callbacks: schedulers of batch size and learning rate, measurements, triggers, and what validates and saves."""

from lightning_bsl.callbacks.adaptive import AdaptiveBatchLRScheduler
from lightning_bsl.callbacks.batch_ema import BatchEMA
from lightning_bsl.callbacks.batch_lr import BatchLRScheduler, plan_fit
from lightning_bsl.callbacks.checkpoint_every import CheckpointEvery
from lightning_bsl.callbacks.full_gradient import FullGradient
from lightning_bsl.callbacks.gradient_noise import GradientNoiseScale
from lightning_bsl.callbacks.gradient_norm import FullGradientNorm
from lightning_bsl.callbacks.training_time import TrainingTime
from lightning_bsl.callbacks.triggers import (
    CABS,
    BatchTarget,
    GradientNormTrigger,
    NoiseTarget,
    NormTest,
    PlateauTrigger,
    Trigger,
)
from lightning_bsl.callbacks.validate_every import ValidateEvery

__all__ = [
    "CABS",
    "AdaptiveBatchLRScheduler",
    "BatchEMA",
    "BatchLRScheduler",
    "BatchTarget",
    "CheckpointEvery",
    "FullGradient",
    "FullGradientNorm",
    "GradientNoiseScale",
    "GradientNormTrigger",
    "NoiseTarget",
    "NormTest",
    "PlateauTrigger",
    "TrainingTime",
    "Trigger",
    "ValidateEvery",
    "plan_fit",
]
