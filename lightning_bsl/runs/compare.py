"""Statistics of groups of runs: what they reached, how soon, and how that compares."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from lightning_bsl.runs.find import AXES, METRICS, Group, Run
from lightning_bsl.runs.folder import BOUND
from lightning_bsl.runs.metrics import Row
from lightning_bsl.theory import LEVEL

Seeded = tuple[int | None, float]


class Estimate(NamedTuple):
    """A mean and its interval; without one, where there are fewer than two values, ``low`` and ``high`` are nan."""

    value: float
    low: float
    high: float
    number: int
    method: str = "t"


@dataclass(frozen=True)
class Target:
    """A value of a metric to reach.

    Args:
        metric: The metric.
        value: The value.
        higher: Whether it is reached from below.
    """

    metric: str
    value: float
    higher: bool

    def __str__(self) -> str:
        return f"{self.metric} {'≥' if self.higher else '≤'} {self.value:.4g}"

    def first(self, run: Run) -> Row | None:
        """The first logged row of a run at the target or beyond it."""
        sign = 1 if self.higher else -1
        return next((row for row in run.series(self.metric) if sign * row[self.metric] >= sign * self.value), None)


class Reached(NamedTuple):
    """How soon a group reached a target.

    Args:
        target: The target.
        group: The group.
        reached: How many of its runs reached it.
        of: How many log the metric.
        means: On each axis; of the runs that reached it.
        ratios: On each axis, to the baseline, where all runs of both reached it.
    """

    target: Target
    group: Group
    reached: int
    of: int
    means: dict[str, Estimate]
    ratios: dict[str, Estimate]


class Ended(NamedTuple):
    """Where a group ended: the last value of a metric, and its best."""

    metric: str
    group: Group
    last: Estimate
    best: Estimate


class Held(NamedTuple):
    """What a group measured beside the bound of P1: min ||grad f||^2."""

    group: Group
    measured: float
    bound: float
    number: int


def higher_is_better(metric: str) -> bool:
    """Whether a metric is to grow, by its name.

    Example:
        >>> higher_is_better("val/accuracy"), higher_is_better("val/loss")
        (True, False)
    """
    return re.search(r"acc|auc|auroc|f1|precision|recall", metric.lower()) is not None


def parse_target(text: str) -> Target:
    """A target as it is written on the command line.

    Args:
        text: ``METRIC=VALUE``, or with ``>=`` or ``<=`` where the metric's name does not say which way is better.

    Raises:
        ValueError: It is written in another way.

    Example:
        >>> parse_target("val/accuracy=0.9")
        Target(metric='val/accuracy', value=0.9, higher=True)
        >>> parse_target("gradient_noise_scale>=100").higher
        True
    """
    found = re.fullmatch(r"\s*([^=<>\s]+)\s*(>=|<=|=)\s*(\S+)\s*", text)
    try:
        value = float(found[3]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value):
        raise ValueError(f"--target {text!r}: write METRIC=VALUE, as in val/accuracy=0.9")
    return Target(found[1], value, higher_is_better(found[1]) if found[2] == "=" else found[2] == ">=")


def logged_metrics(groups: Sequence[Group]) -> list[str]:
    """The metrics that some run logs."""
    clocks = {*AXES, "epoch", "step", "batch_size", "lr", "stage"}
    return sorted({name for group in groups for run in group.runs for name in run.metrics} - clocks)


def default_targets(groups: Sequence[Group]) -> list[Target]:
    """For each of the usual metrics the worst of the runs' best values: what every run reached.

    Args:
        groups: The groups; those without a run that has ended are left aside where there are others.
    """
    ended = [group for group in groups if len(group.unfinished) < len(group.runs)] or groups
    targets = []
    for metric in METRICS:
        higher = higher_is_better(metric)
        values = [run.curve(metric)[1] for group in ended for run in group.counted]
        best = [(max if higher else min)(each) for each in values if len(each)]
        if best:
            targets.append(Target(metric, float((min if higher else max)(best)), higher))
    return targets


def default_baseline(groups: Sequence[Group]) -> Group:
    """The first group whose batch size is constant, else the first."""
    return next((group for group in groups if group.constant_batch), groups[0])


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of some values and its t-interval.

    Args:
        values: One for each seed.

    Example:
        >>> mean, low, high, number, _ = estimate([1.0, 2.0, 3.0])
        >>> mean, round(low, 3), round(high, 3), number
        (2.0, -0.484, 4.484, 3)
    """
    number = len(values)
    if not number:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if number == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = _quantile(number - 1) * float(np.std(values, ddof=1)) / math.sqrt(number)
    return Estimate(mean, mean - half, mean + half, number)


