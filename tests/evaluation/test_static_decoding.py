"""Decoding in static shapes writes what decoding with the usual cache writes, and is given up where it does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import StaticLayer

from peftsweep.evaluation import decoding, static_decoding
from peftsweep.evaluation.static_decoding import StaticDecoder
from peftsweep.models import attach, model, probe
from peftsweep.schema import Dtype, ModelConfig, TargetsConfig
from peftsweep.training import graphs
from peftsweep.training.slots import Pack
from tests.architectures import GENERATING, make

PROMPTS = ["Tom has 3 pens.", "One day a cat went out to see the big garden and it", "a", "What is 2 plus 2? It is"]
PROMPTS += ["Two dogs", "She ran home as it was late, and then", "It"]  # the last batch of 3 has one row
NEW_TOKENS = 20
# Whose cache is attention only, with and without windows, and can give up rows.
STATIC = ["llama", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral", "gemma3_text", "gemma3", "phi3", "gpt_neox", "gpt2"]
STATIC += ["opt", "gpt_oss"]
TOKENIZER = model.load_tokenizer(ModelConfig(name_or_path="tiny"))
FAST = ("llama", "gpt2")


class Used:
    """Counts what the static decoders of a test do."""

    def __init__(self) -> None:
        self.prompts = self.steps = self.replays = self.unfit = 0


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Used:
    """Static shapes on a CPU; a captured step is a Python function that is called again."""
    count = Used()
    monkeypatch.setattr(graphs, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "_FAILURES", [])
    first, following = StaticDecoder.first, StaticDecoder.following

    def counted_first(self: Any, *given: Any) -> torch.Tensor:
        count.prompts += 1
        return unfit_counted(first, self, *given)

    def counted_following(self: Any) -> torch.Tensor:
        count.steps += 1
        return unfit_counted(following, self)

    def unfit_counted(work: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
        try:
            return work(*given)
        except static_decoding.Unfit:
            count.unfit += 1
            raise

    monkeypatch.setattr(StaticDecoder, "first", counted_first)
    monkeypatch.setattr(StaticDecoder, "following", counted_following)
    return count


class Recorded(TorchDispatchMode):
    """The operators that ran in the block, and what they changed: what a CUDA graph keeps of a step.

    As in a graph, numbers that Python computed are repeated as they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for taken, given in zip(operator._schema.arguments, args, strict=False):
            if taken.alias_info is not None and taken.alias_info.is_write:
                self._before.append((given, given.clone()))
        output = operator(*args, **(kwargs or {}))
        self._calls.append((operator, args, kwargs or {}, output))
        return output

    def undo(self) -> None:
        """What was changed is as before, as a capture runs nothing."""
        for tensor, value in reversed(self._before):
            tensor.copy_(value)

    def replay(self, result: torch.Tensor) -> torch.Tensor:
        """Run the operators again; what they now give for ``result``."""
        now: dict[int, torch.Tensor] = {}

        def current(given: Any) -> Any:
            return now.get(id(given), given)

        for operator, args, kwargs, before in self._calls:
            found = operator(*tree_map(current, args), **tree_map(current, kwargs))
            now |= {id(old): new for old, new in zip(tree_leaves(before), tree_leaves(found), strict=True)}
        return current(result)  # type: ignore[no-any-return]


def pretended_graph(count: Used, monkeypatch: pytest.MonkeyPatch, off_by: float = 0.0) -> None:
    """A capture records the operators of a step; each replay runs them and fills the logits that were returned."""

    def record(work: Callable[[], torch.Tensor], *_: Any) -> tuple[Any, torch.Tensor]:
        with Recorded() as recorded:
            made = work()
        recorded.undo()
        logits = torch.zeros(())

        def replay() -> None:
            count.replays += 1
            found = recorded.replay(made)
            logits.set_(found + off_by * torch.arange(found.shape[-1]))

        return SimpleNamespace(replay=replay), logits

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(StaticDecoder, "captures", property(lambda self: True, lambda self, value: None), raising=False)


