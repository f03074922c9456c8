"""Written texts: ROUGE, BLEU and chrF by their libraries, the errors of these, and statistics of the texts."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from peftsweep import InputError
from peftsweep.analysis.statistics import measured, trials
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.table import predictions
from peftsweep.config.compose import Trial
from peftsweep.data.templates import Example
from peftsweep.evaluation import decoding
from peftsweep.evaluation.decoding import Written
from peftsweep.evaluation.text import overlap, responses
from peftsweep.models import model as models_model
from peftsweep.observe import display
from peftsweep.schema import ModelConfig
from peftsweep.study import cautions
from peftsweep.study.record import Result

REFERENCES = [
    "the cat sat on the mat near the door", "Tom has seven pens and a book", "it rains in the old town today",
    "she sells sea shells by the sea shore", "nobody knows the trouble I have seen", "A quick brown fox jumps",
]  # fmt: skip
TEXTS = [
    "the cat sat on a mat near a door", "Tom has seven pens and one book", "it rains in the town",
    "she sells shells by the shore of the sea", "somebody knows the trouble I have seen", "",
]  # fmt: skip


# ---- values ----------------------------------------------------------------------------------------


def test_rouge_is_the_mean_of_the_librarys_f_measures() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    found = overlap.compare(TEXTS, REFERENCES, ["rouge1", "rouge2", "rougeL", "rougeLsum"])
    for name, figure in found.items():
        each = [scorer.score(answer, text)[name].fmeasure for text, answer in zip(TEXTS, REFERENCES, strict=True)]
        assert figure.parts == each
        assert figure.score.value == pytest.approx(np.mean(each))
        assert figure.score.stderr == pytest.approx(np.std(each, ddof=1) / math.sqrt(6))


def test_rouge_by_hand() -> None:
    # Of "a b c d" and "a c e": 2 words shared, of 4 and of 3; the longest common subsequence is "a c".
    found = overlap.compare(["a c e"], ["a b c d"], ["rouge1", "rougeL"])
    f = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert [figure.value for figure in found.values()] == pytest.approx([f, f])
    assert found["rouge1"].score.stderr is None
    assert overlap.compare(["He was running"], ["he runs"], ["rouge1"], stemmer=True)["rouge1"].value == pytest.approx(
        0.8
    )


@pytest.mark.parametrize("options", [{}, {"tokenize": "char"}, {"word_order": 2}])
def test_bleu_and_chrf_are_the_librarys_of_all_texts_together(options: dict[str, Any]) -> None:
    bleu = BLEU(tokenize=options.get("tokenize", "13a"))
    chrf = CHRF(word_order=options.get("word_order", 0))
    found = overlap.compare(TEXTS, REFERENCES, ["chrf", "bleu"], **options)
    assert [*found] == ["chrf", "bleu"]
    for metric, figure in ((bleu, found["bleu"]), (chrf, found["chrf"])):
        assert figure.value == metric.corpus_score(TEXTS, [REFERENCES]).score
        kept = [[n for n in range(6) if n != out] for out in range(6)]
        without = [
            metric.corpus_score([TEXTS[n] for n in some], [[REFERENCES[n] for n in some]]).score for some in kept
        ]
        jackknife = math.sqrt(5 / 6 * sum((one - np.mean(without)) ** 2 for one in without))
        assert figure.score.stderr == pytest.approx(jackknife)
        assert np.mean(figure.parts) == pytest.approx(figure.value)


def test_bleu_by_hand() -> None:
    # 4 words of 5, 3 pairs of 4, 2 of 3 and 1 of 2 in a row; as long as its reference.
    found = overlap.compare(["a b c d x"], ["a b c d e"], ["bleu"])["bleu"]
    assert found.value == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.array([0.2, 0.9, 0.4, 0.4, 0.7])
    without = [float(np.delete(values, n).mean()) for n in range(5)]
    figure = responses.jackknife(float(values.mean()), without)
    assert figure.parts == pytest.approx(values)
    assert figure.score.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(5))


# ---- statistics of the texts -----------------------------------------------------------------------


def test_statistics_of_texts_by_hand() -> None:
    written = [Written("a b a", 5, False), Written("", 0, False), Written("a c", 7, True), Written(" ", 1, False)]
    found = responses.statistics_of(written)
    values = {name: score.value for name, score in found.items()}
    assert values == pytest.approx({
        "length_tokens": 13 / 4, "length_words": 5 / 4, "length_characters": 9 / 4,
        "empty_fraction": 2 / 4, "cut_fraction": 1 / 4,
        "distinct_1": 3 / 5,  # a, b, c
        "distinct_2": 3 / 3,  # a b, b a, a c
    })  # fmt: skip
    assert found["length_words"].stderr == pytest.approx(np.std([3, 0, 2, 0], ddof=1) / 2)
    without = [2 / 2, 3 / 5, 2 / 3, 3 / 5]  # without "a b a" there are a and c, without "a c" a and b
    jackknife = math.sqrt(3 / 4 * sum((one - np.mean(without)) ** 2 for one in without))
    assert found["distinct_1"].stderr == pytest.approx(jackknife)


def test_texts_without_words_have_no_distinct_words() -> None:
    found = responses.statistics_of([Written("", 0, False), Written("", 0, False)])
    assert found["empty_fraction"].value == 1
    assert not {"distinct_1", "distinct_2"} & set(found)


@pytest.fixture(scope="module")
def base() -> Any:
    return models_model.load(ModelConfig(name_or_path="tiny"), None, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models_model.load_tokenizer(ModelConfig(name_or_path="tiny"))


def test_the_tokens_of_a_text_and_whether_it_was_cut_are_those_of_transformers(base: Any, tokenizer: Any) -> None:
    ends = set()
    prompts = ["Tom has 3", "47+38=", "Mia sells 4 pens. Tom has 3 apples."]
    for most, beams in ((3, 1), (24, 1), (8, 2)):
        found = decoding.write(base, tokenizer, prompts, max_new_tokens=most, num_beams=beams)
        for prompt, one in zip(prompts, found, strict=True):
            given = tokenizer(prompt, return_tensors="pt")
            length = given.input_ids.shape[1]
            ids = base.generate(**given, max_new_tokens=most, num_beams=beams, do_sample=False)[0, length:].tolist()
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            assert (one.tokens, one.cut) == (end, end == len(ids))
            assert one.text == tokenizer.decode(ids, skip_special_tokens=True)
        ends.add(tuple(one.cut for one in found))
    assert len(ends) > 1


def test_an_end_mark_that_the_tokenizer_writes_as_text_is_no_part_of_what_is_written(
    base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Tom has 3", "47+38=", "Mia sells 4 pens. Tom has 3 apples."]
    ways: list[dict[str, Any]] = [{"num_beams": 2}, {"sampling": decoding.Sampling(top_p=0.0001)}]
    for how in ways:  # both by transformers
        monkeypatch.undo()
        free = decoding.generate(base, tokenizer, prompts, max_new_tokens=8, **how)
        marks = [tokenizer(text, add_special_tokens=False).input_ids[3] for text in free]
        assert tokenizer.decode(marks, skip_special_tokens=True)  # they are no special tokens
        own = copy.deepcopy(base.generation_config)
        own.eos_token_id = [*marks, tokenizer.eos_token_id]
        monkeypatch.setattr(base, "generation_config", own)
        found = decoding.write(base, tokenizer, prompts, max_new_tokens=8, **how)
        assert [one.cut for one in found] == [False] * 3
        for one in found:
            written = tokenizer(one.text, add_special_tokens=False).input_ids
            assert one.tokens == len(written) < 4
            assert not set(written) & set(marks)


OWN_SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 9},
    {"max_length": 5, "forced_eos_token_id": 2, "suppress_tokens": [28, 30, 35]},
    {"do_sample": True, "temperature": 5.0, "top_k": 3, "num_return_sequences": 2},
]


@pytest.mark.parametrize("settings", OWN_SETTINGS)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_settings_of_a_base_change_no_text(
    settings: dict[str, Any], beams: int, base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Tom has 3 pens and", "a"]
    expected = decoding.generate(base, tokenizer, prompts, max_new_tokens=10, num_beams=beams)
    own = copy.deepcopy(base.generation_config)
    for name, value in settings.items():
        setattr(own, name, value)
    monkeypatch.setattr(base, "generation_config", own)
    assert decoding.generate(base, tokenizer, prompts, max_new_tokens=10, num_beams=beams) == expected
    assert base.generation_config is own


def test_a_text_that_a_stop_ends_is_not_cut(base: Any, tokenizer: Any) -> None:
    for sampling in (None, decoding.Sampling(top_p=0.0001)):  # by our own loop and by transformers'
        how: dict[str, Any] = {"max_new_tokens": 6, "sampling": sampling}
        (free,) = decoding.write(base, tokenizer, ["Tom has 3"], **how)
        stopped, other = decoding.write(base, tokenizer, ["Tom has 3", "47+38="], **how, stop=[free.text[1:3]])
        assert (free.cut, stopped.text, stopped.cut) == (True, free.text[:1], False)
        assert stopped.tokens < free.tokens == 6
        assert other.tokens > stopped.tokens


def test_an_evaluation_of_texts_holds_scores_statistics_and_each_rows_part(
    base: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [Example(f"Tom has {n} pens.", f" He has {n}.") for n in range(4)]
    found = overlap.generated_text(base, tokenizer, rows, max_new_tokens=5)
    assert [*found.scores][:6] == [*overlap.METRICS]
    assert set(found.scores) >= {"length_tokens", "cut_fraction", "distinct_1"}
    assert found.facts["headline"] == "rougeL"
    assert found.facts["cut_texts"] == sum(line["cut"] for line in found.predictions)
    texts = [line["prediction"] for line in found.predictions]
    assert found.scores["bleu"].value == BLEU().corpus_score(texts, [[row.answer for row in rows]]).score
    folder = tmp_path / "trial" / "predictions"
    folder.mkdir(parents=True)
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found.predictions))
    for metric in overlap.METRICS:  # by which trials are compared row by row
        parts = measured.row_scores(predictions(tmp_path)("trial", "text"), metric)
        assert parts is not None
        assert parts.mean() == pytest.approx(found.scores[metric].value)
    alone = overlap.generated_text(base, tokenizer, rows, metrics=[], max_new_tokens=5)
    assert "headline" not in alone.facts
    assert not set(alone.scores) & set(overlap.METRICS)


# ---- in a study ------------------------------------------------------------------------------------


def test_texts_that_are_empty_cut_or_that_rouge_cannot_read_are_told() -> None:
    facts = {"rougeL": {"value": 0.0, "stderr": 0.0, "n": 9}, "empty_texts": 2, "cut_texts": 3, "unread_references": 9}
    told = cautions.cautions({}, {"rouge": facts}, {})
    assert [line.partition(" rows ")[0] for line in told] == ["rouge: 2 of 9", "rouge: 3 of 9", "rouge: 9 of 9"]


def test_statistics_are_shown_where_they_are_all_that_is_measured() -> None:
    length = {"length_words": {"value": 3.0, "stderr": 0.5, "n": 9}, "base_length_words": {"value": 2.0}}
    assert display.scores_line(length) == "length_words 3.000 ± 0.500 (base 2.000)"
    rouge = {"headline": "rougeL", "rougeL": {"value": 0.25, "stderr": None, "n": 9}}
    assert display.scores_line(length | rouge) == "rougeL 0.250"


def test_a_reference_that_rouge_cannot_read_is_counted(base: Any, tokenizer: Any) -> None:
    rows = [Example("Tom", "七"), Example("Tom", "seven")]
    assert overlap.generated_text(base, tokenizer, rows, max_new_tokens=2).facts["unread_references"] == 1


def test_figures_of_100_are_no_shares_and_statistics_no_scores() -> None:
    names = ("bleu", "rougeL", "length_words")
    table = pd.DataFrame({f"eval_info.text.{name}.value": [0.5, 0.25] for name in names})
    assert columns.scores(table) == ["eval_info.text.bleu.value", "eval_info.text.rougeL.value"]
    shares = [trials.is_share(f"eval_info.text.{name}.value", pd.Series([0.5])) for name in names]
    assert shares[:2] == [False, True]


@pytest.mark.parametrize("name", ["rouge", "bleu"])
def test_a_missing_package_is_one_line_before_anything_is_loaded(
    name: str, compose: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("rouge_score", "sacrebleu"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"^eval\.{name}: needs the package .*: pip install 'peftsweep\[text\]'$"):
        compose(f"eval=[{name}]")
    compose("eval=[responses]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval=[lm_eval] eval.lm_eval.tasks=[arc_easy]", r"^eval\.lm_eval: needs the package lm_eval: .*\[lm_eval\]"),
        (
            "eval=[exact_match] eval.exact_match.metric._target_=peftsweep.evaluation.metrics.math_verify_match",
            r"^eval\.exact_match\.metric: needs the package math_verify",
        ),
    ],
)
def test_other_evaluations_that_need_a_package_say_so_first(
    words: str, message: str, compose: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lm_eval", "math_verify"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=message):
        compose(*words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval.text_metrics.metrics=[rougeX]", "eval.text_metrics.metrics.0=rougeX: must be one of rouge1, rouge2,"),
        ("eval.text_metrics.tokenize=mecab", "eval.text_metrics.tokenize=mecab: must be one of 13a, intl"),
        ("eval.text_metrics.word_order=-1", "eval.text_metrics.word_order=-1: must"),
        ("train.eval_every=1 train.best_metric=text_metrics.rouge3", "does not measure 'rouge3'"),
        ("train.eval_every=1 train.best_metric=text_metrics.cut_fraction", "does not measure 'cut_fraction'"),
        ("dataset=tiny_direction model.task=seq_cls", "a classifier (model.task=seq_cls) generates no text"),
    ],
)
def test_a_wrong_option_is_one_line(words: str, message: str, compose: Callable[..., Trial]) -> None:
    with pytest.raises(InputError) as error:
        compose("eval=[text_metrics]", *words.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_trial_is_compared_by_the_first_metric(command: Any) -> None:
    words = ["method.r=2,4", "train.steps=4", "dataset.samples=64", "eval=[text_metrics]", "study=text", "device=cpu"]
    words += ["eval.text_metrics.samples=12", "eval.text_metrics.max_new_tokens=8", "quiet=true"]
    code, _, err = command(*words)
    assert code == 0, err
    (first, _) = (Result.read(file.parent) for file in sorted(Path("multirun/text").glob("*/result.json")))
    assert first.eval_info["text_metrics"]["headline"] == "rougeL"
    assert {"base_bleu", "base_length_words", "bleu"} <= set(first.eval_info["text_metrics"])
    assert first.eval_info["text_metrics"]["chrf"]["stderr"] is not None
