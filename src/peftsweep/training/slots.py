"""Several LoRA adapters on one frozen base at once: a batch that holds the rows of all of them.

The rows of a batch stand once for each slot, slot after slot; the base is multiplied with all of them at once
(quantised weights are unpacked once for all), each adapter with its own.

How near a slot comes to the trial alone. The last bits of a matrix product depend on the kernel that the library (on a
CPU MKL) takes for its shape and layout. On a CPU each adapter is therefore multiplied by itself, in the shapes and
layouts of the trial alone: a step takes 0.92 to 1.02 times as long as with one batched product for all slots, whose
ranks must be filled up to the largest (benchmarks/packing.py --arithmetic). The base's product has the rows of
all slots. MKL's kernels for AVX2 and AVX-512 were seen to sum up a row in the same order however many rows there are,
so that a slot is the trial alone to the bit; its compatible ones (MKL_CBWR=COMPATIBLE) take another order for few rows.
A product for each slot would make a step 2% to 8% longer on an unquantised base, and on a 4-bit one unpack the weights
for each slot. What is promised is therefore a tolerance: in 32 bits the losses of the first 20 steps are those of the
trial alone within 1e-5 relative, which is 170 times the rounding of one operation (2**-24). On CUDA, where starting a
kernel costs more than a small product, adapters are multiplied in one batch.
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
from peftsweep.models.quantised.layers import BITSANDBYTES
from peftsweep.training.fused import with_lora

log = logging.getLogger(__name__)
# Of gradients that lie between those of other layers, as the weights do: the row of a slot is what is to be contiguous.
warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")

Found = TypeVar("Found")
Draw = Callable[[torch.Tensor], torch.Tensor]
SELECTED_SLOT = "peftsweep_slot"  # attribute of a pack's model, by which the slot that is asked is answered


class _Adapters(Protocol):
    """The adapters of one layer: their weights as leaves of the graph, whose gradients are those of PEFT's weights."""

    leaves: list[torch.Tensor]

    def output(self, base: Callable[..., torch.Tensor], x: torch.Tensor, draw: Draw | None) -> torch.Tensor:
        """What ``base`` gives for ``x`` [slots * rows, ..., in], with what they add.

        ``draw`` gives what dropout multiplies their rows with, shape [adapters, rows, in].
        """


class _Separate:
    """Each multiplied by itself, in the shapes and layouts of the trial alone."""

    def __init__(self, layer: Any, names: Sequence[str], pack: Sequence[str], trained: bool) -> None:
        self._slots = len(pack)
        self._base_format = isinstance(layer.base_layer, BITSANDBYTES)
        self._scales = [layer.scaling[name] for name in names]
        weights = [part[name].weight for name in names for part in (layer.lora_A, layer.lora_B)]
        places = torch.tensor([pack.index(name) for name in names], device=weights[0].device)
        self._places = None if len(names) == len(pack) else places
        self.leaves = [weight.detach().requires_grad_() for weight in weights]
        for weight, leaf in zip(weights, self.leaves, strict=True) if trained else ():
            weight.grad = leaf.grad = torch.zeros_like(leaf)

    def output(self, base: Callable[..., torch.Tensor], x: torch.Tensor, draw: Draw | None) -> torch.Tensor:
        """See ``_Adapters``."""
        result = base(x)
        found, own = (one.reshape(self._slots, -1, one.shape[-1]) for one in (result, x))
        own = (own if self._places is None else own[self._places]).to(self.leaves[0].dtype)
        own = own if draw is None else own * draw(own)
        parts = zip(own, self.leaves[::2], self.leaves[1::2], self._scales, strict=True)
        update = torch.stack([functional.linear(functional.linear(rows, a), b) * scale for rows, a, b, scale in parts])
        if self._base_format:
            update = update.to(result.dtype)  # PEFT adds in the base's format there, elsewhere in the adapter's
        places = self._places
        found = found + update if places is None else found.to(update.dtype).index_add(0, places, update)
        return found.reshape(result.shape).to(result.dtype)


