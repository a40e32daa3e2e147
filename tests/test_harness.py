"""The tests' own tools."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import _check, _is_one_of
from harness.files import ROOT
from harness.processes import Pair, RemoteError
from harness.tiers import diagonal

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def test_test_modules_do_not_import_each_other() -> None:
    assert len(TESTS) > 40
    names = {path.stem for path in TESTS} | {"tests"}
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert not {module.split(".")[0] for module in modules} & names, path


def test_module_names_are_unique() -> None:
    """`tests` is no package: pytest knows a module by its name alone."""
    assert len({path.name for path in TESTS}) == len(TESTS)


@pytest.mark.parametrize("rows, columns", [(2, 5), (5, 2), (3, 3), (1, 4)])
def test_a_diagonal_has_each_row_and_each_column(rows: int, columns: int) -> None:
    cases = diagonal(range(rows), range(columns))
    quick = [case.values for case in cases if not case.marks]
    assert [case.values for case in cases] == [(row, column) for row in range(rows) for column in range(columns)]
    assert len(quick) == max(rows, columns)
    assert ({row for row, _ in quick}, {column for _, column in quick}) == ({*range(rows)}, {*range(columns)})


def item(**values: Any) -> Any:
    marks = [pytest.mark.parametrize("a, b", [(1, "x"), pytest.param(2, "y")]), pytest.mark.parametrize("c", [[3], None])]
    return SimpleNamespace(
        nodeid="test", callspec=SimpleNamespace(params=values), iter_markers=lambda name: [mark.mark for mark in marks]
    )


def test_quick_cases() -> None:
    assert _is_one_of(item(a=1, b="x", c=[3]), {"a": [1, 2], "c": [[3]]})
    assert not _is_one_of(item(a=1, b="x", c=None), {"a": [1, 2], "c": [[3]]})
    _check(item(), {"a": [1, 2], "b": ["y"], "c": [None, [3]]})
    for wrong in ({"a": [3]}, {"b": ["z"]}, {"c": [3]}, {"d": [1]}):
        with pytest.raises(pytest.UsageError, match=r"quick\(.*\) is no case of the test"):
            _check(item(), wrong)


def rank() -> int:
    return int(os.environ["RANK"])


def fail_in(process: int) -> int:
    if rank() == process:
        raise ValueError("not here")
    return process


def end() -> None:
    os._exit(3)


@pytest.mark.slow
def test_the_pair_says_what_failed_and_starts_anew(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    try:
        assert pair(rank) == [0, 1]
        first = [process.pid for process in pair.processes]
        assert pair(rank) == [0, 1] and [process.pid for process in pair.processes] == first
        with pytest.raises(RemoteError, match=r"(?s)fail_in.*ValueError: not here"):
            pair(fail_in, 1)
        with pytest.raises(RemoteError, match="a process ended"):
            pair(end)
        assert pair(rank) == [0, 1] and [process.pid for process in pair.processes] != first
    finally:
        pair.stop()
    assert not pair.processes
