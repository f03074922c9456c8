"""The rows that a trial's evaluations score, those set aside for validation, and checks of both."""

from __future__ import annotations

import dataclasses
import json
import pickle
import pydoc
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftsweep.data import files, templates, tokens
from peftsweep.data import rows as data_rows
from peftsweep.errors import InputError, suggest
from peftsweep.schema import Config, DatasetConfig, Init, RowsConfig

ROWS_KEYS = tuple(field.name for field in dataclasses.fields(RowsConfig))
HUB_KEYS = ("hub_config", "hub_split", "hub_test_split", "revision")  # choose the rows of a dataset of the hub
METRICS = "peftsweep.evaluation.metrics"
# Metrics that cannot judge by every reference answer.
REFUSE_ANSWERS = ("number_match", "peft_match", "label_match", "contains")
HARNESS = "peftsweep.evaluation.harness.lm_eval"  # its tasks have their own rows


def check_sources(config: Config, given: Collection[str]) -> None:
    """Refuse a key of the command line that has no effect because rows or base come from another kind of source.

    ``given`` are the keys of the command line. A key that is null counts as not given.

    Raises:
        InputError: the message names the key, and the source that is read.
    """
    own, validation = config.dataset, config.dataset.validation
    sections: dict[str, tuple[Any, list[str | None]]] = {  # with the local files of each
        "dataset": (own, [own.path, own.test_path]),
        "dataset.validation": (validation, [validation.path]),
    }
    for name in config.eval:
        source = evaluation_source(config, name)
        sections[f"eval.{name}"] = (source, [source.path])
    for section, (source, paths) in sections.items():
        for key in HUB_KEYS:
            if _is_given(source, f"{section}.{key}", given) and (source.path or not source.hub):
                read = f"{section}.path={source.path} is a file" if source.path else f"there is no {section}.hub"
                if section.startswith("eval.") and not source.path and rows_config(config.eval[section[5:]]).hub:
                    read = f"dataset.path={own.path} is read in place of {own.hub}"
                raise InputError(f"{section}.{key}: is only for rows of the hub, and {read}")
        if _is_given(source, f"{section}.encoding", given) and not any(paths):
            raise InputError(f"{section}.encoding: is only for a local file, and there is no {section}.path")
    if own.test_path and _is_given(own, "dataset.hub_test_split", given):
        raise InputError(f"dataset.hub_test_split: the test rows are those of dataset.test_path={own.test_path}")
    if _is_given(config.model, "model.revision", given):
        from peftsweep.models.model import is_local  # imports torch, which `--help` must not

        if is_local(config.model):
            kind = "has random weights" if config.model.init is Init.random else "is a folder"
            raise InputError(f"model.revision: is only for a model of the hub; {config.model.name_or_path} {kind}")


def _is_given(section: Any, key: str, given: Collection[str]) -> bool:
    return key in given and getattr(section, key.rpartition(".")[2]) is not None


def check_evaluation_rows(config: Config, rows: data_rows.Rows | None) -> None:
    """Fill the evaluations' templates with every local row, so that a missing column is found before training."""
    for name in config.eval:
        source = evaluation_source(config, name)
        if source.path or (not source.hub and rows is not None):
            own = data_rows.evaluation_rows(source, f"eval.{name}", rows.test if rows else [])
            examples = test_examples(config, name, own)
            _check_norm(config, name, examples)
            _check_references(config, name, [example.answer for example in examples])
            test_rows(config, name, rows or data_rows.Rows([]))  # raises if there are too few to set some aside


def _check_references(config: Config, name: str, answers: list[str]) -> None:
    """Refuse a reference answer that a metric of ``eval.<name>`` cannot use, such as one without a number."""
    node = config.eval[name]
    metrics = {"metric": node.get("metric")} | {f"beside.{key}": one for key, one in (node.get("beside") or {}).items()}
    for key, metric in metrics.items():
        module, _, function = str((metric or {}).get("_target_")).rpartition(".")
        if module != METRICS or function not in REFUSE_ANSWERS:
            continue
        options = {option: value for option, value in dict(metric or {}).items() if not option.startswith("_")}
        if wrong := _unjudged(function, json.dumps(options, default=str), tuple(dict.fromkeys(answers))):
            where = node.get("path") or "the test rows"
            row = answers.index(wrong[0]) + 1
            raise InputError(f"eval.{name}.{key}={function}: row {row} of {where} cannot be judged: {wrong[1][:300]}")


