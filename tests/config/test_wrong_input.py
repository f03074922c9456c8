"""Wrong input is one line that names the key, and right input needs no more than its key.

Words are composed and checked in this process (`cli._trial`, `forecast.check`), which is what a sweep does with each
of its points before the first is trained.
"""

from __future__ import annotations

import copy
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftsweep import InputError, cli, command_line, limits
from peftsweep.config import checks, fill
from peftsweep.config import compose as configuration
from peftsweep.config.compose import Trial
from peftsweep.data import hub, rows
from peftsweep.forecast import forecast
from peftsweep.models import model


def checked(*words: str) -> Trial:
    """A trial as a sweep checks it; nothing is trained."""
    one = cli._trial("device=cpu", *words)
    forecast.check(one)
    return one


# ---- keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["method.modules_to_save=[lm_head]"], "method.modules_to_save", ["lm_head"]),
        (["method.exclude_modules='.*mlp.*'"], "method.exclude_modules", ".*mlp.*"),
        (["method.rank_pattern.q_proj=4"], "method.rank_pattern", {"q_proj": 4}),
        (["method=ia3", "method.init_ia3_weights=false"], "method.init_ia3_weights", False),
        (["quant=4bit", "quant.bnb_4bit_quant_storage=uint8"], "quant.bnb_4bit_quant_storage", "uint8"),
        (["train.optimizer_kwargs.amsgrad=true"], "train.optimizer_kwargs.amsgrad", True),
        (["eval.tiny_math.num_beams=2"], "eval.tiny_math.num_beams", 2),
    ],
)
def test_an_option_that_no_yaml_lists_needs_no_plus(words: list[str], key: str, value: object) -> None:
    found: object = checked(*words).tree
    for part in key.split("."):
        found = found[part]  # type: ignore[index]
    assert found == value


RANGES = {  # what people write where several values are swept
    "seed=0-3": "seed=0-3: must be int; to sweep it: seed=0,1,2,3",
    "seed=1..2": "seed=1..2: must be int; to sweep it: seed=1,2",
    "seed=0 1 2": "seed=0 1 2: must be int; to sweep it: seed=0,1,2",
    "seed=[0,1]": "seed=[0, 1]: must be int; to sweep it: seed=0,1",
    "seed=(0,1)": "seed=(0,1): cannot be read; to sweep it: seed=0,1",
    "seed=0;1": "seed=0;1: cannot be read; to sweep it: seed=0,1",
    "seed=3-0": "seed=3-0: must be int",
    "dataset.fraction=1/2": "dataset.fraction=1/2: must be float",
    "train.steps=2 000": "train.steps=2 000: must be int",
    "method.r=8-32": "method.r=8-32: must be int; to sweep it: method.r=8,32, or each number between them: "
    "'method.r=range(8,33)'",
    "method.r=": "method.r=: must be int",
    "eval.perplexity.samples=": "eval.perplexity.samples=: must be int or null",
    "method.r=[8,16]": "method.r=[8, 16]: must be int; to sweep it: method.r=8,16",
    "train.learning_rate=1e-4-1e-3": "train.learning_rate=1e-4-1e-3: must be float; to sweep it: "
    "train.learning_rate=1e-4,1e-3",
    "train.epochs=1-3": "train.epochs=1-3: must be float or null; to sweep it: train.epochs=1,2,3",
    "adapter.scales=[0.1-0.5]": "adapter.scales.0=0.1-0.5: must be float",
}


@pytest.mark.parametrize("word", RANGES)
def test_a_range_or_a_list_where_one_number_is_wanted_is_told_with_the_words_that_sweep_it(word: str) -> None:
    with pytest.raises(InputError) as error:
        cli._trial("device=cpu", word)
    assert str(error.value) == RANGES[word]


