"""result.json: its schema, the environment in it, writing and reading."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Self

from peftsweep.errors import message
from peftsweep.study.atomic import write_text as write_text
from peftsweep.study.cautions import cautions
from peftsweep.study.owner import host as host
from peftsweep.study.reading import NUMBER, TEXT, Unreadable, check, compiled, fault
from peftsweep.study.reading import read_json as read_json
from peftsweep.study.reading import read_lines as read_lines
from peftsweep.study.reading import usable_lines as usable_lines
from peftsweep.study.scores import TEXT_PARTS

SCHEMA_VERSION = 1
RESULT = "result.json"
STEPS = "steps.jsonl"
PACKAGES = (
    *("peftsweep", "torch", "transformers", "peft", "accelerate", "bitsandbytes"),
    *("datasets", "tokenizers", "hydra-core", "numpy"),
)
# Environment variables that choose the CPU's kernels, and so the order of summation.
KERNEL_SWITCHES = (
    *("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "MKL_NUM_THREADS"),
    *("MKL_DYNAMIC", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"),
    *("DNNL_DEFAULT_FPMATH_MODE", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS"),
)
JUDGED = "judged"  # in run_info: the version of the reading of answers; version 1 is not written
HEADLINE = "headline"  # in the figures of an evaluation: the metric that trials are compared by
# Readers with the headline acc, as in lm-evaluation-harness. The last two have no acc_norm, because other texts than
# those of the choices are scored; records of earlier versions have it nevertheless.
BY_ACC = ("boolq", "social_i_qa", "winogrande", "commonsense_qa")
WITHOUT_NORM = BY_ACC[2:]
SECTIONS = ("run_info", "train_info", "memory", "eval_info", "generation_info")  # the sections with measurements


class Status(Enum):
    """How a trial ended."""

    success = "success"
    failed = "failed"
    oom = "oom"  # out of memory
    cancelled = "cancelled"  # interrupted by the user
    refused = "refused"  # a combination that is known to fail
    stopped = "stopped"  # ended early, on purpose
    planned = "planned"  # not run, because of dry_run=true; never written to a record

    @property
    def done(self) -> bool:
        """Whether a rerun skips the trial as done; trials with other statuses are tried again."""
        return self not in (Status.failed, Status.cancelled, Status.planned)

    @property
    def good(self) -> bool:
        """Whether the exit code of a sweep with this trial is 0."""
        return self in (Status.success, Status.refused, Status.stopped, Status.planned)


class RecordError(Unreadable):
    """A result.json that cannot be read."""


class LaterVersion(RecordError):
    """A result.json of a later schema, which must not be overwritten."""


# ---- the shapes of a trial's files -----------------------------------------------------------------


def _status(value: Any, key: str) -> str | None:
    known = [status.value for status in Status if status is not Status.planned]
    return None if value in known else f"{key}: must be one of {', '.join(known)}"


def _some_labels(value: Any, key: str) -> str | None:
    return fault(value, [str], key) or (None if value else f"{key}: there is none")


def _fact(value: Any, key: str) -> str | None:
    """Check an entry of an evaluation: a score, or another figure."""
    if key.endswith("histogram"):
        return fault(value, {"*": int}, key)
    return (IS_SCORE if isinstance(value, dict) and not SCORE.keys().isdisjoint(value) else _figures)(value, key)


def _figures(value: Any, key: str) -> str | None:
    """Check nested figures: names of numbers must hold numbers, because a text would turn a whole column into text."""
    if isinstance(value, dict):
        return IS_FIGURES(value, key)
    name = key.rpartition(".")[2]
    if isinstance(value, list) or not is_numeric(name):
        return fault(value, TEXT, key) if name in NAMES else None
    return None if type(value) in NUMBER else fault(value, NUMBER, key)


# Names of figures that tables and plots compute with.
NUMERIC = re.compile(
    r"(seconds|seconds_per_token|bytes|parameters|rows|steps?|tokens|loss|fraction|epochs|per_second|prompts|answers|"
    r"references|peak|mean|majority|random|seen_in_training|similar_in_training|speed_up|difference|value|low|high|to_first_token|flops|mfu)(_p\d+)?$"
)
is_numeric = lru_cache(maxsize=10_000)(NUMERIC.search)
NAMES = (HEADLINE, "base_predictions", "trained_by", "reload_error", "merge_error")  # entries that hold text
SCORE = {"value": NUMBER, "stderr": NUMBER, "n": NUMBER}
ERROR = {"type": str, "message": str, "stage": str, "traceback?": str}
RUN_INFO = {
    "trial": str,
    "status": _status,
    "labels?": _some_labels,
    "study?": str,
    "created_at?": str,
    "identity?": str,
    "training?": str,
    "error?": lambda value, key: None if value is None else fault(value, ERROR, key),
    "warnings?": [str],
    "identity_rule?": int,
    "resumed?": int,
    "sitting_seconds?": NUMBER,
    "total_seconds?": NUMBER,
    "packed_with?": [str],
    "recognised?": {"identity": str, "training": str},
    "rung?": {"number": int, "step": int, "metric": str, "value": NUMBER},
    "stopped?": {  # stopped early, after the validation at ``step``
        **{"why": str, "step": int, "metric": str, "value": NUMBER},
        **{"best_step": (int, type(None)), "best_value": NUMBER},
    },
    "experiment?": {"taken?": {"*": str}, "not_taken?": {"*": str}},
}
NEEDED = compiled({"labels": list, "study": str, "created_at": str})  # keys of RUN_INFO that tables and sweeps need
CONFIG = {  # the keys that are read again; all others may hold anything
    **{f"{section}?": dict for section in ("model", "method", "dataset", "train", "quant", "targets", "inference")},
    "seed?": int,
    "eval?": {"*": dict},
    "adapter?": {"path?": TEXT, "save?": bool, "merge?": bool},
    "halving?": {"metric": TEXT, "factor": (int, float), "min_steps": (int, type(None))},
}
RECORD = {
    "schema_version": int,
    "run_info": RUN_INFO,
    "choices": {"*": str},
    "config": CONFIG,
    "train_info?": {"*": _figures},
    "memory?": {"*": {"*": NUMBER}},
    "eval_info?": {"*": {"*": _fact}},
    "generation_info?": {"*": _figures},
    "meta_info?": dict,
}
SCORES = {"*": _fact}  # the file with the scores of a base
STEP = compiled({"step": int, "*": NUMBER})  # a line of steps.jsonl
PREDICTION = {  # a line of predictions
    "correct?": (bool, int, float),
    "correct_norm?": bool,
    "log_likelihood?": (float, int),
    "tokens?": int,
    "label?": str,
    "label_prediction?": str,
    "choices?": [str],
    **{f"{part}?": (float, int) for part in TEXT_PARTS.values()},
}
IS_RECORD, IS_SCORE, IS_PREDICTION = map(compiled, (RECORD, SCORE, PREDICTION))
IS_FIGURES, HAS_VERSION = compiled({"*": _figures}), compiled({"schema_version": int})


def trials_in_words(count: int) -> str:
    """``1 trial``, ``2,000 trials``."""
    return f"{count:,} trial" + ("s" if count != 1 else "")


def counted(statuses: Iterable[str]) -> str:
    """How trials ended: ``3 trials: 2 success, 1 failed``."""
    counts = Counter(statuses)
    text = ", ".join(f"{counts[status.name]:,} {status.name}" for status in Status if counts[status.name])
    return trials_in_words(counts.total()) + (f": {text}" if text else "")


@dataclass
class Result:
    """The record of one trial, as in result.json."""

    run_info: dict[str, Any]
    choices: dict[str, str]
    config: dict[str, Any]
    train_info: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    eval_info: dict[str, dict[str, Any]] = field(default_factory=dict)
    generation_info: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    folder: Path | None = None  # the folder that it was read from; not written

    @property
    def status(self) -> Status:
        """How the trial ended."""
        return Status(self.run_info["status"])

    @property
    def trial(self) -> str:
        """The name of the trial and of its folder."""
        return str(self.run_info["trial"])

    @property
    def error(self) -> dict[str, str] | None:
        """``type``, ``message``, ``stage`` and ``traceback`` of the error that ended the trial; else None."""
        return self.run_info.get("error")

    def cautions(self) -> list[str]:
        """Warnings about its scores."""
        return cautions(self.train_info, self.eval_info, self.generation_info)

    @classmethod
    def read_whole(cls, folder: Path) -> Self:
        """Read the record of a trial for a table, or to count it as done.

        Raises:
            RecordError: as ``read``, or it lacks its labels, study or date.
        """
        result = cls.read(folder)
        if wrong := fault(result.run_info, NEEDED, "run_info"):
            raise RecordError(f"{folder / RESULT}: {wrong}")
        return result

    def write(self, folder: Path) -> None:
        """Write result.json, atomically: a reader sees the whole record or none."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "folder"}
        write_json(folder / RESULT, {"schema_version": content.pop("schema_version"), **content})
        self.folder = folder

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a trial's folder.

        Raises:
            RecordError: there is no record, or it is broken or of a later schema.
        """
        try:
            content = read_json(folder / RESULT, HAS_VERSION)
            if content["schema_version"] > SCHEMA_VERSION:
                raise LaterVersion(f"{folder / RESULT}: written by a later version of peftsweep")
            check(content, IS_RECORD, str(folder / RESULT))
        except RecordError:
            raise
        except Unreadable as error:
            raise RecordError(str(error)) from None
        known = {f.name for f in dataclasses.fields(cls)} - {"folder"}
        result = cls(**{k: v for k, v in content.items() if k in known}, folder=folder)
        _complete(result)
        return result


def _complete(result: Result) -> None:
    """Add the headline to the evaluations of an earlier version's record, and remove metrics without meaning."""
    for name, found in result.eval_info.items():
        node = result.config.get("eval", {}).get(name) or {}
        if HEADLINE in found or not str(node.get("_target_")).endswith(".multiple_choice"):
            continue
        reader = str(node.get("reader") or result.config.get("dataset", {}).get("reader")).rpartition(".")[2]
        if reader in BY_ACC:
            found[HEADLINE] = "acc"
        if reader in WITHOUT_NORM:
            found.pop("acc_norm", None)
            found.pop("base_acc_norm", None)
    if "warnings" not in result.run_info:
        result.run_info["warnings"] = result.cautions()


