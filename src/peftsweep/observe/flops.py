"""Floating-point operations of a step, and the device's peak rate."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from peftsweep.observe.measure import Laps, out_of_memory, percentile

PRODUCT = re.compile(r"(?!aten::|autograd::)\w+::\w*(mm|gemv|matmul|attn|attention)(?!_dequant)\w*")
SIZES = {"cuda": (2048, 4096, 8192), "cpu": (512, 1024, 2048)}

Run = Callable[[int, Callable[[], None]], None]
Layout = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
LAYOUTS: tuple[Layout, ...] = (  # of the factors of the products in a layer's forward and backward
    lambda left, right: (left, right.t()),
    lambda left, right: (left, right),
    lambda left, right: (left.t(), right),
)
SLOW_LAYOUT = 1.25


def count_flops(run: Run, settle: int, active: int) -> Counter[torch.dtype]:
    """Floating-point operations of matrix products in the last ``active`` steps, by the dtype of the first factor.

    A product of [m, k] and [k, n] is 2 m n k; that of an 8-bit layer counts under the dtype of its input.
    Operations that checkpointing and fused attention repeat count again.
    A compiled model is run uncompiled, so that its fused kernels are counted too.
    """
    totals: Counter[torch.dtype] = Counter()
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done == settle:
            totals.clear()

    def noted(formula: Callable[..., int]) -> Callable[..., int]:
        def count(first: torch.Tensor, *args: Any, **kwargs: Any) -> int:
            flops = formula(first, *args, **kwargs)
            totals[first.dtype] += flops
            return flops

        count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
        return count

    formulas = {operator: noted(formula) for operator, formula in flop_formulas().items()}
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=formulas),
    ):
        run(settle + active, after_step)
    return totals


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """For each operator that multiplies matrices, its FLOPs from its arguments and its result ``out_val``."""
    return flop_registry | _more_formulas()


def _more_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas that torch's counter lacks: attention on a CPU, experts, and products of bitsandbytes and quanto.

    The backward of its quantised layers multiplies by dequantised weights, which torch counts.
    """
    aten, bits, quanto, experts = torch.ops.aten, torch.ops.bitsandbytes, torch.ops.quanto, torch.ops.transformers
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
            aten._scaled_dot_product_flash_attention_backward
        ],
    }
    formulas |= {getattr(bits, name): formula for name, formula in BITSANDBYTES.items() if hasattr(bits, name)}
    formulas |= {getattr(aten, name): formula for name, formula in GROUPED.items() if hasattr(aten, name)}
    formulas |= {getattr(experts, name): formula for name, formula in GROUPED.items() if hasattr(experts, name)}
    if hasattr(quanto, "qbytes_mm"):
        formulas[quanto.qbytes_mm] = _int8_flops
    return formulas


def _int8_flops(left: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * left.numel() * weight.shape[0]  # [..., k] and [n, k]


def _mixed_int8_flops(left: torch.Tensor, _left: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    return _int8_flops(left, weight)  # the outliers' columns are zero in the 8-bit product, so they count once


def _four_bit_flops(left: torch.Tensor, _packed: torch.Tensor, shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * left.numel() * int(shape[0])


def _grouped_flops(left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of a grouped product, such as of experts: each row, column or inner index belongs to one group.

    [m, k] and [groups, k, n], or [m, k] and [k, n] in groups of k: 2 m k n. [groups, m, k] and [k, n] likewise.
    """
    shared = len(left) if left.dim() > right.dim() else 1
    return 2 * left.numel() * int(right.shape[-1]) // shared


def _grouped_backward_flops(left: torch.Tensor, right: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * _grouped_flops(left, right)  # the gradients of both, whether they are needed or not


GROUPED: dict[str, Callable[..., int]] = {  # the products of experts: torch's, and transformers' for older versions
    "_grouped_mm": _grouped_flops,
    "grouped_mm_fallback": _grouped_flops,
    "grouped_mm_fallback_backward": _grouped_backward_flops,
}
BITSANDBYTES: dict[str, Callable[..., int]] = {
    "int8_linear_matmul": _int8_flops,
    "int8_scaled_mm": _int8_flops,
    "int8_mixed_scaled_mm": _mixed_int8_flops,
    "gemm_4bit": _four_bit_flops,
    "gemv_4bit": _four_bit_flops,
}


def uncounted(averages: Sequence[Any]) -> str:
    """The names of operators that look like a matrix product but have no formula; empty if all were counted."""
    known = {"quanto::qbytes_mm", *(f"bitsandbytes::{name}" for name in BITSANDBYTES)}
    known |= {f"transformers::{name}" for name in GROUPED}
    return " ".join(sorted({e.key for e in averages if PRODUCT.fullmatch(e.key)} - known))


def matmul_ceiling(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[int],
    *,
    repeats: int = 10,
    clock: Callable[[], float] = time.perf_counter,
    longest: float = math.inf,
) -> float:
    """FLOP/s of the fastest square matrix product: the best of ``sizes``, of each the median of ``repeats``.

    The factors have the layout that is fastest. One that takes over ``SLOW_LAYOUT`` times as long as the fastest at the
    smallest size is left out there: it may lack a kernel for the dtype (bfloat16 on a CPU without AVX-512).

    Sizes for which the device lacks the memory are left out; the smallest must fit. So are those above one whose
    product takes over ``longest`` seconds, as in a number format for which the device has no instruction.
    """

    def seconds(layout: Layout, size: int, repeats: int) -> float:
        left, right = layout(*(torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)))
        product = torch.mm(left, right)
        laps = Laps(device, clock)
        torch.mm(left, right, out=product)  # the second to warm up
        for _ in range(repeats):
            laps.start()
            torch.mm(left, right, out=product)
            laps.stop()
        return percentile(laps.seconds(), 50) or 0.0

    small = [seconds(one, min(sizes), 1) for one in LAYOUTS]
    layouts = [one for one, took in zip(LAYOUTS, small, strict=True) if took <= SLOW_LAYOUT * min(small)]
    best = 0.0
    for size in sorted(sizes):
        try:
            took = min(seconds(one, size, repeats) for one in layouts)
        except RuntimeError as error:
            if best and out_of_memory(error):
                break
            raise
        best = max(best, 2 * size**3 / took)
        if took > longest:
            break
    return best
