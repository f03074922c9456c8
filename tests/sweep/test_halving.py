"""Successive halving: what stops, what goes on, and that nothing of a trial is changed by it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.utils import JobReturn, JobStatus

from peftsweep.analysis.text import halving_notes
from peftsweep.config.compose import Trial
from peftsweep.errors import InputError, NotRun
from peftsweep.schema import HalvingConfig, Resource
from peftsweep.study import record, rungs
from peftsweep.study.record import Result, Status
from peftsweep.sweep import halving
from peftsweep.tiny import task
from peftsweep.training import loop
from tests.conftest import UNWRITTEN, check_row, check_scores, scores, start, wait_for

Command = Callable[..., tuple[int, str, str]]
Compose = Callable[..., Trial]
RunSmall = Callable[..., Result]

TEST_ROWS, STEPS = 100, 54
GRID = ["method.r=2,8,32", "train.learning_rate=4e-5,2e-4,1e-3", "targets=q,qv,all_linear"]


def records(name: str = "default") -> dict[str, Result]:
    found = [Result.read(file.parent) for file in Path("multirun", name).glob("*/result.json")]
    return {result.run_info["identity"]: result for result in found}


# ---- one trial -------------------------------------------------------------------------------------

NINE = [*UNWRITTEN[1:], "train.steps=9", "dataset.validation_samples=8", "train.eval_every=1", "train.keep_best=true"]


@pytest.mark.slow  # `tests/training/test_checkpoint.py` stops and goes on to the bit, the sweep below stops at rungs
def test_a_trial_that_stops_at_every_rung_ends_as_if_it_never_had(run_unwritten: RunSmall) -> None:
    words = [*NINE, "method.lora_dropout=0.1"]
    whole = run_unwritten(*words, "study=whole")
    first = run_unwritten(*words, "halving.min_steps=1", "halving.rung=1")
    assert (first.status, first.train_info["steps"]) == (Status.stopped, 1)
    assert first.run_info["rung"]["number"] == first.run_info["rung"]["step"] == 1
    assert (first.eval_info, "eval_seconds" in first.train_info) == ({}, False)  # the test rows are left alone
    second = run_unwritten(*words, "halving.min_steps=1", "halving.rung=2")
    assert (second.status, second.run_info["resumed"], second.train_info["steps"]) == (Status.stopped, 1, 3)
    last = run_unwritten(*words, "halving.min_steps=1", "halving.rung=3")  # 9 steps: the third rung is the end
    assert (last.status, last.run_info["resumed"]) == (Status.success, 3)
    assert last.run_info["identity"] == whole.run_info["identity"]
    losses = [
        [without_time(row) for row in record.read_lines((one.folder or Path()) / record.STEPS)] for one in (whole, last)
    ]
    assert losses[0] == losses[1]
    assert scores(last) == scores(whole)
    assert [one.train_info["best_step"] for one in (whole, last)] == [whole.train_info["best_step"]] * 2
    weights = [((one.folder or Path()) / "adapter" / "adapter_model.safetensors").read_bytes() for one in (whole, last)]
    assert weights[0] == weights[1]
    assert not ((last.folder or Path()) / "checkpoints").exists()


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "second" not in key and "memory" not in key}


@pytest.mark.slow  # four trials; the same command after a halving, below, has those that were stopped done
def test_a_stopped_trial_is_done_for_its_rung_and_earlier_ones(run_unwritten: RunSmall) -> None:
    words = [*NINE, "halving.min_steps=1"]
    there = run_unwritten(*words, "halving.rung=2")
    for number in (1, 2):
        assert run_unwritten(*words, f"halving.rung={number}").run_info["created_at"] == there.run_info["created_at"]
    (there.folder or Path()).joinpath(record.RESULT).unlink()  # killed on its way to a later rung
    again = run_unwritten(*words, "halving.rung=1")
    assert (again.run_info["resumed"], again.train_info["steps"], again.run_info["rung"]["step"]) == (3, 3, 1)
    assert run_unwritten(*words, "halving.rung=2").run_info["rung"]["value"] == there.run_info["rung"]["value"]


def test_a_rung_lies_where_at_most_a_factor_th_is_done() -> None:
    at = [rungs.stop_at(HalvingConfig("loss", 3, 10, number), 100) for number in (1, 2, 3, 4)]
    assert at == [10, 30, None, None]
    assert rungs.stop_at(HalvingConfig("loss", 3, 10, None), 100) is None
    assert rungs.stop_at(HalvingConfig(), 100) is None


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["halving.min_steps=40"],
            "halving.min_steps=40: must be at most 30, train.steps=90 divided by halving.factor=3",
        ),
        (["halving.min_steps=0"], "halving.min_steps=0: must be at least 1"),
        (["halving.min_steps=9", "halving.factor=1"], "halving.factor=1: must be at least 2"),
        (["halving.min_steps=9", "halving.metric=gsm8k.accuracy"], "halving.metric=gsm8k.accuracy: must be loss or"),
        (
            ["halving.min_steps=9", "train.eval_every=6"],
            "train.eval_every=6: must be steps that divide halving.min_steps=9",
        ),
        (["halving.min_steps=9", "train.eval_every=1epoch"], "train.eval_every=1epoch: must be steps that divide"),
        (["halving.min_steps=9", "objective=train_info.steps"], "objective: is only for hydra/sweeper=optuna_current"),
        (["halving.min_steps=9", "hydra/sweeper=basic"], "halving: works only with hydra/sweeper=grid, not with basic"),
        (
            ["halving.min_steps=9", "hydra.sweeper.max_batch_size=2", "seed=0,1,2"],
            "hydra.sweeper.max_batch_size: must be null, as halving compares all points of a sweep",
        ),
        (["halving.min_steps=3,9"], "halving: is of the sweep as a whole, and cannot be swept"),
    ],
)
def test_a_halving_that_cannot_be_is_one_line(words: list[str], problem: str, command: Command) -> None:
    code, _, err = command("train.steps=90", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert problem in err
    assert not list(Path("multirun").glob("default/*/result.json"))


# ---- a sweep of them -------------------------------------------------------------------------------

SWEEP = [*UNWRITTEN[1:], "train.steps=9", "dataset.validation_samples=8", "adapter.save=false"]
SWEEP += ["train.learning_rate=1e-6,1e-5,1e-4,1e-3"]
HALVING = ["halving.min_steps=1", "method.r=2,4"]
# Four trials have two rungs where half of them go on.
FOUR = [*(word for word in SWEEP[:-1] if "train.steps" not in word), "train.steps=4", "train.learning_rate=1e-6,1e-3"]
HALF = [*HALVING, "halving.factor=2"]


@pytest.fixture
def four_halved(command: Command, trained_studies: Path) -> str:
    """What a command of ``FOUR`` with ``HALF`` prints, run once for all tests; its study is copied to this one's."""
    folder = trained_studies / "four_halved"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            begun = folder.with_suffix(".begun")
            shutil.rmtree(begun, ignore_errors=True)  # of a test that was interrupted
            begun.mkdir()
            with contextlib.chdir(begun):
                code, out, err = command(*FOUR, *HALF)
            assert (code, err) == (0, "")
            (begun / "out.txt").write_text(out)
            begun.rename(folder)
    shutil.copytree(folder / "multirun", "multirun")
    return (folder / "out.txt").read_text()


