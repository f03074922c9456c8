"""Experiments as PEFT's method comparison keeps them: a folder with adapter_config.json and training_params.json.

``adapter`` and ``training`` read the two files as values of a trial's keys; what evaluates is left to ``eval``.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftsweep.errors import InputError, suggest

ADAPTER_FILE, TRAINING_FILE = "adapter_config.json", "training_params.json"
# Of an adapter_config.json, what says where it came from and not what it is.
ORIGIN = (
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    "megatron_core",
    "task_type",  # the model's task decides
)
DEFAULTS: dict[str, Any] = {  # of PEFT's comparison on MetaMathQA
    "max_seq_length": 768,
    "batch_size": 4,
    "max_steps": 5000,
    "use_gc": False,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
}
KEYS = {  # theirs and ours, where the value is the same
    "max_seq_length": "dataset.max_length",
    "query_template": "dataset.prompt",
    "batch_size": "train.batch_size",
    "max_steps": "train.steps",
    "use_gc": "train.checkpointing",
    "grad_norm_clip": "train.clip",
    "autocast_adapter_dtype": "train.autocast_adapter_dtype",
    "dtype": "model.dtype",
    "attn_implementation": "model.attn_implementation",
    "seed": "seed",
}
OPTIMIZERS = {
    "lora+": "peft.optimizers.create_loraplus_optimizer",
    "lora-fa": "peft.optimizers.create_lorafa_optimizer",
    "riemannian": "peft.optimizers.create_riemannian_optimizer",
}
# The model is the trial's, compiling and evaluating are told by keys of their own.
ELSEWHERE = ("model_id", "batch_size_eval", "eval_steps", "compile", "generation_kwargs")
TRANSLATED = ("optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp", "init_kv_cache_prefix")


def folders(root: str) -> list[Path]:
    """The experiments below ``root``, in order of their names.

    Raises:
        InputError: there is none.
    """
    found = {file.parent for name in (ADAPTER_FILE, TRAINING_FILE) for file in Path(root).expanduser().rglob(name)}
    if not found:
        raise InputError(f"experiments={root}: no folder below it holds an {ADAPTER_FILE} or a {TRAINING_FILE}")
    return sorted(found)


def label(folder: str) -> str:
    """How PEFT's comparison calls the experiment in ``folder``: lora/llama-3.2-3B-rank32."""
    return "/".join(Path(folder).expanduser().resolve().parts[-2:])


def adapter(folder: str) -> dict[str, Any]:
    """The method of the experiment in ``folder``, as a node with ``_target_``; without a file it is full fine-tuning.

    Raises:
        InputError: there is no such folder, the file cannot be read, or PEFT knows no such method or option.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # takes seconds, which `--help` has not

    if not Path(folder).expanduser().is_dir():
        raise InputError(f"method.path={folder}: no such folder")
    file = Path(folder).expanduser() / ADAPTER_FILE
    if not file.is_file():
        if (file.parent / TRAINING_FILE).is_file():
            return {}
        raise InputError(f"method.path={folder}: holds no {ADAPTER_FILE}")
    said = _read(file, "method.path")
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(said.get("peft_type"))
    if kind not in kinds:
        raise InputError(
            f"method.path={file}: peft_type {kind}: PEFT knows no such method; {suggest(kind, list(kinds))}"
        )
    config = kinds[kind]
    hints, fields = typing.get_type_hints(config), {field.name: field for field in dataclasses.fields(config)}
    method: dict[str, Any] = {"_target_": f"peft.{config.__name__}"}
    for name, value in said.items():
        if name in ORIGIN:
            continue
        if name not in fields:
            if value in (None, False, {}, []):
                continue  # of another version of PEFT, and not made use of
            raise InputError(f"method.path={file}: {config.__name__} has no {name}; {suggest(name, list(fields))}")
        method[name] = _nested(value, hints[name])
    return method


def base_model(folder: Path) -> str | None:
    """The hub id or folder of the base that a saved adapter names."""
    said = _read(folder / ADAPTER_FILE, "adapter.path")
    name = said.get("base_model_name_or_path")
    return str(name) if name else None


def training(path: str) -> dict[str, Any]:
    """The keys that a training_params.json sets, dotted, over the defaults of PEFT's comparison.

    A folder stands for the file in it, or for the defaults alone where it holds none.

    Raises:
        InputError: there is no such file, it cannot be read, or it says something unknown.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file /= TRAINING_FILE
    elif not file.is_file():
        raise InputError(f"train.params_file={path}: no such file")
    return translated(_read(file, "train.params_file") if file.is_file() else {}, f"train.params_file={file}")


def translated(parameters: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The keys that training parameters of PEFT's comparison set, dotted, over its defaults.

    Raises:
        InputError: one is unknown; ``source`` says where it stands.
    """
    said = DEFAULTS | dict(parameters)
    known = (*KEYS, *TRANSLATED, *ELSEWHERE)
    for name in said:
        if name not in known:
            raise InputError(f"{source}: {name}: no such parameter; {suggest(name, list(known))}")
    keys = {ours: said[theirs] for theirs, ours in KEYS.items() if theirs in said}
    kind, options = said["optimizer_type"], dict(said["optimizer_kwargs"])
    keys["train.optimizer"] = OPTIMIZERS.get(str(kind).lower(), f"torch.optim.{kind}")
    keys["train.learning_rate"] = options.pop("lr", 1e-3)  # torch's own
    keys["train.learning_rate_scale"] = 1.0
    keys["train.weight_decay"] = options.pop("weight_decay", 0.01)  # torch's own
    keys["train.optimizer_kwargs"] = options
    if said["lr_scheduler"] not in ("cosine", None):
        raise InputError(f"{source}: lr_scheduler must be cosine or null")
    cosine = said["lr_scheduler"] == "cosine"
    keys |= {"train.schedule": "cosine" if cosine else "constant", "train.warmup": 0.1 if cosine else 0.0}
    keys["train.autocast"] = "bfloat16" if said["use_amp"] else None
    if text := said.get("init_kv_cache_prefix"):
        keys["method_setup"] = {"_target_": "peftsweep.initialise.prefix_from_text", "text": text}
    return keys


def _read(file: Path, key: str) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{key}={file}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(said, dict):
        raise InputError(f"{key}={file}: not a JSON object")
    return said


def _nested(value: Any, hint: Any) -> Any:
    """A config within a config, such as ``kasa_config``, with the class that PEFT wants there."""
    if isinstance(value, dict):
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                return {"_target_": f"{option.__module__}.{option.__qualname__}"} | value
    return value
