"""A loss that is a mean over something else than examples: tokens, pixels, boxes."""

from __future__ import annotations

import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from harness.cases import GROWING, SHRINKING
from harness.data import Stranger, own
from harness.files import flat
from harness.fits import fit, out_of_memory, trained
from harness.loops import whole_steps
from harness.modules import assert_close, equal
from harness.processes import Pair
from harness.sentences import Predictor, Sentences, pad, train_sentences_by_hand
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, FullGradientNorm, GradientNoiseScale, NoiseTarget
from lightning_bsl.callbacks.loss_terms import LossTerms

# A row's terms are what is above 0; the last two rows have none
ROWS = torch.tensor([[1.0, 0, 0], [2, 2, 2], [3, 0, 0], [1, 1, 0], [4, 4, 0], [5, 0, 0], [0, 0, 0], [0, 0, 0]])


class Slope(LightningModule):
    """The gradient of a batch is the mean of its terms. Notes the gradient of each step, ``None`` where there is none.

    Args:
        memory: Rows that fit.
        options: Of the optimizer.
    """

    def __init__(self, memory: int = 99, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.memory, self.options = memory, {"lr": 0.5} | options
        self.gradients: list[float | None] = []

    def loss(self, batch: Any) -> Tensor:
        return (self.weight * batch[0][batch[0] > 0]).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) > self.memory:
            raise out_of_memory()
        return self.loss(batch)

    def loss_terms(self, batch: Any) -> Any:
        return (batch[0] > 0).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append(None if self.weight.grad is None else self.weight.grad.item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), **self.options)


def rows(*indices: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(ROWS[list(indices)].double()), batch_size=1)


def gradients(batch_size: int, *indices: int) -> list[float | None]:
    """The means over the terms of each step."""
    found: list[float | None] = []
    for start in range(0, len(indices), batch_size):
        step = ROWS[list(indices[start : start + batch_size])]
        found.append(step[step > 0].mean().item() if (step > 0).any() else None)
    return found


ORDERS = [(0, 1), (1, 0), (0, 1, 2, 3), (6, 0, 1, 7), (6, 7, 0, 1, 2), (0, 1, 6, 7, 4), (0, 6, 7, 1, 6, 3, 4, 5)]


@pytest.mark.quick(batch_size=[4], cap=[None, 1, 2, 3, "windows"])
@pytest.mark.quick(batch_size=[4], indices=[ORDERS[1], ORDERS[4], ORDERS[6]])
@pytest.mark.parametrize("indices", ORDERS)
@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("cap", [None, 1, 2, 3, "auto", "windows"])
@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_every_cut_gives_the_mean_over_the_terms(cap: Any, batch_size: int, indices: tuple[int, ...]) -> None:
    batch_size = min(batch_size, len(indices))
    model = Slope(memory=1 if cap == "auto" else 99)
    scheduler = BatchLRScheduler(batch_size, max_device_batch_size=None if cap == "windows" else cap)
    fit(model, rows(*indices), scheduler, max_epochs=1, accumulate_grad_batches=2 if cap == "windows" else 1)
    expected = gradients(batch_size, *indices)
    assert model.gradients == pytest.approx(expected)
    assert model.weight.item() == pytest.approx(-0.5 * sum(filter(None, expected)))
    assert (scheduler.progress.step, scheduler.progress.samples) == (len(expected), len(indices))
    assert model.trainer.global_step == len(expected)


def test_the_smallest_input() -> None:
    for cap in (None, 1):
        model = Slope()
        fit(model, rows(0, 1), BatchLRScheduler(2, max_device_batch_size=cap), max_epochs=1)
        assert model.gradients == [1.75]


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (6, 0, 1, 4), (0, 6), (6, 7)])
@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_the_loss_of_a_step_whose_memory_ran_out(order: tuple[int, ...]) -> None:
    class Notes(Slope):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(outputs["loss"].item())

    model = Notes(memory=1, lr=0.0)
    model.losses = []
    nn.init.ones_(model.weight)
    fit(model, rows(*order), BatchLRScheduler(len(order), max_device_batch_size="auto"), max_epochs=1)
    assert model.losses == pytest.approx([gradients(len(order), *order)[0] or 0.0])


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(TensorDataset(ROWS[:7].double()))


