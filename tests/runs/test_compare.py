"""`bsl-report`: what it computes from runs, and what it refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.commands import run_script
from harness.files import csv_rows
from harness.runs import sweep, write_run
from lightning_bsl.runs import Group, Target, compare, default_baseline, find_runs, group_runs, parse_target
from lightning_bsl.runs.compare import band, default_targets, mean, ratio
from lightning_bsl.runs.find import Run
from lightning_bsl.runs.folder import write_bound

SCRIPT = "report.py"
NORM = Target("full_gradient_norm", 1.0, False)
NAN = math.nan


def found_groups(folder: Path) -> list[Group]:
    return group_runs(find_runs([folder]).runs)


def numbers(groups: list[Group], target: Target = NORM, baseline: int = 0) -> dict[tuple[str, str, str], dict[str, Any]]:
    lines = compare(groups, [target], groups[baseline]).to_dict("records")
    return {(line["what"], line["group"], line["axis"]): line for line in lines}


# --- when a target is reached


def run_of(values: list[float], metric: str = "full_gradient_norm") -> Run:
    samples = [float(10 * (i + 1)) for i in range(len(values))]
    log = pd.DataFrame({"metric": metric, "value": values, "samples": samples, "step": samples, "epoch": NAN, "stage": NAN})
    return Run(Path(), "a", log.assign(epochs=NAN, steps=samples, tokens=NAN, seconds=NAN))


@pytest.mark.parametrize("values, at, ever", [
    ([4, 1, 0.5], 20, True),
    ([0.1, 3, 2, 0.9, 0.8], 40, True),  # starts low, rises, falls: as a gradient norm may
    ([0.1, 3, 0.9, 2, 0.8], 50, True),  # noise: from the last crossing on
    ([4, 3, 2], None, False),
    ([4, 0.9, 2], None, True),  # in passing only
    ([0.9, 0.8], 10, True),  # kept from the start
    ([1], 10, True),  # exactly at it, and the only point
    ([2], None, False),
    ([4, 0.5, NAN], None, True),  # it diverged
    ([NAN, 0.5, 0.4], 20, True),
    ([NAN, NAN], None, False),
    ([4, math.inf, 0.5], 30, True),
])  # fmt: skip
def test_a_target_is_reached_where_it_is_kept(values: list[float], at: float | None, ever: bool) -> None:
    row, was_there = NORM.reached(run_of(values))
    assert (row and row["samples"], was_there) == (at, ever)
    higher = Target("val/accuracy", -1.0, True)  # the same the other way up
    row, was_there = higher.reached(run_of([-value for value in values], "val/accuracy"))
    assert (row and row["samples"], was_there) == (at, ever)


def test_runs_that_were_at_the_target_in_passing_are_counted_apart(tmp_path: Path) -> None:
    for seed, norms in enumerate(([0.5, 3, 2, 0.9], [4, 0.5, 2, 2], [4, 3, 2, 2])):
        write_run(tmp_path / str(seed), [f"seed={seed}"], norms)
    groups = found_groups(tmp_path)
    line = numbers(groups)["to_target", groups[0].name, "samples"]
    assert (line["runs"], line["of"], line["in_passing"], line["value"]) == (1, 3, 1, 400)
    none = numbers(groups, Target("full_gradient_norm", 0.6, False))["to_target", groups[0].name, ""]
    assert (none["runs"], none["of"], none["in_passing"]) == (0, 3, 2)
    assert math.isnan(none["value"])


def test_default_targets_are_what_every_run_kept(tmp_path: Path) -> None:
    groups = found_groups(sweep(tmp_path / "sweep"))
    targets = default_targets(groups)
    assert targets == [NORM, Target("val/loss", 0.5, False)]
    lines = compare(groups, targets, groups[0])
    lines = lines[lines["what"] == "to_target"]
    assert (lines["runs"] == 3).all() and (lines["of"] == 3).all() and (lines["in_passing"] == 0).all()
    write_run(tmp_path / "worse", ["seed=9"], [4, 1, 3])
    write_run(tmp_path / "diverged", ["seed=8"], [4, 1, NAN])
    assert default_targets(found_groups(tmp_path))[0].value == 3  # its last value, not its best


# --- intervals


def test_times_have_the_interval_of_their_logarithm(tmp_path: Path) -> None:
    fixed, growing = groups = found_groups(sweep(tmp_path))
    assert default_baseline(groups) is fixed
    assert default_baseline([growing, fixed]) is fixed
    lines = numbers(groups)
    samples = lines["to_target", fixed.name, "samples"]
    assert samples["value"] == pytest.approx((400 * 500 * 600) ** (1 / 3))
    ends = stats.t.interval(0.95, 2, np.log([400, 500, 600]).mean(), stats.sem(np.log([400, 500, 600])))
    assert (samples["low"], samples["high"]) == pytest.approx(tuple(np.exp(ends)))
    assert samples["interval"] == "log t"
    assert lines["to_target", fixed.name, "steps"]["value"] == pytest.approx((40 * 50 * 60) ** (1 / 3))
    assert lines["to_target", growing.name, "steps"]["value"] == pytest.approx((20 * 20 * 25) ** (1 / 3))
    assert lines["to_target", growing.name, "epochs"]["value"] == pytest.approx(12 ** (1 / 3))
    assert lines["to_target", growing.name, "seconds"]["value"] == pytest.approx(0.5 * 12 ** (1 / 3))
    to = lines["ratio_to_constant_decaying", growing.name, "samples"]
    paired = stats.ttest_rel(np.log([200, 200, 300]), np.log([400, 500, 600])).confidence_interval(0.95)
    assert (to["interval"], to["value"]) == ("paired", pytest.approx((2 / 4 * 2 / 5 * 3 / 6) ** (1 / 3)))
    assert (to["low"], to["high"]) == pytest.approx((math.exp(paired.low), math.exp(paired.high)))
    assert ("ratio_to_constant_decaying", fixed.name, "samples") not in lines


def test_no_interval_of_a_positive_quantity_goes_below_0(tmp_path: Path) -> None:
    for seed, norms in enumerate(([0.5, 0.5, 0.5, 0.1], [4, 4, 4, 1.0])):  # reached after 1 and after 4 epochs
        write_run(tmp_path / str(seed), [f"seed={seed}"], norms)
    groups = found_groups(tmp_path)
    lines = compare(groups, [NORM], groups[0])
    assert stats.ttest_1samp([100, 400], 0).confidence_interval(0.95).low < 0
    positive = lines[(lines["what"] == "to_target") | (lines["metric"] == "full_gradient_norm")]
    assert len(positive) == 6 and (positive["low"] > 0).all() and (positive["low"] < positive["value"]).all()
    loss = lines[(lines["metric"] == "val/loss") & (lines["what"] == "final")].iloc[0]
    assert (loss["interval"], loss["value"]) == ("t", pytest.approx(0.275))  # a loss may be below 0


@pytest.mark.parametrize("values, positive, expected", [
    ([3.0], True, (3, NAN, NAN, 1, "")),
    ([2.0, 2.0], True, (2, 2, 2, 2, "log t")),
    ([0.0, 0.0], True, (0, NAN, NAN, 2, "")),
    ([1.0, 2.0, 3.0], False, (2, 2 - 2.484138, 2 + 2.484138, 3, "t")),
    ([0.0, 100.0, 100.0], True, (0, NAN, NAN, 3, "")),  # at the target from the start: 0 has no logarithm
    ([1.0, NAN], False, (NAN, NAN, NAN, 2, "")),
])  # fmt: skip
def test_means(values: list[float], positive: bool, expected: tuple[Any, ...]) -> None:
    *ends, runs, interval = mean(values, positive)
    assert ends == pytest.approx(list(expected[:3]), nan_ok=True)
    assert (runs, interval) == expected[3:]


def test_equal_values_are_their_mean_to_the_last_digit() -> None:
    assert mean([12800.0] * 3, positive=True)[:3] == (12800, 12800, 12800)
    assert mean([400.0], positive=True).value == 400


def test_ratio_of_other_seeds_is_welchs() -> None:
    ours, theirs = [2.0, 3.0, 5.0], [8.0, 9.0, 15.0, 10.0]
    welch = stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False).confidence_interval(0.95)
    for seeds in ([0, 1, 2], [None] * 3):
        to = ratio(list(zip(seeds, ours)), list(enumerate(theirs)))
        assert to.interval == "Welch"
        assert to[1:3] == pytest.approx((math.exp(welch.low), math.exp(welch.high)))
    assert ratio([(0, 2.0), (0, 2.5)], [(0, 4.0), (0, 5.0)]).interval == "Welch"  # one seed twice has no pairs
    alone = ratio([(0, 2.0)], [(0, 4.0)])
    assert alone.value == 0.5
    assert math.isnan(alone.low)
    assert ratio([(0, 0.0)], [(0, 4.0)]).runs == 0
    pairs = ratio([(1, 8.0), (0, 2.0)], [(0, 4.0), (1, 16.0)])  # whatever their order
    assert (pairs.interval, pairs.value, pairs.low) == ("paired", pytest.approx(0.5), pytest.approx(0.5))


def test_no_ratio_where_a_run_did_not_get_there(tmp_path: Path) -> None:
    groups = found_groups(sweep(tmp_path))
    lines = compare(groups, [Target("full_gradient_norm", 0.9, False)], groups[0])
    soon = lines[(lines["what"] == "to_target") & (lines["axis"] == "samples")]
    assert (soon["runs"].tolist(), soon["of"].tolist()) == ([2, 2], [3, 3])
    assert not lines["what"].str.startswith("ratio").any()


# --- targets, ends, bounds


def test_targets() -> None:
    assert parse_target("val/accuracy=0.9") == Target("val/accuracy", 0.9, True)
    assert parse_target("full_gradient_norm=1e-1") == Target("full_gradient_norm", 0.1, False)
    assert parse_target("anything>=3") == Target("anything", 3, True)
    for text in ("val/accuracy", "val/accuracy=", "=3", "val/accuracy=high", "val/accuracy=nan", "a=b=1", ""):
        with pytest.raises(ValueError, match="METRIC=VALUE"):
            parse_target(text)


def test_last_and_best(tmp_path: Path) -> None:
    write_run(tmp_path / "0", ["seed=0"], [4, 1, 2])
    write_run(tmp_path / "1", ["seed=1"], [4, 2, 3])
    lines = compare(found_groups(tmp_path), [], found_groups(tmp_path)[0]).set_index(["what", "metric"])["value"]
    assert lines["final", "full_gradient_norm"] == pytest.approx(6**0.5)
    assert lines["best", "full_gradient_norm"] == pytest.approx(2**0.5)
    assert (lines["final", "val/loss"], lines["best", "val/loss"]) == (1.25, 0.75)


def test_band() -> None:
    of = band([(np.array([0.0, 4.0]), np.array([0.0, 4.0])), (np.array([1.0, 3.0]), np.array([3.0, 5.0]))], points=3)
    assert of.index.tolist() == [1, 2, 3]
    assert of.T.to_numpy().tolist() == [[2, 3, 4], [1, 2, 3], [3, 4, 5]]


def test_diverged_runs_are_compared_too(tmp_path: Path) -> None:
    write_run(tmp_path / "0", ["seed=0"], [4, NAN, NAN])
    groups = found_groups(tmp_path)
    assert groups[0].runs[0].curve("full_gradient_norm")[0].tolist() == [100]
    line = numbers(groups)["to_target", groups[0].name, ""]
    assert (line["runs"], line["of"], line["in_passing"]) == (0, 1, 0)


def test_bound_beside_the_measurement(tmp_path: Path) -> None:
    for seed, norms in enumerate(([0.5, 0.2], [0.4, 0.4])):
        write_bound(write_run(tmp_path / str(seed), [f"seed={seed}"], norms), [(100, 0.7), (200, 0.6), (300, 0.1)])
    (write_run(tmp_path / "2", ["scheduler=constant"], [0.5, 0.2]) / "bound.csv").write_text("samples\nnone\n")
    groups = found_groups(tmp_path)
    lines = {(line["what"], line["group"]): line["value"] for line in compare(groups, [], groups[0]).to_dict("records")}
    assert lines["measured_min_squared_norm", groups[0].name] == pytest.approx((0.2**2 + 0.4**2) / 2)
    assert lines["bound", groups[0].name] == pytest.approx(0.6**2)  # up to the last measurement
    assert ("bound", groups[1].name) not in lines


# --- the command


def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on figures are empty files, which saves most of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).touch())


def test_report_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path)
    write_run(tmp_path / "6", ["scheduler=increasing_both", "seed=3"], [3, 2], epochs=6)
    write_run(tmp_path / "7", ["scheduler=<b>&", "seed=0"], [3, 2])
    (write_run(tmp_path / "8", ["seed=5"]) / "metrics.csv").unlink()
    arguments = (tmp_path, "--baseline", "increasing_both", "--target", "full_gradient_norm=1")
    assert run_script(SCRIPT, *arguments, monkeypatch=monkeypatch) == 0
    out, printed = tmp_path / "report", capsys.readouterr().out
    assert "runs: 8, groups: 3; 1 unfinished; 1 without metrics: 8" in printed
    page = (out / "report.html").read_text()
    for said in ("Unequal budgets", "1 unfinished", "unfinished at 200 of 600 samples", "8 (no metrics.csv)", "&lt;b&gt;&amp;"):
        assert said in page, said
    assert not re.search(r"https?://", page)
    assert set(re.findall(r'(?:src|href)="([^,"]*)', page)) == {"data:image/png;base64"}
    assert 'name="viewport"' in page
    assert {file.name for file in out.glob("*.png")} >= {
        "full_gradient_norm-seconds.png",
        "batch_size-samples.png",
        "lr-samples.png",
    }
    rows = csv_rows(out / "report.csv")
    (found,) = [row for row in rows if row["what"] == "ratio_to_increasing_both" and row["axis"] == "samples"]
    assert float(found["value"]) == pytest.approx(1 / (2 / 4 * 2 / 5 * 3 / 6) ** (1 / 3))
    assert found["interval"] == "paired"
    undrawn(monkeypatch)
    assert run_script(SCRIPT, tmp_path, "--out", tmp_path / "again", monkeypatch=monkeypatch) == 0  # its own report is no run
    assert (tmp_path / "again" / "report.html").exists()


def test_language_models_have_tokens_and_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)
    text = "epoch,step,samples,tokens,batch_size,lr,val/perplexity\n0,9,100,6400,10,0.1,90\n0,19,200,12800,10,0.1,30\n"
    for seed in range(2):
        (write_run(tmp_path / str(seed), [f"seed={seed}"], epochs=2) / "metrics.csv").write_text(text)
    assert run_script(SCRIPT, tmp_path, "--target", "val/perplexity=40", monkeypatch=monkeypatch) == 0
    out = tmp_path / "report"
    assert {file.name for file in out.glob("val_*")} == {
        f"val_perplexity-{axis}.png" for axis in ("epochs", "steps", "samples", "tokens")
    }
    reached = {row["axis"]: float(row["value"]) for row in csv_rows(out / "report.csv") if row["what"] == "to_target"}
    assert reached == pytest.approx({"epochs": 2, "steps": 20, "samples": 200, "tokens": 12800})
    assert "No seconds" in (out / "report.html").read_text()


@pytest.mark.parametrize("arguments, messages", [
    (["nowhere"], ["nowhere", "no such folder"]),
    (["empty"], ["no run under", "metrics.csv", ".hydra/config.yaml"]),
    (["barren"], ["no run with a log", "0: no metrics.csv"]),
    (["runs", "--baseline=cosine"], ["cosine", "'constant_decaying', 'increasing_both'"]),
    (["runs", "--target=val/acc=0.9"], ["val/acc", "full_gradient_norm, val/loss"]),
    (["runs", "--target=val/loss"], ["METRIC=VALUE"]),
    (["runs", "--out=runs/0/plan.csv"], ["not a folder"]),
    ([], ["DIR"]),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    arguments: list[str],
    messages: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (write_run(tmp_path / "barren" / "0") / "metrics.csv").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert run_script(SCRIPT, *arguments, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err
    for message in messages:
        assert message in printed
    assert sorted(tmp_path.rglob("*")) == before
