"""Files that are written whole or not at all: a full disk, or a kill, leaves what was there before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file beside its place, and move it there when it is complete.

    Args:
        path: The place of the file.

    Yields:
        Where to write it. If nothing is written there, nothing is moved.

    Raises:
        OSError: It cannot be written; the message names ``path``, and what was there before is still there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "plan.csv")
        >>> with written_whole(path) as unfinished:
        ...     _ = unfinished.write_text("stage")
        >>> path.read_text(), unfinished.exists()
        ('stage', False)
    """
    unfinished = path.with_name(f".unfinished-{path.name}")  # with the same ending, by which some writers choose a format
    try:
        with named_if_it_fails(path):
            yield unfinished
            if os.path.lexists(unfinished):
                os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def append_whole(path: Path, content: bytes) -> None:
    """Append to a file, or leave it as it is.

    A kill can cut only what it is appending; with a full disk not even that stays.

    Args:
        path: The file.
        content: What is appended.

    Raises:
        OSError: It cannot be written; the message names ``path``.
    """
    with named_if_it_fails(path), open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            written = file.write(content)
            while written < len(content):  # a disk that becomes full takes a part without an error
                written += file.write(content[written:])
        except BaseException:
            with suppress(OSError):
                file.truncate(before)
            raise


@contextmanager
def named_if_it_fails(path: Path) -> Iterator[None]:
    """Where the system refuses to write, raise an error that names the file and says what to do.

    Args:
        path: The file.

    Raises:
        OSError: The system refused.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it is such an error already
            raise
        raise OSError(
            f"{path} cannot be written ({os.strerror(error.errno)}): make room there, or give yourself the right to write, and "
            "give the same command again; what was saved before is whole"
        ) from error
