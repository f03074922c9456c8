"""A training that was cut off goes on as if it had not been."""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftsweep import InputError
from peftsweep.config import build
from peftsweep.config.compose import Trial
from peftsweep.data import batches as data_batches
from peftsweep.data import templates, tokens
from peftsweep.evaluation import likelihood
from peftsweep.models import model
from peftsweep.observe.measure import Meter
from peftsweep.schema import TrainConfig
from peftsweep.study import atomic, record, sweep_record
from peftsweep.study.record import Result, Status
from peftsweep.tiny import task
from peftsweep.training import checkpoint, length, loop
from peftsweep.training.run import Trained
from peftsweep.trial import done, outcome
from peftsweep.trial import session as trial_session
from peftsweep.trial import task as trial_task
from tests.conftest import UNWRITTEN, scores
from tests.models.test_methods import ADAPTERS, ON, tiny

Compose = Callable[..., Trial]
Run = Callable[..., Result]

CPU = torch.device("cpu")
COST = ("seconds", "tokens_per_second", "epoch_seconds", "epoch_tokens_per_second", "epoch_memory_peak")
BASE = ("train.steps=8", "train.batch_size=4", "train.log_every=1", "train.learning_rate=4e-3")
WAYS = {
    "dropout": ["method.lora_dropout=0.1"],
    "an adapter on 4 bits": ["quant=4bit"],
    "DoRA": ["method=dora"],
    "full fine-tuning": ["method=full", "train.learning_rate=1e-4"],
    "AdaLoRA": ["method=adalora", "method.tinit=1", "method.tfinal=2", "method.target_r=4"],
    "AdaLoRA, its ranks dealt out": ["method=adalora", "method.tinit=1", "method.tfinal=5", "method.target_r=4"],
    "AdaMSS that drops subspaces": [
        *("method=adamss", "method.use_asa=true", "+method.init_warmup=0", "+method.final_warmup=6"),
        *("+method.mask_interval=3", "+method.asa_target_subspaces=3"),
    ],
    "PVeRA with a generator of its own": ["method=pvera", "+method.generator_seed=3"],
    "MonteCLoRA": [
        *("targets=qv", "+method.monteclora_config._target_=peft.tuners.lora.config.MontecloraConfig"),
        *("+method.monteclora_config.num_samples=2", "+method.monteclora_config.buffer_size=3"),
    ],
    "an optimizer of 8 bits": [
        "train.optimizer=bitsandbytes.optim.AdamW8bit",
        "+train.optimizer_kwargs.min_8bit_size=16",
    ],
    "LoRA-FA, whose optimizer keeps its state by name": ["method=lora_fa"],
    "LoRA+": ["method=lora_plus"],
    "an optimizer of wider state": [
        *("method=full", "model.dtype=bfloat16", "train.learning_rate=1e-4"),
        *("train.optimizer=transformers.optimization.Adafactor", "+train.optimizer_kwargs.relative_step=false"),
        *("+train.optimizer_kwargs.scale_parameter=false", "+train.optimizer_kwargs.beta1=0.9"),
    ],
    "the best weights": ["train.eval_every=2", "train.keep_best=true"],
    "accumulation": ["train.accumulation=3"],
    "windows of losses": ["train.log_every=5"],
    "scaled losses": ["train.autocast=float16", "train.batch_size=1"],  # so large that the scale is lowered
    "gradient checkpointing": ["train.checkpointing=true", "method.lora_dropout=0.1"],
}
# One that keeps a method's own counts. The trial below that goes on has dropout, slots of packs the best weights
# (test_packed.py). A base in 4 bits is loaded again and nothing of it is kept.
QUICK = ("AdaLoRA, its ranks dealt out",)


class Cut(Exception):
    """What ends a training in these tests."""


@pytest.fixture(scope="module")
def rows() -> list[tokens.Tokens]:
    examples = templates.examples(task.rows("train", 20), "{question} ", "{answer}")  # 5 batches of 4 an epoch
    return tokens.tokenize(model.load_tokenizer(tiny()), examples, 128)


