"""A tokenizer's chat template, and the forms of messages that it accepts."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from peftsweep.data.conversations.turns import REASONING, Conversation, Message, arguments_object, content_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Span = tuple[int, int]  # of characters, the end excluded

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers searches for it
PROBE = "\ue000\ue001"  # private characters, which no template strips, escapes or searches for
ARGUMENTS = {"probe_key": "probe_value"}
EMPTY: tuple[Message, ...] = ({"content": ""}, {})  # contents of a turn that only calls tools
# In place of the present day, which some templates write, and by which the same trial would have other prompts on
# another day. Llama 3's template writes this one where it is told no day.
DAY = datetime(2024, 7, 26)
TODAY = re.compile(r"\bstrftime_now\(([^()]*)\)")
DIRECTIVES = [f"%-{letter}" for letter in "dmyHIMSj"] + [f"%{letter}" for letter in "dmyYbBaAHIMSpjFDTcxXUW"]


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's chat template, or ``source``. Probes find out which forms of messages it accepts."""

    tokenizer: PreTrainedTokenizerBase
    source: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    complete: set[tuple[Any, ...]] = field(default_factory=set)  # shapes of conversations that it writes completely
    warned: set[str] = field(default_factory=set)  # warnings logged so far
    appended: dict[bool, str] = field(default_factory=dict)  # what ``places.appended`` found, with tools and without

    def warn_once(self, message: str) -> None:
        """Log a warning about this template, unless the same was logged before."""
        if message not in self.warned:
            self.warned.add(message)
            log.warning(message)

    def text(self, conversation: Conversation, *, begun: bool = False) -> str:
        """The conversation as text; with ``begun``, the generation prompt of the assistant follows."""
        text = self._text(conversation, begun=begun)
        if not begun or not conversation.messages:
            return text
        return text + self.left_out_prompts.get(conversation.messages[-1]["role"], "")

    def _text(self, conversation: Conversation, *, begun: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                chat_template=self._source(conversation.tools),
                add_generation_prompt=begun,
                tokenize=False,
                **self.variables | (conversation.variables or {}),
            )
        )

    def _source(self, tools: list[Any] | None) -> str:
        """The template that writes a conversation with these tools, on ``DAY``."""
        return _on_one_day(self.tokenizer.get_chat_template(self.source, tools))

    def generated(self, conversation: Conversation) -> list[Span] | None:
        """The spans that the template marks by ``{% generation %}``; None if it has no such marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self._source(conversation.tools)
        if not GENERATION.search(source):
            return None
        # apply_chat_template returns these spans as a mask of tokens. That mask extends to the end of the row if a span
        # ends in white space that the tokenizer's offsets leave out.
        present = [{key: value for key, value in m.items() if value is not None} for m in conversation.messages]
        render: Any = render_jinja_template  # its annotation is not the type that it returns
        _, spans = render(
            conversations=[present],
            tools=conversation.tools,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.variables, **(conversation.variables or {})},
        )
        return [(start, end) for start, end in spans[0] if start < end]

    def readable(self, conversation: Conversation) -> Conversation:
        """The same conversation, with contents and arguments in the form that the template writes completely."""
        return conversation._replace(messages=[self._readable(message) for message in conversation.messages])

    def _readable(self, message: Message) -> Message:
        message = dict(message)
        if isinstance(content := message.get("content"), str if self._parts_only else list):
            if self._parts_only:
                message["content"] = [{"type": "text", "text": content}]
            elif not self._takes_parts:
                message["content"] = content_text(content)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [self._readable_call(call) for call in calls]
            if not message.get("content"):
                message = self._with_empty_content(message)
        held = [key for key in REASONING if message.get(key)]
        if held and self.reasoning_keys and not any(key in self.reasoning_keys for key in held):
            message[self.reasoning_keys[0]] = message.pop(held[0])
        return message

    def _readable_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        given = function.get("arguments")
        parsed = arguments_object(given) if isinstance(given, str) else given
        if isinstance(given, str) and self.takes_objects and not self.writes_json_alike:
            function = function | {"arguments": parsed}
        elif isinstance(given, dict) and self.takes_json and not self.takes_objects:
            function = function | {"arguments": json.dumps(given, ensure_ascii=False)}
        return call | {"function": function} if "function" in call else function

    def _with_empty_content(self, message: Message) -> Message:
        """A turn that only calls tools, with its content empty or left out, whichever the template expects.

        With the other one some templates leave out the call, refuse it, write the word None, or add an empty turn.
        """
        own = EMPTY[0] if "content" in message else EMPTY[1]
        best = own if own in self.empty_contents else next(iter(self.empty_contents), own)
        return {key: value for key, value in message.items() if key != "content"} | best

    @cached_property
    def empty_contents(self) -> list[Message]:
        """The members of ``EMPTY`` with which the template writes the fewest special tokens and empty words."""
        form = ARGUMENTS if self.takes_objects else json.dumps(ARGUMENTS)
        faults = []
        for content in EMPTY:
            text = self._probe_arguments(form, content)
            marks = sum(text.count(mark) for mark in self.special.values() if mark)
            faults.append(marks + text.count(str(None)) if "probe_key" in text else None)
        least = min((count for count in faults if count is not None), default=None)
        return [content for content, count in zip(EMPTY, faults, strict=True) if count == least is not None]

    @cached_property
    def left_out_prompts(self) -> dict[str, str]:
        """By the role of the turn before: the generation prompt of a question, if an answer begins with it there too.

        Some templates do not write it after an answer or after the result of a call.
        """
        question, answer = ({"role": role, "content": self._as_content(PROBE)} for role in ("user", "assistant"))
        call = _probe_call(ARGUMENTS)
        calling = self._readable({"role": "assistant", "content": "", "tool_calls": [call]})
        result = {"role": "tool", "tool_call_id": "probecall", "name": "probe", "content": self._as_content("probe")}
        closed, prompted = (self._probe([question], begun=begun) for begun in (False, True))
        prompt = prompted.removeprefix(closed) if closed and prompted.startswith(closed) else ""
        before = {"assistant": [question, answer], "tool": [question, calling, result]}

        def is_left_out(turns: list[Message]) -> bool:
            begins = self._probe([*turns, answer]).rpartition(PROBE)[0].rstrip().endswith(prompt.rstrip())
            return begins and not self._probe(turns, begun=True).endswith(prompt)

        return {role: prompt for role, turns in before.items() if prompt.strip() and is_left_out(turns)}

    def _as_content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._parts_only else text

    @cached_property
    def _takes_parts(self) -> bool:
        text = self._probe([{"role": "user", "content": [{"type": "text", "text": PROBE}]}])
        return PROBE in text and "'text'" not in text and '"text"' not in text

    @cached_property
    def _parts_only(self) -> bool:
        return self._takes_parts and PROBE not in self._probe([{"role": "user", "content": PROBE}])

    @cached_property
    def reasoning_keys(self) -> tuple[str, ...]:
        """The keys of ``REASONING`` that the template writes in the last turn, beside content or a call."""
        call = _probe_call(ARGUMENTS)
        probe = self._as_content("probe")
        ways: list[Message] = [{"content": probe}, {"content": "", "tool_calls": [self._readable_call(call)]}]

        def is_written(key: str) -> bool:
            question: Message = {"role": "user", "content": probe}
            return any(PROBE in self._probe([question, {"role": "assistant"} | way | {key: PROBE}]) for way in ways)

        return tuple(filter(is_written, REASONING))

    @cached_property
    def takes_objects(self) -> bool:
        text = self._probe_arguments(ARGUMENTS)
        return "probe_key" in text and str(ARGUMENTS) not in text

    @cached_property
    def takes_json(self) -> bool:
        text = json.dumps(ARGUMENTS)
        return text in self._probe_arguments(text)

    @cached_property
    def writes_json_alike(self) -> bool:
        return self._probe_arguments(json.dumps(ARGUMENTS)) == self._probe_arguments(ARGUMENTS)

    def _probe_arguments(self, arguments: Any, content: Message = EMPTY[0]) -> str:
        call = _probe_call(arguments)
        question: Message = {"role": "user", "content": self._as_content("probe")}
        return self._probe([question, {"role": "assistant", "tool_calls": [call]} | content])

    def _probe(self, messages: list[Message], *, begun: bool = False) -> str:
        try:
            return self._text(Conversation(messages), begun=begun)
        except Exception:  # a template may raise anything: it does not accept this form
            return ""

    @cached_property
    def special(self) -> dict[int, str]:
        """The tokenizer's special tokens by id, end-of-turn marks included."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {number: str(token) for number, token in added if token.special}


@lru_cache(maxsize=16)
def _on_one_day(source: str) -> str:
    """A template that writes ``DAY`` in place of the present day, whether the form of the date is a text or a name."""
    parts = " | ".join(f"replace({json.dumps(one)}, {json.dumps(DAY.strftime(one))})" for one in DIRECTIVES)
    return TODAY.sub(lambda found: f"(({found[1].strip() or repr('%c')}) | {parts})", source)


def _probe_call(arguments: Any) -> dict[str, Any]:
    """A tool call with these arguments, by which a template is probed."""
    return {"id": "probecall", "type": "function", "function": {"name": "probe", "arguments": arguments}}
