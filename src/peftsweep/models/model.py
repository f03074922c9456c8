"""The base: its configuration, its tokenizer and its weights, from a folder, the hub or random numbers."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.base import get_keys_to_not_convert

from peftsweep.data import files, hub
from peftsweep.errors import InputError, suggest
from peftsweep.models.checkpoint.weights import NEW_PARTS, check_end_marks, foreseen, has_own_head, lacking, new_parts
from peftsweep.models.parts import (
    base_of,
    classifies,
    defer_router_loss,
    head_names,
    never_called,
    text_config,
    text_part,
)
from peftsweep.models.quantised.layers import is_quantised, not_quantised, patch_layers
from peftsweep.schema import Init, ModelConfig, Task
from peftsweep.study import store

TINY = Path(__file__).parents[1] / "tiny" / "weights"
COMMIT = "peftsweep_commit"  # the attribute of a base that holds the hub's commit of its weights
ROTARY = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # transformers moves them into rope_parameters
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")  # names of the longest sequence
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # a warning of transformers' tokenizers
OWN_CODE = {"trust_remote_code": False}  # without it transformers asks on the terminal whether to run a model's code
# transformers would load the adapter into the base
WITH_ADAPTER = "holds an adapter beside the model (adapter_config.json); move it, adapter.path=FOLDER evaluates it"
NATIVE = "must be an architecture of transformers"
BROKEN_WEIGHTS = (OSError, EOFError, SafetensorError, pickle.UnpicklingError)  # errors of reading a file of weights
# Keys of quantization configs for modules that are not quantised.
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
CLASSES: dict[Task, Any] = {Task.causal_lm: AutoModelForCausalLM, Task.seq_cls: AutoModelForSequenceClassification}
_LACKING: dict[str, list[str]] = {}  # results of ``check_weights``, by the files and the configuration
_LIMITS: dict[str, int | None] = {}  # results of ``positions``, by the whole configuration


def source(model: ModelConfig) -> str:
    """The hub id or the local folder of ``model.name_or_path``.

    Raises:
        InputError: it is the path of no folder, or empty.
    """
    if model.name_or_path == "tiny":
        return str(TINY)
    looks_local = model.name_or_path.startswith((".", "/", "~")) or model.name_or_path.count("/") > 1
    if not model.name_or_path.strip():
        raise InputError("model.name_or_path: must be given, a folder or the ORG/NAME of the hub")
    if Path(model.name_or_path).expanduser().is_file():
        raise InputError(f"model.name_or_path={model.name_or_path}: is a file; must be the folder of a checkpoint")
    if looks_local and not Path(model.name_or_path).expanduser().is_dir():
        hint = files.similar(Path(model.name_or_path))
        raise InputError(f"model.name_or_path={model.name_or_path}: no such folder{hint}")
    return str(Path(model.name_or_path).expanduser()) if looks_local else model.name_or_path


def device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first CUDA device, else the CPU. CUDA is not initialised.

    Raises:
        InputError: the name is unknown, or there is no such device.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise InputError(f"device={name}: must be auto, cpu, cuda, or cuda:1 for the second CUDA device")
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    number = int(found[1] or 0)
    if number >= count:
        there = ", ".join(f"cuda:{n}" for n in range(count)) or "none"
        other = "device=auto uses the first one" if count else "device=cpu uses the CPU"
        raise InputError(f"device={name}: no such CUDA device; there are: {there}; {other}; see peftsweep-doctor")
    return torch.device("cuda", number)


def architecture(model: ModelConfig) -> transformers.PreTrainedConfig:
    """The model's transformers configuration, from its yaml for presets, else from its folder or the hub.

    Raises:
        InputError: it cannot be found, or transformers does not know ``model.architecture``.
    """
    if model.architecture:
        return _described(dict(model.architecture))
    if model.init is Init.random:
        raise InputError("model.init=random needs model.architecture (model_type and sizes), as the presets have")
    with _loading(model):
        file = Path(source(model), "config.json")
        read = _pickled if file.is_file() else _pickled.__wrapped__  # the hub's may change between two calls
        found = pickle.loads(read(source(model), _revision(model), file.read_bytes() if file.is_file() else b""))
    if model.task is Task.causal_lm and getattr(found, "is_encoder_decoder", False):
        raise InputError(
            f"model.name_or_path={model.name_or_path}: is an encoder with a decoder (model_type {found.model_type}), "
            "which no task supports; must be a decoder, or an encoder"
        )
    for config in (found, text_config(found)):  # what its author's calls were to return is no part of the model
        config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    return cast(transformers.PreTrainedConfig, found)


@functools.lru_cache(maxsize=64)
def _pickled(place: str, revision: str, text: bytes) -> bytes:
    """A checkpoint's configuration, read by transformers again when ``text``, its config.json, has changed."""
    return pickle.dumps(AutoConfig.from_pretrained(place, revision=revision, **OWN_CODE))