def test_the_best_go_on_and_the_same_command_decides_the_same(four_halved: str, command: Command) -> None:
    words, out = FOUR, four_halved
    found = records()
    assert sorted(one.train_info["steps"] for one in found.values()) == [1] * 2 + [2] + [4]
    assert "rung 1: the best 2 of 4 by loss go on" in out
    assert "rung 2: the best 1 of 2 by loss go on" in out
    assert "halving by loss: 8 of 16 steps trained (50%); 3 trials stopped" in out
    first = {one.run_info["identity"]: first_loss(one) for one in found.values()}
    assert {key for key, one in found.items() if one.train_info["steps"] > 1} == set(
        sorted(first, key=first.__getitem__)[:2]
    )
    code, again, _ = command(*words, *HALF)
    assert (code, [line for line in again.splitlines() if line.startswith("[")]) == (0, [])
    assert [line for line in again.splitlines() if "rung" in line] == [
        line for line in out.splitlines() if line[0] == "r"
    ]
    assert {key: one.run_info for key, one in records().items()} == {key: one.run_info for key, one in found.items()}
    # A plain sweep of some of these trials brings all of its own to their end, from where they are.
    stopped = {
        key: one.train_info["steps"]
        for key, one in found.items()
        if one.config["method"]["r"] == 2 and one.status is Status.stopped
    }
    code, out, _ = command(*words, "method.r=2", "train.eval_every=1")
    assert (code, out.splitlines()[-1]) == (0, "2 trials: 2 success  (multirun/default)")
    assert f"{len(stopped)} trials that halving stopped will go on to the end" in out
    assert {key: records()[key].run_info["resumed"] for key in stopped} == stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "trials", "steps", "expected"),
    [
        (HalvingConfig("loss", 3, 10), 21, 100, [(21, 0.0, 0.1), (7, 0.1, 0.3), (2, 0.3, 1.0)]),
        (HalvingConfig("loss", 3, 30), 21, 90, [(21, 0.0, 1 / 3), (7, 1 / 3, 1.0)]),
        (HalvingConfig("loss", 3, 1), 3, 100, [(3, 0.0, 0.01), (1, 0.01, 1.0)]),  # the last one runs to its end
        (HalvingConfig("loss", 3, 50), 4, 100, [(4, 0.0, 1.0)]),
        (HalvingConfig("loss", 2, 1), 2, 0, [(2, 0.0, 1.0)]),
    ],
)
def test_the_stages_of_a_sweep_are_known_before_it_runs(
    config: HalvingConfig, trials: int, steps: int, expected: list[tuple[int, float, float]]
) -> None:
    found = [(stage.trials, stage.begin, stage.end) for stage in rungs.stages(config, trials, steps)]
    assert found == expected


