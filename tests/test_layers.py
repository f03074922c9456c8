"""Imports go down only."""

from __future__ import annotations

import ast
from pathlib import Path

import peftsweep

PACKAGE = Path(peftsweep.__file__).parent
# Lowest first: a module may import those on lower floors, and those before it on its own.
FLOORS = (
    "errors owner streams atomic reading hub schema fast_dtype processes isolation compatibility files chat data "
    "numerals metrics measure cautions record naming sweep_record study fingerprint experiment tasks shapes shortcuts "
    "model probe profiler",
    "display tracker attach coverage initialise checkpoint compiled fused_lora train lanes packed evaluate inference "
    "predict harness repeat",
    "answer.columns answer.table answer.where answer.intervals answer.stats answer.effects answer.frontier "
    "answer.rungs answer.words answer.findings answer.paired answer.methodology answer.report answer.plot answer.page "
    "answer.prune",
    "trust limits restored command_line config mended prepare halving build forecast guide seen trial pack workers "
    "engine slurm sweep everything preload answer.interchange answer.collect",
    "cli",
)
ORDER = [module for floor in FLOORS for module in floor.split()]
HYDRA_FROM = ORDER.index("restored")
WITHOUT_TORCH = [module for module in ORDER if module.startswith("answer.")]
WITHOUT_TORCH += [
    "display",
    "owner",
    "study",
    "repeat",
    "restored",
    "cli",
    "config",
    "halving",
    "experiment",
    "prepare",
    "processes",
    "sweep_record",
    "mended",
    "hub",
    "command_line",
]


def place(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_its_floor() -> None:
    rooms = [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in PACKAGE.rglob("*.py")]
    assert sorted(room for room in rooms if "__init__" not in room and not room.startswith("tiny.")) == sorted(ORDER)


def test_imports_go_down_only() -> None:
    for number, module in enumerate(ORDER):
        mine = {name.removeprefix("peftsweep.") for name in imports(place(module))}
        above = {name for name in mine if name in ORDER and ORDER.index(name) >= number}
        assert not above, f"{module} imports {above}"


def test_nobody_below_the_wiring_knows_hydra() -> None:
    for module in ORDER[:HYDRA_FROM]:
        known = {name.partition(".")[0] for name in imports(place(module))}
        assert not known & {"hydra", "omegaconf"}, module


def test_what_must_start_fast_never_imports_torch_at_the_top() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "bitsandbytes"}
    for module in WITHOUT_TORCH:
        known = {name.partition(".")[0] for name in imports(place(module), top_level_only=True)}
        assert not known & heavy, module
