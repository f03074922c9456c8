"""The table of architectures: whole, up to date; and each kind of fault that it has found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmarks import architectures as table
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from peftsweep import InputError
from peftsweep.config.fill import conf_dir
from peftsweep.forecast import predict
from peftsweep.forecast.predict import Shape
from peftsweep.models import attach, coverage, model, parts, probe, saved
from peftsweep.models.quantised.layers import is_quantised, quantise_skeleton
from peftsweep.schema import Init, ModelConfig, TargetsConfig, Task, TrainConfig
from tests.architectures import small_config

FOUND = json.loads(table.RESULTS.read_text())
PAGE = Path(table.__file__).parents[1] / "docs" / "architectures.md"
CPU = torch.device("cpu")
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ROLES = {
    Task.causal_lm: yaml.safe_load((Path(conf_dir()) / "model" / "causal_lm.yaml").read_text())["roles"],
    Task.seq_cls: yaml.safe_load((Path(conf_dir()) / "model" / "encoder.yaml").read_text())["model"]["roles"],
}


def shape(kind: str, task: Task = Task.causal_lm, **options: Any) -> Any:
    """The type's small model without numbers."""
    with torch.device("meta"):
        return model.CLASSES[task].from_config(small_config(kind, **options))


def made(kind: str) -> Any:
    """The type's small model of random weights."""
    return model.CLASSES[Task.causal_lm].from_config(small_config(kind), dtype=torch.float32)


def random(kind: str) -> ModelConfig:
    """The type's small model as a user describes one of random weights."""
    known = AutoConfig.for_model(kind).to_dict()
    told = small_config(kind).to_dict()
    fields = {name: value for name, value in told.items() if name in known and value != known[name]}
    return ModelConfig(name_or_path="x", init=Init.random, architecture={"model_type": kind} | fields)


# ---- the table -------------------------------------------------------------------------------------


def test_every_type_of_transformers_is_in_the_table_or_left_out_with_a_reason() -> None:
    listed = FOUND["types"].keys() | set(FOUND["not_run"])
    new = table.kinds().keys() - listed
    assert not new, f"run: python -m benchmarks.architectures docs/architectures.md --only {' '.join(sorted(new))}"
    assert not listed & table.LEFT_OUT.keys()


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text() == table.page(FOUND)


def test_more_than_thirty_types_work_in_every_column() -> None:
    rows = [row["cells"] for row in FOUND["types"].values()]
    right = [cells for cells in rows if all(cells.get(name, "no").startswith("yes") for name in ("trains", "4bit"))]
    right = [cells for cells in right if cells["reload"] == cells["merge"] == cells["likelihood"] == "yes"]
    assert len(right) > 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "deepseek_v2", "mamba", "bert"])
def test_a_row_of_the_table_is_found_again(kind: str) -> None:
    known, again = FOUND["types"][kind]["cells"], table.look(kind, table.kinds()[kind])["cells"]
    assert {name: again[name] for name in again if name != "memory"} == {n: known[n] for n in known if n != "memory"}


# ---- what it has found -----------------------------------------------------------------------------


def test_memory_is_predicted_of_a_mixture_of_experts_in_32_bits() -> None:
    """Of which the meta device has no grouped product."""
    sizes = [Shape(2, length, length // 2, length) for length in (16, 32)]
    found = []
    for one in sizes:
        adapted = attach.attach(shape("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"]), TargetsConfig(), {})
        found.append(predict.predict(adapted, TrainConfig(), [one], "cpu"))
    assert found[0].weights_bytes >= 4 * sum(p.numel() for p in shape("qwen3_moe").parameters())
    assert found[1].activation_bytes == pytest.approx(2 * found[0].activation_bytes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v2", "bloom"])
def test_memory_is_predicted_of_experts_of_values_of_another_width_and_of_sums_with_a_number(
    kind: str, tmp_path: Path
) -> None:
    case = table.Case(kind, Task.causal_lm, tmp_path / kind)
    case.loads()
    assert abs(float(case.memory().rstrip("%"))) <= 5


def test_latent_attention_has_roles() -> None:
    base = shape("deepseek_v2")
    names = attach.role_modules(base, ["q", "k", "v", "o"], ROLES[Task.causal_lm])
    assert {name.rpartition(".")[2] for name in names} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    values = attach.role_modules(base, ["v"], ROLES[Task.causal_lm])
    assert {name.rpartition(".")[2] for name in values} == {"kv_a_proj_with_mqa", "kv_b_proj"}


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("eurobert", Task.seq_cls),
        ("llama", Task.seq_cls),
        ("gptj", Task.causal_lm),
        ("modernbert-decoder", Task.causal_lm),
    ],
)
def test_roles_are_known_by_the_names_of_any_family_for_any_task(kind: str, task: Task) -> None:
    assert {"q", "k", "v", "o", "mlp"} <= attach.role_members(shape(kind, task), ROLES[task]).keys()