class Training:
    """A small training in ``folder``, which may be cut off and gone on with."""

    trained: Trained

    def __init__(self, one: Trial, rows: list[tokens.Tokens], folder: Path, device: torch.device = CPU) -> None:
        folder.mkdir(exist_ok=True)
        self.device = device
        self.one, self.rows, self.folder, self.file = one, rows, folder, folder / "steps.jsonl"
        self.weights: dict[str, torch.Tensor] = {}

    def checkpoints(self) -> checkpoint.Checkpoints:
        return checkpoint.Checkpoints(self.folder / "checkpoints", checkpoint.stamp("it", self.device), self.file)

    def run(self, every: int | None = None, cut_after: int | None = None) -> int:
        """Train from the last checkpoint on, and end with the weights or in the step after ``cut_after``."""
        one, checkpoints = self.one, self.checkpoints()
        config = one.config.train
        config.checkpoint_every = str(every) if every else None
        resumed = checkpoints.find()
        adapted = _adapted(one, self.rows, self.device)

        def cut() -> None:
            self.done += 1
            if self.done == cut_after:
                raise Cut

        def validate() -> dict[str, float]:
            adapted.eval()
            before = sum("validation_loss" in row for row in self.logged())
            best_at_step_4 = abs(before - 1)
            return {"loss": best_at_step_4 + likelihood.mean_loss(adapted, self.rows[:8], pad_id=0) / 100}

        self.done = resumed
        with self.file.open("a" if resumed else "w") as lines:

            def log(row: dict[str, Any]) -> None:
                lines.write(record.line(row))
                lines.flush()

            self.trained = loop.train(
                adapted,
                self.rows,
                config,
                pad_id=0,
                seed=0,
                meter=Meter(self.device),
                log=log,
                validate=validate if config.eval_every else None,
                after_step=cut if cut_after else None,
                checkpoints=checkpoints,
            )
        self.weights = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
        return resumed

    def logged(self) -> list[dict[str, Any]]:
        return without_cost(self.file)


def _adapted(one: Trial, rows: list[tokens.Tokens], device: torch.device) -> Any:
    base = model.load(one.config.model, build.quantization(one), device)
    tokenizer = model.load_tokenizer(one.config.model)
    torch.manual_seed(0)
    steps = length.total_steps(one.config.train, len(rows))
    return build.attach_method(one, base, steps, build.initialisation(one, Path(), base, rows, tokenizer))


