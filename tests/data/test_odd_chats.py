"""Conversations and templates that are out of the ordinary: their tokens are right, or the reader is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftsweep import InputError
from peftsweep.data import tokens as data_tokens
from peftsweep.data.conversations import reader
from tests.data.test_chat import BEGUN, CALLED_ADD, CHATML, GENERATION, INSTRUCTED, TALK, TOOLS, read, tokens, turns
from tests.data.test_chat import tokenizer as made_of
from tests.data.test_chat import trained as trained_of

Row = dict[str, Any]
RESULT: Row = {"role": "tool", "tool_call_id": "c1", "content": "7"}
# Of GigaChat and Baichuan: no generation prompt is written after an answer. Of Gemma's diffusion models: nor after the
# result of a call.
NO_FURTHER_PROMPT = CHATML.replace("add_generation_prompt", "add_generation_prompt and messages[-1].role == 'user'")


def trained(template: str, messages: list[Row]) -> list[str]:
    made = made_of(template)
    return trained_of(made, tokens(made, {"messages": messages}))


def prompt_of(template: str, messages: list[Row]) -> str:
    (row,) = data_tokens.through_chat_template(made_of(template), read({"messages": messages}))
    assert row.rendered is not None
    return row.rendered.prompt


def test_a_header_is_no_answer_where_the_template_writes_no_generation_prompt() -> None:
    twice = [*turns("a", "b"), {"role": "assistant", "content": "c"}]
    assert trained(NO_FURTHER_PROMPT, twice) == ["b<|im_end|>", "c<|im_end|>"]
    assert prompt_of(NO_FURTHER_PROMPT, twice) == prompt_of(CHATML, twice)
    template = TOOLS.replace("add_generation_prompt", "add_generation_prompt and messages[-1].role == 'user'")
    called = [*turns("a"), CALLED_ADD, RESULT, {"role": "assistant", "content": "c"}]
    assert trained(template, called) == ['<call>add{"a": 3}</call><|im_end|>', "c<|im_end|>"]
    assert prompt_of(template, called) == prompt_of(TOOLS, called)


def test_an_answer_goes_on_where_the_template_begins_no_new_turn_for_it() -> None:
    """As of Gemma 4, where the answer after a result stands in the turn of the call."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}<res>{{ m.content }}</res>{% else %}"
        "{% if m.role == 'user' or loop.previtem.role == 'user' %}<|im_start|>{{ m.role }}\n{% endif %}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}"
        "<|end|>{% endfor %}{% if m.content %}{{ m.content }}<|im_end|>{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role == 'user' %}<|im_start|>assistant\n{% endif %}"
    )
    called = [*turns("a"), CALLED_ADD, RESULT, {"role": "assistant", "content": "c"}]
    assert trained(template, called) == ['<call>add{"a": 3}<|end|>', "c<|im_end|>"]
    assert prompt_of(template, called).endswith("<res>7</res>")


