"""Tokenizers: trained on the data, read from files, or GPT-2's from the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_bsl.datasets.files import broken, permitted
from lightning_bsl.datasets.hub import check_reachable, text_library

END_OF_TEXT = "<|endoftext|>"
GPT2 = "openai-community/gpt2"  # on the hub


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE like GPT-2's: it can spell any text.

    Args:
        texts: What to train on.
        vocab_size: Most tokens, the 256 bytes and the end of a text among them.

    Returns:
        A ``tokenizers.Tokenizer``.

    Example:
        >>> tokenizer = train_tokenizer(["ab ab ab", "ab"], 300)
        >>> tokenizer.encode("ab ab!").tokens
        ['ab', 'Ġab', '!']
    """
    tokenizers = text_library("tokenizers")
    tokenizer = _byte_level(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


@permitted()
def read_tokenizer(path: Path) -> Any:
    """Read a ``tokenizer.json``, or a folder with that or with ``vocab.json`` and ``merges.txt``.

    Raises:
        FileNotFoundError: They are not there.
        ValueError: They cannot be read.
    """
    tokenizers = text_library("tokenizers")
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        try:
            return _plain(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises nothing narrower
            raise broken(file, f"is no tokenizer.json ({error})") from error
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise FileNotFoundError(f"{path} has neither tokenizer.json nor vocab.json and merges.txt; write another `tokenizer`")
    try:
        tokenizer = _byte_level(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:
        raise broken(vocabulary, f"and merges.txt beside it are no tokenizer ({error})") from error
    if tokenizer.get_vocab_size() > 257 and not any(line[:1] != "#" for line in merges.read_text("utf-8").splitlines()):
        raise broken(merges, "has no merges, but vocab.json beside it has words")
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _plain(tokenizer)


def _byte_level(model: Any) -> Any:
    tokenizers = text_library("tokenizers")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _plain(tokenizer: Any) -> Any:
    """Nothing cut off, nothing added, and a text that says ``<|endoftext|>`` does not end there."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def from_hub(name: str, connect: bool) -> Path:
    """The tokenizer.json of a model, from the cache of `huggingface_hub` or downloaded to it.

    Args:
        name: The model.
        connect: Whether to download what is not in the cache.

    Raises:
        OSError: It cannot be had.
    """
    hub = text_library("huggingface_hub")
    try:
        return Path(hub.hf_hub_download(name, "tokenizer.json", local_files_only=True))
    except (OSError, hub.utils.HFValidationError) as error:  # not in the cache, or not even a name
        if not connect or isinstance(error, hub.utils.HFValidationError):
            raise FileNotFoundError(f"{name} is no file, no folder, and no model in the cache of huggingface_hub") from error
    check_reachable(
        name, "model", "Write `tokenizer=DIR`, a folder with its tokenizer.json, or `tokenizer=train` to train one on the data"
    )
    return Path(hub.hf_hub_download(name, "tokenizer.json"))
