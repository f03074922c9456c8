"""A LoRA layer's forward and backward in fewer operations, and in the format of the layer that it is attached to.

PEFT multiplies the input with A and B, scales the product and adds it to the layer's output, four operations; where the
adapter's weights have 32 bits and the layer's 16 it also casts the input up, multiplies in 32 bits, and casts the sum
down. Here B's product is scaled and added by one ``addmm`` into the layer's output, in the output's format. A and B are
cast to it in each forward, so that their gradients and what the optimizer changes keep 32 bits. In the backward the
gradients of A and B are scaled and added to those that are there in one operation, and the adapter's part of the
input's gradient is added to the layer's by one more ``addmm``.

In 32 bits the numbers are PEFT's but for the order of sums. With 16-bit layers A, B and A's product are rounded to 16
bits: in bfloat16 the update differs by some 3 * 2**-9 of its size, beside the rounding of the sum, which is PEFT's too.
Each layer is tried once, and left to PEFT where the output or a gradient is another.

RMS norms, which transformers computes in eight operations and autograd in fifteen more, are one of torch's each way.
It rounds to 16 bits once, where transformers does so before and after the product with the weights. A norm of each
class is tried, too: some add one to their weights, which is left to transformers.

On a CPU a step takes 0.96 to 1.02 times as long, which is not worth other roundings than those of a pack's slots; on an
H100 layers alone took 0.88 (4-bit) to 1.03 times as long, and 0.91 to 0.97 of the memory (docs/measured.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from peftsweep.models.parts import base_of
from peftsweep.schema import TrainConfig

KINDS = (Linear, Linear4bit, Linear8bitLt)
DEVICES = ("cuda",)  # on which a step takes less time or memory so
ATEN, NORM = torch.ops.aten, "_fused_rms_norm"  # which torch has since 2.9
TRIED = (2, 3)  # rows and tokens of the input by which a layer is tried
# Largest norm of a difference relative to what PEFT's layer gives: of 32 bits, and of a few roundings of bfloat16.
EXACT, NARROW = 1e-4, 0.05


def as_trained(model: nn.Module, config: TrainConfig, device: str) -> AbstractContextManager[Any]:
    """In the block the LoRA layers of ``model`` compute as they do in a training on a ``device`` ("cuda", "cpu")."""
    return fused(model) if device in DEVICES and config.compile == "none" else nullcontext()


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """In the block plain LoRA layers and norms of ``model`` compute as said above while it is trained.

    It gives the number of these layers. Layers with DoRA or another variant, with a bias of their own, with several
    active adapters or of another class stay PEFT's, as do those that a pack has taken and those that compute something
    else. In an evaluation all are PEFT's. Layers without numbers, on the meta device, are not tried.
    """
    layers: list[Any] = [module for module in model.modules() if _is_plain(module)]
    dtype = base_of(model).dtype
    layers = [layer for layer in layers if _weights(layer)[0].is_meta or same(layer, dtype)]
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer)
    norms = _norms(model)
    for norm in norms:
        vars(norm)["forward"] = partial(_norm, norm)
    try:
        yield len(layers)
    finally:
        for module in (*layers, *norms):
            del vars(module)["forward"]


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
    dropout, base = layer.lora_dropout[name], layer.base_layer
    dropped = x if isinstance(dropout, nn.Identity) else dropout(x)
    found: torch.Tensor = with_lora(base, x, dropped, *_weights(layer), layer.scaling[name])
    return found


# ---- the product -----------------------------------------------------------------------------------


def with_lora(
    base: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    dropped: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float | torch.Tensor,
) -> torch.Tensor:
    """The output of ``base`` for ``x`` [..., rows, in] with ``scale * dropped @ a.T @ b.T``, in the output's format.

    Shapes: ``a`` [..., r, in] and ``b`` [..., out, r], where ``...`` is nothing for one adapter, and the number of
    adapters for as many, each with its part of the rows; ``scale`` is then a tensor [adapters, 1, 1]. Where the
    weights have gradients, the backward adds to these in place.
    """
    device = x.device.type
    autocasts = torch.amp.is_autocast_available(device)  # not on the meta device
    as_it_is = x is dropped and not (autocasts and torch.is_autocast_enabled(device))
    if as_it_is and isinstance(base, nn.Linear) and _is_frozen(base) and base.weight.dtype == x.dtype:
        found: torch.Tensor = _Product.apply(x, None, base.weight, base.bias, a, b, scale)
        return found
    output: torch.Tensor = base(x)
    if output._is_view():  # in place it would be changed by way of what it is a view of
        output = output.clone()
    with torch.autocast(device, enabled=False) if autocasts else nullcontext():
        found = _Product.apply(dropped.to(output.dtype), output, None, None, a, b, scale)
    return found


def _is_frozen(base: nn.Linear) -> bool:
    """Whether it is a plain linear layer, of which nothing is trained and no hook asks for more than its output."""
    if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter or _is_changed(base):
        return False
    return not any(parameter.requires_grad for parameter in base.parameters())


def _is_changed(module: nn.Module) -> bool:
    """Whether more than its class's forward runs when it is called."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


