"""Records -> tables: one row a trial or a logged step, and the files they are written to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import peftsweep
from peftsweep.analysis.table.columns import PREDICTED, PREDICTION_ERROR, devices
from peftsweep.errors import InputError, printable
from peftsweep.study import record
from peftsweep.study.atomic import replacing
from peftsweep.study.reading import usable
from peftsweep.study.record import RESULT, STEPS, RecordError, Result, Status
from peftsweep.study.scores import TEXT_PARTS
from peftsweep.study.store import BASE, is_below, is_plain, recorded

RESULTS_FILE = "results.parquet"
STEPS_FILE = "steps.parquet"
AS_TEXT = "histogram"  # what keys end so have answers as their own keys: a column each would make thousands
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how texts begin that a spreadsheet takes for formulas
# Of a line of predictions.
KEPT = ("correct", "correct_norm", "log_likelihood", "tokens", "label", "label_prediction", *TEXT_PARTS.values())
DTYPES: tuple[tuple[set[type], str, type], ...] = (
    ({bool}, "boolean", np.bool_),
    ({int}, "Int64", np.int64),
    ({int, float}, "Float64", np.float64),
)
SCALARS = {str, int, float, bool, type(None)}
INTEGERS = 2**63  # beyond them, a number is kept as a float

STEP, COMPILE = "train_info.step_seconds_p50", "config.train.compile"
NOT_TWINS = (COMPILE, "config.train.compile_dynamic", "config.train.pad_to_multiple_of", "config.label")
SPEED_UP, BREAK_EVEN = "train_info.compile_speed_up", "train_info.compile_break_even_step"
ALLOCATED = "memory.train.allocated_peak"

SQLITE_COLUMNS = 2000  # as sqlite is usually built
SQLITE_INDEXES = {
    "trials": ("run_info.status", "choices.method", "run_info.created_at", "run_info.identity"),
    "steps": ("trial",),
}


# ---- reading ---------------------------------------------------------------------------------------


def read(folder: Path) -> list[Result]:
    """The records of a study, oldest first; a broken one, and a copy of another, is named on stderr and skipped."""
    results = list[Result]()
    for place in recorded(folder):
        try:
            results.append(Result.read_whole(place))
        except RecordError as error:
            if os.path.lexists(place / RESULT):  # else a sweep has just begun that trial again
                print(f"skipped: {printable(error)}", file=sys.stderr)
    return sorted(_without_copies(results), key=lambda result: (result.run_info["created_at"], result.trial))


def _without_copies(results: Iterable[Result]) -> list[Result]:
    """One record for each trial: of several folders that hold it, the one that is done, newest, and has its first name.

    Without this a copied folder would count as another seed, in every table and interval.
    """
    kept = dict[str, Result]()
    for place, result in enumerate(sorted(results, key=_precedence, reverse=True)):
        identity = result.run_info.get("identity")  # records of the first version have none
        held = kept.setdefault(str(place) if identity is None else f"identity {identity}", result)
        if held is not result:
            print(f"skipped: {printable(result.folder)}: the same trial as {printable(held.folder)}", file=sys.stderr)
    return [*kept.values()]


def _precedence(result: Result) -> tuple[bool, str, bool, str]:
    name = (result.folder or Path()).name
    return result.status.done, result.run_info["created_at"], name == result.trial, name


def trials(results: Iterable[Result]) -> pd.DataFrame:
    """One row a trial, with dotted columns such as ``config.method.r``; lists and histograms are kept as JSON text.

    ``collected.*`` say where a row comes from: the study's folder, the record, when it was read and by which version.
    """
    columns, at = _Columns(), record.now()
    for result in results:
        row = {name: value for name, value in vars(result).items() if name != "folder"}
        if result.folder is not None:
            place = {"study": result.folder.parent.as_posix(), "record": record_file(result)}
            row["collected"] = place | {"at": at, "by": f"peftsweep {peftsweep.__version__}"}
        columns.add(row)
    return _with_comparisons(columns.frame())


def record_file(result: Result) -> str:
    """The file that ``result`` was read from."""
    return ((result.folder or Path()) / RESULT).as_posix()


def steps(results: Iterable[Result], names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """One row a logged step, with the trial, its label and study before its own columns.

    The label is the one that ``names`` has for the trial, else the first of its record.
    """
    columns = _Columns("trial", "label", "study", "step")
    for result in results:
        info = result.run_info
        name = {
            "trial": result.trial,
            "label": (names or {}).get(result.trial, info["labels"][0]),
            "study": info["study"],
        }
        rows = record.usable_lines((result.folder or Path()) / STEPS, record.STEP)
        own = {key: [row.get(key) for row in rows] for key in dict.fromkeys(chain.from_iterable(rows))}
        columns.extend({key: [value] * len(rows) for key, value in name.items()} | own, len(rows))
    return columns.frame()


def predictions(folder: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """Trial, evaluation -> the lines of its predictions in a study; each file is read once and kept without texts.

    An untouched base goes by the file of its answers, as records name it (``eval_info.<eval>.base_predictions``).
    """
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def read(trial: str, evaluation: str) -> list[dict[str, Any]]:
        if (trial, evaluation) not in known:
            file = predictions_file(folder, trial, evaluation)
            lines = usable(partial(record.read_predictions, file)) or []
            known[trial, evaluation] = [_slim(line) for line in lines]
        return known[trial, evaluation]

    return read


def predictions_file(folder: Path, trial: str, evaluation: str) -> Path:
    """The file of a trial's predictions in a study, or of those of an untouched base, which goes by its file.

    A record is read from wherever a study came from: names that would lead out of the study are those of no file.
    """
    named = Path(trial)
    if named.suffix == ".jsonl" and is_below(trial, BASE):
        return folder / named
    if not (is_plain(trial) and is_plain(evaluation)):
        return folder / "no file"
    return folder / trial / "predictions" / f"{evaluation}.jsonl"


def _slim(line: dict[str, Any]) -> dict[str, Any]:
    prompt_and_answer = json.dumps([line.get("prompt"), line.get("answer")]).encode()
    return {key: line[key] for key in KEPT if key in line} | {
        "prompt": hashlib.blake2b(prompt_and_answer, digest_size=8).digest()
    }


def together(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """The rows of several tables, with the columns of all."""
    tables = list(tables)
    if len(tables) == 1:
        return tables[0]  # typed already
    columns = _Columns()
    for table in tables:
        plain = table.astype(object).where(table.notna(), None)
        columns.extend({str(name): plain[name].tolist() for name in plain}, len(plain))
    return columns.frame()


def newest(table: pd.DataFrame) -> pd.DataFrame:
    """One trial of each identity: the newest that is done, else the newest."""
    if "run_info.identity" not in table:
        return table
    done = table["run_info.status"].map(lambda status: Status(status).done)
    order = table.assign(done=done)[["done", "run_info.created_at"]].sort_values(
        ["done", "run_info.created_at"], kind="stable"
    )
    identity = table.loc[order.index, "run_info.identity"]
    kept = order.index[~identity.duplicated(keep="last") | identity.isna()]  # records of the first version have none
    return table.loc[sorted(kept)]


@dataclass
class _Names:
    """The contents of an object in the rows so far: the columns of its plain values, and the objects in it."""

    prefix: str = ""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    objects: dict[str, _Names] = field(default_factory=dict)


class _Columns:
    """A table under construction: the values of each column, None where a row lacks it."""

    def __init__(self, *names: str) -> None:
        self.values: dict[str, list[Any]] = {name: [] for name in names}
        self.rows = 0
        self._names = _Names()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of nested values; a nested key becomes a dotted column, an empty dict none."""
        self._add(row, self._names)
        self.rows += 1

    def _add(self, values: Mapping[str, Any], names: _Names) -> None:
        columns, rows = names.columns, self.rows
        for key, value in values.items():  # this loop is much of a large study's time: each name is made once
            kind = type(value)
            if kind is dict and not key.endswith(AS_TEXT):
                if key not in names.objects:
                    names.objects[key] = _Names(f"{names.prefix}{key}.")
                self._add(value, names.objects[key])
                continue
            column = columns.get(key)
            if column is None:
                column = columns[key] = self.values.setdefault(names.prefix + key, [])
            if len(column) != rows:
                column.extend([None] * (rows - len(column)))
            column.append(value if kind in SCALARS else json.dumps(record.plain(value)))

    def extend(self, values: Mapping[str, list[Any]], rows: int) -> None:
        """Add many rows."""
        for name, added in values.items():
            column = self.values.setdefault(name, [])
            column.extend([None] * (self.rows - len(column)))
            column.extend(added)
        self.rows += rows

    def frame(self) -> pd.DataFrame:
        """The table, each column typed: integers stay integers beside gaps, mixed types become text."""
        for column in self.values.values():
            column.extend([None] * (self.rows - len(column)))
        return pd.DataFrame({name: _typed(column) for name, column in self.values.items()})