@pytest.mark.parametrize(("kind", "layer"), [("phimoe", "router"), ("deepseek_v4", "o_a_proj")])
def test_layers_that_only_look_linear_are_not_adapted(kind: str, layer: str) -> None:
    names = attach.linear_names(shape(kind))
    assert layer not in {name.rpartition(".")[2] for name in names}
    assert "q_proj" in names or "q_b_proj" in names


@pytest.mark.parametrize(
    ("kind", "router", "beside"),
    [
        ("afmoe", r"mlp\.router\.", "mlp.shared_experts.up_proj"),
        ("hunyuan_v1_moe", r"mlp\.gate\.", "mlp.shared_mlp.up_proj"),
        ("jetmoe", r"\.router\.", "self_attention.kv_proj"),
        ("longcat_flash", r"\.router\.", "self_attn.0.o_proj"),
        ("zaya", r"mlp\.gate\.", "o_proj"),
        ("qwen2_moe", r"_gate$", "mlp.shared_expert.up_proj"),
        ("minimax", r"mlp\.gate", "self_attn.output_gate"),
        ("gemma4_text", r"router", "per_layer_input_gate"),
        ("doge", r"router", "self_attn.dt_proj"),
    ],
)
def test_what_chooses_among_experts_is_not_adapted_in_any_family(kind: str, router: str, beside: str) -> None:
    options: dict[str, Any] = {"is_moe": True} if kind == "doge" else {}
    for targets in (TargetsConfig(all_linear=True), TargetsConfig(roles=["mlp"])):
        base = shape(kind, Task.causal_lm, **options)
        if targets.roles and "mlp" not in attach.role_members(base, ROLES[Task.causal_lm]):
            continue
        adapted = attach.attach(base, LoraConfig(r=2), targets, ROLES[Task.causal_lm])
        names = [name.removesuffix(".lora_A.default.weight") for name, _ in parts.trainable_parameters(adapted)]
        assert names
        assert not [name for name in names if re.search(router, name)]
        assert targets.roles or any(name.endswith(beside) for name in names)


@pytest.mark.parametrize(
    ("kind", "task", "part"),
    [
        ("bart", Task.causal_lm, "encoder_attn"),
        ("axk2", Task.causal_lm, "indexer"),
        ("git", Task.causal_lm, "image_encoder"),
        ("luke", Task.seq_cls, "e2w_query"),
    ],
)
def test_layers_that_text_alone_never_trains_are_not_adapted(kind: str, task: Task, part: str) -> None:
    base = shape(kind, task)
    assert any(f".{part}." in name for name, _ in base.named_parameters())
    before = coverage.weights(base, ROLES[task])
    adapted = attach.attach(base, LoraConfig(r=2), TargetsConfig(all_linear=True), ROLES[task])
    names = [name for name, _ in parts.trainable_parameters(adapted)]
    assert names
    assert not [name for name in names if f".{part}." in name]
    assert coverage.coverage(before, adapted).share > 0