def without_cost(file: Path) -> list[dict[str, Any]]:
    """The rows of steps.jsonl but for what another run must not repeat."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in COST} for row in lines]


def cut_off_and_gone_on_with(
    one: Trial, rows: list[tokens.Tokens], scratch: Path, device: torch.device = CPU
) -> tuple[Training, Training]:
    """The training of ``one`` at a stretch, and cut off in step 7, after a checkpoint at step 4."""
    whole, parted = (Training(one, rows, scratch / name, device) for name in ("whole", "parted"))
    whole.run()
    with pytest.raises(Cut):
        parted.run(every=4, cut_after=7)
    torch.randn(7)  # another process draws other numbers before
    assert parted.run(every=4) == 4
    return whole, parted


def assert_same(one: Training, other: Training) -> None:
    assert one.logged() == other.logged()
    assert one.weights.keys() == other.weights.keys()
    assert not [name for name in one.weights if not torch.equal(one.weights[name], other.weights[name])]
    assert len(one.trained.step_seconds) == len(other.trained.step_seconds)
    for fact in ("steps", "tokens", "padding_fraction", "final_loss", "best_loss", "best_step"):
        assert getattr(one.trained, fact) == getattr(other.trained, fact)


@pytest.mark.kernels
@pytest.mark.parametrize("way", [*QUICK, *(pytest.param(w, marks=pytest.mark.slow) for w in WAYS if w not in QUICK)])
def test_what_was_cut_off_goes_on_to_the_bit(
    way: str, compose: Compose, rows: list[tokens.Tokens], scratch: Path
) -> None:
    assert_same(*cut_off_and_gone_on_with(compose(*BASE, *WAYS[way]), rows, scratch))


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_method_goes_on_to_the_bit(name: str, compose: Compose, rows: list[tokens.Tokens], scratch: Path) -> None:
    one = compose(*BASE, f"method={name}", ON.get(name, "quant=none"))
    assert_same(*cut_off_and_gone_on_with(one, rows, scratch))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["dropout", "AdaLoRA", "an optimizer of 8 bits", "scaled losses", "the best weights"])
def test_a_gpu_goes_on_too(way: str, compose: Compose, rows: list[tokens.Tokens], scratch: Path) -> None:
    """With dropout captured steps draw other numbers, and which steps are depends on where it was cut off."""
    words = [*WAYS[way], f"train.capture={'off' if way == 'dropout' else 'auto'}"]
    whole, parted = cut_off_and_gone_on_with(compose(*BASE, *words), rows, scratch, torch.device("cuda"))
    losses = [[row["loss"] for row in one.logged() if "loss" in row] for one in (whole, parted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # not to the bit: sums of atomic additions


@pytest.mark.slow
def test_the_state_that_is_kept_is_what_makes_it_so(
    compose: Compose, rows: list[tokens.Tokens], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part that is left out is missed, so that the tests above would notice."""
    one = compose(*BASE, "method.lora_dropout=0.1")
    whole = Training(one, rows, scratch / "whole")
    whole.run()
    for part in (checkpoint.Weights, checkpoint.OptimizerState, checkpoint.Randomness):
        parted = Training(one, rows, scratch / part.__name__)
        with pytest.raises(Cut):
            parted.run(every=4, cut_after=7)
        with monkeypatch.context() as patch:
            patch.setattr(part, "load_state_dict", lambda self, state: None)
            parted.run()
        assert whole.logged() != parted.logged(), part


# ---- the files -------------------------------------------------------------------------------------


@pytest.fixture
def kept(scratch: Path) -> checkpoint.Checkpoints:
    (scratch / "steps.jsonl").write_text("12345\n")
    return checkpoint.Checkpoints(scratch / "checkpoints", checkpoint.stamp("it", CPU), scratch / "steps.jsonl")


def parts(value: float = 0.0) -> dict[str, checkpoint.Part]:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return {"weights": checkpoint.Weights(layer), "random": checkpoint.Randomness(CPU)}


def weight(of: dict[str, checkpoint.Part]) -> float:
    return float(of["weights"].state_dict()["parameters"]["weight"])


def test_only_the_newest_is_kept_and_rows_after_it_are_cut_off(kept: checkpoint.Checkpoints, scratch: Path) -> None:
    for step in (9, 10):
        kept.save(step, parts(step))
    (scratch / "steps.jsonl").write_text("12345\n678")
    assert [file.name for file in (scratch / "checkpoints").iterdir()] == ["step-10.pt"]
    assert kept.find() == 10
    assert (scratch / "steps.jsonl").read_text() == "12345\n"
    fresh = parts()
    kept.restore(fresh)
    assert weight(fresh) == 10
    kept.clear()
    assert not (scratch / "checkpoints").exists()
    assert kept.find() == 0


