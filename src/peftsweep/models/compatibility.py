"""Which methods cannot be trained on which kind of base, and why.

Each rule was observed with PEFT 0.21, bitsandbytes 0.50, torchao 0.18 and quanto 0.2 on a CPU: the method fails, or it
silently trains something else. Such a trial is refused before anything is loaded, and its record holds the reason.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from peftsweep.errors import InputError, some, suggest

if TYPE_CHECKING:
    from torch import nn

PACKED = "it computes with the base's weights, which are packed in 4 bits and integers in 8 bits"
PACKED_4BIT = "it calculates with the base's weights, which 4-bit storage packs"
RAW_8BIT = "it would use the stored 8-bit integers as the weights, without their scales"
HEADLESS = "PEFT leaves the new head untrained, and training below a random head is meaningless"
CACHELESS = "it prepends keys and values to a cache, and the model has no cache"
RECOMPUTED = "layers that are recomputed in the backward pass find their keys and values in the cache twice"
UNSCALED = "gradients in 16 bits cannot be unscaled: use train.autocast=bfloat16 or model.dtype=float32"
UNKNOWN_TO_TORCHAO = "it computes with the base's weights, and torchao's weights do not support the operation"
MERGE_OF_TORCHAO = "PEFT does not pass it the settings of torchao that it needs"
IN_PLACE = "it changes the output of a layer in place, which quanto's autograd forbids"
AUTOCAST_OF_QUANTO = "autocast changes the dtype of weights, which quanto's do not allow; use model.dtype=bfloat16"
# Methods whose virtual tokens are keys and values in the cache: class of the configuration -> its peft_type.
PREFIX_METHODS = {"PrefixTuningConfig": "PREFIX_TUNING", "CartridgeConfig": "CARTRIDGE"}
BOTH = ("4bit", "8bit")  # the kinds of bitsandbytes
SUBCLASSES = ("torchao", "quanto")
QUANTISED = (*BOTH, *SUBCLASSES, "untested")
ANY = ("none", *QUANTISED)
KINDS = {  # of bases
    "none": "on a base that is not quantised",
    "4bit": "on a 4bit base",
    "8bit": "on an 8bit base",
    "torchao": "on a base quantised by torchao",
    "quanto": "on a base quantised by quanto",
    "quanto autocast": "on a base quantised by quanto with train.autocast",
    "narrow 8bit": "on an 8bit base whose other weights have 16 bits",
    "classifier": "with a classifier's head",
    "encoder": "on an encoder",
    "checkpointing": "with train.checkpointing=true",
    "float16": "with model.dtype=float16 and train.autocast=float16",
    "float16 adapter": "with model.dtype=float16, train.autocast=float16 and train.autocast_adapter_dtype=false",
}


@dataclass(frozen=True)
class Rule:
    """A PEFT config class, for certain options or for all, that does not work on some kinds of base."""

    config: str
    kinds: tuple[str, ...]
    reason: str
    when: Mapping[str, Any] = field(default_factory=dict)  # the values of options for which the rule holds

    def holds(self, config: str, options: Mapping[str, Any], kind: str) -> bool:
        """Whether the rule refuses this method on this kind of base."""
        matches = all(_matches(options.get(key), value) for key, value in self.when.items())
        return config == self.config and kind in self.kinds and matches


UNQUANTISED: dict[str, dict[str, Any]] = {  # initialisations of LoRA that need unquantised weights
    "PiSSA": {"init_lora_weights": "pissa*", "method_setup": None},
    "MiCA": {"init_lora_weights": "mica"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "the orthogonal initialisation": {"init_lora_weights": "orthogonal"},
}
REPLACING: dict[str, dict[str, Any]] = {  # options of LoRA with which PEFT changes the base's weights
    "PiSSA": {"init_lora_weights": "pissa*"},
    "OLoRA": {"init_lora_weights": "olora"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "KaSA": {"kasa_config": Mapping},
}
RULES = (
    *(
        Rule(config, BOTH, PACKED)
        for config in (
            *("AdamssConfig", "DeloraConfig", "FrodConfig", "GloraConfig", "OSFConfig", "PsoftConfig"),
            *("SupertuningConfig", "TinyLoraConfig"),
        )
    ),
    *(Rule(c, ("4bit",), PACKED_4BIT) for c in ("DeftConfig", "HRAConfig", "LoHaConfig", "LoKrConfig", "PeanutConfig")),
    *(Rule(config, ("8bit",), RAW_8BIT) for config in ("DeftConfig", "HRAConfig", "PeanutConfig")),
    Rule(
        "UniLoraConfig",
        BOTH,
        "its scales are cast to the integer type of the stored weights, so it would learn nothing",
    ),
    Rule("XLoraConfig", ANY, "it needs trained adapters to mix: method.adapters={a: DIR, b: DIR}", {"adapters": None}),
    Rule(
        "AdaLoraConfig",
        ANY,
        "method.rank_pattern is a result of its training and cannot be set",
        {"rank_pattern": Mapping},
    ),
    Rule("XLoraConfig", BOTH, "its router calls the quantised layers with arguments that they do not accept"),
    *(
        Rule("LoraConfig", BOTH, f"{name} decomposes the base's weights, which must be floating-point numbers", when)
        for name, when in UNQUANTISED.items()
    ),
    *(
        Rule(config, ("torchao",), UNKNOWN_TO_TORCHAO)
        for config in (
            *("AdamssConfig", "DeftConfig", "DeloraConfig", "FrodConfig", "GloraConfig", "HiraConfig", "HRAConfig"),
            *("OSFConfig", "PeanutConfig", "PsoftConfig", "SupertuningConfig", "TinyLoraConfig"),
        )
    ),
    *(
        Rule(config, ("torchao",), MERGE_OF_TORCHAO)
        for config in ("BOFTConfig", "MissConfig", "OFTConfig", "ShiraConfig", "VeraConfig")
    ),
    *(Rule(config, ("quanto",), IN_PLACE) for config in ("AdaLoraConfig", "C3AConfig", "GraloraConfig", "PolyConfig")),
    Rule("FrodConfig", ("quanto",), "it casts the base's weights, which quanto's do not allow"),
    Rule("GloraConfig", ("quanto",), "it supports plain linear layers only"),
    *(
        Rule("LoraConfig", SUBCLASSES, f"{name} replaces the base's weights, which would be quantised again", when)
        for name, when in REPLACING.items()
    ),
    Rule("LoraConfig", ("torchao",), "PEFT's layers for torchao have no such biases", {"lora_bias": True}),
    Rule("LoraConfig", ("quanto",), IN_PLACE, {"alora_invocation_tokens": Sequence}),
    Rule("LoraConfig", ("quanto",), "quanto's weights cannot be copied", {"layer_replication": Sequence}),
    Rule("LoraConfig", ("torchao",), f"MiCA: {UNKNOWN_TO_TORCHAO}", {"init_lora_weights": "mica"}),
    Rule("LoraConfig", ("8bit",), "its residual would have to be quantised again", {"init_lora_weights": "pissa*"}),
    Rule(
        "LoraConfig",
        ("none", "8bit", *SUBCLASSES),
        "LoftQ corrects the error of 4-bit quantisation, and needs a 4-bit base",
        {"method_setup": "peftsweep.models.initialise.loftq"},
    ),
    Rule("LoraConfig", ANY, "PEFT's own LoftQ runs on CUDA only; use method=loftq", {"init_lora_weights": "loftq"}),
    Rule("LoraConfig", ("8bit",), "DoRA loses the scales of 8-bit weights after the first step", {"use_dora": True}),
    Rule("LoraConfig", BOTH, "KaSA on quantised layers is silently plain LoRA", {"kasa_config": Mapping}),
    Rule("LoraConfig", BOTH, "MonteCLoRA on quantised layers is silently plain LoRA", {"monteclora_config": Mapping}),
    Rule("ShiraConfig", ("narrow 8bit",), "it multiplies 32-bit weights with 16-bit inputs; take model.dtype=float32"),
    Rule("AdaptionPromptConfig", ("classifier",), HEADLESS),
    Rule("TrainableTokensConfig", ("classifier",), HEADLESS),
    Rule("CPTConfig", ("classifier",), "its loss is that of a language model"),
    Rule("ShadowConfig", ("classifier",), "its second path is a decoder that writes text"),
    *(Rule(config, ("encoder",), CACHELESS) for config in PREFIX_METHODS),
    *(Rule(config, ("checkpointing",), RECOMPUTED) for config in PREFIX_METHODS),
    Rule("PolyConfig", ("checkpointing",), "its layers get their tasks in the forward pass only"),
    *(
        Rule(config, ("float16",), UNSCALED)
        for config in (
            "AdaptionPromptConfig",
            "LNTuningConfig",
            "ShadowConfig",
        )  # which train weights of the base's format
    ),
    Rule("LoraConfig", ("float16",), UNSCALED, {"method_setup": "peftsweep.models.initialise.eva"}),
    Rule("LoraConfig", BOTH, "VeLoRA does not support quantised layers", {"velora_config": Mapping}),
)
# The lowest transformers with which no PEFT up to this release generates rightly where a method has virtual tokens: it
# writes other texts with a prefix in batches of another size, and ends in an IndexError with GPT-2.
WRITES_OTHERWISE = {"transformers": (5, 24), "peft": (0, 21)}
FULL = "full fine-tuning cannot train quantised weights; take quant=none or an adapter method"


def refusal(method: Mapping[str, Any], kinds: Iterable[str]) -> str | None:
    """Why ``method`` (a PEFT config's ``_target_`` and options) cannot be trained on such a base; None where it can."""
    for kind in kinds:
        if not method and kind in QUANTISED:
            return FULL
        if kind == "quanto autocast":
            return f"not {KINDS[kind]}: {AUTOCAST_OF_QUANTO}"
        if kind == "float16 adapter" or (kind == "float16" and not method):
            return f"not {KINDS[kind]}: {UNSCALED}"
        config = method.get("_target_", "").rpartition(".")[2]
        for rule in RULES:
            if rule.holds(config, method, kind):
                return rule.reason if rule.kinds == ANY else f"not {KINDS[kind]}: {rule.reason}"
    return None


def check_generation(virtual_tokens: int) -> None:
    """Refuse to generate behind so many virtual tokens where the installed packages would write other texts.

    Raises:
        InputError: the message names the packages.
    """
    installed = {name: version(name) for name in WRITES_OTHERWISE}
    releases = {name: tuple(map(int, re.findall(r"\d+", found)[:2])) for name, found in installed.items()}
    right = releases["transformers"] < WRITES_OTHERWISE["transformers"] or releases["peft"] > WRITES_OTHERWISE["peft"]
    if right or not virtual_tokens:
        return
    raise InputError(
        f"method: PEFT {installed['peft']} with transformers {installed['transformers']} generates wrong texts where a "
        "method has virtual tokens; pip install 'transformers<5.24', or take an evaluation that generates none, such "
        "as eval=perplexity"
    )


def checkpointing_refusal(model: type) -> str | None:
    """Why transformers cannot train the class ``model`` with gradient checkpointing; None if it can."""
    if getattr(model, "supports_gradient_checkpointing", True):
        return None
    return f"not {KINDS['checkpointing']}: transformers' {model.__name__} does not support it"


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return isinstance(value, wanted)
    if isinstance(wanted, str) and wanted.endswith("*"):
        return isinstance(value, str) and value.startswith(wanted[:-1])
    return bool(value == wanted)


# ---- modules, layers and tokens that options name --------------------------------------------------

ADAPTED = "module that gets an adapter"
PEFT_HEADS = ("classifier", "score")  # names that PEFT adds to modules_to_save of a classifier
# Initial weights of LoRA for which PEFT takes the attribute ``weight`` of the adapted module.
DECOMPOSING = ("pissa", "corda", "olora", "loftq", "orthogonal", "lora_ga", "mica")
TOKENS = ("token_indices", "trainable_token_indices", "cpt_token_ids", "alora_invocation_tokens")
ANY_LAYER = r"[^.]*"  # the name before a layer's number without layers_pattern


def check_names(method: Any, base: nn.Module, config: Any) -> None:
    """Refuse modules, parameters, layers and tokens that a PEFT config names and ``base`` lacks.

    PEFT ignores most of them silently. ``base`` may be on the meta device; ``config`` is transformers' configuration
    of its text part.

    Raises:
        InputError: the message names the option, what the base lacks, and what it has.
    """
    modules = [name for name, _ in base.named_modules() if name]
    innermost = [
        name
        for name, module in base.named_modules()
        if next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None
    ]
    heads = PEFT_HEADS if type(base).__name__.endswith("ForSequenceClassification") else ()
    _check_each(method, "exclude_modules", innermost, "innermost module of the model")
    _check_each(method, "modules_to_save", [*modules, *heads], "module of the model", before="")
    _check_each(method, "target_parameters", [name for name, _ in base.named_parameters()], "parameter of the model")
    for key, pattern in _patterns(method):
        _found(pattern, modules, f"method.{key}: '{pattern}'")  # raises if it is not a regular expression
    _check_layers(method, modules)
    check_tokens(vars(method), base)
    if hasattr(method, "num_virtual_tokens"):
        _check_virtual_tokens(method, config, _embeddings(base).shape[1])
    if method.peft_type == "ADALORA" and method.target_r > method.init_r:
        raise InputError(
            f"method.target_r={method.target_r}: must be at most method.init_r={method.init_r}: AdaLoRA removes ranks"
        )


def check_tokens(method: Mapping[str, Any], base: nn.Module) -> None:
    """Refuse tokens among the options of ``method`` that ``base`` has no embedding for.

    Raises:
        InputError: the message names the option and the number of embeddings.
    """
    tokens = len(_embeddings(base))
    for key in TOKENS:
        given = method.get(key) or []
        for token in [n for numbers in given.values() for n in numbers] if isinstance(given, Mapping) else given:
            if token >= tokens:
                raise InputError(f"method.{key}: the model has no embedding for token {token}; it has {tokens}")


def _embeddings(base: Any) -> Any:
    """The weight of the input embeddings, [tokens, width]."""
    return base.get_input_embeddings().weight


def aim_at_parameters(method: Any, base: nn.Module) -> None:
    """Have ``layers_to_transform`` and ``exclude_modules`` hold for ``method.target_parameters`` too.

    PEFT asks both for modules alone and would adapt the parameters, such as experts, in all layers. Where they leave
    some out, the others are listed one by one.

    Raises:
        InputError: they leave out all, or the adapters are to begin with a decomposition, which needs a module.
    """
    ends = getattr(method, "target_parameters", None) or ()
    names = [name for name, _ in base.named_parameters() if any(f".{name}".endswith(f".{end}") for end in ends)]
    modules = dict(base.named_modules())
    begins = getattr(method, "init_lora_weights", None)
    if isinstance(begins, str) and begins.lower().startswith(DECOMPOSING):
        for name in names:
            if not hasattr(modules[name.rpartition(".")[0]], "weight"):
                raise InputError(
                    f"method.init_lora_weights={begins}: decomposes weights of modules, and {name} is a parameter; "
                    "take other initial weights, or leave it out of the targets"
                )
    wanted, patterns = (_listed(getattr(method, key, None)) for key in ("layers_to_transform", "layers_pattern"))
    kept = [name for name in names if not _is_excluded(method, name)]
    if wanted:
        reached = {name: {n for one in patterns or [ANY_LAYER] for n in _layers(one, [name])} for name in kept}
        kept = [name for name in kept if reached[name] & set(wanted)]
    if names and not kept:
        raise InputError(
            "method.target_parameters: method.layers_to_transform and method.exclude_modules leave none of them; "
            f"they are {some(names)}"
        )
    if len(kept) < len(names):
        method.target_parameters = kept


def _is_excluded(method: Any, name: str) -> bool:
    """Whether ``exclude_modules`` names a parameter, or its module, as PEFT reads the option."""
    given = getattr(method, "exclude_modules", None) or ()
    names = (name, name.rpartition(".")[0])
    if isinstance(given, str):
        return any(re.fullmatch(given, one) for one in names)
    return any(f".{one}".endswith(f".{end}") for one in names for end in given)


@contextmanager
def options_as_given() -> Iterator[None]:
    """In the body PEFT raises ValueError where it would only warn and change a given number."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*Adjusted `\w+` to \(\d+\)")
        try:
            yield
        except UserWarning as warning:
            name, instead = re.findall(r"Adjusted `(\w+)` to \((\d+)\)", str(warning))[0]
            raise ValueError(f"{name} must divide the modules' sizes; PEFT would use {instead}") from warning


def check_adapted(method: Any, adapted: Sequence[str]) -> None:
    """Refuse patterns and layers that match none of ``adapted``, the full names of the modules with an adapter.

    ``method`` is the PEFT config as it was given, before target modules were set and an initialisation changed it.

    Raises:
        InputError: as ``check_names``.
    """
    if not adapted:
        return
    for key, pattern in _patterns(method):
        # OSF searches the pattern anywhere in a name, all others at its end.
        whole = pattern if method.peft_type == "OSF" else rf"^(.*\.)?({pattern})$"
        if not _found(whole, adapted, f"method.{key}: '{pattern}'"):
            raise _nothing(key, pattern, adapted, ADAPTED)
    _check_each(method, "feedforward_modules", adapted, ADAPTED)
    wanted, patterns = (_listed(getattr(method, key, None)) for key in ("layers_to_transform", "layers_pattern"))
    reached = {number for pattern in patterns or [ANY_LAYER] for number in _layers(pattern, adapted)}
    for layer in wanted:
        if layer not in reached:
            raise InputError(f"method.layers_to_transform: no module of layer {layer} is adapted")


def _patterns(method: Any) -> list[tuple[str, str]]:
    """The options such as ``rank_pattern``, each with the patterns of modules that it holds."""
    options = [(key, given) for key, given in vars(method).items() if key.endswith("_pattern")]
    return [(key, pattern) for key, given in options if isinstance(given, Mapping) for pattern in given]


def _check_each(method: Any, key: str, names: Sequence[str], kind: str, before: str = ".") -> None:
    """Each item of a list must end one of ``names``, after ``before``; a regular expression must match a name."""
    given = getattr(method, key, None) or ()
    if isinstance(given, str):
        if not _found(rf"^(?:{given})$", names, f"method.{key}: '{given}'"):
            raise _nothing(key, given, names, kind)
        return
    for one in sorted(given):
        if not any(name == one or name.endswith(f"{before}{one}") for name in names):
            raise _nothing(key, one, names, kind)


def _found(pattern: str, names: Sequence[str], option: str) -> list[re.Match[str]]:
    """The matches of ``pattern`` in ``names``; an error begins with ``option``, the option and its value."""
    try:
        return [found for name in names if (found := re.search(pattern, name))]
    except re.error as error:
        raise InputError(f"{option} is not a regular expression: {error}") from error


def _nothing(key: str, option: str, names: Sequence[str], kind: str) -> InputError:
    parts = 2 if key == "target_parameters" else 1  # parts at the end of a name that identify it
    ends = sorted({".".join(name.split(".")[-parts:]) for name in names} - set(map(str, range(len(names)))))
    nearest = ".".join(option.split(".")[-parts:])
    return InputError(f"method.{key}: '{option}' matches no {kind}; {suggest(nearest, ends)}")


def _check_layers(method: Any, modules: Sequence[str]) -> None:
    wanted, patterns = (_listed(getattr(method, key, None)) for key in ("layers_to_transform", "layers_pattern"))
    if patterns and not wanted:
        raise InputError(
            "method.layers_pattern: needs method.layers_to_transform, the numbers of layers after the pattern"
        )
    for pattern in patterns:
        if not _layers(pattern, modules):
            numbered = sorted({name.split(".")[-2] for name in modules if re.search(r"[^.]+\.\d+$", name)})
            raise InputError(
                f"method.layers_pattern: no module has a number after '{pattern}'; {suggest(pattern, numbered)}"
            )
    known = {number for pattern in patterns or [ANY_LAYER] for number in _layers(pattern, modules)}
    count = max(known, default=-1) + 1
    replicated = getattr(method, "layer_replication", None) or ()
    for layer in wanted:
        if layer not in known and not replicated:
            raise InputError(f"method.layers_to_transform: the model has no layer {layer}; it has 0 to {count - 1}")
    for start, end in replicated:
        if not 0 <= start < end <= count:
            raise InputError(
                f"method.layer_replication=[{start},{end}]: must be [start,end], layers with start below end "
                f"and end at most {count}"
            )


def _layers(pattern: str, names: Sequence[str]) -> set[int]:
    """The numbers of layers in ``names`` as PEFT reads them: the first number after ``pattern``."""
    whole = rf"^(?:|.*?\.)(?:{pattern})\.(?P<layer>\d+)(?:\.|$)"
    return {int(match["layer"]) for match in _found(whole, names, f"method.layers_pattern: '{pattern}'")}


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, int | str) and given != "" else list(given or ())


def _check_virtual_tokens(method: Any, config: Any, width: int) -> None:
    """Refuse sizes that differ from the model's: PEFT reads them from the model only if they are not given."""
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and method.num_layers not in (None, layers):
        raise InputError(f"method.num_layers={method.num_layers}: must be {layers} or null, the layers of the model")
    if method.num_transformer_submodules not in (None, 1):
        raise InputError(
            f"method.num_transformer_submodules={method.num_transformer_submodules}: must be 1 or null, because "
            "the model has one stack of layers"
        )
    into_cache = method.peft_type in PREFIX_METHODS.values()  # their width may be that of some layers only
    if not into_cache and method.token_dim not in (None, width):
        raise InputError(f"method.token_dim={method.token_dim}: must be {width} or null, the width of the embeddings")
