"""Finished and unfinished runs under folders, and the groups of those that differ in their seed only."""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from lightning_bsl.runs.folder import FINISHED
from lightning_bsl.runs.metrics import Row, read_metrics

AXES = {"epochs": "epochs", "steps": "optimizer steps", "samples": "samples", "tokens": "tokens", "seconds": "seconds"}
METRICS = {
    "full_gradient_norm": "full gradient norm",
    "train/loss": "training loss",
    "val/loss": "validation loss",
    "val/accuracy": "validation accuracy",
    "val/perplexity": "validation perplexity",
}
_CLOCKS = ("samples", "tokens", "seconds")  # columns that only grow
# overrides that change what is written or where data lie, but not what is trained
_OUTPUT_ONLY = re.compile(
    r"(seed|ckpt_path|output_dir|logger|checkpoint|training_time|trainer\.(enable_\w+|default_root_dir|logger|log_every_n_steps)"
    r"|data\.(root|download|num_workers))(\..*)?"
)
_NUMBERED = re.compile(r"^(version|run|seed|s)?[_=-]?\d+$")
_SEED = re.compile(r"(?:^|[_=.-])(?:seed|s)[_=-]?(\d+)$")


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        folder: Where its log lies.
        name: The folder, as seen from the folder that was searched.
        rows: What was logged, each row with its place on every axis that is known (`AXES`).
        seed: Its seed, if that is known.
        overrides: What was overridden on its command line, and to what.
        choices: What was chosen from each group of ``conf/``.
        config: Its configuration; ``None`` for the logs of others.
        planned: The samples it was to train, if that is known.
        ended: Whether its fit has ended.
        by_epoch: Whether its training metrics are those of whole epochs, not of every logged step.
        series_name: The folder without a number of its seed or version, for the logs of others.
    """

    folder: Path
    name: str
    rows: list[Row]
    seed: int | None = None
    overrides: dict[str, str] | None = None
    choices: dict[str, Any] | None = None
    config: DictConfig | None = None
    planned: float | None = None
    ended: bool = True
    by_epoch: bool = True
    series_name: str | None = None

    @property
    def metrics(self) -> set[str]:
        """What it logged."""
        return {name for row in self.rows for name in row}

    def reached(self, axis: str) -> float:
        """How far it came on an axis; nan where the axis is not logged."""
        return max((row[axis] for row in self.rows if axis in row), default=float("nan"))

    @property
    def progress(self) -> str:
        """How far it came, in words."""
        samples = self.reached("samples")
        if self.planned and samples < self.planned:
            how = "stopped" if self.ended else "unfinished"
            return f"{how} at {samples:,.0f} of {self.planned:,.0f} samples ({samples / self.planned:.0%})"
        if self.ended:
            return "finished" if self.planned else "ended"
        epochs = OmegaConf.select(self.config, "trainer.max_epochs") if self.config is not None else None
        whole = f" of {epochs}" if isinstance(epochs, int) and epochs > 0 else ""
        return f"unfinished at {self.reached('epochs'):.3g}{whole} epochs, {samples:,.0f} samples"

    def series(self, metric: str) -> list[Row]:
        """The rows that have a metric: of training metrics the means of whole epochs where there are enough of them."""
        rows = [row for row in self.rows if metric in row and "samples" in row]
        if metric in ("batch_size", "lr"):
            return [row for row in rows if "stage" not in row]  # the row of an advance says what comes next
        if not (self.by_epoch and metric.startswith("train/")):
            return rows
        last = {row.get("epoch"): row for row in rows}
        if not self.ended:
            last.pop(self.rows[-1].get("epoch"), None)  # not known to be over
        return list(last.values())

    def curve(self, metric: str, axis: str = "samples") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """A metric against an axis, where both are finite."""
        points = [(row[axis], row[metric]) for row in self.series(metric) if axis in row]
        x, y = np.array(points, dtype=float).reshape(-1, 2).T
        finite = np.isfinite(x) & np.isfinite(y)
        return x[finite], y[finite]

    def setting(self, key: str) -> str | None:
        """The value of something that some run overrides, in this one."""
        if self.config is None:
            return self.series_name if key == "folder" else None
        if key in (self.choices or {}):
            return str((self.choices or {})[key])
        try:
            value = OmegaConf.select(self.config, key)
            return None if value is None else str(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
        except OmegaConfBaseException:  # what only Hydra can resolve
            return (self.overrides or {}).get(key)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Args:
        name: What sets it apart from the others.
        runs: Its runs.
    """

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
    def constant_batch(self) -> bool:
        """Whether its batch size never changes, as far as runs that have ended tell."""
        return (
            self.counted[0].ended and len({row["batch_size"] for run in self.counted for row in run.series("batch_size")}) == 1
        )


