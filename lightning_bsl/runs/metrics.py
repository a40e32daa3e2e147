"""The metrics that a run has logged."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_bsl.schedules.files import written_whole

Row = dict[str, float]


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a ``metrics.csv``, each with the columns it has a number for.

    Rows from before an interruption, which ``keep_metrics`` has put aside, come first.

    Args:
        path: The file that Lightning's ``CSVLogger`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
    """
    return [{name: float(value) for name, value in row.items() if value} for row in read_table(path).to_dict("records")]


def read_table(path: str | Path) -> Any:
    """The same rows as a table of text, in which ``nan`` stays apart from a value that is missing."""
    path, aside = Path(path), _aside(Path(path))
    if not aside.exists():
        return _read(path)
    rows = _read(path) if path.exists() else pd.DataFrame()
    if rows.empty:
        return _read(aside)
    before = _read(aside)
    for file, part in ((aside, before), (path, rows)):
        if "step" not in part:
            raise ValueError(f"{file.name} is no table of metrics (it has no column `step`); remove it, or bring it again")
    # what was logged after the checkpoint is logged again; a step has several rows, each with columns of its own
    table = pd.concat([before, rows], keys=["before", "after"]).fillna("")
    after, step = table.index.get_level_values(0) == "after", table["step"].astype(int)
    start, columns = step[after].min(), (table != "").apply(tuple, axis=1)
    again = columns.isin(columns[after & (step == start)])
    return table[after | (step < start) | ((step == start) & ~again)]


def keep_metrics(path: Path) -> None:
    """Put a run's ``metrics.csv``, if it is there, aside before the run is resumed: ``CSVLogger`` begins its file anew."""
    if path.exists():
        _write(read_table(path), _aside(path))
        path.unlink()


def merge_metrics(path: Path) -> None:
    """Join a run's ``metrics.csv`` to what it logged before its interruptions, once it is finished."""
    if _aside(path).exists():
        _write(read_table(path), path)
        _aside(path).unlink()


def curve(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """A metric against samples, from the rows that have both."""
    points = [(row["samples"], row[name]) for row in rows if name in row and "samples" in row]
    return [x for x, _ in points], [y for _, y in points]


def validated(rows: list[Row]) -> str:
    """The metric that says how good the model is, besides its loss: the perplexity where there is one, else the accuracy."""
    return "val/perplexity" if any("val/perplexity" in row for row in rows) else "val/accuracy"


def _aside(path: Path) -> Path:
    return path.with_name("metrics.before.csv")


def _read(path: Path) -> Any:
    check_is_file(path)
    try:
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]  # half of "12" would be another step
        table = pd.read_csv(io.BytesIO(whole), dtype=str, keep_default_na=False, index_col=False).fillna("")
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except ValueError as error:  # pandas' own errors are such
        raise ValueError(f"{path.name} is no table of metrics ({one_line(error)}); remove it, or bring it again") from error
    if "step" not in table:
        return table
    table = table[table["step"].str.fullmatch("[0-9]+")]
    if (long := table["step"].str.len() > 15).any():
        raise ValueError(f"{path.name} has a step of {table['step'][long].iloc[0]}; correct it, or remove its row")
    return table


def read_numbers(path: Path, columns: Sequence[str]) -> Any:
    """Some columns of a table of finite numbers.

    Args:
        path: The file.
        columns: What is read.

    Raises:
        ValueError: The file is not such a table; the message names it, and says what to do.
    """
    try:
        check_is_file(path)
        table = pd.read_csv(path, index_col=False)[list(columns)].astype(float)
    except KeyError as error:
        raise ValueError(f"{path.name} cannot be read ({one_line(error)}); remove it, or bring it again") from error
    except (OSError, ValueError) as error:
        if str(error).startswith(path.name):
            raise
        raise ValueError(f"{path.name} cannot be read ({one_line(error)}); remove it, or bring it again") from error
    if table.empty or not np.isfinite(table.to_numpy()).all():
        what = "no rows" if table.empty else "values that are not finite"
        raise ValueError(f"{path.name} has {what}; remove it, or bring it again")
    return table


def check_is_file(path: Path) -> None:
    """Refuse what is there and no file: a pipe would be waited for.

    Raises:
        ValueError: It is a folder, a pipe or a link that leads nowhere.
    """
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(f"{path.name} is no file, but a folder, a pipe or a link that leads nowhere; remove it")


def one_line(error: BaseException) -> str:
    """What an error says, for a message: in one line, and not too much."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _write(table: Any, path: Path) -> None:
    with written_whole(path) as unfinished:
        table.to_csv(unfinished, index=False, lineterminator="\r\n")  # as CSVLogger writes it
