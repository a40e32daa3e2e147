"""What is read from a ``metrics.csv``, also after interruptions."""

from __future__ import annotations

from pathlib import Path

from harness.runs import FIRST_EPOCH, SECOND_EPOCH, write_metrics
from lightning_bsl.runs import read_metrics
from lightning_bsl.runs.metrics import keep_metrics, merge_metrics


def test_read_metrics_leaves_out_what_is_empty(tmp_path: Path) -> None:
    rows = read_metrics(write_metrics(tmp_path / "metrics.csv"))
    assert rows[0] == {"batch_size": 8, "epoch": 0, "lr": 0.1, "samples": 80, "step": 9, "train/loss": 1.5}
    assert rows[1]["val/accuracy"] == 0.5


def test_metrics_of_before_an_interruption_are_kept(tmp_path: Path) -> None:
    file = write_metrics(tmp_path / "metrics.csv")
    whole = read_metrics(file)
    keep_metrics(file)
    assert not file.exists()
    # resumed from the checkpoint that the validation of epoch 0 saved: only the end of that epoch is logged again
    write_metrics(file, FIRST_EPOCH.splitlines()[0] + "\n8.0,0,0.1,100.0,12,1.4,,\n")
    assert read_metrics(file) == whole[:3]
    keep_metrics(file)  # killed again, and resumed with a column of its own
    write_metrics(
        file, "batch_size,epoch,lr,samples,step,train/loss,val/accuracy,val/loss,extra\n" + SECOND_EPOCH.replace("\n", ",7\n")
    )
    rows = read_metrics(file)
    merge_metrics(file)
    assert rows == read_metrics(file) == [*whole[:3], *(row | {"extra": 7} for row in whole[3:])]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    merge_metrics(file)
    assert rows == read_metrics(file)


def test_a_row_that_an_interruption_has_cut(tmp_path: Path) -> None:
    whole = read_metrics(write_metrics(tmp_path / "metrics.csv"))
    file = write_metrics(tmp_path / "metrics.csv", FIRST_EPOCH + SECOND_EPOCH + "16.0,1,0.1")
    assert read_metrics(file) == whole
    keep_metrics(file)
    merge_metrics(file)
    assert read_metrics(file) == whole


def test_metrics_of_a_run_with_nothing_left_to_do(tmp_path: Path) -> None:
    file = write_metrics(tmp_path / "metrics.csv")
    whole = read_metrics(file)
    keep_metrics(file)
    merge_metrics(file)  # resumed from the end of its last epoch, it logs nothing
    assert read_metrics(file) == whole
    keep_metrics(tmp_path / "nothing.csv")