FILE = "dataset=rows.jsonl"
UNREAD_SOURCES = {
    f"{FILE} dataset.revision=abc": "dataset.revision: is only for rows of the hub, and dataset.path=rows.jsonl is",
    f"{FILE} dataset.hub_config=a": "dataset.hub_config: is only for rows of the hub",
    f"{FILE} dataset.hub_split=train": "dataset.hub_split: is only for rows of the hub",
    f"{FILE} dataset.hub_test_split=test": "dataset.hub_test_split: is only for rows of the hub",
    f"{FILE} eval.perplexity.hub_split=a": "eval.perplexity.hub_split: is only for rows of the hub, and there is no",
    f"{FILE} dataset.validation.revision=a": "dataset.validation.revision: is only for rows of the hub, and there is",
    f"{FILE} dataset.validation.path=rows.jsonl dataset.validation.hub_split=a": "dataset.validation.path=rows.jsonl",
    "dataset.hub_split=test": "dataset.hub_split: is only for rows of the hub, and there is no dataset.hub",
    "dataset.encoding=utf-8": "dataset.encoding: is only for a local file, and there is no dataset.path",
    "dataset=gsm8k eval.gsm8k.path=rows.jsonl eval.gsm8k.revision=a": "eval.gsm8k.revision: is only for rows of the",
    "dataset=gsm8k dataset.path=rows.jsonl eval.gsm8k.hub_split=a": "dataset.path=rows.jsonl is read in place of",
    "dataset=gsm8k dataset.test_path=rows.jsonl dataset.hub_test_split=test": "the test rows are those of dataset.test",
    "model.revision=main": "model.revision: is only for a model of the hub; tiny is a folder",
    "model=llama3.2_1b model.init=random model.revision=a": "meta-llama/Llama-3.2-1B has random weights",
    "dataset=someone/rows:test dataset.hub_split=train": "dataset.hub_split is given too, and the name has the",
}


@pytest.mark.parametrize("words", UNREAD_SOURCES)
def test_a_key_of_one_kind_of_source_is_refused_where_rows_or_base_come_from_another(words: str) -> None:
    Path("rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 2?", "answer": "3"}\n')
    with pytest.raises(InputError) as error:
        cli._trial("device=cpu", "dataset.train_fraction=0.5", *words.split())
    assert UNREAD_SOURCES[words] in str(error.value)


def test_a_key_of_a_source_that_is_read_or_null_is_taken() -> None:
    Path("rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 2?", "answer": "3"}\n')
    words = ["dataset.train_fraction=0.5", "dataset.encoding=utf-8", "dataset.revision=null"]
    own = cli._trial("device=cpu", FILE, *words)
    assert own.config.dataset.encoding == "utf-8"
    hub_words = ["dataset.revision=a", "dataset.hub_split=train", "dataset.hub_test_split=test"]
    assert cli._trial("device=cpu", "dataset=gsm8k", *hub_words).config.dataset.revision == "a"


def test_modules_to_save_are_trained() -> None:
    """The embedded model's head of 512 tokens and 128 dimensions is trained, in full, beside the adapter."""
    alone, with_head = checked(), checked("method.modules_to_save=[lm_head]")
    more = (forecast.check(with_head).trainable_parameters or 0) - (forecast.check(alone).trainable_parameters or 0)
    base: Any = model.skeleton(alone.config.model)
    assert more == base.get_output_embeddings().weight.numel()


