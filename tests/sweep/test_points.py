"""The points of a sweep are the trials of what Hydra composes of their words, whatever they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftsweep.config import checks, compose
from peftsweep.config.compose import Trial
from peftsweep.config.fill import conf_dir, register
from peftsweep.errors import InputError
from peftsweep.sweep.points import Points
from tests.composing import keep_compositions

OWN = {  # yamls of a person, in the folder mine
    "method/wide.yaml": """
        # @package _global_
        label: wide-${seed}
        method: {_target_: peft.LoraConfig, r: 4, lora_alpha: "${mul:4,${method.r}}", target_modules: [q_proj]}
        train: {learning_rate: 1.0e-3, warmup: "${share:0.1,${.steps}}"}
        dataset: {samples: "${oc.select:train.batch_size}"}
        """,
    "method/named.yaml": """
        # @package _global_
        method: {_target_: peft.LoraConfig, r: 4, lora_alpha: "${train[batch_size]}", target_modules: [q_proj]}
        train: {clip: "${train.${label}}"}
        """,
}
# Points of one sweep each: of the first all is composed, of the others as much as they may not share with it.
SWEEPS = {
    "values": ["method.r=2 seed=1", "method.r=4 seed=2", "seed=3 method.r=4", "method.r=4 seed=1"],
    "groups": ["quant=4bit seed=1", "quant=none seed=1", "method=ia3 seed=1", "quant=4bit seed=2"],
    "types": ["train.learning_rate=1 seed=1", "train.learning_rate=2e-3 seed=2", "train.epochs=2", "train.epochs=null"],
    "enums": ["train.schedule=linear", "train.schedule=constant", "train.autocast=bfloat16", "train.autocast=float16"],
    "texts": ["label=one", "label='a, b'", "label=3", "label=null", "study=other", "label=true"],
    "lists": [
        "eval=[perplexity]",
        "eval=[tiny_math]",
        "method.target_modules=[q_proj]",
        "method.target_modules=[k_proj]",
    ],
    "sections": ["train={steps: 3, clip: 2.0}", "train={steps: 4} train.steps=5", "train.steps=5 train={steps: 4}"],
    "twice": ["seed=1 seed=2", "seed=2 seed=1", "method.r=2 seed=2 method.r=8", "method.r=8 seed=2 method.r=2"],
    "added": ["++method.bias=all seed=1", "++method.bias=none seed=2", "+method.use_dora=true", "~method.r seed=1"],
    "followed": ["train.eval_every=2", "train.eval_every=no", "device=cpu", "model.dtype=bfloat16", "model.dtype=auto"],
    "halving": ["halving.min_steps=4", "halving.min_steps=8", "halving.min_steps=8 train.best_metric=perplexity.loss"],
    "newlines": [r"dataset.prompt='{a}\\n'", r"dataset.prompt='{b}\\n'", r"dataset.prompt='{a}'"],
    "interpolated": ["label=x-${seed} seed=1", "label=x-${seed} seed=2", "method.lora_alpha=3", "method.lora_alpha=4"],
    "own": ["method=wide seed=1", "method=wide seed=2", "method=wide train.steps=30", "method=wide train.steps=60"],
    "own by its name": ["method=wide train.batch_size=2", "method=wide train.batch_size=3", "method=wide method.r=8"],
    "computed names": [
        f"method=named label={name} train.{name}={n}" for name in ("steps", "log_every") for n in (2, 5)
    ],
    "in brackets": ["method=named label=steps train.batch_size=2", "method=named label=steps train.batch_size=3"],
    "hydra's": ["hydra.launcher.retries=2 seed=3", "hydra.launcher.retries=1 seed=4", "hydra/launcher=basic seed=4"],
    "points": ["+point/sst2=lora seed=1", "+point/sst2=lora seed=2", "+point/sst2=full seed=2"],
    "wrong": ["seed=1", "seed=x", "seed=-1", "seed=null", "train.steps=1e9", "train.stps=3", "method.r=0", "seed=2"],
    "packages": ["quant@train=none", "seed@x=3", "optimizer=1", "train.optimizer=SGD", "train.optimizer=AdamW"],
}

FEW = ("values", "own")  # that are composed in the fast tier


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, DictConfig]]:
    """Hydra's loader and the configuration of a sweep that has yamls of a person's own."""
    mine = tmp_path_factory.mktemp("mine")
    for name, text in OWN.items():
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text("\n".join(line.removeprefix(" " * 8) for line in text.strip("\n").splitlines()))
    register()
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield loader, loader.load_configuration("config", [f"hydra.searchpath=[file://{mine}]"], RunMode.MULTIRUN)


def by_hydra(loaded: tuple[Any, DictConfig], words: list[str]) -> Trial:
    loader, master = loaded
    cfg = loader.load_sweep_config(master, words)
    return compose.trial(cfg, cfg.hydra.runtime.choices, words)


def what(make: Any, *arguments: Any) -> Trial | str:
    """A trial, or the line that says why there is none."""
    try:
        made: Trial = make(*arguments)
    except InputError as error:
        return str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return checks.one_line(error)
    return made


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in FEW else pytest.mark.slow) for kind in SWEEPS])
def test_points_are_the_trials_of_what_hydra_composes(kind: str, loaded: tuple[Any, DictConfig]) -> None:
    points = Points(*loaded)
    for text in SWEEPS[kind]:
        words = split(text)
        assert what(points.trial, words) == what(by_hydra, loaded, words), words


def test_each_yaml_is_parsed_once_and_a_composition_is_that_of_hydra(
    loaded: tuple[Any, DictConfig], composing: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, every = loaded[0], (["method=ia3"], ["method=ia3", "quant=4bit"], ["+point/sst2=lora"], ["method=ia3"])
    composing.undo()
    try:
        master = loader.load_configuration("config", ["device=cpu"], RunMode.MULTIRUN)
        expected = [loader.load_sweep_config(master, words) for words in every]
        parsed, load = list[str](), OmegaConf.load

        def noted(file: Any) -> Any:
            parsed.append(file.name)
            return load(file)

        monkeypatch.setattr(OmegaConf, "load", noted)
        points = Points(loader, master)
        composed = [points.compose(words) for words in every]
    finally:
        keep_compositions(composing)
    for (found, choices), whole in zip(composed, expected, strict=True):
        assert choices == whole.hydra.runtime.choices
        assert found == {key: value for key, value in whole.items_ex(resolve=False) if key != "hydra"}
    assert len(parsed) == len(set(parsed)) > 10


def split(text: str) -> list[str]:
    """The words of a line, of which a blank that no key follows parts none."""
    words: list[str] = []
    for part in text.split(" "):
        if words and "=" not in part and not part.startswith("~"):
            words[-1] += f" {part}"
        else:
            words.append(part)
    return words


OTHERS = {
    bool: lambda v: not v,
    int: lambda v: v + 1,
    float: lambda v: v / 2,
    str: lambda v: f"{v}_",
    type(None): lambda _: 1,
}


def plain_keys(tree: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from plain_keys(value, f"{section}{key}.")
        elif not isinstance(value, list):
            yield f"{section}{key}", value


@pytest.mark.slow
def test_no_value_is_shared_that_follows_from_a_plain_key(loaded: tuple[Any, DictConfig]) -> None:
    """Each key in turn has two values among points of one sweep, by which one that was overlooked would show."""
    (loader, master), points = loaded, Points(*loaded)
    words = ["method=lora_fa", "quant=4bit"]
    cfg = loader.load_sweep_config(master, words)
    tree: Any = OmegaConf.to_container(cfg, enum_to_str=True)
    for key, value in plain_keys({key: tree[key] for key in tree if key != "hydra"}):
        what(points.trial, [*words, f"{key}={as_word(value)}"])
        changed = [*words, f"{key}={as_word(OTHERS[type(value)](value))}"]
        assert what(points.trial, changed) == what(by_hydra, loaded, changed), changed


def as_word(value: Any) -> str:
    return "null" if value is None else f"'{value}'" if isinstance(value, str) else str(value).lower()


def noting(calls: list[str], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        calls.append(name)
        return real(*arguments)

    return called


def test_what_points_share_is_done_once(loaded: tuple[Any, DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("filled", "checked", "with_seed"):
        monkeypatch.setattr(compose, name, noting(done, name, getattr(compose, name)))
    points = Points(*loaded)
    for rate in (1e-3, 2e-3):
        for seed in range(3):
            points.trial([f"train.learning_rate={rate}", f"seed={seed}", "quant=4bit"])
    assert done == ["filled", "checked", "with_seed", "with_seed", "checked", "with_seed", "with_seed"]


def test_points_share_nothing_that_a_trial_changes(loaded: tuple[Any, DictConfig]) -> None:
    points = Points(*loaded)
    one, other = (points.trial([f"seed={seed}"]) for seed in (1, 2))
    assert (one.config.seed, one.tree["seed"], one.overrides) == (1, 1, ["seed=1"])
    assert (other.config.seed, other.tree["seed"], other.overrides) == (2, 2, ["seed=2"])
    assert one.identity != other.identity


def test_a_file_that_tells_others_is_read_for_each_point(loaded: tuple[Any, DictConfig], scratch: Path) -> None:
    (scratch / "mine").mkdir()
    (scratch / "mine" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"]}')
    points = Points(*loaded)
    for seed in (1, 2):
        words = ["method=from/adapter_config", "method.path=mine", f"seed={seed}", "train.steps=3"]
        assert what(points.trial, words) == what(by_hydra, loaded, words)
