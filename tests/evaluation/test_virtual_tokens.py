"""Texts of methods that put virtual tokens before the prompt: those of each prompt alone, in batches of any size."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from peftsweep.data.tokens import prompt_ids
from peftsweep.evaluation import decoding, harness
from peftsweep.models import attach, model
from peftsweep.schema import ModelConfig, TargetsConfig
from tests.architectures import make

PROMPTS = ["Tom has 3 pens.", "One day a cat went out to see the big garden and it", "a", "Two dogs", "Tom has 4 pens."]
TOKENIZER = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
SIZES: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
METHODS = {
    "prompt tuning": PromptTuningConfig(**SIZES),
    "p-tuning": PromptEncoderConfig(**SIZES, encoder_hidden_size=16),
    "prefix tuning": PrefixTuningConfig(**SIZES),
}


# In the fast tier rotary and learned positions, virtual tokens in the input and in each layer.
FAST = (("llama", "prompt tuning"), ("gpt2", "prefix tuning"))
PAIRS = [
    (kind, method) if (kind, method) in FAST else pytest.param(kind, method, marks=pytest.mark.slow)
    for kind in ("llama", "gpt2")
    for method in METHODS
]


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_texts_are_those_of_each_prompt_alone(kind: str, method: str) -> None:
    base = make(kind, initializer_range=0.2, num_key_value_heads=4)
    base.requires_grad_(False)
    adapted: Any = attach.attach(base, copy.deepcopy(METHODS[method]), TargetsConfig(), {}).eval()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor(prompt_ids(TOKENIZER, [prompt]))
        made = adapted.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=TOKENIZER.eos_token_id,
            pad_token_id=TOKENIZER.pad_token_id,
        )
        expected.append(TOKENIZER.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    for size in (1, 2, 5):
        assert decoding.generate(adapted, TOKENIZER, PROMPTS, max_new_tokens=16, batch_size=size) == expected


@pytest.mark.slow  # imports the harness, which generates by transformers as the tests above do
def test_the_harness_writes_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"question": text, "answer": "5"}) + "\n" for text in PROMPTS))
    task = {
        **{"task": "written", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}},
        **{"test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}"},
        **{"doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}]},
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": 16, "do_sample": False},
    }
    base = make("llama", initializer_range=0.2)
    base.requires_grad_(False)
    adapted: Any = attach.attach(base, copy.deepcopy(METHODS["prompt tuning"]), TargetsConfig(), {}).eval()
    alone, together = (
        harness.lm_eval(adapted, TOKENIZER, [], tasks=[task], batch_size=size, max_length=64).predictions
        for size in (1, 4)
    )
    assert [line["prediction"] for line in together] == [line["prediction"] for line in alone]
    assert len({str(line["prediction"]) for line in alone}) > 1