class Streams(Stranger):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=self.hparams.batch_size)


def test_a_stream_in_windows() -> None:
    model, scheduler = Slope(), BatchLRScheduler(4)
    fit(model, Streams(TensorDataset(ROWS), batch_size=2), scheduler, max_epochs=1, accumulate_grad_batches=2)
    assert model.gradients == pytest.approx(gradients(4, *range(7)))  # the last window has one batch of two, and one of one
    assert scheduler.progress.samples == 7


@pytest.mark.parametrize("cap", [None, 1])
def test_a_step_without_terms_changes_nothing(cap: int | None) -> None:
    options = {"momentum": 0.9, "weight_decay": 0.1}
    skipped, left_out = Slope(**options), Slope(**options)
    fit(skipped, rows(0, 1, 6, 7, 2, 3), BatchLRScheduler(2, max_device_batch_size=cap), max_epochs=1)
    fit(left_out, rows(0, 1, 2, 3), BatchLRScheduler(2, max_device_batch_size=cap), max_epochs=1)
    assert skipped.weight.item() == left_out.weight.item() != 0
    assert skipped.gradients == [left_out.gradients[0], None, left_out.gradients[1]]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cap", [None, 1, 3, "auto"])
@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_a_loss_scaler(cap: Any, fused: bool) -> None:
    class Half(Slope):
        def __init__(self) -> None:
            super().__init__(1 if cap == "auto" else 99, fused=fused)
            self.weight = nn.Parameter(torch.zeros(()))

        def loss_terms(self, batch: Any) -> Any:
            return 10_000 * super().loss_terms(batch)  # many times what half precision holds

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            """The gradients of a fused optimizer are scaled still."""

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    order = (0, 1, 6, 7, 2, 3, 6, 7, 7, 6, 4, 6)
    data = DataLoader(TensorDataset(ROWS[list(order)]), batch_size=1)
    scheduler = BatchLRScheduler(4 if cap == 3 else 2, max_device_batch_size=cap)
    model = Half()
    fit(model, data, scheduler, max_epochs=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    expected = gradients(4 if cap == 3 else 2, *order)
    assert model.weight.item() == pytest.approx(-0.5 * sum(filter(None, expected)), rel=1e-3)
    assert scaler.get_scale() == 8.0  # nothing overflowed
    assert scheduler.progress.step == len(expected)


def test_numbers_near_one_in_half_precision() -> None:
    """A loss in half precision, of which a step has 300,000 terms."""

    class Half(Slope):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.float16))

        def loss_terms(self, batch: Any) -> Any:
            return 30_000 * super().loss_terms(batch)

    model = Half()
    fit(model, DataLoader(TensorDataset(ROWS.half()), 1), BatchLRScheduler(6, max_device_batch_size=1), max_steps=1)
    assert model.gradients == pytest.approx(gradients(6, *range(6)), rel=2e-3)


class Weighted(Slope):
    """Terms are weights of classes, which are not whole."""

    weights = torch.tensor([0.25, 1.5, 0.7], dtype=torch.float64)

    def loss(self, batch: Any) -> Tensor:
        weights = self.weights[batch[0][:, 0].long() % 3]
        return (weights * self.weight * batch[0].sum(dim=1)).sum() / weights.sum()

    def loss_terms(self, batch: Any) -> float:
        return float(self.weights[batch[0][:, 0].long() % 3].sum())


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_terms_that_are_not_whole(cap: int) -> None:
    whole, split = (Weighted() for _ in range(2))
    fit(whole, rows(*range(6)), BatchLRScheduler(3), max_epochs=1)
    fit(split, rows(*range(6)), BatchLRScheduler(3, max_device_batch_size=cap), max_epochs=1)
    assert split.gradients == pytest.approx(whole.gradients, rel=1e-14)


