"""A search by Optuna: its space, what it is told, what it prunes, and that it goes on where it was cut off."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from peftsweep import cli
from peftsweep.config import checks
from peftsweep.errors import InputError
from peftsweep.search import pruning, search, space
from peftsweep.search.search import Options, Search
from peftsweep.study.record import Result
from tests.conftest import SMALL, start, wait_for

Command = Callable[..., tuple[int, str, str]]
LOSS, MEMORY = "eval_info.perplexity.perplexity.value", "memory.train.rss_peak"
WORDS = [*(word for word in SMALL if "tiny_math" not in word), "eval=[perplexity]", "adapter.save=false"]
WORDS += ["hydra/sweeper=optuna_current"]
RATES = "train.learning_rate=tag(log,interval(1e-5,1e-2))"


def records(name: str = "default") -> list[Result]:
    return [Result.read(file.parent) for file in Path("multirun", name).glob("*/result.json")]


def told(name: str = "default") -> list[optuna.trial.FrozenTrial]:
    """The trials of the only search in the study's folder."""
    storage = pruning.open_storage(str(Path("multirun", name, pruning.JOURNAL)))
    trials: list[optuna.trial.FrozenTrial] = optuna.load_study(study_name=None, storage=storage).trials
    return trials


# ---- the space -------------------------------------------------------------------------------------


def dimensions(*words: str) -> tuple[dict[str, space.Dimension], list[str]]:
    return space.split(words, OverridesParser.create().parse_overrides([*words]))


