"""Runs that end at a number of samples or tokens, beside plain loops over exactly so many examples."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from harness.data import Stranger, own, regression
from harness.fits import fit, trained
from harness.loops import train_by_hand, whole_steps
from harness.modules import Regression, assert_close, equal
from harness.processes import Pair
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler
from lightning_bsl.schedules import Cosine, JointSchedule, Milestones, plan

N = 61
DATA, VALIDATION = regression(N), regression(9)
GROWING = Milestones([6, 10, 16], at=[4, 12], unit="step")
SHRINKING = Milestones([16, 5], at=[0.5], unit="samples")
ENDLESS: dict[str, Any] = {"max_epochs": -1}


def cut(batch_size: Any, budget: int, number: int = N) -> list[list[int]]:
    """The steps of whole epochs, up to the budget; the last one is cut to it."""
    steps, left = [], budget
    for step in (step for epoch in whole_steps(batch_size, number, 99) for step in epoch):
        if left > 0:
            steps.append(step[:left])
            left -= len(steps[-1])
    return steps


def taken(model: Regression) -> list[list[int]]:
    """The examples of each step, over its micro-batches."""
    return [[i for part in parts for i in part.examples] for _, parts in groupby(model.journal, key=lambda part: part.step)]


@pytest.mark.quick(cap=[None], workers=[0])
@pytest.mark.quick(budget=[100], cap=[4, "auto"], workers=[0])
@pytest.mark.quick(budget=[37], cap=[4], workers=[2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cap", [None, 4, "auto"])
@pytest.mark.parametrize("budget", [3, 37, 61, 100, 122, 150])
def test_takes_exactly_so_many(budget: int, cap: Any, workers: int) -> None:
    scheduler = BatchLRScheduler(GROWING, Cosine(0.05, unit="samples"), cap, max_samples=budget)
    model = trained(Regression(), own(DATA, VALIDATION, num_workers=workers), scheduler, **ENDLESS)
    steps = cut(GROWING, budget)
    if cap != "auto":  # which trains parts of a batch that holds the whole step
        assert taken(model) == steps
    assert scheduler.progress.samples == sum(map(len, steps)) == budget
    assert scheduler.finished and scheduler.plan is not None
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(steps), budget)
    assert model.trainer.global_step == len(steps)
    rates = [0.05 * (1 + math.cos(math.pi * sum(map(len, steps[:i])) / budget)) / 2 for i in range(len(steps))]
    by_step = [next(iter(parts)).lr for _, parts in groupby(model.journal, key=lambda part: part.step)]
    assert by_step == pytest.approx(rates)  # the fraction of a schedule is one of the budget
    reference = Regression()
    train_by_hand(reference, DATA, list(zip(steps, rates)))
    assert_close(model.net, reference.net)
    assert model.announced[-1] == len(model.journal) - sum(map(int, model.announced[:-1])) or cap == "auto"
    assert model.validated[-1] == len(steps) and len(set(model.validated)) == len(model.validated) == -(-budget // N)


class Tokens(Stranger):
    tokens_per_sample = 7


def test_tokens_are_whole_examples(tmp_path: Path) -> None:
    scheduler = BatchLRScheduler(SHRINKING, Cosine(0.05, unit="tokens"), max_tokens=300)  # 43 examples reach it
    model = trained(Regression(), Tokens(DATA), scheduler, **ENDLESS)
    assert sum(model.sizes) == 43 and model.sizes == [16, 16, 5, 5, 1]
    assert model.rates[0] == 0.05 and scheduler.plan is not None
    assert scheduler.plan.horizon.length("tokens") == 301


@pytest.mark.parametrize(("bounds", "samples", "steps"), [
    ({"max_epochs": 1}, 61, 8), ({"max_epochs": 5}, 100, 12), ({"max_epochs": 5, "max_steps": 7}, 54, 7),
    ({"max_steps": 99}, 100, 12)
])  # fmt: skip
def test_the_bound_that_comes_first_counts(bounds: dict[str, int], samples: int, steps: int) -> None:
    scheduler = BatchLRScheduler(GROWING, Cosine(0.05, unit="samples"), max_samples=100)
    model = trained(Regression(), own(DATA), scheduler, **bounds)
    assert (sum(model.sizes), len(model.sizes)) == (samples, steps)
    assert scheduler.plan is not None
    assert (scheduler.plan.samples, scheduler.plan.horizon.samples, scheduler.plan.steps) == (samples, samples, steps)
    assert model.rates[-1] == pytest.approx(0.05 * (1 + math.cos(math.pi * (samples - model.sizes[-1]) / samples)) / 2)


@pytest.mark.quick(cap=[4])
@pytest.mark.parametrize("cap", [None, 4])
def test_resumes_bit_for_bit(cap: Any, tmp_path: Path) -> None:
    def run(*callbacks: Callback, path: Any = None, budget: int = 100) -> Regression:
        torch.manual_seed(3)
        scheduler = BatchLRScheduler(GROWING, Cosine(0.05, unit="samples"), cap, max_samples=budget)
        model = Regression(torch.nn.Dropout(0.2))
        options = {"enable_checkpointing": bool(callbacks), "ckpt_path": path} | ENDLESS
        return trained(model, own(DATA, VALIDATION), scheduler, *callbacks, **options)

    whole = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    assert len(list(tmp_path.iterdir())) == 12
    for step in (1, 7, 8, 9, 11):
        resumed = run(path=tmp_path / f"step={step}.ckpt")
        assert equal(resumed, whole), step
        assert sum(resumed.sizes) == 100 - sum(map(len, cut(GROWING, 100)[:step]))
    longer = run(path=tmp_path / "step=12.ckpt", budget=161)  # with the next epoch: what was cut off is left out
    assert sum(longer.sizes) == 61 and {step.epoch for step in longer.journal} == {2}
    for name in ("step=12.ckpt", "end.ckpt"):  # nothing is left to train
        if not (tmp_path / name).exists():
            whole.trainer.save_checkpoint(tmp_path / name)
        finished = run(path=tmp_path / name)
        assert equal(finished, whole) and not finished.journal, name


def test_an_adaptive_run_ends_too() -> None:
    scheduler = AdaptiveBatchLRScheduler(4, 0.05, lambda *_: True, maximum=30, check_every=4, max_samples=200)
    model = trained(Regression(), own(DATA), scheduler, **ENDLESS)
    assert sum(model.sizes) == 200
    assert scheduler.stage > 1


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_end_of_the_run_is_not_dropped(drop_last: bool) -> None:
    """A short last step of an epoch may be left out, but not what the budget leaves of a step."""
    model = trained(Regression(), own(DATA, drop_last=drop_last), BatchLRScheduler(16, max_samples=100), **ENDLESS)
    assert model.sizes == ([16, 16, 16, 16, 16, 16, 4] if drop_last else [16, 16, 16, 13, 16, 16, 7])


def test_batch_sizes_in_tokens() -> None:
    lengths = torch.arange(N) % 5 + 1
    scheduler = BatchLRScheduler(30, batch_size_unit="tokens", max_samples=40)
    model = trained(Regression(), own(DATA, lengths=lengths), scheduler, **ENDLESS)
    assert sum(model.sizes) == 40
    assert scheduler.plan is not None and scheduler.plan.steps == len(model.sizes)
    sums = [int(lengths[examples].sum()) for examples in model.examples]
    assert min(sums[:-1]) >= 30 > max(total - int(lengths[examples[-1]]) for total, examples in zip(sums, model.examples))


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([DATA[i] for i in range(N)])


class Streams(Stranger):
    def train_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=self.hparams.batch_size)


def test_loaders_that_cannot_be_cut_end_with_the_step_that_reaches_it() -> None:
    scheduler = BatchLRScheduler(Milestones([8, 12], at=[1]), 0.05, max_samples=80)
    model = trained(Regression(), Streams(DATA, VALIDATION), scheduler, **ENDLESS)
    assert model.sizes == [8] * 7 + [5] + [12, 12]
    assert model.validated == [8, 10]

    class Two(Regression):
        def batch(self, batch: Any) -> list[Tensor]:
            return super().batch(batch["a"])

    loaders = {"a": DataLoader(DATA, 8), "b": DataLoader(DATA, 30)}
    two = BatchLRScheduler(8, loader="a", max_samples=60)
    assert sum(trained(Two(), loaders, two, **ENDLESS).sizes) == 61
    assert two.plan is not None and (two.plan.samples, two.plan.steps) == (61, 8)


@pytest.mark.parametrize("max_epochs", [-1, 1000])
def test_schedules_in_epochs_count_those_of_the_budget(max_epochs: int) -> None:
    halves = BatchLRScheduler(Milestones([6, 12], at=[0.5]), 0.05, max_samples=2 * N)
    assert [len(step) for step in taken(trained(Regression(), own(DATA), halves, max_epochs=max_epochs))] == [6] * 10 + [1] + [
        12
    ] * 5 + [1]


def test_a_smoke_test_ignores_it() -> None:
    model = trained(Regression(), own(DATA), BatchLRScheduler(6, max_samples=3), fast_dev_run=2)
    assert model.sizes == [6, 6]


def together(budget: int) -> tuple[list[tuple[int, list[int]]], list[Any], int]:
    scheduler = BatchLRScheduler(GROWING, 0.05, max_samples=budget)
    model = trained(Regression(), own(DATA), scheduler, devices=2, strategy="ddp", **ENDLESS)
    weights = [parameter.tolist() for parameter in model.net.parameters()]
    return [(part.step, part.examples) for part in model.journal], weights, scheduler.progress.samples


def test_two_processes(pair: Pair) -> None:
    (first, weights, samples), (second, same, _) = pair(together, 92)
    assert samples == 92 and weights == same
    steps = cut(GROWING, 92)
    assert len(steps[-1]) == 1  # one process has nothing of it, and repeats the example
    for number, step in enumerate(steps[:-1]):
        assert sorted(i for rows in (first, second) for at, part in rows if at == number for i in part) == sorted(step)
    reference = Regression()
    train_by_hand(reference, DATA, [(step, 0.05) for step in steps])
    for found, expected in zip(weights, reference.net.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"max_samples": 0}, "`max_samples=0` must be 1 or more, as a whole number, or None"),
    ({"max_samples": 1e6}, "`max_samples=1000000.0` must be"),
    ({"max_tokens": -1}, "`max_tokens=-1` must be"),
    ({"max_samples": 5, "max_tokens": 5}, "`max_samples=5` and `max_tokens=5` both end the run; write one"),
])  # fmt: skip
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    for kind in (BatchLRScheduler, AdaptiveBatchLRScheduler):
        with pytest.raises(ValueError, match=message):
            kind(8, **arguments)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`max_tokens=99`, but the number of tokens of an example is not known"):
        fit(Regression(), own(DATA), BatchLRScheduler(8, max_tokens=99))
    for least in ("min_epochs", "min_steps"):
        with pytest.raises(MisconfigurationException, match=f"`{least}=2` of the Trainer lets a run go on"):
            fit(Regression(), own(DATA), BatchLRScheduler(8, max_samples=99), max_epochs=9, **{least: 2})


def test_estimated_steps() -> None:
    found = []

    class Asks(Regression):
        def configure_optimizers(self) -> Any:
            found.append(scheduler.estimated_steps(self.trainer))
            return super().configure_optimizers()

    scheduler = BatchLRScheduler(GROWING, 0.05, max_samples=100)
    fit(Asks(), own(DATA), scheduler, **ENDLESS)
    assert found == [12] == [plan(JointSchedule(GROWING), N, samples=100).steps]
