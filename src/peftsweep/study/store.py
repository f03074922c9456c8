"""The folder of a study: its trials, their files, and which of them are done."""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from peftsweep.errors import InputError, Unwritable, message, suggest
from peftsweep.study.atomic import TRANSIENT
from peftsweep.study.reading import Unreadable, opened, read_text
from peftsweep.study.record import (
    RESULT,
    STEP,
    STEPS,
    LaterVersion,
    RecordError,
    Result,
    Status,
    read_json,
    read_lines,
    read_predictions,
    write_text,
)

ROOT = Path("multirun")
# A name of a study or an evaluation, which becomes a path.
NAME = re.compile(r"(?![. ])[^\x00-\x1f/\\:*?\"<>|]{1,100}(?<![. ])")
PLAN = "plan.json"
# Files of a study with the decisions of sweep=tune and sweep=league.
TUNE, LEAGUE = SEARCHES = ("tune.json", "league.json")
ADAPTER = "adapter"
WEIGHTS = (".safetensors", ".bin")  # suffixes of files of weights
ADAPTER_CONFIGS = ("adapter_config.json", "config.json")  # of PEFT, and of a whole model
BASE = "base"  # in a study: a folder for each untouched base, with its scores and answers
RESIDUAL = "base"  # in an adapter's folder: its base, if that is not the base of the trial
MERGED = "merged"
CHECKPOINTS = "checkpoints"
OWN_OPTIONS = "PEFTSWEEP_CONFIG_DIR"  # the environment variable that tells workers the folder of --config-dir
# Evaluations that write a line for each row.
OWN_EVALUATIONS = ("peftsweep.evaluation.evaluate.", "peftsweep.evaluate.")
NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Errors of files in a study, mostly on network file systems.
UNWRITABLE_ERRNOS = (errno.EACCES, errno.EPERM, errno.EFBIG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, *TRANSIENT)
NO_SPACE_MESSAGES = (*map(os.strerror, NO_SPACE_ERRNOS),)  # of safetensors, which raises no OSError


def with_own_options(words: Sequence[str]) -> list[str]:
    """The words of a command, with the folder of the user's own options before them."""
    own = os.environ.get(OWN_OPTIONS)
    return [f"--config-dir={own}", *words] if own else list(words)


def folder(study: str) -> Path:
    """The folder of the study called ``study``, relative to where the command runs."""
    return ROOT / study


def adapter(path: str) -> Path:
    """The folder of a saved adapter: ``path``, or the adapter of the trial in ``path``.

    Raises:
        InputError: there is no adapter.
    """
    given = Path(path).expanduser()
    for candidate in (given, given / ADAPTER):
        if any((candidate / name).is_file() for name in ADAPTER_CONFIGS):
            return candidate
    text = f"adapter.path={path}: holds no adapter_config.json, and no trial with one"
    if not given.exists() and path.count("/") == 1:
        text += f"; to get an adapter from the hub: hf download {path} --local-dir FOLDER"
    raise InputError(text)


def is_plain(name: str) -> bool:
    """Whether ``name`` is valid for a file or folder on any system, and does not lead to another folder."""
    return NAME.fullmatch(name) is not None


def is_below(name: str, folder: str) -> bool:
    """Whether the relative path ``name``, from a record, lies in ``folder`` of the same study."""
    parts = Path(name).parts
    return len(parts) > 1 and parts[0] == folder and ".." not in parts and "\0" not in name


def find(study: str | Path) -> Path:
    """An existing study by its name under multirun/ or its path.

    Raises:
        InputError: there is no such folder, or it is that of a trial.
    """
    for candidate in (ROOT / study, Path(study)):
        if (candidate / RESULT).is_file():
            raise InputError(f"study={study}: is the folder of a trial; that of its study is {candidate.parent}")
        if candidate.is_dir():
            return candidate
    raise InputError(f"study={study}: no such folder; {suggest(str(study), [s.name for s in studies()])}")


def chosen(names: Sequence[str | Path]) -> list[Path]:
    """The studies of these names or folders; without names all studies under multirun/.

    Raises:
        InputError: as ``find``.
    """
    return [find(name) for name in names] if names else studies()


def studies() -> list[Path]:
    """Every folder under multirun/ that holds a trial, running and interrupted ones included."""
    begun = {file.parents[1] for file in ROOT.glob("*/.claims/*.json")}
    begun |= {file.parents[2] for file in ROOT.glob("*/*/.hydra/config.yaml")}
    return sorted(begun | {place for place in ROOT.glob("*") if place.is_dir() and recorded(place)})