def write(written_by: Any, batch_size: int = 3, **options: Any) -> list[decoding.Written]:
    given = {"max_new_tokens": NEW_TOKENS, "batch_size": batch_size} | options
    return decoding.write(written_by, TOKENIZER, PROMPTS, **given)


def usual(written_by: Any, **options: Any) -> list[decoding.Written]:
    with graphs.allowed_if(False):
        return write(written_by, **options)


def adapted(kind: str = "llama") -> PeftModel:
    method = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return attach.attach(make(kind), method, TargetsConfig(), {}).eval()


@functools.cache
def usually_written() -> list[decoding.Written]:
    """What ``adapted()``, whose weights are always the same, writes with the usual cache."""
    return usual(adapted())


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in STATIC])
def test_static_shapes_write_the_same(kind: str, used: Used) -> None:
    base = make(kind)
    expected = usual(base)
    assert used.prompts == 0
    assert write(base) == expected
    assert (used.prompts, used.unfit) == (3, 0)
    assert used.steps > NEW_TOKENS


OTHER_CACHES = sorted({*GENERATING} - {*STATIC})


# In the fast tier one whose state has the same size at all lengths, and one that has a cache of keys beside it.
@pytest.mark.parametrize(
    "kind", [k if k in ("mamba", "lfm2") else pytest.param(k, marks=pytest.mark.slow) for k in OTHER_CACHES]
)
def test_other_caches_are_used_as_before(kind: str, used: Used) -> None:
    base = make(kind)
    assert write(base) == usual(base)
    assert used.prompts in (0, 1)  # one that is found to give other logits
    assert used.steps == 0


