"""The profilers of ``conf/profiler``: a few further training steps are profiled after the trial.

Profiled steps are slower, so they are further steps: ``run(steps, after_step)`` trains this number of optimizer steps
and calls ``after_step()`` after each. Every call should begin with the same batches, so that time and work of the same
steps are compared. ``torch.profiler.record_function`` names its parts: forward, backward, optimizer; each may occur
several times in a step.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from peftsweep.errors import InputError
from peftsweep.observe.flops import SIZES, Run, count_flops, matmul_ceiling, uncounted
from peftsweep.observe.measure import Laps, percentile
from peftsweep.observe.timeline import Facts, Timeline, memory_table, operator_tables, peak_above_start, read_trace
from peftsweep.study.record import write_json

log = logging.getLogger(__name__)
TRACE = ".pt.trace.json"  # the suffix that TensorBoard's profiler plugin searches for


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
    """Measure where a training step spends its time, and how much of the device's peak rate it uses.

    The same ``wait + warmup + active`` steps are run three times: under the profiler, timed without it,
    and with their floating-point operations counted; the last ``active`` of them are reported, as means
    for one step (``step_seconds`` is the median). Writes the trace (Chrome, Perfetto, TensorBoard) and
    operators.json into ``folder``.

    Seconds of a range are the host's; ``*_device_seconds`` (CUDA) sum up the kernels launched in it.
    ``utilisation`` is the achieved FLOP/s divided by those of the fastest square matrix product of ``sizes``
    in the dtype of most of the work.

    Raises:
        InputError: the schedule has no active step, or none before it.
        RuntimeError: ``run`` did not call ``after_step`` after each step.
    """
    check_schedule(wait, warmup, active)
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
    """Measure the memory that a training step allocates, and the moment of its peak.

    Writes memory.json (the operators that allocate most, net and as means for one step) and a trace with the
    memory curve; on CUDA also memory_snapshot.pickle, the allocator's last ``max_entries`` actions with
    their ``stacks``, for pytorch.org/memory_viz. ``peak_bytes_above_start`` counts from the start of a step,
    when weights and optimizer states are allocated already.

    Raises:
        InputError: ``steps`` is below 1.
        RuntimeError: ``run`` did not call ``after_step`` after each step.
    """
    check_schedule(0, 1, steps, "steps")
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


def check_schedule(wait: int, warmup: int, active: int, key: str = "active") -> None:
    """Check the numbers of steps that are waited for, dropped and reported.

    Raises:
        InputError: a number is too small.
    """
    if active < 1:
        raise InputError(f"profiler.{key}={active}: must be at least 1")
    if wait < 0 or warmup < 0 or wait + warmup < 1:
        raise InputError(
            f"profiler.wait={wait} profiler.warmup={warmup}: must be at least 0, and together at least 1, "
            "because the first step also initialises"
        )


# ---- the profiler ----------------------------------------------------------------------------------


def _profile(
    run: Run, folder: Path, device: torch.device, name: str, plan: Any, steps: int, compressed: bool, **options: Any
) -> tuple[Any, Path]:
    """Run ``steps`` steps under the profiler; returns the profiler and its trace, which replaces an earlier one."""
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


# ---- work and speed --------------------------------------------------------------------------------


def _timed(
    run: Run, device: torch.device, settle: int, active: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The seconds of each of the last ``active`` steps, without a profiler."""
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


def _utilisation(counted: Counter[torch.dtype], seconds: float, device: torch.device, sizes: Sequence[int]) -> Facts:
    """Achieved FLOP/s divided by the peak; the shares of dtypes show how far the peak of one dtype applies."""
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


# ---- memory ----------------------------------------------------------------------------------------


def _snapshot(run: Run, file: Path, device: torch.device, steps: int, max_entries: int, stacks: str) -> Facts:
    """Record the allocator during ``steps`` steps; recording ends also after an error."""
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
