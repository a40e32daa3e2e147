import csv
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
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

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
from tests.helpers import flat, quiet

N = 70
RATIO = 0.3


def examples(size: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, 3, generator=generator)
    return TensorDataset(x, x.sum(dim=1, keepdim=True) + torch.randn(size, 1, generator=generator), torch.arange(size))


class Seen(NamedTuple):
    epoch: int
    indices: list[int]
    lr: float
    ratio: float


class Regression(LightningModule):
    """Two param groups, momentum; notes what it is trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(3, 1)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.fill_(0.5)
        self.seen: list[Seen] = []
        self.batches_announced: list[int] = []
        self.validations = 0

    def on_train_epoch_start(self) -> None:
        self.batches_announced.append(self.trainer.num_training_batches)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y, index = batch
        first, second = self.trainer.optimizers[0].param_groups
        self.seen.append(Seen(self.current_epoch, index.tolist(), first["lr"], second["lr"] / first["lr"]))
        return torch.nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: list[Tensor]) -> None:
        x, y, _ = batch
        self.log("val/loss", torch.nn.functional.mse_loss(self.net(x), y))

    def on_validation_epoch_end(self) -> None:
        self.validations += 1

    def configure_optimizers(self) -> Any:
        return optimizer_for(self.net)


def optimizer_for(net: torch.nn.Linear) -> torch.optim.SGD:
    groups = [{"params": [net.weight], "lr": 0.02}, {"params": [net.bias], "lr": 0.02 * RATIO}]
    return torch.optim.SGD(groups, momentum=0.9)


def train_by_hand(steps: list[tuple[list[int], float]]) -> torch.nn.Linear:
    """A plain PyTorch loop: indices and learning rate of each step."""
    data, net = examples(), Regression().net
    optimizer = optimizer_for(net)
    ratio = 0.02 * RATIO / 0.02
    for indices, lr in steps:
        for group, factor in zip(optimizer.param_groups, (1.0, ratio)):
            group["lr"] = lr * factor
        x, y, _ = data[indices]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return net


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def own(**arguments: Any) -> BatchSizeDataModule:
    return BatchSizeDataModule(examples(), examples(9), **({"seed": 2} | arguments))


def fit(datamodule: Any, *callbacks: Callback, model: Any = None, ckpt_path: Any = None, **arguments: Any) -> Any:
    model = model or Regression()
    if not arguments.keys() & {"max_epochs", "max_steps"}:
        arguments["max_epochs"] = 3
    trainer = Trainer(**quiet(callbacks=list(callbacks), **arguments))
    trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return model


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


CASES = [(name, bounds, 0) for name in SCHEDULES for bounds in BOUNDS] + [
    ("step", BOUNDS[0], 2),  # starting workers takes its time
    ("samples", BOUNDS[1], 2),
    ("function", BOUNDS[4], 2),
]


@pytest.mark.parametrize(("name", "bounds", "workers"), CASES, ids=str)
def test_every_step_is_the_schedules(name: str, bounds: dict[str, Any], workers: int, tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(*SCHEDULES[name])
    logger = CSVLogger(tmp_path, name="", version="")
    model = fit(own(num_workers=workers), scheduler, logger=logger, log_every_n_steps=1, **bounds)
    assert scheduler.plan is not None
    epochs = expected(JointSchedule(*SCHEDULES[name]), scheduler.plan.horizon, bounds.get("limit_train_batches", 1.0))
    steps = flat(epochs)

    assert [(seen.epoch, seen.indices, seen.lr) for seen in model.seen] == [
        (epoch, step.indices, step.lr) for epoch, kept in enumerate(epochs) for step in kept
    ]
    assert [seen.ratio for seen in model.seen] == pytest.approx([RATIO] * len(model.seen))
    assert scheduler.progress.samples == steps[-1].samples
    assert scheduler.progress.step == len(steps)
    # the plan promised it
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(steps), steps[-1].samples)
    assert [s.batch_size for s in scheduler.plan.stages for _ in range(s.steps)] == [s.batch_size for s in steps]
    # and the log tells it
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["batch_size"]]
    logged = {int(row["step"]): row for row in rows}
    assert sorted(logged) == list(range(len(steps)))
    for row in rows:
        step = steps[int(row["step"])]
        assert [int(float(row["batch_size"])), int(float(row["samples"]))] == [step.batch_size, step.samples]
        assert float(row["lr"]) == step.lr
    # a plain loop over the same steps arrives at the same weights, bit for bit
    assert equal(model.net, train_by_hand([(step.indices, step.lr) for step in steps]))


def test_the_logged_values_stand_beside_the_epochs_metrics(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(Exponential(8, 2), Exponential(0.01, 1.4))
    fit(own(), scheduler, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1000)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
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

    fit(own(), Late(), scheduler, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1, max_epochs=1)
    with open(tmp_path / "metrics.csv", newline="") as file:
        samples = {int(float(row["samples"])) for row in csv.DictReader(file) if row["samples"]}
    assert samples == {start + 7 * step for step in range(1, 11)}


def test_validation_runs_every_epoch_while_the_batch_grows_and_shrinks() -> None:
    model = fit(own(), BatchLRScheduler(Milestones([4, 32, 8], at=[1, 2])))
    assert model.validations == 3
    assert model.batches_announced == [18, 3, 9]


# --- (b) somebody else's DataModule, or LightningModule ---------------------------------------------------------------------


class WithHyperparameters(LightningDataModule):
    """As people write them."""

    def __init__(self, batch_size: int = 16, shuffle: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(), batch_size=self.hparams.batch_size, shuffle=self.hparams.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(9), batch_size=4)


class WithAttribute(LightningDataModule):
    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(9), batch_size=4)


class WithLoaders(Regression):
    """No DataModule at all."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(), batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(9), batch_size=4)


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
    "hyperparameters": lambda: (WithHyperparameters(), Regression()),
    "attribute": lambda: (WithAttribute(), Regression()),
    "module": lambda: (None, WithLoaders()),
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("reload_every", [0, 2])
def test_drop_in(stranger: str, reload_every: int) -> None:
    torch.manual_seed(0)
    datamodule, model = STRANGERS[stranger]()
    bar, scheduler = Bar(), BatchLRScheduler(Exponential(16, 2), Exponential(0.01, 1.4))
    trainer = Trainer(
        **quiet(
            callbacks=[scheduler, bar],
            enable_progress_bar=True,
            max_epochs=3,
            reload_dataloaders_every_n_epochs=reload_every,
        )
    )
    trainer.fit(model, datamodule=datamodule)
    batches = [math.ceil(N / size) for size in (16, 32, 64)]
    for epoch, (size, count) in enumerate(zip((16, 32, 64), batches)):
        seen = [step for step in model.seen if step.epoch == epoch]
        assert [len(step.indices) for step in seen] == [size] * (count - 1) + [N - size * (count - 1)]
        assert sorted(flat(step.indices for step in seen)) == list(range(N))
        assert {step.lr for step in seen} == {0.01 * 1.4**epoch}
    assert [step.ratio for step in model.seen] == pytest.approx([RATIO] * len(model.seen))
    assert bar.totals == bar.last == model.batches_announced == batches
    assert model.validations == 3
    assert trainer.reload_dataloaders_every_n_epochs == reload_every
    assert scheduler.progress.samples == scheduler.plan.samples == 3 * N
    assert scheduler.progress.step == scheduler.plan.steps == sum(batches)
    # Lightning draws from the global generator too, so the loop by hand is given the batches that came
    assert equal(model.net, train_by_hand([(step.indices, step.lr) for step in model.seen]))


