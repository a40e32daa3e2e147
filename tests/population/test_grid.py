"""Grids in passes: interrupted, extended, short of memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
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
from lightning_bsl.population.grid import fitting

pytestmark = pytest.mark.xdist_group("grid")  # which is trained once
GRID: dict[str, Any] = {
    "batch_sizes": [8, 16], "lrs": [0.01, 0.02, 1e200], "seeds": 2, "targets": [2.2, 2.05], "max_examples": 900,
    "extra_steps": 3, "probe": 40,
}  # fmt: skip


def make(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(cnn5(image_size=8, width=4), 10)


def trained(path: Path, progress: Any = lambda done, of: None, **changes: Any) -> list[Outcome]:
    grid = Grid(**GRID | changes)
    return run_grid(grid, make, Digits(), path, lambda: Trainer(**quiet(max_epochs=-1, precision="64-true")), progress)


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


def test_larger_models_and_batches_train_fewer_at_once() -> None:
    data = Digits()
    data.setup("fit")

    def number(width: int, batch_size: int) -> int:
        return fitting(Classifier(cnn5(image_size=8, width=width), 10), data, batch_size, torch.device("cpu"))

    assert number(4, 1) > number(4, 64) > number(4, 1024) >= 8
    assert number(4, 1) > number(64, 1) > 8
    assert number(1024, 1) < 8  # 1 GB with gradients and moments


@pytest.mark.parametrize("changes, message", [
    ({"batch_sizes": []}, "`batch_sizes=.*at least one value"),
    ({"lrs": [0.1, 0.1]}, "`lrs=.*none twice"),
    ({"lrs": [0.1, -0.1]}, "`lrs=.*above 0"),
    ({"targets": [0.0]}, "`targets=.*above 0"),
    ({"seeds": 0}, "`seeds="),
    ({"max_examples": 10}, "`max_examples=10` does not make one batch of 16"),
    ({"extra_steps": 0}, "`extra_steps=0`"),
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

    options = ("grid.replicas_per_pass=2", f"hydra.run.dir={cut}")
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
