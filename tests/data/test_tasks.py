"""The readers of the published question sets, and their scores beside those of lm-evaluation-harness."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock, call

import pytest
import torch
import yaml

from peftsweep import InputError, cli
from peftsweep.analysis.table import columns
from peftsweep.config import build, evaluations
from peftsweep.config.compose import Trial
from peftsweep.config.fill import conf_dir
from peftsweep.data import rows as data_rows
from peftsweep.data import tasks, templates
from peftsweep.data import tokens as data_tokens
from peftsweep.data.templates import Example
from peftsweep.evaluation import decoding, evaluate, harness, likelihood, metrics
from peftsweep.models import model as models_model
from peftsweep.observe.measure import Meter
from peftsweep.schema import ModelConfig
from peftsweep.study.cautions import cautions
from peftsweep.tiny import task
from peftsweep.training import loop
from tests import schemas

Compose = Callable[..., Trial]
TINY = ModelConfig(name_or_path="tiny")
CPU = torch.device("cpu")
THEIRS = {  # our evaluation and the task's yaml in lm-evaluation-harness
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_i_qa": "siqa/siqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
}


@pytest.fixture(scope="module")
def base() -> Any:
    return models_model.load(TINY, None, CPU)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models_model.load_tokenizer(TINY)


def examples(name: str, compose: Compose) -> list[Example]:
    rows = schemas.write(name, Path())
    one = compose(f"eval=[{name}]", f"eval.{name}.path={rows}")
    return evaluations.test_examples(one.config, name, data_rows.read_rows(rows))


FAST = ("winogrande",)  # whose choices differ in what they begin with, too


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(THEIRS)])
def test_scores_are_those_of_lm_evaluation_harness(name: str, compose: Compose, base: Any, tokenizer: Any) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks._yaml_loader import load_yaml

    theirs = load_yaml(Path(lm_eval.__file__).parent / "tasks" / THEIRS[name], resolve_func=True)
    rows = [row | {"label": int(row["answer"])} if name == "boolq" else row for row in schemas.SCHEMAS[name]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}
    theirs |= local | {"training_split": None, "validation_split": None, "test_split": "test"}
    found = harness.lm_eval(base, tokenizer, [], tasks=[theirs]).scores
    mine = evaluate.multiple_choice(base, tokenizer, examples(name, compose)).scores
    kept = {key.removeprefix(f"{theirs['task']}_"): score for key, score in found.items()}
    assert "acc" in kept
    for metric, score in kept.items():
        assert mine[metric].value == score.value, metric
        assert mine[metric].n == score.n == len(rows)
        assert mine[metric].stderr == pytest.approx(score.stderr)


def test_rolling_perplexity_is_that_of_lm_evaluation_harness(base: Any, tokenizer: Any) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = ["Tom has 3 apples. " * 40, "Mia sells 4 pens.", "3+4=7\n" * 33]
    wrapped = HFLM(pretrained=base, tokenizer=tokenizer, max_length=31, backend="causal", add_bos_token=False)
    requests = [Instance("loglikelihood_rolling", {}, (text,), n, (None, None, None)) for n, text in enumerate(texts)]
    theirs = wrapped.loglikelihood_rolling(requests, disable_tqdm=True)
    found = evaluate.text_perplexity(base, tokenizer, [Example("", text) for text in texts], max_length=32)
    assert [line["log_likelihood"] for line in found.predictions] == pytest.approx(theirs, rel=1e-4)
    tokens = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert [line["tokens"] for line in found.predictions] == tokens
    closer = evaluate.text_perplexity(base, tokenizer, [Example("", texts[0])], max_length=32, stride=4)
    assert closer.predictions[0]["tokens"] == tokens[0]  # each token once, however the windows overlap
    assert closer.predictions[0]["log_likelihood"] != found.predictions[0]["log_likelihood"]


# One whose answers are words of its own, and one of those that number their choices.
NUMBERED = [pytest.param(name, marks=pytest.mark.slow) for name in ("social_i_qa", "hellaswag", "winogrande")]
NUMBERED += [pytest.param(name, marks=pytest.mark.slow) for name in ("arc_easy", "openbookqa")]


@pytest.mark.parametrize("name", ["boolq", "piqa", *NUMBERED])
def test_the_same_question_in_the_format_of_commonsense_170k(name: str, compose: Compose, tmp_path: Path) -> None:
    rows = schemas.write(name, tmp_path)
    one = compose(f"eval=[{name}_170k]", f"eval.{name}_170k.path={rows}")
    row = evaluations.test_examples(one.config, f"{name}_170k", data_rows.read_rows(rows))[1]
    labels = [choice.label for choice in row.choices]
    assert "### Instruction:\nPlease " in row.prompt
    assert row.prompt.endswith(f"Answer format: {'/'.join(labels)}\n\n### Response:\n")
    assert row.gold is not None
    assert row.answer == f"the correct answer is {labels[row.gold]}"
    texts = [choice.text for choice in row.choices]
    plain = examples(name, compose)[1]
    if name != "boolq":
        assert texts == [choice.text.strip() for choice in plain.choices]
    assert row.gold == (plain.gold if name != "boolq" else 1 - (plain.gold or 0))  # there true comes first


def test_an_instruction_is_judged_in_three_ways(compose: Compose, base: Any, tokenizer: Any) -> None:
    rows = schemas.write("commonsense_170k", Path())
    one = compose("eval=[arc_easy_170k]", f"eval.arc_easy_170k.path={rows}")
    questions = evaluations.test_examples(one.config, "arc_easy_170k", data_rows.read_rows(rows))
    found = evaluate.instruction(base, tokenizer, questions, max_new_tokens=4)
    assert {"accuracy", "valid_fraction", "label_acc", "choice_acc", "choice_acc_norm"} == set(found.scores)
    assert found.facts["majority"] == pytest.approx(1 / 3)
    assert [choice.text for choice in questions[0].choices] == ["a thing", "no: nothing", "rain"]
    labels = evaluate.instruction(base, tokenizer, questions, ways=["labels"])
    assert set(labels.scores) == {"label_acc"}


@pytest.mark.parametrize(
    ("reader", "row", "problem"),
    [
        (
            "arc",
            {"question": "?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"},
            "its answerKey 'E' is none of",
        ),
        (
            "commonsense_qa",
            {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": ""},
            "its answerKey '' is none of the labels of its choices: A, B",
        ),
        ("piqa", {"goal": "g", "sol1": "a", "label": 0}, "has no column 'sol2'"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "its label names choice 0 of 2"),
        ("winogrande", {"sentence": "a _", "option1": "a", "option2": "b", "answer": "0"}, "its label names choice 0"),
        ("winogrande", {"sentence": "no blank", "option1": "a", "option2": "b", "answer": "1"}, "has no blank '_'"),
        ("boolq", {"passage": "p", "question": "q", "label": -1}, "its answer '-1' is none of 0, false, no"),
        ("instruction", {"instruction": "No labels here.", "answer": "true"}, "none of the instruction's labels"),
        ("messages", {"messages": [{"role": "user", "content": "hi"}]}, "must end with the assistant's turn"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(reader: str, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=r"eval\.x\.reader: row 1 ") as error:
        templates.examples([row], "", "", "eval.x", reader=f"peftsweep.data.tasks.{reader}")
    assert problem in str(error.value)


def test_a_conversation_goes_through_the_chat_template(tokenizer: Any) -> None:
    row = tasks.messages({"conversations": [{"from": "human", "value": "Hi {x}"}, {"from": "gpt", "value": "Ho"}]})
    (example,) = templates.examples([row], "{prompt}", "{answer}")
    with pytest.raises(InputError, match=r"dataset\.chat=true: the model's tokenizer has no chat template"):
        data_tokens.through_chat_template(tokenizer, [example])
    chatty = models_model.load_tokenizer(TINY)
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (turn,) = data_tokens.through_chat_template(chatty, [example])
    assert (turn.prompt, turn.answer) == ("<user>Hi {x}<assistant>", "Ho")
    (plain,) = data_tokens.through_chat_template(chatty, [Example("Hi", "Ho")])
    assert plain.prompt == "<user>Hi<assistant>"


def harness_task(metric: dict[str, Any]) -> dict[str, Any]:
    """A multiple-choice task of lm_eval on local rows, without its name."""
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(schemas.write("piqa", Path()).resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [metric],
    }


@pytest.mark.slow  # a trial; the test below has the scores of tasks in a folder
def test_a_trial_on_lm_eval_tasks_of_its_own() -> None:
    pytest.importorskip("lm_eval")
    Path("tasks").mkdir()
    own = {"task": "own_piqa"} | harness_task({"metric": "acc"})
    Path("tasks/own_piqa.yaml").write_text(yaml.safe_dump(own))
    words = ["eval=[lm_eval]", "eval.lm_eval.tasks=[own_piqa]", f"eval.lm_eval.include_path={Path('tasks').resolve()}"]
    few = [
        "device=cpu",
        "train.steps=1",
        "dataset.samples=16",
        "train.batch_size=4",
        "targets=q",
        "adapter.check=false",
    ]
    result = cli.run_one([*words, *few])
    assert result.error is None
    assert {"own_piqa_acc", "base_own_piqa_acc"} <= set(result.eval_info["lm_eval"])


@pytest.mark.slow  # it imports and indexes the whole harness
def test_the_harness_says_how_many_rows_a_group_has_and_which_direction_is_better(base: Any, tokenizer: Any) -> None:
    """It was of 0 rows, by which the interval of its score was 12.7 standard errors wide each way."""
    pytest.importorskip("lm_eval")
    acc = {"metric": "acc", "aggregation": "mean"}
    own = harness_task(acc | {"higher_is_better": True})
    Path("tasks").mkdir()
    for name in ("one", "two", "three"):
        Path(f"tasks/own_{name}.yaml").write_text(yaml.safe_dump(own | {"task": f"own_{name}"}))
    lower = {"metric_list": [acc | {"higher_is_better": False}]}
    Path("tasks/own_bias.yaml").write_text(yaml.safe_dump(own | {"task": "own_bias"} | lower))
    Path("tasks/own_error.yaml").write_text(yaml.safe_dump(own | {"task": "own_error"}))
    mean = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    inner = {"group": "own_pair", "task": ["own_one", "own_two"]} | mean
    Path("tasks/own_pair.yaml").write_text(yaml.safe_dump(inner))
    outer = {"group": "own_all", "task": ["own_pair", "own_three"]} | mean
    Path("tasks/own_all.yaml").write_text(yaml.safe_dump(outer))
    names = ["own_all", "own_bias", "own_error"]
    found = harness.lm_eval(base, tokenizer, [], tasks=names, include_path="tasks").scores
    # Of two tasks the names say another direction than the harness, by which the report took the best for the worst.
    told = {"own_bias_acc_lower_is_better": -1, "own_error_acc_higher_is_better": 1, "own_all_acc": 1}
    assert {name: columns.direction(f"eval_info.lm_eval.{name}.value") for name in told} == told
    assert columns.direction("eval_info.lm_eval.base_own_bias_acc_lower_is_better.value") == -1
    size = len(schemas.SCHEMAS["piqa"])
    assert {name: score.n for name, score in found.items()} == {
        "own_all_acc": 3 * size,
        "own_pair_acc": 2 * size,
        **dict.fromkeys(("own_one_acc", "own_two_acc", "own_three_acc", *list(told)[:2]), size),
    }


def test_a_task_that_the_harness_lacks_is_named_before_anything_is_trained(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"piqa": SimpleNamespace(cfg={"task": "piqa"}, yaml_path=None)}
    manager = SimpleNamespace(all_tasks=[*known, "boolq"], task_index=known)
    monkeypatch.setattr(harness, "_manager", lambda tasks, path: manager)
    build.check_available(compose("eval=[lm_eval]", "eval.lm_eval.tasks=[piqa]"))
    with pytest.raises(InputError, match=r"eval.lm_eval.tasks: piqqa: the harness has no such task .*mean 'piqa'\?"):
        build.check_available(compose("eval=[lm_eval]", "eval.lm_eval.tasks=[piqqa]"))


WRITES_CODE = "task: coder\ntag: odd\nunsafe_code: true\n"
SHOWS_IMAGES = "task: seer\ntag: odd\ndoc_to_image: image\n"
LACKS_CODE = "task: broken\nprocess_results: !function absent.judge\n"


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("coder", r"coder: it runs the code that the model writes \(unsafe_code\)"),
        ("seer", r"seer: its rows hold images or sound"),
        ("broken", r"broken: the harness cannot load it: \w+: .*absent"),
        ("odd", r"coder: it runs"),  # a tag
        ("both", r"broken: the harness cannot load it"),  # a group
        ("nested", r"seer: its rows"),  # a group that is defined in a group
        ({"group": "mine", "task": ["own", {"task": "broken", "num_fewshot": 2}]}, r"broken: the harness cannot"),
        ({"task": "mine", "unsafe_code": True}, r"mine: it runs the code"),
    ],
)
def test_a_task_that_cannot_be_run_is_named_before_anything_is_trained(
    named: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such tasks, as coqa, minerva_math and humaneval, failed when the trial was trained."""
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    own = {"task": "own", "dataset_path": "json"}
    files = {"own": yaml.safe_dump(own), "coder": WRITES_CODE, "seer": SHOWS_IMAGES, "broken": LACKS_CODE}
    files["both"] = "group: both\ntask: [own, broken]\n"
    files["nested"] = "group: nested\ntask: [{group: inner, task: [own, seer]}]\n"
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)
    manager = lm_eval_tasks.TaskManager(include_path=".", include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda tasks, path: manager)
    harness.check_runnable(["own", own], str(Path.cwd()))
    with pytest.raises(InputError, match=rf"^eval\.lm_eval\.tasks: {problem}"):
        harness.check_runnable([named], str(Path.cwd()))


