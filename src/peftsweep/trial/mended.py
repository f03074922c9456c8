"""Known faults of earlier versions, and which records hold wrong numbers because of them.

A record of such a version counts as done unless one of these faults made its numbers wrong; then the trial is run
again. A wrong record is recognised by its configuration, the counts of its training, and the base's files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from peftsweep.config.identity import CONVERSATIONS, model_identity
from peftsweep.data import chat, fingerprint
from peftsweep.errors import InputError
from peftsweep.models.compatibility import PREFIX_METHODS
from peftsweep.schema import Dtype, Init, ModelConfig, Task
from peftsweep.study.record import Result
from peftsweep.trial import affected_rows, generation

Values = Mapping[str, Any]
ALL_LINEAR = "all-linear"  # PEFT's value of target_modules for all linear layers
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")  # module names that parts of a router have, too
# Types of encoders that take padding for text: by convolutions, Fourier transforms, landmarks, pooling, the last place.
READING_PADDING = ("canine", "convbert", "fnet", "funnel", "nystromformer", "perceiver", "xlnet", "yoso")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Mended:
    """A fault that made the numbers of some trials wrong, until a rule of identities."""

    rule: int  # of the first version without the fault
    concerns: Callable[[Values, Values], bool]  # (configuration, train_info of the record) -> whether it is affected
    reason: str
    training: bool = True  # whether it made the trained weights wrong; else only scores, and the weights can be kept


def rule_of(result: Result) -> int:
    """The version of the rule that made a record's identity; the first version did not write it."""
    return int(result.run_info.get("identity_rule", 1))


def outdated(result: Result, *, training: bool = False) -> str | None:
    """The reason why the numbers of a record of an earlier version are wrong; None where no fault is known.

    With ``training`` only faults of the trained weights count.
    """
    mine = rule_of(result)
    faults = (fault for fault in MENDED if mine < fault.rule and (fault.training or not training))
    return next((fault.reason for fault in faults if fault.concerns(result.config, result.train_info)), None)


def right_since(tree: Values) -> int:
    """The first rule whose versions train this configuration to the same weights as this version."""
    return max((fault.rule for fault in MENDED if fault.training and fault.concerns(tree, {})), default=1)


# ---- what a fault concerned ------------------------------------------------------------------------


def _accumulates(config: Values, _: Values) -> bool:
    return (_section(config, "train").get("accumulation") or 1) > 1


def _converses(config: Values, _: Values) -> bool:
    dataset = _section(config, "dataset")
    return bool(dataset.get("chat")) or dataset.get("reader") == CONVERSATIONS


def _lost_its_beginning(config: Values, train_info: Values) -> bool:
    return bool(train_info.get("truncated_rows")) and _base(config).begins


def _answer_after_an_end(config: Values, _: Values) -> bool:
    return _base(config).ends


def _names_in_another_order(config: Values, _: Values) -> bool:
    names, classes = _base(config).head, _section(config, "dataset").get("classes") or []
    return names is not None and sorted(names) == sorted(classes) and names != list(classes)


def _adapts_by_role(config: Values) -> bool:
    targets = _section(config, "targets")
    return bool(config.get("method")) and not targets.get("modules")


def _reads_more_than_text(config: Values, _: Values) -> bool:
    return _adapts_by_role(config) and _base(config).composite


def _has_experts(config: Values, _: Values) -> bool:
    return _adapts_by_role(config) and _base(config).experts


def _adapts_routers(config: Values, _: Values) -> bool:
    if not _adapts_by_role(config):
        return False
    targets = _section(config, "targets")
    if targets.get("all_linear") or _section(config, "method").get("target_modules") == ALL_LINEAR:
        return bool(_base(config).linear_routers)
    return "mlp" in (targets.get("roles") or ()) and bool(_base(config).linear_routers & set(MLP_NAMES))


def _recurs(config: Values, _: Values) -> bool:
    return _base(config).recurrent


def _writes(config: Values) -> bool:
    return any("max_new_tokens" in node for node in _evaluations(config))