def test_a_kill_while_writing_leaves_the_one_before(
    kept: checkpoint.Checkpoints, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(content: Any, stream: Any) -> None:
        stream.write(b"half of it")
        raise KeyboardInterrupt

    kept.save(4, parts(4))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.save(8, parts(8))
    assert kept.find() == 4
    kept.save(12, parts(12))
    assert [file.name for file in (scratch / "checkpoints").iterdir()] == ["step-12.pt"]


@pytest.mark.parametrize(
    ("code", "times", "ends"), [(errno.EIO, 2, True), (errno.EIO, 3, False), (errno.ENOSPC, 1, False)]
)
def test_the_error_of_the_disk_is_told_and_one_of_a_moment_is_got_over(
    code: int, times: int, ends: bool, kept: checkpoint.Checkpoints, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch ends the file that it could not write, and would say only that this failed."""
    monkeypatch.setattr(atomic, "PAUSES", (0.0, 0.0))
    left = iter(range(times))

    class Faulty(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(code, os.strerror(code))

    def opened(file: Path, mode: str, **options: Any) -> Any:
        return Faulty(file, mode) if mode == "wb" and next(left, None) is not None else open(file, mode, **options)

    kept.save(4, parts(4))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with nullcontext() if ends else pytest.raises(OSError, match=os.strerror(code)):
            kept.save(8, parts(8))
    assert kept.find() == (8 if ends else 4)
    assert len(list((scratch / "checkpoints").iterdir())) == 1


def test_one_that_is_broken_is_ignored_with_a_warning(
    kept: checkpoint.Checkpoints, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept.save(4, parts(4))
    whole = (scratch / "checkpoints" / "step-4.pt").read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        (scratch / "checkpoints" / "step-8.pt").write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert kept.find() == 4
        assert "the checkpoint step-8.pt is ignored: " in caplog.text
    (scratch / "steps.jsonl").write_text("")
    with caplog.at_level(logging.WARNING):
        assert kept.find() == 0
    assert "steps.jsonl is shorter than it was then" in caplog.text


def test_a_checkpoint_runs_no_code_of_its_own(kept: checkpoint.Checkpoints, scratch: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (scratch / "harmed").write_text, ("",)

    kept.save(4, parts())
    torch.save({"stamp": Harmful()}, scratch / "checkpoints" / "step-8.pt")
    assert kept.find() == 4
    assert not (scratch / "harmed").exists()


@pytest.mark.parametrize("other", [{"training": "another"}, {"device": "a GPU"}, {"packages": {"torch": "1.0"}}])
def test_one_of_another_training_is_ignored(
    kept: checkpoint.Checkpoints, scratch: Path, other: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    kept.save(4, parts())
    stamp = checkpoint.stamp("it", CPU) | other
    assert checkpoint.Checkpoints(scratch / "checkpoints", stamp, scratch / "steps.jsonl").find() == 0
    assert "it is of another training" in caplog.text


def test_only_buffers_that_training_changes_are_kept() -> None:
    class Counting(nn.Module):
        constant: torch.Tensor
        added_to: torch.Tensor
        replaced: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            for name in ("constant", "added_to", "replaced"):
                self.register_buffer(name, torch.zeros(2))
            self.norm = nn.BatchNorm1d(2, affine=False)

        def forward(self, x: torch.Tensor) -> None:
            self.added_to += 1
            self.replaced = self.replaced + 1
            self.norm(x)

    trained, fresh = Counting(), Counting()
    weights = checkpoint.Weights(trained)
    trained(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    state = weights.state_dict()
    assert "constant" not in state["buffers"]
    checkpoint.Weights(fresh).load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(trained.buffers(), fresh.buffers(), strict=True))
    assert fresh.norm.get_buffer("running_mean").min() > 0


# ---- the trial -------------------------------------------------------------------------------------


def place(result: Result) -> Path:
    assert result.folder
    return result.folder


@pytest.fixture
def cut_trial(run_unwritten: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a trial whose third step's row cannot be written any more."""

    def run(*words: str) -> Result:
        with monkeypatch.context() as patch:
            patch.setattr("peftsweep.trial.session.log_step", cutting())
            return run_unwritten(*words)

    return run


def cutting() -> Callable[[Any, Any, dict[str, Any]], None]:
    """``outcome.log_step`` that fails at the third step's row."""

    def broken(lines: Any, observer: Any, row: dict[str, Any]) -> None:
        outcome.log_step(lines, observer, row)
        if row["step"] == 3:
            raise Cut

    return broken


def test_a_trial_goes_on_from_its_last_checkpoint(cut_trial: Run, run_unwritten: Run) -> None:
    words = ["train.log_every=1", "method.lora_dropout=0.1"]
    first = cut_trial(*words, "train.checkpoint_every=2")
    assert (first.status, first.run_info["resumed"]) == (Status.failed, 0)
    assert [file.name for file in (place(first) / "checkpoints").iterdir()] == ["step-2.pt"]
    second = run_unwritten(*words)  # without new ones, and yet the same trial
    assert (second.status, second.run_info["resumed"], place(second)) == (Status.success, 2, place(first))
    assert not (place(second) / "checkpoints").exists()
    whole = run_unwritten(*words, "study=other")
    assert whole.run_info["resumed"] == 0
    assert without_cost(place(second) / "steps.jsonl") == without_cost(place(whole) / "steps.jsonl")
    for fact in ("final_loss", "tokens", "steps"):
        assert second.train_info[fact] == whole.train_info[fact]
    adapters = [(place(one) / "adapter" / "adapter_model.safetensors").read_bytes() for one in (second, whole)]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)])
