"""`bsl-surge-report`: best rates, B_noise and curves of a grid whose laws are known, and the page."""

from __future__ import annotations

import csv
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from harness.browser import browse, needs_browser, probed, skip_unless_it_starts
from harness.commands import run_script
from harness.configs import choices, compose_config
from harness.files import csv_rows
from lightning_bsl.app.surge_report import train_overrides
from lightning_bsl.population import Outcome, analyse_surge
from lightning_bsl.population.analysis import Surge, fitted_numbers
from lightning_bsl.report import surge_commands, surge_summary, write_surge_report
from lightning_bsl.report.surge_page import surge_findings
from lightning_bsl.schedules import NoiseScaling, ScalingRule, SurgeScaling
from lightning_bsl.theory import TradeoffFit, lr_curve

SCRIPT = "surge_report.py"
SIZES = [2, 4, 8, 16, 32, 64, 128, 256, 512]
LRS = [float(f"{0.001 * 1.25**i:.3g}") for i in range(11)]  # to 0.0093
NOISE, PEAK, LEAST = 32.0, 0.0042, 200.0


def grid(
    sizes: Sequence[int] = SIZES,
    lrs: Sequence[float] = LRS,
    seeds: int = 20,
    targets: Sequence[tuple[float, float]] = ((0.6, NOISE),),
    rule: Callable[[float], ScalingRule] = lambda noise: SurgeScaling(PEAK, noise),
    spread: float = 0.1,
    seed: int = 0,
) -> list[Outcome]:
    """Replicas that follow the laws of Li et al. 2024, arXiv 2405.14578, each target with its own B_noise."""
    random, outcomes = np.random.default_rng(seed), []
    for batch_size in sizes:
        for lr in lrs:
            for replica in range(seeds):
                for target, noise in targets:
                    off = (math.log(lr) - math.log(rule(noise)(batch_size))) ** 2
                    steps = round(LEAST * (1 + noise / batch_size) * (1 + off) * math.exp(spread * random.normal()))
                    drop = 0.2 / (1 + noise / batch_size) * (1 - off + spread * random.normal())
                    numbers = steps, steps * batch_size, target - 0.01, 10, drop
                    outcomes.append(Outcome(replica, batch_size, lr, target, "reached", *numbers))
    return outcomes


def changed(outcomes: Iterable[Outcome], status: str, where: Callable[[Outcome], bool]) -> list[Outcome]:
    gone = {"status": status, "loss_drop": math.nan, "loss": 0.9 if status == "not_reached" else math.nan}
    return [each._replace(**gone) if where(each) else each for each in outcomes]


