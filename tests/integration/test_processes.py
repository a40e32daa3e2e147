"""Two real processes on one machine, over gloo."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import flat

ROOT = Path(__file__).parents[2]
FULLY_SHARD_ON_CPU = pytest.mark.skipif(torch.__version__ < "2.6", reason="gloo cannot scatter gradients before torch 2.6")
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, TensorDataset
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, BatchSizeDataModule, FullGradientNorm
from lightning_bsl.schedules import Exponential, Milestones

name, devices, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def examples(size):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.sum(dim=1, keepdim=True) ** 2, torch.arange(size))

class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1, dtype=torch.float64)
        torch.nn.init.constant_(self.net.weight, 0.5)
        torch.nn.init.constant_(self.net.bias, 0.5)
        self.register_buffer("passes", torch.zeros(1))  # DDP broadcasts buffers, in the forward passes that it chooses
        self.seen, self.failed = [], []

    def training_step(self, batch):
        x, y, index = batch
        self.passes += 1
        if name == "ownauto" and self.training and devices > 1 and len(x) > (8, 4)[self.trainer.global_rank]:
            self.failed.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if self.training:  # FullGradientNorm evaluates
            self.seen.append([index.tolist(), self.trainer.optimizers[0].param_groups[0]["lr"]])
        return torch.nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch):
        self.log("val/loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_model(self):
        if name == "ownfsdp" and not hasattr(self, "sharded"):
            from torch.distributed._composable.fsdp import fully_shard
            self.sharded = fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

class Stranger(LightningDataModule):
    def __init__(self, batch_size=1):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(examples(64), batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(examples(8), batch_size=4)

if name.startswith("own"):
    # 61 examples in steps of 12 leave a step of one, of which a process has no share; 13 and 31 do not divide by 2
    datamodule = BatchSizeDataModule(examples(61), examples(8), eval_batch_size=4)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sizes = [12, 13, 31 + rank] if name == "owndivergent" else [12, 13, 31]
    cap = {"own": 99, "ownauto": "auto", "owndivergent": None}.get(name, 5)
    scheduler = BatchLRScheduler(Milestones(sizes, at=[6, 9], unit="step"), Exponential(0.01, 1.1), cap)
    if name == "ownadaptive":  # each process measures something else
        wanted = [{3, 7, 9}, {3, 5, 9}][rank]
        trigger = lambda trainer, scheduler: scheduler.progress.step in wanted
        scheduler = AdaptiveBatchLRScheduler(6, 0.01, trigger, maximum=30, check_every=1)
else:
    datamodule, scheduler = Stranger(), BatchLRScheduler(Exponential(8, 2), Exponential(0.01, 1.1))
model = Regression()
callbacks = [scheduler] if name in ("ownfsdp", "owntensor") else [scheduler, FullGradientNorm(batch_size=7)]
strategy = "ddp" if devices > 1 else "auto"
if name == "ownfsdp":
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
if name == "owntensor":  # both processes train on every example; here they happen to hold the whole model, too
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
trainer = Trainer(
    accelerator="cpu", devices=devices, strategy=strategy, max_epochs=3,
    use_distributed_sampler=not name.startswith("own"), callbacks=callbacks, logger=CSVLogger(out, name="", version=""),
    log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
)
trainer.fit(model, datamodule=datamodule)
result = {
    "seen": model.seen, "weights": [(p.full_tensor() if hasattr(p, "full_tensor") else p).tolist() for p in model.parameters()],
     "samples": scheduler.progress.samples,
    "step": scheduler.progress.step, "planned": scheduler.plan and scheduler.plan.samples,
    "segments": getattr(scheduler, "segments", None), "failed": model.failed,
    "passes": model.passes.item(), "found": scheduler.state_dict()["micro_batch_size"],
}
(out / f"{trainer.global_rank}.json").write_text(json.dumps(result))
"""


