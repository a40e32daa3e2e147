"""Two real processes over gloo, which live as long as the session and run the functions that tests send them.

A function is sent by name, so it stands at the top of a module; its arguments and what it returns are pickled. It runs in both
processes at once. An exception in either, or a process that hangs, ends both: the next call starts new ones.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 120  # seconds for one call; only a process that hangs takes as long


class RemoteError(AssertionError):
    """A function failed, or did not end, in one of the processes."""


class Pair:
    """Two processes, each with a rank; called with a function and its arguments, returns what both return.

    Args:
        folder: Where the processes write what they print.
    """

    def __init__(self, folder: Path) -> None:
        self.logs = [folder / f"{rank}.log" for rank in range(2)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        if not self.processes:
            self._start()
        request = pickle.dumps((function, arguments, options))
        try:
            for connection in self.connections:
                connection.send_bytes(request)
            answers = [self._answer(connection) for connection in self.connections]
        except BaseException as error:
            self.stop()
            if not isinstance(error, (RemoteError, OSError)):
                raise
            logs = [f"--- process {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(self.logs)]
            raise RemoteError("\n".join([str(error), *logs])) from None
        return answers

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        code = f"import gc, sys; gc.disable(); sys.path[:] = {sys.path!r}; from harness.processes import serve; serve()"
        for rank, log in enumerate(self.logs):
            ours, theirs = multiprocessing.Pipe()
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}  # Lightning starts no processes then
            with log.open("w") as output:
                process = subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-c", code, str(theirs.fileno())],
                    **{"stdout": output, "stderr": output, "stdin": subprocess.DEVNULL, "pass_fds": [theirs.fileno()]},
                    **{"env": os.environ | shared | own, "start_new_session": True},
                )
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def _answer(self, connection: Connection) -> Any:
        if not connection.poll(2 * TIMEOUT):  # before that, a process that hangs ends and says where
            raise RemoteError("a process hangs")
        try:
            returned, answer = connection.recv()
        except EOFError:
            raise RemoteError("a process ended") from None
        if not returned:
            raise RemoteError(answer)
        return answer

    def stop(self) -> None:
        """End the processes, and the workers of their loaders."""
        for process in self.processes:
            with suppress(OSError):  # it has ended already
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []


def serve() -> None:
    """Answer requests until there are no more: the life of a process."""
    import torch

    torch.set_num_threads(1)
    # processes with gloo must not be forked: now and then a worker of a loader would hang
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["torch"])
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
        try:
            function, arguments, options = pickle.loads(request)
            if not gc.isenabled():  # what is imported by now never dies
                gc.freeze()
                gc.enable()
            answer = True, function(*arguments, **options)
        except BaseException:
            answer = False, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)
