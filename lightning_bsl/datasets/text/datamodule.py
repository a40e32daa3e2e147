"""Base of the text data sets: text is packed once into a file of tokens that all processes map into memory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.datasets.files import shown
from lightning_bsl.datasets.hub import text_library
from lightning_bsl.datasets.text.splits import SPLITS, Split
from lightning_bsl.datasets.text.tokenizer import END_OF_TEXT, GPT2, from_hub, read_tokenizer, train_tokenizer
from lightning_bsl.datasets.text.tokens import check_block_size, ends_of, identity, open_blocks, open_documents, pad

Document = tuple[Split, str]

_FORMAT = 4  # of the cache
NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class TextDataModule(BatchSizeDataModule):
    """Base of the text data sets: documents become one row of tokens, the row is cut into blocks.

    Each document is followed by the token ``<|endoftext|>``, and a block may hold the end of one and the beginning of the
    next. Fewer than ``block_size`` tokens at the very end of a split are in no block. A sample is a block, so that
    ``tokens = samples x block_size``: schedules may count in tokens, and they are logged.

    With ``pack=False`` a sample is a document with the token that follows it, or a part of one longer than ``block_size``. A
    batch is padded at the right to its longest sample: ``input_ids`` and ``attention_mask``, int64 ``[batch, longest]``. As
    samples differ in length, schedules cannot count in tokens.

    Tokens are written once to ``cache_dir``, in a folder of their own for each state of the data and each tokenizer, which
    appears there when it is complete; one whose files were cut short later is written anew. Every process maps them into
    memory. Blocks of another size, and whole documents, need no other file.

    Where the data are not split, whole documents go to validation, chosen by their content: copies of one text are on the
    same side, and the choice does not depend on their order. The tokenizer is trained on training documents only.

    A subclass gives ``fingerprint`` and ``documents``, and ``locate`` and ``fetch`` where there are files.

    Args:
        root: Folder of the data set, ``data`` by default.
        block_size: Tokens of a block; of whole documents the most tokens of a sample.
        pack: Whether to cut the row of all documents into blocks; else whole documents are served.
        tokenizer: ``"train"``: a byte-level BPE trained on the data. ``"auto"``: GPT-2's where its file is in the cache of
            `huggingface_hub` or can be downloaded, else as ``"train"``, with a warning. Or a ``tokenizer.json``, a folder
            with that or with ``vocab.json`` and ``merges.txt``, or the name of a model on the hub (``"gpt2"``).
        vocab_size: Most tokens of the tokenizer: what the model needs.
        val_fraction: Share of the characters that goes to validation, where the data are not split.
        download: Whether to download what is missing.
        cache_dir: Folder of the caches, ``lightning_bsl`` in ``$XDG_CACHE_HOME`` or ``~/.cache`` by default.
        **options: As of ``BatchSizeDataModule``; ``eval_batch_size`` is 8 by default.

    Raises:
        ValueError: An argument out of range; when loading: a tokenizer of more than ``vocab_size`` tokens or without an
            end of text, data that cannot be split, or a split without a sample.
        FileNotFoundError: When loading: no data, or no such tokenizer.
        OSError: When loading: the caches cannot be written to ``cache_dir``.
        ModuleNotFoundError: When loading: the ``text`` extra is not installed.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        block_size: int = 128,
        pack: bool = True,
        tokenizer: str | Path = "auto",
        vocab_size: int = 50257,
        val_fraction: float = 0.1,
        download: bool = False,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(collate_fn=identity if pack else pad, **{"eval_batch_size": 8} | options)
        check_block_size(block_size)
        if not 0 < val_fraction < 1:
            raise ValueError(f"`val_fraction={val_fraction}` must lie between 0 and 1")
        if tokenizer in ("train", "auto") and vocab_size < 257:
            raise ValueError(f"`vocab_size={vocab_size}` must be 257 or more: the 256 bytes and the end of a text")
        self.root = Path("data" if root is None else root).expanduser()
        self.block_size, self.pack = block_size, pack
        self.tokens_per_sample = block_size if pack else None
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.val_fraction = val_fraction
        self.download = download
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lightning_bsl"
        self.cache_dir = Path(home if cache_dir is None else cache_dir).expanduser()
        self.trained_tokenizer = False  # known once the data are loaded

    @abstractmethod
    def fingerprint(self) -> object:
        """Return something whose ``repr`` changes with the data."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield each document with its split; where none is of ``"val"``, those of ``"train"`` are split."""

    def locate(self) -> Path:
        """Return the folder that holds the data.

        Raises:
            FileNotFoundError: If they are not there.
        """
        return self.root

    def fetch(self) -> None:
        """Download the data into ``root``."""

    @property
    def num_epoch_examples(self) -> int:
        """Training examples of one epoch; known before they are loaded if ``samples_per_epoch`` says so."""
        if self.train_set is None and self.samples_per_epoch is not None:
            return self.samples_per_epoch
        return super().num_epoch_examples

    def prepare_data(self) -> None:
        """Find the data, or download them where asked to, and pack them unless that is done; on one process only."""
        try:
            self.locate()
        except FileNotFoundError:
            if not self.download:
                raise
            self.fetch()
        self._packed(connect=True)

    def setup(self, stage: str | None = None) -> None:
        """Map the tokens into memory."""
        if self.train_set is not None:
            return
        folder = self._packed(connect=False)
        about = json.loads((folder / "about.json").read_text())
        open_split: Any = open_blocks if self.pack else open_documents
        least = self.block_size if self.pack else 2
        sets: dict[str, Dataset[Tensor]] = {}
        for split in SPLITS:
            number = about["tokens"].get(split, 0)
            if number >= least:
                sets[split] = open_split(folder / f"{split}.bin", about["dtype"], self.block_size)
            elif split != "test" or number:
                lack, remedy = "make a sample", ""
                if self.pack:
                    lack, remedy = f"fill one block of {self.block_size}", "a smaller `block_size`, "
                raise ValueError(
                    f"the {split} split has {number:,} tokens, which do not {lack}; write {remedy}another `val_fraction` where "
                    "the data are not split, or give more text"
                )
        self.train_set, self.val_set, self.test_set = (sets.get(split) for split in SPLITS)
        self.trained_tokenizer = about["trained_tokenizer"]

    def load_tokenizer(self) -> Any:
        """The tokenizer that the data were packed with, a ``tokenizers.Tokenizer``: decodes what a model generates."""
        return text_library("tokenizers").Tokenizer.from_file(str(self._packed(connect=False) / "tokenizer.json"))

    # --- parts

    def _packed(self, connect: bool) -> Path:
        """The folder of the cache, filled first if need be."""
        tokenizer = self._given_tokenizer(connect)
        key = (_FORMAT, self.fingerprint(), self.val_fraction, self.vocab_size if tokenizer is None else tokenizer.to_str())
        name = f"{type(self).__name__}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
        folder = self.cache_dir / name
        if _is_whole(folder):
            return folder
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            unfinished = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=self.cache_dir)
        except OSError as error:
            raise self._cannot_write(error) from error
        with unfinished as temporary:
            try:
                self._pack(Path(temporary, name), tokenizer)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                raise self._cannot_write(error) from error
            if folder.exists() and not _is_whole(folder):
                os.replace(folder, Path(temporary, "cut_short"))
            try:
                os.replace(Path(temporary, name), folder)
            except OSError:  # another run has been faster
                if not folder.exists():
                    raise
        return folder

    def _cannot_write(self, error: OSError) -> OSError:
        remedy = "make room there, or write" if error.errno in NO_ROOM else "write"
        return OSError(
            f"the tokens cannot be written to {shown(self.cache_dir)} ({error.strerror}); {remedy} `cache_dir`, a folder that "
            "you may write to (data.cache_dir=DIR)"
        )

    def _pack(self, folder: Path, tokenizer: Any) -> None:
        """Write the tokens of each split, where its documents end, the tokenizer, and what the files are."""
        folder.mkdir()
        held_out = self._held_out()
        trained = tokenizer is None
        if trained:
            tokenizer = train_tokenizer((text for split, text in self._split(held_out) if split == "train"), self.vocab_size)
        end = tokenizer.token_to_id(END_OF_TEXT)
        dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
        counts: Counter[str] = Counter()
        documents = self._split(held_out)
        with ExitStack() as stack:
            paths = {split: folder / f"{split}.bin" for split in SPLITS}
            files = {split: stack.enter_context(open(path, "wb")) for split, path in paths.items()}
            ends = {split: stack.enter_context(open(ends_of(path), "wb")) for split, path in paths.items()}
            while some := list(islice(documents, 1000)):
                encoded = tokenizer.encode_batch([text for _, text in some], add_special_tokens=False)
                for (split, _), encoding in zip(some, encoded):
                    tokens = np.array([*encoding.ids, end], dtype)
                    files[split].write(tokens.tobytes())  # `tofile` would not say why it fails
                    counts[split] += len(tokens)
                    ends[split].write(np.int64(counts[split]).tobytes())
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")  # nor would `save`
        about = {"dtype": dtype.str, "tokens": counts, "trained_tokenizer": trained}
        (folder / "about.json").write_text(json.dumps(about))

    def _split(self, held_out: set[bytes]) -> Iterator[Document]:
        for split, text in self.documents():
            if text:
                yield "val" if split == "train" and held_out and _digest(text) in held_out else split, text

    def _held_out(self) -> set[bytes]:
        """The documents that go from training to validation, where none is there."""
        lengths: dict[bytes, int] = {}
        for split, text in self.documents():
            if split == "val":
                return set()
            if split == "train" and text:
                lengths[_digest(text)] = len(text)
        if len(lengths) < 2:
            raise ValueError(
                f"{type(self).__name__}: {shown(self.root)} has {len(lengths)} different documents to train on, so none can be "
                "held out for validation; give more, or put files into folders `train` and `val`"
            )
        held_out: set[bytes] = set()
        missing = self.val_fraction * sum(lengths.values())
        for digest in sorted(lengths):  # in an order that nobody has chosen
            if lengths[digest] <= missing:
                held_out.add(digest)
                missing -= lengths[digest]
        return held_out or {min(lengths, key=lambda digest: (lengths[digest], digest))}

    def _given_tokenizer(self, connect: bool) -> Any:
        """The tokenizer, ``None`` if one is to be trained."""
        if self.tokenizer == "train":
            return None
        name = GPT2 if self.tokenizer == "auto" else str(self.tokenizer)
        path = Path(name).expanduser()
        if not path.exists():
            try:
                path = from_hub(name, connect)
            except OSError as error:
                if self.tokenizer != "auto":
                    raise FileNotFoundError(str(error)) from error
                if connect:
                    warnings.warn(f"a tokenizer is trained on the data instead of GPT-2's: {error}", stacklevel=3)
                return None
        tokenizer = read_tokenizer(path)
        if tokenizer.token_to_id(END_OF_TEXT) is None:
            raise ValueError(f"`tokenizer={self.tokenizer}` has no token {END_OF_TEXT}, which has to part the documents")
        if (size := tokenizer.get_vocab_size()) > self.vocab_size:
            raise ValueError(f"`tokenizer={self.tokenizer}` has {size} tokens, so write `vocab_size={size}`")
        return tokenizer


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_whole(folder: Path) -> bool:
    """Whether a cache is there, and has all that it was written with."""
    try:
        if not all(path.is_file() for path in folder.glob("*")):  # a pipe would be waited for
            return False
        about = json.loads((folder / "about.json").read_text())
        width = np.dtype(about["dtype"]).itemsize
        sizes = [(folder / f"{split}.bin").stat().st_size == width * about["tokens"].get(split, 0) for split in SPLITS]
        ends = [
            np.memmap(ends_of(folder / f"{split}.bin"), np.int64, mode="r")[-1] == number
            for split, number in about["tokens"].items()
        ]
        text_library("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    except ModuleNotFoundError:
        raise
    except Exception:  # of what cannot be read; `tokenizers` raises nothing narrower
        return False
    return all(sizes) and all(ends)
