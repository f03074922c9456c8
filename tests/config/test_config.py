"""Composition, validation and identity."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from peftsweep import InputError, cli
from peftsweep.analysis.answer import build
from peftsweep.config.calls import check_call
from peftsweep.config.compose import Trial
from peftsweep.config.evaluations import ROWS_KEYS
from peftsweep.config.fill import conf_dir
from peftsweep.forecast import forecast
from peftsweep.models.quantised import libraries
from peftsweep.trial import done
from tests import schemas

Compose = Callable[..., Trial]
Command = Callable[..., tuple[int, str, str]]

CONF = Path(conf_dir())
GROUPS = ("model", "method", "targets", "quant", "dataset", "eval", "train", "profiler")
NEEDS = {  # what an option leaves to the user
    "model=causal_lm": ["model.name_or_path=tiny"],
    "model=encoder": ["model.name_or_path=tiny", "dataset=tiny_direction"],
    **{
        f"model={m}": ["model.init=random", "dataset=tiny_direction"]
        for m in ("bert_base", "distilbert", "roberta_base")
    },
    "method=loftq": ["quant=4bit"],
    "eval=classification": ["dataset=tiny_direction"],
    "eval=sst2": ["dataset=tiny_direction"],
    "eval=tiny_direction": ["dataset=tiny_direction"],
    "dataset=file": ["dataset.path=questions.jsonl", 'dataset.prompt="{question}"', 'dataset.answer="{answer}"'],
    **{f"dataset={name}": [f"dataset.path={name}.jsonl"] for name in schemas.SCHEMAS},
    "dataset=metamath": ["dataset.path=metamath.jsonl", "dataset.test_path=gsm8k.jsonl"],
    "eval=gsm8k": ["eval.gsm8k.path=questions.jsonl"],
    "eval=lm_eval": ["eval.lm_eval.tasks=[piqa]"],
    "eval=forgetting": ["eval.forgetting.path=text.jsonl"],
    "eval=substring": ["eval.substring.path=questions.jsonl", 'eval.substring.prompt="{question}"'],
}
OPTIONS = [f"{group}={file.stem}" for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


def together() -> list[list[str]]:
    """Every option once, as many of groups that leave each other alone in one composition as there are."""
    of = {group: [option for option in OPTIONS if option.startswith(f"{group}=")] for group in GROUPS}
    rows = itertools.zip_longest(of["method"], [*of["eval"], *of["dataset"]], [*of["train"], *of["profiler"]])
    return [
        *([option for option in row if option] for row in rows),
        *([option] for group in ("model", "targets", "quant") for option in of[group]),
    ]


# One of each kind of option. Of the others the fast tier checks the calls in their yamls, in the test below.
EVERY = 9
KINDS = ("model=tiny", "model=distilbert", "targets=qv", "quant=4bit", "quant=none")
TOGETHER = [
    options
    if (n % EVERY == 0 and len(options) > 1) or {*options} & {*KINDS}
    else pytest.param(options, marks=pytest.mark.slow)
    for n, options in enumerate(together())
]


@pytest.mark.parametrize("options", TOGETHER, ids=" ".join)
def test_every_yaml_composes_validates_and_attaches(options: list[str], compose: Compose, questions: Path) -> None:
    for name in schemas.SCHEMAS:
        if any(f"={name}.jsonl" in word for option in options for word in NEEDS.get(option, [])):
            schemas.write(name, Path())
    for option in [one for one in options if one.startswith("quant=")]:
        quant = yaml.safe_load((CONF / "quant" / f"{option.removeprefix('quant=')}.yaml").read_text())
        if reason := libraries.problem(quant or {}, gpus=0):
            with pytest.raises(InputError, match=re.escape(f"{option}: {reason}")):
                compose(option)
            options = [one for one in options if one != option]
    one = compose(*options, *(word for option in options for word in NEEDS.get(option, [])))
    foreseen = forecast.check(one)
    assert (foreseen.trainable_parameters or 0) > 0 or ("method=xlora" in options and foreseen.refused)
    for group, _, name in (option.partition("=") for option in options):
        assert one.choices[group] in (name, f"['{name}']")


def test_the_calls_of_every_yaml_have_the_options_that_they_name() -> None:
    checked = Counter[str]()
    for group in ("method", "quant", "eval"):
        for file in CONF.glob(f"{group}/*.yaml"):
            read: Any = OmegaConf.to_container(OmegaConf.load(file))
            call = read.get("method") if group == "method" else read
            if not call or "_target_" not in call or (group == "quant" and libraries.problem(call, gpus=0)):
                continue  # of another yaml's class, a list of others, or of a library that is not installed
            own = {key: value for key, value in call.items() if "${" not in str(value) and value != "???"}
            if group == "eval":
                own = {key: value for key, value in own.items() if key not in ROWS_KEYS}
            check_call(own, f"{group}={file.stem}", provided=("model", "tokenizer", "examples"))
            checked[group] += 1
    assert checked["method"] > 40
    assert checked["eval"] > 20
    assert checked["quant"] >= 2


@pytest.mark.parametrize(
    "file", sorted(CONF.glob("dataset/*.yaml")) + sorted(CONF.glob("eval/**/*.yaml")), ids=lambda file: file.stem
)
def test_a_line_of_a_template_ends_in_a_line_feed(file: Path) -> None:
    assert not [text for text in _texts(yaml.safe_load(file.read_text())) if r"\n" in text]


def _texts(value: Any) -> Iterator[str]:
    """The texts in a yaml's lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


