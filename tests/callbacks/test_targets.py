"""Triggers that return a batch size: what they ask for, what the scheduler makes of it, and what processes agree on."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness import fits
from harness.configs import compose_config
from harness.data import own, regression
from harness.files import flat
from harness.modules import Regression, equal
from harness.processes import Pair
from lightning_bsl import CABS, AdaptiveBatchLRScheduler, BatchLRScheduler, GradientNoiseScale, NoiseTarget, NormTest
from lightning_bsl.callbacks.adaptive import StageController
from lightning_bsl.runs import read_metrics
from lightning_bsl.theory.noise_scale import NoiseScale

N = 61
DATA = regression(N)


def adaptive(trigger: Any, **arguments: Any) -> AdaptiveBatchLRScheduler:
    return AdaptiveBatchLRScheduler(
        **{"batch_size": 4, "lr": 0.01, "trigger": trigger, "maximum": 30, "check_every": 1} | arguments
    )


def fit(scheduler: BatchLRScheduler, *callbacks: Callback, workers: int = 0, model: Any = None, **arguments: Any) -> Regression:
    model = model or Regression(nn.Dropout(0.2))
    torch.manual_seed(4)
    fits.fit(model, own(DATA, DATA, num_workers=workers), scheduler, *callbacks, **arguments)
    return model


def at_steps(**sizes: Any) -> Any:
    """A trigger with these answers: ``at_steps(s3=12)`` returns 12 at step 3."""
    return lambda trainer, scheduler: sizes.get(f"s{scheduler.progress.step}")


def known(value: float, low: float, high: float) -> GradientNoiseScale:
    """A callback that has measured this."""

    class Known(GradientNoiseScale):
        measured = property(lambda self: NoiseScale(1.0, value, low, high))  # type: ignore[assignment]

    return Known(probe_every=None)


# --- what a number does


@pytest.mark.quick(workers=[0], cap=[None])
@pytest.mark.quick(workers=[2], cap=[5])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cap", [None, 5, "auto"])
def test_grows_and_shrinks_to_the_number(workers: int, cap: Any) -> None:
    scheduler = adaptive(at_steps(s3=12, s10=99, s18=7, s19=None), max_device_batch_size=cap)
    model = fit(scheduler, workers=workers, max_epochs=6)
    assert [segment.batch_size for segment in scheduler.segments] == [4, 12, 30, 7]
    assert scheduler.stage == 3
    for segment in scheduler.segments:  # eta_0 gamma^m, where b = b_0 delta^m
        assert segment.lr == pytest.approx(0.01 * math.sqrt(segment.batch_size / 4))
    for epoch in range(6):  # each example once an epoch, across every change
        assert sorted(flat(batch.examples for batch in model.journal if batch.epoch == epoch)) == list(range(N))
    assert len(model.validated) == 6
    again = fit(BatchLRScheduler(scheduler.schedule.batch_size, scheduler.schedule.lr, cap), workers=workers, max_epochs=6)
    if cap != "auto":  # a run with the schedule of its own decisions
        assert model.journal == again.journal
        assert equal(model, again)


def test_numbers_beside_yes_and_no() -> None:
    answers: dict[str, Any] = {"s1": np.int64(8), "s4": np.array(True), "s6": torch.tensor(20)}
    scheduler = adaptive(at_steps(**answers, s8=np.bool_(False), s9=torch.tensor([True])), delta=1.5)
    fit(scheduler)
    assert [segment.batch_size for segment in scheduler.segments] == [4, 8, 12, 20, 30]
    growth = [0, math.log(2, 1.5), math.log(2, 1.5) + 1, math.log(5, 1.5), math.log(5, 1.5) + 1]
    assert [segment.lr for segment in scheduler.segments] == pytest.approx([0.01 * 1.5 ** (m / 2) for m in growth])


@pytest.mark.parametrize("answer", [0, -3])
def test_no_batch_size(answer: int) -> None:
    with pytest.raises(ValueError, match=f"returned {answer}, but a batch size must be 1 or more: return True or False"):
        fit(adaptive(at_steps(s2=answer)))


@pytest.mark.parametrize("answer", [
    12.0, torch.tensor(12.5), np.float64(8), np.float32(8), np.array(3.7), np.array([8, 9]), torch.tensor([8, 9]), "no", [8]
])  # fmt: skip
def test_what_is_no_answer(answer: Any) -> None:
    with pytest.raises(TypeError, match="return a batch size as an int, or True or False"):
        fit(adaptive(at_steps(s2=answer)))


def test_the_growth_of_a_target_is_saved() -> None:
    controller = StageController(4, 0.01, delta=2, gamma=1.5, maximum=64)
    controller.extend(controller.proposal(target=12), start=40)
    other = StageController(4, 0.01, delta=2, gamma=1.5, maximum=64)
    other.load_state_dict(controller.state_dict())
    for each in (controller, other):
        assert each.proposal(advances=True) == pytest.approx((2, 24, 0.01 * 1.5 ** (math.log2(3) + 1), math.log2(3) + 1))
        assert each.proposal(target=12) == pytest.approx((1, 12, 0.01 * 1.5 ** math.log2(3), math.log2(3)))


TRIGGERS = {
    "noise": partial(NoiseTarget, within=9),
    "shrinking": partial(NormTest, 1.0, within=9, round_to=1, shrink=True),
    "cabs": partial(CABS, within=9, round_to=3, shrink=True),
}


@pytest.mark.quick(trigger=["shrinking"], measured=[False], workers=[0])
@pytest.mark.quick(trigger=["noise"], measured=[True], workers=[0])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_resumes_bit_for_bit(trigger: str, measured: bool, workers: int, tmp_path: Path) -> None:
    def parts() -> tuple[AdaptiveBatchLRScheduler, list[Callback]]:
        scheduler = adaptive(TRIGGERS[trigger](), check_every=3)
        return scheduler, [GradientNoiseScale(probe_every=2)] if measured else []

    def model() -> Regression:
        return Known() if trigger == "cabs" else Regression(nn.Dropout(0.2))

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    arguments: Any = {"workers": workers, "enable_checkpointing": True}
    first, callbacks = parts()
    whole = fit(first, saver, *callbacks, model=model(), **arguments)
    assert len(first.segments) > 1
    last = max(int(path.stem[5:]) for path in tmp_path.glob("*.ckpt"))
    for step in range(2, last, 9):
        again, callbacks = parts()
        resumed = fit(again, *callbacks, model=model(), ckpt_path=tmp_path / f"step={step}.ckpt", **arguments)
        assert again.segments == first.segments, step
        assert resumed.journal == whole.journal[-len(resumed.journal) :]
        assert equal(resumed, whole), step


# --- what a target is


@pytest.mark.parametrize(
    ("trigger", "interval", "sizes"),
    [
        (NoiseTarget(), (17, 12, 25), [4, 16]),  # down to a stage
        (NoiseTarget(factor=0.5), (17, 12, 25), [4, 8]),
        (NoiseTarget(round_to=3), (17, 12, 25), [4, 18]),  # up to a multiple
        (NoiseTarget(round_to=1), (16.0000000000001, 12, 25), [4, 16]),  # but not for a rounding error
        (NormTest(theta=0.8, round_to=1), (16, 12, 25), [4, 25]),
        (NoiseTarget(), (500, 400, 600), [4, 30]),  # never above the maximum
        (NoiseTarget(round_to=8), (29, 25, 35), [4, 30]),
        (NoiseTarget(), (16, 3, 60), [4]),  # known too badly
        (NoiseTarget(round_to=1), (90, 9, math.inf), [4, 9]),  # but it is 9 or more for certain
        (NoiseTarget(within=5, round_to=1), (16, 3, 60), [4, 16]),
        (NoiseTarget(hysteresis=1.6, round_to=1), (6, 5, 7), [4]),
        (NoiseTarget(hysteresis=1.4, round_to=1), (6, 5, 7), [4, 6]),
        (NoiseTarget(), (1, 0.9, 1.1), [4]),  # it does not shrink
        (NoiseTarget(shrink=True, round_to=1), (1, 0.9, 1.1), [4]),  # nor below the first batch size
        (NoiseTarget(), (0, 0, math.inf), [4]),
    ],
)
def test_the_batch_size_that_is_asked_for(trigger: Any, interval: tuple[float, ...], sizes: list[int]) -> None:
    scheduler = adaptive(trigger)
    fit(scheduler, known(*interval), max_epochs=1)
    assert [segment.batch_size for segment in scheduler.segments] == sizes


@pytest.mark.parametrize(("shrink", "expected"), [(False, 16), (True, 8)])
def test_shrinks_if_it_may(shrink: bool, expected: int) -> None:
    trigger = NoiseTarget(shrink=shrink)
    first = known(20, 18, 22)
    scheduler = adaptive(trigger)
    fit(scheduler, first, max_epochs=1)
    assert scheduler.batch_size == 16

    class Falling(GradientNoiseScale):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            value = 20 if trainer.global_step < 4 else 14 if trainer.global_step < 6 else 9
            self.known = NoiseScale(1.0, value, value - 1, value + 1)

        measured = property(lambda self: self.known)  # type: ignore[assignment]

    scheduler = adaptive(trigger)
    fit(scheduler, Falling(probe_every=None))
    sizes = [segment.batch_size for segment in scheduler.segments]
    assert sizes == ([4, 16, 8] if shrink else [4, 16])  # 14 is within the hysteresis of 16
    assert scheduler.batch_size == expected


def test_a_trigger_measures_where_nothing_else_does(tmp_path: Path) -> None:
    """Its own measurement is that of GradientNoiseScale, with the weights after the step."""
    logger = CSVLogger(tmp_path, name="", version="")
    trigger = NormTest(theta=1.0, round_to=1)
    scheduler = adaptive(trigger, check_every=5)
    fit(scheduler, logger=logger, max_epochs=1)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "gradient_noise_scale" in row]
    assert [row["step"] for row in rows][:1] == [4]
    assert trigger.measured is not None
    names = ("gradient_sq_norm", "gradient_variance", "gradient_noise_scale_low", "gradient_noise_scale_high")
    assert [rows[-1][name] for name in names] == pytest.approx(trigger.measured[:4])
    targets = [row["target_batch_size"] for row in read_metrics(tmp_path / "metrics.csv") if "target_batch_size" in row]
    for row, target in zip(rows, targets, strict=True):
        if row["gradient_noise_scale_high"] <= 4 * row["gradient_noise_scale_low"]:
            assert target == pytest.approx(row["gradient_noise_scale"])


class Known(Regression):
    """SGD without momentum, whose noise, loss and rate are known."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def test_cabs_measures_variance_over_loss(tmp_path: Path) -> None:
    class Spy(CABS):
        def target(self, trainer: Trainer, noise: NoiseScale) -> tuple[float, float, float]:
            module = trainer.lightning_module
            x, y = DATA.tensors[:2]
            losses = (module.net(x) - y).square().mean(dim=1)
            rows = [torch.autograd.grad(loss, list(module.parameters()), retain_graph=True) for loss in losses]
            gradients = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
            truth.append(0.02 * gradients.var(dim=0).sum().item() / losses.mean().item())
            found.append(super().target(trainer, noise))
            return found[-1]

    truth: list[float] = []
    found: list[tuple[float, float, float]] = []
    fit(adaptive(Spy(), lr=None, check_every=4), model=Known(), max_epochs=1)
    assert len(found) >= 3
    for expected, (value, low, high) in zip(truth, found, strict=True):
        assert low < expected < high
        assert value == pytest.approx(expected, rel=0.4)  # 60 of 61 examples, in 12 pieces


