"""The script for a GPU runs without one, at a toy size: it is to work the day there is one."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.commands import run_script
from harness.files import ROOT

Row = dict[str, Any]
PARTS = ["amp", "oom", "compile", "transfer", "resume", "ddp", "images", "tokens", "population"]


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python puts the folder of a script on its path."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture
def check() -> Any:
    return importlib.import_module("gpu_check")


@pytest.fixture
def place(check: Any) -> Any:
    return check.Place(torch.device("cpu"), toy=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the script with the folder ``tmp_path``; returns what it prints."""

    def run_in(*arguments: object) -> str:
        assert run_script("gpu_check.py", "--output", tmp_path, *arguments, monkeypatch=monkeypatch) == 0
        return capfd.readouterr().out

    return run_in


def rows(folder: Path, part: str) -> list[Row]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines() if line.endswith("}")]
    (line,) = [line for line in lines if line["part"] == part]
    assert line["device"] == "CPU" and line["toy"] and line["torch"] == torch.__version__
    assert "error" not in line, line["error"]
    found: list[Row] = line["rows"]
    return found


def table(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| ")]


def test_goes_on_where_it_was(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("--device", "cpu", "--parts", "ddp")
    (row,) = rows(tmp_path, "ddp")
    assert row["equal weights"] and "gloo with 1 process" in row["ran"]
    assert table(printed) == [["part", "ran", "results"], ["ddp", row["ran"], "equal weights: yes"]]

    path = tmp_path / "results.jsonl"
    begun = path.read_text() + '{"part": "transfer", "place": "cpu", "toy": tr'  # as a kill may leave it
    path.write_text(begun)
    printed = run("--device", "cpu", "--parts", "transfer,ddp")
    assert "ddp: done before" in printed and "transfer: done, " in printed
    assert path.read_text().startswith(begun + "\n")
    none, one = rows(tmp_path, "transfer")
    assert none["not pinned"] > 0 and none["pinned"] == "skipped: needs CUDA" and one["not pinned, prefetch 2"] > 0
    assert [cells[0] for cells in table(printed)] == ["part", "transfer", "transfer", "ddp"]  # the order of the parts

    assert "ddp: done, " in run("--device", "cpu", "--parts", "ddp", "--again")
    assert [json.loads(line)["part"] for line in path.read_text().splitlines() if line.endswith("}")] == [
        "ddp",
        "transfer",
        "ddp",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_it_needs(run: Callable[..., str], tmp_path: Path) -> None:
    for _ in range(2):  # it is not done: the day there is a GPU it runs
        assert table(run("--parts", "oom,ddp")) == [
            ["part", "ran", "results"],
            ["oom", "", "skipped: needs CUDA"],
            ["ddp", "", "skipped: needs CUDA"],
        ]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["part"], line["rows"]) for line in lines] == 2 * [("oom", []), ("ddp", [])]


def hangs(place: Any) -> Iterator[Row]:
    yield {"ran": "first"}
    threading.Event().wait()


def fails(place: Any) -> Iterator[Row]:
    yield {"ran": "first"}
    raise RuntimeError("a | b\nand more")


def dies(place: Any) -> Iterator[Row]:
    yield {"ran": "first"}
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("part, budget, error", [
    (hangs, 0.5, "cut off after 0 s"),
    (fails, 60, "RuntimeError: a | b"),
    (dies, 60, "the process ended with exit code -9"),
])  # fmt: skip
def test_a_part_that_ends_badly(part: Any, budget: float, error: str, check: Any, place: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(check.PARTS, "amp", (part, 1))
    line = check.in_a_process("amp", place, budget)
    assert (line["rows"], line["error"]) == ([{"ran": "first"}], error)
    assert not check.is_done(line)
    assert table(check.markdown({"amp": line}))[1:] == [["amp", "first", ""], ["amp", "", error.replace("|", "/")]]


def test_a_part_that_fails_is_run_again(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["gpu_check.py", "--device", "cpu", "--parts", "amp", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setitem(check.PARTS, "amp", (fails, 60))
    assert check.main() == 1
    monkeypatch.setitem(check.PARTS, "amp", (lambda place: iter([{"ran": "all"}]), 60))
    assert check.main() == 0
    assert table(capfd.readouterr().out)[-1] == ["amp", "all", ""]


def test_takes_less_than_eight_minutes(check: Any) -> None:
    assert list(check.PARTS) == PARTS
    assert sum(budget for _, budget in check.PARTS.values()) < 8 * 60


def test_what_is_equal(check: Any) -> None:
    one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    assert check.same(one, other)
    assert other.running_var is not None
    other.running_var[1] += 1e-6  # a buffer counts, too
    assert not check.same(one, other)
    assert check.off([torch.tensor([3.0]), torch.tensor([0.0])], [torch.tensor([3.0]), torch.tensor([4.0])]) == 0.8


@pytest.mark.parametrize("arguments, message", [
    (("--parts", "amp,nccl"), "there is no part nccl: write some of amp,oom,"),
    (("--patience", 0), "0 must be 1 or more"),
    (("--device", "tpu"), "invalid choice: 'tpu'"),
])  # fmt: skip
def test_refusals(arguments: Any, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script("gpu_check.py", *arguments, monkeypatch=monkeypatch) == 2
    assert message in capfd.readouterr().err


@pytest.mark.slow
def test_every_part(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("--device", "cpu", "--patience", 6)
    assert list(dict.fromkeys(cells[0] for cells in table(printed)[1:])) == PARTS
    *compared, skipping = rows(tmp_path, "amp")
    for figure, most in (("first loss off by", 2**-8), ("first gradient off by", 0.3)):
        assert most > compared[0][figure] > compared[1][figure] > 0  # bf16 has three bits less than fp16
    assert all(row["plan kept"] and row["finite weights"] for row in compared)
    assert compared[1]["steps skipped"] == 0 and compared[1]["scale at the end"] == 1024
    assert 0 < skipping["steps skipped"] < 6 and skipping["plan kept"] and skipping["finite weights"]

    (row,) = rows(tmp_path, "oom")
    assert (row["errors of the allocator"], row["micro-batch found"], row["steps"]) == (3, 3, 2)  # 21, 11 and 6 failed
    assert row["weights off those of such micro-batches by"] < 1e-6

    (row,) = rows(tmp_path, "compile")
    assert 1 <= row["graphs compiled"] <= 2 and row["losses off by at most"] < 1e-5

    resumed = rows(tmp_path, "resume")
    assert all(row["two whole runs are equal"] and row["the resumed run equals them"] for row in resumed)
    assert [row["steps of theirs"] for row in resumed[:2]] == [6, 6] and 0 < resumed[2]["steps of theirs"] < 6
    assert [row["of the resumed run"] for row in resumed[:2]] == [3, 3]

    for part in ("images", "tokens"):
        for row in rows(tmp_path, part):
            assert row["ratio"] == pytest.approx(row["with us"] / row["bare loop"])
    assert all(row["grid"] > 0 and row["replicas of a bare step"] == 4 for row in rows(tmp_path, "population"))


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["snapshot.set_rng_state", "clock.RunClock.load_state_dict"])
def test_sees_a_resume_that_is_not_exact(forgotten: str, check: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"lightning_bsl.callbacks.{forgotten}", lambda *_: None)
    row = next(check.resume(place))
    assert row["two whole runs are equal"] and not row["the resumed run equals them"]
