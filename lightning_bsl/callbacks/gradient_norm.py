"""A callback that measures the norm of the full gradient."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bsl.callbacks.full_gradient import FullGradient, FullGradientMeasurer
from lightning_bsl.callbacks.loop import logged_at, steps_taken
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.progress import Unit


class FullGradientNorm(Callback):
    """Measures ||grad f||, where f is the mean loss over the training set.

    Umeda & Iiduka 2025 (arXiv 2409.08770) compare schedules by this norm. Each example of the loader's sampler counts once. The
    model is in evaluation mode (no dropout, BatchNorm with its running statistics), and images are not augmented. All examples
    have the same weight; or, if the LightningModule has a method ``loss_terms(batch)``, all terms of the loss, such as tokens.
    So the value does not depend on the batch size of the measurement, except for rounding. Training goes on bit for bit as
    without measurements.

    The loss is that of ``training_step``, which logs nothing during it; or that of ``full_loss(batch)``, if the LightningModule
    has this method, which must return the mean loss of a batch. One measurement costs a forward and a backward pass over the
    training set, in the full precision of the weights. The processes share the work.

    The callback logs ``full_gradient_norm`` and ``full_loss``.

    Args:
        every: Interval between two measurements, in ``unit``.
        unit: ``"epoch"`` (at the end of an epoch) or ``"step"`` (after an optimizer step).
        subset: Number of random examples, the same ones every time; by default all.
        batch_size: Number of examples at once, on each process; it is halved if they do not fit in memory.
        seed: Seed of the choice of the subset.

    Raises:
        ValueError: A number below 1, or an unknown ``unit``. At the start of training: a subset larger than the training set.
        MisconfigurationException: At the start of a fit: a training set without a length, sharded parameters, or manual
            optimization without ``full_loss``.

    Example:
        >>> trainer = Trainer(max_epochs=9, callbacks=[FullGradientNorm(every=3)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, every: int = 1, unit: Unit = "epoch", subset: int | None = None, batch_size: int = 1024, seed: int = 0
    ) -> None:
        check_whole("every", every)
        if unit not in ("epoch", "step"):
            raise ValueError(f"unknown unit {unit!r}; write 'epoch' or 'step'")
        self.every = every
        self.unit = unit
        self.measurer = FullGradientMeasurer(subset, batch_size, seed)
        self._measured_at = 0  # the step of the last measurement

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse fits that cannot be measured."""
        self.measurer.refuse(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the measurement."""
        self._measured_at = 0
        self.measurer.begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every ``every``-th step."""
        step = steps_taken(trainer)
        if self.unit == "step" and step and step % self.every == 0 and step != self._measured_at:
            self._measured_at = step
            gradient = self.measure(trainer, pl_module)
            self._log(pl_module, gradient, logger=False)
            for logger in trainer.loggers:  # directly, since the Trainer's own logging skips most steps
                metrics = {"full_gradient_norm": gradient.norm, "full_loss": gradient.loss}
                logger.log_metrics(metrics, step=logged_at(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of every ``every``-th epoch."""
        if self.unit == "epoch" and (trainer.current_epoch + 1) % self.every == 0:
            self._log(pl_module, self.measure(trainer, pl_module), logger=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the loader's workers."""
        self.measurer.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the loader's workers: after an exception Lightning does not call ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> FullGradient:
        """Measure now. Every process must call it.

        Args:
            trainer: The Trainer, in a fit.
            pl_module: Its LightningModule.

        Returns:
            The norm of the full gradient, and the mean loss.
        """
        return self.measurer.measure(trainer, pl_module)

    def _log(self, pl_module: LightningModule, gradient: FullGradient, logger: bool) -> None:
        for name, value in (("full_gradient_norm", gradient.norm), ("full_loss", gradient.loss)):
            pl_module.log(name, value, prog_bar=name == "full_gradient_norm", logger=logger, sync_dist=True)
