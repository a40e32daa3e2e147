"""What trained before on a mean over examples trains the same today: digests of weights, from a journal.

The journal has the digests of one machine's arithmetic, or of several. This command adds those of the machine at hand; where
there are none the tests are skipped. `WRITE_DIGESTS=1 pytest -n0 tests/integration/test_bitwise.py`
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from harness.cases import GROWING, SHRINKING
from harness.data import own, regression
from harness.fits import out_of_memory, trained
from harness.modules import Recorder, Regression, mlp
from harness.processes import Pair
from lightning_bsl import BatchLRScheduler, GradientNoiseScale
from lightning_bsl.models import CausalLM, distilgpt2

JOURNAL = Path(__file__).with_name("digests.json")
DATA, VALIDATION = regression(61), regression(9)
CPU = Path("/proc/cpuinfo")
CPU_MODEL = re.search(r"model name\s*: (.*)", CPU.read_text()) if CPU.exists() else None
MACHINE = (
    f"torch {torch.__version__}, {CPU_MODEL[1] if CPU_MODEL else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
)


class Single(Recorder):
    """Float32, dropout, AdamW."""

    def __init__(self) -> None:
        net = mlp(nn.Dropout(0.2), dtype=torch.float32)
        super().__init__(net, lambda parameters: torch.optim.AdamW(parameters, lr=0.01))


class Limited(Single):
    """Has memory for nine examples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) > 9:
            raise out_of_memory()
        return super().training_step(batch, batch_idx)


def single() -> Any:
    return own(regression(61, dtype=torch.float32), regression(9, dtype=torch.float32))


def text() -> Any:
    tokens = torch.randint(50, (40, 12), generator=torch.Generator().manual_seed(0))
    return own(TensorDataset(tokens), collate_fn=lambda rows: torch.stack([row[0] for row in rows]))


def language_model() -> CausalLM:
    return CausalLM(distilgpt2(vocab_size=50, n_positions=12, n_layer=1, n_embd=8, n_head=2))


def strangers_loader() -> Any:
    return DataLoader(DATA, batch_size=8, shuffle=True)


CASES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "whole": (Regression, lambda: own(DATA), lambda: BatchLRScheduler(GROWING, 0.05), {}),
    "shrinking in micro-batches": (Regression, lambda: own(DATA), lambda: BatchLRScheduler(SHRINKING, 0.05, 4), {}),
    "float32, clipped": (Single, single, lambda: BatchLRScheduler(GROWING, None, 5), {"gradient_clip_val": 0.5}),
    "auto": (Limited, single, lambda: BatchLRScheduler(GROWING, 0.02, "auto"), {}),
    "windows": (Regression, strangers_loader, lambda: BatchLRScheduler(GROWING, 0.05), {"accumulate_grad_batches": 3}),
    "text": (language_model, text, lambda: BatchLRScheduler(GROWING, 0.01, 4), {"max_epochs": 2}),
    "bf16": (Single, single, lambda: BatchLRScheduler(GROWING, 0.02, 4), {"precision": "bf16-mixed"}),
}


def digest(module: nn.Module) -> str:
    """Of all weights, bit for bit."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def train(name: str, **options: Any) -> str:
    """The digest of what a case trains."""
    make, data, scheduler, arguments = CASES[name]
    torch.manual_seed(7)
    model: LightningModule = make()
    return digest(trained(model, data(), scheduler(), GradientNoiseScale(every=3), **arguments, **options))


def check(name: str, found: str) -> None:
    journal = json.loads(JOURNAL.read_text()) if JOURNAL.exists() else {}
    if os.environ.get("WRITE_DIGESTS"):
        journal.setdefault(MACHINE, {})[name] = found
        JOURNAL.write_text(json.dumps(journal, indent=1, sort_keys=True) + "\n")
    elif MACHINE not in journal:
        pytest.skip(f"the journal has no digests of {MACHINE}")
    assert journal[MACHINE][name] == found


@pytest.mark.filterwarnings("ignore:out of memory with micro-batches")
@pytest.mark.parametrize("name", CASES)
def test_weights(name: str) -> None:
    check(name, train(name))


@pytest.mark.parametrize("name", ["whole", "shrinking in micro-batches"])
def test_weights_of_two_processes(name: str, pair: Pair) -> None:
    found = pair(train, name, devices=2, strategy="ddp")
    assert found[0] == found[1]
    check(f"{name}, two processes", found[0])
