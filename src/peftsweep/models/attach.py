"""Attach a method to a base: turn roles into module names, use PEFT's defaults, check the options."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from peft.utils import constants
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftsweep.errors import InputError
from peftsweep.models import compatibility
from peftsweep.models.checkpoint.weights import new_parts
from peftsweep.models.losses import METHOD_INPUTS
from peftsweep.models.parts import (
    UNTRAINED_PARTS,
    adaptable_modules,
    classifies,
    expert_parameters,
    head_names,
    never_called,
    router_modules,
    text_config,
    text_part,
    trainable_parameters,
)
from peftsweep.models.saved import keep_dtype, names_as_written, warn_of_misread
from peftsweep.schema import TargetsConfig

LONGEST = 300  # characters of a message of PEFT that are kept, as it may print a whole module
REFUSALS = (ValueError, TypeError, ImportError, AssertionError, ZeroDivisionError)  # errors of PEFT for wrong options
log = logging.getLogger(__name__)

LINEAR = (nn.Linear, Conv1D)  # bitsandbytes' quantised layers are subclasses of nn.Linear
ALL_LINEAR = "all-linear"  # PEFT's word for the modules that linear_names finds
EXPERTS = "experts"  # a role of every mixture of experts, whose members are found by their shapes
FORWARD = ("gate_proj", "up_proj", "down_proj")
RECURRENT = ("in_proj", "x_proj", "dt_proj", "out_proj")
# Further names of a role's layers, in later architectures, for every model. They are not in conf/model, because the
# lists there are part of the identity of trials that target these roles.
FURTHER_ROLES: dict[str, list[str]] = {
    # q_a, q_b, kv_a and kv_b are of multi-head latent attention: a latent for queries, one for keys and values.
    "q": [
        "q_proj",
        "q_a_proj",
        "q_b_proj",
        "query",
        "query_proj",
        "project_q",
        "Wq",
        "q_proj.linear",
        "q_lin",
        "q_head",
    ],
    "k": ["k_proj", "key", "key_proj", "project_k", "Wk", "k_proj.linear", "k_lin", "k_head"],
    "v": ["v_proj", "value", "value_proj", "project_v", "Wv", "v_proj.linear", "v_lin", "v_head"],
    "kv": ["kv_a_proj_with_mqa", "kv_b_proj", "kv_proj"],
    "qkv": ["query_key_value", "c_attn", "qkv_proj"],
    "o": [
        *("o_proj", "o_a_proj", "o_b_proj", "o_proj.linear", "out_lin", "post_proj", "attention_out", "attn.Wo"),
        *(f"{part}.out_proj" for part in ("self_attn", "attn", "attention")),
        *(f"{part}.dense" for part in ("self_attn", "attention", "self_attention", "multi_head_attention")),
        "attn.c_proj",
    ],
    "mlp": [
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "c_proj", "fc_in", "fc_out"),
        *("dense_h_to_4h", "dense_4h_to_h", "mlp.Wi", "mlp.Wo", "lin1", "lin2", "w_in.w_0", "w_in.w_1", "ffn.w_out"),
        *("ff.layer_1", "ff.layer_2", "ffn.linear_1", "ffn.linear_2", "ffn.ffn", "ffn.ffn_output"),
        *(f"ffn.proj_{name}" for name in ("up_gate", "up", "down")),
        *(f"feed_forward.{name}" for name in ("w1", "w2", "w3", "intermediate", "output")),
    ],
    "down": [
        *("down_proj", "fc2", "c_proj", "fc_out", "dense_4h_to_h", "mlp.Wo", "lin2", "ffn.w_out", "ff.layer_2"),
        *("ffn.linear_2", "ffn.proj_down", "feed_forward.w2", "feed_forward.output"),
    ],
    "shared_experts": [
        *(f"{part}.{name}" for part in ("shared_expert", "shared_experts") for name in FORWARD),
        *("shared_mlp.input_linear", "shared_mlp.output_linear"),
    ],
    "linear_attention": [
        *(f"linear_attn.in_proj_{name}" for name in ("qkvz", "ba", "qkv", "z", "b", "a")),
        *(f"{part}.{name}" for part in ("linear_attn", "mamba", "mixer", "conv") for name in RECURRENT),
        *(f"temporal_block.linear_{name}" for name in ("x", "y", "out")),
        *(f"linear_attn.{name}_proj" for name in ("a", "b", "g")),
        *(f"forget_gate.{name}_proj" for name in ("f", "f_a", "f_b")),
        *(
            f"mlstm_layer.{name}"
            for name in ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "out_proj")
        ),
    ],
}

Roles = dict[str, list[str]]
Attach = Callable[[PreTrainedModel, PeftConfig], PeftModel]


def attach(
    base: PreTrainedModel,
    method: Any,
    targets: TargetsConfig,
    roles: Roles,
    inputs: dict[str, int] | None = None,
    *,
    float32: bool = True,
    initialise: Callable[[PeftConfig, Attach], PeftModel] | None = None,
) -> PreTrainedModel | PeftModel:
    """Attach ``method``, a PEFT config, to ``base``, in place; None makes all of the base trainable (full fine-tuning).

    A classifier's head is trained and saved with every method. ``inputs`` are further arguments of the method's
    forward, such as ``{"task_ids": 0}``. ``float32`` keeps the weights of an adapter on a 16-bit base in 32 bits.
    ``initialise`` gets the method and a function that attaches it, and returns the adapted model; an initialisation
    from data runs in it.

    Raises:
        InputError: the targets do not fit the model or the method, or PEFT refuses the options.
    """
    modules = target_modules(base, targets, roles)
    if method is not None:
        compatibility.check_names(method, base, text_config(base))
    if method is None:
        if modules is not None:
            raise InputError("targets: full fine-tuning trains every module; leave targets=default")
        base.requires_grad_(True)
        _freeze_beside_text(base)
        return base
    as_given = copy.copy(method)
    _aim(method, base, modules, targets, roles)
    method.task_type = TaskType.SEQ_CLS if classifies(base) else method.task_type or TaskType.CAUSAL_LM
    trained = _always_trained(base)
    if trained and hasattr(method, "modules_to_save"):
        method.modules_to_save = [*(method.modules_to_save or []), *trained]
    config = text_config(base)
    if hasattr(method, "token_dim") and method.token_dim is None:  # PEFT does not know all names of these sizes
        method.token_dim = config.hidden_size
        method.num_attention_heads = method.num_attention_heads or getattr(config, "num_attention_heads", None)
    if hasattr(method, "adapters"):  # X-LoRA runs each token twice, and its router reads the last hidden states
        method.adapters = {str(n): path for n, path in enumerate(method.adapters.values())}  # it needs numbers as names
        method.hidden_size = config.hidden_size
        base.config.use_cache = False
    warn_of_misread(method, base)
    put: Any = partial(get_peft_model, autocast_adapter_dtype=float32)
    try:
        with names_as_written(), compatibility.options_as_given():
            adapted = initialise(method, put) if initialise else put(base, method)
    except REFUSALS as error:
        raise _refused(error) from error
    compatibility.check_adapted(as_given, _adapted_names(adapted))
    for name in trained:
        if not any(p.requires_grad for p in adapted.get_base_model().get_submodule(name).parameters()):
            raise InputError(f"method: {type(method).__name__} leaves the new {name} of a classifier untrained")
    setattr(adapted, METHOD_INPUTS, inputs or {})
    keep_dtype(adapted)
    _freeze_beside_text(base)
    _check_trains(adapted, trained)
    return adapted


def _check_trains(adapted: PeftModel, heads: Sequence[str]) -> None:
    """Refuse an adapter without a trainable parameter, such as OSF at full rank; ``heads`` are not counted."""
    own = (p for name, p in trainable_parameters(adapted) if not any(f".{head}." in f".{name}" for head in heads))
    if not any(parameter.numel() for parameter in own):
        kind = type(adapted.peft_config["default"]).__name__
        raise InputError(f"method: {kind} has no trainable parameter with these options, so it would learn nothing")


def _adapted_names(adapted: PeftModel) -> list[str]:
    """The names, in the base, of modules and parameters with an adapter; empty if the adapter lies elsewhere."""
    tuner = adapted.base_model
    return [*getattr(tuner, "targeted_module_names", ()), *getattr(tuner, "targeted_parameter_names", ())]


def _refused(error: Exception) -> InputError:
    """PEFT's error about a configuration, as one line."""
    return InputError(f"method: {' '.join(str(error).split())[:LONGEST] or type(error).__name__}")


