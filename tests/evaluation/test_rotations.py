"""Rotary frequencies that depend on the longest row of a batch: each row has the numbers that it has alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftsweep.data.tokens import Tokens, prompt_ids
from peftsweep.evaluation import decoding, likelihood
from peftsweep.models import model, parts
from peftsweep.schema import ModelConfig
from tests.architectures import small_config

ORIGINAL = 24
NEW_TOKENS = 16
LENGTHS = (10, 14, 40, 20, 60, 23, 41, 40)
PROMPTS = [
    "Tom has 3 pens",
    "a",
    "One day a cat went out to see the big garden and it ran home as it was late",
    "It is",
]
PROMPTS += ["Two dogs went to see a garden", PROMPTS[2] + " and cold"]  # some grow beyond the original length
TOKENIZER = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
ROPE: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 4.0, "rope_theta": 1e4},
    "longrope": {"factor": 4.0, "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]},
}
KINDS = [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")]


def base(kind: str, rope: str) -> Any:
    torch.manual_seed(0)
    rotary = {"rope_type": rope, "original_max_position_embeddings": ORIGINAL} | ROPE[rope]
    sizes: dict[str, Any] = {"max_position_embeddings": ORIGINAL if rope == "dynamic" else 96}
    if kind == "phi3":
        sizes |= {"original_max_position_embeddings": ORIGINAL, "sliding_window": None}
    config = small_config(kind, rope_parameters=rotary, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(("kind", "rope"), KINDS)
@torch.no_grad()
def test_likelihoods_of_rows_of_any_length_are_those_of_each_row_alone(kind: str, rope: str) -> None:
    drawn = torch.Generator().manual_seed(0)
    rows = [Tokens(torch.randint(5, 500, (n,), generator=drawn).tolist(), n - 3) for n in LENGTHS]
    fresh, alone = base(kind, rope), []
    for row in rows:
        logits = copy.deepcopy(fresh)(input_ids=torch.tensor([row.ids])).logits[0, -4:-1].log_softmax(-1)
        alone.append(logits.gather(1, torch.tensor(row.ids[-3:])[:, None]).sum().item())
    assert likelihood.log_likelihoods(fresh, rows, pad_id=0, batch_size=16) == pytest.approx(alone, abs=1e-4)
    texts = [("One day a cat went out", [" to the big garden" * n for n in (1, 2, 9)]), ("She", [" is", " ran home"])]
    pairs = [[(prompt, answer) for answer in answers] for prompt, answers in texts]
    sizes: dict[str, Any] = {"max_length": 99, "marked": False}
    found, _ = likelihood.grouped_likelihoods(fresh, TOKENIZER, pairs, batch_size=16, **sizes)
    for mine, group in zip(found, pairs, strict=True):
        each = [
            likelihood.grouped_likelihoods(base(kind, rope), TOKENIZER, [[p]], batch_size=1, **sizes) for p in group
        ]
        assert mine == pytest.approx([one[0][0][0] for one in each], abs=1e-4)


@pytest.mark.parametrize(  # the likelihoods above have all kinds in the fast tier
    ("kind", "rope"), [KINDS[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in KINDS[1:])]
)
def test_texts_of_prompts_of_any_length_are_those_of_transformers_alone(kind: str, rope: str) -> None:
    fresh = base(kind, rope)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt_ids(TOKENIZER, [prompt])[0]])
        made = copy.deepcopy(fresh).generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=0
        )
        expected.append(TOKENIZER.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    for batch_size in (1, 6):
        assert (
            decoding.generate(fresh, TOKENIZER, PROMPTS, max_new_tokens=NEW_TOKENS, batch_size=batch_size) == expected
        )


def test_rows_are_grouped_only_where_their_length_matters() -> None:
    short, long = parts.SHORT_ROWS, parts.LONG_ROWS
    assert parts.rows_by_rotation(base("llama", "longrope"), [24, 25, 60]) == [short, long, long]
    assert parts.rows_by_rotation(base("llama", "longrope"), [8, 9, 24, 25], NEW_TOKENS) == [short, 1, 2, long]
    assert parts.rows_by_rotation(base("llama", "dynamic"), [23, 25, 25, 60]) == [short, 25, 25, 60]
    config = small_config("llama")
    assert parts.rows_by_rotation(AutoModelForCausalLM.from_config(config), [10, 100], 50) == [short, short]
