"""The lock of a search's journal, which is held for milliseconds, and ends with the process that holds it.

Of Optuna's own locks one waits for ever where a process was killed that held it, and so do all in its older versions.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress

from peftsweep.study import owner

SILENT_SECONDS = 30.0  # after which the lock of a process that cannot be seen from here is taken away
LONGEST_PAUSE = 1.0  # seconds between two tries


class JournalLock:
    """What ``optuna.storages.journal.JournalFileBackend`` takes as its lock.

    The lock is a link with the name of Optuna's, so that both exclude each other, that leads to the tag of the process.
    A link is made by one process alone also on network file systems without locks.
    """

    def __init__(self, journal: str) -> None:
        self._link = f"{journal}.lock"

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        pause, seen, since = 0.001, self._held_by(), time.monotonic()
        while True:
            with suppress(FileExistsError):
                os.symlink(owner.tag(), self._link)
                return True
            if (holder := self._held_by()) != seen:
                seen, since = holder, time.monotonic()
            gone = owner.gone(holder[0]) if holder else False
            if holder and (gone or (gone is None and time.monotonic() - since > SILENT_SECONDS)):
                self._take_away(holder)
            else:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def release(self) -> None:
        """Give the lock back, unless another process has taken it away."""
        if (holder := self._held_by()) and holder[0] == owner.tag():
            with suppress(FileNotFoundError):
                os.unlink(self._link)

    def _held_by(self) -> tuple[str, int] | None:
        """The tag in the link, and the link's age; None where there is no link."""
        try:
            return os.readlink(self._link), os.lstat(self._link).st_mtime_ns
        except FileNotFoundError:
            return None
        except OSError:  # a file, which another lock of Optuna's makes
            with suppress(FileNotFoundError):
                return "", os.lstat(self._link).st_mtime_ns
            return None

    def _take_away(self, holder: tuple[str, int]) -> None:
        aside = f"{self._link}.{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            os.rename(self._link, aside)
            if os.lstat(aside).st_mtime_ns == holder[1]:
                os.unlink(aside)
            else:  # another process was faster, and has the lock now
                os.rename(aside, self._link)
