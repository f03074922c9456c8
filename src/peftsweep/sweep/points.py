"""Make the trial of each point of a sweep; what several points have in common is composed and checked once."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftsweep.config import checks
from peftsweep.config import compose as configuration
from peftsweep.config.compose import KEYS_THAT_DECIDE_OTHERS, SOURCES, Filled, Trial
from peftsweep.config.fill import TEMPLATE
from peftsweep.schema import value_at

PLAIN = (bool, int, float, str, type(None))
NAME = re.compile(r"\w+(\.\w+)*")
RENAMED = ("_target_", "optimizer")  # keys whose values may be former names
INTERPOLATION, RESOLVER = "${", re.compile(r"\$\{\s*([\w.]+)\s*:")
NAME_IN_BRACKETS = re.compile(r"\[['\"]?(\w+)['\"]?\]")
REFERENCE = re.compile(r"[A-Za-z_][\w.]*")
COMPUTED_NAME = re.compile(r"\$\{[^{}:]*\$\{")  # ${a.${b}}
PURE_RESOLVERS = (
    "mul",
    "share",
    "choose",
    "folders",
    "oc.env",
    "now",
)  # resolvers that read only what their arguments name
ANY = ""  # stands for every name


class Points:
    """The points of a sweep as trials, each equal to ``compose.trial`` of Hydra's composition of its words.

    Hydra composes once for each choice of groups. Points that differ only in plain values from which no other value
    follows are resolved once. Points that differ only in the seed are also checked once.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader, self._master = _reading_once(loader), master
        self._parser = OverridesParser.create(config_loader=loader)
        self._parsed: dict[str, Override] = {}
        # No group has a dot in its name; Hydra's answer takes 20 ms.
        self._is_group = functools.cache(lambda key: "." not in key and bool(self._loader.get_group_options(key)))
        self._bases: dict[tuple[str, ...], _Base] = {}
        self._families: dict[tuple[Any, ...], _Family] = {}

    def trial(self, words: Sequence[str]) -> Trial:
        """The trial of a point.

        Raises:
            InputError: a value of the point is wrong.
            HydraException, OmegaConfBaseException: the point cannot be composed.
        """
        groups, values = self._parse(words)
        own = self._own(groups, values)
        key = (tuple(word for word in words if word not in own), tuple(own.values()))
        if key not in self._families:
            point, choices = self.compose(words)
            self._families[key] = _Family(
                point, configuration.filled(configuration.copied(point), choices, list(words))
            )
        try:
            return self._families[key].member({name: values[word].value() for word, name in own.items()}, words)
        except OmegaConfBaseException:
            self.compose(words)  # raises Hydra's own message
            raise

    def compose(self, words: Sequence[str]) -> tuple[DictConfig, dict[str, str | None]]:
        """The configuration of a point, without Hydra's own node, and the option that it chooses in each group."""
        groups, values = self._parse(words)
        try:
            if not all(map(_is_change, values.values())):
                raise ValueError("only Hydra itself can add and delete keys")
            base = self._base(groups)
            point = configuration.copied(base.config)
            for word in words:
                if word in values:
                    OmegaConf.update(point, values[word].key_or_group, values[word].value())
        except (OmegaConfBaseException, ValueError):
            base = _Base(self._loader.load_sweep_config(self._master, list(words)))
            point = base.config
        checks.check_expanded(base.whole, [self._parsed[word].key_or_group for word in words])
        return point, dict(base.whole.hydra.runtime.choices)

    def _parse(self, words: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Override]]:
        """The words that choose options of groups, and the other words, parsed."""
        for word in words:
            if word not in self._parsed:
                (self._parsed[word],) = self._parser.parse_overrides([word])
        groups = tuple(word for word in words if self._chooses(self._parsed[word]))
        return groups, {word: self._parsed[word] for word in words if word not in groups}

    def _chooses(self, override: Override) -> bool:
        """Whether a word chooses an option of a group, and not a dict of values for it (``train={steps: 3}``)."""
        return self._is_group(override.key_or_group) and not isinstance(override.value(), dict)

    def _base(self, groups: tuple[str, ...]) -> _Base:
        if groups not in self._bases:
            self._bases[groups] = _Base(self._loader.load_sweep_config(self._master, list(groups)))
        return self._bases[groups]

    def _own(self, groups: tuple[str, ...], values: Mapping[str, Override]) -> dict[str, str]:
        """The words that only replace a plain value from which no other value follows; each with its key."""
        if not all(map(_is_change, values.values())):
            return {}
        base = self._base(groups)
        counts = Counter(override.key_or_group for override in values.values())
        if base.reads_files or not counts.keys().isdisjoint(SOURCES):
            return {}
        read = [name for word in values for name in _names_read(word)]
        plain_values = {}
        for word, override in values.items():
            key = override.key_or_group
            given_once = counts[key] == 1 and not any(_overlap(key, other) for other in counts if other != key)
            if (
                given_once
                and _is_plain(override.value())
                and base.decides_nothing(key)
                and not _any_overlaps(key, read)
            ):
                plain_values[word] = key
        return plain_values