def test_a_layer_named_by_its_number_is_no_suffix_that_means_a_whole_block() -> None:
    names = attach.linear_names(shape("ctrl"))
    assert "transformer.h.0.ffn.0" in names
    attach.attach(shape("ctrl"), LoraConfig(r=2), TargetsConfig(all_linear=True), ROLES[Task.causal_lm])


def test_weights_that_a_model_multiplies_with_itself_are_not_stored_in_4_bits() -> None:
    base: Any = model.load(random("mamba"), BitsAndBytesConfig(**FOUR), CPU)
    mixer = base.backbone.layers[0].mixer
    assert is_quantised(mixer.in_proj)
    assert not is_quantised(mixer.dt_proj)
    assert not is_quantised(base.lm_head)
    base(input_ids=torch.arange(5, 16)[None])


@pytest.mark.parametrize(("kind", "own"), [("longcat_flash", "classifier"), ("gemma3n_text", "prediction_coefs")])
def test_layers_whose_weights_are_read_beside_their_call_are_neither_quantised_nor_adapted(kind: str, own: str) -> None:
    base, quantization = shape(kind), BitsAndBytesConfig(**FOUR)
    assert not any(name.endswith(own) for name in attach.linear_names(base))
    model.spare(quantization, base)
    quantise_skeleton(base, quantization)
    stored = {name.rpartition(".")[2] for name, module in base.named_modules() if is_quantised(module)}
    assert "o_proj" in stored
    assert own not in stored
    assert "lm_head" not in stored


def test_a_trial_that_is_refused_is_a_cell_of_the_table_without_the_folder_of_its_checkpoint(tmp_path: Path) -> None:
    case = table.Case("falcon", Task.causal_lm, tmp_path / "falcon")
    reason = f"quant=4bit: no layer of {case.folder} can be stored so"
    case.refused = {"4bit": InputError(reason)}
    assert case.cell(case.fourbit) == "refused: quant=4bit: no layer of falcon can be stored so"
    assert case.cell(case.reload) == "yes"


def test_an_adapter_is_read_back_by_the_names_that_it_was_saved_with(tmp_path: Path) -> None:
    """PEFT applies transformers' renaming of checkpoints to it, which spoils names of Laguna that need none."""
    saved.save(attach.attach(made("laguna"), LoraConfig(r=2), TargetsConfig(all_linear=True), {}), tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(".shared_experts." in name for name in names)
    again = saved.restore(shape("laguna"), tmp_path)
    assert {name.replace(".default", "") for name, _ in again.named_parameters() if "lora_" in name} == names


def test_what_cannot_read_tokens_or_sees_later_ones_is_refused_without_its_weights() -> None:
    with pytest.raises(InputError, match=r"has no embeddings of tokens \(model_type canine\)"), torch.device("meta"):
        model.made(ModelConfig(name_or_path="x", task=Task.seq_cls), small_config("canine"))
    with pytest.raises(InputError, match="XLNetLMHeadModel sees the tokens that it is to predict"):
        probe.check_causal(small_config("xlnet"), model.CLASSES[Task.causal_lm].from_config)


def test_a_model_whose_layers_need_their_mask_keeps_it() -> None:
    """Falcon's attention adds to the mask that it is given: without one it fails."""
    base = model.load(random("falcon"), None, CPU)
    found = probe.abilities(base)
    assert found.shortcuts.answers_only
    assert not found.shortcuts.no_mask


def test_layers_of_gpt_2_that_were_stored_in_4_bits_are_merged_in_their_own_shape(tmp_path: Path) -> None:
    plain: Any = model.load(random("gpt2"), None, CPU)
    saved.save(attach.attach(plain, LoraConfig(r=2, target_modules=["c_attn"]), TargetsConfig(), {}), tmp_path)
    base = model.load(random("gpt2"), BitsAndBytesConfig(**FOUR), CPU)
    ids = torch.arange(5, 16)[None]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        merged: Any = saved.merge(saved.dequantised(base, tmp_path))
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-4)
    layer = merged.transformer.h[0].attn.c_attn
    assert isinstance(layer, Conv1D)
    assert layer.weight.shape == (32, 96)
