"""The pages of docs/reference, and llms.txt: ``python -m peftsweep.reference_pages docs`` (`make reference`)."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from peftsweep import former_names
from peftsweep.errors import EXIT_CODES
from peftsweep.reference import meanings
from peftsweep.reference.keys import (
    CALLED,
    OPEN_SECTIONS,
    Key,
    groups,
    hydra_keys,
    method_keys,
    options,
    rows_keys,
    schema_keys,
    section_keys,
)
from peftsweep.study.record import Result

HEAD = ("name", "what it is")
GENERATED = "<!-- Written by `make reference`; edit the source that it names, not this page. -->"


def pages() -> dict[str, str]:
    """File -> text of all pages of docs/reference."""
    return {
        "keys.md": _keys_page(),
        "options.md": _options_page(),
        "method_keys.md": _method_keys_page(),
        "columns.md": _columns_page(),
        "commands.md": _commands_page(),
        "python.md": _python_page(),
    }


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(part) for part in row)} |" for row in rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").replace("{{", "{ {")


def _fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _of_keys(keys: list[Key]) -> str:
    rows = [(key.name, key.type, key.allowed, key.default, key.sentence) for key in keys]
    head = ("key", "type", "range", "default", "what it is")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, kind, span, default, meaning in rows:
        cells = [f"`{name}`", _cell(kind), _cell(span), _code(default.replace("|", "\\|")), _cell(meaning)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([GENERATED, f"# {title}", *parts]) + "\n"


def _keys_page() -> str:
    parts = [
        "Every key but those of a method's class, which are on [a page of their own](method_keys.md). "
        "Numbers must be finite.",
        "A key is given as `key=value`; `key=a,b` sweeps it. `peftsweep --help KEY` prints its line.",
        "## Of every trial",
        _of_keys(schema_keys()),
        "## The rows of an evaluation",
        _of_keys(rows_keys()),
    ]
    for group in (*OPEN_SECTIONS, *CALLED):
        for target, keys in section_keys(group).items():
            if keys:
                parts += [f"## {group}: {target}", _of_keys(keys)]
    for group in ("hydra/launcher", "hydra/sweeper"):
        parts += [f"## {group}"]
        for option, keys in hydra_keys(group).items():
            parts += [f"### {group}={option}", options(group)[option], _of_keys(keys)]
    return _page("Keys", *parts)


def _options_page() -> str:
    parts = ["Every option of every group, as `group=option`; `group=a,b` sweeps it, `'group=glob(*)'` takes all."]
    for group in groups():
        rows = [(_code(name), meaning) for name, meaning in options(group).items()]
        parts += [f"## {group}", _table(("option", "what it is"), rows)]
    return _page("Options", *parts)


def _method_keys_page() -> str:
    from peftsweep.study.record import package

    version = (package("peft") or {}).get("version")
    parts = [
        f"The fields of PEFT {version}'s configuration classes, which a method's yaml names. Every one can be swept."
    ]
    for target, (names, keys) in method_keys().items():
        chosen = ", ".join(f"`method={name}`" for name in names)
        parts += [f"## {target.rpartition('.')[2]}", f"{chosen}: `{target}`", _of_keys(keys)]
    return _page("Keys of methods", *parts)


def _columns_page() -> str:
    intro = (
        "The columns of `results.parquet`, of `peftsweep-collect --out FILE` and of `peftsweep.load`, which are the "
        "dotted keys of `result.json`. `*` stands for a name. What is not known is null."
    )
    rows = [(_code(name), meaning) for name, meaning in meanings.COLUMNS.items()]
    steps = [(_code(name), meaning) for name, meaning in meanings.STEPS.items()]
    lines = [(_code(name), meaning) for name, meaning in meanings.PREDICTIONS.items()]
    head = ("column", "what it is")
    parts = [intro, _table(head, rows), "## steps.jsonl and steps.parquet", _table(head, steps)]
    return _page("Columns", *parts, "## predictions/&lt;eval&gt;.jsonl", _table(head, lines))


def _commands_page() -> str:
    codes = [(str(code), meaning) for code, meaning in EXIT_CODES.items()]
    parts = ["## Exit codes", _table(("code", "what it says"), codes)]
    for name, text in commands().items():
        parts += [f"## {name}", _fenced(text)]
    return _page("Commands", *parts)


def commands() -> dict[str, str]:
    """The help of each command."""
    from peftsweep import cli
    from peftsweep.data import prepare
    from peftsweep.use import chat_with, show_rows

    kept = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"  # which argparse breaks lines by
    try:
        parsers: list[argparse.ArgumentParser] = [cli.collect_parser(), cli.data_parser(prepare.FORMATS)]
        parsers += [show_rows.parser(), chat_with.parser()]
        return {"peftsweep": cli.help_text([])} | {parser.prog: parser.format_help() for parser in parsers}
    finally:
        os.environ.pop("COLUMNS") if kept is None else os.environ.update(COLUMNS=kept)


def public_modules() -> dict[str, ModuleType]:
    """The modules whose functions a yaml may name, by their paths."""
    names = sorted({*former_names.MODULES.values(), "peftsweep.tiny.task"})
    return {name: importlib.import_module(name) for name in names}


def public_names(module: ModuleType) -> dict[str, str]:
    """The functions of a module that are its own and public, with the first sentence of their docstrings."""
    own = {name: found for name, found in vars(module).items() if inspect.isfunction(found) and name[0] != "_"}
    return {name: _first_sentence(found) for name, found in own.items() if found.__module__ == module.__name__}


def _first_sentence(found: Any) -> str:
    text = " ".join((inspect.getdoc(found) or "").split("\n\n")[0].split())
    return text


def _python_page() -> str:
    import peftsweep

    parts = ["## Functions"]
    for name in peftsweep.__all__:
        found = getattr(peftsweep, name)
        signature = str(inspect.signature(found)) if inspect.isfunction(found) else ""
        signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)  # annotations, which are kept as text
        parts += [
            f"### peftsweep.{name}",
            _fenced(f"{name}{signature}", "python"),
            _fenced(inspect.getdoc(found) or ""),
        ]
    held = {name: found.fget for name, found in vars(Result).items() if isinstance(found, property)}
    rows = [(_code(name), _first_sentence(found)) for name, found in held.items()]
    sections = [field.name for field in dataclasses.fields(Result) if field.name != "folder"]
    sentence = (
        f"Its sections are dictionaries, as in result.json: {', '.join(map(_code, sections))}. [Columns](columns.md)"
    )
    parts += [
        "### Result, which run returns",
        f"{sentence} says what they hold. `folder` is the trial's.",
        _table(HEAD, rows),
    ]
    parts += ["## Names that a yaml may hold", meanings.PUBLIC]
    before = {now: then for then, now in former_names.MODULES.items()}
    for name, module in public_modules().items():
        rows = [(_code(function), opening) for function, opening in public_names(module).items()]
        also = f"In records of the first version: `{before[name]}`." if name in before else ""
        parts += [f"### {name}", *([also] if also else []), _table(HEAD, rows)]
    return _page("Python", *parts)


def llms(top: Path) -> str:
    """llms.txt: the pages of the site, in the order of its navigation, each with its first sentence."""
    site = yaml.safe_load((top / "mkdocs.yml").read_text(encoding="utf-8"))
    lines = [f"# {site['site_name']}", "", f"> {site['site_description']}", ""]
    for entry in site["nav"]:
        ((title, pages),) = entry.items()
        lines += [f"## {title}", ""]
        for page in [{title: pages}] if isinstance(pages, str) else pages:
            ((name, file),) = page.items()
            summary = _opening((top / site["docs_dir"] / file).read_text(encoding="utf-8"))
            lines.append(f"- [{name}]({site['docs_dir']}/{file})" + (f": {summary}" if summary else ""))
        lines.append("")
    also = {"AGENTS.md": "how a coding agent installs, runs and reads answers", "CHANGELOG.md": "what has changed"}
    return (
        "\n".join([*lines, "## Also", "", *(f"- [{file}]({file}): {summary}" for file, summary in also.items())]) + "\n"
    )


def _opening(text: str) -> str:
    """The first sentence of a page that is neither heading, table, list, code nor comment."""
    for part in text.split("\n\n"):
        if part.strip() and not part.startswith(("#", "|", "-", "    ", "<!--", "![", "```")):
            return re.split(r"(?<=[.:]) ", " ".join(part.split()))[0]
    return ""


def main(docs: Path) -> None:
    """Write all pages into ``docs/reference``, and llms.txt beside ``docs``."""
    (docs / "reference").mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (docs / "reference" / name).write_text(text, encoding="utf-8")
    (docs.parent / "llms.txt").write_text(llms(docs.parent), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
