"""Attach a method to a base: roles to module names, PEFT's preferences, and what is checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import constants
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftsweep.errors import InputError
from peftsweep.model import METHOD_INPUTS, classifies, head_names, keep_dtype
from peftsweep.schema import TargetsConfig

LINEAR = (nn.Linear, Conv1D)  # bitsandbytes' quantised layers are subclasses of nn.Linear

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

    A classifier's head is trained and saved with every method. ``inputs`` are what the method's
    forward wants beside the tokens, such as ``{"task_ids": 0}``. ``float32`` keeps the weights of an
    adapter on a 16-bit base in 32 bits. ``initialise`` does the attaching by the function it is given,
    after and before what an initialisation from data needs.

    Raises:
        InputError: the targets do not fit the model or the method, or PEFT refuses the options.
    """
    modules = target_modules(base, targets, roles)
    if method is None:
        if modules is not None:
            raise InputError("targets: full fine-tuning trains every module; leave targets=default")
        return base.requires_grad_(True)
    _aim(method, base, modules, targets, roles)
    method.task_type = TaskType.SEQ_CLS if classifies(base) else method.task_type or TaskType.CAUSAL_LM
    if classifies(base) and hasattr(method, "modules_to_save"):
        method.modules_to_save = [*(method.modules_to_save or []), *head_names(base)]
    if hasattr(method, "token_dim") and method.token_dim is None:  # PEFT looks for fewer names than there are
        method.token_dim = base.config.hidden_size
        method.num_attention_heads = method.num_attention_heads or base.config.num_attention_heads
    if hasattr(method, "adapters"):  # X-LoRA reads each token twice, and its router the last hidden states
        method.adapters = {str(n): path for n, path in enumerate(method.adapters.values())}  # it knows numbers only
        method.hidden_size = base.config.hidden_size
        base.config.use_cache = False
    put: Any = partial(get_peft_model, autocast_adapter_dtype=float32)
    try:
        adapted = initialise(method, put) if initialise else put(base, method)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"method: {' '.join(str(error).split())}") from error
    if classifies(base) and not _head_is_trained(adapted, head_names(base)):
        raise InputError(f"method: {type(method).__name__} leaves the new head of a classifier untrained")
    setattr(adapted, METHOD_INPUTS, inputs or {})
    keep_dtype(adapted)
    return adapted


def attach_lanes(
    base: PreTrainedModel,
    lanes: Mapping[str, tuple[PeftConfig, TargetsConfig]],
    seed: int,
    roles: Roles,
    *,
    float32: bool = True,
) -> PeftModel:
    """Attach several adapters of one kind to ``base``, by their names, each as ``attach`` would after ``seed``.

    Raises:
        InputError: as ``attach``.
    """
    for method, targets in lanes.values():  # all of them before the first changes what the base has
        _aim(method, base, target_modules(base, targets, roles), targets, roles)
        method.task_type = method.task_type or TaskType.CAUSAL_LM
    adapted: Any = None
    try:
        for name, (method, _) in lanes.items():
            torch.manual_seed(seed)
            if adapted is None:
                adapted = get_peft_model(base, method, adapter_name=name, autocast_adapter_dtype=float32)
            else:
                method.base_model_name_or_path = adapted.active_peft_config.base_model_name_or_path
                adapted.add_adapter(name, method, autocast_adapter_dtype=float32)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"method: {' '.join(str(error).split())}") from error
    keep_dtype(adapted)
    return cast(PeftModel, adapted)


def _aim(method: Any, base: PreTrainedModel, modules: list[str] | None, targets: TargetsConfig, roles: Roles) -> None:
    """Set the method's target modules: those of ``targets``, else its own, else PEFT's, else ``targets.otherwise``."""
    if not hasattr(method, "target_modules"):
        if modules is not None:
            raise InputError(f"targets: {type(method).__name__} has no target modules; leave targets=default")
        return
    if modules is None:
        if method.target_modules == "all-linear":
            modules = linear_names(base)
        elif isinstance(method.target_modules, list | set):
            check_modules(base, sorted(method.target_modules), "method.target_modules")
        elif method.target_modules is None and _without_preference(method, base):
            modules = role_modules(base, targets.otherwise, roles)
    if modules is None:
        return
    method.target_modules = modules
    if hasattr(method, "feedforward_modules"):
        # IA3 scales the input, not the output, of feed-forward layers, and must be told which those are.
        feedforward = set(_members(base, roles).get("mlp", []))
        method.feedforward_modules = [name for name in modules if feedforward & set(_matching(base, name))]


