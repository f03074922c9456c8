"""Count the memory that a training step allocates, on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from peftsweep.forecast import operations
from peftsweep.forecast.operations import Ledger
from peftsweep.schema import Dtype

META = torch.device("meta")
# Every block of CUDA's caching allocator is a multiple of this (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize).
BLOCK = {"cuda": 512}
MASK_ALIGNMENT = 16  # the memory-efficient attention pads the rows of a mask to a multiple of this

aten = torch.ops.aten
Storage = weakref.ref[Any]  # the memory of a tensor, or of several


# ---- the allocator ---------------------------------------------------------------------------------


class Allocator(TorchDispatchMode):
    """Tracks the storages that operations allocate and free, and computes nothing.

    ``live`` and ``peak`` are bytes, in whole blocks. Results that depend on numbers are those of a padded batch: a
    boolean mask selects ``answers`` positions, ``all`` is False, and experts have equal shares of the tokens. With a
    ``ledger`` every operation is also counted.
    """

    def __init__(self, block: int, answers: int, ledger: Ledger | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._ledger = ledger
        self._block = block
        self._answers = answers
        self._known: dict[int, Storage] = {}
        self._parts = 0  # of the tokens, one for each expert, where a model goes through its experts
        self.in_backward = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Avoid the guard that keeps torch.compile out of each call, as nothing is compiled here."""
        return False

    def hold(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count tensors that exist already; returns their bytes."""
        before = self.live
        for tensor in tensors:
            self._note(tensor)
        return self.live - before

    def mark(self) -> int:
        """Start a new peak; returns the live bytes."""
        self.peak = self.live
        return self.live

    def alive(self) -> list[Storage]:
        """All memory that is held now."""
        return list(self._known.values())

    def still_alive(self, memory: Iterable[Storage]) -> int:
        """The bytes of ``memory`` that have not been freed."""
        return sum(self._size(storage) for one in memory if (storage := one()) is not None)

    def measure(self, tensors: Iterable[torch.Tensor]) -> int:
        """The bytes of ``tensors``."""
        return sum(self._size(tensor.untyped_storage()) for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a weight of torchao first translates the call to operations on plain tensors
        if func is aten.add.Tensor and self._accumulates(*args):
            func = aten.add_.Tensor
        kwargs = kwargs or {}
        result = self._without_numbers(func, args, kwargs)
        if result is not None:
            operation = operations.operation(func, args, kwargs, result)
        else:
            result, operation = operations.run(func, args, kwargs)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        self.peak = max(self.peak, self.live)
        if self._ledger is not None:
            self._ledger.note(operation)
        return result

    def _accumulates(self, gradient: Any, more: Any) -> bool:
        """Whether this adds up gradients, which autograd does in place without a dispatch mode (input_buffer.cpp).

        Not into a view, such as the gradient of a layer's input in rows of tokens: it holds the tensor that it views.
        """
        if not isinstance(gradient, torch.Tensor):
            return False  # a number, as where a loss is weighed
        whole = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()
        alike = isinstance(more, torch.Tensor) and gradient.shape == more.shape  # ``more`` may be a number
        return self.in_backward and not torch.is_grad_enabled() and whole and alike and not gradient._is_view()

    def _without_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation whose shape depends on numbers, so that the meta device lacks it; else None."""
        if func is aten._local_scalar_dense.default and args[0].device == META:
            return 0
        if func is aten.index_put.default:
            func = aten.index_put_.default  # as autograd does without a dispatch mode (FunctionsManual.cpp)
        if func is aten.nonzero.default:
            return args[0].new_empty((self._chosen(args[0]), args[0].dim()), dtype=torch.int64)
        if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            places = [place for index in args[1] for place in self._positions(index)]
            return func(args[0], places, *args[2:], **kwargs)
        return None

    def _chosen(self, condition: torch.Tensor) -> int:
        """How many entries of ``condition`` are true, where the numbers that would say so are missing.

        All of a vector's: a mixture of experts asks so which experts have a token, and then for each of them, by a
        matrix [chosen experts of a token, tokens], which tokens it has. All experts together have all entries of it.
        """
        if condition.dim() == 1:
            self._parts = max(condition.numel(), 1)
            return condition.numel()
        return max(condition.numel() // self._parts, 1) if self._parts else self._answers

    def _positions(self, index: torch.Tensor | None) -> list[torch.Tensor | None]:
        if index is None or index.dtype != torch.bool:
            return [index]
        return [index.new_empty(self._answers, dtype=torch.int64) for _ in index.shape]

    def _note(self, tensor: torch.Tensor) -> None:
        if tensor.device != META or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known() is storage:
            return
        size = self._size(storage)
        self.live += size
        self._known[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._block) * self._block


# ---- kernels that differ from those of the meta device ---------------------------------------------

# Autocast's lists (docs.pytorch.org/docs/stable/amp.html, "Autocast Op Reference") as far as models use them.
LOWERED = {
    *("linear", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "addmm", "baddbmm", "addbmm", "einsum"),
    *("conv1d", "conv2d", "conv3d", "prelu", "scaled_dot_product_attention"),
}
RAISED = {
    *("softmax", "log_softmax", "layer_norm", "group_norm", "norm", "cross_entropy", "nll_loss", "mse_loss"),
    *("pow", "__pow__", "rsqrt", "exp", "log", "sum", "prod", "cumsum", "cumprod", "softplus", "cosine_similarity"),
}


class Kernels(TorchFunctionMode):
    """Replaces kernels of the meta device with those of ``device``, and casts as autocast does on ``device``.

    Raises:
        NotImplementedError: the memory of a product with this type of quantised weight was never measured.
    """

    def __init__(self, device: str, autocast: Dtype | None) -> None:
        super().__init__()
        self._cuda = device == "cuda"
        self._dtype = getattr(torch, autocast.value) if autocast else None
        self._casts: dict[torch.Tensor, torch.Tensor] | None = None  # of the weights that are trained

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        for kind in types:
            if hasattr(kind, "__tensor_flatten__"):
                self._check(kind)
        if self._dtype is not None and torch.is_grad_enabled():  # autocast is off in a backward written in python
            if name in LOWERED:
                args, kwargs = tree_map_only(torch.Tensor, self._lowered, (args, kwargs))
            elif name in RAISED and self._cuda:
                args, kwargs = tree_map_only(torch.Tensor, _raised, (args, kwargs))
        if name == "scaled_dot_product_attention":
            return self._attention(func, *args, **kwargs)
        if name == "dropout" and self._cuda:
            return _dropout(*args, **kwargs)
        if name in ("grouped_mm", "_grouped_mm"):
            return _grouped(*args, **kwargs)
        return func(*args, **kwargs)

    def _check(self, kind: type) -> None:
        """Refuse a tensor subclass under autocast, and on CUDA those of quanto: only its library knows the memory."""
        if self._dtype is not None or (self._cuda and kind.__module__.startswith("optimum.quanto")):
            raise NotImplementedError(f"the memory of products with {kind.__name__} is not known here")

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The block of the forward: autocast keeps its casts of trained weights until the end of the block."""
        self._casts = {}
        with self:
            yield
        self._casts = None

    def backward(self, loss: torch.Tensor) -> None:
        """The backward of ``loss`` with these kernels, which checkpointed layers need to compute again.

        ``loss.backward()`` would suspend this mode; the function here is the one that it calls in the end.
        """
        run: Any = torch.autograd.Variable._execution_engine.run_backward
        with self:
            run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)

    def _lowered(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if self._casts is None or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self._dtype)
        if tensor not in self._casts:
            self._casts[tensor] = tensor.to(self._dtype)
        return self._casts[tensor]

    def _attention(
        self,
        func: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Fused attention, whose backward needs one number a row instead of the matrix of attention weights.

        CUDA uses the memory-efficient kernel for masks, for 32 bits and for values of another width than the queries,
        and flash attention otherwise. The CPU has a kernel of its own, without dropout, for values of the same width.
        """
        bias = _bias(attn_mask, query, MASK_ALIGNMENT if self._cuda else 1)
        repeat = query.shape[1] // key.shape[1]
        as_wide = query.shape[-1] == value.shape[-1]
        if self._cuda and (bias is not None or query.dtype == torch.float32 or not as_wide):
            if bias is not None:
                bias = bias.expand(*query.shape[:3], key.shape[2])
            if enable_gqa and repeat > 1:
                key, value = (tensor.repeat_interleave(repeat, 1) for tensor in (key, value))
            log_sums = torch.is_grad_enabled() and query.requires_grad
            arguments = (query, key, value, bias, log_sums, dropout_p, is_causal)
            result = aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)
        elif self._cuda:
            result = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        elif dropout_p == 0 and as_wide:
            options = {"attn_mask": bias, "scale": scale}
            result = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, **options)
        else:
            options = {"scale": scale, "enable_gqa": enable_gqa}
            return func(query, key, value, attn_mask, dropout_p, is_causal, **options)
        return result[0]


