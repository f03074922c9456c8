"""What a study found, sentence by sentence: what to use, what is best, what each factor does.

Every sentence is made from figures of the study; where the data does not tell, the sentence is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from peftsweep.analysis.statistics import trials
from peftsweep.analysis.statistics.effects import Moved
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import METHOD
from peftsweep.analysis.text import words
from peftsweep.analysis.text.factor_findings import MAX_MOVED_SETTINGS, moved_keys, score_findings
from peftsweep.analysis.text.words import ADAPTER, SECONDS
from peftsweep.study.record import Status
from peftsweep.study.scores import baseline

MANY = 3  # configurations, of which the best one's figure is said to be partly luck
LEARNING_RATE = "config.train.learning_rate"


def certainty(task: Task) -> Iterator[str]:
    """How sure the answer is: what is best by each score, its ties, the untouched base and chance."""
    if task.scores and task.seeds == 1 and len(task.configurations) > 1:
        yield "**One seed each**: all of this is of these trained models; other seeds may order them otherwise."
    values = task.compare(task.scores[0])["value"] if task.scores else pd.Series(dtype=float)
    if len(values) >= MANY and values.nunique() > 1:
        yield f"The best of {len(values):,} figures is partly luck: on other test rows expect a worse one."
    last_lost = ""
    for score in task.scores:
        by = f"{columns.score_name(score)}: " if len(task.scores) > 1 else ""
        yield _best(task, score)
        if (lost := _lost_seeds(task, score)) and lost != last_lost:
            last_lost = lost
            yield by + lost
        if score == task.scores[0] and (alone := _one_seed_alone(task, score)):
            yield by + alone
        yield from (by + sentence for sentence in _against_baselines(task, score))
        if lacking := _without_score(task, score):
            yield f"By {columns.score_name(score)} {lacking}."


def _lost_seeds(task: Task, score: str) -> str:
    """The configurations whose figures are of some of their seeds alone, as others failed or diverged."""
    lost = task.lost(score)
    if not lost:
        return ""
    named = _listed([f"{words.code(task.labels[number])} ({one})" for number, one in lost.items()])
    return (
        f"**Seeds without a score** are in no figure: {named}. The figures are of the seeds that came to their end, "
        "and those may be the better ones; another seed may end like the others."
    )


def _one_seed_alone(task: Task, score: str) -> str:
    """The configurations with one seed where others have several; empty where all have one, or several."""
    seeds = task.compare(score)["seeds"]
    if not (seeds == 1).any() or (seeds == 1).all():
        return ""
    named = seeds.index[seeds == 1]
    have = "has" if len(named) == 1 else "have"
    return (
        f"{_named(task, named)} {have} one seed alone: how much other seeds would change the figure is taken from the "
        "configurations with several."
    )


def partly_lost(task: Task, score: str, number: Any) -> str:
    """A part of a sentence: that the figure of this configuration is of some of its seeds alone; else empty."""
    lost = task.lost(score).get(number)
    return f"; **the figure is of {lost}**" if lost else ""


def _without_score(task: Task, score: str) -> str:
    """The configurations that succeeded without this score, which are compared with none; empty where all have it."""
    succeeded = task.configurations.index[task.configurations["n"] > 0]
    lacking = succeeded.difference(task.compare(score).index)
    are = "is" if len(lacking) == 1 else "are"
    return f"{_named(task, lacking)} {are} not compared: no such score is recorded" if len(lacking) else ""


def choices(task: Task) -> Iterator[str]:
    """What each factor was worth, a sentence each; a second one where another score shows what the first does not."""
    for factor in task.factors if task.scores else ():
        yield from score_findings(task, factor, task.scores[0])[:1]
        if not _shows(task, factor, task.scores[0]):
            other = next((score for score in task.scores[1:] if _shows(task, factor, score)), None)
            yield from score_findings(task, factor, other)[:1] if other else ()


def _shows(task: Task, factor: str, score: str) -> bool:
    """Whether some level of a factor is shown to be better or worse than another by this score."""
    return bool(task.effects(score, factor)["verdict"].isin(["better", "worse"]).any())


def _best(task: Task, score: str) -> str:
    compared, what = task.compare(score), columns.score_name(score)
    best = compared.index[0]
    figure = value_of(task, score, best)
    if len(compared) == 1:
        alone = "there is no other configuration to compare it with"
        return f"**{what}**: {words.code(task.labels[best])} reaches {what} {figure}; {alone}."
    others = [n for n in task.tied(score) if n != best]
    if len(unknown := task.not_compared(score)):
        best_is = f"the best figure is that of {words.code(task.labels[best])}, {figure}"
        return f"**{what}**: {best_is}; {_partly_compared(task, score, others, unknown)}."
    if len(others) == len(compared) - 1:
        last = compared.iloc[-1]
        gap = words.tested(last, last["p_adjusted"])
        every = "both" if len(compared) == 2 else f"all {len(compared)}"
        moved = other_differences(task, task.unnamed(best, compared.index[-1])) if len(compared) == 2 else ""
        if compared["value"].nunique() == 1:
            same = f"are a tie with the same figure, {figure}; their difference is {gap}"
            return f"**{what}**: {every} configurations {same}{moved}."
        return (
            f"**{what}**: {every} configurations are a tie; the best figure is that of "
            f"{words.code(task.labels[best])}, {figure}, and the last differs by {gap}{moved}."
        )
    known = task.tested(score)
    assert known is not None  # as there is a score to rank
    worse = [n for n in compared.index if n not in others and n != best]
    if not others:
        second, rest = compared.iloc[1], [known.verdict(n, best) for n in worse[1:]]
        following = words.code(task.labels[compared.index[1]])
        text = f"{words.code(task.labels[best])} is best, {figure}; the next, {following}, is worse by "
        text += words.tested(second, second["p_adjusted"])
        if so := rest.count("worse"):
            text += ", and so is the third" if len(compared) == 3 else f", and so are {so:,} others"
        if (left := len(rest) - so) > 0:
            text += f"; {left:,} more {'is' if left == 1 else 'are'} worse than another one"
        return f"**{what}**: {text}{other_differences(task, task.unnamed(best, compared.index[1]))}."
    named = "; ".join(words.code(task.labels[n]) for n in others[:6])
    named += f"; and {len(others) - 6} more" if len(others) > 6 else ""
    beaten = all(any(known.verdict(n, other) == "worse" for other in [best, *others]) for n in worse)
    return (
        f"**{what}**: the best figure is that of {words.code(task.labels[best])}, {figure}. It is a tie with {named}"
        f"{other_differences(task, task.unnamed(best, others[0])) if len(others) == 1 else ''}. "
        f"{words.plural('configuration', len(worse))} of {len(compared):,} {'is' if len(worse) == 1 else 'are'} "
        f"worse than {'one of these' if beaten else 'another one'}."
    )


def _partly_compared(task: Task, score: str, ties: Sequence[Any], unknown: pd.Index[Any]) -> str:
    """What is known of the other configurations, where some differences from the best have no known uncertainty."""
    if len(unknown) == len(task.compare(score)) - 1:
        return "the uncertainty is not known"
    worse = int(task.compare(score)["verdict"].eq("worse").sum())
    parts = [f"{_named(task, ties)} {'is' if len(ties) == 1 else 'are'} in a tie with it"] if ties else []
    parts += [f"{words.plural('configuration', worse)} {'is' if worse == 1 else 'are'} worse"] if worse else []
    return "; ".join([*parts, f"the uncertainty of its difference from {_named(task, unknown)} is not known"])


def _named(task: Task, numbers: Sequence[Any] | pd.Index[Any]) -> str:
    """At most three of these configurations by name, and how many more there are."""
    return _listed([words.code(task.labels[number]) for number in numbers])


def other_differences(task: Task, moved: Sequence[Moved]) -> str:
    """The end of a sentence on two configurations: the other settings in which they differ, first and second value."""
    if len(moved) > MAX_MOVED_SETTINGS:
        return f"; they also differ in {len(moved)} other settings ({moved_keys(task, moved)})"
    value = task.names.value
    parts = [f"{task.names.key(m.key)} ({value(m.key, m.value)}, {value(m.key, m.reference_value)})" for m in moved]
    return f"; they also differ in {', '.join(parts)}" if parts else ""


def _against_baselines(task: Task, score: str) -> Iterator[str]:
    """Sentences on the untouched base, on guessing, and on what makes a score less reliable than it looks."""
    name, metric = columns.evaluation(score)
    best = task.compare(score).index[0]
    facts = task.facts(best, name)
    base = facts.get(f"base_{metric}.value", math.nan)
    if words.known(base):
        yield _gain_over_base(task, score, words.number(base))
    elif columns.measured(task.table, columns.base_of(score)):
        yield f"No score of the untouched base is recorded for {words.code(task.labels[best])}, unlike for others."
    yield from _chance(facts, metric, facts[f"{metric}.value.low"] if columns.direction(score) >= 0 else None)
    flags = [c for c in task.configurations.columns if c.startswith(f"eval_info.{name}.") and c.endswith("degenerate")]
    flags = [c for c in flags if not c.startswith(f"eval_info.{name}.base_")]
    if flags and (count := int((task.configurations[flags].astype("Float64") > 0).any(axis=1).sum())):
        always = f"nearly always gave the same answer on {name}, whatever was asked"
        yield f"{words.plural('configuration', count)} {always}."
    seen = facts.get("seen_in_training", math.nan)
    if words.known(seen) and seen > 0:
        yield f"**{seen:.0f} test rows of {name} were trained on**; the score may be too high."
    similar = facts.get("similar_in_training", math.nan)
    if words.known(similar) and similar > 0:
        yield (
            f"**{similar:.0f} test rows of {name} differ from rows trained on in white space or capitals alone**; the "
            "score may be too high."
        )


def _gain_over_base(task: Task, score: str, base: str) -> str:
    """What the best configuration gains over the untouched base, which scores ``base``."""
    compared = task.compare(score)
    best, text = compared.iloc[0], f"The untouched base scores {base} on the same rows."
    if no_gain(task, score):
        text = f"**No gain shown** over the untouched base, which scores {base} on the same rows."
    if not words.known(best["gain_p_adjusted"]):
        return text
    gain = over_base(best)
    as_if = "" if compared.attrs["gains_paired"] else ", as if each had rows of its own"
    return f"{text} {words.code(task.labels[compared.index[0]])} against it: {gain}{as_if}."


def over_base(row: pd.Series[Any]) -> str:
    """What a configuration, a row of ``Task.compare``, gains over its untouched base; empty where that is not known."""
    if not words.known(row["gain"]):
        return ""
    parts = {"difference": row["gain"], "low": row["gain_low"], "high": row["gain_high"], "scale": row["scale"]}
    return words.tested(parts, row["gain_p_adjusted"])


def _chance(facts: Mapping[str, Any], metric: str, bound: float | None) -> Iterator[str]:
    """What always giving the same answer scores, and guessing; ``bound`` is how low the best score may lie."""
    known = {key: value for key, value in facts.items() if words.known(value)}
    majority, random = (baseline(known, metric, which) for which in ("majority", "random"))
    if majority is None:
        return
    guessing = "" if random is None else f", guessing {words.number(random)}"
    mark, always = "", "Always"
    if bound is not None and words.known(bound) and bound <= max(majority, random or 0.0):
        mark, always = "**Chance level**: ", "always"
    yield f"{mark}{always} giving the most frequent answer scores {words.number(majority)}{guessing}."


def no_gain(task: Task, score: str) -> bool:
    """Whether no configuration is shown to be better than the untouched base."""
    return task.useful(score).empty


@dataclass(frozen=True)
class Advice:
    """The one configuration to use, None where there is none, why, and the sentence that says so."""

    verdict: str  # as `answer.structure.Use` has it
    chosen: Any
    why: str
    sentence: str
    decided_by: str | None = None  # the search whose decision this is


def advice(task: Task) -> Advice:
    """What to use: of those near the best the smallest adapter, of about equal ones the fastest."""
    if not (task.table[trials.SUCCESS] == Status.success.name).any():
        sentence = "No trial has succeeded, so there is nothing to recommend. See what failed below."
        return Advice("nothing succeeded", None, "no trial has succeeded", sentence)
    if not task.scores:
        sentence = "No trial was judged by an evaluation; costs are all that can be compared."
        return Advice("not judged", None, "no trial was judged by an evaluation", sentence)
    score, score_name = task.scores[0], columns.score_name(task.scores[0])
    compared = task.compare(score)
    if no_gain(task, score):
        why = f"none is shown to be better than the untouched base, by {score_name}{_gained_by_others(task, score)}"
        return Advice("none", None, why, f"**Use none of these**: {why}.{_not_ruled_out(task, score)}")
    if len(compared) < 2:
        only = compared.index[0]
        why = f"it is the only configuration with this score{partly_lost(task, score, only)}"
        sentence = f"**Use {words.code(task.labels[only])}**: {in_short(task, score, only)}; {why}."
        return Advice("only one", only, why, sentence)
    chosen, why = _chosen(task, score)
    sentence = f"**Use {words.code(task.labels[chosen])}**: {in_short(task, score, chosen)}; {why}."
    return Advice("use", chosen, why, sentence)


def _chosen(task: Task, score: str) -> tuple[Any, str]:
    """The configuration to use, and why."""
    near, configs, score_name = task.near(score), task.configurations, columns.score_name(score)
    chosen, why = near[0], f"the best by {score_name}"
    ties = [number for number in task.tied(score) if number != chosen]
    if chosen != task.compare(score).index[0]:
        why += " of those that are shown to be better than the untouched base"
    elif ties:
        with_ = words.code(task.labels[ties[0]]) if len(ties) == 1 else f"{len(ties)} more"
        why = f"the best figure by {score_name}, in a tie with {with_}"
    elif len(task.not_compared(score)):
        why = f"the best figure by {score_name}"
    if len(unknown := task.not_compared(score)):
        why += f" (the uncertainty of its difference from {_named(task, unknown)} is not known)"
    if len(near) > 1:
        sizes = configs.loc[near, ADAPTER].astype(float) if ADAPTER in configs else pd.Series(1.0, index=near)
        small = sizes[sizes <= 1.05 * sizes.min()].index if sizes.notna().any() else near
        seconds = configs.loc[small, SECONDS].astype(float) if SECONDS in configs else pd.Series(dtype=float)
        timed = len(seconds) > 0 and bool(seconds.notna().all()) and task.one_place(small)
        chosen = seconds.idxmin() if timed else small[0]
        why = f"of the {len(near)} within one standard error of the best {score_name}, the smallest adapter"
        if len(small) > 1:
            why += f", and of those within 5% of it the {'fastest' if timed else 'best'}"
    return chosen, why + partly_lost(task, score, chosen) + _better_by_others(task, score, chosen)


def _better_by_others(task: Task, score: str, chosen: Any) -> str:
    """The other scores by which another configuration is shown to be better than the ``chosen`` one."""
    against = []
    for other in task.scores:
        known, compared = task.tested(other), task.compare(other)
        if other == score or known is None or chosen not in compared.index:
            continue
        if known.verdict(first := compared.index[0], chosen) == "better":
            against.append((columns.score_name(other), words.code(task.labels[first])))
    if not against:
        return ""
    better = against[0][1] if len(against) == 1 else "others"
    return f"; by {_listed([name for name, _ in against])} {better} {'is' if len(against) == 1 else 'are'} better"


def _gained_by_others(task: Task, score: str) -> str:
    """The other scores by which a configuration is shown to be better than the untouched base."""
    gained = [one for one in task.scores if one != score and task.compare(one)["gained"].eq("better").any()]
    if not gained:
        return ""
    return f", though by {_listed([columns.score_name(one) for one in gained])} there is a gain"


def _listed(names: Sequence[str]) -> str:
    """At most three of these names, and how many more there are."""
    more = [f"{len(names) - 3} more"] if len(names) > 3 else []
    *first, last = [*names[:3], *more]
    return f"{', '.join(first)} and {last}" if first else last


def _not_ruled_out(task: Task, score: str) -> str:
    """Where no gain is shown: how large it may still be by the interval, and what was not tried."""
    compared, parts = task.compare(score), list[str]()
    most = compared["gain_high"].max() if (columns.direction(score) or 1) > 0 else -compared["gain_low"].min()
    if words.known(most) and most > 0:
        rows = words.values(task.table, f"{score.removesuffix('value')}n")
        of = f"{rows[0]} test rows leave" if len(rows) == 1 else "the test rows leave"
        parts.append(f"{of} a gain of up to {words.amount(most, compared['scale'].iloc[0])} possible")
    done = task.table[task.table[trials.SUCCESS] == Status.success.name]
    rates = words.values(done, LEARNING_RATE)
    if len(rates) == 1:
        parts.append(f"all results are of one learning rate, {task.names.value(LEARNING_RATE, rates[0])}")
    elif rates and METHOD in done and done.groupby(METHOD)[LEARNING_RATE].nunique().max() == 1:
        parts.append("each method has results of one learning rate alone")
    return f" That is no proof that nothing helps: {', and '.join(parts)}." if parts else ""


def in_short(task: Task, score: str, number: Any) -> str:
    """A configuration's score and what it costs."""
    costs = (
        (ADAPTER, "adapter"),
        (SECONDS, "of training"),
        (task.memory or "", columns.factor_name(task.memory or "")),
    )
    configs = task.configurations
    known = [(c, unit) for c, unit in costs if c in configs and words.known(configs.loc[number, c])]
    parts = [f"{words.cost(c, configs.loc[number, c])} {unit}" for c, unit in known]
    return ", ".join([f"{value_of(task, score, number)} {columns.score_name(score)}", *parts])


def value_of(task: Task, score: str, number: Any) -> str:
    """A score with its interval."""
    row = task.row(number, score)
    low, high = row.get(f"{score}.low", math.nan), row.get(f"{score}.high", math.nan)
    return words.number(row[score]) + (
        f" [{words.number(low)}, {words.number(high)}]" if words.known(low) and words.known(high) else ""
    )
