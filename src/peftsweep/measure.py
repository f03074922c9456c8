"""The one clock and the one memory meter: every stage of a trial is measured here.

    meter = Meter(device)
    with meter.stage("train"):
        ...
    meter.stages["train"].seconds

On a GPU the host runs ahead of the device, so the device is synchronised at both ends of a stage,
and its peaks are reset at the start: the memory of one stage never counts as another's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@dataclass
class Stage:
    """What a stage took. Memory in bytes; device figures are None where the device is the CPU."""

    seconds: float = 0.0
    allocated_peak: int | None = None
    allocated_mean: float | None = None
    reserved_peak: int | None = None
    reserved_mean: float | None = None
    rss_peak: int = 0
    _samples: list[tuple[int, int]] = field(default_factory=list, repr=False)

    def memory(self) -> dict[str, int | float | None]:
        """The figures of result.json's ``memory.<stage>``."""
        return {
            "allocated_peak": self.allocated_peak,
            "allocated_mean": self.allocated_mean,
            "reserved_peak": self.reserved_peak,
            "reserved_mean": self.reserved_mean,
            "rss_peak": self.rss_peak,
        }


class Meter:
    """Measures the stages of one trial on one device."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.stages: dict[str, Stage] = {}
        self.current: str | None = None  # the stage a failure is recorded under
        self._clock = clock
        self._on_gpu = device.type == "cuda"

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measure the block as ``name``; a stage entered twice adds its seconds and keeps its highest peak."""
        stage = self.stages.setdefault(name, Stage())
        self.current = name
        self._synchronise()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        _reset_rss_peak()
        self.sample()
        start = self._clock()
        try:
            yield stage
        finally:
            self._synchronise()
            stage.seconds += self._clock() - start
            self.sample()
            self._close(stage)
        self.current = None  # not after an exception: the failing stage keeps its name

    def sample(self) -> None:
        """Note the memory in use now, for the mean of the current stage; cheap, and it does not wait for the device."""
        if self._on_gpu and self.current is not None:
            now = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
            self.stages[self.current]._samples.append(now)

    def _close(self, stage: Stage) -> None:
        stage.rss_peak = max(stage.rss_peak, _rss_peak())
        if self._on_gpu:
            stage.allocated_peak = max(stage.allocated_peak or 0, torch.cuda.max_memory_allocated(self.device))
            stage.reserved_peak = max(stage.reserved_peak or 0, torch.cuda.max_memory_reserved(self.device))
            allocated, reserved = zip(*stage._samples, strict=True)
            stage.allocated_mean = sum(allocated) / len(allocated)
            stage.reserved_mean = sum(reserved) / len(reserved)

    def _synchronise(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


class Laps:
    """Times repeated steps without making the host wait for the device.

    On a GPU the marks are events in the device's own queue, read out when ``seconds`` is asked for.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock = clock
        self._times: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start: float = 0.0

    def start(self) -> None:
        """Begin a lap."""
        if self._on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            self._events.append(events)
        else:
            self._start = self._clock()

    def stop(self) -> None:
        """End the lap."""
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._times.append(self._clock() - self._start)

    def seconds(self) -> list[float]:
        """The seconds of every finished lap, in order; on a GPU this waits for the last of them."""
        if self._events:
            self._events[-1][1].synchronize()
            self._times += [start.elapsed_time(end) / 1000 for start, end in self._events]
            self._events.clear()
        return self._times


def percentile(values: list[float], percent: float) -> float | None:
    """Linear interpolation between the nearest values; None of no values."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100)) if values else None


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