@pytest.mark.parametrize(
    ("word", "distribution"),
    [
        ("method.r=choice(8,16)", CategoricalDistribution([8, 16])),
        ("method.r=8,16,8", CategoricalDistribution([8, 16])),
        ("quant=none,4bit", CategoricalDistribution(["none", "4bit"])),
        ("train.epochs=null,1.5,2", CategoricalDistribution([None, 1.5, 2])),
        ("method.r=int(interval(1,64))", IntDistribution(1, 64)),
        ("method.r=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("method.r=int(tag(log,interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("train.clip=interval(0.5,2)", FloatDistribution(0.5, 2.0)),
        ("train.clip=float(interval(1,2))", FloatDistribution(1.0, 2.0)),
        ("train.learning_rate=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("method.r=range(4,17,4)", IntDistribution(4, 16, step=4)),
        ("method.r=range(1,9)", IntDistribution(1, 8)),
        ("method.r=tag(log,range(1,9))", IntDistribution(1, 8, log=True)),
        ("train.clip=range(0.5,2.5,0.5)", FloatDistribution(0.5, 2.0, step=0.5)),
    ],
)
def test_the_words_of_hydras_plugin_are_distributions_of_optuna(word: str, distribution: Any) -> None:
    found, fixed = dimensions("seed=1", word)
    assert fixed == ["seed=1"]
    assert [one.distribution for one in found.values()] == [distribution]


def test_a_chosen_value_is_a_word_that_says_it() -> None:
    words = ["method.target_modules=choice([q_proj],[q_proj,v_proj])", "label='a b',c", "+method.bias=none,'8'"]
    found, _ = dimensions(
        *words, "train.clip=range(0.1,0.5,0.1)", "train.weight_decay=interval(0.0,1.0)", "seed=true,1"
    )
    choices = [[one.word(value) for value in getattr(one.distribution, "choices", [])] for one in [*found.values()][:3]]
    assert choices[0] == ["method.target_modules=[q_proj]", "method.target_modules=[q_proj,v_proj]"]
    assert choices[1] == ["label='a b'", "label=c"]
    assert choices[2] == ["+method.bias=none", "+method.bias='8'"]
    assert found["train.clip"].word(0.3) == "train.clip=0.30000000000000004"  # as a grid has this number
    assert found["train.weight_decay"].word(1.25e-05) == "train.weight_decay=1.25e-05"
    assert [found["seed"].word(value) for value in (True, 1)] == ["seed=True", "seed=1"]


def test_the_last_word_for_a_key_counts() -> None:
    found, fixed = dimensions("method.r=2,4", "seed=1,2", "method.r=8", "seed=3,4")
    assert (fixed, [*found]) == (["method.r=8"], ["seed"])
    assert found["seed"].distribution == CategoricalDistribution([3, 4])


def test_every_category_and_both_ends_are_checked_before_the_search_begins() -> None:
    found, _ = dimensions("method.r=2,4,8", "train.clip=interval(0.5,2.0)")
    assert space.points(found) == [
        ["method.r=2", "train.clip=0.5"],
        ["method.r=4", "train.clip=0.5"],
        ["method.r=8", "train.clip=0.5"],
        ["method.r=2", "train.clip=2.0"],
    ]


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("seed=1", "there is nothing to search"),
        ("study=a,b", "study=a,b: is of the search as a whole"),
        ("halving.factor=2,3", "is of the search as a whole"),
        ("train.clip=interval(2.0,1.0)", "the first end of an interval must not be above the second"),
        ("train.clip=tag(log,interval(0,1))", "must begin above 0"),
        ("method.r=tag(log,range(2,9,2))", "by steps of 1"),
        ("method.r=tag(log,choice(2,9))", "only an interval or a range"),
    ],
)
def test_what_cannot_be_searched_is_one_line(word: str, problem: str) -> None:
    with pytest.raises(InputError) as raised:
        dimensions(word)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


# ---- a search of trials that are not run -----------------------------------------------------------


@dataclass
class Job:
    result: Result | None
    _return_value: Any = None


def ended(status: str, value: Any = None, **info: Any) -> Job:
    return Job(Result({"trial": f"trial-{value}", "status": status, **info}, {}, {}), value)


PLANE = ("train.learning_rate=tag(log,interval(1e-5,1e-1))", "method.lora_dropout=interval(0.0,1.0)")
TPE = {"_target_": "optuna.samplers.TPESampler", "seed": 0}


def options(**keys: Any) -> Options:
    blank = {"n_trials": 8, "direction": "minimize", "sampler": TPE, "params": {}}
    objective = keys.pop("objective", "train_info.final_loss")
    return search.options(blank | keys, objective, "default", "searched", 1)


def bowl(points: Sequence[Sequence[str]], _: int = 0) -> list[Job]:
    """A trial that has succeeded for each point: how far it is from the middle of the plane."""
    suggested = [dict(word.split("=") for word in point) for point in points]
    plane = [(math.log10(float(one["train.learning_rate"])), float(one["method.lora_dropout"])) for one in suggested]
    return [ended("success", (rate + 3) ** 2 + (dropout - 0.5) ** 2) for rate, dropout in plane]


def course(study: optuna.Study) -> list[tuple[dict[str, Any], Any]]:
    return [(one.params, one.values) for one in study.trials]


SAMPLERS = [
    {**TPE, "n_startup_trials": 2},
    {"_target_": "optuna.samplers.NSGAIISampler", "seed": 0, "population_size": 3},
    {"_target_": "optuna.samplers.CmaEsSampler", "seed": 0, "n_startup_trials": 2},
    {"_target_": "optuna.samplers.QMCSampler", "seed": 0},
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda one: one["_target_"].rpartition(".")[2])
def test_a_search_that_is_cut_off_takes_the_course_of_one_that_is_not(sampler: dict[str, Any]) -> None:
    found, _ = dimensions(*PLANE)
    whole = Search(options(sampler=sampler, storage="whole.journal"), found)
    search.run(whole, bowl, [])
    cut, calls_made = options(sampler=sampler, storage="cut.journal"), itertools.count()

    def dies(points: Sequence[Sequence[str]], first: int) -> list[Job]:
        if next(calls_made) % 3 == 1:
            raise KeyboardInterrupt
        return bowl(points)

    while True:
        try:
            again = Search(cut, found)
            search.run(again, dies, [])
            break
        except KeyboardInterrupt:
            continue
    assert next(calls_made) > 8
    assert course(again.study) == course(whole.study)
    if "NSGA" not in sampler["_target_"]:  # a child of a population may be as its parent
        assert len({str(params) for params, _ in course(whole.study)}) == 8


def test_a_larger_number_of_trials_continues_and_the_same_one_asks_for_nothing() -> None:
    found, _ = dimensions(*PLANE)
    assert len(search.run(Search(options(n_trials=3), found), bowl, [])) == 3
    assert search.run(Search(options(n_trials=3), found), bowl, []) == []
    assert len(search.run(Search(options(n_trials=5), found), bowl, [])) == 2
    assert len(told()) == 5


@pytest.mark.slow
def test_a_sampler_finds_the_middle_of_a_bowl_better_than_chance() -> None:
    found, _ = dimensions(*PLANE)
    random = {"_target_": "optuna.samplers.RandomSampler", "seed": 0}
    best = {}
    for name, sampler in {"tpe": TPE, "random": random}.items():
        under_way = Search(options(sampler=sampler, n_trials=40, storage=f"{name}.journal"), found)
        search.run(under_way, bowl, [])
        best[name] = under_way.study.best_value
    assert best["tpe"] < best["random"]


@pytest.mark.parametrize("storage", [None, pytest.param("sqlite:///search.db", marks=pytest.mark.slow)])
def test_two_commands_at_once_run_a_search_to_its_number_of_trials(
    storage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = dimensions(*PLANE)
    commands = [Search(options(n_trials=3, storage=storage), found) for _ in range(2)]
    sampler = Search._sampler

    def slow(self: Search, number: int) -> Any:
        time.sleep(0.3)  # so that both would ask meanwhile
        return sampler(self, number)

    monkeypatch.setattr(Search, "_sampler", slow)
    with ThreadPoolExecutor(2) as pool:
        while any(batches := list(pool.map(Search.next, commands))):
            assert [trial.number for trial in batches[0]] == [trial.number for trial in batches[1]]
            for one, batch in zip(commands, batches, strict=True):
                for trial, job in zip(batch, bowl([one.point(trial) for trial in batch]), strict=True):
                    one.tell(trial, job)
    assert [trial.state.name for trial in commands[0].trials()] == ["COMPLETE"] * 3


@pytest.mark.parametrize("target", [Path, Path.absolute])
def test_the_lock_of_a_killed_process_does_not_hold_a_search_up_for_ever(
    target: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Path("multirun/default/optuna.journal")
    study = optuna.create_study(storage=pruning.open_storage(str(journal)))
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: 1000 * clock())  # the 30 s of Optuna are over soon
    os.symlink(target(journal), f"{journal}.lock")
    if target is Path:  # as an earlier version left it
        study = optuna.load_study(study_name=study.study_name, storage=pruning.open_storage(str(journal)))
    study.ask()
    assert len(study.trials) == 1
    assert not os.path.lexists(f"{journal}.lock")


def test_several_are_asked_for_at_once() -> None:
    found, _ = dimensions(*PLANE)
    sizes: list[int] = []

    def launch(points: Sequence[Sequence[str]], first: int) -> list[Job]:
        sizes.append(len(points))
        return bowl(points)

    search.run(Search(options(n_trials=7, n_jobs=3), found), launch, [])
    assert sizes == [3, 3, 1]


def test_optuna_is_told_how_each_trial_has_ended() -> None:
    found, _ = dimensions("seed=interval(0,1000)")
    ends = ["success", "failed", "oom", "refused", "stopped", "success"]
    values: list[Any] = [1.0, None, None, None, None, float("nan")]
    jobs = iter([ended(status, value) for status, value in zip(ends, values, strict=True)])
    under_way = Search(options(n_trials=6), found)
    search.run(under_way, lambda points, first: [next(jobs)], [])
    states = ["COMPLETE", "FAIL", "FAIL", "FAIL", "PRUNED", "FAIL"]
    assert [one.state.name for one in told()] == states
    assert [one.user_attrs["status"] for one in told()] == ends
    assert under_way.lines()[0].endswith("6 trials: 1 complete, 4 fail, 1 pruned")


@pytest.mark.parametrize("job", [Job(None), ended("cancelled")], ids=["not run", "cancelled"])
def test_a_trial_that_was_not_run_is_run_first_by_the_same_command(job: Job) -> None:
    found, _ = dimensions(*PLANE)
    requested: list[Sequence[Sequence[str]]] = []

    def launch(points: Sequence[Sequence[str]], first: int) -> list[Job]:
        requested.append(points)
        return [job] if len(requested) == 1 else bowl(points)

    assert len(search.run(Search(options(n_trials=2), found), launch, [])) == 1  # and ends there
    search.run(Search(options(n_trials=2), found), launch, [])
    assert requested[1] == requested[0]
    assert [one.state for one in told()] == [TrialState.COMPLETE] * 2


def test_the_trials_of_a_pareto_front_are_named() -> None:
    found, _ = dimensions("seed=interval(0,1000)")
    values = iter([(1.0, 4.0), (2.0, 2.0), (3.0, 3.0), (4.0, 1.0)])
    several = options(n_trials=4, objective=["train_info.final_loss", MEMORY], direction=["minimize", "minimize"])
    under_way = Search(several, found)
    search.run(under_way, lambda points, first: [ended("success", next(values))], [])
    assert under_way.lines()[1] == "on the Pareto front: 3"
    assert [line.split(",")[0].strip() for line in under_way.lines()[2:]] == [
        "train_info.final_loss=1",
        "train_info.final_loss=2",
        "train_info.final_loss=4",
    ]


def test_a_sampler_that_has_been_through_its_space_ends_the_search() -> None:
    found, _ = dimensions("seed=1,2,3")
    force = {"_target_": "optuna.samplers.BruteForceSampler", "seed": 0}
    jobs = search.run(Search(options(sampler=force), found), lambda points, first: [ended("success", 1.0)], [])
    assert len(jobs) == 3
    assert sorted(one.params["seed"] for one in told()) == [1, 2, 3]


def test_another_space_objective_or_setting_is_another_search_by_name() -> None:
    one, other = dimensions("seed=1,2")[0], dimensions("seed=1,2,3")[0]
    identities = [
        ["identity", space.described(one)],
        ["identity", space.described(other)],
        ["else", space.described(one)],
    ]
    keys = {"n_trials": 1, "direction": "minimize", "sampler": TPE}
    names = [search.options(keys, "train_info.steps", "default", searched, 1).study_name for searched in identities]
    names += [search.options(keys, "train_info.tokens", "default", identities[0], 1).study_name]
    assert len(set(names)) == 4
    assert search.options(keys | {"n_trials": 5}, "train_info.steps", "x", identities[0], 2).study_name == names[0]


def test_what_a_storage_holds_of_another_search_is_one_line() -> None:
    found, _ = dimensions("seed=1,2")
    named = options(n_trials=1, study_name="mine", storage="own.journal")
    search.run(Search(named, found), lambda points, first: [ended("success", 1.0)], [])
    with pytest.raises(InputError, match=r"hydra\.sweeper\.direction: the search mine has minimize"):
        Search(replace(named, directions=("maximize",)), found)
    with pytest.raises(InputError, match=r"hydra\.sweeper\.study_name=mine: its trials are of another space"):
        Search(named, dimensions("seed=1,2,3")[0])
    Path("own.journal").write_text("no journal\nat all\n")
    with pytest.raises(InputError, match=r"hydra\.sweeper\.storage=own\.journal: cannot be read"):
        Search(named, found)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_score_of_which_the_better_side_is_not_known_is_searched_in_any_direction(direction: str) -> None:
    for objective in ("eval_info.task.my_metric.value", "train_info.tokens_per_second"):
        assert options(objective=objective, direction=direction).directions == (direction,)


def test_a_journal_that_was_cut_off_in_its_last_line_goes_on() -> None:
    found, _ = dimensions(*PLANE)
    kept = options(n_trials=2, storage="own.journal")
    search.run(Search(kept, found), bowl, [])
    with Path("own.journal").open("a") as file:
        file.write('{"op_code": 4, "work')
    search.run(Search(replace(kept, n_trials=4), found), bowl, [])
    assert len(Search(kept, found).trials()) == 4


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"n_trials": 0}, "hydra.sweeper.n_trials=0: must be a whole number, at least 1"),
        ({"n_trials": "many"}, "hydra.sweeper.n_trials=many: must be a whole number"),
        ({"n_jobs": True}, "hydra.sweeper.n_jobs=True: must be a whole number"),
        ({"direction": "down"}, "hydra.sweeper.direction=down: must be one of minimize, maximize"),
        ({"direction": ["minimize", "maximize"]}, "hydra.sweeper.direction: has 2 for 1 objectives"),
        ({"objective": LOSS, "direction": "maximize"}, f"would search for the worst {LOSS}, of which lower is better"),
        (
            {"objective": [MEMORY, "eval_info.gsm8k.accuracy.value"], "direction": ["minimize"] * 2},
            "of which higher is better; give hydra.sweeper.direction=maximize",
        ),
        ({"n_trails": 3}, "hydra.sweeper.n_trails: no such key; did you mean 'n_trials'?"),
        ({"objective": None}, "objective: must be given"),
        (
            {
                "objective": [LOSS, MEMORY],
                "direction": ["minimize"] * 2,
                "pruner": {"_target_": "optuna.pruners.MedianPruner"},
            },
            "hydra.sweeper.pruner: Optuna prunes by one objective, not by several",
        ),
        ({"sampler": {"_target_": "optuna.samplers.TPESampel"}}, "no such class; did you mean 'TPESampler'?"),
        (
            {"sampler": {**TPE, "n_start": 1}},
            "hydra.sweeper.sampler: optuna.samplers.TPESampler: TPESampler.__init__()",
        ),
        ({"sampler": {"_target_": "optuna.pruners.NopPruner"}}, "must be a class of optuna.samplers"),
        ({"pruner": {"_target_": "optuna.pruners.Median"}}, "did you mean 'MedianPruner'?"),
        ({"storage": "nodb://user:secret@host/name"}, "hydra.sweeper.storage: cannot be read"),
    ],
)
def test_a_wrong_key_of_the_sweeper_is_one_line(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as raised:
        Search(options(**keys), dimensions("seed=1,2")[0])
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


# ---- pruning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "metric", "worst"), [("minimize", "loss", 9.0), ("maximize", "loss", 9.0), ("maximize", "a.acc", 0.1)]
)
def test_a_trial_that_is_worse_than_the_median_is_pruned_whichever_way_is_better(
    direction: str, metric: str, worst: float
) -> None:
    found, _ = dimensions("seed=interval(0,1000)")
    median = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 2, "n_warmup_steps": 10}
    kept = options(direction=direction, pruner=median, storage="own.journal", n_trials=4)
    under_way, verdicts = Search(kept, found), []
    for values in ([1.0, 1.0], [2.0, 2.0], [worst, worst], [worst, 0.5 if metric == "loss" else 3.0]):
        trial = under_way.next()[0]
        sweeper = {"pruner": median, "storage": kept.storage}
        pruning_state = pruning.trial_pruning(sweeper, "default", kept.study_name, trial.number, metric)
        assert pruning_state is not None
        prune = pruning.verdict(pruning_state)
        verdicts.append([prune(step, {metric: value}) for step, value in zip((5, 15), values, strict=True)])
        under_way.tell(trial, ended("stopped" if verdicts[-1][-1] else "success", 1.0))
    assert verdicts == [[False, False], [False, False], [False, True], [False, False]]
    assert [one.state.name for one in Search(kept, found).trials()] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]