def _typed(values: list[Any]) -> Any:
    found = set(map(type, values))
    kinds = found - {type(None)}
    if not kinds:
        return pd.array(values, dtype=object)
    if kinds == {int} and max(abs(value) for value in values if value is not None) >= INTEGERS:
        values, kinds = [None if value is None else float(value) for value in values], {float}
    for allowed, dtype, plain in DTYPES:
        if kinds <= allowed:
            whole: Any = np.array(values, plain) if kinds == found else values  # without gaps, which is quicker
            return pd.array(whole, dtype=dtype)
    text = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pd.array(text, dtype="string")


# ---- what several figures tell together ------------------------------------------------------------


def _with_comparisons(table: pd.DataFrame) -> pd.DataFrame:
    """Add the error of the predicted memory, where a device measured it, and what compiling gained.

    Predicted is what torch's allocator holds at the peak of a whole training, so only that is held against it. The
    resident set of a process is another quantity: it counts libraries, files and pages that were given back.
    """
    if PREDICTED in table and ALLOCATED in table:
        measured = table[ALLOCATED].astype(float).where(table["run_info.status"].eq(Status.success.name))
        table[PREDICTION_ERROR] = (table[PREDICTED].astype(float) / measured - 1).astype("Float64")
    if "train_info.compile_graphs" in table:
        same = [c for c in table.columns if c.startswith("config.") and c not in NOT_TWINS]
        twins = table[same].map(lambda value: "" if pd.isna(value) else str(value)).agg("|".join, axis=1)
        twins += "|" + devices(table)  # a step on another device is no step of a twin
        eager = table[table[COMPILE] == "none"].groupby(twins)[STEP].median()
        gains = [_compile_gain(row, eager.get(twin)) for (_, row), twin in zip(table.iterrows(), twins, strict=True)]
        table[[SPEED_UP, BREAK_EVEN]] = pd.DataFrame(gains, index=table.index, dtype="Float64")
    return table


