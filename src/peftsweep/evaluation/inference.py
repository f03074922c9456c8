"""Latency and memory of generation: the untouched base, the adapted model and the merged one, in turns.

    untouched = bare(base)  # before a method is attached; costs no memory
    ...
    found = benchmark({"base": untouched, "adapted": adapted}, tokenizer, categories=..., saved=folder)

All variants write the same number of tokens to the same prompts, greedily. They take turns run by run, so
that whatever else the machine does disturbs all alike, and an overhead is that of neighbouring runs.
"""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from peftsweep.data.tokens import prompt_ids
from peftsweep.evaluation.decoding import check_virtual_tokens, without_own_settings
from peftsweep.evaluation.inference_figures import (
    ADAPTED,
    LEFT_OUT,
    MERGED,
    OUT_OF_MEMORY,
    Clock,
    Row,
    category_figures,
    overall_figures,
    spread_of,
)
from peftsweep.evaluation.inference_plan import ADAPTER, OVERALL, Category, plan
from peftsweep.models.losses import row_inputs
from peftsweep.models.model import token_limit
from peftsweep.models.quantised.layers import footprint
from peftsweep.models.saved import NOT_MERGEABLE, mergeable, unwrap_heads
from peftsweep.observe.measure import out_of_memory, synchronise
from peftsweep.study import record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """The figures by category and variant, for ``generation_info``, and each run, for a .jsonl file."""

    info: dict[str, Any]
    runs: list[Row]


def benchmark(
    variants: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    *,
    categories: Mapping[str, Mapping[str, Any] | None],
    prompts_file: str | None = None,
    samples: int = 5,
    runs: int = 6,
    warmup: int = 1,
    batch_sizes: Sequence[int] = (1, 4, 16),
    merge: bool = True,
    switch: bool = True,
    saved: Path | None = None,
    clock: Clock = time.perf_counter,
) -> Benchmark:
    """Time the generation of every variant, by category of prompts; the models are left as they were.

    ``variants`` are models by name; overheads are relative to the one named ``base``, and the one named
    ``adapted`` is also merged (``merge``) and loaded and switched (``switch``) from the folder ``saved``.
    ``categories`` and the options after it are those of conf/inference/standard.yaml.

    ``info.<category>.<variant>`` holds, of all runs of all prompts, one prompt at a time:
    ``seconds``, ``time_to_first_token`` and ``seconds_per_token`` (of each further token), each as
    ``_mean``, ``_std``, ``_p50``, ``_p95`` and ``_p99`` and, beside the base, as ``_overhead`` (that of ``seconds`` is
    ``overhead``), see ``ratio``; ``generated_tokens``, counted, a prompt; ``weights_bytes``, ``generation_bytes``
    (what generation takes beside the weights at its peak, with the cache of keys and values; None on a CPU) and their
    sum ``peak_bytes``. ``batch_<n>`` holds the median ``tokens_per_second`` of n prompts at once, ``seconds_p50``,
    ``time_to_first_token_p50``, ``generation_bytes`` and ``overhead``. ``info.overall.<variant>`` is the mean over the
    categories in which all variants were measured; its overheads are those of all their pairs.
    ``info.adapter`` holds the seconds it takes to load an adapter and to switch to another.
    A category holds how many ``prompts`` it has, their mean ``prompt_tokens``, and ``cut_prompts``, those that lost
    their beginning to fit. What cannot be measured has ``left_out``, the reason, in its place.

    Raises:
        InputError: see ``plan``.
    """
    chosen = plan(categories, prompts_file, samples=samples, runs=runs, warmup=warmup, batch_sizes=batch_sizes)
    adapted = variants.get(ADAPTED)
    info: dict[str, Any] = {}
    if switch and adapted is not None:
        info[ADAPTER] = _adapter_seconds(adapted, saved, warmup, runs, clock)
    models, missing = dict(variants), {}
    if merge and adapted is not None:
        joined, reason = merged(adapted)
        if joined is None:
            missing[MERGED] = {LEFT_OUT: reason}
        else:
            models[MERGED] = joined
    footprints = {name: footprint(model) for name, model in models.items()}
    room = _positions(models.values(), tokenizer)
    rows: list[Row] = []
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(_generating(model))
        for name, category in chosen.items():
            if (category.prompt_tokens or 1) + category.new_tokens > room:
                wanted = f"{category.prompt_tokens or 1} + {category.new_tokens} tokens"
                info[name] = {LEFT_OUT: f"{wanted} are more than the model has positions for ({room})"}
                continue
            prompts, cut = _encode(category, tokenizer, room)
            made = _take_turns(models, _work(prompts, batch_sizes), category, tokenizer, warmup, runs, clock)
            made = [{"category": name} | row for row in made]
            info[name] = {"cut_prompts": cut} | category_figures(prompts, made, footprints)
            rows += made
    info[OVERALL] = overall_figures(info, chosen, rows, list(models)) | missing
    models.clear()
    gc.collect()  # a model holds itself in circles, and the merged one is not small
    return Benchmark(info, [row for row in rows if LEFT_OUT not in row])