def test_a_pruned_point_that_is_asked_for_again_is_told_as_it_ended() -> None:
    found, _ = dimensions("seed=interval(0,1000)")
    under_way = Search(options(n_trials=1), found)
    stop = {"why": "pruned", "step": 20, "metric": "loss", "value": 1.5}
    search.run(under_way, lambda points, first: [ended("stopped", stopped=stop)], [])
    (trial,) = told()
    assert (trial.state, trial.intermediate_values) == (TrialState.PRUNED, {20: 1.5})


# ---- on the embedded model -------------------------------------------------------------------------


def test_a_wrong_word_of_a_search_is_said_before_anything_is_trained(command: Command) -> None:
    for words, problem in (
        (["objective=eval_info.gsm8k.accuracy.value"], "eval_info.gsm8k is not evaluated; there are: perplexity"),
        ([f"objective={LOSS}", "method.r=choice(8,0)"], "method.r=0: must be at least 1"),
        ([f"objective={LOSS}", "hydra.sweeper.pruner._target_=optuna.pruners.MedianPruner"], "needs train.eval_every"),
    ):
        code, _, err = command(*WORDS, RATES, *words)
        assert (code, problem in err.splitlines()[-1]) == (2, True), err
        assert not Path("multirun/default").exists()


def test_where_optuna_is_missing_or_old_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="hydra/sweeper") as raised:
        cli.compose(["hydra/sweeper=optunaa"])
    raised.value.missing_cfg_file, raised.value.options = "hydra/sweeper/optuna", ["basic", "grid"]  # type: ignore[attr-defined]
    assert checks.one_line(raised.value) == "hydra/sweeper=optuna: pip install 'peftsweep[optuna_hydra]'"
    monkeypatch.setattr(optuna, "__version__", "2.10.1")
    with pytest.raises(
        InputError, match=r"Optuna is 2\.10\.1, from 4\.2 on is needed: pip install 'peftsweep\[optuna\]'"
    ):
        search.check_installed()
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(InputError, match=r"hydra/sweeper=optuna_current: pip install 'peftsweep\[optuna\]'"):
        search.check_installed()


