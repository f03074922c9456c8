"""A saved adapter is scored as the trial that made it: what the record says, what the command line may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig
from safetensors.torch import load_file, save_file

from peftsweep import InputError, cli
from peftsweep.config import identity, restored
from peftsweep.config.compose import Trial
from peftsweep.data import fingerprint
from peftsweep.errors import say_once
from peftsweep.forecast import forecast
from peftsweep.models import model
from peftsweep.study.record import Result

Compose = Callable[..., Trial]
FIRST = Path(__file__).parents[1] / "fixtures" / "first_version" / "multirun"


def write(name: str, rows: list[dict[str, str]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def saved(config: dict[str, Any], study: str = "ranks", **sections: Any) -> Path:
    """A trial of ours whose record says ``config`` in place of its own; nothing is trained for it."""
    source = sorted((FIRST / study).glob("tiny-*"))[-1]  # of the ranks that of 4
    place = Path("multirun") / study / source.name
    shutil.copytree(source, place)
    file = place / "result.json"
    record = json.loads(file.read_text())
    for key, value in config.items():
        section, _, name = key.partition(".")
        if name:
            record["config"][section][name] = value
        else:
            record["config"][section] = value
    record |= {key: record[key] | value for key, value in sections.items()}
    file.write_text(json.dumps(record))
    return place


@pytest.fixture
def alpaca() -> Path:
    """A trial on a file of its own, with templates, lengths and a seed of its own."""
    write("rows.jsonl", [{"q": f"{n}+{n}?", "a": f"It is {2 * n}."} for n in range(30)])
    dataset = {"name": "file", "path": "rows.jsonl", "prompt": "{q} ", "answer": "{a}", "max_length": 99}
    dataset |= {"generator": None, "samples": 20}
    own = {f"dataset.{key}": value for key, value in dataset.items()}
    evaluation = {"perplexity": {"_target_": "peftsweep.evaluation.evaluate.perplexity", "batch_size": 8}}
    own |= {"seed": 7, "eval": evaluation, "train.batch_size": 3}
    return saved(own, choices={"dataset": "file"})


def test_a_saved_adapter_restores_the_whole_trial(alpaca: Path, compose: Compose) -> None:
    one = compose(f"adapter.path={alpaca}")
    own = one.config.dataset
    assert (own.path, own.prompt, own.answer, own.max_length) == ("rows.jsonl", "{q} ", "{a}", 99)
    assert (own.samples, own.generator, one.config.seed, one.choices["dataset"]) == (20, None, 7, "file")
    assert (one.config.method["r"], one.config.train.batch_size, one.config.train.steps) == (4, 3, 0)
    assert list(one.config.eval) == ["perplexity"]
    assert one.rows is not None
    assert one.rows.test[0].keys() == {"q", "a"}


def test_what_is_asked_of_a_training_is_told_as_nothing_is_trained(
    alpaca: Path, compose: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    say_once.cache_clear()
    compose(f"adapter.path={alpaca}", "train.steps=0", "train.autocast_adapter_dtype=false")
    assert capsys.readouterr().err == ""
    one = compose(f"adapter.path={alpaca}", "train.steps=5", "train.learning_rate=1e-3", "adapter.save=true")
    assert one.config.train.steps == 0
    said = "peftsweep: train.learning_rate, train.steps, adapter.save: not used with adapter.path="
    [line] = [line for line in capsys.readouterr().err.splitlines() if "not used with" in line]
    assert line.startswith(said)


def test_a_key_wins_over_the_record_and_a_group_replaces_its_own(alpaca: Path, compose: Compose) -> None:
    one = compose(f"adapter.path={alpaca}", "dataset.max_length=50", "seed=1", "eval.perplexity.samples=2")
    assert (one.config.dataset.max_length, one.config.dataset.path, one.config.seed) == (50, "rows.jsonl", 1)
    assert one.config.eval["perplexity"]["samples"] == 2
    other = compose(f"adapter.path={alpaca}", "dataset=tiny_math")
    assert (other.config.dataset.path, other.config.dataset.max_length) == (None, 128)
    assert (list(other.config.eval), other.config.method["r"]) == (["tiny_math", "perplexity"], 4)
    half = compose(f"adapter.path={alpaca}", "quant=4bit", "model.dtype=bfloat16")
    assert (half.choices["quant"], half.config.model.dtype.name) == ("4bit", "bfloat16")


@pytest.mark.parametrize("rule", [5, 1])
def test_a_base_whose_files_have_changed_is_said(
    rule: int, compose: Compose, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model.TINY, "base")
    place = saved({"model.name_or_path": "base"}, run_info={"identity_rule": rule})
    sha = fingerprint.of_values(identity.model_identity(compose(f"adapter.path={place}").config.model))
    shutil.rmtree("multirun")
    saved({"model.name_or_path": "base"}, run_info={"identity_rule": rule}, meta_info={"model_sha": sha})
    say_once.cache_clear()
    capfd.readouterr()
    compose(f"adapter.path={place}")
    Path("base/README.md").write_text("a file that no library reads")
    compose(f"adapter.path={place}")
    assert capfd.readouterr().err == ""
    Path("base/model.safetensors").write_bytes(Path("base/model.safetensors").read_bytes()[:-1] + b"x")
    compose(f"adapter.path={place}")
    compose(f"adapter.path={place}")
    warning = "its files have changed since the trial of adapter.path="
    assert capfd.readouterr().err.count(warning) == (rule > 1)  # the first rule had other hashes, and once is enough


def test_test_path_alone_scores_a_checkpoint_on_another_file(alpaca: Path, compose: Compose) -> None:
    other = write("other.jsonl", [{"q": "1+1?", "a": "It is 2."}, {"q": "9+1?", "a": "It is 10."}])
    one = compose(f"adapter.path={alpaca}", f"dataset.test_path={other}")
    assert one.rows is not None
    assert [row["q"] for row in one.rows.test] == ["1+1?", "9+1?"]
    whole = compose(f"adapter.path={alpaca}", "dataset.test_path=rows.jsonl")  # on what it was trained on
    assert whole.rows is not None
    assert len(whole.rows.test) == 30
    assert one.identity != whole.identity != compose(f"adapter.path={alpaca}").identity


def test_files_of_a_record_are_found_beside_its_study(
    alpaca: Path, compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [compose(f"{key}={alpaca}", "study=again").identity for key in ("adapter.path", "repeat")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = [compose(f"{key}={tmp_path / alpaca}", "study=again").identity for key in ("adapter.path", "repeat")]
    assert found == here


def test_a_trial_s_folder_may_lie_directly_below_the_root() -> None:
    held = Result({}, {}, {"model": {"name_or_path": "base"}}, folder=Path("/trial"))
    assert restored.located("model", held) == {"name_or_path": "base"}


@pytest.mark.parametrize("dataset", ["tiny_math", "tiny_direction", "gsm8k", "text"])
def test_a_test_file_that_is_not_there_is_an_error_with_every_dataset(dataset: str, compose: Compose) -> None:
    words = ["dataset.path=rows.txt"] if dataset == "text" else []
    Path("rows.txt").write_text("a text\n\nanother\n")
    with pytest.raises(InputError, match=r"dataset\.test_path=no\.jsonl: no such file"):
        compose(f"dataset={dataset}", *words, "dataset.test_path=no.jsonl")


def test_the_embedded_datasets_take_a_test_file(compose: Compose) -> None:
    file = write("mine.jsonl", [{"question": "1+1?", "answer": "2"}])
    one = compose("dataset=tiny_math", f"dataset.test_path={file}")
    assert one.rows is not None
    assert one.rows.test == [{"question": "1+1?", "answer": "2"}]


def test_a_changed_test_file_beside_a_dataset_of_the_hub_is_another_trial(compose: Compose) -> None:
    words = ("dataset=gsm8k", "dataset.test_path=mine.jsonl")
    write("mine.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    before = compose(*words).identity
    write("mine.jsonl", [{"question": "1+2?", "answer": "#### 3"}])
    assert compose(*words).identity != before


@pytest.mark.parametrize(
    "word",
    [
        *("method=dora", "method=ia3", "method=full", "method.r=64", "method.lora_alpha=1", "method.use_rslora=true"),
        *("targets=q", "targets.roles=[q]", "targets.modules=[q_proj]", "model=opt_350m", "model.init=random"),
        "model.task=seq_cls",
    ],
)
def test_what_contradicts_the_saved_adapter_is_refused(word: str, compose: Compose) -> None:
    place = saved({})
    with pytest.raises(InputError, match=r"contradicts adapter\.path=") as refused:
        compose(f"adapter.path={place}", word)
    assert str(refused.value).startswith(word.partition("=")[0])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("word", ["method=lora", "method.r=4", "targets=default", "model=tiny", "method.lora_alpha=8"])
def test_what_agrees_with_the_saved_adapter_is_no_contradiction(word: str, compose: Compose) -> None:
    place = saved({})
    assert compose(f"adapter.path={place}", word).identity == compose(f"adapter.path={place}").identity


def test_a_copy_of_the_base_is_the_same_base(compose: Compose, tmp_path: Path) -> None:
    place = saved({})
    shutil.copytree(model.TINY, tmp_path / "copy")
    one = compose(f"adapter.path={place}", f"model.name_or_path={tmp_path / 'copy'}")
    assert one.identity == compose(f"adapter.path={place}").identity
    other = tmp_path / "copy" / "config.json"
    other.write_text(other.read_text().replace('"rms_norm_eps": 1e-', '"rms_norm_eps": 2e-'))
    with pytest.raises(InputError, match=r"model\.name_or_path=.*another base, tiny"):
        compose(f"adapter.path={place}", f"model.name_or_path={tmp_path / 'copy'}")


def test_a_list_on_the_command_line_wins_over_the_record(compose: Compose) -> None:
    place = saved({}, study="classifier")
    for word in (f"adapter.path={place}", f"repeat={place}"):
        assert compose(word, "dataset.classes=[more,less]").config.dataset.classes == ["more", "less"]


def test_an_evaluation_that_the_trial_has_not_is_named(alpaca: Path, compose: Compose) -> None:
    with pytest.raises(InputError, match=r"eval\.tiny_math: the trial of adapter\.path=.* has perplexity"):
        compose(f"adapter.path={alpaca}", "eval.tiny_math.samples=2")


def test_a_head_has_its_classes(compose: Compose) -> None:
    place = saved({}, study="classifier")
    with pytest.raises(InputError, match=r"dataset\.classes=\[a, b, c\]: the head of adapter\.path=.* has \d classes"):
        compose(f"adapter.path={place}", "dataset.classes=[a,b,c]")


# ---- an adapter from elsewhere ---------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The folder of a LoRA of rank 4 on query and value, of no trial."""
    folder = tmp_path / "downloads" / "adapter"
    shutil.copytree(saved({}) / "adapter", folder)
    file = folder / "adapter_config.json"
    adapter_config = json.loads(file.read_text()) | {"target_modules": ["q_proj", "v_proj"]}
    file.write_text(json.dumps(adapter_config | {"base_model_name_or_path": str(model.TINY)}))
    return folder


