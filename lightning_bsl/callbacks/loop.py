"""The only file that reads what Lightning keeps to itself: attributes of its loops, and the loops' part of a checkpoint."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric


def _replace(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute of one object; closing ``undo`` puts back what was there."""
    attributes = vars(owner)
    if name in attributes:
        undo.callback(attributes.__setitem__, name, attributes[name])
    else:
        undo.callback(attributes.pop, name, None)
    attributes[name] = value


def remake_training_data(trainer: Trainer, remake: Callable[[Callable[[], Any]], Any], undo: ExitStack) -> None:
    """Have Lightning train on ``remake(ask)`` wherever it would train on ``ask()``: what the user gave, however he gave it.

    Lightning asks for it at the start of a fit, and at each reload.
    """
    source = trainer.fit_loop._data_source
    ask = source.dataloader

    def dataloader() -> Any:
        try:
            return remake(ask)
        except Exception as error:
            return _Failed(error)

    _replace(source, "dataloader", dataloader, undo)


class _Failed:
    """Raises an error as soon as it is iterated.

    While Lightning asks for loaders it has methods of the class ``DataLoader`` replaced, and an error would leave them so for
    the rest of the process. It iterates what it was given right afterwards.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Any:
        raise self.error


def load_training_data(trainer: Trainer) -> None:
    """Have Lightning make the training loader now, if there is none yet."""
    trainer.fit_loop.setup_data()


def forget_training_data(trainer: Trainer) -> None:
    """Have Lightning ask for the training loader anew, as it was asked for before a checkpoint was read."""
    trainer.fit_loop._combined_loader = None


def with_distributed_sampler(trainer: Trainer, loader: Any) -> Any:
    """The loader as Lightning makes it for a run of several processes."""
    return trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)


def end_workers(loader: Any) -> None:
    """End a loader's worker processes now: left to the garbage collector, each of them takes five seconds."""
    _shutdown_workers_and_reset_iterator(loader)


def before_batch_counts(trainer: Trainer, hook: Callable[[int], bool], undo: ExitStack) -> None:
    """Call ``hook(batch_idx)`` after each batch, before Lightning decides whether it was a step.

    Also for a batch that is ``None``, for which Lightning calls no hook of a callback before that. ``hook`` returns whether
    Lightning gave the batch to be trained.

    Lightning does not count as started a batch that is ``None``, nor one at which ``on_train_batch_start`` ends the epoch;
    the latter it does not count as completed either. From such counts it would not know where a checkpoint was saved.
    """
    loop = trainer.fit_loop.epoch_loop
    update, progress = loop.update_lr_schedulers, cast(Any, loop.batch_progress)

    def update_lr_schedulers(interval: str, update_plateau_schedulers: bool) -> None:
        if not update_plateau_schedulers and interval == "step":
            given = hook(progress.current.ready - 1)
            _count_as_started(trainer, completed=given)
        if trainer.lr_scheduler_configs:  # else there are none to update
            update(interval, update_plateau_schedulers=update_plateau_schedulers)

    _replace(loop, "update_lr_schedulers", update_lr_schedulers, undo)


def _count_as_started(trainer: Trainer, completed: bool) -> None:
    progress = cast(Any, trainer.fit_loop.epoch_loop.batch_progress)
    if progress.current.started < progress.current.ready:
        progress.increment_started()
        if completed:
            progress.increment_completed()


def count_batch_that_ended_epoch(trainer: Trainer) -> None:
    """In ``on_train_epoch_end``: count the batch at which ``on_train_batch_start`` ended the epoch.

    Before 2.6 Lightning ends the epoch there and then; ``before_batch_counts`` does not see it.
    """
    _count_as_started(trainer, completed=True)