def test_a_trial_that_is_interrupted_goes_on_from_the_end_of_its_step(
    number: signal.Signals, run_unwritten: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupt(order: Iterator[list[int]], batches: int) -> Iterator[list[int]]:
        yield from itertools.islice(order, batches)
        os.kill(os.getpid(), number)  # the next step has only begun
        yield from order

    before = signal.signal(number, leave)
    try:
        real = data_batches.micro_batches
        with monkeypatch.context() as patch:
            patch.setattr(loop, "micro_batches", lambda order, size: real(interrupt(iter(order), 2), size))
            with pytest.raises(KeyboardInterrupt):
                run_unwritten("train.log_every=1")
        assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)
    (cancelled,) = (Result.read(file.parent) for file in Path("multirun/default").glob("*/result.json"))
    assert (cancelled.status, (cancelled.error or {})["stage"]) == (Status.cancelled, "train")
    assert cancelled.train_info["steps"] == 3
    second = run_unwritten("train.log_every=1")
    assert (second.status, second.run_info["resumed"]) == (Status.success, 3)
    whole = run_unwritten("train.log_every=1", "study=other")
    assert without_cost(place(second) / "steps.jsonl") == without_cost(place(whole) / "steps.jsonl")


def interrupted(*doings: Callable[[], Any], wanted: bool = True) -> int:
    """How many of ``doings`` were done under an Interruption before Ctrl-C came through."""
    done = 0
    try:
        with checkpoint.Interruption(wanted=wanted):
            for do in doings:
                do()
                done += 1
    except KeyboardInterrupt:
        return done
    pytest.fail("it never came through")


def test_a_signal_is_held_once_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def ctrl_c() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoint.Interruption, "SECONDS", {signal.SIGINT: 0.5})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which pytest's own processes ignore
    try:
        assert interrupted(ctrl_c, time.monotonic) == 2  # held until the end of the block
        assert interrupted(ctrl_c, ctrl_c, time.monotonic) == 1  # a second one is not
        assert interrupted(ctrl_c, lambda: time.sleep(60)) == 1  # nor one that has waited too long
        assert interrupted(ctrl_c, time.monotonic, wanted=False) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_seconds_of_a_trial_are_those_of_all_its_sittings(cut_trial: Run, run_unwritten: Run) -> None:
    words = ["train.log_every=1", "train.checkpoint_every=2"]
    first = cut_trial(*words)
    assert isinstance(first.train_info["load_seconds"], float)
    first.run_info["total_seconds"], first.train_info["load_seconds"] = 1000.0, 500.0
    first.write(place(first))
    second = run_unwritten(*words)
    assert second.run_info["resumed"] == 2
    assert 1000 < second.run_info["total_seconds"] < 1100
    assert 500 < second.train_info["load_seconds"] < 600
    again = run_unwritten(*words, "force=true")  # which does not go on from there
    assert again.run_info["total_seconds"] < 100


@pytest.mark.slow  # as in the test above, and read from the other file
def test_the_seconds_of_a_sitting_that_was_killed_are_those_until_its_checkpoint(
    cut_trial: Run, run_unwritten: Run
) -> None:
    words = ["train.log_every=1", "train.checkpoint_every=2"]
    first = cut_trial(*words)
    (place(first) / "result.json").unlink()  # which one that is killed has not written
    file = place(first) / "checkpoints" / "step-2.pt"
    kept = torch.load(file, weights_only=True)
    assert 0 < kept["seconds"]["total"] < first.run_info["total_seconds"]
    kept["seconds"]["total"] = 2000.0
    torch.save(kept, file)
    assert 2000 < run_unwritten(*words).run_info["total_seconds"] < 2100