def ratio(values: Sequence[Seeded], baseline: Sequence[Seeded]) -> Estimate:
    """The ratio of two groups' geometric means, with an interval of its logarithm.

    Where both groups have the same seeds, they are compared seed by seed (paired t), else as independent samples (Welch).

    Args:
        values: Seed and value of each run of the one group.
        baseline: The same of the other.

    Example:
        >>> ratio([(0, 2.0), (1, 2.0)], [(0, 4.0), (1, 4.0)])
        Estimate(value=0.5, low=0.5, high=0.5, number=2, method='paired')
    """
    if not values or not baseline or min(value for _, value in (*values, *baseline)) <= 0:
        return Estimate(math.nan, math.nan, math.nan, 0, "")
    one, other = ([math.log(value) for _, value in some] for some in (values, baseline))
    center = float(np.mean(one) - np.mean(other))
    seeds = {seed for seed, _ in values}
    paired = None not in seeds and seeds == {seed for seed, _ in baseline} and len(seeds) == len(values) == len(baseline)
    number = min(len(one), len(other))
    if number < 2:
        return Estimate(math.exp(center), math.nan, math.nan, number, "")
    if paired:
        theirs = {seed: math.log(value) for seed, value in baseline}
        differences = [math.log(value) - theirs[seed] for seed, value in values]
        half = _quantile(number - 1) * float(np.std(differences, ddof=1)) / math.sqrt(number)
    else:
        parts = [float(np.var(some, ddof=1)) / len(some) for some in (one, other)]
        error = math.sqrt(sum(parts))
        freedom = error**4 / sum(part**2 / (len(some) - 1) for part, some in zip(parts, (one, other))) if error else 1
        half = _quantile(freedom) * error
    return Estimate(math.exp(center), math.exp(center - half), math.exp(center + half), number, "paired" if paired else "Welch")


def how_soon(groups: Sequence[Group], targets: Sequence[Target], baseline: Group) -> list[Reached]:
    """Samples, steps and seconds until each group reached each target, and their ratios to a baseline.

    Args:
        groups: The groups.
        targets: What to reach.
        baseline: The group to compare with.
    """
    results = []
    for target in targets:
        theirs = _crossings(baseline, target)
        for group in groups:
            ours = _crossings(group, target)
            means: dict[str, Estimate] = {}
            ratios: dict[str, Estimate] = {}
            for axis in AXES:
                values, others = (
                    [(seed, row[axis]) for seed, row in some if row is not None and axis in row] for some in (ours, theirs)
                )
                if values:
                    means[axis] = estimate([value for _, value in values])
                if group is not baseline and values and len(values) == len(ours) and len(others) == len(theirs):
                    found = ratio(values, others)
                    if found.number:
                        ratios[axis] = found
            reached = sum(row is not None for _, row in ours)
            results.append(Reached(target, group, reached, len(ours), means, ratios))
    return results


def where_ended(groups: Sequence[Group], metrics: Sequence[str] = tuple(METRICS)) -> list[Ended]:
    """The last and the best value of each metric, in each group that logs it.

    Args:
        groups: The groups.
        metrics: The metrics.
    """
    results = []
    for metric in metrics:
        best: Callable[..., float] = max if higher_is_better(metric) else min
        for group in groups:
            curves = [curve for run in group.counted if len(curve := run.curve(metric)[1])]
            lasts = [run.series(metric)[-1][metric] for run in group.counted if run.series(metric)]
            if curves:
                results.append(Ended(metric, group, estimate(lasts), estimate([float(best(curve)) for curve in curves])))
    return results


def against_bounds(groups: Sequence[Group]) -> list[Held]:
    """The least ||grad f||^2 that groups measured, beside the bound of P1, where a configuration gives its constants.

    The bound is one on an expectation, so the squares are averaged over the runs before the least of them is taken.

    Args:
        groups: The groups.
    """
    results = []
    for group in groups:
        runs = [run for run in group.counted if len(run.curve("full_gradient_norm")[0])]
        bounds = _bounds(runs[0]) if runs else []
        if not bounds:
            continue
        squares = [dict(zip(x, y**2)) for x, y in (run.curve("full_gradient_norm") for run in runs)]
        common = set.intersection(*(set(each) for each in squares))
        if not common:
            continue
        measured = min(float(np.mean([each[at] for each in squares])) for at in common)
        passed = [norm**2 for at, norm in bounds if at <= max(common)]
        if passed:
            results.append(Held(group, measured, min(passed), len(runs)))
    return results


def unequal_budgets(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Each group and its samples, if they are not the same for all runs."""
    budgets = [(group.name, sorted({run.reached("samples") for run in group.counted})) for group in groups]
    if len({samples for _, some in budgets for samples in some}) < 2:
        return []
    return [(name, f"{some[0]:,.0f}" if len(some) == 1 else f"{some[0]:,.0f} to {some[-1]:,.0f}") for name, some in budgets]


def _crossings(group: Group, target: Target) -> list[tuple[int | None, Row | None]]:
    return [(run.seed, target.first(run)) for run in group.counted if run.series(target.metric)]


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def _bounds(run: Run) -> list[tuple[float, float]]:
    """The bound on the full gradient norm along a run's plan, as the run left it; none where its constants are not known."""
    try:
        with open(run.folder / BOUND, newline="") as file:
            return [(float(row["samples"]), float(row["bound"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
