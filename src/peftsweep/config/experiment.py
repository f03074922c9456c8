"""Experiments in the layout of PEFT's method comparison: a folder with adapter_config.json and training_params.json.

``read`` turns the files of a folder into keys of a trial, and notes for each field whether it was used.
A folder of PEFT's text generation benchmark has benchmark_params.json beside adapter_config.json.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftsweep.config.experiment_keys import (
    BENCHMARK,
    BITSANDBYTES,
    CATEGORIES,
    DEFAULTS,
    EVALUATIONS,
    INFERENCE,
    KEYS,
    MODEL,
    OPTIMIZERS,
    OTHER_FIELDS,
    PARAMETERS,
    QUANTISED,
)
from peftsweep.errors import InputError, suggest
from peftsweep.study.reading import Unreadable, fault, read_json

ADAPTER_FILE, BENCHMARK_FILE = "adapter_config.json", "benchmark_params.json"
TRAINING_FILES = ("training_params.json", "training_parameters.json")  # the names in PEFT's code and in its README
FILES = (ADAPTER_FILE, BENCHMARK_FILE, *TRAINING_FILES)
# Fields of an adapter_config.json that say where an adapter came from.
ORIGIN = (
    *("peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode"),
    "megatron_core",
    "task_type",  # the model's task decides
)
FIELDS_WITHOUT_EFFECT = {  # fields that change no number of a trial, and need no warning
    "peft_version": "the installed version of PEFT is used",
    "auto_mapping": "names the class that was adapted",
    "inference_mode": "a trial trains its adapter",
    "megatron_core": "only for the parallel layers of Megatron",
    "task_type": "model.task sets it",
}
UNSET = "is unset"
NO_MODEL_NAMED = "names no model: the model of the sweep is used"
OVERRIDDEN = "the command line sets"
# Reasons that need no warning; the last two are the former words of the two before, which older records hold.
QUIET_REASONS = (UNSET, NO_MODEL_NAMED, OVERRIDDEN, "names no model: that of the sweep stands", "the command line says")


@dataclass
class Reading:
    """The keys of a trial that files set, and for each field its keys, or the reason why it was not used."""

    keys: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, list[str]] = field(default_factory=dict)  # field -> the keys it went to
    not_taken: dict[str, str] = field(default_factory=dict)  # field -> why

    def put(self, name: str, key: str, value: Any) -> None:
        """Put the value of the field ``name`` under ``key``."""
        self.keys[key] = value
        self.taken.setdefault(name, []).append(key)

    def refuse(self, key: str, reason: str) -> None:
        """Remove ``key``; ``reason`` is noted for the fields that had set it."""
        self.keys.pop(key, None)
        for name in [name for name, keys in self.taken.items() if key in keys]:
            self.taken[name].remove(key)
            self.not_taken[name] = reason
            if not self.taken[name]:
                del self.taken[name]

    def only(self, names: Mapping[str, Any]) -> Reading:
        """The same keys, with notes only for the fields ``names`` of the file; the others are defaults."""
        taken = {name: keys for name, keys in self.taken.items() if name.partition(".")[0] in names}
        return Reading(self.keys, taken, self.not_taken)

    def __or__(self, other: Reading) -> Reading:
        """Both readings; the second one takes precedence."""
        return Reading(self.keys | other.keys, self.taken | other.taken, self.not_taken | other.not_taken)

    def facts(self) -> dict[str, dict[str, str]]:
        """For the record: the keys of each field, and the reason for each field that was not used."""
        return {"taken": {name: ", ".join(keys) for name, keys in self.taken.items()}, "not_taken": self.not_taken}


def unheeded(facts: Mapping[str, Mapping[str, str]]) -> str | None:
    """A warning with the fields that were not used although they matter; None if there are none."""
    reasons = [
        f"{name} ({why})"
        for name, why in facts.get("not_taken", {}).items()
        if name not in FIELDS_WITHOUT_EFFECT and not why.startswith(QUIET_REASONS)
    ]
    return f"fields of the experiment's files that are not used: {'; '.join(reasons)}" if reasons else None


def folders(root: str | None) -> list[Path]:
    """The experiments below ``root``, in order of their names.

    Raises:
        InputError: there is none.
    """
    if root is None:
        raise InputError("experiments: must be given: the folder of the experiments")
    found = {file.parent for name in FILES for file in Path(root).expanduser().rglob(name)}
    if not found:
        raise InputError(f"experiments={root}: no folder below it holds an {ADAPTER_FILE} or a {TRAINING_FILES[0]}")
    return sorted(found)


def label(folder: str) -> str:
    """The name of the experiment in ``folder`` in PEFT's comparison, such as lora/llama-3.2-3B-rank32."""
    return "/".join(Path(folder).expanduser().resolve().parts[-2:])