def write(folder: Path, outcomes: Iterable[Outcome]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "replicas.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Outcome._fields)
        writer.writerows(outcomes)
    return folder


def one(outcomes: Sequence[Outcome], fits: int = 0) -> Surge:
    (surge,) = analyse_surge(outcomes, fits=fits)
    return surge


def fitted_sizes(surge: Surge) -> list[int]:
    sizes: list[int] = surge.best["batch_size"][surge.best["fitted"] == 1].tolist()
    return sizes


# --- the numbers


def test_the_laws_come_back() -> None:
    surge = one(grid(), fits=100)
    rule = SurgeScaling(PEAK, NOISE)
    assert fitted_sizes(surge) == SIZES
    for best in surge.best.itertuples():
        assert best.low <= best.lr <= best.high
        assert best.low / 1.3 < rule(best.batch_size) < best.high * 1.3  # no finer than the grid
        assert best.examples == best.steps * best.batch_size
        assert (best.seeds_reached, best.seeds) == (20, 20)
        assert (best.replicas_reached, best.replicas_not_reached, best.replicas_diverged) == (220, 0, 0)
    fit = surge.tradeoff
    assert isinstance(fit, TradeoffFit) and isinstance(surge.line, TradeoffFit)
    assert fit.noise_batch_size.low < NOISE < fit.noise_batch_size.high
    assert surge.resampled[0] < fit.noise_batch_size.value < surge.resampled[1]
    assert surge.resampled[2] == 0
    assert fit.min_steps.value == pytest.approx(LEAST, rel=0.1)
    assert surge.curves[0].peak.low < PEAK < surge.curves[0].peak.high
    assert [each.name for each in surge.curves] == ["surge", "alpha=1", "alpha=0.5"]
    assert surge.curves[0].r2 > 0.8 > surge.curves[1].r2
    assert surge.free[0].name == "surge"
    assert surge.verdict.word == "falls"
    assert surge.verdict.low < surge.verdict.law < surge.verdict.high < 0
    assert surge.verdict.batch_sizes == (64, 128, 256, 512)
    assert surge.settings is not None and surge.settings.from_steps
    assert surge.lacking == {}


def test_drops_and_steps_are_means_over_the_seeds_that_reached() -> None:
    outcomes = changed(grid(), "diverged", lambda each: each.seed % 2 == 1)
    for best in one(outcomes).best.itertuples():
        of = [each for each in outcomes if (each.batch_size, each.lr, each.status) == (best.batch_size, best.lr, "reached")]
        assert len(of) == best.seeds_reached == 10
        assert best.loss_drop == pytest.approx(np.mean([each.loss_drop for each in of]))
        assert best.steps == pytest.approx(np.mean([each.steps for each in of]))
        drops: dict[float, list[float]] = {}
        for each in outcomes:
            if each.batch_size == best.batch_size and each.status == "reached":
                drops.setdefault(each.lr, []).append(each.loss_drop)
        assert best.lr == max(drops, key=lambda lr: np.mean(drops[lr]))


def test_the_same_seeds_give_the_same_intervals() -> None:
    outcomes = grid(spread=1.0, seeds=5)
    same, again = one(outcomes, fits=20), one(list(reversed(outcomes)), fits=20)
    assert same.best.equals(again.best)
    assert (same.resampled, same.verdict) == (again.resampled, again.verdict)


def test_intervals_hold() -> None:
    held = [0, 0]
    for seed in range(20):
        fit = one(grid(lrs=LRS[2:10], seeds=10, seed=seed)).tradeoff
        assert isinstance(fit, TradeoffFit)
        held[0] += fit.noise_batch_size.low < NOISE < fit.noise_batch_size.high
        held[1] += fit.min_steps.low < LEAST * 1.01 < fit.min_steps.high  # a rate off by half a step costs about 1%
    assert min(held) >= 16


def test_no_interval_of_a_positive_quantity_goes_below_0() -> None:
    """Wide intervals: three batch sizes leave one degree of freedom, and few noisy seeds."""
    surges = [one(grid([8, 32, 128], seeds=3, spread=0.3, seed=seed), fits=20) for seed in range(5)]
    numbers = [number for number in fitted_numbers(surges) if number.what != "slope_above_noise"]
    assert {"noise_batch_size", "min_steps", "min_examples", "peak_lr"} <= {number.what for number in numbers}
    assert all(number.value > 0 and not number.low < 0 for number in numbers if not math.isnan(number.value))


@pytest.mark.parametrize("law, word", [
    (lambda noise: NoiseScaling(0.006, noise), "does not fall"),
    (lambda noise: NoiseScaling(0.006, noise, 0.5), "does not fall"),
    (lambda noise: SurgeScaling(PEAK, noise), "falls"),
])  # fmt: skip
def test_verdict(law: Callable[[float], ScalingRule], word: str) -> None:
    words = [one(grid(rule=law, seed=seed)).verdict.word for seed in range(3)]
    assert words == [word] * 3


def test_a_short_grid_is_not_judged() -> None:
    surge = one(grid(SIZES[:6]))  # one above B_noise
    assert surge.verdict.word == "cannot be judged" and len(surge.verdict.batch_sizes) < 3
    (said,) = [each for each in surge_findings(surge) if "cannot be judged" in each]
    more = [int(each) for each in re.findall(r"\d+", said.split("Add such as")[1])]
    assert more == pytest.approx([64, 128, 256], rel=0.3)


def test_noise_leaves_it_undecided() -> None:
    verdict = one(grid(spread=2.0, seeds=4)).verdict
    assert verdict.word == "undecided"
    assert verdict.low < verdict.law < 0 < verdict.high
    alone = one(grid(seeds=1, spread=0.0))
    assert alone.verdict.word == "undecided"
    assert alone.best["low"].isna().all()
    assert "one seed has no interval" in " ".join(surge_findings(alone))


def test_the_step_of_the_grid_is_part_of_the_interval() -> None:
    verdict = one(grid(lrs=[0.0001, 0.001, 0.003, 0.01, 0.1], spread=0.0, seeds=3)).verdict
    assert verdict.high - verdict.low > 0.3  # one rate is the best at all of them, for each seed
    assert verdict.word != "falls"


def test_bounds_may_speak_against_the_rest() -> None:
    outcomes = [each for each in grid() if each.batch_size != 256 or each.lr >= 0.0038]  # the best is 0.0026
    assert one(outcomes).verdict.word == "falls"  # and this may have fallen more
    flat = [each for each in grid(rule=lambda noise: NoiseScaling(0.004, 1.0)) if each.batch_size != 256 or each.lr >= 0.004]
    surge = one(flat)
    assert surge.best["edge"][SIZES.index(256)] == "lowest"
    assert surge.verdict.word == "undecided"
    assert "the bounds above it may speak against the rest" in " ".join(surge_findings(surge))


def test_the_fewest_steps_find_the_rates_where_noise_hides_the_drops() -> None:
    random = np.random.default_rng(0)
    outcomes = [each._replace(loss_drop=each.loss_drop - 2 * abs(random.normal())) for each in grid()]
    (surge,) = analyse_surge(outcomes, by="steps", fits=0)
    assert np.abs(np.log(surge.best["lr"] / lr_curve(SurgeScaling(PEAK, NOISE), SIZES))).max() < 1.5 * math.log(1.25)
    for best in surge.best.itertuples():
        of = [each for each in outcomes if (each.batch_size, each.lr) == (best.batch_size, best.lr)]
        assert best.steps == pytest.approx(np.mean([each.steps for each in of]))
        assert best.loss_drop == pytest.approx(np.mean([each.loss_drop for each in of]))
    assert surge.tradeoff is not None
    assert surge.tradeoff.noise_batch_size.low < NOISE < surge.tradeoff.noise_batch_size.high


# --- replicas that did not get there, and rates that end too soon


def test_failures_are_counted_and_left_out() -> None:
    outcomes = changed(grid(), "diverged", lambda each: each.lr > 0.005 and each.seed < 11)
    outcomes = changed(outcomes, "not_reached", lambda each: each.batch_size == 2)
    surge = one(outcomes)
    assert surge.best["lr"].max() <= 0.005
    counts = surge.best[["replicas_reached", "replicas_not_reached", "replicas_diverged"]].to_numpy().tolist()
    high = sum(lr > 0.005 for lr in LRS)
    assert counts == [[0, 220, 0]] + [[220 - 11 * high, 0, 11 * high]] * 8
    assert math.isnan(surge.best["lr"][0]) and fitted_sizes(surge) == SIZES[1:]
    assert np.isnan(surge.scores[:, -high:]).all() and surge.tried.all()
    said = " ".join(surge_findings(surge))
    assert f"1,980 replicas reached the loss 0.6, 220 did not, {8 * 11 * high} diverged" in said
    assert "B = 2: at no rate did half of the seeds reach it" in said


def test_nothing_was_reached() -> None:
    surge = one(changed(grid(), "not_reached", lambda each: True))
    assert fitted_sizes(surge) == [] and surge.settings is None
    assert "No B_noise from the steps: 0 points: at least 3 are needed" in " ".join(surge_findings(surge))


def test_a_best_rate_at_the_end_of_the_rates_is_a_bound() -> None:
    surge = one(grid(lrs=[lr for lr in LRS if 0.0025 < lr < 0.0045]))
    edges = dict(zip(surge.best["batch_size"], surge.best["edge"]))
    assert (edges[2], edges[32], edges[512]) == ("lowest", "highest", "lowest")
    assert fitted_sizes(surge) == [size for size, edge in edges.items() if not edge]
    said = " ".join(surge_findings(surge))
    assert re.search(r"B = 2,.* 512: the best rate is the lowest that was tried and reached it; try lower ones", said)
    assert re.search(r"32.*: the best rate is the highest that was tried; try higher ones\. It is a bound", said)
    given_up = one(changed(grid(), "not_reached", lambda each: each.lr < 0.0025))
    assert given_up.best["edge"][0] == "lowest"  # lower ones were tried, for too few examples


def test_a_grid_under_way() -> None:
    # the last batch size has its highest rates only, one of them in part
    whole = grid(seeds=10)
    some = [each for each in whole if each.batch_size < 512 or each.lr > LRS[7] or (each.lr == LRS[7] and each.seed < 4)]
    surge = one(some)
    assert surge.lacking == {512: (34, 110)}
    last = surge.best.iloc[-1]
    assert last["edge"] == "lowest" and last["lr"] == LRS[8]
    assert isinstance(surge.tradeoff, TradeoffFit) and surge.tradeoff.degrees == len(SIZES) - 3
    assert "B = 512: 34 of 110" in surge_summary([surge])[0]
    first = [each for each in whole if each.batch_size == 2 and each.lr == LRS[-1]][:1]
    assert len(surge_findings(one(first))) > 3


def test_rates_may_differ_between_batch_sizes() -> None:
    surge = one([*grid(SIZES[:4], LRS[::2]), *grid(SIZES[4:], LRS[1::2])])
    assert surge.scores.shape == (9, 11)
    assert surge.tried.sum() == 4 * 6 + 5 * 5
    assert surge.verdict.word == "falls"


def test_several_targets() -> None:
    targets = [(loss, 40 / loss**2) for loss in (1.0, 0.8, 0.6)]
    surges = analyse_surge(grid(targets=targets, spread=0.02), fits=0)
    assert [each.target for each in surges] == [1.0, 0.8, 0.6]
    said = surge_summary(surges)[-1]
    alpha = float(re.findall(r"alpha_B = ([\d.]+)", said)[0])
    assert alpha == pytest.approx(0.5, rel=0.15)
    assert [each.target for each in analyse_surge(grid(targets=targets), [0.6], fits=0)] == [0.6]
    assert "a power law needs three" in surge_summary(surges[1:])[-1]
    (*_, (what, command)) = surge_commands(surges[::-1])
    assert "0.6" in what and f"noise_batch_size={40 / 0.36:.3g}"[:19] in command


@pytest.mark.parametrize("outcomes, targets, said", [
    ([], [], "no outcomes"),
    (grid(seeds=1), [0.5], "0.5"),
    ([*grid(seeds=1), grid(seeds=1)[0]._replace(extra_steps=50)], [], r"\[10, 50\] steps"),
    ([grid(seeds=1)[0]._replace(lr=0.0)], [], "above 0"),
])  # fmt: skip
def test_what_cannot_be_analysed(outcomes: list[Outcome], targets: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        analyse_surge(outcomes, targets)


# --- the settings


def test_the_settings_compose() -> None:
    surge = one(grid())
    ((_, command),) = surge_commands([surge], ["data=digits", "model=cnn5", "optimizer.betas=[0.0,0.0]"])
    program, *overrides = shlex.split(command)
    assert program == "bsl-train"
    assert surge_commands([surge], train="python scripts/train.py")[0][1].startswith("python scripts/train.py optimizer=adam")
    cfg = compose_config(*overrides)
    settings = surge.settings
    assert settings is not None
    rule = instantiate(cfg.scheduler).schedule.lr
    assert isinstance(rule, SurgeScaling)
    assert rule.peak_lr == cfg.optimizer.lr == pytest.approx(settings.peak_lr, rel=0.01)
    assert rule.noise_batch_size == pytest.approx(settings.noise_batch_size, rel=0.01)
    assert list(cfg.optimizer.betas) == [0.0, 0.0]


def test_the_rates_alone_have_settings_too() -> None:
    outcomes = [each._replace(steps=100, examples=100 * each.batch_size) for each in grid()]
    surge = one(outcomes)
    assert surge.tradeoff is None and "trade-off" in surge.reasons["tradeoff"]
    assert surge.verdict.word == "cannot be judged"
    settings = surge.settings
    assert settings is not None and not settings.from_steps
    assert settings.noise_batch_size == pytest.approx(NOISE, rel=0.3)
    assert "by the rates alone" in surge_commands([surge])[0][0]


def hydra_folder(folder: Path, *overrides: str) -> None:
    """What Hydra leaves of a grid's configuration."""
    cfg = compose_config(*overrides, name="surge_grid")
    hydra = folder / ".hydra"
    hydra.mkdir(parents=True, exist_ok=True)
    (hydra / "hydra.yaml").write_text(OmegaConf.to_yaml({"hydra": {"runtime": {"choices": cfg.hydra.runtime.choices}}}))
    parts = [name for name in cfg if name != "hydra"]
    (hydra / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, parts)))