def test_a_piece_without_terms_and_one_without_a_batch() -> None:
    def collate(rows: list[Any]) -> Any:
        return None if rows[0][0][0] == 3 else default_collate(rows)

    loader = DataLoader(TensorDataset(ROWS.double()), batch_size=1, collate_fn=collate)
    model, scheduler = Slope(), BatchLRScheduler(8, max_device_batch_size=1)
    fit(model, loader, scheduler, max_epochs=1)
    assert model.gradients == pytest.approx(gradients(8, 0, 1, 3, 4, 5))


@pytest.mark.parametrize("last", [0, 6])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_last_piece_without_a_loss(scaled: bool, last: int) -> None:
    class NoLoss(Slope):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch[0][0, 0] == 5 else super().training_step(batch, batch_idx)

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler) if scaled else None
    model, scheduler = NoLoss(momentum=0.9), BatchLRScheduler(2, max_device_batch_size=1)
    fit(model, rows(1, 2, last, 5, 0, 1), scheduler, max_epochs=1, plugins=plugin)
    plain, velocity = 0.0, 0.0
    for gradient in filter(None, [9 / 4, 1.0 if last == 0 else None, 1.75]):
        velocity = 0.9 * velocity + gradient
        plain -= 0.5 * velocity
    assert model.weight.item() == pytest.approx(plain)
    assert scheduler.progress.step == 3


@pytest.mark.parametrize(
    "value", [np.int64(3), np.float32(3), np.array(3), Fraction(6, 2), torch.tensor([3], dtype=torch.half)]
)
def test_kinds_of_numbers(value: Any) -> None:
    class Three(Slope):
        def loss_terms(self, batch: Any) -> Any:
            return value

    model = Three()
    fit(model, rows(0, 1), BatchLRScheduler(2, max_device_batch_size=1), max_epochs=1)
    assert model.gradients == [1.5]


@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.parametrize("cap", [None, 1, "auto"])
def test_a_step_without_terms_is_not_clipped(cap: Any, clip: str) -> None:
    model = Slope()
    options = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": clip}
    fit(model, rows(0, 1, 6, 7, 1, 2), BatchLRScheduler(2, max_device_batch_size=cap), max_epochs=1, **options)
    assert model.weight.item() == pytest.approx(-0.5 * (0.5 + 0.5))
    assert model.trainer.gradient_clip_val == 0.5


def test_a_step_that_a_scaler_leaves_out_is_clipped_once() -> None:
    class NoLoss(Slope):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch[0][0, 0] == 5 else super().training_step(batch, batch_idx)

    model = NoLoss()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=65536.0))
    scheduler = BatchLRScheduler(2, max_device_batch_size=1)
    fit(model, rows(1, 5), scheduler, max_epochs=1, plugins=plugin, gradient_clip_val=0.5)
    assert model.weight.item() == pytest.approx(-0.25)


def test_a_fused_optimizer_whose_last_batch_is_none() -> None:
    def collate(rows: list[Any]) -> Any:
        return None if rows[0][0][0] == 5 else default_collate(rows)

    class Half(Slope):
        def __init__(self) -> None:
            super().__init__(fused=True)
            self.weight = nn.Parameter(torch.zeros(()))

    model, scheduler = Half(), BatchLRScheduler(2, max_device_batch_size=1)
    loader = DataLoader(TensorDataset(ROWS[[6, 5, 0, 1]]), batch_size=1, collate_fn=collate)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    fit(model, loader, scheduler, max_epochs=1, plugins=plugin)
    assert model.weight.item() == pytest.approx(-0.5 * 1.75)
    assert scheduler.progress.step == 2


def test_an_optimizer_that_clears_gradients_to_zero() -> None:
    class Zeroing(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none)

    class Decaying(Slope):
        def configure_optimizers(self) -> Any:
            return Zeroing(self.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)

    found = []
    for order in ((0, 1, 6, 7, 2, 3), (0, 1, 2, 3)):
        fit(model := Decaying(), rows(*order), BatchLRScheduler(2, max_device_batch_size=1), max_epochs=1)
        found.append(model.weight.item())
    assert found[0] == found[1] != 0