@lru_cache(maxsize=16)
def _unjudged(function: str, options: str, answers: tuple[str, ...]) -> tuple[str, str] | None:
    """The first reference answer that a metric of ours cannot use, with the reason; None if there is none."""
    judge: Any = pydoc.locate(f"{METRICS}.{function}")  # imports torch, which `--help` must not
    for answer in answers:
        try:
            judge("", answer, **json.loads(options))
        except ValueError as error:
            return answer, str(error)
        except TypeError:  # an option is wrong; creating the metric reports it
            return None
    return None


def _check_norm(config: Config, name: str, examples: list[templates.Example]) -> None:
    """Refuse ``acc_norm`` as a headline or metric if the scored texts are not the texts of the choices."""
    from peftsweep.evaluation import evaluate  # imports torch, which `--help` must not

    node = config.eval[name]
    if pydoc.locate(node["_target_"]) is not evaluate.multiple_choice or evaluate.scores_texts(examples):
        return
    by = {f"eval.{name}.headline": node.get("headline")} | {
        key: metric.removeprefix(f"{name}.") for key, metric in _validation_metrics(config).items()
    }
    for key, metric in by.items():
        if metric == "acc_norm":
            why = "because it scores other texts than those of the choices"
            raise InputError(f"{key}: eval.{name} does not measure acc_norm, {why}; must be acc")


def test_rows(config: Config, name: str, rows: data_rows.Rows) -> list[data_rows.Row]:
    """The test rows of ``eval.<name>``, without those that it sets aside for validation."""
    return _split_for_validation(config, name, rows)[1]


def validation_rows(config: Config, name: str, rows: data_rows.Rows) -> list[data_rows.Row] | None:
    """The rows that ``eval.<name>`` validates on; None if it does not validate.

    An evaluation on the dataset's test rows validates on the dataset's validation rows. One with rows of its own
    validates only if its metric chooses weights or trials, on some of its rows that it sets aside.
    """
    if not rows.validation or config.eval[name].get("_target_") == HARNESS:
        return None
    if same_source(config, name):
        return rows.validation
    source = evaluation_source(config, name)
    return _split_for_validation(config, name, rows)[0] if source.path or source.hub else rows.validation


def _split_for_validation(
    config: Config, name: str, rows: data_rows.Rows
) -> tuple[list[data_rows.Row] | None, list[data_rows.Row]]:
    found = data_rows.evaluation_rows(evaluation_source(config, name), f"eval.{name}", rows.test)
    if not sets_aside(config, name):
        return None, found
    own = config.dataset
    return data_rows.set_aside(found, own.validation_samples, own.split_seed, f"eval.{name}")


def sets_aside(config: Config, name: str) -> bool:
    """Whether ``eval.<name>`` holds out some of its own rows, because validation chooses by its metric."""
    source = evaluation_source(config, name)
    named = [metric.partition(".")[0] for metric in _validation_metrics(config).values()]
    own = bool(source.path or source.hub) and not same_source(config, name)
    return config.train.eval_every is not None and own and name in named


def _validation_metrics(config: Config) -> dict[str, str]:
    """The metrics that a validation chooses by, by the key that names each."""
    found = {"train.best_metric": config.train.best_metric, "halving.metric": config.halving.metric}
    found["tune.metric"] = config.tune.metric
    return {key: metric for key, metric in found.items() if metric is not None and metric != "loss"}


