"""A scheduler that grows the batch size when a measurement says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, NamedTuple, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_bsl.callbacks.batch_lr import BatchLRScheduler
from lightning_bsl.callbacks.loop import logged_at
from lightning_bsl.callbacks.triggers import WITHIN, BatchTarget, GradientNormTrigger, Trigger, measured_noise, noise_scale
from lightning_bsl.schedules import FollowingRule, JointSchedule, NoiseScaling, ScalingRule, SurgeScaling
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.following import FollowingFunction
from lightning_bsl.schedules.measured import Segment, measured_stages


class Proposal(NamedTuple):
    """What to go on with after a check.

    Args:
        stage: Index of the stage.
        batch_size: Its batch size.
        lr: Its learning rate; ``None`` if the module sets it.
        growth: The number m in ``batch_size = b_0 delta^m``, before rounding and limits.
    """

    stage: int
    batch_size: int
    lr: float | None
    growth: float


class StageController:
    """Decides the stages of a schedule while a model trains, one after another.

    Args:
        batch_size: The first batch size, b_0.
        lr: The first learning rate; or a scaling rule; or ``None``.
        delta: Growth of the batch size per stage.
        gamma: Growth of the learning rate per stage; by default sqrt(delta).
        maximum: Largest batch size.
        max_lr: Largest learning rate; ``None`` for no limit.

    Attributes:
        stage: Index of the current stage.
        segments: The stages so far; a change of the learning rate inside a stage starts a new segment, too.

    Raises:
        ValueError: ``delta`` not above 1, ``gamma`` below 1, or a first value above its maximum.

    Example:
        >>> controller = StageController(8, 1.0, delta=2, gamma=1.5, maximum=64)
        >>> controller.extend(controller.proposal(advances=True), start=80)
        >>> controller.segments[-1]
        Segment(start=80, batch_size=16, lr=1.5)
    """

    def __init__(
        self,
        batch_size: int,
        lr: float | ScalingRule | None,
        delta: float = 2.0,
        gamma: float | None = None,
        maximum: int = 4096,
        max_lr: float | None = None,
    ) -> None:
        gamma = math.sqrt(delta) if gamma is None and delta > 0 else gamma
        if not delta > 1:
            raise ValueError(f"`delta={delta}` must be above 1: it multiplies the batch size from stage to stage")
        if gamma is None or not gamma >= 1:
            raise ValueError(f"`gamma={gamma}` must be 1 or more: it multiplies the learning rate from stage to stage")
        if not isinstance(batch_size, int) or not 1 <= batch_size <= maximum:
            raise ValueError(f"`batch_size={batch_size}` must be an int between 1 and `maximum={maximum}`")
        if isinstance(lr, (int, float)) and max_lr is not None and lr > max_lr:
            raise ValueError(f"`lr={lr}` is above `max_lr={max_lr}`: lower `lr`, or raise `max_lr`")
        self.lr, self.delta, self.gamma, self.maximum, self.max_lr = lr, delta, gamma, maximum, max_lr
        self.stage, self.segments = 0, [Segment(0, batch_size, None)]
        self._growth = 0.0  # by how many factors delta the batch size has grown; a fraction after a target
        self.measures = False  # whether a measured noise scale replaces that of the scaling rule
        self._measured: float | None = None
        self.begin(measures=False)

    @property
    def batch_size(self) -> int:
        """The batch size of the current stage."""
        return self.segments[-1].batch_size

    def begin(self, measures: bool) -> None:
        """Begin a run with the first stage.

        Args:
            measures: Whether the noise scale of a scaling rule will be measured.
        """
        self.measures, self._measured, self.stage, self._growth = measures, None, 0, 0.0
        first = self.segments[0].batch_size
        self.segments = [Segment(0, first, self._rate(0.0, first))]

    def schedule(self) -> JointSchedule:
        """The stages so far, as a schedule."""
        # only a pure scaling rule can multiply the rates of the module's own scheduler
        rule = self.lr if isinstance(self.lr, ScalingRule) and not self.measures and self.max_lr is None else None
        return measured_stages(self.segments, self.maximum, rule)

    def proposal(self, advances: bool = False, measured: float | None = None, target: int | None = None) -> Proposal:
        """What to go on with after a check.

        Args:
            advances: Whether to go on to the next stage.
            measured: The measured noise scale; ``None`` to keep the last measured one.
            target: The batch size to go on with, in place of ``advances``; above ``maximum`` it is ``maximum``. The learning
                rate is then ``eta_0 gamma^m``, where ``target = b_0 delta^m``; m need not be whole.

        Raises:
            ValueError: ``target`` is below 1.
        """
        if target is not None and target < 1:
            raise ValueError(
                f"the trigger returned {target}, but a batch size must be 1 or more: return True or False to go on to the next "
                "stage or to stay, and None to decide nothing"
            )
        self._measured = self._measured if measured is None else measured
        batch_size, growth = self.batch_size, self._growth
        if target is not None and min(target, self.maximum) != batch_size:
            batch_size = min(target, self.maximum)
            growth = math.log(batch_size / self.segments[0].batch_size) / math.log(self.delta)
        elif target is None and advances and batch_size < self.maximum:
            batch_size, growth = min(math.ceil(batch_size * self.delta * (1 - 1e-12)), self.maximum), growth + 1
        return Proposal(self.stage + (batch_size != self.batch_size), batch_size, self._rate(growth, batch_size), growth)

    def extend(self, proposal: Proposal, start: int) -> None:
        """Follow a proposal.

        Args:
            proposal: A value that ``proposal`` returned.
            start: The samples from which it holds.
        """
        self.stage, batch_size, lr, self._growth = proposal
        self.segments = [segment for segment in self.segments if segment.start < start] + [Segment(start, batch_size, lr)]

    def state_dict(self) -> dict[str, Any]:
        """The stages so far."""
        segments = [list(segment) for segment in self.segments]
        return {"stage": self.stage, "segments": segments, "measured": self._measured, "growth": self._growth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the stages."""
        self.stage, self._measured, self._growth = state["stage"], state["measured"], state["growth"]
        self.segments = [Segment(*segment) for segment in state["segments"]]

    def _rate(self, growth: float, batch_size: int) -> float | None:
        if self.lr is None:
            return None
        if not isinstance(self.lr, ScalingRule):
            return min(float(self.lr * self.gamma**growth), self.max_lr or math.inf)
        rule = self.lr if self._measured is None else replace(cast(SurgeScaling, self.lr), noise_batch_size=self._measured)
        return min(rule(batch_size), self.max_lr or math.inf)


