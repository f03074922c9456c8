"""What a study found, sentence by sentence: what to use, what is best, what each factor does.

Every sentence is made from figures of the study; where the data does not tell, the sentence is not there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from peftsweep.answer import columns, effects, stats, words
from peftsweep.answer.columns import DEVICE_MEMORY, RANK, WITHOUT_RESULT
from peftsweep.answer.effects import VARYING, Moved
from peftsweep.answer.words import ADAPTER, SECONDS, SHOWN_MEMORY
from peftsweep.metrics import baseline
from peftsweep.naming import Names
from peftsweep.record import Status

MOST_MOVED = 6  # settings that move with a factor: with more, nothing is put down to it


@dataclass
class Task:
    """The trials of one model on one dataset, which can be compared with each other."""

    name: str
    table: pd.DataFrame
    predictions: stats.Predictions | None
    _tested: dict[str, stats.Tested | None] = field(default_factory=dict)
    _compared: dict[str, pd.DataFrame] = field(default_factory=dict)
    _effects: dict[tuple[str, str, str | None], pd.DataFrame] = field(default_factory=dict)

    @cached_property
    def summary(self) -> list[str]:
        """The answers in short."""
        return list(summary(self))

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

    def tested(self, column: str) -> stats.Tested | None:
        """Every pair of configurations: all that is said of two of them is read from here."""
        if column not in self._tested:
            predictions = self.predictions if column in self.scores else None
            self._tested[column] = stats.tested(self.table, column, predictions)
        return self._tested[column]

    def compare(self, score: str) -> pd.DataFrame:
        """Every configuration against the best one."""
        if score not in self._compared:
            self._compared[score] = stats.compare(self.table, score, known=self.tested(score))
        return self._compared[score]

    def unnamed(self, first: int, second: int) -> list[Moved]:
        """The settings that two configurations differ in and that follow from those in their names."""
        one, other = self.design.levels.loc[[first, second]].to_numpy().tolist()
        named = [factor for factor, a, b in zip(self.factors, one, other, strict=True) if a != b]
        return self.design.moved([first], [second], named)

    def tied(self, score: str) -> pd.Index[Any]:
        """The best configuration and those that are not certainly worse."""
        compared = self.compare(score)
        return compared.index[compared["verdict"].isin(["best", "tie", "unknown"])]

    def near(self, score: str) -> pd.Index[Any]:
        """Those of the tie that lie within one standard error of the best, among which costs may decide.

        What is not shown to be better than the untouched base is left out, as nothing is gained by using it.
        """
        compared, useful = self.compare(score), self.useful(score)
        near: pd.Index[Any] = compared.index[
            compared["near"] & compared.index.isin(self.tied(score).intersection(useful))
        ]
        return near if len(near) else useful[:1]

    def useful(self, score: str) -> pd.Index[Any]:
        """Those that are shown to be better than the untouched base, the best first; all where that is not known."""
        compared = self.compare(score)
        return compared.index[compared["gained"].isin(["better", "unknown"])]

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
        alone = "there is no other configuration to compare it with"
        return f"- **{what}**: {words.code(task.labels[best])} reaches {figure}; {alone}."
    others = [n for n in task.tied(score) if n != best]
    if compared["verdict"].eq("unknown").any():
        best_is = f"the best figure is that of {words.code(task.labels[best])}, {figure}"
        return f"- **{what}**: {best_is}; how far chance reaches is not known."
    if len(others) == len(compared) - 1:
        last = compared.iloc[-1]
        gap = f"{words.difference(last)}, p {words.p_is(last['p_adjusted'])}"
        every = "both" if len(compared) == 2 else f"all {len(compared)}"
        moved = also(task, task.unnamed(best, compared.index[-1])) if len(compared) == 2 else ""
        return (
            f"- **{what}**: {every} configurations are a tie; the best figure is that of "
            f"{words.code(task.labels[best])}, {figure}, and the last differs by {gap}{moved}."
        )
    known = task.tested(score)
    assert known is not None  # as there is a score to rank
    worse = [n for n in compared.index if n not in others and n != best]
    if not others:
        second, rest = compared.iloc[1], [known.verdict(n, best) for n in worse[1:]]
        p = words.p_is(second["p_adjusted"])
        following = words.code(task.labels[compared.index[1]])
        said = f"{words.code(task.labels[best])} is best, {figure}; the next, {following}, is worse by "
        said += f"{words.difference(second)}, p {p}"
        if so := rest.count("worse"):
            said += ", and so is the third" if len(compared) == 3 else f", and so are {so:,} others"
        if (left := len(rest) - so) > 0:
            said += f"; {left:,} more {'is' if left == 1 else 'are'} worse than another one"
        return f"- **{what}**: {said}{also(task, task.unnamed(best, compared.index[1]))}."
    named = "; ".join(words.code(task.labels[n]) for n in others[:6])
    named += f"; and {len(others) - 6} more" if len(others) > 6 else ""
    beaten = all(any(known.verdict(n, other) == "worse" for other in [best, *others]) for n in worse)
    return (
        f"- **{what}**: the best figure is that of {words.code(task.labels[best])}, {figure}. It is a tie with {named}"
        f"{also(task, task.unnamed(best, others[0])) if len(others) == 1 else ''}. "
        f"{words.plural('configuration', len(worse))} of {len(compared):,} {'is' if len(worse) == 1 else 'are'} "
        f"worse than {'one of these' if beaten else 'another one'}."
    )


def also(task: Task, moved: Sequence[Moved]) -> str:
    """What else two configurations differ in, as the end of a sentence that names the first and then the second."""
    if len(moved) > MOST_MOVED:
        return f"; they also differ in {len(moved)} other settings ({_keys(task, moved)})"
    value = task.names.value
    parts = [f"{task.names.key(m.key)} ({value(m.key, m.value)}, {value(m.key, m.reference_value)})" for m in moved]
    return f"; they also differ in {', '.join(parts)}" if parts else ""


def _keys(task: Task, moved: Iterable[Moved]) -> str:
    return ", ".join(dict.fromkeys(task.names.key(one.key) for one in moved))


def _against_baselines(task: Task, score: str) -> Iterator[str]:
    """The untouched base, always the same answer, and what makes a score worth less than it looks."""
    name, metric = columns.evaluation(score)
    sign, best = columns.direction(score) or 1, task.compare(score).index[0]
    row = task.row(best, f"eval_info.{name}.")
    bound = row[f"{score}.low"] if sign > 0 else row[f"{score}.high"]
    base = row.get(columns.base_of(score), math.nan)
    if words.known(base):
        yield _over_base(task, score, words.number(base))
    yield from _chance(row, name, metric, bound if sign > 0 else math.nan)
    flags = [c for c in task.configurations.columns if c.startswith(f"eval_info.{name}.") and c.endswith("degenerate")]
    flags = [c for c in flags if not c.startswith(f"eval_info.{name}.base_")]
    if flags and (count := int((task.configurations[flags].astype("Float64") > 0).any(axis=1).sum())):
        always = f"nearly always gave the same answer on {name}, whatever was asked"
        yield f"- {words.plural('configuration', count)} {always}."
    seen = row.get(f"eval_info.{name}.seen_in_training", math.nan)
    if words.known(seen) and seen > 0:
        yield f"- **{seen:.0f} test rows of {name} were trained on**; the score says less than it seems to."


def _over_base(task: Task, score: str, base: str) -> str:
    """What the best configuration gains over the untouched base, which scores ``base``."""
    compared = task.compare(score)
    best, said = compared.iloc[0], f"The untouched base scores {base} on the same rows."
    if no_gain(task, score):
        said = f"**No gain shown** over the untouched base, which scores {base} on the same rows."
    if not words.known(best["gain_p_adjusted"]):
        return f"- {said}"
    parts = {"difference": best["gain"], "low": best["gain_low"], "high": best["gain_high"], "scale": best["scale"]}
    gain = f"{words.difference(parts)}, p {words.p_is(best['gain_p_adjusted'])}"
    as_if = "" if compared.attrs["gains_paired"] else ", as if each had rows of its own"
    return f"- {said} {words.code(task.labels[compared.index[0]])} against it: {gain}{as_if}."


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


def no_gain(task: Task, score: str) -> bool:
    """Whether no configuration is shown to be better than the untouched base."""
    return task.useful(score).empty


def _advice(task: Task, score: str) -> Iterator[str]:
    """The one configuration to use: of those near the best the smallest adapter, of about equal ones the fastest."""
    near, configs, score_name = task.near(score), task.configurations, columns.score_name(score)
    if len(task.compare(score)) < 2:
        return
    if no_gain(task, score):
        yield f"- **Use none of these**: none is shown to be better than the untouched base, by {score_name}."
        return
    chosen, why = near[0], f"the best by {score_name}"
    if chosen != task.compare(score).index[0]:
        why += " of those that are shown to be better than the untouched base"
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
    yield f"- **Use {words.code(task.labels[chosen])}**: {value_of(task, score, chosen)}, {', '.join(costs)}; {why}."


def of_factor(task: Task, factor: str, score: str) -> list[str]:
    """What the data says of a factor, in sentences; of a setting that moves with it each says so."""
    found = task.effects(score, factor)
    if found.empty:
        return []
    moved = [one for several in found["moved"] for one in several]
    if len({one.key for one in moved}) > MOST_MOVED:
        return [_not_told(task, factor, score, found, moved)]
    if factor == RANK and (line := _enough_rank(task, score)):
        return [line]
    levels = task.design.levels[factor]
    if levels[levels != ""].nunique() > 2:
        return [_several(task, factor, score, found)]
    return [_two(task, factor, score, row) for row in _rows(found)]


def _rows(found: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in found.to_dict("records")]


def _two(task: Task, factor: str, score: str, row: Mapping[str, Any]) -> str:
    """One sentence of a factor of two levels."""
    what, p = columns.score_name(score), f"p {words.p_is(row['p_adjusted'])}" if words.known(row["p_adjusted"]) else ""
    level, reference = (words.code(task.names.setting(factor, row[name])) for name in ("level", "reference"))
    what += _over(task, row)
    ends = f"from {words.number(row['reference_value'])} to {words.number(row['value'])}"
    better = "lower" if columns.lower_is_better(score) else "higher"
    moved = _with(task, factor, [row])
    if row["verdict"] == "tie":
        bound = max(abs(row["low"]), abs(row["high"]))
        return (
            f"{what}: no difference between {level} and {reference} is shown ({words.difference(row)}, {p}); "
            f"one of more than {words.amount(bound, row['scale'])} is unlikely{moved}."
        )
    if row["verdict"] == "unknown":
        return (
            f"{what}: {level} differs from {reference}, {ends} ({words.difference(row)}); chance is not known{moved}."
        )
    is_ = "is" if task.seeds > 1 else "came out"
    agree = f", {row['agreeing']} of {row['contexts']} settings agree" if row["contexts"] > 1 else ""
    return (
        f"{what}: {level} {is_} {row['verdict']} than {reference}, {ends} ({words.difference(row)}; {better} is "
        f"better), {p}{agree}{moved}."
    )


def _over(task: Task, row: Mapping[str, Any]) -> str:
    """In which settings of the other factors two levels were compared, where there is more than one."""
    if row["contexts"] > 1:
        return f", on average over {row['contexts']} settings of the rest"
    within = [task.names.setting(factor, level) for factor, level in row["within"].items()]
    return f", with {', '.join(within)}" if within else ""


def _several(task: Task, factor: str, score: str, found: pd.DataFrame) -> str:
    """One sentence of a factor of three or more levels, which names all of them."""
    rows, first = _rows(found), found.iloc[0]
    scopes = [_over(task, row) for row in rows]
    same = len(set(scopes)) == 1
    reference = words.code(task.names.setting(factor, first["reference"]))
    ahead = "is held against the others"  # of levels that share few settings each may be ahead of another
    if ((columns.direction(score) or 1) * found["difference"] <= 0).all():
        ahead = "has the best figure"
    figure = f", {words.number(first['reference_value'])}" if found["reference_value"].nunique() == 1 else ""
    parts = [f"{columns.score_name(score)}{scopes[0] if same else ''}: {reference} {ahead}{figure}"]
    heads = {
        "tie": "no difference from it is shown",
        "worse": "worse",
        "better": "better",
        "unknown": "chance is not known",
    }
    for verdict, said in heads.items():
        those = [row for row in rows if row["verdict"] == verdict]
        if those:
            parts.append(f"{said}: {', '.join(_level(task, factor, row, several=not same) for row in those)}")
    levels = task.design.levels[factor]
    missing = sorted(set(levels) - {"", first["reference"], *found["level"]}, key=words.sortable)
    if missing:
        named = ", ".join(words.code(task.names.setting(factor, level)) for level in missing)
        parts.append(f"no setting of the rest is shared with {named}")
    better = "lower" if columns.lower_is_better(score) else "higher"
    return "; ".join(parts) + f"; {better} is better{_with(task, factor, rows)}."


def _level(task: Task, factor: str, row: Mapping[str, Any], *, several: bool) -> str:
    p = f", p {words.p_is(row['p_adjusted'])}" if words.known(row["p_adjusted"]) else ""
    over = _over(task, row) if several else ""
    figure = f"{words.number(row['value'])}" + (f" against {words.number(row['reference_value'])}" if several else "")
    figure += f", {words.difference(row)}"
    return f"{words.code(task.names.setting(factor, row['level']))} ({figure}{p}{over})"


def _with(task: Task, factor: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The settings that move with a factor, with their values at each level, as the end of a sentence."""
    value, found = task.names.value, dict[str, dict[str, str]]()
    reference = str(rows[0]["reference"])
    for row in rows:
        for one in row["moved"]:
            of_key = found.setdefault(one.key, {})
            of_key[str(row["level"])] = value(one.key, one.value)
            of_key[reference] = value(one.key, one.reference_value)
    if not found:
        return ""
    levels = sorted({reference, *(str(row["level"]) for row in rows)}, key=words.sortable)
    parts = []
    for key, of_key in found.items():
        values = [of_key.get(level, of_key[reference]) for level in levels]
        parts.append(f"{task.names.key(key)} ({', '.join(values if set(values) != {VARYING} else [VARYING])})")
    told = ", ".join(value(factor, level) for level in levels)
    return f"; with the {columns.factor_name(factor)} ({told}) moved {', '.join(parts)}"


