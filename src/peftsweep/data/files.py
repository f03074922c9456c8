"""A file of rows -> its rows, as dicts of its columns; missing values (null, NaN) are None.

The standard library reads JSON and CSV. It reports an open quote and a line that is too short (pandas pads the line,
pyarrow reads on to the end of the file), and it changes the type of no value.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftsweep.errors import InputError

Row = dict[str, Any]

FORMATS = (
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".txt",
    ".md",
)  # also in capitals; all but .parquet also with .gz
PLAIN = (".txt", ".md")  # read as paragraphs
SHOWN = 4  # files of a folder that a message names
FIRST_ROWS = 100  # by which the layout of a file is recognised
BEGINNING = 2**20  # bytes of a large file that are read for its first rows
# Types of floats of fewer bits than Python's, as Arrow and the library datasets call them -> their names in NumPy.
SHORT_FLOATS = {"float": "float32", "halffloat": "float16", "float32": "float32", "float16": "float16"}
GZIP = b"\x1f\x8b"  # the first bytes of a gzip file
FIRST_LINE = re.compile(r"\S[^\r\n]*")  # that is not empty
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # of columns in .csv
BYTE_ORDER_MARKS = {  # that of UTF-32 begins with one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

csv.field_size_limit(2**31 - 1)  # the default ends a field at 128 KiB


def read_rows(path: str | Path, key: str = "path", encoding: str | None = None) -> list[Row]:
    """The rows of a local file; errors name the configuration key ``key``.

    With ``encoding`` None the byte order mark gives the encoding, else it is UTF-8.

    Raises:
        InputError: no such file, an unknown format or encoding, or a line that cannot be read (with its number).
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{key}={path}: {no_file(file)}")
    option = f"{key.rpartition('.')[0]}.encoding" if "." in key else "--encoding"
    packed, suffix = file.suffix.lower() == ".gz", format_of(file)
    if suffix not in FORMATS:
        raise InputError(f"{key}={path}: unknown format '{suffix}'; allowed: {' '.join(FORMATS)}, and these with .gz")
    try:
        if suffix == ".parquet":
            rows = _read_parquet(file)
        else:
            content = file.read_bytes()
            packed = packed or content.startswith(GZIP)  # some tools write gzip without this suffix
            rows = _READERS[suffix](_decoded(gzip.decompress(content) if packed else content, encoding, option))
    except _BrokenLine as broken:
        raise InputError(f"{key}={path}: line {broken.line}: {broken}") from None
    except LookupError:
        allowed = "such as utf-8, utf-16, cp1252, latin-1"
        raise InputError(f"{option}={encoding}: no such encoding; {allowed}") from None
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{key}={path}: cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    if not rows:
        raise InputError(f"{key}={path}: holds no rows")
    return rows


def matching(path: str | Path) -> list[Path]:
    """The files that ``path`` names: one, or those of a folder whose names match ``*`` in it, such as all shards."""
    file = Path(path)
    if file.is_file() or "*" not in file.name:
        return [file] if file.is_file() else []
    return sorted(one for one in file.parent.glob(file.name) if one.is_file())


def format_of(path: str | Path) -> str:
    """The suffix that gives the format of a file, in small letters and without .gz, such as ``.jsonl``."""
    file = Path(path)
    return Path(file.stem if file.suffix.lower() == ".gz" else file.name).suffix.lower()


def first_rows(path: str | Path, key: str = "path", encoding: str | None = None) -> list[Row]:
    """The first rows of a local file, or the first one that ``path`` matches, up to ``FIRST_ROWS``.

    Of a large file only its beginning is read.

    Raises:
        InputError: as ``read_rows``.
    """
    file, suffix = next(iter(matching(path)), Path(path)), format_of(path)
    if not file.is_file() or suffix not in (".jsonl", ".csv", ".tsv", ".parquet"):
        return read_rows(file, key, encoding)[:FIRST_ROWS]
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            table = next(pyarrow.parquet.ParquetFile(file).iter_batches(FIRST_ROWS))
            return _arrow_rows(table)
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            beginning = stream.read(BEGINNING)
        lines = beginning if len(beginning) < BEGINNING else beginning.rpartition(b"\n")[0]
        return (_READERS[suffix](_decoded(lines, encoding, key)) or read_rows(file, key, encoding))[:FIRST_ROWS]
    except (ValueError, LookupError, OSError, EOFError, StopIteration, zlib.error):
        return read_rows(file, key, encoding)[:FIRST_ROWS]  # raises the error, or reads a row that is cut at BEGINNING


