"""Turn a composed configuration into a trial: fill it from files, check it, and compute its identity.

The identity of a trial is a hash of everything that changes its results, and of nothing else.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import shlex
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftsweep import limits, shorthand
from peftsweep.config.calls import check_calls
from peftsweep.config.checks import (
    check_complete,
    check_files,
    check_halving,
    check_keys,
    check_objective,
    check_values,
    check_warmup,
    one_line,
)
from peftsweep.config.evaluations import check_evaluation_rows, check_metrics, check_sources
from peftsweep.config.fill import conf_dir, fill_from_files, read_newlines, use_current_names
from peftsweep.config.identity import Identity, current_name, identity_of
from peftsweep.config.restored import FROM_FILE
from peftsweep.data import files, fingerprint, hub, layouts
from peftsweep.data import rows as data_rows
from peftsweep.errors import InputError
from peftsweep.observe import fast_dtype
from peftsweep.schema import MISSING, Config, Dtype, Resource
from peftsweep.search import pruning
from peftsweep.search.pruning import Pruning
from peftsweep.study import trust

# Keys that `filled` reads to set other keys, or sets itself. SOURCES name files that set other keys.
SOURCES = ("repeat", "adapter.path", "method.path", "train.params_file")
KEYS_THAT_DECIDE_OTHERS = (
    *SOURCES,
    *("device", "trust", "model.dtype", "train.eval_every", "train.checkpoint_every", "train.best_metric", "halving"),
)
# Sections about the search that a trial belongs to, or about messages. They are not part of its identity.
SWEEP_SECTIONS = ("forecast", "price", "budget", "tune", "league", "search")
WORDS_FOR_NULL = ("no", "off", "false", "never", "none", "0")  # words that people write for null in an interval

EXAMPLES = {  # of keys without a default, quoted for a shell
    "model.name_or_path": "model.name_or_path=DIR_OR_HUB_ID",
    "dataset.path": "dataset.path=rows.jsonl",
    "dataset.prompt": """'dataset.prompt="{question}"'""",
    "dataset.answer": """'dataset.answer="{answer}"'""",
    "eval.forgetting.path": "eval.forgetting.path=text.jsonl",
    "eval.substring.path": "eval.substring.path=rows.jsonl",
    "eval.lm_eval.tasks": "'eval.lm_eval.tasks=[mmlu]'",
    "method.path": "method.path=DIR",
}


@dataclass(frozen=True)
class Trial:
    """One checked point of a sweep."""

    config: Config
    tree: dict[str, Any]  # the configuration as plain values, for result.json
    choices: dict[str, str]  # the option chosen in each group
    overrides: list[str]
    rows: data_rows.Rows | None  # None for data of the hub, which is loaded when it is needed
    identity: str
    training: str  # the identity of the training alone, without the evaluations
    slug: str
    earlier: Identity | None = None  # by the first rule, if it differs
    # Which fields of an experiment's files were used, and which not: see experiment.Reading.facts.
    experiment: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    told_by: str = ""  # the settings that differ from the other trials of its sweep and study
    pruning: Pruning | None = None  # of the search that the trial is part of
    offline: bool = False  # the process that sent the trial found that the hub does not answer

    @property
    def name(self) -> str:
        """The name that distinguishes the trial from others of its sweep and study (see naming); else its label."""
        return self.told_by or self.label

    @property
    def label(self) -> str:
        """The name that a sweep gave this point; by default its slug."""
        return self.config.label or self.slug


def without_data(cfg: DictConfig, choices: Mapping[str, str | None], overrides: Iterable[str]) -> Trial:
    """A trial for uses of its model alone: its data files are not read, and it has no identity.

    Raises:
        InputError: as ``filled``, or a value is out of its range.
    """
    values = filled(copied(cfg), choices, list(overrides))
    check_values(values.tree)
    chosen = {group: str(option) for group, option in choices.items() if option}
    return Trial(values.config, values.tree, chosen, values.overrides, None, "", "", "")


@dataclass(frozen=True)
class Filled:
    """A composed configuration as plain values, filled from files. The ranges of values are not checked yet."""

    config: Config
    tree: dict[str, Any]  # the same values, with enums as their names
    choices: dict[str, str | None]
    overrides: list[str]
    experiment: dict[str, dict[str, str]]


def trial(cfg: DictConfig, choices: Mapping[str, str | None], overrides: Iterable[str] = ()) -> Trial:
    """Check ``cfg`` and turn it into a trial. It reads local data files and loads no model.

    Raises:
        InputError: a key or value is wrong; the message names the key and what is allowed.
    """
    return checked(filled(copied(cfg), choices, list(overrides)))


def copied(cfg: DictConfig) -> DictConfig:
    """A deep copy of a composed configuration in a fifth of the time of OmegaConf's own."""
    made: DictConfig = pickle.loads(pickle.dumps(cfg))
    return made


