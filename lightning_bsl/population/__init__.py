"""Thousands of small runs at once: the grids of learning rates and batch sizes of P4 (arXiv 2405.14578)."""

from lightning_bsl.population.data import PopulationData, PopulationSampler
from lightning_bsl.population.grid import Grid, read_outcomes, run_grid
from lightning_bsl.population.module import Outcome, Population
from lightning_bsl.population.optimizer import PopulationAdam

__all__ = [
    "Grid",
    "Outcome",
    "Population",
    "PopulationAdam",
    "PopulationData",
    "PopulationSampler",
    "read_outcomes",
    "run_grid",
]