def no_file(path: Path, hint: str = "") -> str:
    """Why ``path`` is not a file of rows, with ``hint`` where nothing is there.

    A pipe, such as ``<(command)`` of a shell, can be read once only, but each worker reads the rows.
    """
    if path.is_dir():
        return "is a folder; must be a file"
    if path.exists():
        return "is a pipe or a device; must be a file"
    return f"no such file{hint}{similar(path)}"


def similar(path: Path) -> str:
    """``; did you mean 'rows.jsonl'?`` if a file or folder beside ``path`` has a similar name, else the files there."""
    folder = path.expanduser().parent
    if not folder.is_dir():
        return f"; there is no folder {path.parent}"
    with contextlib.suppress(OSError):
        names = sorted(one.name for one in folder.iterdir())
        same = [name for name in names if Path(name).stem == path.stem]
        if close := same or difflib.get_close_matches(path.name, names, n=1, cutoff=0.75):
            return f"; did you mean '{path.parent / close[0]}'?"
        readable = [str(path.parent / name) for name in names if format_of(name) in FORMATS][:SHOWN]
        if path.suffix and readable:
            return f"; in {folder.absolute()} there are {', '.join(readable)}"
    return f"; looked for in {folder.absolute()}"


def plain_rows(rows: Iterable[Row], short: Mapping[str, str] | None = None) -> list[Row]:
    """Rows as Arrow gives them, with None for NaN, and without the null keys that Arrow adds to objects in lists.

    The columns ``short`` (with their types, of ``SHORT_FLOATS``) hold floats of 32 or 16 bits, with which 3.8 is
    3.799999952316284 in Python: the number with the fewest digits that is the same float is taken.
    """
    plain = [{name: _plain(value) for name, value in row.items()} for row in rows]
    for row in plain if short else ():
        row |= {name: _shortest(row[name], kind) for name, kind in (short or {}).items()}
    return plain


def _shortest(value: float | None, kind: str) -> float | None:
    import numpy

    # Older versions of pyarrow give NumPy's float16, which ``_plain`` does not know.
    return None if value is None or value != value else float(str(getattr(numpy, SHORT_FLOATS[kind])(value)))


def _plain(value: Any, *, listed: bool = False) -> Any:
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, list):
        return [_plain(item, listed=True) for item in value]
    if isinstance(value, dict):
        present = {key: item for key, item in value.items() if item is not None or not listed}
        return {key: _plain(item, listed=listed) for key, item in present.items()}
    return value


class _BrokenLine(ValueError):
    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def _decoded(content: bytes, encoding: str | None, option: str) -> str:
    found = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding or found)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        hint = f"; the file may be in the encoding of Windows: {option}=cp1252" if encoding is None else ""
        raise _BrokenLine(line, f"not {encoding or found} (byte 0x{content[error.start]:02x}){hint}") from None
    if encoding is None and "\0" in text:
        raise ValueError(f"it holds zero bytes, as UTF-16 does; try {option}=utf-16")
    return text.removeprefix("\ufeff")


# ---- formats ---------------------------------------------------------------------------------------


def _read_json(text: str) -> list[Row]:
    """A list of objects, an object that holds one such list (as in ``{"data": [...]}``), or lines of objects."""
    try:
        found = _parsed(text, 1)
    except _BrokenLine:
        if text.lstrip()[:1] != "{" or not _is_object(text.lstrip().partition("\n")[0]):
            raise
        return _read_lines(text)
    if isinstance(found, dict):
        lists = {key: value for key, value in found.items() if _is_rows(value)}
        if len(lists) > 1:
            raise ValueError(f"an object with several lists of rows ({', '.join(lists)}); must hold one")
        found = next(iter(lists.values()), None)
    if not _is_rows(found):
        raise ValueError("not a list of JSON objects")
    rows: list[Row] = found
    return rows


def _read_jsonl(text: str) -> list[Row]:
    """One object on each line; a file that is one list of objects is read too."""
    if text.lstrip()[:1] == "[" and _is_rows(rows := _parsed(text, 1)):
        return list(rows)
    return _read_lines(text)


