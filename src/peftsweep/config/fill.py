"""Fill a configuration from files: experiments, saved adapters and records of trials."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import string
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from peftsweep.config import experiment, experiment_keys, repeat, restored
from peftsweep.config.calls import GENERATION
from peftsweep.config.checks import FORMATS
from peftsweep.config.identity import current_name, model_identity
from peftsweep.errors import InputError, say_once
from peftsweep.models.quantised import libraries
from peftsweep.options import conf_dir as conf_dir
from peftsweep.schema import Config
from peftsweep.study import store
from peftsweep.study.trust import as_text

OPEN = (  # sections whose keys are the arguments of a class or function
    *("method", "method_setup", "quant", "eval", "inference", "profiler", "tracker"),
    *("model.architecture", "train.optimizer_kwargs", "dataset.validation.columns"),
)
# Keys of the section train that change nothing where nothing is trained.
TRAINING_KEYS = (
    *("steps", "epochs", "learning_rate", "learning_rate_scale", "batch_size", "accumulation", "schedule", "warmup"),
    *("weight_decay", "clip", "optimizer", "optimizer_kwargs", "checkpointing", "eval_every", "keep_best"),
    *("best_metric", "patience", "checkpoint_every"),
)
NAMES = ("name_or_path", "hub", "path", "revision")  # keys that name a model or dataset
TEMPLATE = re.compile(r"(dataset|eval\.\w+)\.(prompt|answer|stop)")  # keys of texts that may have several lines


@functools.cache
def register() -> None:
    """Register the schema with Hydra, once in a process, under a name of its own so that no group lists it.

    In the sections of ``OPEN`` a key needs no ``+``: they hold arguments of a class or function, and a yaml lists only
    some of them. ``compose.trial`` checks them.
    """
    node = OmegaConf.structured(Config)
    for key in OPEN:
        OmegaConf.set_struct(OmegaConf.select(node, key), False)
    ConfigStore.instance().store(name="peftsweep_schema", node=node)
    search = OmegaConf.create({"sampler": {}, "pruner": {}})
    for open_node in search.values():
        OmegaConf.set_struct(open_node, False)
    ConfigStore.instance().store(name="peftsweep_search", node=search)


@functools.cache
def _schema() -> DictConfig:
    return typing.cast(DictConfig, OmegaConf.structured(Config))


def use_current_names(cfg: DictConfig) -> None:
    """Replace former names of classes and functions, in every ``_target_``, by their present names."""
    nodes = [cfg]
    while nodes:
        node = nodes.pop()
        for key in [*node]:
            if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
                continue
            if isinstance(node[key], DictConfig):
                nodes.append(node[key])
            elif key in ("_target_", "optimizer") and isinstance(node[key], str):
                node[key] = current_name(node[key])


def fill_from_files(
    cfg: DictConfig, overrides: Iterable[str], choices: Mapping[str, str | None]
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Set keys from the files of a record, an adapter or an experiment; keys of the command line take precedence.

    Returns the choices that the files made, and for each field of an experiment whether it was used.
    """
    given_keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    made = _fill_from_record(cfg, given_keys) if cfg.repeat is not None else {}
    made |= _fill_from_adapter(cfg, given_keys, choices) if cfg.adapter.path is not None else {}
    folder, file = cfg.method.get("path"), cfg.train.params_file  # it may come from method.path too
    if folder is None and file is None:
        return made, repeat.original(cfg.repeat).run_info.get("experiment", {}) if cfg.repeat is not None else {}
    found = experiment.read(folder, file)
    cfg.train.params_file = None  # the same trial as with the same keys on the command line
    for key in given_keys - {"method", "quant", "inference"}:  # for whole groups see _fill_groups
        found.refuse(key, f"{experiment.OVERRIDDEN} {key}")
    if folder is not None:
        cfg.method = as_text(found.keys.pop("method")) | {
            key: value for key, value in cfg.method.items() if key != "path"
        }
        cfg.label = cfg.label or as_text(experiment.label(folder))
    made |= _fill_model(cfg, found, given_keys) | _fill_groups(cfg, found, given_keys)
    _fill_evaluations(cfg, found, given_keys)
    for key, value in found.keys.items():
        OmegaConf.update(cfg, key, as_text(value), merge=False)
    return made, found.facts()


