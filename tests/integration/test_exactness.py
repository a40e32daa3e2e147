"""However a fit is cut up, it takes the steps of a plain PyTorch loop: any processes, micro-batches, workers, interruptions."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from harness import fits
from harness.data import own, regression
from harness.files import flat
from harness.modules import Recorder, mlp
from harness.processes import Pair
from lightning_bsl import BatchLRScheduler
from lightning_bsl.data import GlobalBatchSampler
from lightning_bsl.schedules import Exponential, Milestones, Schedule

SEED = 7
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}  # of the parameters after some 100 steps, relative to their norm
NO_SHRINKING = set(Phase) - {Phase.shrink, Phase.explain}  # it would take minutes

pytestmark = [
    pytest.mark.filterwarnings("ignore:the batch grows by"),
    pytest.mark.filterwarnings("ignore:from epoch .* the batch size is at its maximum"),
]


@dataclass(frozen=True)
class Case:
    """A fit."""

    examples: int
    batch_size: Schedule
    lr: Schedule
    epochs: int
    optimizer: str
    clip: float | None
    dtype: str
    cap: int | None = None
    workers: int = 0


def data_set(case: Case) -> TensorDataset:
    return regression(case.examples, dtype=getattr(torch, case.dtype))


class Regression(Recorder):
    """A small, smooth model that also notes what each example counts in the gradient."""

    def __init__(self, case: Case) -> None:
        adam, sgd = partial(torch.optim.Adam, lr=0.01), partial(torch.optim.SGD, lr=0.01, momentum=0.9)
        super().__init__(mlp(dtype=getattr(torch, case.dtype)), adam if case.optimizer == "Adam" else sgd)
        self.weights: list[list[float]] = []  # of each micro-batch

    def loss(self, batch: Any) -> Tensor:
        x, y, _ = batch
        losses = (self.net(x) - y).square().mean(dim=1)
        if losses.requires_grad:
            losses.register_hook(lambda gradient: self.weights.append(gradient.tolist()))
        return losses.mean()


def fit(
    case: Case, processes: int = 1, folder: str | None = None, every: int = 1, checkpoint: str | None = None
) -> dict[str, Any]:
    """Train, saving into ``folder`` after ``every`` steps and at the end of each epoch, and say what happened."""
    model, scheduler = Regression(case), BatchLRScheduler(case.batch_size, case.lr, case.cap)
    save_all = {"dirpath": folder, "save_top_k": -1, "auto_insert_metric_name": False}
    savers = [
        ModelCheckpoint(filename="{step}-inside", every_n_train_steps=every, **save_all),
        ModelCheckpoint(filename="{step}-after", every_n_epochs=1, save_on_train_epoch_end=True, **save_all),
    ]
    data = data_set(case)
    trainer = fits.fit(
        model,
        own(data, data, num_workers=case.workers, seed=SEED),
        scheduler,
        *(savers if folder else []),
        ckpt_path=checkpoint,
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=case.epochs,
        gradient_clip_val=case.clip,
        enable_checkpointing=folder is not None,
    )
    return {
        "seen": [
            (batch.step, batch.epoch, batch.lr, batch.examples, weights)
            for batch, weights in zip(model.journal, model.weights, strict=True)
        ],
        "parameters": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist(),
        "validated": model.validated,
        "samples": scheduler.progress.samples,
        "steps": [scheduler.progress.step, trainer.global_step],
        "epochs": [scheduler.progress.epoch, trainer.current_epoch],
    }


class Reference(NamedTuple):
    batches: list[list[int]]
    settings: list[tuple[int, float]]  # of each step: epoch and learning rate
    parameters: Tensor


def value(schedule: Schedule, clock: dict[str, int]) -> float:
    if isinstance(schedule, Milestones):
        return schedule.values[bisect_right(schedule.at, clock[schedule.unit])]
    assert isinstance(schedule, Exponential)
    grown = schedule.start * schedule.factor ** (clock[schedule.unit] // schedule.every)
    return min(max(grown, schedule.minimum), schedule.maximum)


def by_hand(case: Case) -> Reference:
    """A plain PyTorch loop, which shares the order of the examples with the library and nothing else."""
    model, data = Regression(case), data_set(case)
    optimizer = model.configure_optimizers()
    batches: list[list[int]] = []
    chosen: list[tuple[int, float]] = []
    for epoch in range(case.epochs):
        order = GlobalBatchSampler(case.examples, 1, seed=SEED).permutation(epoch)
        while order:
            clock = {"epoch": epoch, "step": len(batches), "samples": sum(map(len, batches))}
            size, rate = math.ceil(value(case.batch_size, clock)), value(case.lr, clock)
            batch, order = order[:size], order[size:]
            batches.append(batch)
            chosen.append((epoch, rate))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            model.loss(data[batch]).backward()
            if case.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
    return Reference(batches, chosen, torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))


def go(case: Case, processes: int, pair: Pair, **arguments: Any) -> list[dict[str, Any]]:
    """What each process has to say of its fit."""
    return [fit(case, **arguments)] if processes == 1 else pair(fit, case, processes=processes, **arguments)


def check(runs: list[dict[str, Any]], case: Case, reference: Reference, start: int = 0) -> None:
    """The processes together took the steps of the reference from ``start`` on, and arrived where it did."""
    steps: dict[int, list[Any]] = {}
    for run in runs:  # the examples of a step: first those of process 0, in its micro-batches, then those of process 1
        for step, *micro_batch in run["seen"]:
            steps.setdefault(step, []).append(micro_batch)
    number = len(reference.batches)
    assert sorted(steps) == list(range(start, number))
    for step, micro_batches in steps.items():
        batch = reference.batches[step]
        assert {(epoch, rate) for epoch, rate, _, _ in micro_batches} == {reference.settings[step]}
        assert max(len(indices) for _, _, indices, _ in micro_batches) <= (case.cap or case.examples)
        # a process without a share keeps the others company with an example that does not count
        counted = [(i, w) for _, _, indices, weights in micro_batches for i, w in zip(indices, weights, strict=True) if w]
        assert [i for i, _ in counted] == batch
        # DDP averages over the processes
        assert [w / len(runs) for _, w in counted] == pytest.approx([1 / len(batch)] * len(batch), rel=1e-6)
    ends = [sum(epoch <= last for epoch, _ in reference.settings) for last in range(case.epochs)]
    for run in runs:
        assert run["validated"] == [end for end in ends if end > start]
        assert (run["samples"], run["steps"]) == (case.examples * case.epochs, [number, number])
        assert run["epochs"] == [case.epochs, case.epochs]
        assert distance(run, reference.parameters) <= TOLERANCE[case.dtype]


def distance(run: dict[str, Any], parameters: Tensor) -> float:
    """Of the parameters at the end, relative to their norm."""
    exact = parameters.double()
    return ((torch.tensor(run["parameters"], dtype=torch.float64) - exact).norm() / exact.norm()).item()


@st.composite
def schedules(draw: st.DrawFn, values: st.SearchStrategy[float], examples: int) -> Schedule:
    unit = draw(st.sampled_from(["epoch", "step", "samples"]))
    lengths = st.integers(1, {"epoch": 2, "step": 15, "samples": 2 * examples}[unit])
    if draw(st.booleans()):
        at = sorted(draw(st.sets(lengths, min_size=1, max_size=3)))
        size = len(at) + 1
        return Milestones(draw(st.lists(values, min_size=size, max_size=size, unique=True)), at=at, unit=unit)
    low, high = sorted(draw(st.lists(values, min_size=2, max_size=2, unique=True)))
    start, factor = draw(st.sampled_from([(low, 1.25), (low, 1.5), (low, 2.0), (high, 0.75), (high, 0.5)]))
    return Exponential(start, factor, every=draw(lengths), unit=unit, minimum=low, maximum=high)


def cuts(case: Case) -> st.SearchStrategy[Case]:
    """The same case with other micro-batches and workers."""
    sizes = case.batch_size.values if isinstance(case.batch_size, Milestones) else [case.batch_size.maximum]
    caps = st.one_of(st.none(), st.integers(1, max(sizes)), st.integers(1, math.ceil(max(sizes) / 4)))
    return st.builds(partial(replace, case), cap=caps, workers=st.sampled_from([0, 0, 2]))


@st.composite
def cases(draw: st.DrawFn, *dtypes: str) -> Case:
    examples = draw(st.integers(5, 80))
    whole = Case(
        examples,
        batch_size=draw(schedules(st.integers(1, examples), examples)),
        lr=draw(schedules(st.sampled_from([0.005, 0.01, 0.02, 0.03]), examples)),
        epochs=draw(st.integers(1, 3)),
        optimizer=draw(st.sampled_from(["SGD", "Adam"])),
        clip=draw(st.sampled_from([None, 0.5])),
        dtype=draw(st.sampled_from(dtypes)),
    )
    return draw(cuts(whole))


EQUAL_CASES = given(case=cases("float32", "float64"))


@pytest.mark.parametrize("processes", [1, 2])
@settings(max_examples=8, phases=NO_SHRINKING)
@EQUAL_CASES
def test_equals_a_plain_loop(processes: int, pair: Pair, case: Case) -> None:
    equals_a_plain_loop(processes, pair, case)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@settings(max_examples=60, phases=NO_SHRINKING)
@EQUAL_CASES
def test_many_equal_a_plain_loop(processes: int, pair: Pair, case: Case) -> None:
    equals_a_plain_loop(processes, pair, case)


def equals_a_plain_loop(processes: int, pair: Pair, case: Case) -> None:
    reference = by_hand(case)
    order, n = flat(reference.batches), case.examples
    # each example once an epoch, also where a step is larger or smaller than the one before it
    assert [sorted(order[start : start + n]) for start in range(0, len(order), n)] == [list(range(n))] * case.epochs
    check(go(case, processes, pair), case, reference)


def saved(folder: str) -> st.SearchStrategy[tuple[int, str]]:
    """A checkpoint in the folder: how many steps it comes after, and where it is."""
    return st.sampled_from(sorted((int(path.name.split("-")[0]), str(path)) for path in Path(folder).iterdir()))


GOES_ON_CASES = given(case=cases("float64"), every=st.integers(1, 6), data=st.data())


@settings(max_examples=5, phases=NO_SHRINKING)
@GOES_ON_CASES
def test_goes_on_with_other_processes_micro_batches_and_workers(
    pair: Pair, case: Case, every: int, data: st.DataObject
) -> None:
    goes_on(pair, case, every, data)


@pytest.mark.slow
@settings(max_examples=30, phases=NO_SHRINKING)
@GOES_ON_CASES
def test_many_go_on_with_other_processes_micro_batches_and_workers(
    pair: Pair, case: Case, every: int, data: st.DataObject
) -> None:
    goes_on(pair, case, every, data)


def goes_on(pair: Pair, case: Case, every: int, data: st.DataObject) -> None:
    reference, start, checkpoint = by_hand(case), 0, None
    with TemporaryDirectory() as root:
        for leg, processes in enumerate([1, 2, 2, 1, 1]):
            folder, case = f"{root}/{leg}", data.draw(cuts(case))
            runs = go(case, processes, pair, folder=folder, every=every, checkpoint=checkpoint)
            check(runs, case, reference, start)
            if start == len(reference.batches):
                break  # nothing was left to train, so nothing was saved
            start, checkpoint = data.draw(saved(folder))


def test_resumes_a_run_that_was_resumed_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    batch_size, lr = Milestones([9, 4], at=[3], unit="step"), Milestones([0.02, 0.01], at=[5], unit="step")
    case = Case(23, batch_size, lr, epochs=3, optimizer="SGD", clip=None, dtype="float64", cap=5)
    fit(case, folder=str(tmp_path / "first"))
    fit(case, folder=str(tmp_path / "second"), checkpoint=str(tmp_path / "first" / "3-inside.ckpt"))
    for checkpoint in (tmp_path / "second").iterdir():
        runs = [fit(case, checkpoint=str(checkpoint))]
        check(runs, case, by_hand(case), start=int(checkpoint.name.split("-")[0]))


RESUMED_CASES = given(case=cases("float32", "float64"), every=st.integers(1, 6), data=st.data())


@pytest.mark.parametrize("processes", [1, 2])
@settings(max_examples=5, phases=NO_SHRINKING)
@RESUMED_CASES
def test_resumes_bit_for_bit(processes: int, pair: Pair, case: Case, every: int, data: st.DataObject) -> None:
    resumes_bit_for_bit(processes, pair, case, every, data)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@settings(max_examples=30, phases=NO_SHRINKING)
@RESUMED_CASES
def test_many_resume_bit_for_bit(processes: int, pair: Pair, case: Case, every: int, data: st.DataObject) -> None:
    resumes_bit_for_bit(processes, pair, case, every, data)


def resumes_bit_for_bit(processes: int, pair: Pair, case: Case, every: int, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        whole = go(case, processes, pair, folder=folder, every=every)
        start, checkpoint = data.draw(saved(folder))
        for run, rest in zip(whole, go(case, processes, pair, checkpoint=checkpoint), strict=True):
            run["seen"] = [seen for seen in run["seen"] if seen[0] >= start]
            run["validated"] = [step for step in run["validated"] if step > start]
            assert rest == run
