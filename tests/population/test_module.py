"""A population against the same runs, one by one: by scripts/train.py and by plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from harness.configs import compose_config
from harness.fits import quiet
from lightning_bsl.app.train import train
from lightning_bsl.data import BatchSizeDataModule
from lightning_bsl.data.sampler import GlobalBatchSampler
from lightning_bsl.datasets import Digits
from lightning_bsl.models import Classifier, cnn5
from lightning_bsl.population import Outcome, Population, PopulationData
from lightning_bsl.population.forms import FORMS, Form, FormChoice
from lightning_bsl.schedules import Progress

CNN = ("data=digits", "model=cnn5", "+model.net.width=4", "optimizer=adam")
SIGN = "optimizer.betas=[0.0,0.0]"
Make = Callable[[int], LightningModule]
both_forms = pytest.mark.parametrize("form", FORMS)


def make_cnn(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(cnn5(image_size=8, width=4), 10)


def maker(cfg: DictConfig) -> Make:
    def make(seed: int) -> LightningModule:
        seed_everything(seed, verbose=False)
        model: LightningModule = instantiate(cfg.model)
        return model

    return make


def trained_alone(folder: Path, seed: int, lr: float, batch_size: int, steps: int, *overrides: str) -> dict[str, Tensor]:
    """What scripts/train.py has after some steps."""
    cfg = compose_config(
        *overrides,
        "scheduler=constant",
        f"scheduler.batch_size.start={batch_size}",
        f"seed={seed}",
        f"optimizer.lr={lr}",
        f"trainer.max_steps={steps}",
        "trainer.max_epochs=-1",
        "trainer.precision=64-true",
        "trainer.enable_progress_bar=false",
        "+trainer.limit_val_batches=0",
        "logger=none",
        f"output_dir={folder}",
    )
    train(cfg)
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def trained_together(
    make: Make, data: Any, replicas: Sequence[tuple[int, float]], steps: int, batch_size: int = 8, **options: Any
) -> Population:
    fit = {name: options.pop(name) for name in ("ckpt_path",) if name in options}
    trainer = {name: options.pop(name) for name in ("callbacks", "precision") if name in options}
    population = Population(make, replicas, batch_size, **{"targets": [0.01], "max_steps": 10**6} | options)
    trained = Trainer(**quiet(max_steps=steps, max_epochs=-1, **{"precision": "64-true"} | trainer))
    trained.fit(population, PopulationData(data, population.seeds, batch_size, probe=50), **fit)
    return population


def assert_equal(population: Population, index: int, state: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    found = population.replica_state_dict(index)
    assert len(found) > 4
    for name, value in found.items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# With the sign of the gradient a rate is the step of every weight. From 0.001, or with an eps below the rounding of the
# gradient's smallest entries, deep networks are chaotic: 1e-12 after one step grows tenfold with each.
@pytest.mark.parametrize("overrides, lr", [
    (CNN, 0.002),
    pytest.param((*CNN, SIGN), 0.002, marks=pytest.mark.slow),
    (("data=pydoc", "model=gpt_tiny", "optimizer=adam", "data.block_size=16"), 0.002),
    pytest.param(
        ("data=pydoc", "model=gpt_tiny", "optimizer=adam", SIGN, "data.block_size=16"), 0.0001, marks=pytest.mark.slow
    ),
    (("data=digits", "model=wide_resnet28_10", "+model.net.depth=10", "+model.net.widen_factor=1", "optimizer=adam"), 0.002),
    pytest.param(
        ("data=digits", "model=resnet18", "optimizer=adam", SIGN, "+optimizer.eps=0.001"), 0.0001, marks=pytest.mark.slow
    ),
], ids=["cnn5", "cnn5 sign", "gpt", "gpt sign", "BatchNorm", "resnet18 sign"])  # fmt: skip
def test_a_replica_is_the_run_of_the_train_script(overrides: tuple[str, ...], lr: float, tmp_path: Path) -> None:
    cfg = compose_config(*overrides)
    replicas = [(0, lr), (3, lr / 4)]
    index = 1 if lr < 0.001 else 0  # the other rate
    alone = trained_alone(tmp_path, *replicas[index], 6, 20, *overrides)
    for form in FORMS:
        together = trained_together(
            maker(cfg), instantiate(cfg.data), replicas, 20, batch_size=6, targets=[1e-9], betas=cfg.optimizer.betas,
            eps=cfg.optimizer.get("eps", 1e-8), form=form,
        )  # fmt: skip
        assert together.steps == 20
        assert_equal(together, index, alone)


@pytest.mark.parametrize("sign", [(), pytest.param((SIGN,), marks=pytest.mark.slow)])
def test_others_that_leave_change_nothing(sign: tuple[str, ...], tmp_path: Path) -> None:
    cfg = compose_config(*CNN, *sign)
    replicas = [(0, 1e200), (1, 1e-4), (2, 0.02), (1, 0.02)]  # the first diverges, the last two reach the target
    alone = trained_alone(tmp_path, 1, 1e-4, 8, 60, *CNN, *sign)
    for form in FORMS:
        outcomes: list[Outcome] = []
        together = trained_together(
            maker(cfg), instantiate(cfg.data), replicas, 60, betas=cfg.optimizer.betas, targets=[2.25], extra_steps=2,
            on_end=outcomes.extend, form=form,
        )  # fmt: skip
        assert [(each.seed, each.lr) for each in together.replicas] == [(1, 1e-4)]
        assert sorted(each.status for each in outcomes) == ["diverged", "reached", "reached"]
        assert_equal(together, 0, alone)


@both_forms
@pytest.mark.parametrize("betas", [(0.9, 0.999), pytest.param((0.0, 0.0), marks=pytest.mark.slow)])
def test_resumed_it_goes_on_as_if_uninterrupted(betas: tuple[float, float], form: Form, tmp_path: Path) -> None:
    options: dict[str, Any] = {"betas": betas, "targets": [2.25, 2.0], "extra_steps": 5, "form": form}
    replicas = [(0, 1e200), (0, 0.02), (1, 0.02), (1, 1e-4)]
    outcomes: dict[str, list[Outcome]] = {"whole": [], "first": [], "second": []}
    whole = trained_together(make_cnn, Digits(), replicas, 60, on_end=outcomes["whole"].extend, **options)
    # in the extra steps of some, after others have left
    reached = next(each.steps for each in outcomes["whole"] if each.status == "reached")
    first = trained_together(make_cnn, Digits(), replicas, reached + 2, on_end=outcomes["first"].extend, **options)
    assert any(each.pending for each in first.replicas) and len(first.replicas) < len(replicas)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = trained_together(
        make_cnn, Digits(), replicas, 60, on_end=outcomes["second"].extend, ckpt_path=tmp_path / "first.ckpt", **options
    )
    assert outcomes["first"] + outcomes["second"] == outcomes["whole"] or str(outcomes["first"] + outcomes["second"]) == str(
        outcomes["whole"]
    )
    assert [(each.seed, each.lr) for each in second.replicas] == [(each.seed, each.lr) for each in whole.replicas]
    for one, other in zip(second.stacked, whole.stacked):
        assert torch.equal(one, other)


def test_a_checkpoint_of_others_is_refused(tmp_path: Path) -> None:
    first = trained_together(make_cnn, Digits(), [(0, 0.01)], 2)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match="the checkpoint is of other replicas"):
        trained_together(make_cnn, Digits(), [(1, 0.01)], 4, ckpt_path=tmp_path / "first.ckpt")


def steps_alone(seed: int, lr: float, most: int, data: Digits, probe: Any) -> tuple[int, float] | None:
    """Steps to a loss of 2 and the drop in ten more, by a plain loop that always looks at the probe."""
    net = make_cnn(seed).net
    optimizer = torch.optim.Adam(net.parameters(), lr)
    step, check, reached, before = 0, 10, 0, math.nan
    for epoch in range(100):
        for indices in GlobalBatchSampler(1440, 16, lambda epoch=epoch: Progress(epoch=epoch), seed=seed):
            images, labels = data.on_after_batch_transfer(data.train_set.__getitems__(indices), 0)  # type: ignore[union-attr]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if step in (check, reached + 10):
                with torch.no_grad():
                    loss = nn.functional.cross_entropy(net(probe[0]), probe[1]).item()
                if reached and step == reached + 10:
                    return reached, before - loss
                if not reached and loss <= 2.0:
                    reached, before = step, loss
                if not reached and step == most:
                    return None
                check = min(step + max(1, step // 20), most)
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 25])
def test_steps_to_the_target_are_those_of_plain_loops(seeds: int) -> None:
    replicas = [(seed, lr) for lr in (0.02, 0.015, 0.01, 0.008) for seed in range(seeds)]
    probe = PopulationData(data := Digits(), [0], 16, probe=50).probe()
    alone = {replica: steps_alone(*replica, 100, data, probe) for replica in replicas}
    for form in (*FORMS, None):
        outcomes: list[Outcome] = []
        trained_together(
            make_cnn, Digits(), replicas, 5000, batch_size=16, targets=[2.0], max_steps=100, on_end=outcomes.extend,
            precision="32-true", form=form,
        )  # fmt: skip
        assert len(outcomes) == len(replicas)
        equal, reached = 0, 0
        for each in outcomes:
            of_it = alone[each.seed, each.lr]
            reached += each.status == "reached"
            if each.status == "reached" and of_it is not None:
                equal += (each.steps, each.loss_drop) == (of_it[0], pytest.approx(of_it[1], abs=1e-3))
            else:
                equal += (each.status, of_it) == ("not_reached", None)
        assert reached > 0.8 * len(replicas)
        assert equal >= 0.99 * len(replicas)


def test_what_diverges_is_noted_and_harms_nobody() -> None:
    outcomes: dict[str, list[Outcome]] = {"with": [], "without": []}
    healthy = [(0, 0.02), (1, 0.02)]
    for name, replicas in (("with", [healthy[0], (2, 1e200), healthy[1]]), ("without", healthy)):
        trained_together(make_cnn, Digits(), replicas, 300, targets=[2.2, 2.0], max_steps=300, on_end=outcomes[name].extend)
    diverged = [each for each in outcomes["with"] if each.seed == 2]
    assert [(each.target, each.status, each.steps) for each in diverged] == [(2.2, "diverged", 10), (2.0, "diverged", 10)]
    assert not any(math.isfinite(each.loss) for each in diverged)
    others = [each for each in outcomes["with"] if each.seed != 2]
    assert len(others) == len(outcomes["without"]) == 4
    for one, other in zip(sorted(others), sorted(outcomes["without"])):
        assert one[:7] == other[:7]
        assert (one.loss, one.loss_drop) == pytest.approx((other.loss, other.loss_drop), abs=1e-9)


def test_every_target_has_an_outcome() -> None:
    outcomes: list[list[Outcome]] = []
    together = trained_together(
        make_cnn, Digits(), [(0, 0.02), (0, 1e-5)], 10**6, targets=[1.5, 2.2, 2.0], max_steps=90, extra_steps=4,
        on_end=outcomes.append,
    )  # fmt: skip
    assert together.trainer.should_stop
    fast, slow = sorted(outcomes, key=lambda each: -each[0].lr)
    assert [each.target for each in fast] == [2.2, 2.0, 1.5]
    assert [each.status for each in fast] == ["reached"] * 3
    assert [each.steps for each in fast] == sorted(each.steps for each in fast)
    for each in fast:
        assert (each.examples, each.extra_steps, each.loss <= each.target) == (8 * each.steps, 4, True)
        assert math.isfinite(each.loss_drop)
    assert [(each.status, each.steps, math.isnan(each.loss_drop)) for each in slow] == [("not_reached", 90, True)] * 3


class Dropping(LightningModule):
    """Its loss in training is a random number for each replica, in evaluation none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.drop = nn.Dropout(0.5)

    def full_loss(self, batch: Any) -> Tensor:
        loss: Tensor = self.drop(self.weight).sum() + 0 * batch[0].sum()
        return loss


