"""From a composed configuration to a trial: the schema's registration, validation, identity.

The identity of a trial is a hash of everything that changes its numbers and of nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import pickle
import pydoc
import re
import string
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftsweep import data, experiment, fast_dtype, fingerprint, hub, limits, repeat, restored, study, trust
from peftsweep.compatibility import stored
from peftsweep.errors import InputError, suggest
from peftsweep.experiment import ORIGIN
from peftsweep.record import SECTIONS
from peftsweep.restored import FROM_FILE
from peftsweep.schema import Config, DatasetConfig, Dtype, Init, LossOn, ModelConfig, OnMissing, RowsConfig, Task
from peftsweep.trust import as_text

OPEN = (  # sections whose keys are the arguments of a class or function
    *("method", "method_setup", "quant", "eval", "inference", "profiler", "tracker"),
    *("model.architecture", "train.optimizer_kwargs", "dataset.validation.columns"),
)
CONVERSATIONS = "peftsweep.tasks.messages"  # the reader of datasets that hold them
IDENTITY_LENGTH = 10  # hex digits: a study of 10,000 trials has a clash once in 20,000 studies
IDENTITY_RULE = 2  # its version, which a record keeps; a study's trials are recognised by earlier ones too
# Former names of modules, classes and functions, and their names now. In an identity they keep the former ones.
MOVED: dict[str, str] = {}
# Names that are not the shortest, under which identities of the first rule have what conf/ names.
FIRST_NAMES = {f"peft.{name}": f"peft.tuners.lora.config.{name}" for name in ("KasaConfig", "BdLoraConfig")}
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
    *("encoding", "leave_out_tested", "validation"),
)
FIRST_DATASET_KEYS = (*CHOOSES_ROWS[:-3], "reader", "prompt", "answer", "classes", "max_length", "drop_long", "chat")
NEW_EVAL_OPTIONS = ("stop", "beside")  # of evaluations, brought by later versions: empty, they change nothing
CHANGES_NO_SCORE = ("headline",)  # of their options: what trials are compared by
ROWS_KEYS = tuple(field.name for field in dataclasses.fields(RowsConfig))
LAUNCHER = {
    "workers": 0,
    "devices": None,
    "retries": 0,
    "timeout": None,
    "limit": 1,
    "deadline": None,
    "pack": None,
    "measure": None,
}  # with the least
WHOLE_SWEEP = (  # keys with one value for all points of a sweep
    *("study", "dry_run", "quiet", "stop_on_failure", "halving", "hydra.launcher", "hydra.sweeper._target_"),
    *("hydra.sweeper.max_batch_size", "hydra.sweep.dir"),
)
PACK = 8  # trials at once that pack=auto tries
ELSEWHERE = {  # arguments of an optimizer that are not train.optimizer_kwargs'
    "lr": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    **dict.fromkeys(("params", "model"), "what the method trains"),
}
TEMPLATE = re.compile(r"(dataset|eval\.\w+)\.(prompt|answer|stop)")  # keys of texts that may have several lines
DEVICE_MAP = re.compile(r"auto|balanced|balanced_low_0|sequential|disk|meta|(cpu|cuda|xpu|mps)(:\d+)?")
OFF = "off"
NEVER = ("no", "off", "false", "never", "none", "0")  # as people write null for an interval
HARNESS = "peftsweep.harness.lm_eval"  # whose tasks bring their own rows
PACKAGES = {  # options that a package brings
    "hydra/launcher/submitit_slurm": "peftsweep[slurm]",
    "hydra/launcher/submitit_local": "peftsweep[slurm]",
    "hydra/launcher/ray": "peftsweep[ray]",
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/sweeper/optuna": "peftsweep[optuna]",
}
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
GENERATION = "peftsweep.evaluate.generation"
LANGUAGE_MODEL_ONLY = ("peftsweep.evaluate.perplexity", GENERATION)
LOOSE = {"init_lora_weights": r"lora_ga|pissa_niter_\d+"}  # values that PEFT takes beside what it annotates
FORMATS = tuple(name for name in Dtype.__members__ if name != Dtype.auto.name)
ONE_OF = {
    "quant.bnb_4bit_quant_type": ("nf4", "fp4"),
    "quant.bnb_4bit_compute_dtype": FORMATS,
    "train.autocast": FORMATS,
}


def register() -> None:
    """Tell Hydra the schema, under a name of its own so that no group lists it as an option.

    In the sections of ``OPEN`` a key needs no ``+``: they hold the arguments of what a yaml names, few of which it
    lists. ``trial`` checks them.
    """
    node = OmegaConf.structured(Config)
    for key in OPEN:
        OmegaConf.set_struct(OmegaConf.select(node, key), False)
    ConfigStore.instance().store(name="peftsweep_schema", node=node)


def conf_dir() -> str:
    """The folder of the configuration files: inside an installed wheel, else at the top of the checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "conf"
    return str(packaged if packaged.is_dir() else here.parents[1] / "conf")


@dataclass(frozen=True)
class Identity:
    """What a trial is recognised by, and its training alone, by one version of the rule."""

    rule: int
    trial: str
    training: str


@dataclass(frozen=True)
class Trial:
    """One point of a sweep, checked."""

    config: Config
    tree: dict[str, Any]  # the same as plain values, for result.json
    choices: dict[str, str]  # the option chosen in each group
    overrides: list[str]
    rows: data.Rows | None  # None for hub data, which is not loaded before it is needed
    identity: str
    training: str  # the identity of the training alone, whatever is evaluated
    slug: str
    earlier: Identity | None = None  # by the first rule, where another
    # Which fields of an experiment's files were taken, and which not: see experiment.Reading.facts.
    experiment: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    told_by: str = ""  # what tells it from the other trials of its sweep and study
    offline: bool = False  # the hub does not answer, as a process has found that the trial was sent from

    @property
    def name(self) -> str:
        """What the trial is called beside others, see naming; its label where it is alone."""
        return self.told_by or self.label

    @property
    def label(self) -> str:
        """The name a sweep gave this point, by default its slug."""
        return self.config.label or self.slug


