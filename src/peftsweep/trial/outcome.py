"""The parts of a trial's record: its beginning, its end, its time and memory, its error."""

from __future__ import annotations

import gc
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from peftsweep.config import identity
from peftsweep.config.compose import Trial
from peftsweep.forecast import predict
from peftsweep.models import model
from peftsweep.observe.display import Observer
from peftsweep.observe.measure import Meter, out_of_memory, percentile
from peftsweep.observe.tracker import Tracker
from peftsweep.schema import Config
from peftsweep.study import claims, record, store, sweep_record
from peftsweep.study.atomic import make_way, persistently, remove_partials
from peftsweep.study.reading import Unreadable, read_text
from peftsweep.study.record import Result, Status
from peftsweep.training.run import Trained
from peftsweep.trial.done import FORCED, Refused, anew, folder, hydra_files, mark_forced

log = logging.getLogger(__name__)
STAGE_LINE = re.compile(r" INFO peftsweep\.trial\.session: (\w+)$")  # of trial.log, where a stage begins


def progress_so_far(place: Path) -> dict[str, Any]:
    """The progress of a training that did not end, by its logged steps."""
    try:
        steps = [row for row in record.read_lines(place / record.STEPS, record.STEP, whole=False) if "loss" in row]
    except Unreadable as error:
        log.warning("%s", error)
        return {}
    return {"steps": steps[-1]["step"], "final_loss": steps[-1]["loss"]} if steps else {}


def stage_so_far(place: Path) -> str | None:
    """The stage in which a trial was cut off, by its trial.log; None if it names none."""
    try:
        lines = read_text(place / "trial.log").splitlines()
    except Unreadable:
        return None
    return next((found[1] for line in reversed(lines) if (found := STAGE_LINE.search(line))), None)


def empty(device: torch.device) -> None:
    """Free unused memory; the frames of an exception may have kept a model alive until now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def status_of(error: BaseException) -> Status:
    """The status of a trial that ``error`` has ended."""
    if isinstance(error, Refused):
        return Status.refused
    if out_of_memory(error):
        return Status.oom
    return Status.failed if isinstance(error, Exception) else Status.cancelled


def failure_of(error: BaseException, stage: str | None, config: Config) -> dict[str, str]:
    """``error`` for the record; if memory ran out, one line that says what to change."""
    found = record.failure(error, stage)
    log.log(logging.INFO if isinstance(error, Refused) else logging.ERROR, "%s", found["traceback"])
    if out_of_memory(error):
        size = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        reason = f"no memory left for {size[1]} more" if size else "no memory left"
        found["message"] = f"{reason}; {predict.smaller(config, found['stage'])}"
    return found


class Attempts:
    """The seconds and the memory of a trial, in total and by stage, over all its attempts.

    The figures of earlier attempts come from the trial's record, or from its last checkpoint if it was killed. They
    count from the moment when the trial resumes; a trial that starts from the beginning does not count them.
    """

    TOTAL = "total"

    def __init__(self, place: Path, meter: Meter) -> None:
        self._begun, self._meter = time.perf_counter(), meter
        held = store.result(place)
        self._recorded = _recorded_seconds(held) if held is not None else {}
        self.earlier: dict[str, float] = {}
        self.earlier_memory: dict[str, dict[str, Any]] = {}

    def resume(self, seconds: dict[str, float], memory: dict[str, dict[str, Any]]) -> None:
        """Continue from an earlier attempt with these figures; of several attempts the latest counts."""
        latest = max(seconds, self._recorded, self.earlier, key=lambda found: found.get(self.TOTAL, 0.0))
        self.earlier = self.earlier | seconds | latest
        self.earlier_memory = peaks(self.earlier_memory, memory)

    def seconds(self) -> dict[str, float]:
        """The seconds of all attempts so far."""
        now = {name: stage.seconds for name, stage in self._meter.so_far().items()}
        now[self.TOTAL] = time.perf_counter() - self._begun
        return {name: self.earlier.get(name, 0.0) + now.get(name, 0.0) for name in {**self.earlier, **now}}

    def memory(self) -> dict[str, dict[str, Any]]:
        """The memory of the stages of all attempts so far."""
        return peaks(self.earlier_memory, {name: stage.memory() for name, stage in self._meter.so_far().items()})


def _recorded_seconds(held: Result) -> dict[str, float]:
    found = {name: held.train_info.get(_seconds_key(name)) for name in held.memory}
    found[Attempts.TOTAL] = held.run_info.get("total_seconds")
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def peaks(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The memory of stages in two attempts: the higher peaks, and mean and percentiles of the attempt with them."""

    def height(memory: dict[str, Any]) -> tuple[float, float]:
        return memory.get("allocated_peak") or 0, memory.get("rss_peak") or 0

    merged = first | second
    for name in first.keys() & second.keys():
        lower, higher = sorted((first[name], second[name]), key=height)
        highest = {
            key: max((stage[key] for stage in (lower, higher) if stage.get(key) is not None), default=None)
            for key in higher
            if key.endswith("_peak")
        }
        merged[name] = lower | higher | highest
    return merged


