"""`bsl-plan`: what a run would do, before it does it, as in `bsl-plan data=cifar100 scheduler=increasing_both`.

Side by side: `bsl-plan data=cifar100 --compare constant_decaying,increasing_decaying,increasing_both`.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

import hydra
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.nn import Parameter

from lightning_bsl.app.compose import CONF, draw, in_short, list_files, make_constants, make_plan
from lightning_bsl.callbacks import BatchLRScheduler
from lightning_bsl.callbacks.constants import FollowingConstants
from lightning_bsl.report import compare_table, console, megatron_line, plan_table, plot_comparison, plot_plan, theory_table
from lightning_bsl.schedules import Plan
from lightning_bsl.schedules.plan import ConstantsAt


def main() -> None:
    """Plan as the command line says."""
    sys.argv = _hydra_arguments(sys.argv)
    _main()


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
@in_short
def _main(cfg: DictConfig) -> None:
    """Print the plan of a run, or several side by side, and draw it."""
    out, folder, constants = console(), Path(cfg.output_dir), make_constants(cfg)
    if "compare" in cfg:
        configs = {name: _with_scheduler(name) for name in cfg.compare}
        plans = {name: _plan(other, instantiate(other.scheduler)) for name, other in configs.items()}
        out.print(compare_table(plans, constants))
        draw(folder / "plans.png", lambda path: plot_comparison(plans, path, constants))
        list_files(folder, "plans.png")
        return
    scheduler = instantiate(cfg.scheduler)
    plan, constants_at = _plan(cfg, scheduler), _constants(cfg, scheduler)
    out.print(plan_table(plan, constants_at))
    if plan.stages[0].lr is not None:
        out.print(theory_table(plan, constants))
    plan.to_csv(folder / "plan.csv", constants_at)
    draw(folder / "plan.png", lambda path: plot_plan(plan, path, constants))
    if line := megatron_line(plan):
        out.print(line, soft_wrap=True, highlight=False)
    list_files(folder, "plan.csv", "plan.png")


def _plan(cfg: DictConfig, scheduler: BatchLRScheduler) -> Plan:
    plan = make_plan(cfg, scheduler, instantiate(cfg.data))
    if plan is None:
        raise ValueError(
            "no plan for fast_dev_run, for a run without an end (write trainer.max_epochs or trainer.max_steps), or for a "
            "scheduler that measures before it decides"
        )
    return plan


def _constants(cfg: DictConfig, scheduler: BatchLRScheduler) -> ConstantsAt:
    """The optimizer's constants that follow the batch size, for a batch size: none where the optimizer is not configured."""
    rules = scheduler.follow
    node = OmegaConf.select(cfg, "model.optimizer") or cfg.get("optimizer")
    optimizers = [instantiate(node)([Parameter(torch.zeros(1))])] if rules and node else []
    return FollowingConstants(optimizers, rules if optimizers else {}, ExitStack()).at


def _with_scheduler(name: str) -> DictConfig:
    """This command's configuration, with another scheduler."""
    overrides = [
        override for override in HydraConfig.get().overrides.task if not override.startswith(("scheduler=", "+compare="))
    ]
    return compose("train", [*overrides, f"scheduler={name}"])


def _hydra_arguments(arguments: list[str]) -> list[str]:
    """`--compare a,b` as an override, which is all that Hydra lets through."""
    arguments = [*arguments, "hydra.mode=RUN"]  # an experiment may be a sweep: its first plan, in a folder of its own
    parser = argparse.ArgumentParser(usage="%(prog)s [OVERRIDE ...] [--compare SCHEDULERS]", add_help=False, allow_abbrev=False)
    parser.add_argument("--compare")
    options, rest = parser.parse_known_args(arguments)
    if options.compare is None:
        return arguments
    if not options.compare or "=" in options.compare:
        parser.error("--compare needs schedulers, with commas between: --compare constant_decaying,increasing_both")
    return [*rest, f"+compare=[{options.compare}]"]
