"""CUDA graphs: the stream and the memory in which a process captures them, and what rules a capture out.

A CUDA graph launches the kernels of a pass at once; its shapes and addresses are fixed. As PyTorch requires, the first
passes of a shape run eagerly, on the stream that later captures it. Torch reports that the host waits for the device in
a pass (routing in some mixtures of experts, outliers in 8-bit layers) before the capture starts. After a capture that
fails, its process captures nothing more: before torch 2.12 the allocator believes that the capture still runs (pull
requests 180395 and 190308 of github.com/pytorch/pytorch), and a sweep replaces the worker after the trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import torch

from peftsweep.errors import first_line

Result = TypeVar("Result")

DEVICES = ("cuda",)  # device types on which passes run in static shapes
WARMUP_PASSES = 2  # eager passes of a shape before its capture: they choose kernels and allocate workspaces

_FAILURES: list[str] = []  # why captures of this process have failed
_ALLOWED = ContextVar("graphs_allowed", default=True)


def has_failed() -> bool:
    """Whether a capture has failed in this process; the allocator may then no longer free memory."""
    return bool(_FAILURES)


def allowed(device: torch.device) -> bool:
    """Whether passes on ``device`` may be captured here."""
    return device.type in DEVICES and _ALLOWED.get() and not has_failed()


@contextmanager
def allowed_if(condition: bool) -> Iterator[None]:
    """In the block ``allowed`` is False unless ``condition`` holds."""
    token = _ALLOWED.set(condition)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all graphs of a process: torch keeps 64 MiB of workspace for each stream with a product."""
    return torch.cuda.Stream(device)


@contextmanager
def on_stream(device: torch.device) -> Iterator[None]:
    """Run the block on the stream of the graphs, after what was launched before it; on a CPU just run it."""
    if device.type != "cuda":
        yield
        return
    current, stream = torch.cuda.current_stream(device), _stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def record(work: Callable[[], Result], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of ``work`` in the memory ``pool``, apart from that of eager passes, and the tensors that it fills.

    Raises:
        RuntimeError: an operation cannot be captured, or memory lacks; this process captures nothing more.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_stream(device)):
            result = work()
    except Exception as error:  # any error: from an operation that a graph cannot hold, or for lack of memory
        _FAILURES.append(first_line(error))
        raise RuntimeError(_FAILURES[-1]) from error
    finally:
        torch.cuda.set_stream(current)  # torch does not restore it if the capture fails
    return graph, result


@contextmanager
def error_if_host_waits(device: torch.device) -> Iterator[None]:
    """In the block torch raises a RuntimeError where the host would wait for a CUDA device; see ``is_wait``."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def is_wait(error: RuntimeError) -> bool:
    """Whether this is the error of ``error_if_host_waits``."""
    return "synchronizing" in str(error)


def device_is_broken() -> bool:
    """Whether this process cannot use its GPU any more, after an illegal address or a failed capture."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return has_failed()
