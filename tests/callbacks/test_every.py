"""Validations and checkpoints at multiples on the clock of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from harness.cases import GROWING, SHRINKING
from harness.data import Stranger, own, regression
from harness.files import csv_rows
from harness.fits import KeptOnException, fit, quiet
from harness.modules import Recorder, Regression, Step, equal
from harness.processes import Pair
from harness.tiers import diagonal
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, BatchSizeDataModule, CheckpointEvery, ValidateEvery
from lightning_bsl.schedules import Progress
from lightning_bsl.schedules.progress import crosses

N = 61
DATA, VALIDATION = regression(N), regression(9)
TOKENS = 5  # of an example


class Sequences(BatchSizeDataModule):
    tokens_per_sample = TOKENS


def data(**arguments: Any) -> Sequences:
    return Sequences(DATA, VALIDATION, seed=1, **arguments)


def journey(journal: list[Step]) -> dict[str, list[tuple[int, int]]]:
    """For each unit, the reading of the clock before and after each step, as the journal of a run in one process says."""
    ends = {batch.step: batch.epoch for batch in journal}
    last = {epoch: step for step, epoch in ends.items()}
    readings: dict[str, list[tuple[int, int]]] = {unit: [] for unit in ("epoch", "step", "samples", "tokens")}
    samples = epochs = 0
    for number, (step, epoch) in enumerate(ends.items()):
        examples = sum(len(batch.examples) for batch in journal if batch.step == step)
        whole = last[epoch] == step and sum(len(batch.examples) for batch in journal if batch.epoch == epoch) == N
        readings["epoch"].append((epochs, epochs + whole))
        readings["step"].append((number, number + 1))
        readings["samples"].append((samples, samples + examples))
        readings["tokens"].append((samples * TOKENS, (samples + examples) * TOKENS))
        samples, epochs = samples + examples, epochs + whole
    return readings


def crossings(journal: list[Step], n: int, unit: str) -> list[int]:
    """The number of steps after each step that reaches or passes a multiple of ``n``."""
    clock = journey(journal)[unit]
    return [i for i, (before, after) in enumerate(clock, 1) if any(m % n == 0 for m in range(before + 1, after + 1))]


UNITS = [
    ("samples", 20),
    ("samples", 61),
    ("samples", 1000),
    ("tokens", 111),
    ("step", 1),
    ("step", 4),
    ("epoch", 1),
    ("epoch", 2),
]
WAYS: list[tuple[Any, Any, int, dict[str, Any]]] = [
    (GROWING, None, 1, {}),
    (SHRINKING, 4, -1, {"max_epochs": -1, "max_steps": 14}),
    (GROWING, "auto", -1, {"max_epochs": 2, "max_steps": 100}),
    (SHRINKING, None, 1, {"max_epochs": 4, "limit_val_batches": 2}),
    (GROWING, 4, 1, {"max_epochs": 3, "num_sanity_val_steps": 2}),
]


@pytest.mark.parametrize("every, way", diagonal(UNITS, range(len(WAYS))), ids=str)
def test_validations_and_checkpoints_are_where_the_clock_says(every: Any, way: int, tmp_path: Path) -> None:
    (unit, n), (schedule, cap, order, options) = every, WAYS[way]
    parts = [BatchLRScheduler(schedule, 0.05, cap), ValidateEvery(n, unit), CheckpointEvery(n, unit, tmp_path)]
    trainer = fit(model := Regression(), data(), *parts[::order], enable_checkpointing=True, **options)
    expected = crossings(model.journal, n, unit)
    assert model.validated == expected
    clock = journey(model.journal)
    epochs = {batch.step: batch.epoch for batch in model.journal}
    shown = "tokens" if unit == "tokens" else "samples"
    names = {f"epoch={epochs[step - 1]}-step={step}-{shown}={clock[shown][step - 1][1]}.ckpt" for step in expected}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert trainer.check_val_every_n_epoch == 1  # Lightning is as it was
    assert "_should_check_val_fx" not in vars(trainer.fit_loop.epoch_loop)


def test_accumulated_batches_of_any_loader_are_one_step() -> None:
    for order in (1, -1):
        parts = [BatchLRScheduler(GROWING, 0.05), ValidateEvery(25)]
        stranger = Stranger(DATA, VALIDATION, shuffle=True, eval_batch_size=4)
        fit(model := Regression(), stranger, *parts[::order], accumulate_grad_batches=3)
        assert model.validated == crossings(model.journal, 25, "samples")
        assert len(model.validated) > 3


@pytest.mark.parametrize("n, last", [(50, True), (40, False)])
def test_a_run_that_ends_at_a_number_of_samples(n: int, last: bool, tmp_path: Path) -> None:
    def parts() -> list[Callback]:
        return [ValidateEvery(n), BatchLRScheduler(GROWING, 0.05, max_samples=150), CheckpointEvery(n, dirpath=tmp_path)]

    fit(model := Regression(), data(), *parts(), max_epochs=-1, enable_checkpointing=True)
    assert sum(model.sizes) == 150
    assert model.validated == crossings(model.journal, n, "samples")
    assert (model.validated[-1] == len(model.journal)) == last  # nothing else validates at the end
    first = min(tmp_path.iterdir(), key=step_of)
    fit(resumed := Regression(), data(), *parts()[:2], max_epochs=-1, ckpt_path=first)
    assert resumed.validated == model.validated
    assert equal(resumed, model)


def test_an_adaptive_scheduler() -> None:
    grows = AdaptiveBatchLRScheduler(6, 0.05, lambda *_: True, maximum=24, check_every=4)
    fit(model := Regression(), data(), ValidateEvery(25), grows)
    assert len(set(model.sizes)) > 3
    assert model.validated == crossings(model.journal, 25, "samples")


def test_manual_optimization(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Manual(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [super().configure_optimizers(), super().configure_optimizers()]

    saver = CheckpointEvery(25, dirpath=tmp_path, filename="{step}-{samples}")
    fit(
        model := Manual(), data(), saver, BatchLRScheduler(10, 0.05), ValidateEvery(25), enable_checkpointing=True, max_epochs=1
    )
    assert {path.name for path in tmp_path.iterdir()} == {"step=3-samples=30.ckpt", "step=5-samples=50.ckpt"}
    assert model.validated == [6, 10]  # two optimizers: Lightning counts twice
    assert not [warning for warning in recwarn if "pre-optimization" in str(warning.message)]


def test_a_stream_of_unknown_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(DATA[i] for i in range(N))

    class Streams(Stranger):
        def train_dataloader(self) -> Any:
            return DataLoader(Stream(), batch_size=self.hparams.batch_size)

    for n, unit in ((2, "epoch"), (50, "samples")):
        parts = [ValidateEvery(n, unit), BatchLRScheduler(8, 0.05)]  # type: ignore[arg-type]
        fit(model := Regression(), Streams(DATA, VALIDATION, eval_batch_size=4), *parts)
        assert model.validated == crossings(model.journal, n, unit)


def test_a_batch_that_is_none() -> None:
    def left_out(rows: list[Any]) -> Any:
        return None if rows[0][2] == 14 else torch.utils.data.default_collate(rows)

    model = Regression()
    trainer = Trainer(**quiet(callbacks=[ValidateEvery(21), scheduler := BatchLRScheduler(7, 0.05)], max_epochs=1))
    trainer.fit(model, DataLoader(DATA, batch_size=7, collate_fn=left_out), DataLoader(VALIDATION))
    assert scheduler.progress.samples == N  # the clock counts what the batch would have held
    assert len(model.validated) == N // 21


def test_crosses() -> None:
    assert crosses(Progress(), Progress(samples=20), 20, "samples")
    assert not crosses(Progress(samples=20), Progress(samples=39), 20, "samples")
    assert crosses(Progress(samples=20), Progress(samples=99), 20, "samples")


# --- resume


def step_of(path: Path | str) -> int:
    """The step in the name of a checkpoint."""
    return int(Path(path).stem.partition("step=")[2].partition("-")[0])


def go(model: Regression, n: int, unit: Any, way: int, *others: Callback, path: Any = None, **more: Any) -> Regression:
    schedule, cap, order, options = WAYS[way]
    torch.manual_seed(7)
    parts = [BatchLRScheduler(schedule, 0.05, cap), ValidateEvery(n, unit)]
    fit(model, data(), *parts[::order], *others, ckpt_path=path, enable_checkpointing=True, **options | more)
    return model


def drops() -> Regression:
    return Regression(nn.Dropout(0.3))


RESUMED: list[tuple[Any, int]] = [("samples", 20), ("samples", 61), ("step", 1), ("epoch", 1), ("epoch", 2), ("tokens", 111)]


@pytest.mark.parametrize("every, way", diagonal(RESUMED, range(3)), ids=str)
def test_a_resumed_run_takes_the_validations_that_are_left(every: Any, way: int, tmp_path: Path) -> None:
    (unit, n) = every
    steps = ModelCheckpoint(tmp_path, "{step:02d}", every_n_train_steps=1, save_top_k=-1)
    ours = CheckpointEvery(n, unit, tmp_path, "every-{step:02d}")
    whole = go(drops(), n, unit, way, steps, ours)
    total = max(batch.step for batch in whole.journal) + 1
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == total + len(whole.validated)
    for path in paths[::2]:
        step = int(path.stem[-2:])
        resumed = go(drops(), n, unit, way, path=path)
        assert equal(resumed, whole), path
        # saved before the validation of its step; a run that is over does not go on
        assert resumed.validated == [at for at in whole.validated if at >= step and step < total], path


@pytest.mark.quick(unit=["epoch"])
@pytest.mark.quick(unit=["samples"], hook=["on_validation_start"])
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("unit, n", [("samples", 20), ("epoch", 1)])
def test_from_a_checkpoint_of_another_hook(unit: str, n: int, hook: str, tmp_path: Path) -> None:
    class Saves(Callback):
        pass

    def save(trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step:02d}.ckpt")

    setattr(saves := Saves(), hook, save)
    whole = go(drops(), n, unit, 4, saves)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) >= 3
    for path in paths[:-1]:
        step = int(path.stem)
        resumed = go(drops(), n, unit, 4, path=path)
        assert equal(resumed, whole), path
        again = hook == "on_validation_start"  # a validation that did not end is taken again
        assert resumed.validated == [at for at in whole.validated if at > step - again], path


class Breaks(Regression):
    """Fails in the validation after a step."""

    def __init__(self, at: int) -> None:
        super().__init__(nn.Dropout(0.3))
        self.at = at

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.at and batch_idx == 1:
            raise KeyError("data")
        super().validation_step(batch, batch_idx)


def test_from_an_exception_in_a_validation(tmp_path: Path) -> None:
    small = {"eval_batch_size": 4}
    for unit, n in (("samples", 20), ("epoch", 1)):

        def parts(n: int = n, unit: Any = unit) -> list[Callback]:
            return [BatchLRScheduler(GROWING, 0.05), ValidateEvery(n, unit)]

        torch.manual_seed(7)
        fit(whole := drops(), data(**small), *parts())
        for at in whole.validated[:-1]:
            keeper = KeptOnException(tmp_path, f"{unit}-{at}")
            torch.manual_seed(7)
            with pytest.raises(KeyError):
                fit(Breaks(at), data(**small), *parts(), keeper, enable_checkpointing=True)
            fit(resumed := drops(), data(**small), *parts(), ckpt_path=tmp_path / f"{unit}-{at}.ckpt")
            assert equal(resumed, whole)
            assert resumed.validated == [step for step in whole.validated if step >= at]


def test_the_first_validation_of_a_resumed_run_is_logged_where_it_belongs(tmp_path: Path) -> None:
    def rows(folder: str, path: Any = None) -> list[Any]:
        logger = CSVLogger(tmp_path, name=folder, version="")
        saver = CheckpointEvery(20, dirpath=tmp_path / folder / "checkpoints", filename="{step}")
        go(drops(), 20, "samples", 0, saver, path=path, logger=logger, log_every_n_steps=1)
        logged = (row for row in csv_rows(tmp_path / folder / "metrics.csv") if row.get("val/loss"))
        return [(row["step"], row["samples"], row["val/loss"]) for row in logged]

    whole = rows("whole")
    # inside epochs, and at the ends of them
    paths = sorted((tmp_path / "whole" / "checkpoints").iterdir(), key=step_of)
    for number, path in enumerate(paths[:-1]):
        assert rows(f"from {path.stem}", path) == whole[number:], path


def test_checkpoints_go_on_where_they_were(tmp_path: Path) -> None:
    def saved(folder: Path, path: Any = None) -> tuple[Regression, list[str]]:
        torch.manual_seed(7)
        savers = CheckpointEvery(20, dirpath=folder), CheckpointEvery(1, "epoch", folder)
        folder.mkdir()
        fit(model := drops(), data(), BatchLRScheduler(GROWING, 0.05, 4), *savers, ckpt_path=path, enable_checkpointing=True)
        return model, sorted((each.name for each in folder.iterdir() if "-v1" not in each.name), key=step_of)

    whole, names = saved(tmp_path / "whole")
    assert list((tmp_path / "whole").glob("*-v1.ckpt"))  # where both save
    assert [*map(step_of, names)] == sorted(
        {step for way in ((20, "samples"), (1, "epoch")) for step in crossings(whole.journal, *way)}
    )
    for number, name in enumerate(names, 1):
        resumed, rest = saved(tmp_path / str(number), tmp_path / "whole" / name)
        assert equal(resumed, whole)
        assert rest == names[number:]


# --- beside others


class Notes(Callback):
    """Notes the hooks that come at the end of a step, and of validations."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append("step")

    def on_validation_start(self, *_: Any) -> None:
        self.seen.append("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seen.append("epoch")


def test_what_monitors_a_metric_acts_at_each_validation(tmp_path: Path) -> None:
    class Worse(Regression):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.log("worse", float(len(self.validated)))

    best = ModelCheckpoint(tmp_path, "{step}", monitor="worse", mode="max", save_top_k=-1)
    stops = EarlyStopping("worse", patience=3)
    notes = Notes()
    trainer = fit(
        model := Worse(),
        data(),
        BatchLRScheduler(GROWING, 0.05),
        ValidateEvery(20),
        stops,
        notes,
        best,
        enable_checkpointing=True,
    )
    assert {path.name for path in tmp_path.iterdir()} == {f"step={step}.ckpt" for step in model.validated}
    assert len(model.validated) == 4  # the best one, and three that are worse
    assert trainer.global_step == model.validated[-1] == crossings(model.journal, 20, "samples")[-1]
    assert notes.seen.index("validation") == model.validated[0]  # after `on_train_batch_end`


def test_a_plateau_scheduler_of_steps(tmp_path: Path) -> None:
    class Plateau(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, mode="max")
            config = {"scheduler": plateau, "interval": "step", "frequency": 1, "monitor": "val/loss", "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": config}

    def parts() -> list[Callback]:
        return [BatchLRScheduler(8), ValidateEvery(20), CheckpointEvery(20, dirpath=tmp_path, filename="{step}")]

    fit(whole := Plateau(), data(), *parts(), enable_checkpointing=True)
    assert whole.journal[-1].lr < whole.journal[0].lr
    first = whole.validated[0]
    resumed = Plateau()
    fit(resumed, data(), *parts()[:2], ckpt_path=tmp_path / f"step={first}.ckpt")
    assert resumed.rates == whole.rates[first:]
    assert equal(resumed, whole)


def test_the_latest_alone_and_the_last(tmp_path: Path) -> None:
    def left(name: str, **arguments: Any) -> list[str]:
        saver = CheckpointEvery(30, dirpath=tmp_path / name, **arguments)
        fit(Regression(), data(), BatchLRScheduler(16, 0.05), saver, enable_checkpointing=True, max_epochs=2)
        return sorted(path.name for path in (tmp_path / name).iterdir())

    whole = left("all", save_last=True)
    assert whole[-1] == "last.ckpt"
    assert len(whole) == 1 + 4  # multiples of 30 in 122
    assert left("latest", save_top_k=1) == [whole[-2]]
    assert left("last", save_top_k=0, save_last=True) == ["last.ckpt"]
    assert left("named", filename="{tokens}") == sorted(f"tokens={samples * TOKENS}.ckpt" for samples in (32, 61, 93, 122))
    counts = torch.load(tmp_path / "all" / "last.ckpt")["callbacks"]
    assert sum(key.startswith("CheckpointEvery") for key in counts) == 1
    last = fit(Regression(), data(), BatchLRScheduler(16, 0.05), ckpt_path=tmp_path / "all" / "last.ckpt", max_epochs=2)
    assert last.global_step == 8


@pytest.mark.parametrize("options, validated", [({"fast_dev_run": 3}, [3]), ({"limit_val_batches": 0}, [])])
def test_a_smoke_test_and_no_validation(options: dict[str, Any], validated: list[int], tmp_path: Path) -> None:
    parts = [BatchLRScheduler(GROWING, 0.05), ValidateEvery(20), CheckpointEvery(20, dirpath=tmp_path / "none")]
    fit(model := Regression(), data(), *parts, enable_checkpointing=True, **options)
    assert model.validated == validated
    assert (tmp_path / "none").exists() == ("fast_dev_run" not in options)
    for path in (tmp_path / "none").glob("*"):  # where there are no validations, none is missed
        assert torch.load(path)["callbacks"]["ValidateEvery"] == {"due": False}


def test_nothing_of_it_is_left_after_an_exception() -> None:
    trainer = Trainer(**quiet(callbacks=[BatchLRScheduler(8, 0.05), ValidateEvery(20)], max_epochs=1))
    with pytest.raises(KeyError):
        trainer.fit(Breaks(3), data(eval_batch_size=4))
    assert trainer.check_val_every_n_epoch == 1
    assert "_should_check_val_fx" not in vars(trainer.fit_loop.epoch_loop)


def test_a_second_fit_of_the_same_trainer_goes_on() -> None:
    model = Regression()
    trainer = Trainer(**quiet(callbacks=[BatchLRScheduler(8, 0.05), ValidateEvery(1, "epoch")], max_epochs=1))
    trainer.fit(model, data())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, data())
    assert model.validated == [8, 16, 24]