def _compile_gain(row: pd.Series[Any], eager: float | None) -> tuple[float | None, float | None]:
    """How many times faster a compiled trial's median step is than its eager twin's, and after how many steps it pays.

    ``eager`` is the twin's, in seconds: of the trial that differs in nothing but how it is compiled. The break-even
    step is that at which the seconds of compiling have come back, and infinite where they never do.
    """
    if pd.isna(row["train_info.compile_graphs"]) or eager is None or pd.isna(eager):
        return None, None
    compiled = float(row[STEP])
    spent = row["train_info.compile_seconds"] + row["train_info.recompile_seconds"]
    return eager / compiled, spent / (eager - compiled) if compiled < eager else math.inf


# ---- writing ---------------------------------------------------------------------------------------


def check_ending(file: Path) -> None:
    """Raises: InputError: ``write`` knows no format that ends so."""
    if file.suffix not in WRITERS:
        raise InputError(f"--out {file}: must end in one of {' '.join(WRITERS)}")


def write(table: pd.DataFrame, file: Path, logged: Callable[[], pd.DataFrame]) -> None:
    """Replace ``file`` by the trials of ``table``, in the format that its ending says, atomically.

    A database gets a second table, of the ``logged`` steps, which are not read for another format.
    """
    with replacing(file) as temporary:
        WRITERS[file.suffix](table, temporary, logged)


def write_parquet(table: pd.DataFrame, file: Path) -> None:
    """Replace ``file`` by ``table``, atomically."""
    write(table, file, lambda: table)


def _parquet(table: pd.DataFrame, file: Path, _: Callable[[], pd.DataFrame]) -> None:
    table.to_parquet(file, index=False)


def _csv(table: pd.DataFrame, file: Path, _: Callable[[], pd.DataFrame]) -> None:
    table.map(_no_formula).to_csv(file, index=False)


def _no_formula(cell: Any) -> Any:
    """A text that a spreadsheet would run, with the apostrophe before it that makes it text there."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def _json(table: pd.DataFrame, file: Path, _: Callable[[], pd.DataFrame]) -> None:
    table.to_json(file, orient="records", indent=1, double_precision=15)


def _json_lines(table: pd.DataFrame, file: Path, _: Callable[[], pd.DataFrame]) -> None:
    table.to_json(file, orient="records", lines=True, double_precision=15)


def _sqlite(table: pd.DataFrame, file: Path, logged: Callable[[], pd.DataFrame]) -> None:
    if len(table.columns) > SQLITE_COLUMNS:
        many = f"{len(table.columns):,} columns, and a database holds {SQLITE_COLUMNS:,}"
        raise InputError(f"--out {file}: {many}; take .parquet")
    database = sqlite3.connect(file)
    try:
        for name, content in {"trials": table, "steps": logged()}.items():
            content.to_sql(name, database, index=False)
            for column in SQLITE_INDEXES[name]:
                if column in content:
                    database.execute(f'CREATE INDEX "{name} by {column}" ON {name} ("{column}")')
        database.commit()
    finally:
        database.close()


WRITERS: dict[str, Callable[[pd.DataFrame, Path, Callable[[], pd.DataFrame]], None]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".sqlite": _sqlite,
    ".db": _sqlite,
}