class _Product(torch.autograd.Function):
    """See ``with_lora``. Given the ``output`` of the base it changes that; else it multiplies with ``weight`` too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        output: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float | torch.Tensor,
    ) -> torch.Tensor:
        """The output."""
        ctx.weights, ctx.rows = (a, b), x.shape
        if output is None:
            output = functional.linear(x, cast(torch.Tensor, weight), bias)
        else:
            ctx.mark_dirty(output)
        down, up = a.to(output.dtype), b.to(output.dtype)
        x = x.reshape(*a.shape[:-2], -1, x.shape[-1])  # of no rows perhaps, as of an expert that no token chose
        inner = x @ down.mT
        if isinstance(scale, torch.Tensor):
            inner *= scale
        ctx.alpha, ctx.scale = (1.0, scale) if isinstance(scale, torch.Tensor) else (scale, None)
        ctx.save_for_backward(x, inner, down, up, weight)
        _add_product(output.view(*x.shape[:-1], up.shape[-2]), inner, up.mT, ctx.alpha)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the input, of the base's output, and of A and B unless these were added to what is there."""
        x, inner, down, up, weight = ctx.saved_tensors
        (of_output,) = gradients
        flat = of_output.reshape(*x.shape[:-1], up.shape[-2])
        of_inner = flat @ up
        if ctx.scale is not None:
            of_inner *= ctx.scale
        pairs = zip(ctx.weights, ((of_inner, x), (flat, inner)), strict=True)
        of_weights = [_add_to(leaf, left.mT, right, ctx.alpha) for leaf, (left, right) in pairs]
        of_x = None
        if ctx.needs_input_grad[0]:
            if weight is None:
                of_x = (of_inner @ down * ctx.alpha if ctx.alpha != 1 else of_inner @ down).view(ctx.rows)
            else:
                of_x = of_output @ weight
                _add_product(of_x.view(x.shape), of_inner, down, ctx.alpha)
        return of_x, of_output if weight is None else None, None, None, *of_weights, None


