"""Prompts -> texts: greedy, sampled or by beams, with a shared cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from peftsweep.data.templates import Example
from peftsweep.data.tokens import prompt_ids
from peftsweep.errors import InputError
from peftsweep.evaluation.static_decoding import Unfit, next_logits, static_decoder
from peftsweep.models.compatibility import PREFIX_METHODS, check_generation
from peftsweep.models.losses import row_inputs
from peftsweep.models.parts import LONG_ROWS, SHORT_ROWS, forget_longer_rows, rows_by_rotation
from peftsweep.models.probe import abilities
from peftsweep.observe.measure import out_of_memory
from peftsweep.training.slots import of_slot

log = logging.getLogger(__name__)


def padded_ids(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of ``rows``, [rows, length] on ``device``."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[n, place] = torch.tensor(row)
        attention[n, place] = 1
    return ids.to(device), attention.to(device)


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Example],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    max_length: int = 768,
    num_beams: int = 1,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
) -> list[str]:
    """The model's continuation of each prompt (of an example, its prompt), without the prompt, up to its end mark.

    It is the likeliest, unless ``sampling`` says how it is drawn, from torch's random numbers.

    What a chat template rendered also ends where the template ends a turn. What is written ends before the first
    of the texts ``stop``, as with ``until`` of lm-evaluation-harness.
    """
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "max_length": max_length}
    how: dict[str, Any] = {"num_beams": num_beams, "stop": stop, "sampling": sampling}
    return [one.text for one in write(model, tokenizer, prompts, **sizes, **how)]


class Written(NamedTuple):
    """A generated text, its number of ``tokens`` without the end mark, and whether it was ``cut`` at the limit."""

    text: str
    tokens: int
    cut: bool


def write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Example],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    max_length: int = 768,
    num_beams: int = 1,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
) -> list[Written]:
    """The texts that ``generate`` gives, and how each of them ended."""
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "max_length": max_length}
    how: dict[str, Any] = {"num_beams": num_beams, "stop": stop, "sampling": sampling}
    return of_slot(partial(_generate, model, tokenizer, prompts, **sizes, **how))


class Sampling(NamedTuple):
    """How tokens are sampled, under transformers' names; ``top_k`` and the base's own settings are not used."""

    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``generate``."""
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0, "min_p": 0.0}


# A base's own defaults of sampling must not leak in.
GREEDY_OPTIONS: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.no_grad()
def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    max_length: int,
    num_beams: int,
    stop: Sequence[str],
    sampling: Sampling | None,
    slots: int,
) -> list[list[Written]]:
    device = next(model.parameters()).device
    limit = min(max_length, tokenizer.model_max_length - max_new_tokens)
    if limit < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: the model sees {tokenizer.model_max_length} tokens at once")
    encoded = prompt_ids(tokenizer, prompts, limit)
    stops = _Stops(tokenizer, stop)
    ends = sorted({*_end_ids(model, tokenizer), *_turn_ends(prompts)})
    texts = [[Written("", 0, False)] * len(prompts) for _ in range(slots)]
    greedy = num_beams == 1 and sampling is None and takes_a_cache(model)
    groups = rows_by_rotation(model, [len(ids) for ids in encoded], max_new_tokens)
    batch_size = batch_size if abilities(model).padded_batches else 1
    decoder: _Decoder = _GrowingCache(model)
    if greedy and encoded:
        length = max(map(len, encoded)) + max_new_tokens
        decoder = static_decoder(model, slots, min(batch_size, len(encoded)), length, max_new_tokens) or decoder

    def up_to_end(row: list[int]) -> list[int]:
        kept = next((n for n, token in enumerate(row) if token in ends), len(row))
        while not greedy and kept and row[kept - 1] == tokenizer.pad_token_id:
            kept -= 1  # of a row that one of the texts has ended before others of its batch
        return row[:kept]

    def ended(row: list[int], text: str) -> Written:
        before = stops.before(text)
        return Written(before, len(row), len(row) == max_new_tokens and before == text)

    def likeliest(ids: torch.Tensor, attention: torch.Tensor) -> list[list[int]]:
        nonlocal decoder
        try:
            return _greedy(decoder, ids, attention, max_new_tokens, ends, stops, slots)
        except Unfit as error:
            log.info("generating without static shapes: %s", error)
        decoder = _GrowingCache(model)
        return _greedy(decoder, ids, attention, max_new_tokens, ends, stops, slots)

    def write_some(numbers: list[int]) -> None:
        # Padded on the left, as generation goes on at the right.
        ids, attention = padded_ids([encoded[n] for n in numbers * slots], padding_id(tokenizer), device, left=True)
        group = groups[numbers[0]]
        if group != SHORT_ROWS:
            forget_longer_rows(model)
        # Some models read the whole row again where it grows beyond the original length (Phi-3), by their own generate.
        if greedy and group in (SHORT_ROWS, LONG_ROWS):
            made = likeliest(ids, attention)
        else:
            made = _generate_with_transformers(
                model, tokenizer, ids, attention, max_new_tokens, num_beams, ends, stops, sampling
            )
        made = [*map(up_to_end, made)]  # some tokenizers write their end mark or padding as text
        written = map(ended, made, tokenizer.batch_decode(made, skip_special_tokens=True))
        for mine in texts:
            for n in numbers:
                mine[n] = next(written)

    unpadded = reads_padding(model)
    alike = [(group, len(ids) if unpadded else 0) for group, ids in zip(groups, encoded, strict=True)]
    in_batches([len(ids) for ids in encoded], batch_size, write_some, alike)
    return texts


