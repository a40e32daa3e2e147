"""The language model, driven by Lightning's Trainer and by the library's callbacks."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity
from transformers import BatchEncoding

from harness import fits
from harness.fits import quiet
from lightning_bsl import BatchLRScheduler, BatchSizeDataModule, FullGradientNorm, GradientNoiseScale
from lightning_bsl.datasets import TokenBlocks
from lightning_bsl.datasets.text import identity
from lightning_bsl.models import CausalLM, distilgpt2
from lightning_bsl.runs import read_metrics
from lightning_bsl.schedules import Exponential, Warmup
from lightning_bsl.theory.noise_scale import estimate_noise

VOCABULARY, LENGTH = 40, 6


def blocks(number: int, seed: int = 0) -> TokenBlocks:
    return TokenBlocks(np.random.default_rng(seed).integers(VOCABULARY, size=number * LENGTH, dtype=np.uint16), LENGTH)


class Data(BatchSizeDataModule):
    tokens_per_sample, vocab_size = LENGTH, VOCABULARY

    def __init__(self, train: int = 61, **options: Any) -> None:
        super().__init__(
            blocks(train), blocks(21, seed=1), blocks(10, seed=2), collate_fn=identity, eval_batch_size=8, **options
        )


def make(dropout: float = 0.0, optimizer: Any = None, **sizes: int) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_layer": 2, "n_embd": 8, "n_head": 2} | sizes
    return CausalLM(distilgpt2(dropout=dropout, **sizes), optimizer)


def fit(model: CausalLM, *callbacks: Callback, folder: Path | None = None, data: Data | None = None, **options: Any) -> Trainer:
    logger = CSVLogger(folder, name="", version="") if folder else False
    options = {"max_epochs": 1, "log_every_n_steps": 1} | options
    return fits.fit(model, data or Data(), *callbacks, logger=logger, **options)


def tokens(data: TokenBlocks | Any) -> Tensor:
    found: Tensor = data.__getitems__(range(len(data)))
    return found


def test_loss_and_perplexity_are_those_of_transformers(tmp_path: Path) -> None:
    model, data = make(dropout=0.2), Data(batch_size=16)
    seen: list[tuple[float, int]] = []
    step = model.training_step

    def spy(batch: Tensor, batch_idx: int) -> Tensor:
        random = torch.get_rng_state()
        with torch.no_grad():
            expected = model.net(batch, labels=batch).loss
        torch.set_rng_state(random)
        loss = step(batch, batch_idx)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        seen.append((loss.item(), len(batch)))
        return loss

    model.training_step = spy  # type: ignore[method-assign]
    fit(model, folder=tmp_path, data=data, max_epochs=2)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(
        [
            value
            for epoch in (seen[:4], seen[4:])
            for value in (*(loss for loss, _ in epoch), sum(loss * n for loss, n in epoch) / 61)
        ],
        rel=1e-5,
    )
    model.eval()
    for split, found in (
        ("val", [row for row in rows if "val/loss" in row][-1]),
        ("test", Trainer(**quiet()).test(model, data, verbose=False)[0]),
    ):
        each = tokens(getattr(data, f"{split}_set"))
        with torch.no_grad():
            loss = model.net(each, labels=each).loss.item()
        assert found[f"{split}/loss"] == pytest.approx(loss, rel=1e-5)
        assert found[f"{split}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_sign_of_the_gradient(kind: Any) -> None:
    """betas (0, 0): every weight moves by the learning rate, as in the analysis of Li et al. (arXiv 2405.14578)."""
    model, batch = make(optimizer=partial(kind, lr=0.01, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)), tokens(blocks(5))
    optimizer = model.configure_optimizers()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    model.net(batch, labels=batch).loss.backward()
    optimizer.step()
    for name, each in model.named_parameters():
        moved = each.grad != 0  # type: ignore[operator]
        assert torch.allclose((each - before[name])[moved], -0.01 * each.grad[moved].sign(), atol=1e-6)  # type: ignore[index,union-attr]


def test_what_decays() -> None:
    model = make(optimizer=partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    optimizer = model.configure_optimizers()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    optimizer.step()
    decayed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert decayed == {"net.transformer.wte.weight", "net.transformer.wpe.weight"} | {
        f"net.transformer.h.{block}.{name}.weight" for block in range(2) for name in names
    }
    assert torch.allclose(model.net.transformer.wte.weight, before["net.transformer.wte.weight"] * (1 - 0.1 * 0.5))
    default = make().configure_optimizers()
    assert isinstance(default, torch.optim.AdamW)
    assert [group["lr"] for group in default.param_groups] == [0.001, 0.001]


@pytest.mark.parametrize("sizes, padded, message", [
    ({"n_positions": 4}, False, "have 6 tokens, but the network has only 4 positions.*`block_size=4`.*`n_positions=6`"),
    ({"n_positions": 4}, True, "have up to 6 tokens, but the network has only 4 positions.*`block_size=4`"),
    ({"vocab_size": 30}, False, "up to 40 tokens, but the network has only 30; write `vocab_size=40`"),
])  # fmt: skip
def test_a_network_too_small_for_the_data(sizes: dict[str, int], padded: bool, message: str) -> None:
    data = Data()
    if padded:
        data.tokens_per_sample, data.block_size = None, LENGTH  # type: ignore[assignment,attr-defined]
    with pytest.raises(ValueError, match=message):
        fit(make(**sizes), data=data)


def test_pretrained_weights_with_another_tokenizer(tmp_path: Path) -> None:
    make().net.save_pretrained(tmp_path)
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_layer": 2, "n_embd": 8, "n_head": 2}
    data = Data()
    fit(CausalLM(distilgpt2(**sizes, pretrained=tmp_path)), data=data)
    data.trained_tokenizer = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"need the tokenizer they were trained with.*`tokenizer=gpt2`"):
        fit(CausalLM(distilgpt2(**sizes, pretrained=tmp_path)), data=data)
    fit(make(), data=data)


# --- sequences of several lengths

IGNORED = -100


def ragged(*lengths: int, side: str = "right", labels: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Sequences of these lengths, padded with random tokens; labels leave out about every third token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (len(lengths), LENGTH), generator=generator)
    mask = torch.zeros_like(tokens)
    for row, length in zip(mask, lengths):
        row[:length] = 1
    mask = mask.flip(1) if side == "left" else mask
    batch = {"input_ids": tokens, "attention_mask": mask}
    if labels:
        chosen = torch.rand(tokens.shape, generator=generator) > 0.3
        batch["labels"] = torch.randint(VOCABULARY, tokens.shape, generator=generator).where(chosen & (mask == 1), IGNORED)
    return batch


def summed_loss(model: CausalLM, *batches: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The sum of all tokens' losses and their number, one sequence at a time and without padding."""
    total, number = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        labels = batch.get("labels", batch["input_ids"])
        for tokens, mask, targets in zip(batch["input_ids"], batch["attention_mask"] == 1, labels):
            if mask.any():
                scores = model.net(tokens[mask][None]).logits[0].log_softmax(dim=1)
                for position, target in enumerate(targets[mask][1:].tolist()):
                    if target != IGNORED:
                        total, number = total - scores[position, target].double(), number + 1
    return total, number


