"""The only file that uses private parts of Lightning: attributes of its loops, and the loops' part of a checkpoint."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric


def _replace(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute of one object until ``undo`` is closed."""
    attributes = vars(owner)
    if name in attributes:
        undo.callback(attributes.__setitem__, name, attributes[name])
    else:
        undo.callback(attributes.pop, name, None)
    attributes[name] = value


def remake_training_data(trainer: Trainer, remake: Callable[[Callable[[], Any]], Any], undo: ExitStack) -> None:
    """Make Lightning train on ``remake(ask)`` instead of ``ask()``, the user's loaders.

    Lightning asks for the loaders at the start of a fit, and at each reload.

    Args:
        trainer: The Trainer.
        remake: Makes the loaders of the fit; its argument returns the user's loaders.
        undo: Restores Lightning when it is closed.
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
    """An object that raises an error when it is iterated.

    While Lightning asks for loaders, it has replaced methods of the class ``DataLoader``. An error at this moment would leave
    them replaced for the rest of the process. Right afterwards Lightning iterates over the loaders that it got.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Any:
        if isinstance(self.error, TypeError):  # which Lightning takes for "cannot be iterated", and says that instead
            raise MisconfigurationException(f"{type(self.error).__name__}: {self.error}") from self.error
        raise self.error


def load_training_data(trainer: Trainer) -> None:
    """Make Lightning set up the training loader now, if there is none yet."""
    trainer.fit_loop.setup_data()


def forget_training_data(trainer: Trainer) -> None:
    """Make Lightning ask for the training loader again, if it did so before the checkpoint was read."""
    trainer.fit_loop._combined_loader = None


def with_distributed_sampler(trainer: Trainer, loader: Any) -> Any:
    """The loader as Lightning changes it for a run of several processes."""
    return trainer._data_connector._prepare_dataloader(loader, shuffle=True, mode=RunningStage.TRAINING)


def end_workers(loader: Any) -> None:
    """End a loader's worker processes now. The garbage collector would need five seconds for each of them."""
    _shutdown_workers_and_reset_iterator(loader)


def before_batch_counts(trainer: Trainer, hook: Callable[[int], bool], undo: ExitStack) -> None:
    """Call ``hook(batch_idx)`` after each batch, before Lightning decides whether it was a step.

    It is called for a batch that is ``None`` too, for which Lightning calls no hook of a callback. ``hook`` returns whether the
    batch was trained.

    Lightning does not count a batch that is ``None`` as started, nor a batch at which ``on_train_batch_start`` ends the epoch.
    It does not count the latter as completed either. With these counts Lightning could not resume from a checkpoint at the
    right batch, so they are corrected here.

    Args:
        trainer: The Trainer.
        hook: The function to call.
        undo: Restores Lightning when it is closed.
    """
    loop = trainer.fit_loop.epoch_loop
    update, progress = loop.update_lr_schedulers, cast(Any, loop.batch_progress)

    def update_lr_schedulers(interval: str, update_plateau_schedulers: bool) -> None:
        if not update_plateau_schedulers and interval == "step":
            trained = hook(progress.current.ready - 1)
            _count_as_started(trainer, completed=trained)
        if trainer.lr_scheduler_configs:  # without schedulers the call only costs time
            update(interval, update_plateau_schedulers=update_plateau_schedulers)

    _replace(loop, "update_lr_schedulers", update_lr_schedulers, undo)


def _count_as_started(trainer: Trainer, completed: bool) -> None:
    progress = cast(Any, trainer.fit_loop.epoch_loop.batch_progress)
    if progress.current.started < progress.current.ready:
        progress.increment_started()
        if completed:
            progress.increment_completed()


def count_batch_that_ended_epoch(trainer: Trainer) -> None:
    """Count the batch at which ``on_train_batch_start`` ended the epoch; called in ``on_train_epoch_end``.

    Lightning before 2.6 ends the epoch at once, so ``before_batch_counts`` does not see this batch.
    """
    _count_as_started(trainer, completed=True)


def resume_quietly(trainer: Trainer, before_fetch: Callable[[], None], exact: bool, undo: ExitStack) -> None:
    """Prepare the first batch of a resumed run; called in ``on_train_start``.

    Args:
        trainer: The Trainer.
        before_fetch: Called once, before the first batch is fetched.
        exact: Whether the loaders can resume inside an epoch: Lightning's warning that they cannot is then suppressed.
        undo: Restores Lightning when it is closed.
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
    """Run validations in a context that keeps training's random generators unchanged.

    Otherwise a run that resumes just before a validation would differ, since Lightning skips this validation.

    Args:
        trainer: The Trainer.
        isolate: Returns the context.
        undo: Restores Lightning when it is closed.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop

    def isolated(original: Callable[[], Any]) -> Any:
        with isolate():
            return original()

    # to skip a validation Lightning makes an iterator of its loader, which draws a random number, too
    for name in ("run", "increment_progress_to_evaluation_end"):
        if hasattr(loop, name):  # not every version has the second
            _replace(loop, name, partial(isolated, getattr(loop, name)), undo)


def take_step(trainer: Trainer, batch_idx: int, counted: bool) -> None:
    """Make the optimizer step with the current gradients.

    Args:
        trainer: The Trainer, in automatic optimization.
        batch_idx: Index of the batch.
        counted: Whether Lightning has counted the step already.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization

    def closure() -> Tensor:
        return torch.zeros((), device=trainer.strategy.root_device)  # not None, since a loss scaler would then skip the step

    if counted:
        optimizer = trainer.strategy._lightning_optimizers[0]
        trainer.lightning_module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, closure)
    else:
        loop._optimizer_step(batch_idx, closure)


def set_steps_taken(trainer: Trainer, steps: int) -> None:
    """Set Lightning's number of steps; called before a batch is fetched.

    After a resume from a checkpoint inside a step Lightning counts one step too many.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