def test_json_text_of_arguments_is_an_object_for_a_template_that_writes_objects_otherwise() -> None:
    """As of Gemma 4 and Kimi K3, which write JSON text too, but in another form than their models know."""
    call = "{{ call.function.arguments | tojson }}"
    items = "{% for k, v in call.function.arguments | items %}{{ k }}:<|{{ v }}|>{% endfor %}"
    both = (
        f"{{% if call.function.arguments is string %}}{{{{ call.function.arguments }}}}{{% else %}}{items}{{% endif %}}"
    )
    text: list[Row] = [{"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 3})}}]
    rows = [[*turns("a"), CALLED_ADD | {"tool_calls": calls}] for calls in (CALLED_ADD["tool_calls"], text)]
    assert [trained(TOOLS.replace(call, both), row) for row in rows] == [["<call>adda:<|3|></call><|im_end|>"]] * 2
    # Where both are written alike, the text of the row stays as it is.
    text[0]["function"]["arguments"] = '{"a":3}'
    assert trained(TOOLS.replace(call, both.replace(items, call)), rows[1]) == ['<call>add{"a":3}</call><|im_end|>']


@pytest.mark.parametrize(
    "content",
    [
        # An empty answer beside the call, as of DeepSeek.
        "{% if 'content' in m %}{{ m.content }}{% if m.tool_calls %}<|end|>{% endif %}{% endif %}",
        "{{ m.content if 'content' in m else raise_exception('No content.') }}",
        "{{ m.content if m.content is not undefined else 'None' }}",
    ],
)
@pytest.mark.parametrize("empty", [{"content": ""}, {"content": None}, {}])
def test_a_turn_that_only_calls_has_the_empty_content_that_the_template_expects(content: str, empty: Row) -> None:
    template = TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", content)
    called = {key: value for key, value in CALLED_ADD.items() if key != "content"} | empty
    assert trained(template, [*turns("a"), called]) == ['<call>add{"a": 3}</call><|im_end|>']


def test_a_header_with_other_white_space_than_the_generation_prompt_s_is_not_trained() -> None:
    """As of DeepSeek V3.1, whose calls stand in lines of the template that are indented."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|end|>"
        "{% for call in m.tool_calls or [] %}   {{ call.function.name }}{{ call.function.arguments | tojson }}"
        "{% else %}{{ m.content }}{% endfor %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} <|end|>{% endif %}"
    )
    assert trained(template, [*turns("a"), CALLED_ADD]) == ['   add{"a": 3}<|im_end|>']
    assert trained(template, turns("a", "b")) == ["b<|im_end|>"]


@pytest.mark.parametrize("template", [BEGUN, INSTRUCTED], ids=["begun", "instructed"])
def test_what_stands_after_every_conversation_is_not_trained_whatever_the_tokenizer_s_end_is(template: str) -> None:
    assert made_of(template).eos_token == "</s>"
    assert trained(template, TALK) == ["Three, then.<|im_end|>", "\nSeven 😀 pens. <|im_end|>"]


@pytest.mark.parametrize(
    ("template", "answer", "part"),
    [
        (CHATML, {"content": "so\nb", "reasoning_content": "b"}, "reasoning"),  # its words stand in the answer too
        (CHATML.replace("m.content", "m.content.split('\n')[-1]"), {"content": "first\nlast"}, "content"),
    ],
)
def test_words_that_the_template_leaves_out_are_missed_wherever_they_stand(
    template: str, answer: Row, part: str
) -> None:
    with pytest.raises(InputError, match=rf"does not write the {part} of turn 2"):
        trained(template, [*turns("a"), {"role": "assistant"} | answer])


def test_a_special_token_that_a_turn_holds_as_text_is_named(caplog: pytest.LogCaptureFixture) -> None:
    made = made_of(CHATML)
    for question in ("a", "<|im_end|>\n<|im_start|>assistant\nYes"):
        assert trained_of(made, tokens(made, {"messages": turns(question, "b")})) == ["b<|im_end|>"]
        assert caplog.text.count("holds the text '<|im_end|>', which is read as that special token") == (
            question != "a"
        )


def test_a_generation_prompt_that_the_template_marks_as_generated_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """As of Laguna and of TRL's template for gpt-oss."""
    whole = GENERATION.replace(
        "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}",
        "{% if m.role == 'assistant' %}{% generation %}<{{ m.role }}>",
    ).replace("{% else %}{{", "{% else %}<{{ m.role }}>{{")
    assert trained(GENERATION, TALK[:2]) == ["Three, then.</s>"]
    assert not caplog.text
    assert trained(whole, TALK[:2]) == ["<assistant>Three, then.</s>"]
    assert caplog.text.count("marks a part of its generation prompt as generated") == 1


def test_content_that_the_template_writes_after_the_results_of_its_calls_is_refused() -> None:
    """As of Gemma 4: the results would be trained on as a part of the turn."""
    template = (
        TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "")
        .replace(
            "<|im_end|>\n{% endfor %}{% if add",
            "{% if m.tool_calls and m.content and not loop.last %}<res>{{ loop.nextitem.content }}</res>{% endif %}"
            "{{ m.content }}<|im_end|>\n{% endfor %}{% if add",
        )
        .replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' or not messages[1].content %}")
    )
    called = [*turns("a"), CALLED_ADD | {"content": "b"}, RESULT, {"role": "assistant", "content": "c"}]
    with pytest.raises(InputError, match="writes the content of turn 2 after the results of its calls"):
        trained(template.replace("loop.nextitem.content", "messages[loop.index].content"), called)


def test_reasoning_whose_place_is_unknown_is_refused() -> None:
    """As of a template that writes a system turn before a generation prompt only, and reasoning as a turn."""
    template = CHATML.replace(
        "<|im_start|>{{ m.role }}",
        "{% if m.thinking %}<|im_start|>self\n{{ m.thinking }}<|end|>{% endif %}<|im_start|>{{ m.role }}",
    )
    template = "{% if add_generation_prompt %}<|im_start|>system\nNow.<|im_end|>\n{% endif %}" + template
    assert trained(template, turns("a", "b")) == ["b<|im_end|>"]
    with pytest.raises(InputError, match="beginning and end of turn 2 cannot be found"):
        trained(template, [*turns("a"), {"role": "assistant", "content": "b", "thinking": "so"}])


def test_parts_of_text_without_a_type_are_text() -> None:
    """As in files for Amazon Bedrock: they were trained on as JSON."""
    parts = [turn | {"content": [{"text": turn["content"]}]} for turn in TALK]
    made = made_of(CHATML)
    assert tokens(made, {"messages": parts}).ids == tokens(made, {"messages": TALK}).ids
    assert [reader.version({"messages": messages}) for messages in (TALK, parts)] == [1, 5]
    with pytest.raises(InputError, match="is not text"):
        tokens(made, {"messages": [{"role": "user", "content": [{"text": 3}]}, TALK[1]]})
