"""What a forward pass for losses leaves out changes neither losses nor gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from torch.nn import functional

from peftsweep.data import batches, templates
from peftsweep.data.batches import Batch
from peftsweep.data.tokens import Tokens
from peftsweep.evaluation import decoding, evaluate
from peftsweep.models import attach, model, parts, probe, shortcuts
from peftsweep.models import losses as models_losses
from peftsweep.models.shortcuts import SHORTCUTS, Shortcuts
from peftsweep.schema import ModelConfig
from tests.architectures import GENERATING, make

NONE = Shortcuts()
ALL = Shortcuts(answers_only=True, bare_head=True, no_mask=True)
FAST = ("llama", "gemma3_text", "gpt2", "qwen2_moe")  # plain, with windows, of another layout, with experts
KINDS = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in GENERATING]
QV = ["q_proj", "v_proj"]


def batch() -> Batch:
    """Three rows of unlike length; of one the answer is in two parts, as in a conversation."""
    rows = [Tokens([5 + n * 7 % 500 for n in range(length)], start) for length, start in ((11, 3), (6, 1), (9, 8))]
    mask = [3 <= n < 5 or n >= 8 for n in range(11)]
    return batches.collate([rows[0]._replace(trained=mask), *rows[1:]], 0)


def losses_and_gradients(trained: Any, short: Shortcuts, over: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """With a weight of its own for each loss, as the slots of a pack have."""
    setattr(parts.base_of(trained), SHORTCUTS, short)
    trained.zero_grad()
    losses = models_losses.answer_losses(trained, over)
    (losses * torch.linspace(0.5, 2, len(losses))).sum().backward()
    gradients = [p.grad.flatten() for p in trained.parameters() if p.grad is not None]
    return losses.detach(), torch.cat(gradients)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def check(trained: Any, short: Shortcuts = ALL, bound: float = 1e-5) -> None:
    """The same with ``short`` as without, and twice the same."""
    plain = losses_and_gradients(trained, NONE, batch())
    for _ in range(2):
        found = losses_and_gradients(trained, short, batch())
        assert [apart(one, other) <= bound for one, other in zip(found, plain, strict=True)] == [True, True]


def lora(base: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    given: dict[str, Any] = {"r": 4, "target_modules": QV, "task_type": "CAUSAL_LM"} | options
    adapted = get_peft_model(base, LoraConfig(**given))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_every_architecture_are_those_of_all_logits(kind: str) -> None:
    base = make(kind)
    check(base.requires_grad_(True), probe.probe(base).shortcuts)
    check(
        lora(base.requires_grad_(False), target_modules=attach.linear_names(base, LoraConfig())),
        probe.probe(base).shortcuts,
    )


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "capped": {"final_logit_softcapping": 0.5},
    "scaled": {"logits_scaling": 3.0},
    "multiplied": {"logit_scale": 0.3},
}
OF_HEADS = {"capped": "gemma2", "scaled": "granite", "multiplied": "cohere"}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_followed_by_something_keeps_it(head: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.architectures import SIZES

    torch.manual_seed(0)
    config = AutoConfig.for_model(OF_HEADS.get(head, "llama"), **SIZES | {"head_dim": 8} | HEADS[head])
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found = probe.probe(base).shortcuts
    assert found.answers_only
    assert found.bare_head == (head not in OF_HEADS)
    check(lora(base), found)


def test_a_biased_head_keeps_its_bias() -> None:
    base = make("gpt_neox")
    base.lm_head = torch.nn.Linear(32, 533)
    found = probe.probe(base).shortcuts
    assert found == ALL
    check(lora(base, target_modules=["query_key_value"]), found)


@pytest.mark.parametrize(
    "method",
    [
        {"target_modules": [*QV, "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": [*QV, "embed_tokens"]},
        {"trainable_token_indices": [5, 12]},
        {"lora_dropout": 0.0, "use_dora": True},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_what_a_method_adds_to_the_head_or_the_embeddings_counts(method: dict[str, Any], tied: bool) -> None:
    base = make("llama", tie_word_embeddings=tied)
    found = probe.abilities(base).shortcuts
    adapted = lora(base, **method)
    plainly = type(base.get_output_embeddings()) is torch.nn.Linear
    assert models_losses.allowed_shortcuts(adapted).answers_only == plainly
    check(adapted, found)


@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(num_virtual_tokens=3), PrefixTuningConfig(num_virtual_tokens=3)],
    ids=["prompt", "prefix"],
)
def test_virtual_tokens_are_not_scored_and_keep_their_mask(config: Any) -> None:
    base = make("llama")
    assert probe.abilities(base).shortcuts == ALL
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    adapted = get_peft_model(base, config)
    assert models_losses.allowed_shortcuts(adapted) == replace(ALL, no_mask=False)
    check(adapted)


def test_trained_tokens_keep_all_logits_where_head_and_embeddings_are_tied() -> None:
    base = make("llama", tie_word_embeddings=True)
    adapted = get_peft_model(base, TrainableTokensConfig(token_indices=[5, 12], task_type="CAUSAL_LM"))
    check(adapted, probe.probe(make("llama").requires_grad_(False)).shortcuts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_cross_entropy_in_parts_is_torch_s(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias, dtype=dtype).requires_grad_(False)
    hidden, targets, weights = torch.randn(23, 16, dtype=dtype), torch.randint(50, (23,)), torch.rand(23)
    monkeypatch.setattr(shortcuts, "CHUNK", 4 * 50)  # six parts, the last one smaller

    def both(losses: Any) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = hidden.clone().requires_grad_()
        found = losses(leaf)
        (found * weights).sum().backward()
        assert leaf.grad is not None
        return found.detach(), leaf.grad

    found = both(lambda leaf: shortcuts.linear_cross_entropy(leaf, head, targets))
    plain = both(lambda leaf: functional.cross_entropy(head(leaf).float(), targets, reduction="none"))
    limit = 1e-6 if dtype == torch.float32 else 2 * 2.0**-8  # two roundings of a number of 8 bits
    assert [apart(*pair) <= limit for pair in zip(found, plain, strict=True)] == [True, True]
    with torch.no_grad():
        assert torch.equal(shortcuts.linear_cross_entropy(hidden, head, targets), found[0])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_under_autocast_the_head_computes_in_its_format(dtype: torch.dtype, bound: float) -> None:
    adapted = lora(make("llama"))
    with torch.autocast("cpu", dtype=dtype):
        check(adapted, bound=bound)


def test_a_second_derivative_is_refused() -> None:
    head = torch.nn.Linear(4, 9).requires_grad_(False)
    hidden = torch.randn(3, 4, requires_grad=True)
    losses = shortcuts.linear_cross_entropy(hidden, head, torch.tensor([1, 2, 3]))
    weights = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses, hidden, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_logits_of_the_whole_batch_never_exist() -> None:
    adapted = lora(make("llama"))
    setattr(parts.base_of(adapted), SHORTCUTS, ALL)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (533,):
                sizes.append(result.numel() // 533)
            return result

    over = batch()
    with Sizes():
        models_losses.answer_losses(adapted, over).sum().backward()
    assert max(size for size in sizes if size != 32) == over.answer_tokens  # 32 is the head's weight, transposed


def test_a_probe_that_finds_another_loss_leaves_the_shortcut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = shortcuts.linear_cross_entropy
    monkeypatch.setattr(shortcuts, "linear_cross_entropy", lambda *args: exact(*args) * 1.01)
    assert probe.probe(make("llama").requires_grad_(False)).shortcuts == replace(ALL, bare_head=False)


def test_a_probe_that_finds_another_gradient_leaves_the_shortcut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = shortcuts.linear_cross_entropy
    monkeypatch.setattr(
        shortcuts, "linear_cross_entropy", lambda *args: exact(*args) * 0.9 + 0.1 * exact(*args).detach()
    )
    assert probe.probe(make("llama").requires_grad_(False)).shortcuts == replace(ALL, bare_head=False)


def test_places_are_the_answers_of_the_mask_in_every_slot() -> None:
    over = batch()
    for times in (1, 3):
        many = over.repeated(times)
        assert torch.equal(many.targets, many.input_ids[:, 1:][many.answer_mask])
        assert torch.equal(many.owners, many.answer_mask.nonzero()[:, 0])


@pytest.mark.parametrize("trained", [False, True])
def test_the_head_is_given_contiguous_hidden_states(trained: bool) -> None:
    """In bfloat16 on a CPU the product of a slice takes many times as long."""
    base = make("llama")
    adapted = lora(base, target_modules=[*QV, "lm_head"]) if trained else base
    probe.abilities(base)
    setattr(base, SHORTCUTS, NONE)
    given: list[bool] = []
    hook = base.get_output_embeddings().register_forward_pre_hook(lambda _, args: given.append(args[0].is_contiguous()))
    models_losses.answer_losses(adapted, batch())
    tokenizer = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
    decoding.generate(adapted.eval(), tokenizer, ["a", "It is a cat"], max_new_tokens=2, batch_size=2)
    choices = tuple(templates.Choice("It is", f" {name}", name, name) for name in "ab")
    examples = [templates.Example("", "", choices, gold=0), templates.Example("", "", choices[::-1], gold=1)]
    evaluate.multiple_choice(adapted, tokenizer, examples)
    hook.remove()
    assert len(given) >= 5
    assert all(given)
