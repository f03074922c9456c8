"""Tables -> RESULTS.md: what a study found, how sure that is, and what to use.

Every sentence is made from figures of the study; where the data does not tell, the sentence is not there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from peftsweep import record
from peftsweep.answer import columns, effects, findings, frontier, methodology, paired, rungs, stats, words
from peftsweep.answer.columns import HOST_MEMORY, PREDICTED, QUANT, RANK, TARGETS, WARNINGS
from peftsweep.answer.findings import Task
from peftsweep.answer.words import ADAPTER, PARAMETERS, ROWS, SECONDS, SPEED
from peftsweep.display import size
from peftsweep.record import Status

RESULTS = "RESULTS.md"
APPROXIMATE = "≈ marks a difference that may be chance."
MOST_NAMED = 12  # methods whose budgets are told one by one
MOST_VALUES = 6  # of a setting that are named
QUALITY_LOSS = 0.05  # of the best figure, which may be lost where speed goes before quality
GPUS = (8, 12, 16, 24, 40, 48, 80)  # GB, the common sizes
# What tells whether a trial fits on a device, the best source first, and what to call it.
MEMORY = (
    ("memory.train.reserved_peak", "memory the allocator held on the device while training"),
    (PREDICTED, "predicted training memory"),
    (HOST_MEMORY.column, "memory of the whole process on the host, as no device was measured"),
)
FIGURES = {  # how the figures of a factor are called
    RANK: ("rank", "quality_rank"),
    QUANT: ("quantisation", "heatmap"),
    TARGETS: ("modules",),
}
FRONTIER = ("frontier", "quality_")
FIGURE = re.compile(r"'[^']*'|\d[\d.,]*")  # what of a warning differs from one trial to the next
JUDGED = f"run_info.{record.JUDGED}"
READ_OTHERWISE = "an earlier version read answers by other rules than those of the others; force=true judges them anew"
WARNED = 5  # configurations that a warning names
STATUSES = tuple(status.name for status in Status)


def write(
    folder: Path,
    table: pd.DataFrame,
    steps: pd.DataFrame,
    plots: Sequence[Path] = (),
    predictions: stats.Predictions | None = None,
    quality_loss: float = QUALITY_LOSS,
) -> tuple[Path, list[str]]:
    """Write RESULTS.md of the study in ``folder``, whose trials are ``table``; the file, and its summary as text.

    ``quality_loss`` is the share of the best figure that may be lost where speed goes before quality.
    """
    file = folder / RESULTS
    tasks = _tasks(table, predictions)
    lines = _document(folder, table, tasks, steps, plots, quality_loss)
    record.write_text(file, "\n".join(lines).rstrip() + "\n")
    return file, _plain_summary(tasks)


def summary(table: pd.DataFrame, predictions: stats.Predictions | None = None) -> list[str]:
    """What `write` says in short, as text, of these trials alone."""
    return _plain_summary(_tasks(table, predictions))


def _tasks(table: pd.DataFrame, predictions: stats.Predictions | None) -> list[Task]:
    return [Task(name, part, predictions) for name, part in stats.tasks(table).items()]


def _plain_summary(tasks: Sequence[Task]) -> list[str]:
    """The summary of each task as text, below its name where there are several."""
    lines = []
    for task in tasks:
        lines += [f"{task.name}:"] if len(tasks) > 1 else []
        lines += [_unmarked(line.removeprefix("- ")) for line in task.summary]
    return lines


def _unmarked(text: str) -> str:
    return re.sub(r"\[([^\]]*)\]\(#[^)]*\)", r"\1", text).replace("**", "").replace("`", "")


def _document(
    folder: Path,
    table: pd.DataFrame,
    tasks: Sequence[Task],
    steps: pd.DataFrame,
    plots: Sequence[Path],
    quality_loss: float,
) -> Iterator[str]:
    every = {plot.stem: plot for plot in plots}
    yield f"# Results of the study {words.code(folder.name)}"
    yield ""
    yield _counts(table, tasks)
    yield ""
    yield "## Summary"
    yield ""
    for task in tasks:
        if len(tasks) > 1:
            yield f"**{task.name}**"
            yield ""
        yield from task.summary
        yield ""
    yield from _warnings(tasks)
    for task in tasks:
        mark = f" ({task.name})" if len(tasks) > 1 else ""
        ending = columns.file_mark(task.name) if len(tasks) > 1 else ""
        left = {stem.removesuffix(ending): every.pop(stem) for stem in list(every) if stem.endswith(ending)}
        for score in task.scores:
            yield from _ranking(task, score, mark)
        for factor in task.factors:
            yield from _factor(task, factor, mark, _take(left, FIGURES.get(factor, ()), folder))
        for score in task.scores[:1]:
            yield from _frontier(task, score, mark, _take(left, FRONTIER, folder))
        yield from _recommendations(task, mark, quality_loss)
        yield from paired.section(task, mark, folder)
        if left:
            yield f"## Figures{mark}"
            yield ""
            yield from _links(left.values(), folder)
    yield from _links(every.values(), folder)
    yield from methodology.methodology(table, tasks, steps)


def _warnings(tasks: Sequence[Task]) -> Iterator[str]:
    """What makes scores say less than they seem to, as the records have it; lines that differ in figures alone once."""
    found: dict[str, dict[str, list[str]]] = {}  # by the line without its figures, the line, the trials' labels
    for task in tasks:
        said = task.table[WARNINGS].dropna() if WARNINGS in task.table else pd.Series(dtype=object)
        for number, text in zip(task.table.loc[said.index, "configuration"], said, strict=True):
            for line in json.loads(text):
                same = found.setdefault(FIGURE.sub("#", line), {}).setdefault(line, [])
                same += [task.labels[number]] if task.labels[number] not in same else []
        if earlier := _judged_before(task):
            found[task.name] = {READ_OTHERWISE: earlier}
    if not found:
        return
    yield "## Warnings"
    yield ""
    for lines in found.values():
        line, labels = next(iter(lines.items()))
        named = ", ".join(words.code(label) for label in labels[:WARNED]) + (", ..." if len(labels) > WARNED else "")
        others = len({label for each in lines.values() for label in each}) - len(labels)
        alike = f"; with other figures: {words.plural('configuration', others)} more" if others else ""
        yield f"- {words.escaped(line)} ({named}{alike})."
    yield ""


def _judged_before(task: Task) -> list[str]:
    """The configurations that are compared with others though their answers were read by the rules before."""
    good = task.table[task.table[stats.SUCCESS] == Status.success.name]
    versions = good[JUDGED].fillna(1) if JUDGED in good else pd.Series(1, index=good.index)
    read = [c for c in good.columns if c.endswith(".valid_fraction.value")]
    if versions.nunique() < 2 or not read:
        return []
    before = good.loc[(versions < versions.max()) & good[read].notna().any(axis=1), "configuration"]
    return list(dict.fromkeys(task.labels[number] for number in before))


def _take(left: dict[str, Path], names: Sequence[str], folder: Path) -> list[str]:
    """Links to the figures called so, which are then no longer ``left``."""
    taken = [stem for stem in left if stem.startswith(tuple(names))] if names else []
    return list(_links([left.pop(stem) for stem in taken], folder))


def _links(plots: Iterable[Path], folder: Path) -> Iterator[str]:
    for plot in plots:
        yield f"![{plot.stem.replace('_', ' ')}]({plot.relative_to(folder).as_posix()})"
        yield ""


def _counts(table: pd.DataFrame, tasks: Sequence[Task]) -> str:
    if not len(table):
        return "No trial yet."
    statuses = table[stats.SUCCESS].value_counts()
    ended = ", ".join(f"{count} {status}" for status, count in statuses.items())
    configurations = sum(len(task.configurations) for task in tasks)
    seeds = [n for task in tasks for n in task.configurations["n"] if n]
    each = f"{min(seeds)}" if seeds and min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}" if seeds else ""
    of_each = " each" if configurations > 1 else ""
    tail = f", {each} successful {words.plural('seed', max(seeds), number=False)}{of_each}" if seeds else ""
    trials = f"{words.plural('trial', len(table))} ({ended}) of {words.plural('configuration', configurations)}{tail}."
    return trials + " Written by `peftsweep-collect` from the trials' records."


def _ranking(task: Task, score: str, mark: str) -> Iterator[str]:
    compared, configs = task.compare(score), task.configurations
    yield f"## Ranking by {columns.score_name(score)}{mark}"
    yield ""
    rows = []
    for number in compared.index[:ROWS]:
        row = compared.loc[number]
        rows.append(
            {
                "rank": "" if pd.isna(row["rank"]) else str(row["rank"]),
                "configuration": task.labels[number],
                "seeds": words.seeds(task.row(number, STATUSES)),
                columns.evaluation(score)[1]: findings.value_of(task, score, number),
                "against the best": words.difference(row) if row["verdict"] != "best" else "",
                "p": words.p(row["p_adjusted"]),
                "": _standing(row),
                "over the untouched base": _over_base(row),
                **_costs(task, number),
            }
        )
    yield from words.table(rows)
    if len(compared) > ROWS:
        yield f"{len(compared) - ROWS} more configurations are in results.parquet."
        yield ""
    missing = configs.index.difference(compared.index)
    if len(missing):
        named = "; ".join(f"{words.code(task.labels[n])} ({words.ended(task.row(n, STATUSES))})" for n in missing[:10])
        yield f"Without this score: {named}{' and others' if len(missing) > 10 else ''}."
        yield ""
    yield _meaning(compared, len(compared), score)
    yield ""
    yield from _not_in_names(task, compared.index[:ROWS].tolist())


def _not_in_names(task: Task, numbers: list[int]) -> Iterator[str]:
    """The settings that configurations differ in and that their names do not hold, as they follow from others."""
    moved = {one.key for number in numbers[1:] for one in task.unnamed(numbers[0], number)}
    texts = task.design.settings.loc[numbers]
    value = task.names.value
    parts = []
    for key in sorted(moved):
        values = [value(key, text) if text else "none" for text in sorted(set(texts[key]), key=words.sortable)]
        some = f"{len(values)} values" if len(values) > MOST_VALUES else ", ".join(values)
        parts.append(f"{task.names.key(key)} ({some})")
    if parts:
        yield f"Not in these names, but not the same in all: {', '.join(parts)}."
        yield ""


def _over_base(row: pd.Series[Any]) -> str:
    """What a configuration gains over its untouched base."""
    if not words.known(row["gain"]):
        return ""
    parts = {"difference": row["gain"], "low": row["gain_low"], "high": row["gain_high"], "scale": row["scale"]}
    return f"{words.difference(parts)}, p {words.p_is(row['gain_p_adjusted'])}"


def _standing(row: pd.Series[Any]) -> str:
    """A configuration may be no worse than the best for certain, and yet than one that is in a tie with it."""
    other = row["verdict"] == "worse" and row["p_adjusted"] >= stats.ALPHA
    return "worse than another" if other else {"best": "**best**", "unknown": "?"}.get(row["verdict"], row["verdict"])


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
    others = (compared["verdict"] == "worse") & (compared["p_adjusted"] >= stats.ALPHA)
    of_base = ", those with the untouched base among them" if compared["gain"].notna().any() else ""
    pairs = words.plural("pair", compared.attrs["family"]) + of_base
    another = " Worse than another: than one of the tie, not for certain than the best." if others.any() else ""
    return (
        f"In brackets: 95% intervals, which cover {covers}. p is adjusted for {pairs} "
        f"(Holm), the intervals are not; than those in a tie none is better for certain.{another}{scale}"
    )


def _factor(task: Task, factor: str, mark: str, figures: Sequence[str]) -> Iterator[str]:
    name, told = columns.factor_name(factor), [*_told(task, factor), "", *figures]
    if any(told):
        yield f"## {name[0].upper()}{name[1:]}{mark}"
        yield ""
        yield from told


def _told(task: Task, factor: str) -> Iterator[str]:
    """All that is known of a factor."""
    measured = [column for column in (task.memory, SECONDS, ADAPTER) if column and column in task.table]
    quality = {score: task.effects(score, factor) for score in task.scores}
    of_first = quality.values() if quality else (task.effects(column, factor) for column in measured)
    first = next((found for found in of_first if len(found)), None)
    if first is not None:
        reference = str(first["reference"].iloc[0])
        costs = {column: task.effects(column, factor, reference) for column in measured}
        yield from words.table(_levels(task, factor, reference, quality, costs))
        if len(task.factors) > 1:
            contexts = sorted(set(first["contexts"]))
            over = f"{contexts[0]} to {contexts[-1]}" if len(contexts) > 1 else str(contexts[0])
            averaged = f"Averaged over the {over} settings of the other factors that have both levels."
            yield f"{averaged if contexts[-1] > 1 else 'In the one setting that has both levels.'} {APPROXIMATE}"
            yield ""
        if not quality and (moving := task.design.moving(factor)):
            yield f"- With the {columns.factor_name(factor)} moved {', '.join(map(task.names.key, moving))}."
        yield from (f"- {line}" for score in task.scores for line in findings.of_factor(task, factor, score))
        yield from (f"- {line}" for line in findings.cost_findings(task, factor, costs))
    elif task.design.levels[factor].nunique() > effects.MOST_LEVELS:
        yield from _trend(task, factor)
    elif task.scores:
        yield from _best_of_each(task, factor)
    yield from _budget(task, factor)


def _levels(
    task: Task,
    factor: str,
    reference: str,
    quality: Mapping[str, pd.DataFrame],
    costs: Mapping[str, pd.DataFrame],
) -> list[dict[str, str]]:
    """A row a level: its scores and costs, and how they differ from the reference's."""
    tables = [*quality.values(), *costs.values()]
    levels = {level: None for found in tables for level in [*found["reference"], *found["level"]]}
    counts = {int(count) for found in tables for count in found["contexts"]}
    rows = []
    for level in sorted(levels, key=words.sortable):
        row = {columns.factor_name(factor): columns.level_name(factor, level, task.names)}
        for score, found in quality.items():
            row |= _score_cells(task, factor, score, found, level, several=counts != {1})
        for column, found in costs.items():
            row[columns.factor_name(column)] = _cost_cell(column, found, level, reference, several=counts != {1})
        rows.append(row)
    return rows


