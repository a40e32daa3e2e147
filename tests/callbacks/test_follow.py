"""Constants of the optimizer that follow the batch size."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, lr_scheduler

from harness.configs import compose_config
from harness.data import own, regression
from harness.fits import fit
from harness.loops import whole_steps
from harness.modules import Recorder, assert_close, equal, mlp
from harness.tiers import diagonal
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler
from lightning_bsl.app.plan import _constants
from lightning_bsl.report import plan_table
from lightning_bsl.runs import read_metrics
from lightning_bsl.schedules import DecayTimescale, HalfLife, JointSchedule, Linear, Milestones, Progress, SqrtScaling, plan

N = 61
DATA = regression(N)
DOUBLING = Milestones([8, 16, 32], at=[4, 9], unit="step")  # the counts of steps, in float32, are exact
UNEVEN = Milestones([7, 12, 31, 5], at=[4, 9, 11], unit="step")
HALF_LIFE, TIMESCALE = HalfLife(8), DecayTimescale(8)
Rules = dict[str, Any]


def inverse(value: float, batch_size: int) -> float:
    """For eps: divided by the root of the growth."""
    return value / math.sqrt(batch_size / 8)


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices with weight decay and another rate, the rest without."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        {"params": matrices, "lr": 0.04, "betas": (0.8, 0.97)},
    ]


def module(make: Callable[..., Optimizer] = AdamW, **options: Any) -> Recorder:
    options = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-3} | options
    return Recorder(mlp(), lambda parameters: make(groups(parameters), **options))


class Sums:
    """Adam in plain terms: weighted sums of gradients and of their squares, and the sums of the weights."""

    def __init__(self, optimizer: Optimizer, decoupled: bool) -> None:
        self.groups, self.decoupled = optimizer.param_groups, decoupled
        self.own = [dict(group) for group in self.groups]
        self.sums: dict[Tensor, list[Any]] = {}

    @torch.no_grad()
    def step(self, rules: Rules, batch_size: int, growth: float = 1.0) -> None:
        for group in self.own:
            betas = [
                (rules.get("betas") or rules.get(f"beta{k}") or (lambda value, size: value))(beta, batch_size)
                for k, beta in enumerate(group["betas"], 1)
            ]
            decay, eps = (
                rules[name](group[name], batch_size) if name in rules else group[name] for name in ("weight_decay", "eps")
            )
            lr = group["lr"] * growth
            for parameter in group["params"]:
                gradient = parameter.grad.clone()
                if self.decoupled:
                    parameter -= lr * decay * parameter
                else:
                    gradient += decay * parameter
                m, v, top, n1, n2 = self.sums.get(parameter, [0, 0, torch.zeros_like(parameter), 0, 0])
                m, n1 = betas[0] * m + (1 - betas[0]) * gradient, betas[0] * n1 + 1 - betas[0]
                v, n2 = betas[1] * v + (1 - betas[1]) * gradient**2, betas[1] * n2 + 1 - betas[1]
                top = torch.maximum(top, v)
                self.sums[parameter] = [m, v, top, n1, n2]
                parameter -= lr * (m / n1) / (((top if group["amsgrad"] else v) / n2).sqrt() + eps)


def numbered(batch_size: Milestones, epochs: int = 3) -> Iterator[tuple[int, int, list[int]]]:
    """The steps: their number, their batch size and their examples."""
    number = 0
    for steps in whole_steps(batch_size, N, epochs):
        for indices in steps:
            yield number, int(batch_size(Progress(step=number))), indices
            number += 1


def by_hand(model: Recorder, rules: Callable[[int], Rules], batch_size: Milestones = DOUBLING) -> nn.Module:
    """Train with the rules that hold at each step."""
    optimizer: Optimizer = model.configure_optimizers()
    sums = Sums(optimizer, isinstance(optimizer, AdamW))
    for number, size, indices in numbered(batch_size):
        optimizer.zero_grad()
        model.loss(DATA[indices]).backward()
        sums.step(rules(number), size)
    return model.net


class Seen(Callback):
    """Notes the constants of each group at the start of each batch."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[tuple[float, ...], float]]] = []
        self.rates: list[tuple[float, ...]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.groups.append([(group["betas"], group["weight_decay"]) for group in groups])
        self.rates.append(tuple(group["lr"] for group in groups))


BETAS = {
    "both": {"betas": HALF_LIFE},
    "beta2": {"beta2": HALF_LIFE},
    "beta1": {"beta1": HALF_LIFE},
    "apart": {"beta1": lambda beta, size: beta ** (8 / size), "beta2": HALF_LIFE},
    "all": {"beta2": HALF_LIFE, "weight_decay": TIMESCALE, "eps": inverse},
}
MADE: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "loop": (AdamW, {"foreach": False}),
    "foreach": (Adam, {"foreach": True}),
    "fused": (AdamW, {"fused": True}),
    "amsgrad": (Adam, {"amsgrad": True}),
}


