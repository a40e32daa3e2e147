"""Checks of settings that do not work with a scheduled batch size. Each error says what to write instead."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from contextlib import ExitStack

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn import Module, SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS
from torch.utils.hooks import RemovableHandle

from lightning_bsl.callbacks.fit import Budget
from lightning_bsl.callbacks.loaders import limit_of
from lightning_bsl.callbacks.loss_terms import has_loss_terms
from lightning_bsl.callbacks.micro_batches import StepSplitter
from lightning_bsl.callbacks.sources import DataSource
from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.data.stream_loader import StreamDataModule
from lightning_bsl.schedules import Constant, JointSchedule, Plan, ScalingRule


def refuse(
    trainer: Trainer, pl_module: LightningModule, schedule: JointSchedule, max_device_batch_size: object, budget: Budget
) -> None:
    """Refuse settings that cannot work, as far as ``setup`` can see them.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
        schedule: Batch size and learning rate.
        max_device_batch_size: The argument of ``BatchLRScheduler``.
        budget: The end of the run in samples or tokens.

    Raises:
        MisconfigurationException: A setting cannot work.
    """
    _refuse_company(trainer, schedule)
    if budget != Budget() and (least := [name for name in ("min_steps", "min_epochs") if getattr(trainer, name)]):
        raise MisconfigurationException(
            f"`{least[0]}={getattr(trainer, least[0])}` of the Trainer lets a run go on after `max_samples` or `max_tokens`: "
            "leave one of them out"
        )
    accumulate = trainer.accumulate_grad_batches
    if accumulate != 1 and isinstance(trainer.datamodule, (BatchSizeDataModule, StreamDataModule)):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"`accumulate_grad_batches={accumulate}` with a {type(trainer.datamodule).__name__}: its batch size "  # type: ignore[attr-defined]
            "is already that of a whole optimizer step. Write `accumulate_grad_batches=1` and the batch size you want"
        )
    if accumulate != 1 and max_device_batch_size is not None:
        raise MisconfigurationException(
            f"`accumulate_grad_batches={accumulate}` and `max_device_batch_size={max_device_batch_size!r}` both split a step. "
            "Write `accumulate_grad_batches=1`"
        )
    if not pl_module.automatic_optimization and trainer.max_steps != -1:
        raise MisconfigurationException(
            f"with manual optimization `max_steps={trainer.max_steps}` counts the calls of `optimizer.step`. Their number per "
            "batch is not known, so the end of the run is not known. Bound it by `max_epochs` (with `limit_train_batches` for "
            "a part of an epoch), or by `max_time`"
        )
    if has_loss_terms(pl_module) and is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "`training_step(dataloader_iter)` fetches its batches itself, so `loss_terms(batch)` cannot be called before the "
            "backward pass: write `training_step(batch)`"
        )
    if max_device_batch_size == "auto":
        _refuse_auto(trainer, pl_module)


def _refuse_auto(trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "with manual optimization a step that ran out of memory cannot be repeated: write a batch size that fits, and "
            "leave out `max_device_batch_size='auto'`"
        )
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"with {type(trainer.strategy).__name__} a process that runs out of memory leaves the others waiting for its "
            "parameters: write a number for `max_device_batch_size`"
        )


def _refuse_company(trainer: Trainer, schedule: JointSchedule) -> None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise MisconfigurationException(
            "GradientAccumulationScheduler and BatchLRScheduler would both change the batch of an optimizer step; remove it "
            "and write the growth as `BatchLRScheduler(batch_size=...)`"
        )
    if any(isinstance(callback, BatchSizeFinder) for callback in callbacks):
        raise MisconfigurationException(
            "BatchSizeFinder and BatchLRScheduler would both set the batch size; remove it and bound the schedule with "
            "`maximum=...`"
        )
    if schedule.lr is not None and any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise MisconfigurationException(
            f"StochasticWeightAveraging and BatchLRScheduler(lr={schedule.lr}) would both set the learning rate; write "
            "`lr=None`, or leave one of the two out"
        )
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise MisconfigurationException(
            "DeepSpeed's engine splits steps and scales the loss with its own settings, which BatchLRScheduler does not "
            "change; use `strategy='ddp'`"
        )


def check_split(trainer: Trainer, pl_module: LightningModule, data: DataSource, plan: Plan | None, largest: int) -> None:
    """Check that the fit works if steps are split into micro-batches.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
        data: The training data.
        plan: The plan of the run, if there is one.
        largest: The largest batch size of the run.

    Raises:
        MisconfigurationException: Steps will be split, and a setting does not allow it.
    """
    cut = data.cut
    if data.most_batches(largest) == 1 or not (plan is None or data.splits(plan)):
        return
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "`training_step(dataloader_iter)` fetches its batches itself, so no step can be split into micro-batches: write "
            "`training_step(batch)`, or leave out `max_device_batch_size`, `max_device_tokens` and `accumulate_grad_batches`"
        )
    tokens = data.lengths.max_device_tokens if data.lengths is not None and cut.by_length else None
    size = data.whole_batches or cut.max_device_batch_size
    name = "whole_batches" if data.whole_batches else "max_device_batch_size"
    cap = f"{name}={size}" if tokens is None else f"max_device_tokens={tokens}"
    limit, sizes = limit_of(trainer), {stage.batch_size for stage in plan.stages} if plan else {largest}
    limited = (isinstance(limit, int) or limit != 1.0) and not trainer.fast_dev_run  # type: ignore[attr-defined]
    whole = cut.accumulate > 1 and isinstance(limit, int) and limit % cut.accumulate == 0
    if limited and not (whole and all(size % (cut.accumulate * cut.world_size) == 0 for size in sizes)):
        by = f"accumulate_grad_batches={cut.accumulate}" if cut.accumulate > 1 else cap
        raise MisconfigurationException(
            f"`limit_train_batches={limit}` counts micro-batches, since `{by}` splits the steps, so an epoch would end inside "
            "a step; write `BatchSizeDataModule(samples_per_epoch=...)` or `Trainer(max_steps=...)`"
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"with manual optimization a step of {largest} {data.measure.unit if data.measure else 'examples'} cannot be split "
            f"into micro-batches (`{cap}`); leave out `{cap.split('=')[0]}`"
        )
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise MisconfigurationException(
            f"LBFGS evaluates a step's batch several times, so the step cannot be split into micro-batches (`{cap}`): leave "
            f"out `{cap.split('=')[0]}`, or write `max_device_batch_size='auto'`"
        )
    _check_beside(trainer, data, plan, cap.split("=")[0])
    if any(isinstance(module, _BatchNorm) for module in pl_module.modules()) and (size or tokens):
        rank_zero_warn(
            f"the model has BatchNorm, whose statistics are those of a micro-batch: steps of more than "
            f"{size if tokens is None else tokens} {'examples' if tokens is None else 'padded tokens'} a "
            "process will not train exactly as without micro-batches"
        )


def _batches(data: DataSource, plan: Plan | None) -> Counter[int]:
    """The number of micro-batches of each epoch of a plan."""
    batches: Counter[int] = Counter()
    for stretch, start in plan.stretches_of_epochs() if plan else ():
        batches[stretch.start.epoch] += data.batches(stretch, start)
    return batches


def _check_beside(trainer: Trainer, data: DataSource, plan: Plan | None, cap: str) -> None:
    """Refuse a run in which another loader would end an epoch inside a step."""
    epoch = data.epoch(trainer)
    beside = epoch.beside if epoch else None
    if beside is None or not beside.lengths:
        return
    ends, other = (min, min(beside.lengths)) if beside.mode == "min_size" else (max, max(beside.lengths))
    for number, count in _batches(data, plan).items():
        if ends(count, other) != count:
            raise MisconfigurationException(
                f"in epoch {number} another loader, of {other} batches, sets the length of the epoch, and may end it inside a "
                f"step that is split into micro-batches. Leave out `{cap}`, or give that loader another length"
            )


class _OneExample:
    """A hook that checks, at the first batch, whether BatchNorm would fail on a batch of one example.

    Only then it is known how many values per channel one example has.
    """

    def __init__(self, splitter: StepSplitter, message: str) -> None:
        self.splitter, self.message = splitter, message
        self.hooks: dict[Module, RemovableHandle] = {}

    def __call__(self, module: Module, inputs: tuple[Tensor, ...]) -> None:
        if not module.training or not self.splitter.under_way:
            return
        values = inputs[0].numel() // inputs[0].shape[1]  # per channel
        if values <= self.splitter.micro_batch:
            raise MisconfigurationException(self.message)
        self.hooks[module].remove()


def check_batch_norm(
    pl_module: LightningModule, data: DataSource, plan: Plan | None, splitter: StepSplitter, undo: ExitStack
) -> None:
    """Make the first step fail if BatchNorm would fail at a later step: it needs two values per channel.

    Args:
        pl_module: The LightningModule.
        data: The training data.
        plan: The plan of the run, if there is one.
        splitter: Knows the number of examples of the current batch.
        undo: Removes the hooks when it is closed.
    """
    layers = [layer for layer in pl_module.modules() if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)]
    for stretch, start in plan.stretches_of_epochs() if plan and layers else ():
        for size, sizes in data.sizes(stretch, start):
            if min(sizes) <= 1:
                check = _OneExample(
                    splitter,
                    f"in epoch {stretch.start.epoch} a step has {size} example{'s' * (size > 1)}, so a batch of one example is "
                    "trained, and BatchNorm needs two. Leave out the short last step (`drop_last=True`), or write other batch "
                    "sizes or another `max_device_batch_size`",
                )
                for layer in layers:
                    check.hooks[layer] = layer.register_forward_pre_hook(check)
                    undo.callback(check.hooks[layer].remove)
                return


def check_grows(trainer: Trainer, data: DataSource, plan: Plan | None, schedule: JointSchedule) -> None:
    """Warn if the batch size changes only between epochs and there is no second epoch.

    Args:
        trainer: The Trainer.
        data: The training data.
        plan: The plan of the run, if there is one.
        schedule: Batch size and learning rate.
    """
    data.check(plan)
    endless = trainer.num_training_batches == math.inf
    if (
        not data.grows_inside
        and not isinstance(schedule.batch_size, Constant)
        and (trainer.max_epochs == 1 or endless or (plan is not None and plan.epochs <= 1))
    ):
        rank_zero_warn(
            f"the batch size of this training loader changes only between epochs, and the run has "
            f"{'an epoch without a known end' if endless else 'one epoch'}, so it may never change. To grow inside an epoch, "
            "give a DataLoader over a data set with `__len__` and `__getitem__`, without a `batch_sampler`"
        )


def check_training(
    trainer: Trainer,
    pl_module: LightningModule,
    data: DataSource,
    plan: Plan | None,
    schedule: JointSchedule,
    splitter: StepSplitter,
    undo: ExitStack,
) -> None:
    """Refuse settings that cannot work, as far as ``on_train_start`` can see them, and warn of others.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
        data: The training data.
        plan: The plan of the run, if there is one.
        schedule: Batch size and learning rate.
        splitter: Splits the steps.
        undo: Removes the hooks for the first batch when it is closed.

    Raises:
        MisconfigurationException: A setting cannot work.
    """
    check_grows(trainer, data, plan, schedule)
    sizes = [stage.batch_size for stage in plan.stages] if plan else []
    largest = schedule.largest or max(sizes, default=schedule.batch_size_at(data.sizes_at()))
    check_split(trainer, pl_module, data, plan, largest)
    check_val_interval(trainer, data, plan)
    check_same_on_all_processes(trainer, plan, data)
    check_batch_norm(pl_module, data, plan, splitter, undo)


def check_ceiling(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse ``max_device_batch_size="auto"`` if the processes communicate inside the model.

    Raises:
        MisconfigurationException: The model has SyncBatchNorm and there are several processes.
    """
    if trainer.world_size > 1 and any(isinstance(module, SyncBatchNorm) for module in pl_module.modules()):
        raise MisconfigurationException(
            "with SyncBatchNorm a process that runs out of memory leaves the others waiting for its statistics: write a number "
            "for `max_device_batch_size`"
        )


