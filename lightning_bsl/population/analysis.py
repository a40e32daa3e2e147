"""What a grid of batch sizes, learning rates and seeds says of the surge law (P4, arXiv 2405.14578, Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightning_bsl.population.best_rates import ENDS, Best, By, Cells, Chosen, best_of, choose, within_steps
from lightning_bsl.schedules import NoiseScaling, ScalingRule, SurgeScaling
from lightning_bsl.theory import CurveFit, TradeoffFit, compare_curves, fit_noise_batch_size, fit_peak_lr, lr_curve
from lightning_bsl.theory.surge import Estimate

if TYPE_CHECKING:
    from lightning_bsl.population import Outcome  # loads torch

Word = Literal["falls", "does not fall", "undecided", "cannot be judged"]
T = TypeVar("T")

ABOVE = 3  # batch sizes above B_noise that a slope is taken of


class Curve(NamedTuple):
    """A curve with its peak as P4 takes it: B_noise is that of the steps.

    Attributes:
        name: As of `compare_curves`.
        rule: The curve.
        peak: eta_max.
        r2: R^2 of log(lr).
    """

    name: str
    rule: ScalingRule
    peak: Estimate
    r2: float


class Verdict(NamedTuple):
    """Whether the best rate falls beyond B_noise.

    Attributes:
        word: The answer.
        slope: Of log(best rate) against log B over the batch sizes above B_noise; nan where it is not judged.
        low: Lower end of its interval, over seeds and within the steps of the grid of rates.
        high: Upper end.
        law: The slope of the surge law over the same batch sizes.
        batch_sizes: Those.
    """

    word: Word
    slope: float = math.nan
    low: float = math.nan
    high: float = math.nan
    law: float = math.nan
    batch_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Surge:
    """What a grid says for one target. In place of a fit that cannot be made stands the reason.

    Args:
        target: The loss to reach.
        extra_steps: Over which the drop of the loss was measured.
        lrs: All rates, the columns of ``scores``.
        by: What makes a rate the best.
        scores: Mean drop of the loss for each batch size and rate, or 1 / mean steps; nan where fewer than half of the seeds
            reached the target.
        tried: Whether there are replicas, in the same shape.
        best: For each batch size.
        lacking: Replicas that are there, and that the whole grid has, of each batch size that lacks some.
        tradeoff: B_noise, S_min and E_min from the steps.
        line: The same by the paper's line.
        resampled: B_noise over resamples of the seeds: the ends of its interval, and the share that had none.
        curves: Curves of that B_noise.
        free: Curves that are free to take any.
        verdict: Whether the best rate falls beyond B_noise.
    """

    target: float
    extra_steps: int
    by: By
    lrs: NDArray[np.float64]
    scores: NDArray[np.float64]
    tried: NDArray[np.bool_]
    best: list[Best]
    lacking: dict[int, tuple[int, int]]
    tradeoff: TradeoffFit | str
    line: TradeoffFit | str
    resampled: tuple[float, float, float]
    curves: list[Curve] | str
    free: list[CurveFit] | str
    verdict: Verdict

    @property
    def measured(self) -> list[Best]:
        """The batch sizes whose best rate is no bound: those of the fits."""
        return [each for each in self.best if each.measured]


class Settings(NamedTuple):
    """Of the surge law: eta_max and B_noise, and whether the steps gave them (P4), or the rates alone."""

    peak_lr: float
    noise_batch_size: float
    from_steps: bool


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
    reached the target (P4); or that of the fewest mean steps, which few seeds tell apart more easily: a replica reaches its
    target where the loss happens to be low, and with small batches the way back up hides the drop. Intervals are percentiles
    over resamples of the seeds, the same for all batch sizes. Rates with fewer seeds than others of the same batch size are
    left out: the fastest replicas of a pass are there first. Best rates that are bounds are left out of all fits.

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
        >>> [best.lr for best in surge.best], round(surge.tradeoff.noise_batch_size.value)
        ([0.0028, 0.0038, 0.0038, 0.0028], 32)
    """
    known = {each.target for each in outcomes}
    if not outcomes or (unknown := set(targets) - known):
        raise ValueError(f"no outcomes of {f'the target {min(unknown)}' if outcomes else 'any target'}")
    if len(extra := {each.extra_steps for each in outcomes}) > 1:
        raise ValueError(f"drops of the loss over {sorted(extra)} steps cannot be compared: keep one")
    if not all(each.batch_size > 0 and 0 < each.lr < math.inf for each in outcomes):
        raise ValueError("batch sizes and learning rates must be above 0")
    seeds = sorted({each.seed for each in outcomes})
    draws = np.random.default_rng(seed).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=resamples)
    results = []
    for target in sorted(targets or known, reverse=True):
        of = [each for each in outcomes if each.target == target]
        results.append(_analyse(target, Cells(of, seeds, by), of, draws, fits, np.random.default_rng(seed + 1)))
    return results


def surge_settings(surge: Surge) -> Settings | None:
    """The settings of the surge law for a target; ``None`` where neither its steps nor its rates give any.

    Args:
        surge: Of the target.
    """
    if not isinstance(surge.curves, str):
        rule = surge.curves[0].rule
        assert isinstance(rule, SurgeScaling)
        return Settings(rule.peak_lr, rule.noise_batch_size, True)
    sizes = [each.batch_size for each in surge.measured]
    for each in surge.free if not isinstance(surge.free, str) else []:
        # a peak outside of what was measured is none that the rates have
        if isinstance(each.rule, SurgeScaling) and min(sizes) <= each.rule.noise_batch_size <= max(sizes):
            return Settings(each.rule.peak_lr, each.rule.noise_batch_size, False)
    return None


