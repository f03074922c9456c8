"""The grids of conf/sweep and the named points of conf/point."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from peftsweep import cli
from peftsweep.config.compose import Trial
from peftsweep.config.fill import conf_dir
from peftsweep.errors import InputError
from peftsweep.forecast import forecast
from peftsweep.sweep import sweep
from tests.conftest import records

Compose = Callable[..., Trial]
Command = Callable[..., tuple[int, str, str]]
Planned = Callable[..., list[Trial]]

CONF = Path(conf_dir())
SMALL = ["model=tiny", "dataset=tiny_math"]
COMPARISON = {  # what PEFT's comparison trains with unless an experiment says otherwise
    "batch_size": 4,
    "steps": 5000,
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup": 0.1,
    "clip": 1.0,
}
SWEEPS = (
    *("compile_study", "distilbert_sst2", "experiments", "hira_baselines", "methods", "module_ablation"),
    *("peft_comparison", "quant_study", "rank_ablation"),
)
POINTS = sorted(f"{file.parent.name}/{file.stem}" for file in (CONF / "point").glob("*/*.yaml"))
POINTS = [point for point in POINTS if not point.startswith("base/")]


def swept(point: str) -> str:
    """The word with which a sweep names a point: a folder of points is a group of its own."""
    folder, _, name = point.partition("/")
    return f"+point/{folder}={name}"


def parsed(point: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(CONF / "point" / f"{point}.yaml"))


def plan(command: Command, *words: str) -> list[dict[str, Any]]:
    """What ``dry_run=true`` writes for the words."""
    code, _, err = command(*words, "dry_run=true", "quiet=true")
    assert (code, err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(Path("multirun/default/plan.json").read_text(encoding="utf-8"))
    return rows


REFERENCE = Path(os.environ.get("PEFTSWEEP_DATA", "/no")).parent / "reference" / "peft_metamath_experiments.tsv"


def experiment(folder: Path, adapter: dict[str, Any], training: dict[str, Any]) -> str:
    """Write an experiment as PEFT's comparison keeps it; what is empty has no file."""
    folder.mkdir(parents=True)
    for name, content in (("adapter_config.json", adapter), ("training_params.json", training)):
        if content:
            (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def planned(command: Command, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The trials that a command's words make, of which none is run."""

    def of(*words: str) -> list[Trial]:
        found: list[Trial] = []
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "_dry_run", lambda trials, *_: found.extend(trials))
            code, _, err = command(*words, "dry_run=true")
        assert (code, err) == (0, "")
        return found

    return of


def point(one: Trial) -> tuple[Any, ...]:
    return one.config.method["r"], one.choices["targets"], one.choices["quant"]


def from_folder(folder: str) -> list[str]:
    return ["method=from/adapter_config", f"method.path='{folder}'", f"train.params_file='{folder}'"]


LORA = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "new_flag": None,
}


def test_an_experiment_folder_runs_as_it_is(compose: Compose, tmp_path: Path) -> None:
    kasa = LORA | {"use_dora": False, "kasa_config": {"beta": 0.5, "gamma": 0.1}}
    folder = experiment(
        tmp_path / "lora" / "kasa-r4", kasa, {"max_steps": 7, "optimizer_kwargs": {"lr": 0.5}, "max_seq_length": 99}
    )
    one = compose(*from_folder(folder))
    assert (one.label, one.choices["method"]) == ("lora/kasa-r4", "lora")
    assert one.tree["method"]["kasa_config"]["_target_"].endswith(".KasaConfig")
    assert (one.tree["method"]["r"], "inference_mode" in one.tree["method"]) == (4, False)
    train = one.config.train
    assert (train.steps, train.learning_rate, train.weight_decay, train.batch_size) == (7, 0.5, 0.01, 4)
    assert (train.learning_rate_scale, one.config.dataset.max_length) == (1.0, 99)
    assert (forecast.check(one).trainable_parameters or 0) > 0
    mine = compose(*from_folder(folder), "+method.r=2", "train.steps=3", "seed=4")
    assert (mine.config.method["r"], mine.config.train.steps, mine.config.seed) == (2, 3, 4)


