"""Bad configurations: every value of every composed configuration, changed in every way that a user might get wrong."""

from __future__ import annotations

import io
import json
import math
import random
import re
import string
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

from hydra import initialize_config_dir
from hydra._internal.utils import run_and_report
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write

from harness.configs import CONF, NEEDED, choices, compose_config
from harness.limits import Hangs, limited

Command = Literal["train", "plan", "search", "surge_grid"]
ENTRIES: dict[Command, str] = {
    "train": "train.main",
    "plan": "plan._main",
    "search": "search.main",
    "surge_grid": "surge_grid.main",
}
AWAY = ("cifar10", "cifar100", "fashion_mnist", "tiny_imagenet", "eli5", "text")  # data sets that are not at hand: planned only
# little of everything, so that a mutant that trains takes no time
LITTLE = ("trainer.enable_progress_bar=false", "trainer.max_epochs=10")
NARROW = ("+model.net.width=2",)

VALUES: dict[str, object] = {
    "word": "abc",
    "number in quotes": "8",
    "empty string": "",
    "junk": 'it\'s "so"\n\t#: caf\u00e9 \u2603',
    "true": True,
    "false": False,
    "none": None,
    "zero": 0,
    "minus": -1,
    "half": 0.5,
    "one and a half": 1.5,
    "minus half": -0.5,
    "whole float": 2.0,
    "three": 3,
    "huge": 10**12,
    "huge float": 1e300,
    "tiny": 1e-300,
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "list": [1, 2],
    "empty list": [],
    "dict": {"a": 1},
    "missing": "???",
    "dangling": "${nowhere.at.all}",
}
KEYS = ("left out", "unknown", "misspelt")
WORDS = {
    "lr": "learning rate",
    "batch_size": "batch size",
    "delta": "factor",
    "gamma": "factor",
    "samples_per_epoch": "examples",
}
NOT_HUGE = (
    "num_workers",
    "n_layer",
    "depth",
    "devices",
    "widen_factor",
    "width",
    "jobs",
    "n_embd",
    "dimension",
    "num_examples",
)


class Base(NamedTuple):
    """A configuration whose values are changed.

    Args:
        command: What runs it.
        overrides: Of the configuration.
    """

    command: Command
    overrides: tuple[str, ...]


class Mutant(NamedTuple):
    """One change of a configuration.

    Args:
        base: The configuration.
        key: The dotted name of the value.
        kind: What is done to it: a name in `VALUES` or in `KEYS`.
        original: The value as it is written.
    """

    base: Base
    key: str
    kind: str
    original: object

    def __str__(self) -> str:
        return f"{self.base.command} {' '.join(self.base.overrides)}: {self.key} {self.kind}"


class Outcome(NamedTuple):
    """What became of a mutant.

    Args:
        kind: ``"trains"``, ``"refused"``, ``"traceback"`` or ``"hangs"``.
        text: What was printed on the standard error.
        folder: Whether the run's folder is there.
    """

    kind: str
    text: str
    folder: bool


def bases() -> list[Base]:
    """The configurations, the plainest first."""
    found = [Base("train", NARROW)]
    groups = (
        "scheduler",
        "scheduler/batch_size",
        "scheduler/lr",
        "scheduler/follow",
        "callbacks",
        "optimizer",
        "logger",
        "trainer",
    )
    for group in groups:
        for choice in choices(group):
            if choice not in ("gpu", "ddp", "wandb"):
                more = ("optimizer=adamw",) if group == "scheduler/follow" else ()
                found.append(Base("train", (f"{group}={choice}", *more, *NARROW)))
    found += [
        Base("train", (f"model={model}",))
        for model in choices("model")
        if model not in ("quadratic", "logistic", "gpt_tiny", "distilgpt2")
    ]
    found += [Base("train", (f"data={data}",)) for data in ("quadratic", "logistic", "pydoc")]
    found.append(
        Base(
            "train",
            (
                "experiment=adaptive_growth",
                "scale=small",
                "data=digits",
                "callbacks=none",
                "++model.net.width=2",
                "data.samples_per_epoch=null",
            ),
        )
    )
    found += [Base("plan", (f"data={data}", "data.samples_per_epoch=1440")) for data in AWAY]
    found += [
        Base("plan", (f"experiment={experiment}", *NEEDED.get(experiment, ())))
        for experiment in choices("experiment")
        if "adaptive" not in experiment  # which has no plan
    ]
    found.append(Base("search", ("search.trials=1", *NARROW)))
    found.append(Base("surge_grid", ("surge=resnet18_small", "model=cnn5", *NARROW)))
    return found


