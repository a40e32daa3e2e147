"""Fits on streams, whose batch size follows the schedule inside an epoch, beside plain loops over the same examples."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, get_worker_info

from harness.data import regression
from harness.fits import out_of_memory, trained
from harness.loops import train_by_hand
from harness.modules import Regression, assert_close, equal
from harness.processes import Pair, RemoteError
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, StreamDataModule
from lightning_bsl.callbacks.stream_data import check_shared
from lightning_bsl.schedules import Cosine, Milestones, Progress

N = 61
DATA, VALIDATION = regression(200), regression(9)
GROWING = Milestones([6, 10, 16], at=[4, 12], unit="step")
SHRINKING = Milestones([16, 5], at=[70], unit="samples")


class Rows(IterableDataset[Any]):
    """The first examples, shared among the workers; or those of one process, between two numbers."""

    def __init__(self, start: int = 0, stop: int = N) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        step = info.num_workers if info is not None else 1
        return (DATA[i] for i in range(self.start + (info.id if info is not None else 0), self.stop, step))


def steps_of(journal: Any) -> list[list[int]]:
    """The examples of each step, over its micro-batches."""
    return [[i for part in parts for i in part.examples] for _, parts in groupby(journal, key=lambda part: part.step)]


def sizes(batch_size: Any, number: int, epochs: int) -> list[int]:
    """The sizes of the steps: the schedule, asked before each of them."""
    found, clock = [], Progress()
    for _ in range(epochs):
        left = number
        while left:
            found.append(min(int(batch_size(clock)), left))
            clock, left = clock.advance(found[-1]), left - found[-1]
        clock = clock.next_epoch()
    return found


@pytest.mark.quick(cap=[None], workers=[0])
@pytest.mark.quick(cap=[4], workers=[2], schedule=[GROWING])
@pytest.mark.quick(cap=["auto"], workers=[0], schedule=[SHRINKING])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cap", [None, 4, "auto"])
@pytest.mark.parametrize("schedule", [GROWING, SHRINKING])
def test_equals_a_plain_loop(schedule: Any, cap: Any, workers: int) -> None:
    scheduler = BatchLRScheduler(schedule, 0.05, cap)
    model = trained(Regression(), StreamDataModule(Rows(), VALIDATION, num_workers=workers), scheduler, max_epochs=2)
    steps = steps_of(model.journal)
    assert [len(step) for step in steps] == sizes(schedule, N, 2)
    ends = [number for number in range(len(steps)) if sum(map(len, steps[: number + 1])) % N == 0]
    assert model.validated == [number + 1 for number in ends]
    for epoch in (steps[: ends[0] + 1], steps[ends[0] + 1 :]):
        examples = [i for step in epoch for i in step]
        assert sorted(examples) == list(range(N)) and (workers or examples == list(range(N)))
    reference = Regression()
    train_by_hand(reference, DATA, [(step, 0.05) for step in steps])
    assert_close(model.net, reference.net)
    assert cap != 4 or max(model.sizes) == 4


@pytest.mark.quick(cap=[None], workers=[2])
@pytest.mark.quick(cap=[4], workers=[0])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cap", [None, 4])
def test_resumes_bit_for_bit(cap: Any, workers: int, tmp_path: Path) -> None:
    def run(*callbacks: Callback, path: Any = None) -> Regression:
        torch.manual_seed(1)
        data, scheduler = StreamDataModule(Rows(), VALIDATION, num_workers=workers), BatchLRScheduler(GROWING, 0.05, cap)
        options = {"enable_checkpointing": bool(callbacks), "ckpt_path": path, "max_epochs": 2}
        return trained(Regression(nn.Dropout(0.2)), data, scheduler, *callbacks, **options)

    whole = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    steps = steps_of(whole.journal)
    for step in (1, 8, 13):  # the first epoch has 8 steps
        resumed = run(path=tmp_path / f"step={step}.ckpt")
        assert steps_of(resumed.journal) == steps[step:]
        assert equal(resumed, whole), step


def test_an_adaptive_run_and_a_stream_without_an_end() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from (DATA[i] for i in range(N))

    scheduler = AdaptiveBatchLRScheduler(4, 0.05, lambda *_: True, maximum=30, check_every=4, max_samples=200)
    model = trained(Regression(), StreamDataModule(Endless(), batched=False), scheduler, max_epochs=-1)
    assert sum(model.sizes) == 200 and scheduler.stage > 1
    assert [i for batch in model.examples for i in batch] == [i % N for i in range(200)]

    known = BatchLRScheduler(GROWING, Cosine(0.05, unit="samples"))
    model = trained(Regression(), StreamDataModule(Endless(), batched=False, samples_per_epoch=50), known, max_epochs=2)
    assert model.sizes == sizes(GROWING, 50, 2)
    assert known.plan is not None and (known.plan.samples, known.plan.steps) == (100, len(model.sizes))
    assert model.rates[-1] == pytest.approx(0.025 * (1 + math.cos(math.pi * (100 - model.sizes[-1]) / 100)))


def test_small_batches_of_a_loader_are_regrouped() -> None:
    loader = DataLoader(Rows(), batch_size=7)
    model = trained(Regression(), StreamDataModule(loader), BatchLRScheduler(GROWING, 0.05), max_epochs=1)
    assert model.sizes == sizes(GROWING, N, 1)
    assert [i for batch in model.examples for i in batch] == list(range(N))


def test_a_short_last_step_is_dropped() -> None:
    model = trained(Regression(), StreamDataModule(Rows(), drop_last=True), BatchLRScheduler(16, 0.05), max_epochs=2)
    assert model.sizes == [16, 16, 16] * 2


def test_without_a_scheduler() -> None:
    model = trained(Regression(), StreamDataModule(Rows(), VALIDATION, batch_size=16), max_epochs=2)
    assert model.sizes == [16, 16, 16, 13] * 2 and model.validated == [4, 8]


def short(rows: list[Any]) -> list[torch.Tensor]:
    """A batch as its loader made it: its rows are one column longer than its number of rows, so no two sizes fit together."""
    x, y, i = (torch.stack([torch.as_tensor(row[part]) for row in rows]) for part in range(3))
    return [nn.functional.pad(x, (0, len(rows) + 1)), y, i]


class Cropping(Regression):
    """Takes away what `short` has padded."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, *rest = self.batch(batch)
        return super().loss([x[:, :3], *rest])


