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
from peftsweep.study.sweep_record import pack_size
from peftsweep.tuning import decision, search
from peftsweep.tuning import finals as statistics
from peftsweep.tuning.budget import BudgetAccount, parse
from peftsweep.tuning.finals import BETTER, OPEN, TIE, WORSE, Finals, Judged, Look
from peftsweep.tuning.search import Point, Space, Spent, Tuned, Until
from peftsweep.tuning.space import Plan, check_lists, plan, space
from peftsweep.tuning.trials import Clock, Launch, Trials, earlier_seconds, headline

OF_THE_RUN = ("study", "label", "quiet", "force", "price")  # keys that change nothing of what a search finds
PLACEBO_SEED = 1000  # difference between the seeds of the placebo and those of the other contestants


@dataclass(frozen=True)
class TuningCommand:
    """A command of sweep=tune or sweep=league, parsed."""

    words: list[str]  # of the command line
    base_words: list[str]  # the words of the command line that every trial gets
    trials: Mapping[str, Trial]  # by method: its configuration before the search; these are not run
    with_rate: Mapping[str, bool]  # by method: whether its yaml or the command names a learning rate
    launch: Launch
    folder: Path  # of the study
    at_once: int = 1  # trials that run side by side

    @property
    def any(self) -> Trial:
        """One of the trials, for the settings that all of them share."""
        return next(iter(self.trials.values()))

    @property
    def hash(self) -> str:
        """A hash of what is searched: of the command without its budget, the study's name, and how it is run."""
        own = [word for word in self.base_words if word.lstrip("+~").partition("=")[0] not in OF_THE_RUN]
        return content_hash([sorted(own), sorted(self.trials), asdict(self.any.config.tune)])


@dataclass
class Setting:
    """A checked command with its search spaces and its trials."""

    spaces: list[Space]
    plan: Plan
    trials: Trials


