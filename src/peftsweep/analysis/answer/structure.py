"""The structure of an answer, and answer.json with its published schema (docs/answer.schema.json).

An answer is a list of named sections, in the order in which a reader needs them. To add a section, append a
`Section`: all four outputs show it. Sections named in `FACTS` have facts of a fixed form, which the schema checks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from peftsweep.study import record

ANSWER, SCHEMA_VERSION = "answer.json", 1
# What a column holds: text, a score (with its interval in the cells <key>.low and <key>.high), a number of bytes, of
# seconds, or of things, a share of one, or a relative change (0.08: 8% more; with its interval likewise).
Unit = Literal["text", "score", "bytes", "seconds", "count", "share", "change"]
# The sections that come first, in this order, in every output.
USE, SURE, CHOICES, COSTS, FAILURES, WARNINGS = "use", "certainty", "choices", "costs", "failures", "warnings"
TUNE, LEAGUE = "tune", "league"  # what sweep=tune and sweep=league decided: each after what to use, where there is one
RETENTION = "retention"


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its cells, its title, and the unit of its numbers."""

    key: str
    title: str
    unit: Unit = "text"


@dataclass(frozen=True)
class Table:
    """Rows of plain values by column; a missing or null cell was not measured."""

    title: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    note: str = ""
    left_out: int = 0  # rows that results.parquet has and this table does not


# ---- facts of the first sections ---------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A score with its 95% interval; ``name`` is evaluation and metric in words."""

    name: str
    evaluation: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    better: Literal["higher", "lower"]


@dataclass(frozen=True)
class Need:
    """The configuration to use for a need, such as little memory."""

    need: str
    configuration: str
    why: str


@dataclass(frozen=True)
class Use:
    """What to use. ``verdict`` is ``none`` where nothing is shown to beat the untouched base.

    It is ``by validation`` where sweep=tune had no budget left for test rows. ``decided_by`` names the search whose
    decision this is; without one it follows from all trials of the task.
    """

    verdict: Literal["use", "only one", "none", "not judged", "nothing succeeded", "by validation"]
    configuration: str | None
    settings: dict[str, Any]
    score: Score | None
    why: str | None
    command: str | None  # trains it again
    folder: str | None  # of its trial, the first seed's
    adapter: str | None  # the folder of its saved weights
    trials: list[str]  # all its seeds
    needs: list[Need]
    decided_by: Literal["tune"] | None = None


@dataclass(frozen=True)
class Base:
    """The untouched base, and what the best configuration gains over it."""

    value: float
    gain: float | None
    low: float | None  # of the 95% interval of this pair alone
    high: float | None
    p: float | None  # adjusted for all pairs
    scale: Literal["difference", "ratio"] | None


@dataclass(frozen=True)
class Judged:
    """How sure one score's order is: its best configuration, the ties with it, and what it is held against."""

    score: Score
    best: str
    ties: list[str]
    worse: int  # configurations that are shown to be worse than another one
    covers: str | None  # what the interval covers: other seeds, other test rows, or both
    test_rows: int | None
    base: Base | None
    majority: float | None  # always giving the most frequent answer
    random: float | None  # guessing


@dataclass(frozen=True)
class Placebo:
    """A method of a league that took part twice: what luck alone is worth."""

    method: str
    wins: int  # of ``pairs`` of final trials, one of each, of how many the second of the two scored better
    pairs: int
    verdict: str  # of the second against the first: better or worse, which luck alone can bring, tie or unknown
    difference: float  # of the score, which the league was to show
    seeds_needed: int | None  # to show it in 80% of leagues; None: the test rows are too few for any number


@dataclass(frozen=True)
class Certainty:
    """How sure the answer is."""

    seeds: int
    scores: list[Judged]
    placebo: Placebo | None = None


@dataclass(frozen=True)
class Comparison:
    """A level of a factor against the reference level."""

    level: str
    reference: str
    value: float | None
    reference_value: float | None
    difference: float | None
    low: float | None  # of the 95% interval of this pair alone
    high: float | None
    p: float | None  # adjusted for all pairs
    verdict: str
    settings: int  # of the other factors, over which it is averaged
    also_changed: list[str]


@dataclass(frozen=True)
class Choice:
    """What the levels of one factor were worth: differences of ``score``, or relative ones where ``unit`` is ratio."""

    factor: str
    column: str
    score: str
    better: Literal["higher", "lower"]
    unit: Literal["difference", "ratio"]
    levels: list[str]
    comparisons: list[Comparison]


@dataclass(frozen=True)
class Choices:
    """What each choice was worth."""

    factors: list[Choice]


@dataclass(frozen=True)
class CostFact:
    """A cost of the configuration to use, and its range over all."""

    name: str
    column: str
    unit: Literal["bytes", "seconds", "count"]
    value: float | None
    lowest: float
    highest: float
    source: Literal["measured", "predicted"]


@dataclass(frozen=True)
class Costs:
    """What it costs."""

    configuration: str | None
    costs: list[CostFact]


@dataclass(frozen=True)
class Failure:
    """Trials that ended for one cause."""

    status: str
    stage: str | None
    cause: str
    count: int
    trials: list[str]
    change: str | None  # what to change


@dataclass(frozen=True)
class Failures:
    """What failed."""

    causes: list[Failure]


# ---- facts of searches and of what was kept ----------------------------------------------------------


