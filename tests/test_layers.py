"""Imports go down only."""

from __future__ import annotations

import ast
from pathlib import Path

import peftsweep

PACKAGE = Path(peftsweep.__file__).parent
# Lowest first: a module may import those on lower floors, and those before it on its own.
FLOORS = (
    (
        "errors",
        "schema",
        "compatibility",
        "data",
        "metrics",
        "measure",
        "record",
        "study",
        "experiment",
        "tasks",
        "model",
        "profiler",
    ),
    (
        "display",
        "tracker",
        "attach",
        "initialise",
        "checkpoint",
        "compiled",
        "train",
        "lanes",
        "packed",
        "evaluate",
        "inference",
        "predict",
        "harness",
        "table",
        "where",
        "repeat",
        "columns",
        "stats",
        "effects",
        "frontier",
        "rungs",
        "words",
        "findings",
        "methodology",
        "report",
        "plot",
        "page",
    ),
    (
        *("config", "prepare", "halving", "build", "forecast", "guide", "trial", "pack", "workers", "engine", "sweep"),
        *("interchange", "collect"),
    ),
    ("cli",),
)
ORDER = [module for floor in FLOORS for module in floor]
HYDRA_FROM = ORDER.index("config")
WITHOUT_TORCH = (
    *("collect", "table", "where", "interchange", "repeat", "report", "stats", "columns", "plot", "page"),
    *("effects", "frontier", "rungs", "words", "findings", "methodology"),
    *("display", "study", "cli", "config", "halving", "experiment", "prepare"),
)


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "peftsweep":
            found |= {f"peftsweep.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_every_module_has_its_floor() -> None:
    assert sorted(file.stem for file in PACKAGE.glob("*.py")) == sorted([*ORDER, "__init__"])


def test_imports_go_down_only() -> None:
    for place, module in enumerate(ORDER):
        mine = {name.removeprefix("peftsweep.") for name in imports(PACKAGE / f"{module}.py") if "peftsweep." in name}
        above = {name for name in mine if name in ORDER and ORDER.index(name) >= place}
        assert not above, f"{module} imports {above}"


def test_nobody_below_the_wiring_knows_hydra() -> None:
    for module in ORDER[:HYDRA_FROM]:
        known = {name.partition(".")[0] for name in imports(PACKAGE / f"{module}.py")}
        assert not known & {"hydra", "omegaconf"}, module


def test_what_must_start_fast_never_imports_torch_at_the_top() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "bitsandbytes"}
    for module in WITHOUT_TORCH:
        known = {name.partition(".")[0] for name in imports(PACKAGE / f"{module}.py", top_level_only=True)}
        assert not known & heavy, module
