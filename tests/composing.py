"""What Hydra reads and composes of conf/, kept for all tests of a process: each of their commands composes thrice."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig

from peftsweep.config.fill import conf_dir
from peftsweep.schema import MISSING

UNCHANGED = ("hydra.conf", "pkg://hydra.conf", conf_dir(), "structured://")  # places of options that no test changes
DECIDES_MORE = ("hydra.searchpath", "hydra.job.")  # keys of Hydra's by which it does more than to put in a value


def keep_compositions(patch: pytest.MonkeyPatch) -> None:
    """Have Hydra read each yaml once, and compose each choice of options once."""
    Plugins.instance()  # which registers the classes that read options
    for scheme in ("file", "pkg"):
        source = SourcesRegistry.instance().resolve(scheme)
        patch.setattr(source, "load_config", _read_once(source.load_config))
    patch.setattr(ConfigStore, "__deepcopy__", lambda store, _: store, raising=False)  # for each composition, to read
    patch.setattr(ConfigLoaderImpl, "_load_configuration_impl", _composed_once(ConfigLoaderImpl))


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


def _composed_once(loader: type[ConfigLoaderImpl]) -> Callable[..., DictConfig]:
    """Hydra's method that keeps what it composes of the chosen options.

    The words that change values are applied by Hydra to a copy, as it does itself after composing. Where there are
    options from elsewhere than conf/, nothing is kept.
    """
    compose, kept = loader._load_configuration_impl, dict[str, bytes]()

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
        parsed = OverridesParser.create().parse_overrides(overrides)
        if validate_sweep_overrides:
            self.validate_sweep_overrides_legal(parsed, run_mode=run_mode, from_shell=from_shell)
        is_group, said = self.repository.group_exists, [one for one in parsed if not one.is_sweep_override()]
        values = [one for one in said if isinstance(one.value(), dict) or not is_group(one.key_or_group)]
        groups = [str(one.input_line) for one in said if one not in values]
        launchers = sorted(ConfigStore.instance().repo["hydra"]["launcher"])
        # Not by the mode, which decides only whether a group of which none is chosen yet (???) is an error.
        key = repr((config_name, groups, launchers, JobRuntime.instance().conf))
        if key not in kept:
            kept[key] = pickle.dumps(compose(self, config_name, groups, run_mode, from_shell, False))
        cfg: DictConfig = pickle.loads(kept[key])
        self._apply_overrides_to_config(values, cfg)
        others = [one for one in parsed if not one.is_hydra_override()]
        cfg.hydra.overrides.hydra = [one.input_line for one in parsed if one.is_hydra_override()]
        cfg.hydra.overrides.task = [one.input_line for one in others]
        cfg.hydra.runtime.cwd = os.getcwd()
        form = cfg.hydra.job.config.override_dirname
        cfg.hydra.job.override_dirname = get_overrides_dirname(others, form.exclude_keys, form.item_sep, form.kv_sep)
        return cfg

    return load
