"""Two real processes on one machine, over gloo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from harness.data import Stranger, own, regression
from harness.files import csv_rows, flat
from harness.fits import fit, out_of_memory
from harness.modules import Recorder
from harness.processes import Pair
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, FullGradientNorm
from lightning_bsl.schedules import Exponential, Milestones

FULLY_SHARD_ON_CPU = pytest.mark.skipif(torch.__version__ < "2.6", reason="gloo cannot scatter gradients before torch 2.6")
VALIDATION = regression(8)
# 61 examples in steps of 12 leave a step of one, of which a process has no share; 13 and 31 do not divide by 2
DATA, SIZES = regression(61), (12, 13, 31)


class Linear(Recorder):
    """Fails above so many examples; may be sharded.

    Args:
        memory: Examples that fit, of each process.
        shards: Whether parameters are.
    """

    def __init__(self, memory: tuple[int, int] | None = None, shards: bool = False) -> None:
        net = nn.Linear(3, 1, dtype=torch.float64)
        super().__init__(net, lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
        nn.init.constant_(net.weight, 0.5)
        nn.init.constant_(net.bias, 0.5)
        self.register_buffer("passes", torch.zeros(1))  # DDP broadcasts buffers, in the forward passes that it chooses
        self.memory, self.shards, self.failed = memory, shards, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.passes += 1
        if self.training and self.memory and len(batch[0]) > self.memory[self.trainer.global_rank]:
            self.failed.append(len(batch[0]))
            raise out_of_memory()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def configure_model(self) -> None:
        if self.shards:
            from torch.distributed._composable.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            self.shards = False


def train(folder: Path, scheduler: Any, model: Linear, data: Any, *callbacks: Callback, **arguments: Any) -> dict[str, Any]:
    """Fit, in as many processes as ``devices`` says, and tell what happened in this one."""
    logger = CSVLogger(folder, name="", version="")
    fit(model, data, scheduler, *callbacks, logger=logger, log_every_n_steps=1, **arguments)
    weights = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in model.parameters()]
    return {
        "seen": [(batch.examples, batch.lr) for batch in model.journal],
        "weights": [weight.tolist() for weight in weights],
        "samples": scheduler.progress.samples,
        "step": scheduler.progress.step,
        "planned": scheduler.plan and scheduler.plan.samples,
        "segments": getattr(scheduler, "segments", None),
        "failed": model.failed,
        "passes": model.passes.item(),
        "found": scheduler.state_dict()["micro_batch_size"],
    }


def train_ours(
    folder: Path, cap: Any = None, strategy: str = "ddp", memory: Any = None, differ: bool = False, devices: int = 2
) -> dict[str, Any]:
    """Grow inside an epoch."""
    last = SIZES[-1] + (int(os.environ["RANK"]) if differ else 0)
    schedule = Milestones([*SIZES[:-1], last], at=[6, 9], unit="step")
    callbacks: list[Callback] = [FullGradientNorm(batch_size=7)] if strategy in ("ddp", "auto") else []
    strategies: dict[str, Any] = {
        "fsdp": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        # both processes train on every example; here they happen to hold the whole model, too
        "tensor": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
    }
    return train(
        folder,
        BatchLRScheduler(schedule, Exponential(0.01, 1.1), cap),
        Linear(memory, shards=strategy == "fsdp"),
        own(DATA, VALIDATION, eval_batch_size=4, seed=0),
        *callbacks,
        devices=devices,
        strategy=strategies[strategy]() if strategy in strategies else strategy,
        use_distributed_sampler=False,
    )


def train_adaptively(folder: Path) -> dict[str, Any]:
    """Each process measures something else."""
    wanted = [{3, 7, 9}, {3, 5, 9}][int(os.environ["RANK"])]
    scheduler = AdaptiveBatchLRScheduler(
        6, 0.01, lambda trainer, scheduler: scheduler.progress.step in wanted, maximum=30, check_every=1
    )
    ours = own(DATA, VALIDATION, eval_batch_size=4)
    return train(folder, scheduler, Linear(), ours, devices=2, strategy="ddp", use_distributed_sampler=False)


def train_a_stranger(folder: Path) -> dict[str, Any]:
    """Grow between epochs, by Lightning's own distributed sampler."""
    theirs = Stranger(regression(64), VALIDATION, batch_size=1, eval_batch_size=4, shuffle=True)
    scheduler = BatchLRScheduler(Exponential(8, 2), Exponential(0.01, 1.1))
    return train(folder, scheduler, Linear(), theirs, FullGradientNorm(batch_size=7), devices=2, strategy="ddp")


def refusal(folder: Path) -> str:
    """What the processes are told that do not plan the same."""
    with pytest.raises(MisconfigurationException) as error:
        train_ours(folder, differ=True)
    return str(error.value)


Rows = list[dict[str, str]]


def go(pair: Pair, folder: Path, function: Any = train_ours, **arguments: Any) -> tuple[list[dict[str, Any]], Rows]:
    """What each process has seen, and the rows of the log."""
    return pair(function, folder, **arguments), csv_rows(folder / "metrics.csv")


Alone = tuple[dict[str, Any], Rows]


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    folder = tmp_path_factory.mktemp("alone")
    return train_ours(folder, strategy="auto", devices=1), csv_rows(folder / "metrics.csv")


