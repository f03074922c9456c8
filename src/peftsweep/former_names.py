"""Names of modules in the first version, which a user's yaml and code and older records may hold."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "peftsweep.evaluate": "peftsweep.evaluation.evaluate",
    "peftsweep.metrics": "peftsweep.evaluation.metrics",
    "peftsweep.harness": "peftsweep.evaluation.harness",
    "peftsweep.inference": "peftsweep.evaluation.inference",
    "peftsweep.initialise": "peftsweep.models.initialise",
    "peftsweep.profiler": "peftsweep.observe.profiler",
    "peftsweep.tracker": "peftsweep.observe.tracker",
    "peftsweep.tasks": "peftsweep.data.tasks",
}


class _Former(MetaPathFinder, Loader):
    """Imports by a former name give the module of today."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(MODULES[module.__name__])


def install() -> None:
    """Let imports by former names find the modules of today."""
    if not any(isinstance(finder, _Former) for finder in sys.meta_path):
        sys.meta_path.append(_Former())
