"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from harness.commands import Printed, Run, run_script
from harness.processes import Pair

if TYPE_CHECKING:
    from harness.clock import Clock

# The models are tiny: a second thread would cost more than it gives, and a fork of a process with OpenMP's threads hangs at its
# first parallel loop. Read where NumPy, SciPy and torch are imported; inherited by all processes that the tests start.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

# Half a million objects are made by imports and never die: for the collector to walk them takes 0.4 s each time.
gc.disable()

FIRST = ("tests/schedules/", "tests/theory/")  # a broken formula is seen in seconds

hypothesis.settings.register_profile("default tier", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("slow tier", deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis draws the same cases each time, but in the slow tier."""
    slow = config.option.markexpr == "slow"
    hypothesis.settings.load_profile("slow tier" if slow else "default tier")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the two processes shares them; the cases that are not quick are slow; formulas come first."""
    checked: set[object] = set()
    for item in items:
        if "pair" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("processes"))
        if quick := [mark.kwargs for mark in item.iter_markers("quick")]:
            if (function := getattr(item, "function", None)) not in checked:
                checked.add(function)
                for cases in quick:
                    _check(item, cases)
            if not any(_is_one_of(item, cases) for cases in quick):
                item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


@pytest.fixture(autouse=True)
def no_log_handlers_left() -> Iterator[None]:
    """Take away what Hydra adds to the root logger in this process: the terminal of its test is closed later."""
    before = set(logging.root.handlers)
    yield
    logging.root.handlers[:] = [handler for handler in logging.root.handlers if handler in before]


def pytest_collection_finish() -> None:
    """Everything is imported: from here on the collector looks at what tests make."""
    gc.freeze()
    gc.enable()


def _is_one_of(item: pytest.Item, cases: dict[str, list[object]]) -> bool:
    """Whether each parameter that ``cases`` names has one of the values given there."""
    values = item.callspec.params  # type: ignore[attr-defined]
    return all(values[name] in given for name, given in cases.items())


def _check(item: pytest.Item, quick: dict[str, list[object]]) -> None:
    """Refuse a quick case that there is not: it would leave a test to the slow tier without a word."""
    there: dict[str, list[object]] = {}
    for mark in item.iter_markers("parametrize"):
        names, rows = mark.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        for row in rows:
            values = row.values if hasattr(row, "marks") else [row] if len(names) == 1 else row
            for name, value in zip(names, values, strict=True):
                there.setdefault(name, []).append(value)
    for name, values in quick.items():
        for value in values:
            if value not in there.get(name, ()):
                raise pytest.UsageError(f"{item.nodeid}: quick({name}=[{value!r}]) is no case of the test")


@pytest.fixture(autouse=True, scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the folder or in the caches of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield


@pytest.fixture(autouse=True)
def unseeded() -> Iterator[None]:
    """What `seed_everything` leaves in the environment, which later loaders read, is undone after each test."""
    before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes over gloo."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run of `bsl-train` that was never interrupted."""
    from harness.children import SMALL, train_here

    return train_here(SMALL, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of our callbacks and of Lightning's, in the hands of the test."""
    from harness.clock import Clock

    return Clock(monkeypatch, "lightning_bsl.callbacks.training_time", "lightning.pytorch.callbacks.timer")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a Hydra command as ``python scripts/...`` would, in this process; returns what it prints.

    Its figures are empty files: to draw them takes longer than such a run, and tests/report does it.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("app.train.plot_run", "app.plan.plot_plan", "app.plan.plot_comparison"):
        monkeypatch.setattr(f"lightning_bsl.{name}", lambda _, path, *__: Path(path).touch())

    def run_in(script: str, *overrides: str, folder: Path, fails: bool = False) -> Printed:
        flags = [override for override in overrides if override.startswith("-")]
        folders = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
        rest = [override for override in overrides if not override.startswith("-")]
        code = run_script(script, *flags, *folders, *rest, monkeypatch=monkeypatch)
        sys.stdout.flush()
        printed = Printed(*capfd.readouterr())
        assert bool(code) == fails, printed.both
        return printed

    return run_in
