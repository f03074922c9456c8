"""The decision of a tuning or a league: the facts in its file and its reports, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from peftsweep.analysis.answer.decided import gain_over
from peftsweep.analysis.answer.structure import Base, Between, Decision, Finalist, Placebo, number
from peftsweep.analysis.table.columns import direction, score_name
from peftsweep.analysis.text import words
from peftsweep.study import record
from peftsweep.tuning import finals as statistics
from peftsweep.tuning.finals import BETTER, TIE, WORSE, Finals, Gain, League, Look

UNKNOWN = "unknown"


def tuned_decision(
    column: str,
    scores: Finals,
    order: Sequence[str],
    configurations: Mapping[str, str],
    looks: Sequence[tuple[str, str, Look]],
) -> Decision:
    """The decision between finalists with ``scores``; ``order`` holds their names, the best first."""
    best = order[0]
    gain = statistics.gain(column, scores, best)
    finalists = [_finalist(column, name, configurations[name], scores) for name in order]
    between = [
        Between(one, other, look.estimate, look.low, look.high, look.number, look.verdict)  # type: ignore[arg-type]
        for one, other, look in looks
    ]
    verdict: Any = "use" if gain is None or _gains(gain, column) else "none"
    base = None if gain is None else _base(gain)
    return Decision(None, verdict, configurations[best], finalists[0].trials, column, finalists, base, between)


def league_decision(
    column: str, scores: Finals, found: League, configurations: Mapping[str, str], method: str, difference: float
) -> Decision:
    """The decision of a ranked league, whose placebo is a second entry of ``method``."""
    finalists = [
        _finalist(column, one.contestant, configurations[one.contestant], scores, one.rank) for one in found.standings
    ]
    placebo = Placebo(method, found.wins, found.pairs, found.placebo, difference, found.seeds)
    best = finalists[0]
    return Decision(None, "ranked", best.configuration, best.trials, column, finalists, placebo=placebo)


def facts(decision: Decision) -> dict[str, Any]:
    """The decision for the file of the search, without unknown values and without the command, which the file has."""
    return {
        key: value for key, value in record.plain(asdict(decision)).items() if key != "command" and value is not None
    }


def sentence(decision: Decision) -> str:
    """The sentence: what to use, its scores, and its gain over the untouched base."""
    if decision.verdict == "by validation":
        choice = f"By validation alone: {decision.configuration}."
        return f"{choice} Nothing was judged on the test rows, as the budget was spent."
    best, name = decision.finalists[0], score_name(decision.column or "")
    seeds = words.plural("seed", len(best.trials))
    use = "Use" if decision.verdict == "use" else "No gain shown by"
    line = f"{use} {best.configuration}: {name} {best.value:.4g} on the test rows, {seeds}"
    return f"{line}{gain_clause(decision.base)}."


def gain_clause(base: Base | None) -> str:
    """The end of a sentence: the untouched base, and the gain over it."""
    if base is None:
        return ""
    line, gained = f"; the untouched base has {base.value:.4g}", gain_over(base)
    return line if gained is None else f"{line}, and against it this is {gained}"


def _gains(gain: Gain, column: str) -> bool:
    """Whether a gain is shown; without an estimate of the noise, whether the score is the better one."""
    if gain.verdict == UNKNOWN:
        return (direction(column) or 1) * gain.gain > 0
    return gain.verdict == BETTER


def _base(gain: Gain) -> Base:
    scale: Any = gain.scale
    return Base(gain.value, number(gain.gain), number(gain.low), number(gain.high), number(gain.p), scale)


def _finalist(column: str, name: str, configuration: str, scores: Finals, rank: int | None = None) -> Finalist:
    own = scores[name]
    return Finalist(name, configuration, statistics.mean(column, own), [one.trial for one in own.values()], rank)


def comparison_sentence(one: Between, tie: float, column: str, *, undecidable: bool, spent: bool) -> str:
    """The sentence about the comparison of two finalists; ``spent``: the budget ended it."""
    if not math.isfinite(one.low) or not math.isfinite(one.high):
        differ = f"{one.first} and {one.second} differ by {one.estimate:+.4f}"
        return f"{differ}: the uncertainty is not known, so they are not told apart."
    ends = f"{one.estimate:+.4f} [{one.low:+.4f}, {one.high:+.4f}]"
    scale = " (logarithms of ratios)" if "perplexity" in column else ""
    held = f"{ends}{scale}, valid at every look, {one.looks} so far"
    if one.verdict in (BETTER, WORSE):
        return f"{one.first} is {one.verdict} than {one.second}: {held}."
    if one.verdict == TIE:
        return f"{one.first} and {one.second} are a tie within {tie:g}: {held}."
    apart = f"{one.first} and {one.second} are not told apart"
    if undecidable:
        return f"{apart}: {held}; more seeds would not settle it, more test rows could."
    why = "the budget was spent" if spent else "tune.seeds were used up"
    return f"{apart} yet: {held}; {why}."
