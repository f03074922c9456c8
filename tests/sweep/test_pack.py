"""Trials that are trained together, from their configurations to their records."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftsweep.config import build, checks
from peftsweep.config.compose import Trial
from peftsweep.forecast import forecast
from peftsweep.models import model as models_model
from peftsweep.observe.measure import Meter
from peftsweep.study import claims, record, store
from peftsweep.study.record import Result, Status
from peftsweep.sweep import pack, packing
from peftsweep.training import checkpoint, packed
from peftsweep.training.run import PACK_KEYS
from peftsweep.trial import done, outcome, task
from peftsweep.trial import session as trial_session
from tests.architectures import ARCHITECTURES, write
from tests.conftest import SAME_WEIGHTS, SMALL, apart, check_row, check_scores

Compose = Callable[..., Trial]
Command = Callable[..., tuple[int, str, str]]
POINTS = (
    ["method.r=4"],
    ["method.r=2", "targets=qv", "train.learning_rate=0.001"],
    ["method.lora_alpha=4", "method.use_rslora=true", "train.weight_decay=0.1", "train.steps=3"],
)


def trials(compose: Compose, name: str, *shared: str) -> list[Trial]:
    return [compose(*SMALL, f"study={name}", *shared, *point) for point in POINTS]


def lines(result: Result, file: str) -> list[dict[str, Any]]:
    assert result.folder is not None
    return record.read_lines(result.folder / file)


def weights(result: Result) -> dict[str, torch.Tensor]:
    assert result.folder is not None
    return load_file(result.folder / store.ADAPTER / "adapter_model.safetensors")


def check_same(one: Result, other: Result) -> None:
    """The trial's own numbers: losses, weights, predictions, scores."""
    for a, b in zip(lines(one, record.STEPS), lines(other, record.STEPS), strict=True):
        kept = {*a, *b} - {*PACK_KEYS}
        check_row({key: a.get(key) for key in kept}, {key: b.get(key) for key in kept})
    assert apart(weights(one), weights(other)) <= SAME_WEIGHTS
    for name in one.eval_info:
        for a, b in zip(*(lines(side, f"predictions/{name}.jsonl") for side in (one, other)), strict=True):
            check_row(a, b)
    check_scores(one, other)


@pytest.mark.slow
def test_a_packed_trial_is_recorded_as_it_is_alone(compose: Compose) -> None:
    together = pack.run(trials(compose, "packed", "adapter.check=true"))
    for one, mine in zip(trials(compose, "alone"), together, strict=True):
        single = task.run(one)
        check_same(mine, single)
        assert mine.status is Status.success
        assert mine.train_info["reloads"]
        assert mine.folder is not None
        assert single.folder is not None
        names = [{file.name for file in (folder / store.ADAPTER).iterdir()} for folder in (mine.folder, single.folder)]
        assert names[0] == names[1]
        folders = (mine.folder, single.folder)
        configs = [json.loads((folder / store.ADAPTER / "adapter_config.json").read_text()) for folder in folders]
        assert configs[0] == configs[1]
        for name, found in mine.eval_info.items():
            files = [folder.parent / found["base_predictions"] for folder in folders]
            assert record.read_lines(files[0]) == record.read_lines(files[1]) != []
            assert found["base_predictions"] == single.eval_info[name]["base_predictions"]
        facts = ("trainable_parameters", "total_parameters", "adapter_bytes", "steps", "tokens", "base_bytes")
        assert [mine.train_info[fact] for fact in facts] == [single.train_info[fact] for fact in facts]


@pytest.mark.slow
def test_what_a_pack_took_stands_where_no_trials_own_figure_stands(compose: Compose) -> None:
    together = pack.run(trials(compose, "packed"))
    names = {result.trial for result in together}
    for result in together:
        assert set(result.run_info["packed_with"]) == names - {result.trial}
        own = {"train_seconds", "tokens_per_second", "step_seconds_p50", "load_seconds", "mfu"}
        assert not own & set(result.train_info)
        assert not {"train", "load", "attach", "eval"} & set(result.memory)
        assert "eval_seconds" not in result.train_info
        assert all("seconds" not in found and found["packed_seconds"] > 0 for found in result.eval_info.values())
        assert result.memory["packed_eval"]["rss_peak"] > 0
        assert result.memory["packed_train"]["rss_peak"] > 0
        assert result.train_info["packed"]["lanes"] == 3
        assert all("seconds" not in row and "tokens_per_second" not in row for row in lines(result, record.STEPS))
    longest = max(result.train_info["packed"]["train_seconds"] for result in together)
    assert sum(result.train_info["packed"]["share_seconds"] for result in together) == pytest.approx(longest)


