"""Steps of whole batches: those of a batch sampler that a user wrote, beside plain loops over the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    SequentialSampler,
)

from harness.data import regression
from harness.fits import fit, trained
from harness.loops import train_by_hand
from harness.modules import Regression, assert_close, equal
from harness.processes import Pair
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, BatchSizeDataModule, FullGradientNorm
from lightning_bsl.schedules import Constant, Exponential, LinearScaling, Milestones

N, M = 61, 4
DATA = regression(N)
GROWING = Milestones([8, 16, 32], at=[3, 6], unit="step")


class Buckets:
    """Batches of at most M examples of the same remainder by 3, shuffled; each bucket may end with a short batch."""

    def __init__(self, number: int = N, batch_size: int = M) -> None:
        self.number, self.batch_size = number, batch_size

    def __len__(self) -> int:
        return self.number // self.batch_size  # an estimate, as many have it

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for bucket in range(3):
            indices = torch.arange(self.number)[bucket::3]
            batches += indices[torch.randperm(len(indices))].split(self.batch_size)
        return iter([batches[i].tolist() for i in torch.randperm(len(batches)).tolist()])


class Refilled(Buckets):
    """Gives the same list each time, with other indices in it."""

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for indices in super().__iter__():
            batch[:] = indices
            yield batch


def bucketed(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_sampler=Buckets(), **options)  # type: ignore[arg-type]


def run(
    *callbacks: Callback, size: Any = GROWING, data: Any = None, whole: Any = True, path: Any = None, **options: Any
) -> tuple[Regression, BatchLRScheduler]:
    torch.manual_seed(5)
    scheduler = BatchLRScheduler(size, Exponential(0.05, 0.9, every=2, unit="step"), whole_batches=whole)
    model = Regression(nn.Dropout(0.2)) if options.pop("dropout", False) else Regression()
    options |= {"ckpt_path": path, "enable_checkpointing": bool(callbacks)}
    fit(model, bucketed() if data is None else data, scheduler, *callbacks, **options)
    return model, scheduler


def steps_of(model: Regression) -> list[list[list[int]]]:
    """For each step its micro-batches."""
    return [[part.examples for part in parts] for _, parts in groupby(model.journal, key=lambda part: part.step)]


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_take_whole_batches_and_equal_a_plain_loop(workers: int) -> None:
    model, scheduler = run(data=bucketed(num_workers=workers))
    batches = [examples for step in steps_of(model) for examples in step]
    assert all(len({i % 3 for i in batch}) == 1 for batch in batches)  # each of one bucket
    assert len(batches) == 3 * 16 and sorted(map(len, batches)) == [1] * 3 + [4] * 45
    assert [len(step) for step in steps_of(model)] == [2, 2, 2, 4, 4, 2, *[8, 8], *[8, 8]]
    for epoch in range(3):
        rows = [i for part in model.journal if part.epoch == epoch for i in part.examples]
        assert sorted(rows) == list(range(N))
    assert batches[:16] != batches[16:32]  # shuffled anew
    assert scheduler.plan is not None
    assert (scheduler.plan.steps, scheduler.plan.samples) == (10, 3 * N)
    assert [stage.batch_size for stage in scheduler.plan.stages] == [8] * 2 + [16] * 2 + [32] * 2  # and two rates in each
    assert model.announced == [16] * 3  # batches of an epoch, for the progress bar
    assert model.rates == pytest.approx([0.05 * 0.9 ** (part.step // 2) for part in model.journal])
    reference = Regression()
    lrs = {part.step: part.lr for part in model.journal}
    joined = [([i for part in parts for i in part], lrs[step]) for step, parts in zip(lrs, steps_of(model), strict=True)]
    train_by_hand(reference, DATA, joined)
    assert_close(model, reference)


@pytest.mark.quick(workers=[0])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_bit_for_bit(workers: int, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, clock = run(saves, dropout=True, data=bucketed(num_workers=workers))
    for step in (1, 4, 6, 9, 10):
        torch.rand(3)  # another state of the generators
        data = bucketed(num_workers=workers)
        model, scheduler = run(dropout=True, data=data, path=tmp_path / f"step={step}.ckpt")
        assert model.journal == [part for part in whole.journal if part.step >= step], step
        assert scheduler.progress == clock.progress and equal(model, whole)


def test_padded_batches_of_different_lengths_are_neither_joined_nor_cut() -> None:
    x = [torch.arange(1.0, 2 + i % 3, dtype=torch.float64) for i in range(N)]  # one length in each bucket

    class Sums(Regression):
        def batch(self, batch: Any) -> Any:
            return batch["x"].sum(1, keepdim=True).expand(-1, 3), batch["x"][:, :1], batch["index"]

    def rows(indices: Any) -> Any:
        return {"x": torch.stack([x[i] for i in indices]), "index": torch.tensor(indices)}

    loader = DataLoader(range(N), batch_sampler=Buckets(), collate_fn=rows)  # type: ignore[arg-type,var-annotated]
    model = trained(Sums(), loader, BatchLRScheduler(24, 0.01, whole_batches=True), max_epochs=1)
    assert [len(step) for step in steps_of(model)] == [6, 6, 4]


@pytest.mark.parametrize(("size", "true"), [(1, 4), (6, 8), (8, 8), (61, 64)])
def test_a_batch_size_is_rounded_up_in_plan_rate_and_log(size: int, true: int) -> None:
    scheduler = BatchLRScheduler(Constant(size), LinearScaling(0.01, 4), whole_batches=True)
    trainer = fit(model := Regression(), bucketed(), scheduler, max_epochs=1)
    assert scheduler.plan is not None
    assert [(stage.batch_size, stage.steps, stage.samples) for stage in scheduler.plan.stages] == [(true, -(-64 // true), N)]
    assert {*model.rates} == {0.01 * true / 4}
    assert trainer.callback_metrics["batch_size"] == scheduler.batch_size_of_step == true


@pytest.mark.parametrize(
    ("loader", "whole", "batches"),
    [
        (lambda: DataLoader(DATA, batch_size=M, shuffle=True), True, 16),
        (lambda: DataLoader(DATA, batch_size=M, drop_last=True), True, 15),
        (lambda: DataLoader(DATA, batch_sampler=Refilled()), True, 16),
        (lambda: DataLoader(DATA, batch_sampler=torch.arange(N).split(M)), M, 16),
        (lambda: DataLoader(DATA, batch_sampler=[[i, i + 1] for i in range(0, 60, 2)]), 2, 30),
        (lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), M, False), num_workers=1), M, 16),
    ],
    ids=["shuffled", "drop_last", "refilled", "tensors", "a list", "given m"],
)
def test_any_loader_with_batches(loader: Any, whole: Any, batches: int) -> None:
    model, scheduler = run(data=loader(), whole=whole, max_epochs=2)
    assert len(model.journal) == 2 * batches and scheduler.plan is not None
    assert len({i for part in model.journal for i in part.examples}) in (60, N)
    assert (scheduler.plan.steps, scheduler.plan.samples) == (len(steps_of(model)), sum(model.sizes))


def test_new_loaders_in_each_epoch_and_the_same_few_batches() -> None:
    class Reloaded(LightningDataModule):
        def train_dataloader(self) -> Any:
            return bucketed()

    model, _ = run(data=Reloaded(), reload_dataloaders_every_n_epochs=1)
    assert [len(step) for step in steps_of(model)] == [2, 2, 2, 4, 4, 2, 8, 8, 8, 8]
    model, _ = run(data=Reloaded(), size=M, overfit_batches=3)
    batches = [part.examples for part in model.journal]
    assert len(batches) == 9 and batches[:3] == batches[3:6] == batches[6:]


def test_a_batch_sampler_is_asked_once_an_epoch_as_late_as_a_loader_would() -> None:
    class Counting(Buckets):
        asked: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[list[int]]:
            self.asked.append(self.epoch)
            return super().__iter__()

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert Counting.asked == list(range(trainer.current_epoch + 1))

    model = Regression(nn.BatchNorm1d(4, dtype=torch.float64))
    loader = DataLoader(DATA, batch_sampler=Counting())  # type: ignore[arg-type]
    scheduler = BatchLRScheduler(GROWING, 0.05, whole_batches=True)
    with pytest.raises(MisconfigurationException, match="BatchNorm needs two"):  # the short batches have one example
        trained(model, loader, scheduler, val_check_interval=2)
    Counting.asked.clear()
    trained(Regression(), loader, scheduler, Watch(), val_check_interval=2)
    assert Counting.asked == [0, 1, 2]


def test_the_run_ends_at_max_samples() -> None:
    scheduler = BatchLRScheduler(GROWING, 0.05, whole_batches=True, max_samples=45)
    model = trained(Regression(), bucketed(), scheduler, max_epochs=-1)
    assert sum(model.sizes) == scheduler.progress.samples == 45
    assert scheduler.plan is not None and scheduler.plan.samples == 45


def test_an_adaptive_run_and_the_full_gradient() -> None:
    scheduler = AdaptiveBatchLRScheduler(4, 0.05, lambda *_: True, maximum=20, check_every=3, whole_batches=True)
    model = trained(Regression(), bucketed(), scheduler, FullGradientNorm(every=1), max_epochs=2)
    numbers = [len(step) for step in steps_of(model)]
    assert numbers[0] == 1 and max(numbers) == 5 and sorted(numbers) != numbers  # an epoch's last step may be shorter
    assert sorted(i for part in model.journal[:16] for i in part.examples) == list(range(N))


# --- several processes


def share(sampler: str = "buckets") -> dict[str, Any]:
    """A fit in one of two processes."""
    data = bucketed()
    if sampler == "normalised":  # BatchNorm fails on a batch of one example
        batches = [list(range(i, i + 4)) for i in range(0, 60, 4)]
        model = trained(
            Regression(nn.BatchNorm1d(4, dtype=torch.float64)),
            DataLoader(DATA, batch_sampler=batches),  # 15: a process has none in the last step
            BatchLRScheduler(8, 0.05, whole_batches=4),
            max_epochs=1,
            devices=2,
            strategy="ddp",
        )
        return {"sizes": model.sizes}
    if sampler == "own part":
        data = DataLoader(DATA, batch_sampler=BatchSampler(DistributedSampler(DATA, shuffle=False), M, False))
        with pytest.raises(MisconfigurationException, match="let it give all examples, not one process's part"):
            run(data=data, devices=2, strategy="ddp")
        return {}
    model, scheduler = run(data=data, devices=2, strategy="ddp")
    weights = [parameter.tolist() for parameter in model.net.parameters()]
    return {"rows": [(part.step, part.examples) for part in model.journal], "weights": weights, "clock": scheduler.progress}


def test_two_processes_train_as_one(pair: Pair) -> None:
    alone, clock = run()
    first, second = pair(share)
    assert first["weights"] == second["weights"]
    assert first["clock"].samples == second["clock"].samples == clock.progress.samples
    steps = steps_of(alone)
    for number, batches in enumerate(steps):
        shares = [[rows for step, rows in process["rows"] if step == number] for process in (first, second)]
        assert len(shares[0]) == len(shares[1])  # they step together
        assert [rows for pair_of in zip(*shares) for rows in pair_of][: len(batches)] == batches
    for one, two in zip(alone.net.parameters(), first["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(two, dtype=torch.float64), one.detach(), rtol=1e-12, atol=1e-13)


def test_a_process_without_a_batch_repeats_a_whole_one(pair: Pair) -> None:
    assert [process["sizes"] for process in pair(share, "normalised")] == [[4] * 8] * 2


def test_a_batch_sampler_that_gives_one_process_its_part_is_refused(pair: Pair) -> None:
    assert pair(share, "own part") == [{}, {}]


# --- refusals


class Two(LightningDataModule):
    def train_dataloader(self) -> Any:
        return [bucketed(), bucketed()]


@pytest.mark.parametrize(
    ("message", "data", "scheduler", "trainer"),
    [
        ("`whole_batches=True` with 2 training loaders", Two, {}, {}),
        ("those of this loader follow the schedule", lambda: BatchSizeDataModule(DATA), {}, {}),
        ("`max_device_batch_size=4`: a step is made of", bucketed, {"max_device_batch_size": 4}, {}),
        ("`max_device_batch_size='auto'`: a step is made", bucketed, {"max_device_batch_size": "auto"}, {}),
        ("`accumulate_grad_batches=2`: a step is made", bucketed, {}, {"accumulate_grad_batches": 2}),
        ("`batch_size_unit='tokens'`: a step is made", bucketed, {"batch_size_unit": "tokens"}, {}),
        ("list has no attribute `batch_size`.*`whole_batches=64`", lambda: DataLoader(DATA, batch_sampler=[[1], [2]]), {}, {}),
        ("batch of 4 examples in epoch 0.*`whole_batches=4`", bucketed, {"whole_batches": 3}, {}),
        ("Buckets gave no examples", lambda: DataLoader(DATA, batch_sampler=Buckets(0)), {}, {}),  # type: ignore[arg-type]
        ("`whole_batches=4` splits the steps", bucketed, {}, {"limit_train_batches": 3}),
        ("the batch size is 68", bucketed, {"batch_size": 65}, {}),
    ],
)
def test_refusals(message: str, data: Any, scheduler: Any, trainer: Any) -> None:
    arguments = {"batch_size": 8, "lr": 0.05, "whole_batches": True} | scheduler
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        trained(Regression(), data(), BatchLRScheduler(**arguments), **trainer)


def test_without_the_option_the_error_names_it() -> None:
    with pytest.raises(MisconfigurationException, match=r"batch sampler of its own \(Buckets\).*whole_batches=True"):
        trained(Regression(), bucketed(), BatchLRScheduler(8, 0.05))


def test_a_second_fit_rounds_to_its_own_loader() -> None:
    scheduler = BatchLRScheduler(6, 0.05, whole_batches=True)
    for batch_size, true in ((4, 8), (5, 10)):
        loader = DataLoader(DATA, batch_sampler=Buckets(batch_size=batch_size))  # type: ignore[arg-type]
        trained(Regression(), loader, scheduler, max_epochs=1)
        assert scheduler.plan is not None and scheduler.plan.stages[0].batch_size == true


# --- loaders whose batches cannot be drawn again


class Own:
    """A loader of a library: it insists on its batches, and is no DataLoader."""

    batch_size = M

    def __iter__(self) -> Iterator[Any]:
        return (DATA[i : i + M] for i in range(0, N, M))


def test_batches_of_a_library_stay_whole(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, scheduler = run(saves, dropout=True, data=Own(), max_epochs=2)
    assert [part.examples for part in whole.journal] == [list(range(i, min(i + M, N))) for i in range(0, N, M)] * 2
    assert [len(step) for step in steps_of(whole)] == [2, 2, 2, 4, 4, 2, 8, 8]
    assert scheduler.progress.samples == 2 * N
    for step in (2, 5, 7):
        model, _ = run(dropout=True, data=Own(), path=tmp_path / f"step={step}.ckpt", max_epochs=2)
        assert model.journal == [part for part in whole.journal if part.step >= step], step
        assert equal(model, whole)


# --- batch samplers that others would not write


class Without(Sampler[int]):
    """Has no length, so that of torch's own BatchSampler over it fails."""

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N).tolist())


