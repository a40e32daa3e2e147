"""The best rate of each batch size of a grid, and its interval over seeds (Li et al. 2024, arXiv 2405.14578, Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lightning_bsl.theory import LEVEL

if TYPE_CHECKING:
    from lightning_bsl.population import Outcome  # loads torch

By = Literal["drop", "steps"]  # the best rate has the largest mean drop of the loss, as in the paper, or the fewest mean steps

ENDS = (1 - LEVEL) / 2, (1 + LEVEL) / 2  # of an interval, as shares of the resamples
STATUSES = ("reached", "not_reached", "diverged")


class Cells:
    """Arrays [batch size, seed, rate] of the outcomes of a target."""

    def __init__(self, outcomes: Sequence[Outcome], seeds: Sequence[int], by: By) -> None:
        keys = ["batch_size", "seed", "lr"]
        table = pd.DataFrame(outcomes).drop_duplicates(keys, keep="last").set_index(keys)
        self.by, self.counts = by, {size: rows.value_counts() for size, rows in table["status"].groupby("batch_size")}
        self.sizes, self.lrs = (sorted(table.index.unique(key)) for key in ("batch_size", "lr"))
        table["there"], table["got"] = 1, (table["status"] == "reached") & np.isfinite(table["loss_drop"])
        table.loc[~table["got"], ["loss_drop", "steps"]] = 0
        whole = pd.MultiIndex.from_product([self.sizes, seeds, self.lrs])
        values = table[["there", "got", "loss_drop", "steps"]].astype(float).reindex(whole, fill_value=0).to_numpy()
        shape = len(self.sizes), len(seeds), len(self.lrs)
        self.there, self.reached, self.drop, self.steps = (column.reshape(shape) for column in values.T)
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
    there, reached, drop, steps = (draws @ values for values in (cells.there, cells.reached, cells.drop, cells.steps))
    counts = cells.whole[:, None] & (reached > 0) & (2 * reached >= there)
    with np.errstate(invalid="ignore"):
        drop, steps = drop / reached, steps / reached
        scores = np.where(counts, drop if cells.by == "drop" else 1 / steps, -math.inf)
    place = scores.argmax(axis=2)

    def at_best(values: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(values, place[..., None], axis=2)[..., 0]

    return Chosen(place, at_best(counts), at_best(steps), scores)


def best_of(cells: Cells, i: int, once: Chosen, drawn: Chosen) -> dict[str, Any]:
    """The best rate of batch size ``i`` and its interval, from every seed once and from those drawn."""
    size, found, edge = cells.sizes[i], bool(once.found[i, 0]), ""
    lr, low, high, drop, steps = [math.nan] * 5
    there, reached = cells.there[i].sum(axis=0), cells.reached[i].sum(axis=0)
    place = int(once.place[i, 0] if found else reached.argmax())
    if found:
        lrs = np.array(cells.lrs)[drawn.place[i][drawn.found[i]]]
        if there[place] > 1 and lrs.size:  # percentiles that are rates of the grid, not means of two
            low, high = np.quantile(lrs, ENDS, method="inverted_cdf")
        # lower rates that were given up on may have been as good; higher ones that failed are no better
        counting, tried = np.flatnonzero(np.isfinite(once.scores[i, 0])), np.flatnonzero(cells.whole[i])
        edge = "lowest" if place == counting[0] else "highest" if place == tried[-1] else ""
        lr, steps = cells.lrs[place], float(once.steps[i, 0])
        drop = float(cells.drop[i, :, place].sum() / reached[place])
    line = {"batch_size": size, "lr": lr, "low": low, "high": high, "edge": edge}
    line |= {"loss_drop": drop, "steps": steps, "examples": steps * size}
    line |= {"seeds": int(there[place] if found else there.max()), "seeds_reached": int(reached[place])}
    line |= {f"replicas_{status}": int(cells.counts[size].get(status, 0)) for status in STATUSES}
    return line | {"fitted": int(found and not edge)}


def within_steps(
    logs: NDArray[np.float64], tried: NDArray[np.bool_], place: NDArray[np.intp], random: np.random.Generator
) -> NDArray[np.float64]:
    """Log rates, drawn between the middles of the steps to those beside them: closer a grid does not know its best."""
    known = logs[tried]
    middles = (known[1:] + known[:-1]) / 2
    ends = np.concatenate([[2 * known[0] - middles[0]], middles, [2 * known[-1] - middles[-1]]])
    at = np.searchsorted(known, logs[place])
    return np.asarray(random.uniform(ends[at], ends[at + 1]))
