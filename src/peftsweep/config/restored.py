"""The configuration of a saved adapter: that of the trial that trained it, or that of its adapter_config.json.

A key on the command line takes precedence over the record, and a group named there replaces the group of the record.
Keys that contradict the saved weights are refused.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pydoc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftsweep.config import experiment, experiment_keys
from peftsweep.data import files, fingerprint
from peftsweep.errors import InputError, say_once
from peftsweep.schema import ModelConfig, value_at
from peftsweep.study.reading import fault, read_json
from peftsweep.study.record import RESULT, Result
from peftsweep.study.trust import as_text

# Sections of the configuration that come from a trial's record, with the groups that stand in their place.
SECTIONS = {
    **{name: (name,) for name in ("seed", "model", "method", "targets", "quant", "train", "inference", "dataset")},
    "method_inputs": ("method",),
    "eval": ("eval", "dataset"),  # a dataset chooses its own evaluations
}
WEIGHTS_SECTIONS = ("method", "method_inputs", "targets")  # sections that are fixed by the saved weights
BASE = "model.name_or_path"
RECORD_FIELDS = {
    "model": {"name_or_path": str},
    "dataset": {"classes": [str]},
    "eval": {"*": dict},
    "seed": int,
}  # types of fields that are read from a record
# Keys of a model that say how it computes, not which one it is.
COMPUTE_KEYS = ("dtype", "attn_implementation", "device_map")
FROM_FILE = "from/adapter_config"  # the option of method that reads adapter_config.json

Identify = Callable[[ModelConfig], Mapping[str, Any]]  # see identity.model_identity
Choices = Mapping[str, str | None]  # the option of each group
GivenKeys = set[str]  # the keys on the command line


def put(cfg: DictConfig, section: str, value: Any) -> None:
    """Replace a section of the configuration by that of a record, which another version may have written."""
    value = as_text(value)
    if not (isinstance(value, dict) and OmegaConf.get_type(cfg, section) is not dict):
        OmegaConf.update(cfg, section, value, merge=False)
        return
    for name, part in value.items():
        if name in cfg[section]:  # skip keys that this version no longer has
            typed = isinstance(part, dict) and OmegaConf.get_type(cfg[section], name) is not dict
            OmegaConf.update(cfg, f"{section}.{name}", part, merge=typed)


def own_values(cfg: DictConfig, given: GivenKeys) -> dict[str, Any]:
    """The values of the dotted keys that the command line gives."""
    found = {key: OmegaConf.select(cfg, key) for key in given if "." in key and not key.startswith("hydra.")}
    return {key: copy.deepcopy(value) for key, value in found.items()}  # lists and dicts are filled in place


def put_back(cfg: DictConfig, own: Mapping[str, Any]) -> None:
    """Set the keys of the command line to their values again."""
    for key, value in own.items():
        OmegaConf.update(cfg, key, value, merge=False)


# ---- of a trial ------------------------------------------------------------------------------------


def from_trial(cfg: DictConfig, given: GivenKeys, choices: Choices, held: Result, identify: Identify) -> dict[str, str]:
    """Set ``cfg`` from the record ``held``; returns the options that it chooses, by group.

    Raises:
        InputError: the command line contradicts the saved weights, or names an evaluation that the trial lacks.
    """
    path, own = cfg.adapter.path, own_values(cfg, given)
    check_record(f"adapter.path={path}", held)
    _check_method_of_trial(cfg, given, choices, held)
    kept = [section for section, groups in SECTIONS.items() if not given.intersection(groups)]
    kept += [section for section in WEIGHTS_SECTIONS if section not in kept]  # the command line can only repeat them
    for section in kept:
        if section in held.config:
            put(cfg, section, located(section, held))
    put_back(cfg, {key: value for key, value in own.items() if key.partition(".")[0] not in WEIGHTS_SECTIONS})
    _check_base_of_trial(cfg, path, held, identify)
    _check_head(cfg, path, held)
    if "dataset.test_path" in given and "dataset.leave_out_tested" not in given:
        cfg.dataset.leave_out_tested = False  # nothing is trained, so the test rows may be training rows
    unknown = [name for name, node in cfg.eval.items() if "_target_" not in node]
    if unknown:
        raise InputError(f"eval.{unknown[0]}: the trial of adapter.path={path} has {', '.join(held.config['eval'])}")
    return {group: held.choices[group] for group in (*kept, *WEIGHTS_SECTIONS) if group in held.choices}


def _check_method_of_trial(cfg: DictConfig, given: GivenKeys, choices: Choices, held: Result) -> None:
    for group in given.intersection(WEIGHTS_SECTIONS):
        option, trained = choices.get(group), held.choices.get(group)
        if option != trained and _plain(cfg, group) != held.config.get(group):
            raise _contradicts(cfg, f"{group}={option}", f"{group}={trained}")
    for key, value in own_values(cfg, given).items():
        trained = _at(held.config, key)
        if key.partition(".")[0] in WEIGHTS_SECTIONS and _plain(cfg, key) != trained:
            raise _contradicts(cfg, f"{key}={value}", f"{key}={trained}")


def _contradicts(cfg: DictConfig, given: str, trained: str) -> InputError:
    return InputError(f"{given}: contradicts adapter.path={cfg.adapter.path}, which was trained with {trained}")


def _check_base_of_trial(cfg: DictConfig, path: str, held: Result, identify: Identify) -> None:
    recorded = held.config["model"]
    how = {key: recorded[key] for key in COMPUTE_KEYS if key in recorded}
    given, trained = _model(cfg, how), _model(cfg, dict(located("model", held)))
    if given == trained:
        _say_if_changed(given, path, held, identify)
        return
    if fingerprint.of_values(identify(given)) == held.meta_info.get("model_sha"):
        return
    if not _same(given, trained, identify):
        given_key = next(
            (key for key in ("task", "init", "name_or_path") if _at(cfg.model, key) != recorded.get(key)), ""
        )
        key = f"model.{given_key or 'name_or_path'}"
        raise _contradicts(cfg, f"{key}={_plain(cfg, key)}", f"another base, {recorded['name_or_path']}")


def _say_if_changed(base: ModelConfig, path: str, held: Result, identify: Identify) -> None:
    """A warning if the files in the folder of the base are others than those that the trial was trained on."""
    if held.run_info.get("identity_rule", 1) == 1:  # the hashes of the first rule have another form
        return
    try:
        now = identify(base)
    except InputError:  # it is not there any more, which its loading says
        return
    if "files" in now and fingerprint.of_values(now) != held.meta_info.get("model_sha"):
        say_once(
            f"model.name_or_path={base.name_or_path}: its files have changed since the trial of adapter.path={path} "
            "was trained on them"
        )


def _same(given: ModelConfig, trained: ModelConfig, identify: Identify) -> bool:
    """Whether two models are the same base, apart from dtype and attention."""
    try:
        sides = [identify(one) for one in (given, trained)]
    except InputError:  # one no longer exists
        return False
    return sides[0] == sides[1]


def _model(cfg: DictConfig, changed: Mapping[str, Any]) -> ModelConfig:
    made = OmegaConf.merge(OmegaConf.structured(ModelConfig), cfg.model)
    known = {key: value for key, value in changed.items() if key in made}
    for key, value in known.items():
        OmegaConf.update(made, key, value, merge=False)
    return cast(ModelConfig, OmegaConf.to_object(made))


def _check_head(cfg: DictConfig, path: str, held: Result) -> None:
    """Refuse another number of classes than the saved head has."""
    trained = held.config["dataset"]["classes"]
    if not cfg.dataset.classes:
        cfg.dataset.classes = as_text(trained)
    if _plain(cfg, "model.task") == "seq_cls" and len(cfg.dataset.classes) != len(trained):
        classes = ", ".join(cfg.dataset.classes)
        raise InputError(
            f"dataset.classes=[{classes}]: the head of adapter.path={path} has {len(trained)} classes, "
            f"{', '.join(trained)}"
        )


def check_record(word: str, held: Result) -> None:
    """Check the fields of a record that are read here; ``word`` of the command line named it.

    Raises:
        InputError: one of them is of another type.
    """
    if wrong := fault(held.config, RECORD_FIELDS, "config"):
        raise InputError(f"{word}: {(held.folder or Path()) / RESULT}: {wrong}")


def located(section: str, held: Result) -> Any:
    """A section of the record. A relative path that does not exist here is looked up beside the record's study."""
    value = held.config[section]
    above = (held.folder or Path()).resolve().parents
    root = above[min(2, len(above) - 1)]  # of multirun/<study>/<trial>

    def moved(path: Any) -> Any:
        given = Path(str(path)).expanduser()
        return str(root / given) if isinstance(path, str) and not is_there(given) and is_there(root / given) else path

    def is_there(path: Path) -> bool:
        return path.exists() or bool(files.matching(path))

    if section == "model":
        return value | {"name_or_path": moved(value["name_or_path"])}
    if section == "dataset":
        inner = value.get("validation") or {}
        inner = inner | ({"path": moved(inner["path"])} if inner.get("path") else {})
        own = {key: moved(value.get(key)) for key in ("path", "test_path") if value.get(key)}
        return value | own | ({"validation": inner} if inner else {})
    if section == "eval":
        return {
            name: node | ({"path": moved(node["path"])} if node.get("path") else {}) for name, node in value.items()
        }
    return value


