"""LoRA layers and norms in fewer operations, held against those of PEFT and transformers."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._decomp import decompositions
from transformers import BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftsweep.data.tokens import Tokens
from peftsweep.forecast import predict
from peftsweep.models import attach, model
from peftsweep.models import losses as models_losses
from peftsweep.observe.measure import Meter
from peftsweep.schema import Dtype, ModelConfig, TargetsConfig, TrainConfig
from peftsweep.training import fused as training_fused
from peftsweep.training import loop
from peftsweep.training.fused import fused
from tests.models.test_shortcuts import apart, batch

QUANTS: dict[str, dict[str, Any]] = {"none": {}, "4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}
IN_A_BLOCK = 7  # linear layers: four of attention, three of the feed-forward
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"lora_dropout": 0.5},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}
LEFT = ("lora_bias", "dora")


def adapted(quant: str, dtype: Dtype, **options: Any) -> Any:
    quantization = BitsAndBytesConfig(**QUANTS[quant]) if QUANTS[quant] else None
    base = model.load(ModelConfig(name_or_path="tiny", dtype=dtype), quantization, torch.device("cpu"))
    torch.manual_seed(0)
    given: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    made = get_peft_model(base, LoraConfig(**given))
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return made.train()


def losses_and_gradients(trained: Any) -> tuple[torch.Tensor, torch.Tensor]:
    trained.zero_grad()
    torch.manual_seed(1)  # of dropout
    losses = models_losses.answer_losses(trained, batch())
    losses.mean().backward()
    gradients = [p.grad for p in trained.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    return losses.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


BASES: list[Any] = [
    ("none", Dtype.float32, 1e-5),
    ("none", Dtype.bfloat16, 0.05),
    ("4bit", Dtype.float32, 1e-5),
    ("8bit", Dtype.float32, 1e-4),
]
# In the fast tier each method on the unquantised base, and LoRA on each base.
PAIRS = [
    pytest.param(*one, method, marks=[] if one is BASES[0] or method == "lora" else pytest.mark.slow)
    for one in BASES
    for method in METHODS
]


@pytest.mark.parametrize(("quant", "dtype", "bound", "method"), PAIRS)
def test_losses_and_gradients_are_those_of_peft_s_layers(quant: str, dtype: Dtype, bound: float, method: str) -> None:
    if (quant, method) == ("8bit", "dora"):
        pytest.skip("PEFT's DoRA fails on 8 bits")
    trained = adapted(quant, dtype, **METHODS[method])
    plain = losses_and_gradients(trained)
    with fused(trained) as layers:
        found = losses_and_gradients(trained)
    assert layers == (0 if method in LEFT else IN_A_BLOCK * len(trained.get_base_model().model.layers))
    assert [apart(*pair) <= bound for pair in zip(found, plain, strict=True)] == [True, True]
    assert not any("forward" in vars(module) for module in trained.modules())


def test_a_merged_or_disabled_adapter_is_not_added_twice() -> None:
    trained = adapted("none", Dtype.float32).train()
    ids = batch().input_ids
    with torch.no_grad(), fused(trained):
        with trained.disable_adapter():
            without = trained(ids).logits
        assert torch.allclose(without, trained.get_base_model()(ids).logits) is False
        once = trained(ids).logits
        trained.merge_adapter()
        assert torch.allclose(trained(ids).logits, once, atol=1e-4)


def test_an_evaluation_is_peft_s(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = adapted("none", Dtype.float32).eval()
    with fused(trained):
        monkeypatch.setattr(training_fused, "_fused", None)
        models_losses.answer_losses(trained, batch())
        with pytest.raises(TypeError):
            models_losses.answer_losses(trained.train(), batch())


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_a_layer_that_computes_something_else_stays_peft_s(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = training_fused._fused

    def lie(layer: Any, x: torch.Tensor) -> torch.Tensor:
        found = exact(layer, x)
        if layer.out_features != layer.in_features:
            return found
        return found * 1.01 if wrong == "output" else found * 0.9 + 0.1 * found.detach()

    monkeypatch.setattr(training_fused, "_fused", lie)
    trained = adapted("none", Dtype.float32, lora_dropout=0.1)
    before = {name: weight.clone() for name, weight in trained.named_parameters()}
    linear = [m for m in trained.modules() if type(m) in training_fused.KINDS]
    with fused(trained) as layers:
        square = sum(m.out_features == m.in_features for m in linear)
        assert 0 < layers == len(linear) - square
    assert all(torch.equal(weight, before[name]) for name, weight in trained.named_parameters())
    assert all(m.lora_dropout["default"].training for m in linear)


@pytest.fixture
def norms_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's RMS norm has a backward of its own on CUDA alone; here that which torch.compile breaks it into."""
    both = SimpleNamespace(
        _fused_rms_norm=torch.ops.aten._fused_rms_norm,
        _fused_rms_norm_backward=decompositions._fused_rms_norm_backward,
    )
    monkeypatch.setattr(training_fused, "ATEN", both)
    monkeypatch.setattr(training_fused, "DEVICES", ("cpu",))


