"""What ``conf/profiler`` names: a close look at a few training steps after the trial is done.

Profiled steps are slower, so they are steps of their own: ``run(steps, after_step)`` trains that many
optimizer steps and calls ``after_step()`` after each. Every call of it should begin with the same
batches, so that time and work of the same steps are compared. Its parts are named by
``torch.profiler.record_function``: forward, backward, optimizer; each may occur several times a step.
"""

from __future__ import annotations

import bisect
import gzip
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from peftsweep.errors import InputError
from peftsweep.measure import Laps, out_of_memory, percentile
from peftsweep.record import write_json

log = logging.getLogger(__name__)

RANGES = ("forward", "backward", "optimizer")
STEP = "ProfilerStep#"
TRACE = ".pt.trace.json"  # the ending that TensorBoard's profiler plugin looks for
LAUNCHES = ("cuda_runtime", "cuda_driver")  # categories of a trace
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = re.compile(r"(cuda|hip)(Stream|Device|Event)Synchronize|(cuda|hip)Memcpy(_v\d+)?")  # calls that stop the host
PRODUCT = re.compile(r"(?!aten::|autograd::)\w+::\w*(mm|gemv|matmul|attn|attention)(?!_dequant)\w*")
SIZES = {"cuda": (2048, 4096, 8192), "cpu": (512, 1024, 2048)}

Run = Callable[[int, Callable[[], None]], None]
Facts = dict[str, Any]
Event = dict[str, Any]


# ---- the two entry points --------------------------------------------------------------------------


def operators(
    run: Run,
    folder: Path,
    device: torch.device,
    *,
    wait: int = 1,
    warmup: int = 2,
    active: int = 5,
    top: int = 20,
    with_stack: bool = False,
    record_shapes: bool = False,
    profile_memory: bool = False,
    gzip_trace: bool = True,
    flops: bool = True,
    sizes: Sequence[int] | None = None,
) -> Facts:
    """Where a training step spends its time, and how much of the device's speed it uses.

    The same ``wait + warmup + active`` steps are run three times: under the profiler, timed without it,
    and with their floating-point operations counted; the last ``active`` of them are reported, as means
    a step (``step_seconds`` is the median). Writes the trace (Chrome, Perfetto, TensorBoard) and
    operators.json into ``folder``.

    Seconds of a range are the host's; ``*_device_seconds`` (CUDA) sum up the kernels launched in it.
    ``utilisation`` is the achieved FLOP/s over those of the fastest square matrix product of ``sizes``
    in the dtype that most of the work is done in.

    Raises:
        InputError: the schedule has no active step, or none before it.
        RuntimeError: ``run`` did not call ``after_step`` after each step.
    """
    _check_schedule(wait, warmup, active)
    settle = wait + warmup
    profiler, trace = _profile(
        run,
        folder,
        device,
        "operators",
        schedule(wait=wait, warmup=warmup, active=active, repeat=1),
        settle + active,
        gzip_trace,
        with_stack=with_stack,
        record_shapes=record_shapes,
        profile_memory=profile_memory,
    )
    timeline = Timeline.of(read_trace(trace), active)
    averages = profiler.key_averages()
    tables = operator_tables(profiler.key_averages(group_by_input_shape=record_shapes), top)
    write_json(folder / "operators.json", {"device": str(device), "steps": active} | tables)
    facts = {"profiled_steps": active, "trace": trace.name} | timeline.facts()
    for table, rows in operator_tables(averages, 1).items():
        facts |= {f"top_{table}": row["name"] for row in rows}
    if device.type == "cuda" and not timeline.work:
        log.warning("the profiler saw no kernel on %s, so there are no device times", device)
    seconds = _timed(run, device, settle, active)
    facts["step_seconds"] = percentile(seconds, 50)
    if flops:
        counted = count_flops(run, settle, active)
        facts |= {"flops_per_step": sum(counted.values()) / active, "flops_uncounted": uncounted(averages)}
        facts |= _utilisation(counted, sum(seconds), device, sizes or SIZES.get(device.type, SIZES["cpu"]))
    return facts


