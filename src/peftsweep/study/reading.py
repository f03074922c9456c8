"""Read the files that peftsweep writes. A file of a study may be damaged, edited or written by another program.

Every reader returns the content, checked against a shape, or raises an error of one line that names the file.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

from peftsweep.errors import first_line, printable

LARGEST = 256 * 2**20  # the most bytes of a JSON file
LONGEST = 32 * 2**20  # the most bytes of a line of a .jsonl file
DEEPEST = 60  # the most nested objects and lists
Found = TypeVar("Found")
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # half of a surrogate pair in UTF-16

# A shape is a type or a tuple of them, a frozenset of words, [shape] for a list, a mapping of keys to shapes, or a
# function of a value and its key that returns what is wrong. A key that ends in ? may be missing; * stands for all keys
# that are not listed.
Shape = Any
Check = Callable[[Any, str], str | None]
NUMBER = (int, float, type(None))
TEXT = (str, type(None))
KINDS = {dict: "an object", list: "a list", str: "a text", int: "an integer", float: "a number", bool: "a boolean"}


class Unreadable(ValueError):
    """A file that cannot be used; the message names it and says what is wrong."""


def read_bytes(file: Path, most: int = LARGEST) -> bytes:
    """The content of a plain file.

    Raises:
        Unreadable: it does not exist, is not a file, is larger than ``most`` bytes, or must not be read.
    """
    with opened(file) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most:
            raise Unreadable(f"{file}: {size:,} bytes; must be at most {most:,}")
        return stream.read()


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Open a plain file for reading in the block.

    Raises:
        Unreadable: it is not a plain file, or an error of the system ends the block.
    """
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):  # reading a pipe or a device would never end
            raise Unreadable(f"{file}: {'a folder' if stat.S_ISDIR(mode) else 'not a plain file'}")
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise Unreadable(f"{file}: {error.strerror or error}") from None


def read_text(file: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        Unreadable: it cannot be read, or is not UTF-8.
    """
    return _decoded(file, read_bytes(file))


def read_json(file: Path, shape: Shape = object, *, foreign: bool = False) -> Any:
    """Read a JSON file of ``record.write_json``, or of a ``foreign`` program, whose NaN and infinity become null.

    Raises:
        Unreadable: it cannot be read, is not JSON, or has another shape.
    """
    content = _parsed(str(file), read_text(file), foreign=foreign)
    check(content, shape, str(file))
    return content


def read_yaml(file: Path, shape: Shape = object) -> Any:
    """The plain values of a YAML file.

    Raises:
        Unreadable: it cannot be read, is not YAML, or has another shape.
    """
    text = read_text(file)
    try:
        content = yaml.load(text, yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Unreadable(f"{file}: not YAML: {first_line(error)}") from None
    check(content, shape, str(file))
    return content


def read_lines(file: Path, shape: Shape = object, *, whole: bool = True) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; empty if there is no such file.

    With ``whole`` false, an incomplete last line is left out: its writer was killed, or is still writing.

    Raises:
        Unreadable: it cannot be read, or a line is not a JSON object or has another shape.
    """
    if not os.path.lexists(file):
        return []
    right = compiled(shape)
    with opened(file) as stream:
        if os.fstat(stream.fileno()).st_size <= LONGEST and (found := _whole_rows(stream.read(), right)) is not None:
            return found
        stream.seek(0)  # read line by line, to name the wrong line
        rows = []
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST), b""), 1):
            if whole or line.endswith(b"\n") or b"\0" in line:
                rows.append(_row(f"{file}: line {number}", line, right))
        return rows


def _whole_rows(content: bytes, wrong: Check) -> list[dict[str, Any]] | None:
    """The rows of a file with an object of the right shape in every line, read fast; None for any other file."""
    rows, place = [], 0
    try:
        text = content.decode()
        while place < len(text):
            row, end = OURS.raw_decode(text, place)
            if text[end] != "\n" or type(row) is not dict or wrong(row, "") or _brackets(text, place, end) > DEEPEST:
                return None
            rows.append(row)
            place = end + 1
    except (ValueError, IndexError, RecursionError):
        return None
    return rows if len(rows) == text.count("\n") and not HALF_CHARACTER.search(text) else None  # none in two lines


def _row(name: str, line: bytes, shape: Check) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise Unreadable(f"{name}: half a line")
    row = _parsed(name, _decoded(name, line))
    if not isinstance(row, dict):
        raise Unreadable(f"{name}: {_kind(row)}, not an object")
    check(row, shape, name)
    return row


def usable_lines(file: Path, shape: Shape) -> list[dict[str, Any]]:
    """``read_lines`` without an incomplete last line; empty for a damaged file, which is named on stderr."""
    return usable(lambda: read_lines(file, shape, whole=False)) or []


