"""DistilGPT2: its size, and where its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from lightning_bsl.models import distilgpt2

TINY: dict[str, Any] = {"vocab_size": 50, "n_positions": 8, "n_layer": 1, "n_embd": 8, "n_head": 2}


def test_as_many_parameters_as_published() -> None:
    with torch.device("meta"):
        net = distilgpt2()
    # of distilbert/distilgpt2: embeddings of 50257 tokens and 1024 positions, six blocks, the last LayerNorm
    width = 768
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 4 * width
    assert sum(each.numel() for each in net.parameters()) == 81_912_576 == (50257 + 1024) * width + 6 * block + 2 * width


def test_random_weights_follow_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([each.detach().flatten() for each in distilgpt2(**TINY).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_dropout() -> None:
    tokens = torch.arange(8)[None]
    with_dropout, without = distilgpt2(**TINY), distilgpt2(**TINY, dropout=0.0)
    assert with_dropout.training
    assert not torch.equal(with_dropout(tokens).logits, with_dropout(tokens).logits)
    assert torch.equal(without(tokens).logits, without(tokens).logits)


def test_weights_of_a_folder(tmp_path: Path) -> None:
    net = distilgpt2(**TINY)
    net.save_pretrained(tmp_path)
    loaded = distilgpt2(**TINY, dropout=0.0, pretrained=tmp_path)
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, net.eval()(tokens).logits)
    assert loaded.training
    with pytest.raises(ValueError, match=r"'n_layer': 1.*but the arguments are .*'n_layer': 2"):
        distilgpt2(**TINY | {"n_layer": 2}, pretrained=tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder that `save_pretrained` wrote"):
        distilgpt2(pretrained=tmp_path / "nowhere")


def test_published_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"distilbert/distilgpt2 cannot be reached.*`pretrained=DIR`"):
        distilgpt2(pretrained=True)


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match="`n_embd=8` must be a multiple of `n_head=3`"):
        distilgpt2(**TINY | {"n_head": 3})
