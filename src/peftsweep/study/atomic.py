"""Atomic files: written under another name, then renamed."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peftsweep.study import owner

PARTIAL = ".partial"  # how the names end that files have while they are written
ABANDONED_SECONDS = 3600.0  # seconds without a change after which a temporary file counts as abandoned

TRANSIENT = (errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENOLCK)  # which a network's disk may get over
PAUSES = (0.1, 1.0)  # seconds before another try


def write_text(file: Path, text: str) -> None:
    """Replace ``file``; it is on the disk when this returns.

    Raises:
        OSError: it cannot be written, after ``TRANSIENT`` errors not at the third try either.
    """

    def write() -> None:
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")

    persistently(write)


def persistently(write: Callable[[], None]) -> None:
    """Call ``write``, and call it again after an error that may be temporary.

    Raises:
        OSError: after one of ``TRANSIENT`` at the third try, after any other at the first.
    """
    for pause in (*PAUSES, None):
        try:
            return write()
        except OSError as error:
            if pause is None or error.errno not in TRANSIENT:
                raise
            time.sleep(pause)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name of this writer's own, in the folder of ``file``, that becomes ``file`` at the end.

    The content is on the disk before it has the name. After an error neither is changed. Who may read the file is for
    the user's umask.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name[:100]}.{owner.tag()}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_partials(folder: Path, *, own: bool = False) -> None:
    """Delete below ``folder`` what writers that were killed have left.

    If it is this process's ``own`` that is all, else what processes have left that have ended; of those that cannot be
    seen from here, what has not changed for ``ABANDONED_SECONDS`` seconds.
    """
    for file in folder.rglob(f".*{PARTIAL}"):
        with suppress(OSError, IndexError):
            gone = own or owner.gone(file.name.split(".")[-3])
            if gone or (gone is None and time.time() - file.stat().st_mtime > ABANDONED_SECONDS):
                file.unlink()


def sync_tree(folder: Path) -> None:
    """Have all that is in a folder on the disk when this returns."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            sync(path)


def make_way(path: Path, *, folder: bool = False) -> None:
    """Set aside what stands where a file of ours, or a ``folder``, is to be and is none, such as a link to itself.

    It is renamed and not deleted, as it may be the user's; of a link nothing is lost.
    """
    if not os.path.lexists(path) or (path.is_dir() if folder else path.is_file()):
        return
    if path.is_symlink():
        path.unlink()
    else:
        path.rename(path.with_name(f"{path.name}.aside-{uuid.uuid4().hex[:8]}"))


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