def write_json(file: Path, content: Any) -> None:
    """Write ``content`` atomically: ``file`` always holds the complete old or the complete new text."""
    write_text(file, json.dumps(plain(content), indent=1) + "\n")


def read_predictions(file: Path) -> list[dict[str, Any]]:
    """The lines of an evaluation's predictions; empty if there is no such file.

    Raises:
        Unreadable: the file is damaged, or a line lacks a figure that another line has.
    """
    lines = read_lines(file, IS_PREDICTION)
    needed = {key for key in (name.removesuffix("?") for name in PREDICTION) if any(key in line for line in lines)}
    for number, line in enumerate(lines, 1):
        if lacking := needed - line.keys():
            raise Unreadable(f"{file}: line {number}: {min(lacking)} is missing")
    return lines


def line(row: dict[str, Any]) -> str:
    """``row`` as a line of a .jsonl file."""
    return json.dumps(plain(row)) + "\n"


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a .jsonl file atomically."""
    write_text(file, "".join(map(line, rows)))


def plain(value: Any) -> Any:
    """``value`` as plain values for JSON: dataclasses as dicts, enums by name, None for NaN and infinity."""
    if isinstance(value, Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set):
        return sorted(plain(v) for v in value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys; an empty dict gives no column, a list its JSON text."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return found


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def failure(error: BaseException, stage: str | None) -> dict[str, str]:
    """An exception as an entry of result.json."""
    return {
        "type": type(error).__name__,
        "message": message(error),
        "stage": stage or "setup",
        "traceback": "".join(traceback.format_exception(error)),
    }


def one_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {message(error)}".splitlines()[0].removesuffix(": ")


# ---- the environment -------------------------------------------------------------------------------


def environment(*, gpus: bool = True) -> dict[str, Any]:
    """Versions, system and device; of the environment variables only ``KERNEL_SWITCHES``.

    Without ``gpus`` the names of GPUs are not read.
    """
    return {
        "packages": packages(),
        "system": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "processor": processor(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "torch": _torch(gpus),
    }


def git() -> dict[str, Any]:
    """Commit and branch of the working directory, and whether it has changes; ``category`` is ``main`` or ``test``."""
    commit, branch = (_git("rev-parse", "HEAD", "--abbrev-ref", "HEAD") or "").split() or (None, None)
    dirty = None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no"))
    category = "main" if branch == "main" and dirty is False else "test"
    return {"git_commit": commit, "git_branch": branch, "git_dirty": dirty, "category": category}


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def package(name: str) -> dict[str, str | None] | None:
    """An installed package's version, and its commit if it was installed from a checkout."""
    try:
        installed = version(name)
        origin = distribution(name).read_text("direct_url.json")  # exists for packages installed from a checkout
    except PackageNotFoundError:
        return None
    commit = json.loads(origin).get("vcs_info", {}).get("commit_id") if origin else None
    return {"version": installed, "commit": commit}


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def packages() -> dict[str, dict[str, str | None] | None]:
    """The versions of the packages that can change results."""
    return {name: package(name) for name in PACKAGES}


def _torch(gpus: bool) -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if gpus else 0
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    return {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": names} | kernels()


def kernels() -> dict[str, Any]:
    """The settings that change the last bits of a sum on a CPU, beside its model and the versions of packages.

    They are the instruction set of torch, its threads, and the environment variables that choose kernels.
    """
    import torch

    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel_switches": {name: os.environ[name] for name in KERNEL_SWITCHES if os.environ.get(name)},
    }
