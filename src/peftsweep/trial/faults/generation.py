"""The generation settings of a base, as far as they decide which faults concerned a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftsweep.schema import Init, ModelConfig

# Settings of a base that changed what transformers' own generation wrote, each with a value that changes nothing.
BEAM_SETTINGS = {"length_penalty": 1, "early_stopping": False, "diversity_penalty": 0, "num_beam_groups": 1}
GENERATION_SETTINGS: Mapping[str, Any] = BEAM_SETTINGS | {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **{name: [] for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")},
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "max_time", "stop_strings")),
    "exponential_decay_length_penalty": None,
}


def ends(base: ModelConfig, marks: Any) -> list[int]:
    """The tokens that end what the base writes."""
    own = _generation_config(base) if base.init is Init.pretrained else None
    given = getattr(own, "eos_token_id", None)
    found = [marks.eos_token_id, *(given if isinstance(given, list) else [given])]
    return [end for end in found if end is not None]


def _generation_config(base: ModelConfig) -> Any:
    from transformers import GenerationConfig

    from peftsweep.models import model

    try:
        return GenerationConfig.from_pretrained(model.source(base), revision=base.revision or "main")
    except OSError:  # it has none
        return None


def own_settings(base: ModelConfig) -> frozenset[str]:
    """The names of ``GENERATION_SETTINGS`` that the base's generation config sets to a value with an effect."""
    own = _generation_config(base)
    held = {name: getattr(own, name, None) for name in GENERATION_SETTINGS}
    return frozenset(name for name, value in held.items() if value not in (None, GENERATION_SETTINGS[name]))
