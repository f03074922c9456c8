"""What an architecture does with later tokens, padding and its cache is found out, not assumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from peftsweep import InputError
from peftsweep.config.compose import Trial
from peftsweep.data import batches, tokens
from peftsweep.evaluation import decoding, inference, likelihood
from peftsweep.forecast import forecast
from peftsweep.models import attach, model, probe
from peftsweep.models import losses as models_losses
from peftsweep.models.probe import Abilities
from peftsweep.models.shortcuts import Shortcuts
from peftsweep.schema import ModelConfig, TargetsConfig
from tests.architectures import GENERATING, SIZES, make, small_config, write

Compose = Callable[..., Trial]
FAST = ("llama", "lfm2", "rwkv")
PROMPTS = ["Tom has 3 pens.", "One day a cat went out to see the big garden and it", "a", "What is 2 plus 2? It is"]
KINDS = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in GENERATING]


def alone(base: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """What is likeliest, token by token, read from the beginning each time, without cache and padding."""
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    for _ in range(new_tokens):
        row = torch.tensor([ids])
        with torch.no_grad():
            likeliest = int(base(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -1].argmax())
        if likeliest in decoding._end_ids(base, tokenizer):
            break
        ids = [*ids, likeliest]
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_writes_what_each_row_writes_alone(kind: str) -> None:
    base, tokenizer = make(kind), model.load_tokenizer(ModelConfig(name_or_path="tiny"))
    expected = [alone(base, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert decoding.generate(base, tokenizer, PROMPTS, max_new_tokens=8, batch_size=4) == expected


def test_an_adapter_that_begins_behind_a_token_stays_on_to_the_end_of_the_text() -> None:
    """aLoRA looks for its tokens in what the model is given, where a token after a cache has none before it."""
    base, tokenizer = make("llama"), model.load_tokenizer(ModelConfig(name_or_path="tiny"))
    prompts = [f"{prompt}\n" for prompt in PROMPTS]
    (begin,) = {tokenizer(prompt).input_ids[-1] for prompt in prompts}
    method = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], alora_invocation_tokens=[begin])
    method.init_lora_weights = False  # which is no untouched base
    adapted: Any = attach.attach(base, method, TargetsConfig(), {}).eval()
    expected = [alone(adapted, tokenizer, prompt, 8) for prompt in prompts]
    assert decoding.generate(adapted, tokenizer, prompts, max_new_tokens=8, batch_size=4) == expected
    choices = [[(prompt, " cat"), (prompt, "12 pens")] for prompt in prompts]
    found, _ = likelihood.grouped_likelihoods(adapted, tokenizer, choices, batch_size=8, max_length=99, marked=False)
    rows = tokens.tokenize_pairs(tokenizer, [pair for group in choices for pair in group], 99)
    single = [likelihood.log_likelihoods(adapted, [row], pad_id=0)[0] for row in rows]
    assert list(itertools.chain(*found)) == pytest.approx(single, abs=1e-4)


ALL = Shortcuts(answers_only=True, bare_head=True, no_mask=True)
MASKED = replace(ALL, no_mask=False)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", Abilities(padded_batches=True, row_cache=True, shortcuts=ALL)),
        ("gemma3", Abilities(padded_batches=True, row_cache=True, shortcuts=MASKED)),  # some layers have a window
        ("lfm2", Abilities(padded_batches=True, row_cache=False, shortcuts=MASKED)),  # its cache cannot give up rows
        ("rwkv", Abilities(padded_batches=False, row_cache=False, shortcuts=MASKED)),  # it knows no mask
        ("mamba", Abilities(padded_batches=True, row_cache=False, shortcuts=MASKED)),
    ],
)
def test_the_probe_finds_what_may_be_relied_on(kind: str, expected: Abilities) -> None:
    assert probe.probe(make(kind)) == expected


def test_a_cache_that_gives_wrong_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import DynamicLayer

    monkeypatch.setattr(DynamicLayer, "batch_select_indices", lambda self, indices: None)
    monkeypatch.setattr("transformers.cache_utils.Cache.batch_select_indices", lambda self, indices: None)
    assert not probe.probe(make("llama")).row_cache


def test_a_second_tree_of_the_base_is_not_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make("rwkv")
    known = probe.abilities(base)
    monkeypatch.setattr(probe, "probe", lambda base: pytest.fail("probed again"))
    assert probe.abilities(inference.bare(base)) == known


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_is_no_causal_model(kind: str) -> None:
    config = AutoConfig.for_model(kind, **SIZES)
    with pytest.raises(InputError, match="sees the tokens that it is to predict, as encoders do; take model=encoder"):
        probe.probe(AutoModelForCausalLM.from_config(config).eval())
    config.is_decoder = True
    probe.probe(AutoModelForCausalLM.from_config(config).eval())


def test_an_encoder_and_a_translator_are_refused_before_the_sweep(compose: Compose, tmp_path: Path) -> None:
    words = ("model=causal_lm", f"model.name_or_path={write('bert', tmp_path / 'bert')}")
    with pytest.raises(InputError, match="sees the tokens that it is to predict"):
        forecast.check(compose(*words))
    shape = "{model_type: t5, d_model: 32, d_kv: 8, d_ff: 64, num_layers: 2, num_heads: 4}"
    translator = ("model=causal_lm", "model.name_or_path=t5", "model.init=random", f"+model.architecture={shape}")
    with pytest.raises(InputError, match="is not a causal language model"):
        forecast.check(compose(*translator))


def test_a_decoder_whose_configuration_could_be_an_encoder_s_is_taken() -> None:
    config = AutoConfig.for_model("gpt_neox", **SIZES)
    assert config.is_decoder is False
    probe.check_causal(config, AutoModelForCausalLM.from_config)


def test_columns_that_8_bit_layers_multiply_in_16_bits_do_not_make_a_decoder_an_encoder() -> None:
    base: Any = model.load(ModelConfig(name_or_path="tiny"), BitsAndBytesConfig(load_in_8bit=True), torch.device("cpu"))
    for name, weight in base.named_parameters():
        if "norm" in name:
            weight.data *= 3  # inputs of layers that exceed the threshold in some tokens and not in others
    assert probe.probe(base).padded_batches
    assert {one.state.threshold for one in base.modules() if isinstance(one, Linear8bitLt)} == {6.0}


def test_forecasts_of_one_base_ask_once_what_its_losses_may_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_LIKELY", {})
    calls = list[int]()
    exact = probe.likely_shortcuts

    def counted(base: Any) -> Shortcuts:
        calls.append(1)
        return exact(base)

    monkeypatch.setattr(probe, "likely_shortcuts", counted)
    eager: Any = make("llama")
    eager.config._attn_implementation = "eager"
    bases: list[Any] = [make("llama"), make("llama"), make("llama", tie_word_embeddings=True), make("gpt2"), eager]
    for base in bases:
        assert probe.known_shortcuts(base) == exact(base)
    assert len(calls) == len(bases) - 1
    bases[0].lm_head = torch.nn.Sequential(bases[0].lm_head)  # as a method may wrap it
    assert probe.known_shortcuts(bases[0]) == exact(bases[0])
    assert not probe.known_shortcuts(bases[0]).answers_only


@pytest.mark.parametrize(("kind", "pads"), [("bert", True), ("fnet", False), ("convbert", False), ("xlnet", False)])
def test_a_classifier_answers_in_a_batch_as_it_does_alone(kind: str, pads: bool) -> None:
    config = small_config(kind, num_labels=3)
    tokenizer = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    with torch.no_grad():
        alone = torch.cat([base(input_ids=torch.tensor([row])).logits for row in ids])
    assert probe.classifier_pads(base, tokenizer) is pads
    rows = [tokens.Tokens(row, len(row), label=1) for row in ids]
    scores = likelihood.class_scores(base, rows, pad_id=0, batch_size=4)
    assert torch.allclose(torch.tensor(scores), alone.log_softmax(-1), atol=1e-5)
    losses = models_losses.answer_losses(base, batches.collate(rows, 0))
    assert torch.allclose(losses, -alone.log_softmax(-1)[:, 1], atol=1e-5)


def test_a_classifier_that_cannot_read_what_its_tokenizer_gives_is_one_line() -> None:
    """BART's head reads the last end mark of a row, and the embedded tokenizer adds none."""
    torch.manual_seed(0)
    base: Any = AutoModelForSequenceClassification.from_config(small_config("bart")).eval()
    tokenizer = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
    with pytest.raises(InputError, match=r"^model: BartForSequenceClassification cannot read the rows .*<eos> token"):
        probe.classifier_pads(base, tokenizer)
