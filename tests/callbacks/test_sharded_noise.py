"""The gradient noise scale with parameters that `fully_shard` shards, against plain gradients of the same examples."""

from __future__ import annotations

import re
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset

from harness.data import own, regression
from harness.fits import fit
from harness.modules import Recorder, Step, filled
from harness.processes import Pair
from lightning_bsl import AdaptiveBatchLRScheduler, BatchLRScheduler, GradientNoiseScale, NoiseTarget
from lightning_bsl.schedules import Milestones, SqrtScaling

pytestmark = pytest.mark.skipif(torch.__version__ < "2.6", reason="gloo cannot scatter gradients before torch 2.6")

DATA = regression(97)


class Net(nn.Module):
    """Layers that do not divide by two, one used twice, one tied to it, one frozen, and a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.tied, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.tied.weight = self.hidden.weight
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        filled(self.double())

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.hidden(self.first(x).tanh()).tanh()).tanh()
        return self.last(self.frozen(self.tied(x)).tanh())


class Model(Recorder):
    """Sharded in configure_model.

    Args:
        kind: How, and what else is special.
    """

    def __init__(self, kind: str = "") -> None:
        super().__init__(Net(), partial(torch.optim.SGD, lr=0.05, momentum=0.9))
        self.kind = kind

    def configure_model(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        if self.kind == "copies":  # each process holds all
            mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        shard = partial(fully_shard, mesh=mesh, reshard_after_forward=self.kind != "kept")
        if self.kind != "root":
            shard(self.net.first)
            shard(self.net.last)
        if self.kind == "method":
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
            register_fsdp_forward_method(shard(self), "training_step")
        elif self.kind != "no root":
            shard(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.kind == "fails" and batch_idx == 4:  # the second micro-batch of a step
            raise ZeroDivisionError
        if self.kind == "no sync":  # add up whole gradients until the step is complete
            net: Any = self.net
            net.set_requires_gradient_sync((batch_idx + 1) % self.trainer.accumulate_grad_batches == 0)
        return super().training_step(batch, batch_idx)

    def loss(self, batch: Any) -> Tensor:
        if self.kind == "checkpoint":
            x, y, _ = batch
            return nn.functional.mse_loss(checkpoint(self.net, x, use_reentrant=False), y)
        if self.kind == "elsewhere":
            return super().loss(batch) + self.net.last.weight.full_tensor().square().sum()
        return super().loss(batch) * (self.scale if self.kind == "method" else 1)

    def configure_optimizers(self) -> Any:
        return self.optimizer(list((self.net.first if self.kind == "not trained" else self).parameters()))


class Noting(GradientNoiseScale):
    """Keeps every measurement."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"every": 1} | arguments)
        self.found: list[tuple[float, float]] = []

    def _record(self, estimate: Any) -> None:
        super()._record(estimate)
        self.found.append((estimate.sq_norm, estimate.variance))


def train(model: Model, *callbacks: Callback, data: Any = None, **arguments: Any) -> Model:
    """Fit on two processes."""
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    fit(model, data or own(DATA), *callbacks, **{"max_epochs": 1, "devices": 2, "strategy": strategy} | arguments)
    return model


def growing() -> BatchLRScheduler:
    """Shares of three and four examples, whole; then of six and seven, in two micro-batches each; at last of 5 and 6."""
    schedule = Milestones([7, 13], at=[3], unit="step")
    return BatchLRScheduler(schedule, SqrtScaling(0.05, 7), max_device_batch_size=4)


def accumulated() -> dict[str, Any]:
    """Lightning's own micro-batches, without a scheduler."""
    return {"data": DataLoader(Subset(DATA, range(96)), batch_size=4), "accumulate_grad_batches": 3}


def weights(model: Model) -> list[Any]:
    whole = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in model.net.parameters()]
    return [each.tolist() for each in whole]


def hooks(model: Model) -> int:
    """Of forward passes, and of the tensors that take part in them."""
    for layer in model.modules():
        if hasattr(layer, "unshard"):
            layer.unshard()
    watched = sum(len(each._backward_hooks or {}) for each in model.parameters())
    assert not any(hasattr(each, "placements") for each in model.parameters())
    return watched + sum(len(layer._forward_pre_hooks) for layer in model.modules())


def measured(kind: str, accumulate: bool) -> tuple[list[Step], list[tuple[float, float]], list[Any], bool]:
    """A run, and whether one without the callback ends with the same weights and the same hooks."""
    runs = []
    for noise in (Noting(), None):
        callbacks: list[Callback] = [] if accumulate else [growing()]
        options = accumulated() if accumulate else {}
        runs.append((train(Model(kind), *callbacks, *([noise] if noise else []), **options), noise))
    (model, noise), (without, _) = runs
    assert noise is not None
    same = weights(model) == weights(without) and hooks(model) == hooks(without)
    return model.journal, noise.found, weights(model), same