def _not_told(task: Task, factor: str, score: str, found: pd.DataFrame, moved: Sequence[Moved]) -> str:
    """Where levels differ in so much else that a difference cannot be put down to the factor."""
    named = [*found["level"], found["reference"].iloc[0]]
    levels = ", ".join(words.code(task.names.setting(factor, level)) for level in sorted(named, key=words.sortable))
    return (
        f"{columns.score_name(score)}: {levels} also differ in {len({one.key for one in moved})} other settings "
        f"({_keys(task, moved)}), so that no difference is put down to the {columns.factor_name(factor)}."
    )


def _enough_rank(task: Task, score: str) -> str:
    """How large a rank has to be, and what the last step brought."""
    found = effects.returns(task.table, score, plan=task.design, known=task.tested(score))
    if found.empty or found["verdict"].eq("unknown").any():
        return ""
    rows = [row | {"level": f"{row['level']:g}"} for row in _rows(found)]
    best, last, smallest = next(row for row in rows if row["verdict"] == "best"), rows[-1], rows[0]
    enough = next(row for row in rows if row["verdict"] in ("best", "tie"))
    what, scope = columns.score_name(score), _over(task, last)
    moved = _with(task, RANK, [row | {"reference": best["level"]} for row in rows])
    tried = task.design.levels[RANK]
    if len(rows) < tried[tried != ""].nunique():
        what += f", {'among the ranks' if moved else 'where only the rank differs'} "
        what, scope = f"{what}({', '.join(row['level'] for row in rows)})", scope.replace(", with ", "; all with ")
    else:
        what, scope = what + scope, ""
    if enough is not best:
        said = f"rank {enough['level']} is the smallest that is not separable from the best, {best['level']} "
        said += f"({words.difference(enough)}, p {words.p_is(enough['p_adjusted'])})"
    elif best is last:
        said = f"rank {best['level']}, the largest tried, is best, and returns have not ended there"
    else:
        said = f"rank {best['level']}{', the smallest tried,' if best is smallest else ''} has the best figure"
    others = _by_verdict([row for row in rows if row is not best and row is not enough])
    return f"{what}: {said}{others}{scope}. {_last_step(score, rows)}{moved}."


