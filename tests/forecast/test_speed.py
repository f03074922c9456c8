"""A device's speed: how it makes seconds of operations, how it is kept, when it is measured again."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from peftsweep.forecast import speed, trace
from peftsweep.forecast.allocator import Allocator
from peftsweep.forecast.operations import Ledger
from peftsweep.forecast.speed import Device, Speed
from peftsweep.forecast.trace import Step
from peftsweep.schema import Capture, TrainConfig
from peftsweep.training import loop

CPU = torch.device("cpu")
MEASURED = Speed({"float32": 1e9, "bfloat16": 2e9}, 1e8, 1e-6, host_seconds=1e-5, byte_seconds=1e-9, lap_seconds=1e-3)


def product(size: int, dtype: torch.dtype = torch.float32, *, transposed: bool = False) -> Ledger:
    ledger = Ledger()
    with Allocator(1, 0, ledger):
        left = torch.empty(size, size, dtype=dtype, device="meta")
        left @ (left.t() if transposed else left)
    return products_of(ledger)


def products_of(ledger: Ledger) -> Ledger:
    """Without the making of the tensors."""
    kept = Ledger()
    kept.calls.update({one: count for one, count in ledger.calls.items() if one.flops})
    return kept


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device whose laps take what they took when it was measured."""
    monkeypatch.setattr(speed.Meter, "laps", lambda self, seconds: [MEASURED.lap_seconds] * 4)
    monkeypatch.setattr(speed.Meter, "bandwidth", lambda self, seconds: MEASURED.bandwidth)
    monkeypatch.setattr(speed, "measure", lambda meter: dataclasses.replace(MEASURED, operations={}))
    return Device(CPU, folder=tmp_path)


def test_the_roofline_is_the_longest_of_flops_bytes_and_launch() -> None:
    (one,) = product(1000).calls
    assert MEASURED.roofline(one) == 2 * 1000**3 / 1e9
    (one,) = product(10).calls
    assert MEASURED.roofline(one) == max(2 * 10**3 / 1e9, 3 * 400 / 1e8)
    (one,) = product(1).calls
    assert MEASURED.roofline(one) == 1e-6
    (one,) = product(1000, torch.bfloat16).calls
    assert MEASURED.roofline(one) == 2 * 1000**3 / 2e9


def test_an_operation_that_was_not_timed_is_as_far_above_its_roofline_as_its_nearest_kin(device: Device) -> None:
    (timed,), (other,) = product(500).calls, product(600).calls
    device.speed.operations[timed.key] = 3 * MEASURED.roofline(timed)
    ledger = Ledger()
    ledger.calls.update([timed, other])
    seconds, estimated = device.work(ledger, until=0.0)
    assert estimated == pytest.approx(3 * MEASURED.roofline(other))
    assert seconds == pytest.approx(3 * MEASURED.roofline(other) + 3 * MEASURED.roofline(timed))


def test_the_nearest_kin_of_a_product_multiplies_factors_of_the_same_layout(device: Device) -> None:
    (slow,), (fast,) = product(590).calls, product(400, transposed=True).calls
    (other,) = product(600, transposed=True).calls
    device.speed.operations |= {slow.key: 20 * MEASURED.roofline(slow), fast.key: 3 * MEASURED.roofline(fast)}
    ledger = Ledger()
    ledger.calls.update([slow, fast, other])
    assert device.work(ledger, until=0.0)[1] == pytest.approx(3 * MEASURED.roofline(other))


def test_a_product_whose_layout_was_never_timed_takes_the_factor_of_another(device: Device) -> None:
    (timed,), (other,) = product(500).calls, product(600, transposed=True).calls
    device.speed.operations[timed.key] = 3 * MEASURED.roofline(timed)
    ledger = Ledger()
    ledger.calls.update([timed, other])
    assert device.work(ledger, until=0.0)[1] == pytest.approx(3 * MEASURED.roofline(other))


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 1), (0.06, 3), (0.001, 4)])  # of short ones the first is left out
def test_an_operation_that_takes_long_is_repeated_less(seconds: float, calls: int) -> None:
    now = 0.0

    def call() -> None:
        nonlocal now
        now += seconds

    assert speed.Meter(CPU, clock=lambda: now).best(call, 0.0, 20) == pytest.approx(seconds)
    assert now == pytest.approx(calls * seconds)


