"""Facts about the base that a record names, as far as they decide which faults concerned the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from peftsweep.config.identity import model_identity
from peftsweep.data import chat, fingerprint
from peftsweep.errors import InputError
from peftsweep.schema import Dtype, Init, ModelConfig, Task
from peftsweep.trial.faults import generation

Values = Mapping[str, Any]
# Types of encoders that take padding for text: by convolutions, Fourier transforms, landmarks, pooling, the last place.
READING_PADDING = ("canine", "convbert", "fnet", "funnel", "nystromformer", "perceiver", "xlnet", "yoso")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Base:
    """The facts about a base, read from its files, that decide which faults concerned it."""

    begins: bool = False  # its tokenizer puts a beginning-of-sequence token before each text
    ends: bool = False  # its tokenizer puts an end-of-sequence token after each text
    head: list[str] | None = None  # the names of its head's outputs
    composite: bool = False  # it reads more than text
    experts: bool = False  # it is a mixture of experts
    linear_routers: frozenset[str] = frozenset()  # the last part of the names of linear routers of experts
    recurrent: bool = False  # it has layers that carry a state from token to token
    balances: bool = False  # it adds a loss of its routers in training
    own_settings: frozenset[str] = frozenset()  # its generation settings that change what it writes
    classifies_padding: bool = False  # it is a classifier of a type that takes padding for text
    embeddings: frozenset[str] = frozenset()  # the names of its embeddings
    generation_prompt_differs: bool = False  # some turns of the assistant do not begin with its generation prompt
    writes_beside_turns: bool = False  # its chat template writes something after the last turn
    opens_after_calls: bool = False  # its chat template opens some answers with more than the generation prompt
    reasoning_keys: tuple[str, ...] = ()  # the keys whose reasoning its chat template writes, if not all are written
    calls_otherwise: bool = False  # its chat template writes tool calls in another form than rows may hold
    plain_end: bool = False  # it ends a text with a token that its tokenizer writes as text


def base_of(config: Values) -> Base:
    """The facts about the base that a record's configuration names; none of them holds where its files are missing."""
    settings = {
        field.name: value for field in fields(ModelConfig) if (value := section(config, "model").get(field.name))
    }
    kinds = {"task": Task, "init": Init, "dtype": Dtype}
    try:
        base = ModelConfig(**settings | {key: kind(settings[key]) for key, kind in kinds.items() if key in settings})
        key = fingerprint.of_values(model_identity(base))
        if key not in _BASES:
            _BASES[key] = _read(base)
        return _BASES[key]
    except (InputError, TypeError, ValueError):  # the base is missing now: the trial itself will report that
        return Base()


_BASES: dict[str, Base] = {}  # by the content of their files


def _read(base: ModelConfig) -> Base:
    from torch import nn  # which `--help` must not import

    from peftsweep.models import model, parts

    shape, marks = model.architecture(base), model.load_tokenizer(base)
    bare = model.skeleton(base, classes=1)
    template = chat.ChatTemplate(marks) if marks.chat_template else None
    ids, text, ends = marks("a").input_ids, parts.text_config(shape), generation.ends(base, marks)
    layers = getattr(text, "layer_types", None) or []
    stateful = [kind for kind in layers if not kind.endswith("attention") or kind == "linear_attention"]
    return Base(
        begins=marks.bos_token_id is not None and ids[0] == marks.bos_token_id,
        ends=marks.eos_token_id is not None and ids[-1] == marks.eos_token_id and base.task is Task.causal_lm,
        head=parts.head_classes(shape) if base.task is Task.seq_cls else None,
        composite=text is not shape,
        experts=any((getattr(text, name, None) or 0) > 1 for name in EXPERT_COUNTS),
        linear_routers=frozenset(
            name.rpartition(".")[2]
            for name in parts.router_modules(bare)
            if isinstance(bare.get_submodule(name), nn.Linear)
        ),
        recurrent=bool(stateful) or bool(getattr(bare, "_is_stateful", False)),
        balances=hasattr(bare, parts.ROUTER_LOSS),
        own_settings=generation.own_settings(base) if base.init is Init.pretrained else frozenset(),
        classifies_padding=base.task is Task.seq_cls and shape.model_type in READING_PADDING,
        embeddings=frozenset(name for name, module in bare.named_modules() if isinstance(module, nn.Embedding)),
        generation_prompt_differs=template is not None and chat.generation_prompt_differs(template),
        writes_beside_turns=template is not None and chat.writes_beside_turns(template),
        opens_after_calls=template is not None and chat.opens_after_calls(template),
        calls_otherwise=template is not None and chat.writes_calls_otherwise(template),
        reasoning_keys=()
        if template is None or set(template.reasoning_keys) == {*chat.REASONING}
        else template.reasoning_keys,
        plain_end=any(marks.decode([end], skip_special_tokens=True) for end in ends),
    )


def section(config: Values, name: str) -> Values:
    """A section of a record's configuration; empty where the record has none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}