class Nothing(torch.autograd.Function):
    """The identity, with an attribute that only nodes of parameters have otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = x
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


@pytest.mark.parametrize("kind", ["reentrant", "function", "shared"])
@pytest.mark.parametrize("cap", [None, 1])
def test_graphs_that_give_nan(cap: Any, kind: str) -> None:
    class Graph(Slope):
        def loss(self, batch: Any) -> Tensor:
            (x,) = batch
            if kind == "reentrant":
                return checkpoint(lambda weight: (weight * x[x > 0]).mean(), self.weight, use_reentrant=True)
            if kind == "function":
                return Nothing.apply(self.weight * x[x > 0]).mean()
            if self.trainer.global_step != self.shared[0]:
                self.shared = (self.trainer.global_step, self.weight * 1)
            return (self.shared[1] * x[x > 0]).mean()

        shared: Any = (-1, None)

        def backward(self, loss: Tensor) -> None:  # type: ignore[override]
            loss.backward(retain_graph=True)

    model = Graph()
    order = (6, 0, 7, 1, 2, 6) if cap else (6, 7, 0, 1)
    size = 3 if cap else 2
    fit(model, rows(*order), BatchLRScheduler(size, max_device_batch_size=cap), max_epochs=1)
    assert model.gradients == pytest.approx(gradients(size, *order))


@pytest.mark.parametrize(("counts", "slopes"), [((1, 10_000), (20, 20)), ((1, 4000), (40, 40)), ((5000, 1, 9000), (3, 4, 5))])
def test_terms_that_turn_out_to_be_many_more(counts: tuple[int, ...], slopes: tuple[int, ...]) -> None:
    class Half(Slope):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.float16))

        def loss(self, batch: Any) -> Tensor:
            return self.weight * batch[0].mean()

        def loss_terms(self, batch: Any) -> int:
            return counts[int(batch[1])]

    model = Half()
    data = TensorDataset(torch.tensor(slopes, dtype=torch.float16), torch.arange(len(slopes)))
    fit(model, DataLoader(data, 1), BatchLRScheduler(len(slopes), max_device_batch_size=1), max_epochs=1, precision="16-true")
    expected = sum(n * slope for n, slope in zip(counts, slopes)) / sum(counts)
    assert model.gradients == pytest.approx([expected], rel=2e-3)


def test_a_step_of_many_terms_before_one_of_few() -> None:
    class Half(Slope):
        def __init__(self) -> None:
            super().__init__(lr=0.0)
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.float16))

        def loss(self, batch: Any) -> Tensor:
            return self.weight * 0.01

        def loss_terms(self, batch: Any) -> int:
            return 60_000 if self.global_step == 0 else 1

    model = Half()
    data = DataLoader(TensorDataset(torch.ones(4)), 1)
    fit(model, data, BatchLRScheduler(2, max_device_batch_size=1), max_epochs=1, precision="16-true")
    assert model.gradients == pytest.approx([0.01, 0.01], rel=2e-3)


def test_lbfgs_takes_whole_steps() -> None:
    class Newton(Words):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    models = [Newton() for _ in range(2)]
    for model, cap in zip(models, (None, "auto")):
        model.memory = 9 if cap else 99
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(model, own(SENTENCES, collate_fn=pad), BatchLRScheduler(16, max_device_batch_size=cap), max_epochs=1)
    assert_close(*models, rtol=1e-9, atol=1e-9)
    with pytest.raises(MisconfigurationException, match="LBFGS evaluates a step's batch several times"):
        fit(Newton(), own(SENTENCES, collate_fn=pad), BatchLRScheduler(16, max_device_batch_size=4), max_epochs=1)


def test_a_noise_scale_in_terms_is_no_batch_size() -> None:
    trigger = NoiseTarget()
    scheduler = AdaptiveBatchLRScheduler(2, 0.1, trigger, maximum=4, check_every=1)
    with pytest.raises(MisconfigurationException, match="no number of examples"):
        fit(Slope(), rows(*range(6)), scheduler, GradientNoiseScale(per="terms"), max_epochs=1)


# --- a language model


class Words(Predictor):
    """The loss is a mean over tokens.

    Args:
        dropout: Probability.
        memory: Rows that fit.
    """

    def __init__(self, dropout: float = 0.0, memory: int = 99) -> None:
        super().__init__(dropout)
        self.memory = memory
        self.sizes: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch).flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.training:
            self.sizes.append(len(batch["tokens"]))
        if len(batch["tokens"]) > self.memory:
            raise out_of_memory()
        return self.loss(batch)

    def loss_terms(self, batch: Any) -> Tensor:
        return (batch["labels"][:, 1:] != -100).sum()


SENTENCES = Sentences(longest=9)


def by_hand(model: Words, schedule: Any, clip: float | None, epochs: int = 2) -> Words:
    steps = flat(whole_steps(schedule, len(SENTENCES), epochs))
    return train_sentences_by_hand(model, SENTENCES, steps, clip)


@settings(max_examples=6)
@given(
    schedule=st.sampled_from([GROWING, SHRINKING]),
    cap=st.integers(1, 31) | st.just("auto"),
    memory=st.integers(1, 20),
    clip=st.sampled_from([None, 0.05]),
)
@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_a_padded_language_model_equals_a_plain_loop(schedule: Any, cap: Any, memory: int, clip: float | None) -> None:
    model = Words(memory=memory if cap == "auto" else 99)
    data, scheduler = own(SENTENCES, collate_fn=pad), BatchLRScheduler(schedule, None, cap)
    fit(model, data, scheduler, max_epochs=2, gradient_clip_val=clip)
    assert_close(model, by_hand(Words(), schedule, clip))


@pytest.mark.parametrize("cap", [4, "auto"])
@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_resumes_bit_for_bit(cap: Any, tmp_path: Path) -> None:
    class SaveAll(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{len(whole.sizes):03}.ckpt")

    def go(model: Words, *callbacks: Callback, **options: Any) -> Words:
        torch.manual_seed(4)
        scheduler = BatchLRScheduler(GROWING, 0.3, cap)
        return trained(model, own(SENTENCES, collate_fn=pad), scheduler, *callbacks, max_epochs=2, **options)

    memory = 6 if cap == "auto" else 99
    whole = Words(0.2, memory)
    go(whole, SaveAll())
    for path in sorted(tmp_path.iterdir())[::5]:
        assert equal(go(Words(0.2, memory), ckpt_path=path), whole), path


def test_one_piece_on_one_process_is_left_alone() -> None:
    class Examples(Words):
        loss_terms = None  # type: ignore[assignment]

    with_terms, without = Words(), Examples()
    for model in (with_terms, without):
        fit(model, own(SENTENCES, collate_fn=pad), BatchLRScheduler(GROWING), max_epochs=2)
    assert equal(with_terms, without)


# --- processes


def two(name: str, indices: tuple[int, ...], batch_size: int, cap: Any, strategy: str = "ddp") -> Any:
    """In each of two processes: the gradients of each step, the weight, the steps."""
    model = {"automatic": Slope, "manual": Manual}[name](momentum=0.9)
    scheduler = BatchLRScheduler(batch_size, max_device_batch_size=cap)
    fit(model, rows(*indices), scheduler, max_epochs=1, devices=2, strategy=strategy)
    return model.gradients, model.weight.item(), scheduler.progress.step, scheduler.progress.samples


class Manual(Slope):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.quick(batch_size=[4])
@pytest.mark.parametrize("indices", ORDERS)
@pytest.mark.parametrize(("batch_size", "cap"), [(2, None), (4, None), (4, 1), (3, 1), (3, None)])
def test_two_processes_train_as_one(batch_size: int, cap: Any, indices: tuple[int, ...], pair: Pair) -> None:
    batch_size = min(batch_size, len(indices))
    one = Slope(momentum=0.9)
    fit(one, rows(*indices), BatchLRScheduler(batch_size), max_epochs=1)
    for found, weight, steps, samples in pair(two, "automatic", indices, batch_size, cap):
        assert found == pytest.approx(one.gradients)
        assert weight == pytest.approx(one.weight.item(), rel=1e-12)
        assert (steps, samples) == (len(one.gradients), len(indices))


@pytest.mark.parametrize("indices", ORDERS[:4])
def test_two_processes_step_by_hand(indices: tuple[int, ...], pair: Pair) -> None:
    expected = gradients(2, *indices)
    for found, *_ in pair(two, "manual", indices, 2, None):
        assert found == pytest.approx(expected)


class Sharded(Words):
    def configure_model(self) -> None:
        if self.device_mesh["data_parallel"].size() == 1:
            return  # both processes train on every example, and here they happen to hold the whole model, too
        from torch.distributed._composable.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def train_words(strategy: str, cap: Any, memory: int = 99) -> list[Any]:
    strategies: dict[str, Any] = {
        "fsdp": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        "tensor": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
        "ddp": lambda: "ddp",
    }
    model = (Words if strategy == "ddp" else Sharded)(memory=memory)
    data, scheduler = own(SENTENCES, collate_fn=pad), BatchLRScheduler(GROWING, None, cap)
    options = {"devices": 2, "strategy": strategies[strategy]()}
    clip = None if strategy == "fsdp" else 0.05
    fit(model, data, scheduler, max_epochs=2, gradient_clip_val=clip, use_distributed_sampler=False, **options)
    return [(each.full_tensor() if hasattr(each, "full_tensor") else each).tolist() for each in model.parameters()]


@pytest.mark.parametrize(("strategy", "cap"), [("ddp", 3), ("ddp", "auto"), ("fsdp", 3), ("tensor", 3)])
def test_two_processes_train_a_padded_language_model(strategy: str, cap: Any, pair: Pair) -> None:
    if strategy != "ddp" and torch.__version__ < "2.6":
        pytest.skip("gloo cannot scatter gradients before torch 2.6")
    reference = by_hand(Words(), GROWING, None if strategy == "fsdp" else 0.05)
    expected = [each.tolist() for each in reference.parameters()]
    for weights in pair(train_words, strategy, cap, 7 if cap == "auto" else 99):
        for found, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(torch.tensor(found).double(), torch.tensor(wanted).double(), rtol=1e-6, atol=1e-7)


# --- measurements


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 61])
def test_the_full_gradient_does_not_depend_on_its_batch_size(batch_size: int, own_loss: bool) -> None:
    class Measured(Words):
        if own_loss:
            full_loss = Words.loss

    norm = FullGradientNorm(batch_size=batch_size)
    model = Measured()
    reference = Words()
    reference.loss(pad(list(SENTENCES))).backward()
    expected = torch.cat([each.grad.flatten() for each in reference.parameters()]).norm().item()
    values: list[Any] = []

    class Measures(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            values.append(norm.measure(trainer, pl_module))

    fit(model, own(SENTENCES, collate_fn=pad), BatchLRScheduler(7), norm, Measures(), max_steps=1)
    assert values[0].norm == pytest.approx(expected, rel=1e-12)
    assert values[0].loss == pytest.approx(reference.loss(pad(list(SENTENCES))).item(), rel=1e-12)


def measure_words() -> float:
    norm, values = FullGradientNorm(batch_size=7), []

    class Measures(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            values.append(norm.measure(trainer, pl_module).norm)

    fit(Words(), own(SENTENCES, collate_fn=pad), norm, Measures(), max_steps=1, devices=2, strategy="ddp",
        use_distributed_sampler=False)  # fmt: skip
    return values[0]


def test_the_full_gradient_of_two_processes(pair: Pair) -> None:
    reference = Words()
    reference.loss(pad(list(SENTENCES))).backward()
    expected = torch.cat([each.grad.flatten() for each in reference.parameters()]).norm().item()
    assert pair(measure_words) == pytest.approx([expected] * 2, rel=1e-12)


def test_the_full_gradient_of_rows_without_terms() -> None:
    norm, values = FullGradientNorm(batch_size=1), []

    class Measures(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            values.append(norm.measure(trainer, pl_module))

    for order in ((0, 1, 6), (6, 7)):
        fit(Slope(lr=0.0), rows(*order), BatchLRScheduler(1), norm, Measures(), max_epochs=1)
    assert values[0].norm == pytest.approx(1.75)
    assert str(values[1]) == "FullGradient(norm=nan, loss=nan)"


class Vectors(LightningModule):
    """A term is a vector, of which a row has one to four; the gradient is the mean over the vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        vectors, mask = batch
        return (vectors[mask] @ self.weight).mean()

    def loss_terms(self, batch: Any) -> Tensor:
        return batch[1].sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Noting(GradientNoiseScale):
    def __init__(self, **options: Any) -> None:
        super().__init__(every=1, **{"probe_every": None} | options)
        self.found: list[Any] = []

    def _record(self, values: Any) -> None:
        self.found.append(values)


