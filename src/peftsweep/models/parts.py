"""The parts of a loaded model: its text model, heads, experts and parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    PreTrainedModel,
)

# The attribute of a base whose training adds the loss of its routers: the weight of that loss.
ROUTER_LOSS = "peftsweep_router_loss"
Base = TypeVar("Base", bound=nn.Module)


def text_config(model: Any) -> Any:
    """The text part of a configuration or of a model's configuration; all of it for a model that reads only text."""
    config = getattr(model, "config", model)
    return config.get_text_config(decoder=True)


# Layers that models of these types never call in training, or whose weights they change in place (Gemma 3n clamps
# those of ``prediction_coefs``). So an adapter there has no effect, or the weights cannot be quantised.
NEVER_CALLED = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), ("dt_proj",)),
    "longcat_flash": ("classifier",),
    "gemma3n_text": ("correction_coefs", "prediction_coefs"),
}
# Parts in which an adapter would learn nothing: attention to the output of an encoder, which is never called for text
# alone; indexers, which select tokens for attention and so have no gradient; what reads images, sound (Phi-4, GIT) or
# entities (LUKE) in models whose configuration has no part for text; a head that predicts contacts in proteins (ESM).
UNTRAINED_PARTS = frozenset(
    (
        *("encoder_attn", "crossattention", "cross_attn", "indexer", "embed_tokens_extend", "image_encoder"),
        *("visual_projection", "entity_embeddings", "e2e_query", "e2w_query", "w2e_query", "contact_head"),
    )
)


def never_called(model: Any) -> tuple[str, ...]:
    """The last part of the names of layers that the model never calls; a configuration may be given too."""
    return NEVER_CALLED.get(text_config(model).model_type, ())


def base_of(model: Any) -> Any:
    """The base under an adapter; without an adapter the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_part(base: Any) -> nn.Module:
    """The submodule that reads text, without the head, in models that also read images or sound; else the model."""
    config = text_config(base)
    if config is base.config:
        return cast(nn.Module, base)
    parts = (m for m in base.modules() if isinstance(m, PreTrainedModel) and m.config is config)
    return next(parts, cast(nn.Module, base))


def head_names(base: PreTrainedModel) -> list[str]:
    """The names of the heads, the parts with weights beside the body: ``lm_head``, ``score``, ``classifier``."""
    parts, body = dict(base.named_children()), body_name(base)
    return [name for name, part in parts.items() if name != body and any(True for _ in part.parameters())]


def body_name(base: PreTrainedModel) -> str:
    """The name of the part without heads; for Llama 4 and Mllama ``base_model_prefix`` is not its name."""
    parts = dict(base.named_children())
    if base.base_model_prefix in parts:
        return base.base_model_prefix
    return next((name for name, part in parts.items() if isinstance(part, PreTrainedModel)), base.base_model_prefix)


def head_classes(config: transformers.PreTrainedConfig) -> list[str] | None:
    """The class names of a checkpoint's classification head; None if it has no such head, or only numbered classes."""
    made_for = (getattr(config, "architectures", None) or [""])[0]
    names = [name for _, name in sorted((config.id2label or {}).items(), key=lambda item: int(item[0]))]
    numbered = all(re.fullmatch(r"(?i)(label|class)?_?\d+", str(name)) for name in names)
    return None if numbered or not made_for.endswith("ForSequenceClassification") else [str(name) for name in names]


def classifies(model: nn.Module) -> bool:
    """Whether the model has a classification head in place of a language-model head."""
    return type(base_of(model)).__name__.endswith("ForSequenceClassification")


# ---- mixtures of experts ---------------------------------------------------------------------------


