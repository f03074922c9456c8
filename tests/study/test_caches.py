"""Identities and caches: what is named covers what it names (docs/caches.md)."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftsweep import InputError, former_names
from peftsweep.config import build, fill, identity
from peftsweep.config.compose import Trial
from peftsweep.data import fingerprint, hub
from peftsweep.evaluation import metrics
from peftsweep.forecast import forecast
from peftsweep.models import model
from peftsweep.schema import ModelConfig
from peftsweep.study import record, store
from peftsweep.study.record import Result
from peftsweep.sweep import packing
from peftsweep.trial import done, scores, stages, task
from peftsweep.trial.faults import faults
from tests.architectures import small_config, write
from tests.conftest import SMALL, records
from tests.data.test_chat import BEGUN, CHATML, CLOSED, OTHER_END

Compose = Callable[..., Trial]
CPU = torch.device("cpu")
LOCAL = ["model=causal_lm", "model.name_or_path=M", "model.roles.q=[q_proj]", "model.roles.v=[v_proj]"]
QUICK = [*LOCAL, "method.r=2", "adapter.check=false", "train.steps=2", "train.batch_size=2", "dataset.samples=16"]
QUICK += ["eval=[perplexity]", "eval.perplexity.samples=2", "quiet=true"]


@pytest.fixture(autouse=True)
def folder(scratch: Path) -> Path:
    """A copy of the embedded model that a test may change."""
    shutil.copytree(model.TINY, scratch / "M")
    return scratch / "M"


def edit(file: Path, place: int = -1) -> None:
    """Another byte in that place, of a file that keeps its size and its time of modification."""
    content, stat = bytearray(file.read_bytes()), file.stat()
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


# ---- files -----------------------------------------------------------------------------------------


def test_every_byte_of_a_large_file_counts(scratch: Path) -> None:
    file = scratch / "weights.bin"
    with file.open("wb") as stream:
        stream.truncate(fingerprint.LARGE + 2**20)
    first = fingerprint.file_hash(file)
    edit(file, fingerprint.LARGE // 2 + 2**19)  # the middle
    assert fingerprint.file_hash(file) != first


def test_a_large_file_is_read_once_for_all_processes(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = scratch / "weights.bin"
    with file.open("wb") as stream:
        stream.truncate(fingerprint.LARGE + 1)
    first = fingerprint.file_hash(file)
    fingerprint._remembered.cache_clear()
    monkeypatch.setattr(fingerprint, "_read_and_hash", lambda *_: pytest.fail("read again"))
    assert fingerprint.file_hash(file) == first


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "figure.png", ".gitattributes", "pytorch_model.bin", "x.onnx"]
)
def test_files_that_change_no_number_are_no_part_of_a_model(name: str, folder: Path, compose: Compose) -> None:
    before = compose(*LOCAL).identity
    (folder / name).write_text("text")
    assert compose(*LOCAL).identity == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_files_that_may_be_read_are_part_of_a_model(name: str, folder: Path, compose: Compose) -> None:
    before = compose(*LOCAL)
    (folder / name).write_bytes(b"\n" + (folder / name).read_bytes() if (folder / name).exists() else b"{{ 1 }}")
    assert compose(*LOCAL).training != before.training


def test_weights_in_torch_s_format_count_where_they_are_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text("weights")
    assert "pytorch_model.bin" not in fingerprint.files_read(folder)
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin" in fingerprint.files_read(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_an_adapter_of_either_kind_counts_by_its_content(name: str, scratch: Path) -> None:
    saved = scratch / "saved"
    saved.mkdir()
    (saved / "adapter_config.json").write_text("{}")
    if not name.endswith(".json"):
        (saved / name).write_text("weights")
    before = identity._adapter_files("saved", rule=2)
    (saved / name).write_text("other")
    (saved / "README.md").write_text("text")
    after = identity._adapter_files("saved", rule=2)
    assert before is not None
    assert after is not None
    assert {key for key in after if after[key] != before.get(key)} == {name}


# ---- names -----------------------------------------------------------------------------------------


def test_a_class_has_one_name_in_an_identity_whichever_was_given(compose: Compose) -> None:
    for words in (["method._target_=peft.tuners.lora.config.LoraConfig"], ["train.optimizer=AdamW"]):
        assert compose(*words).identity == compose().identity


def test_a_function_that_has_moved_keeps_its_first_name_in_identities(compose: Compose) -> None:
    now = compose("eval=[perplexity]")
    former = compose("eval=[perplexity]", "eval.perplexity._target_=peftsweep.evaluate.perplexity")
    assert former.config.eval["perplexity"]["_target_"] == "peftsweep.evaluation.evaluate.perplexity"
    assert former.identity == now.identity
    for rule in (1, 2):
        assert (
            identity.canonical_name("peftsweep.evaluation.evaluate.perplexity", rule) == "peftsweep.evaluate.perplexity"
        )


def test_code_of_a_person_s_own_may_import_by_former_names() -> None:
    from peftsweep.metrics import number_match  # type: ignore[import-untyped]

    from peftsweep.evaluation import metrics

    assert number_match is metrics.number_match
    assert {importlib.import_module(name).__name__ for name in former_names.MODULES} == {*former_names.MODULES.values()}


def test_a_key_of_a_later_version_changes_no_identity_by_its_default() -> None:
    from peftsweep.schema import TrainConfig

    first = tuple(key for key in identity.FIRST_TRAIN_KEYS if key != "clip")  # as if it had come later
    assert "clip" not in identity._section_identity(TrainConfig(), first)
    assert identity._section_identity(TrainConfig(clip=2.0), first)["clip"] == 2.0


# ---- records of earlier versions -------------------------------------------------------------------


def as_of_the_first_version(result: Result, one: Trial) -> None:
    """Make a record what the first version would have written, under the names it would have had."""
    assert one.earlier is not None
    assert result.folder is not None
    del result.run_info["identity_rule"]
    result.run_info |= {"identity": one.earlier.trial, "training": one.earlier.training}
    place = result.folder.with_name(result.folder.name.replace(one.identity, one.earlier.trial))
    result.folder.rename(place)
    result.run_info["trial"] = place.name
    result.write(place)
    shutil.rmtree(place.parent / ".trained")
    store.mark_trained(result)


def test_a_trial_of_the_first_version_is_done_under_its_rule(folder: Path, compose: Compose) -> None:
    (folder / "README.md").write_text("counted then")
    one = compose(*QUICK)
    as_of_the_first_version(task.run(one), one)
    held = done.finished(one)
    assert held is not None
    assert faults.rule_of(held) == 1
    (folder / "README.md").unlink()  # it is recognised from now on, by what counts today
    assert done.finished(compose(*QUICK)) is not None
    other_scores = compose(*QUICK, "eval.perplexity.max_length=100")
    assert done.finished(other_scores) is None
    assert done.trained(other_scores) is not None  # and its adapter is not trained again
    edit(folder / "model.safetensors")
    assert done.finished(compose(*QUICK)) is None
    assert done.trained(compose(*QUICK)) is None


def test_a_trial_that_a_mended_fault_made_wrong_is_run_again_and_one_line_says_why(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    words = [*QUICK, "train.accumulation=2", "quiet=false"]
    command(*words)
    (result,) = records().values()
    assert result.run_info.pop("identity_rule") == identity.IDENTITY_RULE
    result.train_info["final_loss"] = -1.0
    assert result.folder is not None
    result.write(result.folder)
    _, out, _ = command(*words)
    assert out.count("1 trial run again, as the numbers of an earlier version were wrong: with train.accumulation") == 1
    (again,) = records().values()
    assert again.train_info["final_loss"] > 0
    assert "done before" in command(*words)[1]


def told(folder: Path, train_info: dict[str, Any] | None = None, **sections: Any) -> str:
    """Why a record of the first version, of a trial on that base, is run again; empty where it counts."""
    config = {"model": {"name_or_path": str(folder)}, "method": {"r": 2}, "targets": {"roles": ["q"]}} | sections
    return faults.outdated(Result({}, {}, config=config, train_info=train_info or {})) or ""


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("llama", ""),
        ("gemma3", "parts of the model that read no text were adapted too"),
        ("qwen2_moe", "the roles of a mixture of experts named other weights"),
        ("mamba", "left-padded batches changed"),
        ("lfm2", "left-padded batches changed"),
    ],
)
def test_a_record_of_the_first_version_is_known_to_be_wrong_by_its_architecture(
    kind: str, why: str, tmp_path: Path
) -> None:
    assert told(write(kind, tmp_path)).startswith(why)
    assert bool(told(tmp_path)) == bool(why)


@pytest.mark.parametrize(
    ("kind", "targets", "method", "wrong"),
    [
        ("qwen2_moe", {"all_linear": True}, {"r": 2}, True),
        ("qwen2_moe", {}, {"target_modules": "all-linear"}, True),
        ("qwen2_moe", {"roles": ["q", "mlp"]}, {"r": 2}, False),
        ("qwen2_moe", {"all_linear": True}, None, False),
        ("mixtral", {"all_linear": True}, {"r": 2}, False),  # whose router is no linear layer
        ("llama", {"all_linear": True}, {"r": 2}, False),
    ],
)
def test_a_record_whose_adapter_reached_routers_is_run_again(
    kind: str, targets: dict[str, Any], method: dict[str, Any] | None, wrong: bool, tmp_path: Path
) -> None:
    config = {"model": {"name_or_path": str(write(kind, tmp_path))}, "method": method, "targets": targets}
    reason = faults.outdated(Result({"identity_rule": 2}, {}, config=config)) or ""
    assert reason.startswith("what chooses among a mixture's experts was adapted too" if wrong else "")
    assert bool(reason) == wrong
    assert faults.right_since(config) == (3 if wrong else 2 if kind != "llama" and method else 1)
    assert faults.outdated(Result({"identity_rule": 3}, {}, config=config)) is None


@pytest.mark.parametrize(
    ("modules", "packed", "wrong"),
    [
        (["embed_tokens", "q_proj"], True, True),
        (["embed_tokens", "q_proj"], False, False),
        (["q_proj"], True, False),
        (r".*\.embed_tokens", True, True),
        ("all-linear", True, False),
    ],
)
def test_a_record_of_a_pack_with_adapters_of_embeddings_is_run_again(
    modules: Any, packed: bool, wrong: bool, tmp_path: Path
) -> None:
    config = {"model": {"name_or_path": str(write("llama", tmp_path))}, "method": {"target_modules": modules}}
    info: dict[str, Any] = {"steps": 4} | ({"packed": {}} if packed else {})
    held = Result({"identity_rule": 5}, {}, config=config, train_info=info)
    assert bool(faults.outdated(held)) == wrong
    assert faults.outdated(Result({"identity_rule": 6}, {}, config=config, train_info=info)) is None


@pytest.mark.parametrize(
    ("method", "reloads", "wrong", "retrained"),
    [
        ({"_target_": "peft.AdaLoraConfig"}, False, True, True),
        ({"_target_": "peft.AdaLoraConfig"}, True, False, True),
        ({"_target_": "peft.LoraConfig"}, False, False, False),
        ({"_target_": "peft.LoraConfig", "alora_invocation_tokens": [7]}, True, True, False),
    ],
)
def test_a_record_of_wrong_ranks_or_of_an_adapter_that_cached_tokens_switched_off_is_run_again(
    method: dict[str, Any], reloads: bool, wrong: bool, retrained: bool
) -> None:
    config = {"model": {"name_or_path": "tiny"}, "method": method, "train": {"keep_best": True}}
    info = {"steps": 4, "reloads": reloads}
    assert bool(faults.outdated(Result({"identity_rule": 5}, {}, config=config, train_info=info))) == wrong
    assert faults.right_since(config) == (6 if retrained else 1)


@pytest.mark.parametrize(
    ("roles", "method", "wrong"),
    [
        (["q", "experts"], {"layers_to_transform": 0}, True),
        (["q", "experts"], {"exclude_modules": ["0.mlp.experts"]}, True),
        (["q", "experts"], {"layers_to_transform": []}, False),
        (["q"], {"layers_to_transform": [0]}, False),
        (["q"], {"layers_to_transform": [0], "target_parameters": ["experts.down_proj"]}, True),
    ],
)
def test_a_record_whose_experts_were_adapted_in_all_layers_is_run_again(
    roles: list[str], method: dict[str, Any], wrong: bool, tmp_path: Path
) -> None:
    small_config("qwen3_moe").save_pretrained(tmp_path)
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(tmp_path)
    config = {"model": {"name_or_path": str(tmp_path)}, "method": {"r": 2} | method, "targets": {"roles": roles}}
    assert bool(faults.outdated(Result({"identity_rule": 9}, {}, config=config))) == wrong
    assert faults.outdated(Result({"identity_rule": 10}, {}, config=config)) is None


@pytest.mark.parametrize(("kind", "wrong"), [("xlnet", True), ("bert", False)])
def test_a_record_of_a_classifier_that_took_padding_for_text_is_run_again(
    kind: str, wrong: bool, tmp_path: Path
) -> None:
    small_config(kind).save_pretrained(tmp_path)
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(tmp_path)
    config = {"model": {"name_or_path": str(tmp_path), "task": "seq_cls"}, "method": {"r": 2}}
    assert bool(faults.outdated(Result({"identity_rule": 5}, {}, config=config))) == wrong
    assert faults.right_since(config) == (6 if wrong else 1)


@pytest.mark.parametrize(
    ("method", "train", "evaluation", "wrong"),
    [
        ("peft.PromptTuningConfig", {}, {"max_new_tokens": 8}, True),
        ("peft.PromptTuningConfig", {}, {}, False),
        ("peft.PrefixTuningConfig", {}, {"max_new_tokens": 8}, False),
        ("peft.LoraConfig", {}, {"max_new_tokens": 8}, False),
        ("peft.LoraConfig", {"optimizer": "peft.optimizers.create_loraplus_optimizer", "weight_decay": 0.1}, {}, True),
        ("peft.LoraConfig", {"optimizer": "peft.optimizers.create_loraplus_optimizer", "weight_decay": 0.0}, {}, False),
        ("peft.LoraConfig", {"optimizer": "AdamW", "weight_decay": 0.1}, {}, False),
    ],
)
def test_texts_behind_virtual_tokens_and_weight_decay_of_lora_plus_were_wrong(
    method: str, train: dict[str, Any], evaluation: dict[str, Any], wrong: bool
) -> None:
    config = {"method": {"_target_": method}, "train": train, "eval": {"one": evaluation}}
    assert bool(faults.outdated(Result({"identity_rule": 6}, {}, config=config))) == wrong
    assert faults.outdated(Result({"identity_rule": 7}, {}, config=config)) is None


@pytest.mark.parametrize(
    ("router_logits", "weight", "steps", "wrong"),
    [(True, 0.1, 4, True), (False, 0.1, 4, False), (True, 0.0, 4, False), (True, 0.1, None, False)],
)
def test_a_record_trained_without_the_loss_of_the_routers_is_run_again(
    router_logits: bool, weight: float, steps: int | None, wrong: bool, tmp_path: Path
) -> None:
    base = write("mixtral", tmp_path)
    settings = json.loads((base / "config.json").read_text())
    settings |= {"output_router_logits": router_logits, "router_aux_loss_coef": weight}
    (base / "config.json").write_text(json.dumps(settings))
    config = {"model": {"name_or_path": str(base)}, "method": {"r": 2}, "train": {"steps": steps}}
    assert faults.right_since(config) == (5 if wrong else 2)
    assert bool(faults.outdated(Result({"identity_rule": 4}, {}, config=config))) == wrong
    assert faults.outdated(Result({"identity_rule": 5}, {}, config=config)) is None


@pytest.mark.parametrize(
    ("own", "beams", "method", "wrong"),
    [
        ({"repetition_penalty": 1.3}, 2, "peft.LoraConfig", True),
        ({"no_repeat_ngram_size": 3}, 1, "peft.PrefixTuningConfig", True),
        ({"min_new_tokens": 4}, 1, "peft.PrefixTuningConfig", True),
        ({"repetition_penalty": 1.3}, 1, "peft.LoraConfig", False),  # written token by token, without penalties
        ({"temperature": 0.6, "do_sample": True}, 2, "peft.LoraConfig", False),  # which was never heeded
        (None, 2, "peft.LoraConfig", False),
        # Values that change nothing, which many checkpoints hold.
        ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}, 2, "peft.LoraConfig", False),
        ({"length_penalty": 1.0, "early_stopping": False, "num_beam_groups": 1}, 2, "peft.LoraConfig", False),
        ({"length_penalty": 0.0}, 2, "peft.LoraConfig", True),
        ({"length_penalty": 2.0, "early_stopping": True}, 1, "peft.PrefixTuningConfig", False),  # of beams alone
        ({"forced_eos_token_id": 0}, 1, "peft.PrefixTuningConfig", True),
    ],
)
def test_a_record_whose_texts_the_bases_own_generation_settings_changed_is_run_again_with_its_weights_kept(
    own: dict[str, Any] | None, beams: int, method: str, wrong: bool, tmp_path: Path
) -> None:
    base = write("llama", tmp_path)
    (base / "generation_config.json").unlink(missing_ok=True)
    if own is not None:
        (base / "generation_config.json").write_text(json.dumps(own))
    config = {
        **{"model": {"name_or_path": str(base)}, "method": {"_target_": method}, "targets": {"roles": ["q"]}},
        "eval": {"written": {"num_beams": beams, "max_new_tokens": 8}, "loss": {}},
    }
    held = Result({"identity_rule": 3}, {}, config=config)
    assert bool(faults.outdated(held)) == wrong
    assert faults.outdated(held, training=True) is None
    assert faults.right_since(config) == 1
    assert faults.outdated(Result({"identity_rule": 4}, {}, config=config)) is None
    assert faults.outdated(Result({"identity_rule": 3}, {}, config=config | {"eval": {"loss": {}}})) is None


USER_TURN = {"role": "user", "content": "a"}
CALLED = [{"type": "function", "function": {"name": "add", "arguments": {}}}]


@pytest.mark.parametrize(
    ("template", "turn", "wrong"),
    [
        (CLOSED, {"content": "b", "reasoning_content": "c"}, True),
        (CLOSED, {"content": "", "tool_calls": CALLED}, True),
        (CLOSED, {"content": ""}, True),
        (CLOSED, {"content": "<think>c</think>b"}, True),
        (CLOSED, {"content": "b"}, False),  # which begins where its content does
        (CHATML, {"content": "b", "reasoning_content": "c"}, False),
        (None, {"content": "b", "reasoning_content": "c"}, False),
    ],
)
def test_a_record_of_turns_that_the_generation_prompt_does_not_begin_is_run_again(
    template: str | None, turn: dict[str, Any], wrong: bool, folder: Path
) -> None:
    if template:
        (folder / "chat_template.jinja").write_text(template)
    rows, plain = folder.with_name("rows.jsonl"), {"messages": [USER_TURN, {"role": "assistant", "content": "b"}]}
    rows.write_text(json.dumps(plain) + "\n" + json.dumps({"messages": [USER_TURN, {"role": "assistant"} | turn]}))
    dataset = {"path": str(rows), "reader": identity.CONVERSATIONS, "prompt": "{prompt}", "answer": "{answer}"}
    config: dict[str, Any] = {"model": {"name_or_path": str(folder)}, "dataset": dataset | {"chat": bool(template)}}
    held = Result({"identity_rule": 4}, {}, config=config)
    assert bool(faults.outdated(held)) == bool(faults.outdated(held, training=True)) == wrong
    assert faults.right_since(config) == (5 if wrong else 2)
    assert faults.outdated(Result({"identity_rule": 5}, {}, config=config)) is None
    rows.write_text(json.dumps(plain))
    assert faults.outdated(held) is None
    tested = config | {"eval": {"loss": {"path": str(rows)}}, "dataset": config["dataset"] | {"test_path": str(rows)}}
    assert faults.outdated(Result({"identity_rule": 4}, {}, config=tested)) is None
    rows.unlink()  # nobody knows any more
    assert bool(faults.outdated(held)) == (template is CLOSED)


def of_conversation(folder: Path, template: str, turn: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a record whose base has this chat template and whose rows are a question and this turn."""
    (folder / "chat_template.jinja").write_text(template)
    rows = folder.with_name("rows.jsonl")
    rows.write_text(json.dumps({"messages": [USER_TURN, {"role": "assistant"} | turn]}))
    dataset = {"path": str(rows), "reader": identity.CONVERSATIONS, "prompt": "{prompt}", "answer": "{answer}"}
    return {"model": {"name_or_path": str(folder)}, "dataset": dataset | {"chat": True}}


