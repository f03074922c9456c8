"""Seconds of trials and sweeps: corrected by records, placed on workers, priced, told."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peftsweep.analysis import forecast_report
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.errors import InputError
from peftsweep.forecast import duration, history, speed, timing, work
from peftsweep.forecast.allocator import Allocator
from peftsweep.forecast.duration import Estimate, Span
from peftsweep.forecast.history import History, Steps
from peftsweep.forecast.operations import Ledger
from peftsweep.observe import measure, streams
from peftsweep.observe.remaining import format_seconds, remaining, remaining_of_sweep
from peftsweep.schema import PriceConfig
from peftsweep.study.record import Result
from peftsweep.sweep import processes, sweep
from peftsweep.sweep.workers import Budget, Options
from peftsweep.training import graphs
from peftsweep.trial.foreseen import predicted_by_kind

Compose = Callable[..., Trial]


def result(device: str = "mine", shape: str = "a", seconds: float = 10.0, predicted: float | None = 8.0) -> Result:
    info: dict[str, Any] = {"train_seconds": seconds, "steps": 100, "eval_seconds": 2.0, "baseline_seconds": 1.0}
    if predicted is not None:
        info["predicted"] = {"train_seconds": predicted, "train_seconds_low": 0.9 * predicted}
        info["predicted"] |= {"train_seconds_high": 1.3 * predicted, "uncorrected_train_seconds": predicted}
    about = {"status": "success", "trial": "t", "identity": "i"}
    return Result(about, {}, {}, train_info=info, meta_info={"time": {"device": device, "shape": shape}})


# ---- records -----------------------------------------------------------------------------------------


def test_the_correction_is_the_median_of_measured_over_predicted() -> None:
    known = history.of([result(seconds=8.0 * ratio) for ratio in (1.1, 1.2, 1.9)], "mine").correction("train")
    assert known is not None
    assert known.factor == pytest.approx(1.2)
    assert known.records == 3


def test_records_of_another_device_or_without_a_prediction_correct_nothing() -> None:
    plain = Result(
        {"status": "success", "trial": "t"}, {}, {}, train_info={"train_seconds": 3.0}
    )  # of earlier versions
    found = history.of([result("other"), plain, result(predicted=None)], "mine")
    assert found.correction("train") is None
    assert found.steps == {"a": [Steps.alike(0.1, 100)]}


def test_records_of_trials_beside_others_correct_trials_beside_as_many_others() -> None:
    """Those that ran alone correct them only where there are no others, and their steps say nothing."""

    def beside(at_once: int, seconds: float) -> Result:
        one = result(seconds=seconds)
        one.meta_info["system"] = {"trials_at_once": at_once}
        return one

    def factor(found: History) -> float:
        return getattr(found.correction("train"), "factor", math.nan)

    records = [result(seconds=8.0), beside(1, 8.8), beside(4, 24.0), beside(4, 25.6)]  # the first does not say it
    alone, crowded = history.of(records, "mine"), history.of(records, "mine", 4)
    assert (factor(alone), factor(crowded)) == pytest.approx((1.05, 3.1), abs=0.01)
    assert (alone.at_once, crowded.at_once) == (1, 4)
    assert crowded.steps == {"a": [Steps.alike(0.24, 100), Steps.alike(0.256, 100)]}
    other = history.of(records, "mine", 2)
    assert factor(other) == factor(alone)
    assert (other.at_once, other.steps) == (1, {})


@pytest.mark.parametrize(
    "damage",
    [{"predicted": "soon"}, {"predicted": {"uncorrected_train_seconds": "x"}}, {"predicted": None}],
)
def test_a_record_with_other_facts_under_these_names_is_passed_over(damage: dict[str, Any]) -> None:
    one = result()
    one.train_info |= damage
    assert history.of([one], "mine").correction("train") is None


def test_a_step_of_the_same_shape_is_the_median_of_its_records() -> None:
    records = [result(seconds=10.0), result(seconds=11.0), result(shape="b", seconds=99.0)]
    found = history.of(records, "mine").training("a", 200)
    assert found is not None
    assert found.factor == pytest.approx(200 * math.sqrt(0.10 * 0.11))
    assert History().training("a", 200) is None


@pytest.mark.parametrize(("count", "seconds"), [(100, 10.0), (1000, 10.0 + 900 * 0.02), (50, 5.0)])
def test_steps_beyond_those_of_a_captured_run_take_the_time_of_a_replay(count: int, seconds: float) -> None:
    """Of its 100 steps in 10 s most took 0.02 s: the first ones of each length were not captured yet."""
    one = result(seconds=10.0)
    one.train_info |= {"step_seconds_p50": 0.02, "capture_graphs": 3}
    found = history.of([one], "mine").training("a", count)
    assert found is not None
    assert found.factor == pytest.approx(seconds)


@pytest.mark.parametrize("facts", [{"capture_graphs": 3}, {"step_seconds_p50": 0.02}, {"capture_off": "it drops"}])
def test_steps_of_a_run_without_graphs_are_alike(facts: dict[str, Any]) -> None:
    one = result(seconds=10.0)
    one.train_info |= facts
    found = history.of([one], "mine").training("a", 1000)
    assert found is not None
    assert found.factor == pytest.approx(100.0)


def test_the_report_counts_errors_and_the_intervals_that_held() -> None:
    found = forecast_report.error([result(seconds=8.0), result(seconds=10.0), result(seconds=16.0)], "train")
    assert found is not None
    assert found.errors == pytest.approx((0.0, -0.2, -0.5))
    assert found.median == pytest.approx(0.2)
    assert found.worst == pytest.approx(-0.5)
    assert found.held == 2
    assert found.coverage == pytest.approx(2 / 3)
    line = forecast_report.line([result(seconds=8.0), result(seconds=10.0), result(seconds=16.0)])
    assert line is not None
    assert "off by 20% in the median, at most 50% shorter; 2 of 3 trials within the predicted 90% interval" in line
    assert forecast_report.line([result(predicted=None)]) is None


def test_a_trial_that_was_resumed_says_nothing_of_a_prediction() -> None:
    """Its seconds are those of several attempts: of loading the base, too, which each attempt does."""
    one = result()
    one.train_info["predicted"] |= {"evaluate_seconds": 3.0, "evaluate_seconds_low": 2.0, "evaluate_seconds_high": 4.0}
    assert forecast_report.error([one], "evaluate") is not None
    one.run_info["resumed"] = 20
    assert forecast_report.error([one], "evaluate") is None
    assert forecast_report.error([one], "train") is None


def test_the_forecast_report_counts_a_run_once_in_all_studies(capsys: pytest.CaptureFixture[str]) -> None:
    """However often a study is named, and where it was copied."""
    for study, seconds in (("a", 10.0), ("b", 16.0), ("copy", 10.0)):
        one = result(seconds=seconds)
        name = "b" if study == "b" else "a"
        one.run_info |= {"trial": name, "identity": name, "labels": [name], "study": study, "created_at": "2026-01-01"}
        one.write(Path("multirun", study, name))
    assert forecast_report.main(["a", "multirun/a", str(Path("multirun/b").resolve()), "copy"]) == 0
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if " train " in line]
    rows = [[cell.strip() for cell in cells] for cells in lines]
    assert [(row[0].rpartition("/")[2], *row[2:5]) for row in rows] == [
        ("a", "1", "20.0%", "-20.0%"),
        ("b", "1", "50.0%", "-50.0%"),
        ("copy", "1", "20.0%", "-20.0%"),
        ("all", "2", "35.0%", "-50.0%"),
    ]


@pytest.mark.parametrize("study", ["no_such", "../elsewhere"])
def test_forecast_records_of_no_study_is_one_line(study: str) -> None:
    with pytest.raises(InputError, match=r"forecast\.records=.*: no such study"):
        history.named(study)


def test_only_studies_are_proposed_for_forecast_records() -> None:
    for name in (".hashes", "planned", "mine"):
        Path("multirun", name).mkdir(parents=True)
    Path("multirun/mine/t0").mkdir()
    Path("multirun/mine/t0/result.json").write_text("{}")
    with pytest.raises(InputError, match=r"no such study; there are: mine$"):
        history.named("other")


def test_forecast_records_of_an_empty_study_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "multirun" / "empty").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no records"):
        history.named("empty")


# ---- a sweep -----------------------------------------------------------------------------------------


@pytest.mark.slow  # several traces, of seconds each
def test_a_sweep_with_halving_is_shorter_by_what_is_not_trained(
    compose: Compose, device: speed.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "device_of", lambda *_: device)
    monkeypatch.setattr(timing, "IMPORTED", 0.0)

    def planned(*words: str) -> tuple[float, str, float]:
        trials = [compose(*SMALL, "train.steps=90", f"train.learning_rate_scale={n}", *words) for n in range(1, 10)]
        times = timing.Timing(trials)
        end, _ = times.sweep([[one] for one in trials])
        assert end is not None
        train = sum(times.estimate(one).uncorrected["train"] for one in trials)
        return end.seconds, times.lines([[one] for one in trials])[0], train

    whole, line, all_trained = planned()
    assert "halving" not in line
    shorter, line, trained = planned("halving.min_steps=10")  # which sets validation rows aside
    assert "for 9 jobs, 8 of which halving stops before their end, " in line
    part = (9 * 1 / 9 + 3 * 2 / 9 + 1 * 6 / 9) / 9  # of the training of all nine
    assert part * trained < shorter < part * trained + (whole - all_trained)


@pytest.mark.parametrize(("workers", "points"), [(1, 1), (4, 1), (4, 2), (2, 4)])
def test_the_costs_of_trials_are_together_the_cost_of_the_sweep(
    workers: int, points: int, compose: Compose, device: speed.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "device_of", lambda *_: device)
    monkeypatch.setattr(timing, "IMPORTED", 0.0)
    trials = [compose(*SMALL, "price.hour=3.6", f"seed={seed}") for seed in range(points)]
    times = timing.Timing(trials, workers)
    spans = dict.fromkeys(history.KINDS, duration.NOTHING) | {"train": Span(6.0, 5.0, 8.0)}
    monkeypatch.setattr(times, "estimate", lambda _: Estimate(spans))
    end, _ = times.sweep([[one] for one in trials])
    assert end is not None
    assert sum(times.row(one)["predicted_cost"] for one in trials) == pytest.approx(times.cost(end.seconds))


def test_workers_that_share_a_gpu_gain_nothing_but_the_time_of_the_host(
    compose: Compose, device: speed.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU runs the kernels of one process at a time. Records of trials beside as many others correct that."""
    on_gpu(device, monkeypatch)

    def shared(_where: torch.device, _threads: int, at_once: int) -> speed.Device:
        device.at_once = at_once
        return device

    monkeypatch.setattr(timing, "device_of", shared)
    monkeypatch.setattr(timing, "IMPORTED", 0.0)
    trials = [compose(*SMALL, "price.hour=3.6", f"seed={seed}") for seed in range(4)]

    def trained(workers: int, devices: int) -> tuple[float, str, float]:
        times = timing.Timing(trials, workers, devices)
        span = times.estimate(trials[0]).spans["train"]
        assert span is not None
        return span.seconds, times.lines([[one] for one in trials])[0], span.high / span.low

    one, line, width = trained(1, 1)
    assert line.endswith("1 worker on 1 device")
    crowded, line, wider = trained(4, 1)
    assert crowded == pytest.approx(4 * one)
    assert wider > 1.5 * width
    assert line.endswith("4 workers on 1 device, on which they are assumed to take turns")
    two, line, _ = trained(4, 2)
    assert two == pytest.approx(2 * one)
    each, line, _ = trained(4, 4)
    assert each == pytest.approx(one)
    assert line.endswith("4 workers on 4 devices")
    known = History(ratios={"train": [math.log(0.5)] * 3}, at_once=4)
    monkeypatch.setattr(timing, "records_of", lambda *_: known)
    measured, line, width = trained(4, 1)
    assert measured == pytest.approx(2 * one)
    assert line.endswith("4 workers on 1 device")