def gradients(model: CausalLM, loss: Tensor) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, [*model.parameters()])])


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_sequences_each_token_alike(side: str, labels: bool, kind: Any) -> None:
    model, batch = make().double(), ragged(6, 2, 4, 1, 0, 5, side=side, labels=labels)
    total, number = summed_loss(model, batch)
    loss, terms = model.full_loss(kind(batch)), model.loss_terms(kind(batch))
    assert isinstance(terms, Tensor)
    assert (terms.item(), terms.shape) == (number, ())
    assert labels or number == 5 + 1 + 3 + 4
    assert loss.item() == pytest.approx(total.item() / number, rel=1e-12)
    assert torch.allclose(gradients(model, loss), gradients(model, total / number), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [True, False])
def test_labels_of_ones_own_are_taken_as_transformers_takes_them(padded: bool) -> None:
    """Those of padding too: some let it stand for the end of a text."""
    model, batch = make().double(), ragged(6, 2, 4)
    batch["labels"] = batch["input_ids"].masked_fill(torch.rand(3, LENGTH) < 0.2, IGNORED)
    if not padded:
        del batch["attention_mask"]
    assert model.full_loss(batch).item() == pytest.approx(model.net(**batch).loss.item(), rel=1e-6)  # its loss is float32
    assert model.loss_terms(batch) == (batch["labels"][:, 1:] != IGNORED).sum()