@pytest.mark.slow  # it imports the whole harness
def test_each_line_of_a_task_with_several_filters_names_its_filter(base: Any, tokenizer: Any) -> None:
    pytest.importorskip("lm_eval")
    first = {"function": "take_first"}
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": text}, first]}
        for name, text in {"digits": r"(\d+)", "letters": "([a-z]+)"}.items()
    ]
    task = harness_task({"metric": "exact_match"}) | {"task": "written", "output_type": "generate_until"}
    task |= {"filter_list": filters, "generation_kwargs": {"until": ["."], "max_gen_toks": 8}}
    found = harness.lm_eval(base, tokenizer, [], tasks=[task])
    rows = len(schemas.SCHEMAS["piqa"])
    assert [line["filter"] for line in found.predictions] == ["digits"] * rows + ["letters"] * rows
    assert set(found.scores) == {"written_exact_match_digits", "written_exact_match_letters"}


def test_the_tasks_of_the_harness_are_indexed_only_where_a_task_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    Path("own_task.yaml").write_text("task: own\n")
    Path("own_group.yaml").write_text("group: both\ntask: [own, piqa]\n")
    whole = SimpleNamespace(all_tasks=["piqa"])
    monkeypatch.setattr(harness, "_own_tasks", lambda: whole)
    assert harness._manager(["piqa"], None) is harness._manager([{"group": "mine", "task": ["piqa"]}], None) is whole
    assert harness._manager([{"task": "mine"}], None).all_tasks == []
    assert harness._manager(["own"], ".").all_tasks == ["both", "own"]
    made = Mock(return_value=SimpleNamespace(all_subtasks=["own"]))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", made)
    for names in (["both"], ["own", "piqa"]):
        harness._manager(names, ".")
        assert made.call_args == call(include_path=".")  # with those of the harness


