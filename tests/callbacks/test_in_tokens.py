"""Batch sizes in tokens, of examples of uneven lengths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from harness.data import own
from harness.fits import fit, out_of_memory
from harness.modules import equal
from harness.processes import Pair
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, BatchSizeDataModule
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.data.lengths import Lengths
from lightning_bsl.schedules import Exponential, JointSchedule, Linear, LinearScaling, Milestones, Progress, plan, seesaw

N, SEED = 61, 1
GENERATOR = torch.Generator().manual_seed(4)
LENGTHS = torch.randint(1, 13, (N,), generator=GENERATOR)
MASK = torch.arange(12) < LENGTHS[:, None]
X = torch.randn(N, 12, generator=GENERATOR, dtype=torch.float64) * MASK
DATA = TensorDataset(X, MASK, torch.arange(N))
GROWING = Milestones([40, 90, 150], at=[4, 9], unit="step")
SHRINKING = Milestones([150, 33], at=[70], unit="samples")


class Curve(LightningModule):
    """A mean over tokens of a curved loss.

    Args:
        memory: Padded tokens that fit.
    """

    def __init__(self, memory: float = 10**6, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        self.drop, self.memory = nn.Dropout(dropout), memory
        self.journal: list[tuple[int, list[int], float]] = []  # steps before, the examples, the rate
        self.announced: list[Any] = []

    def on_train_epoch_start(self) -> None:
        self.announced.append(self.trainer.num_training_batches)

    def loss(self, batch: Any) -> Tensor:
        x, mask, _ = batch
        return ((self.drop(x)[mask] * self.weight[0] + self.weight[1]).sin() - 0.4).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if int(batch[1].sum(dim=1).max()) * len(batch[0]) > self.memory:
            self.journal = [each for each in self.journal if each[0] != self.trainer.global_step]
            raise out_of_memory()
        self.journal.append((self.trainer.global_step, batch[2].tolist(), self.trainer.optimizers[0].param_groups[0]["lr"]))
        return self.loss(batch)

    def loss_terms(self, batch: Any) -> Any:
        return batch[1].sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def data(**options: Any) -> BatchSizeDataModule:
    return own(DATA, **{"lengths": LENGTHS, "seed": SEED} | options)


def scheduler(batch_size: Any, lr: Any = None, cap: Any = None) -> BatchLRScheduler:
    return BatchLRScheduler(batch_size, lr, cap, batch_size_unit="tokens")


def steps_of(
    schedule: Any, epochs: int = 2, number: int = N, drop_last: bool = False, lengths: Any = None
) -> list[tuple[Progress, list[int]]]:
    """The clock before each step, and its examples: one after another, until they have as many tokens."""
    lengths = LENGTHS.tolist() if lengths is None else lengths
    clock, steps = Progress(), []
    for epoch in range(epochs):
        step: list[int] = []
        for index in GlobalBatchSampler(len(lengths), 1, seed=SEED).permutation(epoch)[:number]:
            step.append(index)
            if sum(lengths[i] for i in step) >= schedule(clock):
                steps.append((clock, step))
                clock, step = clock.advance(len(step)), []
        if step and not drop_last:
            steps.append((clock, step))
            clock = clock.advance(len(step))
        clock = clock.next_epoch()
    return steps


def by_hand(steps: list[tuple[Progress, list[int]]], lr: Any = None) -> Tensor:
    model = Curve()
    optimizer = model.configure_optimizers()
    for clock, step in steps:
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr(clock)
        optimizer.zero_grad()
        model.loss(DATA[step]).backward()
        optimizer.step()
    return model.weight.detach()


def check(model: Curve, found: BatchLRScheduler, steps: list[tuple[Progress, list[int]]], lr: Any = None) -> None:
    torch.testing.assert_close(model.weight.detach(), by_hand(steps, lr), rtol=1e-12, atol=1e-13)
    samples = sum(len(step) for _, step in steps)
    assert found.progress[1:3] == (len(steps), samples)
    assert found.plan is not None and (found.plan.steps, found.plan.samples) == (len(steps), samples)
    trained: list[list[int]] = [[] for _ in steps]
    for step, indices, rate in model.journal:
        trained[step] += indices
        assert lr is None or rate == pytest.approx(lr(steps[step][0]), rel=1e-14)
    assert list(map(sorted, trained)) == [sorted(step) for _, step in steps]


@pytest.mark.parametrize("schedule", [GROWING, SHRINKING, lambda progress: 20 + 7 * progress.step])
@pytest.mark.parametrize("cap", [None, 3, "auto", "tokens"])
@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
def test_equals_an_independent_loop(schedule: Any, cap: Any) -> None:
    model = Curve(60 if cap == "auto" else 10**6)
    found = scheduler(schedule, None, None if cap == "tokens" else cap)
    fit(model, data(max_device_tokens=26 if cap == "tokens" else None), found, max_epochs=2)
    check(model, found, steps_of(schedule))
    assert cap == "auto" or sum(model.announced) == len(model.journal)
    if cap == "tokens":
        assert all(int(LENGTHS[indices].max()) * len(indices) <= 26 for _, indices, _ in model.journal)


@pytest.mark.parametrize(
    "options",
    [{"drop_last": True}, {"samples_per_epoch": 40}, {"num_workers": 2}, {"samples_per_epoch": 40, "drop_last": True}],
)
@pytest.mark.parametrize("tokens", [None, 26])
def test_other_epochs(options: dict[str, Any], tokens: int | None) -> None:
    model, found = Curve(), scheduler(GROWING)
    fit(model, data(**options, max_device_tokens=tokens), found, max_epochs=2)
    check(model, found, steps_of(GROWING, 2, options.get("samples_per_epoch", N), options.get("drop_last", False)))


RATES: dict[str, Any] = {
    "rule": (LinearScaling(0.2, base_batch_size=40), lambda clock: 0.2 * GROWING(clock) / 40),
    "steps": (Milestones([0.2, 0.1], at=[6], unit="step"), None),
    "samples": (Milestones([0.2, 0.1, 0.05], at=[30, 60], unit="samples"), None),
    "function": (lambda clock: 0.2 / (1 + clock.samples), None),
    "fraction": (Exponential(0.2, factor=0.5, every=0.5, unit="samples"), None),
}


@pytest.mark.parametrize("name", RATES)
def test_rates(name: str) -> None:
    lr, expected = RATES[name]
    model, found = Curve(), scheduler(GROWING, lr)
    fit(model, data(max_device_tokens=40), found, max_epochs=2)
    assert found.plan is not None
    horizon = found.plan.horizon
    check(model, found, steps_of(GROWING), lambda clock: (expected or lr)(clock._replace(horizon=horizon)))


@pytest.mark.parametrize("options", [{"max_steps": 7, "max_epochs": -1}, {"limit_train_batches": 3, "max_epochs": 3}])
def test_a_run_that_ends_elsewhere(options: dict[str, Any]) -> None:
    model, found = Curve(), scheduler(GROWING)
    fit(model, data(), found, **options)
    assert found.plan is not None
    assert (found.plan.steps, found.plan.samples) == found.progress[1:3]
    assert found.progress.step == (7 if "max_steps" in options else 9)
    if "max_steps" in options:
        check(model, found, steps_of(GROWING)[:7])


class SaveAll(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{len(module.journal):03}.ckpt")


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    def go(model: Curve, *callbacks: Callback, **options: Any) -> None:
        torch.manual_seed(4)
        fit(model, data(max_device_tokens=26), scheduler(GROWING, 0.2), *callbacks, max_epochs=2, **options)

    go(whole := Curve(dropout=0.2), SaveAll(tmp_path))
    for path in sorted(tmp_path.iterdir())[::6]:
        go(model := Curve(dropout=0.2), ckpt_path=path)
        assert equal(model, whole), path


def two(schedule: Any, cap: Any, tokens: int | None) -> Any:
    model, found = Curve(), scheduler(schedule, None, cap)
    options: Any = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    fit(model, data(max_device_tokens=tokens), found, max_epochs=2, **options)
    return model.weight.tolist(), found.progress[1:3]


@pytest.mark.parametrize(("schedule", "cap", "tokens"), [(GROWING, None, 26), (SHRINKING, 2, None), (GROWING, "auto", None)])
def test_two_processes_train_as_one(schedule: Any, cap: Any, tokens: Any, pair: Pair) -> None:
    steps = steps_of(schedule)
    for weight, progress in pair(two, schedule, cap, tokens):
        torch.testing.assert_close(torch.tensor(weight, dtype=torch.float64), by_hand(steps), rtol=1e-12, atol=1e-13)
        assert progress == (len(steps), 2 * N)


# --- the plan and the sampler, without a fit


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=12, max_size=60),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    at=st.integers(1, 5),
    drop_last=st.booleans(),
    rate=st.sampled_from([0.1, Milestones([0.3, 0.1], at=[17], unit="samples"), lambda clock: 1 / (1 + clock.step)]),
)
def test_the_plan_is_what_the_sampler_gives(lengths: list[int], sizes: list[int], at: int, drop_last: bool, rate: Any) -> None:
    schedule = Milestones(sizes, at=[at * (i + 1) for i in range(len(sizes) - 1)], unit="step") if len(sizes) > 1 else sizes[0]
    steps = steps_of(JointSchedule(schedule).batch_size_at, 2, len(lengths), drop_last, lengths)
    clock = [Progress()]
    sampler = GlobalBatchSampler(
        len(lengths), schedule, lambda: clock[0], seed=SEED, drop_last=drop_last, lengths=Lengths(lambda: lengths, len(lengths))
    )
    sampler.in_tokens = True
    for epoch in range(2):
        expected = [step for at_step, step in steps if at_step.epoch == epoch]
        clock[0] = next(at_step for at_step, _ in steps if at_step.epoch == epoch)
        assert list(sampler) == expected and len(sampler) == len(expected)
        for number in range(len(expected) + 1):
            seen = sum(map(len, expected[:number]))
            assert sampler.batches_in(seen) == sampler.steps_in(seen) == number
    made = plan(JointSchedule(schedule, rate), len(lengths), epochs=2, drop_last=drop_last, measure=sampler.measure)
    assert (made.steps, made.samples) == (len(steps), sum(len(step) for _, step in steps))
    assert [size for stage in made.stretches for stretch in stage for size in stretch.sizes or ()] == [
        len(step) for _, step in steps
    ]
    for most in (1, 3, len(steps)):
        kept = plan(JointSchedule(schedule), len(lengths), epochs=2, steps=most, drop_last=drop_last, measure=sampler.measure)
        assert (kept.steps, kept.samples) == (most, sum(len(step) for _, step in steps[:most]))
    for most in (1, 7, len(lengths)):
        kept = plan(JointSchedule(schedule), len(lengths), samples=most, drop_last=drop_last, measure=sampler.measure)
        assert kept.steps == next(i for i in range(1, 99) if sum(len(step) for _, step in steps[:i]) >= most or i == len(steps))


def test_stages_of_a_plan() -> None:
    model, found = Curve(), scheduler(GROWING, Milestones([0.2, 0.1], at=[6], unit="step"))
    fit(model, data(), found, max_epochs=2)
    assert found.plan is not None
    stages = [(stage.batch_size, stage.steps, stage.lr) for stage in found.plan.stages]
    rest = found.plan.steps - 9
    assert stages == [(40, 4, 0.2), (90, 2, 0.2), (90, 3, 0.1), (150, rest, 0.1)]


def test_seesaw_in_tokens_needs_a_maximum() -> None:
    """Its batch ends at the examples of the run, which are fewer than its tokens."""
    decay = Linear(0.1, 0.01, unit="samples")
    model, found = Curve(), BatchLRScheduler(seesaw(decay, 40, maximum=160), batch_size_unit="tokens")
    fit(model, data(), found, max_epochs=2)
    assert found.plan is not None
    assert [stage.batch_size for stage in found.plan.stages if stage.batch_size > N][-1] == 160
    assert max(stage.batch_size for stage in found.plan.stages) > 2 * N
    with pytest.raises(ValueError, match=r"`seesaw` without a `maximum`.*batch sizes count tokens"):
        BatchLRScheduler(seesaw(decay, 40), batch_size_unit="tokens")


def test_lengths_that_are_not_whole() -> None:
    seconds = np.linspace(1.0, 4.5, N)
    model, found = Curve(), scheduler(20.5)
    fit(model, data(lengths=seconds), found, max_epochs=2)
    check(model, found, steps_of(lambda clock: 21, lengths=seconds.tolist()))  # rounded up


# --- refusals


class Sampled(BatchSizeDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, replacement=True))


class Two(BatchSizeDataModule):
    def train_dataloader(self) -> Any:
        return {"a": super().train_dataloader(), "b": DataLoader(DATA, batch_size=4)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: data(lengths=None), r"needs the length of each.*BatchSizeDataModule\(lengths=...\)"),
        (lambda: DataLoader(DATA, batch_size=4), r"needs the length of each.*BatchSizeDataModule\(lengths=...\)"),
        (lambda: Sampled(DATA, lengths=LENGTHS), "has a sampler of its own"),
        (lambda: Two(DATA, lengths=LENGTHS), "with 2 training loaders"),
        (lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2]]), "cannot be planned"),
        (lambda: data(samples_per_epoch=3), r"an epoch has only \d+ tokens"),
    ],
)
def test_refusals(given: Any, message: str) -> None:
    model, found = Curve(), BatchLRScheduler(GROWING, loader="a", batch_size_unit="tokens")
    if not isinstance(given(), Two):
        found = scheduler(GROWING)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(model, given(), found)
    assert not model.journal


def test_accumulation_is_refused() -> None:
    loader = data().train_dataloader()
    with pytest.raises(MisconfigurationException, match="`accumulate_grad_batches=2` with"):
        fit(Curve(), loader, scheduler(GROWING), accumulate_grad_batches=2)
    fit(model := Curve(), loader, found := scheduler(GROWING), max_epochs=2)  # its sampler knows the lengths
    check(model, found, steps_of(GROWING))


def test_units() -> None:
    with pytest.raises(ValueError, match="'words'"):
        BatchLRScheduler(8, batch_size_unit="words")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batch_size_unit"):
        AdaptiveBatchLRScheduler(8, 0.1, batch_size_unit="tokens")  # type: ignore[call-arg]
    assert copy.deepcopy(scheduler(8)).batch_size_unit == "tokens"


def test_a_smoke_test() -> None:
    fit(model := Curve(), data(max_device_tokens=26), found := scheduler(GROWING), fast_dev_run=2, max_epochs=1)
    assert 1 <= found.progress.step <= 2 and model.journal
