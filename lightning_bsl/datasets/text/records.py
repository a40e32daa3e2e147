"""Files of text: documents as they are, and records of JSON and Parquet, with errors that say where.

Plain text and JSON are read here and not by `datasets`, which changes the ends of lines, takes texts that look like dates for
dates, fails where a column that is not needed has values of several types, and does not say in which file or line. Parquet is
read by pyarrow, as `datasets` does.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_bsl.datasets.files import OPENED, broken, is_pointer, opened, shown
from lightning_bsl.datasets.hub import text_library

_NOT_OPENED = (".zst", ".zip", ".lz4", ".7z", ".br", ".snappy")
_JSON_LINES, _RECORDS = (".jsonl", ".ndjson"), (".jsonl", ".ndjson", ".json", ".parquet")
KINDS = (".txt", *_RECORDS)
_FROM_UTF16 = "convert it with `iconv -f UTF-16 -t UTF-8`"
_TO_UTF8 = "convert it, for example with `iconv -f LATIN1 -t UTF-8` where it is Latin-1"


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name, ``.txt.gz`` being ``.txt``; ``None`` if it is none of `KINDS`.

    Raises:
        ValueError: It is of one of these kinds, but compressed in a way that is not read.
    """
    kind, packing = _suffixes(path)
    if packing in _NOT_OPENED or (kind == ".parquet" and packing):
        raise ValueError(f"{shown(path)} is compressed in a way that is not read; unpack it, or compress it with gzip (.gz)")
    return kind


def is_records(path: Path) -> bool:
    """Whether a file has records, and is not one document."""
    return _suffixes(path)[0] in _RECORDS


def read_document(path: Path) -> str:
    """Return the text of a file as it is, the ends of its lines too, but for a byte order mark.

    Raises:
        ValueError: It is not UTF-8, or has characters of code 0.
    """
    with opened(path) as file:
        contents: bytes = file.read()
    if is_pointer(contents):
        raise broken(path, "is no text")
    text = _decoded(contents, path, 0)
    before, zero, _ = text.partition("\0")
    if zero:
        line = before.count("\n") + 1
        raise broken(
            path,
            f"has a character of code 0 in line {line}: it is no text, or is in UTF-16",
            f"{_FROM_UTF16}, or move it out of the folder",
        )
    return text


def read_records(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file, each with the place where it stands, for messages.

    A JSON file may hold one record a line, a list of records, or a single record.

    Args:
        path: The file.
        column: The column to read, of a file that is stored by columns.

    Raises:
        ValueError: The file cannot be read.
    """
    if _suffixes(path)[0] == ".parquet":
        records = _parquet(path, column)
    elif _has_lines(path):
        records = _json_lines(path)
    else:
        records = _json(path)
    return records


def _suffixes(path: Path) -> tuple[str | None, str]:
    """The kind of a file, and how it is compressed."""
    *_, last, end = ("", "", *(suffix.lower() for suffix in path.suffixes))
    if end in KINDS:
        return end, ""
    if last in KINDS and end in (*OPENED, *_NOT_OPENED):
        return last, end
    return None, ""


def _decoded(contents: bytes, path: Path, before: int) -> str:
    """Bytes as text; ``before``: the lines before them."""
    try:
        return contents.removeprefix(codecs.BOM_UTF8 if not before else b"").decode()
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        line = before + error.object[: error.start].count(b"\n") + 1
        raise broken(
            path,
            f"is not UTF-8: byte 0x{wrong:02x} in line {line}",
            _FROM_UTF16 if contents.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else _TO_UTF8,
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers, counted from 1."""
    with opened(path) as file:
        for number, contents in enumerate(file, 1):
            if line := _decoded(contents, path, number - 1).strip():
                yield number, line


def _has_lines(path: Path) -> bool:
    """Whether a JSON file has one record a line, rather than one value over all lines."""
    _, first = next(_lines(path), (0, ""))
    if first.startswith("["):
        return False
    if _suffixes(path)[0] in _JSON_LINES:
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return not first  # of an empty file both ways find nothing
    return True


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise broken(
                path,
                f"has no JSON record in line {number} ({error}): {line[:80]!r}",
                "correct the line, or leave it out; if it is the last one, the file may be cut short",
            ) from error
        yield f"line {number} of {shown(path)}", record


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with opened(path) as file:
        contents: bytes = file.read()
    text = _decoded(contents, path, 0)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise broken(
            path,
            f"is neither a JSON list of records nor one record a line ({error})",
            "correct it; if the place is its end, the file may be cut short",
        ) from error
    for number, record in enumerate(value if isinstance(value, list) else [value]):
        yield f"record {number} (counted from 0) of {shown(path)}", record


def _parquet(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    parquet = text_library("pyarrow.parquet")
    number = 0
    try:
        # pyarrow takes the name of a file for UTF-8, but bytes as they are
        with text_library("pyarrow").OSFile(os.fsencode(path)) as source, parquet.ParquetFile(source) as file:
            columns = file.schema_arrow.names
            if column not in columns:
                yield f"{shown(path)}", dict.fromkeys(columns)
                return
            for batch in file.iter_batches(1000, columns=[column]):
                for record in batch.to_pylist():
                    yield f"record {number} (counted from 0) of {shown(path)}", record
                    number += 1
    except (OSError, ValueError, LookupError, TypeError, MemoryError, NotImplementedError) as error:  # Arrow's are such
        raise broken(path, error) from error