def _without_preference(method: Any, base: PreTrainedModel) -> bool:
    """Whether PEFT knows which modules the method is usually attached to, but not for this architecture."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(method.peft_type)
    constant = f"TRANSFORMERS_MODELS_TO_{method.peft_type.value}_TARGET_MODULES_MAPPING"  # where IA3 keeps its own
    known: Any = getattr(tuner, "target_module_mapping", None) or getattr(constants, constant, None)
    return bool(known) and base.config.model_type not in known and not getattr(method, "target_parameters", None)


def _head_is_trained(adapted: PeftModel, heads: Sequence[str]) -> bool:
    modules = [module for name, module in adapted.get_base_model().named_children() if name in heads]
    return all(any(p.requires_grad for p in module.parameters()) for module in modules)


# ---- names -----------------------------------------------------------------------------------------


def target_modules(base: PreTrainedModel, targets: TargetsConfig, roles: Roles) -> list[str] | None:
    """The names of the modules that ``targets`` means in ``base``; None leaves them to the method.

    Raises:
        InputError: a role or module that the model lacks; the line lists what it has.
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
    """The names of the modules that play the ``wanted`` roles, as short as PEFT understands them.

    A layer that is query, key and value in one (``qkv``) stands for the three together.

    Raises:
        InputError: the model lacks one of the roles; the line lists what it has.
    """
    members = _members(base, roles)
    if {"q", "k", "v"} <= set(wanted) and "q" not in members and "qkv" in members:
        wanted = ["qkv", *(role for role in wanted if role not in ("q", "k", "v"))]
    for role in wanted:
        if role not in members:
            raise InputError(f"targets.roles: the model has no '{role}'; it has: {', '.join(members) or 'none'}")
    names = [name for role in wanted for name in members[role]]
    suffixes = [suffix for role in wanted for suffix in roles[role] if _matching(base, suffix)]
    return _shortest(base, names, suffixes)


def linear_names(base: PreTrainedModel) -> list[str]:
    """The last names of all linear layers but those of the head, in order of appearance."""
    names = [name for name, module in _modules(base) if isinstance(module, LINEAR)]
    return _shortest(base, names, list(dict.fromkeys(name.rpartition(".")[2] for name in names)))


def check_modules(base: PreTrainedModel, names: Sequence[str], key: str) -> None:
    """Refuse module names that ``base`` lacks, naming those that it has."""
    for name in names:
        if not any(_ends(full, name) for full, _ in base.named_modules()):
            raise InputError(f"{key}: the model has no module '{name}'; it has: {', '.join(linear_names(base))}")


def _members(base: PreTrainedModel, roles: Roles) -> dict[str, list[str]]:
    """The full names of the modules that play each role; of two names that fit a module, the longer one decides.

    So in BERT ``attention.output.dense`` is not among those that ``output.dense`` means.
    """
    found: dict[str, list[str]] = {}
    suffixes = [(suffix, role) for role, names in roles.items() for suffix in names]
    for name, _ in _modules(base):
        fitting = [(len(suffix), role) for suffix, role in suffixes if _ends(name, suffix)]
        for length, role in fitting:
            if length == max(fitting)[0]:
                found.setdefault(role, []).append(name)
    return {role: found[role] for role in roles if role in found}


def _shortest(base: PreTrainedModel, names: Sequence[str], suffixes: list[str]) -> list[str]:
    """``suffixes`` if they mean exactly the modules ``names``, else the names themselves."""
    meant = {name for suffix in suffixes for name in _matching(base, suffix)}
    return suffixes if meant == set(names) else list(names)


def _matching(base: PreTrainedModel, suffix: str) -> list[str]:
    return [name for name, _ in _modules(base) if _ends(name, suffix)]


def _modules(base: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """All modules without parts, outside the head."""
    heads = head_names(base)
    return [
        (name, module)
        for name, module in base.named_modules()
        if name.partition(".")[0] not in heads and next(module.children(), None) is None
    ]


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
