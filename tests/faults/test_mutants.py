"""Configurations with mistakes train what they say, or are refused before the first step, and leave no folder behind."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from omegaconf import open_dict

from harness.commands import Run
from harness.configs import CHOICES, NEEDED, compose_config
from harness.mutants import Base, configuration, drawn, must_refuse, run_configuration, run_mutant, says
from lightning_bsl.app.arguments import check_settings
from lightning_bsl.models import Classifier
from lightning_bsl.runs.folder import claimed

NUMBER, PARTS = 1200, 12
SMALL = ("+model.net.width=2", "trainer.enable_progress_bar=false")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_mutants(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = []
    for number, mutant in enumerate(drawn(NUMBER, seed=0)[part::PARTS]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = run_mutant(mutant, tmp_path / str(number))
        if outcome.kind == "trains":
            if must_refuse(mutant):
                bad.append(f"{mutant}: trains")
        elif outcome.kind != "refused" or outcome.folder or not says(mutant, outcome.text):
            bad.append(f"{mutant}: {outcome}")
    assert not bad, "\n".join(bad)


# what was found, by kind: overrides, and a part of the message
REFUSED: list[tuple[tuple[str, ...], str]] = [
    # nodes
    (("~scheduler._target_",), "`scheduler` has no `_target_`, the class of its object"),
    (("callbacks.model_checkpoint=3",), "`callbacks.model_checkpoint=3` is no configuration of an object"),
    (("+callbacks.own._tarqet_=A",), "`callbacks.own` has no `_target_`, the class of its object: write it for `_tarqet_`"),
    (("logger.csv=8",), "`logger.csv=8` is no configuration of an object"),
    (("constants=0.5",), "`constants=0.5` is no group of values"),
    (("model.net._target_=abc",), "`model.net._target_='abc'` cannot be made"),
    (("~optimizer._target_",), "is not what Classifier takes: write a function, as a node with `_target_` or null"),
    # names
    (("+trainer.max_epoch=3",), "`trainer.max_epoch=3`: Trainer has no argument `max_epoch`; write `max_epochs`"),
    (("+sede=3",), "`sede` is not read by anything: write `seed`"),
    (("+schedule_defaults.delt=3",), "`schedule_defaults.delt` is not read by anything: write `schedule_defaults.delta`"),
    (("~scheduler.lr.start",), "`scheduler.lr.start` is missing: Exponential needs it; write scheduler.lr.start=VALUE"),
    (("optimizer.lr=???",), "`optimizer.lr` has no value (???): give it one, optimizer.lr=VALUE"),
    (("data.seed='${nowhere}'",), "`data.seed`: Interpolation key 'nowhere' not found: write the name of a value"),
    # types
    (("seed=abc",), "`seed='abc'`: write a whole number from 0 to 4294967295"),
    (("trainer.max_epochs=2.0",), "`trainer.max_epochs=2.0` is not what Trainer takes: write a whole number or null"),
    (("trainer.limit_train_batches='8'",), "`trainer.limit_train_batches='8'` is not what Trainer takes"),
    (("trainer.gradient_clip_val=true",), "`trainer.gradient_clip_val=True` is not what Trainer takes"),
    (("trainer.check_val_every_n_epoch=-1",), "`trainer.check_val_every_n_epoch=-1`: write a whole number from 1 on, or null"),
    (("optimizer.lr=nan",), "`optimizer.lr=nan` is not what SGD takes: write a number"),
    (("optimizer.momentum=inf",), "`optimizer.momentum=inf` is not what SGD takes"),
    (("optimizer.momentum=-1",), "change `optimizer.momentum=-1`"),
    (("optimizer=adam", "optimizer.betas=[0.9]"), "`optimizer.betas=[0.9]` is not what Adam takes: write a list: 2 of a"),
    (("schedule_defaults.delta='2'",), "`schedule_defaults.delta='2'`: write a number"),
    (("data.seed='${logger.csv.name}'",), "`data.seed=''` (which is ${logger.csv.name}) is not what Digits takes"),
    (("dataset.num_classes=3",), "the data have 10 classes, but the model has `num_classes=3`: write `num_classes=10`"),
    (("scheduler.lr.start=1e300",), "but it must be finite and above 0, and at most 3.4e+38, the largest float32"),
    (("scheduler=adaptive", "scheduler.trigger=7"), "`scheduler.trigger=7` is not what AdaptiveBatchLRScheduler takes"),
    (("constants.smoothness=1.5",), "constants.loss_gap too, beside constants.smoothness=1.5"),
]  # fmt: skip


@pytest.mark.quick(row=REFUSED[::6])
@pytest.mark.parametrize("row", REFUSED, ids=lambda row: " ".join(row[0]))
def test_what_is_refused(row: tuple[tuple[str, ...], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, message = row
    monkeypatch.chdir(tmp_path)
    outcome = run_configuration("train", configuration(Base("train", (*SMALL, *overrides)), tmp_path / "run"), tmp_path / "run")
    assert (outcome.kind, outcome.folder) == ("refused", False), outcome
    assert message in outcome.text


SEARCHES = [
    ("search.b_0=[]", "`search.b_0=[]` must be a list of batch sizes"),
    ("search.b_0=[8,true]", "`search.b_0=[8, True]` must be a list of batch sizes"),
    ("search.delta=[2]", "`search.delta=[2]` must be two finite numbers above 0, the smaller one first: write [FROM, TO]"),
    ("search.every=[1,0.5]", "`search.every=[1, 0.5]` must be two lengths"),
    ("search.eta_0=[0.1,nan]", "`search.eta_0=[0.1, nan]` must be two finite numbers above 0"),
    ("search.exponent=0.3", "`search.exponent=0.3` must be two finite numbers"),
    ("search.direction=up", "`search.direction='up'`: write min or max"),
    ("search.trials=1.5", "`search.trials=1.5` must be 1 or more, as a whole number"),
    ("search.storage=abc", "`search.storage='abc'` cannot be opened"),
    ("+search.trails=3", "`search.trails` is no setting of a search: write search.trials"),
]


@pytest.mark.quick(row=SEARCHES[2:3])
@pytest.mark.parametrize("row", SEARCHES, ids=lambda row: str(row[0]))
def test_what_a_search_refuses(row: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override, message = row
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    outcome = run_configuration("search", configuration(Base("search", (*SMALL, override)), folder), folder)
    assert (outcome.kind, outcome.folder) == ("refused", False), outcome
    assert message in outcome.text


ALL = [(group, choice) for group, choice in CHOICES if group != "scale"]


@pytest.mark.quick(group=["logger"], choice=["tensorboard"])
@pytest.mark.quick(group=["experiment"], choice=["samples_to_accuracy"])
@pytest.mark.parametrize("group, choice", ALL)
def test_no_choice_is_refused(group: str, choice: str) -> None:
    name = "surge_grid" if group == "surge" else "train"
    cfg = compose_config(f"{group}={choice}", *NEEDED.get(choice, ()), "hydra.runtime.output_dir=folder", name=name)
    with open_dict(cfg):
        del cfg["hydra"]
    check_settings(cfg)


TINY = ("+model.net.width=2", "trainer.max_epochs=1", "data.samples_per_epoch=16", "trainer.enable_progress_bar=false",
        "+trainer.limit_val_batches=1", "scheduler=constant", "scheduler.batch_size=8")  # fmt: skip


def test_what_was_in_the_folder_stays(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    printed = run("train.py", *TINY, "trainer.max_epochs=x", folder=folder, fails=True)
    assert "`trainer.max_epochs='x'`" in printed.err and "Traceback" not in printed.both
    assert not folder.exists() and folder.parent.exists()

    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    run("train.py", *TINY, "trainer.max_epochs=x", folder=folder, fails=True)
    assert (folder / "notes.txt").read_text() == "mine"

    (folder / "notes.txt").unlink()
    run("train.py", *TINY, folder=folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".csv", ".ckpt", ".json")}
    run("train.py", *TINY, "trainer.max_epochs=x", folder=folder, fails=True)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (folder / "finished.json").exists()


def test_a_job_of_a_sweep_takes_no_other_away(run: Run, tmp_path: Path) -> None:
    printed = run("train.py", "-m", *TINY, "seed=0,-1", folder=tmp_path / "sweep", fails=True)
    assert "`seed=-1`" in printed.err
    assert (tmp_path / "sweep" / "0" / "finished.json").exists()
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_folder_that_another_process_has_claimed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    cfg = configuration(Base("train", (*SMALL, "seed=-1")), folder)
    reads, writes = os.pipe()
    done, tell = os.pipe()

    def claim(_: object) -> None:
        """As another process does, at the worst moment."""
        if os.fork() == 0:
            with claimed(folder):
                os.write(writes, b"1")
                os.read(done, 1)
            os._exit(0)
        os.read(reads, 1)
        raise ValueError("refused")

    monkeypatch.setattr("lightning_bsl.app.compose.check_settings", claim)
    monkeypatch.setattr("lightning_bsl.app.compose._refusal", lambda error, *_: str(error))
    outcome = run_configuration("train", cfg, folder)
    os.write(tell, b"1")
    os.wait()
    assert outcome.kind == "refused" and (folder / ".hydra" / "config.yaml").exists()


def test_a_run_that_starts_in_the_folder_meanwhile_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"

    def start(_: object) -> None:
        (folder / ".hydra" / "overrides.yaml").write_text("- seed=5\n")
        raise ValueError("refused")

    monkeypatch.setattr("lightning_bsl.app.compose.check_settings", start)
    monkeypatch.setattr("lightning_bsl.app.compose._refusal", lambda error, *_: str(error))
    outcome = run_configuration("train", configuration(Base("train", SMALL), folder), folder)
    assert outcome.kind == "refused" and (folder / ".hydra" / "overrides.yaml").read_text() == "- seed=5\n"


def test_what_fails_after_the_first_step_keeps_its_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Classifier, *_: Any) -> None:
        if self.global_step:
            self.to("nowhere")  # an error of a library, in code of the user

    monkeypatch.setattr(Classifier, "on_before_backward", fail)
    printed = run("train.py", *TINY, folder=tmp_path / "run", fails=True)
    assert "Traceback" in printed.err and (tmp_path / "run" / ".hydra" / "config.yaml").exists()


def test_a_library_that_refuses_before_the_first_step(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise KeyError("width of model.net.width")

    refuse = type(refuse)(refuse.__code__, {"__name__": "torch.somewhere", "KeyError": KeyError})  # of a library
    monkeypatch.setattr(Trainer, "fit", refuse)
    printed = run("train.py", *TINY, folder=tmp_path / "run", fails=True)
    assert "KeyError: 'width of model.net.width'; change `model.net.width=2`" in printed.err
    assert "Traceback" not in printed.both and not (tmp_path / "run").exists()
