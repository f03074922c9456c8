"""Completion in bash, zsh and fish: the words that may go on from what is typed, and the scripts that ask for them.

It runs at each press of the tab key, so that it imports neither Hydra nor torch; the options of a method of PEFT's are
read from PEFT's source.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

from peftsweep import options
from peftsweep.errors import InputError
from peftsweep.schema import Config, key_types, type_of

SHELLS = ("bash", "zsh", "fish")
FLAGS = ("-m", "--help", "--version", "--json", "--cfg", "--config-dir", "--completion")
VALUES = {"--cfg": ("job", "hydra", "all"), "--completion": SHELLS}
PATHS = re.compile(r"model|dataset|repeat|experiments|.*[._]path|.*_file|.*name_or_path")  # keys that name files
DEVICES = ("auto", "cpu", "cuda")
SECTION = re.compile(r"^(\w+):", re.M)
KEY = re.compile(r"^ +(\w+):", re.M)
HIDDEN = ("_target_", "_partial_", "target_modules")  # keys of a method that other keys decide

# `{python} -P`: without the working folder, where a file may have the name of a module.
SCRIPTS = {
    "bash": """\
_peftsweep() {{
    local IFS=$'\\n'
    COMPREPLY=($({python} -P -m peftsweep.completion bash "${{COMP_LINE:0:COMP_POINT}}" "$COMP_WORDBREAKS" 2>/dev/null))
    [[ ${{#COMPREPLY[@]}} -gt 0 && ${{COMPREPLY[0]}} == *[=./] ]] && compopt -o nospace
    return 0
}}
complete -F _peftsweep peftsweep
""",
    "zsh": """\
_peftsweep() {{
    local -a found
    local line="${{(j: :)words[1,CURRENT-1]}} $QIPREFIX$PREFIX"
    found=("${{(@f)$({python} -P -m peftsweep.completion zsh "$line" 2>/dev/null)}}")
    [[ -n $found ]] && compadd -Q -S '' -- $found
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
compdef _peftsweep peftsweep
""",
    "fish": """\
complete -c peftsweep -f -a '({python} -P -m peftsweep.completion fish (commandline -cp | string collect) 2>/dev/null)'
""",
}


def script(shell: str) -> str:
    """What a shell is to run once to complete ``peftsweep``: ``eval "$(peftsweep --completion bash)"``.

    Raises:
        InputError: there is none for this shell.
    """
    if shell not in SCRIPTS:
        raise InputError(f"--completion {shell}: must be one of {', '.join(SHELLS)}")
    return SCRIPTS[shell].format(python=shlex.quote(sys.executable))


def main() -> None:
    """Print the words that may go on from a line: ``python -m peftsweep.completion SHELL LINE [BREAKS]``."""
    shell, line, *breaks = sys.argv[1:]
    found = completions(line)
    _, current, quote = _words(line)
    if shell != "fish" and not quote:  # fish does so itself
        found = [_escaped(word) for word in found]
        current = _escaped(current)
    if shell == "bash":  # which replaces what follows the last of these signs, and not the whole word
        kept = max((current.rfind(sign) for sign in "=:" if not breaks or sign in breaks[0]), default=-1) + 1
        found = [word[kept:] for word in found]
    print("\n".join(found))


def completions(line: str) -> list[str]:
    """The words that the last one of ``line`` may become."""
    before, current, _ = _words(line)
    if before and before[-1] in VALUES:
        return _beginning(VALUES[before[-1]], current)
    if before and before[-1] == "--config-dir":
        return _paths(current, folders=True)
    if current.startswith("-"):
        return _beginning(FLAGS, current)
    key, given, value = current.partition("=")
    folders = [Path(options.conf_dir()), *_own_folders(before)]
    if not given:
        return _beginning(_keys(before, folders, current), current)
    swept, comma, value = value.rpartition(",")  # several values, of which the last one goes on
    return [f"{key}={swept}{comma}{one}" for one in _values(key, value, folders)]


def _words(line: str) -> tuple[list[str], str, str]:
    """The whole words after the command, the one that is being typed, and the quote that it has opened, if any."""
    for quote in ("", '"', "'"):
        try:
            words = shlex.split(f"{line}|{quote}")
        except ValueError:  # another quote is open
            continue
        return words[1:-1], words[-1][:-1] if len(words) > 1 else "", quote
    return line.split()[1:], "", ""


def _escaped(word: str) -> str:
    """A word as it is typed without quotes."""
    return re.sub(r"([\s'\"\\$`&;|<>()])", r"\\\1", word)


def _own_folders(words: Sequence[str]) -> list[Path]:
    found = [word.partition("=")[2] for word in words if word.startswith("--config-dir=")]
    found += [after for word, after in pairwise(words) if word in ("--config-dir", "-cd")]
    return [Path(folder).expanduser() for folder in found]


def _beginning(words: Iterable[str], begun: str) -> list[str]:
    return [word for word in dict.fromkeys(words) if word.startswith(begun)]


# ---- keys ------------------------------------------------------------------------------------------


def _keys(before: Sequence[str], folders: Sequence[Path], begun: str) -> list[str]:
    """Keys with their ``=``; of a section only its name with a dot, until that is typed."""
    if begun.startswith("hydra"):
        launcher = (folders[0] / "hydra/launcher/local.yaml").read_text(encoding="utf-8")
        keys = [f"hydra.launcher.{name}=" for name in SECTION.findall(launcher) if name not in HIDDEN]
        return ["hydra/launcher=", "hydra/sweeper=", *keys]
    section, dot, _ = begun.partition(".")
    own = key_types(Config)
    if not dot:
        group_names = [group for group, *_ in options.groups(folders[0])] + ["sweep", "point"]
        kinds = {name: kind for name, kind in own.items() if name not in group_names or _is_section(kind)}
        plain = [name + ("." if _is_section(kind) else "=") for name, kind in kinds.items()]
        return [*(f"{group}=" for group in group_names), *plain, "method.", "hydra/launcher=", "hydra.launcher."]
    if section == "method":
        return [f"method.{name}=" for name in _method_keys(_chosen("method", before, folders), folders)]
    kind = own.get(section)
    return [f"{section}.{name}=" for name in key_types(kind)] if _is_section(kind) else []


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _chosen(group: str, before: Sequence[str], folders: Sequence[Path]) -> str:
    chosen = [word.partition("=")[2] for word in before if word.startswith(f"{group}=")]
    default = next(default for name, _, default in options.groups(folders[0]) if name == group)
    return (chosen or [default])[-1].partition(",")[0].strip("'\"")


def _method_keys(option: str, folders: Sequence[Path]) -> list[str]:
    """The keys of a method's yaml, those that it has from another one's, and the options of its class."""
    file = next((one for folder in folders if (one := folder / "method" / f"{option}.yaml").is_file()), None)
    if file is None:
        return []
    text = file.read_text(encoding="utf-8")
    own = re.search(r"^method:.*\n((?:[ #].*\n?|\n)*)", text, re.M)
    keys = KEY.findall(own[1]) if own else []
    for above in re.findall(r"^ +- ([\w/]+)$", text, re.M):
        keys += _method_keys(above, folders)
    target = re.search(r"_target_: peft\.(?:[\w.]+\.)?(\w+)", text)
    keys += _options_of_peft(target[1]) if target else []
    return [key for key in dict.fromkeys(keys) if key not in HIDDEN]


def _options_of_peft(name: str) -> list[str]:
    """The fields of a class of PEFT's, from its source, as an import takes seconds."""
    spec = importlib.util.find_spec("peft")
    tuners = Path(spec.origin).parent / "tuners" if spec and spec.origin else Path()
    for file in tuners.glob("*/config.py"):
        text = file.read_text(encoding="utf-8")
        if f"class {name}(" in text:
            classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name]
            fields = [node for one in classes for node in one.body if isinstance(node, ast.AnnAssign)]
            return [one.target.id for one in fields if isinstance(one.target, ast.Name)]
    return []


# ---- values ----------------------------------------------------------------------------------------


def _values(key: str, begun: str, folders: Sequence[Path]) -> list[str]:
    bracket = begun[: begun.startswith("[")]  # of eval=[a,b]
    known = options.names(key, folders) if re.fullmatch(r"[\w/]+", key) else []
    known += ["null"] if key in ("sweep", "point") else []
    found = [bracket + one for one in _beginning([*known, *_of_type(key)], begun[len(bracket) :])]
    return found + (_paths(begun) if PATHS.fullmatch(key) and not found else [])


def _of_type(key: str) -> list[str]:
    """The values of a key of the schema that has few."""
    if key == "device":
        return [*DEVICES]
    kind = type_of(key)
    kinds = [one for one in typing.get_args(kind) or [kind] if isinstance(one, type)]
    if bool in kinds:
        return ["true", "false"]
    return [name for one in kinds if issubclass(one, Enum) for name in one.__members__]


def _paths(begun: str, *, folders: bool = False) -> list[str]:
    """Files and folders whose paths go on from ``begun``, folders with a slash."""
    written, slash, name = begun.rpartition("/")
    place = Path(written + slash or ".").expanduser()
    wanted: Callable[[Path], bool] = Path.is_dir if folders else Path.exists
    try:
        there = sorted(one for one in place.iterdir() if one.name.startswith(name) and wanted(one))
    except OSError:
        return []
    hidden = name.startswith(".")
    shown = [one for one in there if hidden or not one.name.startswith(".")]
    return [f"{written}{slash}{one.name}" + "/" * one.is_dir() for one in shown]


if __name__ == "__main__":
    main()