@both_forms
def test_each_replica_has_its_own_dropout(form: Form) -> None:
    sums: list[Tensor] = []

    class Noting(Population):
        def training_step(self, *arguments: Any) -> Tensor:
            loss = super().training_step(*arguments)
            sums.append(self.running_loss)  # after the first step these are its losses
            return loss

    torch.manual_seed(0)
    outcomes: list[Outcome] = []
    population = Noting(
        lambda seed: Dropping(), [(0, 1e-9), (0, 1e-9), (0, 1e-9)], 4, [1000.0], max_steps=20, extra_steps=3,
        on_end=outcomes.extend, form=form,
    )  # fmt: skip
    Trainer(**quiet(max_epochs=-1)).fit(population, PopulationData(Digits(), [0], 4, probe=20))
    assert len(sums[0].unique()) > 1  # equal weights, other masks
    assert len(sums) == 13  # the check after ten, and three more
    assert [each.loss for each in outcomes] == pytest.approx([64.0] * 3, rel=1e-4)  # none in evaluation
    assert population.trainer.should_stop


class Both(FormChoice):
    """Measures in every step, and takes the loop."""

    def of(self, replicas: int, seconds: Callable[[Form, int], float]) -> Form:
        assert all(seconds(form, number) > 0 for form in FORMS for number in {1, replicas})
        return "loop"


