"""Lightning callbacks."""

from lightning_bsl.callbacks.batch_lr import BatchLRScheduler, plan_fit

__all__ = ["BatchLRScheduler", "plan_fit"]
