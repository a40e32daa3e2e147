"""The callback that lets batch size and learning rate follow a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_bsl.callbacks.clock import RunClock, StepSetting
from lightning_bsl.callbacks.compatibility import check_beside_scheduler, check_ceiling, check_training, refuse
from lightning_bsl.callbacks.compile import expect_other_sizes
from lightning_bsl.callbacks.constants import FollowingConstants, check_momentum, read_follow
from lightning_bsl.callbacks.fit import VERSION, Budget, Fit, Resumed, plan_fit
from lightning_bsl.callbacks.loop import (
    before_batch_counts,
    count_batch_that_ended_epoch,
    forget_training_data,
    isolate_validation,
    load_training_data,
    remake_training_data,
    set_epoch_length,
    walk_steps,
    writes_step,
)
from lightning_bsl.callbacks.loss_terms import LossTerms, MaskWarning, without_gradient
from lightning_bsl.callbacks.micro_batches import MemoryCeiling, MicroBatch, StepSplitter
from lightning_bsl.callbacks.rates import OwnRates, Rates, ScaledRates
from lightning_bsl.callbacks.snapshot import StepStart
from lightning_bsl.callbacks.sources import DataSource, source_of
from lightning_bsl.data.datamodule import data_parallel
from lightning_bsl.schedules import FollowingRule, JointSchedule, Plan, Progress, ScalingRule
from lightning_bsl.schedules.checks import check_whole
from lightning_bsl.schedules.following import FollowingFunction
from lightning_bsl.schedules.functions import Function, Schedule

__all__ = ["BatchLRScheduler", "plan_fit"]


class BatchLRScheduler(Callback):
    """Grows the batch size and the learning rate while a model trains.

    Every optimizer step has exactly the batch size and the learning rate of the schedules, inside an epoch too. The batch size
    is global: the examples of one optimizer step, over all processes and accumulated batches.

    **Loaders.** Any map-style ``DataLoader`` works: from a DataModule, from the LightningModule, or given to ``fit``. During
    the fit a copy with another sampler replaces it. ``shuffle=True`` becomes a permutation that depends only on the run's seed
    and the epoch; any other sampler is iterated once per epoch. Some loaders cannot be re-made: they read a stream, or have a
    batch sampler of their own. With ``whole_batches=True`` a step takes whole batches of such a loader. Without, the loader
    must read its batch size from ``self.batch_size`` or ``self.hparams.batch_size``, and the batch size changes only between
    epochs.

    **Learning rates.** Every param group keeps its ratio to the first group. The callback logs ``batch_size``, ``lr`` (of the
    first group), ``samples`` (examples consumed so far), and ``tokens`` if the DataModule has an attribute
    ``tokens_per_sample``.

    **Losses.** A step may be split into micro-batches or over processes. Its gradient is then the mean over its examples,
    which is right for a loss that is a mean over examples. If the loss is a mean over something else, such as tokens, give the
    LightningModule a method ``loss_terms(batch)`` that returns their number (an int, a float or a scalar tensor; reading a
    tensor on a GPU waits for the device). The gradient of micro-batches i with n_i terms is then
    ``sum n_i grad L_i / sum n_i``. A micro-batch without terms adds nothing, and a step without terms changes nothing. (With
    manual optimization such a step is taken, with gradients of 0.)

    Args:
        batch_size: An ``int``, a schedule, or a function ``progress -> float``; or a ``JointSchedule``, such as that of
            ``seesaw``, which brings the learning rate.
        lr: A ``float``, a schedule, a function ``progress -> float``, a scaling rule (a function of the batch size), or
            ``None`` to leave the learning rates to the module. If the module has its own scheduler, a scaling rule multiplies
            the rates of this scheduler: by the rule's rate for the batch size, divided by the rule's first argument.
        max_device_batch_size: Largest number of examples that one process puts through the model at once. A larger step is
            split into micro-batches; its gradient is still that of the whole step. ``"auto"`` halves the micro-batch when
            memory runs out, and repeats the step.
        loader: Key or index of the training loader that follows the schedule, if there are several. By default the one that
            follows ``batch_size``.
        batch_size_unit: What the batch size counts: ``"examples"`` or ``"tokens"``. ``"tokens"`` needs a
            ``BatchSizeDataModule(lengths=...)``. A step then takes examples in the order of the epoch until their lengths,
            without padding, sum to the batch size or more; the last step of an epoch may have less. Scaling rules get the batch
            size in tokens too; the clock still counts examples.
        follow: A rule for each constant of the optimizer that follows the batch size: ``HalfLife``, ``DecayTimescale``, or a
            function ``(value, batch_size) -> value``. The keys are those of the param groups, such as ``"weight_decay"``;
            ``"betas"`` for all betas, or ``"beta1"``, ``"beta2"`` for one. A rule is applied to each group's own value, and 0
            stays 0. Each constant is logged under its key, and the betas as ``beta1``, ``beta2``. Betas must be those of Adam
            or AdamW, whose bias correction stays exact.
        max_samples: The run ends with the step that reaches so many samples, or where the Trainer's ``max_epochs`` or
            ``max_steps`` end it. This step is cut to them, so that the run takes exactly so many samples; not where there are
            several training loaders, or one that cannot be re-made. Fractions of the run in schedules are fractions of it.
        max_tokens: The same in tokens; it needs a DataModule with an attribute ``tokens_per_sample``. The last step is cut to
            whole examples.
        whole_batches: Whether a step takes whole batches of the loader, as it makes them: for a batch sampler of its own, such
            as one that puts examples of similar length together, or a library's loader. A step of batch size B then takes
            ``k = B / (m W)`` of them on each of W processes, where m is the loader's ``batch_size``, or the number that is
            given here. B is rounded up to a multiple of ``m W``. A step has fewer examples if some of its batches have.

    Raises:
        TypeError: A ``batch_size``, an ``lr`` or a ``follow`` of another type; a ``JointSchedule`` and an ``lr`` beside it.
        ValueError: ``max_device_batch_size`` is neither a number above 0 nor "auto"; an unknown ``batch_size_unit``, or
            ``seesaw`` in tokens without a maximum; a rule for the learning rate in ``follow``. At the start of a fit: a batch
            size below 1 or above the data set, a learning rate that is not above 0 and finite, a schedule over a fraction of a
            run without an end, a run shorter than a warm-up, a constant that a rule of ``follow`` takes out of its range.
        MisconfigurationException: At the start of a fit: a setting that cannot work; the message says what to write instead.

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
        batch_size: int | Schedule | Function | JointSchedule,
        lr: float | Schedule | ScalingRule | Function | None = None,
        max_device_batch_size: int | Literal["auto"] | None = None,
        loader: str | int | None = None,
        batch_size_unit: Literal["examples", "tokens"] = "examples",
        follow: Mapping[str, FollowingRule | FollowingFunction] | None = None,
        max_samples: int | None = None,
        max_tokens: int | None = None,
        whole_batches: bool | int = False,
    ) -> None:
        if batch_size_unit not in ("examples", "tokens"):
            raise ValueError(f"`batch_size_unit={batch_size_unit!r}` is not known: write 'examples' or 'tokens'")
        size = max_device_batch_size
        if size is not None and (size < 1 if isinstance(size, int) else size != "auto"):
            raise ValueError(f"`max_device_batch_size={size!r}` must be 1 or more, 'auto', or None for no limit")
        if not isinstance(whole_batches, bool):
            check_whole("whole_batches", whole_batches, instead=", or True for the loader's `batch_size`")
        self.max_device_batch_size = max_device_batch_size
        self.whole_batches = whole_batches
        self.loader = loader
        self.batch_size_unit = batch_size_unit
        self._fit = Fit()
        self.schedule = JointSchedule.of(batch_size, lr)
        size_schedule = self.schedule.batch_size
        if batch_size_unit == "tokens" and isinstance(size_schedule, Schedule) and size_schedule.ends_at_examples:
            raise ValueError(
                "`seesaw` without a `maximum` ends its growth at the examples of the run, but here batch sizes count tokens: "
                "write `seesaw(..., maximum=...)`, in tokens"
            )
        self.follow = read_follow(follow)
        self.budget = Budget(max_samples, max_tokens)
        self.plan: Plan | None = None
        self._clock = RunClock()
        self._setting = StepSetting()
        self._splitter = MemoryCeiling() if isinstance(size, str) else StepSplitter(size)
        self._start = StepStart()
        self._data: DataSource | None = None
        self._rates: Rates | None = None
        self._constants = FollowingConstants([], {}, self._fit.undo)

    @property
    def schedule(self) -> JointSchedule:
        """Batch size and learning rate."""
        multiple = self._fit.multiple
        return self._schedule if multiple == 1 else replace(self._schedule, multiple=multiple)

    @schedule.setter
    def schedule(self, schedule: JointSchedule) -> None:
        self._schedule = schedule

    @property
    def progress(self) -> Progress:
        """The clock: how much has been trained so far."""
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
        """The loader that follows the schedule; ``None`` outside a fit."""
        loader = self._data.loaders.flattened[self._data.index] if self._data is not None else None
        return getattr(loader, "original", loader)

    @property
    def handed_out(self) -> int:
        """Samples before the first example that the loader's workers have not fetched yet."""
        return self._clock.epoch_start.samples + (self._data.handed_out if self._data else 0)

    @property
    def batch_size_of_step(self) -> int:
        """The batch size of the step under way; between steps that of the next one."""
        return self._setting.value.batch_size

    @property
    def micro_batch(self) -> MicroBatch | None:
        """The micro-batch of this process in the current backward pass; ``None`` between steps."""
        splitter = self._splitter
        if not splitter.under_way:
            return None
        terms = splitter.micro_batch if splitter.terms is None else splitter.terms.piece
        return MicroBatch(splitter.micro_batch, splitter.weight, terms)

    @property
    def corrected(self) -> float:
        """The factor that made the gradients of the current step a mean; 0 if the step had nothing to train."""
        return self._splitter.corrected

    def constants_at(self, batch_size: int) -> dict[str, float]:
        """The constants that follow the batch size, for a batch size; empty before the first fit.

        Args:
            batch_size: Batch size of a step.
        """
        return self._constants.at(batch_size)

    def estimated_steps(self, trainer: Trainer) -> int:
        """The number of optimizer steps of the whole fit, for a scheduler made in ``configure_optimizers``.

        Use it in place of ``trainer.estimated_stepping_batches``, which counts every epoch with the current batch size.

        Args:
            trainer: The Trainer, in a fit.

        Raises:
            RuntimeError: Called outside a fit.
            ValueError: The run has no end, or its end does not follow from the training loader.
        """
        if not self.fitting:
            raise RuntimeError(
                "`estimated_steps` was called outside a fit, but it is known from `configure_optimizers` on: call it there"
            )
        load_training_data(trainer)
        if self.plan is None:
            raise ValueError(
                "the number of steps is not known: give the Trainer `max_epochs` or `max_steps`, and a training loader with "
                "a length"
            )
        return self.plan.steps

    def reschedule(self, trainer: Trainer, schedule: JointSchedule) -> None:
        """Follow another schedule, from the first example that the workers have not fetched yet.

        Args:
            trainer: The Trainer, in a fit.
            schedule: The new schedule; up to ``handed_out`` samples it must equal the old one.
        """
        self.schedule = schedule
        if self._data is not None:
            self._data.follow(self.schedule)
            if not trainer.is_last_batch and isinstance(self.training_loader, Sized):  # a stream has no length
                set_epoch_length(trainer, self._data.index, len(self.training_loader))
            self._look_up()

    # --- start of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the fit, and replace the training loaders by loaders that follow the plan."""
        if stage != "fit":
            return
        if sum(isinstance(callback, BatchLRScheduler) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException("there are two BatchLRScheduler among the callbacks; keep one")
        refuse(trainer, pl_module, self.schedule, self.max_device_batch_size, self.budget)
        self.plan = self._data = None
        self._start = StepStart()
        self._fit = Fit.begin(trainer, self._clock, self.budget)
        self._fit.in_tokens, self._fit.whole_batches = self.batch_size_unit == "tokens", self.whole_batches
        terms = self._splitter.terms = LossTerms.of(trainer, pl_module)
        self._splitter.watch = MaskWarning(pl_module, data_parallel(trainer)[1]) if terms is None else None
        remake_training_data(trainer, lambda ask: self._loaders(trainer, pl_module, ask), self._fit.undo)
        isolate_validation(trainer, lambda: self._start.kept(trainer), self._fit.undo)
        before_batch_counts(trainer, lambda batch_idx: self._pass(trainer, batch_idx), self._fit.undo)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint can be resumed."""
        if self.fitting:  # nothing to do for validation and test
            if self._data is not None:  # the loader was made before the checkpoint was read, with the old clock
                self._data.close()
                self.plan = self._data = None
                forget_training_data(trainer)
            self._fit.resumed = Resumed.read(trainer, checkpoint, self.state_key, self._start)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clock."""
        if not self.fitting:
            return
        self._fit.seed = state_dict.get("seed", self._fit.seed)
        self._clock.load_state_dict(state_dict, self._fit.resumed is not None and self._fit.resumed.epoch_ended)
        self._splitter.load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """The clock, the seed, and with ``"auto"`` the largest micro-batch that fitted: plain integers."""
        return self._clock.state_dict() | self._splitter.state_dict() | {"version": VERSION, "seed": self._fit.seed}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random generators of every process, so that a resumed run draws the same dropout masks."""
        state = checkpoint["callbacks"][self.state_key]
        state["inside_step"], state["rng"] = self._splitter.under_way, self._start.write(trainer, checkpoint)
        state["multiple"] = self._fit.multiple
        state["positions"] = self._data.positions(trainer) if self._data is not None else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers, and decide who sets the learning rates: this callback or the module."""
        if isinstance(self._splitter, MemoryCeiling):
            check_ceiling(trainer, pl_module)
        check_beside_scheduler(trainer, self.schedule)
        check_momentum(trainer, self.follow)
        self._constants = FollowingConstants(trainer.optimizers, self.follow, self._fit.undo)
        lr = self.schedule.lr
        if lr is not None and not trainer.lr_scheduler_configs:
            self._rates = OwnRates(trainer.optimizers)
        else:
            self._rates = ScaledRates(trainer.optimizers, lr if isinstance(lr, ScalingRule) else None, self._fit.undo)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the last checks, go on from a checkpoint, and set the first learning rate."""
        fit, data, splitter = self._fit, self._data, self._splitter
        assert data is not None
        check_training(trainer, pl_module, data, self.plan, self.schedule, splitter, fit.undo)
        if isinstance(splitter, MemoryCeiling):
            walk_steps(trainer, lambda batch, train: splitter.step(trainer, batch, train), fit.undo)
        if fit.resumed is not None:
            fit.resumed.go_on(trainer, fit, data, self._clock, self.schedule, self._start)
        largest = [self.schedule.largest] if self.schedule.largest else []
        self._stop_at_end(trainer)
        self._constants.check({stage.batch_size for stage in self.plan.stages} if self.plan else largest)
        self._look_up()

    # --- training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rate of the epoch's first step."""
        assert self._data is not None
        if self._data.is_stale():  # the data changed after Lightning read their length
            set_epoch_length(trainer, self._data.index, len(self._data.loaders.flattened[self._data.index]))
        self._look_up()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step, or its next micro-batch."""
        fit, splitter = self._fit, self._splitter
        fit.reload_as_asked(trainer)  # the loader of this epoch exists now
        if fit.first_batch:
            fit.first_batch = False
            varies = self._data is not None and (self._data.cut.by_length or self._data.measure is not None)
            if varies or self.plan is None or len({stage.batch_size for stage in self.plan.stages}) > 1:
                expect_other_sizes(batch)
        self._open(trainer, batch_idx, batch)
        if self._start.rng is None:
            self._start.note(trainer, splitter.split)
        if splitter.split and not splitter.has_gradient:
            trainer.optimizers[0].zero_grad()
        self._constants.apply(self.batch_size_of_step)  # another callback may have added a param group
        if self._rates is not None:
            self._rates.note()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weight the loss, so that the step's gradient is the mean over its examples for any split."""
        self._splitter.note_backward()
        # undo Lightning's division of the loss by the number of accumulated batches; DDP averages over the processes
        weight = self._splitter.weight * trainer.accumulate_grad_batches
        if weight == 0:
            self._fit.after_backward = without_gradient(loss, pl_module.parameters(), trainer.world_size == 1)
        elif weight != 1:
            loss.register_hook(lambda gradient: gradient * weight)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what the backward pass of a loss without terms has added."""
        self._fit.backward_is_over()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Make the gradient the mean over all that was trained in this step."""
        splitter, scaler = self._splitter, getattr(trainer.precision_plugin, "scaler", None)
        splitter.correct(optimizer, scaler)
        nothing = splitter.corrected == 0 or not splitter.has_gradient
        # a loss scaler skips a step whose last loss is None: `_pass` takes this step later, and clips it then
        if nothing or (scaler is not None and not splitter.has_loss and not self._fit.late):
            self._fit.leave_unclipped(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the clock, log the step, and set the learning rate of the next one."""
        assert self._data is not None
        examples = self._data.consumed(self._splitter)
        if not self._splitter.end_piece(trainer.is_last_batch):
            return
        clock, setting = self._clock, self._setting
        clock.advance(examples, 1)
        self._start.clear()
        self._stop_at_end(trainer)
        # a change in an epoch's first step is logged at once, so that the progress bar shows it
        first = clock.progress.step == clock.epoch_start.step + 1 and setting.value != setting.logged
        if first or writes_step(trainer):
            self._log(pl_module, on_step=True, on_epoch=False)
        if clock.progress.step >= setting.settled_until and not trainer.is_last_batch:
            self._look_up()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log together with the validation metrics."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._log(pl_module, on_step=False, on_epoch=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log together with the epoch's metrics, then set the batch size of the next epoch."""
        self._log(pl_module, on_step=False, on_epoch=True)
        clock, data = self._clock, self._data
        if clock.epoch_start.epoch > trainer.current_epoch or data is None:
            return  # a resumed run ends the same epoch a second time
        self._splitter.drop()  # the epoch may have ended inside a step
        count_batch_that_ended_epoch(trainer)
        self._start.clear()
        clock.next_epoch()
        if clock.finished:
            return
        if data.is_stale() or self._fit.is_due(data, clock.loader_start.epoch):
            self._fit.reload(trainer)
        self._look_up()  # LearningRateMonitor reads the rate in `on_train_epoch_start`, maybe before this callback

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore everything: after an exception Lightning does not call ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the Trainer, the loaders and the optimizers."""
        if stage != "fit":
            return
        self._fit.end()
        if self._data is not None:
            self._data.close()
        self._data = self._rates = None

    # --- parts

    def _loaders(self, trainer: Trainer, pl_module: LightningModule, ask: Callable[[], Any]) -> Any:
        """The training loaders that Lightning gets, each time it asks for them."""
        fit, clock, data = self._fit, self._clock, self._data
        if data is not None:
            return data.again(ask, fit.is_due(data, clock.loader_start.epoch))
        data = self._data = source_of(trainer, pl_module, ask, clock, self._splitter, self.schedule, self.loader, fit)
        self._splitter.begin_fit(data.cut)
        self.plan = fit.make_plan(trainer, data, self.schedule, clock)
        return data.loaders

    def _open(self, trainer: Trainer, batch_idx: int, batch: Any) -> None:
        """Begin a micro-batch, and before its first one the step."""
        assert self._data is not None
        batch_size = self._setting.value.batch_size
        if not self._splitter.under_way:
            examples = self._data.step_examples(batch_size)
            self._splitter.begin(examples, batch_size, self._data.parts(examples, batch_size))
        self._splitter.begin_piece(self._data.count(), batch)
        trainer.accumulate_grad_batches = self._splitter.windows(batch_idx)

    def _pass(self, trainer: Trainer, batch_idx: int) -> bool:
        """Finish a batch before Lightning counts it; return whether it was trained (a batch that is ``None`` is not)."""
        trained = self._splitter.piece_begun
        if not trained:
            self._open(trainer, batch_idx, None)
        self._fit.clip_again(trainer)
        self._fit.late = True
        self._splitter.step_where_lightning_does_not(trainer, batch_idx, trained)
        self._fit.late = False
        return trained

    def _look_up(self) -> None:
        """Look up the next step and set its learning rate."""
        assert self._data is not None
        clock = self._clock
        beyond = self.plan is not None and clock.progress.step >= self.plan.steps
        # a loader may have more batches than its length says: then the last rate stays
        if clock.finished or (beyond and self._data.whole_batches is None):
            return
        try:
            self._setting.look_up(self.schedule, clock.progress, self._data.sizes_at())
        except ValueError:
            if not beyond:
                raise
            return  # the batches of later epochs are not planned, and schedules may end with the plan
        self._constants.apply(self.batch_size_of_step)
        if self._rates is not None:
            self._rates.apply(self._setting.value)

    def _stop_at_end(self, trainer: Trainer) -> None:
        """Stop the run at its end in samples, which the Trainer does not know."""
        if self._clock.end.samples is not None and self._clock.progress.samples >= self._clock.end.samples:
            trainer.should_stop = True

    def _log(self, pl_module: LightningModule, on_step: bool, on_epoch: bool) -> None:
        lr = self._rates.rate if self._rates is not None else 0.0
        self._constants.check_kept()
        constants = self._constants.at(self.batch_size_of_step)
        samples, tokens = self._clock.progress.samples, self._fit.tokens_per_sample
        self._setting.log(pl_module, lr, samples, tokens, constants, on_step, on_epoch)


def scheduler_of(trainer: Trainer) -> BatchLRScheduler | None:
    """The scheduler among the callbacks, if there is one.

    Args:
        trainer: The Trainer.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, BatchLRScheduler)), None)
