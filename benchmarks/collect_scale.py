"""How long does the collector take, and how much memory, as a study grows?

    python benchmarks/collect_scale.py [--trials 1000 3000 10000] [--out FILE]

Writes studies of made-up trials, as a sweep of methods, quantisations, ranks, rates and seeds leaves them on the disk
(a record of 200 columns, ten logged steps and answers to 100 test rows each), and runs `peftsweep-collect`, with its
figures and report.html, on each in a process of its own, so that its imports count too and its peak memory is its own.
The sizes take turns, ``--repeats`` times; the median counts. The largest is collected without plots, too. Beside the
time on the clock, which other processes lengthen, stands that of the processor. Growth is the exponent of the
processor's time, beyond that of the imports, between sizes: 1 is linear.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS, OTHERS = 200, 93  # of a table, and what it has beside the settings that fill it up
STEPS = 10
TEST_ROWS = 100
METHODS = ("lora", "dora", "rslora", "pissa", "hira", "oft", "vera", "loha", "adalora", "fourierft")
QUANTS, RANKS, SEEDS = ("none", "8bit", "4bit"), (1, 2, 4, 8, 16, 32, 64), 3
STAGES = ("load", "data", "baseline", "attach", "train", "eval", "save", "reload")
MEMORY = ("allocated_peak", "allocated_mean", "allocated_p99", "reserved_peak", "reserved_mean", "reserved_p99")
COLLECT = "import sys; from peftsweep.cli import collect; sys.argv[0] = 'peftsweep-collect'; collect()"
IMPORTS = "from peftsweep import cli; from peftsweep.analysis import collect"


def main() -> None:
    """Print and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 3000, 10000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out and options.out.resolve()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for trials in options.trials:
            write_study(Path("multirun") / f"n{trials}", trials)
        runs: dict[int, list[dict[str, float]]] = {trials: [] for trials in options.trials}
        starts, largest = [], max(options.trials)
        without_plots: list[dict[str, float]] = []
        for _ in range(options.repeats):
            starts.append(timed(["-c", IMPORTS])["cpu_seconds"])
            for trials in options.trials:
                runs[trials].append(timed(["-c", COLLECT, f"multirun/n{trials}"]))
                print(f"{trials:6} trials: {runs[trials][-1]}", flush=True)
            without_plots.append(timed(["-c", COLLECT, "--no-plots", f"multirun/n{largest}"]))
            print(f"{largest:6} trials without plots: {without_plots[-1]}", flush=True)
        columns = table_width(Path("multirun") / f"n{options.trials[0]}" / "results.parquet")
        pages = {n: (Path("multirun") / f"n{n}" / "report.html").stat().st_size for n in options.trials}
    report = summarise(runs, statistics.median(starts), columns) | {"report_html_bytes": pages}
    report["without_plots"] = {largest: without_plots}
    print(json.dumps(report, indent=1))
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