@pytest.mark.parametrize(("in_epochs", "shares"), [(True, [0.1, 0.3, 1.0]), (False, [1.0, 1.0, 1.0])])
def test_stages_of_rows_train_anew(in_epochs: bool, shares: list[float]) -> None:
    config = HalvingConfig("loss", 3, resource=Resource.rows, min_fraction=0.1)
    found = rungs.stages(config, 9, 100, in_epochs=in_epochs)
    assert [(stage.trials, stage.begin) for stage in found] == [(9, 0.0), (3, 0.0), (1, 0.0)]
    assert [stage.end for stage in found] == pytest.approx(shares)


# Four more trials, twice. The fast tier has rungs of trials alone, above, and slots that are stopped in a pack and go
# on (tests/training/test_packed.py).
@pytest.mark.slow
def test_rungs_in_packs_are_those_of_the_trials_alone(four_halved: str, command: Command) -> None:
    words = [*FOUR, *HALF, "study=packed", "hydra.launcher.pack=2", "hydra.launcher.workers=0"]
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    rung_lines = [
        [line.partition("their checkpoints hold")[0] for line in text.splitlines() if line.startswith(("rung", "halv"))]
        for text in (four_halved, out)
    ]
    assert len(rung_lines[0]) >= 3
    assert rung_lines[0] == rung_lines[1]
    code, again, _ = command(*words)  # decides the same, and runs nothing
    assert (code, [line for line in again.splitlines() if line.startswith("[")]) == (0, [])
    alone, packed = records(), records("packed")
    assert alone.keys() == packed.keys()
    assert not any(one.run_info.get("packed_with") for one in alone.values())
    assert sorted(len(one.run_info.get("packed_with", [])) for one in packed.values()) == [0] + [1] * 3
    for key, one in packed.items():
        other = alone[key]
        assert one.status == other.status
        check_row(one.run_info.get("rung", {}), other.run_info.get("rung", {}))
        assert one.train_info["steps"] == other.train_info["steps"]
        assert one.run_info["resumed"] == other.run_info["resumed"]
        check_scores(one, other)