UNREAD = {
    "method=prompt_tuning method.prompt_tuning_init=TXT": "must be one of TEXT, SAMPLE_VOCAB, RANDOM",
    "method=road method.variant=road_3": "method.variant=road_3: must be one of road_1, road_2, road_4",
    "method=c3a method.bias=lora_only": "method.bias=lora_only: must be one of none, all, c3a_only",
    "method=tinylora method.init_weights=normal": "method.init_weights=normal: must be bool or one of uniform",
    "method=adalora method.init_r=2 method.target_r=8": "method.target_r=8: must be at most method.init_r=2",
    "method=oft method.r=7": "method.r=7: r must divide the modules' sizes; PEFT would use 8",
    "quant=4bit quant.load_in_4bit=false": "quant.load_in_4bit: must be true, or quant.load_in_8bit",
    "train.optimizer_kwargs.betas=[0.9]": "train.optimizer_kwargs.betas=[0.9]: must be tuple[float, float]",
    "train.warmup=2.5": "train.warmup=2.5: must be a share below 1, or a whole number of steps",
    "model.name_or_path=''": "model.name_or_path: must be given",
    "dataset.generator=builtins.dict.fromkeys": "dataset.generator=builtins.dict.fromkeys: must be a function",
    "dataset.generator=builtins.slice": "dataset.generator=builtins.slice: must return a list of rows",
    "tracker._target_=os.getcwd": "tracker._target_=os.getcwd: cannot be called with folder, name, study",
    "eval.tiny_math.metric._target_=os.getcwd": "_target_=os.getcwd: cannot be called with prediction, answer",
    "inference=standard inference.batch_sizes=[8,8]": "inference.batch_sizes=[8, 8]: must be at least one number, each",
    "dataset.samples=99999999": "99999999 rows are too many to draw; at most 1000000 can be",
    "method.lora_alfa=3": "method.lora_alfa: method=lora (peft.LoraConfig) has no such option; did you mean 'lora_a",
    "method.rank=3": "method.rank: method=lora (peft.LoraConfig) has no such option; did you mean 'r'?",
    "method=ia3 method.r=8": "method.r: method=ia3 (peft.IA3Config) has no such option; run this method in a",
    "method=full method.r=8": "method.r: method=full has no such option; run this method in a",
    "method.inference_mode=true": "method.inference_mode: is set by peftsweep",
    "method.task_type=CAUSAL_LM": "method.task_type: is set by peftsweep",
    "quant=4bit quant.bnb_4bit_quant_typ=fp4": "quant.bnb_4bit_quant_typ: transformers.BitsAndBytesConfig has no such",
    "quant.load_in_4bit=true": "quant.load_in_4bit: quant=none has no such option; choose another quant: 4bit, 8bit,",
    "targets.modules=q_proj": "targets.modules=q_proj: must be list[str] or null; did you mean 'targets.modules=[q",
    "eval.tiny_math.stop=x": "eval.tiny_math.stop=x: must be list[str]; did you mean 'eval.tiny_math.stop=[x]'?",
    "--jsn": "--jsn: no such option; did you mean '--json'?",
    "tracker.project=x": "tracker.project: tracker=none has no such option",
    "eval.tiny_mth.samples=3": "eval.tiny_mth: no such key; did you mean 'tiny_math'?",
    "eval.tiny_math.sample=3": "sample: peftsweep.evaluation.evaluate.generation has no such option; did you",
    "train.optimizer_kwargs.beta=3": "train.optimizer_kwargs.beta: AdamW has no such option; did you mean 'betas'?",
    "train.optimizer_kwargs.lr=3": "train.optimizer_kwargs.lr: is set by train.learning_rate",
    "model=llama3.2_1b model.init=random model.architecture.num_key_value_heads=5": "must divide num_attention",
    "model=llama3.2_1b model.init=random model.architecture.num_hidden_layers=two": "layers=two: must be int",
    "model=llama3.2_1b model.init=random model.architecture.hiden_size=64": "model.architecture.hiden_size: no such",
    "model=llama3.2_1b model.init=random model.architecture.model_type=lama": "did you mean 'llama'?",
    "model=llama3.2_1b model.init=random model.architecture.hidden_act=x": "model.architecture: describes no model",
}


