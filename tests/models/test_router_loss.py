"""The load-balancing loss of a mixture's routers is trained on as transformers does, and is in no score."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from torch import nn
from transformers import AutoModelForCausalLM

from peftsweep.config.compose import Trial
from peftsweep.data import batches
from peftsweep.data.tokens import Tokens
from peftsweep.evaluation import decoding, likelihood
from peftsweep.models import attach, losses, model, parts, probe, saved
from peftsweep.observe.measure import Meter
from peftsweep.schema import ModelConfig, TargetsConfig, TrainConfig
from peftsweep.sweep import packing
from peftsweep.training import capture, loop
from tests.architectures import small_config
from tests.conftest import SAME_WEIGHTS, apart

CPU = torch.device("cpu")
KINDS = ["mixtral", "qwen2_moe", "gpt_oss"]  # windows or none, shared experts, a router with a bias
# In the fast tier one of them is trained and scored; of the others too the loss is compared.
ONE = ["qwen2_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "qwen2_moe")]
RATE = 1e-3


def write(kind: str, folder: Path, *, router_logits: bool = True, weight: float = 1.0) -> ModelConfig:
    torch.manual_seed(0)
    config = small_config(kind, output_router_logits=router_logits, router_aux_loss_coef=weight)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return ModelConfig(name_or_path=str(folder))


def load(config: ModelConfig) -> Any:
    base = model.load(config, None, CPU)
    probe.abilities(base)
    return base


def adapted(base: Any, method: Any = None) -> Any:
    torch.manual_seed(0)
    method = method or LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return attach.attach(copy.deepcopy(base), method, TargetsConfig(), {})


def rows() -> list[Tokens]:
    """Of unlike lengths, so that batches are padded."""
    draw = random.Random(0)
    lengths = [draw.randint(6, 24) for _ in range(24)]
    return [Tokens([draw.randint(3, 60) for _ in range(n)], draw.randint(1, n - 3)) for n in lengths]


def trained(base: Any, *, steps: int = 5, size: int = 4, **options: Any) -> tuple[list[float], dict[str, Any]]:
    config = TrainConfig(steps=steps, batch_size=size, log_every=1, learning_rate=RATE, warmup=0, clip=0.0, **options)
    config.schedule = type(config.schedule)("constant")
    made, lines = adapted(base), list[Any]()
    loop.train(made, rows(), config, pad_id=0, seed=0, meter=Meter(CPU), log=lines.append)
    return [line["loss"] for line in lines if "loss" in line], dict(parts.trainable_parameters(made))


@pytest.mark.parametrize("kind", ONE)
def test_training_follows_the_loss_that_transformers_gives(kind: str, tmp_path: Path) -> None:
    config = write(kind, tmp_path, weight=5.0)
    made = adapted(AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)).train()
    weights = [p for p in made.parameters() if p.requires_grad]
    optimizer, expected = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0), []
    order = batches.batch_order([len(row.ids) for row in rows()], 4, 0)
    for _ in range(5):
        batch = batches.collate([rows()[n] for n in next(order)], 0)
        labels = batch.input_ids.clone()
        labels[:, 0] = -100
        labels[:, 1:] = labels[:, 1:].masked_fill(~batch.answer_mask, -100)
        output = made(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(output.loss.item() - 5.0 * output.aux_loss.item())  # what is reported is that of the answers
    found = trained(load(config))
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert apart(found[1], dict(parts.trainable_parameters(made))) <= SAME_WEIGHTS
    without = trained(load(write(kind, tmp_path, router_logits=False)))
    assert apart(without[1], found[1]) > 20 * SAME_WEIGHTS


def test_checkpointing_keeps_the_loss_of_the_routers(tmp_path: Path) -> None:
    base = load(write("qwen2_moe", tmp_path))
    assert apart(trained(base, checkpointing=True)[1], trained(base)[1]) <= SAME_WEIGHTS


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_forward_gives_the_loss_over_all_tokens_but_padding(kind: str, method: str, tmp_path: Path) -> None:
    base, batch = load(write(kind, tmp_path, weight=0.5)), batches.collate(rows()[:4], 0)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    made = adapted(base, prompts if method == "prompt_tuning" else None).train()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    plain = made(**inputs, output_router_logits=True)
    found = losses.forward_losses(made, batch).routers
    assert found is not None
    assert found.item() == pytest.approx(0.5 * plain.aux_loss.item(), rel=1e-5)
    step = losses.regularised_loss(made, batch).item()
    assert step == pytest.approx(losses.answer_losses(made, batch).mean().item() + found.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ONE)
def test_no_score_and_no_text_contains_it(kind: str, tmp_path: Path) -> None:
    with_routers, plain = (load(write(kind, tmp_path / str(n), router_logits=n)) for n in (True, False))
    assert probe.abilities(with_routers).facts() == probe.abilities(plain).facts()
    assert probe.abilities(with_routers).row_cache
    batch = batches.collate(rows()[:4], 0)
    with torch.no_grad():
        assert losses.forward_losses(with_routers.eval(), batch).routers is None
        assert torch.equal(losses.answer_losses(with_routers, batch), losses.answer_losses(plain, batch))
    tokenizer = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
    groups = [[("what is it? ", "a b"), ("what is it? ", "c")], [("and of which kind? ", "d e f")]]

    def scores(base: Any) -> Any:
        likelihoods = likelihood.grouped_likelihoods(base, tokenizer, groups, batch_size=2, max_length=64, marked=False)
        return likelihoods, decoding.generate(base, tokenizer, ["one two", "three"], max_new_tokens=5)

    assert scores(with_routers) == scores(plain)


def test_what_is_saved_asks_for_it_as_the_checkpoint_does(tmp_path: Path) -> None:
    base = load(write("mixtral", tmp_path / "base"))
    saved.save(base, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["output_router_logits"] is True
    assert base.config.output_router_logits is False


def test_such_a_model_is_neither_packed_nor_captured(tmp_path: Path, compose: Callable[..., Trial]) -> None:
    for router_logits in (True, False):
        config = write("mixtral", tmp_path / str(router_logits), router_logits=router_logits)
        reason = capture.unfit(adapted(load(config)), TrainConfig())
        assert (reason == "its routers add to the loss") == router_logits
        trial = compose("model=causal_lm", f"model.name_or_path={config.name_or_path}", "dataset=tiny_math")
        assert ("routers" in (packing.alone(trial) or "")) == router_logits


def test_a_weight_of_zero_adds_nothing(tmp_path: Path) -> None:
    base: nn.Module = load(write("mixtral", tmp_path, weight=0.0))
    assert losses.forward_losses(base.train(), batches.collate(rows()[:2], 0)).routers is None