def test_a_folder_of_experiments_is_a_sweep(command: Command, tmp_path: Path) -> None:
    for name, adapter in (("lora/r4", LORA), ("lora/it's r2", LORA | {"r": 2}), ("full/default", {})):
        experiment(tmp_path / "experiments" / name, adapter, {} if adapter else {"optimizer_kwargs": {"lr": 1e-5}})
    rows = plan(command, "sweep=experiments", f"experiments={tmp_path}/experiments", *SMALL)
    assert {row["label"]: row["trainable_parameters"] for row in rows} == {
        "full/default": 921_344,
        "lora/it's r2": 4_096,
        "lora/r4": 8_192,
    }


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["method=from/adapter_config", "method.path=no"], "method.path=no: no such folder"),
        (["method=from/adapter_config", "method.path=."], "method.path=.: holds no adapter_config.json"),
        (["train.params_file=no.json"], "train.params_file=no.json: no such file"),
        (["sweep=experiments", "experiments=no"], "experiments=no: no folder below it holds an adapter_config.json"),
        (["train.params_file=bad.json"], "max_stepz: no such parameter; did you mean 'max_steps'?"),
    ],
)
def test_an_experiment_that_cannot_be_read_is_one_line(words: list[str], problem: str, command: Command) -> None:
    Path("bad.json").write_text('{"max_stepz": 3}')
    code, _, err = command(*words, *SMALL)
    assert (code, err.count("\n")) == (2, 1)
    assert problem in err


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the list of the experiments is not here")
def test_the_files_of_the_comparison_say_what_its_points_say(compose: Compose, tmp_path: Path) -> None:
    named = {parsed(point)["label"]: point for point in POINTS if point.startswith("peft_comparison/")}
    lines = REFERENCE.read_text(encoding="utf-8").splitlines()[1:]
    assert len(lines) == len(named)
    for line in lines:
        name, adapter, training = line.split("\t")
        folder = experiment(tmp_path / name, json.loads(adapter or "{}"), json.loads(training or "{}"))
        file, point = compose(*SMALL, *from_folder(folder)), compose(*SMALL, swept(named[name]))
        assert file.label == point.label
        for theirs, ours in ((file.tree["method"], point.tree["method"]), (file.tree["train"], point.tree["train"])):
            for key in {*theirs, *ours} - {"target_modules", "learning_rate_scale"}:
                assert theirs.get(key) == ours.get(key), (name, key)
        assert file.tree["method_setup"] == point.tree["method_setup"]


def test_every_sweep_is_known_here() -> None:
    assert {file.stem for file in (CONF / "sweep").glob("*.yaml")} == {*SWEEPS, "tune", "league"}  # which are no grids


# One over a key, one over named points, one over two axes. The others differ in their values.
AXES = ("rank_ablation", "peft_comparison", "compile_study")


@pytest.mark.parametrize(
    "name",
    [n if n in AXES else pytest.param(n, marks=pytest.mark.slow) for n in SWEEPS if n != "experiments"],
)
def test_every_sweep_composes_validates_and_names_its_points(name: str, compose: Compose) -> None:
    compose(f"sweep={name}", *SMALL)
    params = cli.compose([f"sweep={name}", *SMALL]).hydra.sweeper.params
    assert all(isinstance(values, str) for values in params.values())
    (key, values), *others = params.items()
    assert {key for key, _ in others} <= {"seed", "train.compile"}
    group = CONF / key.removeprefix("+")
    options = [file.stem for file in group.glob("*.yaml")] if values == "glob(*)" else values.split(",")
    assert len(options) >= 3
    if group.is_dir():  # else a key, such as method.r
        assert set(options) <= {file.stem for file in group.glob("*.yaml")}


FAST = POINTS[::12]  # of each folder some, and a plain yaml is like another; all of them are in the slow tier


@pytest.mark.parametrize("point", [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in POINTS])
def test_every_point_is_its_label_its_method_and_its_training(point: str, compose: Compose) -> None:
    long = [] if point.startswith("peft_comparison/") else ["train.epochs=100"]  # than its warm-up
    one = compose(*SMALL, *long, swept(point))
    assert one.label == parsed(point)["label"]
    assert one.tree["method"] == parsed(point).get("method", {})  # and no field of another method
    recipe = COMPARISON if point.startswith("peft_comparison/") else {}
    expected = recipe | parsed(point).get("train", {}) | ({"epochs": 100} if long else {})
    assert {key: one.tree["train"][key] for key in expected} == expected
    assert one.config.train.optimizer_kwargs == expected.get("optimizer_kwargs", {})


