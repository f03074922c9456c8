"""Recognise by the names of a file's columns how its rows become prompts and answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peftsweep.data import tasks
from peftsweep.data.conversations import trees
from peftsweep.data.conversations.reader import COLUMNS as CONVERSATIONS
from peftsweep.data.files import Row

# Columns that hold a whole prompt or a whole answer, in small letters. Exactly one of each makes a pair.
QUESTIONS = ("question", "query", "problem")
PROMPTS = ("prompt", "instruction", "input", "source", *QUESTIONS)
ANSWERS = ("completion", "answer", "response", "output", "solution", "target", "summary", "highlights", "translation")
# Columns that no pair of prompt and answer uses. Rows with one of them are not recognised as such a pair.
CONTEXTS = (
    *("context", "contexts", "passage", "paragraph", "document", "documents", "article", "story", "background"),
    *("evidence", "facts", "hint", "table", "schema", "code", "history", "system", "system_prompt"),
    *("choices", "options"),
)
MEANINGFUL = (
    *CONTEXTS,
    *("premise", "hypothesis", "sentence", "sentence1", "sentence2", "label", "labels", "chosen", "rejected"),
    *("image", "images", "audio", "video"),
)
LABELS = ("label", "labels", "class", "category", "sentiment", "target", "intent")
NUMBERS_OF_ROWS = ("", "id", "idx", "index", "key", "no", "nr", "number", "row", "uid", "uuid", "guid", "unnamed: 0")
MAX_CLASSES = 20  # the most distinct values that an example command lists as dataset.classes
READER_ERRORS = (ValueError, KeyError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class Layout:
    """The option of ``dataset`` that fits the rows, and its keys."""

    option: str  # file, chat or text
    keys: Mapping[str, Any] = field(default_factory=dict)
    named: str | None = None  # the shipped dataset with these columns, whose prompt and reader are used


@dataclass(frozen=True)
class _Named:
    """The columns of a shipped dataset, by which its rows are recognised in any file."""

    name: str
    needs: tuple[str, ...]
    may_have: tuple[str, ...] = ()
    fits: Callable[[Row], object] | None = None  # raises or is false for other rows; default: all is text

    def is_of(self, rows: Sequence[Row]) -> bool:
        if any(column not in row for row in rows for column in self.needs):
            return False
        whole = [row for row in rows if all(row[column] is not None for column in self.needs)]
        if self.fits is None:
            return bool(whole) and all(_holds_text(whole, column) for column in self.needs)
        try:
            return bool(whole) and all(self.fits(row) for row in whole)
        except READER_ERRORS:
            return False


def _ends_with_number(row: Row) -> bool:
    return "\n#### " in row["answer"]


def _is_sentiment(row: Row) -> bool:
    """Whether a row may be one of SST-2, whose texts are in small letters; CoLA has the same columns and labels."""
    label = str(row["label"]).strip()
    return label in ("negative", "positive") or (label in ("0", "1") and row["sentence"] == row["sentence"].lower())


# The first one that fits is taken, so those with more columns stand first.
NAMED = (
    _Named("boolq", ("passage", "question"), ("answer", "label", "idx"), tasks.boolq),
    _Named("piqa", ("goal", "sol1", "sol2", "label"), fits=tasks.piqa),
    _Named("social_i_qa", ("context", "question", "answerA", "answerB", "answerC", "label"), fits=tasks.social_i_qa),
    _Named("hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), fits=tasks.hellaswag),
    _Named("winogrande", ("sentence", "option1", "option2", "answer"), fits=tasks.winogrande),
    _Named("commonsense_qa", ("question", "choices", "answerKey", "question_concept"), fits=tasks.commonsense_qa),
    _Named("arc_challenge", ("question", "choices", "answerKey"), fits=tasks.arc),
    _Named("openbookqa", ("question_stem", "choices", "answerKey"), fits=tasks.arc),
    _Named("commonsense_170k", ("instruction", "output", "answer"), ("input",), tasks.instruction),
    _Named("metamath", ("query", "response", "original_question")),
    _Named("gsm8k", ("question", "answer"), fits=_ends_with_number),
    _Named("alpaca", ("instruction", "output"), ("input",)),
    _Named("dolly", ("instruction", "response"), ("context", "category")),
    _Named("dialogsum", ("dialogue", "summary", "topic"), ("id",)),
    _Named("samsum", ("dialogue", "summary"), ("id",)),
    _Named("e2e_nlg", ("meaning_representation", "human_reference")),
    _Named("sst2", ("sentence", "label"), ("idx",), _is_sentiment),
)


def recognise(rows: Sequence[Row]) -> Layout | None:
    """The layout of ``rows`` by their columns; None if no layout or several layouts fit.

    A layout with ``named`` has no keys: that dataset has them.
    """
    columns = _columns(rows)
    if trees.are_messages(rows) or all(trees.is_tree(row) for row in rows) or _are_turns(rows):
        return Layout("chat")
    if any(_holds_turns(rows, column) for column in CONVERSATIONS if column in columns):
        return Layout("chat")
    for one in NAMED:
        if one.is_of(rows):
            used = (*one.needs, *one.may_have)
            return None if _left_out(rows, columns, used) else Layout("file", named=one.name)
    prompts = [column for column in columns if column.strip().lower() in PROMPTS]
    answers = [column for column in columns if column.strip().lower() in ANSWERS]
    if len(prompts) == len(answers) == 1:
        used = (*prompts, *answers)
        plain = all(_holds_text(rows, column) for column in used)
        return _pair(rows, *used) if plain and not _left_out(rows, columns, used) else None
    texts = [column for column in columns if column.strip().lower() == "text"]
    if len(texts) == 1 and not prompts and not answers and _holds_text(rows, texts[0]):
        if _left_out(rows, columns, texts) or any(column.strip().lower() in LABELS for column in columns):
            return None
        return Layout("text", {} if texts == ["text"] else {"answer": f"{{{texts[0]}}}"})
    return None


def _holds_turns(rows: Sequence[Row], column: str) -> bool:
    """Whether a column holds lists of turns, or JSON text; ``conversation`` may also be the name of a plain text."""
    if column == "conversation" and _holds_text(rows, column):
        return all(str(value).lstrip().startswith("[") for value in _values(rows, column))
    return _holds(rows, column, list) or _holds_text(rows, column)


def _are_turns(rows: Sequence[Row]) -> bool:
    """Whether prompts and completions are lists of turns, or JSON text of such lists, as in a .csv file."""
    columns = ("prompt", "completion")
    return all(_holds(rows, column, list) for column in columns) or all(
        _holds(rows, column, str) and all(map(_is_json_of_turns, _values(rows, column))) for column in columns
    )


def _is_json_of_turns(text: str) -> bool:
    """Whether a text is JSON of a list of objects with a role."""
    try:
        turns = json.loads(text) if text.lstrip().startswith("[") else None
    except ValueError:
        return False
    return isinstance(turns, list) and bool(turns) and all(isinstance(turn, dict) and "role" in turn for turn in turns)


def _left_out(rows: Sequence[Row], columns: Iterable[str], used: Sequence[str]) -> bool:
    """Whether a column that is not empty and may belong to prompt or answer would be left out."""
    others = [column for column in columns if column not in used]
    meaningful = [c for c in others if c.strip().lower() in (*MEANINGFUL, *PROMPTS, *ANSWERS)]
    meaningful += [c for c in others if c.strip().lower() == "text" and not _holds_all(rows, c, used)]
    return any(row.get(column) not in (None, "", [], {}) for row in rows for column in meaningful)


def _holds_all(rows: Sequence[Row], column: str, used: Sequence[str]) -> bool:
    """Whether a column repeats what the columns ``used`` hold, as the ``text`` of Alpaca does."""
    return all(str(row.get(one) or "").strip() in str(row.get(column)) for row in rows for one in used)


def not_text(rows: Sequence[Row]) -> str | None:
    """The column named as a prompt, answer or text whose values are not all texts or numbers; None if there is none."""
    named = [c for c in _columns(rows) if c.strip().lower() in (*PROMPTS, *ANSWERS, "text")]
    return next((c for c in named if not _holds_text(rows, c)), None)


def _values(rows: Sequence[Row], column: str) -> list[Any]:
    """The values of a column, without nulls."""
    return [row[column] for row in rows if row.get(column) is not None]


def _holds(rows: Sequence[Row], column: str, *kinds: type) -> bool:
    """Whether a column has values, all of one of these types."""
    values = _values(rows, column)
    return bool(values) and all(isinstance(value, kinds) for value in values)


def _holds_text(rows: Sequence[Row], column: str) -> bool:
    """Whether a column has values, all of them texts or numbers."""
    return _holds(rows, column, str, int, float)


def _columns(rows: Sequence[Row]) -> list[str]:
    """The columns of all rows, in the order in which they first occur."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _pair(rows: Sequence[Row], prompt: str, answer: str) -> Layout:
    """The templates of a prompt column and an answer column, with white space between the two."""
    if prompt.strip().lower() in QUESTIONS:
        return Layout("file", {"prompt": f"Question: {{{prompt}}}\\nAnswer:", "answer": f" {{{answer}}}"})
    both = [(row[prompt], row[answer]) for row in rows if None not in (row.get(prompt), row.get(answer))]
    separated = bool(both) and all(str(first)[-1:].isspace() or str(second)[:1].isspace() for first, second in both)
    return Layout("file", {"prompt": f"{{{prompt}}}" + ("" if separated else "\\n"), "answer": f"{{{answer}}}"})


