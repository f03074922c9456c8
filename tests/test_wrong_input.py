"""Wrong input is one line that names the key, and right input needs no more than its key.

Words are composed and checked in this process (`cli._trial`, `forecast.check`), which is what a sweep does with each
of its points before the first is trained.
"""

from __future__ import annotations

import pytest

from peftsweep import InputError, cli, forecast
from peftsweep.config import Trial


def checked(*words: str) -> Trial:
    """A trial as a sweep checks it; nothing is trained."""
    one = cli._trial("device=cpu", *words)
    forecast.check(one)
    return one


# ---- keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["method.modules_to_save=[lm_head]"], "method.modules_to_save", ["lm_head"]),
        (["method.exclude_modules='.*mlp.*'"], "method.exclude_modules", ".*mlp.*"),
        (["method.rank_pattern.q_proj=4"], "method.rank_pattern", {"q_proj": 4}),
        (["method=ia3", "method.init_ia3_weights=false"], "method.init_ia3_weights", False),
        (["quant=4bit", "quant.bnb_4bit_quant_storage=uint8"], "quant.bnb_4bit_quant_storage", "uint8"),
        (["train.optimizer_kwargs.amsgrad=true"], "train.optimizer_kwargs.amsgrad", True),
        (["eval.tiny_math.num_beams=2"], "eval.tiny_math.num_beams", 2),
    ],
)
def test_an_option_that_no_yaml_lists_needs_no_plus(words: list[str], key: str, value: object) -> None:
    found: object = checked(*words).tree
    for part in key.split("."):
        found = found[part]  # type: ignore[index]
    assert found == value


def test_modules_to_save_are_trained() -> None:
    """The embedded model's head of 512 tokens and 128 dimensions is trained, in full, beside the adapter."""
    alone, with_head = checked(), checked("method.modules_to_save=[lm_head]")
    more = (forecast.check(with_head).trainable_parameters or 0) - (forecast.check(alone).trainable_parameters or 0)
    base = forecast.model.skeleton(alone.config.model)
    assert more == base.get_output_embeddings().weight.numel()


UNREAD = {
    "method.lora_alfa=3": "method.lora_alfa: method=lora (peft.LoraConfig) has no such option; did you mean 'lora_a",
    "method.rank=3": "method.rank: method=lora (peft.LoraConfig) has no such option; did you mean 'r'?",
    "method=ia3 method.r=8": "method.r: method=ia3 (peft.IA3Config) has no such option; run it without method.r, in",
    "method=full method.r=8": "method.r: method=full has no such option; run it without method.r, in",
    "method.inference_mode=true": "method.inference_mode: is set by peftsweep",
    "method.task_type=CAUSAL_LM": "method.task_type: is set by peftsweep",
    "quant=4bit quant.bnb_4bit_quant_typ=fp4": "quant.bnb_4bit_quant_typ: transformers.BitsAndBytesConfig has no such",
    "quant.load_in_4bit=true": "quant.load_in_4bit: quant=none has no such option",
    "tracker.project=x": "tracker.project: tracker=none has no such option",
    "eval.tiny_mth.samples=3": "eval.tiny_mth: no such key; did you mean 'tiny_math'?",
    "eval.tiny_math.sample=3": "eval.tiny_math.sample: peftsweep.evaluate.generation has no such option; did you mean '",
    "train.optimizer_kwargs.beta=3": "train.optimizer_kwargs.beta: AdamW has no such option; did you mean 'betas'?",
    "train.optimizer_kwargs.lr=3": "train.optimizer_kwargs.lr: is train.learning_rate",
    "model=llama3.2_1b model.init=random model.architecture.hiden_size=64": "model.architecture.hiden_size: no such",
    "model=llama3.2_1b model.init=random model.architecture.model_type=lama": "did you mean 'llama'?",
    "model=llama3.2_1b model.init=random model.architecture.hidden_act=x": "model.architecture: describes no model",
}


@pytest.mark.parametrize("words", UNREAD)
def test_a_key_that_nobody_reads_is_refused(words: str) -> None:
    with pytest.raises(InputError) as refused:
        checked(*words.split())
    assert UNREAD[words] in str(refused.value)
    assert "\n" not in str(refused.value)
