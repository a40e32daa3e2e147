"""The command lines: in this process, which spares the imports, or as a user types them."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from harness.files import ROOT


class Printed(NamedTuple):
    """What a command printed."""

    out: str
    err: str

    @property
    def both(self) -> str:
        """What stands on the terminal."""
        return self.out + self.err


class Run(Protocol):
    """Runs ``python scripts/SCRIPT OVERRIDES`` in this process."""

    def __call__(self, script: str, *overrides: str, folder: Path, fails: bool = False) -> Printed: ...


def run_script(script: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run a script with arguments, in this process; returns what it exits with."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / script), *map(str, arguments)])
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    try:
        with warnings.catch_warnings():
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    except SystemExit as end:  # Hydra's way to say that the job failed, and argparse's
        return end.code
    finally:
        logger.setLevel(level)
    return 0


def kill() -> None:
    """End this process at once, as a lack of memory or an operator does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_killed(script: str, *arguments: object, prepare: Callable[[], None], folder: Path) -> None:
    """Run a script in a fork of this process, which kills itself: ``prepare`` lets it call `kill` somewhere."""
    output = folder / "output.txt"
    sys.stdout.flush()  # or the child prints what is left there once more
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException), output.open("w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            os.chdir(folder)
            prepare()
            sys.argv = [str(ROOT / "scripts" / script), *map(str, arguments)]
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, output.read_text()[-3000:]


def run_python(*arguments: object, folder: Path, timeout: float = 300, stdin: str = "") -> str:
    """Run Python in a process of its own, in ``folder``; returns what it prints. It must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
