"""A row that holds a conversation, in any of the common layouts -> the conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peftsweep.data.conversations import trees
from peftsweep.data.conversations.turns import UNTRAINED_KEYS, VARIABLES, Conversation, Message, is_trained

Row = dict[str, Any]

READERS = ("peftsweep.data.tasks.messages", "peftsweep.data.tasks.sharegpt")  # their names in a configuration
COLUMNS = ("messages", "conversations", "conversation")  # the first one with a value is read
SYSTEM_COLUMNS = ("system", "system_prompt")  # hold a system turn that is not among the turns
CALL = "function_call"  # a role in ShareGPT's layout, and a key in OpenAI's former layout
CALLING = (CALL, "tool_call")  # roles of turns that hold one call
ALIASES = {
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "claude", "ai", "bot", "model", *CALLING),
    "tool": ("observation", "function_response", "tool_response"),
}
ARGUMENTS = ("arguments", "parameters", "input", "args")  # keys of a call's arguments; the first that is there
MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # columns of images, audio and video
# Arguments of ``apply_chat_template`` that are no variables of a template.
NO_VARIABLES = ("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize")
TOOL_ROLES = ("tool", "function", "ipython", "environment")  # their content is often JSON
ROLES = {name: role for role, names in ALIASES.items() for name in names}  # in files -> in chat templates
# The roles that chat templates know.
KNOWN_ROLES = (
    *("system", "developer", "user", "assistant", "tool", "function"),
    *("ipython", "environment", "document", "documents", "context"),
)


class NoAnswer(ValueError):
    """A row has no turn of the assistant to train on."""


def messages(row: Row) -> Row:
    """The row with its ``conversation``; ``answer`` is the last turn, ``prompt`` all turns before it as JSON.

    Turns have OpenAI's layout (``messages`` of role and content) or ShareGPT's (``conversations`` of from and value),
    or are two lists ``prompt`` and ``completion``, or a tree of messages (``trees``); lists may be JSON text.
    ``tools`` or ``functions`` are the tools that the assistant may call; ``system`` or ``system_prompt`` is a system
    turn before the others; ``chat_template_kwargs`` are variables of the chat template. Content that is a list must
    hold text parts; any other list or dict becomes JSON. A turn of the assistant with the weight 0, or with false under
    a key of ``UNTRAINED_KEYS``, is not trained on; at the end of a conversation it is left out.

    Raises:
        NoAnswer: there is no conversation, it does not end with the assistant's turn, or its answer is not wanted.
        ValueError: a turn, tool or call is malformed, has an unknown role, or has a part that is not text.
    """
    if row.get("label") is False:
        raise NoAnswer("its label is false, which marks an answer that is not wanted")
    if media := next((column for column in MEDIA if row.get(column)), None):
        raise ValueError(f"its column '{media}' holds something else than text")
    found = [_numbered(number, turn) for number, turn in enumerate(_turns(row), start=1)]
    if found:
        found = [*_system(row, found[0]), *found]
    if len(found) < 2 or found[-1]["role"] != "assistant":
        raise NoAnswer("a conversation must end with the assistant's turn, after another")
    conversation = Conversation(_until_trained(found), _tools(row), _variables(row))
    return row | {"conversation": conversation, "prompt": conversation.prompt, "answer": conversation.answer}


def sharegpt(row: Row) -> Row:
    """As ``messages``, for a shared conversation: from the first turn of user or system to the last answer.

    Raises:
        NoAnswer, ValueError: as ``messages``.
    """
    turns = _turns(row)
    roles = [_in_template(_raw_role(turn)) for turn in turns]
    first = next((n for n, role in enumerate(roles) if role in ("user", "system")), len(turns))
    last = max((n for n, role in enumerate(roles) if role == "assistant"), default=-1)
    others = {key: value for key, value in row.items() if key not in COLUMNS}  # nulls among them
    return messages(others | {COLUMNS[0]: turns[first : last + 1]})


def _raw_role(turn: Any) -> str:
    """The role of a turn as in the file; empty if it is not a turn."""
    return str(turn.get("role") or turn.get("from")) if isinstance(turn, Mapping) else ""


def _in_template(role: str) -> str:
    """The name of a file's role in chat templates; an unknown role keeps its name."""
    plain = role.strip().lower()
    return ROLES.get(plain, plain)