def steps_taken(trainer: Trainer) -> int:
    """The number of batches with an optimizer step so far, for any number of optimizers; called in ``on_train_batch_end``."""
    loop = trainer.fit_loop.epoch_loop
    return loop._batches_that_stepped + (not loop._should_accumulate())


def logged_at(trainer: Trainer) -> int:
    """The step number that Lightning gives its own logged values: the number of batches with a step before this one."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def writes_step(trainer: Trainer) -> bool:
    """Whether Lightning writes values that are logged in this step. Other values are dropped, and cost time."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    # the same condition as in Lightning's logger connector, which is slow
    return bool(every) and ((trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0 or trainer.should_stop)


def set_epoch_length(trainer: Trainer, index: int, batches: int) -> None:
    """Change the number of batches of a training loader in the current epoch, for Lightning and its progress bar.

    Args:
        trainer: The Trainer.
        index: Index of the loader.
        batches: Its new number of batches.
    """
    loop = trainer.fit_loop
    combined = cast(Any, loop._combined_loader)
    combined.limits[index] = batches  # in place, since the running iterator shares this list
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
    """Whether Lightning resumes from a checkpoint with the next epoch, without a call of ``on_train_epoch_end`` before.

    It does so if the checkpoint was saved in ``on_train_batch_end`` of an epoch's last batch. With ``max_steps`` a checkpoint
    that was saved in ``on_train_epoch_end`` is changed to look the same, because Lightning would count its epoch twice.

    Args:
        checkpoint: The checkpoint; its counts may be changed.
        max_steps: The Trainer's ``max_steps``.
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
    """Make Lightning begin the next epoch in the usual way, after ``ended_epoch``.

    Otherwise it would go on as if inside an epoch: without ``on_train_epoch_start``, and without counting the epoch. From later
    checkpoints it would then train an epoch twice, or skip its validation.
    """
    trainer.fit_loop.reset_restart_stage()


def set_batches_done(trainer: Trainer, batches: int, epoch_ended: bool) -> None:
    """Make Lightning resume an epoch after ``batches`` of its batches; called in ``on_train_start``.

    The counts of the checkpoint are those of the micro-batches of the run that saved it, with those of an unfinished step.

    Args:
        trainer: The Trainer.
        batches: Number of completed batches of the epoch.
        epoch_ended: Whether these are all batches, so that Lightning begins the next epoch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    current, total = progress.current, cast(Any, progress.total)
    # a checkpoint of `on_train_batch_end` does not count the last batch as completed; Lightning adds it when it resumes
    in_batch_end = total.ready == total.processed == total.completed + 1
    shift = batches - in_batch_end - current.completed
    for name in ("ready", "started", "processed", "completed"):
        setattr(current, name, getattr(current, name) + shift)
        if not epoch_ended:  # the total counts too, since the interval of validations may go over epochs
            setattr(total, name, getattr(total, name) + shift)


def start_epoch_after_fit(checkpoint: dict[str, Any]) -> None:
    """Make Lightning resume with the first batch of an epoch, from a checkpoint that was saved after the end of a fit.

    With ``max_steps`` Lightning would count the batches of the completed epoch as batches of the next one.

    Args:
        checkpoint: The checkpoint; its counts may be changed.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"]["total"], loop["epoch_loop.batch_progress"]
    if epochs["completed"] == epochs["ready"]:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


def to_device(trainer: Trainer, batch: Any) -> Any:
    """Transfer a training batch to the device with all hooks, like the training loop."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


Train = Callable[[Any, bool, bool], "Tensor | None"]


def logged_metrics(trainer: Trainer) -> dict[str, Metric]:
    """The values that ``self.log`` has collected in this epoch, by name."""
    return cast("dict[str, Metric]", trainer._results)


def walk_steps(trainer: Trainer, walk: Callable[[Any, Train], Tensor | None], undo: ExitStack) -> None:
    """Replace the one ``training_step`` of every optimizer step by ``walk(batch, train)``, which returns the step's loss.

    ``train(part, first, last)`` runs ``training_step`` and the backward pass on a part of the batch, and returns its loss. The
    ``first`` part clears the gradients, and the ``last`` part reduces them over the processes.

    Args:
        trainer: The Trainer.
        walk: Trains the parts of a batch.
        undo: Restores Lightning when it is closed.
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
    """Set the batch of Lightning's logging: its size is the weight of logged values."""
    results = cast(Any, trainer._results)
    results.batch, results.batch_size = batch, None


def validate_when(trainer: Trainer, due: Callable[[], bool], undo: ExitStack) -> None:
    """Make Lightning validate after a batch if ``due()``, and at no other time.

    Lightning asks after each batch, and at the start of a resumed epoch.

    Args:
        trainer: The Trainer.
        due: Whether to validate.
        undo: Restores Lightning when it is closed.
    """
    loop = trainer.fit_loop.epoch_loop
    _replace(loop, "_should_check_val_fx", lambda _: due(), undo)


def validate_before_training(trainer: Trainer) -> None:
    """Make a resumed fit begin with a validation, if ``validate_when`` says so; called in ``on_train_start``.

    Lightning does this only from a checkpoint that was saved inside a validation, and then goes on inside it. It skips a
    validation that was due after a checkpoint of ``on_train_batch_end``.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # begin with the first batch
    loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION


def checks_epoch_ends(callback: EarlyStopping) -> bool:
    """Whether an ``EarlyStopping`` looks at the ends of epochs, not at each validation; it may not have decided yet."""
    return bool(callback._check_on_train_epoch_end)
