"""A plan: no figure of it depends on what was planned before, or in which process, and it is told as it is made."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.config.fill import conf_dir
from peftsweep.forecast import duration, forecast, work
from peftsweep.observe import streams

METHODS = sorted(file.stem for file in Path(conf_dir(), "method").glob("*.yaml"))
SAMPLE = ["lora", "frod"]  # one whose memory cannot be traced, and one that it may disturb


def planned(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    """All that a plan says of each trial, planned one after another in this process."""
    torch.set_num_threads(1)  # those of the process that was forked are not here
    return [(forecast.check(one), forecast.prediction(one)) for one in trials]


def apart(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    """``planned`` in a process that has planned nothing before."""
    with multiprocessing.get_context("fork").Pool(1) as process:
        return process.apply(planned, (trials,))


@pytest.mark.slow  # plans in three processes
@pytest.mark.parametrize(
    ("methods", "quant"),
    [(SAMPLE, "none"), *(pytest.param(METHODS, q, marks=pytest.mark.slow) for q in ("none", "4bit", "8bit"))],
)
def test_a_plan_is_the_same_whatever_was_planned_before(
    methods: list[str], quant: str, compose: Callable[..., Trial]
) -> None:
    for cache in (forecast._FORECASTS, forecast._SIZES, forecast._PREDICTIONS, forecast._ROOMS):
        cache.clear()  # of other tests
    trials = [compose(f"method={method}", f"quant={quant}", "eval=[perplexity]") for method in methods]
    before, after = apart(trials), apart(trials[::-1])[::-1]  # each pair of methods in both orders
    assert before == after
    for method, one, first in list(zip(methods, trials, before, strict=True))[1:-1]:  # the ends began an order: alone
        assert apart([one]) == [first], method


@pytest.fixture
def sizes(compose: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Three trials of two sizes, one of which is refused, that nothing is known of, on a host with two cores."""
    for name in ("_FORECASTS", "_SIZES", "_PREDICTIONS", "_SHAPES", "_ROOMS"):
        monkeypatch.setattr(forecast, name, {})
    known = tuple(getattr(forecast, name) for name in ("_FORECASTS", "_PREDICTIONS", "_SHAPES", "_ROOMS"))
    monkeypatch.setattr(forecast, "CACHES", known)
    monkeypatch.setattr(forecast, "MANY", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    small = ["method.r=2", "targets=q"]
    words = [small, ["method=full", "quant=4bit"], [*small, "seed=1", "train.learning_rate=1e-5"]]
    return [compose("eval=[perplexity]", *one) for one in words]


@pytest.mark.slow  # traces the steps of two sizes twice; the one below has several processes
def test_a_plan_that_several_processes_make_is_the_one_that_one_makes(sizes: list[Trial]) -> None:
    for cache in work.CACHES:
        cache.clear()

    def operations(one: Trial) -> object:
        return duration.operations(one, "cpu")

    def calls() -> list[Any]:  # of each size that is traced, those of a step and of the evaluations
        found = [(one.step.ledger, one.evaluations) for one in work._TRACED.values() if one and one.step]
        return [
            (step.calls, [(read.calls, write) for read, write in evaluations.values()]) for step, evaluations in found
        ]

    seen = []
    for one in forecast.ahead(sizes, forecast.prediction, operations, caches=work.CACHES):
        assert forecast._forecast_key(one) in forecast._FORECASTS
        seen.append(one)
    made, traced = (dict(forecast._FORECASTS), dict(forecast._PREDICTIONS)), calls()
    assert (seen, len(made[0]), len(made[1])) == (sizes, 2, 2)  # seed and learning rate change neither
    assert len(traced) == 1  # full fine-tuning of 4 bits is refused
    assert traced[0][0]
    for cache in (*forecast.CACHES, *work.CACHES):
        cache.clear()
    planned(sizes)
    operations(sizes[0])
    assert (made, traced) == ((forecast._FORECASTS, forecast._PREDICTIONS), calls())


def test_a_process_that_dies_is_not_waited_for(sizes: list[Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_fill_caches", lambda *_: os._exit(1))
    assert list(forecast.ahead(sizes)) == sizes
    assert not forecast._FORECASTS


def test_progress_is_told_every_other_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for quiet in (True, False):
        for count in (1500, streams.FEW_LINES):
            for _ in streams.progress(range(count), "checked {} points", count, quiet=quiet):
                now[0] += 6.3 / count  # seconds a point
    assert capsys.readouterr().out.splitlines() == [
        f"checked {count} of 1,500 points" for count in ("239", "716", "1,193")
    ]


@pytest.mark.slow
def test_the_memory_that_decides_is_that_of_the_trials_own_order_of_rows(
    compose: Callable[..., Trial], scratch: Path
) -> None:
    rows = [{"question": "1", "answer": "2"} for _ in range(30)] + [{"question": "7" * 200, "answer": "2"}]
    (scratch / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["dataset=file", "dataset.path=rows.jsonl", "dataset.prompt='{question} '", "dataset.answer='{answer}'"]
    words += ["dataset.test_path=rows.jsonl", "dataset.leave_out_tested=false", "train.batch_size=4", "train.steps=1"]
    shared = forecast.prediction(compose(*words), own_order=True)
    needed = set()
    for seed in range(6):
        one = compose(*words, f"seed={seed}")
        assert one.rows is not None
        tokens = build.training_tokens(one, build.load_tokenizer(one), one.rows.train)
        own = forecast.prediction(one, own_order=True)
        assert own == forecast.prediction(one, tokens)
        assert own is not None
        needed.add(own.peak_bytes)
        assert forecast.prediction(one) == shared  # the plan's
    assert len(needed) == 2  # with the long row in the only batch, and without