@pytest.mark.slow
def test_a_search_is_told_its_objective_and_trains_no_point_twice(command: Command) -> None:
    words = [*WORDS, "method.r=choice(2,4)", f"objective={LOSS}", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2"]
    assert command(*words)[0] == 0
    values = {one.config["method"]["r"]: one.eval_info["perplexity"]["perplexity"]["value"] for one in records()}
    assert len(told()) == 4
    assert all(one.value == values[one.params["method.r"]] for one in told())
    assert len(records()) <= 2
    before = {one.trial: one.run_info["created_at"] for one in records()}
    code, out, _ = command(*words, "hydra.sweeper.n_trials=6")
    assert (code, len(told())) == (0, 6)
    assert {one.trial: one.run_info["created_at"] for one in records()}.items() >= before.items()
    best = min(values, key=lambda rank: values[rank])
    assert f"best: {LOSS}={values[best]:.6g} with method.r={best}" in out


PRUNED = ["train.steps=8", "train.eval_every=2", "dataset.validation_samples=8", f"objective={LOSS}"]
PRUNED += ["train.learning_rate=choice(3e-3,0.0)", "hydra.sweeper.pruner.n_startup_trials=1"]
PRUNED += ["hydra.sweeper.pruner._target_=optuna.pruners.MedianPruner"]
PRUNED += [
    "hydra.sweeper.sampler._target_=optuna.samplers.BruteForceSampler",
    "hydra.sweeper.sampler.seed=1",
]  # it learns first


@pytest.mark.slow
@pytest.mark.parametrize("places", [["hydra.launcher.workers=0"], ["hydra.launcher.workers=1"]])
def test_a_trial_that_learns_nothing_is_pruned_and_a_grid_brings_it_to_its_end(
    places: list[str], command: Command
) -> None:
    code, out, _ = command(*WORDS, *PRUNED, *places)
    assert code == 0
    assert [one.state.name for one in sorted(told(), key=lambda one: one.params["train.learning_rate"])] == [
        "PRUNED",
        "COMPLETE",
    ]
    (stopped,) = [one for one in records() if one.status.name == "stopped"]
    assert (stopped.config["train"]["learning_rate"], stopped.run_info["stopped"]["why"]) == (0.0, "pruned")
    assert stopped.train_info["steps"] == stopped.run_info["stopped"]["step"] == 2
    assert "stopped at step 2, pruned: loss" in out
    grid = [word for word in [*WORDS, *PRUNED] if "sweeper" not in word and "objective" not in word]
    assert command(*grid, *places)[0] == 0
    (ended_now,) = [one for one in records() if one.trial == stopped.trial]
    assert (ended_now.status.name, ended_now.run_info["resumed"], ended_now.train_info["steps"]) == ("success", 2, 8)


@pytest.mark.slow
def test_a_slot_of_a_pack_is_pruned_alone(command: Command) -> None:
    words = [*(word for word in [*WORDS, *PRUNED] if "pruner" not in word), "hydra.launcher.pack=2"]
    words += ["hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner"]
    words += ["hydra.sweeper.pruner.upper=2.0", "hydra.sweeper.pruner.n_warmup_steps=6"]
    code, _, err = command(*words)
    assert code == 0, err
    ends = {one.config["train"]["learning_rate"]: one for one in records()}
    assert {rate: one.status.name for rate, one in ends.items()} == {0.0: "stopped", 3e-3: "success"}
    assert ends[0.0].run_info["stopped"]["step"] == 6
    assert all(one.run_info["packed_with"] for one in ends.values())


@pytest.mark.slow
def test_a_failed_trial_is_told_and_the_search_goes_on(command: Command, fails_at_rank: Callable[[int], None]) -> None:
    fails_at_rank(2)
    force = ["hydra.sweeper.sampler._target_=optuna.samplers.BruteForceSampler"]
    code, out, _ = command(*WORDS, *force, f"objective={LOSS}", "method.r=choice(2,4)")
    assert (code, sorted(one.status.name for one in records())) == (1, ["failed", "success"])
    assert sorted(one.state.name for one in told()) == ["COMPLETE", "FAIL"]
    assert out.count("failed in train: RuntimeError: broken") == 1


@pytest.mark.slow
def test_a_search_that_is_killed_ends_as_one_that_is_not(command: Command) -> None:
    words = [*WORDS, RATES, f"objective={LOSS}", "hydra.sweeper.n_trials=3", "train.steps=20", "device=cpu"]
    words += ["hydra.sweeper.sampler.n_startup_trials=2", "hydra.launcher.workers=0"]
    for trials in range(1, 3):
        process = start(*words, "study=killed")
        wait_for(lambda trials=trials: len(list(Path("multirun/killed").glob("*/steps.jsonl"))) > trials, process)  # type: ignore[misc]
        process.kill()
        process.wait()
    assert command(*words, "study=killed")[0] == 0
    assert command(*words, "study=whole")[0] == 0
    ways = [[(one.params, one.value) for one in told(name)] for name in ("killed", "whole")]
    assert [params for params, _ in ways[0]] == [params for params, _ in ways[1]]
    assert [value for _, value in ways[0]] == pytest.approx([value for _, value in ways[1]])