def check_beside_scheduler(trainer: Trainer, schedule: JointSchedule) -> None:
    """Refuse two owners of one learning rate. (A scaling rule is allowed: it multiplies the rates of a scheduler.)

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


def refuse_sharded(trainer: Trainer, name: str, needs: str) -> None:
    """Refuse strategies with which no process holds the whole model.

    Args:
        trainer: The Trainer.
        name: Name of the callback that does not work with them.
        needs: What this callback needs whole, such as "gradients".

    Raises:
        MisconfigurationException: The Trainer has such a strategy.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise MisconfigurationException(
            f"{name} needs whole {needs}, which {type(trainer.strategy).__name__} does not keep; use "
            "`strategy='ddp'`, or leave it out"
        )


def check_sharding(trainer: Trainer, pl_module: LightningModule, trained: list[Tensor], name: str) -> None:
    """Refuse strategies with which a process does not compute whole gradients of its own examples.

    With ``fully_shard`` it does: its backward pass computes them, and only then they are averaged and sharded.

    Args:
        trainer: The Trainer, after its strategy was set up.
        pl_module: The LightningModule.
        trained: The parameters that the optimizer trains.
        name: Name of the callback that measures these gradients.

    Raises:
        MisconfigurationException: FSDPStrategy, DeepSpeed, tensor parallelism, or parameters that are not sharded.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            f"{name} cannot read the gradients of single parameters from the flat parameters of FSDPStrategy; use "
            f"`ModelParallelStrategy` with `fully_shard`, or `strategy='ddp'`, or leave {name} out"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        refuse_sharded(trainer, name, "gradients")
        return
    parallel = strategy.device_mesh["tensor_parallel"].size()
    if parallel > 1:
        raise MisconfigurationException(
            f"with `tensor_parallel_size={parallel}` no process computes whole gradients, which {name} needs; write "
            f"`tensor_parallel_size=1`, or leave {name} out"
        )
    for parameter in trained:
        mesh = getattr(parameter, "device_mesh", None)  # of a DTensor
        if mesh is None or mesh.size() != trainer.world_size:
            raise MisconfigurationException(
                f"a parameter of shape {tuple(parameter.shape)} is not sharded over all {trainer.world_size} processes, so its "
                f"gradient is not averaged over them, and {name} cannot measure it; call `fully_shard` in `configure_model` on "
                "a module that holds it"
            )
    required = sum(parameter.requires_grad for parameter in pl_module.parameters())
    if required != len(trained):
        raise MisconfigurationException(
            f"{required} parameters require gradients, and the optimizer has {len(trained)} of them; with "
            f"ModelParallelStrategy {name} cannot tell which: call `requires_grad_(False)` on the others"
        )


def check_val_interval(trainer: Trainer, data: DataSource, plan: Plan | None) -> None:
    """Refuse an interval between validations that is longer than a later epoch.

    Args:
        trainer: The Trainer.
        data: The training data.
        plan: The plan of the run, if there is one.

    Raises:
        MisconfigurationException: An int ``val_check_interval`` above the batches of a later epoch.
    """
    interval = getattr(trainer, "val_check_interval", None)  # there is none where it is a time
    if plan is None or not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
        return
    whole = [count for epoch, count in _batches(data, plan).items() if epoch < int(plan.epochs + 1e-4)]
    if interval > (batches := min(whole, default=interval)):
        raise MisconfigurationException(
            f"`val_check_interval={interval}` counts batches, but when the batch size has grown an epoch will have only "
            f"{batches} of them; write a fraction (1.0 for the end of the epoch), or `check_val_every_n_epoch=None` to "
            "count over all epochs"
        )


def check_same_on_all_processes(trainer: Trainer, plan: Plan | None, data: DataSource) -> None:
    """Refuse plans and orders of examples that differ between the processes: these would wait for each other forever.

    Args:
        trainer: The Trainer.
        plan: The plan of the run, if there is one.
        data: The training data.

    Raises:
        MisconfigurationException: The plan, the order or the lengths of the examples differ.
    """
    if trainer.world_size == 1:
        return
    remedies = {
        "the processes do not plan the same batch sizes and learning rates: the schedule, or the length of the training "
        "set, differs between them. Make both the same on every process": plan,
        "the sampler of the training loader gives another order on each process, but the processes share every step: "
        "give it the same seed on every process, and let it give all examples, not one process's part": data.drawn(),
        "the lengths of the training examples differ between the processes, so they would split a step differently: make "
        "`lengths` depend only on the example": data.lengths.digest if data.lengths is not None else None,
    }
    for message, value in remedies.items():
        digest = hashlib.sha256(repr(value).encode()).hexdigest()
        if not trainer.strategy.reduce_boolean_decision(digest == trainer.strategy.broadcast(digest)):
            raise MisconfigurationException(message)
