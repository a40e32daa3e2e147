"""GPT-2 of any size, by default DistilGPT2."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_bsl.datasets.hub import check_reachable, text_library

HUB_NAME = "distilbert/distilgpt2"


def distilgpt2(
    vocab_size: int = 50257,
    n_positions: int = 1024,
    n_layer: int = 6,
    n_embd: int = 768,
    n_head: int = 12,
    dropout: float = 0.1,
    pretrained: bool | str | Path = False,
) -> nn.Module:
    """Build DistilGPT2 (Sanh et al. 2019), or a smaller GPT-2: the ``GPT2LMHeadModel`` of `transformers`.

    Li et al. 2024 (arXiv 2405.14578) train it on ELI5-Category. The published model has 81,912,576 parameters (the embedding is
    also the output layer, and is counted once).

    Args:
        vocab_size: Number of different tokens.
        n_positions: Tokens of the longest sequence.
        n_layer: Number of transformer blocks.
        n_embd: Width of the embeddings.
        n_head: Number of attention heads; the width must be a multiple of it.
        dropout: Probability of dropout in embeddings, attention and residuals.
        pretrained: ``True`` loads the published weights; a path loads those of a folder that ``save_pretrained`` wrote. By
            default the weights are new.

    Returns:
        A module whose output for tokens ``[batch, length]`` has ``logits`` ``[batch, length, vocab_size]``.

    Raises:
        ModuleNotFoundError: The ``text`` extra is not installed.
        ValueError: A width that is not a multiple of ``n_head``, or pretrained weights of another size.
        FileNotFoundError: ``pretrained`` is not a folder that ``save_pretrained`` wrote.
        ConnectionError: The published weights are neither in the cache nor reachable.

    Example:
        >>> import torch
        >>> net = distilgpt2(vocab_size=100, n_positions=16, n_layer=1, n_embd=8, n_head=2)
        >>> net(torch.zeros(3, 16, dtype=torch.long)).logits.shape
        torch.Size([3, 16, 100])
    """
    if n_embd % n_head:
        raise ValueError(f"`n_embd={n_embd}` must be a multiple of `n_head={n_head}`: the heads share the width equally")
    transformers = text_library("transformers")
    sizes = {"vocab_size": vocab_size, "n_positions": n_positions, "n_layer": n_layer, "n_embd": n_embd, "n_head": n_head}
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    if not pretrained:
        # without special tokens: the ids of the default ones are not in a smaller vocabulary
        config = transformers.GPT2Config(**sizes, **dropouts, use_cache=False, bos_token_id=None, eos_token_id=None)
        net: nn.Module = transformers.GPT2LMHeadModel(config)
        return net
    net = _load(transformers, HUB_NAME if pretrained is True else str(pretrained), use_cache=False, **dropouts)
    actual = {name: getattr(net.config, name) for name in sizes}
    if actual != sizes:
        raise ValueError(f"the pretrained model has {actual}, but the arguments are {sizes}; write the sizes of the model")
    return net


def _load(transformers: object, name: str, **options: object) -> nn.Module:
    load = transformers.GPT2LMHeadModel.from_pretrained  # type: ignore[attr-defined]
    if name != HUB_NAME and not Path(name).is_dir():
        raise FileNotFoundError(f"{name} is no folder that `save_pretrained` wrote: it does not exist; write the right path")
    try:
        net: nn.Module = load(name, local_files_only=True, **options)
    except OSError as error:
        if name != HUB_NAME:
            raise FileNotFoundError(f"{name} is no folder that `save_pretrained` wrote: {error}") from error
        check_reachable(
            name, "model", "Save it where it is reachable (`save_pretrained(DIR)`), and write `pretrained=DIR` here"
        )
        net = load(name, **options)
    return net.train()
