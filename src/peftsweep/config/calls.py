"""Check the classes and functions that a configuration names: their options against their signatures."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import json
import operator
import pydoc
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from peftsweep import limits, options, schema
from peftsweep.config.evaluations import HARNESS, ROWS_KEYS
from peftsweep.config.experiment import ORIGIN
from peftsweep.errors import InputError, first_line, right_form, some, suggest, synonyms
from peftsweep.schema import Config, LossOn, ModelConfig, RowsConfig, Task

SET_BY_OTHER_KEYS = {  # arguments of an optimizer that other keys set
    "lr": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    **dict.fromkeys(("params", "model"), "the method"),
}
DEVICE_MAP = re.compile(r"auto|balanced|balanced_low_0|sequential|disk|meta|(cpu|cuda|xpu|mps)(:\d+)?")
UNIONS = (typing.Union, types.UnionType)
SEARCHED = ("model", "train", "dataset", "targets", "adapter", "halving")  # sections to search for a mistyped key
METHOD_KEYS = ("method.r", "method.lora_alpha", "method.lora_dropout")  # that most methods have
GENERATION = "peftsweep.evaluation.evaluate.generation"
TEXT = "peftsweep.evaluation.text.overlap.generated_text"
LANGUAGE_MODEL_ONLY = ("peftsweep.evaluation.evaluate.perplexity", GENERATION, TEXT)
REQUIRED_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {  # the modules that a target needs, and their extra
    HARNESS: (("lm_eval",), "lm_eval"),
    "peftsweep.evaluation.metrics.math_verify_match": (("math_verify",), "lm_eval"),
}
# Options that must be numbers, although PEFT annotates them as optional.
NEVER_NULL = tuple(
    f"method.{name}"
    for name in (
        *("adapter_len", "adapter_layers", "num_virtual_tokens", "random_loc_seed", "total_step"),
        *("opt_projection_epsilon", "opt_projection_format_epsilon"),
    )
)
WORDS_IN_HELP = ("bias", "init_weights")  # options of type str whose allowed words are listed in their help
EXTRA_VALUES = {"init_lora_weights": r"lora_ga|pissa_niter_\d+"}  # values that PEFT accepts beside the annotated ones
NOTHING = r"(?!)"  # a pattern that no value matches, the empty one neither


def check_calls(config: Config, choices: Mapping[str, str | None]) -> None:
    """Check each ``_target_`` and its arguments; an InputError names the key."""
    for section in ("quant", "inference", "profiler", "tracker", "method_setup"):
        if (node := getattr(config, section)) and "_target_" not in node:
            group = section.removesuffix("_setup")
            others = [name for name in options.names(group, [Path(options.conf_dir())]) if name != choices.get(group)]
            lacking = f"{section}.{next(iter(node))}: {group}={choices.get(group)} has no such option"
            raise InputError(f"{lacking}; choose another {group}: {some(others)}")
    _check_method(config.method, str(choices.get("method")))
    if config.method_setup:
        check_call(config.method_setup, "method_setup", provided=("setting",))
    if config.quant:
        _check_quant(config.quant, str(choices.get("quant")))
    if config.inference:
        check_call(config.inference, "inference", provided=("variants", "tokenizer", "saved", "clock"))
    if config.profiler:
        check_call(config.profiler, "profiler", provided=("run", "folder", "device"))
    if config.tracker:
        check_call(config.tracker, "tracker", provided=("folder", "name", "study"))
    if not config.eval and not config.train.steps:
        raise InputError("eval: nothing is trained (train.steps=0) and nothing evaluated")
    _check_task(config)
    for name, node in config.eval.items():
        if "_target_" not in node:
            raise InputError(f"eval.{name}: no such key; {suggest(name, [o for o in config.eval if o != name])}")
        own_options = {key: value for key, value in node.items() if key not in ROWS_KEYS}
        check_call(own_options, f"eval.{name}", provided=("model", "tokenizer", "examples"), also=ROWS_KEYS)
        _check_types({key: node[key] for key in ROWS_KEYS if key in node}, RowsConfig, f"eval.{name}")
        _check_packages(node, f"eval.{name}")
    from peftsweep.evaluation import inference_plan
    from peftsweep.observe import profiler, tracker  # import torch, which `--help` must not do
    from peftsweep.training import compiled, length, optimizer

    if config.inference.get("_target_") == "peftsweep.evaluation.inference.benchmark":
        inference_plan.plan(**config.inference)
    if config.tracker:
        tracker.check(config.tracker["_target_"])
    if config.profiler.get("_target_") == "peftsweep.observe.profiler.operators":
        bound = inspect.signature(profiler.operators).bind_partial(**_without_target(config.profiler))
        bound.apply_defaults()
        profiler.check_schedule(*(bound.arguments[name] for name in ("wait", "warmup", "active")))
    _check_model(config.model)
    compiled.check(config.train)
    _check_optimizer(config.train.optimizer_kwargs, optimizer.find_optimizer(config.train.optimizer))
    length.interval(config.train, "eval_every", rows=1)
    length.checkpoint_due(config.train, rows=1)


def _check_quant(node: Mapping[str, Any], option: str) -> None:
    import torch  # `--help` must not import it

    from peftsweep.models.quantised import libraries

    if reason := libraries.problem(node, torch.cuda.device_count()):
        raise InputError(f"quant={option}: {reason}")
    check_call(node, "quant")
    library = libraries.BY_CONFIG.get(str(node["_target_"]).rpartition(".")[2])
    if library is libraries.BY_NAME["bitsandbytes"] and libraries.kind(node) == "none":
        raise InputError("quant.load_in_4bit: must be true, or quant.load_in_8bit; without quantisation: quant=none")


def _check_packages(node: Mapping[str, Any], key: str) -> None:
    """Refuse an evaluation, or a metric of it, that needs a package which is not installed."""
    from peftsweep.evaluation.text import overlap  # imports torch, which `--help` must not

    for inner, target in _targets(node):
        modules, extra = REQUIRED_PACKAGES.get(str(target), ((), ""))
        if target == TEXT:
            modules, extra = tuple(sorted(overlap.needed(node.get("metrics", overlap.METRICS)))), "text"
        if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
            full_key = f"{key}.{inner}" if inner else key
            raise InputError(f"{full_key}: needs the package {missing[0]}: pip install 'peftsweep[{extra}]'")


def _without_target(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}


def _check_method(node: Mapping[str, Any], option: str) -> None:
    """Check the method that ``method=option`` chose: its keys must be options of its config, of the right types.

    A key of another method may come from a sweep over methods, which gives it to all of them.
    """
    if not node:
        return
    if "_target_" not in node:  # keys of full fine-tuning
        raise _no_option(next(iter(node)), f"method={option}", [])
    config = pydoc.locate(str(node["_target_"]))
    if dataclasses.is_dataclass(config):
        known = [field.name for field in dataclasses.fields(config) if field.init and field.name not in ORIGIN]
        if set_here := [key for key in node if key in ORIGIN]:
            raise InputError(f"method.{set_here[0]}: is set by peftsweep, from model and method")
        for key in node:
            if key not in known and not key.startswith("_"):
                raise _no_option(key, f"method={option} ({node['_target_']})", known)
        _check_words(node, config)
    check_call(node, "method")
    for key in ("rank_pattern", "alpha_pattern"):  # PEFT annotates them as dictionaries of any values
        for module, number in dict(node.get(key) or {}).items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise InputError(f"method.{key}.{module}={number}: must be a number")


def _check_words(node: Mapping[str, Any], config: Any) -> None:
    """Refuse a word that PEFT's help of an option does not list, if the option has the type str."""
    for field in dataclasses.fields(config):
        if field.name in WORDS_IN_HELP and isinstance(word := node.get(field.name), str):
            words = re.findall(r"'(\w+)'", field.metadata.get("help", ""))
            hint = argument_types(config)[field.name]
            if words and str in (hint, *typing.get_args(hint)) and word not in words:
                others = [type_in_words(kind) for kind in typing.get_args(hint) if kind is not str]
                raise InputError(f"method.{field.name}={word}: must be {' or '.join([*others, one_of(words)])}")