class _Stops:
    """Stop strings: texts that end a generation, however they are split into tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = [text for text in texts if text]
        # A token holds at least a byte, but for what begins before the text.
        self._look_back = max((len(text.encode()) for text in self._texts), default=0) + 2

    def __bool__(self) -> bool:
        return bool(self._texts)

    def reached(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Whether one of the texts stands at the end of each row of tokens."""
        if not self._texts:
            return [False] * len(rows)
        ends = self._tokenizer.batch_decode([list(row[-self._look_back :]) for row in rows])
        return [any(text in end for text in self._texts) for end in ends]

    def before(self, text: str) -> str:
        """``text`` up to the first of them."""
        for stop in self._texts:
            text = text.partition(stop)[0]
        return text


def written_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], stop: Sequence[str]) -> list[str]:
    """The texts that ``generate`` gives where the model writes these tokens."""
    return [*map(_Stops(tokenizer, stop).before, tokenizer.batch_decode([*map(list, ids)], skip_special_tokens=True))]


class _Stopping(StoppingCriteria):
    """The same for transformers' own generation, after prompts of ``start`` tokens."""

    def __init__(self, stops: _Stops, start: int) -> None:
        self._stops, self._start = stops, start

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        return torch.tensor(self._stops.reached(input_ids[:, self._start :].tolist()), device=input_ids.device)


