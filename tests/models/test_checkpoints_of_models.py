"""What a folder that is named as a model may lack, and how many tokens the model may see."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import architectures as table
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from peftsweep import InputError, cli
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.evaluation import decoding
from peftsweep.forecast import forecast
from peftsweep.models import attach, model, parts, probe
from peftsweep.models import saved as models_saved
from peftsweep.models.quantised import layers
from peftsweep.schema import Dtype, ModelConfig, TargetsConfig, Task
from peftsweep.study.record import Result, Status
from tests.architectures import SIZES, make, write
from tests.conftest import SMALL

Compose = Callable[..., Trial]
CPU = torch.device("cpu")
LIMITS: list[tuple[str, dict[str, Any], int | None]] = [
    ("llama", {}, 128),
    ("gpt2", {}, 64),
    ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, 128),  # its table has two rows more
    ("roberta", {"pad_token_id": 1}, 126),  # positions begin after that of the padding
    ("bert", {}, 128),
    ("gemma3", {}, 128),  # said by the configuration of its text part
    ("mamba", {}, None),
]


def config_of(folder: Path, **options: Any) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), **options)


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put another weight in the place of one in the checkpoint; None takes it out."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.pop(name)
    if tensor is not None:
        weights[name] = tensor
    save_file(weights, file, metadata={"format": "pt"})


# ---- positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options", "limit"), LIMITS)
def test_how_many_tokens_a_model_may_see(kind: str, options: dict[str, Any], limit: int | None) -> None:
    if kind in ("llama", "gpt2", "gemma3", "opt"):
        base: Any = make(kind)
    else:
        sizes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings" or kind != "mamba"}
        base = model.CLASSES[Task.causal_lm].from_config(AutoConfig.for_model(kind, **sizes | options))
    assert model.token_limit(base) == limit
    if limit is not None and kind != "gemma3":
        base(input_ids=torch.full((1, limit), 7))  # fits


@pytest.mark.parametrize("method", ["lora", pytest.param("prompt_tuning", marks=pytest.mark.slow)])
def test_rows_are_no_longer_than_the_positions_of_gpt_2(method: str, tmp_path: Path) -> None:
    """Beyond them it has no embedding: an IndexError here, an assertion that kills the worker on CUDA."""
    folder = write("gpt2", tmp_path / "gpt2")
    rows = [{"question": f"{n} " + "many words " * 40, "answer": f"more of them {n}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model=causal_lm", f"model.name_or_path={folder}", "model.dtype=float32", "dataset=file", "quiet=true"]
    words += ["dataset.path=rows.jsonl", 'dataset.prompt="{question}"', 'dataset.answer="{answer}"', "train.steps=2"]
    words += ["eval=[perplexity,exact_match,text]", "eval.text.path=text.jsonl", "train.batch_size=4"]
    words += ["eval.exact_match.max_new_tokens=20"]
    story = {"question": "a story without an end " * 40, "answer": " or nearly so", "text": "a story " * 90}
    (tmp_path / "text.jsonl").write_text(json.dumps(story) + "\n")
    result = cli.run_one([*words, f"method={method}"])  # the tokens of a prompt take positions too
    assert result.status is Status.success, result.error
    assert result.train_info["truncated_rows"] == result.train_info["training_rows"]


def test_a_prompt_leaves_room_for_what_is_written(compose: Compose, tmp_path: Path) -> None:
    folder = write("gpt2", tmp_path / "gpt2")
    words = ("model=causal_lm", f"model.name_or_path={folder}", "eval.tiny_math.max_new_tokens=64")
    with pytest.raises(InputError, match=r"eval.tiny_math.max_new_tokens=64: must be below 64"):
        forecast.check(compose(*words))
    base: Any = model.load(config_of(folder), None, CPU)
    tokenizer = model.load_tokenizer(config_of(folder))
    seen: list[int] = []
    base.transformer.wpe.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[0].max())))
    decoding.generate(base, tokenizer, ["many words " * 60], max_new_tokens=40)
    assert max(seen) < 64


def test_memory_is_predicted_for_rows_that_the_model_can_see(compose: Compose, tmp_path: Path) -> None:
    folder = write("gpt2", tmp_path / "gpt2")
    one = compose("model=causal_lm", f"model.name_or_path={folder}", "dataset.max_length=500")
    assert forecast.longest(one).length == 64


# ---- weights ---------------------------------------------------------------------------------------


def test_weights_that_a_causal_model_lacks_are_an_error_that_names_them(tmp_path: Path) -> None:
    missing, mismatched = write("llama", tmp_path / "a"), write("llama", tmp_path / "b")
    change(missing, "model.layers.1.self_attn.q_proj.weight", None)
    change(mismatched, "model.layers.0.mlp.up_proj.weight", torch.zeros(10, 32))
    with pytest.raises(InputError, match=r"lacks weights .*: model.layers.1.self_attn.q_proj.weight"):
        model.load(config_of(missing), None, CPU)
    with pytest.raises(InputError, match=r"other shapes: model.layers.0.mlp.up_proj.weight"):
        model.load(config_of(mismatched), None, CPU)
    model.load(config_of(write("gemma3_text", tmp_path / "c")), None, CPU)  # a tied head is not in the file


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """A BERT as it is pretrained, without the pooler that its classifier has."""
    folder = tmp_path / "masked"
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SIZES)).save_pretrained(folder)
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(folder)
    return folder


def classify(folder: Path, *words: str) -> Result:
    options = [f"model.name_or_path={folder}", "dataset=tiny_direction", "train.steps=3", "dataset.samples=32"]
    options += ["eval.tiny_direction.samples=8", "train.batch_size=8", "quiet=true", "train.learning_rate=1e-2"]
    return cli.run_one(["model=encoder", *options, *words])


@pytest.mark.parametrize("quant", ["none", pytest.param("4bit", marks=pytest.mark.slow)])
def test_what_a_classifier_s_checkpoint_lacks_is_trained_and_saved(masked: Path, quant: str) -> None:
    result = classify(masked, "method=lora", "targets=qv", f"quant={quant}")
    assert result.status is Status.success, result.error
    assert result.folder
    saved = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    assert {name for name in saved if "pooler" in name} == {
        f"base_model.model.bert.pooler.dense.{part}" for part in ("weight", "bias")
    }
    assert result.train_info["reloads"] is True  # onto a base whose pooler was drawn from another seed


@pytest.mark.slow
def test_a_reload_check_sees_what_was_not_saved(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "new_parts", lambda base: [])
    result = classify(masked, "method=lora", "targets=qv")
    assert result.train_info["reloads"] is False
    again = classify(masked, "method=lora", "targets=qv", "eval.tiny_direction.samples=4")
    assert "trained_by" not in again.train_info  # no other trial goes on from what does not come back


def test_a_classifier_of_another_architecture_s_weights_is_refused(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    config = AutoConfig.for_model("bert", **SIZES)
    config.save_pretrained(folder)
    with pytest.raises(InputError, match=r"the checkpoint belongs to another model; it lacks bert\.embeddings"):
        model.load(config_of(folder, task=Task.seq_cls), None, CPU, classes=2)


def test_an_adapter_of_another_model_is_an_error(tmp_path: Path) -> None:
    adapted: Any = attach.attach(make("opt"), attach_lora(), TargetsConfig(modules=["q_proj"]), {})
    models_saved.save(adapted, tmp_path)
    with pytest.raises(InputError, match=r"than LlamaForCausalLM: the model has no such weights: .*decoder"):
        models_saved.restore(make("llama"), tmp_path)
    models_saved.save(attach.attach(make("llama"), attach_lora(), TargetsConfig(modules=["q_proj"]), {}), tmp_path)
    with pytest.raises(InputError, match=r"the file lacks base_model\.model\.model\.layers\.2"):
        models_saved.restore(make("llama", num_hidden_layers=3), tmp_path)
    with pytest.raises(InputError, match=r"has no such weights: base_model.model.model.layers.1"):
        models_saved.restore(make("llama", num_hidden_layers=1), tmp_path)


def test_an_adapter_is_held_against_a_base_without_weights(tmp_path: Path) -> None:
    models_saved.save(attach.attach(make("llama"), attach_lora(), TargetsConfig(modules=["q_proj"]), {}), tmp_path)

    def check(layers: int = 2, **changed: Any) -> None:
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(
                AutoConfig.for_model("llama", **SIZES | {"num_hidden_layers": layers})
            )
        models_saved.restore(bare, tmp_path)

    check()
    with pytest.raises(InputError, match=r"the file lacks base_model\.model\.model\.layers\.2"):
        check(layers=3)
    with pytest.raises(InputError, match=r"has the shape \[2, 32\] in the file, and \[4, 32\] in the model"):
        check(r=4)
    with pytest.raises(InputError, match=r"PEFT cannot read it \(Invalid task type: 'SING'"):
        check(r=2, task_type="SING")


def attach_lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2)


# ---- the head's names ------------------------------------------------------------------------------


def classifier(folder: Path, names: list[str]) -> Path:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **SIZES, **labels))
    base.save_pretrained(folder)
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(folder)
    return folder


def test_the_names_of_a_checkpoint_s_head_order_the_classes(
    compose: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def order(names: list[str]) -> list[str]:
        folder = classifier(tmp_path / "-".join(names), names)
        words = ("model=encoder", f"model.name_or_path={folder}", "dataset=tiny_direction")
        return build.classes(compose(*words))

    assert order(["less", "more"]) == ["less", "more"]
    assert order(["MORE", "Less"]) == ["more", "less"]
    assert order(["LABEL_0", "LABEL_1"]) == ["less", "more"]  # which names nothing
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert order(["up", "down"]) == ["less", "more"]
    assert "are not the names of the head's outputs, ['up', 'down']" in caplog.text


@pytest.mark.slow
def test_a_head_is_judged_by_its_own_order_of_the_classes(tmp_path: Path) -> None:
    """The same head with its rows and its names exchanged says the same."""
    folder, other = classifier(tmp_path / "a", ["less", "more"]), classifier(tmp_path / "b", ["more", "less"])
    weights = load_file(other / "model.safetensors")
    for part in ("weight", "bias"):
        weights[f"classifier.{part}"] = weights[f"classifier.{part}"].flip(0).contiguous()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    first, second = (classify(one, "train=none") for one in (folder, other))
    predictions = [[row["prediction"] for row in rows(one)] for one in (first, second)]
    assert predictions[0] == predictions[1]
    trained = [classify(one, "method=lora", "targets=qv").train_info["final_loss"] for one in (folder, other)]
    assert trained[0] == pytest.approx(trained[1], rel=1e-4)


def rows(result: Result) -> list[dict[str, Any]]:
    assert result.folder
    text = (result.folder / "predictions" / "tiny_direction.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# ---- the tokenizer ---------------------------------------------------------------------------------


def test_a_tokenizer_that_does_not_fit_is_refused_before_the_sweep(compose: Compose, tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        forecast.check(compose("model=causal_lm", f"model.name_or_path={folder}"))

    bare = tmp_path / "bare"
    make("llama").save_pretrained(bare)
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        check(bare)
    padded = write("llama", tmp_path / "padded")
    tokenizer = model.load_tokenizer(config_of(padded))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(padded)
    with pytest.raises(
        InputError, match=r"the pad_token '\[PAD\]' of its tokenizer is number 533, outside of the model's 533"
    ):
        check(padded)
    endless = write("llama", tmp_path / "endless")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := endless / name).exists():
            tokenizer_config = json.loads(file.read_text())
            tokenizer_config.pop("eos_token", None)
            file.write_text(json.dumps(tokenizer_config))
    with pytest.raises(InputError, match="its tokenizer has no eos_token to end an answer with"):
        check(endless)


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "small", vocab_size=400)
    words = ["model=causal_lm", f"model.name_or_path={folder}", *SMALL, "quiet=true"]
    result = cli.run_one(words)
    assert result.status is Status.failed
    assert "of its tokenizer has no embedding; the model has 400" in (result.error or {})["message"]


def test_new_parts_are_not_quantised(masked: Path) -> None:
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base: Any = model.load(config_of(masked, task=Task.seq_cls), four, CPU, classes=2)
    assert type(base.bert.pooler.dense).__name__ == "Linear"
    assert type(base.bert.encoder.layer[0].attention.self.query).__name__ == "Linear4bit"


# ---- weights that are quantised in the checkpoint --------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The embedded model as a checkpoint whose weights are stored in 4 bits."""
    folder = tmp_path / "packed"
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model.load(ModelConfig(name_or_path="tiny"), four, CPU).save_pretrained(folder)
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(folder)
    return folder