def _fill_model(cfg: DictConfig, found: experiment.Reading, given: set[str]) -> dict[str, str]:
    """Use the model that an experiment names, by its preset if there is one, unless the command line names a model."""
    if "model" in given:
        found.refuse(experiment_keys.MODEL, f"{experiment.OVERRIDDEN} model")
    if experiment_keys.MODEL not in found.keys:
        found.refuse("model.revision", f"{experiment.OVERRIDDEN} model")
        return {}
    name = found.keys.pop(experiment_keys.MODEL)
    if not OmegaConf.is_missing(cfg.model, "name_or_path") and cfg.model.name_or_path == name:
        return {}
    choice = _put_model(cfg, name, given)
    if "train.learning_rate_scale" not in given:
        cfg.train.learning_rate_scale = 1.0  # the scale belonged to another model
    return {"model": choice}


def _put_model(cfg: DictConfig, name: str, given: set[str], option: str | None = None, **more: Any) -> str:
    """Replace the model by ``name``, with the keys ``more``; keys of the command line keep their values.

    The other keys are those of ``option``, as composed, else of the option that ``_model_node`` finds.
    """
    option, node = (option, cfg.model) if option else _model_node(name)
    own = restored.own_values(cfg, {key for key in given if key.startswith("model.")})
    cfg.model = OmegaConf.merge(_schema().model, node, {"name_or_path": as_text(name)} | more)
    restored.put_back(cfg, own)
    return option


def _model_node(name: str) -> tuple[str, DictConfig]:
    """The option of ``model`` with this hub id, and its keys; for an id without a preset, ``causal_lm``."""
    folder = Path(conf_dir()) / "model"

    def load(option: str) -> DictConfig:
        node = typing.cast(DictConfig, OmegaConf.load(folder / f"{option}.yaml"))
        above = [load(other) for other in node.pop("defaults", [])]
        return typing.cast(DictConfig, OmegaConf.merge(*above, node))

    for file in sorted(folder.glob("*.yaml")):
        if OmegaConf.select(OmegaConf.load(file), "name_or_path", throw_on_missing=False) == name:
            return file.stem, load(file.stem)
    return "causal_lm", load("causal_lm")


def _fill_groups(cfg: DictConfig, found: experiment.Reading, given: set[str]) -> dict[str, str]:
    """Set ``quant`` and ``inference`` from an experiment, unless the command line chooses them."""
    made = {}
    for group in ("quant", "inference"):
        if any(key.partition(".")[0] == group and (key == group or group == "quant") for key in given):
            for key in [key for key in found.keys if key.partition(".")[0] == group]:
                found.refuse(key, f"{experiment.OVERRIDDEN} {group}")
    if "quant" in found.keys:
        made["quant"] = libraries.kind(found.keys["quant"])
    if option := found.keys.pop("inference", None):
        cfg.inference = OmegaConf.load(Path(conf_dir()) / "inference" / f"{option}.yaml")
        made["inference"] = str(option)
    return made


def _fill_evaluations(cfg: DictConfig, found: experiment.Reading, given: set[str]) -> None:
    """Set an experiment's options in all evaluations that have them, and its template in all evaluations."""
    general = {
        key: key.removeprefix(experiment_keys.EVALUATIONS) for key in found.keys if experiment_keys.EVALUATIONS in key
    }
    for key, option in general.items():
        value, names = found.keys[key], [name for name in found.taken if key in found.taken[name]]
        nodes = {
            f"eval.{name}.{option}": node
            for name, node in cfg.eval.items()
            if node.get(option) is not None and (option != "prompt" or node._target_ == GENERATION)
        }
        mine = {where: node for where, node in nodes.items() if where not in given}
        for where, node in mine.items():
            template = _with_columns(value, node.prompt) if option == "prompt" else value
            if template is None:
                found.not_taken[f"{names[0]}, in {where}"] = (
                    f"its prompt has several columns, none called query: {node.prompt}"
                )
                continue
            found.keys[where] = template
            for name in names:
                found.taken[name].append(where)
        reason = f"{experiment.OVERRIDDEN} {', '.join(nodes)}" if nodes else f"no evaluation of the trial has {option}"
        del found.keys[key]
        for name in names:
            found.taken[name].remove(key)
            if not found.taken[name]:
                del found.taken[name]
                found.not_taken[name] = reason
    prompt = found.keys.get("dataset.prompt")
    if prompt is not None and not OmegaConf.is_missing(cfg.dataset, "prompt"):
        found.keys["dataset.prompt"] = _with_columns(prompt, cfg.dataset.prompt)
        if found.keys["dataset.prompt"] is None:
            found.refuse("dataset.prompt", f"its prompt has several columns, none called query: {cfg.dataset.prompt}")