class _Decoder(Protocol):
    """Finds the likeliest next token of each row of a batch, again and again."""

    def first(self, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """The tokens after prompts ``ids``, padded on the left, [rows, length]; shape [rows]."""

    def following(self) -> torch.Tensor:
        """The tokens after those that were found last; shape [rows]."""

    def keep(self, places: list[int]) -> bool:
        """Go on with these rows alone; False if all rows stay."""


class _GrowingCache:
    """Decodes on a cache that grows by a token a step, and gives up the rows that have ended."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._cache = model, cast(Any, None)
        self._chosen = self._attention = self._positions = torch.empty(0)

    def first(self, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """See ``_Decoder``."""
        self._cache = None
        self._attention, self._positions = attention, (attention.cumsum(-1) - 1).clamp(min=0)
        return self._read(ids)

    def following(self) -> torch.Tensor:
        """See ``_Decoder``."""
        self._attention = torch.cat([self._attention, self._attention.new_ones(len(self._attention), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1
        return self._read(self._chosen[:, None])

    def keep(self, places: list[int]) -> bool:
        """See ``_Decoder``."""
        kept = torch.tensor(places, device=self._chosen.device)
        self._cache.batch_select_indices(kept)
        self._chosen, self._attention = self._chosen[kept], self._attention[kept]
        self._positions = self._positions[kept]
        return True

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        logits, self._cache = next_logits(self._model, ids, self._attention, self._positions, self._cache)
        self._chosen = logits.argmax(-1)
        return self._chosen


def _greedy(
    decoder: _Decoder,
    ids: torch.Tensor,
    attention: torch.Tensor,
    max_new_tokens: int,
    ends: Sequence[int],
    stops: _Stops,
    slots: int,
) -> list[list[int]]:
    """The likeliest next token again and again, until all rows have ended.

    ``ids`` and ``attention`` are [slots * rows, length], padded on the left. Where rows leave the batch as they end,
    slots stay of one size: in one that has ended more of its rows than another, some are read on, for nothing.
    """
    written: list[list[int]] = [[] for _ in ids]
    running = list(range(len(ids)))
    over = [False] * len(ids)  # of each that is running
    for step in range(max_new_tokens):
        chosen = (decoder.following() if step else decoder.first(ids, attention)).tolist()
        over = [before or token in ends for before, token in zip(over, chosen, strict=True)]
        for row, token, ended in zip(running, chosen, over, strict=True):
            if not ended:
                written[row].append(token)
        stopped = stops.reached([written[row] for row in running])
        over = [before or now for before, now in zip(over, stopped, strict=True)]
        if all(over):
            break
        if len(places := _unfinished(over, slots)) < len(running) and decoder.keep(places):
            running, over = [running[n] for n in places], [over[n] for n in places]
    return written


def _unfinished(over: Sequence[bool], slots: int) -> list[int]:
    """The rows that are not over, and in each slot so many finished rows that all slots keep the same number."""
    size = len(over) // slots
    ordered = [sorted(range(size * n, size * (n + 1)), key=over.__getitem__) for n in range(slots)]
    most = max(sum(not over[place] for place in mine) for mine in ordered)
    return [place for mine in ordered for place in mine[:most]]


def _generate_with_transformers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    attention: torch.Tensor,
    max_new_tokens: int,
    num_beams: int,
    ends: Sequence[int],
    stops: _Stops,
    sampling: Sampling | None,
) -> list[list[int]]:
    """Generate with transformers: for sampling, beams, and methods that prepare their own inputs."""
    writing: Any = model
    check_virtual_tokens(model)
    with without_own_settings(model):
        made: torch.Tensor = writing.generate(
            input_ids=ids,
            attention_mask=attention,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            **(GREEDY_OPTIONS if sampling is None else sampling.options),
            use_cache=getattr(writing.config, "use_cache", True),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=list(ends),
            stopping_criteria=StoppingCriteriaList([_Stopping(stops, ids.shape[1])] if stops else []),
            **row_inputs(model, ids),
        )
    tokens: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return tokens


def check_virtual_tokens(model: nn.Module) -> None:
    """Where ``model`` has virtual tokens, ``compatibility.check_generation``."""
    method: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    if method is not None and method.is_prompt_learning:
        check_generation(method.num_virtual_tokens)


@contextmanager
def without_own_settings(model: nn.Module) -> Iterator[None]:
    """In the block the model has no generation settings of its own: no sampling, no penalties, no end mark.

    They would hold for what transformers' own generation writes, and not for ``_greedy``.
    """
    kept = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    for module, _ in kept:
        module.generation_config = cast(Any, GenerationConfig())
    try:
        yield
    finally:
        for module, config in kept:
            module.generation_config = config


def takes_a_cache(model: nn.Module) -> bool:
    """Whether the model can be called a token at a time, on a cache that gives up the rows that have ended.

    Not with virtual tokens, nor if it reads each token twice, nor if its adapter begins behind tokens that it looks for
    in what it is given (aLoRA), nor where the probe of its base has found otherwise.
    """
    config: Any = model.config
    if not getattr(config, "use_cache", True) or row_inputs(model, torch.zeros(1, 1)):
        return False
    method: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    if method is not None and (method.is_prompt_learning or getattr(method, "alora_invocation_tokens", None)):
        return False
    able = abilities(model)
    return able.padded_batches and able.row_cache


def reads_padding(model: nn.Module) -> bool:
    """Whether a method puts virtual tokens before a row's padding, so that the padding moves the row's own positions.

    PEFT's generate takes no positions with prompt tuning, p-tuning and their like; with prefixes it needs none.
    """
    method: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    if method is None or not method.is_prompt_learning:
        return False
    return method.peft_type not in PREFIX_METHODS.values()


def _end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end marks of the tokenizer and of the model's generation config, such as the end of a turn."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or []
    marks = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    return sorted(int(mark) for mark in marks if mark is not None)


def _turn_ends(prompts: Sequence[str | Example]) -> set[int]:
    rendered = [prompt.rendered for prompt in prompts if isinstance(prompt, Example)]
    return {row.end for row in rendered if row is not None and row.end is not None}


def in_batches(
    lengths: Sequence[int], batch_size: int, work: Callable[[list[int]], None], groups: Sequence[Any] | None = None
) -> None:
    """Do ``work`` on the numbers of all rows in batches, longest first, so that too large a batch fails at once.

    A batch holds rows of one of the ``groups``. Where memory runs out the batch is halved, and the rest goes on so.
    """
    left = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    while left:
        numbers = left[:batch_size]
        if groups is not None:
            numbers = next(list(same) for _, same in groupby(numbers, groups.__getitem__))
        size = len(numbers)
        try:
            work(numbers)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if len(numbers) == 1 or not out_of_memory(error):
                raise
            numbers = []
        if numbers:
            left = left[size:]
            continue
        batch_size = max(1, size // 2)
        log.warning("out of memory in an evaluation; going on with batches of %d rows", batch_size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that rows are padded with; attach sets one where a tokenizer has none."""
    return int(cast(int, tokenizer.pad_token_id))
