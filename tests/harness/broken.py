"""Good folders of each data set, small, and ways to break them.

What people have is in the table of ``tests/datasets/test_broken_folders.py``; `MUTANTS` are what nobody thinks of: each
file of each format, cut at random places, permuted, in other encodings, replaced by a folder, a pipe or a link, and so on.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
import random
import resource
import shutil
import socket
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from harness.limits import limited
from lightning_bsl import BatchSizeDataModule
from lightning_bsl.datasets import CIFAR10, CIFAR100, ELI5Category, FashionMNIST, TextFolder, TinyImageNet
from lightning_bsl.datasets.text import train_tokenizer

HTML = b"<!DOCTYPE html>\n<html><title>404 Not Found</title></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
AGAIN = "remove it and download it, or copy it, again"
PAGE = f"it is a web page .*{AGAIN}"

Change = Callable[[Path], object]


def put(name: str, contents: bytes | str = b"") -> Change:
    """Write a file."""

    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.encode() if isinstance(contents, str) else contents)

    return write


def cut(name: str, size: int) -> Change:
    """Keep a file's first bytes, or leave out its last ones."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(*names: str) -> Change:
    """Remove files and empty folders."""
    return lambda folder: [(folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink() for name in names]


def both(*changes: Change) -> Change:
    """One change after the other."""
    return lambda folder: [change(folder) for change in changes]


# --- good folders, small


def idx(values: np.ndarray[Any, Any], type_code: int = 8) -> bytes:
    return struct.pack(f">{values.ndim + 1}I", type_code * 256 + values.ndim, *values.shape) + values.tobytes()


def pixels(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def fashion_mnist(folder: Path) -> None:
    for name, n in zip(IDX, (12, 12, 4, 4)):
        put(name, idx(pixels(n, 28, 28) if "images" in name else np.arange(n, dtype=np.uint8) % 10))(folder)


def batch(n: int = 4, key: str = "labels", **entries: Any) -> bytes:
    return pickle.dumps({"data": pixels(n, 3072), key: [row % 10 for row in range(n)]} | entries, protocol=2)


def cifar10(folder: Path) -> None:
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        put(f"cifar-10-batches-py/{name}", batch())(folder)


def cifar100(folder: Path) -> None:
    for name in ("train", "test"):
        put(f"cifar-100-python/{name}", batch(key="fine_labels"))(folder)


def jpeg(name: str, size: int = 64, value: int = 100, mode: str = "RGB") -> Change:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (size, size), value if mode == "L" else (value, value, value)).save(folder / name, "JPEG", quality=95)

    return write


WNIDS = ("n01", "n02", "n03")


def tiny_imagenet(folder: Path) -> None:
    for label, wnid in enumerate(WNIDS):
        for row in range(2):
            jpeg(f"train/{wnid}/images/{wnid}_{row}.JPEG", value=50 * label)(folder)
        jpeg(f"val/images/val_{label}.JPEG", value=50 * label)(folder)
        put(f"train/{wnid}/{wnid}_boxes.txt", "x\t0\t0\t1\t1\n")(folder)
    put("wnids.txt", "".join(f"{wnid}\n" for wnid in reversed(WNIDS)))(folder)
    put("val/val_annotations.txt", "".join(f"val_{row}.JPEG\t{wnid}\t0\t0\t9\t9\n" for row, wnid in enumerate(WNIDS)))(folder)


def lines(*values: Any) -> str:
    return "".join(f"{json.dumps(value)}\n" for value in values)


def parquet(name: str, **columns: list[Any]) -> Change:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / name)

    return write


TEXTS = [f"This is the document number {number}." for number in range(12)]
RECORDS = lines(*({"text": text} for text in TEXTS))


def text(folder: Path) -> None:
    put("train.jsonl", RECORDS)(folder)
    put("validation.jsonl", RECORDS)(folder)


def answers(*texts: Any) -> dict[str, Any]:
    return {
        "q_id": "a",
        "title": "Why?",
        "answers": {"a_id": ["b"] * len(texts), "text": list(texts), "score": [1] * len(texts)},
    }


ANSWERS = lines(*(answers(text, "And so on.") for text in TEXTS))


def eli5(folder: Path) -> None:
    for split in ("train", "validation1", "validation2", "test"):
        put(f"eli5_category/{split}/0000.jsonl", ANSWERS)(folder)