@pytest.mark.parametrize(
    ("template", "turn", "wrong"),
    [
        (BEGUN.replace("<|im_end|>", "</s>"), {"content": "b"}, True),
        (CLOSED, {"content": "b", "reasoning_content": "c"}, False),
        (OTHER_END, {"content": "b", "thinking": "c"}, True),
        (OTHER_END, {"content": "b"}, False),
        (CHATML, {"content": "b", "thinking": "c"}, False),
    ],
)
def test_a_record_whose_turns_ended_or_began_at_another_place_is_run_again(
    template: str, turn: dict[str, Any], wrong: bool, folder: Path
) -> None:
    config = of_conversation(folder, template, turn)
    held = Result({"identity_rule": 7}, {}, config=config)
    assert bool(faults.outdated(held)) == bool(faults.outdated(held, training=True)) == wrong
    assert faults.outdated(Result({"identity_rule": 8}, {}, config=config)) is None


GIVEN = "{% set a = call.function.arguments %}{{ call.function.name }}{% if a is string %}{{ a }}{% else %}"
ITEMS = "{% for k, v in a | items %}{{ k }}={{ v }}{% endfor %}{% endif %}"
CALLS = CHATML.replace("<|im_end|>", "{% for call in m.tool_calls or [] %}" + GIVEN + ITEMS + "{% endfor %}<|im_end|>")


