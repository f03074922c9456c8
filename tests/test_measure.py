"""The clock and the meter."""

from __future__ import annotations

import pytest
import torch

from peftsweep.measure import Laps, Meter, percentile

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
