"""Logs that were rolled back: what was logged again replaces what it was logged over."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.runs import write_run
from lightning_bsl.runs import Target, find_runs, group_runs

Points = Sequence[dict[str, float]]  # each with its step


def points(values: dict[int, float], metric: str = "val/loss", every: int = 10) -> Points:
    return [{"step": samples // every - 1, "samples": samples, metric: value} for samples, value in values.items()]


def write_csv(folder: Path, *parts: Points) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        names = sorted({name for part in parts for point in part for name in point})
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(point for part in parts for point in part)


def write_events(folder: Path, *parts: Points) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    for number, part in enumerate(parts):
        with SummaryWriter(str(folder), filename_suffix=f".{9 - number}") as writer:  # names say nothing of the order
            for point in part:
                for name, value in point.items():
                    if name != "step":
                        writer.add_scalar(name, value, int(point["step"]), walltime=time.time())


WRITERS = pytest.mark.parametrize("write", [write_csv, write_events])


def curve(folder: Path, metric: str = "val/loss") -> dict[float, float]:
    (run,) = find_runs([folder]).runs
    return {x: round(y, 4) for x, y in zip(*run.curve(metric))}


@WRITERS
def test_values_that_are_logged_again_replace_the_old_ones(write: object, tmp_path: Path) -> None:
    assert callable(write)
    write(tmp_path / "0", points({10: 0.9, 20: 0.5, 30: 0.1}), points({30: 0.4, 40: 0.3}))
    assert curve(tmp_path) == {10: 0.9, 20: 0.5, 30: 0.4, 40: 0.3}
    (run,) = find_runs([tmp_path]).runs
    assert Target("val/loss", 0.2, False).reached(run) == (None, False)


@WRITERS
@pytest.mark.parametrize("parts, expected", [
    ([{10: 9, 20: 8, 30: 7}, {20: 6, 30: 5, 40: 4}, {40: 3, 50: 2}], {10: 9, 20: 6, 30: 5, 40: 3, 50: 2}),
    ([{10: 9, 20: 8, 30: 7, 40: 6}, {30: 5, 40: 4, 50: 3}, {20: 2}], {10: 9, 20: 2}),  # back behind the second part
    ([{20: 9, 30: 8}, {10: 7}], {10: 7}),  # back before the first value
    ([{10: 9, 20: 8}, {30: 7, 40: 6}], {10: 9, 20: 8, 30: 7, 40: 6}),  # resumed, not rolled back
])  # fmt: skip
def test_several_parts(parts: list[dict[int, float]], expected: dict[int, float], write: object, tmp_path: Path) -> None:
    assert callable(write)
    write(tmp_path / "0", *map(points, parts))
    assert curve(tmp_path) == expected


@WRITERS
def test_metrics_that_are_not_logged_again_yet_are_replaced_too(write: object, tmp_path: Path) -> None:
    assert callable(write)
    first = [point | {"val/accuracy": 0.9} for point in points({10: 0.9, 20: 0.5, 30: 0.1})]
    write(tmp_path / "0", first, points({20: 0.4}))
    assert curve(tmp_path, "val/accuracy") == {10: 0.9}


@WRITERS
def test_values_without_samples_are_replaced_by_their_step(write: object, tmp_path: Path) -> None:
    assert callable(write)
    measured = [{"step": step, "full_gradient_norm": 1.0} for step in (0, 1, 5)]
    write(tmp_path / "0", [*points({10: 0.9, 20: 0.5, 30: 0.1}), *measured], points({20: 0.4, 30: 0.3, 70: 0.2}))
    assert curve(tmp_path, "full_gradient_norm") == {10: 1.0}


def test_a_later_file_that_trains_nothing_replaces_nothing(tmp_path: Path) -> None:
    write_events(tmp_path / "0", points({10: 0.9, 20: 0.5}), [{"step": 0, "test/loss": 0.7}])
    assert curve(tmp_path) == {10: 0.9, 20: 0.5}


def test_a_value_logged_twice_at_a_step_is_the_later_one(tmp_path: Path) -> None:
    write_csv(tmp_path / "0", points({10: 0.9, 20: 0.1}), points({20: 0.4}))
    assert curve(tmp_path) == {10: 0.9, 20: 0.4}


def test_a_nan_is_a_value(tmp_path: Path) -> None:
    write_csv(tmp_path / "0", points({10: 0.9, 20: 0.1, 30: float("nan")}))
    (run,) = find_runs([tmp_path]).runs
    assert str(run.series("val/loss")["value"].tolist()) == "[0.9, 0.1, nan]"
    assert curve(tmp_path) == {10: 0.9, 20: 0.1}


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