def recorded(study: Path) -> list[Path]:
    """The folders of a study's trials with a record, damaged ones included (a glob would miss broken links)."""
    return [place for place in study.iterdir() if os.path.lexists(place / RESULT)]


def trial_folder(study: Path, slug: str, identity: str) -> Path:
    """The folder of a trial: the one whose name ends in its identity, else the new name ``<slug>-<identity>``.

    The same configuration from other words has another slug, but the same identity and folder.
    """
    return next(iter(sorted(study.glob(f"*-{identity}"))), study / f"{slug}-{identity}")


def result(trial: Path) -> Result | None:
    """The trial's record; None if it is missing or damaged, so that the trial is run again.

    Raises:
        InputError: it was written by a later version, and must not be overwritten.
    """
    try:
        return Result.read(trial)
    except LaterVersion as error:
        raise InputError(f"{error}; use another study=") from None
    except RecordError:
        return None


def version(trial: Path) -> tuple[int, int] | None:
    """The version of the trial's record; None if there is no record.

    Two records of a file system whose times are whole seconds may have the same time, but not the same file.
    """
    try:
        stat = (trial / RESULT).stat()
        return stat.st_mtime_ns, stat.st_ino
    except OSError:
        return None


def result_of_adapter(folder: Path) -> Result | None:
    """The record of the trial that trained the adapter in ``folder``; None if no trial did.

    Raises:
        InputError: its files are damaged, or its record cannot be read, so that its training is unknown.
    """
    if reason := damage_of_weights(folder) or (None if _holds_weights(folder) else "it holds no weights"):
        raise InputError(f"adapter.path={folder}: {reason}")
    if not os.path.lexists(folder.parent / RESULT):
        return None
    try:
        return Result.read(folder.parent)
    except RecordError as error:
        raise InputError(
            f"adapter.path={folder}: {error}; to use the adapter, move its folder away from this record"
        ) from None


def damage(trial: Path) -> str | None:
    """What is wrong with the files of a finished trial, so that it must be run again; None if nothing is.

    Missing files are ignored, because they may have been deleted to save space.

    Raises:
        InputError: its record was written by a later version.
    """
    if not os.path.lexists(trial / RESULT):
        return None
    patterns = (RESULT, STEPS, "generation.jsonl", "predictions/*.jsonl", f"{ADAPTER}/*", f"{MERGED}/*")
    files = [file for pattern in patterns for file in sorted(trial.glob(pattern))]
    return _damage(trial, tuple((str(file), *_version(file)) for file in files))


def _version(file: Path) -> tuple[int, int]:
    found = file.lstat()
    return found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=10_000)
def _damage(trial: Path, versions: tuple[tuple[str, int, int], ...]) -> str | None:
    try:
        done = Result.read_whole(trial)
        if done.status not in (Status.success, Status.stopped):
            return None
        logged = read_lines(trial / STEPS, STEP)
        was_trained = done.status is Status.success and done.train_info.get("steps")
        if was_trained and not logged and os.path.lexists(trial / STEPS):  # at least the last step has a line
            return f"{trial / STEPS}: it is empty"
        read_lines(trial / "generation.jsonl")
        for file in sorted(trial.glob("predictions/*.jsonl")):
            if wrong := damage_of_lines(file, done, file.stem):
                return wrong
    except LaterVersion as error:
        raise InputError(f"{error}; use another study=") from None
    except Unreadable as error:
        return str(error)
    for folder in (trial / ADAPTER, trial / MERGED):
        if any(file.is_file() and not os.access(file, os.R_OK) for file in folder.glob("*")):
            continue  # another user's, who may read them
        if wrong := damage_of_weights(folder):
            return wrong
        if any(folder.glob("*")) and not _holds_weights(folder):
            return f"{folder}: holds no weights"
    return None


def _holds_weights(folder: Path) -> bool:
    return any(file.suffix in WEIGHTS for file in folder.glob("*"))


def damage_of_lines(predictions: Path, done: Result, evaluation: str) -> str | None:
    """What is wrong with a file of predictions, of a trial or its base; None if nothing is, or it does not exist."""
    try:
        held = not os.path.lexists(predictions) or read_predictions(predictions)
    except Unreadable as error:
        return str(error)
    node = done.config.get("eval", {}).get(evaluation, {})  # a user's own evaluation may write no lines
    return None if held or not str(node.get("_target_")).startswith(OWN_EVALUATIONS) else f"{predictions}: it is empty"


