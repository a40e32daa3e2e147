"""The settings that a fit changes and restores, its plan, and the resume from a checkpoint."""

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
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.plan import Beside, EpochLength, Measure, check_fits
from lightning_bsl.schedules.progress import VERY_LONG

VERSION = 5  # format of the state in checkpoints


@dataclass(frozen=True)
class Budget:
    """The end of a run in samples or tokens.

    Args:
        max_samples: In samples; ``None`` for no such end.
        max_tokens: In tokens.

    Raises:
        ValueError: A number that is not whole or below 1, or both.

    Example:
        >>> Budget(max_tokens=1000).samples(tokens_per_sample=64)
        16
    """

    max_samples: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_samples", "max_tokens"):
            check_whole(name, getattr(self, name), instead=", or None for no such end of the run", or_none=True)
        if self.max_samples is not None and self.max_tokens is not None:
            raise ValueError(
                f"`max_samples={self.max_samples}` and `max_tokens={self.max_tokens}` both end the run; write one of them"
            )

    def samples(self, tokens_per_sample: int | None) -> int | None:
        """The number of samples that reaches it; ``None`` if there is no such end.

        Args:
            tokens_per_sample: Tokens of an example, if they are all of one length.

        Raises:
            ValueError: The number of tokens of an example is not known.
        """
        if self.max_tokens is None:
            return self.max_samples
        if tokens_per_sample is None:
            raise ValueError(
                f"`max_tokens={self.max_tokens}`, but the number of tokens of an example is not known: give the DataModule an "
                "attribute `tokens_per_sample` (the text data sets have it), or write `max_samples`"
            )
        return -(-self.max_tokens // tokens_per_sample)


@dataclass
class Fit:
    """The state of one fit, and the Trainer's settings that it changes and restores.

    Args:
        active: Whether the fit is running.
        asks: The user's settings of the Trainer.
        undo: Restores all changes when it is closed.
        seed: Seed of the order of the examples.
        tokens_per_sample: The attribute of the DataModule.
        in_tokens: Whether batch sizes count tokens.
        whole_batches: Whether steps are made of whole batches of the loader, or the size of these.
        multiple: Every batch size is rounded up to a multiple of it.
        first_batch: Whether no batch has been trained yet.
        resumed: The checkpoint from which the fit resumes, if there is one.
        after_backward: To be closed after the current backward pass.
        clip: The user's ``gradient_clip_val``, while clipping is switched off for a step.
        late: Whether the current step is one that Lightning skipped.
    """

    active: bool = False
    asks: Asks = field(default_factory=Asks)
    undo: ExitStack = field(default_factory=ExitStack)
    seed: int = 0
    tokens_per_sample: int | None = None
    in_tokens: bool = False
    whole_batches: bool | int = False
    multiple: int = 1
    first_batch: bool = True
    resumed: Resumed | None = None
    after_backward: ExitStack | None = None
    clip: Any = None
    late: bool = False

    @classmethod
    def begin(cls, trainer: Trainer, clock: RunClock, budget: Budget) -> Fit:
        """Begin a fit: remember the Trainer's settings, and set the end of the clock.

        Args:
            trainer: The Trainer.
            clock: The clock of the run.
            budget: The end of the run in samples or tokens.
        """
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        fit = cls(True, Asks(trainer.accumulate_grad_batches, every))
        fit.seed = trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        fit.tokens_per_sample = getattr(trainer.datamodule, "tokens_per_sample", None)  # type: ignore[attr-defined]
        fit.undo.callback(setattr, trainer, "accumulate_grad_batches", fit.asks.accumulate)
        fit.undo.callback(fit.reload_as_asked, trainer)
        fit.undo.callback(fit.clip_again, trainer)
        if trainer.global_step == 0:
            clock.reset()
        epochs, steps = (bound if bound and bound > 0 else None for bound in (trainer.max_epochs, trainer.max_steps))
        samples = budget.samples(fit.tokens_per_sample)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Lightning overwrites the length of the run, so schedules get a very long one
            end, whole_run = Horizon(epochs, steps), VERY_LONG
        else:
            end = Horizon(epochs, steps, samples)
            # with several bounds it is known with the plan which comes first
            whole_run = end if samples is None else Horizon(samples=samples)
        clock.begin(end, replace(whole_run, tokens_per_sample=fit.tokens_per_sample))
        return fit

    @property
    def positions(self) -> list[Any] | None:
        """The positions in a stream from which the fit resumes."""
        return None if self.resumed is None or self.resumed.epoch_ended else self.resumed.positions

    def is_due(self, data: DataSource, epoch: int) -> bool:
        """Whether the user wants new loaders in ``epoch`` (``reload_dataloaders_every_n_epochs``)."""
        return self.asks.every > 0 and epoch - data.asked_at >= self.asks.every

    def reload(self, trainer: Trainer) -> None:
        """Make Lightning ask for the training loader again, so that its counts follow the new length."""
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def reload_as_asked(self, trainer: Trainer) -> None:
        """Restore the user's ``reload_dataloaders_every_n_epochs``."""
        trainer.reload_dataloaders_every_n_epochs = self.asks.every  # type: ignore[attr-defined]

    def make_plan(self, trainer: Trainer, data: DataSource, schedule: JointSchedule, clock: RunClock) -> Plan | None:
        """Plan the whole run, so that every error of the schedules comes before the first step.

        Args:
            trainer: The Trainer.
            data: The training data.
            schedule: Batch size and learning rate.
            clock: Gets the length of the run.

        Returns:
            The plan; ``None`` if the run has no end, or if its end or its batch sizes are not known before training.
        """
        epoch, now, measure = data.epoch(trainer), clock.progress, data.measure
        if epoch is not None and (trainer.fast_dev_run or schedule.largest):  # type: ignore[attr-defined]
            most, unit = (epoch.num_examples, "examples") if measure is None else (measure.total(now.epoch), measure.unit)
            check_fits(schedule.largest or schedule(now).batch_size, most, now, unit)
        elif epoch is not None:
            bounds: dict[str, Any] = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
            bounds["max_samples"] = clock.end.samples
            make = partial(plan_fit, schedule, tokens_per_sample=self.tokens_per_sample, measure=measure, **bounds)
            run_plan = make(**epoch._asdict())
            if run_plan is not None and epoch.beside.lengths and data.splits(run_plan):
                # the batches of other loaders are then not steps; `check_split` refuses one that would end the epoch
                run_plan = make(**epoch._replace(beside=Beside())._asdict())
            if run_plan is not None:
                clock.set_horizon(run_plan.horizon)
                return run_plan
        # without a plan, check at least the values at the starts of epochs
        for number in range(now.epoch, max(now.epoch + 1, min(trainer.max_epochs or 0, 10_000))):
            schedule(now._replace(epoch=number))
        return None

    def leave_unclipped(self, trainer: Trainer) -> None:
        """Called in ``on_before_optimizer_step``: switch clipping off for this call."""
        if trainer.gradient_clip_val is not None:
            self.clip, trainer.gradient_clip_val = trainer.gradient_clip_val, None

    def clip_again(self, trainer: Trainer) -> None:
        """Restore the user's ``gradient_clip_val``."""
        if self.clip is not None:
            trainer.gradient_clip_val, self.clip = self.clip, None

    def backward_is_over(self) -> None:
        """Undo the changes for one backward pass."""
        if self.after_backward is not None:
            self.after_backward.close()
            self.after_backward = None

    def end(self) -> None:
        """Restore everything."""
        self.backward_is_over()
        self.undo.close()
        self.active = False


@dataclass(frozen=True)
class Resumed:
    """A checkpoint from which a fit resumes.

    Args:
        horizon: Length of the run that saved it, in each unit.
        epoch_ended: Whether Lightning goes on with the next epoch, not with the one in which the checkpoint was saved.
        inside_step: Whether it was saved inside a step, which then starts again.
        multiple: Of which every batch size was a multiple.
        positions: The position of each process in its stream, if the data are a stream.
    """

    horizon: Horizon
    epoch_ended: bool
    inside_step: bool
    multiple: int = 1
    positions: list[Any] | None = None

    @classmethod
    def read(cls, trainer: Trainer, checkpoint: dict[str, Any], key: str, start: StepStart) -> Resumed:
        """Read a checkpoint, and check that a fit can resume from it.

        Args:
            trainer: The Trainer.
            checkpoint: The checkpoint; its counts may be corrected in place.
            key: Key of the scheduler's state in it.
            start: Gets the states of the random generators.

        Raises:
            MisconfigurationException: The checkpoint was saved without the scheduler, or by another version of it.
        """
        state = checkpoint["callbacks"].get(key)
        if state is None:
            raise MisconfigurationException(
                "the checkpoint was saved by a fit without BatchLRScheduler, so it does not say how many examples the fit had "
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
        ended = ended_epoch(checkpoint, trainer.max_steps)
        return cls(Horizon(**state["horizon"]), ended, state["inside_step"], state["multiple"], state["positions"])

    def go_on(
        self, trainer: Trainer, fit: Fit, data: DataSource, clock: RunClock, schedule: JointSchedule, start: StepStart
    ) -> None:
        """Called in ``on_train_start``: make Lightning go on at the start of the step in which the checkpoint was saved.

        Args:
            trainer: The Trainer.
            fit: The fit.
            data: The training data.
            clock: The clock of the run.
            schedule: Batch size and learning rate.
            start: Has the states of the random generators.

        Raises:
            MisconfigurationException: Inside an epoch, batch sizes that are multiples of another number.
        """
        if self.multiple != fit.multiple and clock.behind:
            raise MisconfigurationException(
                f"the checkpoint was saved inside an epoch whose batch sizes were multiples of {self.multiple}; now they are "
                f"multiples of {fit.multiple}, so the steps of the epoch are others: with `whole_batches` resume with the same "
                "batches on the same number of processes, or from the end of an epoch"
            )
        self._warn_of_jump(clock, schedule)
        done = data.batches_done()
        if self.epoch_ended:
            begin_epoch(trainer)
            # Lightning begins the next epoch if all of its batches count as done; none if its length is not known
            done = 0 if trainer.num_training_batches == math.inf else int(trainer.num_training_batches)
        if done is not None and not clock.finished:
            set_batches_done(trainer, done, self.epoch_ended)

        def before_fetch() -> None:
            set_steps_taken(trainer, clock.progress.step)
            # random numbers may have been drawn since; the repeated step must draw the same as before
            if self.inside_step or clock.progress.step > clock.epoch_start.step:
                start.restore(trainer)

        start.restore(trainer)
        resume_quietly(trainer, before_fetch, data.exact, fit.undo)

    def _warn_of_jump(self, clock: RunClock, schedule: JointSchedule) -> None:
        """Warn if the schedules jump because the run goes on with another length than it began with."""
        now = clock.progress
        if self.horizon == now.horizon or clock.finished:
            return
        try:
            before, after = schedule(now._replace(horizon=self.horizon)), schedule(now)
        except ValueError:
            return  # after the end of the run that saved the checkpoint
        if before != after:
            rank_zero_warn(
                f"the run goes on with another length than it began with, and its schedules count in fractions of this length. "
                f"At epoch {now.epoch} the batch size jumps from {before.batch_size} to {after.batch_size} and the learning "
                f"rate from {before.lr} to {after.lr}. Write the lengths (`every`, `over`, `total`) as ints to go on without a "
                "jump"
            )


def plan_fit(
    schedule: JointSchedule,
    num_examples: int,
    max_epochs: int | None = None,
    max_steps: int = -1,
    limit_train_batches: float | None = None,
    max_samples: int | None = None,
    epoch_length: EpochLength | None = None,
    tokens_per_sample: int | None = None,
    drop_last: bool = False,
    beside: Beside = Beside(),  # noqa: B008 (immutable)
    measure: Measure | None = None,
) -> Plan | None:
    """Plan a fit from the Trainer's arguments. The other arguments are those of [`plan`][lightning_bsl.schedules.plan].

    Args:
        schedule: Batch size and learning rate.
        num_examples: Training examples of an epoch.
        max_epochs: As for ``Trainer``; -1 for no limit.
        max_steps: As for ``Trainer``.
        limit_train_batches: As for ``Trainer``.
        max_samples: As for ``BatchLRScheduler``.
        epoch_length: As for ``plan``.
        tokens_per_sample: As for ``plan``.
        drop_last: As for ``plan``.
        beside: As for ``plan``.
        measure: As for ``plan``.

    Returns:
        The plan; ``None`` for a fit without an end or without a step.

    Raises:
        ValueError: An error of the schedule (see ``plan``).

    Example:
        >>> from lightning_bsl.schedules import Exponential
        >>> growing = JointSchedule(Exponential(8, factor=2, every=1), 0.1)
        >>> [stage.batch_size for stage in plan_fit(growing, num_examples=100, max_epochs=3).stages]
        [8, 16, 32]
    """
    if max_epochs is None and max_steps == -1:
        max_epochs = 1000  # the default of Trainer
    epochs, steps = (None if bound is None or bound < 0 else bound for bound in (max_epochs, max_steps))
    limit = 1.0 if limit_train_batches is None else limit_train_batches
    if (epochs is None and steps is None and max_samples is None) or epochs == 0 or steps == 0 or limit == 0:
        return None
    return plan(
        schedule,
        num_examples,
        epochs=epochs,
        steps=steps,
        samples=max_samples,
        tokens_per_sample=tokens_per_sample,
        limit_batches=limit,
        drop_last=drop_last,
        beside=beside,
        epoch_length=epoch_length,
        measure=measure,
    )