class Evaluating:
    """Ends the process's evaluations, in this process, by an error in the one that is called ``victim``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[str] = []
        self.victim: str | None = None
        self.error: type[BaseException] = KeyboardInterrupt
        real = trial_session.Session._evaluate

        def evaluate(session: trial_session.Session, name: str, test: Any) -> Any:
            self.called.append(name)
            if name == self.victim:
                with session.stage("eval"):
                    raise self.error
            return real(session, name, test)

        monkeypatch.setattr(trial_session.Session, "_evaluate", evaluate)


@pytest.fixture
def evaluating(monkeypatch: pytest.MonkeyPatch) -> Evaluating:
    return Evaluating(monkeypatch)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("it was done before")


# The fast tier has the error; other tests of this file and of tests/sweep interrupt trials.
@pytest.mark.parametrize("error", [pytest.param(KeyboardInterrupt, marks=pytest.mark.slow), ValueError])
def test_what_ends_an_evaluation_costs_that_evaluation_alone(
    error: type[BaseException], evaluating: Evaluating, run_small: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train.log_every=1", "train.checkpoint_every=null", "method=adalora"]
    words += ["method.tinit=1", "method.tfinal=1", "train.eval_every=2", "train.keep_best=true", "targets=q"]
    words += ["eval.tiny_math.max_new_tokens=4"]
    evaluating.victim, evaluating.error = "perplexity", error
    try:
        run_small(*words)
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    (first,) = (Result.read(file.parent) for file in Path("multirun/default").glob("*/result.json"))
    assert (first.status.good, first.error and first.error["stage"]) == (False, "eval")
    assert (place(first) / "adapter" / "adapter_model.safetensors").exists()
    assert evaluating.called == ["tiny_math", "perplexity"]
    rows = without_cost(place(first) / "steps.jsonl")

    evaluating.victim = None
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", never)
        second = run_small(*words)
    assert (second.status, second.run_info["resumed"]) == (Status.success, 4), second.error
    assert evaluating.called == ["tiny_math", "perplexity", "perplexity"]
    assert without_cost(place(second) / "steps.jsonl") == rows
    assert not (place(second) / "checkpoints").exists()
    whole = run_small(*words, "study=other")
    for section in ("train_info", "eval_info", "memory"):  # nothing is missing in what is put together
        assert record.flat(getattr(second, section)).keys() == record.flat(getattr(whole, section)).keys()
    assert scores(second) == scores(whole)
    for fact in ("final_loss", "best_loss", "tokens", "padding_fraction", "trainable_parameters"):
        assert second.train_info[fact] == whole.train_info[fact]
    assert second.train_info["train_seconds"] > 0


@pytest.mark.slow  # the seconds of all sittings, above, are put together in the same place
def test_the_peak_of_a_stage_is_that_of_all_sittings(
    evaluating: Evaluating, run_unwritten: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluating.victim = "perplexity"
    with pytest.raises(KeyboardInterrupt):
        run_unwritten()
    file = next(Path("multirun/default").glob("*/checkpoints/trained.pt"))
    kept = torch.load(file, weights_only=True)
    assert kept["memory"]["train"]["rss_peak"] > 0
    kept["memory"]["train"]["rss_peak"] = kept["memory"]["load"]["rss_peak"] = 2**50
    torch.save(kept, file)
    evaluating.victim = None
    memory = run_unwritten().memory
    assert memory["train"]["rss_peak"] == memory["load"]["rss_peak"] == 2**50


@pytest.mark.slow  # five trials; in the fast tier the test above goes on after a kept evaluation
def test_kept_evaluations_are_of_the_same_weights_and_rows(evaluating: Evaluating, run_small: Run) -> None:
    evaluating.victim = "perplexity"
    small = ["targets=q", "eval.tiny_math.max_new_tokens=4"]
    for words in (["train.learning_rate=1e-3"], ["eval.tiny_math.samples=7"]):
        with pytest.raises(KeyboardInterrupt):
            run_small(*small, *words)
    assert evaluating.called == ["tiny_math", "perplexity"] * 2
    (kept, _) = Path("multirun/default").glob("*/checkpoints/evaluated-tiny_math.json")
    (kept.parent / "trained.pt").unlink()  # so that the weights are trained anew
    evaluating.called.clear()
    words = [*small, f"train.learning_rate={Result.read(kept.parents[1]).config['train']['learning_rate']}"]
    words += [f"eval.tiny_math.samples={Result.read(kept.parents[1]).config['eval']['tiny_math']['samples']}"]
    with pytest.raises(KeyboardInterrupt):
        run_small(*words)
    assert evaluating.called == ["tiny_math", "perplexity"]
    evaluating.called.clear()
    with pytest.raises(KeyboardInterrupt):
        run_small(*words, "force=true")
    assert evaluating.called == ["tiny_math", "perplexity"]
    kept.write_text("{")  # by a power loss
    evaluating.called.clear()
    with pytest.raises(KeyboardInterrupt):
        run_small(*words)
    assert evaluating.called == ["tiny_math", "perplexity"]


@pytest.mark.slow
def test_force_starts_anew(cut_trial: Run, run_unwritten: Run) -> None:
    words = ["train.log_every=1", "train.checkpoint_every=2"]
    cut_trial(*words)
    assert run_unwritten(*words, "force=true").run_info["resumed"] == 0


def test_a_further_attempt_of_a_command_with_force_goes_on_from_the_checkpoint_of_the_one_before(
    compose: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is requeued at its time limit, and a worker that died, are attempts of one command."""
    sweep_record.command_begins()
    one = compose(*UNWRITTEN, "train.log_every=1", "train.checkpoint_every=2", "force=true")
    first = trial_task.run(one)
    assert trial_task.run(one).run_info["created_at"] == first.run_info["created_at"]  # done by this command
    sweep_record.command_begins()
    with monkeypatch.context() as patch:
        patch.setattr("peftsweep.trial.session.log_step", cutting())
        assert trial_task.run(one).status is Status.failed
    assert trial_task.run(one).run_info["resumed"] == 2
    assert done.finished(one)
    sweep_record.command_begins()
    assert not done.finished(one)


