"""`bsl-train`: train a model while its batch size and learning rate grow."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from lightning_bsl.app.commands import command
from lightning_bsl.app.compose import CONF, draw, in_short, known_warnings, list_files, make_constants, make_plan, make_trainer
from lightning_bsl.app.saving import save_whole
from lightning_bsl.app.stop import CheckpointWhenStopped
from lightning_bsl.callbacks import AdaptiveBatchLRScheduler, BatchLRScheduler
from lightning_bsl.report import bound_line, console, megatron_line, plan_table, plot_run, run_table
from lightning_bsl.runs import read_metrics
from lightning_bsl.runs.folder import FINISHED, LAST, Finished, claimed, finish_run, open_run, write_bound
from lightning_bsl.runs.metrics import merge_metrics
from lightning_bsl.schedules import Plan
from lightning_bsl.theory import BoundConstants, gradient_norm_bounds


class RunRecord(Callback):
    """Leaves in a run's folder what its report needs: the plan that is followed, and its bound.

    Args:
        scheduler: The scheduler of the run.
        folder: The folder.
        constants: What the bound must know of the problem, if that is known.
    """

    def __init__(self, scheduler: BatchLRScheduler, folder: Path, constants: BoundConstants | None) -> None:
        self.scheduler, self.folder, self.constants = scheduler, folder, constants
        self.bounds: list[tuple[float, float]] = []  # as of `gradient_norm_bounds`

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the plan, which is known now that the data are loaded, and show it."""
        if trainer.is_global_zero and (plan := self.scheduler.plan) is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.write(plan)
            console().print(plan_table(plan, self.scheduler.constants_at))

    def write(self, plan: Plan) -> None:
        """Write a plan and its bound.

        Args:
            plan: The plan.
        """
        plan.to_csv(self.folder / "plan.csv", self.scheduler.constants_at)
        if self.constants is not None:
            self.bounds = gradient_norm_bounds(plan, self.constants)
            write_bound(self.folder, self.bounds)


def train(cfg: DictConfig) -> float | None:
    """Train as configured, or go on where the run in ``cfg.output_dir`` was interrupted, or leave it if it is finished.

    Args:
        cfg: The composed configuration (``conf/train.yaml``).

    Returns:
        The last value of ``dataset.metric``, for sweepers: the validation accuracy, to be maximised, or the validation
        perplexity of a language model, to be minimised. ``None`` where nothing logs it.

    Raises:
        ValueError: Bad configuration, or a folder that holds another run, or in which another process trains.
    """
    if "grid" in cfg:
        raise ValueError(f"`grid` describes many runs, and this command trains one: {command('bsl-surge-grid')} trains it")
    folder = Path(cfg.output_dir)
    with claimed(folder):
        return _train(cfg, folder)


def _train(cfg: DictConfig, folder: Path) -> float | None:
    out, resume = console(), open_run(cfg)
    if isinstance(resume, Finished):
        out.print(f"{folder}: finished before, not trained again", soft_wrap=True)
        return resume.value
    composed, cfg = cfg, copy.deepcopy(cfg)  # `instantiate` puts values in the place of interpolations, also of other nodes
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data)
    scheduler = instantiate(cfg.scheduler)
    record = RunRecord(scheduler, folder, make_constants(cfg))
    model = instantiate(cfg.model)
    with known_warnings():
        trainer = make_trainer(cfg, scheduler, record)
        save_whole(trainer)
        if trainer.checkpoint_callbacks:
            trainer.callbacks.append(CheckpointWhenStopped(scheduler, folder / LAST))  # type: ignore[attr-defined]
        trainer.fit(model, datamodule, ckpt_path=resume, **only_data(resume, trainer.fit))  # type: ignore[arg-type]
    value = trainer.callback_metrics.get(cfg.dataset.metric)
    last = None if value is None else float(value)
    if not trainer.is_global_zero:
        return last
    plan = scheduler.plan
    if isinstance(scheduler, AdaptiveBatchLRScheduler) and (plan := make_plan(cfg, scheduler, datamodule)):
        record.write(plan)
        if line := megatron_line(plan):
            out.print(line, soft_wrap=True, highlight=False)
    if not cfg.trainer.get("fast_dev_run"):
        merge_metrics(folder / "metrics.csv")  # now, since a run that was interrupted at its end logs nothing more
    if (folder / "metrics.csv").exists():
        rows = read_metrics(folder / "metrics.csv")
        if last is None:  # a run that was interrupted after its last step has nothing left to log
            last = next((row[cfg.dataset.metric] for row in reversed(rows) if cfg.dataset.metric in row), None)
        if plan is not None:
            out.print(run_table(plan, rows))
        if line := bound_line(rows, record.bounds):
            out.print(line, soft_wrap=True)
        draw(folder / "curves.png", lambda path: plot_run(rows, path, record.bounds))
    finish_run(composed, last)
    list_files(folder, ".hydra", "plan.csv", "bound.csv", "metrics.csv", "curves.png", "checkpoints", FINISHED)
    return last


def only_data(checkpoint: str | None, fit: Callable[..., Any]) -> dict[str, bool]:
    """Let a checkpoint run no code: Lightning before 2.6, and PyTorch before 2.6, call what a checkpoint names.

    Args:
        checkpoint: What is resumed from, if anything.
        fit: That of the Trainer.

    Returns:
        Further arguments of ``fit``.

    Raises:
        ValueError: The checkpoint holds something else than tensors, numbers and text.
    """
    if checkpoint is None:
        return {}
    if Path(checkpoint).is_file():
        try:
            torch.load(checkpoint, map_location="meta", mmap=zipfile.is_zipfile(checkpoint), weights_only=True)
        except pickle.UnpicklingError as error:
            reason = re.search(r"(Unsupported|GLOBAL|Trying)[^.\n]*\.[^.\n ]*", str(error))
            raise ValueError(
                f"{checkpoint} holds more than tensors, numbers and text ({reason[0] if reason else 'it is no checkpoint'}), "
                "and such a checkpoint can run code: give another one, or, if you trust it, allow the class with "
                "torch.serialization.add_safe_globals"
            ) from error
    return {"weights_only": True} if "weights_only" in inspect.signature(fit).parameters else {}


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
@in_short
def main(cfg: DictConfig) -> Any:
    """Train as configured; returns what a sweeper may optimise."""
    return train(cfg)