def _ways_of_writing(config: Values) -> tuple[bool, bool]:
    """Whether texts are written by beams, and whether without a cache; both by transformers' own generation."""
    by_beams = any((node.get("num_beams") or 1) > 1 for node in _evaluations(config) if "max_new_tokens" in node)
    without_cache = bool(config.get("method_inputs")) or _is_prompt_learning(_section(config, "method"))
    return by_beams, without_cache and _writes(config)


def _writes_by_own_settings(config: Values, _: Values) -> bool:
    by_beams, without_cache = _ways_of_writing(config)
    if not by_beams and not without_cache:
        return False
    return bool(
        _base(config).own_settings if by_beams else _base(config).own_settings - generation.BEAM_SETTINGS.keys()
    )


def _generation_prompt_differs(config: Values, _: Values) -> bool:
    dataset = _section(config, "dataset")
    if not dataset.get("chat") or not _base(config).generation_prompt_differs:
        return False
    return affected_rows.has_other_turns(dataset, _evaluations(config))


def _trains_beside_turns(config: Values, _: Values) -> bool:
    return bool(_section(config, "dataset").get("chat")) and _base(config).writes_beside_turns


def _leaves_out_openings(config: Values, _: Values) -> bool:
    dataset = _section(config, "dataset")
    if not dataset.get("chat") or not _base(config).opens_after_calls:
        return False
    return affected_rows.has_other_turns(dataset, _evaluations(config))


def _leaves_out_reasoning(config: Values, _: Values) -> bool:
    dataset = _section(config, "dataset")
    if not dataset.get("chat") or not (keys := _base(config).reasoning_keys):
        return False
    return affected_rows.reasons_under_other_keys(dataset, _evaluations(config), keys)


def _calls_in_other_forms(config: Values, _: Values) -> bool:
    dataset = _section(config, "dataset")
    if not dataset.get("chat") or not _base(config).calls_otherwise:
        return False
    return affected_rows.calls_tools(dataset, _evaluations(config))


def _trains_on_items_of_text(config: Values, _: Values) -> bool:
    dataset = _section(config, "dataset")
    return affected_rows.takes_items_of_text(dataset, dataset)


def _asks_for_items_of_text(config: Values, _: Values) -> bool:
    dataset = _section(config, "dataset")
    own = {**dataset, "path": dataset.get("test_path") or dataset.get("path")}
    nodes = _evaluations(config)
    return any(affected_rows.takes_items_of_text(node, node if node.get("path") else own) for node in nodes)


def _evaluations(config: Values) -> list[Values]:
    return [node for node in _section(config, "eval").values() if isinstance(node, Mapping)]


def _is_prompt_learning(method: Values) -> bool:
    import peft  # which imports torch, which `--help` must not

    package, _, name = str(method.get("_target_")).rpartition(".")
    kind = getattr(peft, name, None) if package.partition(".")[0] == "peft" else None
    return isinstance(kind, type) and issubclass(kind, peft.PromptLearningConfig)


def _writes_behind_virtual_tokens(config: Values, _: Values) -> bool:
    method = _section(config, "method")
    if not any("max_new_tokens" in node for node in _section(config, "eval").values()):
        return False
    # Prefixes need no positions of their own.
    return _is_prompt_learning(method) and not str(method["_target_"]).endswith((*PREFIX_METHODS,))


def _decays_with_lora_plus(config: Values, _: Values) -> bool:
    train = _section(config, "train")
    return str(train.get("optimizer")).endswith("create_loraplus_optimizer") and bool(train.get("weight_decay"))


def _balances_experts(config: Values, _: Values) -> bool:
    train, adapter = _section(config, "train"), _section(config, "adapter")
    trains = bool(train.get("steps") or train.get("epochs")) and not adapter.get("path")
    return trains and _base(config).balances


def _classifies_padding(config: Values, _: Values) -> bool:
    return _base(config).classifies_padding


def _packs_embeddings(config: Values, train_info: Values) -> bool:
    """Whether an adapter of embeddings was trained in a pack, which only ``train_info`` says: without it, perhaps."""
    method, targets = _section(config, "method"), _section(config, "targets")
    named = targets.get("modules") or method.get("target_modules") or ()
    if (train_info and "packed" not in train_info) or named == ALL_LINEAR:
        return False
    ends = rf"(.*\.)?({'|'.join(map(re.escape, named))})"
    pattern = named if isinstance(named, str) else ends if named else None
    return pattern is not None and any(re.fullmatch(pattern, name) for name in _base(config).embeddings)


