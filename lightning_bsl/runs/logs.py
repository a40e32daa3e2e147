"""The log of a run, from a ``metrics.csv`` or TensorBoard's event files, with each value on every axis."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_bsl.runs.metrics import check_is_file, one_line, read_numbers, read_table

AXES = {"epochs": "epochs", "steps": "optimizer steps", "samples": "samples", "tokens": "tokens", "seconds": "seconds"}
_CLOCKS = ["samples", "tokens", "seconds"]  # columns that only grow


def read_log(folder: Path, stages: Any = None) -> Any:
    """What a run has logged, a row for each value.

    What was logged again after the run was rolled back to an earlier point replaces everything from there on, of all metrics:
    the model that the first values were measured on is gone.

    Args:
        folder: The run's folder.
        stages: The ends of the stages of its plan, as of `read_stages`, if it has one.

    Returns:
        A table with the columns ``metric``, ``value``, ``step``, ``epoch``, ``stage`` and `AXES`, in the order of the steps. A
        place that is not known is nan; a nan that was logged stays a row.

    Raises:
        OSError: There is no log, or tensorboard is not installed.
        ValueError: The log is empty, or has no ``samples``.
    """
    file, events = folder / "metrics.csv", sorted(folder.rglob("*events.out.tfevents*"))
    if not file.is_file() and not events:
        check_is_file(file)
        raise FileNotFoundError("no metrics.csv")
    values = _csv_values(file) if file.is_file() else _event_values(events)
    if "samples" not in set(values["metric"]):
        where = file.name if file.is_file() else events[0].name
        raise ValueError(f"`samples` is not logged in {where}: it is the axis on which schedules are compared")
    clocks = values[values["metric"].isin([*_CLOCKS, "epoch", "stage"])].pivot(index="row", columns="metric", values="value")
    rows = values.drop_duplicates("row").set_index("row")[["part", "step", "time"]]
    rows = rows.join(clocks.reindex(columns=[*_CLOCKS, "epoch", "stage"]))
    if rows["seconds"].isna().all():
        rows["seconds"] = rows["time"] - rows["time"].min()
    # of a single file, samples that go back say where the run was rolled back
    part = (rows["samples"].ffill().diff() < 0).cumsum() if file.is_file() else rows["part"]
    rows = reduce(replace_from, [rows for _, rows in rows.drop(columns=["part", "time"]).groupby(part)])
    return _on_axes(rows, stages).join(values.set_index("row")[["metric", "value"]]).reset_index(drop=True)


def replace_from(before: Any, after: Any) -> Any:
    """Two parts of a log as one: from where the later part begins, it replaces the earlier one.

    A later part without samples has trained nothing, and replaces nothing.
    """
    unknown = before["samples"].isna() & after["samples"].notna().any()
    again = (before["samples"] >= after["samples"].min()) | (unknown & (before["step"] >= after["step"].min()))
    return pd.concat([before[~again], after])


def read_stages(file: Path) -> Any:
    """Samples and epochs at the end of each stage of a ``plan.csv``; ``None`` without one.

    Raises:
        ValueError: It is not such a table.
    """
    return read_numbers(file, ["samples", "epochs"]).cumsum() if os.path.lexists(file) else None


def _csv_values(file: Path) -> Any:
    table = read_table(file)
    if table.empty or "step" not in table:
        raise ValueError("metrics.csv is empty, or has no column `step`")
    names, rows = [name for name in table if name != "step"], len(table)
    columns = {
        "row": np.tile(np.arange(rows), len(names)),
        "step": np.tile(table["step"], len(names)),
        "metric": np.repeat(np.array(names, object), rows),
        "value": table[names].to_numpy(object).T.ravel(),
    }
    values = pd.DataFrame(columns)
    try:
        values = values[values["value"] != ""].astype({"step": float, "value": float})
    except ValueError as error:
        wrong = one_line(error).partition(": Error")[0]
        raise ValueError(f"metrics.csv has a value that is no number ({wrong}); correct it, or take out its column") from error
    return values.sort_values("row", kind="stable").assign(part=0, time=np.nan)


def _event_values(files: Sequence[Path]) -> Any:
    """The scalars of TensorBoard's event files: of each step the first values in one row, the second in another, ..."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise OSError("TensorBoard's event files need tensorboard: pip install 'lightning_bsl[tensorboard]'") from error
    parts = []
    files = [file for file in files if file.parent == files[0].parent]
    for file in files:
        check_is_file(file)
        try:
            events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
            tags = {tag: pd.DataFrame(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
        except Exception as error:  # what is read is of any form
            raise ValueError(f"{file.name} cannot be read ({one_line(error)}); remove it, or bring it again") from error
        if tags:
            parts.append(pd.concat(tags, names=["metric"]).reset_index("metric").rename(columns={"wall_time": "time"}))
    if not parts:
        raise ValueError(f"TensorBoard's event files are empty: {', '.join(file.name for file in files)}")
    parts.sort(key=lambda part: part["time"].min())
    values = pd.concat(parts, keys=range(len(parts)), names=["part"]).reset_index("part")
    values["nth"] = values.groupby(["part", "metric", "step"]).cumcount()
    values["row"] = values.groupby(["part", "step", "nth"]).ngroup()
    return values.sort_values("row", kind="stable")


def _on_axes(rows: Any, stages: Any) -> Any:
    """Every row on every axis. What was written without a clock lies between the steps at which the clock was."""
    ends = _epoch_ends(rows) if stages is None else stages
    rows = rows.sort_values("step", kind="stable")
    for name in _CLOCKS:
        known = rows.groupby("step")[name].last().dropna()
        if len(known):
            clock = np.interp(rows["step"], [-1, *known.index], [0, *known], right=np.nan)
            rows[name] = rows[name].fillna(pd.Series(clock, rows.index))
    epochs = np.interp(rows["samples"], [0, *ends["samples"]], [0, *ends["epochs"]]) if len(ends) else np.nan
    return rows.assign(steps=rows["step"] + 1, epochs=epochs)


def _epoch_ends(rows: Any) -> Any:
    """Samples and epochs at the end of each epoch that is over, and of the last one, which may be under way."""
    ends = rows.dropna(subset=["epoch", "samples"]).groupby("epoch")["samples"].max().cummax()
    ends = pd.DataFrame({"samples": [0.0, *ends], "epochs": [0.0, *(ends.index + 1)]})
    if len(ends) > 2:  # the last one is as fast as the one before
        (x0, y0), (x1, y1), (x2, y2) = ends.tail(3).to_numpy()
        if x2 > x1 > x0:
            ends.loc[ends.index[-1], "epochs"] = min(y1 + (y1 - y0) * (x2 - x1) / (x1 - x0), y2)
    return ends.iloc[1:]
