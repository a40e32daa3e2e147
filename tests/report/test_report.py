"""Tables and figures from plans and metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from harness.runs import FIRST_EPOCH, SECOND_EPOCH, write_metrics
from lightning_bsl.report import (
    bound_line,
    compare_table,
    plan_table,
    plot_comparison,
    plot_plan,
    plot_run,
    run_table,
    theory_table,
)
from lightning_bsl.runs import read_metrics
from lightning_bsl.schedules import Cosine, Diminishing, Exponential, JointSchedule, plan
from lightning_bsl.theory import BoundConstants, gradient_norm_bounds

GROWING = JointSchedule(Exponential(8, factor=2, every=1), Exponential(0.1, factor=1.25, every=1))


def lines(table: Table) -> list[list[str]]:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line]


def test_a_language_model_has_a_perplexity(tmp_path: Path) -> None:
    text = (FIRST_EPOCH + SECOND_EPOCH).replace("val/accuracy", "val/perplexity")
    rows = read_metrics(write_metrics(tmp_path / "metrics.csv", text))
    table = run_table(plan(GROWING, 100, epochs=2), rows)
    assert [column.header for column in table.columns][-2:] == ["train loss", "val ppl"]
    assert [row[-1] for row in lines(table)] == ["0.5000", "0.7500"]
    plot_run(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_plan_table() -> None:
    assert lines(plan_table(plan(GROWING, 100, epochs=2))) == [
        ["0", "0", "1", "13", "100", "8", "0.1"],
        ["1", "1", "1", "7", "100", "16", "0.125"],
        ["all", "", "2", "20", "200", "", ""],
    ]


def test_many_stages_share_rows() -> None:
    cosine = plan(JointSchedule(Exponential(8, factor=2, every=20), Cosine(0.1)), 100, epochs=40)
    assert len(cosine.stages) == 40
    rows = lines(plan_table(cosine))
    assert [row[2:6] for row in rows] == [["20", "260", "2,000", "8"], ["20", "140", "2,000", "16"], ["40", "400", "4,000", ""]]
    assert rows[0][6].startswith("0.1 .. ")


@pytest.mark.parametrize("text, stages", [(FIRST_EPOCH + SECOND_EPOCH, 2), (FIRST_EPOCH, 1)])
def test_run_table_has_the_finished_stages(text: str, stages: int, tmp_path: Path) -> None:
    rows = lines(run_table(plan(GROWING, 100, epochs=2), read_metrics(write_metrics(tmp_path / "metrics.csv", text))))
    assert (
        rows
        == [
            ["0", "1", "13", "100", "8", "0.1", "1.4000", "0.5000"],
            ["1", "1", "7", "100", "16", "0.125", "0.7000", "0.7500"],
        ][:stages]
    )


@pytest.mark.parametrize(
    "schedule", [GROWING, pytest.param(JointSchedule(8, Diminishing(0.1)), marks=pytest.mark.slow), JointSchedule(8)]
)
def test_figures_are_written(schedule: JointSchedule, tmp_path: Path) -> None:
    plot_plan(plan(schedule, 100, epochs=2), tmp_path / "plan.png")
    plot_run(read_metrics(write_metrics(tmp_path / "metrics.csv")), tmp_path / "curves.png")
    for name in ("plan.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000


PROBLEM = BoundConstants(smoothness=5, gradient_variance=1, loss_gap=1)


def test_theory_table_marks_what_theory_speaks_against() -> None:
    with pytest.warns(UserWarning, match="gamma"):
        steep = plan(JointSchedule(Exponential(8, factor=2), Exponential(0.1, factor=1.6)), 1000, epochs=5)
    rows = lines(theory_table(steep, PROBLEM))
    assert [row[-1] for row in rows] == ["", *["gamma^2 >= delta"] * 2, *["gamma^2 >= delta, rate >= 2/L"] * 2]
    assert [row[3] for row in rows[:2]] == ["0.0125", "0.01"]  # rate / batch
    assert rows[-1][-2] == "rate >= 2/L"
    assert float(rows[0][4]) == pytest.approx(1 / (125 * 0.1), rel=1e-3)
    assert float(rows[0][5]) == pytest.approx(0.1 / 8, rel=1e-3)
    assert float(rows[0][6]) == pytest.approx(2 / 1.5 / 12.5 + 5 / 1.5 * 0.0125, rel=1e-3)
    assert [len(row) for row in lines(theory_table(steep))] == [7] * 5  # no bound without constants


def test_theory_table_marks_stalls_and_joins_as_the_plan_table_does() -> None:
    decaying = plan(JointSchedule(Exponential(8, factor=2, every=20), Cosine(0.1)), 2000, epochs=100)
    assert [(row[1], row[-1]) for row in lines(theory_table(decaying))] == [
        ("8", ""), ("16", ""), ("32", ""), ("64", "B_T stalls"), ("128", "B_T stalls")
    ]  # fmt: skip
    unjoined = plan(JointSchedule(Exponential(8, factor=2, every=5), Cosine(0.1)), 2000, epochs=25)
    assert len(lines(theory_table(unjoined))) == 25


def test_comparison(tmp_path: Path) -> None:
    plans = {"grow": plan(GROWING, 1000, epochs=5), "fixed": plan(JointSchedule(32, 0.1), 1000, epochs=5)}
    rows = lines(compare_table(plans, PROBLEM))
    assert [row[:6] for row in rows] == [
        ["grow", "(iii)", "244", "128", "0.2441", "0.0%"], ["fixed", "(i)", "160", "32", "0.1", "34.4%"]
    ]  # fmt: skip
    plot_comparison(plans, tmp_path / "plans.png", PROBLEM)
    assert (tmp_path / "plans.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="equal samples, but these take grow 5,000, longer 6,000"):
        compare_table({"grow": plans["grow"], "longer": plan(JointSchedule(32, 0.1), 1000, epochs=6)})


def test_a_run_is_held_against_its_bound(tmp_path: Path) -> None:
    planned = plan(GROWING, 100, epochs=2)
    bounds = gradient_norm_bounds(planned, PROBLEM)
    rows = [{"samples": 100.0, "full_gradient_norm": 0.5}, {"samples": 200.0, "full_gradient_norm": 0.25}]
    assert [samples for samples, _ in bounds] == [100, 200]
    line = bound_line(rows, bounds)
    assert line is not None
    assert line.startswith(f"min ||grad f||^2: 6.250e-02 measured, at most {min(norm for _, norm in bounds) ** 2:.3e}")
    assert bound_line(rows[:0], bounds) is None
    assert gradient_norm_bounds(plan(JointSchedule(8), 100, epochs=2), PROBLEM) == []
    plot_run(read_metrics(write_metrics(tmp_path / "metrics.csv")) + rows, tmp_path / "curves.png", bounds)
    plot_plan(planned, tmp_path / "plan.png", PROBLEM)
