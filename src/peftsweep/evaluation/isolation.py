"""What code of a user's may change of its process: put back, so that the next trial finds it as a new process would."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

DESCRIPTORS = Path("/proc/self/fd")
LEAKED = 64  # open files more than before, after which a process is given up; libraries keep a few


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Put back what the block has changed: folder, environment, umask, signal handlers, and torch's settings.

    Of torch these are grad and inference mode, default dtype and device, current GPU, threads, precision of matrix
    products, and whether algorithms are deterministic.
    """
    folder, environment, umask = os.getcwd(), dict(os.environ), _umask()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    settings = _torch_settings()
    with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                os.chdir(folder)
            _restore_environment(environment)
            os.umask(umask)
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    if handler is not None and signal.getsignal(number) is not handler:
                        signal.signal(number, handler)
            for put, before, now in zip(_SETTERS, settings, _torch_settings(), strict=True):
                if now != before:
                    put(before)


def open_files() -> int:
    """How many files this process has open; 0 where the system does not say."""
    return len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0


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


_SETTERS: tuple[Any, ...] = (
    torch.set_default_dtype,
    _set_device,
    _set_gpu,
    torch.set_num_threads,
    torch.set_float32_matmul_precision,
    torch.use_deterministic_algorithms,
    _set_benchmark,
)
