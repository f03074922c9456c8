"""Tables -> RESULTS.md: what a study found, how sure that is, and what to use.

Every sentence is made from figures of the study; where the data does not tell, the sentence is not there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from peftsweep import record, stats
from peftsweep.display import size
from peftsweep.record import Status

RESULTS = "RESULTS.md"
APPROXIMATE = "≈ marks a difference that may be chance."
PREDICTED = "memory.predicted.peak_bytes"
ROWS = 25  # of a ranking; results.parquet has all
GPUS = (8, 12, 16, 24, 40, 48, 80)  # GB, the common sizes
# What tells whether a trial fits on a device, the best source first, and what to call it.
MEMORY = (
    ("memory.train.reserved_peak", "memory the allocator held on the device while training"),
    (PREDICTED, "predicted training memory"),
    ("memory.train.rss_peak", "memory of the whole process on the host, as no device was measured"),
)
MEMORY_ON_DEVICE = "memory.train.allocated_peak"
SHOWN_MEMORY = (MEMORY_ON_DEVICE, PREDICTED, "memory.train.rss_peak")
ADAPTER, SECONDS, PARAMETERS = "train_info.adapter_bytes", "train_info.train_seconds", "train_info.trainable_parameters"
SPEED = "train_info.tokens_per_second"
NAMES = {
    "config.method.r": "rank",
    "choices.method": "method",
    "choices.quant": "quantisation",
    "choices.targets": "target modules",
    "choices.train": "training recipe",
    "config.train.learning_rate": "learning rate",
    "config.train.steps": "training steps",
    SECONDS: "training time",
    ADAPTER: "adapter size",
    "memory.train.allocated_peak": "peak memory",
    PREDICTED: "predicted memory",
    "memory.train.rss_peak": "resident memory",
}
FIGURES = {  # how the figures of a factor are called
    "config.method.r": ("rank", "quality_rank"),
    "choices.quant": ("quantisation", "heatmap"),
    "choices.targets": ("modules",),
}
FRONTIER = ("frontier", "quality_")
STATUSES = tuple(status.name for status in Status)
KEPT = ("correct", "correct_norm", "log_likelihood", "tokens", "label", "label_prediction")  # of a line of predictions
# A process on a CPU holds the libraries too, in which a small model's memory drowns.
TASK = ("choices.model", "config.model.name_or_path", "choices.dataset", "config.dataset.path")
TASK_ROWS = ("config.dataset.name", "config.dataset.test_path", "config.dataset.hub", "config.dataset.revision")


def write(folder: Path, table: pd.DataFrame, steps: pd.DataFrame, plots: Sequence[Path] = ()) -> tuple[Path, list[str]]:
    """Write RESULTS.md of the study in ``folder``, whose trials are ``table``; the file, and its summary as text."""
    file = folder / RESULTS
    tasks = _tasks(table, reader(folder)) if len(table) else []
    summary = {task.name: list(_summary(task)) for task in tasks}
    lines = _document(folder, table, tasks, summary, steps, plots)
    record.write_text(file, "\n".join(lines).rstrip() + "\n")
    plain = [line.removeprefix("- ") for said in summary.values() for line in said]
    return file, [_unmarked(line) for line in plain]


def _unmarked(text: str) -> str:
    return re.sub(r"\[([^\]]*)\]\(#[^)]*\)", r"\1", text).replace("**", "").replace("`", "")


def reader(folder: Path) -> stats.Predictions:
    """The lines of predictions of a study's trials, each file read once and kept without its texts."""
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def read(trial: str, evaluation: str) -> list[dict[str, Any]]:
        if (trial, evaluation) not in known:
            lines = record.read_lines(folder / trial / "predictions" / f"{evaluation}.jsonl")
            known[trial, evaluation] = [_slim(line) for line in lines]
        return known[trial, evaluation]

    return read


def _slim(line: dict[str, Any]) -> dict[str, Any]:
    asked = json.dumps([line.get("prompt"), line.get("answer")]).encode()
    return {key: line[key] for key in KEPT if key in line} | {"prompt": hashlib.blake2b(asked, digest_size=8).digest()}


# ---- what there is to tell -------------------------------------------------------------------------


@dataclass
class _Task:
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
        return stats.labels(self.table, self.design)

    @cached_property
    def design(self) -> stats.Design:
        return stats.design(self.table)

    @property
    def factors(self) -> list[str]:
        return self.design.factors

    @cached_property
    def scores(self) -> list[str]:
        """The main score of each evaluation: the first in which more is better, else its first."""
        found: dict[str, str] = {}
        for column in stats.scores(self.table):
            name = stats.evaluation(column)[0]
            if name not in found or (stats.direction(found[name]) < 0 < stats.direction(column)):
                found[name] = column
        return list(found.values())

    def effects(self, column: str, factor: str, reference: str | None = None) -> pd.DataFrame:
        """What the levels of one factor do to a score, or to a cost against the level ``reference``."""
        if (column, reference) not in self._effects:
            predictions = None if reference else self.predictions
            named = {factor: reference} if reference else None
            self._effects[column, reference] = stats.effects(self.table, column, predictions, named, self.design)
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


