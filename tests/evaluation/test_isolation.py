"""Code of a user's leaves its process as it found it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.evaluation.evaluate import Evaluation
from peftsweep.evaluation.isolation import process_state_kept

CHANGES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {  # what is done, and where it shows
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "new variable": (lambda: os.environ.update(A_NEW_ONE="1"), lambda: os.environ.get("A_NEW_ONE")),
    "other value": (lambda: os.environ.update(PATH=""), lambda: os.environ["PATH"]),
    "umask": (lambda: os.umask(0o077), lambda: (found := os.umask(0o022), os.umask(found))[0]),
    "signals": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
    "gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "device": (lambda: torch.set_default_device("meta"), lambda: torch.ones(1).device),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "determinism": (lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_block_changes_of_its_process_is_put_back(what: str) -> None:
    change, shown = CHANGES[what]
    before = shown()
    with process_state_kept():
        change()
        assert shown() != before
    assert shown() == before


def test_it_is_put_back_after_an_error(tmp_path: Path) -> None:
    before = os.getcwd()

    def fail() -> None:
        with process_state_kept():
            os.chdir(tmp_path)
            raise ValueError("of a metric")

    with pytest.raises(ValueError, match="of a metric"):
        fail()
    assert os.getcwd() == before


def wanders(model: Any, tokenizer: Any, examples: Any, batch_size: int, max_length: int) -> Evaluation:
    """An evaluation that leaves by another folder and switches gradients off."""
    os.chdir("/")
    torch.set_grad_enabled(False)
    return Evaluation({}, [], {})


def test_an_evaluation_leaves_the_process_as_it_was(compose: Callable[..., Trial]) -> None:
    one = compose("eval=[perplexity]", f"eval.perplexity._target_={__name__}.wanders")
    here = os.getcwd()
    evaluate: Callable[..., Evaluation] = build.evaluator(one, "perplexity")
    evaluate(None, None, [])
    assert os.getcwd() == here
    assert torch.is_grad_enabled()