def test_a_checkpoint_in_4_bits_is_refused_what_a_4_bit_base_is(compose: Compose, packed: Path) -> None:
    words = ("model=causal_lm", f"model.name_or_path={packed}", "model.dtype=float32")
    assert "cannot train quantised weights" in str(forecast.refusal(compose(*words, "method=full")))
    assert "not on a 4bit base" in str(forecast.refusal(compose(*words, "method=delora")))
    with pytest.raises(InputError, match=r"quant=8bit: the checkpoint .* is quantised already, by bitsandbytes"):
        build.storage(compose(*words, "quant=8bit"))


@pytest.mark.slow
def test_a_checkpoint_in_4_bits_is_predicted_as_one(compose: Compose, packed: Path) -> None:
    words = ("model=causal_lm", f"model.name_or_path={packed}", "model.dtype=float32")
    one, other = compose(*words), compose("quant=4bit", "quant.bnb_4bit_use_double_quant=false", "model.dtype=float32")
    mine, theirs = forecast.check(one), forecast.check(other)
    assert mine.total_parameters == theirs.total_parameters == 1_003_264
    assert "92.5% of the base are stored in 4 bits" in str(mine.coverage)
    found = [forecast.prediction(trial) for trial in (one, other)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].weights_bytes == found[1].weights_bytes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_checkpoint_of_quantised_weights_is_loaded_as_it_was_saved(where: str, bits: int, tmp_path: Path) -> None:
    """Also after a forward pass, in which a layer of 8 bits takes its scales away from its weight."""
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    device, ids = torch.device(where), torch.arange(3, 19, device=where)[None]
    made = model.load(ModelConfig(name_or_path="tiny"), BitsAndBytesConfig(**options), device)
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        made.save_pretrained(tmp_path / "kept")
        loaded = model.load(config_of(tmp_path / "kept"), None, device)
        assert layers.bits(loaded.model.layers[0].self_attn.q_proj) == bits
        found = loaded(input_ids=ids).logits
    assert found.device.type == where
    assert float((found - expected).abs().mean()) <= 0.02 * float(expected.std())


