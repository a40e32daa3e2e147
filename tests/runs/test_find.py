"""Which runs are found, and in what groups."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harness.runs import sweep, write_run
from lightning_bsl.report import write_report
from lightning_bsl.runs import default_baseline, find_runs, group_runs


def write_report_of(folder: Path) -> None:
    found = find_runs([folder])
    groups = group_runs(found.runs)
    write_report(found, groups, default_baseline(groups), folder / "report")


@pytest.mark.parametrize(
    "name", ["callbacks.model_checkpoint.save_top_k", "callbacks.training_time", "callbacks.stop.patience"]
)
def test_what_is_kept_of_a_run_does_not_set_it_apart(name: str, tmp_path: Path) -> None:
    for seed, overrides in enumerate(([], [f"{name}=2"])):
        config = write_run(tmp_path / str(seed), [f"seed={seed}", *overrides]) / ".hydra" / "config.yaml"
        settings = OmegaConf.load(config)
        OmegaConf.update(settings, name, 1 + seed, force_add=True)
        config.write_text(OmegaConf.to_yaml(settings))
    assert len(group_runs(find_runs([tmp_path]).runs)) == (2 if "stop" in name else 1)


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
    (stopped / "finished.json").write_text('{"value": null}')
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
    row = run.series("full_gradient_norm").set_index("step").loc[14]
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


def test_a_configuration_is_read_and_not_instantiated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0", ["scheduler=constant"])
    config = (folder / ".hydra" / "config.yaml").read_text()
    (folder / ".hydra" / "config.yaml").write_text(config + f"model:\n  _target_: os.mkdir\n  path: {tmp_path / 'made'}\n")
    write_report_of(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_chain_of_resumed_runs_is_one(tmp_path: Path) -> None:
    norms = [8, 7, 6, 5, 4, 3]
    for number, (first, last) in enumerate(((1, 3), (2, 4), (4, 6))):  # each goes back behind the end of the one before
        checkpoint = [f"ckpt_path=../{number - 1}/checkpoints/last.ckpt"] if number else []
        folder = write_run(
            tmp_path / str(number), checkpoint, [*[9] * (first - 1), *norms[first - 1 : last]], [10] * 6, epochs=6
        )
        head, *lines = (folder / "metrics.csv").read_text().splitlines()
        (folder / "metrics.csv").write_text("\n".join([head, *lines[first - 1 :]]) + "\n")
    found = find_runs([tmp_path])
    (run,) = found.runs
    assert (run.name, run.curve("full_gradient_norm")[1].tolist()) == ("2", norms)
    assert len(found.notes) == 2
