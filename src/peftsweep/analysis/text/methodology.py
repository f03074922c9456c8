"""How the figures of a study were measured: the machine, the numbers of seeds and rows, the statistical tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pandas as pd

from peftsweep.analysis.statistics import rungs, trials
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.text import words
from peftsweep.analysis.text.words import ROWS
from peftsweep.study.record import Status

COVERED = "train_info.coverage.line"
MAX_NAMES = 8  # of configurations that adapt the same modules


def methodology(table: pd.DataFrame, tasks: Sequence[Task], steps: pd.DataFrame) -> Iterator[str]:
    """The last section of the report."""
    yield "## Methodology"
    yield ""
    if len(table):
        yield from (f"- {line}" for line in _environment(table))
        yield from (f"- {line}" for task in tasks for line in _measured(task, len(tasks) > 1))
        yield from (f"- {line}" for line in _tests(tasks))
    yield ""
    yield from _rung_predictions(table, steps)


def _environment(table: pd.DataFrame) -> Iterator[str]:
    gpus = words.values(table, "meta_info.torch.gpus")
    cpus = words.values(table, "meta_info.system.processor")
    hardware = [gpu for gpu in gpus if gpu not in ("[]", "")] or [f"CPU only: {cpu}" for cpu in cpus]
    if hardware:
        yield "Hardware: " + "; ".join(", ".join(json.loads(h)) if h.startswith("[") else h for h in hardware) + "."
    if len(set(gpus)) > 1 or len(cpus) > 1:
        yield "**Several kinds of hardware**: times and memory of trials on different ones are not comparable."
    columns = [c for c in table.columns if c.startswith("meta_info.packages.") and c.endswith(".version")]
    versions = {c.removeprefix("meta_info.packages.").removesuffix(".version"): words.values(table, c) for c in columns}
    if any(versions.values()):
        yield "Versions: " + ", ".join(f"{name} {' / '.join(found)}" for name, found in versions.items() if found) + "."
    if mixed := [name for name, found in versions.items() if len(found) > 1]:
        yield f"**Versions differ between trials**: {', '.join(mixed)}."
    commits = [commit[:10] for commit in words.values(table, "run_info.git_commit")]
    if commits:
        yield f"Commit of the checkout the sweeps ran in: {', '.join(commits)}."
    dates = sorted(words.values(table, trials.CREATED))
    if dates:
        yield f"Trials begun {dates[0][:10]}" + (f" to {dates[-1][:10]}." if dates[0][:10] != dates[-1][:10] else ".")


def _measured(task: Task, several: bool) -> Iterator[str]:
    mark = f" ({task.name})" if several else ""
    seeds = words.values(task.table, trials.SEED)
    counts = task.configurations["n"].value_counts().sort_index()
    each = ", ".join(f"{counts[n]} with {words.plural('seed', n)}" for n in counts.index)
    yield f"Seeds{mark}: {', '.join(seeds[:20])}; configurations: {each}. Only successful trials count in means."
    for score in task.scores:
        n = f"{score.removesuffix('value')}n"
        rows = words.values(task.table, n)
        if len(rows) > 1:
            yield f"**{columns.score_name(score)}{mark}: not all trials had as many test rows**: {', '.join(rows)}."
        elif rows:
            yield f"{columns.score_name(score)}{mark}: {rows[0]} test rows."
    if packed := int(trials.packed(task.table).sum()):
        trained = f"{words.plural('trial', packed)}{mark} {'was' if packed == 1 else 'were'} trained in packs"
        yield f"{trained}: what a pack took in time and memory is not a trial's, and is left out."
    yield from _covered(task, mark)
    reload = task.configurations.get("train_info.reloads")
    if reload is not None and (bad := int((reload < 1).sum())):
        yield f"**{words.plural('configuration', bad)}{mark} saved an adapter that answers unlike the trained model**."


def _covered(task: Task, mark: str) -> Iterator[str]:
    """Which modules of the base each configuration adapts; configurations that adapt the same are named together."""
    if COVERED not in task.table:
        return
    known = task.table.dropna(subset=[COVERED])
    for line, rows in list(known.groupby(COVERED, sort=False))[:ROWS]:
        names = list(dict.fromkeys(task.labels[number] for number in rows["configuration"]))
        named = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        yield f"What was adapted{mark}: {named}: {line}."


def _tests(tasks: Sequence[Task]) -> Iterator[str]:
    judged = [(task, score) for task in tasks for score in task.scores if len(task.compare(score)) > 1]
    chances = {chance for task, score in judged for chance in task.compare(score)["chance"].dropna()}
    of_both = [
        found for found in (task.compare(score) for task, score in judged) if "seeds and rows" in set(found["chance"])
    ]
    if any(not found.attrs["paired"] for found in of_both):
        yield (
            "Where not all were judged on the same test rows, the variance of a difference is that between seeds plus "
            "that of each score over its own rows."
        )
    if any(found.attrs["paired"] for found in of_both):
        yield (
            "Configurations are compared on the same test rows, each row's score averaged over seeds. The variance of "
            "a difference is that between rows plus that between seeds, with Satterthwaite's degrees of freedom and "
            "Student's t; the variance between a configuration's seeds is taken to be at least the study's average."
        )
    by_rows = [task.compare(score) for task, score in judged if "rows" in set(task.compare(score)["chance"])]
    if any(not compared.attrs["paired"] for compared in by_rows):
        yield (
            "Where there is one seed each and no record of single rows, scores are compared by their standard errors, "
            "as if each had been judged on rows of its own, which shows fewer differences than pairing the rows would."
        )
    if any(compared.attrs["paired"] for compared in by_rows):
        yield (
            "With one seed each, right and wrong answers on the same test rows are compared by McNemar's exact test, "
            "other scores by the paired t test over rows. Both are of these trained models, not of what another seed "
            "would give."
        )
    yield from _base_comparisons([task.compare(score) for task, score in judged])
    if "seeds" in chances:
        yield "Where rows could not be paired, Student's t over seeds compares configurations, on these test rows."
    if chances:
        yield (
            "p-values are adjusted by Holm's method for all pairs of configurations of a score, as the best one is "
            "chosen from the same data; those of the levels of a choice, averaged over the other choices, for all "
            "pairs of levels of all choices. One below 0.05 counts as a difference. Intervals are of each pair alone, "
            "and not adjusted. A tie means that no difference is shown, not that there is none: the interval says how "
            "large it may be. So costs decide only between configurations of a tie that lie within one standard error "
            "of the best."
            " The best figure of many is partly luck, and would probably be worse on other rows."
        )
    if (several := max((len(task.scores) for task in tasks), default=0)) > 1 and chances:
        yield (
            f"Each score is adjusted by itself. Of studies in which nothing differs, about 5% show a difference by one "
            f"score, and the more scores there are (here {several}), the more show one by some score."
        )
    if any(score for _, score in judged if words.scale(score) == "ratio"):
        yield "Perplexities and costs are compared by ratios."


def _base_comparisons(compared: Sequence[pd.DataFrame]) -> Iterator[str]:
    """How configurations are compared with their untouched bases."""
    of_base = [one for one in compared if one["gain"].notna().any()]
    if any(one.attrs["gains_paired"] for one in of_base):
        yield (
            "Each configuration is compared with its untouched base on the same rows, as with another configuration, "
            "and adjusted together with them; a base has no seed."
        )
    if not all(one.attrs["gains_paired"] for one in of_base):
        yield (
            "Where the base's answers were not kept by row, or are not those of the recorded score, configurations "
            "are compared with it as if it had been judged on rows of its own, which shows fewer gains."
        )


def _stopped_early(table: pd.DataFrame, steps: pd.DataFrame) -> int:
    """How many trials were stopped before their last step; not those that only left their test rows alone."""
    if not len(table):
        return 0
    stopped = table[table[trials.SUCCESS] == Status.stopped.name]
    if "steps" not in steps or "train_info.steps" not in stopped:
        return len(stopped)
    totals = stopped[trials.TRIAL].map(steps.groupby("trial")["steps"].last())
    return int((~(stopped["train_info.steps"] >= totals).fillna(False).astype(bool)).sum())


def _rung_predictions(table: pd.DataFrame, steps: pd.DataFrame) -> Iterator[str]:
    metric = "validation_loss"
    found = rungs.rungs(steps, metric) if len(steps) else pd.DataFrame()
    found = found[(found["n"] >= 3) & found["rho"].notna()] if len(found) else found
    stopped = _stopped_early(table, steps)
    if found.empty and not stopped:
        return
    yield "### Could it have been stopped earlier?"
    yield ""
    if stopped:
        was, it = ("was", "it") if stopped == 1 else ("were", "they")
        yield f"{words.plural('trial', stopped)} {was} stopped early; how {it} would have ended is not known."
        yield ""
    yield from words.table(
        [
            {
                "after step": str(row["step"]),
                "rank correlation with the end": f"{row['rho']:.2f}"
                + (f" [{row['low']:.2f}, {row['high']:.2f}]" if words.known(row["low"]) else ""),
                "trials": str(row["n"]),
                "the winner's place there": f"{row['place']:.0f}",
            }
            for row in found.to_dict("records")
        ]
    )
    if len(found):
        yield "Spearman's correlation of the validation loss there with that at the end, over trials that got so far."
        yield ""