def _read_lines(text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line.strip(), number)
        except _BrokenLine:
            raise
        except ValueError as error:
            raise _BrokenLine(number, str(error)) from None
        if not isinstance(row, dict):
            raise _BrokenLine(number, "not a JSON object")
        rows.append(row)
    return rows


def _parsed(text: str, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise _BrokenLine(line + error.lineno - 1, f"not JSON ({error.msg})") from None
    except RecursionError:
        raise _BrokenLine(line, "JSON with too many lists or objects within each other") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"the key '{_repeated([key for key, _ in pairs])}' occurs twice in one object")
    return made


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _is_object(line: str) -> bool:
    try:
        return isinstance(_parsed(line, 1), dict)
    except ValueError:
        return False


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _read_csv(text: str) -> list[Row]:
    """Columns separated by commas, semicolons (as Excel writes where the decimal mark is a comma), tabs or bars."""
    found = FIRST_LINE.search(text)
    first = found[0].strip() if found else ""
    if found and first.startswith("sep=") and len(first) == 5:
        return _read_table(text[found.end() :], text.count("\n", 0, found.start()), delimiter=first[4], strict=True)
    unquoted = re.sub(r'"[^"]*("|\Z)', "", first)
    marks = [mark for mark in SEPARATORS if mark in unquoted] or [next(iter(SEPARATORS))]
    if len(marks) == 1:
        return _read_table(text, 0, delimiter=marks[0], strict=True)
    return _read_by_one_of(text, marks)


def _read_by_one_of(text: str, marks: Sequence[str]) -> list[Row]:
    """The rows by the one separator that all lines have as often as the first line, where that line has several."""
    read: dict[str, list[Row]] = {}
    errors = []
    for mark in marks:
        try:
            read[mark] = _read_table(text, 0, delimiter=mark, strict=True)
        except _BrokenLine as error:
            errors.append(error)
    if not read:
        raise errors[0]
    if len(read) > 1:
        several = " or ".join(SEPARATORS[mark] for mark in read)
        raise _BrokenLine(
            1, f"the columns may be separated by {several}; a line 'sep={next(iter(read))}' before it says which"
        )
    return next(iter(read.values()))


def _read_tsv(text: str) -> list[Row]:
    # Published tab-separated files (GLUE) do not quote; a single " in them is a character.
    return _read_table(text, 0, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_table(text: str, skipped: int, **options: Any) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    names: list[str] | None = None
    records = []
    try:
        for record in filter(any, reader):  # spreadsheets write empty rows as separators alone
            if names is None:
                names = record
            elif len(record) < len(names) or any(record[len(names) :]):
                raise _BrokenLine(reader.line_num + skipped, f"not {len(names)} columns")
            else:
                records.append(record)
    except csv.Error as error:
        raise _BrokenLine(reader.line_num + skipped, str(error)) from None
    columns = _named_columns(names or [], records)
    return [{name: record[place] for place, name in columns.items()} for record in records]


def _named_columns(names: Sequence[str], records: Sequence[Sequence[str]]) -> dict[int, str]:
    """The names of columns by place, without an unnamed index in the first column and without empty unnamed columns."""
    named = {place: name for place, name in enumerate(names) if name.strip()}
    if len(set(named.values())) < len(named):
        raise _BrokenLine(1, f"the column '{_repeated(list(named.values()))}' occurs twice")
    for place in range(1, len(names)):
        if place not in named and any(record[place] for record in records):
            raise _BrokenLine(1, f"column {place + 1} has no name")
    return named


def _repeated(names: Sequence[str]) -> str:
    return next(name for n, name in enumerate(names) if name in names[:n])


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file).read()
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError(f"the column '{_repeated(table.column_names)}' occurs twice")
    return _arrow_rows(table)


def _arrow_rows(table: Any) -> list[Row]:
    kinds = zip(table.schema.names, table.schema.types, strict=True)
    return plain_rows(table.to_pylist(), {name: str(kind) for name, kind in kinds if str(kind) in SHORT_FLOATS})


def _read_text(text: str) -> list[Row]:
    """Paragraphs, which empty lines separate."""
    paragraphs = io.StringIO(text, newline=None).read().split("\n\n")
    return [{"text": paragraph.strip()} for paragraph in paragraphs if paragraph.strip()]


_READERS: dict[str, Callable[[str], list[Row]]] = {
    **dict.fromkeys(PLAIN, _read_text),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