def _tasks(table: pd.DataFrame, predictions: stats.Predictions | None) -> list[_Task]:
    """One for each model, dataset and way of judging: scores of different ones are never compared."""
    judged = [c for c in table.columns if c.startswith("config.eval.") and table[c].nunique(dropna=True) > 1]
    keys = [c for c in (*TASK, *TASK_ROWS, *judged) if c in table]
    differing: list[str] = [c for c in keys if table[c].nunique(dropna=False) > 1]
    text = table[keys].astype("string").fillna("")
    same = text.groupby(differing, sort=False).ngroup() if differing else pd.Series(0, index=table.index)
    groups = {number: same.index[same == number] for number in range(same.max() + 1)}
    found = []
    for index in groups.values():
        one = text.loc[index[0]]
        model = one.get("choices.model") or one.get("config.model.name_or_path") or "model"
        dataset = one.get("choices.dataset") or one.get("config.dataset.name") or "dataset"
        own = [f"{c.removeprefix('config.')}={one[c]}" for c in differing if c not in TASK[:1] + TASK[2:3] and one[c]]
        name = f"{model} on {dataset}" + (f" ({', '.join(own)})" if own and len(groups) > 1 else "")
        part = table.loc[index].drop(columns="configuration", errors="ignore")
        found.append(_Task(name, part.assign(configuration=stats.identify(part)), predictions))
    return found


def _document(
    folder: Path,
    table: pd.DataFrame,
    tasks: Sequence[_Task],
    summary: Mapping[str, Sequence[str]],
    steps: pd.DataFrame,
    plots: Sequence[Path],
) -> Iterator[str]:
    left = {plot.stem: plot for plot in plots}
    yield f"# Results of the study `{folder.name}`"
    yield ""
    yield _counts(table, tasks)
    yield ""
    yield "## Summary"
    yield ""
    for name, lines in summary.items():
        if len(tasks) > 1:
            yield f"**{name}**"
            yield ""
        yield from lines
        yield ""
    for task in tasks:
        mark = f" ({task.name})" if len(tasks) > 1 else ""
        for score in task.scores:
            yield from _ranking(task, score, mark)
        for factor in task.factors:
            yield from _factor(task, factor, mark, _take(left, FIGURES.get(factor, ()), folder))
        for score in task.scores[:1]:
            yield from _frontier(task, score, mark, _take(left, FRONTIER, folder))
        yield from _recommendations(task, mark)
    if left:
        yield "## Figures"
        yield ""
        yield from _links(list(left.values()), folder)
    yield from _methodology(table, tasks, steps)


def _take(left: dict[str, Path], names: Sequence[str], folder: Path) -> list[str]:
    """Links to the figures called so, which are then no longer ``left``."""
    taken = [stem for stem in left if stem.startswith(tuple(names))] if names else []
    return list(_links([left.pop(stem) for stem in taken], folder))


def _links(plots: Iterable[Path], folder: Path) -> Iterator[str]:
    for plot in plots:
        yield f"![{plot.stem.replace('_', ' ')}]({plot.relative_to(folder).as_posix()})"
        yield ""


def _counts(table: pd.DataFrame, tasks: Sequence[_Task]) -> str:
    if not len(table):
        return "No trial yet."
    statuses = table[stats.SUCCESS].value_counts()
    ended = ", ".join(f"{count} {status}" for status, count in statuses.items())
    configurations = sum(len(task.configurations) for task in tasks)
    seeds = [n for task in tasks for n in task.configurations["n"] if n]
    each = f"{min(seeds)}" if seeds and min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}" if seeds else ""
    of_each = " each" if configurations > 1 else ""
    tail = f", {each} successful {_plural('seed', max(seeds), number=False)}{of_each}" if seeds else ""
    trials = f"{_plural('trial', len(table))} ({ended}) of {_plural('configuration', configurations)}{tail}."
    return trials + " Written by `peftsweep-collect` from the trials' records."


def _plural(word: str, count: int, *, number: bool = True) -> str:
    text = word if count == 1 else f"{word}s"
    return f"{count:,} {text}" if number else text


# ---- summary ---------------------------------------------------------------------------------------


def _summary(task: _Task) -> Iterator[str]:
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
            yield from (f"- {sentence}" for sentence in _findings(task, factor, task.scores[0])[:1])
    bad = task.table[stats.SUCCESS].isin([Status.failed.name, Status.oom.name, Status.refused.name]).sum()
    if bad:
        yield f"- {_plural('trial', int(bad))} ended without a result: see [what did not work](#what-did-not-work)."


