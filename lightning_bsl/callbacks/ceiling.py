"""The largest micro-batch that fits in memory, found while training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_bsl.callbacks.loop import Train
from lightning_bsl.callbacks.state import StepState
from lightning_bsl.data.sampler import micro_batches, share_of


class MemoryCeiling:
    """Takes steps whole where memory allows, else in the largest micro-batches that fit.

    A step that runs out of memory is undone and repeated in micro-batches of half the size, which is then the bound for all
    later steps. Over several processes none can repeat a step alone, since the others wait for its gradients: there each new
    size is tried first, its gradients thrown away, and all processes go by the one that has the least memory.

    Attributes:
        size: The bound on a micro-batch's examples, ``None`` as long as every step fitted whole.
        weight: How much the gradient of the current micro-batch counts in the step's.
    """

    def __init__(self) -> None:
        self.size: int | None = None
        self.weight = 1.0
        self._tried = 0  # the largest size that fitted on every process
        self._stepped = False

    def step(self, trainer: Trainer, batch: Any, examples: int, train: Train) -> Tensor | None:
        """Train a step.

        Args:
            trainer: The Trainer.
            batch: This process's share of the step: tensors whose first dimension is the share, in lists, tuples and dicts.
            examples: Examples of the step, over all processes.
            train: Trains a part of the batch: ``train(part, first, last)``.

        Returns:
            The mean loss over the share.

        Raises:
            RuntimeError: Out of memory with one example; or with several processes, in a step of a size that had fitted.
            MisconfigurationException: A batch that has to be split and cannot be.
        """
        largest = -(-examples // trainer.world_size)
        size = min(largest, self.size or largest)
        if trainer.world_size > 1 and size > self._tried:
            while not trainer.strategy.reduce_boolean_decision(self._fits(trainer, batch, examples, size, train)):
                size = self.size = _halved(size)
            self._tried = size
        while True:
            done, loss = self._attempt(trainer, batch, examples, size, train)
            if done:
                break
            size = self.size = _halved(size)
        if not self._stepped:  # the optimizer has its buffers only now, so what was tried has to prove itself beside them
            self._stepped, self._tried = True, 0
        return loss

    def _fits(self, trainer: Trainer, batch: Any, examples: int, size: int, train: Train) -> bool:
        model = trainer.strategy.model
        before, syncs = StepState(trainer), getattr(model, "require_forward_param_sync", False)
        if isinstance(model, DistributedDataParallel):
            model.require_forward_param_sync = False  # a process without memory would not get to where the next is turned off
        done, _ = self._attempt(trainer, batch, examples, size, train, trial=True)
        before.restore()
        if isinstance(model, DistributedDataParallel):
            model.require_forward_param_sync = syncs
        return done

    def _attempt(
        self, trainer: Trainer, batch: Any, examples: int, size: int, train: Train, trial: bool = False
    ) -> tuple[bool, Tensor | None]:
        """Train the step, or the first micro-batch of it; return whether it fitted, and the loss."""
        before = StepState(trainer) if trainer.world_size == 1 else None
        share = share_of(examples, trainer.global_rank, trainer.world_size)
        parts = micro_batches(examples, trainer.global_rank, trainer.world_size, size)
        loss: Tensor | None = None
        try:
            for i, part in enumerate(parts[:1] if trial else parts):
                count = part.stop - part.start
                self.weight = count * trainer.world_size / examples
                piece = batch if len(parts) == 1 else cut(batch, part.start - share.start, count, share.stop - share.start)
                last = not trial and i == len(parts) - 1
                part_loss = train(piece, i == 0 and not trial, last)
                if part_loss is not None:
                    part_loss = part_loss * (count / max(1, share.stop - share.start))
                    loss = part_loss if loss is None else loss + part_loss
            return True, loss
        except RuntimeError as error:
            if not is_out_of_memory(error) or (size == 1 and not trial):
                raise
            if before is None and not trial:
                raise torch.OutOfMemoryError(
                    f"out of memory with micro-batches of {size} examples, which had fitted before; with several processes "
                    "none can repeat the step alone. Resume from the last checkpoint with "
                    f"`max_device_batch_size={size // 2}`"
                ) from error
        garbage_collection_cuda()  # only now is the error gone, which held the frames and thereby their tensors
        if before is not None:
            before.restore()
        return False, None


def _halved(size: int) -> int:
    if size == 1:
        raise torch.OutOfMemoryError("out of memory with micro-batches of one example, on one of the processes at least")
    half = -(-size // 2)
    rank_zero_warn(
        f"out of memory with micro-batches of {size} examples; going on with {half}. (BatchNorm, if there is any, takes its "
        "statistics from micro-batches.)"
    )
    return half


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error)


def cut(value: Any, start: int, count: int, share: int) -> Any:
    """``count`` of a batch's examples; one where there are none, since even a process without a share takes part."""
    if isinstance(value, Tensor) or _is_leaf(value):
        if isinstance(value, Tensor) and not value.dim():
            return value
        if len(value) != share:
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a list of {len(value)}"
            raise MisconfigurationException(
                f"the step does not fit in memory, and `max_device_batch_size='auto'` cannot split its batch: it holds {kind} "
                f"where {share} examples were expected in the first dimension. Write a number for `max_device_batch_size`"
            )
        return value[start : start + count] if count else value[:1]
    if isinstance(value, Mapping):
        return cast(Any, type(value))({name: cut(each, start, count, share) for name, each in value.items()})
    if isinstance(value, (list, tuple)):
        parts = [cut(each, start, count, share) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _is_leaf(value: Any) -> bool:
    """Whether ``value`` is a list of what is one example's each, such as strings."""
    nodes = (Tensor, Mapping, list, tuple)
    return isinstance(value, (list, tuple)) and not any(isinstance(each, nodes) for each in value)
