"""Branches of a checkpoint, run as a user runs them."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from harness.commands import Run, kill, run_killed, run_script
from harness.configs import compose_config
from lightning_bsl.app import branch as app
from lightning_bsl.models import NoisyQuadratic
from lightning_bsl.schedules import Milestones, SurgeScaling
from lightning_bsl.theory import CriticalBatch, Estimate

EXAMPLES = 128
QUIET = ("trainer.enable_progress_bar=false", "~callbacks.training_time", "trainer.log_every_n_steps=4",
         "+callbacks.model_checkpoint.save_top_k=-1")  # fmt: skip
# 32 steps of 4, 16 of 8, 8 of 16 and 8 of 16: a checkpoint inside the first epoch, at the ends of the next two, and at the end
RUN = ("data=quadratic", f"data.num_examples={EXAMPLES}", "optimizer=adam", "optimizer.lr=0.02", "trainer.max_epochs=4",
       "scheduler=increasing_decaying", "scheduler.batch_size.start=4", "scheduler.batch_size.every=1",
       "scheduler.batch_size.maximum=16", "+callbacks.model_checkpoint.every_n_train_steps=16")  # fmt: skip
FEW = ("factors=[1,2]", "seeds=2", "window=64", "points=2", "probe=null")


def train(folder: Path, *overrides: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_bsl.app.train.plot_run", lambda *_: None)
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # a fixture of the module is not undone after each test
            patch.setenv(name, "0")
        assert run_script("train.py", *overrides, *QUIET, f"hydra.run.dir={folder}", monkeypatch=patch) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints."""
    return train(tmp_path_factory.mktemp("trained") / "run", *RUN)


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, for a test of its own; figures are not drawn."""
    monkeypatch.setattr(app, "plot_critical_batches", lambda *_: None)
    return Path(shutil.copytree(trained, tmp_path / "run"))


def checkpoint(folder: Path, step: int) -> Path:
    (path,) = folder.glob(f"checkpoints/*-step={step}.ckpt")
    return path


def configuration(folder: Path) -> Any:
    return app._configuration(folder, OmegaConf.create())


class Journal:
    """Notes the batches of each fit of a noisy quadratic, and its weights at the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[torch.Tensor]] = []
        self.ends: list[torch.Tensor] = []
        step = NoisyQuadratic.training_step

        def note(module: NoisyQuadratic, batch: Any, batch_idx: int) -> torch.Tensor:
            if module.training:
                self.batches[-1].append(batch[0].clone())
            return step(module, batch, batch_idx)

        monkeypatch.setattr(NoisyQuadratic, "training_step", note)
        begin: Callable[[Any], None] = lambda module: self.batches.append([])  # noqa: E731
        end: Callable[[Any], None] = lambda module: self.ends.append(module.theta.detach().clone())  # noqa: E731
        monkeypatch.setattr(NoisyQuadratic, "on_train_start", begin, raising=False)
        monkeypatch.setattr(NoisyQuadratic, "on_train_end", end, raising=False)


