"""Initialisations of adapters that need data, a text, or the unquantised base.

A method's yaml names one as ``method_setup``. Each is a function of a ``Setting``; it attaches the method and returns
the adapted model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, initialize_lora_eva_weights, set_peft_model_state_dict
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftsweep.data.batches import Batch, collate
from peftsweep.data.tokens import Tokens
from peftsweep.errors import InputError
from peftsweep.models.losses import answer_losses
from peftsweep.models.parts import as_configured
from peftsweep.models.quantised.layers import patch_layers
from peftsweep.models.saved import INITIAL
from peftsweep.study.store import RESIDUAL


@dataclass(frozen=True)
class Setting:
    """The arguments of an initialisation."""

    base: PreTrainedModel
    method: Any  # a PEFT config
    attach: Callable[[PreTrainedModel, PeftConfig], PeftModel]
    unquantised: Callable[[], PreTrainedModel]  # loads the base as it is stored
    rows: Sequence[Tokens]  # the training rows
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None  # the folder of the adapter, for files that belong to it; None if it is not saved
    seed: int

    def batches(self, rows: int, batch_size: int) -> Iterator[Batch]:
        """Batches of ``rows`` random training rows, the same for the same seed."""
        chosen = random.Random(self.seed).sample(list(self.rows), min(rows, len(self.rows)))
        for start in range(0, len(chosen), batch_size):
            pad_id: Any = self.tokenizer.pad_token_id
            yield collate(chosen[start : start + batch_size], pad_id).to(self.base.device)


def without_data(
    base: PreTrainedModel, method: Any, attach: Callable[[PreTrainedModel, PeftConfig], PeftModel]
) -> PeftModel:
    """Attach ``method`` in a forecast, where there is no data: its weights have the same shapes and other values."""
    method.init_lora_weights = True
    return attach(base, method)


def eva(setting: Setting, *, rows: int = 256, batch_size: int = 16) -> PeftModel:
    """EVA (arXiv 2410.07170): A from the principal components of each layer's input on the training rows."""
    adapted = setting.attach(setting.base, setting.method)
    inputs = [
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        for batch in setting.batches(rows, batch_size)
        if len(batch.input_ids) == batch_size  # each batch must have as many tokens as there are components
    ]
    if not inputs:
        raise InputError(f"method_setup.batch_size={batch_size}: must be at most the number of training rows")
    initialize_lora_eva_weights(adapted, inputs, show_progress_bar=False, gather_distributed_inputs=False)
    return adapted


def corda(setting: Setting, *, rows: int = 256) -> PeftModel:
    """CorDA (arXiv 2406.05223): the base's weights split by the covariance of their inputs on the training rows."""
    from peft.tuners.lora.corda import preprocess_corda  # only this part of PEFT needs the package attrs

    def run() -> None:
        with torch.no_grad():
            for batch in setting.batches(rows, 1):  # PEFT's hook expects one row without padding
                answer_losses(setting.base, batch)

    preprocess_corda(setting.base, setting.method, run_model=run)
    return _keeping_initial(setting)


def lora_ga(setting: Setting, *, rows: int = 64, batch_size: int = 8) -> PeftModel:
    """LoRA-GA (arXiv 2407.05000): A and B from the gradients of full fine-tuning on some training rows."""

    def step() -> None:
        for batch in setting.batches(rows, batch_size):
            answer_losses(setting.base, batch).mean().backward()

    preprocess_loraga(setting.base, setting.method, train_step=step)
    return _keeping_initial(setting)


def pissa(setting: Setting) -> PeftModel:
    """PiSSA (arXiv 2404.02948): the principal part of the weights is trained, the rest is the base.

    On a 4-bit base the unquantised weights are decomposed, and the rest replaces them in 4 bits (QPiSSA). This base is
    saved beside the adapter, which cannot be used without it.
    """
    if not getattr(setting.base, "is_loaded_in_4bit", False):
        return _keeping_initial(setting)
    residual = setting.attach(setting.unquantised(), setting.method)
    principal = get_peft_model_state_dict(residual)
    weights: dict[str, Any] = {name: layer.get_base_layer().weight for name, layer in _lora_layers(residual)}
    setting.method.init_lora_weights = True
    for name, module in setting.base.named_modules():
        if name in weights:
            _quantise_again(module, weights[name])
    if setting.folder is not None:
        with as_configured(setting.base):
            setting.base.save_pretrained(setting.folder / RESIDUAL)
    adapted = setting.attach(setting.base, setting.method)
    set_peft_model_state_dict(adapted, principal)
    return adapted


def loftq(setting: Setting) -> PeftModel:
    """LoftQ (arXiv 2310.08659), one iteration: A and B approximate the error of the quantisation.

    PEFT's own implementation runs on CUDA only and ignores the adapter's scale.
    """
    stored = dict(setting.unquantised().named_modules())
    adapted = setting.attach(setting.base, setting.method)
    for name, layer in _lora_layers(adapted):
        lost = stored[name].weight.float() - _dequantised(layer.get_base_layer()).float()
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        rank, root = layer.r["default"], values.sqrt()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data = (root[:rank, None] * right[:rank]).to(a.dtype)
        b.data = (left[:, :rank] * root[:rank] / layer.scaling["default"]).to(b.dtype)
    return adapted


def prefix_from_text(setting: Setting, *, text: str) -> PeftModel:
    """Initialise keys and values of the virtual tokens with those of the beginning of ``text``."""
    adapted = setting.attach(setting.base, setting.method)
    initialize_kv_prefix_from_text(adapted, setting.tokenizer, text=text, use_chat_template=False)
    return adapted


def _keeping_initial(setting: Setting) -> PeftModel:
    """Attach the method; save the initial adapter if it cannot be computed again, to save a LoRA of rank 2r later."""
    adapted = setting.attach(setting.base, setting.method)
    option = str(setting.method.init_lora_weights)
    if setting.folder is not None and (option in ("corda", "lora_ga") or option.startswith("pissa_niter")):
        config: Any = adapted.peft_config["default"]
        config.init_lora_weights = True
        adapted.save_pretrained(str(setting.folder / INITIAL), save_embedding_layers=False)
        config.init_lora_weights = setting.method.init_lora_weights = option
    return adapted


def _lora_layers(adapted: PeftModel) -> list[tuple[str, LoraLayer]]:
    """The adapted layers with their names in the base."""
    modules = adapted.get_base_model().named_modules()
    return [(name, module) for name, module in modules if isinstance(module, LoraLayer)]


def _dequantised(module: Any) -> torch.Tensor:
    import bitsandbytes

    weight: torch.Tensor = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight


def _quantise_again(module: Any, weight: torch.Tensor) -> None:
    """Replace the weight of a 4-bit layer by ``weight``, in the same format."""
    from bitsandbytes.nn.modules import Params4bit

    old = module.weight
    new: Any = Params4bit(
        weight.detach().to("cpu").contiguous(),
        requires_grad=False,
        quant_type=old.quant_type,
        compress_statistics=old.compress_statistics,
        blocksize=old.blocksize,
        module=module,
    )
    module.weight = new.to(old.device)
    patch_layers(nn.ModuleList([module]))
