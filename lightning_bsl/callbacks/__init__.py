"""Lightning callbacks."""

from lightning_bsl.callbacks.batch_lr import BatchLRScheduler, plan_fit
from lightning_bsl.callbacks.gradient_norm import FullGradient, FullGradientNorm

__all__ = ["BatchLRScheduler", "FullGradient", "FullGradientNorm", "plan_fit"]
