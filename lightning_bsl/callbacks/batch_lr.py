"""The batch size and the learning rate follow a schedule."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_setattr
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_bsl.callbacks.ceiling import MemoryCeiling
from lightning_bsl.callbacks.compile import expect_other_sizes
from lightning_bsl.callbacks.loaders import Loader, epoch_length, limit_of, loaders_of, local_size
from lightning_bsl.callbacks.loop import (
    begin_epoch,
    ended_epoch,
    load_training_data,
    set_batches_done,
    start_epoch_after_fit,
    walk_steps,
    walk_steps_no_more,
)
from lightning_bsl.callbacks.refusals import (
    check_beside_scheduler,
    check_ceiling,
    check_same_on_all_processes,
    check_split,
    check_val_interval,
    refuse,
)
from lightning_bsl.callbacks.state import rng_state, set_rng_state, torch_rng_state
from lightning_bsl.data.datamodule import BatchSizeDataModule, data_parallel
from lightning_bsl.data.sampler import GlobalBatchSampler, micro_batches
from lightning_bsl.schedules import BatchLR, Horizon, JointSchedule, Plan, Progress, ScalingRule, plan
from lightning_bsl.schedules.functions import Function, Schedule
from lightning_bsl.schedules.plan import EpochLength, check_fits


def plan_fit(
    schedule: JointSchedule,
    num_examples: int,
    max_epochs: int | None = None,
    max_steps: int = -1,
    limit_train_batches: float | None = None,
    epoch_length: EpochLength | None = None,
    tokens_per_sample: int | None = None,
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
        epoch_length=epoch_length,
    )


class BatchLRScheduler(Callback):
    """Grows the batch size and the learning rate while a model trains.

    With a [`BatchSizeDataModule`][lightning_bsl.BatchSizeDataModule] every optimizer step has exactly the batch size and
    the learning rate that the schedules give for it, inside an epoch too. With any other DataModule (or LightningModule)
    that makes its loader from ``self.batch_size`` or ``self.hparams.batch_size`` the batch size changes at epoch
    boundaries, and the learning rate at every step.

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
            whenever memory runs out, and repeats the step. Needs a ``BatchSizeDataModule``.

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
    ) -> None:
        size = max_device_batch_size
        if size is not None and (size < 1 if isinstance(size, int) else size != "auto"):
            raise ValueError(f"`max_device_batch_size={size!r}` must be 1 or more, 'auto', or None for no bound")
        self.max_device_batch_size = max_device_batch_size
        self._cap = None if isinstance(size, str) else size  # the bound that the loader cuts by
        self.schedule = JointSchedule(batch_size, lr)
        self.plan: Plan | None = None
        self._epoch_start = self._loader_start = self._progress = Progress()
        self._end = Horizon()
        self._epoch_ended = False
        self._fitting = True  # not validating or testing
        self._setting = self._logged = BatchLR(1, None)
        self._settled_until: float = 0  # the step at which the setting may next change, inside the epoch
        self._own: BatchSizeDataModule | None = None  # the DataModule of the fit, if it is one of ours
        self._foreign: Loader | None = None  # else its training loader, once it is known
        self._first_size: int | None = None  # what somebody's DataModule had for a batch size
        self._num_examples = 0  # of one of its epochs
        self._tokens_per_sample: int | None = None
        self._rank, self._replicas = 0, 1  # this process among those that share a batch
        self._lr = 0.0
        self._parts: tuple[slice, ...] = ()  # the micro-batches of the current step
        self._part = 0  # the index of the current one
        self._weight = 1.0  # of its loss in the step's mean
        self._ceiling = MemoryCeiling() if max_device_batch_size == "auto" else None
        self._ratios: list[list[float]] = []  # of each optimizer's param groups to the first of all
        self._factor = 1.0
        self._scales = False  # whether a scaling rule multiplies what the module's own scheduler sets
        self._hooks: list[RemovableHandle] = []
        self._unscaled: dict[int, list[float]] = {}  # the module's rates while an optimizer takes its step
        self._step_rng: dict[str, Any] | None = None  # at the start of the step that is under way
        self._step_buffers: dict[str, Tensor] = {}  # the same, where a step is split
        self._restored_rng: dict[str, Any] | None = None
        self._reload_every: int | None = None
        self._first_batch = True  # is still to come

    @property
    def progress(self) -> Progress:
        """The clock: what has been trained so far."""
        return self._progress

    @property
    def micro_batch(self) -> tuple[int, float] | None:
        """This process's examples in the backward pass under way, and the factor of their mean loss; of our data alone."""
        if self._own is None:
            return None
        weight = self._ceiling.weight if self._ceiling else self._weight
        return round(weight * self._step_examples() / self._replicas), weight

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
        if self._own is None and self.plan is None:
            load_training_data(trainer)
            self._check_foreign(trainer)
            self._plan_foreign(trainer)
        if self.plan is None:
            raise ValueError(
                "the number of steps is not known: give the Trainer `max_epochs` or `max_steps`, and a training loader with "
                "a length"
            )
        return self.plan.steps

    # --- start of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the fit, plan it, and put the first batch size in place."""
        self._fitting = stage == "fit"
        if not self._fitting:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self._own = datamodule if isinstance(datamodule, BatchSizeDataModule) else None
        if sum(isinstance(callback, BatchLRScheduler) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException("there are two BatchLRScheduler among the callbacks; keep one")
        self._rank, self._replicas = data_parallel(trainer)
        refuse(trainer, pl_module, self.schedule, self.max_device_batch_size)
        self.plan, self._epoch_ended, self._part, self._step_rng, self._restored_rng = None, False, 0, None, None
        self._step_buffers.clear()
        if trainer.global_step == 0:
            self._epoch_start = self._progress = Progress()
        self._tokens_per_sample = getattr(datamodule, "tokens_per_sample", None)
        self._end = Horizon(*(bound if bound and bound > 0 else None for bound in (trainer.max_epochs, trainer.max_steps)))
        # a smoke test of the run's beginning, whose length Lightning has overwritten, is given a length without end
        whole_run = Horizon(10**9, 10**12, 10**15) if trainer.fast_dev_run else self._end  # type: ignore[attr-defined]
        self._set_horizon(replace(whole_run, tokens_per_sample=self._tokens_per_sample))
        if self._own is not None:
            self._num_examples = self._own.num_epoch_examples
            self._make_plan(trainer, self._num_examples)
            self._own.follow(
                cast(Function, self.schedule.batch_size),
                lambda: self._loader_start,
                lambda: self._progress.samples - self._epoch_start.samples,
                self._cap,
            )
            check_split(trainer, pl_module, self._cap, self._largest_step())
        else:
            self._first_size = cast(int, lightning_getattr(pl_module, "batch_size"))
            self._set_foreign(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See whether Lightning will skip the end of an epoch, and count the batches done as this run cuts them."""
        if not self._fitting:
            return  # the checkpoint is validated or tested
        if self.state_key not in checkpoint["callbacks"]:
            raise MisconfigurationException(
                "the checkpoint was saved by a fit without BatchLRScheduler, so it does not say how many examples that fit had "
                "consumed. To start growing from its weights, load them (`Model.load_from_checkpoint(...)`) and call `fit` "
                "without `ckpt_path`; to go on as before, leave BatchLRScheduler out"
            )
        start_epoch_after_fit(checkpoint)
        self._epoch_ended = ended_epoch(checkpoint, trainer.max_steps)
        self.load_state_dict(checkpoint["callbacks"][self.state_key])
        self._warn_of_jump(Horizon(**checkpoint["callbacks"][self.state_key]["horizon"]))
        if self._own is not None and not self._finished():
            sampler = cast(GlobalBatchSampler, self._own.train_dataloader().batch_sampler)
            done = self._progress.samples - self._epoch_start.samples
            set_batches_done(checkpoint, len(sampler) if self._epoch_ended else sampler.batches_in(done))
            warnings.filterwarnings("ignore", ".*ended before the epoch ended and your dataloader")  # ours goes on exactly
        elif self._own is None:
            self._set_foreign(trainer, pl_module)
            if self._epoch_ended:  # Lightning would go on inside the next epoch if that has more batches than were done
                set_batches_done(checkpoint, 10**9)
        states = checkpoint["callbacks"][self.state_key]["rng"]
        self._restored_rng = states[trainer.global_rank] if trainer.global_rank < len(states) else None
        self._restore_rng(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clock."""
        if not self._fitting:
            return
        horizon = self._progress.horizon
        self._epoch_start = Progress(**state_dict["epoch_start"], horizon=horizon)
        self._progress = Progress(**state_dict["progress"], horizon=horizon)
        if self._epoch_ended and self._progress.samples > self._epoch_start.samples:
            self._epoch_start = self._progress = self._progress.next_epoch()
        if not self._finished():  # else there is no next epoch to measure
            self._loader_start = self._epoch_start
        if self._ceiling is not None:
            self._ceiling.size = state_dict["micro_batch_size"]

    def state_dict(self) -> dict[str, Any]:
        """The clock, and the largest micro-batch where one was found: plain integers."""
        clocks = {"epoch_start": self._epoch_start, "progress": self._progress}
        units = ("epoch", "step", "samples")
        state: dict[str, Any] = {name: {unit: getattr(clock, unit) for unit in units} for name, clock in clocks.items()}
        found = self._ceiling.size if self._ceiling is not None else None
        return state | {"horizon": asdict(self._progress.horizon), "micro_batch_size": found}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random generators of every process, so that a resumed run draws the same dropout masks."""
        state = rng_state(trainer.strategy.root_device)
        if self._step_rng is not None:  # the step under way is taken again from its beginning
            state |= self._step_rng
        states: list[Any] = [state]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, state)
        checkpoint["callbacks"][self.state_key]["rng"] = states
        weights = checkpoint["state_dict"]
        weights.update({name: buffer for name, buffer in self._step_buffers.items() if name in weights})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers and note the ratios of their param groups."""
        if self._ceiling is not None:
            check_ceiling(trainer, pl_module)
        check_beside_scheduler(trainer, self.schedule)
        self._scales = bool(trainer.lr_scheduler_configs) and self.schedule.lr is not None
        if self._scales:
            for optimizer in trainer.optimizers:
                self._hooks += [
                    optimizer.register_step_pre_hook(self._scale),
                    optimizer.register_step_post_hook(self._unscale),
                ]
        elif self.schedule.lr is not None:
            if (groups := _groups(trainer)) and not groups[0]["lr"] > 0:
                raise MisconfigurationException(
                    f"the optimizer's first param group has lr={float(groups[0]['lr'])}, so the other groups have no ratio to "
                    "it; give it a learning rate above 0"
                )
            self._ratios = [[] for _ in trainer.optimizers]
            self._note_ratios(trainer)
        self._restore_rng(trainer)  # once more, as the model may have drawn since; FSDP reads the checkpoint after this

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what can be checked only now, and set the first learning rate."""
        if self._own is None:
            self._check_foreign(trainer)
            self._plan_foreign(trainer)
            self._probe_foreign(trainer, pl_module)
        check_val_interval(trainer, self.plan)
        check_same_on_all_processes(trainer, self.plan)
        if self._ceiling is not None:
            ceiling = self._ceiling
            walk_steps(trainer, lambda batch, train: ceiling.step(trainer, batch, self._step_examples(), train))
        self._apply(trainer)
        self._first_batch = True
        if self._epoch_ended:
            begin_epoch(trainer)

    # --- training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rate of the epoch's first step."""
        if self._own is None:
            self._check_foreign(trainer)
        self._apply(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open a step, or its next micro-batch."""
        self._restore_reload(trainer)  # the loader of this epoch is made
        if self._first_batch:
            self._first_batch = False
            if self.plan is None or len({stage.batch_size for stage in self.plan.stages}) > 1:
                expect_other_sizes(batch)
        if self._restored_rng is not None:
            if self._progress.samples > self._epoch_start.samples:  # whatever was drawn since, this step is to see the same
                self._restore_rng(trainer)
            self._restored_rng = None
        if self._own is not None:
            if self._part == 0:
                self._parts = micro_batches(self._step_examples(), self._rank, self._replicas, self._cap)
            if len(self._parts) == self._replicas == 1:
                self._weight = 1.0
            else:
                part = self._parts[self._part]
                self._weight = (part.stop - part.start) * self._replicas / self._step_examples()
        if self._part == 0:  # all of it where Lightning may validate, and save, inside the step
            state = rng_state if len(self._parts) > 1 else torch_rng_state
            self._step_rng = state(trainer.strategy.root_device)
            if len(self._parts) > 1:
                self._step_buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        if len(self._parts) > 1:
            # Lightning steps when (i + 1) % accumulate == 0 and clears the gradients when i % accumulate == 0: this has it do
            # the first on the last micro-batch alone, and the second never
            last = self._part == len(self._parts) - 1
            trainer.accumulate_grad_batches = batch_idx + 1 if last else batch_idx + 2
            if self._part == 0:
                trainer.optimizers[0].zero_grad()
        elif self._own is not None:
            trainer.accumulate_grad_batches = 1
        if (self.schedule.lr is None or self._scales) and (groups := _groups(trainer)):
            self._lr = float(groups[0]["lr"]) * self._factor  # a scheduler of the module changes it before the step is logged

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weigh the loss so that the step's gradient is the mean over its examples, however they are split."""
        if self._own is None:
            return
        # Lightning has divided the loss by the number of accumulated batches, and DDP averages over the processes
        weight = (self._ceiling.weight if self._ceiling else self._weight) * trainer.accumulate_grad_batches
        if weight != 1:
            loss.register_hook(lambda gradient: gradient * weight)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the clock; log the step that was, set the learning rate of the next."""
        if self._own is not None:
            self._part = (self._part + 1) % len(self._parts)
            steps = self._part == 0
            examples = self._step_examples() if steps else 0
        else:
            steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
            examples = self._foreign_examples(batch, batch_idx) * self._replicas
        self._progress = self._progress.advance(examples, int(steps))
        if not steps:
            return
        self._step_rng = None
        self._step_buffers.clear()
        first = self._progress.step == self._epoch_start.step + 1 and self._setting != self._logged  # for the progress bar
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if first or trainer.should_stop or (every and self._progress.step % every == 0):
            self._log(trainer, pl_module, on_step=True, on_epoch=False)
        if self._progress.step >= self._settled_until and not trainer.is_last_batch:
            self._apply(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log beside the validation metrics."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._log(trainer, pl_module, on_step=False, on_epoch=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log beside the epoch's metrics, then put the next epoch's batch size in place."""
        self._log(trainer, pl_module, on_step=False, on_epoch=True)
        if self._epoch_start.epoch > trainer.current_epoch:
            return  # a resumed run ends the same epoch a second time
        steps = len(self._own.train_dataloader()) if self._own else 0
        self._epoch_start = self._progress = self._progress.next_epoch()
        if self._finished():
            return  # Lightning asks the loader for its length once more, and there may be no next epoch to measure
        self._loader_start = self._epoch_start
        if self._own is not None:
            if len(self._own.train_dataloader()) != steps:
                self._reload(trainer)
        elif self.schedule.batch_size_at(self._epoch_start) != self._setting.batch_size:
            self._set_foreign(trainer, pl_module)
            self._reload(trainer)
        self._apply(trainer)  # before the others' `on_train_epoch_start`: LearningRateMonitor reads the rate there

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer and the DataModule as they were: Lightning does not call ``teardown`` then."""
        for optimizer in trainer.optimizers:
            self._unscale(optimizer)  # an exception inside its step: a checkpoint may yet be written
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer and the DataModule as they were."""
        self._restore_reload(trainer)
        self._fitting = True
        if stage == "fit" and self._own is not None:
            self._own.unfollow()
            trainer.accumulate_grad_batches = 1
            walk_steps_no_more(trainer)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if stage == "fit" and self._first_size is not None:
            lightning_setattr(pl_module, "batch_size", self._first_size)
            self._first_size = None

    # --- parts

    def _set_horizon(self, horizon: Horizon) -> None:
        self._epoch_start = self._loader_start = self._epoch_start._replace(horizon=horizon)
        self._progress = self._progress._replace(horizon=horizon)

    def _make_plan(self, trainer: Trainer, num_examples: int, epoch_length: EpochLength | None = None) -> None:
        """Walk the whole run: every error of the schedules comes now, before the first step."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_fits(self.schedule(self._progress).batch_size, num_examples, self._progress)
            return
        self.plan = plan_fit(
            self.schedule,
            num_examples,
            trainer.max_epochs,
            trainer.max_steps,
            limit_of(trainer),
            epoch_length,
            self._tokens_per_sample,
        )
        if self.plan is None:
            self.schedule(self._progress)  # no end to plan towards: at least the first step must be possible
        else:
            self._set_horizon(self.plan.horizon)

    def _largest_step(self) -> int:
        return max(stage.batch_size for stage in self.plan.stages) if self.plan else self._num_examples

    def _finished(self) -> bool:
        return self._end.ends_before(self._progress)

    def _step_examples(self) -> int:
        """Examples of the current step: the batch size, or what is left of the epoch."""
        behind = self._progress.samples - self._epoch_start.samples
        return min(self._setting.batch_size, self._num_examples - behind)

    def _apply(self, trainer: Trainer) -> None:
        """Look up the next step and set its learning rate."""
        if self._finished():
            return
        over = self.plan is not None and self._progress.step >= self.plan.steps
        if self._own is None and over:
            return  # somebody's loader may go on for longer than could be seen: then the last rate stays
        clock = self._progress if self._own is not None else self._epoch_start
        batch_size = self.schedule.batch_size_at(clock)
        setting = BatchLR(batch_size, self.schedule.lr_at(self._progress, batch_size))
        if isinstance(self.schedule.lr, ScalingRule):
            self._factor = self.schedule.lr.factor(batch_size) if self._scales else 1.0
        if setting.lr is not None and not self._scales and not over:  # a run resumed after its last step keeps that one's rate
            self._note_ratios(trainer)
            for optimizer, ratios in zip(trainer.optimizers, self._ratios):
                for group, ratio in zip(optimizer.param_groups, ratios):
                    _set_lr(group, setting.lr * ratio)
        self._setting = setting
        steps, every_step = self.schedule.lr_steps_to_change(self._progress, batch_size)
        if self._own is not None:
            steps = min(steps, self.schedule.batch_steps_to_change(self._progress, batch_size))
        self._settled_until = self._progress.step + (1 if every_step else steps)

    def _note_ratios(self, trainer: Trainer) -> None:
        """Note the ratio of each param group that is new to the first one: groups may be added while the model trains."""
        for optimizer, ratios in zip(trainer.optimizers, self._ratios):
            for group in optimizer.param_groups[len(ratios) :]:
                ratios.append(float(group["lr"]) / float(_groups(trainer)[0]["lr"]))

    def _set_foreign(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set ``batch_size`` where the loader is made: there it counts one process and one accumulated batch."""
        batch_size = self.schedule.batch_size_at(self._epoch_start)
        lightning_setattr(pl_module, "batch_size", local_size(trainer, batch_size))

    def _check_foreign(self, trainer: Trainer) -> None:
        """Look at the training loader, and raise if it has another batch size than it was told."""
        expected = local_size(trainer, self.schedule.batch_size_at(self._epoch_start))
        loaders = loaders_of(trainer.train_dataloader)
        sizes = [loader.batch_size for loader in loaders]
        if expected not in sizes and sizes.count(None) < len(sizes):
            actual = ", ".join(str(size) for size in sizes if size is not None)
            raise MisconfigurationException(
                f"BatchLRScheduler set `batch_size={expected}` but the training DataLoader has batch_size={actual}: make it "
                "anew in `train_dataloader`, from `self.batch_size` or `self.hparams.batch_size`"
            )
        if expected not in sizes:
            rank_zero_warn(
                f"BatchLRScheduler set `batch_size={expected}` but cannot see the batch size of the training loader, "
                f"{type(trainer.train_dataloader).__name__}; see to it that it follows `self.batch_size`"
            )
        scheduled = [loader for loader in loaders if loader.batch_size == expected]
        self._foreign = max(scheduled, key=lambda loader: loader.examples or 0, default=None)

    def _plan_foreign(self, trainer: Trainer) -> None:
        """Plan a fit on somebody's loader, as far as one can see its length."""
        loader = self._foreign
        if loader is not None and loader.examples is not None:
            others = [other for other in loaders_of(trainer.train_dataloader) if other.batch_size != loader.batch_size]
            length = partial(epoch_length, trainer, loader, others)
            steps, _ = length(self.schedule.batch_size_at(self._epoch_start))
            if steps == math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches):
                self._make_plan(trainer, loader.examples * self._replicas, length)
                return
        clock = self._progress  # no plan, but what depends on the epoch alone can be tried
        for epoch in range(clock.epoch, min(trainer.max_epochs or 0, 10_000)):
            self.schedule(clock._replace(epoch=epoch))

    def _probe_foreign(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a loader of the next size and throw it away: does it follow ``batch_size``, or does it only look so?"""
        size = self.schedule.batch_size_at(self._epoch_start)
        other = next((stage.batch_size for stage in self.plan.stages if stage.batch_size != size), None) if self.plan else None
        if other is None:
            return
        owner = trainer.datamodule or pl_module  # type: ignore[attr-defined]
        lightning_setattr(pl_module, "batch_size", local_size(trainer, other))
        with isolate_rng():
            loaders = loaders_of(owner.train_dataloader())
        self._set_foreign(trainer, pl_module)
        sizes = {loader.batch_size for loader in loaders}
        if local_size(trainer, other) not in sizes and None not in sizes:
            raise MisconfigurationException(
                f"BatchLRScheduler will set `batch_size={local_size(trainer, other)}`, but then {type(owner).__name__} still "
                f"makes a DataLoader with batch_size={', '.join(map(str, sizes))}: make it anew in `train_dataloader`, from "
                "`self.batch_size` or `self.hparams.batch_size`"
            )

    def _foreign_examples(self, batch: Any, batch_idx: int) -> int:
        """Examples of a batch of somebody's loader, on this process."""
        loader = self._foreign
        if loader is not None and (taken := loader.taken(batch_idx + 1)) is not None:
            return taken - (loader.taken(batch_idx) or 0)
        try:
            return extract_batch_size(batch)
        except MisconfigurationException:  # a batch of a type that Lightning cannot look into
            return self._setting.batch_size

    def _warn_of_jump(self, horizon: Horizon) -> None:
        """Warn if the schedules jump where a run goes on for another length than it was begun with."""
        if horizon == self._progress.horizon or self._finished():
            return
        try:
            before, after = self.schedule(self._progress._replace(horizon=horizon)), self.schedule(self._progress)
        except ValueError:
            return  # beyond the end of the run as it was
        if before != after:
            rank_zero_warn(
                f"the run goes on for another length than it was begun with, and its schedules count in fractions of it: at "
                f"epoch {self._progress.epoch} the batch size jumps from {before.batch_size} to {after.batch_size} and the "
                f"learning rate from {before.lr} to {after.lr}. Write the lengths (`every`, `over`, `total`) as ints to go on "
                "without a jump"
            )

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        """Multiply the module's learning rates for the length of an optimizer step: schedulers chain them from step to step."""
        rates = self._unscaled[id(optimizer)] = [float(group["lr"]) for group in optimizer.param_groups]
        for group, lr in zip(optimizer.param_groups, rates):
            _set_lr(group, lr * self._factor)

    def _unscale(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._unscaled.pop(id(optimizer), ())):
            _set_lr(group, lr)

    def _restore_rng(self, trainer: Trainer) -> None:
        if self._restored_rng is not None:
            set_rng_state(self._restored_rng, trainer.strategy.root_device)

    def _reload(self, trainer: Trainer) -> None:
        """Have Lightning ask for the training loader again, so that all its counts follow the new length."""
        if self._reload_every is None:
            self._reload_every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]

    def _restore_reload(self, trainer: Trainer) -> None:
        if self._reload_every is not None:
            trainer.reload_dataloaders_every_n_epochs = self._reload_every  # type: ignore[attr-defined]
            self._reload_every = None

    def _log(self, trainer: Trainer, pl_module: LightningModule, on_step: bool, on_epoch: bool) -> None:
        self._logged = self._setting
        lr = self._lr if self._setting.lr is None or self._scales else self._setting.lr
        values = {"batch_size": self._setting.batch_size, "lr": lr, "samples": self._progress.samples}
        if self._tokens_per_sample is not None:
            values["tokens"] = self._progress.samples * self._tokens_per_sample
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


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _set_lr(group: dict[str, Any], lr: float) -> None:
    """Set a rate; one that is a tensor stays that tensor, which compiled and captured steps read."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