def read(folder: str | None, parameters: str | None) -> Reading:
    """Read the experiment in ``folder``, with the training parameters in ``parameters``, a file or folder.

    Without ``parameters`` those in ``folder`` are read, if there are any. The keys ``method`` and ``quant`` are nodes
    with ``_target_``; keys of ``eval.*`` are for every evaluation that generates text.

    Raises:
        InputError: the file or folder does not exist or cannot be read, or a field is unknown or impossible.
    """
    found = adapter(folder) if folder is not None else Reading()
    if folder is not None and parameters is None and training_file(Path(folder).expanduser()):
        parameters = folder
    if parameters is not None:
        found = _models_agree(found, training(parameters))
    if folder is not None and (file := Path(folder).expanduser() / BENCHMARK_FILE).is_file():
        found = _models_agree(found, benchmark(_read(file, "method.path"), f"method.path={file}"))
    return found


def _models_agree(first: Reading, second: Reading) -> Reading:
    """Both readings; if both name a model, the second one holds, as where PEFT loads the model."""
    if MODEL in first.keys and MODEL in second.keys and first.keys[MODEL] != second.keys[MODEL]:
        first.refuse(MODEL, f"model_id is {second.keys[MODEL]}")
        first.refuse("model.revision", f"model_id is {second.keys[MODEL]}")
    twice = {name for name in (*second.taken, *second.not_taken) if name in first.taken or name in first.not_taken}
    taken = {f"benchmark_params.{name}" if name in twice else name: keys for name, keys in second.taken.items()}
    not_taken = {f"benchmark_params.{name}" if name in twice else name: why for name, why in second.not_taken.items()}
    return first | Reading(second.keys, taken, not_taken)


# ---- the method ------------------------------------------------------------------------------------


def adapter(folder: str) -> Reading:
    """The method of the experiment in ``folder``, a node with ``_target_``; without a file full fine-tuning.

    Raises:
        InputError: the folder does not exist, the file cannot be read, or PEFT has no such method or option.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # imports torch, which takes seconds

    if not Path(folder).expanduser().is_dir():
        raise InputError(f"method.path={folder}: no such folder")
    file = Path(folder).expanduser() / ADAPTER_FILE
    if not file.is_file():
        if training_file(file.parent) or (file.parent / BENCHMARK_FILE).is_file():
            return Reading({"method": {}})
        raise InputError(f"method.path={folder}: holds no {ADAPTER_FILE}")
    options = _read(file, "method.path")
    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(options.get("peft_type"))
    if kind not in kinds:
        raise InputError(f"method.path={file}: peft_type {kind}: PEFT has no such method; {suggest(kind, list(kinds))}")
    return _options(options, kinds[kind], file)


def _options(options: Mapping[str, Any], config: Any, file: Path) -> Reading:
    hints, fields = typing.get_type_hints(config), {one.name: one for one in dataclasses.fields(config)}
    method: dict[str, Any] = {"_target_": f"peft.{config.__name__}"}
    found = Reading({"method": method}, {"peft_type": ["method._target_"]})
    for name, value in options.items():
        if name in FIELDS_WITHOUT_EFFECT:
            found.not_taken[name] = FIELDS_WITHOUT_EFFECT[name]
        elif name == "base_model_name_or_path":
            _take_model(found, name, value)
        elif name == "revision":
            if value is None or not options.get("base_model_name_or_path"):
                found.not_taken[name] = UNSET if value is None else "no base_model_name_or_path names its model"
            else:
                found.put(name, "model.revision", value)
        elif name in fields and name not in ORIGIN:
            method[name] = _nested(value, hints[name])
            found.taken[name] = [f"method.{name}"]
        elif name not in ORIGIN:
            if value not in (None, False, {}, []):
                raise InputError(f"method.path={file}: {config.__name__} has no {name}; {suggest(name, list(fields))}")
            found.not_taken[name] = UNSET
    return found


def _take_model(found: Reading, name: str, value: Any) -> None:
    if value:
        found.put(name, MODEL, str(value))
    else:
        found.not_taken[name] = NO_MODEL_NAMED


# ---- training --------------------------------------------------------------------------------------


def training_file(folder: Path) -> Path | None:
    """The file of training parameters in ``folder``, under either of its names; None if there is none.

    Raises:
        InputError: it holds both.
    """
    found = [folder / name for name in TRAINING_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: holds both {' and '.join(TRAINING_FILES)}; must hold one of them")
    return found[0] if found else None


def training(path: str) -> Reading:
    """The dotted keys that a training_params.json sets, with the defaults of PEFT's comparison for the others.

    For a folder, its file is read; without one, only the defaults hold.

    Raises:
        InputError: the file does not exist or cannot be read, or a field is unknown.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        own = training_file(file)
        return translated(_read(own, "train.params_file") if own else {}, f"train.params_file={own or file}")
    if not file.is_file():
        raise InputError(f"train.params_file={path}: no such file")
    return translated(_read(file, "train.params_file"), f"train.params_file={file}")