def test_the_points_of_the_comparison_carry_the_names_of_its_experiments() -> None:
    points = [point for point in POINTS if point.startswith("peft_comparison/")]
    labels = [parsed(point)["label"] for point in points]
    assert len(set(labels)) == len(labels) == 71
    for point, label in zip(points, labels, strict=True):
        file = re.sub(r"[^a-z0-9_.-]+", "-", label.lower().replace("/", "--"))
        assert point == f"peft_comparison/{file}"


def test_the_command_line_wins_over_a_point_and_over_a_sweep(compose: Compose) -> None:
    words = ["train.learning_rate=0.5", "train.steps=7", "method.r=3", "seed=5", "label=mine"]
    point = swept("peft_comparison/lora--llama-3.2-3b-rank64")
    for one in (compose(*SMALL, point, *words), compose("sweep=peft_comparison", *SMALL, *words, point)):
        train = one.config.train
        assert (train.learning_rate, train.steps, one.config.method["r"]) == (0.5, 7, 3)
        assert (one.config.seed, one.label) == (5, "mine")
        assert (one.choices["model"], one.choices["dataset"]) == ("tiny", "tiny_math")
    assert compose(swept("hira/lora"), *SMALL).config.seed == 36  # whose warm-up is short
    assert compose(swept("hira/lora"), *SMALL, "seed=5").config.seed == 5


def test_the_comparison_brings_its_model_and_its_data() -> None:
    cfg = cli.compose(["sweep=peft_comparison", "model.init=random"])
    assert (cfg.model.name_or_path, cfg.model.dtype.name) == ("meta-llama/Llama-3.2-3B", "bfloat16")
    assert (cfg.model.init.name, cfg.dataset.name, cfg.dataset.max_length) == ("random", "metamath", 768)
    assert list(cfg.eval) == ["gsm8k"]


def test_the_ranks_become_five_trials(command: Command) -> None:
    rows = plan(command, "sweep=rank_ablation", *SMALL)
    counts = [row["trainable_parameters"] for row in rows]
    assert [row["label"].split("-")[1:5] for row in rows] == [
        ["lora", f"r{rank}", "qkvo", "4bit"] for rank in (4, 8, 16, 32, 64)
    ]
    assert counts == [counts[0] * factor for factor in (1, 2, 4, 8, 16)]


def test_the_command_line_replaces_the_values_of_a_grid(planned: Planned) -> None:
    trials = planned("sweep=rank_ablation", *SMALL, "method.r=2,3", "quant=none")
    assert [point(one) for one in trials] == [(rank, "qkvo", "none") for rank in (2, 3)]


def test_a_sweep_of_points_carries_their_labels(planned: Planned) -> None:
    trials = planned("sweep=hira_baselines", *SMALL, "train.epochs=100")
    assert [one.label for one in trials] == ["full", "hira", "ia3", "lora"]


@pytest.mark.slow  # nine points; the one above has the labels of points, and others replace the axis of a sweep
def test_points_that_a_pattern_chooses_carry_their_labels(planned: Planned) -> None:
    few = "+point/peft_comparison=glob([lora--*, full*], exclude=*rank64*)"  # the sweep's own key, so it replaces it
    trials = planned("sweep=peft_comparison", *SMALL, few)
    expected = {"lora/llama-3.2-3B-rank32", "full-finetuning/llama-3.2-3B-lr_0.00001"}
    assert expected < {one.label for one in trials}
    assert len({one.identity for one in trials}) == len(trials) == 9