def _deals_ranks_after_the_best(config: Values, train_info: Values) -> bool:
    train, method = _section(config, "train"), _section(config, "method")
    keeps = bool(train.get("keep_best")) and str(method.get("_target_")).endswith("AdaLoraConfig")
    return keeps and (not train_info or train_info.get("reloads") is False)


def _keeps_long_rows(config: Values, train_info: Values) -> bool:
    """Whether rows were cut that were to be left out, which only ``train_info`` says: without it, perhaps."""
    leaves_out = bool(_section(config, "dataset").get("drop_long"))
    return leaves_out and (not train_info or bool(train_info.get("truncated_rows")))


def _compares_names_without_ends(config: Values, _: Values) -> bool:
    from peftsweep.evaluation import evaluate  # which imports torch, which `--help` must not

    if _section(config, "model").get("task") == Task.seq_cls.name:
        return False
    nodes = [node for node in _evaluations(config) if str(node.get("_target_")).endswith(".classification")]
    return any(evaluate.begin_alike(node.get("classes") or ()) for node in nodes)


def _writes_its_end(config: Values, _: Values) -> bool:
    by_transformers = any(_ways_of_writing(config)) or (_writes(config) and _base(config).recurrent)
    return by_transformers and _base(config).plain_end


def _begins_behind_tokens(config: Values, _: Values) -> bool:
    return bool(_section(config, "method").get("alora_invocation_tokens"))


def _chooses_among_parameters(config: Values, _: Values) -> bool:
    method, roles = _section(config, "method"), _section(config, "targets").get("roles") or ()
    chooses = any(method.get(key) not in (None, [], "") for key in ("layers_to_transform", "exclude_modules"))
    return chooses and bool(method.get("target_parameters") or ("experts" in roles and _base(config).experts))


MENDED = (
    Mended(2, _accumulates, "with train.accumulation above 1 a step took other rows than one large batch would have"),
    Mended(
        2,
        _converses,
        "conversations were tokenised by other rules than the chat template's, and trained on the last turn only",
    ),
    Mended(2, _lost_its_beginning, "rows that were cut to dataset.max_length lost their beginning-of-sequence token"),
    Mended(2, _answer_after_an_end, "the tokenizer's end-of-sequence token stood between prompt and answer"),
    Mended(2, _names_in_another_order, "the classes of the checkpoint's head were taken in the order of the dataset's"),
    Mended(2, _reads_more_than_text, "parts of the model that read no text were adapted too"),
    Mended(2, _has_experts, "the roles of a mixture of experts named other weights"),
    Mended(3, _adapts_routers, "what chooses among a mixture's experts was adapted too, as it is linear in this model"),
    Mended(2, _recurs, "left-padded batches changed the answers of layers that carry a state from token to token"),
    Mended(
        4,
        _writes_by_own_settings,
        "the base's own generation settings, such as a repetition penalty, changed what it wrote",
        training=False,
    ),
    Mended(
        5,
        _balances_experts,
        "the load-balancing loss of the routers, which the base's configuration asks for, was left out",
    ),
    Mended(
        5,
        _generation_prompt_differs,
        "after a generation prompt that opens or closes the reasoning, turns that reason, call a tool or are empty "
        "were trained on from another place than their beginning",
    ),
    Mended(
        5,
        _trains_on_items_of_text,
        "an item of a list that the rows hold as JSON text, such as {answers[0]}, was one character of that text",
    ),
    Mended(
        5,
        _asks_for_items_of_text,
        "an item of a list that the test rows hold as JSON text, such as {answers[0]}, was one character of that text",
        training=False,
    ),
    Mended(6, _classifies_padding, "the classifier took the padding of a batch for text"),
    Mended(
        6,
        _deals_ranks_after_the_best,
        "the best weights of AdaLoRA were saved with the ranks that were allocated after them",
    ),
    Mended(
        6,
        _begins_behind_tokens,
        "of what was read after cached tokens, an adapter with alora_invocation_tokens took no part in it",
        training=False,
    ),
    Mended(6, _packs_embeddings, "a pack neither trained nor used the adapters of embeddings"),
    Mended(7, _decays_with_lora_plus, "train.weight_decay had no effect with LoRA+"),
    Mended(
        7,
        _writes_behind_virtual_tokens,
        "texts depended on the padding of their batch, which moved the positions of the prompts",
        training=False,
    ),
    Mended(
        8,
        _trains_beside_turns,
        "what the chat template writes after the last turn of every conversation, such as the beginning of a next "
        "turn, was trained on",
    ),
    Mended(
        8,
        _leaves_out_openings,
        "in conversations that reason or call tools, what the chat template writes before the content of some answers "
        "was not trained on",
    ),
    Mended(
        9,
        _leaves_out_reasoning,
        "reasoning under another key than the chat template writes, such as reasoning for reasoning_content, was left "
        "out",
    ),
    Mended(
        9,
        _keeps_long_rows,
        "long rows of a classifier, or for the model's positions, were cut, though dataset.drop_long leaves them out",
    ),
    Mended(
        9,
        _compares_names_without_ends,
        "a class whose name begins with that of another one, such as 10 with 1, could not be found, as the end of the "
        "name did not count",
        training=False,
    ),
    Mended(
        9,
        _writes_its_end,
        "an end mark that is no special token of the tokenizer was a part of the texts that beams wrote",
        training=False,
    ),
    Mended(
        10,
        _chooses_among_parameters,
        "method.layers_to_transform and exclude_modules did not hold for parameters, such as experts: those of all "
        "layers were adapted",
    ),
    Mended(11, _calls_in_other_forms, "tool calls were trained on in another form than the chat template expects"),
)


