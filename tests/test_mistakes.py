"""The five commonest mistakes end in a line that says what to type next."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftsweep import InputError, cli, options
from peftsweep.config import calls
from peftsweep.errors import suggest
from peftsweep.forecast import forecast
from peftsweep.models import model
from peftsweep.schema import TrainConfig
from peftsweep.study.cautions import cautions
from peftsweep.sweep import processes
from peftsweep.training import run as training_run

from .config.test_wrong_input import checked

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def rows() -> None:
    lines = [json.dumps({"question": f"What is {n}?", "reply": f"{n}."}) for n in range(30)]
    Path("rows.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{qestion} ", "no column 'qestion'; did you mean 'question', as in 'dataset.prompt=\"{question} \"'"),
        ("{text}\\n", "there are: question, reply, as in 'dataset.prompt=\"{question}\\n\"'"),
    ],
)
def test_a_wrong_column_is_answered_by_the_word_with_a_right_one(prompt: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        cli._trial("dataset=file", "dataset.path=rows.jsonl", f'dataset.prompt="{prompt}"', 'dataset.answer="{reply}"')
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("header", "row", "prompt", "answer"),
    [
        ("Frage (Text),Antwort,id", "What is {n}?,{n},{n}", "Frage (Text)", "Antwort"),
        ("row_id,asked,said", "x{n},What is {n}?,{n}{n}", "asked", "said"),
        ("nth,asked,said", "{n},What is {n}?,yes", "asked", "said"),
        ("short,long,said", "a,What is the value of {n}?,yes", "long", "said"),
    ],
)
def test_columns_that_only_number_the_rows_are_no_example_of_a_prompt_or_an_answer(
    header: str, row: str, prompt: str, answer: str
) -> None:
    Path("rows.csv").write_text("\n".join([header, *(row.format(n=n) for n in range(30))]))
    with pytest.raises(InputError) as refused:
        cli._trial("dataset=rows.csv")
    assert f"""'dataset.prompt="{{{prompt}}}\\n"' 'dataset.answer="{{{answer}}}"'""" in str(refused.value)
    with pytest.raises(InputError, match="no column 'label'") as refused:
        cli._trial("dataset=sst2", "dataset.path=rows.csv")
    assert f"""as in 'dataset.answer=" {{{answer}}}"'""" in str(refused.value)


def test_the_example_for_a_file_of_one_text_has_no_prompt_and_trains() -> None:
    Path("rows.csv").write_text("\n".join(["tale", *(f"Once there were {n}." for n in range(30))]))
    with pytest.raises(InputError) as refused:
        cli._trial("dataset=rows.csv")
    command = str(refused.value).partition("give it, such as: ")[2]
    assert command == """dataset=text dataset.path=rows.csv 'dataset.answer="{tale}"'"""
    assert cli._trial(*shlex.split(command)).config.dataset.answer == "{tale}"


def test_the_example_for_answers_that_a_label_judges_takes_the_answers_and_says_that_some_are_not_wanted() -> None:
    lines = [json.dumps({"prompt": f"{n}?", "completion": f"{n}.", "label": n % 2 == 0}) for n in range(30)]
    Path("rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="rows whose label is false hold rejected answers") as refused:
        cli._trial("dataset=rows.jsonl")
    assert str(refused.value).endswith("""'dataset.prompt="{prompt}\\n"' 'dataset.answer="{completion}"'""")
    Path("rows.jsonl").write_text("\n".join(lines).replace("completion", "said"))  # a class of true and false
    with pytest.raises(InputError) as refused:
        cli._trial("dataset=rows.jsonl")
    assert "not wanted" not in str(refused.value)
    assert """'dataset.answer="{label}"'""" in str(refused.value)


@pytest.mark.parametrize("instead", [KeyboardInterrupt, RecursionError, ImportError])
def test_an_interrupt_is_one_line_whatever_an_import_makes_of_it(
    instead: type[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_interrupts", [])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise instead("half imported")

    try:
        assert cli._run_command(interrupted) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted; the same command continues\n"


WRONG_PATHS = {
    "dataset.path=row.jsonl": "dataset.path=row.jsonl: no such file; did you mean 'rows.jsonl'?",
    "dataset.path=rows.csv": "dataset.path=rows.csv: no such file; did you mean 'rows.jsonl'?",
    "dataset.path=questions.csv": "there are rows.jsonl",
    "dataset.path=data/rows.jsonl": "; there is no folder data",
    "dataset.test_path=rows.json": "dataset.test_path=rows.json: no such file; did you mean 'rows.jsonl'?",
    "model.name_or_path=./modle": "model.name_or_path=./modle: no such folder; did you mean 'model'?",
}


@pytest.mark.parametrize("word", WRONG_PATHS)
def test_a_wrong_path_is_answered_by_what_is_there(word: str) -> None:
    Path("model").mkdir()
    words = ["dataset=file", "dataset.path=rows.jsonl", 'dataset.prompt="{question}"', 'dataset.answer="{reply}"']
    with pytest.raises(InputError) as refused:
        checked(*words, *(["model=causal_lm"] if word.startswith("model") else []), word)
    assert WRONG_PATHS[word] in str(refused.value)


def test_no_gpu_is_answered_by_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="there are: none; device=cpu uses the CPU; see peftsweep-doctor"):
        model.device("cuda")
    monkeypatch.setattr(processes, "_visible", list)
    with pytest.raises(InputError, match="no CUDA device 0; there are: none; leave it out to use the CPU"):
        processes.places(None, [0], {"auto"})


def test_too_little_memory_is_answered_by_keys_that_need_less() -> None:
    advice = forecast.oversized(cli._trial("device=cpu", "memory_limit=2MB", "train.batch_size=8"))
    assert advice is not None
    assert (
        "there are 2.0 MB; try train.batch_size=4 train.accumulation=2, train.checkpointing=true, quant=4bit" in advice
    )


@pytest.mark.parametrize(("rate", "proposed"), [(3.0, "0.001"), (0.01, "0.001"), (0.004, "0.0004")])
def test_too_high_a_rate_is_answered_by_one_that_may_do(rate: float, proposed: str) -> None:
    import torch

    with pytest.raises(FloatingPointError, match=rf"lower train.learning_rate, such as {proposed}$"):
        training_run.check_finite(float("nan"), "at step 7", torch.nn.Linear(1, 1), TrainConfig(learning_rate=rate))


MEANT = {
    "quant=nf4": "did you mean '4bit'?",
    "rank=8": "did you mean 'method.r'?",
    "method.learning_rate=1": "did you mean 'train.learning_rate'?",
    "model.dtype=bf16": "did you mean 'bfloat16'?",
}


@pytest.mark.parametrize("word", MEANT)
def test_the_words_of_other_libraries_lead_to_ours(word: str) -> None:
    with pytest.raises(InputError) as refused:
        cli._trial(word)
    assert MEANT[word] in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "known", "meant"),
    [
        ("lr", ["study", "seed"], "train.learning_rate"),
        ("max-seq-length", ["study", "seed"], "dataset.max_length"),
        ("r", ["learning_rate", "steps"], "method.r"),
        ("batch_size", ["path", "samples"], "train.batch_size"),
        ("n_jobs", ["study"], "hydra.launcher.workers"),
        ("target_modules", ["study"], "targets.modules"),
        ("lr", ["learning_rate", "steps"], "learning_rate"),  # beside it, without its section
    ],
)
def test_a_key_of_another_section_is_suggested(wrong: str, known: list[str], meant: str) -> None:
    assert calls.suggest_key(wrong, known) == f"did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("group", "wrong", "meant"),
    [("quant", "int8", "8bit"), ("method", "prefix", "prefix_tuning"), ("targets", "attention", "qkvo")],
)
def test_an_option_by_another_name_is_suggested(group: str, wrong: str, meant: str) -> None:
    assert suggest(wrong, options.names(group, [Path(options.conf_dir())])) == f"did you mean '{meant}'?"


@pytest.mark.parametrize(("after", "worse"), [(9.0, True), (5.2, False), (4.0, False)])
def test_a_perplexity_that_training_has_raised_is_a_caution(after: float, worse: bool) -> None:
    scores = {"perplexity": {"value": after, "stderr": 0.1, "n": 9}, "base_perplexity": {"value": 5.0, "stderr": 0.1}}
    found = [line for line in cautions({}, {"rows": scores}, {}) if "lower train.learning_rate" in line]
    assert bool(found) is worse


@pytest.mark.parametrize(
    ("entry_point", "words"),
    [
        ("doctor.main", []),
        ("cli.collect", []),
        ("cli.main", ["dry_run=true"]),
        ("cli.data", ["show", "rows.jsonl"]),
    ],
)
def test_a_working_folder_that_was_removed_is_one_line(entry_point: str, words: list[str], tmp_path: Path) -> None:
    code = (
        f"import os, shutil; from peftsweep import cli, doctor; "
        f"os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); {entry_point}()"
    )
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "peftsweep: the working folder cannot be used (No such file or directory); cd to a folder that is there\n"
    )


def test_a_file_that_must_not_be_read_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def stat(path: Any, *more: Any, **options: Any) -> os.stat_result:
        if str(path) == "/locked/rows.jsonl":  # as below a folder of another user; root may read all
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *more, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert command("dataset=/locked/rows.jsonl")[::2] == (
        2,
        "peftsweep: /locked/rows.jsonl: cannot be read (Permission denied)\n",
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/dev/null", "dataset=/dev/null: is a pipe or a device; must be a file"),
        ("x" * 300 + ".jsonl", ".jsonl: cannot be read (File name too long)"),
        ("lists.jsonl", "(recognised are prompt/completion, "),
        ("lists.jsonl", ", as not all values of prompt are texts or numbers; give "),
    ],
)
def test_a_file_that_holds_no_rows_for_training_says_why(name: str, problem: str, command: Command) -> None:
    Path("lists.jsonl").write_text('{"prompt": ["a"], "completion": "b"}\n{"prompt": "a", "completion": "b"}\n')
    code, _, err = command(f"dataset={name}")
    assert (code, err.count("\n")) == (2, 1)
    assert problem in err
