"""Every method on every quantisation: runs the sweep on the embedded model and writes docs/methods.md.

python benchmarks/method_matrix.py docs/methods.md
python benchmarks/method_matrix.py --other docs/quantisations.md     # torchao and quanto, whose extras it needs
python benchmarks/method_matrix.py --differs docs/methods.md SECONDS [WORD ...]    # what is another here
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

import peftsweep
from peftsweep.config.fill import conf_dir

QUANTS = ("none", "8bit", "4bit")
SWEEP = ("method=glob(*)", "quant=none,8bit,4bit", "train=quick", "eval=[perplexity]", "adapter.merge=true")
CLASSIFIER = (
    *("method=glob(*)", "train=quick", "adapter.merge=true", "dataset=tiny_direction", "model=distilbert"),
    *("model.init=random", "model.architecture.dim=64", "model.architecture.hidden_dim=128"),
    *("model.architecture.n_layers=2", "model.architecture.n_heads=2"),
)
CANCEL_SECONDS = 40.0  # until an interrupted sweep has ended
EXACT = 1e-3  # of a token's loss: a merged model that differs by less is the same
HEAD = """\
# Methods

Every method on every kind of base: {count} trials of {steps} steps, made by
`python benchmarks/method_matrix.py docs/methods.md`. It runs `peftsweep {sweep}` on the embedded model and, for
the column seq-cls, `peftsweep {classifier}`: a DistilBERT of two layers with random weights.

A cell is the mean loss after training: an answer token's on 200 test rows (the untouched base's is {bases}), and for
seq-cls a class's in the last ten steps (by chance 0.69). After so few steps the table says that a method works, not
which one is better. The letters:

- **R** what was saved was loaded onto a fresh base and gave the same losses there
- **M** it was merged into the base (a quantised one dequantised first) and gave the same losses
- **m** it was merged; 8-bit layers also round what flows through them, so the merged model differs by that

{versions}.

| method | what it is | trainable | none | 8bit | 4bit | seq-cls |
|---|---|--:|--:|--:|--:|--:|
"""


OTHER_QUANTS = ("int8_torchao", "fp8_torchao", "int8_quanto", "int4_quanto")
OTHER_SWEEP = ("method=glob(*)", f"quant={','.join(OTHER_QUANTS)}", *SWEEP[2:])
BEGIN, END = "<!-- methods -->\n", "<!-- end -->\n"  # around what is written of the page of the other libraries
OTHER_HEAD = """\
{count} trials of {steps} steps on {date}, made by `python benchmarks/method_matrix.py --other docs/quantisations.md`.
It runs `peftsweep {sweep}` on the embedded model, whose untouched losses are {bases}.

{versions}.