class DataSet(NamedTuple):
    """A data set: how a good folder is made and read, and what `bsl-train` is told beside the folder."""

    write: Change
    kind: Callable[..., BatchSizeDataModule]
    overrides: tuple[str, ...] = ()


OPTIONS: dict[str, Any] = {"tokenizer": "train", "vocab_size": 300, "block_size": 8}
TINY_MODEL = ("model=gpt_tiny", "data.tokenizer=train", "data.vocab_size=300", "data.block_size=8")
DATA_SETS = {
    "fashion_mnist": DataSet(fashion_mnist, FashionMNIST),
    "cifar10": DataSet(cifar10, CIFAR10),
    "cifar100": DataSet(cifar100, CIFAR100),
    "tiny_imagenet": DataSet(tiny_imagenet, TinyImageNet),
    "text": DataSet(text, TextFolder, TINY_MODEL),
    "eli5": DataSet(eli5, ELI5Category, TINY_MODEL),
}


def loaded(name: str, folder: Path) -> BatchSizeDataModule:
    """Read a folder as a fit does."""
    options = OPTIONS | {"cache_dir": folder.parent / "cache"} if DATA_SETS[name].overrides else {}
    datamodule = DATA_SETS[name].kind(folder, batch_size=4, **options)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def names_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def read(data: str, folder: Path) -> Any:
    """What a reader reads: documents with their splits, or images and labels."""
    if data in ("text", "eli5"):
        kind: Any = DATA_SETS[data].kind
        return [(split, text) for split, text in kind(folder, cache_dir=folder.parent / "cache").documents() if split != "test"]
    datamodule: Any = loaded(data, folder)
    return [
        (part.labels.tolist(), part.images.float().mean((1, 2, 3)).round().tolist())
        for part in (datamodule.train_set, datamodule.val_set)
    ]


# --- the formats, each with the data set that reads it


def zipped(pack: Callable[[bytes], bytes], ending: str, *names: str) -> Change:
    """Compress files, which then have another ending."""
    return lambda folder: [
        ((folder / f"{name}{ending}").write_bytes(pack((folder / name).read_bytes())), (folder / name).unlink())
        for name in names
    ]


def _with_tokenizer(folder: Path, **options: Any) -> BatchSizeDataModule:
    return TextFolder(folder / "text", **options | {"tokenizer": folder / "tokenizer"})


def _with_cache(folder: Path, **options: Any) -> BatchSizeDataModule:
    return TextFolder(folder / "text", **options | {"cache_dir": folder / "cache"})


WORDS = [f"This is the döcument number {number}: ça va." for number in range(12)]  # not ASCII, so that a cut may be seen
TOKENIZER = train_tokenizer(WORDS, 300)


def _texts(write: Callable[[str], Change]) -> Change:
    return both(write("train"), write("validation"))


def _tokenizer(name: str) -> Change:
    def write(folder: Path) -> None:
        (folder / "text").mkdir()
        (folder / "tokenizer").mkdir()
        text(folder / "text")
        if name == "tokenizer.json":
            TOKENIZER.save(str(folder / "tokenizer" / name))
        else:
            TOKENIZER.model.save(str(folder / "tokenizer"))

    return write


def _cache(folder: Path) -> None:
    (folder / "text").mkdir()
    text(folder / "text")
    _fit(_with_cache, folder)
    (cache,) = (folder / "cache").iterdir()
    cache.rename(folder / "kept")  # under a name that is known; `_restored` puts it back


def _restored(folder: Path) -> None:
    """Fill the cache, and put the files that are broken in its place."""
    if (folder / "kept").exists():
        _fit(_with_cache, folder)
        (cache,) = (path for path in (folder / "cache").iterdir() if not path.name.startswith("."))
        shutil.rmtree(cache)
        (folder / "kept").rename(cache)


def _txt(folder: Path) -> None:
    for number, words in enumerate(WORDS):
        put(f"train/{number:02}.txt", words)(folder)
        put(f"val/{number:02}.txt", words)(folder)


def _records(ending: str, contents: str | bytes) -> Change:
    return _texts(lambda split: put(f"{split}{ending}", contents))


_UTF8 = "".join(f"{json.dumps({'text': words}, ensure_ascii=False)}\n" for words in WORDS)
_ANSWERS = {"text": [[words] for words in WORDS], "score": [[1]] * len(WORDS)}


