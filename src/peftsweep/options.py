"""The options of conf/ by the names of their files, read without Hydra and yaml, for help and completion."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def conf_dir() -> str:
    """The folder of the configuration files: inside an installed wheel, else at the top of the checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "conf"
    return str(packaged if packaged.is_dir() else here.parents[1] / "conf")


def groups(conf: Path) -> list[tuple[str, str, str]]:
    """Group, question and default of every line of config.yaml's defaults list that asks a question."""
    found = []
    for line in (conf / "config.yaml").read_text(encoding="utf-8").splitlines():
        entry, mark, question = line.partition("#")
        if line.startswith("  - ") and mark:
            group, _, default = entry.removeprefix("  - ").partition(":")
            found.append((group, question.partition("?")[0].strip() + "?", default.strip(" []")))
    return found


def names(group: str, folders: Iterable[Path]) -> list[str]:
    """The options of a group in folders such as conf/, in order."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