def _seconds_key(stage: str) -> str:
    """The key of a stage's seconds in a record; train_seconds, the sum of the steps, is less than the whole stage."""
    return "train_stage_seconds" if stage == "train" else f"{stage}_seconds"


def log_step(lines: Any, observer: Observer, row: dict[str, Any]) -> None:
    """Write a row to steps.jsonl (``lines``), and pass it to ``observer``."""
    lines.write(record.line(row))
    persistently(lines.flush)  # rows that could not be written stay in its buffer
    observer.step(row)


def train_info(trained: Trained) -> dict[str, Any]:
    """The facts of the training, for the record."""
    return {
        "steps": trained.steps,
        "epochs": trained.epochs,
        "tokens": trained.tokens,
        "padding_fraction": trained.padding_fraction,
        "final_loss": trained.final_loss,
        "best_loss": trained.best_loss,
        "best_step": trained.best_step,
        **trained.compilation,
    }


def train_cost(trained: Trained) -> dict[str, Any]:
    """Time and memory of the training, for the record; a packed trial has them under separate keys."""
    seconds = sum(trained.step_seconds)
    cost = {
        "train_seconds": seconds,
        "tokens_per_second": trained.tokens / seconds if seconds else None,
        **{f"step_seconds_p{p}": percentile(trained.steady_seconds, p) for p in (50, 95, 99)},
    }
    shared = {"lanes": max(trained.lanes, default=1), "share_seconds": trained.share_seconds}
    return {"packed": shared | cost} if trained.packed else cost


def begin(trial: Trial, place: Path) -> Result:
    """Make the trial's folder with Hydra's composed configuration alone; returns the record to be filled."""
    for name in ("", ".hydra", "predictions", store.ADAPTER, store.MERGED, store.CHECKPOINTS):
        make_way(place / name, folder=True)
    place.mkdir(parents=True, exist_ok=True)
    words = hydra_files(trial)
    for name in (record.RESULT, record.STEPS, "generation.jsonl", "trial.log", FORCED, *words):
        make_way(place / name)
    for part in ("predictions", store.ADAPTER, store.MERGED):
        for file in list((place / part).glob("*.*")):
            make_way(file)
    (place / record.RESULT).unlink(missing_ok=True)  # the record of a failed attempt
    remove_partials(place, own=True)
    if anew(trial):
        shutil.rmtree(place / store.CHECKPOINTS, ignore_errors=True)
        mark_forced(place)
    for name, text in words.items():
        record.write_text(place / name, text)
    on_gpu = model.device(trial.config.device).type == "cuda"
    about = record.environment(gpus=on_gpu)
    about["system"][sweep_record.AT_ONCE_KEY] = sweep_record.trials_at_once()
    return Result(run_info(trial, place), trial.choices, trial.tree, meta_info=about)


