"""The tab key offers options, keys and values, soon enough and in a real shell."""

from __future__ import annotations

import os
import pty
import resource
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import AdaLoraConfig, LoraConfig

from peftsweep import InputError, completion, options
from peftsweep.config import checks

SOON = 0.3  # seconds of a CPU


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("peftsweep ", ["method=", "quant=", "train.", "seed=", "hydra/launcher="]),
        ("peftsweep method=", ["method=lora", "method=full", "method=ia3"]),
        ("peftsweep quant=none,4", ["quant=none,4bit"]),
        ("peftsweep 'eval=[gsm8k,perpl", ["eval=[gsm8k,perplexity"]),
        ("peftsweep train.learning", ["train.learning_rate=", "train.learning_rate_scale="]),
        ("peftsweep train.schedule=", ["train.schedule=cosine", "train.schedule=linear", "train.schedule=constant"]),
        ("peftsweep train.keep_best=t", ["train.keep_best=true"]),
        ("peftsweep dataset.missing=d", ["dataset.missing=drop"]),
        ("peftsweep method=qlora method.lora_a", ["method.lora_alpha="]),  # whose yaml has lora's above it
        ("peftsweep method=ia3 method.init", ["method.init_ia3_weights="]),
        ("peftsweep hydra.launcher.w", ["hydra.launcher.workers="]),
        ("peftsweep hydra/launcher=s", ["hydra/launcher=slurm"]),
        ("peftsweep sweep=rank", ["sweep=rank_ablation"]),
        ("peftsweep --cfg j", ["job"]),
        ("peftsweep --ver", ["--version"]),
    ],
)
def test_what_may_follow_is_offered(line: str, some: list[str]) -> None:
    found = completion.completions(line)
    assert set(some) <= set(found)
    begun = completion._words(line)[1]
    assert all(word.startswith(begun) for word in found)


def test_the_keys_of_a_method_are_the_fields_of_its_class_in_peft() -> None:
    for method, config in {"lora": LoraConfig, "adalora": AdaLoraConfig}.items():
        found = {word.strip("=") for word in completion.completions(f"peftsweep method={method} method.")}
        own = set(config.__annotations__) - {"target_modules"}
        assert {f"method.{name}" for name in own} <= found


def test_the_keys_of_the_launcher_are_those_that_it_takes() -> None:
    found = completion.completions("peftsweep hydra.launcher.")
    assert found == [f"hydra.launcher.{name}=" for name in dict.fromkeys([w.split(".")[-1][:-1] for w in found])]
    assert {word.removeprefix("hydra.launcher.").strip("=") for word in found} == set(checks.LAUNCHER)


def test_files_and_options_of_ones_own_are_offered() -> None:
    Path("data").mkdir()
    Path("data/rows.jsonl").touch()
    assert completion.completions("peftsweep dataset=da") == ["dataset=data/"]
    assert completion.completions("peftsweep dataset=data/r") == ["dataset=data/rows.jsonl"]
    assert completion.completions("peftsweep dataset.test_path=data/") == ["dataset.test_path=data/rows.jsonl"]
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/lonely.yaml").touch()
    assert "method=lonely" in completion.completions("peftsweep --config-dir mine method=lo")
    assert "method=lonely" not in completion.completions("peftsweep method=lo")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("dataset.path=my", r"dataset.path=my\ rows.jsonl"),
        (r"dataset.path=my\ ", r"dataset.path=my\ rows.jsonl"),
        ('"dataset.path=my', "dataset.path=my rows.jsonl"),
        ("'dataset.path=my r", "dataset.path=my rows.jsonl"),
    ],
)
def test_a_blank_in_a_name_is_offered_as_the_shell_takes_it(
    shell: str, typed: str, offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my rows.jsonl").touch()
    monkeypatch.setattr(sys, "argv", ["", shell, f"peftsweep method=lora {typed}"])
    completion.main()
    assert capsys.readouterr().out.strip() == offered.removeprefix("dataset.path=" if shell == "bash" else "")


def test_the_options_are_those_of_conf() -> None:
    conf = Path(options.conf_dir())
    for group, *_ in options.groups(conf):
        offered = completion.completions(f"peftsweep {group}=")
        offered = [word for word in offered if word != f"{group}=null"]  # none of them
        assert offered == [f"{group}={file.stem}" for file in sorted((conf / group).glob("*.yaml"))]


def test_an_answer_takes_little_time_and_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-P", "-m", "peftsweep.completion", "bash"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([*command, "peftsweep method=lora method."], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "method.r=" in found.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SOON
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in found.stderr.splitlines()}
    assert not imported & {"hydra", "omegaconf", "torch", "peft", "transformers", "rich"}


TYPED = {  # before the tab key, and after it
    "peftsweep method=lok": "peftsweep method=lokr",
    "peftsweep quant=none,8bit_": "peftsweep quant=none,8bit_offload",
    "peftsweep train.learning_rate_": "peftsweep train.learning_rate_scale=",
    "peftsweep method=lora method.use_rs": "peftsweep method=lora method.use_rslora=",
    "peftsweep dataset=my": "peftsweep dataset=my\\ rows.jsonl",
}


SHELLS = {  # how each is started without a person's own settings, and what makes it print no marks around a paste
    "bash": (["bash", "--norc", "--noprofile", "-i"], "bind 'set enable-bracketed-paste off'"),
    "zsh": (["zsh", "-f", "-i"], "unset zle_bracketed_paste; bindkey -e"),
    "fish": (["fish", "--no-config", "-i"], "true"),
}


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"needs {name}"))
        for name in completion.SHELLS
    ],
)
def test_a_shell_completes_what_is_typed(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell on a terminal of its own, in which keys are pressed; the line is then printed instead of run."""
    (tmp_path / "script").write_text(completion.script(shell))
    (tmp_path / "my rows.jsonl").touch()
    for name in ("HOME", "ZDOTDIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    arguments, setting = SHELLS[shell]
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(arguments[0], arguments)

    def until(end: str) -> str:
        seen, stop = "", time.monotonic() + 20
        while end not in seen and time.monotonic() < stop:
            if select.select([terminal], [], [], 1.0)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
        return seen

    try:
        os.write(terminal, f"{setting}; source ./script; echo so''urced\n".encode())
        until("sourced")
        for before, after in TYPED.items():
            os.write(terminal, f"{before}\t".encode())
            until(after)
            os.write(terminal, b"\x01echo 'it is: \x05'\n")  # to the line's beginning and its end
            assert f"it is: {after}" in until(f"it is: {after}")
    finally:
        os.write(terminal, b"\x15exit\n")
        os.waitpid(process, 0)


def test_each_shell_has_its_script_and_another_is_refused() -> None:
    for shell in completion.SHELLS:
        assert f"-P -m peftsweep.completion {shell} " in completion.script(shell)
    with pytest.raises(InputError, match="--completion tcsh: must be one of bash, zsh, fish"):
        completion.script("tcsh")
