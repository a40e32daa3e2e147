"""What a grid of batch sizes, rates and seeds says of the surge law (Li et al. 2024, arXiv 2405.14578, Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lightning_bsl import theory
from lightning_bsl.population.best_rates import ENDS, STATUSES, By, Cells, Chosen, best_of, choose, within_steps
from lightning_bsl.schedules import NoiseScaling, ScalingRule, SurgeScaling

if TYPE_CHECKING:
    from lightning_bsl.population import Outcome  # loads torch

Word = Literal["falls", "does not fall", "undecided", "cannot be judged"]
T = TypeVar("T")

ABOVE = 3  # batch sizes above B_noise that a slope is taken of
DECIDES = 2.0  # a smaller difference of AICc decides nothing


class Curve(NamedTuple):
    """A curve of `compare_curves` with its peak, eta_max, as the paper takes it: B_noise is that of the steps."""

    name: str
    rule: ScalingRule
    peak: theory.Estimate
    r2: float


class Verdict(NamedTuple):
    """Whether the best rate falls beyond B_noise: the slope of log(best rate) against log B over the batch sizes above it.

    Its interval is over seeds and within the steps of the grid of rates; ``law`` is the slope of the surge law.
    """

    word: Word
    slope: float = math.nan
    low: float = math.nan
    high: float = math.nan
    law: float = math.nan
    batch_sizes: tuple[int, ...] = ()


class Settings(NamedTuple):
    """Of the surge law: eta_max and B_noise, and whether the steps gave them, as in the paper, or the rates alone."""

    peak_lr: float
    noise_batch_size: float
    from_steps: bool


@dataclass(frozen=True)
class Surge:
    """What a grid says for one target.

    Args:
        target: The loss to reach.
        extra_steps: Over which the drop of the loss was measured.
        by: What makes a rate the best.
        lrs: All rates, the columns of ``scores``.
        scores: For each batch size and rate the mean drop of the loss, or 1 / mean steps; nan where too few seeds got there.
        tried: Whether there are replicas, in the same shape.
        best: A line for each batch size: its best rate ``lr`` of those at which half of the seeds or more reached the target,
            nan without one; the ends ``low`` and ``high`` of its interval over seeds, nan for a single seed; ``edge``, "lowest"
            or "highest" where nothing beyond it was tried or reached the target, so that it is a bound, else empty; with it the
            mean ``loss_drop``, ``steps`` S and ``examples`` E = S B of the ``seeds_reached`` of all ``seeds``; the replicas of
            all rates by status; and whether it is ``fitted``: a rate, and no bound.
        lacking: Replicas that are there, and that the whole grid has, of each batch size that lacks some.
        tradeoff: B_noise, S_min and E_min from the steps; ``None`` where they give none.
        line: The same by the paper's line.
        resampled: B_noise over resamples of the seeds: the ends of its interval, and the share that had none.
        curves: Curves of that B_noise; empty where the rates give none.
        free: Curves that are free to take any.
        reasons: Why ``tradeoff``, ``line``, ``curves`` or ``free`` is missing.
        verdict: Whether the best rate falls beyond B_noise.
    """

    target: float
    extra_steps: int
    by: By
    lrs: NDArray[np.float64]
    scores: NDArray[np.float64]
    tried: NDArray[np.bool_]
    best: Any
    lacking: dict[int, tuple[int, int]]
    tradeoff: theory.TradeoffFit | None
    line: theory.TradeoffFit | None
    resampled: tuple[float, float, float]
    curves: list[Curve]
    free: list[theory.CurveFit]
    reasons: dict[str, str]
    verdict: Verdict

    @property
    def counts(self) -> dict[str, int]:
        """Replicas of all batch sizes, by status."""
        return {status: int(self.best[f"replicas_{status}"].sum()) for status in STATUSES}

    @property
    def free_surge(self) -> SurgeScaling | None:
        """The surge law as it fits the rates alone."""
        return next((curve.rule for curve in self.free if isinstance(curve.rule, SurgeScaling)), None)

    @property
    def free_peak_is_inside(self) -> bool:
        """Whether that law peaks between the batch sizes: a peak outside of what was measured is none that the rates have."""
        sizes, rule = self.best["batch_size"][self.best["fitted"] == 1], self.free_surge
        return rule is not None and bool(sizes.min() <= rule.noise_batch_size <= sizes.max())

    @property
    def settings(self) -> Settings | None:
        """The settings of the surge law; ``None`` where neither the steps nor the rates give any."""
        rule: Any = self.curves[0].rule if self.curves else self.free_surge if self.free_peak_is_inside else None
        return rule and Settings(rule.peak_lr, rule.noise_batch_size, bool(self.curves))


class Fitted(NamedTuple):
    """A number that was fitted, with its interval, and the fit; the target is nan where it was fitted over all of them."""

    target: float
    what: str
    fit: str
    value: float
    low: float = math.nan
    high: float = math.nan
    r2: float = math.nan
    aicc: float = math.nan


def analyse_surge(
    outcomes: Sequence[Outcome],
    targets: Sequence[float] = (),
    *,
    by: By = "drop",
    resamples: int = 2000,
    fits: int = 200,
    seed: int = 0,
) -> list[Surge]:
    """Best rates, B_noise and curves of a grid, for each target loss.

    The best rate of a batch size is that of the largest mean drop of the loss, of those at which half of the seeds or more
    reached the target, as in the paper; or that of the fewest mean steps, which few seeds tell apart more easily: a replica
    reaches its target where the loss happens to be low, and with small batches the way back up hides the drop. Intervals are
    percentiles over resamples of the seeds, the same for all batch sizes. Rates with fewer seeds than others of the same batch
    size are left out: the fastest replicas of a pass are there first. Best rates that are bounds are left out of all fits.

    Args:
        outcomes: Of the replicas, as of `read_outcomes`.
        targets: Losses; all by default.
        by: ``"drop"`` or ``"steps"``: what makes a rate the best.
        resamples: Of the seeds.
        fits: Of the steps, on the first of the resamples: each takes milliseconds.
        seed: Of the resamples.

    Returns:
        One for each target, the highest loss first.

    Raises:
        ValueError: No outcomes, a target that none is of, drops over different numbers of steps, a batch size or rate not above
            0.

    Example:
        >>> from lightning_bsl.population import Outcome
        >>> rule, outcomes = SurgeScaling(0.004, noise_batch_size=32), []
        >>> for batch_size in (4, 16, 64, 256):
        ...     steps = round(100 * (1 + 32 / batch_size))
        ...     for lr in (0.001, 0.002, 0.0028, 0.0038, 0.005):
        ...         drop = 1 - (lr / rule(batch_size) - 1) ** 2
        ...         outcomes.append(Outcome(0, batch_size, lr, 0.5, "reached", steps, steps * batch_size, 0.5, 10, drop))
        >>> (surge,) = analyse_surge(outcomes)
        >>> surge.best["lr"].tolist(), round(surge.tradeoff.noise_batch_size.value)
        ([0.0028, 0.0038, 0.0038, 0.0028], 32)
    """
    known = {outcome.target for outcome in outcomes}
    if not outcomes or (unknown := set(targets) - known):
        raise ValueError(f"no outcomes of {f'the target {min(unknown)}' if outcomes else 'any target'}")
    if len(extra := {outcome.extra_steps for outcome in outcomes}) > 1:
        raise ValueError(f"drops of the loss over {sorted(extra)} steps cannot be compared: keep one")
    if not all(outcome.batch_size > 0 and 0 < outcome.lr < math.inf for outcome in outcomes):
        raise ValueError("batch sizes and learning rates must be above 0")
    seeds = sorted({outcome.seed for outcome in outcomes})
    draws = np.random.default_rng(seed).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=resamples)
    cells = {
        target: Cells([outcome for outcome in outcomes if outcome.target == target], seeds, by)
        for target in sorted(targets or known, reverse=True)
    }
    return [
        _analyse(target, of, outcomes[0].extra_steps, draws, fits, np.random.default_rng(seed + 1))
        for target, of in cells.items()
    ]


def noise_against_loss(surges: Sequence[Surge]) -> theory.CriticalBatchFit | str:
    """The power law of B_noise against the loss, or why there is none."""
    known = [(of.target, of.tradeoff.noise_batch_size.value) for of in surges if of.tradeoff]
    if len(known) < 3:
        return f"{len(known)} losses have a B_noise: a power law needs three"
    reasons: dict[str, str] = {}
    return _fit(reasons, "law", lambda: theory.fit_critical_batch_size(*zip(*known))) or reasons["law"]


def fitted_numbers(surges: Sequence[Surge]) -> list[Fitted]:
    """All numbers that were fitted."""
    numbers, law = [], noise_against_loss(surges)
    for of in surges:
        add = partial(Fitted, of.target)
        for name, fit in (("log", of.tradeoff), ("line", of.line)):
            for what in ("noise_batch_size", "min_steps", "min_examples") if fit else ():
                numbers.append(add(what, name, *_ends(getattr(fit, what))))
        if of.tradeoff:
            noise = of.tradeoff.noise_batch_size.value
            numbers.append(add("noise_batch_size", "log, seeds resampled", noise, *of.resampled[:2]))
        numbers += [add("peak_lr", curve.name, *_ends(curve.peak), curve.r2) for curve in of.curves]
        for free in of.free:
            for what in ("peak_lr", "noise_batch_size"):  # linear and square-root scaling have neither
                value = getattr(free.rule, what, math.nan)
                numbers.append(add(what, f"{free.name}, free", value, r2=free.r2, aicc=free.aicc))
        numbers.append(add("slope_above_noise", of.verdict.word, *of.verdict[1:4]))
    parameters = {} if isinstance(law, str) else law._asdict()
    return numbers + [Fitted(math.nan, f"critical_{name}", "log", *_ends(of)) for name, of in parameters.items()]


def _ends(estimate: theory.Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _analyse(
    target: float, cells: Cells, extra_steps: int, draws: NDArray[np.int64], fits: int, random: np.random.Generator
) -> Surge:
    seeds = cells.there.shape[1]
    once, drawn = choose(cells, np.ones((1, seeds), dtype=np.int64)), choose(cells, draws)
    best = pd.DataFrame([best_of(cells, i, once, drawn) for i in range(len(cells.sizes))])
    used = (best["fitted"] == 1).to_numpy()
    sizes, lrs, steps, examples = best.loc[used, ["batch_size", "lr", "steps", "examples"]].to_numpy().T
    whole, number = seeds * len(cells.lrs), cells.there.sum(axis=(1, 2)).astype(int).tolist()
    reasons: dict[str, str] = {}
    tradeoff = _fit(reasons, "tradeoff", lambda: theory.fit_noise_batch_size(steps, examples))
    return Surge(
        target,
        extra_steps,
        cells.by,
        np.array(cells.lrs),
        np.where(np.isfinite(once.scores[:, 0]), once.scores[:, 0], math.nan),
        cells.there.max(axis=1) > 0,
        best,
        {size: (here, whole) for size, here in zip(cells.sizes, number) if here < whole},
        tradeoff,
        _fit(reasons, "line", lambda: theory.fit_noise_batch_size(steps, examples, method="line")),
        _resampled(sizes, drawn.steps[used], drawn.found[used], fits if tradeoff and seeds > 1 else 0),
        (_fit(reasons, "curves", lambda: _curves(sizes, lrs, tradeoff)) if tradeoff else None) or [],
        _fit(reasons, "free", lambda: theory.compare_curves(sizes, lrs)) or [],
        reasons,
        _judge(cells, best, once, drawn, tradeoff, random),
    )


def _fit(reasons: dict[str, str], name: str, fit: Callable[[], T]) -> T | None:
    """A fit; where it cannot be made, nothing, and the reason under its name."""
    try:
        return fit()
    except (ValueError, ArithmeticError) as error:
        reasons[name] = str(error)
        return None


def _resampled(
    sizes: NDArray[np.float64], steps: NDArray[np.float64], found: NDArray[np.bool_], most: int
) -> tuple[float, float, float]:
    """B_noise over resamples of the seeds."""
    resamples = steps[:, found.all(axis=0)].T[:most]
    fits = [_fit({}, "tradeoff", partial(theory.fit_noise_batch_size, row, row * sizes)) for row in resamples]
    values = [fit.noise_batch_size.value for fit in fits if fit]
    low, high = np.quantile(values, ENDS) if values else (math.nan, math.nan)
    return float(low), float(high), 1 - len(values) / len(fits) if fits else math.nan


def _curves(sizes: NDArray[np.float64], lrs: NDArray[np.float64], tradeoff: theory.TradeoffFit) -> list[Curve]:
    noise, total = tradeoff.noise_batch_size.value, float(np.log(lrs).var())
    curves = []
    for name, alpha in (("surge", None), ("alpha=1", 1.0), ("alpha=0.5", 0.5)):
        peak = theory.fit_peak_lr(sizes, lrs, tradeoff, alpha=alpha)
        rule = SurgeScaling(peak.value, noise) if alpha is None else NoiseScaling(peak.value, noise, alpha)
        squares = float(np.mean(np.log(lrs / theory.lr_curve(rule, sizes)) ** 2))
        curves.append(Curve(name, rule, peak, 1 - squares / total if total else math.nan))
    return curves


def _judge(
    cells: Cells, best: Any, once: Chosen, drawn: Chosen, tradeoff: theory.TradeoffFit | None, random: np.random.Generator
) -> Verdict:
    """The slope of the best rates above B_noise, and its interval.

    Not the ratio to the peak: whichever of several noisy rates is the largest, the others lie below it.
    """
    if tradeoff is None:
        return Verdict("cannot be judged")
    noise = tradeoff.noise_batch_size.value
    beyond = best[best["batch_size"] > noise]
    above = beyond.index[beyond["fitted"] == 1]
    sizes = tuple(beyond["batch_size"][above].tolist())
    if len(above) < ABOVE:
        return Verdict("cannot be judged", batch_sizes=sizes)
    x = np.log(sizes)
    x -= x.mean()
    logs = np.log(cells.lrs)

    def slope(log_lrs: NDArray[np.float64]) -> Any:
        return x @ log_lrs / (x @ x)

    ours, law = float(slope(logs[once.place[above, 0]])), float(slope(np.log(theory.lr_curve(SurgeScaling(1.0, noise), sizes))))
    kept = drawn.found[above].all(axis=0)
    if len(cells.there[0]) < 2 or not kept.any():
        return Verdict("undecided", ours, -math.inf, math.inf, law, sizes)
    # the best rate is known to half a step of the grid, whatever the seeds say
    rows = [within_steps(logs, cells.whole[i], drawn.place[i, kept], random) for i in above]
    low, high = (float(end) for end in np.quantile(slope(np.stack(rows)), ENDS))
    word: Word = "falls" if high < 0 else "does not fall" if low >= 0 or low > law else "undecided"
    # what is left out as a bound may speak against it: the best may have fallen below the rates, or risen above them
    against = {"falls": "highest", "does not fall": "lowest"}.get(word)
    if against in set(beyond["edge"]):
        word = "undecided"
    return Verdict(word, ours, low, high, law, sizes)