def _at(tree: Any, key: str) -> Any:
    """The value of a dotted key; of an Enum's member its name."""
    found = value_at(tree, key)
    return getattr(found, "name", found)


def _plain(cfg: DictConfig, key: str) -> Any:
    try:
        value = OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # an interpolation that resolves only with other keys
        return None
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    return getattr(value, "name", value)


# ---- of an adapter from elsewhere ------------------------------------------------------------------


def from_elsewhere(
    cfg: DictConfig, given: GivenKeys, choices: Choices, folder: Path, identify: Identify
) -> tuple[dict[str, str], str | None]:
    """Set in ``cfg`` the method of an adapter's adapter_config.json.

    Returns the options that it chooses, by group, and the base that the file names if the command line names none.

    Raises:
        InputError: the file cannot be read, or the command line contradicts it.
    """
    if not (folder / experiment.ADAPTER_FILE).is_file():
        raise InputError(
            f"adapter.path={cfg.adapter.path}: holds a whole model and no adapter; use model.name_or_path="
            f"{cfg.adapter.path} train=none"
        )
    try:
        read = experiment.adapter(str(folder)).keys
    except InputError as error:
        raise InputError(str(error).replace("method.path=", "adapter.path=", 1)) from None
    method, base = read["method"], read.get(experiment_keys.MODEL)
    if method["_target_"].endswith(".AdaLoraConfig"):
        method.pop("rank_pattern", None)  # the ranks that its training left, which PEFT reads with the weights
    _check_method(cfg, given, choices, method)
    _check_targets(cfg, given, method.get("target_modules"))
    cfg.method, made = as_text(method), {"method": FROM_FILE}
    _check_task(cfg, folder)
    if base is None:
        return made, None
    if ("model" in given and not OmegaConf.is_missing(cfg.model, "name_or_path")) or BASE in given:
        _check_base(cfg, str(base), read.get("model.revision"), identify)
        return made, None
    cfg.model.revision = as_text(read.get("model.revision"))
    return made, str(base)


