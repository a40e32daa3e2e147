"""Lightning callbacks."""

from lightning_bsl.callbacks.adaptive import (
    AdaptiveBatchLRScheduler,
    GradientNormTrigger,
    NoiseScaleTrigger,
    PlateauTrigger,
    Trigger,
)
from lightning_bsl.callbacks.batch_lr import BatchLRScheduler, plan_fit
from lightning_bsl.callbacks.gradient_noise import GradientNoiseScale
from lightning_bsl.callbacks.gradient_norm import FullGradient, FullGradientNorm
from lightning_bsl.callbacks.training_time import TrainingTime

__all__ = [
    "AdaptiveBatchLRScheduler",
    "BatchLRScheduler",
    "FullGradient",
    "FullGradientNorm",
    "GradientNoiseScale",
    "GradientNormTrigger",
    "NoiseScaleTrigger",
    "PlateauTrigger",
    "TrainingTime",
    "Trigger",
    "plan_fit",
]