def test_drop_in_with_accumulation() -> None:
    # 24 examples a step, in two batches of 12
    scheduler = BatchLRScheduler(Milestones([24, 40], at=[1]), Exponential(0.01, 1.4))
    model = fit(WithHyperparameters(), scheduler, accumulate_grad_batches=2, max_epochs=2)
    assert [[len(s.indices) for s in model.seen if s.epoch == e] for e in range(2)] == [[12] * 5 + [10], [20] * 3 + [10]]
    assert scheduler.progress.step == scheduler.plan.steps == 3 + 2
    assert scheduler.progress.samples == scheduler.plan.samples == 2 * N


def test_drop_in_plans_what_it_does_with_a_schedule_over_steps() -> None:
    # the size changes only between epochs, where the schedule is asked: 8 (step 0), then 32 (step 9)
    scheduler = BatchLRScheduler(Milestones([8, 32], at=[4], unit="step"), Cosine(0.01, end=0.001, unit="step"))
    model = fit(WithHyperparameters(), scheduler, max_epochs=2)
    sizes = [len(step.indices) for step in model.seen]
    assert sizes == [8] * 8 + [6] + [32, 32, 6]
    assert scheduler.plan.steps == len(sizes)
    assert [(stage.batch_size, stage.steps) for stage in scheduler.plan.stages] == [(8, 9), (32, 3)]
    assert [step.lr for step in model.seen] == pytest.approx(
        [0.001 + 0.0045 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    )


def test_drop_in_plans_a_loader_that_drops_its_last_batch() -> None:
    class Dropping(WithHyperparameters):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(examples(), batch_size=self.hparams.batch_size, drop_last=True)

    scheduler = BatchLRScheduler(Exponential(16, 2), Cosine(0.01, end=0.001, unit="samples"))
    model = fit(Dropping(), scheduler, max_epochs=2)
    assert scheduler.plan.steps == len(model.seen) == 4 + 2
    assert scheduler.plan.samples == scheduler.progress.samples == 64 + 64


def test_drop_in_plans_limited_batches_with_accumulation() -> None:
    # a limit counts what the loader gives: 4 batches of 8 are 2 steps of 16
    scheduler = BatchLRScheduler(16, 0.01)
    fit(WithHyperparameters(), scheduler, max_epochs=2, limit_train_batches=4, accumulate_grad_batches=2)
    assert scheduler.plan.steps == scheduler.progress.step == 4


# --- (c) what cannot work is refused before the first step ------------------------------------------------------------------


class Ignoring(WithHyperparameters):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(), batch_size=10)