def summarise(runs: dict[int, list[dict[str, float]]], start: float, columns: int) -> dict[str, Any]:
    """Medians, and the exponent of the growth between neighbouring sizes."""
    sizes = sorted(runs)
    cpu = {trials: statistics.median(run["cpu_seconds"] for run in runs[trials]) for trials in sizes}
    growth = {
        f"{small} to {large}": math.log((cpu[large] - start) / (cpu[small] - start)) / math.log(large / small)
        for small, large in itertools.pairwise(sizes)
    }
    return {
        "columns": columns,
        "steps_a_trial": STEPS,
        "seconds": {trials: statistics.median(run["seconds"] for run in runs[trials]) for trials in sizes},
        "cpu_seconds": cpu,
        "cpu_seconds_of_imports": start,
        "growth_exponent": growth,
        "peak_memory_bytes": {trials: max(run["peak"] for run in runs[trials]) for trials in sizes},
        "runs": runs,
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("peftsweep", "pandas", "pyarrow", "numpy")},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def timed(words: list[str]) -> dict[str, float]:
    """Wall time, time of the processor and peak resident memory of a Python process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the collector ended with {status}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss * 1024.0}


def table_width(file: Path) -> int:
    """How many columns the table has."""
    from pyarrow import parquet

    return len(parquet.read_schema(file).names)


def write_study(folder: Path, trials: int) -> None:
    """``trials`` of a sweep of methods, quantisations, ranks, learning rates and seeds, with some failures."""
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0.0, 1.5, TEST_ROWS)
    questions = [{"prompt": f"What is {n} times {n + 1}?", "answer": str(n * (n + 1))} for n in range(TEST_ROWS)]
    grid = itertools.product(range(trials), METHODS, QUANTS, RANKS, range(SEEDS))
    for number, (rate, method, quant, rank, seed) in enumerate(itertools.islice(grid, trials)):
        place = folder / f"tiny-{method}-{quant}-r{rank}-{seed}-{number:010x}"
        ability = METHODS.index(method) / 10 + math.log2(rank) / 4 - QUANTS.index(quant) / 3 - rate / 5
        ability += generator.normal(0.0, 0.2)
        correct = generator.logistic(ability - difficulty) > 0
        choices = {"method": method, "quant": quant, "model": "tiny", "dataset": "made_up"}
        config = {"seed": seed, "method": {"r": rank, "target_modules": ["q_proj", "v_proj"]}}
        config["train"] = {"learning_rate": 1e-4 * (1 + rate), "steps": 100, "clip": None}
        content = record(folder.name, place.name, number, choices, config, float(correct.mean()))
        (place / "predictions").mkdir(parents=True)
        (place / ".hydra").mkdir()
        words = [f"method={method}", f"quant={quant}", f"method.r={rank}", f"seed={seed}"]
        (place / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in words))
        (place / "result.json").write_text(json.dumps(content, indent=1) + "\n")
        rows = [
            {"step": s, "steps": STEPS, "epoch": s / STEPS, "loss": (3 - ability) / s, "learning_rate": 1e-4}
            | {"seconds": 0.1 * s, "tokens": 512 * s, "tokens_per_second": 5120.0, "memory_allocated": 10**9 + s}
            for s in range(1, STEPS + 1)
        ]
        (place / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = (row | {"prediction": "42", "correct": bool(c)} for row, c in zip(questions, correct, strict=True))
        (place / "predictions" / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def record(
    study: str, trial: str, number: int, choices: dict[str, Any], config: dict[str, Any], accuracy: float
) -> dict[str, Any]:
    """A record of ``COLUMNS`` values; every fiftieth trial failed, so that its scores are missing."""
    failed, rank = number % 50 == 49, config["method"]["r"]
    error = {"type": "RuntimeError", "message": "broken", "stage": "train", "traceback": "line\n" * 20}
    parameters, quantised = 10_240 * rank, choices["quant"] != "none"
    seconds = 30.0 + number % 7 + (10.0 if quantised else 0.0)
    stderr = math.sqrt(accuracy * (1 - accuracy) / (TEST_ROWS - 1))
    scores = {"accuracy": {"value": accuracy, "stderr": stderr, "n": TEST_ROWS}, "seconds": 12.5}
    base = {"base_accuracy": {"value": 0.1, "stderr": 0.03, "n": TEST_ROWS}}
    peaks = {stage: dict.fromkeys(MEMORY, 10**9 + 8 * parameters - 10**8 * quantised) for stage in STAGES}
    extra = (0.5, 7, "option", True, None)
    config["extra"] = {f"key_{n:03}": extra[n % len(extra)] for n in range(COLUMNS - OTHERS)}
    trained = {"trainable_parameters": parameters, "total_parameters": 900_000 + parameters}
    trained |= {"adapter_bytes": 4 * parameters + 1000, "train_seconds": seconds, "tokens_per_second": 5120.0}
    return {
        "schema_version": 1,
        "run_info": {
            "trial": trial,
            "labels": [trial],
            "study": study,
            "identity": f"{number:010x}",
            "training": f"{number:010x}",
            "created_at": f"2026-01-{1 + number // 1440:02}T{number // 60 % 24:02}:{number % 60:02}:00+00:00",
            "host": "host",
            "category": "main",
            "status": "failed" if failed else "success",
            "error": error if failed else None,
            "total_seconds": 30.0 + seconds,
        },
        "choices": choices,
        "config": config,
        "train_info": {} if failed else trained,
        "memory": {} if failed else peaks,
        "eval_info": {} if failed else {"task": scores | base},
        "meta_info": {"packages": {name: {"version": "1.0", "commit": None} for name in ("torch", "peft")}},
    }


if __name__ == "__main__":
    main()
