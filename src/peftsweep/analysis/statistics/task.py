"""The trials of one model on one dataset, and what is computed of them, each once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from peftsweep.analysis.statistics import comparisons, effects, stats, trials
from peftsweep.analysis.statistics.effects import Moved
from peftsweep.analysis.statistics.measured import Measured
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import SEVERAL
from peftsweep.analysis.table.naming import Names
from peftsweep.study.record import Status

ENDED_BADLY = (Status.failed.name, Status.oom.name, Status.stopped.name)  # which may say something of a configuration
TEST = "config.halving.test"  # whether a trial goes on to its test rows
NO_NUMBER = "without a finite score"
MOST_PLACES = 4  # devices that are named where trials ran on several
SHOWN_MEMORY = tuple(memory.column for memory in columns.MEMORY)  # the first that is known


def memory_of(table: pd.DataFrame) -> str | None:
    """The column of memory that is shown of these trials, None where none is known."""
    return next((c for c in SHOWN_MEMORY if c in table and table[c].notna().any()), None)


@dataclass(frozen=True)
class Lost:
    """How many seeds of a configuration have a score, and how the others ended: a status -> how many."""

    seeds: int
    ended: dict[str, int]

    def __str__(self) -> str:
        ended = ", ".join(f"{count} {how}" for how, count in self.ended.items())
        return f"{self.seeds} of {self.seeds + sum(self.ended.values())} seeds, {ended}"


@dataclass
class Task:
    """The trials of one model on one dataset, which can be compared with each other."""

    name: str
    table: pd.DataFrame
    predictions: trials.Predictions | None
    _tested: dict[str, comparisons.Tested | None] = field(default_factory=dict)
    _compared: dict[str, pd.DataFrame] = field(default_factory=dict)
    _effects: dict[tuple[str, str, str | None], pd.DataFrame] = field(default_factory=dict)

    @cached_property
    def configurations(self) -> pd.DataFrame:
        return stats.configurations(self.table, self.predictions)

    @cached_property
    def labels(self) -> pd.Series[str]:
        return effects.labels(self.table)

    @cached_property
    def design(self) -> effects.Design:
        return effects.design(self.table)

    @property
    def names(self) -> Names:
        """What settings and their values are called."""
        return self.design.names

    @property
    def factors(self) -> list[str]:
        return self.design.factors

    @cached_property
    def scores(self) -> list[str]:
        """The main score of each evaluation, first the one that decides."""
        return columns.main_scores(self.table)

    def effects(self, column: str, factor: str, reference: str | None = None) -> pd.DataFrame:
        """What the levels of one factor do to a score, or to a cost against the level ``reference``."""
        key = (column, factor if reference else "", reference)
        if key not in self._effects:
            known, plan, named = self.tested(column), self.design, None
            if reference:
                plan, named = dataclasses.replace(plan, factors=[factor]), {factor: reference}
            self._effects[key] = effects.effects(self.table, column, None, named, plan, known)
        found = self._effects[key]
        return found[found["factor"] == factor]

    def tested(self, column: str) -> comparisons.Tested | None:
        """Every pair of configurations: all sentences about two of them use these figures."""
        if column not in self._tested:
            predictions = self.predictions if column in self.scores else None
            self._tested[column] = comparisons.tested(self.table, column, predictions)
        return self._tested[column]

    @property
    def measured(self) -> dict[str, Measured]:
        """The columns that ``tested`` was called for, as it has measured them."""
        return {column: found.measured for column, found in self._tested.items() if found is not None}

    def compare(self, score: str) -> pd.DataFrame:
        """Every configuration against the best one."""
        if score not in self._compared:
            self._compared[score] = comparisons.compare(self.table, score, known=self.tested(score))
        return self._compared[score]

    def unnamed(self, first: int, second: int) -> list[Moved]:
        """The settings that two configurations differ in and that follow from those in their names."""
        one, other = self.design.levels.loc[[first, second]].to_numpy().tolist()
        named = [factor for factor, a, b in zip(self.factors, one, other, strict=True) if a != b]
        return self.design.moved([first], [second], named)

    def tied(self, score: str) -> pd.Index[Any]:
        """The best configuration and those that no difference from it is shown of."""
        compared = self.compare(score)
        return compared.index[compared["verdict"].isin(["best", "tie"])]

    def not_compared(self, score: str) -> pd.Index[Any]:
        """Configurations whose difference from the best has no known uncertainty, as without a standard error."""
        compared = self.compare(score)
        return compared.index[compared["verdict"].eq("unknown")]

    def near(self, score: str) -> pd.Index[Any]:
        """The tied configurations within one standard error of the best, among which costs may decide.

        What is not shown to be better than the untouched base is left out, as nothing is gained by using it.
        """
        compared, useful = self.compare(score), self.useful(score)
        near: pd.Index[Any] = compared.index[
            compared["near"] & compared.index.isin(self.tied(score).intersection(useful))
        ]
        return near if len(near) else useful[:1]

    def useful(self, score: str) -> pd.Index[Any]:
        """Configurations shown to be better than the untouched base, best first, or for which that is not known."""
        compared = self.compare(score)
        return compared.index[compared["gained"].isin(["better", "unknown"])]

    def row(self, number: Any, prefix: str | tuple[str, ...]) -> dict[str, Any]:
        """What is known of a configuration in the columns that begin so; the whole wide row would take long."""
        return {c: self._columns[c].at[number] for c in self._columns if c.startswith(prefix)}

    def facts(self, number: Any, evaluation: str) -> dict[str, Any]:
        """The figures of an evaluation of a configuration, by their names within ``eval_info.<evaluation>``."""
        prefix = f"eval_info.{evaluation}."
        return {column.removeprefix(prefix): value for column, value in self.row(number, prefix).items()}

    @cached_property
    def _columns(self) -> dict[str, pd.Series[Any]]:
        return {c: self.configurations[c] for c in self.configurations.columns}

    def lost(self, score: str) -> dict[Any, Lost]:
        """The configurations with a ``score`` that some of their seeds lack, for want of a finite number.

        Their figures are of the other seeds alone, which may have been the lucky ones.
        """
        known = self.tested(score)
        if known is None:
            return {}
        found = {}
        succeeded = self.configurations["n"].to_dict()
        for number, seeds in zip(known.measured.numbers.tolist(), known.measured.seeds.tolist(), strict=True):
            counts = dict(self._ended_badly.get(number, {}))
            if without := int(succeeded[number]) - seeds:
                counts[NO_NUMBER] = without
            if counts:
                found[number] = Lost(seeds, counts)
        return found

    @cached_property
    def _ended_badly(self) -> dict[Any, dict[str, int]]:
        """The number of seeds of each configuration that failed or were stopped early, by status.

        A search stops trials at their end too, before the test rows (``halving.test=false``), which is no bad sign.
        """
        ended = trials.one_a_seed(self.table, self.table["configuration"])
        statuses = ended[trials.SUCCESS]
        bad = statuses.isin(ENDED_BADLY)
        if TEST in ended:
            bad &= ~(statuses.eq(Status.stopped.name) & ended[TEST].eq(False).fillna(False).astype(bool))
        found: dict[Any, dict[str, int]] = {}
        for number, status in zip(ended.loc[bad, "configuration"], statuses[bad], strict=True):
            of_one = found.setdefault(number, {})
            of_one[status] = of_one.get(status, 0) + 1
        return found

    @cached_property
    def places(self) -> pd.Series[str]:
        """The devices that the successful trials of a configuration ran on, joined by ``SEVERAL``; empty: unknown."""
        good = self.table[self.table[trials.SUCCESS] == Status.success.name]
        ran = columns.devices(good).groupby(good["configuration"]).agg(lambda own: SEVERAL.join(sorted(set(own))))
        return ran.reindex(self.configurations.index).fillna("")

    def one_place(self, numbers: pd.Index[Any]) -> bool:
        """Whether these configurations ran on one kind of device, so that their seconds can be compared."""
        found = self.places[numbers]
        return found.nunique() <= 1 and not found.str.contains(SEVERAL, regex=False).any()

    @cached_property
    def several_places(self) -> str:
        """The devices that the successful trials ran on, if their seconds cannot be compared; else empty."""
        if self.one_place(self.configurations.index[self.configurations["n"] > 0]):
            return ""
        every = sorted({place for found in self.places for place in found.split(SEVERAL)} - {""})
        more = [f"{len(every) - MOST_PLACES} more"] if len(every) > MOST_PLACES else []
        return "; ".join([*every[:MOST_PLACES], *more])

    @cached_property
    def weighed_costs(self) -> list[columns.Cost]:
        """The known costs that a frontier weighs against scores: not seconds of several devices."""
        found = columns.costs(self.configurations)
        return [cost for cost in found if not self.several_places or cost.unit != "seconds"]

    @cached_property
    def memory(self) -> str | None:
        return memory_of(self.table)

    @cached_property
    def seeds(self) -> int:
        """The most successful seeds a configuration has."""
        return int(self.configurations["n"].max()) if len(self.configurations) else 0


def study_tasks(table: pd.DataFrame, predictions: trials.Predictions | None) -> list[Task]:
    """The tasks of a study's table."""
    return [Task(name, part, predictions) for name, part in trials.tasks(table).items()]