def test_the_settings_are_of_the_data_and_model_of_the_grid(tmp_path: Path) -> None:
    assert train_overrides(tmp_path) == []
    named = ["data=fashion_mnist", "model=cnn5"]
    hydra_folder(tmp_path, *named, "optimizer.lr=0.5", "seed=3")
    assert train_overrides(tmp_path) == named
    hydra_folder(
        tmp_path, *named, "+model.net.width=4", "data.root=a b", "data.samples_per_epoch=null", "optimizer.betas=[0.0,0.0]"
    )
    overrides = train_overrides(tmp_path)
    assert overrides[:2] == named
    assert sorted(overrides[2:]) == ['++data.root="a b"', "++model.net.width=4", "++optimizer.betas=[0.0, 0.0]"]
    ((_, command),) = surge_commands([one(grid())], overrides)
    cfg = compose_config(*shlex.split(command)[1:])
    assert (cfg.model.net.width, cfg.data.root, list(cfg.optimizer.betas)) == (4, "a b", [0.0, 0.0])
    (tmp_path / ".hydra" / "config.yaml").write_text("[")
    assert train_overrides(tmp_path) == named


@pytest.mark.slow
def test_what_a_preset_changes_is_part_of_the_settings(tmp_path: Path) -> None:
    for preset in choices("surge"):
        hydra_folder(tmp_path, f"surge={preset}")
        grid_config = OmegaConf.load(tmp_path / ".hydra" / "config.yaml")
        cfg = compose_config("optimizer=adam", *train_overrides(tmp_path))
        for node in ("data", "model"):
            assert OmegaConf.to_container(cfg[node]) == OmegaConf.to_container(grid_config[node]), preset


