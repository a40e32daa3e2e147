"""The micro-batches of a step, and the search for the largest micro-batch that fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_bsl.callbacks.loop import Train, take_step
from lightning_bsl.callbacks.loss_terms import LossTerms, MaskWarning, skip_step
from lightning_bsl.callbacks.snapshot import Snapshot
from lightning_bsl.data.batches import mapped
from lightning_bsl.data.sampler import Cut, even_parts, micro_batches

T = TypeVar("T")


class MicroBatch(NamedTuple):
    """The examples that one process puts through the model at once.

    Args:
        examples: Number of examples.
        weight: Weight of its mean loss in the step's loss (the gradients of the processes are then averaged).
        terms: Number of terms that its loss is a mean over, if the module counts them; else the number of examples.
    """

    examples: int
    weight: float
    terms: float


class Parts(NamedTuple):
    """The division of a step that does not follow from the number of its examples.

    Args:
        slices: This process's micro-batches as slices of its share; ``None`` if they follow from the number of examples.
        longest: Length of the longest example in the share of each process; empty if the lengths are not known.
        counts: Number of examples in the share of each process; empty if they differ by at most one.
    """

    slices: tuple[slice, ...] | None = None
    longest: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


_BY_NUMBER = Parts()


class StepSplitter:
    """The micro-batches of the current step: the current one, its weight, and whether the step is complete.

    The weights are numbers of examples, or of terms if the module counts them. The step's gradient is the mean over all
    examples or terms that were trained, even if a micro-batch had nothing to train.

    Args:
        limit: Largest number of examples of a micro-batch; ``None`` for no limit.

    Attributes:
        cut: How a step is divided; set when a fit begins.
        examples: Examples of the step, over all processes.
        pieces: This process's micro-batches.
        part: Index of the current micro-batch.
        split: Whether the step has several micro-batches.
        terms: Counts the terms of the loss, if the module does; set at the start of a fit.
        watch: Warns of masked batches in divided steps; set at the start of a fit.
        corrected: The factor by which the gradients of the step were multiplied to be a mean.

    Example:
        >>> splitter = StepSplitter(limit=2)
        >>> splitter.begin_fit(Cut(max_device_batch_size=2))
        >>> splitter.begin(examples=4, batch_size=4)
        >>> splitter.begin_piece()
        >>> splitter.weight, splitter.end_piece()
        (0.5, False)
        >>> splitter.begin_piece()
        >>> splitter.note_backward()
        >>> splitter.correction, splitter.end_piece()  # the first micro-batch had nothing to train
        (2.0, True)
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.cut = Cut()
        self.examples = 0
        self.pieces: tuple[slice, ...] = ()
        self.part = 0
        self.split = False
        self.terms: LossTerms | None = None
        self.watch: MaskWarning | None = None
        self.corrected = 1.0
        self._divided: set[int] = set()  # ids of the optimizers whose gradients are a mean already
        self._counts: list[int] = []  # examples of the micro-batches so far
        self._with_loss: set[int] = set()  # indices of the micro-batches that had a loss

    def begin_fit(self, cut: Cut) -> None:
        """Begin a fit, in which ``cut`` divides every step."""
        self.cut = cut
        self.drop()

    @property
    def under_way(self) -> bool:
        """Whether a step has begun and not ended."""
        return bool(self.pieces)

    @property
    def last(self) -> bool:
        """Whether the current micro-batch is the step's last."""
        return self.part == len(self.pieces) - 1

    def ends(self, ended: bool) -> bool:
        """Whether the step is complete with the current micro-batch, or with the epoch that ends after it."""
        return self.last or ended

    @property
    def micro_batch(self) -> int:
        """Examples of the current micro-batch."""
        return self._counts[-1]

    @property
    def weight(self) -> float:
        """The weight of the current micro-batch's mean loss in the step's loss (the processes are then averaged)."""
        if self.terms is not None:
            return self.terms.weight
        if not self.examples or not (self.split or self.cut.world_size > 1):
            return 1.0
        return self.micro_batch * self.cut.world_size / self.examples

    @property
    def has_gradient(self) -> bool:
        """Whether any micro-batch of the step had a loss so far."""
        return bool(self._with_loss)

    @property
    def has_loss(self) -> bool:
        """Whether the current micro-batch had a loss."""
        return self.part in self._with_loss

    @property
    def correction(self) -> float:
        """The factor that makes the sum of the gradients the mean over the examples that were trained."""
        if not self.split:
            return 1.0
        share, trained = self.pieces[-1].stop - self.pieces[0].start, sum(self._counts[i] for i in self._with_loss)
        return share / trained if 0 < trained != share else 1.0

    @property
    def piece_begun(self) -> bool:
        """Whether the current micro-batch has begun."""
        return self.under_way and len(self._counts) > self.part

    def begin(self, examples: int, batch_size: int, parts: Parts = _BY_NUMBER) -> None:
        """Begin a step.

        Args:
            examples: Examples of the step, over all processes; 0 if it trains only on other loaders.
            batch_size: The scheduled batch size.
            parts: How the step is divided.
        """
        self.pieces = parts.slices or (self.cut(examples, batch_size) if examples else (slice(0, 0),))
        self.split = len(self.pieces) > 1
        self.examples, self.part, self.corrected, self._with_loss, self._counts = examples, 0, 1.0, set(), []
        self._divided.clear()
        if self.terms is not None:
            self.terms.begin(examples, self.split)

    def begin_piece(self, examples: int | None = None, batch: Any = None) -> None:
        """Begin the current micro-batch.

        Args:
            examples: Number of its examples, if it may differ from the planned one.
            batch: The batch; ``None`` if there is nothing to train.
        """
        self._count_examples(examples)
        if self.watch is not None:
            self.watch(batch, self.split)
        if self.terms is not None:
            # a process with an empty share trains an example with weight 0, so it has no terms
            self.terms.begin_piece(batch if self.micro_batch or not self.examples else None, self.micro_batch)

    def _count_examples(self, examples: int | None) -> None:
        del self._counts[self.part :]
        piece = self.pieces[self.part]
        self._counts.append(piece.stop - piece.start if examples is None else examples)

    def note_backward(self) -> None:
        """Record that the current micro-batch has a loss."""
        self._with_loss.add(self.part)
        self._divided.clear()
        if self.terms is not None:
            self.terms.note_backward(self.part)

    def correct(self, optimizer: Optimizer, scaler: Any = None) -> None:
        """Make the gradient the mean over all that was trained, before it is clipped.

        Args:
            optimizer: The optimizer that is about to step.
            scaler: The loss scaler of mixed precision, if there is one.
        """
        if id(optimizer) in self._divided:
            return
        self._divided.add(id(optimizer))
        factor = self.correction if self.terms is None else self.terms.factor()
        if factor == 1:
            return
        self.corrected = factor
        if factor == 0:
            skip_step(optimizer, scaler if self.has_loss else None)
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def step_where_lightning_does_not(self, trainer: Trainer, batch_idx: int, trained: bool) -> None:
        """Take the optimizer step if the last micro-batch had nothing to train and Lightning skips the step.

        Args:
            trainer: The Trainer.
            batch_idx: Index of the batch.
            trained: Whether Lightning called ``training_step``: it does not for a batch that is ``None``.

        Raises:
            RuntimeError: A batch that is ``None``, in a run of several processes.
        """
        if trained and not self.split:
            return
        if not trained and trainer.world_size > 1:
            raise RuntimeError(
                "the training loader gave a batch that is None, but with several processes none of them can skip a batch. Let "
                "`collate_fn` leave out only examples that it cannot read, or put other examples in their place"
            )
        complete = self.last or trainer.is_last_batch
        if not (self.split and complete and self.has_gradient) or self.has_loss or self.corrected == 0:
            return
        if self.terms is not None and self.terms.processes == 1 and not self.terms.trained:
            return  # no micro-batch had any terms
        # Lightning steps at a batch whose loss is None, but a loss scaler then skips the step
        if not trained or getattr(trainer.precision_plugin, "scaler", None) is not None:
            take_step(trainer, batch_idx, counted=trained)

    def end_piece(self, ended: bool = False) -> bool:
        """End the current micro-batch; return whether the step is complete.

        Args:
            ended: Whether the epoch ends with this micro-batch: Lightning then takes the step.
        """
        if self.ends(ended):
            self.drop()
            return True
        self.part += 1
        return False

    def drop(self) -> None:
        """End the step: it is complete, or the epoch ended inside it."""
        self.pieces, self.split = (), False

    def state_dict(self) -> dict[str, Any]:
        """The largest micro-batch that fitted, in examples or tokens, and the terms per example."""
        terms = self.terms.per_example if self.terms is not None else 0.0
        return {"micro_batch_size": None, "micro_batch_tokens": None, "terms_per_example": terms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        if self.terms is not None:
            self.terms.per_example = state["terms_per_example"]

    def windows(self, batch_idx: int) -> int:
        """The ``accumulate_grad_batches`` with which Lightning steps only at the last micro-batch, and never clears gradients.

        Lightning steps when ``(i + 1) % accumulate == 0`` and clears the gradients when ``i % accumulate == 0``.

        Args:
            batch_idx: Index of the current micro-batch in the epoch, i.
        """
        if not self.split:
            return 1
        return batch_idx + 1 if self.last else batch_idx + 2


class MemoryCeiling(StepSplitter):
    """Trains whole steps while they fit in memory, and else the largest micro-batches that fit.

    A step that runs out of memory is undone and repeated in micro-batches of half the size. This size is then the limit for
    all later steps. With several processes none can repeat a step alone, since the others wait for its gradients. There each
    new size is tried before the step, without keeping its gradients, and the process with the least memory decides.

    If the lengths of the examples are known, the limit is a number of padded tokens: the examples that fitted x the longest
    example of their step. So one step of long examples does not halve the micro-batches of later, shorter ones.

    The loader gives whole steps; this class splits them.

    Attributes:
        size: Largest number of examples of a micro-batch; ``None`` while every step fitted whole.
        tokens: Largest number of padded tokens of a micro-batch; it replaces ``size`` if the lengths are known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size: int | None = None
        self.tokens: float | None = None
        self._lengths: tuple[float, ...] = ()  # length of the longest example of each process in this step
        self._shares: tuple[int, ...] = ()  # examples of each process in this step, if they are not equal shares
        self._tried: dict[int, tuple[float, float]] = {}  # process -> most padded tokens that fitted, and the longest example
        self._stepped = False

    def begin(self, examples: int, batch_size: int, parts: Parts = _BY_NUMBER) -> None:
        """Begin a step, as one micro-batch."""
        self.cut, self._lengths = replace(self.cut, max_device_batch_size=None), parts.longest
        self._shares = parts.counts if self.cut.world_size > 1 else ()
        super().begin(examples, batch_size, self._parts())

    def _parts(self, size: int | None = None) -> Parts:
        """This process's micro-batches of at most ``size`` examples."""
        return Parts(self._pieces(self.cut.rank, size)) if self._shares else _BY_NUMBER

    def _pieces(self, rank: int, size: int | None = None) -> tuple[slice, ...]:
        """The micro-batches of at most ``size`` examples of process ``rank``."""
        if not self._shares:
            return micro_batches(self.examples, rank, self.cut.world_size, size)
        most = max(self._shares)
        return even_parts(0, self._shares[rank], -(-most // (size or most)))

    def begin_piece(self, examples: int | None = None, batch: Any = None) -> None:
        """Begin the step's batch; its terms are counted later, for each micro-batch."""
        self._count_examples(examples)

    def state_dict(self) -> dict[str, Any]:
        """The largest micro-batch that fitted, and the terms per example."""
        return super().state_dict() | {"micro_batch_size": self.size, "micro_batch_tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        super().load_state_dict(state)
        self.size, self.tokens = state["micro_batch_size"], state["micro_batch_tokens"]

    @property
    def _longest(self) -> float | None:
        """Length of the longest example of the step."""
        return max(self._lengths, default=None)

    def _most(self, largest: int) -> int:
        """The largest number of examples of this step at once, at most ``largest``."""
        if self._longest is not None and self.tokens is not None:
            return max(1, min(largest, int(self.tokens // self._longest)))
        return min(largest, self.size or largest)

    def _bound(self, size: int) -> None:
        """Set the limit to ``size`` examples of the length of this step's longest one."""
        if self._longest is None:
            self.size = size
        else:
            self.tokens = size * self._longest

    def _needs(self, size: int) -> dict[int, tuple[float, float]]:
        """For each process: most padded tokens of its micro-batches of at most ``size`` examples, and its longest example.

        A model may need more memory for the same number of tokens in longer examples. Without lengths an example counts as one
        token.
        """
        needs = {}
        for rank in range(self.cut.world_size):
            parts = self._pieces(rank, size)
            length = self._lengths[rank] if self._lengths else 1.0
            needs[rank] = max(1, *(part.stop - part.start for part in parts)) * length, length
        return needs

    def _was_tried(self, size: int) -> bool:
        """Whether micro-batches of this size, or larger ones, fitted on every process before."""
        for rank, (tokens, length) in self._needs(size).items():
            most_tokens, longest = self._tried.get(rank, (0.0, 0.0))
            if tokens > most_tokens or length > longest:
                return False
        return True

    def _note_tried(self, size: int) -> None:
        """Record that micro-batches of this size fitted on every process."""
        for rank, (tokens, length) in self._needs(size).items():
            most_tokens, longest = self._tried.get(rank, (0.0, 0.0))
            self._tried[rank] = max(tokens, most_tokens), max(length, longest)

    def step(self, trainer: Trainer, batch: Any, train: Train) -> Tensor | None:
        """Train a step.

        Args:
            trainer: The Trainer.
            batch: This process's share of the step: tensors whose first dimension are the examples, in lists, tuples and dicts.
            train: Trains a part of the batch: ``train(part, first, last)``.

        Returns:
            The mean loss over the share.

        Raises:
            RuntimeError: Out of memory with one example; or, with several processes, with a size that had fitted before.
            MisconfigurationException: A batch that must be split and cannot be.
        """
        size = self._most(max(self._shares, default=-(-self.examples // self.cut.world_size)))
        if self.cut.world_size == 1:
            return self._alone(trainer, batch, size, train)
        if not self._was_tried(size):
            while not trainer.strategy.reduce_boolean_decision(self._fits(trainer, batch, size, train)):
                if size == 1:
                    raise torch.OutOfMemoryError(
                        "out of memory with micro-batches of one example, on at least one process: write a smaller model or "
                        "shorter examples"
                    )
                _warn_of(size, self._longest)
                size = -(-size // 2)
                self._bound(size)
            self._note_tried(size)
        try:
            loss = self._train(batch, size, train)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise torch.OutOfMemoryError(
                f"out of memory with micro-batches of {size} examples, which had fitted before; with several processes none "
                f"can repeat the step alone. Resume from the last checkpoint with `max_device_batch_size={max(1, size // 2)}`"
            ) from error
        if not self._stepped:  # the optimizer has allocated its buffers only now, so every size must be tried again
            self._stepped = True
            self._tried.clear()
        return loss

    def _alone(self, trainer: Trainer, batch: Any, size: int, train: Train) -> Tensor | None:
        """Train a step, and train it again in smaller micro-batches if it does not fit."""
        before = Snapshot(trainer)

        def undo() -> None:
            before.restore()
            _warn_of(cast(int, self.cut.max_device_batch_size), self._longest)

        fitted, loss = halved_to_fit(size, lambda part: self._train(batch, part, train), undo)
        if fitted < size:
            self._bound(fitted)
        return loss

    def _fits(self, trainer: Trainer, batch: Any, size: int, train: Train) -> bool:
        """Try the largest micro-batch, as all processes do at the same time."""
        model = trainer.strategy.model
        before, syncs = Snapshot(trainer), getattr(model, "require_forward_param_sync", False)
        if isinstance(model, DistributedDataParallel):
            model.require_forward_param_sync = False  # DDP must not communicate here: a process may run out of memory before
        try:
            self._train(batch, size, train, trial=True)
            fits = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if not fits:
            garbage_collection_cuda()  # after the `except` block: the error kept the frames, and so their tensors, alive
        before.restore()
        if isinstance(model, DistributedDataParallel):
            model.require_forward_param_sync = syncs
        return fits

    def _train(self, batch: Any, size: int, train: Train, trial: bool = False) -> Tensor | None:
        """Train the step in micro-batches of ``size``, or try the largest one; return the mean loss of what was trained."""
        self.cut = replace(self.cut, max_device_batch_size=size or None)
        super().begin(self.examples, self.examples, self._parts(size))
        first = self.pieces[0].start
        share = self.pieces[-1].stop - first
        loss: Tensor | None = None
        if trial:
            self.part = max(range(len(self.pieces)), key=lambda i: self.pieces[i].stop - self.pieces[i].start)
        for i, part in enumerate(self.pieces[self.part : self.part + 1] if trial else self.pieces):
            if i:
                self.end_piece()
            # a process without a share repeats an example, which cannot be divided
            piece = cut(batch, part.start - first, part.stop - part.start, share) if self.split and share else batch
            super().begin_piece(batch=piece)
            part_loss = train(piece, i == 0 and not trial, not trial and self.last)
            if part_loss is not None:
                if self.terms is not None:
                    loss = self.terms.mean_with(loss, part_loss)
                    continue
                part_loss = part_loss * (self.micro_batch / max(1, share)) if self.split else part_loss
                loss = part_loss if loss is None else loss + part_loss
        return loss if loss is None or trial or self.terms is not None else loss * self.correction


def _warn_of(size: int, longest: float | None) -> None:
    half = -(-size // 2)
    tokens = (
        "" if longest is None else f" of {longest:.10g} tokens, or more shorter ones of {half * longest:.10g} tokens together"
    )
    rank_zero_warn(
        f"out of memory with micro-batches of {size} examples; going on with {half}{tokens}. If the model has BatchNorm, its "
        "statistics are now those of micro-batches"
    )


def halved_to_fit(size: int, attempt: Callable[[int], T], undo: Callable[[], None] | None = None) -> tuple[int, T]:
    """Attempt something with ``size`` examples at once, and with half of them each time that memory runs out.

    Args:
        size: The first number of examples.
        attempt: Called with the number of examples.
        undo: Called after a failed attempt.

    Returns:
        The number that fitted, and the return value of the attempt.

    Raises:
        RuntimeError: Out of memory with one example.
    """
    while True:
        try:
            return size, attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size <= 1:
                raise
        garbage_collection_cuda()  # after the `except` block: the error kept the frames, and so their tensors, alive
        if undo is not None:
            undo()
        size = -(-size // 2)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device or the host is out of memory."""
    # libraries have messages of their own, where they find no memory for a handle
    no_handle = any(f"{library}_STATUS_ALLOC_FAILED" in str(error) for library in ("CUBLAS", "CUDNN"))
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error) or no_handle


def cut(batch: Any, start: int, count: int, share: int) -> Any:
    """Take ``count`` examples of a batch; or one if ``count`` is 0, since a process with an empty share takes part too.

    Args:
        batch: The batch.
        start: Index of the first example.
        count: Number of examples to take.
        share: Number of examples of the batch.

    Raises:
        MisconfigurationException: A tensor, array or list that does not have ``share`` entries.
    """

    def part(leaf: Any) -> Any:
        array = isinstance(leaf, (Tensor, np.ndarray))
        if not leaf.ndim if array else not isinstance(leaf, (list, tuple)):
            return leaf
        if len(leaf) != share:
            kind = f"a tensor of shape {tuple(leaf.shape)}" if array else f"a list of {len(leaf)}"
            raise MisconfigurationException(
                f"the step does not fit in memory, and `max_device_batch_size='auto'` cannot split its batch: it holds {kind} "
                f"where {share} examples were expected in the first dimension. Write a number for `max_device_batch_size`"
            )
        return leaf[start : start + count] if count else leaf[:1]

    # a list of arrays has one for each example
    return mapped(part, batch, nested=(Tensor, Mapping, list, tuple))
