"""Triggers: they decide when an adaptive scheduler goes on to the next stage, or to which batch size."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD

from lightning_bsl.callbacks.compatibility import refuse_sharded
from lightning_bsl.callbacks.full_gradient import FullGradientMeasurer
from lightning_bsl.callbacks.gradient_noise import GradientNoiseScale
from lightning_bsl.callbacks.noise_probe import NoiseProbe, logged_values
from lightning_bsl.schedules.checks import check_above_0, check_whole
from lightning_bsl.theory.noise_scale import NoiseScale, cabs_batch_size, noise_interval, norm_test_batch_size

if TYPE_CHECKING:
    from lightning_bsl.callbacks.adaptive import AdaptiveBatchLRScheduler


WITHIN = 2.0  # a noise scale is used if the ends of its interval differ by at most this factor squared


class Trigger(Protocol):
    """The protocol of triggers: any function of these arguments.

    [`AdaptiveBatchLRScheduler`][lightning_bsl.AdaptiveBatchLRScheduler] calls the trigger at each check, on every process. A
    trigger may return:

    * ``True`` or ``False``: whether to go on to the next stage. The run does if all processes return ``True``.
    * an ``int``: the batch size to go on with. If the processes return different ones, that of the first process counts.
    * ``None``: nothing is decided.

    A trigger may have the methods ``on_train_start(trainer, pl_module)``, ``on_validation_end(trainer, pl_module)``,
    ``teardown(trainer, pl_module, stage)``, ``state_dict()`` and ``load_state_dict(state)``. They are called like those of a
    callback.

    Example:
        >>> def every_10000_samples(trainer, scheduler):
        ...     return scheduler.progress.samples >= 10_000 * (scheduler.stage + 1)
        >>> from lightning_bsl import AdaptiveBatchLRScheduler
        >>> scheduler = AdaptiveBatchLRScheduler(8, 0.1, trigger=every_10000_samples)
    """

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool | int | None:
        """Return whether to go on to the next stage, or the batch size to go on with, or ``None``."""
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

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool | int | None:
        """Measure the norm, and return whether it is at or below the threshold."""
        gradient = self.measurement.measure(trainer, trainer.lightning_module)
        threshold = self.threshold(scheduler.stage, scheduler.batch_size, scheduler.segments[0].batch_size, scheduler.delta)
        metrics = {"full_gradient_norm": gradient.norm, "full_loss": gradient.loss, "threshold": threshold}
        scheduler.write(trainer, metrics)
        return gradient.norm <= threshold


@dataclass(eq=False)
class BatchTarget(ABC):
    """Base of the triggers that return the batch size that a measurement asks for.

    If [`GradientNoiseScale`][lightning_bsl.GradientNoiseScale] is among the callbacks, its measurement is used. If not, the
    trigger draws some hundred training examples at each check and measures their gradients, as ``GradientNoiseScale`` does in
    steps of one piece. It then logs the same values.

    While the 95% interval of the target is wider than ``within`` says, the trigger does not use the target itself. It then asks
    only for what is certain: the end of the interval next to the current batch size, and no change if this batch size is
    inside. So a batch grows, too, where N is only known to be much larger.

    The trigger changes nothing while the target is within a factor ``hysteresis`` of the current batch size. A target is never
    below the first batch size, and never above the ``maximum`` of the scheduler, which is at most an epoch. It logs
    ``target_batch_size``, before rounding.

    Args:
        within: The target itself is used if the ends of its interval differ by at most this factor squared.
        round_to: A target is rounded up to a multiple of this number. ``None``: it is rounded down to a stage of the scheduler,
            ``b_0 delta^m``.
        hysteresis: The batch size changes only by a factor above this one.
        shrink: Whether the batch size may shrink.

    Raises:
        ValueError: ``within`` not above 1, ``round_to`` below 1, or ``hysteresis`` below 1.
        MisconfigurationException: At the start of training: ``GradientNoiseScale`` has ``per="terms"``, manual optimization, or
            the examples of the training loader cannot be read again.
    """

    _: KW_ONLY
    within: float = WITHIN
    round_to: int | None = None
    hysteresis: float = 1.2
    shrink: bool = False
    measured: NoiseScale | None = field(default=None, init=False, repr=False)
    probe: NoiseProbe = field(default_factory=NoiseProbe, init=False, repr=False)
    always_probes: ClassVar[bool] = False  # whether the measurement of GradientNoiseScale does not suffice

    def __post_init__(self) -> None:
        if not self.within > 1:
            raise ValueError(f"`within={self.within}` must be above 1: it is the factor to which a target must be known")
        check_whole("round_to", self.round_to, instead=", or None for the stages of the scheduler", or_none=True)
        if not self.hysteresis >= 1:
            raise ValueError(f"`hysteresis={self.hysteresis}` must be 1 or more: smaller changes are not made")

    @abstractmethod
    def target(self, trainer: Trainer, noise: NoiseScale) -> tuple[float, float, float]:
        """The batch size that a measurement asks for, and the ends of its interval.

        Args:
            trainer: The Trainer.
            noise: The measurement.
        """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how the noise scale is measured."""
        self.measured = None
        if noise_scale(trainer) is not None and not self.always_probes:
            return
        refuse_sharded(trainer, type(self).__name__, "gradients")
        obstacle = self.probe.begin(trainer, pl_module)
        if obstacle is not None:
            raise MisconfigurationException(
                f"{type(self).__name__} cannot read the training examples again to measure the noise scale: {obstacle}. Give "
                "such a loader"
                + ("" if self.always_probes else ", or add `GradientNoiseScale()` to the callbacks and train in micro-batches")
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the measurement."""
        self.probe.end()

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool | int | None:
        """Measure, and return the batch size to go on with; ``None`` to keep the current one."""
        noise = self.measured = self._measure(trainer, scheduler)
        if noise is None:
            return None
        current = scheduler.batch_size
        value, low, high = self.target(trainer, noise)
        if low <= 0 or high > self.within**2 * low:
            value = min(max(current, low), high)
        scheduler.write(trainer, {"target_batch_size": value})
        if current / self.hysteresis < value < current * self.hysteresis:
            return None
        size = self._rounded(value, scheduler)
        return size if size > current or (size < current and self.shrink) else None

    def _measure(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> NoiseScale | None:
        callback = noise_scale(trainer)
        if callback is not None and not self.always_probes:
            return callback.measured
        step = scheduler.progress.step
        values = self.probe.measure(trainer, trainer.lightning_module, step, scheduler.batch_size)
        if not values:
            return None
        noise = noise_interval(values)
        if callback is None:
            scheduler.write(trainer, logged_values(noise))
        return noise

    def _rounded(self, value: float, scheduler: AdaptiveBatchLRScheduler) -> int:
        first, maximum = scheduler.segments[0].batch_size, scheduler.controller.maximum
        if value >= maximum:
            return maximum
        value = max(value, first)
        if self.round_to is None:
            stage = math.floor(math.log(value / first) / math.log(scheduler.delta) + 1e-9)
            return min(math.ceil(first * scheduler.delta**stage * (1 - 1e-12)), maximum)
        return min(math.ceil(value / self.round_to * (1 - 1e-12)) * self.round_to, maximum)


@dataclass(eq=False)
class NoiseTarget(BatchTarget):
    """Grows the batch size to the gradient noise scale N, times a factor (McCandlish et al. 2018, arXiv 1812.06162).

    Args:
        factor: c in B = c N. At c = 1 a step makes half of the progress of a step with the full gradient.
        within: The same as for [`BatchTarget`][lightning_bsl.callbacks.BatchTarget], and so are the following ones.
        round_to: See there.
        hysteresis: See there.
        shrink: See there.

    Raises:
        ValueError: ``factor`` is not above 0 and finite; or see ``BatchTarget``.

    Example:
        >>> from lightning_bsl import AdaptiveBatchLRScheduler
        >>> scheduler = AdaptiveBatchLRScheduler(8, 0.1, trigger=NoiseTarget(factor=0.5), check_every=100)
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_0("NoiseTarget(factor", self.factor)

    def target(self, trainer: Trainer, noise: NoiseScale) -> tuple[float, float, float]:
        """C N, and the ends of its interval."""
        return self.factor * noise.value, self.factor * noise.low, self.factor * noise.high


@dataclass(eq=False)
class NormTest(BatchTarget):
    """Grows the batch size to that of the norm test, N / theta^2 (arXiv 2402.11215), where N is the gradient noise scale.

    At this batch size the noise of a step's gradient is theta times its mean, as norms: ``E|g_B - G|^2 = theta^2 |G|^2``.

    Args:
        theta: The tolerance.
        within: The same as for [`BatchTarget`][lightning_bsl.callbacks.BatchTarget], and so are the following ones.
        round_to: See there; with 1 the batch size is that of the paper.
        hysteresis: See there.
        shrink: See there.

    Raises:
        ValueError: ``theta`` is not above 0 and finite; or see ``BatchTarget``.

    Example:
        >>> from lightning_bsl import AdaptiveBatchLRScheduler
        >>> scheduler = AdaptiveBatchLRScheduler(8, 0.1, trigger=NormTest(theta=0.8), check_every=100)
    """

    theta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_0("NormTest(theta", self.theta)

    def target(self, trainer: Trainer, noise: NoiseScale) -> tuple[float, float, float]:
        """N / theta^2, and the ends of its interval."""
        value, low, high = (norm_test_batch_size(n, self.theta) for n in (noise.value, noise.low, noise.high))
        return value, low, high


class CABS(BatchTarget):
    """Couples the batch size to the learning rate: eta tr(Sigma) / F (Balles, Romero & Hennig, arXiv 1612.05086).

    F is the training loss, whose minimum must be 0. The rule is that of the largest gain per example of plain SGD; see
    [`cabs_batch_size`][lightning_bsl.theory.cabs_batch_size] for its derivation. Adam and momentum take steps of
    another length and direction than ``eta g``, so they are refused. The trigger always measures examples of its own, since it
    needs their loss.

    Args:
        within: The same as for [`BatchTarget`][lightning_bsl.callbacks.BatchTarget], and so are the following ones.
        round_to: See there.
        hysteresis: See there.
        shrink: See there.

    Raises:
        ValueError: See ``BatchTarget``; while training: a loss that is not above 0.
        MisconfigurationException: At the start of training: an optimizer other than ``torch.optim.SGD``, or momentum.

    Example:
        >>> from lightning_bsl import AdaptiveBatchLRScheduler
        >>> scheduler = AdaptiveBatchLRScheduler(8, 0.1, trigger=CABS(), check_every=100)
    """

    always_probes = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers for which the rule does not hold."""
        for optimizer in trainer.optimizers:
            momenta = {group.get("momentum", 0) for group in optimizer.param_groups}
            if not isinstance(optimizer, SGD) or momenta != {0}:
                raise MisconfigurationException(
                    f"CABS holds for steps of the learning rate times the gradient, but {type(optimizer).__name__}"
                    f"{' with momentum' if isinstance(optimizer, SGD) else ''} takes other steps: write `torch.optim.SGD` "
                    "without momentum, or `NoiseTarget()`"
                )
        super().on_train_start(trainer, pl_module)

    def target(self, trainer: Trainer, noise: NoiseScale) -> tuple[float, float, float]:
        """Eta tr(Sigma) / F, and the ends of its interval: that of tr(Sigma)."""
        loss = self.probe.loss
        if not loss > 0:
            raise ValueError(
                f"the training loss is {loss}, but CABS divides by it and needs a loss whose minimum is 0: write "
                "`NoiseTarget()` for another loss"
            )
        lr, spread = float(trainer.optimizers[0].param_groups[0]["lr"]), noise.variance_error
        variances = (noise.variance, noise.variance - spread, noise.variance + spread)
        value, low, high = (cabs_batch_size(lr, variance, loss) for variance in variances)
        return value, low, high


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
        check_whole("patience", patience)
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

    def __call__(self, trainer: Trainer, scheduler: AdaptiveBatchLRScheduler) -> bool | int | None:
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
            "the batch size follows the noise scale of GradientNoiseScale(per='terms'), which is no number of "
            "examples: write `per='examples'`"
        )
    return measurement


def measured_noise(trainer: Trainer, trigger: object) -> NoiseScale | None:
    """The last measurement of the noise scale, by the callback or else by the trigger.

    Args:
        trainer: The Trainer.
        trigger: The trigger of the scheduler.
    """
    callback = noise_scale(trainer)
    if callback is not None:
        return callback.measured
    return trigger.measured if isinstance(trigger, BatchTarget) else None