class WithoutSize(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(), batch_size=16)


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
        fit(datamodule, *callbacks, model=model, **arguments)
    assert model.seen == []


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
        ("WithoutSize has no `batch_size`.*`self.batch_size`", lambda: (WithoutSize(), BatchLRScheduler(*GROWING))),
        (
            "`batch_size=16`.*has batch_size=10: make it anew in `train_dataloader`",
            lambda: (Ignoring(), BatchLRScheduler(*GROWING)),
        ),
    ],
    ids=["two", "accumulation", "finder", "no-size", "ignoring"],
)
def test_refusals(message: str, make: Callable[[], tuple[Any, ...]]) -> None:
    never_trains(MisconfigurationException, message, *make())


@pytest.mark.parametrize("model", [Regression, WithLoaders])
def test_a_bare_loader_is_refused(model: type[Regression]) -> None:
    # also beside a module that has a `train_dataloader` of its own, which Lightning then does not call
    trainer = Trainer(**quiet(max_epochs=3, callbacks=[BatchLRScheduler(*GROWING)]))
    module = model()
    with pytest.raises(MisconfigurationException, match=r"DataLoader given to `fit`.*BatchSizeDataModule\(train=...\)"):
        trainer.fit(module, DataLoader(examples(), batch_size=16))
    assert module.seen == []


@pytest.mark.parametrize("datamodule", [own, WithHyperparameters])
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


@pytest.mark.parametrize("batch_size", [15, Milestones([16, 17], at=[2])])
def test_an_uneven_split(batch_size: Any) -> None:
    message = r"the batch size (15|17) (.* )?cannot be split evenly.*multiples of 2, or use a `BatchSizeDataModule`"
    scheduler = BatchLRScheduler(batch_size)
    never_trains(MisconfigurationException, message, WithHyperparameters(), scheduler, accumulate_grad_batches=2)


@pytest.mark.parametrize("datamodule", [own, WithHyperparameters])
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


@pytest.mark.parametrize("datamodule", [own, WithHyperparameters])
@pytest.mark.parametrize("bounds", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 4 + 2 + 1}])
def test_a_schedule_may_be_invalid_beyond_the_run(datamodule: Callable[[], Any], bounds: dict[str, int]) -> None:
    # 18, 36, 72 > 70 examples; a cosine that is 0 at the end; a warm-up target that is never left
    scheduler = BatchLRScheduler(Exponential(18, 2, maximum=70), Cosine(0.1, total=3))
    model = fit(datamodule(), scheduler, **bounds)
    assert len(model.seen) == 4 + 2 + 1
    scheduler = BatchLRScheduler(Exponential(17.5, 2), Cosine(0.1, unit="step", total=4 + 2 + 1))
    model = fit(datamodule(), scheduler, **bounds)
    assert [len(step.indices) for step in model.seen] == [18] * 3 + [16] + [35, 35] + [70]


# --- (d) resume --------------------------------------------------------------------------------------------------------------


def everything(model: Regression) -> tuple[list[Seen], list[Tensor], Any]:
    state = model.optimizers(use_pl_optimizer=False).state_dict()  # type: ignore[union-attr]
    return model.seen, [p.detach().clone() for p in model.parameters()], state


def in_order() -> WithHyperparameters:
    return WithHyperparameters(shuffle=False)  # torch's own shuffling cannot be resumed


