"""The reference: each key, option, column, exit code and public name, with its sentence from its one source.

Sentences are the comments of schema.py and conf/, the help texts of PEFT's configuration classes, docstrings, and
meanings.py for what has none of these. ``peftsweep --help KEY`` shows one key, and ``reference_pages`` writes all.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import pydoc
import re
import tokenize
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from peftsweep import limits, schema
from peftsweep.config import calls, fill
from peftsweep.config.experiment import ORIGIN
from peftsweep.errors import InputError, suggest
from peftsweep.reference import meanings

NOTE = re.compile(r"^ *(?:- )?(?P<key>[\w.]+):(?: .*?)?\s+# (?P<text>.*)$")
CONTINUED_COMMENT = re.compile(r"^ {20,}# (?P<text>.*)$")
CALLED = ("quant", "inference", "profiler", "tracker")  # groups whose options name a class or function
OPEN_SECTIONS = ("eval", "method_setup")


@dataclass(frozen=True)
class Key:
    """One key: what it may be, its default, and what it is."""

    name: str
    type: str
    allowed: str
    default: str
    sentence: str

    def __str__(self) -> str:
        kind = ", ".join(part for part in (self.type, self.allowed) if part)
        return f"{self.name}: {kind}; default {self.default}\n  {self.sentence}"


# ---- where the sentences are -----------------------------------------------------------------------


@functools.cache
def _comments_of_schema() -> dict[tuple[str, str], str]:
    """(class, field) of schema.py -> the comment behind it."""
    source = inspect.getsource(schema)
    notes = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        (node.name, field.target.id): notes.get(field.end_lineno or 0, "")
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


@functools.cache
def _comments_of_yaml(file: Path) -> dict[str, str]:
    """Keys of a yaml, without those above them, with the comments behind them, of one line or more."""
    found: dict[str, str] = {}
    last = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if match := NOTE.match(line):
            last = match["key"]
            found[last] = match["text"].strip()
        elif (match := CONTINUED_COMMENT.match(line)) and last:
            found[last] += " " + match["text"].strip()
        else:
            last = ""
    return found


def sentence_of_option(file: Path) -> str:
    """The description of an option: the comment at the head of its yaml."""
    lines = file.read_text(encoding="utf-8").splitlines()
    head: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            head.append(line.removeprefix("#").strip())
    return " ".join(head)


def options(group: str, own: Sequence[Path] = ()) -> dict[str, str]:
    """The options of a group with their sentences, those of the folders ``own`` included."""
    files = [file for folder in _folders(own) for file in sorted((folder / group).glob("*.yaml"))]
    return {file.stem: sentence_of_option(file) or _of_point(file) for file in files}


def _folders(own: Sequence[Path]) -> list[Path]:
    return [Path(fill.conf_dir()), *own]


def _of_point(file: Path) -> str:
    """The words and numbers that a named point sets; most points have no comment of their own."""
    tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    groups = [
        f"{key.split('/')[-1]}={option}"
        for one in tree.get("defaults", [])
        if isinstance(one, dict)
        for key, option in one.items()
    ]
    method = tree.get("method") or {}
    rate = (tree.get("train") or {}).get("learning_rate")
    kind = str(method.get("_target_", "")).rpartition(".")[2]
    settings = [
        f"{key}={value}" for key, value in method.items() if isinstance(value, int | float | str) and key != "_target_"
    ]
    return ", ".join([*groups, *filter(None, [kind]), *settings, *([f"learning rate {rate:g}"] if rate else [])])


def groups(own: Sequence[Path] = ()) -> list[str]:
    """The groups of conf/ and of the folders ``own``, those of Hydra's included, that have options."""
    conf = _folders(own)
    folders = {file.parent.relative_to(top).as_posix() for top in conf for file in top.rglob("*.yaml")} - {"."}
    return sorted(folder for folder in folders if not folder.endswith("/from"))


# ---- keys ------------------------------------------------------------------------------------------


def schema_keys() -> list[Key]:
    """The keys that every trial has."""
    return list(_keys_of(schema.Config, ""))


def _keys_of(kind: Any, above: str) -> Iterator[Key]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = above + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys_of(hints[field.name], f"{name}.")
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        meaning = _comments_of_schema()[kind.__name__, field.name]
        words = (above[:4] != "eval" and calls.schema_type(name)) or calls.type_in_words(hints[field.name])
        words = "anything" if words == "Any" else words
        yield Key(name, words, _allowed(name, hints[field.name]), shown(default), meaning)


def _allowed(name: str, hint: Any, option: limits.Option | None = None) -> str:
    if not calls.number_types(hint):
        return ""
    span = limits.allowed(name, option)
    return str(span) if span != limits.ANY else ""