def version(row: Row) -> int:
    """The first version of this reader that read the same turns from the row and trained on the same ones."""
    earlier = {"human": "user", "gpt": "assistant"}
    try:
        turns = _turns(row)
        calls = [call for turn in turns for call in _listed(turn.get("tool_calls") or [], "tool_calls")]
        tools = _listed(row.get("tools") or [], "tools")
        if any(_is_untyped(turn.get("content")) for turn in turns):
            return 5
        if _variables(row):
            return 4
        if any(turn.get(key) in (False, 0) for turn in turns for key in UNTRAINED_KEYS if turn.get(key) is not None):
            return 3
        if any(isinstance(tool, dict) and "function" not in tool for tool in map(_parsed, tools)):
            return 3
        if any(ARGUMENTS[0] not in call.get("function", call) for call in calls):
            return 3
        if any(isinstance(turn.get("content"), dict) and turn["content"].get("type") == "text" for turn in turns):
            return 3
        added = bool(_system(row, _message(turns[0]))) or (bool(row.get("functions")) and not row.get("tools"))
        roles = [turn.get("role") or turn.get("from") for turn in turns]
        renamed = any(earlier.get(role, role) != _role(role) for role in roles)
        return 2 if added or renamed or any(turn.get(CALL) or turn.get("weight") == 0 for turn in turns) else 1
    except (ValueError, IndexError, AttributeError):
        return 1  # no version could read it


# ---- what a row holds ------------------------------------------------------------------------------


def _turns(row: Row) -> list[Any]:
    named = next((column for column in COLUMNS if row.get(column) is not None), None)
    if named is not None:
        return _listed(row[named], "messages")
    if trees.is_tree(row):
        return trees.turns(row)
    parts = [row.get(column) for column in ("prompt", "completion")]
    if all(isinstance(part, list) or str(part).lstrip().startswith("[") for part in parts):
        prompt, completion = (_listed(part, "prompt and completion") for part in parts)
        return [*map(_untrained, prompt), *completion]
    there = [column for column in COLUMNS if column in row]
    if there:
        raise NoAnswer(f"it has no value for '{there[0]}' (null)")
    raise ValueError(f"it has no column {' or '.join(COLUMNS)}; it has: {', '.join(map(str, row)) or 'none'}")


def _untrained(turn: Any) -> Any:
    """A turn before the completion, which is not trained on."""
    return turn | {"weight": 0} if _in_template(_raw_role(turn)) == "assistant" else turn


def _listed(value: Any, name: str) -> list[Any]:
    """A list, which may be given as JSON text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"its {name} are text, but not JSON ({error})") from None
    if not isinstance(found, list):
        raise ValueError(f"its {name} are not a list")
    return found


def _tools(row: Row) -> list[Any] | None:
    """The row's tools, as JSON schemas of functions."""
    given = row.get("tools") or row.get("functions")
    if given in (None, "", "null"):
        return None
    found = [_schema(_parsed(tool)) for tool in _listed(given, "tools")]
    return found or None


def _variables(row: Row) -> dict[str, Any] | None:
    """The row's own variables of the chat template, without nulls; None if there are none."""
    given = _parsed(row.get(VARIABLES))
    if not given:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"its {VARIABLES} are not an object")
    if wrong := next((name for name in NO_VARIABLES if name in given), None):
        raise ValueError(f"its {VARIABLES} hold '{wrong}', which is no variable of a chat template")
    return {name: value for name, value in given.items() if value is not None} or None


def _parsed(value: Any) -> Any:
    """A value that may be given as JSON text; other text stays as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _schema(tool: Any) -> Row:
    """A tool in OpenAI's layout, with the key ``function``, which other layouts leave out."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("its tools are not JSON schemas of functions")
    if "input_schema" in function and "parameters" not in function:  # Anthropic's name of the key
        function = {"parameters" if key == "input_schema" else key: value for key, value in function.items()}
    return tool | {"function": function} if "function" in tool else {"type": "function", "function": function}


def _system(row: Row, first: Message) -> list[Message]:
    """The system turn that a column of the row holds."""
    for column in SYSTEM_COLUMNS:
        text = row.get(column)
        if not isinstance(text, str) or not text.strip():
            continue
        if first["role"] not in ("system", "developer"):
            return [{"role": "system", "content": text}]
        if first.get("content") != text:
            raise ValueError(f"its column '{column}' and its first turn hold two different system prompts")
    return []