def _no_option(key: str, method: str, known: list[str]) -> InputError:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # imports torch, which `--help` must not

    fields = {field.name for other in PEFT_TYPE_TO_CONFIG_MAPPING.values() for field in dataclasses.fields(other)}
    if key in fields:
        advice = f"run this method in a command of its own, without method.{key}; the study holds the trials of both"
    else:
        advice = suggest_key(key, known)
    return InputError(f"method.{key}: {method} has no such option; {advice}")


def _check_optimizer(options: Mapping[str, Any], make: Callable[..., Any]) -> None:
    known = _signature(make).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    for name in options:
        if name in SET_BY_OTHER_KEYS:
            raise InputError(f"train.optimizer_kwargs.{name}: is set by {SET_BY_OTHER_KEYS[name]}")
        if name not in known and not takes_all:
            names = [one for one in _parameters(make) if one not in SET_BY_OTHER_KEYS]
            raise InputError(
                f"train.optimizer_kwargs.{name}: {make.__name__} has no such option; {suggest(name, names)}"
            )
    hints = argument_types(make)
    _check_types({name: value for name, value in options.items() if name in hints}, make, "train.optimizer_kwargs")


def _check_model(model: ModelConfig) -> None:
    """Refuse values that transformers would refuse only when it loads the weights."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known, attention = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()], model.attn_implementation
    if attention is not None and attention not in known and "/" not in attention:  # with / it is a kernel on the hub
        raise InputError(f"model.attn_implementation={attention}: no such attention; {suggest(attention, known)}")
    places = model.device_map.values() if isinstance(model.device_map, Mapping) else [model.device_map]
    for place in places:
        if place is None or (isinstance(place, int) and not isinstance(place, bool) and place >= 0):
            continue
        if not (isinstance(place, str) and DEVICE_MAP.fullmatch(place)):
            raise InputError(f"model.device_map={model.device_map}: must be auto, a device, or modules with devices")


def _check_task(config: Config) -> None:
    """Refuse a classifier without classes, or with evaluations other than classification."""
    classifier = config.model.task is Task.seq_cls
    if classifier and len(config.dataset.classes) < 2:
        raise InputError(
            "dataset.classes: model.task=seq_cls needs the names of the classes, in the order of their numbers"
        )
    if classifier and config.dataset.loss_on is LossOn.text:
        raise InputError(
            "dataset.loss_on=text: a classifier (model.task=seq_cls) is trained on classes; must be answer"
        )
    if classifier and config.inference:
        raise InputError("inference: a classifier (model.task=seq_cls) generates no text; use inference=none")
    for name, node in config.eval.items():
        if classifier and node.get("_target_") in LANGUAGE_MODEL_ONLY:
            raise InputError(f"eval.{name}: a classifier (model.task=seq_cls) generates no text; use classification")
        if node.get("classes") == []:
            raise InputError(f"eval.{name}.classes: must name at least two classes (or dataset.classes must)")


def check_call(node: Mapping[str, Any], key: str, provided: Iterable[str] = (), also: Iterable[str] = ()) -> None:
    """Check that ``node`` names a callable by ``_target_`` and holds only its options, of the right types.

    ``provided`` are arguments that the caller adds; ``also`` are keys allowed beside the arguments.

    Raises:
        InputError: the message names the option and what is allowed.
    """
    target = node.get("_target_")
    if not isinstance(target, str):
        raise InputError(f"{key}._target_: must name a class or function, such as peft.LoraConfig")
    try:
        function = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise InputError(f"{key}._target_={target}: cannot be imported ({first_line(error)})") from None
    if not callable(function):
        raise InputError(f"{key}._target_={target}: no such class or function")
    _check_signature(function, [*provided], f"{key}._target_={target}")
    hints = argument_types(function)
    known = [name for name in _parameters(function) if name not in provided]
    for name, value in node.items():
        if name in ("_target_", "_partial_"):
            continue
        if name not in known:
            raise InputError(f"{key}.{name}: {target} has no such option; {suggest(name, [*known, *also])}")
        if isinstance(value, Mapping) and "_target_" in value:
            check_call(value, f"{key}.{name}", provided=("prediction", "answer"))
        elif isinstance(value, Mapping) and any(
            isinstance(one, Mapping) and "_target_" in one for one in value.values()
        ):
            for inner, one in value.items():
                check_call(one, f"{key}.{name}.{inner}", provided=("prediction", "answer"))
        elif name in hints and not re.fullmatch(EXTRA_VALUES.get(name, NOTHING), str(value)):
            default = _signature(function).parameters[name].default
            if value is None and f"{key}.{name}" in NEVER_NULL:
                raise InputError(f"{key}.{name}=null: must be a number")
            if not (value is None and default is None):  # some defaults are None against their annotation
                _check_types({name: value}, function, key)


def _check_signature(function: Callable[..., Any], provided: Sequence[str], target: str) -> None:
    """Refuse a function that takes fewer arguments than peftsweep passes."""
    kinds = inspect.Parameter
    takes = _signature(function).parameters.values()
    if any(one.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD) for one in takes):
        return
    if len(takes) < len(provided):
        raise InputError(f"{target}: cannot be called with {', '.join(provided)}")


def _check_types(values: Mapping[str, Any], described: Any, key: str) -> None:
    """Refuse a value that does not have the type in the annotation of a class or function."""
    hints = argument_types(described)
    for name, value in values.items():
        if not _has_type(value, hints[name]):
            where, part, hint = _wrong_value(f"{key}.{name}", value, hints[name])
            kind = type_in_words(hint)
            raise InputError(
                f"{where}={'null' if part is None else part}: must be {kind}{right_form(where, part, kind)}"
            )


def _wrong_value(key: str, value: Any, hint: Any) -> tuple[str, Any, Any]:
    """The innermost part of a value with a wrong type: its key, the part, and the right type."""
    for kind in typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,):
        parts: list[tuple[Any, Any, Any]] = []
        if isinstance(value, list) and typing.get_origin(kind) in (list, Sequence):
            parts = [(place, one, *typing.get_args(kind)) for place, one in enumerate(value)]
        elif isinstance(value, Mapping) and isinstance(kind, type) and dataclasses.is_dataclass(kind):
            parts = [(name, value[name], inner) for name, inner in argument_types(kind).items() if name in value]
        for name, one, inner in parts:
            if not _has_type(one, inner):
                return _wrong_value(f"{key}.{name}", one, inner)
    return key, value, hint


def one_of(words: Iterable[Any]) -> str:
    """``one of a, b``."""
    return "one of " + ", ".join(map(str, words))


def type_in_words(hint: Any) -> str:
    """A type in words, for messages and the reference: ``int or null``."""
    if typing.get_origin(hint) in UNIONS:
        kinds = {type_in_words(kind) for kind in typing.get_args(hint)}  # typing does not keep their order
        return " or ".join(sorted(kinds, key=lambda kind: (kind == "null", kind)))
    if typing.get_origin(hint) is typing.Literal:
        return one_of(typing.get_args(hint))
    if _is_enum(hint):
        return one_of(member.value for member in hint)
    if hint is type(None):
        return "null"
    text = inspect.formatannotation(hint).replace("typing.", "").replace("collections.abc.", "")
    return text.replace("Sequence[", "list[")


def numeric_options(tree: Mapping[str, Any]) -> dict[str, limits.Option]:
    """The numeric arguments of the classes and functions that a configuration names, by dotted key."""
    named = dict(_targets(tree)) | {"train.optimizer_kwargs": tree["train"]["optimizer"]}
    found: dict[str, limits.Option] = {}
    for key, target in named.items():
        with suppress(pydoc.ErrorDuringImport):  # `check_call` reports the error
            located = pydoc.locate(target if "." in str(target) else f"torch.optim.{target}")
            found |= {f"{key}.{name}": option for name, option in numbers_taken(located).items()}
    return found


def _targets(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        if name == "_target_":
            yield key, value
        yield from _targets(value, f"{key}.{name}" if key else str(name))


@functools.cache
def numbers_taken(function: Any) -> dict[str, limits.Option]:
    """The numeric arguments of a class or function, by name."""
    if not callable(function):
        return {}
    known = str(getattr(function, "__module__", "")).partition(".")[0] in ("peft", "peftsweep")
    hints = argument_types(function)
    kinds = {name: number_types(hints[name]) for name in _parameters(function) if name in hints}
    defaults = {name: _signature(function).parameters[name].default for name in kinds}
    return {
        name: limits.Option.of_type(whole=float not in kind, default=defaults[name], known=known)
        for name, kind in kinds.items()
        if kind
    }


def number_types(hint: Any) -> set[type]:
    """The number types, int and float, that a type allows."""
    if isinstance(hint, type):
        return {hint} & {int, float}
    return set().union(*map(number_types, typing.get_args(hint))) if typing.get_origin(hint) in UNIONS else set()


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


@functools.cache
def _parameters(function: Any) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in _signature(function).parameters.items() if p.kind not in variadic]


@functools.cache
def argument_types(function: Any) -> dict[str, Any]:
    """The types of the arguments of a class or function, by name; empty if they cannot be resolved."""
    described = function if dataclasses.is_dataclass(function) or not inspect.isclass(function) else function.__init__
    try:
        return {name: _yaml_type(hint) for name, hint in typing.get_type_hints(described).items()}
    except (NameError, TypeError):  # annotations for type checkers only
        return {}


def _yaml_type(hint: Any) -> Any:
    """A type without tensors, which no yaml can hold, and without the ``str`` that PEFT adds to enumerations."""
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return tuple[tuple(map(_yaml_type, kinds))]  # type: ignore[misc]
    if typing.get_origin(hint) not in UNIONS:
        return hint
    words = any(_is_enum(kind) or typing.get_origin(kind) is typing.Literal for kind in kinds)
    left = [kind for kind in kinds if not (words and kind is str) and getattr(kind, "__name__", "") != "Tensor"]
    return functools.reduce(operator.or_, left) if left else hint


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _has_type(value: Any, hint: Any) -> bool:
    import pydantic

    adapter = _adapter(hint)
    if adapter is None:
        return True
    try:
        # As JSON, so that a string may name an Enum's member; strict, so that "8" and true are not numbers.
        adapter.validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError:
        return False
    return True


@functools.cache
def _adapter(hint: Any) -> Any:
    """The pydantic adapter that checks values of the type; None for types such as torch.dtype."""
    import pydantic

    try:
        return pydantic.TypeAdapter(hint)
    except pydantic.PydanticUserError:
        return None


def suggest_key(wrong: str, known: list[str]) -> str:
    """A hint: a synonym in this section, a key of another section, or a key with a similar spelling."""
    kinds = schema.key_types(Config)
    others = [*METHOD_KEYS, *(f"{name}.{field.name}" for name in SEARCHED for field in dataclasses.fields(kinds[name]))]
    others += [*kinds, "hydra.launcher.workers"]
    if not synonyms(wrong, known) and (elsewhere := synonyms(wrong, others)):
        return f"did you mean '{elsewhere[0]}'?"
    return suggest(wrong, known)


def schema_type(key: str) -> str | None:
    """The type of a key of the schema in words; None for a key of an open section."""
    kind = schema.type_of(key)
    if kind is None or dataclasses.is_dataclass(kind) or kind is Any:
        return None
    inner = [one for one in typing.get_args(kind) or [kind] if one is not type(None)]
    if isinstance(inner[0], type) and issubclass(inner[0], Enum):
        return one_of([*inner[0].__members__, *(["null"] if len(typing.get_args(kind)) > 1 else [])])
    return type_in_words(kind)