def first_loss(one: Result) -> float:
    rows = record.read_lines((one.folder or Path()) / record.STEPS)
    return float(next(row["validation_loss"] for row in rows if row["step"] == 1 and "validation_loss" in row))


@pytest.mark.slow
def test_a_failed_trial_is_dropped_and_tried_again_by_the_same_command(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.train

    def fails_at_the_best_rate(model: Any, rows: Any, config: Any, **options: Any) -> Any:
        if config.learning_rate == 1e-3:
            raise RuntimeError("broken")
        return real(model, rows, config, **options)

    monkeypatch.setattr(loop, "train", fails_at_the_best_rate)
    code, out, err = command(*SWEEP, "halving.min_steps=1", "method.r=2")
    assert (code, err) == (1, "")
    assert "rung 1: the best 1 of 4 by loss go on" in out
    assert sorted(one.status.name for one in records().values()) == ["failed", "stopped", "stopped", "success"]
    monkeypatch.setattr(loop, "train", real)
    code, out, _ = command(*SWEEP, "halving.min_steps=1", "method.r=2")
    assert (code, sorted(one.status.name for one in records().values())) == (
        0,
        ["stopped", "stopped", "success", "success"],
    )
    (best,) = (one for one in records().values() if one.config["train"]["learning_rate"] == 1e-3)
    assert best.status is Status.success


@pytest.mark.slow
def test_a_rung_that_is_not_complete_is_not_decided(command: Command) -> None:
    words = [*SWEEP, "halving.min_steps=1", "method.r=2", "hydra.launcher.workers=0"]
    code, out, _ = command(*words, "hydra.launcher.limit=3")
    assert (code, len(records())) == (3, 3)
    assert "rung 1 is not complete, 1 of 4 were not run; the same command continues" in out
    code, out, _ = command(*words, "hydra.launcher.limit=1")  # the limit is the command's, not the rung's
    assert "rung 2 is not complete, 1 of 1 were not run" in out
    assert command(*words)[0] == 0
    assert sorted(one.status.name for one in records().values()) == ["stopped"] * 3 + ["success"]


def test_a_rung_of_which_a_trial_was_cancelled_is_not_decided(capsys: pytest.CaptureFixture[str]) -> None:
    """Else the same command, which runs that trial too, would decide otherwise."""
    launched = []

    def launch(points: list[list[str]], first: int) -> list[JobReturn]:
        launched.append(points)
        jobs = [JobReturn(status=JobStatus.COMPLETED) for _ in points]
        for number, job in enumerate(jobs):
            info: dict[str, Any] = {"trial": f"t{number}", "identity": f"i{number}", "status": "stopped"}
            info["rung"] = {"number": 1, "step": 1, "metric": "loss", "value": 1.0}
            job._return_value = Result(info, {}, {})
        jobs[1].status, jobs[1]._return_value = JobStatus.FAILED, NotRun("t1: cancelled")
        return jobs

    points = [[f"method.r={rank}"] for rank in (2, 4, 8)]
    ended = halving.run(launch, points, HalvingConfig(metric="loss", min_steps=1))
    assert [isinstance(job._return_value, NotRun) for job in ended] == [False, True, False]
    assert len(launched) == 1
    assert "rung 1 is not complete, 1 of 3 were not run; the same command continues" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_within_a_rung_the_same_command_decides_as_undisturbed(command: Command) -> None:
    words = [*SWEEP, *HALVING]
    assert command(*words, "study=undisturbed")[0] == 0

    def trained(steps: int) -> bool:
        return bool(sum(one.train_info["steps"] for one in records().values()) >= steps)

    for steps in (3, 9):  # within the first rung, and after it
        process = start(*words)
        wait_for(partial(trained, steps), process)
        process.kill()
        process.communicate()
    assert command(*words)[0] == 0
    ended, undisturbed = (
        {key: (one.status, one.train_info["steps"], one.run_info.get("rung")) for key, one in records(name).items()}
        for name in ("default", "undisturbed")
    )
    assert ended == undisturbed


@pytest.mark.slow
def test_stock_launchers_halve_too(command: Command) -> None:
    words = [*SWEEP, "halving.min_steps=1", "method.r=2", "hydra/launcher=basic"]
    for _ in range(2):
        code, out, err = command(*words)
        assert (code, err) == (0, "")
        assert "rung 1: the best 1 of 4 by loss go on" in out
        assert sorted(one.status.name for one in records().values()) == ["stopped"] * 3 + ["success"]


@pytest.mark.slow
def test_force_trains_each_step_anew_but_only_once(command: Command) -> None:
    words = [*SWEEP, "halving.min_steps=1", "method.r=2"]
    assert command(*words)[0] == 0
    assert command(*words, "force=true")[0] == 0
    assert sorted((one.train_info["steps"], one.run_info["resumed"]) for one in records().values()) == [(1, 0)] * 3 + [
        (9, 1)
    ]


def test_each_choice_of_groups_is_composed_once_where_the_launcher_checks_it(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = []
    real = ConfigLoaderImpl.load_sweep_config

    def counted(self: Any, config: Any, words: list[str]) -> Any:
        composed.append(words)
        return real(self, config, words)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    assert command("seed=0,1,2", "quant=none,4bit", "dry_run=true")[0] == 0
    assert composed == [["quant=none"], ["quant=4bit"]]


def held(identity: str, values: list[float | None], status: Status = Status.stopped) -> Result:
    """A record of a trial of 9 steps and rungs at 1 and 3, with its validations."""
    folder = Path(identity)
    rows = [
        {"step": step, "steps": 9, "validation_loss": value} for step, value in zip((1, 3, 9), values, strict=False)
    ]
    record.write_lines(folder / record.STEPS, rows)
    info = {"identity": identity, "trial": identity, "status": status.value}
    config = {"halving": {"metric": "loss", "factor": 3, "min_steps": 1}}
    return Result(info, {}, config, train_info={"steps": (1, 3, 9)[len(values) - 1]}, folder=folder)


def test_ties_and_what_is_no_number_are_ranked_the_same_every_time() -> None:
    results = {name: held(name, [value]) for name, value in {"c": 1.0, "a": None, "d": 0.5, "b": 1.0}.items()}
    results["e"] = held("e", [0.1], Status.oom)
    for names in (list(results), list(reversed(results))):
        ranked = halving.ranked({name: results[name] for name in names}, HalvingConfig("loss", 3, 1, 1))
        assert ranked == ["d", "b", "c", "a"]


def test_the_report_says_what_was_spared_and_how_well_the_rungs_foretold() -> None:
    ended = {"a": [3.0, 2.0, 0.3], "b": [4.0, 3.0, 0.2], "c": [5.0, 4.0, 0.1]}
    results = [held(name, [*values], Status.success) for name, values in ended.items()]
    results += [held(f"d{n}", [6.0 + n]) for n in range(6)]
    lines = halving_notes.notes(results)
    assert "33 of 81 steps trained (41%); 6 trials stopped" in lines[0]
    assert lines[1:] == [
        "rung 1 against the next: rank correlation 1.00 (Spearman, the 3 trials that went on)",
        "rung 2 against the next: rank correlation -1.00 (Spearman, the 3 trials that went on)",
    ]
    assert halving_notes.notes([held("e", [1.0, 2.0])])[1:] == [
        "rung 1 against the next: 1 trials went on, too few for a correlation"
    ]


# ---- on a fraction of the rows ---------------------------------------------------------------------


def test_a_larger_fraction_has_the_rows_of_a_smaller_one_beside_the_same_validation_rows(compose: Compose) -> None:
    found = {
        part: compose("train.eval_every=10", "dataset.samples=200", f"dataset.fraction={part}").rows
        for part in (0.1, 0.3, 1.0)
    }
    texts = {part: [str(row) for row in rows.train] for part, rows in found.items() if rows}
    assert [len(rows) for rows in texts.values()] == [18, 54, 180]  # of 200 a tenth validates
    assert set(texts[0.1]) < set(texts[0.3]) < set(texts[1.0])
    assert len({str(rows.validation) for rows in found.values() if rows}) == 1


def test_the_rungs_of_rows_end_where_a_next_one_would_be_more_than_all() -> None:
    config = HalvingConfig("loss", 3, resource=Resource.rows, min_fraction=0.1)
    assert [rungs.fraction(config, number) for number in (1, 2, 3)] == pytest.approx([0.1, 0.3, 1.0])
    thirds = HalvingConfig("loss", 3, resource=Resource.rows, min_fraction=1 / 9)
    assert [rungs.fraction(thirds, number) for number in (1, 2, 3)] == pytest.approx([1 / 9, 1 / 3, 1.0])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["halving.min_fraction=0.1"], "halving.min_fraction=0.1: must be null with halving.resource=steps"),
        (["halving.resource=rows", "halving.min_steps=10"], "halving.min_steps=10: must be null with"),
        (["halving.resource=rows", "halving.min_fraction=0.1"], "halving.resource=rows: needs train.epochs"),
        (
            ["halving.resource=rows", "halving.min_fraction=0.4", "train.epochs=1"],
            "halving.min_fraction=0.4: must be at most 0.3333, 1 / halving.factor",
        ),
        (["dataset.fraction=0"], "dataset.fraction=0.0: must be at most 1 and above 0"),
    ],
)
def test_a_wrong_word_of_a_halving_of_rows_is_one_line(words: list[str], problem: str, compose: Compose) -> None:
    with pytest.raises(InputError) as raised:
        compose(*words)
    assert problem in str(raised.value)


