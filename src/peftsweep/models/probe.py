"""Probe a language model by a few small forwards: later tokens, padding, its cache and its output head.

Architectures differ in these, and a wrong assumption gives wrong results without an error: recurrent layers may read
padding as text, and some caches cannot select rows.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear8bitLt
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftsweep.data.batches import Batch, collate
from peftsweep.data.tokens import Tokens
from peftsweep.errors import InputError, first_line
from peftsweep.models import shortcuts
from peftsweep.models.losses import READS_PADDING, answer_losses, class_logits
from peftsweep.models.parts import base_of, text_config, text_part
from peftsweep.models.quantised.layers import is_quantised
from peftsweep.models.shortcuts import SHORTCUTS, Shortcuts

log = logging.getLogger(__name__)

UNDECLARED = ("xlnet", "prophetnet")  # types that see later tokens, which their configuration does not say

SHORT, LONG = 6, 11  # tokens of the two test rows
TEXTS = ("Is it?", "Two cats and one dog ran home in the rain.")  # test rows of a classifier, together and alone
LONGEST_TEXT = 24  # tokens of one, with special tokens
ABILITIES = "peftsweep_abilities"  # the attribute of a base that holds its abilities
SMALL = 50e6  # the most parameters of a test copy; no known encoder has more in a layer
# Largest mean difference of logits, in standard deviations of the logits. In 32 bits rounding is below 1e-5 of them.
EXACT, NARROW, ROUNDED = 1e-3, 0.05, 0.2  # 32 bits; 16 bits or 4-bit storage; 8-bit layers, which round their inputs


# Largest norm of the difference of losses or gradients, relative to theirs, in 32 bits; in other formats as above.
SAME_LOSSES = 1e-4


@dataclass(frozen=True)
class Abilities:
    """What the model supports. Otherwise rows are read one by one, by transformers' generation, with all logits."""

    padded_batches: bool  # a row padded on the left, in a batch, gets the logits that it gets alone
    row_cache: bool  # generation can go on from a cache of which some rows were selected
    shortcuts: Shortcuts = field(default_factory=Shortcuts)  # of a forward pass for losses

    def facts(self) -> dict[str, Any]:
        """All abilities by name, for a trial's record."""
        return asdict(self)


def abilities(model: nn.Module, known: Abilities | None = None) -> Abilities:
    """The abilities of the model's base, stored with it; probed at the first call, unless they are ``known``."""
    base = base_of(model)
    found: Abilities | None = getattr(base, ABILITIES, None)
    if found is None:
        found = known or probe(base)
        setattr(base, ABILITIES, found)
        setattr(base, SHORTCUTS, found.shortcuts)
    return found


@torch.no_grad()
def probe(base: Any) -> Abilities:
    """Compare the logits of two rows alone, in padded batches and with a cache.

    Raises:
        InputError: the model sees later tokens, padding on the right changes its output, or logits are not finite.
    """
    with _rows_rounded_alone(base):
        return _probe(base)


def _probe(base: Any) -> Abilities:
    reader = _Reader(base)
    short, long = reader.rows(SHORT + 1), reader.rows(LONG + 1)
    alone = [reader.alone(short), reader.alone(long)]
    if not all(bool(logits.isfinite().all()) for logits in alone):
        raise InputError(
            f"model: {type(base).__name__} gives NaN or infinite logits: its weights are damaged, or exceed "
            f"{base.dtype} (then use model.dtype=float32)"
        )
    if not reader.same(reader.alone(reader.other_end(long))[:, :SHORT], alone[1][:, :SHORT], reader.tolerance / 5):
        raise InputError(
            f"model.task=causal_lm: {type(base).__name__} sees the tokens that it is to predict, as encoders do; "
            "take model=encoder with dataset.classes, or a decoder"
        )
    right = reader.padded([short[:, :SHORT], long[:, :LONG]], left=False)
    if not reader.agree(right, alone, left=False):
        raise InputError(
            f"model: {type(base).__name__} reads padding as text, so it cannot be trained or evaluated in batches"
        )
    left = reader.padded([short[:, :SHORT], long[:, :LONG]], left=True)
    selects = reader.selects(left, [short, long], alone)
    found = Abilities(reader.agree(left, alone, left=True), selects, reader.shortcuts([short, long]))
    if not found.padded_batches:
        log.warning("%s reads padding on the left as text: rows are generated one by one", type(base).__name__)
    return found