def test_an_adapter_from_elsewhere_says_its_method_targets_and_base(elsewhere: Path, compose: Compose) -> None:
    one = compose(f"adapter.path={elsewhere}")
    assert (one.config.method["r"], sorted(one.config.method["target_modules"])) == (4, ["q_proj", "v_proj"])
    assert (one.config.model.name_or_path, one.config.model.dtype.name) == (str(model.TINY), "float32")
    for word in ("method=lora", "method.r=4", "targets=qv", "model=tiny", f"model.name_or_path={model.TINY}"):
        assert compose(f"adapter.path={elsewhere}", word).config.method["r"] == 4


@pytest.mark.parametrize(
    "word", ["method=dora", "method=ia3", "method.r=64", "targets=q", "targets=qkvo", "model=opt_350m"]
)
def test_what_contradicts_an_adapter_from_elsewhere_is_refused(elsewhere: Path, word: str, compose: Compose) -> None:
    with pytest.raises(InputError, match=r"contradicts adapter\.path="):
        compose(f"adapter.path={elsewhere}", word)


def test_an_adapter_of_a_classifier_is_of_the_base_that_it_names(elsewhere: Path, compose: Compose) -> None:
    file = elsewhere / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "SEQ_CLS"}))
    one = compose(f"adapter.path={elsewhere}", "model=encoder", "dataset=tiny_direction").config
    assert (one.model.name_or_path, one.model.task.value) == (str(model.TINY), "seq_cls")
    with pytest.raises(InputError, match=r"is of a classifier \(task_type SEQ_CLS\); take model=encoder"):
        compose(f"adapter.path={elsewhere}")


