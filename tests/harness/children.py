"""Forks of the test's process, which a test limits, signals and kills."""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import DictConfig, open_dict

from harness.configs import compose_config
from harness.files import ROOT, csv_rows
from lightning_bsl.app.train import train

TIMEOUT = 120.0  # seconds, which only what hangs takes


class Ended(NamedTuple):
    """How a child has ended.

    Args:
        code: Its exit code; minus the number of a signal that ended it.
        text: What it printed.
    """

    code: int
    text: str


class Child:
    """A fork of this process that does some work, in a process group of its own.

    Args:
        work: What it does. It exits with 0, with the code of a ``SystemExit``, or with 1 after another exception.
        folder: Where it works.
    """

    def __init__(self, work: Callable[[], object], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush(), sys.stderr.flush()  # or the child prints what is left there once more
        read, write = os.pipe()  # which no limit of files concerns
        self.pid = os.fork()
        if self.pid == 0:
            self._work(work, folder, write)
        os.close(write)
        with suppress(OSError):  # the child does it too: who comes first is not known
            os.setpgid(self.pid, self.pid)
        self.printed = bytearray()
        self._reader = Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()

    def _read(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as file:
            while part := file.read(1 << 16):
                self.printed += part

    def _work(self, work: Callable[[], object], folder: Path, output: int) -> None:
        code: object = 1
        try:
            os.setpgid(0, 0)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not what pytest has put
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def send(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def end(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for its end, and kill what is left of its group.

        Args:
            timeout: Seconds after which it counts as hanging.
        """
        deadline = time.monotonic() + timeout
        while (status := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                self.kill()
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it hangs:\n{self.text()[-3000:]}")
            time.sleep(0.01)
        self.kill()
        return Ended(os.waitstatus_to_exitcode(status[1]), self.text())

    def text(self) -> str:
        """What it has printed, once it has ended."""
        self._reader.join(5)  # a process outside of its group may live on
        return self.printed.decode()

    def kill(self) -> None:
        """Kill its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def script(name: str, *overrides: object, folder: Path, prepare: Callable[[], Any] = lambda: None) -> Child:
    """A child that runs ``python scripts/NAME OVERRIDES``, with a folder for its run.

    Args:
        name: The script.
        overrides: Its arguments.
        folder: The folder of the run.
        prepare: Called in the child before.
    """

    def work() -> None:
        prepare()
        sys.argv = [str(ROOT / "scripts" / name), f"hydra.run.dir={folder}", *map(str, overrides)]
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")

    return Child(work, folder.parent / f"{folder.name}-printed")


def before(owner: Any, name: str, action: Callable[[], Any], call: int = 1) -> None:
    """In a child: do something just before a function is called for the nth time; what it does stays as it is.

    Args:
        owner: Its class or module.
        name: Its name.
        action: What is done.
        call: Of which call.
    """
    original, calls = getattr(owner, name), [0]

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            action()
        return original(*arguments, **named)

    setattr(owner, name, wrapped)


def without_figures() -> None:
    """In a child: leave figures empty, since to draw them takes longer than a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_bsl.app.train.plot_run", lambda _, path, *__: Path(path).touch())
        patch.undo = lambda: None  # type: ignore[method-assign]


def limit_files(size: int) -> None:
    """In a child: let no file become larger; the system then refuses to write (EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def train_as(overrides: tuple[str, ...], folder: Path, prepare: Callable[[], Any] = without_figures) -> Child:
    """A child that does what ``bsl-train OVERRIDES`` does, from a configuration that was composed before, which saves a second.

    Args:
        overrides: Of the configuration.
        folder: The folder of the run.
        prepare: Called in the child before.
    """
    cfg = configured(overrides, folder)

    def work() -> None:
        prepare()
        train(cfg)

    return Child(work, folder.parent / f"{folder.name}-printed")


def configured(overrides: tuple[str, ...], folder: Path) -> DictConfig:
    """The configuration of a run in a folder."""
    cfg: DictConfig = compose_config(*overrides)
    with open_dict(cfg):
        del cfg["hydra"]  # a command does not see it
        cfg.output_dir = str(folder)
    return cfg


def train_here(overrides: tuple[str, ...], folder: Path) -> Path:
    """Train in this process; what that imports, its forks have. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_bsl.app.train.plot_run", lambda _, path, *__: Path(path).touch())
        train(configured(overrides, folder))
    return folder


SMALL = (
    "+model.net.width=4",
    "trainer.max_epochs=2",
    "data.samples_per_epoch=64",
    "trainer.log_every_n_steps=1",
    "~callbacks.training_time",
    "trainer.enable_progress_bar=false",
    "logger.csv._target_=lightning_bsl.app.saving.MetricsLogger",
)


def last(folder: Path) -> dict[str, Any]:
    """The weights in a run's last checkpoint."""
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def logged(folder: Path) -> list[dict[str, str]]:
    """What was logged of each step and each validation, but for means over an epoch, which are those of its last part."""
    return [row for row in csv_rows(folder / "metrics.csv") if not row["train/accuracy"]]


def same(folder: Path, whole: Path) -> None:
    """Refuse a run that has not trained and logged what another one has, bit for bit."""
    state = last(folder)
    assert all(torch.equal(value, state[name]) for name, value in last(whole).items())
    assert logged(folder) == logged(whole)
    assert (folder / "finished.json").read_text() == (whole / "finished.json").read_text()