def filled(cfg: DictConfig, choices: Mapping[str, str | None], overrides: list[str]) -> Filled:
    """``cfg`` as plain values; ``cfg`` itself is changed.

    Raises:
        InputError: a key is missing or unknown, a value cannot be resolved, or a file cannot be read.
    """
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra", None)
    check_complete(cfg, Config)
    read_newlines(cfg, overrides)
    if not cfg.method and choices.get("method") not in ("full", FROM_FILE, None):
        raise InputError(
            f"method={choices['method']}: its yaml names no method; it must have method: {{_target_: peft.X}}"
        )
    source = None if cfg.trust else _source(cfg)
    own = {name for _, name in trust.names(OmegaConf.to_container(cfg))} if source else set()
    made, heeded = fill_from_files(cfg, overrides, choices)
    if source:
        use_current_names(cfg)
        trust.check(typing.cast(dict[str, Any], OmegaConf.to_container(cfg)), Path(conf_dir()), own, source)
    if cfg.model.dtype is Dtype.auto:
        cfg.model.dtype = fast_dtype.resolve(str(cfg.device))
    for key in ("eval_every", "checkpoint_every"):
        if str(cfg.train[key]).lower() in WORDS_FOR_NULL:
            cfg.train[key] = None
    if cfg.halving.resource is Resource.rows and cfg.halving.min_fraction is not None:
        cfg.train.eval_every = cfg.train.eval_every or "1epoch"
        cfg.halving.metric = cfg.halving.metric or cfg.train.best_metric
    elif cfg.halving.min_steps is not None:
        cfg.train.eval_every = cfg.train.eval_every or str(cfg.halving.min_steps)
    if cfg.halving.min_steps is not None or not cfg.halving.test:
        cfg.halving.metric = cfg.halving.metric or cfg.train.best_metric
    tree = _resolved(cfg)
    if any(name != current_name(name) for _, name in trust.names(tree)):
        use_current_names(cfg)
        tree = _resolved(cfg)
    try:
        config = typing.cast(Config, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise InputError(one_line(error)) from None
    check_keys(tree, Config)
    return Filled(with_plain(config, tree), tree, {**choices, **made}, overrides, heeded)


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    try:
        tree = typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
        if not _holds_missing(tree):
            return tree
    except OmegaConfBaseException as error:
        problem = one_line(error)
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        shown = _examples(cfg, missing)
        problem = f"{', '.join(missing)}: must be given" + (f", such as {' '.join(shown)}" if shown else "")
    raise InputError(problem)


def _examples(cfg: DictConfig, missing: Sequence[str]) -> list[str]:
    """Words that would give the missing keys; templates are over the columns of the dataset's file, if it names one.

    Raises:
        InputError: that file cannot be read.
    """
    own = cfg.dataset
    templates = [key for key in shorthand.TEMPLATES if key in missing]
    words = {key: word for key, word in EXAMPLES.items() if key in missing}
    if templates and not OmegaConf.is_missing(own, "path") and own.path is not None:
        rows = files.first_rows(own.path, "dataset.path", own.encoding)
        if len(templates) == len(shorthand.TEMPLATES) and layouts.recognise(rows):
            words = {key: word for key, word in words.items() if key not in templates}
            return [shlex.quote(shorthand.override("dataset", own.path)), *words.values()]
        shown = {f"dataset.{key}": value for key, value in layouts.example(rows).items()}
        words |= {key: f"'{shorthand.override(key, shown[key])}'" for key in templates if key in shown}
    return [*words.values()]


def _holds_missing(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_missing, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and value == MISSING


def with_plain(config: Config, tree: Mapping[str, Any]) -> Config:
    """The configuration with the sections for other libraries as in ``tree``.

    In ``config`` an interpolation such as ${model.dtype} is a member of an Enum; libraries need its name.
    """
    return dataclasses.replace(config, method=tree["method"], quant=tree["quant"], eval=tree["eval"])


def checked(values: Filled) -> Trial:
    """The trial with these values.

    Raises:
        InputError: a value is out of its range, or values do not fit together.
    """
    config, tree, choices = values.config, values.tree, values.choices
    check_values(tree)
    check_halving(config, choices.get("hydra/sweeper"))
    check_objective(config)
    check_calls(config, choices)
    check_files(config)
    check_sources(config, {word.lstrip("+").partition("=")[0] for word in values.overrides})
    rows = _rows(config)
    check_evaluation_rows(config, rows or _test_rows(config))
    check_warmup(config, rows)
    check_metrics(config)
    chosen = {group: str(option) for group, option in choices.items() if option and not group.startswith("hydra/")}
    if config.method and chosen["method"] in ("full", FROM_FILE):  # a named point sets its method itself
        chosen["method"] = config.method["_target_"].rpartition(".")[2].removesuffix("Config").lower()
    elif chosen["method"] == FROM_FILE:
        chosen["method"] = "full"
    # How far a rung of halving trains, and sections about the search, are not part of the identity.
    tree = {key: value for key, value in tree.items() if key not in SWEEP_SECTIONS}
    tree |= {"halving": {key: value for key, value in tree["halving"].items() if key not in ("rung", "test")}}
    chosen.pop("price", None)
    return _identified(Trial(config, tree, chosen, values.overrides, rows, "", "", "", experiment=values.experiment))


def with_seed(one: Trial, seed: int, overrides: list[str]) -> Trial:
    """A checked trial with another seed, if no other value depends on the seed.

    Raises:
        InputError: the seed is out of its range.
    """
    limits.check({"seed": seed}, {})
    config = dataclasses.replace(one.config, seed=seed)
    return _identified(dataclasses.replace(one, config=config, tree=one.tree | {"seed": seed}, overrides=overrides))


def _identified(one: Trial) -> Trial:
    identity, first = identity_of(one.config, one.rows), identity_of(one.config, one.rows, rule=1)
    return dataclasses.replace(
        one,
        identity=identity.trial,
        training=identity.training,
        slug=_slug(one.choices, one.config),
        earlier=first if first.trial != identity.trial else None,
    )


def with_pruning(one: Trial, sweeper: Mapping[str, Any]) -> Trial:
    """The trial with the pruning that ``sweeper``, the keys of ``hydra.sweeper``, sets, if it is part of a search.

    Raises:
        InputError: the trial has no validations, at which the pruner decides.
    """
    config, own = one.config, one.config.search
    found = pruning.trial_pruning(sweeper, config.study, own.study, own.trial, config.train.best_metric)
    if found is not None and config.train.eval_every is None:
        raise InputError("hydra.sweeper.pruner: needs train.eval_every, as it decides at the trial's validations")
    return dataclasses.replace(one, pruning=found)


def without_rows(trial: Trial) -> Trial:
    """The trial without its rows, for another process, which reads them itself."""
    return dataclasses.replace(trial, rows=None, offline=hub.is_offline())


def with_rows(trial: Trial) -> Trial:
    """The trial of ``without_rows`` with its rows, read again.

    Raises:
        InputError: the files have changed since the trial was checked.
    """
    config = trial.config
    if trial.offline:
        hub.go_offline()
    rows = _rows(config)
    if identity_of(config, rows).training != trial.training:
        raise InputError("dataset: the files have changed since the sweep began")
    return dataclasses.replace(trial, rows=rows)


def _source(cfg: DictConfig) -> str | None:
    """The key and path of the record, adapter or experiment to read; None if there is none."""
    paths = {"repeat": cfg.repeat, "adapter.path": cfg.adapter.path, "method.path": cfg.method.get("path")}
    paths["train.params_file"] = cfg.train.params_file
    return next((f"{key}={path}" for key, path in paths.items() if path is not None), None)


def _rows(config: Config) -> data_rows.Rows | None:
    """The rows of a local dataset, read once for all points of a sweep; None for one of the hub."""
    own = config.dataset
    if own.hub and not own.path:
        return None
    paths = [path for path in (own.path, own.test_path, own.validation.path) if path is not None]
    contents = tuple(fingerprint.file_hash(file) for path in paths for file in files.matching(path))
    return _cached_rows(pickle.dumps(config.dataset), config.train.eval_every is not None, contents)


def _test_rows(config: Config) -> data_rows.Rows | None:
    """The rows of ``dataset.test_path`` beside training rows of the hub; None without that key."""
    own = config.dataset
    if own.test_path is None:
        return None
    return data_rows.Rows([], test=data_rows.read_rows(own.test_path, "dataset.test_path", own.encoding))


@lru_cache(maxsize=4)
def _cached_rows(dataset: bytes, validation: bool, _contents: tuple[str, ...]) -> data_rows.Rows:
    return data_rows.load_rows(pickle.loads(dataset), validation=validation)


def _slug(choices: Mapping[str, str], config: Config) -> str:
    rank = f"r{config.method['r']}" if "r" in config.method else ""
    targets = choices["targets"] if choices["targets"] != "default" else ""
    compiled = config.train.compile if config.train.compile != "none" else ""
    parts = [choices["model"], choices["method"], rank, targets, choices["quant"], choices["dataset"], compiled]
    if config.label and any(group.startswith("point") for group in choices):
        parts = [choices["model"], config.label, choices["quant"], choices["dataset"]]
    name = "-".join([*filter(None, parts), f"s{config.seed}"])
    return re.sub(r"[^\w.-]+", "_", name)[:120]