# --- several processes


def share(folder: Path, cap: Any, path: Any = None, **options: Any) -> tuple[list[int], list[str], list[float]]:
    """A fit in one of several processes: its validations, its checkpoints and its weights."""
    parts = [ValidateEvery(20), BatchLRScheduler(GROWING, 0.05, cap), CheckpointEvery(20, dirpath=folder)]
    trainer = fit(model := Regression(), data(), *parts, ckpt_path=path, enable_checkpointing=True, **options)
    trainer.strategy.barrier()
    names = sorted((path.name for path in folder.iterdir()), key=step_of)
    return model.validated, names, torch.cat([each.detach().flatten() for each in model.parameters()]).tolist()


@pytest.mark.parametrize("cap", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_agree(cap: Any, pair: Pair, tmp_path: Path) -> None:
    two = {"devices": 2, "strategy": "ddp"}
    validated, names, weights = share(tmp_path / "one", cap)
    whole = pair(share, tmp_path / "two", cap, **two)
    assert [process[:2] for process in whole] == [(validated, names)] * 2
    assert whole[0][2] == pytest.approx(weights, rel=1e-12, abs=1e-13)
    path = tmp_path / "two" / names[2]
    for validated_again, names_again, weights_again in pair(share, tmp_path / "resumed", cap, path, **two):
        assert validated_again == validated[2:]
        assert names_again == names[3:]
        assert weights_again == whole[0][2]


# --- refusals


class NoValidation(Recorder):
    validation_step = LightningModule.validation_step


def refused(*callbacks: Callback, model: Any = None, given: Any = None, **options: Any) -> Callable[[], object]:
    return lambda: fit(model or Regression(), given or data(), *callbacks, **options)


def scheduler() -> BatchLRScheduler:
    return BatchLRScheduler(8, 0.05)


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "not whole": (lambda: ValidateEvery(2.5), ValueError, r"`n=2.5` must be 1 or more, as a whole number"),  # type: ignore[arg-type]
    "not above 0": (lambda: CheckpointEvery(0), ValueError, r"`n=0` must be 1 or more, as a whole number"),
    "unit": (lambda: ValidateEvery(2, "batches"), ValueError, "unknown unit 'batches'; write one of"),  # type: ignore[arg-type]
    "unit of checkpoints": (lambda: CheckpointEvery(2, "s"), ValueError, "unknown unit 's'"),  # type: ignore[arg-type]
    "alone": (refused(ValidateEvery(2)), MisconfigurationException, "ValidateEvery reads the clock of a BatchLRScheduler"),
    "alone, checkpoints": (
        refused(CheckpointEvery(2), enable_checkpointing=True),
        MisconfigurationException,
        "CheckpointEvery reads the clock of a BatchLRScheduler",
    ),
    "two": (refused(ValidateEvery(2), ValidateEvery(3), scheduler()), MisconfigurationException, "there are two ValidateEvery"),
    "interval": (
        refused(ValidateEvery(2), scheduler(), val_check_interval=0.5),
        MisconfigurationException,
        "would both decide when to validate",
    ),
    "interval of one batch": (
        refused(ValidateEvery(2), scheduler(), val_check_interval=1),
        MisconfigurationException,
        "would both decide when to validate",
    ),
    "epochs": (
        refused(ValidateEvery(2), scheduler(), check_val_every_n_epoch=2),
        MisconfigurationException,
        "`check_val_every_n_epoch=2`",
    ),
    "tokens": (
        refused(ValidateEvery(9, "tokens"), scheduler(), given=own(DATA, VALIDATION)),
        MisconfigurationException,
        r"`ValidateEvery\(9, unit='tokens'\)`: the number of tokens of an example is not known",
    ),
    "no validation_step": (
        refused(ValidateEvery(2), scheduler(), model=NoValidation(nn.Linear(3, 1).double())),
        MisconfigurationException,
        "needs a method `validation_step` of the LightningModule",
    ),
    "no validation loader": (
        refused(ValidateEvery(2), scheduler(), given=DataLoader(DATA)),
        MisconfigurationException,
        "needs a method `validation_step` of the LightningModule and a validation loader",
    ),
    "no validation set": (
        refused(ValidateEvery(2), scheduler(), given=own(DATA)),
        MisconfigurationException,
        "has nothing to validate with",
    ),
    "early stopping first": (
        refused(EarlyStopping("val/loss"), ValidateEvery(2), scheduler()),
        MisconfigurationException,
        "write ValidateEvery first",
    ),
    "steps": (
        lambda: CheckpointEvery(2, every_n_train_steps=5),
        MisconfigurationException,
        r"CheckpointEvery\(2\) and `every_n_train_steps=5` would both decide when to save",
    ),
    "epochs of checkpoints": (lambda: CheckpointEvery(2, every_n_epochs=1), MisconfigurationException, "`every_n_epochs=1`"),
    "monitor": (
        lambda: CheckpointEvery(2, monitor="val/loss"),
        MisconfigurationException,
        "saves before the validation of its step",
    ),
    "the best three": (lambda: CheckpointEvery(2, save_top_k=3), MisconfigurationException, "No quantity for top_k to track"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str) -> None:
    attempt, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        attempt()


def test_early_stopping_may_stand_first_where_it_says_when_it_looks() -> None:
    stops = EarlyStopping("val/loss", check_on_train_epoch_end=False)
    fit(model := Regression(), data(), stops, ValidateEvery(20), scheduler(), max_epochs=1)
    assert model.validated == crossings(model.journal, 20, "samples")
