"""Statistics of groups of runs: what they reached, how soon, and how that compares."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from lightning_bsl.runs.find import METRICS, Curve, Group, Run
from lightning_bsl.runs.folder import BOUND
from lightning_bsl.runs.logs import AXES
from lightning_bsl.runs.metrics import read_numbers
from lightning_bsl.theory import LEVEL

Seeded = tuple[int | None, float]
_POSITIVE = ("full_gradient_norm", "val/perplexity")  # metrics that are never below 0


class Mean(NamedTuple):
    """A mean over runs and its interval, ``"t"``, ``"log t"``, ``"paired"`` or ``"Welch"``; nan where there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    runs: int = 0
    interval: str = ""


@dataclass(frozen=True)
class Target:
    """A value of a metric to reach and to keep.

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

    def reached(self, run: Run) -> tuple[dict[str, float] | None, bool]:
        """Where a run reached the target for good (``None``: nowhere), and whether it was ever at it.

        The target is reached at the first logged value from which on none is worse; a nan is worse than any target. So a
        gradient norm that starts low, rises and falls again has reached its target at the second crossing, and a run that ends
        worse than its target was there in passing only. The rule needs no setting. Noise makes it late, never early: the first
        value at the target may be luck, the last one that is worse is none.
        """
        rows = run.series(self.metric)
        at = (rows["value"] >= self.value if self.higher else rows["value"] <= self.value).to_numpy()
        kept = np.logical_and.accumulate(at[::-1])[::-1]
        return (rows.iloc[kept.argmax()].to_dict() if kept.any() else None), bool(at.any())


def higher_is_better(metric: str) -> bool:
    """Whether a metric is to grow, by its name."""
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
    parts = re.fullmatch(r"\s*([^=<>\s]+)\s*(>=|<=|=)\s*(\S+)\s*", text)
    try:
        value = float(parts[3]) if parts else math.nan
    except ValueError:
        value = math.nan
    if parts is None or not math.isfinite(value):
        raise ValueError(f"--target {text!r}: write METRIC=VALUE, as in val/accuracy=0.9")
    return Target(parts[1], value, higher_is_better(parts[1]) if parts[2] == "=" else parts[2] == ">=")


def logged_metrics(groups: Sequence[Group]) -> list[str]:
    """The metrics that some run logs."""
    clocks = {*AXES, "epoch", "step", "batch_size", "lr", "stage"}
    return sorted({name for group in groups for run in group.runs for name in run.metrics} - clocks)


def default_targets(groups: Sequence[Group]) -> list[Target]:
    """For each of the usual metrics the worst of the finite last values of the runs: what every run reached and kept."""
    ended = [group for group in groups if len(group.unfinished) < len(group.runs)] or groups
    targets = []
    for metric in METRICS:
        last = pd.concat([run.series(metric)["value"].tail(1) for group in ended for run in group.counted])
        values, higher = last[np.isfinite(last)], higher_is_better(metric)
        if len(values):
            targets.append(Target(metric, float(values.min() if higher else values.max()), higher))
    return targets


def default_baseline(groups: Sequence[Group]) -> Group:
    """The first group whose batch size is constant, as far as runs that have ended tell; else the first."""
    for group in groups:
        sizes = pd.concat([run.series("batch_size")["value"] for run in group.counted])
        if group.counted[0].ended and sizes.nunique() == 1:
            return group
    return groups[0]


def mean(values: Sequence[float], positive: bool = False) -> Mean:
    """The mean of some values, one for each seed, and its t-interval.

    Of ``positive`` values, which are never below 0, the mean is geometric, and its interval that of the mean logarithm. A 0 has
    no logarithm: with one the mean is 0, without an interval.
    """
    with np.errstate(divide="ignore"):
        points = np.log(values) if positive else np.array(values)
    known = points.size > 1 and np.isfinite(points).all()
    numbers = np.array([points.mean(), *(_interval(stats.ttest_1samp, points, 0.0) if known else (math.nan, math.nan))])
    numbers = np.exp(numbers) if positive else numbers
    if len(set(values)) == 1:  # exactly, whatever the logarithm rounds
        numbers[np.isfinite(numbers)] = values[0]
    value, low, high = numbers.tolist()
    return Mean(value, low, high, points.size, "" if not known else "log t" if positive else "t")


def ratio(values: Sequence[Seeded], baseline: Sequence[Seeded]) -> Mean:
    """The ratio of two groups' geometric means, with an interval of its logarithm; none where a value is 0.

    Where both groups have the same seeds, they are compared seed by seed (paired t), else as independent samples (Welch).
    """
    if min(value for _, value in (*values, *baseline)) <= 0:
        return Mean()
    seeds, others = ([seed for seed, _ in some] for some in (values, baseline))
    paired = None not in seeds and set(seeds) == set(others) and len(set(seeds)) == len(seeds) == len(others)
    # sorted, so that the seeds of a pair are in the same order
    ours, theirs = (np.log([value for _, value in (sorted(some) if paired else some)]) for some in (values, baseline))
    with np.errstate(over="ignore"):
        value, runs = float(np.exp(ours.mean() - theirs.mean())), min(len(values), len(baseline))
    if runs < 2:
        return Mean(value, runs=runs)
    ends = _interval(stats.ttest_rel, ours, theirs) if paired else _interval(stats.ttest_ind, ours, theirs, equal_var=False)
    with np.errstate(over="ignore"):
        low, high = np.exp(ends).tolist()
    return Mean(value, low, high, runs, "paired" if paired else "Welch")


def compare(groups: Sequence[Group], targets: Sequence[Target], baseline: Group) -> Any:
    """All numbers of a report: how soon targets were reached, where the groups ended, and what their bounds are.

    Args:
        groups: The groups.
        targets: What to reach.
        baseline: The group that the others are compared with.

    Returns:
        A table, a line for each number: ``what`` it is (``to_target``, ``ratio_to_GROUP``, ``final``, ``best``,
        ``measured_min_squared_norm``, ``bound``), the ``group``, ``metric``, ``target`` and ``axis``; ``value``, ``low``,
        ``high`` and the kind of ``interval``, as of `Mean`; how many ``runs`` reached the target, ``of`` those that log the
        metric, and how many were at it ``in_passing`` only.
    """
    lines = [line for target in targets for group in groups for line in _how_soon(group, target, baseline)]
    lines += [line for metric in METRICS for group in groups for line in _where_ended(group, metric)]
    lines += [line for group in groups for line in _against_bound(group)]
    columns = ["what", "group", "metric", "target", "axis", *Mean._fields[:4], "of", "interval", "in_passing"]
    return pd.DataFrame(lines, columns=columns).astype({"in_passing": "Int64"})


def unequal_budgets(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The groups of each number of samples, if that is not the same for all runs."""
    budgets: dict[str, list[str]] = {}
    for group in groups:
        samples = [run.reached("samples") for run in group.counted]
        budgets.setdefault(" to ".join({f"{end:,.0f}": None for end in (min(samples), max(samples))}), []).append(group.name)
    return budgets if len(budgets) > 1 or " to " in next(iter(budgets)) else {}


