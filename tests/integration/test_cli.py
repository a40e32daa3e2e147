"""The callback configured by LightningCLI, from a YAML file and from the command line."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import Dataset

from harness.data import Stranger, regression
from harness.files import ROOT
from harness.fits import fit, quiet
from harness.modules import Recorder
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, BatchSizeDataModule
from lightning_bsl.datasets import Digits
from lightning_bsl.models import Classifier
from lightning_bsl.schedules import (
    Constant,
    Cosine,
    Diminishing,
    Exponential,
    JointSchedule,
    LinearScaling,
    Milestones,
    NoiseScaling,
    Polynomial,
    PolynomialDecay,
    Progress,
    SqrtScaling,
    SurgeScaling,
    Warmup,
)

N = 70


class Model(Recorder):
    """As people write them, with arguments of its own."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(nn.Linear(width, 1))
        self.save_hyperparameters()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Nothing is validated."""


class Data(BatchSizeDataModule):
    """As people write them, with the arguments of the base class passed on."""

    def __init__(self, examples: int = N, **options: Any) -> None:
        super().__init__(**options)
        self.examples = examples

    def setup(self, stage: str) -> None:
        self.train_set = regression(self.examples, dtype=torch.float32)


class Strangers(Stranger):
    """Has an argument for the batch size."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__(regression(N, dtype=torch.float32), batch_size=batch_size)


class Numbers(Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.rows = torch.arange(3.0 * count).view(count, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.rows[index],)


def growing(progress: Progress) -> float:
    return 8 + 2 * progress.epoch


Run = Callable[..., LightningCLI]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``LightningCLI`` on a configuration and further arguments, as ``python main.py fit --config ...`` would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])

    def run(configuration: dict[str, Any] | Path, *arguments: str, fit: bool = False, **classes: Any) -> LightningCLI:
        path = configuration if isinstance(configuration, Path) else tmp_path / "config.yaml"
        if not isinstance(configuration, Path):
            path.write_text(yaml.safe_dump(configuration))
        command = [*(["fit"] if fit else []), "--config", str(path), *arguments]
        return LightningCLI(**classes, args=command, run=fit, seed_everything_default=0, save_config_callback=None)

    return run


def configuration(batch_size: Any, lr: Any = None, cap: int | None = None, **trainer: Any) -> dict[str, Any]:
    init_args = {"batch_size": batch_size, "lr": lr, "max_device_batch_size": cap}
    callbacks = [{"class_path": "lightning_bsl.BatchLRScheduler", "init_args": init_args}]
    return {"trainer": quiet(max_epochs=4, callbacks=callbacks + trainer.pop("callbacks", []), **trainer)}


def node(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_bsl.schedules.{name}", "init_args": arguments}


def scheduler_of(cli: LightningCLI) -> BatchLRScheduler:
    (scheduler,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, BatchLRScheduler))
    return scheduler


# --- (a) what is written is what is made -------------------------------------------------------------------------------------

WARMUP = node("Warmup", start=0.01, then=node("Cosine", start=0.1, unit="samples"), over=0.25, every=0.05, unit="samples")