# --- the command


def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on figures are empty files, which saves most of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).touch())


def test_report_of_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = grid(targets=[(0.8, 20.0), (0.6, NOISE)], seeds=8, sizes=SIZES[:8])
    write(tmp_path, [each for each in outcomes if each.batch_size < 256 or each.seed < 3])
    hydra_folder(tmp_path, "data=fashion_mnist", "model=cnn5", "optimizer.betas=[0.0,0.0]")
    # the intervals of the fits are tested above; to draw as many seeds as usual takes most of the time
    monkeypatch.setattr("lightning_bsl.app.surge_report.analyse_surge", partial(analyse_surge, fits=20))
    assert run_script(SCRIPT, tmp_path, monkeypatch=monkeypatch) == 0
    out, printed = tmp_path / "report", capsys.readouterr().out
    last = printed.rstrip().splitlines()[-1]
    assert re.match(r"python \S*train.py data=fashion_mnist model=cnn5 ", last)  # as it was called
    assert "'++optimizer.betas=[0.0, 0.0]'" in last
    for said in ("not whole", "B = 256: 33 of 88", "Beyond B_noise the best rate", "No power law", "settings at a loss of 0.8"):
        assert said in printed, said
    page = (out / "surge.html").read_text()
    assert last in unescape(page)
    assert not re.search(r"https?://", page)
    assert set(re.findall(r'(?:src|href)="([^,"]*)', page)) == {"data:image/png;base64"}
    names = {f"{name}-{target}.png" for name in ("drop", "rates", "tradeoff") for target in (0.8, 0.6)} | {"noise.png"}
    assert {file.name for file in out.iterdir()} == names | {"surge.html", "surge.csv", "surge_fits.csv"}
    rows = csv_rows(out / "surge.csv")
    assert [(float(row["target"]), int(row["batch_size"])) for row in rows] == [(t, b) for t in (0.8, 0.6) for b in SIZES[:8]]
    best = analyse_surge([each for each in outcomes if each.batch_size < 256], fits=0)[1].best.iloc[0]
    assert (float(rows[8]["lr"]), float(rows[8]["steps"])) == (best["lr"], best["steps"])
    fits = {
        (row["target"], row["what"], row["fit"]): float(row["value"])
        for row in csv_rows(out / "surge_fits.csv")
        if row["value"]
    }
    assert fits["0.6", "noise_batch_size", "log"] == pytest.approx(NOISE, rel=0.3)
    undrawn(monkeypatch)
    assert run_script(SCRIPT, tmp_path, "--target=0.6", "--out", tmp_path / "again", monkeypatch=monkeypatch) == 0
    assert {row["target"] for row in csv_rows(tmp_path / "again" / "surge.csv")} == {"0.6"}


