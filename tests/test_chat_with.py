"""`peftsweep-chat` writes what PEFT and transformers write with the same adapter, prompt and sampling."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftsweep import InputError, cli
from peftsweep.evaluation import decoding
from peftsweep.models import model, probe
from peftsweep.schema import DatasetConfig
from peftsweep.use import chat_with
from tests.config.test_restored import saved
from tests.data.test_chat import CHATML, LLAMA, TALK, tokenizer

TASKS = "peftsweep.data.tasks"
Chat = Callable[..., tuple[int, str, str]]
LENGTH = 12
SHORT = ["--max-new-tokens", str(LENGTH), "device=cpu"]


@pytest.fixture
def chat(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Run `peftsweep-chat` with words, and lines of standard input: exit code, stdout, stderr."""

    def run(*words: object, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["peftsweep-chat", *map(str, words)])
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.chat()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def trial(**config: Any) -> Path:
    """A trial whose adapter, of large weights, writes something else than its base, and whose data are gone."""
    place = saved({"dataset.path": "gone.jsonl", "dataset.generator": None, **config})
    file = place / "adapter" / "adapter_model.safetensors"
    weights = {name: tensor * (20 if "lora_B" in name else 1) for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    return place


def conversing(template: str = CHATML, **config: Any) -> tuple[Path, Path]:
    """A trial on conversations, and the folder of its base, the embedded model with a chat template."""
    base = Path("base_with_template").absolute()
    made = tokenizer(template, [])
    made.save_pretrained(base)
    for file in Path(model.TINY).iterdir():
        if not (base / file.name).exists():
            (base / file.name).write_bytes(file.read_bytes())
    own = {"dataset.chat": True, "dataset.reader": "peftsweep.data.tasks.messages"}
    own |= {"dataset.prompt": "{prompt}", "dataset.answer": "{answer}", "model.name_or_path": str(base)}
    return trial(**own, **config), base


def expected(base: Path | str, ids: list[int], adapter: Path | None = None, seed: int = 0, **how: Any) -> str:
    """What transformers writes after ``ids``, by default the likeliest."""
    made: Any = AutoTokenizer.from_pretrained(model.TINY)
    one: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        one = PeftModel.from_pretrained(one, str(adapter / "adapter"))
    given = torch.tensor([ids])
    torch.manual_seed(seed)  # what is loaded draws numbers too
    written = one.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=LENGTH,
        pad_token_id=made.pad_token_id,
        **{"do_sample": False, **how},
    )
    return str(made.decode(written[0, len(ids) :], skip_special_tokens=True))


def plain(text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(model.TINY)(text).input_ids)


def prompt_ids(prompt: str) -> list[int]:
    """A prompt in the template of the fixture's dataset."""
    return plain(f"{prompt}\n")


def test_the_text_is_that_of_the_adapter_and_beside_it_that_of_the_untouched_base(chat: Chat) -> None:
    place = trial()
    theirs = expected(model.TINY, prompt_ids("Tom has 3"), place)
    base = expected(model.TINY, prompt_ids("Tom has 3"))
    assert theirs != base
    assert chat(place, "--prompt", "Tom has 3", *SHORT) == (0, f"{theirs}\n", "")
    assert chat(place, "--prompt", "Tom has 3", "--base", *SHORT)[1] == f"base: {base}\ntrained: {theirs}\n"
    assert chat(place / "adapter", "--prompt", "Tom has 3", *SHORT)[1] == f"{theirs}\n"


def test_without_a_prompt_each_line_of_a_pipe_is_one(chat: Chat) -> None:
    place = trial()
    texts = [expected(model.TINY, prompt_ids(line), place) for line in ("Tom has 3", "Ann")]
    assert chat(place, *SHORT, lines="Tom has 3\n\nAnn")[:2] == (0, "".join(f"{text}\n" for text in texts))


@pytest.mark.slow
def test_a_raw_prompt_is_in_no_template(chat: Chat) -> None:
    place = trial()
    theirs = expected(model.TINY, plain("Tom has 3"), place)
    assert chat(place, "--prompt", "Tom has 3", "--raw", *SHORT) == (0, f"{theirs}\n", "")


ALPACA = {"prompt": "Do{with_input}.\n{instruction}\n{input}Say:", "reader": f"{TASKS}.alpaca"}
IN_CONTEXT = {"prompt": "{passage}\nQ: {question}?\nA:", "reader": f"{TASKS}.boolq"}
FORMS: list[tuple[dict[str, Any], list[str], str]] = [
    ({"prompt": "Q: {question}\nA:"}, [], "Q: hi {x}\nA:"),
    ({"prompt": "{{{story}}}"}, [], "{hi {x}}"),
    ({"prompt": "{a} and {b}"}, ["--column", "a=1=1"], "1=1 and hi {x}"),
    ({"prompt": "{q} {q}"}, [], "hi {x} hi {x}"),
    (ALPACA, [], "Do.\nhi {x}\nSay:"),
    (ALPACA, ["--column", "input=3"],
     "Do, paired with an input that provides further context.\nhi {x}\n### Input:\n3\n\nSay:"),
    (IN_CONTEXT, ["--column", "passage=P."], "P.\nQ: hi {x}?\nA:"),
    (IN_CONTEXT, ["--raw"], "hi {x}"),
    ({"prompt": "{instruction}", "reader": f"{TASKS}.instruction"}, [], "hi {x}"),
    ({"prompt": "", "answer": "{text}"}, [], "hi {x}"),
    ({"prompt": "{prompt}", "answer": "{answer}", "reader": f"{TASKS}.messages"}, [], "hi {x}"),
    ({"prompt": "{prompt}", "answer": "{answer}", "reader": f"{TASKS}.sharegpt"}, [], "hi {x}"),
]  # fmt: skip