@pytest.mark.parametrize(
    ("batch_size", "lr", "expected"),
    [
        (64, None, JointSchedule(64)),
        (64, 0.1, JointSchedule(64, 0.1)),
        (64, 1, JointSchedule(64, 1)),
        (
            node("Exponential", start=8, factor=2, every=2, maximum=64),
            node("Exponential", start=0.1, factor=1.4, every=0.25),
            JointSchedule(Exponential(8, 2, every=2, maximum=64), Exponential(0.1, 1.4, every=0.25)),
        ),
        (
            node("Exponential", start=8, factor=1.5, every=500, unit="samples", minimum=9),
            node("LinearScaling", base_lr=0.1, base_batch_size=8),
            JointSchedule(Exponential(8, 1.5, every=500, unit="samples", minimum=9), LinearScaling(0.1, 8)),
        ),
        (node("Constant", start=8), node("SqrtScaling", base_lr=1, base_batch_size=8), JointSchedule(8, SqrtScaling(1, 8))),
        (
            node("Milestones", values=[8, 16, 32], at=[1, 3]),
            node("NoiseScaling", peak_lr=0.4, noise_batch_size=1000, alpha=0.5),
            JointSchedule(Milestones([8, 16, 32], at=[1, 3]), NoiseScaling(0.4, 1000, 0.5)),
        ),
        (
            node("Polynomial", start=8, slope=4, every=3, unit="step"),
            node("SurgeScaling", peak_lr=0.4, noise_batch_size=1000),
            JointSchedule(Polynomial(8, 4, every=3, unit="step"), SurgeScaling(0.4, 1000)),
        ),
        (8, node("Diminishing", start=0.1), JointSchedule(8, Diminishing(0.1))),
        (8, node("PolynomialDecay", start=0.1, total=50), JointSchedule(8, PolynomialDecay(0.1, total=50))),
        (
            node("Warmup", start=8, then=node("Constant", start=64), over=2),
            WARMUP,
            JointSchedule(
                Warmup(8, then=Constant(64), over=2),
                Warmup(0.01, then=Cosine(0.1, unit="samples"), over=0.25, every=0.05, unit="samples"),
            ),
        ),
        (f"{__name__}.growing", 0.1, JointSchedule(growing, 0.1)),
    ],
)  # fmt: skip
def test_every_family_and_back(batch_size: Any, lr: Any, expected: JointSchedule, cli: Run, tmp_path: Path) -> None:
    made = cli(configuration(batch_size, lr, cap=32), model_class=Model, datamodule_class=Data)
    assert scheduler_of(made).schedule == expected
    assert scheduler_of(made).max_device_batch_size == 32
    # the configuration that Lightning saves beside the logs makes the same again
    (tmp_path / "saved.yaml").write_text(made.parser.dump(made.config))
    again = cli(tmp_path / "saved.yaml", model_class=Model, datamodule_class=Data)
    assert scheduler_of(again).schedule == expected


def test_print_config_is_a_configuration(cli: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = configuration(node("Exponential", start=8, factor=2, every=0.25), 0.1)
    written |= {
        "model": {
            "class_path": "lightning_bsl.models.Classifier",
            "init_args": {
                "net": {"class_path": "lightning_bsl.models.cnn5", "init_args": {"image_size": 8, "width": 4}},
                "num_classes": 10,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3, "momentum": 0.9}},
                "loss": {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}},
            },
        },
        "data": {"class_path": "lightning_bsl.datasets.Digits", "init_args": {"batch_size": 16, "seed": 3}},
    }
    with pytest.raises(SystemExit) as end:
        cli(written, "--print_config")
    assert not end.value.code
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    made = cli(tmp_path / "printed.yaml")
    assert scheduler_of(made).schedule == JointSchedule(Exponential(8, 2, every=0.25), 0.1)
    assert isinstance(made.model, Classifier)
    assert isinstance(made.model.loss, nn.CrossEntropyLoss)
    assert made.model.loss.label_smoothing == 0.1
    (group,) = made.model.configure_optimizers().param_groups
    assert (group["lr"], group["momentum"]) == (0.3, 0.9)
    assert isinstance(made.datamodule, Digits)
    assert (made.datamodule.batch_size, made.datamodule.seed) == (16, 3)


def test_a_datamodule_with_data_sets_of_ones_own(cli: Run) -> None:
    written = configuration(16, 0.1) | {
        "data": {
            "class_path": "lightning_bsl.BatchSizeDataModule",
            "init_args": {"train": {"class_path": f"{__name__}.Numbers", "init_args": {"count": 9}}, "seed": 4},
        }
    }
    made = cli(written, model_class=Model)
    assert isinstance(made.datamodule, BatchSizeDataModule)
    assert (made.datamodule.num_epoch_examples, made.datamodule.seed) == (9, 4)


def test_the_command_line_overrides_the_file(cli: Run) -> None:
    written = configuration(node("Exponential", start=8, factor=2, every=0.25), 0.1)
    arguments = ["--trainer.callbacks.batch_size.factor=3", "--trainer.callbacks.batch_size.every=2",
                 "--trainer.callbacks.lr=Cosine", "--trainer.callbacks.lr.start=0.2", "--data.seed=5"]  # fmt: skip
    made = cli(written, *arguments, model_class=Model, datamodule_class=Data)
    assert scheduler_of(made).schedule == JointSchedule(Exponential(8, 3, every=2), Cosine(0.2))
    assert made.datamodule.seed == 5


