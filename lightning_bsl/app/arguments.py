"""Checks of a composed configuration before anything is made of it: what each class or function takes is in its signature."""

from __future__ import annotations

import inspect
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from torch.optim import Optimizer

OF_HYDRA = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
MODES = {"_convert_": ("none", "partial", "object", "all"), "_partial_": (True, False), "_recursive_": (True, False)}
NODES = ("data", "model", "scheduler", "trainer")  # without which nothing runs
GROUPS = ("callbacks", "logger")  # nodes of nodes, which may be left out
OF_SCHEDULER = ("max_samples", "max_tokens")  # what the scheduler reads of the node of the Trainer
SEEDS = 2**32  # of NumPy's generator, which is seeded too
Number = int | float
_COUNT = "a whole number from 1 on"
_READ: dict[str, tuple[Any, Any, str]] = {  # values that no signature knows: their type, the least of them, and what to write
    "seed": (int, 0, f"a whole number from 0 to {SEEDS - 1}"),
    "ckpt_path": (str | None, None, "the path of a checkpoint, or null"),
    "output_dir": (str | None, None, "the path of a folder"),
    "dataset.metric": (str, None, "the name of a metric, such as val/accuracy"),
    "dataset.metric_mode": (Literal["min", "max"], None, "min or max"),
    "dataset.max_batch_size": (int, 1, _COUNT),
    "dataset.num_classes": (int, 1, _COUNT),
    "dataset.in_channels": (int, 1, _COUNT),
    "dataset.image_size": (int, 1, _COUNT),
    "dataset.vocab_size": (int, 1, _COUNT),
    "dataset.block_size": (int, 1, _COUNT),
    "schedule_defaults.lr": (Number | None, None, "a number"),
    "schedule_defaults.max_batch_size": (Number | None, 1, "a number from 1 on"),
    "schedule_defaults.warmup_factor": (Number, None, "a number"),
    "schedule_defaults.unit": (Literal["epoch", "step", "samples", "tokens"], None, "epoch, step, samples or tokens"),
    "schedule_defaults.stage": (Number, None, "a whole number of units, or a fraction of the run below 1"),
    "schedule_defaults.delta": (Number, None, "a number"),
    "schedule_defaults.gamma": (Number, None, "a number"),
    "schedule_defaults.threshold": (Number, None, "a number"),
    "schedule_defaults.norm_subset": (int | None, 1, f"{_COUNT}, or null for all"),
    "schedule_defaults.period": (int, 1, _COUNT),
    "trainer.max_epochs": (int | None, -1, f"{_COUNT}, or -1 for no end"),
    "trainer.max_steps": (int, -1, f"{_COUNT}, or -1 for no end"),
    "trainer.check_val_every_n_epoch": (int | None, 1, f"{_COUNT}, or null"),
    "trainer.log_every_n_steps": (int | None, 0, "a whole number from 0 on"),
    "trainer.accumulate_grad_batches": (int, 1, _COUNT),
}
_PLAIN = ("dataset", "schedule_defaults")  # nodes of such values
_OURS = ("builtins", "collections", "lightning_bsl", "numbers", "torch")  # packages whose types take no configurations


def check_settings(cfg: DictConfig) -> None:
    """Refuse a configuration with a value that cannot be right, before anything is made of it.

    Args:
        cfg: The composed configuration.

    Raises:
        ValueError: A node or an argument is missing, a name is not known, or a value is of a type that its class does not take.
    """
    is_run = "trainer" in cfg or "model" in cfg
    for name in NODES if is_run else ():
        _check_node(cfg, name)
    for name in (*GROUPS, *_PLAIN, "constants", "optimizer"):
        node = None if OmegaConf.is_missing(cfg, name) else cfg.get(name)
        if node is not None and not isinstance(node, DictConfig):
            raise ValueError(f"`{name}={_shown(node)}` is no group of values: write null for none, or {name}.NAME=VALUE")
        for member, child in (node or {}).items() if name in GROUPS else ():
            _check_member(child, f"{name}.{member!s}")
    if is_run:
        _check_names(cfg)
    _check_missing(cfg)
    _check_values(cfg)
    for key, child in cfg.items_ex(resolve=False):
        if (
            key != "hydra"
            and isinstance(child, (DictConfig, ListConfig))
            and not child._is_interpolation()
            and not child._is_none()
        ):
            with suppress(*([InterpolationResolutionError] if key == "grid" else [])):  # the command says it in its own words
                _check(child, str(key))