def test_an_adapter_that_is_no_numbers_is_refused_before_anything_is_loaded(elsewhere: Path, compose: Compose) -> None:
    one = compose(f"adapter.path={elsewhere}")
    file = elsewhere / "adapter_model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if ".q_proj." in name or ".v_proj." in name}
    save_file({name: weight * float("nan") for name, weight in weights.items()}, file)
    with pytest.raises(InputError, match=r"adapter .*: base_model\.model.* holds NaN or infinite numbers"):
        forecast.check(one)


def test_the_ranks_that_adalora_has_left_are_no_option_of_its_adapter(elsewhere: Path, compose: Compose) -> None:
    """PEFT saves them in adapter_config.json, for each module a list of which ranks are kept."""
    kept = {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True]}
    method = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"], rank_pattern=kept)
    method.base_model_name_or_path = str(model.TINY)
    method.save_pretrained(str(elsewhere))
    made = compose(f"adapter.path={elsewhere}").config.method
    assert (made["init_r"], made.get("rank_pattern")) == (3, None)


def test_a_whole_model_is_no_adapter(compose: Compose) -> None:
    with pytest.raises(InputError, match="holds a whole model and no adapter"):
        compose(f"adapter.path={model.TINY}")


@pytest.mark.slow
def test_rows_that_a_restored_trial_was_trained_on_are_counted() -> None:
    rows = [{"q": f"What is {n} plus {n}?", "a": f"It is {2 * n}."} for n in range(40)]
    write("rows.jsonl", rows)
    other = write("other.jsonl", [*rows[:10], {"q": "1?", "a": "1"}])
    words = ["dataset=file", "dataset.path=rows.jsonl", 'dataset.prompt="{q} "', 'dataset.answer="{a}"', "device=cpu"]
    words.append(f"dataset.test_path={write('test.jsonl', [{'q': '0?', 'a': '0'}])}")
    trained: Result = cli.run_one([*words, "train.epochs=1", "train.batch_size=4", "train.warmup=0", "study=a"])
    again = cli.run_one(["device=cpu", "study=b", f"adapter.path={trained.folder}", f"dataset.test_path={other}"])
    assert again.eval_info["perplexity"]["seen_in_training"] == 10
    assert again.eval_info["perplexity"]["perplexity"]["n"] > 0
    assert again.config["dataset"]["path"] == "rows.jsonl"
