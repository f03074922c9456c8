"""What a search has decided: sweep=tune and sweep=league leave it in the study, for every report to repeat."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peftsweep.analysis.answer.structure import Base, Between, Decision, Finalist, Placebo
from peftsweep.study import record, store
from peftsweep.study.reading import NUMBER, TEXT, usable

FLOAT = (float, int)
PLACEBO = {"method": str, "wins": int, "pairs": int, "verdict": str, "difference": FLOAT}
BASE = {"value": FLOAT, "gain": NUMBER, "low": NUMBER, "high": NUMBER, "p": NUMBER, "scale": TEXT}
FINALIST = {"name": str, "configuration": str, "value": FLOAT, "trials": [str], "rank": (int, type(None))}
BETWEEN = {"first": str, "second": str, "estimate": FLOAT, "low": FLOAT, "high": FLOAT, "looks": int, "verdict": str}
DECISION = {
    "verdict": frozenset({"use", "none", "by validation", "ranked"}),
    "configuration": str,
    "trials": [str],
    "column": str,
    "finalists": [FINALIST],
    "between": [BETWEEN],
    "not_tried": [str],
    "not_trained": [str],
    "base?": BASE,
    "placebo?": PLACEBO | {"seeds_needed": (int, type(None))},
}
SHAPE = {"lines": [str], "command?": [str], "decision?": DECISION}  # of such a file, as far as it is read here


@dataclass(frozen=True)
class Search:
    """A search that has ended: ``tune`` or ``league``, its messages, and its facts."""

    name: str
    lines: list[str]
    decision: Decision


def decisions(folder: Path) -> list[Search]:
    """The searches of the study in ``folder``; one that was cut off has decided nothing yet."""
    found = []
    for name in store.SEARCHES:
        if (folder / name).is_file():
            content = usable(partial(record.read_json, folder / name, SHAPE))
            if content and content["lines"]:
                found.append(Search(name.removesuffix(".json"), list(content["lines"]), _decision(content)))
    return found


def _decision(content: dict[str, Any]) -> Decision:
    words, facts = content.get("command"), dict(content.get("decision") or {})
    known: dict[str, Any] = {key.removesuffix("?"): facts.get(key.removesuffix("?")) for key in DECISION if facts}
    known |= {"finalists": [_made(Finalist, one, FINALIST) for one in facts.get("finalists", [])]}
    known |= {"between": [_made(Between, one, BETWEEN) for one in facts.get("between", [])]}
    for key, kind, shape in (("base", Base, BASE), ("placebo", Placebo, [*PLACEBO, "seeds_needed"])):
        known[key] = _made(kind, facts[key], shape) if key in facts else None
    return Decision(None if words is None else shlex.join(["peftsweep", *words]), **known)


def _made(kind: Any, facts: dict[str, Any], keys: Any) -> Any:
    return kind(**{key: facts[key] for key in keys})