def damage_of_weights(folder: Path) -> str | None:
    """What is wrong with the files of a saved adapter or model, by their headers and sizes; None if nothing is.

    Weights in torch's own format are not checked.
    """
    from safetensors import SafetensorError, safe_open

    if os.path.lexists(folder) and not folder.is_dir():
        return f"{folder}: not a folder"
    try:
        for name in ADAPTER_CONFIGS:
            if os.path.lexists(folder / name):
                read_json(folder / name, dict)
        for file in sorted(folder.glob("*.safetensors")):
            with opened(file), safe_open(file, framework="np"):
                pass
    except Unreadable as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"{file}: not a safetensors file: {error}"
    return None


def records(study: Path, most: int) -> list[Result]:
    """The readable records of a study; empty if it has more than ``most`` trials."""
    if not study.is_dir():
        return []
    places, found = recorded(study), []
    for place in places if len(places) <= most else []:
        with suppress(RecordError):
            found.append(Result.read(place))
    return found


def mark_trained(done: Result) -> None:
    """Note the trial as the one whose adapter is used for its training."""
    if done.folder is not None:
        write_text(_mark(done.folder.parent, done.run_info["training"]), done.folder.name)


def trained(study: Path, training: str) -> Result | None:
    """A successful trial of this study with the same training and an intact adapter; None if there is none."""
    folder = _marked(study, _mark(study, training))
    if folder is None:
        return None
    done = result(folder)
    if done is None or done.status is not Status.success or done.train_info.get("reloads") is False:
        return None
    names = (done.run_info.get("training"), (done.run_info.get("recognised") or {}).get("training"))
    whole = any((folder / ADAPTER).glob("*.safetensors")) and damage_of_weights(folder / ADAPTER) is None
    return done if training in names and whole else None


def mark_recognised(done: Result) -> None:
    """Note the present identities, of trial and training, of a record that an earlier version wrote."""
    if done.folder is None:
        return
    names, root = done.run_info["recognised"], done.folder.parent
    write_text(root / ".recognised" / names["identity"], done.folder.name)
    if done.status is Status.success and done.config["adapter"]["save"]:
        write_text(_mark(root, names["training"]), done.folder.name)


def recognised(study: Path, identity: str) -> Path | None:
    """The folder of the trial that ``mark_recognised`` noted under this identity; None if it no longer exists."""
    return _marked(study, study / ".recognised" / identity)


def _marked(study: Path, mark: Path) -> Path | None:
    """The trial's folder that the file ``mark`` names; None if there is none."""
    try:
        name = read_text(mark)
    except Unreadable:
        return None
    return study / name if is_plain(name) and (study / name).is_dir() else None


def _mark(study: Path, training: str) -> Path:
    """The file that names the trial of a training; reading all records of a large study would take minutes."""
    return study / ".trained" / training


def unwritable(error: BaseException) -> Unwritable | None:
    """``error`` as ``Unwritable`` if it says that the study cannot be written; else None."""
    if isinstance(error, Unwritable):
        return error
    where = Path(str(getattr(error, "filename", None) or ROOT))
    if isinstance(error, OSError):
        ours = _in_a_study(where)
        reason = (
            error.strerror if error.errno in NO_SPACE_ERRNOS or (error.errno in UNWRITABLE_ERRNOS and ours) else None
        )
    else:
        reason = next((pattern for pattern in NO_SPACE_MESSAGES if pattern in message(error)), None)
        code = re.search(r"serializ.*\(os error (\d+)\)", message(error), re.DOTALL)  # a message of safetensors
        if code and int(code[1]) in UNWRITABLE_ERRNOS:
            reason = os.strerror(int(code[1]))
    return Unwritable(f"{where}: {reason}; finished trials are kept, the same command continues") if reason else None


def raise_unwritable(error: BaseException) -> None:
    """Let no ``error`` of the study's disk become a fact or a failure of one trial: the same command would keep it.

    Raises:
        Unwritable: ``error`` says that the study cannot be written.
    """
    if full := unwritable(error):
        raise full from error


def _in_a_study(path: Path) -> bool:
    """Whether ``path`` lies below multirun/ by its name (a study may be a link to another disk) or without links."""
    named, real = path.absolute(), path.resolve()
    return ROOT.absolute() in (named, *named.parents) or ROOT.resolve() in (real, *real.parents)