def test_the_whole_of_the_rows_leaves_the_identity_as_it_was(compose: Compose) -> None:
    whole, part = compose("dataset.fraction=1"), compose("dataset.fraction=0.5")
    assert whole.identity == compose().identity
    assert part.training != whole.training


def test_the_report_pairs_what_a_point_came_to_on_its_rows() -> None:
    results = []
    for point, losses in enumerate(([3.0, 2.0], [4.0, 3.0], [5.0, 4.0], [6.0])):
        for part, loss in zip((0.25, 1.0), losses, strict=False):
            one = held(f"{point}-{part}", [loss], Status.success if part == 1 else Status.stopped)
            row = {"step": int(36 * part), "steps": int(36 * part), "validation_loss": loss}
            record.write_lines((one.folder or Path()) / record.STEPS, [row])
            halving_config = {
                "metric": "loss",
                "factor": 4,
                "min_steps": None,
                "resource": "rows",
                "min_fraction": 0.25,
            }
            one.config = {"halving": halving_config, "dataset": {"fraction": part}, "seed": point}
            one.train_info["steps"] = row["steps"]
            results.append(one)
    lines = halving_notes.notes(results)
    assert "144 of about 144 steps trained (100%); 1 points were not trained on all rows" in lines[0]
    assert lines[1:] == [
        "rung 1 (0.25 of the rows) against the next: rank correlation 1.00 (Spearman, the 3 trials that went on)"
    ]


