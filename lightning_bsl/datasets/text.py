"""Text as tokens, in blocks or document by document: packed once into a file that all processes map into memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lightning_bsl.data.datamodule import BatchSizeDataModule
from lightning_bsl.datasets.hub import check_reachable, text_library

Split = Literal["train", "val", "test"]
Document = tuple[Split, str]

END_OF_TEXT = "<|endoftext|>"
GPT2 = "openai-community/gpt2"  # on the hub
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_KINDS = (".txt", ".jsonl", ".json", ".parquet")
_SPLIT_NAME = re.compile(r"(?<![a-z])(train|val|dev|test)(?:id|idation)?(?![a-z])", re.IGNORECASE)
_FORMAT = 3  # of the cache


class TokenBlocks(Dataset[Tensor]):
    """A row of tokens, cut into blocks of one length; one gather makes a whole batch.

    The tokens behind the last whole block, fewer than one block, are in ``remainder`` and in no block.

    Args:
        tokens: Integers ``[n]``, in memory or mapped from a file.
        block_size: Tokens of a block.

    Raises:
        ValueError: Fewer tokens than one block, or blocks of fewer than 2: there would be nothing to predict.

    Example:
        >>> data = TokenBlocks(np.arange(11), block_size=4)
        >>> len(data), data.__getitems__([1, 0]).tolist(), data.remainder.tolist()
        (2, [[4, 5, 6, 7], [0, 1, 2, 3]], [8, 9, 10])
    """

    takes_tensors: ClassVar[bool] = True  # of indices: a list of them costs more than the gather
    path: Path | None = None  # of the file that holds these tokens and no others

    def __init__(self, tokens: npt.NDArray[Any], block_size: int) -> None:
        _check_block_size(block_size)
        if len(tokens) < block_size:
            raise ValueError(f"{len(tokens)} tokens do not fill one block of {block_size}; write a smaller `block_size`")
        self.tokens = tokens
        self.block_size = block_size
        self.blocks = tokens[: len(self) * block_size].reshape(-1, block_size)

    @property
    def remainder(self) -> npt.NDArray[Any]:
        """The tokens behind the last whole block."""
        return self.tokens[len(self) * self.block_size :]

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size

    def __getitem__(self, index: int) -> Tensor:
        """Return a block, int64 ``[block_size]``."""
        return torch.from_numpy(self.blocks[index].astype(np.int64))

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return blocks, int64 ``[B, block_size]``."""
        return torch.from_numpy(self.blocks[np.asarray(indices)].astype(np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        """Send a worker the file's name, not what is in it."""
        if self.path is not None:
            return _open_blocks, (self.path, self.tokens.dtype.str, self.block_size)
        return type(self), (np.asarray(self.tokens), self.block_size)


def _open_blocks(path: Path, dtype: str, block_size: int) -> TokenBlocks:
    blocks = TokenBlocks(np.memmap(path, dtype, mode="r"), block_size)
    blocks.path = path
    return blocks


def identity(batch: Tensor) -> Tensor:
    """Collate nothing: ``TokenBlocks`` returns whole batches."""
    return batch


class TokenDocuments(Dataset[Tensor]):
    """Documents in a row of tokens, each an example by itself; a long one is cut into parts.

    Every part but a document's last has ``block_size`` tokens. A part of a single token is no example: nothing of it could
    be predicted.

    Args:
        tokens: Integers ``[n]``, in memory or mapped from a file.
        ends: Where each document ends, in their order ``[documents]``: the index behind its last token.
        block_size: Most tokens of an example.

    Attributes:
        lengths: Tokens of each example, int64 ``[examples]``.

    Raises:
        ValueError: ``block_size`` is below 2, or no document has 2 tokens.

    Example:
        >>> data = TokenDocuments(np.arange(11), ends=np.array([3, 4, 11]), block_size=4)
        >>> [example.tolist() for example in data], data.lengths.tolist()
        ([[0, 1, 2], [4, 5, 6, 7], [8, 9, 10]], [3, 4, 3])
        >>> pad(data.__getitems__([0, 1]))["attention_mask"].tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
    """

    takes_tensors: ClassVar[bool] = True  # of indices
    path: Path | None = None  # of the file that holds these tokens and no others, beside that of the ends

    def __init__(self, tokens: npt.NDArray[Any], ends: npt.NDArray[np.int64], block_size: int) -> None:
        _check_block_size(block_size)
        self.tokens, self.ends, self.block_size = tokens, ends, block_size
        self._row, ends = np.asarray(tokens), np.asarray(ends)  # slices of a memmap are slow
        first = np.concatenate([[0], ends[:-1]])
        parts = -(-(ends - first) // block_size)  # of each document
        part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)  # its number within its document
        starts = np.repeat(first, parts) + part * block_size
        lengths = np.minimum(np.repeat(ends, parts) - starts, block_size)
        self._starts, self.lengths = starts[lengths > 1], lengths[lengths > 1]
        if not len(self):
            raise ValueError(f"none of the {len(ends):,} documents has 2 tokens: there is nothing to predict; give more text")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        """Return an example, int64 ``[length]``."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> list[Tensor]:
        """Return examples, each int64 ``[length]``."""
        chosen = np.asarray(indices, dtype=np.int64)
        places = zip(self._starts[chosen].tolist(), self.lengths[chosen].tolist())
        return [torch.from_numpy(self._row[start : start + length].astype(np.int64)) for start, length in places]

    def __reduce__(self) -> tuple[Any, ...]:
        """Send a worker the files' name, not what is in them."""
        if self.path is not None:
            return _open_documents, (self.path, self.tokens.dtype.str, self.block_size)
        return type(self), (np.asarray(self.tokens), np.asarray(self.ends), self.block_size)


def _open_documents(path: Path, dtype: str, block_size: int) -> TokenDocuments:
    ends = np.memmap(_ends_of(path), np.int64, mode="r")
    documents = TokenDocuments(np.memmap(path, dtype, mode="r"), ends, block_size)
    documents.path = path
    return documents


def _ends_of(path: Path) -> Path:
    """The file with the ends of the documents in a file of tokens."""
    return path.with_name(f"{path.stem}_ends.bin")


def pad(examples: list[Tensor]) -> dict[str, Tensor]:
    """Collate examples of several lengths, with padding at the right.

    Args:
        examples: Tokens, each ``[length]``.

    Returns:
        ``input_ids`` and ``attention_mask``, 0 for padding: int64 ``[examples, longest]``.
    """
    if not examples:  # a process's share of a step may be empty
        return dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(0, 0, dtype=torch.int64))
    tokens = pad_sequence(examples, batch_first=True)
    lengths = torch.tensor([len(example) for example in examples])
    return {"input_ids": tokens, "attention_mask": (torch.arange(tokens.shape[1]) < lengths[:, None]).long()}


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ValueError(f"`block_size={block_size}` must be 2 or more: a token is predicted from those before it")


class TextDataModule(BatchSizeDataModule):
    """Base of the text data sets: documents become one row of tokens, the row is cut into blocks.

    Each document is followed by the token ``<|endoftext|>``, and a block may hold the end of one and the beginning of the
    next. Fewer than ``block_size`` tokens at the very end of a split are in no block. A sample is a block, so that
    ``tokens = samples x block_size``: schedules may count in tokens, and they are logged.

    With ``pack=False`` a sample is a document with the token that follows it, or a part of one longer than ``block_size``. A
    batch is padded at the right to its longest sample: ``input_ids`` and ``attention_mask``, int64 ``[batch, longest]``. As
    samples differ in length, schedules cannot count in tokens.

    Tokens are written once to ``cache_dir``, in a folder of their own for each state of the data and each tokenizer, which
    appears there when it is complete. Every process maps them into memory. Blocks of another size, and whole documents, need
    no other file.

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
        _check_block_size(block_size)
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
        open_split: Any = _open_blocks if self.pack else _open_documents
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
        if folder.exists():
            return folder
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=self.cache_dir) as temporary:
            self._pack(Path(temporary, name), tokenizer)
            try:
                os.replace(Path(temporary, name), folder)
            except OSError:  # another run has been faster
                if not folder.exists():
                    raise
        return folder

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
            ends = {split: stack.enter_context(open(_ends_of(path), "wb")) for split, path in paths.items()}
            while some := list(islice(documents, 1000)):
                encoded = tokenizer.encode_batch([text for _, text in some], add_special_tokens=False)
                for (split, _), encoding in zip(some, encoded):
                    tokens = np.array([*encoding.ids, end], dtype)
                    tokens.tofile(files[split])
                    counts[split] += len(tokens)
                    np.int64(counts[split]).tofile(ends[split])
        tokenizer.save(str(folder / "tokenizer.json"))
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
                f"{self.root} has {len(lengths)} different documents to train on, so none can be held out for validation: give "
                "more, or files or folders with `train` and `val` in their names"
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
                path = _from_hub(name, connect)
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


class TextFolder(TextDataModule):
    """Any folder of text: ``.txt`` (a file is a document), ``.jsonl``, ``.json`` and ``.parquet`` (a record is a document).

    Files and folders with ``train``, ``val`` (``valid``, ``validation``, ``dev``) and ``test`` in their names are these
    splits; the others train. Without a validation split, whole documents of the training split become one.

    Args:
        root: The folder; its subfolders count.
        text_column: Where a record has its text.
        **options: As of ``TextDataModule``.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in "abc":
        ...     _ = (folder / f"{name}.txt").write_text(f"This is the document {name}. " * 20)
        >>> data = TextFolder(folder, block_size=8, tokenizer="train", vocab_size=300, cache_dir=folder / "cache")
        >>> data.prepare_data(), data.setup()
        (None, None)
        >>> data.train_set[0].shape
        torch.Size([8])
    """

    def __init__(self, root: str | Path | None = None, *, text_column: str = "text", **options: Any) -> None:
        super().__init__(root, **options)
        self.text_column = text_column

    def locate(self) -> Path:
        """Return ``root``."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"there is no folder {self.root}; write `root`, the folder with the text (`data.root=DIR`)")
        if not self._files(self.root):
            raise FileNotFoundError(f"no file in {self.root} is of a kind that can be read: {', '.join(_KINDS)}")
        return self.root

    def fetch(self) -> None:
        """Say that there is nothing to download."""
        raise FileNotFoundError(f"there is no text in {self.root}, and nothing known that could be downloaded to it")

    def fingerprint(self) -> object:
        """Names, sizes and times of the files."""
        folder = self.locate()
        stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in self._files(folder)]
        return self.text_column, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def documents(self) -> Iterator[Document]:
        """Yield the documents of every file."""
        folder = self.locate()
        for path in self._files(folder):
            names = (_SPLIT_NAME.search(part) for part in reversed(path.relative_to(folder).parts))
            name = next((each for each in names if each), None)  # the deepest folder or file that says so
            found = name[1].lower() if name else "train"
            split: Split = "val" if found == "dev" else found  # type: ignore[assignment]
            for text in self._texts(path):
                yield split, text

    def text_of(self, record: Mapping[str, Any]) -> str:
        """Return the text of a record.

        Raises:
            KeyError, TypeError: If it has none.
        """
        return record[self.text_column]  # type: ignore[no-any-return]

    def _files(self, folder: Path) -> list[Path]:
        caches = self.cache_dir.resolve()
        cache_inside = folder.resolve() in caches.parents
        return sorted(
            path
            for path in folder.rglob("*")
            if path.suffix in _KINDS
            and path.is_file()
            and not (path.parent / "about.json").is_file()  # a cache
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and not (cache_inside and caches in path.resolve().parents)
        )

    def _texts(self, path: Path) -> Iterator[str]:
        if path.suffix == ".txt":
            try:
                yield path.read_bytes().decode()  # as it is: read_text would change the ends of lines
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8: {error}") from error
            return
        for number, record in enumerate(_records(path, self.text_column)):
            try:
                text: Any = self.text_of(record)
            except (KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                columns = ", ".join(record) if isinstance(record, Mapping) else type(record).__name__
                raise ValueError(
                    f"record {number} of {path} has no text in {self.text_column!r}, but {columns}; write `text_column`, the "
                    "name of the one with the text"
                )
            yield text


class ELI5Category(TextFolder):
    """ELI5-Category (Gao et al. 2021): 91,772 questions of Reddit's r/explainlikeimfive with their answers, P4's text.

    A document is the answers to one question, parted by a space, as in the guide to language modelling of `transformers`.
    The splits ``validation1`` and ``validation2`` of the hub are the validation split.

    Args:
        root: The folder ``eli5_category``, or its parent: Parquet or JSON files as the hub has them, in folders (or with
            names) that say ``train``, ``validation1``, ``validation2`` and ``test``.
        **options: As of ``TextDataModule``.

    Example:
        >>> ELI5Category(block_size=128).tokens_per_sample
        128
    """

    hub_name: ClassVar[str] = "rexarski/eli5_category"
    revision: ClassVar[str] = "refs/convert/parquet"  # the hub's own conversion; the main branch is a script, which nobody runs

    def __init__(self, root: str | Path | None = None, **options: Any) -> None:
        super().__init__(root, text_column="answers", **options)

    def locate(self) -> Path:
        """Return the folder with the files."""
        for folder in (self.root / "eli5_category", self.root):
            if any(_SPLIT_NAME.search(path.relative_to(folder).parts[0]) for path in self._files(folder)):
                return folder
        raise FileNotFoundError(
            f"ELI5-Category is not in {self.root}. Write `data.download=true` where {self.hub_name} can be reached on "
            f"huggingface.co. Elsewhere, {self._by_hand()}"
        )

    def _files(self, folder: Path) -> list[Path]:
        return [path for path in super()._files(folder) if path.suffix != ".txt"]

    def fetch(self) -> None:
        """Download from the hub with `datasets`, a Parquet file for each split."""
        check_reachable(self.hub_name, "dataset", f"To bring the data by hand, {self._by_hand()}", self.revision)
        datasets = text_library("datasets")
        folder = self.root / "eli5_category"
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=self.root) as temporary:
            for split, data in datasets.load_dataset(self.hub_name, revision=self.revision).items():
                data.to_parquet(os.path.join(temporary, "data", f"{split}.parquet"))
            os.replace(os.path.join(temporary, "data"), folder)

    def text_of(self, record: Mapping[str, Any]) -> str:
        """Join the answers: lists of their parts, or a list of them."""
        answers = record["answers"]
        texts = answers["text"] if isinstance(answers, Mapping) else [answer["text"] for answer in answers]
        return " ".join(texts)

    def _by_hand(self) -> str:
        return (
            f"download the folders of https://huggingface.co/datasets/{self.hub_name}/tree/{self.revision.replace('/', '%2F')}"
            f"/default (train, validation1, validation2, test) and put them into {self.root / 'eli5_category'}"
        )


