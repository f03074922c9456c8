"""Read torch's trace as a timeline: the part of a step that each kernel belongs to, and how busy the device was."""

from __future__ import annotations

import bisect
import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType

RANGES = ("forward", "backward", "optimizer")
STEP = "ProfilerStep#"
LAUNCHES = ("cuda_runtime", "cuda_driver")  # categories of events that launch kernels
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = re.compile(r"(cuda|hip)(Stream|Device|Event)Synchronize|(cuda|hip)Memcpy(_v\d+)?")  # calls that stop the host
Facts = dict[str, Any]
Event = dict[str, Any]


def read_trace(file: Path) -> list[Event]:
    """The events of a Chrome trace, gzipped or not; their times are in microseconds."""
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    events: list[Event] = json.loads(text)["traceEvents"]
    return events


@dataclass(frozen=True)
class Span:
    """A stretch of time, in microseconds."""

    name: str
    start: float
    end: float

    @classmethod
    def of(cls, event: Event) -> Span:
        """A complete event of a trace."""
        return cls(event["name"], event["ts"], event["ts"] + event["dur"])


@dataclass(frozen=True)
class Timeline:
    """The profiled steps of a trace."""

    steps: list[Span]
    ranges: list[Span]  # in order, not nested
    work: list[tuple[str, Span]]  # work of the device, with the range that launched it
    calls: Counter[str]  # calls of operators and of the CUDA runtime

    @classmethod
    def of(cls, events: list[Event], active: int) -> Timeline:
        """Read a trace that must hold ``active`` steps.

        A kernel belongs to the range in which it was launched. Its own time is later, because the device runs behind
        the host, and its thread may be one of autograd's.

        Raises:
            RuntimeError: there are more or fewer steps.
        """
        complete = [event for event in events if event.get("ph") == "X"]
        named = [Span.of(event) for event in complete if event.get("cat") == "user_annotation"]
        steps = sorted((span for span in named if span.name.startswith(STEP)), key=lambda span: span.start)
        if len(steps) != active:
            raise RuntimeError(f"the trace holds {len(steps)} steps and not {active}")
        start, end = steps[0].start, steps[-1].end
        ranges = sorted(
            (span for span in named if span.name in RANGES and start <= span.start < end), key=lambda span: span.start
        )
        launched = {
            event["args"]["correlation"]: event["ts"]
            for event in complete
            if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
        }
        work = []
        for event in complete:
            if event.get("cat") in DEVICE_WORK:
                moment = launched.get(event["args"].get("correlation"), start)
                if start <= moment < end:
                    work.append((range_at(ranges, moment), Span.of(event)))
        calls = Counter(
            event["name"]
            for event in complete
            if event.get("cat") in ("cpu_op", *LAUNCHES) and start <= event["ts"] < end
        )
        return cls(steps, ranges, work, calls)

    def facts(self) -> Facts:
        """Seconds and shares by range, and how often the host waits, each a step."""
        number, total = len(self.steps), sum(step.end - step.start for step in self.steps)
        host = dict.fromkeys(RANGES, 0.0)
        for span in self.ranges:
            host[span.name] += span.end - span.start
        host["other"] = total - sum(host.values())
        facts: Facts = {"profiled_step_seconds": total / number / 1e6} | _seconds_and_shares(host, number, "")
        if self.work:
            device = dict.fromkeys((*RANGES, "other"), 0.0)
            for name, span in self.work:
                device[name] += span.end - span.start
            facts |= _seconds_and_shares(device, number, "device_")
            facts["device_seconds"] = sum(device.values()) / number / 1e6
            facts["device_busy_share"] = busy_share([span for _, span in self.work])
        facts["host_waits"] = sum(n for name, n in self.calls.items() if WAITS.fullmatch(name)) / number
        facts["item_calls"] = self.calls["aten::_local_scalar_dense"] / number  # .item(), bool(), float() of a tensor
        return facts


