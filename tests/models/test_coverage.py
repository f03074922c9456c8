"""What a method was really attached to: by role, on many architectures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoHaConfig, LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from peftsweep import InputError
from peftsweep.config.fill import conf_dir
from peftsweep.models import attach, coverage, model, parts, saved
from peftsweep.schema import Init, ModelConfig, TargetsConfig
from tests.architectures import ARCHITECTURES, SIZES, make, small_config
from tests.conftest import records

ROLES = yaml.safe_load((Path(conf_dir()) / "model" / "causal_lm.yaml").read_text())["roles"]
ATTENTION = ("q", "k", "v", "o")
WHOLE = dict.fromkeys(ATTENTION, (1.0, 2))
QUARTER = dict.fromkeys(ATTENTION, (1.0, 1))
# What all_linear adapts: role -> share of its weights, number of layers; nothing of the other roles.
ALL_LINEAR: dict[str, dict[str, tuple[float, int]]] = {
    "llama": WHOLE | {"mlp": (1.0, 2)},
    "qwen3": WHOLE | {"mlp": (1.0, 2)},
    "qwen3_moe": WHOLE,
    "qwen2_moe": WHOLE | {"shared_experts": (1.0, 2)},
    "qwen3_next": QUARTER | {"shared_experts": (1.0, 4), "linear_attention": (1.0, 3)},
    "qwen3_5_text": QUARTER | {"mlp": (1.0, 4), "linear_attention": (1.0, 3)},
    "gpt_oss": WHOLE,
    "mixtral": WHOLE,
    "gemma3": WHOLE | {"mlp": (1.0, 2)},
    "gemma3_text": WHOLE | {"mlp": (1.0, 2)},
    "phi3": {"qkv": (1.0, 2), "o": (1.0, 2), "mlp": (1.0, 2)},
    "gpt_neox": {"qkv": (1.0, 2), "o": (1.0, 2), "mlp": (1.0, 2)},
    "gpt2": {"qkv": (1.0, 2), "o": (1.0, 2), "mlp": (1.0, 2)},
    "opt": WHOLE | {"mlp": (1.0, 2)},
    "mamba": {"linear_attention": (0.679, 2)},  # without dt_proj and out_proj
    "falcon_h1": WHOLE | {"mlp": (1.0, 2), "linear_attention": (0.704, 2)},
    "jamba": WHOLE | {"mlp": (1.0, 2), "linear_attention": (0.972, 2)},  # without dt_proj, which it never calls
    "lfm2": QUARTER | {"mlp": (1.0, 2), "linear_attention": (1.0, 1)},
}
FAST = ("qwen3_next", "gemma3", "mamba")
KINDS = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in ALL_LINEAR]


def adapt(kind: str, targets: TargetsConfig, method: Any = None) -> tuple[Any, coverage.Coverage]:
    base = make(kind)
    before = coverage.weights(base, ROLES)
    adapted = attach.attach(base, method or LoraConfig(r=2, init_lora_weights=False), targets, ROLES)
    return adapted, coverage.coverage(before, adapted)


def reached(found: coverage.Coverage) -> dict[str, tuple[float, int]]:
    roles = found.roles.items()
    return {role: (round(r.adapted / r.weights, 3), r.adapted_layers) for role, r in roles if r.adapted}


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_adapts_these_shares_of_these_roles_and_all_of_them_learn(kind: str) -> None:
    adapted, found = adapt(kind, TargetsConfig(all_linear=True))
    assert reached(found) == ALL_LINEAR[kind]
    assert found.weights == sum(p.numel() for p in make(kind).parameters())
    adapted.eval()
    ids = torch.arange(5, 25)[None]
    adapted(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
    still = [name for name, p in parts.trainable_parameters(adapted) if p.grad is None or not p.grad.abs().sum()]
    assert not still


def test_the_table_is_of_at_least_fourteen_architectures() -> None:
    assert len(ALL_LINEAR) >= 14
    assert set(ALL_LINEAR) <= set(ARCHITECTURES)


def test_text_trials_adapt_and_train_nothing_of_a_vision_tower() -> None:
    methods = (
        (LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), TargetsConfig()),
        (LoraConfig(r=2, target_modules=r".*\.(q|v)_proj"), TargetsConfig()),
        (LoraConfig(r=2), TargetsConfig()),  # PEFT's choice
        (LoraConfig(r=2), TargetsConfig(roles=["q", "v"])),
        (LoHaConfig(r=2), TargetsConfig(modules=["q_proj", "v_proj"])),
    )
    for method, targets in methods:
        adapted, found = adapt("gemma3", targets, method)
        assert reached(found) == {"q": (1.0, 2), "v": (1.0, 2)}, method
        assert not [name for name, _ in parts.trainable_parameters(adapted) if "vision" in name]
    base = make("gemma3")
    attach.attach(base, None, TargetsConfig(), ROLES)
    trained = {name.split(".")[1] for name, _ in parts.trainable_parameters(base)}
    assert trained == {"language_model"}


def test_biases_outside_of_text_are_not_trained_either() -> None:
    adapted, _ = adapt("gemma3", TargetsConfig(roles=["q"]), LoraConfig(r=2, bias="all"))
    assert not [name for name, _ in parts.trainable_parameters(adapted) if "vision" in name]


def test_experts_are_a_role_and_their_adapter_comes_back(tmp_path: Path) -> None:
    adapted, found = adapt("qwen3_moe", TargetsConfig(roles=["experts"]))
    assert reached(found) == {"experts": (1.0, 2)}
    saved.save(adapted, tmp_path)
    again = saved.restore(make("qwen3_moe"), tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        answers = [one.eval()(input_ids=ids).logits for one in (adapted, again, make("qwen3_moe"))]
    assert torch.allclose(answers[0], answers[1], atol=1e-6)
    assert not torch.allclose(answers[0], answers[2], atol=1e-2)


def test_shared_experts_are_not_taken_for_experts(tmp_path: Path) -> None:
    """PEFT takes these names for those that experts had in transformers 4."""
    adapted, found = adapt("qwen2_moe", TargetsConfig(roles=["shared_experts"]))
    assert reached(found) == {"shared_experts": (1.0, 2)}
    saved.save(adapted, tmp_path)
    again = saved.restore(make("qwen2_moe"), tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(adapted.eval()(input_ids=ids).logits, again(input_ids=ids).logits, atol=1e-6)


@pytest.mark.parametrize(("kind", "names"), [("dots1", "down_proj, gate_proj, up_proj"), ("qwen2_moe", "")])
def test_an_adapter_that_peft_itself_would_load_otherwise_has_a_warning(
    kind: str, names: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32).eval()

    adapted: Any = attach.attach(
        base(), LoraConfig(r=2, init_lora_weights=False), TargetsConfig(all_linear=True), ROLES
    )
    warnings = [record.getMessage() for record in caplog.records if "PEFT itself takes" in record.getMessage()]
    assert [names in line for line in warnings] == [True] * bool(names)
    saved.save(adapted, tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base(), str(tmp_path)).eval()(input_ids=ids).logits
        assert torch.allclose(adapted.eval()(input_ids=ids).logits, loaded, atol=1e-5) == (not names)


def test_a_method_that_cannot_adapt_experts_says_so() -> None:
    with pytest.raises(InputError, match="LoHaConfig cannot be attached to experts"):
        adapt("mixtral", TargetsConfig(roles=["q", "experts"]), LoHaConfig(r=2))
    with pytest.raises(InputError, match="the model has no 'mlp'; it has: q, k, v, o, norm, experts"):
        adapt("mixtral", TargetsConfig(roles=["mlp"]))


def test_what_peft_does_not_take_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, found = adapt("mamba", TargetsConfig(roles=["linear_attention"]))
    assert "left out dt_proj, out_proj, which cannot be adapted in mamba" in caplog.text
    assert "linear_attention (67.9%)" in found.line()
    _, found = adapt("mamba", TargetsConfig(roles=["linear_attention"]), LoHaConfig(r=2))
    assert "linear_attention (97.2%)" in found.line()


def test_a_layer_that_the_model_never_calls_is_refused() -> None:
    with pytest.raises(InputError, match="the model never calls 'dt_proj', so an adapter there would have no effect"):
        adapt("jamba", TargetsConfig(modules=["dt_proj"]))


def test_the_line_names_layers_that_are_reached_and_weights_that_are_not() -> None:
    _, found = adapt("qwen3_next", TargetsConfig(roles=["q", "shared_experts"]))
    assert "shared_experts, q (1 of 4 layers); not experts (" in found.line()


def test_a_4_bit_base_says_how_many_of_its_weights_are_really_4_bit() -> None:
    known = AutoConfig.for_model("mixtral").to_dict()
    sizes = {name: size for name, size in {**SIZES, **ARCHITECTURES["mixtral"]}.items() if name in known}
    shape = {"model_type": "mixtral", **sizes}
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    config = ModelConfig(name_or_path="x", init=Init.random, architecture=shape)
    weights = coverage.weights(model.load(config, four, torch.device("cpu")), ROLES)
    attention = sum(weight.size for weight in weights.values() if weight.role in ATTENTION)
    assert coverage.quantised(weights) == {4: attention}
    assert attention == 2 * (32 * 32 * 2 + 32 * 16 * 2)


def test_the_plan_and_the_record_say_what_is_covered(command: Any) -> None:
    words = ("targets=q", "train.steps=1", "dataset.samples=8", "eval=[perplexity]", "eval.perplexity.samples=2")
    _, out, _ = command(*words, "quant=4bit", "seed=0,1,2", "dry_run=true")
    assert "seed=0 and 2 more: adapts 7.1% of the weights: q; not mlp (64% of them)" in out
    assert "92.5% of the base are stored in 4 bits" in out
    command(*words, "quant=4bit")
    (result,) = records().values()
    found = result.train_info["coverage"]
    assert found["roles"]["q"] == {"weights": 65_536, "share": 1.0, "layers": "4 of 4"}
    assert found["share"] == pytest.approx(65_536 / 921_344)
    assert found["share_in_4bit"] == pytest.approx(851_968 / 921_344)


def test_points_that_attach_the_same_parameters_are_trained_once(command: Any) -> None:
    words = ("train.steps=1", "dataset.samples=8", "eval=[perplexity]", "eval.perplexity.samples=2", "seed=0", "-m")
    points = ("targets.modules=[q_proj],[self_attn.q_proj],[v_proj]", *words)
    code, out, _ = command(*points, "dry_run=true")
    assert code == 0
    assert out.count("attaches the same as") == 1
    assert "3 trials, 2 new" in out
    command(*points)
    assert len(records()) == 2
    _, out, _ = command(*points)
    assert "2 trials: 2 success" in out
    assert len(records()) == 2
