"""A process of a run that is killed: the others end with an error, and the same command goes on."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from harness.children import SMALL, Child, before, configured, same, train_as, without_figures
from harness.commands import kill
from harness.files import ROOT
from lightning_bsl.app.train import train
from lightning_bsl.models import Classifier

ENDS = 60.0  # seconds within which the others must have ended; a process that hangs would take half an hour or more


# --- a worker of the loader


def kill_worker() -> None:
    worker, *_ = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)


@pytest.mark.quick(name=["training_step"], call=[3])
@pytest.mark.parametrize(
    "name, call",
    [("training_step", 1), ("training_step", 3), ("training_step", 8), ("validation_step", 1), ("on_train_epoch_end", 1)],
)
def test_a_worker_of_the_loader(name: str, call: int, whole_run: Path, tmp_path: Path) -> None:
    def prepare() -> None:
        without_figures()
        before(Classifier, name, kill_worker, call)

    cut = train_as((*SMALL, "data.num_workers=1"), tmp_path / "run", prepare).end(ENDS)
    # the loader notices, or the pipe on which a batch was coming
    said = (
        r"DataLoader worker \(pid\(?s?\)? ?\d+\) (is killed by signal: Killed|exited)|Connection(Reset|Refused)Error|EOFError"
    )
    assert cut.code == 1 and re.search(said, cut.text), cut.text
    again = train_as(SMALL, tmp_path / "run").end()  # with workers or without: it is the same run
    assert again.code == 0, again.text
    same(tmp_path / "run", whole_run)


# --- one of two processes


def two(overrides: tuple[str, ...], folder: Path, prepares: list[Callable[[], Any]]) -> list[Child]:
    """Two children that train together, as processes that a launcher has started."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    cfg = configured((*overrides, "trainer=ddp_cpu"), folder)

    def work(rank: int) -> Callable[[], None]:
        def run() -> None:
            os.environ |= shared | {"LOCAL_RANK": str(rank), "RANK": str(rank)}
            rank_zero_only.rank = rank  # type: ignore[attr-defined]
            without_figures()
            prepares[rank]()
            train(cfg)

        return run

    return [Child(work(rank), folder.parent / f"printed-{rank}") for rank in range(2)]


@pytest.mark.quick(rank=[1], name=["training_step"], goes_on=[False])
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("name", ["training_step", "validation_step", "on_before_optimizer_step", "on_save_checkpoint"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two(rank: int, name: str, goes_on: bool, tmp_path: Path) -> None:
    def dies() -> None:
        before(Classifier, name, kill, 2)

    nothing: Callable[[], None] = lambda: None  # noqa: E731
    children = two(SMALL, tmp_path / "run", [dies, nothing] if rank == 0 else [nothing, dies])
    began = time.monotonic()
    killed, other = children[rank].end(), children[1 - rank].end(ENDS)
    assert killed.code == -signal.SIGKILL
    assert other.code == 1 and time.monotonic() - began < ENDS, other.text
    if goes_on:
        again = [child.end() for child in two(SMALL, tmp_path / "run", [nothing, nothing])]
        assert [ended.code for ended in again] == [0, 0], again
        assert (tmp_path / "run" / "finished.json").exists()


# --- as Lightning's launcher starts them


def child_of(pid: int) -> int | None:
    """The process that the launcher has started."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            if "train.py" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    return None


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def wait_for(what: Callable[[], Any], timeout: float = 120) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.02)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes are found in /proc")
@pytest.mark.parametrize("when", ["starting", "training"])
@pytest.mark.parametrize("rank", [0, 1])
def test_of_the_launcher(rank: int, when: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # one that starts alone waits as long as the timeout says; the start itself takes long on a busy machine
    timeout = ("trainer.strategy.timeout.minutes=1",) if (rank, when) == (0, "starting") else ()
    long = ("trainer=ddp_cpu", *timeout, "scheduler=constant", "+model.net.width=4", "trainer.max_epochs=3000")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"hydra.run.dir={folder}", *long]
    with open(tmp_path / "output.txt", "w") as output:
        launcher = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
    try:
        child = wait_for(lambda: child_of(launcher.pid))
        if when == "training":
            wait_for(lambda: (folder / "checkpoints" / "last.ckpt").exists())
        os.kill((launcher.pid, child)[rank], signal.SIGKILL)
        if rank == 1:
            assert launcher.wait(2 * ENDS) != 0
        else:
            launcher.wait()
            wait_for(lambda: has_ended(child), 4 * ENDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
