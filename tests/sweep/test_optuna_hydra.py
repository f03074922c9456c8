"""Hydra's own Optuna sweeper over our launcher, in an environment of its own (`make slow`), as it wants Optuna 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from peftsweep.study.record import Result
from tests.conftest import SMALL

optuna = pytest.importorskip("optuna")
pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

Command = Callable[..., tuple[int, str, str]]
LOSS, MEMORY = "eval_info.perplexity.perplexity.value", "memory.train.rss_peak"
SEARCH = [*(word for word in SMALL if "tiny_math" not in word), "eval=[perplexity]", "adapter.save=false"]
SEARCH += ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1"]
RATES = "train.learning_rate=tag(log,interval(1e-5,1e-2))"


def records() -> list[Result]:
    return [Result.read(file.parent) for file in Path("multirun/default").glob("*/result.json")]


def found() -> Any:
    return OmegaConf.to_container(OmegaConf.load("multirun/.hydra/optimization_results.yaml"))


@pytest.mark.slow
def test_a_search_is_told_its_objective_and_goes_on_where_it_was(command: Command) -> None:
    words = [*SEARCH, RATES, f"objective={LOSS}", "hydra.sweeper.n_trials=2"]
    words += ["hydra.sweeper.storage=sqlite:///optuna.db", "hydra.sweeper.study_name=mine"]
    assert command(*words)[0] == 0
    assert command(*words)[0] == 0
    losses = {
        one.config["train"]["learning_rate"]: one.eval_info["perplexity"]["perplexity"]["value"] for one in records()
    }
    told = optuna.load_study(study_name="mine", storage="sqlite:///optuna.db").trials
    assert len(told) == 4
    assert {one.params["train.learning_rate"]: one.value for one in told} == pytest.approx(losses)
    assert found()["best_value"] == min(losses.values())


@pytest.mark.slow
def test_a_search_may_have_several_objectives(command: Command) -> None:
    words = [*SEARCH, "method.r=choice(2,32)", f"objective=[{LOSS},{MEMORY}]", "hydra.sweeper.n_trials=2"]
    assert command(*words, "hydra.sweeper.direction=[minimize,minimize]")[0] == 0
    measured = {
        (one.eval_info["perplexity"]["perplexity"]["value"], one.memory["train"]["rss_peak"]) for one in records()
    }
    assert {tuple(solution["values"]) for solution in found()["solutions"]} <= measured


@pytest.mark.slow
def test_a_failed_trial_has_no_value_and_the_search_goes_on(
    command: Command, fails_at_rank: Callable[[int], None]
) -> None:
    fails_at_rank(2)
    words = [*SEARCH, f"objective={LOSS}", "hydra.sweeper.max_failure_rate=1.0", "hydra.sweeper.n_trials=2"]
    words += ["hydra.sweeper.sampler.seed=0"]  # which draws both ranks
    code, out, _ = command(*words, "method.r=choice(2,4)")
    assert (code, sorted(one.status.name for one in records())) == (0, ["failed", "success"])
    assert out.count("failed in train: RuntimeError: broken") == 1
    assert found()["best_params"] == {"method.r": 4}
    code, _, err = command(*words, "method.r=choice(2,2)", "study=none")
    assert (code, "Traceback" in err) == (1, False)  # every trial failed, as was said of it