def test_a_halving_of_rows_of_which_nothing_went_on_yet_is_told() -> None:
    one = held("0-0.25", [3.0], Status.stopped)
    halving_config = {"metric": "loss", "factor": 4, "min_steps": None, "resource": "rows", "min_fraction": 0.25}
    records = []
    for point, part in ((0, 0.25), (1, 1.0)):  # the second one of another halving, whose first rung is not there
        copy = dataclasses.replace(
            one, config={"halving": halving_config, "dataset": {"fraction": part}, "seed": point}
        )
        copy.train_info["steps"] = 9
        records.append(copy)
    assert halving_notes.notes(records)[1:] == [
        "rung 1 (0.25 of the rows) against the next: 0 trials went on, too few for a correlation"
    ]


@pytest.mark.slow
def test_a_halving_of_rows_trains_the_best_on_all_of_them_and_decides_the_same_again(command: Command) -> None:
    words = [*(word for word in UNWRITTEN if "steps" not in word and "samples" not in word)]
    words += ["dataset.samples=180", "train.epochs=1", "eval.perplexity.samples=8", "adapter.save=false"]
    words += ["train.learning_rate=0,1e-5,3e-3", "halving.resource=rows", "halving.min_fraction=0.3"]
    code, out, err = command(*words)
    assert code == 0, err
    trained = 3 * 13 + 41  # steps of three points on 0.3 of the rows, and of one on all
    assert f"halving by loss, of rows: {trained} of about " in out
    assert "; 2 points were not trained on all rows" in out
    assert "rung 1 (0.3 of the rows) against the next: 1 trials went on, too few for a correlation" in out
    ends = {
        (one.config["train"]["learning_rate"], one.config["dataset"]["fraction"]): one for one in records().values()
    }
    assert {key: one.status.name for key, one in ends.items()} == {
        (0.0, 0.3): "stopped",
        (1e-5, 0.3): "stopped",
        (3e-3, 0.3): "stopped",
        (3e-3, 1.0): "success",
    }
    assert ends[3e-3, 0.3].eval_info == {}  # the test rows are left alone
    assert ends[3e-3, 0.3].train_info["training_rows"] == round(0.3 * ends[3e-3, 1.0].train_info["training_rows"])
    before = {one.trial: one.run_info["created_at"] for one in records().values()}
    assert command(*words)[0] == 0
    assert {one.trial: one.run_info["created_at"] for one in records().values()} == before


