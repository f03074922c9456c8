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


def test_percentiles() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([], 50) is None
