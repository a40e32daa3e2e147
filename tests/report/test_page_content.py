"""What the page that compares runs says, and that nothing in a run's name becomes a part of the page."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from harness.files import csv_rows
from harness.runs import sweep, write_run
from lightning_bsl.report import write_report
from lightning_bsl.report.markup import NONE
from lightning_bsl.runs import Target, default_baseline, find_runs, group_runs

SCRIPT = "<script>alert(1)<"


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are empty files: what is tested here is the text, and to draw them takes most of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).touch())


def page_of(folder: Path, *targets: Target) -> str:
    found = find_runs([folder])
    groups = group_runs(found.runs)
    return write_report(found, groups, default_baseline(groups), folder / "report", targets)[0].read_text()


def rows_of(page: str, title: str) -> list[list[str]]:
    table = page.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>")[2:]]
    return [[unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in row] for row in rows]


def test_names_are_escaped(tmp_path: Path) -> None:
    write_run(tmp_path / SCRIPT, [f"scheduler={SCRIPT}", "seed=0"])
    write_run(tmp_path / f"other{SCRIPT}", ours=False)  # its group has the name of its folder
    write_run(tmp_path / "2", ["optimizer.lr=0.5", "seed=0", "ckpt_path=gone.ckpt"], epochs=6)  # noted, and unfinished
    (write_run(tmp_path / f"empty{SCRIPT}", ["seed=1"]) / "metrics.csv").unlink()
    write_run(tmp_path / f"again{SCRIPT}", [f"ckpt_path={tmp_path}/{SCRIPT}/last.ckpt", "seed=1"])
    page = page_of(tmp_path)
    assert SCRIPT not in page and page.count("<script>") == 1
    assert page.count("&lt;script&gt;alert(1)&lt;") >= 8
    assert any(row[0].startswith(SCRIPT) for row in rows_of(page, "Groups"))


def test_what_was_reached_in_passing_is_on_the_page_and_in_the_file(tmp_path: Path) -> None:
    for seed, norms in enumerate(([0.5, 3, 2, 0.9], [4, 0.5, 2, 2], [4, 3, 2, 2])):
        write_run(tmp_path / str(seed), ["scheduler=constant", f"seed={seed}"], norms)
    page = page_of(tmp_path, Target("full_gradient_norm", 1.0, False), Target("val/accuracy", 0.9, True))
    reached, missing = rows_of(page, "To the targets")
    assert reached[1:5] == ["full_gradient_norm ≤ 1", "1 of 3 1 in passing", "40", "1"]
    assert missing[2:5] == ["not logged", NONE, NONE]
    for sentence in ("there in passing only, and has not reached it", "Geometric means", "from which on no point is worse"):
        assert sentence in " ".join(page.split()), sentence
    lines = [row for row in csv_rows(tmp_path / "report" / "report.csv") if row["what"] == "to_target"]
    assert {(row["runs"], row["of"], row["in_passing"]) for row in lines[:4]} == {("1", "3", "1")}
    assert list(lines[0])[-1] == "in_passing"


def test_the_tables_and_the_file_have_the_same_numbers(tmp_path: Path) -> None:
    page = page_of(sweep(tmp_path))
    lines = {
        (row["what"], row["group"], row["metric"], row["axis"]): row for row in csv_rows(tmp_path / "report" / "report.csv")
    }
    for group, target, reached, steps, to, samples, *_ in rows_of(page, "To the targets"):
        metric = target.split()[0]
        assert reached == "3 of 3"
        for cell, what, axis in ((steps, "to_target", "steps"), (samples, "to_target", "samples"), (to, "ratio", "steps")):
            name = "ratio_to_constant_decaying" if what == "ratio" else what
            if cell == "1":
                continue
            value, low, high = (float(number) for number in re.findall(r"[\d.]+", cell.replace(",", "")))
            line = lines[name, group, metric, axis]
            for shown, exact in ((value, line["value"]), (low, line["low"]), (high, line["high"])):
                assert abs(shown / float(exact) - 1) < 1e-3
    assert [row[:2] for row in rows_of(page, "Runs")] == [[row[0], str(i)] for i, row in enumerate(rows_of(page, "Runs"))]
