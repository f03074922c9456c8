"""What is to be known of a GPU host, most wanted first, in one call of at most eight minutes.

    python benchmarks/gpu.py [--minutes 7.8] [--out FOLDER] [--only NAMES] [--skip NAMES]
    python benchmarks/gpu.py --rehearse        # the same on a CPU, at small sizes

First all checks run at the same time, as nothing of them is timed; then the measurements, each alone. Each has a limit
of seconds. What fails or is over its limit ends no other; what has no time left is not begun. Lines are printed as they
come, the whole output is FOLDER/NAME.log, and FOLDER/steps.json says after each step how it ended. It needs the
packages of the project, pytest and pytest-xdist, and no network.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftsweep.study import record

TOP = Path(__file__).parents[1]
GRACE_SECONDS = 8.0  # from the interrupt of what is over its limit until it is killed
LEAST_SECONDS = 15.0  # a step is not begun with less time left
REHEARSED = 3  # times the limits of a rehearsal, as a CPU is slow
DOCTOR = "-c 'from peftsweep import doctor; doctor.main()'"
SWEEP = "-c 'from peftsweep import cli; cli.main()'"
ONE_B = "model=llama3.2_1b model.init=random model.dtype=bfloat16"
TINY = "model=tiny device=cpu"
# Lines that are only in the log: empty ones, bars, casts of 8-bit layers, tests that passed or begin.
PASSED = re.compile(
    r" (PASSED|SKIPPED|XFAIL)\b|^\s*$|^MatMul8bitLt: |^Loading weights: |^tests/\S+::(?!.*(FAILED|ERROR))"
)
FOUR = "method=lora method.r=8,16 quant=none,4bit targets=all_linear train.batch_size=2 train.steps=60"
FOUR += " eval=perplexity eval.perplexity.samples=64"
SHORT_TEXTS = (
    "inference=standard inference.samples=1 inference.runs=3 inference.batch_sizes=[1,16] inference.switch=false"
)
SHORT_TEXTS += (
    " inference.categories={short:{new_tokens:8}} inference.categories.medium=null inference.categories.long=null"
)
PACKING = "benchmarks/packing.py --sides together,one_by_one --rounds 1 --out {out}/packs.json"
QUICK, JUDGED = "train.steps=4 dataset.samples=64", "eval=[perplexity] eval.perplexity.samples=8"


@dataclass(frozen=True)
class Step:
    """A command of Python, its limit in seconds, and the command that rehearses it on a CPU ({out} is the folder)."""

    name: str
    seconds: float
    command: str
    rehearsal: str


CHECKS = (
    Step("doctor", 60, DOCTOR, DOCTOR),
    Step(
        "gpu_tests",
        170,
        "-m pytest -v -m gpu -n 3 --tb=short -rfEs -p no:cacheprovider",
        "-m pytest -v -m gpu -n 0 --tb=short -rfEs -p no:cacheprovider tests/training/test_capture.py",
    ),
    Step(
        "first_example",
        90,
        f"{SWEEP} method=lora method.r=8,16,32 quant=4bit -m",
        f"{SWEEP} {TINY} {QUICK} {JUDGED} -m",
    ),
    Step(
        "int4_quanto",  # whose kernels are compiled at the first use, which took over 70 s
        220,
        f"{SWEEP} method=lora quant=int4_quanto train=quick eval=[perplexity] study=int4_quanto -m",
        f"{SWEEP} {TINY} {QUICK} {JUDGED} quant=int4_quanto study=int4_quanto -m",
    ),
    Step(
        "memory",
        220,
        "benchmarks/memory_prediction.py --scale large --out {out}/memory.json",
        "benchmarks/memory_prediction.py --only method=ia3 --out {out}/memory.json",
    ),
    Step(
        "matrix",
        220,
        "benchmarks/method_matrix.py --differs docs/methods.md 170 hydra.launcher.workers=4",
        "benchmarks/method_matrix.py --differs docs/methods.md 100 method=lora,ia3 quant=none,4bit device=cpu",
    ),
    Step(
        "fast_tests",
        230,
        "-m pytest -v -n 6 --dist worksteal --tb=short -rfE -p no:cacheprovider",
        "-m pytest -v -n 0 --tb=short -rfE -p no:cacheprovider tests/test_layers.py",
    ),
)
MEASUREMENTS = (
    *(
        Step(
            f"workers_{count}",  # seconds of four trials of 1B by so many workers on one GPU
            90,
            f"{SWEEP} {ONE_B} {FOUR} hydra.launcher.workers={count} study=workers_{count} -m",
            f"{SWEEP} {TINY} {QUICK} {JUDGED} method.r=2,4 hydra.launcher.workers={count} study=workers_{count} -m",
        )
        for count in (1, 2)
    ),
    Step(
        "packs",
        110,
        f"{PACKING} --batches 1,4 --steps 14 --capture auto --minutes 1.3",
        f"{PACKING} --batches 1 --steps 4 --quants none",
    ),
    Step(
        "seconds",
        80,
        "benchmarks/time_prediction.py --scale large --seconds 2 --only llama3.2_1b --out {out}/seconds.json",
        "benchmarks/time_prediction.py --seconds 0.1 --only model=tiny --device cpu --out {out}/seconds.json",
    ),
    Step(
        "generation",
        120,
        f"{SWEEP} {ONE_B} method=lora,dora,ia3,hira train.steps=2 eval=[] {SHORT_TEXTS} study=generation -m",
        f"{SWEEP} {TINY} {QUICK} eval=[] {SHORT_TEXTS} study=generation -m",
    ),
    Step(
        "compiled",
        120,
        f"{SWEEP} {ONE_B} method=lora train.compile=none,inductor train.steps=60 eval=[] study=compiled -m",
        f"{SWEEP} {TINY} {QUICK} eval=[] study=compiled -m",
    ),
)


class Running:
    """A step that runs: its lines are printed and kept by a thread of its own."""

    def __init__(self, step: Step, command: str, seconds: float, out: Path) -> None:
        words = [sys.executable, *shlex.split(command.replace("{out}", str(out)))]
        paths = [str(TOP / "src"), str(TOP), os.environ.get("PYTHONPATH")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        env |= {"OMP_NUM_THREADS": "1"} if step.name == "fast_tests" else {}
        own = out / step.name if "cli.main" in command else TOP  # of sweeps the folder that holds their study
        own.mkdir(parents=True, exist_ok=True)
        self.step, self._log = step, (out / f"{step.name}.log").open("w", encoding="utf-8")
        self._begun, self._seconds = time.monotonic(), seconds
        self._command = shlex.join(words[1:])
        print(f"#### {step.name}: {self._command}", flush=True)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        self._process = subprocess.Popen(
            words, cwd=own, env=env, text=True, errors="replace", start_new_session=True, **pipes
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._interrupted: float | None = None

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._log.write(line)
            self._log.flush()
            if not PASSED.search(line):
                print(f"{self.step.name:13} {line.rstrip()[:300]}", flush=True)

    def ended(self) -> bool:
        """Whether it has ended; one that is over its limit is interrupted, and killed if that does not end it."""
        now = time.monotonic()
        if self._process.poll() is None and self._interrupted is None and now - self._begun > self._seconds:
            self._interrupted = now
            self._process.send_signal(signal.SIGINT)
        if self._interrupted is not None and now - self._interrupted > GRACE_SECONDS:
            self.kill()
        return self._process.poll() is not None

    def kill(self) -> None:
        """Kill it and all that it has started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def outcome(self) -> dict[str, Any]:
        """How it ended, and after how many seconds."""
        took = time.monotonic() - self._begun
        self.kill()  # what it has left behind
        self._reader.join(GRACE_SECONDS)
        code = self._process.returncode
        ended = "over its limit" if self._interrupted is not None else "ok" if code == 0 else f"exit code {code}"
        print(f"#### {self.step.name}: {ended}, {took:.0f} s", flush=True)
        return {"ended": ended, "seconds": round(took, 1), "command": self._command}


