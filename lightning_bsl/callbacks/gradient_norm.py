"""The gradient of the mean loss over the whole training set."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_bsl.callbacks.full_gradient import FullGradient, FullGradientMeasurer
from lightning_bsl.callbacks.loop import logged_at, steps_taken
from lightning_bsl.schedules.progress import Unit


class FullGradientNorm(Callback):
    """Measures ||grad f||, f being the mean loss over the training set: what Umeda & Iiduka
    (arXiv 2409.08770) judge schedules by.

    The training set is what the loader's sampler gives, each example once.
    The model is in evaluation mode (no dropout, BatchNorm by its running statistics), images are not augmented, every example
    counts alike, and the processes share the work. Where the loss is a mean over something else, such as tokens, a method
    ``loss_terms(batch)`` of the LightningModule says how many, and each of those counts alike. The value therefore does not
    depend on the batch size of the measurement but for rounding. Training goes on bit for bit as if nothing had been measured.
    One measurement costs a forward and a backward pass over the data, at the full precision of the weights.

    The loss is what ``training_step`` returns, its logging suppressed; or, if the LightningModule has such a method,
    ``full_loss(batch)``: the mean loss of a batch.

    Logs ``full_gradient_norm`` and ``full_loss``, at the end of every ``every``-th epoch or after every ``every``-th step.

    Args:
        every: How often, in units.
        unit: ``"epoch"`` or ``"step"`` (optimizer steps).
        subset: Only that many random examples, the same ones every time; all by default.
        batch_size: Examples at once, on each process; halved where they do not fit in memory.
        seed: Seed of the choice of the subset.

    Raises:
        ValueError: A number below 1 or another unit; at fit start, a subset larger than the training set.
        MisconfigurationException: At fit start: a training set without a length, sharded parameters, or manual optimization
            without ``full_loss``.

    Example:
        >>> trainer = Trainer(max_epochs=9, callbacks=[FullGradientNorm(every=3)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self, every: int = 1, unit: Unit = "epoch", subset: int | None = None, batch_size: int = 1024, seed: int = 0
    ) -> None:
        if every < 1:
            raise ValueError(f"`every={every}` must be 1 or more")
        if unit not in ("epoch", "step"):
            raise ValueError(f"unknown unit {unit!r}; write 'epoch' or 'step'")
        self.every = every
        self.unit = unit
        self.measurer = FullGradientMeasurer(subset, batch_size, seed)
        self._measured_at = 0  # the step of the last measurement

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be measured."""
        self.measurer.refuse(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the training set."""
        self._measured_at = 0
        self.measurer.begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after every ``every``-th step."""
        step = steps_taken(trainer)
        if self.unit == "step" and step and step % self.every == 0 and step != self._measured_at:
            self._measured_at = step
            values = self.measure(trainer, pl_module)
            self._log(pl_module, values, logger=False)
            for logger in trainer.loggers:  # at once: the Trainer's own logging would skip most steps
                found = {"full_gradient_norm": values.norm, "full_loss": values.loss}
                logger.log_metrics(found, step=logged_at(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure at the end of every ``every``-th epoch."""
        if self.unit == "epoch" and (trainer.current_epoch + 1) % self.every == 0:
            self._log(pl_module, self.measure(trainer, pl_module), logger=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the loader's workers."""
        self.measurer.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end of a fit: Lightning does not call ``teardown`` then."""
        self.teardown(trainer, pl_module, "fit")

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> FullGradient:
        """Measure now; every process has to.

        Args:
            trainer: The Trainer, in a fit.
            pl_module: Its LightningModule.
        """
        return self.measurer.measure(trainer, pl_module)

    def _log(self, pl_module: LightningModule, values: FullGradient, logger: bool) -> None:
        for name, value in (("full_gradient_norm", values.norm), ("full_loss", values.loss)):
            pl_module.log(name, value, prog_bar=name == "full_gradient_norm", logger=logger, sync_dist=True)
