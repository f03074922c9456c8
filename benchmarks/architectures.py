"""What works on each model type of transformers: tiny random models through the product, one table.

    python -m benchmarks.architectures docs/architectures.md [--only TYPE ...] [--results FILE]

Of each type that transformers has a causal language model or a classifier of, a small model of random weights is
written as a checkpoint, and two trials of the product are run on it (LoRA on all linear layers, on the weights as they
are and in 4 bits). Its likelihoods and texts are compared with those of plain transformers, the predicted memory with
what torch's profiler saw allocated. Types that are not in ``--only`` keep what FILE says of them; those that it lists
as ``not_run`` wait for someone's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tests.architectures import small_config
from transformers.models.auto import modeling_auto

from benchmarks import memory_prediction
from peftsweep import InputError, cli
from peftsweep.config.compose import trial as make_trial
from peftsweep.data.tokens import Tokens
from peftsweep.errors import first_line
from peftsweep.evaluation import decoding, likelihood
from peftsweep.models import attach, model, parts, probe
from peftsweep.schema import ModelConfig, Task
from peftsweep.study.record import Result

RESULTS = Path(__file__).parent / "results" / "architectures.json"
CPU = torch.device("cpu")
LENGTHS = (9, 23, 40)  # tokens of rows: within and beyond the window of layers that have one
NEW = 8  # tokens that are written
SAME = 1e-3  # nats, of the log-likelihood of an answer
WORDS = [
    *("model.dtype=float32", "method=lora", "targets=all_linear", "adapter.merge=true", "train.learning_rate=1e-2"),
    *("train.batch_size=4", "train.log_every=1", "dataset.samples=16", "quiet=true", "device=cpu"),
]
EPOCH = 4  # steps through all rows
TASKS = {
    Task.causal_lm: [
        "model=causal_lm",
        "dataset=tiny_math",
        "eval=[perplexity]",
        "eval.perplexity.samples=8",
        "train.steps=40",
    ],
    Task.seq_cls: ["model=encoder", "dataset=tiny_direction", "eval.tiny_direction.samples=8", "train.steps=80"],
}
COLUMNS = ("loads", "roles", "all_linear", "trains", "4bit", "likelihood", "generation", "reload", "merge", "memory")


def kinds() -> dict[str, list[Task]]:
    """The types of transformers with a causal language model or a classifier, and which of the two there are."""
    names = {
        Task.causal_lm: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        Task.seq_cls: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    found = {kind: [task for task in names if kind in names[task]] for mapping in names.values() for kind in mapping}
    return {kind: tasks for kind, tasks in found.items() if kind not in LEFT_OUT}


def write(kind: str, task: Task, folder: Path) -> Path:
    """A small random model of the type as a checkpoint, with the embedded tokenizer beside it."""
    torch.manual_seed(0)
    made = model.CLASSES[task].from_config(small_config(kind), dtype=torch.float32)
    made.save_pretrained(folder)
    model.load_tokenizer(ModelConfig(name_or_path="tiny")).save_pretrained(folder)
    return folder


ENCODER_DECODER = "an encoder with a decoder, which the product has no task for"
LEFT_OUT = {
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts tokens for another model"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "writes sound, and its configuration has no text model"),
    **dict.fromkeys(("t5", "mt5", "umt5", "t5gemma", "t5gemma2"), ENCODER_DECODER),
    "gemma3n": "needs timm; its text part is gemma3n_text",
    "layoutlmv2": "needs detectron2, and images",
    "layoutlmv3": "reads images and places of words",
    "lilt": "reads places of words",
    "blt": "no small configuration: the sizes of its patches follow from others of the large model",
    "cohere_compass_text": "its default configuration names kinds of layers that it has no rotary embedding for",
    "dbrx": "its default configuration cannot be made into a model",
    "dots3_note": "no small configuration: its layers are told apart by their numbers in the large model",
    "reformer": "no small configuration: its positions follow from two factors of the hidden size",
    "xmod": "wants the language of a text, for which there is no key",
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), "no small configuration with a layer of attention was found"),
    "perceiver": "reads bytes",
}


class Case:
    """One type: its checkpoint, and a cell of each column."""

    def __init__(self, kind: str, task: Task, folder: Path) -> None:
        self.kind, self.task = kind, task
        self.folder = write(kind, task, folder)
        self.words = [*TASKS[task], f"model.name_or_path={self.folder}", *WORDS]
        config = cli.compose(self.words)
        self.trial = make_trial(config, config.hydra.runtime.choices, self.words)
        self.records: dict[str, Result] = {}
        self.refused: dict[str, InputError] = {}  # by their quantisation, trials that cannot be planned

    def cells(self) -> dict[str, str]:
        found = {"loads": self.cell(self.loads)}
        if found["loads"] == "yes":
            for quant in ("none", "4bit"):
                try:
                    self.records[quant] = cli.run_one([*self.words, f"quant={quant}"])
                except InputError as error:
                    self.refused[quant] = error
            found |= {name: self.cell(getattr(self, name.replace("4", "four"))) for name in COLUMNS[1:]}
        return found

    def cell(self, look: Callable[[], str]) -> str:
        try:
            return look()
        except InputError as error:
            return f"refused: {self.reason(error)}"
        except Exception as error:
            logging.exception("%s", self.kind)
            return f"no: {type(error).__name__}: {self.reason(error)}"

    def reason(self, error: Exception) -> str:
        """The message without the folder that the checkpoint lies in for now."""
        return first_line(error).replace(str(self.folder), self.kind)

    def loads(self) -> str:
        self.base: Any = model.load(self.trial.config.model, None, CPU, len(self.trial.config.dataset.classes))
        if self.task is Task.causal_lm:
            self.able = probe.abilities(self.base)
        self.tokenizer = model.load_tokenizer(self.trial.config.model)
        self.base.config.pad_token_id = parts.text_config(self.base).pad_token_id = self.tokenizer.pad_token_id
        return "yes"

    def roles(self) -> str:
        found = attach.role_members(self.base, self.trial.config.model.roles)
        return " ".join([*found, *([attach.EXPERTS] if parts.expert_parameters(self.base) else [])])

    def all_linear(self) -> str:
        reach = self.record("none").train_info["coverage"]
        roles = {role: one["share"] for role, one in reach["roles"].items() if one["share"]}
        return " ".join(role if share == 1 else f"{role} {share:.0%}" for role, share in roles.items())

    def trains(self) -> str:
        return _learns(self.record("none"))

    def fourbit(self) -> str:
        record = self.record("4bit")
        share = record.train_info["coverage"].get("share_in_4bit", 0.0)
        learned = _learns(record)
        return learned if learned != "yes" or share else "no: no weight is stored in 4 bits"

    def reload(self) -> str:
        return _both(self.records, "reloads", "reload_error", "reload_difference")

    def merge(self) -> str:
        return _both(self.records, "merges", "merge_error", "merge_difference")

    def record(self, quant: str) -> Result:
        if quant in self.refused:
            raise self.refused[quant]
        found = self.records[quant]
        if found.error is None:
            return found
        raise (
            InputError(found.error["message"])
            if found.error["type"] == "InputError"
            else RuntimeError(f"{found.error['type']}: {found.error['message']}")
        )

    def rows(self) -> list[Tokens]:
        classes = len(self.trial.config.dataset.classes)
        ids = [[(7919 * (n + place) + 31) % 500 + 5 for place in range(n)] for n in LENGTHS]
        return [Tokens(one, len(one), n % classes) if classes else Tokens(one, 5) for n, one in enumerate(ids)]

    @torch.no_grad()
    def likelihood(self) -> str:
        plain, rows = self.plain(), self.rows()
        if self.task is Task.seq_cls:
            mine = likelihood.class_scores(self.base, rows, pad_id=0, batch_size=4)
            other = [plain(torch.tensor([row.ids])).logits.float().log_softmax(-1)[0].tolist() for row in rows]
            worst = max(abs(a - b) for one, two in zip(mine, other, strict=True) for a, b in zip(one, two, strict=True))
        else:
            sums = likelihood.log_likelihoods(self.base, rows, pad_id=0, batch_size=4)
            worst = max(abs(one - _plain_likelihood(plain, row)) for one, row in zip(sums, rows, strict=True))
        return "yes" if worst < SAME else f"no: apart by {worst:.2g} nats"

    @torch.no_grad()
    def generation(self) -> str:
        if self.task is Task.seq_cls:
            return ""
        plain, prompts = self.plain(), ["12 + 7 = ", "a b c d e f " * 2, "what is 3 and 4? "]
        mine = decoding.generate(self.base, self.tokenizer, prompts, max_new_tokens=NEW)
        how = {
            "max_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": self.tokenizer.eos_token_id,
        }
        other = []
        for prompt in prompts:
            given = self.tokenizer(prompt, return_tensors="pt")
            ids = plain.generate(given.input_ids, attention_mask=given.attention_mask, **how)
            other.append(self.tokenizer.decode(ids[0, given.input_ids.shape[1] :], skip_special_tokens=True))
        one_by_one = "" if self.able.padded_batches else " (rows one by one)"
        return f"yes{one_by_one}" if mine == other else f"no: {mine} in place of {other}"

    def plain(self) -> Any:
        found = model.CLASSES[self.task].from_pretrained(self.folder, dtype=torch.float32).eval()
        found.config.pad_token_id = parts.text_config(found).pad_token_id = 0
        return found

    def memory(self) -> str:
        rows = self.rows() * 4
        config = self.trial.config
        # Twice the steps: the optimizer's state exists in the second half.
        few = dataclasses.replace(config.train, steps=2 * memory_prediction.STEPS)
        short = dataclasses.replace(self.trial, config=dataclasses.replace(config, train=few))
        foreseen = memory_prediction.predicted(short, rows, "cpu").peak_bytes
        return f"{foreseen / memory_prediction.measured(short, rows, CPU)['measured'] - 1:+.1%}"


def _learns(record: Result) -> str:
    """Whether the loss of the last epoch is clearly below that of the first, and every adapter has learned."""
    assert record.folder
    weights = load_file(record.folder / "adapter" / "adapter_model.safetensors")
    still = {name.split(".")[-3] for name, one in weights.items() if "lora_B" in name and not one.any()}
    if still:
        return f"no: the adapters of {', '.join(sorted(still))} learn nothing"
    lines = [json.loads(line) for line in (record.folder / "steps.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    first, last = sum(losses[:EPOCH]) / EPOCH, sum(losses[-EPOCH:]) / EPOCH
    return "yes" if last < 0.99 * first else f"no: loss {first:.3f} before, {last:.3f} after"


def _both(records: Mapping[str, Result], fact: str, error: str, difference: str) -> str:
    """Whether a fact holds on both bases, or why not."""
    for quant, record in records.items():
        info = record.train_info
        if not info.get(fact):
            why = info.get(error) or (f"apart by {info[difference]:.2g}" if difference in info else "not trained")
            return f"no: {quant}: {why}"
    return "yes"


def _plain_likelihood(plain: Any, row: Tokens) -> float:
    """The log-likelihood of the row's answer, read alone and with all logits."""
    logits = plain(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return float(sum(logits[place - 1, row.ids[place]] for place in range(row.answer_start, len(row.ids))))


def look(kind: str, tasks: list[Task]) -> dict[str, Any]:
    """The row of one type: as a causal language model, or as a classifier where it is refused as that."""
    began = time.process_time()
    row: dict[str, Any] = {}
    for task in tasks:
        with tempfile.TemporaryDirectory() as place:
            os.chdir(place)
            try:
                case = Case(kind, task, Path(place) / kind)
                cells = case.cells()
            except Exception as error:
                logging.exception("%s", kind)
                cells = {"loads": f"no: {type(error).__name__}: {first_line(error)}"}
            os.chdir("/")
        row = {"task": task.value, "cells": cells, "seconds": round(time.process_time() - began, 1)}
        if "sees the tokens" not in cells["loads"]:
            break
    return row


HEAD = """\
# Architectures

What works on each model type of transformers, made by `python -m benchmarks.architectures docs/architectures.md`: of
each type a model of {sizes} and random weights is written as a checkpoint, and `peftsweep` trains LoRA on
all of its linear layers for 40 steps, on the weights as they are and in 4 bits. Encoders are trained as classifiers,
for 80 steps.

- **adapts** what `targets=all_linear` reaches, by [role](concepts.md#terms); with a share where it is not all of a role
- **trains**, **4-bit** the loss falls, and no adapter stays at zero
- **likelihood**, **generation** log-likelihoods of answers in padded batches, and greedy texts, are those of plain
  transformers, which reads each row alone; *alone*: padding would change what the model reads, so that the product too
  generates row by row
- **reload**, **merge** the saved adapter on a fresh base, and merged into it (in 4 bits: dequantised first), gives the
  same losses
- **memory** the predicted training memory beside what torch's profiler saw allocated

{counts} {versions}.

| type | adapts | trains | 4-bit | likelihood | generation | reload | merge | memory |
|---|---|---|---|---|---|---|---|--:|
"""
SHORT = {"yes (rows one by one)": "alone"}


def page(found: Mapping[str, Any]) -> str:
    """The table as Markdown; of what does not work the reasons are numbered below it."""
    reasons: dict[str, int] = {}
    lines = []
    whole = 0
    for kind, row in found["types"].items():
        cells = row["cells"]
        outcomes = [_short(cells.get(name, ""), reasons) for name in COLUMNS[3:]]
        if cells["loads"] != "yes":
            outcomes = [_short(cells["loads"], reasons), *[""] * 6]
        whole += "no" not in " ".join(outcomes) and "refused" not in " ".join(outcomes)
        adapts = cells.get("all_linear", "").replace(" ", ", ").replace("%,", "%;")
        task = "" if row["task"] == Task.causal_lm.value else " (classifier)"
        lines.append(f"| {kind}{task} | {adapts} | {' | '.join(outcomes)} |")
    of = Counter(row["transformers"] for row in found["types"].values())
    usual = of.most_common(1)[0][0]
    numbers = {"transformers": usual} | found["versions"]
    versions = ", ".join(f"{name} {number}" for name, number in numbers.items())
    for other in sorted(of.keys() - {usual}):
        own = [kind for kind, row in found["types"].items() if row["transformers"] == other]
        versions += f"; transformers {other} for {', '.join(own)}"
    counts = f"{len(lines)} types, of which {whole} work in every column."
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    left = [f"- {kind}: {reason}" for kind, reason in sorted(LEFT_OUT.items())]
    left += [f"- not run yet: {', '.join(found['not_run'])}"] if found["not_run"] else []
    head = HEAD.format(sizes="two to four layers of 32 numbers", counts=counts, versions=versions)
    return "\n".join([head + "\n".join(lines), "", "Why not:", "", *notes, "", "Left out:", "", *left, ""])


def _short(cell: str, reasons: dict[str, int]) -> str:
    """A cell of the page: as it is, or ``no`` with the number of its reason."""
    word, _, reason = cell.partition(": ")
    if word not in ("no", "refused"):
        return SHORT.get(cell, cell)
    return f"{word} ({reasons.setdefault(' '.join(reason.split()), len(reasons) + 1)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--only", nargs="*", help="these types, in this order; by default those that FILE lacks")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    words = parser.parse_args()
    target, file = words.page.resolve(), words.results.resolve()
    torch.set_num_threads(1)
    gc.freeze()  # what was imported, which each trial would look through at its end
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    every = kinds()
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"types": {}, "not_run": []}
    for kind in words.only if words.only is not None else [one for one in every if one not in found["types"]]:
        row = look(kind, every[kind]) | {"transformers": version("transformers")}
        print(kind, row, flush=True)
        found["versions"] = {name: version(name) for name in ("peft", "torch", "bitsandbytes")}
        found["types"] = dict(sorted((found["types"] | {kind: row}).items()))
        found["not_run"] = sorted(set(found["not_run"]) - {kind})
        file.write_text(json.dumps(found, indent=1) + "\n")
    target.write_text(page(found))


if __name__ == "__main__":
    main()
