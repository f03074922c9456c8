"""sweep=tune and sweep=league from words to decisions: with trials made up, in the slow tier with real ones."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftsweep import cli
from peftsweep.analysis.answer.structure import Decision, Finalist
from peftsweep.analysis.text import searches
from peftsweep.config.compose import Trial
from peftsweep.config.compose import trial as make_trial
from peftsweep.errors import InputError, NotRun, SweepFailed
from peftsweep.study import record, store
from peftsweep.study.record import Result
from peftsweep.tuning import answer, decision
from peftsweep.tuning import command as tuning_command
from peftsweep.tuning.answer import TuningCommand
from peftsweep.tuning.search import Point
from peftsweep.tuning.trials import earlier_seconds
from tests.conftest import SMALL, start, wait_for

Command = Callable[..., tuple[int, str, str]]
Loss = Callable[[dict[str, str]], float | None]
MakeCommand = Callable[..., "tuple[TuningCommand, MadeUp]"]
STEPS, ROWS = 30, 100


class MadeUp:
    """Stands in for a launcher: writes the record and steps that a trial with these words would leave."""

    def __init__(self, study: Path, loss: Loss) -> None:
        self.study, self._loss = study, loss
        self.launched: list[dict[str, str]] = []
        self.dies_after = math.inf  # trials
        self.base: float | None = None  # the accuracy of the untouched base

    def __call__(self, trials: list[list[str]]) -> Sequence[Result | BaseException | None]:
        return [self._run(dict(word.split("=", 1) for word in words)) for words in trials]

    def _run(self, words: dict[str, str]) -> Result | BaseException | None:
        keys = ("method", "train.learning_rate", "method.r", "targets", "seed")
        name = "-".join(
            words.get(key, "").replace("all_linear", "") for key in keys
        )  # which is what these methods take
        level, steps, status = (3, STEPS, "success") if words["halving.test"] == "true" else (2, STEPS, "stopped")
        if words.get("halving.rung") == "1":
            level, steps, status = 1, int(words["halving.min_steps"]), "stopped"
        place = self.study / name
        if (place / record.RESULT).exists() and (held := Result.read(place)).run_info["level"] >= level:
            return held
        if len(self.launched) >= self.dies_after:
            raise KeyboardInterrupt
        self.launched.append(words)
        if (loss := self._loss(words)) is None:
            return SweepFailed(f"{name}: failed")
        marks = sorted({int(words["train.eval_every"]), steps})
        rows = [{"step": step, "steps": STEPS, "validation_loss": loss + 1 / step} for step in marks]
        record.write_lines(place / record.STEPS, rows)
        info: dict[str, Any] = {
            "trial": name,
            "status": status,
            "labels": [name],
            "study": "default",
            "created_at": record.now(),
        }
        info |= {"identity": name, "sitting_seconds": 1.0, "total_seconds": 1.0, "level": level}
        info["rung"] = {"number": 1, "step": steps, "metric": "loss", "value": loss}
        found = Result(info, {}, {}, train_info={"steps": steps, "trainable_parameters": 10})
        if status == "success":
            right = random.Random(name).choices([1.0, 0.0], [1 - loss / 10, loss / 10], k=ROWS)
            lines = [{"prompt": str(row), "answer": "", "correct": bool(one)} for row, one in enumerate(right)]
            record.write_lines(place / "predictions" / "task.jsonl", lines)
            value = sum(right) / ROWS
            score = {"value": value, "stderr": math.sqrt(value * (1 - value) / (ROWS - 1)), "n": ROWS}
            found.eval_info["task"] = {"headline": "accuracy", "accuracy": score}
            if self.base is not None:
                found.eval_info["task"] |= self._base(self.base)
        found.write(place)
        return found

    def _base(self, accuracy: float) -> dict[str, Any]:
        lines = [{"prompt": str(row), "answer": "", "correct": row < accuracy * ROWS} for row in range(ROWS)]
        record.write_lines(self.study / "base" / "x" / "task.jsonl", lines)
        stderr = math.sqrt(accuracy * (1 - accuracy) / (ROWS - 1))
        score = {"value": accuracy, "stderr": stderr, "n": ROWS}
        return {"base_accuracy": score, "base_predictions": "base/x/task.jsonl"}


def loss_of(words: dict[str, str]) -> float | None:
    """LoRA wants a rate of 1e-3 and DoRA 1e-4; more rank is better; DoRA fails above 1e-3."""
    rate, best = float(words["train.learning_rate"]), {"lora": 1e-3, "dora": 1e-4}[words["method"]]
    if words["method"] == "dora" and rate > 1e-3:
        return None
    return 2 + math.log10(rate / best) ** 2 - int(words["method.r"]) / 100 + 0.5 * (words["method"] == "dora")


@pytest.fixture(scope="module")
def composed() -> dict[str, Trial]:
    """Composed once for all tests, as it is most of what they cost."""
    found = {}
    for method in ("lora", "dora"):
        words = [f"method={method}", f"train.steps={STEPS}", "device=cpu"]
        cfg = cli.compose(words)
        found[method] = make_trial(cfg, cfg.hydra.runtime.choices, words)
    return found


@pytest.fixture
def make_command(composed: dict[str, Trial], tmp_path: Path) -> MakeCommand:
    """A command about made-up trials, with these values of `tune`, `league` and `budget`, and its launcher."""

    def made(
        *, methods: Sequence[str] = ("lora", "dora"), loss: Loss = loss_of, budget: str | None = None, **keys: Any
    ) -> tuple[TuningCommand, MadeUp]:
        trials = {}
        for name in methods:
            config = dataclasses.replace(composed[name].config, budget=budget)
            for section in ("tune", "league"):
                own = getattr(config, section)
                own = dataclasses.replace(own, **{key: value for key, value in keys.items() if hasattr(own, key)})
                config = dataclasses.replace(config, **{section: own})
            trials[name] = dataclasses.replace(composed[name], config=config)
        launch = MadeUp(tmp_path / "multirun" / "default", loss)
        return TuningCommand([], [], trials, dict.fromkeys(trials, True), launch, launch.study), launch

    return made


def written(launch: MadeUp, file: str = store.TUNE) -> Any:
    return json.loads((launch.study / file).read_text())


def test_a_tuning_judges_only_its_finalists_on_the_test_rows(make_command: MakeCommand) -> None:
    command, launch = make_command(targets=["default"])
    answer.tune(command, (lines := list[str]()).append)
    judged = [words for words in launch.launched if words["halving.test"] == "true"]
    assert {(words["method"], words["method.r"]) for words in judged} == {("lora", "32"), ("dora", "32")}
    assert {float(words["train.learning_rate"]) for words in judged if words["method"] == "lora"} == {6.32e-4}
    found = written(launch)
    assert [(one["method"], one["size"]) for one in found["best"]] == [("lora", 32), ("dora", 32)]
    assert found["lines"] == lines
    assert any(line.startswith("Use lora, lr=0.000632, r=32") for line in lines)
    assert any("could not be trained: dora, lr=0.002" in line for line in lines) == any(
        words["method"] == "dora" and float(words["train.learning_rate"]) > 1e-3 for words in launch.launched
    )
    seeds = {words["seed"] for words in judged}
    assert seeds == {str(number) for number in range(len(seeds))}
    (look,) = found["finals"]["looks"]
    assert (look["first"], look["number"]) == ("lora", len(seeds) - 1)


def test_the_same_command_trains_nothing_again_and_decides_the_same(
    make_command: MakeCommand,
) -> None:
    command, launch = make_command(budget="9trials")
    answer.tune(command, (first := list[str]()).append)
    done = len(launch.launched)
    answer.tune(command, (again := list[str]()).append)
    assert (len(launch.launched), again[:-1]) == (done, first[:-1])  # the last line has the time


@pytest.mark.parametrize("after", [1, 9, 13])
def test_a_tuning_that_is_cut_off_goes_on_to_the_same_end(
    make_command: MakeCommand, after: int, tmp_path: Path
) -> None:
    command, launch = make_command(seeds=2, targets=["default"])
    launch.dies_after = after
    with pytest.raises(KeyboardInterrupt):
        answer.tune(command, print)
    launch.dies_after = math.inf
    answer.tune(command, (lines := list[str]()).append)
    whole = MadeUp(tmp_path / "whole", loss_of)
    alone = TuningCommand(command.words, command.base_words, command.trials, command.with_rate, whole, whole.study)
    answer.tune(alone, (expected := list[str]()).append)
    assert lines[:-1] == expected[:-1]


@pytest.mark.parametrize("key", ["search_hash", "asked"])
def test_the_seconds_of_earlier_commands_are_read_also_under_the_former_key(
    key: str, make_command: MakeCommand
) -> None:
    command, launch = make_command(budget="3trials")
    answer.tune(command, print)
    file = launch.study / store.TUNE
    held = record.read_json(file, dict)
    record.write_json(file, {key: held.pop("search_hash")} | held | {"spent": {"seconds": 12.5}})
    assert earlier_seconds(file, command.hash) == 12.5
    assert earlier_seconds(file, "another") == 0.0


def test_the_seconds_of_a_contestant_have_those_of_a_pack_once() -> None:
    """Each record of a pack has the seconds of the whole pack."""
    names = ["a", "b", "c"]
    results = {}
    for seed, name in enumerate([*names, "alone"]):
        about = {"trial": name, "status": "success", "total_seconds": 60.0}
        about |= {"packed_with": [other for other in names if other != name]} if name in names else {}
        results[Point("lora", 1e-3, None, None, seed)] = Result(about, {}, {}, train_info={"steps": 10})
    trials: Any = SimpleNamespace(results=results, refused={})
    costs = answer._costs(trials, "lora")
    assert (costs["trials"], costs["steps"], costs["seconds"]) == (4, 40, pytest.approx(120.0))


def test_a_search_whose_study_was_renamed_is_the_same_search(make_command: MakeCommand) -> None:
    """So that its budget of time counts the hours that are spent."""
    command, _ = make_command()
    asked = [["train.steps=9"], ["train.steps=9", "study=renamed", "quiet=true"], ["train.steps=8", "study=renamed"]]
    hashes = [dataclasses.replace(command, base_words=words).hash for words in asked]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_larger_budget_goes_on_and_a_spent_one_says_what_was_not_tried(
    make_command: MakeCommand,
) -> None:
    command, launch = make_command(budget="6trials")
    answer.tune(command, (lines := list[str]()).append)
    assert "not tried of lora: r=16, r=32, targets=qv, targets=all_linear" in lines
    assert written(launch)["spent"]["trials"] == len(list(launch.study.glob("*/result.json"))) == 6
    command, more = make_command(budget="20trials")
    answer.tune(command, (lines := list[str]()).append)
    assert not any(words in launch.launched for words in more.launched)
    assert written(more)["spent"]["trials"] == len(list(launch.study.glob("*/result.json"))) <= 20


def test_a_tuning_of_which_nothing_can_be_trained_fails(make_command: MakeCommand) -> None:
    command, _ = make_command(methods=["lora"], loss=lambda _: None)
    with pytest.raises(SweepFailed, match=r"no trial could be trained: .*failed"):
        answer.tune(command, print)


def test_reports_repeat_what_was_decided(make_command: MakeCommand) -> None:
    command, launch = make_command(budget="3trials")
    assert searches.decisions(launch.study) == []
    answer.tune(command, (lines := list[str]()).append)
    (found,) = searches.decisions(launch.study)
    assert (found.name, found.lines) == ("tune", lines)
    decided = found.decision
    assert f"not tried of {decided.not_tried[0]}" in lines
    assert decided.verdict == "use"
    assert decision.sentence(decided) in lines
    assert len(decided.finalists[0].trials) == 1


def test_a_score_is_named_once_where_evaluation_and_metric_have_one_name() -> None:
    for column, name in (("perplexity.perplexity", "perplexity"), ("tiny_math.accuracy", "tiny_math accuracy")):
        finalist = Finalist("lora", "lora, lr=0.1", 1.031, ["a"])
        decided = Decision(None, "use", "lora, lr=0.1", ["a"], f"eval_info.{column}.value", [finalist])
        assert decision.sentence(decided) == f"Use lora, lr=0.1: {name} 1.031 on the test rows, 1 seed."


@pytest.mark.parametrize(
    ("base", "verdict_line"), [(0.2, "Use lora"), (0.9, "No gain shown by lora"), (0.74, "No gain shown by")]
)
def test_use_is_said_where_a_gain_over_the_base_is_shown(
    make_command: MakeCommand, base: float, verdict_line: str
) -> None:
    command, launch = make_command(methods=["lora"], budget="9trials")
    launch.base = base
    answer.tune(command, (lines := list[str]()).append)
    (line,) = [line for line in lines if line.startswith(verdict_line)]
    (search,) = searches.decisions(launch.study)
    gained = search.decision.base
    assert gained is not None
    assert gained.gain == pytest.approx(search.decision.finalists[0].value - base)
    assert f"; the untouched base has {base:g}, and against it this is " in line
    assert search.decision.verdict == ("use" if verdict_line == "Use lora" else "none")


def test_trials_that_a_launcher_leaves_end_the_tuning_as_not_run(make_command: MakeCommand) -> None:
    command, launch = make_command(methods=["lora"])
    limited = TuningCommand(
        command.words,
        command.base_words,
        command.trials,
        command.with_rate,
        lambda words: [None] * len(words),
        launch.study,
    )
    with pytest.raises(NotRun, match="3 trials of the tuning were not run; the same command continues"):
        answer.tune(limited, print)


def test_a_league_gives_every_contestant_the_same_and_lora_twice(make_command: MakeCommand) -> None:
    command, launch = make_command(trials=5, seeds=3)
    answer.league(command, (lines := list[str]()).append)
    found = written(launch, store.LEAGUE)
    assert set(found["costs"]) == {"lora", "dora", "lora (placebo)"}
    assert {one["trials"] for one in found["costs"].values()} == {8}
    assert {one["steps"] for one in found["costs"].values()} == {8 * STEPS}
    seeds = {name: set(of) for name, of in found["scores"].items()}
    assert (seeds["lora"], seeds["lora (placebo)"]) == ({"1", "2", "3"}, {"1001", "1002", "1003"})
    assert any("won" in line and "of 9 pairs of seeds against lora" in line for line in lines)
    assert "would show a difference of 0.02 in 80% of leagues" in lines[-1]
    (search,) = searches.decisions(launch.study)
    placebo, result = search.decision.placebo, found["result"]
    assert placebo is not None
    assert (placebo.method, placebo.wins, placebo.pairs) == ("lora", result["wins"], 9)
    assert [one.rank for one in search.decision.finalists] == [one["rank"] for one in result["standings"]]
    assert lines[1].startswith(f"1. {search.decision.configuration}: ")


def test_the_first_line_of_a_search_says_which_study_it_goes_to() -> None:
    place = Path("multirun/default")
    first = "sweep=tune: keeps its trials in the study multirun/default (study=NAME: another)"
    assert tuning_command._study_line(place, league=False) == first
    place.mkdir(parents=True)
    (place / store.TUNE).write_text("{}")
    again = "sweep=tune: goes on with the study multirun/default (study=NAME: another)"
    assert tuning_command._study_line(place, league=False) == again
    assert tuning_command._study_line(place, league=True) == first.replace("tune", "league")


# ---- wrong words -----------------------------------------------------------------------------------


WRONG = [
    (["sweep=tune", "budget=40runs"], "budget=40runs: must be a number of trials (40trials), optimizer steps"),
    (["sweep=tune", "train.learning_rate=1e-4,1e-3"], "takes several values of method alone; give tune.rates"),
]
WRONG_TOO = [
    (["sweep=tune", "tune.tie=-0.01"], "tune.tie=-0.01: must be above 0"),
    (["budget=5trials"], "budget: has an effect only in a search; add sweep=tune"),
    (["sweep=tune", "budget=0"], "budget=0: must be a number of trials"),
    (["sweep=tune", "budget=100steps"], "budget=100steps: must be at least 150steps"),
    (["sweep=tune", "tune.rates=[1e-4,1e-4]"], "must be at least one value, each once"),
    (["sweep=tune", "tune.metric=gsm8k.accuracy"], "tune.metric=gsm8k.accuracy: must be loss or"),
    (["sweep=tune", "quant=none,4bit"], "quant=none,4bit: sweep=tune takes several values of method alone"),
    (["sweep=tune", "train.learning_rate=0"], "method=lora: names no train.learning_rate above 0"),
    (["sweep=tune", "halving.min_steps=10"], "takes no objective and no halving keys"),
    (["sweep=tune", "hydra/sweeper=basic"], "hydra/sweeper=basic: sweep=tune brings its own"),
    (["sweep=tune,rank_ablation"], "tune is a search and no grid; give sweep=tune alone"),
    (["sweep=glob(tune)"], "tune is a search and no grid; give sweep=tune alone"),
    (["sweep=league", "budget=3h"], "budget: is of sweep=tune"),
    (["sweep=tune", "tune.replay=none.csv"], "tune.replay=none.csv: no such file"),
    (["halving.test=false"], "halving.test=false: needs train.eval_every"),
]


@pytest.mark.parametrize(
    ("words", "problem"), [*WRONG, *(pytest.param(*one, marks=pytest.mark.slow) for one in WRONG_TOO)]
)
def test_what_cannot_be_asked_is_one_line(words: list[str], problem: str, command: Command) -> None:
    code, _, err = command(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert problem in err
    assert not list(Path("multirun").glob("default/*/result.json"))


def test_a_method_whose_yaml_names_no_rate_is_one_line(command: Command) -> None:
    Path("mine/method").mkdir(parents=True)
    config = "# @package _global_\nmethod: {_target_: peft.LoraConfig, r: 4, target_modules: all-linear}\n"
    Path("mine/method/wide.yaml").write_text(config)
    code, _, err = command("--config-dir", "mine", "sweep=tune", "method=wide")
    assert (code, err.count("\n")) == (2, 1)
    assert "method=wide: names no train.learning_rate above 0" in err


@pytest.mark.slow
def test_a_replay_trains_nothing(command: Command) -> None:
    table = Path(__file__).parents[1] / "fixtures" / "lora_rates_and_ranks.csv"
    code, out, err = command("sweep=tune", f"tune.replay={table}")
    assert (code, err, "sweep=tune: median regret 0.0000, worst 0.0073" in out) == (0, "", True)
    assert not Path("multirun/default").exists()


@pytest.mark.slow
def test_one_trial_from_python_is_no_search() -> None:
    with pytest.raises(InputError, match="sweep=tune: is more than one trial"):
        cli.run_one(["sweep=tune"])


# ---- real trials -----------------------------------------------------------------------------------

REAL = [*SMALL[1:], "train.steps=9", "train.eval_every=1", "dataset.validation_samples=8", "adapter.save=false"]
REAL += ["sweep=tune", "tune.rates=[1e-4,1e-3,1e-2]", "tune.ranks=[2,4]", "tune.targets=[default]"]


def decided(study: str) -> Any:
    found = json.loads(Path("multirun", study, store.TUNE).read_text())
    found["spent"].pop("seconds")
    return {key: found[key] for key in ("best", "tried", "spent")} | {"scores": found["finals"]["scores"]}


@pytest.mark.slow
def test_real_trials_stop_before_their_test_rows_and_their_rows_hold_the_validation(command: Command) -> None:
    Path("mine").mkdir()
    code, out, err = command("--config-dir", "mine", *REAL, "budget=4trials")
    assert (code, err) == (0, "")
    assert out.startswith("sweep=tune: keeps its trials in the study multirun/default (study=NAME: another)\n")
    held = [Result.read(file.parent) for file in Path("multirun").glob("default/*/result.json")]
    assert len(held) == 4
    judged = [one for one in held if one.eval_info]
    assert [one.status.name for one in judged] == ["success"]
    assert all(one.train_info["validation"]["loss"] > 0 for one in held if one not in judged)
    written = json.loads(Path("multirun/default", store.TUNE).read_text())
    gains = {"use": "Use lora, lr=", "none": "No gain shown by lora, lr="}  # which of them 9 steps do not decide
    assert gains[written["decision"]["verdict"]] in out
    assert written["command"][0] == "--config-dir=mine"
    assert "4 trials" in out.splitlines()[-1]


KILLS = 20


def written_at(study: Path) -> float:
    """When a file of the study was last written."""
    return max((file.stat().st_mtime for file in study.rglob("*.*")), default=0.0)


@pytest.mark.slow
def test_killed_at_random_moments_a_tuning_comes_to_the_same_end(command: Command) -> None:
    words = [*REAL, "budget=60steps", "hydra.launcher.workers=0"]
    assert command(*words, "study=whole")[0] == 0
    chance, study = random.Random(0), Path("multirun/killed")
    for _ in range(KILLS):
        before = written_at(study)
        process = start(*words, "study=killed")
        if wait_for(lambda then=before: written_at(study) > then, process) is None:  # type: ignore[misc]
            break  # it has come to its end
        time.sleep(chance.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert command(*words, "study=killed")[0] == 0
    whole, killed = decided("whole"), decided("killed")
    for one, other in zip(whole.pop("tried"), killed.pop("tried"), strict=True):
        assert one.pop("value") == pytest.approx(other.pop("value"), rel=1e-4)
        assert one == other
    assert killed == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_tuning_finds_what_the_whole_grid_finds_at_half_of_its_steps(seed: int, command: Command) -> None:
    rates, ranks = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3), (4, 8, 16)
    words = ["train.steps=90", "device=cpu", f"seed={seed}", "adapter.save=false", "eval=[perplexity]"]
    search = [f"tune.rates=[{','.join(map(str, rates))}]", f"tune.ranks=[{','.join(map(str, ranks))}]"]
    code, _, _ = command(*words, "sweep=tune", *search, "tune.targets=[default]", "study=tuned")
    assert code == 0
    found = json.loads(Path("multirun/tuned", store.TUNE).read_text())
    grid = [f"train.learning_rate={','.join(map(str, rates))}", f"method.r={','.join(map(str, ranks))}"]
    assert command(*words, *grid, "study=grid", "train.eval_every=30")[0] == 0
    every = [Result.read(file.parent) for file in Path("multirun/grid").glob("*/result.json")]
    assert len(every) == 15
    scores = {one.trial: one.eval_info["perplexity"]["perplexity"] for one in every}
    best = min(scores.values(), key=lambda score: score["value"])
    ((_, tuned),) = found["finals"]["scores"].items()
    apart = math.log(next(iter(tuned.values())) / best["value"])
    assert apart <= 1.96 * math.sqrt(2) * best["stderr"] / best["value"]
    assert found["spent"]["steps"] <= 15 * 90 / 2
