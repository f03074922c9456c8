"""Check the words of a command line before Hydra reads them, and the user's own yamls.

Hydra's grammar has characters of its own, so that a path or a template may need quotes inside those of the shell.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException

from peftsweep.completion import FLAGS
from peftsweep.errors import InputError, as_sweep, suggest
from peftsweep.schema import type_of

MAX_RANGE_VALUES = 100_000  # of a range
GROUPS_OF_SEVERAL_OPTIONS = ("eval",)  # groups of which several options may be chosen at once
OPTIONAL_GROUPS = ("eval", "sweep", "point")  # groups of which none need be chosen
HYDRA_KEYS_REFUSED = {  # keys of Hydra's that decide nothing here, and what does
    **dict.fromkeys(
        ("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir", "hydra.output_subdir"),
        "decides nothing: a trial's folder is multirun/STUDY/TRIAL, by study=STUDY, in the working directory",
    ),
    **{
        f"hydra.{kind}._target_": f"cannot be set; hydra/{kind}=OPTION chooses another"
        for kind in ("launcher", "sweeper", "callbacks")
    },
    "hydra": "is Hydra's own section; give one of its keys, such as hydra.launcher.workers=2",
    **dict.fromkeys(
        ("--config-path", "-cp", "--config-name", "-cn"), "cannot be set; --config-dir DIR adds options of your own"
    ),
    **dict.fromkeys(("-r", "--run", "hydra.mode"), "cannot be set: every command is a sweep, of one trial or more"),
}
CONFIG_DIR = ("--config-dir", "-cd")
PRICE_PATTERN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)
SECTIONS_OF_HYDRA = ("hydra.launcher", "hydra.sweeper", "hydra.callbacks", "hydra.job")
NON_NULL_KEYS = (*SECTIONS_OF_HYDRA, "hydra/launcher", "hydra/sweeper")


ARGPARSE_MESSAGES = {  # messages of argparse's and what stands for them here
    r"unrecognized arguments: (\S+).*": r"\1: no such option",
    r"the following arguments are required: (.*)": r"\1: must be given",
    r"(.*): expected (?:one|at least one) argument": r"\1: needs a value",
    r"(.*): ignored explicit argument .*": r"\1: takes no value",
    r"(.*): invalid int value: '(.*)'": r"\1: must be a whole number, not \2",
    r"(.*): invalid float value: '(.*)'": r"\1: must be a number, not \2",
    r"(.*): invalid choice: '(.*)' \(choose from (.*)\)": r"\1: must be one of \3, not \2",
    r"ambiguous option: (.*) could match (.*)": r"\1: may be \2",
}


class OneLineParser(argparse.ArgumentParser):
    """A parser of options whose errors are ``InputError``."""

    def error(self, message: str) -> typing.NoReturn:
        message = message.removeprefix("argument ")
        for theirs, ours in ARGPARSE_MESSAGES.items():
            if found := re.fullmatch(theirs, message, re.DOTALL):
                raise InputError(found.expand(ours).replace("'", "") + self._meant(found[1], ours))
        raise InputError(message)

    def _meant(self, wrong: str, message: str) -> str:
        """A hint which option was meant."""
        known = [name for action in self._actions for name in action.option_strings]
        return f"; {suggest(wrong, known)}" if message.endswith("no such option") else ""


def whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A type of argparse's: a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        span = f"at least {least}"
        if text.isdecimal():
            # The length first: Python refuses to read a number of thousands of digits.
            if len(text.lstrip("0")) > len(str(most)) or int(text) > most:
                span = f"at most {most}"
            elif int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"must be a whole number, {span}, not {text}")

    return read


def number(fits: Callable[[float], bool], allowed: str) -> Callable[[str], float]:
    """A type of argparse's: a finite number that ``fits``; ``allowed`` says which do, such as "at least 0"."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if math.isfinite(found := float(text)) and fits(found):
                return found
        raise argparse.ArgumentTypeError(f"must be a number, {allowed}, not {text}")

    return read