def _is_named_as_number(column: str) -> bool:
    """Whether the name of a column is one of a row number or an id."""
    return column.strip().lower() in NUMBERS_OF_ROWS or column.lower().endswith("_id")


def _counts(rows: Sequence[Row], column: str) -> bool:
    """Whether the values of a column number the rows."""
    values = [str(row.get(column)) for row in rows]
    if len(values) < 2 or not all(value.isdecimal() for value in values):
        return False
    return all(int(after) == int(before) + 1 for before, after in itertools.pairwise(values))


def _length(rows: Sequence[Row], column: str) -> int:
    """Characters of all texts of a column."""
    return sum(len(str(row.get(column, ""))) for row in rows)


def unwanted(rows: Sequence[Row]) -> str | None:
    """The column in which false marks a rejected answer, as in files for KTO; None if there is no such column."""
    columns = _columns(rows)
    if not any(column.strip().lower() in ANSWERS for column in columns):
        return None
    return next((c for c in columns if c.strip().lower() in ("label", "labels") and _holds(rows, c, bool)), None)


def example(rows: Sequence[Row]) -> dict[str, Any]:
    """Example values of ``dataset.prompt`` and ``dataset.answer`` for the columns of ``rows``.

    Rows with one text column have no prompt. A column of true and false beside an answer marks whether the answer is
    wanted; it is not taken as the answer.
    """
    columns = _columns(rows)
    texts = [c for c in columns if _holds_text(rows, c) and not set("{}[]!:\\\"'") & set(c)] or ["COLUMN"]
    for numbers_rows in (_is_named_as_number, partial(_counts, rows)):
        kept = [c for c in texts if not numbers_rows(c)]
        texts = kept if len(kept) > 1 else texts
    labels = [c for c in texts if c.strip().lower() in LABELS]
    answers = [c for c in texts if c.strip().lower() in (*ANSWERS, "chosen")]
    if [c for c in answers if c not in labels]:
        labels = [c for c in labels if not _holds(rows, c, bool)]
    if len(texts) == 1 and not labels and texts != ["COLUMN"]:
        return {"answer": f"{{{texts[0]}}}"}
    answer = (labels or answers or texts)[-1]
    others = [c for c in texts if c != answer] or [answer]
    known = (*CONTEXTS, *PROMPTS, "text", "sentence", "premise", "hypothesis")
    prompts = [c for c in others if c.strip().lower() in known] or [max(others, key=lambda c: _length(rows, c))]
    prompts.sort(key=lambda column: column.strip().lower() not in CONTEXTS)  # the context before the question
    shown: dict[str, Any] = {
        "prompt": "\\n".join(f"{{{column}}}" for column in prompts) + "\\n",
        "answer": f"{{{answer}}}",
    }
    classes = list(dict.fromkeys(str(value).strip() for value in _values(rows, answer)))
    if labels and 1 < len(classes) <= MAX_CLASSES:
        numbers = all(one.isdecimal() for one in classes)  # the file does not hold the names of the classes
        shown["classes"] = [f"NAME_OF_{n}" for n in range(max(map(int, classes)) + 1)] if numbers else sorted(classes)
    return shown
