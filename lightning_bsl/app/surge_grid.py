"""`bsl-surge-grid`: train a grid of batch sizes x rates x seeds, many runs at once.

Example: `bsl-surge-grid surge=cnn5_small data.root=DIR`.

The same command again goes on where it was interrupted. `bsl-surge-report` reads what it writes.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lightning_bsl.app.commands import command
from lightning_bsl.app.compose import CONF, in_short
from lightning_bsl.population import run_grid
from lightning_bsl.report import console
from lightning_bsl.runs.folder import changes, claimed
from lightning_bsl.schedules.files import written_whole


@hydra.main(version_base="1.3", config_path=CONF, config_name="surge_grid")
@in_short
def main(cfg: DictConfig) -> None:
    """Train what the folder does not hold yet."""
    folder = Path(cfg.output_dir)
    if unknown := sorted(set(cfg.optimizer) - {"_target_", "_partial_", "lr", "betas", "eps", "weight_decay"}):
        raise ValueError(f"optimizer has {', '.join(unknown)}: a population trains with Adam, optimizer=adam")
    if cfg.optimizer.get("weight_decay"):
        raise ValueError(f"optimizer.weight_decay={cfg.optimizer.weight_decay}: a population trains without, write 0")
    if missing := sorted(OmegaConf.missing_keys(cfg.grid)):
        raise ValueError(f"give {', '.join(missing)}, or surge=cnn5")
    grid = instantiate(cfg.grid)
    _check_same(cfg, folder)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # a pass has nothing to say
    warnings.filterwarnings("ignore", ".*does not have many workers which may be a bottleneck")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.* is deprecated")  # Lightning's own
    warnings.filterwarnings("ignore", "You defined a `validation_step`|You passed in a `val_dataloader`")

    columns = TextColumn("replicas"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    with claimed(folder), Progress(*columns, console=console()) as bar:
        task = bar.add_task("replicas", total=grid.replicas, left="")
        left = time_left(time.monotonic)
        path = folder / "replicas.csv"
        outcomes = run_grid(
            grid,
            partial(_make, _resolved(cfg.model)),  # which can be pickled, where workers are spawned
            instantiate(cfg.data),
            path,
            partial(_trainer, _resolved(cfg.trainer)),
            lambda done, of: bar.update(task, completed=done, left=left(done, of)),
            jobs=cfg.jobs,
            form=cfg.form,
            say=partial(bar.console.print, soft_wrap=True),
        )
    counts = {
        status: sum(outcome.status == status for outcome in outcomes) for status in ("reached", "not_reached", "diverged")
    }
    console().print(f"{path}: " + ", ".join(f"{number} {status}" for status, number in counts.items()), soft_wrap=True)
    console().print(f"now: {command('bsl-surge-report')} {folder}", soft_wrap=True)


def time_left(clock: Callable[[], float]) -> Callable[[int, int], str]:
    """Estimates the time left from the pace since its first call, which says what was done before.

    Args:
        clock: The time, in seconds.

    Returns:
        A function of the numbers of completed and of all replicas.

    Example:
        >>> left = time_left(iter([0.0, 120.0]).__next__)
        >>> left(10, 100), left(40, 100)
        ('', 'about 4 min left')
    """
    first: list[tuple[float, int]] = []

    def left(done: int, of: int) -> str:
        now = clock()
        if not first:
            first.append((now, done))
        ((begin, before),) = first
        if done in (before, of):
            return ""
        seconds = (now - begin) / (done - before) * (of - done)
        return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"

    return left


def _make(model: DictConfig, seed: int) -> LightningModule:
    seed_everything(seed, workers=True, verbose=False)
    made: LightningModule = instantiate(model)
    return made


def _trainer(trainer: DictConfig) -> Trainer:
    none = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    made: Trainer = instantiate(trainer, max_epochs=-1, max_steps=-1, **none)
    return made


def _resolved(node: DictConfig) -> Any:
    return OmegaConf.create(OmegaConf.to_container(node, resolve=True))  # apart from the rest of the configuration


def _check_same(cfg: DictConfig, folder: Path) -> None:
    """Refuse a folder with another grid; more batch sizes, rates and seeds go on with it."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    kept = {name: resolved[name] for name in ("data", "model", "grid")} | {"precision": cfg.trainer.get("precision")}
    free = {"data": ("root", "download", "num_workers", "seed"), "model": ("optimizer",)}
    for node, names in (free | {"grid": ("batch_sizes", "lrs", "seeds", "replicas_per_pass")}).items():
        for name in names:
            kept[node].pop(name, None)
    text, path = OmegaConf.to_yaml(OmegaConf.create(kept)), folder / ".hydra" / "grid.yaml"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{folder} holds another grid ({changes(path.read_text(), text)}); choose another hydra.run.dir=DIR")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with written_whole(path) as unfinished:
            unfinished.write_text(text)
