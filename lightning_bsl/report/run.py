"""The metrics that a run has logged."""

from __future__ import annotations

import csv
from pathlib import Path

Row = dict[str, float]


def read_metrics(path: str | Path) -> list[Row]:
    """The rows of a ``metrics.csv``, each with the columns it has a number for.

    Args:
        path: The file that Lightning's ``CSVLogger`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
    """
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


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