class Later(Buckets):
    """Has batches of four in the first epoch, and of two in later ones."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch.tolist() for batch in torch.arange(N).split(4 if self.epoch == 0 else 2)])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Endless(Buckets):
    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from super().__iter__()


def test_a_sampler_without_a_length() -> None:
    model, _ = run(data=DataLoader(DATA, batch_size=M, sampler=Without()), max_epochs=1)
    assert sorted(i for part in model.journal for i in part.examples) == list(range(N))


def test_a_sampler_without_an_end_is_refused_before_memory_runs_out() -> None:
    with pytest.raises(MisconfigurationException, match="Endless gave more than 106100 examples in epoch 0"):
        run(data=DataLoader(DATA, batch_sampler=Endless()), max_steps=3)  # type: ignore[arg-type]


def test_the_schedule_goes_on_where_later_epochs_have_more_batches() -> None:
    scheduler = BatchLRScheduler(Milestones([8, 16, 32], at=[4, 20], unit="step"), 0.05, whole_batches=True)
    with pytest.warns(UserWarning, match="epoch 1 has 31 batches, but the run was planned with 16"):
        model = trained(Regression(), DataLoader(DATA, batch_sampler=Later()), scheduler)  # type: ignore[arg-type]
    assert scheduler.plan is not None and len(steps_of(model)) > scheduler.plan.steps
    assert [len(step) for step in steps_of(model)][-2:] == [4, 7]


def resumed_by_two(path: str) -> str:
    """Resumes inside an epoch a run that one process began."""
    try:
        run(path=path, devices=2, strategy="ddp")
    except MisconfigurationException as error:
        return str(error)
    return "resumed"


def test_a_resume_on_other_processes_is_refused_inside_an_epoch(pair: Pair, tmp_path: Path) -> None:
    run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    inside, end = (pair(resumed_by_two, tmp_path / f"step={step}.ckpt") for step in (2, 6))
    assert all("inside an epoch whose batch sizes were multiples of 4; now they are multiples of 8" in text for text in inside)
    assert end == ["resumed"] * 2
