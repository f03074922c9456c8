"""The test rows won and lost between any two of the configurations and their untouched bases, with their predictions.

A row is won by the one with the higher score on it: more of its seeds were right, or its loss for a token is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from peftsweep.analysis.statistics import comparisons, measured
from peftsweep.analysis.statistics import trials as statistics_trials
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.statistics.trials import Floats
from peftsweep.analysis.table.columns import evaluation, lower_is_better, score_name
from peftsweep.analysis.table.table import predictions_file
from peftsweep.analysis.text import words
from peftsweep.study import record
from peftsweep.study.reading import Unreadable

ALIKE = 1e-6  # nats a token: a smaller difference of losses is rounding
LEADING = 5  # configurations whose rows are counted in RESULTS.md
SHOWN, LINE = 3, 90  # rows there that one of two wins, and characters of a text


@dataclass(frozen=True)
class Member:
    """A configuration, or an untouched base."""

    number: int  # of ``stats.identify``; bases have negative ones
    name: str
    trial: str  # whose answers are shown: of the first seed
    seeds: int
    base: int | None  # the number of its untouched base; None where it is one, or none is known

    def file(self, column: str) -> str:
        """Its predictions, relative to the study."""
        return predictions_file(Path(), self.trial, evaluation(column)[0]).as_posix()


@dataclass(frozen=True)
class Rows:
    """The figures of each test row, of configurations and then of their untouched bases."""

    column: str
    members: list[Member]
    figures: Floats  # [members, rows] the share of seeds that were right, or the loss a token

    @property
    def losses(self) -> bool:
        """Whether a figure is a loss, of which less is better."""
        return lower_is_better(self.column)

    def advantage(self, first: int, second: int) -> Floats:
        """How far the member at place ``first`` is better than that at ``second``, on each row [rows]."""
        found: Floats = self.figures[first] - self.figures[second]
        found = -found if self.losses else found
        return np.where(np.abs(found) <= ALIKE, 0.0, found)

    def rows_won(self, first: int, second: int) -> NDArray[np.int64]:
        """The rows that ``first`` wins against ``second``, the clearest first, else in their order."""
        apart = self.advantage(first, second)
        clearest = np.argsort(-apart, kind="stable")
        return clearest[: int((apart > 0).sum())]

    def pairs(self) -> list[tuple[int, int]]:
        """The places of each configuration with its untouched base, then of the first with each other one."""
        places = {member.number: place for place, member in enumerate(self.members)}
        trained = [place for place, member in enumerate(self.members) if member.number >= 0]
        over_base = [(place, places[base]) for place in trained if (base := self.members[place].base) in places]
        return over_base + [(trained[0], other) for other in trained[1:]]


def rows(
    table: pd.DataFrame,
    column: str,
    predictions: statistics_trials.Predictions | None,
    names: Mapping[int, str],
    order: Sequence[int],
) -> Rows | None:
    """The rows of the configurations of ``order``, best first, and of their bases; None where fewer than two are known.

    Left out are those whose predictions are missing, of other rows, or not what the record says.
    """
    if predictions is None:
        return None
    joined, base_of = comparisons.with_bases(table, column)
    trials = joined[joined[statistics_trials.SUCCESS].eq("success") & joined[column].notna()]
    wanted = [*order, *sorted({base_of[n] for n in order if n in base_of}, reverse=True)]
    members, figures, shared_prompts = [], [], None
    for number in wanted:
        mine = trials[trials["configuration"] == number].drop_duplicates(
            [c for c in (statistics_trials.SEED,) if c in trials]
        )
        found = [_figures(predictions(str(t), evaluation(column)[0]), column, v) for t, v in _scored(mine, column)]
        known = [one for one in found if one is not None]
        if not known or len(known) < len(found) or any(one[0] != (shared_prompts or known[0][0]) for one in known):
            continue
        shared_prompts = known[0][0]
        first = str(mine[statistics_trials.TRIAL].iloc[0])
        name = names[number] if number >= 0 else _base_name(first, several=wanted[-1] < -1)
        members.append(Member(number, name, first, len(known), base_of.get(number)))
        figures.append(np.mean([one[1] for one in known], axis=0))
    return Rows(column, members, np.stack(figures)) if len(members) > 1 else None


def _scored(trials: pd.DataFrame, column: str) -> list[tuple[Any, float]]:
    return list(zip(trials[statistics_trials.TRIAL], trials[column].astype(float), strict=True))


def _figures(lines: Sequence[dict[str, Any]], column: str, value: float) -> tuple[list[Any], Floats] | None:
    """The prompts, and the figure of each row; None if they are not those of the score ``value``."""
    figures = measured.row_scores(lines, evaluation(column)[1])
    if figures is None or len(figures) < 1:
        return None
    losses = lower_is_better(column)
    if not math.isclose(
        math.exp(min(figures.mean(), 700.0)) if losses else figures.mean(), value, rel_tol=1e-5, abs_tol=1e-6
    ):
        return None
    if losses:
        figures = np.array([-line["log_likelihood"] / max(line["tokens"], 1) for line in lines])
    return [(line.get("prompt"), line.get("answer")) for line in lines], figures


def _base_name(file: str, *, several: bool) -> str:
    """``untouched base``; with its model and quantisation, which its folder is called by, where there are several."""
    return f"untouched base ({Path(file).parent.name.rpartition('-')[0]})" if several else "untouched base"


# ---- texts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """The prompt of a row, the right answer, and the model's output."""

    prompt: str
    answer: str
    output: str

    def cut(self, prompt: int, others: int) -> Text:
        """The same with the middle of long texts left out, beyond so many characters."""
        return Text(cut(self.prompt, prompt), cut(self.answer, others), cut(self.output, others))


