"""The losses of a batch: of answer tokens, of classes, and what a model adds to them."""

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

METHOD_INPUTS = "peftsweep_method_inputs"  # the attribute of an adapted model that holds them
READS_PADDING = "peftsweep_reads_padding"  # the attribute of a classifier whose logits padding on the right changes
CALL_THE_BASE_ONCE = (BaseTuner.forward, AdaLoraModel.forward, PolyModel.forward)


class Losses(NamedTuple):
    """What a forward of a batch gives to train on."""

    answers: torch.Tensor  # of every answer token (a classifier: class), float32: [batch.answer_tokens]
    hits: torch.Tensor | None  # of a classifier: the number of rows of which the right class is the likeliest
    routers: torch.Tensor | None  # in training mode, of a mixture of experts that adds it: a scalar, weighted


# ---- using -----------------------------------------------------------------------------------------


def answer_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy of every answer token (a classifier: class) of ``batch``, in float32: [batch.answer_tokens]."""
    return forward_losses(model, batch).answers


def forward_losses(model: nn.Module, batch: Batch) -> Losses:
    """The losses of one forward of ``batch``.

    Logits of the answer tokens alone are computed where the output head allows it (shortcuts.py), else those from
    the first answer token of any row on. Methods that put virtual tokens before the input return longer logits; the
    last positions are those of the input. The loss of the routers is a mean over all tokens but padding, so that the
    model gets its mask.
    """
    if batch.labels is not None:
        logits = class_logits(model, batch)
        hits = (logits.argmax(-1) == batch.labels).sum()
        return Losses(nn.functional.cross_entropy(logits, batch.labels, reduction="none"), hits, None)
    base = base_of(model)  # of a compiled model too, which may be a function
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
        del output  # all logits, which the backward needs no more
        return Losses(nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none"), None, routers)
    head = base.get_output_embeddings()
    with unmasked, shortcuts.gathered(head, batch, skip=short.bare_head and shortcuts.is_frozen(head)) as found:
        output = model(**inputs, logits_to_keep=kept)
    routers, logits = _router_loss(model, output) if balanced else None, output.logits
    del output
    if not found.skipped:
        return Losses(nn.functional.cross_entropy(logits[0].float(), batch.targets, reduction="none"), None, routers)
    if logits is not found.hidden:
        raise RuntimeError(f"{type(model).__name__} changes what its output head returns")
    return Losses(shortcuts.linear_cross_entropy(logits[0], head, batch.targets), None, routers)


def _router_loss(model: nn.Module, output: Any) -> torch.Tensor | None:
    """The routers' load-balancing loss in a model's ``output``, times its weight; None where no layer has routers."""
    found = getattr(output, "aux_loss", None)
    weight: float = getattr(base_of(model), ROUTER_LOSS)
    return found.to(output.logits.device) * weight if isinstance(found, torch.Tensor) else None


def regularised_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a training step of one batch, a scalar, with all that method and model add to it."""
    found = forward_losses(model, batch)
    loss = found.answers.sum() / batch.answer_tokens
    for term in (auxiliary_loss(model, batch), found.routers):
        loss = loss if term is None else loss + term
    return loss


def allowed_shortcuts(model: nn.Module) -> Shortcuts:
    """Those of the model's base (none where it was not probed) that the method on it and torch.compile allow."""
    found: Shortcuts = getattr(base_of(model), SHORTCUTS, Shortcuts())
    tuner: Any = getattr(model, "base_model", None) if isinstance(model, PeftModel) else None
    if isinstance(tuner, BaseTuner) and type(tuner).forward not in CALL_THE_BASE_ONCE:
        return Shortcuts()  # X-LoRA and Shadow read the logits of a pass of their own
    if hasattr(model, "_orig_mod"):  # compiled: a head whose forward changes would be compiled anew in every step
        return replace(found, answers_only=False)
    prompted = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    head = base_of(model).get_output_embeddings() if found.answers_only else None
    return replace(
        found,
        answers_only=found.answers_only and shortcuts.is_linear(head),
        no_mask=found.no_mask and not prompted,  # such a method lengthens the mask that it is given
    )


def last_positions(count: int, device: torch.device) -> torch.Tensor:
    """The last ``count`` positions for ``logits_to_keep``, which so gives the head a contiguous tensor.

    Told a number, transformers slices the hidden states; the product of such a slice in bfloat16 takes torch on a CPU
    10 to 180 times as long.
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
    """The arguments of the method's forward beside the tokens, such as ``task_ids``: one number a row, shape [rows]."""
    wanted: dict[str, int] = getattr(model, METHOD_INPUTS, {})
    return {name: input_ids.new_full((len(input_ids),), value) for name, value in wanted.items()}


def auxiliary_loss(model: nn.Module, batch: Batch) -> torch.Tensor | None:
    """The regularisers that the attached method adds to the loss of the task; None where it has none.

    AdaLoRA keeps its factors orthogonal (PEFT adds that only to a loss of its own making), KaSA and
    MonteCLoRA offer theirs to the caller, Shadow trains its own path on the same labels.
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
