"""A step in few static shapes comes to what the step of any shape comes to; graphs are kept only where they do."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig

from peftsweep.config.compose import Trial
from peftsweep.data import batches
from peftsweep.data.tokens import Tokens
from peftsweep.models import attach, parts
from peftsweep.models import losses as models_losses
from peftsweep.models.shortcuts import SHORTCUTS, Shortcuts
from peftsweep.observe.measure import Meter
from peftsweep.schema import Capture, Dtype, TargetsConfig, TrainConfig
from peftsweep.sweep import packing
from peftsweep.training import capture, checkpoint, graphs, loop, packed
from peftsweep.training.capture import StaticSteps, ladder, sizes
from tests.architectures import make
from tests.conftest import SAME_WEIGHTS, apart

CPU = torch.device("cpu")
KINDS = {  # log-normal ones are as long as the rows of GSM8K, of which those of tests/data are too few
    "log-normal": [min(768, max(8, round(305 * random.Random(n).lognormvariate(-0.1, 0.45)))) for n in range(2000)],
    "uniform": [random.Random(n).randint(10, 500) for n in range(2000)],
    "alike": [64] * 100,
    "two": [10, 500] * 50,
}


@pytest.fixture(autouse=True)
def on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DEVICES", ("cuda", "cpu"))


@pytest.fixture(scope="module")
def rows() -> list[Tokens]:
    """50 rows of unlike length, of which none begins its answer at the same place."""
    chance = random.Random(0)
    lengths = [chance.randint(8, 40) for _ in range(50)]
    return [Tokens([chance.randrange(3, 500) for _ in range(n)], chance.randint(1, n - 2)) for n in lengths]


def adapted(method: Any = None, device: torch.device = CPU) -> Any:
    torch.manual_seed(0)
    base: Any = make("llama")
    setattr(base, SHORTCUTS, Shortcuts(answers_only=True, bare_head=True, no_mask=True))
    method = method or LoraConfig(r=4, target_modules="all-linear")
    return attach.attach(base.to(device), method, TargetsConfig(), {})


Found = tuple[Any, list[float], dict[str, torch.Tensor]]  # what was done, the losses, the weights


def run(rows: list[Tokens], trained: Any = None, device: torch.device = CPU, **options: Any) -> Found:
    trained, lines = trained or adapted(), list[dict[str, Any]]()
    given = {"steps": 9, "batch_size": 8, "log_every": 1, "warmup": 1, "learning_rate": 4e-3}
    config = TrainConfig(**given | options)
    done = loop.train(trained, rows, config, pad_id=0, seed=0, meter=Meter(device), log=lines.append)
    weights = {name: p.detach().clone() for name, p in parts.trainable_parameters(trained)}
    return done, losses(lines), weights


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in lines if "loss" in row]


# ---- the ladder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ladder_is_short_and_adds_at_most_6_percent_of_the_tokens(kind: str, batch_size: int) -> None:
    lengths = KINDS[kind]
    order = list(itertools.islice(batches.batch_order(lengths, batch_size, 0), len(lengths) // batch_size))
    found = sizes(order, [Tokens([1] * n, n // 2) for n in lengths], TrainConfig(batch_size=batch_size))
    rungs = ladder(found, batch_size)
    whole = [[lengths[n] for n in batch] for batch in order if len(batch) == batch_size]
    padded = [min(rung for rung in rungs if rung >= max(batch)) for batch in whole]
    extra = batch_size * sum(to - max(batch) for to, batch in zip(padded, whole, strict=True))
    assert extra <= 0.06 * sum(map(sum, whole))
    assert len(rungs) <= {"alike": 1, "two": 2}.get(kind, 18)
    assert set(rungs) == set(padded)
    assert rungs == sorted(rungs)


def test_batches_of_fewer_rows_have_no_size() -> None:
    some = [Tokens([1] * n, 2) for n in (5, 9, 7)]
    assert sizes([[0, 1, 2]], some, TrainConfig(batch_size=2)) == [(9, 14, 10)]


# ---- the step --------------------------------------------------------------------------------------


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated, clipped": {"accumulation": 3, "batch_size": 3, "clip": 0.05},
    "checkpointed": {"checkpointing": True},
    "SGD with weight decay": {"optimizer": "SGD", "weight_decay": 0.1, "learning_rate": 0.1},
}


def both(rows: list[Tokens], short: Shortcuts | None = None, **options: Any) -> list[Found]:
    """The same training without and with static shapes."""
    found = []
    for way in Capture:
        trained = adapted()
        if short is not None:
            setattr(parts.base_of(trained), SHORTCUTS, short)
        found.append(run(rows, trained, capture=way, **options))
    return found


FAST = ("accumulated, clipped",)


@pytest.mark.parametrize("way", [way if way in FAST else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_static_shapes_change_no_loss_and_no_weight(way: str, rows: list[Tokens]) -> None:
    """Over an epoch's end, whose batch has fewer rows and is taken as usual."""
    plain, static = both(rows, **WAYS[way])
    assert static[1] == pytest.approx(plain[1], rel=1e-5)
    assert apart(static[2], plain[2]) <= SAME_WEIGHTS
    lengths = static[0].compilation["capture_lengths"]
    assert 1 < len(lengths) < len({len(row.ids) for row in rows})
    assert static[0].tokens == plain[0].tokens
    added = static[0].padding_fraction - plain[0].padding_fraction
    assert 0 < added < capture.MAX_EXTRA_PADDING
    assert not plain[0].compilation