def _always_trained(base: PreTrainedModel) -> list[str]:
    """The head of a classifier, and the modules that its checkpoint lacked: their weights are untrained."""
    if not classifies(base):
        return []
    heads = head_names(base)
    return [*heads, *(name for name in new_parts(base) if name.partition(".")[0] not in heads)]


def _freeze_beside_text(base: PreTrainedModel) -> None:
    """Freeze the parts that text never reaches, such as a vision tower."""
    reached = text_part(base)
    if reached is not base:
        kept = {id(p) for part in (reached, *(getattr(base, n) for n in head_names(base))) for p in part.parameters()}
        for parameter in base.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)


def attach_slots(
    base: PreTrainedModel,
    slots: Mapping[str, tuple[PeftConfig, TargetsConfig]],
    seed: int,
    roles: Roles,
    *,
    float32: bool = True,
) -> PeftModel:
    """Attach several adapters of one kind to ``base``, by their names, each as ``attach`` would after ``seed``.

    Raises:
        InputError: as ``attach``.
    """
    for method, targets in slots.values():  # before the first adapter changes the modules of the base
        _aim(method, base, target_modules(base, targets, roles), targets, roles)
        method.task_type = method.task_type or TaskType.CAUSAL_LM
    adapted: Any = None
    try:
        for name, (method, _) in slots.items():
            torch.manual_seed(seed)
            with names_as_written():
                if adapted is None:
                    adapted = get_peft_model(base, method, adapter_name=name, autocast_adapter_dtype=float32)
                else:
                    method.base_model_name_or_path = adapted.active_peft_config.base_model_name_or_path
                    adapted.add_adapter(name, method, autocast_adapter_dtype=float32)
    except REFUSALS as error:
        raise _refused(error) from error
    keep_dtype(adapted)
    return cast(PeftModel, adapted)