def test_a_branch_is_a_plain_loop_from_the_checkpoint(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, path = Journal(monkeypatch), checkpoint(folder, 16)
    run("branch.py", f"ckpt={path}", *FEW[:2], "window=160", "points=4", "probe=null", folder=folder)
    table = pd.read_csv(folder / "branches.csv")
    assert list(table["factor"].unique()) == [1, 2]
    assert [len(batches) for batches in journal.batches] == [40, 20, 40, 20]  # seed by seed, factor by factor
    one, two, other, _ = (torch.cat(batches) for batches in journal.batches)
    assert torch.equal(one, two) and not torch.equal(one, other)  # a seed is an order of the examples
    assert len({tuple(row) for row in one[:EXAMPLES].tolist()}) == EXAMPLES  # an epoch has each of them once

    for i, factor in enumerate((1, 2, 1, 2)):
        saved = torch.load(path, weights_only=True)  # anew: the optimizer goes on with the tensors that it is given
        values = saved["state_dict"]["eigenvalues"]
        theta = torch.nn.Parameter(saved["state_dict"]["theta"].clone())
        optimizer = torch.optim.Adam([theta])
        optimizer.load_state_dict(saved["optimizer_states"][0])
        optimizer.param_groups[0]["lr"] = 0.02 * factor**0.5
        losses = [float((values * theta.detach() ** 2).sum() / 2)]
        for step, noise in enumerate(journal.batches[i], start=1):
            optimizer.zero_grad()
            ((values * theta.square()).sum() / 2 - noise.mean(0) @ theta).backward()
            optimizer.step()
            if 4 * factor * step in (40, 80, 120, 160):
                losses.append(float((values * theta.detach() ** 2).sum() / 2))
        assert torch.equal(journal.ends[i], theta.detach())
        own = table[(table["factor"] == factor) & (table["seed"] == i // 2)]
        assert own["samples"].tolist() == [0, 40, 80, 120, 160]
        assert own["loss"].tolist() == pytest.approx(losses, abs=1e-6)  # the noise of all examples has a mean of about 0


def test_the_batch_and_the_rate_are_those_of_the_next_step(trained: Path) -> None:
    cfg = configuration(trained)
    starts = [app.Start.read(checkpoint(trained, step), trained, cfg) for step in (16, 32, 48, 64)]
    assert starts[3] is None  # the end of the run has no next step
    rates = [0.02, 0.02 * (1 + 0.5**0.5) / 2, 0.02 / 2]  # a cosine over four epochs
    expected = [(64, 4), (128, 8), (256, 16)]
    assert [(start.samples, start.batch_size) for start in starts[:3] if start] == expected
    assert [start.lr for start in starts[:3] if start] == pytest.approx(rates)


def test_goes_on_where_it_was_interrupted(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("branch.py", f"ckpt={checkpoint(folder, 16)}", *FEW)
    printed = run(*command, folder=folder).out
    whole, estimates = (folder / "branches.csv").read_bytes(), (folder / "critical_batches.csv").read_bytes()
    assert "branches.csv, critical_batches.csv" in printed
    assert len(whole.splitlines()) == 1 + 2 * 2 * 3
    before = {path: path.stat().st_mtime_ns for path in (folder / ".hydra").iterdir()}

    lines, trained, train = whole.splitlines(keepends=True), list[Any](), app._train
    (folder / "branches.csv").write_bytes(b"".join(lines[:-3]))  # as if the last branch had not been
    monkeypatch.setattr(app, "_train", lambda *arguments: trained.append(arguments[-2:]) or train(*arguments))
    run(*command, folder=folder)
    assert trained == [(1, 2)]
    assert (folder / "branches.csv").read_bytes() == whole
    assert (folder / "critical_batches.csv").read_bytes() == estimates
    run(*command, "seeds=3", "tolerance=0.1", folder=folder)  # more of the same
    assert trained[1:] == [(2, 1), (2, 2)]
    assert (folder / "branches.csv").read_bytes().startswith(whole)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / ".hydra").iterdir()}  # the run's own
    assert not (folder / "branch.log").exists()

    cfg = compose_config(*FEW, name="branch")
    cfg.ckpt = str(checkpoint(folder, 16))
    table = pd.read_csv(folder / "branches.csv")
    for change, message in (
        (lambda: cfg.update(points=4), "other settings (points: 2, points: 4)"),
        (lambda: table.assign(lr=table["lr"] * 2).to_csv(folder / "branches.csv", index=False), "of another checkpoint"),
        (lambda: (folder / "branches.csv").write_text("checkpoint\n"), "is no table of branches"),
    ):
        change()
        with pytest.raises(ValueError, match=re.escape(message)):
            app.branch(cfg)
        cfg.points = 2


@pytest.mark.slow
def test_a_branch_that_was_killed_is_repeated(folder: Path, run: Run, tmp_path: Path) -> None:
    command = ("branch.py", f"ckpt={checkpoint(folder, 16)}", *FEW)
    run(*command, folder=folder)
    whole = (folder / "branches.csv").read_bytes()
    (folder / "branches.csv").unlink()

    def prepare() -> None:
        steps, step = iter(range(20)), NoisyQuadratic.training_step

        def stop(module: NoisyQuadratic, batch: Any, batch_idx: int) -> torch.Tensor:
            if module.training and next(steps, None) is None:
                kill()
            return step(module, batch, batch_idx)

        NoisyQuadratic.training_step = stop  # type: ignore[method-assign]

    run_killed(*command, prepare=prepare, folder=tmp_path)
    assert len((folder / "branches.csv").read_bytes().splitlines()) == 1 + 3  # the first branch, of 16 steps
    run(*command, folder=folder)
    assert (folder / "branches.csv").read_bytes() == whole


@pytest.fixture(scope="module")
def spoiled(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with checkpoints that are none."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("spoiled") / "run"))
    saved = torch.load(checkpoint(folder, 16), weights_only=True)
    (folder / "checkpoints" / "broken.ckpt").write_bytes(checkpoint(folder, 16).read_bytes()[:1000])
    torch.save({"state_dict": saved["state_dict"]}, folder / "checkpoints" / "weights.ckpt")
    torch.save(saved | {"callbacks": {}}, folder / "checkpoints" / "strange.ckpt")
    return folder


@pytest.mark.parametrize("changes, message", [
    ({"ckpt": None}, "give `ckpt=RUN/checkpoints/NAME.ckpt`"),
    ({"ckpt": "nowhere.ckpt"}, "nowhere.ckpt`: there is no such file or folder"),
    ({"ckpt": ".hydra"}, "is a folder without checkpoints"),
    ({"ckpt": "metrics.csv"}, "is not of a run of bsl-train"),
    ({"ckpt": "checkpoints/broken.ckpt"}, "cannot be read as a checkpoint"),
    ({"ckpt": "checkpoints/weights.ckpt"}, "is no checkpoint with the state of the optimizer"),
    ({"ckpt": "checkpoints/strange.ckpt"}, "has no state of BatchLRScheduler"),
    ({"ckpt": "checkpoints/last.ckpt"}, "was saved at the end of its run"),
    ({"ckpt": ["FIRST", "FIRST"]}, "are both at 64 samples"),
    ({"window": None}, "give `window=SAMPLES`"),
    ({"window": 8}, r"`window=8` is 1 steps of the largest batch, 8 at"),
    ({"factors": [2, 4]}, "must have 1, with which the others are compared"),
    ({"factors": [1, 64], "window": 4096}, "need epochs of 256 examples or a multiple, but there are 128"),
    ({"seeds": 1}, "one seed gives no interval"),
    ({"seeds": [3, 3]}, "one seed gives no interval"),
    ({"tolerance": -1}, "`tolerance=-1` must be above 0"),
    ({"points": 0}, "`points=0` must be a whole number from 1 on"),
    ({"probe": 129}, "`probe=129` is more than the 128 training examples"),
    ({"lr_power": -1}, "`lr_power=-1` must be 0 or more"),
    ({"run": {"optimizer": {"_target_": "torch.optim.LBFGS"}}}, "the rule for the learning rate of torch.optim.LBFGS"),
    ({"run": {"trainer": {"devices": 2}}}, "branches train on one device"),
    ({"run": {"data": {"shuffle": False}}}, "`data.shuffle=false` gives every seed the same examples"),
    ({"run": {"scheduler": {"batch_size_unit": "tokens"}}}, "the batch sizes of branches count examples"),
])  # fmt: skip
def test_refuses_before_it_trains(
    changes: dict[str, Any], message: str, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(app, "_train")
    first = str(checkpoint(spoiled, 16))
    cfg = compose_config(*FEW, name="branch")
    for name, value in ({"ckpt": "FIRST"} | changes).items():
        if name == "ckpt" and value is not None:
            places = [
                first if place == "FIRST" else str(spoiled / place) for place in ([value] if isinstance(value, str) else value)
            ]
            value = places if isinstance(value, list) else places[0]
        OmegaConf.update(cfg, name, value, force_add=True)
    with pytest.raises(ValueError, match=message):
        app.branch(cfg)
    assert not (spoiled / "branches.csv").exists()


def test_takes_the_folder_of_a_run_and_names_as_lightning_gives_them(trained: Path) -> None:
    def found(argument: str) -> list[str]:
        value = OverridesParser.create().parse_override(app._quoted(argument)).value()
        (ckpt,) = OmegaConf.create([value])
        return sorted(path.name.partition("step=")[2] for path in app._checkpoints(ckpt))

    of_run = ["16.ckpt", "32.ckpt", "48.ckpt", "64.ckpt"]  # last.ckpt is one of them under another name
    assert found(f"ckpt={trained}") == found(f"ckpt={trained / 'checkpoints'}") == of_run
    first, second = checkpoint(trained, 16), checkpoint(trained, 32)
    assert "=" in first.name
    assert found(f"ckpt={first}") == found(f"ckpt='{first}'") == ["16.ckpt"]
    assert found(f"ckpt=[{first}, {second}]") == found(f"ckpt={first},{second}") == ["16.ckpt", "32.ckpt"]
    assert app._quoted("window=8") == "window=8"


def estimate(base: int, safe: int) -> CriticalBatch:
    return CriticalBatch(base, float(safe), safe, safe, safe, safe, False, {1: Estimate(0, 0, 0, 0)})


def test_the_schedule_that_is_printed_can_be_trained(trained: Path) -> None:
    cfg = configuration(trained)
    options = app.Options((1, 2, 4), (0, 1), 64, 0.5, 2, None)
    starts = [app.Start(trained, f"{samples}", samples, 4, 0.02) for samples in (64, 128, 192, 256)]
    lines = app._schedule(trained, cfg, starts, [estimate(4, safe) for safe in (4, 16, 8, 16)], options)
    assert lines[1] == 'Milestones([4, 8, 16], at=[128, 256], unit="samples")'
    cut = shlex.split(lines[-1])
    composed = compose_config(*cut[next(i for i, word in enumerate(cut) if "=" in word) :])
    schedule = instantiate(composed.scheduler).schedule
    assert schedule.batch_size == Milestones([4, 8, 16], at=[128, 256], unit="samples")
    assert schedule.lr(16) == pytest.approx(0.04)
    assert composed.data.num_examples == EXAMPLES and composed.optimizer._target_ == "torch.optim.Adam"  # as the run had it

    falling = [app.Start(trained, "", start.samples, 4, 0.02 / (1 + i)) for i, start in enumerate(starts)]
    lines = app._schedule(trained, cfg, falling, [estimate(4, 8)] * 4, options)
    assert "with the run's learning rate x (batch size / 4)^0.5" in lines and "scheduler/lr" not in lines[-1]
    assert app._schedule(trained, cfg, starts, [estimate(4, 4)] * 4, options)[0].startswith("no growth")


@pytest.mark.parametrize("window, factors, points, marks", [
    (100, (1, 2, 4), 4, [32, 64, 80, 112]),  # 7 steps of 16
    (64, (1, 2), 16, [8, 16, 24, 32, 40, 48, 56, 64]),  # fewer steps than points
    (100, (1, 2, 3), 1, [120]),
])  # fmt: skip
def test_all_factors_come_to_the_marks_with_whole_steps(
    window: int, factors: tuple[int, ...], points: int, marks: list[int]
) -> None:
    options = app.Options(factors, (0, 1), window, 0.5, points, None)
    found = options.marks(4)
    assert all(mark % (4 * factor) == 0 for mark in found for factor in factors)
    assert found[-1] == options.samples(4) >= window and len(found) <= points
    assert len(found) == len(marks)


@pytest.mark.slow
def test_an_adaptive_run_has_the_batch_of_its_stage(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "plot_critical_batches", lambda *_: None)
    folder = tmp_path / "run"
    printed = run("train.py", *RUN[:4], "trainer.max_epochs=4", "scheduler=adaptive", "scheduler.batch_size=4",
                   "scheduler.trigger.start=100", "scheduler.check_every=8", "scheduler.maximum=16", "scheduler.lr=0.02",
                   "+callbacks.model_checkpoint.every_n_train_steps=12", *QUIET, folder=folder).out  # fmt: skip
    assert 'in samples, for Megatron-LM: --step-batch-size-schedule "0:4 32:8 96:16"' in printed
    start = app.Start.read(checkpoint(folder, 12), folder, configuration(folder))
    assert start is not None
    assert (start.samples, start.batch_size, round(start.lr, 6)) == (8 * 4 + 4 * 8, 8, 0.028)  # gamma = 1.4
    run("branch.py", f"ckpt={checkpoint(folder, 12)}", "factors=[1,2]", "window=128", "seeds=2", "probe=null", folder=folder)
    assert pd.read_csv(folder / "branches.csv")["batch_size"].unique().tolist() == [8]


def test_the_rate_of_a_measured_noise_scale_is_that_of_its_stage(trained: Path, tmp_path: Path) -> None:
    """A surge law of an adaptive run may have used another noise scale than the configured one."""
    cfg = configuration(trained)
    cfg.scheduler = compose_config("scheduler=noise_adaptive", "scheduler.batch_size=4").scheduler
    saved = app.load(checkpoint(trained, 16))
    scheduler = instantiate(cfg.scheduler)
    assert isinstance(scheduler.controller.lr, SurgeScaling)
    scheduler.controller.begin(measures=True)
    scheduler.controller.extend(scheduler.controller.proposal(measured=40.0, target=8), start=32)
    (clock,) = (state for key, state in saved["callbacks"].items() if key.startswith("BatchLRScheduler"))
    saved["callbacks"][scheduler.state_key] = clock | scheduler.controller.state_dict()
    torch.save(saved, tmp_path / "adaptive.ckpt")
    start = app.Start.read(tmp_path / "adaptive.ckpt", tmp_path, cfg)
    assert start is not None
    assert (start.samples, start.batch_size) == (64, 8)
    peak = scheduler.controller.lr.peak_lr
    assert (
        start.lr == pytest.approx(SurgeScaling(peak, 40)(8)) != SurgeScaling(peak, scheduler.controller.lr.noise_batch_size)(8)
    )


def test_constants_that_follow_and_an_average_of_the_weights(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "plot_critical_batches", lambda *_: None)
    folder = train(tmp_path / "run", *RUN, "optimizer=adamw", "scheduler/follow=adamw", "callbacks=batch_ema")
    path, seen = checkpoint(folder, 32), []  # 16 steps of 8 are taken, the next has 8

    def note(record: Any, trainer: Any, pl_module: Any) -> None:
        (group,) = trainer.optimizers[0].param_groups
        if not record.losses:
            seen.append((pl_module.theta.detach().clone(), group["betas"], group["weight_decay"]))
        measure(record, trainer, pl_module)

    measure = app.BranchRecord._measure
    monkeypatch.setattr(app.BranchRecord, "_measure", note)
    printed = run("branch.py", f"ckpt={path}", *FEW[:2], "window=128", *FEW[3:], folder=folder).out
    saved = torch.load(path, weights_only=True)
    assert not torch.equal(saved["state_dict"]["theta"], saved["current_model_state"]["theta"])
    (group,) = saved["optimizer_states"][0]["param_groups"]
    for i, factor in enumerate((1, 2, 1, 2)):
        weights, betas, decay = seen[i]
        assert torch.equal(weights, saved["current_model_state"]["theta"])
        growth = 8 * factor / 4
        assert betas == pytest.approx((0.9**growth, 0.999**growth))
        assert decay == pytest.approx(group["initial_weight_decay"] * growth**0.5)
    assert "initial_weight_decay" in group and "branches.csv" in printed


def test_the_command_keeps_what_follows_the_batch(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = ["optimizer=adamw", "scheduler/follow=adamw", "scheduler.max_device_batch_size=4", "data=quadratic"]
    (folder / ".hydra").mkdir(parents=True)
    cfg = compose_config(*overrides)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    OmegaConf.save(
        OmegaConf.create({"hydra": {"runtime": {"choices": {"scheduler/follow": "adamw"}}}}), folder / ".hydra" / "hydra.yaml"
    )
    options = app.Options((1, 2), (0, 1), 64, 0.5, 2, None)
    starts = [app.Start(folder, f"{samples}", samples, 32, 0.02) for samples in (64, 128)]
    cut = shlex.split(app._schedule(folder, cfg, starts, [estimate(32, safe) for safe in (32, 64)], options)[-1])
    scheduler = instantiate(compose_config(*cut[next(i for i, word in enumerate(cut) if "=" in word) :]).scheduler)
    assert [rule.base_batch_size for rule in scheduler.follow.values()] == [8, 8]  # of the run, not 32
    assert scheduler.max_device_batch_size == 4


@pytest.mark.slow
def test_a_step_in_micro_batches_is_the_same_step(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "plot_critical_batches", lambda *_: None)
    folder = train(tmp_path / "run", "data=digits", "data.samples_per_epoch=256", "trainer.max_epochs=2",
                   "+model.net.width=4", "scheduler=constant", "scheduler.batch_size.start=8",
                   "+callbacks.model_checkpoint.every_n_train_steps=20")  # fmt: skip
    command = ("branch.py", f"ckpt={checkpoint(folder, 20)}", "factors=[1,4]", "window=256", "seeds=2", "probe=100")
    tables = []
    for split in ((), ("+run.scheduler.max_device_batch_size=4",)):
        out = tmp_path / str(len(split))
        run(*command, *split, f"output_dir={out}", folder=folder)
        tables.append(pd.read_csv(out / "branches.csv"))
    assert tables[0].drop(columns="loss").equals(tables[1].drop(columns="loss"))
    assert tables[1]["loss"].tolist() == pytest.approx(tables[0]["loss"].tolist(), rel=1e-5)
    assert not (folder / "branches.csv").exists()
    first = tables[0][tables[0]["samples"] == 0]["loss"]
    assert first.nunique() == 1  # all branches start alike


@pytest.mark.slow
def test_the_noisy_quadratic_has_its_closed_form(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "plot_critical_batches", lambda *_: None)
    rate, base, variance, dimension = 0.2, 4, 1.0, 10
    folder = train(tmp_path / "run", "data=quadratic", "data.num_examples=16384", "data.samples_per_epoch=2048",
                   f"optimizer.lr={rate}", "scheduler=constant", f"scheduler.batch_size.start={base}", "trainer.max_epochs=2",
                   "+callbacks.model_checkpoint.every_n_train_steps=512")  # fmt: skip
    path, factors = checkpoint(folder, 512), (1, 2, 4, 8)
    window = 256

    def expected(k: int, theta: Any, h: Any) -> float:
        shrink, added = (1 - k * rate * h) ** 2, (k * rate) ** 2 * variance / dimension / (k * base)
        left = shrink ** (window // (k * base))
        return float((h * (theta**2 * left + added * (1 - left) / (1 - shrink))).sum() / 2)

    saved = torch.load(path, weights_only=True)["state_dict"]
    theta, h = saved["theta"].double(), saved["eigenvalues"].double()
    differences = [expected(k, theta, h) - expected(1, theta, h) for k in factors]
    tolerance = (differences[2] + differences[3]) / 2
    truth = base * 4 * 2 ** ((tolerance - differences[2]) / (differences[3] - differences[2]))
    overrides = (f"window={window}", "seeds=24", "smoothing=0", "points=1", "probe=null", f"tolerance={tolerance}")
    run("branch.py", f"ckpt={path}", *overrides, folder=folder)
    (row,) = pd.read_csv(folder / "critical_batches.csv").to_dict("records")
    table = pd.read_csv(folder / "branches.csv")
    ends = table[table["samples"] == window].pivot(index="seed", columns="factor", values="loss")
    for factor, difference in zip(factors, differences):
        measured = ends[factor] - ends[1]
        assert abs(measured.mean() - difference) <= 4 * measured.std() / 24**0.5
    assert row["low"] / 1.1 <= truth <= 1.1 * row["high"]