def translated(parameters: Mapping[str, Any], source: str) -> Reading:
    """The dotted keys that training parameters of PEFT's comparison set, with its defaults for the others.

    Raises:
        InputError: a parameter is unknown or impossible; the message begins with ``source``.
    """
    values = DEFAULTS | dict(parameters)
    known = (*KEYS, *OTHER_FIELDS)
    for name in values:
        if name not in known:
            raise InputError(f"{source}: {name}: no such parameter; {suggest(name, list(known))}")
    if wrong := fault(dict(parameters), PARAMETERS):
        raise InputError(f"{source}: {wrong}")
    found = Reading()
    for theirs, ours in KEYS.items():
        if theirs in values and theirs not in ("dtype", "query_template"):
            found.put(theirs, ours, values[theirs])
    _take_optimizer(found, values, source)
    _take_validation(found, values, parameters, source)
    _take_numbers(found, values, source)
    if "model_id" in values:
        _take_model(found, "model_id", values["model_id"])
    if "compile" in values:
        found.put("compile", "train.compile", "inductor" if values["compile"] else "none")
        found.put("compile", "train.compile_dynamic", True if values["compile"] else None)
    if "query_template" in values:
        if "{query}" not in str(values["query_template"]):
            raise InputError(f"{source}: query_template must contain {{query}}")
        found.put("query_template", "dataset.prompt", values["query_template"])
        found.put("query_template", f"{EVALUATIONS}prompt", values["query_template"])
    if text := values.get("init_kv_cache_prefix"):
        node = {"_target_": "peftsweep.models.initialise.prefix_from_text", "text": text}
        found.put("init_kv_cache_prefix", "method_setup", node)
    elif "init_kv_cache_prefix" in values:
        found.taken["init_kv_cache_prefix"] = ["method_setup"]
    return found.only(parameters)


def _take_optimizer(found: Reading, fields: Mapping[str, Any], source: str) -> None:
    kind, options = fields["optimizer_type"], dict(fields["optimizer_kwargs"])
    found.put("optimizer_type", "train.optimizer", OPTIMIZERS.get(str(kind).lower(), f"torch.optim.{kind}"))
    found.put("optimizer_kwargs", "train.learning_rate", options.pop("lr", 1e-3))  # torch's default
    found.put("optimizer_kwargs", "train.weight_decay", options.pop("weight_decay", 0.01))  # torch's default
    found.put("optimizer_kwargs", "train.optimizer_kwargs", options)
    found.keys["train.learning_rate_scale"] = 1.0
    if fields["lr_scheduler"] not in ("cosine", None):
        raise InputError(f"{source}: lr_scheduler must be cosine or null")
    cosine = fields["lr_scheduler"] == "cosine"
    found.put("lr_scheduler", "train.schedule", "cosine" if cosine else "constant")
    found.put("lr_scheduler", "train.warmup", 0.1 if cosine else 0.0)


