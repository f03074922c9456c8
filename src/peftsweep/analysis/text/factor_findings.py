"""What each factor of a task does, as sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from peftsweep.analysis.statistics import effects
from peftsweep.analysis.statistics.effects import VARYING, Moved
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import DEVICE_MEMORY, RANK
from peftsweep.analysis.text import words
from peftsweep.analysis.text.words import SECONDS

MAX_MOVED_SETTINGS = 6  # where more settings than these change with a factor, no difference is attributed to it


def moved_keys(task: Task, moved: Iterable[Moved]) -> str:
    """The keys of the settings that ``moved``, each once, separated by commas."""
    return ", ".join(dict.fromkeys(task.names.key(one.key) for one in moved))


def score_findings(task: Task, factor: str, score: str) -> list[str]:
    """Sentences on what a factor did to a score; each names the settings that changed with the factor."""
    found = task.effects(score, factor)
    if found.empty:
        return []
    moved = [one for several in found["moved"] for one in several]
    if len({one.key for one in moved}) > MAX_MOVED_SETTINGS:
        return [_too_many_moved(task, factor, score, found, moved)]
    if factor == RANK and (line := _enough_rank(task, score)):
        return [line]
    levels = task.design.levels[factor]
    if levels[levels != ""].nunique() > 2:
        return [_several_levels(task, factor, score, found)]
    return [_two_levels(task, factor, score, row) for row in _rows(found)]


def _rows(found: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in found.to_dict("records")]


def _two_levels(task: Task, factor: str, score: str, row: Mapping[str, Any]) -> str:
    """One sentence of a factor of two levels."""
    what, apart = columns.score_name(score), words.tested(row, row["p_adjusted"])
    level, reference = (words.code(task.names.setting(factor, row[name])) for name in ("level", "reference"))
    what += _compared_settings(task, row)
    ends = f"from {words.number(row['reference_value'])} to {words.number(row['value'])}"
    moved = _moved_settings(task, factor, [row])
    if row["verdict"] == "tie":
        bound = max(abs(row["low"]), abs(row["high"]))
        return (
            f"{what}: no difference between {level} and {reference} is shown ({apart}); "
            f"one of more than {words.amount(bound, row['scale'])} is unlikely{_depends(row)}{moved}."
        )
    if row["verdict"] == "unknown":
        differs = f"{what}: {level} differs from {reference}, {ends} ({words.difference(row)})"
        return f"{differs}; the uncertainty is not known{moved}."
    is_ = "is" if task.seeds > 1 else "came out"
    agree = f", {row['agreeing']} of {row['contexts']} settings agree" if row["contexts"] > 1 else ""
    return (
        f"{what}: {level} {is_} {row['verdict']} than {reference}, {ends} ({words.difference(row)}; "
        f"{columns.better(score)} is better), p {words.p_is(row['p_adjusted'])}{agree}{_depends(row)}{moved}."
    )


def _depends(row: Mapping[str, Any]) -> str:
    """A sentence that the average hides opposite differences, where the settings show both."""
    if not row["better_in"] or not row["worse_in"]:
        return ""
    return (
        f", but it depends on the other factors: shown to be better in {row['better_in']} of these settings and worse "
        f"in {row['worse_in']}"
    )


def _compared_settings(task: Task, row: Mapping[str, Any]) -> str:
    """The settings of the other factors in which two levels were compared, where there are other factors."""
    if row["contexts"] > 1:
        return f", on average over {row['contexts']} settings of the other factors"
    within = [task.names.setting(factor, level) for factor, level in row["within"].items()]
    return f", with {', '.join(within)}" if within else ""


def _several_levels(task: Task, factor: str, score: str, found: pd.DataFrame) -> str:
    """One sentence of a factor of three or more levels, which names all of them."""
    rows, first = _rows(found), found.iloc[0]
    scopes = [_compared_settings(task, row) for row in rows]
    same = len(set(scopes)) == 1
    reference = words.code(task.names.setting(factor, first["reference"]))
    ahead = "is compared with the others"  # of levels that share few settings each may be ahead of another
    if ((columns.direction(score) or 1) * found["difference"] <= 0).all():
        ahead = "has the best figure"
    figure = f", {words.number(first['reference_value'])}" if found["reference_value"].nunique() == 1 else ""
    parts = [f"{columns.score_name(score)}{scopes[0] if same else ''}: {reference} {ahead}{figure}"]
    heads = {
        "tie": "no difference from it is shown",
        "worse": "worse",
        "better": "better",
        "unknown": "the uncertainty is not known",
    }
    for verdict, heading in heads.items():
        those = [row for row in rows if row["verdict"] == verdict]
        if those:
            parts.append(f"{heading}: {', '.join(_level(task, factor, row, several=not same) for row in those)}")
    levels = task.design.levels[factor]
    missing = sorted(set(levels) - {"", first["reference"], *found["level"]}, key=columns.sortable)
    if missing:
        named = ", ".join(words.code(task.names.setting(factor, level)) for level in missing)
        parts.append(f"{named} share no settings of the other factors with it")
    return "; ".join(parts) + f"; {columns.better(score)} is better{_moved_settings(task, factor, rows)}."


def _level(task: Task, factor: str, row: Mapping[str, Any], *, several: bool) -> str:
    over = _compared_settings(task, row) if several else ""
    figure = f"{words.number(row['value'])}" + (f" against {words.number(row['reference_value'])}" if several else "")
    figure += f", {words.tested(row, row['p_adjusted'])}{_depends(row)}"
    return f"{words.code(task.names.setting(factor, row['level']))} ({figure}{over})"


def _moved_settings(task: Task, factor: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The end of a sentence: the settings that changed with a factor, with their values at each level."""
    value, found = task.names.value, dict[str, dict[str, str]]()
    reference = str(rows[0]["reference"])
    for row in rows:
        for one in row["moved"]:
            of_key = found.setdefault(one.key, {})
            of_key[str(row["level"])] = value(one.key, one.value)
            of_key[reference] = value(one.key, one.reference_value)
    if not found:
        return ""
    levels = sorted({reference, *(str(row["level"]) for row in rows)}, key=columns.sortable)
    parts = []
    for key, of_key in found.items():
        values = [of_key.get(level, of_key[reference]) for level in levels]
        parts.append(f"{task.names.key(key)} ({', '.join(values if set(values) != {VARYING} else [VARYING])})")
    levels_text = ", ".join(value(factor, level) for level in levels)
    return f"; together with the {columns.factor_name(factor)} ({levels_text}) changed {', '.join(parts)}"


