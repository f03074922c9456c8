"""A conversation: its turns and tools, as chat templates take them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of what a message reasons before its content
# Keys of a turn beside its weight: false is the weight 0.
UNTRAINED_KEYS = ("train", "training", "trainable", "train_on_turn", "loss", "loss_mask")


class Conversation(NamedTuple):
    """Messages of role and content, and the tools that the assistant may call, as chat templates take them.

    A turn of the assistant that is not trained on has the ``weight`` 0.
    """

    messages: list[Message]
    tools: list[Any] | None = None  # JSON schemas of functions

    @property
    def prompt(self) -> str:
        """All that stands before the last turn, as JSON."""
        before: Any = {"messages": self.messages[:-1], "tools": self.tools} if self.tools else self.messages[:-1]
        return json.dumps(before, ensure_ascii=False)

    @property
    def written(self) -> tuple[str, str]:
        """The prompt, and all of the last turn as JSON, without the keys that say which turns are trained on."""
        marks = ("weight", *UNTRAINED_KEYS)
        said = [{key: value for key, value in message.items() if key not in marks} for message in self.messages]
        return self._replace(messages=said).prompt, json.dumps(said[-1], ensure_ascii=False)

    @property
    def answer(self) -> str:
        """What the last turn says; if it only calls tools, these calls as JSON."""
        last = self.messages[-1]
        return content_text(last.get("content")) or json.dumps(last.get("tool_calls"), ensure_ascii=False)


def says_something_else(message: Message) -> bool:
    """Whether a message without content still says something: it calls tools, or reasons."""
    return any(message.get(key) for key in ("tool_calls", *REASONING))


def content_text(content: Any) -> str:
    """Content as text: its text parts, a line each, where it is a list of parts."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def is_trained(message: Message) -> bool:
    """Whether a turn is the assistant's and trained on."""
    return message["role"] == "assistant" and message.get("weight") != 0


def arguments_object(arguments: str) -> Any:
    """What the JSON text of a tool call's arguments says.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(arguments)
    except ValueError as error:
        raise ValueError(f"the arguments of a tool call are no JSON ({error}): {arguments[:80]!r}") from None
