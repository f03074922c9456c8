"""How long until the first worker takes its first job, by the way it is started?

    python benchmarks/worker_start.py [--rounds 5] [--out FILE]

From the start of a command's process to the answer of a worker to an empty job, the command importing all that it
needs at the same time, as in a sweep: forked from a process that has imported everything (a host without a GPU), from
one that has imported what leaves CUDA alone (a host with one; the worker is started ahead), and spawned. In turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

PROBE = """
import importlib, sys, time
start = time.perf_counter()
way = sys.argv[1]
from peftsweep.sweep import processes
if way == "spawned":
    processes._method = "spawn"
else:
    if way == "libraries":
        processes.PRELOAD = "libraries_only"
    processes.begin_to_import()
if way != "everything":
    processes.start_ahead(["0"])
importlib.import_module("peftsweep.sweep.everything")
imported = time.perf_counter()
child = processes.start("0" if way != "everything" else processes.CPU, None)
child.connection.send(([], None))
assert child.connection.recv()[0] == "end"
print(imported - start, time.perf_counter() - start)
child.end(processes.EXIT_SECONDS)
"""
LIBRARIES_ONLY = """
import gc, importlib
from unittest import mock
gc.disable()
with mock.patch("torch.cuda.device_count", lambda: 1):
    import peftsweep.sweep.preload
"""
WAYS = ("everything", "libraries", "spawned")


def main() -> None:
    """Print and write the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "libraries_only.py").write_text(LIBRARIES_ONLY)
        (Path(place) / "probe.py").write_text(f"if __name__ == '__main__':\n{_indented(PROBE)}")
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for number in range(options.rounds):
            for way in WAYS[:: 1 if number % 2 else -1]:
                seconds[way].append(once(Path(place), way))
                print(
                    f"{way}: imports {seconds[way][-1][0]:.2f} s, first answer after {seconds[way][-1][1]:.2f} s",
                    flush=True,
                )
    found = {
        way: {
            "seconds": statistics.median(total for _, total in rows),
            "seconds_beyond_the_imports": statistics.median(total - imports for imports, total in rows),
            "rounds": [round(total, 2) for _, total in rows],
        }
        for way, rows in seconds.items()
    }
    facts = {"versions": {name: version(name) for name in ("torch", "transformers", "peft")}, "cores": os.cpu_count()}
    text = json.dumps(facts | {"machine": platform.machine()} | found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def once(place: Path, way: str) -> tuple[float, float]:
    """Seconds until the command has imported all, and until the worker has answered."""
    path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(place / "probe.py"), way]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    imports, total = map(float, done.stdout.split())
    return imports, total


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.strip().splitlines())


if __name__ == "__main__":
    main()
