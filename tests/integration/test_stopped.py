"""Runs that are told to stop save a checkpoint, and the same command goes on from there, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch import Callback

from harness.commands import Run
from harness.data import own, regression
from harness.files import csv_rows
from harness.fits import fit
from harness.modules import Regression
from harness.processes import Pair
from lightning_bsl import BatchLRScheduler
from lightning_bsl.app.stop import CheckpointWhenStopped
from lightning_bsl.models import Classifier

OPTIONS = ("+model.net.width=4", "trainer.max_epochs=2", "data.samples_per_epoch=160", "scheduler.max_device_batch_size=6",
           "trainer.log_every_n_steps=1", "~callbacks.training_time", "trainer.enable_progress_bar=false")  # fmt: skip


def last(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def logged(folder: Path) -> list[tuple[str, ...]]:
    """What was logged of each step and each validation; a mean over an epoch is that of its last part, as Lightning has it."""
    rows = [row for row in csv_rows(folder / "metrics.csv") if not row["train/accuracy"]]
    return [(row["step"], row["samples"], row["lr"], row["train/loss"], row["val/loss"]) for row in rows]


@pytest.mark.quick(number=[signal.SIGTERM], at=[23])
@pytest.mark.quick(number=[signal.SIGINT], at=[47])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 23, 39, 47])  # batches of an epoch: two for each of 20 steps, then 10 steps of 16 in three
def test_goes_on_bit_for_bit(number: int, at: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train.py", *OPTIONS, folder=tmp_path / "whole")
    seen = []

    def send(self: Classifier, *_: Any) -> None:
        seen.append(self.global_step)
        if len(seen) == at + 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_before_backward", send)
        printed = run("train.py", *OPTIONS, folder=tmp_path / "cut", fails=True)
    assert "last.ckpt: saved; the same command goes on from here" in printed.out
    assert at < len(seen) <= at + 4 and not (tmp_path / "cut" / "finished.json").exists()  # with the end of the step
    run("train.py", *OPTIONS, folder=tmp_path / "cut")
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_that_was_cut_short(run: Run, tmp_path: Path) -> None:
    run("train.py", *OPTIONS, "+callbacks.model_checkpoint.save_top_k=-1", folder=tmp_path)
    whole, checkpoints = last(tmp_path), tmp_path / "checkpoints"
    for path in (checkpoints / "last.ckpt", *checkpoints.glob("epoch=1*.ckpt")):
        path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "finished.json").unlink()  # as if the disk had been full
    with pytest.warns(UserWarning, match=r"last.ckpt is not complete, so the run goes on from epoch=0-step=20.ckpt"):
        run("train.py", *OPTIONS, "+callbacks.model_checkpoint.save_top_k=-1", folder=tmp_path)
    assert all(torch.equal(whole[name], value) for name, value in last(tmp_path).items())

    for path in checkpoints.iterdir():
        path.write_bytes(b"")
    (tmp_path / "finished.json").unlink()
    before = (tmp_path / "metrics.csv").read_bytes()
    printed = run("train.py", *OPTIONS, "+callbacks.model_checkpoint.save_top_k=-1", folder=tmp_path, fails=True)
    assert "last.ckpt is not complete, and there is no other checkpoint" in printed.both
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_second_interrupt_stops_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: Classifier, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(Classifier, "on_before_backward", twice)
    printed = run("train.py", *OPTIONS, folder=tmp_path, fails=True)
    assert "press it again" in printed.out and "last.ckpt" not in printed.out
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


class Told(Callback):
    """Sends SIGTERM to its own process, which the other one gets a batch later."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3 + trainer.global_rank:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_together(path: str, told: bool) -> tuple[str, int, list[Any]]:
    torch.manual_seed(1)
    scheduler, resume = BatchLRScheduler(6, 0.05), path if Path(path).exists() else None
    callbacks = [scheduler, CheckpointWhenStopped(scheduler, Path(path)), *([Told()] if told else [])]
    model, end = Regression(), "ended"
    try:
        fit(
            model,
            own(regression(61)),
            *callbacks,
            max_epochs=2,
            devices=2,
            strategy="ddp",
            enable_checkpointing=True,
            ckpt_path=resume,
        )
    except SystemExit as stop:
        end = str(stop.code)
    return end, scheduler.progress.step, [parameter.tolist() for parameter in model.net.parameters()]


def test_processes_stop_after_the_same_step(pair: Pair, tmp_path: Path) -> None:
    whole = pair(stopped_together, str(tmp_path / "none.ckpt"), False)
    cut = pair(stopped_together, str(tmp_path / "last.ckpt"), True)
    assert [(end, step) for end, step, _ in cut] == [("143", 4)] * 2
    assert pair(stopped_together, str(tmp_path / "last.ckpt"), False) == whole
