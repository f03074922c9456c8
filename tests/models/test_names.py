"""Options of a method that name modules, layers or tokens: each must be there, also where PEFT passes over it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import peft
import pytest

from peftsweep import InputError
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.forecast.predict import skeleton
from peftsweep.models import attach
from peftsweep.models.parts import base_of, trainable_parameters
from peftsweep.schema import ModelConfig, TargetsConfig, Task

ROLES = {role: [f"{role}_proj"] for role in "qkvo"} | {"mlp": ["gate_proj", "up_proj", "down_proj"]}
QV = ["q_proj", "v_proj"]
LAYERS = {"target_modules": QV, "layers_to_transform": [0]}
TINY = {"num_virtual_tokens": 4}  # of which the model has 4 layers, 533 embeddings 128 wide


def adapt(config: str, options: dict[str, Any], targets: TargetsConfig | None = None) -> Any:
    base = skeleton(ModelConfig(name_or_path="tiny"), None)
    return attach.attach(base, getattr(peft, config)(**options), targets or TargetsConfig(), ROLES)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("LoraConfig", {"rank_pattern": {"q_pro": 4}}, "method.rank_pattern: 'q_pro' matches no module that gets an"),
        ("LoraConfig", {"rank_pattern": {"q_proj": 4, "k_proj": 4}}, "'k_proj' matches no module that gets an adapter"),
        ("LoraConfig", {"alpha_pattern": {"layers.9.*": 4}}, "method.alpha_pattern: 'layers.9.*' matches no module"),
        ("LoraConfig", {"rank_pattern": {"q_proj(": 4}}, "method.rank_pattern: 'q_proj(' is not a regular expression"),
        ("LoHaConfig", {"rank_pattern": {"proj": 4}}, "method.rank_pattern: 'proj' matches no module that gets an"),
        ("DeloraConfig", {"lambda_pattern": {"up_proj": 4}}, "method.lambda_pattern: 'up_proj' matches no module"),
        ("C3AConfig", {"block_size": 32, "block_size_pattern": {"k_proj": 32}}, "method.block_size_pattern: 'k_proj'"),
        ("FourierFTConfig", {"n_frequency_pattern": {"q_prj": 9}}, "'q_prj' matches no module that gets an adapter"),
        ("OSFConfig", {"rank_pattern": {"lm_head": 4}}, "method.rank_pattern: 'lm_head' matches no module"),
        (
            "LoraConfig",
            {"exclude_modules": ["q_porj"]},
            "matches no innermost module of the model; did you mean 'q_proj'",
        ),
        ("LoraConfig", {"exclude_modules": ["q_proj", "self_attn"]}, "'self_attn' matches no innermost module"),
        ("LoraConfig", {"exclude_modules": r".*\.mpl\..*"}, r"method.exclude_modules: '.*\.mpl\..*' matches no"),
        ("LoraConfig", {"exclude_modules": "*.mlp"}, "method.exclude_modules: '*.mlp' is not a regular expression"),
        ("LoraConfig", {"modules_to_save": ["lm_head", "score"]}, "method.modules_to_save: 'score' matches no module"),
        ("LoraConfig", {"target_parameters": ["q_proj.wieght"]}, "did you mean 'q_proj.weight'?"),
        ("IA3Config", {"feedforward_modules": "up_proj"}, "method.feedforward_modules: 'up_proj' matches no module"),
        ("LoraConfig", LAYERS | {"layers_to_transform": [0, 4]}, "the model has no layer 4; it has 0 to 3"),
        ("VeraConfig", LAYERS | {"layers_to_transform": 9}, "method.layers_to_transform: the model has no layer 9"),
        (
            "LoraConfig",
            LAYERS | {"layers_pattern": ["layers", "h"]},
            "no module has a number after 'h'; there are: layers",
        ),
        ("HiraConfig", {"layers_pattern": "layers"}, "method.layers_pattern: needs method.layers_to_transform"),
        ("LoraConfig", {"layer_replication": [[0, 3], [2, 5]]}, "method.layer_replication=[2,5]: must be [start,end]"),
        ("LoraConfig", {"trainable_token_indices": [0, 533]}, "the model has no embedding for token 533; it has 533"),
        (
            "TrainableTokensConfig",
            {"token_indices": [9999], "target_modules": None},
            "method.token_indices: the model has no embedding for token 9999",
        ),
        (
            "CartridgeConfig",
            TINY | {"num_layers": 1_000_000},
            "method.num_layers=1000000: must be 4 or null, the layers",
        ),
        ("PrefixTuningConfig", TINY | {"num_layers": 1}, "method.num_layers=1: must be 4 or null, the layers of the"),
        ("PromptEncoderConfig", TINY | {"num_transformer_submodules": 2}, "must be 1 or null"),
        ("PromptTuningConfig", TINY | {"token_dim": 64}, "method.token_dim=64: must be 128 or null, the width of the"),
    ],
)
def test_what_an_option_names_and_the_model_lacks_is_refused(
    config: str, options: dict[str, Any], message: str
) -> None:
    aimed = {} if "num_virtual_tokens" in options else {"target_modules": QV}
    with pytest.raises(InputError, match=rf"^method\.[^\n]*{re.escape(message)}|^{re.escape(message)}"):
        adapt(config, aimed | options)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoraConfig", {"rank_pattern": {"q_proj": 4, r"layers\.3\.self_attn\.v_proj": 2, "^model.*v_proj": 8}}),
        ("OSFConfig", {"rank_pattern": {"self_attn": 4}}),  # which looks anywhere in a name
        ("LoraConfig", {"exclude_modules": ["k_proj", "layers.0.self_attn.q_proj"]}),
        ("LoraConfig", {"modules_to_save": ["head"]}),  # PEFT compares the ends of names, whole or not
        ("LoraConfig", {"target_parameters": ["k_proj.weight"]}),
        ("LoraConfig", LAYERS | {"layers_to_transform": 3, "layers_pattern": "layers"}),
        ("LoraConfig", {"layer_replication": [[0, 3], [1, 4]]}),
        ("LoraConfig", {"layer_replication": [[0, 3], [1, 4]], "layers_to_transform": [5]}),
        ("IA3Config", {"feedforward_modules": ["q_proj"]}),
        ("CartridgeConfig", TINY | {"num_layers": 4, "num_transformer_submodules": 1}),
    ],
)
def test_what_the_model_has_may_be_named(config: str, options: dict[str, Any]) -> None:
    aimed = {} if "num_virtual_tokens" in options else {"target_modules": QV}
    assert isinstance(adapt(config, aimed | options), peft.PeftModel)


@pytest.mark.parametrize("task", list(Task))
@pytest.mark.parametrize(("rank", "trainable"), [(127, True), (128, False), (500, False)])
def test_an_adapter_without_a_trainable_parameter_is_refused(rank: int, trainable: bool, task: Task) -> None:
    """OSF freezes the ``effective_rank`` largest directions of a layer, of which the model's have 128."""
    base = skeleton(ModelConfig(name_or_path="tiny", task=task), None, classes=3)
    method = peft.OSFConfig(effective_rank=rank, target_modules=QV)
    if not trainable:
        with pytest.raises(InputError, match=r"^method: OSFConfig has no trainable parameter[^\n]*$"):
            attach.attach(base, method, TargetsConfig(), ROLES)
        return
    adapted = attach.attach(base, method, TargetsConfig(), ROLES)
    assert sum(p.numel() for name, p in trainable_parameters(adapted) if "score" not in name) > 0