@pytest.mark.slow
def test_a_second_run_finds_all_done_and_a_cut_off_pack_runs_what_is_left(compose: Compose) -> None:
    first = pack.run(trials(compose, "packed"))
    assert first[1].folder is not None
    (first[1].folder / record.RESULT).unlink()
    (store.folder("packed") / ".trained" / first[1].run_info["training"]).unlink()
    again = pack.run(trials(compose, "packed"))
    assert [r.run_info["created_at"] for r in (again[0], again[2])] == [
        r.run_info["created_at"] for r in (first[0], first[2])
    ]
    assert again[1].train_info["final_loss"] == first[1].train_info["final_loss"]


@pytest.mark.slow
def test_a_slot_that_diverges_is_recorded_and_harms_no_other(compose: Compose) -> None:
    points = trials(compose, "packed")[:2]
    bad = compose(*SMALL, "study=packed", "train.learning_rate=1e30", "train.clip=0")
    results = pack.run([points[0], bad, points[1]])
    assert [result.status for result in results] == [Status.success, Status.failed, Status.success]
    assert results[1].error is not None
    assert (results[1].error["type"], results[1].error["stage"]) == ("FloatingPointError", "train")
    check_same(results[0], task.run(trials(compose, "alone")[0]))


@pytest.mark.slow
def test_an_evaluation_that_fails_is_one_slots_failure(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, judged = trial_session.Session.evaluate, []

    def failing(session: trial_session.Session) -> None:
        judged.append(session)
        if len(judged) == 2:
            raise RuntimeError("no words")
        judge(session)

    monkeypatch.setattr(trial_session.Session, "evaluate", failing)
    results = pack.run(trials(compose, "packed"))
    assert [result.status.name for result in results] == ["success", "failed", "success"]
    assert results[1].error is not None
    assert results[1].error["message"] == "no words"


@pytest.mark.parametrize(
    ("error", "packs"), [(torch.OutOfMemoryError("CUDA out of memory"), [3, 2]), (ValueError("cannot be packed"), [3])]
)
@pytest.mark.slow
def test_what_fails_for_all_is_tried_again_by_fewer(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, error: Exception, packs: list[int]
) -> None:
    tried = []

    def failing(model: Any, rows: Any, slots: Any, **_: Any) -> Any:
        tried.append(len(slots))
        raise error

    monkeypatch.setattr(packed, "train_packed", failing)
    results = pack.run(trials(compose, "packed", "eval.tiny_math.samples=2"))
    assert tried == packs
    assert [result.status for result in results] == [Status.success] * 3
    assert all("packed_with" not in result.run_info for result in results)


@pytest.mark.slow  # the interrupted packs below are recorded so too, and go on
def test_an_interrupted_pack_is_recorded_as_cancelled(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(packed, "train_packed", interrupted)
    points = trials(compose, "packed")
    with pytest.raises(KeyboardInterrupt):
        pack.run(points)
    found = [store.result(done.folder(one)) for one in points]
    assert [one and one.status for one in found] == [Status.cancelled] * 3


CUT = ["train.checkpoint_every=2", "train.log_every=1", "method.lora_dropout=0.2", "dataset.validation_samples=8"]
CUT += ["train.eval_every=2", "train.keep_best=true", "adapter.check=false"]


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "signalled", "step"), [("none", True, 3), ("4bit", False, 2)])
def test_an_interrupted_pack_goes_on_to_the_numbers_of_the_trials_alone(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, quant: str, signalled: bool, step: int
) -> None:
    """By a signal, which waits for a checkpoint of every slot, or by an error, after which the last ones are there."""
    log_step = outcome.log_step
    sent: list[Any] = []

    def interrupted(lines: Any, observer: Any, row: dict[str, Any]) -> None:
        log_step(lines, observer, row)
        if row["step"] == 3 and "loss" in row and not sent:
            sent.append(row)
            if not signalled:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("peftsweep.trial.session.log_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack.run(trials(compose, "packed", *CUT, f"quant={quant}"))
    monkeypatch.setattr("peftsweep.trial.session.log_step", log_step)
    points = trials(compose, "packed", *CUT, f"quant={quant}")
    # The third was to have three steps: with three done it is trained, which another file keeps.
    assert [pack._step(one) for one in points] == [step, step, 0 if signalled else 2]
    assert (done.folder(points[2]) / store.CHECKPOINTS / checkpoint.TRAINED).exists() == signalled
    shutil.rmtree(done.folder(points[0]) / store.CHECKPOINTS)  # it begins anew, alone
    together = pack.run(points)
    assert [result.run_info["resumed"] for result in together] == [0, step, 3 if signalled else 2]
    packs = [len(result.run_info.get("packed_with", [])) for result in together]
    assert packs == [0, 0, 0] if signalled else [0, 1, 1]
    assert [result.train_info["packed"]["lanes"] for result in together[1:]] == [3, 3]
    for one, mine in zip(trials(compose, "alone", *CUT, f"quant={quant}"), together, strict=True):
        check_same(mine, task.run(one))
        assert not (done.folder(one) / store.CHECKPOINTS).exists()


@pytest.mark.slow
def test_what_was_begun_in_a_pack_ends_alone_without_a_speed_of_its_own(compose: Compose) -> None:
    words = [*CUT, "halving.min_steps=1", "train.eval_every=1"]
    points = trials(compose, "packed", *words, "halving.rung=1")[:2]
    assert [result.status for result in pack.run(points)] == [Status.stopped] * 2
    found = task.run(trials(compose, "packed", *words)[0])
    assert (found.status, found.run_info["resumed"]) == (Status.success, 1)
    assert found.train_info["packed"]["lanes"] == 2
    assert not {"train_seconds", "tokens_per_second", "step_seconds_p50"} & set(found.train_info)
    check_same(found, task.run(trials(compose, "alone", *words)[0]))


def test_a_trial_that_another_process_runs_is_left_to_it(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    points = trials(compose, "packed")
    with claims.claim(store.folder("packed"), points[1].identity), pytest.raises(claims.Claimed):
        pack.run(points)
    assert not any((store.folder("packed") / ".claims").glob("*.json"))


def test_a_trial_that_another_process_has_just_ended_is_not_trained_again(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, real, looked = trials(compose, "packed", "adapter.save=false"), done.finished, list[str]()
    task.run(points[1])

    def just_too_early(one: Trial) -> Result | None:
        looked.append(one.identity)
        return None if len(looked) <= len(points) else real(one)

    monkeypatch.setattr(done, "finished", just_too_early)
    with pytest.raises(claims.Claimed, match="has just ended"):
        pack.run(points)
    assert len(list(store.folder("packed").glob("*/result.json"))) == 1


# ---- whether it pays -------------------------------------------------------------------------------


def test_a_probe_trains_nothing(compose: Compose) -> None:
    one = trials(compose, "packed")[0]
    base = build.load_base(one, models_model.load_tokenizer(one.config.model), torch.device("cpu"))
    adapted = build.attach_slots({"slot0": one, "slot1": one}, base)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    assert one.rows is not None
    rows = build.training_tokens(one, models_model.load_tokenizer(one.config.model), one.rows.train)
    meter = Meter(torch.device("cpu"))
    assert packed.speedup(adapted, ["slot0", "slot1"], rows, one.config.train, pad_id=0, meter=meter) > 0
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in adapted.named_parameters())


@pytest.mark.parametrize(("found", "slots"), [(0.9, 0), (1.5, 3)])
@pytest.mark.slow
def test_auto_packs_only_what_is_faster_so_and_tries_it_out_once(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, found: float, slots: int
) -> None:
    tried = []

    def speedup(*_: Any, **__: Any) -> float:
        tried.append(1)
        return found

    monkeypatch.setattr(packed, "speedup", speedup)
    monkeypatch.setattr(pack, "_SPEEDUPS", {})
    for name in ("first", "second"):
        results = pack.run(trials(compose, name, "adapter.save=false"), probe=True)
        assert [result.status for result in results] == [Status.success] * 3
        assert [result.train_info.get("packed", {}).get("lanes", 0) for result in results] == [slots] * 3
    assert len(tried) == 1


@pytest.mark.slow
def test_measured_alone_a_packed_trial_has_a_speed_and_a_memory_of_its_own(compose: Compose) -> None:
    measured = pack.run(trials(compose, "packed"), measure=True)
    for result in measured:
        assert result.status is Status.success
        assert result.train_info["step_seconds_p50"] > 0
        assert result.train_info["tokens_per_second"] > 0
        assert result.memory["train"]["rss_peak"] > 0
        assert result.train_info["measured_steps"] == trial_session.MEASURED_STEPS
        assert "train_seconds" not in result.train_info
        assert result.train_info["steps"] in (3, 4)


# ---- in a sweep ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_trains_together_what_it_is_told_to(command: Command) -> None:
    words = [*SMALL, "method.r=1,2,3", "train.batch_size=2,4", "hydra.launcher.pack=3", "hydra.launcher.limit=4"]
    assert command("study=one", *words, "hydra.launcher.workers=1")[0] == 3
    found = [store.result(folder) for folder in sorted(store.folder("one").iterdir()) if folder.name[0] != "."]
    assert [r.status.name for r in found if r] == ["success"] * 4
    assert sorted(len(r.run_info.get("packed_with", [])) for r in found if r) == [0, 2, 2, 2]
    code, out, _ = command("study=one", *words)
    assert code == 0
    assert "6 success" in out or "4 success" in out


@pytest.mark.slow
def test_a_worker_that_dies_of_a_pack_costs_no_trial(command: Command, scratch: Path) -> None:
    (scratch / "deadly.py").write_text(
        "import os, peft\n"
        "from peftsweep.evaluation.evaluate import perplexity as plain\n"
        "def perplexity(model, tokenizer, examples, *, batch_size: int = 16):\n"
        "    if len(getattr(model, 'peft_config', ())) > 1:\n"
        "        os._exit(9)\n"
        "    return plain(model, tokenizer, examples, batch_size=batch_size)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(scratch))
        patch.setenv("PYTHONPATH", str(scratch), prepend=os.pathsep)
        code, _, err = command(
            *(word for word in SMALL if "eval" not in word),
            "eval=[perplexity]",
            "eval.perplexity._target_=deadly.perplexity",
            "eval.perplexity.samples=4",
            "~eval.perplexity.max_length",
            "method.r=1,2",
            "study=deadly",
            "hydra.launcher.pack=2",
            "hydra.launcher.workers=1",
        )
    assert code == 0, err
    found = [store.result(folder) for folder in sorted(store.folder("deadly").iterdir()) if folder.name[0] != "."]
    assert [r.status.name for r in found if r] == ["success"] * 2
    assert all("packed_with" not in r.run_info for r in found if r)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("hydra.launcher.pack=1", "hydra.launcher.pack=1: must be auto, off or a number of trials, at least 2"),
        ("hydra.launcher.pack=many", "hydra.launcher.pack=many: must be auto, off or a number"),
        ("hydra.launcher.measure=all", "hydra.launcher.measure=all: must be alone or null"),
    ],
)
def test_a_wrong_word_is_one_line(word: str, line: str, command: Command) -> None:
    code, _, err = command(*SMALL, word)
    assert code == 2
    assert line in err


def test_the_words_of_the_launcher() -> None:
    assert checks.placement({"pack": "auto"})["pack"] == checks.PACK
    assert checks.placement({"pack": "auto"})["probe"]
    assert checks.placement({"pack": 4}) == {"pack": 4, "probe": False, "measure": False} | dict.fromkeys(
        ("timeout", "deadline")
    )
    for setting in ("off", False, None):
        assert checks.placement({"pack": setting})["pack"] is None


# ---- which -----------------------------------------------------------------------------------------


def sizes(packs: list[list[Trial]]) -> list[int]:
    return [len(one) for one in packs]


def test_a_plan_puts_together_what_shares_base_rows_and_batches(compose: Compose) -> None:
    grid = [
        compose(*SMALL, f"method.r={r}", f"train.batch_size={size}", f"seed={seed}", f"quant={quant}")
        for r in (2, 4)
        for size, seed, quant in ((2, 0, "none"), (4, 0, "none"), (2, 1, "none"), (2, 0, "4bit"))
    ]
    packs = packing.plan(grid, 8)
    assert sizes(packs) == [2] * 4
    for one in packs:
        assert len({(t.config.train.batch_size, t.config.seed, str(t.config.quant)) for t in one}) == 1
    assert [packs[0][0], *(p[0] for p in packs)][0] is grid[0]


def test_packs_are_even_and_of_trials_of_like_length(compose: Compose) -> None:
    points = [compose(*SMALL, f"train.steps={steps}", f"method.r={r}") for r in (1, 2, 3) for steps in (9, 2, 5)]
    packs = packing.plan(points, 4)
    assert sizes(packs) == [3, 3, 3]
    assert [[t.config.train.steps for t in one] for one in packs] == [[2] * 3, [5] * 3, [9] * 3]
    assert sizes(packing.plan(points, 1)) == [1] * 9


def test_a_pack_is_no_larger_than_what_fits(compose: Compose) -> None:
    points = [compose(*SMALL, f"method.r={r}") for r in (2, 4, 5, 6)]

    def fits(group: Sequence[Trial]) -> bool:
        return sum(int(one.config.method["r"]) for one in group) <= 12

    assert sizes(packing.plan(points, 8, fits)) == [2, 2]  # 6 + 5, whichever come together
    assert sizes(packing.plan(points[:3], 8, fits)) == [3]
    assert sizes(packing.plan(points, 8, lambda group: len(group) <= 3)) == [2, 2]
    assert sizes(packing.plan(points, 8, lambda group: False)) == [1] * 4


@pytest.mark.slow
def test_packs_are_planned_within_the_memory(compose: Compose) -> None:
    words = [*SMALL, "dataset.samples=16", "method=lora"]
    points = [compose(*words, f"method.r={r}", "memory_limit=80GB") for r in (4, 8, 16, 32)]
    bytes_of = [found.peak_bytes for n in (2, 3, 4) if (found := forecast.together(points[::-1][:n]))]
    assert bytes_of == sorted(bytes_of)
    assert len(bytes_of) == 3
    for size, packs in ((bytes_of[2], [4]), (bytes_of[1], [2, 2]), (bytes_of[0] - 1, [1] * 4)):
        limited = [compose(*words, f"method.r={r}", f"memory_limit={size / 1000}kB") for r in (4, 8, 16, 32)]
        assert sizes(packing.plan(limited, 8, packing.fits_memory)) == packs


@pytest.mark.parametrize(
    "word",
    [
        # One each of another kind, of another option, and of another optimizer; these are found by the same checks.
        *(pytest.param(f"method={name}", marks=pytest.mark.slow) for name in ("dora", "ia3", "pissa")),
        "method=full",
        "method=lora_plus",
        "method.bias=all",
        "train.compile=eager",
        "train.optimizer=bitsandbytes.optim.AdamW8bit",
        "inference=standard",
        "profiler=memory",
        "train.steps=0",
    ],
)
def test_what_cannot_be_packed_stays_alone(compose: Compose, word: str) -> None:
    points = [compose(*SMALL, f"train.learning_rate={rate}", word) for rate in (0.1, 0.2)]
    assert packing.alone(points[0])
    assert sizes(packing.plan(points, 8)) == [1, 1]


def test_a_base_with_dropout_of_its_own_stays_alone(compose: Compose) -> None:
    assert "dropout" in (packing.alone(compose("model=opt_350m", "model.init=random", "dataset=tiny_math")) or "")
    assert packing.alone(compose("model=llama3.2_1b", "model.init=random", "dataset=tiny_math")) is None


def test_dropout_of_the_part_that_reads_text_and_noise_of_routers_stay_alone(compose: Compose, tmp_path: Path) -> None:
    dropping = write(
        "gemma3", tmp_path / "gemma3", text_config=ARCHITECTURES["gemma3"]["text_config"] | {"attention_dropout": 0.1}
    )
    noisy = write("mixtral", tmp_path / "mixtral", router_jitter_noise=0.1)
    for folder in (dropping, noisy):
        words = ["model=causal_lm", f"model.name_or_path={folder}", "model.dtype=float32", "dataset=tiny_math"]
        assert "dropout" in (packing.alone(compose(*words)) or "")


@pytest.mark.slow
def test_adapters_of_embeddings_are_trained_alone(compose: Compose) -> None:
    words = ["targets.modules=[embed_tokens,q_proj]", "train.log_every=1", "adapter.check=false"]
    together = pack.run([compose(*SMALL, "study=packed", *words, f"method.r={rank}") for rank in (2, 4)])
    single = task.run(compose(*SMALL, "study=alone", *words, "method.r=4"))
    assert "packed_with" not in together[1].run_info
    check_same(together[1], single)
