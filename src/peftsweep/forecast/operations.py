"""The operations of a step, counted on shapes: FLOPs, bytes read and written, kernel launches."""

from __future__ import annotations

import copyreg
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from peftsweep.observe.flops import PRODUCT, flop_formulas

# Operators that read only as many numbers of their first tensor as they return.
GATHERS = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}
ALIGNMENT = 64  # a tensor that is made for a call starts at a multiple of this many bytes
UNCOUNTED = {"aten::_local_scalar_dense", "aten::detach", "aten::is_same_size"}


def _operator(name: str, overload: str) -> torch._ops.OpOverload:
    """The operator of this name, such as ``aten::mm``, and overload."""
    namespace, _, operator = name.partition("::")
    overloaded: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), operator), overload)
    return overloaded


# torch's operators cannot be pickled, as the processes that plan a sweep together must.
copyreg.pickle(torch._ops.OpOverload, lambda one: (_operator, (one._schema.name, one._overloadname)))


class TensorSpec(NamedTuple):
    """The dtype, shape and stride (in elements) of a tensor, without its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The memory that it occupies: an expanded dimension (stride 0) counts once."""
        numbers = 1
        for size, stride in zip(self.shape, self.stride, strict=True):
            numbers *= size if stride else 1
        return numbers * self.dtype.itemsize

    @property
    def dense(self) -> bool:
        """Whether its elements lie in the memory in the order of its dimensions, without gaps."""
        return self.stride == _contiguous(self.shape)


@dataclass(frozen=True)
class SameDevice:
    """Takes the place of an argument that is a device: it stands for the device of the tensors."""


@dataclass(frozen=True)
class Operation:
    """One call of an operator, with the shapes, strides and dtypes of its arguments."""

    operator: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    flops: int = field(compare=False)
    bytes: int = field(compare=False)  # read and written
    views: bool = field(compare=False)  # whether it only returns a view of an argument, without a kernel

    @property
    def name(self) -> str:
        """The name of the operator, without its overload: ``aten::mm``."""
        return str(self.operator.name()).partition(".")[0]

    @functools.cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of its tensors, in order."""
        return tuple(spec.dtype for spec in specs((self.arguments, self.keywords)))

    @property
    def kinds(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Two keys, equal for operations that differ only in their sizes; in their sizes and in the tensors' layouts.

        The kernels of a product depend on which factor is transposed: on a CPU without instructions for bfloat16 one
        layout takes ten times as long as another.
        """
        dense = tuple(spec.dense for spec in specs((self.arguments, self.keywords)))
        return (self.operator.name(), self.dtypes, dense), (self.operator.name(), self.dtypes)

    @property
    def changes_nothing(self) -> bool:
        """Whether a call leaves its arguments as they are."""
        return not any(part.alias_info and part.alias_info.is_write for part in self.operator._schema.arguments)

    @functools.cached_property
    def key(self) -> str:
        """The name of the operation in the cache file of a device's speed."""
        return f"{self.operator.name()}{_as_text(self.arguments)}{_as_text(self.keywords)}"


def _as_text(value: Any) -> str:
    if isinstance(value, TensorSpec):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" + (
            "" if value.dense else f"@{list(value.stride)}"
        )
    if isinstance(value, tuple):
        return f"({','.join(map(_as_text, value))})"
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
    """The operations that were called, with their numbers of calls."""

    def __init__(self) -> None:
        self.calls: Counter[Operation] = Counter()

    def note(self, operation: Operation | None) -> None:
        """Count a call of ``operation``; None is not counted."""
        if operation is not None:
            self.calls[operation] += 1

    @property
    def flops(self) -> int:
        """The FLOPs of all matrix products; a product of [m, k] and [k, n] has 2 m n k."""
        return sum(operation.flops * count for operation, count in self.calls.items())

    @property
    def flops_by_dtype(self) -> Counter[torch.dtype]:
        """The FLOPs of all matrix products, by the dtype of the first factor."""
        flops: Counter[torch.dtype] = Counter()
        for operation, count in self.calls.items():
            if operation.flops:
                flops[operation.dtypes[0]] += operation.flops * count
        return flops

    @property
    def bytes(self) -> int:
        """The bytes that all kernels read and write."""
        return sum(operation.bytes * count for operation, count in self.calls.items())

    @property
    def other_bytes(self) -> int:
        """The bytes that kernels other than matrix products read and write."""
        return sum(operation.bytes * count for operation, count in self.calls.items() if not operation.flops)

    @property
    def launches(self) -> int:
        """The number of kernel launches: all calls except views."""
        return sum(count for operation, count in self.calls.items() if not operation.views)

    @property
    def dispatches(self) -> int:
        """The number of calls through torch's dispatcher, including views."""
        return sum(self.calls.values())

    @property
    def uncounted(self) -> list[str]:
        """Operators that look like a matrix product by their name, and have no formula for the FLOPs."""
        return sorted(
            {operation.name for operation in self.calls if not operation.flops and PRODUCT.fullmatch(operation.name)}
        )