def test_a_constant_answer_is_called_degenerate(base: Any, tokenizer: Any) -> None:
    rows = [Example(f"Tom has {n} pens. More?", "yes" if n % 2 else "no") for n in range(40)]
    found = evaluate.classification(base, tokenizer, rows, classes=["no", "yes"])
    same = len({line["prediction"] for line in found.predictions}) == 1
    assert found.facts["majority"] == 0.5
    assert found.facts["degenerate"] == same
    assert metrics.answer_baselines(["a"] * 40, ["a", "b"] * 20)["degenerate"]


def test_every_question_set_has_its_three_yamls() -> None:
    conf = Path(conf_dir())
    for name in THEIRS:
        for file in (f"eval/{name}.yaml", f"eval/{name}_170k.yaml", f"dataset/{name}.yaml"):
            assert (conf / file).is_file(), file


@pytest.mark.parametrize("quant", ["none", pytest.param("4bit", marks=[pytest.mark.kernels, pytest.mark.slow])])
def test_rows_that_have_ended_leave_the_batch_and_nothing_else_changes(
    quant: str, compose: Compose, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = compose(f"quant={quant}", "train.steps=8", "train.batch_size=4", "train.learning_rate_scale=30")
    adapted: Any = build.attach_method(one, models_model.load(one.config.model, build.quantization(one), CPU), 8)
    rows = templates.examples(task.rows("train", 1000), "{question}\n", "{answer}")
    tokens = data_tokens.tokenize(tokenizer, rows[:100], 64)
    loop.train(adapted, tokens, one.config.train, pad_id=0, seed=0, meter=Meter(CPU), log=lambda row: None)
    prompts = [row.prompt for row in rows[:16]]
    assert decoding.takes_a_cache(adapted)
    ours = decoding.generate(adapted, tokenizer, prompts, max_new_tokens=20, batch_size=8)
    assert len({len(text) for text in ours}) > 1
    monkeypatch.setattr(likelihood, "takes_a_cache", lambda model: False)
    assert decoding.generate(adapted, tokenizer, prompts, max_new_tokens=20, batch_size=8) == ours


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "poly"])
def test_methods_that_prepare_their_inputs_are_left_to_transformers(method: str, compose: Compose) -> None:
    one = compose(f"method={method}")
    assert not decoding.takes_a_cache(build.attach_method(one, models_model.load(TINY, None, CPU), 10))