def launch(name: str, devices: int, out: Path) -> subprocess.CompletedProcess[str]:
    """Run a fit in as many processes as ``devices``."""
    out.mkdir()
    (out / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(out / "script.py"), name, str(devices), str(out)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def go(name: str, devices: int, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """What each process has seen, and the rows of the log."""
    done = launch(name, devices, out)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(devices)], rows


Alone = tuple[dict[str, Any], list[dict[str, str]]]


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    (one,), rows = go("own", 1, tmp_path_factory.mktemp("alone") / "1")
    return one, rows


def assert_trained_alike(one: dict[str, Any], processes: list[dict[str, Any]]) -> None:
    """All have the weights of the run in one process, and took its steps."""
    weights = torch.tensor(flat(one["weights"][0]) + one["weights"][1], dtype=torch.float64)
    for process in processes:
        others = torch.tensor(flat(process["weights"][0]) + process["weights"][1], dtype=torch.float64)
        torch.testing.assert_close(others, weights, rtol=1e-12, atol=1e-13)
        assert (process["samples"], process["step"]) == (one["samples"], one["step"])


def test_two_processes_train_as_one(in_one_process: Alone, tmp_path: Path) -> None:
    one, rows = in_one_process
    two, rows_of_two = go("own", 2, tmp_path / "2")
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
def test_two_processes_split_their_shares_into_micro_batches(strategy: str, in_one_process: Alone, tmp_path: Path) -> None:
    one, rows = in_one_process
    two, rows_of_two = go(f"own{strategy}", 2, tmp_path / "2")
    assert max(len(indices) for process in two for indices, _ in process["seen"]) == 5
    assert len(two[0]["seen"]) == len(two[1]["seen"]) > len(one["seen"])
    assert_trained_alike(one, two)
    for column in ("batch_size", "lr", "samples"):
        assert [row[column] for row in rows_of_two] == [row[column] for row in rows]


def test_processes_of_unequal_memory_go_by_the_smallest(in_one_process: Alone, tmp_path: Path) -> None:
    one, rows = in_one_process
    two, rows_of_two = go("ownauto", 2, tmp_path / "2")
    # shares of 6, then 3: only what is new is tried, and a process tries with the others what its own memory would hold
    assert [process["failed"] for process in two] == [[], [6]]
    assert {process["found"] for process in two} == {3}
    assert max(len(indices) for process in two for indices, _ in process["seen"]) == 6
    assert two[0]["passes"] == two[1]["passes"]
    assert_trained_alike(one, two)
    for column in ("batch_size", "lr", "samples"):
        assert [row[column] for row in rows_of_two] == [row[column] for row in rows]


def test_processes_that_measure_differently_advance_together(tmp_path: Path) -> None:
    two, _ = go("ownadaptive", 2, tmp_path / "2")
    assert two[0]["segments"] == two[1]["segments"]
    assert [segment[:2] for segment in two[0]["segments"]] == [[0, 6], [18, 12], [61 + 24, 24]]  # at steps 3 and 9, not 5 or 7
    assert two[0]["weights"] == two[1]["weights"]
    assert [lr for _, lr in two[0]["seen"]] == [lr for _, lr in two[1]["seen"]]
    first, second = ([indices for indices, _ in process["seen"]] for process in two)
    epoch = 3 + 4  # steps of 6, 6, 6, 12, 12, 12, 7
    assert sorted(flat(first[:epoch]) + flat(second[:epoch])) == list(range(61))
    assert two[0]["samples"] == two[1]["samples"] == 3 * 61


def test_processes_that_plan_differently_are_refused(tmp_path: Path) -> None:
    done = launch("owndivergent", 2, tmp_path / "2")
    assert done.returncode != 0
    assert "the processes do not plan the same batch sizes" in done.stderr


def test_a_strangers_batch_is_split_over_two_processes(tmp_path: Path) -> None:
    two, rows = go("stranger", 2, tmp_path / "2")
    sizes = [8] * 8 + [16] * 4 + [32] * 2
    for (first, lr), (second, lr_of_second) in zip(two[0]["seen"], two[1]["seen"], strict=True):
        assert lr == lr_of_second and len(first) == len(second) and not set(first) & set(second)
    assert [len(first) + len(second) for (first, _), (second, _) in zip(two[0]["seen"], two[1]["seen"])] == sizes
    for start, stop in ((0, 8), (8, 12), (12, 14)):  # each example once an epoch, over both
        assert sorted(flat(flat(step[0] for step in process["seen"][start:stop]) for process in two)) == list(range(64))
    assert two[0]["weights"] == two[1]["weights"]
    assert {process["samples"] for process in two} == {two[0]["planned"]} == {3 * 64}
    assert [float(row["samples"]) for row in rows if row["val/loss"]] == [64, 128, 192]