def test_names_in_full_are_of_the_layers_that_are_asked_for_too() -> None:
    """PEFT heeds layers_to_transform for the ends of names alone."""
    names = [f"model.layers.{layer}.self_attn.{end}" for layer in range(4) for end in QV]
    adapted = adapt("LoraConfig", LAYERS | {"layers_to_transform": [1, 2]}, TargetsConfig(modules=names))
    found = {name for name, module in base_of(adapted).named_modules() if hasattr(module, "lora_A")}
    assert found == {name for name in names if ".1." in name or ".2." in name}


def test_the_feed_forward_modules_that_a_person_names_are_kept() -> None:
    adapted = adapt("IA3Config", {"feedforward_modules": ["v_proj"]}, TargetsConfig(roles=["q", "v"]))
    scaled = {n: m.is_feedforward for n, m in base_of(adapted).named_modules() if hasattr(m, "is_feedforward")}
    assert {name.rpartition(".")[2]: is_input for name, is_input in scaled.items()} == {"q_proj": False, "v_proj": True}


def test_what_a_person_excludes_need_not_be_excluded_from_other_options() -> None:
    """Which modules of IA3 are feed-forward follows from the targets, of which some may be left out."""
    targets = TargetsConfig(roles=["v", "mlp"])
    adapted = adapt("IA3Config", {"exclude_modules": ["down_proj"]}, targets)
    assert not any("down_proj" in name for name, module in base_of(adapted).named_modules() if hasattr(module, "ia3_l"))


def test_layers_can_be_chosen_where_a_method_takes_all_linear_modules(compose: Callable[..., Trial]) -> None:
    one = compose("method=lora", "method.layers_to_transform=[2]")
    base = skeleton(one.config.model, None)
    adapted = build.attach_method(one, base, steps=4)
    found = {name for name, module in base_of(adapted).named_modules() if hasattr(module, "lora_A")}
    assert len(found) == 7
    assert {name.split(".")[2] for name in found} == {"2"}


def test_what_an_experiment_says_of_its_own_model_is_read_from_this_one(compose: Callable[..., Trial]) -> None:
    words = ["+point/peft_comparison=prompt_tuning--llama-3.2-3b-default"]
    one, base = compose(*words), skeleton(ModelConfig(name_or_path="tiny"), None)
    config: Any = build.attach_method(one, base, steps=4).peft_config["default"]
    assert (one.config.method["num_layers"], one.config.method["token_dim"]) == (28, 3072)
    assert (config.num_layers, config.token_dim) == (4, 128)
    with pytest.raises(InputError, match=r"^method\.num_layers=28: must be 4 or null, the layers of the model$"):
        build.attach_method(compose(*words, "method.num_layers=28"), base, steps=4)


def test_a_pattern_that_matches_nothing_ends_the_command_with_one_line(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, err = command("method.rank_pattern={q_porj:4}")
    assert (code, err.count("\n")) == (2, 1)
    assert "method.rank_pattern: 'q_porj' matches no module that gets an adapter; did you mean 'q_proj'?" in err
