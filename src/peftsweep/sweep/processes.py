"""Worker processes of this machine: on which device each works, and how it starts.

Workers are forked from one process that has imported all that does not initialise CUDA (``preload``). If an installed
package initialises CUDA there in spite of that, a worker detects it right after the fork, and workers are started by
``spawn`` instead. A worker sets ``CUDA_VISIBLE_DEVICES`` before it imports anything that could use a GPU.

Each worker has a guard process between itself and the command: the worker's parent. The guard waits until the worker
ends, or until the command closes the worker's leash or is killed. Then it kills the worker and all processes that the
worker's trial has started. If the guard is killed, the system kills the worker.

This module imports nothing large at its top, because a worker imports it before its device is set.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import connection, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from peftsweep.errors import InputError
from peftsweep.study import owner
from peftsweep.study.owner import left_to_parent

VISIBLE = "CUDA_VISIBLE_DEVICES"
PRELOAD = "peftsweep.sweep.preload"  # what the process that workers are forked from imports
PROGRAM = "peftsweep.sweep.everything"  # a name, because the module is imported only after the device is set
CPU = ""  # the place of a worker that sees no GPU
Place = str | None  # a worker's CUDA_VISIBLE_DEVICES; None: as in this process
POLL_SECONDS: float | None = 0.2  # seconds between two checks of a worker, where the system does not report its end
SOCKETS, LOG = "pymp-", "peftsweep-worker-"  # prefixes of temporary files, followed by the tag of their process
# The path of a socket may have 103 bytes on macOS and 107 on Linux, which those of jobs' own TMPDIR can exceed.
SHORT, A_SOCKET, MAX_SOCKET_PATH = "/tmp", "12345678/listener-12345678", 103
REFUSED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # too many processes, or open files
READY, CUDA_LOST = "ready", "forked from a process that has initialised CUDA"
EXIT_SECONDS = 5.0  # seconds until a worker that should end is killed, and that its guard has to kill its children
# Options of Linux's prctl: send this process a signal when its parent ends; write a core dump when this process is
# killed by a fault; make this process the parent of orphaned descendants.
PDEATHSIG, DUMPABLE, SUBREAPER = 1, 4, 36


# ---- where -----------------------------------------------------------------------------------------


def places(workers: int | None, devices: Sequence[Any] | None, device_keys: Iterable[str]) -> list[Place]:
    """The place of each worker, for trials whose ``device`` keys are ``device_keys``.

    ``devices`` are numbers as torch counts the visible CUDA devices, None for all; ``workers`` is their number, None
    for one a device (on a CPU one).

    Raises:
        InputError: ``devices`` names one that is not there.
    """
    device_keys = set(device_keys)
    visible = [] if device_keys == {"cpu"} else _visible()
    for number in devices or []:
        if not (str(number).isdecimal() and int(number) < len(visible)):
            there = ", ".join(map(str, range(len(visible)))) or "none"
            without = "; device=cpu uses none" if device_keys == {"cpu"} else "; leave it out to use the CPU"
            why = "" if visible else without
            raise InputError(f"hydra.launcher.devices: no CUDA device {number}; there are: {there}{why}")
    if any(":" in device for device in device_keys):  # cuda:1 means the second of all that are visible
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
    """Hide all GPUs from this process and its children; no effect if torch is imported already."""
    if "torch" not in sys.modules:
        os.environ[VISIBLE] = CPU


# ---- the parent's side -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Child:
    """A worker process with the id ``pid``, and its guard ``process``, which ends with the worker's exit code.

    ``connection`` leads to the worker. ``output`` is a file descriptor of the text that the worker has printed. When
    ``leash`` is closed, the guard kills the worker.
    """

    process: BaseProcess
    pid: int
    leash: connection.Connection[Any, Any]
    connection: connection.Connection[Any, Any]
    output: int

    def takes(self, message: Any) -> bool:
        """Send the worker a message; False if it has ended, which its guard may not have noticed yet."""
        os.ftruncate(self.output, 0)
        with suppress(ConnectionError):
            if owner.started(self.pid) is not None and self.process.is_alive():
                self.connection.send(message)
                return True
        return False

    def interrupt(self) -> None:
        """Interrupt the running trial."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """Kill the worker and all processes that it has started."""
        self.leash.close()
        self.process.join(EXIT_SECONDS)
        self.process.kill()
        self.process.join()

    def let_go(self) -> None:
        """Close its queue, so that an idle worker ends by itself."""
        self.connection.close()

    def end(self, seconds: float = 0.0) -> None:
        """Let an idle worker end by itself within ``seconds``, else kill it; processes that it has started end, too."""
        self.let_go()
        self.process.join(seconds)
        self.kill()
        os.close(self.output)


_method = "forkserver"  # a start method of multiprocessing
_children: weakref.WeakSet[Child] = weakref.WeakSet()  # all that were started
_ahead: list[tuple[Place, Future[Child]]] = []  # workers that were started before there was work for them


def _let_all_go() -> None:
    """Close all leashes. At its exit, a process joins its workers, and their guards ignore its SIGTERM."""
    for child in _children:
        child.leash.close()


# It runs before a process joins its workers, also after an interrupt in the middle of their orderly end.
util.Finalize(None, _let_all_go, exitpriority=100)


def begin_to_import() -> None:
    """Start the process that workers are forked from; it imports what this process imports at the same time."""
    from multiprocessing import forkserver, resource_tracker

    global _method
    _have_temporary_folder()
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOAD])
    in_main = threading.current_thread() is threading.main_thread()
    # A terminal that is closed, and some schedulers, send these signals to all processes; only the command should react
    # to them, and interrupts the workers itself.
    ignored = (signal.SIGHUP, signal.SIGTERM) if in_main else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    resource_tracker.ensure_running()  # first, because its start unblocks SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C in a terminal reaches the fork server too
    try:
        with _refusals_in_one_line():
            forkserver.ensure_running()
    except OSError:  # there is no folder for its socket
        _method = "spawn"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number, handler in before.items():
            signal.signal(number, handler)


def _have_temporary_folder() -> None:
    """Give multiprocessing's sockets a folder whose name contains the tag of this process.

    By the tag a later command sees that this one was killed. Folders and logs of killed commands are deleted here.
    """
    usual, name = tempfile.gettempdir(), f"{SOCKETS}{owner.tag()}-"
    for kind in (SOCKETS, LOG):
        for path in chain.from_iterable(Path(root).glob(f"{kind}*-*-*-*") for root in {usual, SHORT}):
            if owner.gone(path.name.removeprefix(kind).rpartition("-")[0]):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    own: dict[str, Any] = getattr(multiprocessing.current_process(), "_config")  # noqa: B009  no public name of it
    if own.get("tempdir") is None:
        fits = len(os.fsencode(f"{usual}/{name}{A_SOCKET}")) <= MAX_SOCKET_PATH
        place = usual if fits or not os.access(SHORT, os.W_OK) else SHORT
        own["tempdir"] = folder = tempfile.mkdtemp(prefix=name, dir=place)
        util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-100)


def start_ahead(chosen: Sequence[Place]) -> None:
    """Begin to start a worker on each GPU of ``chosen``, while this process still imports.

    Workers on the CPU start fast enough, because they inherit all imports.
    """
    gpus = [place for place in chosen if place]
    if gpus:
        pool = ThreadPoolExecutor(len(gpus))
        _ahead.extend((place, pool.submit(_start, place, None)) for place in gpus)
        pool.shutdown(wait=False)


def end_ahead() -> None:
    """End the workers that were started ahead and not needed."""
    while _ahead:
        with suppress(OSError, InputError):  # one that could not be started
            _ahead.pop()[1].result().end()


def start(place: Place, threads: int | None) -> Child:
    """Start a worker in that place, with this number of CPU threads (None: torch's default)."""
    if threads is None:
        for number, (where, child) in enumerate(_ahead):
            if where == place:
                del _ahead[number]
                return child.result()
    return _start(place, threads)


def must_take(child: Child, message: Any) -> None:
    """Send a message to a worker that has just started.

    Raises:
        InputError: it has ended already.
    """
    if not child.takes(message):
        raise _no_worker("it ended before it was given a trial")


def _no_worker(reason: str) -> InputError:
    """The error of a worker that the system does not let this command start, or ends at once."""
    return InputError(
        f"hydra.launcher.workers: a worker process cannot be started ({reason}); ulimit -u and -n limit "
        "processes and open files, hydra.launcher.workers=0 needs none; the same command continues"
    )


@contextmanager
def _refusals_in_one_line() -> Iterator[None]:
    """An error in the block that says that the system starts no further process is raised as ``InputError``."""
    try:
        yield
    except EOFError as error:
        raise _no_worker("the process that it is forked from has ended") from error
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise _no_worker(str(error.strerror)) from error


def _start(place: Place, threads: int | None) -> Child:
    global _method
    try:
        with _refusals_in_one_line():
            child, state = _started(place, threads, _method)
    except (FileNotFoundError, ConnectionError):  # the socket of the fork server was deleted from /tmp, as by a cleaner
        if _method == "spawn":
            raise
        _method = "spawn"
        return _start(place, threads)
    if state == READY:
        return child
    child.end()
    _method = "spawn"
    return _start(place, threads)


def _started(place: Place, threads: int | None, method: str) -> tuple[Child, str]:
    """A worker that was started by ``method``, and the state that it has reported."""
    context: Any = multiprocessing.get_context(method)
    output, path = tempfile.mkstemp(prefix=f"{LOG}{owner.tag()}-", suffix=".log")
    try:
        own_end, worker_end = context.Pipe()
        leash_end, leash = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(worker_end, leash_end, path, place, threads), daemon=True)
        process.start()
        worker_end.close()
        leash_end.close()
        state, pid = READY, process.pid
        with suppress(EOFError, OSError):  # it died at once, which is detected when it is given work
            state, pid = own_end.recv()
    finally:
        Path(path).unlink(missing_ok=True)  # both processes have it open, so that no file is left however they end
    child = Child(process, pid, leash, own_end, output)
    _children.add(child)
    return child, state