def _best(task: _Task, score: str) -> str:
    compared, what = task.compare(score), _score_name(score)
    best = compared.index[0]
    figure = f"{what} {_value(task, score, best)}"
    if len(compared) == 1:
        return (
            f"- **{what}**: `{task.labels[best]}` reaches {figure}; there is no other configuration to compare it with."
        )
    others = [n for n in task.tied(score) if n != best]
    if compared["verdict"].eq("unknown").any():
        return f"- **{what}**: highest is `{task.labels[best]}`, {figure}; how far chance reaches is not known."
    if len(others) == len(compared) - 1:
        gap = _difference(compared.iloc[-1])
        return (
            f"- **{what}**: all {len(compared)} configurations are a tie; the best figure is that of "
            f"`{task.labels[best]}`, {figure}, and the last differs by {gap}."
        )
    if not others:
        second = compared.iloc[1]
        return (
            f"- **{what}**: `{task.labels[best]}` is best, {figure}; "
            f"the next, `{task.labels[compared.index[1]]}`, is worse by {_difference(second)}"
            + (f", and so are the other {len(compared) - 2}." if len(compared) > 2 else ".")
        )
    named = ", ".join(f"`{task.labels[n]}`" for n in others[:6]) + (
        f" and {len(others) - 6} more" if len(others) > 6 else ""
    )
    return (
        f"- **{what}**: the best figure is that of `{task.labels[best]}`, {figure}. It is a tie with {named}; "
        f"{_plural('configuration', len(compared) - 1 - len(others))} of {len(compared)} "
        f"{'is' if len(compared) - 1 - len(others) == 1 else 'are'} worse."
    )


def _against_baselines(task: _Task, score: str) -> Iterator[str]:
    """The untouched base, always the same answer, and what makes a score worth less than it looks."""
    name, metric = stats.evaluation(score)
    sign, best = stats.direction(score) or 1, task.compare(score).index[0]
    row = task.row(best, f"eval_info.{name}.")
    bound = row[f"{score}.low"] if sign > 0 else row[f"{score}.high"]
    base, stderr = (row.get(f"eval_info.{name}.base_{metric}.{part}", math.nan) for part in ("value", "stderr"))
    if _known(base):
        gain = sign * (bound - base) - 1.96 * (stderr if _known(stderr) else 0.0)
        if _known(bound) and gain <= 0:
            yield f"- **No gain shown** over the untouched base, which scores {_number(base)} on the same rows."
        else:
            yield f"- The untouched base scores {_number(base)} on the same rows."
    majority = row.get(f"eval_info.{name}.majority", math.nan)
    if _known(majority) and _known(bound) and sign > 0 and metric == "accuracy" and bound <= majority:
        yield f"- **Chance level**: always giving the most frequent answer scores {_number(majority)}."
    degenerate = task.configurations.get(f"eval_info.{name}.degenerate")
    if degenerate is not None and (count := int((degenerate > 0).sum())):
        yield f"- {_plural('configuration', count)} nearly always gave the same answer on {name}, whatever was asked."
    seen = row.get(f"eval_info.{name}.seen_in_training", math.nan)
    if _known(seen) and seen > 0:
        yield f"- **{seen:.0f} test rows of {name} were trained on**; the score says less than it seems to."


def _advice(task: _Task, score: str) -> Iterator[str]:
    """The one configuration to use: of those near the best the smallest adapter, of about equal ones the fastest."""
    near, configs = task.near(score), task.configurations
    if len(task.compare(score)) < 2:
        return
    chosen, why = near[0], f"the best by {_score_name(score)}"
    if len(near) > 1:
        sizes = configs.loc[near, ADAPTER].astype(float) if ADAPTER in configs else pd.Series(1.0, index=near)
        small = sizes[sizes <= 1.05 * sizes.min()].index if sizes.notna().any() else near
        seconds = configs.loc[small, SECONDS].astype(float) if SECONDS in configs else pd.Series(dtype=float)
        chosen = seconds.idxmin() if seconds.notna().any() else small[0]
        why = f"of the {len(near)} within one standard error of the best {_score_name(score)}, the smallest adapter"
        why += ", and of those within 5% of it the fastest" if len(small) > 1 else ""
    costs = [
        f"{_cost(c, configs.loc[chosen, c])} {words}"
        for c, words in ((ADAPTER, "adapter"), (SECONDS, "of training"), (task.memory or "", _name(task.memory or "")))
        if c in configs and _known(configs.loc[chosen, c])
    ]
    yield f"- **Use `{task.labels[chosen]}`**: {_value(task, score, chosen)}, {', '.join(costs)}; {why}."


# ---- rankings and factors --------------------------------------------------------------------------


def _ranking(task: _Task, score: str, mark: str) -> Iterator[str]:
    compared, configs = task.compare(score), task.configurations
    yield f"## Ranking by {_score_name(score)}{mark}"
    yield ""
    rows = []
    for number in compared.index[:ROWS]:
        row = compared.loc[number]
        rows.append(
            {
                "rank": "" if pd.isna(row["rank"]) else str(row["rank"]),
                "configuration": task.labels[number],
                "seeds": _seeds(task.row(number, STATUSES)),
                stats.evaluation(score)[1]: _value(task, score, number),
                "against the best": _difference(row) if row["verdict"] != "best" else "",
                "p": _p(row["p_adjusted"]),
                "": {"best": "**best**", "tie": "tie", "unknown": "?"}.get(row["verdict"], "worse"),
                **_costs(task, number),
            }
        )
    yield from _table(rows)
    if len(compared) > ROWS:
        yield f"{len(compared) - ROWS} more configurations are in results.parquet."
        yield ""
    missing = configs.index.difference(compared.index)
    if len(missing):
        named = "; ".join(f"`{task.labels[n]}` ({_ended(task.row(n, STATUSES))})" for n in missing[:10])
        yield f"Without this score: {named}{' and others' if len(missing) > 10 else ''}."
        yield ""
    yield _meaning(compared, len(compared), score)
    yield ""