def _check_method(cfg: DictConfig, given_keys: GivenKeys, choices: Choices, method: Mapping[str, Any]) -> None:
    """Refuse another method. Of a group on the command line, only the keys that identify a method are compared."""
    option = choices.get("method")
    if "method" in given_keys and option != FROM_FILE:
        given = _plain(cfg, "method") or {}
        kind = {key: value for key, value in given.items() if key == "_target_" or isinstance(value, bool)}
        if not given or any(_value(method, key) != value for key, value in kind.items()):
            raise _contradicts(cfg, f"method={option}", _method_in_words(method))
    for key in given_keys:
        section, _, name = key.partition(".")
        if section == "method" and name and name != "path" and _plain(cfg, key) != _value(method, name):
            raise _contradicts(cfg, f"{key}={_plain(cfg, key)}", f"{key}={_value(method, name)}")


def _value(method: Mapping[str, Any], name: str) -> Any:
    """The value of an option of a method; if it is not set, the default of its class."""
    if name in method:
        return method[name]
    found: Any = pydoc.locate(method["_target_"])
    parameter = inspect.signature(found).parameters.get(name)
    return None if parameter is None or isinstance(parameter.default, type(dataclasses.MISSING)) else parameter.default


def _method_in_words(method: Mapping[str, Any]) -> str:
    on = [key for key, value in method.items() if value is True]
    return ", ".join([str(method["_target_"]), *(f"{key}=true" for key in on)])


def _check_targets(cfg: DictConfig, given: GivenKeys, saved: Any) -> None:
    """Refuse targets that are not the modules of the saved adapter."""
    key = next((key for key in sorted(given) if key.partition(".")[0] == "targets"), None)
    if key is None:
        return
    role_names = [cfg.model.roles.get(role) or [] for role in cfg.targets.roles or []]
    role_names += [[name] for name in cfg.targets.modules or []]
    names = {name for role in role_names for name in role}
    modules = set(saved or ()) if not isinstance(saved, str) else set()
    if modules and modules <= names and all(modules.intersection(role) for role in role_names):
        return
    shown = ", ".join(sorted(modules)) or saved
    raise _contradicts(cfg, f"{key}={_plain(cfg, key)}", f"target_modules {shown}")


def _check_task(cfg: DictConfig, folder: Path) -> None:
    """Refuse a classifier's adapter on a language model, and the reverse."""
    task = read_json(folder / experiment.ADAPTER_FILE).get("task_type")
    classifies = _plain(cfg, "model.task") == "seq_cls"
    what = {"SEQ_CLS": "classifier", "CAUSAL_LM": "language model"}.get(task)
    if what is not None and (task == "SEQ_CLS") != classifies:
        instead = "model=causal_lm" if classifies else "model=encoder and dataset.classes"
        raise InputError(f"adapter.path={cfg.adapter.path}: is of a {what} (task_type {task}); take {instead}")


def _check_base(cfg: DictConfig, base: str, revision: str | None, identify: Identify) -> None:
    """Refuse another base. A local model may be a copy of one on the hub; two hub names or two folders are compared."""
    given, named = str(cfg.model.name_or_path), Path(base).expanduser()
    if given == base:
        return
    other = _model(cfg, {"name_or_path": base, "revision": revision})
    is_local, was_local = Path(given).expanduser().is_dir(), named.is_dir()
    if was_local and _same(_model(cfg, {}), other, identify):
        return
    gone = named.is_absolute() and not was_local  # a folder on another machine
    if was_local or not (is_local or gone or given == "tiny"):
        raise _contradicts(cfg, f"{BASE}={given}", f"another base, {base}")