def _positions(models: Iterable[nn.Module], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens of prompt and answer fit into every model, beside the virtual tokens of its method."""
    room = [int(min(tokenizer.model_max_length, 1 << 62))]
    for model in models:
        positions = token_limit(model)
        method = model.active_peft_config if isinstance(model, PeftModel) else None
        virtual = method.num_virtual_tokens if method is not None and method.is_prompt_learning else 0
        room.append((positions or room[0]) - virtual)
    return min(room)


def _encode(category: Category, tokenizer: PreTrainedTokenizerBase, room: int) -> tuple[list[list[int]], int]:
    """The prompts in token ids, and how many of them lost their beginning because they were too long.

    A prompt of a given length begins with its own text and goes on with those after it, again and again.
    """
    starts = prompt_ids(tokenizer, category.texts)
    if category.prompt_tokens is None:
        limit = room - category.new_tokens
        return prompt_ids(tokenizer, category.texts, limit), sum(len(ids) > limit for ids in starts)
    following = tokenizer([f"\n\n{text}" for text in category.texts], add_special_tokens=False).input_ids
    prompts = []
    for n, start in enumerate(starts):
        ids, after = list(start), n
        while len(ids) < category.prompt_tokens:
            after += 1
            ids += following[after % len(following)]
        prompts.append(ids[: category.prompt_tokens])
    return prompts, 0


class _Work(NamedTuple):
    """Prompts that are answered at once, as token ids; ``prompt`` is the number of the only one."""

    ids: list[list[int]]
    prompt: int | None


def _work(prompts: Sequence[list[int]], batch_sizes: Sequence[int]) -> list[_Work]:
    alone = [_Work([ids], n) for n, ids in enumerate(prompts)]
    together = [_Work([prompts[n % len(prompts)] for n in range(size)], None) for size in batch_sizes if size > 1]
    return [*alone, *together]


# ---- timing ----------------------------------------------------------------------------------------


def _take_turns(
    models: Mapping[str, nn.Module],
    work: Sequence[_Work],
    category: Category,
    tokenizer: PreTrainedTokenizerBase,
    warmup: int,
    runs: int,
    clock: Clock,
) -> list[Row]:
    """A row a run and variant, in the order in which they were made; one that ran out of memory says so, once."""
    rows: list[Row] = []
    for ids, prompt in work:
        full: set[str] = set()
        batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        for run in range(-warmup, runs):
            for name, model in models.items():
                if name in full:
                    continue
                row: Row = {"variant": name, "batch_size": len(ids), "prompt": prompt, "run": run}
                try:
                    row |= _timed(model, batch, category.new_tokens, tokenizer, clock)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    full.add(name)
                    row |= {LEFT_OUT: OUT_OF_MEMORY}
                if name in full:  # not in the handler, whose traceback holds the tensors
                    log.warning("out of memory: %s, %d prompts of %d tokens", name, *batch["input_ids"].shape)
                    _release()
                if run >= 0 or name in full:
                    rows.append(row)
    return rows


@torch.no_grad()
def _timed(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    new_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    clock: Clock,
) -> Row:
    """Write ``new_tokens`` to each prompt of ``batch`` and say what that took."""
    check_virtual_tokens(model)
    device = next(model.parameters()).device
    ids, attention = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    marks = _Marks(device, clock)
    resident = _reset_peak(device)
    synchronise(device)
    start = clock()
    written: torch.Tensor = cast(Any, model).generate(
        input_ids=ids,
        attention_mask=attention,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=getattr(cast(Any, model).config, "use_cache", True),
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([marks]),
        **row_inputs(model, ids),
    )
    synchronise(device)
    seconds = clock() - start
    first, last, further = marks.times[0], marks.times[-1], len(marks.times) - 1
    return {
        "seconds": seconds,
        "time_to_first_token": first - start,
        "seconds_per_token": (last - first) / further if further else None,
        "tokens": (written.shape[1] - ids.shape[1]) * len(ids),
        "prompt_tokens": int(attention.sum()),
        "generation_bytes": None if resident is None else torch.cuda.max_memory_allocated(device) - resident,
    }


class _Marks(StoppingCriteria):
    """Notes the time of each token once the device has it, and stops nothing.

    The host waits for each token anyway, as it asks whether all rows have ended.
    """

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self.times: list[float] = []
        self._device, self._clock = device, clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        synchronise(self._device)
        self.times.append(self._clock())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _generating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without generation settings of its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with without_own_settings(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _reset_peak(device: torch.device) -> int | None:
    """Forget the device's peak and return the bytes in use; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the variants ----------------------------------------------------------------------------------


def bare(base: nn.Module) -> nn.Module:
    """A second tree of modules around the same tensors: what is attached to ``base`` later is not attached to it.

    Make it before a method is attached. It takes almost no memory, also with bitsandbytes' quantised layers. Where
    training changes the base's own weights it changes with them: use it to time the base, not to score it.
    """
    return _copied(base, [])


def merged(adapted: nn.Module) -> tuple[nn.Module | None, str | None]:
    """A model with the adapter merged in, of plain layers, for timing; or None and the reason why there is none.

    ``adapted`` stays as it is: the layers that have an adapter are copied, everything else is shared. A quantised
    layer stays quantised, so that merging rounds; the timing does not mind.
    """
    if not isinstance(adapted, PeftModel):
        return None, "there is no adapter to merge"
    if not mergeable(adapted):
        return None, NOT_MERGEABLE
    try:
        joined: Any = _copied(adapted, _layers(adapted))
        unwrap_heads(joined)
        joined = joined.merge_and_unload().eval()
        with torch.no_grad():  # some methods merge into quantised layers what these cannot read
            joined(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=joined.device))
        return cast(nn.Module, joined), None
    except Exception as error:  # whatever PEFT raises for a method that it cannot merge
        log.info("the adapter cannot be merged", exc_info=True)
        reason = OUT_OF_MEMORY if out_of_memory(error) else record.one_line(error)
    _release()
    return None, reason