# ---- one call ----------------------------------------------------------------------------------------


def operation(operator: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any) -> Operation | None:
    """The operation of a call that has returned ``result``; None if it is not counted."""
    arguments, keywords = _frozen(args), _frozen_keywords(kwargs)
    name = operator.name().partition(".")[0]
    if name in UNCOUNTED:
        return None
    views = bool(getattr(operator, "is_view", False))
    read = [spec.bytes for spec in specs((arguments, keywords))]
    written = sum(spec.bytes for spec in specs(_frozen(result)))
    if name in GATHERS and read:
        read[0] = min(read[0], written)
    size = 0 if views else sum(read) + written
    flops = 0 if views else _flops(operator, args, kwargs, result)
    return Operation(operator, arguments, keywords, flops, size, views)


class CachedCall(NamedTuple):
    """The operation and the results of a call on the meta device, cached for equal calls."""

    operation: Operation | None  # None: it is not counted
    # The new tensors that it returns, None for a result that is no tensor. ``results=None``: it must be called again.
    results: tuple[TensorSpec | None, ...] | None
    single: bool = True  # it returns a tensor, not a tuple

    def again(self) -> Any:
        """Empty tensors on the meta device with the shapes, strides and dtypes that the call returns."""
        with torch._C.DisableTorchFunction():  # function modes that watch calls must not see these
            made = [
                spec and torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")
                for spec in self.results or ()
            ]
        return made[0] if self.single else tuple(made)


_CALLS: dict[Any, CachedCall] = {}
MOST_CALLS = 20_000


def run(operator: torch._ops.OpOverload, args: Any, kwargs: Any) -> tuple[Any, Operation | None]:
    """Call ``operator`` on the meta device; returns its result and its operation (None: it is not counted).

    Layers repeat and trials are similar. The shapes, strides and dtypes of the arguments decide the result of a call on
    the meta device, and many such calls are slow, because they are written in Python. So the results of operators that
    return only new tensors are cached, and made again as empty tensors.
    """
    key = _key(operator, args, kwargs)
    cached = None if key is None else _CALLS.get(key)
    if cached is not None:
        return operator(*args, **kwargs) if cached.results is None else cached.again(), cached.operation
    storages = [] if key is None else [one.untyped_storage()._cdata for one in _tensors([args, kwargs])]
    result = operator(*args, **kwargs)
    counted = operation(operator, args, kwargs, result)
    if key is not None:
        if len(_CALLS) >= MOST_CALLS:
            _CALLS.clear()
        results = result if isinstance(result, tuple) else (result,)
        is_remembered = _returns_new(operator) and all(map(_is_plain, results)) and _own_memory(results, storages)
        new_specs = tuple(None if one is None else _frozen(one) for one in results) if is_remembered else None
        _CALLS[key] = CachedCall(counted, new_specs, not isinstance(result, tuple))
    return result, counted


@functools.cache
def _returns_new(operator: torch._ops.OpOverload) -> bool:
    """Whether the operator's schema says that it changes no argument, and returns only tensors that are no views."""
    schema = operator._schema
    if any(part.alias_info is not None for part in (*schema.arguments, *schema.returns)):
        return False
    return bool(schema.returns) and all(str(part.type) == "Tensor" for part in schema.returns)


def _key(operator: torch._ops.OpOverload, args: Any, kwargs: Any) -> Any:
    """The values that decide the result of a call; None if it also depends on other values, or has no tensor."""
    tensors = list(_tensors([args, kwargs] if kwargs else args))
    if not tensors or not all(one.is_meta and one.layout is torch.strided for one in tensors):
        return None
    for value in kwargs.values():
        if isinstance(value, torch.Generator) or (isinstance(value, torch.device) and value.type != "meta"):
            return None
    arguments, keywords = _frozen(args), _frozen_keywords(kwargs)
    # The types too, because 1 == 1.0 == True, but the dtype of a result depends on the type.
    key = operator, arguments, keywords, *map(type, arguments), *[type(value) for _, value in keywords]
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_plain(result: Any) -> bool:
    """Whether ``torch.empty_strided`` makes an equal tensor: on the meta device, with a storage of just its size."""
    if result is None:
        return True
    if type(result) is not torch.Tensor or not result.is_meta or result.layout is not torch.strided:
        return False
    last = sum((size - 1) * step for size, step in zip(result.shape, result.stride(), strict=True))
    numbers = 0 if 0 in result.shape else last + 1
    return result.storage_offset() == 0 and result.untyped_storage().nbytes() == numbers * result.element_size()


