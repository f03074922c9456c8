"""Count the test rows that the adapter was trained on."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from peftsweep.config import build, evaluations
from peftsweep.config.compose import Trial
from peftsweep.config.evaluations import HARNESS
from peftsweep.data import rows as data_rows
from peftsweep.data import templates
from peftsweep.data.rows import Rows
from peftsweep.data.templates import Example
from peftsweep.data.tokens import Tokens
from peftsweep.errors import InputError
from peftsweep.schema import DatasetConfig, OnMissing, TrainConfig
from peftsweep.study import store
from peftsweep.study.record import Result
from peftsweep.training import length

Written = tuple[str, str]  # a prompt and its answer
Facts = dict[str, int | None]
SEEN, SIMILAR = "seen_in_training", "similar_in_training"
UNKNOWN: Facts = {SEEN: None, SIMILAR: None}


@dataclasses.dataclass(frozen=True)
class Training:
    """What an adapter was trained on: its trial (which has the templates), the training rows, and their tokens."""

    trial: Trial
    rows: Sequence[data_rows.Row]
    tokens: Sequence[Tokens]


def seen(
    trial: Trial,
    rows: Rows,
    tokens: Sequence[Tokens],
    tests: dict[str, list[Example]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Facts]:
    """The number of test rows of each evaluation whose prompt and answer were trained on; None if it is unknown.

    Rows that differ from one trained on in white space, capitals or the form of characters alone are counted apart.
    ``rows`` and ``tokens`` are those of the trial. For a saved adapter (``adapter.path``) the training rows are those
    that its record names; the number is None if it has no record, or its rows cannot be read any more. It is None for
    tasks of lm-evaluation-harness, too. Test rows are compared in the templates of the evaluation and of the dataset.
    """
    config = trial.config
    training: Training | None = Training(trial, rows.train, tokens)
    if config.adapter.path is not None:
        training = _of_adapter(trial, rows, tokens, tokenizer)
    if training is None:
        return {name: dict(UNKNOWN) for name in tests}
    dataset = training.trial.config.dataset
    test_texts = {
        name: _written_in_all_templates(test, _in_dataset_templates(dataset, trial, name, rows))
        for name, test in tests.items()
    }
    trained_texts = _trained_examples(
        training,
        {alike(written) for rows_texts in test_texts.values() for ways in rows_texts for written in ways},
        tokenizer,
    )
    counts = {name: _count(rows_texts, trained_texts) for name, rows_texts in test_texts.items()}
    harness = [name for name in tests if config.eval[name].get("_target_") == HARNESS]
    return counts | {name: dict(UNKNOWN) for name in harness}


def alike(written: Written) -> Written:
    """A prompt and its answer without what two copies of the same text often differ in."""
    prompt, answer = (
        " ".join(unicodedata.normalize("NFKC", text).casefold().replace("\\n", " ").split()) for text in written
    )
    return prompt, answer


def _count(tests: Sequence[set[Written]], trained_texts: set[Written]) -> Facts:
    same = [bool(ways & trained_texts) for ways in tests]
    roughly = set(map(alike, trained_texts))
    similar = [not roughly.isdisjoint(map(alike, ways)) for ways in tests]
    return {SEEN: sum(same), SIMILAR: sum(similar) - sum(same)}


def _written_in_all_templates(test: Sequence[Example], again: Sequence[Example | None]) -> list[set[Written]]:
    """For each test row: its prompt and answer in each template that is used for it."""
    others = again if len(again) == len(test) else [None] * len(test)
    return [{one.written for one in pair if one is not None} for pair in zip(test, others, strict=True)]


def _in_dataset_templates(dataset: DatasetConfig, trial: Trial, name: str, rows: Rows) -> list[Example | None]:
    """The test rows in the dataset's own templates, if they have its columns."""
    whole = dataclasses.replace(dataset, missing=OnMissing.drop)
    try:
        return list(templates.templates(whole).each(evaluations.test_rows(trial.config, name, rows)))
    except InputError:
        return []


def _trained_examples(training: Training, wanted: set[Written], tokenizer: PreTrainedTokenizerBase) -> set[Written]:
    """The examples alike to ``wanted`` ones that were trained on; a short training does not use all of its rows."""
    config, tokens = training.trial.config, training.tokens
    examples = templates.dataset_examples(config.dataset, training.rows)
    matches = [
        (number, row, example.written)
        for number, (row, example) in enumerate(zip(training.rows, examples, strict=True))
        if alike(example.written) in wanted
    ]
    taken = length.rows_taken(tokens, config.train, config.seed)
    if len(tokens) == len(training.rows):
        return {written for number, _, written in matches if number in taken}
    # Rows that are too long were left out, so that row numbers and token numbers differ.
    kept = {tuple(tokens[number].ids) for number in taken}
    return {written for _, row, written in matches if kept & _ids(training.trial, row, tokenizer)}


def _ids(trial: Trial, row: data_rows.Row, tokenizer: PreTrainedTokenizerBase) -> set[tuple[int, ...]]:
    try:
        return {tuple(tokens.ids) for tokens in build.training_tokens(trial, tokenizer, [row])}
    except InputError:  # it is too long
        return set()


def _of_adapter(
    trial: Trial, rows: Rows, tokens: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase
) -> Training | None:
    """The training rows of a saved adapter by its record, if they can still be read."""
    result = store.result(store.adapter(str(trial.config.adapter.path)).parent)
    trained_on = ((result.meta_info.get("rows_sha") or {}) if result else {}).get("train")
    if result is None or trained_on is None:
        return None
    dataset, own = _section(DatasetConfig, result, "dataset"), _section(TrainConfig, result, "train")
    config = dataclasses.replace(trial.config, dataset=dataset, train=own, seed=result.config["seed"])
    adapter_trial = dataclasses.replace(trial, config=config)
    if rows.fingerprints["train"] != trained_on or dataset != trial.config.dataset:
        try:
            read = data_rows.load_rows(dataset, validation=own.eval_every is not None)
        except InputError:
            return None
        if read.fingerprints["train"] != trained_on:
            return None
        rows, tokens = read, build.training_tokens(adapter_trial, tokenizer, read.train)
    return Training(adapter_trial, rows.train, tokens)


def _section(kind: Any, result: Result, name: str) -> Any:
    """A section of a record's configuration, without keys that this version does not have."""
    fields = {field.name for field in dataclasses.fields(kind)}
    values = {key: value for key, value in result.config[name].items() if key in fields}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
