"""Finished and unfinished runs under folders, and the groups of those that differ in their seed only."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from lightning_bsl.runs.branches import read_critical_batches
from lightning_bsl.runs.folder import BOUND, FINISHED
from lightning_bsl.runs.logs import AXES, read_log, read_stages, replace_from
from lightning_bsl.runs.metrics import check_is_file, one_line, read_numbers

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # x and y

METRICS = {
    "full_gradient_norm": "full gradient norm",
    "train/loss": "training loss",
    "val/loss": "validation loss",
    "val/accuracy": "validation accuracy",
    "val/perplexity": "validation perplexity",
}
# overrides that change what is written or where data lie, but not what is trained
_OUTPUT_ONLY = re.compile(
    r"(seed|ckpt_path|output_dir|logger|callbacks\.(model_checkpoint|training_time)|data\.(root|download|num_workers)"
    r"|trainer\.(enable_\w+|default_root_dir|logger|log_every_n_steps))(\..*)?"
)
_SEED = re.compile(r"(?:^|[_=.-])(?:seed|s)[_=-]?(\d+)$")


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Args:
        folder: Where its log lies.
        name: The folder, as seen from the folder that was searched.
        log: What was logged, as of `read_log`.
        seed: Its seed, if that is known.
        overrides: What was overridden on its command line, and to what.
        choices: What was chosen from each group of ``conf/``.
        config: Its configuration, which is only read; ``None`` for the logs of others.
        planned: The samples it was to train, if that is known.
        ended: Whether its fit has ended.
        by_epoch: Whether its training metrics are those of whole epochs, not of every logged step.
        series_name: The folder without a number of its seed or version, for the logs of others.
    """

    folder: Path
    name: str
    log: Any
    seed: int | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    config: DictConfig | None = None
    planned: float | None = None
    ended: bool = True
    by_epoch: bool = True
    series_name: str | None = None

    @property
    def metrics(self) -> set[str]:
        """The metrics and the axes that it has values on."""
        return {*self.log["metric"], *(axis for axis in AXES if self.log[axis].notna().any())}

    def reached(self, axis: str) -> float:
        """How far it came on an axis; nan where the axis is not logged."""
        return float(self.log[axis].max())

    @property
    def progress(self) -> str:
        """How far it came, in words."""
        samples = self.reached("samples")
        if self.planned and samples < self.planned:
            how = "stopped" if self.ended else "unfinished"
            return f"{how} at {samples:,.0f} of {self.planned:,.0f} samples ({samples / self.planned:.0%})"
        if self.ended:
            return "finished" if self.planned else "ended"
        epochs = self.setting("trainer.max_epochs")
        whole = f" of {epochs}" if re.fullmatch("[1-9][0-9]*", epochs or "") else ""
        return f"unfinished at {self.reached('epochs'):.3g}{whole} epochs, {samples:,.0f} samples"

    def series(self, metric: str) -> Any:
        """The logged values of a metric: of training metrics the means of whole epochs where there are enough of them."""
        rows = self.log[(self.log["metric"] == metric) & self.log["samples"].notna()]
        if metric in ("batch_size", "lr"):
            rows = rows[rows["stage"].isna()]  # the row of an advance says what comes next
        if not (self.by_epoch and metric.startswith("train/")):
            return rows.drop_duplicates("step", keep="last")
        under_way = np.nan if self.ended else self.log["epoch"].iloc[-1]
        return rows.drop_duplicates("epoch", keep="last")[lambda epochs: epochs["epoch"] != under_way]

    def curve(self, metric: str, axis: str = "samples") -> Curve:
        """A metric against an axis, where both are finite."""
        points = self.series(metric)[[axis, "value"]].to_numpy(dtype=float)
        return tuple(points[np.isfinite(points).all(axis=1)].T)

    def setting(self, key: str) -> str | None:
        """The value of something that some run overrides, in this one."""
        if self.config is None:
            return self.series_name if key == "folder" else None
        if key in self.choices:
            return str(self.choices[key])
        try:
            value = OmegaConf.select(self.config, key)
            return None if value is None else str(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
        except Exception:  # what only Hydra can resolve, and keys and values of any form
            return self.overrides.get(key)


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed only, and what sets them apart from others."""

    name: str
    runs: list[Run]

    @property
    def counted(self) -> list[Run]:
        """Those that statistics are made of: those that have ended, or all if none has."""
        return [run for run in self.runs if run.ended] or self.runs

    @property
    def unfinished(self) -> list[Run]:
        """Those whose fit has not ended."""
        return [run for run in self.runs if not run.ended]

    @property
    def repeats_seed(self) -> bool:
        """Whether a seed is there more than once."""
        return bool(pd.Series([run.seed for run in self.runs]).dropna().duplicated().any())

    def logs(self, metric: str) -> bool:
        """Whether some run has values of a metric, or on an axis."""
        return any(metric in run.metrics for run in self.runs)

    def length(self, axis: str) -> float:
        """How far its counted runs came on an axis, on average; nan where no run has the axis."""
        return float(pd.Series([run.reached(axis) for run in self.counted]).mean())


@dataclass(frozen=True)
class Found:
    """The runs with a log, the folders without one with the reason, and what else a reader must know."""

    runs: list[Run]
    without: list[tuple[str, str]]
    notes: list[str]


def find_runs(folders: Sequence[str | Path], progress: bool = True) -> Found:
    """Read the runs under some folders, however deep.

    A run is a folder that ``bsl-train`` wrote (``.hydra/config.yaml``), or one with a ``metrics.csv`` of Lightning's
    ``CSVLogger`` or with TensorBoard's event files, if ``samples`` is logged there.

    Args:
        folders: Where to look.
        progress: Whether a terminal shows a progress bar.

    Raises:
        FileNotFoundError: There is no such folder, or no run in any of them.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder")
    places = {place.resolve(): (place, Path(root)) for root in folders for place in _places(Path(root))}
    runs, without, broken = list[Run](), list[tuple[str, str]](), list[str]()
    for place, root in tqdm(places.values(), "reading", unit="run", leave=False, disable=None if progress else True):
        name = printable(place.name if place == root else str(place.relative_to(root)))
        try:
            runs.append(_read(place, root, name or str(place)))
        except (OSError, ValueError, TypeError, OverflowError, OmegaConfBaseException) as error:
            without.append((name, printable(one_line(error))))
            continue
        broken += [f"{name}: {printable(problem)}. The run is shown without it." for problem in _problems(place)]
    searched, listed = ", ".join(map(str, folders)), "; ".join(f"{name}: {reason}" for name, reason in without[:10])
    if not places:
        raise FileNotFoundError(
            f"no run under {searched}: a run is a folder with .hydra/config.yaml and metrics.csv "
            "(bsl-train), a metrics.csv of Lightning's CSVLogger, or TensorBoard's event files"
        )
    if not runs:
        raise FileNotFoundError(f"no run with a log under {searched} ({listed})")
    runs, notes = _join_resumed(runs)
    notes = broken + notes
    by_epoch = max(run.log["epoch"].nunique() for run in runs) >= 3
    return Found([replace(run, by_epoch=by_epoch) for run in runs], without, notes)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs that differ in their seed only together, in the order of the first of each.

    Settings are looked at only if some run overrides them, so that it does not matter whether a default is written out.
    """
    overridden = dict.fromkeys(key for run in runs for key in run.overrides if not _OUTPUT_ONLY.fullmatch(key))
    keys = ["folder", *sorted(overridden, key=lambda key: "." in key)]
    settings = [{key: run.setting(key) for key in keys} for run in runs]
    members: dict[tuple[str | None, ...], list[Run]] = {}
    for run, values in zip(runs, settings):
        members.setdefault(tuple(values.values()), []).append(run)
    telling: list[str] = []  # the settings that tell the groups apart
    for key in keys:
        told, more = (len({tuple(map(values.get, names)) for values in settings}) for names in (telling, [*telling, key]))
        if more > told:
            telling.append(key)
    names = [printable(_name(run, telling)) for run, *_ in members.values()]
    taken = [f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [Group(*group) for group in zip(taken, members.values())]


def _name(run: Run, telling: Sequence[str]) -> str:
    """What sets a run's group apart."""
    values = {key: value for key in telling if (value := run.setting(key)) is not None}
    short = {key: "" if key == "folder" or key in run.choices else f"{key.removeprefix('scheduler.')}=" for key in values}
    return ", ".join(short[key] + value for key, value in values.items()) or str(run.choices.get("scheduler", run.name))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _places(root: Path) -> list[Path]:
    """Folders with a run; what lies inside of one is its own."""
    places: list[Path] = []
    for folder, below, files in os.walk(root):
        path = Path(folder)
        config, job = path / ".hydra" / "config.yaml", path / ".hydra" / "hydra.yaml"
        planned = job.is_file() and re.search(rb"\n    name: plan\n", job.read_bytes())
        if (config.is_file() and not planned) or "metrics.csv" in files or any("events.out.tfevents" in file for file in files):
            places.append(path)
            below.clear()
        below[:] = sorted((name for name in below if not name.startswith(".")), key=_natural)
    return places


def printable(text: str) -> str:
    """A text for a page or a terminal: escaped where it has line breaks or other characters that cannot be printed."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _problems(folder: Path) -> list[str]:
    """What is wrong with files that a report can do without."""
    problems = []
    for read in (
        lambda: read_stages(folder / "plan.csv"),
        lambda: read_numbers(folder / BOUND, ["samples", "bound"]) if os.path.lexists(folder / BOUND) else None,
        lambda: read_critical_batches(folder, strict=True),
    ):
        try:
            read()
        except ValueError as error:
            problems.append(str(error))
    return problems


def _load(file: Path, kind: type[DictConfig] | type[ListConfig]) -> Any:
    """A file of ``.hydra``. Nothing in it is instantiated or called, and nothing is taken from the environment."""
    name = f".hydra/{file.name}"
    try:
        check_is_file(file)
        text = file.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("it is empty")
        # a few lines of aliases make as many values as there are atoms
        if re.search(r"(^|[\s\[{,:-])[*]\w", text) and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases, which Hydra does not write")
        config: Any = OmegaConf.load(io.StringIO(text))
        if "oc.env" in text:  # of the run, not of the report
            config = OmegaConf.create(_literal(OmegaConf.to_container(config)))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{name} cannot be read ({one_line(error)}); remove it, or bring it again") from error
    if not isinstance(config, kind):
        wanted = "list" if kind is ListConfig else "mapping"
        raise ValueError(f"{name} is no {wanted}, as Hydra writes it; remove it, or bring it again")
    return config


def _literal(node: Any) -> Any:
    """A configuration in which interpolations that ask for variables of the environment stand as they are written."""
    if isinstance(node, dict):
        return {name: _literal(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_literal(value) for value in node]
    return node.replace("${", "\\${") if isinstance(node, str) and "oc.env" in node else node


def _read(folder: Path, root: Path, name: str) -> Run:
    hydra = folder / ".hydra"
    try:
        stages = read_stages(folder / "plan.csv")
    except ValueError:  # see `_problems`
        stages = None
    log = read_log(folder, stages)
    if not os.path.lexists(hydra / "config.yaml"):
        seed = _SEED.search(name)
        return Run(folder, name, log, int(seed[1]) if seed else None, series_name=_without_number(folder, root))
    config = _load(hydra / "config.yaml", DictConfig)
    known, overrides = OmegaConf.create(), OmegaConf.create([])
    if os.path.lexists(hydra / "hydra.yaml"):
        known = _load(hydra / "hydra.yaml", DictConfig)
    if os.path.lexists(hydra / "overrides.yaml"):
        overrides = _load(hydra / "overrides.yaml", ListConfig)
    OmegaConf.update(config, "output_dir", str(folder), force_add=True)  # else only Hydra knows it
    if checkpoint := config.get("ckpt_path"):
        try:
            config.ckpt_path = str((Path(str(OmegaConf.select(known, "hydra.runtime.cwd") or ".")) / str(checkpoint)).resolve())
        except (OSError, ValueError) as error:
            raise ValueError(f".hydra/config.yaml: ckpt_path is no path ({one_line(error)}); correct it") from error
    choices: Any = OmegaConf.select(known, "hydra.runtime.choices") if known else {}
    if not isinstance(choices, Mapping):
        raise ValueError(".hydra/hydra.yaml has no hydra.runtime.choices, as Hydra writes it; remove it, or bring it again")
    seed_value = config.get("seed")
    planned = None if stages is None else float(stages["samples"].iloc[-1])
    return Run(
        folder,
        name,
        log,
        seed_value if isinstance(seed_value, int) and abs(seed_value) < 2**63 else None,
        {key.lstrip("+~"): value for key, _, value in (str(override).partition("=") for override in overrides)},
        {str(key): value for key, value in choices.items() if value is not None},
        config,
        planned,
        ended=(folder / FINISHED).is_file() or (planned is not None and float(log["samples"].max()) >= planned),
    )


def _without_number(folder: Path, root: Path) -> str:
    """The name of a run of others without a number of its seed or version."""
    path = "/".join([root.resolve().name, *folder.resolve().relative_to(root.resolve()).parts])
    path = re.sub(r"(/(version|run|seed|s)?[_=-]?\d+)+$", "", path)
    path = re.sub(r"[_=.-]+(version|run|seed|s)[_=-]?\d+$", "", path)
    return path.partition("/")[2] or path


def _join_resumed(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Put what a run logged before it was interrupted in front of what it logged when it went on from a checkpoint."""
    at = {run.folder.resolve(): run for run in runs}
    parents: dict[Path, Path | None] = {}
    for folder, run in at.items():
        if run.config and (checkpoint := run.config.get("ckpt_path")):
            above = Path(checkpoint).resolve().parents
            parents[folder] = next((place for place in above if place in at and place != folder), None)
    joined, notes = dict(at), []
    for folder, parent in parents.items():
        run, line = at[folder], [folder]
        if parent is None:
            first = f"{run.log['step'].min():,.0f}"
            notes.append(
                f"{run.name} was resumed from a checkpoint: its log begins at step {first}, what came before is not here."
            )
            continue
        while (before := parents.get(line[-1])) and before not in line:
            line.append(before)
        log = reduce(replace_from, [at[place].log for place in reversed(line)]).reset_index(drop=True)
        joined[folder] = replace(run, log=log)
        notes.append(f"{run.name} goes on from a checkpoint of {at[parent].name}; the two logs are joined.")
    superseded = {parent for parent in parents.values() if parent and not at[parent].ended}
    return [run for folder, run in joined.items() if folder not in superseded], notes
