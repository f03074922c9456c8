"""Where the assistant's turns are in the text that a chat template has written."""

from __future__ import annotations

import re
from typing import Any

from peftsweep.data.conversations.template import PROBE, ChatTemplate, Span
from peftsweep.data.conversations.turns import REASONING, Conversation, Message, is_trained, reasoning_text

ANOTHER_PROMPT = (
    "the chat template's generation prompt differs from the beginning of a written turn of the assistant (as with "
    "templates that open the reasoning): the content is trained on after another prompt than it is generated after"
)

BESIDE_CONTENT = ("tool_calls", *REASONING)  # keys of a message that a template may write beside its content
OPEN_TAG = re.compile(r"<[^<>\s]*\Z")  # the beginning of a tag, without its end


def of_turns(template: ChatTemplate, conversation: Conversation, text: str, *, only_last: bool) -> list[Span]:
    """The spans of the assistant's turns that are trained on, each with its end mark.

    Raises:
        ValueError: the place of a turn cannot be determined.
    """
    marks = tuple(template.special.values())
    messages = conversation.messages
    found: list[Span] = []
    for number in range(len(messages) - 1 if only_last else 0, len(messages)):
        if not is_trained(messages[number]):
            continue
        start, end = turn(template, conversation, text, number)
        if (stripped := text[start:end].rstrip()).endswith(marks):
            end = start + len(stripped)  # the white space after an end mark is the template's, not the assistant's
        if not (found[-1][1] if found else 0) <= start < end:
            raise ValueError(_unknown(number))
        _check_before_results(template, conversation, text, number, end)
        found.append((start, end))
    return found


def _check_before_results(template: ChatTemplate, conversation: Conversation, text: str, number: int, end: int) -> None:
    """Check that a turn with content and calls ends before the results of its calls, which are not trained on.

    Raises:
        ValueError: the template writes its content after the results, as that of Gemma 4 does.
    """
    message, after = conversation.messages[number], conversation.messages[number + 1 : number + 2]
    if not message.get("content") or not message.get("tool_calls") or not after or after[0]["role"] == "assistant":
        return
    try:
        place, _ = _content_place(template, conversation, text, number + 1)
    except Exception:  # a template may refuse the probe
        return
    if place < end:
        raise ValueError(
            f"the chat template writes the content of turn {number + 1} after the results of its calls, which would be "
            "trained on; remove its content, or make it a turn of its own after the results"
        )


def trained_parts(template: ChatTemplate, conversation: Conversation, text: str, spans: list[Span]) -> list[Span]:
    """The spans that the template marks as generated, without those of turns with the weight 0."""
    for number, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and not is_trained(message):
            start, end = turn(template, conversation, text, number)
            spans = [span for span in spans if span[1] <= start or span[0] >= end]
    return spans


def _unknown(number: int) -> str:
    return f"the beginning and end of turn {number + 1} cannot be found in the rendered text; {_LOCATORS}"


_LOCATORS = "dataset.turns=last trains on the last turn only; a template with {% generation %} marks its turns itself"


