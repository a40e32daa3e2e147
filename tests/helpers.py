import csv
import runpy
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def flat(lists: Iterable[Iterable[T]]) -> list[T]:
    return list(chain.from_iterable(lists))


def quiet(**arguments: Any) -> dict[str, Any]:
    """Arguments of a Trainer that leaves no files and prints nothing, unless told."""
    silent = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    return dict.fromkeys(silent, False) | {"accelerator": "cpu", "num_sanity_val_steps": 0} | arguments


def csv_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run_script(script: Path, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run a script with arguments, in this process; returns what it exits with."""
    monkeypatch.setattr(sys, "argv", [script.name, *map(str, arguments)])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0