@pytest.mark.parametrize(
    ("template", "turn", "wrong"),
    [
        (CALLS, {"content": "b"}, False),
        (CALLS, {"content": "", "tool_calls": CALLED}, True),
        (CLOSED, {"content": "", "tool_calls": CALLED}, False),
    ],
)
def test_a_record_whose_calls_were_in_another_form_is_run_again(
    template: str, turn: dict[str, Any], wrong: bool, folder: Path
) -> None:
    config = of_conversation(folder, template, turn)
    assert bool(faults.outdated(Result({"identity_rule": 10}, {}, config=config))) == wrong
    assert faults.outdated(Result({"identity_rule": 11}, {}, config=config)) is None


@pytest.mark.parametrize(
    ("template", "column", "wrong"),
    [
        ("{a[0]}", '["x", "y"]', True),
        ("{q} {a[0][t]}", '[{"t": "x"}]', True),
        ("{a[0]}", ["x", "y"], False),
        ("{a[t]}", {"t": "x"}, False),
        ("{a}", '["x", "y"]', False),
        ("{q}", '["x", "y"]', False),
    ],
)
@pytest.mark.parametrize("by_dataset", [False, True])
def test_a_record_of_items_of_json_text_is_run_again_and_keeps_its_weights_if_only_the_evaluation_took_them(
    template: str, column: Any, wrong: bool, by_dataset: bool, scratch: Path
) -> None:
    (scratch / "rows.jsonl").write_text(json.dumps({"q": "q", "a": column}))
    own, plain = {"prompt": "{q}", "answer": template}, {"prompt": "{q}", "answer": "{q}"}
    config = {
        "dataset": {"path": str(scratch / "rows.jsonl")} | (plain if by_dataset else own),
        "eval": {"written": own if by_dataset else {}},
    }
    held = Result({"identity_rule": 4}, {}, config=config)
    assert bool(faults.outdated(held)) == wrong
    assert bool(faults.outdated(held, training=True)) == (wrong and not by_dataset)
    assert faults.right_since(config) == (5 if wrong and not by_dataset else 1)
    assert faults.outdated(Result({"identity_rule": 5}, {}, config=config)) is None