@pytest.mark.slow
def test_a_trial_whose_checkpoint_is_broken_starts_anew(cut_trial: Run, run_unwritten: Run) -> None:
    words = ["train.log_every=1", "train.checkpoint_every=2"]
    (place(cut_trial(*words)) / "checkpoints" / "step-2.pt").write_bytes(b"broken")
    result = run_unwritten(*words)
    assert (result.status, result.run_info["resumed"]) == (Status.success, 0)
    assert "the checkpoint step-2.pt is ignored" in (place(result) / "trial.log").read_text()
    assert [row["step"] for row in without_cost(place(result) / "steps.jsonl") if "loss" in row] == [1, 2, 3, 4]


def test_checkpoints_do_not_make_another_trial_of_it(compose: Compose) -> None:
    without, often = compose(), compose("train.checkpoint_every=0.5epochs")
    assert (without.identity, without.training) == (often.identity, often.training)


def test_a_checkpoint_is_due_by_steps_epochs_or_minutes() -> None:
    def due_at(interval: str | None, seconds_a_step: float = 1.0) -> list[int]:
        now = 0.0
        due = length.checkpoint_due(TrainConfig(checkpoint_every=interval, batch_size=4), 48, lambda: now)
        found = []
        for step in range(1, 26):
            now = step * seconds_a_step
            found += [step] if due(step) else []
        return found

    assert due_at(None) == []
    assert due_at("10") == [10, 20]
    assert due_at("1epoch") == [12, 24]
    assert due_at("0.1min") == [6, 12, 18, 24]
    assert due_at("0.1min", seconds_a_step=0.1) == []
    with pytest.raises(InputError, match=r"or epochs \(0.5epochs\) or minutes \(10min\)"):
        due_at("10hours")