def resume_quietly(trainer: Trainer, before_fetch: Callable[[], None], exact: bool, undo: ExitStack) -> None:
    """In ``on_train_start`` of a run that goes on: prepare its first batch.

    Args:
        trainer: The Trainer.
        before_fetch: Called once, before the first batch is fetched.
        exact: Whether the loaders go on where they were: then Lightning says nothing of loaders that cannot.
        undo: Puts everything back when it is closed.
    """
    loop = trainer.fit_loop.epoch_loop
    reset, start_fetch = loop.reset, loop._on_before_fetch
    once = [before_fetch]

    def quiet_reset() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*ended before the epoch ended and your dataloader")
            reset()

    def on_before_fetch() -> None:
        start_fetch()
        if once:
            once.pop()()

    if exact:
        _replace(loop, "reset", quiet_reset, undo)
    _replace(loop, "_on_before_fetch", on_before_fetch, undo)


def isolate_validation(trainer: Trainer, isolate: Callable[[], AbstractContextManager[None]], undo: ExitStack) -> None:
    """Have validations run in a context, in which they draw no random numbers from those that training goes on with.

    A run that is resumed from a checkpoint just before a validation leaves the validation out.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    run = loop.run

    def isolated() -> Any:
        with isolate():
            return run()

    _replace(loop, "run", isolated, undo)


def take_step(trainer: Trainer, batch_idx: int, counted: bool) -> None:
    """Have the optimizer step with the gradients that are there.

    Args:
        trainer: The Trainer, in automatic optimization.
        batch_idx: Index of the batch.
        counted: Whether Lightning has counted the step already.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization

    def closure() -> Tensor:
        return torch.zeros((), device=trainer.strategy.root_device)  # a loss: with None a loss scaler would skip the step

    if counted:
        optimizer = trainer.strategy._lightning_optimizers[0]
        trainer.lightning_module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, closure)
    else:
        loop._optimizer_step(batch_idx, closure)


def set_steps_taken(trainer: Trainer, steps: int) -> None:
    """Before a batch is fetched: say how many steps were taken.

    Lightning counts one too many after a resume from a checkpoint that was saved inside a step.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


def steps_taken(trainer: Trainer) -> int:
    """In ``on_train_batch_end``: the batches that stepped so far, whatever number of optimizers stepped in each."""
    loop = trainer.fit_loop.epoch_loop
    return loop._batches_that_stepped + (not loop._should_accumulate())


def logged_at(trainer: Trainer) -> int:
    """The x at which Lightning writes its own rows: the batches that stepped before."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def writes_step(trainer: Trainer) -> bool:
    """Whether Lightning will write what is logged in this step; what is logged in others costs time and is dropped."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    # as its logger connector has it, which takes as long as all else that is done in a step
    return bool(every) and ((trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0 or trainer.should_stop)


def set_epoch_length(trainer: Trainer, index: int, batches: int) -> None:
    """Tell Lightning that a training loader has another number of batches in the epoch under way than it began with.

    Args:
        trainer: The Trainer.
        index: The loader's index among all.
        batches: Its batches.
    """
    loop = trainer.fit_loop
    combined = cast(Any, loop._combined_loader)
    combined.limits[index] = batches  # in place: the live iterator shares the list
    batches = len(combined)
    cast(Any, loop._data_fetcher).length = loop.max_batches = batches
    if isinstance(getattr(trainer, "val_check_interval", None), float):  # there is none where it is a time
        trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar):
        bar.train_progress_bar.total = batches
    elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, total=batches)


def ended_epoch(checkpoint: dict[str, Any], max_steps: int) -> bool:
    """Whether Lightning resumes a checkpoint with the next epoch, without an ``on_train_epoch_end`` before.

    It does where the checkpoint was saved in ``on_train_batch_end`` of an epoch's last batch. With ``max_steps`` one saved in
    ``on_train_epoch_end`` is made to look so: Lightning would end that epoch a second time, and count it twice.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    if max_steps != -1 and epochs["total"]["completed"] < epochs["total"]["processed"]:
        for count in ("total", "current"):
            batches[count]["completed"] -= 1
            epochs[count]["processed"] -= 1
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    return bool(batches["is_last_batch"] and batches["total"]["completed"] < batches["total"]["processed"])