class _Stacked:
    """All multiplied in one batch, in the format of the base's output. So does ``fused`` with a trial on CUDA.

    ``a`` [slots, R, in] and ``b`` [slots, R, out] are parts of the pack's ``_Buffers``, and PEFT's weights become
    parts of these; the leaf of ``b`` is turned as PEFT's is, [slots, out, R]. Ranks are filled up with zeros to the
    largest, R, and a slot without an adapter here has nothing but zeros: A and B are zero there, and so are their
    gradients. Shape of the scale: [slots, 1, 1].
    """

    def __init__(self, layer: Any, names: Sequence[str], buffers: _Buffers) -> None:
        a, b = buffers.parts(layer)
        for place, name in enumerate(names):
            if name not in layer.lora_A:
                continue
            own, down, up = slice(layer.r[name]), layer.lora_A[name].weight, layer.lora_B[name].weight
            for weight, part in ((down, a[place, own]), (up, b[place, own].T)):
                part.copy_(weight.data)
                weight.data = part
            if a.grad is not None and b.grad is not None:
                down.grad, up.grad = a.grad[place, own], b.grad[place, own].T
        turned = b.mT
        turned.grad = None if b.grad is None else b.grad.mT
        self.leaves = [a.requires_grad_(), turned.requires_grad_()]
        scales = [layer.scaling.get(name, 0.0) for name in names]
        self._scale = torch.tensor(scales, device=a.device)[:, None, None]

    def output(self, base: Callable[..., torch.Tensor], x: torch.Tensor, draw: Draw | None) -> torch.Tensor:
        """See ``_Adapters``."""
        own = x if draw is None else x.reshape(len(self._scale), -1, x.shape[-1])
        a, b = self.leaves
        return with_lora(base, x, own if draw is None else own * draw(own), a, b, self._scale)


