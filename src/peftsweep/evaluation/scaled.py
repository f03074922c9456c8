"""A trained adapter at a fraction of its scale: on the way from the untouched base to the adapter as it was trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

SCALED_TYPES = ("LORA", "LOHA", "LOKR")  # types of PEFT's whose layers add a product times `scaling` to the base's
BASE_UNCHANGED = (True, False, "gaussian", "orthogonal", "eva")  # initialisations that leave the base's weights alone
TRAINED_WHOLE = ("modules_to_save", "trainable_token_indices")  # options of what is trained beside, and has no scale


def unscalable(model: nn.Module) -> str | None:
    """Why the adapter of ``model`` has no scale at whose 0 is the untouched base; None where it has one."""
    if not isinstance(model, PeftModel):
        return "all weights are trained, there is no adapter with a scale"
    config = model.peft_config[model.active_adapter]
    if config.peft_type not in SCALED_TYPES:
        return f"an adapter of {config.peft_type} has no scale; LoRA, LoHa and LoKr have"
    if isinstance(config, LoraConfig) and config.use_dora:
        return "the magnitudes that DoRA trains have no scale"
    if isinstance(config, LoraConfig) and config.init_lora_weights not in BASE_UNCHANGED:
        return f"init_lora_weights={config.init_lora_weights} has changed the base, which scale 0 is not"
    if (bias := getattr(config, "bias", "none")) != "none":
        return f"bias={bias}: biases of the base are trained, and have no scale"
    beside = [key for key in TRAINED_WHOLE if getattr(config, key, None)]
    return f"what {beside[0]} names is trained whole, and has no scale" if beside else None


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """The active adapter times ``factor`` during the block."""
    layers: list[Any] = [one for one in model.modules() if isinstance(one, BaseTunerLayer) and hasattr(one, "scaling")]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update(
                {name: factor * layer.scaling[name] for name in layer.active_adapters if name in layer.scaling}
            )
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