@pytest.mark.usefixtures("norms_on_a_cpu")
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_torch_s_norms_are_as_near_to_32_bits_as_the_model_s(dtype: Dtype) -> None:
    trained = adapted("none", dtype)
    norms = [module for module in trained.modules() if type(module).__name__ == "LlamaRMSNorm"]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 2)
    plain = losses_and_gradients(trained)
    with fused(trained):
        assert all("forward" in vars(norm) for norm in norms)
        found = losses_and_gradients(trained)
        with torch.no_grad():
            evaluated = trained.eval()(batch().input_ids).logits
    with torch.no_grad():
        assert torch.equal(evaluated, trained(batch().input_ids).logits)
    exact = losses_and_gradients(trained.train().float())
    for one, other, right in zip(found, plain, exact, strict=True):
        assert apart(one, right) <= max(1.5 * apart(other, right), 1e-5)


class GemmaLikeRMSNorm(LlamaRMSNorm):
    """Its weights are added to one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * (1 + 1 / self.weight)


@pytest.mark.usefixtures("norms_on_a_cpu")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_norms_that_are_another_function_or_are_trained_stay_the_model_s(device: str) -> None:
    with torch.device(device):
        norms = [LlamaRMSNorm(8), GemmaLikeRMSNorm(8), LlamaRMSNorm(8)]
    for norm in norms[:2]:
        norm.weight.requires_grad_(False)
    assert training_fused._norms(nn.ModuleList(norms)) == norms[:1]


@pytest.mark.usefixtures("norms_on_a_cpu")
def test_a_norm_whose_input_is_narrower_than_its_weights_gives_the_format_of_the_model_s() -> None:
    """As Qwen3's norms of queries and keys under autocast."""
    norm = LlamaRMSNorm(8).requires_grad_(False)
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    expected = norm(x)
    assert training_fused._norms(norm) == [norm]
    found = training_fused._norm(norm, x)
    assert type(training_fused._norm(norm, x.float()).grad_fn).__name__ == "_RmsNormBackward"
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_a_layer_of_an_expert_that_no_token_chose_gives_nothing(shape: tuple[int, ...]) -> None:
    layer = with_adapter(nn.Linear(6, 4))
    x = torch.empty(shape, requires_grad=True)
    output = training_fused._fused(layer, x)
    output.sum().backward()
    assert output.shape == (*shape[:-1], 4)
    assert x.grad is not None
    assert x.grad.shape == shape
    assert not layer.lora_A["default"].weight.grad.any()


