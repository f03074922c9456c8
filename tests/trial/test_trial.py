"""One trial from words to record."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peftsweep
from peftsweep import cli
from peftsweep.analysis.statistics import measured
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.data import batches, tokens
from peftsweep.data.templates import Example
from peftsweep.forecast import forecast
from peftsweep.models import attach, model, parts, saved
from peftsweep.models import losses as models_losses
from peftsweep.schema import ModelConfig, TargetsConfig
from peftsweep.study import record, store
from peftsweep.study.record import RecordError, Result, Status
from peftsweep.training import loop
from peftsweep.trial import outcome
from tests import schemas
from tests.conftest import ALL_TARGETS

RunSmall = Callable[..., Result]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def place(result: Result) -> Path:
    assert result.folder is not None
    return result.folder


def test_the_folder_holds_all_that_the_design_promises(run_small: RunSmall) -> None:
    result = run_small("quant=4bit", "adapter.check=true")
    folder = place(result)
    assert folder.parent == Path("multirun/default")
    assert folder.name.startswith("tiny-lora-r8-4bit-tiny_math-s0-")
    for name in ("result.json", "steps.jsonl", "trial.log", ".hydra/config.yaml", ".hydra/overrides.yaml"):
        assert (folder / name).is_file(), name
    assert (folder / "adapter/adapter_config.json").is_file()
    assert Result.read(folder).config == result.config
    written = json.loads((folder / "result.json").read_text())
    assert written["schema_version"] == 1
    assert written["choices"]["quant"] == "4bit"
    assert written["config"]["method"]["lora_alpha"] == 16
    run_info = {"trial", "labels", "study", "training", "status", "error", "created_at", "total_seconds", "host"}
    assert run_info | {"git_commit", "git_branch", "git_dirty", "category"} <= set(written["run_info"])
    train_info = {"trainable_parameters", "total_parameters", "base_parameters", "base_bytes", "adapter_bytes"}
    train_info |= {"steps", "epochs", "tokens", "padding_fraction", "final_loss", "best_loss", "tokens_per_second"}
    train_info |= {f"step_seconds_p{p}" for p in (50, 95, 99)}
    train_info |= {f"{stage}_seconds" for stage in ("load", "data", "attach", "train", "eval", "save")}
    assert train_info <= set(written["train_info"])
    assert {"load", "attach", "train", "eval"} <= set(written["memory"])
    assert written["memory"]["train"]["rss_peak"] > 10**8
    assert written["meta_info"]["packages"]["peft"]["version"]
    accuracy = written["eval_info"]["tiny_math"]["accuracy"]
    assert set(accuracy) == {"value", "stderr", "n"}
    assert accuracy["n"] == 8
    assert written["eval_info"]["perplexity"]["base_perplexity"]["value"] > 1
    assert [row["step"] for row in lines(folder / "steps.jsonl")] == [2, 4]
    assert {"loss", "learning_rate", "tokens", "seconds"} <= set(lines(folder / "steps.jsonl")[0])
    predictions = lines(folder / "predictions/tiny_math.jsonl")
    assert len(predictions) == 8
    assert {"prompt", "prediction", "answer", "correct"} <= set(predictions[0])
    assert written["train_info"]["reloads"] is True
    # the sum of the steps, nothing else
    assert written["train_info"]["train_seconds"] <= written["run_info"]["total_seconds"]


# `tests/training/test_train.py` trains twice, to the bit, `tests/config/test_repeat.py` runs a trial twice
@pytest.mark.slow
@pytest.mark.kernels
def test_two_runs_agree_bit_for_bit(run_small: RunSmall) -> None:
    words = ["quant=4bit", "method.lora_dropout=0.1", "eval.tiny_math.samples=2", "eval.tiny_math.max_new_tokens=6"]
    first, second = run_small("study=a", *words), run_small("study=b", *words)
    for name in ("predictions/tiny_math.jsonl", "predictions/perplexity.jsonl"):
        assert (place(first) / name).read_bytes() == (place(second) / name).read_bytes()
    steps = [[row["loss"] for row in lines(place(result) / "steps.jsonl")] for result in (first, second)]
    assert steps[0] == steps[1]
    assert (place(first) / "adapter/adapter_model.safetensors").read_bytes() == (
        place(second) / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_a_base_score_kept_with_other_kernels_is_measured_anew(
    run_unwritten: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train=none", "force=true", "eval.perplexity.samples=2"]
    kept = []
    for kernels in ({"threads": 1, "cpu_capability": name} for name in ("AVX2", "AVX512")):
        monkeypatch.setattr(record, "kernels", lambda found=kernels: found)
        run_unwritten(*words)
        kept.append(len([*Path("multirun/default/base").glob("*/*.jsonl")]))
    assert kept == [1, 2]


def test_a_done_trial_is_not_trained_again_unless_forced(
    trained: RunSmall, run_small: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained()
    with monkeypatch.context() as context:
        context.setattr(loop, "train", lambda *a, **k: pytest.fail("trained again"))
        again = run_small("label=mine")
    assert again.run_info["created_at"] == first.run_info["created_at"]
    assert Result.read(place(first)).run_info["labels"] == [first.run_info["labels"][0], "mine"]
    forced = run_small("force=true")
    assert place(forced) == place(first)
    assert forced.run_info["total_seconds"] != first.run_info["total_seconds"]


def test_a_trained_adapter_is_used_again_when_only_evaluations_differ(
    trained: RunSmall, run_small: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained()
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("trained again"))
    second = run_small("eval.tiny_math.samples=9")
    assert second.status is Status.success
    assert second.train_info["trained_by"] == first.trial
    assert second.train_info["train_seconds"] == first.train_info["train_seconds"]
    assert second.eval_info["perplexity"]["perplexity"] == first.eval_info["perplexity"]["perplexity"]
    assert second.eval_info["tiny_math"]["accuracy"]["n"] == 9


# An adapter and a whole model; tests/models trains the others.
OTHERS: list[Any] = [["method=ia3", "targets=qkvo"], ["method=full"]]
OTHERS += [pytest.param(words, marks=pytest.mark.slow) for words in (["method=ia3"], ["targets=mlp"])]


@pytest.mark.parametrize("words", OTHERS)
def test_other_methods_train_save_and_report(words: list[str], run_unwritten: RunSmall) -> None:
    result = run_unwritten(*words)
    assert result.status is Status.success, result.error
    assert result.train_info["trainable_parameters"] > 0
    assert (place(result) / "adapter").is_dir()


@pytest.mark.slow  # as the adapter above, and saved as one
def test_full_fine_tuning_comes_back_for_another_evaluation(trained: RunSmall, run_small: RunSmall) -> None:
    first = trained("method=full")
    second = run_small("method=full", "eval.tiny_math.samples=9")
    assert second.train_info["trained_by"] == first.trial
    assert second.eval_info["perplexity"]["perplexity"] == first.eval_info["perplexity"]["perplexity"]


def test_full_fine_tuning_of_a_quantised_base_is_refused_and_recorded(run_small: RunSmall) -> None:
    result = run_small("method=full", "quant=4bit")
    assert result.status is Status.refused
    assert result.error is not None
    assert "cannot train quantised weights" in result.error["message"]
    assert Result.read(place(result)).status is Status.refused


TRIED = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB, of which ...\nProcess 7 has"
)


@pytest.mark.parametrize(
    ("error_text", "stage", "words", "line"),
    [
        (
            TRIED,
            "train",
            [],
            "no memory left for 2.00 GiB more; try train.batch_size=8 train.accumulation=2, train.checkpointing=true, "
            "quant=4bit, or a smaller dataset.max_length or model",
        ),
        (
            "CUDA error: out of memory",
            "train",
            ["train.checkpointing=true", "quant=4bit", "train.batch_size=1"],
            "no memory left; try a smaller dataset.max_length or model",
        ),
        (
            TRIED,
            "load",
            [],
            "no memory left for 2.00 GiB more; try quant=4bit, or a smaller dataset.max_length or model",
        ),
    ],
)
def test_memory_that_ran_out_is_one_line_with_what_to_change(
    error_text: str, stage: str, words: list[str], line: str, compose: Callable[..., Trial]
) -> None:
    failure = outcome.failure_of(
        torch.OutOfMemoryError(error_text), stage, compose("train.batch_size=16", *words).config
    )
    assert failure["message"] == line
    assert error_text in failure["traceback"]  # what the allocator says of its state


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("broken"), Status.failed),
        (torch.OutOfMemoryError("CUDA out of memory"), Status.oom),
        pytest.param(MemoryError(), Status.oom, marks=pytest.mark.slow),  # as the one above
    ],
)
def test_a_failure_is_a_complete_record(
    error: Exception, status: Status, run_unwritten: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(loop, "train", fail_with(error))
        result = run_unwritten()
    written = Result.read(place(result))
    assert written.status is status
    assert written.error is not None
    assert (written.error["type"], written.error["stage"]) == (type(error).__name__, "train")
    assert "Traceback" in written.error["traceback"]
    assert "Traceback" in (place(result) / "trial.log").read_text()
    assert written.train_info["load_seconds"] > 0
    again = run_unwritten()  # only what went wrong by chance is tried again
    assert again.status is (Status.success if status is Status.failed else Status.oom)


def test_what_cannot_be_foreseen_is_tried_and_recorded(
    compose: Callable[..., Trial], run_small: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "attach", fail_with(AttributeError("a bug of a method")))
    monkeypatch.setattr(forecast, "_SIZES", {})  # without those of other tests
    assert forecast.check(compose("method.r=5")).trainable_parameters is None
    result = run_small("method.r=5")
    assert (result.status, (result.error or {})["stage"]) == (Status.failed, "attach")


def test_an_interrupt_is_recorded_as_cancelled_and_passed_on(
    run_unwritten: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(loop, "train", fail_with(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_unwritten()
    (file,) = Path("multirun/default").glob("*/result.json")
    assert Result.read(file.parent).status is Status.cancelled
    assert run_unwritten().status is Status.success


def test_validation_rows_and_the_best_weights(run_small: RunSmall) -> None:
    few = ["targets=q", "eval.tiny_math.max_new_tokens=4"]
    result = run_small(*few, "train.eval_every=2", "train.keep_best=true", "dataset.validation_samples=6")
    steps = lines(place(result) / "steps.jsonl")
    validations = [row for row in steps if "validation_loss" in row]
    assert [row["step"] for row in validations] == [2, 4]
    assert {"validation_tiny_math.accuracy", "validation_perplexity.perplexity"} <= set(validations[0])
    assert result.train_info["best_loss"] == min(row["validation_loss"] for row in validations)
    assert result.train_info["training_rows"] == 58


def test_an_adapter_that_does_not_come_back_is_reported(
    run_unwritten: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(saved, "restore", fail_with(KeyError("router")))
        result = run_unwritten("adapter.check=true")
    assert result.status is Status.success
    assert result.train_info["reloads"] is False
    assert result.train_info["reload_error"] == "KeyError: 'router'"
    with monkeypatch.context() as context:
        context.setattr(saved, "restore", lambda base, *_, **__: base)  # the untouched base
        result = run_unwritten("adapter.check=true", "seed=1")
    assert result.train_info["reloads"] is False
    assert result.train_info["reload_difference"] > 0.01


# One in the fast tier, as each trains.
SIZED: list[Any] = ["lora"]
OTHER_SIZES = ("prefix_tuning", "vera", "boft", "mica", "trainable_tokens")
SIZED += [pytest.param(name, marks=pytest.mark.slow) for name in OTHER_SIZES]


@pytest.mark.parametrize("method", SIZED)
def test_the_size_of_the_adapter_is_foreseen_to_the_byte(
    method: str, run_unwritten: RunSmall, compose: Callable[..., Trial]
) -> None:
    few = ["eval.perplexity.samples=1", "train.steps=2"]
    foreseen, found = forecast.check(compose(f"method={method}")), run_unwritten(f"method={method}", *few).train_info
    assert foreseen.trainable_parameters == found["trainable_parameters"]
    assert foreseen.adapter_bytes == found["adapter_bytes"]


# In the fast tier one that leaves the base as it is, quantised, and one that changes the base.
SAVED: list[Any] = [("lora", "4bit"), ("pissa", "none")]
SAVED += [
    pytest.param(method, quant, marks=pytest.mark.slow)
    for method in ("lora", "pissa", "eva", "corda", "lora_ga", "loftq", "lora_pissa_niter_2")
    for quant in ("none", "4bit")
    if (method, quant) not in SAVED
]


@pytest.mark.parametrize(("method", "quant"), SAVED)
def test_what_is_saved_comes_back_and_merges(run_unwritten: RunSmall, method: str, quant: str) -> None:
    words = [
        f"method={method}",
        f"quant={quant}",
        "adapter.check=true",
        "adapter.merge=true",
        "train.learning_rate_scale=50",
    ]
    if method == "lora_pissa_niter_2":
        words[0] = "method=pissa"
        words.append("method.init_lora_weights=pissa_niter_2")
    if method in ("eva", "corda", "lora_ga"):
        words.append("method_setup.rows=16")
    result = run_unwritten(*words)
    if (method, quant) in {("corda", "4bit"), ("lora_ga", "4bit"), ("loftq", "none")}:
        assert result.status is Status.refused
        return
    info = result.train_info
    assert result.status is Status.success
    assert (info["reloads"], info["merges"]) == (True, True)
    assert max(info["reload_difference"], info["merge_difference"]) < 1e-3
    merged: Any = AutoModelForCausalLM.from_pretrained(place(result) / "merged")
    config = ModelConfig(name_or_path="tiny")
    rows = tokens.tokenize(model.load_tokenizer(config), [Example("Tom has 3 pens.", "Tom has 4 pens.")], 64)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = model.load(config, quantization if quant == "4bit" else None, torch.device("cpu"))
    adapted = saved.restore(base, place(result) / "adapter")
    with torch.no_grad():
        losses = [models_losses.answer_losses(one.eval(), batches.collate(rows, 0)) for one in (merged, adapted)]
    assert (losses[0] - losses[1]).abs().max() < 1e-3


@pytest.mark.slow  # another method on a quantised base is merged above
@pytest.mark.parametrize("quant", ["4bit", "8bit"])
def test_ia3_merges_on_a_quantised_base(quant: str, run_unwritten: RunSmall) -> None:
    result = run_unwritten(
        "method=ia3", f"quant={quant}", "adapter.check=true", "adapter.merge=true", "train.learning_rate_scale=500"
    )
    assert result.train_info["merges"] is True
    merged: Any = AutoModelForCausalLM.from_pretrained(place(result) / "merged")
    base: Any = model.load(ModelConfig(name_or_path="tiny"), None, torch.device("cpu"))
    scales = load_file(place(result) / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.v_proj"
    learned = scales[f"base_model.model.{name}.ia3_l"].flatten().abs()
    ratio = merged.get_submodule(name).weight.norm(dim=1) / base.get_submodule(name).weight.norm(dim=1)
    assert (learned - 1).abs().max() > 0.1  # something was learned
    # Storing the base in fewer bits changes the norm of a row by less than that.
    torch.testing.assert_close(ratio.detach(), learned, rtol=0.1, atol=0.01)


def test_what_cannot_be_merged_says_so(run_unwritten: RunSmall) -> None:
    result = run_unwritten("method=prompt_tuning", "adapter.check=true", "adapter.merge=true")
    assert result.status is Status.success
    assert result.train_info["merges"] is False
    expected = "not mergeable: what the method adds cannot be merged into the weights"
    assert result.train_info["merge_error"] == expected
    assert not (place(result) / "merged").exists()


def test_a_residual_base_is_quantised_in_place_of_the_whole(run_unwritten: RunSmall) -> None:
    result = run_unwritten("method=pissa", "quant=4bit", "train.steps=0", "train=none")
    base = result.eval_info["perplexity"]["base_loss"]["value"]
    assert result.eval_info["perplexity"]["loss"]["value"] == pytest.approx(base, abs=0.2)
    assert (place(result) / "adapter" / "base").is_dir()


@pytest.mark.slow  # two merges and four models; what PEFT's LoftQ comes to, not what a trial does with it
def test_loftq_begins_closer_to_the_unquantised_base_than_lora(run_unwritten: RunSmall) -> None:
    """The point of LoftQ (arXiv 2310.08659): quantised base and adapter together are nearer to the weights."""
    config = ModelConfig(name_or_path="tiny")
    whole: Any = model.load(config, None, torch.device("cpu"))
    kept = run_unwritten(
        "method=loftq", "quant=4bit", "train=none", "adapter.check=true", "adapter.merge=true", "method.r=16"
    )
    merged: Any = AutoModelForCausalLM.from_pretrained(place(kept) / "merged")
    plain = run_unwritten(
        "method=lora", "quant=4bit", "train=none", "adapter.check=true", "adapter.merge=true", "method.r=16"
    )
    rounded: Any = AutoModelForCausalLM.from_pretrained(place(plain) / "merged")
    for name, weight in whole.named_parameters():
        if "proj" in name:
            error = (merged.get_parameter(name) - weight).norm()
            assert error < 0.9 * (rounded.get_parameter(name) - weight).norm(), name


@pytest.mark.slow
def test_x_lora_mixes_adapters_trained_before(run_small: RunSmall) -> None:
    first, second = run_small(), run_small("method.r=4")
    a, b = ((place(one) / "adapter").resolve() for one in (first, second))
    refused = run_small("method=xlora")
    assert "method.adapters={a: DIR, b: DIR}" in (refused.error or {})["message"]
    mixed = run_small("method=xlora", "adapter.check=true", f"method.adapters={{a: '{a}', b: '{b}'}}")
    assert mixed.status is Status.success
    assert mixed.train_info["trainable_parameters"] == 128 * 2 + 2  # a router over two adapters
    assert mixed.train_info["reloads"] is False  # PEFT does not save the router: the record says so


def test_the_base_is_scored_once_a_study(trained: RunSmall, run_small: RunSmall) -> None:
    first, second = trained(), run_small("seed=1")
    files = list(Path("multirun/default/base").glob("tiny-none-*/*.json"))
    assert sorted(file.name.partition("-")[0] for file in files) == ["perplexity", "tiny_math"]
    base = [result.eval_info["perplexity"]["base_perplexity"] for result in (first, second)]
    assert base[0] == base[1]


def test_the_base_s_answers_are_kept_by_row_in_the_format_of_a_trial_s(trained: RunSmall, run_small: RunSmall) -> None:
    whole, untrained = trained(), run_small("train=none", "train.steps=0")
    for name, metric in (("tiny_math", "accuracy"), ("perplexity", "perplexity")):
        kept = {result.eval_info[name]["base_predictions"] for result in (whole, untrained)}
        assert len(kept) == 1
        base = lines(Path("multirun/default") / kept.pop())
        assert [line["prompt"] for line in base] == [
            x["prompt"] for x in lines(place(whole) / f"predictions/{name}.jsonl")
        ]
        assert base == lines(place(untrained) / f"predictions/{name}.jsonl")  # which is the base itself
        found = measured.row_scores(base, metric)
        assert found is not None
        mean = math.exp(found.mean()) if metric == "perplexity" else found.mean()
        assert mean == pytest.approx(whole.eval_info[name][f"base_{metric}"]["value"])


PRESETS = {  # model.architecture of each at small size
    "llama3.2_1b": "intermediate_size=128 num_hidden_layers=1 num_key_value_heads=1 head_dim=32",
    "llama3.2_3b": "intermediate_size=128 num_hidden_layers=1 num_key_value_heads=1 head_dim=32",
    "opt_350m": "ffn_dim=128 num_hidden_layers=1 word_embed_proj_dim=64",
    "phi2": "intermediate_size=128 num_hidden_layers=1 num_key_value_heads=2",
    "gpt_neo_1.3b": "num_heads=2 num_layers=1 attention_types=[[[global],1]]",
}
# One in the fast tier, which needs most of its own; the others take the same way.
SMALL_PRESETS = [name if name == "opt_350m" else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]


@pytest.mark.parametrize("name", SMALL_PRESETS)
def test_presets_run_at_small_size_without_their_weights(name: str, run_small: RunSmall) -> None:
    neo = name == "gpt_neo_1.3b"
    sizes = ["hidden_size=64", "vocab_size=600", *([] if neo else ["num_attention_heads=2"]), *PRESETS[name].split()]
    words = ["eval.tiny_math.samples=1", "eval.perplexity.samples=1", *(f"model.architecture.{size}" for size in sizes)]
    words += ["quant=8bit", "targets=mlp"] if neo else ["quant=4bit", "targets=qkvo"]
    result = run_small(f"model={name}", "model.init=random", *words)
    assert result.status is Status.success, result.error


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("llama3.2_1b", 1_235_814_400),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)  # each builds the shape of billions of weights
            for sizes in (
                ("llama3.2_3b", 3_212_749_824),
                ("opt_350m", 331_196_416),
                ("phi2", 2_779_683_840),
                ("gpt_neo_1.3b", 1_315_575_808),
            )
        ),
    ],
)
def test_presets_have_the_published_sizes(preset: str, parameters: int, compose: Callable[..., Trial]) -> None:
    foreseen = forecast.check(compose(f"model={preset}", "model.init=random"))
    assert foreseen.total_parameters is not None
    assert foreseen.trainable_parameters is not None
    assert foreseen.total_parameters - foreseen.trainable_parameters == parameters


def test_a_local_file_with_its_own_columns(run_small: RunSmall, questions: Path) -> None:
    words = ["device=cpu", "dataset=file", f"dataset.path={questions}", 'dataset.prompt="Q: {question} "']
    words += ["targets=q", "adapter.check=false"]
    result = peftsweep.run([*words, 'dataset.answer="{answer}"', "train.steps=3", "eval.perplexity.samples=3"])
    assert result.status is Status.success
    assert result.train_info["training_rows"] == 36
    assert result.eval_info["perplexity"]["perplexity"]["n"] == 3


@pytest.mark.slow  # a local file is trained on above; tests/data reads the rows and answers of GSM8K
def test_gsm8k_takes_local_files(questions: Path) -> None:
    test = schemas.write("gsm8k", questions.parent)
    words = ["device=cpu", "dataset=gsm8k", f"dataset.path={questions}", f"dataset.test_path={test}", "train.steps=2"]
    words += ["targets=q", "adapter.check=false"]
    result = peftsweep.run([*words, "eval.gsm8k.max_new_tokens=4", "eval.gsm8k.samples=2", "eval.perplexity.samples=2"])
    assert result.status is Status.success, result.error
    assert result.eval_info["gsm8k"]["accuracy"]["n"] == 2


def test_training_on_the_test_file_alone_is_wrong_input(questions: Path) -> None:
    words = ["dataset=gsm8k", f"dataset.path={questions}", f"dataset.test_path={questions}"]
    with pytest.raises(peftsweep.InputError, match=r"none of 40 training rows is left \(.*'tested_rows': 40"):
        peftsweep.run(words)


def test_from_python_a_wrong_word_is_an_exception() -> None:
    with pytest.raises(peftsweep.InputError, match=r"method.r=0: must be at least 1"):
        peftsweep.run(["method.r=0"])


def test_a_broken_record_is_named_and_none(trained: RunSmall) -> None:  # test_sweep.py runs such a trial again
    result = trained()
    (place(result) / "result.json").write_text('{"schema_version": 1, "run_in')
    with pytest.raises(RecordError, match=r"result\.json"):
        Result.read(place(result))
    assert store.result(place(result)) is None


def test_a_record_of_a_later_version_is_not_misread(trained: RunSmall) -> None:
    result = trained()
    file = place(result) / "result.json"
    file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(RecordError, match="later version"):
        Result.read(place(result))


def test_a_saved_adapter_is_scored_as_the_trial_that_made_it(run_unwritten: RunSmall) -> None:
    trained = run_unwritten("method.r=4", "targets=qv", "quant=4bit", "train.learning_rate_scale=50")
    again = cli.run_one([*ALL_TARGETS, f"adapter.path={place(trained)}"])
    assert again.status is Status.success
    assert {key: again.config[key] for key in ("method", "quant", "targets")} == {
        key: trained.config[key] for key in ("method", "quant", "targets")
    }
    assert (again.choices["quant"], again.choices["targets"]) == ("4bit", "qv")
    for metric in ("loss", "perplexity", "base_loss"):
        assert again.eval_info["perplexity"][metric] == trained.eval_info["perplexity"][metric]
    assert again.train_info["steps"] == 0
    assert not (place(again) / "adapter").exists()


def test_an_adapter_that_is_not_there_is_one_line() -> None:
    with pytest.raises(peftsweep.InputError, match=r"from the hub: hf download org/adapter --local-dir FOLDER"):
        store.adapter("org/adapter")
    with pytest.raises(peftsweep.InputError, match=r"adapter\.path=nowhere: holds no adapter_config\.json"):
        cli.run_one([*ALL_TARGETS, "adapter.path=nowhere"])


@pytest.mark.slow  # as the one of a trial above; `tests/config/test_restored.py` has what its folder says
def test_an_adapter_from_elsewhere_is_scored_too(run_unwritten: RunSmall, tmp_path: Path) -> None:
    trained = run_unwritten("method=ia3", "train.learning_rate_scale=50")
    elsewhere = tmp_path / "downloads" / "ia3"
    shutil.copytree(place(trained) / "adapter", elsewhere)
    words = [*ALL_TARGETS, f"adapter.path={elsewhere}"]
    again = cli.run_one(words)
    assert again.config["method"]["_target_"] == "peft.IA3Config"
    assert again.config["model"]["name_or_path"] == str(model.TINY)
    assert again.eval_info["perplexity"]["loss"] == trained.eval_info["perplexity"]["loss"]
    assert cli.run_one(words).run_info["created_at"] == again.run_info["created_at"]


@pytest.mark.slow  # as the adapter above; `tests/models/test_saved_heads.py` has heads that are saved and read
def test_a_classifier_is_scored_again_with_its_head(run_small: RunSmall) -> None:
    words = ["device=cpu", "dataset=tiny_direction", "model.task=seq_cls", "eval=[classification]"]
    few = ["train.steps=2", "dataset.samples=16", "eval.classification.samples=16", "adapter.check=false"]
    trained = cli.run_one([*words, *few])
    again = cli.run_one(
        ["device=cpu", "dataset=tiny_direction", f"adapter.path={place(trained)}", "eval.tiny_direction.samples=16"]
    )
    found = [one.eval_info[name]["accuracy"] for one, name in ((trained, "classification"), (again, "tiny_direction"))]
    assert found[0] == found[1]
    assert sum(again.eval_info["tiny_direction"]["base_histogram"].values()) == 16
    assert again.config["model"]["task"] == "seq_cls"


@pytest.mark.slow
def test_rows_are_tokenised_once_for_all_trials_that_share_them(
    run_small: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, tokenize = [], tokens.tokenize

    def counted(*given: Any, **named: Any) -> list[tokens.Tokens]:
        calls.append(given)
        return tokenize(*given, **named)

    monkeypatch.setattr(build, "_TOKENS", {})
    monkeypatch.setattr(tokens, "tokenize", counted)
    run_small(), run_small("method.r=2"), run_small("seed=1")
    assert len(calls) == 1
    run_small("dataset.max_length=64")
    run_small("dataset.samples=48")
    assert len(calls) == 3


def test_tokenised_rows_that_took_long_are_read_back_from_the_study(
    run_unwritten: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "MIN_CACHED_SECONDS", 0.0)
    monkeypatch.setattr(build, "_TOKENS", {})
    first = run_unwritten()
    assert len(list(Path("multirun/default/.tokens").glob("*.parquet"))) == 1
    monkeypatch.setattr(build, "_TOKENS", {})
    monkeypatch.setattr(build, "_tokenize", None)
    again = run_unwritten("force=true")
    assert again.train_info["final_loss"] == first.train_info["final_loss"]


@pytest.mark.slow  # the adapter that comes back otherwise, above, is found out in the same way
def test_a_merged_folder_that_answers_otherwise_is_taken_away(
    run_unwritten: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record's word is about what was read back from the disk, not about the model in memory."""
    untouched = model.load(ModelConfig(name_or_path="tiny"), None, torch.device("cpu"))
    monkeypatch.setattr(saved, "read", lambda folder, like: untouched)
    result = run_unwritten("adapter.check=true", "adapter.merge=true", "train.learning_rate_scale=50")
    assert result.status is Status.success
    assert result.train_info["merges"] is False
    assert result.train_info["merge_difference"] > 0.01
    assert not (place(result) / "merged").exists()