def shown(value: Any) -> str:
    """A default as a yaml would hold it."""
    if value is None:
        return "null"
    if value is schema.MISSING or value is dataclasses.MISSING or value is inspect.Parameter.empty:
        return "must be given"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(one)}" for key, one in value.items()) + "}"
    if inspect.isfunction(value):
        return str(value.__name__)
    return str(getattr(value, "name", value))


def called_keys(prefix: str, target: str, notes: Mapping[str, str], values: Mapping[str, Any]) -> list[Key]:
    """The arguments of a class or function, as keys; ``values`` and ``notes`` are values and comments of a yaml."""
    function: Any = pydoc.locate(target)
    hints, numbers = calls.argument_types(function), calls.numbers_taken(function)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in meanings.PROVIDED or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        key = f"{prefix}.{name}"
        meaning = notes.get(name) or help_of(function, name) or meanings.key_meaning(key)
        hint = hints.get(name, Any)
        default = values.get(name, parameter.default)
        words = calls.type_in_words(hint) if name in hints else ""
        found.append(Key(key, words, _allowed(key, hint, numbers.get(name)), shown(default), meaning))
    return found


def help_of(config: Any, name: str) -> str:
    """The first sentence of the help of a field of PEFT's class."""
    fields = {field.name: field for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else {}
    text = " ".join(str(fields[name].metadata.get("help", "")).split()) if name in fields else ""
    return re.split(r"(?<=[^.][.!])\s+(?=[A-Z`'(])", text)[0]


def section_keys(group: str) -> dict[str, list[Key]]:
    """Target -> its keys, of a group whose options name a class or function, or of ``eval`` and ``method_setup``."""
    found: dict[str, list[Key]] = {}
    tree: dict[str, Any]
    folder = Path(fill.conf_dir()) / ("method" if group == "method_setup" else group)
    for file in sorted(folder.rglob("*.yaml")):
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        node = tree.get(group, {} if group == "method_setup" else tree) or {}
        target = node.get("_target_")
        if target is None or target in found:
            continue
        prefix = "eval.<name>" if group == "eval" else group
        values = {} if group == "eval" else node
        found[target] = called_keys(prefix, target, _comments_of_yaml(file), values)
    return found


def rows_keys() -> list[Key]:
    """The keys of an evaluation that name its rows."""
    return list(_keys_of(schema.RowsConfig, "eval.<name>."))


def hydra_keys(group: str) -> dict[str, list[Key]]:
    """Option -> its keys, of ``hydra/launcher`` and ``hydra/sweeper``."""
    found = {}
    for file in sorted((Path(fill.conf_dir()) / group).glob("*.yaml")):
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        notes = _comments_of_yaml(file)
        section = group.replace("/", ".")
        keys = []
        for name, value in _leaves(tree):
            note = notes.get(name.split(".")[-1]) or notes.get(name.split(".")[0], "")
            keys.append(Key(f"{section}.{name}", "", _span(group, name), shown(value), note))
        found[file.stem] = keys
    return found


def _span(group: str, name: str) -> str:
    span = limits.allowed(f"{group.replace('/', '.')}.{name}")
    return "" if span == limits.ANY else str(span)


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if name in ("_target_", "_recursive_", "defaults"):
            continue
        if isinstance(value, dict) and value and above + name != "additional_parameters":
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def method_keys() -> dict[str, tuple[list[str], list[Key]]]:
    """PEFT's configuration class -> the options of ``method`` that are of it, and its keys."""
    chosen: dict[str, list[str]] = {}
    for name, node in _methods().items():
        if "_target_" in node:
            chosen.setdefault(node["_target_"], []).append(name)
    found = {}
    for target, names in sorted(chosen.items()):
        keys = called_keys("method", target, {}, {})
        found[target] = names, [key for key in keys if key.name.removeprefix("method.") not in ORIGIN]
    return found


@functools.cache
def _methods() -> dict[str, dict[str, Any]]:
    """The ``method`` section of each yaml in conf/method, merged with that of the yaml it is based on."""
    folder = Path(fill.conf_dir()) / "method"

    def load(name: str) -> dict[str, Any]:
        tree = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        above = [load(other) for other in tree.get("defaults", []) if isinstance(other, str) and other != "_self_"]
        return {key: value for node in (*above, tree.get("method") or {}) for key, value in node.items()}

    return {file.stem: load(file.stem) for file in sorted(folder.glob("*.yaml"))}


def light_keys() -> dict[str, Key]:
    """The keys that need no import of torch, by name: all but the arguments of classes and functions."""
    found = {key.name: key for key in [*schema_keys(), *rows_keys()]}
    for group in ("hydra/launcher", "hydra/sweeper"):
        found |= {key.name: key for keys in hydra_keys(group).values() for key in keys}
    return found


def all_keys(method: str = "lora") -> dict[str, Key]:
    """Every key by its name; the keys of ``method`` are those of the option with that name."""
    found = light_keys()
    for group in (*CALLED, *OPEN_SECTIONS):
        found |= {key.name: key for keys in section_keys(group).values() for key in keys}
    target = _methods().get(method, {}).get("_target_")
    return found | ({key.name: key for key in called_keys("method", target, {}, {})} if target else {})


def explain(name: str, method: str = "lora", own: Sequence[Path] = ()) -> str:
    """What ``peftsweep --help WORD`` prints.

    Of a key it is type, range, default and sentence; of a section or group what it holds; of an option (``lora``,
    ``method.lora`` or ``method=lora``) its sentence and the keys that it takes. ``own`` are folders such as conf/.

    Raises:
        InputError: there is no such key, group or option.
    """
    name, _, value = name.partition("=")
    if value and name.replace(".", "/") in groups(own):
        return "\n".join(_option_explained(name.replace(".", "/"), one, own) for one in value.split(","))
    if text := _explained(name, light_keys(), own):
        return text
    known = all_keys(method)
    if text := _explained(name, known, own):
        return text
    if found := _options_named(name, own):
        alone = len([group for group, _ in found if not group.startswith("point/")]) == 1 or len(found) == 1
        return "\n".join(_option_explained(*one, own, keys=alone and one == found[0]) for one in found)
    general = _general(name)
    advice = suggest(general, list(known))
    if not advice.startswith("did you mean"):  # all keys are too many for a line
        choices = [option for group in groups(own) for option in options(group, own)]
        swapped = [option for option in choices if sorted(option) == sorted(name.lower())]
        close = swapped or get_close_matches(name, choices, n=1, cutoff=0.75)
        sections = [*dict.fromkeys(key.partition(".")[0] for key in known)]
        advice = f"did you mean '{close[0]}'?" if close else suggest(name, sections)
    if name != general:
        advice = advice.replace("eval.<name>.", name[: len(name) - len(general) + len("eval.<name>.")])
    raise InputError(f"{name}: no such key, group or option; {advice}")


def _general(name: str) -> str:
    return re.sub(r"^eval\.[\w-]+\.", "eval.<name>.", name)


def _explained(name: str, known: Mapping[str, Key], own: Sequence[Path]) -> str:
    there = groups(own)
    group = next((one for one in there if name.replace(".", "/") in (one, one.removeprefix("hydra/"))), None)
    general = _general((group or name).replace("/", "."))
    below = [str(key) for key in known.values() if key.name.startswith(f"{general}.")]
    if group:
        below = [f"{group}={option}: {meaning}" for option, meaning in options(group, own).items()] + below
    return "\n".join(below) or (str(known[general]) if general in known else "")


def _options_named(name: str, own: Sequence[Path]) -> list[tuple[str, str]]:
    """The groups with the option that ``lora``, ``method.lora`` or ``method/lora`` names."""
    above, _, option = name.replace("/", ".").rpartition(".")
    return [
        (group, option)
        for group in groups(own)
        if above in ("", group.replace("/", "."), group.rpartition("/")[2]) and option in options(group, own)
    ]


def _option_explained(group: str, option: str, own: Sequence[Path], *, keys: bool = True) -> str:
    """The sentence of an option, and ``keys`` that it takes which the other options of its group may lack."""
    known = options(group, own)
    if option not in known:
        raise InputError(f"{group}={option}: no such option; {suggest(option, list(known))}")
    lines = [f"{group}={option}: {known[option]}", *(map(str, _keys_of_option(group, option, own)) if keys else ())]
    if keys and len(lines) == 1 and any(key.startswith(f"{group}.") for key in light_keys()):
        lines.append(f"  its keys: peftsweep --help {group}")
    return "\n".join(lines)


def _keys_of_option(group: str, option: str, own: Sequence[Path]) -> list[Key]:
    if group.startswith("hydra/"):
        return hydra_keys(group).get(option, [])
    if group == "method":
        values = _methods().get(option, {})
        keys = called_keys("method", values["_target_"], {}, values) if "_target_" in values else []
        return [key for key in keys if key.name.removeprefix("method.") not in ORIGIN]
    if group not in (*CALLED, "eval"):
        return []
    file = next(path for folder in _folders(own) if (path := folder / group / f"{option}.yaml").is_file())
    tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if not (target := (tree if "_target_" in tree else tree.get(group) or {}).get("_target_")):
        return []
    if group != "eval":
        return called_keys(group, target, _comments_of_yaml(file), tree.get(group) or tree)
    keys = [*called_keys("eval.<name>", target, _comments_of_yaml(file), tree), *rows_keys()]
    return [dataclasses.replace(key, name=key.name.replace("<name>", option)) for key in keys]