RESUMED = [
    (name, on_epoch_end, datamodule)
    for name in ("epoch", "step", "samples")
    for on_epoch_end in (None, True, False)
    for datamodule in (own, in_order)
] + [("step", None, lambda: own(num_workers=2))]


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
        model = fit(datamodule(), scheduler, checkpoints, enable_checkpointing=True, max_epochs=4, ckpt_path=ckpt_path)
        return model, scheduler

    whole, clock = go(None)
    for epoch in (0, 1, 2):
        model, scheduler = go(tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert model.seen == [step for step in whole.seen if step.epoch > epoch]
        assert equal(model.net, whole.net)
        assert scheduler.progress == clock.progress
        assert scheduler.plan == clock.plan
        assert model.validations == 4 - epoch - 1


@pytest.mark.parametrize("on_the_last_batch", [False, True])
@pytest.mark.parametrize("name", ["epoch", "step", "samples"])
def test_resume_from_a_step(name: str, on_the_last_batch: bool, tmp_path: Path) -> None:
    def go(folder: str, ckpt_path: Path | None) -> tuple[Regression, BatchLRScheduler]:
        checkpoints = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        scheduler = BatchLRScheduler(*SCHEDULES[name])
        model = fit(own(), scheduler, checkpoints, enable_checkpointing=True, max_epochs=3, ckpt_path=ckpt_path)
        return model, scheduler

    whole, clock = go("whole", None)
    for step in range(1, len(whole.seen)):
        if on_the_last_batch != (whole.seen[step].epoch > whole.seen[step - 1].epoch):
            continue
        model, scheduler = go(f"from {step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert model.seen == whole.seen[step:]
        assert equal(model.net, whole.net)
        assert scheduler.progress == clock.progress


def test_resume_a_finished_run_for_longer(tmp_path: Path) -> None:
    schedule = (Exponential(8, 1.5, every=7, unit="step", maximum=60), Exponential(0.01, 1.1, every=7, unit="step"))
    checkpoints = ModelCheckpoint(tmp_path, save_last=True)
    fit(own(), BatchLRScheduler(*schedule), checkpoints, enable_checkpointing=True, max_epochs=2)
    model = fit(own(), BatchLRScheduler(*schedule), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    whole = fit(own(), BatchLRScheduler(*schedule), max_epochs=4)
    assert model.seen == [step for step in whole.seen if step.epoch > 1]
    assert equal(model.net, whole.net)


def test_the_state_is_plain(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(*GROWING)
    fit(own(), scheduler)
    assert scheduler.state_dict()["progress"] == {"epoch": 3, "step": 5 + 3 + 2, "samples": 3 * N}
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == scheduler.state_dict()


# --- (e) beside other habits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datamodule", [own, WithHyperparameters])
@pytest.mark.parametrize("runs", [True, 3])
def test_fast_dev_run(datamodule: Callable[[], Any], runs: int) -> None:
    scheduler = BatchLRScheduler(Warmup(4, then=Constant(64), over=0.5), Warmup(0.01, then=Cosine(0.1), over=5))
    model = fit(datamodule(), scheduler, fast_dev_run=runs, max_epochs=10)
    assert [(len(step.indices), step.lr) for step in model.seen] == [(4, 0.01)] * int(runs)


@pytest.mark.parametrize("datamodule", [own, WithHyperparameters])
def test_several_fits_with_one_callback(datamodule: Callable[[], Any]) -> None:
    scheduler, data = BatchLRScheduler(*GROWING), datamodule()
    for _ in range(3):
        model = fit(data, scheduler)
        firsts = [next(step for step in model.seen if step.epoch == epoch) for epoch in range(3)]
        assert [(len(step.indices), step.lr) for step in firsts] == [(16, 0.01), (32, 0.01 * 1.4), (64, 0.01 * 1.4**2)]
        assert scheduler.progress.samples == 3 * N


@pytest.mark.parametrize("datamodule", [own, in_order])
def test_a_trainer_that_fits_on(datamodule: Callable[[], Any]) -> None:
    whole = fit(datamodule(), BatchLRScheduler(*GROWING), max_epochs=3)
    data, model = datamodule(), Regression()
    trainer = Trainer(**quiet(max_epochs=1, callbacks=[BatchLRScheduler(*GROWING)]))
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, datamodule=data)
    assert [step[1:3] for step in model.seen] == [step[1:3] for step in whole.seen]


def test_learning_rate_monitor_before_the_scheduler(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(SCHEDULES["step"][0], lambda progress: 0.01 / (1 + progress.step))
    model = fit(
        own(),
        LearningRateMonitor(logging_interval="step"),
        scheduler,
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
    )
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = {int(row["step"]): float(row["lr-SGD/pg1"]) for row in csv.DictReader(file) if row["lr-SGD/pg1"]}
    assert rows == {index: step.lr for index, step in enumerate(model.seen)}


@pytest.mark.parametrize("datamodule", [own, WithHyperparameters])
def test_rates_left_to_the_module(datamodule: Callable[[], Any], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    model = fit(datamodule(), BatchLRScheduler(GROWING[0]), model=WithScheduler(), logger=logger, log_every_n_steps=1)
    assert [step.lr for step in model.seen] == [0.02] * 5 + [0.01] * 3 + [0.005] * 2
    assert [len(step.indices) for step in model.seen] == [16] * 4 + [6] + [32, 32, 6] + [64, 6]
    with open(tmp_path / "metrics.csv", newline="") as file:
        logged = {int(row["step"]): float(row["lr"]) for row in csv.DictReader(file) if row["lr"]}
    assert logged == {index: step.lr for index, step in enumerate(model.seen)}


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
