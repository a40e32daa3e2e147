"""What a run would do, before it does it: `python scripts/plan.py data=cifar100 scheduler=increasing_both`."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_bsl.experiment import make_plan
from lightning_bsl.report import console, plan_table, plot_plan


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Print the plan of a run and draw it."""
    scheduler = instantiate(cfg.scheduler)
    plan = make_plan(cfg, scheduler, instantiate(cfg.data))
    if plan is None:
        raise ValueError(
            "no plan for fast_dev_run, for a run without an end (write trainer.max_epochs or trainer.max_steps), or for a "
            "scheduler that measures before it decides"
        )
    out, folder = console(), Path(cfg.output_dir)
    out.print(plan_table(plan))
    plan.to_csv(folder / "plan.csv")
    plot_plan(plan, scheduler.schedule, folder / "plan.png")
    out.print(f"{folder}: plan.csv, plan.png", soft_wrap=True)


if __name__ == "__main__":
    main()