def _reading_once(loader: ConfigLoader) -> ConfigLoader:
    """``loader``, but it reads and parses each yaml only once, not for each composition: half of Hydra's time."""
    own: Any = copy.copy(loader)
    own.repository = _ParsedOnce(own.repository.get_sources(), {})
    found: ConfigLoader = own
    return found


class _ParsedOnce(ConfigRepository):
    """Hydra's options. A composition changes the nodes that it gets, so that each gets its own copies."""

    def __init__(self, sources: list[Any], parsed: dict[str, bytes]) -> None:
        self.sources, self._parsed = sources, parsed

    def __deepcopy__(self, _: Any) -> _ParsedOnce:
        """Hydra copies the repository for each composition, because ``hydra.searchpath`` may add other options."""
        return _ParsedOnce(self.sources, self._parsed)

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self._parsed = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._parsed:
            self._parsed[config_path] = pickle.dumps(super().load_config(config_path))
        found: ConfigResult | None = pickle.loads(self._parsed[config_path])
        return found


class _Base:
    """A configuration that Hydra has composed, for one choice of groups."""

    def __init__(self, whole: DictConfig) -> None:
        self.whole = whole
        self.config = configuration.copied(whole)  # without Hydra's own node
        OmegaConf.set_struct(self.config, False)
        self.config.pop("hydra", None)
        OmegaConf.set_struct(self.config, True)
        self._tree = OmegaConf.to_container(self.config, enum_to_str=True)
        self._read = [name for text in _texts(self._tree) for name in _names_read(text)]
        self._known: dict[str, bool] = {}
        self.reads_files = any(value_at(self._tree, key) is not None for key in SOURCES)

    def decides_nothing(self, key: str) -> bool:
        """Whether ``key`` has a plain value from which no other value follows."""
        if key not in self._known:
            decides = (
                any(_overlap(key, other) for other in KEYS_THAT_DECIDE_OTHERS) or key.rpartition(".")[2] in RENAMED
            )
            plain = NAME.fullmatch(key) and not TEMPLATE.fullmatch(key)
            plain = plain and isinstance(value_at(self._tree, key, default=()), PLAIN)
            self._known[key] = bool(plain) and not decides and not _any_overlaps(key, self._read)
        return self._known[key]


class _Family:
    """Points that differ only in plain values from which no other value follows."""

    def __init__(self, point: DictConfig, first: Filled) -> None:
        self._point, self._first = point, first
        self._checked: dict[tuple[Any, ...], Trial] = {}  # by all values except the seed

    def member(self, values: Mapping[str, Any], words: Sequence[str]) -> Trial:
        """The trial with these values in place of the first point's.

        Raises:
            OmegaConfBaseException: a value does not have the type of its key.
            InputError: a value is wrong.
        """
        typed = {}
        for key, value in values.items():
            OmegaConf.update(self._point, key, value)
            typed[key] = OmegaConf.select(self._point, key)  # of the key's type
        others = tuple((key, type(value), value) for key, value in typed.items() if key != "seed")
        if others in self._checked:
            return configuration.with_seed(self._checked[others], typed["seed"], list(words))
        config, tree = self._first.config, self._first.tree
        for key, value in typed.items():
            config = _put(config, key.split("."), value)
            tree = _put(tree, key.split("."), value.name if isinstance(value, Enum) else value)
        filled = dataclasses.replace(
            self._first, config=configuration.with_plain(config, tree), tree=tree, overrides=list(words)
        )
        trial = configuration.checked(filled)
        if "seed" in typed:
            self._checked[others] = trial
        return trial


def _is_change(override: Override) -> bool:
    """Whether a word changes the value of an existing key that is not Hydra's."""
    return override.type is OverrideType.CHANGE and override.package is None and not override.is_hydra_override()


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) and not (isinstance(value, str) and (INTERPOLATION in value or value == "???"))


def _put(node: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of ``node`` (nested dataclasses and dicts) with ``value`` at ``path``; all other values are shared."""
    if not path:
        return value
    name, *rest = path
    if isinstance(node, Mapping):
        return {**node, name: _put(node[name], rest, value)}
    return dataclasses.replace(node, **{name: _put(getattr(node, name), rest, value)})


def _texts(tree: Any) -> Iterator[str]:
    """The interpolations among the values of ``tree``."""
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(value)
    elif isinstance(tree, str) and INTERPOLATION in tree:
        yield tree


def _names_read(text: str) -> list[str]:
    """The keys that an interpolation may read; for a relative interpolation the last parts of the key."""
    if INTERPOLATION not in text:
        return []
    if COMPUTED_NAME.search(text) or not set(RESOLVER.findall(text)) <= set(PURE_RESOLVERS):
        return [ANY]
    dotted = NAME_IN_BRACKETS.sub(r".\1", text)
    return [name.strip(".") for name in REFERENCE.findall(dotted)]


def _any_overlaps(key: str, read: Iterable[str]) -> bool:
    return any(name == ANY or _overlap(key, name) or f".{name}." in f".{key}." for name in read)


def _overlap(key: str, other: str) -> bool:
    """Whether the keys are equal, or one is a section that contains the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
