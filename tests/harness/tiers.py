"""Which cases of a cross product run by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def diagonal(rows: Sequence[Any], columns: Sequence[Any]) -> list[Any]:
    """All pairs as parameters; by default run as few as it takes to have each row and each column, the others are slow."""
    quick = {(i % len(rows), i % len(columns)) for i in range(max(len(rows), len(columns)))}
    return [
        pytest.param(row, column, marks=() if (i, j) in quick else pytest.mark.slow)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]
