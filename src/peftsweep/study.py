"""The folder as state: which trials a study holds and which of them are done."""

from __future__ import annotations

from pathlib import Path

from peftsweep.errors import InputError, suggest
from peftsweep.record import RESULT, RecordError, Result, Status

ROOT = Path("multirun")
PLAN = "plan.json"
ADAPTER = "adapter"


def folder(study: str) -> Path:
    """The folder of the study called ``study``, relative to where the command runs."""
    return ROOT / study


def find(study: str | Path) -> Path:
    """An existing study by its name under multirun/ or its path.

    Raises:
        InputError: there is no such folder.
    """
    for candidate in (ROOT / study, Path(study)):
        if candidate.is_dir():
            return candidate
    raise InputError(f"study={study}: no such folder; {suggest(str(study), [s.name for s in studies()])}")


def studies() -> list[Path]:
    """Every folder under multirun/ that holds a trial."""
    return sorted({file.parents[1] for file in ROOT.glob(f"*/*/{RESULT}")})


def trial_folder(study: Path, slug: str, identity: str) -> Path:
    """The folder of a trial: the one that ends in its identity, or ``<slug>-<identity>`` to be made.

    The same configuration said in other words has another slug, but the same identity and folder.
    """
    return next(iter(sorted(study.glob(f"*-{identity}"))), study / f"{slug}-{identity}")


def result(trial: Path) -> Result | None:
    """The trial's record; None where it has none or a broken one, so that it is run again."""
    try:
        return Result.read(trial)
    except RecordError:
        return None


def trained(study: Path, training: str) -> Result | None:
    """A successful trial of this study with the same training whose adapter is still there."""
    for file in sorted(study.glob(f"*/{RESULT}")):
        done = result(file.parent)
        same = done and done.status is Status.success and done.run_info.get("training") == training
        if done and same and any((file.parent / ADAPTER).glob("*.safetensors")):
            return done
    return None
