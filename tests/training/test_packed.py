"""Packing: many adapters on one base come to the numbers that each comes to alone, within rounding.

No test here asks for equality to the bit between a pack and a trial alone: slots.py says why.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from peftsweep.data import batches, templates, tokens
from peftsweep.evaluation import evaluate, likelihood, metrics
from peftsweep.models import attach, model, probe
from peftsweep.models import losses as models_losses
from peftsweep.models import parts as models_parts
from peftsweep.observe.measure import Meter
from peftsweep.schema import Dtype, ModelConfig, Schedule, TargetsConfig, TrainConfig
from peftsweep.tiny import task
from peftsweep.training import fused, graphs, loop, packed
from peftsweep.training.checkpoint import Checkpoints
from peftsweep.training.run import Trained
from peftsweep.training.slots import Pack
from tests.conftest import SAME_WEIGHTS, apart

CPU = torch.device("cpu")
TINY = ModelConfig(name_or_path="tiny")
SEED = 3
QUANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
SAME = 1e-5  # relative: of a loss, for each step up to it; of a likelihood; 170 times the unit roundoff of 32 bits
pytestmark = pytest.mark.kernels


@dataclass
class Spec:
    """A slot in the words of a trial."""

    r: int = 8
    alpha: int = 16
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj", "up_proj")
    train: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None

    def method(self) -> LoraConfig:
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            use_rslora=self.rslora,
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            layers_to_transform=self.layers,
        )

    def config(self, **shared: Any) -> TrainConfig:
        return TrainConfig(
            **{"steps": 10, "batch_size": 4, "log_every": 1, "learning_rate": 4e-3} | shared | self.train
        )


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SLOTS = [
    Spec(),
    Spec(r=2, alpha=8, targets=ALL, train={"learning_rate": 1e-3}),
    Spec(r=16, alpha=16, rslora=True, targets=("k_proj", "down_proj"), train={"weight_decay": 0.1}),
    Spec(r=5, targets=ALL, train={"steps": 7, "schedule": Schedule.linear, "clip": 0.05}),
]
BRIEF = replace(SLOTS[3], train=SLOTS[3].train | {"steps": 2})


@dataclass
class Found:
    """What a training came to."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    score: metrics.Score
    trained: Trained
    error: Exception | None = None


def base(quant: str = "none", dtype: Dtype = Dtype.float32) -> Any:
    return copy.deepcopy(_plain(dtype)) if quant == "none" else _loaded(quant, dtype)


@functools.cache
def _plain(dtype: Dtype) -> Any:
    """The base without quantisation, loaded once and never changed."""
    return _loaded("none", dtype)


def _loaded(quant: str, dtype: Dtype) -> Any:
    options = BitsAndBytesConfig(**QUANTS[quant]) if QUANTS[quant] else None
    loaded = model.load(ModelConfig(name_or_path="tiny", dtype=dtype), options, CPU)
    probe.abilities(loaded)
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model.load_tokenizer(TINY)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[tokens.Tokens]:
    examples = templates.examples(task.rows("train", 48), "{question} ", "{answer}")
    return tokens.tokenize(tokenizer, examples, 128)


def score(adapted: Any, tokenizer: Any) -> metrics.Score:
    found = evaluate.perplexity(adapted.eval(), tokenizer, questions(8))
    return found.scores["perplexity"]


def alone(spec: Spec, rows: list[tokens.Tokens], tokenizer: Any, on: Any, **shared: Any) -> Found:
    torch.manual_seed(SEED)
    adapted = attach.attach(on, spec.method(), TargetsConfig(), {})
    lines: list[dict[str, Any]] = []
    config = spec.config(**shared)
    done = loop.train(adapted, rows, config, pad_id=0, seed=SEED, meter=Meter(CPU), log=lines.append)
    weights = {name: p.detach() for name, p in models_parts.trainable_parameters(adapted)}
    return Found([line["loss"] for line in lines if "loss" in line], weights, score(adapted, tokenizer), done)