def _meaning(compared: pd.DataFrame, count: int, score: str) -> str:
    """What the intervals and p-values of a ranking are."""
    chance = compared["chance"].dropna().unique()
    covers = {
        "seeds and rows": "other seeds and other test rows",
        "rows": "other test rows, but not other seeds: there is one seed each",
        "seeds": "other seeds on the same test rows",
    }.get(chance[0] if len(chance) else "", "")
    if not covers:
        return "One seed and no rows: how far chance reaches is not known."
    scale = " Differences are relative." if len(compared) and compared["scale"].iloc[0] == "ratio" else ""
    if count < 2:
        return f"In brackets: the 95% interval, which covers {covers}."
    return (
        f"In brackets: 95% intervals, which cover {covers}. "
        f"p is adjusted for {_plural('pair', count * (count - 1) // 2)} (Holm); than those in a tie none is better "
        f"for certain.{scale}"
    )


def _factor(task: _Task, factor: str, mark: str, figures: Sequence[str]) -> Iterator[str]:
    name = _name(factor)
    yield f"## {name[0].upper()}{name[1:]}{mark}"
    yield ""
    quality = {score: task.effects(score, factor) for score in task.scores}
    first = next((found for found in quality.values() if len(found)), None)
    if first is not None:
        reference = str(first["reference"].iloc[0])
        costs = {
            column: task.effects(column, factor, reference)
            for column in (task.memory, SECONDS, ADAPTER)
            if column and column in task.table
        }
        yield from _table(_levels(task, factor, reference, quality, costs))
        contexts = sorted(set(first["contexts"]))
        over = f"{contexts[0]} to {contexts[-1]}" if len(contexts) > 1 else str(contexts[0])
        others = len(task.factors) > 1
        if others:
            yield f"Averaged over the {over} settings of the other factors that have both levels. {APPROXIMATE}"
            yield ""
        yield from (f"- {line}" for score in task.scores for line in _findings(task, factor, score))
        yield from (f"- {line}" for line in _cost_findings(task, factor, costs))
    elif task.design.levels[factor].nunique() > stats.MOST_LEVELS:
        yield from _trend(task, factor)
    elif task.scores:
        yield from _best_of_each(task, factor)
    yield from _budget(task, factor)
    yield ""
    yield from figures


def _levels(
    task: _Task,
    factor: str,
    reference: str,
    quality: Mapping[str, pd.DataFrame],
    costs: Mapping[str, pd.DataFrame],
) -> list[dict[str, str]]:
    """A row a level: its scores and costs, and how they differ from the reference's."""
    levels = {level: None for found in quality.values() for level in [*found["reference"], *found["level"]]}
    rows = []
    for level in sorted(levels, key=_sortable):
        row = {_name(factor): _plain(level)}
        for score, found in quality.items():
            title = _score_name(score)
            mine = found[found["level"] == level]
            if len(mine):
                one = mine.iloc[0]
                row[title] = _number(one["value"])
                row[f"{title} against {_plain(str(one['reference']))}"] = _difference(one)
            else:
                at = found[found["reference"] == level]["reference_value"]
                row[title] = _number(at.iloc[0]) if len(at) else ""
                row[f"{title} against {_plain(level)}"] = ""
        for column, found in costs.items():
            mine = found[found["level"] == level]
            row[_name(column)] = _change(column, mine.iloc[0]) if len(mine) else ("=" if level == reference else "")
        rows.append(row)
    return rows


def _findings(task: _Task, factor: str, score: str) -> list[str]:
    """What the data says of a factor, in sentences."""
    found = task.effects(score, factor)
    what, sentences = _score_name(score), []
    is_ = "is" if task.seeds > 1 else "came out"
    if factor == "config.method.r" and (line := _enough_rank(task, score)):
        return [line]
    if len(found) > 2:
        return [_several(factor, score, found)]
    for row in found.to_dict("records"):
        level, reference = stats.said_of(factor, row["level"]), stats.said_of(factor, row["reference"])
        where = f" ({row['agreeing']} of {row['contexts']} settings agree)" if row["contexts"] > 1 else ""
        if row["verdict"] == "tie":
            bound = max(abs(row["low"]), abs(row["high"]))
            sentences.append(
                f"{what}: no difference between `{level}` and `{reference}` is shown "
                f"({_difference(row)}); one of more than {_amount(bound, row['scale'])} is unlikely."
            )
        elif row["verdict"] in ("worse", "better"):
            sentences.append(
                f"{what}: `{level}` {is_} {row['verdict']} than `{reference}` by {_difference(row)}, "
                f"p {_p_is(row['p_adjusted'])}{where}."
            )
        else:
            sentences.append(
                f"{what}: `{level}` differs from `{reference}` by {_difference(row)}; chance is not known."
            )
    return sentences


