"""What a study found, sentence by sentence: what to use, what is best, what each factor does.

Every sentence is made from figures of the study; where the data does not tell, the sentence is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from peftsweep.answer import columns, effects, stats, words
from peftsweep.answer.columns import DEVICE_MEMORY, RANK, WITHOUT_RESULT
from peftsweep.answer.words import ADAPTER, SECONDS, SHOWN_MEMORY
from peftsweep.metrics import baseline
from peftsweep.record import Status


@dataclass
class Task:
    """The trials of one model on one dataset, which can be compared with each other."""

    name: str
    table: pd.DataFrame
    predictions: stats.Predictions | None
    _compared: dict[str, pd.DataFrame] = field(default_factory=dict)
    _effects: dict[tuple[str, str | None], pd.DataFrame] = field(default_factory=dict)

    @cached_property
    def configurations(self) -> pd.DataFrame:
        return stats.configurations(self.table, self.predictions)

    @cached_property
    def labels(self) -> pd.Series[str]:
        return effects.labels(self.table, self.design)

    @cached_property
    def design(self) -> effects.Design:
        return effects.design(self.table)

    @property
    def factors(self) -> list[str]:
        return self.design.factors

    @cached_property
    def scores(self) -> list[str]:
        """The main score of each evaluation, first the one that decides."""
        return columns.main_scores(self.table)

    def effects(self, column: str, factor: str, reference: str | None = None) -> pd.DataFrame:
        """What the levels of one factor do to a score, or to a cost against the level ``reference``."""
        if (column, reference) not in self._effects:
            predictions = None if reference else self.predictions
            named = {factor: reference} if reference else None
            self._effects[column, reference] = effects.effects(self.table, column, predictions, named, self.design)
        found = self._effects[column, reference]
        return found[found["factor"] == factor]

    def compare(self, score: str) -> pd.DataFrame:
        if score not in self._compared:
            self._compared[score] = stats.compare(self.table, score, self.predictions)
        return self._compared[score]

    def tied(self, score: str) -> pd.Index[Any]:
        """The best configuration and those that are not certainly worse."""
        compared = self.compare(score)
        return compared.index[compared["verdict"].isin(["best", "tie", "unknown"])]

    def near(self, score: str) -> pd.Index[Any]:
        """Those of the tie that lie within one standard error of the best, among which costs may decide."""
        compared = self.compare(score)
        near: pd.Index[Any] = compared.index[compared.index.isin(self.tied(score)) & compared["near"]]
        return near

    def row(self, number: Any, prefix: str | tuple[str, ...]) -> dict[str, Any]:
        """What is known of a configuration in the columns that begin so; the whole wide row would take long."""
        return {c: self._columns[c].at[number] for c in self._columns if c.startswith(prefix)}

    @cached_property
    def _columns(self) -> dict[str, pd.Series[Any]]:
        return {c: self.configurations[c] for c in self.configurations.columns}

    @cached_property
    def memory(self) -> str | None:
        return next((c for c in SHOWN_MEMORY if c in self.table and self.table[c].notna().any()), None)

    @cached_property
    def seeds(self) -> int:
        """The most successful seeds a configuration has."""
        return int(self.configurations["n"].max()) if len(self.configurations) else 0


def summary(task: Task) -> Iterator[str]:
    """The answers in short."""
    if not (task.table[stats.SUCCESS] == Status.success.name).any():
        yield "- No trial has succeeded, so there is nothing to recommend. See what ended them below."
        return
    if not task.scores:
        yield "- No trial was judged by an evaluation; costs are all that can be compared."
    if task.scores:
        yield from _advice(task, task.scores[0])
    if task.seeds == 1 and len(task.configurations) > 1:
        yield "- **One seed each**: all of this is of these trained models; other seeds may order them otherwise."
    for score in task.scores:
        yield _best(task, score)
        yield from _against_baselines(task, score)
    if task.scores:
        for factor in task.factors:
            yield from (f"- {sentence}" for sentence in of_factor(task, factor, task.scores[0])[:1])
    if bad := task.table[stats.SUCCESS].isin(WITHOUT_RESULT).sum():
        where = "see [what did not work](#what-did-not-work)"
        yield f"- {words.plural('trial', int(bad))} ended without a result: {where}."


def _best(task: Task, score: str) -> str:
    compared, what = task.compare(score), columns.score_name(score)
    best = compared.index[0]
    figure = f"{what} {value_of(task, score, best)}"
    if len(compared) == 1:
        return (
            f"- **{what}**: `{task.labels[best]}` reaches {figure}; there is no other configuration to compare it with."
        )
    others = [n for n in task.tied(score) if n != best]
    if compared["verdict"].eq("unknown").any():
        best_is = f"the best figure is that of `{task.labels[best]}`, {figure}"
        return f"- **{what}**: {best_is}; how far chance reaches is not known."
    if len(others) == len(compared) - 1:
        gap = words.difference(compared.iloc[-1])
        every = "both" if len(compared) == 2 else f"all {len(compared)}"
        return (
            f"- **{what}**: {every} configurations are a tie; the best figure is that of "
            f"`{task.labels[best]}`, {figure}, and the last differs by {gap}."
        )
    if not others:
        second = compared.iloc[1]
        return (
            f"- **{what}**: `{task.labels[best]}` is best, {figure}; "
            f"the next, `{task.labels[compared.index[1]]}`, is worse by {words.difference(second)}"
            + {2: ".", 3: ", and so is the third."}.get(len(compared), f", and so are the other {len(compared) - 2:,}.")
        )
    named = "; ".join(f"`{task.labels[n]}`" for n in others[:6])
    named += f"; and {len(others) - 6} more" if len(others) > 6 else ""
    return (
        f"- **{what}**: the best figure is that of `{task.labels[best]}`, {figure}. It is a tie with {named}. "
        f"{words.plural('configuration', len(compared) - 1 - len(others))} of {len(compared):,} "
        f"{'is' if len(compared) - 1 - len(others) == 1 else 'are'} worse than one of these."
    )


def _against_baselines(task: Task, score: str) -> Iterator[str]:
    """The untouched base, always the same answer, and what makes a score worth less than it looks."""
    name, metric = columns.evaluation(score)
    sign, best = columns.direction(score) or 1, task.compare(score).index[0]
    row = task.row(best, f"eval_info.{name}.")
    bound = row[f"{score}.low"] if sign > 0 else row[f"{score}.high"]
    base = row.get(_base(score), math.nan)
    if words.known(base):
        if no_gain(task, score):
            yield f"- **No gain shown** over the untouched base, which scores {words.number(base)} on the same rows."
        else:
            yield f"- The untouched base scores {words.number(base)} on the same rows."
    yield from _chance(row, name, metric, bound if sign > 0 else math.nan)
    flags = [c for c in task.configurations.columns if c.startswith(f"eval_info.{name}.") and c.endswith("degenerate")]
    flags = [c for c in flags if not c.startswith(f"eval_info.{name}.base_")]
    if flags and (count := int((task.configurations[flags].astype("Float64") > 0).any(axis=1).sum())):
        always = f"nearly always gave the same answer on {name}, whatever was asked"
        yield f"- {words.plural('configuration', count)} {always}."
    seen = row.get(f"eval_info.{name}.seen_in_training", math.nan)
    if words.known(seen) and seen > 0:
        yield f"- **{seen:.0f} test rows of {name} were trained on**; the score says less than it seems to."


def _chance(row: Mapping[str, Any], name: str, metric: str, bound: float) -> Iterator[str]:
    """What always giving the same answer scores, and guessing; ``bound`` is how low the best score may lie."""
    facts = {key.removeprefix(f"eval_info.{name}."): value for key, value in row.items() if words.known(value)}
    majority, random = (baseline(facts, metric, which) for which in ("majority", "random"))
    if majority is None:
        return
    guessing = "" if random is None else f", guessing {words.number(random)}"
    mark, always = "", "Always"
    if words.known(bound) and bound <= max(majority, random or 0.0):
        mark, always = "**Chance level**: ", "always"
    yield f"- {mark}{always} giving the most frequent answer scores {words.number(majority)}{guessing}."


def _base(score: str) -> str:
    return "eval_info.{}.base_{}.value".format(*columns.evaluation(score))


def no_gain(task: Task, score: str) -> bool:
    """Whether even the best configuration is not shown to be better than the untouched base."""
    best, sign, base = task.compare(score).index[0], columns.direction(score) or 1, _base(score)
    row = task.row(best, (score, base.removesuffix("value")))
    bound, stderr = row[f"{score}.{'low' if sign > 0 else 'high'}"], row.get(f"{base.removesuffix('value')}stderr", 0.0)
    if not (words.known(row.get(base)) and words.known(bound)):
        return False
    return bool(sign * (bound - row[base]) <= 1.96 * (stderr if words.known(stderr) else 0.0))


def _advice(task: Task, score: str) -> Iterator[str]:
    """The one configuration to use: of those near the best the smallest adapter, of about equal ones the fastest."""
    near, configs, score_name = task.near(score), task.configurations, columns.score_name(score)
    if len(task.compare(score)) < 2:
        return
    if no_gain(task, score):
        yield f"- **Use none of these**: the best is not shown to be better than the untouched base, by {score_name}."
        return
    chosen, why = near[0], f"the best by {score_name}"
    if len(near) > 1:
        sizes = configs.loc[near, ADAPTER].astype(float) if ADAPTER in configs else pd.Series(1.0, index=near)
        small = sizes[sizes <= 1.05 * sizes.min()].index if sizes.notna().any() else near
        seconds = configs.loc[small, SECONDS].astype(float) if SECONDS in configs else pd.Series(dtype=float)
        timed = len(seconds) > 0 and bool(seconds.notna().all())
        chosen = seconds.idxmin() if timed else small[0]
        why = f"of the {len(near)} within one standard error of the best {score_name}, the smallest adapter"
        if len(small) > 1:
            why += f", and of those within 5% of it the {'fastest' if timed else 'best'}"
    costs = [
        f"{words.cost(c, configs.loc[chosen, c])} {said}"
        for c, said in (
            (ADAPTER, "adapter"),
            (SECONDS, "of training"),
            (task.memory or "", columns.factor_name(task.memory or "")),
        )
        if c in configs and words.known(configs.loc[chosen, c])
    ]
    yield f"- **Use `{task.labels[chosen]}`**: {value_of(task, score, chosen)}, {', '.join(costs)}; {why}."


def of_factor(task: Task, factor: str, score: str) -> list[str]:
    """What the data says of a factor, in sentences."""
    found = task.effects(score, factor)
    what, sentences = columns.score_name(score), []
    is_ = "is" if task.seeds > 1 else "came out"
    if factor == RANK and (line := _enough_rank(task, score)):
        return [line]
    if len(found) > 2:
        return [_several(factor, score, found)]
    for row in found.to_dict("records"):
        level, reference = columns.in_words(factor, row["level"]), columns.in_words(factor, row["reference"])
        where = f" ({row['agreeing']} of {row['contexts']} settings agree)" if row["contexts"] > 1 else ""
        if row["verdict"] == "tie":
            bound = max(abs(row["low"]), abs(row["high"]))
            sentences.append(
                f"{what}: no difference between `{level}` and `{reference}` is shown "
                f"({words.difference(row)}); one of more than {words.amount(bound, row['scale'])} is unlikely."
            )
        elif row["verdict"] in ("worse", "better"):
            sentences.append(
                f"{what}: `{level}` {is_} {row['verdict']} than `{reference}` by {words.difference(row)}, "
                f"p {words.p_is(row['p_adjusted'])}{where}."
            )
        else:
            sentences.append(
                f"{what}: `{level}` differs from `{reference}` by {words.difference(row)}; chance is not known."
            )
    return sentences


def _several(factor: str, score: str, found: pd.DataFrame) -> str:
    """One sentence of a factor with many levels."""
    reference = columns.in_words(factor, found["reference"].iloc[0])
    parts = [f"{columns.score_name(score)}: `{reference}` has the best figure"]
    for verdict, said in (("tie", "no difference is shown from"), ("worse", "worse are"), ("unknown", "next to it")):
        those = found[found["verdict"] == verdict].to_dict("records")
        if those:
            named = (f"`{columns.in_words(factor, row['level'])}` ({words.difference(row)})" for row in those[:8])
            parts.append(f"{said} {', '.join(named)}" + (f" and {len(those) - 8} more" if len(those) > 8 else ""))
    return "; ".join(parts) + "."


def _enough_rank(task: Task, score: str) -> str:
    found = effects.returns(task.table, score, task.predictions, plan=task.design)
    if found.empty or found["verdict"].eq("unknown").any():
        return ""
    tried, of_these = task.design.levels[RANK], ", ".join(f"{level:g}" for level in found["level"])
    what = columns.score_name(score)
    if len(found) < tried[tried != ""].nunique():
        what += f", where only the rank differs ({of_these})"
    enough = found[found["verdict"].isin(["best", "tie"])].iloc[0]
    best, last = found[found["verdict"] == "best"].iloc[0], found.iloc[-1]
    before = found.iloc[-2]["level"]
    gain = words.difference(
        {"difference": last["gain"], "low": last["gain_low"], "high": last["gain_high"], "scale": words.scale(score)}
    )
    doubling = (
        f"The step from rank {before:g} to {last['level']:g} changed it by {gain} per doubling, plus being better."
    )
    if enough["level"] < best["level"]:
        return (
            f"{what}: rank {enough['level']:g} is the smallest that is not separable from the "
            f"best, {best['level']:g} ({words.difference(enough)}). {doubling}"
        )
    if best["level"] == last["level"] and last["gain_low"] > 0:
        end = "the largest tried, is best, and returns have not ended there"
        return f"{what}: rank {best['level']:g}, {end}. {doubling}"
    smallest = best["level"] == found["level"].iloc[0]
    end = (
        ", the smallest tried, has the best figure" if smallest else " has the best figure; the smaller ones are worse"
    )
    return f"{what}: rank {best['level']:g}{end}. {doubling}"


def cost_findings(task: Task, factor: str, costs: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """What the levels of a factor certainly cost in time and memory, in sentences."""
    for column, found in costs.items():
        for row in found.to_dict("records"):
            certain = row["verdict"] in ("worse", "better")
            if certain and abs(row["difference"]) >= 0.01 and column in (SECONDS, DEVICE_MEMORY.column):
                level, reference = columns.in_words(factor, row["level"]), columns.in_words(factor, row["reference"])
                times = f"{1 + row['difference']:.2f} times [{1 + row['low']:.2f}, {1 + row['high']:.2f}]"
                yield f"{columns.factor_name(column)}: `{level}` takes {times} that of `{reference}`."


def value_of(task: Task, score: str, number: Any) -> str:
    """A score with its interval."""
    row = task.row(number, score)
    low, high = row.get(f"{score}.low", math.nan), row.get(f"{score}.high", math.nan)
    return words.number(row[score]) + (
        f" [{words.number(low)}, {words.number(high)}]" if words.known(low) and words.known(high) else ""
    )
