from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD
from torch.utils.data import DataLoader

from harness import data
from harness.data import Stranger, StrangerWithAttribute, regression
from harness.files import csv_rows, flat, logged
from harness.fits import fit, trained
from harness.loops import train_by_hand
from harness.modules import Recorder, assert_close, equal
from harness.tiers import diagonal
from lightning_bsl import BatchLRScheduler, BatchSizeDataModule
from lightning_bsl.callbacks.batch_lr import plan_fit
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.schedules import (
    Constant,
    Cosine,
    Exponential,
    Horizon,
    JointSchedule,
    Milestones,
    Polynomial,
    Progress,
    SqrtScaling,
    Warmup,
)

N = 70
DATA, VALIDATION = regression(N, dtype=torch.float32), regression(9, dtype=torch.float32)
RATIO = 0.3


def two_groups(parameters: list[torch.nn.Parameter]) -> SGD:
    weight, bias = parameters
    return SGD([{"params": [weight], "lr": 0.02}, {"params": [bias], "lr": 0.02 * RATIO}], momentum=0.9)


class Regression(Recorder):
    """Linear, with two param groups and momentum."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(3, 1), two_groups)
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, 0.5)


def ratios(model: Recorder) -> list[float]:
    """The second group's rate over the first's, batch by batch."""
    return [batch.lrs[1] / batch.lr for batch in model.journal]


def own(**arguments: Any) -> BatchSizeDataModule:
    return data.own(DATA, VALIDATION, **{"seed": 2} | arguments)


def stranger(**arguments: Any) -> Stranger:
    """As people write them."""
    return Stranger(DATA, VALIDATION, **{"eval_batch_size": 4, "shuffle": True} | arguments)


class Step(NamedTuple):
    indices: list[int]
    batch_size: int
    lr: float
    samples: int


def expected(schedule: JointSchedule, horizon: Horizon, limit: float = 1.0, seed: int = 2) -> list[list[Step]]:
    """What each step of each epoch should be: the schedules asked step by step along the sampler's permutation."""
    order = GlobalBatchSampler(N, 1, seed=seed).permutation
    epochs: list[list[Step]] = []
    clock = Progress(horizon=horizon)
    while clock.epoch < horizon.epoch and clock.step < horizon.step:
        left, steps = order(clock.epoch), []
        while left:
            batch_size, lr = schedule(clock)
            clock = clock.advance(len(left[:batch_size]))
            steps.append(Step(left[:batch_size], batch_size, lr, clock.samples))
            left = left[batch_size:]
        kept = steps[: int(limit * len(steps)) if isinstance(limit, float) else limit]
        kept = kept[: horizon.step - sum(map(len, epochs))]
        epochs.append(kept)
        clock = Progress(clock.epoch + 1, sum(map(len, epochs)), kept[-1].samples, horizon)
    return epochs


# --- (a) BatchSizeDataModule: exact, inside an epoch too --------------------------------------------------------------------

SCHEDULES = {
    "epoch": (Exponential(8, 2, maximum=64), Exponential(0.01, 1.4)),
    "step": (Polynomial(5, slope=3, every=4, unit="step"), Cosine(0.02, end=0.001, unit="step")),
    "samples": (Milestones([4, 9, 30], at=[33, 95], unit="samples"), Cosine(0.02, end=0.001, unit="samples")),
    "function": (lambda progress: 3 + 2 * progress.step, lambda progress: 0.01 / (1 + progress.samples)),
    "rule": (Exponential(6, 1.5, every=3, unit="step", maximum=40), SqrtScaling(0.01, 8)),
}
BOUNDS: list[dict[str, Any]] = [
    {"max_epochs": 3},
    {"max_epochs": 3, "limit_train_batches": 0.5},
    {"max_epochs": 3, "limit_train_batches": 2},
    {"max_epochs": 3, "limit_train_batches": 1},
    {"max_epochs": -1, "max_steps": 11},
    {"max_epochs": 2, "max_steps": 100},
]


CASES = [pytest.param(*pair.values, 0, marks=pair.marks) for pair in diagonal(list(SCHEDULES), BOUNDS)] + [
    ("samples", BOUNDS[1], 2),  # starting workers takes its time
    pytest.param("step", BOUNDS[0], 2, marks=pytest.mark.slow),
    pytest.param("function", BOUNDS[4], 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "bounds", "workers"), CASES, ids=str)
