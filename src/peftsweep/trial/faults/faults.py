"""Known faults of earlier versions, and which records hold wrong numbers because of them.

A record of such a version counts as done unless one of these faults made its numbers wrong; then the trial is run
again. A wrong record is recognised by its configuration, the counts of its training, and the base's files. A new fault
is a function under ``_fault``, which says in which records the numbers are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peftsweep.config.identity import CONVERSATIONS
from peftsweep.models.compatibility import PREFIX_METHODS
from peftsweep.schema import Task
from peftsweep.study.record import Result
from peftsweep.trial.faults import generation, rows
from peftsweep.trial.faults.base import base_of, section

Values = Mapping[str, Any]
Concerns = Callable[[Values, Values], bool]  # (configuration, train_info of the record) -> whether it is affected
ALL_LINEAR = "all-linear"  # PEFT's value of target_modules for all linear layers
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")  # module names that parts of a router have, too


@dataclass(frozen=True)
class Fault:
    """A fault that made the numbers of some trials wrong, until a rule of identities."""

    rule: int  # of the first version without the fault
    concerns: Concerns
    reason: str
    training: bool = True  # whether it made the trained weights wrong; else only scores, and the weights can be kept


FAULTS: list[Fault] = []  # in the order of their functions below; of several, the first is named


def rule_of(result: Result) -> int:
    """The version of the rule that made a record's identity; the first version did not write it."""
    return int(result.run_info.get("identity_rule", 1))


def outdated(result: Result, *, training: bool = False) -> str | None:
    """The reason why the numbers of a record of an earlier version are wrong; None where no fault is known.

    With ``training`` only faults of the trained weights count.
    """
    mine = rule_of(result)
    faults = (fault for fault in FAULTS if mine < fault.rule and (fault.training or not training))
    return next((fault.reason for fault in faults if fault.concerns(result.config, result.train_info)), None)


def right_since(tree: Values) -> int:
    """The first rule whose versions train this configuration to the same weights as this version."""
    return max((fault.rule for fault in FAULTS if fault.training and fault.concerns(tree, {})), default=1)


def _fault(rule: int, reason: str, *, training: bool = True) -> Callable[[Concerns], Concerns]:
    """Add the decorated function to ``FAULTS``; the arguments are those of ``Fault``."""

    def add(concerns: Concerns) -> Concerns:
        FAULTS.append(Fault(rule, concerns, reason, training))
        return concerns

    return add


# ---- the faults ------------------------------------------------------------------------------------


@_fault(2, "with train.accumulation above 1 a step took other rows than one large batch would have")
def _accumulates(config: Values, _: Values) -> bool:
    return (section(config, "train").get("accumulation") or 1) > 1


@_fault(2, "conversations were tokenised by other rules than the chat template's, and trained on the last turn only")
def _converses(config: Values, _: Values) -> bool:
    dataset = section(config, "dataset")
    return bool(dataset.get("chat")) or dataset.get("reader") == CONVERSATIONS


@_fault(2, "rows that were cut to dataset.max_length lost their beginning-of-sequence token")
def _lost_its_beginning(config: Values, train_info: Values) -> bool:
    return bool(train_info.get("truncated_rows")) and base_of(config).begins


@_fault(2, "the tokenizer's end-of-sequence token stood between prompt and answer")
def _answer_after_an_end(config: Values, _: Values) -> bool:
    return base_of(config).ends


@_fault(2, "the classes of the checkpoint's head were taken in the order of the dataset's")
def _names_in_another_order(config: Values, _: Values) -> bool:
    names, classes = base_of(config).head, section(config, "dataset").get("classes") or []
    return names is not None and sorted(names) == sorted(classes) and names != list(classes)


@_fault(2, "parts of the model that read no text were adapted too")
def _reads_more_than_text(config: Values, _: Values) -> bool:
    return _adapts_by_role(config) and base_of(config).composite


@_fault(2, "the roles of a mixture of experts named other weights")
def _has_experts(config: Values, _: Values) -> bool:
    return _adapts_by_role(config) and base_of(config).experts


@_fault(3, "what chooses among a mixture's experts was adapted too, as it is linear in this model")
def _adapts_routers(config: Values, _: Values) -> bool:
    if not _adapts_by_role(config):
        return False
    targets = section(config, "targets")
    if targets.get("all_linear") or section(config, "method").get("target_modules") == ALL_LINEAR:
        return bool(base_of(config).linear_routers)
    return "mlp" in (targets.get("roles") or ()) and bool(base_of(config).linear_routers & set(MLP_NAMES))