def trial(cfg: DictConfig, choices: Mapping[str, str | None], overrides: Iterable[str] = ()) -> Trial:
    """Check ``cfg`` and turn it into plain values. Reads local data files; loads no model.

    Raises:
        InputError: something in it is wrong; the line names the key and what is allowed.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra", None)
    overrides = list(overrides)
    _check_complete(cfg, Config)
    _read_newlines(cfg, overrides)
    if not cfg.method and choices.get("method") not in ("full", FROM_FILE, None):
        raise InputError(f"method={choices['method']}: its yaml names no method; it needs method: {{_target_: peft.X}}")
    source, own = _source(cfg), {name for _, name in trust.names(OmegaConf.to_container(cfg))}
    made, heeded = _fill_from_files(cfg, overrides, choices)
    choices = dict(choices) | made
    _use_current_names(cfg)
    if cfg.model.dtype is Dtype.auto:
        cfg.model.dtype = fast_dtype.resolve(str(cfg.device))
    if source and not cfg.trust:
        trust.check(typing.cast(dict[str, Any], OmegaConf.to_container(cfg)), Path(conf_dir()), own, source)
    for key in ("eval_every", "checkpoint_every"):
        if str(cfg.train[key]).lower() in NEVER:
            cfg.train[key] = None
    if cfg.halving.min_steps is not None:
        cfg.train.eval_every = cfg.train.eval_every or str(cfg.halving.min_steps)
        cfg.halving.metric = cfg.halving.metric or cfg.train.best_metric
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(f"{missing[0]}: must be given")
    try:
        tree = typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
        config = typing.cast(Config, OmegaConf.to_object(OmegaConf.merge(_schema(), cfg)))
    except OmegaConfBaseException as error:
        raise InputError(one_line(error)) from None
    _check_keys(tree, Config)
    # An interpolation such as ${model.dtype} is an Enum's member there and must be the name a library knows.
    config = dataclasses.replace(config, method=tree["method"], quant=tree["quant"], eval=tree["eval"])
    _check_values(tree)
    _check_halving(config, choices.get("hydra/sweeper"))
    _check_objective(config)
    _check_calls(config, choices)
    _check_files(config)
    rows = None if config.dataset.hub and not config.dataset.path else _rows(config)
    _check_evaluation_rows(config, rows or _test_rows(config))
    _check_warmup(config, rows)
    _check_metrics(config)
    chosen = {group: str(option) for group, option in choices.items() if option and not group.startswith("hydra/")}
    if config.method and chosen["method"] in ("full", FROM_FILE):  # a named point, which brings its method itself
        chosen["method"] = config.method["_target_"].rpartition(".")[2].removesuffix("Config").lower()
    elif chosen["method"] == FROM_FILE:
        chosen["method"] = "full"
    identity, first = _identity(config, rows), _identity(config, rows, rule=1)
    del tree["halving"]["rung"]  # how far the trial goes now is no part of what it is
    return Trial(
        config=config,
        tree=tree,
        choices=chosen,
        overrides=overrides,
        rows=rows,
        identity=identity.trial,
        training=identity.training,
        slug=_slug(chosen, config),
        earlier=first if first.trial != identity.trial else None,
        experiment=heeded,
    )


@functools.cache
def _schema() -> DictConfig:
    return typing.cast(DictConfig, OmegaConf.structured(Config))


def without_rows(trial: Trial) -> Trial:
    """The trial without its rows, to be sent to another process, which reads them itself."""
    return dataclasses.replace(trial, rows=None, offline=hub.is_offline())


def with_rows(trial: Trial) -> Trial:
    """The trial of ``without_rows`` with its rows, read again.

    Raises:
        InputError: they are not those any more that it was checked with.
    """
    config = trial.config
    if trial.offline:
        hub.go_offline()
    rows = None if config.dataset.hub and not config.dataset.path else _rows(config)
    if _identity(config, rows).training != trial.training:
        raise InputError("dataset: the files have changed since the sweep began")
    return dataclasses.replace(trial, rows=rows)


def _source(cfg: DictConfig) -> str | None:
    """The key that names a record, an adapter or an experiment to be read, with its value."""
    paths = {"repeat": cfg.repeat, "adapter.path": cfg.adapter.path, "method.path": cfg.method.get("path")}
    paths["train.params_file"] = cfg.train.params_file
    return next((f"{key}={path}" for key, path in paths.items() if path is not None), None)


def _use_current_names(cfg: DictConfig) -> None:
    """Have every ``_target_`` that has moved since a record or a yaml was written name what it is now."""
    if not MOVED:
        return
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


def _fill_from_files(
    cfg: DictConfig, overrides: Iterable[str], choices: Mapping[str, str | None]
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Put what an experiment's or an adapter's files say in its place, below what the command line says.

    Returns the choices that the files have made, and what became of each field of an experiment's.
    """
    said = {override.lstrip("+~").partition("=")[0] for override in overrides}
    made = _fill_from_record(cfg, said) if cfg.repeat is not None else {}
    made |= _fill_from_adapter(cfg, said, choices) if cfg.adapter.path is not None else {}
    folder, file = cfg.method.get("path"), cfg.train.params_file  # which may be told by method.path
    if folder is None and file is None:
        return made, repeat.original(cfg.repeat).run_info.get("experiment", {}) if cfg.repeat is not None else {}
    found = experiment.read(folder, file)
    cfg.train.params_file = None  # the same trial as one that is told the same by keys
    for key in said - {"method", "quant", "inference"}:  # whole groups, of which an experiment's files tell more
        found.refuse(key, f"{experiment.OVERRIDDEN} {key}")
    if folder is not None:
        cfg.method = as_text(found.keys.pop("method")) | {
            key: value for key, value in cfg.method.items() if key != "path"
        }
        cfg.label = cfg.label or as_text(experiment.label(folder))
    made |= _fill_model(cfg, found, said) | _fill_groups(cfg, found, said)
    _fill_evaluations(cfg, found, said)
    for key, value in found.keys.items():
        OmegaConf.update(cfg, key, as_text(value), merge=False)
    return made, found.facts()


def _fill_model(cfg: DictConfig, found: experiment.Reading, said: set[str]) -> dict[str, str]:
    """Have the model that an experiment names, as the preset of that name has it, unless the command line has one."""
    if "model" in said:
        found.refuse(experiment.MODEL, f"{experiment.OVERRIDDEN} model")
    if experiment.MODEL not in found.keys:
        found.refuse("model.revision", f"{experiment.OVERRIDDEN} model")
        return {}
    name = found.keys.pop(experiment.MODEL)
    if not OmegaConf.is_missing(cfg.model, "name_or_path") and cfg.model.name_or_path == name:
        return {}
    choice = _put_model(cfg, name, said)
    if "train.learning_rate_scale" not in said:
        cfg.train.learning_rate_scale = 1.0  # that of another model's recipe
    return {"model": choice}


def _put_model(cfg: DictConfig, name: str, said: set[str], **more: Any) -> str:
    """Replace the model by the one called ``name``, with ``more`` of its keys; those on the command line stay."""
    option, node = _model_node(name)
    own = restored.own_values(cfg, {key for key in said if key.startswith("model.")})
    cfg.model = OmegaConf.merge(_schema().model, node, {"name_or_path": as_text(name)} | more)
    restored.put_back(cfg, own)
    return option


