"""Classifiers whose head has several layers are merged, whatever the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, VeraConfig
from transformers import AutoModelForSequenceClassification

from peftsweep.models import attach, saved
from peftsweep.schema import TargetsConfig
from tests.architectures import small_config

LAYERS = {"deberta-v2": ["query_proj", "value_proj"], "roberta": ["query", "value"]}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", ["lora", "lora all-linear", "ia3", "oft", "vera"])
def test_a_head_of_several_layers_is_merged(kind: str, method: str) -> None:
    named: dict[str, Any] = {"target_modules": LAYERS[kind], "task_type": "SEQ_CLS"}
    config = {
        "lora": LoraConfig(r=4, **named),
        "lora all-linear": LoraConfig(r=4, **named | {"target_modules": "all-linear"}),
        "ia3": IA3Config(feedforward_modules=[], **named),
        "oft": OFTConfig(oft_block_size=4, **named),
        "vera": VeraConfig(r=4, **named),
    }[method]
    torch.manual_seed(0)
    made: Any = AutoModelForSequenceClassification
    base = made.from_config(small_config(kind, num_labels=3), dtype=torch.float32).eval()
    base.requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        untouched = base(input_ids=ids).logits
        adapted = attach.attach(base, config, TargetsConfig(), {}).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = adapted(input_ids=ids).logits
        merged = saved.merge(adapted)
        found = merged(input_ids=ids).logits
    assert not torch.allclose(expected, untouched, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not [name for name, _ in merged.named_parameters() if "modules_to_save" in name or "original" in name]