@pytest.mark.parametrize("short", [Shortcuts(), Shortcuts(answers_only=True), Shortcuts(no_mask=True)])
def test_whatever_a_pass_may_leave_out(short: Shortcuts, rows: list[Tokens]) -> None:
    plain, static = both(rows, short, steps=4)
    assert static[1] == pytest.approx(plain[1], rel=1e-5)
    assert "capture_lengths" in static[0].compilation


def test_static_shapes_are_really_taken(rows: list[Tokens], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, int]] = []
    exact = models_losses.answer_losses

    def noted(called: Any, batch: batches.Batch) -> torch.Tensor:
        seen.append((batch.input_ids.shape, len(batch.places)))
        return exact(called, batch)

    monkeypatch.setattr(loop, "answer_losses", noted)
    done, _, _ = run(rows, steps=9, capture=Capture.auto)
    lengths = [shape[1] for shape, _ in seen]
    assert len(seen) == 9 - 2  # the first step, and the epoch's last of two rows, are taken as usual
    assert set(lengths) <= set(done.compilation["capture_lengths"])
    assert len(set(seen)) == len(set(lengths))  # one number of places for each length


def test_a_training_goes_on_in_static_shapes_as_if_it_had_not_been_cut_off(rows: list[Tokens], scratch: Path) -> None:
    config = TrainConfig(steps=8, batch_size=8, log_every=1, learning_rate=4e-3, warmup=1, capture=Capture.auto)
    whole, cut = list[dict[str, Any]](), list[dict[str, Any]]()
    loop.train(adapted(), rows, config, pad_id=0, seed=0, meter=Meter(CPU), log=whole.append)
    (scratch / "steps.jsonl").touch()
    for stop in (5, None):
        kept = checkpoint.Checkpoints(scratch / "kept", checkpoint.stamp("it", CPU), scratch / "steps.jsonl")
        kept.find()
        trained, meter = adapted(), Meter(CPU)
        loop.train(trained, rows, config, pad_id=0, seed=0, meter=meter, log=cut.append, checkpoints=kept, stop_at=stop)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)


# ---- what is not static ----------------------------------------------------------------------------


def kasa(trained: Any) -> Any:
    trained.base_model._get_kasa_loss = lambda: sum(p.square().sum() for p in trained.parameters() if p.requires_grad)
    return trained


def unused_weight(trained: Any) -> Any:
    trained.base_model.unused = torch.nn.Parameter(torch.ones(3))
    return trained


def adalora(_: Any) -> Any:
    return adapted(AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=4, target_modules=["q_proj"]))


def plainly(trained: Any) -> Any:
    return trained