@_fault(2, "left-padded batches changed the answers of layers that carry a state from token to token")
def _recurs(config: Values, _: Values) -> bool:
    return base_of(config).recurrent


@_fault(4, "the base's own generation settings, such as a repetition penalty, changed what it wrote", training=False)
def _writes_by_own_settings(config: Values, _: Values) -> bool:
    by_beams, without_cache = _ways_of_writing(config)
    if not by_beams and not without_cache:
        return False
    return bool(
        base_of(config).own_settings if by_beams else base_of(config).own_settings - generation.BEAM_SETTINGS.keys()
    )


@_fault(5, "the load-balancing loss of the routers, which the base's configuration asks for, was left out")
def _balances_experts(config: Values, _: Values) -> bool:
    train, adapter = section(config, "train"), section(config, "adapter")
    trains = bool(train.get("steps") or train.get("epochs")) and not adapter.get("path")
    return trains and base_of(config).balances


@_fault(
    5,
    "after a generation prompt that opens or closes the reasoning, turns that reason, call a tool or are empty "
    "were trained on from another place than their beginning",
)
def _generation_prompt_differs(config: Values, _: Values) -> bool:
    dataset = section(config, "dataset")
    if not dataset.get("chat") or not base_of(config).generation_prompt_differs:
        return False
    return rows.has_other_turns(dataset, _evaluations(config))


@_fault(5, "an item of a list that the rows hold as JSON text, such as {answers[0]}, was one character of that text")
def _trains_on_items_of_text(config: Values, _: Values) -> bool:
    dataset = section(config, "dataset")
    return rows.takes_items_of_text(dataset, dataset)


@_fault(
    5,
    "an item of a list that the test rows hold as JSON text, such as {answers[0]}, was one character of that text",
    training=False,
)
def _asks_for_items_of_text(config: Values, _: Values) -> bool:
    dataset = section(config, "dataset")
    own = {**dataset, "path": dataset.get("test_path") or dataset.get("path")}
    nodes = _evaluations(config)
    return any(rows.takes_items_of_text(node, node if node.get("path") else own) for node in nodes)


@_fault(6, "the classifier took the padding of a batch for text")
def _classifies_padding(config: Values, _: Values) -> bool:
    return base_of(config).classifies_padding


@_fault(6, "the best weights of AdaLoRA were saved with the ranks that were allocated after them")
def _deals_ranks_after_the_best(config: Values, train_info: Values) -> bool:
    train, method = section(config, "train"), section(config, "method")
    keeps = bool(train.get("keep_best")) and str(method.get("_target_")).endswith("AdaLoraConfig")
    return keeps and (not train_info or train_info.get("reloads") is False)


@_fault(
    6,
    "of what was read after cached tokens, an adapter with alora_invocation_tokens took no part in it",
    training=False,
)
def _begins_behind_tokens(config: Values, _: Values) -> bool:
    return bool(section(config, "method").get("alora_invocation_tokens"))


@_fault(6, "a pack neither trained nor used the adapters of embeddings")
def _packs_embeddings(config: Values, train_info: Values) -> bool:
    """Whether an adapter of embeddings was trained in a pack, which only ``train_info`` says: without it, perhaps."""
    method, targets = section(config, "method"), section(config, "targets")
    named = targets.get("modules") or method.get("target_modules") or ()
    if (train_info and "packed" not in train_info) or named == ALL_LINEAR:
        return False
    ends = rf"(.*\.)?({'|'.join(map(re.escape, named))})"
    pattern = named if isinstance(named, str) else ends if named else None
    return pattern is not None and any(re.fullmatch(pattern, name) for name in base_of(config).embeddings)


@_fault(7, "train.weight_decay had no effect with LoRA+")
def _decays_with_lora_plus(config: Values, _: Values) -> bool:
    train = section(config, "train")
    return str(train.get("optimizer")).endswith("create_loraplus_optimizer") and bool(train.get("weight_decay"))


@_fault(7, "texts depended on the padding of their batch, which moved the positions of the prompts", training=False)
def _writes_behind_virtual_tokens(config: Values, _: Values) -> bool:
    method = section(config, "method")
    if not _writes(config):
        return False
    # Prefixes need no positions of their own.
    return _is_prompt_learning(method) and not str(method["_target_"]).endswith((*PREFIX_METHODS,))


