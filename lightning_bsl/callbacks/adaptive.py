"""Growth when a measurement says so."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_bsl.callbacks.batch_lr import BatchLRScheduler
from lightning_bsl.callbacks.gradient_noise import GradientNoiseScale
from lightning_bsl.callbacks.gradient_norm import FullGradientNorm
from lightning_bsl.callbacks.loop import set_epoch_length
from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.data.sampler import GlobalBatchSampler
from lightning_bsl.schedules import Constant, JointSchedule, Milestones, NoiseScaling, ScalingRule, SurgeScaling
from lightning_bsl.schedules.plan import EpochLength, check_fits


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
    """P3: advance once the full gradient norm is at most ``threshold``, which falls from stage to stage.

    Logs ``full_gradient_norm``, ``full_loss`` and ``threshold``.

    Args:
        start: The first threshold, eps_0.
        rule: ``"batch"``: eps_m = eps_0 sqrt(b_0 / b_m), as P3 has it. ``"growth"``: eps_m = eps_0 / delta^(m/4), which follows
            from P2's critical batch size 2 C2 eta / eps^2 where the rate grows by sqrt(delta) too (derived).
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
        self.measurement = FullGradientNorm(subset=subset, batch_size=batch_size)

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
        self.measurement.on_fit_start(trainer, pl_module)
        self.measurement.on_train_start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the measurement's workers."""
        self.measurement.teardown(trainer, pl_module, stage)

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
        MisconfigurationException: At the start of training, without ``GradientNoiseScale``.
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


class Segment(NamedTuple):
    """A stretch of the run with constant batch size and learning rate.

    Args:
        start: Samples at its start.
        batch_size: Examples of a step.
        lr: Learning rate, ``None`` if left to the module.
    """

    start: int
    batch_size: int
    lr: float | None