MEAN, SPREAD = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64), 2.0


def within_three_standard_errors(values: list[float], expected: float) -> bool:
    found = torch.tensor(values, dtype=torch.float64)
    return abs(found.mean() - expected) < 3 * found.std() / len(values) ** 0.5


@pytest.mark.quick(cap=[3])
@pytest.mark.parametrize(("per", "cap"), [("terms", 3), ("terms", 1), ("examples", 1)])
def test_the_noise_scale_of_uneven_terms(per: Any, cap: int) -> None:
    steps, size = 300, 8
    generator = torch.Generator().manual_seed(1)
    number = steps * size
    mask = torch.arange(4) < torch.randint(1, 5, (number, 1), generator=generator)
    noise = torch.randn(number, 4, 3, generator=generator, dtype=torch.float64) * SPREAD
    if per == "examples":
        noise = noise[:, :1].expand(-1, 4, -1)  # all terms of an example have its gradient
    data = TensorDataset(MEAN + noise, mask)
    measure = Noting(per=per)
    scheduler = BatchLRScheduler(size, max_device_batch_size=cap)
    fit(Vectors(), DataLoader(data, batch_size=1), scheduler, measure, max_epochs=1)
    assert len(measure.found) == steps
    assert within_three_standard_errors([each.variance for each in measure.found], 3 * SPREAD**2)
    assert within_three_standard_errors([each.sq_norm for each in measure.found], (MEAN @ MEAN).item())


