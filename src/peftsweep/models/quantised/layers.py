"""Quantised layers of all libraries: their bits and tensors, dequantisation, and layers on the meta device.

bitsandbytes has its own layers and keeps scales beside their weights. The weights of torchao and quanto are tensor
subclasses around plain tensors (``__tensor_flatten__``), on nn.Linear or a subclass of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast
from unittest.mock import patch

import bitsandbytes
import torch
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

BITSANDBYTES = (Linear4bit, Linear8bitLt)  # PEFT has special layers for these


def bits(module: nn.Module) -> int | None:
    """The number of bits that store a number of the layer's weight; None if it is not quantised."""
    if isinstance(module, BITSANDBYTES):
        return 4 if isinstance(module, Linear4bit) else 8
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if is_wrapper(weight):
        return round(8 * max(part.nbytes for part in plain_tensors(weight)) / weight.numel())  # the rest are scales
    return 8 if weight.is_floating_point() and weight.dtype.itemsize == 1 else None


def is_quantised(module: nn.Module) -> bool:
    """Whether the layer's weight is stored in fewer bits than it is computed with."""
    return bits(module) is not None


def not_quantised(base: nn.Module) -> str | None:
    """What is wrong with a checkpoint whose configuration says that bitsandbytes has quantised it; None if nothing is.

    Where its files hold plain weights, transformers makes quantised layers around them that cannot be called.
    """
    for name, module in base.named_modules():
        weight: Any = module._parameters.get("weight")
        if not isinstance(module, BITSANDBYTES):
            continue
        if getattr(weight, "quant_state" if isinstance(module, Linear4bit) else "SCB", None) is None:
            return (
                f"its config.json says that its weights are stored in {bits(module)} bits (quantization_config), but "
                f"{name} is not; delete quantization_config if the checkpoint is not quantised"
            )
    return None


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors inside a tensor subclass; for a plain tensor, the tensor itself."""
    if not is_wrapper(tensor):
        yield tensor
        return
    for name in cast(Any, tensor).__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def kept_tensors(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """All tensors of a weight: its plain tensors, and the scales that bitsandbytes keeps beside it."""
    yield from plain_tensors(parameter)
    scales = getattr(parameter, "SCB", None)
    if scales is not None:
        yield scales
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (part for part in (state.absmax, state.code, state.offset) if isinstance(part, torch.Tensor))
        state = state.state2


def footprint(model: nn.Module) -> int:
    """Bytes of parameters and buffers as they are stored; the scales of bitsandbytes are not counted."""
    return sum(part.nbytes for one in (*model.parameters(), *model.buffers()) for part in plain_tensors(one))


def dequantise(base: Any) -> Any:
    """``base`` with all quantised layers replaced by plain ones, in place."""
    layers = [(name, layer) for name, layer in base.named_modules() if is_wrapper(layer._parameters.get("weight"))]
    if not layers:
        return base.dequantize()
    for name, layer in layers:
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = nn.Parameter(layer.weight.dequantize().to(base.dtype), requires_grad=False)
        plain.bias = layer.bias
        base.set_submodule(name, plain)
    base.hf_quantizer.remove_quantization_config(base)
    return base


def is_wrapper(tensor: Any) -> bool:
    """Whether ``tensor`` is a tensor subclass around others, like the weights of torchao and quanto."""
    return is_traceable_wrapper_subclass(tensor)


# ---- on the meta device ----------------------------------------------------------------------------


def quantise_skeleton(base: PreTrainedModel, quantization: Any) -> None:
    """Give ``base``, on the meta device, the layers and weights of a base loaded with ``quantization``."""
    plain = dict(base.named_modules())
    # Only in a checkpoint that is stored in 4 or 8 bits the experts of Llama 4 are layers of their own.
    stored_so = getattr(base.config, "quantization_config", None) is not None
    options = {"pre_quantized": stored_so} if quantization.quant_method == "bitsandbytes" else {}
    quantizer: Any = AutoHfQuantizer.from_config(quantization, **options)
    quantizer.preprocess_model(base, device_map=None)
    if quantization.quant_method == "bitsandbytes":
        stored: dict[Any, tuple[torch.Tensor, Any]] = {}
        with patch.dict(bitsandbytes.functional.name2qmap):  # a cache, which must not keep a meta tensor
            for name, module in base.named_modules():
                if isinstance(module, BITSANDBYTES) and module is not (was := plain.get(name)):
                    if was is None:  # an expert of Llama 4, of which transformers makes layers of their own
                        sizes = module.in_features, module.out_features, module.bias is not None
                        was = nn.Linear(*sizes, device="meta", dtype=base.dtype)
                    _store(module, was, stored)
    else:
        vars(quantizer).setdefault("offload_to_cpu", False)  # torchao sets it when it inspects the machine
        convert = quantizer.get_quantize_ops().convert
        for name, weight in [*base.named_parameters()]:
            if quantizer.param_needs_quantization(base, name):
                convert({name: [weight.detach()]}, model=base, full_layer_name=name, missing_keys=set())
    patch_layers(base)
    quantizer.postprocess_model(base)  # marks the model as quantised for PEFT


def _store(module: Any, plain: Any, stored: dict[Any, tuple[torch.Tensor, Any]]) -> None:
    """Give bitsandbytes' layer ``module`` the weights of the layer it stands for.

    ``stored`` keeps the packed weight and the statistics of each shape, of which further layers get copies.
    """
    weight = plain.weight.detach().T if isinstance(plain, Conv1D) else plain.weight.detach()
    old = module.weight
    if isinstance(module, Linear4bit):
        options = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type")}
        options["quant_storage"] = old.quant_storage
        key = (weight.shape, weight.dtype, *options.values())
        if key not in stored:
            stored[key] = bitsandbytes.functional.quantize_4bit(weight, **options)
        packed, state = copy.deepcopy(stored[key])
        options |= {"quant_state": state, "module": module, "bnb_quantized": True}
        module.weight, module.quant_state = Params4bit(packed, requires_grad=False, **options), state
    else:
        numbers, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        module.weight = Int8Params(numbers, requires_grad=False, CB=numbers, SCB=scales)
        module.state.threshold = 0.0  # the number of outliers depends on the data; they are few
    if plain.bias is not None:
        module.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)


class _Linear8bit(Linear8bitLt):
    """An 8-bit layer for inputs [..., features] of any number of dimensions, also under autocast on a CPU.

    bitsandbytes takes one of four for rows of its third, and gives them scales of a wrong shape. On a CPU it may
    multiply the integers of an evaluation as floats: autocast would round these to 8 or 11 bits, and products of
    float16 overflow. Its training multiplies dequantised weights there, which autocast is for.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x.device.type == "cpu" and not self.training
        with torch.autocast("cpu", enabled=False) if exact else nullcontext():
            if x.dim() <= 3:
                return cast(torch.Tensor, super().forward(x))
            return cast(torch.Tensor, super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1]))


def patch_layers(base: nn.Module) -> None:
    """Correct what bitsandbytes' layers do wrong.

    On an AVX512-BF16 CPU they repack 4-bit weights at the first evaluation. The packed form has no backward: every
    gradient after an evaluation would be silently wrong, and so would merging and saving. For 8 bits see
    ``_Linear8bit``.
    """
    module: Any
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module) is Linear8bitLt:
            module.__class__ = _Linear8bit