def _eli5_parquet(folder: Path) -> None:
    for split in ("train", "validation1"):
        table: dict[str, list[Any]] = {"answers": [{"text": [words], "score": [1]} for words in WORDS]}
        parquet(f"eli5_category/{split}/0000.parquet", **table)(folder)


class Format(NamedTuple):
    """A format of a data set: who reads it, how a good folder is written, and which of its files are broken."""

    kind: Callable[..., BatchSizeDataModule]
    write: Change
    files: tuple[str, ...]
    of: str = "bytes"  # how the files are broken, besides what can be done to any


FIRST = "train/n01/images/n01_0.JPEG"
ANNOTATIONS = "val/val_annotations.txt"
FORMATS = {
    "idx": Format(FashionMNIST, fashion_mnist, (TRAIN_IMAGES, TEST_LABELS), "idx"),
    "idx gzip": Format(
        FashionMNIST,
        both(fashion_mnist, zipped(gzip.compress, ".gz", *IDX)),
        (f"{TRAIN_IMAGES}.gz", f"{TEST_LABELS}.gz"),
        "idx gzip",
    ),
    "cifar10": Format(CIFAR10, cifar10, ("cifar-10-batches-py/data_batch_3",), "pickle"),
    "cifar100": Format(CIFAR100, cifar100, ("cifar-100-python/train",)),
    "tiny": Format(TinyImageNet, tiny_imagenet, (FIRST,), "image"),
    "tiny lists": Format(TinyImageNet, tiny_imagenet, ("wnids.txt", ANNOTATIONS), "text"),
    "jsonl": Format(TextFolder, _records(".jsonl", _UTF8), ("train.jsonl", "validation.jsonl"), "json"),
    "json": Format(
        TextFolder,
        _records(".json", json.dumps([{"text": words} for words in WORDS], ensure_ascii=False, indent=1)),
        ("train.json",),
        "json",
    ),
    "jsonl gzip": Format(TextFolder, _records(".jsonl.gz", gzip.compress(_UTF8.encode())), ("train.jsonl.gz",), "gzip"),
    "jsonl bzip2": Format(TextFolder, _records(".jsonl.bz2", bz2.compress(_UTF8.encode())), ("train.jsonl.bz2",)),
    "jsonl xz": Format(TextFolder, _records(".jsonl.xz", lzma.compress(_UTF8.encode())), ("train.jsonl.xz",)),
    "txt": Format(TextFolder, _txt, ("train/03.txt",), "text"),
    "parquet": Format(TextFolder, _texts(lambda split: parquet(f"{split}.parquet", text=WORDS)), ("train.parquet",), "parquet"),
    "eli5": Format(ELI5Category, eli5, ("eli5_category/train/0000.jsonl",), "json"),
    "eli5 parquet": Format(ELI5Category, _eli5_parquet, ("eli5_category/train/0000.parquet",)),
    "tokenizer": Format(_with_tokenizer, _tokenizer("tokenizer.json"), ("tokenizer/tokenizer.json",), "tokenizer"),
    "vocabulary": Format(
        _with_tokenizer, _tokenizer("vocab.json"), ("tokenizer/vocab.json", "tokenizer/merges.txt"), "tokenizer"
    ),
    "cache": Format(_with_cache, _cache, ("kept/about.json", "kept/train.bin", "kept/val_ends.bin")),
}


def _fit(kind: Callable[..., BatchSizeDataModule], folder: Path) -> BatchSizeDataModule:
    """Read a folder as a fit does, and as `bsl-plan` before it, which only counts."""
    options = {} if issubclass_of_images(kind) else OPTIONS | {"cache_dir": folder.parent / "cache"}
    datamodule = kind(folder, batch_size=4, **options)
    if not options:
        _ = datamodule.num_train_examples
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def issubclass_of_images(kind: object) -> bool:
    """Whether a data set is one of images."""
    return kind in (FashionMNIST, CIFAR10, CIFAR100, TinyImageNet)


def contents(name: str, folder: Path) -> Any:
    """All that is read from a folder of a format: pixels and labels, or documents, or tokens."""
    kind = FORMATS[name].kind
    if kind in (TextFolder, ELI5Category):
        options = OPTIONS | {"cache_dir": folder.parent / "cache"}
        _fit(kind, folder)
        datamodule: Any = kind(folder, batch_size=4, **options)
        return sorted((split, words) for split, words in datamodule.documents() if split != "test")
    if name == "cache":
        _restored(folder)
    datamodule = _fit(kind, folder)
    parts = datamodule.train_set, datamodule.val_set
    if issubclass_of_images(kind):
        return [(part.labels.tolist(), part.images.numpy().tobytes()) for part in parts]
    return [np.asarray(part.tokens).tolist() for part in parts]


