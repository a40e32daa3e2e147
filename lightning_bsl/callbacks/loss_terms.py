"""What the mean loss of a step is a mean over, where these are not its examples: tokens, pixels, boxes."""

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
    """Whether a module says what its loss is a mean over."""
    method = getattr(module, "loss_terms", None)
    return callable(method) and not isinstance(method, nn.Module)


def count_terms(module: LightningModule, batch: Any) -> float:
    """How many terms the mean loss of a batch is a mean over: what the module's ``loss_terms(batch)`` returns.

    Args:
        module: The LightningModule.
        batch: A batch, as ``training_step`` gets it.

    Raises:
        MisconfigurationException: No number, or one that is negative or not finite.
    """
    with torch.no_grad():
        value: Any = module.loss_terms(batch)  # type: ignore[operator]
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number and not (
        isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
    ):
        found = f"a tensor of {value.dtype}, shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise MisconfigurationException(
            f"`{type(module).__name__}.loss_terms` returned {found}; return an int, a float or a scalar tensor: how many terms "
            "the mean loss of the batch is a mean over"
        )
    number = float(value)
    if not 0 <= number < math.inf:
        raise MisconfigurationException(
            f"`{type(module).__name__}.loss_terms` returned {number}; return a number of terms, 0 or more"
        )
    return number


def terms_or_examples(module: LightningModule, batch: Any, examples: int) -> float:
    """The terms of a batch where the module counts them, else its examples."""
    return count_terms(module, batch) if has_loss_terms(module) else examples


class LossTerms:
    """The terms of the step under way: what each micro-batch's mean loss counts for, and what their sum is divided by.

    A step's gradient is ``sum n_i grad L_i / sum n_i`` over its micro-batches, and over those of all processes; n_i is the
    number of terms of micro-batch i, and L_i the mean loss over them. The sum of the n_i is known only at the step's end. So
    each loss is weighed by ``n_i / unit`` and the gradient is divided once. The unit is what the sum is expected to be: by the
    first micro-batch, or over several processes by the step before. So gradients in half precision are about as large as in
    one piece; on one process also where the terms turn out to be many more.

    Args:
        count: The terms of a batch.
        total: Sums a number over the processes that share a step.
        processes: Their number.
        multiply: Multiplies the gradients that are there by a number; of one process only.
        at_once: Whether the sum must be known before the backward pass, as nobody is asked before the optimizer steps.

    Attributes:
        per_example: Terms of an example, as of the last step that had any; 0 where there was none yet.

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
        self._trained: dict[int, float] = {}  # by micro-batch: a closure may be called several times

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> LossTerms | None:
        """Those of a fit; ``None`` where the module does not say what its loss is a mean over."""
        if not has_loss_terms(module):
            return None
        processes = data_parallel(trainer)[1]

        def total(value: float) -> float:
            if trainer.world_size == 1:
                return value
            device = trainer.strategy.root_device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            summed: Any = trainer.strategy.reduce(torch.tensor(value, dtype=dtype, device=device), reduce_op="sum")
            return float(summed) * processes / trainer.world_size  # with tensor parallelism several train on the same

        def multiply(factor: float) -> None:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

        at_once = not module.automatic_optimization
        return cls(lambda batch: count_terms(module, batch), total, processes, at_once, multiply)

    def begin(self, examples: int, split: bool) -> None:
        """Begin a step.

        Args:
            examples: Of the step, over all processes.
            split: Whether it has several micro-batches.
        """
        self._examples, self._unit = max(1, examples), 0.0
        self._whole = not split and self.processes == 1  # then nothing is weighed
        self._trained.clear()

    def begin_piece(self, batch: Any, examples: int) -> None:
        """Begin a micro-batch.

        Args:
            batch: The batch; ``None`` where there is nothing to train.
            examples: Examples of it.
        """
        self.piece = 0.0 if batch is None else self._count(batch)
        if self._whole:
            self._unit = self.piece
        elif self._at_once:
            self._unit = self._total(self.piece)
        elif self.processes > 1:
            if not self._unit:
                each = self.per_example or self._total(self.piece / max(1, examples)) / self.processes
                self._unit = self._expected(each)
        elif not self._unit:
            self._unit = self._expected(self.piece / max(1, examples)) if self.piece else 0.0
        elif (terms := sum(self._trained.values()) + self.piece) > 2 * self._unit:
            shrink = 2.0 ** math.ceil(math.log2(terms / self._unit))
            self._unit *= shrink
            if self._multiply is not None:
                self._multiply(1 / shrink)

    def _expected(self, each: float) -> float:
        """The terms of the step, by those of an example."""
        # a power of two for each example: then it does not matter for the rounding which one it is
        return self._examples * 2.0 ** round(math.log2(each)) if each else float(self._examples)

    @property
    def weight(self) -> float:
        """What the mean loss of the current micro-batch is multiplied by, where processes are averaged."""
        return self.piece * self.processes / self._unit if self.piece else 0.0

    def mean_with(self, mean: Tensor | None, loss: Tensor) -> Tensor:
        """The mean loss over what this process has trained of the step, the current micro-batch included.

        Args:
            mean: Without it; ``None`` before the first.
            loss: Of the current micro-batch.
        """
        if not self.piece:  # over nothing it may be NaN
            return torch.zeros_like(loss) if mean is None else mean
        return loss if mean is None else mean + (loss - mean) * (self.piece / sum(self._trained.values()))

    @property
    def trained(self) -> bool:
        """Whether this process has trained any term of the step."""
        return any(self._trained.values())

    def note_backward(self, part: int) -> None:
        """The current micro-batch, of index ``part`` in the step, has a loss."""
        self._trained[part] = self.piece

    def factor(self) -> float:
        """What the weighed gradients are multiplied by to be a mean over the terms that were trained; 0 where there are none.

        The processes meet here.
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
    """Says so, once, where a batch is masked, steps are cut, and nobody says what the loss is a mean over.

    Args:
        module: The LightningModule.
        processes: Processes that share a step.
        looks: How many batches to look at: on a GPU each look at labels waits for the device.
    """

    def __init__(self, module: LightningModule, processes: int = 1, looks: int = 100) -> None:
        self._module, self.processes, self._looks = module, processes, looks

    def __call__(self, batch: Any, split: bool) -> None:
        """Look at a batch.

        Args:
            batch: The batch.
            split: Whether its step has several micro-batches.
        """
        if self._looks > 0 and (split or self.processes > 1):
            self._looks -= 1
            if reason := _mask(batch):
                self._looks = 0
                rank_zero_warn(
                    f"the batch has {reason}, and steps are cut into pieces (micro-batches, or the shares of several "
                    "processes) that are weighed by their examples. If the loss is a mean over what is not masked, the "
                    f"gradient of a step is then not that of its mean loss: give {type(self._module).__name__} a method "
                    "`loss_terms(batch)` that returns how many terms the mean loss of a batch is a mean over, such as "
                    "`(batch['labels'] != -100).sum()`. If it is a mean over examples, return their number"
                )


