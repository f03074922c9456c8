"""How long does `dry_run=true` take over 2,000 points, how much CPU a point, and when does it say something first?

    python benchmarks/planning.py [--points 2000] [--out FILE]

Every method on the embedded model, unquantised and in 4 bits, with as many seeds as make ``--points`` at least. The
command writes into a pipe, as under a scheduler. `first_line_seconds` is from its start, its imports included, and
`longest_silence_seconds` from then on. CPU seconds are those of the command and of all processes that it has started;
`imports_cpu_seconds`, those of a dry run of one point, are left out of `cpu_milliseconds_a_point`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from peftsweep.config.fill import conf_dir

OURS = "import sys; from peftsweep.cli import main; sys.argv[0] = 'peftsweep'; main()"
QUANT = ("none", "4bit")


def main() -> None:
    """Print and write the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out and options.out.resolve()
    methods = len([*Path(conf_dir(), "method").glob("*.yaml")])
    seeds = math.ceil(options.points / methods / len(QUANT))
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        few = dry_run([], shown=False)
        words = ["method=glob(*)", f"quant={','.join(QUANT)}", f"seed=range(0,{seeds})"]
        many = dry_run(words, shown=True)
        plan = json.loads(Path("multirun/default/plan.json").read_text())
    points = methods * len(QUANT) * seeds
    assert len(plan) == points
    shapes = len({(row["trainable_parameters"], row["predicted_memory_bytes"]) for row in plan})
    facts = {
        "command": words,
        "points": points,
        "methods_times_quantisations": methods * len(QUANT),
        "sizes_that_differ": shapes,
        "seconds": many["seconds"],
        "cpu_seconds": many["cpu_seconds"],
        "imports_cpu_seconds": few["cpu_seconds"],
        "cpu_milliseconds_a_point": 1e3 * (many["cpu_seconds"] - few["cpu_seconds"]) / points,
        "first_line_seconds": many["first_line_seconds"],
        "longest_silence_seconds": many["longest_silence_seconds"],
        "load_average": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("peftsweep", "torch", "transformers", "peft", "hydra-core")},
    }
    text = json.dumps(facts, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")


def dry_run(words: Sequence[str], *, shown: bool) -> dict[str, float]:
    """Seconds of the command, of the processors, until its first line and of its longest silence after that."""
    command = [sys.executable, "-c", OURS, *words, "dry_run=true", "device=cpu"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    times = []
    for line in process.stdout:
        times.append(time.perf_counter() - start)
        if shown and len(times) % 100 == 1:
            print(f"{times[-1]:.1f} s: {line}", end="", flush=True)
    _, status, usage = os.wait4(process.pid, 0)
    assert not status
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "first_line_seconds": times[0],
        "longest_silence_seconds": max((b - a for a, b in itertools.pairwise(times)), default=0.0),
    }


if __name__ == "__main__":
    main()
