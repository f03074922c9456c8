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
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from scipy.stats import quantile_test
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from peftsweep import record
from peftsweep.data import prompt_ids, read_rows
from peftsweep.errors import InputError, suggest
from peftsweep.measure import out_of_memory, percentile, synchronise
from peftsweep.model import NOT_MERGEABLE, mergeable, row_inputs, token_limit

log = logging.getLogger(__name__)

BASE, ADAPTED, MERGED = "base", "adapted", "merged"  # the variants
OVERALL, ADAPTER = "overall", "adapter"  # nodes of the figures beside the categories
LEFT_OUT = "left_out"
OUT_OF_MEMORY = "out of memory"
SHIPPED = Path(__file__).parent / "prompts.json"
TIMES = ("seconds", "time_to_first_token", "seconds_per_token")

Clock = Callable[[], float]
Row = dict[str, Any]


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
    footprints = {name: cast(Any, model).get_memory_footprint() for name, model in models.items()}
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
            info[name] = {"cut_prompts": cut} | _category_figures(prompts, made, footprints)
            rows += made
    info[OVERALL] = _overall(info, chosen, rows, list(models)) | missing
    models.clear()
    gc.collect()  # a model holds itself in circles, and the merged one is not small
    return Benchmark(info, [row for row in rows if LEFT_OUT not in row])


# ---- what is written to what -----------------------------------------------------------------------


@dataclass(frozen=True)
class Category:
    """Prompts of one kind: their texts, the tokens written to each, and those it is made to have (None: its own)."""

    texts: list[str]
    new_tokens: int
    prompt_tokens: int | None = None


def plan(
    categories: Mapping[str, Mapping[str, Any] | None],
    prompts_file: str | None = None,
    *,
    samples: int = 5,
    runs: int = 6,
    warmup: int = 1,
    batch_sizes: Sequence[int] = (1, 4, 16),
    **_: Any,
) -> dict[str, Category]:
    """The categories with their texts: all of ``benchmark``'s options that can be checked without a model.

    Raises:
        InputError: a number out of range, an unknown option, or a file that cannot be read or lacks a category.
    """
    least = [("samples", samples, 1), ("runs", runs, 1), ("warmup", warmup, 0)]
    for key, number, smallest in [*least, *(("batch_sizes", size, 1) for size in batch_sizes)]:
        _at_least(f"inference.{key}", number, smallest)
    wanted = {name: node for name, node in categories.items() if node is not None}
    if not wanted:
        raise InputError("inference.categories: must name at least one category")
    lists = read_prompts(prompts_file)
    return {name: _category(name, node, lists, samples) for name, node in wanted.items()}


