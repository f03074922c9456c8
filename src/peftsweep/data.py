"""Rows -> examples -> batches.

A row is a dict of a file's columns; an example is its prompt and answer; tokens are an example in
the model's vocabulary; a batch is right-padded tokens as tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import pydoc
import random
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftsweep import chat, hub
from peftsweep.atomic import replacing
from peftsweep.chat import ChatTemplate, Conversation, Rendered
from peftsweep.errors import InputError, suggest
from peftsweep.files import FORMATS as FORMATS
from peftsweep.files import Row as Row
from peftsweep.files import plain_rows
from peftsweep.files import read_rows as read_rows
from peftsweep.reading import Unreadable
from peftsweep.schema import DatasetConfig, OnMissing, RowsConfig, Turns

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

GENERATED_TEST_ROWS = 1000
BUCKET_BATCHES = 20  # batches sorted by length together: little padding, and the order stays random


# ---- rows ------------------------------------------------------------------------------------------


def hub_rows(name: str, config: str | None, split: str, revision: str | None, key: str) -> list[Row]:
    """The rows of a hub dataset, through its cache; needs the network the first time.

    Raises:
        InputError: it cannot be loaded.
    """
    import datasets

    with hub.loading(f"{key}={name}", "local rows"):  # no network, no such dataset, no such split
        loaded = datasets.load_dataset(name, config, split=split, revision=revision)
    return plain_rows(loaded)


@lru_cache
def check_cached(name: str, config: str | None, revision: str | None, key: str) -> None:
    """Where the hub does not answer: that the dataset is in the local cache.

    Raises:
        InputError: it is not.
    """
    if hub.problem() is None:
        return
    import datasets

    with hub.loading(f"{key}={name}", "local rows"):
        datasets.load_dataset_builder(name, config, revision=revision)


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

    A training row with the prompt and answer of a test row is left out, unless ``leave_out_tested`` is
    false. With ``validation`` true, up to ``validation_samples`` rows (at most a tenth) leave the training rows,
    unless ``validation`` names a source of them.

    Raises:
        InputError: a file or a hub dataset cannot be read, or nothing is left to train on.
    """
    train, test, missing = _train_and_test(dataset)
    train, left_out = _clean(dataset, train, test)
    if dataset.missing is OnMissing.drop:
        left_out["missing_rows"] = missing
    shuffle = random.Random(dataset.split_seed)
    if dataset.samples is not None and dataset.samples < len(train):
        train = shuffle.sample(train, dataset.samples)
    if validation and (dataset.validation.path or dataset.validation.hub):
        return Rows(train=train, validation=validation_rows(dataset), test=test, left_out=left_out)
    held_out = min(dataset.validation_samples, len(train) // 10) if validation else 0
    if validation and not held_out:
        raise InputError(f"train.eval_every: {len(train)} training rows are too few to hold out validation rows")
    if held_out:
        train = shuffle.sample(train, len(train))
    return Rows(train=train[held_out:], validation=train[:held_out], test=test, left_out=left_out)


def validation_rows(dataset: DatasetConfig) -> list[Row]:
    """``validation_samples`` rows of the source that ``validation`` names, with the dataset's columns beside their own.

    With ``split_seed=0`` they are the rows that PEFT's comparison takes (the first of NumPy's legacy shuffle).

    Raises:
        InputError: the source cannot be read, or lacks a column.
    """
    import numpy

    own = dataset.validation
    where = RowsConfig(own.path, own.encoding, own.hub, own.hub_config, own.hub_split, own.revision)
    read = evaluation_rows(where, "dataset.validation", [])
    for column in own.columns.values():
        if any(column not in row for row in read):
            raise InputError(f"dataset.validation.columns: a row has no '{column}'; {suggest(column, list(read[0]))}")
    order = numpy.random.RandomState(dataset.split_seed).permutation(len(read))[: dataset.validation_samples]
    rows = [read[n] | {mine: read[n][theirs] for mine, theirs in own.columns.items()} for n in order]
    if not rows:
        raise InputError("dataset.validation: its source has no rows")
    dataset_examples(dataset, rows, own.path or own.hub or "")  # the templates must fit them too
    return rows


def _clean(dataset: DatasetConfig, train: list[Row], test: list[Row]) -> tuple[list[Row], dict[str, int]]:
    """Training rows without those that are tested on, are too long, or (if so wished) come twice; and their numbers."""
    try:
        known = dataset_examples(replace(dataset, missing=OnMissing.drop), test)
        tested = {example.written for example in known}
    except InputError:
        tested = set()  # of other columns, which the evaluation has a template for
    seen: set[tuple[str, str]] = set()
    kept = []
    left_out = {"tested_rows": 0, "long_rows": 0, "duplicate_rows": 0}
    for row, example in zip(train, dataset_examples(dataset, train), strict=True):
        again = example.written in seen
        seen.add(example.written)
        left_out["duplicate_rows"] += again
        left_out["tested_rows"] += example.written in tested
        if dataset.leave_out_tested and example.written in tested:
            continue
        if dataset.max_characters and len(example.prompt) + len(example.answer) > dataset.max_characters:
            left_out["long_rows"] += 1
        elif not (again and dataset.deduplicate):
            kept.append(row)
    if not kept:
        raise InputError(f"dataset: none of {len(train)} training rows is left ({left_out})")
    return kept, left_out


def _train_and_test(dataset: DatasetConfig) -> tuple[list[Row], list[Row], int]:
    """Training rows, test rows, and how many of the former were left out for a missing value."""
    if dataset.generator is not None and dataset.path is None:
        make: Any = pydoc.locate(dataset.generator)
        if not callable(make):
            raise InputError(f"dataset.generator={dataset.generator}: no such function")
        try:
            train = make("train", dataset.samples or 1000, dataset.split_seed)
        except TypeError as error:
            said = f"dataset.generator={dataset.generator}"
            raise InputError(f"{said}: must be a function of split, count and seed ({error})") from error
        if dataset.test_path is not None:
            return train, read_rows(dataset.test_path, "dataset.test_path", dataset.encoding), 0
        return train, make("test", GENERATED_TEST_ROWS, dataset.split_seed), 0
    if dataset.path is not None:
        read = read_rows(dataset.path, "dataset.path", dataset.encoding)
    elif dataset.hub is not None:
        read = hub_rows(dataset.hub, dataset.hub_config, dataset.hub_split, dataset.revision, "dataset.hub")
    else:
        raise InputError(f"dataset.path: dataset={dataset.name} needs the file of its training rows")
    # Here, in the file's own order, an error can name the row.
    made = templates(dataset, dataset.path or "").each(read)
    train = [row for row, example in zip(read, made, strict=True) if example]
    missing = len(read) - len(train)
    if dataset.test_path is not None:
        return train, read_rows(dataset.test_path, "dataset.test_path", dataset.encoding), missing
    if dataset.hub is not None and dataset.path is None and dataset.hub_test_split is not None:
        test = hub_rows(dataset.hub, dataset.hub_config, dataset.hub_test_split, dataset.revision, "dataset.hub")
        return train, test, missing
    order = random.Random(dataset.split_seed).sample(train, len(train))
    cut = round(len(order) * dataset.train_fraction)
    if not 0 < cut < len(order):
        raise InputError(
            f"dataset.train_fraction={dataset.train_fraction}: parts {len(order)} rows into {cut} training and "
            f"{len(order) - cut} test rows; both need at least one (or give dataset.test_path)"
        )
    return order[:cut], order[cut:], missing


def evaluation_rows(source: RowsConfig, key: str, own: Sequence[Row]) -> list[Row]:
    """The rows an evaluation named ``key`` judges on: its own file, its hub dataset, or the dataset's test rows."""
    if source.path is not None:
        rows = read_rows(source.path, f"{key}.path", source.encoding)
    elif source.hub is not None:
        rows = hub_rows(source.hub, source.hub_config, source.hub_split, source.revision, f"{key}.hub")
    else:
        rows = list(own)
    return rows[: source.samples]


def set_aside(rows: Sequence[Row], count: int, seed: int, key: str) -> tuple[list[Row], list[Row]]:
    """Up to ``count`` rows of an evaluation (at most a half) to validate on, and those that are left to judge on.

    Raises:
        InputError: there are too few.
    """
    numbers = set(random.Random(seed).sample(range(len(rows)), min(count, len(rows) // 2)))
    if not numbers:
        raise InputError(f"{key}: {len(rows)} rows are too few to set some aside for validation")
    parts = [[row for n, row in enumerate(rows) if (n in numbers) is chosen] for chosen in (True, False)]
    return parts[0], parts[1]


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
    conversation: Conversation | None = None  # which prompt and answer are of, as JSON and as the last turn
    rendered: Rendered | None = None  # in tokens, by a chat template

    @property
    def written(self) -> tuple[str, str]:
        """Prompt and answer before any chat template: what makes two examples the same."""
        if self.rendered:
            return self.rendered.written
        return self.conversation.written if self.conversation else (self.prompt, self.answer)

    @property
    def asked(self) -> str:
        """The prompt; one that a chat template rendered, with all its special tokens as text."""
        return self.rendered.prompt if self.rendered else self.prompt


class MissingValue(InputError):
    """A row has no value for a column that it needs."""


@dataclass(frozen=True)
class Templates:
    """How rows become examples: templates over a row's columns, such as ``"{question}"``.

    Lists and dicts are written as JSON. With ``classes``, an answer must be one of them or its number, which is
    replaced by its name. A ``reader`` makes questions with choices, or conversations, of the rows; the templates
    are then filled for each choice too. Errors name ``key`` and ``file``.
    """

    prompt: str
    answer: str
    key: str = "dataset"
    file: str = ""
    classes: Sequence[str] = ()
    reader: str | None = None
    missing: OnMissing = OnMissing.error

    def each(self, rows: Iterable[Row]) -> Iterator[Example | None]:
        """The example of each row; None for one without a value that it needs, where ``missing`` is drop.

        Raises:
            InputError: a template names a column that a row lacks, or is not a template; an answer is no class;
                a value is missing; a text holds half a surrogate pair.
        """
        read = find_reader(self.reader, self.key)
        for n, row in enumerate(rows, start=1):
            number = f"{n} of {self.file}" if self.file else f"{n}"
            try:
                yield self._example(_Row(row, self.missing), number, read)
            except MissingValue:
                if self.missing is not OnMissing.drop:
                    raise
                yield None

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
    """The examples of ``rows`` by ``Templates``, without rows that are left out for a missing value."""
    each = Templates(prompt, answer, key, file, classes, reader, missing).each(rows)
    return [example for example in each if example]


def _conversation_example(conversation: Conversation, how: Templates, number: str) -> Example:
    if (how.prompt, how.answer) != ("{prompt}", "{answer}"):
        raise InputError(
            f"{how.key}.prompt: a conversation is not put into templates; must be {{prompt}} and {{answer}}"
        )
    messages = []
    for n, message in enumerate(conversation.messages):
        if message.get("content") is None and not chat.says_something_else(message):
            if how.missing is not OnMissing.empty:
                raise _missing(f"{how.key}.reader", number, f"messages[{n}].content")
            message = message | {"content": ""}
        messages.append(message)
    conversation = conversation._replace(messages=messages)
    for text in (conversation.prompt, conversation.answer):
        _check_encodable(text, f"{how.key}.reader", number)
    return Example(conversation.prompt, conversation.answer, conversation=conversation)


def dataset_examples(dataset: DatasetConfig, rows: Iterable[Row], file: str = "") -> list[Example]:
    """``rows`` by the dataset's own templates, without those that are left out for a missing value."""
    return [example for example in templates(dataset, file).each(rows) if example]


def templates(dataset: DatasetConfig, file: str = "") -> Templates:
    """The dataset's own, which fill in the rows of ``file``."""
    own = dataset
    return Templates(own.prompt, own.answer, file=file, classes=own.classes, reader=own.reader, missing=own.missing)


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
    except _NoValue as error:
        raise _missing(key, number, str(error)) from None
    except KeyError as error:
        column = str(error.args[0])
        raise InputError(f"{key}: row {number} has no column '{column}'; {suggest(column, list(row))}") from None
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{key}: row {number} cannot be read: {error}") from None


def _class_name(answer: str, classes: Sequence[str], key: str, number: str) -> str:
    name = answer.strip()
    if name not in classes:
        if not name.isdecimal() or int(name) >= len(classes):
            raise InputError(f"{key}: row {number} is '{name}', which is no class; dataset.classes={[*classes]}")
        name = classes[int(name)]
    return answer.replace(answer.strip(), name) if answer.strip() else name


class _NoValue(Exception):
    """A column is null."""


class _Row(Row):
    """A row that does not give out null: it is missing, or an empty text where ``missing`` says so."""

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
    """Fills templates as ``str.format`` does, but for nulls inside a column's value, and lists and dicts, as JSON."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        if value is None:
            raise _NoValue(field_name)
        return value, first

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, bytes):
            raise TypeError("it holds bytes, not text")
        if isinstance(value, list | dict):
            value = json.dumps(value, ensure_ascii=False, default=str)
        return str(super().format_field(value, format_spec))


@lru_cache(maxsize=64)
def _columns(template: str) -> tuple[str, ...]:
    """The columns that a template names."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return tuple(re.split(r"[.\[]", name)[0] for name in names)


def _fill(template: str, row: _Row, key: str, number: str) -> str:
    try:
        plain = all(type(row.get(name)) is str for name in _columns(template))
        text = template.format_map(row) if plain else _Formatter().vformat(template, (), row)
    except _NoValue as error:
        raise _missing(key, number, str(error)) from None
    except KeyError as error:
        column = str(error.args[0])
        raise InputError(f"{key}: row {number} has no column '{column}'; {suggest(column, list(row))}") from None
    except TypeError as error:
        raise InputError(f"{key}='{template}': row {number} cannot be written into it: {error}") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{key}='{template}': not a template ({error}); write {{{{ for a brace") from None
    _check_encodable(text, key, number)
    return text


def _missing(key: str, number: str, column: str) -> MissingValue:
    ways = "dataset.missing=drop leaves such rows out, dataset.missing=empty takes an empty text"
    return MissingValue(f"{key}: row {number} has no value for '{column}' (null or NaN); {ways}")


def _check_encodable(text: str, key: str, number: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"{key}: row {number} holds {half}, half a surrogate pair, which no tokenizer takes") from None


# ---- tokens ----------------------------------------------------------------------------------------


def through_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    *,
    chat_template: bool = True,
    turns: Turns = Turns.all,
    key: str = "dataset",
    file: str = "",
) -> list[Example]:
    """The same examples as the tokenizer's chat template renders them, with the prompt of their last turn as text.

    An example that is no conversation is one of a user's turn, its prompt, and the assistant's, its answer. Without
    ``chat_template`` conversations are laid out plainly (``chat.PLAIN``) and other examples stay as they are.

    Raises:
        InputError: the tokenizer has no chat template or gives no offsets, or the template refuses a row.
    """
    if not chat_template and not any(row.conversation for row in rows):
        return list(rows)
    if chat_template and not tokenizer.chat_template:
        raise InputError("dataset.chat=true: the model's tokenizer has no chat template")
    if not tokenizer.is_fast:
        raise InputError("dataset.chat: the model's tokenizer gives no offsets; must be one of the tokenizers library")
    begin = str(tokenizer.decode([*lead(tokenizer)]))
    template = ChatTemplate(tokenizer) if chat_template else chat.plain_layout(tokenizer, begin)
    return [
        _rendered(template, begin, row, turns, f"{key}: row {n} of {file}" if file else f"{key}: row {n}")
        for n, row in enumerate(rows, start=1)
    ]


def _rendered(template: ChatTemplate, begin: str, row: Example, turns: Turns, where: str) -> Example:
    def asking(prompt: str) -> Conversation:
        return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": row.answer}])

    try:
        if not row.conversation and not row.prompt.strip():
            raise ValueError("its prompt is empty, which is no user's turn")
        conversation = row.conversation or asking(row.prompt)
        rendered = chat.render(template, conversation, turns, row.written)
        choices = tuple(c._replace(prompt=chat.prompt(template, asking(c.prompt))) for c in row.choices)
    except Exception as error:  # a template may raise anything
        raise InputError(f"{where} does not go through the chat template: {' '.join(str(error).split())}") from error
    answer = rendered.said if "tool_calls" in conversation.messages[-1] else row.answer
    return row._replace(prompt=rendered.prompt.removeprefix(begin), answer=answer, choices=choices, rendered=rendered)


def lead(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The marks that the tokenizer puts before a text, such as BOS; those after it are not for a prompt."""
    plain, marked = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    starts = range(len(marked) - len(plain) + 1)
    return tuple(next((marked[:n] for n in starts if marked[n : n + len(plain)] == plain), ()))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Example], max_length: int = sys.maxsize
) -> list[list[int]]:
    """Prompts as the model goes on from them, at least a token each; a longer one loses its beginning, but for BOS."""
    marks = list(lead(tokenizer))
    encoded = []
    for prompt in prompts:
        row = Example(prompt, "") if isinstance(prompt, str) else prompt
        before = [] if row.rendered else marks
        ids = [*before, *tokenizer(row.asked, add_special_tokens=False).input_ids] or [_first(tokenizer)]
        kept = _kept(ids, marks, tokenizer.bos_token_id)
        encoded.append(ids if len(ids) <= max_length else ids[:kept] + ids[len(ids) - max_length + kept :])
    return encoded


def _first(tokenizer: PreTrainedTokenizerBase) -> int:
    """What an empty text begins with: BOS, else the end mark of the text before, as lm-evaluation-harness has it."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def _kept(ids: Sequence[int], marks: Sequence[int], bos: int | None) -> int:
    """How many tokens at the beginning stay when ``ids`` are cut: the marks before a text, or a template's BOS."""
    if marks and [*ids[: len(marks)]] == [*marks]:
        return len(marks)
    return int(bool(ids) and ids[0] == bos)


class Tokens(NamedTuple):
    """An example in token ids; those from ``answer_start`` on are the answer and its end mark.

    For a classifier all of them are the prompt, and the answer is ``label``, the number of its class. Where not
    all tokens from ``answer_start`` on are the answer's, ``trained`` says of each token whether it is: [tokens].
    ``lost_prompt`` and ``lost_answer`` count the tokens that were cut off to fit into the length: at the beginning of
    the prompt (for a classifier at its end), and at the end of the answer.
    """

    ids: list[int]
    answer_start: int
    label: int | None = None
    trained: list[bool] | None = None
    lost_prompt: int = 0
    lost_answer: int = 0

    @property
    def answer_tokens(self) -> int:
        """How many predictions the loss is over: the answer's tokens, or the one class."""
        if self.label is not None:
            return 1
        return len(self.ids) - max(self.answer_start, 1) if self.trained is None else sum(self.trained[1:])


def truncations(rows: Sequence[Tokens]) -> dict[str, int]:
    """How many rows have lost a part of their prompt, and how many of their answer."""
    return {
        "truncated_prompts": sum(row.lost_prompt > 0 for row in rows),
        "truncated_answers": sum(row.lost_answer > 0 for row in rows),
    }


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int, *, whole: bool = False
) -> list[Tokens]:
    """Prompt and answer are tokenised apart, so that the answer's tokens never depend on the border.

    What is longer than ``max_length`` loses the beginning of its prompt, but for BOS; only an answer that is too
    long by itself loses its end. An example that a chat template rendered is the template's tokens. With ``whole``
    all tokens are the answer's, those of the prompt too, and what is too long loses its end.
    """
    limit = min(max_length, tokenizer.model_max_length)
    marks = list(lead(tokenizer))
    apart = iter(_apart(tokenizer, marks, [row for row in rows if not row.rendered]))
    found = [(row.rendered.ids, row.rendered.trained) if row.rendered else next(apart) for row in rows]
    if whole:
        return [Tokens(ids[:limit], 0, lost_answer=max(len(ids) - limit, 0)) for ids, _ in found]
    return [_shortened(ids, trained, _kept(ids, marks, tokenizer.bos_token_id), limit) for ids, trained in found]


def _apart(
    tokenizer: PreTrainedTokenizerBase, marks: list[int], rows: Sequence[Example]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Each row's prompt and answer in tokens, and whether each of them is the answer's."""
    if not rows:
        return
    prompts = tokenizer([row.prompt for row in rows], add_special_tokens=False).input_ids
    answers = tokenizer([row.answer for row in rows], add_special_tokens=False).input_ids
    for prompt, answer in zip(prompts, answers, strict=True):
        asked, said = [*marks, *prompt], [*answer, tokenizer.eos_token_id]
        yield asked + said, [False] * len(asked) + [True] * len(said)


def _shortened(ids: list[int], trained: list[bool], kept: int, limit: int) -> Tokens:
    """At most ``limit`` tokens: the first ``kept`` and the last, among them the last answer as far as it fits."""
    lost_prompt = lost_answer = 0
    if (surplus := len(ids) - limit) > 0:
        if limit < max(kept, 1) + 1:
            raise InputError(f"max_length={limit}: leaves no room for an answer; must be at least {max(kept, 1) + 1}")
        end = len(trained) - trained[::-1].index(True)
        start = next((n + 1 for n in range(end - 1, -1, -1) if not trained[n]), 0)  # of the last answer
        first = min(kept + surplus, max(start, 1) - (kept == 0))
        places = [*range(kept), *range(max(first, kept), len(ids))][:limit]
        lost_answer = len(ids) - 1 - places[-1]
        lost_prompt = surplus - lost_answer
        ids, trained = [ids[n] for n in places], [trained[n] for n in places]
    start = trained.index(True)
    return Tokens(ids, start, None, None if all(trained[start:]) else trained, lost_prompt, lost_answer)


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int, *, marked: bool = False
) -> list[Tokens]:
    """A context and what may follow it, tokenised as one text, as lm-evaluation-harness does; no end mark.

    White space at the end of a context counts to what follows. ``marked`` contexts hold their special tokens as
    text, as those of a chat template do. A longer pair loses its beginning, but for BOS.
    """
    limit = min(max_length, tokenizer.model_max_length)
    marks = [] if marked else list(lead(tokenizer))
    contexts = [context.rstrip() for context, _ in pairs]
    starts = [len(ids) for ids in tokenizer(contexts, add_special_tokens=False).input_ids]
    wholes = tokenizer([context + following for context, following in pairs], add_special_tokens=False).input_ids
    rows = []
    for whole, length in zip(wholes, starts, strict=True):
        before = marks or ([] if length else [_first(tokenizer)])
        ids, start = [*before, *whole], len(before) + length
        kept = _kept(ids, marks, tokenizer.bos_token_id)
        cut = max(0, len(ids) - limit)
        lost_answer = max(cut - (start - kept), 0)
        short, first = ids[:kept] + ids[kept + cut :], max(start - cut, kept, 1)
        rows.append(Tokens(short, first, lost_prompt=cut - lost_answer, lost_answer=lost_answer))
    return rows


def tokenize_for_classes(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], max_length: int, classes: Sequence[str]
) -> list[Tokens]:
    """Prompts as a classifier reads them, with the tokenizer's marks around them, and the number of their class.

    What is longer than ``max_length`` loses its end.
    """
    limit = min(max_length, tokenizer.model_max_length)
    rendered = any(row.rendered for row in rows)

    def encoded(rows: Sequence[Example], **cut: Any) -> list[list[int]]:
        found: Any = tokenizer([row.asked for row in rows], add_special_tokens=not rendered, **cut)
        return list(found.input_ids)

    found = []
    for row, whole in zip(rows, encoded(rows), strict=True):
        ids = whole if len(whole) <= limit else encoded([row], truncation=True, max_length=limit)[0]
        label = classes.index(row.answer.strip())
        found.append(Tokens(ids, len(ids), label, lost_prompt=len(whole) - len(ids)))
    return found


def write_tokens(file: Path, rows: Sequence[Tokens]) -> None:
    """Keep tokenised rows as a parquet, atomically."""
    import pyarrow as pa
    import pyarrow.parquet

    columns = zip(*rows, strict=True) if rows else ((),) * len(Tokens._fields)
    schema = _tokens_schema()
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    with replacing(file) as temporary:
        pa.parquet.write_table(pa.table(arrays, schema=schema), temporary, write_page_checksum=True)


def _tokens_schema() -> Any:
    import pyarrow as pa

    kinds = (pa.list_(pa.int32()), pa.int32(), pa.int32(), pa.list_(pa.bool_()), pa.int32(), pa.int32())
    return pa.schema(zip(Tokens._fields, kinds, strict=True))


def read_tokens(file: Path, count: int | None = None) -> list[Tokens]:
    """What ``write_tokens`` kept, of ``count`` rows.

    Raises:
        Unreadable: the file holds something else.
    """
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True).read()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise Unreadable(f"{file}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    same = table.schema.equals(_tokens_schema()) and count in (None, table.num_rows)
    if not same or any(table[name].null_count for name in Tokens._fields if name not in ("label", "trained")):
        raise Unreadable(f"{file}: holds other columns or rows than were written")
    return [Tokens(*row) for row in zip(*(table[name].to_pylist() for name in Tokens._fields), strict=True)]


# ---- batches ---------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Right-padded tokens.

    Shapes: ``input_ids`` and ``attention_mask`` are [rows, length], of int64. ``answer_mask``
    is [rows, length - 1], bool: whether the token *after* a position belongs to an answer. ``places``
    are the same positions as numbers, known without waiting for the device: [answer_tokens], of int64, into the
    flattened [rows, length - answer_start] that begins with the position before ``answer_start``.
    ``labels`` are a classifier's, [rows], of int64.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_mask: torch.Tensor
    places: torch.Tensor
    tokens: int  # without padding
    answer_tokens: int
    answer_start: int  # the first position of any answer in the batch, at least 1
    labels: torch.Tensor | None = None

    @property
    def owners(self) -> torch.Tensor:
        """The row that each predicted answer token (or class) belongs to: [answer_tokens], of int64."""
        if self.labels is not None:
            return self.labels.new_ones(len(self.labels)).cumsum(0) - 1
        return self.places // (self.input_ids.shape[1] - self.answer_start)

    @property
    def targets(self) -> torch.Tensor:
        """The answer tokens, in the order of their places: [answer_tokens], of int64."""
        return self.input_ids[:, self.answer_start :].flatten().index_select(0, self.places)

    def repeated(self, times: int) -> Batch:
        """All rows that many times, one after the other."""
        rows, length = self.input_ids.shape
        starts = (self.places.new_ones(times).cumsum(0) - 1) * rows * (length - self.answer_start)
        return replace(
            self,
            input_ids=self.input_ids.repeat(times, 1),
            attention_mask=self.attention_mask.repeat(times, 1),
            answer_mask=self.answer_mask.repeat(times, 1),
            places=(self.places + starts[:, None]).flatten(),
            tokens=self.tokens * times,
            answer_tokens=self.answer_tokens * times,
            labels=None if self.labels is None else self.labels.repeat(times),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; the host does not wait for the copy."""
        if device.type == "cpu":
            return self
        names = ("input_ids", "attention_mask", "answer_mask", "places", "labels")
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
        trained = True if row.trained is None else torch.tensor(row.trained[max(row.answer_start, 1) :])
        answers[n, max(row.answer_start, 1) - 1 : len(row.ids) - 1] = trained
    labels = [row.label for row in rows if row.label is not None]
    start = max(min(row.answer_start for row in rows), 1)
    return Batch(
        ids,
        attention,
        answers,
        places=answers[:, start - 1 :].flatten().nonzero()[:, 0],
        tokens=sum(len(row.ids) for row in rows),
        answer_tokens=sum(row.answer_tokens for row in rows),
        answer_start=start,
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


def micro_batches(steps: Iterable[list[int]], batch_size: int) -> Iterator[list[list[int]]]:
    """The row numbers of each step in micro-batches of ``batch_size``; a step's last one may be smaller.

    Which rows a step takes does not depend on how many micro-batches it has. ``batch_order`` gives them in the order
    of their length, so that micro-batches hold little padding.
    """
    for step in steps:
        yield [step[start : start + batch_size] for start in range(0, len(step), batch_size)]
