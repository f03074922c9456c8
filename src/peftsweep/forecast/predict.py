"""Predict the memory of a training step, without weights, data or device.

The step itself is run on the meta device: every operation is called but computes nothing, and an allocator that only
counts adds up the bytes of live tensors. So each method of PEFT, each optimizer, gradient checkpointing and autocast
are counted as they are, without a formula for each architecture. ``Kernels`` replaces operations whose kernels on the
device use other memory than those of the meta device.

    adapted = attach(skeleton(config.model, quantization), ...)
    predict(adapted, config.train, shapes(rows, config.train, seed), "cuda").peak_bytes
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peftsweep.data.batches import Batch, batch_order, micro_batches
from peftsweep.data.tokens import Tokens
from peftsweep.forecast.allocator import BLOCK, META, Allocator, Kernels, as_on_device
from peftsweep.models.losses import regularised_loss
from peftsweep.models.model import skeleton as bare_skeleton
from peftsweep.models.model import spare
from peftsweep.models.parts import base_of, classifies, head_names, text_config, trainable_parameters
from peftsweep.models.probe import known_shortcuts
from peftsweep.models.quantised import layers, libraries
from peftsweep.models.shortcuts import SHORTCUTS
from peftsweep.schema import Config, ModelConfig, TrainConfig
from peftsweep.training import length as training_length
from peftsweep.training import optimizer as training_optimizer
from peftsweep.training.capture import captures, unfit
from peftsweep.training.fused import as_trained
from peftsweep.training.packed import optimized
from peftsweep.training.slots import Pack

# cuBLAS gets a workspace for each thread that calls it, here the forward's and autograd's, and each stream; torch's
# allocator counts them. From compute capability 9.0 on each has 32 MiB, before it 8 (in ATen's CublasHandlePool.cpp).
# Which GPU it will be is not known here, so the larger is assumed. Measured on an H100: 64 MiB; captured, 132.
WORKSPACES = {"cuda": 2 * 32 * 2**20}

Found = TypeVar("Found")


@dataclass(frozen=True)
class Shape:
    """The shape of a micro-batch."""

    rows: int
    length: int  # tokens of its longest row
    answer_length: int  # positions from the first answer token of any row to the end of the longest row
    answer_tokens: int  # of all rows together

    @property
    def tokens(self) -> int:
        """Tokens, with padding."""
        return self.rows * self.length


def shapes(rows: Sequence[Tokens], config: TrainConfig, seed: int) -> list[Shape]:
    """The different shapes of the micro-batches of a run on ``rows``, sorted by length."""
    order = batch_order([len(row.ids) for row in rows], training_length.rows_per_step(config), seed)
    steps = islice(micro_batches(order, config.batch_size), training_length.total_steps(config, len(rows)))
    distinct = set()
    for numbers in chain.from_iterable(steps):
        batch = [rows[n] for n in numbers]
        length = math.ceil(max(len(row.ids) for row in batch) / config.pad_to_multiple_of) * config.pad_to_multiple_of
        answers = length - max(min(row.answer_start for row in batch), 1)
        distinct.add(Shape(len(batch), length, answers, sum(row.answer_tokens for row in batch)))
    return sorted(distinct, key=lambda shape: (shape.length, shape.rows, shape.answer_length))


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes on the training device. The first six are sums of tensors; the peaks include temporary tensors.

    The forward ends with ``weights + adapter + optimizer + activations + logits`` (and, in a second micro-batch,
    gradients). The backward frees the activations while it makes the gradients. The optimizer's step has
    ``weights + adapter + gradient + optimizer`` and its temporary tensors.
    """

    weights_bytes: int  # of the base, as it is stored, with its buffers
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int  # kept from the forward for the backward, without ``logits_bytes``
    logits_bytes: int  # kept by the head and the loss
    forward_peak: int
    backward_peak: int
    step_peak: int
    workspace_bytes: int = 0  # of cuBLAS, included in no peak

    @property
    def peak_bytes(self) -> int:
        """The peak of a step after the first one, in bytes."""
        return max(self.forward_peak, self.backward_peak, self.step_peak) + self.workspace_bytes

    def facts(self) -> dict[str, int]:
        """All values by name, in bytes, for a trial's record."""
        return dataclasses.asdict(self) | {"peak_bytes": self.peak_bytes}


# ---- the base as it is stored ----------------------------------------------------------------------


