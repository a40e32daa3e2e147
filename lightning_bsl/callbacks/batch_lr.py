"""The batch size and the learning rate follow a schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_bsl.callbacks.clock import RunClock, StepSetting
from lightning_bsl.callbacks.compatibility import (
    check_batch_norm,
    check_beside_scheduler,
    check_ceiling,
    check_grows,
    check_same_on_all_processes,
    check_split,
    check_val_interval,
    refuse,
)
from lightning_bsl.callbacks.compile import expect_other_sizes
from lightning_bsl.callbacks.loop import (
    before_batch_counts,
    begin_epoch,
    begin_loading_again,
    ended_epoch,
    load_training_data,
    remake_training_data,
    resume_quietly,
    set_batches_done,
    set_epoch_length,
    start_epoch_after_fit,
    take_step,
    walk_steps,
    writes_step,
)
from lightning_bsl.callbacks.micro_batches import MemoryCeiling, StepSplitter
from lightning_bsl.callbacks.rates import OwnRates, Rates, ScaledRates
from lightning_bsl.callbacks.snapshot import StepStart
from lightning_bsl.callbacks.sources import Asks, DataSource, source_of
from lightning_bsl.schedules import Horizon, JointSchedule, Plan, Progress, ScalingRule, plan
from lightning_bsl.schedules.functions import Function, Schedule
from lightning_bsl.schedules.plan import Beside, EpochLength, check_fits

_VERSION = 2  # of what is saved in checkpoints


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
    )


@dataclass
class Fit:
    """What one fit changes, and what it must remember to put back.

    Args:
        active: Whether it is under way.
        asks: What the user asked of the Trainer.
        undo: Puts back what was changed when it is closed.
        seed: Seed of the order of the examples.
        tokens_per_sample: As of the DataModule.
        first_batch: Whether the first batch is still to come.
        opened: Index of the batch that Lightning gave to be trained; -1 between batches.
        resumed: The horizon of the run that saved the checkpoint, if it goes on from one.
        epoch_ended: Whether Lightning goes on with the epoch after the one that the checkpoint was saved in.
        stale: Whether the loader began before the checkpoint was read.
    """

    active: bool = False
    asks: Asks = Asks()
    undo: ExitStack = field(default_factory=ExitStack)
    seed: int = 0
    tokens_per_sample: int | None = None
    first_batch: bool = True
    opened: int = -1
    resumed: Horizon | None = None
    epoch_ended: bool = False
    stale: bool = False

    @classmethod
    def begin(cls, trainer: Trainer) -> Fit:
        """A fit that is under way; the Trainer's settings that change are noted."""
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        fit = cls(True, Asks(trainer.accumulate_grad_batches, every))
        fit.seed = trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        fit.tokens_per_sample = getattr(trainer.datamodule, "tokens_per_sample", None)  # type: ignore[attr-defined]
        fit.undo.callback(setattr, trainer, "accumulate_grad_batches", fit.asks.accumulate)
        fit.undo.callback(fit.reload_as_asked, trainer)
        return fit

    def reload(self, trainer: Trainer) -> None:
        """Have Lightning ask for the training loader again, so that all its counts follow the new length."""
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def reload_as_asked(self, trainer: Trainer) -> None:
        """Reload as often as the user asked for."""
        trainer.reload_dataloaders_every_n_epochs = self.asks.every  # type: ignore[attr-defined]

    def end(self) -> None:
        """Put everything back."""
        self.undo.close()
        self.active = False


