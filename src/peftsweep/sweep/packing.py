"""Which trials can be trained at once on one base, and how many of them."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from peft import LoraConfig

from peftsweep import limits
from peftsweep.config import identity
from peftsweep.config.compose import Trial
from peftsweep.config.identity import content_hash
from peftsweep.errors import InputError
from peftsweep.forecast import forecast
from peftsweep.models import model
from peftsweep.models.parts import router_loss_weight
from peftsweep.schema import Task, TrainConfig
from peftsweep.training import optimizer

# Keys in which the slots of a pack may differ: ADAPTER and TARGETING of a LoRA's configuration, PER_TRIAL of train.
ADAPTER = ("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "rank_pattern", "alpha_pattern")
TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
PER_TRIAL = (
    *("learning_rate", "learning_rate_scale", "weight_decay", "schedule", "warmup", "steps", "epochs", "clip"),
    *(
        "optimizer",
        "optimizer_kwargs",
        "log_every",
        "keep_best",
        "best_metric",
        "patience",
        "checkpoint_every",
        "params_file",
    ),
)
PLAIN = (True, "gaussian", False)  # values of init_lora_weights that do not depend on the base's weights


# ---- which -----------------------------------------------------------------------------------------


Fits = Callable[[Sequence[Trial]], bool]


def plan(trials: Sequence[Trial], limit: int, fits: Fits | None = None) -> list[list[Trial]]:
    """Group ``trials`` into packs of at most ``limit``; a trial that cannot be packed is a pack of its own.

    Trials of a pack have equal settings, except for those of the adapter and its optimizer. Trials of similar length
    are put together, and the packs of a group have nearly equal sizes. A pack size is allowed if the largest trials
    of the group fit (``fits``) together in a pack of this size.
    """
    groups: dict[str, list[Trial]] = {}
    for one in trials:
        groups.setdefault(one.identity if alone(one) else shared_settings(one), []).append(one)
    packs = []
    for group in groups.values():
        most = _largest_pack(group, min(limit, len(group)), fits)
        in_order = sorted(group, key=_length) if len(group) > most else group
        size = math.ceil(len(group) / math.ceil(len(group) / most))
        packs += [in_order[start : start + size] for start in range(0, len(group), size)]
    return packs


def _largest_pack(group: Sequence[Trial], limit: int, fits: Fits | None) -> int:
    """The number of trials of the group that fit into memory together, for any choice of them."""
    if limit < 2 or fits is None:
        return limit
    heaviest = sorted(group, key=lambda one: -(forecast.check(one).trainable_parameters or 0))
    if fits(heaviest[:limit]):
        return limit
    return 1 + bisect_left(range(2, limit), True, key=lambda size: not fits(heaviest[:size]))


def fits_memory(trials: Sequence[Trial], at_once: int = 1) -> bool:
    """Whether the trials fit together into the memory of the device; True where that is unknown.

    ``at_once`` such packs share the device.
    """
    limit = forecast.memory_limit(trials[0], at_once)
    if limit is None or (predicted := forecast.together(trials)) is None:
        return True
    return predicted.peak_bytes <= limit


def alone(trial: Trial) -> str | None:
    """Why the trial cannot be trained together with others; None where it can."""
    config = trial.config
    checks = {
        "its method is not plain LoRA": not _plain_lora(config.method) or config.method_setup or config.method_inputs,
        "it trains nothing": config.adapter.path is not None or not (config.train.steps or config.train.epochs),
        "it is a classifier": config.model.task is not Task.causal_lm,
        "it is compiled": config.train.compile != "none",
        "its optimizer is not torch's own": not _of_torch(config.train),
        "it is profiled or timed": config.profiler or config.inference,
        "its base is spread over devices": config.model.device_map is not None,
        "dropout under gradient checkpointing": config.train.checkpointing and config.method.get("lora_dropout"),
        "its base has dropout of its own": _base_facts(trial).drops,
        "its base adds a loss of its routers": _base_facts(trial).balances,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def _plain_lora(method: dict[str, Any]) -> bool:
    if method.get("_target_") not in ("peft.LoraConfig", "peft.tuners.lora.LoraConfig"):
        return False
    usual = LoraConfig()
    rest = {key: value for key, value in method.items() if key not in ("_target_", *ADAPTER, *TARGETING)}
    unusual = [key for key, value in rest.items() if value not in (None, getattr(usual, key, None))]
    return not unusual and method.get("init_lora_weights", True) in PLAIN


def _of_torch(config: TrainConfig) -> bool:
    """Whether the optimizer is torch's: others may depend on the memory layout of a weight, which packing changes."""
    made = optimizer.find_optimizer(config.optimizer)
    return isinstance(made, type) and made.__module__.startswith("torch.optim")


class _BaseFacts(NamedTuple):
    drops: bool  # it has dropout or routers' noise, whose random numbers would be drawn for all slots at once
    balances: bool  # it adds a loss of its routers, a mean over the tokens of all slots


def _base_facts(trial: Trial) -> _BaseFacts:
    """What the configuration of the trial's base says against a pack."""
    key = content_hash(identity.model_identity(trial.config.model))
    if key not in _FACTS:
        try:
            found = model.architecture(trial.config.model)
        except InputError:  # reported when the model is loaded
            return _BaseFacts(drops=True, balances=True)
        drops = any(
            isinstance(share, float) and share > 0 and re.search("drop|jitter", name.rpartition(".")[2])
            for name, share in limits.numbers(found.to_dict())
        )
        _FACTS[key] = _BaseFacts(drops, balances=router_loss_weight(found) != 0)
    return _FACTS[key]


_FACTS: dict[str, _BaseFacts] = {}  # by model


def _length(trial: Trial) -> float:
    """The length of the training, in a unit that all trials of a pack share."""
    config = trial.config.train
    return config.steps if config.epochs is None else math.inf


def shared_settings(trial: Trial) -> str:
    """The settings that must be equal in the trials of a pack."""
    tree = trial.tree
    kept = {key: tree[key] for key in ("seed", "device", "model", "quant", "dataset", "eval")}
    own = {*PER_TRIAL, "eval_every"}
    kept["train"] = {key: value for key, value in tree["train"].items() if key not in own}
    kept["model_content"] = identity.model_identity(trial.config.model)
    kept["validated"] = trial.config.train.eval_every is not None  # its rows are taken from those to train on
    if trial.rows is not None:
        kept["rows"] = trial.rows.fingerprints
    return content_hash(kept)
