"""Caches of scores: of the untouched base, and of a trial whose evaluation was interrupted."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftsweep.config import build, identity
from peftsweep.config.calls import TEXT
from peftsweep.config.compose import Trial
from peftsweep.config.identity import evaluation_identity, model_identity
from peftsweep.data import fingerprint
from peftsweep.data import rows as data_rows
from peftsweep.data.templates import Example
from peftsweep.evaluation import evaluate
from peftsweep.models import model, parts
from peftsweep.models.losses import READS_PADDING
from peftsweep.study import record, store
from peftsweep.study.atomic import make_way
from peftsweep.study.reading import Unreadable
from peftsweep.trial.outcome import Attempts

log = logging.getLogger(__name__)

# Facts of an evaluation that do not depend on the model's answers.
FACTS_OF_ROWS = (
    *("majority", "random", "f1_majority", "f1_random", record.HEADLINE),
    *("truncated_prompts", "truncated_answers", "long_references", "unwritable_references"),
)
TEXT_PACKAGES = ("rouge_score", "sacrebleu")  # whose versions decide the scores of written texts
COST = ("seconds", "allocated_peak", "rss_peak")  # keys of the cost of an evaluation
CHECKSUM = "sha256"  # key of the checksum of scores and answers, in a file of a base's scores


class EvaluationCache:
    """The finished evaluations of a trial without a record, each in a file in ``folder``.

    One is used again by the same trial on the same device with the same packages, rows and way of judging.
    """

    def __init__(self, trial: Trial, folder: Path, device: torch.device, attempts: Attempts) -> None:
        self._trial, self._folder, self._device, self._attempts = trial, folder, device, attempts

    def keep(self, name: str, test: list[Example], found: dict[str, Any], *, packed: bool = False) -> None:
        """Write the result of the evaluation ``name``; if ``packed``, without its cost, which is that of the pack."""
        seconds, memory = self._attempts.seconds(), self._attempts.memory()
        if packed:
            seconds, memory = {Attempts.TOTAL: seconds[Attempts.TOTAL]}, {}
            found = {key: value for key, value in found.items() if key not in COST}
        kept = {"of": self._of(name, test), "found": found, "seconds": seconds, "memory": memory}
        record.write_json(self._file(name), kept)

    def find(self, name: str, test: list[Example]) -> dict[str, Any] | None:
        """The kept result of the evaluation; None if there is none, or if it has another configuration."""
        try:
            kept = record.read_json(self._file(name))
            if kept["of"] != self._of(name, test):
                return None
            found: dict[str, Any] = kept["found"]
            self._attempts.resume(kept["seconds"], kept["memory"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, damaged, or of another program
            return None
        log.info("%s: taken from before the trial was cut off", name)
        return found

    def forget(self) -> None:
        """Delete all of them."""
        for file in self._folder.glob(self._file("*").name):
            file.unlink()

    def _file(self, name: str) -> Path:
        return self._folder / f"evaluated-{name}.json"

    def _of(self, name: str, test: list[Example]) -> str:
        rows = _of_rows(self._trial, name, test)
        return identity.content_hash([self._trial.identity, _kernels(self._device), rows])


def base_scores(
    trial: Trial, name: str, test: list[Example], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, root: Path
) -> dict[str, Any]:
    """The untouched base's scores and facts, and as ``predictions`` the file of its answers, relative to the study.

    Both are kept in the study under everything that changes them. The answers have the format of a trial's
    ``predictions/<eval>.jsonl``, and are written first: where scores are, answers are too.
    """
    device, config = base.device, trial.config
    of_base = {
        "model": model_identity(config.model),
        "commit": model.commit(base),
        "tokenizer": fingerprint.tokenizer_hash(tokenizer),
        "quant": config.quant,
        # A new head is drawn from the seed, for each class an output.
        "head": [config.seed, config.dataset.classes] if parts.classifies(base) else None,
        **_kernels(device),
    }
    if getattr(base, READS_PADDING, False):
        of_base["padding"] = False  # before, its scores depended on the batch
    of_rows = _of_rows(trial, name, test)
    called = re.sub(r"[^\w.-]+", "_", f"{trial.choices['model']}-{trial.choices['quant']}")
    folder = root / store.BASE / f"{called}-{identity.content_hash(of_base)}"
    scores = folder / f"{name}-{identity.content_hash(of_rows)}.json"
    answers = scores.with_suffix(".jsonl")
    if (known := _kept_scores(scores, answers)) is None:
        for place, is_folder in ((folder.parent, True), (folder, True), (scores, False), (answers, False)):
            make_way(place, folder=is_folder)
        found = build.evaluator(trial, name)(base, tokenizer, test)
        own = {fact: value for fact, value in found.facts.items() if fact not in FACTS_OF_ROWS}
        known = record.plain(found.scores | own)
        record.write_lines(answers, found.predictions)
        record.write_json(scores, known | {CHECKSUM: _checksum(known, answers)})
    return known | {"predictions": answers.relative_to(root).as_posix()}


def _kernels(device: torch.device) -> dict[str, Any]:
    """What decides the scores of a model on ``device``, besides its weights: processor, kernels, packages."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else record.processor(),
        "kernels": None if device.type == "cuda" else record.kernels(),
        "packages": record.packages() | {"lm_eval": record.package("lm_eval")},
    }


def _of_rows(trial: Trial, name: str, test: list[Example]) -> dict[str, Any]:
    """The rows of the evaluation ``name``, and the settings that judge them."""
    node = trial.config.eval[name]
    further: dict[str, Any] = {}
    if node.get("_target_") == TEXT:
        further["text"] = [record.package(one) for one in TEXT_PACKAGES]
    if (node.get("num_beams") or 1) > 1:
        further["own_settings"] = False  # before, a base's own generation settings acted on beams
        further["end_mark"] = "left out"  # before, an end mark that is no special token was a part of the text
    if str(node.get("_target_")).endswith(".classification") or any(row.choices for row in test):
        further["joined_tokens"] = "apart"  # before, an answer that the last token of its prompt took in always won
    if evaluate.begin_alike(node.get("classes") or ()):
        further["end_mark"] = "counted"  # before, a class was never found if its name begins with that of another one
    return further | {
        "eval": evaluation_identity(trial.config.eval[name]),
        "judged": evaluate.JUDGING_VERSION,
        "examples": data_rows.fingerprint(example._asdict() for example in test),
    }


def _kept_scores(scores: Path, answers: Path) -> dict[str, Any] | None:
    """The kept scores of a base; None if there are none, or a file was changed."""
    if not (os.path.lexists(scores) and os.path.lexists(answers)):
        return None
    try:
        known: dict[str, Any] = record.read_json(scores, record.SCORES)
        lines, written = record.read_predictions(answers), known.pop(CHECKSUM, None)
        if written is None and not (known and lines):  # of an earlier version
            raise Unreadable(f"{answers if known else scores}: it is empty")
        if written not in (None, _checksum(known, answers)):
            raise Unreadable(f"{scores}: not what was written")
    except Unreadable as error:
        log.warning("%s; the untouched base is scored again", error)
        return None
    return known


def _checksum(known: dict[str, Any], answers: Path) -> str:
    return fingerprint.of_values([known, hashlib.sha256(answers.read_bytes()).hexdigest()])
