"""`bsl-train`: train a model while its batch size and learning rate grow."""

from __future__ import annotations

import copy
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig

from lightning_bsl.app.commands import command
from lightning_bsl.app.compose import CONF, draw, in_short, known_warnings, make_constants, make_plan, make_trainer
from lightning_bsl.callbacks import AdaptiveBatchLRScheduler, BatchLRScheduler
from lightning_bsl.report import bound_line, console, megatron_line, plan_table, plot_run, run_table
from lightning_bsl.runs import read_metrics
from lightning_bsl.runs.folder import FINISHED, LAST, Finished, claimed, finish_run, open_run, write_bound
from lightning_bsl.schedules import Plan
from lightning_bsl.theory import BoundConstants, gradient_norm_bounds


class RunRecord(Callback):
    """Leaves in a run's folder what its report needs: the plan that is followed, and its bound. If stopped, also a checkpoint.

    SIGTERM, as schedulers of clusters send it, and Ctrl-C stop a run before its next batch. The same command then goes on from
    there. A second Ctrl-C stops it at once, and with several processes the first one does.

    Args:
        scheduler: The scheduler of the run.
        folder: The folder.
        constants: What the bound must know of the problem, if that is known.
    """

    def __init__(self, scheduler: BatchLRScheduler, folder: Path, constants: BoundConstants | None) -> None:
        self.scheduler, self.folder, self.constants = scheduler, folder, constants
        self.bounds: list[tuple[float, float]] = []  # as of `gradient_norm_bounds`
        self._stopped = self._trains = self._between = False
        self._undo = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the plan, which is known now that the data are loaded, and show it."""
        if trainer.is_global_zero and (plan := self.scheduler.plan) is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.write(plan)
            console().print(plan_table(plan, self.scheduler.constants_at))
        self._trains = not trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGINT, self._stop)
            self._undo.callback(signal.signal, signal.SIGINT, before)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here, where every step is whole, after Ctrl-C."""
        if self._stopped:
            self._between = True
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a checkpoint of a run that is stopped between two batches."""
        self._undo.close()
        # any other may have come inside a step of the optimizer
        between = isinstance(exception, SIGTERMException) or self._between
        if between and self._trains and trainer.checkpoint_callbacks:
            trainer.save_checkpoint(path := self.folder / LAST)
            if trainer.is_global_zero:
                console().print(f"{path}: saved; the same command goes on from here", soft_wrap=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C its meaning back."""
        self._undo.close()

    def _stop(self, number: int, frame: object) -> None:
        self._stopped = True
        self._undo.close()  # the next one stops at once
        console().print("\nCtrl-C: stopping before the next batch; press it again to stop at once and save nothing")

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
        try:
            return _train(cfg, folder)
        except SIGTERMException:  # whose exit status is that of a success
            raise SystemExit(128 + signal.SIGTERM) from None


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
        trainer = make_trainer(cfg, record, scheduler)  # a checkpoint must be saved before the scheduler ends the fit
        trainer.fit(model, datamodule, ckpt_path=resume)
    value = trainer.callback_metrics.get(cfg.dataset.metric)
    last = None if value is None else float(value)
    if not trainer.is_global_zero:
        return last
    plan = scheduler.plan
    if isinstance(scheduler, AdaptiveBatchLRScheduler) and (plan := make_plan(cfg, scheduler, datamodule)):
        record.write(plan)
        if line := megatron_line(plan):
            out.print(line, soft_wrap=True, highlight=False)
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
    files = (".hydra", "plan.csv", "bound.csv", "metrics.csv", "curves.png", "checkpoints", FINISHED)
    out.print(f"{folder}: {', '.join(file for file in files if (folder / file).exists())}", soft_wrap=True)
    return last


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
@in_short
def main(cfg: DictConfig) -> Any:
    """Train as configured; returns what a sweeper may optimise."""
    return train(cfg)