@pytest.mark.parametrize("name, kind", diagonal([*MADE], [*BETAS]))
def test_equals_a_plain_loop_with_the_sums_of_the_weights(name: str, kind: str) -> None:
    (make, options), rules = MADE[name], BETAS[kind]
    model, seen = module(make, **options), Seen()
    largest = 5 if kind == "beta2" else None  # micro-batches change nothing
    fit(model, own(DATA), BatchLRScheduler(DOUBLING, 0.02, largest, follow=rules), seen)
    assert_close(model.net, by_hand(module(make, **options), lambda number: rules), rtol=1e-12)
    # a rate is scaled inside a step, and only if the betas have different powers; between steps it is the scheduled one
    assert ({step.lrs for step in model.journal} == {(0.02, 0.04)}) == (kind == "both")
    assert set(seen.rates) == {(0.02, 0.04)}
    # the steps in the state are what makes the sums right
    counts = {float(state["step"]) for state in model.trainer.optimizers[0].state.values()}
    assert counts != {len(seen.groups)} or kind == "beta1"


@pytest.mark.parametrize("rules", [BETAS["both"], BETAS["beta2"]])
def test_any_growth(rules: Rules) -> None:
    """The state counts steps in float32, so other growths than powers of 2 are exact to float32."""
    model = module()
    fit(model, own(DATA), BatchLRScheduler(UNEVEN, 0.02, follow=rules))
    assert_close(model.net, by_hand(module(), lambda number: rules, UNEVEN), rtol=1e-6, atol=1e-7)


class Unfreezes(Callback):
    """Adds a group for a parameter of its own at the start of an epoch."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.late = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.optimizers[0].add_param_group({"params": [self.late], "weight_decay": 0.3})


@pytest.mark.parametrize("lr", [0.02, None])
def test_each_group_has_its_own_constants_and_they_are_logged(lr: float | None, tmp_path: Path) -> None:
    rules = {"betas": HALF_LIFE, "weight_decay": TIMESCALE}
    seen, logger = Seen(), CSVLogger(tmp_path, name="", version="")
    scheduler = BatchLRScheduler(DOUBLING, lr, follow=rules)
    callbacks = [Unfreezes(), scheduler][:: 1 if lr else -1]  # in any order
    fit(module(), own(DATA), *callbacks, seen, logger=logger, log_every_n_steps=1)
    sizes = [size for _, size, _ in numbered(DOUBLING)]
    assert len(seen.groups) == len(sizes)
    for number, (size, noted) in enumerate(zip(sizes, seen.groups)):
        expected = [((0.9, 0.99), 0.0), ((0.8, 0.97), 0.1), ((0.9, 0.99), 0.3)][: 2 + (number >= 6)]
        assert noted == [(HALF_LIFE(betas, size), TIMESCALE(decay, size)) for betas, decay in expected]
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "beta2" in row]
    logged = {(row["batch_size"], row["beta1"], row["beta2"], row["weight_decay"]) for row in rows}
    assert logged == {(size, HALF_LIFE(0.9, size), HALF_LIFE(0.99, size), TIMESCALE(0.1, size)) for size in (8, 16, 32)}
    assert scheduler.constants_at(16) == {
        "beta1": HALF_LIFE(0.9, 16), "beta2": HALF_LIFE(0.99, 16), "weight_decay": TIMESCALE(0.1, 16)
    }  # fmt: skip


ALL = {"beta2": HALF_LIFE, "weight_decay": TIMESCALE}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """The weights of a run of three epochs, and a checkpoint after each step and each epoch."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    model = module()
    fit(model, own(DATA), BatchLRScheduler(UNEVEN, 0.02, follow=ALL), saver, enable_checkpointing=True)
    return model.net, folder


# inside an epoch, at a change, at the end of an epoch, and at both
@pytest.mark.parametrize("step", [2, 4, 6, *(pytest.param(step, marks=pytest.mark.slow) for step in (9, 10, 11))])
def test_resumes_bit_for_bit(step: int, checkpoints: tuple[nn.Module, Path]) -> None:
    net, folder = checkpoints
    model = module()
    fit(model, own(DATA), BatchLRScheduler(UNEVEN, 0.02, follow=ALL), ckpt_path=folder / f"step={step}.ckpt")
    assert equal(model.net, net)


