"""The clock and the memory meter: every stage of a trial is measured here.

    meter = Meter(device)
    with meter.stage("train"):
        ...
    meter.stages["train"].seconds

On a GPU the host runs ahead of the device, so the device is synchronised at both ends of a stage, and its peaks are
reset at the start: the memory of one stage never counts as that of another.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

# Messages of torch, the CUDA libraries and C++ about a failed allocation that is not an OutOfMemoryError.
NO_MEMORY = re.compile(
    r"can't allocate memory|CUDA error: out of memory|out of memory\. Tried to allocate|std::bad_alloc"
    r"|cudaErrorMemoryAllocation|CU[A-Z]+_STATUS_\w*ALLOC\w*"
)
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@dataclass
class Stage:
    """The time and memory of a stage. Memory is in bytes; figures of the device are None on a CPU.

    Means and percentiles are over the samples of the stage: its two ends, and every step's end.
    """

    seconds: float = 0.0
    allocated_peak: int | None = None
    reserved_peak: int | None = None
    rss_peak: int = 0
    samples: list[tuple[int, int]] = field(default_factory=list, repr=False)  # allocated, reserved

    def memory(self) -> dict[str, int | float | None]:
        """The figures of result.json's ``memory.<stage>``."""
        allocated, reserved = ([float(one[n]) for one in self.samples] for n in (0, 1))
        return {
            "allocated_peak": self.allocated_peak,
            "allocated_mean": _mean(allocated),
            "allocated_p99": percentile(allocated, 99),
            "reserved_peak": self.reserved_peak,
            "reserved_mean": _mean(reserved),
            "reserved_p99": percentile(reserved, 99),
            "rss_peak": self.rss_peak,
        }

    def add(self, other: Stage) -> None:
        """Add ``other``: seconds add up, the higher peak counts."""
        self.seconds += other.seconds
        self.allocated_peak = _higher(self.allocated_peak, other.allocated_peak)
        self.reserved_peak = _higher(self.reserved_peak, other.reserved_peak)
        self.rss_peak = max(self.rss_peak, other.rss_peak)
        self.samples += other.samples


class Meter:
    """Measures the stages of one trial on one device.

    Stages may be nested: while an inner stage runs, the outer one is paused, so that no second and no byte counts
    twice, and the seconds of all stages add up to those of the outermost.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.stages: dict[str, Stage] = {}
        self.current: str | None = None  # the stage that a failure is recorded under
        self._clock = clock
        self._on_gpu = device.type == "cuda"
        self._open: list[tuple[str, Stage]] = []  # outermost first
        self._since = 0.0  # when the innermost stage began or was resumed

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measure the block as stage ``name``, and yield the figures of this block alone.

        A stage entered twice adds its seconds and keeps its highest peak.
        """
        if self._open:
            self._stop()
        own = Stage()
        self._open.append((name, own))
        self.current = name
        self._begin()
        try:
            yield own
        finally:
            self._stop()
            self._open.pop()
            self.stages.setdefault(name, Stage()).add(own)
            if self._open:
                self._begin()
        # Not reached after an exception, so that ``current`` still names the failed stage.
        self.current = self._open[-1][0] if self._open else None

    def sample(self) -> None:
        """Sample the memory in use, for the mean of the current stage, without waiting for the device."""
        if self._on_gpu and self._open:
            now = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
            self._open[-1][1].samples.append(now)

    def split(self) -> int | None:
        """The highest memory since the stage began or was last split, allocated on the device or resident on a CPU.

        None outside of stages.
        """
        if not self._open:
            return None
        name, before = self._open[-1]
        self._open[-1] = (name, part := Stage())
        self._stop()
        before.add(part)
        self._open[-1] = (name, before)
        self._begin()
        return part.rss_peak if part.allocated_peak is None else part.allocated_peak

    def so_far(self) -> dict[str, Stage]:
        """The stages so far; for open stages without the time since they were last resumed."""
        found = {name: Stage() for name in (*self.stages, *(name for name, _ in self._open))}
        for name, stage in (*self.stages.items(), *self._open):
            found[name].add(stage)
        return found

    def start(self) -> dict[str, int | None]:
        """Memory in use before the trial, in bytes: of the process, and on the device by this and other processes."""
        rss = int(psutil.Process().memory_info().rss)
        if not self._on_gpu:
            return {"rss": rss, "allocated": None, "others": None}
        free, total = torch.cuda.mem_get_info(self.device)
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        return {"rss": rss, "allocated": allocated, "others": total - free - reserved}

    def _begin(self) -> None:
        synchronise(self.device)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        _reset_rss_peak()
        self.sample()
        self._since = self._clock()

    def _stop(self) -> None:
        stage = self._open[-1][1]
        synchronise(self.device)
        stage.seconds += self._clock() - self._since
        self.sample()
        stage.rss_peak = max(stage.rss_peak, _rss_peak())
        if self._on_gpu:
            stage.allocated_peak = _higher(stage.allocated_peak, torch.cuda.max_memory_allocated(self.device))
            stage.reserved_peak = _higher(stage.reserved_peak, torch.cuda.max_memory_reserved(self.device))