def _aim(method: Any, base: PreTrainedModel, modules: list[str] | None, targets: TargetsConfig, roles: Roles) -> None:
    """Set the method's target modules: from ``targets``, else its own, else PEFT's, else from ``targets.otherwise``."""
    if not hasattr(method, "target_modules"):
        if modules is not None:
            raise InputError(f"targets: {type(method).__name__} has no target modules; leave targets=default")
        return
    if EXPERTS in (targets.roles or ()):
        _aim_at_experts(method, base)
    if modules is None:
        if method.target_modules == ALL_LINEAR:
            modules = linear_names(base, method)
        elif isinstance(method.target_modules, list | set):
            check_modules(base, sorted(method.target_modules), "method.target_modules")
        elif method.target_modules is None and _without_preference(method, base):
            modules = role_modules(base, targets.otherwise, roles)
    elif targets.all_linear:
        modules = linear_names(base, method)
    elif targets.roles is not None:
        modules = _without_refused(method, base, modules)
    if modules is not None:
        method.target_modules = modules
    _aim_at_text(method, base)
    compatibility.aim_at_parameters(method, base)
    if getattr(method, "layers_to_transform", None) and not isinstance(method.target_modules, str | None):
        # PEFT applies layers_to_transform only to ends of names; a full name would mean its module in every layer.
        full = {name for name, _ in base.named_modules()}
        method.target_modules = [
            name
            for name in sorted(method.target_modules)
            if name not in full or check_target_module_exists(method, f".{name}")
        ]
    if modules is not None and hasattr(method, "feedforward_modules") and method.feedforward_modules is None:
        # IA3 scales the input, not the output, of feed-forward layers, and needs their names.
        feedforward = role_members(base, roles).get("mlp", [])
        method.feedforward_modules = [n for n in method.target_modules if any(_ends(name, n) for name in feedforward)]


