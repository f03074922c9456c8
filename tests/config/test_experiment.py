"""Experiments of PEFT's comparison run as they are, and say field by field what was taken of their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from peftsweep import InputError
from peftsweep.config import build, experiment
from peftsweep.config.compose import Trial
from peftsweep.data import batches
from peftsweep.data import rows as data_rows
from peftsweep.data import tokens as data_tokens
from peftsweep.data.templates import Example
from peftsweep.forecast import forecast, predict
from peftsweep.models import losses, model, parts
from peftsweep.models import saved as models_saved
from peftsweep.schema import DatasetConfig, ModelConfig, ValidationConfig
from peftsweep.study.record import Result
from peftsweep.sweep import sweep
from peftsweep.trial import outcome

Compose = Callable[..., Trial]
Command = Callable[..., tuple[int, str, str]]

LORA = {"peft_type": "LORA", "r": 4, "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "new_flag": None}
SMALL = ["model=tiny", "dataset=tiny_math"]
TEMPLATE = "Q: {query}\nA:"


def folder(place: Path, **files: dict[str, Any]) -> list[str]:
    """Write an experiment, a file a keyword; the words that run it."""
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    return ["method=from/adapter_config", f"method.path='{place}'"]


def rows(file: str, count: int, **columns: str) -> list[dict[str, str]]:
    made = [{name: text.format(n=n) for name, text in columns.items()} for n in range(count)]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in made))
    return made


COMPARISON = [
    "sweep=peft_comparison",
    "+point/peft_comparison=lora--llama-3.2-3b-rank32",
    "model=tiny",
    "dataset.path=metamath.jsonl",
    "dataset.test_path=gsm8k.jsonl",
    "dataset.validation.path=gsm8k_train.jsonl",
]


@pytest.fixture
def comparison_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Local files of the comparison's three data sets; the rows of GSM8K's training set."""
    monkeypatch.chdir(tmp_path)
    rows("metamath.jsonl", 20, query="What is {n} and one?", response="It is more.\nThe answer is: {n}")
    rows("gsm8k.jsonl", 4, question="How many are {n}?", answer="#### {n}")
    return rows("gsm8k_train.jsonl", 90, question="What makes {n}?", answer="Counting.\n#### {n}")


# ---- fields ----------------------------------------------------------------------------------------


def test_every_field_of_an_experiment_is_taken_or_named(compose: Compose, tmp_path: Path) -> None:
    training = {
        **{"max_steps": 7, "compile": True, "eval_steps": 3, "batch_size_eval": 9, "use_amp": True, "dtype": "int4"},
        **{"generation_kwargs": {"max_new_tokens": 33, "max_length": 90, "do_sample": True, "num_beams": 2}},
        **{"query_template": TEMPLATE, "model_id": "someone/model", "init_kv_cache_prefix": None, "seed": 5},
    }
    one = compose(
        *folder(tmp_path / "lora" / "r4", adapter_config=LORA, training_params=training),
        *SMALL,
        "seed=1",
        "eval=[exact_match]",
    )
    taken, not_taken = one.experiment["taken"], one.experiment["not_taken"]
    fields = {name.partition(".")[0] for name in (*taken, *not_taken)}
    assert fields == {*LORA, *training}
    assert (taken["r"], taken["max_steps"], taken["dtype"]) == ("method.r", "train.steps", "quant")
    assert not_taken["model_id"] == "the command line sets model"
    assert not_taken["seed"] == "the command line sets seed"
    warning = experiment.unheeded(one.experiment) or ""
    assert "generation_kwargs.do_sample (" in warning
    assert "generation_kwargs.max_length (" in warning
    assert "new_flag" not in warning  # which is unset
    train, judged = one.config.train, one.config.eval["exact_match"]
    assert (train.compile, train.compile_dynamic, train.eval_every) == ("inductor", True, "3")
    assert (train.autocast and train.autocast.name, one.config.seed) == ("float16", 1)
    assert (judged["batch_size"], judged["max_new_tokens"], judged["num_beams"]) == (9, 33, 2)
    assert (one.choices["quant"], one.config.quant["bnb_4bit_quant_type"]) == ("4bit", "fp4")
    assert outcome.begin(one, tmp_path / "record").run_info["experiment"] == one.experiment


def test_the_model_is_the_one_that_an_experiment_names(compose: Compose, tmp_path: Path) -> None:
    words = ["dataset=tiny_math", "model.init=random"]
    by_id = folder(tmp_path / "a", adapter_config=LORA, training_params={"model_id": "facebook/opt-350m"})
    one = compose(*by_id, *words)
    assert (one.choices["model"], one.config.model.name_or_path) == ("opt_350m", "facebook/opt-350m")
    assert (one.config.model.init.name, one.config.model.architecture["model_type"]) == ("random", "opt")
    assert one.config.train.learning_rate_scale == 1  # the embedded model's recipe is not another's
    by_base = LORA | {"base_model_name_or_path": "microsoft/phi-2", "revision": "abc"}
    two = compose(*folder(tmp_path / "b", adapter_config=by_base), *words)
    assert (two.choices["model"], two.config.model.revision) == ("phi2", "abc")
    both = folder(tmp_path / "c", adapter_config=by_base, training_params={"model_id": "facebook/opt-350m"})
    three = compose(*both, *words)
    assert (three.choices["model"], three.config.model.revision) == ("opt_350m", None)
    assert three.experiment["not_taken"]["base_model_name_or_path"] == "model_id is facebook/opt-350m"
    four = compose(*folder(tmp_path / "d", adapter_config=LORA, training_params={}), "dataset=tiny_math")
    assert four.config.model.name_or_path == "tiny"  # which names none