class SquashedLinear(nn.Linear):
    """Its backward needs its output."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).sigmoid()


def test_a_layer_whose_base_needs_its_output_again_stays_peft_s() -> None:
    layers = with_adapter(nn.Linear(6, 4)), with_adapter(SquashedLinear(6, 4))
    assert [training_fused.same(layer, torch.float32) for layer in layers] == [True, False]


def with_adapter(linear: nn.Linear) -> Any:
    made: Any = get_peft_model(nn.Sequential(linear), LoraConfig(r=2, target_modules=["0"]))
    return made.base_model.model[0]


@pytest.mark.usefixtures("norms_on_a_cpu")
def test_the_gradients_of_weights_are_added_to_those_that_are_there() -> None:
    trained = adapted("none", Dtype.float32)
    with fused(trained):
        _, once = losses_and_gradients(trained)
        models_losses.answer_losses(trained, batch()).mean().backward()
    twice = torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])
    assert torch.allclose(twice, 2 * once, rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("norms_on_a_cpu")
@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_whose_output_is_a_view_or_whose_a_is_frozen_gives_the_same(bias: bool, drop: float) -> None:
    """With a bias torch gives a view of what it multiplies; LoRA-FA trains B alone."""
    torch.manual_seed(0)
    made: Any = get_peft_model(
        nn.Sequential(nn.Linear(6, 4, bias=bias)), LoraConfig(r=2, lora_dropout=drop, target_modules=["0"])
    )
    layer = made.base_model.model[0]
    a, b = layer.lora_A["default"].weight.requires_grad_(False), layer.lora_B["default"].weight
    b.data.normal_()
    x, found = torch.randn(2, 3, 6, requires_grad=True), []
    for forward in (layer, partial(training_fused._fused, layer)):
        torch.manual_seed(1)  # of dropout
        layer.zero_grad()
        output = forward(x)
        output.square().sum().backward()
        found.append([output.detach(), x.grad, b.grad])
        x.grad = None
    assert a.grad is None
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("norms_on_a_cpu")
def test_a_training_takes_them_on_cuda_and_its_losses_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Tokens(list(range(3, 20)), 4), Tokens(list(range(30, 60)), 20)] * 4
    found, calls = [], list[int]()
    exact = training_fused._fused

    def counted(layer: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return exact(layer, x)

    monkeypatch.setattr(training_fused, "_fused", counted)
    for devices in (("cuda",), ("cpu",)):
        monkeypatch.setattr(training_fused, "DEVICES", devices)
        config, lines = TrainConfig(steps=4, batch_size=4, log_every=1, warmup=1), list[dict[str, Any]]()
        trained, meter = adapted("none", Dtype.float32), Meter(torch.device("cpu"))
        loop.train(trained, rows, config, pad_id=0, seed=0, meter=meter, log=lines.append)
        found.append([line["loss"] for line in lines if "loss" in line])
        assert bool(calls) == ("cpu" in devices)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow  # two traces; `make gpu` measures what they foresee
def test_the_memory_that_is_predicted_for_cuda_is_that_of_fewer_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 PEFT's layers keep their inputs in 32 bits too."""

    def peak() -> int:
        with torch.device("meta"):
            base = predict.skeleton(ModelConfig(name_or_path="tiny", dtype=Dtype.bfloat16), None)
            made = attach.attach(base, LoraConfig(r=4, target_modules="all-linear"), TargetsConfig(), {})
        return predict.predict(made, TrainConfig(), [predict.Shape(8, 256, 20, 160)], "cuda").peak_bytes

    fewer = peak()
    monkeypatch.setattr(training_fused, "DEVICES", ())
    assert fewer < 0.95 * peak()


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
def test_on_cuda_no_layer_is_left_to_peft(quant: str) -> None:
    quantization = BitsAndBytesConfig(**QUANTS[quant]) if QUANTS[quant] else None
    config = ModelConfig(name_or_path="tiny", dtype=Dtype.bfloat16)
    base = model.load(config, quantization, torch.device("cuda"))
    made: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    with fused(made) as layers:
        assert layers == IN_A_BLOCK * len(made.get_base_model().model.layers)
