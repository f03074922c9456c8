"""Copy the answers of finished studies into the gallery: python gallery/publish.py ranks encoder

Of multirun/gallery_NAME it takes RESULTS.md with its plots, answer.json, report.html and results.parquet, and writes date, hardware
and hours into gallery/NAME/README.md and the table of gallery/README.md, so that no figure is typed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs, get_plotlyjs_version

GALLERY = Path(__file__).parent
TABLES = "tables.js"  # the library that report.html sorts and filters with, once for all studies
PRIVATE = ["run_info.host"]  # columns that say where a study ran and not what it found
SHOWN = re.compile(r"(?<=<!-- published -->\n).*?(?=<!-- end -->)", re.S)


def publish(name: str) -> None:
    """Collect a study and copy what it says."""
    study, folder = Path("multirun") / f"gallery_{name}", GALLERY / name
    subprocess.run(["peftsweep-collect", str(study)], check=True, stdout=subprocess.DEVNULL)
    for file in ("RESULTS.md", "answer.json"):
        shutil.copy(study / file, folder)
    shutil.rmtree(folder / "plots", ignore_errors=True)
    shutil.copytree(study / "plots", folder / "plots")
    table = pd.read_parquet(study / "results.parquet").drop(columns=PRIVATE, errors="ignore")
    table.to_parquet(folder / "results.parquet")
    page = (study / "report.html").read_text(encoding="utf-8")
    (folder / "report.html").write_text(with_shared_scripts(page), encoding="utf-8")
    answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    fill(folder / "README.md", "\n".join(f"- {fact}" for fact in facts(table)) + f"\n\n> {advice(answer)}\n")


def with_shared_scripts(page: str) -> str:
    """The page with its two libraries, 6 MB, outside of it: plotly's from its own address, that of tables beside the studies."""
    source = f'<script src="https://cdn.plot.ly/plotly-{get_plotlyjs_version()}.min.js"></script>'
    page = page.replace(f"<script>{get_plotlyjs()}</script>", source)
    library = max(re.findall(r"<script>(.*?)</script>", page, re.S), key=len)
    (GALLERY / TABLES).write_text(library, encoding="utf-8")
    return page.replace(f"<script>{library}</script>", f'<script src="../{TABLES}"></script>')


def facts(table: pd.DataFrame) -> list[str]:
    """When, on what and for how long."""
    days = sorted({moment[:10] for moment in table["run_info.created_at"]})
    hours = table["run_info.total_seconds"].sum() / 3600
    return [
        f"date: {' to '.join(dict.fromkeys([days[0], days[-1]]))}",
        f"hardware: {hardware(table.iloc[0])}",
        f"hours: {hours:.1f}, for {len(table)} trials",
    ]


def hardware(trial: pd.Series[Any]) -> str:
    """The device of a trial and the version of torch."""
    if gpus := json.loads(trial["meta_info.torch.gpus"]):
        return ", ".join(gpus)
    threads = trial.get("meta_info.torch.threads")
    return f"{trial['meta_info.system.processor']}, {threads:.0f} thread, torch {trial['meta_info.torch.version']}"


def advice(answer: dict[str, Any]) -> str:
    """The sentence that says what to use."""
    return str(next(part for part in answer["sections"] if part["name"] == "use")["sentences"][0])


def fill(page: Path, text: str) -> None:
    """Put ``text`` between the marks of a page."""
    page.write_text(SHOWN.sub(lambda _: text, page.read_text(encoding="utf-8")), encoding="utf-8")


def index() -> None:
    """The table of the gallery: a row a study that was run."""
    lines = ["| study | what to use | date | hardware | hours |", "|---|---|---|---|--:|"]
    for file in sorted(GALLERY.glob("*/answer.json")):
        table = pd.read_parquet(file.with_name("results.parquet"))
        date, device, hours = (fact.partition(": ")[2] for fact in facts(table))
        said = advice(json.loads(file.read_text(encoding="utf-8")))
        name = file.parent.name
        lines.append(f"| [{name}]({name}/README.md) | {said} | {date} | {device} | {hours.partition(',')[0]} |")
    fill(GALLERY / "README.md", "\n".join(lines) + "\n")
    unlinked = [re.sub(r"^\| \[(\w+)\]\([^)]*\)", r"| `\1`", line) for line in lines]
    fill(GALLERY.parent / "docs" / "gallery.md", "\n".join(unlinked) + "\n")


if __name__ == "__main__":
    for study in sys.argv[1:]:
        publish(study)
    index()
