"""What cannot work beside a scheduled batch size, and what to write instead."""

from __future__ import annotations

import hashlib
import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.parsing import lightning_hasattr
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bsl.callbacks.loop import injects_sampler, loads_own_data
from lightning_bsl.data.datamodule import BatchSizeDataModule, data_parallel
from lightning_bsl.schedules import JointSchedule, Plan, ScalingRule


def refuse(trainer: Trainer, pl_module: LightningModule, schedule: JointSchedule, max_device_batch_size: object) -> None:
    """Refuse what can be seen in ``setup``.

    Raises:
        MisconfigurationException: Something in the fit cannot work.
    """
    _refuse_company(trainer, schedule)
    if isinstance(trainer.datamodule, BatchSizeDataModule):  # type: ignore[attr-defined]
        _refuse_with_own_data(trainer, pl_module, max_device_batch_size)
    else:
        _refuse_with_others_data(trainer, pl_module, max_device_batch_size)


def _refuse_company(trainer: Trainer, schedule: JointSchedule) -> None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
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
    if schedule.lr is not None and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise MisconfigurationException(
            f"StochasticWeightAveraging and BatchLRScheduler(lr={schedule.lr}) would both set the rate; write "
            "`lr=None`, or leave one of the two out"
        )
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            "DeepSpeed's engine divides the loss and takes its steps by numbers of its own, which BatchLRScheduler does not "
            "set; use `strategy='ddp'`"
        )


def _refuse_with_own_data(trainer: Trainer, pl_module: LightningModule, max_device_batch_size: object) -> None:
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"`accumulate_grad_batches={trainer.accumulate_grad_batches}` with a BatchSizeDataModule: its batch size "
            "is already that of a whole optimizer step. Write `accumulate_grad_batches=1` and the batch size you want"
        )
    if injects_sampler(trainer):
        raise MisconfigurationException(
            "a BatchSizeDataModule gives every process its share itself: write `Trainer(use_distributed_sampler=False)`"
        )
    if max_device_batch_size == "auto":
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "with manual optimization nobody can repeat a step that ran out of memory: leave out "
                "`max_device_batch_size='auto'`"
            )
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                f"with {type(trainer.strategy).__name__} a process that runs out of memory leaves the others waiting for its "
                "parameters: write a number for `max_device_batch_size`"
            )


def _refuse_with_others_data(trainer: Trainer, pl_module: LightningModule, max_device_batch_size: object) -> None:
    if max_device_batch_size is not None:
        raise MisconfigurationException(
            "`max_device_batch_size` needs a `lightning_bsl.BatchSizeDataModule(train=...)`, which knows how to cut a step"
        )
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


def check_split(trainer: Trainer, pl_module: LightningModule, max_device_batch_size: int | None, largest: int) -> None:
    """Look at what splitting steps into micro-batches does to the rest of the fit.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
        max_device_batch_size: The bound on a micro-batch, if it is a number.
        largest: Examples of the run's largest step.

    Raises:
        MisconfigurationException: Steps will be split and something in the fit cannot bear it.
    """
    cap = max_device_batch_size
    if cap is None or -(-largest // data_parallel(trainer)[1]) <= cap:
        return
    if trainer.limit_train_batches not in (None, 1.0) or isinstance(trainer.limit_train_batches, int):
        raise MisconfigurationException(
            f"`limit_train_batches={trainer.limit_train_batches}` counts micro-batches where `max_device_batch_size={cap}` "
            "splits the steps, and would end inside one; write `BatchSizeDataModule(samples_per_epoch=...)` or "
            "`Trainer(max_steps=...)`"
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"with manual optimization nobody can split a step of {largest} examples into micro-batches of {cap}; leave "
            "out `max_device_batch_size`"
        )
    if any(isinstance(module, _BatchNorm) for module in pl_module.modules()):
        rank_zero_warn(
            f"the model has BatchNorm, whose statistics are those of a micro-batch: steps of more than {cap} examples a "
            "process will not train exactly as in one piece"
        )


def check_ceiling(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse to look for the memory ceiling where the processes meet inside the model.

    Raises:
        MisconfigurationException: The model has SyncBatchNorm and there are several processes.
    """
    if trainer.world_size > 1 and any(isinstance(module, SyncBatchNorm) for module in pl_module.modules()):
        raise MisconfigurationException(
            "with SyncBatchNorm a process that runs out of memory leaves the others waiting for its statistics: write a number "
            "for `max_device_batch_size`"
        )


def check_beside_scheduler(trainer: Trainer, schedule: JointSchedule) -> None:
    """Refuse two owners of one learning rate: a scaling rule multiplies what a scheduler sets, all else replaces it.

    Raises:
        MisconfigurationException: The module has a scheduler, and ``lr`` is neither ``None`` nor a scaling rule.
    """
    if trainer.lr_scheduler_configs and not (schedule.lr is None or isinstance(schedule.lr, ScalingRule)):
        names = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
        raise MisconfigurationException(
            f"`configure_optimizers` returns a learning-rate scheduler ({names}) and BatchLRScheduler has "
            f"`lr={schedule.lr}`: both would set the learning rate. Return the optimizer alone, or write `lr=None` to leave "
            "the learning rate to the module, or a scaling rule, such as `lr=SqrtScaling(...)`, to multiply it"
        )


def refuse_sharded(trainer: Trainer, callback: Callback, needs: str) -> None:
    """Refuse strategies of which no process holds the whole model.

    Args:
        trainer: The Trainer.
        callback: Who cannot work with them.
        needs: What it needs whole.

    Raises:
        MisconfigurationException: The strategy is one of these.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"{type(callback).__name__} needs whole {needs}, which {type(trainer.strategy).__name__} does not keep; use "
            "`strategy='ddp'`, or leave it out"
        )


def check_val_interval(trainer: Trainer, plan: Plan | None) -> None:
    """Refuse an interval between validations that a later, larger batch would leave no room for.

    Raises:
        MisconfigurationException: An int ``val_check_interval`` above the batches of a later epoch.
    """
    interval = trainer.val_check_interval
    if plan is None or not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
        return
    whole = [math.ceil(stage.steps / stage.epochs) for stage in plan.stages if stage.epochs >= 1]
    batches = min(whole, default=interval) * trainer.accumulate_grad_batches
    if interval > batches:
        raise MisconfigurationException(
            f"`val_check_interval={interval}` counts batches, but as the batch size grows an epoch will have only "
            f"{batches} of them; write a fraction (1.0 for the end of the epoch), or `check_val_every_n_epoch=None` to "
            "count over all epochs"
        )


def check_same_on_all_processes(trainer: Trainer, plan: Plan | None) -> None:
    """Refuse plans that differ between the processes, which would then wait for each other forever.

    Raises:
        MisconfigurationException: This process has another plan than the first, or another process has.
    """
    if trainer.world_size == 1:
        return
    digest = hashlib.sha256(repr(plan).encode()).hexdigest()
    same = digest == trainer.strategy.broadcast(digest)
    if not trainer.strategy.reduce_boolean_decision(same):
        raise MisconfigurationException(
            "the processes do not plan the same batch sizes and learning rates: the schedule, or the length of the training "
            "set, differs between them. Make both depend on nothing that a process measures or reads for itself"
        )
