"""Several LoRA adapters on one frozen base at once: a batch that holds the rows of all of them.

A batch holds its rows once for each slot, slot after slot. The base is multiplied with the rows of all slots at once,
so that quantised weights are unpacked once; each adapter is multiplied with the rows of its slot.

How near the losses of a slot come to those of the trial alone: the last bits of a matrix product depend on the kernel
that the library (on a CPU: MKL) chooses for its shape and layout. On a CPU each adapter therefore has its own product,
in the shapes and layouts of the trial alone: a step takes 0.92 to 1.02 times as long as with one batched product for
all slots, whose ranks must be padded to the largest (benchmarks/packing.py --arithmetic). The base's product has the
rows of all slots. MKL's kernels for AVX2 and AVX-512 were seen to sum up a row in the same order for any number of
rows, so that a slot equals the trial alone to the bit; its compatible kernels (MKL_CBWR=COMPATIBLE) use another order
for few rows. A product of the base for each slot would make a step 2% to 8% longer, and would unpack 4-bit weights for
each slot. Therefore a tolerance is promised: in 32 bits the losses of the first 20 steps are those of the trial alone
within n times 1e-5 relative at step n, as differences add up from step to step; 1e-5 is 170 times the rounding of one
operation (2**-24). The largest seen: 1.2e-5 in step 6 (4 bits, compatible kernels, a CPU with AVX2 only). On CUDA,
where launching a kernel costs more than a small product, the adapters are multiplied in one batch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from peftsweep.data.batches import Batch
from peftsweep.models.parts import beside_products, layers_to_first_adapted
from peftsweep.models.quantised.layers import BITSANDBYTES
from peftsweep.training.fused import with_lora

log = logging.getLogger(__name__)
# The weights and gradients of a layer are strided parts of the slot's row, and only the row must be contiguous.
warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")

Result = TypeVar("Result")
DropoutMask = Callable[[torch.Tensor], torch.Tensor]
SELECTED_SLOT = "peftsweep_slot"  # attribute of a pack's model: the function that returns the selected slot's result


class _Adapters(Protocol):
    """The adapters of one layer; their weights are leaves, whose gradients share memory with PEFT's."""

    leaves: list[torch.Tensor]

    def output(self, base: Callable[..., torch.Tensor], x: torch.Tensor, mask: DropoutMask | None) -> torch.Tensor:
        """The output of ``base`` for ``x`` [slots * rows, ..., in] plus that of each slot's adapter.

        ``mask`` returns the dropout mask, scaled by 1 / (1 - p), for the adapters' rows, [adapters, rows, in].
        """


class _Separate:
    """One product for each adapter, in the shapes and layouts of the trial alone."""

    def __init__(self, layer: Any, names: Sequence[str], pack: Sequence[str], trained: bool) -> None:
        self._slots = len(pack)
        self._adds_in_base_dtype = isinstance(layer.base_layer, BITSANDBYTES)
        self._scales = [layer.scaling[name] for name in names]
        weights = [part[name].weight for name in names for part in (layer.lora_A, layer.lora_B)]
        slots = torch.tensor([pack.index(name) for name in names], device=weights[0].device)
        self._adapted_slots = None if len(names) == len(pack) else slots  # None: all slots have an adapter here
        self.leaves = [weight.detach().requires_grad_() for weight in weights]
        for weight, leaf in zip(weights, self.leaves, strict=True) if trained else ():
            weight.grad = leaf.grad = torch.zeros_like(leaf)

    def output(self, base: Callable[..., torch.Tensor], x: torch.Tensor, mask: DropoutMask | None) -> torch.Tensor:
        """See ``_Adapters``."""
        base_output = base(x)
        output, rows = (tensor.reshape(self._slots, -1, tensor.shape[-1]) for tensor in (base_output, x))
        slots = self._adapted_slots
        rows = (rows if slots is None else rows[slots]).to(self.leaves[0].dtype)
        rows = rows if mask is None else rows * mask(rows)
        parts = zip(rows, self.leaves[::2], self.leaves[1::2], self._scales, strict=True)
        update = torch.stack([functional.linear(functional.linear(own, a), b) * scale for own, a, b, scale in parts])
        if self._adds_in_base_dtype:
            update = update.to(base_output.dtype)  # PEFT does so for these layers; for others it adds in the adapter's
        output = output + update if slots is None else output.to(update.dtype).index_add(0, slots, update)
        return output.reshape(base_output.shape).to(base_output.dtype)