# ---- the base of a record --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Base:
    """The facts about a base, read from its files, that decide which faults concerned it."""

    begins: bool = False  # its tokenizer puts a beginning-of-sequence token before each text
    ends: bool = False  # and an end-of-sequence token after it
    head: list[str] | None = None  # the names of its head's outputs
    composite: bool = False  # it reads more than text
    experts: bool = False
    linear_routers: frozenset[str] = frozenset()  # the last part of the names of linear routers of experts
    recurrent: bool = False
    balances: bool = False  # it adds a loss of its routers in training
    own_settings: frozenset[str] = frozenset()  # its generation settings that change what it writes
    classifies_padding: bool = False  # it is a classifier of a type that takes padding for text
    embeddings: frozenset[str] = frozenset()  # the names of its embeddings
    generation_prompt_differs: bool = False  # from the beginning of some written turns of the assistant
    writes_beside_turns: bool = False  # its chat template, after the last one
    opens_after_calls: bool = False  # its chat template, the answer, beyond the generation prompt
    reasoning_keys: tuple[str, ...] = ()  # that its chat template writes
    calls_otherwise: bool = False  # its chat template, than rows may hold them
    plain_end: bool = False  # it ends a text with a token that its tokenizer writes as text


def _base(config: Values) -> _Base:
    settings = {
        field.name: value for field in fields(ModelConfig) if (value := _section(config, "model").get(field.name))
    }
    kinds = {"task": Task, "init": Init, "dtype": Dtype}
    try:
        base = ModelConfig(**settings | {key: kind(settings[key]) for key, kind in kinds.items() if key in settings})
        key = fingerprint.of_values(model_identity(base))
        if key not in _BASES:
            _BASES[key] = _read(base)
        return _BASES[key]
    except (InputError, TypeError, ValueError):  # the base is missing now: the trial itself will report that
        return _Base()


_BASES: dict[str, _Base] = {}  # by the content of their files


def _read(base: ModelConfig) -> _Base:
    from torch import nn  # which `--help` must not import

    from peftsweep.models import model, parts

    shape, marks = model.architecture(base), model.load_tokenizer(base)
    bare = model.skeleton(base, classes=1)
    template = chat.ChatTemplate(marks) if marks.chat_template else None
    ids, text, ends = marks("a").input_ids, parts.text_config(shape), generation.ends(base, marks)
    layers = getattr(text, "layer_types", None) or []
    stateful = [kind for kind in layers if not kind.endswith("attention") or kind == "linear_attention"]
    return _Base(
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


def _section(config: Values, name: str) -> Values:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}