def router_loss_weight(config: Any) -> float:
    """The weight of the routers' load-balancing loss that transformers adds in training; 0 if it adds none.

    transformers adds it if the configuration (of ``config``, or of a model) sets ``output_router_logits``.
    """
    text = text_config(config)
    weights = (getattr(text, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef"))
    experts = getattr(text, "ffn_config", None)  # DBRX
    found = next((w for w in (*weights, getattr(experts, "moe_loss_weight", None)) if w is not None), 0.0)
    return float(found) if getattr(text, "output_router_logits", False) else 0.0


def defer_router_loss(base: Base) -> Base:
    """``base``, with the loss of the routers computed in training only, and not in every forward.

    In a forward after cached tokens transformers would compute it with a mask of another length, and fail.
    """
    weight = router_loss_weight(base)
    if weight and "output_router_logits" in inspect.signature(base.forward).parameters:
        setattr(base, ROUTER_LOSS, weight)
        text_config(base).output_router_logits = False
    return base


@contextmanager
def as_configured(base: Any) -> Iterator[None]:
    """In the body ``base`` has the configuration of its checkpoint, so that it is saved with it."""
    has_router_loss = hasattr(base, ROUTER_LOSS)
    if has_router_loss:
        text_config(base).output_router_logits = True
    try:
        yield
    finally:
        if has_router_loss:
            text_config(base).output_router_logits = False


ROUTER = re.compile(r"router(_\w+)?")
# The gate that chooses among experts beside it, and the gate that weighs the shared expert.
GATE = re.compile(r"(shared_experts?_|experts?_)?gate|gating")


def expert_parameters(base: nn.Module) -> list[str]:
    """The weights of experts that are stored as one tensor, [experts, ...], as in transformers 5."""
    return [
        f"{name}.{own}"
        for name, module in base.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "expert" in f"{name}.{type(module).__name__}".lower()
    ]


def router_modules(base: nn.Module) -> set[str]:
    """The routers, which choose among experts, with their parts: linear layers, or classes of their own.

    They are not adapted: an adapter there changes which experts a token is sent to, and in most model families routers
    are not linear layers, so the same keys would mean different modules in different families.
    """
    holders = {name.rpartition(".")[0] for name in expert_parameters(base)}
    holders |= {name for name, _ in base.named_modules() if name.rpartition(".")[2] == "experts"}
    blocks = holders | {name.rpartition(".")[0] for name in holders}

    def routes(parts: list[str]) -> bool:
        return any(
            ROUTER.fullmatch(part) or (GATE.fullmatch(part) and ".".join(parts[:place]) in blocks)
            for place, part in enumerate(parts)
        )

    return {name for name, _ in base.named_modules() if routes(name.split("."))}


# ---- adapters --------------------------------------------------------------------------------------


def layers_to_first_adapted(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's stack up to the first adapted one, included; empty if that is the first of all."""
    adapted = {module for module in model.modules() if isinstance(module, LoraLayer)}
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and adapted <= set(stack.modules()):
            first = next(index for index, layer in enumerate(stack) if adapted & set(layer.modules()))
            return list(stack)[: first + 1] if first else []
    return []


def beside_products(model: nn.Module, adapters: Sequence[str]) -> list[str]:
    """The names of the parameters of LoRA ``adapters`` that are no weight [out, in] of an A or B.

    Such as those of embeddings, biases, DoRA's magnitudes and modules that are saved whole.
    """
    return [
        name
        for name, parameter in model.named_parameters()
        if not set(adapters).isdisjoint(name.split("."))
        and not (re.search(r"\.lora_[AB]\.[^.]+\.weight$", name) and parameter.dim() == 2)
    ]


# ---- counting and saving ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, each weight of a quantised base counted as one."""

    trainable: int
    total: int
    trainable_bytes: int


def count(model: nn.Module) -> Counts:
    """Count the parameters of ``model``, packed 4-bit weights by their unpacked shape."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Counts(
        trainable=sum(p.numel() for p in trainable),
        total=sum(weight_count(p) for p in model.parameters()),
        trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
    )


def weight_count(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter, unpacked for 4 bits."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else int(torch.Size(packed.shape).numel())


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that training changes."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def adaptable_modules(base: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The innermost modules outside the head that process text and that an adapter can wrap."""
    heads, reached = head_names(base), {id(module) for module in text_part(base).modules()}
    return [
        (name, module)
        for name, module in base.named_modules()
        if name.partition(".")[0] not in heads
        and next(module.children(), None) is None
        and id(module) in reached
        and UNTRAINED_PARTS.isdisjoint(name.split("."))
        and _multiplies(module)
    ]


@torch.no_grad()
def _multiplies(module: Any) -> bool:
    """Whether transformers' subclass of nn.Linear is linear; routers that select and grouped products are not."""
    own = type(module).__module__.startswith("transformers.models.") and isinstance(module, nn.Linear)
    if not own or type(module).forward is nn.Linear.forward:
        return True
    try:
        answer = module(torch.zeros(1, 1, module.in_features, device=module.weight.device, dtype=module.weight.dtype))
    except (RuntimeError, ValueError, TypeError):
        return False
    return isinstance(answer, torch.Tensor) and answer.shape == (1, 1, module.out_features)


# ---- positions that depend on the batch ------------------------------------------------------------

SHORT_ROWS, LONG_ROWS = -1, -2  # groups of ``rows_by_rotation``; the others are of rows that are read alone


class _Rotation(NamedTuple):
    """A rotary embedding (RoPE) of the model, at layers of type ``layers`` (None: of all layers)."""

    module: Any
    layers: str | None
    limit: int  # the longest row that is read with the original frequencies
    dynamic: bool  # beyond it each length has frequencies of its own (NTK); else there is one other set (LongRoPE)


def _rotations(model: Any) -> list[_Rotation]:
    """The rotary embeddings whose frequencies depend on the longest row of a batch, padding included."""
    found = []
    for module in base_of(model).modules():
        kinds = getattr(module, "rope_type", None)
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        for layers, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind == "longrope":
                own = parameters if layers is None else parameters[layers]
                found.append(_Rotation(module, layers, own["original_max_position_embeddings"], dynamic=False))
            elif "dynamic" in str(kind):  # which keeps the frequencies of a longer row for one of just this length
                found.append(_Rotation(module, layers, module.original_max_seq_len - 1, dynamic=True))
    return found


def rows_by_rotation(model: Any, lengths: Sequence[int], new_tokens: int = 0) -> list[int]:
    """A group for each row of ``lengths`` tokens, to which ``new_tokens`` are written: a batch must be of one group.

    With dynamic NTK and LongRoPE the frequencies of rotary positions depend on the longest row of a batch. Rows that
    stay within the original length are a group (``SHORT_ROWS``), those beyond it another with LongRoPE
    (``LONG_ROWS``). With dynamic NTK rows beyond it, and with both those that grow beyond it, are groups of their own,
    by their length or, where tokens are written, by their number.
    """
    rotations, method = _rotations(model), model.active_peft_config if isinstance(model, PeftModel) else None
    virtual = method.num_virtual_tokens if method is not None and method.is_prompt_learning else 0
    groups = []
    for number, length in enumerate(lengths):
        start, end = length + virtual, length + virtual + new_tokens
        if all(end <= rotation.limit for rotation in rotations):
            groups.append(SHORT_ROWS)
        elif all(end <= r.limit or (start > r.limit and not r.dynamic) for r in rotations):
            groups.append(LONG_ROWS)
        else:
            groups.append(number if new_tokens else length)
    return groups


def forget_longer_rows(model: Any) -> None:
    """Put back the first frequencies of dynamic rotary embeddings, which keep those of the longest row so far."""
    for module, layers, _, dynamic in _rotations(model):
        if dynamic:
            prefix = "" if layers is None else f"{layers}_"
            first, now = getattr(module, f"{prefix}original_inv_freq"), getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", first.to(now.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