def run(
    checks: Sequence[Step], measurements: Sequence[Step], seconds: float, out: Path, *, rehearse: bool = False
) -> dict[str, dict[str, Any]]:
    """Run the checks together and then each measurement alone, within ``seconds``; how each ended, by its name."""
    begun, found = time.monotonic(), dict[str, dict[str, Any]]()
    out.mkdir(parents=True, exist_ok=True)
    for group in (checks, *([one] for one in measurements)):
        left = seconds - GRACE_SECONDS - (time.monotonic() - begun)
        if left < LEAST_SECONDS:
            found |= {step.name: {"ended": "not begun"} for step in group}
            keep(out, found)
            continue
        running = list[Running]()
        try:
            for step in group:
                limit = min(step.seconds * (REHEARSED if rehearse else 1), left)
                running.append(Running(step, step.rehearsal if rehearse else step.command, limit, out))
            while running:
                time.sleep(0.1)
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    found[one.step.name] = one.outcome()
                    keep(out, found)
        finally:
            for one in running:
                one.kill()
    for name, outcome in found.items():
        took = f", {outcome['seconds']} s" if "seconds" in outcome else ""
        print(f"{name:13} {outcome['ended']}{took}", flush=True)
    return found


def keep(out: Path, found: dict[str, dict[str, Any]]) -> None:
    """Write what is known until now."""
    record.write_json(out / "steps.json", {"steps": found, "commit": record.git()["git_commit"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.8)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "multirun/gpu")))
    parser.add_argument("--only", help="the steps that are run, with commas between them")
    parser.add_argument("--skip", default="", help="the steps that are left out, with commas between them")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes")
    args = parser.parse_args()
    names = [step.name for step in (*CHECKS, *MEASUREMENTS)]
    if unknown := {*(args.only or "").split(","), *args.skip.split(",")} - {*names, ""}:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    wanted = set(args.only.split(",") if args.only else names) - set(args.skip.split(","))
    checks, measurements = ([step for step in group if step.name in wanted] for group in (CHECKS, MEASUREMENTS))
    # On SIGTERM what runs is ended too. SIGINT is ignored in the background of a script, and would be by the steps.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    found = run(checks, measurements, 60 * args.minutes, args.out.resolve(), rehearse=args.rehearse)
    sys.exit(0 if all(one["ended"] == "ok" for one in found.values()) else 1)


if __name__ == "__main__":
    main()
