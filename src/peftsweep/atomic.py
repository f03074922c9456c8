"""Files that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # how the names end that files have while they are written


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name of this writer's own, in the folder of ``file``, that becomes ``file`` at the end.

    The content is on the disk before it has the name. After an error neither is changed. Who may read the file is for
    the user's umask.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name[:100]}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
