"""Which methods cannot be trained on which quantised base, and why.

Each rule was seen with PEFT 0.21 and bitsandbytes 0.50 on a CPU: the method fails, or it runs and is silently
something else. Such a trial is refused before anything is loaded, and its record says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PACKED = "it calculates with the base's weights, which 4-bit storage packs and 8-bit storage keeps as integers"
PACKED_4BIT = "it calculates with the base's weights, which 4-bit storage packs"
RAW_8BIT = "it would take the stored 8-bit integers for the weights, without their scales"
BOTH = ("4bit", "8bit")


@dataclass(frozen=True)
class Rule:
    """A PEFT config class, perhaps with certain options, that does not work on some kinds of base."""

    config: str
    quants: tuple[str, ...]
    reason: str
    when: Mapping[str, Any] = field(default_factory=dict)  # options and the values that the rule is about

    def holds(self, config: str, options: Mapping[str, Any], quant: str) -> bool:
        """Whether the rule is about this method on this base."""
        matches = all(_matches(options.get(key), value) for key, value in self.when.items())
        return config == self.config and quant in self.quants and matches


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
    Rule("XLoraConfig", BOTH, "its router calls the quantised layers with arguments they do not take"),
    *(
        Rule("LoraConfig", BOTH, f"{name} takes apart the base's weights, which must be floating point", when)
        for name, when in {
            "PiSSA": {"init_lora_weights": "pissa*"},
            "MiCA": {"init_lora_weights": "mica"},
            "CorDA": {"init_lora_weights": "corda"},
            "LoRA-GA": {"init_lora_weights": "lora_ga"},
            "the orthogonal initialisation": {"init_lora_weights": "orthogonal"},
        }.items()
    ),
    Rule("LoraConfig", ("8bit",), "DoRA loses the scales of 8-bit weights after the first step", {"use_dora": True}),
    Rule("LoraConfig", BOTH, "KaSA on quantised layers is silently plain LoRA", {"kasa_config": Mapping}),
    Rule("LoraConfig", BOTH, "MonteCLoRA on quantised layers is silently plain LoRA", {"monteclora_config": Mapping}),
    Rule("LoraConfig", BOTH, "VeLoRA does not support quantised layers", {"velora_config": Mapping}),
)
FULL = "full fine-tuning cannot train quantised weights; take quant=none or an adapter method"


def refusal(method: Mapping[str, Any], quant: Mapping[str, Any]) -> str | None:
    """Why ``method`` (a PEFT config's ``_target_`` and options) cannot be trained on this base; None where it can."""
    stored = "4bit" if quant.get("load_in_4bit") else "8bit" if quant.get("load_in_8bit") else None
    if stored is None:
        return None
    if not method:
        return FULL
    config = method["_target_"].rpartition(".")[2]
    reasons = [rule.reason for rule in RULES if rule.holds(config, method, stored)]
    return f"not on a {stored} base: {reasons[0]}" if reasons else None


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return isinstance(value, wanted)
    if isinstance(wanted, str) and wanted.endswith("*"):
        return isinstance(value, str) and value.startswith(wanted[:-1])
    return bool(value == wanted)