@pytest.mark.parametrize(("drops", "cut", "wrong"), [(True, 2, True), (True, 0, False), (False, 2, False)])
def test_a_record_whose_long_rows_were_cut_though_they_were_to_be_left_out_is_run_again(
    drops: bool, cut: int, wrong: bool
) -> None:
    config = {"dataset": {"drop_long": drops}}
    held = Result({"identity_rule": 8}, {}, config=config, train_info={"steps": 4, "truncated_rows": cut})
    assert bool(faults.outdated(held)) == bool(faults.outdated(held, training=True)) == wrong
    assert faults.right_since(config) == (9 if drops else 1)
    held.run_info["identity_rule"] = 9
    assert faults.outdated(held) is None


@pytest.mark.parametrize(
    ("task", "classes", "wrong"),
    [("causal_lm", ["1", "10"], True), ("seq_cls", ["1", "10"], False), ("causal_lm", ["1", "20"], False)],
)
def test_a_record_of_classes_whose_names_begin_alike_is_evaluated_again(
    task: str, classes: list[str], wrong: bool
) -> None:
    node = {"_target_": "peftsweep.evaluation.evaluate.classification", "classes": classes}
    config = {"model": {"name_or_path": "tiny", "task": task}, "eval": {"stars": node}}
    held = Result({"identity_rule": 8}, {}, config=config)
    assert bool(faults.outdated(held)) == wrong
    assert faults.outdated(held, training=True) is None
    assert faults.outdated(Result({"identity_rule": 9}, {}, config=config)) is None


