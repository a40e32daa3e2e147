"""Who sets the learning rates of the optimizers' param groups."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_bsl.schedules import BatchLR, ScalingRule


class Rates(Protocol):
    """Puts a setting's learning rate into effect."""

    def apply(self, setting: BatchLR) -> None:
        """Have the steps to come taken with ``setting``."""
        ...

    def note(self) -> None:
        """Note the rate of the step that begins now."""
        ...

    @property
    def rate(self) -> float:
        """What the first param group's step is taken with."""
        ...


class OwnRates:
    """The schedule owns the rates: every param group gets its rate, times the group's ratio to the first one.

    Groups may be added while the model trains; a group keeps the ratio that it is added with.

    Args:
        optimizers: The optimizers, the first of which has the first group.

    Raises:
        MisconfigurationException: The first group's rate is not above 0, so that the others have no ratio to it.
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
        """Set every group's rate."""
        if setting.lr is None:
            return
        self._note_ratios()
        self.rate = setting.lr
        for optimizer, ratios in zip(self.optimizers, self._ratios):
            for group, ratio in zip(optimizer.param_groups, ratios):
                set_lr(group, setting.lr * ratio)

    def note(self) -> None:
        """Do nothing: the rate is what was set."""

    def _note_ratios(self) -> None:
        for optimizer, ratios in zip(self.optimizers, self._ratios):
            for group in optimizer.param_groups[len(ratios) :]:
                ratios.append(float(group["lr"]) / float(groups_of(self.optimizers)[0]["lr"]))


class ScaledRates:
    """The module owns the rates; a scaling rule multiplies them for the length of each optimizer step.

    The module's schedulers chain their rates from step to step, so that between steps they must find their own.

    Args:
        optimizers: The optimizers.
        rule: The scaling rule, ``None`` to leave the rates alone.
        undo: Takes the hooks off again when it is closed.
    """

    def __init__(self, optimizers: Sequence[Optimizer], rule: ScalingRule | None, undo: ExitStack) -> None:
        self.optimizers, self.rule = optimizers, rule
        self.factor, self.rate = 1.0, 0.0
        self._unscaled: dict[int, list[Any]] = {}  # the module's rates while an optimizer takes its step
        for optimizer in optimizers if rule is not None else ():
            undo.callback(self._unscale, optimizer)  # an exception inside its step: a checkpoint may yet be written
            undo.callback(optimizer.register_step_pre_hook(self._scale).remove)
            undo.callback(optimizer.register_step_post_hook(self._unscale).remove)

    def apply(self, setting: BatchLR) -> None:
        """Look up the factor of the batch size."""
        self.factor = 1.0 if self.rule is None else self.rule.factor(setting.batch_size)

    def note(self) -> None:
        """Note the first group's rate: a scheduler of the module changes it before the step is logged."""
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
    """Set a rate; one that is a tensor stays that tensor, which compiled and captured steps read."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