def band(curves: Sequence[Curve], points: int = 200) -> Any:
    """The ``mean``, ``min`` and ``max`` of some curves against x, over the stretch that all of them cover.

    They are interpolated on a grid of ``points`` where they are not at the same x.
    """
    grid, start = curves[0][0], max(x[0] for x, _ in curves)
    if not all(np.array_equal(x, grid) for x, _ in curves):
        grid = np.linspace(start, max(start, min(x[-1] for x, _ in curves)), points)
    values = pd.DataFrame([np.interp(grid, x, y) for x, y in curves], columns=grid)
    return values.agg(["mean", "min", "max"]).T


def _interval(test: Any, *samples: Any, **options: Any) -> tuple[float, float]:
    with warnings.catch_warnings():  # equal values have an interval of width 0
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        ends = test(*samples, **options).confidence_interval(LEVEL)
    return float(ends.low), float(ends.high)


def _line(what: str, group: Group, metric: str, number: Mean, **more: Any) -> dict[str, Any]:
    return {"what": what, "group": group.name, "metric": metric, "axis": "", "of": number.runs, **number._asdict(), **more}


def _how_soon(group: Group, target: Target, baseline: Group) -> list[dict[str, Any]]:
    """Samples, steps and seconds until a group reached a target, and their ratios to the baseline where all runs reached it."""
    ours, theirs = (
        [(run.seed, *target.reached(run)) for run in some.counted if len(run.series(target.metric))]
        for some in (group, baseline)
    )
    reached = sum(row is not None for _, row, _ in ours)
    counts: dict[str, Any] = {"of": len(ours), "target": target.value, "in_passing": sum(ever for *_, ever in ours) - reached}
    lines = []
    for axis in AXES:
        values, others = ([(seed, row[axis]) for seed, row, _ in some if row and row[axis] >= 0] for some in (ours, theirs))
        if values:
            soon = mean([value for _, value in values], positive=True)
            lines.append(_line("to_target", group, target.metric, soon, axis=axis, **counts))
        if values and group is not baseline and len(values) == len(ours) and len(others) == len(theirs) > 0:
            to = ratio(values, others)
            lines += [_line(f"ratio_to_{baseline.name}", group, target.metric, to, axis=axis, **counts)] if to.runs else []
    lines = lines or [_line("to_target", group, target.metric, Mean(), **counts)]
    return [{**line, "runs": reached} for line in lines]


def _where_ended(group: Group, metric: str) -> list[dict[str, Any]]:
    """The last and the best value of a metric, if the group logs it."""
    runs = [run for run in group.counted if len(run.curve(metric)[1])]
    best = np.max if higher_is_better(metric) else np.min
    values = {
        "final": [run.series(metric)["value"].iloc[-1] for run in runs],
        "best": [best(run.curve(metric)[1]) for run in runs],
    }
    return [_line(what, group, metric, mean(some, metric in _POSITIVE)) for what, some in values.items() if runs]


def _against_bound(group: Group) -> list[dict[str, Any]]:
    """The least ||grad f||^2 that a group measured, beside its bound (Umeda & Iiduka 2025, arXiv 2409.08770), if it has one.

    The bound is one on an expectation, so the squares are averaged over the runs before the least of them is taken.
    """
    norm = "full_gradient_norm"
    curves = {run.folder: run.curve(norm) for run in group.counted if len(run.curve(norm)[0])}
    try:  # as the first run left it
        bounds = read_numbers(next(iter(curves), Path()) / BOUND, ["samples", "bound"]).set_index("samples")["bound"]
    except ValueError:
        return []
    squares = pd.concat([pd.Series(y**2, x) for x, y in curves.values()], axis=1).dropna().mean(axis=1)
    passed = bounds[bounds.index <= squares.index.max()]
    values = {"measured_min_squared_norm": squares.min(), "bound": passed.min() ** 2}
    return [_line(what, group, norm, Mean(value, runs=len(curves))) for what, value in values.items() if len(passed)]