@dataclass(frozen=True)
class Found:
    """What lies under the folders that were searched.

    Args:
        runs: The runs with a log.
        without: Of the others, the folder and what is missing.
        notes: What else a reader must know.
    """

    runs: list[Run]
    without: list[tuple[str, str]]
    notes: list[str]


def find_runs(folders: Sequence[str | Path], progress: bool = True) -> Found:
    """Read the runs under some folders, however deep.

    A run is a folder that ``scripts/train.py`` wrote (``.hydra/config.yaml``), or one with a ``metrics.csv`` of Lightning's
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
    runs: list[Run] = []
    without: list[tuple[str, str]] = []
    for place, root in tqdm(places.values(), "reading", unit="run", leave=False, disable=None if progress else True):
        name = place.name if place == root else str(place.relative_to(root))
        try:
            runs.append(_read(place, root, name or str(place)))
        except (OSError, ValueError, TypeError, csv.Error) as error:
            without.append((name, str(error)))
    if not places:
        raise FileNotFoundError(
            f"no run under {', '.join(map(str, folders))}: a run is a folder with .hydra/config.yaml and metrics.csv "
            "(scripts/train.py), a metrics.csv of Lightning's CSVLogger, or TensorBoard's event files"
        )
    if not runs:
        listed = "; ".join(f"{name}: {reason}" for name, reason in without[:10])
        raise FileNotFoundError(f"no run with a log under {', '.join(map(str, folders))} ({listed})")
    runs, notes = _join_resumed(runs)
    by_epoch = max(len({row.get("epoch") for row in run.rows}) for run in runs) >= 3
    return Found([replace(run, by_epoch=by_epoch) for run in runs], without, notes)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs that differ in their seed only together, in the order of the first of each.

    Settings are looked at only if some run overrides them, so that it does not matter whether a default is written out.

    Args:
        runs: The runs.
    """
    overridden = dict.fromkeys(key for run in runs for key in run.overrides or {} if not _OUTPUT_ONLY.fullmatch(key))
    keys = ["folder", *sorted(overridden, key=lambda key: "." in key)]
    groups: dict[tuple[str | None, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.setting(key) for key in keys), []).append(run)
    told: list[int] = []  # the settings that tell the groups apart
    for at in range(len(keys)):
        if len({tuple(values[i] for i in (*told, at)) for values in groups}) > len(
            {tuple(values[i] for i in told) for values in groups}
        ):
            told.append(at)
    names: list[str] = []
    for values, members in groups.items():
        choices = members[0].choices or {}
        parts = [_part(keys[i], value, choices) for i in told if (value := values[i]) is not None]
        names.append(", ".join(parts) or str(choices.get("scheduler", members[0].name)))
    taken = [f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return [Group(name, members) for name, members in zip(taken, groups.values())]


def _part(key: str, value: str, choices: dict[str, Any]) -> str:
    return value if key == "folder" or key in choices else f"{key.removeprefix('scheduler.')}={value}"


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _places(root: Path) -> list[Path]:
    """Folders with a run; what lies inside of one is its own."""
    found: list[Path] = []
    for folder, below, files in os.walk(root):
        path = Path(folder)
        job = path / ".hydra" / "hydra.yaml"
        ours = (path / ".hydra" / "config.yaml").is_file() and not (
            job.is_file() and re.search(r"\n    name: plan\n", job.read_text())
        )
        if ours or "metrics.csv" in files or any("events.out.tfevents" in file for file in files):
            found.append(path)
            below.clear()
        below[:] = sorted((each for each in below if not each.startswith(".")), key=_natural)
    return found


def _read(folder: Path, root: Path, name: str) -> Run:
    rows = _log(folder)
    if not any("samples" in row for row in rows):
        raise ValueError("`samples` is not logged, the axis on which schedules are compared")
    hydra = folder / ".hydra"
    if not (hydra / "config.yaml").is_file():
        epochs = _epochs([(row["samples"], row["epoch"]) for row in rows if {"samples", "epoch"} <= row.keys()], None)
        seed = _SEED.search(str(Path(name)))
        rows = _on_axes(rows, epochs)
        return Run(folder, name, rows, int(seed[1]) if seed else None, series_name=_without_number(folder, root))
    config = OmegaConf.load(hydra / "config.yaml")
    assert isinstance(config, DictConfig)
    OmegaConf.update(config, "output_dir", str(folder), force_add=True)  # else only Hydra knows it
    overrides = [str(each) for each in OmegaConf.load(hydra / "overrides.yaml")] if (hydra / "overrides.yaml").is_file() else []
    known = OmegaConf.load(hydra / "hydra.yaml") if (hydra / "hydra.yaml").is_file() else OmegaConf.create({})
    choices: dict[str, Any] = dict(OmegaConf.select(known, "hydra.runtime.choices") or {})
    if config.get("ckpt_path"):
        config.ckpt_path = str(Path(OmegaConf.select(known, "hydra.runtime.cwd") or ".") / config.ckpt_path)
    stages = _stages(folder / "plan.csv")
    planned = stages[-1][0] if stages else None
    epochs = _epochs([(row["samples"], row["epoch"]) for row in rows if {"samples", "epoch"} <= row.keys()], stages)
    rows = _on_axes(rows, epochs)
    samples = max(row["samples"] for row in rows if "samples" in row)
    return Run(
        folder,
        name,
        rows,
        config.get("seed"),
        {key.lstrip("+~"): value for key, _, value in (each.partition("=") for each in overrides)},
        {key: value for key, value in choices.items() if value is not None},
        config,
        planned,
        (planned is not None and samples >= planned) or (folder / FINISHED).is_file(),
    )


def _log(folder: Path) -> list[Row]:
    file = folder / "metrics.csv"
    if file.is_file():
        if rows := [row for row in read_metrics(file) if "step" in row]:
            return rows
        raise ValueError("metrics.csv is empty")
    events = sorted(path.parent for path in folder.rglob("*events.out.tfevents*"))
    if events:
        return _read_events(events[0])
    raise FileNotFoundError("no metrics.csv")


def _read_events(folder: Path) -> list[Row]:
    """The scalars of TensorBoard's event files: of each step the first values in one row, the second in another, ..."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise OSError("TensorBoard's event files need tensorboard: pip install 'lightning_bsl[tensorboard]'") from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    rows: dict[tuple[int, int], Row] = {}
    begin: float | None = None
    for tag in events.Tags()["scalars"]:
        seen: dict[int, int] = {}
        for event in events.Scalars(tag):
            begin = event.wall_time if begin is None else min(begin, event.wall_time)
            seen[event.step] = seen.get(event.step, -1) + 1
            row = rows.setdefault((event.step, seen[event.step]), {"step": event.step, "wall_time": event.wall_time})
            row[tag] = event.value
    for row in rows.values():
        row.setdefault("seconds", row.pop("wall_time") - (begin or 0))
    return [rows[key] for key in sorted(rows)]


def _stages(file: Path) -> list[tuple[float, float]]:
    """Samples and epochs at the end of each stage of a plan."""
    try:
        rows = read_metrics(file)
        samples, epochs = ([row[name] for row in rows] for name in ("samples", "epochs"))
        return list(zip(itertools.accumulate(samples), itertools.accumulate(epochs)))
    except (OSError, ValueError, KeyError):
        return []


def _epochs(seen: list[tuple[float, float]], stages: list[tuple[float, float]] | None) -> list[tuple[float, float]]:
    """Samples and completed epochs, points to interpolate between: of the plan, or of the epochs that are over."""
    if stages:
        return stages
    ends: dict[float, float] = {}
    for samples, epoch in seen:
        ends[epoch] = max(samples, ends.get(epoch, 0))
    points = [(samples, epoch + 1) for epoch, samples in sorted(ends.items())]
    if len(points) > 2 and points[-1][0] > points[-2][0]:  # the last one may be under way: as fast as the one before
        (x0, y0), (x1, y1), (x2, _) = points[-3:]
        points[-1] = (x2, min(y1 + (y1 - y0) * (x2 - x1) / (x1 - x0), points[-1][1])) if x1 > x0 else points[-1]
    elif len(points) == 2:
        (x1, y1), (x2, y2) = points
        points[-1] = (x2, min(y1 * x2 / x1, y2))
    return points


def _on_axes(rows: list[Row], epochs: list[tuple[float, float]]) -> list[Row]:
    """Every row on every axis. What was written without a clock lies between the steps at which the clock was."""
    rows = sorted((dict(row) for row in rows), key=lambda row: row["step"])
    for name in _CLOCKS:
        known = {row["step"]: row[name] for row in rows if name in row}
        if not known:
            continue
        steps, values = [-1.0, *known], [0.0, *known.values()]
        for row in rows:
            if name not in row and row["step"] <= steps[-1]:
                row[name] = float(np.interp(row["step"], steps, values))
    for row in rows:
        row["steps"] = row["step"] + 1
        if "samples" in row and epochs:
            row["epochs"] = float(np.interp(row["samples"], [0, *(x for x, _ in epochs)], [0, *(y for _, y in epochs)]))
    return rows


def _without_number(folder: Path, root: Path) -> str:
    """The name of somebody's run without a number of its seed or version."""
    parts = [root.resolve().name, *folder.resolve().relative_to(root.resolve()).parts]
    while len(parts) > 1 and _NUMBERED.match(parts[-1]):
        parts.pop()
    parts[-1] = re.sub(r"[_=.-]+(version|run|seed|s)[_=-]?\d+$", "", parts[-1])
    return "/".join(parts[1:] or parts)


def _join_resumed(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Put what a run logged before it was interrupted in front of what it logged when it went on from a checkpoint."""
    by_folder = {run.folder.resolve(): run for run in runs}
    joined: dict[Path, Run] = {}
    superseded: set[Path] = set()
    notes: list[str] = []

    def whole(folder: Path, seen: frozenset[Path] = frozenset()) -> Run:
        run = joined.get(folder) or by_folder[folder]
        checkpoint = run.config.get("ckpt_path") if run.config is not None else None
        if folder in joined or not checkpoint or folder in seen:
            return run
        parent = next((each for each in Path(checkpoint).resolve().parents if each in by_folder), None)
        first = run.rows[0]["step"]
        if parent is not None and parent != folder:
            before = whole(parent, seen | {folder})
            run = replace(run, rows=[row for row in before.rows if row["step"] < first] + run.rows)
            run = replace(run, rows=_on_axes(run.rows, []))
            if not before.ended:
                superseded.add(parent)
            notes.append(f"{run.name} goes on from a checkpoint of {before.name}; the two logs are joined.")
        else:
            notes.append(
                f"{run.name} was resumed from a checkpoint: its log begins at step {first:,.0f}, what came before is not here."
            )
        joined[folder] = run
        return run

    results = {folder: whole(folder) for folder in by_folder}
    return [run for folder, run in results.items() if folder not in superseded], notes
