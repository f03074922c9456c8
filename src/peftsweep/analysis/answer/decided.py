"""What a search decided: a section of the answer, and what to use, so that no two parts of an answer disagree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftsweep.analysis.answer.structure import LEAGUE, TUNE, Base, Decision, Placebo, Section
from peftsweep.analysis.statistics import trials
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.text import findings, words
from peftsweep.analysis.text.findings import Advice
from peftsweep.analysis.text.searches import Search
from peftsweep.study.record import Status


def section(search: Search, task: str = "") -> Section:
    """The lines of a search as sentences, and its decision as facts."""
    sentences = [words.escaped(line) for line in search.lines]
    return Section(search.name, f"What sweep={search.name} decided", sentences, search.decision, task=task)


def task_searches(searches: Sequence[Search], task: Task, *, alone: bool) -> list[Search]:
    """The searches that trained trials of this task; all of them where the study has no other task (``alone``)."""
    names = set(task.table[trials.TRIAL].astype(str))
    return [one for one in searches if alone or not names.isdisjoint(one.decision.trials)]


# ---- what to use -------------------------------------------------------------------------------------


def advice(task: Task, general: Advice, searches: Sequence[Search]) -> Advice:
    """The configuration that a tuning chose, with its comparison with the base.

    It is ``general``, the choice among all trials of the study, where there was no tuning, or where trials that the
    tuning did not judge are shown to be better.
    """
    general = _with_league(general, searches)
    search = next((one for one in searches if one.name == TUNE and one.decision.verdict), None)
    numbers = None if search is None else task.table.loc[_are(task, search.decision.trials), "configuration"]
    if search is None or numbers is None or numbers.empty:
        return general
    decision, number = search.decision, numbers.iloc[0]
    name = words.code(task.labels[number])
    if decision.verdict == "by validation":
        if general.verdict not in ("nothing succeeded", "not judged"):
            return _with_base_comparison(
                general, f"sweep=tune chose {name} by validation alone, which no test row has judged"
            )
        why = "sweep=tune chose it by validation; its budget left nothing for test rows"
        return Advice("by validation", number, why, f"**Use {name}, by validation alone**: {why}.", TUNE)
    if _knows_more(task, general, number, decision):
        decision_text = "decided for" if decision.verdict == "use" else "had shown no gain by"
        return _with_base_comparison(
            general, f"sweep=tune, which did not judge all of these trials, {decision_text} {name}"
        )
    score = columns.score_name(decision.column or "")
    seeds = words.plural("seed", len(decision.trials))
    if decision.verdict == "none":
        shown = f"is not shown to be better than the untouched base, by {score}{_gain_clause(decision.base)}"
        best = "the best that sweep=tune found"
        return Advice("none", None, f"{best} {shown}", f"**Use none of these**: {best}, {name}, {shown}.", TUNE)
    why = f"sweep=tune chose it, over {seeds}{_rivals(decision)}{_gain_clause(decision.base)}"
    if _is_scored(task, number):
        why += findings.partly_lost(task, task.scores[0], number)
    if task.scores and findings.no_gain(task, task.scores[0]):
        why += "; with all other trials of this study counted in, a gain over the base is not shown"
    shown = f"{findings.in_short(task, task.scores[0], number)}; " if _is_scored(task, number) else ""
    return Advice("use", number, why, f"**Use {name}**: {shown}{why}.", TUNE)


def _rivals(decision: Decision) -> str:
    """The finalists that the best one is not shown to be better than, as a part of a sentence."""
    best, verdicts = decision.finalists[0].name, dict[str, str]()
    for one in decision.between:
        if best in (one.first, one.second):
            verdicts[one.second if one.first == best else one.first] = one.verdict
    others = {one.name: verdicts.get(one.name, "open") for one in decision.finalists[1:]}
    text = ""
    for verdict, text_of_verdict in (("tie", "a tie with"), ("open", "not told apart from")):
        if names := [words.escaped(name) for name, found in others.items() if found == verdict]:
            text += f"; it is {text_of_verdict} {', '.join(names)}"
    return text


def _are(task: Task, names: Sequence[str]) -> Any:
    return task.table[trials.TRIAL].astype(str).isin(list(names))


def _is_scored(task: Task, number: Any) -> bool:
    return bool(task.scores) and number in task.compare(task.scores[0]).index


def _knows_more(task: Task, general: Advice, number: Any, decision: Decision) -> bool:
    """Whether trials that the search did not judge say more of its own choice, or show another one to be better."""
    if general.chosen is None or not _is_scored(task, number):
        return False
    own = task.table["configuration"].eq(general.chosen) & task.table[trials.SUCCESS].eq(Status.success.name)
    judged = _are(task, [name for one in decision.finalists for name in one.trials])
    known = task.tested(task.scores[0])
    same = general.chosen == number
    better = same or decision.verdict == "none" or (known and known.verdict(general.chosen, number) == "better")
    return bool(better and (own & ~judged).any())


def _with_league(general: Advice, searches: Sequence[Search]) -> Advice:
    """The advice with what a league does not tell apart, which has as many seeds of each and no other trials."""
    finalists = next((one.decision.finalists for one in searches if one.name == LEAGUE), [])
    first = [words.escaped(one.name) for one in finalists if one.rank == 1]
    if general.verdict != "use" or len(first) < 2:
        return general
    seeds = words.plural("seed", len(finalists[0].trials))
    return _with_base_comparison(
        general, f"sweep=league, over {seeds} of each, does not tell apart: {', '.join(first)}"
    )


def _with_base_comparison(general: Advice, addition: str) -> Advice:
    return Advice(general.verdict, general.chosen, general.why, f"{general.sentence} ({addition}.)")


def _gain_clause(base: Base | None) -> str:
    """The end of a sentence: what the untouched base scores, and the gain over it."""
    if base is None:
        return ""
    line, gained = f"; the untouched base scores {words.number(base.value)}", gain_over(base)
    return line if gained is None else f"{line}, against it: {gained}"


def gain_over(base: Base) -> str | None:
    """The gain over the untouched base, with its interval and p; None where it is not known."""
    if base.gain is None or base.p is None:
        return None
    parts = {"difference": base.gain, "low": base.low, "high": base.high, "scale": base.scale}
    return words.tested(parts, base.p)


# ---- how sure ----------------------------------------------------------------------------------------


def luck(placebo: Placebo) -> str:
    """What luck alone is worth in a league, as a sentence."""
    luck_alone = f"; luck alone made it {placebo.verdict}" if placebo.verdict in ("better", "worse") else ""
    return (
        f"What luck is worth: {words.escaped(placebo.method)} under another name won {placebo.wins} of "
        f"{placebo.pairs} pairs of seeds against itself in sweep=league{luck_alone}."
    )
