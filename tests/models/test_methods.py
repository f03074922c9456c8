"""Every PEFT method: it learns, changes what it should and nothing else, or is refused for a reason."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peftsweep import InputError
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.config.fill import conf_dir
from peftsweep.data import batches, templates, tokens
from peftsweep.forecast import forecast
from peftsweep.models import losses, model, parts, saved
from peftsweep.observe.measure import Meter
from peftsweep.schema import Schedule, Task
from peftsweep.study.record import Result, Status
from peftsweep.tiny import task
from peftsweep.training import loop
from tests.architectures import small_config

Compose = Callable[..., Trial]

METHODS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(Path(conf_dir(), "method").glob("*.yaml"))}
LEFT_OUT = ("xlora",)  # it mixes adapters that must have been trained before
ON = {"loftq": "quant=4bit"}  # what a method cannot do without
SMALL_ENCODER = (
    *("model=distilbert", "model.init=random", "model.architecture.dim=64", "model.architecture.n_layers=2"),
    *("model.architecture.hidden_dim=128", "model.architecture.n_heads=2", "dataset=tiny_direction"),
)
ADAPTERS = [name for name, method in METHODS.items() if method.get("method") and name not in LEFT_OUT]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows() -> list[tokens.Tokens]:
    examples = templates.examples(task.rows("train", 96), "{question}\n", "{answer}")
    return tokens.tokenize(model.load_tokenizer(tiny()), examples, 128)


def tiny() -> Any:
    from peftsweep.schema import ModelConfig

    return ModelConfig(name_or_path="tiny")


def adapt(one: Trial, rows: list[tokens.Tokens], steps: int) -> tuple[float, float, dict[str, Any], dict[str, Any]]:
    """Attach and train: the loss on one fixed batch in eval mode before and after, and the tensors that changed."""
    batch = batches.collate(rows[:16], 0)
    base = model.load(one.config.model, build.quantization(one), CPU, len(one.config.dataset.classes))
    torch.manual_seed(0)
    tokenizer = model.load_tokenizer(one.config.model)
    adapted = build.attach_method(one, base, steps, build.initialisation(one, Path(), base, rows, tokenizer)).eval()
    state = {name: tensor.detach().clone() for name, tensor in adapted.state_dict().items()}
    expected = {name for name, _ in parts.trainable_parameters(adapted)}
    with torch.no_grad():
        before = losses.answer_losses(adapted, batch).mean().item()
    config = one.config.train
    config.steps, config.warmup = steps, 0.0
    loop.train(adapted, rows, config, pad_id=0, seed=0, meter=Meter(CPU), log=lambda row: None)
    with torch.no_grad():
        after = losses.answer_losses(adapted, batch).mean().item()
    changed = {
        name
        for name, tensor in adapted.state_dict().items()
        if name in state and (tensor.shape != state[name].shape or not torch.equal(tensor, state[name]))
    }
    return before, after, dict.fromkeys(expected), dict.fromkeys(changed)


def test_every_type_of_the_installed_peft_has_a_yaml() -> None:
    classes = {str(kind.value): config.__name__ for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    methods = [method["method"] for method in METHODS.values() if "_target_" in method.get("method", {})]
    named = {method["_target_"].removeprefix("peft.") for method in methods}
    assert not {kind for kind, config in classes.items() if config not in named}


def some(names: list[str], few: tuple[str, ...]) -> list[Any]:
    """All of ``names``, of which the fast tier takes a ``few``: the same code of ours runs on each of them."""
    assert {*few} <= {*names}
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


# One each whose weights are added, initialised from the rows, multiplied, put before the text, shared. Two tests below
# train AdaLoRA, whose weights are pruned.
KINDS = ("lora", "eva", "ia3", "prefix_tuning", "vera")


FEW_ROWS = {"eva": ["method_setup.rows=16"]}  # of the data that its first weights come from


@pytest.mark.parametrize("name", some(ADAPTERS, KINDS))
def test_a_method_learns_and_changes_only_its_own(name: str, compose: Compose, rows: list[tokens.Tokens]) -> None:
    one = compose(f"method={name}", "train.batch_size=8", ON.get(name, "quant=none"), *FEW_ROWS.get(name, []))
    before, after, expected, changed = adapt(one, rows, steps=4)
    assert after < before
    # AdaLoRA masks singular values by name; buffers such as the statistics of a router may move with training.
    parameters = {name for name in changed if name in expected}
    frozen = {name for name in changed if name not in expected and "base_layer" in name}
    assert parameters, "nothing was trained"
    assert not frozen, "the base has moved"


@pytest.fixture(scope="module")
def directions() -> list[tokens.Tokens]:
    examples = templates.examples(task.direction_rows("train", 96), "{story}", "{direction}", classes=["less", "more"])
    return tokens.tokenize_for_classes(model.load_tokenizer(tiny()), examples, 128, ["less", "more"])


@pytest.mark.parametrize(
    "name", ["full", pytest.param("qlora", marks=pytest.mark.slow), *some(ADAPTERS, ("lora", "prefix_tuning"))]
)
def test_a_classifier_learns_with_its_head_or_is_refused(
    name: str, compose: Compose, directions: list[tokens.Tokens]
) -> None:
    words = [ON[name]] if name in ON else []
    one = compose(*SMALL_ENCODER, f"method={name}", "train.learning_rate=1e-3", *words)
    if name in ("adaption_prompt", "cartridge", "cpt", "prefix_tuning", "shadow", "trainable_tokens"):
        reason = forecast.refusal(one) or ""
        assert reason.startswith(("not with a classifier's head", "not on an encoder"))
        return
    assert forecast.refusal(one) is None
    before, after, expected, changed = adapt(one, directions, steps=10)
    assert after < before
    heads = [name for name in changed if "classifier" in name and name in expected]
    assert {name.rpartition(".")[2] for name in heads} == {"weight", "bias"}
    assert {"pre_" in name for name in heads} == {True, False}


def test_no_head_is_quantised(compose: Compose) -> None:
    for quant, words in (("4bit", SMALL_ENCODER), ("8bit", ("dataset=tiny_direction", "model.task=seq_cls"))):
        one = compose(*words, f"quant={quant}")
        base = model.load(one.config.model, build.quantization(one), CPU, 2)
        head = [type(m) for n, m in base.named_modules() if n in ("pre_classifier", "classifier", "score")]
        assert set(head) == {torch.nn.Linear}
        assert any("bit" in type(module).__name__ for module in base.modules())


def test_full_fine_tuning_changes_every_weight(compose: Compose, rows: list[tokens.Tokens]) -> None:
    before, after, expected, changed = adapt(compose("method=full"), rows, steps=4)
    assert after < before
    assert set(expected) <= set(changed)


def test_qlora_is_the_same_trial_as_lora_on_a_4_bit_base(compose: Compose) -> None:
    assert compose("method=qlora").identity == compose("method=lora", "quant=4bit").identity


@pytest.mark.parametrize("name", some(["lora_plus", "lora_fa", "riemannian"], ("lora_fa",)))
def test_an_optimizer_made_for_lora_learns(name: str, compose: Compose, rows: list[tokens.Tokens]) -> None:
    one = compose(f"method={name}", "train.batch_size=8")
    before, after, _, changed = adapt(one, rows, steps=4)
    assert after < before
    assert any("lora_B" in key for key in changed)
    assert any("lora_A" in key for key in changed) == (name != "lora_fa")
    plain = forecast.check(compose("method=lora")).trainable_parameters
    assert (forecast.check(one).trainable_parameters == plain) == (name != "lora_fa")


def test_adalora_prunes_to_its_budget(compose: Compose, rows: list[tokens.Tokens]) -> None:
    one = compose("method=adalora", "method.tinit=2", "method.tfinal=2", "method.target_r=4", "train.batch_size=4")
    base = model.load(one.config.model, None, CPU)
    torch.manual_seed(0)
    adapted: Any = build.attach_method(one, base, 8)
    one.config.train.steps = 8
    loop.train(adapted, rows, one.config.train, pad_id=0, seed=0, meter=Meter(CPU), log=lambda row: None)
    values = torch.cat([p.flatten() for name, p in adapted.named_parameters() if "lora_E" in name])
    assert (values != 0).sum() == 4 * 8  # a budget of target_r a module, 8 modules


def test_the_best_weights_of_adalora_are_saved_with_the_ranks_that_they_had(
    compose: Compose, rows: list[tokens.Tokens], tmp_path: Path
) -> None:
    """Ranks go on being dealt out after the best validation; those of the end would cut other weights away."""
    one = compose("method=adalora", "method.tinit=1", "method.tfinal=2", "method.target_r=1", "train.learning_rate=0.1")
    config = replace(
        one.config.train, steps=8, eval_every="1", keep_best=True, schedule=Schedule.constant, batch_size=4
    )
    torch.manual_seed(0)
    adapted: Any = build.attach_method(one, model.load(one.config.model, None, CPU), 8)
    worse = itertools.chain([3.0, 2.0, 2.0, 1.0], itertools.repeat(9.0))  # the fourth is the best
    options: dict[str, Any] = {"meter": Meter(CPU), "log": lambda row: None, "validate": lambda: {"loss": next(worse)}}
    found = loop.train(adapted, rows, config, pad_id=0, seed=0, **options)
    assert found.best_step == 4
    batch = batches.collate(rows[:4], 0)
    with torch.no_grad():
        expected = losses.answer_losses(adapted, batch)
        saved.save(adapted, tmp_path)
        again = PeftModel.from_pretrained(model.load(one.config.model, None, CPU), str(tmp_path)).eval()
        assert torch.allclose(losses.answer_losses(again, batch), expected, atol=1e-3)


# Shadow attaches a second model, and its regulariser is asked for as theirs are.
@pytest.mark.parametrize("name", ["kasa", "adalora", pytest.param("shadow", marks=pytest.mark.slow)])
def test_a_method_with_a_regulariser_adds_it_and_others_do_not(
    name: str, compose: Compose, rows: list[tokens.Tokens]
) -> None:
    one = compose(f"method={name}")
    adapted = build.attach_method(one, model.load(one.config.model, None, CPU), 10).train()
    batch = batches.collate(rows[:4], 0)
    losses.answer_losses(adapted, batch)
    found = losses.auxiliary_loss(adapted, batch)
    assert found is not None
    assert found.requires_grad
    assert found.item() > 0
    plain = build.attach_method(compose("method=lora"), model.load(one.config.model, None, CPU), 10)
    assert losses.auxiliary_loss(plain, batch) is None


QUANTISED = [(name, quant) for name in METHODS if name not in LEFT_OUT for quant in ("8bit", "4bit")]


@pytest.mark.slow
def test_the_refusals_are_those_of_the_table(compose: Compose) -> None:
    same = ("qlora", "lora_plus", "lora_fa", "riemannian")  # lora's, with another optimizer or base
    refused = {
        (name, quant)
        for name, quant in QUANTISED
        if name not in same and forecast.refusal(compose(f"method={name}", f"quant={quant}"))
    }
    both = {
        "corda",
        "lora_ga",
        "adamss",
        "delora",
        "frod",
        "full",
        "glora",
        "kasa",
        "mica",
        "osf",
        "psoft",
        "supertuning",
    }
    both |= {"corda", "lora_ga", "deft", "hra", "peanut", "tinylora", "unilora"}
    expected = {(name, quant) for name in both for quant in ("8bit", "4bit")}
    assert refused == expected | {
        ("loha", "4bit"),
        ("lokr", "4bit"),
        ("dora", "8bit"),
        ("pissa", "8bit"),
        ("loftq", "8bit"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "quant"), QUANTISED)
def test_every_pair_either_learns_or_deserves_its_refusal(
    name: str, quant: str, compose: Compose, rows: list[tokens.Tokens]
) -> None:
    """A refused pair, tried all the same, fails, or starts elsewhere than the base, or learns nothing, or is LoRA."""
    one = compose(f"method={name}", f"quant={quant}")
    refused = forecast.refusal(one)
    if not refused:
        before, after, _, _ = adapt(one, rows, steps=20)
        assert after < before
        return
    if not one.config.method:
        return  # full fine-tuning would train embeddings and norms alone, which is seen in its counts
    try:
        before, after, _, _ = adapt(one, rows, steps=20)
    except Exception as error:
        print(f"{name} {quant}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
        return
    start, end, _, _ = adapt(compose(f"method={name}"), rows, steps=20)
    lora_before, lora_after, _, _ = adapt(
        compose("method=lora", f"quant={quant}", f"train.learning_rate={one.config.train.learning_rate}"), rows, 20
    )
    off = max(abs(before - start), abs(after - end)) > 0.05  # 8-bit rounding alone moves a loss by 0.01
    idle = abs(after - before) < 1e-3
    lora = abs(after - lora_after) < 1e-6 and abs(before - lora_before) < 1e-6
    print(f"{name} {quant}: off={off} idle={idle} lora={lora} {before:.3f} -> {after:.3f}")
    assert off or idle or lora


OPTIONS = {  # of training, beside those that are numbers only
    "checkpointing": ["train.checkpointing=true"],
    "autocast": ["train.autocast=bfloat16"],
    "float16": ["model.dtype=float16", "train.autocast=float16"],
    "narrow adapter": ["model.dtype=bfloat16", "train.autocast_adapter_dtype=false"],
    "accumulation": ["train.accumulation=2", "train.batch_size=2", "train.pad_to_multiple_of=8"],
    "compile": ["train.compile=eager"],
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_method_trains_with_every_option_or_is_refused(
    option: str, compose: Compose, rows: list[tokens.Tokens]
) -> None:
    """A refused one, tried all the same, fails."""
    wrong = {}
    for name in METHODS.keys() - {*LEFT_OUT, *ON}:
        one = compose(f"method={name}", "train.batch_size=4", *OPTIONS[option])
        refused, failed = forecast.refusal(one), None
        try:
            adapt(one, rows, steps=4)
        except FloatingPointError:
            pass  # its steps overflowed, which is reported; the gradient scaler needs more of them
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        if bool(refused) != bool(failed):
            wrong[name] = refused, failed
    assert not wrong


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["method=prefix_tuning", "train.checkpointing=true"],
            "not with train.checkpointing=true: layers that are",
        ),
        (["method=cartridge", "train.checkpointing=true"], "not with train.checkpointing=true: layers that are"),
        (["method=poly", "train.checkpointing=true"], "not with train.checkpointing=true"),
        (
            ["method=full", "model.dtype=float16", "train.autocast=float16"],
            "not with model.dtype=float16 and train.auto",
        ),
        (["method=eva", "model.dtype=float16", "train.autocast=float16"], "gradients in 16 bits cannot be unscaled"),
        (
            ["model.dtype=float16", "train.autocast=float16", "train.autocast_adapter_dtype=false"],
            "train.autocast_adapter_dtype=false: gradients in 16 bits",
        ),
        (["train.checkpointing=true"], None),
        (["model.dtype=float16", "train.autocast=float16"], None),
    ],
)
def test_what_a_library_cannot_train_is_refused(words: list[str], reason: str | None, compose: Compose) -> None:
    refused = forecast.refusal(compose(*words))
    assert refused is None if reason is None else reason in (refused or "")


@pytest.mark.parametrize(("kind", "wanted"), [("ctrl", "CTRLLMHeadModel"), ("llama", None)])
def test_checkpointing_that_transformers_has_not_is_refused(kind: str, wanted: str | None, compose: Compose) -> None:
    model.CLASSES[Task.causal_lm].from_config(small_config(kind)).save_pretrained("base")
    model.load_tokenizer(tiny()).save_pretrained("base")
    words = ["model=causal_lm", "model.name_or_path=./base", "train.checkpointing=true"]
    refused = forecast.refusal(compose(*words))
    assert refused == (wanted and f"not with train.checkpointing=true: transformers' {wanted} does not support it")
    assert forecast.refusal(compose(*words[:2])) is None


def test_adalora_needs_steps_to_weigh_its_ranks(compose: Compose) -> None:
    with pytest.raises(InputError, match=r"method.tfinal=1: of 2 steps; AdaLoRA needs at least 2"):
        forecast.check(compose("method=adalora", "train.steps=2"))
    assert forecast.check(compose("method=adalora", "train.steps=3")).trainable_parameters


@pytest.mark.slow  # few CPUs are fast in bfloat16; in the fast tier quantised bases have 32 bits
@pytest.mark.parametrize("quant", ["4bit", "8bit"])
@pytest.mark.parametrize("name", ["ia3", "road", "randlora", "pvera", "adalora"])
def test_a_quantised_base_of_16_bits_trains_and_comes_back(
    name: str, quant: str, run_unwritten: Callable[..., Result]
) -> None:
    result = run_unwritten(f"method={name}", f"quant={quant}", "model.dtype=bfloat16", "adapter.check=true")
    assert result.status is Status.success, result.error
    assert result.train_info["reloads"], result.train_info


def test_what_cannot_be_had_on_a_16_bit_base_is_refused(compose: Compose) -> None:
    words = ["method=shira", "quant=8bit"]
    assert "whose other weights have 16 bits" in (forecast.refusal(compose(*words, "model.dtype=bfloat16")) or "")
    assert forecast.refusal(compose(*words)) is None
