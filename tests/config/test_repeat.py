"""A trial run again from its record, and what is said of the two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftsweep.config import repeat
from peftsweep.study.record import Result, read_json, write_json
from tests.conftest import SMALL, scores

Run = Callable[..., Result]
Command = Callable[..., tuple[int, str, str]]


TORCH: dict[str, Any] = {"gpus": [], "threads": 2, "cpu_capability": "AVX2", "kernel_switches": {}}
BITS = "judged to the bit: the same CPU, kernels, versions, thread count and settings"


def made(
    name: str = "before", accuracy: float = 0.5, loss: float = 1.25, status: str = "success", **meta: Any
) -> Result:
    """A record on a CPU."""
    folder = Path("multirun/default") / name
    result = Result(
        run_info={"trial": name, "labels": [name], "study": "default", "status": status, "created_at": "2026-01-01"}
        | {"error": None if status == "success" else {"type": "E", "message": "m", "stage": "train"}},
        choices={"method": "lora"},
        config={"seed": 0, "device": "auto", "train": {"steps": 4}},
        train_info={"final_loss": loss, "train_seconds": 2.0, "steps": 4},
        memory={"train": {"rss_peak": 10**9}},
        eval_info={"task": {"accuracy": {"value": accuracy, "stderr": 0.03, "n": 200}}},
        meta_info={"packages": {"torch": {"version": "2.13.0"}}, "torch": TORCH} | meta,
    )
    result.write(folder)
    (folder / "steps.jsonl").write_text(f'{{"step": 2, "loss": 2.0}}\n{{"step": 4, "loss": {loss}}}\n')
    return result


@pytest.fixture
def elsewhere() -> dict[str, Any]:
    """What a record of another machine says of it."""
    return {"torch": TORCH | {"cpu_capability": "AVX512"}}


def test_the_same_numbers_are_equal_to_the_bit() -> None:
    found = repeat.compare(made(), made("after"))
    assert (found.equal, found.same, found.changed) == (True, True, {})
    assert found.lines()[0] == "changed: nothing; the same versions, device and code"
    assert found.lines()[-1] == "equal to the bit: 3 figures, 2 logged losses"
    assert BITS in found.lines()


def test_on_a_cpu_with_the_same_versions_any_difference_counts() -> None:
    found = repeat.compare(made(), made("after", loss=1.2500001))
    assert not found.same
    assert (
        found.lines()[-1]
        == "not the same: with the same CPU, versions and threads the numbers should be equal to the bit"
    )
    assert "logged losses: different from step 4 on" in found.lines()
    changed_code = made("after", accuracy=0.505)
    changed_code.run_info["git_commit"] = "abc"
    found = repeat.compare(made(), changed_code)
    assert "changed: run_info.git_commit: not recorded -> abc" in found.lines()
    assert not found.same  # as changed code is what is to be found out


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"packages": {"torch": {"version": "2.14.0"}}}, "packages.torch.version changed"),
        ({"packages": {}}, "packages.torch.version changed"),  # a record of an older version
        ({"torch": TORCH | {"threads": 4}}, "torch.threads changed"),
        ({"torch": TORCH | {"cpu_capability": "AVX512"}}, "torch.cpu_capability changed"),
        ({"torch": TORCH | {"kernel_switches": {"MKL_CBWR": "COMPATIBLE"}}}, "torch.kernel_switches.MKL_CBWR changed"),
        ({"system": {"processor": "AMD EPYC"}}, "system.processor changed"),
        (
            {"torch": TORCH | {"gpus": ["NVIDIA L40S"]}},
            "the order of summation on a GPU is not fixed; torch.gpus changed",
        ),
    ],
)
def test_other_versions_or_devices_may_differ_by_two_standard_errors(meta: dict[str, Any], reason: str) -> None:
    close = repeat.compare(made(), made("after", accuracy=0.55, loss=1.3, **meta))
    assert close.same
    assert not close.equal
    assert close.changed
    assert f"judged within 2 standard errors: {reason}" in close.lines()
    assert "task.accuracy: 0.5 -> 0.55 (+0.05, 1.2 standard errors)" in close.lines()
    assert close.lines()[-1] == "the same within 2 standard errors, not to the bit"
    far = repeat.compare(made(), made("after", accuracy=0.6, **meta))
    assert not far.same
    assert far.lines()[-1] == "not the same: task.accuracy by more than 2 standard errors"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"packed": {"lanes": 3}}, "a trial was trained in a pack, which sums in another order"),
        ({"resumed": 2}, "a trial was resumed from a checkpoint, which another machine may have written"),
    ],
)
def test_a_trial_of_a_pack_or_a_checkpoint_may_differ_by_two_standard_errors(
    change: dict[str, Any], reason: str
) -> None:
    before = made()
    (before.train_info if "packed" in change else before.run_info).update(change)
    found = repeat.compare(before, made("after", accuracy=0.505))
    assert (found.same, found.because) == (True, [reason])


def test_a_record_that_does_not_say_which_kernels_it_used_is_judged_within_the_tolerance() -> None:
    before = made(torch={"gpus": [], "threads": 2})
    found = repeat.compare(before, made("after", accuracy=0.505))
    assert (found.same, found.equal) == (True, False)
    assert found.because == ["the first record does not say which CPU kernels were used"]
    repeat.write(found, before)
    assert before.folder is not None
    written = read_json(before.folder / repeat.FILE)
    assert (written["judged"], written["because"]) == ("within a tolerance", found.because)


def test_a_count_that_differs_is_never_the_same(elsewhere: dict[str, Any]) -> None:
    after = made("after", **elsewhere)
    after.train_info["steps"] = 5
    found = repeat.compare(made(), after)
    assert not found.same
    assert found.lines()[-1] == "not the same: train_info.steps, which rounding cannot change"


def test_without_a_score_the_losses_are_judged(elsewhere: dict[str, Any]) -> None:
    for loss, same in ((1.26, True), (1.3, False)):
        before, after = made(), made("after", loss=loss, **elsewhere)
        before.eval_info = after.eval_info = {}
        found = repeat.compare(before, after)
        assert found.same is same
        assert "2%" in found.lines()[-1]


def test_two_runs_on_a_gpu_need_not_agree_to_the_bit() -> None:
    gpu: dict[str, Any] = {"torch": TORCH | {"gpus": ["NVIDIA L40S"]}}
    found = repeat.compare(made(**gpu), made("after", accuracy=0.505, **gpu))
    assert (found.same, found.equal, found.changed) == (True, False, {})


def test_a_score_that_is_gone_and_another_end_are_not_the_same() -> None:
    without = made("after")
    without.eval_info = {}
    found = repeat.compare(made(), without)
    assert not found.same
    assert "task.accuracy: 0.5 -> not recorded" in found.lines()
    found = repeat.compare(made(), made("after", status="failed"))
    assert not found.same
    assert found.lines()[-1] == "not the same: success before, failed now"


@pytest.mark.kernels
def test_a_trial_is_run_again_from_its_record_alone(run_small: Run, command: Command) -> None:
    words = [
        "quant=4bit",
        "method=ia3",
        "+train.optimizer_kwargs.amsgrad=true",
        "seed=3",
        "label=mine",
        "study=one",
        "train.steps=2",
    ]
    before = run_small(
        *words,
        "eval=[tiny_math,perplexity]",
        "eval.tiny_math.samples=2",
        "eval.tiny_math.max_new_tokens=6",
        "dataset.prompt='Q {question}'",
    )
    assert before.folder is not None
    original = (before.folder / "result.json").read_bytes()
    code, out, err = command(f"repeat={before.folder}")
    assert (code, err) == (0, "")
    [place] = Path("multirun/one-repeat").glob("*/result.json")
    after = Result.read(place.parent)
    assert after.run_info["identity"] == before.run_info["identity"]
    assert after.choices == before.choices
    assert scores(after) == scores(before)
    assert "equal to the bit: " in out
    assert "and the adapter's weights" in out
    assert read_json(place.parent / repeat.FILE)["equal_to_the_bit"] is True
    assert (before.folder / "result.json").read_bytes() == original

    content = json.loads(original)  # the check can fail: a record that says something else
    content["eval_info"]["perplexity"]["perplexity"]["value"] += 1e-9
    del content["config"]["train"]["compile_dynamic"], content["config"]["adapter"]  # as of an older version
    content["config"]["train"]["of_another_version"] = 1
    write_json(before.folder / "result.json", content)
    code, out, _ = command(f"repeat={before.folder}")
    assert code == 1
    assert "not the same: with the same CPU, versions and threads the numbers should be equal to the bit" in out
    assert "changed: config.adapter.save: not recorded -> True" in out
    assert "changed: config.train.of_another_version: 1 -> not recorded" in out
    code, out, err = command(f"repeat={before.folder}", "quiet=true")  # the exit code has its reason
    assert (code, out.count("\n"), err.count("\n")) == (1, 1, 1)
    assert "not the same: with the same CPU, versions and threads" in err


@pytest.mark.slow
def test_what_the_command_says_beats_the_record(run_small: Run, command: Command) -> None:
    before = run_small("train=none")
    code, _, _ = command(
        f"repeat={before.folder}", "study=mine", "eval.tiny_math.samples=4", "dry_run=true", "seed=1,2"
    )
    assert code == 0
    plan = read_json(Path("multirun/mine/plan.json"))
    assert [row["label"][-2:] for row in plan] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "repeat=gone: is not the folder of a trial; it holds no result.json"),
        ("{", "repeat=gone: gone/result.json: JSONDecodeError"),
        ('{"schema_version": 99}', "repeat=gone: gone/result.json: written by a later version of peftsweep"),
        ("imported", "repeat=gone: is not a trial of peftsweep; it was imported from theirs.json"),
        ("held", "study=default holds the original, which must be kept; use another"),
    ],
)
def test_a_bad_folder_is_one_line(content: str | None, problem: str, command: Command) -> None:
    Path("gone").mkdir()
    words = ["repeat=gone"]
    if content == "imported":
        result = made()
        result.run_info["imported_from"] = "theirs.json"
        result.write(Path("gone"))
    elif content == "held":
        made()
        words = ["repeat=multirun/default/before", "study=default"]
    elif content is not None:
        Path("gone/result.json").write_text(content)
    code, _, err = command(*words, *SMALL)
    assert (code, err.count("\n")) == (2, 1)
    assert problem in err