@pytest.mark.slow
def test_no_trial_goes_on_from_an_adapter_that_does_not_come_back(
    run_small: RunSmall, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(saved, "restore", lambda base, *_, **__: base)
        assert run_small("adapter.check=true").train_info["reloads"] is False
    again = run_small("adapter.check=true", "eval.tiny_math.samples=4")
    assert again.train_info["reloads"] is True
    assert "trained_by" not in again.train_info
    assert run_small("eval.tiny_math.samples=5").train_info["trained_by"] == again.trial


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"], "init_lora_weights": False},
        {"target_modules": ["lm_head"], "init_lora_weights": False},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "init_lora_weights": False},
    ],
)
def test_tied_weights_are_untied_before_a_merge_that_touches_one_of_them(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = ModelConfig(name_or_path="tiny")
    torch.manual_seed(0)
    adapted: Any = attach.attach(
        model.load(config, None, torch.device("cpu")), LoraConfig(r=4, **options), TargetsConfig(), {}
    )
    for name, parameter in parts.trainable_parameters(adapted):
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    saved.save(adapted, tmp_path / "adapter")
    again = saved.dequantised(model.load(config, None, torch.device("cpu")), tmp_path / "adapter")
    written = saved.merge(again)
    written.save_pretrained(tmp_path / "merged")
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        difference = (merged(input_ids=ids).logits - adapted.eval()(input_ids=ids).logits).abs().max().item()
    assert difference < 1e-3