def _model_node(name: str) -> tuple[str, DictConfig]:
    """The option of ``model`` that is called ``name`` on the hub, with its keys; of another, what any has."""
    folder = Path(conf_dir()) / "model"

    def load(option: str) -> DictConfig:
        node = typing.cast(DictConfig, OmegaConf.load(folder / f"{option}.yaml"))
        above = [load(other) for other in node.pop("defaults", [])]
        return typing.cast(DictConfig, OmegaConf.merge(*above, node))

    for file in sorted(folder.glob("*.yaml")):
        if OmegaConf.select(OmegaConf.load(file), "name_or_path", throw_on_missing=False) == name:
            return file.stem, load(file.stem)
    return "causal_lm", load("causal_lm")


def _fill_groups(cfg: DictConfig, found: experiment.Reading, said: set[str]) -> dict[str, str]:
    """How the base is stored and how inference is timed, unless the command line chooses them."""
    made = {}
    for group in ("quant", "inference"):
        if any(key.partition(".")[0] == group and (key == group or group == "quant") for key in said):
            for key in [key for key in found.keys if key.partition(".")[0] == group]:
                found.refuse(key, f"{experiment.OVERRIDDEN} {group}")
    if "quant" in found.keys:
        made["quant"] = stored(found.keys["quant"])
    if option := found.keys.pop("inference", None):
        cfg.inference = OmegaConf.load(Path(conf_dir()) / "inference" / f"{option}.yaml")
        made["inference"] = str(option)
    return made


def _fill_evaluations(cfg: DictConfig, found: experiment.Reading, said: set[str]) -> None:
    """Put what an experiment says of all evaluations into those that have such an option, and its template into all."""
    general = {key: key.removeprefix(experiment.EVALUATIONS) for key in found.keys if experiment.EVALUATIONS in key}
    for key, option in general.items():
        value, names = found.keys[key], [name for name in found.taken if key in found.taken[name]]
        nodes = {
            f"eval.{name}.{option}": node
            for name, node in cfg.eval.items()
            if node.get(option) is not None and (option != "prompt" or node._target_ == GENERATION)
        }
        mine = {where: node for where, node in nodes.items() if where not in said}
        for where, node in mine.items():
            template = _with_columns(value, node.prompt) if option == "prompt" else value
            if template is None:
                found.not_taken[f"{names[0]}, in {where}"] = f"its rows have no one column for {{query}}: {node.prompt}"
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
            found.refuse("dataset.prompt", f"the dataset has no one column for {{query}}: {cfg.dataset.prompt}")


def _with_columns(template: str, current: str) -> str | None:
    """``template``, over a column query, for rows whose question is the one column of ``current``; None for more."""
    columns = {column for _, column, _, _ in string.Formatter().parse(current) if column}
    if "query" in columns:
        return template
    return template.replace("{query}", f"{{{columns.pop()}}}") if len(columns) == 1 else None


def _fill_from_record(cfg: DictConfig, said: set[str]) -> dict[str, str]:
    """All that the record of a trial says, key by key; what it lacks, as records of older versions do, stays."""
    original = repeat.original(cfg.repeat)
    if "study" not in said:
        cfg.study = f"{original.run_info['study']}-repeat"
    if original.folder and original.folder.parent.resolve() == study.folder(cfg.study).resolve():
        raise InputError(f"repeat={cfg.repeat}: study={cfg.study} holds the original, which is kept; take another")
    cfg.force = True  # or a second repeat, with other versions, would be told the first one's numbers
    own = restored.own_values(cfg, said)
    for key, value in original.config.items():
        if key not in repeat.NOT_REPEATED and key not in said and key in cfg:
            restored.put(cfg, key, value)
    restored.put_back(cfg, own)
    return {group: option for group, option in original.choices.items() if group not in said}


def _fill_from_adapter(cfg: DictConfig, said: set[str], choices: Mapping[str, str | None]) -> dict[str, str]:
    """The trial that a saved adapter is of, or of one from elsewhere its method and base; nothing is trained."""
    folder = study.adapter(cfg.adapter.path)
    cfg.label = cfg.label or as_text(experiment.label(str(folder.parent if folder.name == study.ADAPTER else folder)))
    made: dict[str, str] = {}
    if cfg.repeat is None:  # whose record holds all that the adapter's held
        if trained := study.result_of_adapter(folder):
            made = restored.from_trial(cfg, said, choices, trained, model_identity)
        else:
            made, base = restored.from_elsewhere(cfg, said, choices, folder, model_identity)
            if base is not None:
                made["model"] = _use_base(cfg, base, said)
    cfg.train.steps, cfg.train.epochs, cfg.adapter.save, cfg.method_setup = 0, None, False, {}
    return made


def _use_base(cfg: DictConfig, base: str, said: set[str]) -> str:
    """Have the base that an adapter names, a local one in the format that it is stored in; gives the option it is."""
    kept: dict[str, Any] = {"revision": cfg.model.revision}
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads((Path(base).expanduser() / "config.json").read_text(encoding="utf-8"))
        dtype = stored.get("dtype", stored.get("torch_dtype"))
        if dtype in FORMATS:
            kept["dtype"] = dtype
    return _put_model(cfg, base, said, **kept)


# ---- validation ------------------------------------------------------------------------------------


def _check_keys(tree: Mapping[str, Any], schema: Any, where: str = "") -> None:
    """Refuse a key that nobody reads, as an added one (``+train.learning_rte``) may be."""
    kinds = typing.get_type_hints(schema)
    for key, value in tree.items():
        if key not in kinds:
            raise InputError(f"{where}{key}: no such key; {suggest(str(key), list(kinds))}")
        if dataclasses.is_dataclass(kinds[key]) and isinstance(value, Mapping):
            _check_keys(value, kinds[key], f"{where}{key}.")


def _check_complete(cfg: DictConfig, schema: Any, where: str = "") -> None:
    """Refuse a configuration that lacks a key, as one that was deleted (``~seed``)."""
    for field, kind in typing.get_type_hints(schema).items():
        if field not in cfg.keys():  # noqa: SIM118 (a value that must yet be given is not "in")
            raise InputError(f"{where}{field}: must be given; it cannot be deleted")
        if dataclasses.is_dataclass(kind) and not OmegaConf.is_missing(cfg, field):
            _check_complete(cfg[field], kind, f"{where}{field}.")


