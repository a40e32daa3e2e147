"""The learning rates of the optimizers' param groups: set by the schedule, or by the module."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_bsl.schedules import BatchLR, ScalingRule


class Rates(Protocol):
    """Sets the learning rates of the optimizers."""

    def apply(self, setting: BatchLR) -> None:
        """Use ``setting`` for the next steps."""
        ...

    def note(self) -> None:
        """Remember the learning rate of the step that begins now."""
        ...

    @property
    def rate(self) -> float:
        """The learning rate of the first param group in this step."""
        ...


class OwnRates:
    """The schedule sets the learning rates. A param group gets the scheduled rate times its ratio to the first group.

    Groups may be added while the model trains. A group keeps the ratio that it had when it was added.

    Args:
        optimizers: The optimizers; the first one has the first group.

    Raises:
        MisconfigurationException: The learning rate of the first group is not above 0, so the others have no ratio to it; also
            if a group is added while the scheduled rate is 0.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        if (groups := groups_of(optimizers)) and not groups[0]["lr"] > 0:
            raise MisconfigurationException(
                f"the optimizer's first param group has lr={float(groups[0]['lr'])}, so the other groups have no ratio to it; "
                "give it a learning rate above 0"
            )
        self._ratios: list[list[float]] = [[] for _ in optimizers]
        self.rate = 0.0
        self._note_ratios()

    def apply(self, setting: BatchLR) -> None:
        """Set the learning rate of every group."""
        if setting.lr is None:
            return
        self._note_ratios()
        self.rate = setting.lr
        for optimizer, ratios in zip(self.optimizers, self._ratios):
            for group, ratio in zip(optimizer.param_groups, ratios):
                set_lr(group, setting.lr * ratio)

    def note(self) -> None:
        """Do nothing: ``rate`` is always the last one that was set."""

    def _note_ratios(self) -> None:
        for optimizer, ratios in zip(self.optimizers, self._ratios):
            for group in optimizer.param_groups[len(ratios) :]:
                first = float(groups_of(self.optimizers)[0]["lr"])
                if first == 0:
                    raise MisconfigurationException(
                        f"a param group with lr={float(group['lr'])} was added while the scheduled learning rate is 0, so it "
                        "has no ratio to it: add the group at another step, or write a schedule that is above 0 there"
                    )
                ratios.append(float(group["lr"]) / first)


class ScaledRates:
    """The module sets the learning rates. A scaling rule multiplies them during each optimizer step.

    Between steps the rates are the module's own, because many schedulers compute the next rate from the last one.

    Args:
        optimizers: The optimizers.
        rule: The scaling rule; ``None`` to leave the rates alone.
        undo: Removes the hooks when it is closed.
    """

    def __init__(self, optimizers: Sequence[Optimizer], rule: ScalingRule | None, undo: ExitStack) -> None:
        self.optimizers, self.rule = optimizers, rule
        self.factor, self.rate = 1.0, 0.0
        self._unscaled: dict[int, list[Any]] = {}  # the module's rates while an optimizer takes its step
        for optimizer in optimizers if rule is not None else ():
            undo.callback(self._unscale, optimizer)  # after an exception inside a step: a checkpoint may still be saved
            undo.callback(optimizer.register_step_pre_hook(self._scale).remove)
            undo.callback(optimizer.register_step_post_hook(self._unscale).remove)

    def apply(self, setting: BatchLR) -> None:
        """Compute the factor for the batch size."""
        self.factor = 1.0 if self.rule is None else self.rule.factor(setting.batch_size)

    def note(self) -> None:
        """Remember the rate of the first group: the module's scheduler changes it before the step is logged."""
        if groups := groups_of(self.optimizers):
            self.rate = float(groups[0]["lr"]) * self.factor

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        rates = self._unscaled[id(optimizer)] = [float(group["lr"]) for group in optimizer.param_groups]
        for group, lr in zip(optimizer.param_groups, rates):
            set_lr(group, lr * self.factor)

    def _unscale(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._unscaled.pop(id(optimizer), ())):
            set_lr(group, lr)


def groups_of(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """The param groups of all optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set a learning rate. A rate that is a tensor is changed in place, since compiled and captured steps read this tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