def _adapter_seconds(adapted: nn.Module, saved: Path | None, warmup: int, runs: int, clock: Clock) -> dict[str, Any]:
    """How long it takes to load a second adapter from ``saved`` and to switch to it and back."""
    loads: list[float] = []
    switches: list[float] = []
    reason = None
    if not isinstance(adapted, PeftModel):
        reason = "there is no adapter"
    elif saved is None or not (saved / "adapter_config.json").exists():
        reason = "the adapter was not saved"
    else:
        trained = [(p, p.requires_grad) for p in adapted.parameters()]
        try:
            for run in range(-warmup, runs):
                load, there, back = _load_and_switch(adapted, saved, clock)
                if run >= 0:
                    loads.append(load)
                    switches += [there, back]
        except Exception as error:  # whatever PEFT raises for a method that takes no second adapter
            log.info("a second adapter cannot be loaded", exc_info=True)
            reason = record.one_line(error)
        for parameter, learns in trained:
            parameter.requires_grad_(learns)
    figures: dict[str, Any] = spread_of("load_seconds", loads) | spread_of("switch_seconds", switches)
    return figures if reason is None else dict.fromkeys(figures) | {LEFT_OUT: reason}


def _load_and_switch(adapted: PeftModel, saved: Path, clock: Clock) -> tuple[float, float, float]:
    """Seconds of loading, of switching to the loaded adapter and of switching back.

    All on a second tree of modules around the same tensors, so that a failure half way leaves nothing behind. Where
    loading begins by taking the base's weights apart (PiSSA, OLoRA, KaSA), these are copied too.
    """
    config: Any = adapted.active_peft_config
    apart = isinstance(getattr(config, "init_lora_weights", None), str) or getattr(config, "kasa_config", None)
    model = cast(PeftModel, _copied(adapted, _layers(adapted) if apart else []))
    device = next(adapted.parameters()).device
    own = model.active_adapter
    work: list[Callable[[], Any]] = [
        lambda: model.load_adapter(str(saved), "second", torch_device=str(device)),
        lambda: model.set_adapter("second"),
        lambda: model.set_adapter(own),
    ]
    seconds = []
    for step in work:
        synchronise(device)
        start = clock()
        step()
        synchronise(device)
        seconds.append(clock() - start)
    load, there, back = seconds
    return load, there, back


def _layers(adapted: PeftModel) -> list[nn.Module]:
    """The layers that have an adapter."""
    return [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]


def _copied(model: nn.Module, own: Sequence[nn.Module]) -> nn.Module:
    """A deep copy that shares the model's tensors, but for those inside the modules ``own``."""
    copies = {id(tensor) for module in own for part in module.modules() for tensor in _tensors(part)}
    shared = [tensor for module in model.modules() for tensor in _tensors(module) if id(tensor) not in copies]
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for part, original in zip(made.modules(), model.modules(), strict=True):
        weight: Any = getattr(part, "weight", None)
        if getattr(weight, "module", None) is original and weight is not original.weight:
            weight.module = part  # a 4-bit weight knows its layer, and tells it when it is quantised again
    return made


def _tensors(module: nn.Module) -> Iterator[Any]:
    """A module's contents without its submodules: parameters, buffers, tensors, state of bitsandbytes' layers.

    That state must stay one: the first forward of an 8-bit layer moves the weights there from the parameter.
    """
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    for value in vars(module).values():
        if isinstance(value, torch.Tensor) or type(value).__module__.startswith("bitsandbytes"):
            yield value
