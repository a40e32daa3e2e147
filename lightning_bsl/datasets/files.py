"""Files as people have them: which files below a folder count, and what to say of one that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_SYSTEM = {"@eadir", "lost+found", "$recycle.bin", "system volume information"}  # folders that file systems make
_STARTS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS and not the file itself: run `git lfs pull`"),
    (b"\x1f\x8b", "it is compressed with gzip: unpack it, or give it a name that ends in .gz"),
    (b"BZh", "it is compressed with bzip2: unpack it"),
    (b"\xfd7zXZ", "it is compressed with xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd: unpack it"),
    (b"PK\x03\x04", "it is a zip archive: unpack it"),
    (b"\xff\xfe", "it looks like UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "it looks like UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"),
)
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
OPENED = tuple(_OPEN)  # the endings of compressed files that are read
_AGAIN = "remove it and download it, or copy it, again"


def is_hidden(name: str) -> bool:
    """Whether a file or a folder of this name is no part of a data set.

    Such are names that begin with a dot or two underscores (``.DS_Store``, ``._a.txt``, ``.git``, ``.ipynb_checkpoints``,
    ``__MACOSX``), as for the library `datasets`, and the folders that file systems make (``lost+found``, ``@eaDir``).

    Args:
        name: The name alone, without its folder.

    Example:
        >>> [name for name in ("a.txt", ".git", "__MACOSX", "lost+found") if is_hidden(name)]
        ['.git', '__MACOSX', 'lost+found']
    """
    return name.startswith((".", "__")) or name.lower() in _SYSTEM


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without hidden ones.

    Raises:
        OSError: The folder cannot be read.
        ValueError: A link in it leads nowhere.
    """
    return [path for path, is_folder in _entries(folder) if is_folder]


def files_below(
    folder: Path, skip: Iterable[Path] = (), is_data: Callable[[Path], bool] = lambda path: False
) -> Iterator[Path]:
    """Yield the files in a folder and in all folders below it, sorted, without hidden ones.

    Links are followed, but for those to a folder that holds the link.

    Args:
        folder: The folder.
        skip: Folders to leave out.
        is_data: Whether a path has the name of a file of the data set.

    Raises:
        OSError: A folder cannot be read.
        ValueError: A link leads nowhere, there is something that is no file (a pipe, a device), or there is a folder without
            files which has the name of a file.
    """
    skipped = {path.resolve() for path in skip}

    def walk(path: Path, above: tuple[Path, ...]) -> Iterator[Path]:
        real = path.resolve()
        if real in above or real in skipped:
            return
        for entry, is_folder in _entries(path):
            if not is_folder:
                yield entry
                continue
            empty = True
            for file in walk(entry, (*above, real)):
                empty = False
                yield file
            if empty and is_data(entry):
                raise ValueError(f"{shown(entry)} is a folder without files: bring the file of this name, or remove the folder")

    yield from walk(folder, tuple(folder.resolve().parents))


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """What is in a folder, sorted by name, without what is hidden; and whether it is a folder."""
    entries: list[tuple[Path, bool]] = []
    try:
        names = sorted(os.listdir(folder))
    except PermissionError as error:
        raise cannot_read(folder, error) from error
    for name in names:
        path = folder / name
        if is_hidden(name):
            continue
        try:
            mode = path.stat().st_mode
        except PermissionError as error:
            raise cannot_read(path, error) from error
        except OSError as error:
            raise ValueError(
                f"{shown(path)} is a link that leads nowhere ({error.strerror}): bring what it points to, or remove the link"
            ) from error
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise ValueError(f"{shown(path)} is no file but a pipe or a device: move it out of the folder of the data")
        entries.append((path, stat.S_ISDIR(mode)))
    return entries


def shown(path: Path) -> str:
    """A path for a message: quoted where it has line breaks or other characters that cannot be printed.

    Example:
        >>> print(shown(Path("a b.txt")), shown(Path("a" + chr(160) + "b.txt")).partition("xa0")[1])
        a b.txt xa0
    """
    name = str(path)
    return name if name.isprintable() else ascii(name)


def listing(names: Iterable[str], most: int = 5) -> str:
    """The first few of some names for a message, and how many more there are.

    Example:
        >>> listing(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    names = list(names)
    printable = ", ".join(name if name.isprintable() else ascii(name) for name in names[:most])
    return printable + (f" and {len(names) - most:,} more" if len(names) > most else "")


def cannot_read(path: Path, error: OSError) -> PermissionError:
    """The error to raise where reading is not allowed."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return PermissionError(
        f"{shown(path)} cannot be read ({reason}): give yourself the right with `chmod -R u+rX`, or ask its owner"
    )


@contextmanager
def permitted() -> Iterator[None]:
    """Where the system forbids to read something, raise an error that names it and says what to do."""
    try:
        yield
    except PermissionError as error:
        if error.filename is None:  # it is such an error already
            raise
        raise cannot_read(Path(os.fsdecode(error.filename)), error) from error


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, compressed as its name says or not; errors name it."""
    try:
        with _OPEN.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise broken(path, error) from error


def broken(path: Path, problem: object, remedy: str = _AGAIN) -> OSError | ValueError:
    """The error to raise for a file that cannot be read as what its name says.

    Args:
        path: The file.
        problem: What is wrong; or the error that a library raised, which becomes a part of the message.
        remedy: What to do about it. Where the file's first bytes tell more, the message says that instead: of a web page,
            a compressed file, a pointer of Git LFS, an empty file.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "train.parquet")
        >>> _ = file.write_text("<!DOCTYPE html><title>404</title>")
        >>> print(str(broken(file, "is no Parquet file")).partition("train")[2])
        .parquet is no Parquet file; it is a web page (HTML), as a failed download leaves one: remove it and download it, or
        copy it, again
    """
    try:
        told = _told_by_start(path)
    except OSError as error:
        problem, told = error, None
    if isinstance(problem, PermissionError):
        return cannot_read(path, problem)
    if isinstance(problem, BaseException):
        text = " ".join(str(problem).split()) or type(problem).__name__
        problem = f"cannot be read ({text if len(text) <= 300 else text[:300] + '...'})"
    return ValueError(f"{shown(path)} {problem}; {told or remedy}")


def is_pointer(start: bytes) -> bool:
    """Whether a file that starts so is a pointer of Git LFS, which stands for a file that was not fetched."""
    return start.startswith(_STARTS[0][0])


def _told_by_start(path: Path) -> str | None:
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return f"it is empty: {_AGAIN}"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"it is a web page (HTML), as a failed download leaves one: {_AGAIN}"
    if path.suffix.lower() in OPENED:  # compressed, as it should be
        return None
    return next((remedy for magic, remedy in _STARTS if start.startswith(magic)), None)
