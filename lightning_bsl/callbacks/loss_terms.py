"""Losses that are means over terms other than examples: tokens, pixels, boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import is_dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bsl.data.datamodule import data_parallel


def has_loss_terms(module: LightningModule) -> bool:
    """Whether a module has a method ``loss_terms``, which counts the terms of its loss."""
    method = getattr(module, "loss_terms", None)
    return callable(method) and not isinstance(method, nn.Module)


def count_terms(module: LightningModule, batch: Any) -> float:
    """The number of terms that the mean loss of a batch is a mean over: the return value of ``module.loss_terms(batch)``.

    Args:
        module: The LightningModule.
        batch: A batch, as ``training_step`` gets it.

    Raises:
        MisconfigurationException: The method returned no number, or a number that is negative or not finite.
    """
    with torch.no_grad():
        value: Any = module.loss_terms(batch)  # type: ignore[operator]
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number and not (
        isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
    ):
        kind = f"a tensor of {value.dtype}, shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise MisconfigurationException(
            f"`{type(module).__name__}.loss_terms` returned {kind}; return an int, a float or a scalar tensor: the number of "
            "terms that the mean loss of the batch is a mean over"
        )
    number = float(value)
    if not 0 <= number < math.inf:
        raise MisconfigurationException(
            f"`{type(module).__name__}.loss_terms` returned {number}; return a number of terms, 0 or more"
        )
    return number


def terms_or_examples(module: LightningModule, batch: Any, examples: int) -> float:
    """The number of terms of a batch if the module counts them, else the number of its examples."""
    return count_terms(module, batch) if has_loss_terms(module) else examples


class LossTerms:
    """The terms of the current step: the weight of each micro-batch, and the correction of the gradient at the end.

    A step's gradient is ``sum n_i grad L_i / sum n_i`` over its micro-batches on all processes, where n_i is the number of
    terms of micro-batch i and L_i the mean loss over them. The sum of the n_i is known only at the end of the step. So each
    loss gets the weight ``n_i / unit``, and the gradient is multiplied once by ``unit / sum n_i``. The unit is an estimate of
    the sum: from the first micro-batch, or with several processes from the previous step. This keeps gradients in half
    precision at about their usual size. With one process the unit grows if there are many more terms than estimated.

    Args:
        count: Returns the number of terms of a batch.
        total: Sums a number over the processes that share a step.
        processes: Number of these processes.
        at_once: Whether the sum must be known before the backward pass (manual optimization, where the gradient cannot be
            corrected before the optimizer steps).
        multiply: Multiplies the existing gradients by a number; used with one process only.

    Attributes:
        per_example: Terms per example in the last step that had any; 0 before the first such step.

    Example:
        >>> terms = LossTerms(count=len)
        >>> terms.begin(examples=2, split=True)
        >>> weights = []
        >>> for part, batch in enumerate([[1.0], [2.0, 2.0, 2.0]]):
        ...     terms.begin_piece(batch, examples=1)
        ...     weights.append(terms.weight)
        ...     terms.note_backward(part)
        >>> [weight * terms.factor() for weight in weights]
        [0.25, 0.75]
    """

    def __init__(
        self,
        count: Callable[[Any], float],
        total: Callable[[float], float] = float,
        processes: int = 1,
        at_once: bool = False,
        multiply: Callable[[float], None] | None = None,
    ) -> None:
        self.per_example = 0.0
        self.piece = 0.0  # terms of the current micro-batch
        self.processes = processes
        self._count, self._total, self._at_once, self._multiply = count, total, at_once, multiply
        self._examples, self._whole = 0, True
        self._unit = 0.0
        self._trained: dict[int, float] = {}  # micro-batch -> terms; a dict, since a closure may be called several times

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> LossTerms | None:
        """The terms of a fit; ``None`` if the module does not count them."""
        if not has_loss_terms(module):
            return None
        processes = data_parallel(trainer)[1]

        def total(value: float) -> float:
            if trainer.world_size == 1:
                return value
            device = trainer.strategy.root_device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            summed: Any = trainer.strategy.reduce(torch.tensor(value, dtype=dtype, device=device), reduce_op="sum")
            # with tensor parallelism several processes train on the same examples
            return float(summed) * processes / trainer.world_size

        def multiply(factor: float) -> None:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

        at_once = not module.automatic_optimization
        return cls(lambda batch: count_terms(module, batch), total, processes, at_once, multiply)

    def begin(self, examples: int, split: bool) -> None:
        """Begin a step.

        Args:
            examples: Examples of the step, over all processes.
            split: Whether the step has several micro-batches.
        """
        self._examples, self._unit = max(1, examples), 0.0
        self._whole = not split and self.processes == 1  # then no weights are needed
        self._trained.clear()

    def begin_piece(self, batch: Any, examples: int) -> None:
        """Begin a micro-batch.

        Args:
            batch: The batch; ``None`` if there is nothing to train.
            examples: Number of its examples.
        """
        self.piece = 0.0 if batch is None else self._count(batch)
        if self._whole:
            self._unit = self.piece
        elif self._at_once:
            self._unit = self._total(self.piece)
        elif self.processes > 1:
            if not self._unit:
                per_example = self.per_example or self._total(self.piece / max(1, examples)) / self.processes
                self._unit = self._expected(per_example)
        elif not self._unit:
            self._unit = self._expected(self.piece / max(1, examples)) if self.piece else 0.0
        elif (terms := sum(self._trained.values()) + self.piece) > 2 * self._unit:
            shrink = 2.0 ** math.ceil(math.log2(terms / self._unit))
            self._unit *= shrink
            if self._multiply is not None:
                self._multiply(1 / shrink)

    def _expected(self, per_example: float) -> float:
        """The estimated number of terms of the step."""
        # a power of two per example, so that another estimate gives the same rounding
        return self._examples * 2.0 ** round(math.log2(per_example)) if per_example else float(self._examples)

    @property
    def weight(self) -> float:
        """The weight of the current micro-batch's mean loss (the processes are then averaged)."""
        return self.piece * self.processes / self._unit if self.piece else 0.0

    def mean_with(self, mean: Tensor | None, loss: Tensor) -> Tensor:
        """The mean loss over what this process has trained of the step, including the current micro-batch.

        Args:
            mean: The mean before the current micro-batch; ``None`` for the first.
            loss: The loss of the current micro-batch.
        """
        if not self.piece:  # the loss of a batch without terms may be NaN
            return torch.zeros_like(loss) if mean is None else mean
        return loss if mean is None else mean + (loss - mean) * (self.piece / sum(self._trained.values()))

    @property
    def trained(self) -> bool:
        """Whether this process has trained any term of the step."""
        return any(self._trained.values())

    def note_backward(self, part: int) -> None:
        """Record that the current micro-batch, of index ``part`` in the step, has a loss."""
        self._trained[part] = self.piece

    def factor(self) -> float:
        """The factor that makes the weighted gradients the mean over the trained terms; 0 if there are none.

        All processes must call it, since they sum their terms here.
        """
        if self._at_once:
            return 1.0
        trained = sum(self._trained.values())
        total = trained if self._whole else self._total(trained)
        if not total:
            return 0.0
        self.per_example = total / self._examples
        return 1.0 if self._whole else self._unit / total


