"""The rows of a dataset, from the hub, files or a generator, split into training, validation and test rows.

A row is a dict of a file's columns; an example is its prompt and answer; tokens are an example in
the model's vocabulary; a batch is right-padded tokens as tensors.
"""

from __future__ import annotations

import hashlib
import json
import pydoc
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from peftsweep.data import files, hub
from peftsweep.data.conversations import trees
from peftsweep.data.files import FORMATS as FORMATS
from peftsweep.data.files import Row as Row
from peftsweep.data.files import plain_rows
from peftsweep.data.templates import dataset_examples, templates
from peftsweep.errors import InputError, first_line, suggest
from peftsweep.schema import DatasetConfig, OnMissing, RowsConfig

GENERATED_TEST_ROWS = 1000


def read_rows(path: str | Path, key: str = "path", encoding: str | None = None) -> list[Row]:
    """The rows of a local file, or of all that ``path`` matches (``files.read_rows``); of trees as conversations."""
    parts = files.matching(path) or [Path(path)]  # reading a path that names no file says why
    return trees.joined([row for part in parts for row in files.read_rows(part, key, encoding)])


def hub_rows(name: str, config: str | None, split: str, revision: str | None, key: str) -> list[Row]:
    """The rows of a hub dataset, through its cache; needs the network the first time.

    Raises:
        InputError: it cannot be loaded.
    """
    return trees.joined(_plain(_loaded(name, config, split, revision, key)))


def first_hub_rows(name: str, config: str | None, split: str, revision: str | None) -> list[Row]:
    """The first rows of ``hub_rows``.

    Raises:
        InputError: it cannot be loaded.
    """
    loaded = _loaded(name, config, split, revision, "dataset")
    return _plain(loaded.select(range(min(files.FIRST_ROWS, len(loaded)))))


def _plain(loaded: Any) -> list[Row]:
    kinds = {name: str(getattr(kind, "dtype", "")) for name, kind in loaded.features.items()}
    return plain_rows(loaded, {name: kind for name, kind in kinds.items() if kind in files.SHORT_FLOATS})


def _loaded(name: str, config: str | None, split: str, revision: str | None, key: str) -> Any:
    import datasets

    with _loading_rows(name, key):  # no network, no such dataset, no such split
        try:
            found = datasets.load_dataset(name, config, split=split, revision=revision)
        except Exception:
            if hub.problem() is None:
                hub.check_access(name, revision)  # its error is clearer
            raise
    commit = _commit(found)
    # If the hub refuses or there is no network, the library loads the last cached copy, of any revision.
    wanted = None if commit is None else hub.commit_in_cache(name, "dataset", revision) or revision
    if wanted not in (commit, None):
        if hub.problem() is None:
            check_available(name, config, revision, key)  # says what the hub refuses
        raise InputError(
            f"{key}={name}: the last copy in the local cache is of commit {commit}, not of "
            f"{revision or 'the main branch'}; load that once with a network"
        )
    _COMMITS[name, revision] = commit
    return found


@lru_cache
def check_available(name: str, config: str | None, revision: str | None, key: str) -> None:
    """Check that the hub has the dataset, or the local cache if the hub does not answer.

    Raises:
        InputError: it does not.
    """
    import datasets

    with _loading_rows(name, key):
        if hub.problem() is None:
            hub.check_access(name, revision)
        else:
            datasets.load_dataset_builder(name, config, revision=revision)


@contextmanager
def _loading_rows(name: str, key: str) -> Iterator[None]:
    section = key.rpartition(".")[0] or key
    with hub.loading(
        f"{key}={name}", "local rows", f"; {section}.hub_config, .hub_split and .revision choose the rows"
    ):
        yield


def _commit(loaded: Any) -> str | None:
    """The hub's commit of a loaded dataset, which is the name of its folder in the cache; None if it has none."""
    folders = {Path(file["filename"]).parent.name for file in getattr(loaded, "cache_files", ())}
    return next((name for name in folders if hub.COMMIT.fullmatch(name)), None)


_COMMITS: dict[tuple[str | None, str | None], str | None] = {}  # loaded by this process, by name and revision


@dataclass
class Rows:
    """The rows of a dataset by their use."""

    train: list[Row]
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)  # the number of training rows left out, by reason
    commit: str | None = None  # the hub's commit that they were loaded from

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A hash of each part's content, independent of its file."""
        return {part: fingerprint(getattr(self, part)) for part in ("train", "validation", "test")}