# ---- the worker's side -----------------------------------------------------------------------------


def _work(
    channel: connection.Connection[Any, Any],
    leash: connection.Connection[Any, Any],
    output: str,
    place: Place,
    threads: int | None,
) -> None:
    """The main function of a worker process."""
    os.setpgid(0, 0)  # Ctrl-C is for the parent, which then interrupts the trial once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, left_to_parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _go_on_guarded(channel, leash)
    # The parent interrupts a trial by SIGINT, also if the command itself ignores it, as in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A trial ends its forked processes by SIGTERM, so that they must not ignore it; exec resets it in other processes.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    if place is not None:
        os.environ[VISIBLE] = place
    lost = _cuda_lost()
    channel.send((CUDA_LOST if lost else READY, os.getpid()))
    if lost:
        return
    importlib.import_module(PROGRAM).workers.serve(channel, threads)


def _cuda_lost() -> bool:
    """Whether CUDA was initialised before this process was forked, and so cannot be used in it."""
    torch = sys.modules.get("torch")
    return torch is not None and (torch.cuda.is_initialized() or getattr(torch._C, "_cuda_isInBadFork", bool)())


def _go_on_guarded(channel: connection.Connection[Any, Any], leash: connection.Connection[Any, Any]) -> None:
    """Return in a child of this process, which stays behind as its guard and ends as it does."""
    _prctl(SUBREAPER, 1)
    guard = os.getpid()
    worker = os.fork()
    if worker:
        channel.close()
        _end_as(_guard(worker, leash))
    leash.close()
    os.setpgid(0, 0)
    _prctl(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os.kill(os.getpid(), signal.SIGKILL)


def _guard(worker: int, leash: connection.Connection[Any, Any]) -> int:
    """Wait until the worker or the command ends, then kill what is left; returns the worker's status from waitpid."""
    import psutil

    watched: list[Any] = [leash]
    seconds = POLL_SECONDS
    with suppress(AttributeError, OSError):  # a system without pidfd_open
        watched.append(os.pidfd_open(worker))
        seconds = None
    status = _ended(worker)
    while status is None and leash not in connection.wait(watched, seconds):
        status = _ended(worker)
    me = psutil.Process()
    family = me.children(recursive=True)
    if status is None:
        os.kill(worker, signal.SIGKILL)
        status = os.waitpid(worker, 0)[1]
    end = time.monotonic() + EXIT_SECONDS
    while (family := [*_running(family), *_running(me.children(recursive=True))]) and time.monotonic() < end:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.01)
    return status


def _ended(child: int) -> int | None:
    """The status of a child of this process from waitpid; None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return status if found else None


def _running(family: Iterable[Any]) -> list[Any]:
    import psutil

    found = []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _end_as(status: int) -> NoReturn:
    """End this process with the exit code or by the signal of ``status``, another process's status from waitpid."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _prctl(DUMPABLE, 0)
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def oom_kills() -> int:
    """How many processes the kernel has killed for lack of memory since boot; 0 where it does not report that."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    except (OSError, StopIteration):
        return 0
