"""Other launchers of Hydra's: the same trials, words and numbers, whatever happens to their jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from peftsweep import InputError, engine, record, study, trial
from peftsweep.config import Trial
from peftsweep.display import Display
from peftsweep.record import Result, Status

from .conftest import SMALL, scores

Command = Callable[..., tuple[int, str, str]]
Compose = Callable[..., Trial]
COST = ("seconds", "tokens_per_second", "epoch_seconds", "epoch_tokens_per_second", "epoch_memory_peak")


def needs(launcher: str) -> pytest.MarkDecorator:
    package = f"hydra_plugins.hydra_{launcher}_launcher"
    return pytest.mark.skipif(find_spec(package) is None, reason=f"hydra-{launcher}-launcher is not installed")


def records(name: str = "default") -> dict[str, Result]:
    found = [Result.read(file.parent) for file in Path("multirun", name).glob("*/result.json")]
    return {result.trial: result for result in found}


def numbers(name: str) -> dict[str, Any]:
    return {name: (one.status, scores(one), one.train_info["final_loss"]) for name, one in records(name).items()}


def start(*words: str) -> subprocess.Popen[str]:
    door = "from peftsweep import cli; cli.main()"
    return subprocess.Popen(
        [sys.executable, "-c", door, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def trained(process: subprocess.Popen[str], rows: int) -> int:
    """The process that trains, once it has logged so many rows."""
    for _ in range(1200):
        for claim in Path("multirun/default/.claims").glob("*.json"):
            folder = next(Path("multirun/default").glob(f"*-{claim.stem}"), Path())
            if len(record.read_lines(folder / "steps.jsonl")) >= rows:
                return int(json.loads(claim.read_text())["pid"])
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("nothing is trained")


def logged(name: str) -> list[dict[str, Any]]:
    (file,) = Path("multirun", name).glob("*/steps.jsonl")
    return [{key: value for key, value in row.items() if key not in COST} for row in record.read_lines(file)]


@needs("submitit")
def test_a_preempted_job_writes_a_checkpoint_and_goes_on_to_the_bit(command: Command) -> None:
    words = [*SMALL, "train.steps=60", "train.log_every=1", "eval=[perplexity]"]
    words.remove("eval.tiny_math.samples=8")
    process = start(*words, "hydra/launcher=submitit_local")
    os.kill(trained(process, 5), signal.SIGUSR2)  # as SLURM tells a job before it takes the machine away
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, ""), out
    assert command(*words, "study=undisturbed")[0] == 0
    (ended,) = records().values()
    assert 5 <= ended.run_info["resumed"] < 60
    assert logged("default") == logged("undisturbed")
    assert numbers("default") == numbers("undisturbed")
    saved = [next(Path("multirun", name).glob("*/adapter/*.safetensors")) for name in ("default", "undisturbed")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
