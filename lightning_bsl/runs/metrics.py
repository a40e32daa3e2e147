"""The metrics that a run has logged."""

from __future__ import annotations

import csv
from pathlib import Path

Row = dict[str, float]


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a ``metrics.csv``, each with the columns it has a number for.

    Those of before an interruption, which [`keep_metrics`][] has put aside, come first.

    Args:
        path: The file that Lightning's ``CSVLogger`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
    """
    return [{name: float(value) for name, value in row.items() if value} for row in _rows(Path(path))]


def keep_metrics(path: Path) -> None:
    """Put a run's metrics aside before it is resumed: ``CSVLogger`` begins its file anew.

    Args:
        path: The ``metrics.csv``, which need not exist.
    """
    if path.exists():
        _write(_rows(path), _aside(path))
        path.unlink()


def merge_metrics(path: Path) -> None:
    """Join a run's metrics to those of before its interruptions, once it is finished.

    Args:
        path: The ``metrics.csv``.
    """
    if _aside(path).exists():
        _write(_rows(path) if path.exists() else _read(_aside(path)), path)
        _aside(path).unlink()


def _aside(path: Path) -> Path:
    return path.with_name("metrics.before.csv")


def _rows(path: Path) -> list[dict[str, str]]:
    rows = _read(path)
    if not _aside(path).exists():
        return rows
    # what was logged after the checkpoint is logged again; a step has several rows, each with columns of its own
    start = min((int(row["step"]) for row in rows), default=None)
    again = {_columns(row) for row in rows if int(row["step"]) == start}
    before = [
        row
        for row in _read(_aside(path))
        if start is None or int(row["step"]) < start or (int(row["step"]) == start and _columns(row) not in again)
    ]
    return before + rows


def _columns(row: dict[str, str]) -> frozenset[str]:
    return frozenset(name for name, value in row.items() if value)


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        # an interruption may have cut the last row short
        return [row for row in csv.DictReader(file) if "step" not in row or (row["step"] or "").isdigit()]


def _write(rows: list[dict[str, str]], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}), restval="")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def curve(rows: list[Row], name: str, against: str = "samples") -> tuple[list[float], list[float]]:
    """One metric against another, from the rows that have both."""
    points = [(row[against], row[name]) for row in rows if name in row and against in row]
    return [x for x, _ in points], [y for _, y in points]


def validated(rows: list[Row]) -> str:
    """What says how good the model is, besides its loss: the perplexity where there is one, else the accuracy."""
    return "val/perplexity" if any("val/perplexity" in row for row in rows) else "val/accuracy"


def epoch_ends(rows: list[Row]) -> list[Row]:
    """Of the rows of each epoch the last one: that of its end."""
    last = {row["epoch"]: row for row in rows if "train/loss" in row}
    return list(last.values())
