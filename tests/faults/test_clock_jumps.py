"""A clock that is set back or forward while a run trains: no duration is negative, and nothing is out of order."""

from __future__ import annotations

import itertools
import os
import re
import time
from pathlib import Path

import pytest

from harness.children import SMALL, before, logged, train_as, train_here, without_figures
from harness.commands import kill
from harness.files import ROOT, csv_rows
from lightning_bsl.app.surge_grid import time_left
from lightning_bsl.models import Classifier

OPTIONS = tuple(option for option in SMALL if option != "~callbacks.training_time")


def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the clock is hours before or behind the one before; the clock that cannot be set goes on."""
    hours, clock = itertools.cycle([0, -30, 5, -2, 48]), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))


def seconds(folder: Path) -> list[float]:
    return [float(row["seconds"]) for row in csv_rows(folder / "metrics.csv") if row["seconds"]]


def without_seconds(folder: Path) -> list[dict[str, str]]:
    """As `logged`, but for the times, which `SMALL` has not."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in logged(folder)]


def test_a_run(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    jumping(monkeypatch)
    train_here(OPTIONS, tmp_path / "run")
    taken = seconds(tmp_path / "run")
    assert len(taken) > 12 and taken == sorted(taken) and taken[0] >= 0 and taken[-1] <= time.monotonic() - began
    assert without_seconds(tmp_path / "run") == logged(whole_run)


@pytest.mark.slow
def test_a_run_that_goes_on_before_it_began(whole_run: Path, tmp_path: Path) -> None:
    """The newest file is then not the last one that was written."""

    def prepare() -> None:
        without_figures()
        before(Classifier, "training_step", kill, 11)

    folder, options = tmp_path / "run", (*OPTIONS, "+callbacks.model_checkpoint.save_top_k=-1")
    assert train_as(options, folder, prepare).end().code == -9
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
    for age, path in enumerate(checkpoints):
        os.utime(path, (time.time() + 7200 * age,) * 2)
    os.utime(folder / "metrics.csv", (0, 0))
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"")  # so that the times decide
    assert train_as(options, folder).end().code == 0
    assert without_seconds(folder) == logged(whole_run)
    taken = seconds(folder)
    assert taken == sorted(taken) and taken[0] >= 0


def test_time_left_is_never_negative() -> None:
    left = time_left(iter([100.0, 100.0, 160.0]).__next__)
    assert [left(10, 100), left(20, 100), left(40, 100)] == ["", "about 0 s left", "about 2 min left"]


def test_no_duration_is_measured_with_a_clock_that_can_be_set() -> None:
    for path in (ROOT / "lightning_bsl").rglob("*.py"):
        called = re.search(r"\btime\.time(_ns)?\(|\bdatetime\.(now|utcnow)\(|from time import", path.read_text())
        assert not called, f"{path}: {called}"
