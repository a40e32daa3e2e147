"""The only file that reads what Lightning keeps to itself: attributes of its loops, and the loops' part of a checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric


def loads_own_data(trainer: Trainer) -> bool:
    """Whether the training loader comes from a LightningModule or DataModule, not from an argument of ``fit``."""
    return bool(trainer.fit_loop._data_source.is_module())


def load_training_data(trainer: Trainer) -> None:
    """Have Lightning make the training loader now, if there is none yet."""
    trainer.fit_loop.setup_data()


def set_epoch_length(trainer: Trainer, batches: int) -> None:
    """Tell Lightning that the epoch under way has another number of batches than it began with."""
    loop = trainer.fit_loop
    cast(Any, loop._combined_loader).limits[:] = [batches]  # in place: the live iterator shares the list
    cast(Any, loop._data_fetcher).length = loop.max_batches = batches
    if isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = max(1, int(batches * trainer.val_check_interval))
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar):
        bar.train_progress_bar.total = batches
    elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, total=batches)


def injects_sampler(trainer: Trainer) -> bool:
    """Whether Lightning puts a sampler of its own into the loaders of a run of several processes."""
    return trainer.world_size > 1 and bool(trainer._accelerator_connector.use_distributed_sampler)


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


def set_batches_done(checkpoint: dict[str, Any], batches: int) -> None:
    """Have Lightning resume an epoch after ``batches`` of its batches.

    The checkpoint counts the micro-batches of the run that saved it, and those of a step that was not finished.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    # in `on_train_batch_end` the batch just done is not counted as completed yet; Lightning makes up for it on resume
    in_batch_end = total["ready"] == total["processed"] == total["completed"] + 1
    shift = batches - in_batch_end - current["completed"]
    for name in current:
        current[name] += shift


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


def walk_steps(trainer: Trainer, walk: Callable[[Any, Train], Tensor | None]) -> None:
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

    vars(loop)["run"] = run


def walk_steps_no_more(trainer: Trainer) -> None:
    """Undo ``walk_steps``."""
    vars(trainer.fit_loop.epoch_loop.automatic_optimization).pop("run", None)


def _set_batch(trainer: Trainer, batch: Any) -> None:
    """Tell Lightning's log what is being trained: the batch's size is the weight of a value."""
    results = cast(Any, trainer._results)
    results.batch, results.batch_size = batch, None