def texts(folder: Path, found: Rows, place: int) -> list[Text]:
    """The texts of each row of the member at ``place``, as the study in ``folder`` holds them.

    They are empty where its file is not there, or has other rows by now.
    """
    try:
        lines = record.read_predictions(folder / found.members[place].file(found.column))
    except Unreadable:  # which was reported when its figures were read
        lines = []
    if len(lines) != found.figures.shape[1]:
        return [Text("", "", "")] * found.figures.shape[1]
    return [Text(_prompt(line), str(line.get("answer", "")), _output_text(line)) for line in lines]


def _prompt(line: Mapping[str, Any]) -> str:
    choices = "".join(f"\n- {choice}" for choice in line.get("choices") or [])
    return f"{line.get('prompt') or line.get('task') or ''}{choices}"


def _output_text(line: Mapping[str, Any]) -> str:
    if "prediction" in line:
        return str(line["prediction"])
    if "label_prediction" in line:
        return str(line["label_prediction"])
    return f"{-line['log_likelihood'] / max(line['tokens'], 1):.3f} nats a token" if "log_likelihood" in line else ""


def cut(text: Any, longest: int) -> str:
    """``text`` with its middle left out where it is long; without characters that no page or terminal can show."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    half = longest // 2
    return shown if len(shown) <= longest else f"{shown[: half - 1]} … {shown[-half:]}"


def examples(found: Rows, pairs: Sequence[tuple[int, int]], *, each: int, most: int) -> list[int]:
    """Rows, at most ``most``, among which each pair has up to ``each`` that the first wins and that the second wins."""
    chosen: dict[int, None] = {}
    for first, second in pairs:
        for one, other in ((first, second), (second, first)):
            won = found.rows_won(one, other).tolist()
            here = sum(row in chosen for row in won)
            for row in (row for row in won if row not in chosen):
                if here >= each or len(chosen) >= most:
                    break
                chosen[row] = None
                here += 1
    return sorted(chosen)


# ---- RESULTS.md ------------------------------------------------------------------------------------


def section(task: Task, mark: str, folder: Path) -> Iterator[str]:
    """Which rows the best configurations win and lose, against their untouched bases and against the best one."""
    known = (_leading(task, score) for score in task.scores)
    shown = [found for found in known if found is not None and found.pairs()]
    if not shown:
        return
    yield f"## Rows won and lost{mark}"
    yield ""
    for found in shown:
        won = "the loss a token is smaller" if found.losses else "the answer is right, or that of more seeds"
        yield f"{score_name(found.column)}, {words.plural('row', found.figures.shape[1])}; a row is won where {won}."
        yield ""
        yield from words.table([_tally(found, *pair) for pair in found.pairs()])
    best = [pair for pair in shown[0].pairs() if pair[0] == 0]
    for first, second in best[:2]:  # the untouched base and the second best
        yield from _shown(shown[0], folder, first, second)
    seeds = " The answers are those of the first seed." if max(m.seeds for m in shown[0].members) > 1 else ""
    yield f"Rows are numbered as the lines of the files of predictions.{seeds} In report.html any two can be chosen."
    yield ""


def _leading(task: Task, score: str) -> Rows | None:
    names = dict(zip(task.labels.index.tolist(), task.labels.tolist(), strict=True))
    return rows(task.table, score, task.predictions, names, task.compare(score).index[:LEADING].tolist())


def _tally(found: Rows, first: int, second: int) -> dict[str, str]:
    won, lost = len(found.rows_won(first, second)), len(found.rows_won(second, first))
    names = {"configuration": found.members[first].name, "against": found.members[second].name}
    return names | {"won": f"{won:,}", "lost": f"{lost:,}", "alike": f"{found.figures.shape[1] - won - lost:,}"}


def _shown(found: Rows, folder: Path, first: int, second: int) -> Iterator[str]:
    """Some rows that the first of two wins, and some that it loses, as they were written."""
    names = [found.members[place].name for place in (first, second)]
    every = [texts(folder, found, place) for place in (first, second)]
    for verb, won in (("wins", found.rows_won(first, second)), ("loses", found.rows_won(second, first))):
        if not len(won):
            continue
        shown = won[:SHOWN].tolist()
        written = [{row: of[row].cut(LINE, LINE) for row in shown} for of in every]
        count = words.plural("row", len(won)) + (f", here {len(shown)} of them" if len(shown) < len(won) else "")
        yield f"{words.code(names[0])} {verb} against {words.code(names[1])} on {count}:"
        yield ""
        yield from words.table(
            [
                {"row": str(row + 1)}
                | {"prompt": words.code(written[0][row].prompt), "answer": words.code(written[0][row].answer)}
                | {name: words.code(of[row].output) for name, of in zip(names, written, strict=True)}
                for row in shown
            ]
        )