def skeleton(model: ModelConfig, quantization: Any, where: str = "meta", classes: int = 0) -> PreTrainedModel:
    """``model.skeleton`` with its layers as ``quantization`` stores them.

    ``quantization`` is a transformers quantization config, or None. transformers' own rules choose the layers that are
    not quantised, so that a method attaches as it does to the loaded base.

    Raises:
        ValueError: the memory of this quantisation library is unknown, as it was never measured.
    """
    base = bare_skeleton(model, where, classes)
    if model.attn_implementation is not None:
        base.set_attn_implementation(model.attn_implementation)
    if quantization is None:
        return base
    if not libraries.is_tried(quantization):
        raise ValueError(f"{quantization} was not tried")
    spare(quantization, base)
    layers.quantise_skeleton(base, quantization)
    return base


# ---- the step --------------------------------------------------------------------------------------


def predict(
    adapted: Any,
    config: TrainConfig,
    shapes: Sequence[Shape],
    device: str,
    slots: Mapping[str, TrainConfig] | None = None,
) -> Prediction:
    """The memory of the largest training step of ``adapted`` on a ``device`` ("cuda", "cpu").

    ``adapted`` is the result of ``skeleton`` with its method attached; it is changed, and must not be used afterwards.
    ``shapes`` are those of the micro-batches. With ``slots``, configurations by adapter, these are trained as a pack.

    Raises:
        Exception: the method cannot run on the meta device; the error is its own.
    """
    to_meta(adapted)
    text = text_config(adapted)
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0
    if not classifies(adapted):
        with as_on_device(device, config.autocast), Allocator(1, 0), Kernels(device, config.autocast).forward():
            setattr(base_of(adapted), SHORTCUTS, known_shortcuts(base_of(adapted)))
    training_optimizer.enable_checkpointing(adapted, config.checkpointing)
    adapted.train()
    longest = max(shapes, key=lambda shape: (shape.tokens, shape.answer_length))
    first = _trace(adapted, config, longest, device, slots)
    # A shorter batch with more answer tokens may need more memory: estimate it from the bytes of a token and of an
    # answer token at the head.
    token_bytes = first.activation_bytes / longest.tokens
    kept = first.weights_bytes + first.adapter_bytes + first.optimizer_bytes + first.activation_bytes
    at_head = max(2 * first.logits_bytes, first.forward_peak - kept)  # logits that are kept have a gradient later
    answer_bytes = at_head / max(longest.answer_tokens, 1)
    heavier = max(shapes, key=lambda shape: shape.tokens * token_bytes + shape.answer_tokens * answer_bytes)
    if heavier == longest:
        return first
    return max(first, _trace(adapted, config, heavier, device, slots), key=lambda prediction: prediction.peak_bytes)


def _trace(
    adapted: Any, config: TrainConfig, shape: Shape, device: str, slots: Mapping[str, TrainConfig] | None
) -> Prediction:
    batch = meta_batch(adapted, shape)
    if slots is None:
        with as_trained(adapted, config, device):
            return _traced(adapted, config, batch, device, [training_optimizer.make_optimizer(adapted, config)], None)
    pack = Pack(adapted, [*slots], seed=0, stacked=device == "cuda")
    try:
        optimizers = [
            training_optimizer.make_optimizer(nn.Module(), slot, optimized(pack, name, slot))
            for name, slot in slots.items()
        ]
        with as_trained(adapted, config, device):
            return _traced(adapted, config, pack.for_all(batch), device, optimizers, pack)
    finally:
        pack.close()


def _traced(
    adapted: nn.Module,
    config: TrainConfig,
    batch: Batch,
    device: str,
    optimizers: Sequence[torch.optim.Optimizer],
    pack: Pack | None,
) -> Prediction:
    allocator = Allocator(BLOCK.get(device, 1), batch.answer_tokens)
    kernels = Kernels(device, config.autocast)
    captured = captures(config, torch.device(device)) and unfit(adapted, config) is None  # then gradients are kept
    tensors = [(_is_adapter(name, adapted), tensor) for name, tensor in _named_tensors(adapted)]
    weights = allocator.hold(tensor for own, tensor in tensors if not own)
    adapter = allocator.hold(tensor for own, tensor in tensors if own)
    allocator.hold(pack.gradients if pack else [])  # a pack allocates its gradients at the start
    forward = backward = kept = logits = 0
    with as_on_device(device, config.autocast), allocator:
        for _ in range(
            2 if captured else min(2, config.accumulation)
        ):  # the second pass has the gradients of the first
            before = allocator.mark()
            with kernels.forward(), _at_head(adapted, allocator.alive) as at_head:
                loss = regularised_loss(adapted, batch)
            held = allocator.still_alive(at_head[-1])  # without the prompts' hidden states: the head frees them
            kept, logits = held - before, allocator.live - held
            forward = max(forward, allocator.peak)
            allocator.mark()
            allocator.in_backward = True
            kernels.backward(loss)
            allocator.in_backward = False
            del loss
            backward = max(backward, allocator.peak)
        alone = [p.grad for _, p in trainable_parameters(adapted) if p.grad is not None]
        before, gradients = allocator.mark(), pack.gradients if pack else alone
        step = max(_step(optimizer, allocator, device) for optimizer in optimizers)
        states = allocator.live - before
    adapted.zero_grad(set_to_none=True)
    return Prediction(
        weights_bytes=weights,
        adapter_bytes=adapter,
        gradient_bytes=allocator.measure(gradients),
        optimizer_bytes=states,
        activation_bytes=kept,
        logits_bytes=logits,
        forward_peak=forward + states,
        backward_peak=backward + states,
        step_peak=step,
        workspace_bytes=WORKSPACES.get(device, 0) * (2 if captured else 1),
    )


