"""Models and rows of the hub, through its own libraries, from a server on this machine that answers as it does."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from safetensors.torch import load, save

from peftsweep.config import fill
from peftsweep.data import rows as data_rows
from peftsweep.data import templates
from peftsweep.models.model import TINY
from peftsweep.study.record import Result
from tests import schemas
from tests.conftest import SMALL
from tests.data.test_conversations import NAMED, dataset
from tests.hub import CUT_OFF, TOKEN, Files, Hub, files_of

CONF = fill.conf_dir()
PAIRS = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(40)]
# Each command's words as they are meant, or the line that refuses them.
MEANINGS = """
import json, os
from pathlib import Path
from peftsweep import InputError, shorthand
for words in {commands!r}:
    if words and words[0].startswith("HF_TOKEN="):
        os.environ["HF_TOKEN"] = words.pop(0).partition("=")[2]
    try:
        print(json.dumps(shorthand.expanded(words, [Path({conf!r})])))
    except InputError as error:
        print(json.dumps(str(error)))
"""
RUN = "import sys; from peftsweep import cli; sys.argv = ['peftsweep', *{words!r}]; cli.main()"
READ = """
import json, sys
from peftsweep.data import rows
for name, *where in {sources!r}:
    found = rows.hub_rows(*where, "dataset.hub")
    print(json.dumps([name, found], default=str))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.shutdown()
    made.server_close()


def lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def meanings(hub: Hub, cache: Path, *commands: list[str], **variables: str) -> list[Any]:
    """What ``shorthand`` makes of the words of each command, or why it refuses them.

    HF_TOKEN=... before the words of a command is set from it on.
    """
    done = hub.run(MEANINGS.format(commands=[*commands], conf=str(CONF)), cache, **variables)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(hub: Hub, cache: Path, *words: str, **variables: str) -> tuple[int, str]:
    """The exit code of `peftsweep` with these words, and all that it says."""
    given = ["hydra.launcher.workers=0", "device=cpu", *words]
    done = hub.run(RUN.format(words=given), cache, **variables)
    return done.returncode, done.stdout + done.stderr


def record_of(study: str) -> Result:
    (file,) = Path("multirun", study).glob("*/result.json")
    return Result.read(file.parent)


# ---- what the hub answers ----------------------------------------------------------------------------


@pytest.mark.slow  # a process of its own that imports the hub's libraries, as the tests below
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.model("org/whole").commit({"config.json": b'{"architectures": ["LlamaForCausalLM"]}'})
    hub.model("org/whole").commit({"config.json": b'{"architectures": ["BertForMaskedLM"]}'}, "other/branch")
    hub.model("org/gated").commit({"config.json": b"{}"})
    hub.model("org/gated").gated = True
    hub.model("org/refused").commit({"config.json": b"{}"})
    hub.model("org/refused").faults["config.json"] = 403
    hub.model("org/adapter").commit({"adapter_config.json": b"{}"})
    hub.dataset("org/rows").commit({"train.jsonl": lines(PAIRS)})
    hub.dataset("org/gated").commit({"train.jsonl": lines(PAIRS)})
    hub.dataset("org/gated").gated = True
    hub.dataset("org/failing").commit({"train.jsonl": lines(PAIRS)})
    hub.dataset("org/failing").faults[""] = 400
    hub.dataset("org/script").commit({"script.py": b"import os"})
    parts = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
    hub.dataset("org/parts").commit({"README.md": parts.encode(), "a.jsonl": lines(PAIRS), "b.jsonl": lines(PAIRS)})
    log_in = r"log in \(hf auth login, or HF_TOKEN\)"
    refused = {
        "model=org/none": f"the hub has no repository of this name, or it is private: then {log_in}",
        "model=org/gated": f"it is gated: accept its terms on its hub page, then {log_in}",
        "model=org/refused": "the hub answers with status 403",
        "model=org/adapter": "it holds no config.json; if it is an adapter, download it and give adapter.path=FOLDER",
        "model=org/whole model.revision=nope": "it has no such revision; must be a branch, a tag or a whole commit",
        "dataset=org/none": f"the hub has no repository of this name, or it is private: then {log_in}",
        "dataset=org/gated": f"it is gated: accept its terms on its hub page, then {log_in}",
        "dataset=org/failing": "the hub answers with status 400; run the same command again later",
        "dataset=org/script": "Dataset scripts are no longer supported",
        "dataset=org/parts": r"available configs: \['a', 'b'\]\); dataset.hub_config, .hub_split and .rev",
        "dataset=org/rows:nope": r"Unknown split \"nope\". Should be one of \['train'\].*dataset.hub_config",
        "dataset=org/rows dataset.revision=nope": "it has no such revision",
    }
    taken = [[f"HF_TOKEN={TOKEN}", "model=org/whole"], ["model=org/whole", "model.revision=other/branch"]]
    taken += [["model=org/gated"], ["dataset=org/gated"]]
    found = meanings(hub, tmp_path / "cache", *(words.split() for words in refused), *taken)
    for (words, expected), output in zip(refused.items(), found, strict=False):
        start = words.partition(" ")[0].partition(":")[0]
        assert isinstance(output, str), words
        assert re.match(rf"{re.escape(start)}: cannot be loaded \(.*{expected}", output), output
    assert [words[0] for words in found[len(refused) :]] == [
        "model=causal_lm",
        "model=encoder",
        "model=causal_lm",
        "dataset=file",
    ]