def test_an_operation_is_timed_once_and_kept_for_other_processes(device: Device, tmp_path: Path) -> None:
    ledger = product(32)
    (one,) = ledger.calls
    seconds, estimated = device.work(ledger)
    device.write()
    assert seconds > 0
    assert estimated == 0
    again = Device(CPU, folder=tmp_path)
    assert again.take_kept()
    assert again.work(ledger, until=0.0) == (seconds, 0.0)
    assert one.key in again.speed.operations


def test_a_cpu_works_and_calls_in_turns_and_a_gpu_at_the_same_time(device: Device) -> None:
    ledger = product(32)
    (one,) = ledger.calls
    device.speed.operations[one.key] = 1e-3
    assert device.step(ledger)[0] == pytest.approx(1e-3 + MEASURED.host_seconds)
    device.device = torch.device("cuda")
    assert device.step(ledger)[0] == pytest.approx(1e-3)
    device.speed.operations[one.key] = 1e-7
    assert device.step(ledger)[0] == pytest.approx(MEASURED.host_seconds)
    assert device.step(ledger, captured=True)[0] == pytest.approx(1e-7)


# ---- on a GPU --------------------------------------------------------------------------------------


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is given to a pretended GPU, in its order."""
    given: list[Any] = []

    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self) -> None:
            given.append("event")

        def synchronize(self) -> None: ...

        def elapsed_time(self, _: Any) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", given.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("empty"))
    return given


def test_a_gpu_is_busy_while_the_host_launches_what_is_timed(queue: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    meter = speed.Meter(torch.device("cuda"))
    assert meter.once(lambda: queue.append("call")) == pytest.approx(2e-3)
    assert queue == [round(speed.AHEAD_SECONDS * speed.CYCLES), "event", "call", "event"]
    queue.clear()
    made = trace.made_optimizer
    monkeypatch.setattr(speed, "made_optimizer", lambda sizes, config, device: made(sizes, config, CPU))
    assert meter.update((((8, 8), torch.float32),), TrainConfig()) == pytest.approx(2e-3)
    assert {one for one in queue if one != "event"} == {round(speed.UPDATE_AHEAD_SECONDS * speed.CYCLES)}


def test_the_memory_of_timed_operations_is_given_back_to_other_processes(queue: list[Any]) -> None:
    speed.Meter(torch.device("cuda")).free()
    assert queue == ["empty"]
    speed.Meter(CPU).free()
    assert queue == ["empty"]


@pytest.mark.parametrize(("long", "beyond"), [(5e-3, 5e-3 - 1e-3), (1e-4, 0.0), (math.nan, 0.0)])
def test_the_host_s_seconds_are_of_a_step_that_is_not_captured_and_bytes_of_one_that_is(
    long: float, beyond: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger()
    with Allocator(1, 0, ledger):
        left = torch.empty(64, 64, device="meta")
        left @ left + left
    seen = dict[bool, tuple[int, ...]]()

    def reference(clock: Any, device: Any, *sizes: int, captured: bool) -> Any:
        seen[captured] = sizes
        return Step(ledger, ()), lambda: long if captured else 3e-3

    monkeypatch.setattr(speed, "reference_step", reference)
    monkeypatch.setattr(speed.Meter, "operation", lambda self, one: 1e-3 / sum(ledger.calls.values()))
    monkeypatch.setattr(speed.Meter, "update", lambda self, trained, config: 0.0)
    monkeypatch.setattr(speed.Meter, "around", lambda self, run: run())
    found = Speed()
    speed._calibrate(found, speed.Meter(torch.device("cuda")))
    assert found.host_seconds == pytest.approx(3e-3 / ledger.dispatches)
    assert found.byte_seconds == pytest.approx(beyond / ledger.other_bytes)
    assert seen == {False: speed.SMALL["cuda"], True: speed.MIDDLE["cuda"]}


@pytest.mark.parametrize("captured", [False, True])
def test_a_calibration_step_is_captured_only_where_that_is_meant(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways, train = [], loop.train

    def noted(model: Any, rows: Any, config: TrainConfig, **options: Any) -> Any:
        ways.append(config.capture)
        return train(model, rows, config, **options)

    monkeypatch.setattr(loop, "train", noted)
    _, run = trace.reference_step(time.perf_counter, CPU, 64, 2, 16, captured=captured)
    assert run() > 0
    assert ways == [Capture.auto if captured else Capture.off]


@pytest.mark.gpu
def test_the_seconds_of_a_kernel_are_not_those_of_the_host(tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    meter, small = speed.Meter(cuda), torch.ones(8, device=cuda)
    assert meter.best(lambda: small.add_(1.0), 0.01, 100) < 2e-5  # a host needs 1e-5 to 1e-4
    found = Device(cuda, folder=tmp_path).speed
    assert found.launch_seconds < 2e-5
    assert 2e-6 < found.host_seconds < 1e-3
    assert found.byte_seconds < 1e-10  # a tenth of the bandwidth of any GPU
    assert torch.cuda.memory_reserved() < 2e9


def test_a_machine_of_another_speed_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []
    lap = [1e-3]
    monkeypatch.setattr(speed.Meter, "laps", lambda self, seconds: [lap[0]] * 4)
    monkeypatch.setattr(speed.Meter, "bandwidth", lambda self, seconds: MEASURED.bandwidth)

    def measure(meter: Any) -> Speed:
        measured.append(lap[0])
        return dataclasses.replace(MEASURED, lap_seconds=lap[0])

    monkeypatch.setattr(speed, "measure", measure)
    for now in (1.0e-3, 1.1e-3, 1.5e-3, 1.5e-3, 1.2e-3, 1.1e-3):  # at last it is no longer as busy as it was
        lap[0] = now
        busy = Device(CPU, folder=tmp_path)
        busy.speed  # noqa: B018
    assert measured == [1.0e-3, 1.5e-3, 1.1e-3]


@pytest.mark.parametrize(("now", "again"), [(1.4, False), (1.6, True), (0.3, False)])
def test_what_was_measured_while_others_used_the_memory_is_measured_again_without_them(
    device: Device, monkeypatch: pytest.MonkeyPatch, now: float, again: bool
) -> None:
    device.speed  # noqa: B018
    monkeypatch.setattr(speed.Meter, "bandwidth", lambda self, seconds: now * MEASURED.bandwidth)
    anew = dataclasses.replace(MEASURED, bandwidth=now * MEASURED.bandwidth)
    monkeypatch.setattr(speed, "measure", lambda meter: anew)
    assert (Device(CPU, folder=device._file.parent).speed == anew) is again


def test_a_process_that_was_suspended_until_its_time_was_over_times_a_lap_all_the_same() -> None:
    meter = speed.Meter(CPU)
    assert len(meter.laps(-1.0)) == 1


def test_a_process_that_waits_for_a_core_is_on_no_slower_device(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = speed.Meter(CPU)
    meter.lap_seconds = 1e-3
    monkeypatch.setattr(speed.Meter, "laps", lambda self, seconds: [8e-3, 1.2e-3, 9e-3])
    assert meter.slowness() == pytest.approx(1.2)


@pytest.mark.parametrize("now", [2.0, 0.5])
def test_what_was_measured_on_a_busier_or_idler_machine_is_scaled_to_what_it_is_now(
    device: Device, monkeypatch: pytest.MonkeyPatch, now: float
) -> None:
    ledger = product(32)
    before, _ = device.step(ledger)
    device.write()
    monkeypatch.setattr(speed.Meter, "laps", lambda self, seconds: [now * MEASURED.lap_seconds] * 4)
    again = Device(CPU, folder=device._file.parent)
    assert again.take_kept()
    assert again.step(ledger, until=0.0)[0] == pytest.approx(now * before)


@pytest.mark.parametrize(("later", "busy"), [(1.0, 1.0), (2.0, 2.0)])
def test_a_process_of_a_moment_does_not_slow_a_trial_and_a_lasting_one_does(
    device: Device, monkeypatch: pytest.MonkeyPatch, later: float, busy: float
) -> None:
    device.speed  # noqa: B018

    def laps(_self: speed.Meter, seconds: float) -> list[float]:
        return [(8.0 if seconds <= speed.LAP_SECONDS else later) * MEASURED.lap_seconds] * 4

    monkeypatch.setattr(speed.Meter, "laps", laps)
    again = Device(CPU, folder=device._file.parent)
    assert again.take_kept()
    assert again.busy == pytest.approx(busy)


def test_what_is_timed_in_a_busy_moment_is_slowed_by_it_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.speed  # noqa: B018
    monkeypatch.setattr(speed.Meter, "laps", lambda self, seconds: [2 * MEASURED.lap_seconds] * 4)
    monkeypatch.setattr(speed.Meter, "once", lambda self, *_: 2e-3)
    now, ledger = Device(CPU, folder=device._file.parent), product(32)
    assert now.take_kept()
    assert now.step(ledger)[0] == pytest.approx(2e-3 + 2 * MEASURED.host_seconds)
    assert now.update((((8, 8), torch.float32),), TrainConfig()) == pytest.approx(2e-3)
    (one,) = ledger.calls
    assert now.speed.operations[one.key] == pytest.approx(1e-3)  # as it is kept: of a device that is not busy


def test_a_step_is_as_slow_as_the_laps_before_and_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    laps = iter([1e-3, 4e-3])
    monkeypatch.setattr(speed.Meter, "laps", lambda self, seconds: [next(laps)] * 4)
    meter = speed.Meter(CPU)
    assert meter.around(lambda: 0.5) == 0.5  # nothing to compare with
    meter.lap_seconds = 1e-3
    assert meter.around(lambda: 0.5) == pytest.approx(0.25)


def test_a_probe_that_others_disturbed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = iter([dataclasses.replace(MEASURED, lap_seconds=lap) for lap in (6e-3, 1.1e-3)])
    monkeypatch.setattr(speed.Meter, "laps", lambda self, seconds: [1e-3] * 4)
    monkeypatch.setattr(speed, "measure", lambda meter: next(probes))
    device = Device(CPU, folder=tmp_path)
    assert device.speed.lap_seconds == 1.1e-3
    found = device.kept()
    assert found is not None
    assert found.lap_seconds == 1.1e-3


@pytest.mark.parametrize(("size", "sets"), [(64, speed.MOST_SETS), (1024, 3), (4096, 1)])
def test_a_cpu_times_an_operation_on_tensors_that_no_cache_holds(size: int, sets: int) -> None:
    read: list[int] = []

    def operator(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        read.append(left.data_ptr())
        return left.new_empty(size, size)

    (one,) = product(size).calls
    vars(operator)["_schema"] = one.operator._schema
    fake: Any = dataclasses.replace(one, operator=operator)  # type: ignore[arg-type]
    speed.Meter(CPU).operation(fake)
    assert len(set(read)) == min(sets, len(read))
    assert sets == 1 or len(read) > sets


def test_a_moment_in_which_others_compute_does_not_count_and_a_steady_neighbour_does() -> None:
    assert speed.usual([1.0] * 40 + [9.0] * 10) == 1.0
    assert speed.usual([1.0, 3.0] * 25) == 2.0
    assert speed.usual([1.0]) == 1.0


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"version": 1}', '{"version": 2}'])
def test_a_damaged_cache_is_measured_again(device: Device, content: str) -> None:
    device._file.write_text(content)
    assert device.kept() is None
    assert device.speed.ceilings == MEASURED.ceilings
    assert json.loads(device._file.read_text())["bandwidth"] == MEASURED.bandwidth


def test_a_cache_that_holds_no_speed_of_a_product_is_none(device: Device) -> None:
    device.speed  # noqa: B018
    kept = json.loads(device._file.read_text())
    wrong: dict[str, Any]
    for wrong in ({"ceilings": {}}, {"bandwidth": 0.0}, {"launch_seconds": "fast"}, {"operations": {"x": -1.0}}):
        device._file.write_text(json.dumps(kept | wrong))
        assert device.kept() is None, wrong


def test_the_share_of_the_ceiling_is_of_each_number_format(device: Device) -> None:
    assert device.ideal({"float32": 1e9}) is None  # never measured
    device.speed  # noqa: B018
    assert device.ideal({"float32": 1e9, "bfloat16": 4e9}) == pytest.approx(3.0)
    assert device.ideal({"float16": 1.0}) is None


@pytest.mark.slow
def test_the_probe_measures_all_that_a_prediction_needs(tmp_path: Path) -> None:
    found = Device(CPU, folder=tmp_path).speed
    assert found.ceilings.keys() == {"float32", "bfloat16"}
    assert 1e8 < found.bandwidth < 1e13
    assert 0 < found.launch_seconds < 1e-3
    assert 0 < found.host_seconds < 1e-2
    assert any(key.startswith("bitsandbytes::dequantize_4bit") for key in found.operations)