def _read_newlines(cfg: DictConfig, overrides: Iterable[str]) -> None:
    r"""Have ``\n`` in a template of the command line be the end of a line; ``\\n`` are these two characters."""
    for key in (override.lstrip("+").partition("=")[0] for override in overrides):
        if TEMPLATE.fullmatch(key) and (said := OmegaConf.select(cfg, key, throw_on_missing=False)) is not None:
            texts = [_with_newlines(text) for text in said] if OmegaConf.is_list(said) else _with_newlines(said)
            OmegaConf.update(cfg, key, texts)


def _with_newlines(text: Any) -> Any:
    ends = {r"\n": "\n", r"\\n": r"\n"}
    return re.sub(r"\\?\\n", lambda found: ends[found[0]], text) if isinstance(text, str) else text


def _check_values(tree: dict[str, Any]) -> None:
    for key, allowed in ONE_OF.items():
        if (value := _at(tree, key)) is not None and value not in allowed:
            raise InputError(f"{key}={value}: must be one of {', '.join(allowed)}")
    limits.check(tree, _least_of_method(tree["method"]))
    if tree["train"]["keep_best"] and tree["train"]["eval_every"] is None:
        raise InputError("train.keep_best=true: needs train.eval_every, the interval of the validations it compares")
    for key in ("train.best_metric", "halving.metric"):
        metric = _at(tree, key) or "loss"
        if metric != "loss" and metric.partition(".")[0] not in tree["eval"]:
            raise InputError(f"{key}={metric}: must be loss or <eval>.<metric> of {', '.join(tree['eval'])}")
    if tree["memory_limit"] is not None:
        size_in_bytes(tree["memory_limit"], "memory_limit")
    for key, name in [("study", tree["study"]), *(("eval", name) for name in tree["eval"])]:
        if not study.is_plain(str(name)):
            raise InputError(
                f'{key}={name}: must be a plain name of at most 100 characters, without any of /\\:*?"<>| and '
                "not beginning with '.'"
            )


def _least_of_method(method: Mapping[str, Any]) -> dict[str, float]:
    """The defaults of the method's own class: of OFT r=0, for one, means that its block size decides."""
    config = pydoc.locate(str(method.get("_target_")))
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    return {f"method.{one.name}": one.default for one in fields if isinstance(one.default, int | float)}


def _check_halving(config: Config, sweeper: str | None) -> None:
    """A rung must be a step at which the trial is validated anyway, so that it changes nothing of the trial."""
    halving, every = config.halving, config.train.eval_every
    if halving.min_steps is None:
        return
    if sweeper not in (None, "grid"):
        raise InputError(f"halving: is done by hydra/sweeper=grid, not by {sweeper}")
    if config.objective is not None:
        raise InputError("objective: is for a sweeper such as hydra/sweeper=optuna; halving judges by halving.metric")
    if not (every or "").isdigit() or int(every or 1) < 1 or halving.min_steps % int(every or 1):
        raise InputError(f"train.eval_every={every}: must be steps that divide halving.min_steps={halving.min_steps}")
    steps, most = config.train.steps, config.train.steps // halving.factor
    if config.train.epochs is None and steps and halving.min_steps > most:
        said = f"halving.min_steps={halving.min_steps}: must be at most {most}"
        raise InputError(f"{said}, train.steps={steps} divided by halving.factor={halving.factor}")


def _check_objective(config: Config) -> None:
    """As far as it can be known before a record is there."""
    said = config.objective
    columns = [said] if isinstance(said, str) else [] if said is None else said
    if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
        raise InputError(f"objective={said}: must be a column of the record, or a list of columns")
    for column in columns:
        section, *names = column.split(".")
        if section not in SECTIONS or not names:
            raise InputError(f"objective={column}: must be a column of {', '.join(SECTIONS)}")
        if section == "eval_info" and names[0] not in config.eval:
            raise InputError(
                f"objective={column}: eval_info.{names[0]} is not evaluated; {suggest(names[0], list(config.eval))}"
            )


def check_expanded(cfg: DictConfig, given: Iterable[str]) -> None:
    """Refuse a composed point whose options bring axes that were not expanded: it is a trial nobody asked for.

    ``given`` are the keys of the point's words.

    Raises:
        InputError: the line names the axes.
    """
    axes = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    lacking = [name for name in (str(key).lstrip("+") for key in axes) if name not in given]
    if lacking:
        options = [f"{group}={option}" for group, option in cfg.hydra.runtime.choices.items() if group == "sweep"]
        raise InputError(
            f"{', '.join(options)}: is more than one trial, it sweeps {', '.join(lacking)}; only the command line "
            "expands it, with hydra/sweeper=grid"
        )


def check_joinable(word: str, sweeps: Mapping[str, DictConfig]) -> None:
    """Refuse a ``word`` of options of ``sweep``, composed one by one, that differ in what is of a sweep as a whole.

    Raises:
        InputError: the line names the key and the values, or there is no option.
    """
    if not sweeps:
        raise InputError(f"{word}: matches no option of sweep")
    for key in WHOLE_SWEEP:
        (first, value), *others = ((option, _plain(cfg, key)) for option, cfg in sweeps.items())
        for option, other in others:
            if other != value:
                raise InputError(
                    f"{word}: cannot be joined, as {key} is of the sweep as a whole, and is {value} in {first} and "
                    f"{other} in {option}; give it on the command line"
                )


def _plain(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value, enum_to_str=True) if OmegaConf.is_config(value) else value