class _Stacked:
    """One batched product for all adapters, in the dtype of the base's output, as ``fused`` has it for a single trial.

    ``a`` [slots, R, in] and ``b`` [slots, R, out] are parts of the pack's ``_Buffers``, and PEFT's weights become
    parts of ``a`` and ``b``; the leaf of ``b`` is transposed to PEFT's layout, [slots, out, R]. R is the largest rank;
    smaller ranks are padded with zeros. For a slot without an adapter in this layer A, B and their gradients are zero.
    Shape of the scale: [slots, 1, 1].
    """

    def __init__(self, layer: Any, names: Sequence[str], buffers: _Buffers) -> None:
        a, b = buffers.parts(layer)
        for slot, name in enumerate(names):
            if name not in layer.lora_A:
                continue
            ranks, down, up = slice(layer.r[name]), layer.lora_A[name].weight, layer.lora_B[name].weight
            for weight, part in ((down, a[slot, ranks]), (up, b[slot, ranks].T)):
                part.copy_(weight.data)
                weight.data = part
            if a.grad is not None and b.grad is not None:
                down.grad, up.grad = a.grad[slot, ranks], b.grad[slot, ranks].T
        transposed = b.mT
        transposed.grad = None if b.grad is None else b.grad.mT
        self.leaves = [a.requires_grad_(), transposed.requires_grad_()]
        scales = [layer.scaling.get(name, 0.0) for name in names]
        self._scale = torch.tensor(scales, device=a.device)[:, None, None]

    def output(self, base: Callable[..., torch.Tensor], x: torch.Tensor, mask: DropoutMask | None) -> torch.Tensor:
        """See ``_Adapters``."""
        a, b = self.leaves
        if mask is None:
            return with_lora(base, x, x, a, b, self._scale)
        rows = x.reshape(len(self._scale), -1, x.shape[-1])
        return with_lora(base, x, rows * mask(rows), a, b, self._scale)


