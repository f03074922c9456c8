"""Atomic files: written under another name, then renamed."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from peftsweep.study import owner

PARTIAL = ".partial"  # the suffix of files while they are written
ABANDONED_SECONDS = 3600.0  # seconds without a change after which a temporary file counts as abandoned

# Errors of a network file system that may be temporary.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENOLCK)
PAUSES = (0.1, 1.0)  # seconds before another try


def write_text(file: Path, text: str) -> None:
    """Replace ``file``; the content is on the disk when this returns.

    Raises:
        OSError: it cannot be written, or a ``TRANSIENT`` error occurs three times.
    """

    def write() -> None:
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")

    persistently(write)


def persistently(write: Callable[[], object], lasting: Sequence[int] = ()) -> None:
    """Call ``write``, and call it again after an error that may be temporary.

    Raises:
        OSError: an error of ``TRANSIENT`` that is none of ``lasting`` at the third try, any other at the first.
    """
    for pause in (*PAUSES, None):
        try:
            write()
            return
        except OSError as error:
            if pause is None or error.errno not in TRANSIENT or error.errno in lasting:
                raise
            time.sleep(pause)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file in the folder of ``file``, which replaces ``file`` at the end.

    The content is on the disk before it gets the name. After an error ``file`` is unchanged. The user's umask decides
    the permissions.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name[:100]}.{owner.tag()}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise


def remove_partials(folder: Path, *, own: bool = False) -> None:
    """Delete the temporary files below ``folder`` that killed writers have left.

    With ``own``, the folder belongs to this process and all of them are deleted. Otherwise those of processes that have
    ended; of processes that cannot be seen from here, files unchanged for ``ABANDONED_SECONDS`` seconds.
    """
    for file in folder.rglob(f".*{PARTIAL}"):
        with suppress(OSError, IndexError):
            gone = own or owner.gone(file.name.split(".")[-3])
            if gone or (gone is None and time.time() - file.stat().st_mtime > ABANDONED_SECONDS):
                file.unlink()


def sync_tree(folder: Path) -> None:
    """Write all files of a folder to the disk before this returns."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            sync(path)


def make_way(path: Path, *, folder: bool = False) -> None:
    """Move away whatever has the name of a file, or of a ``folder``, that is to be written, but is not one.

    It is renamed and not deleted, because it may be the user's; a broken link is deleted.
    """
    if not os.path.lexists(path) or (path.is_dir() if folder else path.is_file()):
        return
    if path.is_symlink():
        path.unlink()
    else:
        path.rename(path.with_name(f"{path.name}.aside-{uuid.uuid4().hex[:8]}"))


def sync(path: Path) -> None:
    """Write the content of a file, or the names in a folder, to the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
