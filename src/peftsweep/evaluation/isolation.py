"""Restore the state of the process after code of a user, so that the next trial finds it as in a new process."""

from __future__ import annotations

import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy
import psutil
import torch

from peftsweep.study import store

DESCRIPTORS = Path("/proc/self/fd")
MAX_LEAKED_FILES = 64  # open files more than before, after which a process is given up; libraries keep a few


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Put back what the block has changed: folder, environment, umask, streams, signals, limits, settings.

    Of Python these are what ``_INTERPRETER`` lists; of torch grad and inference mode, default dtype and device,
    current GPU, threads, precision of matrix products, and whether algorithms are deterministic.
    """
    folder, environment, umask = os.getcwd(), dict(os.environ), _umask()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    process = psutil.Process()
    timer, limits = signal.getitimer(signal.ITIMER_REAL), Resources.now().limits
    interpreter, settings = [get() for get, _ in _INTERPRETER], _torch_settings()
    with (
        torch.inference_mode(torch.is_inference_mode_enabled()),
        torch.set_grad_enabled(torch.is_grad_enabled()),
        warnings.catch_warnings(),
        _standard_streams_kept(),
        redirect_stdout(_Unclosable.of(sys.stdout)),
        redirect_stderr(_Unclosable.of(sys.stderr)),
    ):
        try:
            yield
        finally:
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                os.chdir(folder)
            _restore_environment(environment)
            os.umask(umask)
            if threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, *timer)  # an alarm that is left would end the process
                for number, handler in handlers.items():
                    if handler is not None and signal.getsignal(number) is not handler:
                        signal.signal(number, handler)
            for kind, limit in limits.items():
                with suppress(ValueError, OSError, psutil.Error):  # the hard one was lowered: only root may raise it
                    process.rlimit(kind, limit)
            for (get, put), before in zip(_INTERPRETER, interpreter, strict=True):
                if get() != before:
                    put(before)
            for put, before, now in zip(_SETTERS, settings, _torch_settings(), strict=True):
                if now != before:
                    put(before)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put back the states of the random number generators of Python, NumPy and torch."""
    python, of_numpy = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(of_numpy)


@contextmanager
def ends_as_error() -> Iterator[None]:
    """Have the block end by an ``Exception`` of a trial, where it would end the process or the sweep.

    That is ``sys.exit``, and an error of a file that the block writes, which is no error of the study's files. An exit
    by a handler of signals from before the block is let through: it is how a job that a scheduler takes off its machine
    ends, after it was put back into the queue.

    A process that the block has forked ends here at the latest: it must not run the rest of the trial as well.

    Raises:
        RuntimeError: it ended by one of these.
    """
    with _forked_processes_ended(), _raised_by_handlers() as handled:
        try:
            yield
        except OSError as error:
            if error.errno in store.UNWRITABLE_ERRNOS:
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
            raise
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            if error in handled:
                raise
            raise RuntimeError(f"it ended by {type(error).__name__}: {error}") from error


@contextmanager
def _forked_processes_ended() -> Iterator[None]:
    """End a process that the block has forked and that leaves the block, without a word."""
    own = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != own:
            os._exit(1)


@contextmanager
def _raised_by_handlers() -> Iterator[list[BaseException]]:
    """A list of what the handlers of signals, those from before the block, raise in the block."""
    raised: list[BaseException] = []

    def noting(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
        def call(number: int, frame: FrameType | None) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return call

    handlers, noted = dict[int, Any](), dict[int, Any]()
    if threading.current_thread() is threading.main_thread():  # others can set none
        known = {number: signal.getsignal(number) for number in signal.valid_signals()}
        own = signal.default_int_handler  # which only interrupts, and asyncio looks for it
        handlers = {number: one for number, one in known.items() if callable(one) and one is not own}
        noted = {number: noting(handler) for number, handler in handlers.items()}
    for number, handler in noted.items():
        signal.signal(number, handler)
    try:
        yield raised
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is noted[number]:  # else the block has set another one
                signal.signal(number, handler)


@contextmanager
def _standard_streams_kept() -> Iterator[None]:
    """Put back the descriptors 0, 1 and 2 where the block closes or redirects them."""
    copies = {}
    for number in (0, 1, 2):
        with suppress(OSError):  # it was closed before
            copies[number] = os.dup(number)
    try:
        yield
    finally:
        for number, copy in copies.items():
            os.dup2(copy, number)
            os.close(copy)


class _Unclosable:
    """An output stream whose ``close`` only flushes."""

    @classmethod
    def of(cls, stream: Any) -> Any:
        """A wrapper of ``stream``; None (no stream) stays None."""
        return stream if stream is None or isinstance(stream, cls) else cls(stream)

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        """Flush, and stay open."""
        self._stream.flush()


class Resources(NamedTuple):
    """The open files of a process, and the limits that the system sets it."""

    open_files: int  # 0 where the system does not say
    limits: dict[int, tuple[int, int]]  # soft and hard, by kind; empty where the system has none

    @classmethod
    def now(cls) -> Resources:
        """The resources of this process."""
        process = psutil.Process()
        return cls(
            len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0,
            {kind: process.rlimit(kind) for kind in _LIMITS},
        )

    def are_lost(self) -> bool:
        """Whether code of a user's has left many files open since, or a limit that could not be put back."""
        return Resources.now().open_files > self.open_files + MAX_LEAKED_FILES or self.limits_are_lost()

    def limits_are_lost(self) -> bool:
        """Whether a limit is another one now: a hard limit that was lowered can only be raised by root."""
        return Resources.now().limits != self.limits


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _torch_settings() -> tuple[Any, ...]:
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        gpu,
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )


def _set_gpu(number: int | None) -> None:
    if number is not None:
        torch.cuda.set_device(number)


def _set_device(device: torch.device) -> None:
    plain = device.type == "cpu"  # None, unlike this, puts nothing between torch's functions and their callers
    torch.set_default_device(None if plain else device)


def _set_benchmark(on: bool) -> None:
    torch.backends.cudnn.benchmark = on


def _set_collection(on: bool) -> None:
    (gc.enable if on else gc.disable)()


def _set_path(folders: list[str]) -> None:
    sys.path[:] = folders


def _set_hooks(hooks: tuple[Any, Any]) -> None:
    sys.excepthook, threading.excepthook = hooks


_LIMITS = sorted({getattr(psutil, name) for name in dir(psutil) if name.startswith("RLIMIT_")})  # on Linux alone
# Settings of Python, with what sets them.
_INTERPRETER: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (gc.isenabled, _set_collection),
    (lambda: logging.root.manager.disable, logging.disable),
    (lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)),
    (lambda: list(sys.path), _set_path),
    (lambda: (sys.excepthook, threading.excepthook), _set_hooks),
)
_SETTERS: tuple[Any, ...] = (
    torch.set_default_dtype,
    _set_device,
    _set_gpu,
    torch.set_num_threads,
    torch.set_float32_matmul_precision,
    torch.use_deterministic_algorithms,
    _set_benchmark,
)
