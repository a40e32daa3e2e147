"""Ctrl-C and SIGTERM, one after the other, at a run whose step does not end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.children import SMALL, Child, before, same, train_as, without_figures
from lightning_bsl.models import Classifier

ONE, TWO = signal.SIGINT, signal.SIGTERM

pytestmark = pytest.mark.slow  # real processes that wait for each other


class Waiting:
    """A run whose third step waits: it tells of each signal that came, and goes on when it is told to."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        context: Any = get_context("fork")
        self.came, self.go_on = context.Semaphore(0), context.Event()

        def wait() -> None:
            for number in (ONE, TWO):
                signal.signal(number, self.telling(signal.getsignal(number)))
            self.came.release()
            self.go_on.wait()

        def prepare() -> None:
            without_figures()
            before(Classifier, "training_step", wait, 3)

        self.child: Child = train_as((*SMALL, *overrides), folder, prepare)
        self.next()

    def telling(self, handler: Any) -> Any:
        """A handler, which tells that it has been called."""

        def handle(number: int, frame: Any) -> None:
            try:
                handler(number, frame)
            finally:
                self.came.release()

        return handle

    def next(self) -> None:
        """Wait until it is in its step, or has got one more signal."""
        assert self.came.acquire(timeout=20), self.child.text()

    def send(self, *numbers: int, group: bool = False) -> None:
        for number in numbers:
            os.killpg(self.child.pid, number) if group else self.child.send(number)
            self.next()


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Waiting]:
    run = Waiting(tmp_path / "run")
    yield run
    run.child.kill()


@pytest.mark.quick(numbers=[[ONE, ONE], [TWO, ONE]])
@pytest.mark.parametrize("numbers", [[ONE, ONE], [TWO, ONE], [TWO, TWO, ONE], [ONE, TWO, ONE]])
def test_ctrl_c_after_another_signal_ends_at_once(numbers: list[int], waiting: Waiting, tmp_path: Path) -> None:
    waiting.send(*numbers)
    ended = waiting.child.end(30)  # though the step would wait for ever
    assert ended.code == 1 and "saved; the same command goes on" not in ended.text
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.quick(numbers=[[ONE, TWO]])
@pytest.mark.parametrize("numbers, code", [([ONE], 1), ([TWO], 143), ([TWO, TWO], 143), ([ONE, TWO], 143)])
def test_the_others_end_with_the_step(numbers: list[int], code: int, waiting: Waiting, whole_run: Path, tmp_path: Path) -> None:
    waiting.send(*numbers)
    waiting.go_on.set()
    ended = waiting.child.end()
    assert ended.code == code and "last.ckpt: saved; the same command goes on from here" in ended.text
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert train_as(SMALL, tmp_path / "run").end().code == 0
    same(tmp_path / "run", whole_run)


@pytest.mark.slow
def test_ctrl_c_twice_on_a_terminal_reaches_the_workers_too(tmp_path: Path) -> None:
    run = Waiting(tmp_path / "run", "data.num_workers=2")
    try:
        run.send(ONE, ONE, group=True)
        ended = run.child.end(30)
    finally:
        run.child.kill()
    assert ended.code == 1, ended.text
