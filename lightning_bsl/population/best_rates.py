"""The best learning rate of each batch size of a grid, and its interval over seeds (P4, Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_bsl.theory import LEVEL

if TYPE_CHECKING:
    from lightning_bsl.population import Outcome  # loads torch

By = Literal["drop", "steps"]  # what makes a rate the best: the largest mean drop of the loss (P4), or the fewest mean steps

ENDS = (1 - LEVEL) / 2, (1 + LEVEL) / 2  # of an interval, as shares of the resamples


class Best(NamedTuple):
    """The best learning rate of a batch size, and what the target took with it.

    Attributes:
        batch_size: B.
        lr: The best rate of those at which half of the seeds or more reached the target; nan without one.
        low: Lower end of its interval over seeds; nan for a single seed.
        high: Upper end.
        edge: "lowest" or "highest" where nothing beyond it was tried or reached the target: the rate is a bound. Else empty.
        drop: Mean drop of the loss with it.
        steps: S, mean over the seeds that reached the target.
        examples: E = S B.
        reached: How many did; without a best rate, at the rate at which the most did.
        seeds: How many tried.
        counts: Replicas of all rates, by status.
    """

    batch_size: int
    lr: float
    low: float
    high: float
    edge: str
    drop: float
    steps: float
    examples: float
    reached: int
    seeds: int
    counts: dict[str, int]

    @property
    def measured(self) -> bool:
        """Whether it is a rate, and no bound: what the fits are made of."""
        return not self.edge and not math.isnan(self.lr)


class Cells:
    """Arrays [batch size, seed, rate] of the outcomes of a target."""

    def __init__(self, outcomes: Sequence[Outcome], seeds: Sequence[int], by: By) -> None:
        self.by = by
        self.sizes, self.lrs = sorted({each.batch_size for each in outcomes}), sorted({each.lr for each in outcomes})
        places = [{value: i for i, value in enumerate(values)} for values in (self.sizes, seeds, self.lrs)]
        shape = len(self.sizes), len(seeds), len(self.lrs)
        self.there, self.reached, self.drop, self.steps = (np.zeros(shape) for _ in range(4))
        for each in outcomes:
            place = tuple(of[value] for of, value in zip(places, (each.batch_size, each.seed, each.lr)))
            self.there[place] = 1
            if each.status == "reached" and math.isfinite(each.loss_drop):
                self.reached[place], self.drop[place], self.steps[place] = 1, each.loss_drop, each.steps
        number = self.there.sum(axis=1)
        self.whole = (number > 0) & (number == number.max(axis=1, keepdims=True))


class Chosen(NamedTuple):
    """Arrays [batch size, resample]: which rate is best, whether there is one, and the steps with it."""

    place: NDArray[np.intp]
    found: NDArray[np.bool_]
    steps: NDArray[np.float64]
    scores: NDArray[np.float64]  # [batch size, resample, rate], the more the better; -inf where the rate does not count


def choose(cells: Cells, draws: NDArray[np.int64]) -> Chosen:
    """The best rates, each seed counted as often as it was drawn."""
    there, reached, drop, steps = (draws @ each for each in (cells.there, cells.reached, cells.drop, cells.steps))
    counts = cells.whole[:, None] & (reached > 0) & (2 * reached >= there)
    with np.errstate(invalid="ignore"):
        drop, steps = drop / reached, steps / reached
        scores = np.where(counts, drop if cells.by == "drop" else 1 / steps, -math.inf)
    place = scores.argmax(axis=2)

    def at_best(values: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(values, place[..., None], axis=2)[..., 0]

    return Chosen(place, at_best(counts), at_best(steps), scores)


def best_of(cells: Cells, i: int, once: Chosen, drawn: Chosen, outcomes: Sequence[Outcome]) -> Best:
    """The best rate of batch size ``i`` and its interval, from every seed once and from those drawn."""
    size, place = cells.sizes[i], int(once.place[i, 0])
    of = [each.status for each in outcomes if each.batch_size == size]
    counts = {status: of.count(status) for status in ("reached", "not_reached", "diverged")}
    there, reached = (int(values[i, :, place].sum()) for values in (cells.there, cells.reached))
    if not once.found[i, 0]:
        nan, (seeds, most) = math.nan, (int(values[i].sum(axis=0).max()) for values in (cells.there, cells.reached))
        return Best(size, nan, nan, nan, "", nan, nan, nan, most, seeds, counts)
    lrs = np.array(cells.lrs)[drawn.place[i][drawn.found[i]]]
    # percentiles that are rates of the grid, not means of two
    low, high = np.quantile(lrs, ENDS, method="inverted_cdf") if there > 1 and lrs.size else (math.nan, math.nan)
    # lower rates that were given up on may have been as good; higher ones that failed are no better
    counting, tried = np.flatnonzero(np.isfinite(once.scores[i, 0])), np.flatnonzero(cells.whole[i])
    edge = "lowest" if place == counting[0] else "highest" if place == tried[-1] else ""
    steps, drop = float(once.steps[i, 0]), float(cells.drop[i, :, place].sum() / reached)
    return Best(size, cells.lrs[place], float(low), float(high), edge, drop, steps, steps * size, reached, there, counts)


def within_steps(
    logs: NDArray[np.float64], tried: NDArray[np.bool_], place: NDArray[np.intp], random: np.random.Generator
) -> NDArray[np.float64]:
    """Log rates, drawn between the middles of the steps to those beside them: closer a grid does not know its best."""
    known = logs[tried]
    middles = (known[1:] + known[:-1]) / 2
    ends = np.concatenate([[2 * known[0] - middles[0]], middles, [2 * known[-1] - middles[-1]]])
    at = np.searchsorted(known, logs[place])
    drawn: NDArray[np.float64] = random.uniform(ends[at], ends[at + 1])
    return drawn
