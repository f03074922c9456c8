"""Claims of trials, with a heartbeat: which process runs a trial, across processes, containers and machines."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any

from filelock import FileLock

from peftsweep.study import atomic, owner
from peftsweep.study.record import RESULT, write_json
from peftsweep.study.store import trial_folder

HEARTBEAT_SECONDS = 15.0  # seconds between two heartbeats of a running trial
LEASE_SECONDS = 120.0  # seconds without a heartbeat after which a process on another machine counts as dead
LOCK = 30.0  # the longest wait in seconds for the lock of the claims, which is held for milliseconds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of a disk without locks
SETTLE_SECONDS = 0.5  # without locks, seconds to wait for other processes that write the same claim


class Claimed(Exception):
    """Another process runs the trial, or may do so."""


class Claim(Enum):
    """The state of a claim."""

    held = auto()  # its process is alive, or may be
    left = auto()  # its process has died


_tokens: dict[str, str] = {}  # tokens of the trials that this process holds, by identity
_watched: dict[Path, tuple[tuple[int, int], float]] = {}  # claims of others: their last state, and when it was seen


def claimed(study: Path, identity: str) -> Claim | None:
    """The state of the trial's claim; None if there is none."""
    file = _claim(study, identity)
    if not file.exists():
        return None
    return Claim.held if _holder(file) else Claim.left


@contextmanager
def claim(study: Path, identity: str) -> Iterator[None]:
    """Claim the trial for this process during the block, so that no process of another sweep runs it too.

    A claim ends with its process. The claim of a dead process on this machine is taken at once; that of a process that
    cannot be seen from here (on another machine or in a container) after ``LEASE_SECONDS`` seconds without a heartbeat.

    Raises:
        Claimed: another process that is alive, or may be, holds the claim; the message names it.
    """
    file, token = _claim(study, identity), uuid.uuid4().hex
    file.parent.mkdir(parents=True, exist_ok=True)
    with deciding(file):
        if holder := _holder(file):
            raise Claimed(holder)
        write_json(file, owner.me() | {"token": token})
    if not _is_mine(file, token):  # without locks, another process wrote at the same moment
        raise Claimed("another process has just taken it")
    _tokens[identity] = token
    over = threading.Event()
    pulse = threading.Thread(target=_beat, args=(file, token, over), daemon=True)
    pulse.start()
    try:
        yield
    finally:
        over.set()
        pulse.join()
        _tokens.pop(identity, None)
        with suppress(OSError):
            if _is_mine(file, token):  # else it expired, and another process has it now
                file.unlink()


def check_claim(study: Path, identity: str) -> None:
    """Check the claim of this process before it writes files of a trial.

    Raises:
        Claimed: the claim expired while this process was suspended, and another process has, or had, the trial.
    """
    token = _tokens.get(identity)
    if token and not _is_mine(_claim(study, identity), token):
        raise Claimed("another process took it, as this one sent no heartbeat for too long, or its study was moved")


def running(study: Path) -> list[str]:
    """The running trials: the folder of each, with the machine and process that run it."""
    found = []
    for file in sorted((study / ".claims").glob("*.json")):
        if _holder(file):
            with suppress(OSError, ValueError):  # it has ended meanwhile
                holder = _content(file)
                name = trial_folder(study, "trial", file.stem).name
                found.append(f"{name} on {holder['host']}, process {holder['pid']}")
    return found


def cut_off(study: Path) -> list[Path]:
    """The folders of trials that were started, have no record and are not running."""
    begun = [file.parents[1] for file in study.glob("*/.hydra/config.yaml")]
    claims = study / ".claims"
    held = {file.stem for file in claims.glob("*.json") if _holder(file)}
    left = [place for place in begun if not (place / RESULT).exists() and place.name.rpartition("-")[2] not in held]
    return sorted(left)


def _content(file: Path) -> Any:
    """What a claim says.

    Raises:
        OSError: it is gone, or cannot be read, which are told apart: only a claim that is gone is nobody's.
        ValueError: it is damaged.
    """
    return json.loads(file.read_bytes())


def _claim(study: Path, identity: str) -> Path:
    return study / ".claims" / f"{identity}.json"


@contextmanager
def deciding(file: Path) -> Iterator[None]:
    """Lock out other processes while this one decides what to write to ``file``; on a disk without locks nothing is.

    The lock is a file beside it.
    """
    lock = FileLock(file.with_name(".lock"), timeout=LOCK)
    try:
        atomic.persistently(lock.acquire, NO_LOCKS)
    except (OSError, NotImplementedError) as error:  # a timeout is an OSError too
        if getattr(error, "errno", None) not in (None, *NO_LOCKS):
            raise
        yield
        time.sleep(SETTLE_SECONDS)
        return
    try:
        yield
    finally:
        lock.release()


def _is_mine(file: Path, token: str) -> bool:
    """Whether the claim still holds ``token``, which this process wrote."""
    try:
        return bool(_content(file)["token"] == token)
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError):
        return False
    except (OSError, ValueError):  # it cannot be read at the moment
        return True


def _holder(file: Path) -> str | None:
    """The process that runs, or may run, the trial of this claim, in words; None if there is none."""
    try:
        holder = _content(file)
        alive = owner.alive(holder)
        text = f"run by process {holder['pid']} on {holder['host']}"
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except OSError:  # for instance the file of another user; its age can still be read
        holder, alive, text = {}, None, "run by another process"
    if alive is not None:
        return text if alive else None
    try:
        left, age = _silence_left(file, holder)
    except FileNotFoundError:
        return None
    if left <= 0:
        return None
    dated = f", dated {-age:,.0f} s ahead of this disk's clock" if age < -1 else ""
    return f"{text}{dated}; it is taken over in {left:.0f} s if no heartbeat comes"


def _silence_left(file: Path, holder: dict[str, Any]) -> tuple[float, float]:
    """The seconds until a claim whose process cannot be seen expires, and its age by the clock of the disk.

    An old claim expires at once, unless both processes share one clock, which may have been changed. A claim that does
    not change while this process watches it expires too, whatever its date. An expired claim gets the time 0, so that
    every other process sees it.
    """
    stat, now = file.stat(), time.monotonic()
    state, where = (stat.st_mtime_ns, stat.st_ino), file.absolute()
    if _watched.get(where, (None,))[0] != state:
        _watched[where] = state, now
    age = _now(file) - stat.st_mtime
    patience = LEASE_SECONDS
    if age >= LEASE_SECONDS:
        patience = min(LEASE_SECONDS, 3 * HEARTBEAT_SECONDS) if owner.same_kernel(holder) and stat.st_mtime else 0.0
    left = patience - (now - _watched[where][1])
    if left <= 0 and stat.st_mtime:
        with suppress(OSError):
            os.utime(file, (0, 0))
    return left, age


def _now(file: Path) -> float:
    """The time by the clock of the file system, which all machines share."""
    mark = file.with_name(".now")
    try:
        mark.touch()
        return mark.stat().st_mtime
    except OSError:  # a read-only study
        return time.time()


def _beat(file: Path, token: str, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            if not _is_mine(file, token):
                return
            os.utime(file)
