"""Tables -> RESULTS.md: what a study found, how sure that is, and what to use.

Every sentence is made from figures of the study; where the data does not tell, the sentence is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from peftsweep.analysis.answer import build, render, structure
from peftsweep.analysis.answer.structure import USE, Answer, Use
from peftsweep.analysis.statistics import frontier
from peftsweep.analysis.statistics import trials as statistics_trials
from peftsweep.analysis.statistics.task import Task, study_tasks
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import QUANT, RANK, TARGETS, TRAINING_TIME
from peftsweep.analysis.text import findings, methodology, paired, recommendations, words
from peftsweep.analysis.text.factors import cost_cells, factor_section, standing_cell
from peftsweep.analysis.text.recommendations import QUALITY_LOSS
from peftsweep.analysis.text.words import ADAPTER, ROWS, SECONDS
from peftsweep.study import record
from peftsweep.study.record import Status

RESULTS = "RESULTS.md"
MAX_VALUES = 6  # of a setting; of one with more values their number is given
FIGURES = {  # how the figures of a factor are called
    RANK: ("rank", "quality_rank"),
    QUANT: ("quantisation", "heatmap"),
    TARGETS: ("modules",),
}
FRONTIER = ("frontier", "quality_")
STATUSES = tuple(status.name for status in Status)


def write(
    folder: Path,
    table: pd.DataFrame,
    steps: pd.DataFrame,
    plots: Sequence[Path] = (),
    predictions: statistics_trials.Predictions | None = None,
    quality_loss: float = QUALITY_LOSS,
    tasks: Sequence[Task] | None = None,
) -> tuple[Path, Answer]:
    """Write RESULTS.md and answer.json of the study in ``folder``, whose trials are ``table``; gives the file and both.

    ``quality_loss`` is the share of the best figure that may be lost where speed goes before quality; ``tasks`` are
    those of ``table``, where they are known.
    """
    file, found = folder / RESULTS, study_tasks(table, predictions) if tasks is None else tasks
    answer = build.answer(folder, table, found, steps, quality_loss)
    structure.write(answer, folder, render.plain)
    lines = _document(folder, table, found, answer, steps, plots, quality_loss)
    record.write_text(file, "\n".join(lines).rstrip() + "\n")
    return file, answer


def _document(
    folder: Path,
    table: pd.DataFrame,
    tasks: Sequence[Task],
    answer: Answer,
    steps: pd.DataFrame,
    plots: Sequence[Path],
    quality_loss: float,
) -> Iterator[str]:
    every = {plot.stem: plot for plot in plots}
    yield f"# Results of the study {words.code(folder.name)}"
    yield ""
    yield _counts(table, tasks)
    yield ""
    for section in answer.sections:
        if section.sentences:
            yield from render.markdown(section)
    for section in answer.sections_named("table"):
        if len(section.tables) > 1:  # a ranking has what a table of one score has
            yield from render.markdown(section)
    for task in tasks:
        mark = f" ({task.name})" if len(tasks) > 1 else ""
        ending = columns.file_mark(task.name) if len(tasks) > 1 else ""
        left = {stem.removesuffix(ending): every.pop(stem) for stem in list(every) if stem.endswith(ending)}
        for score in task.scores:
            yield from _ranking(task, score, mark)
        for factor in task.factors:
            yield from factor_section(task, factor, mark, _take(left, FIGURES.get(factor, ()), folder))
        for score in task.scores[:1]:
            yield from _frontier(task, score, mark, _take(left, FRONTIER, folder))
        advised = [one.facts for one in answer.sections_named(USE) if one.task in ("", task.name)]
        if not any(isinstance(use, Use) and use.verdict == "none" for use in advised):
            yield from recommendations.section(task, mark, quality_loss)
        yield from paired.section(task, mark, folder)
        if left:
            yield f"## Figures{mark}"
            yield ""
            yield from _links(left.values(), folder)
    yield from _links(every.values(), folder)
    yield from methodology.methodology(table, tasks, steps)
    for section in answer.sections:
        if not section.sentences and section.name != "table":
            yield from render.markdown(section)


def _take(left: dict[str, Path], names: Sequence[str], folder: Path) -> list[str]:
    """Links to the figures whose names begin with one of ``names``; these are removed from ``left``."""
    taken = [stem for stem in left if stem.startswith(tuple(names))] if names else []
    return list(_links([left.pop(stem) for stem in taken], folder))


def _links(plots: Iterable[Path], folder: Path) -> Iterator[str]:
    for plot in plots:
        yield f"![{plot.stem.replace('_', ' ')}]({plot.relative_to(folder).as_posix()})"
        yield ""


def _counts(table: pd.DataFrame, tasks: Sequence[Task]) -> str:
    if not len(table):
        return "No trial yet."
    statuses = table[statistics_trials.SUCCESS].value_counts()
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
                "seeds": _seeds(task.row(number, STATUSES), row["seeds"]),
                columns.evaluation(score)[1]: findings.value_of(task, score, number),
                "against the best": words.difference(row) if row["verdict"] != "best" else "",
                "p": words.p(row["p_adjusted"]),
                "": standing_cell(row),
                "over the untouched base": findings.over_base(row),
                **cost_cells(task, number),
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
    yield _meaning(compared)
    yield ""
    yield from _not_in_names(task, compared.index[:ROWS].tolist())


def _seeds(ended: Mapping[str, Any], scored: int) -> str:
    """The seeds of a configuration by how they ended, and how many of them the score is of where that is fewer."""
    without = ended[Status.success.name] > scored
    return words.seeds(ended) + (f", {scored} with this score" if without else "")


def _not_in_names(task: Task, numbers: list[int]) -> Iterator[str]:
    """The settings in which configurations differ and which are not in their names, as they follow from others."""
    moved = {one.key for number in numbers[1:] for one in task.unnamed(numbers[0], number)}
    texts = task.design.settings.loc[numbers]
    value = task.names.value
    parts = []
    for key in sorted(moved):
        values = [value(key, text) if text else "none" for text in sorted(set(texts[key]), key=columns.sortable)]
        some = f"{len(values)} values" if len(values) > MAX_VALUES else ", ".join(values)
        parts.append(f"{task.names.key(key)} ({some})")
    if parts:
        yield f"These settings differ too, and are not in the names: {', '.join(parts)}."
        yield ""


def _meaning(compared: pd.DataFrame) -> str:
    """What the intervals and p-values of a ranking are."""
    chance = compared["chance"].dropna().unique()
    if not len(chance):
        return "One seed and no record of single rows: the uncertainty is not known."
    covers = build.COVERS[chance[0]] + (": there is one seed each" if chance[0] == "rows" else "")
    scale = " Differences are relative." if compared["scale"].iloc[0] == "ratio" else ""
    if len(compared) < 2:
        return f"In brackets: the 95% interval, which covers {covers}."
    others = (compared["verdict"] == "worse") & (compared["p_adjusted"] >= statistics_trials.ALPHA)
    of_base = ", those with the untouched base among them" if compared["gain"].notna().any() else ""
    pairs = words.plural("pair", compared.attrs["family"]) + of_base
    another = (
        " 'Worse than another': worse than one of the tie, while no difference from the best is shown."
        if others.any()
        else ""
    )
    return (
        f"In brackets: 95% intervals, which cover {covers}. p is adjusted for {pairs} "
        f"(Holm), the intervals are not; no configuration is shown to be better than those in a tie.{another}{scale}"
    )


def _frontier(task: Task, score: str, mark: str, figures: Sequence[str]) -> Iterator[str]:
    timed = TRAINING_TIME in task.weighed_costs
    costs = [c for c in (task.memory, SECONDS if timed else None, ADAPTER) if c and c in task.configurations]
    costs = [c for c in costs if task.configurations[c].nunique() > 1]
    if not costs or len(task.compare(score)) < 2:
        yield from figures
        return
    weighed = [score, *costs]
    found = frontier.pareto(task.table, task.configurations, weighed, task.predictions, known=task.measured)
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
                "on the front": ("yes" if row["front"] else "no")
                + (f", in {row['share']:.0%} of redraws" if words.known(row["share"]) else ""),
            }
            for number, row in zip(kept.index, kept.to_dict("records"), strict=True)
        ]
    )
    holds = f"Redraws of {drawn} (bootstrap) show how often that holds"
    holds += "; costs measured once are the same in all of them." if task.configurations["n"].min() < 2 else "."
    if found["share"].isna().any():
        holds = "How often that holds by chance is not known, as some scores have no standard error."
    yield (
        f"A configuration is on the front if no other one is better in one of {columns.score_name(score)}, "
        f"{', '.join(map(columns.factor_name, costs))} and at least as good in the others. {holds}"
        + (
            f" Configurations without some of these figures: {lacking:,}."
            if (lacking := len(task.compare(score)) - len(found))
            else ""
        )
        + (f" Not listed: {left:,} of {len(found):,} configurations." if (left := len(found) - len(kept)) else "")
    )
    yield ""
    yield from figures