def to_meta(adapted: nn.Module) -> None:
    """Move to the meta device all tensors of ``adapted`` that attaching has made on another device."""
    moved: dict[int, Any] = {}  # tied weights stay tied
    for module in adapted.modules():
        vars(module).get("_lora_kasa_truncation_deferred", set()).clear()  # KaSA's truncation needs numbers
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device != META:
                    tensors[name] = moved.setdefault(id(tensor), _shape_of(tensor))


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, nn.Parameter):  # bitsandbytes' parameters also move their statistics
        return tensor.to(META)
    bare = tensor.detach().to(META)
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of ``model`` as plain tensors, with those that bitsandbytes keeps in addition to its weights."""
    yield from model.named_buffers()
    for name, parameter in model.named_parameters():
        yield from ((name, part) for part in layers.kept_tensors(parameter))


def _is_adapter(name: str, model: nn.Module) -> bool:
    """Whether PEFT has made the tensor: its name then holds that of the adapter."""
    return isinstance(model, PeftModel) and not set(model.peft_config).isdisjoint(name.split("."))


def meta_batch(adapted: nn.Module, shape: Shape) -> Batch:
    """A batch of ``shape`` on the meta device, which has no storage."""
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64, device=META)
    classifier = classifies(adapted)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        answer_mask=torch.zeros(shape.rows, shape.length - 1, dtype=torch.bool, device=META),
        places=ids.new_empty(shape.answer_tokens),
        tokens=ids.numel(),
        answer_tokens=shape.rows if classifier else shape.answer_tokens,
        answer_start=shape.length - shape.answer_length,
        labels=ids[:, 0] if classifier else None,
    )


@contextmanager
def _at_head(adapted: Any, note: Callable[[], Found]) -> Iterator[list[Found]]:
    """Yields a list that gets the result of ``note()`` before each call of the head over vocabulary or classes."""
    base: Any = adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted
    heads = [base.get_submodule(name) for name in head_names(base)] or [base.get_output_embeddings()]
    results: list[Found] = []
    hook = heads[-1].register_forward_pre_hook(lambda *_: results.append(note()))
    try:
        yield results
    finally:
        hook.remove()


def smaller(config: Config, stage: str) -> str:
    """The keys that would make the trial smaller, of those that are not set already."""
    train, keys = config.train, []
    if stage == "train" and train.batch_size > 1:
        keys.append(f"train.batch_size={train.batch_size // 2} train.accumulation={2 * train.accumulation}")
    if stage == "train" and not train.checkpointing:
        keys.append("train.checkpointing=true")
    if not config.quant:
        keys.append("quant=4bit")
    return "try " + ", ".join([*keys, ("or " if keys else "") + "a smaller dataset.max_length or model"])


# ---- the optimizer ---------------------------------------------------------------------------------


def _step(optimizer: torch.optim.Optimizer, allocator: Allocator, device: str) -> int:
    """Take the first step of ``optimizer``, which makes its state; returns the peak of the step in bytes."""
    fused = "fused" in inspect.signature(type(optimizer)).parameters  # training uses it on a real device, too
    if hasattr(optimizer, "init_state"):
        _init_states(optimizer, device)
        return allocator.live  # the kernels of bitsandbytes make no temporary tensors
    for group in optimizer.param_groups:
        if device == "cuda" and "foreach" in group and not fused:
            group["foreach"] = True  # torch's default there: all parameters at once
    optimizer.step()
    return allocator.live if fused else allocator.peak


def _init_states(optimizer: Any, device: str) -> None:
    import bitsandbytes

    optimizer.is_paged = optimizer.is_paged and device == "cuda"
    # Paged states are in memory that the device shares with the host, outside of torch's allocator.
    with patch.multiple(bitsandbytes.functional, get_paged=lambda *_, **__: torch.empty(0), fill=lambda *_: None):
        for n, group in enumerate(optimizer.param_groups):
            for m, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    optimizer.init_state(group, parameter, n, m)
