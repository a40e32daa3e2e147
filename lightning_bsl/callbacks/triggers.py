"""When an adaptive run advances a stage."""

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
    """Says at each check whether to advance a stage: any function of these arguments.

    All processes call it; growth needs the consent of all. If it has ``on_train_start(trainer, pl_module)``,
    ``on_validation_end(trainer, pl_module)``, ``teardown(trainer, pl_module, stage)``, ``state_dict()`` or
    ``load_state_dict(state)``, these are called as those of a callback are.
    """

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool:
        """Whether to advance."""
        ...


class GradientNormTrigger:
    """Advance once the full gradient norm is at most ``threshold``, which falls from stage to stage (arXiv 2508.05302).

    Logs ``full_gradient_norm``, ``full_loss`` and ``threshold``.

    Args:
        start: The first threshold, eps_0.
        rule: ``"batch"``: eps_m = eps_0 sqrt(b_0 / b_m), as the paper has it. ``"growth"``: eps_m = eps_0 / delta^(m/4),
            from the critical batch size 2 C2 eta / eps^2 of arXiv 2508.05297 where the rate grows by sqrt(delta) (derived).
        subset: As of [`FullGradientNorm`][lightning_bsl.FullGradientNorm].
        batch_size: As of ``FullGradientNorm``: of the measurement.

    Raises:
        ValueError: ``start`` is not above 0, or an unknown rule.

    Example:
        >>> trigger = GradientNormTrigger(start=0.5)
        >>> [trigger.threshold(stage, batch_size=8 * 2**stage, first=8, delta=2) for stage in (0, 2)]
        [0.5, 0.25]
    """

    def __init__(
        self, start: float = 0.5, rule: Literal["batch", "growth"] = "batch", subset: int | None = None, batch_size: int = 1024
    ) -> None:
        if not (start > 0 and math.isfinite(start)):
            raise ValueError(f"`start={start}` must be finite and above 0: it is a gradient norm")
        if rule not in ("batch", "growth"):
            raise ValueError(f"unknown `rule={rule!r}`; write 'batch' or 'growth'")
        self.start = start
        self.rule = rule
        self.measurement = FullGradientMeasurer(subset, batch_size)

    def threshold(self, stage: int, batch_size: int, first: int, delta: float) -> float:
        """Eps of a stage.

        Args:
            stage: Its index, m.
            batch_size: Its batch size, b_m.
            first: The first batch size, b_0.
            delta: The growth of the batch size a stage.
        """
        return self.start * (math.sqrt(first / batch_size) if self.rule == "batch" else delta ** (-stage / 4))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the training set."""
        self.measurement.begin(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the measurement's workers."""
        self.measurement.end()

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool:
        """Measure, and compare."""
        values = self.measurement.measure(trainer, trainer.lightning_module)
        threshold = self.threshold(scheduler.stage, scheduler.batch_size, scheduler.segments[0].batch_size, scheduler.delta)
        found = {"full_gradient_norm": values.norm, "full_loss": values.loss, "threshold": threshold}
        scheduler.write(trainer, found)
        return values.norm <= threshold


class NoiseScaleTrigger:
    """Advance while the batch is smaller than the gradient noise scale (M18): grow B towards B_noise.

    Needs [`GradientNoiseScale`][lightning_bsl.GradientNoiseScale] among the callbacks.

    Args:
        factor: Advance while batch size < factor * noise scale.

    Raises:
        ValueError: ``factor`` is not above 0.
        MisconfigurationException: At the start of training, without ``GradientNoiseScale``, or with one in terms.
    """

    def __init__(self, factor: float = 1.0) -> None:
        if not factor > 0:
            raise ValueError(f"`factor={factor}` must be above 0")
        self.factor = factor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the measurement."""
        if noise_scale(trainer) is None:
            raise MisconfigurationException("NoiseScaleTrigger needs `GradientNoiseScale()` among the callbacks")

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool:
        """Compare; not yet, as long as nothing was measured."""
        measurement = noise_scale(trainer)
        found = measurement.noise_scale if measurement is not None else None
        return found is not None and scheduler.batch_size < self.factor * found


class PlateauTrigger:
    """Advance when a validation metric has not improved for some validations.

    Resume from checkpoints that validation has followed or preceded, not from one saved between the last step before a
    validation and the validation itself: Lightning leaves that one out.

    Args:
        monitor: Name of the metric, such as ``"val/loss"``.
        patience: Validations without an improvement before it advances.
        min_delta: Smallest change that counts as one.
        mode: Whether lower (``"min"``) or higher (``"max"``) is better.

    Raises:
        ValueError: ``patience`` below 1 or an unknown mode; after a validation, a metric that it did not log.
    """

    def __init__(self, monitor: str, patience: int = 3, min_delta: float = 0.0, mode: Literal["min", "max"] = "min") -> None:
        if patience < 1:
            raise ValueError(f"`patience={patience}` must be 1 or more")
        if mode not in ("min", "max"):
            raise ValueError(f"unknown `mode={mode!r}`; write 'min' or 'max'")
        self.monitor, self.patience, self.min_delta, self.mode = monitor, patience, min_delta, mode
        self._best, self._waited = math.inf, 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the best so far."""
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(f"`monitor={self.monitor!r}` is not logged; there are {', '.join(sorted(metrics))}")
        value = metrics[self.monitor].item() * (1 if self.mode == "min" else -1)
        if value < self._best - self.min_delta:
            self._best, self._waited = value, 0
        else:
            self._waited += 1

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool:
        """Whether there were enough validations without an improvement since the last advance."""
        advances = self._waited >= self.patience
        if advances:
            self._waited = 0
        return advances

    def state_dict(self) -> dict[str, Any]:
        """The best value, and the validations since."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._best, self._waited = state_dict["best"], state_dict["waited"]


def noise_scale(trainer: Trainer) -> GradientNoiseScale | None:
    """The measurement among the callbacks, if there is one.

    Raises:
        MisconfigurationException: It is in terms of the loss, which cannot be compared with batch sizes in examples.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    measurement = next((each for each in callbacks if isinstance(each, GradientNoiseScale)), None)
    if measurement is not None and measurement.per == "terms":
        raise MisconfigurationException(
            "batch sizes are compared with the noise scale of GradientNoiseScale(per='terms'), which is no number of examples: "
            "write `per='examples'`"
        )
    return measurement