@pytest.mark.parametrize("make", [make_cnn, lambda seed: Dropping()], ids=["cnn5", "dropout"])
def test_a_measurement_changes_nothing(make: Make) -> None:
    states: list[dict[str, Tensor]] = []
    for form in ("loop", Both()):
        torch.manual_seed(0)
        together = trained_together(make, Digits(), [(0, 0.02), (1, 0.01)], 5, form=form)
        states.append(together.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("arguments, options, message", [
    ({"replicas": []}, {}, "0 replicas"),
    ({"targets": []}, {}, "0 targets"),
    ({"batch_size": 0}, {}, "`batch_size=0`"),
    ({"max_steps": 0}, {}, "`max_steps=0`"),
    ({"extra_steps": 0}, {}, "`extra_steps=0`"),
    ({"form": "vmap"}, {}, "`form='vmap'` must be one of loop, stacked"),
    ({"make": lambda seed: LightningModule()}, {}, r"no `full_loss\(batch\)`"),
    ({}, {"gradient_clip_val": 1.0}, "gradient_clip_val=None"),
    ({}, {"accelerator": "cpu", "devices": 2}, "devices=1"),
    ({"replicas": [(1, 0.1)]}, {}, r"give a PopulationData with seeds=\[1\]"),
    ({"batch_size": 5}, {}, "batch_size=5"),
])  # fmt: skip
def test_refusals(arguments: dict[str, Any], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"make": make_cnn, "replicas": [(0, 0.1)], "batch_size": 8, "targets": [1.0], "max_steps": 10} | arguments
    with pytest.raises((ValueError, TypeError), match=message):
        population = Population(**given)
        if options.pop("devices", 1) > 1:
            monkeypatch.setattr(Trainer, "world_size", 2)
        Trainer(**quiet(max_epochs=-1, **options)).fit(population, PopulationData(Digits(), [0], 8))


def test_mixed_half_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "precision", "16-mixed")
    with pytest.raises(ValueError, match="bf16-mixed"):
        Trainer(**quiet(max_epochs=-1)).fit(
            Population(make_cnn, [(0, 0.1)], 8, [1.0], max_steps=10), PopulationData(Digits(), [0], 8)
        )