def load_rows(dataset: DatasetConfig, *, validation: bool = False) -> Rows:
    """The dataset's rows; test rows are never training rows, and validation rows never test rows.

    A training row with the prompt and answer of a test or validation row is left out, unless ``leave_out_tested``
    is false. With ``validation`` true, up to ``validation_samples`` rows (at most a tenth) leave the training rows,
    unless ``validation`` names a source of them.

    Raises:
        InputError: a file or a hub dataset cannot be read, or nothing is left to train on.
    """
    train, test, missing = _train_and_test(dataset)
    commit = None if dataset.path else _COMMITS.get((dataset.hub, dataset.revision))
    train, left_out = _clean(dataset, train, test)
    if dataset.missing is OnMissing.drop:
        left_out["missing_rows"] = missing
    shuffle = random.Random(dataset.split_seed)
    if dataset.samples is not None and dataset.samples < len(train):
        train = shuffle.sample(train, dataset.samples)
    if validation and (dataset.validation.path or dataset.validation.hub):
        validated = validation_rows(dataset)
        train = _not_validated(dataset, train, validated, left_out)
        return Rows(_fraction(train, dataset.fraction, shuffle), validated, test, left_out, commit)
    held_out = min(dataset.validation_samples, len(train) // 10) if validation else 0
    if validation and not held_out:
        raise InputError(f"train.eval_every: {len(train)} training rows are too few to hold out validation rows")
    if held_out:
        train = shuffle.sample(train, len(train))
    validated, train = train[:held_out], train[held_out:]
    if held_out:
        repeated = left_out["duplicate_rows"] and not dataset.deduplicate  # else no row can be a held out one again
        train = _not_validated(dataset, train, validated if repeated else [], left_out)
    return Rows(_fraction(train, dataset.fraction, shuffle), validated, test, left_out, commit)


def _not_validated(
    dataset: DatasetConfig, train: list[Row], validated: list[Row], left_out: dict[str, int]
) -> list[Row]:
    """The training rows without those with the prompt and answer of a validation row; their number in ``left_out``.

    They all stay, but are counted, if ``leave_out_tested`` is false.

    Raises:
        InputError: nothing is left to train on.
    """
    known = {example.written for example in dataset_examples(dataset, validated)}
    kept = train
    if known:
        examples = dataset_examples(dataset, train)
        kept = [row for row, example in zip(train, examples, strict=True) if example.written not in known]
    left_out["validated_rows"] = len(train) - len(kept)
    if not kept:
        raise InputError(f"train.eval_every: all {len(train)} training rows repeat validation rows")
    return kept if dataset.leave_out_tested else train


def _fraction(rows: list[Row], fraction: float, shuffle: random.Random) -> list[Row]:
    """A ``fraction`` of the rows, at least one; a larger fraction contains a smaller one."""
    return rows if fraction == 1 else shuffle.sample(rows, len(rows))[: max(1, round(fraction * len(rows)))]


def validation_rows(dataset: DatasetConfig) -> list[Row]:
    """``validation_samples`` rows of the source that ``validation`` names, with the dataset's columns added.

    With ``split_seed=0`` they are the rows that PEFT's comparison takes (the first of NumPy's legacy shuffle).

    Raises:
        InputError: the source cannot be read, or lacks a column.
    """
    import numpy

    own = dataset.validation
    where = RowsConfig(own.path, own.encoding, own.hub, own.hub_config, own.hub_split, own.revision)
    read = evaluation_rows(where, "dataset.validation", [])
    for column in own.columns.values():
        if any(column not in row for row in read):
            raise InputError(f"dataset.validation.columns: a row has no '{column}'; {suggest(column, list(read[0]))}")
    order = numpy.random.RandomState(dataset.split_seed).permutation(len(read))[: dataset.validation_samples]
    rows = [read[n] | {mine: read[n][theirs] for mine, theirs in own.columns.items()} for n in order]
    if not rows:
        raise InputError("dataset.validation: its source has no rows")
    dataset_examples(dataset, rows, own.path or own.hub or "")  # raises if the templates do not fit
    return rows


def _clean(dataset: DatasetConfig, train: list[Row], test: list[Row]) -> tuple[list[Row], dict[str, int]]:
    """The training rows without test rows, too long rows and duplicates; and the number of each."""
    try:
        known = dataset_examples(replace(dataset, missing=OnMissing.drop), test)
        tested = {example.written for example in known}
    except InputError:
        tested = set()  # the test rows have other columns, for which the evaluation has a template
    seen: set[tuple[str, ...]] = set()
    kept = []
    left_out = {"tested_rows": 0, "long_rows": 0, "duplicate_rows": 0}
    for row, example in zip(train, dataset_examples(dataset, train), strict=True):
        trained = (*example.written, example.prompt)  # the prompt also holds the weights of a conversation's turns
        again = trained in seen
        seen.add(trained)
        left_out["duplicate_rows"] += again
        left_out["tested_rows"] += example.written in tested
        if dataset.leave_out_tested and example.written in tested:
            continue
        if dataset.max_characters and len(example.prompt) + len(example.answer) > dataset.max_characters:
            left_out["long_rows"] += 1
        elif not (again and dataset.deduplicate):
            kept.append(row)
    if not kept:
        raise InputError(f"dataset: none of {len(train)} training rows is left ({left_out})")
    return kept, left_out


def _train_and_test(dataset: DatasetConfig) -> tuple[list[Row], list[Row], int]:
    """Training rows, test rows, and the number of training rows left out for a missing value."""
    if dataset.generator is not None and dataset.path is None:
        make: Any = pydoc.locate(dataset.generator)
        if not callable(make):
            raise InputError(f"dataset.generator={dataset.generator}: no such function")
        train = _generated(dataset, make, "train", dataset.samples or 1000)
        if dataset.test_path is not None:
            return train, read_rows(dataset.test_path, "dataset.test_path", dataset.encoding), 0
        return train, _generated(dataset, make, "test", GENERATED_TEST_ROWS), 0
    if dataset.path is not None:
        read = read_rows(dataset.path, "dataset.path", dataset.encoding)
    elif dataset.hub is not None:
        read = hub_rows(dataset.hub, dataset.hub_config, dataset.hub_split, dataset.revision, "dataset.hub")
    else:
        raise InputError(f"dataset.path: dataset={dataset.name} needs the file of its training rows")
    # Examples are made in the order of the file, so that an error can name the row.
    made = templates(dataset, dataset.path or "").each(read)
    train = [row for row, example in zip(read, made, strict=True) if example]
    missing = len(read) - len(train)
    if dataset.test_path is not None:
        return train, read_rows(dataset.test_path, "dataset.test_path", dataset.encoding), missing
    if dataset.hub is not None and dataset.path is None and dataset.hub_test_split is not None:
        test = hub_rows(dataset.hub, dataset.hub_config, dataset.hub_test_split, dataset.revision, "dataset.hub")
        return train, test, missing
    order = random.Random(dataset.split_seed).sample(train, len(train))
    cut = round(len(order) * dataset.train_fraction)
    if not 0 < cut < len(order):
        raise InputError(
            f"dataset.train_fraction={dataset.train_fraction}: leaves {cut} of {len(order)} to train and "
            f"{len(order) - cut} to test on; both need a row (or give dataset.test_path)"
        )
    return order[:cut], order[cut:], missing


def _generated(dataset: DatasetConfig, make: Any, split: str, count: int) -> list[Row]:
    setting = f"dataset.generator={dataset.generator}"
    try:
        rows = make(split, count, dataset.split_seed)
    except InputError:
        raise
    except TypeError as error:
        raise InputError(f"{setting}: must be a function of split, count and seed ({error})") from error
    except Exception as error:  # a user's function may raise anything
        raise InputError(f"{setting}: {type(error).__name__}: {first_line(error)}") from error
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise InputError(f"{setting}: must return a list of rows, each a dict of its columns")
    return rows


def evaluation_rows(source: RowsConfig, key: str, own: Sequence[Row]) -> list[Row]:
    """The rows of the evaluation ``key``: from its own file, its hub dataset, or ``own``, the dataset's test rows."""
    if source.path is not None:
        rows = read_rows(source.path, f"{key}.path", source.encoding)
    elif source.hub is not None:
        rows = hub_rows(source.hub, source.hub_config, source.hub_split, source.revision, f"{key}.hub")
    else:
        rows = list(own)
    return rows[: source.samples]


def set_aside(rows: Sequence[Row], count: int, seed: int, key: str) -> tuple[list[Row], list[Row]]:
    """Up to ``count`` rows of an evaluation (at most half) for validation, and the rows that are left for the test.

    Raises:
        InputError: there are too few rows.
    """
    numbers = set(random.Random(seed).sample(range(len(rows)), min(count, len(rows) // 2)))
    if not numbers:
        raise InputError(f"{key}: {len(rows)} rows are too few to set some aside for validation")
    parts = [[row for n, row in enumerate(rows) if (n in numbers) is chosen] for chosen in (True, False)]
    return parts[0], parts[1]


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of the rows' content."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