def test_a_model_of_which_no_layer_can_be_quantised_is_not_called_quantised(compose: Compose, tmp_path: Path) -> None:
    folder = table.write("falcon", Task.causal_lm, tmp_path / "falcon")
    with pytest.raises(InputError, match=r"quant=4bit: no layer of .*falcon can be stored so; take quant=none"):
        forecast.check(compose("model=causal_lm", f"model.name_or_path={folder}", "quant=4bit"))


# ---- folders that are no model, or not a whole one ---------------------------------------------------


def damaged(how: str, folder: Path) -> None:
    """Have something be wrong with the checkpoint in ``folder``."""
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    elif how == "gone":
        weights.unlink()
    elif how == "cut off, in torch's format":
        file = folder / "pytorch_model.bin"
        torch.save(load_file(weights), file)
        file.write_bytes(file.read_bytes()[:5000])
        weights.unlink()
    elif how == "with an adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif how == "index":
        index.write_text("{")
    else:
        index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": weights.name}}))


DAMAGED = {
    "cut off": r"model\.safetensors is not a complete file of weights \(.*; copy or download it again",
    "empty": r"model\.safetensors is not a complete file of weights",
    "pointer": r"a pointer of git-lfs; git lfs pull downloads the file",
    "gone": r"holds no weights, such as model\.safetensors",
    "cut off, in torch's format": r"pytorch_model\.bin is not a complete file of weights \(cut off\)",
    "with an adapter": r"holds an adapter beside the model \(adapter_config\.json\)",
    "index": r"model\.safetensors\.index\.json cannot be read",
    "a file of the index": r"lacks model-00001-of-00002\.safetensors \(1 of 2 files of model\.safetensors\.index",
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_checkpoint_that_is_not_whole_is_one_line_before_it_is_loaded(how: str, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    models_saved.check_files(config_of(folder))  # is whole
    damaged(how, folder)
    with pytest.raises(InputError, match=rf"^model\.name_or_path=.*llama: .*{DAMAGED[how]}") as error:
        models_saved.check_files(config_of(folder))
    assert "\n" not in str(error.value)


def test_a_sweep_does_not_begin_with_a_checkpoint_that_is_not_whole(compose: Compose, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    damaged("cut off", folder)
    with pytest.raises(InputError, match="is not a complete file of weights"):
        build.check_available(compose("model=causal_lm", f"model.name_or_path={folder}"))


def test_shards_and_the_format_of_torch_are_whole_too(tmp_path: Path) -> None:
    sharded, plain = tmp_path / "sharded", tmp_path / "plain"
    make("llama").save_pretrained(sharded, max_shard_size="20KB")
    make("llama").save_pretrained(plain)
    torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    for folder in (sharded, plain):
        models_saved.check_files(config_of(folder))
        assert model.load(config_of(folder), None, CPU).num_parameters() == make("llama").num_parameters()


def test_an_adapter_that_transformers_would_load_with_the_base_is_refused(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))
    with pytest.raises(InputError, match="holds an adapter beside the model"):
        model.load(config_of(folder), None, CPU)


def test_a_checkpoint_of_more_layers_than_its_configuration_says_is_refused(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    model_config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(model_config))
    with pytest.raises(InputError, match=r"has layer 1 of model\.layers, but its config\.json has only 1"):
        model.load(config_of(folder), None, CPU)
    (folder / "config.json").write_text(json.dumps(model_config | {"num_nextn_predict_layers": 1}))
    model.load(config_of(folder), None, CPU)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_of_its_own_is_counted_and_kept_where_the_configuration_ties_it(
    compose: Compose, tmp_path: Path, shards: int
) -> None:
    """transformers does not tie them then; the plan would lack the head, and a saved model's configuration be wrong."""

    def check(head: torch.Tensor | None) -> tuple[int | None, Any]:
        folder = tmp_path / str(head is None) / str(head is not None and head.sum().item())
        write("llama", folder, tie_word_embeddings=True)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone() if head is None else head
        if shards == 1:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            (folder / "model.safetensors").unlink()
            places = {name: f"model-0000{1 + (name == 'lm_head.weight')}-of-00002.safetensors" for name in weights}
            for file in set(places.values()):
                own = {name: weights[name] for name in weights if places[name] == file}
                save_file(own, folder / file, metadata={"format": "pt"})
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        assert model.skeleton(config_of(folder)).device.type == "meta"
        planned = forecast.check(compose("model=causal_lm", f"model.name_or_path={folder}", "method=full"))
        return planned.total_parameters, model.load(config_of(folder), None, CPU)

    own = torch.randn(533, 32)
    total, base = check(own)
    assert total == parts.count(base).total == 60896 - 8192
    assert (base.lm_head.weight.float() - own).abs().max() < 0.02  # in the usual 16 bits
    assert not base.config.tie_word_embeddings
    base.save_pretrained(tmp_path / "saved")
    assert not AutoConfig.from_pretrained(tmp_path / "saved").tie_word_embeddings
    total, base = check(None)
    assert total == parts.count(base).total == 60896 - 8192 - 533 * 32
    assert base.lm_head.weight is base.model.embed_tokens.weight


@pytest.mark.parametrize("scales", ["weight_scale", "weight_scale_inv", "SCB", "weight.absmax"])
def test_quantised_weights_are_not_taken_for_plain_ones(scales: str, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    weights, name = load_file(folder / "model.safetensors"), f"{LAYER}.q_proj"
    scale = weights[f"{name}.weight"].abs().max() / 448
    weights[f"{name}.weight"] = (weights[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.load(config_of(folder), None, CPU)  # a plain cast, without scales
    weights[f"{name}.{scales}"] = scale.reshape(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"weights are quantised, with their scales beside them \({name}\.{scales}\)"):
        model.load(config_of(folder), None, CPU)


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_weights_that_the_configuration_calls_quantised_are_refused(bits: int, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    stated = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8).to_dict()
    described = json.loads((folder / "config.json").read_text()) | {"quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        InputError, match=rf"stored in {bits} bits \(quantization_config\), but model\.layers\.0\..* is not"
    ):
        model.load(config_of(folder), None, CPU)


def test_generation_settings_that_transformers_cannot_read_are_one_line(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"^model\.name_or_path=.*llama: cannot be loaded \(.*list"):
        model.load(config_of(folder), None, CPU)


def test_what_a_configuration_asks_of_every_call_is_no_part_of_the_model(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    described = json.loads((folder / "config.json").read_text())
    wanted = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    (folder / "config.json").write_text(json.dumps(described | wanted))
    base: Any = model.load(config_of(folder, dtype=Dtype.float32), None, CPU)
    assert probe.probe(base).padded_batches
    output = base(input_ids=torch.full((1, 4), 7))
    assert output.hidden_states is output.attentions is None
    assert torch.equal(output.logits, make("llama")(input_ids=torch.full((1, 4), 7)).logits)


LAYER = "model.layers.1.self_attn"


@pytest.mark.parametrize("name", ["q_proj.bias", "q_norm.weight", "q_proj.lora_A.default.weight"])
def test_a_checkpoint_whose_configuration_leaves_out_a_part_of_its_layers_is_refused(name: str, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    beside = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4), f"{LAYER}.bias": torch.ones(1, 1, 4, 4)}
    beside |= {"mtp.layers.0.proj.weight": torch.ones(2), "visual.blocks.0.attn.weight": torch.ones(2)}
    save_file(weights | beside, folder / "model.safetensors", metadata={"format": "pt"})
    model.load(config_of(folder), None, CPU)  # buffers, and parts of another model
    save_file(weights | {f"{LAYER}.{name}": torch.ones(32)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"leaves out weights that the checkpoint's layers have: {LAYER}\.{name}$"):
        model.load(config_of(folder), None, CPU)


def test_weights_that_are_no_numbers_are_said_to_be_so(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "llama")
    change(folder, "model.norm.weight", torch.full((32,), math.nan))
    with pytest.raises(InputError, match="LlamaForCausalLM gives NaN or infinite logits: its weights are damaged"):
        probe.probe(model.load(config_of(folder, dtype=Dtype.float32), None, CPU))


CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "32"}, "cannot be loaded .*'hidden_size' expected int, got str"),
    ({"num_attention_heads": 0}, "(cannot be loaded|its config.json describes no model) .*modulo by zero"),
    ({"model_type": "bart", "is_encoder_decoder": True}, r"an encoder with a decoder \(model_type bart\)"),
    ({"model_type": "whisper", "is_encoder_decoder": True}, r"an encoder with a decoder \(model_type whisper\)"),
]


@pytest.mark.parametrize(("changed", "message"), CONFIGURATIONS)
def test_a_configuration_that_makes_no_decoder_is_one_line(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write("llama", tmp_path / "llama")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | changed))
    with pytest.raises(InputError, match=rf"^model\.name_or_path=.*{message}"):
        model.positions(config_of(folder))


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_s_own_is_never_run_and_nobody_is_asked(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write("llama", tmp_path / "llama")
    own: dict[str, Any] = {"model_type": "ours", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    if part != "config.json":
        own = {"tokenizer_class": "OfOurOwn", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    (folder / part).write_text(json.dumps(json.loads((folder / part).read_text()) | own))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match=r"needs its own code \(auto_map\), which is never run"):
        model.load_tokenizer(config_of(folder))
    assert not (tmp_path / "was_run").exists()
