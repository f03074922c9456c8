"""What a trial measures, and what is asked of it beside its scores."""

from __future__ import annotations

import errno
import functools
import gc
import json
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from peftsweep import InputError, cli
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.errors import Unwritable
from peftsweep.evaluation import evaluate
from peftsweep.forecast import forecast
from peftsweep.models import losses
from peftsweep.observe.display import Observer
from peftsweep.observe.measure import Meter
from peftsweep.study import sweep_record
from peftsweep.study.record import Result, Status
from peftsweep.sweep import pack
from peftsweep.training import loop
from peftsweep.trial import done, outcome, stages
from peftsweep.trial.done import Oversized
from peftsweep.trial.session import Session

RunSmall = Callable[..., Result]
Compose = Callable[..., Trial]
BLOCK = 256 * 2**20
TIMED = ["inference=standard", "inference.runs=1", "inference.warmup=0", "inference.batch_sizes=[1]"]
TIMED += ["inference.categories={short:{new_tokens:2},medium:null,long:null}", "inference.samples=1"]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def place(result: Result) -> Path:
    assert result.folder is not None
    return result.folder


@pytest.fixture
def hungry(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that takes a quarter of a gigabyte."""
    plain = evaluate.perplexity

    @functools.wraps(plain)
    def perplexity(*arguments: Any, **options: Any) -> Any:
        block = torch.ones(BLOCK // 4)
        del block
        return plain(*arguments, **options)

    monkeypatch.setattr(evaluate, "perplexity", perplexity)


@pytest.mark.usefixtures("hungry")
def test_evaluation_moves_no_peak_but_its_own(run_unwritten: RunSmall) -> None:
    result = run_unwritten("train.eval_every=2", "dataset.validation_samples=6")
    peak = {name: stage["rss_peak"] for name, stage in result.memory.items() if "rss_peak" in stage}
    for hungry in ("eval", "validate", "baseline"):
        assert peak[hungry] - peak["train"] > BLOCK / 2, hungry


def test_the_seconds_of_all_stages_are_those_of_the_trial(run_unwritten: RunSmall) -> None:
    info = run_unwritten("train.eval_every=2", "dataset.validation_samples=6", "adapter.check=true").train_info
    stages = ("setup", "load", "data", "baseline", "attach", "train_stage", "validate", "eval", "save", "reload")
    total = sum(info[f"{name}_seconds"] for name in stages)
    (record,) = Path("multirun/default").glob("*/result.json")
    assert total == pytest.approx(Result.read(record.parent).run_info["total_seconds"], rel=0.02)
    assert info["train_seconds"] <= info["train_stage_seconds"]


def test_every_evaluation_says_what_it_took(trained: RunSmall) -> None:
    result = trained()
    each = [found["seconds"] for found in result.eval_info.values()]
    assert len(each) == 2
    assert sum(each) == pytest.approx(result.train_info["eval_seconds"])
    assert all(found["rss_peak"] > 0 for found in result.eval_info.values())


def test_generation_is_timed_for_base_adapted_and_merged(run_unwritten: RunSmall) -> None:
    result = run_unwritten(*TIMED)
    for variant in ("base", "adapted", "merged"):
        assert result.generation_info["short"][variant]["generated_tokens"] == 2
    assert result.generation_info["adapter"]["load_seconds_p50"] > 0
    assert {row["variant"] for row in lines(place(result) / "generation.jsonl")} == {"base", "adapted", "merged"}
    assert result.train_info["inference_seconds"] > 0


@pytest.mark.slow  # a model without an adapter is timed by tests/evaluation
def test_full_fine_tuning_is_timed_as_a_base(run_small: RunSmall) -> None:
    assert set(run_small(*TIMED, "method=full").generation_info["overall"]) == {"base", "categories"}


def test_how_generation_is_timed_belongs_to_the_identity_and_its_prompts_by_content(compose: Compose) -> None:
    Path("a.json").write_text('{"short": ["one"]}')
    Path("b.json").write_text('{"short": ["two"]}')
    words = [(), TIMED, [*TIMED, "inference.runs=2"]]
    words += [[*TIMED, f"inference.prompts_file={file}.json"] for file in "ab"]
    trials = [compose(*point) for point in words]
    assert len({one.identity for one in trials}) == 5
    assert len({one.training for one in trials}) == 1


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_full_disk_becomes_a_fact_of_a_record(
    compose: Compose, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails to merge, to load or to be profiled is a fact that stays; what the disk refuses is tried again."""
    trial, probe = compose(), Mock()
    monkeypatch.setattr(build, "load_base", full_disk)
    for stage in (stages.reload_adapter, stages.merge_adapter):
        with pytest.raises(Unwritable, match="No space left on device; finished trials are kept"):
            stage(trial, scratch, Mock(), probe, torch.zeros(1))
    session = Session(trial, Result({}, {}, {}), Meter(torch.device("cpu")), Observer())
    with pytest.raises(Unwritable, match="No space left"):
        session.profile(full_disk)
    assert "profile" not in session.info
    slot = object.__new__(pack._Slot)
    with pytest.raises(Unwritable, match="No space left"), slot.own():
        full_disk()


def test_a_line_of_the_log_that_the_disk_does_not_take_is_left_out(
    scratch: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with outcome.logged(scratch / "trial.log"):
        with monkeypatch.context() as patch:
            patch.setattr(logging.StreamHandler, "flush", full_disk)
            logging.getLogger().warning("lost")
        logging.getLogger().warning("kept")
    assert "kept" in (scratch / "trial.log").read_text()
    assert capfd.readouterr() == ("", "")


def test_a_done_trial_is_profiled_and_not_trained_again(trained: RunSmall, run_small: RunSmall) -> None:
    words = ["profiler=torch", "profiler.active=1", "profiler.warmup=1", "profiler.wait=0", "profiler.flops=false"]
    first = trained()
    stamp = (place(first) / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    second = run_small(*words)
    assert second.trial == first.trial
    assert second.train_info["profile"]["torch"]["profiled_steps"] == 1
    assert second.train_info["train_seconds"] == first.train_info["train_seconds"]
    assert second.eval_info == first.eval_info
    assert list((place(first) / "profile").glob("*.pt.trace.json*"))
    assert (place(first) / "adapter/adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert done.finished(trial_of(*words)) is not None  # and not again


def trial_of(*words: str) -> Trial:
    from peftsweep.config.compose import trial as make_trial
    from tests.conftest import SMALL

    cfg = cli.compose([*SMALL, *words])
    return make_trial(cfg, cfg.hydra.runtime.choices, words)


@pytest.mark.slow  # two trials; the profile of a done one, above, leaves its adapter and scores as they are
def test_a_profile_changes_nothing_of_the_trial(run_unwritten: RunSmall) -> None:
    plain = run_unwritten("adapter.save=false")
    profiled = run_unwritten("adapter.save=false", "profiler=memory", "profiler.steps=1", "force=true")
    assert profiled.train_info["final_loss"] == plain.train_info["final_loss"]
    assert profiled.train_info["profile"]["memory"]["profiled_steps"] == 1
    for name, found in plain.eval_info.items():
        timeless = {key: value for key, value in found.items() if isinstance(value, dict)}
        assert timeless.items() <= profiled.eval_info[name].items()


@pytest.mark.slow  # compiles twice
def test_a_profiled_trial_is_compiled_once(run_small: RunSmall, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Mock(wraps=torch.compile)
    monkeypatch.setattr(torch, "compile", counted)
    words = ["profiler=torch", "profiler.active=2", "profiler.sizes=[32]", "train.compile=eager"]
    found = run_small(*words).train_info["profile"]["torch"]
    assert counted.call_count == 1
    assert found["flops_per_step"] > 0
    assert 0 < found["step_tokens"] == pytest.approx(found["trial_step_tokens"], rel=0.3)


def test_a_profiler_that_fails_costs_no_trial(run_unwritten: RunSmall, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Trial) -> Any:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(build, "profiler", broken)
    result = run_unwritten("profiler=torch")
    assert result.status is Status.success
    assert result.train_info["profile"]["torch"] == {"error": "RuntimeError: no profiler"}


def test_a_tracker_is_told_the_losses_and_the_scores(run_unwritten: RunSmall) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run_unwritten("tracker=tensorboard")
    events = EventAccumulator(str(place(result).parent / "tracker/tensorboard" / result.trial))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    logged = [(row["step"], row["loss"]) for row in lines(place(result) / "steps.jsonl") if "loss" in row]
    assert told == [(step, pytest.approx(loss)) for step, loss in logged]
    assert events.Scalars("eval.perplexity.perplexity.value")
    assert trial_of("tracker=tensorboard").identity == trial_of().identity


def test_what_is_predicted_not_to_fit_is_refused_until_the_limit_is_raised(run_unwritten: RunSmall) -> None:
    refused = run_unwritten("memory_limit=1MB", "skip_oversized=true")
    assert refused.status is Status.refused
    assert "predicted to need" in (refused.error or {})["message"]
    assert "there are 1.0 MB" in (refused.error or {})["message"]
    assert run_unwritten("memory_limit=1MB", "skip_oversized=true").run_info == refused.run_info
    assert run_unwritten("memory_limit=8GB", "skip_oversized=true").status is Status.success


def test_a_device_that_trials_share_has_a_part_of_its_memory_for_each(
    compose: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "prediction", lambda *_, **__: SimpleNamespace(peak_bytes=30e9))
    monkeypatch.setattr("peftsweep.models.model.device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))
    one = compose()
    assert [forecast.oversized(one, at_once=count) is None for count in (1, 2, 3)] == [True, True, False]
    reason = str(forecast.oversized(one, at_once=4))
    assert reason.startswith("predicted to need 30.0 GB, there are 20.0 GB for each of 4 trials on the device; try ")
    assert reason.endswith(", or fewer hydra.launcher.workers")
    assert forecast.oversized(compose("memory_limit=40GB"), at_once=4) is None  # which is said of one trial
    session = SimpleNamespace(trial=one, config=replace(one.config, skip_oversized=True))
    monkeypatch.setenv(sweep_record.AT_ONCE, "4")
    with pytest.raises(Oversized, match="for each of 4"):
        Session.refuse(session)  # type: ignore[arg-type]


@pytest.mark.usefixtures("memory_foreseen")
def test_the_plan_marks_what_will_not_fit(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("method=lora,full", "dry_run=true", "memory_limit=100MB", "train.capture=off")
    assert code == 0
    rows = json.loads(Path("multirun/default/plan.json").read_text())
    assert [bool(row["oversized"]) for row in rows] == [False, True]
    assert rows[1]["predicted_memory_bytes"] > 100e6
    assert "predicted to need" in out


@pytest.mark.parametrize("words", [["memory_limit=much"], ["memory_limit=24"], ["memory_limit=24XB"]])
def test_a_limit_is_a_size(words: list[str], compose: Compose) -> None:
    with pytest.raises(InputError, match=r"memory_limit=.*: must be a size such as 24GB; units: kB, MB, GB"):
        compose(*words)


@pytest.mark.usefixtures("memory_foreseen")
def test_a_trial_that_runs_out_of_memory_keeps_what_it_measured_and_holds_nothing(
    run_unwritten: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []
    plain = losses.forward_losses

    def full(called: Any, batch: Any) -> Any:
        held.append(weakref.ref(called))
        if len(held) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(called, batch)

    with monkeypatch.context() as context:
        context.setattr(loop, "forward_losses", full)
        result = run_unwritten("train.log_every=1")
    assert (result.status, (result.error or {})["stage"]) == (Status.oom, "train")
    assert result.memory["train"]["rss_peak"] > 0
    assert result.memory["predicted"]["peak_bytes"] > 0
    assert [row["step"] for row in lines(place(result) / "steps.jsonl")] == [1, 2, 3]
    gc.collect()
    assert held[0]() is None  # the model is gone, and its memory with it


KNOBS = {
    "dtype": ["model.dtype=bfloat16"],
    "adapter dtype": ["model.dtype=bfloat16", "train.autocast_adapter_dtype=false"],
    "autocast": ["train.autocast=bfloat16"],
    "checkpointing": ["train.checkpointing=true"],
    "attention": ["model.attn_implementation=eager"],
    "8-bit optimizer": ["train.optimizer=bitsandbytes.optim.AdamW8bit"],
    "paged optimizer": ["train.optimizer=bitsandbytes.optim.PagedAdamW32bit"],
    "accumulation": ["train.accumulation=2"],
    "compile": ["train.compile=eager"],
    "8 bits with offload": ["quant=8bit_offload"],
}
# One each of the step's and of the optimizer's in the fast tier. Other tests train with checkpointing and accumulation
# (tests/training), and with the model's formats (below); compiling imports torch's compiler.
FAST_KNOBS = ["autocast", "paged optimizer"]


@pytest.mark.parametrize("knob", [k if k in FAST_KNOBS else pytest.param(k, marks=pytest.mark.slow) for k in KNOBS])
def test_every_knob_trains(knob: str, run_unwritten: RunSmall) -> None:
    result = run_unwritten(*KNOBS[knob], "eval.perplexity.samples=1", "train.steps=2")
    assert result.status is Status.success, result.error
    assert result.train_info["final_loss"] < 4.5


def test_every_knob_is_another_trial() -> None:
    trainings = {trial_of(*words).training for words in [[], *KNOBS.values()]}
    assert len(trainings) == 1 + len(KNOBS)


@pytest.mark.slow  # two plans; adapters of a 16-bit base are foreseen and trained below
def test_weights_have_the_dtype_asked_for(compose: Compose) -> None:
    plain, narrow = (
        forecast.prediction(compose(f"model.dtype={dtype}", "targets=q")) for dtype in ("float32", "bfloat16")
    )
    assert plain is not None
    assert narrow is not None
    assert narrow.weights_bytes < 0.51 * plain.weights_bytes
    assert narrow.adapter_bytes == plain.adapter_bytes  # 32 bits on a 16-bit base, unless it is told otherwise


def test_adapters_of_the_base_s_dtype_are_foreseen_as_they_are_made(run_unwritten: RunSmall) -> None:
    words = ["model.dtype=bfloat16", "train.autocast_adapter_dtype=false", "targets=q"]
    foreseen = forecast.prediction(trial_of(*words))
    assert foreseen is not None
    assert foreseen.adapter_bytes == 16_384  # two bytes a weight
    assert (
        forecast.check(trial_of(*words)).adapter_bytes
        == run_unwritten(*words, "train.steps=2").train_info["adapter_bytes"]
    )


def test_a_classifier_is_not_asked_to_write(compose: Compose) -> None:
    with pytest.raises(InputError, match=r"inference: a classifier \(model.task=seq_cls\) generates no text"):
        compose("dataset=tiny_direction", "model.task=seq_cls", "eval=[classification]", "inference=standard")