def whole(batch_size: Any, loader: Any, *callbacks: Callback, dropout: float = 0.0, **options: Any) -> Cropping:
    torch.manual_seed(1)
    scheduler = BatchLRScheduler(batch_size, 0.05, whole_batches=True)
    return trained(Cropping(nn.Dropout(dropout)), loader, scheduler, *callbacks, **{"max_epochs": 2} | options)


def whole_sizes(m: int) -> list[int]:
    """The sizes of the steps of two epochs of whole batches of m examples, of which the last of an epoch has fewer."""
    found, clock = [], Progress()
    for _ in range(2):
        left = N
        while left:
            size = -(-int(GROWING(clock)) // m) * m
            found.append(min(size, left))
            clock, left = clock.advance(found[-1]), left - found[-1]
        clock = clock.next_epoch()
    return found


@pytest.mark.quick(workers=[0])
@pytest.mark.parametrize("workers", [0, 2])
def test_whole_batches_of_a_stream(workers: int, tmp_path: Path) -> None:
    def loader() -> Any:
        return DataLoader(Rows(), batch_size=4, num_workers=workers, collate_fn=short)

    model = whole(GROWING, loader())
    steps = steps_of(model.journal)
    # with workers the batches of 3 and of 2 at their ends count as whole ones
    assert workers or [len(step) for step in steps] == whole_sizes(4)
    for epoch in range(2):
        assert sorted([i for step in steps for i in step][epoch * N :][:N]) == list(range(N))
    assert set(model.sizes) == ({4, 3, 2} if workers else {4, 1})
    reference = Regression()
    train_by_hand(reference, DATA, [(step, 0.05) for step in steps])
    assert_close(model.net, reference.net)

    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    uncut = whole(GROWING, loader(), saves, dropout=0.2, enable_checkpointing=True)
    for step in (1, 6, len(steps) // 2, len(steps) // 2 + 1):
        resumed = whole(GROWING, loader(), dropout=0.2, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert steps_of(resumed.journal) == steps[step:] and equal(resumed, uncut), step


class OwnLoader(DataLoader[Any]):
    """Over a map-style data set, which it iterates in its own way."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


def test_whole_batches_of_a_loader_that_iterates_itself(tmp_path: Path) -> None:
    def loader() -> Any:
        return OwnLoader(DATA, batch_size=8, shuffle=True, collate_fn=short)

    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    uncut = whole(16, loader(), saves, dropout=0.2, enable_checkpointing=True)
    steps = steps_of(uncut.journal)
    assert [len(step) for step in steps] == [*[16] * 12, 8] * 2 and steps[0] != steps[13]
    resumed = whole(16, loader(), dropout=0.2, ckpt_path=tmp_path / "step=17.ckpt")
    assert steps_of(resumed.journal) == steps[17:] and equal(resumed, uncut)


# --- several processes

SHARDS = ((0, 70), (100, 191))  # 70 and 91 examples


class Killed(Callback):
    """Kills its process at a batch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def together(
    cap: Any, folder: str = "", step: int = 0, kill_at: int = -1
) -> tuple[list[tuple[int, list[int]]], list[Any], int]:
    class Shard(StreamDataModule):
        def setup(self, stage: str) -> None:
            self.train_set = Rows(*SHARDS[self.trainer.global_rank])  # type: ignore[union-attr]

    torch.manual_seed(2)
    scheduler = BatchLRScheduler(GROWING, 0.05, cap)
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1) if folder and not step else None
    path = Path(folder) / f"step={step}.ckpt" if step else None
    options = {"max_epochs": 2, "devices": 2, "strategy": "ddp", "enable_checkpointing": saves is not None}
    model = Tight() if cap == "auto" else Regression()
    trained(model, Shard(), scheduler, Killed(kill_at), *([saves] if saves else []), ckpt_path=path, **options)
    weights = [parameter.tolist() for parameter in model.net.parameters()]
    return [(part.step, part.examples) for part in model.journal], weights, scheduler.progress.samples


class Tight(Regression):
    """Has memory for seven examples in the first process, and for five in the second."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) > (5 if self.trainer.global_rank else 7):
            raise out_of_memory()
        return super().training_step(batch, batch_idx)


@pytest.mark.quick(cap=[4, "auto"])
@pytest.mark.parametrize("cap", [None, 4, "auto"])
def test_processes_with_shards_of_different_lengths(cap: Any, pair: Pair, tmp_path: Path) -> None:
    (first, weights, samples), (second, same, _) = pair(together, cap, str(tmp_path))
    number = sum(stop - start for start, stop in SHARDS)
    assert weights == same and samples == 2 * number
    steps: list[list[int]] = []
    seen: set[int] = set()
    for _, rows in groupby(sorted([*first, *second], key=lambda row: row[0]), key=lambda row: row[0]):
        # a process that has nothing for a micro-batch repeats an example, with weight 0
        steps.append(list(dict.fromkeys(i for _, examples in rows for i in examples if i not in seen)))
        seen |= set(steps[-1])
        if len(seen) == number:
            seen.clear()
    assert [len(step) for step in steps] == sizes(GROWING, number, 2)
    everything = [i for start, stop in SHARDS for i in range(start, stop)]
    assert sorted(i for step in steps for i in step) == sorted(2 * everything)
    reference = Regression()
    train_by_hand(reference, DATA, [(step, 0.05) for step in steps])
    for found, expected in zip(weights, reference.net.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected.detach(), rtol=1e-11, atol=1e-12)
    for step in (5, 15):  # inside the first epoch, and where one of the streams has ended
        resumed = pair(together, cap, str(tmp_path), step)
        assert resumed[0][1] == weights and resumed[1][1] == weights


@pytest.mark.slow
def test_processes_that_are_killed(pair: Pair, tmp_path: Path) -> None:
    (_, weights, _), _ = pair(together, 4)
    with pytest.raises(RemoteError, match="a process ended"):
        pair(together, 4, str(tmp_path), 0, 9)  # inside the seventh step
    last = max(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt"))
    assert last == 6
    for _, resumed, _ in pair(together, 4, str(tmp_path), last):
        assert resumed == weights


def whole_together(folder: str, step: int = 0) -> tuple[list[tuple[int, list[int]]], list[Any], int]:
    class Shard(LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Rows(*SHARDS[self.trainer.global_rank]), batch_size=4, collate_fn=short)  # type: ignore[union-attr]

    saves = [] if step else [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)]
    options = {"devices": 2, "strategy": "ddp", "enable_checkpointing": not step}
    path = Path(folder) / f"step={step}.ckpt" if step else None
    model = whole(GROWING, Shard(), *saves, ckpt_path=path, **options)
    weights = [parameter.tolist() for parameter in model.net.parameters()]
    return [(part.step, part.examples) for part in model.journal], weights, next(iter(model.trainer.callbacks)).progress.samples  # type: ignore[attr-defined]


def test_whole_batches_of_shards_of_different_lengths(pair: Pair, tmp_path: Path) -> None:
    (first, weights, samples), (second, same, _) = pair(whole_together, str(tmp_path))
    number = sum(stop - start for start, stop in SHARDS)
    assert weights == same and samples == 2 * number and [step for step, _ in first] == [step for step, _ in second]
    steps: list[list[int]] = []
    seen: set[int] = set()
    for _, rows in groupby(sorted([*first, *second], key=lambda row: row[0]), key=lambda row: row[0]):
        steps.append([i for _, examples in rows for i in examples if i not in seen])
        seen |= set(steps[-1])
        if len(seen) == number:
            seen.clear()
    assert [len(step) for step in steps[:5]] == [8, 8, 8, 8, 16]  # 6 and 10, rounded up to whole batches on both
    assert sorted(i for step in steps for i in step) == sorted(2 * [i for start, stop in SHARDS for i in range(start, stop)])
    reference = Regression()
    train_by_hand(reference, DATA, [(step, 0.05) for step in steps])
    for found, expected in zip(weights, reference.net.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected.detach(), rtol=1e-11, atol=1e-12)
    for step in (3, len(steps) // 2 - 1):  # inside the first epoch, and where one of the streams has ended
        resumed = pair(whole_together, str(tmp_path), step)
        assert resumed[0][1] == weights and resumed[1][1] == weights


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match="OwnLoader with a RandomSampler gives each of the 2 processes the same"
    ):
        check_shared(OwnLoader(DATA, batch_size=4, shuffle=True), 2)
    check_shared(OwnLoader(DATA, batch_size=4, sampler=DistributedSampler(DATA, 2, 0)), 2)
    check_shared(DataLoader(Rows(), batch_size=4), 2)
    with pytest.raises(MisconfigurationException, match="2 training loaders, one of them a stream"):

        class Two(StreamDataModule):
            def train_dataloader(self) -> Any:
                return [super().train_dataloader(), DataLoader(DATA)]

        trained(Regression(), Two(Rows()), BatchLRScheduler(8))
    with pytest.raises(MisconfigurationException, match=r'have to be read before.*`batch_size_unit="tokens"`'):
        trained(Regression(), StreamDataModule(Rows()), BatchLRScheduler(8, batch_size_unit="tokens"))
    with pytest.raises(MisconfigurationException, match="`accumulate_grad_batches=2` with a StreamDataModule"):
        trained(Regression(), StreamDataModule(Rows()), BatchLRScheduler(8), accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="there is no training stream"):
        trained(Regression(), StreamDataModule(), BatchLRScheduler(8))
