"""How fast a device is: measured once, kept in the user's cache, and again where that has changed.

A roofline says what an operation takes at least: its FLOPs at the ceiling of its number format, its bytes at the
memory's bandwidth, or the launch of a kernel. How near a kernel comes to that depends on its sizes, so each operation
of a step is also timed alone, on tensors of its shapes and strides, once for all trials; one that was not is taken as
far above its roofline as the nearest one of its kind.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import platform
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peftsweep.forecast.allocator import Allocator
from peftsweep.forecast.operations import Arguments, Ledger, Operation
from peftsweep.forecast.trace import Sizes, made_optimizer, reference_step
from peftsweep.observe.flops import matmul_ceiling
from peftsweep.observe.measure import lower_quartile
from peftsweep.schema import TrainConfig
from peftsweep.study import record
from peftsweep.study.atomic import write_text

log = logging.getLogger(__name__)

VERSION = 2  # of what is measured and how it is kept
LAP = 512  # the size of the square product by which a machine is found to have another speed
LAP_SECONDS = 0.15  # for which it is repeated
LAP_PARTS = 5  # of that time
LOOKED_SECONDS, LOOKED_EVERY = 0.012, 0.2  # for which laps are repeated beside other timings, and how often
MOST_PROBES = 2  # of a device whose speed changes while it is measured
ROUNDS = 3  # of the steps that are run, and of their operations, of which the middle one counts
CHANGED = 1.3  # times as slow as then, or as fast, as when others made it busy: all is measured again
CHANGED_MEMORY = 1.5  # times the bandwidth of then: others used the memory, and all is measured again
OPERATION_SECONDS = 0.004  # for which an operation is repeated
MOST_REPEATS = 20
COLD_BYTES, MOST_SETS = 48e6, 12  # of tensors that a CPU's caches do not hold, and of an operation's at most
MOST_UPDATED = 2**24  # numbers of weights whose update is timed; that of more is proportional
LARGEST = 1e9  # bytes of an operation that is timed
CALIBRATION = {"small": (64, 2, 16), "middle": (256, 4, 128)}  # width, rows and tokens of the steps that are run
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
SIZES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}
LONGEST_PRODUCT = 0.15  # seconds of a product after which no larger one is timed
THIN = (8, 32)  # ranks of the products that are timed with the probe
COPIED = {"cpu": 2**25, "cuda": 2**28}  # bytes

Clock = Callable[[], float]


@dataclass
class Speed:
    """What was measured of a device. Seconds are those of a device that does nothing else."""

    ceilings: dict[str, float] = field(default_factory=dict)  # FLOP/s of a matrix product, by number format
    bandwidth: float = math.nan  # bytes/s that a copy reads and writes
    launch_seconds: float = math.nan  # of the smallest kernel
    host_seconds: float = 0.0  # of a call of an operator, for what is around it: Python, modules, autograd
    # Of each byte that is moved by what is no product, beyond the operations' own seconds: in a step many tensors are
    # held at the same time, so that less is in the caches, and mapped, than where one operation is timed alone.
    byte_seconds: float = 0.0
    lap_seconds: float = math.nan  # of the reference product
    operations: dict[str, float] = field(default_factory=dict)  # by their keys

    def roofline(self, one: Operation) -> float:
        """The seconds that ``one`` takes at least."""
        dtype = str(one.dtypes[0]).removeprefix("torch.") if one.dtypes else ""
        ceiling = self.ceilings.get(dtype) or max(self.ceilings.values())
        return max(one.flops / ceiling, one.bytes / self.bandwidth, self.launch_seconds)


class Meter:
    """Times operations and steps on a device, by a clock that is the wall's unless told otherwise.

    All its seconds are those of a device on which a lap takes ``lap_seconds``: a device is slower at one moment than
    at another (others compute, its frequency changes), so a lap is timed beside each timing.
    """

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.lap_seconds = math.nan  # not known yet: seconds are as they are measured
        self._slowness, self.looked = 1.0, -math.inf
        self._arguments = Arguments(device, int(COLD_BYTES))

    def slowness(self, every: float = LOOKED_EVERY) -> float:
        """Times as slow as where a lap takes ``lap_seconds``; laps are timed again ``every`` so many seconds."""
        if not math.isnan(self.lap_seconds) and time.perf_counter() >= self.looked + every:
            # The fastest: of few laps most may be longer as the process waits for a core, which a timing leaves out.
            self._slowness = min(self.laps(LOOKED_SECONDS)) / self.lap_seconds
            self.looked = time.perf_counter()
        return self._slowness

    def best(self, call: Callable[[], object], seconds: float, most: int) -> float:
        """Of some repetitions the seconds of a fast one (the lower quartile), which others disturb least."""
        slowness = self.slowness()
        call()
        took: list[float] = []
        while len(took) < 3 or (sum(took) < seconds and len(took) < most):
            took.append(self.once(call))
        return lower_quartile(took) / slowness

    def around(self, run: Callable[[], float]) -> float:
        """The seconds that ``run`` returns, by the laps before and after it."""
        before = self.slowness(0)
        took = run()
        return took / math.sqrt(before * self.slowness(0))

    def once(self, call: Callable[[], object]) -> float:
        """The seconds of one call, or on a GPU of its kernels."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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

        On a CPU each call takes other tensors and its result is kept for some time: in a step, too, most of what is
        read is in no cache (weights, activations of the forward) and what is written goes to new memory.
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
        """Give back the memory of the operations that were timed."""
        self._arguments.free()

    def update(self, trained: Sizes, config: TrainConfig) -> float:
        """The seconds in which gradients are clipped and the optimizer changes weights of these shapes."""
        numbers = sum(math.prod(shape) for shape, _ in trained)
        some = trained if numbers <= MOST_UPDATED else (((MOST_UPDATED,), trained[0][1]),)
        optimizer = made_optimizer(some, config, self.device)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]

        def call() -> None:
            if config.clip:
                nn.utils.clip_grad_norm_(weights, config.clip)
            optimizer.step()

        return self.best(call, OPERATION_SECONDS, MOST_REPEATS) * max(1.0, numbers / MOST_UPDATED)

    def bandwidth(self, seconds: float) -> float:
        """Bytes/s that a copy reads and writes, repeated for so long."""
        source = torch.ones(COPIED[self.device.type] // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.best(lambda: target.copy_(source), seconds, MOST_REPEATS)

    def laps(self, seconds: float) -> list[float]:
        """The seconds of each of many reference products, for so long, in their order."""
        left = torch.ones(LAP, LAP, device=self.device)
        product, took, end = left @ left, [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            took.append(self.once(lambda: torch.mm(left, left, out=product)))
        return took


def usual(laps: Sequence[float]) -> float:
    """The seconds of a lap: the median of the means of several parts of the time.

    A mean counts what others take from all the time, the median leaves out what comes and goes.
    """
    size = max(len(laps) // LAP_PARTS, 1)
    return statistics.median(statistics.fmean(laps[start : start + size]) for start in range(0, len(laps), size))


class Device:
    """A device with its speed, which is measured when it is first needed."""

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter, folder: Path | None = None) -> None:
        self.device, self._meter = device, Meter(device, clock)
        self.key = device_key(device)
        self._file = (folder or cache_folder()) / f"speed-{self.key}.json"
        self._speed: Speed | None = None
        self._kinds: dict[Any, dict[str, tuple[float, float]]] = {}  # of what was timed: rooflines and seconds
        self._changed = False
        self.busy = 1.0  # times as slow, when last looked, as when it was measured

    @property
    def speed(self) -> Speed:
        """What is kept of it, else what is measured now; then also how busy it is."""
        if self._speed is None:
            kept = self.kept()
            laps = self._meter.laps(LAP_SECONDS)
            for _ in range(MOST_PROBES):  # what was measured while others computed does not hold afterwards
                if kept is not None and self._holds(kept, laps):
                    break
                kept, self._changed = measure(self._meter), True
                laps = self._meter.laps(LAP_SECONDS)
            assert kept is not None
            self._speed = kept
            self._meter.lap_seconds = kept.lap_seconds
            self.busy = usual(laps) / kept.lap_seconds
            self.write()
        return self._speed

    def _holds(self, kept: Speed, laps: Sequence[float]) -> bool:
        """Whether a lap takes as long as when ``kept`` was measured, and others did not use the memory then.

        Others who use it now do not count: what was measured is to be that of a device that does nothing else.
        """
        if not 1 / CHANGED <= lower_quartile(laps) / kept.lap_seconds <= CHANGED:
            return False
        self._meter.lap_seconds = kept.lap_seconds
        return self._meter.bandwidth(LOOKED_SECONDS) <= CHANGED_MEMORY * kept.bandwidth

    def kept(self) -> Speed | None:
        """What was measured before; None where nothing was, or that cannot be read."""
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            said = json.loads(self._file.read_text(encoding="utf-8"))
            if said.pop("version") == VERSION:
                found = Speed(**{one.name: said[one.name] for one in dataclasses.fields(Speed)})
                return found if _usable(found) else None
        return None

    def take_kept(self) -> bool:
        """Go by what is kept, and measure nothing but how busy the device is; False where nothing is kept."""
        if self._speed is None:
            self._speed = self.kept()
        if self._speed is None:
            return False
        self._meter.lap_seconds = self._speed.lap_seconds
        self.busy = usual(self._meter.laps(LAP_SECONDS / 3)) / self._speed.lap_seconds
        return True

    def write(self) -> None:
        """Keep what was measured; a cache that cannot be written is none."""
        if not self._changed or self._speed is None:
            return
        said = {"version": VERSION, "device": name_of(self.device), **dataclasses.asdict(self._speed)}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps(said, indent=1))
            self._changed = False
        except OSError as error:
            log.warning("the measured speed of the device cannot be kept (%s)", error)

    def work(self, ledger: Ledger, until: float = math.inf) -> tuple[float, float]:
        """The seconds of all kernels of ``ledger``, and the part of them that was not timed but estimated.

        Operations are timed until the clock time ``until``, those that take longest first.
        """
        speed, total, estimated = self.speed, 0.0, 0.0
        calls = [(one, count) for one, count in ledger.calls.items() if not one.views]
        for one, _ in sorted(calls, key=lambda call: -call[1] * speed.roofline(call[0])):
            if one.key not in speed.operations and one.bytes <= LARGEST and time.perf_counter() < until:
                with suppress(Exception):  # whatever an operator raises that wants other numbers: it is estimated
                    speed.operations[one.key] = self._meter.operation(one)
                    self._changed = True
            if (timed := speed.operations.get(one.key)) is not None:
                self._kinds.setdefault(one.kind, {})[one.key] = speed.roofline(one), timed
        self._meter.free()
        for one, count in calls:
            found = speed.operations.get(one.key)
            if found is None:
                found = self._estimate(one)
                estimated += count * found
            total += count * found
        return total, estimated

    def _estimate(self, one: Operation) -> float:
        """As far above its roofline as the nearest of its kind that was timed; at twice that where none was."""
        floor = self.speed.roofline(one)
        known = self._kinds.get(one.kind)
        if not known:
            return 2 * floor
        nearest, took = min(known.values(), key=lambda pair: abs(math.log(pair[0] / floor)))
        return floor * took / nearest

    def update(self, trained: Sizes, config: TrainConfig) -> float:
        """The seconds of the optimizer's step over weights of these shapes."""
        if not trained:
            return 0.0
        key = f"update {config.optimizer} {config.optimizer_kwargs} clip={bool(config.clip)} " + ",".join(
            f"{count}x{list(shape)}{dtype}" for (shape, dtype), count in Counter(trained).items()
        )
        operations = self.speed.operations
        if key not in operations:
            try:
                operations[key] = self._meter.update(trained, config)
            except Exception:  # an optimizer of another kind: as AdamW reads and writes
                log.debug("the update cannot be timed", exc_info=True)
                bytes_ = sum(7 * math.prod(shape) * dtype.itemsize for shape, dtype in trained)
                operations[key] = bytes_ / self.speed.bandwidth + len(trained) * self.speed.launch_seconds
            self._changed = True
        return operations[key] * self.busy

    def step(self, ledger: Ledger, until: float = math.inf, *, captured: bool = False) -> tuple[float, float]:
        """The seconds of a step of these operations, and the share of them that is estimated.

        A CPU works and calls in turns; a GPU works while the host calls, whichever takes longer, or, where the step is
        ``captured`` as a graph, without the host.
        """
        work, estimated = self.work(ledger, until)
        host = 0.0 if captured else self.speed.host_seconds * ledger.dispatches
        inside = work + self.speed.byte_seconds * ledger.other_bytes
        took = max(inside, host) if self.device.type == "cuda" else inside + host
        return took * self.busy, estimated / work if work else 0.0

    def ideal(self, flops: dict[str, float]) -> float | None:
        """The seconds of these FLOPs, by number format, at the device's ceiling; None if it was never measured."""
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
    """Of all that changes a device's speed, but for what else runs on it."""
    from peftsweep.config.identity import content_hash

    versions = {name: (found or {}).get("version") for name, found in record.packages().items()}
    versions = {name: versions[name] for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return content_hash([name_of(device), record.kernels(), versions])


def name_of(device: torch.device) -> str:
    """The model of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else record.processor() or platform.machine()


def cache_folder() -> Path:
    """Where what is measured of this machine is kept: ``$XDG_CACHE_HOME/peftsweep``, else ``~/.cache/peftsweep``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftsweep"


# ---- the probe ---------------------------------------------------------------------------------------


def measure(meter: Meter) -> Speed:
    """The probe: ceilings, bandwidth, launches, thin products, dequantisation, and two steps of a small model."""
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
    for one in _samples(device):
        with suppress(Exception):  # an operator that this device lacks
            speed.operations[one.key] = meter.operation(one)
    _calibrate(speed, meter)
    meter.free()
    log.info("measured the speed of %s in %.1f s", name_of(device), time.perf_counter() - begun)
    return speed


def _samples(device: torch.device) -> Iterator[Operation]:
    """Products as a LoRA has them, and a layer that is stored in 4 and in 8 bits, made wide again."""
    import bitsandbytes  # noqa: F401  (it names its operators)

    ledger = Ledger()
    with Allocator(1, 0, ledger):
        for name in DTYPES[device.type]:
            wide, layer = (torch.empty(512, 1024, dtype=getattr(torch, name), device="meta") for _ in range(2))
            for rank in THIN:
                low = torch.empty(rank, 1024, dtype=wide.dtype, device="meta")
                functional.linear(functional.linear(wide, low), low.new_empty(1024, rank))
            torch.ops.bitsandbytes.dequantize_4bit(  # 64 numbers to a scale, two to a byte
                layer.new_empty(layer.numel() // 2, 1, dtype=torch.uint8),
                layer.new_empty(layer.numel() // 64, dtype=torch.float32),
                *(64, "nf4", list(layer.shape), layer.dtype),
            )
            layer.new_empty(layer.shape, dtype=torch.int8) * layer.new_empty(512, 1)
    yield from ledger.calls


def _calibrate(speed: Speed, meter: Meter) -> None:
    """What a real training step takes beyond its operations: of each call, and of each operation's own time.

    Two steps are run, one of tiny tensors, whose time is that of the calls, and one of larger ones.
    """
    found = {}
    for name, (width, rows, tokens) in CALIBRATION.items():
        step, run = reference_step(meter.clock, meter.device, width, rows, tokens)
        kernels = {one: count for one, count in step.ledger.calls.items() if not one.views}
        # In turns, as what is wanted is the difference of the two.
        rounds = [(meter.around(run), [meter.operation(one) for one in kernels]) for _ in range(ROUNDS)]
        seconds = statistics.median(whole for whole, _ in rounds)
        each = [statistics.median(took) for took in zip(*(parts for _, parts in rounds), strict=True)]
        speed.operations |= {one.key: took for one, took in zip(kernels, each, strict=True)}
        alone = sum(count * took for count, took in zip(kernels.values(), each, strict=True))
        found[name] = step.ledger, seconds - meter.update(step.trained, TrainConfig()), alone
    (tiny, short, little), (middle, long, much) = found["small"], found["middle"]
    on_gpu = meter.device.type == "cuda"  # which works while the host calls
    for _ in range(10):  # two equations with two unknown, of which neither is below 0
        inside = 0.0 if on_gpu else little + speed.byte_seconds * tiny.other_bytes
        speed.host_seconds = max(short - inside, 0.0) / tiny.dispatches
        host = 0.0 if on_gpu else speed.host_seconds * middle.dispatches
        speed.byte_seconds = max(long - host - much, 0.0) / middle.other_bytes