class AdaptiveBatchLRScheduler(BatchLRScheduler):
    """Grows the batch size and the learning rate when a measurement says so (P3).

    Every ``check_every`` optimizer steps the trigger is asked; where it says yes the batch size is multiplied by ``delta`` and
    the learning rate by ``gamma``, inside the epoch, from the first example on that no worker has been given yet. The learning
    rate changes with that very example. Each example comes exactly once an epoch; a resumed run goes on bit for bit.

    Logs what ``BatchLRScheduler`` logs, and at each advance ``stage``, ``batch_size``, ``lr`` and ``samples``.

    Args:
        batch_size: The first batch size, b_0.
        lr: The first learning rate, multiplied by ``gamma`` at each advance; or a scaling rule; or ``None`` to leave the rates
            to the module. The noise scale of ``SurgeScaling`` and ``NoiseScaling`` is replaced by the measured one at each
            check, if ``GradientNoiseScale`` is among the callbacks: so the rate of Adam follows P4 while the batch grows.
        trigger: When to advance; P3's by default.
        delta: Growth of the batch size.
        gamma: Growth of the learning rate; sqrt(delta) by default, the optimum of P2.
        maximum: Largest batch size.
        max_lr: Largest learning rate.
        check_every: Optimizer steps between two checks.
        max_device_batch_size: As of ``BatchLRScheduler``.

    Raises:
        ValueError: ``delta`` not above 1, ``gamma`` below 1, a first value above its maximum, ``check_every`` below 1; at fit
            start, ``maximum`` above the examples of an epoch.
        MisconfigurationException: At fit start, data that are not a ``BatchSizeDataModule``.

    Example:
        >>> scheduler = AdaptiveBatchLRScheduler(8, 0.1, GradientNormTrigger(start=0.5), maximum=1024, check_every=500)
    """

    def __init__(
        self,
        batch_size: int = 8,
        lr: float | ScalingRule | None = None,
        trigger: Trigger | None = None,
        delta: float = 2.0,
        gamma: float | None = None,
        maximum: int = 4096,
        max_lr: float | None = None,
        check_every: int = 1000,
        max_device_batch_size: int | Literal["auto"] | None = None,
    ) -> None:
        super().__init__(batch_size, lr, max_device_batch_size)
        gamma = math.sqrt(delta) if gamma is None and delta > 0 else gamma
        if not delta > 1:
            raise ValueError(f"`delta={delta}` must be above 1: it multiplies the batch size at each advance")
        if gamma is None or not gamma >= 1:
            raise ValueError(f"`gamma={gamma}` must be 1 or more: it multiplies the learning rate at each advance")
        if not isinstance(batch_size, int) or not 1 <= batch_size <= maximum:
            raise ValueError(f"`batch_size={batch_size}` must be an int between 1 and `maximum={maximum}`")
        if isinstance(lr, (int, float)) and max_lr is not None and lr > max_lr:
            raise ValueError(f"`lr={lr}` is above `max_lr={max_lr}`")
        if check_every < 1:
            raise ValueError(f"`check_every={check_every}` must be 1 or more")
        self.trigger = GradientNormTrigger() if trigger is None else trigger
        self.delta, self.gamma, self.maximum, self.max_lr, self.check_every = delta, gamma, maximum, max_lr, check_every
        self.lr = lr
        self._noise: GradientNoiseScale | None = None  # what replaces the noise scale of a scaling rule
        self._measured: float | None = None
        self.stage = 0
        self.segments = [Segment(0, batch_size, self._lr_of(0, batch_size))]

    @property
    def batch_size(self) -> int:
        """The batch size decided on; steps that workers had been given before may still be of the one before."""
        return self.segments[-1].batch_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the fit; a new run begins with the first stage."""
        if stage == "fit":
            if not isinstance(trainer.datamodule, BatchSizeDataModule):  # type: ignore[attr-defined]
                raise MisconfigurationException(
                    "AdaptiveBatchLRScheduler changes the batch size inside an epoch, so it needs a "
                    "`lightning_bsl.BatchSizeDataModule(train=...)`"
                )
            limit = trainer.limit_train_batches
            if not trainer.fast_dev_run and (isinstance(limit, int) or limit not in (None, 1.0)):  # type: ignore[attr-defined]
                raise MisconfigurationException(
                    f"`limit_train_batches={limit}` counts batches, and how many there are is decided while training; write "
                    "`BatchSizeDataModule(samples_per_epoch=...)` or `Trainer(max_steps=...)`"
                )
            self._noise = noise_scale(trainer) if isinstance(self.lr, (SurgeScaling, NoiseScaling)) else None
            if trainer.global_step == 0:
                self._measured, self.stage, first = None, 0, self.segments[0].batch_size
                self.segments = [Segment(0, first, self._lr_of(0, first))]
            self._set_schedule()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the trigger."""
        super().on_train_start(trainer, pl_module)
        if hasattr(self.trigger, "on_train_start"):
            self.trigger.on_train_start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer and the DataModule as they were."""
        super().teardown(trainer, pl_module, stage)
        if hasattr(self.trigger, "teardown"):
            self.trigger.teardown(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the trigger."""
        if hasattr(self.trigger, "on_validation_end") and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.trigger.on_validation_end(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the trigger after every ``check_every``-th step."""
        before = self._progress.step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = self._progress.step
        if step == before or step % self.check_every or self._finished() or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._progress.samples > self.segments[-1].start:  # else no step was taken yet with what was decided last
            self._check(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The stages so far, and the trigger's state."""
        trigger = self.trigger.state_dict() if hasattr(self.trigger, "state_dict") else None
        segments = [list(segment) for segment in self.segments]
        return super().state_dict() | {
            "stage": self.stage,
            "segments": segments,
            "measured": self._measured,
            "trigger": trigger,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        if not self._fitting:
            return
        self.stage, self._measured = state_dict["stage"], state_dict["measured"]
        self.segments = [Segment(*segment) for segment in state_dict["segments"]]
        self._set_schedule()
        if hasattr(self.trigger, "load_state_dict"):
            self.trigger.load_state_dict(state_dict["trigger"])
        super().load_state_dict(state_dict)

    def write(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write to the loggers at once: a check may fall between the steps that the Trainer logs."""
        values = values | {"samples": self._progress.samples}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    def _check(self, trainer: Trainer) -> None:
        advances = trainer.strategy.reduce_boolean_decision(bool(self.trigger(trainer, self)))
        advances = advances and self.batch_size < self.maximum
        stage, batch_size = self.stage + advances, self.batch_size
        if advances:
            batch_size = min(math.ceil(batch_size * self.delta * (1 - 1e-12)), self.maximum)
        lr = trainer.strategy.broadcast(self._lr_of(stage, batch_size))
        if (batch_size, lr) == self.segments[-1][1:]:
            return
        sampler = self._sampler()
        start = self._epoch_start.samples + sampler.handed_out
        segment = Segment(trainer.strategy.broadcast(start), batch_size, lr)
        self.stage, self.segments = stage, [each for each in self.segments if each.start < segment.start] + [segment]
        self._set_schedule()
        if not trainer.is_last_batch:
            set_epoch_length(trainer, len(sampler))
        self._apply(trainer)
        if advances:
            values = {"stage": stage, "batch_size": batch_size}
            self.write(trainer, values | ({} if lr is None else {"lr": lr}))
            rank_zero_info(f"stage {stage} from sample {segment.start}: batch size {batch_size}, learning rate {lr}")

    def _lr_of(self, stage: int, batch_size: int) -> float | None:
        if self.lr is None:
            return None
        if not isinstance(self.lr, ScalingRule):
            return min(self.lr * self.gamma**stage, self.max_lr or math.inf)
        if self._noise is not None and self._noise.noise_scale is not None:
            self._measured = self._noise.noise_scale  # the last one stays where the average is lost in noise
        rule = self.lr if self._measured is None else replace(cast(SurgeScaling, self.lr), noise_batch_size=self._measured)
        return min(rule(batch_size), self.max_lr or math.inf)

    def _set_schedule(self) -> None:
        """The stages so far as a schedule: steps to come are looked up in it as in any other."""
        at = [segment.start for segment in self.segments[1:]]

        def follow(values: list[Any]) -> Milestones | Constant:
            return Milestones(values, at=at, unit="samples") if at else Constant(values[0])

        lr: Any = None if self.lr is None else follow([segment.lr for segment in self.segments])
        if isinstance(self.lr, ScalingRule) and self._noise is None and self.max_lr is None:
            lr = self.lr  # which may multiply the rates of the module's own scheduler
        self.schedule = JointSchedule(follow([segment.batch_size for segment in self.segments]), lr)
        if self._own is not None and self._own.follows:
            self._sampler().schedule = JointSchedule(self.schedule.batch_size)

    def _sampler(self) -> GlobalBatchSampler:
        return cast(GlobalBatchSampler, cast(BatchSizeDataModule, self._own).train_dataloader().batch_sampler)

    def _make_plan(self, trainer: Trainer, num_examples: int, epoch_length: EpochLength | None = None) -> None:
        check_fits(self.maximum, num_examples, self._progress)

    def _largest_step(self) -> int:
        return self.maximum


def noise_scale(trainer: Trainer) -> GradientNoiseScale | None:
    """The measurement among the callbacks, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, GradientNoiseScale)), None)
