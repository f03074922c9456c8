"""The warnings of the records: what makes scores less reliable than they look."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import pandas as pd

from peftsweep.analysis.answer.structure import WARNINGS, Section
from peftsweep.analysis.statistics import trials
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.text import words
from peftsweep.study import record
from peftsweep.study.record import Status

FIGURE = re.compile(r"'[^']*'|\d[\d.,]*")  # the parts of a warning that differ between trials
JUDGED = f"run_info.{record.JUDGED}"
READ_OTHERWISE = "an earlier version read these answers by other rules; force=true evaluates them again"
# What may change while its name stays the same: the hash of its content, and the keys that choose it.
CONTENT = {
    "The dataset": ("meta_info.dataset_sha", "config.dataset."),
    "The model": ("meta_info.model_sha", "config.model."),
}
OTHER_CONTENT = (
    "{} was changed after these trials had run: they are of other content than the newer ones, so that a difference "
    "may be of the content; the same command in a study of its own (study=NAME) compares trials of the present content"
)
WARNED = 5  # configurations that a warning names


def section(tasks: Sequence[Task]) -> Iterator[Section]:
    """The section of the warnings; of those that differ in their numbers alone one stands for all."""
    found: dict[str, dict[str, list[str]]] = {}  # by the line without its figures, the line, the trials' labels
    for task in tasks:
        warnings = task.table[columns.WARNINGS].dropna() if columns.WARNINGS in task.table else pd.Series(dtype=object)
        for number, text in zip(task.table.loc[warnings.index, "configuration"], warnings, strict=True):
            for line in json.loads(text):
                same = found.setdefault(FIGURE.sub("#", line), {}).setdefault(line, [])
                same += [task.labels[number]] if task.labels[number] not in same else []
        if earlier := _judged_before(task):
            found[task.name] = {READ_OTHERWISE: earlier}
        for what in CONTENT:
            if former := _of_former_content(task, what):
                found[f"{task.name}, {what}"] = {OTHER_CONTENT.format(what): former}
    if not found:
        return
    sentences, facts = [], []
    for lines in found.values():
        line, labels = next(iter(lines.items()))
        named = ", ".join(words.code(label) for label in labels[:WARNED]) + (", ..." if len(labels) > WARNED else "")
        every = {label for each in lines.values() for label in each}
        others = len(every) - len(labels)
        alike = f"; with other figures: {words.plural('configuration', others)} more" if others else ""
        sentences.append(f"{words.escaped(line)} ({named}{alike}).")
        facts.append({"warning": line, "configurations": sorted(every)})
    yield Section(WARNINGS, "Warnings", sentences, {"warnings": facts})


def _judged_before(task: Task) -> list[str]:
    """The configurations whose answers were read by the rules of an earlier version, while others' were not."""
    good = task.table[task.table[trials.SUCCESS] == Status.success.name]
    versions = good[JUDGED].fillna(1) if JUDGED in good else pd.Series(1, index=good.index)
    read = [c for c in good.columns if c.endswith(".valid_fraction.value")]
    if versions.nunique() < 2 or not read:
        return []
    before = good.loc[(versions < versions.max()) & good[read].notna().any(axis=1), "configuration"]
    return list(dict.fromkeys(task.labels[number] for number in before))


def _of_former_content(task: Task, what: str) -> list[str]:
    """The configurations whose trials had other content than a newer trial with the same keys of dataset or model."""
    content, prefix = CONTENT[what]
    good = task.table[task.table[trials.SUCCESS] == Status.success.name]
    if content not in good or good[content].nunique() < 2:
        return []
    good = good[good[content].notna()].sort_values(trials.CREATED, kind="stable")
    # The hashes of an earlier rule of identity have another form.
    keys = [c for c in good.columns if c.startswith(prefix) or c == "run_info.identity_rule"]
    shown = good[keys].astype("string").fillna("").agg("|".join, axis=1)
    former = good[good[content].ne(good.groupby(shown)[content].transform("last"))]
    return list(dict.fromkeys(task.labels[number] for number in former["configuration"].sort_index()))
