"""The owner of a file on a shared disk: a process, and whether it still runs.

A process number is unique only within one PID namespace of one boot of a kernel: two containers may have the same host
name and the same numbers. The start of a process is counted from the boot, because the wall clock may be changed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

BOOT = Path("/proc/sys/kernel/random/boot_id")
NAMESPACE = Path("/proc/self/ns/pid")
MACHINE = ("host", "boot", "namespace")  # together with these a process number is unique


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def me() -> dict[str, Any]:
    """The identification of this process, as plain values for JSON."""
    return _machine() | {"pid": os.getpid(), "started": started(os.getpid())}


def started(pid: int) -> float | None:
    """The start of a process in the system's own units; None if it does not exist or is a zombie."""
    try:
        # The name, in brackets, may hold any character. After it come the state and, as 20th, the ticks since the boot.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except OSError:
        if BOOT.exists():
            return None
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    return None


def _is_hidden(pid: int) -> bool:
    """Whether a process whose start cannot be read may run: /proc may hide those of other users (hidepid).

    Nothing can be read either if this process has as many open files as it may have.
    """
    try:
        Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return False  # a zombie
    except (FileNotFoundError, ProcessLookupError):
        pass
    except OSError:
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def alive(owner: Mapping[str, Any]) -> bool | None:
    """Whether the process ``owner``, as written by ``me``, still runs; None if that cannot be seen from here.

    Raises:
        KeyError, TypeError: ``me`` did not write it.
    """
    if "boot" not in owner:  # written by an earlier version
        return _alive_by_clock(owner) if owner["host"] == host() else None
    here = _machine()
    if any(owner[key] != here[key] for key in MACHINE):
        return None
    return _runs(owner["pid"], lambda now: bool(now == owner["started"]))


def same_kernel(owner: Mapping[str, Any]) -> bool:
    """Whether it is a process of the same kernel, perhaps in another container, so both have the same clock."""
    return bool(owner.get("boot")) and owner.get("boot") == _machine()["boot"]


def tag() -> str:
    """A word for the names of files of this process, by which ``gone`` recognises them."""
    return f"{os.getpid()}-{started(os.getpid()) or 0:.0f}-{_machine_tag()}"


def gone(tag: str) -> bool | None:
    """Whether the process with this ``tag`` has ended; None if that cannot be seen from here."""
    pid, begun, machine = [*tag.split("-"), "", "", ""][:3]
    if machine != _machine_tag() or not pid.isdecimal():
        return None
    runs = _runs(int(pid), lambda now: f"{now:.0f}" == begun)
    return None if runs is None else not runs


def _runs(pid: int, is_its_start: Callable[[float], bool]) -> bool | None:
    """Whether the process with this number and start runs on this machine; None if /proc hides it."""
    now = started(pid)
    if now is None:
        return None if _is_hidden(pid) else False
    return is_its_start(now)


def _machine() -> dict[str, str]:
    boot, namespace = "", ""
    with suppress(OSError):  # a system without /proc
        boot, namespace = BOOT.read_text().strip(), os.readlink(NAMESPACE)
    return {"host": host(), "boot": boot, "namespace": namespace}


@functools.cache
def _machine_tag() -> str:
    return hashlib.sha256("|".join(_machine().values()).encode()).hexdigest()[:8]


def _alive_by_clock(owner: Mapping[str, Any]) -> bool:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(owner["pid"])
        return bool(process.create_time() == owner["started"] and process.status() != psutil.STATUS_ZOMBIE)
    return False


def left_to_parent(number: int, frame: FrameType | None) -> None:
    """A signal handler for workers: do nothing, as the command gets the signal too and interrupts the trial once."""
