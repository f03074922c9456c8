"""Rows -> examples -> batches.

A row is a dict of a file's columns; an example is its prompt and answer; tokens are an example in
the model's vocabulary; a batch is right-padded tokens as tensors.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import pydoc
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftsweep.errors import InputError, suggest
from peftsweep.schema import DatasetConfig, RowsConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
GENERATED_TEST_ROWS = 1000
BUCKET_BATCHES = 20  # batches sorted by length together: little padding, and the order stays random


# ---- rows ------------------------------------------------------------------------------------------


def read_rows(path: str | Path, key: str = "path") -> list[Row]:
    """The rows of a local file; ``key`` is the configuration key an error names.

    Raises:
        InputError: no such file, an unknown format, or a line that cannot be read (its number is given).
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{key}={path}: no such file")
    if file.suffix not in FORMATS:
        raise InputError(f"{key}={path}: unknown format '{file.suffix}'; allowed: {' '.join(FORMATS)}")
    try:
        rows = _READERS[file.suffix](file)
    except _BrokenLine as broken:
        raise InputError(f"{key}={path}: line {broken.line}: {broken}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{key}={path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not rows:
        raise InputError(f"{key}={path}: holds no rows")
    return rows


class _BrokenLine(ValueError):
    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def _read_jsonl(file: Path) -> list[Row]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _BrokenLine(number, f"not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise _BrokenLine(number, "not a JSON object")
            rows.append(row)
    return rows


def _read_json(file: Path) -> list[Row]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _BrokenLine(error.lineno, f"not JSON ({error.msg})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not a list of JSON objects")
    return rows


def _read_table(file: Path) -> list[Row]:
    tabs = file.suffix == ".tsv"
    with file.open(encoding="utf-8", newline="") as text:
        # Tab-separated files as published (GLUE) do not quote; a lone " in them is a character.
        options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
        reader = csv.DictReader(text, restkey="", **options)
        rows = []
        try:
            for row in reader:
                if "" in row or None in row.values():
                    raise _BrokenLine(reader.line_num, f"not {len(reader.fieldnames or [])} columns")
                rows.append(row)
        except csv.Error as error:
            raise _BrokenLine(reader.line_num, str(error)) from None
    return rows


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow.parquet

    rows: list[Row] = pyarrow.parquet.read_table(file).to_pylist()
    return rows


def _read_text(file: Path) -> list[Row]:
    """Paragraphs, which empty lines part."""
    paragraphs = file.read_text(encoding="utf-8").split("\n\n")
    return [{"text": paragraph.strip()} for paragraph in paragraphs if paragraph.strip()]


_READERS = {
    ".txt": _read_text,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}


def hub_rows(hub: str, config: str | None, split: str, revision: str | None, key: str) -> list[Row]:
    """The rows of a hub dataset, through its cache; needs the network the first time."""
    import datasets

    try:
        loaded = datasets.load_dataset(hub, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # no network, no such dataset, no such split
        reason = str(error).splitlines()[0]
        raise InputError(f"{key}={hub}: cannot be loaded ({reason}); local rows can be given instead") from error
    return [dict(row) for row in loaded]


@dataclass
class Rows:
    """The rows of a dataset by what they are for."""

    train: list[Row]
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)  # of the training rows, by reason

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A hash of each part's content, whatever file it came from."""
        return {part: fingerprint(getattr(self, part)) for part in ("train", "validation", "test")}


def load_rows(dataset: DatasetConfig, *, validation: bool = False) -> Rows:
    """The dataset's rows; test rows are never training rows, and validation rows never test rows.

    A training row whose prompt is that of a test row is left out. With ``validation`` true, up to
    ``validation_samples`` rows (at most a tenth) leave the training rows.

    Raises:
        InputError: a file or a hub dataset cannot be read, or nothing is left to train on.
    """
    train, test = _train_and_test(dataset)
    train, left_out = _clean(dataset, train, test)
    shuffle = random.Random(dataset.split_seed)
    if dataset.samples is not None and dataset.samples < len(train):
        train = shuffle.sample(train, dataset.samples)
    held_out = min(dataset.validation_samples, len(train) // 10) if validation else 0
    if validation and not held_out:
        raise InputError(f"train.eval_every: {len(train)} training rows are too few to hold out validation rows")
    if held_out:
        train = shuffle.sample(train, len(train))
    return Rows(train=train[held_out:], validation=train[:held_out], test=test, left_out=left_out)


def _clean(dataset: DatasetConfig, train: list[Row], test: list[Row]) -> tuple[list[Row], dict[str, int]]:
    """Training rows without those that are tested on, are too long, or (if so wished) come twice; and their numbers."""
    try:
        tested = questions(dataset_examples(dataset, test))
    except InputError:
        tested = set()  # of other columns, which the evaluation has a template for
    seen: set[tuple[str, str]] = set()
    kept = []
    left_out = {"tested_rows": 0, "long_rows": 0, "duplicate_rows": 0}
    for row, example in zip(train, dataset_examples(dataset, train), strict=True):
        again = example[:2] in seen
        seen.add(example[:2])
        left_out["duplicate_rows"] += again
        if question(example) in tested:
            left_out["tested_rows"] += 1
        elif dataset.max_characters and len(example.prompt) + len(example.answer) > dataset.max_characters:
            left_out["long_rows"] += 1
        elif not (again and dataset.deduplicate):
            kept.append(row)
    if not kept:
        raise InputError(f"dataset: none of {len(train)} training rows is left ({left_out})")
    return kept, left_out


def questions(examples: Iterable[Example]) -> set[str]:
    """What the examples ask."""
    return {question(example) for example in examples}


def question(example: Example) -> str:
    """What two examples that ask the same have in common: the prompt (or text), but for case and white space."""
    return " ".join((example.prompt if example.prompt.strip() else example.answer).split()).lower()


def _train_and_test(dataset: DatasetConfig) -> tuple[list[Row], list[Row]]:
    if dataset.generator is not None and dataset.path is None:
        make: Any = pydoc.locate(dataset.generator)
        if not callable(make):
            raise InputError(f"dataset.generator={dataset.generator}: no such function")
        count = dataset.samples or 1000
        return make("train", count, dataset.split_seed), make("test", GENERATED_TEST_ROWS, dataset.split_seed)
    if dataset.path is not None:
        train = read_rows(dataset.path, "dataset.path")
        # Here, in the file's own order, an error can name the row.
        dataset_examples(dataset, train, dataset.path)
    elif dataset.hub is not None:
        train = hub_rows(dataset.hub, dataset.hub_config, dataset.hub_split, dataset.revision, "dataset.hub")
    else:
        raise InputError(f"dataset.path: dataset={dataset.name} needs the file of its training rows")
    if dataset.test_path is not None:
        return train, read_rows(dataset.test_path, "dataset.test_path")
    if dataset.hub is not None and dataset.path is None and dataset.hub_test_split is not None:
        test = hub_rows(dataset.hub, dataset.hub_config, dataset.hub_test_split, dataset.revision, "dataset.hub")
        return train, test
    order = random.Random(dataset.split_seed).sample(train, len(train))
    cut = round(len(order) * dataset.train_fraction)
    if not 0 < cut < len(order):
        raise InputError(
            f"dataset.train_fraction={dataset.train_fraction}: parts {len(order)} rows into {cut} training and "
            f"{len(order) - cut} test rows; both need at least one (or give dataset.test_path)"
        )
    return order[:cut], order[cut:]


def evaluation_rows(source: RowsConfig, key: str, own: Sequence[Row]) -> list[Row]:
    """The rows an evaluation named ``key`` judges on: its own file, its hub dataset, or the dataset's test rows."""
    if source.path is not None:
        rows = read_rows(source.path, f"{key}.path")
    elif source.hub is not None:
        rows = hub_rows(source.hub, source.hub_config, source.hub_split, source.revision, f"{key}.hub")
    else:
        rows = list(own)
    return rows[: source.samples]


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of the rows' content."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


# ---- examples --------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """One of the answers a question offers, with the prompt before it (most often that of all)."""

    prompt: str
    answer: str
    label: str  # the answer without the template
    text: str  # what the label stands for


class Example(NamedTuple):
    """A row as the model sees it."""

    prompt: str
    answer: str
    choices: tuple[Choice, ...] = ()
    gold: int | None = None  # the number of the right one


def examples(
    rows: Iterable[Row],
    prompt: str,
    answer: str,
    key: str = "dataset",
    file: str = "",
    classes: Sequence[str] = (),
    reader: str | None = None,
) -> list[Example]:
    """Fill the templates, such as ``"{question}"``, from each row's columns; errors name ``key`` and ``file``.

    With ``classes``, an answer must be one of them or its number, which is replaced by its name. A
    ``reader`` makes questions with choices of the rows; the templates are then filled for each choice too.

    Raises:
        InputError: a template names a column that a row lacks, or is not a template; an answer is no class.
    """
    read = find_reader(reader, key)
    made = []
    for n, row in enumerate(rows, start=1):
        number = f"{n} of {file}" if file else f"{n}"
        if read:
            row = _read(read, row, f"{key}.reader", number)
        said = _fill(answer, row, f"{key}.answer", number)
        if classes:
            said = _class_name(said, classes, f"{key}.answer", number)
        choices = tuple(
            Choice(
                _fill(prompt, row | choice, f"{key}.prompt", number),
                _fill(answer, row | choice, f"{key}.answer", number),
                choice["answer"],
                choice.get("text", choice["answer"]),
            )
            for choice in (row["choices"] if read and "gold" in row else ())
        )
        made.append(
            Example(_fill(prompt, row, f"{key}.prompt", number), said, choices, row.get("gold") if read else None)
        )
    return made


def dataset_examples(dataset: DatasetConfig, rows: Iterable[Row], file: str = "") -> list[Example]:
    """``rows`` by the dataset's own templates."""
    templates = dataset.prompt, dataset.answer
    return examples(rows, *templates, file=file, classes=dataset.classes, reader=dataset.reader)


def find_reader(name: str | None, key: str = "dataset") -> Callable[[Row], Row] | None:
    """The function that a dotted path names; None for none.

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
    except KeyError as error:
        column = str(error.args[0])
        raise InputError(f"{key}: row {number} has no column '{column}'; {suggest(column, list(row))}") from None
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{key}: row {number} cannot be read: {error}") from None


def _class_name(answer: str, classes: Sequence[str], key: str, number: str) -> str:
    name = answer.strip()
    if name not in classes:
        if not name.isdecimal() or int(name) >= len(classes):
            raise InputError(f"{key}: row {number} is '{name}', which is no class; dataset.classes={[*classes]}")
        name = classes[int(name)]
    return answer.replace(answer.strip(), name) if answer.strip() else name


def _fill(template: str, row: Row, key: str, number: str) -> str:
    try:
        return template.format_map(row)
    except KeyError as error:
        column = str(error.args[0])
        raise InputError(f"{key}: row {number} has no column '{column}'; {suggest(column, list(row))}") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{key}='{template}': not a template ({error}); write {{{{ for a brace") from None


def through_chat_template(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]) -> list[Example]:
    """The same examples with their prompts as a user's turn (or, in JSON, a list of turns) and the assistant's begun.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError("dataset.chat=true: the model's tokenizer has no chat template")

    def turn(prompt: str) -> str:
        turns = json.loads(prompt) if prompt.startswith('[{"role"') else [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return str(text).removeprefix(tokenizer.bos_token or "")  # which the tokenizer adds by itself

    return [
        row._replace(prompt=turn(row.prompt), choices=tuple(c._replace(prompt=turn(c.prompt)) for c in row.choices))
        for row in rows
    ]


class Tokens(NamedTuple):
    """An example in token ids; those from ``answer_start`` on are the answer and its end mark.

    For a classifier all of them are the prompt, and the answer is ``label``, the number of its class.
    """

    ids: list[int]
    answer_start: int
    label: int | None = None

    @property
    def answer_tokens(self) -> int:
        """How many predictions the loss is over: the answer's tokens, or the one class."""
        return len(self.ids) - max(self.answer_start, 1) if self.label is None else 1


def tokenize(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int) -> list[Tokens]:
    """Prompt and answer are tokenised apart, so that the answer's tokens never depend on the border.

    What is longer than ``max_length`` loses the beginning of its prompt; only an answer that is
    too long by itself loses its end.
    """
    max_length = min(max_length, tokenizer.model_max_length)
    prompts = tokenizer([row.prompt for row in rows]).input_ids
    answers = tokenizer([row.answer for row in rows], add_special_tokens=False).input_ids
    tokens = []
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = [*answer, tokenizer.eos_token_id][: max_length - 1]
        prompt = prompt[max(0, len(prompt) + len(answer) - max_length) :]
        tokens.append(Tokens(prompt + answer, len(prompt)))
    return tokens


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int
) -> list[Tokens]:
    """A context and what may follow it, tokenised as one text, as lm-evaluation-harness does; no end mark.

    White space at the end of a context counts to what follows.
    """
    limit = min(max_length, tokenizer.model_max_length)
    contexts = [context.rstrip() for context, _ in pairs]
    starts = [len(ids) for ids in tokenizer(contexts).input_ids]
    wholes = tokenizer([context + following for context, following in pairs]).input_ids
    rows = []
    for ids, start in zip(wholes, starts, strict=True):
        cut = max(0, len(ids) - limit)
        rows.append(Tokens(ids[cut:], max(start - cut, 1)))
    return rows


def tokenize_for_classes(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int, classes: Sequence[str]
) -> list[Tokens]:
    """Prompts as a classifier reads them, with the tokenizer's marks around them, and the number of their class.

    What is longer than ``max_length`` loses its end.
    """
    limit = min(max_length, tokenizer.model_max_length)
    ids = tokenizer([row.prompt for row in rows], truncation=True, max_length=limit).input_ids
    return [
        Tokens(prompt, len(prompt), classes.index(row.answer.strip())) for prompt, row in zip(ids, rows, strict=True)
    ]


def write_tokens(file: Path, rows: Sequence[Tokens]) -> None:
    """Keep tokenised rows as a parquet, atomically."""
    import pyarrow as pa
    import pyarrow.parquet

    columns = zip(*rows, strict=True) if rows else ((), (), ())
    kinds = (pa.list_(pa.int32()), pa.int32(), pa.int32())
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    pa.parquet.write_table(pa.table(arrays, names=Tokens._fields), temporary)
    temporary.replace(file)


def read_tokens(file: Path) -> list[Tokens]:
    """What ``write_tokens`` kept."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    return [Tokens(*row) for row in zip(*(table[name].to_pylist() for name in Tokens._fields), strict=True)]


# ---- batches ---------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Right-padded tokens.

    Shapes: ``input_ids`` and ``attention_mask`` are [rows, length], of int64. ``answer_mask``
    is [rows, length - 1], bool: whether the token *after* a position belongs to an answer.
    ``labels`` are a classifier's, [rows], of int64.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_mask: torch.Tensor
    tokens: int  # without padding
    answer_tokens: int
    answer_start: int  # the first position of any answer in the batch, at least 1
    labels: torch.Tensor | None = None

    @property
    def owners(self) -> torch.Tensor:
        """The row that each predicted answer token (or class) belongs to: [answer_tokens], of int64."""
        if self.labels is not None:
            return self.labels.new_ones(len(self.labels)).cumsum(0) - 1
        return self.answer_mask.nonzero()[:, 0]

    def repeated(self, times: int) -> Batch:
        """All rows that many times, one after the other."""
        return replace(
            self,
            input_ids=self.input_ids.repeat(times, 1),
            attention_mask=self.attention_mask.repeat(times, 1),
            answer_mask=self.answer_mask.repeat(times, 1),
            tokens=self.tokens * times,
            answer_tokens=self.answer_tokens * times,
            labels=None if self.labels is None else self.labels.repeat(times),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; the host does not wait for the copy."""
        if device.type == "cpu":
            return self
        names = ("input_ids", "attention_mask", "answer_mask", "labels")
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{n: t.pin_memory().to(device, non_blocking=True) for n, t in tensors.items()})


def collate(rows: Sequence[Tokens], pad_id: int, multiple: int = 1) -> Batch:
    """Pad ``rows`` on the right to the longest of them, or to the next length that ``multiple`` divides."""
    import torch

    length = math.ceil(max(len(row.ids) for row in rows) / multiple) * multiple
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attention = torch.zeros((len(rows), length), dtype=torch.int64)
    answers = torch.zeros((len(rows), length - 1), dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
        attention[n, : len(row.ids)] = 1
        answers[n, max(row.answer_start, 1) - 1 : len(row.ids) - 1] = True
    labels = [row.label for row in rows if row.label is not None]
    return Batch(
        ids,
        attention,
        answers,
        tokens=sum(len(row.ids) for row in rows),
        answer_tokens=sum(row.answer_tokens for row in rows),
        answer_start=max(min(row.answer_start for row in rows), 1),
        labels=torch.tensor(labels) if labels else None,
    )


def batch_order(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers, each epoch shuffled anew, rows of like length together.

    Buckets of ``BUCKET_BATCHES`` batches are sorted by length and their batches shuffled again, so
    that padding is small and no epoch begins with all short rows. An epoch's last batch may be smaller.
    """
    shuffle = random.Random(seed)
    while True:
        order = shuffle.sample(range(len(lengths)), len(lengths))
        bucket = BUCKET_BATCHES * batch_size
        epoch = []
        for start in range(0, len(order), bucket):
            rows = sorted(order[start : start + bucket], key=lambda n: lengths[n])
            epoch += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        shuffle.shuffle(epoch)
        yield from epoch
