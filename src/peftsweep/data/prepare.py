"""A dataset's rows -> a training and a test file in a common format."""

from __future__ import annotations

import os
import pydoc
import random
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from peftsweep.data import rows as data_rows
from peftsweep.data import templates
from peftsweep.data.conversations.turns import VARIABLES
from peftsweep.data.rows import Row
from peftsweep.data.templates import Example
from peftsweep.errors import InputError
from peftsweep.schema import DatasetConfig
from peftsweep.study import record

FORMATS = ("alpaca", "chatml", "raw")
COLUMNS = ("instruction", "input", "output")  # Alpaca's
SHOWN = 3


@dataclass(frozen=True)
class Options:
    """The words of ``peftsweep-data``."""

    out: Path
    samples: int | None = None  # None for all
    split: float = 0.9
    format: str = "raw"
    seed: int = 0
    path: str | None = None
    encoding: str | None = None
    prompt: str | None = None
    answer: str | None = None
    missing: str | None = None  # drop or empty, of schema.OnMissing
    force: bool = False

    @property
    def test_out(self) -> Path:
        """The file of the test rows, beside that of the training rows."""
        return self.out.with_suffix(".test.jsonl")


class Pair(NamedTuple):
    """A row of the source, and its example by the dataset's templates."""

    row: Row
    example: Example


def main(cfg: DictConfig, options: Options) -> int:
    """``peftsweep-data``: write the two files, and print what they hold.

    Raises:
        InputError: an option is wrong, or rows cannot be read, shaped or written.
    """
    check(options)
    dataset = dataset_config(cfg, options)
    rows = read(dataset, options)
    try:
        made = [*templates.templates(dataset, options.path or "").each(rows)]
    except InputError as error:
        raise InputError(_in_options(str(error))) from None
    whole = [Pair(row, example) for row, example in zip(rows, made, strict=True) if example]
    pairs = unique(whole)
    train, test = split(pairs, options)
    shape, how = shaping(dataset, options, rows)
    files = {options.out: [shape(pair) for pair in train], options.test_out: [shape(pair) for pair in test]}
    _write(files, options)
    for file, written in files.items():
        print(f"{file}: {len(written)} rows")
    incomplete = f"{len(rows) - len(whole)} without a value, " if len(whole) < len(rows) else ""
    print(
        f"left out: {incomplete}{len(whole) - len(pairs)} duplicates, {len(pairs) - len(train) - len(test)} not sampled"
    )
    print("\nthe first of them:", *map(record.line, files[options.out][:SHOWN]), sep="\n")
    print("to train on them:\n" + shlex.join(["peftsweep", *how, *_paths(options)]))
    return 0


