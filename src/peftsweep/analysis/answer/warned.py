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
