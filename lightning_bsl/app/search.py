"""`bsl-search`: find the growing schedule that trains best, as in `bsl-search data=digits search.trials=20`.

The same command with the same `hydra.run.dir=FOLDER` goes on with a search that was interrupted, or that is to have more
trials. One process at a time: a trial that no process has ended is taken for interrupted.
"""

from __future__ import annotations

import math
import shlex
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from lightning_bsl.app.commands import command
from lightning_bsl.app.compose import CONF, in_short, make_plan
from lightning_bsl.app.train import train
from lightning_bsl.report import console
from lightning_bsl.runs.folder import changes
from lightning_bsl.schedules.checks import check_whole, is_length

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.study import StudyDirection
    from optuna.trial import TrialState
    from sqlalchemy.exc import SQLAlchemyError  # which Optuna needs
except ModuleNotFoundError as missing:
    if missing.name != "optuna":
        raise
    raise SystemExit("bsl-search needs Optuna: pip install 'lightning_bsl[sweep]'") from missing

NAMES = ("b_0", "delta", "exponent", "every", "eta_0")
DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}


@hydra.main(version_base="1.3", config_path=CONF, config_name="search")
@in_short
def main(cfg: DictConfig) -> float:
    """Run the trials that are missing and print the best; returns the best value."""
    if cfg.trainer.get("devices", 1) != 1:  # the processes that Lightning starts would each begin a search of their own
        raise ValueError(f"trainer.devices={cfg.trainer.devices}: the trainings of a search have one device, trainer.devices=1")
    folder, fixed, ranges = Path(cfg.output_dir), _fixed_overrides(), _ranges(cfg.search)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _study(cfg.search)
    config = OmegaConf.to_yaml(compose("train", fixed))
    before = study.user_attrs.get("config")
    if before is None:
        study.set_user_attr("config", config)
    elif before != config:
        changed = changes(before, config)
        raise ValueError(f"{folder} holds a search with another configuration ({changed}); choose another folder")

    for interrupted in study.get_trials(states=(TrialState.RUNNING,)):
        if set(interrupted.params) == set(NAMES):
            _run(study, interrupted.number, interrupted.params, fixed, folder)
        else:  # interrupted before all was chosen
            study.tell(interrupted.number, state=TrialState.FAIL)
    while len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) < cfg.search.trials:
        # a seed for each trial: what is tried next depends on the trials before, not on whether they ran in one go
        seed = int(np.random.SeedSequence((cfg.search.seed, len(study.trials))).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = study.ask(ranges)
        _run(study, trial.number, trial.params, fixed, folder)
    return _report(study, cfg.dataset.metric, fixed)


def _study(search: DictConfig) -> optuna.Study:
    """The study, begun or gone on with."""
    direction = DIRECTIONS[search.direction]
    try:
        return optuna.create_study(storage=search.storage, study_name=search.study, direction=direction, load_if_exists=True)
    except (SQLAlchemyError, ImportError) as error:
        raise ValueError(
            f"`search.storage={search.storage!r}` cannot be opened ({error}): write the URL of a data base, such as sqlite:///FILE"
        ) from error


def _fixed_overrides() -> list[str]:
    """What the command line says of all the trainings."""
    overrides = [
        override
        for override in HydraConfig.get().overrides.task
        if not override.lstrip("+~").startswith(("search.", "scheduler="))
    ]
    if any(override.startswith("experiment=") for override in overrides):
        overrides.append("hydra.mode=RUN")  # many of them are sweeps, which the command printed at the end should not start
    return [*overrides, f"scheduler={HydraConfig.get().runtime.choices['scheduler']}"]


def _ranges(search: DictConfig) -> dict[str, BaseDistribution]:
    b_0, delta, exponent, every, eta_0 = _checked(search)
    length = IntDistribution if all(isinstance(end, int) for end in every) else FloatDistribution
    distributions: tuple[BaseDistribution, ...] = (
        CategoricalDistribution(b_0),
        FloatDistribution(delta[0], delta[1], log=True),
        FloatDistribution(exponent[0], exponent[1]),
        length(every[0], every[1]),
        FloatDistribution(eta_0[0], eta_0[1], log=True),
    )
    return dict(zip(NAMES, distributions))


def _checked(search: DictConfig) -> list[list[Any]]:
    """The ranges, in the order of their names.

    Raises:
        ValueError: One of them, or another setting of the search, is missing or cannot be right.
    """
    settings = OmegaConf.to_container(search, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    names = ("trials", "study", "storage", "direction", "seed", *NAMES)
    for name in map(str, settings):
        if name not in names:
            near = get_close_matches(name, names, 1)
            raise ValueError(
                f"`search.{name}` is no setting of a search: write {f'search.{near[0]}' if near else ', '.join(names)}"
            )
    for name in names:
        if name not in settings:
            raise ValueError(f"`search.{name}` is missing: write search.{name}=VALUE")
    check_whole("search.trials", settings["trials"])
    check_whole("search.seed", settings["seed"], least=0)
    for name in ("study", "storage"):
        if not isinstance(settings[name], str) or not settings[name]:
            raise ValueError(f"`search.{name}={settings[name]!r}` must be a text: write a name, or the URL of a data base")
    if str(settings["direction"]) not in DIRECTIONS:
        raise ValueError(f"`search.direction={settings['direction']!r}`: write {' or '.join(DIRECTIONS)}")
    values = settings["b_0"]
    if not (isinstance(values, list) and values and all(type(value) is int and value >= 1 for value in values)):
        raise ValueError(f"`search.b_0={values!r}` must be a list of batch sizes, each a whole number from 1 on")
    for name, what, fits in (
        ("delta", "finite numbers above 0", lambda end: 0 < end < math.inf),
        ("exponent", "finite numbers", math.isfinite),
        ("every", "lengths, both whole numbers from 1 on or both fractions below 1", is_length),
        ("eta_0", "finite numbers above 0", lambda end: 0 < end < math.inf),
    ):
        ends = settings[name]
        if not (
            isinstance(ends, list)
            and len(ends) == 2
            and all(type(end) in (int, float) and fits(end) for end in ends)
            and ends[0] <= ends[1]
            and (name != "every" or type(ends[0]) is type(ends[1]))
        ):
            raise ValueError(f"`search.{name}={ends!r}` must be two {what}, the smaller one first: write [FROM, TO]")
    return [settings[name] for name in NAMES]


def _schedule(params: dict[str, Any]) -> dict[str, str]:
    """A trial's overrides; rounded, so that what is printed is exactly what was run."""
    gamma = params["delta"] ** params["exponent"]
    values = {"batch_size": (params["b_0"], params["delta"]), "lr": (params["eta_0"], gamma)}
    return {
        f"scheduler.{of}.{name}": f"{value:.4g}" if isinstance(value, float) else str(value)
        for of, (start, factor) in values.items()
        for name, value in (("start", start), ("factor", factor), ("every", params["every"]))
    }


def _run(study: optuna.Study, number: int, params: dict[str, Any], fixed: list[str], folder: Path) -> None:
    """Train as a trial says, or go on with it, and tell the study."""
    schedule = [f"{name}={value}" for name, value in _schedule(params).items()]
    name = f"trial_{number:03d}"
    console().print(f"{name}: {' '.join(schedule)}", soft_wrap=True)
    cfg = compose("train", [*fixed, *schedule])
    cfg.output_dir = str(folder / name)
    if refusal := _refusal(cfg):
        value = math.nan
    elif (trained := train(cfg)) is None:
        raise ValueError(f"no {cfg.dataset.metric} was logged, by which the trials are judged; see `dataset.metric`")
    elif not math.isfinite(value := trained):
        refusal = f"it ended with {cfg.dataset.metric} = {value}"
    if refusal:
        console().print(f"{name} does not count: {refusal}", soft_wrap=True)
        study.set_user_attr(name, refusal)
        study.tell(number, state=TrialState.PRUNED)  # which the sampler takes for worse than any value
    else:
        study.tell(number, value)


def _refusal(cfg: DictConfig) -> str | None:
    """Why a trial's schedule cannot be run, if so."""
    datamodule = instantiate(cfg.data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_bsl")  # the fit plans again, and warns then
        try:
            make_plan(cfg, instantiate(cfg.scheduler), datamodule)
        except (ValueError, InstantiationException) as error:
            return str(error)
    return None


def _report(study: optuna.Study, metric: str, fixed: list[str]) -> float:
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    if not trials:
        reasons = sorted((name, reason) for name, reason in study.user_attrs.items() if name.startswith("trial_"))
        last = ": ".join(reasons[-1]) if reasons else f"search.trials={len(study.trials)}"
        raise ValueError(f"no trial counts, of {len(reasons)}; the last, {last}")
    maximise = study.direction is StudyDirection.MAXIMIZE
    best, *others = sorted(trials, key=lambda trial: -trial.values[0] if maximise else trial.values[0])[:5]
    table = Table("trial", metric, "b_0", "delta", "gamma", "every", "eta_0")
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for trial in (best, *others):
        b_0, delta, every, eta_0, gamma, _ = _schedule(trial.params).values()
        table.add_row(f"{trial.number:03d}", f"{trial.values[0]:.4g}", b_0, delta, gamma, every, eta_0)
    console().print(table)
    overrides = [*fixed, *(f"{name}={value}" for name, value in _schedule(best.params).items())]
    console().print(f"{command('bsl-train')} {shlex.join(overrides)}", soft_wrap=True, highlight=False)
    return float(best.values[0])
