"""A conversation: its turns and tools, as chat templates take them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of the reasoning before a message's content
# Keys of a turn that files use in place of its weight: false means the weight 0.
UNTRAINED_KEYS = ("train", "training", "trainable", "train_on_turn", "loss", "loss_mask")
VARIABLES = "chat_template_kwargs"  # the column of a conversation's own variables of the chat template, as TRL names it


class Conversation(NamedTuple):
    """Messages of role and content, and the tools that the assistant may call, as chat templates take them.

    A turn of the assistant that is not trained on has the ``weight`` 0. ``variables`` are further variables of the
    chat template, such as ``enable_thinking``.
    """

    messages: list[Message]
    tools: list[Any] | None = None  # JSON schemas of functions
    variables: dict[str, Any] | None = None

    @property
    def prompt(self) -> str:
        """All turns before the last one, with the tools and variables, as JSON."""
        beside = {key: value for key, value in (("tools", self.tools), (VARIABLES, self.variables)) if value}
        before: Any = {"messages": self.messages[:-1]} | beside if beside else self.messages[:-1]
        return json.dumps(before, ensure_ascii=False)

    @property
    def written(self) -> tuple[str, str]:
        """The prompt, and the whole last turn as JSON, without the keys that mark turns as trained on or not."""
        marks = ("weight", *UNTRAINED_KEYS)
        plain = [{key: value for key, value in message.items() if key not in marks} for message in self.messages]
        return self._replace(messages=plain).prompt, json.dumps(plain[-1], ensure_ascii=False)

    @property
    def answer(self) -> str:
        """The content of the last turn; if it only calls tools, the calls as JSON."""
        last = self.messages[-1]
        return content_text(last.get("content")) or json.dumps(last.get("tool_calls"), ensure_ascii=False)


def has_calls_or_reasoning(message: Message) -> bool:
    """Whether a message holds tool calls or reasoning, so that it may lack content."""
    return any(message.get(key) for key in ("tool_calls", *REASONING))


def reasoning_text(message: Message) -> str:
    """The reasoning of a turn: that under a key of ``REASONING``, else that in tags before its content."""
    held = next((message[key] for key in REASONING if isinstance(message.get(key), str)), "")
    return held or content_text(message.get("content")).rpartition("</think>")[0].rpartition("<think>")[2]


def content_text(content: Any) -> str:
    """Content as text; a list of parts becomes one line for each part."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def is_trained(message: Message) -> bool:
    """Whether a turn is the assistant's and trained on."""
    return message["role"] == "assistant" and message.get("weight") != 0


def arguments_object(arguments: str) -> Any:
    """The value of the JSON text of a tool call's arguments.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(arguments)
    except ValueError as error:
        raise ValueError(f"the arguments of a tool call are not JSON ({error}): {arguments[:80]!r}") from None