def test_a_step_is_captured_once_and_replayed_in_all_batches(used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, expected = adapted(), usually_written()
    pretended_graph(used, monkeypatch)
    assert write(writer) == expected
    assert used.unfit == 0
    assert used.replays == used.steps - graphs.WARMUP_PASSES + 2  # and two that are compared


class Waits(TorchDispatchMode):
    """Notes the operators for which the host waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            self.found.append(operator._schema.name)
        return operator(*args, **kwargs or {})


WITHOUT_EXPERTS = [kind for kind in STATIC if "moe" not in kind and kind not in ("mixtral", "gpt_oss")]


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in WITHOUT_EXPERTS])
def test_the_host_waits_for_the_device_in_no_step(kind: str, used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    step, waits = StaticDecoder._step, Waits()

    def watched(self: Any) -> torch.Tensor:
        with waits:
            return step(self)

    monkeypatch.setattr(StaticDecoder, "_step", watched)
    write(make(kind))
    assert used.steps > 0
    assert not waits.found


def test_a_replay_with_other_logits_is_given_up(used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, expected = adapted(), usually_written()
    pretended_graph(used, monkeypatch, off_by=1e-2)
    assert write(writer) == expected
    assert (used.prompts, used.replays, used.unfit) == (1, 1, 1)


@pytest.mark.slow  # so is one with other logits in one row, below
def test_a_static_cache_with_other_logits_is_given_up(used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    update = StaticLayer.update

    def shifted(self: Any, keys: torch.Tensor, *given: Any, **options: Any) -> Any:
        return update(self, keys * 1.1, *given, **options)

    writer, expected = adapted(), usually_written()
    monkeypatch.setattr(StaticLayer, "update", shifted)
    assert write(writer) == expected
    assert (used.prompts, used.steps, used.unfit) == (1, 0, 1)


def test_a_static_cache_with_other_logits_in_one_row_is_given_up(used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = adapted()
    next_logits, expected = static_decoding.next_logits, usually_written()

    def one_row_is_another(*given: Any) -> Any:
        logits, cache = next_logits(*given)
        logits[0] *= 1 + 2e-3 * isinstance(cache.layers[0], StaticLayer)  # of 3 rows; their mean is within rounding
        return logits, cache

    monkeypatch.setattr(static_decoding, "next_logits", one_row_is_another)
    assert write(writer) == expected
    assert (used.prompts, used.steps, used.unfit) == (1, 0, 1)


def test_a_step_that_computes_positions_in_python_is_given_up(used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = adapted()
    expected = usual(writer)  # after which it is given positions

    def in_python(module: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, given | {"position_ids": torch.tensor(given["position_ids"].tolist())}

    writer.get_base_model().register_forward_pre_hook(in_python, with_kwargs=True)
    pretended_graph(used, monkeypatch)
    assert write(writer) == expected
    assert (used.prompts, used.replays, used.unfit) == (1, 2, 1)  # the first is right: it repeats its own position


@pytest.mark.parametrize(  # one place in the fast tier, as all are left in the same way
    "where", ["_step", *(pytest.param(name, marks=pytest.mark.slow) for name in ("_read_prompts", "_capture"))]
)
def test_where_the_model_raises_an_error_the_usual_cache_goes_on(
    where: str, used: Used, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def odd(*_: Any) -> Any:
        raise TypeError("get_usable_length() takes no argument\nof a static cache")

    writer, expected = adapted(), usually_written()
    pretended_graph(used, monkeypatch)
    monkeypatch.setattr(StaticDecoder, where, odd)
    with caplog.at_level("INFO"):
        assert write(writer) == expected
    assert (used.prompts, used.unfit) == (1, 1)
    assert "static shapes: TypeError: get_usable_length() takes no argument" in caplog.text


@pytest.mark.parametrize("where", ["following", pytest.param("first", marks=pytest.mark.slow)])
def test_where_memory_runs_out_the_usual_cache_goes_on(where: str, used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    writer, expected = adapted(), usually_written()
    monkeypatch.setattr(StaticDecoder, {"first": "_read_prompts", "following": "_step"}[where], full)
    assert write(writer) == expected
    assert used.unfit == 1


def test_texts_that_end_what_is_written_and_few_new_tokens(used: Used) -> None:
    writer = adapted()
    whole = usual(writer)
    stop = [next(one.text for one in whole if len(one.text) > 3)[2:4]]
    assert write(writer, stop=stop) == usual(writer, stop=stop)
    assert used.prompts == 3
    assert write(writer, max_new_tokens=static_decoding.MIN_NEW_TOKENS - 1) == [
        *usual(writer, max_new_tokens=static_decoding.MIN_NEW_TOKENS - 1)
    ]
    assert used.prompts == 3


def test_all_slots_of_a_pack_decode_together(used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {
        name: (LoraConfig(r=2 + n, target_modules="all-linear", init_lora_weights=False), TargetsConfig())
        for n, name in enumerate(("one", "two"))
    }
    writer = attach.attach_slots(make("llama"), methods, 0, {}).eval()
    probe.abilities(writer)
    expected = {}
    for name in methods:
        writer.set_adapter(name)
        expected[name] = usual(writer)
    pretended_graph(used, monkeypatch)
    pack = Pack(writer, [*methods])
    try:
        for name in methods:
            with pack.evaluated_together(name):
                assert write(writer) == expected[name]
    finally:
        pack.close()
    assert (used.prompts, used.unfit) == (3, 0)  # for both


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("quant", "dtype"), [("none", Dtype.float32), ("4bit", Dtype.float32), ("none", Dtype.bfloat16)]
)
def test_a_graph_on_a_gpu_writes_the_same(quant: str, dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.models.test_model import QUANTS

    device = torch.device("cuda")
    base = model.load(ModelConfig(name_or_path="tiny", dtype=dtype), QUANTS[quant], device)
    method = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_alpha=1)
    writer = attach.attach(base, method, TargetsConfig(), {}).eval()
    kept: list[StaticDecoder] = []
    made = StaticDecoder.__init__

    def remember(self: StaticDecoder, *given: Any) -> None:
        kept.append(self)
        made(self, *given)

    expected = usual(writer)
    monkeypatch.setattr(StaticDecoder, "__init__", remember)
    found = write(writer)
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    # Where two tokens are about as likely, rounding decides.
    assert same >= len(PROMPTS) - {Dtype.float32: quant == "4bit", Dtype.bfloat16: 3}[dtype]
    assert kept[0]._graph is not None
