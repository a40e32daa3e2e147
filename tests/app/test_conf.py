"""Every file under conf/ composes and instantiates."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer

from harness.configs import CHOICES, NEEDED, PLANNED, choices, compose_config
from harness.fits import quiet
from harness.tiers import diagonal
from lightning_bsl import BatchLRScheduler, BatchSizeDataModule
from lightning_bsl.app.compose import make_constants, make_plan, make_trainer
from lightning_bsl.theory import BoundConstants

OF_TRAIN = [(group, choice) for group, choice in CHOICES if group not in ("scale", "surge")]


# choices that have nothing to do with each other, each once; wandb may be missing
TOGETHER = {
    group: [choice for choice in choices(group) if choice != "wandb"]
    for group in ("callbacks", "data", "logger", "optimizer", "scheduler", "trainer")
}
ROWS = [{group: of[i] for group, of in TOGETHER.items() if i < len(of)} for i in range(max(map(len, TOGETHER.values())))]


@pytest.mark.quick(row=ROWS[::2])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.values()))
def test_choices_compose_and_instantiate_together(row: dict[str, str], tmp_path: Path) -> None:
    composes_and_instantiates(row, tmp_path)


# what stands in a scheduler is tried by `test_every_preset_takes_every_choice`
@pytest.mark.quick(group=["model", "scheduler/follow"])
@pytest.mark.quick(choice=["four_cases", "lr_growth", "wandb"])
@pytest.mark.parametrize("group, choice", OF_TRAIN)
def test_every_choice_composes_and_instantiates(group: str, choice: str, tmp_path: Path) -> None:
    composes_and_instantiates({group: choice}, tmp_path)


def composes_and_instantiates(row: dict[str, str], folder: Path) -> None:
    """Compose choices, by group, and make all that a run needs of them."""
    if "wandb" in row.values():
        pytest.importorskip("wandb")
    needed = [override for choice in row.values() for override in NEEDED.get(choice, ())]
    cfg = compose_config(*(f"{group}={choice}" for group, choice in row.items()), f"hydra.runtime.output_dir={folder}", *needed)
    scheduler = instantiate(cfg.scheduler)
    assert isinstance(scheduler, BatchLRScheduler)
    datamodule = instantiate(cfg.data)
    assert isinstance(datamodule, BatchSizeDataModule)
    if not any(group.startswith("scheduler/") for group in row):
        with torch.device("meta"):  # no time for 82M random numbers
            assert isinstance(instantiate(cfg.model), LightningModule)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gamma.*")  # linear and square-root scaling stand at or above the limit
        plan = make_plan(cfg, scheduler, datamodule)
    if row.get("scheduler", PLANNED[0]) in PLANNED:
        assert plan is not None
        assert "experiment" in row or plan.samples == cfg.trainer.max_epochs * datamodule.num_epoch_examples
    else:
        assert plan is None
    try:
        assert isinstance(make_trainer(cfg, scheduler), Trainer)
    except InstantiationException as error:  # no GPU here: Lightning's own word for it
        assert row.get("trainer") in ("gpu", "ddp"), error
        assert "CUDAAccelerator" in str(error) or "gpu" in str(error)


OVERRIDES = [f"{group}={choice}" for group, choice in CHOICES if group.startswith("scheduler/")]


# what Seesaw replaces is a decay inside its batch size
@pytest.mark.parametrize(
    "scheduler, override", diagonal([name for name in PLANNED if name not in ("seesaw", "plain_decay")], OVERRIDES)
)
def test_every_preset_takes_every_choice(scheduler: str, override: str) -> None:
    cfg = compose_config(f"scheduler={scheduler}", override)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(gamma|at its maximum).*")  # theory speaks against some of them
        plan = make_plan(cfg, instantiate(cfg.scheduler), instantiate(cfg.data))
    assert plan is not None
    assert plan.samples == 14 * 1440


FIRST_SIZES = [
    (("scheduler=constant", "scheduler.batch_size.start=16"), 16),
    (("scheduler=adaptive", "scheduler.batch_size=24"), 24),
    (("scheduler=seesaw",), 8),
    (("scheduler/batch_size=polynomial", "scheduler.batch_size.power=2"), 64),
    *(((f"scheduler/batch_size={choice}",), 32) for choice in ("milestones", "linear", "megatron", "sequence")),
]


@pytest.mark.parametrize("overrides, first", FIRST_SIZES)
def test_what_follows_starts_from_the_first_batch_size(overrides: tuple[str, ...], first: int) -> None:
    cfg = compose_config(*overrides, "scheduler/follow=adamw", "callbacks=batch_ema")
    rules = [*instantiate(cfg.scheduler).follow.values(), instantiate(cfg.callbacks.batch_ema).rule]
    assert [rule.base_batch_size for rule in rules] == [first] * 3
    given = compose_config(*overrides, "scheduler/follow=adamw", "scheduler.follow.betas.base_batch_size=12")
    assert [rule.base_batch_size for rule in instantiate(given.scheduler).follow.values()] == [12, 12]


@pytest.mark.parametrize("lr", ["cosine", "linear", "polynomial", "warmup_stable_decay", "warmup_linear", "sequence"])
def test_seesaw_takes_every_decay(lr: str) -> None:
    cfg = compose_config("scheduler=seesaw", f"scheduler/lr@scheduler.batch_size.lr={lr}")
    plan = make_plan(cfg, instantiate(cfg.scheduler), instantiate(cfg.data))
    assert plan is not None
    assert plan.stages[0].batch_size == 8
    assert plan.steps < 20_160 / 8


@pytest.mark.quick(epochs=[1], data=["digits"], scheduler=PLANNED[::2])
@pytest.mark.quick(epochs=[300], data=["cifar100"], scheduler=PLANNED[1::2])
@pytest.mark.parametrize("epochs", [1, 6, 300])
@pytest.mark.parametrize("scheduler", PLANNED)
@pytest.mark.parametrize("data", ["digits", "cifar100"])
def test_presets_fit_any_number_of_epochs(scheduler: str, epochs: int, data: str) -> None:
    if scheduler == "increasing_warmup" and epochs == 1:
        pytest.skip("a warm-up needs an epoch, and what follows it another")
    cfg = compose_config(f"scheduler={scheduler}", f"data={data}", f"trainer.max_epochs={epochs}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*at its maximum.*")  # the digits allow no more than 512
        plan = make_plan(cfg, instantiate(cfg.scheduler), instantiate(cfg.data))
    assert plan is not None
    assert plan.epochs == epochs


def test_case_iii_has_the_authors_stages() -> None:
    cfg = compose_config("data=cifar100", "trainer.max_epochs=300", "scheduler.lr.factor=1.292")
    plan = make_plan(cfg, instantiate(cfg.scheduler), instantiate(cfg.data))
    assert plan is not None
    assert [stage.batch_size for stage in plan.stages] == [8 * 2**m for m in range(10)]
    assert {stage.epochs for stage in plan.stages} == {30}
    assert plan.stages[-1].lr == pytest.approx(1.0, rel=0.005)


def test_no_data_are_needed_to_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = compose_config("data=tiny_imagenet", "data.samples_per_epoch=10000")
    plan = make_plan(cfg, instantiate(cfg.scheduler), instantiate(cfg.data))
    assert plan is not None
    assert plan.samples == 14 * 10_000


@pytest.mark.parametrize("rule", ["linear_scaling", "sqrt_scaling"])
@pytest.mark.parametrize("batch_size, base", [
    ("scheduler.batch_size.start=16", 16), ("scheduler/batch_size=milestones", 32), ("scheduler.batch_size=32", 32)
])  # fmt: skip
def test_scaling_starts_from_the_first_batch_size(rule: str, batch_size: str, base: int) -> None:
    cfg = compose_config(f"scheduler/lr={rule}", batch_size)
    scaling = instantiate(cfg.scheduler).schedule.lr
    assert (scaling.base_batch_size, scaling(base)) == (base, cfg.optimizer.lr)


@pytest.mark.parametrize("optimizer, peak", [("sgd", 0.5), ("adam", 0.005)])
def test_warmup_ends_at_five_times_the_rate_of_the_optimizer(optimizer: str, peak: float) -> None:
    for lr in ("warmup_constant", "warmup_cosine"):
        cfg = compose_config("scheduler=increasing_warmup", f"scheduler/lr={lr}", f"optimizer={optimizer}")
        assert instantiate(cfg.scheduler.lr).then.start == pytest.approx(peak)
        assert compose_config("scheduler.lr.then.start=0.3", f"scheduler/lr={lr}").scheduler.lr.then.start == 0.3


def test_optimal_growth_has_its_factor_and_takes_another() -> None:
    assert compose_config("scheduler=optimal_growth").scheduler.lr.factor == 1.4
    assert compose_config("scheduler=optimal_growth", "scheduler.lr.factor=1.3").scheduler.lr.factor == 1.3


@pytest.mark.parametrize("data", [data for data in choices("data") if data not in ("quadratic", "logistic")])
def test_every_data_set_takes_the_common_overrides(data: str) -> None:
    cfg = compose_config(f"data={data}", "data.root=DIR", "data.download=true", "data.samples_per_epoch=600", "seed=3")
    datamodule = instantiate(cfg.data)
    assert (str(datamodule.root), datamodule.download, datamodule.num_epoch_examples, datamodule.seed) == ("DIR", True, 600, 3)
    assert "batch_size" not in cfg.data  # the scheduler's business


def test_the_bound_needs_all_constants_or_none() -> None:
    assert make_constants(compose_config("data=cifar10")) is None
    given = [f"constants.{name}=2" for name in ("smoothness", "gradient_variance", "loss_gap")]
    assert make_constants(compose_config("data=cifar10", *given)) == BoundConstants(2, 2, 2)
    with pytest.raises(ValueError, match=r"constants\.loss_gap too"):
        make_constants(compose_config("data=cifar10", *given[:2]))
    with pytest.raises(InstantiationException, match="smoothness=-1"):
        make_constants(compose_config("data=cifar10", *given[1:], "constants.smoothness=-1"))


def test_problems_bring_their_model_and_constants() -> None:
    cfg = compose_config("data=quadratic", "model.smoothness=4", "data.gradient_variance=3", "model.loss_gap=2")
    assert make_constants(cfg) == BoundConstants(4, 3, 2)
    constants = make_constants(compose_config("data=logistic", "data.num_examples=200"))
    assert constants is not None
    assert 0 < constants.loss_gap < math.log(2)
    assert compose_config("data=quadratic", "model=logistic").model._target_.endswith("LogisticRegression")


@pytest.mark.quick(model=[["data=pydoc"]])
@pytest.mark.quick(optimizer=["SGD"])
@pytest.mark.parametrize("overrides, optimizer, lr", [
    ((), "AdamW", 0.001),
    (("optimizer=adam", "optimizer.betas=[0.0,0.0]"), "Adam", 0.001),
    (("optimizer=sgd",), "SGD", 0.1),
    (("optimizer.lr=0.1",), "AdamW", 0.1),
])  # fmt: skip
@pytest.mark.parametrize("model", [["data=pydoc"], ["data=pydoc", "model=gpt_tiny"], ["model=gpt_tiny", "data=pydoc"]])
def test_a_language_model_brings_its_optimizer_unless_told(
    overrides: tuple[str, ...], optimizer: str, lr: float, model: list[str]
) -> None:
    made = instantiate(compose_config(*model, *overrides).model).configure_optimizers()
    assert (type(made).__name__, made.defaults["lr"]) == (optimizer, lr)
    if "Adam" in optimizer:
        assert tuple(made.defaults["betas"]) == ((0.0, 0.0) if overrides[1:] else (0.9, 0.999))


def test_the_language_workload_of_the_surge_law() -> None:
    cfg = compose_config("experiment=surge_law", "data.samples_per_epoch=20000")
    datamodule, scheduler = instantiate(cfg.data), instantiate(cfg.scheduler)
    assert (datamodule.block_size, datamodule.vocab_size, cfg.optimizer._target_) == (128, 50257, "torch.optim.Adam")
    plan = make_plan(cfg, scheduler, datamodule)
    assert plan is not None
    assert (plan.epochs, [stage.batch_size for stage in plan.stages]) == (1, [4, 8, 16, 32, 64, 128])
    assert max(stage.lr or 0 for stage in plan.stages) == cfg.optimizer.lr  # at the noise scale, 64
    sign = compose_config("experiment=surge_law", "model=gpt_tiny", "data=pydoc", "optimizer.betas=[0.0,0.0]")
    assert instantiate(sign.model).configure_optimizers().defaults["betas"][1] == 0


@pytest.mark.parametrize("data", ["eli5", "pydoc", "text"])
def test_whole_documents(data: str) -> None:
    for overrides, tokens in ((), 32), (("data.pack=false",), None):
        datamodule = instantiate(compose_config(f"data={data}", "data.block_size=32", *overrides).data)
        assert (datamodule.tokens_per_sample, datamodule.block_size) == (tokens, 32)


@pytest.mark.parametrize("overrides", [("logger=none",), ("~logger", "~callbacks")])
def test_no_logger_and_no_callbacks(overrides: tuple[str, ...], tmp_path: Path) -> None:
    cfg = compose_config(*overrides, f"hydra.runtime.output_dir={tmp_path}")
    trainer = make_trainer(cfg, instantiate(cfg.scheduler))
    assert trainer.loggers == []


@pytest.mark.parametrize("overrides, samples", [
    (("+trainer.overfit_batches=2", "scheduler=constant"), 14 * 2 * 128),
    (("+trainer.overfit_batches=0.5", "trainer.limit_train_batches=3", "scheduler=constant"), 14 * 6 * 128),
    (("+trainer.overfit_batches=0.0", "trainer.limit_train_batches=3", "scheduler=constant"), 14 * 3 * 128),
    (("+trainer.fast_dev_run=true",), None),
    (("trainer.max_epochs=-1",), None),
    (("trainer.max_samples=5000",), 5000),
    (("scheduler.max_samples=5000", "trainer.max_epochs=-1", "scheduler=seesaw"), 5000),
    (("data=pydoc", "trainer.max_tokens=10000", "scheduler=constant"), 157),  # of 64 tokens
])  # fmt: skip
def test_plan_follows_the_arguments_of_the_trainer(overrides: tuple[str, ...], samples: int | None) -> None:
    cfg = compose_config(*overrides)
    plan = make_plan(cfg, instantiate(cfg.scheduler), instantiate(cfg.data))
    assert (plan and plan.samples) == samples


def test_batch_sizes_in_tokens_are_planned_as_they_are_trained(tmp_path: Path) -> None:
    overrides = (
        "data=pydoc",
        "data.pack=false",
        f"data.cache_dir={tmp_path}",
        "data.samples_per_epoch=60",
        "data.block_size=16",
    )
    unit = ("+scheduler.batch_size_unit=tokens", "scheduler=constant", "scheduler.batch_size.start=200")
    cfg = compose_config(*overrides, *unit, "trainer.max_epochs=2", "logger=none", "trainer.enable_progress_bar=false")
    scheduler, datamodule = instantiate(cfg.scheduler), instantiate(cfg.data)
    plan = make_plan(cfg, scheduler, datamodule)
    trainer = Trainer(**quiet(max_epochs=2, callbacks=[scheduler], limit_val_batches=0))
    trainer.fit(instantiate(cfg.model), datamodule)
    assert plan == scheduler.plan
    assert (plan.steps, plan.samples) == scheduler.progress[1:3] == (trainer.global_step, 120)
    packed = compose_config("data=pydoc", f"data.cache_dir={tmp_path}", *unit)
    with pytest.raises(ValueError, match=r"write `data.pack=false` for text"):
        make_plan(packed, instantiate(packed.scheduler), instantiate(packed.data))
