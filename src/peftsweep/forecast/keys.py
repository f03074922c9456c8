"""The keys of the caches of forecasts: all of a trial's configuration that changes what is cached, and no more."""

from __future__ import annotations

import pydoc
from typing import Any

from peftsweep.config import identity
from peftsweep.config.compose import Trial

# Keys of a configuration that change a forecast; the model counts by its content, not by its keys.
KEYS = ("device", "adapter", "method", "method_inputs", "method_setup", "targets", "quant", "eval", "train")
RATES = ("learning_rate", "learning_rate_scale", "schedule", "warmup", "weight_decay", "clip")  # do not change memory
SHAPING = ("optimizer", "optimizer_kwargs", "autocast_adapter_dtype")  # keys of train that change trained parameters


def model_key(trial: Trial) -> list[Any]:
    """The part of a forecast's cache key for the model: its files, its roles, the classes of its head."""
    model = trial.config.model
    return [identity.model_identity(model), model.roles, trial.config.dataset.classes]


def forecast_keys(trial: Trial) -> dict[str, Any]:
    """The values of the configuration that change a forecast, without the model."""
    train = {key: value for key, value in trial.tree["train"].items() if key not in RATES}
    return {key: trial.tree[key] for key in KEYS} | {"train": train}


def sizes_key(trial: Trial) -> str:
    """The cache key of a trial's sizes: all that changes which parameters are trained, on a base without quantisation.

    Training steps count only for a method that plans its ranks over them, such as AdaLoRA. Of a point, the words that
    name keys of its method decide which of these keys count.
    """
    tree = trial.tree
    settings = {key: tree[key] for key in ("method", "method_inputs", "method_setup", "targets")}
    train = {key: tree["train"][key] for key in SHAPING}
    if hasattr(pydoc.locate(str(trial.config.method.get("_target_"))), "total_step"):
        train["steps"] = trial.config.train.steps
    of_point = any(group.startswith("point") for group in trial.choices)
    words = [word for word in trial.overrides if of_point and word.lstrip("+").startswith("method.")]
    return identity.content_hash([*model_key(trial), settings, train, of_point, words])
