"""The identity of a trial: a hash of everything that changes its numbers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pydoc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsweep import former_names
from peftsweep.config.evaluations import rows_config, sets_aside
from peftsweep.data import fingerprint
from peftsweep.data import rows as data_rows
from peftsweep.data.conversations import reader as conversations
from peftsweep.schema import Config, DatasetConfig, Init, ModelConfig, OnMissing
from peftsweep.study import store

CONVERSATIONS = "peftsweep.data.tasks.messages"  # the first reader of datasets that hold them
IDENTITY_LENGTH = 10  # hex digits: a study of 10,000 trials has a clash once in 20,000 studies
# Its version, which a record keeps; a study's trials are recognised by earlier ones too. The third to the sixth
# have the hashes of the second: they tell records whose numbers a fault has changed since, see trial/mended.py.
IDENTITY_RULE = 6
# Former names of modules, classes and functions, and their names now. In an identity they keep the former ones.
FORMER_NAMES = former_names.MODULES
# Names that are not the shortest, under which identities of the first rule have what conf/ names.
NAMES_OF_RULE_1 = {f"peft.{name}": f"peft.tuners.lora.config.{name}" for name in ("KasaConfig", "BdLoraConfig")}
CALLS = ("method", "method_setup", "quant")  # sections of an identity that name what is called
FILE_OPTIONS = ("adapters", "include_path", "cache_file", "covariance_file")  # of methods and evaluations
# Keys that were there when the first rule was made.
FIRST_TRAIN_KEYS = (
    *("learning_rate", "learning_rate_scale", "steps", "epochs", "batch_size", "accumulation", "schedule", "warmup"),
    *("weight_decay", "clip", "optimizer", "optimizer_kwargs", "autocast", "autocast_adapter_dtype", "checkpointing"),
    *("compile", "compile_dynamic", "pad_to_multiple_of", "eval_every", "keep_best", "best_metric", "params_file"),
    "log_every",
)
FIRST_TARGETS_KEYS = ("roles", "modules", "all_linear", "otherwise")
# Of the dataset's, what chooses rows, whose content is hashed where they are local, and what is made of them.
CHOOSES_ROWS = (
    *("name", "path", "test_path", "hub", "hub_config", "revision", "hub_split", "hub_test_split", "generator"),
    *("train_fraction", "split_seed", "max_characters", "deduplicate", "samples", "validation_samples"),
    *("encoding", "leave_out_tested", "validation", "fraction"),
)
FIRST_DATASET_KEYS = (*CHOOSES_ROWS[:-4], "reader", "prompt", "answer", "classes", "max_length", "drop_long", "chat")
NEW_EVAL_OPTIONS = ("stop", "beside")  # of evaluations, brought by later versions: empty, they change nothing
CHANGES_NO_SCORE = ("headline", "role")  # of their options: what trials are compared by, what they are for


@dataclass(frozen=True)
class Identity:
    """The hash of a trial and of its training alone, by one version of the rule."""

    rule: int
    trial: str
    training: str


def identity_of(config: Config, rows: data_rows.Rows | None, rule: int = IDENTITY_RULE) -> Identity:
    """The identity of a trial under one numbered rule of what belongs to it."""
    training = _training(config, rows, rule)
    return Identity(rule, content_hash([training, _evaluating(config, rows, rule)]), content_hash(training))


def _training(config: Config, rows: data_rows.Rows | None, rule: int) -> dict[str, Any]:
    """Everything that changes the trained weights."""
    train = _section_identity(config.train, FIRST_TRAIN_KEYS)
    # Which change no weight: one that was stopped can go on; what is captured is the same but for rounding.
    for key in ("checkpoint_every", "patience", "capture"):
        train.pop(key, None)
    train["learning_rate"] *= train.pop("learning_rate_scale")  # only their product matters
    if config.train.epochs is not None:
        train.pop("steps")
    targets = _section_identity(config.targets, FIRST_TARGETS_KEYS)
    if config.targets.roles is not None:
        targets["roles"] = {role: config.model.roles.get(role) for role in sorted(config.targets.roles)}
    said: dict[str, Any] = {
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
        said["best_by"] = [evaluation_identity(config.eval[judge]), config.dataset.validation_samples if own else None]
    name = config.train.optimizer
    train["optimizer"] = canonical_name(name if rule == 1 or "." in name else f"torch.optim.{name}", rule)
    return {key: _canonical(value, rule) if key in CALLS else value for key, value in said.items()}


def _section_identity(section: Any, first: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a section. A key that is not among ``first`` counts only if its value is not the default.

    A key that a later version adds thus does not change the identities of other trials.
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
    said = {
        "test": rows.fingerprints["test"] if rows is not None else None,
        "eval": {name: evaluation_identity(node, rule) for name, node in config.eval.items()},
        "inference": _canonical(config.inference, rule)
        | {"prompts_file": None if prompts is None else _file_hash(Path(prompts).expanduser(), rule)},
    }
    if any(sets_aside(config, name) for name in config.eval):
        said["set_aside"] = [config.dataset.validation_samples, config.dataset.split_seed]
    return said


def evaluation_identity(node: Mapping[str, Any], rule: int = IDENTITY_RULE) -> dict[str, Any]:
    """An ``eval`` entry with its file, if it has one, by content instead of by name."""
    source = rows_config(node)
    said: dict[str, Any] = _canonical(node, rule)
    said = {key: value for key, value in said.items() if not _changes_nothing(key, value)}
    if source.path is None:
        return said
    return said | {"path": data_rows.fingerprint(data_rows.read_rows(source.path, encoding=source.encoding))}


def _changes_nothing(option: str, value: Any) -> bool:
    return option in CHANGES_NO_SCORE or (option in NEW_EVAL_OPTIONS and not value)


def _dataset_identity(dataset: DatasetConfig, rows: data_rows.Rows | None, rule: int = IDENTITY_RULE) -> dict[str, Any]:
    said = _section_identity(dataset, FIRST_DATASET_KEYS)
    if rule > 1 and _is_chat(dataset.chat, dataset.reader):
        said["turns"] = dataset.turns
    if rows is None:
        files = {"test_path": dataset.test_path, "validation": dataset.validation.path}
        local = {key: _file_hash(Path(path), rule) for key, path in files.items() if path and rule > 1}
        return said | ({"files": local} if local else {})
    how = {key: value for key, value in said.items() if key not in CHOOSES_ROWS}
    if dataset.missing is not OnMissing.empty:  # the others choose rows
        how.pop("missing", None)
    if dataset.reader in conversations.READERS:
        version = max(map(conversations.version, rows.train), default=1)
        how |= {"conversations": version} if version > 1 else {}
    return how | {part: rows.fingerprints[part] for part in ("train", "validation")}


def model_identity(model: ModelConfig, rule: int = IDENTITY_RULE) -> dict[str, Any]:
    """What identifies the base: the content of a local folder, or id and revision of a model of the hub."""
    from peftsweep.models.model import source  # imports torch, which `--help` must not

    said = {key: getattr(model, key) for key in ("task", "init", "dtype", "attn_implementation", "device_map")}
    if model.init is Init.random:
        return said | {"architecture": model.architecture}
    folder = Path(source(model))
    if not folder.is_dir():
        return said | {"hub": model.name_or_path, "revision": model.revision}
    if rule > 1:
        return said | {"files": fingerprint.folder_hashes(folder)}
    return said | {"files": {file.name: _file_hash(file, rule) for file in sorted(folder.iterdir()) if file.is_file()}}


def _is_chat(chat: bool | None, reader: str | None) -> bool:
    return bool(chat) or reader in conversations.READERS


def _adapter_files(path: str | None, rule: int) -> dict[str, str] | None:
    """A saved adapter by its content, wherever it lies, with the base that was kept beside it."""
    if path is None:
        return None
    folder = store.adapter(path)
    if rule == 1:
        return {file.name: _file_hash(file, rule) for file in sorted(folder.glob("*.safetensors"))}
    kept = folder / store.RESIDUAL
    beside = fingerprint.folder_hashes(kept) if kept.is_dir() else {}
    return fingerprint.folder_hashes(folder) | {f"{store.RESIDUAL}/{name}": found for name, found in beside.items()}


def _file_hash(file: Path, rule: int) -> str:
    """A file's hash; by the first rule that of its size and both ends, where it is larger than 32 MB."""
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
    """Plain values with every ``_target_`` under its one name, and files that options name by their content."""
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
    """The content of a path, or of several; a value that is no local file or folder stays as it is."""
    if isinstance(value, Mapping):
        return {key: _by_content(one) for key, one in value.items()}
    if not isinstance(value, str) or not (place := Path(value).expanduser()).exists():
        return value
    return fingerprint.folder_hashes(place) if place.is_dir() else fingerprint.file_hash(place)


def canonical_name(target: str, rule: int = IDENTITY_RULE) -> str:
    """The canonical name of a class or function in an identity, also where another of its names was given.

    That is the shortest dotted name under which it can be imported; of one that has moved, its first name.
    """
    before = {now: before for before, now in FORMER_NAMES.items()}
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
    return _renamed(target, FORMER_NAMES)


def _renamed(target: str, names: Mapping[str, str]) -> str:
    for before, after in names.items():
        if target == before or target.startswith(f"{before}."):
            return after + target.removeprefix(before)
    return target


def content_hash(content: Any) -> str:
    """A short hash of plain values and enums."""
    return fingerprint.of_values(content)[:IDENTITY_LENGTH]