def _score_cells(
    task: Task, factor: str, score: str, found: pd.DataFrame, level: str, *, several: bool
) -> dict[str, str]:
    """A level's score and how it differs from the reference's, both over the settings that have the two."""
    if found.empty:
        return {}
    title, first = columns.score_name(score), found.iloc[0]
    against = f"{title} against {columns.level_name(factor, first['reference'], task.names)}"
    if level == first["reference"]:
        one = found["reference_value"].round(12).nunique() == 1  # else each level is held against other settings
        return {title: words.number(first["reference_value"]) if one else "", against: ""}
    mine = found[found["level"] == level]
    if mine.empty:
        return {title: "", against: ""}
    row = mine.iloc[0]
    said = words.difference(row)
    if found["reference_value"].round(12).nunique() > 1:
        said += f", from {words.number(row['reference_value'])}"
    return {title: words.number(row["value"]), against: said + _settings(row, several)}


def _cost_cell(column: str, found: pd.DataFrame, level: str, reference: str, *, several: bool) -> str:
    mine = found[found["level"] == level]
    if mine.empty:
        return "=" if level == reference else ""
    return words.change(column, mine.iloc[0]) + _settings(mine.iloc[0], several)


def _settings(row: pd.Series[Any], several: bool) -> str:
    """Over how many settings a cell is averaged, where that is not one everywhere."""
    return f" ({words.plural('setting', row['contexts'])})" if several else ""