def check_metrics(config: Config) -> None:
    """Refuse a metric that its evaluation does not compute, or that it can only compute on test rows."""
    from peftsweep.evaluation import evaluate  # imports torch, which `--help` must not

    named_metrics = [(key, *metric.partition(".")[::2]) for key, metric in _validation_metrics(config).items()]
    for key, name, _ in named_metrics:
        if config.eval[name].get("_target_") == HARNESS:
            raise InputError(f"{key}: eval.{name} scores the test rows of its tasks only, so it cannot validate")
    objectives = [config.objective] if isinstance(config.objective, str) else config.objective or []
    columns = [
        column.split(".") for column in objectives if column.startswith("eval_info.") and column.endswith(".value")
    ]
    named_metrics += [("objective", column[1], ".".join(column[2:-1]).removeprefix("base_")) for column in columns]
    for key, name, metric in named_metrics:
        node = config.eval[name]
        known = evaluate.measures(pydoc.locate(node["_target_"]), node)
        if known is not None and metric not in known:
            raise InputError(f"{key}: eval.{name} does not measure '{metric}'; {suggest(metric, list(known))}")


def check_conversations(config: Config) -> None:
    """Render all local rows with a local chat template, so that rows it refuses are found before training."""
    from peftsweep.models.model import source  # imports torch, which `--help` must not

    if not config.dataset.chat or config.model.init is Init.random:
        return
    own = {name: evaluation_source(config, name) for name in config.eval}
    paths = [config.dataset.path, config.dataset.test_path, *(rows.path for rows in own.values())]
    folder = Path(source(config.model))
    read = [file for path in paths if path for file in files.matching(path)]
    read += folder.iterdir() if folder.is_dir() else ()
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(read))
    if folder.is_dir():
        _render_all(pickle.dumps((config.model, config.dataset, config.eval)), stamps)


@lru_cache(maxsize=4)
def _render_all(settings: bytes, _stamps: tuple[tuple[str, int, int], ...]) -> None:
    from peftsweep.models.model import load_tokenizer

    config = Config()
    config.model, config.dataset, config.eval = pickle.loads(settings)
    tokenizer, own = load_tokenizer(config.model), config.dataset
    for key in ("path", "test_path"):
        if path := getattr(own, key):
            read = data_rows.read_rows(path, f"dataset.{key}", own.encoding)
            rendered(own, templates.dataset_examples(own, read, path), tokenizer, file=path)
    for name in config.eval:
        source = evaluation_source(config, name)
        if source.path:
            made = test_examples(config, name, data_rows.evaluation_rows(source, f"eval.{name}", []))
            rendered(own, made, tokenizer, f"eval.{name}", source.path)


def rendered(
    dataset: DatasetConfig, examples: list[templates.Example], tokenizer: Any, key: str = "dataset", file: str = ""
) -> list[templates.Example]:
    """``examples`` rendered by the tokenizer's chat template, or by the plain layout without ``dataset.chat``.

    Plain texts, which have no prompts, are not rendered as conversations.
    """
    chat = dataset.chat and any(example.prompt for example in examples)
    return tokens.through_chat_template(
        tokenizer, examples, chat_template=chat, turns=dataset.turns, key=key, file=file
    )


def test_examples(config: Config, name: str, rows: Iterable[data_rows.Row]) -> list[templates.Example]:
    """``rows`` as examples of ``eval.<name>``: by its own templates, else by the dataset's."""
    node, own = config.eval[name], config.dataset
    source = rows_config(node)
    mine = source.prompt is None and source.answer is None  # then the rows have the layout of the dataset
    classes = node.get("classes") or (own.classes if mine else ())
    prompt = own.prompt if source.prompt is None else source.prompt
    answer = own.answer if source.answer is None else source.answer
    reader = source.reader or (own.reader if mine else None)
    return templates.examples(rows, prompt, answer, f"eval.{name}", "", classes, reader, own.missing)


def evaluation_source(config: Config, name: str) -> RowsConfig:
    """The source of ``eval.<name>``: the trial's own files, if they replace the hub dataset of the evaluation."""
    source, own = rows_config(config.eval[name]), config.dataset
    if own.path and source.hub and source.hub == own.hub:
        return dataclasses.replace(source, hub=None)
    return source


def same_source(config: Config, name: str) -> bool:
    """Whether ``eval.<name>`` and ``dataset.validation`` read the same hub dataset."""
    hub = config.dataset.validation.hub
    return hub is not None and rows_config(config.eval[name]).hub == hub


def rows_config(node: Mapping[str, Any]) -> RowsConfig:
    """The part of an ``eval`` entry that names its rows."""
    return RowsConfig(**{key: node[key] for key in ROWS_KEYS if key in node})