def _revision(model: ModelConfig) -> str:
    """The commit of the model's repository to load; ``main`` for a local folder."""
    return "main" if is_local(model) else hub.config_of_model(source(model), model.revision).parent.name


@contextmanager
def _loading(model: ModelConfig, part: str = "") -> Iterator[None]:
    """Turn errors of loading ``part`` of the model, by default the model, in the body into one clear message.

    Raises:
        InputError: it cannot be loaded.
    """
    key = f"model.name_or_path={model.name_or_path}"
    with nullcontext() if is_local(model) else hub.loading(key, "a local folder"):
        try:
            yield
        except Exception as error:  # parsers, type checks and arithmetic with sizes raise many types
            if "trust_remote_code" in str(error):
                raise InputError(f"{key}: needs its own code (auto_map), which is never run; {NATIVE}") from error
            if isinstance(error, InputError) or not is_local(model):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{key}: {part + ' ' if part else ''}cannot be loaded ({reason})") from error


def is_local(model: ModelConfig) -> bool:
    """Whether nothing of the model is on the hub: it is a folder, or has random weights."""
    return model.init is Init.random or Path(source(model)).is_dir()


def check_cached(model: ModelConfig) -> None:
    """If the hub does not answer, check that the files of the model are in the local cache.

    Raises:
        InputError: they are not.
    """
    if is_local(model) or hub.problem() is None:
        return
    with _loading(model):
        folder = Path(snapshot_download(source(model), revision=_revision(model), local_files_only=True))
        if not any(file.suffix in store.WEIGHTS for file in folder.iterdir()):
            raise OSError("no weights")
    load_tokenizer(model)


