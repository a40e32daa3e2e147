"""Triggers: they decide when an adaptive scheduler goes on to the next stage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_bsl.callbacks.full_gradient import FullGradientMeasurer
from lightning_bsl.callbacks.gradient_noise import GradientNoiseScale

if TYPE_CHECKING:
    from lightning_bsl.callbacks.adaptive import AdaptiveBatchLRScheduler


class Trigger(Protocol):
    """The protocol of triggers: any function of these arguments.

    [`AdaptiveBatchLRScheduler`][lightning_bsl.AdaptiveBatchLRScheduler] calls the trigger at each check, on every process. The
    run goes on to the next stage if the trigger returns ``True`` on all processes. A trigger may have the methods
    ``on_train_start(trainer, pl_module)``, ``on_validation_end(trainer, pl_module)``, ``teardown(trainer, pl_module, stage)``,
    ``state_dict()`` and ``load_state_dict(state)``. They are called like those of a callback.

    Example:
        >>> def every_10000_samples(trainer, scheduler):
        ...     return scheduler.progress.samples >= 10_000 * (scheduler.stage + 1)
        >>> from lightning_bsl import AdaptiveBatchLRScheduler
        >>> scheduler = AdaptiveBatchLRScheduler(8, 0.1, trigger=every_10000_samples)
    """

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool:
        """Return whether to go on to the next stage."""
        ...


class GradientNormTrigger:
    """Goes on to the next stage when the full gradient norm is at or below a threshold (Umeda & Iiduka 2025, arXiv 2508.05302).

    The threshold falls from stage to stage. The trigger logs ``full_gradient_norm``, ``full_loss`` and ``threshold``.

    Args:
        start: The first threshold, eps_0.
        rule: ``"batch"``: eps_m = eps_0 sqrt(b_0 / b_m), as in the paper. ``"growth"``: eps_m = eps_0 / delta^(m/4), derived
            here from the critical batch size 2 C2 eta / eps^2 of arXiv 2508.05297 for a learning rate that grows by
            sqrt(delta).
        subset: The same as for [`FullGradientNorm`][lightning_bsl.FullGradientNorm].
        batch_size: Batch size of the measurement, as for ``FullGradientNorm``.

    Raises:
        ValueError: ``start`` is not finite and above 0; an unknown ``rule``; ``subset`` or ``batch_size`` below 1.

    Example:
        >>> trigger = GradientNormTrigger(start=0.5)
        >>> [trigger.threshold(stage, batch_size=8 * 2**stage, first=8, delta=2) for stage in (0, 2)]
        [0.5, 0.25]
    """

    def __init__(
        self, start: float = 0.5, rule: Literal["batch", "growth"] = "batch", subset: int | None = None, batch_size: int = 1024
    ) -> None:
        if not (start > 0 and math.isfinite(start)):
            raise ValueError(f"`start={start}` must be finite and above 0: write a gradient norm")
        if rule not in ("batch", "growth"):
            raise ValueError(f"unknown `rule={rule!r}`; write 'batch' or 'growth'")
        self.start = start
        self.rule = rule
        self.measurement = FullGradientMeasurer(subset, batch_size)

    def threshold(self, stage: int, batch_size: int, first: int, delta: float) -> float:
        """The threshold eps_m of a stage.

        Args:
            stage: Index of the stage, m.
            batch_size: Batch size of the stage, b_m.
            first: The first batch size, b_0.
            delta: Growth of the batch size per stage.
        """
        return self.start * (math.sqrt(first / batch_size) if self.rule == "batch" else delta ** (-stage / 4))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the measurement."""
        self.measurement.begin(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the workers of the measurement."""
        self.measurement.end()

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool:
        """Measure the norm, and return whether it is at or below the threshold."""
        gradient = self.measurement.measure(trainer, trainer.lightning_module)
        threshold = self.threshold(scheduler.stage, scheduler.batch_size, scheduler.segments[0].batch_size, scheduler.delta)
        metrics = {"full_gradient_norm": gradient.norm, "full_loss": gradient.loss, "threshold": threshold}
        scheduler.write(trainer, metrics)
        return gradient.norm <= threshold


class NoiseScaleTrigger:
    """Goes on to the next stage while the batch is smaller than the gradient noise scale.

    The noise scale B_simple is that of McCandlish et al. 2018 (arXiv 1812.06162). The trigger needs
    [`GradientNoiseScale`][lightning_bsl.GradientNoiseScale] among the callbacks.

    Args:
        factor: Go on while batch size < factor * noise scale.

    Raises:
        ValueError: ``factor`` is not above 0.
        MisconfigurationException: At the start of training: there is no ``GradientNoiseScale``, or it has ``per="terms"``.

    Example:
        >>> from lightning_bsl import AdaptiveBatchLRScheduler, GradientNoiseScale
        >>> scheduler = AdaptiveBatchLRScheduler(8, 0.1, trigger=NoiseScaleTrigger(factor=0.5))
        >>> callbacks = [scheduler, GradientNoiseScale()]
    """

    def __init__(self, factor: float = 1.0) -> None:
        if not factor > 0:
            raise ValueError(f"`factor={factor}` must be above 0: it multiplies the noise scale")
        self.factor = factor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the noise scale is measured."""
        if noise_scale(trainer) is None:
            raise MisconfigurationException(
                "NoiseScaleTrigger needs the noise scale: add `GradientNoiseScale()` to the callbacks"
            )

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool:
        """Compare the batch size with the noise scale; ``False`` before the first measurement."""
        callback = noise_scale(trainer)
        measured = callback.noise_scale if callback is not None else None
        return measured is not None and scheduler.batch_size < self.factor * measured


class PlateauTrigger:
    """Goes on to the next stage when a validation metric has stopped improving.

    Do not resume from a checkpoint that was saved between the last step before a validation and the validation itself:
    Lightning then skips this validation.

    Args:
        monitor: Name of the metric, such as ``"val/loss"``.
        patience: Number of validations without an improvement before the next stage.
        min_delta: Smallest change that counts as an improvement.
        mode: ``"min"`` if lower values are better, ``"max"`` if higher values are better.

    Raises:
        ValueError: ``patience`` below 1; an unknown ``mode``. After a validation: the metric was not logged.

    Example:
        >>> from lightning_bsl import AdaptiveBatchLRScheduler
        >>> scheduler = AdaptiveBatchLRScheduler(8, 0.1, trigger=PlateauTrigger("val/loss", patience=2), check_every=100)
    """

    def __init__(self, monitor: str, patience: int = 3, min_delta: float = 0.0, mode: Literal["min", "max"] = "min") -> None:
        if patience < 1:
            raise ValueError(f"`patience={patience}` must be 1 or more")
        if mode not in ("min", "max"):
            raise ValueError(f"unknown `mode={mode!r}`; write 'min' or 'max'")
        self.monitor, self.patience, self.min_delta, self.mode = monitor, patience, min_delta, mode
        self._best, self._waited = math.inf, 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the metric with its best value so far."""
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(f"`monitor={self.monitor!r}` is not logged; write one of {', '.join(sorted(metrics))}")
        value = metrics[self.monitor].item() * (1 if self.mode == "min" else -1)
        if value < self._best - self.min_delta:
            self._best, self._waited = value, 0
        else:
            self._waited += 1

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool:
        """Whether there were ``patience`` validations without an improvement since the last new stage."""
        advances = self._waited >= self.patience
        if advances:
            self._waited = 0
        return advances

    def state_dict(self) -> dict[str, Any]:
        """The best value, and the number of validations since."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self._best, self._waited = state_dict["best"], state_dict["waited"]


def noise_scale(trainer: Trainer) -> GradientNoiseScale | None:
    """The callback that measures the noise scale, if there is one.

    Args:
        trainer: The Trainer.

    Raises:
        MisconfigurationException: It measures per term of the loss, which cannot be compared with a batch size in examples.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    measurement = next((callback for callback in callbacks if isinstance(callback, GradientNoiseScale)), None)
    if measurement is not None and measurement.per == "terms":
        raise MisconfigurationException(
            "the batch size is compared with the noise scale of GradientNoiseScale(per='terms'), which is no number of "
            "examples: write `per='examples'`"
        )
    return measurement