class _Buffers:
    """The weights of all slots, and their gradients, [slots, weights of a slot], in which each layer has its place.

    A slot's row is all that its optimizer has to know where it treats each number alike: a step of AdamW is then one
    kernel, and clipping two, in place of as many as there are layers.
    """

    def __init__(self, layers: Sequence[Any], names: Sequence[str]) -> None:
        self._places: dict[Any, tuple[int, int]] = {}  # of each layer its largest rank, and where its A begins
        self._size = 0
        for layer in layers:
            if ranks := [layer.r[name] for name in names if name in layer.lora_A]:
                self._places[layer] = max(ranks), self._size
                self._size += max(ranks) * (layer.in_features + layer.out_features)
        self.weights = self.gradients = torch.empty(0)

    def make(self, slots: int, like: torch.Tensor, trained: bool) -> None:
        """Those of so many slots, all zeros."""
        self.weights = like.new_zeros(slots, self._size)
        self.gradients = torch.zeros_like(self.weights) if trained else like.new_zeros(0)

    def parts(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A [slots, R, in] and B [slots, R, out] of a layer, and their gradients."""
        rank, start = self._places[layer]
        middle, end = start + rank * layer.in_features, start + rank * (layer.in_features + layer.out_features)
        found = []
        for begin, stop in ((start, middle), (middle, end)):
            part = self.weights[:, begin:stop].unflatten(1, (rank, -1))
            if len(self.gradients):
                part.grad = self.gradients[:, begin:stop].unflatten(1, (rank, -1))
            found.append(part)
        a, b = found
        return a, b

    def part_of(self, row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The part of ``row``, laid out as a slot's, that has the place of that PEFT ``weight`` in its own."""
        return row.as_strided(weight.shape, weight.stride(), weight.storage_offset() % self._size)


@dataclass
class _Bank:
    """The adapters of one layer, and the dropout of each."""

    adapters: _Adapters
    dropout: list[tuple[float, torch.Generator]]


def of_slot(work: partial[list[Found]]) -> Found:
    """What ``work``, a function of a model and further arguments that gives an answer a slot, says of its model.

    ``work`` is told ``slots``, how often it is to repeat the rows that it gives the model; of a model that is
    no pack's, once.
    """
    answer = getattr(work.args[0], SELECTED_SLOT, None)
    found: Found = work(slots=1)[0] if answer is None else answer(work)
    return found


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

    A forward pass then takes a batch made by ``for_all``. ``seed`` is that of every slot's dropout; None: nothing
    is trained, and no memory taken for gradients. ``stacked``: the adapters are multiplied in one batch, as is usual
    on CUDA, else each by itself.
    """

    def __init__(
        self, model: PeftModel, names: Sequence[str], seed: int | None = None, *, stacked: bool | None = None
    ) -> None:
        self.names = list(names)
        self.model = model
        self._trained = seed is not None
        device = next(model.parameters()).device
        on = "cpu" if device.type == "meta" else device
        self._generators = {name: torch.Generator(on).manual_seed(seed or 0) for name in names}
        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._banks: dict[Any, _Bank] = {}
        in_one_batch = device.type == "cuda" if stacked is None else stacked
        self._buffers = _Buffers(self._layers, names) if in_one_batch else None
        self._rows_of = dict[str, nn.Parameter]()  # of the buffers, by slot
        self.gradients: list[torch.Tensor] = []  # of all slots
        self._packed = True
        self._rows = 0  # of each slot, in this forward pass; 0: any number
        self._answers: list[tuple[partial[Any], list[Any] | None]] = []  # of each slot, to what was asked of one
        self._fill()
        for layer in self._layers:
            vars(layer)["forward"] = partial(self._forward, layer)
        self._patched: list[Any] = [*self._layers]
        self._8bit = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
        if device.type == "cuda":
            self._patched += map(self._apart, self._8bit)
        self._hooks = self._share_first_layers()

    def for_all(self, batch: Batch) -> Batch:
        """``batch`` once for each slot, slot after slot, as the model takes it."""
        self._rows = len(batch.input_ids)
        return batch.repeated(len(self.names))

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by their names in the model, in their order there."""
        return adapter_weights(self.model, name)

    def row(self, name: str) -> nn.Parameter | None:
        """All weights of a slot in one row, which stays that slot's when others leave; None where they have none."""
        return self._rows_of.get(name)

    def part_of(self, row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The part of ``row``, laid out as ``row(name)``, that has the place of ``weight``, one of that slot's."""
        if self._buffers is None:
            raise RuntimeError("the weights of this pack have no rows")
        return self._buffers.part_of(row, weight)

    @property
    def drops(self) -> bool:
        """Whether a slot has dropout."""
        return any(p for bank in self._banks.values() for p, _ in bank.dropout)

    def dropout(self, name: str) -> torch.Generator:
        """What an adapter's dropout is drawn from."""
        return self._generators[name]

    def leave(self, names: Sequence[str]) -> None:
        """Let these adapters go, as PEFT had them; the rest is packed anew."""
        self._free()
        self.names = [name for name in self.names if name not in names]
        self._fill()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        if self.gradients:
            torch._foreach_zero_(self.gradients)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """In the block the model is that of one adapter, and takes any number of rows."""
        self._packed = False
        self.model.set_adapter(name)
        try:
            yield
        finally:
            self._packed = True

    @contextmanager
    def asked(self, name: str) -> Iterator[None]:
        """``alone``, for what all slots will be asked: ``of_slot`` answers it for all at once, until ``forget``."""
        setattr(self.model, SELECTED_SLOT, partial(self._answer, self.names.index(name)))
        try:
            with self.alone(name):
                yield
        finally:
            delattr(self.model, SELECTED_SLOT)

    def _answer(self, place: int, work: partial[list[Any]]) -> Any:
        """The answer of the slot in that place, and of it alone where they cannot be asked together.

        Slots on 8-bit layers cannot: in an evaluation these round by all the rows that they are given at once.
        """
        if self._8bit:
            return work(slots=1)[0]
        question = (work.func, work.args, work.keywords)
        known = [answers for one, answers in self._answers if (one.func, one.args, one.keywords) == question]
        if not known:
            self._packed, self._rows = True, 0
            try:
                known = [work(slots=len(self.names))]
            except Exception as error:
                log.warning("slots are asked one by one, as together there is a %s: %s", type(error).__name__, error)
                known = [None]
            finally:
                self._packed = False
            self._answers.append((work, known[0]))
        return work(slots=1)[0] if known[0] is None else known[0][place]

    def forget(self) -> None:
        """The adapters have changed: what was asked before is to be answered anew."""
        self._answers.clear()

    def close(self) -> None:
        """Make the model again what PEFT made it."""
        self._free()
        for module in self._patched:
            del vars(module)["forward"]
        for hook in self._hooks:
            hook.remove()

    def _fill(self) -> None:
        layers = [layer for layer in self._layers if any(name in layer.lora_A for name in self.names)]
        if self._buffers is not None and layers:
            like = next(iter(layers[0].lora_A.values())).weight
            self._buffers.make(len(self.names), like.detach(), self._trained)
        for layer in layers:
            self._banks[layer] = self._bank(layer)
        if self._buffers is None:
            leaves = [leaf for bank in self._banks.values() for leaf in bank.adapters.leaves]
            self.gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        elif self._trained and layers:
            self.gradients = [self._buffers.gradients]
            rows = zip(self.names, self._buffers.weights, self._buffers.gradients, strict=True)
            for name, weights, gradients in rows:
                row = self._rows_of.setdefault(name, nn.Parameter(weights))
                row.data, row.grad = weights, gradients

    def _bank(self, layer: Any) -> _Bank:
        having = [name for name in self.names if name in layer.lora_A]
        if self._buffers is not None:
            names, adapters = self.names, cast(_Adapters, _Stacked(layer, self.names, self._buffers))
        else:
            names, adapters = having, _Separate(layer, having, self.names, self._trained)
        chances = [getattr(layer.lora_dropout[name], "p", 0.0) if name in having else 0.0 for name in names]
        return _Bank(adapters, [(p, self._generators[name]) for p, name in zip(chances, names, strict=True)])

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
            found: torch.Tensor = base(x)
            return found
        slots = len(self.names)
        if x.ndim != 3 or len(x) % slots or self._rows not in (0, len(x) // slots):
            raise ValueError(f"a layer that is given {list(x.shape)} in place of all rows cannot be packed")
        drops = layer.training and any(p for p, _ in bank.dropout)
        return bank.adapters.output(base, x, partial(_noise, dropout=bank.dropout) if drops else None)

    def _apart(self, module: Linear8bitLt) -> Linear8bitLt:
        """Have an 8-bit layer of CUDA look at each slot by itself.

        Which columns it takes for outliers, and so how it rounds, depends on all rows that it is given at once.
        """

        def forward(x: torch.Tensor) -> torch.Tensor:
            slots = len(self.names) if self._packed and len(x) == len(self.names) * self._rows else 1
            return torch.cat([Linear8bitLt.forward(module, part) for part in x.chunk(slots)])

        vars(module)["forward"] = forward
        return module

    def _share_first_layers(self) -> list[Any]:
        """Have the layers before the first adapted one see the rows once, as all slots are the same there."""
        before = _before_the_adapters(self.model)

        def once(_: nn.Module, args: Any, kwargs: Any) -> Any:
            every = len(self.names) * self._rows
            return _each(lambda t: t[: self._rows] if self._packed and len(t) == every > 0 else t, (args, kwargs))

        def for_all(_: nn.Module, args: Any, kwargs: Any) -> Any:
            slots = len(self.names)
            return _each(
                lambda t: torch.cat([t] * slots) if self._packed and len(t) == self._rows else t, (args, kwargs)
            )

        hooks = [layer.register_forward_pre_hook(once, with_kwargs=True) for layer in before[:-1]]
        return [*hooks, *(layer.register_forward_pre_hook(for_all, with_kwargs=True) for layer in before[-1:])]


def _noise(x: torch.Tensor, dropout: Sequence[tuple[float, torch.Generator]]) -> torch.Tensor:
    """What dropout multiplies ``x`` with, [adapters, rows, in]: on a CPU each slot's numbers are those of torch's own.

    Every slot draws from its own generator, so that its numbers do not depend on the other slots.
    """
    noise = torch.ones_like(x)
    for mine, (p, generator) in zip(noise, dropout, strict=True):
        if p:
            mine.bernoulli_(1 - p, generator=generator).div_(1 - p)
    return noise


def _before_the_adapters(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's stack up to and with the first adapted one; none if there is nothing to share."""
    adapted = {module for module in model.modules() if isinstance(module, LoraLayer)}
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and adapted <= set(stack.modules()):
            first = next(n for n, layer in enumerate(stack) if adapted & set(layer.modules()))
            return list(stack)[: first + 1] if first else []
    return []


def _each(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with every tensor in it that has rows changed."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.ndim > 1 else value
    if isinstance(value, tuple | list):
        return type(value)(_each(change, one) for one in value)
    if isinstance(value, dict):
        return {key: _each(change, one) for key, one in value.items()}
    return value
