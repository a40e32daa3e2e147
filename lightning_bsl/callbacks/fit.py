"""What one fit changes, and how one goes on from a checkpoint."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_bsl.callbacks.clock import RunClock
from lightning_bsl.callbacks.loaders import Asks
from lightning_bsl.callbacks.loop import (
    begin_epoch,
    ended_epoch,
    resume_quietly,
    set_batches_done,
    set_steps_taken,
    start_epoch_after_fit,
)
from lightning_bsl.callbacks.snapshot import StepStart
from lightning_bsl.callbacks.sources import DataSource
from lightning_bsl.schedules import Horizon, JointSchedule, Plan, plan
from lightning_bsl.schedules.plan import Beside, EpochLength, Measure, check_fits

VERSION = 3  # of what is saved in checkpoints


@dataclass
class Fit:
    """What one fit changes in the Trainer, and what it must remember to put back.

    Args:
        active: Whether it is under way.
        asks: What the user asked of the Trainer.
        undo: Puts back what was changed when it is closed.
        seed: Seed of the order of the examples.
        tokens_per_sample: As of the DataModule.
        in_tokens: Whether batch sizes are in tokens.
        first_batch: Whether the first batch is still to come.
        resumed: What the checkpoint says that it goes on from.
        after_backward: To be closed after the backward pass under way.
        clip: The ``gradient_clip_val`` of the Trainer, while a step is not clipped.
        late: Whether a step is taken that Lightning has left out.
    """

    active: bool = False
    asks: Asks = field(default_factory=Asks)
    undo: ExitStack = field(default_factory=ExitStack)
    seed: int = 0
    tokens_per_sample: int | None = None
    in_tokens: bool = False
    first_batch: bool = True
    resumed: Resumed | None = None
    after_backward: ExitStack | None = None
    clip: Any = None
    late: bool = False

    @classmethod
    def begin(cls, trainer: Trainer, clock: RunClock) -> Fit:
        """Begin a fit, or go on with one in the same Trainer: note its settings that change, and set the clock's bounds."""
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        fit = cls(True, Asks(trainer.accumulate_grad_batches, every))
        fit.seed = trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        fit.tokens_per_sample = getattr(trainer.datamodule, "tokens_per_sample", None)  # type: ignore[attr-defined]
        fit.undo.callback(setattr, trainer, "accumulate_grad_batches", fit.asks.accumulate)
        fit.undo.callback(fit.reload_as_asked, trainer)
        fit.undo.callback(fit.clip_again, trainer)
        if trainer.global_step == 0:
            clock.reset()
        end = Horizon(*(bound if bound and bound > 0 else None for bound in (trainer.max_epochs, trainer.max_steps)))
        # a smoke test of the run's beginning, whose length Lightning has overwritten, is given a length without end
        whole_run = Horizon(10**9, 10**12, 10**15) if trainer.fast_dev_run else end  # type: ignore[attr-defined]
        clock.begin(end, replace(whole_run, tokens_per_sample=fit.tokens_per_sample))
        return fit

    def is_due(self, data: DataSource, epoch: int) -> bool:
        """Whether the user wants his loaders to be asked for again in ``epoch``."""
        return self.asks.every > 0 and epoch - data.asked_at >= self.asks.every

    def reload(self, trainer: Trainer) -> None:
        """Have Lightning ask for the training loader again, so that all its counts follow the new length."""
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def reload_as_asked(self, trainer: Trainer) -> None:
        """Reload as often as the user asked for."""
        trainer.reload_dataloaders_every_n_epochs = self.asks.every  # type: ignore[attr-defined]

    def make_plan(self, trainer: Trainer, data: DataSource, schedule: JointSchedule, clock: RunClock) -> Plan | None:
        """Walk the whole run: every error of the schedules comes now, before the first step.

        Args:
            trainer: The Trainer.
            data: The training data.
            schedule: Batch size and learning rate.
            clock: Learns how long the run is.

        Returns:
            ``None`` for a run without an end, or one that is not known, such as where batch sizes are decided while training.
        """
        epoch, now, measure = data.epoch(trainer), clock.progress, data.measure
        if epoch is not None and (trainer.fast_dev_run or schedule.largest):  # type: ignore[attr-defined]
            most, unit = (epoch.num_examples, "examples") if measure is None else (measure.total(now.epoch), measure.unit)
            check_fits(schedule.largest or schedule(now).batch_size, most, now, unit)
        elif epoch is not None:
            bounds: dict[str, Any] = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
            make = partial(plan_fit, schedule, tokens_per_sample=self.tokens_per_sample, measure=measure, **bounds)
            found = make(**epoch._asdict())
            if found is not None and epoch.beside.lengths and data.splits(found):
                # the batches of another loader are then not steps, and must not end an epoch; that is checked
                found = make(**epoch._replace(beside=Beside())._asdict())
            if found is not None:
                clock.set_horizon(found.horizon)
                return found
        # at least what depends on the epoch alone must be possible
        for number in range(now.epoch, max(now.epoch + 1, min(trainer.max_epochs or 0, 10_000))):
            schedule(now._replace(epoch=number))
        return None

    def leave_unclipped(self, trainer: Trainer) -> None:
        """In ``on_before_optimizer_step``: do not clip the gradients of this call."""
        if trainer.gradient_clip_val is not None:
            self.clip, trainer.gradient_clip_val = trainer.gradient_clip_val, None

    def clip_again(self, trainer: Trainer) -> None:
        """Clip as the user asked for."""
        if self.clip is not None:
            trainer.gradient_clip_val, self.clip = self.clip, None

    def backward_is_over(self) -> None:
        """Put back what was changed for one backward pass."""
        if self.after_backward is not None:
            self.after_backward.close()
            self.after_backward = None

    def end(self) -> None:
        """Put everything back."""
        self.backward_is_over()
        self.undo.close()
        self.active = False


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says of the run that saved it.

    Args:
        horizon: How long that run was to be.
        epoch_ended: Whether Lightning goes on with the epoch after the one that the checkpoint was saved in.
        inside_step: Whether it was saved while a step was under way, which is taken again.
    """

    horizon: Horizon
    epoch_ended: bool
    inside_step: bool

    @classmethod
    def read(cls, trainer: Trainer, checkpoint: dict[str, Any], key: str, start: StepStart) -> Resumed:
        """See whether a checkpoint can be resumed, and whether Lightning will skip the end of an epoch.

        Args:
            trainer: The Trainer.
            checkpoint: The checkpoint; what it counts may be changed.
            key: Of the scheduler's state in it.
            start: Is given the random generators.

        Raises:
            MisconfigurationException: It was saved without the scheduler, or by another version.
        """
        state = checkpoint["callbacks"].get(key)
        if state is None:
            raise MisconfigurationException(
                "the checkpoint was saved by a fit without BatchLRScheduler, so it does not say how many examples that fit had "
                "consumed. To start growing from its weights, load them (`Model.load_from_checkpoint(...)`) and call `fit` "
                "without `ckpt_path`; to go on as before, leave BatchLRScheduler out"
            )
        if state.get("version") != VERSION:
            raise MisconfigurationException(
                "the checkpoint was saved by another version of lightning_bsl (format "
                f"{state.get('version', 1)}; this one reads {VERSION}), and cannot be resumed. Resume it with the version that "
                "saved it, or load its weights (`Model.load_from_checkpoint(...)`) and call `fit` without `ckpt_path`"
            )
        start_epoch_after_fit(checkpoint)
        states = state["rng"]
        start.restored = states[trainer.global_rank] if trainer.global_rank < len(states) else None
        return cls(Horizon(**state["horizon"]), ended_epoch(checkpoint, trainer.max_steps), state["inside_step"])

    def go_on(
        self, trainer: Trainer, fit: Fit, data: DataSource, clock: RunClock, schedule: JointSchedule, start: StepStart
    ) -> None:
        """In ``on_train_start``: have Lightning go on where the checkpoint's step began.

        Args:
            trainer: The Trainer.
            fit: The fit.
            data: The training data.
            clock: The run's clock.
            schedule: Batch size and learning rate.
            start: Has the random generators.
        """
        self._warn_of_jump(clock, schedule)
        done = data.batches_done()
        if self.epoch_ended:
            begin_epoch(trainer)
            # all of the next epoch's batches, at which Lightning begins it; where it has no length, none of them
            done = 0 if trainer.num_training_batches == math.inf else int(trainer.num_training_batches)
        if done is not None and not clock.finished:
            set_batches_done(trainer, done, self.epoch_ended)

        def before_fetch() -> None:
            set_steps_taken(trainer, clock.progress.step)
            # whatever was drawn since, the step that is taken again is to see the same
            if self.inside_step or clock.progress.step > clock.epoch_start.step:
                start.restore(trainer)

        start.restore(trainer)
        resume_quietly(trainer, before_fetch, data.exact, fit.undo)

    def _warn_of_jump(self, clock: RunClock, schedule: JointSchedule) -> None:
        """Warn if the schedules jump where a run goes on for another length than it was begun with."""
        now = clock.progress
        if self.horizon == now.horizon or clock.finished:
            return
        try:
            before, after = schedule(now._replace(horizon=self.horizon)), schedule(now)
        except ValueError:
            return  # beyond the end of the run as it was
        if before != after:
            rank_zero_warn(
                f"the run goes on for another length than it was begun with, and its schedules count in fractions of it: at "
                f"epoch {now.epoch} the batch size jumps from {before.batch_size} to {after.batch_size} and the "
                f"learning rate from {before.lr} to {after.lr}. Write the lengths (`every`, `over`, `total`) as ints to go on "
                "without a jump"
            )


def plan_fit(
    schedule: JointSchedule,
    num_examples: int,
    max_epochs: int | None = None,
    max_steps: int = -1,
    limit_train_batches: float | None = None,
    epoch_length: EpochLength | None = None,
    tokens_per_sample: int | None = None,
    drop_last: bool = False,
    beside: Beside = Beside(),  # noqa: B008 (immutable)
    measure: Measure | None = None,
) -> Plan | None:
    """The plan of a fit, from the Trainer's arguments; ``None`` for a fit without an end.

    Args:
        schedule: Batch size and learning rate.
        num_examples: Training examples of an epoch.
        max_epochs: As of ``Trainer``; -1 for no bound.
        max_steps: As of ``Trainer``.
        limit_train_batches: As of ``Trainer``.
        epoch_length: As of [`plan`][lightning_bsl.schedules.plan].
        tokens_per_sample: As of [`plan`][lightning_bsl.schedules.plan].
        drop_last: As of [`plan`][lightning_bsl.schedules.plan].
        beside: As of [`plan`][lightning_bsl.schedules.plan].
        measure: As of [`plan`][lightning_bsl.schedules.plan].
    """
    if max_epochs is None and max_steps == -1:
        max_epochs = 1000  # as Trainer does
    epochs, steps = (None if bound is None or bound < 0 else bound for bound in (max_epochs, max_steps))
    limit = 1.0 if limit_train_batches is None else limit_train_batches
    if (epochs is None and steps is None) or epochs == 0 or steps == 0 or limit == 0:
        return None
    return plan(
        schedule,
        num_examples,
        epochs=epochs,
        steps=steps,
        tokens_per_sample=tokens_per_sample,
        limit_batches=limit,
        drop_last=drop_last,
        beside=beside,
        epoch_length=epoch_length,
        measure=measure,
    )