def _last_step(score: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the largest rank changed against the one before it."""
    before, last = rows[-2:]
    step = {"difference": last["step"], "low": last["step_low"], "high": last["step_high"], "scale": last["scale"]}
    p = f", p {words.p_is(last['step_p'])}" if words.known(last["step_p"]) else ""
    better = "lower" if columns.lower_is_better(score) else "higher"
    ends = f"from {words.number(before['value'])} to {words.number(last['value'])}"
    since = f"From rank {before['level']} to {last['level']} it went {ends}"
    return f"{since} ({words.difference(step)}{p}; {better} is better)"


def _by_verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Those of these ranks that are worse than the best, and those that are not shown to be."""
    text = ""
    for verdict, said in (("worse", "worse than the best"), ("tie", "no difference from the best is shown")):
        those = [row for row in rows if row["verdict"] == verdict]
        figures = (f"{words.number(row['value'])}, p {words.p_is(row['p_adjusted'])}" for row in those)
        named = ", ".join(f"{row['level']} ({figure})" for row, figure in zip(those, figures, strict=True))
        text += f"; {said}: {named}" if those else ""
    return text


def cost_findings(task: Task, factor: str, costs: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """What the levels of a factor certainly cost in time and memory, in sentences."""
    for column, found in costs.items():
        for row in _rows(found):
            certain = row["verdict"] in ("worse", "better")
            if certain and abs(row["difference"]) >= 0.01 and column in (SECONDS, DEVICE_MEMORY.column):
                level, reference = (
                    words.code(task.names.setting(factor, row[name])) for name in ("level", "reference")
                )
                if len(row["moved"]) > MOST_MOVED:
                    continue
                times = f"{1 + row['difference']:.2f} times [{1 + row['low']:.2f}, {1 + row['high']:.2f}]"
                name = f"{columns.factor_name(column)}{_over(task, row)}"
                yield f"{name}: {level} takes {times} that of {reference}{_with(task, factor, [row])}."


def value_of(task: Task, score: str, number: Any) -> str:
    """A score with its interval."""
    row = task.row(number, score)
    low, high = row.get(f"{score}.low", math.nan), row.get(f"{score}.high", math.nan)
    return words.number(row[score]) + (
        f" [{words.number(low)}, {words.number(high)}]" if words.known(low) and words.known(high) else ""
    )