@pytest.mark.parametrize("before, after", diagonal([ALL, None], [None, {"betas": HALF_LIFE}, {"weight_decay": TIMESCALE}]))
def test_goes_on_with_other_rules(before: Rules | None, after: Rules | None, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    begun = BatchLRScheduler(DOUBLING, 0.02, follow=before)
    fit(module(), own(DATA), begun, saver, enable_checkpointing=True, max_epochs=2)
    model, seen = module(), Seen()
    fit(model, own(DATA), BatchLRScheduler(DOUBLING, 0.02, follow=after), seen, ckpt_path=tmp_path / "step=5.ckpt")
    reference = by_hand(module(), lambda number: (before if number < 5 else after) or {})
    assert_close(model.net, reference, rtol=1e-12)
    betas, decay = seen.groups[-1][1]
    assert betas == (HALF_LIFE((0.8, 0.97), 32) if after and "betas" in after else (0.8, 0.97))
    assert decay == (TIMESCALE(0.1, 32) if after and "weight_decay" in after else 0.1)


def test_a_second_fit_and_a_checkpoint_after_the_fit(tmp_path: Path) -> None:
    """The optimizer, kept by the module, begins with its own constants again."""
    model = module()
    optimizer = model.configure_optimizers()
    model.optimizer = lambda parameters: optimizer
    trainer = fit(model, own(DATA), BatchLRScheduler(DOUBLING, 0.02, follow=ALL), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    seen = Seen()
    fit(model, own(DATA), BatchLRScheduler(DOUBLING, 0.02, follow=ALL), seen, max_epochs=1)
    assert seen.groups[0] == [((0.9, 0.99), 0.0), ((0.8, 0.97), 0.1)]
    resumed, whole = module(), module()
    fit(resumed, own(DATA), BatchLRScheduler(DOUBLING, 0.02, follow=ALL), ckpt_path=tmp_path / "after.ckpt")
    fit(whole, own(DATA), BatchLRScheduler(DOUBLING, 0.02, follow=ALL))
    assert equal(resumed.net, whole.net)


def test_beside_a_scheduler_whose_rates_a_rule_multiplies() -> None:
    class Scheduled(Recorder):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.5)]

    model = Scheduled(mlp(), lambda parameters: AdamW(groups(parameters), lr=0.02, betas=(0.9, 0.99)))
    rule = SqrtScaling(1, base_batch_size=8)
    fit(model, own(DATA), BatchLRScheduler(DOUBLING, rule, follow=BETAS["beta2"]))
    reference = module(weight_decay=0.01, eps=1e-8)
    sums = Sums(reference.configure_optimizers(), decoupled=True)
    starts = [start for start, indices in enumerate(numbered(DOUBLING)) if len(indices[2]) < indices[1]]
    for number, size, indices in numbered(DOUBLING):
        reference.net.zero_grad()
        reference.loss(DATA[indices]).backward()
        epoch = sum(start < number for start in starts)
        sums.step(BETAS["beta2"], size, growth=0.5**epoch * rule.factor(size))
    assert_close(model.net, reference.net, rtol=1e-11)
    assert [group["lr"] for group in model.trainer.optimizers[0].param_groups] == [0.0025, 0.005]


def test_a_failed_step_leaves_rate_and_decay_as_they_are() -> None:
    class Failing(Recorder):
        def loss(self, batch: Any) -> Tensor:
            if self.trainer.global_step == 5:
                assert self.trainer.optimizers[0].param_groups[0]["lr"] != 0.02
                raise KeyError("data")
            return super().loss(batch)

    model = Failing(mlp(), lambda parameters: AdamW(parameters, lr=0.02))
    with pytest.raises(KeyError):
        fit(model, own(DATA), BatchLRScheduler(DOUBLING, 0.02, follow=BETAS["beta2"]))
    (group,) = model.trainer.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.01)