def usable(read: Callable[[], Found]) -> Found | None:
    """The result of ``read``; None if the file cannot be used, with a line on stderr."""
    try:
        return read()
    except Unreadable as error:
        print(f"skipped: {printable(error)}", file=sys.stderr)
        return None


def _decoded(name: object, content: bytes) -> str:
    try:
        return content.removeprefix(BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"{name}: byte {error.start + 1} is not UTF-8") from None


def _parsed(name: str, text: str, *, foreign: bool = False) -> Any:
    try:
        content = (FOREIGN if foreign else OURS).decode(text)
        if _brackets(text) > DEEPEST:
            _check_depth(content, DEEPEST)
        if HALF_CHARACTER.search(text):  # half a surrogate pair cannot be written to another file
            whole = json.dumps(content, ensure_ascii=False).encode(errors="replace")
            content = json.loads(whole)
    except RecursionError:
        raise Unreadable(f"{name}: nested too deeply") from None
    except ValueError as error:
        kind = "JSONDecodeError" if isinstance(error, json.JSONDecodeError) else "not JSON"
        raise Unreadable(f"{name}: {kind}: {first_line(error) if text.strip() else 'it is empty'}") from None
    return content


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a number")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if abs(number) != float("inf") else _no_number(digits)


OURS = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)
FOREIGN = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite)


def _brackets(text: str, *between: int) -> int:
    """The number of objects and lists that begin in a text, or between two places: an upper bound of the nesting."""
    return text.count("{", *between) + text.count("[", *between)


def _check_depth(value: Any, left: int) -> None:
    if left == 0:
        raise RecursionError
    for part in value.values() if type(value) is dict else value if type(value) is list else ():
        if type(part) is dict or type(part) is list:
            _check_depth(part, left - 1)


# ---- shapes ----------------------------------------------------------------------------------------


def check(value: Any, shape: Shape, name: str) -> None:
    """Raises: Unreadable: ``value``, which comes from ``name``, has another shape."""
    if (wrong := fault(value, shape)) is not None:
        raise Unreadable(f"{name}: {wrong}")


def fault(value: Any, shape: Shape, key: str = "") -> str | None:
    """The first part of ``value`` that does not fit the shape, with its dotted key; None if all fits."""
    return compiled(shape)(value, key)


def compiled(shape: Shape) -> Check:
    """The shape as a function of a value and its key, which checks thousands of values fast.

    The function is a shape too. Most values are plain and right, which needs no call and no key for each of them.
    """
    if isinstance(shape, Mapping):
        return _check_of_object(shape)
    if isinstance(shape, list):
        return _check_of_list(shape[0])
    if isinstance(shape, frozenset):
        expected = f"must be one of {', '.join(sorted(shape))}"
        return lambda value, key: None if value in shape else f"{key}: {expected}"
    if not isinstance(shape, type) and callable(shape):
        found: Check = shape
        return found
    allowed = _types(shape)
    wanted = float if float in allowed else next(iter(allowed), object)  # of an integer and a float: a number
    return lambda value, key: None if not allowed or type(value) in allowed else _wrong(value, wanted, key)


def _types(shape: Shape) -> tuple[type, ...]:
    """The types that a shape of types allows; none for every type, and for a shape of another kind."""
    types = shape if isinstance(shape, tuple) else (shape,)
    return types if object not in types and all(isinstance(one, type) for one in types) else ()


def _check_of_list(shape: Shape) -> Check:
    types, inner = _types(shape), compiled(shape)

    def wrong(value: Any, key: str) -> str | None:
        if type(value) is not list:
            return _wrong(value, list, key)
        parts = enumerate(value)
        found = (inner(part, f"{key}.{place}") for place, part in parts if type(part) not in types)
        return next((problem for problem in found if problem), None)

    return wrong


def _check_of_object(shape: Mapping[str, Shape]) -> Check:
    named = {name.removesuffix("?") for name in shape}
    parts = [
        (name.removesuffix("?"), name.endswith("?"), _types(inner), compiled(inner)) for name, inner in shape.items()
    ]

    def wrong(value: Any, key: str) -> str | None:
        if type(value) is not dict:
            return _wrong(value, dict, key)
        for name, optional, types, inner in parts:
            if name == "*":
                for other, found in value.items():
                    other_kind = type(found) not in types and other not in named
                    if other_kind and (problem := inner(found, _joined(key, other))):
                        return problem
            elif name in value:
                found = value[name]
                if type(found) not in types and (problem := inner(found, _joined(key, name))):
                    return problem
            elif not optional:
                return f"{_joined(key, name)} is missing"
        return None

    return wrong


def _joined(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _wrong(value: Any, wanted: type, key: str) -> str:
    return f"{key + ': ' if key else ''}{_kind(value)}, not {KINDS.get(wanted, wanted.__name__)}"


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)
