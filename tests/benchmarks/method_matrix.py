"""Every method on every quantisation: runs the sweep on the embedded model and writes docs/methods.md.

python tests/benchmarks/method_matrix.py docs/methods.md
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

import peftsweep
from peftsweep.config import conf_dir

QUANTS = ("none", "8bit", "4bit")
SWEEP = ("method=glob(*)", "quant=none,8bit,4bit", "train=quick", "eval=[perplexity]")
HEAD = """\
# Methods

Every method on every quantisation, on the embedded model: {count} trials of {steps} steps, made by
`python tests/benchmarks/method_matrix.py docs/methods.md`, which runs `peftsweep {sweep}`.

A cell is the mean loss an answer token on 200 test rows after training; the untouched base's is {bases}. Whatever was
trained was saved, loaded onto a fresh base and gave the same losses there, unless the cell says otherwise. After so
few steps the table says that a method works, not which one is better. {versions}.

| method | what it is | trainable | none | 8bit | 4bit |
|---|---|--:|--:|--:|--:|
"""


def main() -> None:
    target = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from peftsweep import cli; cli.main()", *SWEEP, "study=methods"]
        subprocess.run(command, cwd=folder, check=True)
        table = peftsweep.load(Path(folder) / "multirun" / "methods")
    # qlora is lora on a 4-bit base, trained once under both names.
    methods = sorted(file.stem for file in Path(conf_dir(), "method").glob("*.yaml") if file.stem != "qlora")
    rows = {(row["choices.method"], row["choices.quant"]): row for _, row in table.iterrows()}
    reasons: dict[str, int] = {}
    lines = []
    for method in methods:
        plain = rows[method, "none"]
        cells = [cell(rows.get((method, quant)), reasons) for quant in QUANTS]
        lines.append(
            f"| {method} | {about(method)} | {plain['train_info.trainable_parameters']:,} | {' | '.join(cells)} |"
        )
    bases = ", ".join(f"{quant} {base_loss(table, quant):.2f}" for quant in QUANTS)
    versions = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch", "bitsandbytes"))
    head = HEAD.format(count=len(table), steps=20, sweep=" ".join(SWEEP), bases=bases, versions=versions)
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    target.write_text(head + "\n".join(lines) + "\n\nRefused before training:\n\n" + "\n".join(notes) + "\n")


def cell(row: Any, reasons: dict[str, int]) -> str:
    """One trial: its loss, or the number of the reason why it was refused."""
    if row is None:
        return ""
    if row["run_info.status"] == "refused":
        reason = row["run_info.error.message"].partition(": ")[2] or row["run_info.error.message"]
        return f"refused ({reasons.setdefault(reason, len(reasons) + 1)})"
    if row["run_info.status"] != "success":
        return str(row["run_info.status"])
    text = f"{row['eval_info.perplexity.loss.value']:.2f}"
    return text if row["train_info.reloads"] else f"{text}, does not reload"


def base_loss(table: pd.DataFrame, quant: str) -> float:
    """The untouched base's loss, the same in every trial of a quantisation."""
    losses = table[table["choices.quant"] == quant]["eval_info.perplexity.base_loss.value"].dropna()
    assert losses.nunique() == 1
    return float(losses.iloc[0])


def about(method: str) -> str:
    """The comment that heads the method's yaml."""
    lines = Path(conf_dir(), "method", f"{method}.yaml").read_text().splitlines()
    return next(line for line in lines if line.startswith("# ") and "@package" not in line)[2:].rstrip(".")


if __name__ == "__main__":
    main()