@pytest.mark.parametrize("outcomes", [
    grid(seeds=1)[:1],
    grid(SIZES[:2], seeds=2),
    grid(lrs=LRS[:1], seeds=2),
    changed(grid(seeds=2), "diverged", lambda each: True),
])  # fmt: skip
def test_too_little_is_said_not_thrown(
    outcomes: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(SCRIPT, write(tmp_path, outcomes), monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "No B_noise from the steps" in printed and "at least 3 are needed" in printed
    assert printed.rstrip().endswith("no settings: neither steps nor rates give a B_noise and a peak")
    assert "at least 3 are needed" in (tmp_path / "report" / "surge.html").read_text()


@pytest.mark.parametrize("arguments, messages", [
    (["nowhere"], ["nowhere/replicas.csv: no such file", "surge_grid.py"]),
    (["empty"], ["no replica in it yet"]),
    (["headless"], ["no replica in it yet"]),
    (["binary"], ["binary/replicas.csv"]),
    (["mixed"], ["[10, 50] steps"]),
    (["grid", "--target=0.5"], ["--target 0.5", "it has 0.6"]),
    (["grid", "--target=low"], ["--target", "low"]),
    (["grid", "--out=grid/replicas.csv"], ["not a folder"]),
    ([], ["DIR"]),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    arguments: list[str],
    messages: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes = grid(seeds=1)
    write(tmp_path / "grid", outcomes)
    write(tmp_path / "headless", [])
    write(tmp_path / "mixed", [*outcomes, outcomes[0]._replace(extra_steps=50)])
    for name, content in (("empty", b""), ("binary", b"\xff\xfe\x00")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "replicas.csv").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    assert run_script(SCRIPT, *arguments, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr().err
    for message in messages:
        assert message in printed
    assert sorted(tmp_path.rglob("*")) == before


# --- the page in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_unless_it_starts()
    outcomes = changed(grid(targets=[(0.8, 20.0), (0.6, NOISE)], seeds=8), "diverged", lambda each: each.lr > 0.008)
    overrides = ["data=fashion_mnist", "model=cnn5", "optimizer.betas=[0.0,0.0]"]
    return write_surge_report(analyse_surge(outcomes, fits=10), tmp_path_factory.mktemp("surge"), overrides)[0]


@needs_browser
@pytest.mark.quick(width=[390])
@pytest.mark.parametrize("width", [1280, 390])
def test_fits_the_window_and_works(width: int, page: Path, tmp_path: Path) -> None:
    found = probed(page, tmp_path, width, 'up: click(tables[0], "S"), down: click(tables[0], "S"),')
    assert found["width"] == [width, width]
    assert found["widest"] <= width  # type: ignore[operator]
    assert found["images"] == len(list(page.parent.glob("*.png"))) == 7
    assert found["scrolls"] == (width == 390)  # tables scroll, the page does not
    assert found["fetched"] == []
    for way, reverse in (("up", False), ("down", True)):
        rows, _ = found[way]  # type: ignore[misc]
        steps = [float(row[3].replace(",", "")) for row in rows]
        assert steps == sorted(steps, reverse=reverse)


@pytest.mark.slow  # test_page.py looks at the other page
@needs_browser
def test_it_is_to_be_seen(page: Path, tmp_path: Path) -> None:
    from PIL import Image

    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1280,1500", page.as_uri())
    image = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert ((image != 255).any(axis=2).mean(axis=1) > 0.01).mean() > 0.3  # from top to bottom there is something
