"""Rows -> examples: the texts of prompts and answers, by templates or readers."""

from __future__ import annotations

import json
import pydoc
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from peftsweep.data import chat, layouts
from peftsweep.data.chat import Conversation, Rendered
from peftsweep.data.conversations.reader import NoAnswer
from peftsweep.data.files import Row as Row
from peftsweep.errors import InputError, suggest
from peftsweep.schema import DatasetConfig, OnMissing

MAX_FIELD_WIDTH = 10_000  # characters that a template may pad a value to


class Choice(NamedTuple):
    """One of the answers that a question offers, with the prompt before it (mostly the same for all of them)."""

    prompt: str
    answer: str
    label: str  # the answer without the template
    text: str  # what the label stands for


class Example(NamedTuple):
    """A row as the model sees it."""

    prompt: str
    answer: str
    choices: tuple[Choice, ...] = ()
    gold: int | None = None  # the number of the right choice, from 0
    conversation: Conversation | None = None  # its turns before the last, as JSON, are the prompt; the last the answer
    rendered: Rendered | None = None  # the conversation in tokens, by a chat template

    @property
    def written(self) -> tuple[str, str]:
        """Prompt and answer before any chat template: what makes two examples the same."""
        if self.rendered:
            return self.rendered.written
        return self.conversation.written if self.conversation else (self.prompt, self.answer)

    @property
    def model_prompt(self) -> str:
        """The prompt as the model reads it: after a chat template, with all special tokens as text."""
        return self.rendered.prompt if self.rendered else self.prompt


class MissingValue(InputError):
    """A row has no value for a column that the template or reader needs."""


@dataclass(frozen=True)
class Templates:
    """How rows become examples: templates over a row's columns, such as ``"{question}"``.

    Lists and dicts are written as JSON. With ``classes``, an answer must be a class or its number, which is replaced
    by the name of the class. A ``reader`` turns rows into questions with choices, or into conversations; the
    templates are then filled for each choice too. Errors name ``key`` and ``file``.
    """

    prompt: str
    answer: str
    key: str = "dataset"
    file: str = ""
    classes: Sequence[str] = ()
    reader: str | None = None
    missing: OnMissing = OnMissing.error

    def each(self, rows: Iterable[Row]) -> Iterator[Example | None]:
        """The example of each row; None for a row that lacks a value, if ``missing`` is drop.

        A row that lacks a column of other rows counts as one with null there, unless ``missing`` is error.

        Raises:
            InputError: a template names a column that a row lacks, or is not a template; an answer is no class;
                a value is missing; a text holds half a surrogate pair.
        """
        read = find_reader(self.reader, self.key)
        rows = list(rows)
        every = dict.fromkeys(column for row in rows for column in row)
        blank = {} if self.missing is OnMissing.error else every
        for n, row in enumerate(rows, start=1):
            number = f"{n} of {self.file}" if self.file else f"{n}"
            try:
                yield self._example(_Row(blank | row if len(row) < len(blank) else row, self.missing), number, read)
            except MissingValue:
                if self.missing is not OnMissing.drop:
                    raise
                yield None
            except InputError as error:
                if any(f"no column '{column}'" in str(error) for column in every if column not in row):
                    ways = "dataset.missing=drop leaves out the rows that lack a column of other rows"
                    raise InputError(f"{error}; {ways}") from None
                raise

    def _example(self, row: _Row, number: str, read: Callable[[Row], Row] | None) -> Example:
        if read:
            row = _Row(_read(read, row, f"{self.key}.reader", number), self.missing)
        conversation = row.get("conversation")
        if isinstance(conversation, Conversation):
            return _conversation_example(conversation, self, number)
        prompt, answer = self._fill(row, number)
        if self.classes:
            answer = _class_name(answer, self.classes, f"{self.key}.answer", number)
        if read is None or "gold" not in row:
            return Example(prompt, answer)
        choices = tuple(
            Choice(*self._fill(row | choice, number), choice["answer"], choice.get("text", choice["answer"]))
            for choice in row["choices"]
        )
        if not all(choice.answer or choice.prompt[-1:].isspace() for choice in choices):
            raise MissingValue(
                f"{self.key}.answer: row {number} has an empty choice, which has no likelihood; "
                "dataset.missing=drop leaves such rows out"
            )
        return Example(prompt, answer, choices, row["gold"])

    def _fill(self, columns: Row, number: str) -> tuple[str, str]:
        row = _Row(columns, self.missing)
        answer = _fill(self.answer, row, f"{self.key}.answer", number)
        return _fill(self.prompt, row, f"{self.key}.prompt", number), answer


