"""The losses of a batch: of answer tokens, of classes, and the terms that method and model add."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.poly import PolyModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peftsweep.data.batches import Batch
from peftsweep.models import shortcuts
from peftsweep.models.parts import ROUTER_LOSS, base_of, text_config, trainable_parameters
from peftsweep.models.shortcuts import SHORTCUTS, Shortcuts

METHOD_INPUTS = "peftsweep_method_inputs"  # the attribute of an adapted model for further arguments of its forward
READS_PADDING = "peftsweep_reads_padding"  # the attribute of a classifier whose logits padding on the right changes
CALL_THE_BASE_ONCE = (BaseTuner.forward, AdaLoraModel.forward, PolyModel.forward)


class Losses(NamedTuple):
    """The losses of one forward of a batch."""

    answers: torch.Tensor  # of every answer token (a classifier: class), float32: [batch.answer_tokens]
    hits: torch.Tensor | None  # of a classifier: the number of rows whose right class is the most likely one
    routers: torch.Tensor | None  # a weighted scalar, in training mode of a mixture of experts that adds it


# ---- using -----------------------------------------------------------------------------------------


def answer_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of every answer token (a classifier: class) of ``batch``, in float32: [batch.answer_tokens]."""
    return forward_losses(model, batch).answers


def forward_losses(model: nn.Module, batch: Batch) -> Losses:
    """The losses of one forward of ``batch``.

    If the output head allows it (shortcuts.py), only the logits of the answer tokens are computed, else those from the
    first answer token of any row on. With virtual tokens before the input the logits are longer; the last positions are
    those of the input. The loss of the routers is a mean over all tokens except padding, so the model needs its mask.
    """
    if batch.labels is not None:
        logits = class_logits(model, batch)
        hits = (logits.argmax(-1) == batch.labels).sum()
        return Losses(nn.functional.cross_entropy(logits, batch.labels, reduction="none"), hits, None)
    base = base_of(model)  # a compiled model may be a function
    balanced = hasattr(base, ROUTER_LOSS) and base.training
    short = allowed_shortcuts(model)
    if balanced:
        short = replace(short, no_mask=False)
    kept = batch.input_ids.shape[1] - batch.answer_start + 1  # the one before the first answer predicts it
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    inputs |= {"attention_mask": None if short.no_mask else batch.attention_mask}
    inputs |= row_inputs(model, batch.input_ids) | ({"output_router_logits": True} if balanced else {})
    unmasked = shortcuts.causal_only(text_config(base)) if short.no_mask else nullcontext()
    if not short.answers_only:
        with unmasked:
            keep = last_positions(kept, batch.input_ids.device)
            output = model(**inputs, logits_to_keep=keep)
        routers = _router_loss(model, output) if balanced else None
        logits = output.logits[:, -kept:-1].flatten(0, 1).index_select(0, batch.places)
        del output  # frees all logits, which the backward does not need
        return Losses(nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none"), None, routers)
    head = base.get_output_embeddings()
    with unmasked, shortcuts.gathered(head, batch, skip=short.bare_head and shortcuts.is_frozen(head)) as found:
        output = model(**inputs, logits_to_keep=kept)
    routers, logits = _router_loss(model, output) if balanced else None, output.logits
    del output
    if not found.skipped:
        return Losses(nn.functional.cross_entropy(logits[0].float(), batch.targets, reduction="none"), None, routers)
    if logits is not found.hidden:
        raise RuntimeError(f"{type(model).__name__} changes the output of its head")
    return Losses(shortcuts.linear_cross_entropy(logits[0], head, batch.targets), None, routers)


def _router_loss(model: nn.Module, output: Any) -> torch.Tensor | None:
    """The routers' load-balancing loss in a model's ``output``, times its weight; None if no layer has routers."""
    found = getattr(output, "aux_loss", None)
    weight: float = getattr(base_of(model), ROUTER_LOSS)
    return found.to(output.logits.device) * weight if isinstance(found, torch.Tensor) else None


def regularised_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a training step of one batch, a scalar, with all terms of method and model."""
    found = forward_losses(model, batch)
    loss = found.answers.sum() / batch.answer_tokens
    for term in (auxiliary_loss(model, batch), found.routers):
        loss = loss if term is None else loss + term
    return loss


def allowed_shortcuts(model: nn.Module) -> Shortcuts:
    """The shortcuts of the model's base (none if it was not probed) that its method and torch.compile allow."""
    found: Shortcuts = getattr(base_of(model), SHORTCUTS, Shortcuts())
    tuner: Any = getattr(model, "base_model", None) if isinstance(model, PeftModel) else None
    if isinstance(tuner, BaseTuner) and type(tuner).forward not in CALL_THE_BASE_ONCE:
        return Shortcuts()  # X-LoRA and Shadow use the logits of a further pass
    if hasattr(model, "_orig_mod"):  # compiled: a changed forward of the head would be compiled again in every step
        return replace(found, answers_only=False)
    prompted = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    head = base_of(model).get_output_embeddings() if found.answers_only else None
    return replace(
        found,
        answers_only=found.answers_only and shortcuts.is_linear(head),
        no_mask=found.no_mask and not prompted,  # prompt learning extends the mask that it gets
    )


def last_positions(count: int, device: torch.device) -> torch.Tensor:
    """The last ``count`` positions for ``logits_to_keep``, so that the head gets a contiguous tensor.

    With a number, transformers slices the hidden states; a product of such a slice in bfloat16 takes 10 to 180 times as
    long on a CPU.
    """
    return torch.arange(-count, 0, device=device)


def class_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The logits of a classifier, in float32: shape [rows, classes].

    Where padding changes what the classifier reads, rows of one length are read together, without padding.
    """
    ids, mask = batch.input_ids, batch.attention_mask
    if not getattr(base_of(model), READS_PADDING, False):
        return _class_logits(model, ids, mask)
    numbers: dict[int, list[int]] = {}  # of the rows of each length
    for number, length in enumerate(mask.sum(1).tolist()):
        numbers.setdefault(length, []).append(number)
    parts = [_class_logits(model, ids[same, :length], mask[same, :length]) for length, same in numbers.items()]
    order = torch.tensor([number for same in numbers.values() for number in same], device=ids.device)
    return torch.cat(parts)[order.argsort()]


def _class_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, **row_inputs(model, ids)).logits
    return logits.float()


def row_inputs(model: nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Further arguments of the method's forward, such as ``task_ids``: one number for each row, shape [rows]."""
    wanted: dict[str, int] = getattr(model, METHOD_INPUTS, {})
    return {name: input_ids.new_full((len(input_ids),), value) for name, value in wanted.items()}


def auxiliary_loss(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """The regularisers that the attached method adds to the loss; None if it has none.

    AdaLoRA keeps its factors orthogonal (PEFT adds the term only to a loss that it computes itself), KaSA and
    MonteCLoRA leave their terms to the caller, Shadow trains its own path on the same labels.
    """
    base: Any = getattr(model, "base_model", None)
    config: Any = next(iter(getattr(model, "peft_config", {}).values()), None)
    terms = []
    for name in ("_get_kasa_loss", "_get_monteclora_loss"):
        if offered := getattr(base, name, None):
            terms.append(offered())
    if weight := getattr(config, "orth_reg_weight", 0):
        factors = [p for name, p in trainable_parameters(model) if "lora_A" in name or "lora_B" in name]
        squares = [p @ p.T if p.shape[0] <= p.shape[1] else p.T @ p for p in factors]
        norms = [torch.linalg.matrix_norm(s - torch.eye(len(s), device=s.device, dtype=s.dtype)) for s in squares]
        terms.append(weight * torch.stack(norms).mean())
    if shadow := getattr(base, "shadow_auxiliary_loss", None):
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        labels[:, 1:] = labels[:, 1:].masked_fill(~batch.answer_mask, -100)
        term = shadow(labels, attention_mask=batch.attention_mask)
        terms.append(0.0 if term is None else config.auxiliary_loss_weight * term)
    tensors = [term for term in terms if isinstance(term, torch.Tensor)]
    return torch.stack(tensors).sum() if tensors else None