def checked(words: Sequence[str], conf: Path) -> list[str]:
    """The words of a command, checked, without words that change nothing; ``conf`` is the folder of our own yamls.

    Raises:
        InputError: a word cannot be read, or chooses none of a group's options; the line names it.
    """
    options = _hydra_options()
    groups = {folder.name: folder for folder in conf.iterdir() if folder.is_dir() and folder.name != "hydra"}
    for word, after in pairwise(words):
        if "=" in word and word.endswith(",") and "=" not in after and not after.startswith(("-", "~")):
            raise InputError(f"{word} {after}: values are separated by commas alone: '{word}{after}'")
    kept: list[str] = []
    left = iter(words)
    for original in left:
        word = _price_as_key(original)
        kept.append(word)
        if not word.startswith("-"):
            if not _changes_configuration(word, groups):
                kept.pop()
            continue
        name, given, _ = word.partition("=")
        if name in HYDRA_KEYS_REFUSED:
            raise InputError(f"{name}: {HYDRA_KEYS_REFUSED[name]}")
        if name not in options:
            key = name.lstrip("-").replace("-", "_")
            if key.partition(".")[0] in groups or type_of(key) is not None:
                raise InputError(f"{name}: no such option; a key is given without dashes: {key}=VALUE")
            known = [*FLAGS, *(option for option in options if option not in {*FLAGS, *HYDRA_KEYS_REFUSED})]
            raise InputError(f"{name}: no such option; {suggest(name, known)}")
        takes, choices = options[name].nargs is None, options[name].choices
        if given and not takes:
            raise InputError(f"{name}: takes no value")
        if takes and not given:
            value = next(left, None)
            if value is None or (choices and value not in choices):
                raise InputError(f"{name}: needs a value" + (f", one of {', '.join(choices)}" if choices else ""))
            kept.append(value)
        elif options[name].nargs == "?" and not given and (value := next(left, None)) is not None:
            if choices and value not in choices:
                raise InputError(f"{name} {value}: must be {name} alone, or with one of {', '.join(choices)}")
            kept.append(value)
    lone = [word for word in kept if word in ("--resolve", "--package", "-p")]
    if lone and not any(word.partition("=")[0] in ("--cfg", "-c") for word in kept):
        raise InputError(f"{lone[0]}: only with --cfg job")
    return kept


def check_key_values(words: Sequence[str]) -> None:
    """Refuse a word without ``=`` among those that another command passes on to ``peftsweep``."""
    if wrong := next((word for word in words if "=" not in word), None):
        raise InputError(f"{wrong}: must be KEY=VALUE, as for peftsweep")


def check_twice(words: Sequence[str], conf: Path) -> None:
    """Refuse two choices of one group, and a swept key that is given again, of which Hydra would take the last.

    After a plain value the last word counts, so that a script can end in the words that it was given.

    Raises:
        InputError: the line names both words.
    """
    groups = {folder.name for folder in conf.iterdir() if folder.is_dir()}
    word_of_key: dict[str, str] = {}
    for word in words:
        key, given, _ = word.lstrip("+").partition("=")
        if not given or word.startswith(("-", "~")):
            continue
        before, word_of_key[key] = word_of_key.get(key, word), word
        is_group = key.partition("/")[0] in groups  # or a folder in one: hydra/launcher, point/peft_comparison
        if before != word and (is_group or _parsed(before).is_sweep_override()):
            in_brackets, swept = "several in brackets", "with several values separated by commas"
            several = in_brackets if key in GROUPS_OF_SEVERAL_OPTIONS else swept
            advice = "" if key.startswith("hydra") else f", {several}"
            raise InputError(f"{before} {word}: {key} is given twice; give it once{advice}")


def _price_as_key(word: str) -> str:
    """``price=2.49`` as the key of the group ``price`` that an amount is; every other word as it is."""
    key, _, value = word.partition("=")
    if key != "price" or not PRICE_PATTERN.fullmatch(value.strip("'\"")):
        return word
    if not (math.isfinite(float(value.strip("'\""))) and float(value.strip("'\"")) >= 0):
        raise InputError(f"{word}: must be the price of a device-hour, a number of at least 0, such as price=2.49")
    return f"price.hour={value}"


def _changes_configuration(word: str, groups: dict[str, Path]) -> bool:
    """Whether the word, which is checked, chooses or changes anything."""
    if "=" not in word and not word.startswith("~"):
        advice = "--help lists the keys" if word in ("help", "?") else "a value with blanks needs quotes for the shell"
        raise InputError(f"{word}: must be KEY=VALUE; {advice}")
    one = _parsed(word)
    key = one.key_or_group
    if not all(key.replace("/", ".").split(".")):
        raise InputError(f"{word}: must be KEY=VALUE, and the key has an empty part")
    if key in HYDRA_KEYS_REFUSED:
        raise InputError(f"{key}: {HYDRA_KEYS_REFUSED[key]}")
    if key in NON_NULL_KEYS and one._value is None:
        raise InputError(f"{word}: must be given; without this word it is peftsweep's own")
    if key in SECTIONS_OF_HYDRA and not isinstance(one._value, dict):
        raise InputError(f"{word}: has keys; give one of them, or choose another by {key.replace('.', '/')}=")
    if key == "hydra.searchpath" and isinstance(one._value, list):
        _check_folders(word, [str(getattr(place, "text", place)) for place in one._value])
    _check_swept(word, one)
    _check_boolean(one)
    if key not in groups:
        return True
    if one.package is not None or one.is_add() or one.is_force_add():
        raise InputError(f"{word}: must be {key}=OPTION, without + and @")
    if key in OPTIONAL_GROUPS and key not in GROUPS_OF_SEVERAL_OPTIONS and one.value() is None:
        return False  # as in config.yaml: none is chosen
    _check_option(word, one, groups[key])
    return True