def test_constants_that_are_tensors_change_in_place() -> None:
    momentum, decay = torch.tensor(0.9), torch.tensor(0.25)
    model = Recorder(mlp(), lambda parameters: SGD(parameters, lr=0.02))

    class Tensors(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            (group,) = trainer.optimizers[0].param_groups
            group["momentum"], group["weight_decay"] = momentum, decay

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.limit_val_batches = 0

    scheduler = BatchLRScheduler(DOUBLING, 0.02, follow={"momentum": HALF_LIFE, "weight_decay": TIMESCALE})
    fit(model, own(DATA), Tensors(), scheduler)
    (group,) = model.trainer.optimizers[0].param_groups
    assert group["momentum"] is momentum and group["weight_decay"] is decay
    assert momentum.item() == pytest.approx(0.9**4) and decay.item() == 0.5


PLAIN: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-3}
SHARED = {
    "rate": (["lr"], {}, BETAS["beta2"]),
    "rate fused": (["lr"], {"fused": True}, BETAS["apart"]),
    "betas": (["betas"], {"foreach": False}, BETAS["both"]),
    "all": (["lr", "betas", "weight_decay"], {"foreach": False}, BETAS["all"]),
}


@pytest.mark.parametrize("kind", SHARED)
def test_groups_that_share_tensors(kind: str) -> None:
    """Torch puts a tensor that is given for all groups into each of them: the same one."""
    names, options, rules = SHARED[kind]
    tensors = {name: torch.tensor(PLAIN[name], dtype=torch.float64) for name in names}
    if "betas" in tensors:
        tensors["betas"] = tuple(tensors["betas"])  # type: ignore[assignment]

    def halves(**constants: Any) -> Recorder:
        return Recorder(mlp(), lambda each: AdamW([{"params": each[::2]}, {"params": each[1::2]}], **PLAIN | constants))

    model, reference = halves(**tensors, **options), halves()
    fit(model, own(DATA), BatchLRScheduler(DOUBLING, 0.02, follow=rules))
    assert_close(model.net, by_hand(reference, lambda number: rules), rtol=1e-9)
    assert [float(group["lr"]) for group in model.trainer.optimizers[0].param_groups] == [0.02, 0.02]


def test_the_adaptive_scheduler_follows_too() -> None:
    seen = Seen()
    scheduler = AdaptiveBatchLRScheduler(8, 0.02, lambda *_: True, maximum=32, check_every=4, follow=ALL)
    model = module()
    fit(model, own(DATA), scheduler, seen)
    for step, noted in zip(model.journal, seen.groups):
        size = next(s for s in (8, 16, 32) if len(step.examples) <= s and noted[1][1] == TIMESCALE(0.1, s))
        assert noted[1] == ((0.8, HALF_LIFE(0.97, size)), TIMESCALE(0.1, size))
    assert seen.groups[-1][1][1] == TIMESCALE(0.1, 32)


@pytest.mark.parametrize(
    ("follow", "error", "message"),
    [
        ([("betas", HALF_LIFE)], TypeError, "must map constants of the optimizer to rules"),
        ({"betas": 0.9}, TypeError, r"`follow\['betas'\]=0.9` is no rule"),
        ({"betas": HalfLife}, TypeError, "is no rule for a constant"),
        ({"betas": SqrtScaling(0.1, 8)}, TypeError, "is no rule for a constant"),
        ({"eps": DOUBLING}, TypeError, "is no rule for a constant"),
        ({"lr": HALF_LIFE}, ValueError, r"as `lr=SqrtScaling\(...\)`"),
        ({"betas": HALF_LIFE, "beta2": HALF_LIFE}, ValueError, "'betas' and another for 'beta2'"),
    ],
)
def test_what_is_no_follow(follow: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchLRScheduler(8, 0.1, follow=follow)


@pytest.mark.parametrize(
    ("make", "follow", "message"),
    [
        (SGD, {"betas": HALF_LIFE}, "'betas', but no param group .* write one of dampening, momentum, weight_decay"),
        (AdamW, {"decay": HALF_LIFE}, "write one of betas, eps, weight_decay"),
        (AdamW, {"beta3": HALF_LIFE}, "'beta3', but no param group"),
        (AdamW, {"amsgrad": HALF_LIFE}, "'amsgrad', but in AdamW this is False and no number"),
        (NAdam, {"betas": HALF_LIFE}, "the betas of NAdam cannot follow"),
        (torch.optim.RAdam, {"beta2": HALF_LIFE}, "the betas of RAdam cannot follow"),
        (torch.optim.Adamax, {"beta1": HALF_LIFE}, "the betas of Adamax cannot follow"),
        (torch.optim.Adam, {"weight_decay": TIMESCALE}, "the weight decay of Adam is a part of the gradient"),
        (torch.optim.RMSprop, {"weight_decay": TIMESCALE}, "the weight decay of RMSprop is a part of the gradient"),
        (AdamW, {"beta2": lambda value, size: value * size / 8}, r"gives 1.998 for a batch size of 16 \(own value 0.999\)"),
        (AdamW, {"beta2": lambda value, size: 0.0}, "above 0 and below 1"),
        (AdamW, {"weight_decay": lambda value, size: -value}, "0 or more"),
        (AdamW, {"eps": lambda value, size: math.inf}, "a finite number"),
        (AdamW, {"eps": lambda value, size: None}, "gives None"),
        (lambda parameters: SGD(parameters, momentum=0.9), {"momentum": lambda value, size: size}, "below 1"),
        (lambda parameters: SGD(parameters, weight_decay=2.0), {"weight_decay": HALF_LIFE}, "2.0 is no decay of one"),
    ],
)
def test_what_is_refused_before_training(make: Any, follow: Rules, message: str) -> None:
    model = Recorder(mlp(), make)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(model, own(DATA), BatchLRScheduler(DOUBLING, 0.1, follow=follow))
    assert not model.journal


def one_cycle(optimizer: Optimizer, **options: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40, **options)


@pytest.mark.parametrize(
    ("make", "schedule", "follow", "message"),
    [
        (AdamW, one_cycle, "betas", "OneCycleLR and `follow` would both set 'betas': write `cycle_momentum=False`"),
        (lambda p, lr: SGD(p, lr, momentum=0.9), one_cycle, "momentum", "both set 'momentum'"),
        (AdamW, one_cycle, "beta2", None),
        (AdamW, lambda optimizer: one_cycle(optimizer, cycle_momentum=False), "betas", None),
        (AdamW, lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), one_cycle(o)], [5]), "beta1", "both set"),
    ],
)
def test_a_scheduler_that_cycles_the_momentum(make: Any, schedule: Any, follow: str, message: str | None) -> None:
    class Cycled(Recorder):
        def configure_optimizers(self) -> Any:
            optimizer = make(self.net.parameters(), lr=0.01)
            return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]

    model, scheduler = Cycled(mlp()), BatchLRScheduler(DOUBLING, follow={follow: HALF_LIFE})
    if message is None:
        fit(model, own(DATA), scheduler)
        return
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        fit(model, own(DATA), scheduler)
    assert not model.journal


