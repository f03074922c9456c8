"""The clock and the meter."""

from __future__ import annotations

import pytest
import torch

from peftsweep.observe import measure
from peftsweep.observe.measure import Laps, Meter, percentile

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_is_timed_and_adds_up_when_entered_again() -> None:
    clock = Clock()
    meter = Meter(CPU, clock)
    for seconds in (2.0, 3.0):
        with meter.stage("eval"):
            clock.now += seconds
    clock.now += 50
    assert meter.stages["eval"].seconds == 5.0


def test_a_failing_stage_is_timed_and_keeps_its_name() -> None:
    clock = Clock()
    meter = Meter(CPU, clock)

    def fail() -> None:
        clock.now += 4
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), meter.stage("train"):
        fail()
    assert (meter.current, meter.stages["train"].seconds) == ("train", 4.0)


def test_the_peak_of_one_stage_is_not_another_s() -> None:
    meter = Meter(CPU)
    with meter.stage("big"):
        block = torch.ones(64 * 2**20)  # 256 MB
        del block
    with meter.stage("small"):
        pass
    assert meter.stages["big"].rss_peak - meter.stages["small"].rss_peak > 200 * 2**20


def test_laps_are_timed_one_by_one() -> None:
    clock = Clock()
    laps = Laps(CPU, clock)
    for seconds in (1.0, 2.0, 4.0):
        laps.start()
        clock.now += seconds
        laps.stop()
        clock.now += 10
    assert laps.seconds() == [1.0, 2.0, 4.0]


def test_what_is_no_part_of_a_lap_is_left_out() -> None:
    clock = Clock()
    laps = Laps(CPU, clock)
    laps.start()
    clock.now += 5.0
    laps.stop(3.0)
    assert laps.seconds() == [2.0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:122] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    ],
)
def test_every_way_to_say_that_memory_ran_out(error: Exception) -> None:
    assert measure.out_of_memory(error)
    wrapped = RuntimeError("the backend failed")
    wrapped.__cause__ = error
    assert measure.out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"), ValueError("out of memory"), KeyError(1)],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not measure.out_of_memory(error)


def test_laps_are_those_of_the_device_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[object] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            marks.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    laps = Laps(torch.device("cuda", 1))
    laps.start()
    laps.stop()
    assert marks == ["stream of cuda:1"] * 2


def test_percentiles() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([], 50) is None


def test_an_inner_stage_s_seconds_and_memory_are_its_own() -> None:
    clock = Clock()
    meter = Meter(CPU, clock)
    with meter.stage("setup"):
        clock.now += 1
        with meter.stage("train"):
            clock.now += 10
            with meter.stage("validate") as one:
                block = torch.ones(64 * 2**20)  # 256 MB
                del block
                clock.now += 100
            assert meter.current == "train"
            with meter.stage("validate"):
                clock.now += 200
            clock.now += 20
        clock.now += 2
    seconds = {name: stage.seconds for name, stage in meter.stages.items()}
    assert seconds == {"setup": 3.0, "train": 30.0, "validate": 300.0}
    assert one.seconds == 100.0
    assert meter.stages["validate"].rss_peak - meter.stages["train"].rss_peak > 200 * 2**20


def test_a_split_gives_the_peak_since_the_last_one_and_the_stage_keeps_the_highest() -> None:
    clock = Clock()
    meter = Meter(CPU, clock)
    with meter.stage("train"):
        clock.now += 1
        block = torch.ones(64 * 2**20)
        del block
        first = meter.split()
        clock.now += 2
        second = meter.split()
    assert first is not None
    assert second is not None
    assert meter.split() is None
    assert first - second > 200 * 2**20
    assert meter.stages["train"].rss_peak == first
    assert meter.stages["train"].seconds == 3.0


def test_a_failure_in_an_inner_stage_is_recorded_under_its_name() -> None:
    meter = Meter(CPU)

    def fail() -> None:
        with meter.stage("validate"):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), meter.stage("setup"), meter.stage("train"):
        fail()
    assert meter.current == "validate"


@pytest.mark.parametrize(
    ("allowed", "torch_threads", "workers", "each"),
    [(8, 8, 1, None), (8, 8, 2, 4), (4, 4, 2, 2), (2, 2, 5, 1), (8, 1, 2, 1), (64, 32, 2, 32)],
)
def test_workers_part_the_cores_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch, allowed: int, torch_threads: int, workers: int, each: int | None
) -> None:
    monkeypatch.setattr(measure, "cores", lambda: allowed)  # of a host that may have more
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)  # OMP_NUM_THREADS, or the affinity mask
    assert measure.threads_each(workers) == each
