"""A row that holds a conversation, in any of the layouts that people have -> the conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peftsweep.data.conversations import trees
from peftsweep.data.conversations.turns import Conversation, Message, is_trained

Row = dict[str, Any]

READERS = ("peftsweep.data.tasks.messages", "peftsweep.data.tasks.sharegpt")  # their names in a configuration
COLUMNS = ("messages", "conversations", "conversation")  # the first that holds something is read
SYSTEM_COLUMNS = ("system", "system_prompt")  # of a system's turn that stands beside the turns
CALL = "function_call"  # a role of ShareGPT's layout, and a key of OpenAI's former one
ALIASES = {
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "claude", "ai", "bot", "model", CALL),
    "tool": ("observation", "function_response"),
}
ROLES = {name: role for role, names in ALIASES.items() for name in names}  # in files -> in chat templates
# Those that chat templates know.
KNOWN_ROLES = (
    *("system", "developer", "user", "assistant", "tool", "function"),
    *("ipython", "environment", "document", "documents", "context"),
)


class NoAnswer(ValueError):
    """A row has no turn of the assistant that could be trained on."""


def messages(row: Row) -> Row:
    """The row with its ``conversation``; the last turn is the ``answer``, all before it, as JSON, the ``prompt``.

    Turns are OpenAI's (``messages`` of role and content), ShareGPT's (``conversations`` of from and value), two lists
    ``prompt`` and ``completion``, or a tree of messages (``trees``); lists may be JSON text. ``tools`` or ``functions``
    are what the assistant may call; ``system`` or ``system_prompt`` is a system's turn before the others. Content that
    is a list holds text parts; what else is a list or dict is JSON. A turn of the assistant with the weight 0 is not
    trained on, and one at the end is left out.

    Raises:
        NoAnswer: there is no conversation, or it does not end with the assistant's turn.
        ValueError: a turn, a tool or a call is none, has an unknown role, or has a part that is no text.
    """
    said = [_numbered(number, turn) for number, turn in enumerate(_turns(row), start=1)]
    if said:
        said = [*_system(row, said[0]), *said]
    if len(said) < 2 or said[-1]["role"] != "assistant":
        raise NoAnswer("a conversation must end with the assistant's turn, after another")
    conversation = Conversation(_until_trained(said), _tools(row))
    return row | {"conversation": conversation, "prompt": conversation.prompt, "answer": conversation.answer}


def sharegpt(row: Row) -> Row:
    """``messages`` of a row as people shared it: from the first turn of a person or the system to the last answer.

    Raises:
        NoAnswer, ValueError: as ``messages``.
    """
    turns = _turns(row)
    roles = [_in_template(_said(turn)) for turn in turns]
    first = next((n for n, role in enumerate(roles) if role in ("user", "system")), len(turns))
    last = max((n for n, role in enumerate(roles) if role == "assistant"), default=-1)
    return messages({key: row[key] for key in row if key not in COLUMNS} | {COLUMNS[0]: turns[first : last + 1]})


def _said(turn: Any) -> str:
    """The role of a turn as the file has it; of what is no turn none."""
    return str(turn.get("role") or turn.get("from")) if isinstance(turn, Mapping) else ""


def _in_template(said: str) -> str:
    """A role of a file, which may be none that is known, as chat templates name it."""
    plain = said.strip().lower()
    return ROLES.get(plain, plain)


def was_read_otherwise(row: Row) -> bool:
    """Whether earlier versions took other turns from this row, or trained on others: it has what they passed over."""
    earlier = {"human": "user", "gpt": "assistant"}
    try:
        turns = _turns(row)
        added = bool(_system(row, _message(turns[0]))) or (bool(row.get("functions")) and not row.get("tools"))
        said = [turn.get("role") or turn.get("from") for turn in turns]
        renamed = any(earlier.get(role, role) != _role(role) for role in said)
        return added or renamed or any(turn.get(CALL) or turn.get("weight") == 0 for turn in turns)
    except (ValueError, IndexError, AttributeError):
        return False  # no version has read it


# ---- what a row holds ------------------------------------------------------------------------------


def _turns(row: Row) -> list[Any]:
    named = next((column for column in COLUMNS if row.get(column) is not None), None)
    if named is not None:
        return _listed(row[named], "messages")
    if trees.is_tree(row):
        return trees.turns(row)
    parts = [row.get(column) for column in ("prompt", "completion")]
    if all(isinstance(part, list) or str(part).lstrip().startswith("[") for part in parts):
        asked, said = (_listed(part, "prompt and completion") for part in parts)
        return [*map(_untrained, asked), *said]
    there = [column for column in COLUMNS if column in row]
    if there:
        raise NoAnswer(f"it has no value for '{there[0]}' (null)")
    raise ValueError(f"it has no column {' or '.join(COLUMNS)}; it has: {', '.join(map(str, row)) or 'none'}")


def _untrained(turn: Any) -> Any:
    """A turn before the completion, which is not trained on."""
    return turn | {"weight": 0} if _in_template(_said(turn)) == "assistant" else turn


def _listed(value: Any, name: str) -> list[Any]:
    """A list, which may be given as JSON text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"its {name} are text that is no JSON ({error})") from None
    if not isinstance(found, list):
        raise ValueError(f"its {name} are not a list")
    return found