@pytest.mark.parametrize(
    ("name", "seed", "warmup", "batch", "accumulation", "rate"),
    [
        ("hira", 36, 100, 8, 32, 5e-5),
        ("lora", 36, 10, 8, 32, 5e-5),
        ("full", 36, 100, 4, 64, 1e-5),
        ("ia3", 42, 10, 32, 1, 1e-5),
    ],
)
def test_the_hira_baselines_are_trained_as_their_recipes_say(
    name: str, seed: int, warmup: int, batch: int, accumulation: int, rate: float
) -> None:
    cfg = cli.compose(["sweep=hira_baselines", swept(f"hira/{name}")])
    train = cfg.train
    assert (cfg.seed, train.warmup, train.batch_size, train.accumulation) == (seed, warmup, batch, accumulation)
    assert (train.learning_rate, train.epochs, train.weight_decay) == (rate, 1, 0.01)
    assert (train.checkpointing, train.eval_every, train.keep_best, train.best_metric) == (True, "80", True, "loss")
    assert cfg.dataset.validation_samples == 120


@pytest.mark.parametrize(
    "name",
    [
        "lora--llama-3.2-3b-rank14-target-mlp-bdlora",  # modules of its own and a configuration within it
        "prefixtuning--llama-3.2-3b-lr_0.001",  # of no modules
        # Their methods are attached by tests/models, too.
        pytest.param("boft--llama-3.2-3b-default", marks=pytest.mark.slow),
        pytest.param("ln_tuning--llama-3.2-3b-default", marks=pytest.mark.slow),
        pytest.param("lora--llama-3.2-3b-rank32-kasa", marks=pytest.mark.slow),
        pytest.param("vera--llama-3.2-3b-default", marks=pytest.mark.slow),
    ],
)
def test_a_point_attaches_to_any_model_with_its_modules(name: str, compose: Compose) -> None:
    assert (forecast.check(compose(*SMALL, swept(f"peft_comparison/{name}"))).trainable_parameters or 0) > 0


PUBLISHED = {
    label: (int(trainable), int(total), int(size))
    for label, trainable, total, size in (
        line.split("\t") for line in (Path(__file__).parent / "published.tsv").read_text().splitlines()[3:]
    )
}


# Bytes more than published. PEFT's AdaMSS has clusters of sizes that the weights decide, and a header of other numbers
# for them; an earlier version of PEFT wrote 24 bytes fewer of SHiRA's header.
HEADERS = {"adamss/llama-3.2-3B-rank32": 648, "shira/llama-3.2-3B-lr_0.0003-random_seed_42": 24}
# AdaLoRA's training left more ranks to the smaller of its two kinds of layers than to the larger: 4.5% fewer bytes.
UNEVEN_RANKS = 1_597_488


@pytest.mark.slow
@pytest.mark.parametrize("label", sorted(PUBLISHED))
def test_counts_and_sizes_are_those_that_peft_published(label: str, compose: Compose) -> None:
    """Llama 3.2 3B in its shape alone."""
    point = next(point for point in POINTS if parsed(point)["label"] == label)
    one = compose("sweep=peft_comparison", "model.init=random", "dataset=tiny_math", swept(point))
    foreseen, (trainable, total, size) = forecast.check(one), PUBLISHED[label]
    print(
        f"{label}: {foreseen.trainable_parameters:,} of {foreseen.total_parameters:,}, {foreseen.adapter_bytes:,} bytes"
    )
    assert (foreseen.trainable_parameters, foreseen.total_parameters) == (trainable, total)
    more = UNEVEN_RANKS if label.startswith("adalora") else HEADERS.get(label, 0)
    assert (foreseen.adapter_bytes or 0) - size == more


ABLATIONS = {(r, "qkvo", "4bit") for r in (4, 8, 16, 32, 64)}
ABLATIONS |= {(16, targets, "none") for targets in ("qv", "qkv", "qkvo", "all_linear", "mlp")}


@pytest.mark.slow  # ten points; two sweeps of a point each are joined below
@pytest.mark.parametrize(
    ("words", "launcher"), [("sweep=rank_ablation,module_ablation", "local"), ("sweep=glob(*_ablation)", "basic")]
)
def test_several_options_of_sweep_are_the_union_of_their_points(words: str, launcher: str, planned: Any) -> None:
    trials = planned(words, f"hydra/launcher={launcher}")
    assert {point(one) for one in trials} == ABLATIONS
    assert len({one.identity for one in trials}) == len(trials) == 10


