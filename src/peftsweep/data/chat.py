"""Conversations -> tokens by a chat template, and which of the tokens are trained on."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peftsweep.data.conversations import places
from peftsweep.data.conversations.template import PROBE, Span
from peftsweep.data.conversations.template import ChatTemplate as ChatTemplate
from peftsweep.data.conversations.turns import REASONING as REASONING
from peftsweep.data.conversations.turns import Conversation as Conversation
from peftsweep.data.conversations.turns import Message as Message
from peftsweep.data.conversations.turns import content_text as content_text
from peftsweep.data.conversations.turns import has_calls_or_reasoning as has_calls_or_reasoning
from peftsweep.data.conversations.turns import reasoning_text as reasoning_text
from peftsweep.schema import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The layout of a conversation without a chat template: each turn is a paragraph that begins with its role. The
# tokenizer's BOS stands before the first turn, and its EOS after each turn of the assistant.
PLAIN = (
    "{{ begin }}{% if tools %}Tools: {{ tools | tojson }}{{ '\n\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role | capitalize }}:"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.content %} {{ m.content }}{% endif %}{% if m.tool_calls %} {{ m.tool_calls | tojson }}{% endif %}"
    "{{ eos_token }}{% endgeneration %}{% else %} {{ m.content }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

NO_END = (
    "the chat template ends the last turn of the assistant without a special token: the model does not learn from "
    "the training where to stop"
)
UNTRAINED_END = (
    "the chat template marks the assistant's turns as generated ({% generation %}) without their end token: the model "
    "does not learn from the training where to stop"
)
TRAINED_PROMPT = (
    "the chat template marks a part of its generation prompt as generated ({% generation %}): the loss counts that too"
)
HELD_MARK = "a turn of the rows holds the text '{}', which is read as that special token, as if the turn ended or began"


class Rendered(NamedTuple):
    """A conversation in tokens: ``ids`` and ``trained`` (whether a token is trained on), [tokens] both."""

    ids: list[int]
    trained: list[bool]
    prompt: str  # the text before the last turn, with all special tokens and the generation prompt
    last_turn: str  # the last turn, as text without special tokens
    end: int | None  # the token that ends the last turn, if it has a special one
    written: tuple[str, str]  # prompt and answer before the template


def plain_layout(tokenizer: PreTrainedTokenizerBase, begin: str) -> ChatTemplate:
    """The layout of conversations without a chat template; ``begin`` stands before the first turn."""
    return ChatTemplate(tokenizer, PLAIN, {"begin": begin})


def render(template: ChatTemplate, conversation: Conversation, turns: Turns, written: tuple[str, str]) -> Rendered:
    """``conversation`` in the tokens of ``apply_chat_template(tokenize=True)``.

    ``turns`` chooses the turns of the assistant that are trained on.

    Raises:
        ValueError: the template leaves out a part of the conversation, or the place of a turn in the text is unknown.
        jinja2.TemplateError, or any error that a template raises: it refuses the conversation.
    """
    conversation = template.readable(conversation)
    text = template.text(conversation)
    _check_written_out(template, conversation, text)
    spans = marked = template.generated(conversation)
    if spans is None:
        spans = places.of_turns(template, conversation, text, only_last=turns is Turns.last)
    elif turns is Turns.last:
        start = places.turn(template, conversation, text, len(conversation.messages) - 1)[0]
        spans = [span for span in spans if span[1] > start]
    else:
        spans = places.trained_parts(template, conversation, text, spans)
    encoded = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = _covered(encoded.offset_mapping, spans, [token in template.special for token in encoded.input_ids])
    if not any(trained[1:]):
        raise ValueError("no token of it would be trained on")
    ids: list[int] = encoded.input_ids
    last = len(trained) - trained[::-1].index(True)
    first = next((n + 1 for n in range(last - 1, -1, -1) if not trained[n]), 0)
    end = _end(template, ids, first, last)
    if end is None:
        template.warn_once(NO_END)
    elif marked and end not in ids[first:last]:
        template.warn_once(UNTRAINED_END)
    prompted = _up_to_last_turn(template, conversation)
    if marked and text.startswith(prompted) and any(start < len(prompted) < stop for start, stop in spans):
        template.warn_once(TRAINED_PROMPT)
    held = [words for message in conversation.messages for words in _texts(message)]
    for mark in {template.special[token] for token in ids if token in template.special}:
        if any(mark in one for one in held):
            template.warn_once(HELD_MARK.format(mark))
    return Rendered(
        ids,
        trained,
        prompt=prompted,
        last_turn=str(template.tokenizer.decode(ids[first:last], skip_special_tokens=True)).strip(),
        end=end,
        written=written,
    )


def _texts(message: Message) -> list[str]:
    """The content and the reasoning of a turn."""
    return [content_text(message.get("content")), *(str(message[key]) for key in REASONING if message.get(key))]


def _end(template: ChatTemplate, ids: Sequence[int], first: int, last: int) -> int | None:
    """The special token that ends the last turn, the tokens ``first`` to ``last``; white space may follow it."""
    within = last - 1
    while within > first and not str(template.tokenizer.decode([ids[within]])).strip():
        within -= 1
    if ids[within] in template.special:
        return ids[within]
    return next((token for token in ids[last:] if token in template.special), None)


def prompt(template: ChatTemplate, conversation: Conversation) -> str:
    """The text before the last turn of ``conversation``, with the generation prompt."""
    return _up_to_last_turn(template, template.readable(conversation))


def generation_prompt_differs(template: ChatTemplate) -> bool:
    """Whether some written turn of the assistant does not begin with the template's generation prompt.

    Turns with content alone, with reasoning, with a call, and without content are tried, as the first and as a later
    turn. Conversations that the template refuses are passed over.
    """
    call = {"id": "probecall", "type": "function", "function": {"name": "probe", "arguments": {}}}
    ways: list[Message] = [{"content": "b"}, {"content": "b", REASONING[0]: "c"}, {"content": "b", REASONING[2]: "c"}]
    ways += [{"content": ""}, {"content": "", "tool_calls": [call]}, {"content": "", "tool_calls": [call]} | ways[1]]
    for way in ways:
        turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant"} | way]
        conversation = template.readable(Conversation([*turns, *turns]))
        for last in (1, 3):
            so_far = conversation._replace(messages=conversation.messages[: last + 1])
            for whole in (so_far, conversation):
                before = so_far._replace(messages=so_far.messages[:-1])
                prompted, text = places.text_of(template, before, begun=True), places.text_of(template, whole)
                if prompted is not None and text is not None and not text.startswith(prompted):
                    return True
    return False


def writes_beside_turns(template: ChatTemplate) -> bool:
    """Whether the template writes more after the last turn of every conversation, with tools or without."""
    tool = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}
    return any(places.appended(template, Conversation([], tools)) for tools in (None, [tool]))


def opens_after_calls(template: ChatTemplate) -> bool:
    """Whether an answer after a call is opened by the template beyond its generation prompt, as with gpt-oss.

    True only of a template that writes the call differently once the answer is there, as without its reasoning.
    """
    call = {"id": "probecall", "type": "function", "function": {"name": "probe", "arguments": {}}}
    answer = "\ue002"  # another private character than those of the probe
    user: Message = {"role": "user", "content": "a"}
    calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]} | dict.fromkeys(REASONING, "c")
    result: Message = {"role": "tool", "tool_call_id": "probecall", "name": "probe", "content": "d"}
    answered: Message = {"role": "assistant", "content": answer}
    conversation = template.readable(Conversation([user, calling, result, answered, user, answered]))
    before = conversation._replace(messages=conversation.messages[:3])
    prompted, text = places.text_of(template, before, begun=True), places.text_of(template, conversation)
    if prompted is None or text is None or text.startswith(prompted):
        return False
    try:
        start = places.beginning(template, conversation, text, 3)
    except Exception:  # a template may refuse a part of it
        return False
    return bool(text[start : text.find(answer)].strip())


def writes_calls_otherwise(template: ChatTemplate) -> bool:
    """Whether calls are tokenised otherwise than rows may hold them, or no generation prompt follows their results.

    That is, the template writes JSON text of arguments or an empty content beside a call, but expects another form.
    """
    as_objects = template.takes_json and template.takes_objects and not template.writes_json_alike
    return as_objects or template.empty_contents == [{}] or "tool" in template.left_out_prompts


def _up_to_last_turn(template: ChatTemplate, conversation: Conversation) -> str:
    return template.text(conversation._replace(messages=conversation.messages[:-1]), begun=True)


def _covered(offsets: Sequence[Span], spans: Sequence[Span], special: Sequence[bool]) -> list[bool]:
    """Whether each token overlaps a span; tokens of white space may have no characters in ``offsets``.

    Some ``special`` tokens hold the white space after them (Phi-3): one before a span that begins so is no part of it.
    """
    covered = [False] * len(offsets)
    ends = [end for _, end in offsets]
    for start, end in spans:
        n = bisect_right(ends, start)
        n += n < len(offsets) and special[n] and offsets[n][0] < start
        while n < len(offsets) and min(offsets[n][0], ends[n] - 1) < end:
            covered[n] = True
            n += 1
    return covered


# ---- is the whole conversation in the text? ------------------------------------------------------------


def _check_written_out(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """Check that ``text`` holds every message, call and tool, and the reasoning of the last turn.

    Probes show whether the template writes a message of this role and place at all, once for all conversations of the
    same shape; whether it writes this message, ``text`` shows.

    Raises:
        ValueError: a part of a message, a tool or the reasoning of the last turn is missing in ``text``.
    """
    messages = conversation.messages
    shape: tuple[Any, ...] = (bool(conversation.tools), *(key for key in REASONING if messages[-1].get(key)))
    shape += tuple((m["role"], bool(m.get("content")), len(m.get("tool_calls") or [])) for m in messages)
    shape += (json.dumps(conversation.variables, default=str),)
    for n, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        # The lines after any reasoning, which templates may leave out.
        visible = content_text(message.get("content")).rpartition("</think>")[2].strip()
        pieces = {"content": visible.splitlines(), "tool call": [part for call in calls for part in _pieces(call)]}
        probes = {"content": [places.with_probe(message)], "tool call": _with_probed_names(message)}
        for part, wanted in pieces.items():
            written = all(_occurs(piece.strip(), text) for piece in wanted)
            if wanted and shape not in template.complete:
                written = written and all(_writes(template, conversation, n, probe) for probe in probes[part])
            if not written:
                raise ValueError(f"the chat template does not write the {part} of turn {n + 1} ({message['role']})")
    thought = reasoning_text(messages[-1]).strip()
    written = all(_occurs(line.strip(), text) for line in thought.splitlines())
    for key in (key for key in REASONING if thought and shape not in template.complete and messages[-1].get(key)):
        # Its words may also stand elsewhere in the text.
        written = written and _writes(template, conversation, len(messages) - 1, messages[-1] | {key: PROBE})
    if not written:
        raise ValueError(
            f"the chat template does not write the reasoning of turn {len(messages)} (assistant), so it would not be "
            "trained on; give the tokenizer a chat template that writes it, or remove it from the row"
        )
    for tool in conversation.tools or ():
        if (name := tool.get("function", tool).get("name")) and not _occurs(name, text):
            raise ValueError(f"the chat template does not write the tool '{name}'")
    template.complete.add(shape)


def _writes(template: ChatTemplate, conversation: Conversation, number: int, probe: Message) -> bool:
    """Whether the template writes the probe when it stands in message ``number``."""
    messages = [*conversation.messages[:number], probe, *conversation.messages[number + 1 :]]
    text = places.text_of(template, conversation._replace(messages=messages))
    return text is None or PROBE in text


def _with_probed_names(message: Message) -> list[Message]:
    """The message with a probe as the name of each of its calls in turn: some templates write the first call alone."""
    calls = message.get("tool_calls") or []
    return [message | {"tool_calls": [*calls[:n], places.named(call), *calls[n + 1 :]]} for n, call in enumerate(calls)]


def _pieces(call: dict[str, Any]) -> list[str]:
    function = call.get("function", call)
    given = function.get("arguments")
    return [function["name"], *(given if isinstance(given, dict) else [given] if given else [])]


def _occurs(piece: str, text: str) -> bool:
    return piece in text or any(json.dumps(piece, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))