def check(options: Options) -> None:
    """Check the options that can be checked before any row is read.

    Raises:
        InputError: the line names the option and what is allowed.
    """
    if options.samples is not None and options.samples < 1:
        raise InputError(f"--samples={options.samples}: must be at least 1")
    if not 0 < options.split < 1:
        raise InputError(f"--split={options.split}: must lie between 0 and 1")
    if options.format not in FORMATS:
        raise InputError(f"--format={options.format}: must be one of {', '.join(FORMATS)}")
    if options.out.suffix != ".jsonl":
        raise InputError(f"--out={options.out}: must end in .jsonl")
    for file in (options.out, options.test_out):
        if options.path and file.resolve() == Path(options.path).resolve():
            raise InputError(f"--out={options.out}: must differ from the file of --path")
        if os.path.isdir(file):
            raise InputError(f"--out={options.out}: {file} is a folder; must be a file")
        if os.path.exists(file) and not options.force:
            raise InputError(f"--out={options.out}: {file} exists already; --force replaces it")
    folder = next(parent for parent in options.out.absolute().parents if os.path.exists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out={options.out}: must lie in a writable folder; {folder} is not one")


def dataset_config(cfg: DictConfig, options: Options) -> DatasetConfig:
    """The dataset that ``cfg`` chose, with the options in place of its keys.

    Raises:
        InputError: it has no source of rows or no template, and no option gives one.
    """
    for key in ("path", "encoding", "prompt", "answer", "missing"):
        if (value := getattr(options, key)) is not None:
            cfg.dataset[key] = value
    for key in ("prompt", "answer"):
        if OmegaConf.is_missing(cfg.dataset, key):
            raise InputError(f"--{key}: dataset={cfg.dataset.name} needs a template over its columns, '{{question}}'")
    found: Any = OmegaConf.to_object(cfg.dataset)
    assert isinstance(found, DatasetConfig)
    if not (found.path or found.hub or found.generator):
        raise InputError(f"--path: dataset={found.name} needs a local file; allowed: {' '.join(data_rows.FORMATS)}")
    return found


def read(dataset: DatasetConfig, options: Options) -> list[Row]:
    """The rows of the local file, else those of the generator, else the hub's."""
    if dataset.path is not None:
        return data_rows.read_rows(dataset.path, "--path", dataset.encoding)
    if dataset.generator is not None:
        make: Any = pydoc.locate(dataset.generator)
        rows: list[Row] = make("train", options.samples or dataset.samples, options.seed)
        return rows
    assert dataset.hub is not None
    try:
        return data_rows.hub_rows(dataset.hub, dataset.hub_config, dataset.hub_split, dataset.revision, "dataset.hub")
    except InputError as error:
        raise InputError(f"{error}, by --path=FILE") from error


def _in_options(problem: str) -> str:
    """A line about a key of ``dataset`` in the options of this command, which takes no such keys."""
    quoted = re.sub(r"""'dataset\.(prompt|answer)="([^"]*)"'""", r"--\1 '\2'", problem)
    return re.sub(r"\bdataset\.(prompt|answer|missing)\b", r"--\1", quoted)


def unique(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs without duplicates of both prompt and answer."""
    first: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        first.setdefault(pair.example.written, pair)
    return list(first.values())


def split(pairs: Sequence[Pair], options: Options) -> tuple[list[Pair], list[Pair]]:
    """A sample in two parts; rows with the same prompt stay in one part, unless all rows share one prompt.

    Raises:
        InputError: one of the parts would be empty.
    """
    count = min(options.samples or len(pairs), len(pairs))
    groups: dict[str, list[Pair]] = {}
    constant = len({pair.example.prompt for pair in pairs}) == 1
    for pair in random.Random(options.seed).sample(pairs, count):
        same = pair.example.answer if constant else pair.example.prompt
        groups.setdefault(" ".join(same.split()).lower(), []).append(pair)
    train: list[Pair] = []
    test: list[Pair] = []
    for group in groups.values():
        (train if len(train) < round(count * options.split) else test).extend(group)
    if not train or not test:
        raise InputError(
            f"--split={options.split}: splits {count} rows into {len(train)} training and {len(test)} test rows; "
            "both need at least one, and rows with the same prompt stay together"
        )
    return train, test


# ---- formats ---------------------------------------------------------------------------------------


def shaping(
    dataset: DatasetConfig, options: Options, rows: Sequence[Row]
) -> tuple[Callable[[Pair], Row], Sequence[str]]:
    """The function that makes a row of the chosen format, and the words of peftsweep that read such rows."""
    if options.format == "chatml":
        return _chatml, ["dataset=chat"]
    if options.format == "raw":
        templates_given = {"dataset.prompt": options.prompt, "dataset.answer": options.answer}
        given = templates_given | ({"dataset.missing": options.missing} if options.missing == "empty" else {})
        words = [_word(key, value) for key, value in given.items() if value is not None]
        return lambda pair: pair.row, [f"dataset={dataset.name}", *words]
    if all(row.keys() >= set(COLUMNS) for row in rows):
        return lambda pair: {column: pair.row[column] for column in COLUMNS}, ["dataset=alpaca"]
    # Not dataset=alpaca: its template would be applied to a prompt that is complete already.
    return _alpaca, ["dataset=file", 'dataset.prompt="{instruction}"', 'dataset.answer="{output}"']


def _alpaca(pair: Pair) -> Row:
    turns, conversation = _turns(pair.example), pair.example.conversation
    if len(turns) > 2 or (conversation and (conversation.tools or not isinstance(turns[0].get("content"), str))):
        raise InputError("--format=alpaca: a conversation of several turns is not an instruction; use chatml or raw")
    return {"instruction": turns[0]["content"], "input": "", "output": pair.example.answer}


def _chatml(pair: Pair) -> Row:
    if not pair.example.prompt.strip():
        raise InputError("--format=chatml: a row without a prompt is not a conversation; use alpaca or raw")
    conversation = pair.example.conversation
    beside = {"tools": conversation.tools, VARIABLES: conversation.variables} if conversation else {}
    return {"messages": _turns(pair.example)} | {key: value for key, value in beside.items() if value}


def _turns(example: Example) -> list[Row]:
    """The turns of a conversation, or prompt and answer as two turns."""
    if example.conversation:
        return example.conversation.messages
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]


def _paths(options: Options) -> list[str]:
    return [_word("dataset.path", str(options.out)), _word("dataset.test_path", str(options.test_out))]


def _word(key: str, value: str) -> str:
    """An override in Hydra's grammar, quoted if it must be."""
    if re.fullmatch(r"[\w./-]+", value):
        return f"{key}={value}"
    escaped = re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value)
    return f'{key}="{escaped}"'


def _write(files: dict[Path, list[Row]], options: Options) -> None:
    try:
        for file, rows in files.items():
            record.write_lines(file, rows)
    except OSError as error:
        raise InputError(f"--out={options.out}: cannot be written ({error.strerror})") from error
    except TypeError as error:
        raise InputError(f"--format={options.format}: a column cannot be written as JSON ({error})") from error