@pytest.mark.parametrize("words", UNREAD)
def test_a_key_that_nobody_reads_is_refused(words: str) -> None:
    with pytest.raises(InputError) as refused:
        checked(*words.split())
    assert UNREAD[words] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config-dir nowhere", "--config-dir nowhere: no such folder"),
        ("seed=interval(0,3)", "seed=interval(0,3): an interval is for a search"),
        ("experiments=nowhere", "experiments=nowhere: has an effect only with sweep=experiments"),
        ("method=glob(lorax*)", "method=glob(lorax*): the sweep is empty"),
        ("targets.modules=[nope]", "targets.modules: the model has no module 'nope'"),
    ],
)
def test_a_sweep_that_is_refused_leaves_nothing_behind(
    words: str, message: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = command(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"peftsweep: {message}")
    assert not Path("multirun").exists()


# ---- a hub that does not answer ------------------------------------------------------------------------


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that takes every connection and never says anything, in place of the hub."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "HUB_TIMEOUT_SECONDS", 1.0)  # the product's is asserted below
        hub.problem.cache_clear()
        yield address
        hub.problem.cache_clear()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if HF_HUB_OFFLINE=1 had been set before anything was imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.problem.cache_clear()
    rows.check_available.cache_clear()
    yield
    hub.problem.cache_clear()


def test_the_hub_has_less_than_five_seconds_to_answer() -> None:
    assert hub.HUB_TIMEOUT_SECONDS < 5


def test_a_hub_that_never_answers_is_one_line_within_five_seconds_for_a_sweep(
    silent_hub: str, command: Callable[..., tuple[int, str, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    words = ["model=causal_lm", "model.name_or_path=nobody/nothing", "seed=0,1,2"]
    code, out, err = command(*words, "dataset=gsm8k")
    seconds = time.perf_counter() - start
    assert (code, out) == (2, "")
    missing = "peftsweep: model.name_or_path=nobody/nothing: is not in the local cache, and "
    assert err.startswith(f"{missing}{silent_hub} cannot be reached (")
    assert "give a local folder" in err
    assert err.count("\n") == 1
    assert seconds < hub.HUB_TIMEOUT_SECONDS + 1 + 2  # of composing the points
    for name in ("dataset.hub=nobody/rows", "dataset.hub=nobody/more"):  # nothing asks a second time
        with pytest.raises(InputError, match="is not in the local cache, and http"):
            rows.hub_rows(name.partition("=")[2], None, "train", None, "dataset.hub")
    assert time.perf_counter() - start < seconds + 2


@pytest.mark.usefixtures("offline")
def test_trials_whose_rows_cannot_be_had_are_refused_before_the_first_trains(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, err = command("dataset=gsm8k", "train.steps=1,2")
    assert code == 2
    assert err.startswith("peftsweep: dataset.hub=openai/gsm8k: is not in the local cache, and HF_HUB_OFFLINE=1 is set")
    assert "local rows" in err
    assert err.count("\n") == 1
    assert not list(Path("multirun").glob("*/*/result.json"))


@pytest.mark.usefixtures("offline")
def test_a_dry_run_needs_no_rows_of_the_hub(command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command("dataset=gsm8k", "dry_run=true")
    assert (code, err) == (0, "")


# ---- words -------------------------------------------------------------------------------------------------

WRONG_WORDS = {
    "method=null": "method=null: no such option; there are: adalora",
    "method=5": "method=5: no such option; there are: ",
    "model=true": "model=true: no such option; there are: ",
    "quant=": "quant=: no such option; there are: 4bit, 8bit",
    "eval=null": "eval=null: no such option; there are: ",
    "method=/lora": "method=/lora: no such option; did you mean 'lora'?",
    "method=../method/lora": "method=../method/lora: no such option; did you mean 'lora'?",
    "targets=qv.yaml": "targets=qv.yaml: no such option; did you mean 'qv'?",
    "eval=[../eval/boolq]": "eval=[../eval/boolq]: no such option; did you mean 'boolq'?",
    "method=[]": "method=[]: no such option; there are: adalora",
    "+method=dora": "+method=dora: must be method=OPTION, without + and @",
    "++quant=4bit": "++quant=4bit: must be quant=OPTION, without + and @",
    "targets@method=qv": "targets@method=qv: must be targets=OPTION, without + and @",
    "train.learning_rate=0,001": "the decimal mark is a dot: train.learning_rate=0.001",
    "train.optimizer_kwargs=[1]": "train.optimizer_kwargs: is a section; give keys with their values",
    "dataset.validation=3": "dataset.validation: is a section; give keys with their values",
    "method=[lora,ia3]": "method=[lora,ia3]: must be one option; to sweep several: method=lora,ia3",
    "~method": "~method: cannot be deleted",
    "~targets": "~targets: cannot be deleted",
    "~seed": "seed: must be given; it cannot be deleted",
    "~train.steps": "train.steps=null: must be int",
    "hydra=null": "hydra: is Hydra's own section",
    "hydra/launcher=null": "hydra/launcher=null: must be given",
    "hydra.sweep.dir=elsewhere": "hydra.sweep.dir: decides nothing: a trial's folder is multirun/STUDY/TRIAL",
    "hydra.run.dir=elsewhere": "hydra.run.dir: decides nothing",
    "hydra.mode=RUN": "hydra.mode: cannot be set",
    "-r": "-r: cannot be set",
    "--foo": "--foo: no such option",
    "--config-dir": "--config-dir: needs a value",
    "--config-name other": "--config-name: cannot be set; --config-dir DIR adds options of your own",
    "--resolve": "--resolve: only with --cfg job",
    "--info nope": "--info nope: must be --info alone, or with one of all, config",
    "--method.r=8": "--method.r: no such option; a key is given without dashes: method.r=VALUE",
    "--train.steps=5": "--train.steps: no such option; a key is given without dashes: train.steps=VALUE",
    "--dry-run": "--dry-run: no such option; a key is given without dashes: dry_run=VALUE",
    "hydra.searchpath=[nowhere]": "hydra.searchpath=[nowhere]: no such folder: nowhere",
    "hydra.launcher._target_=os.getcwd": "hydra.launcher._target_: cannot be set; hydra/launcher=OPTION chooses",
    "method.r=range(1,5,0)": "the step of a range must not be 0",
    "method.r=range(5,1)": "there is no value in this range",
    "method.r=range(1,1000000000)": "a range may have at most 100,000 values",
    "method.r=8,": "method.r=8,: there is no value beside one of its commas",
    "method.r=8,,16": "there is no value beside one of its commas",
    "method.r=8, 16": "method.r=8, 16: values are separated by commas alone: 'method.r=8,16'",
    "method.r": "method.r: must be KEY=VALUE",
    "help": "help: must be KEY=VALUE; --help lists the keys",
    "=3": "=3: must be KEY=VALUE, and the key has an empty part",
    "method..r=3": "method..r=3: cannot be read; must be KEY=VALUE",
    "dataset.prompt={question}": "needs quotes inside those of the shell: 'dataset.prompt=\"{question}\"'",
    "dataset.path=rows(1).jsonl": "needs quotes inside those of the shell: 'dataset.path=\"rows(1).jsonl\"'",
    "dataset.path=it's.jsonl": "'dataset.path=\"it's.jsonl\"'",
    "dataset.path=a,b.jsonl": "the comma of a file's name needs quotes: 'dataset.path=\"a,b.jsonl\"'",
    "method.r=${": "needs quotes",
    "method.r=[8": "needs quotes",
    "method.r=foo(3)": "needs quotes",
    "model=tiny model=opt_350m": "model is given twice; give it once, with several values separated by commas",
    "method=lora quant=4bit method=ia3,lora": "method=lora method=ia3,lora: method is given twice",
    "eval=gsm8k eval=[boolq]": "eval=gsm8k eval=[boolq]: eval is given twice; give it once, several in brackets",
    "hydra/launcher=local hydra/launcher=slurm": "hydra/launcher is given twice; give it once",
    "+point/peft_comparison=a +point/peft_comparison=b": "point/peft_comparison is given twice",
    "method.r=8,16 method.r=32": "method.r=8,16 method.r=32: method.r is given twice",
    "seed=range(3) seed=0": "seed is given twice",
}
OF_HYDRA = (
    "antlr",
    "mismatched",
    "extraneous",
    "token recognition",
    "LexerNoViable",
    "full_key",
    "To append",
    "argument",
)


@pytest.mark.parametrize("words", WRONG_WORDS)
def test_a_word_that_cannot_be_read_is_one_line_in_our_words(words: str) -> None:
    Path("a,b.jsonl").touch()
    with pytest.raises(InputError) as refused:
        cli._trial(*words.split())
    assert WRONG_WORDS[words] in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not any(word in str(refused.value) for word in OF_HYDRA)


def test_words_that_are_right_stay_as_they_are() -> None:
    conf = Path(fill.conf_dir())
    words = [
        "--config-dir",
        "mine",
        "method=lora,ia3",
        "method=glob(*)",
        "eval=[gsm8k,sst2]",
        "eval=[]",
        "train={steps: 3}",
    ]
    words += ["method.r=range(1,5)", "'dataset.prompt={a}, {b} '".strip("'").replace("{a}, {b} ", '"{a}, {b} "')]
    words += ["~eval", "+label=x", "hydra.launcher.workers=2", "sweep=rank_ablation,module_ablation", "label="]
    assert command_line.checked(words, conf) == words
    assert command_line.checked(["sweep=null", "point=null", "seed=1"], conf) == ["seed=1"]


def test_of_a_plain_key_that_is_given_twice_the_last_counts() -> None:
    words = ["train.steps=4", "model=tiny", "train.steps=8", "model=tiny"]
    assert cli._checked(words) == words
    assert cli._trial(*words).config.train.steps == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: {r: [1\n", "line 2: is no yaml: expected ',' or ']'"),
        ("method:\n\tr: 1\n", "line 2: is no yaml: found character '\\t'"),
        ("# @package _global_\nmethod:\n  _target_: peft.LoraConfig\n  r: 1\n  r: 2\n", "line 5: has the key r twice"),
        ("method: !!python/object:os.system {}\n", "line 1: has a tag"),
        ("a: 1\nb: !mine {r: 1}\n", "line 2: has a tag"),
        ("- a\n", "line 1: must hold keys and values"),
        ("# @package _global_\nmethod: {3: 4}\n", "line 2: has a key that is no text"),
        ("defaults: 5\n", "line 1: defaults must be a list"),
        ("a: \x00\n", "line 1: is no yaml"),
        (b"a: 1\nb: \xe9\n".decode("latin-1"), "line 2: is no UTF-8 text"),
    ],
)
def test_a_wrong_yaml_of_ones_own_is_named_with_its_line(
    text: str, expected: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/other.yaml").write_text("a: [")  # one that is not chosen is not what is wrong
    Path("mine/method/bad.yaml").write_bytes(text.encode("latin-1"))
    code, out, err = command("--config-dir", "mine", "method=bad")
    assert (code, out) == (2, "")
    assert err.startswith(f"peftsweep: mine/method/bad.yaml, {expected}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("file", "option"), [("sweep/methods.yaml", "sweep=methods"), ("config.yaml", "config.yaml")])
def test_a_yaml_of_ones_own_with_the_name_of_ours_is_refused_and_not_passed_over(
    file: str, option: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    Path("mine/sweep").mkdir(parents=True)
    Path("mine", file).write_text("train: {steps: 3}\n")
    code, _, err = command("--config-dir", "mine", "dry_run=true")
    assert (code, err) == (
        2,
        f"peftsweep: mine/{file}: {option} is one of peftsweep's own; give the file another name\n",
    )


@pytest.mark.parametrize("text", ["", "# @package _global_\nmethod: {}\n"])
def test_a_method_yaml_that_names_no_method_is_no_full_fine_tuning(
    text: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/empty.yaml").write_text(text)
    code, _, err = command("--config-dir", "mine", "method=empty", "dry_run=true")
    assert code == 2
    assert err.startswith("peftsweep: method=empty: its yaml names no method")


def test_a_newline_of_a_template_may_be_written_as_on_a_command_line(compose: Callable[..., Trial]) -> None:
    one = compose(
        r'dataset.prompt="{question}:\n"', r'eval.tiny_math.stop=["\n", "x"]', r'dataset.answer="\\nu {answer}"'
    )
    assert one.config.dataset.prompt == "{question}:\n"
    assert one.config.dataset.answer == r"\nu {answer}"
    assert one.config.eval["tiny_math"]["stop"] == ["\n", "x"]


def test_a_module_beside_ones_own_yaml_or_in_the_working_directory_can_be_named(
    command: Callable[..., tuple[int, str, str]],
) -> None:
    Path("mine/eval").mkdir(parents=True)
    Path("mine/mine_first_word.py").write_text(
        "def first_word(prediction, answer):\n    return float(prediction.split()[:1] == answer.split()[:1])\n"
    )
    Path("here_last_word.py").write_text("def last_word(prediction, answer):\n    return 1.0\n")
    code, out, err = command(
        *("--config-dir", "mine", "eval.tiny_math.metric._target_=mine_first_word.first_word,here_last_word.last_word"),
        *("eval.tiny_math.metric.markers=null", "dry_run=true"),
    )
    assert "no such class" not in err
    code, out, err = command(
        *("--config-dir", "mine", "dry_run=true", "eval.tiny_math.metric={_target_: here_last_word.last_word}"),
        "~eval.tiny_math.metric.markers",
    )
    assert (code, err) == (0, ""), out


# ---- values ------------------------------------------------------------------------------------------------

VALUES = ("nan", "inf", "1e300", "-1", "abc", "18446744073709551616", "[1]", "{a: 1}")
OPTIONS = ["inference=standard", "profiler=torch", "train.eval_every=10"]
MAY_BE = {  # keys of texts or of any number, and what they take of the values
    "model.device_map": {"{a: 1}"},
    "method.lora_alpha": {"18446744073709551616"},
    "profiler.sizes": {"[1]"},
    **{
        f"train.{key}": {"18446744073709551616"}
        for key in ("learning_rate", "learning_rate_scale", "weight_decay", "clip")
    },
}


def numeric_keys() -> list[str]:
    """Each key of the groups above whose value is a number, or a number that is not given."""
    tree = cli._trial(*OPTIONS).tree
    unset = ["train.epochs", "dataset.max_characters", "dataset.samples", "halving.min_steps", "halving.rung"]
    unset += ["halving.min_fraction", "train.patience"]
    own = {name for name, _ in limits.numbers(tree)} | {*unset}
    return sorted(key for key in own if not key.rpartition(".")[2].isdecimal())


@pytest.mark.parametrize("every", [len(VALUES), pytest.param(1, marks=pytest.mark.slow)])
def test_no_number_of_any_group_may_be_what_is_none(every: int) -> None:
    """Of the composed point, as the launcher changes it: composing anew for each value would take minutes."""
    cfg = cli.compose(OPTIONS)
    wrong = []
    for number, key in enumerate(numeric_keys()):
        for value in VALUES[number % every :: every]:  # fast: one of them for each key, each for some
            point = copy.deepcopy(cfg)
            parsed = OverridesParser.create().parse_overrides([f"{key}={value}"])[0].value()
            try:
                OmegaConf.update(point, key, parsed)
                configuration.trial(point, cfg.hydra.runtime.choices, [f"{key}={value}"])
                message = None
            except (InputError, OmegaConfBaseException) as error:
                message = str(error) if isinstance(error, InputError) else checks.one_line(error)
            if message is None and value not in MAY_BE.get(key, ()):
                wrong.append(f"{key}={value} is taken")
            elif message is not None and not (message.startswith(key) and "must be" in message and "\n" not in message):
                wrong.append(f"{key}={value}: {message}")
    assert wrong == []


# ---- rows and paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "answer", "problem"),
    [
        ("number_match", "seven", "the reference answer holds no number"),
        ("peft_match", "7", "the reference answer holds no marker of PEFT's"),
        ("contains", " | ", "the reference answer holds no text"),
    ],
)
def test_an_answer_that_a_metric_cannot_judge_by_is_named_before_anything_is_loaded(
    metric: str, answer: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    good = "The answer is 7"
    file.write_text("".join(f'{{"question": "3+4?", "answer": "{text}"}}\n' for text in (good, good, answer)))
    words = ["eval=[gsm8k]", f"eval.gsm8k.metric._target_=peftsweep.evaluation.metrics.{metric}"]
    key = rf"^eval\.gsm8k\.metric={metric}: row 3 of .*rows\.jsonl cannot be judged: {problem}"
    with pytest.raises(InputError, match=key) as error:
        checked(*words, f"eval.gsm8k.path={file}")
    assert "\n" not in str(error.value)
    file.write_text(f'{{"question": "3+4?", "answer": "{good}"}}\n')
    checked(*words, f"eval.gsm8k.path={file}")


@pytest.mark.parametrize(
    "word", ["dataset=~nobody_here/rows.jsonl", "dataset.path='~nobody_here/a b.csv'", "~nobody_here/x"]
)
def test_a_home_folder_of_no_user_is_one_line(word: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["peftsweep", "device=cpu", word])
    assert cli._print_errors_in_one_line(lambda: 0) == 2
    assert (
        capsys.readouterr().err
        == f"peftsweep: {word}: there is no home folder ~nobody_here; must be a path that is there\n"
    )


@pytest.mark.parametrize(
    "word", ["~method.r", "~eval@x", "dataset=~/rows.jsonl", "dataset.prompt='~{a}/{b}'", "label=a~b/c"]
)
def test_a_tilde_that_is_no_home_is_left_as_it_is(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peftsweep", word])
    assert cli._print_errors_in_one_line(lambda: 0) == 0