# --- mutants


class Mutant(NamedTuple):
    """A good folder that is broken in one place."""

    format: str
    file: str
    how: str
    change: Change

    def __str__(self) -> str:
        return f"{self.format}: {self.file.rpartition('/')[2]}: {self.how}"


def changed(change: Callable[[bytes, random.Random], bytes], file: str, seed: str) -> Change:
    """A change of what is in a file, drawn from a seed."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes(), random.Random(seed)))


def _cut(data: bytes, draw: random.Random) -> bytes:
    """The beginning of a file, which ends within a record: where it ends with one, nothing tells that more should come."""
    while True:
        part = data[: draw.randrange(1, len(data))]
        whole = part.endswith((b"\n", b"}")) or data[len(part) :][:1] in (b"\n", b"\r")
        if not whole and (b"\xc3" not in data or data[0] in b"{[" or _is_cut(part)):
            return part


def _is_cut(part: bytes) -> bool:
    """Whether a text ends within a character."""
    with suppress(UnicodeDecodeError):
        part.decode()
        return False
    return True


def _permuted(data: bytes, draw: random.Random) -> bytes:
    return bytes(draw.sample(data, len(data)))


def _noise(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(len(data))


ANY: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, draw: b"",
    "cut short": _cut,
    "cut short again": _cut,
    "permuted": _permuted,
    "permuted again": _permuted,
    "random bytes": _noise,
    "zeros": lambda data, draw: bytes(len(data)),
    "a line break": lambda data, draw: b"\n",
}


def in_place(make: Callable[[Path], object], file: str) -> Change:
    """Something else under the name of a file."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def _socket(path: Path) -> None:
    """A socket; its name is short, as the system has it."""
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.join(short, "s"))
        shutil.move(os.path.join(short, "s"), path) if path.parent.stat().st_dev != os.stat(short).st_dev else os.rename(
            os.path.join(short, "s"), path
        )


def _circle(path: Path) -> None:
    path.symlink_to("~other")  # which comes behind it in the order of names
    (path.parent / "~other").symlink_to(path.name)


PLACES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a link to nothing": lambda path: path.symlink_to("not/there"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "links in a circle": _circle,
    "a link to its folder": lambda path: path.symlink_to("."),
}


# --- of one kind of file


def _idx(type_code: int, *counts: int) -> bytes:
    return struct.pack(f">{1 + len(counts)}I", type_code * 256 + len(counts), *counts) + bytes(100)


HUGE = 2**32 - 1
OF_IDX: dict[str, Callable[[bytes, random.Random], bytes]] = {
    **{f"type 0x{code:02x}": lambda data, draw, code=code: bytes((0, 0, code)) + data[3:] for code in (9, 11, 12, 13, 14, 255)},  # type: ignore[misc]
    "4 billion records": lambda data, draw: data[:4] + struct.pack(">I", HUGE) + data[8:],
    "counts of the other end": lambda data, draw: data[:4] + data[7:3:-1] + data[8:],
    "no dimensions": lambda data, draw: bytes((0, 0, 8, 0)) + data[4:],
    "255 dimensions": lambda data, draw: bytes((0, 0, 8, 255)) + data[4:],
    "all counts huge": lambda data, draw: _idx(8, *[HUGE] * data[3]),
    "all counts 0": lambda data, draw: _idx(8, *[0] * data[3]),
}