def test_every_step_is_the_schedules(name: str, bounds: dict[str, Any], workers: int, tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(*SCHEDULES[name])
    logger = CSVLogger(tmp_path, name="", version="")
    model = trained(Regression(), own(num_workers=workers), scheduler, logger=logger, log_every_n_steps=1, **bounds)
    assert scheduler.plan is not None
    epochs = expected(JointSchedule(*SCHEDULES[name]), scheduler.plan.horizon, bounds.get("limit_train_batches", 1.0))
    steps = flat(epochs)

    assert [(batch.epoch, batch.examples, batch.lr) for batch in model.journal] == [
        (epoch, step.indices, step.lr) for epoch, kept in enumerate(epochs) for step in kept
    ]
    assert ratios(model) == pytest.approx([RATIO] * len(steps))
    assert scheduler.progress.samples == steps[-1].samples
    assert scheduler.progress.step == len(steps)
    # the plan promised it
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(steps), steps[-1].samples)
    assert [s.batch_size for s in scheduler.plan.stages for _ in range(s.steps)] == [s.batch_size for s in steps]
    # and the log tells it
    rows = [row for row in csv_rows(tmp_path / "metrics.csv") if row["batch_size"]]
    assert {int(row["step"]) for row in rows} == {*range(len(steps))}
    for row in rows:
        step = steps[int(row["step"])]
        assert [int(float(row["batch_size"])), int(float(row["samples"]))] == [step.batch_size, step.samples]
        assert float(row["lr"]) == step.lr
    # a plain loop over the same steps arrives at the same weights, bit for bit
    train_by_hand(by_hand := Regression(), DATA, [(step.indices, step.lr) for step in steps])
    assert equal(model, by_hand)


