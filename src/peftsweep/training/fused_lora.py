"""A LoRA layer's forward in fewer operations, and in the format of the layer that it is attached to.

PEFT multiplies the input with A and B, scales the product and adds it to the layer's output, four operations; where the
adapter's weights have 32 bits and the layer's 16 it also casts the input up, multiplies in 32 bits, and casts the sum
down. Here B's product is scaled and added by one ``addmm`` into the layer's output, in the output's format. A and B are
cast to it in each forward, so that their gradients and what the optimizer changes keep 32 bits.

In 32 bits the numbers are PEFT's but for the order of sums. With 16-bit layers A, B and A's product are rounded to 16
bits: in bfloat16 the update differs by some 3 * 2**-9 of its size, beside the rounding of the sum, which is PEFT's too.
Each layer is tried once, and left to PEFT where the output or a gradient is another.

On a CPU a step takes 0.96 to 1.02 times as long, which is not worth other roundings than those of a pack's slots; on an
H100 it took 0.88 (4-bit) to 1.03 times as long, and 0.91 to 0.97 of the memory (docs/measured.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn
from torch.nn import functional

from peftsweep.models.parts import base_of
from peftsweep.schema import TrainConfig

KINDS = (Linear, Linear4bit, Linear8bitLt)
DEVICES = ("cuda",)  # on which a step takes less time or memory so
TRIED = (2, 3)  # rows and tokens of the input by which a layer is tried
# Largest norm of a difference relative to what PEFT's layer gives: of 32 bits, and of a few roundings of bfloat16.
EXACT, NARROW = 1e-4, 0.05


def as_trained(model: nn.Module, config: TrainConfig, device: str) -> AbstractContextManager[Any]:
    """In the block the LoRA layers of ``model`` compute as they do in a training on a ``device`` ("cuda", "cpu")."""
    return fused(model) if device in DEVICES and config.compile == "none" else nullcontext()


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """In the block the plain LoRA layers of ``model`` compute as said above while they are trained; gives their number.

    Layers with DoRA or another variant, with a bias of their own, with several active adapters or of another class
    stay PEFT's, as do those that a pack has taken and those that compute something else. In an evaluation all are
    PEFT's. Layers without numbers, on the meta device, are not tried.
    """
    layers: list[Any] = [module for module in model.modules() if _is_plain(module)]
    dtype = base_of(model).dtype if layers else torch.float32
    layers = [layer for layer in layers if _weights(layer)[0].is_meta or same(layer, dtype)]
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


def _weights(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not layer.training or layer.disable_adapters or layer.merged or args or kwargs:
        output: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return output
    return _fused(layer, x)


def _fused(layer: Any, x: torch.Tensor) -> torch.Tensor:
    (name,) = layer.active_adapters
    result: torch.Tensor = layer.base_layer(x)
    down, up = (weight.to(result.dtype) for weight in _weights(layer))
    inner = functional.linear(layer.lora_dropout[name](x).to(result.dtype), down)
    flat = result.flatten(0, -2)
    return torch.addmm(flat, inner.flatten(0, -2), up.t(), alpha=layer.scaling[name]).view(result.shape)


@torch.enable_grad()
def same(layer: Any, dtype: torch.dtype) -> bool:
    """Whether the layer's output and gradients are PEFT's but for rounding, for random numbers and without dropout.

    The input is of this ``dtype``. B, which mostly begins as zero, has random numbers meanwhile.
    """
    (name,) = layer.active_adapters
    down, up = _weights(layer)
    kept, dropout = up.data, layer.lora_dropout[name]
    dropped, trained = dropout.training, [weight.requires_grad for weight in (down, up)]
    draw = torch.Generator(down.device).manual_seed(0)
    up.data = torch.randn(up.shape, generator=draw, dtype=up.dtype, device=up.device) / up.shape[1]
    dropout.eval()
    x = torch.randn(*TRIED, layer.in_features, generator=draw, dtype=dtype, device=down.device).requires_grad_()
    try:
        for weight in (down, up):
            weight.requires_grad_()
        found, expected = (_tried(forward, layer, x) for forward in (_fused, type(layer).forward))
    finally:
        up.data = kept
        dropout.train(dropped)
        for weight, wanted in zip((down, up), trained, strict=True):
            weight.requires_grad_(wanted)
    limit = EXACT if expected[0].dtype == torch.float32 else NARROW
    return all(bool((a - b).norm() <= limit * b.norm()) for a, b in zip(found, expected, strict=True))


def _tried(forward: Any, layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """What the layer gives for ``x``, and the gradients of ``x``, A and B by a fixed gradient of that."""
    output = forward(layer, x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, [x, *_weights(layer)], weights)]
