"""Worker processes of this machine: on which device each works, and how it starts.

They are forked from one process that has imported as much as it may (``preload``). That process never initialises
CUDA; should an installed package do so there all the same, a worker notices it right after the fork, and workers are
started by ``spawn`` instead. A worker names its GPU in ``CUDA_VISIBLE_DEVICES`` before it imports anything that could
look at one.

Nothing heavy is imported at the top of this module: a worker reads it before its device is set.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from peftsweep.errors import InputError

VISIBLE = "CUDA_VISIBLE_DEVICES"
PRELOAD = "peftsweep.preload"  # what the process that workers are forked from imports
PROGRAM = "peftsweep.everything"  # by its name, as what it imports comes after the device is set
CPU = ""  # the place of a worker that sees no GPU
Place = str | None  # a worker's CUDA_VISIBLE_DEVICES; None: as in this process
READY, CUDA_LOST = "ready", "forked from a process that has initialised CUDA"
EXIT_SECONDS = 5.0  # until a worker that was told to end is killed


# ---- where -----------------------------------------------------------------------------------------


def places(workers: int | None, devices: Sequence[Any] | None, asked: Iterable[str]) -> list[Place]:
    """The place of each worker, for trials whose ``device`` keys are ``asked``.

    ``devices`` are numbers as torch counts the visible CUDA devices, None for all; ``workers`` is their number, None
    for one a device (on a CPU one).

    Raises:
        InputError: ``devices`` names one that is not there.
    """
    asked = set(asked)
    visible = [] if asked == {"cpu"} else _visible()
    for number in devices or []:
        if not (str(number).isdecimal() and int(number) < len(visible)):
            there = ", ".join(map(str, range(len(visible)))) or "none"
            why = "; device=cpu uses none" if asked == {"cpu"} else ""
            raise InputError(f"hydra.launcher.devices: no CUDA device {number}; there are: {there}{why}")
    if any(":" in device for device in asked):  # cuda:1 means the second of all that are visible
        return [None] * (workers or 1)
    chosen = visible if devices is None else [visible[int(number)] for number in devices]
    dealt: list[Place] = [*chosen] or [CPU]
    return [dealt[number % len(dealt)] for number in range(workers or len(dealt))]


def _visible() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each visible device. CUDA is not initialised."""
    import torch

    count = torch.cuda.device_count()
    masked = os.environ.get(VISIBLE)
    return masked.split(",")[:count] if masked and count else [str(number) for number in range(count)]


def hide_gpus() -> None:
    """Have this process, and all that it starts, see no GPU; without effect on a torch that is imported already."""
    if "torch" not in sys.modules:
        os.environ[VISIBLE] = CPU


# ---- the parent's side -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Child:
    """A worker process: ``connection`` leads to it; ``output`` is a descriptor of what it has printed."""

    process: BaseProcess
    connection: connection.Connection[Any, Any]
    output: int

    def end(self, seconds: float = 0.0) -> None:
        """Let it end by itself within ``seconds``, if it is idle; else kill it."""
        self.connection.close()
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        os.close(self.output)


_method = "forkserver"  # a start method of multiprocessing
_ahead: list[tuple[Place, Future[Child]]] = []  # workers that were started before there was work for them


def begin_to_import() -> None:
    """Start the process that workers are forked from; it imports what this process imports at the same time."""
    from multiprocessing import forkserver, resource_tracker

    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOAD])
    in_main = threading.current_thread() is threading.main_thread()
    # A terminal that is closed tells all its processes; it is the command that then interrupts the workers.
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN) if in_main else None
    resource_tracker.ensure_running()  # which unblocks Ctrl-C when it has started
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # in a terminal it reaches that process too
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if hangup is not None:
            signal.signal(signal.SIGHUP, hangup)


def start_ahead(chosen: Sequence[Place]) -> None:
    """Begin to start a worker on each GPU of these places, while this process still imports.

    Elsewhere workers inherit all that they need, and start at once.
    """
    gpus = [place for place in chosen if place]
    if gpus:
        pool = ThreadPoolExecutor(len(gpus))
        _ahead.extend((place, pool.submit(_start, place, None)) for place in gpus)
        pool.shutdown(wait=False)


def end_ahead() -> None:
    """End the workers that were started ahead and not needed."""
    while _ahead:
        with suppress(OSError):  # one that could not be started
            _ahead.pop()[1].result().end()


def start(place: Place, threads: int | None) -> Child:
    """A worker in that place, with so many CPU threads (None: as many as torch takes)."""
    if threads is None:
        for number, (where, child) in enumerate(_ahead):
            if where == place:
                del _ahead[number]
                return child.result()
    return _start(place, threads)


def _start(place: Place, threads: int | None) -> Child:
    global _method
    context: Any = multiprocessing.get_context(_method)
    output, path = tempfile.mkstemp(prefix="peftsweep-worker-", suffix=".log")
    try:
        mine, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, path, place, threads), daemon=True)
        process.start()
        theirs.close()
        said = READY
        with suppress(EOFError, OSError):  # it died at once, as is seen when it is given work
            said = mine.recv()
    finally:
        Path(path).unlink(missing_ok=True)  # both have it open by now, so that nothing is left however they end
    child = Child(process, mine, output)
    if said == READY:
        return child
    child.end()
    _method = "spawn"
    return _start(place, threads)


# ---- the worker's side -----------------------------------------------------------------------------


def _work(channel: connection.Connection[Any, Any], output: str, place: Place, threads: int | None) -> None:
    """The life of a worker."""
    os.setpgid(0, 0)  # Ctrl-C is for the parent, which then interrupts the trial once
    # By it the parent interrupts a trial, also where the command ignores it, as one in the background of a script does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    if place is not None:
        os.environ[VISIBLE] = place
    lost = _cuda_lost()
    channel.send(CUDA_LOST if lost else READY)
    if lost:
        return
    importlib.import_module(PROGRAM).workers.serve(channel, threads)


def _cuda_lost() -> bool:
    """Whether CUDA was initialised before this process was forked, and so cannot be used in it."""
    torch = sys.modules.get("torch")
    return torch is not None and (torch.cuda.is_initialized() or getattr(torch._C, "_cuda_isInBadFork", bool)())


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