def test_pieces_without_terms_are_no_pieces() -> None:
    measure = Noting(per="terms")
    fit(Slope(lr=0.0), rows(0, 6, 1, 7, 6, 7), BatchLRScheduler(4, max_device_batch_size=1), measure, max_epochs=1)
    # pieces of one and three terms with means 1 and 2, in a step with mean 1.75; the second step has nothing
    ((sq_norm, variance),) = measure.found
    spread = (1 * 1 + 3 * 4) / 4 - 1.75**2
    expected = spread / (2 / 4 - 1 / 4)
    assert (sq_norm, variance) == pytest.approx((1.75**2 - expected / 4, expected))


def test_terms_that_nobody_counts_cannot_be_a_size() -> None:
    class Uncounted(Slope):
        loss_terms = None  # type: ignore[assignment]

    with pytest.raises(MisconfigurationException, match=r"give it a method `loss_terms\(batch\)`"):
        fit(Uncounted(), rows(0, 1), GradientNoiseScale(per="terms"), max_epochs=1)
    with pytest.raises(ValueError, match="unknown `per='tokens'`"):
        GradientNoiseScale(per="tokens")  # type: ignore[arg-type]


# --- told


class Silent(Slope):
    """Does not say what its loss is a mean over."""

    loss_terms = None  # type: ignore[assignment]

    def loss(self, batch: Any) -> Tensor:
        values = batch["x"] if isinstance(batch, dict) else batch[0]
        return (self.weight * values).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class Masked(NamedTuple):
    x: Tensor
    attention_mask: Tensor