def _best_of_each(task: Task, factor: str) -> Iterator[str]:
    """Where levels share no other setting: the best configuration of each."""
    several = False
    for score in task.scores:
        compared = task.compare(score)
        level = task.configurations.loc[compared.index, factor].astype("string").fillna("")
        if level[level != ""].nunique() < 2:
            continue
        several = True
        rows = []
        for number in level[level != ""].drop_duplicates().index:
            row = compared.loc[number]
            rows.append(
                {
                    columns.factor_name(factor): columns.level_name(factor, level[number], task.names),
                    "best configuration": task.labels[number],
                    columns.score_name(score): findings.value_of(task, score, number),
                    "against the best": words.difference(row) if row["verdict"] != "best" else "",
                    "": _standing(row),
                    **_costs(task, number),
                }
            )
        yield from words.table(rows)
    if several:
        yield "The levels share no setting of the other factors, so this compares the best configuration of each."
        yield ""


def _trend(task: Task, factor: str) -> Iterator[str]:
    """A factor of many values: whether scores rise with it."""
    levels = pd.to_numeric(task.design.levels[factor], errors="coerce").astype("float64")
    yield f"{task.design.levels[factor].nunique()} values."
    yield ""
    for score in task.scores:
        found = rungs.rank_correlation(levels.tolist(), task.configurations[score].reindex(levels.index).tolist())
        if words.known(found.low):
            yield (
                f"- {columns.score_name(score)}: Spearman's correlation with it is {found.rho:.2f} "
                f"[{found.low:.2f}, {found.high:.2f}] over {found.n} configurations, whatever else differs."
            )


