"""A process of a run that is killed: the others end with an error, and the same command goes on."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import SMALL, Child, before, configured, same, train_as, train_here, without_figures
from lightning_utilities.core.rank_zero import rank_zero_only

from harness.commands import kill
from lightning_bsl.app.train import train
from lightning_bsl.models import Classifier

ENDS = 60.0  # seconds within which the others must have ended; a process that hangs would take half an hour or more


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(SMALL, tmp_path_factory.mktemp("whole"))


# --- a worker of the loader


def kill_worker() -> None:
    worker, *_ = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)


@pytest.mark.quick(name=["training_step"], call=[3])
@pytest.mark.parametrize(
    "name, call",
    [("training_step", 1), ("training_step", 3), ("training_step", 8), ("validation_step", 1), ("on_train_epoch_end", 1)],
)
def test_a_worker_of_the_loader(name: str, call: int, whole: Path, tmp_path: Path) -> None:
    def prepare() -> None:
        without_figures()
        before(Classifier, name, kill_worker, call)

    overrides = (*SMALL, "data.num_workers=1")
    cut = train_as(overrides, tmp_path / "run", prepare).end(ENDS)
    assert cut.code == 1 and re.search(
        r"DataLoader worker \(pid\(?s?\)? ?\d+\) (is killed by signal: Killed|exited)", cut.text
    ), cut.text
    again = train_as(overrides, tmp_path / "run").end()
    assert again.code == 0, again.text
    same(tmp_path / "run", whole)


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
            rank_zero_only.rank = rank
            without_figures()
            prepares[rank]()
            train(cfg)

        return run

    return [Child(work(rank), folder.parent / f"printed-{rank}") for rank in range(2)]


@pytest.mark.quick(rank=[1], name=["training_step"])
@pytest.mark.parametrize("name", ["training_step", "validation_step", "on_before_optimizer_step", "on_save_checkpoint"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two(rank: int, name: str, tmp_path: Path) -> None:
    def dies() -> None:
        before(Classifier, name, kill, 2)

    nothing: Callable[[], None] = lambda: None  # noqa: E731
    children = two(SMALL, tmp_path / "run", [dies, nothing] if rank == 0 else [nothing, dies])
    began = time.monotonic()
    killed, other = children[rank].end(), children[1 - rank].end(ENDS)
    assert killed.code == -signal.SIGKILL
    assert other.code == 1 and time.monotonic() - began < ENDS, other.text
    again = [child.end() for child in two(SMALL, tmp_path / "run", [nothing, nothing])]
    assert [ended.code for ended in again] == [0, 0], again
    assert (tmp_path / "run" / "finished.json").exists()
