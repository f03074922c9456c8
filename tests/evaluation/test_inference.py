"""Generation is timed in turns, exactly, and leaves the models as they were."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, RandLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationConfig

from peftsweep import InputError
from peftsweep.config.calls import check_call
from peftsweep.config.fill import conf_dir
from peftsweep.evaluation import inference, inference_figures, inference_plan
from peftsweep.models import attach, losses, model, saved
from peftsweep.schema import ModelConfig, TargetsConfig
from tests.models.test_model import QUANTS, ROLES, batch

CPU = torch.device("cpu")
TINY = ModelConfig(name_or_path="tiny")
SHORT: dict[str, Any] = {"short": {"new_tokens": 5}}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_alpha=1),
    "ia3": lambda: IA3Config(init_ia3_weights=False),
    "randlora": lambda: RandLoraConfig(r=4, target_modules=["q_proj"]),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=6),
}


class Clock:
    """Time that passes only when a model is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def runs_on(self, timed: Any, prefill: float, step: float, noise: Callable[[], float] = lambda: 1.0) -> None:
        """Reading a prompt takes ``prefill`` seconds, each further token ``step``."""

        def pass_time(_module: Any, _args: Any, kwargs: Mapping[str, Any]) -> None:
            self.now += noise() * (prefill if kwargs["input_ids"].shape[1] > 1 else step)

        whole = timed.get_base_model() if isinstance(timed, PeftModel) else timed
        whole.register_forward_pre_hook(pass_time, with_kwargs=True)


def pair(method: str = "lora", quant: str = "none") -> tuple[Any, Any]:
    """The untouched base and the adapted model, which share their weights."""
    torch.manual_seed(0)
    base = model.load(TINY, QUANTS[quant], CPU)
    untouched = inference.bare(base)
    return untouched, attach.attach(base, METHODS[method](), TargetsConfig(), ROLES).eval()


def run(variants: Mapping[str, Any], **options: Any) -> inference.Benchmark:
    given: dict[str, Any] = {"categories": SHORT, "samples": 2, "runs": 2, "warmup": 1, "batch_sizes": [1, 3]} | options
    return inference.benchmark(variants, model.load_tokenizer(TINY), **given)