def _check_member(node: Any, path: str) -> None:
    """Refuse what is no callback or logger. One without a class may be what an experiment says of it in case it is chosen."""
    if node is not None and not isinstance(node, DictConfig):
        raise ValueError(f"`{path}={_shown(node)}` is no configuration of an object: write a node with `_target_`, or null")
    if node is not None and (path.startswith("logger.") or get_close_matches("_target_", map(str, node), 1)):
        _check_has_target(node, path)


def _check_missing(cfg: DictConfig) -> None:
    """Refuse a value that has to be given, and was not."""
    for name in map(str, cfg):
        if name in ("grid", "hydra"):  # which has a message of its own
            continue
        if OmegaConf.is_missing(cfg, name):
            raise ValueError(f"`{name}` has no value (???): give it one, {name}=VALUE")
        raw = cfg._get_node(name)
        if isinstance(raw, (DictConfig, ListConfig)) and not raw._is_interpolation() and not raw._is_none():
            for key in sorted(OmegaConf.missing_keys(raw)):
                raise ValueError(f"`{key}` has no value (???): give it one, {key}=VALUE")


def _check_node(cfg: DictConfig, name: str) -> None:
    """Refuse a configuration without one of the nodes that a run needs."""
    if name not in cfg:
        near = get_close_matches(name, [str(key) for key in cfg if key not in NODES], 1, 0.6)
        raise ValueError(f"there is no `{name}`; write {f'`{name}` for `{near[0]}`' if near else f'a choice: {name}=NAME'}")
    node = cfg[name]
    if not isinstance(node, DictConfig):
        raise ValueError(f"`{name}={_shown(node)}` is no configuration of an object: write a choice, {name}=NAME")
    _check_has_target(node, name)


def _check_has_target(node: DictConfig, path: str) -> None:
    """Refuse a node that does not say what to call."""
    if "_target_" not in node:
        near = get_close_matches("_target_", map(str, node), 1)
        raise ValueError(f"`{path}` has no `_target_`, the class of its object: write it{f' for `{near[0]}`' if near else ''}")


def _check_names(cfg: DictConfig) -> None:
    """Refuse a name that is almost one that is read, where nothing reads it."""
    text = OmegaConf.to_yaml(cfg)
    known = [*NODES, *GROUPS, *_PLAIN, "seed", "output_dir", "ckpt_path", "optimizer", "constants", "experiment", "scale"]
    for parent in ("", *_PLAIN):
        path = f"{parent}." if parent else ""
        names = [name.removeprefix(path) for name in _READ if name.startswith(path)] if parent else known
        for name in map(str, (cfg.get(parent) if parent else cfg) or ()):
            read = re.search(rf"[{{:,]{re.escape(path + name)}(?!\w)", text)
            if name not in names and not read and (near := get_close_matches(name, names, 1, 0.75)):
                raise ValueError(f"`{path}{name}` is not read by anything: write `{path}{near[0]}`")


def _check_values(cfg: DictConfig) -> None:
    """Refuse values that no signature speaks of."""
    for key, (hint, least, words) in _READ.items():
        parent, _, name = key.rpartition(".")
        holder = cfg.get(parent) if parent else cfg
        if not isinstance(holder, DictConfig) or name not in holder or OmegaConf.is_interpolation(holder, name):
            continue  # where it comes from elsewhere, it is checked there
        value = holder[name]
        fits = _fits(value, hint) and value != "" and (least is None or value is None or value >= least)
        if not fits or (key == "seed" and value >= SEEDS):
            raise ValueError(f"`{key}={_shown(value)}`: write {words}")


