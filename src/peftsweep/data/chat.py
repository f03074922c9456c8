"""Conversations -> tokens by a chat template, and which of the tokens are trained on."""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from peftsweep.data.conversations.turns import Conversation as Conversation
from peftsweep.data.conversations.turns import Message as Message
from peftsweep.data.conversations.turns import arguments_object, content_text, is_trained
from peftsweep.data.conversations.turns import says_something_else as says_something_else
from peftsweep.schema import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Span = tuple[int, int]  # of characters, the end excluded

# The layout of a conversation without a chat template: a paragraph a turn, which its role begins; the tokenizer's
# own marks stand before the first turn and after each of the assistant's.
PLAIN = (
    "{{ begin }}{% if tools %}Tools: {{ tools | tojson }}{{ '\n\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role | capitalize }}:"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.content %} {{ m.content }}{% endif %}{% if m.tool_calls %} {{ m.tool_calls | tojson }}{% endif %}"
    "{{ eos_token }}{% endgeneration %}{% else %} {{ m.content }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
PROBE = "\ue000\ue001"  # private characters, which no template strips, escapes or looks for
ARGUMENTS = {"probe_key": "probe_value"}


class Rendered(NamedTuple):
    """A conversation in tokens: ``ids`` and ``trained`` (whether a token is trained on), [tokens] both."""

    ids: list[int]
    trained: list[bool]
    prompt: str  # up to where the last turn is to be written, as text with all special tokens
    said: str  # the last turn, as text without special tokens
    end: int | None  # the token that ends the last turn, if it has a special one
    written: tuple[str, str]  # prompt and answer before the template


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's chat template, or ``source``, with what it can read found out by probing it."""

    tokenizer: PreTrainedTokenizerBase
    source: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    complete: set[tuple[Any, ...]] = field(default_factory=set)  # shapes of conversations that it writes out wholly

    def text(self, conversation: Conversation, *, begun: bool = False) -> str:
        """The conversation as text; with ``begun``, up to where the assistant goes on."""
        return str(
            self.tokenizer.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                chat_template=self.source,
                add_generation_prompt=begun,
                tokenize=False,
                **self.variables,
            )
        )

    def generated(self, conversation: Conversation) -> list[Span] | None:
        """What the template itself marks by ``{% generation %}``; None where it has no such mark."""
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.tokenizer.get_chat_template(self.source, conversation.tools)
        if not GENERATION.search(source):
            return None
        # apply_chat_template returns these as a mask of tokens, which goes on to the end of the row where a span
        # ends in white space that the tokenizer's offsets leave out.
        present = [{key: value for key, value in m.items() if value is not None} for m in conversation.messages]
        render: Any = render_jinja_template  # whose annotations are not those of what it returns
        _, spans = render(
            conversations=[present],
            tools=conversation.tools,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.variables},
        )
        return [(start, end) for start, end in spans[0] if start < end]

    def readable(self, conversation: Conversation) -> Conversation:
        """The same conversation, with contents and arguments in the form that the template writes out."""
        return conversation._replace(messages=[self._readable(message) for message in conversation.messages])

    def _readable(self, message: Message) -> Message:
        message = dict(message)
        if isinstance(content := message.get("content"), str if self._parts_only else list):
            if self._parts_only:
                message["content"] = [{"type": "text", "text": content}]
            elif not self._takes_parts:
                message["content"] = content_text(content)
        if calls := message.get("tool_calls"):
            if message.get("content") is None and self._needs_content:
                message["content"] = ""
            message["tool_calls"] = [self._readable_call(call) for call in calls]
        return message

    def _readable_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        given = function.get("arguments")
        said = arguments_object(given) if isinstance(given, str) else given
        if isinstance(given, str) and self._takes_objects and not self._takes_json:
            function = function | {"arguments": said}
        elif isinstance(given, dict) and self._takes_json and not self._takes_objects:
            function = function | {"arguments": json.dumps(given, ensure_ascii=False)}
        return call | {"function": function} if "function" in call else function

    @cached_property
    def _takes_parts(self) -> bool:
        said = self._probe([{"role": "user", "content": [{"type": "text", "text": PROBE}]}])
        return PROBE in said and "'text'" not in said and '"text"' not in said

    @cached_property
    def _parts_only(self) -> bool:
        return self._takes_parts and PROBE not in self._probe([{"role": "user", "content": PROBE}])

    @cached_property
    def _takes_objects(self) -> bool:
        said = self._probe_arguments(ARGUMENTS)
        return "probe_key" in said and str(ARGUMENTS) not in said

    @cached_property
    def _takes_json(self) -> bool:
        text = json.dumps(ARGUMENTS)
        return text in self._probe_arguments(text)

    @cached_property
    def _needs_content(self) -> bool:
        form = json.dumps(ARGUMENTS) if self._takes_json else ARGUMENTS
        return not self._probe_arguments(form, content=None) and bool(self._probe_arguments(form))

    def _probe_arguments(self, arguments: Any, *, content: str | None = "") -> str:
        call = {"id": "probecall", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        user = [{"type": "text", "text": "probe"}] if self._parts_only else "probe"
        answer: Message = {"role": "assistant", "tool_calls": [call]}
        if content is not None:
            answer["content"] = content
        return self._probe([{"role": "user", "content": user}, answer])

    def _probe(self, messages: list[Message]) -> str:
        try:
            return self.text(Conversation(messages))
        except Exception:  # a template may raise anything: then it does not take this
            return ""

    @cached_property
    def special(self) -> dict[int, str]:
        """The tokenizer's special tokens by id, ends of turns among them."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {number: str(token) for number, token in added if token.special}


def plain_layout(tokenizer: PreTrainedTokenizerBase, begin: str) -> ChatTemplate:
    """The layout of conversations without a chat template; ``begin`` stands before the first turn."""
    return ChatTemplate(tokenizer, PLAIN, {"begin": begin})


def render(template: ChatTemplate, conversation: Conversation, turns: Turns, written: tuple[str, str]) -> Rendered:
    """``conversation`` in the tokens of ``apply_chat_template(tokenize=True)``; ``turns`` of the assistant are trained.

    Raises:
        ValueError: the template leaves out a part of the conversation, or the place of a turn in the text is unknown.
        jinja2.TemplateError, and what else a template may raise: it refuses the conversation.
    """
    conversation = template.readable(conversation)
    text = template.text(conversation)
    _check_written_out(template, conversation, text)
    spans = template.generated(conversation)
    if spans is None:
        spans = _turns(template, conversation, text, only_last=turns is Turns.last)
    elif turns is Turns.last:
        start = _turn(template, conversation, text, len(conversation.messages) - 1)[0]
        spans = [span for span in spans if span[1] > start]
    else:
        spans = _trained_parts(template, conversation, text, spans)
    encoded = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = _covered(encoded.offset_mapping, spans)
    if not any(trained[1:]):
        raise ValueError("no token of it would be trained on")
    ids: list[int] = encoded.input_ids
    last = len(trained) - trained[::-1].index(True)
    first = next((n + 1 for n in range(last - 1, -1, -1) if not trained[n]), 0)
    return Rendered(
        ids,
        trained,
        prompt=_up_to_last_turn(template, conversation),
        said=str(template.tokenizer.decode(ids[first:last], skip_special_tokens=True)).strip(),
        end=_end(template, ids, first, last),
        written=written,
    )


def _end(template: ChatTemplate, ids: Sequence[int], first: int, last: int) -> int | None:
    """The special token that ends the last turn, the tokens ``first`` to ``last``; white space may stand after it."""
    within = last - 1
    while within > first and not str(template.tokenizer.decode([ids[within]])).strip():
        within -= 1
    if ids[within] in template.special:
        return ids[within]
    return next((token for token in ids[last:] if token in template.special), None)


def prompt(template: ChatTemplate, conversation: Conversation) -> str:
    """The text up to where the last turn of ``conversation`` is to be written."""
    return _up_to_last_turn(template, template.readable(conversation))


def _up_to_last_turn(template: ChatTemplate, conversation: Conversation) -> str:
    return template.text(conversation._replace(messages=conversation.messages[:-1]), begun=True)


def _covered(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token overlaps a span; tokens of white space may have no characters in ``offsets``."""
    covered = [False] * len(offsets)
    ends = [end for _, end in offsets]
    for start, end in spans:
        n = bisect_right(ends, start)
        while n < len(offsets) and min(offsets[n][0], ends[n] - 1) < end:
            covered[n] = True
            n += 1
    return covered


# ---- where the assistant's turns are ---------------------------------------------------------------


def _turns(template: ChatTemplate, conversation: Conversation, text: str, *, only_last: bool) -> list[Span]:
    marks = tuple(template.special.values())
    messages = conversation.messages
    found: list[Span] = []
    for number in range(len(messages) - 1 if only_last else 0, len(messages)):
        if not is_trained(messages[number]):
            continue
        start, end = _turn(template, conversation, text, number)
        if (said := text[start:end].rstrip()).endswith(marks):
            end = start + len(said)  # the white space after an end mark is the template's, not the assistant's
        if not (found[-1][1] if found else 0) <= start < end:
            raise ValueError(_unknown(number))
        found.append((start, end))
    return found


def _trained_parts(template: ChatTemplate, conversation: Conversation, text: str, spans: list[Span]) -> list[Span]:
    """The spans that the template marks as generated, without those of turns with the weight 0."""
    for number, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and not is_trained(message):
            start, end = _turn(template, conversation, text, number)
            spans = [span for span in spans if span[1] <= start or span[0] >= end]
    return spans


def _unknown(number: int) -> str:
    return f"where turn {number + 1} begins and ends cannot be told; {_LOCATORS}"


_LOCATORS = "dataset.turns=last trains the last turn alone, and a template with {% generation %} marks its turns itself"


def _turn(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> Span:
    """Where the assistant's turn ``number`` is in ``text``: from where it would be generated to where it ends.

    Both are known where the conversation up to there is rendered as it is within the whole. Templates that
    write a turn otherwise once others follow it (without its reasoning, say) are asked by a probe.

    Raises:
        ValueError: neither way tells.
    """
    before = conversation._replace(messages=conversation.messages[:number])
    so_far = conversation._replace(messages=conversation.messages[: number + 1])
    last = number == len(conversation.messages) - 1
    start = _length_within(text, _text(template, before, begun=True))
    if start is None:
        start = _begin(template, conversation, text, number)
    end = len(text) if last else _length_within(text, _text(template, so_far))
    if end is None:
        _, end = _content_place(template, conversation, text, number)
        _, as_last = _probed(template, so_far, number)
        end += _end_mark(template, text[end:], as_last)
    return start, end


def _begin(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> int:
    """Where a turn begins that the template writes otherwise than after its generation prompt, which may reason.

    That is where its content begins; if that is unknown, the first difference to the generation prompt.
    """
    before = conversation._replace(messages=conversation.messages[:number])
    if number:
        _warn_of_another_prompt(template)
    if conversation.messages[number].get("content"):
        with suppress(ValueError):
            return _content_place(template, conversation, text, number)[0]
    asked, closed = _text(template, before, begun=True), _length_within(text, _text(template, before))
    if asked is None or closed is None or (shared := _shared(text, asked)) < closed:
        raise ValueError(_unknown(number))
    return shared


def _shared(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _text(template: ChatTemplate, part: Conversation, *, begun: bool = False) -> str | None:
    try:
        return template.text(part, begun=begun)
    except Exception:  # a template may refuse a part of a conversation that it takes as a whole
        return None


def _length_within(text: str, beginning: str | None) -> int | None:
    return len(beginning) if beginning is not None and text.startswith(beginning) else None


def _content_place(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> Span:
    """The span of a turn's content, found by rendering the conversation with a probe in its place."""
    before, after = _probed(template, conversation, number)
    if not text.startswith(before) or not text.endswith(after) or len(before) + len(after) > len(text):
        raise ValueError(_unknown(number))
    return len(before), len(text) - len(after)


def _probed(template: ChatTemplate, conversation: Conversation, number: int) -> tuple[str, str]:
    """The text before and after the content of a turn, or after the tool name of a turn without content."""
    messages = [*conversation.messages]
    messages[number] = _with_probe(messages[number])
    before, found, after = template.text(conversation._replace(messages=messages)).partition(PROBE)
    if not found:
        raise ValueError(_unknown(number))
    return before, after


def _with_probe(message: Message) -> Message:
    if message.get("content") or not message.get("tool_calls"):
        parts = isinstance(message.get("content"), list)
        return message | {"content": [{"type": "text", "text": PROBE}] if parts else PROBE}
    return message | {"tool_calls": [_named(message["tool_calls"][0]), *message["tool_calls"][1:]]}


def _named(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool or a call with a probe as the function's name."""
    renamed: dict[str, Any] = tool.get("function", tool) | {"name": PROBE}
    return tool | {"function": renamed} if "function" in tool else renamed


def _end_mark(template: ChatTemplate, after: str, as_last: str) -> int:
    """The length of a turn's end marks at the beginning of ``after``; ``as_last`` is what ends it as the last turn.

    Some templates end the last turn with a further mark; then the mark that both have in common is the end.
    """
    if after.startswith(as_last):
        return len(as_last)
    shared = after[: _shared(after, as_last)]
    ends = [shared.rfind(mark) + len(mark) for mark in template.special.values() if mark in shared]
    if not ends:
        raise ValueError("where its turns end cannot be told; " + _LOCATORS)
    return max(ends)


def _warn_of_another_prompt(template: ChatTemplate) -> None:
    if "warned" not in vars(template):
        vars(template)["warned"] = True
        log.warning(
            "the chat template's generation prompt is not how a written turn of the assistant begins (as with "
            "templates that open the reasoning): the turn's content is trained on, and asked for after another prompt"
        )


# ---- whether all of a conversation is written out ------------------------------------------------------


def _check_written_out(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """See that ``text`` holds every message, call and tool.

    Whether the template writes a message of that role and place at all is found out by probes, once for all
    conversations of the same shape; that it writes this one, by the text itself.
    """
    messages = conversation.messages
    shape = (bool(conversation.tools), *((m["role"], bool(m.get("content")), "tool_calls" in m) for m in messages))
    for n, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        # The last line after any reasoning, which templates may leave out.
        said = content_text(message.get("content")).rpartition("</think>")[2].strip()
        pieces = {"content": said.splitlines()[-1:], "tool call": [part for call in calls for part in _pieces(call)]}
        probes = {"content": _with_probe(message), "tool call": message | {"tool_calls": [*map(_named, calls)]}}
        for part, wanted in pieces.items():
            written = all(_occurs(piece.strip(), text) for piece in wanted)
            if wanted and shape not in template.complete:
                written = written and _writes(template, conversation, n, probes[part])
            if not written:
                raise ValueError(f"the chat template does not write the {part} of turn {n + 1} ({message['role']})")
    for tool in conversation.tools or ():
        if (name := tool.get("function", tool).get("name")) and not _occurs(name, text):
            raise ValueError(f"the chat template does not write the tool '{name}'")
    template.complete.add(shape)


def _writes(template: ChatTemplate, conversation: Conversation, number: int, probe: Message) -> bool:
    """Whether the template writes the probe that is in this message."""
    messages = [*conversation.messages[:number], probe, *conversation.messages[number + 1 :]]
    text = _text(template, conversation._replace(messages=messages))
    return text is None or PROBE in text


def _pieces(call: dict[str, Any]) -> list[str]:
    function = call.get("function", call)
    given = function.get("arguments")
    return [function["name"], *(given if isinstance(given, dict) else [given] if given else [])]


def _occurs(piece: str, text: str) -> bool:
    return piece in text or any(json.dumps(piece, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))