class Laps:
    """Times repeated steps without making the host wait for the device.

    On a GPU the times are events in the queue of the device, which ``seconds`` reads.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._clock = clock
        self._times: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._left_out: list[float] = []  # seconds left out of each lap
        self._start: float = 0.0

    def start(self) -> None:
        """Begin a lap."""
        if self._on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record(torch.cuda.current_stream(self._device))
            self._events.append(events)
        else:
            self._start = self._clock()

    def stop(self, without: float = 0.0) -> None:
        """End the lap, and leave ``without`` seconds of it out."""
        if self._on_gpu:
            self._events[-1][1].record(torch.cuda.current_stream(self._device))
            self._left_out.append(without)
        else:
            self._times.append(self._clock() - self._start - without)

    def resume(self, seconds: list[float]) -> None:
        """Start with the laps of an earlier run, in seconds."""
        self._times += seconds

    def seconds(self) -> list[float]:
        """The seconds of every finished lap, in order; on a GPU this waits for the last of them."""
        if self._events:
            self._events[-1][1].synchronize()
            ended = zip(self._events, self._left_out, strict=True)
            self._times += [start.elapsed_time(end) / 1000 - without for (start, end), without in ended]
            self._events.clear()
            self._left_out.clear()
        return self._times


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or its cause, says that a device or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    by_message = isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None
    return by_message or (error.__cause__ is not None and out_of_memory(error.__cause__))


@contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Make a CUDA device the current one in the block: libraries launch kernels there if no device is given."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentile(values: list[float], percent: float) -> float | None:
    """Linear interpolation between the nearest values; None of no values."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100)) if values else None


def lower_quartile(seconds: Sequence[float]) -> float:
    """The lower quartile of repeated measurements, which other processes disturb least; it is one of the values."""
    return sorted(seconds)[len(seconds) // 4]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _higher(a: int | None, b: int | None) -> int | None:
    return max((value for value in (a, b) if value is not None), default=None)


def _reset_rss_peak() -> None:
    # Linux resets VmHWM, the peak of the resident set; elsewhere the peak stays that of the process so far.
    with suppress(OSError):
        CLEAR_REFS.write_text("5")


def _rss_peak() -> int:
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)


def cores() -> int:
    """The CPU cores that this process may use, which an affinity mask or a cluster's scheduler can limit."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def threads_each(workers: int) -> int | None:
    """The CPU threads of each of several workers that share the cores; None for one worker: torch's default.

    ``OMP_NUM_THREADS`` stays an upper bound, as for torch's default.
    """
    return None if workers < 2 else max(1, min(torch.get_num_threads(), cores() // workers))


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use ``count`` CPU threads in the block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
