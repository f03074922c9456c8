"""The published question sets: their rows as questions with choices.

A reader takes a row of the source and adds ``choices``, with the columns that differ between the choices, and
``gold``, the number of the right choice, from 0. Columns and choices are those that lm-evaluation-harness scores.
``Format170k`` writes the same questions in the format of commonsense_170k (LLM-Adapters), for training and test.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftsweep.data.conversations.reader import messages as messages
from peftsweep.data.conversations.reader import sharegpt as sharegpt

Row = dict[str, Any]
Reader = Callable[[Row], Row]

OPTION = re.compile(r"(?:Answer|Solution|Ending|Option)\d:\s*(.*?)\s*(?=(?:Answer|Solution|Ending|Option)\d:|\Z)", re.S)
TRUTH = {"0": 0, "false": 0, "no": 0, "1": 1, "true": 1, "yes": 1}
LABELS = re.compile(r"\s*Answer format:\s*(\S+)\s*\Z")


def _with_choices(row: Row, texts: Sequence[str], gold: int) -> Row:
    _check_gold(gold, len(texts))
    return row | {"choices": [{"answer": text} for text in texts], "gold": gold, "answer": texts[gold]}


def _check_gold(gold: int, choices: int) -> None:
    # Test sets without labels have -1, or 0 where labels count from 1; as an index, -1 would be the last choice.
    if not 0 <= gold < choices:
        raise ValueError(f"its label names choice {gold + 1} of {choices}")


def _place_of_key(labels: list[str], key: str) -> int:
    if key not in labels:
        raise ValueError(f"its answerKey '{key}' is none of the labels of its choices: {', '.join(map(str, labels))}")
    return labels.index(key)


def boolq(row: Row) -> Row:
    """BoolQ: ``passage``, ``question`` and ``answer`` (or, in SuperGLUE, ``label``), true or false."""
    answer = str(row["label" if "label" in row else "answer"]).lower()
    if answer not in TRUTH:
        raise ValueError(f"its answer '{answer}' is none of {', '.join(TRUTH)}")
    return _with_choices(row, ["no", "yes"], TRUTH[answer])


def piqa(row: Row) -> Row:
    """PIQA: ``goal``, ``sol1``, ``sol2`` and ``label``, counted from 0."""
    return _with_choices(row, [row["sol1"], row["sol2"]], int(row["label"]))


def social_i_qa(row: Row) -> Row:
    """Social IQA: ``context``, ``question``, ``answerA`` to ``answerC`` and ``label``, counted from 1."""
    return _with_choices(row, [row["answerA"], row["answerB"], row["answerC"]], int(row["label"]) - 1)


def hellaswag(row: Row) -> Row:
    """HellaSwag: ``activity_label``, ``ctx_a``, ``ctx_b``, ``endings`` and ``label``, without WikiHow's brackets."""
    context = _without_brackets(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = [_without_brackets(text) for text in row["endings"]]
    return _with_choices(row, endings, int(row["label"])) | {"context": context}


def _without_brackets(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def winogrande(row: Row) -> Row:
    """WinoGrande, by partial scoring: an option fills the blank, and the rest of the sentence is scored after it."""
    before, blank, rest = row["sentence"].partition("_")
    if not blank:
        raise ValueError("its sentence has no blank '_', which an option would fill")
    options = [row["option1"], row["option2"]]
    choices = [{"context": before + text, "answer": rest.strip(), "text": text} for text in options]
    gold = int(row["answer"]) - 1
    _check_gold(gold, len(choices))
    return row | choices[gold] | {"choices": choices, "gold": gold}


def arc(row: Row) -> Row:
    """ARC and OpenBookQA: ``question`` (or ``question_stem``), ``choices`` and ``answerKey``, a letter or a digit."""
    gold = _place_of_key(list(row["choices"]["label"]), row["answerKey"].strip())
    read = _with_choices(row, list(row["choices"]["text"]), gold)
    return read | {"question": row.get("question", row.get("question_stem"))}


def commonsense_qa(row: Row) -> Row:
    """CommonsenseQA: ``question``, ``choices`` and ``answerKey``; the prompt lists the choices, a letter answers."""
    labels, texts = list(row["choices"]["label"]), list(row["choices"]["text"])
    gold = _place_of_key(labels, row["answerKey"])
    choices = [{"answer": label, "text": text} for label, text in zip(labels, texts, strict=True)]
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    return row | {"choices": choices, "gold": gold, "answer": labels[gold], "options": options}


def alpaca(row: Row) -> Row:
    """Alpaca: ``instruction``, ``input`` (often empty) and ``output``; ``with_input`` mentions the input."""
    given = row.get("input") or ""
    return row | {
        "input": f"### Input:\n{given}\n\n" if given else "",
        "with_input": ", paired with an input that provides further context" if given else "",
    }


def dolly(row: Row) -> Row:
    """Dolly: ``instruction``, ``context`` (often empty) and ``response``, under Alpaca's names."""
    return alpaca(row | {"input": row.get("context"), "output": row["response"]})


# ---- the format of commonsense_170k ----------------------------------------------------------------


@dataclass(frozen=True)
class Format170k:
    """A reader that writes one source's questions as commonsense_170k does: ``instruction``, ``output``, ``answer``.

    The choices are labels such as answer2; ``text`` is the choice that a label stands for. Rows that are in this
    format already stay as they are.
    """

    reader: Reader
    lead: str  # a template over the row's columns
    word: str  # the name of a choice, before its number
    between: str = " "  # between two choices
    end: str = "\n\n"  # after the last choice

    def __call__(self, row: Row) -> Row:
        """The row with its instruction, labels and right answer.

        Raises:
            ValueError: its instruction names no labels, or its answer is not among them.
        """
        return instruction(row if "instruction" in row else self._write(self.reader(row)))

    def _write(self, row: Row) -> Row:
        texts = [choice.get("text", choice["answer"]) for choice in row["choices"]]
        labels = ["false", "true"] if self.word == "true" else [f"{self.word}{n + 1}" for n in range(len(texts))]
        listed = [f"{label.capitalize()}: {text}" for label, text in zip(labels, texts, strict=True)]
        options = "" if self.word == "true" else self.between.join(listed) + self.end
        allowed = "true/false" if self.word == "true" else "/".join(labels)
        answer = labels[row["gold"]]
        question = f"{self.lead.format_map(row)}\n\n{options}Answer format: {allowed}"
        return {"instruction": question, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def instruction(row: Row) -> Row:
    """A row of commonsense_170k: the labels that its instruction allows are the choices.

    Raises:
        ValueError: the instruction names no labels, or the row's answer is not among them.
    """
    found = LABELS.search(row["instruction"])
    labels = found.group(1).split("/") if found else []
    if row["answer"] not in labels:
        raise ValueError(f"the answer '{row['answer']}' is none of the instruction's labels {labels}")
    texts = OPTION.findall(LABELS.sub("", row["instruction"]))[-len(labels) :]
    if len(texts) != len(labels):
        texts = labels  # true and false stand for themselves
    choices = [{"answer": label, "text": text} for label, text in zip(labels, texts, strict=True)]
    return row | {"choices": choices, "gold": labels.index(row["answer"])}


QUESTION = "Please choose the correct answer to the question: {question}"
boolq_170k = Format170k(boolq, "Please answer the following question with true or false, question: {question}?", "true")
piqa_170k = Format170k(piqa, "Please choose the correct solution to the question: {goal}", "solution", "\n\n")
social_i_qa_170k = Format170k(
    social_i_qa, "Please choose the correct answer to the question: {context} {question}", "answer"
)
hellaswag_170k = Format170k(
    hellaswag, "Please choose the correct ending to complete the given sentence: {context}", "ending"
)
winogrande_170k = Format170k(
    winogrande,
    "Please choose the correct answer to fill in the blank to complete the given sentence: {sentence}",
    "option",
    end=" ",
)
arc_170k = Format170k(arc, QUESTION, "answer")
commonsense_qa_170k = Format170k(commonsense_qa, QUESTION, "answer")
