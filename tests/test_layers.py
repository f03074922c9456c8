"""Folders import downwards only; who knows Hydra; what starts without torch; how large files and functions are."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import peftsweep
from peftsweep.config.fill import conf_dir

PACKAGE = Path(peftsweep.__file__).parent
# Lowest first: a folder (or a module beside the folders) may import those before it.
ORDER = [
    "errors",
    "former_names",
    "schema",
    "options",
    "completion",
    "limits",
    "command_line",
    "study",
    "observe",
    "data",
    "shorthand",
    "models",
    "training",
    "evaluation",
    "search",
    "config",
    "forecast",
    "analysis",
    "trial",
    "sweep",
    "tuning",
]
ORDER += ["use", "doctor", "reference", "cli", "reference_pages"]
KNOW_HYDRA = {
    "shorthand",
    "config",
    "search",
    "trial",
    "sweep",
    "tuning.command",
    "cli",
    "command_line",
    "data.prepare",
    "analysis.interchange",
}
WITHOUT_TORCH = (
    *(
        "cli",
        "doctor",
        "use",
        "analysis",
        "config.compose",
        "config.experiment",
        "study.store",
        "study.record",
        "observe.display",
    ),
    *("sweep.halving", "sweep.processes", "data.prepare"),
)
HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes"}
MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 12, 450, 80

MODULES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
MODULES = {name: file for name, file in MODULES.items() if not name.startswith("tiny.") and name != "__init__"}


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imports(file: Path, *, top_level_only: bool = False) -> frozenset[str]:
    """The modules that a file imports, in functions too; not those of its type checker alone."""
    tree = parsed(file)
    nodes = tree.body if top_level_only else statements(tree.body)
    found = set[str]()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def statements(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """These and those within them but under ``TYPE_CHECKING``; without expressions, which are most of a tree."""
    for node in body:
        if not _is_for_types(node):
            yield node
            for part in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from statements(getattr(node, part, ()))


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in (
        getattr(node.test, "id", ""),  # its plain name
        getattr(node.test, "attr", ""),  # and that of the module
    )


def own(file: Path, *, top_level_only: bool = False) -> set[str]:
    """Of the imports the modules of this package."""
    found = {name.removeprefix("peftsweep.") for name in imports(file, top_level_only=top_level_only)}
    return found & MODULES.keys()


def place(module: str) -> int:
    return ORDER.index(module.partition(".")[0])


def test_imports_go_down_only() -> None:
    for module, file in MODULES.items():
        folder = module.partition(".")[0]
        others = {name for name in own(file) if name.partition(".")[0] != folder}
        assert not {name for name in others if place(name) >= place(module)}, module


def test_no_files_import_each_other_directly_or_in_a_circle() -> None:
    graph = {name: own(file) for name, file in MODULES.items()}  # with imports in functions
    left = dict(graph)
    while ready := [name for name, needs in left.items() if not needs & left.keys() - {name}]:
        left = {name: needs for name, needs in left.items() if name not in ready}
    assert not left


FOLDERS = sorted({name.rpartition(".")[0] for name in MODULES if "." in name})
PLUGINS = [*PACKAGE.parent.joinpath("hydra_plugins").rglob("*.py")]


def test_a_folder_lists_the_files_that_others_import_or_a_yaml_names() -> None:
    yamls = "".join(file.read_text(encoding="utf-8") for file in Path(conf_dir()).rglob("*.yaml"))
    in_yamls = {name for name in MODULES if f"peftsweep.{name}." in yamls}
    for folder in FOLDERS:
        outside = [file for name, file in MODULES.items() if not name.startswith(f"{folder}.")] + PLUGINS
        used = in_yamls.union(*map(own, outside))
        files = sorted(name.removeprefix(f"{folder}.") for name in used if name.rpartition(".")[0] == folder)
        assert importlib.import_module(f"peftsweep.{folder}").__all__ == files, folder


def test_a_folder_answers_the_question_that_the_page_says() -> None:
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    questions = dict(re.findall(r"^\| `(\w+)/` \| (.+?\?)", page, re.MULTILINE))
    assert questions.keys() == {name.partition(".")[0] for name in FOLDERS}
    for folder, question in questions.items():
        text = str(importlib.import_module(f"peftsweep.{folder}").__doc__)
        assert text.lower().startswith(question.replace("`", "").lower()), folder


def test_no_file_uses_a_private_name_of_another() -> None:
    for module, file in MODULES.items():
        last = {name.rpartition(".")[2] for name in imports(file) if name.startswith("peftsweep.")}
        assert not {name for name in last if name.startswith("_") and name != "__version__"}, module


def test_who_knows_hydra() -> None:
    for name, file in MODULES.items():
        if {used.partition(".")[0] for used in imports(file)} & {"hydra", "omegaconf"}:
            assert {name, name.partition(".")[0]} & KNOW_HYDRA, name


def test_what_must_start_fast_never_imports_torch_at_the_top() -> None:
    for name, file in MODULES.items():
        if name.startswith(WITHOUT_TORCH):
            known = {used.partition(".")[0] for used in imports(file, top_level_only=True)}
            assert not known & HEAVY, name


def test_folders_files_and_functions_are_small() -> None:
    for folder in {file.parent for file in MODULES.values()}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder
    for name, file in MODULES.items():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MOST_LINES, name
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < MOST_LINES_OF_A_FUNCTION, f"{name}.{node.name}"