@both_forms
def test_half_precision_trains(form: Form) -> None:
    outcomes: list[Outcome] = []
    trained_together(
        make_cnn, Digits(), [(0, 0.02), (1, 0.02)], 500, targets=[2.1], max_steps=500, on_end=outcomes.extend,
        precision="bf16-mixed", form=form,
    )  # fmt: skip
    assert [each.status for each in outcomes] == ["reached"] * 2


def test_in_half_precision_a_looped_replica_is_as_alone() -> None:
    """Autocast keeps converted weights: those of one replica must not serve the next."""
    replicas = [(0, 0.02), (1, 0.01)]
    options: dict[str, Any] = {"precision": "bf16-mixed", "form": "loop"}
    together = trained_together(make_cnn, Digits(), replicas, 5, **options)
    for index, replica in enumerate(replicas):
        alone = trained_together(make_cnn, Digits(), [replica], 5, **options)
        assert_equal(together, index, alone.replica_state_dict(0), tolerance=0)


# --- a mean over something else than examples


class Words(LightningModule):
    """Predicts the value of each row that is not 0; a row has one to four."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Linear(4, 4)

    def full_loss(self, batch: Any) -> Tensor:
        (x,) = batch
        wrong = (self.net(x) - 1).square() * (x != 0)
        return wrong.sum() / (x != 0).sum()

    def loss_terms(self, batch: Any) -> Tensor:
        return (batch[0] != 0).sum()


def uneven(empty: bool = False) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(60, 4, generator=generator) + 0.1
    lengths = torch.randint(1, 5, (60, 1), generator=generator)
    if empty:
        lengths[7] = 0
    return TensorDataset(x * (torch.arange(4) < lengths))


@both_forms
def test_the_running_mean_is_over_terms(form: Form) -> None:
    data, replicas = uneven(), [(0, 0.01), (0, 0.02), (5, 0.01)]
    population = trained_together(Words, BatchSizeDataModule(data), replicas, 30, 4, form=form)
    order: list[list[list[int]]] = [[], []]
    for steps, seed in zip(order, population.seeds):
        for epoch in range(3):
            steps += GlobalBatchSampler(60, 4, lambda epoch=epoch: Progress(epoch=epoch), seed=seed)
    for index, (seed, lr) in enumerate(replicas):
        model = Words(seed).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        running, seen = math.nan, 0.0
        for step in range(30):
            terms = [data[steps[step]][0].ne(0).sum().item() for steps in order]
            seen += sum(terms) / (2 * 4)
            batch = [data[order[seed > 0][step]][0].double()]
            optimizer.zero_grad()
            loss = model.full_loss(batch)
            loss.backward()
            optimizer.step()
            weight = min(1, terms[seed > 0] / (64 * seen / (step + 1)))
            running = loss.item() if step == 0 else running + weight * (loss.item() - running)
        for name, value in population.replica_state_dict(index).items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-9, atol=1e-9)
        assert population.running_loss[index].item() == pytest.approx(running, rel=1e-6)


def test_a_batch_without_terms_is_refused() -> None:
    with pytest.raises(ValueError, match="the batch of seed 0 has no loss terms"):
        trained_together(Words, BatchSizeDataModule(uneven(empty=True)), [(0, 0.01)], 60, 1)