def begin_epoch(trainer: Trainer) -> None:
    """Have Lightning begin the epoch after one that ``ended_epoch`` as any other.

    It would go on as if inside an epoch: without ``on_train_epoch_start``, and without counting the epoch as begun, so that
    from the checkpoints of the rest of the run it would train an epoch again, or leave out its validation.
    """
    trainer.fit_loop.reset_restart_stage()


def set_batches_done(trainer: Trainer, batches: int, epoch_ended: bool) -> None:
    """In ``on_train_start``: have Lightning resume an epoch after ``batches`` of its batches.

    The checkpoint counted the micro-batches of the run that saved it, and those of a step that was not finished.

    Args:
        trainer: The Trainer.
        batches: Batches of the epoch that are done.
        epoch_ended: Whether these are all, so that Lightning begins the next epoch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    current, total = progress.current, cast(Any, progress.total)
    # in `on_train_batch_end` the batch just done is not counted as completed yet; Lightning makes up for it on resume
    in_batch_end = total.ready == total.processed == total.completed + 1
    shift = batches - in_batch_end - current.completed
    for name in ("ready", "started", "processed", "completed"):
        setattr(current, name, getattr(current, name) + shift)
        if not epoch_ended:  # the interval of validations may be counted over all epochs
            setattr(total, name, getattr(total, name) + shift)


def start_epoch_after_fit(checkpoint: dict[str, Any]) -> None:
    """Have Lightning resume with the first batch of an epoch where a checkpoint was saved after the end of a fit.

    With ``max_steps`` it takes the batches of the epoch that ended for batches of the next one.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"]["total"], loop["epoch_loop.batch_progress"]
    if epochs["completed"] == epochs["ready"]:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def to_device(trainer: Trainer, batch: Any) -> Any:
    """Take a training batch through the transfer hooks, as the training loop does."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


Train = Callable[[Any, bool, bool], "Tensor | None"]


def logged_metrics(trainer: Trainer) -> dict[str, Metric]:
    """What ``self.log`` has collected in this epoch, by name."""
    return cast("dict[str, Metric]", trainer._results)


def walk_steps(trainer: Trainer, walk: Callable[[Any, Train], Tensor | None], undo: ExitStack) -> None:
    """Have every optimizer step take its batch through ``walk(batch, train)`` instead of one ``training_step``.

    ``train(part, first, last)`` runs ``training_step`` and the backward pass on a part of the batch and returns its loss. The
    ``first`` part clears the gradients, the ``last`` one reduces them over the processes. ``walk`` returns the step's loss.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization

    def run(optimizer: Optimizer, batch_idx: int, arguments: OrderedDict[str, Any]) -> dict[str, Any]:
        name, batch = next(iter(arguments.items()))
        outputs: dict[str, Any] = {}

        def train(part: Any, first: bool, last: bool) -> Tensor | None:
            _set_batch(trainer, part)
            closure = loop._make_closure(OrderedDict(arguments, **{name: part}), optimizer, batch_idx)
            if not first:
                closure._zero_grad_fn = None
            with _block_parallel_sync_behavior(trainer.strategy, block=not last):
                loss = closure()
            outputs.update(closure.consume_result().extra)
            return loss

        def step() -> Tensor | None:
            loss = walk(batch, train)
            if loss is not None:
                outputs["loss"] = loss
            return loss

        loop._optimizer_step(batch_idx, step)
        _set_batch(trainer, batch)
        return outputs

    _replace(loop, "run", run, undo)


def _set_batch(trainer: Trainer, batch: Any) -> None:
    """Tell Lightning's log what is being trained: the batch's size is the weight of a value."""
    results = cast(Any, trainer._results)
    results.batch, results.batch_size = batch, None