def on_gpu(device: speed.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a device with a known speed be a GPU."""
    _ = device.speed
    device.device = torch.device("cuda")
    monkeypatch.setattr(speed, "name_of", lambda _: "a GPU")


def test_the_host_of_a_shared_gpu_is_no_slower(device: speed.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, factor = Ledger(), torch.empty(64, 64, device="meta")
    with Allocator(1, 0, ledger):
        factor @ factor
    on_gpu(device, monkeypatch)
    kernels = device.step(ledger)[0]
    device._speed = replace(device.speed, host_seconds=3 * kernels)
    steps = []
    for device.at_once in (1, 2, 6):
        steps.append(device.step(ledger)[0] / kernels)
    assert steps == pytest.approx([3.0, 3.0, 6.0])


def test_trials_on_a_cpu_share_its_cores(device: speed.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, factor = Ledger(), torch.empty(64, 64, device="meta")
    with Allocator(1, 0, ledger):
        factor @ factor
    monkeypatch.setattr(speed, "cores", lambda: 4)
    alone, steps = device.step(ledger)[0], []
    for device.at_once in (1, 2, 4, 8):
        with measure.threads(1):
            steps.append(device.step(ledger)[0] / alone)
    assert steps == pytest.approx([1.0, 1.0, 1.0, 2.0])
    device.busy = 3.0  # as measured, by these trials or by others
    assert device.step(ledger)[0] == pytest.approx(3 * alone)


@pytest.mark.parametrize(
    ("options", "places", "workers", "devices"),
    [
        (Options(), ["0", "1"], 2, 2),  # a worker for each GPU
        (Options(workers=4), ["0", "1", "0", "1"], 4, 2),
        (Options(workers=3), ["", "", ""], 3, 1),  # on a CPU
        (Options(workers=2), [None, None], 2, 1),  # device=cuda:1
        (Options(workers=0), None, 1, 1),
    ],
)
def test_a_plan_is_of_the_workers_that_run(
    options: Options,
    places: list[str | None] | None,
    workers: int,
    devices: int,
    compose: Compose,
    device: speed.Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "device_of", lambda *_: device)
    monkeypatch.setattr(processes, "places", lambda *_: places)
    planned = sweep._timing([compose(*SMALL)], options, None)
    assert (planned.workers, planned.devices) == (workers, devices)
    launched = sweep._timing([compose(*SMALL)], Options(workers=0), lambda _: [])
    assert launched._where == "one after the other; how many the launcher runs at the same time is not known"


def test_workers_take_jobs_as_they_become_free() -> None:
    jobs = [Span(seconds, seconds / 2, seconds * 2) for seconds in (5.0, 1.0, 1.0, 1.0, 4.0)]
    assert timing.finish(jobs, 1) == Span(12.0, 6.0, 24.0)
    assert timing.finish(jobs, 2) == Span(7.0, 3.5, 14.0)  # 5 | 1 + 1 + 1 + 4
    assert timing.finish(jobs, 9).seconds == 5.0
    assert timing.finish([], 2).seconds == 0.0


def test_an_interval_holds_90_of_100_of_a_normal_logarithm() -> None:
    span = Span.around(10.0, 0.1)
    assert (span.low, span.high) == pytest.approx((10 / math.exp(0.1645), 10 * math.exp(0.1645)))
    draws = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).mul(0.1).exp() * 10
    assert ((draws > span.low) & (draws < span.high)).float().mean().item() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("price", "device", "hourly"),
    [
        (None, "any", None),
        (2.49, "any", 2.49),
        (0, "any", 0.0),
        ({"H100": 3.0, "A100": 2.0}, "NVIDIA A100-SXM4-80GB", 2.0),
        ({"h100": 3.0}, "NVIDIA H100 80GB HBM3", 3.0),
        ({"A10": 0.5, "A100": 2.0}, "NVIDIA A100-SXM4-80GB", 2.0),
        ({"L4": 1.0, "L40S": 1.5}, "NVIDIA L40S", 1.5),
        ({"A100-SXM4": 3.0, "A100": 2.0}, "NVIDIA A100-SXM4-80GB", 3.0),
    ],
)
def test_a_price_is_a_number_or_of_a_table_by_the_name_of_the_device(price: Any, device: str, hourly: Any) -> None:
    assert timing.hourly(PriceConfig(price), device) == hourly


@pytest.mark.parametrize("price", ["abc", -1, math.nan, math.inf, True, {"H100": 3.0}, {"CPU": "dear"}, {}])
def test_a_price_that_is_none_is_one_line(price: Any) -> None:
    with pytest.raises(InputError, match="price"):
        timing.hourly(PriceConfig(price), "some CPU")


def test_a_table_of_prices_without_the_device_is_answered_by_a_number() -> None:
    with pytest.raises(InputError, match=r"its table has H100, .* the device, some CPU; price=2\.49 is a device-hour"):
        timing.hourly(PriceConfig({"H100": 3.0}), "some CPU")
    with pytest.raises(InputError, match="its table has H200"):
        timing.hourly(PriceConfig({"H200": 3.0}), "NVIDIA GH200 480GB")


def test_an_unknown_price_is_answered_by_a_number(command: Callable[..., tuple[int, str, str]]) -> None:
    assert "for your own: price=2.49" in command("price=abc", "dry_run=true")[2]


@pytest.mark.parametrize("word", ["price=abc", "price=-1", "price=nan", "price=[1]", "forecast.records=no_such"])
def test_wrong_words_about_time_are_one_line(word: str, command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, stderr = command(word, "train.steps=1")
    assert code == 2
    assert len(stderr.strip().splitlines()) == 1
    assert word.partition("=")[0] in stderr


def test_price_and_records_leave_a_trial_the_same(compose: Compose) -> None:
    plain, other = compose(), compose("price.hour=2.49", "forecast.records=other")
    assert (plain.identity, plain.training, plain.tree, plain.choices) == (
        *(other.identity, other.training, other.tree, other.choices),
    )


def test_a_deadline_goes_by_what_was_predicted_and_by_how_far_that_was_off(compose: Compose) -> None:
    one, two = compose("seed=1"), compose("seed=2")
    budget = Budget(Options(deadline=100.0))
    budget.expected = {one.identity: 90.0, two.identity: 60.0}
    assert budget.take(1, [one]) == 1
    ended = Result({"identity": one.identity, "total_seconds": 180.0, "status": "success"}, {}, {})
    budget.spend(ended)
    assert budget.estimate([two]) == pytest.approx(120.0)
    assert budget.take(1, [two]) == 0
    assert budget.estimate() == 180.0  # of what nobody has predicted


def test_a_deadline_counts_the_seconds_of_a_pack_once(compose: Compose) -> None:
    """Each of its records has those of the whole pack."""
    trials = [compose(f"seed={seed}") for seed in range(8)]
    budget = Budget(Options(deadline=100.0))
    budget.expected = {one.identity: 10.0 for one in trials}
    for one in trials[:4]:
        others = [other.name for other in trials[:4] if other is not one]
        about = {"identity": one.identity, "total_seconds": 20.0, "status": "success", "packed_with": others}
        budget.spend(Result(about, {}, {}))
    assert budget.estimate(trials[4:]) == pytest.approx(20.0)  # half of what was predicted of four alone
    budget.expected = {}
    assert budget.estimate(trials[4:]) == pytest.approx(20.0)
    assert budget.estimate(trials[4:5]) == pytest.approx(5.0)


# ---- a trial -----------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> speed.Device:
    """One on which nothing need be measured: each operation takes its roofline.

    No time for traces was used yet: on a slow host earlier tests may have used it all.
    """
    monkeypatch.setattr(work, "_SPENT", [0.0])
    found = speed.Speed({"float32": 1e10, "bfloat16": 2e10}, 1e9, 1e-6, lap_seconds=1e-3)
    monkeypatch.setattr(speed.Meter, "laps", lambda self, seconds: [1e-3] * 4)
    monkeypatch.setattr(speed, "measure", lambda meter: found)
    monkeypatch.setattr(speed.Meter, "operation", lambda self, one: found.roofline(one))
    monkeypatch.setattr(speed.Meter, "update", lambda self, trained, config: 1e-3)
    return speed.Device(torch.device("cpu"), folder=tmp_path)


SMALL = ("dataset.samples=32", "eval.tiny_math.samples=8", "eval.perplexity.samples=8")


@pytest.mark.slow  # several traces, of seconds each
def test_saving_reads_the_base_back_for_the_check_and_for_the_merge_but_does_not_begin_a_trial(
    compose: Compose, device: speed.Device
) -> None:
    """Measured on two cores, idle, with the embedded model: some 0.1 s to save the adapter and to read it back."""

    def saving(*words: str) -> float:
        span = duration.estimate(compose(*SMALL, *words), device, judged=False).spans["save"]
        assert span is not None
        return span.seconds

    alone, checked, merged = (saving(*words) for words in (["adapter.check=false"], [], ["adapter.merge=true"]))
    trial = compose(*SMALL)
    tensors, size = duration._weights(trial)
    read = tensors * duration.TENSOR_SECONDS + size / duration.LOAD_RATE
    assert checked - alone == pytest.approx(read)
    assert merged - checked == pytest.approx(2 * read + size / duration.SAVE_RATE)
    assert 0.05 < checked < 0.2
    assert duration._loading(trial) > duration.SETUP_SECONDS + read
    assert saving("adapter.save=false", "adapter.check=false") == 0.0


def test_decoding_steps_that_are_replayed_need_no_time_of_the_host(compose: Compose, device: speed.Device) -> None:
    device._speed = replace(device.speed, host_seconds=1e-5)
    *_, traced = duration.operations(compose(*SMALL), "cpu")
    assert traced is not None
    token = next(token for _, token in traced.evaluations.values() if token is not None)
    eager, replay = (device.step(token, captured=graph)[0] for graph in (False, True))
    assert replay < eager
    assert duration._decoding(device, token, math.inf, 100, False) == pytest.approx(100 * eager)
    first = duration.UNCAPTURED_STEPS
    seconds = duration._decoding(device, token, math.inf, 100, True)
    assert seconds == pytest.approx(first * eager + (100 - first) * replay)
    assert duration._decoding(device, token, math.inf, first - 1, True) == pytest.approx((first - 1) * eager)
    assert duration._decoding(device, None, math.inf, 100, True) == 0.0


@pytest.mark.slow  # several traces, of seconds each
def test_validations_are_in_the_seconds_of_evaluations_as_often_as_they_come(
    compose: Compose, device: speed.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "NEXT_SECONDS", math.inf)  # however busy the machine is, nothing is estimated
    monkeypatch.setattr(duration, "MOST_SECONDS", math.inf)

    def evaluating(*words: str) -> float:
        return duration.estimate(compose(*SMALL, *words), device).uncorrected["evaluate"]

    never = evaluating("train.steps=20")
    often, once = (evaluating("train.steps=19", f"train.eval_every={every}") - never for every in (5, 100))
    assert once > 0
    assert often == pytest.approx(4 * once)  # after 5, 10, 15 steps and the last
    assert history.measured({"eval_seconds": 3.0, "validate_seconds": 2.0})["evaluate"] == 5.0


@pytest.mark.parametrize("method", [pytest.param("prompt_tuning", marks=pytest.mark.slow), "prefix_tuning"])
def test_virtual_tokens_are_read_with_the_prompt_and_not_again_with_each_token(compose: Compose, method: str) -> None:
    def token(*words: str) -> float:
        trial = compose(*SMALL, *words)
        _, _, requested, _, traced = duration.operations(trial, "cpu")
        assert traced is not None
        ledger = traced.evaluations[requested["tiny_math"].key][1]
        assert ledger is not None
        return ledger.flops

    alone = token("method=ln_tuning")  # which adds no operations to the base
    assert alone < token(f"method={method}") < 1.2 * alone  # which attends to them, too


def test_seconds_are_those_of_the_steps_and_a_record_of_the_same_shape_decides(
    compose: Compose, device: speed.Device
) -> None:
    short, long = (duration.estimate(compose(*SMALL, f"train.steps={n}"), device) for n in (100, 300))
    assert short.total is not None
    assert short.shape == long.shape
    assert long.spans["train"].seconds == pytest.approx(3 * short.spans["train"].seconds)  # type: ignore[union-attr]
    assert long.flops == pytest.approx(3 * (short.flops or 0))
    assert (short.decided_by, short.unknown) == ("speed", {})
    same = duration.estimate(
        compose(*SMALL, "train.steps=300"), device, History(steps={str(short.shape): 2 * [Steps.alike(0.5)]})
    )
    assert same.decided_by == "the same shape"
    assert same.spans["train"].seconds == pytest.approx(150.0)  # type: ignore[union-attr]
    twice = duration.estimate(compose(*SMALL, "train.steps=300"), device, History(ratios={"train": [math.log(2)] * 3}))
    assert twice.decided_by == "records"
    assert twice.spans["train"].seconds == pytest.approx(2 * long.spans["train"].seconds)  # type: ignore[union-attr]
    assert twice.uncorrected["train"] == pytest.approx(long.spans["train"].seconds)  # type: ignore[union-attr]


CLASSIFIER = ("model=distilbert", "model.init=random", "dataset=tiny_direction", "train.epochs=null", "eval=[]")
TEXTS = ("eval=[tiny_math]", "eval.tiny_math.max_new_tokens=200")


@pytest.mark.parametrize(
    ("words", "kind", "replayed"),
    [
        (("eval=[]",), "train", True),
        pytest.param(CLASSIFIER, "train", False, marks=pytest.mark.slow),  # two traces, of seconds each
        pytest.param(("eval=[]", "method=adalora"), "train", False, marks=pytest.mark.slow),
        pytest.param(TEXTS, "evaluate", True, marks=pytest.mark.slow),
        ((*TEXTS, "method=prompt_tuning"), "evaluate", False),
    ],
)
def test_replays_are_foreseen_only_where_a_gpu_captures_steps(
    words: tuple[str, ...],
    kind: str,
    replayed: bool,
    compose: Compose,
    device: speed.Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replay needs no time of the host."""
    monkeypatch.setattr(graphs, "DEVICES", ("cuda", "cpu"))
    device._speed = replace(device.speed, host_seconds=1e-4)
    ways = ("off", "auto")
    plain, auto = (
        duration.estimate(compose("train.steps=500", *words, f"train.capture={way}"), device).uncorrected[kind]
        for way in ways
    )
    assert (auto < 0.9 * plain) == replayed
    assert replayed or auto == pytest.approx(plain)


@pytest.mark.slow  # several traces, of seconds each
def test_the_first_trial_of_a_model_takes_nothing_of_the_time_for_the_others(
    compose: Compose, device: speed.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "_SPENT", spent := [0.0])
    monkeypatch.setattr(duration, "_MODELS", set())
    duration.estimate(compose(*SMALL), device)
    assert spent == [0.0]
    duration.estimate(compose(*SMALL, "method.r=3"), device)
    assert spent[0] > 0


@pytest.mark.slow  # several traces, of seconds each
def test_the_flops_of_a_trial_are_its_own_however_many_were_traced_before(
    compose: Compose, device: speed.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After many traces a plan takes the seconds of similar trials, but a record and the plan's FLOPs do not."""

    def flops(words: list[str], **options: Any) -> int | None:
        for cache in (work._TRACED, work._SIMILAR, work._EVALUATIONS):
            cache.clear()
        duration.estimate(compose(*SMALL, "targets=q"), device, timed=False)
        return duration.estimate(compose(*SMALL, *words), device, timed=False, **options).flops

    words = ["targets=all_linear", "method.r=32"]
    own = flops(words)
    assert own is not None
    monkeypatch.setattr(work, "_SPENT", [work.MOST_SECONDS + 1])
    assert flops(words) is None
    assert flops(words, probe=False) == own
    assert flops(["targets=q"]) not in (None, own)


def test_trials_of_other_seeds_have_one_shape_and_the_flops_of_their_own_padding(compose: Compose) -> None:
    """Then they share what one traces, and the records of one foretell the other."""
    trials = [compose("dataset.samples=32", "train.steps=10", f"seed={seed}") for seed in (0, 1)]
    assert trials[1].rows is not None
    tokens = build.training_tokens(trials[1], build.load_tokenizer(trials[1]), trials[1].rows.train)
    runs, traced = [], []
    for one in trials:
        run, _, _, _, operations = duration.operations(one, "cpu", tokens, judged=False)
        runs.append(run)
        traced.append(operations)
    assert runs[0].shape == runs[1].shape  # type: ignore[union-attr]
    assert traced[0] is traced[1]
    assert runs[1].tokens == pytest.approx(work._batches(tokens, trials[1].config.train, 1).tokens)  # type: ignore[union-attr]


@pytest.mark.slow  # several traces, of seconds each
def test_a_base_that_an_earlier_trial_scores_is_in_no_seconds_of_a_later_one(
    compose: Compose, device: speed.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the corrected seconds and of those that records will be compared with: one share is left of both."""
    monkeypatch.setattr(timing, "device_of", lambda *_: device)
    monkeypatch.setattr(timing, "records_of", lambda *_: History(ratios={"evaluate": [math.log(2)] * 3}))
    trials = [compose(*SMALL, f"method.r={rank}") for rank in (4, 8)]
    times = timing.Timing(trials)
    first, second = times.estimate(trials[0]), times.estimate(trials[1])
    for found in (first, second):
        span = found.spans["evaluate"]
        assert span is not None
        assert span.seconds == pytest.approx(2 * found.uncorrected["evaluate"])
    assert second.uncorrected["evaluate"] < 0.9 * first.uncorrected["evaluate"]


def test_a_plan_shows_no_warnings_of_libraries(
    compose: Compose, device: speed.Device, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def warned(*_: Any, **__: Any) -> Estimate:
        warnings.warn("is deprecated and will be removed", FutureWarning, stacklevel=1)
        with streams.without_warnings():
            pass
        assert not logging.getLogger("transformers").isEnabledFor(logging.WARNING)  # the inner one ended, this has not
        return Estimate()

    monkeypatch.setattr(timing, "device_of", lambda *_: device)
    monkeypatch.setattr(duration, "estimate", warned)
    one = compose(*SMALL)
    recwarn.clear()
    timing.Timing([one]).estimate(one)
    assert not recwarn.list
    assert logging.getLogger("transformers").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("train.compile=inductor",), "train.compile=inductor"),
        (("method=dora", "quant=8bit"), "refused"),
    ],
)
def test_where_nothing_can_be_said_the_estimate_says_why_and_no_number(
    words: tuple[str, ...], why: str, compose: Compose, device: speed.Device
) -> None:
    found = duration.estimate(compose(*SMALL, *words), device)
    assert found.total is None
    assert why in (found.why or "")


def test_nothing_is_trained_without_steps(compose: Compose, device: speed.Device) -> None:
    found = duration.estimate(compose(*SMALL, "train=none"), device)
    assert found.spans["train"] == duration.NOTHING
    assert found.total is not None


def test_a_record_has_what_was_predicted_by_kind_with_its_interval() -> None:
    spans = dict.fromkeys(history.KINDS, Span(2.0, 1.0, 4.0))
    facts = Estimate(spans, {"train": 1.5}).facts()
    assert facts["train_seconds"] == 2.0
    assert (facts["total_seconds"], facts["total_seconds_low"], facts["total_seconds_high"]) == (8.0, 4.0, 16.0)
    assert facts["uncorrected_train_seconds"] == 1.5


# ---- what is left ------------------------------------------------------------------------------------

EXPECTED = {"load": 4.0, "train": 100.0, "evaluate": 20.0, "save": 1.0}


@pytest.mark.parametrize(
    ("stage", "in_stage", "step", "taken", "left"),
    [
        ("setup", 0.0, 0, None, 125.0),
        ("load", 3.0, 0, None, 122.0),
        ("load", 9.0, 0, None, 121.0),  # longer than expected: what comes is still to come
        ("train", 0.0, 0, None, 121.0),
        ("train", 40.0, 20, 40.0, (0.8 * 2 + 0.2 * 1) * 80 + 21),  # its own steps take twice as long
        ("eval", 5.0, 0, None, 16.0),
        ("save", 0.5, 0, None, 0.5),
    ],
)
def test_time_left_is_what_was_expected_corrected_by_the_steps(
    stage: str, in_stage: float, step: int, taken: float | None, left: float
) -> None:
    assert remaining(EXPECTED, stage, in_stage, step, 100, taken) == pytest.approx(left)


def test_without_a_prediction_the_steps_alone_say_what_is_left() -> None:
    assert remaining(None, "load") is None
    assert remaining(None, "train", 10.0, 10, 100, 10.0) == pytest.approx(90.0)
    assert remaining({"train": None}, "eval") is None


def test_a_sweep_ends_when_its_workers_have_taken_all_that_waits() -> None:
    assert remaining_of_sweep([10.0, 4.0], [5.0, 5.0], 2) == pytest.approx(14.0)  # 4 + 5 + 5 | 10
    assert remaining_of_sweep([10.0], [None], 1) == pytest.approx(20.0)  # as long as the others
    assert remaining_of_sweep([None], [None], 2) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (14.2, "14 s"), (192.0, "3.2 min"), (5400.0, "1.5 h"), (200_000.0, "2.3 days")],
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_what_is_told_of_the_time_left_is_what_was_predicted_by_kind() -> None:
    span = Span(10.0, 8.0, 12.0)
    facts = Estimate({"load": span, "train": span.times(2), "evaluate": None}).facts()
    assert predicted_by_kind(Result({}, {}, {}, train_info={"predicted": facts})) == {"load": 10.0, "train": 20.0}
    assert predicted_by_kind(Result({}, {}, {})) == {}
