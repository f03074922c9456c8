"""Files of a study that no report needs: checkpoints, merged models, and adapters of all but the best trials."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftsweep.analysis.table import columns
from peftsweep.analysis.table.table import read, trials
from peftsweep.analysis.text import words
from peftsweep.observe.display import size
from peftsweep.study import claims, store
from peftsweep.study.record import Result

MODELS = (store.ADAPTER, store.MERGED)  # folders of a trial, which the best ones keep


@dataclass(frozen=True)
class Removable:
    """A folder of a trial, and its size in bytes."""

    folder: Path
    bytes: int


def main(names: Sequence[str], keep_best: int, *, confirmed: bool) -> int:
    """``peftsweep-collect --prune``: list what can be removed, and remove it if that is ``confirmed``."""
    for folder in store.chosen(names):
        found = removable(folder, keep_best)
        for one in found:
            print(f"{'removed' if confirmed else 'can be removed'}: {one.folder} ({size(one.bytes)})")
            if confirmed:
                shutil.rmtree(one.folder)
        total = size(sum(one.bytes for one in found))
        how = "" if confirmed or not found else "; --prune --yes removes it"
        print(f"{folder}: {total} in {words.plural('folder', len(found))}{how}; records and predictions stay")
    return 0


def removable(folder: Path, keep_best: int) -> list[Removable]:
    """The folders of ended trials that are not among the ``keep_best`` best by any evaluation's main score.

    Checkpoints count whatever the trial's score: one that was stopped or cut off would then begin anew. A trial that
    runs, or has no record, is left alone; so is whatever is a link.
    """
    results, kept = read(folder), set[str]()
    table = trials(results)
    for score in columns.main_scores(table) if len(table) else []:
        succeeded = table[table["run_info.status"] == "success"].dropna(subset=[score])
        best = succeeded.sort_values(score, ascending=columns.lower_is_better(score), kind="stable")
        kept |= set(best["run_info.trial"].head(keep_best))
    found = []
    for result in results:
        place = result.folder
        if place is None or place.is_symlink() or _runs(folder, result):
            continue
        names = (store.CHECKPOINTS, *(() if _is_kept(result, kept) else MODELS))
        paths = [place / name for name in names if (place / name).is_dir() and not (place / name).is_symlink()]
        found += [Removable(path, _bytes(path)) for path in paths]
    return found


def _runs(folder: Path, result: Result) -> bool:
    return claims.claimed(folder, result.run_info["identity"]) is claims.Claim.held


def _is_kept(result: Result, kept: set[str]) -> bool:
    return bool({result.trial, (result.folder or Path()).name} & kept)


def _bytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