def _budget(task: Task, factor: str) -> Iterator[str]:
    if factor != columns.METHOD:
        return
    found = effects.budget(task.table)
    unequal = [c for c in found.columns if found[c][found[c] > 0].nunique() > 1]
    if unequal:
        each = len(found) <= MOST_NAMED
        said = "; ".join(
            f"{column.replace('_', ' ')}: "
            + ", ".join(f"{method} {value:g}" for method, value in found[column].items() if each)
            + ("" if each else f"{found[column].min():g} to {found[column].max():g}")
            for column in unequal[:3]
        )
        yield ""
        yield f"**Unequal budgets**: the methods were not given the same tries ({said})."
        yield "More tries find a better best by luck alone."


def _frontier(task: Task, score: str, mark: str, figures: Sequence[str]) -> Iterator[str]:
    costs = [c for c in (task.memory, SECONDS, ADAPTER) if c and c in task.configurations]
    costs = [c for c in costs if task.configurations[c].nunique() > 1]
    if not costs or len(task.compare(score)) < 2:
        yield from figures
        return
    found = frontier.pareto(task.table, [score, *costs], task.predictions)
    yield f"## Frontier{mark}"
    yield ""
    drawn = {"seeds and rows": "seeds and test rows", "rows": "test rows"}.get(found.attrs["chance"] or "", "seeds")
    kept = found[found["front"] | (found["share"] >= 0.5)]
    sign = columns.direction(score) or 1
    kept = kept.iloc[(-sign * kept[score]).argsort()].head(ROWS)
    yield from words.table(
        [
            {
                "configuration": task.labels[number],
                columns.score_name(score): words.number(row[score]),
                **{columns.factor_name(c): words.cost(c, row[c]) for c in costs},
                "on the front": ("yes" if row["front"] else "no") + f", in {row['share']:.0%} of redraws",
            }
            for number, row in zip(kept.index, kept.to_dict("records"), strict=True)
        ]
    )
    yield (
        f"On the front is what no other configuration beats in one of {columns.score_name(score)}, "
        f"{', '.join(map(columns.factor_name, costs))} without losing in another. "
        f"Redraws of {drawn} tell how much of that is chance."
        + (
            f" Without some of these figures: {lacking:,}."
            if (lacking := len(task.compare(score)) - len(found))
            else ""
        )
        + (f" Not listed: {left:,} of {len(found):,} configurations." if (left := len(found) - len(kept)) else "")
    )
    yield ""
    yield from figures