@contextmanager
def _rows_rounded_alone(base: nn.Module) -> Iterator[None]:
    """In the body the output of an 8-bit layer for a token does not depend on the other tokens.

    LLM.int8 (arXiv 2208.07339, section 3.2) multiplies a column in 16 bits where any token of the input exceeds
    ``threshold`` in it, so the rounding of a token depends on later ones. With a threshold of 0 there are no such
    columns.
    """
    states = [module.state for module in base.modules() if isinstance(module, Linear8bitLt)]
    before = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold


@torch.no_grad()
def classifier_pads(base: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a classifier gives a row in a padded batch the logits that it gives it alone; remembered with ``base``.

    Convolutions, Fourier transforms, landmarks and pooling of neighbouring tokens take padding for text, and a head may
    take the last position for that of the last token. ``class_logits`` then gives ``base`` no padding.

    Raises:
        InputError: the classifier cannot read what the tokenizer gives.
    """
    ids = [tokenizer(text, truncation=True, max_length=LONGEST_TEXT).input_ids for text in TEXTS]
    rows, pad_id = [Tokens(row, len(row), label=0) for row in ids], int(cast(int, tokenizer.pad_token_id))
    setattr(base, READS_PADDING, False)
    with _rows_rounded_alone(base):
        try:
            alone = torch.cat([class_logits(base, collate([row], pad_id).to(base.device)) for row in rows])
        except ValueError as error:  # such as of BART, whose head reads the end mark, where the tokenizer adds none
            kind = type(base).__name__
            raise InputError(f"model: {kind} cannot read the rows of its tokenizer ({first_line(error)})") from error
        together = class_logits(base, collate(rows, pad_id).to(base.device))
    pads = bool((together - alone).norm() <= _Reader(base).tolerance * alone.norm())
    setattr(base, READS_PADDING, not pads)
    if not pads:
        log.warning("%s reads padding as text: it is given rows of one length at a time", type(base).__name__)
    return pads


def same_logits(base: Any, logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits of ``base``, [rows, vocabulary], are equal up to its number format's and quantisation's rounding.

    Each row is compared by itself, as most rows may be right by chance.
    """
    difference, spread = (logits.float() - expected.float()).abs().mean(-1), expected.float().std(-1)
    return bool((difference <= _Reader(base).tolerance * spread).all())


class _Reader:
    """Forward passes of test rows, and the tolerance between their logits."""

    def __init__(self, base: Any) -> None:
        self.base = base
        taken = inspect.signature(base.forward).parameters
        self.positioned = "position_ids" in taken
        self.vocabulary = int(base.get_input_embeddings().weight.shape[0])
        kinds = {type(module) for module in base.modules() if is_quantised(module)}
        exact = base.dtype == torch.float32 and not kinds
        self.tolerance = ROUNDED if any(issubclass(k, Linear8bitLt) for k in kinds) else EXACT if exact else NARROW

    def rows(self, length: int, start: int = 5) -> torch.Tensor:
        """A row of token ids spread over the vocabulary, [1, length]."""
        numbers = torch.arange(start, start + length, device=self.base.device) * 7919 + length
        return (numbers % self.vocabulary)[None]

    def other_end(self, row: torch.Tensor) -> torch.Tensor:
        """The row with other tokens from ``SHORT`` on."""
        return torch.cat([row[:, :SHORT], self.rows(row.shape[1], start=101)[:, SHORT:]], dim=1)

    def alone(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits of one row without padding or cache: [1, length, vocabulary]."""
        logits: torch.Tensor = self.base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return logits.float()

    def padded(self, rows: list[torch.Tensor], *, left: bool) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The model's output on a padded batch, its attention mask and its positions."""
        longest = max(row.shape[1] for row in rows)
        sides = [(longest - row.shape[1], 0) if left else (0, longest - row.shape[1]) for row in rows]
        ids = torch.cat([nn.functional.pad(row, side) for row, side in zip(rows, sides, strict=True)])
        mask = torch.cat([nn.functional.pad(torch.ones_like(r), side) for r, side in zip(rows, sides, strict=True)])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        placed = {"position_ids": positions} if self.positioned and left else {}
        return self.base(input_ids=ids, attention_mask=mask, use_cache=left, **placed), mask, positions

    def agree(self, batch: tuple[Any, torch.Tensor, torch.Tensor], alone: list[torch.Tensor], *, left: bool) -> bool:
        """Whether each row of a padded batch has the logits that it has alone."""
        logits = batch[0].logits.float()
        lengths = (SHORT, LONG)
        own = [row[-n:] if left else row[:n] for row, n in zip(logits, lengths, strict=True)]
        return all(self.same(a, b[0, :n]) for a, b, n in zip(own, alone, lengths, strict=True))

    def selects(
        self, batch: tuple[Any, torch.Tensor, torch.Tensor], rows: list[torch.Tensor], alone: list[torch.Tensor]
    ) -> bool:
        """Whether the next tokens get the right logits after rows of the cache were selected."""
        output, mask, positions = batch
        cache = getattr(output, "past_key_values", None)
        if not self.positioned or cache is None:
            return False
        chosen = torch.tensor([1, 1, 0], device=mask.device)
        following = torch.stack([rows[int(n)][0, -1:] for n in chosen])
        try:
            cache.batch_select_indices(chosen)
            after = self.base(
                input_ids=following,
                attention_mask=torch.cat([mask[chosen], mask.new_ones(len(chosen), 1)], dim=1),
                position_ids=positions[chosen, -1:] + 1,
                past_key_values=cache,
                use_cache=True,
            )
        except (AttributeError, NotImplementedError, RuntimeError, ValueError, IndexError):
            log.info("%s: rows of the cache cannot be selected", type(self.base).__name__, exc_info=True)
            return False
        return all(self.same(after.logits[n, -1].float(), alone[int(m)][0, -1]) for n, m in enumerate(chosen))

    def shortcuts(self, rows: list[torch.Tensor]) -> Shortcuts:
        """The likely shortcuts that do not change losses and gradients."""
        batch = collate([Tokens(row[0].tolist(), len(row[0]) // 2) for row in rows], 0).to(self.base.device)
        found = Shortcuts()
        try:
            plain = self._losses(batch, found)
            for name, likely in vars(likely_shortcuts(self.base)).items():
                more = replace(found, **{name: likely})
                if likely and self._equal(self._losses(batch, more), plain):
                    found = more
        except (RuntimeError, NotImplementedError) as error:  # such as a kernel without a backward
            log.info("%s: losses are computed from all logits: %s", type(self.base).__name__, error)
        return found

    def _losses(self, batch: Batch, short: Shortcuts) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of the batch's answers, and their gradient at the output of the embeddings."""
        embedded: list[torch.Tensor] = []

        def as_leaf(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1].clone()  # some models scale it in place

        hook = self.base.get_input_embeddings().register_forward_hook(as_leaf)
        setattr(self.base, SHORTCUTS, short)
        try:
            with torch.enable_grad():
                losses = answer_losses(self.base, batch)
                (gradient,) = torch.autograd.grad(losses.sum(), embedded[:1])
            return losses.detach(), gradient
        finally:
            hook.remove()
            delattr(self.base, SHORTCUTS)

    def _equal(self, found: tuple[torch.Tensor, ...], plain: tuple[torch.Tensor, ...]) -> bool:
        limit = SAME_LOSSES if self.tolerance == EXACT else self.tolerance
        return all(bool((a - b).norm() <= limit * b.norm()) for a, b in zip(found, plain, strict=True))

    def same(self, one: torch.Tensor, other: torch.Tensor, tolerance: float | None = None) -> bool:
        """Whether logits are equal up to rounding."""
        limit = self.tolerance if tolerance is None else tolerance
        return bool((one - other).abs().mean() <= limit * other.std())


_LIKELY: dict[tuple[Any, ...], Shortcuts] = {}  # by all that they depend on


def known_shortcuts(base: Any) -> Shortcuts:
    """``likely_shortcuts``, cached: the forecasts of a sweep need them for each of its methods."""
    settings = base.config.to_dict()
    settings.pop("quantization_config", None)  # the storage of layers does not change the shortcuts
    stated = json.dumps(settings, sort_keys=True, default=str), text_config(base)._attn_implementation
    key = type(base), *stated, type(head := base.get_output_embeddings()), shortcuts.is_linear(head)
    if key not in _LIKELY:
        _LIKELY[key] = likely_shortcuts(base)
    return _LIKELY[key]


@torch.no_grad()
def likely_shortcuts(base: Any) -> Shortcuts:
    """The shortcuts that the structure of a causal model allows."""
    head = base.get_output_embeddings()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=base.device)
    no_mask = _plainly_causal(base) and _runs_without_mask(base, ids)
    if not shortcuts.is_linear(head):
        return Shortcuts(no_mask=no_mask)
    returned: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _, __, output: returned.append(output))
    logits = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    hook.remove()
    once = len(returned) == 1 and returned[0].shape[:-1] == ids.shape  # ProphetNet predicts several tokens at once
    return Shortcuts(answers_only=once, bare_head=once and logits is returned[0], no_mask=no_mask)


def _runs_without_mask(base: Any, ids: torch.Tensor) -> bool:
    """Whether the layers run without a mask; Falcon's need one."""
    try:
        with shortcuts.causal_only(text_config(base)):
            base(input_ids=ids, use_cache=False)
    except Exception:
        log.info("%s: attention masks are kept", type(base).__name__, exc_info=True)
        return False
    return True


def _plainly_causal(base: Any) -> bool:
    """Whether every layer attends to all earlier tokens, by torch's own kernels.

    Layers with windows, chunks, convolutions or states keep their mask: a short probe cannot show its effect. So do
    models that search the tokens for padding if they get no mask, for which the host waits for the device.
    """
    config = text_config(base)
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    full = set(getattr(config, "layer_types", None) or ()) <= {"full_attention"} and not any(limits)
    forwards = [inspect.unwrap(type(m).forward) for m in base.modules() if isinstance(m, PreTrainedModel)]
    looks = any("warn_if_padding_and_no_attention_mask" in forward.__code__.co_names for forward in forwards)
    stateless = not getattr(base, "_is_stateful", False) and text_part(base) is base
    return config._attn_implementation == "sdpa" and full and stateless and not looks


def check_causal(shape: Any, make: Any) -> None:
    """Refuse an encoder before its weights are loaded: a small copy with random weights must not see later tokens.

    ``shape`` is the transformers configuration, and ``make`` builds a model from one. Only configurations that can be
    of an encoder (with ``is_decoder``, or ``UNDECLARED``) are tested here; ``probe`` tests all models when they are
    loaded.

    Raises:
        InputError: it sees later tokens.
    """
    if shape.model_type not in UNDECLARED and getattr(text_config(shape), "is_decoder", True) is not False:
        return
    small = type(shape).from_dict(shape.to_dict() | {"pad_token_id": 0})
    small.num_hidden_layers, small.vocab_size = 1, 64
    with torch.device("meta"):
        if sum(parameter.numel() for parameter in make(small).parameters()) > SMALL:
            return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe(make(small).float().eval())
