"""A LoRA layer's forward and backward in fewer operations, and in the dtype of its base layer's output.

PEFT multiplies the input with A and B, scales the product and adds it to the base layer's output: four operations.
Where the adapter's weights have 32 bits and the base's have 16, it also casts the input up, multiplies in 32 bits, and
casts the sum down. Here one ``addmm`` scales B's product and adds it to the base's output, in the dtype of that output.
A and B are cast to this dtype in each forward; their gradients and the weights that the optimizer changes keep 32 bits.
In the backward one operation scales the gradients of A and of B and adds them to ``.grad``, and one more ``addmm`` adds
the adapter's part of the input's gradient to that of the base layer.

In 32 bits the results differ from PEFT's in the order of sums only. With 16-bit layers A, B and A's product are rounded
to 16 bits: in bfloat16 the update differs by about 3 * 2**-9 of its size; the sum is rounded as PEFT rounds it. Each
layer is checked once, and keeps PEFT's forward where its output or a gradient differs by more than rounding.

An RMS norm, for which transformers uses eight operations and autograd fifteen more, is one operation of torch in the
forward and one in the backward. It rounds to 16 bits once, where transformers rounds before and after the product with
the weights. One norm of each class is checked, too: some classes add one to their weights, and keep their forward.

On a CPU a step takes 0.96 to 1.02 times as long, which does not justify roundings that differ from those of a pack's
slots. On an H100 layers alone took 0.88 (4-bit) to 1.03 times as long, with 0.91 to 0.97 of the memory
(docs/measured.md).
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
DEVICES = ("cuda",)  # device types on which this saves time or memory
ATEN, NORM = torch.ops.aten, "_fused_rms_norm"  # since torch 2.9
CHECKED_SHAPE = (2, 3)  # rows and tokens of the random input with which a layer is checked
# Largest norm of a difference, relative to the norm of PEFT's result: in 32 bits, and in 16 (a few roundings).
TOLERANCE_32_BITS, TOLERANCE_16_BITS = 1e-4, 0.05


def as_trained(model: nn.Module, config: TrainConfig, device: str) -> AbstractContextManager[Any]:
    """In the block the LoRA layers of ``model`` compute as in a training on this type of device ("cuda", "cpu")."""
    return fused(model) if device in DEVICES and config.compile == "none" else nullcontext()


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """In the block plain LoRA layers and RMS norms of ``model`` use fewer operations while it is in training mode.

    Yields the number of these LoRA layers. PEFT's forward stays for layers with DoRA or another variant, with a bias of
    their own, with several active adapters or of another class, for layers of a pack, and for layers that do not pass
    the check. In evaluation mode all layers use PEFT's forward. Layers on the meta device have no numbers to check.
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
    output: torch.Tensor = with_lora(base, x, dropped, *_weights(layer), layer.scaling[name])
    return output


# ---- the product -----------------------------------------------------------------------------------


def with_lora(
    base: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    dropped: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float | torch.Tensor,
) -> torch.Tensor:
    """``base(x) + scale * dropped @ a.T @ b.T``, in the dtype of ``base(x)``.

    ``dropped`` is ``x`` [..., in] after dropout; it is ``x`` itself without dropout. For one adapter ``a`` is [r, in],
    ``b`` [out, r] and ``scale`` a number. For several, each with its part of the rows of ``x``, ``a`` is
    [adapters, r, in], ``b`` [adapters, out, r] and ``scale`` [adapters, 1, 1]. Where ``a`` and ``b`` have ``.grad``,
    the backward adds to it in place.
    """
    device = x.device.type
    can_autocast = torch.amp.is_autocast_available(device)  # not on the meta device
    is_unchanged = x is dropped and not (can_autocast and torch.is_autocast_enabled(device))
    if is_unchanged and isinstance(base, nn.Linear) and _is_frozen(base) and base.weight.dtype == x.dtype:
        output: torch.Tensor = _Product.apply(x, None, base.weight, base.bias, a, b, scale)
        return output
    base_output: torch.Tensor = base(x)
    if base_output._is_view():  # autograd allows no change in place of a view that a custom function returned
        base_output = base_output.clone()
    with torch.autocast(device, enabled=False) if can_autocast else nullcontext():
        output = _Product.apply(dropped.to(base_output.dtype), base_output, None, None, a, b, scale)
    return output