def configuration(base: Base, folder: Path) -> DictConfig:
    """A configuration of one's own, with its node ``hydra``."""
    little = () if base.command in ("plan", "surge_grid") else LITTLE
    name = {"plan": "train"}.get(base.command, base.command)
    overrides = (*little, *base.overrides)
    cfg = compose_config(*overrides, name=name)
    with read_write(cfg.hydra), open_dict(cfg.hydra):
        cfg.hydra.runtime.output_dir = str(folder)
        cfg.hydra.job.name = base.command
        cfg.hydra.overrides.task = list(overrides)
    return cfg


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """The dotted names of all values, those of nodes included, and the values as they are written."""
    if isinstance(node, (DictConfig, ListConfig)) and not node._is_interpolation() and not node._is_none():
        keys = list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))
        if path:
            yield path, OmegaConf.to_container(node)
        for key in keys:
            child = node._get_node(key)
            name = f"{path}.{key}" if path else str(key)
            yield from leaves(child, name)
    else:
        yield path, node._value() if hasattr(node, "_value") else node


@cache
def all_mutants() -> list[Mutant]:
    """Every mutant of every configuration; what a configuration has in common with one before it is changed once."""
    seen: set[tuple[str, str, str]] = set()
    found = []
    for base in bases():
        cfg = configuration(base, Path("folder"))
        with open_dict(cfg):
            del cfg["hydra"]
        for key, value in leaves(cfg):
            name = key.rsplit(".")[-1]
            if (base.command, key, repr(value)) in seen or key == "output_dir":
                continue
            if base.command == "search" and not key.startswith("search"):
                continue
            if base.command == "plan" and not key.startswith(("data", "schedule_defaults", "scheduler", "scale", "dataset")):
                continue
            seen.add((base.command, key, repr(value)))
            for kind, new in VALUES.items():
                huge = isinstance(new, (int, float)) and abs(new) > 1e6
                if new != value and not (huge and name in NOT_HUGE):
                    found.append(Mutant(base, key, kind, value))
            found += [Mutant(base, key, kind, value) for kind in KEYS if kind != "misspelt" or not name.isdigit()]
    return found


def drawn(number: int, seed: int) -> list[Mutant]:
    """So many mutants at random."""
    return random.Random(seed).sample(all_mutants(), number)


def mutate(cfg: DictConfig, key: str, kind: str) -> None:
    """Change a configuration in place."""
    parent, _, last = key.rpartition(".")
    node = cfg
    for part in parent.split(".") if parent else []:
        node = node._get_node(int(part) if isinstance(node, ListConfig) else part)
    index: Any = int(last) if isinstance(node, ListConfig) else last
    with open_dict(cfg):
        if kind in VALUES:
            new = VALUES[kind]
            node[index] = deepcopy(new)
            return
        value = node._get_node(index)
        if kind == "unknown":
            if isinstance(node, ListConfig):
                node.append(7)
            else:
                node["unknown_key"] = 7
            return
        del node[index]
        if kind == "misspelt" and isinstance(node, DictConfig):
            node[misspelt(last)] = value


def misspelt(name: str) -> str:
    """A name with one wrong letter."""
    at = len(name) // 2
    return name[:at] + next(letter for letter in string.ascii_lowercase if letter != name[at]) + name[at + 1 :]


class Started(BaseException):
    """The first step has been taken."""


@contextmanager
def fake_start() -> Iterator[None]:
    """For a while, a fit ends after its first backward pass, and no processes are started."""
    optimization = "lightning.pytorch.loops.optimization.automatic._AutomaticOptimization"
    run = import_module("lightning.pytorch.loops.optimization.automatic")._AutomaticOptimization.run

    def once(*arguments: Any, **options: Any) -> Any:
        run(*arguments, **options)
        raise Started

    def start(*_: Any, **__: Any) -> Any:
        raise Started

    def touch(_: Any, path: Any, *__: Any) -> None:
        Path(path).touch()

    with ExitStack() as stack:
        stack.enter_context(mock.patch(f"{optimization}.run", once))
        launcher = "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher"
        stack.enter_context(mock.patch(f"{launcher}._call_children_scripts", start))
        stack.enter_context(mock.patch("lightning_bsl.population.grid._run", start))
        for name in ("app.train.plot_run", "app.plan.plot_plan", "app.plan.plot_comparison"):
            stack.enter_context(mock.patch(f"lightning_bsl.{name}", touch))
        yield