def placement(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``hydra.launcher`` as ``workers.Options`` takes them.

    Raises:
        InputError: one is unknown, or out of range.
    """
    for key, value in options.items():
        if key not in LAUNCHER:
            raise InputError(f"hydra.launcher.{key}: no such key; {suggest(key, list(LAUNCHER))}")
        least = LAUNCHER[key]
        if least is None or (value is None and key != "retries"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limits.LARGEST:
            raise InputError(f"hydra.launcher.{key}={value}: must be a whole number, at least {least}")
    devices = options.get("devices")
    if devices is not None and not (isinstance(devices, list | tuple) and devices and all(map(_is_number, devices))):
        raise InputError(f"hydra.launcher.devices={devices}: must be numbers of CUDA devices, such as [0,2], or null")
    times = {key: seconds(options.get(key), f"hydra.launcher.{key}") for key in ("timeout", "deadline")}
    return dict(options) | times | _packing(options.get("pack", OFF), options.get("measure"))


def _is_number(device: Any) -> bool:
    return str(device).isdecimal() and not isinstance(device, bool)


def _packing(size: Any, measure: Any) -> dict[str, Any]:
    """``hydra.launcher.pack`` and ``measure`` as ``workers.Options`` takes them."""
    if measure not in (None, "alone"):
        raise InputError(f"hydra.launcher.measure={measure}: must be alone or null")
    if size in (OFF, None) or size is False:  # which yaml makes of a bare off
        number = None
    elif size == "auto":
        number = PACK
    elif isinstance(size, int) and not isinstance(size, bool) and size >= 2:
        number = size
    else:
        raise InputError(f"hydra.launcher.pack={size}: must be auto, off or a number of trials, at least 2")
    return {"pack": number, "probe": size == "auto", "measure": measure == "alone"}


def seconds(text: str | float | None, key: str) -> float | None:
    """``2h``, ``30m``, ``90s`` or a number of seconds; None stays None.

    Raises:
        InputError: it is no such time.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", str(text).strip())
    if found is None or not float(found[1]):
        raise InputError(f"{key}={text}: must be a time such as 90s, 30m, 2h or 1d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def size_in_bytes(text: str, key: str) -> float:
    """``24GB`` or ``512 MiB`` as a number.

    Raises:
        InputError: it is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise InputError(f"{key}={text}: must be a size such as 24GB; units: {', '.join(UNITS)}")
    return float(found[1]) * UNITS[found[2]]


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _check_calls(config: Config, choices: Mapping[str, str | None]) -> None:
    for section in ("quant", "inference", "profiler", "tracker", "method_setup"):
        if (node := getattr(config, section)) and "_target_" not in node:
            group = section.removesuffix("_setup")
            raise InputError(f"{section}.{next(iter(node))}: {group}={choices.get(group)} has no such option")
    _check_method(config.method, str(choices.get("method")))
    if config.method_setup:
        check_call(config.method_setup, "method_setup", provided=("setting",))
    if config.quant:
        check_call(config.quant, "quant")
    if config.inference:
        check_call(config.inference, "inference", provided=("variants", "tokenizer", "saved", "clock"))
    if config.profiler:
        check_call(config.profiler, "profiler", provided=("run", "folder", "device"))
    if config.tracker:
        check_call(config.tracker, "tracker", provided=("folder", "name", "study"))
    if not config.eval and not config.train.steps:
        raise InputError("eval: nothing is trained (train.steps=0) and nothing evaluated")
    _check_task(config)
    for name, node in config.eval.items():
        if "_target_" not in node:
            raise InputError(f"eval.{name}: no such key; {suggest(name, [o for o in config.eval if o != name])}")
        options = {key: value for key, value in node.items() if key not in ROWS_KEYS}
        check_call(options, f"eval.{name}", provided=("model", "tokenizer", "examples"), also=ROWS_KEYS)
        _check_types({key: node[key] for key in ROWS_KEYS if key in node}, RowsConfig, f"eval.{name}")
    from peftsweep import compiled, inference, tracker, train  # which import torch, as `--help` must not

    if config.inference.get("_target_") == "peftsweep.inference.benchmark":
        inference.plan(**config.inference)
    if config.tracker:
        tracker.check(config.tracker["_target_"])
    _check_model(config.model)
    compiled.check(config.train)
    _check_optimizer(config.train.optimizer_kwargs, train.find_optimizer(config.train.optimizer))
    if (every := train.interval(config.train, "eval_every", rows=1)) is not None and every > limits.LARGEST:
        raise InputError(f"train.eval_every={config.train.eval_every}: must be at most {limits.LARGEST} steps")
    train.checkpoint_due(config.train, rows=1)


def _check_method(node: Mapping[str, Any], option: str) -> None:
    """Check the method that was chosen by ``method=option``: ``check_call``, and whose keys they are.

    A key of another method is one that a sweep of methods has for all of them.
    """
    if not node:
        return
    if "_target_" not in node:  # keys of full fine-tuning
        raise _no_option(next(iter(node)), f"method={option}", [])
    config = pydoc.locate(str(node["_target_"]))
    if dataclasses.is_dataclass(config):
        known = [field.name for field in dataclasses.fields(config) if field.init and field.name not in ORIGIN]
        if set_here := [key for key in node if key in ORIGIN]:
            raise InputError(f"method.{set_here[0]}: is set by peftsweep, from model and method")
        for key in node:
            if key not in known and not key.startswith("_"):
                raise _no_option(key, f"method={option} ({node['_target_']})", known)
    check_call(node, "method")


def _no_option(key: str, method: str, known: list[str]) -> InputError:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # imports torch, which `--help` must not

    fields = {field.name for other in PEFT_TYPE_TO_CONFIG_MAPPING.values() for field in dataclasses.fields(other)}
    if key in fields:
        advice = f"run it without method.{key}, in a command of its own; the study holds the trials of both"
    else:
        advice = suggest(key, known)
    return InputError(f"method.{key}: {method} has no such option; {advice}")


def _check_optimizer(options: Mapping[str, Any], make: Callable[..., Any]) -> None:
    known = inspect.signature(make).parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    for name in options:
        if name in ELSEWHERE:
            raise InputError(f"train.optimizer_kwargs.{name}: is {ELSEWHERE[name]}")
        if name not in known and not takes_all:
            names = [one for one in _parameters(make) if one not in ELSEWHERE]
            raise InputError(
                f"train.optimizer_kwargs.{name}: {make.__name__} has no such option; {suggest(name, names)}"
            )


def _check_model(model: ModelConfig) -> None:
    """What transformers would find wrong only when it loads the weights."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known, said = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()], model.attn_implementation
    if said is not None and said not in known and "/" not in said:  # with one it is a kernel of the hub
        raise InputError(f"model.attn_implementation={said}: no such attention; {suggest(said, known)}")
    places = model.device_map.values() if isinstance(model.device_map, Mapping) else [model.device_map]
    for place in places:
        if place is None or (isinstance(place, int) and not isinstance(place, bool) and place >= 0):
            continue
        if not (isinstance(place, str) and DEVICE_MAP.fullmatch(place)):
            raise InputError(f"model.device_map={model.device_map}: must be auto, a device, or modules with theirs")


def _check_task(config: Config) -> None:
    """A classifier needs classes, and can be asked for nothing but them."""
    classifier = config.model.task is Task.seq_cls
    if classifier and len(config.dataset.classes) < 2:
        raise InputError(
            "dataset.classes: model.task=seq_cls needs the names of the classes, in the order of their numbers"
        )
    if classifier and config.dataset.loss_on is LossOn.text:
        raise InputError(
            "dataset.loss_on=text: a classifier (model.task=seq_cls) is trained on the class; must be answer"
        )
    if classifier and config.inference:
        raise InputError("inference: a classifier (model.task=seq_cls) writes no text; take inference=none")
    for name, node in config.eval.items():
        if classifier and node.get("_target_") in LANGUAGE_MODEL_ONLY:
            raise InputError(f"eval.{name}: a classifier (model.task=seq_cls) writes no text; take eval=classification")
        if node.get("classes") == []:
            raise InputError(f"eval.{name}.classes: must name at least two classes (or dataset.classes must)")


def _check_warmup(config: Config, rows: data.Rows | None) -> None:
    """As far as the length of the training is known: with epochs from the rows, whose tokens are not counted yet."""
    from peftsweep import train  # imports torch, which `--help` must not

    if config.adapter.path is None and (rows is not None or config.train.epochs is None):
        train.check_warmup(config.train, train.total_steps(config.train, len(rows.train) if rows is not None else 1))


def check_call(node: Mapping[str, Any], key: str, provided: Iterable[str] = (), also: Iterable[str] = ()) -> None:
    """Check that ``node`` names a callable by ``_target_`` and gives only options it takes, of their types.

    ``provided`` are arguments that the caller adds; ``also`` are keys allowed beside the arguments.

    Raises:
        InputError: the line names the option and what the target takes.
    """
    target = node.get("_target_")
    if not isinstance(target, str):
        raise InputError(f"{key}._target_: must name a class or function, such as peft.LoraConfig")
    try:
        function = pydoc.locate(target)
    except pydoc.ErrorDuringImport as error:
        raise InputError(f"{key}._target_={target}: cannot be imported ({_first_line(error)})") from None
    if not callable(function):
        raise InputError(f"{key}._target_={target}: no such class or function")
    hints = _hints(function)
    known = [name for name in _parameters(function) if name not in provided]
    for name, value in node.items():
        if name in ("_target_", "_partial_"):
            continue
        if name not in known:
            raise InputError(f"{key}.{name}: {target} has no such option; {suggest(name, [*known, *also])}")
        if isinstance(value, Mapping) and "_target_" in value:
            check_call(value, f"{key}.{name}", provided=("prediction", "answer"))
        elif isinstance(value, Mapping) and any(
            isinstance(one, Mapping) and "_target_" in one for one in value.values()
        ):
            for inner, one in value.items():
                check_call(one, f"{key}.{name}.{inner}", provided=("prediction", "answer"))
        elif name in hints and not re.fullmatch(LOOSE.get(name, ""), str(value)):
            default = inspect.signature(function).parameters[name].default
            if not (value is None and default is None):  # annotated as if it could not be None
                _check_types({name: value}, function, key)


def _check_types(values: Mapping[str, Any], described: Any, key: str) -> None:
    """Refuse a value that is not of the type that a class or function annotates it with."""
    hints = _hints(described)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise InputError(f"{key}.{name}={value}: must be {_type_in_words(hints[name])}")


def _type_in_words(hint: Any) -> str:
    return inspect.formatannotation(hint).replace("typing.", "").replace("None", "null")


@functools.cache
def _parameters(function: Any) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind not in variadic]


@functools.cache
def _hints(function: Any) -> dict[str, Any]:
    described = function if dataclasses.is_dataclass(function) or not inspect.isclass(function) else function.__init__
    try:
        return typing.get_type_hints(described)
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    import pydantic

    adapter = _adapter(hint)
    if adapter is None:
        return True
    try:
        # As JSON, so that a string may name an Enum's member; strict, so that "8" and true are no numbers.
        adapter.validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError:
        return False
    return True


@functools.cache
def _adapter(hint: Any) -> Any:
    """What checks values of the type; None for one that cannot be checked, such as torch.dtype."""
    import pydantic

    try:
        return pydantic.TypeAdapter(hint)
    except pydantic.PydanticUserError:
        return None


def _check_files(config: Config) -> None:
    """A file that is named must be there, whether or not this trial would read it."""
    own = config.dataset
    files = {"path": own.path, "test_path": own.test_path, "validation.path": own.validation.path}
    for key, path in files.items():
        if path is not None and not Path(path).is_file():
            raise InputError(f"dataset.{key}={path}: no such file")


def _check_evaluation_rows(config: Config, rows: data.Rows | None) -> None:
    """Fill the evaluations' templates from every local row, so that a missing column is known before training."""
    for name in config.eval:
        source = evaluation_source(config, name)
        if source.path or (not source.hub and rows is not None):
            own = data.evaluation_rows(source, f"eval.{name}", rows.test if rows else [])
            _check_norm(config, name, test_examples(config, name, own))
            test_rows(config, name, rows or data.Rows([]))  # are there enough to set some aside?


def _check_norm(config: Config, name: str, examples: list[data.Example]) -> None:
    """Refuse to compare or choose by ``acc_norm`` where something else than the choices' texts is scored."""
    from peftsweep import evaluate  # imports torch, which `--help` must not

    node = config.eval[name]
    if pydoc.locate(node["_target_"]) is not evaluate.multiple_choice or evaluate.scores_texts(examples):
        return
    by = {f"eval.{name}.headline": node.get("headline")} | {
        key: metric.removeprefix(f"{name}.") for key, metric in _validation_metrics(config).items()
    }
    for key, metric in by.items():
        if metric == "acc_norm":
            why = "as something else than its choices' texts is scored"
            raise InputError(f"{key}: eval.{name} does not measure acc_norm, {why}; must be acc")


def test_rows(config: Config, name: str, rows: data.Rows) -> list[data.Row]:
    """The rows that ``eval.<name>`` judges on, without those that it sets aside for validation."""
    return _parted(config, name, rows)[1]


def validation_rows(config: Config, name: str, rows: data.Rows) -> list[data.Row] | None:
    """The rows that ``eval.<name>`` validates on; None where it does not.

    One that judges on the dataset's test rows validates on the dataset's validation rows. One with rows of its own
    validates only where a metric of it chooses among weights or trials, and then on some that it sets aside.
    """
    if not rows.validation or config.eval[name].get("_target_") == HARNESS:
        return None
    if same_source(config, name):
        return rows.validation
    source = evaluation_source(config, name)
    return _parted(config, name, rows)[0] if source.path or source.hub else rows.validation


def _parted(config: Config, name: str, rows: data.Rows) -> tuple[list[data.Row] | None, list[data.Row]]:
    found = data.evaluation_rows(evaluation_source(config, name), f"eval.{name}", rows.test)
    if not sets_aside(config, name):
        return None, found
    own = config.dataset
    return data.set_aside(found, own.validation_samples, own.split_seed, f"eval.{name}")


def sets_aside(config: Config, name: str) -> bool:
    """Whether ``eval.<name>`` sets rows of its own aside, as its metric is asked for in validation."""
    source = evaluation_source(config, name)
    named = [metric.partition(".")[0] for metric in _validation_metrics(config).values()]
    own = bool(source.path or source.hub) and not same_source(config, name)
    return config.train.eval_every is not None and own and name in named


def _validation_metrics(config: Config) -> dict[str, str]:
    """The metrics by which a validation chooses, by their keys."""
    found = {"train.best_metric": config.train.best_metric, "halving.metric": config.halving.metric}
    return {key: metric for key, metric in found.items() if metric is not None and metric != "loss"}


def _check_metrics(config: Config) -> None:
    """Refuse a metric that its evaluation does not measure, or that can only be measured on test rows."""
    from peftsweep import evaluate  # imports torch, which `--help` must not

    asked = [(key, *metric.partition(".")[::2]) for key, metric in _validation_metrics(config).items()]
    for key, name, _ in asked:
        if config.eval[name].get("_target_") == HARNESS:
            raise InputError(f"{key}: eval.{name} judges on the test rows of its tasks, and cannot validate")
    said = [config.objective] if isinstance(config.objective, str) else config.objective or []
    columns = [column.split(".") for column in said if column.startswith("eval_info.") and column.endswith(".value")]
    asked += [("objective", column[1], ".".join(column[2:-1]).removeprefix("base_")) for column in columns]
    for key, name, metric in asked:
        node = config.eval[name]
        known = evaluate.measures(pydoc.locate(node["_target_"]), node)
        if known is not None and metric not in known:
            raise InputError(f"{key}: eval.{name} does not measure '{metric}'; {suggest(metric, list(known))}")


def check_conversations(config: Config) -> None:
    """Let a local tokenizer's chat template render all local rows, so that what it refuses is known before training."""
    from peftsweep.model import source  # imports torch, which `--help` must not

    if not config.dataset.chat or config.model.init is Init.random:
        return
    own = {name: evaluation_source(config, name) for name in config.eval}
    paths = [config.dataset.path, config.dataset.test_path, *(rows.path for rows in own.values())]
    folder = Path(source(config.model))
    files = [*(Path(path) for path in paths if path), *(folder.iterdir() if folder.is_dir() else ())]
    stamps = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(files))
    if folder.is_dir():
        _render_all(pickle.dumps((config.model, config.dataset, config.eval)), stamps)


