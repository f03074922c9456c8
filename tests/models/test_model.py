"""Loading, quantising, attaching, counting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, PromptTuningConfig
from transformers import BitsAndBytesConfig

from peftsweep import InputError
from peftsweep.config.fill import conf_dir
from peftsweep.data import batches, tokens
from peftsweep.models import attach, losses, model, parts, saved
from peftsweep.schema import Init, ModelConfig, TargetsConfig, Task
from tests.architectures import small_config

CPU = torch.device("cpu")
TINY = ModelConfig(name_or_path="tiny")
ROLES = {
    **{role: [f"{role}_proj"] for role in "qkvo"},
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
FOUR_BIT = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype="float32",
)
EIGHT_BIT = BitsAndBytesConfig(load_in_8bit=True)
QUANTS = {"none": None, "8bit": EIGHT_BIT, "4bit": FOUR_BIT}


def batch(seed: int = 0) -> batches.Batch:
    ids = torch.randint(5, 500, (4, 24), generator=torch.Generator().manual_seed(seed)).tolist()
    return batches.collate([tokens.Tokens(row, 8) for row in ids], pad_id=0)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, **options)


def gradients(base: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    adapted = attach.attach(base, lora(target_modules="all-linear"), TargetsConfig(), ROLES)
    adapted.train()
    losses.answer_losses(adapted, batch()).sum().backward()
    return {name: p.grad.clone() for name, p in parts.trainable_parameters(adapted) if p.grad is not None}


@pytest.mark.kernels
@pytest.mark.parametrize("quant", QUANTS)
def test_an_evaluation_before_training_changes_no_gradient(quant: str) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would repack 4-bit weights into a form without backward."""
    fresh = gradients(model.load(TINY, QUANTS[quant], CPU))
    base = model.load(TINY, QUANTS[quant], CPU)
    with torch.no_grad():
        base(torch.arange(5, 25)[None])
    evaluated = gradients(base)
    assert len(fresh) == 2 * 7 * 4
    assert all(torch.equal(fresh[name], evaluated[name]) for name in fresh)
    # At first the B matrices alone learn, as they are zero; each of them must.
    assert all(fresh[name].abs().sum() > 0 for name in fresh if "lora_B" in name)


def test_the_packing_of_4_bit_weights_is_switched_off_on_every_layer() -> None:
    base = model.load(TINY, FOUR_BIT, CPU)
    quantised = [m for m in base.modules() if type(m).__name__ == "Linear4bit"]
    assert len(quantised) == 28
    assert not any(
        getattr(m, "support_avx512bf16_for_cpu", False) for m in quantised
    )  # bitsandbytes has it from 0.49 on


def test_a_layer_of_8_bits_takes_inputs_of_four_dimensions() -> None:
    """Such as of AX-K2's attention, which projects each head: [rows, tokens, heads, features]."""
    layer: Any = model.load(TINY, EIGHT_BIT, CPU).model.layers[0].self_attn.q_proj
    inputs = torch.randn(2, 3, 5, layer.in_features).requires_grad_()
    found = layer(inputs)
    assert torch.equal(found, layer(inputs.detach().view(6, 5, -1)).view(found.shape))
    found.sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.any()


@pytest.mark.parametrize("quant", QUANTS)
def test_counts_do_not_depend_on_the_quantisation(quant: str) -> None:
    base = model.load(TINY, QUANTS[quant], CPU)
    bare = parts.count(base).total
    counts = parts.count(attach.attach(base, lora(target_modules="all-linear"), TargetsConfig(), ROLES))
    assert bare == sum(p.numel() for p in model.skeleton(TINY).parameters())
    assert counts.total == bare + counts.trainable
    assert counts.trainable == 4 * 4 * (4 * (128 + 128) + 3 * (128 + 384))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (TargetsConfig(roles=["q", "v"]), ["q_proj", "v_proj"]),
        (TargetsConfig(roles=["mlp"]), ["gate_proj", "up_proj", "down_proj"]),
        (TargetsConfig(modules=["self_attn.o_proj"]), ["self_attn.o_proj"]),
        (TargetsConfig(), None),
    ],
)
def test_targets_speak_in_roles(targets: TargetsConfig, expected: list[str] | None) -> None:
    assert attach.target_modules(model.skeleton(TINY), targets, ROLES) == expected


def test_all_linear_leaves_the_head_alone() -> None:
    names = attach.target_modules(model.skeleton(TINY), TargetsConfig(all_linear=True), ROLES)
    assert names == [n for role in ("q", "k", "v", "o", "mlp") for n in ROLES[role]]


@pytest.mark.parametrize("kind", ["llama4_text", "mllama"])
def test_a_body_by_another_name_than_the_class_says_is_no_head(kind: str) -> None:
    """Their ``base_model_prefix`` is "language_model", which names no part of them."""
    base = model.CLASSES[Task.causal_lm].from_config(small_config(kind))
    assert parts.head_names(base) == ["lm_head"]
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {name.rpartition(".")[2] for name in attach.linear_names(base)}