def _aim_at_experts(method: Any, base: PreTrainedModel) -> None:
    """Add the experts, which are parameters and not modules, to the targets of the method."""
    names = expert_parameters(base)
    if names and not hasattr(method, "target_parameters"):
        raise InputError(
            f"targets.roles: {type(method).__name__} cannot be attached to experts, which are parameters of this "
            "model and not modules; use a method with peft.LoraConfig"
        )
    if names:
        suffixes = sorted({".".join(name.split(".")[-2:]) for name in names})
        meant = {name for name, _ in base.named_parameters() if any(_ends(name, suffix) for suffix in suffixes)}
        method.target_parameters = suffixes if meant == set(names) else names


def _aim_at_text(method: Any, base: PreTrainedModel) -> None:
    """List the modules one by one if their names would also match modules that text never reaches."""
    parts = (part for name, _ in base.named_modules() for part in name.split("."))
    if text_part(base) is base and UNTRAINED_PARTS.isdisjoint(parts):
        return
    if method.target_modules is None:
        known = _preferences(method)
        kinds = [kind for kind in (base.config.model_type, text_config(base).model_type) if kind in known]
        if not kinds:
            return
        method.target_modules = list(known[kinds[0]])
    method.target_modules = [name for name, _ in adaptable_modules(base) if check_target_module_exists(method, name)]


def _without_preference(method: Any, base: PreTrainedModel) -> bool:
    """Whether PEFT has default modules for the method, but not for this architecture."""
    known = _preferences(method)
    kinds = {base.config.model_type, text_config(base).model_type}
    return bool(known) and not kinds & known.keys() and not getattr(method, "target_parameters", None)