def logits(of: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = of(input_ids=torch.arange(5, 25)[None]).logits
    return found


def storages(*models: Any) -> dict[int, int]:
    """Bytes by address of everything that the models hold, the state of quantised layers too."""
    found = {}

    def note(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        if isinstance(value, torch.Tensor) or type(value).__module__.startswith("bitsandbytes"):
            for inner in vars(value).values():
                note(inner) if inner is not getattr(value, "module", None) else None

    for module in (module for one in models for module in one.modules()):
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()):
            note(value)
    return found


def quant_states(of: Any) -> list[Any]:
    """What 4-bit layers know of their weights."""
    return [module.quant_state for module in of.modules() if "quant_state" in vars(module)]


# ---- what is measured ------------------------------------------------------------------------------


def test_the_parts_of_a_generation_are_timed_exactly() -> None:
    base, adapted = pair()
    clock = Clock()
    clock.runs_on(base, prefill=8.0, step=1.0)
    clock.runs_on(adapted, prefill=24.0, step=2.0)
    found = run({"base": base, "adapted": adapted}, merge=False, clock=clock).info["short"]
    expected = {"base": (12.0, 8.0, 1.0), "adapted": (32.0, 24.0, 2.0)}
    for name, times in expected.items():
        for key, seconds in zip(inference_figures.TIMES, times, strict=True):
            assert [found[name][f"{key}_{figure}"] for figure in ("mean", "p50", "p95", "p99")] == [seconds] * 4
            assert found[name][f"{key}_std"] == 0.0
    assert found["base"]["batch_1"]["tokens_per_second"] == 5 / 12
    assert found["adapted"]["batch_3"]["tokens_per_second"] == 15 / 32
    assert found["adapted"]["batch_3"]["overhead"]["value"] == 32 / 12
    assert found["adapted"]["overhead"]["value"] == 32 / 12
    assert found["adapted"]["time_to_first_token_overhead"]["value"] == 3.0
    assert found["adapted"]["seconds_per_token_overhead"]["value"] == 2.0
    assert "overhead" not in found["base"]


def test_the_variants_take_turns_after_the_warm_up() -> None:
    base, adapted = pair()
    turns: list[str] = []
    for name, one in (("base", base), ("adapted", adapted)):
        inside = one.get_base_model() if name == "adapted" else one
        note = lambda _module, args, kwargs, name=name: (  # noqa: E731
            turns.append(name) if kwargs["input_ids"].shape[1] > 1 else None
        )
        inside.register_forward_pre_hook(note, with_kwargs=True)
    found = run({"base": base, "adapted": adapted}, samples=1, batch_sizes=[1], warmup=2, runs=3, merge=False)
    assert turns == ["base", "adapted"] * 5
    rows = [(row["variant"], row["run"]) for row in found.runs]
    assert rows == [(name, number) for number in range(3) for name in ("base", "adapted")]


# With weights beside the base's and with virtual tokens in the fast tier.
WRITING: list[Any] = [("lora", "none"), ("prompt", "none")]
WRITING += [pytest.param(*one, marks=pytest.mark.slow) for one in (("ia3", "none"), ("lora", "4bit"))]


@pytest.mark.parametrize(("method", "quant"), WRITING)
def test_every_variant_writes_as_many_tokens_as_it_was_told(method: str, quant: str) -> None:
    base, adapted = pair(method, quant)
    categories: dict[str, dict[str, Any]] = {
        "short": {"new_tokens": 1},
        "exact": {"new_tokens": 4, "prompt_tokens": 40, "prompts": "long"},
    }
    found = run({"base": base, "adapted": adapted}, categories=categories, runs=1, warmup=0)
    names = ["base", "adapted", *(["merged"] if method != "prompt" else [])]
    assert {row["variant"] for row in found.runs} == set(names)
    for row in found.runs:
        written = categories[row["category"]]["new_tokens"]
        assert row["tokens"] == row["batch_size"] * written
        assert (row["seconds_per_token"] is None) == (written == 1)
        assert 0 < row["time_to_first_token"] <= row["seconds"]
        assert row["category"] != "exact" or row["prompt_tokens"] == row["batch_size"] * 40
    assert len(found.runs) == len(names) * 2 * (2 + 1)  # categories, prompts and a batch
    assert found.info["exact"]["prompt_tokens"] == 40
    for name in names:
        assert found.info["exact"][name]["generated_tokens"] == 4
        assert found.info["exact"][name]["generation_bytes"] is None  # not 0: a CPU does not tell
        assert found.info["exact"][name]["weights_bytes"] > 0
    if method == "prompt":
        assert "cannot be merged" in found.info["overall"]["merged"]["left_out"]


def test_a_base_that_would_sample_or_stop_neither_samples_nor_stops() -> None:
    base, _ = pair()
    plain, every_token = run({"base": base}), list(range(533))
    seen: list[int] = []
    base.register_forward_pre_hook(lambda _m, _a, kw: seen.append(int(kw["input_ids"][0, -1])), with_kwargs=True)
    run({"base": base}, samples=1, batch_sizes=[1])
    greedy = list(seen)
    seen.clear()
    own = {"do_sample": True, "temperature": 9.0, "top_k": 0, "repetition_penalty": 5.0, "eos_token_id": every_token}
    base.generation_config = GenerationConfig(**own)
    found = run({"base": base}, samples=1, batch_sizes=[1])
    assert seen == greedy
    assert {row["tokens"] for row in (*plain.runs, *found.runs)} == {5, 15}
    assert base.generation_config.temperature == 9.0


def test_an_interval_brackets_the_ratio_and_narrows_with_the_pairs() -> None:
    base, adapted = pair()
    clock, noise = Clock(), random.Random(0)
    clock.runs_on(base, 8.0, 1.0, noise=lambda: noise.uniform(0.8, 1.2))
    clock.runs_on(adapted, 16.0, 2.0, noise=lambda: noise.uniform(0.8, 1.2))
    few: dict[str, Any] = {"samples": 1, "warmup": 0, "batch_sizes": [1], "merge": False}
    few["categories"] = {"short": {"new_tokens": 2}}
    found = run({"base": base, "adapted": adapted}, runs=24, clock=clock, **few)
    overhead = found.info["short"]["adapted"]["overhead"]
    assert overhead["low"] < overhead["value"] < overhead["high"]
    assert overhead["low"] < 2.0 < overhead["high"]
    assert overhead["low"] > 1.5
    assert overhead["high"] < 2.7


def test_a_ratio_is_the_median_between_order_statistics() -> None:
    times = [(1.0, float(n)) for n in range(1, 10)]
    # Of nine values the second and the eighth: 1 - 2 (1 + 9) / 2^9 = 0.961.
    assert inference_figures.ratio(times) == {"value": 5.0, "low": 2.0, "high": 8.0}
    assert inference_figures.ratio(times[:5]) == {"value": 3.0, "low": None, "high": None}


def test_the_whole_is_the_mean_over_the_categories() -> None:
    base, adapted = pair()
    clock = Clock()
    clock.runs_on(base, 8.0, 1.0)
    clock.runs_on(adapted, 16.0, 2.0)
    categories = {"short": {"new_tokens": 3}, "medium": {"new_tokens": 5}, "long": {"new_tokens": 3000}}
    few: dict[str, Any] = {"runs": 2, "warmup": 0, "merge": False}
    found = run({"base": base, "adapted": adapted}, categories=categories, clock=clock, **few).info
    assert found["overall"]["categories"] == ["short", "medium"]
    assert found["overall"]["base"]["seconds_mean"] == (10.0 + 12.0) / 2
    assert found["overall"]["base"]["generated_tokens"] == 4
    assert found["overall"]["base"]["batch_3"]["seconds_p50"] == 11.0
    assert found["overall"]["adapted"]["overhead"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert found["long"] == {"left_out": "1 + 3000 tokens are more than the model has positions for (2048)"}


def test_virtual_tokens_take_positions() -> None:
    _, adapted = pair("prompt")
    categories = {"fits": {"new_tokens": 1, "prompt_tokens": 2041, "prompts": "long"}}
    one = {"samples": 1, "runs": 1, "warmup": 0, "batch_sizes": [1]}
    found = run({"adapted": adapted}, categories=categories, **one).info
    assert found["fits"]["adapted"]["generated_tokens"] == 1
    categories["fits"]["prompt_tokens"] = 2042
    assert "(2042)" in run({"adapted": adapted}, categories=categories, **one).info["fits"]["left_out"]


def test_a_batch_that_does_not_fit_is_left_out_for_its_variant_only(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapted = pair()
    generate = type(adapted).generate

    def full(self: Any, **options: Any) -> Any:
        if len(options["input_ids"]) > 1:
            raise torch.OutOfMemoryError("too large")
        return generate(self, **options)

    monkeypatch.setattr(type(adapted), "generate", full)
    found = run({"base": base, "adapted": adapted}, merge=False)
    assert found.info["short"]["adapted"]["batch_3"] == {"left_out": "out of memory"}
    assert found.info["short"]["adapted"]["overhead"]["value"] > 0
    assert found.info["short"]["base"]["batch_3"]["tokens_per_second"] > 0
    assert "batch_3" not in found.info["overall"]["adapted"]


def test_an_error_that_is_not_about_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = pair()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(base, "generate", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        run({"base": base})


# ---- the models ------------------------------------------------------------------------------------


# Only where a layer has 8 bits does a use change anything; where it has none there is nothing that could be lost.
BARE: list[Any] = [("8bit", False), ("8bit", True), ("4bit", True)]
BARE += [pytest.param(*one, marks=pytest.mark.slow) for one in (("4bit", False), ("none", False), ("none", True))]


@pytest.mark.parametrize(("quant", "used"), BARE)
def test_the_bare_model_costs_nothing_and_stays_as_it_was(quant: str, used: bool) -> None:
    base = model.load(TINY, QUANTS[quant], CPU)
    if used:  # the first forward of an 8-bit layer moves its weights
        logits(base)
    untouched = inference.bare(base)
    assert storages(base, untouched) == storages(base)
    before = logits(untouched)
    adapted = attach.attach(base, METHODS["lora"](), TargetsConfig(), ROLES)
    names = [name for name, _ in untouched.named_modules()]
    assert not any("lora" in name for name in names)
    adapted.train()
    losses.answer_losses(adapted, batch()).sum().backward()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    optimizer.step()
    adapted.eval()
    assert not torch.equal(logits(adapted), before)
    assert torch.equal(logits(untouched), before)
    assert storages(untouched).items() <= storages(adapted).items(), "the base's weights are there twice"


@pytest.mark.parametrize("quant", ["none", "4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_the_merged_model_is_plain_and_leaves_the_adapted_one_alone(quant: str) -> None:
    base, adapted = pair("lora", quant)
    before, state = logits(adapted), {name: t.clone() for name, t in adapted.state_dict().items()}
    packed = quant_states(adapted)
    bare_before = logits(base)
    joined, reason = inference.merged(adapted)
    assert joined is not None
    assert reason is None
    assert not any(isinstance(module, BaseTunerLayer) for module in joined.modules())
    assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(base), bare_before)
    assert all(torch.equal(t, state[name]) for name, t in adapted.state_dict().items())
    assert all(a is b for a, b in zip(packed, quant_states(adapted), strict=True))
    if quant == "none":
        assert torch.allclose(logits(joined), before, atol=1e-3)
    own = next(m for n, m in joined.named_modules() if n.endswith("embed_tokens"))
    assert own.weight is base.get_input_embeddings().weight, "what is not merged is shared"
    # As PEFT itself merges it, in place.
    assert torch.equal(logits(joined), logits(adapted.merge_and_unload()))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (None, "there is no adapter to merge"),
        ("prompt", "what the method adds cannot be merged into the weights"),
        ("ia3", "ValueError: Cannot merge ia3 layers"),  # says PEFT
        ("randlora", "RuntimeError: shape"),  # PEFT merges it into something that cannot be called
    ],
)
def test_what_cannot_be_merged_says_why(method: str | None, expected: str) -> None:
    base, adapted = pair(method or "lora", "4bit")
    before = logits(adapted)
    joined, reason = inference.merged(adapted if method else base)
    assert joined is None
    assert str(reason).startswith(expected)
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("quant", ["none", pytest.param("4bit", marks=pytest.mark.slow)])
def test_loading_and_switching_are_timed_and_leave_the_model_as_it_was(
    quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapted = pair("lora", quant)
    saved.save(adapted, tmp_path)
    clock = Clock()
    load, switch = PeftModel.load_adapter, PeftModel.set_adapter

    def slow_load(*args: Any, **options: Any) -> Any:
        clock.now += 7.0
        return load(*args, **options)

    def slow_switch(self: Any, name: Any) -> None:
        clock.now += 2.0 if name == "second" else 4.0
        switch(self, name)

    monkeypatch.setattr(PeftModel, "load_adapter", slow_load)
    monkeypatch.setattr(PeftModel, "set_adapter", slow_switch)
    clock.runs_on(base, 1.0, 1.0)
    clock.runs_on(adapted, 1.0, 1.0)
    before = logits(adapted)
    state = {name: (p.data_ptr(), p.requires_grad) for name, p in adapted.named_parameters()}
    few: dict[str, Any] = {"samples": 1, "batch_sizes": [1], "merge": False}
    found = run({"base": base, "adapted": adapted}, saved=tmp_path, clock=clock, **few).info["adapter"]
    assert (found["load_seconds_p50"], found["load_seconds_std"]) == (7.0, 0.0)
    assert (found["switch_seconds_p50"], found["switch_seconds_p99"]) == (3.0, 4.0)
    assert list(adapted.peft_config) == ["default"]
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in adapted.named_parameters()} == state
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("start", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_loading_an_adapter_that_takes_the_base_apart_leaves_the_base_whole(start: Any, tmp_path: Path) -> None:
    base = model.load(TINY, None, CPU)
    method = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=start)
    adapted = attach.attach(base, method, TargetsConfig(), ROLES).eval()
    saved.save(adapted, tmp_path)
    before = logits(adapted)
    found = run({"adapted": adapted}, merge=False, samples=1, runs=1, saved=tmp_path)
    assert found.info["adapter"]["load_seconds_p50"] > 0
    assert torch.equal(logits(adapted), before)


def test_an_adapter_that_is_not_there_is_not_timed(tmp_path: Path) -> None:
    base, adapted = pair()
    one: dict[str, Any] = {"samples": 1, "runs": 1, "warmup": 0, "batch_sizes": [1]}
    full = run({"base": base, "adapted": base}, saved=tmp_path, **one).info
    assert full["adapter"]["left_out"] == "there is no adapter"
    assert full["adapter"]["load_seconds_p50"] is None
    assert full["overall"]["merged"] == {"left_out": "there is no adapter to merge"}
    unsaved = run({"base": base, "adapted": adapted}, merge=False, **one).info
    assert unsaved["adapter"]["left_out"] == "the adapter was not saved"
    assert "adapter" not in run({"base": base, "adapted": adapted}, merge=False, switch=False, **one).info


def test_training_mode_comes_back() -> None:
    _, adapted = pair()
    adapted.train()
    adapted.get_base_model().lm_head.eval()
    modes = [module.training for module in adapted.modules()]
    run({"adapted": adapted}, samples=1, runs=1, warmup=0, batch_sizes=[1])
    assert [module.training for module in adapted.modules()] == modes


# ---- prompts and options ---------------------------------------------------------------------------


def test_the_shipped_prompts_are_five_a_category_and_the_long_ones_are_long() -> None:
    shipped = inference_plan.read_prompts()
    assert {name: len(set(texts)) for name, texts in shipped.items()} == {"short": 5, "medium": 5, "long": 5}
    assert all(text.count("\n\n") >= 3 and len(text) > 1500 for text in shipped["long"])
    assert max(map(len, shipped["short"])) < min(map(len, shipped["medium"]))
    assert max(map(len, shipped["medium"])) < min(map(len, shipped["long"]))


def test_prompts_come_from_a_file_of_the_users(tmp_path: Path) -> None:
    own, lines, text = tmp_path / "own.json", tmp_path / "own.jsonl", tmp_path / "own.txt"
    own.write_text(json.dumps({"short": ["One?"], "mine": ["Two?", "Three?"]}))
    lines.write_text('{"prompt": "One?", "category": "short"}\n{"prompt": "Two?", "category": "mine"}\n')
    text.write_text("One?\n\nTwo?\n")
    for file, expected in ((own, ["Two?", "Three?"]), (lines, ["Two?"]), (text, ["One?", "Two?"])):
        plan = inference_plan.plan({"a": {"new_tokens": 3, "prompts": "mine"}}, str(file))
        assert plan["a"].texts == expected


@pytest.mark.parametrize(
    ("content", "suffix", "problem"),
    [
        (None, ".json", "no such file"),
        ("{", ".json", "cannot be read"),
        ('["One?"]', ".json", "must be an object of lists of prompts"),
        ('{"short": []}', ".json", "must be an object of lists of prompts"),
        ('{"mine": ["One?"]}', ".json", "has no such prompts; there are: mine"),
        ('{"question": "One?"}', ".jsonl", "row 1 needs a text as its 'prompt' or 'text'; it has: question"),
        ("One?", ".doc", "unknown format '.doc'"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_in_one_line(
    content: str | None, suffix: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / f"own{suffix}"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError) as refused:
        inference_plan.plan(SHORT, str(file))
    assert problem in str(refused.value)
    assert "inference." in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"runs": 0}, "inference.runs=0: must be a whole number of at least 1"),
        ({"warmup": -1}, "inference.warmup=-1: must be a whole number of at least 0"),
        ({"batch_sizes": [1, 0]}, "inference.batch_sizes=0: must be a whole number of at least 1"),
        ({"categories": {}}, "inference.categories: must name at least one category"),
        ({"categories": {"short": {}}}, "inference.categories.short.new_tokens=None: must be a whole number"),
        ({"categories": {"short": {"new_tokens": True}}}, "inference.categories.short.new_tokens=True: must be"),
        ({"categories": {"short": {"new_token": 3}}}, "short.new_token: no such option; did you mean 'new_tokens'?"),
        ({"categories": {"overall": {"new_tokens": 3}}}, "inference.categories.overall: the name is that of other"),
        ({"categories": {"poems": {"new_tokens": 3}}}, "has no such prompts; there are: short, medium, long"),
    ],
)
def test_an_impossible_option_is_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as refused:
        inference_plan.plan(**{"categories": SHORT, **options})
    assert line in str(refused.value)


@pytest.mark.parametrize("name", ["standard", "long"])
def test_a_yaml_names_every_option(name: str) -> None:
    options = yaml.safe_load((Path(conf_dir()) / "inference" / f"{name}.yaml").read_text())
    provided = ("variants", "tokenizer", "saved", "clock")
    check_call(options, "inference", provided=provided)
    parameters = set(inference.benchmark.__annotations__) - {*provided, "return"}
    assert set(options) - {"_target_"} == parameters
    assert list(inference_plan.plan(**options)) == list(options["categories"])


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
def test_the_device_tells_what_generation_takes(quant: str) -> None:
    torch.manual_seed(0)
    base = model.load(TINY, QUANTS[quant], torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    untouched = inference.bare(base)
    assert torch.cuda.memory_allocated() == before
    adapted = attach.attach(base, METHODS["lora"](), TargetsConfig(), ROLES).eval()
    categories = {n: {"new_tokens": 2, "prompt_tokens": int(n), "prompts": "long"} for n in ("128", "1024")}
    found = run({"base": untouched, "adapted": adapted}, categories=categories).info
    for name in ("base", "adapted", "merged"):
        few, many = (found[category][name] for category in categories)
        # Keys and values of 4 layers, 128 wide, in at least 16 bits.
        assert many["generation_bytes"] >= few["generation_bytes"] + (1024 - 128) * 4 * 2 * 128 * 2
        assert many["batch_3"]["generation_bytes"] > many["generation_bytes"]
        assert many["peak_bytes"] == many["weights_bytes"] + many["generation_bytes"]
