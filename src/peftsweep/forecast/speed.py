"""The speed of a device: measured once, kept in the user's cache, and measured again when it has changed.

The roofline of an operation is its shortest possible time: its FLOPs at the highest rate of its dtype, its bytes at the
memory's bandwidth, or the launch of a kernel. How near a kernel comes to its roofline depends on its sizes. So each
operation of a step is also timed alone, on tensors of its shapes and strides, once for all trials. An operation that
was not timed is assumed to exceed its roofline by the same factor as the nearest timed operation of its kind and
layout.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import platform
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftsweep.forecast.operations import Arguments, Ledger, Operation
from peftsweep.forecast.trace import Sizes, layer_operations, made_optimizer, reference_step
from peftsweep.observe.fast_dtype import cache_folder
from peftsweep.observe.flops import matmul_ceiling
from peftsweep.observe.measure import cores, lower_quartile
from peftsweep.schema import TrainConfig
from peftsweep.study import record
from peftsweep.study.atomic import write_text

log = logging.getLogger(__name__)

VERSION = 5  # of what is measured and how it is kept
# A "lap" is one reference product of two LAP x LAP matrices; its seconds show when the device has another speed.
LAP = 512
LAP_SECONDS = 0.15  # laps are repeated for this time
LAP_PARTS = 5  # parts of that time, whose means are compared
# Laps that are so many times as slow as those of the idle device are repeated for a longer time: most other processes
# that run at one moment (a short command) do not run as long as a trial.
SLOWED, SLOWED_LAPS = 1.2, 6
LOOKED_SECONDS, LOOKED_EVERY = 0.012, 0.2  # between other timings: laps for this time, at this interval
MOST_PROBES = 2  # probes of a device whose speed changes while it is measured
ROUNDS = 3  # measurements of a calibration step and of its operations; the median counts
CHANGED = 1.3  # ratio of lap seconds, up or down, from which on the kept speed is measured again
CHANGED_MEMORY = 1.5  # ratio of bandwidth, up, from which on it is: other processes used the memory then
OPERATION_SECONDS = 0.004  # an operation is repeated for this time
MOST_REPEATS = 20
LONG_CALLS = 0.1  # seconds of repetitions after which even fewer than three do: nothing short disturbs them
COLD_BYTES, MOST_SETS = 48e6, 12  # bytes that exceed a CPU's caches; most copies of an operation's tensors
MOST_UPDATED = 2**24  # most weights whose optimizer step is timed; the seconds of more are proportional
LARGEST = 1e9  # bytes of the largest operation that is timed
# For these seconds a GPU is kept busy while the host launches a kernel that is timed, or those of an optimizer's step.
AHEAD_SECONDS, UPDATE_AHEAD_SECONDS = 3e-4, 2e-2
CYCLES = 2e9  # of a GPU in a second, at most: one with a lower clock is kept busy for longer
SMALL, MIDDLE = {"cpu": (64, 2, 16), "cuda": (64, 2, 16)}, {"cpu": (256, 4, 128), "cuda": (1024, 4, 512)}
CALIBRATION = {"small": SMALL, "middle": MIDDLE}  # width, rows and tokens of the calibration steps
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
SIZES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}
LONGEST_PRODUCT = 0.15  # seconds of a product, after which no larger one is timed
THIN = (8, 32)  # ranks of the LoRA products that the probe times
COPIED = {"cpu": 2**25, "cuda": 2**28}  # bytes of the copy that measures the bandwidth

Clock = Callable[[], float]


@dataclass
class Speed:
    """The measured speed of a device, in seconds of a device that does nothing else."""

    ceilings: dict[str, float] = field(default_factory=dict)  # highest FLOP/s of a matrix product, by dtype
    bandwidth: float = math.nan  # bytes/s that a copy reads and writes
    launch_seconds: float = math.nan  # of the smallest kernel
    host_seconds: float = 0.0  # overhead of one operator call: Python, modules, autograd; on a GPU all of the host's
    # Extra seconds for each byte moved by operations other than products. A step holds many tensors at the same time,
    # so that less of them is in the caches, or mapped, than when one operation is timed alone.
    byte_seconds: float = 0.0
    lap_seconds: float = math.nan  # of the reference product
    operations: dict[str, float] = field(default_factory=dict)  # seconds of timed operations, by their keys

    def roofline(self, one: Operation) -> float:
        """The shortest possible seconds of ``one``."""
        dtype = str(one.dtypes[0]).removeprefix("torch.") if one.dtypes else ""
        ceiling = self.ceilings.get(dtype) or max(self.ceilings.values())
        return max(one.flops / ceiling, one.bytes / self.bandwidth, self.launch_seconds)


class Meter:
    """Times operations and steps on a device with ``clock``, by default the wall clock.

    All seconds are scaled to a device on which a lap takes ``lap_seconds``. The speed of a device varies (other
    processes, its clock frequency), so laps are timed before and after other timings.
    """

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.lap_seconds = math.nan  # unknown at first: seconds are not scaled
        self._slowness, self.looked = 1.0, -math.inf
        self._arguments = Arguments(device, int(COLD_BYTES))

    def slowness(self, every: float = LOOKED_EVERY) -> float:
        """The seconds of a lap now / ``lap_seconds``; laps are timed again if the last are ``every`` seconds old."""
        if not math.isnan(self.lap_seconds) and time.perf_counter() >= self.looked + every:
            # The fastest lap: most of a few laps may include a wait for a core, and ``best`` leaves such waits out.
            self._slowness = min(self.laps(LOOKED_SECONDS)) / self.lap_seconds
            self.looked = time.perf_counter()
        return self._slowness

    def best(self, call: Callable[[], object], seconds: float, most: int, ahead: float = AHEAD_SECONDS) -> float:
        """The seconds of ``call``: the lower quartile of repetitions, as other processes disturb fast ones least."""
        slowness = self.slowness()
        first = self.once(call, ahead)
        # The first call loads kernels on a GPU; on a CPU what it adds is short beside a long call.
        took = [first] if first >= LONG_CALLS and self.device.type == "cpu" else []
        while sum(took) < LONG_CALLS and (len(took) < 3 or (sum(took) < seconds and len(took) < most)):
            took.append(self.once(call, ahead))
        return lower_quartile(took) / slowness

    def around(self, run: Callable[[], float]) -> float:
        """The seconds that ``run`` returns, scaled by the laps before and after it."""
        before = self.slowness(0)
        took = run()
        return took / math.sqrt(before * self.slowness(0))

    def once(self, call: Callable[[], object], ahead: float = AHEAD_SECONDS) -> float:
        """The seconds of one call; on a GPU of its kernels, if the host launches them within ``ahead`` seconds."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(round(ahead * CYCLES))  # else the device would wait for each launch between the events
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000
        begun = self.clock()
        call()
        return self.clock() - begun

    def operation(self, one: Operation) -> float:
        """The seconds of ``one``, on tensors of its shapes.

        On a CPU each call takes other tensors, and its result is kept for some time. This is as in a step, where most
        inputs (weights, activations of the forward) are in no cache, and outputs go to new memory.
        """
        sets = 1 if self.device.type == "cuda" else int(min(max(COLD_BYTES / max(one.bytes, 1), 1), MOST_SETS))
        arguments = itertools.cycle(self._arguments.made(one, sets))
        results = deque[Any](maxlen=sets)

        def call() -> None:
            given, named = next(arguments)
            results.append(one.operator(*given, **named))

        with torch.no_grad():
            return self.best(call, OPERATION_SECONDS, MOST_REPEATS)

    def free(self) -> None:
        """Give back the memory of the operations that were timed, on a GPU to the other processes too."""
        self._arguments.free()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def update(self, trained: Sizes, config: TrainConfig) -> float:
        """The seconds to clip gradients and step the optimizer for weights of these shapes; on a GPU the device's."""
        numbers = sum(math.prod(shape) for shape, _ in trained)
        some = trained if numbers <= MOST_UPDATED else (((MOST_UPDATED,), trained[0][1]),)
        optimizer = made_optimizer(some, config, self.device)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]

        def call() -> None:
            if config.clip:
                nn.utils.clip_grad_norm_(weights, config.clip)
            optimizer.step()

        seconds = self.best(call, OPERATION_SECONDS, MOST_REPEATS, UPDATE_AHEAD_SECONDS)
        return seconds * max(1.0, numbers / MOST_UPDATED)

    def bandwidth(self, seconds: float) -> float:
        """The bytes/s that a copy reads and writes; the copy is repeated for ``seconds``."""
        source = torch.ones(COPIED[self.device.type] // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.best(lambda: target.copy_(source), seconds, MOST_REPEATS)

    def laps(self, seconds: float) -> list[float]:
        """The seconds of each reference product in their order, for ``seconds`` and at least one."""
        left = torch.ones(LAP, LAP, device=self.device)
        took: list[float] = []
        product, end = left @ left, time.perf_counter() + seconds
        while not took or time.perf_counter() < end:  # a process that was suspended finds its time over
            took.append(self.once(lambda: torch.mm(left, left, out=product)))
        return took


def usual(laps: Sequence[float]) -> float:
    """The seconds of a lap: the median of the means of several parts of the time.

    A mean includes a constant load by other processes; the median over the parts leaves out short disturbances.
    """
    size = max(len(laps) // LAP_PARTS, 1)
    return statistics.median(statistics.fmean(laps[start : start + size]) for start in range(0, len(laps), size))


class Device:
    """A device with its speed, which is measured when it is needed for the first time."""

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter, folder: Path | None = None) -> None:
        self.device, self._meter = device, Meter(device, clock)
        self.at_once = 1  # trials that run on it at the same time
        self.key = device_key(device)
        self._file = (folder or cache_folder()) / f"speed-{self.key}.json"
        self._speed: Speed | None = None
        self._timed: dict[Any, dict[str, tuple[float, float]]] = {}  # operations by kind: (roofline, seconds)
        self._changed = False
        self.busy = 1.0  # seconds of a lap at the last look / seconds of a lap of the idle device

    @property
    def speed(self) -> Speed:
        """The kept speed if it still holds, else a new measurement; sets ``busy`` at the first call."""
        if self._speed is None:
            kept = self.kept()
            laps = self._meter.laps(LAP_SECONDS)
            for _ in range(MOST_PROBES):  # a speed that was measured while other processes ran does not hold afterwards
                if kept is not None and self._holds(kept, laps):
                    break
                kept, self._changed = measure(self._meter), True
                laps = self._meter.laps(LAP_SECONDS)
            assert kept is not None
            self._speed = kept
            self._meter.lap_seconds = kept.lap_seconds
            self.busy = self._how_busy(laps, SLOWED_LAPS * LAP_SECONDS)
            self.write()
        return self._speed

    def _how_busy(self, laps: Sequence[float], longer: float) -> float:
        """The seconds of a lap / those of a lap of the idle device; of laps of ``longer`` seconds if it is slowed."""
        found = usual(laps) / self._meter.lap_seconds
        return usual(self._meter.laps(longer)) / self._meter.lap_seconds if found > SLOWED else found

    def _holds(self, kept: Speed, laps: Sequence[float]) -> bool:
        """Whether a lap takes as long as when ``kept`` was measured, and the memory was not used by others then.

        A lower bandwidth now does not count: ``kept`` is the speed of a device that does nothing else.
        """
        if not 1 / CHANGED <= lower_quartile(laps) / kept.lap_seconds <= CHANGED:
            return False
        self._meter.lap_seconds = kept.lap_seconds
        return self._meter.bandwidth(LOOKED_SECONDS) <= CHANGED_MEMORY * kept.bandwidth

    def kept(self) -> Speed | None:
        """The speed in the cache; None where there is none, or where it cannot be read."""
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            content = json.loads(self._file.read_text(encoding="utf-8"))
            if content.pop("version") == VERSION:
                speed = Speed(**{part.name: content[part.name] for part in dataclasses.fields(Speed)})
                return speed if _usable(speed) else None
        return None

    def take_kept(self) -> bool:
        """Use the speed in the cache, and measure only how busy the device is; False without one in the cache."""
        if self._speed is None:
            self._speed = self.kept()
        if self._speed is None:
            return False
        self._meter.lap_seconds = self._speed.lap_seconds
        self.busy = self._how_busy(self._meter.laps(LAP_SECONDS / 3), 2 * LAP_SECONDS)
        return True

    def write(self) -> None:
        """Write the speed to the cache; if that fails, a warning is logged."""
        if not self._changed or self._speed is None:
            return
        content = {"version": VERSION, "device": name_of(self.device), **dataclasses.asdict(self._speed)}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps(content, indent=1))
            self._changed = False
        except OSError as error:
            log.warning("the measured speed of the device cannot be kept (%s)", error)

    def work(self, ledger: Ledger, until: float = math.inf) -> tuple[float, float]:
        """The seconds of all kernels of ``ledger``, and the part of these seconds that is estimated, not timed.

        Operations are timed until ``until`` (of ``time.perf_counter``), the longest ones first.
        """
        speed, total, estimated = self.speed, 0.0, 0.0
        calls = [(one, count) for one, count in ledger.calls.items() if not one.views]
        for one, _ in sorted(calls, key=lambda call: -call[1] * speed.roofline(call[0])):
            if one.key not in speed.operations and one.bytes <= LARGEST and time.perf_counter() < until:
                with suppress(Exception):  # an operator may refuse these numbers with any error; it is then estimated
                    speed.operations[one.key] = self._meter.operation(one)
                    self._changed = True
            if (timed := speed.operations.get(one.key)) is not None:
                for kind in one.kinds:
                    self._timed.setdefault(kind, {})[one.key] = speed.roofline(one), timed
        self._meter.free()
        for one, count in calls:
            found = speed.operations.get(one.key)
            if found is None:
                found = self._estimate(one)
                estimated += count * found
            total += count * found
        return total, estimated

    def _estimate(self, one: Operation) -> float:
        """The seconds of ``one``: its roofline times the factor of the nearest timed operation of its kind, else 2."""
        floor = self.speed.roofline(one)
        known = next(filter(None, map(self._timed.get, one.kinds)), None)
        if known is None:
            return 2 * floor
        nearest, took = min(known.values(), key=lambda pair: abs(math.log(pair[0] / floor)))
        return floor * took / nearest

    def update(self, trained: Sizes, config: TrainConfig) -> float:
        """The seconds of clipping and of the optimizer's step for weights of these shapes."""
        if not trained:
            return 0.0
        key = f"update {config.optimizer} {config.optimizer_kwargs} clip={bool(config.clip)} " + ",".join(
            f"{count}x{list(shape)}{dtype}" for (shape, dtype), count in Counter(trained).items()
        )
        operations = self.speed.operations
        if key not in operations:
            try:
                operations[key] = self._meter.update(trained, config)
            except Exception:  # an optimizer that cannot be made like this: assume the bytes that AdamW moves
                log.debug("the update cannot be timed", exc_info=True)
                bytes_ = sum(7 * math.prod(shape) * dtype.itemsize for shape, dtype in trained)
                operations[key] = bytes_ / self.speed.bandwidth + len(trained) * self.speed.launch_seconds
            self._changed = True
        return operations[key] * self.crowding

    @property
    def crowding(self) -> float:
        """How many times longer kernels take because of other processes and of the other trials that run on the device.

        A GPU runs the kernels of one process at a time. On a CPU each trial has cores of its own, as far as there are
        enough. ``busy`` may have been measured while the other trials ran already, so that the larger of both counts.
        """
        if self.device.type == "cuda":
            return max(self.busy, float(self.at_once))
        return max(self.busy, self.at_once * torch.get_num_threads() / cores())

    def step(self, ledger: Ledger, until: float = math.inf, *, captured: bool = False) -> tuple[float, float]:
        """The seconds of a step with these operations, and the share of its kernels' seconds that is estimated.

        On a CPU the seconds of kernels and of operator calls add up. A GPU works while the host calls, so that the
        longer of both counts; a step that is ``captured`` as a graph needs no calls.
        """
        work, estimated = self.work(ledger, until)
        host = 0.0 if captured else self.speed.host_seconds * ledger.dispatches
        inside = work + self.speed.byte_seconds * ledger.other_bytes
        share = estimated / work if work else 0.0
        if self.device.type == "cuda":  # whose trials have cores of their own
            return max(inside * self.crowding, host * self.busy), share
        return (inside + host) * self.crowding, share

    def ideal(self, flops: dict[str, float]) -> float | None:
        """The seconds of these FLOPs (by dtype) at the device's highest rate; None if that was never measured."""
        speed = self._speed or self.kept()
        if speed is None or any(dtype not in speed.ceilings for dtype in flops):
            return None
        return sum(count / speed.ceilings[dtype] for dtype, count in flops.items())


