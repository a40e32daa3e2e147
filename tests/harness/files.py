"""Files that runs write."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist


def flat(lists: Iterable[Iterable[T]]) -> list[T]:
    """Join lists."""
    return list(chain.from_iterable(lists))


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, as text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def logged(folder: Path, name: str) -> dict[int, float]:
    """The last value of a metric at each step of ``metrics.csv``."""
    return {int(row["step"]): float(row[name]) for row in csv_rows(folder / "metrics.csv") if row.get(name)}
