"""What the tests compose is what Hydra composes."""

from __future__ import annotations

import shutil
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from peftsweep.config.fill import conf_dir, register
from tests.composing import fingerprint, keep_compositions

WORDS = {
    "groups and values": ["method=ia3", "hydra.launcher.workers=0", "+method.x=[1,2]", "train={steps: 3}", "label=a"],
    "a sweep": ["quant=4bit,none", "seed=1,2", "+point/sst2=lora", "eval=[perplexity]", "hydra/launcher=basic"],
    "a wrong value": ["train.steps=many"],
}


def composed(words: list[str], mode: RunMode) -> str:
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            return OmegaConf.to_yaml(loader.load_configuration("config", words, mode))
        except HydraException as error:
            return str(error)


# Groups with values are what nearly all tests compose.
KINDS = [kind if kind == "groups and values" else pytest.param(kind, marks=pytest.mark.slow) for kind in WORDS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_composition_with_the_values_put_in_is_that_of_hydra(
    kind: str, composing: pytest.MonkeyPatch, compositions: Path, tmp_path: Path
) -> None:
    commands = [(words, mode) for words in (["seed=7", *WORDS[kind]], WORDS[kind]) for mode in RunMode]
    composing.undo()
    try:
        register()
        expected = [composed(*command) for command in commands]
        for _ in ("nothing is kept", "a process before has kept all"):
            keep_compositions(composing, tmp_path)
            assert [composed(*command) for command in commands] == expected
            composing.undo()
    finally:
        composing.undo()
        keep_compositions(composing, compositions)
    assert list(tmp_path.iterdir())


def test_compositions_are_kept_for_one_state_of_all_that_they_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint()
    assert fingerprint() == before
    shutil.copytree(conf_dir(), tmp_path / "conf")
    monkeypatch.setattr("tests.composing.conf_dir", lambda: str(tmp_path / "conf"))
    seen = [before, fingerprint()]
    with (tmp_path / "conf" / "method" / "lora.yaml").open("a") as file:
        file.write("# one line more\n")
    seen.append(fingerprint())
    (tmp_path / "conf" / "method" / "another.yaml").write_text("")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
