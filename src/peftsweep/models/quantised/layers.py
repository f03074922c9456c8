"""Quantised layers of all libraries: their bits, their tensors, and how they become plain layers again.

bitsandbytes has layers of its own and keeps scales beside their weights. torchao and quanto have weights that are
tensor subclasses around plain tensors (``__tensor_flatten__``), on nn.Linear or a subclass of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
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

BITSANDBYTES = (Linear4bit, Linear8bitLt)  # for which PEFT has layers of its own, beside its usual ones


def bits(module: nn.Module) -> int | None:
    """In how many bits a number of the layer's weight is stored; None where it is not quantised."""
    if isinstance(module, BITSANDBYTES):
        return 4 if isinstance(module, Linear4bit) else 8
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if is_wrapper(weight):
        return round(8 * max(part.nbytes for part in plain_tensors(weight)) / weight.numel())  # the rest are scales
    return 8 if weight.is_floating_point() and weight.dtype.itemsize == 1 else None


def is_quantised(module: nn.Module) -> bool:
    """Whether the layer's weight is stored in fewer bits than it is calculated with."""
    return bits(module) is not None


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a tensor subclass is made of; a plain tensor itself."""
    if not is_wrapper(tensor):
        yield tensor
        return
    for name in cast(Any, tensor).__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def kept_tensors(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """All that is kept of a weight: the tensors that it is made of, and the scales that bitsandbytes keeps beside."""
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
    """``base`` with plain layers in place of all quantised ones; it is consumed."""
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
    """Whether it is a tensor subclass around others, as torchao's and quanto's weights are."""
    return is_traceable_wrapper_subclass(tensor)


# ---- without numbers -------------------------------------------------------------------------------


def quantise_skeleton(base: PreTrainedModel, quantization: Any) -> None:
    """Give ``base``, which has no numbers, the layers and weights that loading it with ``quantization`` would give."""
    plain = dict(base.named_modules())
    quantizer: Any = AutoHfQuantizer.from_config(quantization)
    quantizer.preprocess_model(base, device_map=None)
    if quantization.quant_method == "bitsandbytes":
        stored: dict[Any, tuple[torch.Tensor, Any]] = {}
        with patch.dict(bitsandbytes.functional.name2qmap):  # a cache that must not keep a tensor without numbers
            for name, module in base.named_modules():
                if module is not plain.get(name):
                    _store(module, plain[name], stored)
    else:
        vars(quantizer).setdefault("offload_to_cpu", False)  # of torchao's, which sets it when it looks at the machine
        convert = quantizer.get_quantize_ops().convert
        for name, weight in [*base.named_parameters()]:
            if quantizer.param_needs_quantization(base, name):
                convert({name: [weight.detach()]}, model=base, full_layer_name=name, missing_keys=set())
    quantizer.postprocess_model(base)  # marks the model, by which PEFT knows it


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
        module.state.threshold = 0.0  # how many outliers there are only data says; they are few
    if plain.bias is not None:
        module.bias = nn.Parameter(plain.bias.detach(), requires_grad=False)