def assert_trained_alike(one: dict[str, Any], processes: list[dict[str, Any]]) -> None:
    """All have the weights of the run in one process, and took its steps."""
    weights = torch.tensor(flat(one["weights"][0]) + one["weights"][1], dtype=torch.float64)
    for process in processes:
        others = torch.tensor(flat(process["weights"][0]) + process["weights"][1], dtype=torch.float64)
        torch.testing.assert_close(others, weights, rtol=1e-12, atol=1e-13)
        assert (process["samples"], process["step"]) == (one["samples"], one["step"])


def test_two_processes_train_as_one(in_one_process: Alone, pair: Pair, tmp_path: Path) -> None:
    one, rows = in_one_process
    two, rows_of_two = go(pair, tmp_path, cap=99)
    sizes = [12, 12, 12, 12, 12, 1, 13, 13, 13, 22, 31, 30]
    assert [len(indices) for indices, _ in one["seen"]] == sizes
    for (batch, lr), (first, lr_of_first), (second, lr_of_second) in zip(
        one["seen"], two[0]["seen"], two[1]["seen"], strict=True
    ):
        assert lr == lr_of_first == lr_of_second
        if len(batch) > 1:
            assert first + second == batch
            assert abs(len(first) - len(second)) <= 1
        else:
            assert first == second == batch  # one of them only keeps the other company, at weight 0
    assert_trained_alike(one, two)
    assert {(process["step"], process["planned"]) for process in two} == {(len(sizes), 3 * 61)}
    # the log is written once, and says the same
    for column in ("batch_size", "lr", "samples"):
        assert [row[column] for row in rows_of_two] == [row[column] for row in rows]
    for column in ("full_gradient_norm", "full_loss"):
        values, of_two = ([float(row[column]) for row in log if row[column]] for log in (rows, rows_of_two))
        assert len(values) == 3
        assert of_two == pytest.approx(values, rel=1e-6)  # logged as float32
    losses, losses_of_two = ([float(r["val/loss"]) for r in log if r["val/loss"]] for log in (rows, rows_of_two))
    assert len(losses) == 3
    assert losses_of_two == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize(
    "strategy",
    ["ddp", pytest.param("fsdp", marks=FULLY_SHARD_ON_CPU), pytest.param("tensor", marks=FULLY_SHARD_ON_CPU)],
)
def test_two_processes_split_their_shares_into_micro_batches(
    strategy: str, in_one_process: Alone, pair: Pair, tmp_path: Path
) -> None:
    one, rows = in_one_process
    two, rows_of_two = go(pair, tmp_path, strategy=strategy, cap=5)
    assert max(len(indices) for process in two for indices, _ in process["seen"]) == 5
    assert len(two[0]["seen"]) == len(two[1]["seen"]) > len(one["seen"])
    assert_trained_alike(one, two)
    for column in ("batch_size", "lr", "samples"):
        assert [row[column] for row in rows_of_two] == [row[column] for row in rows]


def test_processes_of_unequal_memory_go_by_the_smallest(in_one_process: Alone, pair: Pair, tmp_path: Path) -> None:
    one, rows = in_one_process
    two, rows_of_two = go(pair, tmp_path, cap="auto", memory=(8, 4))
    # shares of 6, then 3: only what is new is tried, and a process tries with the others what its own memory would hold
    assert [process["failed"] for process in two] == [[], [6]]
    assert {process["found"] for process in two} == {3}
    assert max(len(indices) for process in two for indices, _ in process["seen"]) == 6
    assert two[0]["passes"] == two[1]["passes"]
    assert_trained_alike(one, two)
    for column in ("batch_size", "lr", "samples"):
        assert [row[column] for row in rows_of_two] == [row[column] for row in rows]


def test_processes_that_measure_differently_advance_together(pair: Pair, tmp_path: Path) -> None:
    two, _ = go(pair, tmp_path, train_adaptively)
    assert two[0]["segments"] == two[1]["segments"]
    assert [segment[:2] for segment in two[0]["segments"]] == [(0, 6), (18, 12), (61 + 24, 24)]  # at steps 3 and 9, not 5 or 7
    assert two[0]["weights"] == two[1]["weights"]
    assert [lr for _, lr in two[0]["seen"]] == [lr for _, lr in two[1]["seen"]]
    first, second = ([indices for indices, _ in process["seen"]] for process in two)
    epoch = 3 + 4  # steps of 6, 6, 6, 12, 12, 12, 7
    assert sorted(flat(first[:epoch]) + flat(second[:epoch])) == list(range(61))
    assert two[0]["samples"] == two[1]["samples"] == 3 * 61


def test_processes_that_plan_differently_are_refused(pair: Pair, tmp_path: Path) -> None:
    for message in pair(refusal, tmp_path):
        assert "the processes do not plan the same batch sizes" in message


def test_a_strangers_batch_is_split_over_two_processes(pair: Pair, tmp_path: Path) -> None:
    two, rows = go(pair, tmp_path, train_a_stranger)
    sizes = [8] * 8 + [16] * 4 + [32] * 2
    for (first, lr), (second, lr_of_second) in zip(two[0]["seen"], two[1]["seen"], strict=True):
        assert lr == lr_of_second and len(first) == len(second) and not set(first) & set(second)
    assert [len(first) + len(second) for (first, _), (second, _) in zip(two[0]["seen"], two[1]["seen"])] == sizes
    for start, stop in ((0, 8), (8, 12), (12, 14)):  # each example once an epoch, over both
        assert sorted(flat(flat(step[0] for step in process["seen"][start:stop]) for process in two)) == list(range(64))
    assert two[0]["weights"] == two[1]["weights"]
    assert {process["samples"] for process in two} == {two[0]["planned"]} == {3 * 64}
    assert [float(row["samples"]) for row in rows if row["val/loss"]] == [64, 128, 192]