def _own_memory(results: Iterable[torch.Tensor | None], argument_storages: Iterable[int]) -> bool:
    """Whether each result has its own storage, which is none of ``argument_storages``."""
    storages = [result.untyped_storage()._cdata for result in results if result is not None]
    return len({*storages}) == len(storages) and {*storages}.isdisjoint(argument_storages)


def _frozen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorSpec(value.dtype, tuple(value.shape), value.stride())
    if isinstance(value, list | tuple):
        return tuple(_frozen(part) for part in value)
    if isinstance(value, torch.device):
        return SameDevice()
    return value


def _frozen_keywords(kwargs: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _frozen(value)) for name, value in sorted(kwargs.items())) if kwargs else ()


def _flops(operator: torch._ops.OpOverload, args: Any, kwargs: Any, result: Any) -> int:
    formula: Callable[..., int] | None = _formulas("optimum.quanto" in sys.modules).get(operator.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


@functools.cache
def _formulas(_quanto: bool) -> dict[Any, Callable[..., int]]:
    return flop_formulas()


# ---- a call with numbers -----------------------------------------------------------------------------


class Arguments:
    """Makes arguments for operations on a device: floats are ones, integers are indices below all sizes.

    The tensors of ones share one buffer of ``size`` bytes for each dtype, which is written once. New memory would be
    mapped at its first write, which takes longer than most operations.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device, self._size = device, size
        self._ones: dict[torch.dtype, torch.Tensor] = {}
        self._used: Counter[torch.dtype] = Counter()  # elements of the buffers that are in use

    def made(self, operation: Operation, sets: int) -> list[tuple[list[Any], dict[str, Any]]]:
        """The arguments of ``sets`` calls of ``operation``.

        No two of these calls share memory; they may share memory with the arguments of an earlier operation.
        """
        self._used.clear()
        floats = [
            spec
            for spec in specs((operation.arguments, operation.keywords))
            if spec.dtype.is_floating_point and spec.shape
        ]
        indices = max(min((min(spec.shape) for spec in floats), default=1), 1)
        shared = operation.changes_nothing
        return [
            (
                [self._real(value, indices, shared) for value in operation.arguments],
                {name: self._real(value, indices, shared) for name, value in operation.keywords},
            )
            for _ in range(sets)
        ]

    def free(self) -> None:
        """Free the buffers."""
        self._ones.clear()
        self._used.clear()

    def _real(self, value: Any, indices: int, shared: bool) -> Any:
        if isinstance(value, SameDevice):
            return self._device
        if not isinstance(value, TensorSpec):
            return [self._real(part, indices, shared) for part in value] if isinstance(value, tuple) else value
        numbers = value.dtype == torch.int64
        if shared and not numbers and 0 not in value.stride and (made := self._of_ones(value)) is not None:
            return made
        made = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=self._device)
        if numbers and 0 not in value.stride:
            return made.copy_(torch.arange(made.numel(), device=self._device).remainder_(indices).view(value.shape))
        return made.zero_() if 0 in value.stride or numbers else made.fill_(1)

    def _of_ones(self, spec: TensorSpec) -> torch.Tensor | None:
        """A tensor in the buffer of ones; None if the rest of the buffer is too small."""
        last = sum((size - 1) * step for size, step in zip(spec.shape, spec.stride, strict=True))
        step = ALIGNMENT // spec.dtype.itemsize
        first, numbers = self._used[spec.dtype], (last // step + 1) * step
        if 0 in spec.shape or (first + numbers) * spec.dtype.itemsize > self._size:
            return None
        if spec.dtype not in self._ones:
            self._ones[spec.dtype] = torch.ones(
                self._size // spec.dtype.itemsize, dtype=spec.dtype, device=self._device
            )
        self._used[spec.dtype] = first + numbers
        return self._ones[spec.dtype].as_strided(spec.shape, spec.stride, first)