def _is_frozen(base: nn.Linear) -> bool:
    """Whether ``base`` is a plain linear layer without trained parameters, patched forward or hooks."""
    if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter or _is_patched(base):
        return False
    return not any(parameter.requires_grad for parameter in base.parameters())


def _is_patched(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs a patched forward or forward hooks."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


class _Product(torch.autograd.Function):
    """The computation of ``with_lora``.

    With the base's ``output`` it adds to that in place; without it, it also computes the base's product, from
    ``weight`` and ``bias``.
    """

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
        """The sum of the base's output and the adapter's."""
        ctx.weights, ctx.input_shape = (a, b), x.shape
        if output is None:
            output = functional.linear(x, cast(torch.Tensor, weight), bias)
        else:
            ctx.mark_dirty(output)
        down, up = a.to(output.dtype), b.to(output.dtype)
        x = x.reshape(*a.shape[:-2], -1, x.shape[-1])  # may have 0 rows, for an expert that no token was routed to
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
        """The gradients of the input, of the base's output, and of A and B (None where added to their ``.grad``)."""
        x, inner, down, up, weight = ctx.saved_tensors
        (output_grad,) = gradients
        flat_grad = output_grad.reshape(*x.shape[:-1], up.shape[-2])
        inner_grad = flat_grad @ up
        if ctx.scale is not None:
            inner_grad *= ctx.scale
        factors = zip(ctx.weights, ((inner_grad, x), (flat_grad, inner)), strict=True)
        weight_grads = [_add_to_grad(leaf, left.mT, right, ctx.alpha) for leaf, (left, right) in factors]
        x_grad = None
        if ctx.needs_input_grad[0]:
            if weight is None:
                x_grad = (inner_grad @ down * ctx.alpha if ctx.alpha != 1 else inner_grad @ down).view(ctx.input_shape)
            else:
                x_grad = output_grad @ weight
                _add_product(x_grad.view(x.shape), inner_grad, down, ctx.alpha)
        return x_grad, output_grad if weight is None else None, None, None, *weight_grads, None


def _add_product(output: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> None:
    """``output += alpha * left @ right`` in place, for matrices or for batches of matrices."""
    add = output.addmm_ if output.ndim == 2 else output.baddbmm_
    add(left, right, alpha=alpha)


def _add_to_grad(leaf: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor | None:
    """Add ``alpha * left @ right`` to ``leaf.grad``; without a ``leaf.grad`` return it, so that autograd makes one."""
    if not leaf.requires_grad:
        return None
    product = left @ right if leaf.stride(-1) == 1 else (right.mT @ left.mT).mT  # with the strides of the leaf
    if leaf.grad is None:
        return product.to(leaf.dtype) * alpha
    leaf.grad.add_(product, alpha=alpha)
    return None


# ---- norms -----------------------------------------------------------------------------------------


def _norms(model: nn.Module) -> list[Any]:
    """The RMS norms of the model that compute what torch's does; one of each class and dtype of weights is checked."""
    norms: list[Any] = [module for module in model.modules() if hasattr(ATEN, NORM) and _is_norm(module)]
    one_of_kind = {(type(norm), norm.weight.dtype): norm for norm in norms}
    equal_kinds = {kind for kind, norm in one_of_kind.items() if _same_norm(norm)}
    return [norm for norm in norms if (type(norm), norm.weight.dtype) in equal_kinds]


def _is_norm(module: Any) -> bool:
    """Whether the class is named RMSNorm, and the module has an epsilon and one frozen vector of weights."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(_epsilon(module), float):
        return False
    if type(weight) is not nn.Parameter or weight.ndim != 1 or weight.device.type not in (*DEVICES, "meta"):
        return False
    return not weight.requires_grad and not _is_patched(module)


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _norm(norm: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    # A norm inside an attention gets a narrower input under autocast; transformers then returns the weights' dtype.
    if not torch.is_grad_enabled() or x.dtype != norm.weight.dtype or args or kwargs:
        output: torch.Tensor = type(norm).forward(norm, x, *args, **kwargs)
        return output
    output = _RmsNorm.apply(x, norm.weight, _epsilon(norm))
    return output


class _RmsNorm(torch.autograd.Function):
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The normalised ``x``, in the dtype of ``x``."""
        output: torch.Tensor
        x = x.contiguous()  # in latent attention the input is a part of a wider projection, which is not contiguous
        output, scale = ATEN._fused_rms_norm(x, [x.shape[-1]], weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of ``x``."""
        x, scale, weight = ctx.saved_tensors
        mask = [True, False]  # the gradient of x, and none of the weights, which are frozen
        x_grad, _ = ATEN._fused_rms_norm_backward(gradients[0].contiguous(), x, [x.shape[-1]], scale, weight, mask)
        return x_grad, None, None


@torch.no_grad()
def _same_norm(norm: Any) -> bool:
    """Whether ``norm`` with random weights equals torch's RMS norm but for rounding.

    For a norm on the meta device a copy on the CPU is checked.
    """
    device = "cpu" if norm.weight.is_meta else norm.weight.device
    checked = copy.deepcopy(norm).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    checked.weight.normal_(generator=generator)
    shape = (*CHECKED_SHAPE, len(checked.weight))
    x = torch.randn(*shape, generator=generator, dtype=checked.weight.dtype, device=device)
    expected = checked(x)
    output, _ = ATEN._fused_rms_norm(x, [x.shape[-1]], checked.weight, _epsilon(checked))
    tolerance = TOLERANCE_32_BITS if output.dtype == torch.float32 else TOLERANCE_16_BITS
    return output.dtype == expected.dtype and bool((output - expected).norm() <= tolerance * expected.norm())


# ---- the check of a layer --------------------------------------------------------------------------


@torch.enable_grad()
def same(layer: Any, dtype: torch.dtype) -> bool:
    """Whether the layer's output and gradients equal PEFT's but for rounding, for random numbers and without dropout.

    The input has this ``dtype``. B, which is usually zero at first, has random numbers during the check.
    """
    (name,) = layer.active_adapters
    down, up = _weights(layer)
    up_data, dropout, gradients = up.data, layer.lora_dropout[name], (down.grad, up.grad)
    was_training, required = dropout.training, [weight.requires_grad for weight in (down, up)]
    generator = torch.Generator(down.device).manual_seed(0)
    up.data = torch.randn(up.shape, generator=generator, dtype=up.dtype, device=up.device) / up.shape[1]
    dropout.eval()
    shape = (*CHECKED_SHAPE, layer.in_features)
    x = torch.randn(*shape, generator=generator, dtype=dtype, device=down.device).requires_grad_()
    try:
        for weight in (down, up):
            weight.requires_grad_().grad = None
        results, expected = (_output_and_grads(forward, layer, x) for forward in (_fused, type(layer).forward))
    except RuntimeError:  # for example of a base whose backward needs the output that is changed in place
        return False
    finally:
        up.data = up_data
        dropout.train(was_training)
        for weight, requires_grad, gradient in zip((down, up), required, gradients, strict=True):
            weight.requires_grad_(requires_grad).grad = gradient
    tolerance = TOLERANCE_32_BITS if expected[0].dtype == torch.float32 else TOLERANCE_16_BITS
    return all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in zip(results, expected, strict=True))


def _output_and_grads(forward: Any, layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The layer's output for ``x``, and the gradients of ``x``, A and B for a fixed gradient of the output."""
    output = forward(layer, x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, [x, *_weights(layer)], weights)]
