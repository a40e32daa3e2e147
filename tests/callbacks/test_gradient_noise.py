"""The gradient noise scale against closed forms, and the run beside a run without it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningDataModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from harness.data import own, regression
from harness.files import FASHION_MNIST
from harness.fits import fit, out_of_memory, trained
from harness.modules import Recorder, Stateful, Step
from harness.processes import Pair
from lightning_bsl import BatchLRScheduler, FullGradientNorm, GradientNoiseScale
from lightning_bsl.datasets import FashionMNIST, ImageTensors
from lightning_bsl.models import Classifier, cnn5
from lightning_bsl.runs import read_metrics
from lightning_bsl.schedules import Milestones
from lightning_bsl.theory.noise_scale import NoiseEstimate, Pieces, noise_interval

DRAWS = 2000  # for a mean with an error small enough
SIZE = 16  # parameters of the linear model
SQ_NORM, VARIANCE = 0.3, 5.0


# --- arithmetic

sizes = st.lists(st.integers(1, 50), min_size=2, max_size=9)


@given(sizes, st.data())
def test_pieces_are_unbiased(examples: list[int], data: st.DataObject) -> None:
    """Given the expectations of the squared norms, the estimate is the truth: sizes and weights may be any."""
    weights = data.draw(st.lists(st.floats(0.05, 2), min_size=len(examples), max_size=len(examples)))
    pieces = Pieces()
    for n, w in zip(examples, weights):
        pieces = pieces.plus(n, w, SQ_NORM + VARIANCE / n)
    step = sum(weights) ** 2 * SQ_NORM + VARIANCE * sum(w**2 / n for n, w in zip(examples, weights))
    assert pieces.estimate(step) == pytest.approx((SQ_NORM, VARIANCE), rel=1e-9)


@given(sizes)
def test_pieces_are_the_analysis_of_variance(examples: list[int]) -> None:
    gradients = np.random.default_rng(sum(examples)).normal(size=(len(examples), 3))
    total = sum(examples)
    mean = np.average(gradients, axis=0, weights=examples)
    pieces = Pieces()
    for n, gradient in zip(examples, gradients):
        pieces = pieces.plus(n, n / total, gradient @ gradient)
    between = sum(n * (gradient - mean) @ (gradient - mean) for n, gradient in zip(examples, gradients))
    variance = between / (len(examples) - 1)
    assert pieces.estimate(mean @ mean) == pytest.approx((mean @ mean - variance / total, variance), rel=1e-9, abs=1e-12)


# --- a model whose gradients are known: that of an example is the example


class Noting(GradientNoiseScale):
    """Keeps every single measurement: of steps in pieces, and of probes."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"every": 1, "probe_every": None} | arguments)
        self.found: list[NoiseEstimate] = []
        self.probes: list[list[NoiseEstimate]] = []
        measure = self.probe.measure

        def spy(*arguments: Any) -> list[NoiseEstimate]:
            self.probes.append(measure(*arguments))
            return self.probes[-1]

        self.probe.measure = spy  # type: ignore[method-assign]

    def _record(self, estimate: NoiseEstimate) -> None:
        super()._record(estimate)
        self.found.append(estimate)


class Linear(Recorder):
    """The gradient of an example is the example; the journal has the pieces, and what is computed besides.

    Args:
        memory: The largest batch that fits.
        fused: Which SGD.
    """

    def __init__(self, memory: int = 10**9, fused: bool = False) -> None:
        super().__init__(nn.Linear(SIZE, 1, bias=False), partial(torch.optim.SGD, lr=0.0, fused=fused))
        self.unused = nn.Parameter(torch.ones(3))
        self.memory = memory

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0]).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if len(batch[0]) > self.memory:
            raise out_of_memory()
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(list(self.parameters()))