def _gz(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    return gzip.compress(change(gzip.decompress(data)))


def _members(data: bytes) -> bytes:
    """Unpacks to 8 GiB: what is there, and zeros."""
    return data + 1024 * gzip.compress(bytes(8 << 20), 1)


OF_GZIP: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "garbage behind it": lambda data, draw: data + b"garbage",
    "zeros behind it": lambda data, draw: data + bytes(512),
    "another checksum": lambda data, draw: data[:-8] + bytes(4) + data[-4:],
    "another size": lambda data, draw: data[:-4] + b"\xff\xff\xff\x7f",
    "another method": lambda data, draw: data[:2] + b"\x07" + data[3:],
    "a member cut short behind it": lambda data, draw: data + data[: len(data) // 2],
    "zlib": lambda data, draw: zlib.compress(gzip.decompress(data)),
    "bzip2": lambda data, draw: bz2.compress(gzip.decompress(data)),
    "gzip twice": lambda data, draw: gzip.compress(data),
    "not packed": lambda data, draw: gzip.decompress(data),
    "empty inside": lambda data, draw: _gz(data, lambda inner: b""),
}
OF_IDX_GZIP: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "8 GiB": lambda data, draw: _members(data),
    "8 GiB of records": lambda data, draw: _members(_gz(data, lambda inner: inner[:4] + struct.pack(">I", HUGE) + inner[8:])),
}
OF_TEXT: dict[str, Callable[[bytes, random.Random], bytes]] = {
    **{
        name: lambda data, draw, name=name: _encoded(data, name)  # type: ignore[misc]
        for name in ("utf-16", "utf-16-be", "utf-32", "latin-1", "cp437", "cp500", "gb18030")
    },
    "a byte order mark": lambda data, draw: b"\xef\xbb\xbf" + data,
    "bytes of code 0": lambda data, draw: data.replace(b" ", b"\0", 2).replace(b"\t", b"\0", 2) + b"\0",
    "gzip": lambda data, draw: gzip.compress(data),
}


def _encoded(data: bytes, name: str) -> bytes:
    """Text with letters that are not ASCII, in another encoding."""
    letters = data.decode()
    if letters.isascii():
        letters = letters.replace("n", "ñ", 1)
    return letters.encode(name, "replace")


OF_JSON: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "deep": lambda data, draw: b"[" * 100_000 + b"]" * 100_000,
    "deep in a record": lambda data, draw: data.replace(b'"text":', b'"x": ' + b"[" * 50_000 + b"]" * 50_000 + b', "text":', 1),
    "deep cut short": lambda data, draw: b'{"text":' * 20_000,
    "a number of many digits": lambda data, draw: b'{"text": ' + b"9" * 10_000 + b"}",
    "an infinite number": lambda data, draw: b'{"text": 1e999}',
    "not a number": lambda data, draw: b'{"text": NaN}',
    "half a character": lambda data, draw: b'{"text": "\\udc80"}',
    "a comma too many": lambda data, draw: data.replace(b"}", b",}", 1),
    "single quotes": lambda data, draw: data.replace(b'"', b"'"),
    "a comment": lambda data, draw: b"// data\n" + data,
    "csv": lambda data, draw: b"id,text\n1,a\n",
    "yaml": lambda data, draw: b"!!python/object/apply:os.system ['touch harmed']\n",
}
OF_TOKENIZER: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "an object": lambda data, draw: b"{}",
    "a list": lambda data, draw: b"[1]",
    "deep": OF_JSON["deep"],
    "utf-16": OF_TEXT["utf-16"],
    "gzip": OF_TEXT["gzip"],
    "a pickle": lambda data, draw: pickle.dumps({"a": 1}),
}


def _opcodes(*codes: bytes) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, draw: b"\x80\x04" + b"".join(codes) + b"."


def _call(module: str, name: str, arguments: bytes) -> bytes:
    """The opcodes that call a function."""
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


_OBJECT = _call("numpy", "dtype", b"(X\x02\0\0\0O8I00\nI01\nt")
_EMPTY = _call("numpy.core.multiarray", "_reconstruct", b"(cnumpy\nndarray\n(K\0tC\x01bt")


def _array(dtype: bytes, shape: bytes, raw: bytes) -> bytes:
    """The opcodes of a dictionary with an array in place of the images."""
    state = b"(K\x01" + shape + dtype + b"I00\n" + raw + b"t"
    return b"(X\x04\0\0\0data" + _EMPTY + state + b"bX\x06\0\0\0labels(K\0ld"


