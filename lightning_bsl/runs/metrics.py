"""The metrics that a run has logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

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
    # what was logged after the checkpoint is logged again; a step has several rows, each with columns of its own
    table = pd.concat([_read(aside), rows], keys=["before", "after"]).fillna("")
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
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False).fillna("")
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    return table[table["step"].str.isdigit()] if "step" in table else table  # an interruption may cut the last row short


def _write(table: Any, path: Path) -> None:
    table.to_csv(path.with_suffix(".tmp"), index=False, lineterminator="\r\n")  # as CSVLogger writes it
    path.with_suffix(".tmp").replace(path)
