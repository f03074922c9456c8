"""Who runs a trial: claims with a heartbeat, that hold between processes, containers and machines."""

from __future__ import annotations

import errno
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

from peftsweep.study import owner
from peftsweep.study.record import (
    RESULT,
    read_json,
    write_json,
)
from peftsweep.study.store import trial_folder

HEARTBEAT_SECONDS = 15.0  # seconds between two signs of life of a running trial
LEASE_SECONDS = 120.0  # seconds of silence after which a trial of another machine is taken for dead
LOCK = 30.0  # seconds to wait for the lock of the claims, which is held for milliseconds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a disk that has none
SETTLE_SECONDS = 0.5  # seconds in which others may write the same claim, where there are no locks


class Claimed(Exception):
    """Another process runs the trial, or may do so."""


class Claim(Enum):
    """How a trial is claimed."""

    held = auto()  # by a process that is alive, or may be
    left = auto()  # by one that died


_tokens: dict[str, str] = {}  # of the trials that this process holds, by identity
_watched: dict[Path, tuple[tuple[int, int], float]] = {}  # claims of others: as they were seen, and since when


def claimed(study: Path, identity: str) -> Claim | None:
    """Whether the trial is claimed by a process; None where it is by none."""
    file = _claim(study, identity)
    if not file.exists():
        return None
    return Claim.held if _holder(file) else Claim.left


@contextmanager
def claim(study: Path, identity: str) -> Iterator[None]:
    """Hold the trial for this process during the block, so that no other one of any sweep runs it too.

    A claim ends with its process: that of a dead one of this machine is taken at once, one that is silent and whose
    process cannot be seen from here (of another machine or container) after ``LEASE_SECONDS`` seconds.

    Raises:
        Claimed: another process that is alive, or may be, holds it; it says which.
    """
    file, token = _claim(study, identity), uuid.uuid4().hex
    file.parent.mkdir(parents=True, exist_ok=True)
    with _deciding(file):
        if holder := _holder(file):
            raise Claimed(holder)
        write_json(file, owner.me() | {"token": token})
    if not _is_mine(file, token):  # there are no locks here, and another wrote at the same moment
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
            if _is_mine(file, token):  # else it lapsed, and is another's now
                file.unlink()


def check_claim(study: Path, identity: str) -> None:
    """To be called before something of a trial is written, by a process that claimed it.

    Raises:
        Claimed: the claim lapsed while this process stood still, and the trial is another's.
    """
    token = _tokens.get(identity)
    if token and not _is_mine(_claim(study, identity), token):
        raise Claimed("another process has taken it, as this one was silent for too long")


def running(study: Path) -> list[str]:
    """What runs now: the trial's folder, the machine and the process that hold it."""
    found = []
    for file in sorted((study / ".claims").glob("*.json")):
        if _holder(file):
            with suppress(OSError, ValueError):  # it has ended meanwhile
                holder = read_json(file)
                name = trial_folder(study, "trial", file.stem).name
                found.append(f"{name} on {holder['host']}, process {holder['pid']}")
    return found


def cut_off(study: Path) -> list[Path]:
    """The folders of trials that began, left no record and do not run."""
    begun = [file.parents[1] for file in study.glob("*/.hydra/config.yaml")]
    claims = study / ".claims"
    held = {file.stem for file in claims.glob("*.json") if _holder(file)}
    left = [place for place in begun if not (place / RESULT).exists() and place.name.rpartition("-")[2] not in held]
    return sorted(left)


def _claim(study: Path, identity: str) -> Path:
    return study / ".claims" / f"{identity}.json"


@contextmanager
def _deciding(file: Path) -> Iterator[None]:
    """Have no other process decide in the block whose the trial is; without locks the last to write wins."""
    lock = FileLock(file.with_name(".lock"), timeout=LOCK)
    try:
        lock.acquire()
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
    """Whether the claim is that of the process that wrote ``token`` into it."""
    try:
        return bool(read_json(file)["token"] == token)
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError):
        return False
    except (OSError, ValueError):  # it cannot be read at the moment
        return True


def _holder(file: Path) -> str | None:
    """The process that runs, or may run, the trial of this claim, in words; None if there is none."""
    try:
        holder = read_json(file)
        alive = owner.alive(holder)
        text = f"run by process {holder['pid']} on {holder['host']}"
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except OSError:  # such as of another user's; how old it is can be seen all the same
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
    return f"{text}{dated}; without a sign of life from there it is taken over in {left:.0f} s"


def _silence_left(file: Path, holder: dict[str, Any]) -> tuple[float, float]:
    """The seconds until a claim whose process cannot be seen lapses, and its age by the disk's clock.

    A claim that is old lapses at once, unless one clock, which may have been set, is that of both processes. Any lapses
    that does not change while this process watches it, whatever its date. One that lapsed is dated back, so that every
    other process sees it.
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
    """The time by the clock of the file system, which several machines share."""
    mark = file.with_name(".now")
    try:
        mark.touch()
        return mark.stat().st_mtime
    except OSError:  # a study that may only be read
        return time.time()


def _beat(file: Path, token: str, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            if not _is_mine(file, token):
                return
            os.utime(file)