def draws(number: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(number, SIZE, generator=generator) * (VARIANCE / SIZE) ** 0.5
    return TensorDataset(noise + (SQ_NORM / SIZE) ** 0.5, torch.arange(number))


class Stranger(LightningDataModule):
    """Batches of these sizes, over and over; the last one of the epoch is what is left."""

    def __init__(self, sizes: list[int], examples: int) -> None:
        super().__init__()
        self.sizes, self.data = sizes, draws(examples)

    def train_dataloader(self) -> Any:
        cuts = np.cumsum([0, *self.sizes * (len(self.data) // sum(self.sizes) + 1)]).tolist()
        order = range(len(self.data))
        return DataLoader(self.data, batch_sampler=[order[a:b] for a, b in pairwise(cuts) if a < len(order)])


def measure(
    batch: int | list[int] = 12, cap: Any = None, model: Linear | None = None, steps: int = DRAWS, **arguments: Any
) -> tuple[Linear, np.ndarray]:
    """Every step's estimates; ``batch`` is ours, or those of somebody's loader."""
    callback = Noting()
    if isinstance(batch, list):
        together = sum(batch) * arguments.get("accumulate_grad_batches", 1) // len(batch)
        datamodule: Any = Stranger(batch, together * steps)
        callbacks: list[Callback] = [callback]
    else:
        datamodule = own(draws(batch * steps), batch_size=batch)
        callbacks = [BatchLRScheduler(batch, max_device_batch_size=cap), callback]
    model = trained(model or Linear(), datamodule, *callbacks, **{"max_epochs": 1} | arguments)
    return model, np.array(callback.found)


def measured(*arguments: Any, **options: Any) -> np.ndarray:
    return measure(*arguments, **options)[1]


def of_pieces(pieces: list[Tensor], weights: list[float]) -> tuple[float, float]:
    """The estimates by an analysis of variance: the spread of the pieces' gradients over what it is expected to be.

    Args:
        pieces: The examples of each piece, which are their gradients.
        weights: What each counts in the step's gradient; together 1.
    """
    means = [piece.double().mean(dim=0) for piece in pieces]
    step = sum(weight * mean for weight, mean in zip(weights, means))
    spread = sum(weight * (mean - step).square().sum().item() for weight, mean in zip(weights, means))
    small, big = (sum(w**power / len(piece) for w, piece in zip(weights, pieces)) for power in (1, 2))
    variance = spread / (small - big)
    return step.square().sum().item() - variance * big, variance


def by_hand(journal: list[Step], x: Tensor, weighed_alike: bool = False) -> Iterator[tuple[float, float]]:
    """What each step of a journal says."""
    for _, batches in groupby(journal, key=lambda batch: batch.step):
        pieces = [x[batch.examples] for batch in batches]
        total = sum(map(len, pieces))
        yield of_pieces(pieces, [1 / len(pieces) if weighed_alike else len(piece) / total for piece in pieces])


SOURCES = {
    "micro": {"batch": 12, "cap": 4},
    "micro-unequal": {"batch": 13, "cap": 5},
    "auto": {"batch": 13, "cap": "auto", "memory": 5},
    "accumulated": {"batch": [3], "accumulate_grad_batches": 4},
    "accumulated-unequal": {"batch": [1, 7, 2, 6], "accumulate_grad_batches": 4},
    "bf16": {"batch": 16, "cap": 8, "precision": "bf16-mixed"},
}


@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_says_what_its_gradients_say(source: str) -> None:
    """A step's estimate is a closed form of the examples of its pieces."""
    options = dict(SOURCES[source])
    model, found = measure(model=Linear(options.pop("memory", 10**9)), steps=12, **options)
    expected = [*by_hand(model.journal, draws(500).tensors[0], weighed_alike=source.startswith("accumulated"))]
    assert len(found) == len(expected) == 12
    tolerance = {"rtol": 0.05, "atol": 0.3} if source == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(found, expected, **tolerance)


def assert_true(found: np.ndarray, least: int = DRAWS) -> None:
    assert len(found) >= least
    error = found.std(axis=0, ddof=1) / len(found) ** 0.5
    assert np.all(np.abs(found.mean(axis=0) - (SQ_NORM, VARIANCE)) < 3 * error), (found.mean(axis=0), error)
    assert np.all(error < 0.1 * np.array([SQ_NORM, VARIANCE]) + 0.02)  # else this would show nothing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_has_the_right_mean(source: str) -> None:
    options = dict(SOURCES[source])
    assert_true(measured(model=Linear(options.pop("memory", 10**9)), **options))


def test_steps_cut_short_by_the_end_of_an_epoch() -> None:
    found = []
    for _ in range(2):  # two epochs that end with an accumulated step of 2 batches of 3, and one of them of 1
        data = Stranger([3], 12 * 3 + 4)
        callback = Noting()
        fit(Linear(), data, callback, max_epochs=1, accumulate_grad_batches=4)
        found.append(callback.found)
    assert len(found[0]) == 4
    expected = of_pieces(list(data.data.tensors[0][36:].split(3)), [0.5, 0.5])
    assert found[0][-1] == found[1][-1] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_short_step_and_one_example() -> None:
    callback, scheduler = Noting(), BatchLRScheduler(8, max_device_batch_size=3)
    fit(Linear(), own(draws(5 * 8 + 1)), callback, scheduler, max_epochs=1)
    assert len(callback.found) == 5  # the step of one example has one piece
    assert scheduler.progress.step == 6
    model, with_rest = measure(13, steps=1, cap=4)
    assert model.sizes == [3, 3, 3, 4]
    x = draws(13).tensors[0]
    between = sum(n * (x[part].mean(dim=0) - x.mean(dim=0)).square().sum() for n, part in zip(model.sizes, model.examples)) / 3
    assert with_rest[0, 1] == pytest.approx(between.item(), rel=1e-5)


def test_a_step_that_ran_out_of_memory_half_way_is_counted_once() -> None:
    class Fails(Linear):
        calls = 0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            Fails.calls += 1
            if Fails.calls == 5:  # the second micro-batch of the second step
                raise out_of_memory()
            return super().training_step(batch, batch_idx)

    class Counting(GradientNoiseScale):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            counts.append([piece.examples for piece, _ in self._step.pieces])
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    counts: list[list[int]] = []
    callbacks = [Counting(every=1), BatchLRScheduler(13, max_device_batch_size="auto")]
    fit(Fails(memory=7), own(draws(39)), *callbacks, max_epochs=1)
    assert counts == [[6, 7], [3, 3, 3, 4], [3, 3, 3, 4]]


def test_clipping_and_loss_scaling_change_nothing() -> None:
    plain = measured(16, 4, steps=20)
    np.testing.assert_array_equal(measured(16, 4, steps=20, gradient_clip_val=1e-3), plain)
    for fused in (False, True):
        scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))  # type: ignore[attr-defined]
        found = measured(16, 4, Linear(fused=fused), steps=20, plugins=[scaled])
        np.testing.assert_allclose(found, plain, rtol=0.02, atol=0.02)


def measure_together(first: int, then: int) -> tuple[list[Step], list[NoiseEstimate]]:
    """Shares of 3 and 4 examples, whole; then of 6 and 7, in two micro-batches each; at last of 1 and none."""
    model, callback = Linear(), Noting()
    schedule = Milestones([7, 13], at=[first], unit="step")
    fit(
        model,
        own(draws(7 * first + 13 * then + 1)),
        BatchLRScheduler(schedule, max_device_batch_size=4),
        callback,
        max_epochs=1,
        devices=2,
        strategy="ddp_find_unused_parameters_true",
        use_distributed_sampler=False,
    )
    return model.journal, callback.found


def test_processes(pair: Pair) -> None:
    (first, found), (second, found_too) = pair(measure_together, 9, 8)
    assert found == found_too
    assert len(found) == 9 + 8  # the last step, of one example, has one piece over both
    journal = sorted([*first, *second], key=lambda batch: batch.step)[:-2]
    np.testing.assert_allclose(found, [*by_hand(journal, draws(200).tensors[0])], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_processes_have_the_right_mean(pair: Pair) -> None:
    (_, found), _ = pair(measure_together, DRAWS, 500)
    assert_true(np.array(found[:DRAWS]))
    assert_true(np.array(found[DRAWS:]), least=500)


# --- steps of one piece: probes


def probe(model: Linear | None = None, steps: int = 8, batch: int = 5, **arguments: Any) -> tuple[Linear, Noting]:
    """A fit with a probe at every fourth step, and at the second."""
    options = {name: arguments.pop(name) for name in ("probe_size", "per", "window") if name in arguments}
    model, noise = model or Linear(), Noting(probe_every=4, **options)
    fit(model, own(draws(batch * steps), batch_size=batch), noise, BatchLRScheduler(batch), max_epochs=1, **arguments)
    return model, noise


def of_probe(pieces: list[Tensor], population: int) -> tuple[float, float]:
    """The mean product of the gradients of two pieces, and the spread between the pieces: all of one size."""
    means = torch.stack([piece.double().mean(dim=0) for piece in pieces])
    products = means @ means.T
    mean_product = (products.sum() - products.trace()).item() / (len(means) * (len(means) - 1))
    variance = len(pieces[0]) * (means - means.mean(dim=0)).square().sum().item() / (len(means) - 1)
    return mean_product + variance / population, variance


def test_a_probe_says_what_its_gradients_say() -> None:
    model, noise = probe(steps=40, probe_size=50)
    x, seen = draws(200).tensors[0], []
    by_step = [[batch.examples for batch in batches] for _, batches in groupby(model.journal, key=lambda batch: batch.step)]
    probes = [batches[1:] for batches in by_step if len(batches) > 1]
    assert [step for step, batches in enumerate(by_step) if len(batches) > 1] == [1, *range(3, 40, 4)]
    for values, examples in zip(noise.probes, probes, strict=True):
        assert [len(part) for part in examples] == [4] * 12
        assert len({i for part in examples for i in part}) == 48  # without replacement
        seen.append(frozenset(i for part in examples for i in part))
        expected = of_probe([x[part] for part in examples], population=200)
        assert np.mean(values, axis=0) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(set(seen)) == len(seen)  # other examples each time
    assert (noise.gradient_sq_norm, noise.gradient_variance) == pytest.approx(np.mean(noise.probes[-1], axis=0))
    assert noise.interval is not None and noise.noise_scale is not None
    assert noise.interval[0] <= noise.noise_scale <= noise.interval[1]


def test_a_probe_grows_with_the_batch_and_ends_with_the_data() -> None:
    for batch, size in ((30, 60), (20, 40), (60, 120)):
        model, _ = probe(steps=2, batch=batch, probe_size=6) if batch == 60 else probe(steps=6, batch=batch, probe_size=6)
        sizes = [len(batch.examples) for batch in model.journal if batch.step == 1][1:]
        assert sizes == [size // 12] * 12


def test_the_interval_of_probes_holds_the_truth() -> None:
    x = draws(2000).tensors[0].double()
    sq_norm = x.mean(dim=0).square().sum().item()
    truth = (x - x.mean(dim=0)).square().sum().item() / 1999 / sq_norm
    _, noise = probe(steps=200, batch=10)
    inside = [low <= truth <= high for low, high in (noise_interval(values)[2:4] for values in noise.probes)]
    assert len(inside) == 51
    assert sum(inside) >= 44  # 95% of 51 is 48.5, and 44 is three standard deviations below
    values = np.concatenate(noise.probes)
    assert values.mean(axis=0)[1] / values.mean(axis=0)[0] == pytest.approx(truth, rel=0.15)


def test_a_probe_without_clipping_and_loss_scaling() -> None:
    _, plain = probe()
    _, clipped = probe(gradient_clip_val=1e-3)
    assert clipped.probes == plain.probes
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    _, scaled = probe(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    np.testing.assert_allclose(np.mean(scaled.probes, axis=1), np.mean(plain.probes, axis=1), rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_a_probe_that_does_not_fit_takes_smaller_parts() -> None:
    options: dict[str, Any] = {"steps": 30, "probe_size": 96}
    _, plain = probe(**options)
    model, parts = probe(Linear(memory=5), **options)
    np.testing.assert_allclose(parts.probes, plain.probes, rtol=1e-3, atol=1e-4)
    assert max(len(batch.examples) for batch in model.journal) == 5
    with pytest.warns(UserWarning, match=r"a measurement of the gradient noise scale is left out.*`GradientNoiseScale"):
        _, none = probe(Hungry())
    assert none.measured is None and not any(none.probes)


class Hungry(Linear):
    """Has memory for training only."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if len(batch[0]) < 5:
            raise out_of_memory()
        return super().training_step(batch, batch_idx)


class Terms(Linear):
    """The terms of an example are as many as its number says; its gradient is their mean."""

    def loss_terms(self, batch: list[Tensor]) -> Tensor:
        return (batch[1] % 3).sum()

    def loss(self, batch: list[Tensor]) -> Tensor:
        terms = batch[1] % 3
        return (self.net(batch[0]).squeeze(1) * terms).sum() / terms.sum()


@pytest.mark.parametrize("per", ["terms", "examples"])
def test_a_probe_counts_terms(per: Any) -> None:
    model, noise = probe(Terms(), steps=30, probe_size=64, per=per)
    x = draws(150).tensors[0].double()
    last = [batch.examples for batch in model.journal if batch.step == 27][1:]
    terms = torch.tensor([float(sum(i % 3 for i in part)) for part in last], dtype=torch.float64)
    means = torch.stack([sum(x[i] * (i % 3) for i in part) / n for part, n in zip(last, terms)])
    weights = terms / terms.sum()
    spread = weights @ (means - weights @ means).square().sum(dim=1)
    sizes = terms if per == "terms" else torch.full_like(terms, 5.0)
    variance = spread / (weights / sizes).sum().sub((weights**2 / sizes).sum())
    assert noise.gradient_variance == pytest.approx(variance.item(), rel=0.05)  # the jackknife corrects a ratio for its bias
    whole = (weights @ means).square().sum() - variance * (weights**2 / sizes).sum()
    assert noise.gradient_sq_norm == pytest.approx(whole.item() + variance.item() / 150, abs=0.1)


def test_batch_norm_gets_two_examples_or_more() -> None:
    class Normalised(Linear):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(SIZE, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))

    model, noise = probe(Normalised(), probe_size=20)
    assert {len(batch.examples) for batch in model.journal} == {5, 2}
    assert [len(values) for values in noise.probes] == [10] * 3


def test_examples_that_cannot_be_read_again() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(draws(12))

        def __len__(self) -> int:
            return 12

    class Reads(LightningDataModule):
        batch_size = 4

        def train_dataloader(self) -> Any:
            return DataLoader(Stream(), batch_size=self.batch_size)

    noise = Noting(probe_every=1)
    with pytest.warns(UserWarning, match="measures only steps of several micro-batches.*`probe_every=None`"):
        fit(Linear(), Reads(), noise, BatchLRScheduler(4), max_epochs=1)
    assert noise.measured is None
    few = Noting(probe_every=1)
    with pytest.warns(UserWarning, match="there are only 5 training examples"):
        fit(Linear(), DataLoader(draws(5), batch_size=5), few, max_epochs=1)


def test_a_weighted_sampler_is_probed_as_it_draws() -> None:
    weights = [1.0] * 20 + [0.0] * 20
    loader = DataLoader(draws(40), batch_size=5, sampler=WeightedRandomSampler(weights, 40))
    model = Linear()
    fit(model, loader, Noting(probe_every=2), max_epochs=1)
    assert max(i for batch in model.journal for i in batch.examples) < 20


def test_a_measurement_leaves_the_window() -> None:
    noise = GradientNoiseScale(window=10)
    for step, variance in ((0, 1.0), (5, 3.0), (9, 5.0), (14, 7.0)):
        noise._step.number = step
        noise._record(NoiseEstimate(1.0, variance))
    assert noise.gradient_variance == 5.0  # of steps 5, 9 and 14
    noise._record(NoiseEstimate(math.nan, 1.0))
    assert noise.gradient_variance == 5.0


# --- training does not notice

N = 131
DATA = regression(N, features=6, dtype=torch.float32)


class Model(Stateful):
    """Draws from the generators of torch and NumPy in each step."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) * (1 + torch.rand(()) + np.random.rand())


class Limited(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if len(batch[0]) > 7:
            raise out_of_memory()
        return super().training_step(batch, batch_idx)


class Plain(LightningDataModule):
    """No scheduler, accumulated batches."""

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(self.trainer.current_epoch)  # type: ignore[union-attr]
        return DataLoader(DATA, batch_size=9, shuffle=True, generator=generator)


@pytest.mark.quick(source=["auto"], workers=[0])
@pytest.mark.quick(source=["micro"], workers=[2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["probe", "micro", "auto", "accumulated"])
def test_training_does_not_notice(source: str, workers: int, tmp_path: Path) -> None:
    if source == "accumulated" and workers:
        pytest.skip("the same as without")
    cap: Any = {"micro": 7, "auto": "auto"}.get(source)

    def go(name: str, *callbacks: Callback, path: Path | None = None) -> tuple[Model, Any, list[dict[str, float]]]:
        every = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        model = Limited() if source == "auto" else Model()
        scheduler: list[Callback] = []
        options: dict[str, Any] = {"accumulate_grad_batches": 3}
        datamodule: Any = Plain()
        if source != "accumulated":
            datamodule = own(DATA, num_workers=workers)
            schedule = Milestones([8, 16, 40], at=[9, 150], unit="samples")
            scheduler, options = [BatchLRScheduler(schedule, 0.01, max_device_batch_size=cap)], {}
        torch.manual_seed(5)
        np.random.seed(5)
        options |= {"enable_checkpointing": True, "log_every_n_steps": 1, "gradient_clip_val": 0.5}
        logger = CSVLogger(tmp_path, name="", version=name)
        trainer = fit(model, datamodule, *scheduler, *callbacks, every, logger=logger, ckpt_path=path, **options)
        rng = [torch.rand(4), torch.from_numpy(np.random.rand(4))]
        state = {"weights": model.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "rng": rng}
        assert not any(p._backward_hooks for p in model.parameters())
        return model, state, read_metrics(tmp_path / name / "metrics.csv")

    model, state, rows = go("without")
    measuring = Noting(every=2, probe_every=3, probe_size=12)
    same, same_state, same_rows = go("with", measuring)
    torch.testing.assert_close(same_state, state, rtol=0, atol=0)
    assert (same.journal, same.steps) == (model.journal, model.steps)
    found = measuring.probes if source == "probe" else measuring.found
    assert len(found) >= 4
    ours = {f"gradient_{name}" for name in ("noise_scale", "noise_scale_low", "noise_scale_high", "sq_norm", "variance")}
    kept = [{k: v for k, v in row.items() if k not in ours} for row in same_rows]
    assert [row for row in kept if row.keys() - {"epoch", "step"}] == rows
    noted = [row for row in same_rows if "gradient_variance" in row]
    assert noted
    for row in noted:
        low, high = row["gradient_noise_scale_low"], row["gradient_noise_scale_high"]
        assert 0 <= low <= row["gradient_noise_scale"] <= high
        assert row["gradient_noise_scale"] < math.inf
    if source == "accumulated":
        return  # Lightning alone does not resume a shuffled epoch exactly
    again = Noting(every=2, probe_every=3, probe_size=12)
    resumed, resumed_state, resumed_rows = go("resumed", again, path=tmp_path / "with" / "step=13.ckpt")
    torch.testing.assert_close(resumed_state, state, rtol=0, atol=0)
    assert resumed.journal == [batch for batch in model.journal if batch.step >= 13]
    found_again = again.probes if source == "probe" else again.found
    assert 0 < len(found_again) < len(found)
    assert found_again == found[-len(found_again) :]
    assert again.state_dict() == measuring.state_dict()
    assert resumed_rows[-1] == pytest.approx(same_rows[-1], nan_ok=True, rel=0, abs=0)


def test_logs_when_the_trainer_does(tmp_path: Path) -> None:
    callback = GradientNoiseScale(probe_every=8)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Linear(), own(draws(12 * 30), batch_size=12), callback, max_epochs=1, logger=logger, log_every_n_steps=8)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "gradient_variance" in row]
    assert [row["step"] for row in rows] == [7, 15, 23, 29]
    assert rows[-1]["gradient_variance"] == pytest.approx(callback.gradient_variance, rel=1e-6)
    assert rows[-1]["gradient_sq_norm"] == pytest.approx(callback.gradient_sq_norm, rel=1e-6)
    assert callback.interval is not None
    names = ("gradient_noise_scale", "gradient_noise_scale_low", "gradient_noise_scale_high")
    assert [rows[-1][name] for name in names] == pytest.approx([callback.noise_scale, *callback.interval], rel=1e-6)


def test_measurements_begin_anew_with_a_run() -> None:
    callback, states = Noting(), []
    for _ in range(2):
        fit(Linear(), own(draws(36), batch_size=12), callback, BatchLRScheduler(12, max_device_batch_size=4), max_epochs=1)
        states.append(callback.state_dict())
    assert states[0] == states[1]
    assert len(states[0]["measurements"]) == 3


def test_an_exception_leaves_no_hooks() -> None:
    class Fails(Linear):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise RuntimeError("no")

    model = Fails()
    with pytest.raises(RuntimeError, match="no"):
        measured(model=model, steps=3)
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6 can run what is compiled eagerly")
def test_a_compiled_model_is_not_compiled_for_the_probes() -> None:
    class Deeper(Linear):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(SIZE, 4), nn.Tanh(), nn.Linear(4, 1))
            self.optimizer = partial(torch.optim.SGD, lr=0.1)

    found = []
    for callbacks in ([], [Noting(probe_every=2)]):
        compiled: list[bool] = []

        def backend(graph: Any, inputs: Any, compiled: list[bool] = compiled) -> Any:
            compiled.append(any("tanh" in str(node.target) for node in graph.graph.nodes))
            return graph.forward

        torch._dynamo.reset()
        model = Deeper()
        model.net = torch.compile(model.net, backend=backend)  # type: ignore[assignment]
        fit(model, own(draws(12 * 6), batch_size=12), *callbacks, max_epochs=1)
        found.append((sum(compiled), [p.tolist() for p in model.parameters()]))
    assert found[0] == found[1]
    assert found[0][0] == 1


# --- a real data set


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.slow
def test_sources_agree_on_fashion_mnist() -> None:
    images, labels = FashionMNIST(FASHION_MNIST).read("train")
    examples = 4000
    train_set = ImageTensors(images[:examples], labels[:examples])

    def train(lr: float, batch: int, cap: int | None, *callbacks: Callback, **arguments: Any) -> Trainer:
        datamodule = FashionMNIST(batch_size=batch)
        datamodule.prepare_data = lambda: None  # type: ignore[method-assign]
        datamodule.train_set = datamodule.val_set = train_set
        model = Classifier(net, 10, optimizer=partial(torch.optim.SGD, lr=lr))
        scheduler = BatchLRScheduler(batch, max_device_batch_size=cap)
        return fit(model, datamodule, scheduler, *callbacks, limit_val_batches=0, **arguments)

    torch.manual_seed(0)
    net = cnn5(width=8)
    train(0.1, 64, None, max_steps=60)
    sources = []
    for batch, cap in ((64, 32), (64, 16), (60, 25)):
        callback, full = Noting(), FullGradientNorm(every=2)
        trainer = train(0.0, batch, cap, callback, full, max_epochs=2)
        found = np.array(callback.found)
        sources.append((found.mean(axis=0), found.std(axis=0, ddof=1) / len(found) ** 0.5))
        # batches are drawn without replacement, so what they say of G lacks the noise of the set's own mean
        sq_norm, variance = sources[-1][0]
        expected = trainer.callback_metrics["full_gradient_norm"].item() ** 2 - variance / examples
        assert abs(sq_norm - expected) < 3 * sources[-1][1][0]
        assert 10 < variance / sq_norm < 10_000
        assert callback.measured is not None and 3 < callback.measured.value < 100_000
    for mean, error in sources:
        for other, other_error in sources:
            assert np.all(np.abs(mean - other) < 3 * np.hypot(error, other_error))


# --- refusals


def test_refusals() -> None:
    for name, value in (("every", 0), ("probe_every", 0), ("window", 0), ("probe_size", 5)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            GradientNoiseScale(**{name: value})
    manual = Linear()
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        measured(model=manual, steps=2)
    for strategy, message in {
        FSDPStrategy: "flat parameters of FSDPStrategy; use `ModelParallelStrategy`",
        DeepSpeedStrategy: "needs whole gradients, which DeepSpeedStrategy does not keep",
    }.items():
        stub: Any = SimpleNamespace(strategy=strategy.__new__(strategy), optimizers=[])
        with pytest.raises(MisconfigurationException, match=message):
            GradientNoiseScale().on_fit_start(stub, Linear())


def test_batches_that_cannot_be_cut_or_counted() -> None:
    class Odd(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0] if isinstance(batch, (list, tuple)) else batch.x).mean()

    class Opaque:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    data = draws(24)

    def together(rows: Any) -> Any:
        return torch.stack([x for x, _ in rows]), torch.ones(3)

    noise = Noting(probe_every=1)
    fit(Odd(), DataLoader(data, 12, collate_fn=together), noise, max_epochs=1)
    assert len(noise.probes) == 2 and all(noise.probes)  # a batch that cannot be cut can be probed
    x = data.tensors[0]
    for data_set, message in (([(x,)] * 2, "batch_size=None"), ([Opaque(x)] * 2, "batch_size=None")):
        with pytest.raises(MisconfigurationException, match=f"the number of examples of a batch is not known.*{message}"):
            fit(Odd(), DataLoader(data_set, batch_size=None), Noting(), max_epochs=1)


# --- the number of examples is the loader's to say


class Graph(NamedTuple):
    """Nodes of several graphs, one after another, as graph libraries put them together."""

    x: Tensor


def together(graphs: list[Tensor]) -> Graph:
    return Graph(torch.cat(graphs))


class OfGraphs(Linear):
    """The gradient of a graph is the mean of its nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch.x).mean()


GRAPHS = [torch.full((2, 1), 1.0), torch.full((2, 1), 2.0)]


@pytest.mark.parametrize("scheduled", [False, True])
def test_two_graphs_of_two_nodes(scheduled: bool) -> None:
    loader = DataLoader(GRAPHS, batch_size=1, collate_fn=together)
    noise = Noting()
    callbacks: list[Callback] = [BatchLRScheduler(2), noise] if scheduled else [noise]
    fit(OfGraphs(), loader, *callbacks, max_epochs=1, accumulate_grad_batches=2)
    ((_, variance),) = noise.found
    assert variance == pytest.approx(0.5)


def test_time_comes_first() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 5.0])
    sequences = [value.expand(7, 1) for value in x]  # seven steps of time
    loader = DataLoader(sequences, batch_size=2, collate_fn=lambda rows: Graph(torch.stack(rows, dim=1)))
    fit(OfGraphs(), loader, noise := Noting(), max_epochs=1, accumulate_grad_batches=2)
    # two pieces of two examples, with means 1.5 and 4.5
    assert noise.found[0].variance == pytest.approx(1.5**2 / (1 / 2 - 1 / 4))


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_last_batch_of_an_epoch_is_shorter(drop_last: bool) -> None:
    class Counts(Noting):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            super().on_after_backward(trainer, pl_module)
            counts.append(self._step.pieces[-1][0].examples)

    counts: list[int] = []
    loader = DataLoader(draws(10), batch_size=4, shuffle=True, drop_last=drop_last)
    fit(Linear(), loader, Counts(probe_every=1, probe_size=6), max_epochs=2)
    assert counts == ([4, 4] if drop_last else [4, 4, 2]) * 2


def test_who_does_not_know_refuses() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(draws(12))

    for data, message in (
        (DataLoader(Stream(), batch_size=4), "reads a stream"),
        ({"a": DataLoader(draws(4)), "b": DataLoader(draws(4))}, "is one of 2"),
        (DataLoader([draws(4).tensors] * 2, batch_size=None), "batch_size=None"),
    ):
        model = Linear()
        with pytest.raises(
            MisconfigurationException, match=f"the number of examples of a batch is not known.*{message}.*BatchLRScheduler"
        ):
            fit(model, data, GradientNoiseScale(), max_epochs=1)
        assert model.journal == []