@lru_cache(maxsize=4)
def _render_all(settings: bytes, _stamps: tuple[tuple[str, int, int], ...]) -> None:
    from peftsweep.model import load_tokenizer

    config = Config()
    config.model, config.dataset, config.eval = pickle.loads(settings)
    tokenizer, own = load_tokenizer(config.model), config.dataset
    for key in ("path", "test_path"):
        if path := getattr(own, key):
            read = data.read_rows(path, f"dataset.{key}", own.encoding)
            rendered(own, data.dataset_examples(own, read, path), tokenizer, file=path)
    for name in config.eval:
        source = evaluation_source(config, name)
        if source.path:
            made = test_examples(config, name, data.evaluation_rows(source, f"eval.{name}", []))
            rendered(own, made, tokenizer, f"eval.{name}", source.path)


def rendered(
    dataset: DatasetConfig, examples: list[data.Example], tokenizer: Any, key: str = "dataset", file: str = ""
) -> list[data.Example]:
    """``examples`` as the tokenizer's chat template (or the plain layout) renders them, if the dataset wishes so.

    Texts, which have no prompts at all, are no conversations.
    """
    chat = dataset.chat and any(example.prompt for example in examples)
    return data.through_chat_template(tokenizer, examples, chat_template=chat, turns=dataset.turns, key=key, file=file)