def _until_trained(turns: list[Message]) -> list[Message]:
    """The turns up to the last one that is trained on; later turns have no effect."""
    trained = [number for number, message in enumerate(turns) if is_trained(message)]
    if not trained:
        raise NoAnswer("no turn of the assistant is trained on: all have the weight 0")
    return turns[: trained[-1] + 1]


# ---- a turn ----------------------------------------------------------------------------------------


def _numbered(number: int, turn: Any) -> Message:
    try:
        return _message(turn)
    except ValueError as error:
        raise ValueError(f"{error} (turn {number})") from None


def _message(turn: Any) -> Message:
    """A turn in the form that chat templates read, without its null values."""
    if not isinstance(turn, dict) or not isinstance(role := turn.get("role") or turn.get("from"), str):
        raise ValueError("a turn is not an object with a role")
    if media := next((key for key in MEDIA if turn.get(key)), None):
        raise ValueError(f"its '{media}' are not text")
    content = turn["value"] if turn.get("content") is None and "value" in turn else turn.get("content")
    calls = _former_calls(turn.get(CALL)) or turn.get("tool_calls")
    if role in CALLING:
        content, calls = None, _former_calls(content)
    given: Message = {
        "role": _role(role),
        "content": None if content is None else _content(content, _role(role)),
        "tool_calls": [_call(call) for call in _listed(calls, "tool_calls")] if calls else None,
    }
    others = ("from", "value", CALL)
    message = {key: value for key, value in turn.items() if key not in others} | given
    message = {key: value for key, value in message.items() if value is not None}
    return message | _weight(message)


def _weight(message: Message) -> Message:
    """The weight 0, if a key of the turn excludes it from the training."""
    if (weight := message.get("weight", 1)) not in (0, 1):
        raise ValueError(f"a turn has the weight {weight!r}; must be 0 or 1")
    flags = {key: message[key] for key in UNTRAINED_KEYS if key in message}
    for key, value in flags.items():
        if value not in (0, 1):
            raise ValueError(f"a turn has {value!r} under '{key}'; must be true or false")
    if message["role"] == "assistant" and message.get("mask") is not None:
        raise ValueError(
            "a turn has the key 'mask', which has no common meaning; use weight: 1 for a trained turn, 0 for others"
        )
    return {} if all(flags.values()) else {"weight": 0}


def _role(raw: str) -> str:
    role = _in_template(raw)
    if role not in KNOWN_ROLES:
        raise ValueError(f"a turn has the unknown role '{raw}'; known are {', '.join([*KNOWN_ROLES, *ROLES])}")
    return role


def _content(content: Any, role: str) -> Any:
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and content.get("type") == "text":
        content = [content]
    if _is_untyped(content):
        content = [{"type": "text"} | part for part in content]
    if isinstance(content, list) and any(isinstance(part, str) for part in content) and role not in TOOL_ROLES:
        raise ValueError("its content is a list of texts; must be a text, or parts of type text")
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        if other := [part["type"] for part in content if not isinstance(part.get("text"), str)]:
            raise ValueError(f"a part of type '{other[0]}' is not text")
        return content
    return json.dumps(content, ensure_ascii=False)


def _is_untyped(content: Any) -> bool:
    """Whether content is a list of parts ``{"text": ...}``, as in files for Amazon Bedrock."""
    parts = content if isinstance(content, list) else []
    return bool(parts) and all(isinstance(part, dict) and part.keys() == {"text"} for part in parts)


def _former_calls(given: Any) -> list[Any] | None:
    """The calls of OpenAI's former layout or of a ShareGPT turn: one call, a list of calls, or JSON text of these."""
    if not given:
        return None
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"a {CALL} is text, but not JSON ({error})") from None
    return [{"type": "function", "function": call} for call in (found if isinstance(found, list) else [found])]


def _call(call: Any) -> Row:
    """A call in OpenAI's layout; missing arguments become the empty object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call names no function")
    name = next((name for name in ARGUMENTS if name in function), ARGUMENTS[0])
    given = function.get(name)
    if given is None or (isinstance(given, str) and not given.strip()):
        given = {}
    parsed = _parsed(given)
    # Text that is not JSON passes here; ``arguments_object`` refuses it.
    if not isinstance(parsed, dict) and not (parsed is given and isinstance(parsed, str)):
        raise ValueError("the arguments of a tool call are neither an object nor JSON text of one")
    others = {key: value for key, value in function.items() if key != name}
    function = function | {name: given} if name == ARGUMENTS[0] else others | {ARGUMENTS[0]: given}
    return call | {"function": function} if "function" in call else dict(function)