@_fault(
    8,
    "what the chat template writes after the last turn of every conversation, such as the beginning of a next "
    "turn, was trained on",
)
def _trains_beside_turns(config: Values, _: Values) -> bool:
    return bool(section(config, "dataset").get("chat")) and base_of(config).writes_beside_turns


@_fault(
    8,
    "in conversations that reason or call tools, what the chat template writes before the content of some answers "
    "was not trained on",
)
def _leaves_out_openings(config: Values, _: Values) -> bool:
    dataset = section(config, "dataset")
    if not dataset.get("chat") or not base_of(config).opens_after_calls:
        return False
    return rows.has_other_turns(dataset, _evaluations(config))


@_fault(
    9,
    "reasoning under another key than the chat template writes, such as reasoning for reasoning_content, was left out",
)
def _leaves_out_reasoning(config: Values, _: Values) -> bool:
    dataset = section(config, "dataset")
    if not dataset.get("chat") or not (keys := base_of(config).reasoning_keys):
        return False
    return rows.reasons_under_other_keys(dataset, _evaluations(config), keys)


@_fault(
    9,
    "long rows of a classifier, or for the model's positions, were cut, though dataset.drop_long leaves them out",
)
def _keeps_long_rows(config: Values, train_info: Values) -> bool:
    """Whether rows were cut that were to be left out, which only ``train_info`` says: without it, perhaps."""
    leaves_out = bool(section(config, "dataset").get("drop_long"))
    return leaves_out and (not train_info or bool(train_info.get("truncated_rows")))


@_fault(
    9,
    "a class whose name begins with that of another one, such as 10 with 1, could not be found, as the end of the "
    "name did not count",
    training=False,
)
def _compares_names_without_ends(config: Values, _: Values) -> bool:
    from peftsweep.evaluation import evaluate  # which imports torch, which `--help` must not

    if section(config, "model").get("task") == Task.seq_cls.name:
        return False
    nodes = [node for node in _evaluations(config) if str(node.get("_target_")).endswith(".classification")]
    return any(evaluate.begin_alike(node.get("classes") or ()) for node in nodes)


@_fault(
    9,
    "an end mark that is no special token of the tokenizer was a part of the texts that beams wrote",
    training=False,
)
def _writes_its_end(config: Values, _: Values) -> bool:
    by_transformers = any(_ways_of_writing(config)) or (_writes(config) and base_of(config).recurrent)
    return by_transformers and base_of(config).plain_end


@_fault(
    10,
    "method.layers_to_transform and exclude_modules did not hold for parameters, such as experts: those of all "
    "layers were adapted",
)
def _chooses_among_parameters(config: Values, _: Values) -> bool:
    method, roles = section(config, "method"), section(config, "targets").get("roles") or ()
    chooses = any(method.get(key) not in (None, [], "") for key in ("layers_to_transform", "exclude_modules"))
    return chooses and bool(method.get("target_parameters") or ("experts" in roles and base_of(config).experts))


@_fault(11, "tool calls were trained on in another form than the chat template expects")
def _calls_in_other_forms(config: Values, _: Values) -> bool:
    dataset = section(config, "dataset")
    if not dataset.get("chat") or not base_of(config).calls_otherwise:
        return False
    return rows.calls_tools(dataset, _evaluations(config))


# ---- what several faults ask of a configuration ----------------------------------------------------


def _adapts_by_role(config: Values) -> bool:
    targets = section(config, "targets")
    return bool(config.get("method")) and not targets.get("modules")


def _writes(config: Values) -> bool:
    return any("max_new_tokens" in node for node in _evaluations(config))


def _ways_of_writing(config: Values) -> tuple[bool, bool]:
    """Whether texts are written by beams, and whether without a cache; both by transformers' own generation."""
    by_beams = any((node.get("num_beams") or 1) > 1 for node in _evaluations(config) if "max_new_tokens" in node)
    without_cache = bool(config.get("method_inputs")) or _is_prompt_learning(section(config, "method"))
    return by_beams, without_cache and _writes(config)


def _evaluations(config: Values) -> list[Values]:
    return [node for node in section(config, "eval").values() if isinstance(node, Mapping)]


def _is_prompt_learning(method: Values) -> bool:
    import peft  # which imports torch, which `--help` must not

    package, _, name = str(method.get("_target_")).rpartition(".")
    kind = getattr(peft, name, None) if package.partition(".")[0] == "peft" else None
    return isinstance(kind, type) and issubclass(kind, peft.PromptLearningConfig)