def families() -> Iterator[tuple[str, dict[str, Any], str, dict[str, list[str]]]]:
    """Architecture, its sizes, the yaml that maps its roles, and what roles mean there (as PEFT takes them)."""
    llama = {"q": ["q_proj"], "o": ["o_proj"], "down": ["down_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}
    for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"):
        yield kind, {}, "causal_lm", llama
    yield "opt", {}, "causal_lm", {"o": ["self_attn.out_proj"], "mlp": ["fc1", "fc2"]}
    yield "phi", {}, "causal_lm", {"o": ["self_attn.dense"], "mlp": ["fc1", "fc2"], "q": ["q_proj"]}
    yield "phi3", {}, "causal_lm", {"qkv": ["qkv_proj"], "o": ["o_proj"], "mlp": ["down_proj", "gate_up_proj"]}
    types = [[["global", "local"], 1]]
    gpt_neo = {"v": ["v_proj"], "o": ["attention.out_proj"], "mlp": ["c_fc", "c_proj"]}
    yield "gpt_neo", {"attention_types": types}, "causal_lm", gpt_neo
    layers = [f"transformer.h.{n}.mlp.{name}" for n in (0, 1) for name in ("c_fc", "c_proj")]
    yield "gpt2", {}, "causal_lm", {"qkv": ["c_attn"], "o": ["attn.c_proj"], "mlp": layers}
    yield "distilbert", {}, "encoder", {"q": ["q_lin"], "o": ["out_lin"], "mlp": ["lin1", "lin2"]}
    for kind in ("bert", "roberta"):
        body = [f"{kind}.encoder.layer.{n}.{part}.dense" for n in (0, 1) for part in ("intermediate", "output")]
        yield kind, {}, "encoder", {"v": ["value"], "o": ["attention.output.dense"], "mlp": body}


@pytest.mark.parametrize(("kind", "sizes", "file", "expected"), list(families()))
def test_roles_of_every_family(kind: str, sizes: dict[str, Any], file: str, expected: dict[str, Any]) -> None:
    options = yaml.safe_load((Path(conf_dir()) / "model" / f"{file}.yaml").read_text())
    roles = options["roles"] if file == "causal_lm" else options["model"]["roles"]
    task = Task.causal_lm if file == "causal_lm" else Task.seq_cls
    sizes = {"num_hidden_layers": 2} | sizes
    config = ModelConfig(name_or_path=kind, architecture={"model_type": kind, **sizes}, task=task)
    base = model.skeleton(config, classes=2)
    for role, names in expected.items():
        assert attach.role_modules(base, [role], roles) == names
    assert not set(attach.linear_names(base)) & set(parts.head_names(base))
    attach.attach(base, LoraConfig(r=2, target_modules="all-linear"), TargetsConfig(), roles)


def test_a_fused_layer_stands_for_query_key_and_value_together_only() -> None:
    base = model.skeleton(ModelConfig(name_or_path="x", architecture={"model_type": "gpt2", "n_layer": 1}))
    roles = {"q": ["q_proj"], "k": ["k_proj"], "v": ["v_proj"], "qkv": ["c_attn"], "o": ["attn.c_proj"]}
    assert attach.role_modules(base, ["q", "k", "v", "o"], roles) == ["c_attn", "attn.c_proj"]
    with pytest.raises(InputError, match="the model has no 'q'; it has: qkv, o"):
        attach.role_modules(base, ["q", "v"], roles)


def test_a_method_without_target_modules_says_so() -> None:
    with pytest.raises(InputError, match="PromptTuningConfig has no target modules; leave targets=default"):
        attach.attach(model.skeleton(TINY), PromptTuningConfig(num_virtual_tokens=2), TargetsConfig(roles=["q"]), ROLES)


def test_ia3_is_told_which_targets_are_feed_forward() -> None:
    method = IA3Config()
    attach.attach(model.skeleton(TINY), method, TargetsConfig(roles=["k", "mlp"]), ROLES)
    assert set(method.feedforward_modules or ()) == {"gate_proj", "up_proj", "down_proj"}


def test_a_random_base_is_the_same_each_time_and_can_be_quantised() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape = {"model_type": "llama", "vocab_size": 600, "num_hidden_layers": 2, **sizes}
    config = ModelConfig(name_or_path="any/thing", init=Init.random, architecture=shape)
    plain, again = model.load(config, None, CPU), model.load(config, None, CPU)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), again.parameters(), strict=True))
    ids = torch.arange(5, 25)[None]
    for quantization in (EIGHT_BIT, FOUR_BIT):
        packed = model.load(config, quantization, CPU)
        assert packed.get_memory_footprint() < plain.get_memory_footprint()
        error = (packed(ids).logits - plain(ids).logits).abs().mean() / plain(ids).logits.abs().mean()
        assert error < 0.2


def test_a_model_that_is_no_causal_lm_is_refused() -> None:
    config = ModelConfig(name_or_path="x", init=Init.random, architecture={"model_type": "vit"})
    with pytest.raises(InputError, match="is not a causal language model"):
        model.skeleton(config)


def test_an_unknown_architecture_is_named() -> None:
    config = ModelConfig(name_or_path="x", init=Init.random, architecture={"model_type": "lama"})
    with pytest.raises(InputError, match=r"model.architecture.model_type=lama: .*'llama'"):
        model.architecture(config)


@pytest.mark.kernels
def test_answer_losses_are_those_of_the_whole_logits() -> None:
    base, rows = model.load(TINY, None, CPU), batch()
    with torch.no_grad():
        logits = base(rows.input_ids, attention_mask=rows.attention_mask).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(
            logits[rows.answer_mask], rows.input_ids[:, 1:][rows.answer_mask], reduction="none"
        )
        assert torch.allclose(losses.answer_losses(base, rows), expected, atol=1e-5)


@pytest.mark.kernels
@pytest.mark.parametrize("quant", ["none", "4bit"])
def test_a_saved_adapter_comes_back_exactly(quant: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    method = lora(target_modules=["q_proj"], init_lora_weights=False)
    adapted = attach.attach(model.load(TINY, QUANTS[quant], CPU), method, TargetsConfig(), ROLES).eval()
    size = saved.save(adapted, tmp_path)
    again = saved.restore(model.load(TINY, QUANTS[quant], CPU), tmp_path)
    assert size == (tmp_path / "adapter_model.safetensors").stat().st_size
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=ids).logits, again(input_ids=ids).logits)
