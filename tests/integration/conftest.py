"""Scripts, run in the process of the tests."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).parents[2]


class Run(Protocol):
    def __call__(self, script: str, *overrides: str, folder: Path, fails: bool = False) -> str: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a script as ``python scripts/...`` would, in this process, which spares it the imports; returns all it prints."""
    monkeypatch.chdir(tmp_path)

    def run_script(script: str, *overrides: str, folder: Path, fails: bool = False) -> str:
        flags = [override for override in overrides if override.startswith("-")]
        folders = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
        rest = [override for override in overrides if not override.startswith("-")]
        monkeypatch.setattr(sys, "argv", [script, *flags, *folders, *rest])
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
            code: object = 0
        except SystemExit as end:  # Hydra's way to say that the job failed
            code = end.code
        out, err = capfd.readouterr()
        assert bool(code) == fails, out + err
        return out + err

    return run_script