@pytest.mark.parametrize(
    ("changed", "options", "reason"),
    [
        (kasa, {}, "its method adds to the loss"),
        (unused_weight, {}, "some of its weights had no gradient in the first step"),
        (adalora, {}, "its method deals out ranks anew in the steps"),
        (plainly, {"autocast": Dtype.float16}, "the loss is scaled, for float16"),
        (plainly, {"batch_size": 64}, "no micro-batch has all its rows"),
    ],
)
def test_what_cannot_be_static_goes_on_as_usual_and_says_why_once(
    changed: Callable[[Any], Any],
    options: dict[str, Any],
    reason: str,
    rows: list[Tokens],
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = []
    caplog.set_level(logging.INFO, "peftsweep")
    for way in Capture:
        found.append(run(rows, changed(adapted()), capture=way, steps=3, **options))
    assert found[1][0].compilation == {"capture_off": reason}
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert Counter(record.getMessage() for record in caplog.records)[f"train.capture is off: {reason}"] == 1


# ---- graphs, as far as they can be tried without CUDA ----------------------------------------------


class Pretended(StaticSteps):
    """Takes a Python function for a graph."""

    broken: Callable[[StaticSteps, Any], None] = staticmethod(lambda steps, static: None)
    replays = 0

    def begin(self, gradients: Any, **options: Any) -> None:
        super().begin(gradients, **options)
        self._pool = object()

    def _eager_pass(self, static: Any) -> torch.Tensor:
        return self._pass(static)

    def _pays_off(self, left: int) -> bool:
        return True

    def _record_graph(self, static: Any) -> tuple[Any, torch.Tensor]:
        loss = torch.zeros(1)

        def replay() -> None:
            Pretended.replays += 1
            loss.copy_(self._pass(static))
            self.broken(self, static)

        if self.broken is out_of_memory:
            nothing: Any = lambda *_, **__: nullcontext()  # noqa: E731
            with (
                patch.multiple(
                    torch.cuda, CUDAGraph=nothing, graph=nothing, current_stream=nothing, set_stream=nothing
                ),
                patch.object(graphs, "_stream", nothing),
            ):
                graphs.record(partial(self.broken, self, static), CPU, None)
        return SimpleNamespace(replay=replay), loss


def out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def of_other_gradients(steps: Any, _: Any) -> None:
    steps._gradients[0] += 1


def pretended(rows: list[Tokens], monkeypatch: pytest.MonkeyPatch, broken: Any = None) -> tuple[Any, Any]:
    plain = run(rows, steps=20)
    monkeypatch.setattr(loop, "StaticSteps", Pretended)
    monkeypatch.setattr(Pretended, "replays", 0)
    if broken is not None:
        monkeypatch.setattr(Pretended, "broken", staticmethod(broken))
    return plain, run(rows, steps=20, capture=Capture.auto)


def test_a_length_is_captured_after_usual_passes_and_then_replayed(
    rows: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, static = pretended(rows, monkeypatch)
    assert static[1] == pytest.approx(plain[1], rel=1e-4)
    assert static[0].compilation["capture_graphs"] >= 2
    assert Pretended.replays >= 6
    assert static[0].compilation["capture_seconds"] > 0


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        pytest.param(out_of_memory, "CUDA out of memory. Tried to allocate 2 GiB", marks=pytest.mark.slow),
        (of_other_gradients, "a replay gave another loss or other gradients"),
    ],
)
def test_a_graph_that_fails_or_gives_other_gradients_is_given_up(
    rows: list[Tokens], monkeypatch: pytest.MonkeyPatch, broken: Any, reason: str
) -> None:
    """After one that failed nothing is captured in the process any more, and a worker is replaced."""
    monkeypatch.setattr(graphs, "_FAILURES", [])
    plain, static = pretended(rows, monkeypatch, broken)
    assert static[1] == pytest.approx(plain[1], rel=1e-4)
    assert static[0].compilation == {"capture_off": reason}
    failed = broken is out_of_memory
    assert (graphs.has_failed(), graphs.device_is_broken()) == (failed, failed)
    after = run(rows, steps=3, capture=Capture.auto)[0].compilation
    assert after.get("capture_off") == ("a capture has failed in this process" if failed else None)