class BatchLRScheduler(Callback):
    """Grows the batch size and the learning rate while a model trains.

    Every optimizer step has exactly the batch size and the learning rate that the schedules give for it, inside an epoch too.
    That holds for every map-style ``DataLoader``, wherever it comes from (a DataModule, the LightningModule, an argument of
    ``fit``): for the fit it is re-made with a sampler of ours in it, and has its data set, collation, workers and the rest as
    before. ``shuffle=True`` becomes a permutation that depends on the seed and the epoch alone. A sampler is asked for its order
    once an epoch. A loader that cannot be re-made (over a stream, or with a batch sampler of its own) is accepted where it
    follows ``self.batch_size`` or ``self.hparams.batch_size``; its batch size changes between epochs only.

    The batch size is that of one optimizer step, over all processes and accumulated batches. Learning rates are set in
    every param group; groups keep the ratio to the first one that they are added with. Logs
    ``batch_size``, ``lr`` (of the first group) and ``samples`` (examples consumed so far); ``tokens`` too where the
    DataModule has an attribute ``tokens_per_sample``.

    Args:
        batch_size: An ``int``, a schedule, or a function ``progress -> float``.
        lr: A ``float``, a schedule, a function ``progress -> float``, a scaling rule (a function of the batch size), or
            ``None`` to leave the learning rates to the module. Where the module has a scheduler of its own, a scaling rule
            multiplies what that sets, by the rule's rate for the batch size over the rule's own (its first argument).
        max_device_batch_size: Most examples that one process puts through the model at once. A larger step is split into
            micro-batches, and its gradient is the mean over its examples all the same. ``"auto"`` halves the micro-batch
            whenever memory runs out, and repeats the step.
        loader: Which training loader follows the schedule, where there are several: its key or its index. By default the one
            that follows ``batch_size``.

    Raises:
        ValueError: ``max_device_batch_size`` is no number above 0 and not "auto". At fit start: a batch size below 1 or above
            the data set, a learning rate that is not above 0 and finite, a schedule over a fraction of a run that has no end,
            a horizon shorter than a warm-up.
        MisconfigurationException: At fit start: something in the fit that cannot work, with the remedy.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_bsl.schedules import Exponential
        >>> scheduler = BatchLRScheduler(
        ...     batch_size=Exponential(8, factor=2, every=30, unit="epoch", maximum=4096),
        ...     lr=Exponential(0.1, factor=1.4, every=30, unit="epoch"),
        ...     max_device_batch_size=1024,
        ... )
        >>> trainer = Trainer(max_epochs=300, callbacks=[scheduler], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        batch_size: int | Schedule | Function,
        lr: float | Schedule | ScalingRule | Function | None = None,
        max_device_batch_size: int | Literal["auto"] | None = None,
        loader: str | int | None = None,
    ) -> None:
        size = max_device_batch_size
        if size is not None and (size < 1 if isinstance(size, int) else size != "auto"):
            raise ValueError(f"`max_device_batch_size={size!r}` must be 1 or more, 'auto', or None for no bound")
        self.max_device_batch_size = max_device_batch_size
        self.loader = loader
        self.schedule = JointSchedule(batch_size, lr)
        self.plan: Plan | None = None
        self._fit = Fit()
        self._clock = RunClock()
        self._setting = StepSetting()
        self._splitter = MemoryCeiling() if isinstance(size, str) else StepSplitter(size)
        self._start = StepStart()
        self._data: DataSource | None = None
        self._rates: Rates | None = None

    @property
    def progress(self) -> Progress:
        """The clock: what has been trained so far."""
        return self._clock.progress

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self._clock.finished

    @property
    def fitting(self) -> bool:
        """Whether a fit is under way; not while the Trainer validates or tests."""
        return self._fit.active

    @property
    def training_loader(self) -> Any:
        """The loader that follows the schedule, in a fit."""
        return self._data.loaders.flattened[self._data.index] if self._data is not None else None

    @property
    def micro_batch(self) -> tuple[int, float] | None:
        """This process's examples in the backward pass under way, and the factor of their mean loss."""
        return (self._splitter.micro_batch, self._splitter.weight) if self._splitter.under_way else None

    @property
    def corrected(self) -> float:
        """What the gradients of the step under way were multiplied by, as some micro-batches had nothing to train."""
        return self._splitter.corrected

    @property
    def handed_out(self) -> int:
        """Samples before the first example that was not yet handed out to the loader's workers."""
        return self._clock.epoch_start.samples + (self._data.handed_out if self._data else 0)

    def estimated_steps(self, trainer: Trainer) -> int:
        """Optimizer steps of the whole fit, for a scheduler made in ``configure_optimizers``.

        ``trainer.estimated_stepping_batches`` counts every epoch with today's batch size; this follows the schedule.

        Args:
            trainer: The Trainer, in a fit.

        Raises:
            RuntimeError: Called before the fit has begun (``configure_optimizers`` is the earliest).
            ValueError: The run has no end, or one that cannot be seen from the training loader.
        """
        if not any(callback is self for callback in trainer.callbacks) or trainer.state.fn != TrainerFn.FITTING:  # type: ignore[attr-defined]
            raise RuntimeError("`estimated_steps` is known from `configure_optimizers` on, in a fit of this Trainer")
        load_training_data(trainer)
        if self.plan is None:
            raise ValueError(
                "the number of steps is not known: give the Trainer `max_epochs` or `max_steps`, and a training loader with "
                "a length"
            )
        return self.plan.steps

    def reschedule(self, trainer: Trainer, schedule: JointSchedule) -> None:
        """Follow another schedule from the first example on that no worker was given yet.

        Args:
            trainer: The Trainer, in a fit.
            schedule: Equal to the one before up to ``handed_out``.
        """
        self.schedule = schedule
        if self._data is not None:
            self._data.follow(schedule)
            if not trainer.is_last_batch:
                set_epoch_length(trainer, self._data.index, len(self._data.loaders.flattened[self._data.index]))
            self._look_up()

    # --- start of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the fit, and have Lightning train on loaders that follow the plan."""
        if stage != "fit":
            return
        if sum(isinstance(callback, BatchLRScheduler) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException("there are two BatchLRScheduler among the callbacks; keep one")
        refuse(trainer, pl_module, self.schedule, self.max_device_batch_size)
        self._fit = Fit.begin(trainer)
        self.plan = self._data = None
        self._start = StepStart()
        self._splitter.drop()
        if trainer.global_step == 0:
            self._clock.reset()
        end = Horizon(*(bound if bound and bound > 0 else None for bound in (trainer.max_epochs, trainer.max_steps)))
        # a smoke test of the run's beginning, whose length Lightning has overwritten, is given a length without end
        whole_run = Horizon(10**9, 10**12, 10**15) if trainer.fast_dev_run else end  # type: ignore[attr-defined]
        self._clock.begin(end, replace(whole_run, tokens_per_sample=self._fit.tokens_per_sample))
        remake_training_data(trainer, lambda ask: self._loaders(trainer, pl_module, ask), self._fit.undo)
        before_batch_counts(trainer, lambda batch_idx: self._pass(trainer, batch_idx), self._fit.undo)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See whether the checkpoint can be resumed, and whether Lightning will skip the end of an epoch."""
        if not self._fit.active:
            return  # the checkpoint is validated or tested
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            raise MisconfigurationException(
                "the checkpoint was saved by a fit without BatchLRScheduler, so it does not say how many examples that fit had "
                "consumed. To start growing from its weights, load them (`Model.load_from_checkpoint(...)`) and call `fit` "
                "without `ckpt_path`; to go on as before, leave BatchLRScheduler out"
            )
        if state.get("version") != _VERSION:
            raise MisconfigurationException(
                f"the checkpoint was saved by another version of lightning_bsl (its format is {state.get('version', 1)}, this is "
                f"{_VERSION}), which took the examples in another order. Resume it with the version that saved it, or load its "
                "weights (`Model.load_from_checkpoint(...)`) and call `fit` without `ckpt_path`"
            )
        start_epoch_after_fit(checkpoint)
        self._fit.epoch_ended = ended_epoch(checkpoint, trainer.max_steps)
        self._fit.resumed = Horizon(**state["horizon"])
        states = state["rng"]
        self._start.restored = states[trainer.global_rank] if trainer.global_rank < len(states) else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clock."""
        if not self._fit.active:
            return
        self._fit.stale = self._data is not None
        self._clock.load_state_dict(state_dict, self._fit.epoch_ended)
        self._fit.seed = state_dict.get("seed", self._fit.seed)
        if isinstance(self._splitter, MemoryCeiling):
            self._splitter.size = state_dict["micro_batch_size"]

    def state_dict(self) -> dict[str, Any]:
        """The clock, the seed, and the largest micro-batch where one was found: plain integers."""
        found = self._splitter.size if isinstance(self._splitter, MemoryCeiling) else None
        return self._clock.state_dict() | {"version": _VERSION, "seed": self._fit.seed, "micro_batch_size": found}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random generators of every process, so that a resumed run draws the same dropout masks."""
        checkpoint["callbacks"][self.state_key]["rng"] = self._start.write(trainer, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers, and see who owns the learning rates."""
        if isinstance(self._splitter, MemoryCeiling):
            check_ceiling(trainer, pl_module)
        check_beside_scheduler(trainer, self.schedule)
        rule = self.schedule.lr
        if rule is not None and not trainer.lr_scheduler_configs:
            self._rates = OwnRates(trainer.optimizers)
        else:
            scaling = rule if isinstance(rule, ScalingRule) else None
            self._rates = ScaledRates(trainer.optimizers, scaling, self._fit.undo)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what can be checked only now, and set the first learning rate."""
        fit, data, splitter = self._fit, self._data, self._splitter
        assert data is not None
        check_grows(trainer, data, self.plan, self.schedule)
        check_split(trainer, pl_module, data, self.plan, self._largest_step())
        check_val_interval(trainer, data, self.plan)
        check_same_on_all_processes(trainer, self.plan, data)
        check_batch_norm(pl_module, data, self.plan, splitter, fit.undo)
        if isinstance(splitter, MemoryCeiling):
            walk_steps(trainer, lambda batch, train: splitter.step(trainer, batch, train), fit.undo)
        if fit.resumed is not None:
            self._resume(trainer, data, fit.resumed)
        self._look_up()

    def _resume(self, trainer: Trainer, data: DataSource, before: Horizon) -> None:
        """Have Lightning go on where the checkpoint's step began."""
        self._warn_of_jump(before)
        done = data.batches_done()
        if self._fit.epoch_ended:
            begin_epoch(trainer)
        if not self._clock.finished and (self._fit.epoch_ended or done is not None):
            set_batches_done(trainer, int(min(trainer.num_training_batches, 10**9)) if self._fit.epoch_ended else done or 0)
        if self._fit.stale:
            begin_loading_again(trainer)
        self._start.restore(trainer)
        resume_quietly(trainer, lambda: self._restore_inside_epoch(trainer), done is not None, self._fit.undo)

    def _restore_inside_epoch(self, trainer: Trainer) -> None:
        """Whatever was drawn since, the step that is taken again is to see the same."""
        if self._clock.progress.step > self._clock.epoch_start.step:
            self._start.restore(trainer)

    # --- training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rate of the epoch's first step."""
        self._look_up()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open a step, or its next micro-batch."""
        self._fit.reload_as_asked(trainer)  # the loader of this epoch is made
        if self._fit.first_batch:
            self._fit.first_batch = False
            if self.plan is None or len({stage.batch_size for stage in self.plan.stages}) > 1:
                expect_other_sizes(batch)
        self._open(trainer, batch_idx)
        splitter = self._splitter
        if splitter.part == 0 or self._start.rng is None:
            self._start.note(trainer, splitter.split)
        if splitter.split and not splitter.has_gradient:
            trainer.optimizers[0].zero_grad()
        if self._rates is not None:
            self._rates.note()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weigh the loss so that the step's gradient is the mean over its examples, however they are split."""
        self._splitter.note_backward()
        # Lightning has divided the loss by the number of accumulated batches, and DDP averages over the processes
        weight = self._splitter.weight * trainer.accumulate_grad_batches
        if weight != 1:
            loss.register_hook(lambda gradient: gradient * weight)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Make the gradient the mean over what was trained, where micro-batches had nothing to train."""
        correction = self._splitter.correction if self._splitter.under_way else 1.0
        if correction != 1 and self._splitter.corrected == 1:
            self._splitter.corrected = correction
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(correction)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the clock; log the step that was, set the learning rate of the next."""
        assert self._data is not None
        self._fit.opened = -1
        examples = self._data.consumed(self._splitter)
        if not self._splitter.end_piece(trainer.is_last_batch):
            return
        clock, setting = self._clock, self._setting
        clock.advance(examples, 1)
        self._start.clear()
        # for the progress bar
        first = clock.progress.step == clock.epoch_start.step + 1 and setting.value != setting.logged
        if first or writes_step(trainer):
            self._log(pl_module, on_step=True, on_epoch=False)
        if clock.progress.step >= setting.settled_until and not trainer.is_last_batch:
            self._look_up()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log beside the validation metrics."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._log(pl_module, on_step=False, on_epoch=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log beside the epoch's metrics, then put the next epoch's batch size in place."""
        self._log(pl_module, on_step=False, on_epoch=True)
        clock, data = self._clock, self._data
        if clock.epoch_start.epoch > trainer.current_epoch or data is None:
            return  # a resumed run ends the same epoch a second time
        self._splitter.drop()  # the epoch may have ended inside a step
        self._start.clear()
        before = data.shape()
        clock.next_epoch()
        if clock.finished:
            return
        if data.shape() != before or self._is_due(data):
            self._fit.reload(trainer)
        self._look_up()  # before the others' `on_train_epoch_start`: LearningRateMonitor reads the rate there

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave everything as it was: Lightning does not call ``teardown`` then."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer, the loaders and the optimizers as they were."""
        if stage == "fit":
            self._fit.end()
            if self._data is not None:
                self._data.close()
            self._data = self._rates = None

    # --- parts

    def _loaders(self, trainer: Trainer, pl_module: LightningModule, ask: Callable[[], Any]) -> Any:
        """What Lightning is to train on, whenever it asks for the training loaders."""
        if self._data is not None:
            return self._data.again(ask, self._is_due(self._data))
        self._data = source_of(
            trainer,
            pl_module,
            ask,
            clock=self._clock,
            splitter=self._splitter,
            schedule=self.schedule,
            name=self.loader,
            seed=self._fit.seed,
            asks=self._fit.asks,
            undo=self._fit.undo,
        )
        self._splitter.begin_fit(self._data.cut)
        self._make_plan(trainer, self._data)
        return self._data.loaders

    def _is_due(self, data: DataSource) -> bool:
        """Whether the user wants his loaders to be asked for again."""
        every = self._fit.asks.every
        return every > 0 and self._clock.loader_start.epoch - data.asked_at >= every

    def _make_plan(self, trainer: Trainer, data: DataSource) -> None:
        """Walk the whole run: every error of the schedules comes now, before the first step."""
        epoch, now = data.epoch(trainer), self._clock.progress
        if epoch is not None and (trainer.fast_dev_run or self.schedule.largest):  # type: ignore[attr-defined]
            check_fits(self.schedule.largest or self.schedule(now).batch_size, epoch.num_examples, now)
        elif epoch is not None:
            self.plan = plan_fit(
                self.schedule,
                max_epochs=trainer.max_epochs,
                max_steps=trainer.max_steps,
                tokens_per_sample=self._fit.tokens_per_sample,
                **epoch._asdict(),
            )
        if self.plan is not None:
            self._clock.set_horizon(self.plan.horizon)
        else:  # no end to plan towards, or none that is known: at least what depends on the epoch alone must be possible
            for number in range(now.epoch, max(now.epoch + 1, min(trainer.max_epochs or 0, 10_000))):
                self.schedule(now._replace(epoch=number))

    def _largest_step(self) -> int:
        sizes = [stage.batch_size for stage in self.plan.stages] if self.plan else []
        return self.schedule.largest or max(sizes, default=self.schedule.batch_size_at(self._clock.epoch_start))

    def _open(self, trainer: Trainer, batch_idx: int) -> None:
        """Begin a micro-batch, and the step if it is its first."""
        assert self._data is not None
        splitter, batch_size = self._splitter, self._setting.value.batch_size
        if not splitter.under_way:
            splitter.begin(self._data.step_examples(batch_size), batch_size)
        splitter.begin_piece(self._data.count())
        trainer.accumulate_grad_batches = splitter.windows(batch_idx)
        self._fit.opened = batch_idx

    def _pass(self, trainer: Trainer, batch_idx: int) -> None:
        """A batch is over, trained or not: take the step that is complete where Lightning did not."""
        splitter, given = self._splitter, self._fit.opened == batch_idx
        if not given:  # the batch is None
            if trainer.world_size > 1:
                raise RuntimeError(
                    "the training loader gave a batch that is None, while other processes train on theirs: none can skip a "
                    "batch alone. Have `collate_fn` leave out only what it cannot read, or put something in its place"
                )
            self._open(trainer, batch_idx)
        complete = splitter.last or trainer.is_last_batch
        if not (splitter.split and complete and splitter.has_gradient) or splitter.has_loss:
            return
        if not given or getattr(trainer.precision_plugin, "scaler", None) is not None:
            take_step(trainer, batch_idx, counted=given)

    def _look_up(self) -> None:
        """Look up the next step and set its learning rate."""
        assert self._data is not None
        clock = self._clock
        if clock.finished or (self.plan is not None and clock.progress.step >= self.plan.steps):
            return  # a loader may go on for longer than could be seen: then the last rate stays
        self._setting.look_up(self.schedule, clock.progress, self._data.sizes_at())
        if self._rates is not None:
            self._rates.apply(self._setting.value)

    def _warn_of_jump(self, horizon: Horizon) -> None:
        """Warn if the schedules jump where a run goes on for another length than it was begun with."""
        now = self._clock.progress
        if horizon == now.horizon or self._clock.finished:
            return
        try:
            before, after = self.schedule(now._replace(horizon=horizon)), self.schedule(now)
        except ValueError:
            return  # beyond the end of the run as it was
        if before != after:
            rank_zero_warn(
                f"the run goes on for another length than it was begun with, and its schedules count in fractions of it: at "
                f"epoch {now.epoch} the batch size jumps from {before.batch_size} to {after.batch_size} and the "
                f"learning rate from {before.lr} to {after.lr}. Write the lengths (`every`, `over`, `total`) as ints to go on "
                "without a jump"
            )

    def _log(self, pl_module: LightningModule, on_step: bool, on_epoch: bool) -> None:
        setting, samples = self._setting, self._clock.progress.samples
        setting.logged = setting.value
        lr = self._rates.rate if self._rates is not None else 0.0
        values = {"batch_size": setting.value.batch_size, "lr": lr, "samples": samples}
        if self._fit.tokens_per_sample is not None:
            values["tokens"] = samples * self._fit.tokens_per_sample
        for name, value in values.items():
            pl_module.log(
                name,
                torch.tensor(value, dtype=torch.float64),  # float32 counts examples only up to 2**24
                prog_bar=name not in ("samples", "tokens"),
                on_step=on_step,
                on_epoch=on_epoch,
                reduce_fx="max",
                batch_size=1,
            )