def begin_job(cfg: DictConfig, folder: Path) -> DictConfig:
    """What Hydra does before it calls a command: it makes the folder and its files; returns what the command gets."""
    HydraConfig.instance().set_config(cfg)
    task = deepcopy(cfg)
    with open_dict(task):
        del task["hydra"]
    (folder / ".hydra").mkdir(parents=True)
    for name, content in (("config", task), ("hydra", cfg.hydra), ("overrides", cfg.hydra.overrides.task)):
        (folder / ".hydra" / f"{name}.yaml").write_text(OmegaConf.to_yaml(content))
    (folder / f"{cfg.hydra.job.name}.log").touch()
    return task


def run_mutant(mutant: Mutant, folder: Path, seconds: int = 300) -> Outcome:
    """Run a mutant in this process, up to its first step."""
    cfg = configuration(mutant.base, folder)
    mutate(cfg, mutant.key, mutant.kind)
    if mutant.kind in VALUES:  # as a user would have said it
        with read_write(cfg.hydra), open_dict(cfg.hydra):
            cfg.hydra.overrides.task.append(f"++{mutant.key}={VALUES[mutant.kind]}".replace("$", "\\$"))
    return run_configuration(mutant.base.command, cfg, folder, seconds)


def run_configuration(command: Command, cfg: DictConfig, folder: Path, seconds: int = 300) -> Outcome:
    """Run a command with a configuration in this process, up to its first step."""
    module, _, name = ENTRIES[command].partition(".")
    task: Callable[[DictConfig], object] = getattr(import_module(f"lightning_bsl.app.{module}"), name).__wrapped__
    given = begin_job(cfg, folder)
    out, error, kind = io.StringIO(), io.StringIO(), "trains"
    with redirect_stdout(out), redirect_stderr(error), fake_start():
        try:
            with limited(seconds), initialize_config_dir(str(CONF), version_base="1.3"):
                run_and_report(lambda: task(given))
        except Started:
            pass
        except Hangs:
            kind = "hangs"
        except SystemExit:
            kind = "refused"
    text = error.getvalue()
    if kind == "refused" and "Traceback" in text:
        kind = "traceback"
    return Outcome(kind, text, folder.exists())


def says(mutant: Mutant, text: str) -> bool:
    """Whether a message names the key, or the argument, and the value."""
    key, kind = mutant.key, mutant.kind
    parts = [part for part in key.split(".") if not part.isdigit() and part != "_args_"]
    name = parts[-1]
    if key.startswith(("scheduler", "schedule_defaults")) and re.search("the (batch size|learning rate) is .* at epoch=", text):
        return True  # that of a step of the plan
    if kind == "misspelt":
        return misspelt(name) in text or name in text
    if kind == "unknown":
        return "unknown_key" in text or name in text
    if kind == "dangling":
        return "nowhere.at.all" in text and name in text
    named = name in text or WORDS.get(name, name) in text
    if kind in ("left out", "missing") or isinstance(mutant.original, (dict, list)) or "_args_" in key:
        return named
    value = VALUES[kind]
    shown = [repr(value), str(value), json.dumps(value), f"{value:,}" if isinstance(value, (int, float)) else ""]
    shown += [repr(tuple(value))] if isinstance(value, list) else []
    return named and (value == "" or any(each in text for each in shown if each))


def must_refuse(mutant: Mutant) -> bool:
    """Whether a value cannot be right, whatever reads it: by the type of the value in whose place it stands."""
    old, kind = mutant.original, mutant.kind
    name = mutant.key.rpartition(".")[2]
    if kind in ("missing", "dangling"):
        return True
    if kind not in VALUES or mutant.key.startswith(("scale", "rates")):  # of which experiments take what they need
        return False
    new = VALUES[kind]
    if isinstance(new, float) and math.isnan(new):
        return True
    if isinstance(old, bool):
        return not isinstance(new, (bool, type(None))) and not (name == "whole_batches" and type(new) is int)
    if isinstance(old, (int, float)):
        return isinstance(new, (str, bool, list, dict)) and not (name == "devices" and kind == "number in quotes")
    if isinstance(old, str) and not old.startswith("${"):
        return isinstance(new, (bool, float, list, dict))
    if isinstance(old, (dict, list)) and "." in mutant.key:
        return isinstance(new, (str, bool)) or new == []
    return isinstance(old, dict) and new is not None
