"""Grids in passes: interrupted, extended, short of memory; in this process and in workers."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor

from harness.commands import Run, kill, run_killed
from harness.configs import choices, compose_config
from harness.files import ROOT
from harness.fits import out_of_memory, quiet
from lightning_bsl.datasets import Digits
from lightning_bsl.models import Classifier, cnn5
from lightning_bsl.population import Grid, Outcome, Population, read_outcomes, run_grid
from lightning_bsl.population.grid import _Pass, _Passes, fitting
from lightning_bsl.population.workers import keep_freed_memory

pytestmark = pytest.mark.xdist_group("grid")  # which is trained once
GRID: dict[str, Any] = {
    "batch_sizes": [8, 16], "lrs": [0.01, 0.02, 1e200], "seeds": 2, "targets": [2.2, 2.05], "max_examples": 900,
    "extra_steps": 3, "probe": 40,
}  # fmt: skip

FEW: dict[str, Any] = {"batch_sizes": [16], "lrs": [0.02, 1e200], "max_examples": 480}


def make(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(cnn5(image_size=8, width=4), 10)


def make_trainer() -> Trainer:
    return Trainer(**quiet(max_epochs=-1, precision="64-true"))


def trained(path: Path, progress: Any = lambda done, of: None, **changes: Any) -> list[Outcome]:
    how = {name: changes.pop(name) for name in ("form", "say") if name in changes}
    pieces = {"make": make, "datamodule": Digits(), "trainer": make_trainer, "jobs": 1}
    pieces |= {name: changes.pop(name) for name in pieces if name in changes}
    return run_grid(Grid(**GRID | changes), path=path, progress=progress, **pieces, **how)  # type: ignore[arg-type]


def same(outcomes: Sequence[Outcome], others: Sequence[Outcome]) -> None:
    """But for rounding: replicas are trained beside others."""
    assert len(outcomes) == len(others)
    for one, other in zip(sorted(outcomes), sorted(others)):
        assert one[:7] == other[:7]
        assert (one.loss, one.loss_drop) == pytest.approx((other.loss, other.loss_drop), abs=1e-9, nan_ok=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    path = tmp_path_factory.mktemp("whole") / "replicas.csv"
    found = trained(path)
    assert str(read_outcomes(path)) == str(found)
    return found


def test_every_replica_has_its_line(whole: list[Outcome]) -> None:
    names = Counter((each.batch_size, each.lr, each.seed, each.target) for each in whole)
    assert set(names) == {(b, lr, seed, t) for b in (8, 16) for lr in GRID["lrs"] for seed in (0, 1) for t in (2.2, 2.05)}
    assert set(names.values()) == {1}
    statuses = {(each.lr, each.status) for each in whole}
    assert (1e200, "diverged") in statuses and (0.02, "reached") in statuses


@pytest.mark.quick(size=[5])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_passes_of_any_size_find_the_same(whole: list[Outcome], size: int, tmp_path: Path) -> None:
    same(trained(tmp_path / "replicas.csv", replicas_per_pass=size), whole)


def test_interrupted_anywhere_it_loses_and_repeats_nothing(whole: list[Outcome], tmp_path: Path) -> None:
    path = tmp_path / "replicas.csv"
    seen: list[int] = []

    def interrupt(done: int, of: int) -> None:
        seen.append(done)
        assert of == 12
        if len(seen) > 1 and done > seen[0]:  # after the first replica of each run
            raise RuntimeError("interrupted")

    for number in range(12):
        seen.clear()
        with pytest.raises(RuntimeError, match="interrupted"):
            trained(path, interrupt)
        assert seen[0] == number
        if number % 3 == 0:  # killed while it wrote: half a line, or half of a replica's lines
            line = ",".join([str(70 + number), *path.read_text().splitlines()[-1].split(",")[1:]])
            with path.open("a") as file:
                file.write(line[: len(line) // 2] if number % 2 else f"{line}\n")
    assert str(trained(path)) == str(read_outcomes(path))
    same(read_outcomes(path), whole)


def test_it_grows_with_the_grid(whole: list[Outcome], tmp_path: Path) -> None:
    path = tmp_path / "replicas.csv"
    trained(path, seeds=1, batch_sizes=[16])
    before = path.read_text()
    calls: list[tuple[int, int]] = []
    same(trained(path, lambda *each: calls.append(each)), whole)
    assert path.read_text().startswith(before)
    assert calls[0] == (3, 12) and calls[-1] == (12, 12)


@pytest.mark.parametrize("changes, message", [
    ({"targets": [2.2]}, r"holds replicas with target \[2\.05\], not \[2\.2\]"),
    ({"extra_steps": 4}, r"holds replicas with extra_steps \[3\], not \[4\]"),
])  # fmt: skip
def test_another_grid_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "replicas.csv"
    trained(path, batch_sizes=[16], lrs=[1e200])
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        trained(path, **changes)
    assert path.read_text() == before


def test_where_memory_is_short_fewer_train_at_once(
    whole: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = Population.training_step

    def training_step(self: Population, batch: Any, batch_idx: int) -> Tensor:
        sizes.append(len(self.replicas))
        if len(self.replicas) > 2:
            raise out_of_memory()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Population, "training_step", training_step)
    same(trained(tmp_path / "replicas.csv"), whole)
    assert max(sizes) == 6
    with pytest.raises(torch.OutOfMemoryError):
        monkeypatch.setattr(Population, "training_step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        trained(tmp_path / "other.csv")


# --- workers


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return trained(tmp_path_factory.mktemp("few") / "replicas.csv", form="loop", **FEW)


@pytest.mark.quick(changes=[FEW])
@pytest.mark.parametrize("changes", [FEW, {}])
def test_workers_train_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    """In the loop form a replica does not depend on its pass, and one thread has one order of sums: bit for bit."""
    calls: list[tuple[int, int]] = []
    alone = trained(tmp_path / "alone.csv", form="loop", **changes)
    path = tmp_path / "replicas.csv"
    here = trained(path, lambda *each: calls.append(each), jobs=2, form="loop", **changes)
    assert sorted(map(str, here)) == sorted(map(str, alone)) == sorted(map(str, read_outcomes(path)))
    assert calls == [(done, len(alone) // 2) for done in range(len(alone) // 2 + 1)]
    same(trained(tmp_path / "stacked.csv", jobs=2, form="stacked", **changes), alone)
    assert not multiprocessing.active_children()


def test_the_choice_of_a_form_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    trained(tmp_path / "replicas.csv", say=lines.append, jobs=2, lrs=[0.01, 0.02], max_examples=160)
    pattern = r"batch (8|16): (loop, \d+\.\dx the stacked form|stacked, \d+\.\dx the loop) \(\d replicas\)"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert {line.split(":")[0] for line in lines} == {"batch 8", "batch 16"}


class TwoArgumentsError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def killed() -> BaseException:
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return AssertionError()


@pytest.mark.parametrize("error, kind, message", [
    (lambda: ValueError("no such layer"), ValueError, "no such layer"),
    (lambda: TwoArgumentsError("no", "layer"), RuntimeError, "TwoArgumentsError: no layer"),
    (killed, RuntimeError, r"exit code -9 while it trained _Pass\(batch_size=16, "),
])  # fmt: skip
def test_what_happens_in_a_worker_is_raised(
    few: list[Outcome], error: Any, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    def broken(seed: int) -> Classifier:
        if seed == 1:
            raise error()
        return make(seed)

    path = tmp_path / "replicas.csv"
    with pytest.raises(kind, match=message) as caught:
        trained(path, make=broken, jobs=2, form="loop", **FEW)
    assert error is killed or "in broken" in str(caught.value.__cause__)  # the traceback of the worker
    assert not multiprocessing.active_children()
    assert sorted(map(str, trained(path, form="loop", **FEW))) == sorted(map(str, few))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_that_was_freed_is_not_mapped_again() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):  # of 64 MiB each, above what glibc keeps
            torch.ones(1 << 24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def child() -> None:
        torch.set_num_threads(1)
        torch.ones(1 << 24)
        told.put(faults())
        keep_freed_memory()
        torch.ones(1 << 24)
        told.put(faults())

    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    process = context.Process(target=child)
    process.start()
    process.join()
    without, with_it = told.get(), told.get()
    assert with_it < without / 10


def test_an_interruption_ends_the_workers(few: list[Outcome], tmp_path: Path) -> None:
    path = tmp_path / "replicas.csv"

    def interrupt(done: int, of: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(path, interrupt, jobs=2, form="loop", **FEW)
    assert not multiprocessing.active_children()
    before = read_outcomes(path)
    assert len(before) == 2  # of one replica
    after = trained(path, jobs=2, form="loop", **FEW)
    assert str(after[:2]) == str(before) and sorted(map(str, after)) == sorted(map(str, few))


def test_workers_that_are_short_of_memory_train_fewer(
    few: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Population.training_step

    def training_step(self: Population, batch: Any, batch_idx: int) -> Tensor:
        if len(self.replicas) > 1:
            raise out_of_memory()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Population, "training_step", training_step)
    same(trained(tmp_path / "replicas.csv", jobs=2, **FEW), few)


def killed_again_and_again(path: Path, kills: int, jobs: int, **options: Any) -> None:
    """Kills a grid when some replicas more have ended; none that had ended may begin again."""
    log = path.parent / "begun.txt"

    def begin() -> None:
        done = {(each.batch_size, each.seed, each.lr) for each in read_outcomes(path)}
        initialise = Population.__init__

        def noting(self: Population, make: Any, replicas: Any, batch_size: int, *arguments: Any, **others: Any) -> None:
            again = done & {(batch_size, *pair) for pair in replicas}
            with log.open("a") as file:
                file.write(f"{again or 'new'}\n")
            initialise(self, make, replicas, batch_size, *arguments, **others)

        Population.__init__ = noting  # type: ignore[method-assign]
        trained(path, jobs=jobs, form="loop", replicas_per_pass=2, **options)

    for _ in range(kills):
        before = len(path.read_text().splitlines()) if path.exists() else 1
        more = before + 1 + random.randrange(3)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            with suppress(BaseException), open(os.devnull, "w") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
                begin()
            os._exit(0)
        os.close(writer)
        while not path.exists() or len(path.read_text().splitlines()) < more:
            time.sleep(0.001)
        time.sleep(random.random() / 20)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "it ended before it was killed"
        assert os.read(reader, 1) == b""  # its workers have ended, too
        os.close(reader)
    lines = log.read_text().splitlines()
    assert len(lines) >= kills and set(lines) == {"new"}


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_with_workers_it_loses_and_repeats_nothing(kills: int, tmp_path: Path) -> None:
    larger: dict[str, Any] = {"max_examples": 480} if kills == 1 else {"seeds": 6, "max_examples": 2400}
    path = tmp_path / "replicas.csv"
    killed_again_and_again(path, kills, 2, **larger)
    before = read_outcomes(path)
    after = trained(path, form="loop", **larger)
    assert str(after[: len(before)]) == str(before)
    assert sorted(map(str, after)) == sorted(map(str, trained(tmp_path / "whole.csv", form="loop", **larger)))


@pytest.mark.slow
def test_workers_can_be_spawned(few: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("workers", "grid"):
        monkeypatch.setattr(f"lightning_bsl.population.{name}.start_method", lambda: "spawn")
    here = trained(tmp_path / "replicas.csv", jobs=2, form="loop", replicas_per_pass=2, **FEW)
    assert sorted(map(str, here)) == sorted(map(str, few))


def test_what_cannot_be_pickled_is_not_spawned(few: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("workers", "grid"):
        monkeypatch.setattr(f"lightning_bsl.population.{name}.start_method", lambda: "spawn")
    with pytest.raises(ValueError, match="write functions at the top of a module, no lambdas; or jobs=1"):
        trained(tmp_path / "refused.csv", make=lambda seed: make(seed), jobs=2, replicas_per_pass=2, **FEW)
    monkeypatch.setattr("lightning_bsl.population.grid.usable_cores", lambda: 2)
    few_at_once = {"replicas_per_pass": 2, "form": "loop"} | FEW
    here = trained(tmp_path / "replicas.csv", make=lambda seed: make(seed), jobs=None, **few_at_once)
    assert sorted(map(str, here)) == sorted(map(str, few))


@pytest.mark.parametrize("jobs, message", [
    (2, "`jobs=2`: the passes of a cuda device run one after the other; write jobs=1"),
    (0, "`jobs=0`"),
])  # fmt: skip
def test_jobs_that_cannot_be(jobs: int, message: str, tmp_path: Path) -> None:
    gpu = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / "replicas.csv", trainer=lambda: gpu, jobs=jobs)


@pytest.mark.parametrize("jobs", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 5, 100])
def test_passes_hold_every_replica_once(jobs: int, size: int) -> None:
    grid = Grid([4, 8, 16], [0.1, 0.2, 0.3, 0.4], seeds=4, targets=[1.0], max_examples=64)
    passes = _Passes(grid, {(4, 0, 0.1), (8, 3, 0.4)}, lambda batch_size: size, jobs)
    assert not passes.is_one
    taken: list[_Pass] = []
    while (task := passes.take()) is not None:
        taken.append(task)
    replicas = Counter((task.batch_size, *pair) for task in taken for pair in task.replicas)
    assert set(replicas.values()) == {1} and len(replicas) == grid.replicas - 2
    assert max(len(task.replicas) for task in taken) <= size
    assert all([lr for _, lr in task.replicas] == sorted(lr for _, lr in task.replicas) for task in taken)  # neighbours
    last = [len(task.replicas) for task in taken if task.batch_size == 16]
    assert len(last) % jobs == 0 and max(last) - min(last) <= 1  # all processes have work to the end


def test_larger_models_and_batches_train_fewer_at_once() -> None:
    data = Digits()
    data.setup("fit")

    def number(width: int, batch_size: int) -> int:
        return fitting(Classifier(cnn5(image_size=8, width=width), 10), data, batch_size, torch.device("cpu"))

    assert number(4, 1) > number(4, 64) > number(4, 1024) >= 8
    assert number(4, 1) > number(64, 1) > 8
    assert number(1024, 1) < 8  # 1 GB with gradients and moments


def test_replicas_give_up_after_the_added_steps_too(tmp_path: Path) -> None:
    limits = {"targets": [1e-9], "lrs": [0.01], "max_examples": 40, "added_steps": 2}
    found = trained(tmp_path / "r.csv", **limits, batch_sizes=[8, 64], seeds=1)  # 64 examples are more than 40
    assert [(each.batch_size, each.status, each.steps) for each in found] == [(8, "not_reached", 7), (64, "not_reached", 2)]


@pytest.mark.parametrize("changes, message", [
    ({"batch_sizes": []}, "`batch_sizes=.*at least one value"),
    ({"lrs": [0.1, 0.1]}, "`lrs=.*none twice"),
    ({"lrs": [0.1, -0.1]}, "`lrs=.*above 0"),
    ({"targets": [0.0]}, "`targets=.*above 0"),
    ({"seeds": 0}, "`seeds="),
    ({"max_examples": 10}, "`max_examples=10` does not make one batch of 16"),
    ({"extra_steps": 0}, "`extra_steps=0`"),
    ({"added_steps": -1}, "`added_steps=-1`"),
    ({"replicas_per_pass": 0}, "`replicas_per_pass=0`"),
])  # fmt: skip
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**GRID | changes)


def test_a_model_without_a_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="full_loss"):
        run_grid(Grid(**GRID), lambda seed: LightningModule(), Digits(), tmp_path / "r.csv", lambda: Trainer(**quiet()))


# --- the script

SCRIPT = (
    "data=digits", "+model.net.width=4", "grid.batch_sizes=[4,8]", "grid.lrs=[0.01,0.02]", "grid.seeds=3",
    "grid.targets=[2.0]", "grid.max_examples=4000", "grid.probe=40", "trainer.precision=64-true",
)  # fmt: skip


@pytest.mark.slow
def test_the_script_killed_goes_on(run: Run, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    printed = run("surge_grid.py", *SCRIPT, folder=whole).out
    assert "12 reached, 0 not_reached, 0 diverged" in printed
    assert f"python {ROOT / 'scripts' / 'surge_report.py'} {whole}" in printed

    def prepare() -> None:
        step = Population.training_step

        def training_step(population: Population, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3 and len(read_outcomes(cut / "replicas.csv")) >= 4:
                kill()
            return step(population, batch, batch_idx)

        Population.training_step = training_step  # type: ignore[method-assign]

    options = ("jobs=1", "grid.replicas_per_pass=2", f"hydra.run.dir={cut}")
    run_killed("surge_grid.py", *SCRIPT, *options, prepare=prepare, folder=tmp_path)
    before = read_outcomes(cut / "replicas.csv")
    assert 4 <= len(before) < 12
    run("surge_grid.py", *SCRIPT, folder=cut)
    after = read_outcomes(cut / "replicas.csv")
    assert str(after[: len(before)]) == str(before)
    same(after, read_outcomes(whole / "replicas.csv"))


@pytest.mark.parametrize("overrides, message", [
    ((), r"give grid\.batch_sizes, grid\.lrs, grid\.max_examples, grid\.targets"),
    ((*SCRIPT, "optimizer=sgd"), "a population trains with Adam"),
    pytest.param((*SCRIPT, "optimizer.weight_decay=0.1"), r"optimizer\.weight_decay=0\.1", marks=pytest.mark.slow),
    ((*SCRIPT, "grid.batch_sizes=[2000]"), "`batch_size=2000` must lie between 1 and the 1440"),
    pytest.param((*SCRIPT, "grid.lrs=[-1]"), "`lrs=.*above 0", marks=pytest.mark.slow),
    ((*SCRIPT, "data=fashion_mnist"), "FashionMNIST: .* not found"),
    pytest.param((*SCRIPT, "data.augment=true"), "trains without augmentation|Could not override", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_script_says_what_is_wrong(run: Run, overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    printed = run("surge_grid.py", *overrides, folder=tmp_path / "grid", fails=True).both
    assert re.search(message, printed, flags=re.S), printed


def test_the_script_refuses_the_folder_of_another_grid(run: Run, tmp_path: Path) -> None:
    small = (*SCRIPT, "grid.batch_sizes=[8]", "grid.lrs=[0.02]", "grid.seeds=1", "grid.targets=[2.25]")
    run("surge_grid.py", *small, folder=tmp_path)
    printed = run("surge_grid.py", *small, "optimizer.betas=[0.0,0.0]", folder=tmp_path, fails=True).both
    assert "holds another grid" in printed
    run("surge_grid.py", *small, "grid.seeds=2", folder=tmp_path)
    assert len(read_outcomes(tmp_path / "replicas.csv")) == 2


@pytest.mark.parametrize("preset", choices("surge"))
def test_presets_compose(preset: str) -> None:
    cfg = compose_config(f"surge={preset}", name="surge_grid")
    assert cfg.hydra.run.dir == f"runs/surge_{preset}"
    OmegaConf.resolve(cfg.grid)
    grid = instantiate(cfg.grid)
    assert isinstance(grid, Grid)
    assert not getattr(instantiate(cfg.data), "augment", False)
    assert list(grid.betas) == ([0.0, 0.0] if "sign" in preset or "resnet" in preset else [0.9, 0.999])
    if "small" not in preset:
        assert len(grid.rounds) >= 30 and len(grid.lrs) == 10
