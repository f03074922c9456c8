"""Check a composed configuration: keys, values, and values that must fit together. Errors are one line with the key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftsweep import limits, options, shorthand
from peftsweep.config import calls
from peftsweep.config.calls import numeric_options
from peftsweep.data import files
from peftsweep.data import rows as data_rows
from peftsweep.errors import InputError, first_line, right_form, suggest, synonyms
from peftsweep.schema import Config, Dtype, Resource, key_types, value_at
from peftsweep.study import rungs, store
from peftsweep.study.record import SECTIONS

PACKAGES = {  # options of Hydra that need a package
    "hydra/launcher/submitit_slurm": "peftsweep[slurm]",
    "hydra/launcher/submitit_local": "peftsweep[slurm]",
    "hydra/launcher/ray": "peftsweep[ray]",
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/sweeper/optuna": "peftsweep[optuna_hydra]",
}
ANY = {
    "model": "model=./FOLDER, or from the hub model=ORG/NAME",
    "dataset": "dataset=FILE.jsonl",
    "price": "price=2.49",
}
LAUNCHER = {
    "workers": 0,
    "devices": None,
    "retries": 0,
    "timeout": None,
    "limit": 1,
    "deadline": None,
    "pack": None,
    "measure": None,
}  # keys of hydra.launcher with their smallest values; None: checked apart
OF_WORKERS = ("timeout", "retries", "devices")  # keys of hydra.launcher that say what is done with worker processes
SWEEP_WIDE_KEYS = (  # keys with one value for all points of a sweep
    *("study", "dry_run", "quiet", "stop_on_failure", "halving", "hydra.launcher"),
    *("hydra.sweeper.max_batch_size", "hydra.sweep.dir"),
)
SEARCHES = (".TuneSweeper", ".LeagueSweeper")  # sweepers that choose trials while they run
PACK = 8  # trials that pack=auto trains at once
OFF = "off"
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
FORMATS = tuple(name for name in Dtype.__members__ if name != Dtype.auto.name)
ALLOWED_WORDS = {
    "quant.bnb_4bit_quant_type": ("nf4", "fp4"),
    "quant.bnb_4bit_compute_dtype": FORMATS,
    "quant.weights": ("int8", "float8", "int4", "int2"),
    "train.autocast": FORMATS,
}


def check_keys(tree: Mapping[str, Any], schema: Any, where: str = "") -> None:
    """Refuse a key that is not in the schema, such as ``+train.learning_rte``."""
    kinds = key_types(schema)
    for key, value in tree.items():
        if key not in kinds:
            raise InputError(f"{where}{key}: no such key; {suggest(str(key), list(kinds))}")
        if dataclasses.is_dataclass(kinds[key]) and isinstance(value, Mapping):
            check_keys(value, kinds[key], f"{where}{key}.")


def check_complete(cfg: DictConfig, schema: Any, where: str = "") -> None:
    """Refuse a configuration that lacks a key, for instance after ``~seed``."""
    for field, kind in key_types(schema).items():
        if field not in cfg.keys():  # noqa: SIM118 ("in cfg" is false for a missing value)
            raise InputError(f"{where}{field}: must be given; it cannot be deleted")
        if dataclasses.is_dataclass(kind) and not OmegaConf.is_missing(cfg, field):
            check_complete(cfg[field], kind, f"{where}{field}.")


def check_values(tree: dict[str, Any]) -> None:
    """Check the words, ranges and names in a configuration.

    Raises:
        InputError: the message names the key and what is allowed.
    """
    for key, allowed in ALLOWED_WORDS.items():
        if (value := value_at(tree, key)) is not None and value not in allowed:
            raise InputError(f"{key}={value}: must be one of {', '.join(allowed)}")
    limits.check(tree, numeric_options(tree))
    if tree["train"]["keep_best"] and tree["train"]["eval_every"] is None:
        raise InputError(
            "train.keep_best=true: needs train.eval_every, the interval of the validations that it compares"
        )
    if tree["train"]["patience"] is not None and tree["train"]["eval_every"] is None:
        raise InputError(
            f"train.patience={tree['train']['patience']}: needs train.eval_every, as it counts validations"
        )
    for key in ("train.best_metric", "halving.metric", "tune.metric"):
        metric = value_at(tree, key) or "loss"
        if metric != "loss" and metric.partition(".")[0] not in tree["eval"]:
            raise InputError(f"{key}={metric}: must be loss or <eval>.<metric> of {', '.join(tree['eval'])}")
    if tree["memory_limit"] is not None:
        size_in_bytes(tree["memory_limit"], "memory_limit")
    for key, name in [("study", tree["study"]), *(("eval", name) for name in tree["eval"])]:
        if not store.is_plain(str(name)):
            raise InputError(
                f'{key}={name}: must be a plain name of at most 100 characters, without any of /\\:*?"<>| and '
                "not beginning with '.'"
            )


def check_halving(config: Config, sweeper: str | None) -> None:
    """Check the keys of halving: a rung must be a step with a validation, so that halving changes no trial."""
    halving, every, by_rows = config.halving, config.train.eval_every, config.halving.resource is Resource.rows
    other = "min_steps" if by_rows else "min_fraction"
    if (value := getattr(halving, other)) is not None:
        raise InputError(f"halving.{other}={value}: must be null with halving.resource={halving.resource.name}")
    if not halving.test and every is None:
        raise InputError("halving.test=false: needs train.eval_every, because the trial ends with a validation")
    if rungs.begins(halving) is None:
        return
    if sweeper not in (None, "grid"):
        raise InputError(f"halving: works only with hydra/sweeper=grid, not with {sweeper}")
    if config.objective is not None:
        raise InputError(
            "objective: is only for hydra/sweeper=optuna_current; halving compares trials by halving.metric"
        )
    if config.train.patience is not None:
        raise InputError(
            "train.patience: must be null with halving.min_steps, because halving itself decides which trials stop"
        )
    if by_rows:
        _check_halving_of_rows(config)
    if halving.min_steps is None:
        return
    if not (every or "").isdigit() or int(every or 1) < 1 or halving.min_steps % int(every or 1):
        raise InputError(f"train.eval_every={every}: must be steps that divide halving.min_steps={halving.min_steps}")
    steps, most = config.train.steps, config.train.steps // halving.factor
    if config.train.epochs is None and steps and halving.min_steps > most:
        text = f"halving.min_steps={halving.min_steps}: must be at most {most}"
        raise InputError(f"{text}, train.steps={steps} divided by halving.factor={halving.factor}")


def _check_halving_of_rows(config: Config) -> None:
    part, factor = config.halving.min_fraction, config.halving.factor
    if config.train.epochs is None:
        raise InputError("halving.resource=rows: needs train.epochs, so that fewer rows are fewer steps")
    if part is not None and part * factor > 1:
        raise InputError(f"halving.min_fraction={part}: must be at most {1 / factor:.4g}, 1 / halving.factor")


def check_objective(config: Config) -> None:
    """Refuse an ``objective`` that cannot be a column, as far as this is known without a record."""
    objective = config.objective
    columns = [objective] if isinstance(objective, str) else [] if objective is None else objective
    if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
        raise InputError(f"objective={objective}: must be a column of the record, or a list of columns")
    for column in columns:
        section, *names = column.split(".")
        if section not in SECTIONS or not names:
            raise InputError(f"objective={column}: must be a column of {', '.join(SECTIONS)}")
        if section == "eval_info" and names[0] not in config.eval:
            raise InputError(
                f"objective={column}: eval_info.{names[0]} is not evaluated; {suggest(names[0], list(config.eval))}"
            )


def check_expanded(cfg: DictConfig, given: Iterable[str]) -> None:
    """Refuse a composed point whose options sweep further keys: it would be run as one unwanted trial.

    ``given`` are the keys in the words of the point.

    Raises:
        InputError: the line names the axes.
    """
    if str(OmegaConf.select(cfg, "hydra.sweeper._target_")).endswith(SEARCHES):
        name = cfg.hydra.runtime.choices.sweep
        raise InputError(f"sweep={name}: is more than one trial; give it on the command line")
    axes = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    lacking = [name for name in (str(key).lstrip("+") for key in axes) if name not in given]
    if lacking:
        options = [f"{group}={option}" for group, option in cfg.hydra.runtime.choices.items() if group == "sweep"]
        raise InputError(
            f"{', '.join(options)}: sweeps {', '.join(lacking)}, which is more than one trial; give it on the command "
            "line, with hydra/sweeper=grid"
        )


def check_unused(words: Sequence[str]) -> None:
    """Refuse keys of a search in the command of a grid, which does not read them.

    Raises:
        InputError: the line names the key.
    """
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key.partition(".")[0] in ("budget", "tune", "league"):
            name = "league" if key.startswith("league") else "tune"
            raise InputError(f"{key}: has an effect only in a search; add sweep={name}")
        if key == "experiments" and not any(re.match(r"\+?sweep=.*(experiments|glob)", other) for other in words):
            raise InputError(f"{word}: has an effect only with sweep=experiments; add it")


def check_joinable(word: str, sweeps: Mapping[str, DictConfig]) -> None:
    """Refuse to join options of ``sweep`` that differ in a key with one value for the whole sweep.

    Raises:
        InputError: the line names the key and the values, or there is no option.
    """
    if not sweeps:
        raise InputError(f"{word}: matches no option of sweep")
    for key in SWEEP_WIDE_KEYS:
        (first, value), *others = ((option, _plain(cfg, key)) for option, cfg in sweeps.items())
        for option, other in others:
            if other != value:
                raise InputError(
                    f"{word}: cannot be joined, because {key} has one value for the whole sweep, but is {value} in "
                    f"{first} and {other} in {option}; give {key} on the command line"
                )


def _plain(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value, enum_to_str=True) if OmegaConf.is_config(value) else value


def placement(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``hydra.launcher`` in the form of ``workers.Options``.

    Raises:
        InputError: a key is unknown, or a value is out of its range.
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
    for key in filter(options.get, OF_WORKERS if options.get("workers") == 0 else ()):
        raise InputError(f"hydra.launcher.{key}={options[key]}: only with workers; hydra.launcher.workers=0 has none")
    return dict(options) | times | _packing(options.get("pack", OFF), options.get("measure"))


def _is_number(device: Any) -> bool:
    return str(device).isdecimal() and not isinstance(device, bool)


def _packing(size: Any, measure: Any) -> dict[str, Any]:
    """``hydra.launcher.pack`` and ``measure`` in the form of ``workers.Options``."""
    if measure not in (None, "alone"):
        raise InputError(f"hydra.launcher.measure={measure}: must be alone or null")
    if size in (OFF, None) or size is False:  # yaml reads an unquoted off as false
        number = None
    elif size == "auto":
        number = PACK
    elif isinstance(size, int) and not isinstance(size, bool) and 2 <= size <= limits.LARGEST:
        number = size
    else:
        raise InputError(f"hydra.launcher.pack={size}: must be auto, off or a number of trials, at least 2")
    return {"pack": number, "probe": size == "auto", "measure": measure == "alone"}


def seconds(text: str | float | None, key: str) -> float | None:
    """``2h``, ``30m``, ``90s`` or a number, in seconds; None stays None.

    Raises:
        InputError: ``text`` is not a time.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", str(text).strip())
    length = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0
    if not 0 < length <= limits.LARGEST:
        raise InputError(f"{key}={text}: must be a time such as 90s, 30m, 2h or 1d, of at most {limits.LARGEST} s")
    return length