def _recommendations(task: Task, mark: str, quality_loss: float) -> Iterator[str]:
    judged = [score for score in task.scores if len(task.compare(score)) and not findings.no_gain(task, score)]
    if not judged:
        return
    if max(len(task.compare(score)) for score in judged) < 2:
        yield from _room(task)
        return
    yield f"## Recommendations{mark}"
    yield ""
    for score in judged:
        needs: dict[Any, list[tuple[str, str]]] = {}
        for need, number, why in _uses(task, score, quality_loss):
            needs.setdefault(number, []).append((need, why))
        yield from words.table(
            [
                {
                    "use": task.labels[number],
                    columns.score_name(score): findings.value_of(task, score, number),
                    "for": "; ".join(f"{need} ({why})" for need, why in reasons),
                }
                for number, reasons in needs.items()
            ]
        )
    yield from _room(task)


def _room(task: Task) -> Iterator[str]:
    """Where every configuration fits into the smallest GPU."""
    column, name = _memory(task.configurations)
    known = task.configurations[column].dropna() if column else pd.Series(dtype=float)
    if len(known) and known.max() <= GPUS[0] * 1e9:
        all_known = "Every configuration" if len(known) == len(task.configurations) else "What succeeded"
        yield f"{all_known} fits into {GPUS[0]} GB: at most {size(known.max())} of {name}."
        yield ""