def form(config: dict[str, Any], words: list[str]) -> chat_with.Form:
    options = chat_with.parser().parse_intermixed_args([*words, "TRIAL_DIR"])
    own = DatasetConfig(**{"answer": "{answer}", "name": "x"} | config)
    return chat_with.Form.of(own, options.column, raw=options.raw)


@pytest.mark.parametrize(("config", "words", "filled"), FORMS)
def test_a_prompt_is_asked_in_the_form_of_the_training_rows(
    config: dict[str, Any], words: list[str], filled: str
) -> None:
    assert form(config, words).filled("hi {x}") == filled


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ({"prompt": "{a} {b}"}, [], "--column: the template has the columns a, b; give all but the one"),
        ({"prompt": "{a}"}, ["--column", "a=1"], "--column: the template has the columns a; give all but"),
        ({"prompt": "{a}"}, ["--column", "a"], "--column=a: must be NAME=TEXT"),
        ({"prompt": "{a}"}, ["--raw", "--column", "a=1"], "--column=a=1: these prompts are put into no"),
        ({"prompt": "{a}"}, ["--column", "b=1"], "--column: the template has no column 'b'; there are: a"),
        ({"prompt": "{question}", "reader": None}, ["--column", "x=1", "--raw"], "into no template"),
        (IN_CONTEXT, [], "needs passage beside question, such as --column passage=TEXT"),
        (
            {"prompt": "{question}\n{options}", "reader": f"{TASKS}.commonsense_qa"},
            [],
            "needs options beside question",
        ),
    ],
)
def test_a_prompt_that_lacks_a_column_is_one_line_before_anything_is_loaded(
    config: dict[str, Any], words: list[str], message: str
) -> None:
    with pytest.raises(InputError) as error:
        form(config, words).filled("hi")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [[], ["--raw"]])
def test_a_prompt_of_bytes_that_are_no_text_is_one_line(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"^--prompt: is not UTF-8$"):
        form({"prompt": "{a}"}, words).filled("caf\udce9")


