"""The identity of a trial: a hash of everything that changes its numbers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pydoc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftsweep import former_names
from peftsweep.config.evaluations import rows_config, sets_aside
from peftsweep.data import files, fingerprint
from peftsweep.data import rows as data_rows
from peftsweep.data.conversations import reader as conversations
from peftsweep.schema import Config, DatasetConfig, Init, ModelConfig, OnMissing
from peftsweep.study import store

if TYPE_CHECKING:
    from peftsweep.config.compose import Trial

CONVERSATIONS = "peftsweep.data.tasks.messages"  # the first reader of datasets that hold them
IDENTITY_LENGTH = 10  # hex digits: a study of 10,000 trials has a clash once in 20,000 studies
# The version of the rule, which a record keeps; trials are also recognised by earlier versions. Versions 3 to 11 have
# the hashes of version 2: they mark records whose numbers a fault has changed since then, see trial/faults/.
IDENTITY_RULE = 11
# Classes that conf/ names, and the longer names that identities of the first rule have for them.
NAMES_OF_RULE_1 = {f"peft.{name}": f"peft.tuners.lora.config.{name}" for name in ("KasaConfig", "BdLoraConfig")}
CALLS = ("method", "method_setup", "quant")  # sections with a _target_
# Options of methods and evaluations that name files.
FILE_OPTIONS = ("adapters", "include_path", "cache_file", "covariance_file")
# The keys that existed when the first rule was made.
FIRST_TRAIN_KEYS = (
    *("learning_rate", "learning_rate_scale", "steps", "epochs", "batch_size", "accumulation", "schedule", "warmup"),
    *("weight_decay", "clip", "optimizer", "optimizer_kwargs", "autocast", "autocast_adapter_dtype", "checkpointing"),
    *("compile", "compile_dynamic", "pad_to_multiple_of", "eval_every", "keep_best", "best_metric", "params_file"),
    "log_every",
)
FIRST_TARGETS_KEYS = ("roles", "modules", "all_linear", "otherwise")
# Keys of a configuration that change a forecast; the model counts by its content, not by its keys.
FORECAST_KEYS = ("device", "adapter", "method", "method_inputs", "method_setup", "targets", "quant", "eval", "train")
RATES = ("learning_rate", "learning_rate_scale", "schedule", "warmup", "weight_decay", "clip")  # do not change memory
SHAPING = ("optimizer", "optimizer_kwargs", "autocast_adapter_dtype")  # keys of train that change trained parameters
# Keys of the dataset that choose rows. Of local rows the content is hashed in their place.
CHOOSES_ROWS = (
    *("name", "path", "test_path", "hub", "hub_config", "revision", "hub_split", "hub_test_split", "generator"),
    *("train_fraction", "split_seed", "max_characters", "deduplicate", "samples", "validation_samples"),
    *("encoding", "leave_out_tested", "validation", "fraction"),
)
FIRST_DATASET_KEYS = (*CHOOSES_ROWS[:-4], "reader", "prompt", "answer", "classes", "max_length", "drop_long", "chat")
NEW_EVAL_OPTIONS = ("stop", "beside")  # options of evaluations that later versions added: empty, they change nothing
CHANGES_NO_SCORE = ("headline", "role")  # options of evaluations that only choose how scores are reported


@dataclass(frozen=True)
class Identity:
    """The hashes of a trial and of its training alone, by one version of the rule."""

    rule: int
    trial: str
    training: str


def identity_of(config: Config, rows: data_rows.Rows | None, rule: int = IDENTITY_RULE) -> Identity:
    """The identity of a trial by the version ``rule`` of the rule."""
    training = _training(config, rows, rule)
    return Identity(rule, content_hash([training, _evaluating(config, rows, rule)]), content_hash(training))


def _training(config: Config, rows: data_rows.Rows | None, rule: int) -> dict[str, Any]:
    """Everything that changes the trained weights."""
    train = _section_identity(config.train, FIRST_TRAIN_KEYS)
    # These change no weight: a stopped trial can be resumed, and captured steps differ by rounding only.
    for key in ("checkpoint_every", "patience", "capture"):
        train.pop(key, None)
    train["learning_rate"] *= train.pop("learning_rate_scale")  # only their product matters
    if config.train.epochs is not None:
        train.pop("steps")
    targets = _section_identity(config.targets, FIRST_TARGETS_KEYS)
    if config.targets.roles is not None:
        targets["roles"] = {role: config.model.roles.get(role) for role in sorted(config.targets.roles)}
    settings: dict[str, Any] = {
        "model": model_identity(config.model, rule),
        "method": config.method,
        "method_inputs": config.method_inputs,
        "method_setup": config.method_setup,
        "adapter": _adapter_files(config.adapter.path, rule),
        "targets": targets,
        "quant": config.quant,
        "dataset": _dataset_identity(config.dataset, rows, rule),
        "train": train,
        "seed": config.seed,
    }
    if rule > 1 and config.train.keep_best and (judge := config.train.best_metric.partition(".")[0]) in config.eval:
        own = sets_aside(config, judge)
        validation_samples = config.dataset.validation_samples if own else None
        settings["best_by"] = [evaluation_identity(config.eval[judge]), validation_samples]
    name = config.train.optimizer
    train["optimizer"] = canonical_name(name if rule == 1 or "." in name else f"torch.optim.{name}", rule)
    return {key: _canonical(value, rule) if key in CALLS else value for key, value in settings.items()}


def _section_identity(section: Any, first: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a section. A key that is not among ``first`` counts only if its value is not the default.

    So a key that a later version adds does not change the identities of other trials.
    """
    blank = {field.name: field for field in dataclasses.fields(section)}
    return {
        key: value
        for key, value in dataclasses.asdict(section).items()
        if key in first or value != _default(blank[key])
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else made


def _evaluating(config: Config, rows: data_rows.Rows | None, rule: int) -> dict[str, Any]:
    """Everything beside the training that changes the scores."""
    prompts = config.inference.get("prompts_file")
    settings = {
        "test": rows.fingerprints["test"] if rows is not None else None,
        "eval": {name: evaluation_identity(node, rule) for name, node in config.eval.items()},
        "inference": _canonical(config.inference, rule)
        | {"prompts_file": None if prompts is None else _file_hash(Path(prompts).expanduser(), rule)},
    }
    if any(sets_aside(config, name) for name in config.eval):
        settings["set_aside"] = [config.dataset.validation_samples, config.dataset.split_seed]
    return settings


def evaluation_identity(node: Mapping[str, Any], rule: int = IDENTITY_RULE) -> dict[str, Any]:
    """An ``eval`` entry, with the content of its file, if it has one, in place of the file's name."""
    source = rows_config(node)
    options: dict[str, Any] = _canonical(node, rule)
    options = {key: value for key, value in options.items() if not _changes_nothing(key, value)}
    if source.path is None:
        return options
    return options | {"path": data_rows.fingerprint(data_rows.read_rows(source.path, encoding=source.encoding))}


def _changes_nothing(option: str, value: Any) -> bool:
    return option in CHANGES_NO_SCORE or (option in NEW_EVAL_OPTIONS and not value)


def _dataset_identity(dataset: DatasetConfig, rows: data_rows.Rows | None, rule: int = IDENTITY_RULE) -> dict[str, Any]:
    settings = _section_identity(dataset, FIRST_DATASET_KEYS)
    if rule > 1 and _is_chat(dataset.chat, dataset.reader):
        settings["turns"] = dataset.turns
    if rows is None:
        paths = {"test_path": dataset.test_path, "validation": dataset.validation.path}
        local = {key: _hash_of_files(path) for key, path in paths.items() if path and rule > 1}
        return settings | ({"files": local} if local else {})
    how = {key: value for key, value in settings.items() if key not in CHOOSES_ROWS}
    if dataset.missing is not OnMissing.empty:  # other values choose rows, whose content is hashed
        how.pop("missing", None)
    if dataset.reader in conversations.READERS:
        version = max(map(conversations.version, rows.train), default=1)
        how |= {"conversations": version} if version > 1 else {}
    return how | {part: rows.fingerprints[part] for part in ("train", "validation")}


def model_identity(model: ModelConfig, rule: int = IDENTITY_RULE) -> dict[str, Any]:
    """The settings that identify the base: the content of a local folder, or id and revision on the hub."""
    from peftsweep.models.model import source  # imports torch, which `--help` must not

    settings = {key: getattr(model, key) for key in ("task", "init", "dtype", "attn_implementation", "device_map")}
    if model.init is Init.random:
        return settings | {"architecture": model.architecture}
    folder = Path(source(model))
    if not folder.is_dir():
        return settings | {"hub": model.name_or_path, "revision": model.revision}
    if rule > 1:
        return settings | {"files": fingerprint.folder_hashes(folder)}
    inside = sorted(file for file in folder.iterdir() if file.is_file())
    return settings | {"files": {file.name: _file_hash(file, rule) for file in inside}}


def _is_chat(chat: bool | None, reader: str | None) -> bool:
    return bool(chat) or reader in conversations.READERS


def _adapter_files(path: str | None, rule: int) -> dict[str, str] | None:
    """The hashes of a saved adapter's files and of the base saved beside it, independent of their place."""
    if path is None:
        return None
    folder = store.adapter(path)
    if rule == 1:
        return {file.name: _file_hash(file, rule) for file in sorted(folder.glob("*.safetensors"))}
    kept = folder / store.RESIDUAL
    beside = fingerprint.folder_hashes(kept) if kept.is_dir() else {}
    return fingerprint.folder_hashes(folder) | {f"{store.RESIDUAL}/{name}": found for name, found in beside.items()}


def _hash_of_files(path: str) -> str | list[str]:
    """The hash of a file; of several that ``path`` matches, theirs."""
    hashes = [fingerprint.file_hash(file) for file in files.matching(path)]
    return hashes[0] if len(hashes) == 1 else hashes


def _file_hash(file: Path, rule: int) -> str:
    """A file's hash; by the first rule, for files above 32 MB, the hash of the size and of both ends."""
    size, edge = file.stat().st_size, 16 * 2**20
    if rule > 1 or size <= 2 * edge:
        return fingerprint.file_hash(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(edge))
        stream.seek(size - edge)
        digest.update(stream.read())
    return digest.hexdigest()


def _canonical(node: Any, rule: int) -> Any:
    """Plain values with the canonical name of every ``_target_``, and hashes of the files that options name."""
    if isinstance(node, list | tuple):
        return [_canonical(value, rule) for value in node]
    if not isinstance(node, Mapping):
        return node
    found = {key: _canonical(value, rule) for key, value in node.items()}
    if isinstance(target := node.get("_target_"), str):
        found["_target_"] = canonical_name(target, rule)
    if rule > 1:
        found |= {key: _by_content(value) for key, value in node.items() if key in FILE_OPTIONS}
    return found


def _by_content(value: Any) -> Any:
    """The hash of a path's content, or of several paths; a value that is not a local path stays as it is."""
    if isinstance(value, Mapping):
        return {key: _by_content(one) for key, one in value.items()}
    if not isinstance(value, str) or not (place := Path(value).expanduser()).exists():
        return value
    return fingerprint.folder_hashes(place) if place.is_dir() else fingerprint.file_hash(place)


def canonical_name(target: str, rule: int = IDENTITY_RULE) -> str:
    """The canonical name of a class or function in an identity, for any of its names.

    It is the shortest dotted name under which it can be imported; if the class has moved, its first name.
    """
    before = {now: before for before, now in former_names.MODULES.items()}  # an identity keeps the former name
    return _renamed(target, before) if rule == 1 else _renamed(_shortest(target), before | NAMES_OF_RULE_1)


@functools.cache
def _shortest(target: str) -> str:
    *packages, name = target.split(".")
    found = pydoc.locate(target)
    for end in range(1, len(packages) + 1):
        if found is not None and getattr(pydoc.locate(".".join(packages[:end])), name, None) is found:
            return ".".join([*packages[:end], name])
    return target


def current_name(target: str) -> str:
    """The present name of a class or function, by any of its names."""
    return _renamed(target, former_names.MODULES)


def _renamed(target: str, names: Mapping[str, str]) -> str:
    for before, after in names.items():
        if target == before or target.startswith(f"{before}."):
            return after + target.removeprefix(before)
    return target


def content_hash(content: Any) -> str:
    """A short hash of plain values and enums."""
    return fingerprint.of_values(content)[:IDENTITY_LENGTH]


# ---- the keys of the caches of forecasts ---------------------------------------------------------------


def model_key(trial: Trial) -> list[Any]:
    """The part of a forecast's cache key for the model: its files, its roles, the classes of its head."""
    model = trial.config.model
    return [model_identity(model), model.roles, trial.config.dataset.classes]


def forecast_keys(trial: Trial) -> dict[str, Any]:
    """The values of the configuration that change a forecast, without the model."""
    train = {key: value for key, value in trial.tree["train"].items() if key not in RATES}
    return {key: trial.tree[key] for key in FORECAST_KEYS} | {"train": train}


def sizes_key(trial: Trial) -> str:
    """The cache key of a trial's sizes: all that changes which parameters are trained, on a base without quantisation.

    Training steps count only for a method that plans its ranks over them, such as AdaLoRA. Of a point, the words that
    name keys of its method decide which of these keys count.
    """
    tree = trial.tree
    settings = {key: tree[key] for key in ("adapter", "method", "method_inputs", "method_setup", "targets")}
    train = {key: tree["train"][key] for key in SHAPING}
    if hasattr(pydoc.locate(str(trial.config.method.get("_target_"))), "total_step"):
        train["steps"] = trial.config.train.steps
    of_point = any(group.startswith("point") for group in trial.choices)
    words = [word for word in trial.overrides if of_point and word.lstrip("+").startswith("method.")]
    return content_hash([*model_key(trial), settings, train, of_point, words])