@pytest.mark.slow
def test_weights_that_are_cut_off_are_one_line_and_the_next_try_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.model("org/tiny").commit(files_of(TINY))
    hub.model("org/tiny").faults["model.safetensors"] = CUT_OFF
    words = ["model=org/tiny", *SMALL]
    code, output = run(hub, tmp_path / "cache", *words)
    assert code == 1
    assert "failed in load: InputError: model.name_or_path=org/tiny: cannot be loaded (peer closed connection" in output
    hub.model("org/tiny").faults.clear()
    code, output = run(hub, tmp_path / "cache", *words)
    assert (code, record_of("default").error) == (0, None), output


# ---- commits -----------------------------------------------------------------------------------------


def other_weights(files: Files) -> Files:
    changed = {name: 1.01 * weight for name, weight in load(files["model.safetensors"]).items()}
    return {**files, "model.safetensors": save(changed, metadata={"format": "pt"})}


@pytest.mark.slow
def test_the_commits_that_were_loaded_are_recorded_and_loaded_again_by_repeat_without_a_network(
    hub: Hub, tmp_path: Path
) -> None:
    cache, tiny = tmp_path / "cache", files_of(TINY)
    first = hub.model("org/tiny").commit(tiny)
    rows = hub.dataset("org/rows").commit({"train.jsonl": lines(PAIRS)})
    words = ["model=org/tiny", "dataset=org/rows", "method.r=4", "train.steps=2", "train.batch_size=4", "study=one"]
    code, output = run(hub, cache, *words)
    assert code == 0, output
    trial = record_of("one")
    assert (trial.meta_info["model_sha"], trial.meta_info["dataset_sha"]) == (first, rows)
    assert trial.meta_info["model_created_at"] == "2024-05-01T12:00:00+00:00"
    hub.model("org/tiny").commit(other_weights(tiny))  # the branches move
    hub.dataset("org/rows").commit({"train.jsonl": lines(PAIRS[20:])})
    for study, variables in (("online", {}), ("offline", {"HF_HUB_OFFLINE": "1"})):
        code, output = run(hub, cache, f"repeat={trial.folder}", f"study={study}", **variables)
        assert code == 0, output
        assert "equal to the bit" in output
        assert "config.model.revision" not in output  # not reported as changed: the same was loaded
        assert (record_of(study).config["model"]["revision"], record_of(study).meta_info["model_sha"]) == (first,) * 2