def _several(factor: str, score: str, found: pd.DataFrame) -> str:
    """One sentence of a factor with many levels."""
    reference = stats.said_of(factor, found["reference"].iloc[0])
    parts = [f"{_score_name(score)}: `{reference}` has the best figure"]
    for verdict, words in (("tie", "no difference is shown from"), ("worse", "worse are"), ("unknown", "next to it")):
        those = found[found["verdict"] == verdict].to_dict("records")
        if those:
            named = (f"`{stats.said_of(factor, row['level'])}` ({_difference(row)})" for row in those[:8])
            parts.append(f"{words} {', '.join(named)}" + (f" and {len(those) - 8} more" if len(those) > 8 else ""))
    return "; ".join(parts) + "."


def _enough_rank(task: _Task, score: str) -> str:
    found = stats.returns(task.table, score, task.predictions, plan=task.design)
    if found.empty or found["verdict"].eq("unknown").any():
        return ""
    enough = found[found["verdict"].isin(["best", "tie"])].iloc[0]
    best, last = found[found["verdict"] == "best"].iloc[0], found.iloc[-1]
    before = found.iloc[-2]["level"]
    gain = _difference(
        {"difference": last["gain"], "low": last["gain_low"], "high": last["gain_high"], "scale": _scale(score)}
    )
    doubling = (
        f"The step from rank {before:g} to {last['level']:g} changed it by {gain} per doubling, plus being better."
    )
    if enough["level"] < best["level"]:
        return (
            f"{_score_name(score)}: rank {enough['level']:g} is the smallest that is not separable from the best, "
            f"{best['level']:g} ({_difference(enough)}). {doubling}"
        )
    if best["level"] == last["level"] and last["gain_low"] > 0:
        end = "the largest tried, is best, and returns have not ended there"
        return f"{_score_name(score)}: rank {best['level']:g}, {end}. {doubling}"
    smallest = best["level"] == found["level"].iloc[0]
    end = ", the smallest tried, has the best figure" if smallest else " is best, and the smaller ones are worse"
    return f"{_score_name(score)}: rank {best['level']:g}{end}. {doubling}"


