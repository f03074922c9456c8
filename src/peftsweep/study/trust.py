"""Limits for records and other files that may come from somebody else: values are text, and only known code is called.

A configuration may name code (``_target_``, an optimizer, a reader of rows), which is imported and called. A yaml or a
command line of the user may name any code; a record, an adapter's folder or an experiment's file may name only code
that is listed here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from peftsweep.errors import InputError

CODE = ("_target_", "optimizer", "generator", "reader")  # keys whose values name code
# Keys by which a library loads code or writes a file, with a test whether a value does so.
LEADS_TO_CODE: dict[str, Callable[[Any], bool]] = {
    "attn_implementation": lambda given: "/" in str(given),  # a kernel of the hub, which is downloaded and run
    "trust_remote_code": bool,
    "megatron_core": lambda given: given != "megatron.core",  # a module that PEFT imports
    "include_path": bool,  # yamls of the harness, whose !function names a file beside them
    "tasks": lambda given: (
        isinstance(given, list) and any(isinstance(one, Mapping) for one in given)
    ),  # the harness runs the templates of a task
    **dict.fromkeys(("cache_file", "covariance_file"), bool),  # PEFT writes it
}
INTERPOLATION = re.compile(r"(\\*)\$\{")
LONGEST = 100  # characters of a name, in a message
PACKAGE = re.compile(r"# @package (\w+)")
# Optimizers of torch, bitsandbytes and PEFT.
OPTIMIZERS = re.compile(r"\w+|torch\.optim\.\w+|bitsandbytes\.optim\.\w+|peft\.optimizers\.create_\w+_optimizer")


def as_text(value: Any) -> Any:
    """``value`` with every ``${`` escaped, so that OmegaConf reads it as text."""
    if isinstance(value, Mapping):
        return {key: as_text(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_text(part) for part in value]
    return INTERPOLATION.sub(lambda found: found[1] * 2 + r"\${", value) if isinstance(value, str) else value


def names(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each dotted key of ``tree`` that names code, with the name."""
    if isinstance(tree, list | tuple):
        tree = {str(number): part for number, part in enumerate(tree)}
    if not isinstance(tree, Mapping):
        return
    for name, value in tree.items():
        here = f"{key}.{name}" if key else str(name)
        if value is not None and _is_code(str(name), value):
            yield here, str(value)
        else:
            yield from names(value, here)


def _is_code(key: str, value: Any) -> bool:
    if key in CODE:
        return not isinstance(value, Mapping)
    return key in LEADS_TO_CODE and LEADS_TO_CODE[key](value)


def check(tree: Mapping[str, Any], conf: Path, own: Container[str], source: str) -> None:
    """Refuse a configuration, read from ``source``, with code that neither peftsweep offers nor the user has named.

    ``conf`` is the folder of our yamls, ``own`` the names in the user's own configuration. The named code is not
    imported.

    Raises:
        InputError: the message gives the key and the name.
    """
    for key, name in names(tree):
        if name not in own and not _is_offered(key, name, conf):
            raise InputError(
                f"{source}: names {name[:LONGEST]} in {key}, which is code outside of peftsweep and would be run; "
                f"if you trust it, give {key}={name[:LONGEST]} on the command line, or trust=true"
            )


def _is_offered(key: str, name: str, conf: Path) -> bool:
    section = key.partition(".")[0]
    if (section, key.rpartition(".")[2], name) in _offered(conf):
        return True
    package, _, kind = name.rpartition(".")
    if section in ("method", "method_inputs", "quant") and re.fullmatch(r"[\w.]+", name):
        library = "transformers" if section == "quant" else "peft"
        return package.partition(".")[0] == library and kind in _configs(library)
    return key == "train.optimizer" and OPTIMIZERS.fullmatch(name) is not None


@functools.cache
def _offered(conf: Path) -> frozenset[tuple[str, str, str]]:
    """(section, key, name) of all code that our yamls name."""
    found = set()
    for file in conf.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        package = PACKAGE.match(text)
        section = package[1] if package else file.relative_to(conf).parts[0]
        tree = yaml.safe_load(text) or {}
        for key, name in names(tree if section == "_global_" else {section: tree}):
            found.add((key.partition(".")[0], key.rpartition(".")[2], name))
    return frozenset(found)


@functools.cache
def _configs(library: str) -> frozenset[str]:
    """The names of the library's configuration classes: of PEFT's methods, of transformers' quantisations."""
    if library == "peft":
        import peft

        return frozenset(name for name in dir(peft) if name.endswith("Config")) | {"KasaConfig", "BdLoraConfig"}
    from transformers.utils import quantization_config

    return frozenset(
        name
        for name, kind in vars(quantization_config).items()
        if isinstance(kind, type) and issubclass(kind, quantization_config.QuantizationConfigMixin)
    )
