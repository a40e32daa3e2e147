"""The batch size and the learning rate follow a schedule."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bsl.callbacks.loaders import Loader, epoch_length, limit_of, loaders_of, local_size
from lightning_bsl.callbacks.loop import ended_epoch, injects_sampler, loads_own_data, set_batches_done
from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.data.sampler import GlobalBatchSampler, micro_batches
from lightning_bsl.schedules import BatchLR, Horizon, JointSchedule, Plan, Progress, ScalingRule, plan
from lightning_bsl.schedules.functions import Function
from lightning_bsl.schedules.plan import EpochLength, check_fits
from lightning_bsl.schedules.progress import UNITS


def plan_fit(
    schedule: JointSchedule,
    num_examples: int,
    max_epochs: int | None = None,
    max_steps: int = -1,
    limit_train_batches: float | None = None,
    epoch_length: EpochLength | None = None,
) -> Plan | None:
    """The plan of a fit, from the Trainer's arguments; ``None`` for a fit without an end.

    Args:
        schedule: Batch size and learning rate.
        num_examples: Training examples of an epoch.
        max_epochs: As of ``Trainer``; -1 for no bound.
        max_steps: As of ``Trainer``.
        limit_train_batches: As of ``Trainer``.
        epoch_length: As of [`plan`][lightning_bsl.schedules.plan].
    """
    if max_epochs is None and max_steps == -1:
        max_epochs = 1000  # as Trainer does
    epochs, steps = (None if bound is None or bound < 0 else bound for bound in (max_epochs, max_steps))
    limit = 1.0 if limit_train_batches is None else limit_train_batches
    if (epochs is None and steps is None) or epochs == 0 or steps == 0 or limit == 0:
        return None
    return plan(schedule, num_examples, epochs=epochs, steps=steps, limit_batches=limit, epoch_length=epoch_length)


class BatchLRScheduler(Callback):
    """Grows the batch size and the learning rate while a model trains.

    With a [`BatchSizeDataModule`][lightning_bsl.BatchSizeDataModule] every optimizer step has exactly the batch size and
    the learning rate that the schedules give for it, inside an epoch too. With any other DataModule (or LightningModule)
    that makes its loader from ``self.batch_size`` or ``self.hparams.batch_size`` the batch size changes at epoch
    boundaries, and the learning rate at every step.

    The batch size is that of one optimizer step, over all processes and accumulated batches. Learning rates are set in
    every param group; groups keep the ratio to the first one that ``configure_optimizers`` gave them. Logs
    ``batch_size``, ``lr`` (of the first group) and ``samples`` (examples consumed so far).

    Args:
        batch_size: An ``int``, a schedule, or a function ``progress -> float``.
        lr: A ``float``, a schedule, a function ``progress -> float``, a scaling rule (a function of the batch size), or
            ``None`` to leave the learning rates to the module.
        max_device_batch_size: Most examples that one process puts through the model at once. A larger step is split into
            micro-batches, and its gradient is the mean over its examples all the same. Needs a ``BatchSizeDataModule``.

    Raises:
        ValueError: ``max_device_batch_size`` below 1. At fit start: a batch size below 1 or above the data set, a learning
            rate that is not above 0 and finite, a schedule over a fraction of a run that has no end, a horizon shorter than a
            warm-up.
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
        batch_size: Function | int,
        lr: Function | ScalingRule | float | None = None,
        max_device_batch_size: int | None = None,
    ) -> None:
        if max_device_batch_size is not None and max_device_batch_size < 1:
            raise ValueError(f"`max_device_batch_size={max_device_batch_size}` must be 1 or more, or None for no bound")
        self.max_device_batch_size = max_device_batch_size
        self.schedule = JointSchedule(batch_size, lr)
        self.plan: Plan | None = None
        self._epoch_start = self._loader_start = self._progress = Progress()
        self._end = Horizon()
        self._epoch_ended = False
        self._setting = self._logged = BatchLR(1, None)
        self._settled_until: float = 0  # the step at which the setting may next change, inside the epoch
        self._own: BatchSizeDataModule | None = None  # the DataModule of the fit, if it is one of ours
        self._foreign: Loader | None = None  # else its training loader, once it is known
        self._first_size: int | None = None  # what somebody's DataModule had for a batch size
        self._num_examples = 0  # of one of its epochs
        self._lr = 0.0
        self._parts: tuple[slice, ...] = ()  # the micro-batches of the current step
        self._part = 0  # the index of the current one
        self._ratios: list[float] = []
        self._reload_every: int | None = None

    @property
    def progress(self) -> Progress:
        """The clock: what has been trained so far."""
        return self._progress

    # --- start of a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the fit, plan it, and put the first batch size in place."""
        if stage != "fit":
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self._own = datamodule if isinstance(datamodule, BatchSizeDataModule) else None
        self._refuse(trainer, pl_module)
        self._epoch_ended, self._part = False, 0
        if trainer.global_step == 0:
            self._epoch_start = self._progress = Progress()
        self._end = Horizon(*(bound if bound and bound > 0 else None for bound in (trainer.max_epochs, trainer.max_steps)))
        # a smoke test of the run's beginning, whose length Lightning has overwritten, is given a length without end
        self._set_horizon(Horizon(10**9, 10**12, 10**15) if trainer.fast_dev_run else self._end)  # type: ignore[attr-defined]
        if self._own is not None:
            self._num_examples = self._own.num_epoch_examples
            self._make_plan(trainer, self._num_examples)
            self._own.follow(
                cast(Function, self.schedule.batch_size),
                lambda: self._loader_start,
                lambda: self._progress.samples - self._epoch_start.samples,
                self.max_device_batch_size,
            )
            self._check_split(trainer, pl_module)
        else:
            self._first_size = cast(int, lightning_getattr(pl_module, "batch_size"))
            self._set_foreign(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See whether Lightning will skip the end of an epoch, and count the batches done as this run cuts them."""
        if self.state_key not in checkpoint["callbacks"]:
            raise MisconfigurationException(
                "the checkpoint was saved by a fit without BatchLRScheduler, so it does not say how many examples that fit had "
                "consumed. To start growing from its weights, load them (`Model.load_from_checkpoint(...)`) and call `fit` "
                "without `ckpt_path`; to go on as before, leave BatchLRScheduler out"
            )
        self._epoch_ended = ended_epoch(checkpoint)
        self.load_state_dict(checkpoint["callbacks"][self.state_key])
        self._warn_of_jump(Horizon(**checkpoint["callbacks"][self.state_key]["horizon"]))
        if self._own is not None:
            sampler = cast(GlobalBatchSampler, self._own.train_dataloader().batch_sampler)
            done = self._progress.samples - self._epoch_start.samples
            set_batches_done(checkpoint, len(sampler) if self._epoch_ended else sampler.batches_in(done))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clock."""
        horizon = self._progress.horizon
        self._epoch_start = Progress(**state_dict["epoch_start"], horizon=horizon)
        self._progress = Progress(**state_dict["progress"], horizon=horizon)
        if self._epoch_ended and self._progress.samples > self._epoch_start.samples:
            self._epoch_start = self._progress = self._progress.next_epoch()
        self._loader_start = self._epoch_start

    def state_dict(self) -> dict[str, Any]:
        """The clock: plain integers."""
        clocks = {"epoch_start": self._epoch_start, "progress": self._progress}
        state: dict[str, Any] = {name: {unit: getattr(clock, unit) for unit in UNITS} for name, clock in clocks.items()}
        return state | {"horizon": asdict(self._progress.horizon)}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers and note the ratios of their param groups."""
        if self.schedule.lr is not None:
            if trainer.lr_scheduler_configs:
                names = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
                raise MisconfigurationException(
                    f"`configure_optimizers` returns a learning-rate scheduler ({names}) and BatchLRScheduler has "
                    f"`lr={self.schedule.lr}`: both would set the learning rate. Return the optimizer alone, or write "
                    "`lr=None` to leave the learning rate to the module"
                )
            rates = [float(group["lr"]) for group in _groups(trainer)]
            if not rates[0] > 0:
                raise MisconfigurationException(
                    f"the optimizer's first param group has lr={rates[0]}, so the other groups have no ratio to it; give it "
                    "a learning rate above 0"
                )
            self._ratios = [rate / rates[0] for rate in rates]
        if self._own is None:  # the clock may have been restored since `setup`
            self._set_foreign(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what can be checked only now, and set the first learning rate."""
        if self._own is None:
            self._check_foreign(trainer)
            self._plan_foreign(trainer)
            self._probe_foreign(trainer, pl_module)
        self._check_val_interval(trainer)
        self._apply(trainer)

    # --- training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rate of the epoch's first step."""
        if self._own is None:
            self._check_foreign(trainer)
        self._apply(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open a step, or its next micro-batch."""
        self._restore_reload(trainer)  # the loader of this epoch is made
        if self._own is not None and self._part == 0:
            self._parts = micro_batches(
                self._step_examples(), trainer.global_rank, trainer.world_size, self.max_device_batch_size
            )
        if len(self._parts) > 1:
            # Lightning steps when (i + 1) % accumulate == 0 and clears the gradients when i % accumulate == 0: this has it do
            # the first on the last micro-batch alone, and the second never
            last = self._part == len(self._parts) - 1
            trainer.accumulate_grad_batches = batch_idx + 1 if last else batch_idx + 2
            if self._part == 0:
                trainer.optimizers[0].zero_grad()
        elif self._own is not None:
            trainer.accumulate_grad_batches = 1
        if self.schedule.lr is None and (groups := _groups(trainer)):
            self._lr = groups[0]["lr"]  # a scheduler of the module changes it before the step is logged

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weigh the loss so that the step's gradient is the mean over its examples, however they are split."""
        if self._own is None or len(self._parts) == trainer.world_size == 1:
            return
        part = self._parts[self._part]
        # Lightning has divided the loss by the number of accumulated batches, and DDP averages over the processes
        scale = trainer.world_size * trainer.accumulate_grad_batches
        weight = (part.stop - part.start) * scale / self._step_examples()
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
            examples = self._foreign_examples(batch, batch_idx) * trainer.world_size
        self._progress = self._progress.advance(examples, int(steps))
        if not steps:
            return
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

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer and the DataModule as they were: Lightning does not call ``teardown`` then."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer and the DataModule as they were."""
        self._restore_reload(trainer)
        if stage == "fit" and self._own is not None:
            self._own.unfollow()
            trainer.accumulate_grad_batches = 1
        if stage == "fit" and self._first_size is not None:
            lightning_setattr(pl_module, "batch_size", self._first_size)
            self._first_size = None

    # --- parts

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ``MisconfigurationException`` for what cannot work."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, BatchLRScheduler) for callback in callbacks) > 1:
            raise MisconfigurationException("there are two BatchLRScheduler among the callbacks; keep one")
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
            raise MisconfigurationException(
                "GradientAccumulationScheduler changes the batch of an optimizer step behind BatchLRScheduler's back; remove "
                "it and write the growth as `BatchLRScheduler(batch_size=...)`"
            )
        if any(isinstance(callback, BatchSizeFinder) for callback in callbacks):
            raise MisconfigurationException(
                "BatchSizeFinder sets the batch size that BatchLRScheduler schedules; remove it and bound the schedule with "
                "`maximum=...`"
            )
        if self.schedule.lr is not None and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
            raise MisconfigurationException(
                f"StochasticWeightAveraging and BatchLRScheduler(lr={self.schedule.lr}) would both set the rate; write "
                "`lr=None`, or leave one of the two out"
            )
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                "DeepSpeed fixes the batch size in its own configuration, so it cannot grow; use `strategy='ddp'`"
            )
        if self._own is None and self.max_device_batch_size is not None:
            raise MisconfigurationException(
                "`max_device_batch_size` needs a `lightning_bsl.BatchSizeDataModule(train=...)`, which knows how to cut a step"
            )
        if self._own is not None:
            if trainer.accumulate_grad_batches != 1:
                raise MisconfigurationException(
                    f"`accumulate_grad_batches={trainer.accumulate_grad_batches}` with a BatchSizeDataModule: its batch size "
                    "is already that of a whole optimizer step. Write `accumulate_grad_batches=1` and the batch size you want"
                )
            if injects_sampler(trainer):
                raise MisconfigurationException(
                    "a BatchSizeDataModule gives every process its share itself: write `Trainer(use_distributed_sampler=False)`"
                )
            return
        if not loads_own_data(trainer):
            raise MisconfigurationException(
                "a DataLoader given to `fit` has a fixed batch size. Put your data set in a "
                "`lightning_bsl.BatchSizeDataModule(train=...)`, or write a LightningDataModule with a `batch_size`, and call "
                "`fit(model, datamodule=...)`"
            )
        if not lightning_hasattr(pl_module, "batch_size"):
            owner = trainer.datamodule or pl_module  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{type(owner).__name__} has no `batch_size`, so BatchLRScheduler cannot change it: keep `self.batch_size` (or "
                "`save_hyperparameters()` with a `batch_size` argument) and read it in `train_dataloader`"
            )

    def _check_split(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what splitting steps into micro-batches does to the rest of the fit."""
        sizes = [stage.batch_size for stage in self.plan.stages] if self.plan else [self._num_examples]
        cap = self.max_device_batch_size
        if cap is None or -(-max(sizes) // trainer.world_size) <= cap:
            return
        if trainer.limit_train_batches not in (None, 1.0) or isinstance(trainer.limit_train_batches, int):
            raise MisconfigurationException(
                f"`limit_train_batches={trainer.limit_train_batches}` counts micro-batches where `max_device_batch_size={cap}` "
                "splits the steps, and would end inside one; write `BatchSizeDataModule(samples_per_epoch=...)` or "
                "`Trainer(max_steps=...)`"
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"with manual optimization nobody can split a step of {max(sizes)} examples into micro-batches of {cap}; leave "
                "out `max_device_batch_size`"
            )
        if any(isinstance(module, _BatchNorm) for module in pl_module.modules()):
            rank_zero_warn(
                f"the model has BatchNorm, whose statistics are those of a micro-batch: steps of more than {cap} examples a "
                "process will not train exactly as in one piece"
            )

    def _set_horizon(self, horizon: Horizon) -> None:
        self._epoch_start = self._loader_start = self._epoch_start._replace(horizon=horizon)
        self._progress = self._progress._replace(horizon=horizon)

    def _make_plan(self, trainer: Trainer, num_examples: int, epoch_length: EpochLength | None = None) -> None:
        """Walk the whole run: every error of the schedules comes now, before the first step."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_fits(self.schedule(self._progress).batch_size, num_examples, self._progress)
            return
        self.plan = plan_fit(
            self.schedule, num_examples, trainer.max_epochs, trainer.max_steps, limit_of(trainer), epoch_length
        )
        if self.plan is None:
            self.schedule(self._progress)  # no end to plan towards: at least the first step must be possible
        else:
            self._set_horizon(self.plan.horizon)

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
        if self._own is None and self.plan is not None and self.plan.horizon.ends_before(self._progress):
            return  # somebody's loader may go on for longer than could be seen: then the last rate stays
        clock = self._progress if self._own is not None else self._epoch_start
        batch_size = self.schedule.batch_size_at(clock)
        setting = BatchLR(batch_size, self.schedule.lr_at(self._progress, batch_size))
        if setting.lr is not None:
            for group, ratio in zip(_groups(trainer), self._ratios):
                group["lr"] = setting.lr * ratio
        self._setting = setting
        steps, every_step = self.schedule.lr_steps_to_change(self._progress, batch_size)
        if self._own is not None:
            steps = min(steps, self.schedule.batch_steps_to_change(self._progress, batch_size))
        self._settled_until = self._progress.step + (1 if every_step else steps)

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
                self._make_plan(trainer, loader.examples * trainer.world_size, length)
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

    def _check_val_interval(self, trainer: Trainer) -> None:
        """Refuse an interval between validations that a later, larger batch would leave no room for."""
        interval = trainer.val_check_interval
        if self.plan is None or not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
            return
        whole = [math.ceil(stage.steps / stage.epochs) for stage in self.plan.stages if stage.epochs >= 1]
        batches = min(whole, default=interval) * trainer.accumulate_grad_batches
        if interval > batches:
            raise MisconfigurationException(
                f"`val_check_interval={interval}` counts batches, but as the batch size grows an epoch will have only "
                f"{batches} of them; write a fraction (1.0 for the end of the epoch), or `check_val_every_n_epoch=None` to "
                "count over all epochs"
            )

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
        lr = self._lr if self._setting.lr is None else self._setting.lr
        values = {"batch_size": self._setting.batch_size, "lr": lr, "samples": self._progress.samples}
        for name, value in values.items():
            pl_module.log(
                name,
                torch.tensor(value, dtype=torch.float64),  # float32 counts examples only up to 2**24
                prog_bar=name != "samples",
                on_step=on_step,
                on_epoch=on_epoch,
                reduce_fx="max",
                batch_size=1,
            )


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
