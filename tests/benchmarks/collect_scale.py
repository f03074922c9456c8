"""How long does the collector take, and how much memory, as a study grows?

    python tests/benchmarks/collect_scale.py [--trials 1000 3000 10000] [--out FILE]

Writes studies of synthetic trials, as a sweep leaves them on the disk (a record of 200 columns and ten logged steps
each), and runs `peftsweep-collect --no-plots` on each in a process of its own, so that its imports count too and its
peak memory is its own. The sizes take turns, ``--repeats`` times; the median counts. Beside the time on the clock,
which other processes lengthen, stands that of the processor. Growth is the exponent of the processor's time, beyond
that of the imports alone, between sizes: 1 is linear.
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

COLUMNS = 200
STEPS = 10
METHODS = ("lora", "dora", "ia3", "hira")
STAGES = ("load", "data", "baseline", "attach", "train", "eval", "save", "reload")
MEMORY = ("allocated_peak", "allocated_mean", "allocated_p99", "reserved_peak", "reserved_mean", "reserved_p99")
COLLECT = "import sys; from peftsweep.cli import collect; sys.argv[0] = 'peftsweep-collect'; collect()"
IMPORTS = "from peftsweep import cli, collect"


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
        starts = []
        for _ in range(options.repeats):
            starts.append(timed(["-c", IMPORTS])["cpu_seconds"])
            for trials in options.trials:
                runs[trials].append(timed(["-c", COLLECT, f"multirun/n{trials}", "--no-plots"]))
                print(f"{trials:6} trials: {runs[trials][-1]}", flush=True)
        columns = table_width(Path("multirun") / f"n{options.trials[0]}" / "results.parquet")
    report = summarise(runs, statistics.median(starts), columns)
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
    """``trials`` records and logs of steps, with a gap here and a failure there as real studies have them."""
    for number in range(trials):
        place = folder / f"tiny-{METHODS[number % 4]}-r{number}-{number:010x}"
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(record(folder.name, place.name, number), indent=1) + "\n")
        rows = [
            {"step": s, "steps": STEPS, "epoch": s / STEPS, "loss": 3 / s, "learning_rate": 1e-4, "tokens": 512 * s}
            | {"seconds": 0.1 * s, "tokens_per_second": 5120.0, "memory_allocated": 10**9 + s}
            for s in range(1, STEPS + 1)
        ]
        (place / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(study: str, trial: str, number: int) -> dict[str, Any]:
    """A record of ``COLUMNS`` values; every tenth trial failed, so that its scores are missing."""
    failed = number % 10 == 9
    error = {"type": "RuntimeError", "message": "broken", "stage": "train", "traceback": "line\n" * 20}
    content: dict[str, Any] = {
        "schema_version": 1,
        "run_info": {
            "trial": trial,
            "labels": [trial],
            "study": study,
            "identity": f"{number:010x}",
            "training": f"{number:010x}",
            "created_at": f"2026-01-{1 + number % 28:02}T{number % 24:02}:00:00+00:00",
            "host": "host",
            "category": "main",
            "status": "failed" if failed else "success",
            "error": error if failed else None,
            "total_seconds": 60.5 + number,
        },
        "choices": {"method": METHODS[number % 4], "quant": ("none", "8bit", "4bit")[number % 3], "model": "tiny"},
        "config": {
            "seed": number % 5,
            "method": {
                "r": 2 ** (number % 7),
                "target_modules": ["q_proj", "v_proj"],
                "alpha": ("auto", 16)[number % 2],
            },
            "train": {"learning_rate": 1e-4 * (1 + number % 9), "steps": 100 + number % 3, "clip": None},
        },
        "train_info": {"trainable_parameters": 1000 * number, "train_seconds": 30.5 + number, "adapter_bytes": number},
        "memory": {} if failed else {stage: dict.fromkeys(MEMORY, 10**9 + number) for stage in STAGES},
        "eval_info": {}
        if failed
        else {"task": {"accuracy": {"value": (number % 97) / 97, "stderr": 0.01, "n": 1319}, "seconds": 12.5}},
        "meta_info": {"packages": {name: {"version": "1.0", "commit": None} for name in ("torch", "peft")}},
    }
    held = 90  # columns that a table of these has beside the ones below
    kinds = (number * 0.5, number, f"option {number % 7}", number % 2 == 0, None if number % 3 else number)
    content["config"]["extra"] = {f"key_{n:03}": kinds[n % len(kinds)] for n in range(COLUMNS - held)}
    return content


if __name__ == "__main__":
    main()
