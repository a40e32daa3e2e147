"""The constants of the optimizers that follow the batch size, such as the betas of Adam and the weight decay."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from numbers import Real
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_bsl.callbacks.rates import groups_of, set_lr
from lightning_bsl.schedules import DecayTimescale, ScalingRule, Schedule
from lightning_bsl.schedules.following import FollowingFunction

_BASE = "initial_"  # prefix of the keys of a param group that hold its own constants, as `initial_lr` of torch's schedulers
_AHEAD = "beta1_steps_ahead"
_DECAYS = ("momentum", "alpha", "rho")  # of running averages without a correction for their start


def read_follow(follow: object) -> dict[str, FollowingFunction]:
    """The rules for the constants that follow the batch size, by name.

    Args:
        follow: The argument of ``BatchLRScheduler``.

    Raises:
        TypeError: It is no mapping from names to rules.
        ValueError: A rule for the learning rate, or two rules for one beta.
    """
    if follow is None:
        return {}
    if not isinstance(follow, Mapping):
        raise TypeError(
            f"`follow={follow!r}` must map constants of the optimizer to rules: write `follow={{'betas': HalfLife(8)}}`"
        )
    for name, rule in follow.items():
        if name == "lr":
            raise ValueError("`follow` has a rule for 'lr': give it to the scheduler, as `lr=SqrtScaling(...)`")
        if isinstance(rule, (type, ScalingRule, Schedule)) or not callable(rule):
            raise TypeError(
                f"`follow[{name!r}]={rule!r}` is no rule for a constant: write `HalfLife(...)`, `DecayTimescale(...)`, or a "
                "function `(value, batch_size) -> value`"
            )
    if "betas" in follow and (one := [name for name in follow if _is_beta(name)]):
        raise ValueError(f"`follow` has a rule for 'betas' and another for {one[0]!r}: write one rule for each beta")
    return dict(follow)


class FollowingConstants:
    """Sets the constants of the param groups that follow the batch size.

    Each group has its own constants, to which the rules are applied. A constant of 0 stays 0. The group keeps its own constants
    beside those in use (under ``initial_weight_decay`` and so on), in checkpoints too. So they are known in a resumed fit and
    in a second fit, and also for groups that were added while the model trained.

    **Bias correction.** Adam divides its running averages by the sums of their weights, ``1 - beta ** t`` after t steps. With a
    beta that changes, this sum is ``1 - product of the betas of all steps``. When the betas change, the number of steps in the
    state is set to that of the second beta: the s with ``beta2 ** s`` equal to the product. If both betas follow the same power
    (``HalfLife``), s is right for the first beta too. Otherwise each learning rate is multiplied, during the optimizer step
    alone, by the ratio of the two sums of the first beta, until this ratio is 1 to rounding (and a decoupled weight decay is
    divided by it). This ratio is that of the group's first parameter.

    Args:
        optimizers: The optimizers.
        rules: A rule for each constant that follows the batch size, by its key in the param groups; ``beta1`` and ``beta2``
            for one of the ``betas``.
        undo: Removes the hooks when it is closed.

    Raises:
        MisconfigurationException: No param group has such a constant, or it is no number, or the optimizer is not known to
            correct its betas as Adam does.
    """

    def __init__(self, optimizers: Sequence[Optimizer], rules: Mapping[str, FollowingFunction], undo: ExitStack) -> None:
        self.optimizers, self.rules, self.undo = optimizers, rules, undo
        self._applied: tuple[int, int] | None = None  # the batch size, and the number of groups
        self._written: dict[tuple[int, int, str], float] = {}  # by optimizer, group and name
        self._unscaled: dict[int, list[tuple[dict[str, Any], float, float, float | None]]] = {}
        for name in rules:
            self._check_name(name)
        self._watches_after = self._watches_before = False
        if any(name == "betas" or _is_beta(name) for name in rules):
            # before the hooks of a scaling rule: what changes a rate last must be the first to restore it
            self._watch(before=False)

    def check(self, sizes: Iterable[int]) -> None:
        """Evaluate the rules for batch sizes of the run.

        Raises:
            ValueError: A rule gives a value that its constant cannot have.
        """
        for size in sizes:
            for group in groups_of(self.optimizers):
                for name, rule in self._rules(group).items():
                    _value(name, rule, _base(group, name), size)

    def at(self, batch_size: int) -> dict[str, float]:
        """The constants that follow the batch size, by name, for a batch size.

        Each is that of the first param group in which it is not 0 (of the first group that has it, if it is 0 in all).
        """
        values: dict[str, float] = {}
        for group in groups_of(self.optimizers):
            for name, rule in self._rules(group).items():
                if rule is not _own and not values.get(name):
                    values[name] = _value(name, rule, _base(group, name), batch_size)
        return values

    def apply(self, batch_size: int) -> None:
        """Set the constants for the next step.

        Args:
            batch_size: Batch size of the step.

        Raises:
            MisconfigurationException: Something else has set one of the constants.
            ValueError: A rule gives a value that its constant cannot have.
        """
        applied = batch_size, len(groups_of(self.optimizers))
        if applied == self._applied:
            return
        if self._applied is None or applied[1] != self._applied[1]:
            self._separate()
        self.check_kept()
        self._applied = applied
        for i, optimizer in enumerate(self.optimizers):
            for j, group in enumerate(optimizer.param_groups):
                before = _betas(group)
                for name, rule in self._rules(group).items():
                    base = group.setdefault(_BASE + name, _read(group, name))
                    self._written[i, j, name] = _write(group, name, _value(name, rule, base, batch_size))
                    if rule is _own:  # the group's own constant is back, for good
                        del group[_BASE + name], self._written[i, j, name]
                if before != _betas(group):
                    self._keep_sums(optimizer, group, before)
                if group.get(_AHEAD):
                    self._watch(before=True)

    def _separate(self) -> None:
        """Give each group tensors of its own: groups share those that were given to the optimizer for all of them."""
        seen: set[int] = set()
        for group in groups_of(self.optimizers):
            if not any(rule is not _own for rule in self._rules(group).values()) and not group.get(_AHEAD):
                continue
            for key, value in group.items():
                if key != "params":
                    group[key] = tuple(map(partial(_own_tensor, seen), value)) if key == "betas" else _own_tensor(seen, value)

    def check_kept(self) -> None:
        """Check that the constants are those that were set last.

        Raises:
            MisconfigurationException: Something else has set one of them.
        """
        for (i, j, name), written in self._written.items():
            if (value := _read(self.optimizers[i].param_groups[j], name)) != written:
                raise MisconfigurationException(
                    f"{name!r} of a param group is {value}, but BatchLRScheduler set it to {written}: something else sets it "
                    "too. Leave it out of `follow`, or let only `follow` change it"
                )

    # --- checks

    def _rules(self, group: Mapping[str, Any]) -> dict[str, FollowingFunction]:
        """The rule of each constant of a group; ``_own`` if an earlier fit changed it and this one has no rule for it."""
        rules: dict[str, FollowingFunction] = {}
        for name, rule in self.rules.items():
            names = [f"beta{k + 1}" for k in range(len(group.get("betas", ())))] if name == "betas" else [name]
            rules |= {name: rule for name in names if _entry(group, name)}
        changed = (key.removeprefix(_BASE) for key in group if key.startswith(_BASE) and key != "initial_lr")
        return {name: _own for name in changed if name not in rules and _entry(group, name)} | rules

    def _check_name(self, name: str) -> None:
        """Raise an error unless the constant exists, is a number, and may follow the batch size."""
        known = False
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if not (entry := ("betas", None) if name == "betas" and "betas" in group else _entry(group, name)):
                    continue
                known, value = True, group[entry[0]]
                if _is_beta(name) or name == "betas":
                    if entry[0] != "betas" or not isinstance(optimizer, (Adam, AdamW)):
                        raise MisconfigurationException(
                            f"the betas of {type(optimizer).__name__} cannot follow the batch size: it is not known how it "
                            "corrects its running averages for their start at 0, as it is of Adam and AdamW. Leave "
                            f"{name!r} out of `follow`, or use one of these"
                        )
                elif isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
                    raise MisconfigurationException(
                        f"`follow` has a rule for {name!r}, but in {type(optimizer).__name__} this is {value!r} and no number; "
                        "leave it out"
                    )
                if isinstance(self.rules[name], DecayTimescale) and _couples_decay(optimizer, group):
                    raise MisconfigurationException(
                        f"the weight decay of {type(optimizer).__name__} is a part of the gradient that it normalises, so it "
                        f"has no timescale to keep: write AdamW, or leave {name!r} out of `follow`"
                    )
        if not known:
            keys = {key for group in groups_of(self.optimizers) for key, value in group.items() if _is_constant(key, value)}
            raise MisconfigurationException(
                f"`follow` has a rule for {name!r}, but no param group of the optimizers has it; write one of "
                f"{', '.join(sorted(keys))}"
            )

    # --- bias correction

    def _keep_sums(self, optimizer: Optimizer, group: dict[str, Any], before: tuple[float, ...]) -> None:
        """After a change of the betas: set the numbers of steps for which the sums of the weights are what they were."""
        power1, power2 = (
            math.log(new) / math.log(old) if old > 0 else None for old, new in zip(before, _betas(group), strict=True)
        )
        if (power := power2 or power1) is None:
            return
        taken = _steps_taken(optimizer, group)
        for parameter in group["params"]:
            step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
            if step is not None:
                step.fill_(float(step) / power)
        ahead = 0.0
        if power1 and power2:
            first, second = (taken + group.get(_AHEAD, 0.0)) / power1, taken / power2
            ahead = first - _steps_taken(optimizer, group) if abs(first - second) > 1e-9 * second else 0.0
        if ahead or _AHEAD in group:
            group[_AHEAD] = ahead

    def _watch(self, before: bool) -> None:
        """Call ``_unscale`` after each step of Adam, and ``_scale`` ``before`` it too."""
        for optimizer in self.optimizers:
            if not isinstance(optimizer, (Adam, AdamW)):
                continue
            if not self._watches_after:
                self.undo.callback(self._unscale, optimizer)  # after an exception inside a step
                self.undo.callback(optimizer.register_step_post_hook(self._unscale).remove)
            if before and not self._watches_before:
                self.undo.callback(optimizer.register_step_pre_hook(self._scale).remove)
        self._watches_after, self._watches_before = True, self._watches_before or before

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        """Make the sum of the first beta's weights right: it is that of more or fewer steps than the state has."""
        self._unscale(optimizer)
        unscaled = self._unscaled[id(optimizer)] = []
        for group in optimizer.param_groups:
            beta1, steps = _betas(group)[0], _steps_taken(optimizer, group) + 1
            ratio = (1 - beta1**steps) / (1 - beta1 ** (steps + group.get(_AHEAD, 0.0)))
            if ratio == 1:
                continue
            lr, decay = float(group["lr"]), None
            if group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)):
                decay = _read(group, "weight_decay")
                _write(group, "weight_decay", decay / ratio)
            set_lr(group, lr * ratio)
            unscaled.append((group, lr, float(group["lr"]), decay))

    def _unscale(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr, scaled, decay in self._unscaled.pop(id(optimizer), ()):
            if float(group["lr"]) == scaled:  # not if a scaling rule has restored it before
                set_lr(group, lr)
            if decay is not None:
                _write(group, "weight_decay", decay)


def check_momentum(trainer: Trainer, rules: Mapping[str, FollowingFunction]) -> None:
    """Refuse a scheduler of the module that cycles a constant which follows the batch size.

    Raises:
        MisconfigurationException: There is such a scheduler.
    """
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    while schedulers:
        scheduler = schedulers.pop()
        schedulers += getattr(scheduler, "_schedulers", [])  # of SequentialLR and ChainedScheduler
        if not getattr(scheduler, "cycle_momentum", False):
            continue
        names = ("betas", "beta1") if "betas" in scheduler.optimizer.defaults else ("momentum",)
        if cycled := [name for name in names if name in rules]:
            raise MisconfigurationException(
                f"{type(scheduler).__name__} and `follow` would both set {cycled[0]!r}: write `cycle_momentum=False`, or leave "
                f"{cycled[0]!r} out of `follow`"
            )


def _own_tensor(seen: set[int], value: Any) -> Any:
    """A value; a copy, if it is a tensor that was seen before."""
    if not isinstance(value, Tensor):
        return value
    if id(value) in seen:
        return value.clone()
    seen.add(id(value))
    return value


def _own(value: float, batch_size: int) -> float:
    """The rule of a constant that does not follow the batch size any more."""
    return value


def _value(name: str, rule: FollowingFunction, base: float, batch_size: int) -> float:
    """The value of a constant for ``batch_size``.

    Raises:
        ValueError: The rule gives a value that the constant cannot have.
    """
    if base == 0 or rule is _own:
        return base
    value = rule(base, batch_size)
    finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not finite:
        needs = "a finite number"
    elif _is_beta(name) and not 0 < value < 1:
        needs = "above 0 and below 1, as a running average needs it"
    elif name in _DECAYS and not 0 <= value < 1:
        needs = "0 or more and below 1, as a running average needs it"
    elif value < 0 < base:
        needs = "0 or more"
    else:
        return float(value)
    raise ValueError(
        f"the rule {rule!r} for {name!r} gives {value!r} for a batch size of {batch_size} (own value {base}), but it must be "
        f"{needs}: write another rule, such as `HalfLife(...)` for betas"
    )


def _is_beta(name: str) -> bool:
    return re.fullmatch(r"beta\d+", name) is not None


def _is_constant(key: str, value: Any) -> bool:
    return key not in ("params", "lr") and (key == "betas" or (isinstance(value, Real) and not isinstance(value, bool)))


def _entry(group: Mapping[str, Any], name: str) -> tuple[str, int | None] | None:
    """Where a group has a constant: its key, and the index of one of the betas; ``None`` if the group does not have it."""
    if name in group and name != "betas":
        return name, None
    if _is_beta(name) and 0 < int(name.removeprefix("beta")) <= len(group.get("betas", ())):
        return "betas", int(name.removeprefix("beta")) - 1
    return None


def _read(group: Mapping[str, Any], name: str) -> float:
    key, index = _entry(group, name) or (name, None)
    return float(group[key] if index is None else group[key][index])


def _write(group: dict[str, Any], name: str, value: float) -> float:
    """Set a constant, a tensor in place; return the value that it now has."""
    key, index = _entry(group, name) or (name, None)
    element = group[key] if index is None else group[key][index]
    if isinstance(element, Tensor):
        element.fill_(value)
    elif index is None:
        group[key] = value
    else:
        group[key] = tuple(value if k == index else beta for k, beta in enumerate(group[key]))
    return _read(group, name)


def _base(group: Mapping[str, Any], name: str) -> float:
    """The group's own value of a constant."""
    return float(group.get(_BASE + name, _read(group, name)))


def _betas(group: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(float(beta) for beta in group.get("betas", ()))


def _couples_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the weight decay is added to a gradient that is normalised afterwards."""
    if isinstance(optimizer, AdamW):
        return False
    return isinstance(optimizer, (Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop)) and not group.get("decoupled_weight_decay")


def _steps_taken(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """The number of steps in the state of the group's first parameter that has one."""
    states = (optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state)
    return next((float(state["step"]) for state in states if "step" in state), 0.0)
