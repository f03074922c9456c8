"""Questions whose choices are judged by the likelihood of their texts, from files in the format of commonsense_170k."""

from __future__ import annotations

from typing import Any

from peftsweep.data import tasks

Row = dict[str, Any]


def question(row: Row) -> Row:
    """A row of OpenBookQA or ARC, of the hub's columns or of commonsense_170k's, as a question and its choices.

    Of a row of commonsense_170k that lists no texts, such as BoolQ's, the question is None: dataset.missing=drop
    leaves it out.
    """
    if "instruction" not in row:
        return tasks.arc(row)
    read = tasks.instruction(row)
    texts = [choice["text"] for choice in read["choices"]]
    listed = texts != [choice["answer"] for choice in read["choices"]]
    question = row["instruction"].split("question: ", 1)[1].split("\n\nAnswer1:")[0] if listed else None
    return {
        "question": question,
        "choices": [{"answer": text} for text in texts],
        "gold": read["gold"],
        "answer": texts[read["gold"]],
    }