# --- fits


def _analyse(
    target: float,
    cells: Cells,
    outcomes: Sequence[Outcome],
    draws: NDArray[np.int64],
    fits: int,
    random: np.random.Generator,
) -> Surge:
    seeds = cells.there.shape[1]
    once, drawn = choose(cells, np.ones((1, seeds), dtype=np.int64)), choose(cells, draws)
    best = [best_of(cells, i, once, drawn, outcomes) for i in range(len(cells.sizes))]
    used = [i for i, each in enumerate(best) if each.measured]
    sizes, lrs = np.array([best[i].batch_size for i in used]), np.array([best[i].lr for i in used])
    steps, examples = (np.array([getattr(best[i], name) for i in used]) for name in ("steps", "examples"))
    tradeoff = _or_reason(lambda: fit_noise_batch_size(steps, examples))
    whole, number = seeds * len(cells.lrs), cells.there.sum(axis=(1, 2)).astype(int).tolist()
    return Surge(
        target,
        outcomes[0].extra_steps,
        cells.by,
        np.array(cells.lrs),
        np.where(np.isfinite(once.scores[:, 0]), once.scores[:, 0], math.nan),
        cells.there.max(axis=1) > 0,
        best,
        {size: (here, whole) for size, here in zip(cells.sizes, number) if here < whole},
        tradeoff,
        _or_reason(lambda: fit_noise_batch_size(steps, examples, method="line")),
        _resampled(tradeoff, sizes, drawn.steps[used], drawn.found[used], fits if seeds > 1 else 0),
        tradeoff if isinstance(tradeoff, str) else _or_reason(lambda: _curves(sizes, lrs, tradeoff)),
        _or_reason(lambda: compare_curves(sizes, lrs)),
        _judge(cells, best, once, drawn, tradeoff, random),
    )


def _or_reason(fit: Callable[[], T]) -> T | str:
    try:
        return fit()
    except (ValueError, ArithmeticError) as error:
        return str(error)


def _resampled(
    tradeoff: TradeoffFit | str, sizes: NDArray[np.int64], steps: NDArray[np.float64], found: NDArray[np.bool_], most: int
) -> tuple[float, float, float]:
    """B_noise over resamples of the seeds."""
    if isinstance(tradeoff, str) or not most:
        return math.nan, math.nan, math.nan
    fits = [_or_reason(partial(fit_noise_batch_size, s, s * sizes)) for s in steps[:, found.all(axis=0)].T[:most]]
    values = [fit.noise_batch_size.value for fit in fits if not isinstance(fit, str)]
    if not values:
        return math.nan, math.nan, 1.0
    low, high = np.quantile(values, ENDS)
    return float(low), float(high), 1 - len(values) / len(fits)


def _curves(sizes: NDArray[np.int64], lrs: NDArray[np.float64], tradeoff: TradeoffFit) -> list[Curve]:
    noise, total = tradeoff.noise_batch_size.value, float(np.log(lrs).var())
    curves = []
    for name, alpha in (("surge", None), ("alpha=1", 1.0), ("alpha=0.5", 0.5)):
        peak = fit_peak_lr(sizes, lrs, tradeoff, alpha=alpha)
        rule = SurgeScaling(peak.value, noise) if alpha is None else NoiseScaling(peak.value, noise, alpha)
        squares = float(np.mean(np.log(lrs / lr_curve(rule, sizes)) ** 2))
        curves.append(Curve(name, rule, peak, 1 - squares / total if total else math.nan))
    return curves


def _judge(
    cells: Cells,
    best_rates: Sequence[Best],
    once: Chosen,
    drawn: Chosen,
    tradeoff: TradeoffFit | str,
    random: np.random.Generator,
) -> Verdict:
    """The slope of the best rates above B_noise, and its interval.

    Not the ratio to the peak: whichever of several noisy rates is the largest, the others lie below it.
    """
    if isinstance(tradeoff, str):
        return Verdict("cannot be judged")
    noise = tradeoff.noise_batch_size.value
    above = [i for i, each in enumerate(best_rates) if each.measured and each.batch_size > noise]
    sizes = tuple(cells.sizes[i] for i in above)
    if len(above) < ABOVE:
        return Verdict("cannot be judged", batch_sizes=sizes)
    x = np.log(sizes)
    x -= x.mean()

    def slope(log_lrs: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(x @ log_lrs / (x @ x))

    logs = np.log(cells.lrs)
    best, law = (
        float(slope(values)) for values in (logs[once.place[above, 0]], np.log(lr_curve(SurgeScaling(1.0, noise), sizes)))
    )
    kept = drawn.found[above].all(axis=0)
    if len(cells.there[0]) < 2 or not kept.any():
        return Verdict("undecided", best, -math.inf, math.inf, law, sizes)
    # the best rate is known to half a step of the grid, whatever the seeds say
    rows = [within_steps(logs, cells.whole[i], drawn.place[i, kept], random) for i in above]
    low, high = (float(end) for end in np.quantile(slope(np.stack(rows)), ENDS))
    word: Word = "falls" if high < 0 else "does not fall" if low >= 0 or low > law else "undecided"
    # what is left out as a bound may speak against it: the best may have fallen below the rates, or risen above them
    against = {"falls": "highest", "does not fall": "lowest"}.get(word)
    if any(each.edge == against for each in best_rates if each.batch_size > noise):
        word = "undecided"
    return Verdict(word, best, low, high, law, sizes)