def test_an_evaluation_that_runs_out_of_memory_goes_on_with_half_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    done: list[list[int]] = []

    def work(numbers: list[int]) -> None:
        if len(numbers) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(numbers)

    decoding.in_batches([5, 9, 1, 7, 3, 8, 2], 8, work)
    assert [n for numbers in done for n in numbers] == [1, 5, 3, 0, 4, 6, 2]
    assert "going on with batches of 3 rows" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        decoding.in_batches([1], 1, lambda numbers: (_ for _ in ()).throw(torch.OutOfMemoryError("one row")))
    with pytest.raises(RuntimeError, match="a bug"):
        decoding.in_batches([1, 2], 2, lambda numbers: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_conversations_are_trained_on_through_the_template(tmp_path: Path) -> None:
    shutil.copytree(models_model.TINY, tmp_path / "chatty")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
    words = [
        "dataset=chat",
        f"dataset.path={schemas.write('chat', tmp_path)}",
        "model=causal_lm",
        "model.dtype=float32",
    ]
    words += [f"model.name_or_path={tmp_path / 'chatty'}", "train.steps=2", "dataset.drop_long=true"]
    words += ["eval=[perplexity]", "adapter.check=false"]
    result = cli.run_one([*words, "device=cpu"])
    assert result.error is None
    assert result.train_info["long_rows"] == 0
    predictions = (Path("multirun/default") / result.run_info["trial"] / "predictions" / "perplexity.jsonl").read_text()
    assert json.loads(predictions.splitlines()[0])["prompt"].startswith("<user>Say ")
    short = cli.run_one([*words, "device=cpu", "dataset.max_length=4", "seed=1"])
    assert (short.error or {})["type"] == "InputError"  # every row is too long


# Choices after one beginning, and after one each, in the fast tier; weights in 4 bits are read in the same batches.
CHOICES: list[Any] = [("arc_easy", "none"), ("winogrande", "none")]
CHOICES += [
    pytest.param(name, quant, marks=pytest.mark.slow)
    for name in ("arc_easy", "winogrande", "boolq")
    for quant in ("none", "4bit")
    if (name, quant) not in CHOICES
]


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "quant"), CHOICES)
def test_what_choices_begin_with_is_read_once_and_the_scores_are_the_same(
    name: str, quant: str, compose: Compose, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = compose(f"quant={quant}")
    adapted: Any = build.attach_method(
        one, models_model.load(one.config.model, build.quantization(one), CPU), 10
    ).eval()
    rows = examples(name, compose)
    shared = evaluate.multiple_choice(adapted, tokenizer, rows, batch_size=9)
    monkeypatch.setattr(likelihood, "takes_a_cache", lambda model: False)
    apart = evaluate.multiple_choice(adapted, tokenizer, rows, batch_size=9)
    assert shared.scores == apart.scores
    for mine, theirs in zip(shared.predictions, apart.predictions, strict=True):
        assert mine["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=1e-3)


def test_acc_norm_is_measured_only_where_the_choices_own_texts_are_scored(
    compose: Compose, base: Any, tokenizer: Any
) -> None:
    for name in ("winogrande", "commonsense_qa", "piqa"):
        found = evaluate.multiple_choice(base, tokenizer, examples(name, compose))
        assert ("acc_norm" in found.scores) == ("correct_norm" in found.predictions[0]) == (name == "piqa")
        assert ("norm_histogram" in found.facts) == (name == "piqa")
        assert found.facts["headline"] == ("acc_norm" if name == "piqa" else "acc")


def test_the_headline_of_every_task_is_that_of_lm_evaluation_harness(compose: Compose) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, file in {**THEIRS, "arc_challenge": "arc/arc_easy.yaml"}.items():
        theirs = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file, resolve_func=False)
        metrics_of_theirs = [entry["metric"] for entry in theirs["metric_list"]]
        mine = yaml.safe_load((Path(conf_dir()) / "eval" / f"{name}.yaml").read_text())
        assert mine["headline"] == ("acc_norm" if "acc_norm" in metrics_of_theirs else "acc"), name
        measured = evaluate.measures(evaluate.multiple_choice, mine)
        assert ("acc_norm" in (measured or ())) == (name not in ("winogrande", "commonsense_qa")), name


def lettered(row: dict[str, Any]) -> dict[str, Any]:
    """A user's own reader: the letters are scored."""
    choices = [{"answer": letter, "text": text} for letter, text in zip("AB", row["of"], strict=True)]
    return row | {"choices": choices, "gold": 0, "answer": "A"}


def spelt(row: dict[str, Any]) -> dict[str, Any]:
    """A user's own reader: the texts are scored."""
    return row | {"choices": [{"answer": text} for text in row["of"]], "gold": 0, "answer": row["of"][0]}


@pytest.mark.parametrize(
    ("reader", "answer", "normed"),
    [("spelt", " {answer}", True), ("spelt", " ({answer})", False), ("lettered", " {answer}", False)],
)
def test_choices_of_a_users_own_have_acc_norm_if_their_texts_are_scored(
    reader: str, answer: str, normed: bool, compose: Compose, base: Any, tokenizer: Any
) -> None:
    Path("own.jsonl").write_text("".join(json.dumps({"q": f"{n}?", "of": ["a pen", "no"]}) + "\n" for n in range(4)))
    words = ["eval=[piqa]", "eval.piqa.path=own.jsonl", f"eval.piqa.reader={__name__}.{reader}"]
    words += ["eval.piqa.prompt='{q}'", f"eval.piqa.answer='{answer}'"]
    if not normed:
        with pytest.raises(InputError, match=r"^eval\.piqa\.headline: eval\.piqa does not measure acc_norm"):
            compose(*words)
        chosen = ["eval.piqa.headline=null", "train.eval_every=2", "train.best_metric=piqa.acc_norm"]
        with pytest.raises(InputError, match=r"^train\.best_metric: eval\.piqa does not measure acc_norm"):
            compose(*words, *chosen)
        words.append("eval.piqa.headline=null")
    one = compose(*words)
    rows = evaluations.test_examples(one.config, "piqa", data_rows.read_rows("own.jsonl"))
    found = build.evaluator(one, "piqa")(base, tokenizer, rows)
    assert ("acc_norm" in found.scores) == normed
    assert found.facts["headline"] == ("acc_norm" if normed else "acc")


def test_a_metric_that_a_preset_does_not_measure_is_refused(compose: Compose) -> None:
    rows = schemas.write("winogrande", Path())
    words = ["eval=[winogrande]", f"eval.winogrande.path={rows}", "train.eval_every=2"]
    with pytest.raises(InputError, match=r"^train\.best_metric: eval\.winogrande does not measure acc_norm, because"):
        compose(*words, "train.best_metric=winogrande.acc_norm")
    with pytest.raises(InputError, match=r"^eval\.winogrande\.headline: .* must be acc$"):
        compose(*words, "eval.winogrande.headline=acc_norm")


def constant(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    """Have every model write this label and find its sentence, or its choice, the likeliest."""

    def likelihoods(model: Any, tokenizer: Any, groups: Any, **_: Any) -> tuple[list[list[float]], dict[str, int]]:
        place = int(label[-1]) - 1
        return [[0.0 if n == place else -1.0 for n, _ in enumerate(group)] for group in groups], {}

    monkeypatch.setattr(evaluate, "grouped_likelihoods", likelihoods)
    monkeypatch.setattr(evaluate, "generate", lambda model, tokenizer, rows, **_: [f"It is {label}."] * len(rows))


def test_a_constant_answer_is_flagged_in_every_way_of_judging(
    compose: Compose, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant(monkeypatch, "solution2")
    rows = [row for row in schemas.SCHEMAS["piqa"] for _ in range(20)]
    Path("piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = compose("eval=[piqa_170k]", "eval.piqa_170k.path=piqa.jsonl")
    prompts = evaluations.test_examples(one.config, "piqa_170k", rows)
    found = evaluate.instruction(cast(Any, None), tokenizer, prompts).facts
    for way in ("", "label_", "choice_"):
        assert found[f"{way}degenerate"] is True, way
        assert found[f"{way}histogram"] == {"solution2": 300}, way
    assert (found["majority"], found["random"]) == (160 / 300, 0.5)
    plain = compose("eval=[piqa]", "eval.piqa.path=piqa.jsonl")
    found = evaluate.multiple_choice(
        cast(Any, None), tokenizer, evaluations.test_examples(plain.config, "piqa", rows)
    ).facts
    assert (found["degenerate"], found["histogram"]) == (True, {"2": 300})  # the texts differ from row to row


def test_chance_is_that_of_each_questions_own_number_of_choices(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ARC, where one question has five choices and most have four."""
    constant(monkeypatch, "answer1")
    prompt = "Please choose. Answer1: a {}\n\nAnswer format: answer1/answer2{}"
    more = [prompt.format("Answer2: b Answer3: c Answer4: d", "/answer3/answer4"), prompt.format("Answer2: b", "")]
    rows = [{"instruction": text, "answer": "answer2"} for text in more * 10]
    made = templates.examples(rows, "{instruction}", "{answer}", reader="peftsweep.data.tasks.instruction")
    assert evaluate.instruction(cast(Any, None), tokenizer, made).facts["random"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert evaluate.multiple_choice(cast(Any, None), tokenizer, made).facts["random"] == pytest.approx(3 / 8)


def test_a_constant_class_is_flagged_by_its_label_and_f1_has_its_baselines(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant(monkeypatch, "class2")
    rows = [Example(f"{n}?", " yes" if n % 4 == 0 else " no") for n in range(40)]
    monkeypatch.setattr(evaluate, "classifies", lambda model: False)
    found = evaluate.classification(cast(Any, None), tokenizer, rows, classes=["no", "yes"])
    assert (found.facts["degenerate"], found.facts["histogram"]) == (True, {"yes": 40})
    assert found.scores["f1"].value == pytest.approx(0.4)
    assert (found.facts["f1_majority"], found.facts["f1_random"]) == (0.0, pytest.approx(1 / 3))


def test_a_class_whose_name_begins_with_another_is_as_likely_as_the_row_that_is_trained_on(
    base: Any, tokenizer: Any
) -> None:
    rows = [Example("Tom has 3 pens and 7 pens, so", f" {name}") for name in ("1", "10")]
    found = evaluate.classification(base, tokenizer, rows, classes=["1", "10"])
    trained = [line["log_likelihood"] for line in evaluate.perplexity(base, tokenizer, rows).predictions]
    for line in found.predictions:
        assert line["log_likelihoods"] == pytest.approx(trained, rel=1e-5)
    others = evaluate.classification(base, tokenizer, rows[:1], classes=["1", "20"])
    assert others.predictions[0]["log_likelihoods"][0] > trained[0]  # the end mark counts only where it must


STOPS = [["0 #", "plums"]]
STOPS_TOO = [["\n"], ["."], ["ow man", "+"], ["Question:", "</s>"]]


@pytest.mark.parametrize("stop", [*STOPS, *(pytest.param(stop, marks=pytest.mark.slow) for stop in STOPS_TOO)])
def test_what_is_written_ends_where_lm_evaluation_harness_ends_it(
    stop: list[str], base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    prompts = [row["question"][: 10 + n] for n, row in enumerate(task.rows("test", 8, 0))]
    wrapped = HFLM(pretrained=base, tokenizer=tokenizer, backend="causal", max_length=512, batch_size=4)
    settings = {"until": stop, "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    requests = [
        Instance("generate_until", {}, (text, settings), n, (None, None, None)) for n, text in enumerate(prompts)
    ]
    theirs = wrapped.generate_until(requests, disable_tqdm=True)
    options: dict[str, Any] = {"max_new_tokens": 24, "batch_size": 5, "stop": stop}
    assert decoding.generate(base, tokenizer, prompts, **options) == theirs
    monkeypatch.setattr(decoding, "takes_a_cache", lambda model: False)  # by transformers' own generation
    assert decoding.generate(base, tokenizer, prompts, **options) == theirs
    by_beams = decoding.generate(base, tokenizer, prompts, **options, num_beams=2)
    assert not any(text in written for text in stop for written in by_beams)


def test_a_row_that_has_reached_a_stop_text_is_written_on_no_further(
    base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, steps = ["Tom has", "Mia sells"], list[int]()
    free = decoding.generate(base, tokenizer, prompts, max_new_tokens=24)
    stop = [text[1:3] for text in free]
    forward = base.forward

    def counted(*args: Any, **options: Any) -> Any:
        steps.append(1)
        return forward(*args, **options)

    monkeypatch.setattr(base, "forward", counted)
    assert decoding.generate(base, tokenizer, prompts, max_new_tokens=24, stop=stop) != free
    assert len(steps) < 12


def test_a_stop_text_in_the_prompt_ends_nothing(base: Any, tokenizer: Any) -> None:
    shots = "Question: 3+4=7\n\nQuestion: 1+1=2\n\nQuestion: Tom has 3"
    free = decoding.generate(base, tokenizer, [shots], max_new_tokens=8)
    assert free[0]
    assert "Question:" not in free[0]
    assert decoding.generate(base, tokenizer, [shots], max_new_tokens=8, stop=["Question:"]) == free


def test_prompts_that_are_cut_and_references_that_cannot_be_written_are_counted(base: Any, tokenizer: Any) -> None:
    rows = [Example("Tom has 3 apples. " * n, "3+4=7 #7") for n in (1, 2, 9, 12)]
    tokens = [len(ids) for ids in data_tokens.prompt_ids(tokenizer, rows)]
    limit = tokens[1]
    answer = len(tokenizer("3+4=7 #7", add_special_tokens=False).input_ids)
    found = evaluate.generation(base, tokenizer, rows, max_new_tokens=answer, max_length=limit).facts
    assert (found["truncated_prompts"], found["long_references"]) == (2, 0)
    found = evaluate.generation(base, tokenizer, rows[:1], max_new_tokens=answer - 1, max_length=limit).facts
    assert (found["truncated_prompts"], found["long_references"]) == (0, 1)
    found = evaluate.perplexity(base, tokenizer, rows, max_length=tokens[2] + answer).facts
    assert (found["truncated_prompts"], found["truncated_answers"]) == (2, 0)  # the end mark takes a place too
    found = evaluate.perplexity(base, tokenizer, rows, max_length=answer).facts
    assert (found["truncated_prompts"], found["truncated_answers"]) == (4, 4)
    found = evaluate.classification(base, tokenizer, rows, classes=["3+4=7 #7", "no"], max_length=tokens[1] + 9).facts
    assert (found["truncated_prompts"], found["truncated_answers"]) == (2, 0)


def test_references_that_count_as_wrong_as_the_tokenizer_writes_them_are_counted(base: Any, tokenizer: Any) -> None:
    """Even of a model that writes every token of every reference."""
    answers = ["7", "7</s>", "<s>7", "3+4=7\n\n#7", " 7 ", "\U0001f600 7"]
    ids = tokenizer(answers, add_special_tokens=False).input_ids
    written = [text.partition("\n\n")[0] for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    wrong = sum(text.strip() != answer.strip() for text, answer in zip(written, answers, strict=True))
    assert wrong >= 3
    rows = [Example("Tom has", answer) for answer in answers]
    found = evaluate.generation(base, tokenizer, rows, max_new_tokens=2, stop=["\n\n"])
    assert found.facts["unwritable_references"] == wrong
    label = partial(metrics.label_match, labels=["yes", "no"])
    found = evaluate.generation(base, tokenizer, [Example("Tom has", "yes</s>")], metric=label, max_new_tokens=2)
    assert found.facts["unwritable_references"] == 0
    assert "tiny: 4 of 6 rows have a reference that counts as wrong" in cautions({}, {"tiny": UNWRITABLE}, {})[0]


UNWRITABLE = {"accuracy": {"value": 0.0, "stderr": None, "n": 6}, "unwritable_references": 4}


def test_pefts_reading_is_the_metric_of_its_comparison_with_ours_beside_it(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    generated = ["#### 18 dollars", "#### 18\nQuestion: 2+3\n#### 5", "#### 18", "no idea"]
    monkeypatch.setattr(
        evaluate, "generate", lambda model, tokenizer, rows, **how: generated if not how["stop"] else []
    )
    Path("test.jsonl").write_text(
        "".join(json.dumps({"question": f"{n}", "answer": "#### 18"}) + "\n" for n in generated)
    )
    one = compose("eval=[gsm8k_comparison]", "eval.gsm8k.path=test.jsonl")
    rows = evaluations.test_examples(one.config, "gsm8k", data_rows.read_rows("test.jsonl"))
    found = build.evaluator(one, "gsm8k")(cast(Any, None), tokenizer, rows)
    assert (found.scores["accuracy"].value, found.scores["number_accuracy"].value) == (0.25, 0.75)
    assert [line["number_extracted"] for line in found.predictions] == ["18", "18", "18", None]
    assert [line["extracted"] for line in found.predictions] == ["18 dollars", "5", "18", None]
    compose(
        "eval=[gsm8k_comparison]",
        "eval.gsm8k.path=test.jsonl",
        "train.eval_every=2",
        "train.best_metric=gsm8k.number_accuracy",
    )
    with pytest.raises(InputError, match=r"^eval\.gsm8k\.beside\.number\._target_=nowhere: no such"):
        compose("eval=[gsm8k_comparison]", "eval.gsm8k.path=test.jsonl", "eval.gsm8k.beside.number._target_=nowhere")


def test_of_texts_that_may_occur_the_shortest_must_be_writable(base: Any, tokenizer: Any) -> None:
    rows = [Example("Tom has", "a very long text of many many words | 7"), Example("Tom has", "a very long text of it")]
    metric = partial(metrics.contains)
    assert evaluate.generation(base, tokenizer, rows, metric=metric, max_new_tokens=3).facts["long_references"] == 1
    assert evaluate.generation(base, tokenizer, rows, max_new_tokens=3).facts["long_references"] == 2