def test_a_pass_in_which_the_host_waits_is_not_captured(rows: list[Tokens], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says so of a usual pass; what it has added to the gradients until then is not counted."""

    @contextmanager
    def waits(_: torch.device) -> Iterator[None]:
        yield
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(graphs, "error_if_host_waits", waits)
    plain, static = pretended(rows, monkeypatch)
    assert static[1] == pytest.approx(plain[1], rel=1e-4)
    assert static[0].compilation == {"capture_off": "the host waits for the device in a pass"}
    assert not graphs.has_failed()


def test_memory_that_runs_out_beside_graphs_ends_capturing_and_not_the_trial(
    rows: list[Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Pretended):
        def _eager_pass(self, static: Any) -> torch.Tensor:
            self._pass(static)
            out_of_memory()
            return torch.empty(0)

    plain = run(rows, steps=6)
    monkeypatch.setattr(loop, "StaticSteps", Full)
    full = run(rows, steps=6, capture=Capture.auto)
    assert full[1] == pytest.approx(plain[1], rel=1e-4)
    assert "memory ran out" in full[0].compilation["capture_off"]


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_graphs_change_no_loss_and_no_weight(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA: a checkpointed pass may be refused by torch, which must then be said and change nothing either."""
    device = torch.device("cuda")
    monkeypatch.setattr(StaticSteps, "_pays_off", lambda *_: True)
    chance = random.Random(0)
    rows = [Tokens([chance.randrange(3, 500) for _ in range(chance.randint(20, 40))], 9) for _ in range(64)]
    options = {"steps": 40, "learning_rate": 1e-3} | WAYS[way]
    plain, static = (run(rows, adapted(device=device), device, capture=captured, **options) for captured in Capture)
    assert static[1] == pytest.approx(plain[1], rel=1e-3)
    facts = static[0].compilation
    assert facts.get("capture_graphs", 0) >= 2 or (way == "checkpointed" and facts["capture_off"])


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [{}, {"accumulation": 2, "batch_size": 4}])
def test_graphs_of_a_pack_change_no_loss(shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA; one slot ends before the others, so that the rest is captured anew."""
    device = torch.device("cuda")
    monkeypatch.setattr(StaticSteps, "_pays_off", lambda *_: True)
    chance = random.Random(0)
    rows = [Tokens([chance.randrange(3, 500) for _ in range(chance.randint(20, 40))], 9) for _ in range(64)]
    lengths = {"slot0": 40, "slot1": 40, "slot2": 25}
    found: list[dict[str, Any]] = []
    for way in Capture:
        methods = {
            name: (LoraConfig(r=2 + n, target_modules=["q_proj", "v_proj"] if n else "all-linear"), TargetsConfig())
            for n, name in enumerate(lengths)
        }
        torch.manual_seed(0)
        base: Any = make("llama")
        setattr(base, SHORTCUTS, Shortcuts(answers_only=True, bare_head=True, no_mask=True))
        lines: dict[str, list[dict[str, Any]]] = {name: [] for name in lengths}
        options: dict[str, Any] = {"batch_size": 8, "log_every": 1, "warmup": 1, "learning_rate": 1e-3, "capture": way}
        slots = [
            packed.Slot(name, TrainConfig(steps=steps, **options | shared), lines[name].append)
            for name, steps in lengths.items()
        ]
        model = attach.attach_slots(base.to(device), methods, 0, {})
        ended = packed.train_packed(model, rows, slots, pad_id=0, seed=0, meter=Meter(device))
        facts = ended["slot0"].trained.compilation
        found.append({"facts": facts} | {name: losses(own) for name, own in lines.items()})
    plain, static = found
    assert static["facts"]["capture_graphs"] >= 3
    assert plain["facts"] == {}
    for name, steps in lengths.items():
        assert len(plain[name]) == steps
        assert static[name] == pytest.approx(plain[name], rel=1e-3)


# ---- the key ---------------------------------------------------------------------------------------


def test_capture_is_no_part_of_the_identity(compose: Callable[..., Trial]) -> None:
    plain, static = compose("train.capture=off"), compose()
    assert (static.identity, static.training) == (plain.identity, plain.training)
    assert packing.alone(plain) is packing.alone(static) is None


def test_steps_are_static_on_cuda_alone_and_where_they_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    on_cuda = torch.device("cuda")
    assert capture.captures(TrainConfig(), on_cuda)
    assert not capture.captures(TrainConfig(), CPU)
    assert not capture.captures(TrainConfig(compile="inductor"), on_cuda)
    assert not capture.captures(TrainConfig(capture=Capture.off), on_cuda)
