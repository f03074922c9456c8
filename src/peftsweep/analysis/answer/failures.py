"""What failed, grouped by cause, each with what to change."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from peftsweep.analysis.answer.structure import FAILURES, Failure, Failures, Section
from peftsweep.analysis.statistics import trials
from peftsweep.analysis.table.columns import CALLED, WITHOUT_RESULT
from peftsweep.analysis.text import words

NAMED = 3  # trials of a cause that a sentence names; answer.json names MAX_TRIALS
MAX_TRIALS = 100  # of a cause, that answer.json names
NUMBER = re.compile(r"\d[\d.,]*(e[+-]?\d+)?")  # what differs between messages of one cause
# How the end of a message begins that says itself what to change.
ADVICE = re.compile(r"; (?=(?:try|take|lower|run) |\S+=float16 overflows)")
# What to change, by the status or the beginning of the error; the first that fits.
BY_STATUS = {
    "cancelled": "The same command goes on from where it was interrupted",
    "refused": "Leave this combination out of the sweep, or change the setting that the cause names",
    "oom": "Try a smaller train.batch_size with more train.accumulation, train.checkpointing=true, quant=4bit or a "
    "smaller dataset.max_length; dry_run=true lists what each trial needs",
}
OVERSIZED = "Raise memory_limit, or try a smaller train.batch_size, train.checkpointing=true or quant=4bit"
BY_ERROR = (
    (r"FloatingPointError|(?i:not finite|\bnan\b|diverge)", "Lower train.learning_rate, or lengthen train.warmup"),
    (
        r"(?i)no space left|disk quota",
        "Free some disk space (peftsweep-collect --prune lists what can go), then run it again",
    ),
    (
        r"(?i)longer than .*timeout|timed?[ -]?out",
        "Raise hydra.launcher.timeout (on clusters the launcher's own, such as timeout_min), or make the trial smaller",
    ),
    (
        r"(?i)died|killed|terminated|crashed|signal \d|lost",
        "Run the same command again; on this machine hydra.launcher.retries=1 tries once more by itself",
    ),
    (r"(?i)ConnectionError|offline|resolve host|couldn't connect", "Check the network, or give a local folder or file"),
    (r"^(WorkerFailed: [\w.]+\.)?InputError", "Correct the key that the cause names"),
    (r"ModuleNotFoundError|ImportError", "Install the package that the cause names"),
    (r"FileNotFoundError|(?i:no such file)", "Check the path that the cause names"),
    (
        r"(?i)CUDA error|device-side assert|cublas|cudnn",
        "Run it again alone (hydra.launcher.workers=1); look at its trial.log",
    ),
)
OTHERWISE = "Read its trial.log, change the setting that the cause names, and run the same command again"


def section(table: pd.DataFrame) -> Section | None:
    """The causes for which trials ended without a result, the commonest first; None where all have one."""
    ended = table[table[trials.SUCCESS].isin(WITHOUT_RESULT)] if len(table) else table
    if ended.empty:
        return None
    kept = [c for c in (trials.TRIAL, trials.SUCCESS, CALLED, *ERRORS) if c in ended]
    causes = _causes(ended[kept].to_dict("records"))
    sentences = [_sentence(cause) for cause in causes]
    count = words.plural("trial", len(ended))
    return Section(FAILURES, "What failed", [f"{count} ended without a result.", *sentences], Failures(causes))


ERRORS = ("run_info.error.stage", "run_info.error.type", "run_info.error.message")


def _causes(rows: Sequence[Mapping[Any, Any]]) -> list[Failure]:
    found: dict[tuple[str, str, str], list[Mapping[Any, Any]]] = {}
    for row in rows:
        stage, kind, message = (_known(row.get(column)) for column in ERRORS)
        cause, *rest = ADVICE.split(first_line(message), maxsplit=1)
        key = row[trials.SUCCESS], stage, NUMBER.sub("#", f"{kind}: {cause}")
        found.setdefault(key, []).append({**row, "cause": _cause(kind, cause, row), "advice": rest[0] if rest else ""})
    groups = sorted(found.items(), key=lambda item: -len(item[1]))
    return [_failure(status, stage, same) for (status, stage, _), same in groups]


def _failure(status: str, stage: str, same: Sequence[Mapping[Any, Any]]) -> Failure:
    first = same[0]
    advice = next((row["advice"] for row in same if row["advice"]), "")
    oversized = _known(first.get(ERRORS[1])) == "Oversized"
    change = _capital(advice) or (OVERSIZED if oversized else remedy(status, first["cause"]))
    names = [str(row.get(CALLED, row[trials.TRIAL])) for row in same[:MAX_TRIALS]]
    return Failure(status, stage or None, first["cause"], len(same), names, change)


def _cause(kind: str, message: str, row: Mapping[Any, Any]) -> str:
    if not kind and not message:
        return f"no reason is recorded ({row[trials.SUCCESS]})"
    return ": ".join(filter(None, ("" if row[trials.SUCCESS] in ("refused", "oom") else kind, message)))


def remedy(status: str, cause: str) -> str:
    """What to change where a trial ended with this status, for this cause."""
    if status in BY_STATUS:
        return BY_STATUS[status]
    return next((change for pattern, change in BY_ERROR if re.search(pattern, cause)), OTHERWISE)


def _sentence(cause: Failure) -> str:
    named = ", ".join(words.code(name) for name in cause.trials[:NAMED])
    named += f" and {cause.count - NAMED:,} more" if cause.count > NAMED else ""
    where = f" in {cause.stage}" if cause.stage and cause.status != "refused" else ""
    text = f"{cause.count:,} {cause.status}{where}: {words.escaped(cause.cause).rstrip('.')} ({named})."
    return f"{text} {words.escaped(cause.change or '')}."


def _capital(text: str) -> str:
    """With a capital, unless it begins with a key."""
    word = text.partition(" ")[0]
    return text[:1].upper() + text[1:] if word.isalpha() else text


def first_line(message: str) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "")


def _known(value: Any) -> str:
    return "" if value is None or pd.isna(value) or value == "<NA>" else str(value)
