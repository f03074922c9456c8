"""Which methods cannot be trained on which kind of base, and why.

Each rule was seen with PEFT 0.21 and bitsandbytes 0.50 on a CPU: the method fails, or it runs and is silently
something else. Such a trial is refused before anything is loaded, and its record says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PACKED = "it calculates with the base's weights, which 4-bit storage packs and 8-bit storage keeps as integers"
PACKED_4BIT = "it calculates with the base's weights, which 4-bit storage packs"
RAW_8BIT = "it would take the stored 8-bit integers for the weights, without their scales"
HEADLESS = "PEFT leaves the new head untrained, and what is trained below a random head means nothing"
CACHELESS = "it prepends keys and values, and the model takes none"
RECOMPUTED = "the layers, computed again in the backward pass, find their keys and values in the cache twice"
UNSCALED = "gradients of 16 bits cannot be unscaled: take train.autocast=bfloat16 or model.dtype=float32"
BOTH = ("4bit", "8bit")
ANY = ("none", *BOTH)
KINDS = {  # of bases
    "none": "on a base that is not quantised",
    "4bit": "on a 4bit base",
    "8bit": "on an 8bit base",
    "narrow 8bit": "on an 8bit base whose other weights have 16 bits",
    "classifier": "with a classifier's head",
    "encoder": "on an encoder",
    "checkpointing": "with train.checkpointing=true",
    "float16": "with model.dtype=float16 and train.autocast=float16",
    "float16 adapter": "with model.dtype=float16, train.autocast=float16 and train.autocast_adapter_dtype=false",
}


@dataclass(frozen=True)
class Rule:
    """A PEFT config class, perhaps with certain options, that does not work on some kinds of base."""

    config: str
    kinds: tuple[str, ...]
    reason: str
    when: Mapping[str, Any] = field(default_factory=dict)  # options and the values that the rule is about

    def holds(self, config: str, options: Mapping[str, Any], kind: str) -> bool:
        """Whether the rule is about this method on this kind of base."""
        matches = all(_matches(options.get(key), value) for key, value in self.when.items())
        return config == self.config and kind in self.kinds and matches


UNQUANTISED: dict[str, dict[str, Any]] = {  # initialisations of LoRA from the weights
    "PiSSA": {"init_lora_weights": "pissa*", "method_setup": None},
    "MiCA": {"init_lora_weights": "mica"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "the orthogonal initialisation": {"init_lora_weights": "orthogonal"},
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
        "UniLoraConfig", BOTH, "its scales are cast to the integer type of the stored weights: nothing would be learned"
    ),
    Rule("XLoraConfig", ANY, "it mixes adapters trained before: method.adapters={a: DIR, b: DIR}", {"adapters": None}),
    Rule("XLoraConfig", BOTH, "its router calls the quantised layers with arguments they do not take"),
    *(
        Rule("LoraConfig", BOTH, f"{name} takes apart the base's weights, which must be floating point", when)
        for name, when in UNQUANTISED.items()
    ),
    Rule("LoraConfig", ("8bit",), "its residual would have to be quantised again", {"init_lora_weights": "pissa*"}),
    Rule(
        "LoraConfig",
        ("none", "8bit"),
        "LoftQ makes up for 4-bit storage",
        {"method_setup": "peftsweep.models.initialise.loftq"},
    ),
    Rule("LoraConfig", ANY, "PEFT's own LoftQ runs on CUDA only; take method=loftq", {"init_lora_weights": "loftq"}),
    Rule("LoraConfig", ("8bit",), "DoRA loses the scales of 8-bit weights after the first step", {"use_dora": True}),
    Rule("LoraConfig", BOTH, "KaSA on quantised layers is silently plain LoRA", {"kasa_config": Mapping}),
    Rule("LoraConfig", BOTH, "MonteCLoRA on quantised layers is silently plain LoRA", {"monteclora_config": Mapping}),
    Rule("ShiraConfig", ("narrow 8bit",), "it multiplies 32-bit weights with 16-bit inputs; take model.dtype=float32"),
    Rule("AdaptionPromptConfig", ("classifier",), HEADLESS),
    Rule("TrainableTokensConfig", ("classifier",), HEADLESS),
    Rule("CPTConfig", ("classifier",), "its loss is that of a language model"),
    Rule("ShadowConfig", ("classifier",), "its second path is a decoder that writes text"),
    Rule("PrefixTuningConfig", ("encoder",), CACHELESS),
    Rule("CartridgeConfig", ("encoder",), CACHELESS),
    *(Rule(config, ("checkpointing",), RECOMPUTED) for config in ("PrefixTuningConfig", "CartridgeConfig")),
    Rule("PolyConfig", ("checkpointing",), "its layers are told of their tasks in the forward pass only"),
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
FULL = "full fine-tuning cannot train quantised weights; take quant=none or an adapter method"


def stored(quant: Mapping[str, Any]) -> str:
    """The kind of base that a transformers quantization config makes."""
    return "4bit" if quant.get("load_in_4bit") else "8bit" if quant.get("load_in_8bit") else "none"


def refusal(method: Mapping[str, Any], kinds: Iterable[str]) -> str | None:
    """Why ``method`` (a PEFT config's ``_target_`` and options) cannot be trained on such a base; None where it can."""
    for kind in kinds:
        if not method and kind in BOTH:
            return FULL
        if kind == "float16 adapter" or (kind == "float16" and not method):
            return f"not {KINDS[kind]}: {UNSCALED}"
        config = method.get("_target_", "").rpartition(".")[2]
        for rule in RULES:
            if rule.holds(config, method, kind):
                return rule.reason if rule.kinds == ANY else f"not {KINDS[kind]}: {rule.reason}"
    return None


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return isinstance(value, wanted)
    if isinstance(wanted, str) and wanted.endswith("*"):
        return isinstance(value, str) and value.startswith(wanted[:-1])
    return bool(value == wanted)