BAD = {
    "an unknown option": (["quant=4bits"], "quant=4bits: no such option; did you mean '4bit'?"),
    "an unknown option in a list": (
        ["eval=[tiny_math,forgeting]"],
        "eval=forgeting: no such option; did you mean 'for",
    ),
    "a misspelt key": (["trian.steps=3"], "trian: no such key; did you mean 'train'?"),
    "a misspelt method key": (
        ["method.lora_alfa=3"],
        "method.lora_alfa: method=lora (peft.LoraConfig) has no such option; did you",
    ),
    "an added key PEFT lacks": (["+method.rank=3"], "method.rank: method=lora (peft.LoraConfig) has no such option"),
    "a word for a number": (["method.r=abc"], "method.r=abc: must be int"),
    "a fraction for an integer": (["method.r=8.5"], "method.r=8.5: must be int"),
    "a word for a schema's number": (["train.steps=many"], "train.steps=many: must be int"),
    "rank zero": (["method.r=0"], "method.r=0: must be at least 1"),
    "a rate that is no number": (["train.learning_rate=nan"], "train.learning_rate=nan: must be a finite number"),
    "an infinite clip": (["train.clip=inf"], "train.clip=inf: must be a finite number"),
    "an infinite option": (["method.lora_alpha=inf"], "method.lora_alpha=inf: must be"),
    "a rate beyond 32 bits": (["train.learning_rate=1e300"], "must be at least 0 and at most 3.4e+38"),
    "a rank beyond 32 bits": (["method.r=18446744073709551616"], "must be at least 1 and at most 2147483647"),
    "a seed below zero": (["seed=-1"], "seed=-1: must be at least 0 and at most 4294967295"),
    "all rows trained": (["dataset.train_fraction=1"], "must be above 0 and below 1"),
    "no rows judged": (["eval.tiny_math.samples=0"], "eval.tiny_math.samples=0: must be at least 1"),
    "no row at once": (["eval.tiny_math.batch_size=-4"], "eval.tiny_math.batch_size=-4: must be at least 1"),
    "nothing timed": (["inference=standard", "inference.runs=0"], "inference.runs=0: must be at least 1"),
    "a batch of none": (["inference=standard", "inference.batch_sizes=[1,0]"], "inference.batch_sizes.1=0: must be"),
    "nothing profiled": (["profiler=torch", "profiler.active=0"], "profiler.active=0: must be at least 1"),
    "another library's word for a rate": (["train.lr=1e-3"], "train.lr: no such key; did you mean 'learning_rate'?"),
    "another word for the batch": (["train.bs=4"], "train.bs: no such key; did you mean 'batch_size'?"),
    "two letters swapped": (["method=lroa"], "method=lroa: no such option; did you mean 'lora'?"),
    "an added key that nobody reads": (
        ["+train.learning_rte=1e-3"],
        "train.learning_rte: no such key; did you mean 'learning_rate'?",
    ),
    "an added section": (["+trian.steps=3"], "trian: no such key; did you mean 'train'?"),
    "a choice PEFT lacks": (["method.bias=some"], "method.bias=some: must be"),
    "a role the model lacks": (["targets.roles=[q,z]"], "the model has no 'z'; it has: q, k, v, o, mlp"),
    "a module the model lacks": (["targets.modules=[q_prj]"], "the model has no module 'q_prj'; it has: q_proj"),
    "a method's module": (["method.target_modules=[q_prj]"], "method.target_modules: the model has no module 'q_prj'"),
    "targets of full fine-tuning": (["method=full", "targets=qv"], "targets: full fine-tuning trains every module"),
    "missing templates": (["dataset=file"], "dataset.answer, dataset.prompt: must be given, such as "),
    "a missing file": (["dataset=file", "dataset.path=no.jsonl"], "dataset.path=no.jsonl: no such file"),
    "a missing data file": (["dataset.path=no.jsonl"], "dataset.path=no.jsonl: no such file"),
    "an unknown format": (["dataset.path=rows.xml"], "unknown format '.xml'; allowed: .json .jsonl"),
    "an unknown dtype": (["model.dtype=float8"], "model.dtype=float8: must be one of auto, float32, bfloat16, float16"),
    "an unknown 4-bit type": (["quant=4bit", "quant.bnb_4bit_quant_type=nf5"], "must be one of nf4, fp4"),
    "an unknown optimizer": (["train.optimizer=AdamX"], "train.optimizer=AdamX: no such optimizer"),
    "an unreadable interval": (["train.eval_every=often"], "a number of steps (100) or epochs (0.5epochs)"),
    "a backend torch lacks": (["train.compile=indctor"], "no such backend; did you mean 'inductor'?"),
    "keep_best without validation": (["train.keep_best=true"], "needs train.eval_every"),
    "a best metric of nothing": (["train.best_metric=gsm8k.f1"], "must be loss or <eval>.<metric> of tiny_math"),
    "a missing model": (["model=causal_lm"], "model.name_or_path: must be given"),
    "a classifier without classes": (["model.task=seq_cls"], "dataset.classes: model.task=seq_cls needs the names"),
    "text of a classifier": (
        ["model.task=seq_cls", "dataset=tiny_direction", "eval=[perplexity]"],
        "eval.perplexity: a classifier (model.task=seq_cls) generates no text",
    ),
    "classes of nothing": (["eval=[classification]"], "eval.classification.classes: must name at least two"),
    "an answer that is no class": (
        ["dataset=tiny_direction", "dataset.classes=[up,more]"],
        "is 'less', which is no class",
    ),
    "a wrong option beside a sweep": (["method=lara", "seed=0,1"], "method=lara: no such option; did you mean 'lora'?"),
    "a missing model folder": (["model=causal_lm", "model.name_or_path=./no"], "model.name_or_path=./no: no such"),
    "a device that is not there": (["device=cuda:99"], "device=cuda:99:"),
    "an impossible dropout": (["method.lora_dropout=2"], "method.lora_dropout=2: must be at least 0 and below 1"),
    "a class PEFT lacks": (["method._target_=peft.LoraConfg"], "peft.LoraConfg: no such class"),
    "a study outside": (["study=a/b"], "study=a/b: must be a plain name"),
    "one bad point of a sweep": (["method.r=4,8,0", "-m"], "method.r=0: must be at least 1"),
    "one bad type in a sweep": (["-m", "train.steps=4,8,abc"], "train.steps=abc: must be int"),
}