@pytest.mark.slow
def test_scores_of_the_base_are_not_those_of_the_commit_before(hub: Hub, tmp_path: Path) -> None:
    tiny = files_of(TINY)
    hub.model("org/tiny").commit(tiny)
    bases = []
    for seed in ("0", "1"):
        words = ["model=org/tiny", "eval=[perplexity]", *(word for word in SMALL if "tiny_math" not in word)]
        code, output = run(hub, tmp_path / "cache", *words, f"seed={seed}")
        assert code == 0, output
        (file,) = Path("multirun/default").glob(f"*-s{seed}-*/result.json")
        bases.append(Result.read(file.parent).eval_info["perplexity"]["base_perplexity"]["value"])
        hub.model("org/tiny").commit(other_weights(tiny))
    assert bases[0] != pytest.approx(bases[1], rel=1e-3)


@pytest.mark.slow
def test_rows_of_another_revision_are_not_taken_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    """The library itself takes, without a network, whatever it has kept last."""
    first = hub.dataset("org/rows").commit({"train.jsonl": lines(PAIRS)})
    hub.dataset("org/rows").commit({"train.jsonl": lines(PAIRS[:20])}, "two")
    sources = [["two", "org/rows", None, "train", "two"]]
    assert hub.run(READ.format(sources=sources), tmp_path / "cache").returncode == 0
    commands = [[f"dataset=org/rows{part}"] for part in ("", ":train")]
    commands += [["dataset=org/rows", f"dataset.revision={name}"] for name in (first, "two")]
    found = meanings(hub, tmp_path / "cache", *commands, HF_HUB_OFFLINE="1")
    assert found[3][0] == "dataset=file"
    assert "not of " + first in found[2]


# ---- datasets by name --------------------------------------------------------------------------------


def layout(name: str, rows: list[dict[str, Any]]) -> Files:
    """The files of the dataset's repository: parquet in a folder of each configuration, csv or JSON at the top."""
    own = NAMED[name]
    splits = {own.get("hub_split") or "train", own.get("hub_test_split") or "train"}
    if name in ("dialogsum", "samsum"):
        return {f"{split}.csv": pandas.DataFrame(rows).to_csv(index=False).encode() for split in splits}
    if name in ("metamath", "metamath_comparison", "dolly", "wizard_evol"):
        return {f"{own['hub'].rpartition('/')[2]}.json": json.dumps(rows).encode()}
    buffer = io.BytesIO()
    pandas.DataFrame(rows).to_parquet(buffer)
    folder = own.get("hub_config") or "data"
    return {f"{folder}/{split}-00000-of-00001.parquet": buffer.getvalue() for split in splits}


def card(files: Files) -> bytes:
    """A README.md that says which files are of which configuration."""
    named: dict[str, list[dict[str, str]]] = {}
    for folder, file in (path.split("/") for path in files):
        split = file.partition("-")[0]
        named.setdefault(folder, []).append({"split": split, "path": f"{folder}/{split}-*"})
    configs = [{"config_name": name, "data_files": listed} for name, listed in named.items()]
    return f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()


@pytest.mark.slow
def test_a_named_dataset_is_read_from_a_repository_of_its_layout(hub: Hub, tmp_path: Path) -> None:
    names = [name for name in sorted(schemas.SCHEMAS) if "hub" in NAMED[name]]
    repositories: dict[str, Files] = {}
    for name in names:
        repositories.setdefault(NAMED[name]["hub"], {}).update(layout(name, schemas.SCHEMAS[name]))
    for name in names:
        own, files = NAMED[name], repositories[NAMED[name]["hub"]]
        described = {"README.md": card(files)} if own.get("hub_config") else {}
        hub.dataset(own["hub"]).commit(files | described, own.get("revision") or "main")
    found = [(name, dataset(name)) for name in names]
    sources = [[name, one.hub, one.hub_config, one.hub_split, one.revision] for name, one in found]
    done = hub.run(READ.format(sources=sources), tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    read = dict(map(json.loads, done.stdout.splitlines()))
    assert [*read] == names
    for name in names:
        file = schemas.write(name, tmp_path)
        local = templates.dataset_examples(dataset(name, path=str(file)), data_rows.read_rows(file))
        assert templates.dataset_examples(dataset(name), read[name]) == local, name