def size_in_bytes(text: str, key: str) -> float:
    """``24GB`` or ``512 MiB`` in bytes.

    Raises:
        InputError: ``text`` is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise InputError(f"{key}={text}: must be a size such as 24GB; units: {', '.join(UNITS)}")
    return float(found[1]) * UNITS[found[2]]


def check_warmup(config: Config, rows: data_rows.Rows | None) -> None:
    """Refuse a warm-up that is not shorter than the training, if its length is known without tokenising."""
    from peftsweep.training import length, optimizer  # imports torch, which `--help` must not

    if config.adapter.path is None and (rows is not None or config.train.epochs is None):
        optimizer.check_warmup(
            config.train, length.total_steps(config.train, len(rows.train) if rows is not None else 1)
        )


def check_files(config: Config) -> None:
    """Refuse a missing file or an unknown encoding, even if this trial would not read the file."""
    own = config.dataset
    named = {"path": own.path, "test_path": own.test_path, "validation.path": own.validation.path}
    for key, path in named.items():
        if path is not None and not files.matching(path):
            raise InputError(f"dataset.{key}={path}: {files.no_file(Path(path))}")
    encodings = {"dataset.encoding": own.encoding, "dataset.validation.encoding": own.validation.encoding}
    encodings |= {f"eval.{name}.encoding": node.get("encoding") for name, node in config.eval.items()}
    for key, encoding in encodings.items():
        if encoding is not None and not _is_encoding(encoding):
            raise InputError(f"{key}={encoding}: no such encoding; must be one of Python's, such as utf-8 or cp1252")


def _is_encoding(name: str) -> bool:
    try:
        b"a".decode(name)
    except UnicodeDecodeError:  # such as utf-16, which needs two bytes
        return True
    except (LookupError, ValueError):
        return False
    return True


# ---- errors of Hydra -----------------------------------------------------------------------------------


def one_line(error: BaseException, own_folders: Iterable[Path] = ()) -> str:
    """An error of Hydra or OmegaConf as one line that names the key and what is allowed.

    ``own_folders`` are those of ``--config-dir``, whose options are listed too.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if package := PACKAGES.get(error.missing_cfg_file):
            named = re.search(rf"In '{group}/(\w+)'", str(error))  # our option, which is based on the missing one
            return f"{group}={named[1] if named else option}: pip install '{package}'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and (path := _path_in_yaml(error)):
        return path
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        # For an option in a list, such as eval=[a,b], Hydra does not list the options.
        known = list(error.options or ()) or options.names(group, [Path(options.conf_dir()), *own_folders])
        if error.options is not None or known:
            own = f"; for your own: {ANY[group]}" if group in ANY else ""
            return f"{group}={option}: no such option; {suggest(option, known)}{own}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, InputError):  # raised by a resolver of conf/
            return str(below)
        below = below.__cause__ or below.__context__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        key = re.sub(r"\[(\d+)\]", r".\1", cause.full_key)  # OmegaConf writes an index of a list in brackets
        if type(cause).__name__ in ("ValidationError", "ConfigTypeError", "UnsupportedValueType") and (
            kind := calls.schema_type(key)
        ):
            value = getattr(cause, "value", None)
            meant = synonyms(str(value), kind.removeprefix("one of ").split(", "))
            hint = f"; did you mean '{meant[0]}'?" if meant else right_form(key, value, kind)
            return f"{key}={'null' if value is None else value}: must be {kind}{hint}"
        if type(cause).__name__ in ("ConfigAttributeError", "ConfigKeyError"):
            parent = cause.parent_node
            known = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
            return f"{cause.full_key}: no such key; {calls.suggest_key(str(cause.key), known)}"
        if re.match("Cannot (assign|merge)|Invalid type assigned|Object of unsupported type", first_line(cause)):
            return f"{cause.full_key}: is a section; give keys with their values: '{cause.full_key}={{KEY: VALUE}}'"
        return f"{cause.full_key}: {first_line(cause)}"
    text = " ".join(str(error).split())
    text = re.sub(r"^In '([\w/]+)': \w+ raised while composing config:", r"\1.yaml:", text)
    text = re.sub(r"full_key: ([\w.]+)", r"(key \1)", text)
    noise = "full_key:|reference_type=|object_type=|To append|Check available"
    return re.sub(rf"\s*({noise}|Set the environment variable|See https?://).*", "", text)


def _path_in_yaml(error: MissingConfigException) -> str | None:
    """The message for a path in the defaults of a yaml, which must name options; None for another error."""
    group, _, name = str(error.missing_cfg_file).partition("/")
    if group not in shorthand.GROUPS or not shorthand.looks_like_path(name):
        return None
    where = "works on the command line and in the params of a sweep, not in the defaults of a yaml or another sweeper"
    key = shorthand.GROUPS[group]
    return f"{group}={name}: {where}; give {key} there"
