"""What the headers of a checkpoint's files say before anything is loaded: what is missing, left out, or its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from peftsweep import InputError, cli
from peftsweep.config.compose import Trial
from peftsweep.evaluation import decoding
from peftsweep.forecast import forecast
from peftsweep.models import attach, compatibility, model, parts, saved
from peftsweep.models.checkpoint import weights
from peftsweep.models.quantised.layers import is_quantised
from peftsweep.schema import ModelConfig, TargetsConfig, Task
from peftsweep.study.record import Result, Status
from tests.architectures import SIZES, make, write

Compose = Callable[..., Trial]
CPU = torch.device("cpu")
GONE = "model.layers.1.self_attn.q_proj.weight"


def in_shards(folder: Path, places: dict[str, str] | None = None) -> None:
    """Split the checkpoint's file in two; the index has ``places`` in place of the right ones where they are given."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    right = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in names:
        own = {name: tensors[name] for name in tensors if right[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": right | (places or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FORMS: dict[str, Callable[[Path], None]] = {
    "one file": lambda folder: None,
    "shards": in_shards,
    "shards of an index that lies": lambda folder: in_shards(folder, {GONE: "model-00002-of-00002.safetensors"}),
    "torch's format": as_pickle,
}


def change(folder: Path, changed: dict[str, torch.Tensor | None]) -> None:
    """Put other weights in the place of those in the one file of the checkpoint; None takes one out."""
    held: dict[str, torch.Tensor | None] = {**load_file(folder / "model.safetensors"), **changed}
    kept = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_missing_are_refused_before_anything_is_loaded(
    form: str, compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, other = write("llama", tmp_path / "whole"), write("llama", tmp_path / "other")
    change(other, {GONE: None})
    for folder in (whole, other):
        FORMS[form](folder)
    monkeypatch.setattr(model, "load", lambda *_, **__: pytest.fail("was loaded"))
    forecast.check(compose("model=causal_lm", f"model.name_or_path={whole}"))
    with pytest.raises(InputError, match=rf"^model\.name_or_path=.*other: the checkpoint lacks weights of .*: {GONE}$"):
        forecast.check(compose("model=causal_lm", f"model.name_or_path={other}"))


def test_weights_of_other_shapes_and_left_out_ones_are_refused_before_anything_is_loaded(
    compose: Compose, tmp_path: Path
) -> None:
    def check(changed: dict[str, torch.Tensor | None]) -> None:
        folder = write("llama", tmp_path / str(len([*tmp_path.iterdir()])))
        change(folder, changed)
        forecast.check(compose("model=causal_lm", f"model.name_or_path={folder}"))

    with pytest.raises(InputError, match=r"other shapes: model\.layers\.0\.mlp\.up_proj\.weight"):
        check({"model.layers.0.mlp.up_proj.weight": torch.zeros(10, 32)})
    with pytest.raises(InputError, match=r"leaves out weights .*: model\.layers\.0\.self_attn\.q_proj\.bias"):
        check({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    with pytest.raises(InputError, match=r"weights are quantised, with their scales beside them"):
        check({"model.layers.0.self_attn.q_proj.weight_scale": torch.zeros(1)})
    check({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})  # a buffer


RENAMED: list[Any] = ["mixtral", "gpt2", "gemma3"]
RENAMED += [pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt_oss", "jamba")]  # experts, as in the first


@pytest.mark.parametrize("kind", RENAMED)
def test_the_names_in_the_files_may_be_others_than_the_model_s(kind: str, compose: Compose, tmp_path: Path) -> None:
    """Experts are apart in the files of a mixture, parts have prefixes of their own, a tied head is in no file."""
    folder = write(kind, tmp_path / kind)
    forecast.check(compose("model=causal_lm", f"model.name_or_path={folder}"))
    name = next(
        name for name in load_file(folder / "model.safetensors") if name.endswith("norm.weight") or "ln_" in name
    )
    change(folder, {name: None})
    with pytest.raises(InputError, match="the checkpoint lacks weights of"):
        forecast.check(compose("model=causal_lm", f"model.name_or_path={folder}"))


def test_a_folder_without_weights_can_be_planned(compose: Compose, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    assert forecast.check(compose("model=causal_lm", f"model.name_or_path={folder}")).total_parameters == 60896


@pytest.mark.parametrize("form", FORMS)
def test_a_head_of_its_own_is_counted_in_any_form_of_files(form: str, compose: Compose, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama", tie_word_embeddings=True)
    change(folder, {"lm_head.weight": torch.randn(533, 32)})
    FORMS[form](folder)
    planned = forecast.check(compose("model=causal_lm", f"model.name_or_path={folder}", "method=full"))
    base = model.load(ModelConfig(name_or_path=str(folder)), None, CPU)
    assert planned.total_parameters == parts.count(base).total == 60896 - 8192


# ---- classifiers -----------------------------------------------------------------------------------


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """A BERT as it is pretrained, without the pooler that its classifier has."""
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SIZES)).save_pretrained(tmp_path / "masked")
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(tmp_path / "masked")
    return tmp_path / "masked"


def classifier(masked: Path) -> Path:
    """The same with a pooler and a head."""
    base = AutoModelForSequenceClassification.from_pretrained(masked, num_labels=2)
    base.save_pretrained(masked.parent / "whole")
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(masked.parent / "whole")
    return masked.parent / "whole"


CLASSIFY = ["model=encoder", "dataset=tiny_direction", "method=lora", "targets=qv"]


@pytest.mark.parametrize("quant", ["none", pytest.param("4bit", marks=pytest.mark.slow)])
def test_the_plan_counts_the_parts_that_a_classifier_s_checkpoint_lacks(
    quant: str, compose: Compose, masked: Path
) -> None:
    words = [*CLASSIFY, f"model.name_or_path={masked}", f"quant={quant}"]
    planned = forecast.check(compose(*words))
    few = ["train.steps=2", "dataset.samples=16", "eval.tiny_direction.samples=4", "train.batch_size=8", "quiet=true"]
    result: Result = cli.run_one([*words, *few, "device=cpu"])
    assert result.status is Status.success, result.error
    sizes = (planned.trainable_parameters, planned.total_parameters)
    assert sizes == (result.train_info["trainable_parameters"], result.train_info["total_parameters"])
    whole = forecast.check(compose(*words, f"model.name_or_path={classifier(masked)}")).trainable_parameters
    assert planned.trainable_parameters == (whole or 0) + 32 * 32 + 32  # the pooler
    assert result.folder
    file = result.folder / "adapter" / "adapter_model.safetensors"
    assert planned.adapter_bytes == file.stat().st_size


def test_a_skeleton_spares_what_a_classifier_s_checkpoint_lacks(compose: Compose, masked: Path) -> None:
    from peftsweep.config import build
    from peftsweep.forecast.predict import skeleton

    trial = compose(*CLASSIFY, f"model.name_or_path={masked}", "quant=4bit")
    base = skeleton(trial.config.model, build.quantization(trial), classes=2)
    loaded = model.load(trial.config.model, build.quantization(trial), CPU, 2)
    names = [[name for name, module in one.named_modules() if is_quantised(module)] for one in (base, loaded)]
    assert names[0] == names[1]
    assert "bert.pooler.dense" not in names[0]


def test_a_classifier_of_other_weights_is_refused_before_anything_is_loaded(compose: Compose, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    AutoConfig.for_model("bert", **SIZES).save_pretrained(folder)
    with pytest.raises(InputError, match=r"the checkpoint belongs to another model; it lacks bert\.embeddings"):
        forecast.check(compose(*CLASSIFY, f"model.name_or_path={folder}"))


def test_what_cannot_be_foreseen_is_left_to_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write("llama", tmp_path / "llama")
    change(folder, {GONE: None})
    config = ModelConfig(name_or_path=str(folder))
    with pytest.raises(InputError, match=GONE):
        model.check_weights(config)
    monkeypatch.setattr(model, "_LACKING", {})
    monkeypatch.setattr(weights, "stored", lambda folder: {"a": torch.ones(1)} | {None: None})  # which ends in an error
    assert model.check_weights(config) == []


# ---- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("marks", "fits"), [("</s>", False), ([2, "x"], False), ([2, 5], True), (None, True)])
def test_end_marks_that_are_no_tokens_are_refused(marks: Any, fits: bool, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": marks}))
    config = ModelConfig(name_or_path=str(folder))
    if fits:
        saved.check_files(config)
        model.load(config, None, CPU)
        return
    for check in (saved.check_files, lambda one: model.load(one, None, CPU)):
        with pytest.raises(InputError, match=r"^model\.name_or_path=.*llama: eos_token_id=.* in its generation_config"):
            check(config)
    saved.check_files(ModelConfig(name_or_path=str(folder), task=Task.seq_cls))  # writes nothing


def test_generation_settings_that_are_no_object_are_refused_before_a_sweep(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"llama: generation_config\.json cannot be read"):
        saved.check_files(ModelConfig(name_or_path=str(folder)))


INSTALLED = [
    ("5.23.4", "0.21.2", False),
    ("5.24.0", "0.21.2", True),
    ("5.24.0.dev0", "0.21.3", True),
    ("6.0.1", "0.21.0", True),
    ("5.24.0", "0.22.0", False),
]


@pytest.mark.parametrize(("of_transformers", "of_peft", "refused"), INSTALLED)
def test_packages_that_write_wrong_texts_with_virtual_tokens_are_refused(
    of_transformers: str, of_peft: str, refused: bool, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, "version", {"transformers": of_transformers, "peft": of_peft}.__getitem__)
    with pytest.raises(InputError) if refused else nullcontext():
        compatibility.check_generation(2)
    monkeypatch.setattr(forecast, "_FORECASTS", {})
    forecast.check(compose("method=prefix_tuning", "eval=[perplexity]"))
    forecast.check(compose("method=lora"))
    if refused:
        message = (
            rf"PEFT {of_peft} with transformers {of_transformers} generates wrong texts where a method has virtual"
        )
        with pytest.raises(InputError, match=message):
            forecast.check(compose("method=prefix_tuning"))
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        adapted = attach.attach(make("llama"), prefix, TargetsConfig(), {})
        tokenizer = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
        with pytest.raises(InputError, match=message):
            decoding.generate(adapted, tokenizer, ["a"], max_new_tokens=2)


# ---- tokenizers and adapters -------------------------------------------------------------------------


def test_a_length_of_a_tokenizer_that_is_no_number_is_one_line(compose: Compose, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "8"}))
    with pytest.raises(
        InputError, match=r"llama: model_max_length='8' in its tokenizer_config\.json: must be a number"
    ):
        forecast.check(compose("model=causal_lm", f"model.name_or_path={folder}"))


def test_an_adapter_of_other_shapes_is_one_line(tmp_path: Path) -> None:
    adapted: Any = attach.attach(make("llama"), LoraConfig(r=2), TargetsConfig(modules=["q_proj"]), {})
    saved.save(adapted, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 4}))
    message = r"^adapter .*another adapter_config\.json: \S*q_proj\.lora_\S+ has the shape \[\S.*\] in the file, and \["
    with pytest.raises(InputError, match=message) as error:
        saved.restore(make("llama"), tmp_path)
    assert "\n" not in str(error.value)