def masked(kind: str, index: int) -> Any:
    x = torch.ones(3, dtype=torch.float64)
    labels = torch.tensor([1, 2, -100 if index > 2 else 3])  # the first batches are not masked
    examples: dict[str, Any] = {
        "attention_mask": {"x": x, "attention_mask": torch.ones(3)},
        "labels": {"x": x, "labels": labels},
        "nested": {"x": x, "targets": {"text": [labels]}},
        "tuple": (x, labels),
        "named": Masked(x, torch.ones(3)),
        "plain": (x, torch.tensor(1)),
        "pixels": (x, torch.tensor([156], dtype=torch.uint8)),
        "sound": (x, torch.tensor([-100], dtype=torch.int16)),
    }
    return examples[kind]


@pytest.mark.parametrize("kind", ["attention_mask", "labels", "nested", "tuple", "named", "plain", "pixels", "sound"])
@pytest.mark.parametrize("cap", [None, 1, 4])
def test_a_mask_is_told(cap: int | None, kind: str) -> None:
    data = [masked(kind, index) for index in range(6)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Silent(), DataLoader(data, batch_size=1), BatchLRScheduler(2, max_device_batch_size=cap), max_epochs=2)
    found = [str(each.message) for each in told if "loss_terms" in str(each.message)]
    assert len(found) == (kind not in ("plain", "pixels", "sound") and cap == 1)
    if found:
        assert ("`attention_mask`" if kind in ("attention_mask", "named") else "labels of -100") in found[0]
        assert "give Silent a method `loss_terms(batch)`" in found[0]


