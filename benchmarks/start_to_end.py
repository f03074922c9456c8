"""How long does a sweep take from start to end, beside a shell loop over a script, and what of it is no trial?

    python benchmarks/start_to_end.py [--rounds 3] [--train-seconds 3] [--points 1000] [--out FILE]

Twelve LoRA trials of the embedded model (four ranks, three seeds) on the same rows: by `peftsweep` with one worker
(the default on a CPU; it takes all cores) and with two, and by a loop that starts `train_one.py` for each, which does
the same with plain transformers and PEFT: the same number of steps of the same size, perplexity and written answers of
base and adapter on 200 rows, the adapter saved. All in turns, in fresh folders. How many steps are ``--train-seconds``
of training is found out first. ``outside_trials`` are the seconds of each sweep in which no trial ran: in all, before
the first (imports, checks, the worker's start), and from the end of each trial to the next. `planning` is the time
from the command to the first trial (composed, checked, hashed, looked up) of a sweep over so many points, less that of
ten, for each point.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import peftsweep
from peftsweep.cli import NOT_RUN, compose
from peftsweep.config.compose import trial as make_trial
from peftsweep.data import templates
from peftsweep.models import model
from peftsweep.schema import ModelConfig
from peftsweep.study import store, sweep_record

RANKS, SEEDS = (4, 8, 16, 32), (0, 1, 2)
HERE = Path(__file__).resolve().parent
OURS = "import sys; from peftsweep.cli import main; sys.argv[0] = 'peftsweep'; main()"
FEW = 10  # points


def main() -> None:
    """Print and write the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-seconds", type=float, default=3.0)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out and options.out.resolve()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        rows_of_the_task(Path("rows"))
        sweep("first", 30)
        step_seconds = peftsweep.load("first")["train_info.step_seconds_p50"].median()
        steps = round(options.train_seconds / step_seconds)
        sides: dict[str, Callable[[str, int], list[float]]]
        sides = {"one_worker": sweep, "shell_loop": shell_loop, "two_workers": partial(sweep, workers=2)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                scores = sides[name](f"{name}{number}", steps)
                seconds[name].append(time.perf_counter() - start)
                print(f"{name}: {seconds[name][-1]:.1f} s, accuracies {scores}", flush=True)
        studies = [f"one_worker{number}" for number in range(options.rounds)]
        sweeps, rounds = [name for name in sides if name != "shell_loop"], range(options.rounds)
        outside = {name: [outside_trials(f"{name}{number}") for number in rounds] for name in sweeps}
        train_seconds = [float(peftsweep.load(one)["train_info.train_seconds"].median()) for one in studies]
        planned = {points: planning(points) for points in (FEW, options.points)}
    ratios = {
        name: [ours / theirs for ours, theirs in zip(seconds[name], seconds["shell_loop"], strict=True)]
        for name in sweeps
    }
    result = {
        "share_of_the_shell_loops_time": {
            name: {"median": statistics.median(every), "all": every} for name, every in ratios.items()
        },
        "seconds": seconds,
        "outside_trials": outside,
        "trials": len(RANKS) * len(SEEDS),
        "steps": steps,
        "train_seconds_of_a_trial": train_seconds,
        "planning": {
            "points": options.points,
            **{
                f"{key}_milliseconds_a_point": 1e3 * (planned[options.points][key] - few) / (options.points - FEW)
                for key, few in planned[FEW].items()
            },
        },
        "load_average": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "versions": {name: version(name) for name in ("peftsweep", "torch", "transformers", "peft", "hydra-core")},
    }
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def rows_of_the_task(folder: Path) -> None:
    """The rows that our trials use, for the script."""
    cfg = compose([])
    one = make_trial(cfg, cfg.hydra.runtime.choices)
    dataset, rows = one.config.dataset, one.rows
    assert rows is not None
    folder.mkdir()
    for split, some in (("train", rows.train), ("test", rows.test[:200])):
        found = templates.examples(some, dataset.prompt, dataset.answer)
        lines = [json.dumps({"prompt": example.prompt, "answer": example.answer}) for example in found]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))


def sweep(name: str, steps: int, workers: int = 1) -> list[float]:
    ranks, seeds = (",".join(map(str, values)) for values in (RANKS, SEEDS))
    words = [f"method.r={ranks}", f"seed={seeds}", f"train.steps={steps}", f"study={name}"]
    words.append(f"hydra.launcher.workers={workers}")
    subprocess.run([sys.executable, "-c", OURS, *words], check=True, stdout=subprocess.DEVNULL)
    return sorted(float(value) for value in peftsweep.load(name)["eval_info.tiny_math.accuracy.value"])


def outside_trials(name: str) -> dict[str, float]:
    """Of the sweep of that study, as its record says."""
    found = sweep_record.last(store.folder(name)) or {}
    gaps = len(RANKS) * len(SEEDS) - 1
    return {
        "seconds": found["seconds_outside_trials"],
        "before_the_first": found["seconds_before_trials"],
        "from_one_to_the_next": found["seconds_between_trials"] / gaps,
    }


def shell_loop(name: str, steps: int) -> list[float]:
    source = str(model.source(ModelConfig(name_or_path="tiny")))
    found = []
    for rank in RANKS:
        for seed in SEEDS:
            folder = Path(name, f"r{rank}-{seed}")
            words = {"model": source, "rows": "rows", "rank": rank, "seed": seed, "steps": steps, "out": folder}
            arguments = [text for key, value in words.items() for text in (f"--{key}", str(value))]
            subprocess.run([sys.executable, str(HERE / "train_one.py"), *arguments], check=True)
            found.append(json.loads((folder / "scores.json").read_text())["accuracy"])
    return sorted(found)


def planning(points: int) -> dict[str, float]:
    """Seconds until the first trial would start, on the clock and of the processor; the deadline has passed by then."""
    words = [f"seed=range(0,{points})", "hydra.launcher.deadline=0.01s", f"study=planned{points}", "quiet=true"]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", OURS, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == NOT_RUN  # the deadline
    return {"wall": time.perf_counter() - start, "cpu": usage.ru_utime + usage.ru_stime}


if __name__ == "__main__":
    main()