def examples(
    rows: Iterable[Row],
    prompt: str,
    answer: str,
    key: str = "dataset",
    file: str = "",
    classes: Sequence[str] = (),
    reader: str | None = None,
    missing: OnMissing = OnMissing.error,
) -> list[Example]:
    """The examples of ``rows`` by ``Templates``, without rows that lack a value."""
    each = Templates(prompt, answer, key, file, classes, reader, missing).each(rows)
    return [example for example in each if example]


def _conversation_example(conversation: Conversation, how: Templates, number: str) -> Example:
    if (how.prompt, how.answer) != ("{prompt}", "{answer}"):
        raise InputError(
            f"{how.key}.prompt: templates do not apply to a conversation; must be {{prompt}}, and the answer {{answer}}"
        )
    messages = []
    for n, message in enumerate(conversation.messages):
        if message.get("content") is None and not chat.has_calls_or_reasoning(message):
            if how.missing is not OnMissing.empty:
                raise _missing(f"{how.key}.reader", number, f"messages[{n}].content")
            message = message | {"content": ""}
        messages.append(message)
    conversation = conversation._replace(messages=messages)
    for text in (conversation.prompt, conversation.answer):
        _check_encodable(text, f"{how.key}.reader", number)
    return Example(conversation.prompt, conversation.answer, conversation=conversation)


def dataset_examples(dataset: DatasetConfig, rows: Iterable[Row], file: str = "") -> list[Example]:
    """The examples of ``rows`` by the dataset's own templates, without rows that lack a value."""
    return [example for example in templates(dataset, file).each(rows) if example]


def templates(dataset: DatasetConfig, file: str = "") -> Templates:
    """The dataset's own templates; errors name ``file`` as the file of the rows."""
    return Templates(
        dataset.prompt,
        dataset.answer,
        file=file,
        classes=dataset.classes,
        reader=dataset.reader,
        missing=dataset.missing,
    )


def find_reader(name: str | None, key: str = "dataset") -> Callable[[Row], Row] | None:
    """The function that the dotted path ``name`` names; None without a name.

    Raises:
        InputError: there is no such function.
    """
    if name is None:
        return None
    found: Any = pydoc.locate(name)
    if not callable(found):
        raise InputError(f"{key}.reader={name}: no such function")
    reader: Callable[[Row], Row] = found
    return reader


def _read(reader: Callable[[Row], Row], row: Row, key: str, number: str) -> Row:
    try:
        return reader(row)
    except _NoValue as error:
        raise _missing(key, number, str(error)) from None
    except KeyError as error:
        column = str(error.args[0])
        raise InputError(f"{key}: row {number} has no column '{column}'; {suggest(column, list(row))}") from None
    except NoAnswer as error:
        raise MissingValue(f"{key}: row {number} cannot be read: {error}; dataset.missing=drop leaves it out") from None
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{key}: row {number} cannot be read: {error}") from None


def _class_name(answer: str, classes: Sequence[str], key: str, number: str) -> str:
    name = answer.strip()
    if name not in classes:
        # Beside classes such as 1 to 5, the number 0 would be the class 1, and 1 too.
        numbered = name.isdecimal() and not any(one.strip().isdecimal() for one in classes)
        if not numbered or int(name) >= len(classes):
            raise InputError(f"{key}: row {number} is '{name}', which is no class; dataset.classes={[*classes]}")
        name = classes[int(name)]
    return answer.replace(answer.strip(), name) if answer.strip() else name


class _NoValue(Exception):
    """A column is null."""


class _Row(Row):
    """A row whose null values raise ``_NoValue``, or read as an empty text if ``missing`` is empty."""

    def __init__(self, row: Row, missing: OnMissing) -> None:
        super().__init__(row)
        self.missing = missing

    def __getitem__(self, name: str) -> Any:
        if (value := super().__getitem__(name)) is not None:
            return value
        if self.missing is OnMissing.empty:
            return ""
        raise _NoValue(name)