def _raw(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def _entry(**entries: Any) -> Callable[[bytes, random.Random], bytes]:
    """A batch with other entries."""
    return lambda data, draw: pickle.dumps(pickle.loads(data) | entries, protocol=2)


def _repickled(protocol: int) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, draw: pickle.dumps(pickle.loads(data), protocol)


_CYCLE: list[Any] = []
_CYCLE.append(_CYCLE)
_POINTER = _raw(b"A" * 8)  # of an object that is not there
OF_PICKLE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    **{f"protocol {protocol}": _repickled(protocol) for protocol in range(6)},
    **{
        f"images of {dtype}": _entry(data=np.zeros((4, 3072), dtype))
        for dtype in ("u2", ">i4", "i1", "f2", ">f8", "c8", "?", "O", "V3", "U2", "M8[s]", [("a", "u1")])
    },
    "images in columns": lambda data, draw: pickle.dumps(
        pickle.loads(data) | {"data": np.asfortranarray(pickle.loads(data)["data"])}, protocol=2
    ),
    "images in one row": _entry(data=np.zeros(4 * 3072, np.uint8)),
    "images of no shape": _entry(data=np.array(3, np.uint8)),
    "labels that are true": _entry(labels=[True, False, True, True]),
    "labels of NumPy": lambda data, draw: pickle.dumps(
        pickle.loads(data) | {"labels": [np.int64(label) for label in pickle.loads(data)["labels"]]}, protocol=2
    ),
    "labels of the other end": lambda data, draw: pickle.dumps(
        pickle.loads(data) | {"labels": np.array(pickle.loads(data)["labels"], ">i4")}, protocol=2
    ),
    "labels of 8 bits": lambda data, draw: pickle.dumps(
        pickle.loads(data) | {"labels": np.array(pickle.loads(data)["labels"], np.uint8)}, protocol=5
    ),
    "labels not a number": _entry(labels=[0, float("nan"), 1, 2]),
    "labels of many digits": _entry(labels=[0, 10**100, 1, 2]),
    "labels in a circle": _entry(labels=_CYCLE),
    "a key in bytes": lambda data, draw: pickle.dumps(
        {key.encode(): value for key, value in pickle.loads(data).items()}, protocol=2
    ),
    "a key of no character": _entry(**{"\udcff": 1}),
    "4 GiB of text": _opcodes(b"X" + struct.pack("<I", HUGE)),
    "an exabyte": _opcodes(b"\x8e" + struct.pack("<Q", 2**60)),
    "a frame of an exabyte": _opcodes(b"\x95" + struct.pack("<Q", 2**60)),
    "a memo of 2 billion": _opcodes(b"K\0", b"r" + struct.pack("<I", 2**31 - 1)),
    "a memo that is not there": _opcodes(b"h\x07"),
    "many bytes": _opcodes(_call("builtins", "bytes", b"(J\xff\xff\xff\x7ft")),
    "an array of a terabyte": _opcodes(
        _call("numpy.core.multiarray", "_reconstruct", b"(cnumpy\nndarray\n(\x8a\x06\0\0\0\0\0\x01tC\x01bt")
    ),
    "a persistent object": _opcodes(b"K\1Q"),
    "an extension": _opcodes(b"\x82\x01"),
    # an array of pointers that the file chooses: to look at one ends the process, or worse
    "pointers in a buffer": _opcodes(
        b"(X\x04\0\0\0dataX\x01\0\0\0aX\x06\0\0\0labels",
        _call("numpy", "ndarray", b"((K\1t" + _OBJECT + _POINTER + b"t"),
        b"d",
    ),
    "pointers in an array": _opcodes(
        _array(_OBJECT + b"(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb", b"(K\1t", _POINTER)
    ),
    "an attribute of a function": _opcodes(b"c_codecs\nencode\n}X\x01\0\0\0aK\1sb"),
}


