"""Wrong input is one line that names the key, and right input needs no more than its key.

Words are composed and checked in this process (`cli._trial`, `forecast.check`), which is what a sweep does with each
of its points before the first is trained.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from peftsweep import InputError, cli, data, forecast, hub, model
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
    base: Any = model.skeleton(alone.config.model)
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
    "eval.tiny_math.sample=3": "eval.tiny_math.sample: peftsweep.evaluate.generation has no such option; did you",
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


# ---- a hub that does not answer ------------------------------------------------------------------------


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that takes every connection and never says anything, in place of the hub."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "PATIENCE", 1.0)  # enough to see that it is kept; the product's is asserted below
        hub.problem.cache_clear()
        yield address
        hub.problem.cache_clear()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if HF_HUB_OFFLINE=1 had been set before anything was imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.problem.cache_clear()
    data.check_cached.cache_clear()
    yield
    hub.problem.cache_clear()


def test_the_hub_has_less_than_five_seconds_to_answer() -> None:
    assert hub.PATIENCE < 5


def test_a_hub_that_never_answers_is_one_line_within_five_seconds_for_a_sweep(
    silent_hub: str, command: Callable[..., tuple[int, str, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    words = ["model=causal_lm", "model.name_or_path=nobody/nothing", "seed=0,1,2"]
    code, out, err = command(*words, "dataset=gsm8k")
    seconds = time.perf_counter() - start
    assert (code, out) == (2, "")
    missing = "peftsweep: model.name_or_path=nobody/nothing: is not in the local cache, and "
    assert err.startswith(f"{missing}{silent_hub} cannot be reached (")
    assert "give a local folder" in err
    assert err.count("\n") == 1
    assert seconds < hub.PATIENCE + 1 + 2  # of composing the points
    for name in ("dataset.hub=nobody/rows", "dataset.hub=nobody/more"):  # nothing asks a second time
        with pytest.raises(InputError, match="is not in the local cache, and http"):
            data.hub_rows(name.partition("=")[2], None, "train", None, "dataset.hub")
    assert time.perf_counter() - start < seconds + 2


@pytest.mark.usefixtures("offline")
def test_trials_whose_rows_cannot_be_had_are_refused_before_the_first_trains(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, err = command("dataset=gsm8k", "train.steps=1,2")
    assert code == 2
    assert err.startswith("peftsweep: dataset.hub=openai/gsm8k: is not in the local cache, and HF_HUB_OFFLINE=1 is set")
    assert "local rows" in err
    assert err.count("\n") == 1
    assert not list(Path("multirun").glob("*/*/result.json"))


@pytest.mark.usefixtures("offline")
def test_a_dry_run_needs_no_rows_of_the_hub(command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command("dataset=gsm8k", "dry_run=true")
    assert (code, err) == (0, "")