def test_examples(config: Config, name: str, rows: Iterable[data.Row]) -> list[data.Example]:
    """``rows`` as ``eval.<name>`` shows them to the model: by its own templates, else by the dataset's."""
    node, own = config.eval[name], config.dataset
    source = rows_config(node)
    mine = source.prompt is None and source.answer is None  # then the rows are as the dataset's
    classes = node.get("classes") or (own.classes if mine else ())
    prompt = own.prompt if source.prompt is None else source.prompt
    answer = own.answer if source.answer is None else source.answer
    reader = source.reader or (own.reader if mine else None)
    return data.examples(rows, prompt, answer, f"eval.{name}", "", classes, reader, own.missing)


def evaluation_source(config: Config, name: str) -> RowsConfig:
    """The rows of ``eval.<name>``: those of the trial's files, where these stand for the evaluation's hub dataset."""
    source, own = rows_config(config.eval[name]), config.dataset
    if own.path and source.hub and source.hub == own.hub:
        return dataclasses.replace(source, hub=None)
    return source


def same_source(config: Config, name: str) -> bool:
    """Whether the rows of ``eval.<name>`` are of the hub dataset that ``dataset.validation`` names, of another part."""
    hub = config.dataset.validation.hub
    return hub is not None and rows_config(config.eval[name]).hub == hub


def rows_config(node: Mapping[str, Any]) -> RowsConfig:
    """The part of an ``eval`` entry that names its rows."""
    return RowsConfig(**{key: node[key] for key in ROWS_KEYS if key in node})


