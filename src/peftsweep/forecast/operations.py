"""The operations of a step, counted on shapes: FLOPs, bytes read and written, kernel launches."""

from __future__ import annotations

import copyreg
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from peftsweep.observe.flops import PRODUCT, flop_formulas

# Of these the first tensor is read in as many numbers as are returned, not as a whole.
GATHERS = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}
UNCOUNTED = {"aten::_local_scalar_dense", "aten::detach", "aten::is_same_size"}


def _operator(name: str, overload: str) -> torch._ops.OpOverload:
    """The operator of this name, such as ``aten::mm``, and overload."""
    namespace, _, operator = name.partition("::")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), operator), overload)
    return found


# torch's operators cannot be pickled, as the processes that plan a sweep together must.
copyreg.pickle(torch._ops.OpOverload, lambda one: (_operator, (one._schema.name, one._overloadname)))


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of memory that it occupies: a dimension that is expanded (stride 0) counts once."""
        numbers = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            numbers *= size if stride else 1
        return numbers * self.dtype.itemsize


@dataclass(frozen=True)
class SameDevice:
    """An argument that is a device: that of the tensors."""


@dataclass(frozen=True)
class Operation:
    """One call of an operator, by the shapes, strides and number formats of its arguments."""

    operator: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    flops: int = field(compare=False)
    bytes: int = field(compare=False)  # read and written
    views: bool = field(compare=False)  # whether it only looks at its argument in another way: no kernel

    @property
    def name(self) -> str:
        """Of the operator, without its overload: ``aten::mm``."""
        return str(self.operator.name()).partition(".")[0]

    @functools.cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of its tensors, in order."""
        return tuple(spec.dtype for spec in specs((self.arguments, self.keywords)))

    @property
    def kind(self) -> tuple[str, tuple[torch.dtype, ...]]:
        """What two operations share that differ in their sizes alone."""
        return self.operator.name(), self.dtypes

    @functools.cached_property
    def key(self) -> str:
        """Names it in a file."""
        return f"{self.operator.name()}{_said(self.arguments)}{_said(self.keywords)}"


def _said(value: Any) -> str:
    if isinstance(value, TensorSpec):
        dense = value.stride == _contiguous(value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" + (
            "" if dense else f"@{list(value.stride)}"
        )
    if isinstance(value, tuple):
        return f"({','.join(map(_said, value))})"
    return str(value)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= max(length, 1)
    return tuple(reversed(strides))


def specs(value: Any) -> Iterator[TensorSpec]:
    """The tensors of a tree of arguments."""
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from specs(part)


class Ledger:
    """What was called, and how often."""

    def __init__(self) -> None:
        self.calls: Counter[Operation] = Counter()

    def note(self, operator: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any) -> None:
        """Count a call that has returned ``result``."""
        arguments, keywords = _frozen(args), tuple((name, _frozen(value)) for name, value in sorted(kwargs.items()))
        name = operator.name().partition(".")[0]
        if name in UNCOUNTED:
            return
        views = bool(getattr(operator, "is_view", False))
        read = [spec.bytes for spec in specs((arguments, keywords))]
        written = sum(spec.bytes for spec in specs(_frozen(result)))
        if name in GATHERS and read:
            read[0] = min(read[0], written)
        size = 0 if views else sum(read) + written
        flops = 0 if views else _flops(operator, args, kwargs, result)
        self.calls[Operation(operator, arguments, keywords, flops, size, views)] += 1

    @property
    def flops(self) -> int:
        """Of matrix products: one of [m, k] and [k, n] is 2 m n k."""
        return sum(one.flops * count for one, count in self.calls.items())

    @property
    def flops_by_dtype(self) -> Counter[torch.dtype]:
        """Of matrix products, by the number format of the first factor."""
        found: Counter[torch.dtype] = Counter()
        for one, count in self.calls.items():
            if one.flops:
                found[one.dtypes[0]] += one.flops * count
        return found

    @property
    def bytes(self) -> int:
        """Read and written by all kernels."""
        return sum(one.bytes * count for one, count in self.calls.items())

    @property
    def other_bytes(self) -> int:
        """Read and written by kernels that are no matrix products."""
        return sum(one.bytes * count for one, count in self.calls.items() if not one.flops)

    @property
    def launches(self) -> int:
        """Kernels started: every call but views."""
        return sum(count for one, count in self.calls.items() if not one.views)

    @property
    def dispatches(self) -> int:
        """Calls that go through torch's dispatcher, views too."""
        return sum(self.calls.values())

    @property
    def uncounted(self) -> list[str]:
        """Operators that look like a matrix product, of which no formula says the FLOPs."""
        return sorted({one.name for one in self.calls if not one.flops and PRODUCT.fullmatch(one.name)})


def _frozen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorSpec(value.dtype, tuple(value.shape), tuple(value.stride()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(part) for part in value)
    if isinstance(value, torch.device):
        return SameDevice()
    return value


def _flops(operator: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any) -> int:
    formula: Callable[..., int] | None = _formulas("optimum.quanto" in sys.modules).get(operator.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


@functools.cache
def _formulas(_quanto: bool) -> dict[Any, Callable[..., int]]:
    return flop_formulas()