@pytest.mark.parametrize(("end", "beams", "wrong"), [(28, 2, True), (28, 1, False), (2, 2, False)])
def test_a_record_whose_texts_held_their_end_mark_is_evaluated_again(
    end: int, beams: int, wrong: bool, tmp_path: Path
) -> None:
    base = write("llama", tmp_path)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    node = {"num_beams": beams, "max_new_tokens": 8}
    config = {"model": {"name_or_path": str(base)}, "method": {}, "eval": {"written": node, "loss": {}}}
    held = Result({"identity_rule": 8}, {}, config=config)
    assert bool(faults.outdated(held)) == wrong
    assert faults.outdated(held, training=True) is None
    assert faults.outdated(Result({"identity_rule": 9}, {}, config=config)) is None


OTHER_KEY = CLOSED.replace("reasoning_content", "reasoning")  # which transformers fills from no other key


@pytest.mark.parametrize(
    ("template", "key", "wrong"),
    [(OTHER_KEY, "reasoning_content", True), (OTHER_KEY, "reasoning", False), (CHATML, "reasoning", False)],
)
def test_a_record_that_left_out_reasoning_under_another_key_is_run_again(
    template: str, key: str, wrong: bool, folder: Path
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    rows = folder.with_name("rows.jsonl")
    rows.write_text(json.dumps({"messages": [USER_TURN, {"role": "assistant", "content": "b", key: "c"}]}))
    dataset = {"path": str(rows), "reader": identity.CONVERSATIONS, "prompt": "{prompt}", "answer": "{answer}"}
    config: dict[str, Any] = {"model": {"name_or_path": str(folder)}, "dataset": dataset | {"chat": True}}
    held = Result({"identity_rule": 8}, {}, config=config)
    assert bool(faults.outdated(held)) == bool(faults.outdated(held, training=True)) == wrong
    assert faults.outdated(Result({"identity_rule": 9}, {}, config=config)) is None


def test_a_record_of_the_first_version_is_known_to_be_wrong_by_its_tokens_and_classes(folder: Path) -> None:
    assert told(folder) == ""
    assert "beginning-of-sequence" in told(folder, {"truncated_rows": 3})
    edited = json.loads((folder / "tokenizer.json").read_text())
    edited["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    edited["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    ends = folder.with_name("ends")
    shutil.copytree(folder, ends)
    (ends / "tokenizer.json").write_text(json.dumps(edited))
    assert "between prompt and answer" in told(ends)
    shape = json.loads((folder / "config.json").read_text())
    shape |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}
    (folder / "config.json").write_text(json.dumps(shape))
    as_classifier = {"model": {"name_or_path": str(folder), "task": "seq_cls"}}
    assert told(folder, **as_classifier, dataset={"classes": ["no", "yes"]}) == ""
    assert "order of the dataset's" in told(folder, **as_classifier, dataset={"classes": ["yes", "no"]})


def test_a_checkpoint_that_a_mended_fault_made_wrong_is_not_gone_on_from() -> None:
    from peftsweep.training import checkpoint

    assert faults.right_since({"train": {"accumulation": 1}}) == 1
    assert faults.right_since({"train": {"accumulation": 2}}) == 2
    assert checkpoint.stamp("it", CPU, 2) != checkpoint.stamp("it", CPU, 1) == checkpoint.stamp("it", CPU)


# ---- caches ----------------------------------------------------------------------------------------


def retemplate(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


def add_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["plus"])


def shorten(tokenizer: Any) -> None:
    tokenizer.model_max_length = 16


@pytest.mark.parametrize("change", [retemplate, add_token, shorten])
def test_rows_in_tokens_are_kept_by_the_tokenizer_s_content(
    change: Callable[[Any], None], folder: Path, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "MIN_CACHED_SECONDS", 0.0)  # on the disk too
    monkeypatch.setattr(build, "_TOKENS", {})
    one = compose(*QUICK)
    assert one.rows is not None

    def kept() -> set[str]:
        build.training_tokens(one, model.load_tokenizer(one.config.model), one.rows.train if one.rows else [])
        return {file.name for file in Path("multirun/default/.tokens").iterdir()}

    first = kept()
    build._TOKENS.clear()
    assert kept() == first
    tokenizer = model.load_tokenizer(one.config.model)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    assert len(kept() - first) == 1


def test_rows_in_tokens_follow_an_edited_tokenizer(folder: Path, compose: Compose) -> None:
    one = compose(*QUICK)
    assert one.rows is not None
    before = build.training_tokens(one, model.load_tokenizer(one.config.model), one.rows.train)
    rewrite(folder / "tokenizer_config.json", lambda settings: settings.update(model_max_length=16))
    after = build.training_tokens(one, model.load_tokenizer(one.config.model), one.rows.train)
    assert max(len(row.ids) for row in before) > 16 == max(len(row.ids) for row in after)


@pytest.mark.parametrize("key", ["dataset.max_length=20", 'dataset.answer="{answer}."'])
def test_rows_in_tokens_are_kept_by_every_key_of_the_dataset(key: str, compose: Compose) -> None:
    one, other = compose(*QUICK), compose(*QUICK, key)
    assert one.rows is not None
    tokenizer = model.load_tokenizer(one.config.model)
    tokens = [build.training_tokens(each, tokenizer, one.rows.train) for each in (one, other)]
    assert tokens[0] != tokens[1]


def test_local_rows_are_read_again_when_their_file_changes(questions: Path, compose: Compose) -> None:
    words = ["dataset=file", 'dataset.prompt="{question}"', 'dataset.answer="{answer}"', f"dataset.path={questions}"]
    before = compose(*words)
    edit(questions, questions.read_text().index("It is 20"))
    assert compose(*words).training != before.training


def test_forecasts_follow_the_model_s_files_and_the_classes(folder: Path, compose: Compose) -> None:
    words = [*SMALL, *LOCAL, "method=full"]
    before = forecast.check(compose(*words)), forecast.prediction(compose(*words))
    rewrite(folder / "config.json", lambda settings: settings.update(num_hidden_layers=2))
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not re.search(r"layers\.[2-9]", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    after = forecast.check(compose(*words)), forecast.prediction(compose(*words))
    assert after[0].total_parameters != before[0].total_parameters
    assert before[1] is not None
    assert after[1] is not None
    assert after[1].weights_bytes < before[1].weights_bytes
    head = [*LOCAL, "model.task=seq_cls", "dataset=tiny_direction"]
    two, three = (
        forecast.check(compose(*head, f"dataset.classes=[{names}]")) for names in ("less,more", "less,more,other")
    )
    assert three.trainable_parameters != two.trainable_parameters


def test_what_a_checkpoint_lacks_follows_its_files(folder: Path) -> None:
    config = ModelConfig(name_or_path=str(folder))
    assert model.check_weights(config) == []
    file = folder / "model.safetensors"
    edit(file, file.read_bytes().index(b"model.norm.weight"))  # another name
    with pytest.raises(InputError, match=r"lacks weights of LlamaForCausalLM.*: model\.norm\.weight$"):
        model.check_weights(config)
    rewrite(folder / "config.json", lambda settings: settings.update(tie_word_embeddings=False))
    with pytest.raises(InputError, match=r"lm_head\.weight, model\.norm\.weight$"):
        model.check_weights(config)


@pytest.mark.parametrize(
    ("words", "alike"),
    [
        (["train.steps=7", "train.batch_size=2", "quant=4bit", "eval.perplexity.samples=3", "seed=1"], True),
        (["method.r=3"], False),
        (["targets=qv"], False),
        (["train.optimizer=SGD"], False),
        (["train.autocast_adapter_dtype=false"], False),
        (["model.dtype=bfloat16"], False),
    ],
)
def test_sizes_are_shared_by_trials_that_train_the_same_parameters(
    words: list[str], alike: bool, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FORECASTS", "_SIZES"):
        monkeypatch.setattr(forecast, name, {})
    attached, real = list[str](), forecast.on_skeleton

    def counted(trial: Trial, *others: Any) -> Any:
        attached.append(trial.identity)
        return real(trial, *others)

    monkeypatch.setattr(forecast, "on_skeleton", counted)
    first, second = (forecast.check(compose(*QUICK, *more)) for more in ([], words))
    assert len(attached) == (1 if alike else 2)
    assert (second.attached == first.attached) or not alike


def test_sizes_of_a_method_that_plans_its_ranks_count_the_steps(compose: Compose) -> None:
    def key(*words: str) -> str:
        return identity.sizes_key(compose(*QUICK, *words))

    assert key("method=adalora", "train.steps=20") != key("method=adalora", "train.steps=30")
    assert key("train.steps=20") == key("train.steps=30")


def test_the_configuration_of_a_local_model_is_read_again_when_its_text_changes(folder: Path) -> None:
    config = ModelConfig(name_or_path=f"{folder}")
    before = model.architecture(config)
    before.num_hidden_layers = 99  # by who got it: the next one is as the file says
    assert model.architecture(config).num_hidden_layers == 4
    rewrite(folder / "config.json", lambda settings: settings.update(num_hidden_layers=3))
    assert model.architecture(config).num_hidden_layers == 3


def test_a_kept_base_and_a_pack_follow_the_model_s_files(
    folder: Path, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_KEEP_BASES", [True])
    monkeypatch.setattr(build, "_BASE_CACHE", [])
    one, sums = compose(*QUICK), list[float]()
    shared = packing.shared_settings(one)
    tokenizer = model.load_tokenizer(one.config.model)
    for place in (None, None, *range(2**20, 2**20 + 4)):  # a number of 32 bits
        if place is not None:
            edit(folder / "model.safetensors", place)
        sums.append(sum(p.double().sum().item() for p in build.load_base(one, tokenizer, CPU).parameters()))
    assert sums[0] == sums[1] != sums[-1]
    assert packing.shared_settings(one) != shared


def test_scores_of_the_base_are_kept_by_the_tokenizer_s_content(folder: Path, compose: Compose, scratch: Path) -> None:
    one = compose(*QUICK)
    tokenizer = model.load_tokenizer(one.config.model)
    base = build.load_base(one, tokenizer, CPU)
    assert one.rows is not None
    test = build.test_examples(one, "perplexity", one.rows, tokenizer)
    for change in (lambda _: None, lambda _: None, add_token):
        change(tokenizer)
        scores.base_scores(one, "perplexity", test, base, tokenizer, scratch)
    assert len(list((scratch / "base").glob("causal_lm-none-*/perplexity-*.jsonl"))) == 2


def test_answers_of_the_base_come_with_its_scores_or_are_made_again(compose: Compose, scratch: Path) -> None:
    one = compose(*QUICK)
    tokenizer = model.load_tokenizer(one.config.model)
    base = build.load_base(one, tokenizer, CPU)
    assert one.rows is not None
    test = build.test_examples(one, "perplexity", one.rows, tokenizer)

    def kept() -> tuple[dict[str, Any], Path]:
        found = scores.base_scores(one, "perplexity", test, base, tokenizer, scratch)
        return found, scratch / found["predictions"]

    (first, file), (second, same) = kept(), kept()
    assert (first, file) == (second, same)
    lines = record.read_lines(file)
    assert [line["prompt"] for line in lines] == [row.prompt for row in test]
    sums, counts = ([line[key] for line in lines] for key in ("log_likelihood", "tokens"))
    assert metrics.perplexity(sums, counts)["perplexity"].value == pytest.approx(first["perplexity"]["value"])
    file.unlink()  # as in a study of a version that kept scores alone
    assert record.read_lines(kept()[1]) == lines


# ---- the record ------------------------------------------------------------------------------------


def test_the_record_holds_hashes_of_model_tokenizer_and_rows(folder: Path, compose: Compose) -> None:
    def about(*words: str) -> dict[str, Any]:
        one = compose(*QUICK, *words)
        assert one.rows is not None
        tokenizer = model.load_tokenizer(one.config.model)
        return stages.row_sources(one, build.load_base(one, tokenizer, CPU), tokenizer, one.rows)

    first = about()
    assert all(len(first[key]) == 64 for key in ("model_sha", "tokenizer_sha", "dataset_sha"))
    assert first["model_created_at"] is first["dataset_created_at"] is None  # the hub has no part in it
    assert about("dataset.samples=8")["dataset_sha"] != first["dataset_sha"]
    rewrite(folder / "tokenizer_config.json", lambda settings: settings.update(model_max_length=512))
    second = about()
    assert second["tokenizer_sha"] != first["tokenizer_sha"]
    assert second["model_sha"] != first["model_sha"]  # its folder holds the tokenizer
    assert second["dataset_sha"] == first["dataset_sha"]


def test_the_hub_s_commits_and_dates_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime
    from types import SimpleNamespace

    import huggingface_hub

    def repo_info(_: Any, repository: str, *, revision: str | None, repo_type: str, timeout: float) -> Any:
        assert (repository, revision, repo_type) == ("org/rows", "main", "dataset")
        return SimpleNamespace(sha="abc", created_at=datetime(2024, 9, 18, tzinfo=UTC))

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(hub, "problem", lambda: None)
    assert fingerprint.on_hub("org/rows", "dataset", "main") == ("abc", "2024-09-18T00:00:00+00:00")
    monkeypatch.undo()
    assert fingerprint.on_hub("org/other", "model", None) == (None, None)  # offline


def test_every_option_s_name_in_conf_is_the_one_that_identities_have() -> None:
    """Else an identity of the first rule would have changed."""
    from omegaconf import OmegaConf

    names = set()
    for file in Path(fill.conf_dir()).rglob("*.yaml"):
        nodes = [OmegaConf.to_container(OmegaConf.load(file), resolve=False)]
        while nodes:
            node = nodes.pop()
            if isinstance(node, dict):
                names |= {node["_target_"]} if "hydra" not in file.parts and "_target_" in node else set()
                nodes += node.values()
    assert len(names) > 40
    former = {now: before for before, now in former_names.MODULES.items()}
    expected = {name: former.get(name.rpartition(".")[0], name.rpartition(".")[0]) for name in names}
    assert {name: identity.canonical_name(name).rpartition(".")[0] for name in names} == expected