def test_refusals() -> None:
    for make, message in (
        (lambda: NoiseTarget(0), "factor=0"),
        (lambda: NoiseTarget(math.inf), "factor=inf"),
        (lambda: NormTest(-1.0), "theta=-1.0"),
        (lambda: NormTest(math.nan), "theta=nan"),
        (lambda: NoiseTarget(within=1), "within=1"),
        (lambda: CABS(round_to=0), "round_to=0"),
        (lambda: CABS(hysteresis=0.9), "hysteresis=0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            make()

    class Heavy(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    class Adamant(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.02)

    for model, name in ((Heavy(), "SGD with momentum"), (Adamant(), "Adam takes other")):
        with pytest.raises(MisconfigurationException, match=name):
            fit(adaptive(CABS()), model=model)

    class Negative(Known):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) - 1000

    with pytest.raises(ValueError, match="needs a loss whose minimum is 0"):
        fit(adaptive(CABS()), model=Negative())

    class Two(Regression):
        def batch(self, batch: Any) -> list[Tensor]:
            return super().batch(batch["a"])

    class Manual(Regression):
        """Steps in ``training_step``, which a measurement would call."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    for trigger in (NoiseTarget(), NormTest(0.5)):
        with pytest.raises(MisconfigurationException, match="with manual optimization `training_step` trains the model"):
            fit(adaptive(trigger), model=Manual())

    loaders = {"a": DataLoader(DATA, 4), "b": DataLoader(DATA, 4)}
    with pytest.raises(MisconfigurationException, match=r"NoiseTarget cannot read.*2 training loaders.*GradientNoiseScale"):
        fits.fit(Two(), loaders, adaptive(NoiseTarget(), loader="a"))


def test_the_configuration_needs_no_callback() -> None:
    scheduler = instantiate(compose_config("scheduler=noise_adaptive").scheduler)
    assert isinstance(scheduler, AdaptiveBatchLRScheduler)
    assert isinstance(scheduler.trigger, NoiseTarget)


# --- several processes


def disagree(kind: str) -> tuple[list[Any], list[float]]:
    """Each process has numbers of its own."""
    rank = int(os.environ["RANK"])
    answers = {
        "numbers": [None, 9, None, 14],
        "kinds": [None, 9, True, 14],
    }[kind]
    if rank:
        answers = {"numbers": [7, 20, 20, None], "kinds": [True, True, False, None]}[kind]
    asked = iter(answers)
    scheduler = adaptive(lambda *_: next(asked, None), check_every=2)
    model = Regression()
    options: Any = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    fits.fit(model, own(DATA), scheduler, max_epochs=3, **options)
    return scheduler.segments, [p.sum().item() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["numbers", "kinds"])
def test_the_number_is_agreed_on(kind: str, pair: Pair) -> None:
    (first, weights), (second, same) = pair(disagree, kind)
    assert first == second
    assert weights == same
    assert [segment[1] for segment in first] == [4, 9, 14]


def measure_alone_and_together() -> tuple[list[Any], list[list[float]], int]:
    class Spy(NoiseTarget):
        def target(self, trainer: Trainer, noise: NoiseScale) -> tuple[float, float, float]:
            noises.append([*noise])
            return super().target(trainer, noise)

    noises: list[list[float]] = []
    model = Regression()
    scheduler = adaptive(Spy(round_to=1, within=9), check_every=5)
    options: Any = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    fits.fit(model, own(DATA), scheduler, max_epochs=2, **options)
    return scheduler.segments, noises, len(model.journal)


def test_processes_share_a_probe(pair: Pair) -> None:
    (segments, noises, _), (same, same_noises, _) = pair(measure_alone_and_together)
    assert (segments, noises) == (same, same_noises)
    assert len(segments) > 1
    alone: list[list[float]] = []

    class Spy(NoiseTarget):
        def target(self, trainer: Trainer, noise: NoiseScale) -> tuple[float, float, float]:
            alone.append([*noise])
            return super().target(trainer, noise)

    fits.fit(Regression(), own(DATA), adaptive(Spy(round_to=1, within=9), check_every=5), max_epochs=2)
    np.testing.assert_allclose(noises, alone, rtol=1e-6)
