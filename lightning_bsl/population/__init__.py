"""Grids of batch sizes, learning rates and seeds, trained as replicas of one model (Li et al. 2024, arXiv 2405.14578)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bsl.population.analysis import Surge, analyse_surge
    from lightning_bsl.population.data import PopulationData, PopulationSampler
    from lightning_bsl.population.grid import Grid, read_outcomes, run_grid
    from lightning_bsl.population.module import Outcome, Population
    from lightning_bsl.population.optimizer import PopulationAdam

_HOMES = {
    "analysis": ("Surge", "analyse_surge"),
    "data": ("PopulationData", "PopulationSampler"),
    "grid": ("Grid", "read_outcomes", "run_grid"),
    "module": ("Outcome", "Population"),
    "optimizer": ("PopulationAdam",),
}
__all__ = [
    "Grid",
    "Outcome",
    "Population",
    "PopulationAdam",
    "PopulationData",
    "PopulationSampler",
    "Surge",
    "analyse_surge",
    "read_outcomes",
    "run_grid",
]


def __getattr__(name: str) -> Any:
    # imported on first use, so that the analysis of a grid loads neither torch nor Lightning
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lightning_bsl.population.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
