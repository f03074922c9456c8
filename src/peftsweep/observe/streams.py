"""Keep a command running if a standard stream is closed, lacks characters, or loses its reader.

Also progress lines for long work, in terminals, files and pipes alike.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import select
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

Item = TypeVar("Item")
EVERY_SECONDS = 2.0  # seconds between two progress lines
FEW_LINES = 20  # progress is shown only for more items than this

IN_ASCII = {"\N{MINUS SIGN}": "-", "\N{PLUS-MINUS SIGN}": "+/-", "\N{EN DASH}": "-", "\N{HORIZONTAL ELLIPSIS}": "..."}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """An error handler of ``codecs``: replace characters that an encoding lacks by others, or by their numbers."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking), error.end


codecs.register_error("peftsweep.ascii", _in_ascii)


class _Lasting(io.FileIO):
    """A descriptor to write to. After an error, as after ``| head -1``, all further output is dropped.

    If the descriptor does not block, as of some parent processes, a full pipe is waited for all the same.
    """

    def write(self, content: Any, /) -> int:
        try:
            while (written := super().write(content)) is None:
                select.select([], [self.fileno()], [])
            return written
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(content)


def settle() -> None:
    """Make standard output and error accept all output. Call it when a command begins.

    A closed descriptor is opened on the null device; otherwise the next opened file would get its number, and prints
    would write to it. Streams that replace Python's own, as in a notebook, are left alone.
    """
    for number in (0, 1, 2):
        _open(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or (stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper)):
            lasting = _lasting(stream, number)
            setattr(sys, name, lasting)
            setattr(sys, f"__{name}__", lasting)


def _open(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def _lasting(stream: io.TextIOWrapper | None, number: int) -> io.TextIOWrapper:
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(number, "wb", closefd=False)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="peftsweep.ascii",
        line_buffering=number == 2 or (stream is not None and (stream.line_buffering or stream.write_through)),
    )


def progress(items: Iterable[Item], done: str, total: int, *, quiet: bool) -> Iterator[Item]:
    """``items``, with a progress line from time to time: ``checked 120 of 2,000 points``.

    ``done`` is the text of the line, with a place for the numbers. The first line comes after a second; for few items
    there is none.
    """
    last = time.monotonic() - EVERY_SECONDS / 2
    for number, item in enumerate(items):
        if not quiet and number and total > FEW_LINES and time.monotonic() - last > EVERY_SECONDS:
            last = time.monotonic()
            print(done.format(f"{number:,} of {total:,}"), flush=True)
        yield item


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress warnings and log lines in the body: they occur again, in the trial's log, when the trial runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)  # restore it: these contexts may be nested