def _with_columns(template: str, current: str) -> str | None:
    """``template`` with the only column of ``current`` in place of query; None if ``current`` has several columns."""
    columns = {column for _, column, _, _ in string.Formatter().parse(current) if column}
    if "query" in columns:
        return template
    return template.replace("{query}", f"{{{columns.pop()}}}") if len(columns) == 1 else None


def _fill_from_record(cfg: DictConfig, given: set[str]) -> dict[str, str]:
    """Set every key that a trial's record holds; keys that an older record lacks keep their values."""
    original = repeat.original(cfg.repeat)
    if "study" not in given:
        cfg.study = f"{original.run_info['study']}-repeat"
    if original.folder and original.folder.parent.resolve() == store.folder(cfg.study).resolve():
        raise InputError(
            f"repeat={cfg.repeat}: study={cfg.study} holds the original, which must be kept; use another study"
        )
    restored.check_record(f"repeat={cfg.repeat}", original)
    cfg.force = True  # a second repeat, with other versions, must not return the results of the first
    own = restored.own_values(cfg, given)
    for key in original.config:
        if key not in repeat.NOT_REPEATED and key not in given and key in cfg:
            restored.put(cfg, key, restored.located(key, original))
    restored.put_back(cfg, own)
    for section, commit in repeat.commits(original).items():
        if not given & {section, *(f"{section}.{key}" for key in NAMES)}:
            cfg[section].revision = commit
    return {group: option for group, option in original.choices.items() if group not in given}


def _fill_from_adapter(cfg: DictConfig, given: set[str], choices: Mapping[str, str | None]) -> dict[str, str]:
    """Set the configuration of a saved adapter: that of its trial, or its method and base if it has no record."""
    folder = store.adapter(cfg.adapter.path)
    cfg.label = cfg.label or as_text(experiment.label(str(folder.parent if folder.name == store.ADAPTER else folder)))
    made: dict[str, str] = {}
    if cfg.repeat is None:  # with repeat the record holds these keys already
        if trained := store.result_of_adapter(folder):
            made = restored.from_trial(cfg, given, choices, trained, model_identity)
        else:
            made, base = restored.from_elsewhere(cfg, given, choices, folder, model_identity)
            if base is not None:
                made["model"] = _use_base(cfg, base, given, choices["model"] if "model" in given else None)
    if unused := _unused_training_keys(cfg, given):
        say_once(
            f"{', '.join(unused)}: not used with adapter.path={cfg.adapter.path}, which is evaluated and not trained"
        )
    cfg.train.steps, cfg.train.epochs, cfg.adapter.save, cfg.method_setup = 0, None, False, {}
    return made


def _unused_training_keys(cfg: DictConfig, given: set[str]) -> list[str]:
    """The keys of the command line that act on a training alone."""
    unused = [
        key for key in sorted(given) if key.partition(".")[0] == "train" and key.partition(".")[2] in TRAINING_KEYS
    ]
    unused += sorted(given & {"adapter.save"} if cfg.adapter.save else set())
    return [key for key in unused if OmegaConf.select(cfg, key) not in (0, None)]


def _use_base(cfg: DictConfig, base: str, given: set[str], option: str | None) -> str:
    """Use the base that an adapter names, a local one in its stored dtype. Returns the option of ``model``.

    It is ``option``, which the command line chose without a base, such as encoder; None leaves it to the base.
    """
    kept: dict[str, Any] = {"revision": cfg.model.revision}
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads((Path(base).expanduser() / "config.json").read_text(encoding="utf-8"))
        dtype = stored.get("dtype", stored.get("torch_dtype"))
        if dtype in FORMATS:
            kept["dtype"] = dtype
    return _put_model(cfg, base, given, option, **kept)


def read_newlines(cfg: DictConfig, overrides: Iterable[str]) -> None:
    r"""Read ``\n`` in a template of the command line as a line break, and ``\\n`` as a backslash and an n."""
    for key in (override.lstrip("+").partition("=")[0] for override in overrides):
        if TEMPLATE.fullmatch(key) and (template := OmegaConf.select(cfg, key, throw_on_missing=False)) is not None:
            texts = (
                [_with_newlines(text) for text in template] if OmegaConf.is_list(template) else _with_newlines(template)
            )
            OmegaConf.update(cfg, key, texts)


def _with_newlines(text: Any) -> Any:
    ends = {r"\n": "\n", r"\\n": r"\n"}
    return re.sub(r"\\?\\n", lambda found: ends[found[0]], text) if isinstance(text, str) else text