def _preferences(method: Any) -> dict[str, Any]:
    """PEFT's default modules for the method, by model type."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(method.peft_type)
    constant = f"TRANSFORMERS_MODELS_TO_{method.peft_type.value}_TARGET_MODULES_MAPPING"  # for IA3
    return getattr(tuner, "target_module_mapping", None) or getattr(constants, constant, None) or {}


# ---- names -----------------------------------------------------------------------------------------


def target_modules(base: PreTrainedModel, targets: TargetsConfig, roles: Roles) -> list[str] | None:
    """The names of the modules in ``base`` that ``targets`` selects; None leaves them to the method.

    Raises:
        InputError: the model lacks a role or module; the message lists what it has.
    """
    if targets.all_linear:
        return linear_names(base)
    if targets.roles is not None:
        return role_modules(base, targets.roles, roles)
    if targets.modules is not None:
        check_modules(base, targets.modules, "targets.modules")
        return list(targets.modules)
    return None


def role_modules(base: PreTrainedModel, wanted: Sequence[str], roles: Roles) -> list[str]:
    """The names of the modules with the ``wanted`` roles, shortened as far as they stay unambiguous for PEFT.

    A layer for query, key and value together (``qkv``) stands for the three roles, layers that keys and values share
    (``kv``, as in DeepSeek) for either of the two. For the role ``experts`` these are experts that are modules;
    ``expert_parameters`` names the others.

    Raises:
        InputError: the model lacks one of the roles; the message lists what it has.
    """
    members = role_members(base, roles)
    if expert_parameters(base):
        members.setdefault(EXPERTS, [])
    if {"q", "k", "v"} <= set(wanted) and "q" not in members and "qkv" in members:
        wanted = ["qkv", *(role for role in wanted if role not in ("q", "k", "v"))]
    if "kv" in members:
        shared = {role: "kv" for role in ("k", "v") if role not in members}
        wanted = list(dict.fromkeys(shared.get(role, role) for role in wanted))
    for role in wanted:
        if role not in members:
            raise InputError(f"targets.roles: the model has no '{role}'; it has: {', '.join(members) or 'none'}")
    names = [name for role in wanted for name in members[role]]
    known, adaptable = _known(roles), [name for name, _ in adaptable_modules(base)]
    listed = [suffix for role in wanted for suffix in known.get(role, [])]
    suffixes = [suffix for suffix in listed if any(_ends(name, suffix) for name in adaptable)]
    return _shortest(base, adaptable, names, suffixes)


def linear_names(base: PreTrainedModel, method: Any = None) -> list[str]:
    """The names of all linear layers except head, experts and routers, in order of appearance, shortened.

    Layers that PEFT refuses for ``method``, such as Mamba's ``out_proj`` for LoRA, are left out with a warning.
    An InputError is raised if there are none.
    """
    left, adaptable = router_modules(base), dict(adaptable_modules(base))
    linear = [name for name, module in adaptable.items() if isinstance(module, LINEAR) and name not in left]
    names = _without_refused(method, base, [name for name in linear if not _of_expert(name)])
    if not names:
        raise InputError(f"targets: {type(base).__name__} has no linear layer that an adapter can be attached to")
    return _shortest(base, list(adaptable), names, list(dict.fromkeys(name.rpartition(".")[2] for name in names)))


def _without_refused(method: Any, base: PreTrainedModel, names: list[str]) -> list[str]:
    """``names`` without layers that PEFT refuses or the model never calls; all of them if none would be left."""
    taken = [name for name in names if _is_taken(method, base, name)]
    if refused := sorted({name.rpartition(".")[2] for name in names if name not in taken}):
        log.warning("targets: left out %s, which cannot be adapted in %s", ", ".join(refused), base.config.model_type)
    return taken or names


def _is_taken(method: Any, base: PreTrainedModel, name: str) -> bool:
    if name.rpartition(".")[2] in never_called(base):
        return False
    try:
        if method is not None:
            _check_lora_target_modules_mamba(method, base, name.rpartition(".")[2])
    except ValueError:
        return False
    return True


def _of_expert(name: str) -> bool:
    """Whether a module is part of one expert among several."""
    return re.search(r"experts\.\d+\.", name) is not None


def _known(roles: Roles) -> Roles:
    """``roles`` with the names in later architectures added."""
    named = ((role, [*roles.get(role, []), *FURTHER_ROLES.get(role, [])]) for role in {**roles, **FURTHER_ROLES})
    return {role: list(dict.fromkeys(names)) for role, names in named}


def check_modules(base: PreTrainedModel, names: Sequence[str], key: str) -> None:
    """Refuse module names that ``base`` lacks, naming those that it has."""
    for name in names:
        if not any(_ends(full, name) for full, _ in base.named_modules()):
            raise InputError(f"{key}: the model has no module '{name}'; it has: {', '.join(linear_names(base))}")
        if name.rpartition(".")[2] in never_called(base):
            raise InputError(f"{key}: the model never calls '{name}', so an adapter there would have no effect")


def role_members(base: PreTrainedModel, roles: Roles) -> dict[str, list[str]]:
    """The full names of the modules with each role; if two names fit a module, the longer one decides.

    So in BERT ``output.dense`` does not select ``attention.output.dense``.
    """
    found: dict[str, list[str]] = {}
    roles, routers = _known(roles), router_modules(base)
    playing = {suffix: [role for role in roles if suffix in roles[role]] for suffix in chain(*roles.values())}
    for name, _ in adaptable_modules(base):
        if name in routers:
            continue
        if _of_expert(name):
            found.setdefault(EXPERTS, []).append(name)
            continue
        parts = name.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts)))  # the longest first
        for role in next((playing[suffix] for suffix in suffixes if suffix in playing), []):
            found.setdefault(role, []).append(name)
    return {role: found[role] for role in (*roles, EXPERTS) if role in found}


def _shortest(base: PreTrainedModel, adaptable: list[str], names: list[str], suffixes: list[str]) -> list[str]:
    """``suffixes`` if they match exactly the modules ``names`` of ``adaptable``, and no module with children.

    Else ``names``.
    """
    wholes = [name for name, module in base.named_modules() if next(module.children(), None) is not None]  # as h.0 by 0
    matched = {name for name in (*adaptable, *wholes) if any(_ends(name, suffix) for suffix in suffixes)}
    return suffixes if matched == set(names) else names


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
