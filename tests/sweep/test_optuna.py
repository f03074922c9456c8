"""Hydra's Optuna sweeper over our launcher: what it is told, and what it does with a failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from peftsweep import cli
from peftsweep.config import calls
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


def test_a_wrong_objective_is_one_line(command: Command) -> None:
    for column, problem in (
        ("loss", "objective=loss: must be a column of run_info, train_info, memory, eval_info, generation_info"),
        ("eval_info.gsm8k.accuracy.value", "eval_info.gsm8k is not evaluated; there are: perplexity"),
        ("3", "objective=3: must be a column of the record, or a list of columns"),
    ):
        code, _, err = command(*SEARCH, RATES, f"objective={column}")
        assert (code, problem in err.splitlines()[-1]) == (2, True), err
        assert not records()
    code, _, err = command(*SEARCH, RATES, "objective=eval_info.perplexity.perplexity.valeu")  # known after a trial
    assert (code, len(records())) == (2, 1)
    assert "did you mean 'eval_info.perplexity.perplexity.value'?" in err.splitlines()[-1]


def test_where_the_package_is_missing_one_line_says_so() -> None:
    with pytest.raises(Exception, match="hydra/sweeper") as raised:
        cli.compose(["hydra/sweeper=optunaa"])
    raised.value.missing_cfg_file, raised.value.options = "hydra/sweeper/optuna", ["basic", "grid"]  # type: ignore[attr-defined]
    assert calls.one_line(raised.value) == "hydra/sweeper=optuna: pip install 'peftsweep[optuna]'"