def _seconds_and_shares(microseconds: dict[str, float], steps: int, kind: str) -> Facts:
    total = sum(microseconds.values())
    seconds = {f"{name}_{kind}seconds": value / steps / 1e6 for name, value in microseconds.items()}
    return seconds | {f"{name}_{kind}share": value / total for name, value in microseconds.items()}


def range_at(ranges: list[Span], moment: float) -> str:
    """The name of the range around ``moment``; ``ranges`` are in order and do not overlap."""
    place = bisect.bisect_right(ranges, moment, key=lambda span: span.start) - 1
    return ranges[place].name if place >= 0 and moment < ranges[place].end else "other"


def busy_share(spans: list[Span]) -> float:
    """The part of the time between the first start and the last end during which at least one of ``spans`` lasts."""
    spans = sorted(spans, key=lambda span: span.start)
    start = end = spans[0].start
    busy = 0.0
    for span in spans:
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return busy / (end - start)


def operator_tables(averages: Sequence[Any], top: int) -> dict[str, list[dict[str, Any]]]:
    """The ``top`` operators by own CPU and device time, and the kernels; ``share`` is of all own time of its kind.

    An operator's own device time is that of the kernels it launches itself. Named ranges are no operators:
    on CUDA each would count its kernels a second time.
    """
    named = [event for event in averages if not event.is_user_annotation]
    on_host = [event for event in named if event.device_type == DeviceType.CPU]
    kernels = [event for event in named if event.device_type != DeviceType.CPU]
    return {
        "operators_by_device_time": _largest(on_host, "device", top),
        "operators_by_cpu_time": _largest(on_host, "cpu", top),
        "kernels_by_device_time": _largest(kernels, "device", top),
    }


def _largest(events: list[Any], kind: str, top: int) -> list[dict[str, Any]]:
    def own(event: Any) -> float:
        # No default: where torch renames the attribute this fails instead of reporting nothing.
        return float(getattr(event, f"self_{kind}_time_total"))

    total = sum(map(own, events))
    rows = sorted((event for event in events if own(event) > 0), key=own, reverse=True)[:top]
    return [
        {
            "name": event.key,
            "calls": event.count,
            "self_cpu_microseconds": event.self_cpu_time_total,
            "cpu_microseconds": event.cpu_time_total,
            "self_device_microseconds": event.self_device_time_total,
            "device_microseconds": event.device_time_total,
            "share": own(event) / total,
            **({"shapes": event.input_shapes} if event.input_shapes else {}),
        }
        for event in rows
    ]


def peak_above_start(events: list[Event], timeline: Timeline, device: torch.device) -> tuple[int, str]:
    """The most bytes that a step holds beyond those held at its start, and the range in which that is.

    Each step begins anew: on a CPU the profiler does not see the release of what is older than itself.
    """
    wanted = getattr(DeviceType, device.type.upper()).value
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == wanted
    )
    peak, moment = 0, timeline.steps[0].start
    for step in timeline.steps:
        held = 0
        for now, change in changes:
            if step.start <= now < step.end:
                held += change
                if held > peak:
                    peak, moment = held, now
    return peak, range_at(timeline.ranges, moment)


def memory_table(averages: Sequence[Any], device: torch.device, steps: int, top: int) -> list[dict[str, Any]]:
    """The ``top`` operators by the bytes that they allocate themselves and do not free, means a step."""
    kind = "device" if device.type == "cuda" else "cpu"
    rows = [
        {
            "name": event.key,
            "calls": event.count / steps,
            "self_bytes": getattr(event, f"self_{kind}_memory_usage") / steps,
            "bytes": getattr(event, f"{kind}_memory_usage") / steps,
        }
        for event in averages
        if not event.is_user_annotation
    ]
    return sorted((row for row in rows if row["self_bytes"] > 0), key=lambda row: -row["self_bytes"])[:top]