def _check(node: DictConfig | ListConfig, path: str) -> None:
    """Check a node, and what is inside of it."""
    if isinstance(node, DictConfig) and "_target_" in node:
        _check_call(node, path)
    for name, child, is_own in _children(node):
        if is_own and isinstance(child, (DictConfig, ListConfig)):
            _check(child, f"{path}.{name}")


def _children(node: DictConfig | ListConfig) -> Iterator[tuple[str, Any, bool]]:
    """The names and the values of a node but for those that are missing, and whether they do not lie elsewhere."""
    names: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        if not OmegaConf.is_missing(node, name):
            yield str(name), node[name], not OmegaConf.is_interpolation(node, name)


def _check_call(node: DictConfig, path: str) -> None:
    """Check the arguments of one class or function."""
    for name, values in MODES.items():
        if name in node and not any(node[name] is value or node[name] == value for value in values):
            raise ValueError(f"`{path}.{name}={_shown(node[name])}`: write {' or '.join(map(str, values)).lower()}")
    target = _target(node, path)
    if target is None:
        return
    named = getattr(target, "__qualname__", str(target))
    parameters, needed, open_ended = _parameters(target)
    if parameters is None:
        return
    for name, value, _ in _children(node):
        if name in OF_HYDRA or (path == "trainer" and name in OF_SCHEDULER):
            continue
        if name not in parameters:
            if open_ended:
                continue
            near = get_close_matches(name, parameters, 1)
            instead = f"write `{near[0]}`" if near else f"leave it out, or write one of {', '.join(parameters)}"
            raise ValueError(f"`{path}.{name}={_shown(value)}`: {named} has no argument `{name}`; {instead}")
        default, hint = parameters[name]
        if isinstance(value, DictConfig) and "_target_" in value:
            continue  # what it makes is not known yet
        if value is None and (default is None or path == "constants"):  # of which none may be given
            continue
        infinite = isinstance(value, float) and math.isinf(value) and isinstance(target, type) and issubclass(target, Optimizer)
        if infinite or not _fits(value, hint):
            origin, wanted = _origin(node, name), f"write {_words(hint)}{', finite' if infinite else ''}"
            raise ValueError(f"`{path}.{name}={_shown(value)}`{origin} is not what {named} takes: {wanted}")
    if node.get("_partial_") or "_args_" in node:
        return
    present = set(map(str, node))
    if lacking := [name for name in needed if name not in present]:
        later = ", or `_partial_: true` where it is given later" if "_partial_" in node or path.endswith("optimizer") else ""
        raise ValueError(f"`{path}.{lacking[0]}` is missing: {named} needs it; write {path}.{lacking[0]}=VALUE{later}")


def _target(node: DictConfig, path: str) -> Callable[..., Any] | None:
    """What the node calls."""
    if OmegaConf.is_missing(node, "_target_"):
        return None
    name = node["_target_"]
    try:
        if not isinstance(name, str):
            raise ImportError("it is no name")
        target: Callable[..., Any] = _located(name)
    except ModuleNotFoundError as error:  # an extra that is not installed has a message of its own
        root = name.partition(".")[0]
        if error.name not in (None, root, name) and not name.startswith(str(error.name)):
            return None
        raise _no_target(path, name, error) from None
    except Exception as error:
        raise _no_target(path, name, error) from None
    if not callable(target):
        raise _no_target(path, name, "it is no class or function")
    return target


def _located(name: str) -> Any:
    """What has a dotted name; an object of a package rather than a module of the same name, as Hydra has it."""
    package, _, last = name.rpartition(".")
    try:
        return resolve_name(f"{package}:{last}")
    except (AttributeError, ModuleNotFoundError):
        return resolve_name(name)