def read_prompts(file: str | None = None) -> dict[str | None, list[str]]:
    """The prompts by category: the shipped ones, or those of a .json (category -> prompts), or of rows.

    Rows have a column ``prompt`` or ``text``, and perhaps ``category``; those without belong to every category (None).

    Raises:
        InputError: the file cannot be read, or is made up otherwise.
    """
    key = f"inference.prompts_file={file}"
    lists: dict[str | None, list[str]] = {}
    if file is None or (Path(file).suffix == ".json" and Path(file).is_file()):
        try:
            content = json.loads(Path(file or SHIPPED).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InputError(f"{key}: cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(content, dict) or not all(map(_is_texts, content.values())):
            raise InputError(f'{key}: must be an object of lists of prompts, such as {{"short": ["..."]}}')
        lists |= content
        return lists
    for n, row in enumerate(read_rows(file, "inference.prompts_file"), start=1):
        text = row.get("prompt", row.get("text"))
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{key}: row {n} needs a text as its 'prompt' or 'text'; it has: {', '.join(row)}")
        lists.setdefault(row.get("category"), []).append(text)
    return lists


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def _category(name: str, node: Mapping[str, Any], lists: Mapping[str | None, list[str]], samples: int) -> Category:
    key = f"inference.categories.{name}"
    if name in (OVERALL, ADAPTER):
        raise InputError(f"{key}: the name is that of other figures; take another than {OVERALL} and {ADAPTER}")
    known = ["new_tokens", "prompt_tokens", "prompts"]
    for option in node:
        if option not in known:
            raise InputError(f"{key}.{option}: no such option; {suggest(option, known)}")
    _at_least(f"{key}.new_tokens", node.get("new_tokens"), 1)
    if node.get("prompt_tokens") is not None:
        _at_least(f"{key}.prompt_tokens", node["prompt_tokens"], 1)
    wanted = node.get("prompts") or name
    texts = lists.get(wanted) or lists.get(None)
    if not texts:
        names = ", ".join(str(found) for found in lists)
        raise InputError(f"{key}.prompts={wanted}: inference.prompts_file has no such prompts; there are: {names}")
    return Category(texts[:samples], node["new_tokens"], node.get("prompt_tokens"))


def _at_least(key: str, number: Any, smallest: int) -> None:
    if type(number) is not int or number < smallest:
        raise InputError(f"{key}={number}: must be a whole number of at least {smallest}")


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
    """The model in eval mode and without generation defaults of its own: no sampling, no penalties, no end mark."""
    modes = [(module, module.training) for module in model.modules()]
    kept = [(module, module.generation_config) for module, _ in modes if "generation_config" in vars(module)]
    model.eval()
    for module, _ in kept:
        module.generation_config = cast(Any, GenerationConfig())
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, config in kept:
            module.generation_config = config


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


# ---- figures ---------------------------------------------------------------------------------------


def ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """How many times as long the second of each pair takes as the first: the median ``value`` and its 95% interval.

    ``low`` and ``high`` are the order statistics between which the median lies with at least that confidence by the
    binomial distribution, whatever that of the times (Conover, Practical Nonparametric Statistics, 3.2); None for
    fewer than six pairs, which cannot tell.
    """
    ratios = [second / first for first, second in pairs]
    if not ratios:
        return {"value": None, "low": None, "high": None}
    interval = quantile_test(ratios, p=0.5).confidence_interval(confidence_level=0.95)
    low, high = (None if bound != bound else float(bound) for bound in interval)
    return {"value": statistics.median(ratios), "low": low, "high": high}


def _category_figures(prompts: Sequence[list[int]], rows: list[Row], footprints: Mapping[str, int]) -> dict[str, Any]:
    lengths = [len(ids) for ids in prompts]
    figures: dict[str, Any] = {"prompts": len(prompts), "prompt_tokens": statistics.mean(lengths)}
    for name, footprint in footprints.items():
        figures[name] = _variant_figures(name, rows, footprint)
    return figures


def _variant_figures(name: str, rows: list[Row], footprint: int) -> dict[str, Any]:
    mine = [row for row in rows if row["variant"] == name]
    alone = [row for row in mine if row["batch_size"] == 1]
    batches = {f"batch_{size}": _batch_figures(name, rows, size) for size in sorted({r["batch_size"] for r in mine})}
    if any(LEFT_OUT in row for row in alone):
        return {LEFT_OUT: OUT_OF_MEMORY}
    figures: dict[str, Any] = {}
    for key in TIMES:
        figures |= _spread(key, [row[key] for row in alone if row[key] is not None])
    figures["generated_tokens"] = statistics.mean(row["tokens"] for row in alone)
    generation = _largest(alone)
    figures["weights_bytes"] = footprint
    figures["generation_bytes"] = generation
    figures["peak_bytes"] = None if generation is None else footprint + generation
    return figures | _overheads(name, rows) | batches


def _batch_figures(name: str, rows: list[Row], size: int) -> dict[str, Any]:
    mine = [row for row in rows if row["variant"] == name and row["batch_size"] == size]
    if any(LEFT_OUT in row for row in mine):
        return {LEFT_OUT: OUT_OF_MEMORY}
    figures: dict[str, Any] = {
        "tokens_per_second": statistics.median(row["tokens"] / row["seconds"] for row in mine),
        "seconds_p50": statistics.median(row["seconds"] for row in mine),
        "time_to_first_token_p50": statistics.median(row["time_to_first_token"] for row in mine),
        "generation_bytes": _largest(mine),
    }
    if name != BASE and (pairs := _pairs(name, rows, "seconds", size)):
        figures["overhead"] = ratio(pairs)
    return figures


def _overheads(name: str, rows: list[Row]) -> dict[str, Any]:
    """The overheads of each of ``TIMES`` beside the base, one prompt at a time; nothing where there is no base."""
    names = {key: "overhead" if key == "seconds" else f"{key}_overhead" for key in TIMES}
    pairs = {key: _pairs(name, rows, key, 1) for key in TIMES if name != BASE}
    return {names[key]: ratio(found) for key, found in pairs.items() if found}


def _pairs(name: str, rows: list[Row], key: str, size: int) -> list[tuple[float, float]]:
    """The times of the base and of ``name`` in the same turn."""
    sides: dict[str, dict[Any, float]] = {BASE: {}, name: {}}
    for row in rows:
        if row["variant"] in sides and row["batch_size"] == size and row.get(key) is not None:
            sides[row["variant"]][row["category"], row["prompt"], row["run"]] = row[key]
    return [(sides[BASE][turn], mine) for turn, mine in sides[name].items() if turn in sides[BASE]]


def _spread(key: str, values: list[float]) -> dict[str, float | None]:
    return {
        f"{key}_mean": statistics.mean(values) if values else None,
        f"{key}_std": statistics.stdev(values) if len(values) > 1 else None,
        **{f"{key}_p{percent}": percentile(values, percent) for percent in (50, 95, 99)},
    }


def _largest(rows: list[Row]) -> int | None:
    return max((row["generation_bytes"] for row in rows if row["generation_bytes"] is not None), default=None)


def _overall(info: Mapping[str, Any], chosen: Mapping[str, Any], rows: list[Row], names: list[str]) -> dict[str, Any]:
    """The figures of each variant over the categories in which every variant was measured."""
    whole = [
        category
        for category in chosen
        if LEFT_OUT not in info[category] and not any(LEFT_OUT in info[category][name] for name in names)
    ]
    inside = [row for row in rows if row["category"] in whole]
    figures = {name: _mean([info[c][name] for c in whole]) | _overheads(name, inside) for name in names if whole}
    return {"categories": whole, **figures}


def _mean(nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each number that all nodes hold; an interval has no mean."""
    mean: dict[str, Any] = {}
    for key, value in nodes[0].items():
        values = [node.get(key) for node in nodes]
        if isinstance(value, Mapping):
            if not key.endswith("overhead") and not any(found is None or LEFT_OUT in found for found in values):
                mean[key] = _mean(cast(Any, values))
        else:
            mean[key] = None if any(found is None for found in values) else statistics.mean(cast(Any, values))
    return mean


# ---- the variants ----------------------------------------------------------------------------------


def bare(base: nn.Module) -> nn.Module:
    """A second tree of modules around the same tensors: what is attached to ``base`` later is not attached to it.

    To be made before a method is attached. It takes no memory worth counting, on bitsandbytes' quantised layers
    neither. It follows where training changes the base's own weights, so it tells how long the base takes,
    not what it says.
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
        joined = cast(Any, _copied(adapted, _layers(adapted))).merge_and_unload().eval()
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
    figures: dict[str, Any] = _spread("load_seconds", loads) | _spread("switch_seconds", switches)
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
    """What a module itself holds: parameters, buffers, other tensors, and the state of bitsandbytes' layers.

    That state must stay one: the first forward of an 8-bit layer moves the weights there from the parameter.
    """
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    for value in vars(module).values():
        if isinstance(value, torch.Tensor) or type(value).__module__.startswith("bitsandbytes"):
            yield value