def _picture(kind: str, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Callable[[bytes, random.Random], bytes]:
    def change(data: bytes, draw: random.Random) -> bytes:
        with tempfile.TemporaryFile() as file:
            Image.new(mode, size).save(file, kind)
            file.seek(0)
            return file.read()

    return change


def _measured(data: bytes, width: int, height: int) -> bytes:
    """A JPEG with another size in its header."""
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def _header(width: int, height: int) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, draw: _measured(data, width, height)


def _png(data: bytes, draw: random.Random) -> bytes:
    """A PNG of 64x64 with a text that unpacks to 1 GiB."""
    whole = _picture("PNG")(data, draw)
    packed = zlib.compressobj(1)
    text = b"Comment\0\0" + b"".join(packed.compress(bytes(1 << 20)) for _ in range(1024)) + packed.flush()
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return whole[:33] + chunk + whole[33:]


_POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 64 64
%%EndComments
(harmed) (w) file closefile
showpage
%%EOF
"""
OF_IMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    **{f"{kind}": _picture(kind) for kind in ("GIF", "BMP", "TIFF", "WEBP", "ICO")},
    "PostScript": lambda data, draw: _POSTSCRIPT,
    "65,500 pixels wide": _header(65500, 65500),
    "no pixels": _header(0, 0),
    "1 pixel less": _header(64, 63),
    "a text of 1 GiB": _png,
    "a PNG of another size": _picture("PNG", (60_000, 1)),
    "an SVG": lambda data, draw: b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
    "garbage behind it": lambda data, draw: data + b"garbage",
}


def _table(**columns: Any) -> Callable[[bytes, random.Random], bytes]:
    def change(data: bytes, draw: random.Random) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        return bytes(sink.getvalue())

    return change


def _flipped(data: bytes, draw: random.Random, part: slice) -> bytes:
    """Some bytes of a part of a file changed."""
    changed = bytearray(data)
    places = range(len(data))[part]
    for _ in range(8):
        changed[draw.choice(places)] = draw.randrange(256)
    return bytes(changed)


OF_PARQUET: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "large text": lambda data, draw: _table(text=pa.array(WORDS, pa.large_string()))(data, draw),
    "a dictionary": lambda data, draw: _table(text=pa.array(WORDS).dictionary_encode())(data, draw),
    "dates": lambda data, draw: _table(text=pa.array([0] * 3, pa.timestamp("us")))(data, draw),
    "objects": _table(text=[{"a": 1}]),
    "nothing": _table(text=pa.nulls(3)),
    "no rows": _table(text=pa.array([], pa.string())),
    "two columns of one name": lambda data, draw: _twice(),
    "text that is no UTF-8": lambda data, draw: _table(
        text=pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")])
    )(data, draw),
    "a footer of 2 GiB": lambda data, draw: data[:-8] + struct.pack("<I", 2**31 - 1) + data[-4:],
    "a footer of nothing": lambda data, draw: data[:-8] + struct.pack("<I", 0) + data[-4:],
    "a footer that is encrypted": lambda data, draw: data[:-4] + b"PARE",
    "only its magic": lambda data, draw: b"PAR1",
    "twice its magic": lambda data, draw: b"PAR1PAR1",
    "Arrow": lambda data, draw: _arrow(),
    **{
        f"a footer with other bytes, {number}": lambda data, draw, number=number: _flipped(data, draw, slice(-200, -8))  # type: ignore[misc]
        for number in range(8)
    },
    **{
        f"pages with other bytes, {number}": lambda data, draw, number=number: _flipped(data, draw, slice(4, 40))  # type: ignore[misc]
        for number in range(4)
    },
}
OTHER_BYTES = "with other bytes"  # what may be read all the same


def _twice() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([pa.array(WORDS), pa.array(WORDS)], names=["text", "text"]), sink)
    return bytes(sink.getvalue())


def _arrow() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": WORDS})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


_OF: dict[str, dict[str, Callable[[bytes, random.Random], bytes]]] = {
    "bytes": {},
    "idx": OF_IDX,
    "gzip": OF_GZIP,
    "idx gzip": OF_GZIP | OF_IDX_GZIP,
    "pickle": OF_PICKLE,
    "image": OF_IMAGES,
    "text": OF_TEXT,
    "json": OF_TEXT | OF_JSON,
    "parquet": OF_PARQUET,
    "tokenizer": OF_TOKENIZER,
}


# --- of the folder


def _renamed(old: str, new: bytes) -> Change:
    return lambda folder: os.rename(folder / old, os.path.join(os.fsencode(folder / old).rpartition(b"/")[0], new))


def _copied(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / old, folder / new)

    return change


def _gone(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name)


def _linked(old: str, new: str) -> Change:
    return lambda folder: (folder / new).symlink_to(old)


_linked_to_each_other = both(put("a/.x"), put("b/.x"), _linked("../b", "a/b"), _linked("../a", "b/a"))
ODD = {
    "spaces": b" a  b ",
    "quotes": b'it\'s "a" `b` $c',
    "line breaks": b"a\nb\r\n",
    "no UTF-8": b"a\xff\xfe",
    "tags": b"<b>&amp;",
}
TREES: list[tuple[str, str, str, Change]] = [
    *(
        (of, file, f"a name with {name}", _renamed(file, start + odd + end))
        for of, file, start, end in (
            ("jsonl", "train.jsonl", b"train ", b".jsonl"),
            ("jsonl gzip", "train.jsonl.gz", b"train ", b".jsonl.gz"),
            ("parquet", "train.parquet", b"train ", b".parquet"),
            ("txt", "train/03.txt", b"", b".txt"),
            ("tiny", FIRST, b"n01_0", b".JPEG"),
        )
        for name, odd in ODD.items()
    ),
    ("jsonl", "train.jsonl", "packed beside it", put("train.jsonl.gz", gzip.compress(_UTF8.encode()))),
    ("json", "train.json", "packed beside it", put("train.json.xz", lzma.compress(b"[]"))),
    ("txt", "train/03.txt", "packed beside it", put("train/03.txt.bz2", bz2.compress(WORDS[3].encode()))),
    ("eli5", "0000.jsonl", "packed beside it", put("eli5_category/train/0000.jsonl.gz", gzip.compress(ANSWERS.encode()))),
    ("idx", TRAIN_IMAGES, "packed beside it", put(f"{TRAIN_IMAGES}.gz", b"garbage")),
    ("jsonl", "pipe", "a pipe beside a file", lambda folder: os.mkfifo(folder / "pipe")),
    ("jsonl", "up", "a link upwards", _linked("..", "up")),
    ("jsonl", "a", "folders that link to each other", _linked_to_each_other),
    ("tiny", "val_0.JPEG", "an image twice under one name", _copied("val/images/val_0.JPEG", "val/images/more/val_0.JPEG")),
    ("tiny", "decoded.pt", "a cache that is a pipe", lambda folder: os.mkfifo(folder / "decoded.pt")),
    ("tiny", "decoded.pt", "a cache that is a folder", put("decoded.pt/x")),
    ("tiny", "decoded.pt", "a cache that links in a circle", _linked("decoded.pt", "decoded.pt")),
    ("tiny", "decoded.pt", "a cache that is random", put("decoded.pt", random.Random(0).randbytes(5000))),
    ("tiny", "train", "a link from a class to all classes", _linked("..", "train/n02/up")),
    ("tiny", "a.JPEG", "a pipe among the images", lambda folder: os.mkfifo(folder / "train/n01/images/a.JPEG")),
    ("tiny", "pipe", "a pipe among the classes", lambda folder: os.mkfifo(folder / "train/pipe")),
    (
        "cifar10",
        "cifar-10-batches-py",
        "a link to itself for the folder",
        both(_gone("cifar-10-batches-py"), _linked("cifar-10-batches-py", "cifar-10-batches-py")),
    ),
    (
        "cifar10",
        "cifar-10-batches-py",
        "a pipe for the folder",
        both(_gone("cifar-10-batches-py"), lambda folder: os.mkfifo(folder / "cifar-10-batches-py")),
    ),
    ("tokenizer", "tokenizer.json", "both forms, the other broken", put("tokenizer/vocab.json", b"{")),
]


def _mutants() -> Iterator[Mutant]:
    for name, of in FORMATS.items():
        for file in of.files:
            changes = ANY | _OF[of.of]
            if file.endswith("train.bin"):  # a cache is known by its size alone
                changes = {"empty": ANY["empty"], "cut short": ANY["cut short"]}
            for how, change in changes.items():
                yield Mutant(name, file, how, changed(change, file, f"{name} {file} {how}"))
            for how, make in PLACES.items():
                yield Mutant(name, file, how, in_place(make, file))
    yield from (Mutant(*tree) for tree in TREES)


MUTANTS = {str(mutant): mutant for mutant in _mutants()}


# --- guards


@contextmanager
def guarded(seconds: int = 60, memory: int = 3 << 30) -> Iterator[None]:
    """Let nothing hang, and nobody take more than some bytes beside what this process has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, limits[1]))
    try:
        with limited(seconds):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


NOBODY = 65534


def as_nobody(function: Callable[[], str]) -> str:
    """Call a function where reading may be forbidden: in a fork that is not root's, which reads all."""
    if os.geteuid() != 0:
        return function()
    out, into = os.pipe()
    if (pid := os.fork()) == 0:
        with suppress(BaseException):
            os.setgroups([]), os.setresgid(NOBODY, NOBODY, NOBODY), os.setresuid(NOBODY, NOBODY, NOBODY)
            try:
                said = function()
            except BaseException as error:
                said = f"{type(error).__name__} {error}"
            os.write(into, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(into)
    with open(out, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said
