"""The parts of a forward pass that a loss does not need: logits without a target, and masks without effect.

With a large vocabulary the logits of a whole batch take most of a step's memory, and much of its time.

The output head gets only the hidden states that predict an answer token (``gathered``). If it is a frozen linear
layer whose output is the model's logits, the product with its weight and the cross-entropy are computed together, a
few rows at a time, and the forward also computes the gradient of the hidden states (``linear_cross_entropy``).

Existing kernels for this are not used. Liger's FusedLinearCrossEntropy and Apple's cut-cross-entropy need Triton, so a
CPU needs another implementation anyway. With ``reduction="none"``, which the slots of a pack need for separate losses,
Liger's gave every token the gradient weight of the first one until the middle of 2026
(github.com/linkedin/Liger-Kernel, issues 338 and 968, pull request 1298). They would save only one chunk of logits,
which is at most ``CHUNK`` numbers here.

With causal attention a token never sees the padding on its right, so no mask is needed and attention can use its
causal kernel (``causal_only``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftsweep.data.batches import Batch

CHUNK = 2**26  # logits in memory at once: 512 rows with a vocabulary of 128 thousand
# Not float16: gradients of single tokens would underflow in it before the loss is scaled.
FORMATS = (torch.float32, torch.bfloat16)


SHORTCUTS = "peftsweep_shortcuts"  # the attribute of a base that holds its shortcuts
CAUSAL_ONLY = "peftsweep_causal_only"  # the name of an attention registered with transformers


@dataclass(frozen=True)
class Shortcuts:
    """The parts that a forward pass for losses may leave out with the same result up to rounding; see probe.py."""

    answers_only: bool = False  # the output head needs only the positions before answer tokens
    bare_head: bool = False  # the head's output is the model's logits: nothing scales, caps or casts it
    no_mask: bool = False  # padding on the right needs no attention mask, as attention is causal


@dataclass
class Gathered:
    """The hidden states of one forward pass that predict an answer token, and whether the head was left out."""

    skipped: bool
    hidden: torch.Tensor | None = None  # [1, batch.answer_tokens, hidden size], once the head was called


def is_linear(head: Any) -> bool:
    """Whether the head is a plain linear layer: not quantised, adapted, parametrised, offloaded or in a pack."""
    return type(head) is nn.Linear and "forward" not in vars(head)


def is_frozen(head: nn.Linear) -> bool:
    """Whether only the hidden states need a gradient, and no hook reads the output of the head."""
    return not any(p.requires_grad for p in head.parameters()) and not head._forward_hooks


@contextmanager
def gathered(head: nn.Linear, batch: Batch, *, skip: bool) -> Iterator[Gathered]:
    """In the block the head computes only the positions before an answer token, for each row of ``batch``.

    With ``skip`` it returns these hidden states unchanged, if ``linear_cross_entropy`` can replace it. The model gives
    the head hidden states [rows, n, hidden size], whose last positions are those of the input: with virtual tokens
    before the input, n is larger.
    """
    found = Gathered(skip)
    kept = batch.input_ids.shape[1] - batch.answer_start + 1  # the position before the first answer token predicts it

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden[:, -kept:-1].flatten(0, 1).index_select(0, batch.places)[None]
        found.skipped = skip and _computed_in(rows, head) in FORMATS
        found.hidden = rows
        return rows if found.skipped else nn.Linear.forward(head, rows)

    vars(head)["forward"] = forward
    try:
        yield found
    finally:
        del vars(head)["forward"]


@contextmanager
def causal_only(config: Any) -> Iterator[None]:
    """In the block the model of this text configuration, whose attention is "sdpa", makes no masks.

    For the attention "sdpa" without a mask, transformers searches the positions for packed sequences, for which the
    host waits for the device in every step. For an attention that it does not know it makes no mask, and then
    ``sdpa_attention_forward`` is causal.
    """
    AttentionInterface.register(CAUSAL_ONLY, sdpa_attention_forward)
    config._attn_implementation = CAUSAL_ONLY
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def linear_cross_entropy(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """``cross_entropy(head(hidden).float(), targets, reduction="none")`` of a frozen head, a few rows at a time.

    Shapes: ``hidden`` [tokens, hidden size], ``targets`` and the result [tokens]; the result is float32. The gradient
    of ``hidden`` is computed in the forward, from (softmax - one-hot) times the weight, and cannot be differentiated
    again.
    """
    dtype = _computed_in(hidden, head)
    bias = None if head.bias is None else head.bias.to(dtype)
    losses: torch.Tensor = cast(Any, _LinearCrossEntropy).apply(hidden.to(dtype), head.weight.to(dtype), bias, targets)
    return losses


def _computed_in(hidden: torch.Tensor, head: nn.Linear) -> torch.dtype:
    """The dtype in which the head computes, with or without autocast."""
    return functional.linear(hidden[..., :0, :], head.weight[:1]).dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        size = max(CHUNK // len(weight), 1)
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), size):
            own = slice(start, start + size)
            right = targets[own, None]
            scores = functional.log_softmax(functional.linear(hidden[own], weight, bias), -1, dtype=torch.float32)
            losses[own] = -scores.gather(1, right)[:, 0]
            if gradient is not None:
                error = scores.exp_()
                error.scatter_(1, right, error.gather(1, right) - 1)
                torch.mm(error.to(weight.dtype), weight, out=gradient[own])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * of_losses[:, None]).to(gradient.dtype), None, None, None