@pytest.mark.parametrize("trigger", [
    ("GradientNormTrigger", {"start": 0.3}),
    ("NoiseTarget", {"factor": 2.0, "round_to": 8}),
    ("NormTest", {"theta": 0.5, "shrink": True}),
    ("CABS", {"hysteresis": 1.5}),
    ("PlateauTrigger", {"monitor": "val/loss"}),
])  # fmt: skip
def test_every_trigger(trigger: tuple[str, dict[str, Any]], cli: Run) -> None:
    name, arguments = trigger
    node = {"class_path": f"lightning_bsl.{name}", "init_args": arguments}
    callback = {"class_path": "lightning_bsl.AdaptiveBatchLRScheduler", "init_args": {"batch_size": 8, "trigger": node}}
    made = cli({"trainer": quiet(max_epochs=1, callbacks=[callback])}, model_class=Model, datamodule_class=Data)
    scheduler = scheduler_of(made)
    assert isinstance(scheduler, AdaptiveBatchLRScheduler)
    assert type(scheduler.trigger).__name__ == name
    assert {key: getattr(scheduler.trigger, key) for key in arguments} == arguments


@pytest.mark.parametrize(
    ("batch_size", "lr", "cap", "message"),
    [
        (node("Exponential", start=8, factor=2, every=1.5), 0.1, None, r"every=1\.5.*write an int of 1 or more"),
        (node("Exponential", start=8, factor=2, unit="epochs"), 0.1, None, '"unit".*epochs'),
        (node("Exponential", start=8, factor=-2), 0.1, None, "factor=-2"),
        (node("LinearScaling", base_lr=1, base_batch_size=8), 0.1, None, "is a rule for learning rates"),
        (8, "fast", None, "fast"),
        (8, 0.1, 0, "max_device_batch_size=0"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_named(
    batch_size: Any, lr: Any, cap: int | None, message: str, cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, TypeError, SystemExit)) as error:
        cli(configuration(batch_size, lr, cap), model_class=Model, datamodule_class=Data)
    assert re.search(message, f"{error.value}{capsys.readouterr().err}", flags=re.S)


# --- (b) and it trains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datamodule", [Data, Strangers])
def test_fit_and_resume(datamodule: Any, cli: Run, tmp_path: Path) -> None:
    checkpoints = {
        "class_path": "ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path), "filename": "{epoch}", "save_top_k": -1},
    }
    schedule = (
        node("Exponential", start=8, factor=2, every=0.25, maximum=40),
        node("Cosine", start=0.1, end=0.01, unit="samples"),
    )
    written = configuration(*schedule, callbacks=[checkpoints], enable_checkpointing=True)
    classes = {"model_class": Model, "datamodule_class": datamodule, "fit": True}
    whole = cli(written, **classes)
    # the same fit, written in Python
    scheduler, model = BatchLRScheduler(Exponential(8, 2, every=0.25, maximum=40), Cosine(0.1, 0.01, unit="samples")), Model()
    fit(model, datamodule(), scheduler, max_epochs=4)
    assert whole.model.journal == model.journal
    assert scheduler_of(whole).plan == scheduler.plan
    assert model.sizes == [8] * 8 + [6] + [16] * 4 + [6] + [32, 32, 6] + [40, 30]
    resumed = cli(written, "--ckpt_path", str(tmp_path / "epoch=1.ckpt"), **classes)
    assert resumed.model.journal == whole.model.journal[9 + 5 :]
    assert scheduler_of(resumed).progress == scheduler.progress


def test_the_files_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "guides" / "lightning-cli.md").read_text()
    for kind, name in (("python", "main.py"), ("yaml", "config.yaml")):
        (text,) = re.findall(rf"```{kind}\n(# {name}\n.*?)```", guide, flags=re.S)
        (tmp_path / name).write_text(text)
    (command,) = re.findall(r"^(python main.py fit --config config.yaml)$", guide, flags=re.M)
    monkeypatch.chdir(tmp_path)
    # a narrow network trains the same batches in half the time
    monkeypatch.setattr(sys, "argv", [*command.split()[1:], "--model.init_args.net.init_args.width=4"])
    runpy.run_path("main.py", run_name="__main__")
    (path,) = (tmp_path / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt")
    state = torch.load(path, weights_only=True)["callbacks"]["BatchLRScheduler"]
    # 1,440 digits; two epochs each of batches of 8, 16 and 32
    assert state["progress"] == {"epoch": 6, "step": 2 * (180 + 90 + 45), "samples": 6 * 1440}