def test_sparse_and_nested_tensors_are_no_labels() -> None:
    def collate(examples: list[Any]) -> Any:
        ones = torch.ones(len(examples), 3, dtype=torch.int64)
        sparse = (ones.to_sparse(), ones.to_sparse_csr(), torch.nested.nested_tensor([*ones]))
        return {"x": torch.stack([x for (x,) in examples]), "others": sparse}

    data = TensorDataset(torch.ones(4, 3, dtype=torch.float64))
    fit(
        Silent(), DataLoader(data, batch_size=1, collate_fn=collate), BatchLRScheduler(2, max_device_batch_size=1), max_epochs=1
    )


def test_a_module_that_says_what_it_is_a_mean_over_is_not_told() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*loss_terms")
        fit(Words(), own(SENTENCES, collate_fn=pad), BatchLRScheduler(8, max_device_batch_size=2), max_epochs=1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned None; return an int, a float or a scalar tensor"),
        (torch.ones(3), r"returned a tensor of torch.float32, shape \(3,\)"),
        (True, "returned True"),
        (torch.tensor(True), "returned a tensor of torch.bool"),
        (-1, "returned -1.0; return a number of terms, 0 or more"),
        (torch.tensor(float("nan")), "returned nan"),
        ("8", "returned '8'"),
    ],
)
def test_what_is_no_number_is_refused(value: Any, message: str) -> None:
    class Wrong(Slope):
        def loss_terms(self, batch: Any) -> Any:
            return value

    model = Wrong()
    with pytest.raises(MisconfigurationException, match=f"`Wrong.loss_terms` {message}"):
        fit(model, rows(0, 1), BatchLRScheduler(2), max_epochs=1)
    assert model.weight.item() == 0


def test_a_module_that_fetches_its_batches_is_refused() -> None:
    class Fetches(Slope):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(MisconfigurationException, match=r"`loss_terms\(batch\)` cannot be called"):
        fit(Fetches(), rows(0, 1), BatchLRScheduler(2), max_epochs=1)


# --- without a Trainer


@given(
    counts=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), min_size=1, max_size=5), processes=st.integers(1, 4)
)
def test_weights_are_shares_of_the_terms(counts: list[list[int]], processes: int) -> None:
    # every process has the same micro-batches, so a sum over processes is a product
    weights: list[float] = []

    def multiply(factor: float) -> None:
        weights[:] = [weight * factor for weight in weights]

    terms = LossTerms(float, lambda value: value * processes, processes, multiply=multiply)
    for step in counts:
        terms.begin(len(step) * processes, split=len(step) > 1)
        weights.clear()
        for part, number in enumerate(step):
            terms.begin_piece(number, examples=1)
            weights.append(terms.weight)
            terms.note_backward(part)
        factor = terms.factor()
        if not sum(step):
            assert factor == 0
            continue
        for number, weight in zip(step, weights):
            assert weight * factor == pytest.approx(number / sum(step))
            assert weight <= (3 if processes == 1 else 4 * len(step) * 50)


def test_checkpoints_say_how_many_terms_an_example_has(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Slope(), rows(0, 1), BatchLRScheduler(2), saver, enable_checkpointing=True, max_epochs=1)
    (state,) = (
        state for key, state in torch.load(tmp_path / "step=1.ckpt")["callbacks"].items() if key.startswith("BatchLRScheduler")
    )
    assert state["terms_per_example"] == 2.0