def _tools(row: Row) -> list[Any] | None:
    """The row's tools, as JSON schemas of functions."""
    given = row.get("tools") or row.get("functions")
    if given in (None, "", "null"):
        return None
    found = [json.loads(tool) if isinstance(tool, str) else tool for tool in _listed(given, "tools")]
    if not all(isinstance(tool, dict) and isinstance(tool.get("function", {}), dict) for tool in found):
        raise ValueError("its tools are not JSON schemas of functions")
    if not row.get("tools"):  # OpenAI's former layout
        found = [{"type": "function", "function": function} for function in found]
    return found or None


def _system(row: Row, first: Message) -> list[Message]:
    """A system's turn of a column of its own."""
    for column in SYSTEM_COLUMNS:
        text = row.get(column)
        if not isinstance(text, str) or not text.strip():
            continue
        if first["role"] not in ("system", "developer"):
            return [{"role": "system", "content": text}]
        if first.get("content") != text:
            raise ValueError(f"its column '{column}' and its first turn hold two different prompts of the system")
    return []


def _until_trained(said: list[Message]) -> list[Message]:
    """The turns up to the last one that is trained on: nothing that follows it plays a part."""
    trained = [number for number, message in enumerate(said) if is_trained(message)]
    if not trained:
        raise NoAnswer("no turn of the assistant is trained on: all have the weight 0")
    return said[: trained[-1] + 1]


# ---- a turn ----------------------------------------------------------------------------------------


def _numbered(number: int, turn: Any) -> Message:
    try:
        return _message(turn)
    except ValueError as error:
        raise ValueError(f"{error} (turn {number})") from None


def _message(turn: Any) -> Message:
    """A turn as chat templates take it; what is null in it is absent."""
    if not isinstance(turn, dict) or not isinstance(said := turn.get("role") or turn.get("from"), str):
        raise ValueError("a turn is not an object with a role")
    content = turn["value"] if turn.get("content") is None and "value" in turn else turn.get("content")
    calls = _former_calls(turn.get(CALL)) or turn.get("tool_calls")
    if said == CALL:
        content, calls = None, _former_calls(content)
    given: Message = {
        "role": _role(said),
        "content": None if content is None else _content(content),
        "tool_calls": [_call(call) for call in _listed(calls, "tool_calls")] if calls else None,
    }
    others = ("from", "value", CALL)
    message = {key: value for key, value in turn.items() if key not in others} | given
    message = {key: value for key, value in message.items() if value is not None}
    if (weight := message.get("weight", 1)) not in (0, 1):
        raise ValueError(f"a turn has the weight {weight}; must be 0 or 1")
    return message


def _role(said: str) -> str:
    role = _in_template(said)
    if role not in KNOWN_ROLES:
        raise ValueError(f"a turn has the unknown role '{said}'; known are {', '.join([*KNOWN_ROLES, *ROLES])}")
    return role


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        if other := [part["type"] for part in content if not isinstance(part.get("text"), str)]:
            raise ValueError(f"a part of type '{other[0]}' is no text")
        return content
    return json.dumps(content, ensure_ascii=False)


def _former_calls(given: Any) -> list[Any] | None:
    """The calls of OpenAI's former layout, or of a turn of ShareGPT's: one, or a list of them, or JSON text of it."""
    if not given:
        return None
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"a {CALL} is text that is no JSON ({error})") from None
    return [{"type": "function", "function": call} for call in (found if isinstance(found, list) else [found])]


def _call(call: Any) -> Row:
    """A call; one without arguments has none, which is the empty object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call names no function")
    given = function.get("arguments")
    if given is None or (isinstance(given, str) and not given.strip()):
        function = function | {"arguments": {}}
    elif not isinstance(given, dict | str):
        raise ValueError("the arguments of a tool call are neither an object nor JSON text of one")
    return call | {"function": function} if "function" in call else dict(function)