def prepare(command: TuningCommand, file: str) -> Setting:
    """Check the command; ``file`` of the study holds the results of earlier commands.

    Raises:
        InputError: a key does not fit such a search.
    """
    config = command.any.config
    tune = asdict(config.tune)
    check_lists(tune)
    budget, common = parse(config.budget), plan(command.any, config.tune.metric)
    spaces, sizes = [], {}
    for name, trial in command.trials.items():
        method_space, sizes[name] = space(trial, tune, has_rate=command.with_rate[name])
        spaces.append(replace(method_space, method=name))
    if budget is not None and budget.unit == "steps" and budget.amount < (common.total or math.inf):
        least = (
            f"at least {common.total}steps, those of one trial"
            if common.total
            else "trials or time: steps are not known"
        )
        raise InputError(f"budget={config.budget}: must be {least}")
    total, earlier = common.total, earlier_seconds(command.folder / file, command.hash)
    account = BudgetAccount(budget, (common.rung or total, total, total), Clock(earlier))
    words = [*command.base_words, *(["skip_oversized=true"] if config.memory_limit is not None else [])]
    named = config.tune.targets is not None
    return Setting(
        spaces, common, Trials(command.launch, words, common, sizes, account, command.at_once, named_targets=named)
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
    looks: list[tuple[str, str, Look]]  # the last comparison of each pair
    spent: bool  # whether the finals ended because the budget was spent

    def order(self, sign: int) -> list[str]:
        """The finalists, the best mean first."""
        means = {name: statistics.mean(self.column, by_seed) for name, by_seed in self.scores.items() if by_seed}
        return sorted(means, key=lambda name: -sign * means[name])


def tune(command: TuningCommand, say: Callable[[str], None]) -> None:
    """Search, judge the finalists, print the decision, and write it to the study's tune.json.

    Raises:
        InputError: a key does not fit such a search; nothing was trained.
        SweepFailed: no trial could be trained.
        NotRun: the launcher did not run all trials.
    """
    setting = prepare(command, TUNE)
    seed = command.any.config.seed
    found: list[Tuned] = []

    def note() -> None:
        _write(command, setting, found, None, [])

    setting.trials.note = note
    found = search.tune(setting.spaces, setting.trials, seed)
    if all(one.best is None for one in found):
        reasons = sorted(set(setting.trials.refused.values()))
        raise SweepFailed("no trial could be trained: " + ("; ".join(reasons[:3]) or "the budget has room for none"))
    final = _finals(setting, found, command.any, seed)
    decided = _decision(setting, found, final)
    lines = [
        *_search_lines(setting, found),
        *_decision_lines(decided, final, command.any.config.tune.tie),
        *(f"not tried of {line}" for line in decided.not_tried),
        *(f"could not be trained: {line}" for line in decided.not_trained),
        _spent_line(setting),
    ]
    _write(command, setting, found, final, lines, decided)
    for line in lines:
        say(line)


def _finals(setting: Setting, tuned: Sequence[Tuned], trial: Trial, seed: int) -> Final | None:
    """Judge the finalists seed by seed until their comparison is decided; None where no finalist was judged."""
    config, trials = trial.config.tune, setting.trials
    best = {method.method: method.best for method in tuned if method.best is not None}
    names = list(best)[: config.finalists]
    judged: dict[str, dict[int, Judged]] = {name: {} for name in names}
    pairs = [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
    looks: dict[tuple[str, str], Look] = {}
    alive, metric, spent = set(names), None, False
    for number in range(config.seeds if len(names) > 1 else 1):
        points = {name: replace(best[name], seed=_seed(seed, number)) for name in names if name in alive}
        try:
            trials("finals", list(points.values()), Until.test)
        except Spent:
            spent = True
        metric = metric or headline(trials.results[point] for point in points.values() if point in trials.results)
        for name, point in points.items():
            if metric and (score := trials.judged(point, *metric)) is not None:
                judged[name][point.seed] = score
        if spent or metric is None:
            break
        column = _value_column(*metric)
        scores = {name: by_seed for name, by_seed in judged.items() if by_seed}
        for pair in pairs:
            if number and alive.issuperset(pair) and scores.keys() >= set(pair):
                looks[pair] = statistics.look(column, scores, *pair, number, config.tie, len(pairs))
        alive -= {name for (a, b), look in looks.items() for name in _worse(a, b, look)}
        open_looks = [look for pair, look in looks.items() if alive.issuperset(pair)]
        if number and all(look.verdict == TIE or statistics.undecidable(look, config.tie) for look in open_looks):
            break
    if metric is None or not any(judged.values()):
        return None
    scores = {name: by_seed for name, by_seed in judged.items() if by_seed}
    return Final(_value_column(*metric), scores, [(*pair, look) for pair, look in looks.items()], spent)


def _value_column(evaluation: str, metric: str) -> str:
    """The column of a metric's value in the record."""
    return f"eval_info.{evaluation}.{metric}.value"


def _worse(first: str, second: str, look: Look) -> list[str]:
    return [second] if look.verdict == BETTER else [first] if look.verdict == WORSE else []


def _seed(seed: int, number: int) -> int:
    return (seed + number) % (LARGEST_SEED + 1)


# ---- in words --------------------------------------------------------------------------------------


def configuration(point: Point, size: str | None) -> str:
    """``lora, lr=0.0002, r=16``."""
    parts = [point.method, f"lr={point.rate:g}", f"{size}={point.size}" if size and point.size is not None else ""]
    return ", ".join(filter(None, [*parts, f"targets={point.targets}" if point.targets else ""]))


def _search_lines(setting: Setting, found: Sequence[Tuned]) -> list[str]:
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
    configurations = {method: configuration(point, sizes[method]) for method, point in best.items()}
    if final is None:
        method, point = next(iter(best.items()))
        trial, column = setting.trials.results[point].trial, f"validation_{setting.plan.metric}"
        made = Decision(None, "by validation", configurations[method], [trial], column)
    else:
        order = final.order(direction(final.column) or 1)
        made = decision.tuned_decision(final.column, final.scores, order, configurations, final.looks)
    return replace(made, not_tried=_not_tried(setting, found), not_trained=_not_trained(setting))


def _decision_lines(found: Decision, final: Final | None, tie: float) -> list[str]:
    """The sentences about what to use and about each comparison of finalists."""
    lines, looks = [decision.sentence(found)], [look for _, _, look in final.looks] if final else []
    for one, look in zip(found.between, looks, strict=True):
        assert final is not None
        undecidable = statistics.undecidable(look, tie)
        lines.append(decision.comparison_sentence(one, tie, final.column, undecidable=undecidable, spent=final.spent))
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


def _spent_line(setting: Setting) -> str:
    account = setting.trials.account
    budget = f" of a budget of {account.budget}" if account.budget else ""
    used = f"{account.trials} trials, {account.steps:,} optimizer steps, {account.seconds / 60:.1f} minutes"
    return f"spent: {used}{budget}"


def _write(
    command: TuningCommand,
    setting: Setting,
    found: Sequence[Tuned],
    final: Final | None,
    lines: Sequence[str],
    decided: Decision | None = None,
) -> None:
    account, sizes = setting.trials.account, setting.trials.sizes
    scores = {(p, until): setting.plan.sign * score for (p, until), score in setting.trials.scores.items()}
    record.write_json(
        command.folder / TUNE,
        {
            "search_hash": command.hash,
            "command": command.words,
            "metric": f"validation_{setting.plan.metric}",
            "budget": str(account.budget) if account.budget else None,
            "spent": {"trials": account.trials, "steps": account.steps, "seconds": account.seconds},
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
        "scores": _values_by_seed(final.scores),
        "looks": [{"first": a, "second": b} | asdict(look) for a, b, look in final.looks],
        "settled": bool(final.looks) and all(look.verdict != OPEN for _, _, look in final.looks),
    }


def _values_by_seed(scores: Finals) -> dict[str, dict[str, float]]:
    return {name: {str(seed): score.value for seed, score in by_seed.items()} for name, by_seed in scores.items()}


# ---- sweep=league ----------------------------------------------------------------------------------


def league(command: TuningCommand, say: Callable[[str], None]) -> None:
    """Tune all methods with equally many trials, judge them on the test rows, and rank them; see league.json.

    Raises:
        InputError: a key does not fit such a search; nothing was trained.
        SweepFailed: a contestant could not be trained.
        NotRun: the launcher did not run all trials.
    """
    config = command.any.config
    own = config.league
    placebo = f"{own.placebo} (placebo)"
    command = replace(
        command,
        trials={**command.trials, placebo: command.trials[own.placebo]},
        with_rate={**command.with_rate, placebo: True},
    )
    setting = prepare(command, LEAGUE)
    trials = setting.trials
    trials.options = {placebo: own.placebo}
    seeds = {name: _seed(config.seed, PLACEBO_SEED if name == placebo else 0) for name in command.trials}
    tuned = search.equally(setting.spaces, trials, own.trials, seeds)
    best = {one.method: one.best for one in tuned if one.best is not None}
    if lacking := [name for name in command.trials if name not in best]:
        raise SweepFailed(f"no trial of {', '.join(lacking)} could be trained")
    points = {name: [replace(p, seed=_seed(seeds[name], n + 1)) for n in range(own.seeds)] for name, p in best.items()}
    trials("finals", [point for group in zip(*points.values(), strict=True) for point in group], Until.test)
    metric = headline(trials.results[point] for group in points.values() for point in group if point in trials.results)
    if metric is None:
        raise SweepFailed("no final trial was judged on test rows")
    scores = {name: {p.seed: j for p in group if (j := trials.judged(p, *metric))} for name, group in points.items()}
    if lacking := [name for name, by_seed in scores.items() if len(by_seed) < 2]:
        raise SweepFailed(f"fewer than two final trials of {', '.join(lacking)} came to their end")
    column = _value_column(*metric)
    result = statistics.league(column, scores, own.placebo, placebo, own.difference)
    costs = {name: _costs(trials, name) for name in command.trials}
    configurations = {name: configuration(replace(p, method=name), trials.sizes[name]) for name, p in best.items()}
    lines = _ranking(configurations, result, costs, own.placebo, placebo, own.difference, score_name(column))
    decided = decision.league_decision(column, scores, result, configurations, own.placebo, own.difference)
    record.write_json(
        command.folder / LEAGUE,
        {"search_hash": command.hash, "command": command.words, "column": column, "lines": lines, "costs": costs}
        | {"spent": {"seconds": trials.account.seconds}, "best": {name: asdict(p) for name, p in best.items()}}
        | {"scores": _values_by_seed(scores)}
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
        "seconds": sum(float(one.run_info.get("total_seconds", 0.0)) / pack_size(one) for one in own.values()),
        "trainable_parameters": max((int(one.get("trainable_parameters", 0)) for one in info), default=0),
    }


def _ranking(
    configurations: Mapping[str, str],
    found: statistics.League,
    costs: Mapping[str, Mapping[str, Any]],
    method: str,
    placebo: str,
    difference: float,
    score: str,
) -> list[str]:
    """The lines of a league: one for each contestant, what the placebo says about chance, the seeds needed."""
    shared = len({one.rank for one in found.standings}) < len(found.standings)
    note = "; no difference is shown between contestants of the same rank" if shared else ""
    lines = [f"league by {score} on the test rows{note}:"]
    for one in found.standings:
        cost = costs[one.contestant]
        lines.append(
            f"{one.rank}. {configurations[one.contestant]}: {one.value:.4g} over "
            f"{one.seeds} seeds; {cost['trials']} trials, {cost['steps']:,} steps, {cost['seconds']:.0f} s, "
            f"at most {cost['trainable_parameters']:,} parameters"
        )
    lines.append(
        f"placebo: {method} under another name, with seeds of its own, won {found.wins} of {found.pairs} pairs of "
        f"seeds against {method}; only chance makes such differences"
        + ("" if not found.placebo_better else f", and here chance alone made the placebo {found.placebo}")
    )
    effect = f"would show a difference of {difference:g} in 80% of leagues"
    more_rows = f"no number of seeds {effect} on these test rows; more test rows may"
    lines.append(f"league.seeds={found.seeds} {effect}" if found.seeds else more_rows)
    return lines
