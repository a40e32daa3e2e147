"""`scripts/report.py`: which runs it finds, what it computes from them, and what it refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from harness.commands import run_script
from harness.configs import compose_config
from harness.files import csv_rows
from harness.runs import sweep, write_run
from lightning_bsl.report.overlays import band
from lightning_bsl.runs import Group, Target, default_baseline, find_runs, group_runs, parse_target
from lightning_bsl.runs.compare import against_bounds, default_targets, estimate, how_soon, ratio, where_ended
from lightning_bsl.runs.find import Run

SCRIPT = "report.py"


# --- what is found


def test_groups_are_runs_that_differ_in_their_seed_only(tmp_path: Path) -> None:
    write_run(tmp_path / "0", ["seed=0"])  # the default, not written out
    write_run(
        tmp_path / "1", ["scheduler=increasing_both", "seed=1", "logger=tensorboard", "trainer.enable_progress_bar=false"]
    )
    write_run(tmp_path / "2", ["scheduler=constant", "seed=0"])
    write_run(tmp_path / "10", ["scheduler=constant", "optimizer.lr=0.2", "seed=0"])
    groups = group_runs(find_runs([tmp_path]).runs)
    assert [(group.name, [run.name for run in group.runs]) for group in groups] == [
        ("increasing_both, optimizer.lr=0.1", ["0", "1"]),
        ("constant, optimizer.lr=0.1", ["2"]),
        ("constant, optimizer.lr=0.2", ["10"]),
    ]
    assert [run.seed for run in groups[0].runs] == [0, 1]
    assert [group.name for group in group_runs(groups[0].runs)] == ["increasing_both"]


def test_labels_are_as_short_as_tells_groups_apart(tmp_path: Path) -> None:
    for number, (scheduler, lr) in enumerate((("constant", 0.1), ("increasing_both", 0.2))):
        write_run(tmp_path / str(number), [f"scheduler={scheduler}", f"optimizer.lr={lr}"])
    assert [group.name for group in group_runs(find_runs([tmp_path]).runs)] == ["constant", "increasing_both"]


def test_a_folder_is_read_once(tmp_path: Path) -> None:
    sweep(tmp_path / "sweep")
    assert len(find_runs([tmp_path / "sweep", tmp_path, tmp_path / "sweep" / "0"]).runs) == 6


def test_unfinished_and_empty_runs(tmp_path: Path) -> None:
    sweep(tmp_path)
    half = write_run(tmp_path / "6", ["scheduler=increasing_both", "seed=3"], [3, 2], epochs=6)
    stopped = write_run(tmp_path / "7", ["scheduler=increasing_both", "seed=4"], [3, 2], epochs=6)
    (stopped / "curves.png").touch()  # drawn when the fit ends
    (write_run(tmp_path / "8", ["seed=5"]) / "metrics.csv").write_text("")
    (write_run(tmp_path / "9", ["seed=6"]) / "metrics.csv").unlink()
    write_run(tmp_path / "other", columns=("epoch", "step", "val/loss"), ours=False)
    found = find_runs([tmp_path])
    assert [name for name, _ in found.without] == ["8", "9", "other"]
    assert [reason.split()[0] for _, reason in found.without] == ["metrics.csv", "no", "`samples`"]
    states = {run.folder: run.progress for run in found.runs}
    assert states[half] == "unfinished at 200 of 600 samples (33%)"
    assert states[stopped] == "stopped at 200 of 600 samples (33%)"
    growing = group_runs(found.runs)[1]
    assert [run.folder for run in growing.unfinished] == [half]
    assert half not in [run.folder for run in growing.counted]


def test_a_plan_is_no_run(tmp_path: Path) -> None:
    sweep(tmp_path)
    plan = write_run(tmp_path / "plan")
    (plan / "metrics.csv").unlink()
    (plan / ".hydra" / "hydra.yaml").write_text("hydra:\n  job:\n    name: plan\n    chdir: null\n")
    assert find_runs([tmp_path]).without == []


def test_a_resumed_run_is_one_with_its_beginning(tmp_path: Path) -> None:
    write_run(tmp_path / "0", ["seed=0"], [8, 7], epochs=4)
    whole = write_run(tmp_path / "1", ["seed=0", "ckpt_path=../0/checkpoints/last.ckpt"], [8, 7, 6, 5])
    lines = (whole / "metrics.csv").read_text().splitlines()
    (whole / "metrics.csv").write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    found = find_runs([tmp_path])
    (run,) = found.runs
    assert run.curve("full_gradient_norm")[1].tolist() == [8, 7, 6, 5]
    assert run.ended
    assert "goes on from" in found.notes[0]


def test_what_was_measured_without_a_clock_is_put_on_every_axis(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0")
    with open(folder / "metrics.csv", "a") as file:
        file.write("1,14,,,,,2.5,\n")  # between steps 9 and 19, as FullGradientNorm(unit="step") writes
    (run,) = find_runs([tmp_path]).runs
    row = next(row for row in run.rows if row["step"] == 14)
    assert (row["samples"], row["seconds"], row["epochs"], row["steps"]) == (150, 0.75, 1.5, 15)


def test_epochs_without_a_plan(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0", norms=[4, 3, 2])
    (folder / "plan.csv").unlink()
    lines = (folder / "metrics.csv").read_text().splitlines()
    lines[-1] = "2,24,250,1.25,10,0.1,2,1"  # the third epoch is half done
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (run,) = find_runs([tmp_path]).runs
    assert run.curve("full_gradient_norm", "epochs")[0].tolist() == [1, 2, 2.5]
    assert run.progress == "unfinished at 2.5 of 3 epochs, 250 samples"


def test_training_loss_is_that_of_whole_epochs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0", norms=[4, 3, 2])
    text = "epoch,step,samples,train/loss\n0,4,50,9\n0,9,100,4\n1,14,150,8\n1,19,200,3\n2,24,250,7\n2,29,300,2\n"
    (folder / "metrics.csv").write_text(text)
    (run,) = find_runs([tmp_path]).runs
    assert run.curve("train/loss")[1].tolist() == [4, 3, 2]
    (folder / "metrics.csv").write_text("\n".join(text.splitlines()[:4]) + "\n")  # a run of one epoch has nothing else
    (run,) = find_runs([tmp_path]).runs
    assert run.curve("train/loss")[1].tolist() == [9, 4, 8]


def test_logs_of_others(tmp_path: Path) -> None:
    for name in ("mine/version_0", "mine/version_1", "grown_seed1", "grown_seed2", "grown-seed=3"):
        write_run(tmp_path / name, ours=False)
    groups = group_runs(find_runs([tmp_path]).runs)
    found = [(group.name, [run.seed for run in group.runs]) for group in groups]
    assert sorted(found, key=str) == [("grown", [3, 1, 2]), ("mine", [None, None])]
    assert all(run.ended for group in groups for run in group.runs)
    assert sorted(run.name for run in groups[-1].runs) == ["mine/version_0", "mine/version_1"]


def test_tensorboard_logs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    for seed in range(2):
        logger = TensorBoardLogger(str(tmp_path), name=f"grown_seed{seed}", version="")
        for epoch in range(3):
            values = {
                "epoch": epoch,
                "samples": 100.0 * (epoch + 1),
                "batch_size": 10.0,
                "lr": 0.5,
                "val/loss": 1.0 / (epoch + 1),
            }
            logger.log_metrics(values, step=10 * epoch + 9)
        logger.finalize("success")
    write_run(tmp_path / "ours" / "0")
    logger = TensorBoardLogger(str(tmp_path / "ours" / "0"), name="tensorboard", version="")  # the same run once more
    logger.log_metrics({"samples": 1.0}, step=0)
    logger.finalize("success")
    groups = group_runs(find_runs([tmp_path]).runs)
    assert [(group.name, len(group.runs)) for group in groups] == [("grown", 2), ("increasing_both", 1)]
    run = groups[0].runs[1]
    x, y = run.curve("val/loss")
    assert (run.seed, x.tolist()) == (1, [100, 200, 300])
    assert y.tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert len(run.curve("val/loss", "seconds")[0]) == 3
    assert run.curve("val/loss", "epochs")[0].tolist() == pytest.approx([1, 2, 3])


# --- what is computed


def test_first_crossings_and_ratios(tmp_path: Path) -> None:
    fixed, growing = groups = group_runs(find_runs([sweep(tmp_path)]).runs)
    assert default_baseline(groups) is fixed
    assert default_baseline([growing, fixed]) is fixed
    one, other = how_soon(groups, [Target("full_gradient_norm", 1.0, False)], fixed)
    assert (one.reached, one.of, other.reached, other.of) == (3, 3, 3, 3)
    assert one.means["samples"].value == 500
    assert one.means["steps"].value == 50
    assert one.means["epochs"].value == 5
    assert other.means["seconds"].value == pytest.approx(0.5 * 7 / 3)
    assert other.means["steps"].value == pytest.approx((20 + 20 + 25) / 3)
    low, high = stats.t.interval(0.95, 2, 500, stats.sem([400, 500, 600]))
    assert one.means["samples"][1:3] == pytest.approx((low, high))
    assert one.ratios == {}
    paired = stats.ttest_rel(np.log([200, 200, 300]), np.log([400, 500, 600])).confidence_interval(0.95)
    found = other.ratios["samples"]
    assert found.method == "paired"
    assert found.value == pytest.approx((2 / 4 * 2 / 5 * 3 / 6) ** (1 / 3))
    assert found[1:3] == pytest.approx((math.exp(paired.low), math.exp(paired.high)))


def test_ratio_of_other_seeds_is_welchs() -> None:
    ours, theirs = [2.0, 3.0, 5.0], [8.0, 9.0, 15.0, 10.0]
    welch = stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False).confidence_interval(0.95)
    for seeds in ([0, 1, 2], [None] * 3):
        found = ratio(list(zip(seeds, ours)), list(enumerate(theirs)))
        assert found.method == "Welch"
        assert found[1:3] == pytest.approx((math.exp(welch.low), math.exp(welch.high)))
    assert ratio([(0, 2.0), (0, 2.5)], [(0, 4.0), (0, 5.0)]).method == "Welch"  # one seed twice has no pairs
    alone = ratio([(0, 2.0)], [(0, 4.0)])
    assert alone.value == 0.5
    assert math.isnan(alone.low)
    assert ratio([(0, 0.0)], [(0, 4.0)]).number == 0
    assert math.isnan(estimate([3.0]).low)


def test_no_ratio_where_a_run_did_not_get_there(tmp_path: Path) -> None:
    groups = group_runs(find_runs([sweep(tmp_path)]).runs)
    one, other = how_soon(groups, [Target("full_gradient_norm", 0.9, False)], groups[0])
    assert (one.reached, one.of, other.reached) == (2, 3, 2)
    assert other.ratios == {}
    assert one.means["samples"].number == 2


def test_targets() -> None:
    assert parse_target("val/accuracy=0.9") == Target("val/accuracy", 0.9, True)
    assert parse_target("full_gradient_norm=1e-1") == Target("full_gradient_norm", 0.1, False)
    assert parse_target("anything>=3") == Target("anything", 3, True)
    for text in ("val/accuracy", "val/accuracy=", "=3", "val/accuracy=high", "val/accuracy=nan", "a=b=1", ""):
        with pytest.raises(ValueError, match="METRIC=VALUE"):
            parse_target(text)


def test_default_targets_are_what_every_run_reached(tmp_path: Path) -> None:
    groups = group_runs(find_runs([sweep(tmp_path)]).runs)
    targets = default_targets(groups)
    assert targets == [Target("full_gradient_norm", 1.0, False), Target("val/loss", 0.5, False)]
    assert all(each.reached == each.of == 3 for each in how_soon(groups, targets, groups[0]))


def test_last_and_best(tmp_path: Path) -> None:
    write_run(tmp_path / "0", ["seed=0"], [4, 1, 2])
    write_run(tmp_path / "1", ["seed=1"], [4, 2, 3])
    norm, loss = where_ended(group_runs(find_runs([tmp_path]).runs))
    assert (norm.last.value, norm.best.value, loss.best.value) == (2.5, 1.5, 0.75)


def test_band() -> None:
    of = band([(np.array([0.0, 4.0]), np.array([0.0, 4.0])), (np.array([1.0, 3.0]), np.array([3.0, 5.0]))], points=3)
    assert of.x.tolist() == [1, 2, 3]
    assert of.mean.tolist() == [2, 3, 4]
    assert (of.low.tolist(), of.high.tolist()) == ([1, 2, 3], [3, 4, 5])


def test_diverged_runs_are_compared_too(tmp_path: Path) -> None:
    write_run(tmp_path / "0", ["seed=0"], [4, float("nan"), float("nan")])
    groups = group_runs(find_runs([tmp_path]).runs)
    assert groups[0].runs[0].curve("full_gradient_norm")[0].tolist() == [100]
    (one,) = how_soon(groups, [Target("full_gradient_norm", 1.0, False)], groups[0])
    assert (one.reached, one.of) == (0, 1)


def test_bound_beside_the_measurement() -> None:
    config = compose_config("data=quadratic", "scheduler=constant", "trainer.max_epochs=2")
    rows = [
        {"step": 511.0, "samples": 4096.0, "full_gradient_norm": 0.5},
        {"step": 1023.0, "samples": 8192.0, "full_gradient_norm": 0.2},
    ]
    others = [dict(row, full_gradient_norm=0.4) for row in rows]
    runs = [Run(Path(), "a", some, seed, config=config) for seed, some in enumerate((rows, others))]
    (held,) = against_bounds([Group("a", runs), Group("none", [Run(Path(), "b", rows, config=compose_config())])])
    assert held.measured == pytest.approx((0.2**2 + 0.4**2) / 2)
    lr, batch = config.optimizer.lr, config.scheduler.batch_size.start
    steps = 2 * 4096 // batch
    assert held.bound == pytest.approx(2 / (2 - lr) / (steps * lr) + 1 / (2 - lr) * lr / batch)
    config.scheduler._target_ = "os.getcwd"  # a log does not run code
    assert against_bounds([Group("a", runs)]) == []


# --- the command


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
    assert run_script(SCRIPT, tmp_path, "--out", tmp_path / "again", monkeypatch=monkeypatch) == 0  # its own report is no run
    assert (tmp_path / "again" / "report.html").exists()


def test_language_models_have_tokens_and_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "epoch,step,samples,tokens,batch_size,lr,val/perplexity\n0,9,100,6400,10,0.1,90\n0,19,200,12800,10,0.1,30\n"
    for seed in range(2):
        (write_run(tmp_path / str(seed), [f"seed={seed}"], epochs=2) / "metrics.csv").write_text(text)
    assert run_script(SCRIPT, tmp_path, "--target", "val/perplexity=40", monkeypatch=monkeypatch) == 0
    out = tmp_path / "report"
    assert {file.name for file in out.glob("val_*")} == {
        f"val_perplexity-{axis}.png" for axis in ("epochs", "steps", "samples", "tokens")
    }
    reached = {row["axis"]: float(row["value"]) for row in csv_rows(out / "report.csv") if row["what"] == "to_target"}
    assert reached == {"epochs": 2, "steps": 20, "samples": 200, "tokens": 12800}
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
