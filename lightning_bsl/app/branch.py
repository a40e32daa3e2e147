"""`bsl-branch`: how large the batch may be at a checkpoint, as in `bsl-branch ckpt=RUN/checkpoints window=4096`.

It takes checkpoints of a run of `bsl-train`. The same command again goes on where it was interrupted. The method is that of
Merrill et al. 2025 (arXiv 2505.23971).
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import pickle
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import hydra
import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_bsl.app.commands import command
from lightning_bsl.app.compose import CONF, in_short, known_warnings, trainer_node
from lightning_bsl.callbacks import AdaptiveBatchLRScheduler, BatchLRScheduler
from lightning_bsl.callbacks.clock import RunClock
from lightning_bsl.callbacks.fit import VERSION
from lightning_bsl.callbacks.full_gradient import FullGradientMeasurer, training_loss, undisturbed
from lightning_bsl.callbacks.loop import ended_epoch, to_device
from lightning_bsl.callbacks.loss_terms import terms_or_examples
from lightning_bsl.data import BatchSizeDataModule
from lightning_bsl.report import console
from lightning_bsl.report.branches import branch_table, plot_critical_batches
from lightning_bsl.runs import find_runs
from lightning_bsl.runs.branches import (
    BRANCHES,
    CRITICAL,
    keep_settings,
    read_branches,
    write_branches,
    write_critical_batches,
)
from lightning_bsl.schedules import Horizon
from lightning_bsl.schedules.measured import measured_stages
from lightning_bsl.theory import CriticalBatch, critical_batch_by_branches
from lightning_bsl.theory.branches import check_factors, check_tolerance, growth_by_branches

# square root: recalled of arXiv 2505.23971 for Adam; linear for SGD (as in arXiv 1812.06162, far below the noise scale)
LR_POWERS = {"SGD": 1.0} | dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad"), 0.5)
RULES = {0.5: "sqrt_scaling", 1.0: "linear_scaling"}  # of conf/scheduler/lr
FEWEST_STEPS = 8  # of the largest batch in the window


@dataclass(frozen=True)
class Options:
    """What the branches of all checkpoints have in common.

    Args:
        factors: Of the batch size, in increasing order, 1 first.
        seeds: Of the order of the examples.
        window: Samples that a branch trains, before it is rounded up to whole steps of all factors.
        lr_power: Factor k trains with the rate x k^lr_power.
        points: Number of measurements after the first one.
        probe: Number of training examples on which the loss is measured; ``None`` for all.
    """

    factors: tuple[int, ...]
    seeds: tuple[int, ...]
    window: int
    lr_power: float
    points: int
    probe: int | None

    @classmethod
    def read(cls, cfg: DictConfig, run: DictConfig) -> Options:
        """Check the options.

        Args:
            cfg: The composed configuration.
            run: That of the run.

        Raises:
            ValueError: One is missing or out of range.
        """
        factors = check_factors(list(cfg.factors))
        check_tolerance(cfg.tolerance, cfg.smoothing)
        if cfg.window is None:
            raise ValueError("give `window=SAMPLES`: how many samples each branch trains on after the checkpoint")
        for name in ("window", "points", "probe"):
            value = cfg[name]
            if not (value is None and name == "probe") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}={value}` must be a whole number from 1 on")
        seeds = tuple(range(cfg.seeds)) if isinstance(cfg.seeds, int) else tuple(cfg.seeds)
        if len(set(seeds)) < max(2, len(seeds)) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
            raise ValueError(
                f"`seeds={cfg.seeds}` must be 2 or more, or a list of different whole numbers: one seed gives no interval"
            )
        return cls(tuple(factors), seeds, cfg.window, _lr_power(cfg.lr_power, run), cfg.points, cfg.probe)

    @property
    def least_common(self) -> int:
        """The least common multiple of the factors."""
        return math.lcm(*self.factors)

    def samples(self, batch_size: int) -> int:
        """The samples of the window, rounded up to whole steps of all factors."""
        unit = batch_size * self.least_common
        return -(-self.window // unit) * unit

    def marks(self, batch_size: int) -> list[int]:
        """Where branches measure their loss, in samples: after whole steps of all factors, evenly spread, the end included."""
        unit = batch_size * self.least_common
        steps = self.samples(batch_size) // unit
        return sorted({steps * (i + 1) // self.points * unit for i in range(self.points)} - {0})


@dataclass(frozen=True)
class Start:
    """Where branches start.

    Args:
        path: The checkpoint.
        name: Its path as seen from the run's folder.
        samples: Samples of the run before it.
        batch_size: Of the run's next step.
        lr: Of the run's next step, for the first param group.
    """

    path: Path
    name: str
    samples: int
    batch_size: int
    lr: float

    @classmethod
    def read(cls, path: Path, folder: Path, run: DictConfig) -> Start | None:
        """Read a checkpoint.

        Args:
            path: The checkpoint.
            folder: Of the run.
            run: The run's configuration.

        Returns:
            The start; ``None`` at the end of the run, which has no next step.

        Raises:
            ValueError: It cannot be branched.
        """
        checkpoint, scheduler = load(path), instantiate(run.scheduler)
        state = checkpoint["callbacks"].get(scheduler.state_key)
        if state is None or state.get("version") != VERSION:
            raise ValueError(
                f"{path} has no state of {type(scheduler).__name__}, or that of another version of lightning_bsl, so its batch "
                "size is not known: give a checkpoint of bsl-train of this version"
            )
        if scheduler.batch_size_unit != "examples":
            raise ValueError(
                f"the run's `batch_size_unit={scheduler.batch_size_unit!r}`, but the batch sizes of branches count examples"
            )
        if checkpoint["lr_schedulers"]:
            raise ValueError("the module has a learning-rate scheduler of its own, but the rate of a branch is constant")
        if isinstance(scheduler, AdaptiveBatchLRScheduler):
            scheduler.controller.load_state_dict(state)
            # the rates of the stages themselves: a rule may have used a noise scale that was measured
            scheduler.schedule = measured_stages(scheduler.segments, scheduler.controller.maximum)
        clock, horizon = RunClock(), Horizon(**state["horizon"])
        clock.begin(horizon, horizon)
        clock.load_state_dict(state, ended_epoch(checkpoint, run.trainer.get("max_steps", -1)))
        if clock.finished:
            return None
        batch_size, lr = scheduler.schedule(clock.progress)
        lr = float(checkpoint["optimizer_states"][0]["param_groups"][0]["lr"]) if lr is None else lr
        if not lr > 0:
            raise ValueError(
                f"{path}: the learning rate is {lr} there, and its multiples are the same: give another checkpoint"
            )
        return cls(path, str(path.relative_to(folder)), clock.progress.samples, batch_size, lr)


class BranchRecord(Callback):
    """Lets a fit start from the weights and the optimizer's state of a checkpoint, and measures its loss along the way.

    The loss is the mean over the same training examples in all branches, in evaluation mode. Unlike the loss of the training
    batches it has no noise of the examples, and it is that of the weights at one moment.

    Args:
        checkpoint: The checkpoint.
        scheduler: The scheduler of the fit.
        marks: Where to measure, in samples.
        probe: Number of examples; ``None`` for all.
        batch_size: Number of examples at once.
    """

    def __init__(
        self,
        checkpoint: dict[str, Any],
        scheduler: BatchLRScheduler,
        marks: Sequence[int],
        probe: int | None,
        batch_size: int,
    ) -> None:
        self.checkpoint, self.scheduler, self.marks = checkpoint, scheduler, frozenset(marks)
        self.measurer = FullGradientMeasurer(probe, batch_size)
        self.losses: dict[int, float] = {}  # by samples

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the checkpoint but for its clocks: the branch is a new run of a schedule of its own."""
        pl_module.on_load_checkpoint(self.checkpoint)
        # Lightning's average of the weights takes their place in a checkpoint, and moves them
        weights = self.checkpoint.get("current_model_state", self.checkpoint["state_dict"])
        trainer.strategy.load_model_state_dict({"state_dict": weights}, strict=pl_module.strict_loading)
        trainer.strategy.load_optimizer_state_dict(self.checkpoint)
        precision = trainer.precision_plugin  # a new loss scale would cost the larger batches more of their steps
        if state := self.checkpoint.get(type(precision).__qualname__):
            precision.load_state_dict(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the loss that all branches start from."""
        self.measurer.begin(trainer, pl_module)
        self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure at the marks."""
        samples = self.scheduler.progress.samples
        if samples in self.marks and samples not in self.losses:  # a step in several micro-batches comes here several times
            self._measure(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the loader's workers."""
        self.measurer.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the loader's workers: after an exception Lightning does not call ``teardown``."""
        self.measurer.end()

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        loader = self.measurer.loader
        assert loader is not None
        mean_loss = getattr(module, "full_loss", None) or partial(training_loss, module)
        total = number = 0.0
        with undisturbed(trainer, module), torch.no_grad():
            for batch, indices in zip(loader, cast("list[list[int]]", loader.batch_sampler)):
                batch = to_device(trainer, batch)
                terms = float(terms_or_examples(module, batch, len(indices)))
                if terms:  # without terms the loss may be NaN
                    total, number = total + terms * float(mean_loss(batch)), number + terms
        self.losses[self.scheduler.progress.samples] = total / number if number else math.nan


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint.

    Args:
        path: The file.

    Raises:
        ValueError: It is no checkpoint of a fit.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or not {"callbacks", "optimizer_states", "loops", "state_dict"} <= set(checkpoint):
        raise ValueError(f"{path} is no checkpoint with the state of the optimizer: train without save_weights_only")
    return checkpoint


def branch(cfg: DictConfig) -> list[CriticalBatch]:
    """Train the branches that are missing, and estimate the critical batch size at each checkpoint.

    Args:
        cfg: The composed configuration (``conf/branch.yaml``).

    Returns:
        The estimates, in the order of the run.

    Raises:
        ValueError: Bad configuration, a checkpoint that cannot be branched, or a folder with other branches.
    """
    paths = _checkpoints(cfg.ckpt)
    folder = paths[0].parents[1]
    run = _configuration(folder, cfg.run)
    options, out = Options.read(cfg, run), Path(cfg.output_dir or folder)
    starts = sorted(_starts(paths, folder, run), key=lambda start: start.samples)
    for one, other in itertools.pairwise(starts):
        if one.samples == other.samples:
            raise ValueError(f"{one.path} and {other.path} are both at {one.samples:,} samples: leave one out")
    datamodule = _data(run, options, starts)
    keep_settings(out, _settings(cfg, options))
    table = _train_missing(run, datamodule, starts, options, out)
    estimates = [_estimate(table, start, options, cfg) for start in starts]
    _report(folder, out, run, starts, estimates, options)
    return estimates


def main() -> None:
    """Train and estimate as the command line says."""
    sys.argv = [_quoted(argument) for argument in sys.argv]
    _main()


@hydra.main(version_base="1.3", config_path=CONF, config_name="branch")
@in_short
def _main(cfg: DictConfig) -> None:
    branch(cfg)


def _quoted(argument: str) -> str:
    """``ckpt=...`` with quotes around its paths: Lightning's names of checkpoints have a ``=``, which Hydra does not take."""
    name, _, value = argument.partition("=")
    if name != "ckpt" or set(value) & set("'\"\\") or "=" not in value:
        return argument
    paths = [f"'{path.strip()}'" for path in value.removeprefix("[").removesuffix("]").split(",")]
    return f"ckpt=[{','.join(paths)}]"


def _checkpoints(ckpt: Any) -> list[Path]:
    """The files of the checkpoints, all of one run."""
    if ckpt is None:
        raise ValueError("give `ckpt=RUN/checkpoints/NAME.ckpt`, a list of such files, or their folder")
    given = [Path(path) for path in (ckpt if isinstance(ckpt, ListConfig) else [ckpt])]
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted((path / "checkpoints" if (path / "checkpoints").is_dir() else path).glob("*.ckpt"))
            inside = [file for file in inside if not file.stem.startswith("last")] or inside  # the last has another name, too
            if not inside:
                raise ValueError(f"`ckpt={path}` is a folder without checkpoints (*.ckpt)")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise ValueError(f"`ckpt={path}`: there is no such file or folder")
    paths = [path.resolve() for path in paths]
    for path in paths:
        if not (path.parents[1] / ".hydra" / "config.yaml").is_file():
            raise ValueError(
                f"{path} is not of a run of bsl-train: there is no {path.parents[1] / '.hydra' / 'config.yaml'}, which says "
                "what is trained"
            )
    if len(folders := {path.parents[1] for path in paths}) > 1:
        raise ValueError(
            f"the checkpoints are of {len(folders)} runs ({', '.join(map(str, sorted(folders)))}): give those of one"
        )
    return paths


def _starts(paths: Sequence[Path], folder: Path, run: DictConfig) -> list[Start]:
    """The checkpoints, without one at the end of the run."""
    starts = [start for path in paths if (start := Start.read(path, folder, run)) is not None]
    if not starts:
        raise ValueError(
            f"{paths[-1]} was saved at the end of its run, which has no next step: give an earlier one (to keep several, train "
            "with +callbacks.model_checkpoint.every_n_train_steps=N +callbacks.model_checkpoint.save_top_k=-1)"
        )
    return starts


def _configuration(folder: Path, changes: DictConfig) -> DictConfig:
    """That of the run, with changes."""
    run = cast(DictConfig, OmegaConf.load(folder / ".hydra" / "config.yaml"))
    if missing := [name for name in ("data", "model", "scheduler", "trainer") if name not in run]:
        raise ValueError(f"{folder / '.hydra' / 'config.yaml'} has no `{missing[0]}`: it is not that of a run of bsl-train")
    run = cast(DictConfig, OmegaConf.merge(run, changes))
    run.output_dir = str(folder)
    for name in ("devices", "num_nodes"):
        if str(run.trainer.get(name, 1)) != "1":
            raise ValueError(
                f"the run has trainer.{name}={run.trainer[name]}, but branches train on one device: write "
                f"+run.trainer.{name}=1 +run.trainer.strategy=auto, and +run.scheduler.max_device_batch_size=N as memory allows"
            )
    return run


def _lr_power(power: float | None, run: DictConfig) -> float:
    """The exponent of the rule for the learning rate."""
    if power is not None:
        if not (math.isfinite(power) and power >= 0):
            raise ValueError(f"`lr_power={power}` must be 0 or more: 0.5 for the square-root rule, 1 for the linear one")
        return float(power)
    target = OmegaConf.select(run, "model.optimizer._target_") or OmegaConf.select(run, "optimizer._target_")
    known = LR_POWERS.get(str(target).rpartition(".")[2])
    if known is None:
        raise ValueError(
            f"the rule for the learning rate of {target} is not known: write lr_power=0.5 (square root, as for Adam) or "
            "lr_power=1 (linear, as for SGD)"
        )
    return known


def _data(run: DictConfig, options: Options, starts: Sequence[Start]) -> BatchSizeDataModule:
    """The data of the run, once it is clear that they allow all branches."""
    datamodule = instantiate(run.data)
    if not isinstance(datamodule, BatchSizeDataModule):
        raise ValueError(
            f"`data` is a {type(datamodule).__name__}: branches need a BatchSizeDataModule, which orders the examples"
        )
    datamodule.prepare_data()
    datamodule.setup("fit")
    number = datamodule.num_train_examples
    if not datamodule.shuffle:
        raise ValueError("`data.shuffle=false` gives every seed the same examples: write +run.data.shuffle=true")
    if options.probe is not None and options.probe > number:
        raise ValueError(f"`probe={options.probe}` is more than the {number} training examples: write probe=null for all")
    for start in starts:
        largest = start.batch_size * options.factors[-1]
        unit = start.batch_size * options.least_common
        if unit > number:
            raise ValueError(
                f"`factors={list(options.factors)}` of the batch size {start.batch_size} at {start.name} need epochs of {unit} "
                f"examples or a multiple, but there are {number}: leave out the largest"
            )
        if options.samples(start.batch_size) < FEWEST_STEPS * largest:
            raise ValueError(
                f"`window={options.window}` is {options.window / largest:.3g} steps of the largest batch, {largest} at "
                f"{start.name}, which cannot come back so soon: write window={FEWEST_STEPS * largest} or more"
            )
    return datamodule


def _settings(cfg: DictConfig, options: Options) -> str:
    """What the losses depend on, but for what stands beside them, as YAML."""
    changes = cast("dict[str, Any]", OmegaConf.to_container(cfg.run))
    for node, names in {
        "data": ("root", "download", "num_workers", "cache_dir"),
        "trainer": ("accelerator", "devices", "num_nodes", "strategy"),
    }.items():
        for name in names:
            changes.get(node, {}).pop(name, None)
    kept = {name: getattr(options, name) for name in ("window", "lr_power", "points", "probe", "least_common")}
    return OmegaConf.to_yaml(OmegaConf.create(kept | {"run": {node: values for node, values in changes.items() if values}}))


def _train_missing(
    run: DictConfig, datamodule: BatchSizeDataModule, starts: Sequence[Start], options: Options, out: Path
) -> Any:
    """Train what the table does not have yet; a branch enters the table when it is finished."""
    table = read_branches(out)
    for start in starts:
        before = table[table["checkpoint"] == start.name]
        if len(before) and (before[["start", "batch_size", "lr"]] != (start.samples, start.batch_size, start.lr)).any(
            axis=None
        ):
            raise ValueError(
                f"{out / BRANCHES} has branches of another checkpoint {start.name}; choose another output_dir=DIR, or delete it"
            )
    done = set(table[["checkpoint", "factor", "seed"]].itertuples(index=False, name=None))
    branches = [(start, seed, factor) for start in starts for seed in options.seeds for factor in options.factors]
    missing = [(start, seed, factor) for start, seed, factor in branches if (start.name, factor, seed) not in done]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # a branch has nothing to say
    columns = TextColumn("branches"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task("branches", total=len(branches), completed=len(branches) - len(missing))
        for start, seed, factor in missing:
            losses = _train(run, datamodule, start, options, seed, factor)
            key = {"checkpoint": start.name, "start": start.samples, "batch_size": start.batch_size, "lr": start.lr}
            key |= {"factor": factor, "seed": seed}
            rows = pd.DataFrame([key | {"samples": samples, "loss": loss} for samples, loss in losses.items()])
            table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
            write_branches(out, table)
            gc.collect()  # a Trainer is a cycle: models of several branches would wait in memory
            bar.update(task, advance=1)
    return table


def _train(
    run: DictConfig,
    datamodule: BatchSizeDataModule,
    start: Start,
    options: Options,
    seed: int,
    factor: int,
) -> dict[int, float]:
    """Train one branch; returns its losses by samples.

    Its batch size and learning rate are constant, since the question is about the batch at the checkpoint: with the run's decay
    the answer would mix several rates. The optimizer's other constants are those of the checkpoint; those that follow the batch
    size in the run follow it here, too. (Both are our choice.)
    """
    batch_size = start.batch_size * factor
    mixed = np.random.SeedSequence((run.get("seed") or 0, start.samples, seed)).generate_state(1)
    seed_everything(int(mixed[0]), workers=True, verbose=False)
    datamodule.seed = int(mixed[0])
    # whole steps of all factors: a short last step would be another one for each of them
    unit = start.batch_size * options.least_common
    datamodule.samples_per_epoch = datamodule.num_train_examples // unit * unit
    model = instantiate(run.model)
    scheduler = BatchLRScheduler(
        batch_size,
        start.lr * factor**options.lr_power,
        max_device_batch_size=run.scheduler.get("max_device_batch_size"),
        follow=instantiate(run.scheduler).follow,
    )
    checkpoint = load(start.path)  # for each branch anew: the optimizer goes on with the tensors that it is given
    record = BranchRecord(checkpoint, scheduler, options.marks(start.batch_size), options.probe, datamodule.eval_batch_size)
    with known_warnings():
        trainer: Trainer = instantiate(
            trainer_node(run),
            callbacks=[scheduler, record],
            max_epochs=-1,
            max_steps=options.samples(start.batch_size) // batch_size,
            **dict.fromkeys(("min_epochs", "min_steps", "max_time", "limit_train_batches", "val_check_interval")),
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
            **dict.fromkeys(("limit_val_batches", "num_sanity_val_steps", "overfit_batches", "fast_dev_run"), 0),
        )
        trainer.fit(model, datamodule)
    return record.losses


def _estimate(table: Any, start: Start, options: Options, cfg: DictConfig) -> CriticalBatch:
    own = table[(table["checkpoint"] == start.name) & (table["samples"] > 0)]
    curves = own.pivot(index=["factor", "seed"], columns="samples", values="loss")
    losses = {factor: curves.loc[[(factor, seed) for seed in options.seeds]].to_numpy() for factor in options.factors}
    try:
        return critical_batch_by_branches(start.batch_size, list(curves.columns), losses, cfg.tolerance, cfg.smoothing)
    except ValueError as error:
        raise ValueError(f"{start.name}: {error}") from error


def _report(
    folder: Path,
    out: Path,
    run: DictConfig,
    starts: Sequence[Start],
    estimates: Sequence[CriticalBatch],
    options: Options,
) -> None:
    """Print and write what the branches say."""
    rows = [
        {
            "checkpoint": start.name,
            "samples": start.samples,
            "batch_size": start.batch_size,
            "lr": start.lr,
            "critical": estimate.value,
            **{name: getattr(estimate, name) for name in ("low", "high", "at_least", "passed", "safe")},
        }
        for start, estimate in zip(starts, estimates)
    ]
    table = pd.DataFrame(rows)
    write_critical_batches(out, table)
    terminal, files = console(), [BRANCHES, CRITICAL]
    terminal.print(branch_table([(start.samples, estimate) for start, estimate in zip(starts, estimates)]))
    try:
        (found,) = find_runs([folder], progress=False).runs
        plot_critical_batches([("", found, table)], out / "branches.png")
        files.append("branches.png")
    except (ModuleNotFoundError, OSError, ValueError) as error:  # no matplotlib, or no metrics
        terminal.print(f"no branches.png: {error}", markup=False, soft_wrap=True)
    terminal.print(f"{out}: {', '.join(files)}", soft_wrap=True)
    for line in _schedule(folder, run, starts, estimates, options):
        terminal.print(line, markup=False, highlight=False, soft_wrap=True)


def _schedule(
    folder: Path, run: DictConfig, starts: Sequence[Start], estimates: Sequence[CriticalBatch], options: Options
) -> list[str]:
    """The schedule to use: Python, and a command."""
    values, at = [starts[0].batch_size], list[int]()
    for start, size in zip(starts, growth_by_branches([estimate.safe for estimate in estimates])):
        if size > values[-1]:
            values.append(size)
            at.append(start.samples)
    if not at:
        return [f"no growth: beyond doubt no larger batch than {values[0]} is within the tolerance at all later checkpoints"]
    lines = [
        "the largest batches tested that are within the tolerance beyond doubt, then and later:",
        f'Milestones({values}, at={at}, unit="samples")',
    ]
    overrides = ["scheduler=increasing", "scheduler/batch_size=milestones", f"scheduler.batch_size.values={_list(values)}"]
    overrides += [f"scheduler.batch_size.at={_list(at)}", "scheduler.batch_size.unit=samples"]
    rule, rates = RULES.get(options.lr_power), {start.lr for start in starts}
    if rule and len(rates) == 1 and len({start.batch_size for start in starts}) == 1:
        overrides += [f"scheduler/lr={rule}", f"scheduler.lr.base_lr={starts[0].lr:g}"]
        overrides += [f"scheduler.lr.base_batch_size={values[0]}"]
    else:
        lines.append(f"with the run's learning rate x (batch size / {values[0]})^{options.lr_power:g}")
    follow, choices = instantiate(run.scheduler).follow, folder / ".hydra" / "hydra.yaml"
    chosen = OmegaConf.select(OmegaConf.load(choices), "hydra.runtime.choices") if choices.is_file() else None
    if follow:
        overrides.append(f"scheduler/follow={(chosen or {}).get('scheduler/follow', 'none')}")
        for name, rule in follow.items():  # the batch size of the run, not the first one of this schedule
            if hasattr(rule, "base_batch_size"):
                overrides.append(f"++scheduler.follow.{name}.base_batch_size={rule.base_batch_size:g}")
    if (cap := run.scheduler.get("max_device_batch_size")) is not None:
        overrides.append(f"scheduler.max_device_batch_size={cap}")
    path = folder / ".hydra" / "overrides.yaml"
    before = [str(override) for override in (OmegaConf.load(path) if path.is_file() else [])]
    kept = [override for override in before if not override.lstrip("+~").startswith(("scheduler", "ckpt_path"))]
    return [*lines, f"{command('bsl-train')} {shlex.join([*kept, *overrides])}"]


def _list(values: Sequence[int]) -> str:
    return f"[{','.join(map(str, values))}]"
