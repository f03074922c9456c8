"""Conversations in tokens: the template's own, and which of them are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

from peftsweep import InputError
from peftsweep.config.compose import Trial
from peftsweep.data import batches, templates
from peftsweep.data import rows as data_rows
from peftsweep.data import tokens as data_tokens
from peftsweep.data.templates import Example
from peftsweep.data.tokens import Tokens
from peftsweep.evaluation import decoding, evaluate
from peftsweep.models import model, probe
from peftsweep.models.probe import Abilities
from peftsweep.schema import DatasetConfig, OnMissing, Turns

Row = dict[str, Any]
MARKS = ["<|im_start|>", "<|im_end|>", "<|end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Its own BOS, no header for the assistant, EOS after each answer, and roles that must alternate.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GENERATION = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Of earlier turns the reasoning is left out, and only the last turn ends with EOS too.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content %}<think></think>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}{{ '\n' }}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "generation": GENERATION, "reasoning": REASONING, "tools": TOOLS}


def turns(*texts: str) -> list[Row]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


TALK = turns("Tom has 3 pens.", "Three, then.", "And 4 more?", "\nSeven 😀 pens. ")


def tokenizer(template: str, special: list[str] = MARKS) -> Any:
    """The embedded tokenizer, which puts BOS before a text, with a chat template and its marks."""
    made: Any = AutoTokenizer.from_pretrained(model.TINY)
    made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = template
    return made


def ends_with_eos(made: Any) -> Any:
    marks = [("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    assert made("a").input_ids[-1] == made.eos_token_id
    return made


def read(*rows: Row, missing: OnMissing = OnMissing.error) -> list[Example]:
    reader = "peftsweep.data.tasks.messages"
    return templates.examples(rows, "{prompt}", "{answer}", file="rows.jsonl", reader=reader, missing=missing)


def tokens(made: Any, row: Row, max_length: int = 2048, **options: Any) -> Tokens:
    (found,) = data_tokens.tokenize(made, data_tokens.through_chat_template(made, read(row), **options), max_length)
    return found


def trained(made: Any, found: Tokens) -> list[str]:
    """The texts that are trained on, each in one piece."""
    mask = found.trained or [n >= found.answer_start for n in range(len(found.ids))]
    pieces: list[list[int]] = []
    for n, (token, mine) in enumerate(zip(found.ids, mask, strict=True)):
        if mine and (n == 0 or not mask[n - 1]):
            pieces.append([])
        if mine:
            pieces[-1].append(token)
    return [made.decode(piece) for piece in pieces]


# ---- tokens and turns ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("ending", [tokenizer, lambda template: ends_with_eos(tokenizer(template))])
def test_the_tokens_are_those_of_apply_chat_template(name: str, ending: Callable[[str], Any]) -> None:
    made = ending(TEMPLATES[name])
    for messages in (TALK[:2], TALK):
        found = tokens(made, {"messages": messages})
        assert found.ids == made.apply_chat_template(messages, tokenize=True)["input_ids"]


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("chatml", ["Three, then.<|im_end|>", "\nSeven 😀 pens. <|im_end|>"]),
        ("llama", [" Three, then.</s>", " Seven 😀 pens.</s>"]),
        ("generation", ["Three, then.</s>", "\nSeven 😀 pens. </s>"]),
        ("reasoning", ["Three, then.<|end|>", "<think></think>\nSeven 😀 pens. <|end|>\n</s>"]),
        ("tools", ["Three, then.<|im_end|>", "\nSeven 😀 pens. <|im_end|>"]),
    ],
)
def test_every_turn_of_the_assistant_is_trained_to_its_end_mark(name: str, every: list[str]) -> None:
    made = tokenizer(TEMPLATES[name])
    assert trained(made, tokens(made, {"messages": TALK})) == every
    assert trained(made, tokens(made, {"messages": TALK}, turns=Turns.last)) == every[-1:]


# Of families of models: the template, its special tokens, and what ends a turn of the assistant.
FAMILIES: dict[str, tuple[str, list[str], str]] = {
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}",
        ["<|h|>", "<|/h|>", "<|eot|>"],
        "<|eot|>",
    ),
    "Gemma, the system within the first turn": (
        "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in (messages[1:] if first else messages) %}<|turn|>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ first if loop.first else '' }}{{ m.content | trim }}<|/turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>model\n{% endif %}",
        ["<|turn|>", "<|/turn|>"],
        "<|/turn|>",
    ),
    "Mistral, the system within the last user's turn": (
        "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% set n = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set n.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST] {{ system if loop.index0 == n.last else '' }}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
        "</s>",
    ),
    "Phi 3, which ends a text with EOS too": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|end|>",
    ),
    "Zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        [],
        "</s>",
    ),
    "Alpaca": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% else %}"
        "### {{ 'Instruction' if m.role == 'user' else 'Response' }}:\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{% endif %}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        [],
        "</s>",
    ),
    "DeepSeek, whose generation prompt opens the reasoning": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "<|A|>{{ m.content.split('</think>')[-1] }}<|eos|>"
        "{% elif m.role == 'user' %}<|U|>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|A|><think>\n{% endif %}",
        ["<|A|>", "<|U|>", "<|eos|>"],
        "<|eos|>",
    ),
    "Qwen, with a system of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}" + CHATML,
        MARKS,
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("system", [False, True])
def test_the_assistant_s_texts_and_ends_of_turns_alone_are_trained_on(family: str, system: bool) -> None:
    template, special, end = FAMILIES[family]
    made = tokenizer(template, special)
    messages = turns("same", "same", "Hello é😀?", "عربي 7", "assistant:", "assistant: <a>")
    before: list[Row] = [{"role": "system", "content": "Be kind."}] if system else []
    found = tokens(made, {"messages": before + messages})
    assert found.ids == made.apply_chat_template(before + messages, tokenize=True)["input_ids"]
    pieces = trained(made, found)
    assert [piece.partition(end)[0].strip() for piece in pieces] == ["same", "عربي 7", "assistant: <a>"]
    assert [piece.partition(end)[1] for piece in pieces] == [end] * 3
    # What is not trained on, put together, is the text without the assistant's turns.
    rest = made.decode(found.ids)
    for piece in reversed(pieces):
        before_it, _, after_it = rest.rpartition(piece)
        rest = before_it + after_it
    assert "عربي" not in rest
    assert rest.count("same") == 1


def test_what_a_template_marks_by_generation_is_the_mask_of_transformers() -> None:
    made = tokenizer(GENERATION)
    found = tokens(made, {"messages": TALK})
    options: Row = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    assert found.trained == [bool(n) for n in made.apply_chat_template(TALK, **options)["assistant_masks"]]


def test_a_special_token_that_holds_the_white_space_after_it_is_not_trained_with_the_answer() -> None:
    """As of Phi-3: the mark before an answer that begins with a space was trained on."""
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    made = tokenizer(template + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", [])
    marks = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "end")]
    made.add_special_tokens({"additional_special_tokens": marks})
    for begun in ("", " ", "\n\n"):
        found = tokens(made, {"messages": turns("3?", f"{begun}three", "4?", f"{begun}four ")})
        assert trained(made, found) == ["three<|end|>", "four <|end|>"]


def test_reasoning_that_a_template_leaves_out_of_earlier_turns_is_not_trained() -> None:
    made = tokenizer(REASONING)
    messages = turns("3?", "<think>hm</think>Three.", "4?", "<think>oh</think>Four.")
    assert trained(made, tokens(made, {"messages": messages})) == [
        "Three.<|end|>",
        "<think>oh</think>Four.<|end|>\n</s>",
    ]


def test_after_a_prompt_that_opens_the_reasoning_a_turn_is_trained_from_its_first_character(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = tokenizer(CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"))
    messages = turns("3?", "<three>", "4?", "<th")
    assert trained(made, tokens(made, {"messages": messages})) == ["<three><|im_end|>", "<th<|im_end|>"]
    assert caplog.text.count("generation prompt differs from the beginning of a written turn of the assistant") == 1


def test_a_turn_whose_end_depends_on_its_place_is_refused_and_the_last_one_can_be_trained() -> None:
    template = CHATML.replace("<|im_end|>\n", "{{ '<|im_end|>' if loop.last }}\n")
    made = tokenizer(template)
    with pytest.raises(InputError, match=r"row 1 .* turns cannot be found in the rendered text; dataset\.turns=last"):
        tokens(made, {"messages": TALK})
    assert trained(made, tokens(made, {"messages": TALK}, turns=Turns.last)) == ["\nSeven 😀 pens. <|im_end|>"]


# Of gpt-oss: the last turn ends with another mark than those before it, which lose their reasoning once an answer is
# there; the result of a call repeats the name of what was called.
OTHER_END = (
    "{% set n = namespace(called='') %}{% for m in messages %}{% set last = m.role == 'assistant' and loop.last %}"
    "{% if m.tool_calls %}{% set n.called = m.tool_calls[0].function.name %}"
    "{% if messages[-1].role != 'assistant' and m.thinking %}<|start|>assistant<|say|>thinks<|message|>{{ m.thinking }}"
    "<|end|>{% endif %}<|start|>assistant to={{ n.called }}<|message|>{{ m.tool_calls[0].function.arguments | tojson }}"
    "<|call|>{% elif m.role == 'tool' %}<|start|>{{ n.called }}<|message|>{{ m.content }}<|end|>{% else %}"
    "{% if last and m.thinking %}<|start|>assistant<|say|>thinks<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|say|>final{% endif %}<|message|>{{ m.content }}"
    "{{ '<|return|>' if last else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
OTHER_MARKS = ["<|start|>", "<|say|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"]
ADD_CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}]
THOUGHT: Row = {"role": "assistant", "content": "Seven.", "thinking": "3+4"}
CALLS: Row = {"role": "assistant", "content": "", "thinking": "a tool", "tool_calls": ADD_CALL}


def test_a_turn_that_ends_with_another_mark_than_the_last_is_trained_to_it() -> None:
    made = tokenizer(OTHER_END, OTHER_MARKS)
    every = ["<|say|>final<|message|>b<|end|>", "<|say|>final<|message|>d<|return|>"]
    assert trained(made, tokens(made, {"messages": turns("a", "b", "c", "d")})) == every
    conversation = {"messages": [*turns("a"), CALLS, {"role": "tool", "content": "7"}, THOUGHT]}
    assert trained(made, tokens(made, conversation)) == [
        ' to=add<|message|>{"a": 3}<|call|>',
        "<|say|>thinks<|message|>3+4<|end|><|start|>assistant<|say|>final<|message|>Seven.<|return|>",
    ]


def test_white_space_may_follow_the_mark_that_ends_all_turns_but_the_last() -> None:
    """As of OLMo 3: the last turn ends with EOS alone. Conversations of several turns were refused."""
    end = "{{ eos_token if loop.last and m.role == 'assistant' else '<|im_end|>\\n' }}"
    made = tokenizer(CHATML.replace("<|im_end|>\n", end))
    found = tokens(made, {"messages": TALK})
    assert found.ids == made.apply_chat_template(TALK, tokenize=True)["input_ids"]
    assert trained(made, found) == ["Three, then.<|im_end|>", "\nSeven 😀 pens. </s>"]
    made.chat_template = TOOLS.replace("{% endfor %}<|im_end|>\n{% endfor %}", "{% endfor %}" + end + "{% endfor %}")
    called = [*turns("a"), CALLED_ADD, {"role": "tool", "content": "7"}, *turns("", "b")[1:]]
    assert trained(made, tokens(made, {"messages": called})) == ['<call>add{"a": 3}</call><|im_end|>', "b</s>"]


def test_what_opens_an_answer_is_trained_also_after_a_call_whose_reasoning_is_left_out_later() -> None:
    made = tokenizer(OTHER_END, OTHER_MARKS)
    called = [*turns("a"), CALLS, {"role": "tool", "content": "7"}]
    assert trained(made, tokens(made, {"messages": [*called, *turns("x", "b", "c", "d")[1:]]})) == [
        ' to=add<|message|>{"a": 3}<|call|>',
        "<|say|>final<|message|>b<|end|>",
        "<|say|>final<|message|>d<|return|>",
    ]


# Of Command-R7B: a next turn is begun after every conversation. Of Command-R+: an instruction stands there.
BEGUN = CHATML.partition("{% if add_generation_prompt %}")[0] + "<|im_start|>assistant\n<think></think>"
INSTRUCTED = CHATML.replace("{% if add", "<|im_start|>system\nAnswer well.<|im_end|>\n{% if add")
INSTRUCTED_CALLS = TOOLS.replace(
    "{% endfor %}<|im_end|>\n{% endfor %}",
    "{% endfor %}{% if not m.tool_calls %}<|im_end|>{% endif %}\n{% endfor %}<|im_start|>system\nAct.<|im_end|>\n",
)


@pytest.mark.parametrize("template", [BEGUN, INSTRUCTED], ids=["begun", "instructed"])
def test_what_a_template_writes_after_every_conversation_is_not_trained(template: str) -> None:
    made = tokenizer(template)
    made.eos_token = "<|im_end|>"
    every = ["Three, then.<|im_end|>", "\nSeven 😀 pens. <|im_end|>"]
    found = tokens(made, {"messages": TALK})
    assert found.ids == made.apply_chat_template(TALK, tokenize=True)["input_ids"]
    assert trained(made, found) == every
    assert trained(made, tokens(made, {"messages": TALK}, turns=Turns.last)) == every[-1:]
    (row,) = data_tokens.through_chat_template(made, read({"messages": TALK}))
    assert row.rendered is not None
    assert row.rendered.end == made.eos_token_id  # where generation stops
    assert row.rendered.last_turn == "Seven 😀 pens."


def test_an_instruction_after_a_call_without_an_end_mark_is_not_trained() -> None:
    made = tokenizer(INSTRUCTED_CALLS)
    made.eos_token = "<|im_end|>"
    call = '<call>add{"a": 3}</call>'
    row: Row = {"messages": [*turns("a"), CALLED_ADD], "tools": ADD_CALL}
    assert trained(made, tokens(made, row)) == [call]
    row["messages"] = [*row["messages"], {"role": "tool", "content": "7"}, *turns("", "b")[1:]]
    assert trained(made, tokens(made, row)) == [call, "b<|im_end|>"]


def test_a_template_that_writes_today_s_date_writes_the_same_day_in_all_trials() -> None:
    dated = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'no day' }}\n" + CHATML
    made = tokenizer(dated)
    text = made.decode(tokens(made, {"messages": TALK}).ids)
    assert text.startswith("26 Jul 2024\n<|im_start|>user\n")
    named = "{% set form = '%d %b %Y' %}{{ strftime_now(form) }}, {{ strftime_now( '%B %-d' ) | upper }}\n" + CHATML
    text = made.decode(tokens(tokenizer(named), {"messages": TALK}).ids)
    assert text.startswith("26 Jul 2024, JULY 26\n<|im_start|>user\n")
    marked = tokenizer(dated.partition("\n")[0] + GENERATION)
    assert marked.decode(tokens(marked, {"messages": TALK}).ids).startswith("26 Jul 2024")
    assert trained(marked, tokens(marked, {"messages": TALK})) == ["Three, then.</s>", "\nSeven 😀 pens. </s>"]


# The generation prompt closes the reasoning; turns before the last question are written without any.
CLOSED = (
    "{% set n = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > n.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }}{{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
CALLED_ADD: Row = {"role": "assistant", "content": "", "tool_calls": ADD_CALL}


def test_reasoning_that_is_written_is_trained_also_where_the_prompt_closes_it() -> None:
    made = tokenizer(CLOSED)
    reasoned = [*turns("a"), {"role": "assistant", "content": "b", "reasoning_content": "hm"}]
    assert trained(made, tokens(made, {"messages": reasoned})) == ["hm\n</think>\n\nb<|im_end|>"]
    both = {"messages": [*reasoned, *reasoned]}
    assert trained(made, tokens(made, both)) == ["b<|im_end|>", "hm\n</think>\n\nb<|im_end|>"]


def test_a_call_or_nothing_is_trained_from_its_first_character_where_the_prompt_reasons() -> None:
    made = tokenizer(CLOSED)
    row = {"messages": [*turns("a"), CALLED_ADD, {"role": "tool", "content": "7"}, *turns("b", "", "c", "d")[1:]]}
    row["messages"][3:3] = turns("e", "f")[1:] + turns("g")
    first, *others = trained(made, tokens(made, row))
    assert first == '<tool_call>add{"a": 3}</tool_call><|im_end|>'
    assert others == ["f<|im_end|>", "<|im_end|>", "d<|im_end|>"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_trained_under_each_key_that_rows_have_for_it(key: str) -> None:
    reasoned = [*turns("a"), {"role": "assistant", "content": "b", key: "hm"}]
    called = [*turns("a"), CALLED_ADD | {key: "hm"}]
    others = (CLOSED.replace("reasoning_content", name) for name in ("thinking", "reasoning"))
    for template in (CLOSED, *others, CLOSED.replace("m.reasoning_content", "(m.reasoning_content or m.reasoning)")):
        made = tokenizer(template)
        assert trained(made, tokens(made, {"messages": reasoned})) == ["hm\n</think>\n\nb<|im_end|>"]
        (found,) = trained(made, tokens(made, {"messages": called}))
        assert found.startswith("hm\n</think>\n\n<tool_call>add")


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (CHATML, {"content": "b", "reasoning_content": "so\nhm"}),
        (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), {"content": "<think>\nhm\n</think>\n\nb"}),
        (TOOLS, CALLED_ADD | {"thinking": "hm"}),
    ],
)
def test_a_row_whose_last_reasoning_the_template_leaves_out_is_refused(template: str, turn: Row) -> None:
    made, last = tokenizer(template), [*turns("a"), {"role": "assistant"} | turn]
    with pytest.raises(InputError, match=r"row 1 .* does not write the reasoning of turn 2 \(assistant\)"):
        tokens(made, {"messages": last})
    earlier = tokens(made, {"messages": [*last, *turns("c", "d")]})  # templates leave out that of earlier turns
    assert trained(made, earlier)[-1] == "d<|im_end|>"
    assert "hm" not in made.decode(earlier.ids)


# Of Mistral: tools stand before the last question, and after a question and before a result there must be a call.
MOVED_TOOLS = (
    "{% set n = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}"
    "{% elif m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('No call.') }}"
    "{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == n.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[RESULTS]{{ m.content }}[/RESULTS]{% else %}{% for call in m.tool_calls or [] %}[CALLS]"
    "{{ call.function | tojson }}{% endfor %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_call_is_trained_where_the_tools_stand_before_the_last_question_alone() -> None:
    made = tokenizer(MOVED_TOOLS, ["[INST]", "[/INST]", "[CALLS]", "[RESULTS]", "[/RESULTS]", "[TOOLS]", "[/TOOLS]"])
    messages = [*turns("a"), CALLED_ADD, {"role": "tool", "content": "7"}, *turns("", "b", "c", "d")[1:]]
    found = tokens(made, {"messages": messages, "tools": [SCHEMA]})
    call = '[CALLS]{"name": "add", "arguments": {"a": 3}}</s>'
    assert trained(made, found) == [call, "b</s>", "d</s>"]


def test_a_template_that_ends_the_last_turn_with_no_mark_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer(CHATML.replace("<|im_end|>", ""))
    assert trained(made, tokens(made, {"messages": turns("a", "b")})) == ["b\n"]
    assert "the model does not learn from the training where to stop" in caplog.text
    caplog.clear()
    for template in (CHATML, GENERATION):
        tokens(tokenizer(template), {"messages": turns("a", "b")})
    assert not caplog.text


def test_a_template_that_marks_turns_as_generated_without_their_ends_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As of MiniMax: the end token stands there, and is not trained on."""
    made = tokenizer(GENERATION.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"))
    found = tokens(made, {"messages": TALK})
    assert trained(made, found) == ["Three, then.", "\nSeven 😀 pens. "]
    assert caplog.text.count("without their end token: the model does not learn from the training where to stop") == 1


def test_a_prompt_and_its_answer_are_a_conversation_of_two_turns() -> None:
    made = tokenizer(LLAMA)
    rendered = data_tokens.through_chat_template(made, [Example("Hi", "Ho")])
    (found,) = data_tokens.tokenize(made, rendered, 64)
    assert found.ids == made.apply_chat_template(turns("Hi", "Ho"), tokenize=True)["input_ids"]
    assert found.ids.count(made.bos_token_id) == 1
    assert trained(made, found) == [" Ho</s>"]


def test_a_long_conversation_loses_its_beginning_but_for_bos() -> None:
    made = tokenizer(LLAMA)
    whole, cut = tokens(made, {"messages": TALK}), tokens(made, {"messages": TALK}, 30)
    assert cut.ids == [made.bos_token_id, *whole.ids[-29:]]
    assert cut.answer_tokens == sum((whole.trained or [])[-29:])
    short = tokens(made, {"messages": TALK}, 6)
    start = len(whole.ids) - len(made(" Seven 😀 pens.</s>", add_special_tokens=False).input_ids)
    assert short[:2] == ([made.bos_token_id, *whole.ids[start : start + 5]], 1)
    assert short.lost_prompt + short.lost_answer == len(whole.ids) - 6
    assert short.lost_answer == len(whole.ids) - start - 5


def test_collate_trains_every_turn_and_nothing_else() -> None:
    made = tokenizer(CHATML)
    rows = [tokens(made, {"messages": TALK}), tokens(made, {"messages": TALK[:2]})]
    batch = batches.collate(rows, pad_id=0)
    for n, row in enumerate(rows):
        mask = row.trained or [k >= row.answer_start for k in range(len(row.ids))]
        assert batch.answer_mask[n, : len(row.ids) - 1].tolist() == mask[1:]
        assert not batch.answer_mask[n, len(row.ids) - 1 :].any()
    assert batch.answer_tokens == batch.answer_mask.sum() == sum(row.answer_tokens for row in rows)


def test_tokenised_conversations_are_kept_and_read_as_they_were(tmp_path: Path) -> None:
    made = tokenizer(CHATML)
    rows = [tokens(made, {"messages": TALK}), tokens(made, {"messages": TALK[:2]}), Tokens([4, 5], 2, 1)]
    data_tokens.write_tokens(tmp_path / "tokens.parquet", rows)
    assert data_tokens.read_tokens(tmp_path / "tokens.parquet") == rows


# ---- tools, parts, JSON ----------------------------------------------------------------------------

SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": [4, None]}}}
CALLING: list[Row] = [
    {"role": "user", "content": "3+4?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "7"},
    {"role": "assistant", "content": "Seven."},
]
TWO_CALLS: list[Row] = [CALLING[0], CALLING[1] | {"tool_calls": [CALL, CALL | {"id": "c2"}]}, *CALLING[2:]]


def test_tools_and_their_calls_are_written_by_the_template() -> None:
    made = tokenizer(TOOLS)
    found = tokens(made, {"messages": CALLING, "tools": [SCHEMA]})
    assert found.ids == made.apply_chat_template(CALLING, tools=[SCHEMA], tokenize=True)["input_ids"]
    assert trained(made, found) == ['<call>add{"a": 3, "b": [4, null]}</call><|im_end|>', "Seven.<|im_end|>"]
    (last,) = data_tokens.through_chat_template(made, read({"messages": CALLING[:2], "tools": [SCHEMA]}))
    assert last.answer == '<call>add{"a": 3, "b": [4, null]}</call>'
    assert "None" not in made.decode(found.ids)


def test_json_text_and_files_of_arrow_give_the_same_tokens_as_objects(tmp_path: Path) -> None:
    made = tokenizer(TOOLS)
    plain: list[Row] = [{**turn, "tool_calls": [_call(4)]} if "tool_calls" in turn else {**turn} for turn in CALLING]
    row: Row = {"messages": plain, "tools": [SCHEMA]}
    same = tokens(made, row).ids
    as_text = {key: json.dumps(value) for key, value in row.items()}
    listed = row | {"tools": [json.dumps(SCHEMA)]}
    arguments = [turn | {"tool_calls": [_call("4")]} if "tool_calls" in turn else turn for turn in plain]
    (tmp_path / "calls.json").write_text(json.dumps([as_text, listed, row | {"messages": arguments}]))
    assert [tokens(made, read_row).ids for read_row in data_rows.read_rows(tmp_path / "calls.json")] == [same] * 3
    # In Arrow every turn has the keys of all turns, with null for those that it lacks.
    pd.DataFrame([{"messages": plain, "tools": json.dumps([SCHEMA])}]).to_parquet(tmp_path / "calls.parquet")
    assert tokens(made, data_rows.read_rows(tmp_path / "calls.parquet")[0]).ids == same


def _call(value: Any) -> Row:
    arguments = '{"a": 4}' if isinstance(value, str) else {"a": value}
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}


def test_arguments_are_json_text_for_a_template_that_writes_them_as_they_are() -> None:
    made = tokenizer(TOOLS.replace("call.function.arguments | tojson", "'=' + call.function.arguments"))
    found = trained(made, tokens(made, {"messages": CALLING}))
    assert found[0] == '<call>add={"a": 3, "b": [4, null]}</call><|im_end|>'
    # One that would write an object as Python does, and one that adds content to each call.
    made = tokenizer(
        TOOLS.replace(" | tojson }}</call>", " }}</call>").replace("{% if m.content %}", "{% if '' + m.content %}")
    )
    assert trained(made, tokens(made, {"messages": CALLING})) == [found[0].replace("=", ""), "Seven.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, PARTS])
def test_content_is_written_by_a_template_of_texts_and_by_one_of_parts(template: str) -> None:
    made = tokenizer(template)
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]
    assert tokens(made, {"messages": parts}) == tokens(made, {"messages": TALK})
    assert trained(made, tokens(made, {"messages": TALK}))[0] == "Three, then.<|im_end|>"
    two = [{"type": "text", "text": "Three,"}, {"type": "text", "text": "then."}]
    written = trained(made, tokens(made, {"messages": [TALK[0], {"role": "assistant", "content": two}]}))
    assert written == ["Three,then.<|im_end|>" if template == PARTS else "Three,\nthen.<|im_end|>"]


def test_without_the_template_conversations_have_a_plain_layout() -> None:
    made = ends_with_eos(tokenizer(CHATML))
    row = {"messages": [{"role": "system", "content": "Be kind."}, *TALK[:2], *CALLING], "tools": [SCHEMA]}
    found = tokens(made, row, chat_template=False)
    call = json.dumps([CALL])
    assert made.decode(found.ids) == (
        f"<s>Tools: {json.dumps([SCHEMA])}\n\nSystem: Be kind.\n\n"
        f"User: Tom has 3 pens.\n\nAssistant: Three, then.</s>\n\n"
        f"User: 3+4?\n\nAssistant: {call}</s>\n\nTool: 7\n\nAssistant: Seven.</s>\n\n"
    )
    assert trained(made, found) == [" Three, then.</s>", f" {call}</s>", " Seven.</s>"]


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (LLAMA, [TALK[0], *TALK[:2]], "Roles must alternate"),
        (CHATML.replace("%}<|im_start|>{{ m.role", "if m.role != 'system' %}<|im_start|>{{ m.role"),
         [{"role": "system", "content": "Be kind."}, *TALK], r"does not write the content of turn 1 \(system\)"),
        (CHATML, CALLING, "does not write the tool call of turn 2"),
        # The name and the argument of the call stand in the text anyway, as those of the tool.
        (TOOLS.replace("in m.tool_calls or []", "in []"), CALLING, "does not write the tool call of turn 2"),
        # As of GigaChat 3: of several calls of one function the first alone.
        (TOOLS.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"), TWO_CALLS, "not write the tool call"),
        (CHATML, turns(" ", "Ho"), None),
    ],
)  # fmt: skip
def test_what_the_template_refuses_or_leaves_out_is_named_by_row(
    template: str, messages: list[Row], reason: str | None
) -> None:
    made = tokenizer(template)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"a": {}, "b": {}}}}
    rows = read({"messages": TALK}, {"messages": messages} | ({"tools": [tool]} if "tools" in template else {}))
    if reason is None:
        assert data_tokens.through_chat_template(made, rows)
        return
    with pytest.raises(InputError, match=f"dataset: row 2 of rows.jsonl does not go through .*{reason}"):
        data_tokens.through_chat_template(made, rows, file="rows.jsonl")


