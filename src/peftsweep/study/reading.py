"""Reading the files that this project writes. A file of a study may be damaged, edited or of another origin.

Every reader here gives what the file holds, checked against a shape, or raises one line that names the file.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

from peftsweep.errors import first_line, printable

LARGEST = 256 * 2**20  # bytes of a JSON file
LONGEST = 32 * 2**20  # bytes of a line of a .jsonl file
DEEPEST = 60  # objects and lists in one another
Found = TypeVar("Found")
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair in UTF-16, where it is alone

# A shape is a type or a tuple of them, a frozenset of words, [shape] for a list, a mapping of keys to shapes, or a
# function of a value and its key that says what is wrong. A key that ends in ? may be missing; * stands for all keys
# that are not named.
Shape = Any
NUMBER = (int, float, type(None))
TEXT = (str, type(None))
KINDS = {dict: "an object", list: "a list", str: "a text", int: "an integer", float: "a number", bool: "a boolean"}


class Unreadable(ValueError):
    """A file that cannot be used: the line names it and says what is wrong."""


def read_bytes(file: Path, most: int = LARGEST) -> bytes:
    """The content of a plain file.

    Raises:
        Unreadable: there is none, it is something else than a file, larger than ``most`` bytes, or may not be read.
    """
    with opened(file) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most:
            raise Unreadable(f"{file}: {size:,} bytes; such a file has at most {most:,}")
        return stream.read(most)


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A plain file, to be read in the block.

    Raises:
        Unreadable: it is none, or an error of the system ends the block.
    """
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):  # reading a pipe or a device would never end
            raise Unreadable(f"{file}: {'a folder' if stat.S_ISDIR(mode) else 'no plain file'}")
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise Unreadable(f"{file}: {error.strerror or error}") from None


def read_text(file: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        Unreadable: it cannot be read, or holds other bytes.
    """
    return _decoded(file, read_bytes(file))


def read_json(file: Path, shape: Shape = object, *, foreign: bool = False) -> Any:
    """What ``record.write_json`` wrote, or a ``foreign`` program, whose NaN and infinity are read as null.

    Raises:
        Unreadable: it cannot be read, is no JSON, or has another shape.
    """
    content = _parsed(str(file), read_text(file), foreign=foreign)
    check(content, shape, str(file))
    return content


def read_yaml(file: Path, shape: Shape = object) -> Any:
    """The plain values of a YAML file.

    Raises:
        Unreadable: it cannot be read, is no YAML, or has another shape.
    """
    text = read_text(file)
    try:
        content = yaml.load(text, yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Unreadable(f"{file}: no YAML: {first_line(error)}") from None
    check(content, shape, str(file))
    return content


def read_lines(file: Path, shape: Shape = object, *, whole: bool = True) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, none if there is none.

    Unless it must be ``whole``, a last line without its end is left out: a writer was killed, or writes it now.

    Raises:
        Unreadable: it cannot be read, or a line of it is no JSON object or has another shape.
    """
    if not os.path.lexists(file):
        return []
    rows = []
    with opened(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST), b""), 1):
            if whole or line.endswith(b"\n") or b"\0" in line:
                rows.append(_row(f"{file}: line {number}", line, shape))
    return rows


def _row(name: str, line: bytes, shape: Shape) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise Unreadable(f"{name}: half a line")
    row = _parsed(name, _decoded(name, line))
    if not isinstance(row, dict):
        raise Unreadable(f"{name}: {_kind(row)}, not an object")
    check(row, shape, name)
    return row


def usable_lines(file: Path, shape: Shape = object, *, whole: bool = True) -> list[dict[str, Any]]:
    """``read_lines``, none of a damaged file, which is named on stderr."""
    return usable(lambda: read_lines(file, shape, whole=whole)) or []


def usable(read: Callable[[], Found]) -> Found | None:
    """The result of ``read``; None where the file cannot be used, with a line on stderr."""
    try:
        return read()
    except Unreadable as error:
        print(f"skipped: {printable(error)}", file=sys.stderr)
        return None


def _decoded(name: object, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{name}: byte {error.start + 1} is no UTF-8") from None


def _parsed(name: str, text: str, *, foreign: bool = False) -> Any:
    try:
        content = json.loads(text, parse_constant=(lambda _: None) if foreign else _no_number, parse_float=_finite)
        _check_depth(content, DEEPEST)
        if HALF_CHARACTER.search(text):  # half a character is no text, and can be written to no other file
            whole = json.dumps(content, ensure_ascii=False).encode(errors="replace")
            content = json.loads(whole)
    except RecursionError:
        raise Unreadable(f"{name}: nested too deeply") from None
    except ValueError as error:
        kind = "JSONDecodeError" if isinstance(error, json.JSONDecodeError) else "no JSON"
        raise Unreadable(f"{name}: {kind}: {first_line(error) if text.strip() else 'it is empty'}") from None
    return content


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if abs(number) != float("inf") else _no_number(digits)


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
    """What in ``value`` is not of the shape, with its dotted key; None: nothing."""
    if isinstance(shape, Mapping):
        return _fault_of_object(value, shape, key) if type(value) is dict else _wrong(value, dict, key)
    if isinstance(shape, list):
        if type(value) is not list:
            return _wrong(value, list, key)
        found = (fault(part, shape[0], f"{key}.{place}") for place, part in enumerate(value))
        return next((wrong for wrong in found if wrong), None)
    if isinstance(shape, frozenset):
        return None if value in shape else f"{key}: must be one of {', '.join(sorted(shape))}"
    if callable(shape) and not isinstance(shape, type):
        found_wrong: str | None = shape(value, key)
        return found_wrong
    allowed = shape if isinstance(shape, tuple) else (shape,)
    return None if object in allowed or type(value) in allowed else _wrong(value, allowed[0], key)


def _fault_of_object(value: dict[str, Any], shape: Mapping[str, Shape], key: str) -> str | None:
    named = {name.removesuffix("?") for name in shape}
    for name, inner in shape.items():
        own = name.removesuffix("?")
        if own == "*":
            for other in value.keys() - named:
                if wrong := fault(value[other], inner, _joined(key, other)):
                    return wrong
        elif own in value:
            if wrong := fault(value[own], inner, _joined(key, own)):
                return wrong
        elif own == name:
            return f"{_joined(key, own)} is missing"
    return None


def _joined(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _wrong(value: Any, wanted: type, key: str) -> str:
    return f"{key + ': ' if key else ''}{_kind(value)}, not {KINDS.get(wanted, wanted.__name__)}"


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)