def test_something_else_that_sets_a_constant() -> None:
    class Sets(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.03

    scheduler = BatchLRScheduler(DOUBLING, 0.1, follow={"weight_decay": TIMESCALE})
    model = Recorder(mlp(), lambda parameters: AdamW(parameters, lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"'weight_decay' of a param group is 0\.03, but BatchLRScheduler set"):
        fit(model, own(DATA), scheduler, Sets(), logger=True, log_every_n_steps=1)


def test_a_group_that_is_added_while_the_rate_is_0() -> None:
    with pytest.raises(MisconfigurationException, match=r"with lr=0\.02 was added while the scheduled learning rate is 0"):
        fit(module(), own(DATA), BatchLRScheduler(31, Linear(0.0, 0.1, unit="step")), Unfreezes(epoch=0))


def test_a_rate_that_starts_at_0_keeps_the_ratios_of_the_groups() -> None:
    model = module()
    fit(model, own(DATA), BatchLRScheduler(31, Linear(0.0, 0.1, unit="step")))
    assert model.journal[0].lrs == (0, 0)
    assert all(second == 2 * first for first, second in (step.lrs for step in model.journal))


@pytest.mark.parametrize(("choice", "names"), [
    ("adamw", ["beta1", "beta2", "weight_decay"]), ("beta2", ["beta2"])
])  # fmt: skip
def test_the_plan_has_the_constants(choice: str, names: list[str], tmp_path: Path) -> None:
    cfg = compose_config("optimizer=adamw", "scheduler.batch_size.start=16", f"scheduler/follow={choice}")
    constants_at = _constants(cfg, instantiate(cfg.scheduler))
    half_life, timescale = HalfLife(16), DecayTimescale(16)
    values = {"beta1": half_life(0.9, 64), "beta2": half_life(0.999, 64), "weight_decay": timescale(0.01, 64)}
    assert constants_at(64) == {name: values[name] for name in names}
    doubled = plan(JointSchedule(Milestones([16, 64], at=[1]), 0.1), 128, epochs=2)
    doubled.to_csv(tmp_path / "plan.csv", constants_at)
    header, *_, last = (tmp_path / "plan.csv").read_text().split()
    assert header.split(",")[-len(names) :] == names
    assert [float(value) for value in last.split(",")[-len(names) :]] == [values[name] for name in names]
    assert [column.header for column in plan_table(doubled, constants_at).columns][-len(names) :] == names
    plain = compose_config("optimizer=adamw")
    assert _constants(plain, instantiate(plain.scheduler))(64) == {}