def test_the_logged_values_stand_beside_the_epochs_metrics(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(Exponential(8, 2), Exponential(0.01, 1.4))
    fit(Regression(), own(), scheduler, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1000)
    rows = [row for row in csv_rows(tmp_path / "metrics.csv") if row["val/loss"]]
    assert [float(row["batch_size"]) for row in rows] == [8, 16, 32]
    assert [float(row["lr"]) for row in rows] == [0.01, 0.01 * 1.4, 0.01 * 1.4**2]
    assert [float(row["samples"]) for row in rows] == [N, 2 * N, 3 * N]


def test_the_counts_of_samples_are_exact_beyond_float32(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(7, 0.01)
    start = 2**24 + 1  # float32 cannot hold it

    class Late(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            clock = {"epoch": 0, "step": 0, "samples": start}
            scheduler.load_state_dict({"epoch_start": clock, "progress": clock})

    logger = CSVLogger(tmp_path, name="", version="")
    fit(Regression(), own(), Late(), scheduler, logger=logger, log_every_n_steps=1, max_epochs=1)
    assert {int(samples) for samples in logged(tmp_path, "samples").values()} == {start + 7 * step for step in range(1, 11)}


def test_validation_runs_every_epoch_while_the_batch_grows_and_shrinks() -> None:
    model = trained(Regression(), own(), BatchLRScheduler(Milestones([4, 32, 8], at=[1, 2])))
    assert model.validated == [18, 18 + 3, 18 + 3 + 9]
    assert model.announced == [18, 3, 9]


# --- (b) somebody else's DataModule, or LightningModule ---------------------------------------------------------------------


class WithLoaders(Regression):
    """No DataModule at all."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(DATA, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(VALIDATION, batch_size=4)


class Bar(ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.totals: list[float] = []
        self.last: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.totals.append(self.total_train_batches)
        self.last.append(0)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        assert self.total_train_batches == self.totals[-1]
        self.last[-1] += 1


STRANGERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "hyperparameters": lambda: (stranger(), Regression()),
    "attribute": lambda: (StrangerWithAttribute(DATA, VALIDATION, eval_batch_size=4, shuffle=True), Regression()),
    "module": lambda: (None, WithLoaders()),
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("reload_every", [0, 2])
def test_drop_in(kind: str, reload_every: int) -> None:
    torch.manual_seed(0)
    datamodule, model = STRANGERS[kind]()
    bar, scheduler = Bar(), BatchLRScheduler(Exponential(16, 2), Exponential(0.01, 1.4))
    options = {"enable_progress_bar": True, "reload_dataloaders_every_n_epochs": reload_every}
    trainer = fit(model, datamodule, scheduler, bar, **options)
    batches = [math.ceil(N / size) for size in (16, 32, 64)]
    for epoch, (size, count) in enumerate(zip((16, 32, 64), batches)):
        steps = [batch for batch in model.journal if batch.epoch == epoch]
        assert [len(step.examples) for step in steps] == [size] * (count - 1) + [N - size * (count - 1)]
        assert sorted(flat(step.examples for step in steps)) == list(range(N))
        assert {step.lr for step in steps} == {0.01 * 1.4**epoch}
    assert ratios(model) == pytest.approx([RATIO] * len(model.journal))
    assert bar.totals == bar.last == model.announced == batches
    assert len(model.validated) == 3
    assert trainer.reload_dataloaders_every_n_epochs == reload_every
    assert scheduler.progress.samples == scheduler.plan.samples == 3 * N
    assert scheduler.progress.step == scheduler.plan.steps == sum(batches)
    # Lightning draws from the global generator too, so the loop by hand is given the batches that came
    train_by_hand(by_hand := Regression(), DATA, [(step.examples, step.lr) for step in model.journal])
    assert equal(model, by_hand)


def test_drop_in_with_accumulation() -> None:
    # 24 examples a step, in two batches of 12
    scheduler = BatchLRScheduler(Milestones([24, 40], at=[1]), Exponential(0.01, 1.4))
    model = trained(Regression(), stranger(), scheduler, accumulate_grad_batches=2, max_epochs=2)
    assert model.sizes == [12] * 5 + [10] + [20] * 3 + [10]
    assert scheduler.progress.step == scheduler.plan.steps == 3 + 2
    assert scheduler.progress.samples == scheduler.plan.samples == 2 * N


def test_drop_in_grows_inside_an_epoch() -> None:
    scheduler = BatchLRScheduler(Milestones([8, 32], at=[4], unit="step"), Cosine(0.01, end=0.001, unit="step"))
    model = trained(Regression(), stranger(), scheduler, max_epochs=2)
    assert model.sizes == [8] * 4 + [32, 6] + [32, 32, 6]
    assert scheduler.plan.steps == len(model.sizes)
    assert [(stage.batch_size, stage.steps) for stage in scheduler.plan.stages] == [(8, 4), (32, 5)]
    assert model.rates == pytest.approx([0.001 + 0.0045 * (1 + math.cos(math.pi * i / 9)) for i in range(9)])


def test_drop_in_plans_a_loader_that_drops_its_last_batch() -> None:
    scheduler = BatchLRScheduler(Exponential(16, 2), Cosine(0.01, end=0.001, unit="samples"))
    model = trained(Regression(), stranger(drop_last=True), scheduler, max_epochs=2)
    assert scheduler.plan.steps == len(model.journal) == 4 + 2
    assert scheduler.plan.samples == scheduler.progress.samples == 64 + 64


def test_drop_in_plans_limited_batches_with_accumulation() -> None:
    # a limit counts what the loader gives: 4 batches of 8 are 2 steps of 16
    scheduler = BatchLRScheduler(16, 0.01)
    fit(Regression(), stranger(), scheduler, max_epochs=2, limit_train_batches=4, accumulate_grad_batches=2)
    assert scheduler.plan.steps == scheduler.progress.step == 4


# --- (c) what cannot work is refused before the first step ------------------------------------------------------------------


class Ignoring(LightningDataModule):
    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(DATA, batch_size=10)


class WithoutSize(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(DATA, batch_size=16)


class WithScheduler(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Another(BatchLRScheduler):
    """Of two callbacks of the very same class Lightning complains itself."""


class ZeroRate(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([{"params": [self.net.weight], "lr": 0.0}, {"params": [self.net.bias], "lr": 0.1}])


def never_trains(
    error: type[Exception], message: str, datamodule: Any, *callbacks: Callback, model: Any = None, **arguments: Any
) -> None:
    model = model or Regression()
    with pytest.raises(error, match=f"(?s){message}"):
        fit(model, datamodule, *callbacks, **arguments)
    assert model.journal == []


GROWING = (Exponential(16, 2, maximum=64), Exponential(0.01, 1.4))


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("two BatchLRScheduler.*keep one", lambda: (own(), BatchLRScheduler(8), Another(8))),
        (
            "GradientAccumulationScheduler.*remove it and write.*`BatchLRScheduler",
            lambda: (own(), BatchLRScheduler(*GROWING), GradientAccumulationScheduler({0: 1, 1: 2})),
        ),
        ("BatchSizeFinder.*remove it.*`maximum", lambda: (own(), BatchLRScheduler(*GROWING), BatchSizeFinder())),
    ],
    ids=["two", "accumulation", "finder"],
)
def test_refusals(message: str, make: Callable[[], tuple[Any, ...]]) -> None:
    never_trains(MisconfigurationException, message, *make())


LOADERS: dict[str, Callable[[], Any]] = {
    "a size written into the DataModule": Ignoring,
    "a size nobody can see": WithoutSize,
    "given to fit": lambda: DataLoader(DATA, batch_size=16),
}


@pytest.mark.parametrize("loaders", LOADERS)
@pytest.mark.parametrize("model", [Regression, WithLoaders])
def test_loaders_that_have_no_batch_size_to_set(model: type[Regression], loaders: str) -> None:
    # also beside a module that has a `train_dataloader` of its own, which Lightning then does not call
    trained_model = trained(model(), LOADERS[loaders](), BatchLRScheduler(*GROWING))
    assert trained_model.sizes == [16] * 4 + [6] + [32, 32, 6] + [64, 6]


@pytest.mark.parametrize("datamodule", [own, stranger])
def test_two_hands_on_the_learning_rate(datamodule: Callable[[], Any]) -> None:
    message = r"learning-rate scheduler \(StepLR\).*Return the optimizer alone, or write `lr=None`"
    never_trains(MisconfigurationException, message, datamodule(), BatchLRScheduler(*GROWING), model=WithScheduler())


def test_a_first_group_without_a_rate() -> None:
    never_trains(
        MisconfigurationException,
        r"lr=0.0.*give it a learning rate above 0",
        own(),
        BatchLRScheduler(*GROWING),
        model=ZeroRate(),
    )


def test_accumulation_with_an_exact_datamodule() -> None:
    message = r"`accumulate_grad_batches=2`.*Write `accumulate_grad_batches=1`"
    never_trains(MisconfigurationException, message, own(), BatchLRScheduler(*GROWING), accumulate_grad_batches=2)


def test_a_step_need_not_split_evenly() -> None:
    model = trained(Regression(), stranger(shuffle=False), BatchLRScheduler(15), accumulate_grad_batches=2, max_epochs=1)
    assert model.sizes == [8, 7] * 4 + [8, 2]
    train_by_hand(by_hand := Regression(), DATA, [list(range(i, min(i + 15, N))) for i in range(0, N, 15)])
    assert_close(model, by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("datamodule", [own, stranger])
@pytest.mark.parametrize(
    ("schedule", "message", "arguments"),
    [
        ((lambda p: 16 - 8 * p.epoch, 0.01), r"batch size is 0 at epoch=2.*`minimum=1`", {}),
        ((Milestones([16, N, N + 1], at=[1, 2]), 0.01), r"batch size is 71 at epoch=2.*`maximum` of 70", {}),
        ((16, lambda p: 0.02 - 0.01 * p.epoch), r"learning rate is 0.0 at epoch=2", {}),
        ((16, Milestones([0.1, -0.1], at=[2])), r"learning rate is -0.1 at epoch=2", {}),
        ((16, lambda p: math.nan if p.epoch == 2 else 0.1), r"learning rate is nan at epoch=2", {}),
        ((16, lambda p: math.nan if p.step == 9 else 0.1), r"learning rate is nan at epoch=1, step=9", {}),
        ((16, Warmup(0.01, Constant(0.1), over=3)), r"takes 3 epochs.*only 3; write a shorter `over`", {}),
        ((Warmup(2, Constant(16), over=3), 0.1), r"takes 3 epochs.*only 3; write a shorter `over`", {}),
        ((16, Cosine(0.1)), r"length in unit 'epoch', which is not known.*`total=...`.*`max_epochs`", {"max_epochs": -1}),
        ((Exponential(16, 2, every=0.5), 0.1), r"length in unit 'epoch'.*`max_epochs`", {"max_epochs": -1}),
        ((16, Cosine(0.1, unit="step")), r"length in unit 'step'.*`max_steps`", {"max_epochs": -1}),
    ],
)  # fmt: skip
def test_bad_schedules(datamodule: Callable[[], Any], schedule: Any, message: str, arguments: dict[str, Any]) -> None:
    never_trains(ValueError, message, datamodule(), BatchLRScheduler(*schedule), **arguments)


@pytest.mark.parametrize("datamodule", [own, stranger])
@pytest.mark.parametrize("bounds", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 4 + 2 + 1}])
def test_a_schedule_may_be_invalid_beyond_the_run(datamodule: Callable[[], Any], bounds: dict[str, int]) -> None:
    # 18, 36, 72 > 70 examples; a cosine that is 0 at the end; a warm-up target that is never left
    scheduler = BatchLRScheduler(Exponential(18, 2, maximum=70), Cosine(0.1, total=3))
    assert len(trained(Regression(), datamodule(), scheduler, **bounds).journal) == 4 + 2 + 1
    scheduler = BatchLRScheduler(Exponential(17.5, 2), Cosine(0.1, unit="step", total=4 + 2 + 1))
    assert trained(Regression(), datamodule(), scheduler, **bounds).sizes == [18] * 3 + [16] + [35, 35] + [70]


# --- (d) resume --------------------------------------------------------------------------------------------------------------


def in_order() -> Stranger:
    return stranger(shuffle=False)  # torch's own shuffling cannot be resumed


RESUMED = [
    (name, on_epoch_end, datamodule)
    for name in ("epoch", "step", "samples")
    for on_epoch_end in (None, True, False)
    for datamodule in (own, in_order)
] + [pytest.param("step", None, lambda: own(num_workers=2), marks=pytest.mark.slow)]


@pytest.mark.quick(name=["samples"])
@pytest.mark.parametrize(("name", "on_epoch_end", "datamodule"), RESUMED)
def test_resume_from_the_end_of_an_epoch(
    name: str, on_epoch_end: bool | None, datamodule: Callable[[], Any], tmp_path: Path
) -> None:
    def go(ckpt_path: Path | None) -> tuple[Regression, BatchLRScheduler]:
        checkpoints = ModelCheckpoint(
            tmp_path / ("resumed" if ckpt_path else "whole"),
            filename="{epoch}",
            save_top_k=-1,
            save_last=True,
            save_on_train_epoch_end=on_epoch_end,
        )
        scheduler = BatchLRScheduler(*SCHEDULES[name])
        options = {"enable_checkpointing": True, "max_epochs": 4, "ckpt_path": ckpt_path}
        return trained(Regression(), datamodule(), scheduler, checkpoints, **options), scheduler

    whole, clock = go(None)
    for epoch in (0, 1, 2):
        model, scheduler = go(tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert model.journal == [batch for batch in whole.journal if batch.epoch > epoch]
        assert equal(model, whole)
        assert scheduler.progress == clock.progress
        assert scheduler.plan == clock.plan
        assert len(model.validated) == 4 - epoch - 1


@pytest.mark.quick(on_the_last_batch=[True], every=[1])
@pytest.mark.quick(on_the_last_batch=[False], every=[6])
@pytest.mark.parametrize("every", [1, 6])
@pytest.mark.parametrize("on_the_last_batch", [False, True])
@pytest.mark.parametrize("name", ["epoch", "step", "samples"])
def test_resume_from_a_step(name: str, on_the_last_batch: bool, every: int, tmp_path: Path) -> None:
    def go(folder: str, ckpt_path: Path | None) -> tuple[Regression, BatchLRScheduler]:
        checkpoints = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        scheduler = BatchLRScheduler(*SCHEDULES[name])
        options = {"enable_checkpointing": True, "ckpt_path": ckpt_path}
        return trained(Regression(), own(), scheduler, checkpoints, **options), scheduler

    whole, clock = go("whole", None)
    epochs = [batch.epoch for batch in whole.journal]
    steps = [step for step in range(1, len(epochs)) if (epochs[step] > epochs[step - 1]) == on_the_last_batch]
    for step in steps[::every]:
        model, scheduler = go(f"from {step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert model.journal == whole.journal[step:]
        assert equal(model, whole)
        assert scheduler.progress == clock.progress


def test_resume_a_finished_run_for_longer(tmp_path: Path) -> None:
    schedule = (Exponential(8, 1.5, every=7, unit="step", maximum=60), Exponential(0.01, 1.1, every=7, unit="step"))
    checkpoints = ModelCheckpoint(tmp_path, save_last=True)
    fit(Regression(), own(), BatchLRScheduler(*schedule), checkpoints, enable_checkpointing=True, max_epochs=2)
    model = trained(Regression(), own(), BatchLRScheduler(*schedule), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    whole = trained(Regression(), own(), BatchLRScheduler(*schedule), max_epochs=4)
    assert model.journal == [batch for batch in whole.journal if batch.epoch > 1]
    assert equal(model, whole)


def test_the_state_is_plain(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(*GROWING)
    fit(Regression(), own(), scheduler)
    assert scheduler.state_dict()["progress"] == {"epoch": 3, "step": 5 + 3 + 2, "samples": 3 * N}
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == scheduler.state_dict()


# --- (e) beside other habits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datamodule", [own, stranger])
@pytest.mark.parametrize("runs", [True, 3])
def test_fast_dev_run(datamodule: Callable[[], Any], runs: int) -> None:
    scheduler = BatchLRScheduler(Warmup(4, then=Constant(64), over=0.5), Warmup(0.01, then=Cosine(0.1), over=5))
    model = trained(Regression(), datamodule(), scheduler, fast_dev_run=runs, max_epochs=10)
    assert (model.sizes, model.rates) == ([4] * int(runs), [0.01] * int(runs))


@pytest.mark.parametrize("datamodule", [own, stranger])
def test_several_fits_with_one_callback(datamodule: Callable[[], Any]) -> None:
    scheduler, same = BatchLRScheduler(*GROWING), datamodule()
    for _ in range(3):
        model = trained(Regression(), same, scheduler)
        firsts = [next(batch for batch in model.journal if batch.epoch == epoch) for epoch in range(3)]
        assert [(len(step.examples), step.lr) for step in firsts] == [(16, 0.01), (32, 0.01 * 1.4), (64, 0.01 * 1.4**2)]
        assert scheduler.progress.samples == 3 * N


@pytest.mark.parametrize("datamodule", [own, in_order])
def test_a_trainer_that_fits_on(datamodule: Callable[[], Any]) -> None:
    whole = trained(Regression(), datamodule(), BatchLRScheduler(*GROWING))
    same, model = datamodule(), Regression()
    trainer = fit(model, same, BatchLRScheduler(*GROWING), max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, datamodule=same)
    assert (model.examples, model.rates) == (whole.examples, whole.rates)


def test_learning_rate_monitor_before_the_scheduler(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(SCHEDULES["step"][0], lambda progress: 0.01 / (1 + progress.step))
    monitor, logger = LearningRateMonitor(logging_interval="step"), CSVLogger(tmp_path, name="", version="")
    model = trained(Regression(), own(), monitor, scheduler, logger=logger, log_every_n_steps=1)
    assert logged(tmp_path, "lr-SGD/pg1") == dict(enumerate(model.rates))


@pytest.mark.parametrize("datamodule", [own, stranger])
def test_rates_left_to_the_module(datamodule: Callable[[], Any], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    scheduler = BatchLRScheduler(GROWING[0])
    model = trained(WithScheduler(), datamodule(), scheduler, logger=logger, log_every_n_steps=1)
    assert model.rates == [0.02] * 5 + [0.01] * 3 + [0.005] * 2
    assert model.sizes == [16] * 4 + [6] + [32, 32, 6] + [64, 6]
    assert logged(tmp_path, "lr") == dict(enumerate(model.rates))


def test_plan_fit_reads_the_trainers_arguments() -> None:
    schedule = JointSchedule(16, 0.1)
    assert plan_fit(schedule, N, max_epochs=3).steps == 15
    assert plan_fit(schedule, N, max_epochs=-1, max_steps=7).steps == 7
    assert plan_fit(schedule, N, max_epochs=3, max_steps=7).steps == 7
    assert plan_fit(schedule, N, max_epochs=3, limit_train_batches=0.5).steps == 6
    assert plan_fit(schedule, N, max_epochs=3, limit_train_batches=2).steps == 6
    assert plan_fit(schedule, N).steps == 5000  # Lightning's 1000 epochs
    for endless in ({"max_epochs": -1}, {"max_epochs": 0}, {"max_steps": 0}):
        assert plan_fit(schedule, N, **endless) is None