def _memory(configs: pd.DataFrame) -> tuple[str | None, str]:
    """The column that tells what a trial needs, and what it is."""
    return next(((c, name) for c, name in MEMORY if c in configs and configs[c].notna().any()), (None, ""))


def _uses(task: Task, score: str, quality_loss: float) -> Iterator[tuple[str, Any, str]]:
    compared, configs = task.compare(score), task.configurations
    tied, near = task.tied(score), task.near(score)
    best, useful = compared.index[0], task.useful(score)
    if len(compared) == 1:
        yield "what was measured", best, "the only one with this score"
        return
    if best in useful:
        yield "quality", best, "the best figure" + (f", in a tie with {len(tied) - 1} more" if len(tied) > 1 else "")
    else:
        yield "quality", useful[0], "the best figure of those that are shown to be better than the untouched base"
    for need, column in (("small adapter", ADAPTER), ("fast training", SECONDS), ("little memory", task.memory)):
        known = configs.loc[near, column].dropna() if column and column in configs else pd.Series(dtype=float)
        if len(known) > 1 and column and known.max() > 1.01 * known.min():
            yield f"{need} at that quality", known.idxmin(), words.cost(column, known.min())
    yield from _fitting(task, compared.loc[useful])
    yield from _faster(task, score, near, quality_loss)


def _faster(task: Task, score: str, near: pd.Index[Any], quality_loss: float) -> Iterator[tuple[str, Any, str]]:
    """The fastest configuration that loses no more quality than ``quality_loss``, a share of the best figure.

    The whole 95% interval of its loss must lie within that, and it must be better than the untouched base.
    """
    compared, configs, sign = task.compare(score), task.configurations, columns.direction(score) or 1
    if SECONDS not in configs or not compared["value"].gt(0).all():
        return
    best = compared.iloc[0]
    bound = quality_loss if best["scale"] == "ratio" else quality_loss * best["value"]
    loss = -compared["low"] if sign > 0 else compared["high"]
    enough = compared.index[(loss <= bound).to_numpy() & compared.index.isin(task.useful(score))]
    seconds = configs.loc[enough, SECONDS].dropna().astype(float)
    if seconds.empty or (fast := seconds.idxmin()) in near or seconds[fast] > configs.loc[near, SECONDS].min():
        return
    lost = f"at {words.difference(compared.loc[fast])} from the best"
    most = f"a loss of at most {words.amount(bound, best['scale'])} is accepted, {quality_loss:.0%} of the best"
    yield "speed before quality", fast, f"{words.cost(SECONDS, seconds[fast])}, {lost}; {most}"


def _fitting(task: Task, compared: pd.DataFrame) -> Iterator[tuple[str, Any, str]]:
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


def _costs(task: Task, number: Any) -> dict[str, str]:
    shown = {PARAMETERS: "trainable", ADAPTER: "adapter", task.memory or "": "", SECONDS: "train", SPEED: "tokens/s"}
    shown[task.memory or ""] = columns.factor_name(task.memory) if task.memory else ""
    row = task.row(number, tuple(c for c in shown if c))
    return {name: words.cost(c, row[c]) for c, name in shown.items() if c in row and words.known(row[c])}