class MaskWarning:
    """Warns once if a batch is masked and its step is divided, but the module does not count the terms of its loss.

    Args:
        module: The LightningModule.
        processes: Number of processes that share a step.
        looks: Number of batches to check: on a GPU each check of labels waits for the device.
    """

    def __init__(self, module: LightningModule, processes: int = 1, looks: int = 100) -> None:
        self._module, self.processes, self._looks = module, processes, looks

    def __call__(self, batch: Any, split: bool) -> None:
        """Check a batch.

        Args:
            batch: The batch.
            split: Whether its step has several micro-batches.
        """
        if self._looks > 0 and (split or self.processes > 1):
            self._looks -= 1
            if reason := _mask(batch):
                self._looks = 0
                rank_zero_warn(
                    f"the batch has {reason}, and steps are divided into pieces (micro-batches, or the shares of several "
                    "processes) whose weights are their numbers of examples. If the loss is a mean over what is not masked, "
                    f"the gradient of a step is then not that of its mean loss: give {type(self._module).__name__} a method "
                    "`loss_terms(batch)` that returns the number of terms that the mean loss of a batch is a mean over, such "
                    "as `(batch['labels'] != -100).sum()`. If the loss is a mean over examples, return their number"
                )


def _mask(batch: Any) -> str | None:
    """The masked part of a batch by the conventions of `transformers` and torch; ``None`` if there is none."""
    if isinstance(batch, Tensor):
        # cross-entropy takes only int64 labels
        labels = batch.dtype == torch.int64 and batch.layout == torch.strided and not batch.is_nested
        return "labels of -100" if labels and bool((batch == -100).any()) else None
    if is_dataclass(batch):
        batch = vars(batch)
    elif hasattr(batch, "_asdict"):
        batch = batch._asdict()
    if isinstance(batch, Mapping):
        if "attention_mask" in batch:
            return "an `attention_mask`"
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return None
    return next(filter(None, map(_mask, batch)), None)


def without_gradient(loss: Tensor, parameters: Iterable[Tensor], alone: bool) -> ExitStack:
    """Make the backward pass of a loss without terms add nothing. Otherwise it may add NaN, since a mean over nothing is 0/0.

    The backward pass still runs, because other processes wait for the gradients of every parameter. With several processes
    every node of the graph then gives zeros, except nodes with a backward pass of their own (reentrant checkpoints).

    Args:
        loss: The loss.
        parameters: The parameters of the module.
        alone: Whether there is only one process.

    Returns:
        A context to be closed after the backward pass.
    """
    undo = ExitStack()
    if alone:  # the old gradients are put back afterwards
        for parameter in parameters:
            undo.callback(_put_back, parameter, parameter.grad)
            parameter.grad = None
        return undo
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or node.name().endswith("AccumulateGrad"):  # an AccumulateGrad node is a parameter
            continue
        seen.add(node)
        handle = node.register_hook(
            lambda inputs, _: tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in inputs)
        )
        undo.callback(handle.remove)
        nodes += [following for following, _ in node.next_functions]
    return undo


def _zeros(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else torch.zeros_like(gradient)


def _put_back(parameter: Tensor, gradient: Tensor | None) -> None:
    # zeros where there was no gradient, since a loss scaler needs at least one
    parameter.grad = _zeros(parameter.grad) if gradient is None else gradient


def skip_step(optimizer: Optimizer, scaler: Any = None) -> None:
    """Make a step change nothing, like one whose loss is ``None``. It is called in ``on_before_optimizer_step``.

    Args:
        optimizer: The optimizer that is about to step.
        scaler: The loss scaler of mixed precision, if it will take the step.
    """
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)  # now, while there are gradients: later it would find none to check for infinities
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
