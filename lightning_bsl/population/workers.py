"""Worker processes that train the passes of a grid, one thread each."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any

import torch

Train = Callable[[Any, Callable[[Any], Any]], Any]  # trains a pass; what it tells its second argument reaches the parent
_QUIET = "lightning.pytorch"  # the logger whose level workers take over
_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's <malloc.h>


def usable_cores() -> int:
    """The number of cores that this process may use; 1 in a daemonic process, which may start no others."""
    if multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_method() -> str:
    """How workers start: ``"fork"`` where it is safe, else ``"spawn"``.

    A fork costs milliseconds instead of an import of torch, and takes any function along. PyTorch's own loaders do the same: a
    child that computes with one thread never waits for OpenMP threads, which are not forked. Autograd has threads, and drivers
    have state, only for accelerators. macOS's own libraries do not survive a fork.
    """
    return "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"


class Workers:
    """Processes that train passes. Leaving the context ends them at once: they write nothing, so nothing can be left half done.

    Args:
        number: Of processes.
        train: Trains a pass.

    Raises:
        ValueError: Where processes cannot be forked: ``train`` cannot be pickled.
    """

    def __init__(self, number: int, train: Train) -> None:
        self._train = train
        self._processes: dict[Connection, BaseProcess] = {}
        self._busy: dict[Connection, Any] = {}  # the pass that a worker trains
        try:
            for _ in range(number):
                self._start()
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def run(self, take: Callable[[], Any], tell: Callable[[Any], Any], failed: Callable[[Any, BaseException], Any]) -> None:
        """Train passes until there are none left. Whichever worker is idle takes the next one.

        Args:
            take: Returns the next pass, or ``None`` if there is none now.
            tell: Called with what the workers tell.
            failed: Called with a pass and its error, which it raises unless it knows what to do.

        Raises:
            RuntimeError: A worker died.
        """
        while self._send(take):
            for connection in wait(list(self._busy)):
                assert isinstance(connection, Connection)
                try:
                    kind, content = connection.recv()
                except (EOFError, ConnectionError):
                    raise RuntimeError(self._died(connection)) from None
                if kind == "told":
                    tell(content)
                    continue
                task = self._busy.pop(connection)
                if content is not None:
                    error, text = content
                    error.__cause__ = RuntimeError(f"in a worker process:\n{text}")
                    failed(task, error)

    def _send(self, take: Callable[[], Any]) -> bool:
        """Give every idle worker a pass; returns whether any worker has one."""
        for connection in self._processes:
            if connection not in self._busy and (task := take()) is not None:
                with suppress(ConnectionError):  # it died: reading from it will say so
                    connection.send(task)
                self._busy[connection] = task
        return bool(self._busy)

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(start_method())
        ours, theirs = context.Pipe()
        arguments = (theirs, self._train, logging.getLogger(_QUIET).level, list(warnings.filters))
        process = context.Process(target=_work, args=arguments, daemon=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*multi-threaded, use of fork")  # see `start_method`
                process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"worker processes cannot be sent what makes the models and Trainers ({error}): write functions at the top of "
                "a module, no lambdas; or jobs=1"
            ) from error
        self._processes[ours] = process
        theirs.close()  # so that the end of the worker is the end of the pipe

    def _died(self, connection: Connection) -> str:
        process = self._processes[connection]
        process.join()
        return (
            f"a worker process ended with exit code {process.exitcode} while it trained {self._busy[connection]}. -9 mostly "
            "means that memory ran out: write a smaller `replicas_per_pass`, or `jobs`. Where processes are spawned, a script "
            'must start its work under `if __name__ == "__main__":`'
        )

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for the next tensors, where the C library is glibc.

    By default glibc returns large tensors to the system at once, and each new one is mapped page by page. That takes a third of
    the time of a step of some milliseconds.
    """
    with suppress(OSError, AttributeError):  # another C library
        for option, size in ((_MMAP, 1 << 30), (_TRIM, (1 << 31) - 1)):
            ctypes.CDLL(None).mallopt(option, size)


def _work(connection: Connection, train: Train, level: int, filters: list[Any]) -> None:
    """What a worker does: it trains the passes that it is sent, and tells how they ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends this one
    Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a progress bar may have replaced them, and its lock be taken
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger(_QUIET).setLevel(level)
    warnings.filters[:] = filters  # type: ignore[index]
    for task in _received(connection):
        error = None
        try:
            train(task, lambda content: connection.send(("told", content)))
        except BaseException as raised:
            error = _sendable(raised)
        connection.send(("ended", error))


def _received(connection: Connection) -> Iterator[Any]:
    with suppress(EOFError):
        while True:
            yield connection.recv()


def _end_with_parent() -> None:
    """End this process when its parent is killed: nobody would write down what it trains."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _sendable(error: BaseException) -> tuple[BaseException, str]:
    """An error as it can be sent, and its traceback, which cannot."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error, text
