"""The commands, and how a user has called the one that runs."""

from __future__ import annotations

import sys
from pathlib import Path

COMMANDS = {
    "bsl-train": "train a model while its batch size and learning rate grow",
    "bsl-plan": "show what a run would do, before it does it",
    "bsl-report": "compare runs: a page, figures and a CSV file",
    "bsl-search": "let Optuna choose a growing schedule",
    "bsl-branch": "estimate how large the batch may be at a checkpoint of a run",
    "bsl-surge-grid": "train a grid of batch sizes, learning rates and seeds",
    "bsl-surge-report": "find the best learning rates of a grid: a page, figures and CSV files",
}


def command(name: str) -> str:
    """How the user would call a command, in the way in which this one was called.

    Args:
        name: Such as ``"bsl-train"``; one of `COMMANDS`.

    Returns:
        The name, or, where a script of a clone runs, ``python scripts/train.py``.

    Raises:
        ValueError: There is no such command.
    """
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    script = name.removeprefix("bsl-").replace("-", "_") + ".py"
    called = Path(sys.argv[0])
    if called.suffix == ".py" and (called.parent / script).is_file():
        return f"python {called.parent / script}"
    return name


def overview() -> str:
    """The list of commands that ``python -m lightning_bsl`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["commands of lightning_bsl (each says more with --help):", *lines])