def test_an_empty_prompt_is_no_turn_and_a_missing_template_is_said() -> None:
    with pytest.raises(InputError, match="row 2 does not go through the chat template: its prompt is empty"):
        data_tokens.through_chat_template(tokenizer(CHATML), [Example("Hi", "Ho"), Example(" ", "Ho")])
    with pytest.raises(InputError, match=r"dataset\.chat=true: the model's tokenizer has no chat template"):
        data_tokens.through_chat_template(AutoTokenizer.from_pretrained(model.TINY), [Example("Hi", "Ho")])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([*TALK, {"role": "user", "content": "Bye"}], "must end with the assistant's turn"),
        ("no JSON", "Expecting value"),
        ({"role": "user"}, "its messages are not a list"),
        ([{"content": "Hi"}, TALK[1]], "a turn is not an object with a role"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, TALK[1]], "a part of type 'image' is not text"),
        ([TALK[0], {"role": "assistant", "tool_calls": [{"id": "c1"}]}], "a tool call names no function"),
        ([TALK[0], {"role": "assistant", "content": None}], r"has no value for 'messages\[1\]\.content'"),
        ([TALK[0], {"role": "assistant", "content": "a\ud83d"}], "half a surrogate pair"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(messages: Any, reason: str) -> None:
    with pytest.raises(InputError, match=rf"dataset\.reader: row 2 of rows.jsonl .*{reason}"):
        read({"messages": TALK}, {"messages": messages})


def test_a_turn_without_content_drops_its_row_or_is_empty_if_so_wished() -> None:
    rows: list[Row] = [{"messages": TALK}, {"messages": [TALK[0], {"role": "assistant", "content": None}]}]
    assert len(read(*rows, missing=OnMissing.drop)) == 1
    made = tokenizer(CHATML)
    (_, empty) = data_tokens.tokenize(
        made, data_tokens.through_chat_template(made, read(*rows, missing=OnMissing.empty)), 99
    )
    assert trained(made, empty) == ["<|im_end|>"]


# ---- in a trial ------------------------------------------------------------------------------------


class Writer(torch.nn.Module):
    """A model that keeps what it was arguments to go on from."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"use_cache": False})
        self.arguments: Row = {}
        probe.abilities(self, Abilities(padded_batches=True, row_cache=False))

    def generate(self, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return torch.cat([arguments["input_ids"], arguments["input_ids"].new_full((1, 1), 5)], dim=1)


def test_writing_goes_on_from_the_generation_prompt_and_ends_where_the_template_ends_a_turn() -> None:
    made, writer = ends_with_eos(tokenizer("{{ bos_token }}" + CHATML)), Writer()
    rows = data_tokens.through_chat_template(made, read({"messages": TALK}))
    decoding.generate(writer, made, rows, max_new_tokens=4)
    wanted = made.apply_chat_template(TALK[:-1], add_generation_prompt=True, tokenize=True)["input_ids"]
    assert writer.arguments["input_ids"].tolist() == [wanted]
    assert set(writer.arguments["eos_token_id"]) == {made.eos_token_id, made.convert_tokens_to_ids("<|im_end|>")}
    assert (rows[0].prompt, rows[0].answer) == (made.decode(wanted).removeprefix("<s>"), TALK[-1]["content"])


def test_choices_are_judged_after_the_template_with_its_one_bos() -> None:
    made = ends_with_eos(tokenizer(LLAMA))
    choices = tuple(templates.Choice("Is it?", f" {word}", word, word) for word in ("yes", "no"))
    (row,) = data_tokens.through_chat_template(made, [Example("Is it?", " no", choices, 1)])
    pairs = [(choice.prompt, choice.answer) for choice in row.choices]
    for found, word in zip(data_tokens.tokenize_pairs(made, pairs, 64, marked=True), (" yes", " no"), strict=True):
        assert made.decode(found.ids) == f"<s>[INST] Is it? [/INST]{word}"
        assert made.decode(found.ids[found.answer_start :]) == word


@pytest.fixture
def chatty(tmp_path: Path) -> str:
    """A folder of the embedded model with a chat template."""
    folder = tmp_path / "chatty"
    made = tokenizer(GENERATION, [])
    made.save_pretrained(folder)
    for file in Path(model.TINY).iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def test_perplexity_judges_the_turns_that_are_trained(chatty: str) -> None:
    made: Any = AutoTokenizer.from_pretrained(chatty)
    base = cast(Any, model.load(model_config(chatty), None, torch.device("cpu")))
    rows = data_tokens.through_chat_template(made, read({"messages": TALK}, {"messages": TALK[:2]}))
    found = evaluate.perplexity(base, made, rows)
    for line, messages in zip(found.predictions, (TALK, TALK[:2]), strict=True):
        encoded = made.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = base(input_ids=encoded["input_ids"]).logits[0, :-1].log_softmax(-1)
        each = logits.gather(1, encoded["input_ids"][0, 1:, None])[:, 0]
        mask = torch.as_tensor(encoded["assistant_masks"]).view(-1)[1:].bool()
        assert line["tokens"] == mask.sum()
        assert line["log_likelihood"] == pytest.approx(float(each[mask].sum()), rel=1e-5)
        assert line["answer"] == messages[-1]["content"]


def model_config(folder: str) -> Any:
    from peftsweep.schema import ModelConfig

    return ModelConfig(name_or_path=folder)


def rows_file(rows: list[Row]) -> str:
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "talk.jsonl"


WORDS = ["dataset=chat", "model=causal_lm", "model.dtype=float32", "train.steps=1", "eval=[perplexity]"]


def test_a_row_that_the_template_refuses_ends_the_sweep_before_anything_is_loaded(
    chatty: str, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = tokenizer(LLAMA, [])
    refusing.save_pretrained(chatty)
    path = rows_file([{"messages": turns(f"{n}?", str(n))} for n in range(8)] + [{"messages": [TALK[0], *TALK]}])
    monkeypatch.setattr(model, "load", None)
    words = [*WORDS, f"dataset.path={path}", f"model.name_or_path={chatty}"]
    for more in ([], ["dry_run=true"]):
        code, _, err = command(*words, *more)
        assert (code, err.count("\n")) == (2, 1)
        assert "dataset: row 9 of talk.jsonl does not go through the chat template: Roles must alternate." in err


def test_seen_in_training_counts_whole_conversations_and_the_turns_are_part_of_the_identity(
    chatty: str, compose: Callable[..., Trial]
) -> None:
    from peftsweep import cli

    rows = [{"messages": turns("Hi", str(n), "Bye", "Bye")} for n in range(8)]
    path = rows_file(rows)
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0], {"messages": turns("Hi", "9")}]))
    words = [*WORDS, f"dataset.path={path}", "dataset.test_path=test.jsonl", f"model.name_or_path={chatty}"]
    result = cli.run_one([*words, "dataset.leave_out_tested=false"])
    assert result.error is None
    assert (result.eval_info["perplexity"]["seen_in_training"], result.train_info["tested_rows"]) == (1, 1)
    assert result.train_info["training_rows"] == 8
    one, last, plain = (compose(*words, *more) for more in ([], ["dataset.turns=last"], ["dataset.chat=false"]))
    assert len({one.training, last.training, plain.training}) == 3


def test_new_keys_change_no_hash_of_a_dataset_that_does_not_use_them() -> None:
    from peftsweep.config.identity import _dataset_identity

    own = DatasetConfig(name="x", hub="a/b", prompt="{q}", answer="{a}")
    known = set(_dataset_identity(own, None))
    assert not known & {"missing", "turns", "encoding", "leave_out_tested"}
    own.missing, own.encoding, own.leave_out_tested = OnMissing.drop, "cp1252", False
    assert set(_dataset_identity(own, None)) - known == {"missing", "encoding", "leave_out_tested"}