def by_hand(journal: list[Step]) -> tuple[list[tuple[float, float]], list[Any]]:
    """The estimates of McCandlish et al. (2018), appendix A.1, and the weights, of whole steps in plain PyTorch."""
    model = Model()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer, found = model.optimizer(trained), []
    for _, batches in groupby(sorted(journal, key=lambda batch: batch.step), key=lambda batch: batch.step):
        steps = list(batches)
        gradients = []
        for batch in steps:
            parts = torch.autograd.grad(model.loss(DATA[batch.examples]), trained, allow_unused=True)
            gradients.append([torch.zeros_like(p) if part is None else part for part, p in zip(parts, trained)])
        sizes = [len(batch.examples) for batch in steps]
        big = sum(sizes)
        small = big / len(sizes)  # the harmonic mean, where pieces count by their sizes
        of_step = [sum(n / big * each for n, each in zip(sizes, same)) for same in zip(*gradients)]
        big_norm = sum(each.square().sum().item() for each in of_step)
        small_norm = sum(n / big * sum(each.square().sum().item() for each in piece) for n, piece in zip(sizes, gradients))
        found.append((
            (big * big_norm - small * small_norm) / (big - small),
            (small_norm - big_norm) / (1 / small - 1 / big),
        ))  # fmt: skip
        for parameter, gradient in zip(trained, of_step):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = steps[0].lr
        optimizer.step()
    return found, weights(model)


@pytest.mark.quick(kind=["layers and root", "copies"])
@pytest.mark.parametrize("kind", ["layers and root", "root", "kept", "copies", "checkpoint"])
def test_two_processes_measure_what_plain_gradients_say(kind: str, pair: Pair) -> None:
    assert_right(pair(measured, kind, False), steps=3 + 6)


@pytest.mark.quick(kind=["no sync"])
@pytest.mark.parametrize("kind", ["", "no sync"])
def test_lightnings_accumulation(kind: str, pair: Pair) -> None:
    assert_right(pair(measured, kind, True), steps=4)


def assert_right(results: list[Any], steps: int) -> None:
    (journal, found, ended, same), (others, found_too, ended_too, same_too) = results
    assert same and same_too
    assert found == found_too and ended == ended_too
    expected, wanted = by_hand([*journal, *others])
    assert len(found) == steps
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    for one, other in zip(ended, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def watch_others(kind: str) -> tuple[list[int], int, int, list[int]]:
    """Two fits with validation, which leaves parameters whole; a fit that fails; a trigger that uses the measurement."""

    class Again(Model):
        sharded = False

        def configure_model(self) -> None:
            if not self.sharded:
                super().configure_model()
            self.sharded = True

    model, noise, counts = Again(kind), Noting(every=2), []
    for _ in range(2):
        train(model, growing(), noise, data=own(DATA, DATA), val_check_interval=3, num_sanity_val_steps=1)
        counts.append(len(noise.found))
    fails = Model("fails")
    with pytest.raises(ZeroDivisionError):
        train(fails, growing(), Noting())
    scheduler = AdaptiveBatchLRScheduler(8, 0.05, NoiseTarget(factor=20, within=100), maximum=30, check_every=2)
    train(Model(), scheduler, Noting(), max_epochs=2)
    return counts, hooks(model), hooks(fails), [segment.batch_size for segment in scheduler.segments]


def test_what_else_happens_in_a_fit(pair: Pair) -> None:
    for counts, after, after_failure, sizes in pair(watch_others, "kept"):
        assert counts == [4, 8]
        assert after == after_failure == 3  # those of `fully_shard`
        assert sizes == [8, 30]


def measure_rounded(kind: str, precision: str) -> list[tuple[float, float]]:
    """The first step, with the same examples and weights."""
    model, noise = Model(kind), Noting()
    model.net.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    plugin = {"plugins": MixedPrecision(precision, "cpu", scaler)} if precision == "16-mixed" else {"precision": precision}
    strategy = {"strategy": "ddp_find_unused_parameters_true"} if kind == "ddp" else {}
    train(model, growing(), noise, data=own(regression(97, dtype=torch.float32)), max_steps=4, **plugin | strategy)
    return noise.found


@pytest.mark.quick(precision=["16-mixed"])
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("16-mixed", 1e-2), ("bf16-mixed", 0.05)])
def test_precisions_as_with_ddp(precision: str, tolerance: float, pair: Pair) -> None:
    sharded, whole = (pair(measure_rounded, kind, precision)[0] for kind in ("", "ddp"))
    assert len(sharded) == 4
    np.testing.assert_allclose(sharded, whole, rtol=tolerance)


# --- refusals


def refusal(kind: str, parallel: int = 1) -> str:
    """What both processes are told."""
    strategy = ModelParallelStrategy(data_parallel_size=2 // parallel, tensor_parallel_size=parallel)
    with pytest.raises(MisconfigurationException) as error:
        train(Model(kind), growing(), Noting(), strategy=strategy)
    return str(error.value)


REFUSALS = {
    "no root": r"a parameter of shape \(3,\) is not sharded over all 2 processes.*call `fully_shard`",
    "not trained": r"8 parameters require gradients, and the optimizer has 2 of them.*`requires_grad_\(False\)`",
    "elsewhere": r"uses a process.s part of a parameter.*`module\(...\)`: use them there",
    "method": r"8 parameters have gradients, and GradientNoiseScale saw those of 7.*`module\(...\)`: use them there",
}


def test_refusals(pair: Pair) -> None:
    for kind, message in REFUSALS.items():
        for told in pair(refusal, kind):
            assert re.search(message, told), told
    for told in pair(refusal, "tensor", 2):
        assert "`tensor_parallel_size=2` no process computes whole gradients" in told


def test_one_process_is_not_probed() -> None:
    strategy: Any = ModelParallelStrategy.__new__(ModelParallelStrategy)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 1)}
    stub: Any = SimpleNamespace(strategy=strategy, optimizers=[], world_size=1)
    module = Recorder(nn.Identity())
    GradientNoiseScale(probe_every=None).on_fit_start(stub, module)
    with pytest.raises(MisconfigurationException, match=r"`probe_every=100`.*write `probe_every=None`"):
        GradientNoiseScale().on_fit_start(stub, module)
