"""A run from its composed Hydra configuration, from start to end."""

from __future__ import annotations

import warnings
from pathlib import Path

from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from lightning_bsl.callbacks import AdaptiveBatchLRScheduler
from lightning_bsl.experiment import known_warnings, make_constants, make_plan, make_trainer
from lightning_bsl.report import bound_line, bounds_along, console, plan_table, plot_run, read_metrics, run_table
from lightning_bsl.run_folder import Finished, finish_run, open_run


def train(cfg: DictConfig) -> float | None:
    """Train as configured, or go on where the run in ``cfg.output_dir`` was interrupted, or leave it if it is finished.

    Args:
        cfg: The composed configuration (``conf/train.yaml``).

    Returns:
        The last value of ``dataset.metric``, for sweepers: the validation accuracy, to be maximised, or the validation
        perplexity of a language model, to be minimised. ``None`` where nothing logs it.

    Raises:
        ValueError: Bad configuration, or a folder that holds another run.
    """
    out, folder = console(), Path(cfg.output_dir)
    resume = open_run(cfg)
    if isinstance(resume, Finished):
        out.print(f"{folder}: finished before, not trained again", soft_wrap=True)
        return resume.value
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data)
    scheduler = instantiate(cfg.scheduler)
    constants = make_constants(cfg)
    model = instantiate(cfg.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_bsl")  # the scheduler plans the fit again, and warns then
        plan = make_plan(cfg, scheduler, datamodule)
    with known_warnings():
        trainer = make_trainer(cfg, scheduler)
    if plan is not None and trainer.is_global_zero:
        plan.to_csv(folder / "plan.csv")
        out.print(plan_table(plan))
    with known_warnings():
        trainer.fit(model, datamodule, ckpt_path=resume)
    value = trainer.callback_metrics.get(cfg.dataset.metric)
    last = None if value is None else float(value)
    if trainer.is_global_zero:
        if isinstance(scheduler, AdaptiveBatchLRScheduler) and (plan := make_plan(cfg, scheduler, datamodule)):
            plan.to_csv(folder / "plan.csv")
        if (folder / "metrics.csv").exists():
            rows = read_metrics(folder / "metrics.csv")
            if last is None:  # a run that was interrupted after its last step has nothing left to log
                last = next((row[cfg.dataset.metric] for row in reversed(rows) if cfg.dataset.metric in row), None)
            if plan is not None:
                out.print(run_table(plan, rows))
            bounds = bounds_along(plan, constants) if plan is not None and constants is not None else []
            if line := bound_line(rows, bounds):
                out.print(line, soft_wrap=True)
            try:
                plot_run(rows, folder / "curves.png", bounds)
            except ModuleNotFoundError as error:
                out.print(f"no curves.png: {error}")
        finish_run(cfg, last)
        files = (".hydra", "plan.csv", "metrics.csv", "curves.png", "checkpoints")
        out.print(f"{folder}: {', '.join(file for file in files if (folder / file).exists())}", soft_wrap=True)
    return last
