"""Planning a trial leaves nothing behind: no figure of a plan depends on what was planned before it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from peftsweep.config.compose import Trial
from peftsweep.config.fill import conf_dir
from peftsweep.forecast import forecast

METHODS = sorted(file.stem for file in Path(conf_dir(), "method").glob("*.yaml"))
SAMPLE = ["loftq", "lora", "frod"]  # one that is refused, one whose memory cannot be traced, and what they may disturb


def planned(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    """All that a plan says of each trial, planned one after another in this process."""
    torch.set_num_threads(1)  # those of the process that was forked are not here
    return [(forecast.check(one), forecast.prediction(one)) for one in trials]


def apart(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    """``planned`` in a process that has planned nothing before."""
    with multiprocessing.get_context("fork").Pool(1) as process:
        return process.apply(planned, (trials,))


@pytest.mark.parametrize(
    ("methods", "quant"),
    [(SAMPLE, "none"), *(pytest.param(METHODS, q, marks=pytest.mark.slow) for q in ("none", "4bit", "8bit"))],
)
def test_a_plan_is_the_same_whatever_was_planned_before(
    methods: list[str], quant: str, compose: Callable[..., Trial]
) -> None:
    for cache in (forecast._FORECASTS, forecast._PREDICTIONS, forecast._ROOMS):
        cache.clear()  # of other tests
    trials = [compose(f"method={method}", f"quant={quant}") for method in methods]
    before, after = apart(trials), apart(trials[::-1])[::-1]  # each pair of methods in both orders
    for method, one, first, last in zip(methods, trials, before, after, strict=True):
        assert apart([one]) == [first] == [last], method