def _mask(batch: Any) -> str | None:
    """What of a batch is masked, as far as conventions of `transformers` and torch say."""
    if isinstance(batch, Tensor):
        # cross-entropy takes labels of no other type
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
    """Have the backward pass of a loss over nothing add nothing, where it would add NaN (a mean over nothing is 0/0).

    It is run all the same: other processes wait for the gradients of every parameter. There every step of the backward pass
    gives zeros, but for what runs a backward pass of its own (reentrant checkpoints).

    Args:
        loss: The loss.
        parameters: Of the module.
        alone: Whether there is one process.

    Returns:
        To be closed after the backward pass.
    """
    undo = ExitStack()
    if alone:  # then what it adds can be thrown away
        for parameter in parameters:
            undo.callback(_put_back, parameter, parameter.grad)
            parameter.grad = None
        return undo
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or node.name().endswith("AccumulateGrad"):  # the last is a parameter
            continue
        seen.add(node)
        handle = node.register_hook(
            lambda inputs, _: tuple(None if each is None else torch.zeros_like(each) for each in inputs)
        )
        undo.callback(handle.remove)
        nodes += [following for following, _ in node.next_functions]
    return undo


def _zeros(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else torch.zeros_like(gradient)


def _put_back(parameter: Tensor, gradient: Tensor | None) -> None:
    # a loss scaler must find a gradient where there was none
    parameter.grad = _zeros(parameter.grad) if gradient is None else gradient


def skip_step(optimizer: Optimizer, scaler: Any = None) -> None:
    """In ``on_before_optimizer_step``: have the step change nothing, as one whose loss is ``None``.

    Args:
        optimizer: The optimizer that is about to step.
        scaler: The loss scaler of mixed precision, where it will take the step.
    """
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)  # it would look for infinities as it steps, and find no gradient to look at
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