| method | {columns} |
|---|{rules}|
"""


def main() -> None:
    if sys.argv[1] == "--differs":
        sys.exit(print_differences(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
    other = sys.argv[1] == "--other"
    (write_other if other else write_methods)(Path(sys.argv[-1]).resolve())


def write_other(target: Path) -> None:
    """The methods on the page of the quantisations, for the libraries beside bitsandbytes."""
    table = run(OTHER_SWEEP)
    rows = {(row["choices.method"], row["choices.quant"]): row for _, row in table.iterrows()}
    reasons: dict[str, int] = {}
    lines = [
        f"| {method} | {' | '.join(cell(rows.get((method, quant)), reasons) for quant in OTHER_QUANTS)} |"
        for method in method_names()
    ]
    head = OTHER_HEAD.format(
        transformers=version("transformers"),
        count=len(table),
        steps=20,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        sweep=" ".join(OTHER_SWEEP),
        bases=", ".join(f"{quant} {base_loss(table, quant):.2f}" for quant in OTHER_QUANTS),
        versions=versions("peft", "transformers", "torch", "torchao", "optimum-quanto"),
        columns=" | ".join(OTHER_QUANTS),
        rules="|".join(["---"] * len(OTHER_QUANTS)),
    )
    before, _, rest = target.read_text().partition(BEGIN)
    target.write_text(before + BEGIN + head + "\n".join(lines) + notes(reasons) + END + rest.partition(END)[2])


def print_differences(page: Path, seconds: float, words: Sequence[str]) -> int:
    """Run the sweep, with ``words`` in place of those of the same keys; print each cell that is another on ``page``.

    A loss is another if it differs by a tenth. Trials that have not ended after ``seconds`` are left out. Returns 1 if
    a trial failed that the page does not call failed, else 0.
    """
    lines = (line.strip("| \n").split(" | ") for line in page.read_text().splitlines() if line.startswith("| "))
    stated = {parts[0]: dict(zip(QUANTS, parts[3:], strict=False)) for parts in lines}
    given = {word.partition("=")[0] for word in words}
    table = run((*(word for word in SWEEP if word.partition("=")[0] not in given), *words), seconds)
    failed = 0
    for _, row in table.iterrows():
        method, quant = row["choices.method"], row["choices.quant"]
        if row["run_info.status"] == "cancelled":
            continue
        now, before = cell(row, {}), stated.get(method, {}).get(quant, "not on the page")
        if outcome_of(now) == outcome_of(before) and abs(loss_of(now) - loss_of(before)) <= 0.1 * loss_of(before):
            continue
        failed += now == "failed" and before != now
        reason = row.get("run_info.error.message")
        print(
            f"{method} {quant}: {now}, on the page {before}" + (f": {reason}" if pd.notna(reason) else ""), flush=True
        )
    print(f"{len(table)} trials", flush=True)
    return int(failed > 0)


def outcome_of(cell_text: str) -> str:
    """A cell without its numbers."""
    return re.sub(r"[\d.()]+", "", cell_text).strip()


def loss_of(cell_text: str) -> float:
    """The loss in a cell; 0 if it has none."""
    found = re.match(r"\d+\.\d+", cell_text)
    return float(found[0]) if found else 0.0


def method_names() -> list[str]:
    """Of conf/, but for qlora: it is lora on a 4-bit base, trained once under both names."""
    return sorted(file.stem for file in Path(conf_dir(), "method").glob("*.yaml") if file.stem != "qlora")


def versions(*packages: str) -> str:
    """Packages with their versions."""
    return ", ".join(f"{name} {version(name)}" for name in packages)


def notes(reasons: dict[str, int]) -> str:
    """The reasons that the cells number."""
    listed = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n\nRefused before training, and why:\n\n" + "\n".join(listed) + "\n"


def write_methods(target: Path) -> None:
    """The page of the methods, on bitsandbytes."""
    table, classifiers = run(SWEEP), run(CLASSIFIER)
    rows = {(row["choices.method"], row["choices.quant"]): row for _, row in table.iterrows()}
    rows |= {
        (row["choices.method"], "seq-cls"): row for _, row in classifiers.iterrows() if row["choices.quant"] == "none"
    }
    reasons: dict[str, int] = {}
    lines = []
    for method in method_names():
        trainable = [
            rows[method, quant].get("train_info.trainable_parameters") for quant in QUANTS if (method, quant) in rows
        ]
        known = [f"{number:,.0f}" for number in trainable if pd.notna(number)]
        cells = [cell(rows.get((method, kind)), reasons) for kind in (*QUANTS, "seq-cls")]
        lines.append(f"| {method} | {about(method)} | {known[0] if known else ''} | {' | '.join(cells)} |")
    bases = ", ".join(f"{quant} {base_loss(table, quant):.2f}" for quant in QUANTS)
    head = HEAD.format(
        count=len(table) + len(classifiers),
        steps=20,
        sweep=" ".join(SWEEP),
        classifier=" ".join(CLASSIFIER),
        bases=bases,
        versions=versions("peft", "transformers", "torch", "bitsandbytes"),
    )
    target.write_text(head + "\n".join(lines) + notes(reasons))


def run(words: tuple[str, ...], seconds: float | None = None) -> pd.DataFrame:
    """The trials of a sweep, run in a folder of its own; with ``seconds`` those that have ended then."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from peftsweep import cli; cli.main()", *words, "study=methods"]
        if seconds is None:
            subprocess.run(command, cwd=folder, check=True)
        else:
            run_for(seconds, command, folder)
        return peftsweep.load(Path(folder) / "multirun" / "methods")


def run_for(seconds: float, command: Sequence[str], folder: str) -> None:
    """Run a command that is interrupted after ``seconds``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script in the background ignores it, and so would this
    process = subprocess.Popen(command, cwd=folder)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(CANCEL_SECONDS)
    finally:
        process.kill()
        process.wait()


def cell(row: Any, reasons: dict[str, int]) -> str:
    """One trial: its loss and what became of the adapter, or the number of the reason why it was refused."""
    if row is None:
        return ""
    if row["run_info.status"] == "refused":
        message = row["run_info.error.message"]
        reason = message.partition(": ")[2] if message.startswith("not ") else message
        return f"refused ({reasons.setdefault(reason, len(reasons) + 1)})"
    if row["run_info.status"] != "success":
        return str(row["run_info.status"])
    loss = row.get("eval_info.perplexity.loss.value", row["train_info.final_loss"])
    reloads = "R" if pd.notna(row["train_info.reloads"]) and row["train_info.reloads"] else ""
    merges = ""
    if pd.notna(row["train_info.merges"]) and row["train_info.merges"]:  # full fine-tuning has nothing to merge
        merges = "M" if row["train_info.merge_difference"] < EXACT else "m"
    return f"{loss:.2f} {reloads}{merges}".strip()


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
