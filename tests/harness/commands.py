"""The command lines: in this process, which spares the imports, or as a user types them."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
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
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    except SystemExit as end:  # Hydra's way to say that the job failed, and argparse's
        return end.code
    return 0


def run_killed(script: str, *arguments: object, by: str, folder: Path) -> None:
    """Run a script in a process of its own, which kills itself: ``by`` is code that lets it call ``kill()`` somewhere."""
    code = f"""
import os, runpy, signal, sys

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

{dedent(by)}
sys.argv = {[script, *map(str, arguments)]!r}
runpy.run_path({str(ROOT / "scripts" / script)!r}, run_name="__main__")
"""
    done = _run(folder, 300, "-c", code)
    assert done.returncode == -signal.SIGKILL, done.stdout[-3000:] + done.stderr[-3000:]


def run_python(*arguments: object, folder: Path, timeout: float = 300) -> str:
    """Run Python in a process of its own, in ``folder``; returns what it prints. It must succeed."""
    done = _run(folder, timeout, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def _run(folder: Path, timeout: float, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