def _no_target(path: str, name: object, error: object) -> ValueError:
    said = str(error).splitlines()[0] if str(error) else "it is empty"
    return ValueError(f"`{path}._target_={_shown(name)}` cannot be made ({said}): write the full name of a class or a function")


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, tuple[Any, Any]] | None, list[str], bool]:
    """The named arguments with their defaults and types, those without a default, and whether there may be others.

    ``None`` if they are not known.
    """
    found: dict[str, tuple[Any, Any]] = {}
    needed: list[str] = []
    calls = (
        [each.__dict__["__init__"] for each in target.__mro__ if "__init__" in each.__dict__]
        if isinstance(target, type)
        else [target]
    )
    for call in calls:
        try:
            signature = inspect.signature(call)
        except (TypeError, ValueError):  # built in
            return None, [], True
        names = list(signature.parameters.values())[1 if isinstance(target, type) else 0 :]
        for parameter in names:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, (parameter.default, _hint(call, parameter.annotation)))
                if parameter.default is parameter.empty and call is calls[0]:
                    needed.append(parameter.name)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in names):
            return found, needed, False
    return found, needed, True


def _hint(call: Callable[..., Any], annotation: Any) -> Any:
    """A type; ``Any`` where it is not known."""
    if annotation is inspect.Parameter.empty:
        return Any
    if isinstance(annotation, str):
        try:
            return eval(annotation, getattr(inspect.unwrap(call), "__globals__", {}))
        except Exception:  # imported for type checkers only
            return Any
    return annotation


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration can be what a type says. What is not known is left to the class."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if hint is None or hint is type(None):
        return value is None
    if isinstance(value, float) and math.isnan(value):
        return False
    if hint is Any or isinstance(hint, (TypeVar, str)):
        return True
    if hint is bool or hint is int or hint is str:
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if isinstance(value, ListConfig):
        if not _is_list(kind) or kind is object:
            return kind is object
        if kind is tuple and arguments and arguments[-1] is not ...:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return all(_fits(item, arguments[0]) for item in _plain(value)) if arguments else True
    if isinstance(value, DictConfig):
        return issubclass(kind, Mapping) or kind is object or kind.__module__.split(".")[0] not in _OURS
    if isinstance(value, str) and (issubclass(kind, (os.PathLike, Enum)) or kind in (torch.dtype, torch.device)):
        return True
    if getattr(kind, "_is_protocol", False) or (isinstance(value, bool) and kind is not object):
        return False
    return isinstance(value, kind) and not (isinstance(value, str) and issubclass(kind, Sequence))


def _is_list(kind: type) -> bool:
    if getattr(kind, "_is_protocol", False):
        return False
    return kind in (tuple, set, frozenset) or issubclass(kind, AbstractSet) or issubclass(list, kind)


def _plain(value: ListConfig) -> Iterator[Any]:
    """What can be checked of the items of a list."""
    for index in range(len(value)):
        if not OmegaConf.is_missing(value, index):
            item = value[index]
            if not (isinstance(item, DictConfig) and "_target_" in item):
                yield item


def _words(hint: Any) -> str:
    """A type, in words."""
    words: list[str] = []
    for each in _alternatives(hint):
        word = _word(each)
        if word not in words:
            words.append(word)
    return " or ".join(words)


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [each for argument in get_args(hint) for each in _alternatives(argument)]
    return [hint]


def _word(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (None, type(None)):
        return "null"
    if origin is Literal:
        return ", ".join(map(str, arguments))
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "a text (a number in quotes)"}
    if hint in known:
        return known[hint]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, os.PathLike):
        return "a path"
    if isinstance(kind, type) and _is_list(kind) and kind is not object:
        number = f"{len(arguments)} of " if kind is tuple and arguments and arguments[-1] is not ... else ""
        inside = f": {number}{_words(arguments[0])}" if arguments else ""
        return f"a list{inside}"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "names with values"
    if kind is Callable:
        return "a function, as a node with `_target_`"
    if hint is Any:
        return "another value"
    return f"a node with a `_target_` that makes a {getattr(kind, '__name__', kind)}"


def _origin(node: DictConfig, name: str) -> str:
    """Where a value comes from."""
    raw = node._get_node(name)
    return f" (which is {raw._value()})" if raw is not None and raw._is_interpolation() else ""


def _shown(value: Any) -> str:
    """A value as it would be written in Python, on one line."""
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value)
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