def _take_validation(found: Reading, fields: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
    """Take the interval, the batch size and the number of new tokens of the validation."""
    every, steps = fields["eval_steps"], fields["max_steps"]
    if every is not None:
        if not isinstance(every, int) or every < 1 or ("eval_steps" in own and every > steps):
            raise InputError(f"{source}: eval_steps={every}: must be a number of steps, at most max_steps={steps}")
        found.put("eval_steps", "train.eval_every", str(min(every, steps)))
    if "batch_size_eval" in fields:
        found.put("batch_size_eval", f"{EVALUATIONS}batch_size", fields["batch_size_eval"])
    for name, value in (fields.get("generation_kwargs") or {}).items():
        theirs = f"generation_kwargs.{name}"
        if name in ("max_new_tokens", "num_beams"):
            found.put("generation_kwargs", f"{EVALUATIONS}{name}", value)
        elif name == "max_length":
            found.not_taken[theirs] = (
                "there is no limit for prompt and generated tokens together; max_new_tokens limits generated tokens"
            )
        elif (name, value) == ("do_sample", False) or value is None:
            found.taken[theirs] = ["evaluations do so"]
        else:
            found.not_taken[theirs] = "evaluations decode greedily or by beam search"


def _take_numbers(found: Reading, fields: Mapping[str, Any], source: str) -> None:
    """Take the number formats of the base's weights and of autocast."""
    # PEFT's comparison calls torch.autocast with float16, and scales the loss.
    found.put("use_amp", "train.autocast", "float16" if fields["use_amp"] else None)
    dtype = fields.get("dtype")
    if dtype in QUANTISED:
        found.put("dtype", "quant", QUANTISED[dtype])
    elif dtype in ("float32", "float16", "bfloat16"):
        found.put("dtype", "model.dtype", dtype)
    elif dtype is not None:
        raise InputError(f"{source}: dtype={dtype}: must be float32, float16, bfloat16, int8 or int4")


# ---- inference -------------------------------------------------------------------------------------


def benchmark(fields: Mapping[str, Any], source: str) -> Reading:
    """The keys that parameters of PEFT's text generation benchmark set.

    Raises:
        InputError: one is of a wrong type.
    """
    if wrong := fault(dict(fields), BENCHMARK):
        raise InputError(f"{source}: {wrong}")
    found = Reading()
    for name, ours in INFERENCE.items():
        if fields.get(name) is not None:
            found.put(name, ours, fields[name])
    found.keys["inference"] = "standard"
    for category in CATEGORIES if "max_new_tokens" in fields else ():
        found.put("max_new_tokens", f"inference.categories.{category}.new_tokens", fields["max_new_tokens"])
    for category, options in (fields.get("category_generation_params") or {}).items():
        if not isinstance(options, dict) or set(options) - {"max_new_tokens"}:
            raise InputError(f"{source}: category_generation_params.{category}: must hold only max_new_tokens")
        for value in options.values():
            found.put("category_generation_params", f"inference.categories.{category}.new_tokens", value)
    dtype = fields.get("dtype")
    if dtype is not None:
        if dtype not in ("float32", "float16", "bfloat16"):
            raise InputError(f"{source}: dtype={dtype}: must be float32, float16 or bfloat16")
        found.put("dtype", "model.dtype", dtype)
    _take_bits(found, fields, str(dtype or "float16"))
    for name in fields:
        if name not in found.taken:
            found.not_taken[name] = UNSET if fields[name] in (None, False) else "inference has no such option"
    return found


def _take_bits(found: Reading, fields: Mapping[str, Any], dtype: str) -> None:
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    if fields.get("use_8bit"):
        node = {"_target_": BITSANDBYTES, "load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}
        found.put("use_8bit", "quant", node)
    elif fields.get("use_4bit"):
        found.put("use_4bit", "quant", {"_target_": BITSANDBYTES, "load_in_4bit": True} | nf4)


def _read(file: Path, key: str) -> dict[str, Any]:
    try:
        content: Any = read_json(file)
    except Unreadable as error:
        raise InputError(f"{key}={file}: cannot be read: {str(error).removeprefix(f'{file}: ')}") from None
    if not isinstance(content, dict):
        raise InputError(f"{key}={file}: not a JSON object")
    return content


def _nested(value: Any, hint: Any) -> Any:
    """A config inside a config, such as ``kasa_config``, with the class that PEFT expects."""
    if isinstance(value, dict):
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                return {"_target_": f"{option.__module__}.{option.__qualname__}"} | value
    return value
