"""What the rows of a record's dataset hold, as far as it decides which faults concerned the record."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftsweep.data import chat, files, templates
from peftsweep.data import rows as data_rows
from peftsweep.errors import InputError
from peftsweep.schema import OnMissing

Values = Mapping[str, Any]
TEMPLATES = ("prompt", "answer")
ITEM = re.compile(r"([^\[]+)\[\d")  # of a list, in a field of a template
END_OF_REASONING = "</think>"  # within a text; templates part it there


def has_other_turns(dataset: Values, evaluations: Iterable[Values]) -> bool:
    """Whether a turn of the assistant reasons, calls a tool or is empty, or that is unknown as the rows are not here.

    The rows are those of the dataset's files, and of evaluations that are read by the dataset's templates.
    """
    return _has_turn(dataset, evaluations, _is_other_turn)


def reasons_under_other_keys(dataset: Values, evaluations: Iterable[Values], keys: Sequence[str]) -> bool:
    """Whether a turn of the assistant has reasoning under none of ``keys``; rows and unknown rows as above."""

    def does(message: chat.Message) -> bool:
        held = [key for key in chat.REASONING if message.get(key)]
        return bool(held) and not any(key in keys for key in held)

    return _has_turn(dataset, evaluations, does)


def calls_tools(dataset: Values, evaluations: Iterable[Values]) -> bool:
    """Whether a turn of the assistant calls a tool; rows and unknown rows as above."""
    return _has_turn(dataset, evaluations, lambda message: bool(message.get("tool_calls")))


def _has_turn(dataset: Values, evaluations: Iterable[Values], wanted: Callable[[chat.Message], bool]) -> bool:
    own = [node for node in evaluations if not any(node.get(key) for key in (*TEMPLATES, "reader"))]
    found = [_rows(dataset)]
    for path in (dataset.get("test_path"), (dataset.get("validation") or {}).get("path")):
        found += [_rows({**dataset, "path": path})] if path else []
    found += [_rows(node) for node in own if node.get("path")]
    return any(rows is None or _any_turn(dataset, rows, wanted) for rows in found)


def _any_turn(dataset: Values, rows: list[files.Row], wanted: Callable[[chat.Message], bool]) -> bool:
    missing = str(getattr(dataset.get("missing"), "name", dataset.get("missing") or OnMissing.error.name))
    prompt, answer, reader = str(dataset.get("prompt")), str(dataset.get("answer")), dataset.get("reader")
    how = templates.Templates(prompt, answer, reader=reader, missing=OnMissing[missing])
    try:
        return any(wanted(message) for example in how.each(rows) if example for message in _assistant_messages(example))
    except InputError:  # the file is another one by now
        return True


def _assistant_messages(example: templates.Example) -> list[chat.Message]:
    if example.conversation is None:
        return [{"role": "assistant", "content": example.answer}]
    return [message for message in example.conversation.messages if message["role"] == "assistant"]


def _is_other_turn(message: chat.Message) -> bool:
    text = chat.content_text(message.get("content"))
    return chat.has_calls_or_reasoning(message) or not text.strip() or END_OF_REASONING in text


def takes_items_of_text(section: Values, source: Values) -> bool:
    """Whether a template of ``section`` names an item of a list that the rows of ``source`` hold as JSON text."""
    columns = [column for key in TEMPLATES for column in _columns_with_items(str(section.get(key) or ""))]
    if not columns:
        return False
    rows = _rows(source)
    return rows is None or any(_is_json_text(row.get(column)) for row in rows for column in columns)


def _columns_with_items(template: str) -> list[str]:
    try:
        names = [name or "" for _, name, _, _ in string.Formatter().parse(template)]
    except ValueError:  # not a template
        return []
    return [found[1] for name in names if (found := ITEM.match(name))]


def _is_json_text(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] in ("[", "{")


def _rows(source: Values) -> list[files.Row] | None:
    """The rows of the file that ``source`` names; None where it names none, or it cannot be read."""
    if not source.get("path"):
        return None
    file = Path(str(source["path"])).expanduser()
    try:
        return _read(file, source.get("encoding"), tuple(one.stat().st_mtime_ns for one in files.matching(file)))
    except (InputError, OSError):
        return None


@lru_cache(maxsize=4)
def _read(file: Path, encoding: str | None, _: tuple[int, ...]) -> list[files.Row]:
    return data_rows.read_rows(file, encoding=encoding)