def one_line(error: BaseException) -> str:
    """What Hydra or OmegaConf found wrong, as one line that names the key and what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if package := PACKAGES.get(error.missing_cfg_file):
            named = re.search(rf"In '{group}/(\w+)'", str(error))  # ours, which begins with the missing one
            return f"{group}={named[1] if named else option}: pip install '{package}'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        return f"{group}={option}: no such option; {suggest(option, list(error.options))}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, InputError):  # raised by a resolver of conf/
            return str(below)
        below = below.__cause__ or below.__context__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        if type(cause).__name__ in ("ValidationError", "ConfigTypeError", "UnsupportedValueType") and (
            kind := _schema_type(cause.full_key)
        ):
            value = getattr(cause, "value", None)
            return f"{cause.full_key}={'null' if value is None else value}: must be {kind}"
        if type(cause).__name__ in ("ConfigAttributeError", "ConfigKeyError"):
            parent = cause.parent_node
            known = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
            return f"{cause.full_key}: no such key; {suggest(str(cause.key), known)}"
        return f"{cause.full_key}: {_first_line(cause)}"
    text = " ".join(str(error).split())
    text = re.sub(r"^In '([\w/]+)': \w+ raised while composing config:", r"\1.yaml:", text)
    text = re.sub(r"full_key: ([\w.]+)", r"(key \1)", text)
    noise = "full_key:|reference_type=|object_type=|To append|Check available"
    return re.sub(rf"\s*({noise}|Set the environment variable|See https?://).*", "", text)


def _schema_type(key: str) -> str | None:
    """The type of a key of the schema, in words; None for a key of a section that is open."""
    kind: Any = Config
    for part in key.split("."):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            return None
        kind = hints[part]
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            if kind is Any:
                return None
            break
    inner = [one for one in typing.get_args(kind) or [kind] if one is not type(None)]
    if dataclasses.is_dataclass(kind) or kind is Any:
        return None
    if isinstance(inner[0], type) and issubclass(inner[0], Enum):
        return "one of " + ", ".join(inner[0].__members__) + (", null" if len(typing.get_args(kind)) > 1 else "")
    return _type_in_words(kind)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- identity --------------------------------------------------------------------------------------


def _rows(config: Config) -> data.Rows:
    """The rows of a local dataset, read once for all points of a sweep."""
    own = config.dataset
    files = [Path(path) for path in (own.path, own.test_path, own.validation.path) if path is not None]
    contents = tuple(fingerprint.file_hash(file) for file in files if file.is_file())
    return _cached_rows(pickle.dumps(config.dataset), config.train.eval_every is not None, contents)


def _test_rows(config: Config) -> data.Rows | None:
    """Of a dataset of the hub the local test rows, where a file of them is given; None without."""
    own = config.dataset
    if own.test_path is None:
        return None
    return data.Rows([], test=data.read_rows(own.test_path, "dataset.test_path", own.encoding))


@lru_cache(maxsize=4)
def _cached_rows(dataset: bytes, validation: bool, _contents: tuple[str, ...]) -> data.Rows:
    return data.load_rows(pickle.loads(dataset), validation=validation)


def _identity(config: Config, rows: data.Rows | None, rule: int = IDENTITY_RULE) -> Identity:
    training = _training(config, rows, rule)
    return Identity(rule, content_hash([training, _evaluating(config, rows, rule)]), content_hash(training))


def _training(config: Config, rows: data.Rows | None, rule: int) -> dict[str, Any]:
    """Everything that changes the trained weights."""
    train = _said(config.train, FIRST_TRAIN_KEYS)
    train.pop("checkpoint_every", None)  # which changes no weight
    train["learning_rate"] *= train.pop("learning_rate_scale")  # only their product matters
    if config.train.epochs is not None:
        train.pop("steps")
    targets = _said(config.targets, FIRST_TARGETS_KEYS)
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


def _said(section: Any, first: tuple[str, ...]) -> dict[str, Any]:
    """A section of the configuration by its keys; one that is not among the ``first`` only where it was changed.

    A key that a later version brings thus leaves the identities of all other trials as they were.
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


def _evaluating(config: Config, rows: data.Rows | None, rule: int) -> dict[str, Any]:
    """Everything else that changes the scores."""
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
    return said | {"path": data.fingerprint(data.read_rows(source.path, encoding=source.encoding))}


def _changes_nothing(option: str, value: Any) -> bool:
    return option in CHANGES_NO_SCORE or (option in NEW_EVAL_OPTIONS and not value)


def _dataset_identity(dataset: DatasetConfig, rows: data.Rows | None, rule: int = IDENTITY_RULE) -> dict[str, Any]:
    said = _said(dataset, FIRST_DATASET_KEYS)
    if rule > 1 and _is_chat(dataset.chat, dataset.reader):
        said["turns"] = dataset.turns
    if rows is None:
        files = {"test_path": dataset.test_path, "validation": dataset.validation.path}
        local = {key: _file_hash(Path(path), rule) for key, path in files.items() if path and rule > 1}
        return said | ({"files": local} if local else {})
    how = {key: value for key, value in said.items() if key not in CHOOSES_ROWS}
    if dataset.missing is not OnMissing.empty:  # the others choose rows
        how.pop("missing", None)
    return how | {part: rows.fingerprints[part] for part in ("train", "validation")}


def model_identity(model: ModelConfig, rule: int = IDENTITY_RULE) -> dict[str, Any]:
    """The base by what it is: a local folder by its files, a hub model by id and revision."""
    from peftsweep.model import source  # imports torch, which `--help` must not

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
    return bool(chat) or reader == CONVERSATIONS


def _adapter_files(path: str | None, rule: int) -> dict[str, str] | None:
    """A saved adapter by its content, wherever it lies, with the base that was kept beside it."""
    if path is None:
        return None
    folder = study.adapter(path)
    if rule == 1:
        return {file.name: _file_hash(file, rule) for file in sorted(folder.glob("*.safetensors"))}
    kept = folder / study.RESIDUAL
    beside = fingerprint.folder_hashes(kept) if kept.is_dir() else {}
    return fingerprint.folder_hashes(folder) | {f"{study.RESIDUAL}/{name}": found for name, found in beside.items()}


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
    """A path, or several, by what is there; what is no local file or folder stays as it is."""
    if isinstance(value, Mapping):
        return {key: _by_content(one) for key, one in value.items()}
    if not isinstance(value, str) or not (place := Path(value).expanduser()).exists():
        return value
    return fingerprint.folder_hashes(place) if place.is_dir() else fingerprint.file_hash(place)


def canonical_name(target: str, rule: int = IDENTITY_RULE) -> str:
    """The one name under which a class or function enters an identity, whichever of its names was given.

    That is the shortest dotted name under which it can be imported; of one that has moved, its first name.
    """
    before = {now: before for before, now in MOVED.items()}
    return _renamed(target, before) if rule == 1 else _renamed(_shortest(target), before | FIRST_NAMES)


@functools.cache
def _shortest(target: str) -> str:
    *packages, name = target.split(".")
    found = pydoc.locate(target)
    for end in range(1, len(packages) + 1):
        if found is not None and getattr(pydoc.locate(".".join(packages[:end])), name, None) is found:
            return ".".join([*packages[:end], name])
    return target


def current_name(target: str) -> str:
    """Where a class or function is now, by any of its names."""
    return _renamed(target, MOVED)


def _renamed(target: str, names: Mapping[str, str]) -> str:
    for before, after in names.items():
        if target == before or target.startswith(f"{before}."):
            return after + target.removeprefix(before)
    return target


def content_hash(content: Any) -> str:
    """A short hash of plain values and enums."""
    return fingerprint.of_values(content)[:IDENTITY_LENGTH]


def _slug(choices: Mapping[str, str], config: Config) -> str:
    rank = f"r{config.method['r']}" if "r" in config.method else ""
    targets = choices["targets"] if choices["targets"] != "default" else ""
    compiled = config.train.compile if config.train.compile != "none" else ""
    parts = [choices["model"], choices["method"], rank, targets, choices["quant"], choices["dataset"], compiled]
    if config.label and any(group.startswith("point") for group in choices):
        parts = [choices["model"], config.label, choices["quant"], choices["dataset"]]
    name = "-".join([*filter(None, parts), f"s{config.seed}"])
    return re.sub(r"[^\w.-]+", "_", name)[:120]