def _usable(found: Speed) -> bool:
    numbers = [*found.ceilings.values(), found.bandwidth, found.launch_seconds, found.lap_seconds]
    numbers += found.operations.values()
    return bool(found.ceilings) and all(isinstance(n, float) and math.isfinite(n) and n > 0 for n in numbers)


# ---- which device it is ------------------------------------------------------------------------------


def device_key(device: torch.device) -> str:
    """A hash of all that changes the speed of a device, except for other processes."""
    from peftsweep.config.identity import content_hash

    versions = {name: (found or {}).get("version") for name, found in record.packages().items()}
    versions = {name: versions[name] for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return content_hash([name_of(device), record.kernels(), versions])


def name_of(device: torch.device) -> str:
    """The model of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else record.processor() or platform.machine()


# ---- the probe ---------------------------------------------------------------------------------------


def measure(meter: Meter) -> Speed:
    """Measure a device: ceilings, bandwidth, launches, LoRA products, dequantisation, and steps of two small models."""
    device, begun = meter.device, time.perf_counter()
    speed = Speed(lap_seconds=lower_quartile(meter.laps(2 * LAP_SECONDS)))
    meter.lap_seconds, meter.looked = speed.lap_seconds, -math.inf
    for name in DTYPES[device.type]:
        dtype = getattr(torch, name)
        options: dict[str, Any] = {"repeats": 5, "clock": meter.clock, "longest": LONGEST_PRODUCT}
        speed.ceilings[name] = matmul_ceiling(device, dtype, SIZES[device.type], **options)
    speed.bandwidth = meter.bandwidth(0.1)
    small = torch.ones(8, device=device)
    speed.launch_seconds = meter.best(lambda: small.add_(1.0), 0.01, 1000)
    for one in layer_operations(DTYPES[device.type], THIN):
        with suppress(Exception):  # an operator that this device lacks
            speed.operations[one.key] = meter.operation(one)
    _calibrate(speed, meter)
    meter.free()
    log.info("measured the speed of %s in %.1f s", name_of(device), time.perf_counter() - begun)
    return speed


def _calibrate(speed: Speed, meter: Meter) -> None:
    """Set ``host_seconds`` and ``byte_seconds``: the time of a real step beyond that of its operations timed alone.

    Two steps are run: one with tiny tensors, in which the calls take most of the time, and one with larger tensors. On
    a GPU the first is not captured as a graph, as its calls are to be measured, and the second is.
    """
    found = {}
    for name, sizes in CALIBRATION.items():
        step, run = reference_step(meter.clock, meter.device, *sizes[meter.device.type], captured=name == "middle")
        kernels = {one: count for one, count in step.ledger.calls.items() if not one.views}
        # Both are timed in turns, because their difference is needed.
        rounds = [(meter.around(run), [meter.operation(one) for one in kernels]) for _ in range(ROUNDS)]
        seconds = statistics.median(whole for whole, _ in rounds)
        each = [statistics.median(took) for took in zip(*(parts for _, parts in rounds), strict=True)]
        speed.operations |= {one.key: took for one, took in zip(kernels, each, strict=True)}
        alone = sum(count * took for count, took in zip(kernels.values(), each, strict=True))
        found[name] = step.ledger, seconds - meter.update(step.trained, TrainConfig()), alone
    (tiny, short, little), (middle, long, much) = found["small"], found["middle"]
    on_gpu = meter.device.type == "cuda"  # which works while the host calls
    for _ in range(10):  # solves two equations for two unknowns, neither below 0, by iteration
        inside = 0.0 if on_gpu else little + speed.byte_seconds * tiny.other_bytes
        speed.host_seconds = max(short - inside, 0.0) / tiny.dispatches
        host = 0.0 if on_gpu else speed.host_seconds * middle.dispatches
        # NaN: on this GPU the step was not captured, so that the host's part of its seconds is unknown.
        speed.byte_seconds = 0.0 if math.isnan(long) else max(long - host - much, 0.0) / middle.other_bytes
