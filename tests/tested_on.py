"""Tests under other kernels and versions than usual; how they ended is written into docs/tested_on.md.

    python tests/tested_on.py                    # the numeric tests under all sets of CPU kernels, one thread and two
    python tests/tested_on.py --fast             # all fast tests in place of the numeric ones
    python tests/tested_on.py --other            # under one set that is not the machine's own; writes nothing
    python tests/tested_on.py --versions lowest  # the fast tests in this environment, under that name

A set is chosen by environment variables that MKL, oneDNN and ATen read when they are loaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from peftsweep.study import record

FAST = "not slow and not gpu"
MARKED = f"kernels and {FAST}"
OWN = "own kernels"
COMPATIBLE = "MKL_CBWR=COMPATIBLE"
ATEN_DEFAULT = "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41"
AVX2 = "MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2"
SETS: dict[str, dict[str, str]] = {OWN: {}} | {
    name: dict(word.split("=") for word in name.split()) for name in (AVX2, COMPATIBLE, ATEN_DEFAULT)
}
THREADS = (1, 2)
ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "tested_on.md"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Run:
    """What pytest came to."""

    code: int
    passed: int
    failed: int
    seconds: float


def run_tests(kernels: dict[str, str], threads: int, chosen: str = MARKED) -> Run:
    """Run the tests with the marks ``chosen`` in as many processes as have ``threads`` cores each."""
    environment = {key: value for key, value in os.environ.items() if key not in record.KERNEL_SWITCHES}
    environment |= kernels | {"OMP_NUM_THREADS": str(threads)}
    processes = max(1, min(4, (os.cpu_count() or 1) // threads))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [
            "-q",
            "--durations=5",
            "-m",
            chosen,
            "-n",
            str(processes),
            "--dist",
            "worksteal",
            f"--junitxml={report}",
        ]
        code = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment).returncode
        if not report.exists():
            sys.exit(f"pytest ended without a report, with exit code {code}")
        suite = ElementTree.parse(report).getroot()[0]
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    passed = int(suite.get("tests", 0)) - failed - int(suite.get("skipped", 0))
    return Run(code, passed, failed, float(suite.get("time", 0)))


def other_set() -> str:
    """A set that is not what this machine takes by itself."""
    return COMPATIBLE if torch.backends.mkl.is_available() else ATEN_DEFAULT


def processor() -> str:
    """This machine's CPU, the kernels that ATen takes on it, and its number of cores."""
    stamp = record.environment()
    return f"{stamp['system']['processor']}, {stamp['torch']['cpu_capability']}, {stamp['system']['cpus']} cores"


def row(name: str, threads: int, run: Run) -> str:
    """A line of the table: what was run, how it ended, on what, and when."""
    stamp = record.environment()
    versions = ", ".join(f"{name} {stamp['packages'][name]['version']}" for name in PACKAGES)
    python = f"Python {stamp['system']['python']}"
    cells = [name, threads, run.passed, run.failed, f"{run.seconds:.0f}", processor(), f"{python}, {versions}"]
    return f"| {' | '.join(map(str, cells))} | {record.now()[:10]} |"


def write(name: str, threads: int, run: Run) -> None:
    """Put the row into docs/tested_on.md, in place of the last one of the same set, number of threads and CPU."""
    content = TABLE.read_text(encoding="utf-8")
    head = content.index("|--") + content[content.index("|--") :].index("\n") + 1
    end = content.rindex("|\n") + 2
    kept = {_order(line): line for line in [*content[head:end].splitlines(), row(name, threads, run)]}
    lines = "".join(f"{kept[key]}\n" for key in sorted(kept))
    record.write_text(TABLE, content[:head] + lines + content[end:])


def _order(line: str) -> tuple[str, bool, str, str]:
    """The place of a row: those of a CPU together, the numeric tests first."""
    name, threads, *_, cpu, _, _ = (cell.strip() for cell in line.strip("|").split(" | "))
    return cpu, name not in SETS, name, threads


def main() -> None:
    """Run what the command line asks for; the exit code is 1 if any test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", action="store_true", help="only one set that is not the machine's own, one thread")
    parser.add_argument("--set", choices=SETS, action="append", help="only this set")
    parser.add_argument("--threads", type=int, choices=THREADS, action="append", help="only with so many threads")
    parser.add_argument("--fast", action="store_true", help="all fast tests")
    parser.add_argument("--versions", metavar="NAME", help="instead: the fast tests with the versions installed here")
    options = parser.parse_args()
    if options.versions:
        run = run_tests({}, 1, FAST)
        write(f"{options.versions} versions", 1, run)
        sys.exit(run.code)
    codes = []
    for name in [other_set()] if options.other else options.set or SETS:
        for threads in [1] if options.other else options.threads or THREADS:
            print(f"== {name}, {threads} thread{'s'[: threads - 1]}", flush=True)
            run = run_tests(SETS[name], threads, FAST if options.fast else MARKED)
            codes.append(run.code)
            if not options.other:
                write(f"all fast tests, {name}" if options.fast else name, threads, run)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