class _Formatter(string.Formatter):
    """Fill templates as ``str.format`` does, but with lists and dicts as JSON, and null inside a value as missing."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        first, *items = field_name.split("[")
        if "." in first and first not in kwargs:
            raise ValueError(_attribute(field_name))
        value = self.get_value(first, args, kwargs)
        for item in items:
            value = None if value is None else _item(value, item.removesuffix("]"), field_name)
        if value is None:
            if isinstance(kwargs, _Row) and kwargs.missing is OnMissing.empty:
                return "", first
            raise _NoValue(field_name)
        return value, first

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, bytes):
            raise TypeError("it holds bytes, not text")
        if isinstance(value, list | dict):
            value = json.dumps(value, ensure_ascii=False, default=str)
        try:
            return str(super().format_field(value, format_spec))
        except ValueError as error:
            raise TypeError(f"{{:{format_spec}}} is no format of {str(value)[:80]!r} ({error})") from None


def _item(value: Any, name: str, field_name: str) -> Any:
    """An item of a list or dict, which may be given as JSON text; None if the list is too short.

    Raises:
        TypeError: there is no such item; the message names the items.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        if name not in value:
            raise TypeError(f"{{{field_name}}} has no item '{name}'; {suggest(name, [*map(str, value)])}")
        return value[name]
    if not isinstance(value, list):
        raise TypeError(f"{{{field_name}}} names an item of {type(value).__name__}; must be one of a list or an object")
    if not name.isdecimal():
        raise TypeError(f"{{{field_name}}} names the item '{name}' of a list; must be a number from 0")
    return value[int(name)] if int(name) < len(value) else None


@lru_cache(maxsize=64)
def columns(template: str) -> tuple[str, ...]:
    """The columns that a template names."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return tuple(name.partition("[")[0] for name in names)


def _attribute(field_name: str) -> str:
    return f"{{{field_name}}} names an attribute; an item of a column is {{column[item]}}"


@lru_cache(maxsize=64)
def _names_whole_columns(template: str) -> bool:
    """Whether a template's fields are plain columns, without items, formats and conversions."""
    fields = [part for part in string.Formatter().parse(template) if part[1] is not None]
    return not any(spec or conversion or set("[.") & set(str(name)) for _, name, spec, conversion in fields)


@lru_cache(maxsize=64)
def _check_fields(template: str) -> None:
    """Refuse fields that do more than insert a column or an item of it.

    Raises:
        ValueError: a field names an attribute, or pads to more than ``MAX_FIELD_WIDTH`` characters.
    """
    for _, name, spec, _ in string.Formatter().parse(template):
        if re.search(r"\][^\[]", name or ""):
            raise ValueError(_attribute(str(name)))
        if "{" in (spec or "") or any(int(digits) > MAX_FIELD_WIDTH for digits in re.findall(r"\d+", spec or "")):
            raise ValueError(f"{{{name}:{spec}}} pads to more than {MAX_FIELD_WIDTH} characters, or to a column")


def _fill(template: str, row: _Row, key: str, number: str) -> str:
    if template in row and not columns(template):
        raise InputError(
            f"{key}={template}: is the same text for all rows; for the column write '{key}=\"{{{template}}}\"'"
        )
    try:
        _check_fields(template)
        plain = _names_whole_columns(template) and all(type(row.get(name)) is str for name in columns(template))
        text = template.format_map(row) if plain else _Formatter().vformat(template, (), row)
    except _NoValue as error:
        raise _missing(key, number, str(error)) from None
    except KeyError as error:
        column = str(error.args[0])
        advice = suggest(column, list(row))
        shown = layouts.example([row]).get(key.rpartition(".")[2], "")
        named = [name for name in row if f"'{name}'" in advice] or [*columns(shown), *row][:1]
        word = f"""'{key}="{template.replace(f"{{{column}", f"{{{named[0]}")}"'""".replace("\n", "\\n")
        raise InputError(f"{key}: row {number} has no column '{column}'; {advice.rstrip('?')}, as in {word}") from None
    except TypeError as error:
        raise InputError(f"{key}='{template}': row {number} cannot be written into it: {error}") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{key}='{template}': not a template ({error}); write {{{{ for a brace") from None
    _check_encodable(text, key, number)
    return text


def _missing(key: str, number: str, column: str) -> MissingValue:
    ways = "dataset.missing=drop leaves such rows out, dataset.missing=empty takes an empty text"
    why = "null, NaN or too short a list" if "[" in column else "null or NaN"
    return MissingValue(f"{key}: row {number} has no value for '{column}' ({why}); {ways}")


def _check_encodable(text: str, key: str, number: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"{key}: row {number} holds {half}, half a surrogate pair, which tokenizers refuse") from None
