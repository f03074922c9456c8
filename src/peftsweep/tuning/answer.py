"""Run sweep=tune and sweep=league: search, finals, decision, and the file that keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peftsweep.analysis.answer.structure import Decision
from peftsweep.analysis.table.columns import direction, score_name
from peftsweep.config.compose import Trial
from peftsweep.config.identity import content_hash
from peftsweep.errors import InputError, SweepFailed
from peftsweep.limits import LARGEST_SEED
from peftsweep.study import record
from peftsweep.study.store import LEAGUE, TUNE
from peftsweep.tuning import decision, search
from peftsweep.tuning import finals as statistics
from peftsweep.tuning.budget import BudgetAccount, parse
from peftsweep.tuning.finals import BETTER, OPEN, TIE, WORSE, Finals, Judged, Look
from peftsweep.tuning.search import Point, Space, Spent, Tuned, Until
from peftsweep.tuning.space import Plan, check_lists, plan, space
from peftsweep.tuning.trials import Clock, Launch, Trials, earlier_seconds, headline

PLACEBO_SEED = 1000  # by which the placebo's seeds lie above those of the others


@dataclass(frozen=True)
class Question:
    """A command of sweep=tune or sweep=league, parsed."""

    words: list[str]  # of the command line
    base_words: list[str]  # of them, those that every trial gets
    trials: Mapping[str, Trial]  # for each method one as it is configured, of which none is run as it is
    with_rate: Mapping[str, bool]  # whether the method's yaml, or the command, names a learning rate
    launch: Launch
    folder: Path  # of the study
    at_once: int = 1  # trials that run side by side

    @property
    def any(self) -> Trial:
        """One of the trials, for the settings that all share."""
        return next(iter(self.trials.values()))

    @property
    def hash(self) -> str:
        """A hash of the question without its budget."""
        return content_hash([sorted(self.base_words), sorted(self.trials), asdict(self.any.config.tune)])


@dataclass
class Setting:
    """A checked question with its search spaces and its trials."""

    spaces: list[Space]
    plan: Plan
    trials: Trials


def prepare(question: Question, file: str) -> Setting:
    """Check the question; ``file`` of the study holds the results of earlier commands.

    Raises:
        InputError: it cannot be asked so.
    """
    config = question.any.config
    tune = asdict(config.tune)
    check_lists(tune)
    budget, common = parse(config.budget), plan(question.any, config.tune.metric)
    spaces, sizes = [], {}
    for name, one in question.trials.items():
        found, sizes[name] = space(one, tune, has_rate=question.with_rate[name])
        spaces.append(replace(found, method=name))
    if budget is not None and budget.unit == "steps" and budget.amount < (common.total or math.inf):
        least = (
            f"at least {common.total}steps, those of one trial"
            if common.total
            else "trials or time: steps are not known"
        )
        raise InputError(f"budget={config.budget}: must be {least}")
    total, earlier = common.total, earlier_seconds(question.folder / file, question.hash)
    purse = BudgetAccount(budget, (common.rung or total, total, total), Clock(earlier))
    words = [*question.base_words, *(["skip_oversized=true"] if config.memory_limit is not None else [])]
    named = config.tune.targets is not None
    return Setting(
        spaces, common, Trials(question.launch, words, common, sizes, purse, question.at_once, named_targets=named)
    )


def first_trials(setting: Setting, seed: int) -> list[tuple[Point, Until]]:
    """The trials that a tuning begins with."""
    until = Until.rung if setting.plan.rung else Until.end
    return [
        (Point(one.method, rate, one.sizes[0], one.targets[0], seed), until)
        for one in setting.spaces
        for rate in search.from_centre(one.rates)
    ]


def planned_lines(setting: Setting) -> list[str]:
    """One line a method: the values that may be tried."""
    lines = []
    for one in setting.spaces:
        size, targets = setting.trials.sizes[one.method], [option or "its own" for option in one.targets]
        parts = [f"rates {', '.join(f'{rate:g}' for rate in one.rates)}" + (" and beyond" if one.extends else "")]
        parts += (
            [f"{size} {', '.join(map(str, one.sizes))} at the best rate, and a rate beside it at the best of them"]
            if len(one.sizes) > 1
            else []
        )
        parts += [f"targets {', '.join(targets)} at the best of these"] if len(targets) > 1 else []
        lines.append(f"{one.method}: {'; '.join(parts)}")
    return lines


# ---- sweep=tune ------------------------------------------------------------------------------------


@dataclass
class Final:
    """The finalists on the test rows."""

    column: str
    scores: Finals
    looks: list[tuple[str, str, Look]]  # the last of each pair
    spent: bool  # whether the budget ended it

    def order(self, sign: int) -> list[str]:
        """The finalists, the best mean first."""
        means = {name: sum(one.value for one in of.values()) / len(of) for name, of in self.scores.items() if of}
        return sorted(means, key=lambda name: -sign * means[name])


def tune(question: Question, say: Callable[[str], None]) -> None:
    """Search, judge the finalists, print the decision, and write it to the study's tune.json.

    Raises:
        InputError: the question cannot be asked so; nothing was trained.
        SweepFailed: no trial could be trained.
        NotRun: the launcher did not run all that it was given.
    """
    setting = prepare(question, TUNE)
    seed = question.any.config.seed
    found: list[Tuned] = []

    def note() -> None:
        _write(question, setting, found, None, [])

    setting.trials.note = note
    found = search.tune(setting.spaces, setting.trials, seed)
    if all(one.best is None for one in found):
        reasons = sorted(set(setting.trials.refused.values()))
        raise SweepFailed("no trial could be trained: " + ("; ".join(reasons[:3]) or "the budget has room for none"))
    final = _finals(setting, found, question.any, seed)
    decided = _decision(setting, found, final)
    lines = [
        *_searched(setting, found),
        *_decided(decided, final, question.any.config.tune.tie),
        *(f"not tried of {line}" for line in decided.not_tried),
        *(f"could not be trained: {line}" for line in decided.not_trained),
        _spent(setting),
    ]
    _write(question, setting, found, final, lines, decided)
    for line in lines:
        say(line)


def _finals(setting: Setting, found: Sequence[Tuned], one: Trial, seed: int) -> Final | None:
    """Judge the finalists seed by seed until their comparison is decided; None where none was judged."""
    config, trials = one.config.tune, setting.trials
    best = {each.method: each.best for each in found if each.best is not None}
    names = list(best)[: config.finalists]
    judged: dict[str, dict[int, Judged]] = {name: {} for name in names}
    pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    looks: dict[tuple[str, str], Look] = {}
    alive, said, spent = set(names), None, False
    for number in range(config.seeds if len(names) > 1 else 1):
        points = {name: replace(best[name], seed=_seed(seed, number)) for name in names if name in alive}
        try:
            trials("finals", list(points.values()), Until.test)
        except Spent:
            spent = True
        said = said or headline(trials.results[point] for point in points.values() if point in trials.results)
        for name, point in points.items():
            if said and (score := trials.judged(point, *said)) is not None:
                judged[name][point.seed] = score
        if spent or said is None:
            break
        column = f"eval_info.{said[0]}.{said[1]}.value"
        scored = {name: of for name, of in judged.items() if of}
        for pair in pairs:
            if number and alive.issuperset(pair) and scored.keys() >= set(pair):
                looks[pair] = statistics.look(column, scored, *pair, number, config.tie, len(pairs))
        alive -= {name for (a, b), look in looks.items() for name in _worse(a, b, look)}
        left = [look for pair, look in looks.items() if alive.issuperset(pair)]
        if number and all(look.verdict == TIE or statistics.hopeless(look, config.tie) for look in left):
            break
    if said is None or not any(judged.values()):
        return None
    kept = {name: of for name, of in judged.items() if of}
    return Final(f"eval_info.{said[0]}.{said[1]}.value", kept, [(*pair, look) for pair, look in looks.items()], spent)


def _worse(first: str, second: str, look: Look) -> list[str]:
    return [second] if look.verdict == BETTER else [first] if look.verdict == WORSE else []


def _seed(seed: int, number: int) -> int:
    return (seed + number) % (LARGEST_SEED + 1)


# ---- in words --------------------------------------------------------------------------------------


def configuration(point: Point, size: str | None) -> str:
    """``lora, lr=0.0002, r=16``."""
    parts = [point.method, f"lr={point.rate:g}", f"{size}={point.size}" if size and point.size is not None else ""]
    return ", ".join(filter(None, [*parts, f"targets={point.targets}" if point.targets else ""]))


def _searched(setting: Setting, found: Sequence[Tuned]) -> list[str]:
    """One line a method: its best configuration by validation, and the values it was chosen among."""
    lines = []
    for one in found:
        known = {point: setting.plan.sign * score for point, score in (one.ends or one.rungs).items()}
        if one.best is None:
            lines.append(f"{one.method}: no trial of it could be trained")
            continue
        where = "" if one.ends else f", at step {setting.plan.rung} alone"
        rates = ", ".join(f"{rate:g}" for rate in sorted({point.rate for point in one.rungs | one.ends}))
        lines.append(
            f"{configuration(one.best, setting.trials.sizes[one.method])}: validation {setting.plan.metric} "
            f"{known[one.best]:.4g}{where}, the best of {len(known)} by it; rates tried: {rates}"
        )
    return lines


def _decision(setting: Setting, found: Sequence[Tuned], final: Final | None) -> Decision:
    """The decision: what to use, what was not tried and what could not be trained."""
    best, sizes = {one.method: one.best for one in found if one.best}, setting.trials.sizes
    called = {method: configuration(point, sizes[method]) for method, point in best.items()}
    if final is None:
        method, point = next(iter(best.items()))
        trial, column = setting.trials.results[point].trial, f"validation_{setting.plan.metric}"
        made = Decision(None, "by validation", called[method], [trial], column)
    else:
        order = final.order(direction(final.column) or 1)
        made = decision.tuned_decision(final.column, final.scores, order, called, final.looks)
    return replace(made, not_tried=_not_tried(setting, found), not_trained=_not_trained(setting))


def _decided(found: Decision, final: Final | None, tie: float) -> list[str]:
    """The sentences about what to use and about each comparison of finalists."""
    lines, looks = [decision.sentence(found)], [look for _, _, look in final.looks] if final else []
    for one, look in zip(found.between, looks, strict=True):
        assert final is not None
        hopeless = statistics.hopeless(look, tie)
        lines.append(decision.comparison_sentence(one, tie, final.column, hopeless=hopeless, spent=final.spent))
    if len(found.finalists) > 1 and not looks:
        others = ", ".join(f"{one.name} {one.value:.4g}" for one in found.finalists[1:])
        lines.append(f"Not settled: {others}, with one seed each; the same command with a larger budget goes on.")
    return lines


def _not_tried(setting: Setting, found: Sequence[Tuned]) -> list[str]:
    """One line a method: values that the search did not try."""
    lines = []
    known = {one.method: {**one.rungs, **one.ends} for one in found}
    for one in setting.spaces:
        points = [*known[one.method], *(p for p in setting.trials.refused if p.method == one.method)]
        size = setting.trials.sizes[one.method]
        lacking = [f"lr {rate:g}" for rate in one.rates if all(point.rate != rate for point in points)]
        lacking += [f"{size}={value}" for value in one.sizes if all(point.size != value for point in points)]
        lacking += [f"targets={option}" for option in one.targets if all(point.targets != option for point in points)]
        if lacking:
            lines.append(f"{one.method}: {', '.join(lacking)}")
    return lines


def _not_trained(setting: Setting) -> list[str]:
    """One line a configuration that could not be trained, with the reason."""
    sizes, refused = setting.trials.sizes, setting.trials.refused
    return [f"{configuration(point, sizes[point.method])}: {reason}" for point, reason in refused.items()]


def _spent(setting: Setting) -> str:
    purse = setting.trials.purse
    of = f" of a budget of {purse.budget}" if purse.budget else ""
    return f"spent: {purse.trials} trials, {purse.steps:,} optimizer steps, {purse.seconds / 60:.1f} minutes{of}"


def _write(
    question: Question,
    setting: Setting,
    found: Sequence[Tuned],
    final: Final | None,
    lines: Sequence[str],
    decided: Decision | None = None,
) -> None:
    purse, sizes = setting.trials.purse, setting.trials.sizes
    scores = {(p, until): setting.plan.sign * score for (p, until), score in setting.trials.scores.items()}
    record.write_json(
        question.folder / TUNE,
        {
            "asked": question.hash,
            "command": question.words,
            "metric": f"validation_{setting.plan.metric}",
            "budget": str(purse.budget) if purse.budget else None,
            "spent": {"trials": purse.trials, "steps": purse.steps, "seconds": purse.seconds},
            "tried": [
                asdict(p)
                | {
                    "size_of": sizes[p.method],
                    "until": until.name,
                    "value": value,
                    "trial": setting.trials.results[p].trial,
                }
                for (p, until), value in scores.items()
                if until is not Until.test
            ],
            "best": [asdict(one.best) for one in found if one.best],
            "finals": None if final is None else _final_facts(final),
            "lines": list(lines),
        }
        | ({"decision": decision.facts(decided)} if decided else {}),
    )


def _final_facts(final: Final) -> dict[str, Any]:
    return {
        "column": final.column,
        "scores": {name: {str(s): one.value for s, one in of.items()} for name, of in final.scores.items()},
        "looks": [{"first": a, "second": b} | asdict(look) for a, b, look in final.looks],
        "settled": bool(final.looks) and all(look.verdict != OPEN for _, _, look in final.looks),
    }


# ---- sweep=league ----------------------------------------------------------------------------------


def league(question: Question, say: Callable[[str], None]) -> None:
    """Tune all methods with equally many trials, judge them on the test rows, and rank them; see league.json.

    Raises:
        InputError: the question cannot be asked so; nothing was trained.
        SweepFailed: a contestant could not be trained.
        NotRun: the launcher did not run all that it was given.
    """
    config = question.any.config
    own = config.league
    placebo = f"{own.placebo} (placebo)"
    question = replace(
        question,
        trials={**question.trials, placebo: question.trials[own.placebo]},
        with_rate={**question.with_rate, placebo: True},
    )
    setting = prepare(question, LEAGUE)
    trials = setting.trials
    trials.options = {placebo: own.placebo}
    seeds = {name: _seed(config.seed, PLACEBO_SEED if name == placebo else 0) for name in question.trials}
    tuned = search.equally(setting.spaces, trials, own.trials, seeds)
    best = {one.method: one.best for one in tuned if one.best is not None}
    if lacking := [name for name in question.trials if name not in best]:
        raise SweepFailed(f"no trial of {', '.join(lacking)} could be trained")
    points = {name: [replace(p, seed=_seed(seeds[name], n + 1)) for n in range(own.seeds)] for name, p in best.items()}
    trials("finals", [point for group in zip(*points.values(), strict=True) for point in group], Until.test)
    said = headline(trials.results[point] for group in points.values() for point in group if point in trials.results)
    if said is None:
        raise SweepFailed("no final trial was judged on test rows")
    found = {name: {p.seed: j for p in group if (j := trials.judged(p, *said))} for name, group in points.items()}
    if lacking := [name for name, of in found.items() if len(of) < 2]:
        raise SweepFailed(f"fewer than two final trials of {', '.join(lacking)} came to their end")
    column = f"eval_info.{said[0]}.{said[1]}.value"
    result = statistics.league(column, found, own.placebo, placebo, own.difference)
    costs = {name: _costs(trials, name) for name in question.trials}
    called = {name: configuration(replace(p, method=name), trials.sizes[name]) for name, p in best.items()}
    lines = _ranking(called, result, costs, own.placebo, placebo, own.difference, score_name(column))
    decided = decision.league_decision(column, found, result, called, own.placebo, own.difference)
    record.write_json(
        question.folder / LEAGUE,
        {"asked": question.hash, "command": question.words, "column": column, "lines": lines, "costs": costs}
        | {"spent": {"seconds": trials.purse.seconds}, "best": {name: asdict(p) for name, p in best.items()}}
        | {"scores": {name: {str(s): one.value for s, one in of.items()} for name, of in found.items()}}
        | {"result": record.plain(asdict(result)), "decision": decision.facts(decided)},
    )
    for line in lines:
        say(line)


def _costs(trials: Trials, contestant: str) -> dict[str, Any]:
    """The costs of a contestant, tuning and finals together."""
    own = {point: one for point, one in trials.results.items() if point.method == contestant}
    info = [one.train_info for one in own.values()]
    begun = len(own) + sum(p.method == contestant and p not in own for p in trials.refused)
    return {
        "trials": begun,
        "steps": sum(int(one.get("steps", 0)) for one in info),
        "seconds": sum(float(one.run_info.get("total_seconds", 0.0)) for one in own.values()),
        "trainable_parameters": max((int(one.get("trainable_parameters", 0)) for one in info), default=0),
    }


def _ranking(
    called: Mapping[str, str],
    found: statistics.League,
    costs: Mapping[str, Mapping[str, Any]],
    method: str,
    placebo: str,
    difference: float,
    score: str,
) -> list[str]:
    alike = len({one.rank for one in found.standings}) < len(found.standings)
    told = "; those of one place are not told apart" if alike else ""
    lines = [f"league by {score} on the test rows{told}:"]
    for one in found.standings:
        cost = costs[one.contestant]
        lines.append(
            f"{one.rank}. {called[one.contestant]}: {one.value:.4g} over "
            f"{one.seeds} seeds; {cost['trials']} trials, {cost['steps']:,} steps, {cost['seconds']:.0f} s, "
            f"at most {cost['trainable_parameters']:,} parameters"
        )
    lines.append(
        f"placebo: {method} under another name, with seeds of its own, won {found.wins} of {found.pairs} pairs of "
        f"seeds against {method}; that is what luck is worth"
        + ("" if not found.placebo_better else f", and here it is called {found.placebo}")
    )
    would = f"would show a difference of {difference:g} in 80% of leagues"
    more = f"no number of seeds {would} on these test rows; more test rows may"
    lines.append(f"league.seeds={found.seeds} {would}" if found.seeds else more)
    return lines