def _described(fields: dict[str, Any]) -> transformers.PreTrainedConfig:
    if "model_type" not in fields:
        raise InputError("model.architecture.model_type: must be given, such as llama")
    kind = str(fields.pop("model_type"))
    if kind not in CONFIG_MAPPING:
        known = suggest(kind, list(CONFIG_MAPPING))
        raise InputError(f"model.architecture.model_type={kind}: transformers has no such architecture; {known}")
    default = AutoConfig.for_model(kind)
    for name in fields:
        if not hasattr(default, name) and name not in ROTARY:
            raise InputError(f"model.architecture.{name}: no such key; {suggest(name, sorted(default.to_dict()))}")
    try:
        described = type(default)(**fields)
    except Exception as error:  # transformers checks types and computes with sizes: any type of error
        reason = re.sub(r".*\b\w+Error: ", "", " ".join(str(error).split()))
        if found := re.match(r"Field '(\w+)' expected ([^,]+)", reason):
            raise InputError(f"model.architecture.{found[1]}={fields[found[1]]}: must be {found[2]}") from None
        if found := re.match(r"Field '(\w+)' with value", reason):
            raise InputError(f"model.architecture.{found[1]}={fields[found[1]]}: is of a wrong type") from None
        raise InputError(f"model.architecture: {reason}") from None
    heads, shared = (getattr(described, f"num_{of}_heads", None) for of in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(shared, int) and shared and heads % shared:
        raise InputError(f"model.architecture.num_key_value_heads={shared}: must divide num_attention_heads={heads}")
    return described


def skeleton(model: ModelConfig, where: str = "meta", classes: int = 0) -> PreTrainedModel:
    """The base without its weights, to attach a method and to count parameters.

    On the meta device it takes no memory; on another device its weights are random. A classifier has ``classes``
    outputs.
    """
    with torch.device(where):
        base = made(model, _shape(model, classes), dtype=getattr(torch, model.dtype.value))
    if model.task is Task.seq_cls:
        setattr(base, NEW_PARTS, check_weights(model, classes))
    return base


def check_weights(model: ModelConfig, classes: int = 0) -> list[str]:
    """The modules of a classifier that the checkpoint lacks, by the headers of its files; empty if there are no files.

    Raises:
        InputError: as ``load``, where weights are missing or left out.
    """
    if model.init is Init.random:
        return []
    try:
        folder = Path(source(model)) if is_local(model) else hub.config_of_model(source(model), model.revision).parent
    except Exception:  # of the hub's client: where the files are needed, loading says why they cannot be had
        return []
    shape = _shape(model, classes)
    states = sorted((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    held = [(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states]
    key = repr((str(folder), held, model.task, shape.to_json_string(use_diff=False)))
    if key not in _LACKING:
        with torch.device("meta"):
            bare = made(model, shape)
        _LACKING[key] = foreseen(bare, folder, f"model.name_or_path={model.name_or_path}")
    return _LACKING[key]


def made(model: ModelConfig, config: transformers.PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of the configuration ``config`` with random weights, for the task of ``model``.

    Raises:
        InputError: transformers has no such model for the task, or cannot build it.
    """
    try:
        base = cast(PreTrainedModel, defer_router_loss(CLASSES[model.task].from_config(config, **options)))
    except ValueError as error:  # transformers has no model of this type for the task
        what = "causal language model" if model.task is Task.causal_lm else "classifier"
        raise InputError(
            f"model.task={model.task.value}: {model.name_or_path} is not a {what} (model_type {config.model_type})"
        ) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        key = (
            "model.architecture:" if model.architecture else f"model.name_or_path={model.name_or_path}: its config.json"
        )
        raise InputError(f"{key} describes no model that transformers can build ({reason})") from error
    try:
        base.get_input_embeddings()
    except NotImplementedError as error:
        kind = f"model_type {config.model_type}"
        raise InputError(f"model.name_or_path={model.name_or_path}: has no embeddings of tokens ({kind})") from error
    return base


def _shape(model: ModelConfig, classes: int) -> transformers.PreTrainedConfig:
    config = architecture(model)
    if model.task is Task.seq_cls:
        config.num_labels = classes
    elif getattr(text_config(config), "tie_word_embeddings", False) and not model.architecture and is_local(model):
        made_as = AutoModelForCausalLM._model_mapping.get(type(config), None)
        if has_own_head(Path(source(model)), getattr(made_as, "_tied_weights_keys", None) or {}):
            config.tie_word_embeddings = text_config(config).tie_word_embeddings = False
    return config


def commit(base: PreTrainedModel) -> str | None:
    """The hub's commit that the base was loaded from; None for a local folder."""
    return getattr(base, COMMIT, None)


def token_limit(model: nn.Module) -> int | None:
    """The largest number of tokens in a sequence, virtual tokens included; None if there is no limit.

    It is the least of the limits in the text configuration and the rows of learned position embeddings, without the
    rows that some architectures reserve (OPT's ``offset``, RoBERTa's padding).
    """
    config = text_config(base_of(model))
    limits = [getattr(config, name, None) for name in POSITIONS]
    for name, module in text_part(base_of(model)).named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and re.search("^wpe$|pos", leaf) and "rel" not in leaf:
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - int(getattr(module, "offset", 0)) - unused)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def positions(model: ModelConfig) -> int | None:
    """``token_limit`` of a model that is not loaded, by its configuration alone."""
    config = architecture(model)
    key = f"{model.task.name} {config.to_json_string(use_diff=False)}"
    if key not in _LIMITS:
        with torch.device("meta"):
            _LIMITS[key] = token_limit(made(model, copy.deepcopy(config)))
    return _LIMITS[key]


def load_tokenizer(model: ModelConfig, virtual_tokens: int = 0) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or the embedded one for random weights. Without a pad token it pads with EOS.

    Its ``model_max_length`` is the number of the model's positions without ``virtual_tokens``, which a method puts
    before every row.

    Raises:
        InputError: there is no tokenizer, or its special tokens do not fit the model.
    """
    folder = str(TINY) if model.init is Init.random else source(model)
    key = f"model.name_or_path={model.name_or_path}"
    with _loading(model, "its tokenizer"):
        found: Any = AutoTokenizer.from_pretrained(folder, revision=_revision(model), **OWN_CODE)
    tokenizer = cast(PreTrainedTokenizerBase, found)
    if hasattr(found, "deprecation_warnings"):  # rows are cut, and the cuts counted, after they are in tokens
        found.deprecation_warnings[TOO_LONG] = True
    limit = positions(model)
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        raise InputError(f"{key}: model_max_length={longest!r} in its tokenizer_config.json: must be a number")
    if model.init is Init.random:
        tokenizer.model_max_length = limit or tokenizer.model_max_length
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit) - virtual_tokens
    if tokenizer.model_max_length < 2:
        raise InputError(f"method: {virtual_tokens} virtual tokens leave no room in the model's {limit} positions")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    shape = architecture(model)
    _check_marks(tokenizer, model, getattr(text_config(shape), "vocab_size", math.inf), key)
    mark = shape.eos_token_id if model.task is Task.seq_cls and getattr(shape, "is_encoder_decoder", False) else None
    if mark is not None and mark not in tokenizer("text").input_ids:
        raise InputError(f"{key}: its classifier reads the end mark, token {mark}, which its tokenizer adds to no text")
    return tokenizer


def _check_marks(tokenizer: PreTrainedTokenizerBase, model: ModelConfig, vocabulary: float, key: str) -> None:
    """Refuse a tokenizer without EOS or padding token, or with special tokens that the model has no embedding for."""
    if model.task is Task.causal_lm and tokenizer.eos_token_id is None:
        raise InputError(f"{key}: its tokenizer has no eos_token to end an answer with")
    if tokenizer.pad_token_id is None:
        raise InputError(f"{key}: its tokenizer has neither a pad_token nor an eos_token to pad with")
    for name in ("pad_token", "eos_token", "bos_token", "cls_token", "sep_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number >= vocabulary:
            raise InputError(
                f"{key}: the {name} {getattr(tokenizer, name)!r} of its tokenizer is number {number}, "
                f"outside of the model's {vocabulary:,} embeddings"
            )


def load(
    model: ModelConfig, quantization: Any, where: torch.device, classes: int = 0, seed: int = 0
) -> PreTrainedModel:
    """The frozen base on ``where``, in eval mode; ``quantization`` is a transformers quantization config or None.

    A classifier gets ``classes`` outputs. A head or other parts that the checkpoint lacks (``new_parts``) are
    initialised from ``seed``, and are never quantised.

    Raises:
        InputError: the checkpoint lacks weights of the model, or has them in other shapes.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype.value), "config": _shape(model, classes)}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if quantization is not None and (model.task is Task.seq_cls or never_called(options["config"])):
        spare(quantization, skeleton(model, classes=classes))
    if model.init is Init.random:
        base = _random(model, quantization, where, options)
    else:
        options |= {"revision": _revision(model), "device_map": model.device_map or {"": where}}
        base = _pretrained(model, quantization, options, seed)
        if any(is_quantised(base.get_submodule(name)) for name in new_parts(base)):
            name = next(name for name in SKIPPED if hasattr(quantization, name))
            setattr(quantization, name, [*getattr(quantization, name), *new_parts(base)])
            base = _pretrained(model, quantization, options, seed)  # parts that are trained are never quantised
        setattr(base, COMMIT, None if is_local(model) else options["revision"])
    patch_layers(base)
    base.requires_grad_(False)
    return cast(PreTrainedModel, defer_router_loss(base.eval()))


def spare(quantization: Any, base: PreTrainedModel) -> None:
    """Exclude from ``quantization`` what a classifier trains beside the adapter, and layers that are never called."""
    name = next((name for name in SKIPPED if hasattr(quantization, name)), None)
    heads = [*head_names(base), *new_parts(base)] if classifies(base) else []
    if name is None or not (own := [*dict.fromkeys((*heads, *never_called(base)))]):
        return
    excluded = getattr(quantization, name)
    if excluded is None:  # our list would replace transformers' own choice, such as the output head, so include it
        excluded = [] if heads else get_keys_to_not_convert(base)
    setattr(quantization, name, [*excluded, *own])


def _pretrained(model: ModelConfig, quantization: Any, options: dict[str, Any], seed: int) -> PreTrainedModel:
    """The model with the weights of its checkpoint, which must be complete, except for parts of a classifier."""
    torch.manual_seed(seed)
    try:
        base, info = CLASSES[model.task].from_pretrained(
            source(model),
            quantization_config=quantization,
            ignore_mismatched_sizes=True,  # the message below names them
            output_loading_info=True,
            **options,
            **OWN_CODE,
        )
    except BROKEN_WEIGHTS:
        with _loading(model, "its weights"):  # raises a clear message
            raise
    except (TypeError, ValueError, KeyError, AttributeError):  # such as of a generation_config.json
        with _loading(model):
            raise
    if getattr(base, "_hf_peft_config_loaded", False):
        raise InputError(f"model.name_or_path={model.name_or_path}: {WITH_ADAPTER}")
    key = f"model.name_or_path={model.name_or_path}"
    if quantization is None and (problem := not_quantised(base)):
        raise InputError(f"{key}: {problem}")
    setattr(base, NEW_PARTS, lacking(base, info, key))
    if model.task is Task.causal_lm:
        check_end_marks(getattr(getattr(base, "generation_config", None), "eos_token_id", None), key)
    return cast(PreTrainedModel, base)


def _random(model: ModelConfig, quantization: Any, where: torch.device, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)  # the base is the same for every seed of a trial
    with where:
        base = CLASSES[model.task].from_config(**options)
    if quantization is None:
        return cast(PreTrainedModel, base)
    # transformers quantises while it loads weights, so the random weights are passed as a checkpoint.
    weights = base.state_dict()
    return cast(
        PreTrainedModel,
        type(base).from_pretrained(
            None,
            state_dict=weights,
            quantization_config=quantization,
            device_map={"": where},
            **options,
        ),
    )