def _add_product(output: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> None:
    """``output += alpha * left @ right`` in place, of matrices or of stacks of them."""
    add = output.addmm_ if output.ndim == 2 else output.baddbmm_
    add(left, right, alpha=alpha)


def _add_to(leaf: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor | None:
    """Add ``alpha * left @ right`` to the gradient of ``leaf``; return it where autograd is to make that gradient."""
    if not leaf.requires_grad:
        return None
    product = left @ right if leaf.stride(-1) == 1 else (right.mT @ left.mT).mT  # in the order of the leaf's numbers
    if leaf.grad is None:
        return product.to(leaf.dtype) * alpha
    leaf.grad.add_(product, alpha=alpha)
    return None


# ---- norms -----------------------------------------------------------------------------------------


def _norms(model: nn.Module) -> list[Any]:
    """The RMS norms of the model that are torch's; one of each class and format of weights is tried."""
    found: list[Any] = [module for module in model.modules() if hasattr(ATEN, NORM) and _is_norm(module)]
    one_of_kind = {(type(norm), norm.weight.dtype): norm for norm in found}
    fit = {kind for kind, norm in one_of_kind.items() if _same_norm(norm)}
    return [norm for norm in found if (type(norm), norm.weight.dtype) in fit]


def _is_norm(module: Any) -> bool:
    """Whether the module is called an RMS norm, and has frozen weights and an epsilon as one."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(_epsilon(module), float):
        return False
    if type(weight) is not nn.Parameter or weight.ndim != 1 or weight.device.type not in (*DEVICES, "meta"):
        return False
    return not weight.requires_grad and not _is_changed(module)


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm(norm: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    # With a narrower input, as of a norm within an attention under autocast, transformers gives the weights' format.
    if not torch.is_grad_enabled() or x.dtype != norm.weight.dtype or args or kwargs:
        output: torch.Tensor = type(norm).forward(norm, x, *args, **kwargs)
        return output
    found: torch.Tensor = _RmsNorm.apply(x, norm.weight, _epsilon(norm))
    return found


class _RmsNorm(torch.autograd.Function):
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The norm, in the format of ``x``."""
        found: torch.Tensor
        x = x.contiguous()  # which a part of a wider projection is not, as before a norm of latent attention
        found, scale = ATEN._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of ``x``."""
        x, scale, weight = ctx.saved_tensors
        wanted = [True, False]  # the weights are frozen
        of_x, _ = ATEN._fused_rms_norm_backward(gradients[0].contiguous(), x, [x.shape[-1]], scale, weight, wanted)
        return of_x, None, None


@torch.no_grad()
def _same_norm(norm: Any) -> bool:
    """Whether the norm with random weights is torch's but for rounding; on the meta device one on the CPU is tried."""
    device = "cpu" if norm.weight.is_meta else norm.weight.device
    tried = copy.deepcopy(norm).to_empty(device=device)
    draw = torch.Generator(device).manual_seed(0)
    tried.weight.normal_(generator=draw)
    x = torch.randn(*TRIED, len(tried.weight), generator=draw, dtype=tried.weight.dtype, device=device)
    expected = tried(x)
    found, _ = ATEN._fused_rms_norm(x, [x.shape[-1]], tried.weight, _epsilon(tried))
    limit = EXACT if found.dtype == torch.float32 else NARROW
    return found.dtype == expected.dtype and bool((found - expected).norm() <= limit * expected.norm())


# ---- its test --------------------------------------------------------------------------------------


@torch.enable_grad()
def same(layer: Any, dtype: torch.dtype) -> bool:
    """Whether the layer's output and gradients are PEFT's but for rounding, for random numbers and without dropout.

    The input is of this ``dtype``. B, which mostly begins as zero, has random numbers meanwhile.
    """
    (name,) = layer.active_adapters
    down, up = _weights(layer)
    kept, dropout, gradients = up.data, layer.lora_dropout[name], (down.grad, up.grad)
    dropped, trained = dropout.training, [weight.requires_grad for weight in (down, up)]
    draw = torch.Generator(down.device).manual_seed(0)
    up.data = torch.randn(up.shape, generator=draw, dtype=up.dtype, device=up.device) / up.shape[1]
    dropout.eval()
    x = torch.randn(*TRIED, layer.in_features, generator=draw, dtype=dtype, device=down.device).requires_grad_()
    try:
        for weight in (down, up):
            weight.requires_grad_().grad = None
        found, expected = (_tried(forward, layer, x) for forward in (_fused, type(layer).forward))
    except RuntimeError:  # as of a base whose backward needs the output that is changed in place
        return False
    finally:
        up.data = kept
        dropout.train(dropped)
        for weight, wanted, gradient in zip((down, up), trained, gradients, strict=True):
            weight.requires_grad_(wanted).grad = gradient
    limit = EXACT if expected[0].dtype == torch.float32 else NARROW
    return all(bool((a - b).norm() <= limit * b.norm()) for a, b in zip(found, expected, strict=True))


def _tried(forward: Any, layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """What the layer gives for ``x``, and the gradients of ``x``, A and B by a fixed gradient of that."""
    output = forward(layer, x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, [x, *_weights(layer)], weights)]