# ---- the promise -----------------------------------------------------------------------------------


def right(result: Result) -> np.ndarray[Any, np.dtype[np.float64]]:
    """1 for each test row that the trial answered rightly, else 0."""
    rows = record.read_lines((result.folder or Path()) / "predictions" / "tiny_math.jsonl")
    return np.array([float(row["correct"]) for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_halving_keeps_the_best_of_27_at_a_third_of_the_steps(seed: int, command: Command, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"  # in a file of its own, so that the validation asks for the loss alone
    test.write_text("".join(record.line(row) for row in task.rows("test", TEST_ROWS)))
    words = [f"train.steps={STEPS}", "train.batch_size=8", "train.log_every=18", "train.eval_every=6", f"seed={seed}"]
    words += ["eval=[tiny_math]", f"eval.tiny_math.path={test}", f"eval.tiny_math.samples={TEST_ROWS}"]
    words += ["dataset.samples=1000", "dataset.validation_samples=32", "adapter.save=false", "quiet=true", *GRID]
    assert command(*words, "halving.min_steps=6")[0] == 0
    halved = records()
    notes = halving_notes.notes(halved.values())
    spent = sum(one.train_info["steps"] for one in halved.values()) / (27 * STEPS)
    kept = {identity for identity, one in halved.items() if one.status is Status.success}
    # The truth: the trials that were stopped go on to the ends that they would have come to.
    assert command(*words)[0] == 0
    full = records()
    assert len(full) == 27
    assert {one.train_info["steps"] for one in full.values()} == {STEPS}
    accuracy = {identity: float(right(one).mean()) for identity, one in full.items()}
    best = max(accuracy, key=lambda identity: (accuracy[identity], identity in kept))
    mine = max(kept, key=lambda identity: accuracy[identity])
    difference = right(full[best]) - right(full[mine])  # paired: the same rows
    error = float(difference.std(ddof=1)) / math.sqrt(TEST_ROWS)
    places = sorted(1 + sum(other > accuracy[identity] for other in accuracy.values()) for identity in kept)
    print(
        f"seed {seed}: {spent:.0%} of the steps; accuracy of the best {accuracy[best]:.2f}, of the best kept", end=" "
    )
    print(f"{accuracy[mine]:.2f}, paired difference {difference.mean():.3f} ± {error:.3f}; places of the kept {places}")
    print(*notes, f"median accuracy of all 27: {np.median([*accuracy.values()]):.2f}", sep="\n")
    assert spent <= 0.45
    assert difference.mean() <= 2 * error
