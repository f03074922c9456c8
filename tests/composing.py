"""What Hydra reads and composes of conf/, kept for all tests and later runs: each of their commands composes thrice."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import omegaconf
import pytest
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig

import hydra_plugins.peftsweep_launcher
from peftsweep import schema
from peftsweep.config import fill
from peftsweep.config.fill import conf_dir
from peftsweep.schema import MISSING

UNCHANGED = ("hydra.conf", "pkg://hydra.conf", conf_dir(), "structured://")  # places of options that no test changes
DECIDES_MORE = ("hydra.searchpath", "hydra.job.")  # keys of Hydra's by which it does more than to put in a value


def fingerprint() -> str:
    """A hash of all that a composition is made of: conf/ and its place, what is registered with Hydra, and Hydra."""
    modules = [Path(module.__file__ or "") for module in (schema, fill, hydra_plugins.peftsweep_launcher)]
    files = [*sorted(Path(conf_dir()).rglob("*.yaml")), *modules, Path(__file__)]
    parts = [conf_dir(), sys.version, hydra.__version__, omegaconf.__version__]
    parts += [f"{file} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class Kept:
    """Bytes by their keys, in this process and, where a folder is given, for all processes that share it."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._here = folder, dict[str, bytes]()

    def get(self, key: str, make: Callable[[], bytes]) -> bytes:
        """What is kept under the key, made where nothing is."""
        if key not in self._here:
            self._here[key] = make() if self._folder is None else self._shared(self._folder, key, make)
        return self._here[key]

    @staticmethod
    def _shared(folder: Path, key: str, make: Callable[[], bytes]) -> bytes:
        file = folder / hashlib.sha256(key.encode()).hexdigest()
        try:
            return file.read_bytes()
        except FileNotFoundError:
            made, part = make(), file.with_suffix(f".{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):  # a run with other versions of Hydra has removed the folder
                part.write_bytes(made)
                part.replace(file)  # whole or not there: another process may read it at any time
            return made


def keep_compositions(patch: pytest.MonkeyPatch, folder: Path | None = None) -> None:
    """Have Hydra read each yaml once, and compose each choice of options once.

    The folder, if any, keeps what is composed for other processes and later runs; it is of one ``fingerprint``.
    """
    Plugins.instance()  # which registers the classes that read options
    for scheme in ("file", "pkg"):
        source = SourcesRegistry.instance().resolve(scheme)
        patch.setattr(source, "load_config", _read_once(source.load_config))
    patch.setattr(defaults_list, "_create_interpolation_map", _where_any(defaults_list._create_interpolation_map))
    patch.setattr(ConfigStore, "__deepcopy__", lambda store, _: store, raising=False)  # for each composition, to read
    patch.setattr(ConfigLoaderImpl, "_load_configuration_impl", _composed_once(ConfigLoaderImpl, Kept(folder)))


def _where_any(make: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """The values that interpolations in a list of defaults may name, only where it has some: a fifth of a composition.

    None of conf/ has; of each other list too Hydra reads them for those alone.
    """

    def values(overrides: Any, defaults: list[Any], self_added: bool) -> DictConfig:
        some = any(one.is_interpolation() for one in defaults)
        return make(overrides, defaults, self_added) if some else DictConfig({})

    return values


def _read_once(read: Callable[[Any, str], ConfigResult]) -> Callable[[ConfigSource, str], ConfigResult]:
    kept: dict[tuple[str, str, str], bytes] = {}

    def load_config(self: ConfigSource, config_path: str) -> ConfigResult:
        if self.path not in UNCHANGED:
            return read(self, config_path)
        key = (self.provider, self.path, config_path)
        if key not in kept:
            kept[key] = pickle.dumps(read(self, config_path))
        found: ConfigResult = pickle.loads(kept[key])
        return found

    return load_config


@functools.lru_cache(maxsize=4096)
def _parsed(word: str) -> Override:
    return OverridesParser.create().parse_overrides([word])[0]


def _composed_once(loader: type[ConfigLoaderImpl], kept: Kept) -> Callable[..., DictConfig]:
    """Hydra's method that keeps what it composes of the chosen options.

    The words that change values are applied by Hydra to a copy, as it does itself after composing. Where there are
    options from elsewhere than conf/, nothing is kept.
    """
    compose = loader._load_configuration_impl

    def load(
        self: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        how = (run_mode, from_shell, validate_sweep_overrides)
        places = {place.path for place in self.config_search_path.get_path()}
        decides_more = any(word.lstrip("+~").startswith(DECIDES_MORE) or MISSING in word for word in overrides)
        if not places <= {*UNCHANGED} or decides_more:
            return compose(self, config_name, overrides, *how)
        parsed = [_parsed(word) for word in overrides]
        if validate_sweep_overrides:
            self.validate_sweep_overrides_legal(parsed, run_mode=run_mode, from_shell=from_shell)
        is_group, kept_overrides = self.repository.group_exists, [one for one in parsed if not one.is_sweep_override()]
        values = [one for one in kept_overrides if isinstance(one.value(), dict) or not is_group(one.key_or_group)]
        groups = [str(one.input_line) for one in kept_overrides if one not in values]
        launchers = sorted(ConfigStore.instance().repo["hydra"]["launcher"])
        # Not by the mode, which decides only whether a group of which none is chosen yet (???) is an error.
        key = repr((config_name, groups, launchers, JobRuntime.instance().conf))
        made = kept.get(key, lambda: pickle.dumps(compose(self, config_name, groups, run_mode, from_shell, False)))
        cfg: DictConfig = pickle.loads(made)
        self._apply_overrides_to_config(values, cfg)
        others = [one for one in parsed if not one.is_hydra_override()]
        cfg.hydra.overrides.hydra = [one.input_line for one in parsed if one.is_hydra_override()]
        cfg.hydra.overrides.task = [one.input_line for one in others]
        cfg.hydra.runtime.cwd = os.getcwd()
        form = cfg.hydra.job.config.override_dirname
        cfg.hydra.job.override_dirname = get_overrides_dirname(others, form.exclude_keys, form.item_sep, form.kv_sep)
        return cfg

    return load
