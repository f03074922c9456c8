"""Copy the answers of finished studies into the gallery: python gallery/publish.py ranks encoder

Of multirun/gallery_NAME it takes RESULTS.md with its plots, answer.json, report.html and results.parquet, and writes
date, hardware and hours into gallery/NAME/README.md, and the tables of gallery/README.md and README.md, so that no
figure is typed.
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

from peftsweep.analysis.table import columns
from peftsweep.analysis.text import words

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
    fill(folder / "README.md", published_text(folder))


def published_text(folder: Path) -> str:
    """When, where and for how long a published study ran, and its advice."""
    table = pd.read_parquet(folder / "results.parquet")
    return "\n".join(f"- {fact}" for fact in facts(table)) + f"\n\n> {advice(folder)}\n"


def with_shared_scripts(page: str) -> str:
    """The page without its two libraries, 6 MB: plotly is at its own address, that of tables beside the studies."""
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


def advice(folder: Path) -> str:
    """The sentence of a published study that says what to use."""
    answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return str(next(part for part in answer["sections"] if part["name"] == "use")["sentences"][0])


def scores(folder: Path) -> list[str]:
    """The table of the README: the configurations of the study of ranks beside its base, as answer.json has them."""
    parts = {
        part["name"]: part for part in json.loads((folder / "answer.json").read_text(encoding="utf-8"))["sections"]
    }
    judged = parts["certainty"]["facts"]["scores"]
    names = [f"eval_info.{found['score']['evaluation']}.{found['score']['metric']}.value" for found in judged]
    heads = ["configuration", *(found["score"]["name"] for found in judged), "trainable", "adapter", "predicted memory"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for row in sorted(parts["table"]["tables"][0]["rows"], key=lambda row: row[names[-1]]):
        cells = [
            f"{words.number(row[n])} [{words.number(row[f'{n}.low'])}, {words.number(row[f'{n}.high'])}]" for n in names
        ]
        cells += [f"{row['train_info.trainable_parameters']:,.0f}", f"{row['train_info.adapter_bytes'] / 1e6:.1f} MB"]
        cells += [f"{row['memory.predicted.peak_bytes'] / 1e9:.2f} GB"]
        lines.append(f"| {row['configuration']} | {' | '.join(cells)} |")
    trials = pd.read_parquet(folder / "results.parquet")
    bases = [f"eval_info.{found['score']['evaluation']}.base_{found['score']['metric']}.value" for found in judged]
    beside = {
        f"the untouched base, {columns.setting_in_words(columns.QUANT, quant)}": [*values]
        for quant, values in trials.groupby("choices.quant")[bases].first().T.items()
    }
    beside |= {"always the most frequent answer": [found["majority"] for found in judged]}
    beside |= {"guessing": [found["random"] for found in judged]}
    for name, values in beside.items():
        cells = ["" if value is None else words.number(value) for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} | | | |")
    return lines


def fill(page: Path, text: str) -> None:
    """Put ``text`` between the marks of a page."""
    page.write_text(SHOWN.sub(lambda _: text, page.read_text(encoding="utf-8")), encoding="utf-8")


def overview() -> list[str]:
    """The table of the gallery: a row a study that was run."""
    lines = ["| study | what to use | date | hardware | hours |", "|---|---|---|---|--:|"]
    for folder in sorted(file.parent for file in GALLERY.glob("*/answer.json")):
        date, device, hours = (fact.partition(": ")[2] for fact in facts(pd.read_parquet(folder / "results.parquet")))
        link = f"[{folder.name}]({folder.name}/README.md)"
        lines.append(f"| {link} | {advice(folder)} | {date} | {device} | {hours.partition(',')[0]} |")
    return lines


def unlinked(lines: list[str]) -> list[str]:
    """The table for a page of the documentation, whose links stay within it."""
    return [re.sub(r"^\| \[(\w+)\]\([^)]*\)", r"| `\1`", line) for line in lines]


if __name__ == "__main__":
    for study in sys.argv[1:]:
        publish(study)
    fill(GALLERY / "README.md", "\n".join(overview()) + "\n")
    fill(GALLERY.parent / "docs" / "gallery.md", "\n".join(unlinked(overview())) + "\n")
    fill(GALLERY.parent / "README.md", "\n".join(scores(GALLERY / "ranks")) + "\n")
