"""The predicted memory against the measured, and what it is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import bitsandbytes
import pytest
import torch
from benchmarks.memory_prediction import BERT, GPT_NEO, LLAMA, WIDE, _storage_bytes, compare, compare_pack
from peft import LoraConfig

from peftsweep import cli
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.config.compose import trial as make_trial
from peftsweep.data.tokens import Tokens
from peftsweep.forecast import predict
from peftsweep.forecast.predict import Prediction, Shape
from peftsweep.models import attach, model
from peftsweep.schema import Capture, Dtype, ModelConfig, TargetsConfig, TrainConfig

CPU = torch.device("cpu")
SHAPE = Shape(rows=4, length=128, answer_length=32, answer_tokens=100)
SIZES = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
LLAMA_SMALL = ModelConfig(name_or_path="random", architecture=SIZES)
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def predicted(
    device: str = "cuda",
    *,
    base: ModelConfig = LLAMA_SMALL,
    dropout: float = 0.0,
    full: bool = False,
    shapes: list[Shape] | None = None,
    **options: Any,
) -> Prediction:
    bare = predict.skeleton(base, None)
    method = None if full else LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
    adapted = attach.attach(bare, method, TargetsConfig(), {})
    return predict.predict(adapted, TrainConfig(**options), shapes or [SHAPE], device)


@pytest.mark.parametrize(
    ("base", "words", "tolerance"),
    [
        pytest.param(LLAMA, "method=lora", 0.01, marks=pytest.mark.slow),
        # The fast tier has the smallest of these models; the parts of a prediction have tests of their own below.
        pytest.param(
            LLAMA, "method=lora quant=4bit targets=all_linear method.lora_dropout=0.1", 0.01, marks=pytest.mark.slow
        ),
        pytest.param(LLAMA, "method=lora quant=8bit", 0.05, marks=pytest.mark.slow),
        pytest.param(
            LLAMA, "method=lora model.attn_implementation=eager train.checkpointing=true", 0.01, marks=pytest.mark.slow
        ),
        pytest.param(LLAMA, "method=lora train.autocast=bfloat16", 0.01, marks=pytest.mark.slow),
        pytest.param(LLAMA, "method=ia3", 0.01, marks=pytest.mark.slow),
        pytest.param(LLAMA, "method=kasa", 0.01, marks=pytest.mark.slow),
        pytest.param(LLAMA, "method=dora quant=4bit", 0.01, marks=pytest.mark.slow),  # as LoRA's, with one norm more
        pytest.param(LLAMA, "method=prompt_tuning train.checkpointing=true", 0.01, marks=pytest.mark.slow),
        # The two largest micro-batches seldom meet.
        pytest.param(LLAMA, "method=full train.accumulation=2", 0.05, marks=pytest.mark.slow),
        pytest.param(LLAMA, "method=full train.optimizer=SGD", 0.01, marks=pytest.mark.slow),
        pytest.param(
            GPT_NEO, "method=full train.checkpointing=true train.autocast=bfloat16", 0.01, marks=pytest.mark.slow
        ),
        (BERT, "method=lora targets=qv", 0.01),
    ],
)
def test_the_prediction_is_what_the_allocator_is_asked_for(base: str, words: str, tolerance: float) -> None:
    assert abs(compare((base, words), "small", CPU, 128)["error"]) <= tolerance


@pytest.mark.parametrize(
    ("answers", "device"),
    [
        (SHAPE.answer_tokens, "cpu"),
        (8, "cuda"),
        pytest.param(SHAPE.answer_tokens, "cuda", marks=pytest.mark.slow),
        pytest.param(8, "cpu", marks=pytest.mark.slow),
    ],
)
def test_what_the_head_keeps_is_the_gradient_of_the_answers_hidden_states_and_never_negative(
    device: str, answers: int
) -> None:
    found = predicted(device, shapes=[dataclasses.replace(SHAPE, answer_tokens=answers)])
    kept = answers * 128 * 4  # hidden states in float32: the head is frozen and takes their gradient in the forward
    assert kept <= found.logits_bytes <= kept + 8192  # with the losses and positions
    states = found.weights_bytes + found.adapter_bytes + found.optimizer_bytes
    assert states + found.activation_bytes + found.logits_bytes <= found.forward_peak
    whole = predicted(device, full=True, shapes=[dataclasses.replace(SHAPE, answer_tokens=answers)])
    assert whole.logits_bytes >= kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "method=lora",
        "method=lora quant=4bit method.lora_dropout=0.1",
        "method=lora targets=all_linear train.checkpointing=true",
    ],
)
def test_the_prediction_of_a_pack_is_what_the_allocator_is_asked_for(words: str) -> None:
    assert abs(compare_pack((LLAMA, words, WIDE), "small", CPU, 128)["error"]) <= 0.1


def test_slots_share_the_base_and_nothing_else() -> None:
    def slots(count: int) -> Prediction:
        methods = {f"slot{n}": (LoraConfig(r=8, target_modules=["q_proj"]), TargetsConfig()) for n in range(count)}
        with torch.device("meta"):
            adapted = attach.attach_slots(predict.skeleton(LLAMA_SMALL, None), methods, 0, {})
        return predict.predict(adapted, TrainConfig(), [SHAPE], "cpu", dict.fromkeys(methods, TrainConfig()))

    one, four = slots(1), slots(4)
    assert four.weights_bytes == one.weights_bytes
    for part in ("adapter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "logits_bytes"):
        assert getattr(four, part) == pytest.approx(4 * getattr(one, part), rel=0.01), part
    assert four.peak_bytes - four.weights_bytes == pytest.approx(4 * (one.peak_bytes - one.weights_bytes), rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("words", ["method=lora", "method=lora quant=4bit", "method=lora quant=8bit", "method=full"])
def test_the_prediction_is_what_a_gpu_takes(words: str) -> None:
    assert abs(compare((LLAMA, words), "large", torch.device("cuda"), 512)["error"]) <= 0.15


@pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
def test_a_quantised_skeleton_is_as_large_as_the_loaded_base(quant: str) -> None:
    trial = tiny(f"quant={quant}")
    base = predict.skeleton(trial.config.model, build.quantization(trial))
    loaded = model.load(trial.config.model, build.quantization(trial), CPU)
    assert sum(t.untyped_storage().nbytes() for t in unique(base)) == _storage_bytes(loaded)


def tiny(*words: str) -> Trial:
    cfg = cli.compose([*words])
    return make_trial(cfg, cfg.hydra.runtime.choices, words)


def unique(base: torch.nn.Module) -> list[torch.Tensor]:
    return list({id(tensor.untyped_storage()): tensor for _, tensor in predict._named_tensors(base)}.values())


def test_a_skeleton_leaves_no_empty_tensor_in_what_bitsandbytes_remembers() -> None:
    trial = tiny("quant=4bit")
    predict.skeleton(trial.config.model, build.quantization(trial))
    assert all(table.device.type != "meta" for table in bitsandbytes.functional.name2qmap.values())


def test_what_is_kept_adds_up_at_the_end_of_the_forward() -> None:
    found = predicted()
    kept = (found.weights_bytes, found.adapter_bytes, found.optimizer_bytes, found.activation_bytes, found.logits_bytes)
    assert sum(kept) <= found.forward_peak <= found.peak_bytes
    assert found.step_peak >= found.weights_bytes + found.adapter_bytes + found.gradient_bytes + found.optimizer_bytes


def test_gradients_are_those_of_the_trained_parameters() -> None:
    adapted, full = predicted("cpu"), predicted("cpu", full=True)
    assert adapted.gradient_bytes == adapted.adapter_bytes
    assert full.adapter_bytes == 0
    assert 0 <= full.weights_bytes - full.gradient_bytes < 1024  # buffers


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_parameter"),
    [
        ("AdamW", 8),
        ("SGD", 0),
        ("Adagrad", 4),
        ("bitsandbytes.optim.AdamW", 8),
        ("bitsandbytes.optim.PagedAdamW32bit", 8),
    ],
)
def test_the_optimizer_s_states(optimizer: str, bytes_a_parameter: int) -> None:
    found = predicted("cpu", full=True, optimizer=optimizer)
    assert found.optimizer_bytes == pytest.approx(found.gradient_bytes / 4 * bytes_a_parameter)


def test_eight_bit_states_are_two_bytes_and_a_number_a_block() -> None:
    found = predicted("cpu", full=True, optimizer="bitsandbytes.optim.AdamW8bit")
    assert 2 * found.gradient_bytes / 4 < found.optimizer_bytes < 2.2 * found.gradient_bytes / 4


def test_paged_states_are_not_in_the_device_s_allocator() -> None:
    found = predicted("cuda", full=True, optimizer="bitsandbytes.optim.PagedAdamW32bit")
    small = predicted("cuda", optimizer="bitsandbytes.optim.PagedAdamW32bit")  # below what is worth a page
    assert found.optimizer_bytes == 2 * (found.gradient_bytes - 2 * 1000 * 128 * 4)  # without embedding and head
    assert small.optimizer_bytes == 2 * small.gradient_bytes


def test_eager_attention_keeps_its_weights_and_fused_attention_does_not() -> None:
    shapes = [Shape(2, length, 16, 32) for length in (256, 512)]
    eager = ModelConfig(**vars(LLAMA_SMALL) | {"attn_implementation": "eager"})
    short, long = (predicted(base=eager, shapes=[shape]).activation_bytes for shape in shapes)
    fused_short, fused_long = (predicted(shapes=[shape]).activation_bytes for shape in shapes)
    squares = 2 * 4 * (512**2 - 4 * 256**2 + 4 * 256**2 - 256**2) * 4  # rows, heads, L x L, float32
    assert (long - short) - (fused_long - fused_short) >= squares  # of one layer at the least
    masks = 2 * 2 * (512**2 - 256**2) * 4 * 2  # rows, layers, float32, and the boolean mask with room
    assert fused_long <= 2 * fused_short + masks


def test_a_dropout_mask_is_one_byte_a_number_on_a_gpu_and_four_on_a_cpu() -> None:
    masks = 2 * 4 * 128 * 128  # modules, rows x length x hidden; nothing below the first layer needs gradients
    dropped = {device: predicted(device, dropout=0.1).activation_bytes for device in ("cuda", "cpu")}
    whole = {device: predicted(device).activation_bytes for device in ("cuda", "cpu")}
    assert dropped["cpu"] - whole["cpu"] - (dropped["cuda"] - whole["cuda"]) == pytest.approx(3 * masks, rel=0.02)


def test_checkpointing_keeps_one_layer() -> None:
    deep = ModelConfig(**vars(LLAMA_SMALL) | {"architecture": SIZES | {"num_hidden_layers": 8}})
    plain, saved = predicted(base=deep), predicted(base=deep, checkpointing=True)
    assert saved.activation_bytes < plain.activation_bytes / 8
    assert saved.backward_peak - saved.forward_peak > saved.activation_bytes / 8  # that of one layer comes again


def test_autocast_casts_frozen_weights_for_each_use() -> None:
    plain, cast = predicted(full=True), predicted(full=True, autocast=Dtype.bfloat16)
    assert cast.weights_bytes == plain.weights_bytes
    assert cast.activation_bytes != plain.activation_bytes


def test_a_second_micro_batch_meets_the_gradients_of_the_first() -> None:
    usual: dict[str, Any] = {"full": True, "capture": Capture.off}
    one, two = predicted(**usual), predicted(**usual, accumulation=2)
    assert two.forward_peak - one.forward_peak == one.gradient_bytes


def test_captured_steps_keep_gradients_and_have_workspaces_of_their_own() -> None:
    usual, captured = predicted(full=True, capture=Capture.off), predicted(full=True)
    assert captured.forward_peak - usual.forward_peak == usual.gradient_bytes
    assert captured.workspace_bytes == 2 * usual.workspace_bytes
    assert predicted("cpu", full=True) == predicted("cpu", full=True, capture=Capture.off)


def test_the_micro_batch_with_the_most_logits_counts_too() -> None:
    wide = ModelConfig(**vars(LLAMA_SMALL) | {"architecture": SIZES | {"vocab_size": 50000}})
    long, wordy = Shape(4, 128, 8, 32), Shape(4, 120, 100, 400)
    alone = predicted(base=wide, shapes=[wordy]).peak_bytes
    assert predicted(base=wide, shapes=[long, wordy]).peak_bytes == alone
    assert predicted(base=wide, shapes=[long]).peak_bytes < alone


def test_shapes_are_those_of_the_micro_batches() -> None:
    rows = [Tokens([1] * 8, 6), Tokens([1] * 10, 4)]
    config = TrainConfig(steps=2, batch_size=2, pad_to_multiple_of=4)
    assert predict.shapes(rows, config, 0) == [Shape(rows=2, length=12, answer_length=8, answer_tokens=8)]


@pytest.mark.parametrize(("full", "numbers"), [(False, 128), (True, 128 + 1000)])
def test_an_answer_token_keeps_its_hidden_state_s_gradient_or_logits(full: bool, numbers: int) -> None:
    fewer, more = (predicted(full=full, shapes=[Shape(4, 128, 32, tokens)]).logits_bytes for tokens in (64, 128))
    assert more - fewer == pytest.approx(64 * numbers * 4, rel=0.1)