class PydocTopics(TextDataModule):
    """The English documentation of the language that comes with every CPython: 0.4 MB of text without a download.

    A document is one of pydoc's topics. Some repeat parts of others: a paragraph counts where it comes first, so that
    none is in training and validation both.

    Args:
        **options: As of ``TextDataModule``; ``tokenizer`` is ``"train"`` by default, with 2048 tokens.

    Example:
        >>> PydocTopics(block_size=64).vocab_size
        2048
    """

    def __init__(self, root: str | Path | None = None, **options: Any) -> None:
        defaults: dict[str, Any] = {"tokenizer": "train", "vocab_size": 2048}
        super().__init__(root, **defaults | options)

    def fingerprint(self) -> object:
        """A digest of the text, which differs between versions of Python."""
        return hashlib.sha256("\0".join(text for _, text in self.documents()).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Yield the topics."""
        from pydoc_data.topics import topics

        seen: set[str] = set()
        for text in topics.values():
            paragraphs = text.split("\n\n")
            new = [each for each in paragraphs if each.strip() not in seen]
            seen.update(each.strip() for each in paragraphs)
            yield "train", "\n\n".join(new)


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


def read_tokenizer(path: Path) -> Any:
    """Read a ``tokenizer.json``, or a folder with that or with ``vocab.json`` and ``merges.txt``.

    Raises:
        FileNotFoundError: They are not there.
    """
    tokenizers = text_library("tokenizers")
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return _plain(tokenizers.Tokenizer.from_file(str(file)))
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise FileNotFoundError(f"{path} has neither tokenizer.json nor vocab.json and merges.txt; write another `tokenizer`")
    tokenizer = _byte_level(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
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


def _from_hub(name: str, connect: bool) -> Path:
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


def _records(path: Path, column: str) -> Iterator[Any]:
    if path.suffix == ".parquet":
        file = text_library("pyarrow.parquet").ParquetFile(path)
        columns = [column] if column in file.schema_arrow.names else None
        for batch in file.iter_batches(1000, columns=columns):
            yield from batch.to_pylist()
        return
    with open(path, encoding="utf-8-sig") as lines:
        try:
            is_list = lines.read(1) == "["
            lines.seek(0)
            if is_list:
                yield from json.load(lines)
            else:
                yield from (json.loads(line) for line in lines if line.strip())
        except ValueError as error:  # of JSON, or of UTF-8
            raise ValueError(f"{path} is neither a JSON list of records nor one record a line: {error}") from error


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