def test_turns_go_through_the_chat_template_until_an_empty_line(chat: Chat) -> None:
    place, base = conversing()
    made: Any = AutoTokenizer.from_pretrained(base)

    def conversation_ids(*texts: str) -> list[int]:
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        return list(made.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"])

    first = expected(base, conversation_ids("Tom has 3"), place)
    second = expected(base, conversation_ids("Tom has 3", first, "And 4?"), place)
    code, out, err = chat(place, *SHORT, lines="Tom has 3\nAnd 4?\n\nTom has 3\n")
    assert (code, out, err) == (0, f"{first}\n{second}\n{first}\n", "")


@pytest.mark.slow
def test_the_system_turn_begins_the_conversation_and_a_template_may_refuse_it(chat: Chat) -> None:
    place, base = conversing()
    made: Any = AutoTokenizer.from_pretrained(base)
    messages = [{"role": "system", "content": "Count."}, TALK[0]]
    ids = made.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    words = ["--system", "Count.", "--prompt", TALK[0]["content"], *SHORT]
    assert chat(place, *words)[:2] == (0, f"{expected(base, list(ids), place)}\n")
    tokenizer(LLAMA, []).save_pretrained(base)
    code, out, err = chat(place, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "does not go through the chat template" in err


@pytest.mark.slow
def test_tokens_are_drawn_as_transformers_draws_them(chat: Chat) -> None:
    place = trial()

    def drawn(seed: int) -> str:
        how = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0}
        return expected(model.TINY, prompt_ids("Tom has 3"), place, seed=seed, **how)

    words = [place, "--prompt", "Tom has 3", *SHORT]
    outputs = [chat(*words, "--temperature", "1.5", "--top-p", "0.9", "--seed", seed)[1] for seed in (0, 1)]
    assert outputs == [f"{drawn(seed)}\n" for seed in (0, 1)]
    assert outputs[0] != outputs[1]
    likeliest = chat(*words)[1]
    for none in (["--temperature", "0"], ["--temperature", "0", "--top-p", "0.5"], ["--top-p", "0.0001"]):
        assert chat(*words, *none)[1] == likeliest


def test_a_base_that_samples_otherwise_by_default_draws_as_is_asked() -> None:
    made: Any = AutoTokenizer.from_pretrained(model.TINY)
    base: Any = model.load(model_config(), None, torch.device("cpu"))
    probe.abilities(base)
    texts = []
    for leaking in ({}, {"top_k": 1, "min_p": 0.9, "do_sample": True}):
        base.generation_config.update(**leaking)
        torch.manual_seed(0)
        sampling = decoding.Sampling(temperature=2.0)
        texts += decoding.generate(base, made, ["Tom has 3"], max_new_tokens=LENGTH, sampling=sampling)
    assert texts[0] == texts[1]


def model_config() -> Any:
    from peftsweep.schema import ModelConfig

    return ModelConfig(name_or_path=str(model.TINY))


def test_a_folder_that_cannot_write_is_one_line(chat: Chat) -> None:
    place, classifier = trial(), saved({}, "classifier")
    Path("empty").mkdir()
    without = saved({}, "points")
    for file in (without / "adapter").iterdir():
        file.unlink()
    bare = Path(shutil.copytree(place, "bare"))
    (bare / "adapter" / "adapter_model.safetensors").unlink()
    for folder, message in {
        "nowhere": "nowhere: no such folder; must be a trial's folder",
        "empty": "empty: holds no result.json; must be a trial's folder",
        str(place.parent): "holds several trials",
        str(place / "result.json"): "result.json: is a file; must be a trial's folder",
        str(bare): "adapter: it holds no weights",
        str(classifier): "its model is a classifier, which writes no text",
        str(without): "the trial has no saved adapter; adapter.save=true keeps one",
    }.items():
        code, out, err = chat(folder, "--prompt", "a")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--temperature -1", "--temperature: must be a number, 0 or at least 1e-30, not -1"),
        ("--temperature 1e-320", "--temperature: must be a number, 0 or at least 1e-30, not 1e-320"),
        ("--temperature nan", "--temperature: must be a number"),
        ("--top-p 0", "--top-p: must be a number, above 0 and at most 1, not 0"),
        ("--top-p 1.1", "--top-p: must be a number, above 0 and at most 1"),
        ("--max-new-tokens 0", "--max-new-tokens: must be a whole number, at least 1"),
        ("--seed -1", "--seed: must be a whole number, at least 0"),
        ("--seed 4294967296", "--seed: must be a whole number, at most 4294967295"),
        ("--seed " + "9" * 5000, "--seed: must be a whole number, at most 4294967295"),
        ("--system s --prompt a", "--system: multirun/ranks"),
        ("--max-new-tokens 99999 --prompt a", "--max-new-tokens=99999: must be below 2048, which"),
        ("word", "word: must be KEY=VALUE"),
        ("device=tpu --prompt a", "device=tpu: must be auto, cpu, cuda"),
        ("method.r=3", "contradicts adapter.path="),
    ],
)
def test_a_wrong_option_is_one_line(chat: Chat, words: str, message: str) -> None:
    code, out, err = chat(trial(), *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_advice_for_a_training_is_not_said_at_each_turn(chat: Chat) -> None:
    no_end = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    place, _ = conversing(no_end + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    code, out, err = chat(place, *SHORT, lines="a\nb\n")
    assert (code, err) == (0, "")
    assert out


def test_without_a_trial_only_the_trial_is_asked_for(chat: Chat) -> None:
    assert chat() == (2, "", "peftsweep: TRIAL_DIR: must be given\n")


def test_a_prompt_that_is_cut_is_said_in_one_line_of_our_own(chat: Chat) -> None:
    place = trial()
    code, out, err = chat(place, "--prompt", "word," * 1000, *SHORT)
    assert (code, err.count("\n")) == (0, 1), err
    assert out
    assert f"tokens the model saw the last {2048 - LENGTH:,}, as it sees 2,048 at once" in err
    assert chat(place, "--prompt", "word", *SHORT)[2] == ""


def test_an_empty_prompt_is_no_turn(chat: Chat) -> None:
    assert chat(conversing()[0], "--prompt", " ", *SHORT)[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "prompt_tuning", "pissa"])
def test_trials_of_conversations_write_what_peft_does(method: str, chat: Chat, command: Any) -> None:
    _, base = conversing()
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "seven"}]}
        for n in range(40)
    ]
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model={base}", "model.dtype=float32", "dataset=talk.jsonl", f"method={method}", "study=talk"]
    code, _, err = command(*words, "train.steps=20", "train.learning_rate=1e-3", "eval=[perplexity]", "quiet=true")
    assert code == 0, err
    (place,) = Path("multirun/talk").glob("*/result.json")
    code, out, err = chat(place.parent, "--prompt", "3?", "--base", *SHORT)
    assert code == 0, err
    made: Any = AutoTokenizer.from_pretrained(base)
    turn = [{"role": "user", "content": "3?"}]
    ids = list(made.apply_chat_template(turn, add_generation_prompt=True, tokenize=True)["input_ids"])
    saved_model = place.parent / "adapter"
    written = expected(saved_model, ids) if method == "full" else expected(base, ids, place.parent)
    assert out == f"base: {expected(base, ids)}\ntrained: {written}\n"
