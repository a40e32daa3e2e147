"""Train a model while its batch size and learning rate grow: `python scripts/train.py data=cifar100 model=resnet18`."""

from __future__ import annotations

import warnings
from pathlib import Path

import hydra
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from lightning_bsl import AdaptiveBatchLRScheduler
from lightning_bsl.experiment import make_constants, make_plan, make_trainer
from lightning_bsl.report import bound_line, bounds_along, console, plan_table, plot_run, read_metrics, run_table


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train as configured; returns the last value of `dataset.metric`, for sweepers.

    That is the validation accuracy, to be maximised, or the validation perplexity of a language model, to be minimised.
    """
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.data)
    scheduler = instantiate(cfg.scheduler)
    constants = make_constants(cfg)
    model = instantiate(cfg.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_bsl")  # the scheduler plans the fit again, and warns then
        plan = make_plan(cfg, scheduler, datamodule)
    trainer = make_trainer(cfg, scheduler)
    out, folder = console(), Path(cfg.output_dir)
    if plan is not None and trainer.is_global_zero:
        plan.to_csv(folder / "plan.csv")
        out.print(plan_table(plan))
    trainer.fit(model, datamodule, ckpt_path=cfg.ckpt_path)
    if trainer.is_global_zero:
        if isinstance(scheduler, AdaptiveBatchLRScheduler) and (plan := make_plan(cfg, scheduler, datamodule)):
            plan.to_csv(folder / "plan.csv")
        if (folder / "metrics.csv").exists():
            rows = read_metrics(folder / "metrics.csv")
            if plan is not None:
                out.print(run_table(plan, rows))
            bounds = bounds_along(plan, constants) if plan is not None and constants is not None else []
            if line := bound_line(rows, bounds):
                out.print(line, soft_wrap=True)
            try:
                plot_run(rows, folder / "curves.png", bounds)
            except ModuleNotFoundError as error:
                out.print(f"no curves.png: {error}")
        files = (".hydra", "plan.csv", "metrics.csv", "curves.png", "checkpoints")
        out.print(f"{folder}: {', '.join(file for file in files if (folder / file).exists())}", soft_wrap=True)
    value = trainer.callback_metrics.get(cfg.dataset.metric)
    return None if value is None else float(value)


if __name__ == "__main__":
    main()