def _too_many_moved(task: Task, factor: str, score: str, found: pd.DataFrame, moved: Sequence[Moved]) -> str:
    """The sentence where levels differ in too many other settings to attribute a difference to the factor."""
    named = [*found["level"], found["reference"].iloc[0]]
    levels = ", ".join(words.code(task.names.setting(factor, level)) for level in sorted(named, key=columns.sortable))
    return (
        f"{columns.score_name(score)}: {levels} also differ in {len({one.key for one in moved})} other settings "
        f"({moved_keys(task, moved)}), so that no difference is attributed to the {columns.factor_name(factor)}."
    )


def _enough_rank(task: Task, score: str) -> str:
    """The smallest rank that ties with the best one, and what the largest rank changed."""
    found = effects.returns(task.table, score, plan=task.design, known=task.tested(score))
    if found.empty or found["verdict"].eq("unknown").any():
        return ""
    rows = [row | {"level": f"{row['level']:g}"} for row in _rows(found)]
    best, last, smallest = next(row for row in rows if row["verdict"] == "best"), rows[-1], rows[0]
    enough = next(row for row in rows if row["verdict"] in ("best", "tie"))
    what, scope = columns.score_name(score), _compared_settings(task, last)
    moved = _moved_settings(task, RANK, [row | {"reference": best["level"]} for row in rows])
    tried = task.design.levels[RANK]
    if len(rows) < tried[tried != ""].nunique():
        what += f", {'among the ranks' if moved else 'where only the rank differs'} "
        what, scope = f"{what}({', '.join(row['level'] for row in rows)})", scope.replace(", with ", "; all with ")
    else:
        what, scope = what + scope, ""
    if len({row["value"] for row in rows}) == 1:
        ranks = ", ".join(row["level"] for row in rows)
        return f"{what}: ranks {ranks} have the same figure, {words.number(best['value'])}{scope}{moved}."
    if enough is not best:
        text = f"rank {enough['level']} is the smallest that is not separable from the best, {best['level']} "
        text += f"({words.tested(enough, enough['p_adjusted'])}{_depends(enough)})"
    elif best is last:
        text = f"rank {best['level']}, the largest tried, is best, and a larger one may be better still"
    else:
        text = f"rank {best['level']}{', the smallest tried,' if best is smallest else ''} has the best figure"
    others = _other_ranks([row for row in rows if row is not best and row is not enough])
    return f"{what}: {text}{others}{scope}. {_last_step(score, rows)}{moved}."


def _last_step(score: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the largest rank changed against the one before it."""
    before, last = rows[-2:]
    step = {"difference": last["step"], "low": last["step_low"], "high": last["step_high"], "scale": last["scale"]}
    ends = f"from {words.number(before['value'])} to {words.number(last['value'])}"
    since = f"From rank {before['level']} to {last['level']} it went {ends}"
    return f"{since} ({words.tested(step, last['step_p'])}; {columns.better(score)} is better)"


def _other_ranks(rows: Sequence[Mapping[str, Any]]) -> str:
    """The ranks that are worse than the best one, and the ranks that tie with it."""
    text = ""
    for verdict, meaning in (("worse", "worse than the best"), ("tie", "no difference from the best is shown")):
        those = [row for row in rows if row["verdict"] == verdict]
        figures = (f"{words.number(row['value'])}, p {words.p_is(row['p_adjusted'])}{_depends(row)}" for row in those)
        named = ", ".join(f"{row['level']} ({figure})" for row, figure in zip(those, figures, strict=True))
        text += f"; {meaning}: {named}" if those else ""
    return text


def cost_findings(task: Task, factor: str, costs: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """Sentences on the time and memory of a factor's levels, where a difference is shown."""
    for column, found in costs.items():
        for row in _rows(found):
            certain = row["verdict"] in ("worse", "better")
            if certain and abs(row["difference"]) >= 0.01 and column in (SECONDS, DEVICE_MEMORY.column):
                level, reference = (
                    words.code(task.names.setting(factor, row[name])) for name in ("level", "reference")
                )
                if len(row["moved"]) > MAX_MOVED_SETTINGS:
                    continue
                times = f"{1 + row['difference']:.2f} times [{1 + row['low']:.2f}, {1 + row['high']:.2f}]"
                name = f"{columns.factor_name(column)}{_compared_settings(task, row)}"
                yield f"{name}: {level} takes {times} that of {reference}{_moved_settings(task, factor, [row])}."
