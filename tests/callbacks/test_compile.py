"""``torch.compile``: two compilations serve all batch sizes, and no step runs uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from harness import fits
from harness.data import Stranger, own
from harness.modules import Recorder, assert_close
from lightning_bsl import BatchLRScheduler
from lightning_bsl.models import Classifier
from lightning_bsl.schedules import Milestones

N = 61  # a prime: no batch size but 1 divides it, so each epoch ends with a short batch
GROWING = [2, 3, 4, 5, 7, 9, 15, 20, 30, 60]  # N % size is 1 for most of them
FROM_ONE = [1, 2, 4, 5, 7, 9, 15, 20, 30, 60]
SHRINKING = GROWING[::-1]
JUMPING = [16, 2, 24, 1, 8, 40, 5, 30, 3, 12]


class Counter:
    """A backend of ``torch.compile`` that counts what it is asked for, and how often a training step calls it."""

    def __init__(self, backend: Callable[..., Any] | None = None) -> None:
        self.compilations = self.calls = 0
        self.backend = backend or (lambda graph, inputs: graph.forward)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled = self.backend(graph, inputs)
        training = torch.is_grad_enabled()
        if not any(node.op == "call_module" or "tanh" in str(node.target) for node in graph.graph.nodes):
            return compiled  # not of the network, but of what Lightning does when a module logs
        self.compilations += training

        def run(*arguments: Any) -> Any:
            self.calls += training
            return compiled(*arguments)

        return run


def mlp(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *extra, nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))


class Module(Recorder):
    """Its journal is written outside of what is compiled."""

    def __init__(self, net: nn.Module, logs: bool = False) -> None:
        super().__init__(net)
        self.logs = logs

    def batch(self, batch: dict[str, Tensor]) -> list[Tensor]:
        return list(batch.values())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.logs:
            self.log("train/loss", loss)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.note(batch, batch_idx)


class Sized(Classifier):
    sizes: list[int]

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.sizes = [*getattr(self, "sizes", []), len(batch[1])]


def examples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(N, 1, 4, 4, generator=generator), torch.randint(3, (N,), generator=generator))


def named(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, y = default_collate(rows)
    return {"x": x, "y": y, "index": torch.arange(len(y))}


def ours(**arguments: Any) -> Any:
    return own(examples(), examples(), eval_batch_size=25, **arguments)


def fit(model: Any, sizes: list[int], datamodule: Any = None, **arguments: Any) -> None:
    """Train an epoch with each size."""
    scheduler = BatchLRScheduler(Milestones(sizes, at=range(1, len(sizes))), 0.1, arguments.pop("max_device_batch_size", None))
    fits.fit(model, datamodule or ours(collate_fn=named), scheduler, max_epochs=len(sizes), **arguments)


@pytest.fixture(autouse=True)
def forget() -> None:
    torch._dynamo.reset()


def compiled_model(counter: Counter, net: nn.Module) -> tuple[Any, Any]:
    model = Module(net)
    return torch.compile(model, backend=counter), model


def compiled_model_that_logs(counter: Counter, net: nn.Module) -> tuple[Any, Any]:
    model = Module(net, logs=True)
    return torch.compile(model, backend=counter), model


def compiled_net(counter: Counter, net: nn.Module) -> tuple[Any, Any]:
    return (model := Module(torch.compile(net, backend=counter))), model


@pytest.mark.quick(way=[compiled_net], sizes=[FROM_ONE])
@pytest.mark.parametrize(
    ("way", "sizes"),
    [(compiled_net, sizes) for sizes in (GROWING, FROM_ONE, SHRINKING, JUMPING)]
    + [(compiled_model, GROWING), (compiled_model, JUMPING), (compiled_model_that_logs, GROWING)],
)
def test_a_users_module(way: Any, sizes: list[int]) -> None:
    model, module = way(counter := Counter(), mlp())
    fit(model, sizes)
    assert {*module.sizes} >= {1, *sizes}
    assert counter.compilations <= 2  # for one example, which torch always takes apart, and for all others
    assert counter.calls == len(module.sizes)


@pytest.mark.parametrize("way", [compiled_model, compiled_net])
def test_somebodys_datamodule(way: Any) -> None:
    model, module = way(counter := Counter(), mlp())
    fit(model, GROWING, Stranger(examples(), collate_fn=named))
    assert {*module.sizes} >= {1, *GROWING}
    assert counter.compilations <= 2
    assert counter.calls == len(module.sizes)


def test_a_module_compiled_for_one_size() -> None:
    # left to itself torch would compile each size and, from the eighth on, silently compile no more
    module = Module(torch.compile(mlp(), backend=(counter := Counter()), dynamic=False))
    fit(module, GROWING)
    assert counter.compilations <= 2
    assert counter.calls == len(module.sizes)


def test_micro_batches() -> None:
    model, module = compiled_net(counter := Counter(), mlp())
    fit(model, GROWING, max_device_batch_size=13)
    assert max(module.sizes) <= 13 and {1, 2, 3, 4, 5, 7, 9, 8, 10, 12} <= {*module.sizes}
    assert counter.compilations <= 2
    assert counter.calls == len(module.sizes)


def test_a_module_of_convolutions() -> None:
    # on a CPU torch chooses another convolution from 16 examples on, and compiles for it; here no batch has one example,
    # which would be the third
    sizes = [size for size in range(2, 40) if N % size != 1][::3]
    model, module = compiled_net(counter := Counter(), cnn())
    fit(model, sizes)
    assert len(set(module.sizes)) >= 10 and min(module.sizes) < 16 < max(module.sizes)
    assert counter.compilations <= 2
    assert counter.calls == len(module.sizes)


def test_a_constant_size_is_left_to_torch() -> None:
    shapes = []

    def note(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes.append(any(isinstance(each, torch.SymInt) for each in inputs))
        return graph.forward

    for sizes in ([16], [16, 32]):
        torch._dynamo.reset()
        fit(compiled_net(Counter(note), mlp())[0], sizes)
    assert shapes[0] is False and shapes[-1] is True


def classifier(counter: Counter, monkeypatch: pytest.MonkeyPatch, net: nn.Module) -> Sized:
    with monkeypatch.context() as context:
        context.setattr(torch, "compile", partial(torch.compile, backend=counter))
        model = Sized(net, num_classes=3, compile=True)
        model.configure_model()
    return model


@pytest.mark.quick(sizes=[GROWING, SHRINKING])
@pytest.mark.parametrize("sizes", [GROWING, FROM_ONE, SHRINKING, JUMPING])
def test_classifier(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = classifier(counter := Counter(), monkeypatch, mlp()), Sized(mlp(), num_classes=3)
    fit(model, sizes, ours())
    assert {*model.sizes} >= {1, *sizes}
    assert counter.compilations <= 2
    assert counter.calls == len(model.sizes)
    fit(plain, sizes, ours())
    assert_close(model, plain, rtol=1e-5, atol=1e-6)


def test_classifiers_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # a sweep: torch counts compilations by code object, and gives up silently at a limit, which is 8 if nobody sets it
    monkeypatch.setattr("torch._dynamo.config.cache_size_limit", 4)
    for _ in range(3):
        model = classifier(counter := Counter(), monkeypatch, mlp(nn.BatchNorm1d(8)))
        fit(model, [2, 7, 15, 30], ours(samples_per_epoch=60))
        assert 1 <= counter.compilations <= 2
        assert counter.calls == len(model.sizes)


@pytest.mark.slow
def test_classifier_with_the_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.compile_fx import compile_fx

    model = classifier(counter := Counter(compile_fx), monkeypatch, mlp())
    fit(model, FROM_ONE, ours())
    assert counter.compilations <= 2
    assert counter.calls == len(model.sizes)