def test_a_template_is_used_in_training_and_in_test(compose: Compose, comparison_rows: Any, tmp_path: Path) -> None:
    words = folder(tmp_path / "a", adapter_config=LORA, training_params={"query_template": TEMPLATE})
    files = ["dataset.path=metamath.jsonl", "dataset.test_path=gsm8k.jsonl"]
    one = compose(*words, "dataset=metamath", *files)
    assert one.config.dataset.prompt == TEMPLATE
    assert one.config.eval["gsm8k"]["prompt"] == "Q: {question}\nA:"
    assert one.experiment["taken"]["query_template"] == "dataset.prompt, eval.gsm8k.prompt"


@pytest.mark.parametrize("name", ["training_params", "training_parameters"])
def test_both_names_of_the_training_parameters_are_read(name: str, compose: Compose, tmp_path: Path) -> None:
    words = folder(tmp_path / "a", adapter_config=LORA, **{name: {"max_steps": 300}})
    assert compose(*words, *SMALL).config.train.steps == 300
    assert experiment.folders(str(tmp_path)) == [tmp_path / "a"]
    folder(tmp_path / "a", training_params={}, training_parameters={})
    with pytest.raises(InputError, match=r"holds both training_params\.json and"):
        compose(*words, *SMALL)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"dtype": "float8"}, "dtype=float8: must be float32, float16, bfloat16, int8 or int4"),
        ({"eval_steps": 30, "max_steps": 20}, "eval_steps=30: must be a number of steps, at most max_steps=20"),
        ({"query_template": "no column"}, "query_template must contain {query}"),
    ],
)
def test_impossible_parameters_are_refused(
    params: dict[str, Any], problem: str, compose: Compose, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        compose(*folder(tmp_path / "a", adapter_config=LORA, training_params=params), *SMALL)
    assert problem in str(caught.value)


def test_parameters_of_the_benchmark_time_inference(compose: Compose, tmp_path: Path) -> None:
    params = {"max_new_tokens": 7, "category_generation_params": {"long": {"max_new_tokens": 9}}, "use_4bit": True}
    params |= {"num_inference_runs": 3, "train_steps": 5, "use_8bit": False, "seed": 42}
    one = compose(*folder(tmp_path / "a", adapter_config=LORA, benchmark_params=params), *SMALL)
    categories = {name: options["new_tokens"] for name, options in one.config.inference["categories"].items()}
    assert categories == {"short": 7, "medium": 7, "long": 9}
    assert (one.choices["inference"], one.config.inference["runs"], one.config.seed) == ("standard", 3, 42)
    assert (one.choices["quant"], one.config.quant["bnb_4bit_quant_type"]) == ("4bit", "nf4")
    assert one.experiment["not_taken"]["train_steps"] == "inference has no such option"


def test_limits_are_those_of_the_method(compose: Compose, tmp_path: Path) -> None:
    oft = {"peft_type": "OFT", "r": 0, "oft_block_size": 32, "task_type": "CAUSAL_LM"}  # the defaults of OFTConfig
    one = compose(*folder(tmp_path / "a", adapter_config=oft), *SMALL)
    assert (forecast.check(one).trainable_parameters or 0) > 0
    for name, adapter_config, least in (("b", oft | {"r": -1}, 0), ("c", LORA | {"r": 0}, 1)):
        with pytest.raises(InputError, match=f"method.r={adapter_config['r']}: must be at least {least}"):
            compose(*folder(tmp_path / name, adapter_config=adapter_config), *SMALL)


# ---- the comparison --------------------------------------------------------------------------------


def test_the_comparison_trains_on_whole_texts(compose: Compose, comparison_rows: Any) -> None:
    """The loss is that of transformers for labels of all tokens."""
    one = compose(*COMPARISON)
    tokenizer = model.load_tokenizer(one.config.model)
    assert one.rows is not None
    tokens = build.training_tokens(one, tokenizer, one.rows.train)
    base = model.load(one.config.model, None, torch.device("cpu"))
    batch = batches.collate(tokens[:1], tokenizer.pad_token_id)
    ids = torch.tensor([tokens[0].ids])
    with torch.no_grad():
        whole = base(input_ids=ids, labels=ids).loss.item()
        assert losses.answer_losses(base, batch).mean().item() == pytest.approx(whole, rel=1e-5)
    assert tokens[0].answer_tokens == len(tokens[0].ids) - 1
    assert tokens[0].ids[-1] == tokenizer.eos_token_id


def test_a_long_text_loses_its_end() -> None:
    tokenizer = model.load_tokenizer(ModelConfig("tiny"))
    [whole] = data_tokens.tokenize(tokenizer, [Example("one two three", " four five")], 99, whole=True)
    [cut] = data_tokens.tokenize(tokenizer, [Example("one two three", " four five")], 5, whole=True)
    assert cut.ids == whole.ids[:5]


def test_the_comparison_leaves_out_rows_beyond_1300_characters(compose: Compose, comparison_rows: Any) -> None:
    """Of query, a blank and response, as PEFT's comparison counts them, whatever the template adds."""
    made = [{"query": "q" * 100, "response": "r" * (length - 101)} for length in (1299, 1300, 1301)]
    Path("metamath.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made * 10))
    one = compose(*COMPARISON)
    assert one.rows is not None
    assert {len(row["response"]) for row in one.rows.train} == {1198, 1199}
    assert one.rows.left_out["long_rows"] == 10


def test_the_comparison_validates_on_rows_of_gsm8k(
    compose: Compose, comparison_rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = compose(*COMPARISON, "dataset.validation_samples=3")
    numpy.random.seed(0)  # as PEFT's comparison chooses them
    indices = numpy.arange(len(comparison_rows))
    numpy.random.shuffle(indices)
    assert one.rows is not None
    assert [row["question"] for row in one.rows.validation] == [comparison_rows[n]["question"] for n in indices[:3]]
    assert len(one.rows.train) == 20  # none was held out
    assert (one.config.train.eval_every, one.config.dataset.loss_on.name) == ("250", "text")


def test_a_column_that_validation_rows_lack_is_an_error(comparison_rows: Any) -> None:
    own = DatasetConfig(name="x", path="metamath.jsonl", test_path="gsm8k.jsonl", prompt="{query}", answer="{response}")
    own.validation = ValidationConfig(path="gsm8k_train.jsonl", columns={"query": "qestion"})
    with pytest.raises(InputError, match="no 'qestion'; did you mean 'question'"):
        data_rows.load_rows(own, validation=True)


# ---- the dry run -----------------------------------------------------------------------------------


def test_a_dry_run_prints_each_point_as_it_is_planned(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[int] = []
    real = forecast.check

    def check(one: Trial) -> forecast.Forecast:
        seen.append(capsys.readouterr().out.count("trainable"))
        return real(one)

    monkeypatch.setattr(forecast, "check", check)
    monkeypatch.setattr(forecast, "prediction", lambda *_, **__: None)  # of memory, which no line is about
    sweep.run([compose(f"method.r={r}", "dry_run=true") for r in (2, 3, 4)])
    assert seen == [0, 1, 1]  # lines since the trial before


# In the fast tier one that draws its indices.
SHAPES = ["shira", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamss", "frod", "unilora"))]


@pytest.mark.parametrize("method", SHAPES)
def test_a_dry_run_counts_on_shapes(method: str, compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted without a weight of the base is what is attached to the base."""
    places: list[str] = []
    bare = predict.skeleton

    def skeleton(config: Any, quantization: Any, where: str, classes: int) -> Any:
        places.append(where)
        return bare(config, quantization, where, classes)

    monkeypatch.setattr(forecast, "skeleton", skeleton)
    for name in ("_FORECASTS", "_SIZES"):  # without those of other tests
        monkeypatch.setattr(forecast, name, {})
    one = compose(f"method={method}")
    foreseen = forecast.check(one)
    assert set(places) == {"meta"}
    adapted: Any = build.attach_method(one, model.load(one.config.model, None, torch.device("cpu")), 10)
    counted = parts.count(adapted)
    assert (foreseen.trainable_parameters, foreseen.total_parameters) == (counted.trainable, counted.total)
    header = 3 * 2 * 64 * 16 if method == "adamss" else 0  # digits of the sizes of its clusters
    assert abs((foreseen.adapter_bytes or 0) - models_saved.saved_bytes(adapted)) <= header


@pytest.mark.slow
def test_the_file_of_adalora_is_foreseen_after_training(run_small: Callable[..., Result], compose: Compose) -> None:
    """Its tensors exactly, as q and v of the embedded model are of one size; its header but for some digits."""
    words = ["method=adalora", "method.init_r=8", "method.target_r=4", "method.tinit=1", "method.tfinal=5"]
    words += ["train.steps=10", "targets=q"]
    saved = run_small(*words).train_info["adapter_bytes"]
    foreseen = forecast.check(compose(*words)).adapter_bytes or 0
    assert abs(saved - foreseen) < 0.03 * saved


def test_the_file_of_adalora_holds_its_target_rank(compose: Compose) -> None:
    words = ["method=adalora", "method.init_r=12"]
    few, all_of_them = (forecast.check(compose(*words, f"method.target_r={rank}")) for rank in (4, 12))
    assert 0.3 < (few.adapter_bytes or 0) / (all_of_them.adapter_bytes or 1) < 0.4
    assert few.trainable_parameters == all_of_them.trainable_parameters  # in training there are all
