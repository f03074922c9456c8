"""LoRA on parameters that are no modules, such as experts: what chooses among modules chooses among them too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from peftsweep import InputError
from peftsweep.forecast import forecast
from peftsweep.models import attach, saved
from peftsweep.schema import TargetsConfig
from tests.architectures import make, write

ROLES = {"q": ["q_proj"], "v": ["v_proj"]}
EXPERTS = ["gate_up_proj", "down_proj"]


def adapted(targets: TargetsConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    return attach.attach(make("qwen3_moe"), LoraConfig(r=2, **options), targets, ROLES)


def names(model: Any) -> set[str]:
    """The adapted modules and parameters as ``1.q_proj``, ``0.down_proj``."""
    tuner = model.base_model
    full = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    return {f"{name.split('layers.')[1][0]}.{name.rpartition('.')[2]}" for name in full}


def test_layers_and_exclusions_choose_among_experts_too() -> None:
    roles = TargetsConfig(roles=["q", "experts"])
    everything = {f"{layer}.{name}" for layer in (0, 1) for name in ("q_proj", *EXPERTS)}
    assert names(adapted(roles)) == everything
    second = {name for name in everything if name.startswith("1.")}
    assert names(adapted(roles, layers_to_transform=[1])) == second
    assert names(adapted(roles, layers_to_transform=1, layers_pattern="layers")) == second
    assert names(adapted(roles, exclude_modules=[r"0.mlp.experts"])) == everything - {f"0.{name}" for name in EXPERTS}
    assert names(adapted(roles, exclude_modules=r".*layers\.0\..*")) == second
    listed = TargetsConfig()
    chosen = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    assert names(adapted(listed, **chosen)) == {"0.q_proj", "1.q_proj", "0.down_proj", "1.down_proj"}
    assert names(adapted(listed, **chosen, layers_to_transform=[1])) == {"1.q_proj", "1.down_proj"}


def test_experts_of_some_layers_are_saved_and_read_back(tmp_path: Path) -> None:
    one = adapted(TargetsConfig(roles=["q", "experts"]), layers_to_transform=[1])
    for name, parameter in one.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    saved.save(one, tmp_path)
    again = saved.restore(make("qwen3_moe"), tmp_path)
    assert names(again) == names(one)
    ids = torch.arange(5, 17)[None]
    assert torch.equal(again(input_ids=ids).logits, one.eval()(input_ids=ids).logits)


def test_options_that_leave_no_parameter_are_refused() -> None:
    with pytest.raises(InputError, match=r"^method\.target_parameters: method\.layers_to_transform and .* leave none"):
        adapted(
            TargetsConfig(),
            target_modules=["q_proj"],
            target_parameters=["experts.down_proj"],
            exclude_modules=["mlp.experts"],
        )


@pytest.mark.parametrize("begins", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_weights_of_experts_are_not_decomposed(begins: Any) -> None:
    """PEFT would ask the experts, a module, for an attribute that they have not."""
    message = rf"^method\.init_lora_weights={begins}: .* model\.layers\.0\.mlp\.experts\.\w+ is a parameter"
    with pytest.raises(InputError, match=message):
        adapted(TargetsConfig(roles=["q", "experts"]), init_lora_weights=begins)
    adapted(TargetsConfig(roles=["q"]), init_lora_weights=begins)
    adapted(TargetsConfig(), target_modules=["v_proj"], target_parameters=["q_proj.weight"], init_lora_weights=begins)


def test_a_plan_refuses_the_decomposition_of_experts_too(compose: Any, tmp_path: Path) -> None:
    """Also of PiSSA, whose initialisation from the base's weights a plan leaves out."""
    words = ["model=causal_lm", f"model.name_or_path={write('qwen3_moe', tmp_path)}", "method=pissa"]
    with pytest.raises(InputError, match=r"^method\.init_lora_weights=pissa: .* is a parameter"):
        forecast.check(compose(*words, "targets.roles=[q,experts]"))