class _Buffers:
    """The weights of all slots and their gradients, each [slots, weights of a slot].

    Every layer has a fixed part of a slot's row. An elementwise optimizer steps the row as one parameter: a step of
    AdamW is then one kernel and clipping two, instead of as many as there are layers.
    """

    def __init__(self, layers: Sequence[Any], names: Sequence[str]) -> None:
        self._parts: dict[Any, tuple[int, int]] = {}  # by layer: its largest rank, the offset of its A in a row
        self._size = 0
        for layer in layers:
            if ranks := [layer.r[name] for name in names if name in layer.lora_A]:
                self._parts[layer] = max(ranks), self._size
                self._size += max(ranks) * (layer.in_features + layer.out_features)
        self.weights = self.gradients = torch.empty(0)

    def allocate(self, slots: int, like: torch.Tensor, trained: bool) -> None:
        """Make the buffers of ``slots`` slots, all zeros, with the dtype and device of ``like``."""
        self.weights = like.new_zeros(slots, self._size)
        self.gradients = torch.zeros_like(self.weights) if trained else like.new_zeros(0)

    def parts(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A [slots, R, in] and B [slots, R, out] of a layer, with their gradients."""
        rank, start = self._parts[layer]
        middle, end = start + rank * layer.in_features, start + rank * (layer.in_features + layer.out_features)
        parts = []
        for begin, stop in ((start, middle), (middle, end)):
            part = self.weights[:, begin:stop].unflatten(1, (rank, -1))
            if len(self.gradients):
                part.grad = self.gradients[:, begin:stop].unflatten(1, (rank, -1))
            parts.append(part)
        a, b = parts
        return a, b

    def part_of(self, row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The part of ``row`` that has the offset and the strides of PEFT's ``weight`` in the row of its slot."""
        return row.as_strided(weight.shape, weight.stride(), weight.storage_offset() % self._size)


@dataclass
class _Bank:
    """The adapters of one layer, and the dropout probability and generator of each."""

    adapters: _Adapters
    dropout: list[tuple[float, torch.Generator]]


def of_slot(work: partial[list[Result]]) -> Result:
    """The result of ``work`` for the selected slot of its model, or for the model itself if it is not in a pack.

    ``work`` is a partial of a function ``f(model, ..., slots)`` that gives the model each row ``slots`` times and
    returns a list with the result of each slot.
    """
    selected_result = getattr(work.args[0], SELECTED_SLOT, None)
    result: Result = work(slots=1)[0] if selected_result is None else selected_result(work)
    return result


def adapter_weights(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters of a LoRA adapter by their names in the model, in their order there."""
    parts = ("lora_A", "lora_B")
    return {
        parameter: weight
        for parameter, weight in model.named_parameters()
        if parameter.rsplit(".", 3)[1] in parts and parameter.rsplit(".", 3)[2] == name
    }


class Pack:
    """The adapters ``names`` of ``model``, used together from here to ``close``; some may ``leave`` before.

    A forward pass then takes a batch made by ``for_all``. ``seed`` is that of every slot's dropout; with None nothing
    is trained, and no memory is allocated for gradients. ``stacked``: the adapters are multiplied in one batched
    product (the default on CUDA), else each in a product of its own.

    Raises:
        ValueError: an adapter has other parameters than A and B of linear layers, such as those of embeddings.
    """

    def __init__(
        self, model: PeftModel, names: Sequence[str], seed: int | None = None, *, stacked: bool | None = None
    ) -> None:
        if beside := beside_products(model, names):
            raise ValueError(f"this model cannot be packed: {beside[0]} is no weight of an A or B of a linear layer")
        self.names = list(names)
        self.model = model
        self._trained = seed is not None
        device = next(model.parameters()).device
        generator_device = "cpu" if device.type == "meta" else device  # the meta device has no generators
        self._generators = {name: torch.Generator(generator_device).manual_seed(seed or 0) for name in names}
        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._banks: dict[Any, _Bank] = {}
        is_stacked = device.type == "cuda" if stacked is None else stacked
        self._buffers = _Buffers(self._layers, names) if is_stacked else None
        self._buffer_rows = dict[str, nn.Parameter]()  # by slot
        self.gradients: list[torch.Tensor] = []  # of all slots
        self._packed = True
        self._rows = 0  # of each slot, in this forward pass; 0: any number
        # Work that was done for all slots at once, with the result of each slot; None where that failed.
        self._results: list[tuple[partial[Any], list[Any] | None]] = []
        self._fill()
        for layer in self._layers:
            vars(layer)["forward"] = partial(self._forward, layer)
        self._patched: list[Any] = [*self._layers]
        self._8bit = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
        if device.type == "cuda":
            self._patched += map(self._split_by_slot, self._8bit)
        self._hooks = self._share_first_layers()

    def for_all(self, batch: Batch) -> Batch:
        """``batch`` [rows, ...] repeated for each slot, slot after slot, [slots * rows, ...]."""
        self._rows = len(batch.input_ids)
        return batch.repeated(len(self.names))

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by their names in the model, in their order there."""
        return adapter_weights(self.model, name)

    def row(self, name: str) -> nn.Parameter | None:
        """All weights of a slot in one row, which stays that slot's when others leave; None where they have none."""
        return self._buffer_rows.get(name)

    def part_of(self, row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The part of ``row``, laid out as ``row(name)``, at the offset that ``weight`` has in the row of its slot.

        Raises:
            RuntimeError: the pack has no buffers.
        """
        if self._buffers is None:
            raise RuntimeError("the weights of this pack have no rows")
        return self._buffers.part_of(row, weight)

    @property
    def drops(self) -> bool:
        """Whether a slot has dropout."""
        return any(p for bank in self._banks.values() for p, _ in bank.dropout)

    def dropout(self, name: str) -> torch.Generator:
        """The generator of an adapter's dropout."""
        return self._generators[name]

    def leave(self, names: Sequence[str]) -> None:
        """Take the adapters ``names`` out of the pack, as plain adapters of PEFT; the others are packed again."""
        self._free()
        self.names = [name for name in self.names if name not in names]
        self._fill()

    def zero_grad(self) -> None:
        """Set the gradients of all slots to zero."""
        if self.gradients:
            torch._foreach_zero_(self.gradients)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """In the block the model has the adapter ``name`` alone, and takes any number of rows."""
        self._packed = False
        self.model.set_adapter(name)
        try:
            yield
        finally:
            self._packed = True

    @contextmanager
    def evaluated_together(self, name: str) -> Iterator[None]:
        """``alone``, for an evaluation that every slot will go through.

        In the block ``of_slot`` does its work for all slots at once, and keeps their results until ``forget``.
        """
        setattr(self.model, SELECTED_SLOT, partial(self._result, self.names.index(name)))
        try:
            with self.alone(name):
                yield
        finally:
            delattr(self.model, SELECTED_SLOT)

    def _result(self, slot: int, work: partial[list[Any]]) -> Any:
        """The result of ``work`` for the slot with this number, from that of all slots where these can go together.

        With 8-bit layers they cannot: in an evaluation the rounding of these depends on all rows of a batch.
        """
        if self._8bit:
            return work(slots=1)[0]
        call = (work.func, work.args, work.keywords)
        kept = [results for done, results in self._results if (done.func, done.args, done.keywords) == call]
        if not kept:
            self._packed, self._rows = True, 0
            try:
                kept = [work(slots=len(self.names))]
            except Exception as error:
                message = "the slots of a pack are evaluated one by one, as evaluating them together raised %s: %s"
                log.warning(message, type(error).__name__, error)
                kept = [None]
            finally:
                self._packed = False
            self._results.append((work, kept[0]))
        return work(slots=1)[0] if kept[0] is None else kept[0][slot]

    def forget(self) -> None:
        """Drop the kept results, because the adapters have changed."""
        self._results.clear()

    def close(self) -> None:
        """Give the model back as PEFT made it: with PEFT's forward passes and weights in memory of their own."""
        self._free()
        for module in self._patched:
            del vars(module)["forward"]
        for hook in self._hooks:
            hook.remove()

    def _fill(self) -> None:
        layers = [layer for layer in self._layers if any(name in layer.lora_A for name in self.names)]
        if self._buffers is not None and layers:
            like = next(iter(layers[0].lora_A.values())).weight
            self._buffers.allocate(len(self.names), like.detach(), self._trained)
        for layer in layers:
            self._banks[layer] = self._bank(layer)
        if self._buffers is None:
            leaves = [leaf for bank in self._banks.values() for leaf in bank.adapters.leaves]
            self.gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        elif self._trained and layers:
            self.gradients = [self._buffers.gradients]
            rows = zip(self.names, self._buffers.weights, self._buffers.gradients, strict=True)
            for name, weights, gradients in rows:
                row = self._buffer_rows.setdefault(name, nn.Parameter(weights))
                row.data, row.grad = weights, gradients

    def _bank(self, layer: Any) -> _Bank:
        adapted = [name for name in self.names if name in layer.lora_A]
        if self._buffers is not None:
            names, adapters = self.names, cast(_Adapters, _Stacked(layer, self.names, self._buffers))
        else:
            names, adapters = adapted, _Separate(layer, adapted, self.names, self._trained)
        probabilities = [getattr(layer.lora_dropout[name], "p", 0.0) if name in adapted else 0.0 for name in names]
        return _Bank(adapters, [(p, self._generators[name]) for p, name in zip(probabilities, names, strict=True)])

    def _free(self) -> None:
        for layer in self._banks:
            for name in self.names:
                for weights in (layer.lora_A, layer.lora_B):
                    if name in weights:
                        weight = weights[name].weight
                        weight.grad, weight.data = None, weight.data.clone(memory_format=torch.contiguous_format)
        self._banks.clear()
        self.gradients = []

    def _forward(self, layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output for the rows of all slots: [slots * rows, ..., out]."""
        if not self._packed:
            output: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return output
        base = partial(layer.base_layer, *args, **kwargs) if args or kwargs else layer.base_layer
        bank = self._banks.get(layer)
        if bank is None:
            base_output: torch.Tensor = base(x)
            return base_output
        slots = len(self.names)
        if x.ndim != 3 or len(x) % slots or self._rows not in (0, len(x) // slots):
            raise ValueError(
                f"this model cannot be packed: an adapted layer got an input of shape {list(x.shape)}, "
                f"not [slots * rows, tokens, features] with the rows of {slots} slots"
            )
        drops = layer.training and any(p for p, _ in bank.dropout)
        return bank.adapters.output(base, x, partial(_dropout_mask, dropout=bank.dropout) if drops else None)

    def _split_by_slot(self, module: Linear8bitLt) -> Linear8bitLt:
        """Make an 8-bit layer on CUDA compute each slot in a call of its own; returns the layer.

        The columns that it treats as outliers, and so its rounding, depend on all rows of a call.
        """

        def forward(x: torch.Tensor) -> torch.Tensor:
            slots = len(self.names) if self._packed and len(x) == len(self.names) * self._rows else 1
            return torch.cat([type(module).forward(module, part) for part in x.chunk(slots)])

        vars(module)["forward"] = forward
        return module

    def _share_first_layers(self) -> list[Any]:
        """Run the layers before the first adapted one on the rows of one slot, as all slots are equal there.

        Returns the handles of the hooks.
        """
        layers = layers_to_first_adapted(self.model)

        def keep_one_slot(_: nn.Module, args: Any, kwargs: Any) -> Any:
            total = len(self.names) * self._rows
            return _map_tensors(
                lambda t: t[: self._rows] if self._packed and len(t) == total > 0 else t, (args, kwargs)
            )

        def repeat_for_all(_: nn.Module, args: Any, kwargs: Any) -> Any:
            slots = len(self.names)
            return _map_tensors(
                lambda t: torch.cat([t] * slots) if self._packed and len(t) == self._rows else t, (args, kwargs)
            )

        hooks = [layer.register_forward_pre_hook(keep_one_slot, with_kwargs=True) for layer in layers[:-1]]
        return [*hooks, *(layer.register_forward_pre_hook(repeat_for_all, with_kwargs=True) for layer in layers[-1:])]


def _dropout_mask(x: torch.Tensor, dropout: Sequence[tuple[float, torch.Generator]]) -> torch.Tensor:
    """The mask of dropout for ``x``, scaled by 1 / (1 - p), [adapters, rows, in]; on a CPU it equals torch's own.

    Every slot draws from its own generator, so that its numbers do not depend on the other slots.
    """
    mask = torch.ones_like(x)
    for slot_mask, (p, generator) in zip(mask, dropout, strict=True):
        if p:
            slot_mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
    return mask


def _map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with ``change`` applied to every tensor in it that has rows (two dimensions or more)."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.ndim > 1 else value
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(change, element) for element in value)
    if isinstance(value, dict):
        return {key: _map_tensors(change, element) for key, element in value.items()}
    return value