def test_without_padding_the_mapping_is_its_tokens() -> None:
    model, batch = make().double(), tokens(blocks(5))
    for mapping in ({"input_ids": batch}, {"input_ids": batch, "attention_mask": torch.ones_like(batch)}):
        assert model.full_loss(mapping).item() == pytest.approx(model.full_loss(batch).item(), rel=1e-12)
        assert model.loss_terms(mapping) == 5 * (LENGTH - 1)


def test_tokens_as_ever() -> None:
    """To the last bit: loss, gradient and means."""
    model, data = make(), Data()
    batch = tokens(blocks(5))
    expected = F.cross_entropy(model.net(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert torch.equal(model.full_loss(batch), expected)
    assert torch.equal(gradients(model, model.full_loss(batch)), gradients(model, expected))
    assert model.loss_terms(batch) == 5
    mean, perplexity = MeanMetric(nan_strategy="disable"), Perplexity()
    for batch in tokens(data.val_set).split(8):
        logits = model.net(batch).logits[:, :-1]
        mean.update(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).detach().expand(len(batch)))
        perplexity.update(logits.detach(), batch[:, 1:])
    (found,) = Trainer(**quiet()).validate(model, data, verbose=False)
    assert found == {"val/loss": mean.compute().item(), "val/perplexity": perplexity.compute().item()}


@pytest.mark.parametrize("batch, found", [
    ({"tokens": torch.ones(2, 3), "labels": torch.ones(2, 3)}, "a mapping with tokens, labels"),
    ({}, "a mapping with nothing"),
    ([torch.ones(2, 3)], "list"),
])  # fmt: skip
def test_a_batch_without_tokens(batch: Any, found: str) -> None:
    for call in (make().full_loss, make().loss_terms):
        with pytest.raises(ValueError, match=rf"a mapping with such a tensor in `input_ids`; got {found}$"):
            call(batch)


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
@pytest.mark.filterwarnings("ignore:.*skip the training on this batch")
def test_means_are_over_tokens_however_the_batches_are_cut(kind: Any, tmp_path: Path) -> None:
    model = make(optimizer=partial(torch.optim.SGD, lr=0.0))
    batches = [ragged(6, 6, 5), ragged(2, side="left", seed=1), ragged(1, 0, seed=2), ragged(3, 6, labels=True, seed=3)]
    loader = DataLoader([kind(batch) for batch in batches], batch_size=None, collate_fn=identity)
    step = model.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor | None:
        loss = step(batch, batch_idx)
        assert loss.isnan() == (model.loss_terms(batch) == 0)
        return None if loss.isnan() else loss  # as the callbacks leave it out

    model.training_step = training_step  # type: ignore[assignment,method-assign]
    trainer = Trainer(**quiet(max_epochs=1, log_every_n_steps=1, logger=CSVLogger(tmp_path, name="", version="")))
    trainer.fit(model, loader, loader)
    total, number = summed_loss(model, *batches)
    mean = total.item() / number
    losses = [total.item() / max(number, 1) for total, number in (summed_loss(model, batch) for batch in batches)]
    losses[2] = losses[1]  # nothing is logged of a batch without tokens: Lightning writes what it has, the loss before
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx([*losses, mean], rel=1e-5)
    (validated,) = [row for row in rows if "val/loss" in row]
    (tested,) = trainer.test(model, loader, verbose=False)
    for split, found in (("val", validated), ("test", tested)):
        assert found[f"{split}/loss"] == pytest.approx(mean, rel=1e-5)
        assert found[f"{split}/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


# --- what holds for images holds for text

GROWTH = {"every": 60, "unit": "tokens"}  # ten sequences


class Record(Callback):
    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        self.batches.append(batch)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_grows_by_tokens_inside_an_epoch(tmp_path: Path) -> None:
    record = Record()
    scheduler = BatchLRScheduler(Exponential(2, factor=2, maximum=16, **GROWTH), Exponential(0.01, factor=1.2, **GROWTH))
    fit(make(), scheduler, record, folder=tmp_path)
    expected, rates, consumed = [], [], 0
    while consumed < 61:
        stage = consumed * LENGTH // 60
        expected.append(min(2 * 2**stage, 16, 61 - consumed))
        rates.append(0.01 * 1.2**stage)
        consumed += expected[-1]
    assert [len(batch) for batch in record.batches] == expected == [2] * 5 + [4] * 3 + [8, 16, 15]
    assert record.rates == pytest.approx(rates)
    assert sorted(torch.cat(record.batches).tolist()) == sorted(tokens(blocks(61)).tolist())
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "samples" in row]
    assert [row["tokens"] for row in rows] == [LENGTH * row["samples"] for row in rows]
    assert rows[-1]["tokens"] == 366


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_somebodys_datamodule_may_say_how_many_tokens(tmp_path: Path) -> None:
    class Theirs(LightningDataModule):
        batch_size = 4
        tokens_per_sample = LENGTH

        def train_dataloader(self) -> Any:
            return DataLoader(blocks(20), batch_size=self.batch_size, collate_fn=identity)

    record = Record()
    scheduler = BatchLRScheduler(Exponential(4, factor=2, every=120, unit="tokens"))
    trainer = Trainer(**quiet(callbacks=[scheduler, record], max_epochs=2, logger=CSVLogger(tmp_path, name="", version="")))
    trainer.fit(make(), Theirs())
    assert [len(batch) for batch in record.batches] == [4] * 5 + [8, 8, 4]
    assert read_metrics(tmp_path / "metrics.csv")[-1]["tokens"] == 240


@pytest.mark.parametrize("workers", [0, 1])
def test_resumes_bit_for_bit_inside_an_epoch(workers: int, tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[CausalLM, list[Tensor]]:
        record, model = Record(), make(dropout=0.1)
        lr = Warmup(0.001, then=Exponential(0.01, factor=1.2, **GROWTH), over=90, every=30, unit="tokens")
        scheduler = BatchLRScheduler(Exponential(2, factor=2, maximum=16, **GROWTH), lr, max_device_batch_size=6)
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
        options = {"max_epochs": 2, "enable_checkpointing": True} | options
        fit(model, scheduler, record, saving, data=Data(num_workers=workers, seed=4), **options)
        return model, record.batches

    whole, seen = run()
    resumed, rest = run(ckpt_path=tmp_path / "step=7.ckpt")
    assert all(map(torch.equal, rest, seen[-len(rest) :]))
    assert 0 < len(rest) < len(seen)
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


def gradient(model: CausalLM, batch: Tensor) -> Tensor:
    return torch.cat(
        [each.flatten() for each in torch.autograd.grad(model.net(batch, labels=batch).loss, [*model.parameters()])]
    )


def test_full_gradient_norm(tmp_path: Path) -> None:
    model = make(dropout=0.1)
    fit(model, FullGradientNorm(batch_size=7), folder=tmp_path)
    (row,) = [row for row in read_metrics(tmp_path / "metrics.csv") if "full_gradient_norm" in row]
    batch = tokens(blocks(61))
    assert row["full_gradient_norm"] == pytest.approx(gradient(model.eval(), batch).norm().item(), rel=1e-4)
    assert row["full_loss"] == pytest.approx(model.net(batch, labels=batch).loss.item(), rel=1e-5)


def test_gradient_noise_scale() -> None:
    noise, record = GradientNoiseScale(every=1), Record()
    model = make()
    fit(model, BatchLRScheduler(12, 0.01, max_device_batch_size=4), noise, record, max_steps=1, max_epochs=-1)
    parts = record.batches
    assert [len(part) for part in parts] == [4, 4, 4]
    fresh = make()
    small = sum(gradient(fresh, part).square().sum().item() for part in parts) / 3
    big = gradient(fresh, torch.cat(parts)).square().sum().item()
    expected = estimate_noise(small, 4, big, 12)
    assert (noise.gradient_sq_norm, noise.gradient_variance) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 cannot compile GPT-2's masks")
def test_compiled_equals_eager_over_ten_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    eager, compiled = make(), CausalLM(make().net, compile=True)
    compiled.configure_model()
    assert list(compiled.state_dict()) == list(eager.state_dict())
    data = blocks(60)
    for size in (1, 2, 3, 5, 8, 13, 21, 34, 44, 55):
        batch = data.__getitems__(range(size))
        assert torch.allclose(compiled(batch), eager(batch), atol=1e-6)
    assert 1 <= len(graphs) <= 2
