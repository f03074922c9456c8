"""lm-evaluation-harness as an evaluation, for whoever wants any of its tasks; the extra ``peftsweep[lm_eval]``."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from peftsweep.data import hub
from peftsweep.data.templates import Example
from peftsweep.errors import InputError, first_line, suggest
from peftsweep.evaluation.decoding import reads_padding
from peftsweep.evaluation.evaluate import Evaluation
from peftsweep.evaluation.metrics import Score
from peftsweep.models.parts import SHORT_ROWS, rows_by_rotation
from peftsweep.models.probe import abilities
from peftsweep.study.scores import with_direction

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def lm_eval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    tasks: Sequence[str | dict[str, Any]],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
) -> Evaluation:
    """The scores of ``tasks``, named ``<task>_<metric>``; ``examples`` are not looked at, tasks bring their own rows.

    A name ends with ``_lower_is_better`` (or higher) where the harness says so and the name would say the opposite.

    A task is a name the harness knows (of its own, or of a yaml in ``include_path``) or a task's whole
    configuration. ``limit`` is a number of rows a task.

    Raises:
        InputError: the package is not installed, or a task is unknown.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(f"eval.lm_eval: {error}; pip install 'peftsweep[lm_eval]'") from None
    hub.problem()  # before the harness asks it for each of its tasks
    manager = check_tasks(tasks, include_path)
    longest = min(max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    alike = rows_by_rotation(model, [longest]) == [SHORT_ROWS] and not reads_padding(model)
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size if alike and abilities(model).padded_batches else 1,
        max_length=longest,
        backend="causal",
    )
    found: dict[str, Any] = simple_evaluate(
        wrapped,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=1000,  # means need none, but get no standard error without
        log_samples=True,
    )
    scores = {}
    for task, measured in found["results"].items():
        n = _rows(found, task)
        for key, value in measured.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = measured.get(f"{metric}_stderr,{kind}")
            name = f"{task}_{metric}" + (f"_{kind}" if kind != "none" else "")
            better = found.get("higher_is_better", {}).get(task, {}).get(metric)
            name = with_direction(name, higher_is_better=better)
            scores[name] = Score(float(value), stderr if isinstance(stderr, float) else None, n)
    lines = [_line(task, sample) for task, samples in found.get("samples", {}).items() for sample in samples]
    return Evaluation(scores, lines)


def _rows(found: Mapping[str, Any], task: str) -> int:
    """The number of rows of a task; of a group those of all its tasks, of which it has the mean."""
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_rows(found, part) for part in found.get("group_subtasks", {}).get(task, ()))


def check_tasks(tasks: Sequence[str | dict[str, Any]], include_path: str | None = None) -> TaskManager:
    """What knows the tasks.

    Raises:
        InputError: a task is unknown.
    """
    manager = _manager(tasks, include_path)
    known = set(manager.all_tasks)
    for task in tasks:
        if isinstance(task, str) and task not in known:
            raise InputError(
                f"eval.lm_eval.tasks: {task}: the harness has no such task (include_path={include_path}); "
                f"{suggest(task, sorted(known))}"
            )
    return manager


def check_runnable(tasks: Sequence[str | dict[str, Any]], include_path: str | None) -> None:
    """Check, once for all trials of a command, that the harness knows and loads ``tasks``, and that they can be run.

    Raises:
        InputError: one is unknown, cannot be loaded, or does what peftsweep cannot run.
    """
    _check_runnable(json.dumps(tasks), include_path)


@functools.cache
def _check_runnable(tasks: str, include_path: str | None) -> None:
    named: list[str | dict[str, Any]] = json.loads(tasks)
    index = check_tasks(named, include_path).task_index
    for name, (task, file) in {key: value for one in named for key, value in _single_tasks(index, one)}.items():
        _check_task(f"eval.lm_eval.tasks: {name}", task, file)


def _single_tasks(index: Mapping[str, Any], named: Any) -> Iterator[tuple[str, tuple[Mapping[str, Any], Path | None]]]:
    """The name of each task of a task, group or tag, with its configuration and its yaml."""
    place = named if isinstance(named, Mapping) else {}
    name = str(place.get("group", place.get("task")) if place else named)
    entry = index.get(name)
    found = place if entry is None else entry.cfg or {}
    group = found.get("task") if "group" in found else None
    members = group if isinstance(group, list) else sorted(entry.tags) if entry and not found else None
    if members is None:
        yield name, (found, entry.yaml_path if entry else None)
    for member in members or ():
        yield from _single_tasks(index, member)


def _check_task(key: str, task: Mapping[str, Any], file: Path | None) -> None:
    if task.get("unsafe_code"):
        raise InputError(f"{key}: it runs the code that the model writes (unsafe_code), which peftsweep does not do")
    if task.get("doc_to_image") or task.get("doc_to_audio"):
        raise InputError(f"{key}: its rows hold images or sound (doc_to_image, doc_to_audio); must be a task of texts")
    if file is None:
        return
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        load_yaml(file, resolve_func=True)  # imports the functions that it names
    except Exception as error:  # whatever the task's own code raises
        raise InputError(f"{key}: the harness cannot load it: {type(error).__name__}: {first_line(error)}") from error


def _manager(tasks: Sequence[str | dict[str, Any]], include_path: str | None) -> TaskManager:
    """The harness's task manager. It indexes thousands of yamls in seconds, which few tasks need."""
    from lm_eval.tasks import TaskManager

    near = TaskManager(include_path=include_path, include_defaults=False)
    if all(task in near.all_subtasks if isinstance(task, str) else "group" not in task for task in tasks):
        return near
    return TaskManager(include_path=include_path) if include_path else _own_tasks()


@functools.cache
def _own_tasks() -> TaskManager:
    """The index of the harness's own tasks, from whose yamls it makes a task anew for each evaluation."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _line(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    known = ("acc", "acc_norm", "exact_match", *(("filter",) if sample["filter"] != "none" else ()))
    judged = {name: sample[name] for name in known if name in sample}
    return {"task": task, "answer": str(sample.get("target")), "prediction": sample.get("filtered_resps")} | judged