def together(specs: list[Spec], rows: list[tokens.Tokens], tokenizer: Any, on: Any, **shared: Any) -> list[Found]:
    names = [f"slot{n}" for n in range(len(specs))]
    methods = {name: (spec.method(), TargetsConfig()) for name, spec in zip(names, specs, strict=True)}
    adapted = attach.attach_slots(on, methods, SEED, {})
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    slots = [
        packed.Slot(name, spec.config(**shared), lines[name].append) for name, spec in zip(names, specs, strict=True)
    ]
    ended = packed.train_packed(adapted, rows, slots, pad_id=0, seed=SEED, meter=Meter(CPU))
    found = []
    for name in names:
        adapted.set_adapter(name)
        weights = {key.replace(name, "default"): p.detach() for key, p in models_parts.trainable_parameters(adapted)}
        losses = [line["loss"] for line in lines[name] if "loss" in line]
        found.append(Found(losses, weights, score(adapted, tokenizer), ended[name].trained, ended[name].error))
    return found


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest one, relative to the largest number."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def worst_loss(packed: Found, single: Found, steps: int = 20) -> float:
    """The largest relative difference between losses of the first ``steps`` steps."""
    assert len(packed.losses) == len(single.losses)
    both = list(zip(packed.losses, single.losses, strict=True))[:steps]
    return max(abs(one - other) / abs(other) for one, other in both)


def worst_loss_a_step(packed: Found, single: Found, steps: int = 20) -> float:
    """``worst_loss``, where each difference is divided by the number of its step.

    What rounding makes of a step changes the weights, so that differences add up from step to step.
    """
    assert len(packed.losses) == len(single.losses)
    both = list(zip(packed.losses, single.losses, strict=True))[:steps]
    return max(abs(one - other) / abs(other) / n for n, (one, other) in enumerate(both, start=1))


def check_same(packed: list[Found], single: list[Found], same: float = SAME) -> None:
    """The same losses, weights and scores: what docs/concepts.md promises."""
    for one, other in zip(packed, single, strict=True):
        assert worst_loss_a_step(one, other) <= same
        if len(one.losses) <= 20:  # after more steps the weights themselves may be far apart
            # AdamW divides a gradient by its size, so that the rounding of a small one moves weights as far as others.
            assert apart(one.weights, other.weights) <= max(SAME_WEIGHTS, 2 * same * len(one.losses))
        assert other.score.stderr is not None
        assert abs(one.score.value - other.score.value) <= other.score.stderr


# A quantised base takes four times as long; the adapters beside its layers are the same.
@pytest.mark.parametrize("quant", ["none", *(pytest.param(q, marks=pytest.mark.slow) for q in QUANTS if q != "none")])
def test_a_slot_is_the_trial_alone(rows: list[tokens.Tokens], tokenizer: Any, quant: str) -> None:
    specs = [SLOTS[2], BRIEF]  # eight of them are in the slow tier, below
    single = [alone(spec, rows, tokenizer, base(quant), steps=3) for spec in specs]
    many = together(specs, rows, tokenizer, base(quant), steps=3)
    check_same(many, single)
    assert [one.trained.steps for one in many] == [3, 2]
    with pytest.raises(AssertionError):  # the check can fail
        check_same([many[0], replace(many[1], losses=many[0].losses[:2])], single)


