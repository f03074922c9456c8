"""What --prune removes of a study, and what it never does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from peftsweep import cli
from peftsweep.study import claims
from peftsweep.study.record import Result

Prune = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Prune:
    """Run ``peftsweep-collect --prune`` with the given words: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["peftsweep-collect", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.collect()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def trained(scratch: Path) -> Path:
    """Three trials: the first has the best accuracy, the second the best perplexity, the third was cut off."""
    folder = scratch / "multirun" / "default"
    for name, accuracy, perplexity, status in (
        ("a", 0.9, 3.0, "success"),
        ("b", 0.5, 2.0, "success"),
        ("c", 0.4, 4.0, "success"),
        ("d", None, None, "cancelled"),
    ):
        place = folder / f"trial-{name}"
        for kind in ("adapter", "merged", "checkpoints", "predictions"):
            (place / kind).mkdir(parents=True)
            (place / kind / "file").write_bytes(b"x" * 1000)
        score = {"value": accuracy, "stderr": None, "n": 8}, {"value": perplexity, "stderr": None, "n": 8}
        info = {"trial": place.name, "labels": [place.name], "study": "default", "identity": name}
        info |= {"status": status, "created_at": f"2026-01-0{name}"}
        found = {"task": {"accuracy": score[0]}, "perplexity": {"perplexity": score[1]}} if accuracy else {}
        Result(info, {}, {}, eval_info=found).write(place)
    return folder


def test_a_dry_run_says_what_a_study_will_leave_on_the_disk(scratch: Path) -> None:
    words = ["dry_run=true", "device=cpu", "method.r=2", "targets=q", "eval=[perplexity]"]
    plain, merged = (cli.run_one([*words, *more, f"study={len(more)}"]) for more in ([], ["adapter.merge=true"]))
    assert plain.train_info["adapter_bytes"] == merged.train_info["adapter_bytes"]
    rows = [json.loads(Path("multirun", name, "plan.json").read_text())[0] for name in "01"]
    assert rows[0]["disk_bytes"] == plain.train_info["adapter_bytes"]
    base = merged.train_info["total_parameters"] - merged.train_info["trainable_parameters"]
    assert rows[1]["disk_bytes"] == rows[0]["disk_bytes"] + 4 * base  # of 32 bits


def left(folder: Path) -> set[str]:
    return {f"{path.parent.name[-1]} {path.name}" for path in folder.glob("*/*") if path.is_dir()}


def test_the_best_of_each_evaluation_keep_their_models_and_all_keep_their_records(prune: Prune, trained: Path) -> None:
    before = left(trained)
    with claims.claim(trained, "c"):
        code, out, err = prune("--prune", "default")
        assert (code, err, left(trained)) == (0, "", before)
        assert out.splitlines()[-1].endswith(
            "5.0 kB in 5 folders; --prune --yes removes it; records and predictions stay"
        )
        assert "trial-c" not in out  # which runs
    assert prune("--prune", "--yes", "default")[0] == 0
    kept = {f"{name} {kind}" for name in "ab" for kind in ("adapter", "merged")}
    assert left(trained) == kept | {f"{name} predictions" for name in "abcd"}
    assert len(list(trained.glob("*/result.json"))) == 4
    assert prune("--prune", "--yes", "--keep-best", "0", "default")[0] == 0
    assert left(trained) == {f"{name} predictions" for name in "abcd"}


def test_a_link_is_left_alone(prune: Prune, trained: Path, scratch: Path) -> None:
    (elsewhere := scratch / "elsewhere").mkdir()
    (elsewhere / "file").write_text("")
    place = trained / "trial-d"
    (place / "merged" / "file").unlink()
    (place / "merged").rmdir()
    (place / "merged").symlink_to(elsewhere)
    assert prune("--prune", "--yes", "default")[0] == 0
    assert (elsewhere / "file").exists()


@pytest.mark.parametrize("words", [["--yes"], ["--prune", "--keep-best", "-1"], ["--prune", "--keep-best", "few"]])
def test_wrong_words_are_one_line(words: list[str], prune: Prune, trained: Path) -> None:
    before = left(trained)
    code, out, err = prune(*words)
    assert (code, out, len(err.splitlines()), left(trained)) == (2, "", 1, before)