def run_info(trial: Trial, place: Path) -> dict[str, Any]:
    """``run_info`` of a trial in the folder ``place``, with the values that are known at its start."""
    return {
        "trial": place.name,
        "labels": [trial.label],
        "study": trial.config.study,
        "identity": trial.identity,
        "identity_rule": identity.IDENTITY_RULE,
        "training": trial.training,
        "created_at": record.now(),
        "host": record.host(),
        **record.git(),
        **({"experiment": trial.experiment} if trial.experiment else {}),
    }


def planned(trial: Trial, foreseen: dict[str, Any]) -> Result:
    """A record of a trial that is only planned, with the sizes that are ``foreseen``; it is not written."""
    known = run_info(trial, folder(trial)) | {"status": Status.planned.value, "error": None}
    return Result(known, trial.choices, trial.tree, train_info=foreseen)


def unwritten(trial: Trial, status: Status, failure: dict[str, str], seconds: float) -> Result:
    """The end of an attempt that adds something to a finished trial, as a record that is not written."""
    known = run_info(trial, folder(trial)) | {"status": status.value, "error": failure}
    return Result(known | {"sitting_seconds": seconds, "total_seconds": seconds}, trial.choices, trial.tree)


def end(
    result: Result,
    place: Path,
    meter: Meter,
    start: float,
    status: Status,
    failure: dict[str, str] | None,
    tracker: Tracker,
    attempts: Attempts,
) -> None:
    """Complete and write the record, and delete the files that are needed only until a trial has ended."""
    claims.check_claim(place.parent, result.run_info["identity"])
    before = attempts.earlier
    now = time.perf_counter() - start
    result.run_info |= {"status": status.value, "error": failure, "sitting_seconds": now}
    result.run_info["total_seconds"] = now + before.get(Attempts.TOTAL, 0.0)
    result.train_info = (progress_so_far(place) if status is not Status.success else {}) | result.train_info
    for name in dict.fromkeys([*meter.stages, *before]):
        if name != Attempts.TOTAL:
            seconds = meter.stages[name].seconds if name in meter.stages else 0.0
            result.train_info[_seconds_key(name)] = seconds + before.get(name, 0.0)
    new_memory = {name: stage.memory() for name, stage in meter.stages.items()}
    result.memory |= peaks(attempts.earlier_memory, new_memory)
    result.run_info["warnings"] = result.cautions()
    for caution in result.run_info["warnings"]:
        log.warning(caution)
    result.write(place)
    if status is Status.success:
        shutil.rmtree(place / store.CHECKPOINTS, ignore_errors=True)
        if result.config["adapter"]["save"] and result.train_info.get("reloads", True):
            store.mark_trained(result)
    scores = {name: _without_histograms(found) for name, found in result.eval_info.items()}
    tracker.end(record.flat(record.plain({"train": result.train_info, "eval": scores})), status.value)


def _without_histograms(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without histograms, because their keys are answers, which a tracker cannot take as names."""
    return {name: fact for name, fact in facts.items() if not name.endswith("histogram")}


class _TrialLog(logging.FileHandler):
    """A log from which a line is left out that the disk does not take; the next file of the trial says why."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name of it
        """Print nothing: Python's own handler prints a stack of each such line to the terminal."""


@contextmanager
def logged(*files: Path) -> Iterator[None]:
    """Send all logging and warnings of the block to ``files``, and only there."""
    for name in ("transformers", "huggingface_hub", "datasets"):  # each prints to stderr by a handler of its own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    transformers.utils.logging.disable_progress_bar()
    logging.captureWarnings(True)
    own: list[logging.Handler] = [_TrialLog(file, mode="w", encoding="utf-8") for file in files]
    for handler in own:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = own
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        for handler in own:
            handler.close()
