"""Bases that other libraries than bitsandbytes have quantised; where their packages are, all of it is run.

pip install 'peftsweep[torchao,quanto]' && pytest -m "slow or not slow" tests/models/test_quantised.py
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.memory_prediction import LLAMA, _storage_bytes, compare
from bitsandbytes.nn.modules import Linear8bitLt
from torch.testing._internal.two_tensor import TwoTensor
from transformers import CONFIG_MAPPING

from peftsweep import InputError, cli
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.data import templates, tokens
from peftsweep.forecast import forecast, predict
from peftsweep.forecast.allocator import META, Allocator, Kernels
from peftsweep.models import compatibility, coverage, model, parts, probe, saved
from peftsweep.models.quantised import layers, libraries
from peftsweep.schema import Dtype, ModelConfig
from peftsweep.study.record import Result
from peftsweep.tiny import task
from tests.forecast.test_predict import unique
from tests.training import test_packed as packs

Compose = Callable[..., Trial]
Command = Callable[..., tuple[int, str, str]]
RunSmall = Callable[..., Result]
CPU = torch.device("cpu")
PACKAGES = {"int8_torchao": "torchao", "fp8_torchao": "torchao", "int8_quanto": "quanto", "int4_quanto": "quanto"}
BITS = {"int8_torchao": 8, "fp8_torchao": 8, "int8_quanto": 8, "int4_quanto": 4}
TINY_LINEAR = 851_968  # numbers in the layers of the embedded model that are quantised


@pytest.fixture(params=PACKAGES)
def quant(request: pytest.FixtureRequest) -> str:
    """An option of ``quant`` whose package is installed."""
    chosen: str = request.param
    module = libraries.BY_NAME[PACKAGES[chosen]].module
    if not libraries.is_installed(module):
        pytest.skip(f"needs {module}")
    return chosen


def load(compose: Compose, *words: str) -> Any:
    one = compose(*words)
    return model.load(one.config.model, build.quantization(one), CPU)


# ---- what is refused, in one line, before anything is loaded ---------------------------------------


@pytest.mark.parametrize(("quant", "extra"), [("int8_torchao", "torchao"), ("int4_quanto", "quanto")])
def test_a_missing_package_is_one_line_with_its_extra(
    quant: str, extra: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "is_installed", lambda module: False)
    code, _, err = command(f"quant={quant}", "dry_run=true")
    assert code == 2
    assert err.strip().endswith(f"pip install 'peftsweep[{extra}]'")
    assert f"quant={quant}: needs the package" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ("int4_torchao", "transformers and PEFT support such weights for inference only"),
        ("hqq", "cannot quantise with hqq while it loads a model"),
        ("fp8", "needs a GPU; without one use quant=fp8_torchao"),
    ],
)
def test_what_trains_nowhere_or_not_here_is_one_line(quant: str, reason: str, compose: Compose) -> None:
    with pytest.raises(InputError, match=f"quant={quant}: .*{reason}"):
        compose(f"quant={quant}")


def test_a_package_whose_parent_is_missing_is_missing() -> None:
    assert not libraries.is_installed("nowhere_at_all.inside")
    assert libraries.is_installed("torch.nn")


def test_a_checkpoint_of_another_library_without_its_package_is_one_line(
    compose: Compose, gptq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"model\.name_or_path=.*: is quantised by gptq: .*optimum"):
        build.storage(compose("model=causal_lm", f"model.name_or_path={gptq}"))


def test_a_checkpoint_of_a_library_that_was_not_tried_is_untested_and_its_memory_unknown(
    compose: Compose, gptq: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(libraries, "check_config", lambda *_, **__: None)  # as if its package were there
    one = compose("model=causal_lm", f"model.name_or_path={gptq}")
    with caplog.at_level(logging.WARNING):
        assert build.storage(one) == libraries.Untested("gptq")
    assert "is quantised by gptq: untested; its memory is not predicted" in caplog.text
    found = forecast.check(one)
    assert found.trainable_parameters
    assert "stored in" not in str(found.coverage)
    assert forecast.prediction(one) is None
    full = compose("model=causal_lm", f"model.name_or_path={gptq}", "method=full")
    assert "cannot train quantised weights" in str(forecast.refusal(full))


@pytest.mark.parametrize("quantization", [{}, [], "4bit"])
@pytest.mark.parametrize("quant", ["none", "4bit"])
def test_a_quantization_config_that_names_no_library_is_refused_before_loading(
    compose: Compose, tmp_path: Path, quantization: object, quant: str
) -> None:
    folder = shutil.copytree(model.TINY, tmp_path / "empty")
    shape = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(shape))
    one = compose("model=causal_lm", f"model.name_or_path={folder}", f"quant={quant}")
    with pytest.raises(InputError, match=r"quantization_config=.* names no library|cannot be loaded"):
        forecast.check(one)


def test_the_quantization_of_a_text_part_is_that_of_the_checkpoint() -> None:
    shape = CONFIG_MAPPING["gemma3"]()
    assert libraries.checkpoint_quantization(shape, "x") is None
    shape.text_config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert libraries.checkpoint_quantization(shape, "x") == {"quant_method": "gptq", "bits": 4}


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    """A checkpoint that says it is quantised by GPTQ."""
    folder = tmp_path / "gptq"
    base = model.load(ModelConfig(name_or_path="tiny"), None, CPU)
    base.save_pretrained(folder)
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(folder)
    shape = json.loads((folder / "config.json").read_text())
    shape |= {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        ({}, "none"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4bit"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "8bit"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "torchao"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8StaticActivationConfig"}}}, "untested"),
        ({"quant_method": "quanto", "weights": "int4"}, "quanto"),
        ({"quant_method": "quanto", "weights": "int2"}, "untested"),
        ({"quant_method": "fp8"}, "untested"),
        ({"quant_method": "awq", "quant_type": "a word"}, "untested"),
    ],
)
def test_the_kind_of_base_is_that_of_the_library(quantization: dict[str, Any], kind: str) -> None:
    assert libraries.kind(quantization) == kind


@pytest.mark.parametrize(
    ("method", "kind", "reason"),
    [
        ({"_target_": "peft.HiraConfig"}, "torchao", "torchao's weights do not support the operation"),
        ({"_target_": "peft.HiraConfig"}, "quanto", None),
        ({"_target_": "peft.VeraConfig"}, "torchao", "settings of torchao"),
        ({"_target_": "peft.PolyConfig"}, "quanto", "in place"),
        ({"_target_": "peft.PolyConfig"}, "torchao", None),
        ({"_target_": "peft.LoraConfig", "init_lora_weights": "pissa_niter_4"}, "quanto", "quantised again"),
        ({"_target_": "peft.LoraConfig", "init_lora_weights": "olora"}, "torchao", "quantised again"),
        ({"_target_": "peft.LoraConfig", "init_lora_weights": "olora"}, "4bit", None),
        ({"_target_": "peft.LoraConfig", "lora_bias": True}, "torchao", "biases"),
        ({"_target_": "peft.LoraConfig", "layer_replication": [[0, 2]]}, "quanto", "copied"),
        ({"_target_": "peft.LoraConfig"}, "quanto", None),
        ({"_target_": "peft.LoraConfig"}, "quanto autocast", "autocast changes the dtype of weights, which quanto's"),
        ({}, "torchao", "full fine-tuning cannot train quantised weights"),
        ({}, "untested", "full fine-tuning cannot train quantised weights"),
    ],
)
def test_what_fails_on_such_a_base_is_refused(method: dict[str, Any], kind: str, reason: str | None) -> None:
    found = compatibility.refusal(method, [kind])
    assert found is None if reason is None else reason in str(found)


# ---- weights that are tensor subclasses ------------------------------------------------------------


@pytest.mark.kernels
def test_an_8bit_layer_is_evaluated_under_autocast_as_without() -> None:
    """Sums of 127 * 127 * 64 are infinite in float16, in which a CPU without AVX-512 multiplied the integers."""
    own = Linear8bitLt(64, 4, bias=False, has_fp16_weights=False, threshold=6.0)
    own.load_state_dict({"weight": torch.ones(4, 64)})
    layer = torch.nn.Sequential(own).to("cpu").eval()
    layers.patch_layers(layer)
    for inputs in (torch.ones(2, 3, 64), torch.ones(2, 3, 5, 64)):
        with torch.autocast("cpu", dtype=torch.float16):
            found = layer(inputs)
        assert torch.equal(found, layer(inputs))
        assert found.mean().item() == pytest.approx(64, rel=0.01)


def test_a_weight_is_counted_by_the_tensors_that_it_is_made_of() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    packed, scales = torch.zeros(4, 8), torch.zeros(4, 8)
    layer.weight = torch.nn.Parameter(TwoTensor(packed, scales), requires_grad=False)
    assert [part.data_ptr() for part in layers.plain_tensors(layer.weight)] == [packed.data_ptr(), scales.data_ptr()]
    assert layers.footprint(layer) == packed.nbytes + scales.nbytes
    assert layers.bits(layer) == 32  # of the largest part
    assert layers.bits(torch.nn.Linear(8, 4)) is None


def test_the_allocator_follows_the_tensors_within_a_subclass() -> None:
    with Allocator(1, 0) as allocator:
        made = TwoTensor(torch.zeros(10, device=META), torch.zeros(10, device=META)) * 2
        assert allocator.live == 80  # the first two are gone
        del made
    assert allocator.live == 0


def test_memory_is_not_predicted_where_autocast_would_cast_such_a_weight() -> None:
    weight = TwoTensor(torch.zeros(4, 8, device=META), torch.zeros(4, 8, device=META))
    x = torch.zeros(2, 8, device=META)
    with pytest.raises(NotImplementedError, match="products with TwoTensor is not known"):
        Kernels("cpu", Dtype.bfloat16).__torch_function__(torch.nn.functional.linear, (TwoTensor,), (x, weight))
    Kernels("cuda", None).__torch_function__(torch.nn.functional.linear, (TwoTensor,), (x, weight))


# ---- with the packages -----------------------------------------------------------------------------


def test_a_skeleton_is_as_large_as_the_loaded_base(quant: str, compose: Compose) -> None:
    one = compose(f"quant={quant}")
    base = predict.skeleton(one.config.model, build.quantization(one))
    loaded = load(compose, f"quant={quant}")
    assert sum(tensor.untyped_storage().nbytes() for tensor in unique(base)) == _storage_bytes(loaded)
    assert layers.footprint(loaded) < 4 * parts.count(loaded).total / 2  # half of 32 bits
    assert coverage.quantised(coverage.weights(loaded, one.config.model.roles)) == {BITS[quant]: TINY_LINEAR}
    assert probe.abilities(loaded).padded_batches


def test_a_dequantised_base_answers_as_the_quantised_one(quant: str, compose: Compose, tmp_path: Path) -> None:
    base, ids = load(compose, f"quant={quant}"), torch.arange(5, 40)[None]
    with torch.no_grad():
        before = base(ids).logits
        plain = layers.dequantise(base)
        assert torch.allclose(plain(ids).logits, before, atol=1e-3)
        assert not any(map(layers.is_quantised, plain.modules()))
        plain.save_pretrained(tmp_path)
        again = saved.read(tmp_path, plain)
        assert torch.equal(again(ids).logits, plain(ids).logits)


def test_a_format_that_was_not_tried_is_said_to_be_untested(compose: Compose, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("optimum.quanto")
    one = compose("quant=int8_quanto", "quant.weights=int2")
    with caplog.at_level(logging.WARNING):
        assert forecast.prediction(one) is None
    assert "quant=int8_quanto: untested; its memory is not predicted" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", "model.dtype=bfloat16", "train.checkpointing=true targets=all_linear"])
def test_lora_trains_comes_back_and_is_merged(quant: str, words: str, run_small: RunSmall) -> None:
    found = run_small(f"quant={quant}", "method.r=2", "adapter.check=true", "adapter.merge=true", *words.split())
    info = found.train_info
    assert found.status.name == "success", found.error
    assert info["reloads"]
    assert info["merges"] or "bfloat16" in words  # whose rounding may be more than so few steps have changed
    assert info["coverage"][f"share_in_{BITS[quant]}bit"] == pytest.approx(TINY_LINEAR / 921_344, rel=0.01)


@pytest.mark.slow
def test_a_trial_is_repeated_and_its_adapter_used_again(quant: str, run_small: RunSmall, command: Command) -> None:
    first = run_small(f"quant={quant}", "method.r=2")
    (place,) = Path("multirun/default").glob("*/result.json")
    code, out, err = command(f"repeat={place.parent}", "dry_run=true", "study=again")
    assert (code, quant in out) == (0, True), err
    words = [f"quant={quant}", f"adapter.path={place.parent / 'adapter'}", "study=used", "eval=[perplexity]"]
    used = cli.run_one([*words, "eval.perplexity.samples=8", "device=cpu", "train=none"])
    assert used.status.name == "success", used.error
    perplexities = [one.eval_info["perplexity"]["perplexity"]["value"] for one in (used, first)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["targets=all_linear", "train.checkpointing=true", "model.dtype=bfloat16"])
def test_the_memory_predicted_is_what_the_allocator_is_asked_for(quant: str, words: str) -> None:
    found = compare((LLAMA, f"method=lora quant={quant} {words}"), "small", CPU, 128)
    assert abs(found["error"]) <= 0.02


@pytest.mark.slow
def test_a_slot_of_a_pack_is_the_trial_alone(quant: str, compose: Compose) -> None:
    def base() -> Any:
        loaded = load(compose, f"quant={quant}")
        probe.abilities(loaded)
        return loaded

    tokenizer = model.load_tokenizer(packs.TINY)
    rows = tokens.tokenize(tokenizer, templates.examples(task.rows("train", 48), "{question} ", "{answer}"), 128)
    single = [packs.alone(spec, rows, tokenizer, base()) for spec in packs.SLOTS[:2]]
    packs.check_same(packs.together(packs.SLOTS[:2], rows, tokenizer, base()), single)


@pytest.mark.slow
def test_a_checkpoint_of_torchao_is_read_refused_and_predicted_as_one(compose: Compose, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    load(compose, "quant=int8_torchao").save_pretrained(tmp_path / "ao")
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(tmp_path / "ao")
    words = ("model=causal_lm", f"model.name_or_path={tmp_path / 'ao'}", "model.dtype=float32")
    assert "cannot train quantised weights" in str(forecast.refusal(compose(*words, "method=full")))
    with pytest.raises(InputError, match=r"quant=4bit: the checkpoint .* is quantised already, by torchao"):
        build.storage(compose(*words, "quant=4bit"))
    found = [forecast.prediction(one) for one in (compose(*words), compose("quant=int8_torchao"))]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].weights_bytes == found[1].weights_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("words", ["", "targets=all_linear"])
def test_the_memory_predicted_is_what_a_gpu_takes(quant: str, words: str) -> None:
    if quant.endswith("quanto"):
        pytest.skip("is not known")
    point = (LLAMA, f"method=lora quant={quant} {words}")
    assert abs(compare(point, "large", torch.device("cuda"), 512)["error"]) <= 0.15