# What fails in a check that another case of ``BAD`` fails in too.
CHECKED_ALIKE = {
    *(
        "a misspelt method key",
        "a fraction for an integer",
        "an infinite clip",
        "an infinite option",
        "a seed below zero",
    ),
    *("a rank beyond 32 bits", "all rows trained", "no rows judged", "no row at once", "a batch of none"),
    *("nothing profiled", "another word for the batch", "an added section", "a method's module"),
    *("a missing data file", "an impossible dropout", "one bad type in a sweep"),
}
CASES = [pytest.param(case, marks=pytest.mark.slow) if case in CHECKED_ALIKE else case for case in BAD]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_with_exit_code_2_and_trains_nothing(case: str, command: Command) -> None:
    words, expected = BAD[case]
    Path("rows.xml").touch()
    code, out, err = command(*words)
    assert code == 2
    assert expected in err
    assert err.startswith("peftsweep: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not list(Path("multirun").glob("*/*/result.json"))


@pytest.mark.parametrize("word", ["no", "off", "never", "false", "null"])
def test_an_interval_may_be_switched_off_in_words(word: str, compose: Compose) -> None:
    one = compose(f"train.eval_every={word}", f"train.checkpoint_every={word}")
    assert (one.config.train.eval_every, one.config.train.checkpoint_every) == (None, None)


def test_the_identity_ignores_where_and_how_a_trial_runs(compose: Compose) -> None:
    base = compose()
    same = ["study=other", "label=mine", "device=cpu", "quiet=true", "train.learning_rate=1e-4"]
    assert compose(*same, "train.learning_rate_scale=10").identity == base.identity


@pytest.mark.parametrize(
    "words",
    [
        ["seed=1"],
        ["method.r=16"],
        ["quant=4bit"],
        ["targets=qv"],
        ["train.steps=7"],
        ["dataset.samples=9"],
        ["model.dtype=bfloat16"],
        ["train.learning_rate=1e-3"],
    ],
)
def test_what_changes_the_numbers_changes_the_identity_and_the_training(words: list[str], compose: Compose) -> None:
    base, other = compose(), compose(*words)
    assert (other.identity != base.identity, other.training != base.training) == (True, True)


def test_evaluations_change_the_identity_but_not_the_training(compose: Compose) -> None:
    base, other = compose(), compose("eval=[perplexity]")
    assert (other.identity != base.identity, other.training != base.training) == (True, False)


def test_a_data_file_counts_by_its_content(compose: Compose, questions: Path) -> None:
    words = ["dataset=file", 'dataset.prompt="{question}"', 'dataset.answer="{answer}"']
    copy = Path("copy.jsonl")
    copy.write_text(questions.read_text())
    first = compose(*words, "dataset.path=questions.jsonl").identity
    assert compose(*words, "dataset.path=copy.jsonl").identity == first
    copy.write_text(questions.read_text().replace("What is 3", "What was 3"))
    assert compose(*words, "dataset.path=copy.jsonl").identity != first


def test_files_that_a_pattern_matches_count_as_one_with_their_rows(compose: Compose, questions: Path) -> None:
    words = ["dataset=file", 'dataset.prompt="{question}"', 'dataset.answer="{answer}"']
    lines = questions.read_text().splitlines(keepends=True)
    for number, part in enumerate((lines[:2], lines[2:])):
        Path(f"part-{number}.jsonl").write_text("".join(part))
    whole = compose(*words, "dataset.path=questions.jsonl").identity
    assert compose(*words, "dataset.path=part-*.jsonl").identity == whole
    test = compose(
        *words, "dataset.path=questions.jsonl", "dataset.test_path=part-*.jsonl", "dataset.leave_out_tested=false"
    )
    assert test.rows is not None
    assert len(test.rows.test) == len(lines)
    Path("part-1.jsonl").write_text("".join(lines[3:]))
    assert compose(*words, "dataset.path=part-*.jsonl").identity != whole
    with pytest.raises(InputError, match=r"dataset\.path=other-\*\.jsonl: no such file"):
        compose(*words, "dataset.path=other-*.jsonl")


def test_a_local_model_counts_by_its_files(compose: Compose) -> None:
    named = compose("model=tiny").identity
    folder = next(iter(Path(cli.__file__).parent.glob("tiny/weights")))
    assert compose(f"model.name_or_path={folder}").identity == named


def test_a_missing_column_names_the_row_of_the_file(compose: Compose) -> None:
    rows = [{"q": "1", "a": "1"}, {"q": "2", "b": "2"}, *({"q": "3", "a": "3"} for _ in range(20))]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"row 2 of rows.jsonl has no column 'a'; there are: q, b"):
        compose("dataset=file", "dataset.path=rows.jsonl", 'dataset.prompt="{q}"', 'dataset.answer="{a}"')


def test_a_call_is_checked_against_its_annotations() -> None:
    check_call({"_target_": "peft.LoraConfig", "r": 4, "target_modules": ["q_proj"]}, "method")
    check_call({"_target_": "peft.LoraConfig", "lora_dropout": 0, "use_dora": False}, "method")
    for option, value in {"r": True, "use_dora": "yes", "target_modules": 3, "lora_dropout": "much"}.items():
        with pytest.raises(InputError, match=f"method.{option}="):
            check_call({"_target_": "peft.LoraConfig", option: value}, "method")


def test_help_and_completion_never_import_torch() -> None:
    commands = [
        ["--help"],
        ["--help", "train.warmup", "eval.x.samples", "method"],
        ["--version"],
        ["-sc", "query=bash"],
    ]
    probe = (
        "import sys; from peftsweep import cli\n"
        f"for words in {commands!r}:\n"
        "    sys.argv = ['peftsweep', *words]\n"
        "    try: cli.main()\n"
        "    except SystemExit: pass\n"
        "    assert not {'torch', 'transformers', 'peft', 'pandas'} & set(sys.modules), ('heavy import', words)"
    )
    env = os.environ | {"COMP_LINE": "peftsweep method=", "COMP_POINT": "17"}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


def test_completion_offers_the_options_of_a_group() -> None:
    env = os.environ | {"COMP_LINE": "peftsweep method=", "COMP_POINT": "17"}
    probe = "import sys; from peftsweep import cli; sys.argv = ['peftsweep', '-sc', 'query=bash']; cli.main()"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=env, check=False)
    assert {"method=lora", "method=ia3", "method=full"} <= set(done.stdout.split())


def test_help_lists_every_group_and_option_and_those_of_the_user() -> None:
    mine = Path("mine/method")
    mine.mkdir(parents=True)
    (mine / "mymethod.yaml").touch()
    text = cli.help_text(["--help", "--config-dir", "mine"])
    assert "mymethod" in text
    for option in OPTIONS:
        group, _, name = option.partition("=")
        line = next(line for line in text.splitlines() if line.startswith(f"  {group} "))
        assert name in line.split()


def test_a_user_brings_a_method_of_their_own(command: Command) -> None:
    mine = Path("mine/method")
    mine.mkdir(parents=True)
    (mine / "wide.yaml").write_text(
        "# @package _global_\nmethod: {_target_: peft.LoraConfig, r: 64, target_modules: [q_proj]}\n"
    )
    code, out, err = command("--config-dir", "mine", "method=wide", "dry_run=true")
    assert (code, err) == (0, "")
    assert "tiny-wide-r64" in out


def test_the_command_that_repeats_a_trial_names_the_folder_of_the_options_it_was_told(
    command: Command, compose: Compose, tmp_path: Path
) -> None:
    for flag in (["--config-dir", "my options"], []):
        Path("my options").mkdir(exist_ok=True)
        assert command(*flag, "method.r=4", "dry_run=true")[0] == 0
        for name, text in done.hydra_files(compose("method.r=4")).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        told = "'--config-dir=my options' " if flag else ""
        assert build.command(tmp_path) == f"peftsweep {told}device=cpu method.r=4"


GERMAN = {"frage": "Was ist das?", "antwort": "Ein Haus"}


@pytest.mark.parametrize(
    ("row", "words", "message"),
    [
        (
            {"frage": "Was ist das?", "antwort": "Ein Haus"},
            [],
            """'dataset.prompt="{frage}\\n"' 'dataset.answer="{antwort}"'""",
        ),
        (
            {"frage": "Was ist das?", "antwort": "Ein Haus"},
            ["dataset.prompt='{frage} '"],
            """'dataset.answer="{antwort}"'""",
        ),
        ({"question": "What is it?", "answer": "A house"}, [], """such as 'dataset="my rows.jsonl"'"""),
    ],
)
def test_templates_that_are_missing_are_shown_over_the_columns_of_the_file(
    row: dict[str, str], words: list[str], message: str
) -> None:
    Path("my rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError) as refused:
        cli._trial("dataset=file", "dataset.path='my rows.jsonl'", *words)
    assert "must be given, such as " in str(refused.value)
    assert message in str(refused.value)
    assert "{question}" not in str(refused.value)