class AdaptiveBatchLRScheduler(BatchLRScheduler):
    """Grows the batch size and the learning rate when a measurement says so (Umeda & Iiduka 2025, arXiv 2508.05302).

    Every ``check_every`` optimizer steps the trigger decides whether to go on to the next stage. If so, the batch size is
    multiplied by ``delta`` and the learning rate by ``gamma``. A trigger may return a batch size instead; with ``b = b_0
    delta^m`` the learning rate is then ``eta_0 gamma^m``. The change comes inside the epoch, from the first example that
    the loader's workers have not fetched yet. Both change at the same example. Every example still comes exactly once per
    epoch, and a resumed run goes on bit for bit.

    It logs what [`BatchLRScheduler`][lightning_bsl.BatchLRScheduler] logs, and at each new stage ``stage``, ``batch_size``,
    ``lr`` and ``samples``. A scheduler that measures has no plan before the run.

    Args:
        batch_size: The first batch size, b_0.
        lr: The first learning rate, multiplied by ``gamma`` from stage to stage; or a scaling rule; or ``None`` to leave the
            learning rates to the module. If ``GradientNoiseScale`` is among the callbacks, or if the trigger measures the noise
            scale, the value replaces that of ``SurgeScaling`` and ``NoiseScaling`` at each check at which its 95% interval is
            within a factor of 2. So the learning rate of Adam follows the surge law (Li et
            al. 2024, arXiv 2405.14578) while the batch grows.
        trigger: Decides when to go on to the next stage; by default ``GradientNormTrigger()``, as in the paper.
        delta: Growth of the batch size per stage.
        gamma: Growth of the learning rate per stage; by default sqrt(delta), the optimum of arXiv 2508.05297.
        maximum: Largest batch size.
        max_lr: Largest learning rate; ``None`` for no limit.
        check_every: Number of optimizer steps between two checks.
        max_device_batch_size: The same as for ``BatchLRScheduler``.
        loader: The same as for ``BatchLRScheduler``.
        follow: The same as for ``BatchLRScheduler``.
        max_samples: The same as for ``BatchLRScheduler``.
        max_tokens: The same as for ``BatchLRScheduler``.
        whole_batches: The same as for ``BatchLRScheduler``.

    Raises:
        ValueError: ``delta`` not above 1, ``gamma`` below 1, a first value above its maximum, ``check_every`` below 1. At the
            start of a fit: ``maximum`` above the examples of an epoch.
        MisconfigurationException: At the start of a fit: a training loader that cannot be re-made (see ``BatchLRScheduler``),
            or a ``limit_train_batches``.

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
        loader: str | int | None = None,
        follow: Mapping[str, FollowingRule | FollowingFunction] | None = None,
        max_samples: int | None = None,
        max_tokens: int | None = None,
        whole_batches: bool | int = False,
    ) -> None:
        super().__init__(
            batch_size,
            lr,
            max_device_batch_size,
            loader,
            follow=follow,
            max_samples=max_samples,
            max_tokens=max_tokens,
            whole_batches=whole_batches,
        )
        check_whole("check_every", check_every)
        self.controller = StageController(batch_size, lr, delta, gamma, maximum, max_lr)
        self.trigger = GradientNormTrigger() if trigger is None else trigger
        self.check_every = check_every

    @property
    def batch_size(self) -> int:
        """The batch size of the current stage. Steps that the workers fetched before may still have the previous one."""
        return self.controller.batch_size

    @property
    def stage(self) -> int:
        """Index of the current stage."""
        return self.controller.stage

    @property
    def segments(self) -> list[Segment]:
        """The stages so far."""
        return self.controller.segments

    @property
    def delta(self) -> float:
        """Growth of the batch size per stage."""
        return self.controller.delta

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the fit; a new run begins with the first stage."""
        if stage == "fit":
            limit = trainer.limit_train_batches
            if not trainer.fast_dev_run and (isinstance(limit, int) or limit not in (None, 1.0)):  # type: ignore[attr-defined]
                raise MisconfigurationException(
                    f"`limit_train_batches={limit}` counts batches, but their number is not known before training; write "
                    "`BatchSizeDataModule(samples_per_epoch=...)` or `Trainer(max_steps=...)`"
                )
            measured = noise_scale(trainer) is not None or isinstance(self.trigger, BatchTarget)
            measures = measured and isinstance(self.controller.lr, (SurgeScaling, NoiseScaling))
            self.controller.measures = measures
            if trainer.global_step == 0:
                self.controller.begin(measures)
            self.schedule = self.controller.schedule()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the trigger."""
        super().on_train_start(trainer, pl_module)
        if hasattr(self.trigger, "on_train_start"):
            self.trigger.on_train_start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore everything, and end the trigger."""
        super().teardown(trainer, pl_module, stage)
        if hasattr(self.trigger, "teardown"):
            self.trigger.teardown(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call the trigger's ``on_validation_end``."""
        if hasattr(self.trigger, "on_validation_end") and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.trigger.on_validation_end(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check after every ``check_every``-th step."""
        before = self.progress.step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = self.progress.step
        if step == before or step % self.check_every or self.finished or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.progress.samples > self.segments[-1].start:  # else the last decision has not reached a step yet
            self._check(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The state of ``BatchLRScheduler``, the stages so far, and the trigger's state."""
        trigger = self.trigger.state_dict() if hasattr(self.trigger, "state_dict") else None
        return super().state_dict() | self.controller.state_dict() | {"trigger": trigger}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        if not self.fitting:
            return
        self.controller.load_state_dict(state_dict)
        self.schedule = self.controller.schedule()
        if hasattr(self.trigger, "load_state_dict"):
            self.trigger.load_state_dict(state_dict["trigger"])
        super().load_state_dict(state_dict)

    def write(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write values to the loggers at once, since a check may be at a step that the Trainer does not log.

        Args:
            trainer: The Trainer, in a fit.
            values: Values by name.
        """
        values = values | {"samples": self.progress.samples}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=logged_at(trainer))

    def _check(self, trainer: Trainer) -> None:
        advances, target = self._agreed(trainer, self.trigger(trainer, self))
        noise = measured_noise(trainer, self.trigger) if self.controller.measures else None
        measured = noise.value if noise is not None and noise.within(WITHIN) else None
        proposal = self.controller.proposal(advances, measured, target)
        proposal = proposal._replace(lr=trainer.strategy.broadcast(proposal.lr))
        if proposal[1:3] == self.segments[-1][1:]:
            return
        start, before = trainer.strategy.broadcast(self.handed_out), self.stage
        self.controller.extend(proposal, start)
        self.reschedule(trainer, self.controller.schedule())
        stage, _, lr, _ = proposal
        if stage > before:
            batch_size = self.schedule.batch_size_at(self.progress._replace(samples=start))
            values: dict[str, float] = {"stage": stage, "batch_size": batch_size}
            self.write(trainer, values | ({} if lr is None else {"lr": lr}))
            rank_zero_info(f"stage {stage} from sample {start}: batch size {batch_size}, learning rate {lr}")

    def _agreed(self, trainer: Trainer, answer: Any) -> tuple[bool, int | None]:
        """What all processes do: whether to go on to the next stage, and the batch size that the trigger asks for."""
        if hasattr(answer, "item"):  # a tensor, or a number of NumPy
            elements = answer.numel() if isinstance(answer, Tensor) else getattr(answer, "size", 1)
            answer = answer.item() if elements == 1 else answer
        if not (answer is None or isinstance(answer, (bool, Integral))):
            raise TypeError(
                f"the trigger returned {answer!r}: return a batch size as an int, or True or False to go on to the next stage "
                "or to stay, or None to decide nothing"
            )
        number = int(answer) if isinstance(answer, Integral) and not isinstance(answer, bool) else None
        # the first process says which kind of answer counts, so that all of them take the same way
        is_number, target = trainer.strategy.broadcast((number is not None, number))
        if is_number:
            return False, target
        return bool(trainer.strategy.reduce_boolean_decision(number is None and bool(answer))), None
