"""One process at a time trains in a folder."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from harness.commands import Run
from lightning_bsl.runs.folder import claimed


def claims_in_another_process(folder: Path) -> bool:
    child = os.fork()
    if child == 0:
        try:
            with claimed(folder):
                os._exit(0)
        except ValueError:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def test_a_folder_is_claimed_until_the_process_has_left_it(tmp_path: Path) -> None:
    with claimed(tmp_path):
        assert not claims_in_another_process(tmp_path)
    assert claims_in_another_process(tmp_path)


def test_a_killed_run_leaves_no_claim_though_its_workers_live_on(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with claimed(tmp_path):
            if os.fork() == 0:  # a worker that waits for its next task
                os.write(write, str(os.getpid()).encode())
                signal.pause()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(write)
    worker = int(os.read(read, 20))
    try:
        with claimed(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_run_in_a_claimed_folder_is_refused_before_it_writes(run: Run, tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with claimed(tmp_path / "run"):
            os.write(write, b"claimed")
            signal.pause()
    os.read(read, 7)
    try:
        printed = run("train.py", "trainer.max_epochs=1", folder=tmp_path / "run", fails=True).both
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert "another process trains in this folder" in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".hydra", "train.log"}
    assert not (tmp_path / "run" / ".hydra" / "run.yaml").exists()


def test_where_files_cannot_be_locked_a_run_goes_on_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("lightning_bsl.runs.folder.fcntl.lockf", lockf)
    with pytest.warns(UserWarning, match="cannot be claimed .*No locks available"), claimed(tmp_path):
        pass
