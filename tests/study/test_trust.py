"""A record, an adapter or an experiment is data: it names no code but ours, and ``${`` in it is text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from peftsweep.config import build, fill
from peftsweep.config.compose import Trial
from peftsweep.study import trust
from peftsweep.study.record import Result
from tests.conftest import SMALL

Compose = Callable[..., Trial]
Command = Callable[..., tuple[int, str, str]]
TOUCH = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": ["ran"]}}
LM_EVAL = {"_target_": "peftsweep.evaluation.harness.lm_eval"}
HOSTILE: dict[str, Any] = {  # dotted key -> what a record says there
    "quant": {"_target_": "os.system", "command": "touch ran"},
    "method": {"_target_": "subprocess.check_output", "args": ["touch", "ran"]},
    "method.init_lora_weights": {"_target_": "os.system", "command": "touch ran"},
    "method.eva_config": TOUCH,
    "method_setup": {"_target_": "peftsweep.study.record.write_text", "file": "ran", "text": ""},
    "eval.tiny_math._target_": "os.system",
    "eval.tiny_math.metric": {"_target_": "pickle.loads", "data": "cos\nsystem\n(S'touch ran'\ntR."},
    "eval.tiny_math.reader": "os.remove",
    "dataset.generator": "shutil.rmtree",
    "dataset.reader": "os.system",
    "train.optimizer": "subprocess.Popen",
    "inference": {"_target_": "os.system", "command": "touch ran"},
    "model.attn_implementation": "theirs/kernel",
    "method.megatron_core": "theirs",
    "method.corda_config": {"cache_file": "ran"},
    "eval.harness": LM_EVAL | {"tasks": [{"task": "x", "doc_to_text": "{{ cycler.__init__.__globals__.os }}"}]},
    "eval.with_yamls": LM_EVAL | {"tasks": ["x"], "include_path": "theirs"},
}


def record(compose: Compose, changes: dict[str, Any]) -> Path:
    """The folder of a trial that somebody else's study holds."""
    one = compose(*SMALL)
    tree = json.loads(json.dumps(one.tree))
    for key, value in changes.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    place = Path("theirs/multirun/default/trial-0123456789")
    info = {"trial": place.name, "labels": ["it"], "study": "default", "status": "success", "error": None}
    Result(info | {"identity": "0123456789"}, dict(one.choices), config=tree).write(place)
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({}, place / "adapter" / "adapter_model.safetensors")
    return place


# Both ways read a record by the same function: the fast tier has each key in one of them, and some in the other.
BOTH_WAYS = ("method", "method.eva_config", "eval.tiny_math.metric", "train.optimizer")
READ: list[Any] = [("repeat", key) for key in HOSTILE]
READ += [
    ("adapter.path", key) if key in BOTH_WAYS else pytest.param("adapter.path", key, marks=pytest.mark.slow)
    for key in HOSTILE
    if key != "method_setup"  # a restored adapter is not set up again
]


@pytest.mark.parametrize(("way", "key"), READ)
def test_a_record_that_names_other_code_runs_nothing(way: str, key: str, compose: Compose, command: Command) -> None:
    place = record(compose, {key: HOSTILE[key]})
    code, out, err = command(f"{way}={place}", "dry_run=true")
    assert (code, err.count("\n")) == (2, 1), (out, err)
    assert key in err
    assert not Path("ran").exists()
    assert place.exists()


def test_a_word_in_a_record_imports_no_module(compose: Compose, command: Command) -> None:
    Path("theirs.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    code, _, err = command(f"repeat={record(compose, {'train.optimizer': 'theirs'})}", "dry_run=true")
    assert (code, err.count("\n")) == (2, 1)
    assert "train.optimizer=theirs: no such optimizer" in err
    assert not Path("ran").exists()


def test_a_name_in_a_record_changes_nothing_of_the_terminal(compose: Compose, command: Command) -> None:
    place = record(compose, {"dataset.generator": "a\x1b[31m\nb\u202e"})
    code, _, err = command(f"repeat={place}", "dry_run=true")
    assert (code, err.count("\n")) == (2, 1)
    assert r"names a\x1b[31m\nb\u202e in dataset.generator" in err


def test_names_that_the_project_offers_are_repeated(compose: Compose, command: Command) -> None:
    place = record(compose, {"train.optimizer": "bitsandbytes.optim.AdamW8bit", "label": "mine/r=8"})
    code, out, err = command(f"repeat={place}", "dry_run=true")
    assert (code, err) == (0, ""), out


def test_every_name_in_conf_is_offered() -> None:
    conf = Path(fill.conf_dir())
    for section, key, name in trust._offered(conf):
        trust.check({section: {key: name}}, conf, (), "it")


MINE = """
from peftsweep.metrics import exact_match
def judge(written, expected, markers=()):
    return exact_match(written, expected)
"""


def test_a_name_of_one_s_own_is_repeated_where_it_is_given_again_or_trusted(
    compose: Compose, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mymetrics.py").write_text(MINE)
    monkeypatch.syspath_prepend(".")
    mine = {"_target_": "mymetrics.judge", "_partial_": True}
    place = record(compose, {"eval.tiny_math.metric": mine})
    code, _, err = command(f"repeat={place}", "dry_run=true")
    assert code == 2
    assert "names mymetrics.judge in eval.tiny_math.metric._target_" in err
    code, _, err = command(f"repeat={place}", "dry_run=true", "trust=true")
    assert code == 0, err
    given = "eval.tiny_math.metric={_target_:mymetrics.judge,_partial_:true}"
    code, _, err = command(f"repeat={place}", "dry_run=true", given)
    assert code == 0, err


def test_a_record_cannot_grant_itself_trust(compose: Compose, command: Command) -> None:
    place = record(compose, {"quant": HOSTILE["quant"], "trust": True})
    assert command(f"repeat={place}", "dry_run=true")[0] == 2
    assert not Path("ran").exists()


def test_an_experiment_that_names_code_runs_nothing(command: Command) -> None:
    Path("theirs").mkdir()
    adapter = {"peft_type": "LORA", "r": 2, "eva_config": {"_target_": "os.system", "command": "touch ran"}}
    Path("theirs/adapter_config.json").write_text(json.dumps(adapter))
    code, _, err = command("method=from/adapter_config", "method.path=theirs", "dry_run=true")
    assert (code, err.count("\n")) == (2, 1)
    assert not Path("ran").exists()


SECRET = "${oc.env:SECRET}"


@pytest.mark.parametrize("text", [SECRET, "\\" + SECRET, "a ${b} ${", "${oc.env:SECRET}\\"])
def test_interpolations_in_a_record_are_text(text: str, compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    place = record(compose, {"label": text, "dataset.name": text, "eval.tiny_math.prompt": "{question}"})
    one = compose(f"repeat={place}")
    assert (one.config.label, one.config.dataset.name) == (text, text)
    assert "hunter2" not in json.dumps(one.tree)


def test_interpolations_in_an_experiment_are_text(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    Path("theirs").mkdir()
    Path("theirs/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    Path("theirs/training_params.json").write_text(json.dumps({"query_template": "{query}${{oc.env:SECRET}}"}))
    one = compose("method=from/adapter_config", "method.path=theirs", *SMALL)
    assert one.config.dataset.prompt.endswith("${{oc.env:SECRET}}")
    assert "hunter2" not in json.dumps(one.tree)


def test_what_is_called_gets_texts_as_they_are(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    made = build._instantiate({"_target_": "builtins.dict", "prompt": SECRET}, "it")
    assert made == {"prompt": SECRET}