def memory(
    run: Run,
    folder: Path,
    device: torch.device,
    *,
    steps: int = 3,
    top: int = 20,
    max_entries: int = 200_000,
    stacks: str = "python",
    gzip_trace: bool = True,
) -> Facts:
    """What a training step allocates, and when it holds most.

    Writes memory.json (the operators that allocate most, net and as means a step) and a trace with the
    memory curve; on CUDA also memory_snapshot.pickle, the allocator's last ``max_entries`` actions with
    their ``stacks``, to be dropped onto pytorch.org/memory_viz. ``peak_bytes_above_start`` counts from
    the start of a step, when weights and optimizer states are there already.

    Raises:
        InputError: ``steps`` is below 1.
        RuntimeError: ``run`` did not call ``after_step`` after each step.
    """
    _check_schedule(0, 1, steps, "steps")
    folder.mkdir(parents=True, exist_ok=True)
    facts: Facts = {"profiled_steps": steps}
    if device.type == "cuda":
        facts |= _snapshot(run, folder / "memory_snapshot.pickle", device, steps, max_entries, stacks)
    plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
    profiler, trace = _profile(run, folder, device, "memory", plan, 1 + steps, gzip_trace, profile_memory=True)
    events = read_trace(trace)
    peak, where = peak_above_start(events, Timeline.of(events, steps), device)
    largest = memory_table(profiler.key_averages(), device, steps, top)
    write_json(folder / "memory.json", {"device": str(device), "steps": steps, "operators": largest})
    facts |= {"trace": trace.name, "peak_bytes_above_start": peak, "peak_range": where}
    if largest:
        facts |= {"largest_operator": largest[0]["name"], "largest_operator_bytes": largest[0]["self_bytes"]}
    return facts


def _check_schedule(wait: int, warmup: int, active: int, key: str = "active") -> None:
    if active < 1:
        raise InputError(f"profiler.{key}={active}: at least 1")
    if wait < 0 or warmup < 0 or wait + warmup < 1:
        raise InputError(
            f"profiler.wait={wait} profiler.warmup={warmup}: none below 0, and together at least 1, "
            "as the first step also prepares"
        )


# ---- the profiler ----------------------------------------------------------------------------------


def _profile(
    run: Run, folder: Path, device: torch.device, name: str, plan: Any, steps: int, compressed: bool, **options: Any
) -> tuple[Any, Path]:
    """Run ``steps`` steps under the profiler: the profiler and the trace that it wrote, in place of an earlier one."""
    for earlier in folder.glob(f"{name}.*{TRACE}*"):
        earlier.unlink()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(
        activities=activities,
        schedule=plan,
        on_trace_ready=tensorboard_trace_handler(str(folder), worker_name=name, use_gzip=compressed),
        **options,
    ) as profiler:
        run(steps, profiler.step)
    traces = list(folder.glob(f"{name}.*{TRACE}*"))
    if len(traces) != 1:
        raise RuntimeError(f"the profiler wrote {len(traces)} traces: after_step was not called after each step")
    return profiler, traces[0]


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
    """The profiled steps as the trace shows them."""

    steps: list[Span]
    ranges: list[Span]  # in order, none within another
    work: list[tuple[str, Span]]  # of the device, with the range that launched it
    calls: Counter[str]  # of operators and of the CUDA runtime

    @classmethod
    def of(cls, events: list[Event], active: int) -> Timeline:
        """Read a trace that must hold ``active`` steps.

        A kernel belongs to the range during which it was launched: the device is behind the host, and a
        backward pass is launched by a thread of autograd's, so neither its time nor its thread tells.

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


# ---- work and speed --------------------------------------------------------------------------------


def _timed(
    run: Run, device: torch.device, settle: int, active: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of each of the last ``active`` steps, nothing else going on."""
    laps = Laps(device, clock)
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done > settle:
            laps.stop()
        if settle <= done < settle + active:
            laps.start()

    run(settle + active, after_step)
    return laps.seconds()


