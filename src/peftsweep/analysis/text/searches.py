"""What a search has decided: sweep=tune and sweep=league leave it in the study, for every report to repeat."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from peftsweep.study import record, store
from peftsweep.study.reading import usable

SHAPE = {"lines": [str], "command?": [str]}  # of such a file, as far as it is read here


def decisions(folder: Path) -> dict[str, list[str]]:
    """The lines of each search of the study in ``folder``, by its name; of one that was cut off there are none yet."""
    found = {}
    for name in store.SEARCHES:
        if (folder / name).is_file():
            content = usable(partial(record.read_json, folder / name, SHAPE))
            if content and content["lines"]:
                found[name.removesuffix(".json")] = list(content["lines"])
    return found


def section(folder: Path) -> Iterator[str]:
    """The same as a section of RESULTS.md."""
    for name, lines in decisions(folder).items():
        yield f"## What sweep={name} decided"
        yield ""
        yield from (f"- {line}" for line in lines)
        yield ""