def turn(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> Span:
    """The span of the assistant's turn ``number`` in ``text``: from where it would be generated to its end.

    Both ends are known if the conversation up to them is rendered as within the whole. If a template writes a turn
    differently once others follow it (for instance without its reasoning), a probe finds them.

    Raises:
        ValueError: neither way finds them.
    """
    before = conversation._replace(messages=conversation.messages[:number])
    so_far = conversation._replace(messages=conversation.messages[: number + 1])
    last = number == len(conversation.messages) - 1
    start = beginning(template, conversation, text, number)
    more = appended(template, conversation)
    as_last = text if last else text_of(template, so_far)
    end = _length_within(text, as_last and as_last.removesuffix(more))
    if end is None:
        _, end = _content_place(template, conversation, text, number)
        as_last = _probed(template, so_far, number)[1].removesuffix(more)
        end += _end_mark(template, text[end:], as_last, _header_mark(template, before))
    return start, end


def beginning(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> int:
    """The place in ``text`` where the assistant's turn ``number`` begins, that is, from where it would be generated.

    Raises:
        ValueError: it cannot be found.
    """
    before = conversation._replace(messages=conversation.messages[:number])
    start = _length_within(text, text_of(template, before, begun=True))
    return _begin(template, conversation, text, number) if start is None else start


def appended(template: ChatTemplate, conversation: Conversation) -> str:
    """What the template writes after the last turn of every conversation without a generation prompt; mostly nothing.

    It is the beginning of a next turn (Command-R7B) or an instruction (Command-R+), and no part of the last turn.
    """
    key = bool(conversation.tools)
    if key not in template.appended:
        template.appended[key] = _appended(template, conversation.tools)
    return template.appended[key]


def _appended(template: ChatTemplate, tools: list[Any] | None) -> str:
    def after_probe(*turns: tuple[str, str], begun: bool = False) -> str | None:
        messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
        text = text_of(template, template.readable(Conversation(messages, tools)), begun=begun)
        return None if text is None else text.rpartition(PROBE)[2]

    question, prompted = (after_probe(("user", PROBE), begun=begun) for begun in (False, True))
    ended = after_probe(("user", "a"), ("assistant", PROBE))
    within = after_probe(("user", "a"), ("assistant", PROBE), ("user", "b"))
    if question is None or prompted is None or ended is None or within is None:
        return ""
    shared, end = _shared(ended, within), str(template.tokenizer.eos_token or PROBE)
    own, only_last = ended[:shared], ended[shared:]
    # The turn has ended already. A further mark that ends a text stands after a question too, but not before an answer.
    if not _marks(template, own) or only_last.strip() in ("", end):
        return ""
    if not prompted.startswith(question) or not question.endswith(only_last):
        return ""
    common = len(ended) - _shared(ended[::-1], question[::-1])
    # Questions and answers end with the same mark: EOS, or another one, if no mark stands before it.
    if not ended.startswith(end, common):
        end = "" if _marks(template, ended[:common]) else _mark_at(template, ended, common) or ""
    return ended[common:].removeprefix(end)


def _begin(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> int:
    """The beginning of a turn that the template does not write after its generation prompt, which may open reasoning.

    It is where the template would begin a plain text in place of the turn. If the template writes the turn differently
    from a plain text, as with reasoning, it is the first difference to the generation prompt; else the content.
    """
    before = conversation._replace(messages=conversation.messages[:number])
    plain = _replaced(conversation, number, _as_plain_text(conversation.messages[number]))
    start, found, _ = (text_of(template, plain) or "").partition(PROBE)
    as_plain = bool(found) and text.startswith(start)
    # Where the template refuses a plain text there, as between a question and the result of a call, only the prompt
    # tells.
    prompt_end = _prompt_end(template, conversation, text, number) if as_plain or not found else None
    if prompt_end is not None and (prompt_end <= len(start) or not found):
        return prompt_end
    if number:
        template.warn_once(ANOTHER_PROMPT)
    if as_plain:
        return len(start)
    prompted, closed = text_of(template, before, begun=True) or "", text_of(template, before)
    if closed is not None and prompted.startswith(closed) and found:  # the template rewrites the turns before it
        header = prompted[len(closed) :]
        after_header = start.rfind(header) + len(header)
        if header in start and header.strip() and after_header <= _shared(text, start):
            return after_header
        if text.startswith(closed) and (spaced := _after_words(text, len(closed), header)):
            return spaced
    if closed is not None and text.startswith(closed) and (shared := _shared(text, prompted)) >= len(closed):
        cut_tag = OPEN_TAG.search(text, len(closed), shared)
        return cut_tag.start() if cut_tag else shared
    thought = reasoning_text(conversation.messages[number]).strip()
    if not conversation.messages[number].get("content") or (thought and thought in text):
        raise ValueError(_unknown(number))  # the reasoning would be written, and not trained on
    return _content_place(template, conversation, text, number)[0]


def _prompt_end(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> int | None:
    """Where the generation prompt of a turn ends in ``text``, if it is written there after the content before it.

    It is, also if the template writes an earlier turn differently once the conversation goes on (gpt-oss).
    """
    if not number:
        return None
    before = conversation._replace(messages=conversation.messages[:number])
    try:
        _, place = _content_place(template, conversation, text, number - 1)
        _, header = _probed(template, before, number - 1, begun=True)
    except Exception:  # a template may refuse the probe
        return None
    return place + len(header) if header.strip() and text.startswith(header, place) else None


def _after_words(text: str, place: int, words: str) -> int | None:
    """Where ``words`` end that stand at a place of ``text`` with other white space; None if they do not."""
    wanted = [re.escape(character) for character in words if not character.isspace()]
    found = re.compile(r"\s*".join(["", *wanted])).match(text, place) if wanted else None
    return found and found.end() + _shared(text[found.end() :], words[len(words.rstrip()) :])


def _as_plain_text(message: Message) -> Message:
    """A message with a probe in place of its content, its calls and its reasoning."""
    content = [{"type": "text", "text": PROBE}] if isinstance(message.get("content"), list) else PROBE
    kept = {key: value for key, value in message.items() if key not in BESIDE_CONTENT}
    return kept | {"content": content}


def _replaced(conversation: Conversation, number: int, message: Message) -> Conversation:
    """The conversation with another message in the place ``number``."""
    messages = [*conversation.messages]
    messages[number] = message
    return conversation._replace(messages=messages)


def _shared(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def text_of(template: ChatTemplate, part: Conversation, *, begun: bool = False) -> str | None:
    """``part`` as text; None if the template refuses it."""
    try:
        return template.text(part, begun=begun)
    except Exception:  # a template may accept a conversation and refuse a part of it
        return None


def _length_within(text: str, beginning: str | None) -> int | None:
    return len(beginning) if beginning is not None and text.startswith(beginning) else None


def _content_place(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> Span:
    """The span of a turn's content, found by rendering the conversation with a probe in its place."""
    before, after = _probed(template, conversation, number)
    if not text.startswith(before) or not text.endswith(after) or len(before) + len(after) > len(text):
        raise ValueError(_unknown(number))
    return len(before), len(text) - len(after)


def _probed(template: ChatTemplate, conversation: Conversation, number: int, *, begun: bool = False) -> tuple[str, str]:
    """The text before and after the content of a turn, or after the tool name of a turn without content."""
    message = conversation.messages[number]
    probed = template.text(_replaced(conversation, number, with_probe(message)), begun=begun)
    before, found, after = probed.partition(PROBE)
    if not found:
        raise ValueError(_unknown(number))
    if PROBE in after:  # some templates repeat the name of a call with its result
        if message.get("content") or not message.get("tool_calls"):
            raise ValueError(_unknown(number))
        function = message["tool_calls"][0]
        after = after.replace(PROBE, function.get("function", function)["name"])
    return before, after


def with_probe(message: Message) -> Message:
    """A message with a probe as its content, or as the name of the first call if it only calls tools."""
    if message.get("content") or not message.get("tool_calls"):
        parts = isinstance(message.get("content"), list)
        return message | {"content": [{"type": "text", "text": PROBE}] if parts else PROBE}
    return message | {"tool_calls": [named(message["tool_calls"][0]), *message["tool_calls"][1:]]}


def named(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool or a call with a probe as the function's name."""
    renamed: dict[str, Any] = tool.get("function", tool) | {"name": PROBE}
    return tool | {"function": renamed} if "function" in tool else renamed


def _end_mark(template: ChatTemplate, after: str, as_last: str, header: str | None) -> int:
    """The length of a turn's end marks at the beginning of ``after``; ``as_last`` is the text that ends a last turn.

    Some templates end the last turn with a further mark; then the end is the mark that both have in common. Others end
    it with another mark; then the end stands directly before the mark ``header``, which begins a turn.
    """
    if after.startswith(as_last):
        return len(as_last)
    shared = after[: _shared(after, as_last)]
    ends = [shared.rfind(mark) + len(mark) for mark in template.special.values() if mark in shared]
    if ends:
        return max(ends)
    # Of a call, its arguments stand before the marks; they are the same where the turn is the last one.
    length, place = 0, min((after.find(mark) for mark in template.special.values() if mark in after), default=0)
    while (mark := _mark_at(template, after, place)) and (length or place <= len(shared)):
        if mark == header and length:
            return length
        length = place + len(mark)
        place = length + len(after[length:]) - len(after[length:].lstrip())  # white space may stand before the header
    raise ValueError("the ends of its turns cannot be found in the rendered text; " + _LOCATORS)


def _header_mark(template: ChatTemplate, before: Conversation) -> str | None:
    """The special token that begins a turn of the assistant after ``before``; None if there is none."""
    prompted, closed = text_of(template, before, begun=True), text_of(template, before)
    if prompted is None or closed is None or not prompted.startswith(closed):
        return None
    return _mark_at(template, prompted, len(closed))


def _marks(template: ChatTemplate, text: str) -> list[str]:
    """The special tokens that stand in ``text``."""
    return [mark for mark in template.special.values() if mark and mark in text]


def _mark_at(template: ChatTemplate, text: str, place: int) -> str | None:
    """The special token that stands at a place of ``text``."""
    return next((mark for mark in template.special.values() if mark and text.startswith(mark, place)), None)