def count_flops(run: Run, settle: int, active: int) -> Counter[torch.dtype]:
    """Floating-point operations of matrix products in the last ``active`` steps, by the dtype of the first factor.

    A product of [m, k] and [k, n] is 2 m n k; that of an 8-bit layer counts under the dtype of its input.
    What checkpointing and fused attention compute again counts again.
    A compiled model is run uncompiled, so that its fused kernels are counted too.
    """
    totals: Counter[torch.dtype] = Counter()
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done == settle:
            totals.clear()

    def noted(formula: Callable[..., int]) -> Callable[..., int]:
        def count(first: torch.Tensor, *args: Any, **kwargs: Any) -> int:
            flops = formula(first, *args, **kwargs)
            totals[first.dtype] += flops
            return flops

        count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
        return count

    formulas = {operator: noted(formula) for operator, formula in (flop_registry | _more_formulas()).items()}
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=formulas),
    ):
        run(settle + active, after_step)
    return totals


def _more_formulas() -> dict[Any, Callable[..., int]]:
    """What torch's counter lacks: attention on a CPU, and the products of bitsandbytes (where that is loaded).

    The backward of its quantised layers multiplies by dequantised weights, which torch counts.
    """
    aten, bits = torch.ops.aten, torch.ops.bitsandbytes
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
            aten._scaled_dot_product_flash_attention_backward
        ],
    }
    formulas |= {getattr(bits, name): formula for name, formula in BITSANDBYTES.items() if hasattr(bits, name)}
    return formulas


def _int8_flops(left: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * left.numel() * weight.shape[0]  # [..., k] and [n, k]


def _mixed_int8_flops(left: torch.Tensor, _left: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    return _int8_flops(left, weight)  # the outliers' columns are zero in the 8-bit product, so they count once


def _four_bit_flops(left: torch.Tensor, _packed: torch.Tensor, shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * left.numel() * int(shape[0])


BITSANDBYTES: dict[str, Callable[..., int]] = {
    "int8_linear_matmul": _int8_flops,
    "int8_scaled_mm": _int8_flops,
    "int8_mixed_scaled_mm": _mixed_int8_flops,
    "gemm_4bit": _four_bit_flops,
    "gemv_4bit": _four_bit_flops,
}


def uncounted(averages: Sequence[Any]) -> str:
    """Names of the operators that look like a matrix product but have no formula; empty where all were counted."""
    known = {f"bitsandbytes::{name}" for name in BITSANDBYTES}
    return " ".join(sorted({e.key for e in averages if PRODUCT.fullmatch(e.key)} - known))


def _utilisation(counted: Counter[torch.dtype], seconds: float, device: torch.device, sizes: Sequence[int]) -> Facts:
    """Achieved over possible FLOP/s; the share of the work by dtype says what the one ceiling hides."""
    floating = Counter({dtype: n for dtype, n in counted.items() if dtype.is_floating_point})
    if not floating:
        return {}
    dtype = floating.most_common(1)[0][0]
    total = sum(counted.values())
    achieved, ceiling = total / seconds, matmul_ceiling(device, dtype, sizes)
    return {
        "achieved_flops_per_second": achieved,
        "matmul_flops_per_second": ceiling,
        "matmul_dtype": _name(dtype),
        "utilisation": achieved / ceiling,
        **{f"flops_share_{_name(kind)}": n / total for kind, n in counted.items()},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def matmul_ceiling(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int],
    *,
    repeats: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of the fastest square matrix product: the best of ``sizes``, of each the median of ``repeats``.

    Sizes for which the device lacks the memory are left out; the smallest must fit.
    """
    best = 0.0
    for size in sorted(sizes):
        try:
            left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            product = left @ right
        except RuntimeError as error:
            if best and out_of_memory(error):
                break
            raise
        laps = Laps(device, clock)
        for lap in range(2 + repeats):  # two to warm up
            if lap >= 2:
                laps.start()
            torch.mm(left, right, out=product)
            if lap >= 2:
                laps.stop()
        best = max(best, 2 * size**3 / (percentile(laps.seconds(), 50) or 0.0))
    return best


# ---- memory ----------------------------------------------------------------------------------------


def _snapshot(run: Run, file: Path, device: torch.device, steps: int, max_entries: int, stacks: str) -> Facts:
    """Record the allocator during ``steps`` steps; recording ends whatever happens."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.memory._record_memory_history(max_entries=max_entries, stacks=stacks, device=device)
    try:
        run(steps, lambda: None)
        torch.cuda.synchronize(device)
        torch.cuda.memory._dump_snapshot(str(file))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None, device=device)
    return {
        "snapshot": file.name,
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(device),
    }


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
