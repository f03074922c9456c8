"""The folder as state: which trials a study holds and which of them are done."""

from __future__ import annotations

from pathlib import Path

from peftsweep.errors import InputError, suggest
from peftsweep.record import RESULT, RecordError, Result, Status, write_text

ROOT = Path("multirun")
PLAN = "plan.json"
ADAPTER = "adapter"
MERGED = "merged"


def folder(study: str) -> Path:
    """The folder of the study called ``study``, relative to where the command runs."""
    return ROOT / study


def adapter(path: str) -> Path:
    """The folder of a saved adapter: ``path``, or that of the trial in ``path``.

    Raises:
        InputError: neither holds one.
    """
    given = Path(path).expanduser()
    for candidate in (given, given / ADAPTER):
        if any((candidate / name).is_file() for name in ("adapter_config.json", "config.json")):
            return candidate
    raise InputError(f"adapter.path={path}: holds no adapter_config.json, and no trial with one")


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


def mark_trained(done: Result) -> None:
    """Note the trial as the one whose adapter stands for its training."""
    if done.folder is not None:
        write_text(_mark(done.folder.parent, done.run_info["training"]), done.folder.name)


def trained(study: Path, training: str) -> Result | None:
    """A successful trial of this study with the same training whose adapter is still there."""
    try:
        folder = study / _mark(study, training).read_text(encoding="utf-8")
    except OSError:
        return None
    done = result(folder)
    same = done and done.status is Status.success and done.run_info.get("training") == training
    return done if same and any((folder / ADAPTER).glob("*.safetensors")) else None


def _mark(study: Path, training: str) -> Path:
    """Looked up by name, as reading every record of a large study before each trial would take minutes."""
    return study / ".trained" / training