@dataclass(frozen=True)
class Finalist:
    """What a search judged on test rows: ``value`` is the mean over ``trials``, which have a seed each."""

    name: str  # of the method, or of the placebo
    configuration: str  # as the search calls it
    value: float
    trials: list[str]
    rank: int | None = None  # of a league: one more than the number of those that are better for certain


@dataclass(frozen=True)
class Between:
    """One finalist of a tuning against another, with an interval that holds at all looks together.

    ``verdict`` is of the first. ``estimate`` is how much better it is; of perplexities the logarithm of a ratio.
    """

    first: str
    second: str
    estimate: float
    low: float
    high: float
    looks: int
    verdict: Literal["better", "worse", "tie", "open"]


@dataclass(frozen=True)
class Decision:
    """What sweep=tune or sweep=league decided, as it wrote it into tune.json or league.json.

    ``verdict`` is ``none`` where the best finalist is not shown to be better than the untouched base, ``by
    validation`` where nothing was judged on test rows; a league ranks, and recommends nothing. Files of earlier
    versions have the sentences alone: their ``verdict`` is None and the rest is empty.
    """

    command: str | None
    verdict: Literal["use", "none", "by validation", "ranked"] | None = None
    configuration: str | None = None  # the best, as the search calls it
    trials: list[str] = field(default_factory=list)  # of the best
    column: str | None = None  # of the score that decided, on test rows; by validation: its name in steps.jsonl
    finalists: list[Finalist] = field(default_factory=list)  # the best first
    base: Base | None = None  # what the best gains over the untouched base
    between: list[Between] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)  # what the search would have tried with a larger budget
    not_trained: list[str] = field(default_factory=list)  # what could not be trained, with the reason
    placebo: Placebo | None = None  # of a league


@dataclass(frozen=True)
class ScaleScore:
    """A score at one scale of an adapter."""

    scale: float
    value: float
    stderr: float | None


@dataclass(frozen=True)
class ScaleCurve:
    """An evaluation's scores from the untouched base at scale 0 to the whole adapter at 1."""

    evaluation: str
    metric: str
    role: Literal["target", "retention"]
    better: Literal["higher", "lower"]
    points: list[ScaleScore]

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.better == "higher" else -1

    def score_at(self, scale: float) -> ScaleScore | None:
        """The score at ``scale``; None where it was not measured."""
        return next((one for one in self.points if one.scale == scale), None)


@dataclass(frozen=True)
class Kept:
    """What one trial kept of what the base could do."""

    trial: str
    keeps_most: dict[str, float | None]  # by evaluation: the scale that keeps most at a target within its interval
    curves: list[ScaleCurve]


@dataclass(frozen=True)
class Retention:
    """What adapters have cost elsewhere, and at which of their scales the most of it is kept."""

    trials: list[Kept]


Facts = Use | Certainty | Choices | Costs | Failures | Decision | Retention | dict[str, Any]
FACTS: dict[str, type] = {USE: Use, SURE: Certainty, CHOICES: Choices, COSTS: Costs, FAILURES: Failures}
FACTS |= {TUNE: Decision, LEAGUE: Decision, RETENTION: Retention}


# ---- sections ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One part of the answer. Sentences are Markdown of one line each in memory, and plain text in answer.json."""

    name: str
    title: str
    sentences: list[str]
    facts: Facts = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    task: str = ""  # the model and dataset; empty where the study has one alone, or the section is of all


@dataclass(frozen=True)
class Answer:
    """All that a study tells."""

    schema_version: int
    peftsweep: str  # the version that wrote it
    created_at: str
    study: str
    folder: str
    trials: dict[str, int]  # by status
    configurations: int
    sections: list[Section]

    def sections_named(self, *names: str) -> list[Section]:
        """The sections called so, of all tasks, in their order."""
        return [section for section in self.sections if section.name in names]


# ---- answer.json -------------------------------------------------------------------------------------


def content(answer: Answer, plain_text: Any) -> dict[str, Any]:
    """``answer`` as answer.json holds it; ``plain_text`` takes the marks out of a sentence."""
    found: dict[str, Any] = record.plain(answer)
    for section in found["sections"]:
        section["sentences"] = [plain_text(line) for line in section["sentences"]]
    return found


def write(answer: Answer, folder: Path, plain_text: Any) -> Path:
    """Write answer.json into the study's folder, atomically."""
    file = folder / ANSWER
    record.write_json(file, content(answer, plain_text))
    return file


def schema() -> dict[str, Any]:
    """The JSON schema of answer.json: that of `Answer`, with the facts of each section that has a fixed form."""
    from pydantic import TypeAdapter

    found: dict[str, Any] = TypeAdapter(Answer).json_schema()
    conditions = []
    for name, kind in FACTS.items():
        facts = TypeAdapter(kind).json_schema()
        found["$defs"] |= facts.pop("$defs", {}) | {facts["title"]: facts}
        of_name = {"properties": {"name": {"const": name}}}
        conditions.append({"if": of_name, "then": {"properties": {"facts": {"$ref": f"#/$defs/{facts['title']}"}}}})
    found["$defs"]["Section"]["allOf"] = conditions
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "peftsweep answer.json"}


def number(value: Any) -> float | None:
    """``value`` as a plain number; None where there is none, or it is infinite."""
    return None if pd.isna(value) or math.isinf(value) else float(value)


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