@pytest.mark.slow
def test_axes_of_the_command_line_are_multiplied_into_each_option_of_sweep(planned: Any) -> None:
    trials = planned("sweep=rank_ablation,module_ablation", "seed=0,1", "targets=q,v", "-m")
    expected = {(r, targets, "4bit") for r in (4, 8, 16, 32, 64) for targets in ("q", "v")}
    expected |= {(16, targets, "none") for targets in ("q", "v")}  # in place of the option's own targets
    for seed in (0, 1):
        assert {point(one) for one in trials if one.config.seed == seed} == expected
    assert len(trials) == 2 * len(expected)


def own_sweep(name: str, text: str, seeds: str) -> None:
    """Write an option of ``sweep`` over ``seeds`` into the user's folder ``mine``."""
    Path("mine/sweep").mkdir(parents=True, exist_ok=True)
    axes = f"hydra: {{sweeper: {{params: {{seed: '{seeds}'}}}}}}"
    Path(f"mine/sweep/{name}.yaml").write_text(f"# @package _global_\n{text}\n{axes}\n")


# A key of ours and one of Hydra's; halving is one of ours.
WHOLE = ["hydra: {launcher: {workers: 2}}"]
NOT_WHOLE = [pytest.param(text, marks=pytest.mark.slow) for text in ("study: other", "halving: {min_steps: 5}")]


@pytest.mark.parametrize("text", [*WHOLE, *NOT_WHOLE])
def test_options_of_sweep_that_cannot_be_joined_are_one_line(text: str, command: Command) -> None:
    Path("mine/sweep").mkdir(parents=True)
    Path("mine/sweep/own.yaml").write_text(f"# @package _global_\n{text}\n")
    code, _, err = command("--config-dir", "mine", "dry_run=true", "sweep=quant_study,own", "hydra.launcher.retries=0")
    assert (code, err.count("\n")) == (2, 1)
    key = {"hydra: {launcher: {workers: 2}}": "hydra.launcher"}.get(text, text.partition(":")[0])
    assert f"sweep=quant_study,own: cannot be joined, because {key} has one value for the whole sweep" in err


def test_options_of_sweep_that_share_a_point_have_it_once(command: Command) -> None:
    own_sweep("one", "study: other", "1,2")  # what they agree in is of the sweep as a whole
    own_sweep("two", "study: other", "2,3")
    code, out, err = command("--config-dir", "mine", "dry_run=true", "sweep=one,two,null", "study=other")
    assert (code, err) == (0, "")
    assert "4 trials, 4 new; nothing was trained (multirun/other/plan.json)" in out  # and of null seed 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["sweep=glob(no*)"], "sweep=glob(no*): matches no option of sweep"),
        (["sweep=rank_ablation,no"], "sweep=no: no such option"),
        (["sweep=rank_ablation,experiments"], "experiments: must be given"),
        (["sweep=rank_ablation,quant_study", "hydra/sweeper=basic"], "sweep=rank_ablation: sweeps method.r, which"),
    ],
)
def test_a_sweep_that_would_not_be_what_was_asked_is_one_line(words: list[str], problem: str, command: Command) -> None:
    code, _, err = command(*words, "dry_run=true")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"peftsweep: {problem}")


@pytest.mark.parametrize("word", ["sweep=rank_ablation", "sweep=rank_ablation,module_ablation", "method.r=4,8"])
def test_from_python_a_sweep_is_refused_instead_of_one_trial_that_nobody_asked_for(word: str) -> None:
    with pytest.raises(InputError, match=r"more than one trial|takes one trial"):
        cli.run_one([word, "dry_run=true"])


@pytest.mark.slow
def test_joined_sweeps_are_halved_and_resumed_as_any_other(command: Command) -> None:
    small = ["train.steps=9", "halving.min_steps=3", "dataset.samples=64", "eval.perplexity.samples=4"]
    words = ["sweep=rank_ablation,quant_study", "method.r=2,4", "eval=[perplexity]", "train.warmup=1", *small]
    code, out, _ = command(*words)
    assert code == 0
    assert "rung 1: the best 2 of 8 by loss go on" in out
    before = {name: result.run_info for name, result in records().items()}
    assert len(before) == 8
    assert command(*words)[0] == 0
    assert {name: result.run_info for name, result in records().items()} == before