def _check_folders(word: str, places: Sequence[str]) -> None:
    """Refuse a folder to look for options in that is not there, of which Hydra only warns."""
    for place in (text.removeprefix("file://") for text in places):
        if not place.startswith("pkg://") and not Path(place).is_dir():
            raise InputError(f"{word}: no such folder: {place}")


@functools.cache
def _hydra_options() -> dict[str, argparse.Action]:
    return {name: action for action in get_args_parser()._actions for name in action.option_strings}


@functools.lru_cache(maxsize=4096)
def parsed(word: str) -> Override | None:
    """A word as Hydra parses it; None if it cannot be parsed. Cached: it takes milliseconds, and words come again."""
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except (HydraException, ValueError):
        return None


def _parsed(word: str) -> Override:
    if (one := parsed(word)) is None:
        raise InputError(f"{word}: {_why_not_parsed(word)}")
    return one


def _why_not_parsed(word: str) -> str:
    key, _, value = word.partition("=")
    if value.strip().startswith(",") or value.strip().endswith(",") or re.search(r",\s*,", value):
        return "there is no value beside one of its commas"
    if type_of(key) is not str and (numbers := as_sweep(key, value)):
        return f"cannot be read{numbers}"
    for quote, outer in (('"', "'"), ("'", '"')):
        quoted = f"{key}={quote}{value}{quote}"
        if quote not in value and parsed(quoted) is not None:
            return (
                "its value has characters of the sweep's grammar; as a text it needs quotes inside those "
                f"of the shell: {outer}{quoted}{outer}"
            )
    return "cannot be read; must be KEY=VALUE"


def _check_swept(word: str, one: Override) -> None:
    """Refuse a range without values or with too many, and a list that is the name of a file."""
    value: Any = one._value
    if isinstance(value, RangeSweep):
        if not value.step:
            raise InputError(f"{word}: the step of a range must not be 0")
        values = (value.stop - value.start) / value.step  # type: ignore[operator]
        if not (math.isfinite(values) and values <= MAX_RANGE_VALUES):
            raise InputError(f"{word}: a range may have at most {MAX_RANGE_VALUES:,} values")
        if values <= 0:
            raise InputError(f"{word}: there is no value in this range")
    text = word.partition("=")[2]
    if re.fullmatch(r"-?\d+,0\d+", text):
        raise InputError(
            f"{word}: a comma parts values to be swept; the decimal mark is a dot: {word.replace(',', '.')}"
        )
    if isinstance(value, ChoiceSweep) and value.simple_form and len(text) < 1000 and Path(text).expanduser().exists():
        raise InputError(f"{word}: the comma of a file's name needs quotes: '{one.key_or_group}=\"{text}\"'")


def _check_boolean(one: Override) -> None:
    """Refuse a number for a key that is true or false, of which Hydra would make true."""
    value: Any = one._value
    kind = type_of(one.key_or_group)
    is_truth = bool in (typing.get_args(kind) or (kind,))
    for item in value.list if isinstance(value, ChoiceSweep) else [value]:
        is_number = isinstance(item, int | float) and not isinstance(item, bool)
        if is_truth and is_number and item not in (0, 1):
            raise InputError(f"{one.key_or_group}={item}: must be true or false")


def _check_option(word: str, one: Override, group: Path) -> None:
    """Refuse a word that names no option of its group, or that names several where one is allowed."""
    value, known = one._value, sorted(file.stem for file in group.glob("*.yaml"))
    if one.is_delete():
        if group.name not in OPTIONAL_GROUPS:
            raise InputError(f"{word}: cannot be deleted; {suggest(group.name, known)}")
        return
    choices = value.list if isinstance(value, ChoiceSweep) else [value]
    for choice in choices:
        several = choice if isinstance(choice, list) and group.name in GROUPS_OF_SEVERAL_OPTIONS else [choice]
        for option in several:
            if isinstance(option, list) and option:
                raise InputError(f"{word}: must be one option; to sweep several: {group.name}={_listed(option)}")
            if option is None and group.name not in GROUPS_OF_SEVERAL_OPTIONS and group.name in OPTIONAL_GROUPS:
                continue
            text = str(option.text if isinstance(option, QuotedString) else option or "")
            is_number = isinstance(option, bool | int | float)  # which Hydra would take for the name of an option
            if is_number or not text or (isinstance(option, str | QuotedString) and not _is_option(text)):
                name = "" if is_number else PurePath(text).stem
                raise InputError(f"{word}: no such option; {suggest(name, known)}")