@pytest.mark.slow  # the test below has the outputs and gradients of a layer, the one of static shapes whole steps
def test_adapters_multiplied_in_one_batch_come_near_the_trials_alone(
    rows: list[tokens.Tokens], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: products of other shapes, and gradients of another layout, are summed up in another order."""
    monkeypatch.setattr(packed, "Pack", partial(Pack, stacked=True))
    specs = [replace(spec, train={"steps": 3} | spec.train) for spec in (SLOTS[2], BRIEF)]
    single = [alone(spec, rows, tokenizer, base()) for spec in specs]
    check_same(together(specs, rows, tokenizer, base()), single, same=10 * SAME)


@pytest.mark.parametrize("specs", [SLOTS, SLOTS[1::2]], ids=["one lacks the layer", "all have it"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(Dtype.float32, 1e-5), pytest.param(Dtype.bfloat16, 0.02, marks=pytest.mark.slow)]
)
def test_adapters_multiplied_in_one_batch_compute_what_each_does_alone_on_cuda(
    dtype: Dtype, bound: float, specs: list[Spec]
) -> None:
    """Both in the format of the base, of which 0.02 are some five roundings in bfloat16."""
    methods = {f"slot{n}": (spec.method(), TargetsConfig()) for n, spec in enumerate(specs)}
    adapted = attach.attach_slots(base(dtype=dtype), methods, SEED, {})
    layer: Any = adapted.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    having = [name for name in methods if name in layer.lora_A]
    assert (len(having) < len(methods)) == (specs is SLOTS)
    x = torch.randn(2, 3, layer.in_features).to(layer.base_layer.weight.dtype)
    expected, parts = list[torch.Tensor](), (layer.lora_A, layer.lora_B)
    for name in methods:
        adapted.set_adapter(name)
        if name in having:
            torch.nn.init.normal_(layer.lora_B[name].weight, std=0.1)
        alone = fused._fused(layer, x) if name in having else layer.base_layer(x)
        if name in having:
            alone.square().sum().backward()
            expected += [part[name].weight.grad for part in parts]
        expected.append(alone.detach())
    pack = Pack(adapted, [*methods], SEED, stacked=True)
    together = layer(x.repeat(len(methods), 1, 1))
    together.square().sum().backward()
    found = list[torch.Tensor]()
    for name, output in zip(methods, together.detach().chunk(len(methods)), strict=True):
        found += [part[name].weight.grad for part in parts if name in having] + [output]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= bound * other.norm()
    pack.close()


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
def test_eight_slots_are_the_trials_alone_after_100_steps(
    rows: list[tokens.Tokens], tokenizer: Any, quant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    eight = [
        Spec(r=r, alpha=alpha, targets=targets, train={"learning_rate": rate})
        for r, alpha in ((2, 4), (16, 16))
        for rate in (1e-3, 4e-3)
        for targets in (("q_proj", "v_proj"), ALL)
    ]
    single = [alone(spec, rows, tokenizer, base(quant), steps=100) for spec in eight]
    many = together(eight, rows, tokenizer, base(quant), steps=100)
    with capsys.disabled():
        first, all_of_them = (max(map(partial(worst_loss, steps=n), many, single)) for n in (20, 100))
        scores = max(
            abs(a.score.value - b.score.value) / (b.score.stderr or 0.0) for a, b in zip(many, single, strict=True)
        )
        print(
            f"\n{quant}, 8 slots, largest relative difference of losses: {first:.2g} in 20 steps, "
            f"{all_of_them:.2g} in 100; of scores: {scores:.2g} standard errors"
        )
    check_same(many, single)
    with pytest.raises(AssertionError):
        check_same([many[1], many[0], *many[2:]], single)


# As on CUDA, where weights lie in one row, in the fast tier; `tests/training/test_capture.py` has steps of one adapter.
@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_steps_in_static_shapes_come_to_what_others_do(
    rows: list[tokens.Tokens], tokenizer: Any, monkeypatch: pytest.MonkeyPatch, stacked: bool
) -> None:
    """As on CUDA, where they are captured; a slot ends before the others."""
    monkeypatch.setattr(packed, "Pack", partial(Pack, stacked=stacked))
    specs, shared = [SLOTS[1], BRIEF], {"steps": 3, "accumulation": 2, "batch_size": 3}
    usual = together(specs, rows, tokenizer, base(), **shared)
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    static = together(specs, rows, tokenizer, base(), **shared)
    check_same(static, usual, same=10 * SAME)
    assert static[0].trained.compilation["capture_lengths"]
    assert usual[0].trained.compilation == {}


def test_slots_that_drop_are_not_taken_in_static_shapes(
    rows: list[tokens.Tokens], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    (one, _) = together([Spec(dropout=0.1), Spec(r=2)], rows, tokenizer, base(), steps=2)
    assert "dropout" in one.trained.compilation["capture_off"]


@pytest.mark.slow  # what is compared can differ in the tests of the fast tier too, there by more
def test_swapped_configurations_are_found_out(rows: list[tokens.Tokens], tokenizer: Any) -> None:
    """The nearest two slots can be: they differ in nothing but the rate, by a thousandth."""
    specs = [Spec(train={"learning_rate": rate}) for rate in (4e-3, 4.004e-3)]
    single = [alone(spec, rows, tokenizer, base(), steps=5) for spec in specs]
    with pytest.raises(AssertionError):
        check_same(together(specs[::-1], rows, tokenizer, base(), steps=5), single)


# The fast tier takes several ways at once; if it fails, the slow tier says which of them does.
@pytest.mark.parametrize(
    "shared",
    [
        {"accumulation": 2, "checkpointing": True, "optimizer": "SGD", "learning_rate": 0.1, "steps": 2},
        *(
            pytest.param(way, marks=pytest.mark.slow)
            for way in (
                {"batch_size": 1, "steps": 8},  # so few rows that some kernels sum up a pack's in another order
                {"batch_size": 1, "steps": 20},
                {"accumulation": 2},
                {"checkpointing": True},
                {"optimizer": "SGD", "learning_rate": 0.1},
            )
        ),
    ],
    ids=str,
)
def test_other_ways_to_train(rows: list[tokens.Tokens], tokenizer: Any, shared: dict[str, Any]) -> None:
    specs = [Spec(), Spec(r=3, targets=("q_proj", "o_proj"))]
    shared = {"steps": 4} | shared
    single = [alone(spec, rows, tokenizer, base(), **shared) for spec in specs]
    many = together(specs, rows, tokenizer, base(), **shared)
    check_same(many, single)


@pytest.mark.slow
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("autocast", [None, Dtype.bfloat16])
def test_16_bits_differ_as_much_as_two_layouts_of_the_trial_alone(
    rows: list[tokens.Tokens], tokenizer: Any, quant: str, autocast: Dtype | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """More padding changes nothing but the order in which numbers are summed up."""
    dtype = Dtype.float32 if autocast else Dtype.bfloat16
    many = together(SLOTS, rows, tokenizer, base(quant, dtype), steps=50, autocast=autocast)
    own, packs = [], []
    for spec, slot in zip(SLOTS, many, strict=True):
        one, padded = (
            alone(spec, rows, tokenizer, base(quant, dtype), steps=50, autocast=autocast, pad_to_multiple_of=multiple)
            for multiple in (1, 16)
        )
        own.append(difference(torch.tensor(padded.losses), torch.tensor(one.losses)))
        packs.append(difference(torch.tensor(slot.losses), torch.tensor(one.losses)))
    with capsys.disabled():
        print(f"\n{quant}, {autocast or dtype}: losses differ by {max(packs):.2g} packed, by {max(own):.2g} padded")
    assert max(packs) <= 2 * max(own)


@pytest.mark.slow  # CUT, below, has a slot that drops, and its losses are those of the trial alone
def test_dropout_is_that_of_the_trial_alone_whatever_the_pack_mates(rows: list[tokens.Tokens], tokenizer: Any) -> None:
    slot = Spec(dropout=0.3, targets=ALL)
    others = [Spec(), Spec(dropout=0.1, targets=("down_proj",), train={"steps": 2})]
    single = alone(slot, rows, tokenizer, base(), steps=3)
    check_same(together([slot, *others], rows, tokenizer, base(), steps=3)[:1], [single])
    check_same(together([others[1], slot], rows, tokenizer, base(), steps=3)[-1:], [single])
    without = alone(Spec(targets=ALL), rows, tokenizer, base(), steps=3)
    assert worst_loss(single, without) > 1e-2


def test_layers_before_the_first_adapted_one_see_the_rows_once(rows: list[tokens.Tokens], tokenizer: Any) -> None:
    specs = [Spec(layers=[2, 3]), Spec(r=2, layers=[3]), Spec(layers=[2])]
    single = [alone(spec, rows, tokenizer, base(), steps=2) for spec in specs]
    watched = base()
    seen: list[int] = []
    for layer in watched.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    check_same(together(specs, rows, tokenizer, watched, steps=2), single)
    assert seen[:4] == [4, 4, 12, 12]


def test_a_slot_that_diverges_leaves_the_others_unharmed(rows: list[tokens.Tokens], tokenizer: Any) -> None:
    bad = Spec(train={"learning_rate": 1e30, "clip": 0.0}, targets=ALL)
    many = together([SLOTS[0], bad], rows, tokenizer, base(), steps=3)
    check_same(many[:1], [alone(SLOTS[0], rows, tokenizer, base(), steps=3)])
    with pytest.raises(FloatingPointError) as ended:
        alone(bad, rows, tokenizer, base(), steps=3)
    assert isinstance(many[1].error, FloatingPointError)
    assert str(many[1].error) == str(ended.value)  # which names the step
    assert many[1].trained.steps < 3
    assert many[0].error is None


def test_a_slot_that_fails_in_its_own_part_leaves_the_others_unharmed(
    rows: list[tokens.Tokens], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("no more of this")

    monkeypatch.setattr(torch.optim, "Failing", Failing, raising=False)
    many = together([Spec(train={"optimizer": "Failing"}), SLOTS[1]], rows, tokenizer, base(), steps=3)
    assert str(many[0].error) == "no more of this"
    check_same(many[1:], [alone(SLOTS[1], rows, tokenizer, base(), steps=3)])


def test_memory_that_runs_out_is_not_one_slots_failure(
    rows: list[tokens.Tokens], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", full)
    with pytest.raises(torch.OutOfMemoryError):
        together(SLOTS[:2], rows, tokenizer, base(), steps=2)


def test_each_slot_has_its_own_validations_and_best_weights(rows: list[tokens.Tokens]) -> None:
    specs = {"slot0": Spec(), "slot1": Spec(r=2, train={"eval_every": "2", "keep_best": True})}
    adapted = attach.attach_slots(base(), {n: (s.method(), TargetsConfig()) for n, s in specs.items()}, SEED, {})
    losses = iter([1.0, 3.0])
    seen: list[dict[str, torch.Tensor]] = []

    def validate() -> dict[str, float]:
        assert adapted.active_adapter == "slot1"
        adapted.eval()
        assert likelihood.mean_loss(adapted, rows[:3], pad_id=0) > 0  # as many rows as it likes
        seen.append({name: p.detach().clone() for name, p in adapted.named_parameters() if "slot1" in name})
        return {"loss": next(losses)}

    lines: list[dict[str, Any]] = []
    slots = [
        packed.Slot("slot0", specs["slot0"].config(steps=4), lines.append),
        packed.Slot("slot1", specs["slot1"].config(steps=4), lambda row: None, validate),
    ]
    ended = packed.train_packed(adapted, rows, slots, pad_id=0, seed=SEED, meter=Meter(CPU))
    assert (ended["slot1"].trained.best_step, ended["slot1"].trained.best_loss) == (2, 1.0)
    kept = {name: p for name, p in adapted.named_parameters() if "slot1" in name}
    assert all(torch.equal(kept[name], value) for name, value in seen[0].items())
    assert not any("validation_loss" in line for line in lines)


def test_a_slot_can_be_stopped_early_and_the_shares_add_up(rows: list[tokens.Tokens]) -> None:
    methods = {name: (Spec().method(), TargetsConfig()) for name in ("slot0", "slot1")}
    adapted = attach.attach_slots(base(), methods, SEED, {})
    config = Spec().config(steps=6)
    slots = [
        packed.Slot("slot0", config, lambda row: None, stop_at=2),
        packed.Slot("slot1", config, lambda row: None),
    ]
    ended = packed.train_packed(adapted, rows, slots, pad_id=0, seed=SEED, meter=Meter(CPU))
    assert (ended["slot0"].trained.steps, ended["slot1"].trained.steps) == (2, 6)
    assert ended["slot0"].trained.step_seconds == ended["slot1"].trained.step_seconds[:2]
    total = sum(ended["slot1"].trained.step_seconds)
    assert sum(one.trained.share_seconds for one in ended.values()) == pytest.approx(total)


@pytest.mark.parametrize("stacked", [False, True])
def test_pefts_adapters_are_the_storage_again_when_the_pack_is_closed(stacked: bool) -> None:
    methods = {name: (Spec(r=r).method(), TargetsConfig()) for name, r in (("slot0", 2), ("slot1", 6))}
    adapted = attach.attach_slots(base(), methods, SEED, {})
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    forward = {name: vars(module).get("forward") for name, module in adapted.named_modules()}
    pack = Pack(adapted, ["slot0", "slot1"], SEED, stacked=stacked)
    layer: Any = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    storages = {layer.lora_A[name].weight.untyped_storage().data_ptr() for name in ("slot0", "slot1")}
    assert len(storages) == (1 if stacked else 2)
    pack.close()
    for name, p in adapted.named_parameters():
        assert torch.equal(p, before[name])
        assert p.is_contiguous()
        assert p.grad is None
    assert forward == {name: vars(module).get("forward") for name, module in adapted.named_modules()}


@pytest.mark.parametrize("rows_of_a_slot", [7, 30, 120])
def test_on_a_cpu_an_adapter_adds_what_it_adds_alone_to_the_bit(rows_of_a_slot: int) -> None:
    """Whatever the kernels, as these products have the shapes and layouts that they have alone."""
    specs = {"slot0": Spec(r=2), "slot1": Spec(r=6), "slot2": Spec(r=16, alpha=4)}
    adapted = attach.attach_slots(base(), {n: (s.method(), TargetsConfig()) for n, s in specs.items()}, SEED, {})
    layer: Any = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(len(specs), rows_of_a_slot, layer.in_features)
    weights = [part[name].weight for name in specs for part in (layer.lora_A, layer.lora_B)]
    for weight in weights:
        weight.data.normal_()
        weight.requires_grad_()
    expected = [layer.lora_B[n](layer.lora_A[n](mine)) * layer.scaling[n] for n, mine in zip(specs, x, strict=True)]
    torch.stack(expected).square().sum().backward()
    gradients = [weight.grad for weight in weights]
    pack = Pack(adapted, [*specs], SEED)
    update = pack._banks[layer].adapters.output(
        lambda rows: rows.new_zeros(*rows.shape[:-1], layer.out_features), x, None
    )
    assert all(torch.equal(mine, other) for mine, other in zip(update, expected, strict=True))
    update.square().sum().backward()
    assert all(torch.equal(weight.grad, other) for weight, other in zip(weights, gradients, strict=True))


def test_a_layer_that_is_not_given_all_rows_is_refused(rows: list[tokens.Tokens]) -> None:
    adapted = attach.attach_slots(base(), {n: (Spec().method(), TargetsConfig()) for n in ("slot0", "slot1")}, SEED, {})
    pack = Pack(adapted, ["slot0", "slot1"], SEED)
    batch = batches.collate(rows[:3], 0)
    pack.for_all(batch)
    with pytest.raises(ValueError, match="cannot be packed"):
        models_losses.answer_losses(adapted, batch)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding_A"),
        ({"lora_bias": True}, "bias"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ],
)
def test_what_a_pack_would_not_train_is_refused(options: dict[str, Any], left_out: str) -> None:
    method = LoraConfig(**{"target_modules": ["q_proj"]} | options)
    adapted = attach.attach_slots(base(), {"slot0": (method, TargetsConfig())}, SEED, {})
    with pytest.raises(ValueError, match=rf"cannot be packed: \S*{left_out}"):
        Pack(adapted, ["slot0"], SEED)


# ---- cut off, and going on -------------------------------------------------------------------------

CUT = [
    Spec(dropout=0.3, targets=ALL),
    Spec(r=2, train={"clip": 0.05, "steps": 6}),
    Spec(r=5, train={"keep_best": True}),
]
CUT_OF_ROWS = [
    Spec(targets=ALL),
    Spec(r=2, train={"clip": 0.05, "steps": 6}),
    Spec(r=5, targets=("k_proj", "down_proj"), train={"weight_decay": 0.1}),
]


class Cut:
    """Slots whose training is done in parts, with checkpoints in a folder."""

    def __init__(self, folder: Path, rows: list[tokens.Tokens]) -> None:
        self._folder, self._rows = folder, rows
        self.lines: dict[int, list[dict[str, Any]]] = {}
        self._scores: dict[int, Iterator[float]] = {}

    def checkpoints(self, number: int) -> Checkpoints:
        file = self._folder / f"{number}.jsonl"
        file.touch()
        found = Checkpoints(self._folder / str(number), {"stamp": 1}, file)
        found.find()
        return found

    def log(self, number: int) -> Any:
        return self.lines.setdefault(number, []).append

    def scores(self, number: int) -> Any:
        scores = self._scores.setdefault(number, iter([3.0, 1.0, 2.0, 5.0]))  # of all parts
        return lambda: {"loss": next(scores)}

    def alone(self, number: int, stop_at: int | None = None, **shared: Any) -> dict[str, torch.Tensor]:
        on = base()
        torch.manual_seed(SEED)
        adapted = attach.attach(on, CUT[number].method(), TargetsConfig(), {})
        options: dict[str, Any] = {"pad_id": 0, "seed": SEED, "meter": Meter(CPU), "validate": self.scores(number)}
        options |= {"checkpoints": self.checkpoints(number), "log": self.log(number), "stop_at": stop_at}
        self.trained = loop.train(adapted, self._rows, CUT[number].config(steps=8, eval_every="2"), **options)
        return {name: p.detach().clone() for name, p in models_parts.trainable_parameters(adapted)}

    def together(self, numbers: Sequence[int], stop_at: int | None = None) -> list[dict[str, torch.Tensor]]:
        names = {f"slot{n}": n for n in numbers}
        methods = {name: (CUT[n].method(), TargetsConfig()) for name, n in names.items()}
        adapted = attach.attach_slots(base(), methods, SEED, {})
        slots = [
            packed.Slot(
                name,
                CUT[n].config(steps=8, eval_every="2"),
                self.log(n),
                self.scores(n),
                checkpoints=self.checkpoints(n),
                stop_at=stop_at,
            )
            for name, n in names.items()
        ]
        self.ended = packed.train_packed(adapted, self._rows, slots, pad_id=0, seed=SEED, meter=Meter(CPU))
        weights = [
            {key.replace(f".{name}.", ".default."): p for key, p in adapted.named_parameters() if f".{name}." in key}
            for name in names
        ]
        return [{key: p.detach().clone() for key, p in one.items()} for one in weights]


def losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def uncut(
    rows: list[tokens.Tokens], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cut, list[dict[str, torch.Tensor]]]:
    """Each of ``CUT`` trained alone and never cut off, and its weights."""
    whole = Cut(tmp_path_factory.mktemp("whole"), rows)
    return whole, [whole.alone(number) for number in range(len(CUT))]


@pytest.mark.parametrize("parts", ["pa", *(pytest.param(p, marks=pytest.mark.slow) for p in ("ap", "pp", "ppa"))])
def test_slots_go_on_from_checkpoints_together_or_alone(
    rows: list[tokens.Tokens], uncut: tuple[Cut, list[dict[str, torch.Tensor]]], tmp_path: Path, parts: str
) -> None:
    """Parts in a (p)ack or (a)lone, cut after 3 and 5 steps."""
    whole, expected = uncut
    cut = Cut(tmp_path, rows)
    for part, stop_at in zip(parts, [*(3, 5)[: len(parts) - 1], None], strict=True):
        found = cut.together((0, 1, 2), stop_at) if part == "p" else [cut.alone(n, stop_at) for n in range(3)]
    for mine, other in zip(found, expected, strict=True):
        assert apart(mine, other) <= SAME_WEIGHTS
    for n in range(len(CUT)):
        assert losses(cut.lines[n]).keys() == losses(whole.lines[n]).keys()
        assert losses(cut.lines[n]) == pytest.approx(losses(whole.lines[n]), rel=SAME)
    if parts[-1] == "p":
        trained = cut.ended["slot0"].trained
        assert (trained.steps, len(trained.step_seconds), trained.lanes[-1]) == (8, 8, 2)
    else:
        assert cut.trained.packed
        assert cut.trained.lanes == [3] * (5 if len(parts) > 2 else 3) + [1] * (3 if len(parts) > 2 else 5)
        assert not any("seconds" in line for line in cut.lines[2])  # which would be the pack's too


@pytest.mark.slow  # packs on CUDA; in the fast tier the test above has checkpoints, another one steps of such rows
@pytest.mark.parametrize("parts", ["pa", "ap"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Adagrad"])
def test_slots_whose_weights_lie_in_one_row_keep_the_checkpoints_of_trials_alone(
    rows: list[tokens.Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, parts: str
) -> None:
    """As on CUDA. AdamW steps the row as one weight, Adagrad each weight; one slot ends before the others."""
    monkeypatch.setattr(packed, "Pack", partial(Pack, stacked=True))
    monkeypatch.setattr(sys.modules[__name__], "CUT", CUT_OF_ROWS)
    for spec in CUT_OF_ROWS:
        spec.train["optimizer"] = optimizer
    (tmp_path / "whole").mkdir()
    whole = Cut(tmp_path / "whole", rows)
    expected = [whole.alone(number) for number in range(3)]
    (tmp_path / parts).mkdir()
    cut = Cut(tmp_path / parts, rows)
    for part, stop_at in zip(parts, (4, None), strict=True):
        found = cut.together((0, 1, 2), stop_at) if part == "p" else [cut.alone(n, stop_at) for n in range(3)]
    for n, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert apart(mine, other) <= 10 * SAME_WEIGHTS
        assert losses(cut.lines[n]) == pytest.approx(losses(whole.lines[n]), rel=10 * SAME)


@pytest.mark.slow
def test_slots_of_different_steps_do_not_go_on_together(rows: list[tokens.Tokens], tmp_path: Path) -> None:
    cut = Cut(tmp_path, rows)
    cut.together([0, 1], stop_at=3)
    with pytest.raises(ValueError, match=r"from different steps: \[0, 3\]"):
        cut.together([0, 2])


# ---- evaluated together ----------------------------------------------------------------------------


def differing(quant: str = "none", specs: Sequence[Spec] = SLOTS) -> Any:
    """Slots on one base whose adapters are far from their beginning, and from each other."""
    methods = {f"slot{n}": (spec.method(), TargetsConfig()) for n, spec in enumerate(specs)}
    adapted = attach.attach_slots(base(quant), methods, SEED, {})
    torch.manual_seed(SEED)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    return adapted.eval()


def questions(rows: int = 8) -> list[templates.Example]:
    prompts = templates.examples(task.rows("test", rows), "{question} ", "{answer}")
    return [
        row._replace(
            choices=tuple(
                templates.Choice(row.prompt, answer, answer.strip(), str(n)) for n, answer in enumerate(words)
            ),
            gold=0,
        )
        for row, words in zip(prompts, itertools.cycle([(" 4", " 12 apples"), (" 7", " 19", " 3 more")]), strict=False)
    ]


EVALUATIONS: dict[str, Any] = {
    "perplexity": partial(evaluate.perplexity, batch_size=5),
    "generation": partial(evaluate.generation, max_new_tokens=8, batch_size=5),
    "multiple_choice": partial(evaluate.multiple_choice, batch_size=6),
    "beams": partial(evaluate.generation, max_new_tokens=6, batch_size=5, num_beams=2),
}


def evaluations(adapted: Any, tokenizer: Any, kinds: Sequence[str], pack: Pack | None) -> list[list[Any]]:
    """Those of every slot, alone or beside the others."""
    found = []
    for name in adapted.peft_config:
        adapted.set_adapter(name)
        with pack.evaluated_together(name) if pack else nullcontext():
            found.append([EVALUATIONS[kind](adapted, tokenizer, questions()) for kind in kinds])
    return found


def check_evaluations(packed: list[list[Any]], single: list[list[Any]]) -> None:
    for one, other in zip(itertools.chain(*packed), itertools.chain(*single), strict=True):
        for a, b in zip(one.predictions, other.predictions, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == (pytest.approx(b[key], rel=SAME) if "likelihood" in key else b[key])
        for name, score in one.scores.items():
            assert score.value == pytest.approx(other.scores[name].value, rel=SAME)


@pytest.mark.parametrize("quant", ["none", *(pytest.param(q, marks=pytest.mark.slow) for q in QUANTS if q != "none")])
def test_slots_evaluated_at_once_answer_as_each_does_alone(tokenizer: Any, quant: str) -> None:
    specs = SLOTS if quant == "8bit" else SLOTS[1:]  # which are of three kinds
    adapted, kinds = differing(quant, specs), ["perplexity", "generation", "multiple_choice"]
    single = evaluations(adapted, tokenizer, kinds, None)
    lengths = [[len(line["prediction"]) for line in slot[1].predictions] for slot in single]
    assert len({tuple(slot) for slot in lengths}) > 1  # their rows end at different times
    calls: list[int] = []
    hook = adapted.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    pack = Pack(adapted, [*adapted.peft_config])
    together = evaluations(adapted, tokenizer, kinds, pack)
    check_evaluations(together, single)
    if quant == "8bit":  # whose layers round by all rows at once
        assert calls.count(5) > 4
    else:
        assert all(rows % len(specs) == 0 for rows in calls)
    hook.remove()
    pack.close()
    check_evaluations(evaluations(adapted, tokenizer, kinds, None), single)
    with pytest.raises(AssertionError):  # the check can fail
        check_evaluations([together[1], together[0], *together[2:]], single)


def test_beams_and_slots_that_have_ended_are_no_other_slots_matter(tokenizer: Any) -> None:
    adapted = differing(specs=SLOTS[:2])
    for name, p in adapted.named_parameters():
        if "lora_B.slot1" in name:
            p.data.fill_(float("nan"))
    single = evaluations(adapted, tokenizer, ["beams", "perplexity"], None)
    pack = Pack(adapted, [*adapted.peft_config])
    check_evaluations(evaluations(adapted, tokenizer, ["beams", "perplexity"], pack)[:1], single[:1])


def test_what_fails_together_is_asked_of_each_slot(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = differing(specs=SLOTS[:2])
    single = evaluations(adapted, tokenizer, ["perplexity"], None)
    losses, rows = models_losses.answer_losses, []

    def failing(model: Any, batch: batches.Batch) -> torch.Tensor:
        rows.append(len(batch.input_ids))
        if rows[-1] > 5:
            raise RuntimeError("too many at once")
        return losses(model, batch)

    monkeypatch.setattr(likelihood, "answer_losses", failing)
    pack = Pack(adapted, [*adapted.peft_config])
    check_evaluations(evaluations(adapted, tokenizer, ["perplexity"], pack), single)
    assert rows == [10, 5, 3, 5, 3]  # tried together once


def test_the_answers_of_changed_adapters_are_found_anew(tokenizer: Any) -> None:
    adapted = differing(specs=SLOTS[:2])
    pack = Pack(adapted, [*adapted.peft_config])
    before = evaluations(adapted, tokenizer, ["perplexity"], pack)
    for p in pack.weights("slot1").values():
        p.data.mul_(1.5)
    pack.forget()
    after = evaluations(adapted, tokenizer, ["perplexity"], pack)
    pack.close()
    check_evaluations(after, evaluations(adapted, tokenizer, ["perplexity"], None))
    with pytest.raises(AssertionError):
        check_evaluations(after, before)
