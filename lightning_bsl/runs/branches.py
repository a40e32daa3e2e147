"""What `bsl-branch` leaves in a run's folder: the losses of branches, and the critical batch sizes by them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_bsl.runs.folder import changes
from lightning_bsl.runs.metrics import check_is_file, one_line
from lightning_bsl.schedules.files import written_whole

BRANCHES = "branches.csv"  # a line for each measured loss
CRITICAL = "critical_batches.csv"  # a line for each checkpoint
SETTINGS = "branches.yaml"  # what the losses depend on, besides what stands in their lines
_TYPES = {
    "checkpoint": str,
    "start": int,
    "batch_size": int,
    "lr": float,
    "factor": int,
    "seed": int,
    "samples": int,
    "loss": float,
}
_CRITICAL_COLUMNS = ("samples", "batch_size", "critical", "low", "high", "at_least")


def read_branches(folder: Path) -> Any:
    """The losses of the branches that are finished.

    Args:
        folder: Where `write_branches` wrote; no line if there is no such file yet.

    Returns:
        A table with the columns ``checkpoint`` (its file, as seen from the run's folder), ``start`` (samples of the run before
        it), ``batch_size`` and ``lr`` (of factor 1), ``factor``, ``seed``, ``samples`` (of the branch) and ``loss``.

    Raises:
        ValueError: The file is not such a table.
    """
    path = folder / BRANCHES
    if not path.exists():
        return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in _TYPES.items()})
    try:
        return pd.read_csv(path, float_precision="round_trip")[list(_TYPES)].astype(_TYPES)
    except (ValueError, KeyError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path} is no table of branches ({error}); move it away, or choose another output_dir=DIR") from error


def write_branches(folder: Path, table: Any) -> None:
    """Write the losses of all finished branches. A process that is killed while it writes leaves the file as it was."""
    _replace(folder / BRANCHES, table)


def keep_settings(folder: Path, settings: str) -> None:
    """Note the settings of the branches in a folder, or check that they are the same.

    Args:
        folder: Where the branches go.
        settings: What their losses depend on, as YAML.

    Raises:
        ValueError: The folder has branches of other settings.
    """
    kept = folder / SETTINGS
    if (folder / BRANCHES).exists() and kept.exists() and kept.read_text() != settings:
        raise ValueError(
            f"{folder} holds branches of other settings ({changes(kept.read_text(), settings)}); choose another "
            f"output_dir=DIR, or delete {BRANCHES} there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(kept) as path:
        path.write_text(settings)


def write_critical_batches(folder: Path, table: Any) -> None:
    """Write the critical batch sizes, for reports."""
    _replace(folder / CRITICAL, table)


def read_critical_batches(folder: Path, strict: bool = False) -> Any:
    """The critical batch sizes of a run, in the order of its samples; ``None`` where the folder has none that can be read.

    Args:
        folder: Of the run.
        strict: Whether to raise an error where there is a file that cannot be read.

    Raises:
        ValueError: There is such a file, and ``strict``; the message names it.

    Returns:
        A table with the columns ``samples`` (of the run), ``batch_size`` (of the run there), ``critical``, ``low``, ``high``
        and ``at_least`` (whether the critical batch size is ``critical`` or more), all in examples but the last.
    """
    file = folder / CRITICAL
    try:
        check_is_file(file)
        table = pd.read_csv(file, index_col=False)[list(_CRITICAL_COLUMNS)].sort_values("samples")
        table = table.astype(dict.fromkeys(_CRITICAL_COLUMNS[:-1], float) | {"at_least": bool})
        if table.empty or not (table[["samples", "batch_size", "critical"]].abs() < math.inf).all(axis=None):
            raise ValueError("no rows, or values that are not finite")
        return table
    except (OSError, ValueError, KeyError) as error:
        if strict and os.path.lexists(file):
            raise ValueError(f"{CRITICAL} cannot be read ({one_line(error)}); remove it, or run bsl-branch again") from error
        return None


def _replace(path: Path, table: Any) -> None:
    with written_whole(path) as unfinished:
        table.to_csv(unfinished, index=False, na_rep="nan")
