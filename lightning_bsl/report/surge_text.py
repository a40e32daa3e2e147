"""What a grid says of the surge law, in sentences, and the settings that follow."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import OmegaConf
from rich.table import Table

from lightning_bsl.population.analysis import ABOVE, Surge, Verdict, surge_settings
from lightning_bsl.report.markup import number
from lightning_bsl.schedules import SurgeScaling
from lightning_bsl.theory import CriticalBatchFit, CurveFit, Estimate, fit_critical_batch_size

_DECIDES = 2.0  # a smaller difference of AICc decides nothing


def surge_table(surges: Sequence[Surge]) -> Table:
    """A row for each target, for the terminal.

    Args:
        surges: Of the targets.
    """
    table = Table("loss", "batch sizes", "reached", "B_noise", "S_min", "peak rate", "R² of surge", "beyond B_noise")
    for each in surges:
        fit, curves = each.tradeoff, each.curves
        none = "" if isinstance(fit, str) else number(fit.min_steps.value)
        table.add_row(
            number(each.target),
            f"{len(each.measured)} of {len(each.best)}",
            f"{share(each):.0%}",
            "" if isinstance(fit, str) else interval(fit.noise_batch_size),
            none,
            "" if isinstance(curves, str) else interval(curves[0].peak),
            "" if isinstance(curves, str) else f"{curves[0].r2:.2f}",
            each.verdict.word,
        )
    return table


def share(surge: Surge) -> float:
    """The share of the replicas that reached the target."""
    counts = [best.counts for best in surge.best]
    return sum(each["reached"] for each in counts) / sum(sum(each.values()) for each in counts)


def interval(of: Estimate) -> str:
    """An estimate with its interval.

    Example:
        >>> interval(Estimate(412.0, 20.0, 350.0, 480.0))
        '412 [350; 480]'
    """
    value, low, high = (number(float(f"{each:.3g}")) for each in of[:1] + of[2:])
    return f"{value} [{low}; {high}]"


def surge_summary(surges: Sequence[Surge]) -> list[str]:
    """All that is said of a grid, target by target.

    Args:
        surges: Of the targets.
    """
    return [*unfinished(surges), *(said for each in surges for said in surge_findings(each)), *noise_finding(surges)]


def unfinished(surges: Sequence[Surge]) -> list[str]:
    """What the grid lacks of being whole.

    Args:
        surges: Of the targets.
    """
    lacking = {size: counts for each in surges for size, counts in each.lacking.items()}
    if not lacking:
        return []
    listed = "; ".join(f"B = {size}: {here:,} of {whole:,}" for size, (here, whole) in sorted(lacking.items()))
    return [
        f"The grid is not whole. Replicas there, of as many as all seeds and rates make: {listed}. Rates with fewer seeds than "
        "others of the same batch size are left out."
    ]


def surge_findings(surge: Surge) -> list[str]:
    """What a grid says for a target, a sentence or two each.

    Args:
        surge: Of the target.
    """
    counts = {status: sum(best.counts[status] for best in surge.best) for status in ("reached", "not_reached", "diverged")}
    said = [
        f"{counts['reached']:,} of {sum(counts.values()):,} replicas reached the loss {number(surge.target)}, "
        f"{counts['not_reached']:,} did not, {counts['diverged']:,} diverged."
    ]
    if none := [best.batch_size for best in surge.best if math.isnan(best.lr)]:
        said.append(f"{_listed(none)}: at no rate did half of the seeds reach it.")
    for edge, why in (
        ("lowest", "was tried and reached it; try lower ones, or more examples"),
        ("highest", "was tried; try higher ones"),
    ):
        if sizes := [best.batch_size for best in surge.best if best.edge == edge]:
            said.append(f"{_listed(sizes)}: the best rate is the {edge} that {why}. It is a bound, and left out of the fits.")
    said += [_noise(surge), *_curves(surge), _beyond(surge)]
    best = surge.free[0] if not isinstance(surge.free, str) else None
    ahead = best is not None and best.name != "surge" and _lead(surge.free, "surge") >= _DECIDES
    if surge_settings(surge) is not None and (ahead or surge.verdict.word == "does not fall"):
        said.append("The settings are of the surge law all the same.")
    return said


def _noise(surge: Surge) -> str:
    fit, (low, high, without) = surge.tradeoff, surge.resampled
    if isinstance(fit, str):
        return f"No B_noise from the steps: {fit}."
    seeds = ""
    if low < high:  # one seed has no spread
        seeds = f"; over resamples of the seeds [{low:.3g}; {high:.3g}]"
        seeds += f", {without:.0%} of them without any" if without else ""
    line = surge.line if isinstance(surge.line, str) else f"the paper's line has {interval(surge.line.noise_batch_size)}"
    return (
        f"B_noise is {interval(fit.noise_batch_size)} by the steps at {fit.degrees + 2} batch sizes{seeds}; {line}. "
        f"S_min is {interval(fit.min_steps)}."
    )


def _curves(surge: Surge) -> list[str]:
    said = []
    if not isinstance(surge.curves, str):
        law, *others = surge.curves
        rest = ", ".join(f"{each.name} {each.r2:.2f}" for each in others)
        said.append(
            f"With this B_noise the surge law peaks at a rate of {interval(law.peak)}; its R² of log(rate) is "
            f"{law.r2:.2f}, for comparison {rest}."
        )
    if isinstance(surge.free, str):
        return [*said, f"No curves of the rates alone: {surge.free}."]
    best = surge.free[0]
    near = [each.name for each in surge.free[1:] if each.aicc - best.aicc < _DECIDES]
    if near:
        which = f"{best.name} is ahead of {' and '.join(near)} by less than {_DECIDES:g} of AICc: the rates do not tell which"
    else:
        which = f"{best.name} is ahead of the next, {surge.free[1].name}, by {surge.free[1].aicc - best.aicc:.1f} of AICc"
    sizes = [each.batch_size for each in surge.measured]
    peak = next(each.rule.noise_batch_size for each in surge.free if isinstance(each.rule, SurgeScaling))
    where = f"at B = {peak:.3g}" if min(sizes) <= peak <= max(sizes) else "outside of the batch sizes"
    return [*said, f"Of curves that take any B_noise, {which}. The surge law, so fitted, peaks {where}."]


def _lead(free: Sequence[CurveFit] | str, name: str) -> float:
    """By how much of AICc the best curve is ahead of another."""
    return 0.0 if isinstance(free, str) else next(each.aicc for each in free if each.name == name) - free[0].aicc


def _beyond(surge: Surge) -> str:
    verdict, fit = surge.verdict, surge.tradeoff
    if isinstance(fit, str):
        return "Whether the best rate falls beyond B_noise cannot be judged without a B_noise."
    noise = fit.noise_batch_size.value
    more = ", ".join(f"{noise * factor:.0f}" for factor in (2, 4, 8))
    bounds = any(best.edge and best.batch_size > noise for best in surge.best)
    if verdict.word == "cannot be judged":
        rates = ", and rates beyond those that are bounds" if bounds else ""
        return (
            "Whether the best rate falls beyond B_noise cannot be judged: it is known at "
            f"{len(verdict.batch_sizes)} batch sizes above, and {ABOVE} are needed. Add such as B = {more}{rates}."
        )
    evidence = _evidence(verdict)
    if verdict.word == "undecided":
        if math.isinf(verdict.low):
            return f"Whether the best rate falls beyond B_noise is undecided: one seed has no interval. {evidence}."
        if verdict.high < 0 or verdict.low > verdict.law:  # but for the bounds it would be decided
            return (
                f"Whether the best rate falls beyond B_noise is undecided: the bounds above it may speak against the rest. "
                f"{evidence}. Add rates beyond those that are bounds."
            )
        return (
            f"Whether the best rate falls beyond B_noise is undecided. {evidence}. More seeds, finer rates or larger batches, "
            f"up to {noise * 8:.0f}, would tell."
        )
    if verdict.word == "does not fall" and verdict.low < 0:
        return f"Beyond B_noise the best rate does not fall, or by less than the surge law says. {evidence}."
    return f"Beyond B_noise the best rate {verdict.word}. {evidence}."


def _evidence(verdict: Verdict) -> str:
    ends = "" if math.isinf(verdict.low) else f" [{verdict.low:.2f}; {verdict.high:.2f}]"
    return (
        f"It goes as B to the power of {verdict.slope:.2f}{ends} from B = {verdict.batch_sizes[0]} to "
        f"{verdict.batch_sizes[-1]} ({len(verdict.batch_sizes)} batch sizes); the surge law has {verdict.law:.2f} there"
    )


def _listed(sizes: Iterable[int]) -> str:
    return f"B = {', '.join(map(str, sizes))}"


# --- over the targets


def noise_against_loss(surges: Sequence[Surge]) -> CriticalBatchFit | str:
    """The power law of B_noise against the loss, or why there is none.

    Args:
        surges: Of the targets.
    """
    known = [(each.target, each.tradeoff.noise_batch_size.value) for each in surges if not isinstance(each.tradeoff, str)]
    try:
        return fit_critical_batch_size([loss for loss, _ in known], [noise for _, noise in known])
    except ValueError as error:
        if len(known) < 3:
            return f"{len(known)} losses have a B_noise: a power law needs three"
        return str(error)


def noise_finding(surges: Sequence[Surge]) -> list[str]:
    """How B_noise changes with the loss, where there are several targets.

    Args:
        surges: Of the targets.
    """
    known = [each for each in surges if not isinstance(each.tradeoff, str)]
    if len(known) < 2:
        return []
    values = ", ".join(
        f"{number(each.tradeoff.noise_batch_size.value)} at a loss of {number(each.target)}"
        for each in known
        if not isinstance(each.tradeoff, str)
    )
    law = noise_against_loss(surges)
    if isinstance(law, str):
        return [f"B_noise is {values}. No power law of the loss: {law}."]
    return [
        f"B_noise is {values}. As a power of the loss: B_* = {interval(law.coefficient)}, alpha_B = {interval(law.alpha)}. All "
        "targets are of the same runs, so the points are not independent and the intervals too narrow."
    ]


# --- settings


def train_overrides(folder: str | Path) -> list[str]:
    """What else ``scripts/train.py`` needs to train as the grid did: its data, model and betas; none where that is not known.

    Args:
        folder: Of the grid.
    """
    hydra = Path(folder) / ".hydra"
    found = []
    try:
        choices = OmegaConf.select(OmegaConf.load(hydra / "hydra.yaml"), "hydra.runtime.choices") or {}
        named = [(group, str(choices.get(group))) for group in ("experiment", "data", "model")]
        found += [f"{group}={choice}" for group, choice in named if re.fullmatch(r"[\w.-]+", choice) and choice != "None"]
        found += [
            each for each in map(str, OmegaConf.load(hydra / "overrides.yaml")) if re.match(r"\+{0,2}(data|model)\.", each)
        ]
        betas = OmegaConf.select(OmegaConf.load(hydra / "grid.yaml"), "grid.betas")
        if betas and list(betas) != [0.9, 0.999]:
            found.append(f"optimizer.betas=[{','.join(map(str, map(float, betas)))}]")
    except Exception:  # files of another version, or none: what is known so far
        pass
    return found


def surge_command(surge: Surge, overrides: Sequence[str] = ()) -> str | None:
    """The command that trains with the settings of a target; ``None`` where it has none.

    Args:
        surge: Of the target.
        overrides: Further ones, as of `train_overrides`.
    """
    settings = surge_settings(surge)
    if settings is None:
        return None
    given = [
        *overrides,
        "optimizer=adam",
        f"optimizer.lr={_plain(settings.peak_lr)}",
        "scheduler=surge",
        f"scheduler.lr.noise_batch_size={_plain(settings.noise_batch_size)}",
    ]
    return shlex.join(["python", "scripts/train.py", *given])


def surge_commands(surges: Sequence[Surge], overrides: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What each command is, and the command; the one to take last: that of the lowest loss, where a run is the longest.

    Args:
        surges: Of the targets.
        overrides: Further ones, as of `train_overrides`.
    """
    commands = []
    for each in sorted(surges, key=lambda each: -each.target):
        settings, command = surge_settings(each), surge_command(each, overrides)
        if settings is not None and command is not None:
            source = "" if settings.from_steps else ", by the rates alone"
            commands.append((f"settings at a loss of {number(each.target)}{source}", command))
    return commands


def _plain(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"
