"""A LoRA layer's forward in fewer operations, and in the format of the layer that it is attached to.

PEFT multiplies the input with A and B, scales the product and adds it to the layer's output, four operations; where the
adapter's weights have 32 bits and the layer's 16 it also casts the input up, multiplies in 32 bits, and casts the sum
down. Here B's product is scaled and added by one ``addmm`` into the layer's output, in the output's format. A and B are
cast to it in each forward, so that their gradients and what the optimizer changes keep 32 bits.

In 32 bits the numbers are PEFT's but for the order of sums. With 16-bit layers A, B and A's product are rounded to 16
bits: in bfloat16 the update differs by some 3 * 2**-9 of its size, beside the rounding of the sum, which is PEFT's too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn
from torch.nn import functional

KINDS = (Linear, Linear4bit, Linear8bitLt)


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """In the block the plain LoRA layers of ``model`` compute as said above; gives their number.

    Layers with DoRA or another variant, with a bias of their own, with several active adapters or of another class
    stay PEFT's, as do those that a pack has taken.
    """
    layers: list[Any] = [module for module in model.modules() if _is_plain(module)]
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _is_plain(layer: Any) -> bool:
    """Whether the layer's forward is base + scaling * B(A(dropout(x)))."""
    if type(layer) not in KINDS or "forward" in vars(layer) or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        output: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return output
    (name,) = layer.active_adapters
    result: torch.Tensor = layer.base_layer(x)
    down, up = (part[name].weight.to(result.dtype) for part in (layer.lora_A, layer.lora_B))
    inner = functional.linear(layer.lora_dropout[name](x).to(result.dtype), down)
    flat = result.flatten(0, -2)
    return torch.addmm(flat, inner.flatten(0, -2), up.t(), alpha=layer.scaling[name]).view(result.shape)