def _cost_findings(task: _Task, factor: str, costs: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    for column, found in costs.items():
        for row in found.to_dict("records"):
            certain = row["verdict"] in ("worse", "better")
            if certain and abs(row["difference"]) >= 0.01 and column in (SECONDS, MEMORY_ON_DEVICE):
                level, reference = stats.said_of(factor, row["level"]), stats.said_of(factor, row["reference"])
                times = f"{1 + row['difference']:.2f} times [{1 + row['low']:.2f}, {1 + row['high']:.2f}]"
                yield f"{_name(column)}: `{level}` takes {times} that of `{reference}`."


def _best_of_each(task: _Task, factor: str) -> Iterator[str]:
    """Where levels share no other setting: the best configuration of each."""
    for score in task.scores:
        compared = task.compare(score)
        level = task.configurations.loc[compared.index, factor].astype("string").fillna("")
        rows = []
        for number in level[level != ""].drop_duplicates().index:
            row = compared.loc[number]
            rows.append(
                {
                    _name(factor): _plain(str(level[number])),
                    "best configuration": task.labels[number],
                    _score_name(score): _value(task, score, number),
                    "against the best": _difference(row) if row["verdict"] != "best" else "",
                    "": f"**{row['verdict']}**" if row["verdict"] == "best" else str(row["verdict"]),
                    **_costs(task, number),
                }
            )
        yield from _table(rows)
    yield "The levels share no setting of the other factors, so this compares the best configuration of each."
    yield ""


def _trend(task: _Task, factor: str) -> Iterator[str]:
    """A factor of many values: whether scores rise with it."""
    levels = pd.to_numeric(task.design.levels[factor], errors="coerce").astype("float64")
    yield f"{task.design.levels[factor].nunique()} values."
    yield ""
    for score in task.scores:
        found = stats.rank_correlation(levels.tolist(), task.configurations[score].reindex(levels.index).tolist())
        if _known(found.low):
            yield (
                f"- {_score_name(score)}: Spearman's correlation with it is {found.rho:.2f} "
                f"[{found.low:.2f}, {found.high:.2f}] over {found.n} configurations, whatever else differs."
            )


def _budget(task: _Task, factor: str) -> Iterator[str]:
    if factor != "choices.method":
        return
    found = stats.budget(task.table)
    unequal = [c for c in found.columns if found[c][found[c] > 0].nunique() > 1]
    if unequal:
        said = "; ".join(
            f"{column.replace('_', ' ')}: "
            + ", ".join(f"{method} {value:g}" for method, value in found[column].items())
            for column in unequal[:3]
        )
        yield ""
        yield f"**Unequal budgets**: the methods were not given the same tries ({said})."
        yield "More tries find a better best by luck alone."


# ---- the frontier and what to use ------------------------------------------------------------------


def _frontier(task: _Task, score: str, mark: str, figures: Sequence[str]) -> Iterator[str]:
    costs = [c for c in (task.memory, SECONDS, ADAPTER) if c and c in task.configurations]
    costs = [c for c in costs if task.configurations[c].nunique() > 1]
    if not costs or len(task.compare(score)) < 2:
        yield from figures
        return
    found = stats.pareto(task.table, [score, *costs], task.predictions)
    yield f"## Frontier{mark}"
    yield ""
    kept = found[found["front"] | (found["share"] >= 0.5)]
    sign = stats.direction(score) or 1
    kept = kept.iloc[(-sign * kept[score]).argsort()].head(ROWS)
    yield from _table(
        [
            {
                "configuration": task.labels[number],
                _score_name(score): _number(row[score]),
                **{_name(c): _cost(c, row[c]) for c in costs},
                "on the front": ("yes" if row["front"] else "no") + f", in {row['share']:.0%} of redraws",
            }
            for number, row in zip(kept.index, kept.to_dict("records"), strict=True)
        ]
    )
    yield (
        f"On the front is what no other configuration beats in one of {_score_name(score)}, "
        f"{', '.join(map(_name, costs))} without losing in another. "
        f"Redraws of {'seeds and ' if task.seeds > 1 else ''}test rows tell how much of that is chance; "
        f"{len(found) - len(kept)} of {len(found)} configurations are not listed."
    )
    yield ""
    yield from figures


def _recommendations(task: _Task, mark: str) -> Iterator[str]:
    judged = [score for score in task.scores if len(task.compare(score))]
    if not judged:
        return
    if max(len(task.compare(score)) for score in judged) < 2:
        yield from _room(task)
        return
    yield f"## Recommendations{mark}"
    yield ""
    for score in judged:
        needs: dict[Any, list[tuple[str, str]]] = {}
        for need, number, why in _uses(task, score):
            needs.setdefault(number, []).append((need, why))
        yield from _table(
            [
                {
                    "use": task.labels[number],
                    _score_name(score): _value(task, score, number),
                    "for": "; ".join(f"{need} ({why})" for need, why in reasons),
                }
                for number, reasons in needs.items()
            ]
        )
    yield from _room(task)


def _room(task: _Task) -> Iterator[str]:
    """Where every configuration fits into the smallest GPU."""
    column, name = _memory(task.configurations)
    if column and (most := task.configurations[column].max()) <= GPUS[0] * 1e9:
        yield f"Every configuration fits into {GPUS[0]} GB: at most {size(most)} of {name}."
        yield ""


def _memory(configs: pd.DataFrame) -> tuple[str | None, str]:
    """The column that tells what a trial needs, and what it is."""
    return next(((c, name) for c, name in MEMORY if c in configs and configs[c].notna().any()), (None, ""))


def _uses(task: _Task, score: str) -> Iterator[tuple[str, Any, str]]:
    compared, configs = task.compare(score), task.configurations
    tied, near = task.tied(score), task.near(score)
    best = compared.index[0]
    if len(compared) == 1:
        yield "what was measured", best, "the only one with this score"
        return
    yield "quality", best, "the best figure" + (f", in a tie with {len(tied) - 1} more" if len(tied) > 1 else "")
    for need, column in (("small adapter", ADAPTER), ("fast training", SECONDS), ("little memory", task.memory)):
        known = configs.loc[near, column].dropna() if column and column in configs else pd.Series(dtype=float)
        if len(known) > 1 and column and known.max() > 1.01 * known.min():
            yield f"{need} at that quality", known.idxmin(), _cost(column, known.min())
    yield from _fitting(task, compared)
    if SECONDS in configs and (every := configs.loc[compared.index, SECONDS].dropna()).size:
        fast = every.idxmin()
        if fast not in tied:
            yield (
                "speed before quality",
                fast,
                f"{_cost(SECONDS, every.min())}, at {_difference(compared.loc[fast])}",
            )


def _fitting(task: _Task, compared: pd.DataFrame) -> Iterator[tuple[str, Any, str]]:
    """The best configuration for each size of GPU, where the size makes a difference."""
    configs = task.configurations
    column, name = _memory(configs)
    if column is None or configs[column].max() <= GPUS[0] * 1e9:
        return
    need = configs.loc[compared.index, column]
    answers: list[tuple[int, Any]] = []
    for gigabytes in GPUS:
        fits = compared.index[(need <= gigabytes * 1e9).to_numpy(dtype=bool, na_value=False)]
        if len(fits) and (not answers or answers[-1][1] != fits[0]):
            answers.append((gigabytes, fits[0]))
    for gigabytes, number in answers:
        yield f"{gigabytes} GB of memory", number, f"{size(need[number])} {name}"


# ---- methodology -----------------------------------------------------------------------------------


def _methodology(table: pd.DataFrame, tasks: Sequence[_Task], steps: pd.DataFrame) -> Iterator[str]:
    yield from _failures(table, tasks)
    yield "## Methodology"
    yield ""
    if len(table):
        yield from (f"- {line}" for line in _environment(table))
        yield from (f"- {line}" for task in tasks for line in _measured(task, len(tasks) > 1))
        yield from (f"- {line}" for line in _tests(tasks))
    yield ""
    yield from _rungs(table, steps)


def _failures(table: pd.DataFrame, tasks: Sequence[_Task]) -> Iterator[str]:
    if not len(table):
        return
    ended = table[~table[stats.SUCCESS].isin([Status.success.name])]
    if ended.empty:
        return
    yield "## What did not work"
    yield ""
    label = {
        trial: task.labels[n] for task in tasks for trial, n in task.table[[stats.TRIAL, "configuration"]].to_numpy()
    }
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for row in ended.to_dict("records"):
        message = str(row.get("run_info.error.message") or "").strip().splitlines()
        kind = row.get("run_info.error.type")
        why = ": ".join(
            str(p) for p in (kind if _known(kind) else "", message[0] if message else "") if p and p != "<NA>"
        )
        stage = row.get("run_info.error.stage")
        key = (label.get(row[stats.TRIAL], row[stats.TRIAL]), row[stats.SUCCESS], stage if _known(stage) else "", why)
        rows.setdefault(key, []).append(row.get(stats.SEED))
    yield from _table(
        [
            {
                "configuration": key[0],
                "status": key[1],
                "seeds": ", ".join(map(str, seeds)),
                "stage": key[2],
                "why": key[3],
            }
            for key, seeds in list(rows.items())[:ROWS]
        ]
    )
    if len(rows) > ROWS:
        yield f"{len(rows) - ROWS} more are in results.parquet."
        yield ""


def _environment(table: pd.DataFrame) -> Iterator[str]:
    gpus = _values(table, "meta_info.torch.gpus")
    cpus = _values(table, "meta_info.system.processor")
    hardware = [gpu for gpu in gpus if gpu not in ("[]", "")] or [f"CPU only: {cpu}" for cpu in cpus]
    if hardware:
        yield "Hardware: " + "; ".join(", ".join(json.loads(h)) if h.startswith("[") else h for h in hardware) + "."
    if len(set(gpus)) > 1 or len(cpus) > 1:
        yield "**Several kinds of hardware**: times and memory of trials on different ones are not comparable."
    columns = [c for c in table.columns if c.startswith("meta_info.packages.") and c.endswith(".version")]
    versions = {c.removeprefix("meta_info.packages.").removesuffix(".version"): _values(table, c) for c in columns}
    if any(versions.values()):
        yield "Versions: " + ", ".join(f"{name} {' / '.join(found)}" for name, found in versions.items() if found) + "."
    if mixed := [name for name, found in versions.items() if len(found) > 1]:
        yield f"**Versions differ between trials**: {', '.join(mixed)}."
    commits = [commit[:10] for commit in _values(table, "run_info.git_commit")]
    if commits:
        yield f"Commit of the checkout the sweeps ran in: {', '.join(commits)}."
    dates = sorted(_values(table, stats.CREATED))
    if dates:
        yield f"Trials begun {dates[0][:10]}" + (f" to {dates[-1][:10]}." if dates[0][:10] != dates[-1][:10] else ".")


def _measured(task: _Task, several: bool) -> Iterator[str]:
    mark = f" ({task.name})" if several else ""
    seeds = _values(task.table, stats.SEED)
    counts = task.configurations["n"].value_counts().sort_index()
    each = ", ".join(f"{counts[n]} with {_plural('seed', n)}" for n in counts.index)
    yield f"Seeds{mark}: {', '.join(seeds[:20])}; configurations: {each}. Only successful trials count in means."
    for score in task.scores:
        n = f"{score.removesuffix('value')}n"
        rows = _values(task.table, n)
        if rows:
            yield f"{_score_name(score)}{mark}: {' / '.join(rows)} test rows, the same for all trials."
    reload = task.configurations.get("train_info.reloads")
    if reload is not None and (bad := int((reload < 1).sum())):
        yield f"**{_plural('configuration', bad)}{mark} saved an adapter that answers unlike the trained model**."


def _tests(tasks: Sequence[_Task]) -> Iterator[str]:
    judged = [(task, score) for task in tasks for score in task.scores if len(task.compare(score)) > 1]
    chances = {chance for task, score in judged for chance in task.compare(score)["chance"].dropna()}
    if "seeds and rows" in chances:
        yield (
            "Configurations are compared on the same test rows, each row's score averaged over seeds. The variance of "
            "a difference is that between rows plus that between seeds, with Satterthwaite's degrees of freedom and "
            "Student's t; a configuration's seeds are taken to vary at least as the study's do on average."
        )
    if "rows" in chances:
        yield (
            "With one seed each, right and wrong answers on the same test rows are compared by McNemar's exact test, "
            "other scores by the paired t test over rows. Both are of these trained models, not of what another seed "
            "would give."
        )
    if "seeds" in chances:
        yield "Where rows could not be paired, Student's t over seeds compares configurations, on these test rows."
    if chances:
        yield (
            "p-values are adjusted by Holm's method for all pairs, as which one is best was read from the same data; "
            "below 0.05 counts. A tie means that no difference is shown, not that there is none: the interval says how "
            "large it may be. So costs choose only among those of a tie that lie within one standard error of the best."
        )
    if any(score for _, score in judged if _scale(score) == "ratio"):
        yield "Perplexities and costs are compared by ratios."


def _rungs(table: pd.DataFrame, steps: pd.DataFrame) -> Iterator[str]:
    metric = "validation_loss"
    found = stats.rungs(steps, metric) if len(steps) else pd.DataFrame()
    found = found[found["n"] >= 3] if len(found) else found
    stopped = int((table[stats.SUCCESS] == Status.stopped.name).sum()) if len(table) else 0
    if found.empty and not stopped:
        return
    yield "### Could it have been stopped earlier?"
    yield ""
    if stopped:
        were = "was" if stopped == 1 else "were"
        yield f"{_plural('trial', stopped)} {were} stopped early; how they would have ended is not known."
        yield ""
    yield from _table(
        [
            {
                "after step": str(row["step"]),
                "rank correlation with the end": f"{row['rho']:.2f}"
                + (f" [{row['low']:.2f}, {row['high']:.2f}]" if _known(row["low"]) else ""),
                "trials": str(row["n"]),
                "the winner's place there": f"{row['place']:.0f}",
            }
            for row in found.to_dict("records")
        ]
    )
    if len(found):
        yield "Spearman's correlation of the validation loss there with that at the end, over trials that got so far."
        yield ""


# ---- figures as a person reads them ----------------------------------------------------------------


def _table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """A markdown table, readable as text too; the first columns of words are aligned left."""
    if not rows:
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [c for c in columns if any(row.get(c) for row in rows)]
    cells = [[str(row.get(c, "")).replace("|", "\\|").replace("\n", " ") for c in columns] for row in rows]
    widths = [max(len(c), 3, *(len(line[n]) for line in cells)) for n, c in enumerate(columns)]
    numeric = [all(not line[n] or line[n][0] in "0123456789+-−=<≈" for line in cells) for n in range(len(columns))]

    def line(parts: Sequence[str]) -> str:
        fitted = (p.rjust(w) if right else p.ljust(w) for p, w, right in zip(parts, widths, numeric, strict=True))
        return "| " + " | ".join(fitted) + " |"

    yield line(columns)
    yield (
        "|" + "|".join("-" * (w + 1) + (":" if right else "-") for w, right in zip(widths, numeric, strict=True)) + "|"
    )
    yield from (line(parts) for parts in cells)
    yield ""


def _costs(task: _Task, number: Any) -> dict[str, str]:
    shown = {PARAMETERS: "trainable", ADAPTER: "adapter", task.memory or "": "", SECONDS: "train", SPEED: "tokens/s"}
    shown[task.memory or ""] = _name(task.memory) if task.memory else ""
    row = task.row(number, tuple(c for c in shown if c))
    return {name: _cost(c, row[c]) for c, name in shown.items() if c in row and _known(row[c])}


def _cost(column: str, value: float) -> str:
    if not _known(value):
        return ""
    if column.startswith("memory.") or column.endswith("bytes"):
        return size(value)
    if column == SECONDS:
        return f"{value:,.1f} s" if value < 1000 else f"{value / 60:,.0f} min"
    return f"{value:,.0f}"


def _value(task: _Task, score: str, number: Any) -> str:
    """A score with its interval."""
    row = task.row(number, score)
    low, high = row.get(f"{score}.low", math.nan), row.get(f"{score}.high", math.nan)
    return _number(row[score]) + (f" [{_number(low)}, {_number(high)}]" if _known(low) and _known(high) else "")


def _number(value: float) -> str:
    if not _known(value):
        return "?"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.3g}"