def _bias(mask: torch.Tensor | None, query: torch.Tensor, alignment: int) -> torch.Tensor | None:
    """The mask as the numbers that attention adds to its scores, with rows padded to the alignment."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if mask is not None and (odd := mask.shape[-1] % alignment):
        mask = nn.functional.pad(mask, (0, alignment - odd))[..., : -(alignment - odd)]
    return mask


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout of CUDA, which keeps a mask of one byte a number."""
    return torch.native_dropout(input, p, training)[0] if training and 0 < p < 1 else input


def _grouped(input: torch.Tensor, weight: torch.Tensor, **_: Any) -> torch.Tensor:
    """The product of each token with its expert's weight: [tokens, in] and [experts, in, out] give [tokens, out].

    The number of tokens of each expert depends on numbers; with all tokens at the first expert the memory is the same.
    The meta device has this operation in bfloat16 only.
    """
    return input @ weight[0]


def _raised(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@contextmanager
def as_on_device(device: str, autocast: Dtype | None) -> Iterator[None]:
    """In the block PEFT and bitsandbytes, which query the device to choose a kernel, behave as on ``device``."""
    from bitsandbytes.autograd import _functions

    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, autocast is not None)
    try:
        with patch.object(_functions, "MatMul8bitLt", _functions.MatMul8bitFp) if device == "cpu" else nullcontext():
            yield
    finally:
        torch.set_autocast_enabled(device, before)