def _is_option(text: str) -> bool:
    """Whether the text can name an option of a group, or of a folder in one: not a path that leads elsewhere."""
    parts = text.split("/")
    return "$" in text or not (set(parts) & {"", ".", ".."} or text.endswith((".yaml", ".yml")))


def _listed(options: Iterable[Any]) -> str:
    return ",".join(str(option.text if isinstance(option, QuotedString) else option) for option in options)


def wrong_yaml(words: Sequence[str], *, only_chosen: bool = False) -> str | None:
    """The first fault of a yaml in the folders of ``--config-dir``, with file and line; None if all can be read.

    Those that the words choose are looked at first.
    """
    chosen_names = {part for word in words for part in re.split(r"[=,\[\]]", word)}
    files = [file for folder in own_folders(words) for file in folder.rglob("*.yaml")]
    files = [file for file in files if file.stem in chosen_names] if only_chosen else files
    for file in sorted(files, key=lambda file: (file.stem not in chosen_names, file)):
        try:
            read = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            problem = None if read is None else _wrong_configuration(read)
        except UnicodeDecodeError as error:
            problem = (file.read_bytes()[: error.start].count(b"\n") + 1, "is no UTF-8 text")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = (mark.line + 1 if mark else 1, f"is no yaml: {error.problem or error.context}")
        except (yaml.YAMLError, RecursionError) as error:
            problem = (1, f"is no yaml: {' '.join(str(error).split())[:100]}")
        if problem is not None:
            return f"{file}, line {problem[0]}: {problem[1]}"
    return None


PATH_WORDS = ("dataset", "model", "repeat")  # beside keys that end in path


def check_homes(words: Sequence[str]) -> None:
    """Refuse a path such as ``~nobody/rows.jsonl``, of a user who is not there.

    Raises:
        InputError: the line names the word.
    """
    for word in words:
        key, given, value = word.lstrip("+").partition("=")
        if given and not (key in PATH_WORDS or key.endswith("path")):
            continue
        for path in (value if given else word).split(","):
            place = path.strip("[]'\" ")
            if place.startswith("~") and "/" in place:  # else it may be Hydra's sign for what is left out
                try:
                    Path(place).expanduser()
                except RuntimeError:
                    home = place.partition("/")[0]
                    raise InputError(f"{word}: there is no home folder {home}; must be a path that is there") from None


def check_names(words: Sequence[str], conf: Path) -> None:
    """Refuse a yaml of ``--config-dir`` that has the name of one of ours, which Hydra would read in its place.

    Raises:
        InputError: the line names the file.
    """
    for folder in own_folders(words):
        for file in sorted(folder.rglob("*.yaml")):
            name = file.relative_to(folder)
            if (conf / name).is_file():
                option = f"{name.parent.as_posix()}={name.stem}" if name.parent.name else name.name
                raise InputError(f"{file}: {option} is one of peftsweep's own; give the file another name")


def _wrong_configuration(node: yaml.Node) -> tuple[int, str] | None:
    """The line and fault of a tree that is no configuration: it must have keys, each once, and no tags."""
    if not isinstance(node, yaml.MappingNode):
        return node.start_mark.line + 1, "must hold keys and values"
    for key, value in node.value:
        if key.value == "defaults" and not isinstance(value, yaml.SequenceNode):
            return key.start_mark.line + 1, "defaults must be a list"
    return _wrong_node(node)


def _wrong_node(node: yaml.Node) -> tuple[int, str] | None:
    line = node.start_mark.line + 1
    if not node.tag.startswith("tag:yaml.org,2002:") or "/" in node.tag:
        return line, "has a tag (!); there are none in a configuration"
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, (key, _) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                return key.start_mark.line + 1, "has a key that is no text"
            if key.value in names[:number]:
                return key.start_mark.line + 1, f"has the key {key.value} twice"
        parts = [value for _, value in node.value]
    else:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
    return next((found for part in parts if (found := _wrong_node(part)) is not None), None)


def import_from(folders: Iterable[Path]) -> None:
    """Let ``_target_`` name modules in ``folders``, below all that is installed; workers that are started do so too."""
    for folder in map(str, (folder.resolve() for folder in folders)):
        if folder not in sys.path:
            sys.path.append(folder)


def named_beside_help(words: Sequence[str], *, values: bool = False) -> list[str]:
    """The words of ``--help`` that it is to explain; with ``values`` those that have one, such as method=lora."""
    folders = {str(folder) for folder in own_folders(words)}
    return [word for word in words if word[:1] not in ("-", "") and ("=" in word) == values and word not in folders]


def own_folders(words: Sequence[str]) -> list[Path]:
    """The folders of ``--config-dir``."""
    found = []
    for place, word in enumerate(words):
        name, given, value = word.partition("=")
        if name in CONFIG_DIR:
            found += [Path(value)] if given else [Path(following) for following in words[place + 1 : place + 2]]
    return found