def _difference(row: Any) -> str:
    """A difference with its interval."""
    middle = _amount(row["difference"], row["scale"], signed=True)
    if not _known(row["low"]):
        return middle
    low, high = (_amount(row[end], row["scale"], signed=True) for end in ("low", "high"))
    return f"{middle} [{low}, {high}]"


def _change(column: str, row: pd.Series[Any]) -> str:
    """A cost's difference; marked where it may be chance."""
    if row["difference"] == 0:
        return "="
    certain = column in (ADAPTER, PREDICTED) or row["verdict"] in ("worse", "better")
    return ("" if certain else "≈ ") + _amount(row["difference"], row["scale"], signed=True)


def _amount(value: float, scale: str, *, signed: bool = False) -> str:
    if not _known(value):
        return "?"
    sign = "+" if signed else ""
    if scale == "ratio":
        text = f"{value:{sign}.1%}" if abs(value) < 1 else f"{value:{sign},.0%}"
    else:
        text = f"{value:{sign}.3f}"
    return text.replace("-", "−")


def _scale(score: str) -> str:
    return "ratio" if "perplexity" in stats.evaluation(score)[1] else "difference"


def _p(p: float) -> str:
    return "" if not _known(p) else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.995 else "1"


def _p_is(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _score_name(score: str) -> str:
    name, metric = stats.evaluation(score)
    return metric if name == metric else f"{name} {metric}"


def _name(column: str) -> str:
    return NAMES.get(column, column.removeprefix("config.").removeprefix("choices."))


def _plain(level: str) -> str:
    return stats.said_of("choices.method", level)


def _sortable(level: str) -> tuple[int, float, str]:
    try:
        return 0, float(level), ""
    except ValueError:
        return 1, 0.0, level


def _seeds(row: Mapping[str, Any]) -> str:
    """The successful seeds, and how the others ended."""
    others = _ended(row, without=Status.success)
    return f"{row[Status.success.name]}" + (f" ({others})" if others else "")


def _ended(row: Mapping[str, Any], without: Status | None = None) -> str:
    return ", ".join(f"{row[s.name]} {s.name}" for s in Status if s is not without and row[s.name])


def _values(table: pd.DataFrame, column: str) -> list[str]:
    """The distinct values of a column, as text."""
    return [str(value) for value in table[column].dropna().unique()] if column in table else []


def _known(value: Any) -> bool:
    return value is not None and not pd.isna(value)
