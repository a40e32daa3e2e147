"""The pieces that a step is made of, and the largest that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

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
from lightning_bsl.data.sampler import Cut, micro_batches

T = TypeVar("T")


class MicroBatch(NamedTuple):
    """What one process puts through the model at once.

    Args:
        examples: Examples of it.
        weight: What its mean loss is multiplied by, where the gradients of processes are averaged.
        terms: Terms that its loss is a mean over, where the module says so; else its examples.
    """

    examples: int
    weight: float
    terms: float


class Parts(NamedTuple):
    """How a step is cut, where that does not follow from the number of its examples.

    Args:
        slices: This process's micro-batches, one after another in its share; ``None`` where their number says it all.
        longest: The length of the longest example in the share of each process; nothing where it is not known.
    """

    slices: tuple[slice, ...] | None = None
    longest: tuple[float, ...] = ()


_BY_NUMBER = Parts()


class StepSplitter:
    """The micro-batches of the step under way: which one is next, what each counts for, and when the step is complete.

    Its place follows from the batches that came, trained or not. What each counts for follows from the examples, or from the
    terms that the module says its loss is a mean over: a step's gradient is the mean over those that were trained, also where
    a micro-batch had nothing to train.

    Args:
        limit: Most examples of a micro-batch; ``None`` for no bound.

    Attributes:
        cut: How a step is cut; set when a fit begins.
        examples: Examples of the step, over all processes.
        pieces: This process's micro-batches.
        part: Index of the current one.
        split: Whether the step has several micro-batches.
        terms: What the loss is a mean over, where these are not the examples; set when a fit is set up.
        watch: Looks at the batches of steps that are cut; set when a fit is set up.
        corrected: What the gradients were multiplied by already to be a mean.

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
        self._divided: set[int] = set()  # optimizers whose gradients are a mean already
        self._counts: list[int] = []  # examples of the micro-batches so far
        self._with_loss: set[int] = set()  # the indices of those that had one

    def begin_fit(self, cut: Cut) -> None:
        """Begin a fit, in which every step is cut by ``cut``."""
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
        """What the mean loss of the current micro-batch counts for in the step's, where processes are averaged."""
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
        """What the sum of the gradients is to be multiplied by to be the mean over what was trained."""
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
            examples: Of the step, over all processes; 0 where it trains on other loaders alone.
            batch_size: What the schedule says.
            parts: How it is cut.
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
            examples: What was counted in it, where that is not as cut.
            batch: The batch; ``None`` where there is nothing to train.
        """
        self._count_examples(examples)
        if self.watch is not None:
            self.watch(batch, self.split)
        if self.terms is not None:
            # a process without a share only keeps the others company
            self.terms.begin_piece(batch if self.micro_batch or not self.examples else None, self.micro_batch)

    def _count_examples(self, examples: int | None) -> None:
        del self._counts[self.part :]
        piece = self.pieces[self.part]
        self._counts.append(piece.stop - piece.start if examples is None else examples)

    def note_backward(self) -> None:
        """The current micro-batch has a loss."""
        self._with_loss.add(self.part)
        self._divided.clear()
        if self.terms is not None:
            self.terms.note_backward(self.part)

    def correct(self, optimizer: Optimizer, scaler: Any = None) -> None:
        """Make the gradient the mean over what was trained; before clipping.

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

    def step_where_lightning_does_not(self, trainer: Trainer, batch_idx: int, given: bool) -> None:
        """Take the step that is complete with a micro-batch that had nothing to train.

        Args:
            trainer: The Trainer.
            batch_idx: Index of the batch.
            given: Whether Lightning gave the batch to be trained: it is not ``None``.

        Raises:
            RuntimeError: A batch that is ``None`` on one of several processes.
        """
        if given and not self.split:
            return
        if not given and trainer.world_size > 1:
            raise RuntimeError(
                "the training loader gave a batch that is None, while other processes train on theirs: none can skip a batch "
                "alone. Have `collate_fn` leave out only what it cannot read, or put something in its place"
            )
        complete = self.last or trainer.is_last_batch
        if not (self.split and complete and self.has_gradient) or self.has_loss or self.corrected == 0:
            return
        if self.terms is not None and self.terms.processes == 1 and not self.terms.trained:
            return  # there was nothing to train in any
        # Lightning steps at a batch whose loss is None, but a loss scaler then leaves out the step
        if not given or getattr(trainer.precision_plugin, "scaler", None) is not None:
            take_step(trainer, batch_idx, counted=given)

    def end_piece(self, ended: bool = False) -> bool:
        """The current micro-batch is over; return whether the step is complete.

        Args:
            ended: Whether the epoch ends with it: Lightning then steps.
        """
        if self.ends(ended):
            self.drop()
            return True
        self.part += 1
        return False

    def drop(self) -> None:
        """There is no step under way: the last one is complete, or the epoch ended inside it."""
        self.pieces, self.split = (), False

    def state_dict(self) -> dict[str, Any]:
        """The largest micro-batch, in examples or tokens, where one was found, and the terms of an example."""
        terms = self.terms.per_example if self.terms is not None else 0.0
        return {"micro_batch_size": None, "micro_batch_tokens": None, "terms_per_example": terms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        if self.terms is not None:
            self.terms.per_example = state["terms_per_example"]

    def windows(self, batch_idx: int) -> int:
        """The ``accumulate_grad_batches`` that has Lightning step at the last micro-batch alone, and never clear gradients.

        Lightning steps when ``(i + 1) % accumulate == 0`` and clears the gradients when ``i % accumulate == 0``.

        Args:
            batch_idx: Index of the current micro-batch in the epoch, i.
        """
        if not self.split:
            return 1
        return batch_idx + 1 if self.last else batch_idx + 2


class MemoryCeiling(StepSplitter):
    """Takes steps whole where memory allows, else in the largest micro-batches that fit.

    A step that runs out of memory is undone and repeated in micro-batches of half the size, which is then the bound for all
    later steps. Over several processes none can repeat a step alone, since the others wait for its gradients: there each new
    size is tried first, its gradients thrown away, and all processes go by the one that has the least memory.

    Where the lengths of the examples are known, the bound is one on padded tokens: the examples that fitted x the longest of
    their step. So a step of long examples does not halve the micro-batches of those after it.

    The loader gives whole steps; they are cut here.

    Attributes:
        size: The bound on a micro-batch's examples, ``None`` as long as every step fitted whole.
        tokens: The bound on its padded tokens, in the place of ``size`` where lengths are known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size: int | None = None
        self.tokens: float | None = None
        self._lengths: tuple[float, ...] = ()  # of the longest example of each process in this step
        self._tried: dict[int, tuple[float, float]] = {}  # by process: most padded tokens that fitted, and the longest example
        self._stepped = False

    def begin(self, examples: int, batch_size: int, parts: Parts = _BY_NUMBER) -> None:
        """Begin a step, in one piece."""
        self.cut, self._lengths = replace(self.cut, max_device_batch_size=None), parts.longest
        super().begin(examples, batch_size)

    def begin_piece(self, examples: int | None = None, batch: Any = None) -> None:
        """Begin the step's batch; its terms are counted in the parts that are trained."""
        self._count_examples(examples)

    def state_dict(self) -> dict[str, Any]:
        """The largest micro-batch, where one was found, and the terms of an example."""
        return super().state_dict() | {"micro_batch_size": self.size, "micro_batch_tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self.size, self.tokens = state["micro_batch_size"], state["micro_batch_tokens"]

    @property
    def _longest(self) -> float | None:
        """The longest example of the step."""
        return max(self._lengths, default=None)

    def _most(self, largest: int) -> int:
        """Most examples of this step at once, out of ``largest``."""
        if self._longest is not None and self.tokens is not None:
            return max(1, min(largest, int(self.tokens // self._longest)))
        return min(largest, self.size or largest)

    def _bound(self, size: int) -> None:
        """From now on no more than ``size`` examples as long as this step's."""
        if self._longest is None:
            self.size = size
        else:
            self.tokens = size * self._longest

    def _needs(self, size: int) -> dict[int, tuple[float, float]]:
        """The most padded tokens of each process's micro-batches, and its longest example, where each has at most ``size``.

        A model may need more memory for the same tokens in longer examples. Where lengths are not known each counts for one.
        """
        needs = {}
        for rank in range(self.cut.world_size):
            parts = micro_batches(self.examples, rank, self.cut.world_size, size)
            length = self._lengths[rank] if self._lengths else 1.0
            needs[rank] = max(1, *(part.stop - part.start for part in parts)) * length, length
        return needs

    def _was_tried(self, size: int) -> bool:
        """Whether each process had room for as much before."""
        for rank, (tokens, length) in self._needs(size).items():
            most_tokens, longest = self._tried.get(rank, (0.0, 0.0))
            if tokens > most_tokens or length > longest:
                return False
        return True

    def _note_tried(self, size: int) -> None:
        """Each process had room for micro-batches of this size."""
        for rank, (tokens, length) in self._needs(size).items():
            most_tokens, longest = self._tried.get(rank, (0.0, 0.0))
            self._tried[rank] = max(tokens, most_tokens), max(length, longest)

    def step(self, trainer: Trainer, batch: Any, train: Train) -> Tensor | None:
        """Train a step.

        Args:
            trainer: The Trainer.
            batch: This process's share of the step: tensors whose first dimension is the share, in lists, tuples and dicts.
            train: Trains a part of the batch: ``train(part, first, last)``.

        Returns:
            The mean loss over the share.

        Raises:
            RuntimeError: Out of memory with one example; or with several processes, in a step of a size that had fitted.
            MisconfigurationException: A batch that has to be split and cannot be.
        """
        largest = -(-self.examples // self.cut.world_size)
        size = self._most(largest)
        if self.cut.world_size == 1:
            return self._alone(trainer, batch, size, train)
        if not self._was_tried(size):
            while not trainer.strategy.reduce_boolean_decision(self._fits(trainer, batch, size, train)):
                if size == 1:
                    raise torch.OutOfMemoryError(
                        "out of memory with micro-batches of one example, on one of the processes at least"
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
                f"out of memory with micro-batches of {size} examples, which had fitted before; with several processes "
                f"none can repeat the step alone. Resume from the last checkpoint with `max_device_batch_size={size // 2}`"
            ) from error
        if not self._stepped:  # the optimizer has its buffers only now, so what was tried has to prove itself beside them
            self._stepped = True
            self._tried.clear()
        return loss

    def _alone(self, trainer: Trainer, batch: Any, size: int, train: Train) -> Tensor | None:
        """Train a step, and train it again in smaller pieces where it did not fit."""
        before = Snapshot(trainer)

        def undo() -> None:
            before.restore()
            _warn_of(cast(int, self.cut.max_device_batch_size), self._longest)

        fitted, loss = halved_to_fit(size, lambda part: self._train(batch, part, train), undo)
        if fitted < size:
            self._bound(fitted)
        return loss

    def _fits(self, trainer: Trainer, batch: Any, size: int, train: Train) -> bool:
        """Try the largest micro-batch, with the other processes."""
        model = trainer.strategy.model
        before, syncs = Snapshot(trainer), getattr(model, "require_forward_param_sync", False)
        if isinstance(model, DistributedDataParallel):
            model.require_forward_param_sync = False  # a process without memory would not get to where the next is turned off
        try:
            self._train(batch, size, train, trial=True)
            fits = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if not fits:
            garbage_collection_cuda()  # only now is the error gone, which held the frames and thereby their tensors
        before.restore()
        if isinstance(model, DistributedDataParallel):
            model.require_forward_param_sync = syncs
        return fits

    def _train(self, batch: Any, size: int, train: Train, trial: bool = False) -> Tensor | None:
        """Train the step in micro-batches of ``size``, or try the largest; return the mean loss over what was trained."""
        self.cut = replace(self.cut, max_device_batch_size=size or None)
        super().begin(self.examples, self.examples)
        first = self.pieces[0].start
        share = self.pieces[-1].stop - first
        loss: Tensor | None = None
        if trial:
            self.part = max(range(len(self.pieces)), key=lambda i: self.pieces[i].stop - self.pieces[i].start)
        for i, part in enumerate(self.pieces[self.part : self.part + 1] if trial else self.pieces):
            if i:
                self.end_piece()
            piece = cut(batch, part.start - first, part.stop - part.start, share) if self.split else batch
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
    tokens = "" if longest is None else f" of {longest:.10g} tokens, or as many shorter ones as have {half * longest:.10g}"
    rank_zero_warn(
        f"out of memory with micro-batches of {size} examples; going on with {half}{tokens}. (BatchNorm, if there is any, "
        "takes its statistics from micro-batches.)"
    )


def halved_to_fit(size: int, attempt: Callable[[int], T], undo: Callable[[], None] | None = None) -> tuple[int, T]:
    """Attempt something with ``size`` examples at once, and with half of them wherever memory runs out.

    Args:
        size: Examples at once, to begin with.
        attempt: Called with the number of examples.
        undo: Called after an attempt that failed.

    Returns:
        The number that fitted, and what the attempt returned.

    Raises:
        RuntimeError: Out of memory with one example.
    """
    while True:
        try:
            return size, attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size <= 1:
                raise
        garbage_collection_cuda()  # only now is the error gone, which held the frames and thereby their tensors
        if undo is not None:
            undo()
        size = -(-size // 2)


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
